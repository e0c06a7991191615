"""What the alerts domain thinks with."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from shared.clock import format_instant
from shared.documents import Document
from shared.events import fact_id

PUBLIC = "public"
"""The built-in subscriber: what /api/alerts shows to callers without identity."""


class Severity(StrEnum):
    """How much it matters: whether rules about quiet time apply, and what an unknown outcome leads to."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class State(StrEnum):
    """
    Where a delivery stands; ``EDGES`` in alerts/logic/delivering.py are the only ways between them.

        PENDING ─▶ CLAIMED ─▶ SENDING ─▶ SENT
           ▲          │          ├─────▶ RETRY_AT(when)    the service asked for it, or was down ─▶ CLAIMED
           └──────────┘          ├─────▶ UNKNOWN           nobody can know; by policy ─▶ CLAIMED, or final
         the lease ran out,      └─────▶ DEAD(reason)      refused for good, or tried too often
         nothing was sent

    Before it is sent a delivery may also end as EXPIRED (too late to be news), SUPPRESSED (by a rule) or DISABLED
    (nobody is there to send it to).
    """

    PENDING = "PENDING"
    CLAIMED = "CLAIMED"
    SENDING = "SENDING"
    SENT = "SENT"
    RETRY_AT = "RETRY_AT"
    UNKNOWN = "UNKNOWN"
    EXPIRED = "EXPIRED"
    SUPPRESSED = "SUPPRESSED"
    DEAD = "DEAD"
    DISABLED = "DISABLED"


FINAL = frozenset({State.SENT, State.EXPIRED, State.SUPPRESSED, State.DEAD, State.DISABLED})
"""States that are never left; UNKNOWN is final too once nothing is due (``Delivery.is_over``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One step of a judgement, with a reason that a person understands; ``at`` is the market's time."""

    at: datetime
    rule: str
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try of a delivery, as the delivery log shows it."""

    number: int
    started_at: datetime
    ended_at: datetime | None
    outcome: str
    reason: str | None = None
    provider_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """
    A signal, or what a rule about bars saw, worded for one subscriber.

    ``kind`` is signal, price, move, volume, system (about the subscriber's own endpoints), digest or canary;
    ``trail`` is what was decided about it as a whole.
    """

    alert_id: str
    signal_id: str
    subscriber: str
    symbol: str
    interval: str
    entry: str
    strategy: str
    direction: str
    strength: float
    severity: Severity
    reference_price: float
    title: str
    text: str
    occurred_at: datetime
    recorded_at: datetime
    kind: str = "signal"
    version: int = 1
    confidence: float | None = None
    subscription_ids: tuple[str, ...] = ()
    trail: tuple[Decision, ...] = ()
    resolved_at: datetime | None = None
    acknowledged_by: str | None = None
    acknowledged_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """
    One version of an alert on one channel, with its outcome. A digest is one, too: it has ``members``.

    ``doubts`` counts attempts of which nobody knows whether they arrived; ``rule`` and ``by`` say what suppressed it,
    ``bucket_id`` which digest it waits for. ``deadline`` is the last market instant at which it is news; None: it does
    not get old. ``trail`` is what the rules said of it. A later version corrects in its place what an earlier one sent.
    """

    delivery_id: str
    alert_id: str
    subscriber: str
    channel: str
    severity: Severity
    version: int = 1
    state: State = State.PENDING
    rule: str | None = None
    by: str | None = None
    reason: str | None = None
    attempts: int = 0
    attempts_log: tuple[Attempt, ...] = ()
    trail: tuple[Decision, ...] = ()
    doubts: int = 0
    first_failed_at: datetime | None = None
    token: str | None = None
    sent_at: datetime | None = None
    provider_id: str | None = None
    deadline: datetime | None = None
    bucket_id: str | None = None
    members: tuple[str, ...] = ()
    due_at: datetime | None = None
    document: Document | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in FINAL or (self.state is State.UNKNOWN and self.due_at is None)

    @property
    def held_at(self) -> datetime | None:
        """The market instant at which quiet hours held it last."""
        holds = (d.at for d in reversed(self.trail) if (d.rule, d.outcome) == ("quiet_hours", "hold"))
        return next(holds, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An alert with its deliveries, as stored."""

    alert: Alert
    deliveries: Sequence[Delivery]
    document: Document

    @property
    def sort(self) -> str:
        return self.document.sort

    @property
    def owes_event(self) -> bool:
        return self.document.due_at is not None


def alert_id(signal_id: str, subscriber: str) -> str:
    """One alert a signal and subscriber (docs/events.md)."""
    return fact_id("alert", signal_id, subscriber)


def rule_alert_id(kind: str, subscription_id: str, symbol: str, interval: str, side: str, fired_at: datetime) -> str:
    """One alert a rule about bars, series, side and bar at which it fired (docs/events.md)."""
    return fact_id("alert", kind, subscription_id, symbol, interval, side, format_instant(fired_at))


def endpoint_alert_id(endpoint_id: str, first_failed_at: datetime | None) -> str:
    """One alert each time that an endpoint is switched off (docs/events.md)."""
    since = format_instant(first_failed_at) if first_failed_at else ""
    return fact_id("alert", "endpoint", endpoint_id, since)


def delivery_id(alert: str, channel: str, version: int = 1) -> str:
    """One delivery a version of an alert and channel (docs/events.md)."""
    return fact_id("delivery", alert, channel, *([str(version)] if version > 1 else []))


def digest_id(subscriber: str, channel: str, bucket: str, part: int = 1) -> str:
    """One message a digest's window, subscriber and channel; another part once it was closed (docs/events.md)."""
    return fact_id("digest", subscriber, channel, bucket, *([str(part)] if part > 1 else []))


def windows_id(subscriber: str) -> str:
    """The one document of a subscriber's windows (docs/events.md)."""
    return fact_id("windows", subscriber)
