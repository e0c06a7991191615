"""
How fast one alert reaches everybody at the hub, against a bare loop that sends the same bytes to as many sockets.

SignalRChannel sends the alert over the REST data plane to the embedded SignalR service, a process of its own, and that
to its clients, each a guest of its own; half of them follow the alert's symbol, half all symbols. The bare loop is a
process of its own too, which the same channel calls: it answers 202 and sends the bytes that the clients of the hub
received, with one ``send`` a socket. Both are timed from the call to send until the last client has received the alert,
in turns and with the same receiving code; ``vs_bare_1000`` and ``vs_bare_5000`` are ratios of medians. In every round
every client must get the alert once and whole.
"""

import argparse
import asyncio
import base64
import contextlib
import gc
import itertools
import json
import os
import resource
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, Self
from urllib.parse import urlsplit

from alerts.adapters.signalr import SignalRChannel
from alerts.items import item_of
from alerts.logic.wording import word
from alerts.models import PUBLIC, Delivery, Record, Severity, delivery_id
from alerts.ports import Message
from bench._fanout_clients import payload_of
from bench._processes import cpu_seconds, peak_mb
from bench._report import BenchError, quantile, report, say
from shared.clock import SystemClock
from shared.documents import Document, sort_key
from shared.http_client import HttpClient
from shared.settings import ROOT
from signals.events import SignalRaised

HERE = "127.0.0.1"
GROUPS = ("symbols/AAPL", "symbols/all")
SPARE_FILES = 200
"""Open files a process needs besides one a client."""
WARM_UP = 5
AT_ONCE = 8
"""Guests that negotiate at the same time."""
STOP_WITHIN = 20.0
QUIET = 1.0
"""Seconds in which late and repeated messages would show."""
LONGEST_LINE = 1 << 20
CLOSES_AT = datetime(2013, 1, 2, 21, tzinfo=UTC)


