"""`troop fetch`, `troop providers` and `troop coverage`: what people see, and how they end."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from infra import fetch as module
from infra.fetch import Progress, coverage_lines, prefetch_line, provider_lines, register, request, strip

FETCH: dict[str, Any] = {
    "fetch_id": "f1",
    "symbol": "AAPL",
    "interval": "1d",
    "state": "queued",
    "bars": 0,
    "left_bars": 120,
    "calls": 0,
    "reason": None,
    "retry_at": None,
}
PROVIDER: dict[str, Any] = {
    "provider": "alpha_vantage",
    "plan": "free",
    "breaker": "closed",
    "retry_at": None,
    "success_rate": 0.975,
    "latency_seconds": 0.214,
    "hit_rate": 0.8,
    "calls": 40,
    "last_error": None,
    "last_error_at": None,
    "cool_down_until": None,
    "refusals": 0,
    "probes": 0,
    "failed_probes": 0,
    "windows": [
        {"amount": 25, "span_seconds": 86400.0, "used": 20, "left": 5, "resets_at": "2026-11-22T05:00:00Z"},
        {"amount": 1, "span_seconds": 1.0, "used": 0, "left": 1, "resets_at": None},
    ],
    "not_entitled": [],
}


def a_range(kind: str, count: int, first: str = "2012-01-03T21:00:00Z") -> dict[str, Any]:
    return {"kind": kind, "first": first, "last": first, "count": count, "provider": None, "asked_at": None}


COVERAGE: dict[str, Any] = {
    "symbol": "AAPL",
    "interval": "1d",
    "bar_count": 70,
    "provider": "alpha_vantage",
    "adjustment": "raw",
    "revision": 2,
    "is_stale": True,
    "counts": {"held": 70, "missing": 20, "absent": 10},
    "held": [a_range("held", 60), a_range("held", 10, "2012-05-01T20:00:00Z")],
    "missing": [a_range("missing", 20, "2012-06-01T20:00:00Z")],
    "absent": [a_range("absent", 10, "2012-04-01T20:00:00Z")],
    "actions": [{"closed_at": "2012-02-28T21:00:00Z", "split": 2.0}],
}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.0)


def server(*states: dict[str, Any]) -> tuple[Callable[[httpx.Request], httpx.Response], list[httpx.Request]]:
    """Answers with one state after the other."""
    asked: list[httpx.Request] = []
    following: Iterator[dict[str, Any]] = iter(states)

    def answer(req: httpx.Request) -> httpx.Response:
        asked.append(req)
        state = next(following)
        return httpx.Response(state.pop("status", 200), json={**FETCH, **state}, headers=state.pop("headers", None))

    return answer, asked


def fetched(answer: Callable[[httpx.Request], httpx.Response], *, wait: bool = True) -> int:
    async def run() -> int:
        async with httpx.AsyncClient(base_url="http://troop", transport=httpx.MockTransport(answer)) as client:
            return await request(client, {"symbol": "AAPL"}, key="k1", wait=wait)

    return asyncio.run(run())


class TestFetch:
    def test_it_is_watched_to_its_end(self, capsys):
        """A plain line for each change where nobody sits at a terminal; the result is the last word."""
        answer, asked = server(
            {"status": 202},
            {"state": "running", "calls": 1},
            {"state": "running", "calls": 1},
            {
                "state": "waiting",
                "bars": 60,
                "left_bars": 60,
                "calls": 1,
                "reason": "slow down",
                "retry_at": "2026-11-21T10:00:00Z",
            },
            {"state": "done", "bars": 120, "left_bars": 0, "calls": 2},
        )

        assert fetched(answer) == 0

        shown = capsys.readouterr()
        assert shown.out == "AAPL 1d: 120 bars held, 2 calls\n"
        assert shown.err.splitlines() == [
            "queued  0/120 bars  0 calls",
            "running  0/120 bars  1 call",
            "waiting  60/120 bars  1 call  until 2026-11-21 10:00: slow down",
            "done  120/120 bars  2 calls",
        ]
        assert asked[0].headers["x-functions-key"] == "k1"
        assert json.loads(asked[0].content) == {"symbol": "AAPL"}
        assert {r.url.path for r in asked[1:]} == {"/api/fetches/f1"}

    def test_failure_is_told_with_its_reason(self, capsys):
        """Exit code 1, and why."""
        answer, _ = server({"status": 202}, {"state": "failed", "reason": "UnknownSymbolError: no such symbol"})

        assert fetched(answer) == 1
        assert "failed: UnknownSymbolError: no such symbol" in capsys.readouterr().err

    def test_without_waiting_it_is_only_queued(self, capsys):
        """The id tells where to look."""
        answer, asked = server({"status": 202})

        assert fetched(answer, wait=False) == 0
        assert (capsys.readouterr().out, len(asked)) == ("queued: f1\n", 1)

    def test_terminal_sees_one_line_that_changes(self, capsys):
        """A bar as long as what is held."""
        progress = Progress(is_terminal=True)
        progress.show({**FETCH, "bars": 60, "left_bars": 60, "state": "running"})
        progress.end()

        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert f"[{'#' * 15}{'-' * 15}] running  60/120 bars" in shown


class TestCommands:
    @pytest.fixture
    def run(self):
        app = typer.Typer()
        register(app)
        return lambda *args: CliRunner().invoke(app, args)

    @pytest.mark.parametrize(
        "command",
        [["fetch", "AAPL", "--from", "2012-01-01", "--to", "2012-02-01"], ["providers"], ["coverage", "AAPL"]],
    )
    def test_nobody_there_is_said_with_what_to_do(self, run, command):
        """Exit code 1 and a sentence, no traceback."""
        result = run(*command, "--url", "http://127.0.0.1:9")

        assert result.exit_code == 1
        assert "does not answer as TROOP does" in result.stderr
        assert "--url" in result.stderr

    @pytest.mark.parametrize(
        ("status", "headers", "words"),
        [
            (429, {"Retry-After": "7200"}, "your share is spent (again in 2 hours)"),
            (400, {}, "your share is spent"),
            (401, {}, "TROOP_FUNCTION_KEY"),
        ],
    )
    def test_no_of_the_server_is_its_own_words(self, run, monkeypatch, status, headers, words):
        """A problem's sentence, and when to come back."""
        transport = httpx.MockTransport(
            lambda _: httpx.Response(status, json={"detail": "your share is spent"}, headers=headers)
        )
        client = httpx.AsyncClient
        monkeypatch.setattr(httpx, "AsyncClient", lambda **how: client(**how, transport=transport))

        result = run("fetch", "AAPL", "--from", "2012-01-01", "--to", "2012-02-01")

        assert result.exit_code == 1
        assert words in result.stderr


