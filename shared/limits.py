"""
How much one client may ask: so many calls a minute, and so many a day where an endpoint says so.

Calls a minute are counted in this process alone: they keep one client from taking it all, so each instance may keep
its own count. What an endpoint allows a day is a promise, so it is counted in storage, for all instances together.
"""

import asyncio
import hashlib
import ipaddress
import math
import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

from shared.clock import Clock
from shared.documents import Document, Documents, sort_key
from shared.errors import ConflictError, NotFoundError, RateLimitedError, StaleError
from shared.identity import Caller

CONTAINER = "quota"
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
CLIENTS = 10_000
"""How many clients a process remembers; who was not seen for longest is forgotten, and begins anew."""
TRIES = 20


def address_of(headers: Mapping[str, str]) -> str | None:
    """
    The address a request came from, as the platform saw it; None where nobody wrote it down.

    Azure's front end appends the address it was called from to X-Forwarded-For, so only the last one is true: what
    stands before it is what the client says of itself. Without a front end (a laptop) there is no such header; a
    client who writes one there only names itself. An IPv6 address counts as its /64, which is what one client has.
    """
    last = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    host = last.removeprefix("[").partition("]")[0] if last.startswith("[") else last
    if host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address.packed[:8] + bytes(8), 64)))
    return str(address)


def client_of(caller: Caller, headers: Mapping[str, str]) -> str | None:
    """
    Who is counted: the subject of a token, else the address; None for who cannot be told apart.

    Who shows the function key and no token is an operator's program, and is not counted a minute.
    """
    if caller.is_known:
        return f"subject {caller.subject}"
    if caller.is_key:
        return None
    address = address_of(headers)
    return f"address {address}" if address else None


@dataclass(slots=True)
class _Bucket:
    left: float
    at: datetime


class RateLimit:
    """Calls a minute for each client of this process: a whole minute's may come at once. 0 is no limit."""

    def __init__(self, wall: Clock, per_minute: int, *, clients: int = CLIENTS) -> None:
        self._wall = wall
        self._per_minute = per_minute
        self._clients = clients
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, client: str) -> None:
        """
        Count one call.

        Raises:
            RateLimitedError: this client has none left; it says when there is one again.

        """
        if not self._per_minute:
            return
        now = self._wall.now()
        bucket = self._buckets.pop(client, None) or _Bucket(self._per_minute, now)
        self._buckets[client] = bucket
        if len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        # A wall clock that was put back gives nothing, and takes nothing away.
        gone = max(now - bucket.at, timedelta())
        bucket.left = min(self._per_minute, bucket.left + gone / MINUTE * self._per_minute)
        bucket.at = now
        if bucket.left < 1:
            wait = timedelta(seconds=math.ceil((1 - bucket.left) / self._per_minute * 60))
            raise RateLimitedError(
                f"you may call {self._per_minute:,} times a minute: wait {wait.total_seconds():.0f} s", retry_after=wait
            )
        bucket.left -= 1


class DailyQuota:
    """What one client may do in one UTC day, counted in storage."""

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall

    async def take(self, client: str, what: str, most: int) -> None:
        """
        Count one call of *what*, of which there are *most* a day.

        Raises:
            RateLimitedError: today's are used; it says how long today still lasts.

        """
        for _ in range(TRIES):
            now = self._wall.now()
            tomorrow = datetime.combine(now.date(), time(), UTC) + DAY
            # Who it is stays unknown to whoever reads the container.
            partition = f"client-{hashlib.blake2b(client.encode(), digest_size=16).hexdigest()}"
            id_ = f"{what}-{now.date()}"
            try:
                stored = await self._documents.read(CONTAINER, partition, id_)
            except NotFoundError:
                stored = None
            used = int(stored.body["used"]) if stored else 0
            if used >= most:
                raise RateLimitedError(f"you may do this {most:,} times a day (UTC)", retry_after=tomorrow - now)
            try:
                if stored:
                    await self._documents.replace(CONTAINER, stored.with_body({"used": used + 1}))
                else:
                    sort = sort_key(now, f"{partition}-{id_}")
                    new = Document(id=id_, partition=partition, sort=sort, body={"used": 1}, expires_at=tomorrow + DAY)
                    await self._documents.create(CONTAINER, new)
            except (ConflictError, StaleError, NotFoundError):
                await asyncio.sleep(random.uniform(0.002, 0.02))  # noqa: S311 - jitter: a call of the same client was first
                continue
            return
        raise StaleError("too many calls of yours at once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the Api asks before it lets a call through."""

    rate: RateLimit
    quota: DailyQuota
