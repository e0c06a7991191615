"""What the signals domain asks of the outside."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from shared.documents import Document
from shared.market.models import Interval
from signals.models import Book, Record, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A signal as it is stored; ``owes`` names the events that are still to be told of it."""

    signal: Signal
    document: Document
    owes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """
    What is written down at once about a series, all or nothing.

    ``raised`` are new signals, ``scored`` stored ones with their outcome; either may owe events.
    """

    book: Book
    raised: Sequence[tuple[Signal, Sequence[str]]] = ()
    scored: Sequence[Kept] = ()
    records: Sequence[Record] = ()
    look_again_at: datetime | None = field(default=None)
    """When the sweep shall look whether an open signal has expired (wall)."""


class Signals(Protocol):
    """
    Keeps signals and their outcomes. One owes its events from the moment it is stored until ``told``.

    Raises RateLimitedError or UnavailableError when storage does.
    """

    async def book(self, symbol: str, interval: Interval) -> Book:
        """The open signals of a series as they are stored; an empty book where there never was one."""
        ...

    async def record(self, variant: str, book: Book, number: int) -> Record:
        """
        A part of a record.

        Raises:
            NotFoundError: there is none of this number.

        """
        ...

    async def read(self, symbol: str, signal_id: str) -> Kept:
        """
        A stored signal.

        Raises:
            NotFoundError: this symbol has no such signal.

        """
        ...

    async def shown(self, signal_id: str, symbol: str | None) -> Document:
        """
        A stored signal as lists show it; without a symbol only live ones are found.

        Raises:
            NotFoundError: there is none.

        """
        ...

    async def write(self, entries: Entries) -> tuple[Book, Sequence[Kept], Sequence[Record]]:
        """
        Write signals, outcomes, records and the book at once; returns them as stored.

        Raises:
            StaleError: another process wrote the book first: nothing was written, read it and decide again.

        """
        ...

    async def told(self, kept: Kept) -> None:
        """The events that a signal owed were published."""
        ...

    async def due(self, before: datetime) -> tuple[Sequence[Kept], Sequence[Book]]:
        """Signals whose events are owed since before *before* (wall), and books to look into for expired ones."""
        ...

    async def records(self, entry: str, variant: str, symbol: str | None) -> Sequence[Record]:
        """Everything that is known of the closed signals of a variant, on one symbol or on all."""
        ...

    async def books(self, symbol: str | None) -> Sequence[Book]:
        """The books of one symbol, or of all."""
        ...

    async def listed(self, symbol: str | None, after: str | None, *, newest_first: bool, limit: int) -> list[Document]:
        """Signals of a symbol, or of all, in order of ``recorded_at``."""
        ...
