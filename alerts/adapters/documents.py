"""
Deliveries over Documents: container deliveries, partition subscriber.

An alert and its deliveries sort together: ``<recorded_at>|<alert>`` and ``<recorded_at>|<alert>/<channel>``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from alerts.models import Alert, Delivery, Record, Severity, State, delivery_id
from shared.clock import format_instant, parse_instant
from shared.documents import Document, Documents, Operation, sort_key
from shared.errors import ConflictError, NotFoundError, StaleError

CONTAINER = "deliveries"
GRACE = timedelta(seconds=10)
"""How long the handler that opened an alert has for it before the sweep takes over."""


class DeliveryDocuments:
    """
    One document an alert and one a delivery, written in one batch.

    They expire *retention* after they were recorded, all at once: the public subscriber's partition, which every
    alert goes to, would otherwise grow until it is full (docs/operations.md).
    """

    def __init__(self, documents: Documents, retention: timedelta = timedelta(days=730)) -> None:
        self._documents = documents
        self._retention = retention

    async def open(self, alert: Alert, channels: Sequence[str]) -> Record:
        due_at, expires_at = alert.recorded_at + GRACE, alert.recorded_at + self._retention
        sort = sort_key(alert.recorded_at, alert.alert_id)
        body = {**_alert_body(alert), "channels": list(channels)}
        documents = [
            Document(id=alert.alert_id, partition=alert.subscriber, sort=sort, body=body, due_at=due_at),
            *(self._fresh(alert, channel, f"{sort}/{channel}", due_at) for channel in channels),
        ]
        documents = [replace(document, expires_at=expires_at) for document in documents]
        try:
            stored = await self._documents.batch(
                CONTAINER, [Operation(kind="create", document=document) for document in documents]
            )
        except ConflictError:
            return await self.read(alert.subscriber, alert.alert_id)
        return Record(alert=alert, deliveries=[_delivery(d) for d in stored[1:]], document=stored[0])

    async def read(self, subscriber: str, alert_id: str) -> Record:
        try:
            document = await self._documents.read(CONTAINER, subscriber, alert_id)
        except NotFoundError:
            raise NotFoundError(f"there is no alert {alert_id}") from None
        deliveries = [
            _delivery(await self._documents.read(CONTAINER, subscriber, delivery_id(alert_id, channel)))
            for channel in document.body["channels"]
        ]
        return Record(alert=_alert(document), deliveries=deliveries, document=document)

    async def move(self, delivery: Delivery) -> Delivery:
        assert delivery.document is not None, "a delivery is read before it moves"  # noqa: S101
        document = delivery.document.with_body(_delivery_body(delivery), due_at=delivery.due_at)
        return replace(delivery, document=await self._documents.replace(CONTAINER, document))

    async def told(self, record: Record) -> None:
        try:
            await self._documents.replace(CONTAINER, record.document.with_body(record.document.body))
        except StaleError:
            return  # a twin told it too, and wrote so first

    async def postpone(self, record: Record, due_at: datetime) -> None:
        try:
            await self._documents.replace(CONTAINER, record.document.with_body(record.document.body, due_at=due_at))
        except StaleError:
            return  # a twin is at it

    async def due(self, before: datetime, limit: int) -> Sequence[tuple[str, str]]:
        found = await self._documents.due(CONTAINER, before=before, limit=limit)
        return list(dict.fromkeys((d.partition, d.body["alert_id"]) for d in found))

    async def listed(self, subscriber: str, after: str | None, *, newest_first: bool, limit: int) -> list[Record]:
        alerts: list[Document] = []
        deliveries: dict[str, list[Delivery]] = {}
        size = limit * 3
        while len(alerts) < limit:
            found = await self._documents.page(
                CONTAINER, subscriber, after=after, newest_first=newest_first, limit=size
            )
            for document in found:
                if "delivery_id" in document.body:
                    deliveries.setdefault(document.body["alert_id"], []).append(_delivery(document))
                else:
                    alerts.append(document)
            if len(found) < size:
                break
            after = found[-1].sort
        return [await self._record(document, deliveries) for document in alerts[:limit]]

    async def _record(self, document: Document, known: Mapping[str, Sequence[Delivery]]) -> Record:
        """An alert whose deliveries lie beyond the end of what was read is read again, whole."""
        found = {d.channel: d for d in known.get(document.id, ())}
        channels: Sequence[str] = document.body["channels"]
        if len(found) < len(channels):
            return await self.read(document.partition, document.id)
        return Record(alert=_alert(document), deliveries=[found[c] for c in channels], document=document)

    @staticmethod
    def _fresh(alert: Alert, channel: str, sort: str, due_at: datetime) -> Document:
        delivery = Delivery(
            delivery_id=delivery_id(alert.alert_id, channel),
            alert_id=alert.alert_id,
            subscriber=alert.subscriber,
            channel=channel,
            severity=alert.severity,
        )
        return Document(
            id=delivery.delivery_id,
            partition=alert.subscriber,
            sort=sort,
            body=_delivery_body(delivery),
            due_at=due_at,
        )


def _alert_body(a: Alert) -> dict[str, Any]:
    return {
        "alert_id": a.alert_id,
        "signal_id": a.signal_id,
        "subscriber": a.subscriber,
        "symbol": a.symbol,
        "interval": a.interval,
        "entry": a.entry,
        "strategy": a.strategy,
        "direction": a.direction,
        "strength": a.strength,
        "severity": a.severity,
        "reference_price": a.reference_price,
        "title": a.title,
        "text": a.text,
        "occurred_at": format_instant(a.occurred_at),
        "recorded_at": format_instant(a.recorded_at),
    }


def _alert(document: Document) -> Alert:
    b = {name: value for name, value in document.body.items() if name != "channels"}
    return Alert(
        **{
            **b,
            "severity": Severity(b["severity"]),
            "occurred_at": parse_instant(b["occurred_at"]),
            "recorded_at": parse_instant(b["recorded_at"]),
        }
    )


def _delivery_body(d: Delivery) -> dict[str, Any]:
    return {
        "delivery_id": d.delivery_id,
        "alert_id": d.alert_id,
        "subscriber": d.subscriber,
        "channel": d.channel,
        "severity": d.severity,
        "state": d.state,
        "reason": d.reason,
        "attempts": d.attempts,
        "token": d.token,
        "sent_at": format_instant(d.sent_at) if d.sent_at else None,
        "provider_id": d.provider_id,
    }


def _delivery(document: Document) -> Delivery:
    b = document.body
    return Delivery(
        **{
            **b,
            "severity": Severity(b["severity"]),
            "state": State(b["state"]),
            "sent_at": parse_instant(b["sent_at"]) if b["sent_at"] else None,
        },
        due_at=document.due_at,
        document=document,
    )
