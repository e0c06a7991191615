"""What is to be written down about a series while its bars are gone through, one after another. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from signals.models import Book, OpenSignal, Origin, Outcome, Record, Resolved, Signal, State, Tally

LINES = 64
"""Outcomes in one document of a record: a bar's scoring writes one of them again."""
NOTHING = Tally(entry="")


@dataclass(slots=True, kw_only=True)
class Draft:
    """
    A book as it will be, and the signals and records that must be written with it.

    ``raised`` are new signals, ``scored`` stored ones that have an outcome now, ``records`` the last part of each
    record that was touched. ``written`` says that it is all in storage: the draft goes on from there.
    """

    book: Book
    open: dict[str, OpenSignal] = field(init=False)
    tallies: dict[str, Tally] = field(init=False)
    through: datetime | None = field(init=False)
    raised: dict[str, Signal] = field(default_factory=dict)
    scored: dict[str, Signal] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.open, self.tallies, self.through = dict(self.book.open), dict(self.book.tallies), self.book.through

    @property
    def size(self) -> int:
        """How many documents are to be written, the book among them."""
        return len(self.raised) + len(self.scored) + len(self.touched) + 1

    @property
    def is_changed(self) -> bool:
        return self.size > 1

    @property
    def scoring_at(self) -> datetime | None:
        """When the first horizon closes."""
        return min((one.closes_at for one in self.open.values()), default=None)

    def ends_by(self, instant: datetime) -> list[OpenSignal]:
        """The open signals whose horizon has closed, in an order that is the same on every run."""
        ended = [one for one in self.open.values() if one.closes_at <= instant]
        return sorted(ended, key=lambda one: (one.closes_at, one.closed_at, one.signal_id))

    def tail(self, one: OpenSignal) -> int | None:
        """The number of the stored part of a record that the signal's line is added to, unless it is at hand."""
        number, lines = divmod(self.tallies[one.variant].resolved, LINES)
        return number if lines and one.variant not in self.records else None

    def add(self, signal: Signal) -> None:
        """A signal was found."""
        assert signal.horizon and signal.closes_at and signal.expires_at, "every new signal has one"  # noqa: S101, PT018
        self.raised[signal.signal_id] = signal
        self.tallies.setdefault(signal.variant, replace(NOTHING, entry=signal.entry))
        self.open[signal.signal_id] = OpenSignal(
            signal_id=signal.signal_id,
            variant=signal.variant,
            direction=signal.direction,
            strength=signal.strength,
            confidence=signal.confidence,
            reference_price=signal.reference_price,
            trend=signal.trend,
            horizon=signal.horizon,
            closed_at=signal.closed_at,
            closes_at=signal.closes_at,
            expires_at=signal.expires_at,
        )

    def resolve(self, signal: Signal, one: OpenSignal, outcome: Outcome) -> None:
        """An open signal has its outcome; the part of its record that it belongs to is at hand."""
        del self.open[one.signal_id]
        (self.raised if one.signal_id in self.raised else self.scored)[one.signal_id] = replace(signal, outcome=outcome)
        tally = self.tallies[one.variant]
        number, lines = divmod(tally.resolved, LINES)
        record = self.records.get(one.variant)
        if record is None or (record.number != number and not lines):
            record = Record(
                entry=tally.entry,
                variant=one.variant,
                symbol=self.book.symbol,
                interval=self.book.interval,
                number=number,
            )
        line = Resolved(
            closed_at=one.closed_at,
            closes_at=one.closes_at,
            direction=one.direction,
            strength=one.strength,
            confidence=one.confidence,
            trend=one.trend,
            outcome=outcome,
        )
        self.records[one.variant] = replace(record, lines=[*record.lines, line])
        self.touched.add(one.variant)
        is_scored = outcome.state is State.SCORED
        self.tallies[one.variant] = replace(
            tally,
            resolved=tally.resolved + 1,
            scored=tally.scored + is_scored,
            hits=tally.hits + bool(outcome.is_hit),
            ups=tally.ups + (is_scored and (outcome.base_return or 0) > 0),
        )

    def fills_a_record(self, one: OpenSignal) -> bool:
        """Whether the signal's line begins a new part while an older one is still to be written."""
        starts = self.tallies[one.variant].resolved % LINES == 0
        return starts and one.variant in self.touched

    def next_book(self) -> Book:
        """The book to be written."""
        return replace(self.book, open=self.open, tallies=self.tallies, through=self.through)

    def written(self, book: Book, records: Iterable[Record]) -> None:
        """Everything is in storage as this book."""
        self.book = book
        self.raised, self.scored, self.touched = {}, {}, set()
        self.records |= {record.variant: record for record in records}


def owed(signal: Signal) -> Sequence[str]:
    """The events that a new signal owes: what was found in history or muted owes none."""
    if signal.origin is not Origin.LIVE:
        return ()
    return ("raised", "scored") if signal.outcome.state is State.SCORED else ("raised",)
