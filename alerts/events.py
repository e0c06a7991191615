"""What the alerts domain tells the house."""

from collections.abc import Sequence
from typing import ClassVar

from shared.events import Event


class AlertRaised(Event):
    """A signal was worded for a subscriber; told once an alert. ``occurred_at`` is the signal's."""

    type: ClassVar[str] = "alerts.alert_raised.v1"
    source: ClassVar[str] = "/troop/alerts"

    alert_id: str
    signal_id: str
    subscriber: str
    symbol: str
    severity: str
    title: str
    channels: Sequence[str]

    @property
    def event_id(self) -> str:
        return self.alert_id

    @property
    def subject(self) -> str:
        return f"symbols/{self.symbol}"
