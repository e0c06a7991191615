"""What subscribers ask for: subscriptions, preferences, mutes, endpoints, and the windows their rules count in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from enum import StrEnum

from alerts.models import Severity
from shared.documents import Document
from shared.events import fact_id

ADDRESSED = ("email", "discord")
"""Channels that need an address of the subscriber; only ``public`` is reached without."""


class Kind(StrEnum):
    """What a subscription listens to: signals, or bars by one of three rules."""

    SIGNAL = "signal"
    PRICE = "price"
    MOVE = "move"
    VOLUME = "volume"


class Digest(StrEnum):
    """How alerts are gathered: not at all, or into one message for an hour or a day."""

    NONE = "none"
    HOUR = "hour"
    DAY = "day"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """
    What a subscriber asked to hear, and on which channels.

    ``symbols``, ``entries`` and ``directions`` None means all of them. ``interval`` None is any for signals; bar
    rules have one. ``percent`` is in percent (5.0 is 5 %), ``window`` in bars, ``hysteresis`` a share of the level
    that the value must go back before the rule can fire again. ``digest`` None is the channel's own habit: e-mail
    gathers a day, the others nothing. ``freshness`` is how old an alert may be when it is sent (None: any age).
    Nothing that closed before ``since`` (market time) is heard.
    """

    subscription_id: str = ""
    subscriber: str
    channels: tuple[str, ...]
    kind: Kind = Kind.SIGNAL
    symbols: frozenset[str] | None = None
    entries: frozenset[str] | None = None
    directions: frozenset[str] | None = None
    min_strength: float = 0.0
    min_confidence: float | None = None
    severity: Severity = Severity.INFO
    interval: str | None = None
    price_above: float | None = None
    price_below: float | None = None
    percent: float | None = None
    window: int | None = None
    times_usual: float | None = None
    hysteresis: float = 0.0
    cooldown: timedelta | None = None
    digest: Digest | None = None
    cap_per_day: int | None = None
    freshness: timedelta | None = None
    resolves: bool = True
    since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """
    What holds for all subscriptions of a subscriber.

    Quiet hours are times of day in ``zone``, an IANA name; a window may cross midnight. None is no quiet hours.
    ``cap_per_day`` counts alerts by the day of the zone in which they occurred.
    """

    subscriber: str
    zone: str = "UTC"
    quiet_from: time | None = None
    quiet_to: time | None = None
    cap_per_day: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mute:
    """Silence until an end (market time), by its author, for some symbols or entries or (None) for all."""

    mute_id: str
    subscriber: str
    author: str
    symbols: frozenset[str] | None = None
    entries: frozenset[str] | None = None
    until: datetime
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a subscriber is reached on a channel, and how that has been going; the address itself is not in it."""

    endpoint_id: str
    subscriber: str
    channel: str
    shown: str
    is_enabled: bool = True
    disabled_reason: str | None = None
    first_failed_at: datetime | None = None
    last_failed_at: datetime | None = None
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A subscriber with everything that decides what they hear; endpoints by channel."""

    subscriber: str
    subscriptions: Sequence[Subscription] = ()
    preferences: Preferences
    mutes: Sequence[Mute] = ()
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Everything one subscriber has, by id or channel, as it was read for a change."""

    subscriber: str
    subscriptions: Mapping[str, Subscription] = field(default_factory=dict)
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)
    mutes: Mapping[str, Mute] = field(default_factory=dict)
    preferences: Preferences
    documents: Mapping[str, Document] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A subscription that hears something of *symbol*, and why in words."""

    subscription: Subscription
    symbol: str
    entry: str | None = None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """
    A bar at which a rule fired or (``is_resolve``) went back.

    ``fired_at`` is the close of the bar at which it fired: the same as ``closed_at``, or earlier for a resolve.
    """

    closed_at: datetime
    value: float
    reason: str
    direction: str
    fired_at: datetime
    is_resolve: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An alert that was let through a window: when it occurred, and its id."""

    at: datetime
    alert_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Places taken in a cooldown or cap, in order of arrival; ``forgotten`` is the latest one no longer kept."""

    places: tuple[Place, ...] = ()
    forgotten: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """
    What is stored of a subscriber's cooldowns and caps: a window for each key.

    ``forgotten`` is the latest place of all keys that are no longer kept. The wire form is ``policy.windows_body``.
    """

    by_key: Mapping[str, Window] = field(default_factory=dict)
    forgotten: datetime | None = None


def subscription_id(subscriber: str) -> str:
    """The imported subscription of a subscriber (docs/events.md)."""
    return fact_id("subscription", subscriber)


def endpoint_id(subscriber: str, channel: str) -> str:
    """Where a subscriber is reached on a channel (docs/events.md)."""
    return fact_id("endpoint", subscriber, channel)


def preferences_id(subscriber: str) -> str:
    """The preferences of a subscriber (docs/events.md)."""
    return fact_id("preferences", subscriber)
