"""`troop deadletters`: pages are followed, a range is looked at before it is done, a no is one sentence."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from infra.deadletters import app


def letter(n: int, **more: Any) -> dict[str, Any]:
    """An item of /api/deadletters."""
    return {
        "dead_letter_id": f"letter-{n}",
        "source": "a_function",
        "event_id": f"e{n}",
        "reason": "RefusedError: not\nyet",
        "times": 1,
        "recorded_at": "2026-11-21T09:00:00.123Z",
        "state": "open",
        **more,
    }


def fate(n: int, name: str, reason: str = "") -> dict[str, Any]:
    """An item of a replay's answer."""
    return {"dead_letter_id": f"letter-{n}", "source": "a_function", "outcome": name, "reason": reason}


class Server(ThreadingHTTPServer):
    """A stand-in for the API: keeps what it was asked, and gives the prepared answers in turn."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str], Any, str]] = []
        self.answers: list[tuple[int, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        return

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        asked = (f"{self.command} {parts.path}", query, json.loads(body) if body else None)
        self.server.asked.append((*asked, self.headers["Authorization"]))
        status, answer = self.server.answers.pop(0)
        sent = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)


@pytest.fixture
def api() -> Iterator[Server]:
    with Server() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(api: Server, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--url", api.url, "--token", "a-token"])


def test_a_list_follows_its_pages(api: Server) -> None:
    """One letter a line; the open ones, unless told otherwise."""
    api.answers = [
        (200, {"items": [letter(1), letter(2, times=3)], "next": "more"}),
        (200, {"items": [letter(3)], "next": None}),
    ]
    done = run(api, "list", "--source", "a_function")

    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "2026-11-21T09:00:00  letter-1  a_function  RefusedError: not yet",
        "2026-11-21T09:00:00  letter-2  a_function  RefusedError: not yet (3 times)",
        "2026-11-21T09:00:00  letter-3  a_function  RefusedError: not yet",
    ]
    assert [query for _, query, _, _ in api.asked] == [
        {"source": "a_function", "state": "open", "limit": "50"},
        {"source": "a_function", "state": "open", "limit": "48", "cursor": "more"},
    ]
    assert {token for *_, token in api.asked} == {"Bearer a-token"}


def test_a_list_that_ends_early_says_so(api: Server) -> None:
    """Nobody takes the first page for all of it."""
    api.answers = [(200, {"items": [letter(1)], "next": "more"})]
    done = run(api, "list", "--most", "1", "--state", "all")
    assert "there are more: --most 2" in done.stderr
    assert "state" not in api.asked[0][1]


def test_a_range_is_only_looked_at_without_yes(api: Server) -> None:
    """The first call is a dry run, and says what to add."""
    api.answers = [(200, {"items": [fate(1, "would replay")], "counts": {"would replay": 1}, "next": None})]

    done = run(api, "replay", "--source", "a_function", "--reason", "the fix is out")

    assert done.exit_code == 0
    assert api.asked[0][2]["dry_run"] is True
    assert "1 would replay" in done.stderr
    assert "add --yes" in done.stderr


def test_a_range_is_worked_through_call_by_call(api: Server) -> None:
    """It goes on where the last answer ended, up to the number that was told, and counts the outcomes."""
    api.answers = [
        (200, {"items": [fate(1, "replayed"), fate(2, "refused again", "no")],
               "counts": {"replayed": 1, "refused again": 1}, "next": "two"}),
        (200, {"items": [fate(3, "replayed")], "counts": {"replayed": 1}, "next": "three"}),
    ]  # fmt: skip

    done = run(api, "replay", "--source", "a_function", "--reason", "fixed", "--most", "3", "--yes")

    assert [(order["cursor"], order["limit"], order["dry_run"]) for _, _, order, _ in api.asked] == [
        (None, 3, False),
        ("two", 1, False),
    ]
    assert "letter-2  a_function  refused again: no" in done.stdout
    assert "2 replayed, 1 refused again" in done.stderr
    assert done.exit_code == 1


def test_one_letter_is_replayed_by_its_id(api: Server) -> None:
    """The exit code says whether it went."""
    api.answers = [(200, fate(1, "replayed")), (200, fate(1, "impossible", "it was discarded"))]

    assert run(api, "replay", "letter-1", "--reason", "fixed").exit_code == 0
    refused = run(api, "replay", "letter-1", "--reason", "fixed")

    assert (refused.exit_code, refused.stdout.strip()) == (1, "letter-1  a_function  impossible: it was discarded")
    assert api.asked[0][0] == "POST /api/deadletters/letter-1/replay"


def test_show_and_discard(api: Server) -> None:
    """All of one letter as JSON; a decision with its reason."""
    api.answers = [(200, letter(1)), (200, letter(1, state="discarded"))]

    assert json.loads(run(api, "show", "letter-1").stdout) == letter(1)
    assert run(api, "discard", "letter-1", "--reason", "a test event").stdout.strip().endswith("discarded")
    assert api.asked[1][:3] == ("POST /api/deadletters/letter-1/discard", {}, {"reason": "a test event"})


@pytest.mark.parametrize("arguments", [["replay", "letter-1"], ["discard", "letter-1", "--reason", " "]])
def test_a_reason_is_asked_for_before_anybody_is(api: Server, arguments: list[str]) -> None:
    """It is kept with the operator's name, so there must be one."""
    done = run(api, *arguments)
    assert (done.exit_code, api.asked) == (1, [])
    assert "say why" in done.stderr


def test_a_refusal_is_one_sentence(api: Server) -> None:
    """What the API says, and no traceback."""
    api.answers = [(403, {"detail": "only an operator may do this"})]
    done = run(api, "list")
    assert (done.exit_code, done.stderr) == (1, "troop deadletters: only an operator may do this\n")
