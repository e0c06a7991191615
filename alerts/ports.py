"""What the alerts domain asks of the outside."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from pydantic import SecretStr

from alerts.models import Alert, Delivery, Record
from alerts.subscriptions import Listener, Windows
from shared.documents import Document
from shared.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a subscriber is reached on a channel; ``shown`` is what people may see, ``seal`` tells it from others."""

    value: SecretStr
    shown: str
    seal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """
    What a channel is given to carry.

    ``item`` is the alert's API form; with ``digest`` the message stands for all of these items instead. ``to`` None
    is the channel's own default place, or for SignalR the alert's subscriber. ``delivery_id`` is the same for every
    attempt: the key of a channel that has one.
    """

    alert: Alert
    item: Mapping[str, Any]
    delivery_id: str
    to: Address | None = None
    is_possible_repeat: bool = False
    unsubscribe_url: str | None = None
    digest: Sequence[Mapping[str, Any]] | None = None


class Channel(Protocol):
    """
    Carries an alert to a subscriber. Returning means that the service took it.

    Both calls raise RateLimitedError (not before ``retry_after``), UnavailableError (surely not sent),
    OutcomeUnknownError (perhaps sent), RecipientGoneError or RefusedError (never), ConfigurationError (a setting is
    wrong).
    """

    name: str
    is_keyed: bool
    """A repeat with the same ``delivery_id`` (or alert id and version) is not shown again."""
    can_edit: bool
    """What was sent can be corrected in its place."""
    needs_address: bool
    """A subscriber is reached at an address of their own; only ``public`` has the channel's default place."""

    async def send(self, message: Message) -> str | None:
        """Send *message*; returns the service's own id of it, if it has one."""
        ...

    async def edit(self, provider_id: str | None, message: Message) -> None:
        """Put *message* in the place of what was sent as *provider_id*; nothing happens where it is no more."""
        ...


class Directory(Protocol):
    """Who hears what, and where each is reached."""

    async def listeners(self) -> Sequence[Listener]:
        """Everybody with their rules, the subscriptions file's ``public`` first; at most a few seconds old."""
        ...

    async def address(self, subscriber: str, channel: str) -> Address | None:
        """Where to reach a subscriber now; None where nobody is to be reached there (any more)."""
        ...

    async def failed(
        self, subscriber: str, channel: str, reason: str, now: datetime, *, is_gone: bool = False, seal: str = ""
    ) -> bool:
        """
        Note that an endpoint failed, for good if it *is_gone*; whether it was disabled by that just now.

        *seal* is that of the address that was tried: one that has taken its place meanwhile is not to blame.
        """
        ...

    async def worked(self, subscriber: str, channel: str, now: datetime) -> None:
        """Note that an endpoint took a message: its failures are forgotten."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWindows:
    """A subscriber's windows, as read: written again only if nobody did meanwhile."""

    windows: Windows
    document: Document | None = None


class Due(NamedTuple):
    """An alert with something due, or a digest."""

    subscriber: str
    id: str
    is_digest: bool = False


class Deliveries(Protocol):
    """
    The ledger: alerts with one delivery a version and channel, every move a conditional write.

    Raises StaleError when somebody else moved first, ValueError for a move that is none of the allowed ones.
    """

    async def open(self, alert: Alert, deliveries: Sequence[Delivery], windows: StoredWindows | None = None) -> Record:
        """
        Write an alert with its deliveries, all or nothing, or find it written.

        With it the windows it was judged by, if there are any; deliveries with a bucket join their digest.
        """
        ...

    async def read(self, subscriber: str, alert_id: str) -> Record:
        """Read an alert with its deliveries, those of later versions last."""
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

    async def amend(self, record: Record, alert: Alert, corrections: Sequence[Delivery] = ()) -> Record:
        """Write what an alert says now, and the deliveries of its new version."""
        ...

    async def due(self, before: datetime, limit: int) -> Sequence[Due]:
        """What has something due at *before* (wall), the longest due first."""
        ...

    async def listed(self, subscriber: str, after: str | None, *, newest_first: bool, limit: int) -> list[Record]:
        """Alerts of a subscriber in order of ``recorded_at``, with the deliveries of their first version."""
        ...

    async def windows(self, subscriber: str) -> StoredWindows:
        """Read what a subscriber's cooldowns and caps have let through."""
        ...

    async def digest(self, subscriber: str, digest_id: str) -> Delivery:
        """Read a digest."""
        ...

    async def settle(self, digest: Delivery, members: Sequence[Delivery]) -> Delivery:
        """Write a digest's end together with that of all its members."""
        ...


class Breakers(Protocol):
    """What all instances know of each channel's service: whether it is left alone for a while."""

    async def look(self, channels: Collection[str]) -> None:
        """Read what the others found out, before much is sent."""
        ...

    async def admits(self, channel: str) -> datetime | None:
        """None: send, and tell how it went. An instant (wall): not before."""
        ...

    async def failed(self, channel: str, reason: str) -> None:
        """The service is down, does not answer, or refuses our key."""
        ...

    async def worked(self, channel: str) -> None:
        """The service took something, or said no like a service that is well."""
        ...


class Outbox(Protocol):
    """Keeps what could not be told for good, for people to see and replay."""

    async def bury_unpublished(self, source: str, event: Event, reason: str) -> None:
        """Keep an event of *source* (a domain) that the topic refused."""
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
