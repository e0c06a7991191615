"""`troop watch`: each alert once, none missed, and a sentence where nobody answers."""

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from infra.watch import CATCH_UP, PAGE, Screen, catch_up, wanted, watch
from shared.errors import InvalidPayloadError


def alert(number: int, symbol: str = "AAPL") -> dict[str, Any]:
    """An item of /api/alerts."""
    return {
        "alert_id": f"alert-{number}",
        "symbol": symbol,
        "direction": "long",
        "title": f"{symbol}: number {number:05}",
        "text": "text",
        "occurred_at": "2013-01-18T21:00:00Z",
        "cursor": cursor(number),
    }


def cursor(number: int) -> str:
    return base64.urlsafe_b64encode(f"{number:05}".encode()).decode()


class Api:
    """A stand-in for /api/alerts with its manners: newest first, or behind ``after`` with an overlap of two."""

    def __init__(self) -> None:
        self.url = ""
        self.alerts: list[dict[str, Any]] = []
        self.status = 200
        self.negotiated = 0

    async def list_alerts(self, request: web.Request) -> web.Response:
        if self.status != 200:
            return web.Response(status=self.status, text="no TROOP")
        limit, after = int(request.query.get("limit", "50")), request.query.get("after")
        if after is None:
            return web.json_response({"items": self.alerts[::-1][:limit], "next": None})
        place = next(i for i, item in enumerate(self.alerts) if item["cursor"] == after)
        items = self.alerts[max(0, place - 2) : place + 1 + limit]
        return web.json_response({"items": items, "next": items[-1]["cursor"]})

    async def negotiate(self, request: web.Request) -> web.Response:
        self.negotiated += 1
        return web.Response(status=400)


@pytest_asyncio.fixture
async def api() -> AsyncIterator[Api]:
    one = Api()
    app = web.Application()
    app.add_routes([web.get("/api/alerts", one.list_alerts), web.post("/api/negotiate", one.negotiate)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield one
    await runner.cleanup()


def numbers(capture: pytest.CaptureFixture[str]) -> list[int]:
    """Which alerts were printed, in order."""
    return [int(line.split("number ")[1][:5]) for line in capture.readouterr().out.splitlines()]


# --- the screen


def test_an_alert_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """When, which way, what."""
    Screen().show(alert(7))
    assert capsys.readouterr().out == "2013-01-18T21:00  ▲ AAPL: number 00007           text\n"


def test_an_alert_that_comes_again_is_not_shown_again(capsys: pytest.CaptureFixture[str]) -> None:
    """The hub and the API tell of the same alerts; the id tells them apart."""
    screen = Screen()
    for number in (1, 2, 1, 3, 2, 3):
        screen.show(alert(number))
    assert numbers(capsys) == [1, 2, 3]


def test_only_the_wanted_symbols_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """What was missed is held to the same wish as what is pushed."""
    screen = Screen(wanted("msft, IBM"))
    for number, symbol in enumerate(("AAPL", "MSFT", "GOOG", "IBM")):
        screen.show(alert(number, symbol))
    assert numbers(capsys) == [1, 3]
    assert screen.cursor == cursor(3)


@pytest.mark.parametrize("text", ["all", "", "AAPL,all"])
def test_all_is_no_wish(text: str) -> None:
    """Everything is shown."""
    assert wanted(text) is None


def test_a_wish_that_is_no_symbol_is_refused() -> None:
    """It is named, so that a typing error is not taken for silence."""
    with pytest.raises(InvalidPayloadError, match=r"'\$\$' is no symbol"):
        wanted("AAPL,$$")


# --- what was missed


async def test_a_start_shows_the_last_few_oldest_first(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    """A newcomer sees where things stand, and not the whole history."""
    api.alerts = [alert(n) for n in range(100)]
    screen = Screen()
    await catch_up(api.url, screen)
    assert numbers(capsys) == list(range(100 - CATCH_UP, 100))
    assert screen.cursor == cursor(99)


async def test_after_a_break_everything_that_was_missed_is_shown_once(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many came meanwhile, and though each answer repeats a few."""
    api.alerts = [alert(n) for n in range(5)]
    screen = Screen()
    await catch_up(api.url, screen)
    api.alerts += [alert(n) for n in range(5, 5 + 2 * PAGE + 50)]
    await catch_up(api.url, screen)
    await catch_up(api.url, screen)
    assert numbers(capsys) == list(range(5 + 2 * PAGE + 50))


async def test_nothing_there_yet_is_no_trouble(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    """The first alert is shown when it comes."""
    screen = Screen()
    await catch_up(api.url, screen)
    api.alerts = [alert(1)]
    await catch_up(api.url, screen)
    assert numbers(capsys) == [1]


# --- where nobody answers


async def test_a_stopped_server_is_one_sentence(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the address and the remedy."""
    nobody = "http://127.0.0.1:9"
    assert await watch(nobody, "all") == 1
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    assert line.startswith(f"troop watch: {nobody} does not answer as TROOP does (ConnectError)")
    assert "make run" in line
    assert "--url" in line


@pytest.mark.parametrize("url", ["nonsense", "http://[", "ftp://127.0.0.1/"])
async def test_an_address_that_is_none_is_one_sentence(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback, whatever was typed."""
    assert await watch(url, "all") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"troop watch: {url.rstrip('/')} does not answer as TROOP does")


@pytest.mark.parametrize("status", [404, 500])
async def test_a_server_that_is_another_is_one_sentence(
    api: Api, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers, but not as TROOP."""
    api.status = status
    assert await watch(api.url, "all") == 1
    assert "does not answer as TROOP does (HTTPStatusError)" in capsys.readouterr().err


async def test_a_hub_that_refuses_us_is_one_sentence(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked once, and not for ever."""
    assert await watch(api.url, "all") == 1
    assert api.negotiated == 1
    assert "does not answer as TROOP does" in capsys.readouterr().err


async def test_symbols_that_are_none_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody is asked."""
    assert await watch("http://127.0.0.1:9", "$$") == 1
    assert capsys.readouterr().err.startswith("troop watch: --symbols: '$$' is no symbol")
