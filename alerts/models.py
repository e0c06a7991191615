"""What the alerts domain thinks with."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from shared.documents import Document
from shared.events import fact_id


class Severity(StrEnum):
    """How much it matters; decides what happens to a delivery whose outcome is unknown."""

    INFO = "info"
    CRITICAL = "critical"


class State(StrEnum):
    """
    Where a delivery stands.

        PENDING ─▶ SENDING ─▶ SENT
                   │  ▲  └──▶ DEAD(reason)        refused for good, or tried too often
                   │  └────── RETRY_AT(when)      the service asked for it, or was down
                   └────────▶ UNKNOWN             the process or the connection died in between
    """

    PENDING = "PENDING"
    SENDING = "SENDING"
    RETRY_AT = "RETRY_AT"
    SENT = "SENT"
    UNKNOWN = "UNKNOWN"
    DEAD = "DEAD"


FINAL = frozenset({State.SENT, State.UNKNOWN, State.DEAD})


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """
    What a subscriber asked to hear, and on which channels.

    ``symbols`` and ``entries`` None means all of them.
    """

    subscriber: str
    channels: tuple[str, ...]
    symbols: frozenset[str] | None
    entries: frozenset[str] | None
    min_strength: float
    severity: Severity


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """A signal worded for one subscriber."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One alert on one channel, with its outcome."""

    delivery_id: str
    alert_id: str
    subscriber: str
    channel: str
    severity: Severity
    state: State = State.PENDING
    reason: str | None = None
    attempts: int = 0
    token: str | None = None
    sent_at: datetime | None = None
    provider_id: str | None = None
    due_at: datetime | None = None
    document: Document | None = None


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


def delivery_id(alert: str, channel: str) -> str:
    """One delivery an alert and channel (docs/events.md)."""
    return fact_id("delivery", alert, channel)
