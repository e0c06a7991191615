"""
Raise to be redelivered, return to be done.

A Python Event Grid function answers 202 or 500 and nothing else, and the text of what it raises is put into the
500. So permanent trouble is buried here as a dead letter and acknowledged; what passes by itself is raised
again under a name that carries no detail. What operators do with dead letters is in shared/replays.py.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from shared.clock import Clock, format_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    PermanentError,
    StaleError,
    TransientError,
)
from shared.events import CloudEvent, Event, fact_id
from shared.telemetry import get_logger, redact, span

log = get_logger(__name__)

CONTAINER = "deadletters"
LARGEST_PAYLOAD = 32_768
REMEMBERED = 4096
"""Events a process remembers having done, to notice another payload under the same id."""
HISTORY = 20
"""Entries a letter keeps of what was done with it, the newest."""

type Handler = Callable[[Any], Awaitable[None]]


class RedeliverError(Exception):
    """Asks Event Grid to deliver again; the text names a kind of trouble and nothing else."""


@dataclass(slots=True, kw_only=True)
class Replay:
    """What came of a function that ran once more: ``trouble`` is what it would have raised or buried."""

    trouble: Exception | None = None


_replay: ContextVar[Replay | None] = ContextVar("replay", default=None)


@contextmanager
def replaying() -> Iterator[Replay]:
    """Let ``settle`` report its trouble instead of burying it: the event lies in a letter already."""
    one = Replay()
    token = _replay.set(one)
    try:
        yield one
    finally:
        _replay.reset(token)


class DeadLetters:
    """
    Events we will not try again by ourselves, kept with the reason, one document per function and event.

    The same id with another payload is a letter of its own. ``handlers`` are the functions that a letter can be
    replayed to, by name.
    """

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall
        self._done: OrderedDict[tuple[str, str], str] = OrderedDict()
        self.handlers: dict[str, Handler] = {}

    def replayable[H: Handler](self, handler: H) -> H:
        """Let letters of the function of this name be replayed to it; the decorator next to the function."""
        self.handlers[handler.__name__] = handler
        return handler

    async def bury(
        self,
        source: str,
        event_id: str,
        reason: str,
        event: Mapping[str, Any],
        digest: str | None = None,
        *,
        origin: str = "function",
        report: Mapping[str, Any] | None = None,
    ) -> Document:
        """
        Keep an event that *source* (a function's name) cannot use; burying it again counts another time.

        *origin* says who gave it up: the ``function`` itself, the ``topic`` that could not deliver it (*report* is
        what it says of that), or the ``outbox``, whose event the topic refused. A letter that was replayed is open
        again; one that was discarded stays so.
        """
        now = self._wall.now()
        body: dict[str, Any] = {
            "source": source,
            "event_id": event_id,
            "origin": origin,
            "reason": redact(reason),
            "event": dict(event),
            "digest": digest,
            "report": dict(report or {}),
            "state": "open",
            "history": [],
            "times": 1,
            "recorded_at": format_instant(now),
        }
        names = [letter_id(source, event_id)]
        if digest is not None:
            names.append(letter_id(source, event_id, digest))
        for id_ in names:
            new = Document(id=id_, partition=source, sort=sort_key(now, id_), body={"dead_letter_id": id_, **body})
            try:
                return await self._documents.create(CONTAINER, new)
            except ConflictError:
                stored = await self._documents.read(CONTAINER, source, id_)
            if digest in (None, stored.body.get("digest")) or stored.body.get("digest") is None or id_ == names[-1]:
                return await self._count(stored, body)
            log.error("event.id_reused", event_id=event_id, source=source)
        raise AssertionError(names)  # the loop ends in a return

    async def bury_unpublished(self, source: str, event: Event, reason: str) -> None:
        """Keep an event of *source* (a domain) that the topic refused for good; replaying it publishes it."""
        wire = event.to_wire()
        shown, digest = _seen(event.event_id, event.source, event.type, event.subject, event.recorded_at, wire["data"])
        log.error("event.unpublished", event_id=event.event_id, source=source, reason=reason)
        await self.bury(source, event.event_id, reason, shown, digest, origin="outbox")

    async def newest(self, *, after: str | None, limit: int) -> list[Document]:
        """The dead letters of all functions, newest first."""
        return await self._documents.feed(CONTAINER, after=after, newest_first=True, limit=limit)

    def is_other(self, source: str, event: CloudEvent) -> bool:
        """Whether this process has done another payload under the same id."""
        known = self._done.get((source, str(event.id)))
        return known is not None and known != _digest_of(event)

    def done(self, source: str, event: CloudEvent) -> None:
        """Remember what was done."""
        digest = _digest_of(event)
        if digest is not None:
            self._done[(source, str(event.id))] = digest
            if len(self._done) > REMEMBERED:
                self._done.popitem(last=False)

    async def _count(self, stored: Document, fresh: Mapping[str, Any]) -> Document:
        old = stored.body
        if fresh["report"] and fresh["report"] == old.get("report"):
            return stored  # told of the same burial again
        body = {**fresh, **old, "times": old["times"] + 1, "reason": fresh["reason"]}
        if fresh["report"]:
            body |= {"report": fresh["report"]}
        if body["state"] == "replayed":
            body |= {
                "state": "open",
                "history": noted(old, at=self._wall.now(), by="", action="buried again", outcome=fresh["reason"]),
            }
        expires_at = None if body["state"] == "open" else stored.expires_at
        try:
            return await self._documents.replace(CONTAINER, replace(stored, body=body, expires_at=expires_at))
        except StaleError:
            return stored  # a twin counted at the same moment: the letter is kept, which is what matters


def letter_id(source: str, event_id: str, digest: str | None = None) -> str:
    """One letter a function and event; with *digest* that of another payload under its id (docs/events.md)."""
    return fact_id("dead letter", source, event_id, *([digest] if digest else []))


def noted(body: Mapping[str, Any], *, at: datetime, by: str, action: str, outcome: str, reason: str = "") -> list[Any]:
    """The history of a letter with one more entry."""
    entry = {
        "at": format_instant(at),
        "by": by,
        "action": action,
        "reason": redact(reason),
        "outcome": redact(outcome),
    }
    return [*body.get("history", ()), entry][-HISTORY:]


@asynccontextmanager
async def settle(event: CloudEvent, source: str, dead_letters: DeadLetters) -> AsyncIterator[None]:
    """
    Run the body of an Event Grid function named *source* inside one span that continues the event's trace.

    What is guarded: an event whose id this process has done already must be the same event. With another payload it
    is kept as a letter beside its namesake and said aloud, for one of the two is not what it says. Its body has run
    by then, and did what its own facts ask for; other processes notice nothing. It is an alarm and no lock, and costs
    a digest instead of a read.

    Raises:
        RedeliverError: transient trouble, a wrong setting or a bug: Event Grid shall come again.

    """
    try:
        with span(source, parent=dict(event.extension_attrs), event_id=event.id, event_type=event.type):
            try:
                async with _buried(event, source, dead_letters):
                    yield
            except TransientError as e:
                log.info("event.postponed", event_id=event.id, source=source, reason=str(e))
                _report(e)
                raise
            except ConfigurationError as e:
                log.error("event.blocked", event_id=event.id, source=source, reason=str(e))  # noqa: TRY400
                _report(e)
                raise
            except Exception as e:
                log.exception("event.failed", event_id=event.id, source=source)
                _report(e)
                raise
    # Renamed outside the span, which must see what it was: trouble that passes is no error there.
    except (TransientError, ConfigurationError) as e:
        raise RedeliverError(type(e).__name__) from None
    except Exception:  # noqa: BLE001 - logged above; its text must not get into the 500
        raise RedeliverError("unexpected trouble: the log has it") from None


@asynccontextmanager
async def _buried(event: CloudEvent, source: str, dead_letters: DeadLetters) -> AsyncIterator[None]:
    is_replay = _replay.get() is not None
    try:
        yield
        if not is_replay and dead_letters.is_other(source, event):
            raise InvalidPayloadError("another payload came under this id before")
        dead_letters.done(source, event)
    except PermanentError as e:
        reason = f"{type(e).__name__}: {e}"
        if is_replay:
            log.warning("event.refused_again", event_id=event.id, source=source, reason=str(e))
            _report(e)
            return
        log.warning("event.buried", event_id=event.id, source=source, reason=str(e))
        shown, digest = _seen_event(event)
        await dead_letters.bury(source, _storable(str(event.id)), reason, shown, digest)


def _report(trouble: Exception) -> None:
    if (replay := _replay.get()) is not None:
        replay.trouble = trouble


@asynccontextmanager
async def on_time(name: str) -> AsyncIterator[None]:
    """
    Run the body of a timer named *name* inside one span; what it raises leaves without detail.

    Raises:
        RedeliverError: any trouble; the next tick does what this one could not.

    """
    with span(name):
        try:
            yield
        except TransientError as e:
            log.info("timer.postponed", function=name, reason=str(e))
            raise RedeliverError(type(e).__name__) from None
        except ConfigurationError as e:
            log.error("timer.blocked", function=name, reason=str(e))  # noqa: TRY400
            raise RedeliverError("ConfigurationError") from None
        except Exception:
            log.exception("timer.failed", function=name)
            raise RedeliverError("unexpected trouble: the log has it") from None


def _seen_event(event: CloudEvent) -> tuple[dict[str, Any], str | None]:
    source = getattr(event, "source", None)
    return _seen(event.id, source, event.type, event.subject, event.time, _data_of(event))


def _data_of(event: CloudEvent) -> Any:  # noqa: ANN401 - whatever JSON holds
    try:
        return event.get_json()
    except Exception:  # noqa: BLE001 - it is being buried because it is broken
        return None


def _seen(
    id_: object, source: object, type_: object, subject: object, time: object, data: object
) -> tuple[dict[str, Any], str | None]:
    """What of an event a letter shows, and the digest of all of it."""
    digest = digest_of(type_, data)
    text = redact(repr(data))
    is_whole = False
    if len(text) > LARGEST_PAYLOAD:
        data = {"shortened": text[:LARGEST_PAYLOAD]}
    elif text != repr(data):
        data = {"redacted": text}
    elif not _is_json(data):
        data = {"unreadable": text}
    else:
        is_whole = all(_storable(str(part)) == str(part) for part in (id_, source, type_, subject))
    return {
        "type": _storable(str(type_)),
        "source": _storable(str(source)) if source is not None else None,
        "subject": _storable(str(subject)) if subject is not None else None,
        "time": format_instant(time) if isinstance(time, datetime) and time.tzinfo else None,
        "data": data,
        "is_whole": is_whole,
    }, digest


def seen(wire: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """What of a CloudEvent as JSON a letter shows, and the digest of all of it."""
    try:
        time: datetime | None = datetime.fromisoformat(wire["time"])
    except (KeyError, TypeError, ValueError):
        time = None
    data = wire.get("data", wire.get("data_base64"))
    return _seen(wire.get("id"), wire.get("source"), wire.get("type"), wire.get("subject"), time, data)


def _digest_of(event: CloudEvent) -> str | None:
    return digest_of(event.type, _data_of(event))


def digest_of(type_: object, data: object) -> str | None:
    """What two events of one id must have in common; ``recorded_at`` is not, for it says when we told it."""
    facts = {name: data[name] for name in data if name != "recorded_at"} if isinstance(data, dict) else data
    try:
        text = json.dumps([str(type_), facts], sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _is_json(data: object) -> bool:
    # What Python reads as JSON may hold NaN or half a surrogate pair, which storage refuses.
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _storable(text: str) -> str:
    return redact(text.encode(errors="replace").decode())
