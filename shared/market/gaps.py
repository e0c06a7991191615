"""
Which bars should be there and are not: sums over the session table, without I/O.

A bar that should exist is *held* (we have it), *absent* (a provider was asked for it and has not got it, as of a
minute without a trade) or *missing* (nobody was asked yet).
"""

from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any

from shared.clock import format_instant, parse_instant
from shared.errors import ConfigurationError
from shared.market.models import Interval, instant_of, minute_of
from shared.market.sessions import Calendar, calendar

SETTLED = timedelta(days=3)
"""Market time after which a provider that has no bar to sell will have none later either."""
SLICES = {Interval.MINUTE: timedelta(days=28), Interval.HOUR: timedelta(days=180), Interval.DAY: timedelta(days=36_525)}
"""How much of a history one fetch asks for: so little that no provider cuts it where it holds nothing."""
MOST_ASKED = 64


class Kind(StrEnum):
    """What we know of a bar that should exist."""

    HELD = "held"
    MISSING = "missing"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """
    *count* bars in a row of one kind, from the close of the first through the close of the last.

    ``provider`` and ``asked_at`` say who has not got absent ones, as of when.
    """

    kind: Kind
    first: datetime
    last: datetime
    count: int
    provider: str | None = None
    asked_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """*provider* was asked for every bar closing in (since, through]: what is not held of it, it has not got."""

    since: datetime
    through: datetime
    provider: str
    asked_at: datetime

    def to_json(self) -> dict[str, Any]:
        return {
            "since": format_instant(self.since),
            "through": format_instant(self.through),
            "provider": self.provider,
            "asked_at": format_instant(self.asked_at),
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Asked":
        return cls(
            since=parse_instant(body["since"]),
            through=parse_instant(body["through"]),
            provider=body["provider"],
            asked_at=parse_instant(body["asked_at"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one fetch asks for: bars closing in (since, until]; a held bar on either side shows a revision."""

    since: datetime
    until: datetime
    first: datetime
    """The close of the first missing bar in it."""


def expected(market: Calendar, interval: Interval, *, since: datetime, until: datetime) -> Sequence[int]:
    """
    The minutes at which bars close in (since, until], oldest first.

    Raises:
        ConfigurationError: the session table does not reach that far.

    """
    found = array("q")
    if since >= until:
        return found
    first, last = since.astimezone(market.zone).date(), until.astimezone(market.zone).date()
    for month in range(first.year * 12 + first.month - 1, last.year * 12 + last.month):
        found += _closes(market.name, interval, month)
    return found[bisect_right(found, minute_of(since)) : bisect_right(found, minute_of(until))]


@lru_cache(maxsize=512)
def _closes(market: str, interval: Interval, month: int) -> array[int]:
    """The closes of one month's sessions; the table never changes while we run, so they are kept."""
    first = date(month // 12, month % 12 + 1, 1)
    last = (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)
    step = interval.span // timedelta(minutes=1)
    found = array("q")
    for session in calendar(market).sessions(first, last):
        closes = minute_of(session.closes_at)
        if interval is not Interval.DAY:
            found.extend(range(minute_of(session.opens_at) + step, closes, step))
        found.append(closes)
    return found


def survey(wanted: Sequence[int], held: Sequence[int], asked: Sequence[Asked]) -> list[Stretch]:
    """What is known of each of the *wanted* bars, oldest first, in stretches as long as can be."""
    if not wanted:
        return []
    if len(held) == len(wanted) and array("q", held) == array("q", wanted):
        return [_stretch((Kind.HELD, None), wanted, 0, len(wanted))]
    have = set(held)
    spans = [(minute_of(a.since), minute_of(a.through), a) for a in sorted(asked, key=lambda a: a.since)]
    stretches: list[Stretch] = []
    begin = place = 0
    known: tuple[Kind, Asked | None] | None = None
    for index, minute in enumerate(wanted):
        while place < len(spans) and spans[place][1] < minute:
            place += 1
        within = spans[place][2] if place < len(spans) and spans[place][0] < minute else None
        if minute in have:
            here: tuple[Kind, Asked | None] = (Kind.HELD, None)
        else:
            here = (Kind.ABSENT, within) if within else (Kind.MISSING, None)
        if here != known:
            if known is not None:
                stretches.append(_stretch(known, wanted, begin, index))
            begin, known = index, here
    assert known is not None, "some bar is wanted"  # noqa: S101
    return [*stretches, _stretch(known, wanted, begin, len(wanted))]


def _stretch(known: tuple[Kind, Asked | None], wanted: Sequence[int], begin: int, end: int) -> Stretch:
    kind, asked = known
    return Stretch(
        kind=kind,
        first=instant_of(wanted[begin]),
        last=instant_of(wanted[end - 1]),
        count=end - begin,
        provider=asked.provider if asked else None,
        asked_at=asked.asked_at if asked else None,
    )


def first_slice(market: Calendar, interval: Interval, missing: Sequence[Stretch], *, until: datetime) -> Slice | None:
    """What to fetch first of the *missing* stretches: the oldest, with those near it; at most to *until*."""
    if not missing:
        return None
    first = missing[0].first
    limit = first + SLICES[interval]
    last = max(min(m.last, limit) for m in missing if m.first <= limit)
    try:
        begin = market.last_bar_close(interval, first - timedelta(minutes=1))
    except ConfigurationError:  # the first bar of the session table
        begin = first - interval.span
    end = market.next_bar_close(interval, last)
    return Slice(since=begin, until=min(end, max(until, last)), first=first)


def noted(known: Sequence[Asked], new: Asked) -> list[Asked]:
    """
    What was asked so far, with one answer more: the newest answer counts, and spans that touch become one.

    Kept small: what was asked longest ago is forgotten first, which costs a call and no truth.
    """
    kept: list[Asked] = []
    for old in known:
        if old.provider == new.provider and old.since <= new.through and new.since <= old.through:
            new = replace(
                new,
                since=min(old.since, new.since),
                through=max(old.through, new.through),
                asked_at=min(old.asked_at, new.asked_at),
            )
            continue
        if old.since < new.since and old.through > new.since:
            kept.append(replace(old, through=new.since))
        if old.through > new.through and old.since < new.through:
            kept.append(replace(old, since=new.through))
        if old.through <= new.since or old.since >= new.through:
            kept.append(old)
    kept.append(new)
    kept.sort(key=lambda a: a.asked_at)
    return sorted(kept[-MOST_ASKED:], key=lambda a: a.since)
