"""
Deliveries over Documents: container deliveries, partition subscriber.

An alert and its deliveries sort together: ``<recorded_at>|<alert>`` and ``<recorded_at>|<alert>/<channel>``. Beside
them lie the subscriber's digests and, before everything else, one document of his windows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from alerts.logic.delivering import POSSIBLE_REPEAT, is_allowed, is_member
from alerts.logic.policy import windows_body, windows_of
from alerts.models import (
    Alert,
    Attempt,
    Decision,
    Delivery,
    Record,
    Severity,
    State,
    delivery_id,
    digest_id,
    windows_id,
)
from alerts.ports import Due, StoredWindows
from alerts.subscriptions import Windows
from shared.clock import format_instant, parse_instant
from shared.documents import Document, Documents, Operation, sort_key
from shared.errors import ConflictError, NotFoundError, StaleError

CONTAINER = "deliveries"
GRACE = timedelta(seconds=10)
"""How long the handler that opened an alert has for it before the sweep takes over."""
MOST_MEMBERS = 90
"""Alerts in one digest: it and all of them are written in one batch."""


class DeliveryDocuments:
    """
    One document an alert and one a delivery, written in one batch.

    They expire *retention* after they were recorded, all at once: the public subscriber's partition, which every
    alert goes to, would otherwise grow until it is full (docs/operations.md).
    """

    def __init__(self, documents: Documents, retention: timedelta = timedelta(days=730)) -> None:
        self._documents = documents
        self._retention = retention

    async def open(self, alert: Alert, deliveries: Sequence[Delivery], windows: StoredWindows | None = None) -> Record:
        sort = sort_key(alert.recorded_at, alert.alert_id)
        due_at, expires_at = alert.recorded_at + GRACE, alert.recorded_at + self._retention
        body = {**_alert_body(alert), "channels": [d.channel for d in deliveries]}
        fresh = [
            Document(id=alert.alert_id, partition=alert.subscriber, sort=sort, body=body, due_at=due_at),
            *(_document(d, f"{sort}/{d.channel}") for d in deliveries),
        ]
        operations = [Operation(kind="create", document=replace(d, expires_at=expires_at)) for d in fresh]
        if windows is not None:
            operations.append(_written(alert.subscriber, windows))
        try:
            operations += [await self._joined(alert, d) for d in deliveries if d.bucket_id and d.state is State.PENDING]
            stored = await self._documents.batch(CONTAINER, operations)
        except ConflictError:
            return await self._found(alert)
        opened = [_delivery(d) for d in stored[1 : len(fresh)]]
        return Record(alert=alert, deliveries=opened, document=stored[0])

    async def read(self, subscriber: str, alert_id: str) -> Record:
        try:
            document = await self._documents.read(CONTAINER, subscriber, alert_id)
        except NotFoundError:
            raise NotFoundError(f"there is no alert {alert_id}") from None
        if "channels" not in document.body:
            raise NotFoundError(f"there is no alert {alert_id}")
        names = [delivery_id(alert_id, channel) for channel in document.body["channels"]]
        names += [delivery_id(alert_id, channel, version) for channel, version in document.body.get("corrected", ())]
        deliveries = [_delivery(await self._documents.read(CONTAINER, subscriber, name)) for name in names]
        return Record(alert=_alert(document), deliveries=deliveries, document=document)

    async def move(self, delivery: Delivery) -> Delivery:
        document = _moved(delivery)
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

    async def amend(self, record: Record, alert: Alert, corrections: Sequence[Delivery] = ()) -> Record:
        old = record.document
        corrected = [*old.body.get("corrected", ()), *([d.channel, d.version] for d in corrections)]
        body = {**_alert_body(alert), "channels": old.body["channels"]} | (
            {"corrected": corrected} if corrected else {}
        )
        fresh = [_document(d, f"{old.sort}/{d.channel}/{d.version}") for d in corrections]
        stored = await self._documents.batch(
            CONTAINER,
            [
                Operation(kind="replace", document=old.with_body(body, due_at=old.due_at)),
                *(Operation(kind="create", document=replace(d, expires_at=old.expires_at)) for d in fresh),
            ],
        )
        deliveries = [*record.deliveries, *map(_delivery, stored[1:])]
        return Record(alert=alert, deliveries=deliveries, document=stored[0])

    async def due(self, before: datetime, limit: int) -> Sequence[Due]:
        found = await self._documents.due(CONTAINER, before=before, limit=limit)
        every = (Due(d.partition, d.body["alert_id"], is_digest=bool(d.body.get("members"))) for d in found)
        return list(dict.fromkeys(every))

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
                elif "channels" in document.body:
                    alerts.append(document)
            if len(found) < size:
                break
            after = found[-1].sort
        return [await self._record(document, deliveries) for document in alerts[:limit]]

    async def windows(self, subscriber: str) -> StoredWindows:
        try:
            document = await self._documents.read(CONTAINER, subscriber, windows_id(subscriber))
        except NotFoundError:
            return StoredWindows(windows=Windows())
        return StoredWindows(windows=windows_of(document.body["windows"]), document=document)

    async def digest(self, subscriber: str, digest_id: str) -> Delivery:
        return _delivery(await self._documents.read(CONTAINER, subscriber, digest_id))

    async def settle(self, digest: Delivery, members: Sequence[Delivery]) -> Delivery:
        operations = [Operation(kind="replace", document=_moved(d)) for d in (digest, *members)]
        stored = await self._documents.batch(CONTAINER, operations)
        return replace(digest, document=stored[0])

    async def _joined(self, alert: Alert, delivery: Delivery) -> Operation:
        """The digest with one more member; the next part of it where the last was begun to be sent or is full."""
        assert delivery.bucket_id is not None  # noqa: S101
        for part in range(1, 1000):
            id_ = digest_id(alert.subscriber, delivery.channel, delivery.bucket_id, part)
            try:
                stored = await self._documents.read(CONTAINER, alert.subscriber, id_)
            except NotFoundError:
                return Operation(kind="create", document=self._begun(alert, delivery, id_))
            digest = _delivery(stored)
            if alert.alert_id in digest.members:
                break
            if digest.state is State.PENDING and len(digest.members) < MOST_MEMBERS:
                body = _delivery_body(replace(digest, members=(*digest.members, alert.alert_id)))
                return Operation(kind="replace", document=stored.with_body(body, due_at=stored.due_at))
        raise ConflictError(f"{alert.alert_id} is a member of a digest already")

    def _begun(self, alert: Alert, delivery: Delivery, id_: str) -> Document:
        digest = replace(
            delivery,
            delivery_id=id_,
            alert_id=id_,
            members=(alert.alert_id,),
        )
        document = _document(digest, sort_key(alert.recorded_at, id_))
        return replace(document, expires_at=alert.recorded_at + self._retention)

    async def _found(self, alert: Alert) -> Record:
        try:
            return await self.read(alert.subscriber, alert.alert_id)
        except NotFoundError:
            raise StaleError("another alert of this subscriber was opened at the same moment") from None

    async def _record(self, document: Document, known: Mapping[str, Sequence[Delivery]]) -> Record:
        """An alert whose deliveries lie beyond the end of what was read is read again, whole."""
        found = {d.channel: d for d in known.get(document.id, ()) if d.version == 1}
        channels: Sequence[str] = document.body["channels"]
        if len(found) < len(channels):
            whole = await self.read(document.partition, document.id)
            return replace(whole, deliveries=whole.deliveries[: len(channels)])
        return Record(alert=_alert(document), deliveries=[found[c] for c in channels], document=document)


def _document(delivery: Delivery, sort: str) -> Document:
    return Document(
        id=delivery.delivery_id,
        partition=delivery.subscriber,
        sort=sort,
        body=_delivery_body(delivery),
        due_at=None if is_member(delivery) else delivery.due_at,
    )


def _moved(delivery: Delivery) -> Document:
    assert delivery.document is not None, "a delivery is read before it moves"  # noqa: S101
    before = _delivery(delivery.document)
    if not is_allowed(before, delivery):
        raise ValueError(f"a delivery cannot go from {before.state} to {delivery.state}")
    return delivery.document.with_body(_delivery_body(delivery), due_at=delivery.due_at)


def _written(subscriber: str, windows: StoredWindows) -> Operation:
    body = {"windows": windows_body(windows.windows)}
    if windows.document is not None:
        return Operation(kind="replace", document=windows.document.with_body(body))
    id_ = windows_id(subscriber)
    first = sort_key(datetime.min.replace(tzinfo=UTC), id_)
    return Operation(kind="create", document=Document(id=id_, partition=subscriber, sort=first, body=body))


# --- bodies: what has its usual value is left out, which older documents did too


def _alert_body(a: Alert) -> dict[str, Any]:
    body = {
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
    more = {
        "kind": a.kind if a.kind != "signal" else None,
        "version": a.version if a.version > 1 else None,
        "subscription_ids": list(a.subscription_ids),
        "trail": list(map(_decision_body, a.trail)),
        "resolved_at": _text(a.resolved_at),
        "acknowledged_by": a.acknowledged_by,
        "acknowledged_at": _text(a.acknowledged_at),
    }
    return body | _given(more) | ({} if a.confidence is None else {"confidence": a.confidence})


def _alert(document: Document) -> Alert:
    b = {name: value for name, value in document.body.items() if name not in ("channels", "corrected")}
    instants = ("occurred_at", "recorded_at", "resolved_at", "acknowledged_at")
    read = {name: parse_instant(b[name]) for name in instants if b.get(name)}
    return Alert(
        **{
            **b,
            **read,
            "severity": Severity(b["severity"]),
            "subscription_ids": tuple(b.get("subscription_ids", ())),
            "trail": tuple(map(_decision, b.get("trail", ()))),
        }
    )


def _delivery_body(d: Delivery) -> dict[str, Any]:
    body = {
        "delivery_id": d.delivery_id,
        "alert_id": d.alert_id,
        "subscriber": d.subscriber,
        "channel": d.channel,
        "severity": d.severity,
        "state": d.state,
        "reason": d.reason,
        "attempts": d.attempts,
        "token": d.token,
        "sent_at": _text(d.sent_at),
        "provider_id": d.provider_id,
    }
    more = {
        "version": d.version if d.version > 1 else None,
        "rule": d.rule,
        "by": d.by,
        "attempts_log": list(map(_attempt_body, d.attempts_log)),
        "trail": list(map(_decision_body, d.trail)),
        "doubts": d.doubts,
        "first_failed_at": _text(d.first_failed_at),
        "deadline": _text(d.deadline),
        "bucket_id": d.bucket_id,
        "members": list(d.members),
    }
    return body | _given(more)


def _delivery(document: Document) -> Delivery:
    b = document.body
    # Before doubts were counted a reason told of them.
    is_doubtful = (b["reason"] or "").startswith(POSSIBLE_REPEAT)
    return Delivery(
        **{
            **b,
            "severity": Severity(b["severity"]),
            "state": State(b["state"]),
            "sent_at": _instant(b["sent_at"]),
            "first_failed_at": _instant(b.get("first_failed_at")),
            "deadline": _instant(b.get("deadline")),
            "attempts_log": tuple(map(_attempt, b.get("attempts_log", ()))),
            "trail": tuple(map(_decision, b.get("trail", ()))),
            "doubts": b.get("doubts", int(is_doubtful)),
            "members": tuple(b.get("members", ())),
        },
        due_at=document.due_at,
        document=document,
    )


def _attempt_body(a: Attempt) -> dict[str, Any]:
    body = {"number": a.number, "started_at": format_instant(a.started_at), "outcome": a.outcome}
    return body | _given({"ended_at": _text(a.ended_at), "reason": a.reason, "provider_id": a.provider_id})


def _attempt(body: Mapping[str, Any]) -> Attempt:
    ended_at = _instant(body.get("ended_at"))
    return Attempt(**{**body, "started_at": parse_instant(body["started_at"]), "ended_at": ended_at})


def _decision_body(d: Decision) -> dict[str, Any]:
    return {"at": format_instant(d.at), "rule": d.rule, "outcome": d.outcome, "reason": d.reason}


def _decision(body: Mapping[str, Any]) -> Decision:
    return Decision(**{**body, "at": parse_instant(body["at"])})


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _text(instant: datetime | None) -> str | None:
    return format_instant(instant) if instant else None


def _instant(text: str | None) -> datetime | None:
    return parse_instant(text) if text else None
