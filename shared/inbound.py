"""
Raise to be redelivered, return to be done.

A Python Event Grid function answers 202 or 500 and nothing else, and the text of what it raises is put into the
500. So permanent trouble is buried here as a dead letter and acknowledged; what passes by itself is raised
again under a name that carries no detail.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from shared.clock import Clock, format_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import ConfigurationError, ConflictError, PermanentError, StaleError, TransientError
from shared.events import CloudEvent, fact_id
from shared.telemetry import get_logger, redact, span

log = get_logger(__name__)

CONTAINER = "deadletters"
LARGEST_PAYLOAD = 32_768


class RedeliverError(Exception):
    """Asks Event Grid to deliver again; the text names a kind of trouble and nothing else."""


class DeadLetters:
    """Events we will not try again by ourselves, kept with the reason, one document per function and event."""

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall

    async def bury(self, source: str, event_id: str, reason: str, event: dict[str, Any]) -> None:
        """Keep an event that *source* (a function's name) cannot use; burying it again counts another time."""
        now = self._wall.now()
        id_ = fact_id("dead letter", source, event_id)
        body = {
            "dead_letter_id": id_,
            "source": source,
            "event_id": event_id,
            "reason": redact(reason),
            "event": event,
            "times": 1,
            "recorded_at": format_instant(now),
        }
        try:
            await self._documents.create(
                CONTAINER, Document(id=id_, partition=source, sort=sort_key(now, id_), body=body)
            )
        except ConflictError:
            stored = await self._documents.read(CONTAINER, source, id_)
            again = {**stored.body, "times": stored.body["times"] + 1, "reason": body["reason"]}
            try:
                await self._documents.replace(CONTAINER, stored.with_body(again))
            except StaleError:
                return  # a twin counted at the same moment: the letter is kept, which is what matters

    async def newest(self, *, after: str | None, limit: int) -> list[Document]:
        """The dead letters of all functions, newest first."""
        return await self._documents.feed(CONTAINER, after=after, newest_first=True, limit=limit)


@asynccontextmanager
async def settle(event: CloudEvent, source: str, dead_letters: DeadLetters) -> AsyncIterator[None]:
    """
    Run the body of an Event Grid function named *source* inside one span that continues the event's trace.

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
                raise
            except ConfigurationError as e:
                log.error("event.blocked", event_id=event.id, source=source, reason=str(e))  # noqa: TRY400
                raise
            except Exception:
                log.exception("event.failed", event_id=event.id, source=source)
                raise
    # Renamed outside the span, which must see what it was: trouble that passes is no error there.
    except (TransientError, ConfigurationError) as e:
        raise RedeliverError(type(e).__name__) from None
    except Exception:  # noqa: BLE001 - logged above; its text must not get into the 500
        raise RedeliverError("unexpected trouble: the log has it") from None


@asynccontextmanager
async def _buried(event: CloudEvent, source: str, dead_letters: DeadLetters) -> AsyncIterator[None]:
    try:
        yield
    except PermanentError as e:
        log.warning("event.buried", event_id=event.id, source=source, reason=str(e))
        await dead_letters.bury(source, _storable(str(event.id)), f"{type(e).__name__}: {e}", _seen(event))


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


def _seen(event: CloudEvent) -> dict[str, Any]:
    try:
        data = event.get_json()
    except Exception:  # noqa: BLE001 - it is being buried because it is broken
        data = None
    text = redact(repr(data))
    if len(text) > LARGEST_PAYLOAD:
        data = {"shortened": text[:LARGEST_PAYLOAD]}
    elif text != repr(data):
        data = {"redacted": text}
    elif not _is_json(data):
        data = {"unreadable": text}
    time = event.time
    return {
        "type": _storable(str(event.type)),
        "subject": _storable(str(event.subject)) if event.subject is not None else None,
        "time": format_instant(time) if isinstance(time, datetime) and time.tzinfo else None,
        "data": data,
    }


def _is_json(data: object) -> bool:
    # What Python reads as JSON may hold NaN or half a surrogate pair, which storage refuses.
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _storable(text: str) -> str:
    return redact(text.encode(errors="replace").decode())
