"""The one decision function, live and in backtests: what an entry says of a bar, from its lookback alone. Pure."""

from dataclasses import dataclass

from signals.logic.arrays import Tape
from signals.logic.strategies import STRATEGIES, Marks, Params, Strategy, opinion_at
from signals.models import Entry, Opinion


@dataclass(frozen=True, slots=True, kw_only=True)
class NotReady:
    """There are fewer bars than the strategy must see."""

    needed: int
    have: int

    @property
    def reason(self) -> str:
        return f"needs {self.needed} bars, has {self.have}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """An entry with its strategy at hand."""

    entry: Entry
    strategy: Strategy
    params: Params

    @classmethod
    def of(cls, entry: Entry) -> "Watcher":
        strategy = STRATEGIES[entry.strategy]
        return cls(entry=entry, strategy=strategy, params=strategy.params.model_validate(dict(entry.params)))

    def decide(self, tape: Tape, index: int) -> Opinion | NotReady | None:
        """What the entry says of bar *index*, seeing exactly its lookback."""
        lookback = self.entry.lookback
        if index + 1 < lookback:
            return NotReady(needed=lookback, have=index + 1)
        marks = self.strategy.mark(tape.window(index + 1 - lookback, index + 1), self.params)
        return opinion_at(marks, lookback - 1)

    def mark_all(self, tape: Tape) -> Marks:
        """Marks for the whole tape at once; the first ``lookback - 1`` bars are not decided."""
        return self.strategy.mark(tape.window(0, len(tape.raw)), self.params)
