"""
What subscribers do with their rules: subscriptions, endpoints, preferences, mutes, and leaving by a link.

Everything is of one subscriber: who asks for something of another finds nothing, unless as an operator, who may read
and mute for others and is written down. Every change is decided on what is stored and written only if that still
holds, so limits hold however many ask at once.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import uuid4

from alerts.logic import addresses
from alerts.logic.policy import LONGEST_COOLDOWN
from alerts.logic.quiet import zone_of
from alerts.logic.unsubscribing import Leaving
from alerts.models import PUBLIC
from alerts.subscriptions import (
    ADDRESSED,
    Endpoint,
    Kind,
    Mute,
    Preferences,
    Rules,
    Subscription,
    endpoint_id,
    preferences_id,
)
from shared.clock import Clock, format_instant
from shared.errors import ConflictError, InvalidPayloadError, NotFoundError, StaleError
from shared.market.models import interval_of, symbol_of
from shared.telemetry import get_logger

log = get_logger(__name__)

MOST_SUBSCRIPTIONS = 100
MOST_MUTES = 10
MOST_SYMBOLS = 200
MOST_ENTRIES = 100
LONGEST_MUTE = timedelta(days=366)
TRIES = 10
_NAME = re.compile(r"[^\s|/\\?#\x00-\x1f\x7f]{1,100}")


class ChangedError(StaleError):
    """It is no longer what the caller saw last (If-Match)."""


class RuleBook(Protocol):
    """Keeps the rules of subscribers."""

    async def read(self, subscriber: str) -> Rules:
        """Everything a subscriber has, as stored now."""
        ...

    async def save(
        self,
        before: Rules,
        *,
        put: Sequence[Subscription | Mute | Preferences | Endpoint] = (),
        drop: Iterable[str] = (),
        addresses: Mapping[str, str] | None = None,
    ) -> Rules:
        """
        Write things and delete others by id, all or nothing; *addresses* are new ones, by channel.

        Raises:
            StaleError: the rules are no longer as they were read.
            ConfigurationError: there is no key to seal an address with.

        """
        ...


class Auditor(Protocol):
    """Writes down who did what to whom, and why."""

    async def record(
        self, actor: str, action: str, subject: str, reason: str, details: Mapping[str, Any]
    ) -> object: ...


class Links(Protocol):
    """Knows our own unsubscribe links."""

    def verify(self, token: str, *, now: datetime) -> Leaving:
        """
        What the holder of a link may end.

        Raises:
            InvalidPayloadError: it is none of ours, or has ended.

        """
        ...


class Tester(Protocol):
    """Sends test messages."""

    async def send_test(self, subscriber: str, channel: str) -> None:
        """Send one; raises what the channel raises."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who asks, and for whom: himself, or as an operator for another."""

    name: str
    subscriber: str

    @property
    def is_other(self) -> bool:
        return self.name != self.subscriber


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleService:
    """
    What a subscriber may do.

    *channels* are those that exist here; *webhook_base* is a place besides Discord where webhooks may lie.
    """

    book: RuleBook
    wall: Clock
    market: Clock
    audit: Auditor
    links: Links
    tester: Tester
    channels: Collection[str]
    webhook_base: str | None = None

    async def read(self, actor: Actor) -> Rules:
        """Everything a subscriber has."""
        if actor.is_other:
            await self.audit.record(actor.name, "rules.read", actor.subscriber, "", {})
        return await self.book.read(actor.subscriber)

    # --- subscriptions

    async def subscribe(self, wanted: Subscription) -> tuple[Rules, Subscription, bool]:
        """
        Add a subscription, or find the same one: a request sent again adds nothing. Whether it is new.

        Raises:
            InvalidPayloadError: names the field and what to write.
            ConflictError: there are as many as there may be.

        """
        for _ in range(TRIES):
            rules = await self.book.read(wanted.subscriber)
            draft = replace(self._checked(wanted, rules), since=self.market.now())
            for known in rules.subscriptions.values():
                if _same(known, draft):
                    return rules, known, False
            if len(rules.subscriptions) >= MOST_SUBSCRIPTIONS:
                raise ConflictError(f"you have {MOST_SUBSCRIPTIONS} subscriptions, which is the most: delete one first")
            new = replace(draft, subscription_id=str(uuid4()))
            try:
                return await self.book.save(rules, put=[new]), new, True
            except StaleError:
                continue
        raise _busy(wanted.subscriber)

    async def change_subscription(
        self, wanted: Subscription, is_current: Callable[[Rules, str], bool]
    ) -> tuple[Rules, Subscription]:
        """
        Put a subscription in the place of the stored one of its id, if *is_current* says that the caller knows it.

        Raises:
            NotFoundError: there is none.
            ChangedError: it is another than the caller knows.
            InvalidPayloadError: names the field and what to write.

        """
        id_ = wanted.subscription_id
        for _ in range(TRIES):
            rules = await self.book.read(wanted.subscriber)
            known = _found(rules.subscriptions, id_, "subscription")
            _must_be_current(rules, id_, is_current)
            new = replace(self._checked(wanted, rules), since=known.since)
            try:
                return await self.book.save(rules, put=[new]), new
            except StaleError:
                continue
        raise _busy(wanted.subscriber)

    async def unsubscribe(self, subscriber: str, id_: str, is_current: Callable[[Rules, str], bool]) -> None:
        """
        Delete a subscription.

        Raises:
            NotFoundError: there is none.
            ChangedError: it is another than the caller knows.

        """

        def decide(rules: Rules) -> str:
            _found(rules.subscriptions, id_, "subscription")
            _must_be_current(rules, id_, is_current)
            return id_

        await self._drop(subscriber, decide)

    # --- endpoints

    async def set_endpoint(self, subscriber: str, channel: str, text: str) -> tuple[Rules, Endpoint]:
        """
        Store where a subscriber is reached, sealed; an endpoint that was disabled is enabled by that.

        Raises:
            InvalidPayloadError: it is no address; the text shows nothing of it.
            ConfigurationError: there is no key to seal it with.

        """
        _must_have_address(channel)
        try:
            address = addresses.address_of(channel, text.strip(), webhook_base=self.webhook_base)
        except InvalidPayloadError as e:
            raise InvalidPayloadError(f"address: it {e}") from None
        endpoint = Endpoint(
            endpoint_id=endpoint_id(subscriber, channel),
            subscriber=subscriber,
            channel=channel,
            shown=addresses.masked(channel, address),
        )
        for _ in range(TRIES):
            rules = await self.book.read(subscriber)
            try:
                return await self.book.save(rules, put=[endpoint], addresses={channel: address}), endpoint
            except StaleError:
                continue
        raise _busy(subscriber)

    async def drop_endpoint(self, subscriber: str, channel: str) -> None:
        """
        Forget where a subscriber is reached on a channel.

        Raises:
            NotFoundError: nothing is known.

        """
        _must_have_address(channel)

        def decide(rules: Rules) -> str:
            return _found(rules.endpoints, channel, "endpoint of channel").endpoint_id

        await self._drop(subscriber, decide)

    async def test_endpoint(self, subscriber: str, channel: str) -> Endpoint:
        """
        Send a test message to an endpoint.

        Raises:
            NotFoundError: there is none.
            InvalidPayloadError: it is disabled; says what to do.

        """
        _must_have_address(channel)
        rules = await self.book.read(subscriber)
        endpoint = _found(rules.endpoints, channel, "endpoint of channel")
        if not endpoint.is_enabled:
            raise InvalidPayloadError(
                f"this address is disabled ({endpoint.disabled_reason}): PUT it again to enable it, then test"
            )
        await self.tester.send_test(subscriber, channel)
        return endpoint

    # --- preferences

    async def prefer(self, wanted: Preferences, is_current: Callable[[Rules, str], bool]) -> Rules:
        """
        Store preferences.

        Raises:
            InvalidPayloadError: names the field and what to write.
            ChangedError: they are others than the caller knows.

        """
        try:
            zone_of(wanted.zone)
        except InvalidPayloadError as e:
            raise InvalidPayloadError(f"zone: {e}") from None
        if (wanted.quiet_from is None) != (wanted.quiet_to is None):
            raise InvalidPayloadError("quiet_from and quiet_to belong together: give both, or null for both")
        if wanted.quiet_from is not None and wanted.quiet_from == wanted.quiet_to:
            raise InvalidPayloadError("quiet_to: quiet hours that end when they begin are none: give null for both")
        for _ in range(TRIES):
            rules = await self.book.read(wanted.subscriber)
            _must_be_current(rules, preferences_id(wanted.subscriber), is_current)
            try:
                return await self.book.save(rules, put=[wanted])
            except StaleError:
                continue
        raise _busy(wanted.subscriber)

    # --- mutes

    async def mute(self, actor: Actor, wanted: Mute) -> Mute:
        """
        Silence alerts until an end; mutes that have ended make room.

        Raises:
            InvalidPayloadError: names the field and what to write.
            ConflictError: there are as many as there may be.

        """
        now = self.market.now()
        if not now < wanted.until <= now + LONGEST_MUTE:
            raise InvalidPayloadError(
                f"until: it must lie behind {format_instant(now)} (market time), by {LONGEST_MUTE.days} days at most"
            )
        if actor.is_other and not wanted.reason.strip():
            raise InvalidPayloadError("reason: say why you mute for somebody else; it is shown to them")
        checked = replace(
            wanted,
            mute_id=str(uuid4()),
            subscriber=actor.subscriber,
            author=actor.name,
            symbols=_symbols(wanted.symbols),
            entries=_entries(wanted.entries),
        )
        for _ in range(TRIES):
            rules = await self.book.read(actor.subscriber)
            over = [mute.mute_id for mute in rules.mutes.values() if mute.until <= now]
            running = [mute for mute in rules.mutes.values() if mute.until > now]
            same = [mute for mute in running if replace(mute, mute_id=checked.mute_id) == checked]
            if same:
                return same[0]
            if len(running) >= MOST_MUTES:
                raise ConflictError(f"{MOST_MUTES} mutes are running, which is the most: delete one first")
            if actor.is_other:
                details = {"mute_id": checked.mute_id, "until": format_instant(checked.until)}
                await self.audit.record(actor.name, "mute.create", actor.subscriber, checked.reason, details)
            try:
                await self.book.save(rules, put=[checked], drop=over)
            except StaleError:
                continue
            return checked
        raise _busy(actor.subscriber)

    async def unmute(self, actor: Actor, mute_id: str, reason: str = "") -> None:
        """
        End a mute before its time.

        Raises:
            NotFoundError: there is none.

        """

        def decide(rules: Rules) -> str:
            _found(rules.mutes, mute_id, "mute")
            return mute_id

        if actor.is_other:
            decide(await self.book.read(actor.subscriber))
            await self.audit.record(actor.name, "mute.delete", actor.subscriber, reason, {"mute_id": mute_id})
        await self._drop(actor.subscriber, decide)

    # --- links

    def leaving(self, token: str) -> Leaving:
        """
        What a link would end; changes nothing.

        Raises:
            InvalidPayloadError: it is none of ours, or has ended.

        """
        return self.links.verify(token, now=self.wall.now())

    async def leave(self, token: str) -> Leaving:
        """
        End what a link is about: a subscription's use of the channel, or everything on it. Again changes nothing.

        Raises:
            InvalidPayloadError: it is none of ours, or has ended.

        """
        leaving = self.leaving(token)
        for _ in range(TRIES):
            rules = await self.book.read(leaving.subscriber)
            put: list[Subscription | Endpoint] = []
            drop: list[str] = []
            if leaving.subscription_id is None:
                endpoint = rules.endpoints.get(leaving.channel)
                if endpoint is not None and endpoint.is_enabled:
                    why = "unsubscribed by the link in a message"
                    put.append(replace(endpoint, is_enabled=False, disabled_reason=why))
            elif (asked := rules.subscriptions.get(leaving.subscription_id)) and leaving.channel in asked.channels:
                left = tuple(channel for channel in asked.channels if channel != leaving.channel)
                if left:
                    put.append(replace(asked, channels=left))
                else:
                    drop.append(asked.subscription_id)
            if not put and not drop:
                return leaving
            try:
                await self.book.save(rules, put=put, drop=drop)
            except StaleError:
                continue
            log.info("subscriber.left", channel=leaving.channel, subscription_id=leaving.subscription_id)
            return leaving
        raise _busy(leaving.subscriber)

    # --- small things

    async def _drop(self, subscriber: str, decide: Callable[[Rules], str]) -> None:
        for _ in range(TRIES):
            rules = await self.book.read(subscriber)
            id_ = decide(rules)
            try:
                await self.book.save(rules, drop=[id_])
            except StaleError:
                continue
            return
        raise _busy(subscriber)

    def _checked(self, wanted: Subscription, rules: Rules) -> Subscription:
        """A subscription that can be meant, in the form in which it is stored."""
        channels = tuple(dict.fromkeys(wanted.channels))
        for channel in channels:
            if channel not in self.channels:
                there_are = ", ".join(sorted(self.channels))
                raise InvalidPayloadError(f"channels: {channel[:40]} does not exist here; choose from {there_are}")
            if channel in ADDRESSED and channel not in rules.endpoints:
                raise InvalidPayloadError(
                    f"channels: nobody knows your {channel} address: PUT /api/endpoints/{channel} first"
                )
        checked = replace(wanted, channels=channels, symbols=_symbols(wanted.symbols), entries=_entries(wanted.entries))
        if checked.interval is not None:
            try:
                checked = replace(checked, interval=str(interval_of(checked.interval)))
            except InvalidPayloadError as e:
                raise InvalidPayloadError(f"interval: {e}") from None
        if checked.cooldown is not None and checked.cooldown > LONGEST_COOLDOWN:
            raise InvalidPayloadError(f"cooldown_minutes: at most {LONGEST_COOLDOWN // timedelta(minutes=1)}")
        return _fitting(checked)


