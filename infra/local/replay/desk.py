"""What both replayed providers do at the front desk: strike faults, count calls and keep what was counted."""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiohttp import web

from infra.local.replay.plans import Plan, Turnstile
from shared.clock import Clock

type Faults = Callable[[str, web.Request], Awaitable[web.StreamResponse | None]]
"""Asked before each answer with the provider's name; gives an answer of its own, or None to go on."""

REMEMBERED = 2000


@dataclass(slots=True, kw_only=True)
class Desk:
    """One provider's front desk."""

    provider: str
    plans: Mapping[str, Plan]
    turnstile: Turnstile
    wall: Clock
    faults: Faults | None = None
    calls: int = 0
    answers: int = 0
    faulted: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    latest: deque[tuple[datetime, str]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    async def struck(self, request: web.Request) -> web.StreamResponse | None:
        """Count a call and let faults strike first."""
        self.calls += 1
        answer = await self.faults(self.provider, request) if self.faults else None
        if answer is not None:
            self.faulted += 1
        return answer

    def answered(self, symbol: str) -> None:
        """Count an answer, and remember when it was given."""
        self.answers += 1
        self.latest.append((self.wall.now(), symbol))

    def stats(self) -> dict[str, Any]:
        """How many calls came, how they ended, and why some were refused."""
        return {
            "calls": self.calls,
            "answers": self.answers,
            "faulted": self.faulted,
            "refusals": dict(self.refusals),
        }

    def state(self) -> dict[str, Any]:
        """The counts and the windows, as plain values."""
        return {**self.stats(), "windows": self.turnstile.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.calls, self.answers, self.faulted = state["calls"], state["answers"], state["faulted"]
        self.refusals = Counter(state["refusals"])
        self.turnstile.restore(state["windows"])