def message_of(n: int) -> Message:
    """The *n*-th alert to everybody: a signal on a daily bar, as the app words it."""
    closed_at = CLOSES_AT + timedelta(days=n)
    signal = SignalRaised(
        signal_id=f"00000000-0000-5000-8000-{n:012}",
        entry="sma-10-30",
        strategy="sma_cross@1",
        params={"fast": 10.0, "slow": 30.0},
        symbol="AAPL",
        interval="1d",
        direction="long",
        strength=0.42,
        reference_price=561.7,
        features={"fast": 552.1, "slow": 550.3},
        provider="alpha_vantage",
        occurred_at=closed_at,
        recorded_at=closed_at,
    )
    alert = word(signal, PUBLIC, Severity.INFO, now=closed_at)
    sent_to = [
        Delivery(
            delivery_id=delivery_id(alert.alert_id, channel),
            alert_id=alert.alert_id,
            subscriber=PUBLIC,
            channel=channel,
            severity=alert.severity,
        )
        for channel in ("signalr", "discord")
    ]
    stored = Document(id=alert.alert_id, partition=PUBLIC, sort=sort_key(closed_at, alert.alert_id), body={})
    item = item_of(Record(alert=alert, deliveries=sent_to, document=stored))
    return Message(alert=alert, item=item, delivery_id=sent_to[0].delivery_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What all clients of one kind received in one round."""

    last_at: float
    frames: Mapping[bytes, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """
    Which CPUs the processes run on: whoever sends on one of their own, whoever receives on another.

    Left alone, the system now and then puts a receiver on its sender's CPU, and the round measures that. With one CPU
    there is nothing to choose; from three on the benchmark itself keeps off both.
    """

    senders: frozenset[int]
    receivers: frozenset[int]
    others: frozenset[int]

    @classmethod
    def chosen(cls) -> Self:
        allowed = os.sched_getaffinity(0)
        if len(allowed) < 2:
            return cls(senders=frozenset(allowed), receivers=frozenset(allowed), others=frozenset(allowed))
        first, second, *rest = sorted(allowed)
        return cls(senders=frozenset({first}), receivers=frozenset({second}), others=frozenset(rest or allowed))


class Clients:
    """One process full of clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, do: str, **details: object) -> dict[str, Any]:
        """Give a command; the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **details}).encode() + b"\n")
        await self._process.stdin.drain()
        return await self._answer()

    async def heard(self) -> Heard:
        """What it received, after it was told to hear."""
        answer = await self._answer()
        return Heard(last_at=answer["last"], frames=_frames(answer))

    async def quiet(self) -> Mapping[bytes, int]:
        """What comes when nothing should."""
        return _frames(await self.ask("quiet", seconds=QUIET))

    async def _answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await _line(self._process))
        return answer


class Side:
    """One way for an alert to reach many: a process that sends, and one full of clients."""

    def __init__(self, name: str, pid: int, url: str, key: str, clients: Clients) -> None:
        self.name = name
        self.pid = pid
        self.took: list[float] = []
        self._clients = clients
        self._http = HttpClient(name)
        self._channel = SignalRChannel(f"Endpoint={url};AccessKey={key};Version=1.0;", self._http, SystemClock())
        self._open = 0

    async def round(self, message: Message) -> Heard:
        """Send an alert and note how long the last client waited for it; what all of them got."""
        await self._clients.ask("hear")
        began = time.monotonic()
        await self._channel.send(message)
        heard = await self._clients.heard()
        self.took.append(1000 * (heard.last_at - began))
        return heard

    async def check_quiet(self) -> None:
        """Nothing comes that was not sent."""
        if more := await self._clients.quiet():
            raise BenchError(f"after the last round there came from {self.name}: {_told(more)}")

    async def close(self) -> None:
        await self._http.aclose()


class Hub(Side):
    """The embedded service."""

    async def grow(self, to: int, protocol: str) -> None:
        """Let guests come until there are so many: each joins a group and connects."""
        users = {f"guest-{number:032}": GROUPS[number % 2] for number in range(self._open, to)}
        waiting = iter(users.items())
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(self._join_all(waiting))
        connections = [self._channel.connection(user) for user in users]
        address = urlsplit(connections[0].url)
        answer = await self._clients.ask(
            "hub",
            host=address.hostname,
            port=address.port,
            path=f"{address.path}?{address.query}",
            protocol=protocol,
            tokens=[connection.access_token for connection in connections],
        )
        self._open = answer["open"]

    async def _join_all(self, users: Iterator[tuple[str, str]]) -> None:
        for user, group in users:
            await self._channel.join(user, group)


class Bare(Side):
    """Sockets and a loop."""

    def __init__(self, name: str, pid: int, url: str, door: int, clients: Clients) -> None:
        super().__init__(name, pid, url, "of nobody, who looks at no token", clients)
        self._url = url
        self._door = door

    async def grow(self, to: int) -> None:
        """Open sockets until there are so many."""
        self._open = (await self._clients.ask("plain", host=HERE, port=self._door, count=to - self._open))["open"]

    async def prepare(self, frame: bytes) -> None:
        """Say which bytes to send."""
        await self._http.send("PUT", f"{self._url}/frame", params={}, headers={}, content=frame)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Both sides, running."""

    hub: Hub
    bare: Bare

    async def compare(self, size: int, rounds: int, protocol: str, numbers: Iterator[int]) -> dict[str, float]:
        """The figures for so many clients."""
        say(f"{size} clients connect")
        await self.hub.grow(size, protocol)
        await self.bare.grow(size)
        for _ in range(WARM_UP):
            await self._round(message_of(next(numbers)), size, protocol)
        for side in (self.hub, self.bare):
            side.took.clear()
        computed = cpu_seconds(self.hub.pid)
        for _ in range(rounds):
            await self._round(message_of(next(numbers)), size, protocol)
        ours, theirs = self.hub.took, self.bare.took
        say(f"{size} clients: {median(ours):.1f} ms, bare {median(theirs):.1f} ms")
        return {
            f"vs_bare_{size}": round(median(ours) / median(theirs), 3),
            f"p50_ms_{size}": round(median(ours), 2),
            f"p99_ms_{size}": round(quantile(ours, 0.99), 2),
            f"bare_p50_ms_{size}": round(median(theirs), 2),
            f"bare_p99_ms_{size}": round(quantile(theirs, 0.99), 2),
            f"cpu_ms_{size}": round(1000 * (cpu_seconds(self.hub.pid) - computed) / rounds, 1),
        }

    async def _round(self, message: Message, size: int, protocol: str) -> None:
        frame = _checked(await self.hub.round(message), message, size, protocol)
        await self.bare.prepare(frame)
        heard = await self.bare.round(message)
        if heard.frames != {frame: size}:
            raise BenchError(f"{self.bare.name} reached {_told(heard.frames)}, not {size} clients once")


