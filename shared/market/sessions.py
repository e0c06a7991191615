"""
When markets trade: the exchange's sessions and the bars that tile them.

The table beside this file (sessions.json) is written by infra/make_sessions.py and read on first use.
``XNYS`` is the New York Stock Exchange; ``24/7`` is crypto and currencies, where every UTC day is a session.
"""

import json
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import Interval

EXCHANGE = "XNYS"
AROUND_THE_CLOCK = "24/7"

_TABLE = Path(__file__).with_name("sessions.json")
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One trading day: open over [opens_at, closes_at), in UTC, named by its local date."""

    date: date
    opens_at: datetime
    closes_at: datetime


class Calendar(ABC):
    """
    Answers when a market trades and where its bars begin and end.

    Every instant goes in with a zone and comes out in UTC. A day outside the table is a
    ConfigurationError that says how to widen it.
    """

    name: str
    zone: ZoneInfo

    @abstractmethod
    def session(self, day: date) -> Session | None:
        """The session of this local date, or None when the market stays closed."""

    @abstractmethod
    def sessions(self, first: date, last: date) -> list[Session]:
        """Every session from *first* to *last*, both included, oldest first."""

    @abstractmethod
    def next_close(self, after: datetime) -> Session:
        """The first session that closes later than *after*; it may be open already."""

    @abstractmethod
    def previous_close(self, at: datetime) -> Session:
        """The last session that has closed by *at*."""

    def session_at(self, instant: datetime) -> Session | None:
        """The session that is open at *instant*, or None."""
        session = self.next_close(instant)
        return session if session.opens_at <= instant else None

    def bar_of_date(self, day: date) -> tuple[datetime, datetime]:
        """
        When the daily bar of this date opens and closes.

        Raises:
            InvalidPayloadError: the market stays closed that day.

        """
        session = self.session(day)
        if session is None:
            raise InvalidPayloadError(f"{day} is no session of {self.name}")
        return session.opens_at, session.closes_at

    def next_bar_close(self, interval: Interval, after: datetime) -> datetime:
        """The first instant later than *after* at which a bar closes; a session's last bar may be short."""
        session = self.next_close(after)
        if interval is Interval.DAY:
            return session.closes_at
        done = max((after - session.opens_at) // interval.span, 0)
        return min(session.opens_at + (done + 1) * interval.span, session.closes_at)

    def last_bar_close(self, interval: Interval, at: datetime) -> datetime:
        """The latest instant not later than *at* at which a bar has closed."""
        if interval is not Interval.DAY:
            session = self.next_close(at)
            done = (at - session.opens_at) // interval.span
            if done > 0:
                return session.opens_at + done * interval.span
        return self.previous_close(at).closes_at

    def bar_opening_at(self, interval: Interval, opened_at: datetime) -> datetime:
        """
        When the bar that opens at this instant closes.

        Raises:
            InvalidPayloadError: no bar of this interval opens then.

        """
        session = self.session_at(opened_at)
        if session is not None:
            if interval is Interval.DAY:
                if opened_at == session.opens_at:
                    return session.closes_at
            elif not (opened_at - session.opens_at) % interval.span:
                return min(opened_at.astimezone(UTC) + interval.span, session.closes_at)
        raise InvalidPayloadError(f"no {interval} bar of {self.name} opens at {opened_at.isoformat()}")


def calendar(name: str = EXCHANGE) -> Calendar:
    """
    Find a market's calendar by name; the same one at every call.

    Raises:
        ConfigurationError: we have no such calendar.

    """
    return _calendar(name)


@cache
def _calendar(name: str) -> Calendar:
    if name == EXCHANGE:
        return _Exchange(json.loads(_TABLE.read_bytes()))
    if name == AROUND_THE_CLOCK:
        return _AroundTheClock()
    raise ConfigurationError(f"{name!r} is no calendar of ours: use {EXCHANGE} or {AROUND_THE_CLOCK}")


@dataclass(frozen=True, slots=True)
class _Hours:
    since: date
    opens: time
    closes: time


class _Exchange(Calendar):
    """An exchange as its table says; sessions are made when asked for and kept."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.name = table["name"]
        self.zone = ZoneInfo(table["zone"])
        self.first = date.fromisoformat(table["first"])
        self.last = date.fromisoformat(table["last"])
        self._hours = [
            _Hours(
                date.fromisoformat(row["from"]),
                time.fromisoformat(row["open"]),
                time.fromisoformat(row["close"]),
            )
            for row in table["hours"]
        ]
        self._opens = _special(table["special_opens"])
        self._closes = _special(table["special_closes"])
        closed = {day.toordinal() for day in _days(table["holidays"])}
        self._days = [
            n
            for n in range(self.first.toordinal(), self.last.toordinal() + 1)
            if n not in closed and date.fromordinal(n).weekday() < 5
        ]
        self._made: dict[int, Session] = {}

    def session(self, day: date) -> Session | None:
        place = bisect_left(self._days, self._inside(day))
        if place < len(self._days) and self._days[place] == day.toordinal():
            return self._at(place)
        return None

    def sessions(self, first: date, last: date) -> list[Session]:
        begin = bisect_left(self._days, self._inside(first))
        end = bisect_right(self._days, self._inside(last))
        return [self._at(place) for place in range(begin, end)]

    def next_close(self, after: datetime) -> Session:
        day = _aware(after).astimezone(self.zone).date()
        place = bisect_left(self._days, self._inside(day))
        if place < len(self._days) and self._at(place).closes_at <= after:
            place += 1
        if place == len(self._days):
            raise self._outside(self.last + _DAY)
        return self._at(place)

    def previous_close(self, at: datetime) -> Session:
        day = _aware(at).astimezone(self.zone).date()
        place = bisect_right(self._days, self._inside(day)) - 1
        if place >= 0 and self._at(place).closes_at > at:
            place -= 1
        if place < 0:
            raise self._outside(self.first - _DAY)
        return self._at(place)

    def _at(self, place: int) -> Session:
        made = self._made.get(place)
        if made is None:
            made = self._made[place] = self._make(date.fromordinal(self._days[place]))
        return made

    def _make(self, day: date) -> Session:
        hours = next(h for h in reversed(self._hours) if h.since <= day)
        opens = self._opens.get(day, hours.opens)
        closes = self._closes.get(day, hours.closes)
        return Session(
            date=day,
            opens_at=datetime.combine(day, opens, self.zone).astimezone(UTC),
            closes_at=datetime.combine(day, closes, self.zone).astimezone(UTC),
        )

    def _inside(self, day: date) -> int:
        if not self.first <= day <= self.last:
            raise self._outside(day)
        return day.toordinal()

    def _outside(self, day: date) -> ConfigurationError:
        return ConfigurationError(
            f"the session table of {self.name} covers {self.first} to {self.last}, not {day}: "
            "widen FIRST or LAST in infra/make_sessions.py, then run make sessions"
        )


class _AroundTheClock(Calendar):
    """A market that never closes: every UTC day is a session."""

    def __init__(self) -> None:
        self.name = AROUND_THE_CLOCK
        self.zone = ZoneInfo("UTC")

    def session(self, day: date) -> Session:
        opens_at = datetime.combine(day, time(), UTC)
        return Session(date=day, opens_at=opens_at, closes_at=opens_at + _DAY)

    def sessions(self, first: date, last: date) -> list[Session]:
        return [self.session(first + timedelta(days=n)) for n in range((last - first).days + 1)]

    def next_close(self, after: datetime) -> Session:
        return self.session(_aware(after).astimezone(UTC).date())

    def previous_close(self, at: datetime) -> Session:
        return self.session(_aware(at).astimezone(UTC).date() - _DAY)


def _days(by_year: Mapping[str, str]) -> Iterable[date]:
    for year, days in by_year.items():
        for day in days.split():
            yield date.fromisoformat(f"{year}-{day}")


def _special(by_hour: Mapping[str, Mapping[str, str]]) -> dict[date, time]:
    return {day: time.fromisoformat(at) for at, by_year in by_hour.items() for day in _days(by_year)}


def _aware(instant: datetime) -> datetime:
    if instant.utcoffset() is None:
        raise InvalidPayloadError(f"{instant.isoformat()} has no time zone: sessions are instants in UTC")
    return instant