_FIELDS = {
    Kind.SIGNAL: ("entries", "min_strength", "min_confidence"),
    Kind.PRICE: ("price_above", "price_below", "hysteresis"),
    Kind.MOVE: ("percent", "window", "hysteresis"),
    Kind.VOLUME: ("times_usual", "window", "hysteresis"),
}
"""Fields that only some kinds have."""
_USUAL = Subscription(subscriber="", channels=())


def _fitting(asked: Subscription) -> Subscription:
    """
    The subscription with what its kind needs.

    Raises:
        InvalidPayloadError: a field that it needs is missing, or one that it has not is given.

    """
    allowed = _FIELDS[asked.kind]
    for name in dict.fromkeys(name for names in _FIELDS.values() for name in names):
        if name not in allowed and getattr(asked, name) != getattr(_USUAL, name):
            kinds = " and ".join(kind.value for kind, names in _FIELDS.items() if name in names)
            raise InvalidPayloadError(f"{name}: only subscriptions of kind {kinds} have it: leave it out")
    if asked.kind is Kind.SIGNAL:
        return asked
    if asked.kind is Kind.PRICE:
        above, below = asked.price_above, asked.price_below
        if above is None and below is None:
            raise InvalidPayloadError("price_above: give it, or price_below, or both")
        if above is not None and below is not None and above <= below:
            raise InvalidPayloadError("price_above: it must be higher than price_below")
        if asked.symbols is None:
            raise InvalidPayloadError("symbols: a price is one of certain symbols: name them")
        if asked.directions is not None:
            raise InvalidPayloadError("directions: price_above and price_below say the direction: leave it out")
    if asked.kind is Kind.MOVE and asked.percent is None:
        raise InvalidPayloadError("percent: give the move in percent, such as 5")
    if asked.kind is Kind.VOLUME:
        if asked.times_usual is None:
            raise InvalidPayloadError("times_usual: give how many times the usual volume, such as 3")
        if asked.directions is not None:
            raise InvalidPayloadError("directions: a volume has none: leave it out")
    return replace(asked, interval=asked.interval or "1d")


