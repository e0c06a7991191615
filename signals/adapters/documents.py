"""Signals over Documents: container signals, partition symbol."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from shared.clock import format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import ConflictError, StaleError
from shared.market.models import Interval
from signals.models import Direction, Origin, Signal

CONTAINER = "signals"
GRACE = timedelta(seconds=10)
"""How long the handler that stored a signal has for telling of it before the sweep does."""


class SignalDocuments:
    """One document a signal."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    async def keep(self, signal: Signal) -> tuple[Signal, Document] | None:
        due_at = signal.recorded_at + GRACE if signal.origin is Origin.LIVE else None
        document = Document(
            id=signal.signal_id,
            partition=signal.symbol,
            sort=sort_key(signal.recorded_at, signal.signal_id),
            body=_body(signal),
            due_at=due_at,
        )
        try:
            stored = await self._documents.create(CONTAINER, document)
        except ConflictError:
            stored = await self._documents.read(CONTAINER, signal.symbol, signal.signal_id)
        return (signal_of(stored), stored) if stored.due_at else None

    async def told(self, document: Document) -> None:
        try:
            await self._documents.replace(CONTAINER, document.with_body(document.body))
        except StaleError:
            return  # a twin told it too, and wrote so first

    async def untold(self, before: datetime) -> Sequence[tuple[Signal, Document]]:
        return [(signal_of(d), d) for d in await self._documents.due(CONTAINER, before=before)]

    async def listed(self, symbol: str | None, after: str | None, *, newest_first: bool, limit: int) -> list[Document]:
        if symbol:
            return await self._documents.page(CONTAINER, symbol, after=after, newest_first=newest_first, limit=limit)
        return await self._documents.feed(CONTAINER, after=after, newest_first=newest_first, limit=limit)


def _body(s: Signal) -> dict[str, Any]:
    return {
        "signal_id": s.signal_id,
        "entry": s.entry,
        "strategy": s.strategy,
        "version": s.version,
        "params": dict(s.params),
        "symbol": s.symbol,
        "interval": s.interval,
        "direction": s.direction,
        "strength": s.strength,
        "reference_price": s.reference_price,
        "closed_at": format_instant(s.closed_at),
        "features": dict(s.features),
        "origin": s.origin,
        "provider": s.provider,
        "revision": s.revision,
        "recorded_at": format_instant(s.recorded_at),
    }


def signal_of(document: Document) -> Signal:
    """The signal a document keeps."""
    b = dict(document.body)
    return Signal(
        **{
            **b,
            "interval": Interval(b["interval"]),
            "direction": Direction(b["direction"]),
            "origin": Origin(b["origin"]),
            "closed_at": parse_instant(b["closed_at"]),
            "recorded_at": parse_instant(b["recorded_at"]),
        }
    )
