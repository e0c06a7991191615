"""
How fast bars become alerts: 524 symbols, then five market days that close at once.

The real thing runs over real sockets: the embedded cloud and the app, on the `local-unlimited` key and with
Discord's limit lifted. First 100 bars of history a symbol are fetched and evaluated. Then the market clock
jumps: 524 calls bring 2,620 bars, and everything that follows from them is waited for.

``events_per_s``: events the topic took, from the provider's first answer after the jump to the last event.
``p50_ms``, ``p99_ms``: from the provider's answer with the bar to its alert at a client of the hub. ``peak_mb``:
the most memory an instance of the app ever held.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from bench._market import Written, write_market
from bench._processes import children, cpu_seconds, peak_mb
from bench._report import BenchError, quantile, report, say
from shared.clock import format_instant, parse_instant
from shared.settings import ROOT

LOOK_EVERY = 0.1
CALM = 0.5
"""Seconds without an event after which storage is asked whether anything is still owed."""
STOP_WITHIN = 20.0
AFTER_CLOSE = timedelta(hours=1)

_EVALUATED = "SELECT count(*) FROM documents WHERE container = 'series' AND body ->> 'evaluated_through' = ?"
_OWED = """
SELECT count(*) FROM documents WHERE due_at IS NOT NULL AND id NOT LIKE 'book|%'
  AND (container IN ('signals', 'deliveries') OR (container = 'posts' AND partition <> 'drafts'))
"""
_COUNTS = {
    "bars": "SELECT sum(json_array_length(body, '$.closed')) FROM documents WHERE container = 'bars'",
    "signals": "SELECT count(*) FROM documents WHERE container = 'signals' AND body ->> 'origin' = 'live'",
    "backfill_signals": "SELECT count(*) FROM documents WHERE container = 'signals' AND body ->> 'origin' <> 'live'",
    "alerts": "SELECT count(*) FROM documents WHERE container = 'deliveries' AND body ->> 'delivery_id' IS NULL",
    "deliveries_sent": "SELECT count(*) FROM documents WHERE container = 'deliveries' AND body ->> 'state' = 'SENT'",
    "deliveries_not_sent": "SELECT count(*) FROM documents WHERE container = 'deliveries' "
    "AND body ->> 'delivery_id' IS NOT NULL AND body ->> 'state' <> 'SENT'",
    "posts": "SELECT count(*) FROM documents WHERE container = 'posts' AND partition = 'signal'",
}
_DIGESTS = "SELECT count(*) FROM documents WHERE container = 'posts' AND partition = 'digest'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is run."""

    symbols: int
    history: int
    days: int
    instances: int


@dataclass(slots=True, kw_only=True)
class Heard:
    """Each alert's first arrival at the client, in seconds of the wall."""

    at: dict[str, float] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)

    async def take(self, arguments: Sequence[Mapping[str, Any]]) -> None:
        """Note a push."""
        now = time.time()
        for item in arguments:
            self.at.setdefault(item["alert_id"], now)
            self.symbols[item["alert_id"]] = item["symbol"]


