"""
One instance that delivers, as a process of its own: ``python -m bench._delivery_worker``, with the app's settings.

The alerts domain is wired as in the app. A line of stdin is ``{"copy": n, "event": {...}}`` or ``{"sweep": true}``;
each is answered by a line when it is done, ``error`` where it must come again. It is made to be killed.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from alerts.service import AlertService
from alerts.wiring import wire
from shared.errors import TroopError
from shared.settings import Settings
from shared.telemetry import configure
from shared.wiring import wire_core
from signals.events import SignalRaised

LONGEST_LINE = 1 << 20


async def answer(service: AlertService, order: Mapping[str, Any]) -> None:
    """Do what a line says, and write how it went."""
    said: dict[str, Any]
    try:
        if "sweep" in order:
            said = {"swept": await service.sweep()}
        else:
            await service.announce(SignalRaised.from_wire(SignalRaised.type, order["event"]))
            said = {"copy": order["copy"]}
    except TroopError as e:
        said = {name: order[name] for name in ("copy", "sweep") if name in order}
        said["error"] = f"{type(e).__name__}: {e}"
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


async def run() -> None:
    """Work until there is nobody to tell what."""
    settings = Settings.from_env(os.environ)
    configure(connection_string="", level="ERROR", secrets=settings.secrets())
    service = wire(wire_core(settings)).service
    reader = asyncio.StreamReader(limit=LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    async with asyncio.TaskGroup() as tasks:
        async for line in reader:
            tasks.create_task(answer(service, json.loads(line)))


if __name__ == "__main__":
    asyncio.run(run())
