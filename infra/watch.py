"""`troop watch`: live alerts in the terminal, through the hub, with nothing missed in between."""

import asyncio
import sys
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

from shared.errors import InvalidPayloadError
from shared.market.models import symbol_of

KNOWN = 10_000
CATCH_UP = 10
PAGE = 500
AGAIN_AFTER = 3.0


class Screen:
    """Prints each alert of the wanted symbols once; None wants all."""

    def __init__(self, symbols: frozenset[str] | None = None) -> None:
        self._symbols = symbols
        self._known: dict[str, None] = {}
        self.cursor: str | None = None

    def show(self, item: Mapping[str, Any]) -> None:
        shown_as = f"{item['alert_id']}/{item.get('version', 1)}"  # a correction is shown too
        if shown_as in self._known:
            return
        self._known[shown_as] = None
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]
        self.cursor = str(item["cursor"])
        if self._symbols and item["symbol"] not in self._symbols:
            return
        arrow = {"long": "▲", "short": "▼"}.get(str(item["direction"]), "·")
        print(f"{item['occurred_at'][:16]}  {arrow} {item['title']:<28} {item['text']}", flush=True)


async def watch(url: str, symbols: str) -> int:
    """Show alerts until interrupted; the hub tells what is new, the API what was missed."""
    url = url.rstrip("/")
    try:
        screen = Screen(wanted(symbols))
        await catch_up(url, screen)
        print(f"listening to {symbols} at {url}; Ctrl-C ends", file=sys.stderr, flush=True)
        while True:
            await _listen(url, symbols, screen)
            await asyncio.sleep(AGAIN_AFTER)
            await catch_up(url, screen)
    except InvalidPayloadError as e:
        print(f"troop watch: --symbols: {e}, or all", file=sys.stderr)
        return 1
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as e:
        print(
            f"troop watch: {url} does not answer as TROOP does ({type(e).__name__}): start it with make run, "
            "or name another with --url",
            file=sys.stderr,
        )
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 0


def wanted(symbols: str) -> frozenset[str] | None:
    """
    Read ``A,B`` or ``all``, which is None.

    Raises:
        InvalidPayloadError: one of them is no symbol.

    """
    names = [name.strip() for name in symbols.split(",") if name.strip()]
    if not names or "all" in names:
        return None
    return frozenset(symbol_of(name) for name in names)


async def catch_up(url: str, screen: Screen) -> None:
    """Show the last few alerts, or all since the one shown last."""
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        if screen.cursor is None:
            newest = await _alerts(client, url, {"limit": str(CATCH_UP)})
            for item in reversed(newest["items"]):
                screen.show(item)
            return
        after: str | None = None
        while screen.cursor != after:
            after = screen.cursor
            page = await _alerts(client, url, {"after": after, "limit": str(PAGE)})
            for item in page["items"]:
                screen.show(item)
            screen.cursor = page["next"]


async def _alerts(client: httpx.AsyncClient, url: str, params: Mapping[str, str]) -> dict[str, Any]:
    answer = await client.get(f"{url}/api/alerts", params=params)
    answer.raise_for_status()
    page: dict[str, Any] = answer.json()
    return page


async def _listen(url: str, symbols: str, screen: Screen) -> None:
    """Hear the hub until the connection ends for good; after each reconnect, see what was missed."""
    from pysignalr.client import SignalRClient
    from pysignalr.exceptions import ConnectionError as NegotiationRefused
    from pysignalr.exceptions import HubError

    async def on_alert(arguments: list[Mapping[str, Any]]) -> None:
        for item in arguments:
            screen.show(item)

    async def on_open() -> None:
        await catch_up(url, screen)

    client = SignalRClient(f"{url}/api?symbols={symbols}")
    client.on("alert", on_alert)
    client.on_open(on_open)
    try:
        await client.run()
    except NegotiationRefused as e:
        if e.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            raise ValueError(f"negotiate answered {e.status}") from e
    except (HubError, OSError):
        return  # the token ran out or the service restarted: negotiate again
