"""
The two clocks, and the only place that reads a real one.

``SystemClock`` is the wall: leases, tokens, timeouts, retries, provider windows, every ``recorded_at``.
``MarketClock`` is what the market and a user's rules speak: closed bars, slots due, sessions, horizons,
every ``occurred_at``. It equals the wall unless the setting MARKET_CLOCK says otherwise.
"""

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol, Self

from shared.errors import ConfigurationError

_SETTING = re.compile(r"(?P<market>[^@*]+)@(?P<wall>[^@*]+)\*(?P<speed>\d+(?:\.\d+)?)(?:\.\.(?P<end>[^@*]+))?")


class Clock(Protocol):
    """Tells what time it is, in UTC."""

    def now(self) -> datetime: ...


class SystemClock:
    """The wall clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)


class StoppedClock:
    """A clock that is right until you move it."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def now(self) -> datetime:
        return self.at


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketTime:
    """
    How market time follows wall time: at ``wall`` it was ``market``, and it runs ``speed`` times as fast.

    ``speed`` 0 is a market that stands still; with ``end`` it stands still from that instant on.
    """

    market: datetime
    wall: datetime
    speed: float
    end: datetime | None = None

    @classmethod
    def parse(cls, setting: str) -> Self:
        """
        Read ``<market instant>@<wall instant>*<speed>``, optionally followed by ``..<market end>``.

        Raises:
            ConfigurationError: the text has another form; the message shows the right one.

        """
        found = _SETTING.fullmatch(setting.strip())
        try:
            if found is None:
                raise ValueError(setting)
            end = found["end"]
            return cls(
                market=parse_instant(found["market"]),
                wall=parse_instant(found["wall"]),
                speed=float(found["speed"]),
                end=parse_instant(end) if end else None,
            )
        except ValueError as e:
            raise ConfigurationError(
                "MARKET_CLOCK cannot be read: write <market instant>@<wall instant>*<speed>[..<market end>], "
                "for example 2012-03-01T00:00:00Z@2026-11-21T09:00:00Z*86400"
            ) from e

    def __str__(self) -> str:
        text = f"{format_instant(self.market)}@{format_instant(self.wall)}*{self.speed:f}".rstrip("0").rstrip(".")
        return f"{text}..{format_instant(self.end)}" if self.end else text

    def at(self, wall: datetime) -> datetime:
        """The market instant at a wall instant; before the anchor the market stands still."""
        gone = max((wall - self.wall).total_seconds(), 0.0) * self.speed
        latest = self.end or datetime.max.replace(tzinfo=UTC)
        left = max((latest - self.market).total_seconds(), 0.0)
        return self.market + timedelta(seconds=min(gone, left))

    def wall_at(self, market: datetime) -> datetime | None:
        """The wall instant at which the market gets to *market*; None if it never does."""
        if market <= self.market:
            return self.wall
        if not self.speed or (self.end is not None and market > self.end):
            return None
        try:
            gone = math.ceil((market - self.market).total_seconds() / self.speed * 1e6)
            return self.wall + timedelta(microseconds=gone)
        except OverflowError:
            return None


class MarketClock:
    """The market's time, derived from the wall."""

    def __init__(self, wall: Clock, time: MarketTime | None = None) -> None:
        self._wall = wall
        self.time = time

    @property
    def speed(self) -> float:
        """How many market seconds go by in one of the wall's."""
        return self.time.speed if self.time else 1.0

    def now(self) -> datetime:
        wall = self._wall.now()
        return self.time.at(wall) if self.time else wall

    def wall_at(self, market: datetime) -> datetime | None:
        """The wall instant at which the market gets to *market*, as things stand; None if it never does."""
        return self.time.wall_at(market) if self.time else market


def parse_instant(text: str) -> datetime:
    """
    Read an ISO 8601 instant that carries a zone, as UTC.

    Raises:
        ValueError: it is no instant, or it has no zone.

    """
    instant = datetime.fromisoformat(text.strip())
    if instant.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; end it with Z")
    try:
        return instant.astimezone(UTC)
    except OverflowError as e:
        raise ValueError(f"{text!r} lies outside the years 1 to 9999") from e


def format_instant(instant: datetime) -> str:
    """Write an instant as UTC with a Z; sorts as text among whole seconds."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def sortable(instant: datetime) -> str:
    """Write an instant so that text order is time order: always six digits of a second."""
    return instant.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
