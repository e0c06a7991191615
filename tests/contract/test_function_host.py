"""The function host in front of Microsoft's worker library: the shapes our code stands on.

The library is an undocumented seam. Whatever an upgrade moves, one of these tests names it.
One app a process is the library's rule, so every host here is a process of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.local.host.cron import parse_schedule
from infra.local.host.host import PAGE
from infra.local.host.routes import Router

ROOT = Path(__file__).parents[2]
APP = Path(__file__).parent / "host_app"
PATIENCE = 20.0
MASTER = {"x-functions-key": "local-master-key"}
PAGE_ORIGIN = "http://localhost:3000"
TRACE = "0123456789abcdef0123456789abcdef"
TRACEPARENT = f"00-{TRACE}-0123456789abcdef-01"


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A host process and what it has left behind."""

    process: subprocess.Popen[str]
    ready: str
    notes: Path
    http: httpx.Client

    def noted(self, kind: str) -> list[dict[str, Any]]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]

    def status(self) -> dict[str, Any]:
        return self.http.get("/admin/host/status").json()


def environment(**values: str) -> dict[str, str]:
    own = ("TROOP_", "OTEL_", "APPLICATIONINSIGHTS_", "PYTHON_", "CORS_", "WEBSITE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return {**kept, "TICK_SCHEDULE": "0 0 0 1 1 *", **values}


def command(app: Path, data: Path, *options: str) -> list[str]:
    host = [sys.executable, "-m", "infra.local.host", "--app", str(app), "--data", str(data)]
    return [*host, "--port", "0", *options]


@contextmanager
def host(folder: Path, *options: str, app: Path = APP, **env: str) -> Iterator[Running]:
    folder.mkdir(exist_ok=True)
    notes = Path(env.setdefault("NOTES", str(folder / "notes")))
    with (
        (folder / f"log-{time.monotonic_ns()}").open("w+") as log,
        subprocess.Popen(
            command(app, folder, *options),
            cwd=ROOT,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            ready = process.stdout.readline().strip()
            assert ready.startswith("host ready "), Path(log.name).read_text()
            with httpx.Client(base_url=ready.split()[2], timeout=PATIENCE) as http:
                yield Running(process=process, ready=ready, notes=notes, http=http)
        finally:
            process.kill()


def refused(folder: Path, *options: str, app: Path = APP, **env: str) -> list[str]:
    """The lines on stderr of a host that does not start."""
    ended = subprocess.run(
        command(app, folder, *options),
        cwd=ROOT,
        env=environment(NOTES=str(folder / "notes"), **env),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    return ended.stderr.splitlines()


def eventually[T](look: Callable[[], T]) -> T:
    until = time.monotonic() + PATIENCE
    while not (seen := look()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
    return seen


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("host")
    tracing = {"RECORD_SPANS": "1", "PYTHON_ENABLE_OPENTELEMETRY": "true"}
    origins = "https://app.example.com, https://other.example.com/"
    with host(folder, "--no-timers", CORS_ORIGINS=origins, **tracing) as one:
        yield one


@pytest.fixture
def an_app(tmp_path) -> Callable[[str], Path]:
    def write(source: str) -> Path:
        folder = tmp_path / "app"
        folder.mkdir(exist_ok=True)
        (folder / "function_app.py").write_text(f"import azure.functions as func\napp = func.FunctionApp()\n{source}\n")
        return folder

    return write


class TestIndexing:
    def test_functions_are_listed_as_they_are_declared(self, running):
        """The raw bindings of the library carry trigger, route, methods, level and schedule."""
        listed = {f.pop("name"): f for f in running.http.get("/admin/functions", headers=MASTER).json()}

        assert running.ready == f"host ready {running.http.base_url} {len(listed)} functions".replace("/ ", " ")
        assert listed["echo"] == {
            "trigger": "httpTrigger",
            "route": "/v1/echo/{a}/{n:int?}",
            "methods": ["GET", "POST"],
            "auth_level": "ANONYMOUS",
            "schedule": None,
        }
        assert listed["locked"]["auth_level"] == "FUNCTION"
        assert listed["admins"]["auth_level"] == "ADMIN"
        assert listed["tick"]["schedule"] == "0 0 0 1 1 *"
        assert listed["on_event"]["trigger"] == "eventGridTrigger"

    def test_the_seam_of_the_library_is_where_it_was(self, tmp_path):
        """Bindings, retry policy and outcomes have the shapes the host reads, without any socket."""
        script = """
import asyncio, json, sys
from infra.local.host.worker import Worker

async def main():
    worker = await Worker.start(sys.argv[1])
    event = json.dumps({"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data": "bad"})
    failed = await worker.invoke_event_grid("on_event", event)
    answer = await worker.invoke_http("known")
    yearly = worker.functions["yearly"]
    print(json.dumps({
        "bindings": {name: worker.functions[name].bindings for name in ("echo", "tick", "on_event")},
        "is_async": [worker.functions[name].is_async for name in ("echo", "known")],
        "retry": [yearly.retry.strategy, yearly.retry.most, yearly.retry.delay.total_seconds()],
        "error": failed.error,
        "is_traced": "spoilt event" in failed.traceback,
        "answer": [answer.status, dict(answer.headers), list(answer.cookies), answer.body.decode()],
        "loaded": [name for name in ("aiohttp", "opentelemetry") if name in sys.modules],
    }))

asyncio.run(main())
"""
        told = subprocess.run(
            [sys.executable, "-c", script, str(APP)],
            cwd=ROOT,
            env=environment(NOTES=str(tmp_path / "notes")),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )

        seen = json.loads(told.stdout)

        assert sorted(seen["bindings"]["echo"], key=lambda b: b["direction"]) == [
            {
                "direction": "IN",
                "type": "httpTrigger",
                "name": "req",
                "methods": ["GET", "POST"],
                "authLevel": "ANONYMOUS",
                "route": "echo/{a}/{n:int?}",
            },
            {"direction": "OUT", "type": "http", "name": "$return"},
        ]
        assert seen["bindings"]["tick"] == [
            {
                "direction": "IN",
                "type": "timerTrigger",
                "name": "timer",
                "schedule": "%TICK_SCHEDULE%",
                "useMonitor": False,
            }
        ]
        assert seen["bindings"]["on_event"] == [{"direction": "IN", "type": "eventGridTrigger", "name": "event"}]
        assert seen["is_async"] == [True, False]
        assert seen["retry"] == ["fixed_delay", 2, 0.0]
        assert seen["error"] == "ValueError('spoilt event')"
        assert seen["is_traced"]
        text = {"content-type": "text/plain; charset=utf-8"}
        assert seen["answer"] == [200, text, [], "the literal route"]
        assert seen["loaded"] == []


class TestHttp:
    def test_a_request_reaches_the_function_whole(self, running):
        """Method, URL, route values, query, headers and body arrive as Azure delivers them."""
        sent = running.http.post(
            "/v1/echo/x%2Fy/7?q=1&q=2&empty=", content="hällo".encode(), headers={"x-custom": "yes"}
        )

        got = sent.json()
        assert got["method"] == "POST"
        assert got["url"] == str(sent.request.url)
        assert got["params"] == {"a": "x/y", "n": "7"}
        assert got["query"] == {"q": "1,2"}
        assert got["body"] == "hällo"
        assert got["header"] == "yes"
        assert got["function"] == "echo"

    def test_an_answer_comes_back_whole(self, running):
        """Status, headers and every cookie of a response survive the way back."""
        answer = running.http.get("/v1/echo/x")

        assert answer.status_code == 201
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-answer"] == "yes"
        assert answer.headers.get_list("set-cookie") == ["a=1; HttpOnly; Path=/", "b=2"]

    @pytest.mark.parametrize(
        ("method", "path", "status", "text"),
        [
            ("GET", "/v1/files/a/b%20c", 200, "a/b c"),
            ("GET", "/v1/files", 200, "nothing"),
            ("GET", "/v1/FILES/Known", 200, "the literal route"),
            ("POST", "/v1/files/known", 404, "no function answers POST /v1/files/known"),
            ("GET", "/v1/echo/x/seven", 404, "no function answers GET /v1/echo/x/seven"),
            ("GET", "/api/files", 404, "no function answers GET /api/files"),
        ],
    )
    def test_paths_find_their_function(self, running, method, path, status, text):
        """Routes live under host.json's prefix; a wrong method or route value finds nothing."""
        answer = running.http.request(method, path)

        assert (answer.status_code, answer.text) == (status, text)

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("/v1/fails", "LookupError('no such luck')"),
            ("/v1/exits", "function exits ended with SystemExit(3)"),
            ("/v1/hangs", "Timeout value of 0:00:00.600000 exceeded by function hangs"),
        ],
    )
    def test_a_failing_function_answers_500_with_the_reason(self, running, path, text):
        """Whatever a function does, its caller gets an answer and the host lives on."""
        answer = running.http.get(path)

        assert answer.status_code == 500
        assert answer.text.splitlines() == [
            f"Exception while executing function: Functions.{path.rpartition('/')[2]}",
            "Result: Failure",
            text,
        ]
        assert running.status()["state"] == "Running"

    def test_the_root_serves_the_page_or_says_there_is_none(self, running):
        """GET / is the demo page with the cloud's address filled in."""
        answer = running.http.get("/")

        assert answer.status_code == (200 if PAGE.exists() else 404)
        assert "{{CLOUD_URL}}" not in answer.text


class TestKeys:
    @pytest.mark.parametrize(
        ("path", "key", "status"),
        [
            ("/v1/locked", None, 401),
            ("/v1/locked", "wrong", 401),
            ("/v1/locked", "local-system-key", 401),
            ("/v1/locked", "local-function-key", 200),
            ("/v1/locked", "local-master-key", 200),
            ("/v1/admins", "local-function-key", 401),
            ("/v1/admins", "local-master-key", 200),
            ("/admin/functions", None, 401),
            ("/admin/functions", "local-function-key", 401),
            ("/admin/functions", "local-master-key", 200),
            ("/admin/host/status", None, 200),
        ],
    )
    def test_doors_open_to_their_keys_only(self, running, path, key, status):
        """A key works as a header and as ?code=, for its level and below."""
        by_header = running.http.get(path, headers={"x-functions-key": key} if key else {})
        by_query = running.http.get(path, params={"code": key} if key else {})

        assert (by_header.status_code, by_query.status_code) == (status, status)

    def test_keys_come_from_the_environment(self, tmp_path):
        """Another key in the environment closes the door to the default one."""
        with host(tmp_path, TROOP_FUNCTION_KEY="mine") as one:
            mine = one.http.get("/v1/locked?code=mine")
            default = one.http.get("/v1/locked?code=local-function-key")

        assert (mine.status_code, default.status_code) == (200, 401)


class TestCors:
    @pytest.mark.parametrize(
        "origin", [PAGE_ORIGIN, "http://127.0.0.1:5173", "https://app.example.com", "https://other.example.com"]
    )
    def test_a_preflight_is_answered_for_any_path(self, running, origin):
        """The SignalR client asks with credentials: nothing may be a wildcard."""
        answer = running.http.options(
            "/v1/locked",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,x-signalr-user-agent",
            },
        )

        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert answer.headers["access-control-allow-methods"] == "POST"
        assert answer.headers["access-control-allow-headers"] == "authorization,x-signalr-user-agent"
        assert answer.headers["vary"] == "Origin"

    @pytest.mark.parametrize("path", ["/v1/echo/x", "/v1/locked", "/v1/fails", "/nowhere", "/admin/functions"])
    def test_every_answer_may_be_read_by_a_local_page(self, running, path):
        """Errors carry the headers too, or a browser hides them."""
        answer = running.http.get(path, headers={"Origin": PAGE_ORIGIN})

        assert answer.headers["access-control-allow-origin"] == PAGE_ORIGIN
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert answer.headers["vary"] == "Origin"

    @pytest.mark.parametrize("origin", ["https://evil.example.com", "http://localhost.evil.com", "null"])
    def test_a_stranger_gets_no_permission(self, running, origin):
        """Only local pages and the configured origins are let in."""
        answer = running.http.get("/v1/echo/x", headers={"Origin": origin})

        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"


def an_event(subject: str, data: object = None, **extensions: str) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": "e-1",
        "source": "/tests",
        "type": "tests.happened.v1",
        "subject": subject,
        "time": "2024-05-01T12:30:00.123456Z",
        "data": data,
        **extensions,
    }


class TestEventGrid:
    def post(
        self,
        running: Running,
        body: object,
        name: str = "on_event",
        kind: str | None = "Notification",
        key: str = "local-system-key",
    ) -> httpx.Response:
        return running.http.post(
            "/runtime/webhooks/EventGrid",
            params={"functionName": name, "code": key},
            headers={"aeg-event-type": kind} if kind else {},
            json=body,
        )

    def test_a_cloud_event_reaches_its_function(self, running):
        """The function sees type, subject, time, data and the extension attributes."""
        answer = self.post(running, [an_event("one", {"a": [1, 2.5]}, traceparent=TRACEPARENT)])

        [seen] = [e for e in running.noted("event") if e["subject"] == "one"]
        assert answer.status_code == 202
        assert seen["type"] == "tests.happened.v1"
        assert seen["data"] == {"a": [1, 2.5]}
        assert seen["time"] == "2024-05-01T12:30:00.123456+00:00"
        assert seen["extensions"] == {"traceparent": TRACEPARENT}

    def test_a_function_may_ask_for_the_raw_text(self, running):
        """Annotated `str`, the argument is the event's JSON."""
        event = an_event("raw", {"b": None})

        answer = self.post(running, event, name="ON_TEXT")

        assert answer.status_code == 202
        assert [e["raw"] for e in running.noted("text")] == [event]

    def test_one_bad_event_fails_the_whole_array(self, running):
        """The others still run: Event Grid sends all of them again."""
        answer = self.post(running, [an_event("good"), an_event("spoilt", "bad")])

        assert answer.status_code == 500
        assert answer.text.endswith("ValueError('spoilt event')")
        assert [e["subject"] for e in running.noted("event")].count("good") == 1

    def test_the_handshake_returns_the_code(self, running):
        """Event Grid proves that the endpoint wants its events."""
        answer = self.post(running, [{"data": {"validationCode": "c-1"}}], kind="SubscriptionValidation")

        assert (answer.status_code, answer.json()) == (200, {"validationResponse": "c-1"})

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            ({"kind": "Unsubscribe"}, 202),
            ({"kind": None}, 400),
            ({"kind": "Other"}, 400),
            ({"body": ["no event"]}, 400),
            ({"kind": "SubscriptionValidation"}, 400),
            ({"name": "nobody"}, 404),
            ({"name": "echo"}, 404),
            ({"key": "local-function-key"}, 401),
            ({"key": ""}, 401),
            ({"key": "local-master-key", "body": []}, 202),
        ],
    )
    def test_other_requests_are_told_apart(self, running, request_, status):
        """Each kind of request has the status that the Event Grid extension gives it."""
        asked = {"body": [], **request_}

        assert self.post(running, **asked).status_code == status

    def test_the_path_may_be_written_in_any_case(self, running):
        """Azure's routing ignores case."""
        answer = running.http.post(
            "/RUNTIME/webhooks/eventgrid",
            params={"functionname": "on_event", "code": "local-system-key"},
            headers={"aeg-event-type": "notification"},
            json=[],
        )

        assert answer.status_code == 202


