"""
Alerts lose nothing and repeat nothing: 20,000 events to 1,000 subscribers, under faults and kills.

Two instances deliver over one SQLite file, wired as in the app, and get the events at least once: a tenth twice, all
reordered, and three times an instance is killed in the middle. Every subscriber follows one symbol, so an event is
heard by ``--hearers`` of them (1), at the hub and by e-mail at once; a tenth of the events also goes to one of 100
webhooks, in crowds that meet Discord's limits. What takes them is the embedded cloud's own topic, SignalR service, mail
server and Discord inbox in another process, and 5 % of the channels' calls meet a fault there. 1,000 clients listen.

``lost`` and ``repeated`` are judged by what those saw, never by what the ledger claims. ``webhook_repeats`` are
messages that Discord showed again; each needs a call after which nobody could know (``ambiguous_faults``). ``p50_ms``
and ``p99_ms``: from an event's first hand-over to its alert at a client of the hub. ``outage_requests``: what an hour
without Discord costs with 10,000 messages waiting (``outage_bound`` at most).
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from alerts.adapters.rule_documents import RuleDocuments
from alerts.adapters.signalr import SignalRChannel
from bench._delivery_feed import Feed
from bench._delivery_outage import outage
from bench._delivery_plan import Plan, Size
from bench._delivery_truth import SENDER, Ledger, Seen, Shown, judge, look
from bench._report import BenchError, quantile, report, say
from infra.local.up.settings import Place, embedded
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.http_client import HttpClient
from shared.sealing import Sealer
from shared.settings import ROOT

STOP_WITHIN = 10.0
END = "\x1e"
HELLO = '{"protocol":"json","version":1}' + END
AT_ONCE = 50
"""Clients that connect at the same time."""


@dataclass(slots=True, kw_only=True)
class Heard:
    """What clients of the hub were pushed; they show an alert once, by its id."""

    at: dict[Shown, float] = field(default_factory=dict)
    signals: dict[Shown, str] = field(default_factory=dict)
    pushes: int = 0

    def take(self, subscriber: str, text: str) -> None:
        """Note what a client received."""
        now = time.time()
        for part in text.split(END):
            if '"type":1' not in part.replace(" ", "")[:12]:
                continue
            for item in json.loads(part)["arguments"]:
                self.pushes += 1
                shown = Shown(subscriber, item["alert_id"])
                self.at.setdefault(shown, now)
                self.signals[shown] = item["signal_id"]


@contextlib.asynccontextmanager
async def _neighbours(folder: Path, size: Size, rate: float) -> AsyncIterator[dict[str, Any]]:
    """What the app delivers to, running."""
    arguments = [str(folder), "--rate", str(rate), "--seed", str(size.seed), "--webhooks", str(size.webhooks)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench._delivery_neighbours", *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,  # it ends when we do
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise BenchError("the neighbours did not start; what they said is above")
        yield json.loads(line)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_WITHIN)
        except TimeoutError:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def _listening(settings: Mapping[str, str], subscribers: Sequence[str]) -> AsyncIterator[Heard]:
    """A client of the hub for every subscriber."""
    heard = Heard()
    hub = SignalRChannel(settings["AZURE_SIGNALR_CONNECTION_STRING"], HttpClient("signalr"), SystemClock())
    places = asyncio.Semaphore(AT_ONCE)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http, contextlib.AsyncExitStack() as stack:

        async def connect(name: str) -> aiohttp.ClientWebSocketResponse:
            door = hub.connection(name)
            headers = {"Authorization": f"Bearer {door.access_token}"}
            async with places:
                socket = await http.ws_connect(door.url, headers=headers)
                await socket.send_str(HELLO)
                hello = await socket.receive_str()
                if hello != "{}" + END:
                    raise BenchError(f"the hub refused a client: {hello}")
            return socket

        async def listen(name: str, socket: aiohttp.ClientWebSocketResponse) -> None:
            async for said in socket:
                heard.take(name, str(said.data))

        sockets = await asyncio.gather(*map(connect, subscribers))
        tasks = [asyncio.create_task(listen(*one)) for one in zip(subscribers, sockets, strict=True)]
        stack.callback(lambda: [task.cancel() for task in tasks])
        yield heard
        if any(task.done() for task in tasks):
            raise BenchError("a client lost the hub: what it was pushed cannot be judged")


async def measure(size: Size, folder: Path, *, rate: float, instances: int, kills: int) -> dict[str, float]:
    """Deliver everything once; the figures."""
    load = os.getloadavg()[0]
    plan = Plan(size)
    async with _neighbours(folder, size, rate) as found:
        settings = _settings(folder, found)
        say(f"{size.subscribers} subscribers ask for {size.symbols} symbols, {size.webhooks} have a webhook")
        await _subscribe(plan, settings, found["hooks"])
        ledger = Ledger(folder)
        interrupted: set[str] = set()
        async with _listening(settings, plan.subscribers) as heard:
            feed = Feed(
                plan.order,
                [json.dumps(signal.model_dump(mode="json")) for signal in plan.signals],
                {**_inherited(), **settings},
                instances=instances,
                kills=kills,
                on_kill=lambda: interrupted.update(ledger.being_sent()),
            )
            say(f"{len(plan.order)} events, {len(plan.order) - size.events} of them a second time")
            await feed.run(lambda: not ledger.owed())
            settled_at = time.time()
            async with (
                aiohttp.ClientSession() as http,
                http.get(f"{found['url']}/bench/faults") as answer,
            ):
                faults = await answer.json()
        seen = look(
            folder,
            heard=heard.at,
            signals=heard.signals,
            pushes=heard.pushes,
            hooks={hook.split("/")[-2]: name for hook, name in zip(found["hooks"], plan.hooked, strict=True)},
        )
    expected = plan.expected()
    deliveries = ledger.deliveries()
    began = min(feed.handed_at.values())
    return (
        judge(expected, seen, deliveries, faults, interrupted)
        | _speed(plan, feed, seen, began)
        | {
            "settled_s": round(settled_at - began, 1),
            "deliveries": len(expected),
            "hub_resent": seen.resent,
            "mail_resent": seen.mails - len(seen.mail),
            "faults": sum(sum(struck.values()) for struck in faults.values()),
            "kills": feed.killed,
            "handed_over_again": feed.again,
            "load": round(load, 2),
        }
    )


def _speed(plan: Plan, feed: Feed, seen: Seen, began: float) -> dict[str, float]:
    numbers = {signal.signal_id: n for n, signal in enumerate(plan.signals)}
    hub = [1000 * (at - feed.handed_at[numbers[seen.signals[shown]]]) for shown, at in seen.signalr.items()]
    if not hub:
        raise BenchError("nobody at the hub saw anything")
    return {
        "events_per_s": round(len(plan.signals) / (feed.handled_at - began), 1),
        "p50_ms": round(quantile(hub, 0.5), 1),
        "p99_ms": round(quantile(hub, 0.99), 1),
    }


async def _subscribe(plan: Plan, settings: Mapping[str, str], hooks: Sequence[str]) -> None:
    wall = SystemClock()
    documents = SQLiteDocuments(settings["DOCUMENTS_URL"].removeprefix("sqlite:"), wall)
    try:
        await plan.subscribe(RuleDocuments(documents, wall, Sealer(settings["ENDPOINT_KEYS"])), hooks)
    finally:
        await documents.close()


def _settings(folder: Path, found: Mapping[str, Any]) -> dict[str, str]:
    """What the app is told: the embedded settings, and nobody but our subscribers."""
    nobody = folder / "subscriptions.toml"
    nobody.write_text("")
    place = Place(app_url=found["url"], cloud_url=found["url"], data=folder, smtp_port=found["smtp_port"])
    more = {"SUBSCRIPTIONS_FILE": str(nobody), "EMAIL_FROM": f"TROOP <troop@{SENDER}>"}
    return embedded(place, time=None, live_from="", plan="unlimited", live=False) | more


def _inherited() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}


def _check(figures: Mapping[str, float]) -> None:
    """Numbers are worth something only when every promise was kept."""
    faults = [
        *(f"{name} is {figures[name]:g}, not 0" for name in ZERO if figures[name]),
        *(
            f"{name} is {figures[name]:g}, above {bound} with {figures[bound]:g}"
            for name, bound in BOUNDS.items()
            if figures[name] > figures[bound]
        ),
    ]
    if faults:
        raise BenchError("; ".join(faults))


ZERO = ("lost", "repeated", "sent_in_vain", "webhook_strangers", "outage_lost", "outage_repeats")
BOUNDS = {
    "webhook_repeats": "ambiguous_faults",
    "webhook_unknown": "ambiguous_faults",
    "outage_requests": "outage_bound",
}


async def run(size: Size, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Both parts, within the time."""
    async with asyncio.timeout(options.within):
        figures = await measure(
            size, folder, rate=options.faults / 100, instances=options.instances, kills=options.kills
        )
        say(f"delivered and judged: {json.dumps(figures)}")
        logging.getLogger("alerts").setLevel(logging.ERROR)  # that nobody is there is what is measured
        say("the outage, on a clock that is turned by hand")
        place = Place(app_url="http://127.0.0.1:9", cloud_url="http://127.0.0.1:9", data=folder)
        settings = embedded(place, time=None, live_from="", plan="unlimited", live=False)
        settings["SUBSCRIPTIONS_FILE"] = str(folder / "subscriptions.toml")
        away = await outage(settings, pending=options.pending, webhooks=100)
    return figures | {
        "outage_requests": away.requests,
        "outage_bound": away.bound,
        "outage_lost": away.lost,
        "outage_repeats": away.repeated,
        "outage_drained_s": away.drained.total_seconds(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser("bench.delivery", description=(__doc__ or "").strip().splitlines()[0])
    add = parser.add_argument
    add("--events", type=int, default=20_000, help="how many events (20000)")
    add("--subscribers", type=int, default=1000, help="how many subscribers (1000)")
    add("--hearers", type=int, default=1, help="how many subscribers hear one event (1)")
    add("--webhooks", type=int, default=100, help="how many of them have a webhook (100)")
    add("--faults", type=float, default=5.0, help="how much of a hundred calls to channels goes wrong (5)")
    add("--kills", type=int, default=3, help="how often an instance is killed (3)")
    add("--instances", type=int, default=2, help="how many instances deliver (2)")
    add("--pending", type=int, default=10_000, help="how many messages wait in the outage (10000)")
    add("--seed", type=int, default=6, help="of events, their order and the faults (6)")
    add("--within", type=float, default=590, help="seconds after which it gives up (590)")
    add("--keep", type=Path, help="a folder that keeps the data; it must not exist")
    o = parser.parse_args(arguments)
    size = Size(
        events=o.events,
        subscribers=o.subscribers,
        hearers=o.hearers,
        webhooks=min(o.webhooks, o.subscribers // o.hearers),
        seed=o.seed,
    )
    with contextlib.ExitStack() as stack:
        folder = o.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="troop-delivery-")))
        folder.mkdir(exist_ok=o.keep is None)
        try:
            figures = asyncio.run(run(size, folder, o))
            report("delivery", figures)
            _check(figures)
        except BenchError as e:
            say(f"bench.delivery: {e}")
            return 1
        except TimeoutError:
            say(f"bench.delivery: not done within {o.within:g} s")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
