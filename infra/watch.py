"""`troop watch`: live alerts in the terminal, through the hub, with nothing missed in between."""

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import httpx

KNOWN = 10_000
CATCH_UP = 10
AGAIN_AFTER = 3.0


class Screen:
    """Prints each alert once."""

    def __init__(self) -> None:
        self._known: dict[str, None] = {}
        self.cursor: str | None = None

    def show(self, item: Mapping[str, Any]) -> None:
        alert_id = str(item["alert_id"])
        if alert_id in self._known:
            return
        self._known[alert_id] = None
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]
        self.cursor = str(item["cursor"])
        arrow = {"long": "▲", "short": "▼"}.get(str(item["direction"]), "·")
        print(f"{item['occurred_at'][:16]}  {arrow} {item['title']:<28} {item['text']}", flush=True)


async def watch(url: str, symbols: str) -> int:
    """Show alerts until interrupted; the hub tells what is new, the API what was missed."""
    url = url.rstrip("/")
    screen = Screen()
    try:
        await _catch_up(url, screen)
        print(f"listening to {symbols} at {url}; Ctrl-C ends", file=sys.stderr, flush=True)
        while True:
            await _listen(url, symbols, screen)
            await asyncio.sleep(AGAIN_AFTER)
            await _catch_up(url, screen)
    except (httpx.HTTPError, ValueError, KeyError) as e:
        print(
            f"troop watch: {url} does not answer as TROOP does ({type(e).__name__}): start it with make run, "
            "or name another with --url",
            file=sys.stderr,
        )
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 0


async def _catch_up(url: str, screen: Screen) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        params = {"after": screen.cursor} if screen.cursor else {"limit": str(CATCH_UP)}
        answer = await client.get(f"{url}/api/alerts", params=params)
        answer.raise_for_status()
        items = answer.json()["items"]
    for item in items if screen.cursor else reversed(items):
        screen.show(item)


async def _listen(url: str, symbols: str, screen: Screen) -> None:
    """Hear the hub until the connection ends."""
    from pysignalr.client import SignalRClient
    from pysignalr.exceptions import AuthorizationError, ServerError

    async def on_alert(arguments: list[Mapping[str, Any]]) -> None:
        for item in arguments:
            screen.show(item)

    client = SignalRClient(f"{url}/api?symbols={symbols}")
    client.on("alert", on_alert)
    try:
        await client.run()
    except (AuthorizationError, ServerError, OSError):
        return  # the token ran out or the service restarted: negotiate again