class TestAdmin:
    def test_an_event_function_is_fired_by_hand(self, running):
        """The input is one event, as text or as JSON."""
        event = an_event("by hand")

        for given in (json.dumps(event), event):
            answer = running.http.post("/admin/functions/on_event", headers=MASTER, json={"input": given})
            assert answer.status_code == 202

        def both() -> bool:
            return [e["subject"] for e in running.noted("event")].count("by hand") == 2

        assert eventually(both)

    def test_a_failing_timer_is_tried_as_its_policy_says(self, running):
        """The function finds in its context which attempt it is and why the one before failed."""
        answer = running.http.post("/admin/functions/yearly", headers=MASTER)

        notes = eventually(lambda: len(running.noted("yearly")) == 3 and running.noted("yearly"))
        reason = "RuntimeError('not this year')"
        assert answer.status_code == 202
        assert [(n["count"], n["most"], n["reason"]) for n in notes] == [(0, 2, None), (1, 2, reason), (2, 2, reason)]

    @pytest.mark.parametrize(("name", "status"), [("nobody", 404), ("echo", 400)])
    def test_what_cannot_be_fired_is_refused(self, running, name, status):
        """Only timers and event functions are fired by hand."""
        answer = running.http.post(f"/admin/functions/{name}", headers=MASTER, json={"input": ""})

        assert answer.status_code == status

    def test_firing_needs_the_master_key(self, running):
        """Nobody else runs a function by its name."""
        answer = running.http.post("/admin/functions/tick?code=local-function-key")

        assert answer.status_code == 401

    def test_the_status_says_who_answers(self, running):
        """Pid and instance tell instances on one port apart."""
        status = running.status()

        assert status["pid"] == running.process.pid
        assert status["instance"]
        assert status["holds_timers"] is False


