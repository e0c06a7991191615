"""Hands events to instances at least once, as Event Grid does; some are killed in the middle, and others started."""

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench._report import BenchError, say
from shared.settings import ROOT

AT_ONCE = 16
"""Events that one instance is given before it answers the first."""
AGAIN = 2.0
"""Seconds until an event comes again whose handler failed."""
SWEEP_EVERY = 2.0
"""How often the sweep's timer fires, as in the embedded system."""
LONGEST_LINE = 1 << 20


class Feed:
    """
    The events of a run, *copies* of them being handed over: each is the text of one event.

    It is taken for handled only when an instance said so; what a dead one had is handed over again.
    """

    def __init__(
        self,
        copies: Sequence[int],
        texts: Sequence[str],
        env: Mapping[str, str],
        *,
        instances: int,
        kills: int,
        on_kill: Callable[[], None],
    ) -> None:
        self._copies = copies
        self._texts = texts
        self._env = env
        self._waiting = deque(range(len(copies)))
        self._kill_at = [len(copies) * (n + 1) // (kills + 1) for n in range(kills)]
        self._on_kill = on_kill
        self._instances = [_Instance(self) for _ in range(instances)]
        self._handled = 0
        self._over = asyncio.Event()
        self.handed_at: dict[int, float] = {}
        """When each event was handed over first."""
        self.handled_at = 0.0
        self.killed = 0
        self.again = 0
        self.failed = 0

    async def run(self, is_settled: Callable[[], bool]) -> None:
        """Hand over everything, then wait until nothing is owed any more."""
        try:
            async with asyncio.TaskGroup() as tasks:
                serving = [tasks.create_task(one.serve(self._env)) for one in self._instances]
                timer = tasks.create_task(self._sweep())
                await self._over.wait()
                self.handled_at = time.time()
                say(f"all events are handled, {self.again} of them were handed over again; what is due is waited for")
                while not is_settled():  # noqa: ASYNC110 - other processes write it
                    await asyncio.sleep(0.25)
                for task in (timer, *serving):
                    task.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    def next(self) -> tuple[int, str] | None:
        """The next copy to hand over, if one waits."""
        if not self._waiting:
            return None
        copy = self._waiting.popleft()
        event = self._copies[copy]
        self.handed_at.setdefault(event, time.time())
        return copy, self._texts[event]

    def take_back(self, copies: Sequence[int]) -> None:
        """Whoever had them is gone, or failed: they are handed over again."""
        self.again += len(copies)
        self._waiting.extendleft(copies)
        for one in self._instances:
            one.hand_over()

    def handled(self) -> None:
        """One more copy is done."""
        self._handled += 1
        if self._handled % 2000 == 0:
            say(f"{self._handled} of {len(self._copies)} are handled")
        if self._kill_at and self._handled >= self._kill_at[0]:
            self._kill_at.pop(0)
            self._kill()
        if self._handled == len(self._copies):
            self._over.set()

    def _kill(self) -> None:
        """The next instance that is up dies in the middle of whatever it does."""
        alive = [one for one in self._instances if one.is_up]
        victim = alive[self.killed % len(alive)]
        victim.kill()
        self.killed += 1
        self._on_kill()
        say(f"kill {self.killed}: an instance had {len(victim.had)} events under way")

    async def _sweep(self) -> None:
        """The timer, on one instance at a time."""
        turn = 0
        while True:
            await asyncio.sleep(SWEEP_EVERY)
            if any(one.is_sweeping for one in self._instances):
                continue
            alive = [one for one in self._instances if one.is_up]
            if alive:
                turn += 1
                alive[turn % len(alive)].sweep()


class _Instance:
    """A place for an instance: whoever dies there is followed by another."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._process: asyncio.subprocess.Process | None = None
        self.had: set[int] = set()
        self.is_up = self.is_sweeping = False

    async def serve(self, env: Mapping[str, str]) -> None:
        """Keep an instance running and busy."""
        try:
            while True:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "bench._delivery_worker"),
                    cwd=ROOT,
                    env=env,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=LONGEST_LINE,
                    start_new_session=True,
                )
                self._process = process
                await self._lead(process)
                if await process.wait() != -signal.SIGKILL:
                    raise BenchError("an instance ended by itself; what it said is above")
                had, self.had = self.had, set()
                self._feed.take_back(sorted(had))
        finally:
            await self._end()

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()
        self.is_up = False

    def sweep(self) -> None:
        """Let the timer fire."""
        self.is_sweeping = True
        self._write({"sweep": True})

    async def _lead(self, process: asyncio.subprocess.Process) -> None:
        """Hand over and hear answers until the instance is gone."""
        assert process.stdout is not None
        async for line in process.stdout:
            self._hear(json.loads(line))
            self.hand_over()
        self.is_up = self.is_sweeping = False

    def _hear(self, said: Mapping[str, Any]) -> None:
        if "ready" in said:
            self.is_up = True
        elif "copy" in said:
            self.had.discard(said["copy"])
            if "error" not in said:
                self._feed.handled()
                return
            self._feed.failed += 1
            say(f"an event must come again: {said['error']}")
            asyncio.get_running_loop().call_later(AGAIN, self._feed.take_back, [said["copy"]])
        else:
            self.is_sweeping = False

    def hand_over(self) -> None:
        """Give it what it has room for."""
        while self.is_up and len(self.had) < AT_ONCE and (found := self._feed.next()):
            copy, text = found
            self.had.add(copy)
            self._write_text(f'{{"copy": {copy}, "event": {text}}}')

    def _write(self, order: Mapping[str, Any]) -> None:
        self._write_text(json.dumps(order))

    def _write_text(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(f"{line}\n".encode())

    async def _end(self) -> None:
        process, self.is_up = self._process, False
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
