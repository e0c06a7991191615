"""
Books and records as documents: what lies beside the signals in their container.

Their place in every list is the beginning of time, before every signal, so that no list of signals shows them
and everything of one kind is a run of neighbours that one keyset page after another can read.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from shared.clock import format_instant, parse_instant
from shared.documents import Document, sort_key
from shared.events import fact_id
from shared.market.models import Interval, instant_of, minute_of
from signals.models import Book, Direction, OpenSignal, Outcome, Record, Resolved, State, Tally

BEGINNING = datetime.min.replace(tzinfo=UTC)
FIRST_SIGNAL = sort_key(BEGINNING.replace(year=2))
"""Behind everything that is no signal, before every signal."""
NUMBERS = ("entry_price", "exit_price", "forward_return", "net_return", "base_return", "mfe", "mae", "cost_per_side")


def place_of(id_: str) -> str:
    """Where a document that is no signal lies in lists; of the beginning of an id, just before all those."""
    return sort_key(BEGINNING, id_)


def book_id(symbol: str, interval: Interval) -> str:
    return f"book|{symbol}|{interval}"


def record_prefix(entry: str, variant: str) -> str:
    """What the ids of a variant's records begin with; an entry may be called anything, an id may not."""
    return f"record|{fact_id('entry', entry)}|{variant}|"


def record_id(entry: str, variant: str, symbol: str, interval: Interval, number: int) -> str:
    return f"{record_prefix(entry, variant)}{symbol}|{interval}|{number:06d}"


def book_document(book: Book, due_at: datetime | None) -> Document:
    """The document of a book, to be created or replaced."""
    body = {
        "symbol": book.symbol,
        "interval": book.interval,
        "through": format_instant(book.through) if book.through else None,
        "open": {id_: _open_body(one) for id_, one in book.open.items()},
        "tallies": {
            variant: {
                "entry": t.entry,
                "resolved": t.resolved,
                "scored": t.scored,
                "hits": t.hits,
                "ups": t.ups,
            }
            for variant, t in book.tallies.items()
        },
    }
    if book.document:
        return book.document.with_body(body, due_at=due_at)
    id_ = book_id(book.symbol, book.interval)
    return Document(id=id_, partition=book.symbol, sort=place_of(id_), body=body, due_at=due_at)


def book_of(document: Document) -> Book:
    """The book that a document keeps."""
    b = document.body
    return Book(
        symbol=b["symbol"],
        interval=Interval(b["interval"]),
        through=parse_instant(b["through"]) if b["through"] else None,
        open={id_: _open_of(id_, one) for id_, one in b["open"].items()},
        tallies={variant: Tally(**t) for variant, t in b["tallies"].items()},
        document=document,
    )


def _open_body(one: OpenSignal) -> dict[str, Any]:
    return {
        "variant": one.variant,
        "direction": one.direction,
        "strength": one.strength,
        "confidence": one.confidence,
        "reference_price": one.reference_price,
        "trend": one.trend,
        "horizon": one.horizon,
        "closed_at": format_instant(one.closed_at),
        "closes_at": format_instant(one.closes_at),
        "expires_at": format_instant(one.expires_at),
    }


def _open_of(id_: str, b: Mapping[str, Any]) -> OpenSignal:
    return OpenSignal(
        **{
            **b,
            "signal_id": id_,
            "direction": Direction(b["direction"]),
            "closed_at": parse_instant(b["closed_at"]),
            "closes_at": parse_instant(b["closes_at"]),
            "expires_at": parse_instant(b["expires_at"]),
        }
    )


def record_document(record: Record) -> Document:
    """The document of a part of a record, to be created or replaced."""
    body = {
        "entry": record.entry,
        "variant": record.variant,
        "symbol": record.symbol,
        "interval": record.interval,
        "number": record.number,
        "lines": [_line(one) for one in record.lines],
    }
    if record.document:
        return record.document.with_body(body)
    id_ = record_id(record.entry, record.variant, record.symbol, record.interval, record.number)
    return Document(id=id_, partition=record.symbol, sort=place_of(id_), body=body)


def record_of(document: Document) -> Record:
    """The part of a record that a document keeps."""
    b = document.body
    return Record(
        entry=b["entry"],
        variant=b["variant"],
        symbol=b["symbol"],
        interval=Interval(b["interval"]),
        number=b["number"],
        lines=[_resolved(line) for line in b["lines"]],
        document=document,
    )


def _line(one: Resolved) -> list[Any]:
    """A line as a short list: a record is written again with each of its lines, and paid by its size."""
    o = one.outcome
    return [
        minute_of(one.closed_at),
        minute_of(one.closes_at),
        one.direction,
        one.strength,
        one.confidence,
        one.trend,
        o.state,
        *((o.forward_return, o.net_return, o.base_return, o.mfe, o.mae) if o.state is State.SCORED else ()),
    ]


def _resolved(line: Sequence[Any]) -> Resolved:
    closed, closes, direction, strength, confidence, trend, state, *numbers = line
    outcome = Outcome(state=State(state))
    if numbers:
        forward, net, base, mfe, mae = numbers
        outcome = Outcome(
            state=State.SCORED,
            is_hit=forward > 0,
            forward_return=forward,
            net_return=net,
            base_return=base,
            mfe=mfe,
            mae=mae,
        )
    return Resolved(
        closed_at=instant_of(closed),
        closes_at=instant_of(closes),
        direction=Direction(direction),
        strength=strength,
        confidence=confidence,
        trend=trend,
        outcome=outcome,
    )


def outcome_body(o: Outcome) -> dict[str, Any]:
    """An outcome as the signal's document shows it."""
    return {"state": o.state, "reason": o.reason, "is_hit": o.is_hit, **{name: getattr(o, name) for name in NUMBERS}}


def outcome_of_body(b: Mapping[str, Any]) -> Outcome:
    """The outcome that a signal's document shows."""
    return Outcome(**{**b, "state": State(b["state"])})
