"""What the alerts domain does: word what happened, deliver it, finish what was left, let clients listen."""

import asyncio
import re
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from alerts.courier import CLAIM, Courier
from alerts.events import AlertRaised
from alerts.logic import policy, wording
from alerts.logic.matching import Audience, bars_needed, heard_bars, heard_signal
from alerts.models import Alert, Decision, Delivery, Record, Severity, State, delivery_id
from alerts.ports import Connection, Deliveries, Directory, Due, Hub, Outbox, StoredWindows
from alerts.subscriptions import Crossing, Listener, Match, Subscription, Windows
from shared.errors import (
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    PermanentError,
    StaleError,
    TroopError,
    UnavailableError,
)
from shared.events import EventPublisher
from shared.market.events import BarsIngested
from shared.market.models import minute_of, symbol_of
from shared.market.service import Market
from shared.telemetry import get_logger
from signals.events import SignalRaised

log = get_logger(__name__)

HUB_GROUPS = 50
PRIVATE = frozenset({"system", "canary"})
"""Kinds of alerts that concern nobody but their subscriber: the house is not told of them."""
TELL_AGAIN = timedelta(seconds=15)
SWEEP_BUDGET = timedelta(seconds=8)
SEND_BUDGET = timedelta(seconds=5)
"""How long a handler sends what it opens; what it opens later is sent by the sweep."""
OPEN_BUDGET = timedelta(seconds=20)
"""How long a handler opens alerts before it lets the event come again."""
_ID = re.compile(r"[0-9a-f-]{36}")
AT_ONCE = 16
TRIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertService:
    """The alerts domain."""

    deliveries: Deliveries
    directory: Directory
    courier: Courier
    hub: Hub
    publisher: EventPublisher
    outbox: Outbox
    market: Market

    async def announce(self, signal: SignalRaised) -> None:
        """Word a signal for everyone who hears it, and deliver it on their channels."""
        listeners = await self.directory.listeners()
        found = heard_signal(signal, listeners)
        now = self.courier.wall.now()
        await self._announce(
            [_case(signal, each, found[each.subscriber], now) for each in listeners if each.subscriber in found]
        )

    async def bars(self, event: BarsIngested) -> None:
        """
        Ask every rule about bars of this series what it says of the new ones, and tell whom it concerns.

        All that are stored from the event's first bar on are looked at: whatever order the events come in, an alert
        is told before its end is.
        """
        listeners = await self.directory.listeners()
        audience = listeners if isinstance(listeners, Audience) else Audience(listeners)
        asked = audience.of_bars(event.symbol, event.interval)
        if not asked:
            return
        try:
            series = await self.market.series.get(event.symbol, event.interval)
        except NotFoundError:
            return  # nobody watches it any more
        after = max(event.first_closed_at - timedelta(minutes=1), series.live_from)
        columns = await self.market.bars.window(
            series.key,
            series.revision,
            since=after,
            lookback=max(bars_needed(subscription) for _, subscription in asked),
        )
        closes = dict(zip(columns.closed, columns.close, strict=True))
        cases: list[_Case] = []
        over: list[tuple[Subscription, Crossing]] = []
        for listener, subscription in asked:
            for crossing in heard_bars(subscription, columns, after=after):
                if crossing.is_resolve:
                    over.append((subscription, crossing))
                    continue
                close = closes[minute_of(crossing.closed_at)]
                cases.append(self._of_rule(listener, subscription, event, crossing, close))
        await self._announce(cases)
        await _all([self._over(subscription, event, crossing) for subscription, crossing in over])

    async def resolve(self, subscriber: str, alert_id: str, note: str) -> Record:
        """
        What an alert told is over: it says so from now on, and where it was shown it is corrected in its place.

        Resolving again changes nothing.

        Raises:
            NotFoundError: there is no such alert.

        """
        for _ in range(TRIES):
            record = await self.deliveries.read(subscriber, alert_id)
            if record.alert.resolved_at is not None:
                return record
            now = self.courier.wall.now()
            decision = Decision(at=self.courier.market.now(), rule="resolve", outcome="over", reason=note)
            alert = wording.resolved(record.alert, note, now=now)
            alert = replace(alert, trail=(*alert.trail, decision))
            corrections = [
                Delivery(
                    delivery_id=delivery_id(alert_id, d.channel, alert.version),
                    alert_id=alert_id,
                    subscriber=subscriber,
                    channel=d.channel,
                    severity=alert.severity,
                    version=alert.version,
                    due_at=now,
                )
                for d in record.deliveries
                if d.bucket_id is None and self._can_edit(d.channel)
            ]
            try:
                record = await self.deliveries.amend(record, alert, corrections)
            except (StaleError, ConflictError):
                continue
            await self._finish(record)
            return record
        raise UnavailableError("the alert is being changed by somebody else: try again")

    async def acknowledge(self, subscriber: str, alert_id: str, by: str) -> Record:
        """
        Somebody has seen it: who was first, and when, is kept.

        Raises:
            NotFoundError: there is no such alert.

        """
        for _ in range(TRIES):
            record = await self.deliveries.read(subscriber, alert_id)
            if record.alert.acknowledged_at is not None:
                return record
            seen = replace(record.alert, acknowledged_by=by, acknowledged_at=self.courier.wall.now())
            try:
                return await self.deliveries.amend(record, seen)
            except StaleError:
                continue
        raise UnavailableError("the alert is being changed by somebody else: try again")

    async def sweep(self) -> int:
        """
        Finish whatever events did not: due deliveries, digests that closed, events still owed; returns how many.

        What cannot be finished now stays due and holds up no other.
        """
        wall = self.courier.wall
        deadline = wall.now() + SWEEP_BUDGET
        found = await self.deliveries.due(wall.now(), 500)
        if not found:
            return 0
        await self.courier.breakers.look(self.courier.channels)
        done = 0
        queue = iter(found)

        async def work() -> None:
            nonlocal done
            for due in queue:
                if wall.now() >= deadline:
                    return
                done += await self._swept(due)

        await _all([work() for _ in range(AT_ONCE)])
        return done

    async def listed(self, subscriber: str, after: str | None, *, newest_first: bool, limit: int) -> list[Record]:
        """The alerts of a subscriber, in order of ``recorded_at``."""
        return await self.deliveries.listed(subscriber, after, newest_first=newest_first, limit=limit)

    async def find(self, subscribers: Sequence[str], alert_id: str) -> Record:
        """
        An alert of the first of *subscribers* that has it.

        Raises:
            NotFoundError: none of them has.

        """
        for subscriber in subscribers if _ID.fullmatch(alert_id) else ():
            try:
                return await self.deliveries.read(subscriber, alert_id)
            except NotFoundError:
                continue
        raise NotFoundError(f"there is no alert {alert_id}")

    async def negotiate(self, symbols: str, bearer: str | None, subscriber: str | None = None) -> Connection:
        """
        Give a caller a place at the hub, hearing *symbols* (comma-separated, or ``all``).

        *subscriber* is who has signed in, and hears their own alerts too. A guest that reconnects shows the hub
        token it had (the official clients do so by themselves) and stays the same guest; any other token is ignored.
        """
        names = [name.strip() for name in symbols.split(",") if name.strip()] or ["all"]
        if len(names) > HUB_GROUPS:
            raise InvalidPayloadError(f"symbols: at most {HUB_GROUPS}, or all")
        groups = [group_of(name if name == "all" else symbol_of(name)) for name in names]
        known = self.hub.user_of(bearer) if bearer else None
        user_id = subscriber or known or f"guest-{uuid4()}"
        await _all([self.hub.join(user_id, group) for group in groups])
        return self.hub.connection(user_id)

    # --- opening

    async def _announce(self, cases: "Sequence[_Case]") -> None:
        """
        Open and deliver every case, a few at a time.

        Raises:
            UnavailableError: there were too many for one handler; those that are left come with the event again.

        """
        begun = self.courier.wall.now()
        queue = iter(cases)

        async def work() -> None:
            for case in queue:
                gone = self.courier.wall.now() - begun
                if gone >= OPEN_BUDGET:
                    raise UnavailableError("there are more to tell than one handler can: the event must come again")
                await self._tell(case, at_once=gone < SEND_BUDGET)

        await _all([work() for _ in range(min(AT_ONCE, len(cases)))])

    async def _tell(self, case: "_Case", *, at_once: bool) -> None:
        """Judge, open, and deliver what was let through, if that is still for this handler."""
        token = uuid4().hex if at_once else None
        record = await self._opened(case, token)
        for delivery in record.deliveries:
            if delivery.state is State.DISABLED:
                await self.courier.tell_owner(delivery.subscriber, delivery.channel)
        if at_once:
            await self._finish(record, token)

    async def _opened(self, case: "_Case", token: str | None) -> Record:
        for _ in range(TRIES):
            stored = StoredWindows(windows=Windows())
            if case.counts:
                stored = await self.deliveries.windows(case.listener.subscriber)
            verdicts, windows = policy.judge_channels(
                case.matches,
                case.listener,
                stored.windows,
                alert_id=case.alert.alert_id,
                closed_at=case.alert.occurred_at,
                market_now=self.courier.market.now(),
                allowance=self.courier.allowance,
            )
            deliveries = [self._fresh(case.alert, *found, token) for found in verdicts.items()]
            changed = None if windows is stored.windows else replace(stored, windows=windows)
            try:
                return await self.deliveries.open(case.alert, deliveries, changed)
            except StaleError:
                continue  # another alert of this subscriber took a place meanwhile: judge again
        raise UnavailableError("too many alerts of one subscriber at the same moment: try again")

    def _fresh(self, alert: Alert, channel: str, verdict: policy.Verdict, token: str | None) -> Delivery:
        """A delivery as it begins: claimed by us at once if it is let through, so that sending it costs no claim."""
        now = self.courier.wall.now()
        fresh = Delivery(
            delivery_id=delivery_id(alert.alert_id, channel),
            alert_id=alert.alert_id,
            subscriber=alert.subscriber,
            channel=channel,
            severity=alert.severity,
            deadline=verdict.deadline,
            trail=verdict.decisions,
        )
        match verdict.kind:
            case policy.Kind.SEND if token is not None:
                return replace(fresh, state=State.CLAIMED, token=token, due_at=now + CLAIM)
            case policy.Kind.SEND:
                return replace(fresh, due_at=now)
            case policy.Kind.HOLD | policy.Kind.DIGEST:
                until = verdict.until or self.courier.market.now()
                return replace(fresh, due_at=self.courier.due_at(until), bucket_id=verdict.bucket_id)
            case policy.Kind.EXPIRE:
                state = State.EXPIRED
            case _:
                state = State.DISABLED if verdict.rule == "disabled" else State.SUPPRESSED
        return replace(fresh, state=state, rule=verdict.rule, by=verdict.by, reason=verdict.reason)

    def _of_rule(
        self, listener: Listener, asked: Subscription, event: BarsIngested, crossing: Crossing, close: float
    ) -> "_Case":
        now = self.courier.wall.now()
        alert = wording.word_rule(asked, event.symbol, event.interval, crossing, close, now=now)
        match = Match(subscription=asked, symbol=event.symbol, reason=crossing.reason)
        return _Case(listener=listener, matches=[match], alert=alert)

    async def _over(self, asked: Subscription, event: BarsIngested, crossing: Crossing) -> None:
        try:
            alert_id = wording.rule_id(asked, event.symbol, event.interval, crossing)
            await self.resolve(asked.subscriber, alert_id, crossing.reason)
        except NotFoundError:
            return  # it fired in history, before the series was live, and nobody was told

    # --- finishing

    async def _swept(self, due: Due) -> int:
        try:
            if due.is_digest:
                await self.courier.deliver_digest(due.subscriber, due.id)
            else:
                await self._finish(await self.deliveries.read(due.subscriber, due.id))
        except TroopError as e:
            log.warning("alert.left", alert_id=due.id, error=type(e).__name__, reason=str(e))
            return 0
        except Exception:
            log.exception("alert.broke", alert_id=due.id)
            return 0
        return 1

    async def _finish(self, record: Record, token: str | None = None) -> None:
        """Bring every delivery as far as it goes now, then tell the house of the alert, once."""
        open_ones = [delivery for delivery in record.deliveries if not delivery.is_over]
        await _all([self.courier.deliver(record, delivery, token) for delivery in open_ones])
        if record.owes_event:
            if record.alert.kind not in PRIVATE:
                await self._publish(record)
            await self.deliveries.told(record)

    async def _publish(self, record: Record) -> None:
        event = _event(record)
        try:
            await self.publisher.publish([event])
        except PermanentError as e:
            await self.outbox.bury_unpublished("alerts", event, str(e))
        except TroopError:
            # Behind the others: alerts that cannot be told now must not hold up deliveries that are due.
            await self.deliveries.postpone(record, self.courier.wall.now() + TELL_AGAIN)
            raise

    def _can_edit(self, channel: str) -> bool:
        return channel in self.courier.channels and self.courier.channels[channel].can_edit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """An alert for one subscriber, with what asked for it."""

    listener: Listener
    matches: Sequence[Match]
    alert: Alert

    @property
    def counts(self) -> bool:
        """Whether a cooldown or a cap could have a say, so that the windows must be read."""
        lesser = [m.subscription for m in self.matches if m.subscription.severity is not Severity.CRITICAL]
        overall = self.listener.preferences.cap_per_day
        return any(s.cooldown is not None or s.cap_per_day is not None or overall is not None for s in lesser)


def _case(signal: SignalRaised, listener: Listener, matches: Sequence[Match], now: datetime) -> _Case:
    severity = wording.worst(match.subscription.severity for match in matches)
    ids = [match.subscription.subscription_id for match in matches]
    alert = wording.word(signal, listener.subscriber, severity, now=now, subscription_ids=ids)
    return _Case(listener=listener, matches=matches, alert=alert)


def _event(record: Record) -> AlertRaised:
    a = record.alert
    return AlertRaised(
        occurred_at=a.occurred_at,
        recorded_at=a.recorded_at,
        alert_id=a.alert_id,
        signal_id=a.signal_id,
        subscriber=a.subscriber,
        symbol=a.symbol,
        severity=a.severity.value,
        title=a.title,
        channels=[d.channel for d in record.deliveries if d.version == 1],
        kind=a.kind,
    )


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Await every one to its end, then raise the first trouble: nothing goes on after the answer."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


def group_of(symbol: str) -> str:
    """The hub group of a symbol, or of all of them."""
    return f"symbols/{symbol}"
