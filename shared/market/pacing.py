"""
When the next call may leave, by every window at once. Pure; instants are whole microseconds since 1970.

A call is counted at the instant it was meant to leave. It reaches the provider up to a *guard* later than the
quickest one would, so two calls that must not meet in one window are kept that much further apart.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Any, Self
from zoneinfo import ZoneInfo

from shared.market.models import EPOCH, Priority
from shared.market.registry import DAY, Kind, Window

_MICROSECOND = timedelta(microseconds=1)

EXACT = 256
"""Windows up to this amount remember every call; of larger ones calls in one 256th of the span are kept together."""
LEAST_GUARD, FIRST_GUARD, MOST_GUARD = 10_000, 20_000, 250_000
GUARD_SHARE = 0.015
"""The most of its span that the guard may cost the window that limits us in the long run."""
STAGGER, STAGGER_SHARE = 20_000, 0.25
"""Two calls never leave closer than this, so that a burst does not arrive in a heap; where more calls are allowed in
the long run, not closer than this share of their mean distance."""

DAY_SHARES = {Priority.BACKFILL: 0.8, Priority.PREFETCH: 0.6}
"""How much of a day's window these may spend: the rest is kept for better calls."""


def micros(instant: datetime) -> int:
    """Whole microseconds since 1970 UTC."""
    return (instant - EPOCH) // _MICROSECOND


def instant_at(at: int) -> datetime:
    """The instant a number of microseconds stands for."""
    return EPOCH + at * _MICROSECOND


