"""Stand-ins around the alerts and content services: signals, a topic, and neighbours that fail at a chosen moment."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from random import Random
from typing import Any

from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import Clock, StoppedClock
from shared.errors import UnavailableError
from shared.events import Event, fact_id
from signals.events import SignalRaised
from tests.builders import WALL

CLOSE = datetime(2012, 11, 21, 21, tzinfo=UTC)
"""The close of an ordinary session."""

PARAMS = {
    "sma_cross": {"fast": 10.0, "slow": 30.0},
    "rsi_reversal": {"period": 14.0, "low": 30.0, "high": 70.0},
    "bollinger_breakout": {"period": 20.0, "width": 2.0, "volume_factor": 1.5},
}


def a_signal(name: str = "one", **changes: Any) -> SignalRaised:
    """A signal known by *name*; every field can be given."""
    fields: dict[str, Any] = {
        "signal_id": fact_id("signal of a test", name),
        "entry": "sma-10-30",
        "strategy": "sma_cross@1",
        "params": PARAMS["sma_cross"],
        "symbol": "AAPL",
        "interval": "1d",
        "direction": "long",
        "strength": 0.62,
        "reference_price": 561.70,
        "features": {"fast": 552.1, "slow": 550.3},
        "provider": "alpha_vantage",
        "occurred_at": CLOSE,
        "recorded_at": WALL,
    }
    return SignalRaised.model_validate(fields | changes)


class Storage(SQLiteDocuments):
    """Storage that lives as long as somebody holds it, and closes itself then."""

    def __init__(self, wall: Clock | None = None) -> None:
        super().__init__(":memory:", wall or StoppedClock(WALL))

    def __del__(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Topic:
    """A topic that keeps what it was told; *trouble* is raised once for each of its items, None lets one pass."""

    def __init__(self, *trouble: Exception | None) -> None:
        self.told: list[Event] = []
        self.trouble = list(trouble)

    async def publish(self, events: Sequence[Event]) -> None:
        if self.trouble and (error := self.trouble.pop(0)):
            raise error
        self.told += events

    async def close(self) -> None:
        return

    def ids(self) -> list[str]:
        return [event.event_id for event in self.told]


class Killed(BaseException):
    """The process was killed here: no handler of the house may see it."""


class Fuse:
    """
    Lets one process fail at its *at*-th call to any neighbour.

    ``kill`` ends the process: it never reaches a neighbour again. ``raise`` loses one answer. Each strikes
    before the call takes effect, or after.
    """

    MODES = ("kill before", "kill after", "raise before", "raise after")

    def __init__(self, at: int = 0, mode: str = "kill before") -> None:
        self.at = at
        self.kills = mode.startswith("kill")
        self.after = mode.endswith("after")
        self.calls = 0
        self.is_dead = False

    async def run[T](self, call: Callable[[], Awaitable[T]], lost: Exception) -> T:
        if self.is_dead:
            raise Killed
        self.calls += 1
        mine = self.calls == self.at
        if mine and not self.after:
            self._blow(UnavailableError("the fuse blew before the call"))
        result = await call()
        if mine:
            self._blow(lost)
        if self.is_dead:
            raise Killed
        return result

    def _blow(self, error: Exception) -> None:
        if self.kills:
            self.is_dead = True
            raise Killed
        raise error


class Around:
    """A neighbour whose every asynchronous call goes through *step*; everything else is the neighbour's own."""

    def __init__(self, target: object, step: Callable[[str, Callable[[], Awaitable[Any]]], Awaitable[Any]]) -> None:
        self._target = target
        self._step = step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def call(*args: object, **kwargs: object) -> object:
            return await self._step(name, lambda: found(*args, **kwargs))

        return call


def fused(target: Any, fuse: Fuse, lost: Exception | None = None) -> Any:
    """*target* behind *fuse*; *lost* is what a lost answer looks like, trouble that passes unless told."""
    return Around(target, lambda _, call: fuse.run(call, lost or UnavailableError("the answer was lost")))


def shuffled(target: Any, dice: Random) -> Any:
    """*target* in a house where others get their turn around every call."""

    async def step(_: str, call: Callable[[], Awaitable[Any]]) -> object:
        for _ in range(dice.randrange(3)):
            await asyncio.sleep(0)
        result = await call()
        for _ in range(dice.randrange(3)):
            await asyncio.sleep(0)
        return result

    return Around(target, step)
