"""What the replay can show: recorded series of bars, where they come from and how far the market has got."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from shared.market.models import Bar, Interval
from shared.market.sessions import EXCHANGE

type Key = tuple[str, Interval]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """
    One symbol's recorded bars, oldest first, as traded; ``split`` is set on the bar it became effective with.

    ``source`` names where they come from and the licence; ``refused`` says in one line each which rows of
    the source are not among the bars, and why.
    """

    symbol: str
    interval: Interval
    bars: Sequence[Bar]
    source: str
    name: str = ""
    refused: Sequence[str] = ()
    calendar: str = EXCHANGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a replayed market has got: ``fraction`` of its bars have closed."""

    fraction: float
    closed: int
    bars: int
    first_at: datetime
    last_at: datetime


class Catalogue(Mapping[Key, Series]):
    """Every series of a replay by (symbol, interval)."""

    def __init__(self, series: Iterable[Series]) -> None:
        self._series = {(one.symbol, one.interval): one for one in series}

    def __getitem__(self, key: Key) -> Series:
        return self._series[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._series)

    def __len__(self) -> int:
        return len(self._series)

    def __or__(self, other: Mapping[Key, Series]) -> "Catalogue":
        """Both together; a series of *other* replaces ours."""
        return Catalogue([*{**self._series, **other}.values()])

    @property
    def symbols(self) -> list[str]:
        """Every symbol once, sorted."""
        return sorted({symbol for symbol, _ in self._series})

    @property
    def refused(self) -> list[str]:
        """Every row of every source that was left out, in one line each."""
        return [line for one in self._series.values() for line in one.refused]

    def progress(self, now: datetime) -> Progress:
        """
        How much of everything has closed by this market instant.

        Raises:
            ValueError: there is not one bar, so there is no first instant.

        """
        filled = [one.bars for one in self._series.values() if one.bars]
        total = sum(map(len, filled))
        closed = sum(bisect_right(bars, now, key=lambda bar: bar.closed_at) for bars in filled)
        return Progress(
            fraction=closed / total if total else 0.0,
            closed=closed,
            bars=total,
            first_at=min(bars[0].opened_at for bars in filled),
            last_at=max(bars[-1].closed_at for bars in filled),
        )