class TestTracing:
    def spans(self, running: Running, name: str) -> list[dict[str, Any]]:
        return [span for span in running.noted("span") if span["name"] == name]

    @pytest.mark.parametrize("function", ["traced", "traced_sync"])
    def test_a_trace_goes_through_the_host_into_the_function(self, running, function):
        """Caller, host span and the app's own span are one trace, in sync functions too."""
        running.http.get(f"/v1/{function.replace('_', '-')}", headers={"traceparent": TRACEPARENT})

        [outer] = self.spans(running, function)
        [inner] = self.spans(running, f"inside {function}")
        assert (outer["trace"], outer["parent"]) == (TRACE, TRACEPARENT.split("-")[2])
        assert (outer["span_kind"], outer["status"], outer["is_error"]) == ("SERVER", 200, False)
        assert (inner["trace"], inner["parent"]) == (TRACE, outer["span"])

    def test_an_event_is_linked_not_adopted(self, running):
        """As in Azure, an app that wants one trace must continue it itself."""
        event = an_event("traced", "bad", traceparent=TRACEPARENT)

        TestEventGrid().post(running, event)

        span = next(s for s in self.spans(running, "on_event") if s["links"] and s["is_error"])
        assert span["span_kind"] == "CONSUMER"
        assert span["links"] == [TRACE]
        assert span["parent"] is None
        assert span["trace"] != TRACE


