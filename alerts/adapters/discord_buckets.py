"""
What Discord lets a webhook do now, kept in storage, so that all instances together stay within it.

A call reserves its place by a conditional write before it is sent, and what the answer's headers say is kept after
it. No number of Discord's is known in advance: until the first answer one call is under way at a time.
"""

import asyncio
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Self
from uuid import uuid4

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import ConflictError, NotFoundError, RateLimitedError, RecipientGoneError, StaleError

CONTAINER = "system"
PARTITION = "discord"
ALL = "global"
"""Instead of a webhook's id: what holds for every webhook."""
PATIENCE = timedelta(seconds=2.5)
"""How long a call may wait for its place; a longer wait is left to the delivery's next attempt."""
GRACE = 0.5
"""Seconds that storage may take besides."""
LOOK_AGAIN = timedelta(milliseconds=250)
LONGEST_CALL = timedelta(seconds=15)
"""After this a call whose answer nobody recorded is over, and counted by Discord if it ever arrived."""
GLOBAL_AGE = timedelta(seconds=5)
TRIES = 20
REMEMBERED = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What an answer says of its bucket: ``wait`` when it asked us to slow down, ``is_lost`` when it never came."""

    limit: int | None = None
    remaining: int | None = None
    reset_after: timedelta | None = None
    wait: timedelta | None = None
    is_global: bool = False
    is_gone: bool = False
    is_lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """
    One webhook's allowance for one kind of call.

    ``open`` are calls without a recorded answer: Discord may count each of them in this window or in the next, so
    each takes a place in both.
    """

    limit: int | None = None
    window: timedelta | None = None
    used: int = 0
    resets_at: datetime | None = None
    blocked_until: datetime | None = None
    open: Mapping[str, datetime] = field(default_factory=dict)

    def as_of(self, now: datetime) -> Self:
        """The bucket without what is over by *now*."""
        is_reset = self.resets_at is not None and self.resets_at <= now
        return replace(
            self,
            used=0 if is_reset else self.used,
            resets_at=None if is_reset else self.resets_at,
            blocked_until=self.blocked_until if self.blocked_until and self.blocked_until > now else None,
            open={permit: at for permit, at in self.open.items() if at > now - LONGEST_CALL},
        )

    def wait(self, now: datetime) -> timedelta:
        """How long until a call may be made; nothing if it may be made now."""
        known = self.as_of(now)
        if known.blocked_until:
            return known.blocked_until - now
        places = 1 if known.limit is None else known.limit - known.used
        if len(known.open) < places:
            return timedelta()
        return known.resets_at - now if known.resets_at else LOOK_AGAIN

    def taken(self, permit: str, now: datetime) -> Self:
        """One place less."""
        known = self.as_of(now)
        return replace(known, open={**known.open, permit: now})

    def answered(self, permit: str, news: News | None, now: datetime) -> Self:
        """
        The place is used, and known to be; without *news* nothing was sent, and it is free again.

        Discord's window began before its answer came, so counting from the answer never ends it too early.
        """
        known = self.as_of(now)
        if news is not None and news.is_lost and known.limit is not None:
            return known  # Discord may count it yet: its place stays taken
        known = replace(known, open={other: at for other, at in known.open.items() if other != permit})
        if news is None or news.is_lost:
            return known
        limit = news.limit or known.limit
        counted = known.used + 1 if news.limit is None or news.remaining is None else news.limit - news.remaining
        resets_at, blocked_until, window = known.resets_at, known.blocked_until, known.window
        if news.reset_after is not None:
            resets_at = _later(resets_at, now + news.reset_after)
            window = max(window or news.reset_after, news.reset_after)
        elif resets_at is None and window:
            resets_at = now + window  # an answer without headers: this call may have begun the window
        if news.wait is not None:
            blocked_until = _later(blocked_until, now + news.wait)
        elif news.limit is None and news.remaining == 0 and news.reset_after is not None:
            blocked_until = _later(blocked_until, now + news.reset_after)
        used = max(known.used, counted) if resets_at else 0
        return replace(known, limit=limit, window=window, used=used, resets_at=resets_at, blocked_until=blocked_until)

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Self:
        """A bucket as it is stored."""
        return cls(
            limit=body.get("limit"),
            window=timedelta(seconds=body["window_s"]) if body.get("window_s") else None,
            used=body.get("used", 0),
            resets_at=_instant(body.get("resets_at")),
            blocked_until=_instant(body.get("blocked_until")),
            open={permit: parse_instant(at) for permit, at in body.get("open", {}).items()},
        )

    def body(self) -> dict[str, Any]:
        """The stored form."""
        return {
            "limit": self.limit,
            "window_s": self.window.total_seconds() if self.window else None,
            "used": self.used,
            "resets_at": format_instant(self.resets_at) if self.resets_at else None,
            "blocked_until": format_instant(self.blocked_until) if self.blocked_until else None,
            "open": {permit: format_instant(at) for permit, at in self.open.items()},
        }


class Buckets:
    """
    The stored buckets of all webhooks, one document a webhook.

    What a process remembers of a document only saves it the reading: every change is a conditional write.
    """

    def __init__(self, documents: Documents, wall: Clock, *, patience: timedelta = PATIENCE) -> None:
        self._documents = documents
        self._wall = wall
        self._patience = patience
        self._known: dict[str, Document] = {}
        self._locks = [asyncio.Lock() for _ in range(64)]  # twins in this process would only collide on the etag
        self._global_until: datetime | None = None
        self._global_read_at: datetime | None = None

    async def reserve(self, webhook_id: str, token: str, call: str) -> str:
        """
        A permit for one *call*; it must be given back by ``settle``.

        Raises:
            RateLimitedError: there is no place in time; says when there will be one.
            RecipientGoneError: Discord once said that this webhook is no more.

        """
        patience = self._patience.total_seconds()
        try:
            # A limit of its own: who waits here has surely sent nothing, which a limit around it all could not tell.
            async with asyncio.timeout(patience + GRACE):
                return await self._reserve(webhook_id, token, call, asyncio.get_running_loop().time() + patience)
        except TimeoutError:
            raise RateLimitedError("many wait for the webhook's bucket", retry_after=LOOK_AGAIN) from None

    async def _reserve(self, webhook_id: str, token: str, call: str, deadline: float) -> str:
        while True:
            await self._unless_all_wait()
            permit, wait = await self._try(webhook_id, token, call)
            if permit is not None:
                return permit
            if asyncio.get_running_loop().time() + wait.total_seconds() > deadline:
                raise RateLimitedError("the webhook's bucket is empty", retry_after=wait)
            await asyncio.sleep(wait.total_seconds())

    async def settle(self, webhook_id: str, token: str, call: str, permit: str, news: News | None) -> None:
        """Record what the answer said; None when nothing was sent."""
        now = self._wall.now()
        if news and news.wait is not None and news.is_global:
            await self._block_all(now + news.wait)
            news = replace(news, wait=None)

        def settled(body: Mapping[str, Any]) -> dict[str, Any]:
            bucket = Bucket.read(body.get(call, {})).answered(permit, news, now)
            gone = {"gone": _print_of(token)} if news and news.is_gone else {}
            return {**body, call: bucket.body(), **gone}

        async with self._lock(webhook_id):
            for _ in range(TRIES):
                document = await self._document(webhook_id)
                if await self._write(document, settled(document.body), webhook_id):
                    return
        raise RateLimitedError("too many instances write the webhook's bucket at once", retry_after=LOOK_AGAIN)

    async def _try(self, webhook_id: str, token: str, call: str) -> tuple[str | None, timedelta]:
        """A permit, or how long to wait for one."""
        permit = uuid4().hex[:12]
        async with self._lock(webhook_id):
            is_fresh = webhook_id not in self._known
            for _ in range(TRIES):
                document = await self._document(webhook_id)
                if document.body.get("gone") == _print_of(token):
                    raise RecipientGoneError("Discord said that this webhook is gone, so it is not used again")
                now = self._wall.now()
                bucket = Bucket.read(document.body.get(call, {}))
                wait = bucket.wait(now)
                if wait <= timedelta():
                    body = {**document.body, call: bucket.taken(permit, now).body()}
                    if await self._write(document, body, webhook_id):
                        return permit, wait
                    is_fresh = True  # what is known now was read after somebody else's write
                elif is_fresh:
                    return None, wait
                else:
                    self._known.pop(webhook_id, None)  # it may be outdated: others give places back as well
                    is_fresh = True
        return None, LOOK_AGAIN

    async def _write(self, document: Document, body: Mapping[str, Any], webhook_id: str) -> bool:
        """Whether it was written: not if somebody else was first."""
        self._known.pop(webhook_id, None)
        try:
            stored = await (
                self._documents.replace(CONTAINER, document.with_body(body))
                if document.etag
                else self._documents.create(CONTAINER, document.with_body(body))
            )
        except (StaleError, ConflictError, NotFoundError):
            await asyncio.sleep(random.uniform(0.002, 0.02))  # noqa: S311 - jitter: another instance was first
            return False
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[webhook_id] = stored
        return True

    async def _document(self, webhook_id: str) -> Document:
        if (known := self._known.get(webhook_id)) is not None:
            return known
        id_ = f"discord|{webhook_id}"
        try:
            return await self._documents.read(CONTAINER, PARTITION, id_)
        except NotFoundError:
            return Document(id=id_, partition=PARTITION, sort=sort_key(self._wall.now(), id_))

    async def _unless_all_wait(self) -> None:
        """Discord's limit on an address counts for every webhook."""
        now = self._wall.now()
        if self._global_read_at is None or now - self._global_read_at >= GLOBAL_AGE:
            self._known.pop(ALL, None)
            stored = await self._document(ALL)
            self._global_until = _later(self._global_until, _instant(stored.body.get("blocked_until")))
            self._global_read_at = now
        if self._global_until and self._global_until > now:
            raise RateLimitedError("Discord asked all of us to slow down", retry_after=self._global_until - now)

    async def _block_all(self, until: datetime) -> None:
        self._global_until = _later(self._global_until, until)
        for _ in range(TRIES):
            stored = await self._document(ALL)
            latest = _later(until, _instant(stored.body.get("blocked_until"))) or until
            if await self._write(stored, {"blocked_until": format_instant(latest)}, ALL):
                return

    def _lock(self, webhook_id: str) -> asyncio.Lock:
        return self._locks[hash(webhook_id) % len(self._locks)]


def _print_of(token: str) -> str:
    """What tells one token from another, and nothing more of it."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def _later(one: datetime | None, other: datetime | None) -> datetime | None:
    return max(one, other) if one and other else one or other


def _instant(text: object) -> datetime | None:
    return parse_instant(text) if isinstance(text, str) else None
