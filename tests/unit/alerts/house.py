"""A house of alerts for tests: one storage, one topic, one clock, and channels that know what people saw."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, cast

from pydantic import SecretStr

from alerts.adapters.breakers import StoredBreakers
from alerts.adapters.documents import DeliveryDocuments
from alerts.courier import Courier
from alerts.logic.delivering import EDGES
from alerts.models import FINAL, PUBLIC, Delivery, Record, Severity, State
from alerts.ports import Address, Connection, Message
from alerts.service import AlertService
from alerts.subscriptions import Digest, Endpoint, Listener, Mute, Preferences, Subscription, endpoint_id
from shared.clock import MarketClock, MarketTime, StoppedClock
from shared.documents import Document, Operation
from shared.inbound import DeadLetters
from shared.market.service import Market
from tests.builders import WALL
from tests.standins import CLOSE, Storage, Topic

LEASE = timedelta(seconds=30)
BOTH = ("signalr", "discord")
MARKET = MarketTime(market=CLOSE, wall=WALL, speed=1)
"""The market of these tests: the signal's bar has just closed."""


class ScriptedChannel:
    """A channel that takes every message, after raising each of *trouble* once; it knows what people saw."""

    def __init__(self, name: str, *trouble: BaseException | None) -> None:
        self.name = name
        self.is_keyed = name in ("signalr", "email")
        self.can_edit = name != "email"
        self.needs_address = name != "signalr"
        self.trouble = list(trouble)
        self.asked: list[str] = []
        self.seen: list[str] = []
        self.messages: list[Message] = []
        self.edited: list[tuple[str | None, Message]] = []

    async def send(self, message: Message) -> str | None:
        await self._react(message)
        self.seen.append(message.alert.alert_id)
        self.messages.append(message)
        return f"m-{len(self.seen)}"

    async def edit(self, provider_id: str | None, message: Message) -> None:
        await self._react(message)
        self.edited.append((provider_id, message))

    async def _react(self, message: Message) -> None:
        self.asked.append(message.alert.alert_id)
        await asyncio.sleep(0)
        if self.trouble and (error := self.trouble.pop(0)):
            raise error


