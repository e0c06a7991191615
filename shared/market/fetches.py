"""
Queued requests for history: who asked for what, and how far it has come.

What is left of a fetch is worked out from what is stored, so a run that was killed at any moment is simply done
again; a fetch that owes work has a ``due_at`` on the wall clock.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    PermanentError,
    StaleError,
    TransientError,
)
from shared.events import fact_id
from shared.market.callers import Caller
from shared.market.gaps import Kind
from shared.market.library import Library, Looked
from shared.market.models import Interval, Priority
from shared.market.stores import SYSTEM
from shared.telemetry import get_logger, redact, span

log = get_logger(__name__)

PARTITION = "fetches"
BUDGET = timedelta(seconds=8)
LEASE = timedelta(seconds=30)
"""How long a fetch belongs to the run that does it; a killed run's fetch is taken up again after that."""
DUE_LIMIT = 100
KEPT = timedelta(days=90)
AGAIN = timedelta(seconds=15)
"""When to try again what passes by itself and does not say when."""
NOT_YET = timedelta(minutes=15)
"""When to ask again for bars the provider has not got yet."""
SHOWN_RANGES = 20


class State(StrEnum):
    """Where a fetch stands; the last three are its ends."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return self in (State.DONE, State.FAILED, State.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The bars of a series that close in (since, until]."""

    symbol: str
    interval: Interval
    since: datetime
    until: datetime
    priority: Priority = Priority.ASKED

    @property
    def fetch_id(self) -> str:
        """The same question is the same fetch, however urgent."""
        return fact_id("fetch", self.symbol, self.interval, format_instant(self.since), format_instant(self.until))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """
    A request for history and how far it has come.

    ``bars``: how many of the bars asked for are held. ``calls``: how many requests to providers it took.
    ``left``: the first ranges still missing, as (first close, last close, bars).
    """

    wanted: Wanted
    caller: str
    requested_at: datetime
    state: State = State.QUEUED
    bars: int = 0
    calls: int = 0
    left: Sequence[tuple[datetime, datetime, int]] = ()
    left_bars: int = 0
    reason: str | None = None
    retry_at: datetime | None = None
    updated_at: datetime | None = None
    document: Document | None = field(default=None, repr=False)

    @property
    def fetch_id(self) -> str:
        return self.wanted.fetch_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetches:
    """Takes requests for history, works them off in slices, and says how they stand."""

    documents: Documents
    library: Library
    wall: Clock

    async def request(self, wanted: Wanted, caller: Caller) -> Fetch:
        """
        Queue a fetch; the same one again is the one that is there.

        One that failed is queued once more, and so is one that was done before all its bars had closed.

        Raises:
            InvalidPayloadError: the range ends before it begins, or nothing of it has closed yet.
            CappedError: the caller's share of the day is spent.

        """
        if wanted.since >= wanted.until:
            raise InvalidPayloadError(
                f"the range ends ({format_instant(wanted.until)}) before it begins ({format_instant(wanted.since)})"
            )
        looked = await self.library.look(wanted.symbol, wanted.interval, since=wanted.since, until=wanted.until)
        if not looked.stretches:
            raise InvalidPayloadError(
                f"no {wanted.interval} bar closes from {format_instant(wanted.since)} to "
                f"{format_instant(wanted.until)}, as far as the market's clock has come"
            )
        now = self.wall.now()
        new = Fetch(wanted=wanted, caller=caller.id, requested_at=now)
        try:
            known = await self.get(wanted.fetch_id)
        except NotFoundError:
            await self.library.callers.check(caller)
            try:
                return await self._create(_seen(new, looked), due_at=now)
            except ConflictError:
                return await self.get(wanted.fetch_id)
        if known.state not in (State.FAILED, State.CANCELLED) and not (known.state is State.DONE and looked.missing):
            return known
        await self.library.callers.check(caller)
        return await self._save(replace(_seen(new, looked), document=known.document), due_at=now)

    async def get(self, fetch_id: str) -> Fetch:
        """
        A fetch as it stands.

        Raises:
            NotFoundError: there is none with this id.

        """
        try:
            return _fetch_of(await self.documents.read(SYSTEM, PARTITION, fetch_id))
        except NotFoundError:
            raise NotFoundError(f"there is no fetch {fetch_id}: POST /api/fetches makes one") from None

    async def cancel(self, fetch_id: str) -> Fetch:
        """Stop a fetch; what it has stored stays, and one that is over stays as it ended."""
        while True:
            fetch = await self.get(fetch_id)
            if fetch.state.is_over:
                return fetch
            try:
                return await self._save(replace(fetch, state=State.CANCELLED, retry_at=None), due_at=None)
            except StaleError:
                continue  # the run that does it wrote how far it has come

    async def work(self) -> int:
        """Work due fetches off for at most 8 s, a slice each in turn; returns how many slices were fetched."""
        deadline = self.wall.now() + BUDGET
        found = await self.documents.due(SYSTEM, before=self.wall.now(), limit=DUE_LIMIT)
        due = sorted((_fetch_of(d) for d in found if d.partition == PARTITION), key=lambda f: f.wanted.priority)
        queue = deque(due)
        done = 0
        while queue and self.wall.now() < deadline:
            fetch = queue.popleft()
            with span("fetch.slice", symbol=fetch.wanted.symbol, interval=fetch.wanted.interval):
                try:
                    on = await self._slice(fetch, deadline)
                except (StaleError, NotFoundError):
                    continue  # cancelled, or another run has it
                except TransientError as e:
                    log.info("fetch.left_due", fetch=fetch.fetch_id, reason=str(e))  # storage itself is in trouble
                    continue
            if on:
                queue.append(on)
            done += 1
            await asyncio.sleep(0)
        for fetch in queue:
            if fetch.state is State.RUNNING:  # the next run goes on at once
                with suppress(StaleError, NotFoundError, TransientError):
                    await self._save(replace(fetch, state=State.QUEUED), due_at=self.wall.now())
        return done

    async def _slice(self, fetch: Fetch, deadline: datetime) -> Fetch | None:
        """One slice of a fetch; the fetch if it can go on at once."""
        wanted, running = fetch.wanted, fetch
        try:
            looked = await self.library.look(wanted.symbol, wanted.interval, since=wanted.since, until=wanted.until)
            if not looked.missing:
                await self._end(_seen(fetch, looked), State.DONE)
                return None
            # Written before the call: a run that is killed in it leaves the fetch due, and no call uncounted.
            running = replace(
                _seen(fetch, looked), state=State.RUNNING, calls=fetch.calls + 1, reason=None, retry_at=None
            )
            running = await self._save(running, due_at=self.wall.now() + LEASE)
            after = await self.library.fill(
                looked, priority=wanted.priority, deadline=deadline, caller=Caller(id=fetch.caller)
            )
        except StaleError:
            raise
        except TransientError as e:
            await self._wait(running, f"{type(e).__name__}: {e}", e.retry_after or AGAIN)
        except NotFoundError:
            raise  # the fetch itself is gone
        except PermanentError as e:
            await self._end(replace(running, reason=redact(f"{type(e).__name__}: {e}")), State.FAILED)
        except ConfigurationError as e:
            log.warning("fetch.blocked", fetch=fetch.fetch_id, reason=str(e))
            await self._end(replace(running, reason="the providers are not set up right: see the log"), State.FAILED)
        except Exception as e:
            log.exception("fetch.broke", fetch=fetch.fetch_id)
            reason = f"unexpected trouble ({type(e).__name__}): see the log"
            await self._end(replace(running, reason=reason), State.FAILED)
        else:
            seen = _seen(running, after)
            if not after.missing:
                await self._end(seen, State.DONE)
            elif after.is_as(looked):
                await self._wait(seen, "the provider has not got these bars yet", NOT_YET)
            else:
                return seen
        return None

    async def _wait(self, fetch: Fetch, reason: str, wait: timedelta) -> None:
        retry_at = self.wall.now() + wait
        waiting = replace(fetch, state=State.WAITING, reason=redact(reason), retry_at=retry_at)
        await self._save(waiting, due_at=retry_at)
        log.info("fetch.postponed", fetch=fetch.fetch_id, reason=reason)

    async def _end(self, fetch: Fetch, state: State) -> None:
        await self._save(replace(fetch, state=state, retry_at=None), due_at=None)
        log.info("fetch.ended", fetch=fetch.fetch_id, state=state, reason=fetch.reason)

    async def _create(self, fetch: Fetch, *, due_at: datetime) -> Fetch:
        now = self.wall.now()
        document = Document(
            id=fetch.fetch_id,
            partition=PARTITION,
            sort=sort_key(now, f"{PARTITION}|{fetch.fetch_id}"),
            body=_body(fetch, now),
            due_at=due_at,
            expires_at=now + KEPT,
        )
        return _fetch_of(await self.documents.create(SYSTEM, document))

    async def _save(self, fetch: Fetch, *, due_at: datetime | None) -> Fetch:
        assert fetch.document is not None, "a fetch is read before it is saved"  # noqa: S101
        now = self.wall.now()
        document = replace(fetch.document, body=_body(fetch, now), due_at=due_at, expires_at=now + KEPT)
        return _fetch_of(await self.documents.replace(SYSTEM, document))


