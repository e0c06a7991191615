"""What the house thinks with when it speaks of the market: symbols, intervals, bars and quotes."""

import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import IntEnum, StrEnum
from typing import Any

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
            raise InvalidPayloadError(f"bar {self.closed_at}: prices and split must be above 0, volume not below 0")
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


class Priority(IntEnum):
    """What a call is for; the smaller goes first when calls are scarce."""

    LIVE = 0
    ASKED = 1
    SCORING = 2
    BACKFILL = 3
    PREFETCH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class NewsItem:
    """
    One article about some symbols. ``sentiment`` lies between -1 (bearish) and 1 (bullish); None: not rated.

    ``news_id`` is the provider's own id where it gives one, else its URL.
    """

    news_id: str
    published_at: datetime
    title: str
    summary: str
    url: str
    source: str
    symbols: Sequence[str]
    sentiment: float | None
    provider: str


class ReportTime(StrEnum):
    """When on its day a company reports: before the market opens, after it closes, or during the session."""

    BEFORE_OPEN = "bmo"
    AFTER_CLOSE = "amc"
    DURING = "dmh"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class EarningsDate:
    """One line of the earnings calendar; estimates and results are None while nobody knows them."""

    symbol: str
    day: date
    time: ReportTime
    eps_estimate: float | None
    eps_actual: float | None
    revenue_estimate: float | None
    revenue_actual: float | None
    provider: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CorporateAction:
    """
    What a company did to its shares on a day, effective at that session's open.

    ``split`` is new shares for one old (1.0: none), ``dividend`` what a share was paid.
    """

    symbol: str
    day: date
    split: float
    dividend: float
    provider: str


class Adjustment(StrEnum):
    """Whether a provider's prices are as traded or already divided by later splits."""

    RAW = "raw"
    SPLIT = "split"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """
    What one provider call brought: closed and unclosed bars alike, oldest first.

    ``refused_rows`` says in one line each which rows could not be true and were left out. Where the calls reached
    less far than they were asked to (a plan, a slice), the answer speaks only of bars that close in
    (``covers_since``, ``covers_through``]: what it lacks elsewhere the provider may well have.
    """

    symbol: str
    interval: Interval
    provider: str
    adjustment: Adjustment
    bars: Sequence[Bar]
    refused_rows: Sequence[str] = ()
    covers_since: datetime | None = None
    covers_through: datetime | None = None


def series_key(symbol: str, interval: Interval) -> str:
    """The name of a series of bars: ``AAPL|1d``."""
    return f"{symbol}|{interval}"


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MINUTE = timedelta(minutes=1)


def minute_of(instant: datetime) -> int:
    """Whole minutes since 1970 UTC: how stored bars tell time."""
    return (instant - EPOCH) // _MINUTE


def instant_of(minute: int) -> datetime:
    """The instant a minute count stands for."""
    return EPOCH + minute * _MINUTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """
    Bars as columns of equal length, oldest first, as traded.

    ``opened`` and ``closed`` are minutes since 1970 UTC; numbers are float64; ``split`` is as in Bar.
    """

    opened: Sequence[int] = ()
    closed: Sequence[int] = ()
    open: Sequence[float] = ()
    high: Sequence[float] = ()
    low: Sequence[float] = ()
    close: Sequence[float] = ()
    volume: Sequence[float] = ()
    split: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.closed)

    def __getitem__(self, place: slice) -> "Columns":
        return Columns(**{name: getattr(self, name)[place] for name in COLUMN_NAMES})

    def bar(self, index: int) -> Bar:
        """One row as a Bar."""
        return Bar(
            opened_at=instant_of(self.opened[index]),
            closed_at=instant_of(self.closed[index]),
            open=self.open[index],
            high=self.high[index],
            low=self.low[index],
            close=self.close[index],
            volume=self.volume[index],
            split=self.split[index],
        )

    @classmethod
    def of(cls, bars: Sequence[Bar]) -> "Columns":
        """The columns of *bars*."""
        return cls(
            opened=array("q", (minute_of(b.opened_at) for b in bars)),
            closed=array("q", (minute_of(b.closed_at) for b in bars)),
            **{name: array("d", (getattr(b, name) for b in bars)) for name in NUMBER_NAMES},
        )

    @classmethod
    def joined(cls, parts: Sequence["Columns"]) -> "Columns":
        """Several columns, oldest part first, as one."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, array[Any]] = {}
        for name in COLUMN_NAMES:
            whole = joined[name] = array("q" if name in ("opened", "closed") else "d")
            for part in parts:
                whole.extend(getattr(part, name))
        return cls(**joined)


NUMBER_NAMES = ("open", "high", "low", "close", "volume", "split")
COLUMN_NAMES = ("opened", "closed", *NUMBER_NAMES)
