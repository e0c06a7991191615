"""What the house thinks with when it speaks of the market: symbols, intervals, bars and quotes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from shared.errors import InvalidPayloadError

_SYMBOL = re.compile(r"[A-Z0-9][A-Z0-9.\-]{0,14}")


class Interval(StrEnum):
    """The length of a bar."""

    DAY = "1d"
    HOUR = "1h"
    MINUTE = "1m"

    @property
    def span(self) -> timedelta:
        """The nominal length; a day's real length is its exchange session."""
        return {"1d": timedelta(days=1), "1h": timedelta(hours=1), "1m": timedelta(minutes=1)}[self]


def symbol_of(text: str) -> str:
    """
    Check and normalise a symbol: ``aapl`` is ``AAPL``.

    Raises:
        InvalidPayloadError: no exchange would list this.

    """
    symbol = text.strip().upper()
    if not _SYMBOL.fullmatch(symbol):
        raise InvalidPayloadError(
            f"{text[:20]!r} is no symbol: use 1 to 15 letters, digits, dots or dashes, such as AAPL"
        )
    return symbol


def interval_of(text: str) -> Interval:
    """
    Check an interval.

    Raises:
        InvalidPayloadError: it is none of ours.

    """
    try:
        return Interval(text)
    except ValueError as e:
        known = ", ".join(Interval)
        raise InvalidPayloadError(f"{text[:20]!r} is no interval: use one of {known}") from e


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """
    Prices and volume over [opened_at, closed_at), as traded, named by its close.

    ``split`` is the factor that became effective at this bar's open: 2.0 for two new shares for one old.
    A bar that cannot be true cannot exist.
    """

    opened_at: datetime
    closed_at: datetime
    open: float
    high: float
    low: float
    close: float
    volume: float
    split: float = 1.0

    def __post_init__(self) -> None:
        numbers = (self.open, self.high, self.low, self.close, self.volume, self.split)
        if not all(math.isfinite(n) for n in numbers):
            raise InvalidPayloadError(f"bar {self.closed_at}: every number must be finite")
        if self.opened_at.utcoffset() is None or self.closed_at.utcoffset() is None:
            raise InvalidPayloadError(f"bar {self.closed_at}: times must carry a zone")
        if self.opened_at >= self.closed_at:
            raise InvalidPayloadError(f"bar {self.closed_at}: it opens at or after its close")
        if self.low <= 0 or self.split <= 0 or self.volume < 0:
            raise InvalidPayloadError(
                f"bar {self.closed_at}: prices and split must be above 0, volume not below 0"
            )
        if not (self.low <= min(self.open, self.close) and max(self.open, self.close) <= self.high):
            raise InvalidPayloadError(
                f"bar {self.closed_at}: open and close must lie between low {self.low} and high {self.high}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A provider's last price with its time."""

    symbol: str
    price: float
    previous_close: float | None
    as_of: datetime
    provider: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.price) and self.price > 0):
            raise InvalidPayloadError(f"{self.symbol}: a price must be above 0, not {self.price}")
        if self.as_of.utcoffset() is None:
            raise InvalidPayloadError(f"{self.symbol}: as_of must carry a zone")


class Adjustment(StrEnum):
    """Whether a provider's prices are as traded or already divided by later splits."""

    RAW = "raw"
    SPLIT = "split"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """
    What one provider call brought: closed and unclosed bars alike, oldest first.

    ``refused_rows`` says in one line each which rows could not be true and were left out.
    """

    symbol: str
    interval: Interval
    provider: str
    adjustment: Adjustment
    bars: Sequence[Bar]
    refused_rows: Sequence[str] = ()


def series_key(symbol: str, interval: Interval) -> str:
    """The name of a series of bars: ``AAPL|1d``."""
    return f"{symbol}|{interval}"
