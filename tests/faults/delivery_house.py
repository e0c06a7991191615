"""
A house of deliveries in which everything may go wrong: processes that die or freeze at any await, storage that lies.

Channels know what people really saw, storage watches every move, and an inspector holds the ledger against both.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from typing import Any

from alerts.adapters.documents import DeliveryDocuments, _delivery
from alerts.logic.delivering import MOST_ATTEMPTS
from alerts.models import PUBLIC, Alert, Delivery, Severity, State, delivery_id, endpoint_alert_id
from alerts.ports import Message
from alerts.service import PRIVATE, AlertService
from alerts.subscriptions import ADDRESSED, Digest, Listener, Preferences, Subscription
from shared.clock import StoppedClock
from shared.documents import Document
from shared.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    RateLimitedError,
    RecipientGoneError,
    RefusedError,
    StaleError,
    TroopError,
    UnavailableError,
)
from shared.inbound import DeadLetters
from tests.standins import Around, Killed
from tests.unit.alerts.house import House, ScriptedChannel, WatchedStorage, a_listener, a_subscription

QUIET_FROM, QUIET_TO = time(22), time(6)
COOLDOWN, CAP, FRESHNESS = timedelta(hours=1), 3, timedelta(hours=6)
TURNS = 30
"""How often a frozen process is let run until each of its tasks stands."""


def a_street() -> list[Listener]:
    """
    Four subscribers with a rule of each kind.

    The built-in one; ada with a cooldown, a cap, quiet hours and a freshness; bob with a digest; cyd for whom
    everything is critical.
    """
    ada = a_subscription(
        "discord",
        "email",
        subscriber="ada",
        severity=Severity.WARNING,
        cooldown=COOLDOWN,
        cap_per_day=CAP,
        freshness=FRESHNESS,
    )
    return [
        a_listener(a_subscription("signalr", "discord")),
        a_listener(ada, preferences=Preferences(subscriber="ada", quiet_from=QUIET_FROM, quiet_to=QUIET_TO)),
        a_listener(a_subscription("email", subscriber="bob", digest=Digest.HOUR)),
        a_listener(a_subscription("email", "discord", "signalr", subscriber="cyd", severity=Severity.CRITICAL)),
    ]


class Wire:
    """
    Numbers every await of one process to any neighbour, and lets one of them go wrong.

    ``kill`` ends the process, ``lose`` one answer, ``freeze`` stops it with all its tasks until it is thawed; each
    before the call takes effect, or after. ``throttle`` (429) and ``stale`` (somebody else wrote) strike a few calls
    of storage in a row, before they take effect.
    """

    MODES = (
        "kill before",
        "kill after",
        "lose before",
        "lose after",
        "freeze before",
        "freeze after",
        "throttle",
        "stale",
    )

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0
        self.mode = ""
        self.times = 1
        self.is_dead = False
        self.is_frozen = asyncio.Event()
        self._thawed: asyncio.Event | None = None
        self.doubtful = 0
        """Faults after which somebody may not know what he did."""
        self.is_late = False

    def plan(self, at: int, mode: str, times: int = 1) -> None:
        """Let the *at*-th call from now on go wrong."""
        self.calls, self.at, self.mode, self.times = 0, at, mode, times

    def thaw(self) -> None:
        if self._thawed is not None:
            self._thawed.set()

    async def storage(self, name: str, call: Callable[[], Awaitable[Any]]) -> object:
        is_late = self.at <= self.calls + 1 < self.at + self.times
        if is_late and self.mode == "throttle":
            self.calls += 1
            raise RateLimitedError("storage is throttled", retry_after=timedelta(seconds=1))
        if is_late and self.mode == "stale" and name in ("replace", "batch"):
            self.calls += 1
            self.doubtful += 1
            raise StaleError("somebody else wrote first")
        return await self._step(call, UnavailableError("the answer was lost"))

    async def neighbour(self, _: str, call: Callable[[], Awaitable[Any]]) -> object:
        return await self._step(call, UnavailableError("the answer was lost"))

    async def channel(self, _: str, call: Callable[[], Awaitable[Any]]) -> object:
        return await self._step(call, OutcomeUnknownError("no answer"), is_channel=True)

    async def _step(self, call: Callable[[], Awaitable[Any]], lost: TroopError, *, is_channel: bool = False) -> object:
        stood = await self._alive()
        self.calls += 1
        mine = self.calls == self.at and " " in self.mode
        what, _, when = self.mode.partition(" ")
        if mine and when == "before":
            self._strike(what, UnavailableError("the call was lost"))
            stood = await self._alive()
        late = LATE.set(self.is_late or (stood and is_channel))
        try:
            result = await call()
        finally:
            LATE.reset(late)
        if mine and when == "after":
            self._strike(what, lost)
        await self._alive()
        return result

    def _strike(self, what: str, error: TroopError) -> None:
        self.doubtful += 1
        match what:
            case "kill":
                self.is_dead = True
                raise Killed
            case "lose":
                raise error
            case _:
                self._thawed = asyncio.Event()
                self.is_frozen.set()

    async def _alive(self) -> bool:
        """Go on unless the process is dead; whether it stood still here."""
        stood = self._thawed is not None and not self._thawed.is_set()
        if self._thawed is not None:
            await self._thawed.wait()
        if self.is_dead:
            raise Killed
        return stood


LATE: ContextVar[bool] = ContextVar("LATE", default=False)
"""
Whether nobody can know that this call comes too late: it stood still between the last look at its lease and the first
byte, or the clock was set back while it stood, so that its lease seems to hold. Only a provider's key helps there.
"""
BEGAN: ContextVar[tuple[int, datetime] | None] = ContextVar("BEGAN", default=None)
"""Which of the house's rules were in force when this operation began, and the market instant; None: those of now."""


