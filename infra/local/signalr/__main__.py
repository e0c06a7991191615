"""The service alone: python -m infra.local.signalr --port 8888 --data signalr.db."""

import argparse
import asyncio
import logging
import signal
from pathlib import Path

from aiohttp import web

from infra.local.signalr.options import DEFAULT, FREE_TIER, Options
from infra.local.signalr.service import SignalRService

# The official emulator's key: public, and good for nothing else.
EMULATOR_KEY = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789ABCDEFGH"


async def serve(port: int, data: Path, access_key: str, options: Options) -> None:
    """Serve on 127.0.0.1 until the process is told to end."""
    service = SignalRService(access_key, data, options=options)
    app = web.Application()
    app.add_routes(service.routes())
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
    await runner.setup()
    await service.start()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        host, bound = runner.addresses[0][:2]
        print(f"SignalR service on http://{host}:{bound}", flush=True)
        await _told_to_end()
    finally:
        await service.close()
        await runner.cleanup()


async def _told_to_end() -> None:
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await told.wait()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.signalr", description=__doc__)
    parser.add_argument("--port", type=int, default=8888, help="0 takes any free port")
    parser.add_argument("--data", type=Path, required=True, help="the SQLite file for user groups")
    parser.add_argument("--access-key", default=EMULATOR_KEY, help="the official emulator's key")
    parser.add_argument("--free-tier", action="store_true", help="20 connections, 20,000 messages")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    options = FREE_TIER if given.free_tier else DEFAULT
    asyncio.run(serve(given.port, given.data, given.access_key, options))


if __name__ == "__main__":
    main()