def _symbols(names: frozenset[str] | None) -> frozenset[str] | None:
    if names is None:
        return None
    if not 1 <= len(names) <= MOST_SYMBOLS:
        raise InvalidPayloadError(f"symbols: give 1 to {MOST_SYMBOLS}, or null for all")
    try:
        return frozenset(map(symbol_of, names))
    except InvalidPayloadError as e:
        raise InvalidPayloadError(f"symbols: {e}") from None


def _entries(names: frozenset[str] | None) -> frozenset[str] | None:
    if names is None:
        return None
    if not 1 <= len(names) <= MOST_ENTRIES:
        raise InvalidPayloadError(f"entries: give 1 to {MOST_ENTRIES}, or null for all")
    if any(not name or len(name) > 100 or "|" in name or not name.isprintable() for name in names):
        raise InvalidPayloadError("entries: use the names of entries, such as sma-10-30")
    return names


def _same(known: Subscription, draft: Subscription) -> bool:
    """Whether two ask for the same."""
    return replace(known, subscription_id="", since=None) == replace(draft, subscription_id="", since=None)


def _found[T](things: Mapping[str, T], id_: str, what: str) -> T:
    try:
        return things[id_]
    except KeyError:
        raise NotFoundError(f"you have no {what} {id_[:64]}") from None


def _must_be_current(rules: Rules, id_: str, is_current: Callable[[Rules, str], bool]) -> None:
    if not is_current(rules, id_):
        raise ChangedError("it was changed since you read it: GET it again, then decide again")


def _must_have_address(channel: str) -> None:
    if channel not in ADDRESSED:
        raise NotFoundError(f"{channel[:40]} has no addresses: there are {' and '.join(ADDRESSED)}")


def _busy(subscriber: str) -> StaleError:
    return StaleError(f"the rules of {subscriber} are being changed by others", retry_after=timedelta(seconds=1))


def actor_of(name: str, wanted: str | None) -> Actor:
    """
    Who asks for whom; whether they may is the caller's to know.

    Raises:
        InvalidPayloadError: nobody can have this name.

    """
    subscriber = wanted or name
    if not _NAME.fullmatch(subscriber) or not subscriber.isprintable():
        raise InvalidPayloadError("subscriber: a name has 1 to 100 characters, without spaces and | / \\ ? #")
    if subscriber == PUBLIC or subscriber.startswith(("guest-", "_")):
        raise InvalidPayloadError(f"subscriber: {subscriber[:40]} is built in and has no rules of its own")
    return Actor(name=name, subscriber=subscriber)
