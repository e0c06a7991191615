"""Days and quiet hours in a subscriber's zone, over changes of its clocks. Pure."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Self
from zoneinfo import ZoneInfo

from alerts.subscriptions import Preferences
from shared.errors import InvalidPayloadError

_DAY = timedelta(days=1)
_SECOND = timedelta(seconds=1)


@lru_cache(maxsize=512)
def zone_of(name: str) -> ZoneInfo:
    """
    The zone of an IANA name.

    Raises:
        InvalidPayloadError: there is none of this name.

    """
    try:
        # Others are looked up as files of this machine: "localtime" is another zone on each.
        if "/" not in name and name != "UTC":
            raise ValueError(name)
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as e:
        raise InvalidPayloadError(
            f"{name[:40]!r} is no time zone: write an IANA name such as Europe/Berlin, or UTC"
        ) from e


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Instants from ``start`` up to but without ``end``."""

    start: datetime
    end: datetime

    def __contains__(self, instant: datetime) -> bool:
        return self.start <= instant < self.end

    @classmethod
    def day(cls, instant: datetime, zone: str) -> Self:
        """The day in *zone* that *instant* belongs to: 23 or 25 hours long where the clocks change."""
        tz = zone_of(zone)
        here = instant.astimezone(tz).date()
        start, end = (_instant(here + days, time(), tz, last=False) for days in (timedelta(), _DAY))
        if instant >= end:  # clocks that go back over midnight: the day that has begun goes on
            start, end = end, _instant(here + 2 * _DAY, time(), tz, last=False)
        return cls(start=start, end=end)

    @classmethod
    def hour(cls, instant: datetime) -> Self:
        """The hour of UTC that *instant* belongs to: hours of a zone repeat when its clocks go back."""
        start = instant.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        return cls(start=start, end=start + timedelta(hours=1))


def quiet_until(preferences: Preferences, instant: datetime) -> datetime | None:
    """
    The end of the quiet hours that *instant* lies in, None outside.

    Quiet hours are one stretch of time: what a change of the clocks skips is over at once, and a time of day that
    comes twice begins them at its first coming and ends them at its second.
    """
    begins, ends = preferences.quiet_from, preferences.quiet_to
    if begins is None or ends is None:
        return None
    tz = zone_of(preferences.zone)
    today = instant.astimezone(tz).date()
    crosses = ends <= begins
    for day in (today - _DAY, today, today + _DAY):
        quiet = Span(
            start=_instant(day, begins, tz, last=False),
            end=_instant(day + _DAY if crosses else day, ends, tz, last=True),
        )
        if instant in quiet:
            return quiet.end
    return None


def _instant(day: date, at: time, tz: ZoneInfo, *, last: bool) -> datetime:
    """When the clocks of a zone show this; where they skip it, when they skip it."""
    shown = datetime.combine(day, at)
    first, second = (shown.replace(tzinfo=tz, fold=fold).astimezone(UTC) for fold in (0, 1))
    if first <= second:
        return second if last else first
    # Skipped: in between lies the change, which the two readings surround.
    before, after = second, first
    old = before.astimezone(tz).utcoffset()
    while after - before > _SECOND:
        middle = before + (after - before) / 2
        middle = middle.replace(microsecond=0)
        if middle.astimezone(tz).utcoffset() == old:
            before = middle
        else:
            after = middle
    return after