class Process:
    """One instance of the app, with what it keeps in memory; what it does is one operation at a time."""

    def __init__(self, house: "DeliveryHouse") -> None:
        self._house = house
        self.wire = Wire()
        self.service: AlertService = house.service(
            documents=Around(house.documents, self.wire.storage),
            channels={name: Around(channel, self.wire.channel) for name, channel in house.channels.items()},
            directory=Around(house.directory, self.wire.neighbour),
            publisher=Around(house.topic, self.wire.neighbour),
        )
        self._task: asyncio.Task[bool] | None = None

    async def run(self, work: Coroutine[Any, Any, object]) -> bool | None:
        """Do *work*: whether it was acknowledged; None: the process froze in it."""
        began = (len(self._house.history) - 1, self._house.market.now())

        async def whole() -> bool:
            BEGAN.set(began)
            try:
                await work
            except (Killed, TroopError):
                return False
            return True

        self._task = asyncio.create_task(whole())
        frozen = asyncio.create_task(self.wire.is_frozen.wait())
        await asyncio.wait({self._task, frozen}, return_when=asyncio.FIRST_COMPLETED)
        frozen.cancel()
        if self._task.done():
            return self._task.result()
        for _ in range(TURNS):
            await asyncio.sleep(0)
        return None

    async def thaw(self) -> None:
        """Let a frozen process go on to the end of what it was doing."""
        self.wire.thaw()
        if self._task is not None:
            await self._task


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What somebody saw."""

    channel: str
    subscriber: str
    delivery_id: str
    alert_ids: tuple[str, ...]
    version: int
    is_edit: bool
    says_repeat: bool
    is_late: bool


class TruthChannel(ScriptedChannel):
    """A channel that knows what people saw; its *weather* is what becomes of the next requests."""

    WEATHER = (
        "fine",
        "wait 2",
        "wait 65",
        "wait 1337",
        "down",
        "cut before",
        "cut after",
        "refused",
        "gone",
        "bug before",
        "bug after",
        "misconfigured",
    )
    DOUBTFUL = frozenset({"cut before", "cut after", "bug before", "bug after"})

    def __init__(self, name: str, house: "DeliveryHouse") -> None:
        super().__init__(name)
        self.house = house
        self.weather: list[str] = []
        self.shown: list[Shown] = []
        self.requests: Counter[str] = Counter()
        self.doubtful = 0

    async def send(self, message: Message) -> str | None:
        await self._request(message, is_edit=False)
        return f"m-{message.delivery_id}"

    async def edit(self, provider_id: str | None, message: Message) -> None:
        if provider_id != f"m-{message.delivery_id}":
            self.house.violations.append(f"{self.name}: {provider_id} is corrected, which is not what was sent")
        await self._request(message, is_edit=True)

    async def _request(self, message: Message, *, is_edit: bool) -> None:
        await asyncio.sleep(0)
        await self.house.watch(self.name, message, is_edit=is_edit)
        self.requests[message.delivery_id] += 1
        weather = self.weather.pop(0) if self.weather else "fine"
        self.doubtful += weather in self.DOUBTFUL
        if weather in ("fine", "cut after", "bug after"):
            self._show(message, is_edit=is_edit)
        match weather.split():
            case ["wait", seconds]:
                wait = timedelta(seconds=int(seconds))
                self.house.strict.told_to_wait[message.delivery_id] = self.house.wall.now() + wait
                raise RateLimitedError("slow down", retry_after=wait)
            case ["down"]:
                raise UnavailableError("connection refused")
            case ["cut", _]:
                raise OutcomeUnknownError("the connection was cut")
            case ["refused"]:
                raise RefusedError("400: the embed is wrong")
            case ["gone"]:
                raise RecipientGoneError("404: there is no such webhook")
            case ["bug", _]:
                raise KeyError("a bug")
            case ["misconfigured"]:
                raise ConfigurationError("the key is refused")

    def _show(self, message: Message, *, is_edit: bool) -> None:
        digest = message.digest
        items = [message.item] if digest is None else digest
        shown = Shown(
            channel=self.name,
            subscriber=message.alert.subscriber,
            delivery_id=message.delivery_id,
            alert_ids=tuple(str(item["alert_id"]) for item in items),
            version=int(message.item["version"]),
            is_edit=is_edit,
            says_repeat=message.is_possible_repeat,
            is_late=LATE.get(),
        )
        self.shown.append(shown)


class StrictStorage(WatchedStorage):
    """Storage that notes every move that is not allowed, also where a process would swallow the error."""

    def __init__(self, wall: StoppedClock, violations: list[str]) -> None:
        super().__init__(wall)
        self.violations = violations
        self.told_to_wait: dict[str, datetime] = {}
        self.latest = wall.at
        """What the clock showed before it was set back: who looked then may write now."""

    def _check(self, before: Document, after: Document) -> None:
        try:
            super()._check(before, after)
            self._check_wait(before, after)
        except AssertionError as e:
            self.violations.append(str(e))
            raise

    def _check_wait(self, before: Document, after: Document) -> None:
        was, now = State(before.body["state"]), State(after.body["state"])
        if now is State.CLAIMED and before.due_at is not None:
            assert before.due_at <= max(self.latest, self.wall.at), f"{was} was claimed before its time"
        wait = self.told_to_wait.pop(after.id, None)
        if now is State.RETRY_AT and was is State.SENDING and wait is not None:
            assert after.due_at is not None
            assert after.due_at >= wait, "it is tried again before the service allowed it"


class DeliveryHouse(House):
    """A house whose storage, channels and processes are watched; ``violations`` is what they saw go wrong."""

    def __init__(self, *listeners: Listener) -> None:
        truth = {name: TruthChannel(name, self) for name in ("signalr", "discord", "email")}
        super().__init__(*truth.values(), listeners=listeners or a_street())
        self.truth = truth
        self.violations: list[str] = []
        self.documents = self.strict = StrictStorage(self.wall, self.violations)
        self.dead_letters = DeadLetters(self.strict, self.wall)
        self.ledger = DeliveryDocuments(self.strict)
        self.processes: list[Process] = []
        self.history: list[Mapping[str, Listener]] = []
        self.note_rules()

    def process(self) -> Process:
        """One more instance."""
        self.processes.append(Process(self))
        return self.processes[-1]

    def jump(self, by: timedelta) -> None:
        """Somebody sets the wall clock."""
        self.strict.latest = max(self.strict.latest, self.wall.at)
        self.wall.at += by
        for process in self.processes if by < timedelta() else ():
            process.wire.is_late = process.wire.is_late or process.wire.is_frozen.is_set()

    def note_rules(self) -> None:
        """The directory was changed."""
        self.history.append(dict(self.directory.by_name))

    @property
    def doubtful(self) -> int:
        """How many faults left somebody in doubt."""
        return sum(p.wire.doubtful for p in self.processes) + sum(c.doubtful for c in self.truth.values())

    @property
    def shown(self) -> list[Shown]:
        return [one for channel in self.truth.values() for one in channel.shown]

    async def watch(self, channel: str, message: Message, *, is_edit: bool) -> None:
        """A request arrives at a channel: is it one that may be made now?"""
        if LATE.get():
            return
        alert, subscriber = message.alert, message.alert.subscriber
        delivery = await self._sent_by(channel, message, is_edit=is_edit)
        if delivery.state is not State.SENDING:
            self.violations.append(f"{channel}: asked without a claim, it is {delivery.state}")
        elif delivery.due_at is None or delivery.due_at <= self.wall.now():
            self.violations.append(f"{channel}: asked with a claim that has run out")
        alerts = [alert]
        if message.digest is not None:
            ids = [str(item["alert_id"]) for item in message.digest]
            alerts = [(await self.ledger.read(subscriber, id_)).alert for id_ in ids]
        for one in alerts:
            if why := self._forbidden(one, channel):
                self.violations.append(f"{channel} of {subscriber} was asked although {why}")

    async def _sent_by(self, channel: str, message: Message, *, is_edit: bool) -> Delivery:
        if message.digest is not None:
            return await self.ledger.digest(message.alert.subscriber, message.delivery_id)
        record = await self.ledger.read(message.alert.subscriber, message.alert.alert_id)
        return next(d for d in record.deliveries if d.channel == channel and (d.version > 1) == is_edit)

    def _forbidden(self, alert: Alert, channel: str) -> str | None:
        """Why an alert must not go out; a process that stood still may know the rules of when it began."""
        first, began = BEGAN.get() or (-1, self.market.now())
        reasons = [
            forbidden(rules.get(alert.subscriber), alert, channel, at, allowance=timedelta(minutes=10))
            for rules in self.history[first:]
            for at in (began, self.market.now())
        ]
        return None if None in reasons else reasons[-1]


def forbidden(
    listener: Listener | None, alert: Alert, channel: str, at: datetime, *, allowance: timedelta
) -> str | None:
    """Why an alert must not go to a subscriber at a market instant, told from the rules alone; None: it may."""
    endpoint = listener.endpoints.get(channel) if listener else None
    is_addressed = channel in ADDRESSED and alert.subscriber != PUBLIC
    if is_addressed and (endpoint is None or not endpoint.is_enabled):
        return "there is no enabled endpoint"
    if not alert.subscription_ids:
        return None
    if listener is None:
        return "the subscriber is gone"
    asked = [s for s in listener.subscriptions if s.subscription_id in alert.subscription_ids and channel in s.channels]
    if not asked:
        return "nothing asks for it any more"
    if any(mute.symbols is None or alert.symbol in mute.symbols for mute in listener.mutes if at < mute.until):
        return "it is muted"
    return next((None for s in asked if _is_time(s, listener.preferences, alert, at, allowance)), "it is not the time")


def _is_time(asked: Subscription, wishes: Preferences, alert: Alert, at: datetime, allowance: timedelta) -> bool:
    is_critical = asked.severity is Severity.CRITICAL
    is_digest = not is_critical and asked.digest is not Digest.NONE
    if asked.freshness and not is_digest and at > alert.occurred_at + max(asked.freshness, allowance):
        return False
    is_quiet = wishes.quiet_from is not None and (at.time() >= QUIET_FROM or at.time() < QUIET_TO)
    return is_critical or not is_quiet


@dataclass(slots=True)
class Inspector:
    """Holds the ledger against what people saw; it remembers what it read to see whether something moved back."""

    house: DeliveryHouse
    final: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    async def ledger(self) -> tuple[list[Document], dict[str, Delivery]]:
        """Every document of the ledger, and what of them are deliveries."""
        found: list[Document] = []
        while page := await self.house.documents.feed(
            "deliveries", after=found[-1].sort if found else None, limit=1000
        ):
            found += page
        return found, {d.id: _delivery(d) for d in found if "delivery_id" in d.body}

    async def check(self) -> None:
        """What holds after every step."""
        house = self.house
        assert not house.violations, house.violations
        documents, deliveries = await self.ledger()
        self._check_ids(deliveries)
        self._check_final(deliveries)
        self._check_truth(deliveries)
        self._check_repeats(deliveries)
        self._check_order()
        self._check_windows(documents, deliveries)

    def _check_ids(self, deliveries: Mapping[str, Delivery]) -> None:
        """I1: one delivery a version, subscriber and channel; I15: no more attempts than the schedule of a day has."""
        singles = [d for d in deliveries.values() if not d.members]
        keys = Counter((d.subscriber, d.alert_id, d.version, d.channel) for d in singles)
        assert max(keys.values(), default=1) == 1, keys.most_common(1)
        assert all(d.delivery_id == delivery_id(d.alert_id, d.channel, d.version) for d in singles)
        assert all(d.attempts <= MOST_ATTEMPTS or d.first_failed_at is not None for d in deliveries.values())

    def _check_final(self, deliveries: Mapping[str, Delivery]) -> None:
        """I5: what is over stays as it is, and says why."""
        for id_, d in deliveries.items():
            assert d.document is not None
            before = self.final.get(id_)
            assert before is None or before == d.document.body, f"{d.state} was final"
            if not d.is_over:
                assert d.due_at is not None or d.bucket_id, "nobody will look at it again"
                continue
            assert d.due_at is None
            assert d.state is State.SENT or d.reason, f"{d.state} without a reason"
            assert d.state not in (State.SUPPRESSED, State.EXPIRED, State.DISABLED) or d.rule
            self.final[id_] = d.document.body

    def _check_truth(self, deliveries: Mapping[str, Delivery]) -> None:
        """SENT was seen, and what never went out was not: the ledger does not lie."""
        seen = {(one.channel, id_, one.is_edit) for one in self.house.shown for id_ in one.alert_ids}
        on_time = {
            (one.channel, id_, one.is_edit) for one in self.house.shown for id_ in one.alert_ids if not one.is_late
        }
        for d in deliveries.values():
            for alert_id in d.members or (d.alert_id,):
                key = (d.channel, alert_id, d.version > 1)
                if d.state is State.SENT and not d.members:
                    assert key in seen, f"{d.channel} of {d.subscriber} is SENT and nobody saw it"
                never = d.state in (State.SUPPRESSED, State.EXPIRED, State.DISABLED)
                if never and not d.members:
                    assert key not in on_time, f"{d.channel} of {d.subscriber} is {d.state} and was seen"

    def _check_repeats(self, deliveries: Mapping[str, Delivery]) -> None:
        """I2 and I3: a repeat has one key, or a doubt that was written between the two attempts and was injected."""
        repeats = 0
        by_alert: dict[tuple[str, str], set[str]] = {}
        for name, channel in self.house.truth.items():
            first = [one for one in channel.shown if not one.is_edit]
            for one in first:
                for id_ in one.alert_ids:
                    by_alert.setdefault((name, id_), set()).add(one.delivery_id)
            for id_, times in Counter(one.delivery_id for one in first).items():
                d, again = deliveries[id_], times - 1
                assert again <= d.doubts, f"{name}: seen {times} times with {d.doubts} doubts"
                if channel.is_keyed:
                    continue
                repeats += again
                assert not again or d.severity is Severity.CRITICAL, f"{name}: {d.severity} was repeated"
                said = [one.says_repeat for one in first if one.delivery_id == id_ and not one.is_late]
                assert all(said[1:]), f"{name}: a repeat does not say that it is one"
        assert all(len(ids) == 1 for ids in by_alert.values()), "an alert was told in two messages"
        assert repeats <= self.house.doubtful

    def _check_order(self) -> None:
        """I6: nobody sees an older version after a newer one."""
        newest: dict[tuple[str, str], int] = {}
        for one in self.house.shown:
            if one.is_late or len(one.alert_ids) > 1:
                continue
            key = (one.channel, one.alert_ids[0])
            assert one.version >= newest.get(key, 0), "an older version was shown after a newer one"
            newest[key] = one.version

    def _check_windows(self, documents: Iterable[Document], deliveries: Mapping[str, Delivery]) -> None:
        """I23: whatever came in which order, what was let through keeps cooldown and cap; the rest says by whom."""
        alerts = {d.id: d for d in documents if "channels" in d.body and d.partition == "ada" and "kind" not in d.body}
        by_alert: dict[str, list[Delivery]] = {}
        for delivery in deliveries.values():
            by_alert.setdefault(delivery.alert_id, []).append(delivery)
        went: list[tuple[str, datetime]] = []
        for id_, document in alerts.items():
            mine = by_alert[id_]
            if any(d.state in (State.SENT, State.UNKNOWN, State.SENDING, State.RETRY_AT) for d in mine):
                went.append((str(document.body["symbol"]), datetime.fromisoformat(document.body["occurred_at"])))
            for d in mine:
                if d.rule in ("cooldown", "cap"):
                    assert d.by in alerts, f"{d.rule} by nobody we know"
        for i, (symbol, at) in enumerate(went):
            near = [other for name, other in went[:i] if name == symbol and abs(other - at) < COOLDOWN]
            assert not near, f"two alerts of {symbol} within the cooldown"
        days = Counter(at.date() for _, at in went)
        assert max(days.values(), default=0) <= CAP, "more than the cap went out on one day"

    async def check_end(self, accepted: Mapping[str, Sequence[str]]) -> None:
        """What holds once faults have stopped: everything came to its end (I16, I17, I18, I20)."""
        await self.check()
        house = self.house
        documents, deliveries = await self.ledger()
        assert [d.id for d in documents if d.due_at is not None] == []
        assert [d.state for d in deliveries.values() if not d.is_over] == []
        alerts = {d.id: d for d in documents if "channels" in d.body}
        for id_, channels in accepted.items():
            assert id_ in alerts, "an accepted event has no alert"
            found = {d.channel for d in deliveries.values() if d.alert_id == id_}
            assert found >= set(channels), "a channel was forgotten"
        told = {id_ for id_, d in alerts.items() if d.body.get("kind") not in PRIVATE}
        assert set(house.topic.ids()) == told
        for d in deliveries.values():
            if d.state is State.UNKNOWN and house.channels[d.channel].is_keyed and not d.rule:
                assert "unexpected" in str(d.reason) or d.attempts == MOST_ATTEMPTS, d.reason
        for listener in house.directory.by_name.values():
            for endpoint in listener.endpoints.values():
                if endpoint.disabled_reason and endpoint.first_failed_at:
                    id_ = endpoint_alert_id(endpoint.endpoint_id, endpoint.first_failed_at)
                    assert id_ in alerts, "the owner of a disabled endpoint was not told"


async def finish(house: DeliveryHouse) -> None:
    """Let every fault stop and time pass, with a healthy process that sweeps, until nothing is owed."""
    for process in house.processes:
        await process.thaw()
    for channel in house.truth.values():
        channel.weather.clear()
    healthy = house.service()
    for _ in range(80):
        house.wall.at += timedelta(minutes=47)
        await healthy.sweep()
        if not await house.documents.due("deliveries", before=house.wall.at + timedelta(days=9), limit=1):
            return
