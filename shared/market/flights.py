"""
One call for many who ask the same at once.

In a process they share one task; between instances whoever holds the stored lease makes the call, and the others
look into storage until what they want is there, the call has failed, or the lease has ended and one takes over.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import uuid4

from shared import errors
from shared.clock import Clock
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConflictError,
    NotFoundError,
    RefusedError,
    StaleError,
    TransientError,
    TroopError,
    UnavailableError,
)
from shared.telemetry import get_logger, redact

log = get_logger(__name__)

CONTAINER, PARTITION = "quota", "flights"
LEASE = timedelta(seconds=12)
"""How long a call belongs to who makes it; a killed instance holds the others up for no longer."""
CALL = timedelta(seconds=10)
"""How long a call may take: it has ended before the lease does, so there are never two."""
TOLD = timedelta(seconds=2)
"""How long a failure answers for everybody who asks the same."""
FIRST_LOOK, LONGEST_LOOK = 0.03, 0.5
"""Seconds between two looks into storage, with jitter."""

type Fetch[T] = Callable[[], Awaitable[T]]


class Landed[T](Protocol):
    """Looks into storage for what another instance brought; None: nothing yet, and once *is_over* nothing at all."""

    async def __call__(self, *, is_over: bool) -> T | None: ...


@dataclass(slots=True)
class _Flight:
    task: asyncio.Task[Any]
    waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Flights:
    """Lets each of those who ask for the same thing at once have it, for one call."""

    documents: Documents
    wall: Clock
    _flying: dict[str, _Flight] = field(default_factory=dict, init=False)

    async def once[T](
        self,
        key: str,
        fetch: Fetch[T],
        landed: Landed[T],
        *,
        deadline: datetime | None = None,
        private: tuple[type[TroopError], ...] = (),
    ) -> T:
        """
        What *fetch* brings, whoever of those that ask for *key* makes the call.

        How a call ended answers for everybody who asks within two seconds of it, in any instance. Who is
        cancelled takes nothing from the others; the call is cancelled with the last of them. Trouble of a
        *private* kind concerns only who would have made the call: the next one tries.

        Raises what the call raised, or UnavailableError when somebody else's had not ended by *deadline*.
        """
        while True:
            flight = self._flying.get(key)
            ours = flight is None
            if flight is None:
                flight = _Flight(asyncio.ensure_future(self._fly(key, fetch, landed, deadline, private)))
                self._flying[key] = flight
            try:
                answer: T = await self._join(key, flight, until=None if ours else deadline)
            except private:
                if ours:
                    raise
                continue
            return answer

    async def _join(self, key: str, flight: _Flight, *, until: datetime | None) -> Any:  # noqa: ANN401 - what it brings
        """Wait for a flight; for another's, which may have more time than we, no longer than *until*."""
        flight.waiting += 1
        patience = asyncio.timeout((until - self.wall.now()).total_seconds() if until else None)
        try:
            async with patience:
                return await asyncio.shield(flight.task)
        except TimeoutError:
            if not patience.expired():
                raise
            raise UnavailableError("this is being fetched for somebody else", retry_after=TOLD) from None
        finally:
            flight.waiting -= 1
            if (flight.task.done() or not flight.waiting) and self._flying.get(key) is flight:
                del self._flying[key]
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                await asyncio.wait([flight.task])  # nothing goes on after the answer
                if not flight.task.cancelled():
                    flight.task.exception()  # nobody is left to hear of it

    async def _fly[T](
        self,
        key: str,
        fetch: Fetch[T],
        landed: Landed[T],
        deadline: datetime | None,
        private: tuple[type[TroopError], ...],
    ) -> T:
        wait = FIRST_LOOK
        while True:
            lease = await self._take(key)
            if lease is not None:
                return await self._call(lease, fetch, landed, private)
            if deadline is not None and self.wall.now() >= deadline:
                raise UnavailableError("another instance is fetching this", retry_after=TOLD)
            if (found := await landed(is_over=await self._is_over(key))) is not None:
                return found
            await asyncio.sleep(random.uniform(0.5, 1) * wait)  # noqa: S311 - jitter
            wait = min(wait * 1.5, LONGEST_LOOK)

    async def _take(self, key: str) -> Document | None:
        """The lease, or None while it is another instance's."""
        now = self.wall.now()
        document = Document(
            id=key,
            partition=PARTITION,
            sort=sort_key(now, key),
            body={"owner": uuid4().hex},
            expires_at=now + LEASE,
        )
        try:
            return await self.documents.create(CONTAINER, document)
        except ConflictError:
            return None

    async def _is_over(self, key: str) -> bool:
        """Whether the call of the one who had the lease has just ended; raises what it raised."""
        try:
            held = await self.documents.read(CONTAINER, PARTITION, key)
        except NotFoundError:
            return False  # given back, or ended by itself: it can be taken
        if trouble := held.body.get("trouble"):
            raise _trouble_of(trouble)
        return bool(held.body.get("is_over"))

    async def _call[T](
        self, lease: Document, fetch: Fetch[T], landed: Landed[T], private: tuple[type[TroopError], ...]
    ) -> T:
        told: Mapping[str, Any] | None = None
        try:
            # Somebody may have brought it between the caller's look and the lease.
            if (found := await landed(is_over=False)) is not None:
                told = _OVER
                return found
            async with asyncio.timeout(CALL.total_seconds()):
                answer = await fetch()
        except TimeoutError:
            trouble = UnavailableError("the provider took too long", retry_after=TOLD)
            told = _told(trouble)
            raise trouble from None
        except private:
            raise
        except (TransientError, RefusedError) as e:
            told = _told(e)
            raise
        else:
            told = _OVER
            return answer
        finally:
            await _to_the_end(self._end(lease, told))

    async def _end(self, lease: Document, told: Mapping[str, Any] | None) -> None:
        """Tell those who wait how the call ended; None: it came to nothing, so another may make it."""
        try:
            if told is None:
                await self.documents.delete(CONTAINER, lease)
                return
            ended = replace(lease, body={**lease.body, **told}, expires_at=self.wall.now() + TOLD)
            await self.documents.replace(CONTAINER, ended)
        except (NotFoundError, StaleError, TransientError) as e:
            log.info("flight.left", key=lease.id, reason=str(e))  # its lease ends by itself


async def _to_the_end(work: Awaitable[None]) -> None:
    """Finish a short piece of work although we are being cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


_OVER: Mapping[str, Any] = {"is_over": True}


def _told(trouble: TroopError) -> Mapping[str, Any]:
    retry_after = trouble.retry_after if isinstance(trouble, TransientError) else None
    return {
        "trouble": {
            "kind": type(trouble).__name__,
            "text": redact(str(trouble)),
            "retry_after_seconds": retry_after.total_seconds() if retry_after else None,
        }
    }


def _trouble_of(body: Mapping[str, Any]) -> TroopError:
    """The same trouble as its first hearer's; a class that only one module knows becomes its nearest kin here."""
    kind = getattr(errors, body["kind"], UnavailableError)
    if issubclass(kind, TransientError):
        seconds = body["retry_after_seconds"]
        return kind(body["text"], retry_after=timedelta(seconds=seconds) if seconds is not None else None)
    return kind(body["text"])
