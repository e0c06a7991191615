"""Brings deliveries as far as they go now: judge again, claim, send, record."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from alerts.items import item_of
from alerts.logic import delivering, policy
from alerts.logic.delivering import Step
from alerts.logic.wording import word_digest, word_disabled
from alerts.models import PUBLIC, Alert, Decision, Delivery, Record, State, delivery_id
from alerts.ports import Address, Breakers, Channel, Deliveries, Directory, Message
from alerts.subscriptions import Listener, Match, Windows
from shared.clock import Clock, MarketClock
from shared.errors import (
    ConfigurationError,
    NotFoundError,
    OutcomeUnknownError,
    PermanentError,
    RateLimitedError,
    RecipientGoneError,
    StaleError,
    TroopError,
    UnavailableError,
)
from shared.telemetry import get_logger, span

log = get_logger(__name__)

LONGEST_ATTEMPT = timedelta(seconds=6)
"""An attempt ends within its lease and within the time a handler may take."""
CLAIM = timedelta(seconds=10)
"""How long a claim holds that has not begun to send."""
RECHECK = timedelta(minutes=1)
"""How often a wait for a market instant is looked at again while the market's clock is not the wall."""
ON_ITS_WAY = timedelta(minutes=10)
"""What the way to a subscriber may take on the wall before an alert counts as late."""
STEPS = 8
"""A delivery takes at most this many steps at a time: released, judged, claimed, sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parcel:
    """What is handed to the channel."""

    alert: Alert
    item: Mapping[str, Any]
    digest: Sequence[Mapping[str, Any]] | None = None
    edits: Delivery | None = None


type _Write = Callable[[Delivery], Awaitable[Delivery]]


class Roll:
    """Listeners by name, made anew when the directory has read them again."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._listeners: Sequence[Listener] = ()
        self._by_name: Mapping[str, Listener] = {}

    async def find(self, subscriber: str) -> Listener | None:
        """A subscriber with their rules; None: nobody of this name listens."""
        found = await self._directory.listeners()
        if found is not self._listeners:
            self._listeners, self._by_name = found, {listener.subscriber: listener for listener in found}
        return self._by_name.get(subscriber)