class TestProviders:
    def test_windows_are_drawn(self):
        """How much is left of each, and when there is more."""
        lines = provider_lines(PROVIDER).splitlines()

        assert " ".join(lines[0].split()) == ("alpha_vantage free in use 98% answered 0.21 s 40 calls 80% without one")
        assert lines[1] == f"  [{'#' * 6}{'-' * 24}]      5 of 25 left per day, next at 2026-11-22 05:00"
        assert lines[2] == f"  [{'#' * 30}]      1 of 1 left per second"
        assert len(lines) == 3

    @pytest.mark.parametrize(
        ("facts", "words"),
        [
            ({"breaker": "open", "retry_at": "2026-11-21T09:30:00Z"}, "left alone until 2026-11-21 09:30"),
            ({"cool_down_until": "2026-11-21T10:00:00Z"}, "cools down until 2026-11-21 10:00"),
            ({"windows": []}, "no limit"),
            ({"refusals": 2, "probes": 3, "failed_probes": 1}, "refused by surprise: 2, probes: 3 (1 in vain)"),
            ({"last_error": "down", "last_error_at": "2026-11-21T08:00:00Z"}, "last trouble, 2026-11-21 08:00: down"),
            ({"success_rate": None, "latency_seconds": None, "hit_rate": None}, "- answered  no call yet"),
            (
                {"not_entitled": [{"endpoint": "X", "parameter": "full", "recorded_at": "2026-11-20T08:00:00Z"}]},
                "not on this plan: X full (since 2026-11-20)",
            ),
        ],
    )
    def test_trouble_is_told(self, facts, words):
        """Breaker, cool-down, surprises, refusals, the last error: each in words."""
        assert words in provider_lines({**PROVIDER, **facts})


class TestCoverage:
    def test_series_is_drawn_as_a_strip(self):
        """Held, absent and missing in the order of time, with what is missing spelled out."""
        lines = coverage_lines(COVERAGE).splitlines()

        assert lines[0] == "AAPL 1d  70 bars from alpha_vantage, raw, revision 2"
        strip_shown = lines[1].split("  ")[1]
        assert len(strip_shown) == 64
        assert strip_shown.startswith("█" * 38)
        assert strip_shown.endswith("░" * 12)
        assert "·" in strip_shown
        assert lines[2].startswith("█ held 70  ░ missing 20  · absent 10")
        assert "missing 2012-06-01 20:00 to 2012-06-01 20:00: 20 bars" in lines
        assert "split 2 for 1 from the bar that closed 2012-02-28 21:00" in lines
        assert lines[-1].startswith("stale")

    def test_cell_of_several_kinds_says_so(self):
        """Where more bars than fit meet, a character of its own."""
        assert strip([a_range("held", 3), a_range("missing", 5)], width=4) == "█▒░░"

    def test_few_bars_are_a_short_strip(self):
        """One character a bar, no more."""
        assert strip([a_range("held", 2), a_range("absent", 1)]) == "██·"

    def test_nothing_held_is_no_strip(self):
        """A series without bars or sessions is still described."""
        empty = {**COVERAGE, "provider": None, "held": [], "missing": [], "absent": [], "actions": []}

        assert "nobody yet" in coverage_lines(empty)


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (
            {"is_on": True, "switched_at": "2026-11-21T05:00:00Z", "hit_rate": 0.42, "waste": 0.3},
            "prefetch       on since 2026-11-21 05:00  42% of requests found it  30% wasted (7 used, 3 not)",
        ),
        (
            {"is_on": False, "switched_at": None, "hit_rate": None, "waste": None},
            "prefetch       off  - of requests found it  - wasted (7 used, 3 not)",
        ),
    ],
)
def test_prefetching_is_shown_with_its_waste(facts, line):
    """Beside the providers stands what fetching ahead of the asking brought, and what it cost in vain."""
    assert prefetch_line({**facts, "used": 7, "wasted": 3}) == line