class Count:
    """
    The calls counted in one window, reserved instants included.

    ``amount`` is the window's, or what rate headers put in its place. ``phantom`` calls are not ours: until
    ``phantom_until`` the window holds that many more than we know of.
    """

    __slots__ = (
        "_at",
        "_cell_span",
        "_numbers",
        "_span",
        "amount",
        "is_staggering",
        "phantom",
        "phantom_until",
        "window",
    )

    def __init__(self, window: Window, *, is_staggering: bool = False) -> None:
        self.window = window
        self.is_staggering = is_staggering
        self.amount = window.amount
        self.phantom = 0
        self.phantom_until = 0
        self._span = window.span // _MICROSECOND
        self._cell_span = 1 if window.amount <= EXACT else max(self._span // EXACT, 1)
        self._at: list[int] = []
        self._numbers: list[int] = []

    @property
    def key(self) -> str:
        """The window's name in storage; the amount is no part of it, plans and headers change it."""
        w = self.window
        zone = f":{w.zone}" if w.kind is Kind.ALIGNED else ""
        return f"{w.span.total_seconds():g}s{zone}{'' if w.is_weighted else ':calls'}"

    @property
    def calls(self) -> list[tuple[int, int]]:
        """Instants, oldest first, and what was counted at each."""
        return list(zip(self._at, self._numbers, strict=True))

    def copy(self) -> "Count":
        """The same count, to try things out on."""
        twin = Count(self.window, is_staggering=self.is_staggering)
        twin.amount, twin.phantom, twin.phantom_until = self.amount, self.phantom, self.phantom_until
        twin._at, twin._numbers = self._at.copy(), self._numbers.copy()
        return twin

    def weight(self, weight: int) -> int:
        """What a call of *weight* counts here."""
        return weight if self.window.is_weighted else 1

    def add(self, at: int, weight: int) -> None:
        """Count a call."""
        number = self.weight(weight)
        place = bisect_left(self._at, at)
        cell = self._cell(at)
        for twin in (place, place - 1):
            if 0 <= twin < len(self._at) and self._cell(self._at[twin]) == cell:
                self._numbers[twin] += number
                self._at[twin] = max(self._at[twin], at)  # the latest leaves the window last
                return
        self._at.insert(place, at)
        self._numbers.insert(place, number)

    def take_back(self, at: int, weight: int) -> bool:
        """Forget a call that was counted; whether it was still known."""
        place = bisect_left(self._at, at)
        if place == len(self._at) or self._cell(self._at[place]) != self._cell(at):
            return False
        self._numbers[place] -= self.weight(weight)
        if self._numbers[place] <= 0:
            del self._at[place], self._numbers[place]
        return True

    def prune(self, now: int) -> None:
        """Forget calls that no window can hold any more."""
        if self.window.kind is Kind.ALIGNED:
            oldest = self._interval(now - MOST_GUARD)[0] - MOST_GUARD
        else:
            oldest = now - self._span - MOST_GUARD
        gone = bisect_left(self._at, oldest)
        del self._at[:gone], self._numbers[:gone]
        if self.phantom_until <= now:
            self.phantom = self.phantom_until = 0

    def used(self, now: int, *, guard: int = 0) -> int:
        """How many are counted in the window at *now*, without what is only reserved."""
        if self.window.kind is Kind.ALIGNED:
            begin, end = self._interval(now)
            begin, last = begin - guard, min(end, now)
        else:
            begin, last = now - self._span - guard + 1, now
        return sum(self._numbers[bisect_left(self._at, begin) : bisect_right(self._at, last)])

    def resets_at(self, now: int) -> int | None:
        """When the window next holds less than now; None while it holds nothing."""
        if self.phantom and self.phantom_until > now:
            return self.phantom_until
        if not self.used(now):
            return None
        if self.window.kind is Kind.ALIGNED:
            return self._interval(now)[1]
        return self._at[bisect_left(self._at, now - self._span + 1)] + self._span

    def free_from(self, at: int, weight: int, *, guard: int, share: float = 1.0) -> int | None:
        """The earliest instant from *at* on that has room for a call; None: there can never be any."""
        limit = int(self.amount * share + 1e-9) - self.weight(weight)
        if limit < 0:
            return None
        find = self._aligned if self.window.kind is Kind.ALIGNED else self._rolling
        while True:
            is_haunted = at < self.phantom_until
            room = limit - self.phantom if is_haunted else limit
            then = find(at, room, guard) if room >= 0 else self.phantom_until
            if then == at:
                return at
            at = min(then, self.phantom_until) if is_haunted else then

    def _rolling(self, at: int, room: int, guard: int) -> int:
        span = self._span + guard
        around = slice(bisect_right(self._at, at - span), bisect_left(self._at, at + span + self._cell_span))
        if sum(self._numbers[around]) <= room:
            return at  # both sides together fit: no need to look closer
        after = bisect_right(self._at, at)
        end = self._begun_before(at + span)
        held = sum(self._numbers[after:end])
        if held > room:
            return self._at[after]  # too close to what is reserved behind it: look again behind that
        for first in range(after - 1, -1, -1):  # every stretch that begins with a call and would hold this one
            begin = self._at[first]
            if begin <= at - span:
                break
            held += self._numbers[first]
            while end > after and self._begins(end - 1) >= begin + span:
                end -= 1
                held -= self._numbers[end]
            if held > room:
                return begin + span
        return at

    def _aligned(self, at: int, room: int, guard: int) -> int:
        begin, end = self._interval(at)
        intervals = [(begin, end)]
        if at < begin + guard:
            intervals.insert(0, self._interval(begin - 1))
        if at >= end - guard:
            intervals.append(self._interval(end))
        for first, last in intervals:  # near an edge a call may count on either side of it
            held = self._numbers[bisect_left(self._at, first - guard) : bisect_left(self._at, last + guard)]
            if sum(held) > room:
                return last + guard
        return at

    def _cell(self, at: int) -> int:
        if self.window.kind is not Kind.ALIGNED:
            return at // self._cell_span
        begin, end = self._interval(at)
        is_clear = begin + MOST_GUARD <= at < end - MOST_GUARD
        return begin + MOST_GUARD if is_clear else at

    def _begins(self, place: int) -> int:
        """The earliest that a call kept at this place may have been."""
        return self._at[place] // self._cell_span * self._cell_span

    def _begun_before(self, at: int) -> int:
        place = bisect_left(self._at, at)
        while place < len(self._at) and self._begins(place) < at:
            place += 1
        return place

    def _interval(self, at: int) -> tuple[int, int]:
        zone = ZoneInfo(self.window.zone)
        begin, end = _day(self.window.zone, (EPOCH + at * _MICROSECOND).astimezone(zone).date())
        if self.window.span == DAY:
            return begin, end
        first = begin + (at - begin) // self._span * self._span
        return first, min(first + self._span, end)

    def encode(self) -> dict[str, Any]:
        """What storage keeps."""
        gaps = [at - before for before, at in zip([0, *self._at], self._at, strict=False)]
        body: dict[str, Any] = {"at": gaps}
        if any(number != 1 for number in self._numbers):
            body["n"] = self._numbers
        if self.amount != self.window.amount:
            body["amount"] = [self.amount, self.window.amount]
        if self.phantom:
            body["phantom"] = [self.phantom, self.phantom_until]
        return body

    def decode(self, body: dict[str, Any]) -> Self:
        """Go on from what ``encode`` gave."""
        at = 0
        for place, gap in enumerate(body["at"]):
            at += gap
            self._at.append(at)
            self._numbers.append(body["n"][place] if "n" in body else 1)
        told, believed = body.get("amount", (0, 0))
        if told and believed == self.window.amount:  # another plan, another belief: what was told is outdated
            self.amount = told
        self.phantom, self.phantom_until = body.get("phantom", (0, 0))
        return self

    def seed(self, calls: Sequence[tuple[int, int]]) -> None:
        """Count calls that another window knew of."""
        for at, number in calls:
            self.add(at, number)

    def no_later_than(self, at: int) -> bool:
        """Count calls that lie in the future (the wall was set back) as made at *at*; whether there are any."""
        keep = bisect_right(self._at, at)
        moved = sum(self._numbers[keep:])
        del self._at[keep:], self._numbers[keep:]
        if moved:
            self._at.append(at)
            self._numbers.append(moved)
        return moved > 0


@lru_cache(maxsize=64)
def _day(zone: str, day: date) -> tuple[int, int]:
    midnight, next_midnight = (
        datetime.combine(d, time(), ZoneInfo(zone)).astimezone(UTC) for d in (day, day + timedelta(days=1))
    )
    return micros(midnight), micros(next_midnight)


@lru_cache(maxsize=64)
def _staggering(windows: tuple[Window, ...]) -> Window:
    apart = min(timedelta(microseconds=STAGGER), STAGGER_SHARE * max(w.span / w.amount for w in windows))
    return Window(amount=1, span=apart, is_weighted=False)


class Pace:
    """All windows of a provider at once, with the guard between our instants and the windows' edges."""

    __slots__ = ("counts", "guard")

    def __init__(self, counts: Sequence[Count], guard: int = FIRST_GUARD) -> None:
        self.counts = tuple(counts)
        self.guard = guard

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Self:
        """Nothing counted yet."""
        counts = [Count(window) for window in windows]
        if windows:
            counts.append(Count(_staggering(tuple(windows)), is_staggering=True))
        return cls(counts)

    @property
    def windows(self) -> list[Count]:
        """The counts of the provider's own windows."""
        return [count for count in self.counts if not count.is_staggering]

    def copy(self) -> "Pace":
        """The same, to try things out on."""
        return Pace([count.copy() for count in self.counts], self.guard)

    def next_instant(self, at: int, weight: int = 1, priority: Priority = Priority.LIVE) -> int | None:
        """The earliest instant from *at* on at which a call may leave; None: no window can ever hold it."""
        laws = list(zip(self.counts, self._guards(), strict=True))
        while True:
            then = at
            for count, guard in laws:
                found = count.free_from(then, weight, guard=guard, share=_share(count, priority))
                if found is None:
                    return None
                then = found
            if then == at:
                return at
            at = then

    @property
    def least_guard(self) -> int:
        """What every window allows for: a call that came later than this must be counted as late as it came."""
        return min(
            (guard for count, guard in zip(self.counts, self._guards(), strict=True) if not count.is_staggering),
            default=self.guard,
        )

    def add(self, at: int, weight: int) -> None:
        """Count a call in every window."""
        for count in self.counts:
            count.add(at, weight)

    def take_back(self, at: int, weight: int) -> None:
        """Forget a call that was counted and never left."""
        for count in self.counts:
            count.take_back(at, weight)

    def move(self, at: int, later: int, weight: int) -> None:
        """Count a call later than was meant: it took longer than the guard allows for."""
        for count in self.windows:
            if count.take_back(at, weight):
                count.add(later, weight)

    def prune(self, now: int) -> None:
        """Forget what no window can hold any more."""
        for count in self.counts:
            count.prune(now)

    def _guards(self) -> list[int]:
        slowest = max((count.window.span / count.amount for count in self.windows), default=timedelta())
        return [
            0 if count.is_staggering else self._guard_of(count, is_slowest=count.window.span / count.amount >= slowest)
            for count in self.counts
        ]

    def _guard_of(self, count: Count, *, is_slowest: bool) -> int:
        if is_slowest:
            return min(self.guard, max(FIRST_GUARD, int(GUARD_SHARE * (count.window.span // _MICROSECOND))))
        return self.guard


def _share(count: Count, priority: Priority) -> float:
    return DAY_SHARES.get(priority, 1.0) if count.window.span >= DAY else 1.0
