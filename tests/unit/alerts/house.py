"""A house of alerts for tests: one storage, one topic, one clock, and channels that know what people saw."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from alerts.adapters.documents import DeliveryDocuments
from alerts.models import FINAL, Alert, Record, Severity, State, Subscription
from alerts.ports import Connection
from alerts.service import AlertService
from shared.clock import StoppedClock
from shared.documents import Document
from tests.builders import WALL
from tests.standins import Storage, Topic

LEASE = timedelta(seconds=30)
BOTH = ("signalr", "discord")


class ScriptedChannel:
    """A channel that takes every alert, after raising each of *trouble* once; it knows what people saw."""

    def __init__(self, name: str, *trouble: BaseException | None) -> None:
        self.name = name
        self.trouble = list(trouble)
        self.asked: list[str] = []
        self.seen: list[str] = []

    async def send(self, alert: Alert, item: Mapping[str, Any]) -> str | None:
        self.asked.append(alert.alert_id)
        await asyncio.sleep(0)
        if self.trouble and (error := self.trouble.pop(0)):
            raise error
        self.seen.append(alert.alert_id)
        return f"m-{len(self.seen)}"


class HangingChannel(ScriptedChannel):
    """A channel that takes an alert and answers when it is let go."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.took = asyncio.Event()
        self.let_go = asyncio.Event()

    async def send(self, alert: Alert, item: Mapping[str, Any]) -> str | None:
        self.asked.append(alert.alert_id)
        self.seen.append(alert.alert_id)
        self.took.set()
        await self.let_go.wait()
        return "late"


class NoHub:
    """Nobody negotiates in these tests."""

    def connection(self, user_id: str) -> Connection:
        raise AssertionError

    def user_of(self, token: str) -> str | None:
        raise AssertionError

    async def join(self, user_id: str, group: str) -> None:
        raise AssertionError


def a_subscription(*channels: str, subscriber: str = "public", severity: Severity = Severity.INFO) -> Subscription:
    return Subscription(
        subscriber=subscriber,
        channels=channels or BOTH,
        symbols=None,
        entries=None,
        min_strength=0.0,
        severity=severity,
    )


EDGES = {
    State.PENDING: {State.SENDING},
    State.RETRY_AT: {State.SENDING},
    State.SENDING: {State.SENDING, State.RETRY_AT, State.SENT, State.UNKNOWN, State.DEAD},
}


class WatchedStorage(Storage):
    """Storage that holds every step of every delivery against the allowed edges."""

    def __init__(self, wall: StoppedClock) -> None:
        super().__init__(wall)
        self.wall = wall

    async def replace(self, container: str, document: Document) -> Document:
        if "delivery_id" in document.body:
            before = await self.read(container, document.partition, document.id)
            if before.etag == document.etag:
                self._check(before, document)
        return await super().replace(container, document)

    def _check(self, before: Document, after: Document) -> None:
        was, now = State(before.body["state"]), State(after.body["state"])
        assert was not in FINAL, f"{was} is final, and became {now}"
        assert now in EDGES[was], f"{was} became {now}"
        if (was, now) == (State.SENDING, State.SENDING):
            assert before.due_at is not None
            assert before.due_at <= self.wall.at, "a claim was taken over while its lease ran"
            assert after.body["channel"] == "signalr" or after.body["severity"] == "critical"
        if now in (State.RETRY_AT, State.UNKNOWN, State.DEAD):
            assert after.body["reason"], f"{now} without a reason"


class House:
    """One storage, one topic, one clock and two channels, and as many service objects over them as wanted."""

    def __init__(self, *channels: ScriptedChannel, subscriptions: list[Subscription] | None = None) -> None:
        self.wall = StoppedClock(WALL)
        self.documents = WatchedStorage(self.wall)
        self.topic = Topic()
        self.channels = {c.name: c for c in channels or (ScriptedChannel("signalr"), ScriptedChannel("discord"))}
        self.subscriptions = subscriptions or [a_subscription(*self.channels)]
        self.ledger = DeliveryDocuments(self.documents)

    def service(self, **changes: Any) -> AlertService:
        parts: dict[str, Any] = {
            "subscriptions": self.subscriptions,
            "deliveries": DeliveryDocuments(changes.pop("documents", self.documents)),
            "channels": self.channels,
            "hub": NoHub(),
            "publisher": self.topic,
            "wall": self.wall,
            "lease": LEASE,
        }
        return AlertService(**(parts | changes))

    async def records(self, subscriber: str = "public") -> list[Record]:
        return await self.ledger.listed(subscriber, None, newest_first=False, limit=100)

    async def states(self) -> dict[str, State]:
        [record] = await self.records()
        return {d.channel: d.state for d in record.deliveries}

    async def reasons(self) -> dict[str, str | None]:
        [record] = await self.records()
        return {d.channel: d.reason for d in record.deliveries}

    def seen(self) -> dict[str, int]:
        return {name: len(channel.seen) for name, channel in self.channels.items()}
