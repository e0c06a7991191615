"""What the signals domain thinks with."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from shared.events import fact_id
from shared.market.models import Interval


class Direction(StrEnum):
    """Which way a signal points."""

    LONG = "long"
    SHORT = "short"


class Origin(StrEnum):
    """Whether a signal was seen as its bar closed, or found in history afterwards."""

    LIVE = "live"
    BACKFILL = "backfill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """
    A row of the entries file: one strategy with its parameters, watching some symbols at one interval.

    ``symbols`` None means every watched symbol.
    """

    name: str
    strategy: str
    version: int
    params: Mapping[str, float]
    interval: Interval
    symbols: frozenset[str] | None
    lookback: int

    def watches(self, symbol: str, interval: Interval) -> bool:
        """Whether this entry has an opinion about the series."""
        return interval is self.interval and (self.symbols is None or symbol in self.symbols)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """What a strategy says of one bar: where to, how strongly (0 to 1), and which numbers caused it."""

    direction: Direction
    strength: float
    features: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One entry's opinion of one symbol at one bar. ``reference_price`` is the bar's close as traded."""

    signal_id: str
    entry: str
    strategy: str
    version: int
    params: Mapping[str, float]
    symbol: str
    interval: Interval
    direction: Direction
    strength: float
    reference_price: float
    closed_at: datetime
    features: Mapping[str, float]
    origin: Origin
    provider: str
    revision: int
    recorded_at: datetime


def params_digest(params: Mapping[str, float]) -> str:
    """The parameters as one short text; the same values give the same text."""
    return ",".join(f"{name}={params[name]:.12g}" for name in sorted(params))


def signal_id(entry: Entry, symbol: str, closed_at: datetime) -> str:
    """At most one signal per entry and bar: the same bar gives the same id on every run (docs/events.md)."""
    return fact_id(
        entry.name,
        f"{entry.strategy}@{entry.version}",
        params_digest(entry.params),
        symbol,
        entry.interval,
        closed_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
