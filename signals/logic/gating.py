"""Which opinions of an entry count: those that another strategy's state, or the time of day, lets through. Pure."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import time, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

from shared.errors import ConfigurationError
from shared.market.models import instant_of
from shared.market.sessions import calendar
from signals.logic.arrays import Arrays, LastBar
from signals.logic.strategies import STRATEGIES, Params, Strategy
from signals.models import Direction, Gate, Opinion, SessionGate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from signals.logic.arrays import Claims, Minutes

STATEFUL = tuple(name for name, strategy in STRATEGIES.items() if strategy.has_state)
"""Strategies that can gate others."""
DAY = 24 * 60
MINUTE = timedelta(minutes=1)


class Gatekeeper(ABC):
    """A gate with all it needs at hand."""

    @abstractmethod
    def lets(self, opinion: Opinion, bars: LastBar) -> bool:
        """Whether an opinion of the last bar counts."""

    @abstractmethod
    def passed(self, direction: "NDArray[np.int8]", bars: Arrays) -> "Claims":
        """Whether an opinion of this direction counts, for every bar."""

    @staticmethod
    def of(gate: Gate) -> "Gatekeeper":
        """
        Who keeps this gate.

        Raises:
            ConfigurationError: its strategy keeps no state.

        """
        if isinstance(gate, SessionGate):
            return SessionKeeper(first=_minutes(gate.first), last=_minutes(gate.last))
        strategy = STRATEGIES[gate.strategy]
        if not strategy.has_state:
            raise ConfigurationError(f"{strategy.name} keeps no state that could gate; use {', '.join(STATEFUL)}")
        params = strategy.params.model_validate(dict(gate.params))
        return StateKeeper(strategy=strategy, params=params, agrees=gate.agrees)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateKeeper(Gatekeeper):
    """Asks where another strategy stands, on the same bars."""

    strategy: Strategy
    params: Params
    agrees: bool

    def lets(self, opinion: Opinion, bars: LastBar) -> bool:
        wanted = 1 if opinion.direction is Direction.LONG else -1
        return bool(self._stands(bars) == wanted) is self.agrees

    def passed(self, direction: "NDArray[np.int8]", bars: Arrays) -> "Claims":
        import numpy as np

        agree = np.equal(self._stands(bars), direction)
        return agree if self.agrees else ~agree

    def _stands(self, bars: Arrays) -> "NDArray[np.int8]":
        state = self.strategy.mark(bars, self.params).state
        if state is None:
            raise ConfigurationError(f"{self.strategy.name} says that it has a state and marks none")
        return state


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionKeeper(Gatekeeper):
    """Asks when the bar closed, in minutes of the exchange's day."""

    first: int
    last: int

    def lets(self, opinion: Opinion, bars: LastBar) -> bool:
        closed = int(bars.closed[-1])
        return self.first <= (closed + _offset(closed // DAY)) % DAY <= self.last

    def passed(self, direction: "NDArray[np.int8]", bars: Arrays) -> "Claims":
        local = _local(bars.closed) % DAY
        return (self.first <= local) & (local <= self.last)


def _minutes(at: time) -> int:
    return at.hour * 60 + at.minute


def _local(closed: "Minutes") -> "Minutes":
    import numpy as np

    days, places = np.unique(closed // DAY, return_inverse=True)
    return closed + np.array([_offset(int(day)) for day in days], dtype=np.int64)[places]


@lru_cache(maxsize=64)
def _offset(day: int) -> int:
    """How far the exchange's clock is ahead of UTC on a day, in minutes; clocks change at night, before any session."""
    noon = instant_of(day * DAY + DAY // 2).astimezone(calendar().zone)
    offset = noon.utcoffset()
    return offset // MINUTE if offset is not None else 0
