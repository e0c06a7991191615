"""What the alerts domain tells the house."""

from collections.abc import Sequence
from typing import ClassVar

from shared.events import Event


class AlertRaised(Event):
    """
    A signal, or what a rule about bars saw, was worded for a subscriber; told once an alert.

    ``occurred_at`` is the signal's: the bar's close. ``signal_id`` is empty where no signal stands behind it.
    """

    type: ClassVar[str] = "alerts.alert_raised.v1"
    source: ClassVar[str] = "/troop/alerts"

    alert_id: str
    signal_id: str
    subscriber: str
    symbol: str
    severity: str
    title: str
    channels: Sequence[str]
    kind: str = "signal"

    @property
    def event_id(self) -> str:
        return self.alert_id

    @property
    def subject(self) -> str:
        return f"symbols/{self.symbol}"


class CanarySent(Event):
    """The canary was let out; ``occurred_at`` is the market's time then."""

    type: ClassVar[str] = "alerts.canary_sent.v1"
    source: ClassVar[str] = "/troop/alerts"

    canary_id: str

    @property
    def event_id(self) -> str:
        return self.canary_id

    @property
    def subject(self) -> str:
        return f"canaries/{self.canary_id}"
