"""Our restraint towards providers, counted in storage so that every instance shares it."""

import asyncio
import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import ConflictError, NotFoundError, QuotaSpentError, StaleError
from shared.market.pacing import next_permit, remembered
from shared.market.registry import Window

CONTAINER = "quota"
PATIENCE = timedelta(seconds=4)
"""How long a call may wait for its instant; a longer wait is left to the next slot."""


class Throttle:
    """
    Hands out permits for one provider's calls. A permit is a reserved instant on the wall clock.

    Raises RateLimitedError with ``retry_after`` when the next instant is too far away to wait for.
    """

    def __init__(self, documents: Documents, wall: Clock, provider: str, windows: Sequence[Window]) -> None:
        self._documents = documents
        self._wall = wall
        self._provider = provider
        self._windows = windows
        self._one_at_a_time = asyncio.Lock()

    async def permit(self, *, patience: timedelta = PATIENCE) -> None:
        """Wait for the next free instant, at most *patience*."""
        now = self._wall.now()
        if not self._windows:
            await self._unless_blocked(now + patience)
            return
        async with self._one_at_a_time:  # twins in this process would only collide on the etag
            instant = await self._reserve(now + patience)
        wait = (instant - self._wall.now()).total_seconds()
        if wait > 0:
            await asyncio.sleep(wait)

    async def refused(self, retry_after: timedelta) -> None:
        """The provider refused a call all the same: nobody asks again before *retry_after* has passed."""
        while True:
            document = await self._read()
            until = self._wall.now() + retry_after
            body = {**document.body, "blocked_until": format_instant(until), "refusals": document.body["refusals"] + 1}
            try:
                await self._documents.replace(CONTAINER, document.with_body(body))
            except StaleError:
                await asyncio.sleep(random.uniform(0.005, 0.05))  # noqa: S311 - jitter: another instance was first
                continue
            return

    async def _unless_blocked(self, latest: datetime) -> None:
        """Where nothing is counted only a refusal can hold a call back; nothing is written."""
        try:
            document = await self._documents.read(CONTAINER, self._provider, "throttle")
        except NotFoundError:
            return
        blocked = _instant(document.body["blocked_until"])
        if blocked and blocked > self._wall.now():
            self._must_be_near(blocked, latest)
            await asyncio.sleep((blocked - self._wall.now()).total_seconds())

    def _must_be_near(self, instant: datetime, latest: datetime) -> None:
        if instant > latest:
            raise QuotaSpentError(
                f"{self._provider}: our quota is spent for now", retry_after=instant - self._wall.now()
            )

    async def _reserve(self, latest: datetime) -> datetime:
        while True:
            document = await self._read()
            b: dict[str, Any] = dict(document.body)
            blocked = _instant(b["blocked_until"])
            now = max(self._wall.now(), blocked) if blocked else self._wall.now()
            recent = [parse_instant(text) for text in b["recent"]]
            instant = next_permit(self._windows, now=now, recent=recent)
            self._must_be_near(instant, latest)
            kept = [*recent, instant][-remembered(self._windows) :]
            b |= {"recent": [format_instant(at) for at in kept], "calls": b["calls"] + 1}
            try:
                await self._documents.replace(CONTAINER, document.with_body(b))
            except StaleError:
                await asyncio.sleep(random.uniform(0.005, 0.05))  # noqa: S311 - jitter: another instance was first
                continue
            return instant

    async def _read(self) -> Document:
        try:
            return await self._documents.read(CONTAINER, self._provider, "throttle")
        except NotFoundError:
            body = {"recent": [], "calls": 0, "refusals": 0, "blocked_until": None}
            sort = sort_key(self._wall.now(), self._provider)
            document = Document(id="throttle", partition=self._provider, sort=sort, body=body)
            try:
                return await self._documents.create(CONTAINER, document)
            except ConflictError:
                return await self._documents.read(CONTAINER, self._provider, "throttle")


def _instant(text: str | None) -> datetime | None:
    return parse_instant(text) if text else None
