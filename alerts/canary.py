"""
The canary: a synthetic alert every five minutes, through the whole path and back, so that silence is noticed.

    timer -> event on the topic -> function -> ledger -> claim, send, record -> the private channel ``canary``

It belongs to the subscriber ``_canary``, which nobody can be: it is in no list, no digest and no count of anybody's.
Its id comes from the period, so however many instances send it, one arrives. What pages is its absence, as seen from
outside: the log line ``canary.arrived`` missing for two periods in Application Insights, or whoever waits for the call
of CANARY_URL. An app that is down cannot say that it is; one that runs says ``canary.late`` itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import azure.functions as func

from alerts.courier import Courier
from alerts.events import CanarySent
from alerts.models import Alert, Delivery, Severity, delivery_id
from alerts.ports import Deliveries, Message
from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    RefusedError,
    StaleError,
    UnavailableError,
)
from shared.events import EventPublisher, fact_id
from shared.http_client import HttpClient
from shared.inbound import DeadLetters, on_time, settle
from shared.telemetry import get_logger

log = get_logger(__name__)

PERIOD = timedelta(minutes=5)
LATE = 2 * PERIOD
"""How long a canary may be missed before it is late."""
KEEP = timedelta(days=2)
"""How long its alerts stay in the ledger; wire its ``deliveries`` with it."""
SUBSCRIBER = "_canary"
CHANNEL = "canary"
CONTAINER = "system"
TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """
    What is known of it.

    ``missed_since`` is when the first was let out of which, or of a later one, nothing was heard; None: all came back.
    """

    last_sent_at: datetime | None = None
    last_arrived_at: datetime | None = None
    latency: timedelta | None = None
    arrived_sent_at: datetime | None = None
    missed_since: datetime | None = None

    def is_late(self, now: datetime) -> bool:
        return self.missed_since is not None and now - self.missed_since > LATE

    def wanted(self, now: datetime) -> "Pulse":
        """One is about to be let out."""
        return self if self.missed_since is not None else replace(self, missed_since=now)

    def sent(self, at: datetime) -> "Pulse":
        """One is out, and may have arrived by now."""
        return replace(self, last_sent_at=max(at, self.last_sent_at or at))

    def arrived(self, sent_at: datetime, now: datetime) -> "Pulse":
        """One that was let out at *sent_at* is back; an older one than the last says nothing new."""
        if self.arrived_sent_at is not None and sent_at <= self.arrived_sent_at:
            return self
        since = self.missed_since
        if since is not None:
            is_newest = self.last_sent_at is None or sent_at >= self.last_sent_at
            since = None if is_newest else max(since, sent_at + PERIOD)
        return replace(
            self,
            last_arrived_at=now,
            latency=max(now - sent_at, timedelta()),
            arrived_sent_at=sent_at,
            missed_since=since,
        )


class PulseDocument:
    """The one document of it: container system."""

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall

    async def read(self) -> Pulse:
        """What is known; nothing before the first."""
        try:
            return _pulse((await self._documents.read(CONTAINER, CHANNEL, CHANNEL)).body)
        except NotFoundError:
            return Pulse()

    async def change(self, change: Callable[[Pulse], Pulse]) -> None:
        """
        Write what has become of it.

        Raises:
            StaleError: too many write at once.

        """
        for _ in range(TRIES):
            try:
                stored = await self._documents.read(CONTAINER, CHANNEL, CHANNEL)
            except NotFoundError:
                sort = sort_key(self._wall.now(), CHANNEL)
                new = Document(id=CHANNEL, partition=CHANNEL, sort=sort, body=_body(change(Pulse())))
                try:
                    await self._documents.create(CONTAINER, new)
                except ConflictError:
                    continue
                return
            before = _pulse(stored.body)
            after = change(before)
            if after == before:
                return
            try:
                await self._documents.replace(CONTAINER, stored.with_body(_body(after)))
            except StaleError:
                continue
            return
        raise StaleError("the canary's record is being written by too many at once")


class CanaryChannel:
    """
    The channel that only the canary uses: its arrival is written down, after *url* was told if there is one.

    A service that waits to be called there, and calls people when it is not, pages even when all of Azure is away.
    """

    name = CHANNEL
    is_keyed = True
    can_edit = False
    needs_address = False

    def __init__(self, book: PulseDocument, wall: Clock, *, url: str = "", http: HttpClient | None = None) -> None:
        if url and urlsplit(url).scheme not in ("https", "http"):
            raise ConfigurationError("CANARY_URL is no address: write https://... or leave it empty")
        self._book = book
        self._wall = wall
        self._url = url
        self._http = http or HttpClient("the canary's sink")

    async def send(self, message: Message) -> str | None:
        if self._url:
            await self._ping()
        sent_at, now = message.alert.recorded_at, self._wall.now()
        await self._book.change(lambda pulse: pulse.arrived(sent_at, now))
        log.info("canary.arrived", latency_ms=round((now - sent_at).total_seconds() * 1000, 3))
        return None

    async def edit(self, provider_id: str | None, message: Message) -> None:
        raise RefusedError("a canary is never corrected")

    async def _ping(self) -> None:
        answer = await self._http.send("POST", self._url, params={}, headers={}, content=b"", url_is_secret=True)
        if answer.status in (400, 401, 403, 404, 410):
            raise ConfigurationError(f"the canary's sink answered {answer.status}: correct CANARY_URL")
        if answer.status >= 300:
            raise UnavailableError(f"the canary's sink answered {answer.status}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """Lets it out, hears of it, and looks whether it came back."""

    courier: Courier
    deliveries: Deliveries
    publisher: EventPublisher
    book: PulseDocument

    async def send(self) -> bool:
        """
        Let this period's canary out, unless it is out already; whether it was let out now.

        Killed in between, the next call of the period lets the same one out again.
        """
        now = self.courier.wall.now()
        pulse = await self.book.read()
        if pulse.is_late(now):
            log.error("canary.late", missed_since=pulse.missed_since, last_arrived_at=pulse.last_arrived_at)
        if pulse.last_sent_at is not None and _period(pulse.last_sent_at) >= _period(now):
            return False
        await self.book.change(lambda pulse: pulse.wanted(now))
        event = CanarySent(occurred_at=self.courier.market.now(), recorded_at=now, canary_id=canary_id(now))
        await self.publisher.publish([event])
        await self.book.change(lambda pulse: pulse.sent(now))
        return True

    async def hear(self, event: CanarySent) -> None:
        """
        Open its alert and deliver it, as for a signal; again, and nothing more happens.

        Raises:
            InvalidPayloadError: it is none of ours: another id, or from the future.

        """
        if event.canary_id != canary_id(event.recorded_at) or event.recorded_at > self.courier.wall.now() + PERIOD:
            raise InvalidPayloadError(
                "this canary was not let out here: its id is not that of its time, or it is early"
            )
        alert = _alert(event)
        delivery = Delivery(
            delivery_id=delivery_id(alert.alert_id, CHANNEL),
            alert_id=alert.alert_id,
            subscriber=SUBSCRIBER,
            channel=CHANNEL,
            severity=alert.severity,
            due_at=self.courier.wall.now(),
        )
        record = await self.deliveries.open(alert, [delivery])
        for one in record.deliveries:
            if not one.is_over:
                await self.courier.deliver(record, one)
        if record.owes_event:
            await self.deliveries.told(record)  # it is nobody's alert, so nobody is told of it

    async def health(self) -> Mapping[str, Any]:
        """When it was last sent and seen, and whether it is late."""
        now, pulse = self.courier.wall.now(), await self.book.read()
        arrived = pulse.last_arrived_at
        return {
            "last_sent_at": pulse.last_sent_at,
            "last_arrived_at": arrived,
            "latency_ms": round(pulse.latency.total_seconds() * 1000, 3) if pulse.latency is not None else None,
            "age_s": round((now - arrived).total_seconds(), 3) if arrived else None,
            "is_late": pulse.is_late(now),
        }


def blueprint(canary: Canary, dead_letters: DeadLetters) -> func.Blueprint:
    bp = func.Blueprint()

    @bp.function_name("system_canary")
    @bp.timer_trigger(arg_name="timer", schedule="%CANARY_SCHEDULE%")
    async def system_canary(timer: func.TimerRequest) -> None:  # noqa: ARG001 - the trigger names it
        async with on_time("system_canary"):
            await canary.send()

    @bp.function_name("alerts_on_canary_sent")
    @bp.event_grid_trigger(arg_name="event")
    @dead_letters.replayable
    async def alerts_on_canary_sent(event: func.CloudEvent) -> None:
        async with settle(event, "alerts_on_canary_sent", dead_letters):
            await canary.hear(CanarySent.from_wire(event.type, event.get_json()))

    return bp


def canary_id(at: datetime) -> str:
    """One canary a period of five minutes (docs/events.md)."""
    return fact_id("canary", format_instant(_period(at)))


def canary_alert_id(canary: str) -> str:
    """One alert a canary (docs/events.md)."""
    return fact_id("alert", "canary", canary)


def _period(at: datetime) -> datetime:
    seconds = PERIOD.total_seconds()
    return datetime.fromtimestamp(at.timestamp() // seconds * seconds, UTC)


def _alert(event: CanarySent) -> Alert:
    return Alert(
        alert_id=canary_alert_id(event.canary_id),
        signal_id="",
        subscriber=SUBSCRIBER,
        symbol="",
        interval="",
        entry="",
        strategy="",
        direction="",
        strength=0.0,
        severity=Severity.INFO,
        reference_price=0.0,
        title="Canary",
        text="A synthetic alert: it shows that alerts arrive.",
        occurred_at=event.occurred_at,
        recorded_at=event.recorded_at,
        kind="canary",
    )


def _body(pulse: Pulse) -> dict[str, Any]:
    return {
        "last_sent_at": _text(pulse.last_sent_at),
        "last_arrived_at": _text(pulse.last_arrived_at),
        "latency_s": pulse.latency.total_seconds() if pulse.latency is not None else None,
        "arrived_sent_at": _text(pulse.arrived_sent_at),
        "missed_since": _text(pulse.missed_since),
    }


def _pulse(body: Mapping[str, Any]) -> Pulse:
    seconds = body["latency_s"]
    return Pulse(
        last_sent_at=_instant(body["last_sent_at"]),
        last_arrived_at=_instant(body["last_arrived_at"]),
        latency=timedelta(seconds=seconds) if seconds is not None else None,
        arrived_sent_at=_instant(body["arrived_sent_at"]),
        missed_since=_instant(body["missed_since"]),
    )


def _text(instant: datetime | None) -> str | None:
    return format_instant(instant) if instant else None


def _instant(text: str | None) -> datetime | None:
    return parse_instant(text) if text else None
