"""
Holes in what we watch, found without anybody asking and queued to be filled with calls that nothing else wants.

A hole comes of a slot that a provider answered with less than there was. New bars go on behind it, so no slot ever
looks at it again: a round now and then does, a few series each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Documents
from shared.errors import InvalidPayloadError
from shared.market.callers import Caller, CappedError
from shared.market.conditional import changed
from shared.market.fetches import Fetches, Wanted
from shared.market.gaps import Slice, first_slice
from shared.market.library import Library
from shared.market.models import Priority
from shared.market.sessions import calendar
from shared.market.stores import Series
from shared.telemetry import get_logger

log = get_logger(__name__)

PARTITION, ROUND = "mending", "round"
MENDER = Caller(id="mending")
"""Holes together may spend what one caller may."""
ROUND_EVERY = timedelta(minutes=15)
AGAIN = timedelta(days=1)
"""How long a series that was looked at is left alone (wall time)."""
AT_ONCE = 25
"""How many series a round looks at: their whole histories are read."""


@dataclass(slots=True, kw_only=True)
class Mending:
    """Looks for holes by a timer, in one instance at a time."""

    documents: Documents
    library: Library
    fetches: Fetches
    wall: Clock
    _looked_at: datetime | None = field(default=None, init=False)

    async def work(self) -> int:
        """Queue fetches for the holes of the series that are due to be looked at; returns how many."""
        now = self.wall.now()
        if self._looked_at is not None and now - self._looked_at < ROUND_EVERY:
            return 0
        self._looked_at = now
        watched = {s.key: s for s in await self.library.series.all() if s.is_active and s.provider}
        queued = 0
        for key in await self._claim(watched, now):
            try:
                queued += await self._mend(watched[key])
            except CappedError:
                break  # the rest of the holes is for tomorrow
        if queued:
            log.info("holes.queued", count=queued)
        return queued

    async def _claim(self, watched: Mapping[str, Series], now: datetime) -> list[str]:
        """The series that this round looks at, those not looked at for longest first; no other round does today."""
        mine: list[str] = []

        def taken(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            looked = {key: at for key, at in body.get("looked", {}).items() if key in watched}
            due = [key for key in watched if key not in looked or now - parse_instant(looked[key]) >= AGAIN]
            mine[:] = sorted(due, key=lambda key: (looked.get(key, ""), key))[:AT_ONCE]
            return {"looked": looked | dict.fromkeys(mine, format_instant(now))} if mine else None

        return mine if await changed(self.documents, self.wall, PARTITION, ROUND, taken) is not None else []

    async def _mend(self, series: Series) -> int:
        """Queue the oldest hole of a series, with those near it; whether there was one."""
        looked = await self.library.look(series.symbol, series.interval)
        if not len(looked.columns):
            return 0  # its history is still being fetched
        newest = looked.columns.bar(len(looked.columns) - 1).closed_at
        holes = [m for m in looked.missing if m.last < newest]  # what comes behind the newest is the next slot's
        wanted: Slice | None = first_slice(calendar(), series.interval, holes, until=newest)
        if wanted is None:
            return 0
        until = max(h.last for h in holes if h.last <= wanted.until)
        try:
            await self.fetches.request(
                Wanted(
                    symbol=series.symbol,
                    interval=series.interval,
                    since=wanted.since,
                    until=until,
                    priority=Priority.BACKFILL,
                ),
                MENDER,
            )
        except InvalidPayloadError:
            return 0  # filled in the meantime
        log.info("hole.found", series=series.key, since=format_instant(wanted.first), through=format_instant(until))
        return 1
