"""
What the delivery benchmark delivers to, as a process of its own: ``python -m bench._delivery_neighbours DIR``.

The embedded cloud's topic, SignalR service, Discord inbox and mail server, with seeded faults of its channels: asked to
wait, 5xx, cut before or after a message was taken, no answer in time. What people saw is in DIR/cloud.db. It writes one
JSON line with its addresses, and works until it is told to stop; ``GET /bench/faults`` tells what struck.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from random import Random

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from infra.local.cloud import open_state
from infra.local.discord import DiscordInbox
from infra.local.faults import Switchboard
from infra.local.mailbox import Mailbox, Stage, Trouble
from infra.local.signalr.service import SignalRService
from infra.local.topic import Topic
from infra.local.up.settings import SIGNALR_KEY, TOPIC_KEY

TARGETS = {"/discord/api/": "discord", "/api/hubs/": "signalr"}
KINDS = {"429": 30, "500": 20, "503": 20, "cut": 12, "cut_after": 13, "silence": 5}
"""How often each kind is among the faults of an HTTP channel, in percent."""
CERTAIN = frozenset({"429"})
"""Of these Discord's callers know that nothing was taken."""
SILENCE = 6.0
"""Seconds without an answer: longer than an attempt may take."""
WAIT = 1.0
MAIL = (
    (0.30, {"stage": "recipient", "reply": "450 4.2.0 the mailbox is busy"}),
    (0.30, {"stage": "dot", "reply": "451 4.3.0 not now"}),
    (0.15, {"stage": "dot", "cut": True}),
    (0.20, {"stage": "dot", "cut": True, "accept": True}),
    (0.05, {"stage": "dot", "cut": True, "accept": True, "latency_ms": 1000 * SILENCE}),
)
"""The faults of the mail server, each with its part of all of them."""


class Dice:
    """Lets faults strike the HTTP channels at a rate."""

    def __init__(self, rate: float, seed: int) -> None:
        self._rate = rate
        self._dice = {target: Random(f"{seed}/{target}") for target in TARGETS.values()}
        self.struck: dict[str, Counter[str]] = {target: Counter() for target in TARGETS.values()}

    def middleware(self) -> Middleware:
        """What stands before the channels."""

        @web.middleware
        async def strike(request: web.Request, handler: Handler) -> web.StreamResponse:
            target = next((t for prefix, t in TARGETS.items() if request.path.startswith(prefix)), None)
            if target is None or self._dice[target].random() >= self._rate:
                return await handler(request)
            [kind] = self._dice[target].choices(list(KINDS), list(KINDS.values()))
            self.struck[target][kind] += 1
            return await _struck(kind, request, handler)

        return strike


async def _struck(kind: str, request: web.Request, handler: Handler) -> web.StreamResponse:
    match kind:
        case "429":
            body = {"message": "You are being rate limited.", "retry_after": WAIT, "global": False}
            return web.json_response(body, status=429, headers={"Retry-After": f"{WAIT:g}"})
        case "500" | "503":
            return web.Response(status=int(kind))
        case "silence":
            answer = await handler(request)
            await asyncio.sleep(SILENCE)
            return answer
        case "cut":
            await request.read()
            answer = web.Response(status=500)
        case _:
            answer = await handler(request)
    if request.transport is not None:
        request.transport.abort()
    return answer


class CountedMailbox(Mailbox):
    """A mail server that knows by which fault it struck."""

    def __init__(self, state: sqlite3.Connection) -> None:
        super().__init__(state)
        self.struck: Counter[str] = Counter()

    def strike(self, stage: Stage) -> Trouble | None:
        trouble = super().strike(stage)
        if trouble is not None:
            taken = "cut_after" if trouble.accept else "cut"
            kind = trouble.reply[:3] if trouble.reply else "silence" if trouble.latency_ms else taken
            self.struck[kind] += 1
        return trouble


async def serve(folder: Path, *, rate: float, seed: int, webhooks: int) -> None:
    """Work until told to stop."""
    # Clients that are killed leave in the middle of a call, and each would be told of with a trace.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    dice = Dice(rate, seed)
    with contextlib.closing(open_state(folder / "cloud.db")) as state:
        topic = Topic(state, (), "http://127.0.0.1:9", "nobody listens", key=TOPIC_KEY, faults=Switchboard())
        discord, mailbox = DiscordInbox(state), CountedMailbox(state)
        signalr = SignalRService(SIGNALR_KEY, state)
        mailbox.set({"seed": seed, "faults": [{**fault, "rate": rate * part} for part, fault in MAIL]})

        async def faults(_: web.Request) -> web.Response:
            return web.json_response({**dice.struck, "email": mailbox.struck})

        app = web.Application(middlewares=[dice.middleware()])
        app.add_routes([*topic.routes(), *discord.routes(), *signalr.routes(), web.get("/bench/faults", faults)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            await mailbox.start()
            await signalr.start()
            await topic.start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            made = [discord.make_webhook() for _ in range(webhooks)]
            hooks = [f"{url}/discord/api/webhooks/{id_}/{token}" for id_, token in made]
            print(json.dumps({"url": url, "smtp_port": mailbox.port, "hooks": hooks}), flush=True)
            await _until(stop)
        finally:
            await topic.close()
            await signalr.close()
            await mailbox.close()
            await runner.cleanup()


async def _until(stop: asyncio.Event) -> None:
    """Wait to be told to stop, or for the end of whoever started this: then stdin ends, however they died."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    left = asyncio.create_task(reader.read())
    left.add_done_callback(lambda _: stop.set())
    await stop.wait()
    left.cancel()


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser("bench._delivery_neighbours")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--webhooks", type=int, required=True)
    o = parser.parse_args()
    asyncio.run(serve(o.folder, rate=o.rate, seed=o.seed, webhooks=o.webhooks))


if __name__ == "__main__":
    main()
