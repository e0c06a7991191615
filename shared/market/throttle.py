"""Our restraint towards providers, counted in storage so that every instance shares it."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from shared.clock import Clock
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConflictError,
    DailyQuotaError,
    NotFoundError,
    PermanentError,
    QuotaSpentError,
    RateLimitedError,
    RefusedError,
    StaleError,
    TroopError,
    UnavailableError,
)
from shared.market.models import Priority
from shared.market.pacing import FIRST_GUARD, LEAST_GUARD, Pace, instant_at, micros
from shared.market.ports import Limits
from shared.market.quota import Claim, Quota, ThrottleState
from shared.market.registry import Window
from shared.telemetry import get_logger

log = get_logger(__name__)

CONTAINER = "quota"
PATIENCE = timedelta(seconds=4)
"""How long a call may wait for its instant; a longer wait is left to the next slot."""
AGE_STEP = timedelta(seconds=10)
"""Waiting this long is worth one class of priority, so nothing waits for ever."""
AHEAD, LOOK_AHEAD = timedelta(milliseconds=300), timedelta(milliseconds=100)
"""How far ahead instants are reserved, no further because what is asked for later may matter more; and how long before
the next one we look, so that several are reserved in one write."""
PROMPT = timedelta(minutes=1)
"""With a window shorter than this, a call that came late is written down at once, not with the next reservation."""

_MICROSECOND = timedelta(microseconds=1)
_SECOND = 1_000_000
_AGE_STEP, _AHEAD, _LOOK_AHEAD = (span // _MICROSECOND for span in (AGE_STEP, AHEAD, LOOK_AHEAD))
_CLAIMS, _CLAIM_AHEAD, _CLAIM_LEASE, _CLAIM_SLACK = 4, 30 * _SECOND, 5 * _SECOND, _SECOND // 2
_TRIES = 200
_PLANNED = 64
"""How many waiting calls one look plans for; the others are planned for once some of these have gone."""
_SAMPLES, _ENOUGH = 64, 8
_OVERSLEPT = timedelta(milliseconds=50)

type Sleep = Callable[[float], Awaitable[object]]


@dataclass(slots=True)
class Permit:
    """Leave for one call at one instant. Say ``sent`` as the call leaves; unsaid, the instant is handed back."""

    instant: datetime
    weight: int
    is_probe: bool
    token: str
    wall: Clock
    sent_at: int | None = None
    answered_at: int | None = None

    def sent(self) -> None:
        """The call leaves now: from here on it counts, whatever becomes of it."""
        if self.sent_at is None:
            self.sent_at = micros(self.wall.now())

    def answered(self) -> None:
        """The answer is here; without this the end of the permit counts as its arrival."""
        self.answered_at = micros(self.wall.now())


@dataclass(slots=True, eq=False)
class _Waiter:
    key: int
    weight: int
    priority: Priority
    deadline: int
    token: str
    at: int | None = None
    is_probe: bool = False
    is_seen: bool = False
    trouble: Exception | None = None
    served: asyncio.Event = field(default_factory=asyncio.Event)
    lead: int = 0

    @property
    def is_low(self) -> bool:
        return self.priority >= Priority.BACKFILL


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What one look decides; it holds only once it is written."""

    quota: Quota
    trial: Pace
    now: int
    low_until: int
    taken: list[tuple[_Waiter, int, bool]] = field(default_factory=list)
    refused: list[tuple[_Waiter, Exception]] = field(default_factory=list)
    left: list[tuple[_Waiter, int]] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)

    def leave(self, call: _Waiter, at: int, look_at: int) -> None:
        """It waits on; those behind it plan as if it had its instant."""
        self.left.append((call, at))
        self.looks.append(look_at)
        self._try(at, call.weight)

    def take(self, call: _Waiter, at: int) -> None:
        """It has its instant."""
        self.taken.append((call, at, self.quota.reserve(at, call.weight, call.token)))
        self._try(at, call.weight)
        if call.is_low:
            self.low_until = at

    def give_way(self, claim: Claim) -> None:
        """Another instance's call goes first."""
        at = self.trial.next_instant(self.now, claim.weight, Priority(claim.priority))
        if at is not None:
            self._try(at, claim.weight)

    def _try(self, at: int, weight: int) -> None:
        if self.trial is not self.quota.pace:
            self.trial.add(at, weight)


