"""What the content domain does: collect facts, publish a post a signal and a digest a session."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from content.events import PostPublished
from content.logic.rendering import render_digest, render_signal
from content.models import Fact, Kind, Post, Status, digest_post_id, signal_post_id
from content.ports import Posts
from shared.clock import Clock
from shared.errors import ConflictError, NotFoundError, StaleError
from shared.events import EventPublisher
from shared.market.sessions import EXCHANGE, Session, calendar
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
            await self._open(session)
            await self.posts.set_digested_through(session.closes_at)
            opened += 1
            session = calendar().next_close(session.closes_at)
        return opened

    async def sweep(self) -> int:
        """Write the drafts that are due and tell of posts whose event is still owed; returns how many."""
        deadline = self.wall.now() + BUDGET
        done = 0
        for post in await self.posts.due(self.wall.now(), 200):
            if self.wall.now() >= deadline:
                break
            try:
                await (self._write_digest(post) if post.status is Status.DRAFT else self._tell(post))
                done += 1
            except StaleError:
                log.info("post.raced", post_id=post.post_id)  # somebody else wrote it: see next time
        return done

    async def listed(self, kind: Kind | None, after: str | None, *, newest_first: bool, limit: int) -> list[Post]:
        """Published posts, in order of ``recorded_at``."""
        found = await self.posts.listed(kind, after, newest_first=newest_first, limit=limit)
        return [p for p in found if p.status is Status.PUBLISHED]

    async def read(self, post_id: str) -> Post:
        """
        Read one published post.

        Raises:
            NotFoundError: there is none.

        """
        for kind in Kind:
            post = await self.posts.read(kind, post_id)
            if post and post.status is Status.PUBLISHED:
                return post
        raise NotFoundError(f"there is no post {post_id[:64]}")

    async def _publish_signal(self, fact: Fact) -> None:
        now = self.wall.now()
        post_id = signal_post_id(fact.signal_id)
        post = Post(
            post_id=post_id,
            kind=Kind.SIGNAL,
            status=Status.PUBLISHED,
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
        await self.publisher.publish([_event(post)])
        try:
            await self.posts.save(replace(post, due_at=None))
        except StaleError:
            return  # a twin told it too, or a newer version is being written and will be told

    async def _open(self, session: Session) -> None:
        now = self.wall.now()
        draft = Post(
            post_id=digest_post_id(EXCHANGE, session.date),
            kind=Kind.DIGEST,
            status=Status.DRAFT,
            version=0,
            session=session.date,
            symbols=[],
            signal_ids=[],
            text=render_digest(session.date, []),
            occurred_at=session.closes_at,
            recorded_at=now,
            updated_at=now,
            due_at=now + self.settle,
        )
        try:
            await self.posts.create(draft)
        except ConflictError:
            return  # another instance opened it

    async def _write_digest(self, digest: Post) -> None:
        """
        Make the digest say what is known now.

        The draft is read before the facts and written under its etag, and a fact is noted before the digest is
        looked at: so a fact that arrives in between finds this version, or makes this write stale.
        """
        facts = await self.posts.facts(digest.session)
        now = self.wall.now()
        written = await self.posts.save(
            replace(
                digest,
                status=Status.PUBLISHED,
                version=digest.version + 1,
                symbols=sorted({f.symbol for f in facts}),
                signal_ids=sorted(f.signal_id for f in facts),
                text=render_digest(digest.session, facts),
                updated_at=now,
                due_at=now + GRACE,
            )
        )
        await self._tell(written)

    async def _join_digest(self, fact: Fact) -> None:
        while True:
            digest = await self.posts.read(Kind.DIGEST, digest_post_id(EXCHANGE, fact.session))
            if digest is None or fact.signal_id in digest.signal_ids:
                return
            try:
                if digest.status is Status.DRAFT:
                    # Only touched, so that a writer that has not seen this fact loses its etag.
                    await self.posts.save(digest)
                else:
                    await self._write_digest(digest)
            except StaleError:
                continue
            return


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
        occurred_at=signal.occurred_at,
    )


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
