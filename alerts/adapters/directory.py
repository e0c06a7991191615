"""
Who hears what, and where: everybody's rules in memory, and a count of changes that says when to read again.

At most every ``LOOK`` one small document is read; where it says that rules changed, those of the subscribers it names
are read again, or all where it names no longer all. A writer that died between a change and its count is made up for by
reading everything every ``RENEW``.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol

from pydantic import SecretStr

from alerts.adapters.rule_documents import (
    CONTAINER,
    DIRECTORY,
    PAGE,
    Partition,
    bump,
    changed_since,
    endpoint_body,
    endpoint_of,
    partition_of,
    read_partition,
    revision_of,
)
from alerts.logic import health
from alerts.logic.matching import Audience
from alerts.models import PUBLIC
from alerts.ports import Address
from alerts.subscriptions import Endpoint, Listener, Preferences, Subscription, endpoint_id
from shared.clock import Clock
from shared.documents import Document, Documents
from shared.errors import NotFoundError, StaleError
from shared.sealing import Sealer
from shared.telemetry import get_logger

log = get_logger(__name__)

LOOK = timedelta(seconds=2)
RENEW = timedelta(minutes=5)
TRIES = 10


class _Change(Protocol):
    def __call__(self, endpoint: Endpoint) -> Endpoint | None: ...


class DocumentDirectory:
    """The subscribers of the subscriptions file (*house*) and those in storage."""

    def __init__(self, documents: Documents, wall: Clock, sealer: Sealer, house: Sequence[Subscription] = ()) -> None:
        self._documents = documents
        self._wall = wall
        self._sealer = sealer
        self._house: dict[str, list[Subscription]] = {}
        for one in sorted(house, key=lambda s: s.subscriber != PUBLIC):
            self._house.setdefault(one.subscriber, []).append(one)
        self._stored: dict[str, Partition] = {}
        self._listeners: dict[str, Listener] = {}
        self._revision = -1
        self._looked_at: datetime | None = None
        self._renewed_at: datetime | None = None
        self._audience = Audience([])
        self._lock = asyncio.Lock()

    async def listeners(self) -> Audience:
        """Everybody with their rules, ``public`` first; at most a few seconds old."""
        if self._is_old(self._looked_at, LOOK):
            async with self._lock:
                if self._is_old(self._looked_at, LOOK):
                    await self._look()
        return self._audience

    async def listener(self, subscriber: str) -> Listener | None:
        """One of them; None: nobody of this name listens."""
        await self.listeners()
        return self._listeners.get(subscriber)

    def look_again(self) -> None:
        """Something was changed here: the next question is answered from storage."""
        self._looked_at = None

    async def address(self, subscriber: str, channel: str) -> Address | None:
        """
        Where to reach a subscriber now, opened for this one use; None where nobody is to be reached there.

        Raises:
            ConfigurationError: the key it was sealed with is not among ours; names it.
            InvalidPayloadError: what is stored was changed by somebody else.

        """
        await self.listeners()
        stored = self._stored.get(subscriber)
        endpoint = stored.endpoints.get(channel) if stored else None
        if stored is None or endpoint is None or not endpoint.is_enabled:
            return None
        opened = self._sealer.open(stored.sealed[channel], subscriber, channel)
        return Address(value=SecretStr(opened), shown=endpoint.shown, seal=stored.sealed[channel])

    async def failed(
        self, subscriber: str, channel: str, reason: str, now: datetime, *, is_gone: bool = False, seal: str = ""
    ) -> bool:
        """
        Note that an endpoint failed, for good if it *is_gone*; whether it was disabled by that just now.

        *seal* is that of the address that was tried: one that has taken its place meanwhile is not to blame.
        """

        def worse(endpoint: Endpoint) -> Endpoint | None:
            if not health.counts(endpoint, now, is_gone=is_gone):
                return None
            return health.failed(endpoint, reason, now, is_gone=is_gone)

        known = self._known(subscriber, channel)
        if known is not None and not health.counts(known, now, is_gone=is_gone):
            return False
        changed = await self._change(subscriber, channel, worse, seal=seal)
        if changed is None:
            return False
        if not changed.is_enabled:
            log.warning("endpoint.disabled", channel=channel, endpoint_id=changed.endpoint_id, reason=reason)
        return not changed.is_enabled

    async def worked(self, subscriber: str, channel: str, now: datetime) -> None:
        """Note that an endpoint took a message: its failures are forgotten."""
        known = self._known(subscriber, channel)
        if known is None or not known.failures:
            return
        await self._change(subscriber, channel, lambda endpoint: health.worked(endpoint) if endpoint.failures else None)

    # --- reading

    async def _look(self) -> None:
        now = self._wall.now()
        revision = await revision_of(self._documents)
        number = int(revision.body["revision"]) if revision else 0
        changed = changed_since(revision, self._revision) if revision and self._revision >= 0 else None
        if number != self._revision or self._is_old(self._renewed_at, RENEW):
            if changed is None or self._is_old(self._renewed_at, RENEW):
                self._stored = await self._read_all()
                self._listeners = {name: self._listener(name) for name in dict.fromkeys([*self._house, *self._stored])}
                self._renewed_at = now
            else:
                for subscriber in changed:
                    await self._read_one(subscriber)
            self._audience = Audience(list(self._listeners.values()))
            self._revision = number
        self._looked_at = now

    async def _read_all(self) -> dict[str, Partition]:
        by_subscriber: dict[str, list[Document]] = {}
        after: str | None = None
        while True:
            page = await self._documents.feed(CONTAINER, after=after, limit=PAGE)
            for document in page:
                if document.partition != DIRECTORY:
                    by_subscriber.setdefault(document.partition, []).append(document)
            if len(page) < PAGE:
                return {name: partition_of(name, found) for name, found in by_subscriber.items()}
            after = page[-1].sort
            await asyncio.sleep(0)

    async def _read_one(self, subscriber: str) -> None:
        found = await read_partition(self._documents, subscriber)
        self._stored.pop(subscriber, None)
        self._listeners.pop(subscriber, None)
        if found:
            self._stored[subscriber] = partition_of(subscriber, found)
        if found or subscriber in self._house:
            self._listeners[subscriber] = self._listener(subscriber)

    def _listener(self, name: str) -> Listener:
        stored = self._stored.get(name) or Partition(subscriber=name, preferences=Preferences(subscriber=name))
        return Listener(
            subscriber=name,
            subscriptions=(*self._house.get(name, ()), *stored.subscriptions),
            preferences=stored.preferences,
            mutes=stored.mutes,
            endpoints=stored.endpoints,
        )

    def _is_old(self, since: datetime | None, age: timedelta) -> bool:
        """Also where the clock went back: nothing is kept for ever."""
        return since is None or abs(self._wall.now() - since) >= age

    # --- how endpoints are doing

    def _known(self, subscriber: str, channel: str) -> Endpoint | None:
        stored = self._stored.get(subscriber)
        return stored.endpoints.get(channel) if stored else None

    async def _change(self, subscriber: str, channel: str, change: _Change, *, seal: str = "") -> Endpoint | None:
        """Change an endpoint as it is stored now; None where there was nothing to change."""
        for _ in range(TRIES):
            try:
                document = await self._documents.read(CONTAINER, subscriber, endpoint_id(subscriber, channel))
                before, sealed = endpoint_of(document), str(document.body["sealed"])
                after = change(before) if seal in ("", sealed) else None
                if after is None:
                    return None
                body = endpoint_body(after, sealed)
                await self._documents.replace(CONTAINER, document.with_body(body))
            except NotFoundError:
                return None
            except StaleError:
                continue
            self._remember(after)
            # Others must know it is in trouble, so that one of them can say that it works again; not how often.
            if bool(before.failures) != bool(after.failures) or before.is_enabled != after.is_enabled:
                await bump(self._documents, self._wall, [subscriber])
                self.look_again()
            return after
        raise StaleError(f"the {channel} endpoint of {subscriber} is being changed by others")

    def _remember(self, endpoint: Endpoint) -> None:
        stored = self._stored.get(endpoint.subscriber)
        if stored is not None:
            endpoints: Mapping[str, Endpoint] = {**stored.endpoints, endpoint.channel: endpoint}
            self._stored[endpoint.subscriber] = replace(stored, endpoints=endpoints)
            self._listeners[endpoint.subscriber] = self._listener(endpoint.subscriber)