@dataclass(slots=True, kw_only=True)
class _Note:
    """Something to be written with the next reservation, or at once."""

    write: Callable[[Quota, int], object]
    is_repeatable: bool = True


class Throttle:
    """
    Hands out permits for one provider's calls. A permit is a reserved instant on the wall clock.

    Whoever matters more goes first: calls are ordered by when they were asked for plus AGE_STEP for each class of
    priority, in this instance exactly, across instances by claims that live for some seconds. Only the nearest
    instants are reserved, of BACKFILL and PREFETCH one at a time. Backfill may spend 80 % of a day's window and
    prefetch 60 %.
    """

    def __init__(
        self,
        documents: Documents,
        wall: Clock,
        provider: str,
        windows: Sequence[Window],
        *,
        sleep: Sleep | None = None,
        dice: random.Random | None = None,
    ) -> None:
        self._documents = documents
        self._wall = wall
        self._provider = provider
        self._windows = tuple(windows)
        self._sleep = sleep
        self._dice = dice or random.Random()  # noqa: S311 - jitter
        self._owner = uuid4().hex[:8]
        self._tokens = 0
        self._queue: list[_Waiter] = []
        self._notes: list[_Note] = []
        self._one_at_a_time = asyncio.Lock()
        self._look_at = 0
        self._low_until = 0
        self._lead = 0
        self._has_claimed = False
        self._seen: Quota | None = None
        self._trips: deque[int] = deque(maxlen=_SAMPLES)
        self._lateness: deque[int] = deque(maxlen=_SAMPLES)

    @asynccontextmanager
    async def permit(
        self, *, weight: int = 1, priority: Priority = Priority.LIVE, deadline: datetime | None = None
    ) -> AsyncIterator[Permit]:
        """
        Wait for the next free instant and leave at it; how the block ends teaches us about the quota.

        A RateLimitedError raised inside is the provider's refusal: everybody keeps still until its ``retry_after``.
        After a DailyQuotaError one probe asks first, of all instances.

        Raises:
            QuotaSpentError: the instant lies behind *deadline* (by default PATIENCE from now).
            RefusedError: no window can ever hold a call of this *weight*.
            RateLimitedError, UnavailableError: as storage does.

        """
        now = self._wall.now()
        waiter = self._waiter(now, weight, priority, deadline or now + PATIENCE)
        permit = await self._granted(waiter)
        try:
            yield permit
        except BaseException as e:
            await _undisturbed(self._settle(permit, e))
            raise
        await _undisturbed(self._settle(permit, None))

    async def observe(self, limits: Limits) -> None:
        """Correct the windows by what rate headers said; written at once only where that leaves us less room."""
        now = self._now()
        if self._seen is None:
            self._seen = (await self._read())[1]
        is_stricter = self._seen.observe(limits, now)
        if is_stricter is None:
            return
        self._notes.append(_Note(write=lambda quota, _: quota.observe(limits, now)))
        if is_stricter:
            await self._flush()

    def latency(self, seconds: float) -> None:
        """Teach the guard how long a call's round trip took."""
        self._trips.append(max(int(seconds * _SECOND), 0))

    async def state(self) -> ThrottleState:
        """How the quota stands, as stored."""
        _, quota = await self._read()
        quota.claims.pop(self._owner, None)
        return ThrottleState.of(quota, self._now(), [waiter.priority for waiter in self._queue])

    # --- one call

    def _waiter(self, now: datetime, weight: int, priority: Priority, deadline: datetime) -> _Waiter:
        self._tokens += 1
        since = micros(now)
        return _Waiter(
            key=since + priority * _AGE_STEP,
            weight=weight,
            priority=priority,
            deadline=micros(deadline),
            token=f"{self._owner}-{self._tokens}",
        )

    async def _granted(self, waiter: _Waiter) -> Permit:
        try:
            while True:
                at = await self._reserved(waiter)
                late = await self._arrival_of(at)
                if not self._windows or late <= self._guard() // 2:  # the other half is for the way
                    return Permit(instant_at(at), waiter.weight, waiter.is_probe, waiter.token, self._wall)
                self._hand_back(waiter)  # whoever reserved behind it counts on it having left in time
                waiter.lead = max(2 * waiter.lead, 2 * self._lead, late // 8)
        except BaseException:
            await _undisturbed(self._forget(waiter))
            raise

    async def _reserved(self, waiter: _Waiter) -> int:
        waiter.at, waiter.trouble, waiter.is_seen = None, None, False
        waiter.served.clear()
        self._queue.append(waiter)
        while True:
            async with self._one_at_a_time:
                if not waiter.served.is_set() and (not waiter.is_seen or self._now() >= self._look_at):
                    await _undisturbed(self._look())
            if waiter.trouble is not None:
                raise waiter.trouble
            if waiter.at is not None:
                return waiter.at
            await self._nap(waiter)

    async def _arrival_of(self, at: int) -> int:
        """Sleep until an instant; how much later it is by then."""
        for _ in range(2):
            wait = at - self._now()
            if wait <= 0:
                break
            await self._pause(wait / _SECOND)
            if at - self._now() > _OVERSLEPT // _MICROSECOND:
                break  # the wall was set back, or stands still
        return self._now() - at

    async def _nap(self, waiter: _Waiter) -> None:
        """Sleep until the next look, or until another call's look served this one too."""
        wait = max(self._look_at - self._now(), 1000) / _SECOND
        sleeping = asyncio.ensure_future(self._pause(wait))
        served = asyncio.ensure_future(waiter.served.wait())
        try:
            await asyncio.wait({sleeping, served}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sleeping, served):
                task.cancel()
            await asyncio.gather(sleeping, served, return_exceptions=True)

    async def _pause(self, seconds: float) -> None:
        await (self._sleep or asyncio.sleep)(seconds)

    async def _forget(self, waiter: _Waiter) -> None:
        """Leave nothing behind of a call that will not be made."""
        async with self._one_at_a_time:  # a look that is under way may be reserving for it
            if waiter in self._queue:
                self._queue.remove(waiter)
            has_reserved = waiter.at is not None
            if has_reserved:
                self._hand_back(waiter)
            if has_reserved or (self._has_claimed and not self._queue):
                await self._look()

    async def _settle(self, permit: Permit, error: BaseException | None) -> None:
        at, weight, token = micros(permit.instant), permit.weight, permit.token
        sent_at = permit.sent_at
        if sent_at is None:
            if self._windows or permit.is_probe:
                self._notes.append(_Note(write=lambda q, _: q.hand_back(at, weight, token), is_repeatable=False))
                await self._flush()
            return
        self._lateness.append(max(sent_at - at, 0))
        must_write = self._came_late(at, (permit.answered_at or self._now()), weight)
        if isinstance(error, RateLimitedError) and not isinstance(error, QuotaSpentError):
            wait, is_day_spent = error.retry_after, isinstance(error, DailyQuotaError)
            log.warning("provider.refused", provider=self._provider, is_day_spent=is_day_spent)
            self._notes.append(_Note(write=lambda q, now: q.refused(now, wait, is_day_spent=is_day_spent, token=token)))
            must_write = True
        elif permit.is_probe:
            is_answered = error is None or isinstance(error, PermanentError)
            self._notes.append(_Note(write=lambda q, now: q.probed(now, token, is_answered=is_answered)))
            must_write = True
        if must_write:
            await self._flush()

    def _came_late(self, at: int, answered_at: int, weight: int) -> bool:
        """Note how much later than meant a call may have arrived; whether that cannot wait for the next write."""
        if not self._windows:
            return False
        latest = answered_at - (self._seen.trip if self._seen else 0)  # while no trip is known, it is not counted
        if latest - at <= LEAST_GUARD:
            return False
        later = latest - LEAST_GUARD  # the guard will be at least that
        self._notes.append(_Note(write=lambda q, _: q.came_late(at, later, weight), is_repeatable=False))
        return latest - at > self._guard() and min(window.span for window in self._windows) < PROMPT

    def _hand_back(self, waiter: _Waiter) -> None:
        at, weight, token = waiter.at, waiter.weight, waiter.token
        if at is not None and (self._windows or waiter.is_probe):
            self._notes.append(_Note(write=lambda q, _: q.hand_back(at, weight, token), is_repeatable=False))
        waiter.at = None

    def _guard(self) -> int:
        return self._seen.pace.least_guard if self._seen else FIRST_GUARD

    # --- all calls of this instance together

    async def _flush(self) -> None:
        """Write what was noted; trouble with storage leaves it noted, for the next write."""
        async with self._one_at_a_time:
            if self._notes:
                await self._look()

    async def _look(self) -> None:
        """Read the quota, note down what is known, reserve for whoever can be served, all in one write."""
        try:
            for attempt in range(_TRIES):
                if await self._looked():
                    return
                await self._pause(self._dice.uniform(0.0005, 0.004) * min(attempt + 1, 20))
            raise UnavailableError(f"{self._provider}: too many others write its quota")
        except TroopError as e:
            if self._notes:
                log.warning("quota.unwritten", provider=self._provider, reason=str(e))
            for waiter in self._queue:
                waiter.trouble = e
                waiter.served.set()
            self._queue.clear()

    async def _looked(self) -> bool:
        began = self._now()
        document, quota = await self._read()
        notes = list(self._notes)
        now = self._now()
        for note in notes:
            note.write(quota, now)
        plan = self._plan(quota, now)
        if quota.is_changed:
            if len(self._trips) >= _ENOUGH and len(self._lateness) >= _ENOUGH:
                quota.learn(self._learned_guard(), min(self._trips))
            try:
                await self._write(document, quota)
            except (StaleError, ConflictError, NotFoundError):
                return False  # another instance was first
            except UnavailableError:
                self._notes = [note for note in self._notes if note.is_repeatable or note not in notes]
                raise
            took = self._now() - began
            self._lead = took if not self._lead else (3 * self._lead + took) // 4
        self._notes = self._notes[len(notes) :]
        self._seen = quota
        self._has_claimed = self._owner in quota.claims
        self._carry_out(plan)
        return True

    def _plan(self, quota: Quota, now: int) -> _Plan:
        calls: list[tuple[int, _Waiter | Claim]] = [(waiter.key, waiter) for waiter in self._queue]
        lapses: list[int] = []
        for owner, claims in quota.claims.items():
            if owner != self._owner:
                calls += [(claim.key + _AGE_STEP // 2, claim) for claim in claims]
                lapses += [claim.until for claim in claims]
        trial = quota.pace.copy() if len(calls) > 1 else quota.pace
        plan = _Plan(quota=quota, trial=trial, now=now, low_until=self._low_until, looks=lapses)
        for waiter in self._queue:
            waiter.is_seen = True
        calls.sort(key=lambda pair: pair[0])
        for _, call in calls[:_PLANNED]:
            if isinstance(call, Claim):
                plan.give_way(call)
            else:
                self._place(call, plan)
        if len(calls) > _PLANNED and (plan.taken or plan.refused):
            plan.looks.append(now)
        for _, call in calls[_PLANNED:]:
            if isinstance(call, _Waiter):
                plan.looks.append(call.deadline)
                if call.deadline <= now:
                    plan.refused.append((call, self._too_late(_AHEAD)))
        if self._windows:
            claims = _claims(plan.left, now)
            quota.claim(self._owner, claims, now)
            plan.looks += [now + _CLAIM_LEASE - _SECOND] * bool(claims)  # in time to renew them
            plan.looks += [at - _CLAIM_AHEAD for _, at in plan.left if at > now + _CLAIM_AHEAD]
        if quota.is_probe_due and quota.probing_until > now:
            plan.looks.append(now + _SECOND)  # the probe under way may end the cool-down any time
        return plan

    def _place(self, call: _Waiter, plan: _Plan) -> None:
        now = plan.now
        opens_at = plan.quota.opens_at(now, call.token)
        if self._windows:
            opens_at = max(opens_at, now + max(self._lead, call.lead))  # it cannot leave before it is written
        at = plan.trial.next_instant(opens_at, call.weight, call.priority)
        if at is None:
            plan.refused.append((call, self._never(call)))
        elif at > call.deadline:
            plan.refused.append((call, self._too_late(at - now)))
        elif at > now + _AHEAD:
            plan.leave(call, at, at - _LOOK_AHEAD)
        elif call.is_low and now < plan.low_until:
            plan.leave(call, at, plan.low_until)
        else:
            plan.take(call, at)

    def _carry_out(self, plan: _Plan) -> None:
        now = self._now()
        self._look_at = max(min(plan.looks, default=now + _AHEAD), now + 1000)
        self._low_until = plan.low_until
        for waiter, at, is_probe in plan.taken:
            waiter.at, waiter.is_probe = at, is_probe
        for waiter, trouble in plan.refused:
            waiter.trouble = trouble
        for waiter in [*(taken for taken, _, _ in plan.taken), *(refused for refused, _ in plan.refused)]:
            self._queue.remove(waiter)
            waiter.served.set()

    def _never(self, waiter: _Waiter) -> RefusedError:
        return RefusedError(
            f"{self._provider}: a call that counts {waiter.weight} never fits into its windows for "
            f"{waiter.priority.name.lower()} calls: ask for less at once"
        )

    def _too_late(self, wait: int) -> QuotaSpentError:
        return QuotaSpentError(
            f"{self._provider}: our quota is spent for now", retry_after=max(wait * _MICROSECOND, timedelta())
        )

    def _learned_guard(self) -> int:
        """How much later than the quickest a call may arrive, by the latest round trips and departures."""
        spread = 0
        for samples in (self._trips, self._lateness):
            ordered = sorted(samples)
            spread += ordered[int(0.95 * (len(ordered) - 1))] - ordered[0]
        return spread

    # --- storage

    async def _read(self) -> tuple[Document | None, Quota]:
        try:
            document = await self._documents.read(CONTAINER, self._provider, "throttle")
        except NotFoundError:
            return None, Quota.of({}, self._windows, self._now())
        return document, Quota.of(document.body, self._windows, self._now())

    async def _write(self, document: Document | None, quota: Quota) -> None:
        if document is not None:
            await self._documents.replace(CONTAINER, document.with_body(quota.body()))
            return
        sort = sort_key(self._wall.now(), self._provider)
        new = Document(id="throttle", partition=self._provider, sort=sort, body=quota.body())
        await self._documents.create(CONTAINER, new)

    def _now(self) -> int:
        return micros(self._wall.now())


def _claims(left: Sequence[tuple[_Waiter, int]], now: int) -> list[Claim]:
    return [
        Claim(
            int(waiter.priority),
            waiter.key,
            waiter.weight,
            min(waiter.deadline, at + _CLAIM_SLACK, now + _CLAIM_LEASE),
        )
        for waiter, at in left
        if waiter.priority < Priority.BACKFILL and at <= now + _CLAIM_AHEAD
    ][:_CLAIMS]


async def _undisturbed[T](work: Coroutine[Any, Any, T]) -> T:
    """Finish *work* although the caller is cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as e:
            if not task.cancelled():
                cancelled = e
    if cancelled is not None:
        with suppress(Exception):
            task.result()
        raise cancelled
    return task.result()
