"""A newsroom for tests: one storage, one topic, two clocks, and as many content services as wanted."""

from datetime import date, timedelta
from typing import Any

from content.adapters.documents import PostDocuments
from content.logic.rendering import render_digest
from content.models import Kind, Post, Text, digest_post_id, signal_post_id
from content.service import DIGEST_DELAY, GRACE, ContentService
from shared.clock import StoppedClock
from shared.market.sessions import EXCHANGE, calendar
from tests.builders import WALL
from tests.standins import CLOSE, Storage, Topic

SESSION = date(2012, 11, 21)
SETTLE = timedelta(seconds=60)


def a_post(name: str = "s1", **changes: Any) -> Post:
    """A post of the signal *name*; every field can be given."""
    fields: dict[str, Any] = {
        "post_id": signal_post_id(name),
        "kind": Kind.SIGNAL,
        "version": 1,
        "session": SESSION,
        "symbols": ["AAPL"],
        "signal_ids": [name],
        "text": Text(title="AAPL: long", summary="It rose.", html="<p>It <b>rose</b>.</p>"),
        "occurred_at": CLOSE,
        "recorded_at": WALL,
        "updated_at": WALL,
    }
    return Post(**(fields | changes))


class Newsroom:
    """By default it is the moment at which the digest of SESSION may be opened, and of no session before."""

    def __init__(self) -> None:
        self.wall = StoppedClock(WALL)
        self.market = StoppedClock(CLOSE + DIGEST_DELAY)
        self.documents = Storage(self.wall)
        self.topic = Topic()
        self.live_from = calendar().previous_close(CLOSE - timedelta(seconds=1)).closes_at
        self.posts = PostDocuments(self.documents)

    def service(self, **changes: Any) -> ContentService:
        parts: dict[str, Any] = {
            "posts": PostDocuments(changes.pop("documents", self.documents)),
            "publisher": self.topic,
            "wall": self.wall,
            "market": self.market,
            "live_from": self.live_from,
            "settle": SETTLE,
        }
        return ContentService(**(parts | changes))

    async def settled(self) -> None:
        """Let healthy instances do whatever is owed."""
        for _ in range(4):
            self.wall.at += max(SETTLE, GRACE) + timedelta(seconds=1)
            await self.service().open_digests()
            await self.service().sweep()

    async def digest(self, session: date = SESSION) -> Post | None:
        return await self.posts.read(Kind.DIGEST, digest_post_id(EXCHANGE, session))

    async def listed(self, kind: Kind | None = None) -> list[Post]:
        return await self.posts.listed(kind, None, newest_first=False, limit=500)

    async def owed(self) -> int:
        """How many things are still to be done, now or later."""
        return len(await self.posts.due(self.wall.at + timedelta(days=365), 500))

    async def check_digest(self, signal_ids: set[str], session: date = SESSION) -> Post:
        """The digest is there, says exactly what is known of its session, and everything was told."""
        digest = await self.digest(session)
        assert digest is not None
        assert list(digest.signal_ids) == sorted(signal_ids)
        assert digest.text == render_digest(session, await self.posts.facts(session))
        assert await self.owed() == 0
        versions = [e.version for e in self.topic.told if e.post_id == digest.post_id]  # type: ignore[attr-defined]
        assert max(versions) == digest.version
        return digest
