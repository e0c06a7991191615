"""What the alerts domain asks of the outside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from alerts.models import Alert, Delivery, Record


class Channel(Protocol):
    """
    Carries an alert to a subscriber. Returning means that the service took it.

    Raises RateLimitedError (not before ``retry_after``), UnavailableError (surely not sent), OutcomeUnknownError
    (perhaps sent), RecipientGoneError or RefusedError (never), ConfigurationError (a setting is wrong).
    """

    name: str

    async def send(self, alert: Alert, item: Mapping[str, Any]) -> str | None:
        """Send *alert*; *item* is its API form. Returns the service's own id of it, if it has one."""
        ...


class Deliveries(Protocol):
    """
    The ledger: alerts with one delivery a channel, every move a conditional write.

    Raises StaleError when somebody else moved first.
    """

    async def open(self, alert: Alert, channels: Sequence[str]) -> Record:
        """Write an alert with its deliveries, all or nothing, or find it written."""
        ...

    async def read(self, subscriber: str, alert_id: str) -> Record:
        """Read an alert with its deliveries."""
        ...

    async def move(self, delivery: Delivery) -> Delivery:
        """Write a delivery's next state."""
        ...

    async def told(self, record: Record) -> None:
        """The event of an alert was published."""
        ...

    async def postpone(self, record: Record, due_at: datetime) -> None:
        """The event of an alert could not be published: it is owed again from *due_at* on."""
        ...

    async def due(self, before: datetime, limit: int) -> Sequence[tuple[str, str]]:
        """(subscriber, alert id) of alerts with something due at *before* (wall)."""
        ...

    async def listed(self, subscriber: str, after: str | None, *, newest_first: bool, limit: int) -> list[Record]:
        """Alerts of a subscriber in order of ``recorded_at``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What a client needs to connect to the hub."""

    url: str
    access_token: str


class Hub(Protocol):
    """The real-time hub as negotiate needs it; raises as Channel does."""

    def connection(self, user_id: str) -> Connection:
        """An address and a token for this user."""
        ...

    def user_of(self, token: str) -> str | None:
        """The user a hub token of ours was made for, None for anything else."""
        ...

    async def join(self, user_id: str, group: str) -> None:
        """Let the user hear a group, now and after reconnecting."""
        ...