class HangingChannel(ScriptedChannel):
    """A channel that takes an alert and answers when it is let go."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.took = asyncio.Event()
        self.let_go = asyncio.Event()

    async def send(self, message: Message) -> str | None:
        self.asked.append(message.alert.alert_id)
        self.seen.append(message.alert.alert_id)
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


class OpenDirectory:
    """A directory in the open: rules that a test may change at any time, and what was told of endpoints."""

    def __init__(self, *listeners: Listener) -> None:
        self.by_name = {listener.subscriber: listener for listener in listeners}
        self.failures: list[tuple[str, str, bool]] = []
        self.successes: list[tuple[str, str]] = []
        self.disables = 1
        """After how many failures an endpoint is disabled; one that is gone is at once."""

    def change(self, subscriber: str, **changes: Any) -> None:
        self.by_name[subscriber] = replace(self.by_name[subscriber], **changes)

    def change_endpoint(self, subscriber: str, channel: str, **changes: Any) -> None:
        endpoints = dict(self.by_name[subscriber].endpoints)
        endpoints[channel] = replace(endpoints[channel], **changes)
        self.change(subscriber, endpoints=endpoints)

    async def listeners(self) -> Sequence[Listener]:
        return list(self.by_name.values())

    async def address(self, subscriber: str, channel: str) -> Address | None:
        listener = self.by_name.get(subscriber)
        endpoint = listener.endpoints.get(channel) if listener else None
        if endpoint is None or not endpoint.is_enabled:
            return None
        return Address(value=SecretStr(f"{subscriber}'s {channel}"), shown=endpoint.shown)

    async def failed(
        self,
        subscriber: str,
        channel: str,
        reason: str,
        now: datetime,
        *,
        is_gone: bool = False,
        seal: str = "",
    ) -> bool:
        self.failures.append((subscriber, channel, is_gone))
        before = self.by_name[subscriber].endpoints[channel]
        is_over = is_gone or before.failures + 1 >= self.disables
        self.change_endpoint(
            subscriber,
            channel,
            failures=before.failures + 1,
            first_failed_at=before.first_failed_at or now,
            is_enabled=before.is_enabled and not is_over,
            disabled_reason=reason if is_over else None,
        )
        return before.is_enabled and is_over

    async def worked(self, subscriber: str, channel: str, now: datetime) -> None:
        self.successes.append((subscriber, channel))
        self.change_endpoint(subscriber, channel, failures=0, first_failed_at=None)


def a_subscription(*channels: str, subscriber: str = PUBLIC, **changes: Any) -> Subscription:
    fields: dict[str, Any] = {"subscription_id": f"{subscriber}-{'-'.join(channels or BOTH)}", "digest": Digest.NONE}
    return Subscription(subscriber=subscriber, channels=channels or BOTH, **(fields | changes))


def a_listener(
    *subscriptions: Subscription, mutes: Sequence[Mute] = (), preferences: Preferences | None = None
) -> Listener:
    """Somebody with these subscriptions, and an address on each channel that needs one."""
    name = subscriptions[0].subscriber
    channels = {c for s in subscriptions for c in s.channels} | {"email", "discord"}
    return Listener(
        subscriber=name,
        subscriptions=subscriptions,
        preferences=preferences or Preferences(subscriber=name),
        mutes=mutes,
        endpoints={
            channel: Endpoint(
                endpoint_id=endpoint_id(name, channel), subscriber=name, channel=channel, shown=f"{name[:1]}***"
            )
            for channel in sorted(channels - {"signalr"})
        }
        if name != PUBLIC
        else {},
    )


def listeners_of(subscriptions: Sequence[Subscription]) -> list[Listener]:
    """Everybody who has one of these subscriptions."""
    by_name: dict[str, list[Subscription]] = {}
    for one in subscriptions:
        by_name.setdefault(one.subscriber, []).append(one)
    return [a_listener(*mine) for mine in by_name.values()]


class WatchedStorage(Storage):
    """Storage that holds every step of every delivery against the allowed edges."""

    def __init__(self, wall: StoppedClock) -> None:
        super().__init__(wall)
        self.wall = wall

    async def replace(self, container: str, document: Document) -> Document:
        await self._watch(container, document)
        return await super().replace(container, document)

    async def batch(self, container: str, operations: Sequence[Operation]) -> list[Document]:
        for operation in operations:
            if operation.kind == "replace":
                await self._watch(container, operation.document)
        return await super().batch(container, operations)

    async def _watch(self, container: str, document: Document) -> None:
        if "delivery_id" in document.body:
            before = await self.read(container, document.partition, document.id)
            if before.etag == document.etag:
                self._check(before, document)

    def _check(self, before: Document, after: Document) -> None:
        was, now = State(before.body["state"]), State(after.body["state"])
        if was is now and before.body.get("members") != after.body.get("members"):
            assert was is State.PENDING, "a digest that was closed took another member"
            return
        assert was not in FINAL, f"{was} is final, and became {now}"
        is_in_digest = before.body.get("bucket_id") and not before.body.get("members")
        assert now in EDGES[was] or is_in_digest, f"{was} became {now}"
        if (was, now) in ((State.CLAIMED, State.PENDING), (State.SENDING, State.UNKNOWN)):
            lost = after.body["token"] is None or after.body["reason"]
            assert lost, f"{was} was given up without a reason"
        if was is State.SENDING:
            assert before.due_at is not None
            is_taken_over = after.body["state"] == State.UNKNOWN and before.due_at <= self.wall.at
            assert is_taken_over or before.body["token"] == after.body["token"], "somebody else recorded an outcome"
        if now in (State.RETRY_AT, State.UNKNOWN, State.DEAD, State.EXPIRED, State.SUPPRESSED, State.DISABLED):
            assert after.body["reason"] or after.body.get("trail"), f"{now} without a reason"


class House:
    """One storage, one topic, one clock and two channels, and as many service objects over them as wanted."""

    def __init__(
        self,
        *channels: ScriptedChannel,
        subscriptions: Sequence[Subscription] | None = None,
        listeners: Sequence[Listener] | None = None,
        market: MarketTime = MARKET,
    ) -> None:
        self.wall = StoppedClock(WALL)
        self.market = MarketClock(self.wall, market)
        self.documents = WatchedStorage(self.wall)
        self.topic = Topic()
        self.dead_letters = DeadLetters(self.documents, self.wall)
        self.channels = {c.name: c for c in channels or (ScriptedChannel("signalr"), ScriptedChannel("discord"))}
        everybody = listeners or listeners_of(subscriptions or [a_subscription(*self.channels)])
        self.directory = OpenDirectory(*everybody)
        self.ledger = DeliveryDocuments(self.documents)

    def service(self, **changes: Any) -> AlertService:
        """One more instance of the app; *changes* are other parts of it."""
        documents = changes.pop("documents", self.documents)
        deliveries = DeliveryDocuments(documents)
        courier: dict[str, Any] = {
            "deliveries": deliveries,
            "directory": changes.pop("directory", self.directory),
            "channels": changes.pop("channels", self.channels),
            "breakers": changes.pop("breakers", None) or StoredBreakers(documents, self.wall),
            "wall": changes.pop("wall", self.wall),
            "market": self.market,
            "lease": changes.pop("lease", LEASE),
        }
        parts: dict[str, Any] = {
            "deliveries": deliveries,
            "directory": courier["directory"],
            "courier": Courier(**courier),
            "hub": NoHub(),
            "publisher": self.topic,
            "outbox": self.dead_letters,
            "market": cast("Market", None),
        }
        return AlertService(**(parts | changes))

    async def records(self, subscriber: str = PUBLIC) -> list[Record]:
        return await self.ledger.listed(subscriber, None, newest_first=False, limit=100)

    async def whole(self, subscriber: str = PUBLIC) -> Record:
        """The one alert of a subscriber, with the deliveries of every version."""
        [record] = await self.records(subscriber)
        return await self.ledger.read(subscriber, record.alert.alert_id)

    async def delivery(self, channel: str, subscriber: str = PUBLIC) -> Delivery:
        [found] = [d for d in (await self.whole(subscriber)).deliveries if d.channel == channel and d.version == 1]
        return found

    async def delivery_of(self, record: Record, channel: str) -> Delivery:
        """The delivery of an alert's first version as it is stored now."""
        whole = await self.ledger.read(record.alert.subscriber, record.alert.alert_id)
        return next(d for d in whole.deliveries if d.channel == channel and d.version == 1)

    async def states(self, subscriber: str = PUBLIC) -> dict[str, State]:
        [record] = await self.records(subscriber)
        return {d.channel: d.state for d in record.deliveries}

    async def reasons(self, subscriber: str = PUBLIC) -> dict[str, str | None]:
        [record] = await self.records(subscriber)
        return {d.channel: d.reason for d in record.deliveries}

    def seen(self) -> dict[str, int]:
        return {name: len(channel.seen) for name, channel in self.channels.items()}

    async def later(self, *steps: timedelta) -> None:
        """Let time pass, sweeping after each step."""
        for step in steps:
            self.wall.at += step
            await self.service().sweep()


INFO, WARNING, CRITICAL = Severity.INFO, Severity.WARNING, Severity.CRITICAL
