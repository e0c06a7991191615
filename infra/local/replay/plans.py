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
    """At most ``calls`` calls in any stretch of ``span``."""

    name: str
    calls: int
    span: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one key is allowed: a provider's windows all hold at once, the longest first."""

    key: str
    alpha_vantage: tuple[Window, ...] = ()
    finnhub: tuple[Window, ...] = ()
    is_premium: bool = True


def _per_second(calls: int) -> Window:
    return Window(name="second", calls=calls, span=_SECOND)


def _per_minute(calls: int) -> Window:
    return Window(name="minute", calls=calls, span=_MINUTE)


FREE = Plan(
    key="local-free",
    alpha_vantage=(Window(name="day", calls=25, span=_DAY), _per_second(1)),
    finnhub=(_per_minute(60), _per_second(30)),
    is_premium=False,
)
PREMIUM = Plan(
    key="local-premium",
    alpha_vantage=(_per_minute(1200),),
    finnhub=(_per_minute(300), _per_second(30)),
)
UNLIMITED = Plan(key="local-unlimited")
PLANS: Mapping[str, Plan] = {plan.key: plan for plan in (FREE, PREMIUM, UNLIMITED)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is left in a window, and when its oldest call leaves it."""

    left: int
    frees_at: datetime


class Turnstile:
    """Counts one provider's calls by key, in windows that roll on the wall clock; a refused call is not counted."""

    def __init__(self, wall: Clock) -> None:
        self._wall = wall
        self._calls: dict[tuple[str, str], deque[float]] = {}

    def admit(self, key: str, windows: Iterable[Window]) -> Window | None:
        """Count a call in every window, or name the first that is full."""
        now = self._wall.now().timestamp()
        counted = [(window, self._pruned(key, window, now)) for window in windows]
        for window, calls in counted:
            if len(calls) >= window.calls:
                return window
        for _, calls in counted:
            calls.append(now)
        return None

    def room(self, key: str, window: Window) -> Room:
        """How many calls are left in a window now."""
        now = self._wall.now()
        calls = self._pruned(key, window, now.timestamp())
        oldest = datetime.fromtimestamp(calls[0], now.tzinfo) if calls else now
        return Room(left=max(window.calls - len(calls), 0), frees_at=oldest + window.span)

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
        while calls and calls[0] <= now - window.span.total_seconds():
            calls.popleft()
        return calls


def _split(name: str) -> tuple[str, str]:
    key, _, window = name.rpartition("|")
    return key, window
