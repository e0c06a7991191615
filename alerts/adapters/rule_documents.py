"""
What subscribers ask for, over Documents: container rules, partition subscriber.

One document a subscription, endpoint (its address sealed), mute, and one of preferences; a guard makes every change of
a subscriber's rules one conditional batch. In partition ``_directory`` one document counts all changes and names whom
they were about, so that readers may keep everything and still see a change within seconds.

A subscription's document says only what differs from the default, so those of an older import are read as they are.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from typing import Any

from alerts.logic.quiet import zone_of
from alerts.models import Severity
from alerts.subscriptions import (
    Digest,
    Endpoint,
    Kind,
    Mute,
    Preferences,
    Rules,
    Subscription,
    preferences_id,
)
from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, Operation, sort_key
from shared.errors import ConflictError, InvalidPayloadError, NotFoundError, StaleError, UnavailableError
from shared.events import fact_id
from shared.sealing import Sealer
from shared.telemetry import get_logger

log = get_logger(__name__)

CONTAINER = "rules"
DIRECTORY, REVISION = "_directory", "revision"
PAGE = 500
REMEMBERED = 200
"""Changes whose subscribers the revision document names; who missed more reads everything again."""
TRIES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Everything that is stored of one subscriber, read; what cannot be read is left out and logged."""

    subscriber: str
    subscriptions: tuple[Subscription, ...] = ()
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)
    mutes: tuple[Mute, ...] = ()
    preferences: Preferences
    sealed: Mapping[str, str] = field(default_factory=dict)


