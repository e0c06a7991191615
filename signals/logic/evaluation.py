"""The one decision function, live and in backtests: what an entry says of a bar, from its lookback alone. Pure."""

from dataclasses import dataclass, replace

from shared.errors import InvalidPayloadError
from signals.logic.arrays import Tape
from signals.logic.gating import Gatekeeper
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
    """An entry with its strategy and what gates it at hand."""

    entry: Entry
    strategy: Strategy
    params: Params
    gates: tuple[Gatekeeper, ...] = ()

    @classmethod
    def of(cls, entry: Entry) -> "Watcher":
        strategy = STRATEGIES[entry.strategy]
        return cls(
            entry=entry,
            strategy=strategy,
            params=strategy.params.model_validate(dict(entry.params)),
            gates=tuple(Gatekeeper.of(gate) for gate in entry.gates),
        )

    def decide(self, tape: Tape, index: int) -> Opinion | NotReady | None:
        """What the entry says of bar *index*, seeing exactly its lookback."""
        lookback = self.entry.lookback
        if index + 1 < lookback:
            return NotReady(needed=lookback, have=index + 1)
        bars = tape.last(index + 1 - lookback, index + 1)
        opinion = opinion_at(self.strategy.mark(bars, self.params), lookback - 1)
        if opinion is not None and all(gate.lets(opinion, bars) for gate in self.gates):
            return opinion
        return None

    def mark_all(self, tape: Tape) -> Marks:
        """
        Marks for the whole tape at once, gates applied; none on the first ``lookback - 1`` bars, which see too little.

        Raises:
            InvalidPayloadError: there are fewer bars than the lookback.

        """
        lookback = self.entry.lookback
        if len(tape) < lookback:
            raise InvalidPayloadError(f"bars: {self.entry.name} needs {lookback} of them, there are {len(tape)}")
        bars = tape.window(0, len(tape))
        marks = self.strategy.mark(bars, self.params)
        direction = marks.direction.copy()
        direction[: lookback - 1] = 0
        for gate in self.gates:
            direction[~gate.passed(direction, bars)] = 0
        return replace(marks, direction=direction)
