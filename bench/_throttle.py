"""
Eight processes share one key: who is refused, and how much of the quota is used.

A server in a process of its own counts calls as they arrive and holds two rolling windows exactly, 60 per 6 s and 30
per 0.1 s; beyond them it answers 429. Eight processes ask for more than that, each through a Throttle of its own over
one SQLite file, for five windows.

``refusals``: answers 429. ``used_share``: permits, from the first to the last, over the most that any client could have
had in that time (calls as early as both windows allow, the first at once: greedy is optimal). ``steady_share``: the
span of the long window over the mean time from each permit to the 60th after it, so that the bursts at both ends count
for nothing. ``peer_refusals``: the same load through aiolimiter, which counts in each process, each given the whole
limit.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from statistics import mean
from time import monotonic, time
from typing import Any

import aiohttp
from aiohttp import web

from bench._report import BenchError, report, say
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.errors import QuotaSpentError, RateLimitedError
from shared.market.registry import Window
from shared.market.throttle import Throttle
from shared.settings import ROOT

WINDOWS = ((60, 6.0), (30, 0.1))
PROCESSES, CALLERS, TURNS = 8, 8, 5
START_IN = 0.5
TIMEOUT = 60.0

type Ask = Callable[[], Awaitable[bool]]


# --- the server


class Turnstile:
    """Counts calls as they arrive; a refused call is not counted."""

    def __init__(self) -> None:
        self._calls: dict[str, deque[float]] = {}

    def admits(self, key: str) -> bool:
        """Whether a call of *key* that arrives now keeps every window."""
        now = monotonic()
        calls = self._calls.setdefault(key, deque())
        while calls and calls[0] <= now - max(span for _, span in WINDOWS):
            calls.popleft()
        for amount, span in WINDOWS:
            held = sum(at > now - span for at in calls)
            if held >= amount:
                if key == "ours":
                    say(f"  refused: {held} within {span:g} s")
                return False
        calls.append(now)
        return True


async def serve() -> None:
    """Listen until stdin ends; the port is the first line of stdout."""
    turnstile = Turnstile()

    async def call(request: web.Request) -> web.Response:
        return web.Response(status=200 if turnstile.admits(request.match_info["key"]) else 429)

    app = web.Application()
    app.router.add_get("/{key}", call)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


# --- the callers


async def work(port: int, limiter: str, file: str, until: float) -> dict[str, Any]:
    """Call as often as allowed until an instant; when calls left, and how many were refused."""
    left: list[float] = []
    refused = 0
    store = SQLiteDocuments(file, SystemClock())
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:

        async def ask() -> bool:
            async with http.get(f"http://127.0.0.1:{port}/{limiter}") as answer:
                return answer.status == 200

        once = _ours(store, ask, left, until) if limiter == "ours" else _peer(ask, left)

        async def caller() -> None:
            nonlocal refused
            while time() < until:
                try:
                    if not await once():
                        refused += 1
                except QuotaSpentError:
                    return

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    await store.close()
    return {"left": left, "refused": refused}


def _ours(store: SQLiteDocuments, ask: Ask, left: list[float], until: float) -> Ask:
    windows = [Window(amount=amount, span=timedelta(seconds=span)) for amount, span in WINDOWS]
    throttle = Throttle(store, SystemClock(), "bench", windows)
    deadline = datetime.fromtimestamp(until, UTC)

    async def once() -> bool:
        try:
            async with throttle.permit(deadline=deadline) as permit:
                permit.sent()
                left.append(time())
                began = monotonic()
                is_admitted = await ask()
                permit.answered()
                throttle.latency(monotonic() - began)
                if not is_admitted:
                    raise RateLimitedError("429", retry_after=timedelta(milliseconds=100))
        except QuotaSpentError:
            raise
        except RateLimitedError:
            return False
        return True

    return once


def _peer(ask: Ask, left: list[float]) -> Ask:
    limiters = [import_module("aiolimiter").AsyncLimiter(amount, span) for amount, span in WINDOWS]

    async def once() -> bool:
        for limiter in limiters:
            await limiter.acquire()
        left.append(time())
        return await ask()

    return once


async def worker(port: int, limiter: str, file: str) -> None:
    """One of the eight: says that it is ready, is told when to begin and to end, says what happened."""
    if limiter != "ours":
        import_module("aiolimiter")  # loaded before the clock runs; only the benchmarks' environment has it
    print("ready", flush=True)
    begin, until = json.loads(await asyncio.to_thread(sys.stdin.readline))
    await asyncio.sleep(max(begin - time(), 0))
    print(json.dumps(await work(port, limiter, file, until)), flush=True)


# --- the figures


def most_possible(span: float) -> int:
    """How many calls fit from a first one to a last one *span* later, however they are placed."""
    calls: list[float] = [0.0]
    while True:
        at = max(
            (calls[-amount] + length if len(calls) >= amount else calls[-1] for amount, length in WINDOWS),
        )
        if at > span:
            return len(calls)
        calls.append(at)


def shares(left: Sequence[float]) -> tuple[float, float]:
    """How much of what was possible was used, from the first call to the last and in the long run."""
    amount, span = WINDOWS[0]
    if len(left) <= amount:
        raise BenchError(f"only {len(left)} calls left: nothing was saturated")
    ordered = sorted(left)
    laps = [later - at for at, later in zip(ordered, ordered[amount:], strict=False)]
    return len(ordered) / most_possible(ordered[-1] - ordered[0]), span / mean(laps)


@asynccontextmanager
async def _child(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench._throttle", *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**22,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _line(process: asyncio.subprocess.Process, patience: float = TIMEOUT) -> str:
    assert process.stdout is not None, "it was started with a pipe"
    async with asyncio.timeout(patience):
        said = await process.stdout.readline()
    if not said:
        raise BenchError("a process of the benchmark ended too early")
    return said.decode()


async def _run(port: int, limiter: str, file: Path, turns: int) -> tuple[list[float], int]:
    """All eight at once; when calls left, and how many were refused."""
    async with AsyncExitStack() as stack:
        children = [
            await stack.enter_async_context(_child("worker", str(port), limiter, str(file))) for _ in range(PROCESSES)
        ]
        for child in children:
            await _line(child)
        begin = time() + START_IN
        for child in children:
            assert child.stdin is not None, "it was started with a pipe"
            child.stdin.write(f"{json.dumps([begin, begin + turns * WINDOWS[0][1]])}\n".encode())
        said = [json.loads(await _line(child, TIMEOUT + turns * WINDOWS[0][1])) for child in children]
    return [at for one in said for at in one["left"]], sum(one["refused"] for one in said)


async def figures(*, turns: int = TURNS, with_peer: bool = True) -> dict[str, float]:
    """Run both sides, one after the other."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with _child("server") as server:
            port = int(await _line(server))
            left, refused = await _run(port, "ours", Path(folder) / "quota.db", turns)
            used, steady = shares(left)
            say(f"  throttle: {len(left)} permits, {refused} refused, {used:.3f} used, {steady:.3f} in the long run")
            found |= {"refusals": refused, "used_share": used, "steady_share": steady}
            if with_peer:
                left, refused = await _run(port, "peer", Path(folder) / "none.db", turns)
                say(f"  aiolimiter: {len(left)} calls, {refused} refused")
                found["peer_refusals"] = refused
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", nargs="*", default=[], help="of a child process")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    match args.role:
        case ["server"]:
            asyncio.run(serve())
        case ["worker", port, limiter, file]:
            asyncio.run(worker(int(port), limiter, file))
        case _:
            report("_throttle", asyncio.run(figures(turns=args.turns, with_peer=not args.no_peer)))


if __name__ == "__main__":
    main()