def _seen(fetch: Fetch, looked: Looked) -> Fetch:
    """The fetch as far as storage says it has come."""
    missing = looked.missing
    return replace(
        fetch,
        bars=sum(s.count for s in looked.stretches if s.kind is Kind.HELD),
        left=[(m.first, m.last, m.count) for m in missing[:SHOWN_RANGES]],
        left_bars=sum(m.count for m in missing),
    )


def _body(fetch: Fetch, now: datetime) -> Mapping[str, Any]:
    w = fetch.wanted
    return {
        "symbol": w.symbol,
        "interval": w.interval,
        "since": format_instant(w.since),
        "until": format_instant(w.until),
        "priority": w.priority.name,
        "caller": fetch.caller,
        "requested_at": format_instant(fetch.requested_at),
        "updated_at": format_instant(now),
        "state": fetch.state,
        "bars": fetch.bars,
        "calls": fetch.calls,
        "left": [[format_instant(first), format_instant(last), count] for first, last, count in fetch.left],
        "left_bars": fetch.left_bars,
        "reason": fetch.reason,
        "retry_at": format_instant(fetch.retry_at) if fetch.retry_at else None,
    }


def _fetch_of(document: Document) -> Fetch:
    b = document.body
    return Fetch(
        wanted=Wanted(
            symbol=b["symbol"],
            interval=Interval(b["interval"]),
            since=parse_instant(b["since"]),
            until=parse_instant(b["until"]),
            priority=Priority[b["priority"]],
        ),
        caller=b["caller"],
        requested_at=parse_instant(b["requested_at"]),
        updated_at=parse_instant(b["updated_at"]),
        state=State(b["state"]),
        bars=b["bars"],
        calls=b["calls"],
        left=[(parse_instant(first), parse_instant(last), count) for first, last, count in b["left"]],
        left_bars=b["left_bars"],
        reason=b["reason"],
        retry_at=parse_instant(b["retry_at"]) if b["retry_at"] else None,
        document=document,
    )
