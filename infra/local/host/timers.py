"""Timers on the wall clock, in whichever instance holds the lock file.

The lock is the operating system's, so it falls to another instance the moment its holder dies,
however it dies. A timer never overlaps itself; ticks missed meanwhile become one.
"""

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.local.host.cron import Schedule, parse_schedule
from infra.local.host.errors import StartError
from infra.local.host.settings import expand
from infra.local.host.worker import Attempt, Failure, Function, RetryPolicy, Worker

log = logging.getLogger(__name__)

_TOLERANCE = timedelta(seconds=1)
# Shorter schedules are not remembered over a restart, as in Azure.
_WORTH_REMEMBERING = timedelta(minutes=1)
_LOCK_RETRY = 1.0
# Sleeping in short steps notices a wall clock that jumps.
_LONGEST_SLEEP = 1.0
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True, kw_only=True)
class Timer:
    """A timer function with its schedule and when it last ran."""

    function: Function
    text: str
    schedule: Schedule
    last: datetime = _NEVER
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_remembered(self) -> bool:
        """Whether a tick missed while no instance ran is made up for at the next start."""
        if not self.function.trigger.get("useMonitor", True):
            return False
        first = self.schedule.after(_now())
        return self.schedule.after(first) - first >= _WORTH_REMEMBERING


def read_timers(functions: Iterable[Function], env: Mapping[str, str]) -> dict[str, Timer]:
    """The timers among the functions, by name.

    Raises:
        StartError: a schedule cannot be read.
    """
    timers = {}
    for function in functions:
        if function.trigger_type != "timerTrigger":
            continue
        try:
            text = expand(function.trigger["schedule"], env)
            schedule = parse_schedule(text)
        except (StartError, ValueError) as e:
            raise StartError(f"timer {function.name}: {e}") from e
        timers[function.name] = Timer(function=function, text=text, schedule=schedule)
    return timers


class Timers:
    """Fires the timers of an app while this instance holds the lock."""

    def __init__(self, worker: Worker, timers: Mapping[str, Timer], folder: Path) -> None:
        self._worker = worker
        self._timers = timers
        self._lock_path = folder / "timers.lock"
        self._memory = folder / "timers.json"
        self._lock: int | None = None
        self._kept: dict[str, dict[str, str]] = {}

    @property
    def is_holder(self) -> bool:
        """Whether this instance is the one that fires."""
        return self._lock is not None

    async def run(self) -> None:
        """Wait for the lock, then fire until cancelled.

        An invocation that is running then goes on, and so does the lock, until `release`.
        """
        while not self._take_lock():  # noqa: ASYNC110 - a file lock wakes nobody
            await asyncio.sleep(_LOCK_RETRY)
        log.info("timers.taken_over")
        remembered = self._recall()
        async with asyncio.TaskGroup() as group:
            for timer in self._timers.values():
                group.create_task(self._keep(timer, remembered.get(timer.function.name)))

    def release(self) -> None:
        """Let another instance fire."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def fire(self, name: str, *, due: datetime | None = None) -> None:
        """Invoke a timer once, retried as its policy says; whatever goes wrong is logged."""
        timer = self._timers[name]
        async with timer.turn:
            now = _now()
            is_past_due = due is not None and now - due > _TOLERANCE
            try:
                await self._attempt(timer, _timer_info(timer, now, is_past_due=is_past_due))
            except Exception:
                log.exception("timer.broken", extra={"function": name})
            timer.last = due or now

    async def _keep(self, timer: Timer, missed: datetime | None) -> None:
        name = timer.function.name
        due = missed or timer.schedule.after(_now())
        if timer.function.trigger.get("runOnStartup"):
            due = min(due, _now())
        self._remember(timer, due)
        while True:
            await _sleep_until(due)
            started = _now()
            # Shielded: an invocation that has begun may end after the timers are stopped.
            await asyncio.shield(asyncio.create_task(self.fire(name, due=due)))
            due = timer.schedule.after(max(due, started))
            self._remember(timer, due)

    async def _attempt(self, timer: Timer, info: str) -> None:
        policy = timer.function.retry
        count, failure = 0, None
        while True:
            attempt = Attempt(count=count, most=policy.most if policy else 0, failure=failure)
            outcome = await self._worker.invoke_timer(timer.function.name, info, attempt=attempt)
            if outcome.error is None:
                return
            log.error(
                "timer.failed",
                extra={"function": timer.function.name, "attempt": count, "reason": outcome.error},
            )
            if policy is None or _is_spent(policy, count):
                return
            await asyncio.sleep(policy.wait(count).total_seconds())
            failure = Failure(message=outcome.error, stack_trace=outcome.traceback)
            count += 1

    def _take_lock(self) -> bool:
        if self._lock is None:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            self._lock = lock
        return True

    def _recall(self) -> dict[str, datetime]:
        """When the timers are due according to the last holder, where the schedule is the same."""
        due: dict[str, datetime] = {}
        try:
            for name, kept in self._read_memory().items():
                timer = self._timers.get(name)
                if timer is not None and timer.is_remembered and kept["schedule"] == timer.text:
                    timer.last = datetime.fromisoformat(kept["last"])
                    due[name] = datetime.fromisoformat(kept["next"])
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            log.warning("timers.forgotten", extra={"reason": repr(e)})
        return due

    def _remember(self, timer: Timer, due: datetime) -> None:
        if not timer.is_remembered:
            return
        fresh = self._memory.with_suffix(".new")
        self._kept[timer.function.name] = {
            "schedule": timer.text,
            "last": timer.last.isoformat(),
            "next": due.isoformat(),
        }
        try:
            fresh.write_text(json.dumps(self._kept, indent=1))
            fresh.replace(self._memory)
        except OSError as e:
            log.warning("timers.not_remembered", extra={"reason": str(e)})

    def _read_memory(self) -> dict[str, Any]:
        if not self._memory.exists():
            return {}
        memory: dict[str, Any] = json.loads(self._memory.read_text())
        return memory


def _is_spent(policy: RetryPolicy, count: int) -> bool:
    return 0 <= policy.most <= count  # -1 retries for ever


def _timer_info(timer: Timer, now: datetime, *, is_past_due: bool) -> str:
    return json.dumps(
        {
            "Schedule": {"AdjustForDST": True},
            "ScheduleStatus": {
                "Last": timer.last.isoformat(),
                "LastUpdated": timer.last.isoformat(),
                "Next": timer.schedule.after(now).isoformat(),
            },
            "IsPastDue": is_past_due,
        }
    )


async def _sleep_until(due: datetime) -> None:
    while (wait := (due - _now()).total_seconds()) > 0:  # noqa: ASYNC110 - the wall clock may jump
        await asyncio.sleep(min(wait, _LONGEST_SLEEP))


def _now() -> datetime:
    return datetime.now(UTC)