class TestTimers:
    def test_one_of_two_instances_fires_until_it_is_killed(self, tmp_path):
        """The lock falls to the other instance although its holder had no time to let go."""
        often = {"TICK_SCHEDULE": "00:00:00.1"}
        with host(tmp_path, **often) as first, host(tmp_path, **often) as second:
            eventually(lambda: len(first.noted("tick")) >= 3)
            assert (first.status()["holds_timers"], second.status()["holds_timers"]) == (True, False)
            assert {n["pid"] for n in first.noted("tick")} == {first.process.pid}

            first.process.kill()

            eventually(lambda: any(n["pid"] == second.process.pid for n in second.noted("tick")))
            assert second.status()["holds_timers"] is True

    def test_a_timer_is_told_its_schedule(self, tmp_path):
        """Last and next tick are instants in UTC; an ordinary tick is not past due."""
        with host(tmp_path, TICK_SCHEDULE="* * * * * *") as one:
            [note, *_] = eventually(lambda: one.noted("tick"))

        due = datetime.fromisoformat(note["status"]["Next"])
        assert note["past_due"] is False
        assert note["status"].keys() == {"Last", "LastUpdated", "Next"}
        assert (due.tzinfo, due.microsecond) == (UTC, 0)

    def test_a_tick_missed_while_all_were_down_is_made_up_for(self, tmp_path):
        """A remembered timer fires at the start, once, and knows that it is late."""
        memory = {"schedule": "0 0 3 1 1 *", "last": "2023-01-01T03:00:00+00:00", "next": "2024-01-01T03:00:00+00:00"}
        (tmp_path / "timers.json").write_text(json.dumps({"yearly": memory}))

        def remembered() -> Any:
            return json.loads((tmp_path / "timers.json").read_text())["yearly"]

        with host(tmp_path) as one:
            eventually(lambda: remembered() != memory)
            notes = one.noted("yearly")

        assert [n["past_due"] for n in notes] == [True] * 3
        assert datetime.fromisoformat(remembered()["next"]) > datetime.now(UTC)

    def test_a_host_without_timers_leaves_the_lock_alone(self, running):
        """--no-timers is for whoever wants to fire them by hand."""
        assert running.noted("tick") == []
        assert running.status()["holds_timers"] is False


