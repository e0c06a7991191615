"""`troop subscriptions` and `troop mute`, against the real endpoints over a socket."""

import asyncio
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from urllib.parse import parse_qsl, urlsplit

import azure.functions as func
import pytest
import typer
from typer.testing import CliRunner, Result

from infra.subscriptions import app, mutes
from tests.unit.alerts.town import Town

ROUTES = {
    ("GET", "subscriptions"): "subscriptions_list",
    ("POST", "subscriptions"): "subscriptions_create",
    ("DELETE", "subscriptions"): "subscriptions_delete",
    ("GET", "mutes"): "mutes_list",
    ("POST", "mutes"): "mutes_create",
    ("DELETE", "mutes"): "mutes_delete",
}


class _Door(BaseHTTPRequestHandler):
    """Hands a request to the function that serves it."""

    town: Town
    loop: asyncio.AbstractEventLoop

    def handle_one(self) -> None:
        parts = urlsplit(self.path)
        _, _, what, *rest = parts.path.split("/")
        request = func.HttpRequest(
            self.command,
            self.path,
            headers=dict(self.headers),
            params=dict(parse_qsl(parts.query)),
            route_params={"id": rest[0]} if rest else {},
            body=self.rfile.read(int(self.headers.get("Content-Length") or 0)),
        )
        work = self.town.functions[f"alerts_{ROUTES[self.command, what]}"](request)
        answer = self.loop.run_until_complete(work)
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.mimetype)
        self.end_headers()
        self.wfile.write(answer.get_body())

    do_GET = do_POST = do_DELETE = handle_one  # noqa: N815 - the names the server looks for

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    class Door(_Door):
        town = Town()
        loop = asyncio.new_event_loop()

    server = HTTPServer(("127.0.0.1", 0), Door)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    Door.loop.close()


def troop(cli: typer.Typer, url: str, *arguments: str, token: str = "ada") -> Result:
    return CliRunner().invoke(
        cli, [*arguments, "--url", url], env={"TROOP_TOKEN": token, "COLUMNS": "200", "NO_COLOR": "1"}
    )


def test_subscription_is_added_listed_and_removed(url):
    """In one line each, with its id first."""
    made = troop(app, url, "add", "--kind", "price", "--symbols", "aapl", "--above", "200", "--cooldown", "4h")

    assert made.exit_code == 0, made.output
    id_, _, line = made.stdout.strip().partition("  ")
    assert line == "price, AAPL, at or above 200, cooldown 240 min → signalr"
    assert troop(app, url, "list").stdout == made.stdout
    gone = troop(app, url, "remove", id_)
    assert gone.stdout == "the subscription is deleted\n"
    assert "nothing yet" in troop(app, url, "list").stderr


def test_mute_is_added_listed_and_ended(url):
    """With its author and end."""
    made = troop(mutes, url, "add", "--for", "2h", "--symbols", "AAPL", "--reason", "earnings")

    assert made.exit_code == 0, made.output
    id_, _, line = made.stdout.strip().partition("  ")
    assert line == "AAPL until 2013-01-02T14:00:00Z (market time) by ada: earnings"
    assert troop(mutes, url, "list").stdout == made.stdout
    assert troop(mutes, url, "end", id_).stdout == "the mute is ended\n"
    assert troop(mutes, url, "list").stdout == ""


def test_operator_mutes_for_another(url):
    """And is told what the API asks for."""
    refused = troop(mutes, url, "add", "--for", "2h", "--subscriber", "bob", token="op")
    made = troop(mutes, url, "add", "--for", "2h", "--subscriber", "bob", "--reason", "noise", token="op")

    assert refused.exit_code == 1
    assert refused.stderr.startswith("troop: reason: say why you mute for somebody else")
    assert "everything until" in made.stdout
    assert "by op: noise" in troop(mutes, url, "list", token="bob").stdout


@pytest.mark.parametrize(
    ("cli", "arguments", "token", "said"),
    [
        (app, ["list"], "", "troop: sign in first: give your access token by --token or TROOP_TOKEN"),
        (app, ["list"], "eve", "troop: who is that?"),
        (app, ["add", "--kind", "move"], "ada", "troop: percent: give the move in percent, such as 5"),
        (app, ["add", "--cooldown", "soon"], "ada", "troop: --cooldown: write a time such as 30m, 4h or 7d"),
        (app, ["remove", "x/../y"], "ada", "troop: you have no subscription"),
        (mutes, ["add", "--for", "1y"], "ada", "troop: --for: write a time such as 30m, 4h or 7d"),
    ],
)
def test_trouble_is_one_line_with_what_to_do(url, cli, arguments, token, said):
    """On the error stream, with exit code 1 and no traceback."""
    found = troop(cli, url, *arguments, token=token)

    assert found.exit_code == 1
    assert found.stderr.startswith(said)
    assert found.stderr.count("\n") == 1


def test_nobody_at_the_address_is_said_so():
    """With how to start it."""
    found = troop(app, "http://127.0.0.1:9", "list")

    assert found.exit_code == 1
    assert "does not answer as TROOP does" in found.stderr
    assert "make run" in found.stderr
