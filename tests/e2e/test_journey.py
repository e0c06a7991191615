"""One signal, followed all the way: provider, signal, alert, the official clients, Discord, a post."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.harness import ROOT, Running, troop_up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

NODE = ROOT / "tests" / "e2e" / "node"
STANDING = ("--symbols", "IBM,MSFT", "--from", "2012-03-01", "--to", "2012-06-01", "--speed", "0")


class Listener:
    """A client process that prints what it hears as JSON lines."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
        assert self._next() == {"ready": True}

    def _next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or '{"ended": true}')

    def alert(self, alert_id: str) -> dict[str, Any]:
        """Read on until this alert arrives."""
        while True:
            heard = self._next()
            assert "ended" not in heard, "the client ended before the alert came"
            if heard.get("alert", {}).get("alert_id") == alert_id:
                return heard["alert"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


PYTHON_CLIENT = """
import asyncio, json, sys
from pysignalr.client import SignalRClient
async def main():
    client = SignalRClient(sys.argv[1] + "/api?symbols=all")
    async def heard(arguments):
        for item in arguments: print(json.dumps({"alert": item}), flush=True)
    async def opened(): print(json.dumps({"ready": True}), flush=True)
    client.on("alert", heard); client.on_open(opened)
    await asyncio.wait_for(client.run(), 120)
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with troop_up(tmp_path_factory.mktemp("journey"), *STANDING) as running:
        running.until(
            "history",
            lambda: (
                all(w["evaluated_through"] for w in running.get("/api/watchlist")["items"])
                and len(running.get("/api/watchlist")["items"]) == 2
            ),
        )
        yield running


@pytest.fixture(scope="module")
def clients(run: Running) -> Iterator[dict[str, Listener]]:
    """The official clients, connected while the market stands still."""
    node = ["node", "journey.mjs", run.url]
    listening = {
        "node": Listener([*node, "all", "json", "120"], NODE),
        "node with MessagePack": Listener([*node, "IBM,MSFT", "messagepack", "120"], NODE),
        "pysignalr": Listener([sys.executable, "-c", PYTHON_CLIENT, run.url], ROOT),
    }
    yield listening
    for client in listening.values():
        client.close()


def test_one_signal_reaches_everybody(run: Running, clients: dict[str, Listener]) -> None:
    """What the provider answered comes out as the same facts at every end, clients unmodified."""
    run.tell_cloud("/clock", {"speed": 432_000})
    run.until("an alert", lambda: bool(run.get("/api/alerts")["items"]))
    run.until("a delivered alert", lambda: _first(run)["deliveries"][0]["state"] == "SENT")
    run.until("both channels", lambda: all(d["state"] == "SENT" for d in _first(run)["deliveries"]))
    alert = _first(run)
    symbol, session = alert["symbol"], alert["occurred_at"][:10]

    key = {"function": "TIME_SERIES_DAILY_ADJUSTED", "symbol": symbol, "outputsize": "full", "apikey": "local-premium"}
    answer = httpx.get(f"{run.cloud}/alpha_vantage/query", params=key, trust_env=False).json()
    close = float(answer["Time Series (Daily)"][session]["4. close"])
    [signal] = [s for s in run.everything("/api/signals") if s["signal_id"] == alert["signal_id"]]
    assert (signal["reference_price"], signal["closed_at"][:10], signal["origin"]) == (close, session, "live")
    assert alert["reference_price"] == close

    for name, client in clients.items():
        heard = client.alert(alert["alert_id"])
        assert {**heard, "deliveries": None} == {**alert, "deliveries": None}, name

    [message] = [m for m in run.inbox() if alert["alert_id"] in json.dumps(m)]
    assert message["embeds"][0]["title"] == alert["title"]
    assert not any(message["pings"].values())

    run.until("the post", lambda: any(p["signal_ids"] == [alert["signal_id"]] for p in run.everything("/api/posts")))
    [post] = [
        p for p in run.everything("/api/posts") if p["kind"] == "signal" and p["signal_ids"] == [alert["signal_id"]]
    ]
    assert f"{close:,.2f}" in post["html"]
    feed = httpx.get(f"{run.url}/api/feed.xml", trust_env=False)
    assert f"urn:uuid:{post['post_id']}" in feed.text


def test_a_client_that_was_away_catches_up(run: Running, clients: dict[str, Listener]) -> None:
    """?after= returns what came later, oldest first, and every pushed alert carries its own cursor."""
    run.until("some alerts", lambda: len(run.get("/api/alerts")["items"]) >= 3)
    alerts = run.everything("/api/alerts")
    oldest = alerts[-1]
    known = [a["alert_id"] for a in reversed(alerts)]
    later = [a["alert_id"] for a in run.get("/api/alerts", after=oldest["cursor"], limit="500")["items"]]
    assert [alert_id for alert_id in later if alert_id in known] == known


def _first(run: Running) -> dict[str, Any]:
    return run.everything("/api/alerts")[-1]


def test_watch_shows_alerts_in_the_terminal(run: Running, clients: dict[str, Listener]) -> None:
    """`troop watch` prints what is there and ends on Ctrl-C."""

    async def watch() -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "infra.cli",
            "watch",
            "--url",
            run.url,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        try:
            return (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        finally:
            process.terminate()
            await process.communicate()

    assert any(symbol in asyncio.run(watch()) for symbol in ("IBM", "MSFT"))
