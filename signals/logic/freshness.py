"""Which bars are still worth an opinion: old news is no signal. Pure."""

from bisect import bisect_left
from dataclasses import dataclass
from datetime import datetime, timedelta

from shared.market.models import Columns, Interval, instant_of
from signals.logic.scoring import horizon_close

LATE = timedelta(minutes=10)
"""Wall time for which a bar is never called stale: what a restart or a deployment takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """
    Tells bars that came too late from fresh ones.

    A bar is stale when both limits are passed: ``stale_after`` further bars could have been fetched since (in
    trading time, so a weekend ages nothing), and 10 minutes of the wall have gone by, which are ``speed`` times
    as many of the market's. The wall's term is what keeps a fast replay the same on every run: at a market day a
    second a restart would otherwise be a month's outage. A market that stands still (speed 0) makes nobody late.
    """

    now: datetime
    delay: timedelta
    speed: float

    def is_stale(self, interval: Interval, closed_at: datetime, stale_after: int) -> bool:
        """Whether the bar that closed at *closed_at* is too old to act on."""
        if self.speed == 0 or self.now <= closed_at + self.delay + LATE * self.speed:
            return False
        return self.now > horizon_close(interval, closed_at, stale_after) + self.delay

    def first_fresh(self, interval: Interval, columns: Columns, first: int, stale_after: int) -> int:
        """The index of the first bar from *first* on that is not stale; later ones are not either."""
        return bisect_left(
            range(len(columns)),
            x=True,
            lo=first,
            key=lambda index: not self.is_stale(interval, instant_of(columns.closed[index]), stale_after),
        )
