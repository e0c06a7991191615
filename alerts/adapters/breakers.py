"""The circuit breakers of channels over Documents: container system, one document a channel that had trouble."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from alerts.logic import breaking
from alerts.logic.breaking import Breaker
from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import ConflictError, NotFoundError, StaleError
from shared.telemetry import get_logger

log = get_logger(__name__)

CONTAINER = "system"
FRESH = timedelta(seconds=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    breaker: Breaker
    read_at: datetime
    document: Document | None


class StoredBreakers:
    """
    Shared by all instances, and free while all is well: nothing is read or written about a service that works.

    A process reads again what it knows to be in trouble, and ``look`` tells one that has just begun.
    """

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall
        self._known: dict[str, _Known] = {}

    async def look(self, channels: Collection[str]) -> None:
        for channel in channels:
            known = self._known.get(channel)
            if known is None or known.read_at <= self._wall.now() - FRESH:
                await self._read(channel)

    async def admits(self, channel: str) -> datetime | None:
        known = self._known.get(channel)
        if known is None or known.breaker.failures == 0:
            return None
        now = self._wall.now()
        if known.read_at <= now - FRESH or _is_over(known.breaker, now):
            known = await self._read(channel)
        until = known.breaker.paused_until
        if until is None:
            return None
        if until > now:
            return min(until, now + FRESH) if known.breaker.is_probed else until
        try:
            await self._write(known, breaking.probed(known.breaker, now))
        except StaleError:
            return (await self._read(channel)).breaker.paused_until or now + breaking.PROBE
        return None

    async def failed(self, channel: str, reason: str) -> None:
        known = await self._read(channel)
        after = breaking.failed(known.breaker, reason, self._wall.now())
        try:
            await self._write(known, after)
        except StaleError:
            await self._read(channel)  # others count too, and one failure more or less decides nothing
            return
        if after.paused_until is not None and known.breaker.paused_until is None:
            log.warning("channel.paused", channel=channel, reason=reason, until=format_instant(after.paused_until))

    async def worked(self, channel: str) -> None:
        known = self._known.get(channel)
        if known is None or known.breaker.failures == 0:
            return
        known = await self._read(channel)
        if known.breaker.failures == 0:
            return
        try:
            await self._write(known, Breaker(channel=channel))
        except StaleError:
            await self._read(channel)
            return
        if known.breaker.paused_until is not None:
            log.info("channel.resumed", channel=channel)

    async def _read(self, channel: str) -> _Known:
        id_ = f"breaker|{channel}"
        try:
            document = await self._documents.read(CONTAINER, id_, id_)
            breaker = _breaker(document.body)
        except NotFoundError:
            document, breaker = None, Breaker(channel=channel)
        known = self._known[channel] = _Known(breaker=breaker, read_at=self._wall.now(), document=document)
        return known

    async def _write(self, known: _Known, breaker: Breaker) -> None:
        now, id_ = self._wall.now(), f"breaker|{breaker.channel}"
        if known.document is not None:
            document = await self._documents.replace(CONTAINER, known.document.with_body(_body(breaker)))
        else:
            new = Document(id=id_, partition=id_, sort=sort_key(now, id_), body=_body(breaker))
            try:
                document = await self._documents.create(CONTAINER, new)
            except ConflictError as e:
                raise StaleError(str(e)) from None
        self._known[breaker.channel] = _Known(breaker=breaker, read_at=now, document=document)


def _is_over(breaker: Breaker, now: datetime) -> bool:
    return breaker.paused_until is not None and breaker.paused_until <= now


def _body(b: Breaker) -> dict[str, Any]:
    return {
        "channel": b.channel,
        "failures": b.failures,
        "pauses": b.pauses,
        "paused_until": format_instant(b.paused_until) if b.paused_until else None,
        "is_probed": b.is_probed,
        "reason": b.reason,
    }


def _breaker(body: Mapping[str, Any]) -> Breaker:
    until = body["paused_until"]
    return Breaker(**{**body, "paused_until": parse_instant(until) if until else None})