class RuleDocuments:
    """
    Reads and changes the rules of one subscriber.

    *on_change* is called after every change of this process.
    """

    def __init__(
        self,
        documents: Documents,
        wall: Clock,
        sealer: Sealer,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._documents = documents
        self._wall = wall
        self._sealer = sealer
        self._on_change = on_change

    async def read(self, subscriber: str) -> Rules:
        """Everything a subscriber has, as stored now."""
        found = await read_partition(self._documents, subscriber)
        part = partition_of(subscriber, found)
        return Rules(
            subscriber=subscriber,
            subscriptions={s.subscription_id: s for s in part.subscriptions},
            endpoints=part.endpoints,
            mutes={m.mute_id: m for m in part.mutes},
            preferences=part.preferences,
            documents={document.id: document for document in found},
        )

    async def save(
        self,
        before: Rules,
        *,
        put: Sequence[Subscription | Mute | Preferences | Endpoint] = (),
        drop: Iterable[str] = (),
        addresses: Mapping[str, str] | None = None,
    ) -> Rules:
        """
        Write things of a subscriber and delete others by id, all or nothing; *addresses* are new ones, by channel.

        Raises:
            StaleError: the rules are no longer as they were read: read again, then decide again.
            ConfigurationError: there is no key to seal an address with.

        """
        operations = [self._operation(before, self._document(before, one, addresses or {})) for one in put]
        operations += [Operation(kind="delete", document=before.documents[id_]) for id_ in drop]
        guard_id = fact_id("rules-guard", before.subscriber)
        guard = before.documents.get(guard_id)
        changes = int(guard.body["changes"]) + 1 if guard else 1
        body = {"kind": "guard", "subscriber": before.subscriber, "changes": changes}
        operations.append(self._operation(before, self._made(before, guard_id, body)))
        try:
            await self._documents.batch(CONTAINER, operations)
        except (ConflictError, NotFoundError) as e:
            raise StaleError(f"the rules of {before.subscriber} were changed by somebody else") from e
        await self.tell(before.subscriber)
        return await self.read(before.subscriber)

    async def tell(self, subscriber: str) -> None:
        """Let every reader know that a subscriber's rules may have changed."""
        await bump(self._documents, self._wall, [subscriber])
        self._on_change()

    def _document(
        self, before: Rules, one: Subscription | Mute | Preferences | Endpoint, addresses: Mapping[str, str]
    ) -> Document:
        match one:
            case Subscription():
                return self._made(before, one.subscription_id, subscription_body(one))
            case Mute():
                return self._made(before, one.mute_id, mute_body(one))
            case Preferences():
                return self._made(before, preferences_id(one.subscriber), preferences_body(one))
            case Endpoint():
                stored = before.documents.get(one.endpoint_id)
                address = addresses.get(one.channel)
                sealed = (
                    self._sealer.seal(address, one.subscriber, one.channel)
                    if address is not None
                    else str(stored.body["sealed"] if stored else "")
                )
                return self._made(before, one.endpoint_id, endpoint_body(one, sealed))

    def _made(self, before: Rules, id_: str, body: Mapping[str, Any]) -> Document:
        stored = before.documents.get(id_)
        if stored is not None:
            return stored.with_body(body)
        return Document(id=id_, partition=before.subscriber, sort=sort_key(self._wall.now(), id_), body=body)

    @staticmethod
    def _operation(before: Rules, document: Document) -> Operation:
        return Operation(kind="replace" if document.id in before.documents else "create", document=document)


# --- the count of changes


async def revision_of(documents: Documents) -> Document | None:
    """The document that counts all changes; None before the first."""
    try:
        return await documents.read(CONTAINER, DIRECTORY, REVISION)
    except NotFoundError:
        return None


async def bump(documents: Documents, wall: Clock, subscribers: Sequence[str]) -> None:
    """
    Count a change of these subscribers' rules.

    Raises:
        UnavailableError: so many others change rules just now that ours could not be counted: do it again.

    """
    for attempt in range(TRIES):
        stored = await revision_of(documents)
        number = int(stored.body["revision"]) + 1 if stored else 1
        known = list(stored.body["changed"]) if stored else []
        changed = [*known, *([number, name] for name in subscribers)]
        # A change of more than is remembered leaves a gap, and whoever meets one reads everything.
        body = {"kind": REVISION, "revision": number, "changed": _recent(changed)}
        try:
            if stored:
                await documents.replace(CONTAINER, stored.with_body(body))
            else:
                fresh = Document(id=REVISION, partition=DIRECTORY, sort=sort_key(wall.now(), REVISION), body=body)
                await documents.create(CONTAINER, fresh)
        except (StaleError, ConflictError, NotFoundError):
            await asyncio.sleep(random.uniform(0, 0.002 * min(attempt + 1, 25)))  # noqa: S311 - only spreads them
            continue
        return
    raise UnavailableError("rules are being changed by many at once: try again", retry_after=timedelta(seconds=1))


def _recent(changed: list[Any]) -> list[Any]:
    """The last changes, each whole: a number of which some subscribers are cut off is not there at all."""
    if len(changed) <= REMEMBERED:
        return changed
    cut_off = changed[-REMEMBERED - 1][0]
    return [change for change in changed[-REMEMBERED:] if change[0] != cut_off]


def changed_since(revision: Document, known: int) -> set[str] | None:
    """Whose rules changed since revision *known*; None if that is no longer known."""
    number: int = revision.body["revision"]
    if known > number:
        return None
    changes = [(int(at), str(name)) for at, name in revision.body["changed"] if at > known]
    if {at for at, _ in changes} != set(range(known + 1, number + 1)):
        return None
    return {name for _, name in changes}


# --- bodies


async def read_partition(documents: Documents, subscriber: str) -> list[Document]:
    """Every document of a subscriber."""
    found: list[Document] = []
    while True:
        after = found[-1].sort if found else None
        page = await documents.page(CONTAINER, subscriber, after=after, limit=PAGE)
        found += page
        if len(page) < PAGE:
            return found


def partition_of(subscriber: str, documents: Iterable[Document]) -> Partition:
    """What the documents of a subscriber say."""
    subscriptions: list[Subscription] = []
    endpoints: dict[str, Endpoint] = {}
    sealed: dict[str, str] = {}
    mutes: list[Mute] = []
    preferences = Preferences(subscriber=subscriber)
    for document in documents:
        body = document.body
        try:
            match body.get("kind"):
                case "subscription":
                    subscriptions.append(subscription_of(document))
                case "endpoint":
                    endpoint = endpoint_of(document)
                    endpoints[endpoint.channel] = endpoint
                    sealed[endpoint.channel] = str(body["sealed"])
                case "mute":
                    mutes.append(mute_of(document))
                case "preferences":
                    preferences = preferences_of(document)
                case _:
                    continue
        except (KeyError, TypeError, ValueError, InvalidPayloadError) as e:
            # Written by a newer version, or by hand: what one subscriber has must not silence all the others.
            log.error("rule.unreadable", document_id=document.id, error=type(e).__name__)  # noqa: TRY400
    return Partition(
        subscriber=subscriber,
        subscriptions=tuple(subscriptions),
        endpoints=endpoints,
        mutes=tuple(mutes),
        preferences=preferences,
        sealed=sealed,
    )


_PLAIN = (
    "min_confidence",
    "interval",
    "price_above",
    "price_below",
    "percent",
    "window",
    "times_usual",
    "hysteresis",
    "cap_per_day",
    "resolves",
)
_PLAINEST = Subscription(subscriber="", channels=())


def subscription_body(s: Subscription) -> dict[str, Any]:
    """A subscription as it is stored."""
    body: dict[str, Any] = {
        "kind": "subscription",
        "subscriber": s.subscriber,
        "channels": list(s.channels),
        "symbols": _listed(s.symbols),
        "entries": _listed(s.entries),
        "min_strength": s.min_strength,
        "severity": s.severity.value,
    }
    more: dict[str, Any] = {
        "rule": s.kind.value,
        "directions": _listed(s.directions),
        "digest": s.digest.value if s.digest else None,
        "since": format_instant(s.since) if s.since else None,
        **{name: getattr(s, name) for name in _PLAIN},
        "cooldown": _seconds(s.cooldown),
        "freshness": _seconds(s.freshness),
    }
    usual = {"rule": Kind.SIGNAL.value, **{name: getattr(_PLAINEST, name) for name in _PLAIN}}
    return body | {name: value for name, value in more.items() if value != usual.get(name)}


def subscription_of(document: Document) -> Subscription:
    """What a stored subscription says."""
    b = document.body
    return Subscription(
        subscription_id=document.id,
        subscriber=document.partition,
        channels=tuple(b["channels"]),
        kind=Kind(b.get("rule", Kind.SIGNAL)),
        symbols=_set(b["symbols"]),
        entries=_set(b["entries"]),
        directions=_set(b.get("directions")),
        min_strength=float(b["min_strength"]),
        severity=Severity(b["severity"]),
        digest=Digest(b["digest"]) if "digest" in b else None,
        since=parse_instant(b["since"]) if "since" in b else None,
        **{name: b[name] for name in _PLAIN if name in b},
        cooldown=_span(b.get("cooldown")),
        freshness=_span(b.get("freshness")),
    )


def endpoint_body(e: Endpoint, sealed: str) -> dict[str, Any]:
    """An endpoint as it is stored; its address in sealed form only."""
    body: dict[str, Any] = {
        "kind": "endpoint",
        "subscriber": e.subscriber,
        "channel": e.channel,
        "sealed": sealed,
        "shown": e.shown,
    }
    if not e.is_enabled:
        body |= {"is_enabled": False, "disabled_reason": e.disabled_reason}
    if e.failures:
        body |= {
            "failures": e.failures,
            "first_failed_at": format_instant(e.first_failed_at) if e.first_failed_at else None,
            "last_failed_at": format_instant(e.last_failed_at) if e.last_failed_at else None,
        }
    return body


def endpoint_of(document: Document) -> Endpoint:
    """What a stored endpoint says."""
    b = document.body
    return Endpoint(
        endpoint_id=document.id,
        subscriber=document.partition,
        channel=str(b["channel"]),
        shown=str(b["shown"]),
        is_enabled=bool(b.get("is_enabled", True)),
        disabled_reason=b.get("disabled_reason"),
        first_failed_at=_instant(b.get("first_failed_at")),
        last_failed_at=_instant(b.get("last_failed_at")),
        failures=int(b.get("failures", 0)),
    )


def mute_body(m: Mute) -> dict[str, Any]:
    """A mute as it is stored."""
    return {
        "kind": "mute",
        "subscriber": m.subscriber,
        "author": m.author,
        "symbols": _listed(m.symbols),
        "entries": _listed(m.entries),
        "until": format_instant(m.until),
        "reason": m.reason,
    }


def mute_of(document: Document) -> Mute:
    """What a stored mute says."""
    b = document.body
    return Mute(
        mute_id=document.id,
        subscriber=document.partition,
        author=str(b["author"]),
        symbols=_set(b["symbols"]),
        entries=_set(b["entries"]),
        until=parse_instant(b["until"]),
        reason=str(b["reason"]),
    )


def preferences_body(p: Preferences) -> dict[str, Any]:
    """Preferences as they are stored."""
    return {
        "kind": "preferences",
        "subscriber": p.subscriber,
        "zone": p.zone,
        "quiet_from": f"{p.quiet_from:%H:%M}" if p.quiet_from else None,
        "quiet_to": f"{p.quiet_to:%H:%M}" if p.quiet_to else None,
        "cap_per_day": p.cap_per_day,
    }


def preferences_of(document: Document) -> Preferences:
    """What stored preferences say."""
    b = document.body
    zone_of(b["zone"])  # a zone that this machine does not know would stop every judgement
    return Preferences(
        subscriber=document.partition,
        zone=b["zone"],
        quiet_from=time.fromisoformat(b["quiet_from"]) if b["quiet_from"] else None,
        quiet_to=time.fromisoformat(b["quiet_to"]) if b["quiet_to"] else None,
        cap_per_day=b["cap_per_day"],
    )


def _listed(names: frozenset[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


def _set(names: Iterable[str] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)


def _seconds(span: timedelta | None) -> float | None:
    return None if span is None else span.total_seconds()


def _span(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


def _instant(text: str | None) -> datetime | None:
    return parse_instant(text) if text else None
