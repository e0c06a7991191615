"""What the alerts domain does: word signals, deliver them, finish what was left, let clients listen."""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from alerts.events import AlertRaised
from alerts.logic import delivering
from alerts.logic.delivering import Step
from alerts.logic.routing import hearers
from alerts.logic.wording import word, worst
from alerts.models import Alert, Delivery, Record, Subscription
from alerts.ports import Channel, Connection, Deliveries, Hub
from shared.clock import Clock, format_instant
from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    OutcomeUnknownError,
    StaleError,
    TroopError,
    UnavailableError,
)
from shared.events import EventPublisher
from shared.http import cursor_of
from shared.market.models import symbol_of
from shared.telemetry import get_logger, span
from signals.events import SignalRaised

log = get_logger(__name__)

PUBLIC = "public"
HUB_GROUPS = 50
LONGEST_ATTEMPT = timedelta(seconds=6)
"""An attempt ends within its lease and within the time a handler may take."""
TELL_AGAIN = timedelta(seconds=15)
SWEEP_BUDGET = timedelta(seconds=8)
AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertService:
    """The alerts domain."""

    subscriptions: Sequence[Subscription]
    deliveries: Deliveries
    channels: Mapping[str, Channel]
    hub: Hub
    publisher: EventPublisher
    wall: Clock
    lease: timedelta

    async def announce(self, signal: SignalRaised) -> None:
        """Word a signal for everyone who hears it, and deliver it on their channels."""
        found = hearers(signal, self.subscriptions)
        await _all([self._announce(signal, who, asked) for who, asked in found.items()])

    async def sweep(self) -> int:
        """
        Finish whatever events did not: due deliveries and events still owed; returns how many alerts.

        An alert that cannot be finished now stays due and holds up no other.
        """
        deadline = self.wall.now() + SWEEP_BUDGET
        done = 0
        queue = iter(await self.deliveries.due(self.wall.now(), 500))

        async def work() -> None:
            nonlocal done
            for subscriber, alert_id in queue:
                if self.wall.now() >= deadline:
                    return
                try:
                    await self._finish(await self.deliveries.read(subscriber, alert_id))
                    done += 1
                except TroopError as e:
                    log.warning("alert.left", alert_id=alert_id, error=type(e).__name__, reason=str(e))
                except Exception:
                    log.exception("alert.broke", alert_id=alert_id)

        await _all([work() for _ in range(AT_ONCE)])
        return done

    async def listed(self, after: str | None, *, newest_first: bool, limit: int) -> list[Record]:
        """The alerts of the built-in subscriber, in order of ``recorded_at``."""
        return await self.deliveries.listed(PUBLIC, after, newest_first=newest_first, limit=limit)

    async def negotiate(self, symbols: str, bearer: str | None) -> Connection:
        """
        Give a caller a place at the hub, hearing *symbols* (comma-separated, or ``all``).

        A caller that reconnects shows the hub token it had (the official clients do so by themselves) and stays
        the same guest; any other token is ignored.
        """
        names = [name.strip() for name in symbols.split(",") if name.strip()] or ["all"]
        if len(names) > HUB_GROUPS:
            raise InvalidPayloadError(f"symbols: at most {HUB_GROUPS}, or all")
        groups = [group_of(name if name == "all" else symbol_of(name)) for name in names]
        known = self.hub.user_of(bearer) if bearer else None
        user_id = known or f"guest-{uuid4()}"
        await _all([self.hub.join(user_id, group) for group in groups])
        return self.hub.connection(user_id)

    async def _announce(self, signal: SignalRaised, subscriber: str, asked: Sequence[Subscription]) -> None:
        severity = worst(s.severity for s in asked)
        channels = list(dict.fromkeys(channel for s in asked for channel in s.channels))
        alert = word(signal, subscriber, severity, now=self.wall.now())
        await self._finish(await self.deliveries.open(alert, channels))

    async def _finish(self, record: Record) -> None:
        """Bring every delivery as far as it goes now, then tell the house of the alert, once."""
        await _all([self._deliver(record, delivery) for delivery in record.deliveries])
        if record.owes_event:
            try:
                await self.publisher.publish([_event(record)])
            except TroopError:
                # Behind the others: alerts that cannot be told now must not hold up deliveries that are due.
                await self.deliveries.postpone(record, self.wall.now() + TELL_AGAIN)
                raise
            await self.deliveries.told(record)

    async def _deliver(self, record: Record, delivery: Delivery) -> None:
        """Claim, send, record. Losing the claim means that somebody else is at it."""
        now = self.wall.now()
        try:
            match delivering.next_step(delivery, now):
                case Step.SEND:
                    claim = await self._claim(delivering.claimed(delivery, uuid4().hex, until=now + self.lease))
                    await self.deliveries.move(await self._attempt(record, claim))
                case Step.GIVE_UP_KNOWING:
                    await self.deliveries.move(delivering.unknown(delivery, "the process died while it was being sent"))
                case Step.WAIT | Step.NOTHING:
                    return
        except StaleError:
            log.info("delivery.raced", delivery_id=delivery.delivery_id, channel=delivery.channel)

    async def _claim(self, wanted: Delivery) -> Delivery:
        """
        Write a claim. Where storage cannot say whether it was written, the token tells whose it is.

        Raises:
            StaleError: somebody else has it.
            UnavailableError: it was not written.

        """
        try:
            return await self.deliveries.move(wanted)
        except UnavailableError:
            stored = await self.deliveries.read(wanted.subscriber, wanted.alert_id)
            found = next(d for d in stored.deliveries if d.channel == wanted.channel)
            if found.token != wanted.token:
                raise
            return found

    async def _attempt(self, record: Record, claim: Delivery) -> Delivery:
        """The outcome of one attempt, as the delivery's next state."""
        with span("delivery.attempt", channel=claim.channel, delivery_id=claim.delivery_id):
            try:
                # A lease outlives its attempt, so nobody takes over what is still being sent.
                async with asyncio.timeout(min(self.lease / 2, LONGEST_ATTEMPT).total_seconds()):
                    provider_id = await self._channel(claim.channel).send(record.alert, item_of(record))
            except TimeoutError:
                return delivering.failed(claim, OutcomeUnknownError("no answer in time"), now=self.wall.now())
            except TroopError as e:
                outcome = delivering.failed(claim, e, now=self.wall.now())
                log.warning(
                    "delivery.failed",
                    delivery_id=claim.delivery_id,
                    channel=claim.channel,
                    state=outcome.state,
                    reason=outcome.reason,
                )
                return outcome
            except Exception as e:
                log.exception("delivery.broke", delivery_id=claim.delivery_id, channel=claim.channel)
                return delivering.failed(claim, e, now=self.wall.now())
        return delivering.sent(claim, provider_id, now=self.wall.now())

    def _channel(self, name: str) -> Channel:
        try:
            return self.channels[name]
        except KeyError:
            raise ConfigurationError(
                f"the channel {name} is not set up; there are {', '.join(sorted(self.channels))}"
            ) from None


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Await every one to its end, then raise the first trouble: nothing goes on after the answer."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


def group_of(symbol: str) -> str:
    """The hub group of a symbol, or of all of them."""
    return f"symbols/{symbol}"


def item_of(record: Record) -> dict[str, Any]:
    """An alert as the API lists it and the hub pushes it."""
    a: Alert = record.alert
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
        "severity": a.severity.value,
        "reference_price": a.reference_price,
        "title": a.title,
        "text": a.text,
        "occurred_at": format_instant(a.occurred_at),
        "recorded_at": format_instant(a.recorded_at),
        "cursor": cursor_of(record.sort),
        "deliveries": [
            {
                "channel": d.channel,
                "state": d.state.value,
                "reason": d.reason,
                "attempts": d.attempts,
                "sent_at": _shown(d.sent_at),
            }
            for d in record.deliveries
        ],
    }


def _shown(instant: datetime | None) -> str | None:
    return format_instant(instant) if instant else None


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
        channels=[d.channel for d in record.deliveries],
    )
