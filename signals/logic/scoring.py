"""How an opinion fared: from the first price one could have traded at to the close of its horizon. Pure."""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from datetime import datetime

from shared.market.models import Columns, Interval, minute_of
from shared.market.sessions import calendar
from signals.models import Direction, OpenSignal, Outcome, State, Tally

COST_PER_SIDE = 0.001
"""What getting in and what getting out each cost, as a share of what is traded: 10 basis points."""
TREND_BARS = 20
"""Bars whose return before a signal says in which regime it was raised."""
PATIENCE = 5
"""Sessions behind its horizon for which a signal waits for late bars before it expires."""
ENOUGH = 50
"""Outcomes it takes before an entry's edge can be called gone."""
Z = 1.959963984540054
"""The normal quantile of a 95 % interval."""
SAME = 1e-6
"""Relative difference up to which a bar's close still is what the signal saw (providers round to 4 decimals)."""


def horizon_close(interval: Interval, closed_at: datetime, horizon: int) -> datetime:
    """When the *horizon*-th trading bar after a bar closes, by exchange hours."""
    exchange = calendar()
    for _ in range(horizon):
        closed_at = exchange.next_bar_close(interval, closed_at)
    return closed_at


def expiry(closes_at: datetime) -> datetime:
    """Until when bars may still come late: the close of the fifth session behind the horizon."""
    return horizon_close(Interval.DAY, closes_at, PATIENCE)


def trend_at(columns: Columns, index: int) -> float | None:
    """The return of the last 20 bars up to this one, split-adjusted; None where there are fewer."""
    start = index - TREND_BARS
    if start < 0:
        return None
    factor = math.prod(columns.split[start + 1 : index + 1])
    return columns.close[index] * factor / columns.close[start] - 1


def outcome_of(one: OpenSignal, columns: Columns) -> Outcome:
    """
    Score an opinion whose horizon has closed, from *columns* that hold its own bar and those up to there.

    The first tradable price is the open of the next bar that was traded, as in a backtest. Prices are compared in
    terms of that bar's shares, so a split inside the horizon is no move. Unscorable, with the reason: a bar of the
    horizon is missing, nothing was traded in it, or the opinion's own bar is no longer what it was.
    """
    at = bisect_left(columns.closed, minute_of(one.closed_at))
    if at == len(columns) or columns.closed[at] != minute_of(one.closed_at):
        return _unscorable("its own bar is no longer in the history of the series")
    if not math.isclose(columns.close[at], one.reference_price, rel_tol=SAME):
        return _unscorable(
            f"history was rewritten underneath: its bar's close was {one.reference_price:g}, "
            f"now it is {columns.close[at]:g}"
        )
    first, end = at + 1, bisect_right(columns.closed, minute_of(one.closes_at))
    missing = max(one.horizon - (end - first), int(columns.closed[end - 1] != minute_of(one.closes_at)))
    if missing > 0:
        return _unscorable(f"{missing} of the {one.horizon} bars of its horizon are missing: a halt or a gap")
    if any(columns.volume[at:end]):  # a series that states no volume at all counts as traded
        first = next((i for i in range(first, end) if columns.volume[i] > 0), end)
    if first == end:
        return _unscorable(f"nothing was traded in the {one.horizon} bars of its horizon: a halt")
    entry_price = columns.open[first]
    factor, highest, lowest, exit_price = 1.0, -math.inf, math.inf, entry_price
    for i in range(first, end):
        if i > first:
            factor *= columns.split[i]
        highest = max(highest, columns.high[i] * factor)
        lowest = min(lowest, columns.low[i] * factor)
        exit_price = columns.close[i] * factor
    way = 1 if one.direction is Direction.LONG else -1
    base = exit_price / entry_price - 1
    up, down = highest / entry_price - 1, lowest / entry_price - 1
    return Outcome(
        state=State.SCORED,
        is_hit=way * base > 0,
        entry_price=entry_price,
        exit_price=exit_price,
        forward_return=way * base,
        net_return=way * base - COST_PER_SIDE * (2 + base),
        base_return=base,
        mfe=up if way > 0 else -down,
        mae=down if way > 0 else -up,
        cost_per_side=COST_PER_SIDE,
    )


def _unscorable(reason: str) -> Outcome:
    return Outcome(state=State.UNSCORABLE, reason=reason)


def confidence_of(tally: Tally | None) -> tuple[float | None, int]:
    """
    How likely the next opinion of this entry on this series is right, and from how many outcomes that is known.

    Laplace's rule of succession, (hits + 1) / (outcomes + 2): after one hit it says 2/3 and not certainty.
    """
    if tally is None or tally.scored == 0:
        return None, 0
    return (tally.hits + 1) / (tally.scored + 2), tally.scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Whether opinions were right more often than a bet on rising prices over the same bars."""

    n: int
    hit_rate: float
    low: float
    high: float
    base_rate: float

    @property
    def is_gone(self) -> bool:
        """Whether even the upper end of the hit rate's 95 % interval lies below the base rate."""
        return self.n >= ENOUGH and self.high < self.base_rate

    @property
    def reason(self) -> str:
        return (
            f"the hit rate of its {self.n} outcomes is {self.hit_rate:.1%} "
            f"(95 % interval {self.low:.1%} to {self.high:.1%}), below the {self.base_rate:.1%} of rising prices"
        )


def edge_of(n: int, hits: int, ups: int) -> Edge | None:
    """The edge that *hits* of *n* outcomes show where *ups* of the same windows rose; None without any."""
    if n == 0:
        return None
    low, high = wilson(hits, n)
    return Edge(n=n, hit_rate=hits / n, low=low, high=high, base_rate=ups / n)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson, JASA 22, 1927); *n* is at least 1."""
    share, z2 = hits / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)
