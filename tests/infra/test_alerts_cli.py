"""`troop alerts`, against the real endpoints over a socket."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from urllib.parse import parse_qsl, urlsplit

import azure.functions as func
import pytest
from typer.testing import CliRunner, Result

from infra.alerts import app as cli
from shared.errors import UnavailableError
from tests.functions.test_alerts import App, wire
from tests.unit.alerts.house import ScriptedChannel, a_subscription


class _Door(BaseHTTPRequestHandler):
    """Hands a request to the function that serves it."""

    app: App
    loop: asyncio.AbstractEventLoop

    def handle_one(self) -> None:
        parts = urlsplit(self.path)
        _, _, _, *rest = parts.path.split("/")
        name = f"alerts_{rest[1]}" if rest else "alerts_list"
        request = func.HttpRequest(
            self.command,
            self.path,
            headers=dict(self.headers),
            params=dict(parse_qsl(parts.query)),
            route_params={"alert_id": rest[0]} if rest else {},
            body=b"",
        )
        answer = self.loop.run_until_complete(self.app.call(name, request))
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.mimetype)
        self.end_headers()
        self.wfile.write(answer.get_body())

    do_GET = do_POST = handle_one  # noqa: N815 - the names the server looks for

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An API where alice has heard two alerts within her cooldown, the first at the second attempt."""

    class Door(_Door):
        app = App(
            ScriptedChannel("signalr"),
            ScriptedChannel("discord", UnavailableError("down")),
            subscriptions=[
                a_subscription("discord", subscriber="alice", cooldown=timedelta(hours=1)),
                a_subscription("signalr"),
            ],
        )
        loop = asyncio.new_event_loop()

    async def happen() -> None:
        for name in ("one", "two"):
            await Door.app.hear(wire(name))
            Door.app.house.wall.at += timedelta(minutes=1)
        await Door.app.call("alerts_sweep", None)

    Door.loop.run_until_complete(happen())
    server = HTTPServer(("127.0.0.1", 0), Door)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    Door.loop.close()


def troop(url: str, *arguments: str, token: str = "ours.alice") -> Result:
    return CliRunner().invoke(cli, [*arguments, "--url", url], env={"TROOP_TOKEN": token, "NO_COLOR": "1"})


def ids_of(url: str, token: str = "ours.alice") -> list[str]:
    return [line.split()[0] for line in troop(url, "list", token=token).stdout.splitlines()]


def test_the_list_shows_your_own_alerts_newest_first(url):
    """One line each: id, time, title, and where its deliveries stand."""
    said = troop(url, "list")

    assert said.exit_code == 0
    newest, oldest = said.stdout.splitlines()
    assert newest.endswith("AAPL: long at 561.70             discord SUPPRESSED")
    assert oldest.endswith("discord SENT")
    assert len(troop(url, "list", "--limit", "1").stdout.splitlines()) == 1
    assert "signalr SENT" in troop(url, "list", token="").stdout


def test_an_explanation_is_a_small_tree(url):
    """The alert, its deliveries with where they stand and why, and every decision below."""
    newest, oldest = ids_of(url)

    said = troop(url, "explain", newest)

    assert said.exit_code == 0
    head, delivery, heard, held = said.stdout.splitlines()
    assert head == "AAPL: long at 561.70  (alice, info, 2012-11-21 21:00)"
    assert delivery.startswith("└─ discord: SUPPRESSED, the rule cooldown held it back: within 1 hour of AAPL's alert")
    assert heard.startswith("   ├─ 2012-11-21 21:01  match: heard, ")
    assert held.startswith("   └─ 2012-11-21 21:01  cooldown: suppress, ")
    assert "discord: SENT, discord took it" in troop(url, "explain", oldest).stdout


def test_the_attempts_are_shown_one_a_line(url):
    """What was tried, when, and what came of it."""
    _, oldest = ids_of(url)

    first, *attempts = troop(url, "deliveries", oldest).stdout.splitlines()

    assert first == "discord  SENT"
    assert [line.split("  ")[-1] for line in attempts] == ["failed: UnavailableError: down", "taken"]


def test_an_alert_is_acknowledged_with_a_token(url):
    """By its owner; without a token it says what to do."""
    _, oldest = ids_of(url)

    said = troop(url, "ack", oldest)
    refused = troop(url, "ack", oldest, token="")

    assert (said.exit_code, "acknowledged at 2026-11-21" in said.stdout) == (0, True)
    assert (refused.exit_code, "--token or TROOP_TOKEN" in refused.stderr) == (1, True)


@pytest.mark.parametrize("token", ["", "ours.bob"])
def test_what_is_somebody_elses_is_said_not_to_be_there(url, token):
    """In one line, with exit code 1; an operator says whose."""
    newest = ids_of(url)[0]

    said = troop(url, "explain", newest, token=token)

    assert (said.exit_code, said.stderr) == (1, f"troop alerts: there is no alert {newest}\n")
    assert troop(url, "explain", newest, "--subscriber", "alice", token="ours.root.operator").exit_code == 0


def test_nobody_listening_is_told_with_the_remedy():
    """A wrong address is no stack of calls."""
    said = troop("http://127.0.0.1:1", "list")

    assert said.exit_code == 1
    assert "make run" in said.stderr