@dataclass(frozen=True, slots=True, kw_only=True)
class Courier:
    """The delivery engine: one public method for an alert's delivery and one for a digest."""

    deliveries: Deliveries
    directory: Directory
    channels: Mapping[str, Channel]
    breakers: Breakers
    wall: Clock
    market: MarketClock
    lease: timedelta
    unsubscribe_url: Callable[[str, str, str], str | None] = lambda _subscriber, _channel, _subscription: None
    roll: Roll = field(init=False)
    told: set[str] = field(default_factory=set, init=False)
    """Alerts about switched-off endpoints that this process knows to be stored."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "roll", Roll(self.directory))

    async def deliver(self, record: Record, delivery: Delivery, token: str | None = None) -> None:
        """
        Bring one delivery of an alert as far as it goes now; *token* is that of a claim made for us.

        Losing a conditional write means that somebody else is at it.
        """
        try:
            await self._deliver(record, delivery, token)
        except StaleError:
            log.info("delivery.raced", delivery_id=delivery.delivery_id, channel=delivery.channel)

    async def deliver_digest(self, subscriber: str, digest_id: str) -> None:
        """Bring a digest as far as it goes now; its members end with it."""
        digest = await self.deliveries.digest(subscriber, digest_id)
        try:
            await self._deliver_digest(digest)
        except StaleError:
            log.info("delivery.raced", delivery_id=digest.delivery_id, channel=digest.channel)

    @property
    def allowance(self) -> timedelta:
        """How old an alert may be in any case (market time): it is merely on its way."""
        return ON_ITS_WAY * self.market.speed

    def due_at(self, market: datetime) -> datetime:
        """The wall instant at which to look again at what waits for *market*."""
        now = self.wall.now()
        at = self.market.wall_at(market)
        if self.market.time is None and at is not None:
            return max(at, now)
        return max(min(at or now + RECHECK, now + RECHECK), now)

    # --- one delivery of an alert

    async def _deliver(self, record: Record, delivery: Delivery, token: str | None) -> None:
        is_admitted = False
        for _ in range(STEPS):
            now = self.wall.now()
            is_mine = token is not None and (delivery.state, delivery.token) == (State.CLAIMED, token)
            match Step.SEND if is_mine else delivering.next_step(delivery, now):
                case Step.WAIT | Step.NOTHING:
                    return
                case Step.RELEASE:
                    delivery = await self.deliveries.move(delivering.released(delivery, due_at=now))
                case Step.DOUBT:
                    delivery = await self.deliveries.move(self._died(delivery, now))
                    await self.tell_owner(record.alert.subscriber, delivery.channel)
                case Step.SEND:
                    fate = await self._fate(record, delivery, now)
                    if fate is None and not is_admitted:
                        fate, is_admitted = await self._held(delivery, now), True
                    if fate is None and not is_mine:
                        token = uuid4().hex
                        wanted = delivering.claimed(delivery, token, until=now + CLAIM)
                        delivery = await self._sure(wanted, self.deliveries.move)
                        continue
                    if fate is not None:
                        await self.deliveries.move(fate)
                        return
                    await self._send(_parcel(record, delivery), delivery, self.deliveries.move)
                    return

    async def _fate(self, record: Record, delivery: Delivery, now: datetime) -> Delivery | None:
        """What becomes of a delivery instead of being sent now; None: send it. The rules of this moment decide."""
        if delivery.version > 1:
            first = _edited(record, delivery)
            if not first.is_over:
                wait = self._decision("order", "wait", f"version {first.version} is still on its way")
                return delivering.put_off(delivery, first.due_at or now + delivering.FIRST_WAIT, wait)
            if first.state is not State.SENT:
                reason = f"there is nothing to correct: version {first.version} ended as {first.state}"
                return delivering.ended(delivery, State.SUPPRESSED, rule="order", reason=reason)
        return await self._judged(record.alert, delivery, held_at=delivery.held_at)

    async def _judged(self, alert: Alert, delivery: Delivery, *, held_at: datetime | None) -> Delivery | None:
        """What the rules of this moment say; None: nothing against it."""
        listener = await self.roll.find(alert.subscriber)
        if not alert.subscription_ids:  # it is about the subscriber's own affairs, or older than these rules
            off = self._switched_off(listener, delivery.channel)
            return delivering.ended(delivery, State.DISABLED, rule="disabled", reason=off) if off else None
        if listener is None:
            gone = f"{alert.subscriber} listens to nothing any more"
            return delivering.ended(delivery, State.SUPPRESSED, rule="unsubscribed", reason=gone)
        verdict = policy.judge(
            _matches(alert, listener),
            listener,
            Windows(),
            alert_id=alert.alert_id,
            closed_at=alert.occurred_at,
            market_now=self.market.now(),
            allowance=self.allowance,
            channel=delivery.channel,
            is_accepted=True,
            in_bucket=delivery.bucket_id,
            held_at=held_at,
        )
        match verdict.kind:
            case policy.Kind.SEND:
                return None
            case policy.Kind.HOLD | policy.Kind.DIGEST:
                until = verdict.until or self.market.now()
                return delivering.put_off(delivery, self.due_at(until), verdict.decisions[-1])
            case policy.Kind.EXPIRE:
                state = State.EXPIRED
            case _:
                state = State.DISABLED if verdict.rule == "disabled" else State.SUPPRESSED
        if state is State.DISABLED:
            await self.tell_owner(alert.subscriber, delivery.channel)
        return delivering.ended(delivery, state, rule=verdict.rule or "", reason=verdict.reason, by=verdict.by)

    async def _held(self, delivery: Delivery, now: datetime) -> Delivery | None:
        """Put off while the channel's service is left alone."""
        until = await self.breakers.admits(delivery.channel)
        if until is None:
            return None
        # Spread, so that what waited together does not come back together.
        until += (until - now) * delivering.spread(delivery.delivery_id) / 2
        pause = self._decision("breaker", "wait", f"{delivery.channel} is in trouble and left alone for a while")
        return delivering.put_off(delivery, until, pause)

    # --- a digest

    async def _deliver_digest(self, digest: Delivery) -> None:
        token: str | None = None
        is_admitted = False
        for _ in range(STEPS):
            now = self.wall.now()
            is_mine = token is not None and (digest.state, digest.token) == (State.CLAIMED, token)
            match Step.SEND if is_mine else delivering.next_step(digest, now):
                case Step.WAIT | Step.NOTHING:
                    return
                case Step.RELEASE:
                    digest = await self.deliveries.move(delivering.released(digest, due_at=now))
                case Step.DOUBT:
                    digest = await self._settle(self._died(digest, now), await self._members(digest))
                case Step.SEND:
                    members = await self._members(digest)
                    fate, members = await self._fate_of_digest(digest, members)
                    if fate is None and not is_admitted:
                        fate, is_admitted = await self._held(digest, now), True
                    if fate is not None:
                        await self._settle(fate, members)
                        return
                    if not is_mine:
                        token = uuid4().hex
                        wanted = delivering.claimed(digest, token, until=now + CLAIM)
                        digest = await self._sure(wanted, self.deliveries.move)
                        continue
                    await self._send_digest(digest, members, now)
                    return

    async def _send_digest(self, digest: Delivery, members: Sequence[Record], now: datetime) -> None:
        async def write(after: Delivery) -> Delivery:
            return await self._settle(after, members)

        items = [item_of(record) for record in members]
        alert = word_digest([record.alert for record in members], digest.delivery_id, now=now)
        parcel = _Parcel(alert=alert, item=items[-1] | {"alert_id": digest.delivery_id}, digest=items)
        await self._send(parcel, digest, write)

    async def _fate_of_digest(
        self, digest: Delivery, members: Sequence[Record]
    ) -> tuple[Delivery | None, list[Record]]:
        """What becomes of a digest instead of being sent now, and who is still in it: each is judged again."""
        left: list[Record] = []
        for record in members:
            # What may have arrived with the digest is not called unsent.
            member = replace(_of_channel(record, digest.channel), doubts=digest.doubts)
            fate = await self._judged(record.alert, member, held_at=digest.held_at)
            if fate is None:
                left.append(record)
            elif fate.is_over:
                await self.deliveries.move(fate)
            else:
                assert fate.due_at is not None  # noqa: S101 - what is put off is due some time
                return delivering.put_off(digest, fate.due_at, fate.trail[-1]), list(members)
        if not left:
            nothing = delivering.ended(digest, State.SUPPRESSED, rule="digest", reason="nothing of it is left to tell")
            return nothing, left
        return None, left

    async def _members(self, digest: Delivery) -> list[Record]:
        """The alerts of a digest that still wait in it, oldest first."""
        found: list[Record] = []
        for alert_id in digest.members:
            try:
                record = await self.deliveries.read(digest.subscriber, alert_id)
            except NotFoundError:
                continue  # it has expired from storage
            if not _of_channel(record, digest.channel).is_over:
                found.append(record)
        return sorted(found, key=lambda record: (record.alert.occurred_at, record.alert.alert_id))

    async def _settle(self, after: Delivery, members: Sequence[Record]) -> Delivery:
        """Write what a digest has become, and its members with it when it is over."""
        if not after.is_over:
            return await self.deliveries.move(after)
        ended = [delivering.followed(_of_channel(record, after.channel), after) for record in members]
        return await self.deliveries.settle(after, ended)

    # --- sending

    async def _send(self, parcel: _Parcel, claim: Delivery, write: _Write) -> None:
        """Send what we have claimed, and record how it went."""
        address: Address | None = None
        try:
            channel = self._channel(claim.channel)
            if channel.needs_address and claim.subscriber != PUBLIC:
                address = await self.directory.address(claim.subscriber, claim.channel)
                if address is None:
                    raise NotFoundError(f"there is no address for {claim.channel} any more")
        except ConfigurationError as e:
            await self._unsent(claim, e, write)
            return
        except PermanentError as e:
            await self.tell_owner(claim.subscriber, claim.channel)
            await write(delivering.ended(claim, State.DISABLED, rule="disabled", reason=str(e)))
            return
        ends = await self._ended_by_link(parcel, claim)
        now = self.wall.now()
        if _has_run_out(claim, now):
            raise StaleError("the claim ran out before anything was sent")
        started = await self._sure(delivering.sending(claim, now=now, until=now + self.lease), self.deliveries.move)
        if _has_run_out(started, now := self.wall.now()):
            # Others may be at it by now; if they are not, this write says that nothing was sent.
            late = UnavailableError("this process stood still until its lease ran out")
            await write(delivering.failed(started, late, now=now, is_keyed=channel.is_keyed))
            return
        message = self._message(parcel, started, address, ends)
        after, trouble = await self._attempt(channel, parcel, started, message)
        if isinstance(trouble, RecipientGoneError) and address is not None:
            await self._gone(started, address, str(trouble))
        await self._sure(after, write)
        await self._learn(after, address, trouble)

    async def _ended_by_link(self, parcel: _Parcel, claim: Delivery) -> str:
        """The one subscription that asks for this; empty: several do, and only leaving the channel ends them all."""
        listener = await self.roll.find(claim.subscriber)
        matches = _matches(parcel.alert, listener) if listener else []
        asked = [m.subscription for m in matches if claim.channel in m.subscription.channels]
        return asked[0].subscription_id if len(asked) == 1 else ""

    def _message(self, parcel: _Parcel, started: Delivery, address: Address | None, ends: str) -> Message:
        return Message(
            alert=parcel.alert,
            item=parcel.item,
            delivery_id=(parcel.edits or started).delivery_id,
            to=address,
            is_possible_repeat=started.doubts > 0,
            unsubscribe_url=self.unsubscribe_url(started.subscriber, started.channel, ends),
            digest=parcel.digest,
        )

    async def _attempt(
        self, channel: Channel, parcel: _Parcel, started: Delivery, message: Message
    ) -> tuple[Delivery, Exception | None]:
        """One attempt: the delivery's next state, and what went wrong."""
        is_keyed = channel.is_keyed or parcel.edits is not None  # correcting twice is correcting once
        with span("delivery.attempt", channel=started.channel, delivery_id=started.delivery_id):
            try:
                # A lease outlives its attempt, so nobody takes over what is still being sent.
                async with asyncio.timeout(min(self.lease / 2, LONGEST_ATTEMPT).total_seconds()):
                    if parcel.edits is None:
                        provider_id = await channel.send(message)
                    else:
                        provider_id = parcel.edits.provider_id
                        await channel.edit(provider_id, message)
            except TimeoutError:
                trouble: Exception = OutcomeUnknownError("no answer in time")
            except TroopError as e:
                trouble = e
            except Exception as e:
                log.exception("delivery.broke", delivery_id=started.delivery_id, channel=started.channel)
                trouble = e
            else:
                return delivering.sent(started, provider_id, now=self.wall.now()), None
        deadline = self.market.wall_at(started.deadline) if started.deadline else None
        outcome = delivering.failed(started, trouble, now=self.wall.now(), is_keyed=is_keyed, deadline=deadline)
        log.warning(
            "delivery.failed",
            delivery_id=started.delivery_id,
            channel=started.channel,
            state=outcome.state,
            reason=outcome.reason,
        )
        return outcome, trouble

    async def _unsent(self, claim: Delivery, error: ConfigurationError, write: _Write) -> None:
        """A setting is missing, so there was nobody to send it: it waits for a person, as after an attempt."""
        now = self.wall.now()
        started = await self._sure(delivering.sending(claim, now=now, until=now + self.lease), self.deliveries.move)
        await write(delivering.failed(started, error, now=now, is_keyed=False))

    async def _sure(self, wanted: Delivery, write: _Write) -> Delivery:
        """
        Write a move. Where storage cannot say whether it was written, what is stored says so.

        Raises:
            StaleError: somebody else has it.
            UnavailableError: it was not written.

        """
        try:
            return await write(wanted)
        except UnavailableError:
            found = await self._reread(wanted)
            if (found.token, found.state, found.attempts) == (wanted.token, wanted.state, wanted.attempts):
                return found
            return await write(wanted)  # if somebody else wrote meanwhile, it says so

    async def _reread(self, delivery: Delivery) -> Delivery:
        if delivery.members:
            return await self.deliveries.digest(delivery.subscriber, delivery.delivery_id)
        record = await self.deliveries.read(delivery.subscriber, delivery.alert_id)
        return next(d for d in record.deliveries if d.delivery_id == delivery.delivery_id)

    # --- what is learnt from it

    async def _learn(self, after: Delivery, address: Address | None, trouble: Exception | None) -> None:
        """Tell the breaker and the directory how it went; what cannot be told now is learnt from the next attempt."""
        try:
            match trouble:
                case UnavailableError() | OutcomeUnknownError() | ConfigurationError():
                    await self.breakers.failed(after.channel, f"{type(trouble).__name__}: {trouble}")
                case TroopError() | None if not isinstance(trouble, RateLimitedError):
                    await self.breakers.worked(after.channel)
            if address is None or isinstance(trouble, RecipientGoneError):
                return
            if trouble is None:
                listener = await self.roll.find(after.subscriber)
                endpoint = listener.endpoints.get(after.channel) if listener else None
                if endpoint is not None and endpoint.failures:
                    await self.directory.worked(after.subscriber, after.channel, self.wall.now())
            elif after.state is State.DEAD:
                await self._blame(after, address, str(trouble), is_gone=False)
        except TroopError as e:
            log.warning("delivery.not_learnt", channel=after.channel, reason=str(e))

    async def _gone(self, started: Delivery, address: Address, reason: str) -> None:
        """Nobody is there any more: written before the outcome is, so that not even a crash leads to another call."""
        try:
            await self._blame(started, address, reason, is_gone=True)
        except TroopError as e:
            log.warning("delivery.not_learnt", channel=started.channel, reason=str(e))

    async def _blame(self, started: Delivery, address: Address, reason: str, *, is_gone: bool) -> None:
        is_off = await self.directory.failed(
            started.subscriber, started.channel, reason, self.wall.now(), is_gone=is_gone, seal=address.seal
        )
        if is_off:
            log.warning("endpoint.disabled", channel=started.channel, reason=reason)
            await self.tell_owner(started.subscriber, started.channel)

    async def tell_owner(self, subscriber: str, channel: str) -> None:
        """
        Tell the owner of a switched-off endpoint by another channel.

        The alert's id makes it once, so whoever meets the endpoint later makes up for who died before telling.
        """
        listener = await self.roll.find(subscriber)
        endpoint = listener.endpoints.get(channel) if listener else None
        if listener is None or endpoint is None or endpoint.is_enabled:
            return
        others = [name for name, e in sorted(listener.endpoints.items()) if e.is_enabled and name in self.channels]
        other = others[0] if others else "signalr"
        if other == channel or other not in self.channels:
            return
        now = self.wall.now()
        alert = word_disabled(endpoint, now=now, market_now=self.market.now())
        if alert.alert_id in self.told:
            return
        told = Delivery(
            delivery_id=delivery_id(alert.alert_id, other),
            alert_id=alert.alert_id,
            subscriber=subscriber,
            channel=other,
            severity=alert.severity,
            due_at=now,
        )
        await self.deliveries.open(alert, [told])
        self.told.add(alert.alert_id)

    # --- small things

    def _channel(self, name: str) -> Channel:
        try:
            return self.channels[name]
        except KeyError:
            raise ConfigurationError(
                f"the channel {name} is not set up; there are {', '.join(sorted(self.channels))}"
            ) from None

    def _switched_off(self, listener: Listener | None, channel: str) -> str | None:
        endpoint = listener.endpoints.get(channel) if listener else None
        if endpoint is None or endpoint.is_enabled:
            return None
        return (
            f"the {channel} address {endpoint.shown} is disabled: {endpoint.disabled_reason or 'it was switched off'}"
        )

    def _died(self, delivery: Delivery, now: datetime) -> Delivery:
        is_keyed = delivery.version > 1 or (
            delivery.channel in self.channels and self.channels[delivery.channel].is_keyed
        )
        return delivering.doubted(delivery, "the process died while it was being sent", now=now, is_keyed=is_keyed)

    def _decision(self, rule: str, outcome: str, reason: str) -> Decision:
        return Decision(at=self.market.now(), rule=rule, outcome=outcome, reason=reason)


def _has_run_out(held: Delivery, now: datetime) -> bool:
    """Whether a claim or lease is over: whoever stood still for so long must not send."""
    return held.due_at is not None and held.due_at <= now


def _parcel(record: Record, delivery: Delivery) -> _Parcel:
    edits = _edited(record, delivery) if delivery.version > 1 else None
    return _Parcel(alert=record.alert, item=item_of(record), edits=edits)


def _edited(record: Record, delivery: Delivery) -> Delivery:
    """The delivery of the version before, whose message this one corrects."""
    versions = [d for d in record.deliveries if d.channel == delivery.channel and d.version < delivery.version]
    return max(versions, key=lambda d: d.version)


def _of_channel(record: Record, channel: str) -> Delivery:
    return next(d for d in record.deliveries if d.channel == channel and d.version == 1)


def _matches(alert: Alert, listener: Listener) -> list[Match]:
    """The subscriptions that an alert was raised for, as they are now."""
    asked = {s.subscription_id: s for s in listener.subscriptions}
    return [
        Match(subscription=asked[id_], symbol=alert.symbol, entry=alert.entry or None, reason="it was asked for")
        for id_ in alert.subscription_ids
        if id_ in asked
    ]