WITH_OUTPUT = """
@app.route(route='x')
@app.generic_output_binding(arg_name='o', type='signalR', hub_name='h')
def f(req: func.HttpRequest, o: func.Out[str]) -> str: ...
"""


class TestStart:
    def test_a_taken_port_is_named(self, tmp_path):
        """One sentence names the port and the option that changes it."""
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            port = stranger.getsockname()[1]

            for extra in ((), ("--shared",)):
                told = refused(tmp_path, "--port", str(port), *extra)

                assert told == [
                    f"port {port} on 127.0.0.1 is taken by another program: stop it, or choose another port with --port"
                ]

    def test_a_stranger_who_shares_his_port_is_still_a_stranger(self, tmp_path):
        """Sharing is between instances over one data folder, not with whoever allows it."""
        with socket.create_server(("127.0.0.1", 0), reuse_port=True) as stranger:
            port = stranger.getsockname()[1]

            [told] = refused(tmp_path, "--port", str(port), "--shared")

        assert told.startswith(f"port {port} on 127.0.0.1 is taken")

    def test_instances_share_a_port(self, tmp_path):
        """New connections go to either; when one is killed the other answers all."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])

        with ExitStack() as stack:
            first, second = (stack.enter_context(host(tmp_path, "--port", port, "--shared")) for _ in range(2))
            pids = {first.process.pid, second.process.pid}
            url = f"http://127.0.0.1:{port}/admin/host/status"
            answered = set()
            eventually(lambda: answered.add(httpx.get(url).json()["pid"]) or answered == pids)
            first.process.kill()
            first.process.wait(PATIENCE)

            assert {httpx.get(url).json()["pid"] for _ in range(10)} == {second.process.pid}

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("1 / 0", "cannot be indexed: ZeroDivisionError: division by zero"),
            ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
            ("raise SystemExit('enough')", "ended the process while it was imported: enough"),
            (
                "@app.timer_trigger(arg_name='t', schedule='%NOT_SET%')\ndef f(t: func.TimerRequest): ...",
                "timer f: the setting NOT_SET is not set",
            ),
            (
                "@app.timer_trigger(arg_name='t', schedule='0 0 25 * * *')\ndef f(t: func.TimerRequest): ...",
                "timer f: schedule field hour: '25' is not between 0 and 23",
            ),
            (
                "@app.route(route='x/{a:colour}')\ndef f(req: func.HttpRequest) -> str: ...",
                "function f: route '/api/x/{a:colour}': the host knows no constraint 'colour'",
            ),
            (
                WITH_OUTPUT,
                "function f has the binding signalR, which this host does not serve",
            ),
        ],
    )
    def test_a_wrong_app_is_told_in_one_sentence(self, tmp_path, an_app, source, said):
        """No traceback: the name of the thing and what is wrong with it."""
        *warnings, told = refused(tmp_path, app=an_app(source))

        assert said in told
        assert not [line for line in warnings if "Traceback" in line]

    def test_debug_adds_the_traceback(self, tmp_path, an_app):
        """TROOP_DEBUG is for who must see the line."""
        told = refused(tmp_path, app=an_app("1 / 0"), TROOP_DEBUG="1")

        assert "division by zero" in told[0]
        assert any("Traceback" in line for line in told[1:])

    def test_a_folder_without_an_app_is_named(self, tmp_path):
        """Zero functions are no success."""
        [told] = refused(tmp_path, app=tmp_path)

        assert told == f"no function_app.py in {tmp_path}: name the app's folder with --app"

    def test_the_environment_wins_over_local_settings(self, tmp_path, an_app):
        """local.settings.json fills what the environment leaves open."""
        app = an_app(
            "import os\n"
            "@app.route(route='who', auth_level=func.AuthLevel.ANONYMOUS)\n"
            "def who(req: func.HttpRequest) -> str:\n"
            "    return f\"{os.environ['FROM_FILE']} {os.environ['FROM_BOTH']}\""
        )
        values = {"FROM_FILE": "file", "FROM_BOTH": "file"}
        (app / "local.settings.json").write_text(json.dumps({"IsEncrypted": False, "Values": values}))

        with host(tmp_path, app=app, FROM_BOTH="environment") as one:
            assert one.http.get("/api/who").text == "file environment"


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_running_invocation_is_finished_first(self, tmp_path, number):
        """Told to stop, the host answers whom it has let in and ends with 0."""
        with (
            host(tmp_path) as one,
            socket.create_connection((one.http.base_url.host, one.http.base_url.port)) as caller,
        ):
            caller.sendall(b"GET /v1/slow HTTP/1.1\r\nHost: here\r\n\r\n")
            eventually(lambda: one.noted("slow.started"))

            one.process.send_signal(number)

            answer = b"".join(iter(lambda: caller.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b"done")
            assert one.process.wait(PATIENCE) == 0

    def test_the_host_goes_with_its_parent(self, tmp_path):
        """An instance whose starter was killed does not stay behind."""
        with (
            subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent,
            host(tmp_path, TROOP_PARENT_PID=str(parent.pid)) as one,
        ):
            parent.kill()
            parent.wait(PATIENCE)

            assert one.process.wait(PATIENCE) == 0


class TestSchedules:
    @pytest.mark.parametrize(
        ("text", "after", "due"),
        [
            ("*/5 * * * * *", "2024-05-01T00:00:03.5", "2024-05-01T00:00:05"),
            ("*/5 * * * * *", "2024-05-01T00:00:55", "2024-05-01T00:01:00"),
            ("0 */15 9-17 * * Mon-Fri", "2024-05-03T17:46:00", "2024-05-06T09:00:00"),
            ("30 16 * * 1,3", "2024-05-01T16:30:00", "2024-05-06T16:30:00"),
            ("0 0 0 29 2 *", "2024-02-29T00:00:00", "2028-02-29T00:00:00"),
            ("0 0 12 1 jan sun", "2024-05-01T00:00:00", "2034-01-01T12:00:00"),
            ("59 59 23 31 12 *", "2024-12-31T23:59:59", "2025-12-31T23:59:59"),
            ("00:00:02", "2024-05-01T00:00:00.25", "2024-05-01T00:00:02.25"),
            ("1.00:00:00", "2024-02-28T00:00:00", "2024-02-29T00:00:00"),
        ],
    )
    def test_the_next_tick(self, text, after, due):
        """NCRONTAB with six or five fields, or an interval; always later than the instant given."""
        start = datetime.fromisoformat(after).replace(tzinfo=UTC)

        assert parse_schedule(text).after(start) == datetime.fromisoformat(due).replace(tzinfo=UTC)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("* * *", "has 3 fields"),
            ("60 * * * * *", "field second: '60' is not between 0 and 59"),
            ("0 0 0 * * 7", "field day of week: '7' is not between 0 and 6"),
            ("0 */0 * * * *", "field minute: '0' is no step"),
            ("0 9-5 * * * *", "the range '9-5' runs backwards"),
            ("0 0 0 31 2 *", "never comes"),
            ("24:00:00", "write days as d.hh:mm:ss"),
            ("00:00:00", "empty time span"),
        ],
    )
    def test_nonsense_is_refused_with_its_place(self, text, said):
        """The sentence names the field."""
        with pytest.raises(ValueError, match=said):
            parse_schedule(text)


class TestRoutes:
    @pytest.mark.parametrize(
        ("path", "found", "values"),
        [
            ("/api/a", "a", {}),
            ("/API/A/", "a", {}),
            ("/api/a/7", "number", {"n": "7"}),
            ("/api/a/x", "word", {"w": "x"}),
            ("/api/a/x/y/z", "rest", {"rest": "x/y/z"}),
            ("/api/b", "default", {"page": "first"}),
            ("/api/b/second", "default", {"page": "second"}),
            ("/api/report-2024.csv", "file", {"name": "report-2024", "kind": "csv"}),
            ("/api/g/not-a-guid", None, None),
            ("/api", None, None),
        ],
    )
    def test_the_most_specific_route_wins(self, path, found, values):
        """Literals before constrained values, those before plain ones, a catch-all last."""
        router: Router[str] = Router()
        for template, name in [
            ("api/a/{*rest}", "rest"),
            ("api/a/{w}", "word"),
            ("api/a/{n:int}", "number"),
            ("api/a", "a"),
            ("api/b/{page=first}", "default"),
            ("api/{name}.{kind}", "file"),
            ("api/g/{id:guid}", "guid"),
        ]:
            router.add(template, ["GET"], name)

        hit = router.find("GET", path)

        assert (hit and hit.target, hit and hit.values) == (found, values)
