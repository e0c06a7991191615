"""What each key buys at the replayed providers, and the turnstile that counts it."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from shared.clock import Clock

_SECOND = timedelta(seconds=1)
_MINUTE = timedelta(minutes=1)
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """
    At most ``calls`` calls in any stretch of ``span``.

    An aligned one counts from each full minute, or from midnight UTC, anew.
    """

    name: str
    calls: int
    span: timedelta
    is_aligned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one key is allowed: a provider's windows all hold at once, the longest first."""

    key: str
    alpha_vantage: tuple[Window, ...] = ()
    finnhub: tuple[Window, ...] = ()
    twelve_data: tuple[Window, ...] = ()
    polygon: tuple[Window, ...] = ()
    is_premium: bool = True


def _per_second(calls: int) -> Window:
    return Window(name="second", calls=calls, span=_SECOND)


def _per_minute(calls: int) -> Window:
    return Window(name="minute", calls=calls, span=_MINUTE)


def _credits(minute: int, day: int | None = None) -> tuple[Window, ...]:
    """Twelve Data's windows: both begin at a full one on the clock."""
    per_minute = Window(name="minute", calls=minute, span=_MINUTE, is_aligned=True)
    if day is None:
        return (per_minute,)
    return Window(name="day", calls=day, span=_DAY, is_aligned=True), per_minute


FREE = Plan(
    key="local-free",
    alpha_vantage=(Window(name="day", calls=25, span=_DAY), _per_second(1)),
    finnhub=(_per_minute(60), _per_second(30)),
    twelve_data=_credits(8, 800),
    polygon=(_per_minute(5),),
    is_premium=False,
)
HISTORIC = Plan(
    key="local-historic",
    alpha_vantage=(Window(name="old_day", calls=500, span=_DAY), Window(name="old_minute", calls=5, span=_MINUTE)),
    finnhub=FREE.finnhub,
    twelve_data=FREE.twelve_data,
    polygon=FREE.polygon,
    is_premium=False,
)
"""A free key as it was until 2023: Alpha Vantage counted 5 calls a minute and 500 a day, and said so in a Note."""
PREMIUM = Plan(
    key="local-premium",
    alpha_vantage=(_per_minute(1200),),
    finnhub=(_per_minute(300), _per_second(30)),
    twelve_data=_credits(55),
    polygon=(_per_second(100),),
)
UNLIMITED = Plan(key="local-unlimited")
PLANS: Mapping[str, Plan] = {plan.key: plan for plan in (FREE, HISTORIC, PREMIUM, UNLIMITED)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What was used of a window and what is left, and when its oldest call leaves it."""

    used: int
    left: int
    frees_at: datetime


class Turnstile:
    """Counts one provider's calls by key, in windows that roll on the wall clock; a refused call is not counted."""

    def __init__(self, wall: Clock) -> None:
        self._wall = wall
        self._calls: dict[tuple[str, str], deque[float]] = {}

    def admit(self, key: str, windows: Iterable[Window], *, weight: int = 1) -> Window | None:
        """Count a call in every window as *weight* calls, or name the first that has not that much room."""
        now = self._wall.now().timestamp()
        counted = [(window, self._pruned(key, window, now)) for window in windows]
        for window, calls in counted:
            if len(calls) + weight > window.calls:
                return window
        for _, calls in counted:
            calls.extend([now] * weight)
        return None

    def room(self, key: str, window: Window) -> Room:
        """How many calls are left in a window now."""
        now = self._wall.now()
        calls = self._pruned(key, window, now.timestamp())
        if window.is_aligned:
            since = datetime.fromtimestamp(_begin(window, now.timestamp()), now.tzinfo)
        else:
            since = datetime.fromtimestamp(calls[0], now.tzinfo) if calls else now
        used = len(calls)
        return Room(used=used, left=max(window.calls - used, 0), frees_at=since + window.span)

    def state(self) -> dict[str, Any]:
        """Everything that was counted, as plain values."""
        return {f"{key}|{window}": list(calls) for (key, window), calls in self._calls.items() if calls}

    def restore(self, state: Mapping[str, Iterable[float]]) -> None:
        """Count on from what ``state`` gave."""
        self._calls = {_split(name): deque(map(float, calls)) for name, calls in state.items()}

    def _pruned(self, key: str, window: Window, now: float) -> deque[float]:
        calls = self._calls.setdefault((key, window.name), deque())
        if calls and calls[-1] > now:  # the wall was set back: no call waits longer than its window
            calls = self._calls[key, window.name] = deque(min(call, now) for call in calls)
        begin = _begin(window, now)
        while calls and (calls[0] < begin if window.is_aligned else calls[0] <= begin):
            calls.popleft()
        return calls


def _begin(window: Window, now: float) -> float:
    """Calls before this no longer count."""
    span = window.span.total_seconds()
    return now - now % span if window.is_aligned else now - span


def _split(name: str) -> tuple[str, str]:
    key, _, window = name.rpartition("|")
    return key, window