class Stage:
    """The running system, as the benchmark sees it from outside."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, data: Path, http: aiohttp.ClientSession) -> None:
        self.app = f"http://127.0.0.1:{port}"
        self.cloud = ""
        self.peak = 0.0
        self._process = process
        self._data = data
        self._http = http

    async def ready(self) -> None:
        """Wait until the app answers."""
        while True:
            self._look()
            with contextlib.suppress(aiohttp.ClientError):
                async with self._http.get(f"{self.app}/api/health") as answer:
                    if answer.status == 200:
                        break
            await asyncio.sleep(LOOK_EVERY)
        said = (self._data / "up.log").read_text()
        self.cloud = said.partition("(the cloud: ")[2].partition(",")[0]

    async def ask(self, path: str) -> dict[str, Any]:
        """What the cloud says."""
        async with self._http.get(f"{self.cloud}{path}") as answer:
            answer.raise_for_status()
            body: dict[str, Any] = await answer.json()
            return body

    async def move_clock(self, to: datetime) -> None:
        """Let the market jump; as in Azure the changed setting restarts the app."""
        async with self._http.put(f"{self.cloud}/clock", json={"now": format_instant(to)}) as answer:
            answer.raise_for_status()

    async def settled(self, through: datetime, symbols: int) -> dict[str, Any]:
        """Wait until all symbols are evaluated *through* and nobody owes anything; the topic's figures then."""
        known, since = (-1, -1), 0.0
        while True:
            self._look()
            topic: dict[str, Any] = (await self.ask("/status"))["topic"]
            seen = (topic["accepted"], topic["delivered"])
            if seen != known or topic["pending"]:
                known, since = seen, time.monotonic()
            elif time.monotonic() - since >= CALM:
                if self.count(_EVALUATED, format_instant(through)) == symbols and not self.count(_OWED):
                    return topic
                since = time.monotonic()
            await asyncio.sleep(LOOK_EVERY)

    def count(self, sql: str, *values: str) -> int:
        """A number from the app's storage."""
        with contextlib.closing(sqlite3.connect(f"file:{self._data / 'app.db'}?mode=ro", uri=True, timeout=5)) as db:
            [number] = db.execute(sql, values).fetchone()
        return number or 0

    def computed(self) -> float:
        """Seconds the app's instances have computed since they were started last."""
        return sum(map(cpu_seconds, self._instances()))

    def _look(self) -> None:
        if self._process.returncode is not None:
            raise BenchError(f"troop up ended by itself:\n{(self._data / 'up.log').read_text()[-2000:]}")
        self.peak = max([self.peak, *map(peak_mb, self._instances())])

    def _instances(self) -> list[int]:
        return children(self._process.pid, "infra.local.host")


@contextlib.asynccontextmanager
async def _running(market: Written, folder: Path, data: Path, port: int, instances: int) -> AsyncIterator[Stage]:
    """Everything up, and down again whatever happens."""
    data.mkdir()  # noqa: ASYNC240 - before anything runs
    begin = format_instant(market.history_closes_at + AFTER_CLOSE)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with (data / "up.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench._up", str(port), str(data), str(folder), begin, str(instances)),
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is ours: it stops in order below
        )
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
            yield Stage(process, port, data, http)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_WITHIN)
        except TimeoutError:
            process.kill()  # its children watch for that, and end
            await process.wait()


@contextlib.asynccontextmanager
async def _listening(app: str) -> AsyncIterator[Heard]:
    """A client of the hub, with the official protocol, that hears every alert."""
    from pysignalr.client import SignalRClient

    heard, is_open = Heard(), asyncio.Event()

    async def opened() -> None:
        is_open.set()

    client = SignalRClient(f"{app}/api?symbols=all")
    client.on("alert", heard.take)
    client.on_open(opened)
    task = asyncio.create_task(client.run())
    try:
        await is_open.wait()
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def measure(size: Size, port: int, folder: Path) -> dict[str, float]:
    """Run it once; the figures."""
    say(f"writing {size.symbols} symbols, {size.history} bars of history and {size.days} days")
    market = write_market(folder / "market", symbols=size.symbols, history=size.history, days=size.days)
    async with _running(market, folder / "market", folder / "data", port, size.instances) as stage:
        began = time.monotonic()
        await stage.ready()
        say(f"ready at {stage.app}; history is fetched and evaluated")
        await stage.settled(market.history_closes_at, size.symbols)
        backfill = time.monotonic() - began
        say(f"history is in after {backfill:.1f} s; {size.days} market days close at once")
        before = (await stage.ask("/status"))["topic"]["accepted"]
        async with _listening(stage.app) as heard:
            jumped_at = time.time()
            await stage.move_clock(market.closes_at + AFTER_CLOSE)
            topic = await stage.settled(market.closes_at, size.symbols)
            [last] = (await stage.ask("/topic/recent?n=1"))["items"]
            answered = await _answers(stage, jumped_at)
        figures = _figures(stage, heard, answered, parse_instant(last["received_at"]).timestamp())
        events = topic["accepted"] - before
        figures = {"events_per_s": round(events / figures["seconds"], 1)} | figures | {"events": events}
        counts = {name: stage.count(sql) for name, sql in _COUNTS.items()}
        say("waiting for the digests")
        while stage.count(_DIGESTS) < size.days:  # noqa: ASYNC110 - another process writes them
            await asyncio.sleep(LOOK_EVERY)
        figures |= counts | {"digests": stage.count(_DIGESTS), "backfill_s": round(backfill, 1)}
        figures |= {"topic_retried": topic["retried"], "topic_dead": topic["dead"]}
        _check(size, figures)
        return figures


