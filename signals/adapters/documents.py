"""Signals over Documents: container signals, partition symbol."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from shared.clock import format_instant, parse_instant
from shared.documents import Document, Documents, Operation, sort_key
from shared.errors import ConflictError, NotFoundError, StaleError
from shared.market.models import Interval
from signals.adapters.outcomes import (
    FIRST_SIGNAL,
    book_document,
    book_id,
    book_of,
    outcome_body,
    outcome_of_body,
    place_of,
    record_document,
    record_id,
    record_of,
    record_prefix,
)
from signals.models import Book, Direction, Origin, Outcome, Record, Signal, State
from signals.ports import Entries, Kept

CONTAINER = "signals"
GRACE = timedelta(seconds=10)
"""How long the handler that stored a signal has for telling of it before the sweep does."""
READ_AT_ONCE = 50
BEFORE_OUTCOMES = "raised by a version that kept no outcomes"


class SignalDocuments:
    """One document a signal, one a series for what is open, a few for what became of the others."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    async def book(self, symbol: str, interval: Interval) -> Book:
        try:
            return book_of(await self._documents.read(CONTAINER, symbol, book_id(symbol, interval)))
        except NotFoundError:
            return Book(symbol=symbol, interval=interval)

    async def record(self, variant: str, book: Book, number: int) -> Record:
        id_ = record_id(book.tallies[variant].entry, variant, book.symbol, book.interval, number)
        return record_of(await self._documents.read(CONTAINER, book.symbol, id_))

    async def read(self, symbol: str, signal_id: str) -> Kept:
        return _kept(await self._documents.read(CONTAINER, symbol, signal_id))

    async def shown(self, signal_id: str, symbol: str | None) -> Document:
        if symbol is None:
            pointer = await self._documents.read(CONTAINER, _pointer_id(signal_id), _pointer_id(signal_id))
            symbol = str(pointer.body["symbol"])
        found = await self._documents.read(CONTAINER, symbol, signal_id)
        if found.sort < FIRST_SIGNAL:  # a book or a record: its id is nobody's signal
            raise NotFoundError(f"no {CONTAINER}/{symbol}/{signal_id}")
        return _shown(found)

    async def write(self, entries: Entries) -> tuple[Book, Sequence[Kept], Sequence[Record]]:
        # First, so that a told id can always be looked up: one that leads nowhere yet does no harm.
        await asyncio.gather(
            *(self._point(signal) for signal, _ in entries.raised if signal.origin is not Origin.BACKFILL)
        )
        signals = [_new(signal, owes) for signal, owes in entries.raised]
        stored = [_written(kept) for kept in entries.scored]
        others = [record_document(record) for record in entries.records]
        book = book_document(entries.book, entries.look_again_at)
        try:
            done = await self._batch([*signals, *stored, *others, book])
        except (ConflictError, NotFoundError):
            known = await self._adopted(signals)
            if known is None:
                raise StaleError(f"the book of {book.id} was written by somebody else") from None
            done = await self._batch([*known, *stored, *others, book])
        count = len(signals) + len(stored)
        return (
            book_of(done[-1]),
            [_kept(document) for document in done[:count]],
            [record_of(document) for document in done[count:-1]],
        )

    async def _batch(self, documents: Sequence[Document]) -> list[Document]:
        operations = [Operation(kind="replace" if d.etag else "create", document=d) for d in documents]
        return await self._documents.batch(CONTAINER, operations)

    async def _adopted(self, signals: Sequence[Document]) -> list[Document] | None:
        """
        New signals of which an earlier version stored some but kept no book; None if that is not the trouble.

        What it stored stays as it is, and what it still owes stays owed; the new facts come beside it.
        """
        adopted: list[Document] = []
        for document in signals:
            try:
                known = await self._documents.read(CONTAINER, document.partition, document.id)
            except NotFoundError:
                adopted.append(document)
                continue
            if "outcome" in known.body:
                return None
            owes = known.body.get("owes", ["raised"]) if known.due_at else []
            body = {**document.body, **known.body, "owes": owes}
            adopted.append(known.with_body(body, due_at=known.due_at))
        return adopted if any(document.etag for document in adopted) else None

    async def _point(self, signal: Signal) -> None:
        id_ = _pointer_id(signal.signal_id)
        body = {"symbol": signal.symbol}
        with suppress(ConflictError):
            await self._documents.create(CONTAINER, Document(id=id_, partition=id_, sort=place_of(id_), body=body))

    async def told(self, kept: Kept) -> None:
        document = kept.document
        for _ in range(3):
            left = [event for event in document.body.get("owes", ["raised"]) if event not in kept.owes]
            if not document.due_at or len(left) == len(document.body.get("owes", ["raised"])):
                return  # a twin told it too, and wrote so first
            body = {**document.body, "owes": left}
            try:
                await self._documents.replace(
                    CONTAINER, document.with_body(body, due_at=document.due_at if left else None)
                )
            except StaleError:  # it was scored at the same moment, or a twin told it too
                document = await self._documents.read(CONTAINER, document.partition, document.id)
            else:
                return

    async def due(self, before: datetime) -> tuple[Sequence[Kept], Sequence[Book]]:
        found = await self._documents.due(CONTAINER, before=before)
        books = [d for d in found if d.sort < FIRST_SIGNAL]
        return [_kept(d) for d in found if d.sort > FIRST_SIGNAL], [book_of(d) for d in books]

    async def records(self, entry: str, variant: str, symbol: str | None) -> Sequence[Record]:
        prefix = record_prefix(entry, variant)
        return await self._run(prefix if symbol is None else f"{prefix}{symbol}|", symbol, record_of)

    async def books(self, symbol: str | None) -> Sequence[Book]:
        return await self._run("book|" if symbol is None else f"book|{symbol}|", symbol, book_of)

    async def listed(self, symbol: str | None, after: str | None, *, newest_first: bool, limit: int) -> list[Document]:
        if not newest_first:
            after = max(after or "", FIRST_SIGNAL)
        if symbol:
            found = await self._documents.page(CONTAINER, symbol, after=after, newest_first=newest_first, limit=limit)
        else:
            found = await self._documents.feed(CONTAINER, after=after, newest_first=newest_first, limit=limit)
        # What is no signal lies behind the oldest one, so whoever counts on a full page is not misled.
        return [_shown(document) for document in found if document.sort > FIRST_SIGNAL]

    async def _run[T](self, prefix: str, symbol: str | None, read: Callable[[Document], T]) -> list[T]:
        """Everything whose id begins with *prefix*: neighbours in the order of ids."""
        found: list[T] = []
        after = place_of(prefix)
        while True:
            if symbol is None:
                page = await self._documents.feed(CONTAINER, after=after, limit=READ_AT_ONCE)
            else:
                page = await self._documents.page(CONTAINER, symbol, after=after, limit=READ_AT_ONCE)
            mine = [document for document in page if document.id.startswith(prefix)]
            found += [read(document) for document in mine]
            if len(mine) < READ_AT_ONCE:
                return found
            after = page[-1].sort