@contextlib.asynccontextmanager
async def _running(folder: Path) -> AsyncIterator[Stage]:
    """Four processes, ended whatever happens."""
    cores = Cores.chosen()
    key = secrets.token_hex(32)
    async with contextlib.AsyncExitStack() as stack:

        async def start(module: str, *arguments: str, on: Collection[int]) -> asyncio.subprocess.Process:
            process = await _started(module, *arguments)
            stack.push_async_callback(_stopped, process)
            os.sched_setaffinity(process.pid, on)
            return process

        full = [Clients(await start("bench._fanout_clients", on=cores.receivers)) for _ in range(2)]
        arguments = ("--port", "0", "--data", str(folder / "signalr.db"), "--access-key", key)
        service = await start("infra.local.signalr", *arguments, on=cores.senders)
        loop = await start("bench._fanout_bare", on=cores.senders)
        os.sched_setaffinity(0, cores.others)
        url = (await _line(service)).split()[-1]
        calls, door = (await _line(loop)).split()
        hub = Hub("the hub", service.pid, url, key, full[0])
        stack.push_async_callback(hub.close)
        bare = Bare("the bare loop", loop.pid, f"http://{HERE}:{calls}", int(door), full[1])
        stack.push_async_callback(bare.close)
        yield Stage(hub=hub, bare=bare)


async def measure(sizes: Sequence[int], rounds: int, protocol: str, folder: Path) -> dict[str, float]:
    """Every figure."""
    figures: dict[str, float] = {}
    load = os.getloadavg()[0]
    numbers = itertools.count(1)
    async with _running(folder) as stage:
        for size in sizes:
            gc.collect()
            gc.freeze()  # what is kept for long is not looked through while something is timed
            figures |= await stage.compare(size, rounds, protocol, numbers)
        for side in (stage.hub, stage.bare):
            await side.check_quiet()
        return figures | {"peak_mb": round(peak_mb(stage.hub.pid), 1), "load": round(load, 2)}


def _checked(heard: Heard, message: Message, size: int, protocol: str) -> bytes:
    """The one frame that all clients got: the alert, whole."""
    if list(heard.frames.values()) != [size]:
        raise BenchError(f"the hub reached {_told(heard.frames)}, not {size} clients once")
    [frame] = heard.frames
    payload = payload_of(frame)
    if protocol == "json":
        said: object = json.loads(payload.removesuffix(b"\x1e"))
        wanted: object = {"type": 1, "target": "alert", "arguments": [message.item]}
    else:
        import msgpack

        said = msgpack.unpackb(payload[2:])  # behind its length, two bytes from 128 to 16,383
        wanted = [1, {}, None, "alert", [message.item], []]
    if said != wanted:
        raise BenchError(f"clients got another alert than was sent: {payload!r}")
    return frame


def _told(frames: Mapping[bytes, int]) -> str:
    return f"{len(frames)} different messages, {sum(frames.values())} times in all"


def _frames(answer: Mapping[str, Any]) -> Mapping[bytes, int]:
    return {base64.b64decode(frame): times for frame, times in answer["heard"]}


async def _started(module: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LONGEST_LINE,
        start_new_session=True,  # Ctrl-C is ours: they are stopped in order
    )


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise BenchError("a process of the benchmark ended by itself; what it said is above")
    return line.decode()


async def _stopped(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_WITHIN)
    except TimeoutError:
        process.kill()
        await process.wait()


def make_room(clients: int) -> None:
    """
    Let this process and its children open a file a client.

    Raises:
        BenchError: the system does not allow so many.

    """
    needed = clients + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BenchError(
            f"{clients} clients need {needed} open files a process, and {hard} are allowed here: raise the hard limit "
            f"(ulimit -Hn, or LimitNOFILE) or choose fewer with --clients"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser("bench.fanout", description=(__doc__ or "").strip().splitlines()[0])
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[1000, 5000], help="how many clients, ascending (1000 5000)")
    add("--rounds", type=int, default=40, help="how often each is measured (40)")
    add("--protocol", choices=("json", "messagepack"), default="json", help="what the clients speak (json)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # our processes are stopped then, too
    try:
        make_room(max(options.clients))
        with tempfile.TemporaryDirectory(prefix="troop-fanout-") as folder:
            work = measure(sorted(options.clients), options.rounds, options.protocol, Path(folder))
            report("fanout", asyncio.run(work))
    except BenchError as e:
        say(f"bench.fanout: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