async def _answers(stage: Stage, after: float) -> dict[str, float]:
    """When the provider first answered for each symbol after an instant."""
    items = (await stage.ask("/market/answers"))["items"]
    times = [
        (parse_instant(item["answered_at"]).timestamp(), item["symbol"])
        for item in items
        if item["provider"] == "alpha_vantage"
    ]
    # The items come newest first, so the earliest stays.
    return {symbol: at for at, symbol in times if at >= after}


def _figures(stage: Stage, heard: Heard, answered: Mapping[str, float], ended_at: float) -> dict[str, float]:
    if not heard.at:
        raise BenchError("no alert was pushed: the days that closed made no entry speak")
    waits = [1000 * (at - answered[heard.symbols[alert_id]]) for alert_id, at in heard.at.items()]
    return {
        "p50_ms": round(quantile(waits, 0.5), 1),
        "p99_ms": round(quantile(waits, 0.99), 1),
        "peak_mb": round(stage.peak, 1),
        "seconds": round(ended_at - min(answered.values()), 2),
        "app_cpu_s": round(stage.computed(), 2),
        "pushed": len(heard.at),
    }


def _check(size: Size, figures: Mapping[str, float]) -> None:
    """Numbers are worth something only when everything was done."""
    wanted = size.symbols * (size.history + size.days)
    faults = [
        f"{figures['bars']} bars are stored, not {wanted}" if figures["bars"] != wanted else "",
        f"{figures['deliveries_not_sent']} deliveries were not sent" if figures["deliveries_not_sent"] else "",
        f"{figures['pushed']} of {figures['signals']} live signals were pushed"
        if not figures["pushed"] == figures["signals"] == figures["alerts"] == figures["posts"]
        else "",
        f"{figures['topic_dead']} events were buried" if figures["topic_dead"] else "",
    ]
    if any(faults):
        raise BenchError("; ".join(filter(None, faults)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser("bench.pipeline", description=(__doc__ or "").strip().splitlines()[0])
    add = parser.add_argument
    add("--symbols", type=int, default=524, help="how many symbols (524)")
    add("--history", type=int, default=100, help="bars of history a symbol (100)")
    add("--days", type=int, default=5, help="market days that close at once (5)")
    add("--instances", type=int, default=1, help="instances of the app (1)")
    add("--port", type=int, default=0, help="the app's port; a free one unless told")
    add("--within", type=float, default=170, help="seconds after which it gives up (170)")
    add("--keep", type=Path, help="a folder that keeps data and logs; it must not exist")
    o = parser.parse_args(arguments)
    size = Size(symbols=o.symbols, history=o.history, days=o.days, instances=o.instances)
    with contextlib.ExitStack() as stack:
        folder = o.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="troop-pipeline-")))
        folder.mkdir(exist_ok=o.keep is None)
        try:
            report("pipeline", asyncio.run(_within(o.within, measure(size, o.port or _free_port(), folder))))
        except BenchError as e:
            say(f"bench.pipeline: {e}")
            return 1
        except TimeoutError:
            say(f"bench.pipeline: not done within {o.within:g} s")
            return 1
    return 0


async def _within[T](seconds: float, work: Any) -> T:  # noqa: ANN401 - a coroutine
    async with asyncio.timeout(seconds):
        result: T = await work
        return result


if __name__ == "__main__":
    sys.exit(main())
