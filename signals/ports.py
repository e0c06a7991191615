"""What the signals domain asks of the outside."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from shared.documents import Document
from signals.models import Signal


class Signals(Protocol):
    """
    Keeps signals. A live one owes its event from the moment it is stored until ``told``.

    Raises RateLimitedError or UnavailableError when storage does.
    """

    async def keep(self, signal: Signal) -> tuple[Signal, Document] | None:
        """Store a signal, or find it stored; returns what is stored while it still owes its event, else None."""
        ...

    async def told(self, document: Document) -> None:
        """The event of a signal was published."""
        ...

    async def untold(self, before: datetime) -> Sequence[tuple[Signal, Document]]:
        """Signals that still owe their event although they were stored before *before* (wall)."""
        ...

    async def listed(self, symbol: str | None, after: str | None, *, newest_first: bool, limit: int) -> list[Document]:
        """Signals of a symbol, or of all, in order of ``recorded_at``."""
        ...