def _pointer_id(signal_id: str) -> str:
    return f"id|{signal_id}"


def _new(signal: Signal, owes: Sequence[str]) -> Document:
    return Document(
        id=signal.signal_id,
        partition=signal.symbol,
        sort=sort_key(signal.recorded_at, signal.signal_id),
        body=_body(signal, owes),
        due_at=signal.recorded_at + GRACE if owes else None,
    )


def _written(kept: Kept) -> Document:
    """A stored signal with what is new about it; it is due when the last thing it owes is."""
    written_at = kept.signal.scored_at or kept.signal.recorded_at
    due_at = written_at + GRACE if kept.owes else None
    return kept.document.with_body({**kept.document.body, **_body(kept.signal, kept.owes)}, due_at=due_at)


def _kept(document: Document) -> Kept:
    owes = document.body.get("owes", ["raised"]) if document.due_at else []
    return Kept(signal=signal_of(document), document=document, owes=owes)


def _shown(document: Document) -> Document:
    """A signal of an earlier version with what it lacks, as every reader expects it."""
    return document if "outcome" in document.body else replace(document, body=_body(signal_of(document), ()))


def _body(s: Signal, owes: Sequence[str]) -> dict[str, Any]:
    return {
        "signal_id": s.signal_id,
        "entry": s.entry,
        "variant": s.variant,
        "strategy": s.strategy,
        "version": s.version,
        "params": dict(s.params),
        "symbol": s.symbol,
        "interval": s.interval,
        "direction": s.direction,
        "strength": s.strength,
        "confidence": s.confidence,
        "sample_size": s.sample_size,
        "reference_price": s.reference_price,
        "closed_at": format_instant(s.closed_at),
        "horizon": s.horizon,
        "closes_at": format_instant(s.closes_at) if s.closes_at else None,
        "expires_at": format_instant(s.expires_at) if s.expires_at else None,
        "features": dict(s.features),
        "trend": s.trend,
        "why": s.why,
        "origin": s.origin,
        "muted_because": s.muted_because,
        "provider": s.provider,
        "adjustment": s.adjustment,
        "revision": s.revision,
        "recorded_at": format_instant(s.recorded_at),
        "outcome": outcome_body(s.outcome),
        "scored_at": format_instant(s.scored_at) if s.scored_at else None,
        "owes": list(owes),
    }


def signal_of(document: Document) -> Signal:
    """The signal a document keeps; of an earlier version's, what was not kept is unscorable."""
    b = {name: value for name, value in document.body.items() if name != "owes"}
    closes_at, expires_at, scored_at = b.get("closes_at"), b.get("expires_at"), b.get("scored_at")
    return Signal(
        **{
            **b,
            "interval": Interval(b["interval"]),
            "direction": Direction(b["direction"]),
            "origin": Origin(b["origin"]),
            "closed_at": parse_instant(b["closed_at"]),
            "closes_at": parse_instant(closes_at) if closes_at else None,
            "expires_at": parse_instant(expires_at) if expires_at else None,
            "recorded_at": parse_instant(b["recorded_at"]),
            "outcome": outcome_of_body(b["outcome"])
            if "outcome" in b
            else Outcome(state=State.UNSCORABLE, reason=BEFORE_OUTCOMES),
            "scored_at": parse_instant(scored_at) if scored_at else None,
        }
    )
