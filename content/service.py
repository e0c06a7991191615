"""What the content domain does: collect facts, publish a post a signal and a digest a session."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from content.events import PostPublished
from content.logic.rendering import render_digest, render_signal
from content.models import Draft, Fact, Kind, Post, digest_post_id, signal_post_id
from content.ports import Posts
from shared.clock import Clock
from shared.errors import ConflictError, NotFoundError, StaleError, TroopError
from shared.events import EventPublisher
from shared.market.sessions import EXCHANGE, calendar
from shared.telemetry import get_logger
from signals.events import SignalRaised

log = get_logger(__name__)

GRACE = timedelta(seconds=10)
"""How long the handler that stored a post has for telling of it before the sweep does."""
DIGEST_DELAY = timedelta(minutes=30)
"""Market time between a session's close and its digest."""
BUDGET = timedelta(seconds=8)
EXCHANGE_ZONE = ZoneInfo("America/New_York")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentService:
    """The content domain."""

    posts: Posts
    publisher: EventPublisher
    wall: Clock
    market: Clock
    live_from: datetime | None
    settle: timedelta

    async def collect(self, signal: SignalRaised) -> None:
        """Keep a signal's facts, publish its post, and put it into its session's digest if that exists."""
        fact = _fact(signal)
        await self.posts.note(fact)
        await self._publish_signal(fact)
        await self._join_digest(fact)

    async def open_digests(self) -> int:
        """Open a draft for every session that closed since the last one; returns how many."""
        deadline = self.wall.now() + BUDGET
        now = self.market.now()
        through = await self.posts.digested_through() or self.live_from
        if through is None:
            await self.posts.set_digested_through(calendar().previous_close(now).closes_at)
            return 0
        opened = 0
        session = calendar().next_close(through)
        while session.closes_at + DIGEST_DELAY <= now and self.wall.now() < deadline:
            await self.posts.open_draft(
                Draft(session=session.date, closed_at=session.closes_at, due_at=self.wall.now() + self.settle)
            )
            await self.posts.set_digested_through(session.closes_at)
            opened += 1
            session = calendar().next_close(session.closes_at)
        return opened

    async def sweep(self) -> int:
        """
        Write the drafts that are due and tell of posts whose event is still owed; returns how many.

        What cannot be finished now stays due and holds up nothing else.
        """
        deadline = self.wall.now() + BUDGET
        done = 0
        for owing in await self.posts.due(self.wall.now(), 200):
            if self.wall.now() >= deadline:
                break
            try:
                await (self._publish_digest(owing) if isinstance(owing, Draft) else self._tell(owing))
                done += 1
            except (StaleError, ConflictError) as e:
                log.info("post.raced", reason=str(e))  # somebody else wrote it: see next time
            except TroopError as e:
                log.warning("post.left", owing=_named(owing), error=type(e).__name__, reason=str(e))
            except Exception:
                log.exception("post.broke", owing=_named(owing))
        return done

    async def listed(self, kind: Kind | None, after: str | None, *, newest_first: bool, limit: int) -> list[Post]:
        """Published posts, in order of ``recorded_at``."""
        return await self.posts.listed(kind, after, newest_first=newest_first, limit=limit)

    async def read(self, post_id: str) -> Post:
        """
        Read one published post.

        Raises:
            NotFoundError: there is none.

        """
        for kind in Kind:
            post = await self.posts.read(kind, post_id)
            if post:
                return post
        raise NotFoundError(f"there is no post {post_id[:64]}")

    async def _publish_signal(self, fact: Fact) -> None:
        now = self.wall.now()
        post_id = signal_post_id(fact.signal_id)
        post = Post(
            post_id=post_id,
            kind=Kind.SIGNAL,
            version=1,
            session=fact.session,
            symbols=[fact.symbol],
            signal_ids=[fact.signal_id],
            text=render_signal(fact),
            occurred_at=fact.occurred_at,
            recorded_at=now,
            updated_at=now,
            due_at=now + GRACE,
        )
        try:
            stored: Post | None = await self.posts.create(post)
        except ConflictError:
            stored = await self.posts.read(Kind.SIGNAL, post_id)
        if stored and stored.due_at:
            await self._tell(stored)

    async def _tell(self, post: Post) -> None:
        try:
            await self.publisher.publish([_event(post)])
        except TroopError:
            # Behind the others: posts that cannot be told now must not hold up drafts that are due.
            with suppress(StaleError):
                await self.posts.save(replace(post, due_at=self.wall.now() + GRACE))
            raise
        try:
            await self.posts.save(replace(post, due_at=None))
        except StaleError:
            return  # a twin told it too, or a newer version is being written and will be told

    async def _publish_digest(self, draft: Draft) -> None:
        """
        Write the digest a draft stands for from what is known now, then close the draft.

        A fact is noted before its draft is touched, and the facts are read before the draft is closed under its
        etag: so a fact that arrives in between is in this version, or keeps the draft open for the next. They are
        read after the digest that is written under its own etag: so no version knows less than the one before.
        """
        open_draft: Draft | None = draft
        while open_draft:
            digest = await self.posts.read(Kind.DIGEST, digest_post_id(EXCHANGE, open_draft.session))
            facts = await self.posts.facts(open_draft.session)
            if digest is None:
                now = self.wall.now()
                digest = await self.posts.create(
                    Post(
                        post_id=digest_post_id(EXCHANGE, open_draft.session),
                        kind=Kind.DIGEST,
                        version=1,
                        session=open_draft.session,
                        symbols=_symbols(facts),
                        signal_ids=_signal_ids(facts),
                        text=render_digest(open_draft.session, facts),
                        occurred_at=open_draft.closed_at,
                        recorded_at=now,
                        updated_at=now,
                        due_at=now + GRACE,
                    )
                )
                await self._tell(digest)
            else:
                await self._correct(digest, facts)
            open_draft = await self.posts.close_draft(open_draft)

    async def _correct(self, digest: Post, facts: Sequence[Fact]) -> None:
        """Let a published digest say what is known now, as its next version; nothing new changes nothing."""
        if list(digest.signal_ids) == _signal_ids(facts):
            return
        now = self.wall.now()
        corrected = replace(
            digest,
            version=digest.version + 1,
            symbols=_symbols(facts),
            signal_ids=_signal_ids(facts),
            text=render_digest(digest.session, facts),
            updated_at=now,
            due_at=now + GRACE,
        )
        await self._tell(await self.posts.save(corrected))

    async def _join_digest(self, fact: Fact) -> None:
        """
        See to it that a digest that is written already says this fact too.

        Its draft is opened again, so that all the facts that come late together make one next version.
        """
        while not await self.posts.touch_draft(fact.session):
            digest = await self.posts.read(Kind.DIGEST, digest_post_id(EXCHANGE, fact.session))
            if digest is None or fact.signal_id in digest.signal_ids:
                return
            due_at = self.wall.now() + self.settle
            await self.posts.open_draft(Draft(session=fact.session, closed_at=digest.occurred_at, due_at=due_at))


def _symbols(facts: Sequence[Fact]) -> list[str]:
    return sorted({fact.symbol for fact in facts})


def _signal_ids(facts: Sequence[Fact]) -> list[str]:
    return sorted(fact.signal_id for fact in facts)


def _fact(signal: SignalRaised) -> Fact:
    return Fact(
        signal_id=signal.signal_id,
        symbol=signal.symbol,
        interval=signal.interval,
        entry=signal.entry,
        strategy=signal.strategy,
        direction=signal.direction,
        strength=signal.strength,
        reference_price=signal.reference_price,
        params=signal.params,
        features=signal.features,
        provider=signal.provider,
        session=signal.occurred_at.astimezone(EXCHANGE_ZONE).date(),
        occurred_at=signal.occurred_at.astimezone(UTC),
    )


def _named(owing: Draft | Post) -> str:
    return f"draft of {owing.session}" if isinstance(owing, Draft) else owing.post_id


def _event(post: Post) -> PostPublished:
    symbols: Sequence[str] = post.symbols
    return PostPublished(
        occurred_at=post.occurred_at,
        recorded_at=post.updated_at,
        post_id=post.post_id,
        kind=post.kind.value,
        version=post.version,
        title=post.text.title,
        symbols=symbols,
    )
