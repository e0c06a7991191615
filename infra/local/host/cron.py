"""Timer schedules: NCRONTAB with six or five fields, and plain intervals such as `00:00:02`.

Fields are second (left out with five), minute, hour, day, month, day of week (0 is Sunday);
an instant must satisfy all of them. Times are UTC, as they are in Azure by default.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Protocol

_INTERVAL = re.compile(r"(?:(\d+)\.)?(\d{1,2}):(\d{2}):(\d{2}(?:\.\d+)?)")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
)
# The 29th of February falls on a given weekday at least once in 40 years.
_HORIZON = timedelta(days=366 * 40)


class Schedule(Protocol):
    """When a timer is due."""

    def after(self, instant: datetime) -> datetime:
        """The first due instant later than the given one."""
        ...


@dataclass(frozen=True, slots=True)
class Every:
    """Due again and again, one interval apart."""

    interval: timedelta

    def after(self, instant: datetime) -> datetime:
        """One interval later."""
        return instant + self.interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Cron:
    """Due at the instants that satisfy every field."""

    text: str
    seconds: tuple[int, ...]
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]

    def after(self, instant: datetime) -> datetime:
        """The next whole second that satisfies every field.

        Raises:
            ValueError: there is none.
        """
        start = instant.astimezone(UTC).replace(microsecond=0) + timedelta(seconds=1)
        day, not_before = start.date(), start.time()
        while day - start.date() < _HORIZON:
            if day.month not in self.months:
                day = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
                not_before = time.min
                continue
            if self._falls_on(day):
                for moment in self._times(not_before):
                    return datetime.combine(day, moment, UTC)
            day += timedelta(days=1)
            not_before = time.min
        raise ValueError(f"schedule {self.text!r} names a date that never comes")

    def _falls_on(self, day: date) -> bool:
        return day.day in self.days and day.isoweekday() % 7 in self.weekdays

    def _times(self, earliest: time) -> Iterator[time]:
        for hour in self.hours[bisect_left(self.hours, earliest.hour) :]:
            floor = earliest if hour == earliest.hour else time.min
            for minute in self.minutes[bisect_left(self.minutes, floor.minute) :]:
                least = floor.second if minute == floor.minute else 0
                for second in self.seconds[bisect_left(self.seconds, least) :]:
                    yield time(hour, minute, second)


def parse_schedule(text: str) -> Schedule:
    """Read a schedule.

    Raises:
        ValueError: it cannot be read; the sentence says which field.
    """
    text = text.strip()
    if interval := _INTERVAL.fullmatch(text):
        return _interval(text, interval)
    parts = text.split()
    if len(parts) == len(_FIELDS) - 1:
        parts = ["0", *parts]
    if len(parts) != len(_FIELDS):
        raise ValueError(f"schedule {text!r} has {len(parts)} fields: give six (second first), five, or hh:mm:ss")
    sets = [_field(part, *rule) for part, rule in zip(parts, _FIELDS, strict=True)]
    cron = Cron(
        text=text,
        seconds=tuple(sorted(sets[0])),
        minutes=tuple(sorted(sets[1])),
        hours=tuple(sorted(sets[2])),
        days=frozenset(sets[3]),
        months=frozenset(sets[4]),
        weekdays=frozenset(sets[5]),
    )
    cron.after(datetime(2000, 1, 1, tzinfo=UTC))
    return cron


def _interval(text: str, found: re.Match[str]) -> Every:
    days, hours, minutes, seconds = found.groups()
    if int(hours) > 23 or int(minutes) > 59 or float(seconds) >= 60:
        raise ValueError(f"schedule {text!r} is no time span: write days as d.hh:mm:ss")
    interval = timedelta(days=int(days or 0), hours=int(hours), minutes=int(minutes), seconds=float(seconds))
    if not interval:
        raise ValueError(f"schedule {text!r} is an empty time span")
    return Every(interval)


def _field(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> set[int]:
    values: set[int] = set()
    for item in text.split(","):
        span, slash, step = item.partition("/")
        if slash and (not step.isdecimal() or int(step) == 0):
            raise ValueError(f"schedule field {name}: {step!r} is no step")
        first, dash, last = span.partition("-")
        if span == "*":
            bottom, top = low, high
        else:
            bottom = _number(first, name, low, high, names)
            top = _number(last, name, low, high, names) if dash else bottom
            if slash and not dash:
                top = high
        if top < bottom:
            raise ValueError(f"schedule field {name}: the range {span!r} runs backwards")
        values.update(range(bottom, top + 1, int(step) if slash else 1))
    return values


def _number(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> int:
    if text[:3].lower() in names and text.isalpha():
        return names.index(text[:3].lower()) + low
    if text.isdecimal() and low <= int(text) <= high:
        return int(text)
    raise ValueError(f"schedule field {name}: {text!r} is not between {low} and {high}")
