"""What the host, Event Grid and Azure's build see of the app."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

import alerts.events
import content.events
import shared.market.events
import signals.events
from infra.local.discord import DEFAULT_WEBHOOK
from infra.local.host.cron import parse_schedule
from infra.local.topic import load_subscriptions
from shared.events import Event
from shared.settings import ROOT, Settings
from tests.functions.running_app import HOST_KEYS, App

pytestmark = [pytest.mark.asyncio(loop_scope="session")]

ANONYMOUS = {
    ("GET", "health"),
    ("GET", "openapi.json"),
    ("GET", "bars/{symbol}"),
    ("GET", "quotes/{symbol}"),
    ("GET", "series/{symbol}"),
    ("GET", "watchlist"),
    ("GET", "coverage/{symbol}"),
    ("GET", "providers"),
    ("GET", "fetches/{id}"),
    ("GET", "signals"),
    ("GET", "signals/{signal_id}"),
    ("GET", "entries/{name}/performance"),
    ("GET", "strategies"),
    ("GET", "backtests"),
    ("GET", "backtests/{id}"),
    ("GET", "alerts"),
    ("GET", "posts"),
    ("GET", "posts/{post_id}"),
    ("GET", "feed.xml"),
    ("GET", "alerts/{alert_id}/explain"),
    ("GET", "alerts/{alert_id}/deliveries"),
    ("GET", "unsubscribe"),
    ("POST", "unsubscribe"),
    ("POST", "negotiate"),
    ("POST", "hooks/finnhub"),
}
"""The allow-list: who adds a route here has decided that anybody may call it."""

WITH_KEY = {
    ("PUT", "watchlist/{symbol}"),
    ("DELETE", "watchlist/{symbol}"),
    ("POST", "fetches"),
    ("POST", "backtests"),
    ("DELETE", "fetches/{id}"),
}

SIGNED_IN = {
    ("POST", "alerts/{alert_id}/acknowledge"),
    ("GET", "subscriptions"),
    ("POST", "subscriptions"),
    ("GET", "subscriptions/{id}"),
    ("PUT", "subscriptions/{id}"),
    ("DELETE", "subscriptions/{id}"),
    ("GET", "endpoints"),
    ("GET", "endpoints/{channel}"),
    ("PUT", "endpoints/{channel}"),
    ("DELETE", "endpoints/{channel}"),
    ("POST", "endpoints/{channel}/test"),
    ("GET", "preferences"),
    ("PUT", "preferences"),
    ("GET", "mutes"),
    ("POST", "mutes"),
    ("DELETE", "mutes/{id}"),
    ("POST", "my/fetches"),
    ("DELETE", "my/fetches/{id}"),
}
"""What is somebody's own: the host lets everybody through to it, and we verify the token."""

FOR_OPERATORS = {
    ("GET", "audit"),
    ("GET", "deadletters"),
    ("GET", "deadletters/{dead_letter_id}"),
    ("POST", "deadletters/replay"),
    ("POST", "deadletters/{dead_letter_id}/replay"),
    ("POST", "deadletters/{dead_letter_id}/discard"),
}

TIMERS = {
    "market_refresh_quotes": "MARKET_QUOTES_SCHEDULE",
    "market_fetches": "MARKET_FETCHES_SCHEDULE",
    "market_prefetch": "MARKET_PREFETCH_SCHEDULE",
    "market_sweep_hooks": "MARKET_FETCHES_SCHEDULE",
    "signals_ingest": "SIGNALS_INGEST_SCHEDULE",
    "signals_sweep": "SIGNALS_SWEEP_SCHEDULE",
    "signals_backtest_sweep": "SIGNALS_SWEEP_SCHEDULE",
    "alerts_sweep": "ALERTS_SWEEP_SCHEDULE",
    "content_open_digests": "CONTENT_DIGEST_SCHEDULE",
    "content_sweep": "CONTENT_SWEEP_SCHEDULE",
    "system_sweep": "SYSTEM_SWEEP_SCHEDULE",
    "system_canary": "CANARY_SCHEDULE",
    "system_deadlettered": "SYSTEM_DEADLETTERED_SCHEDULE",
}
ON_EVENTS = {
    "market_on_earnings_reported",
    "signals_on_bars_ingested",
    "signals_on_backtest_requested",
    "alerts_on_signal_raised",
    "alerts_on_bars_ingested",
    "alerts_on_canary_sent",
    "content_on_signal_raised",
}

ROOMS = {word: word for word in ("market", "signals", "alerts", "content", "system")} | {"posts": "content"}
"""First word of a function's name → the domain it belongs to; what is everybody's has a name of its own."""
EVERYBODYS = {"health", "openapi", "audit_list"} | {
    f"deadletters_{what}" for what in ("list", "read", "replay", "discard", "replay_range")
}

LATE = ("azure.eventgrid", "azure.core", "azure.identity", "aiohttp", "httpx", "numpy", "talib", "jinja2", "jwt")
"""What a cold start must not pay for before somebody needs it."""
FOREIGN = ("infra", "tests", "bench", "azure_functions_runtime", "pytest")
"""What is not deployed."""

EVENTS = (shared.market.events, signals.events, alerts.events, content.events)

LICENCES = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Zlib|CC0)", re.IGNORECASE)
OTHER_LICENCES = {
    "certifi": "MPL-2.0: a list of certificates, used unchanged",
    "ta-lib": "BSD-2-Clause: its metadata is silent, its licence file is not",
}


# --- what the host sees


async def test_the_routes_are_the_allow_list_and_the_ones_with_a_key(app: App) -> None:
    """Whoever needs no key and no token is on a list that a person keeps; everything else asks for one of them."""
    found: dict[str, set[tuple[str, str]]] = {"ANONYMOUS": set(), "FUNCTION": set()}
    for function in app.functions.values():
        if function.trigger_type == "httpTrigger":
            [method] = function.trigger["methods"]
            found[function.trigger["authLevel"]].add((method, function.trigger["route"]))
    assert found == {"ANONYMOUS": ANONYMOUS | SIGNED_IN | FOR_OPERATORS, "FUNCTION": WITH_KEY}


async def test_what_we_guard_ourselves_is_what_the_lists_say(app: App) -> None:
    """A route that the host opens to all, and is on no list of anonymous ones, is verified by us in the right role."""
    found: dict[str, set[tuple[str, str]]] = {"anonymous": set(), "key": set(), "subscriber": set(), "operator": set()}
    for endpoint in sys.modules["function_app"].api.endpoints:
        found[endpoint.auth].add((endpoint.method, endpoint.route))
    assert found == {"anonymous": ANONYMOUS, "key": WITH_KEY, "subscriber": SIGNED_IN, "operator": FOR_OPERATORS}


async def test_the_host_refuses_a_call_without_the_key(app: App) -> None:
    """FUNCTION means that the host asks for the key, in the header or as ?code=."""
    refused = [await app.ask("DELETE", "/api/watchlist/NOKEY", **query) for query in ({}, {"code": "guessed"})]
    assert [answer.status for answer in refused] == [401, 401]
    let_in = await app.ask("DELETE", "/api/watchlist/NOKEY", code=HOST_KEYS["TROOP_FUNCTION_KEY"])
    assert (let_in.status, let_in.content_type) == (404, "application/problem+json")


async def test_we_refuse_a_call_without_the_right_token(app: App) -> None:
    """Nobody is told to sign in, a subscriber that it takes an operator; an operator is let in."""
    subscriber = await app.signed_in("ada")
    operator = await app.signed_in("olga", role="operator")
    for method, route in SIGNED_IN | FOR_OPERATORS:
        path = "/api/" + route.replace("{", "").replace("}", "")
        assert (await app.ask(method, path)).status == 401, route
        if (method, route) in FOR_OPERATORS:
            assert (await app.ask(method, path, headers=subscriber)).status == 403, route
        assert (await app.ask(method, path, headers=operator)).status not in (401, 403), route


async def test_timers_fire_by_a_setting_each(app: App) -> None:
    """A schedule is a setting of the app, so an operator changes it without a deployment; its default is valid."""
    found = {f.name: f.trigger["schedule"] for f in app.functions.values() if f.trigger_type == "timerTrigger"}
    assert found == {name: f"%{setting}%" for name, setting in TIMERS.items()}
    for setting in TIMERS.values():
        parse_schedule(Settings.model_fields[setting.lower()].default)


async def test_subscriptions_name_the_event_functions_that_exist(app: App) -> None:
    """Event Grid wakes every Event Grid function and no other, each by an event that this house tells."""
    events = {event.type for module in EVENTS for event in vars(module).values() if _is_event(event)}
    subscriptions = load_subscriptions(ROOT / "infra/subscriptions.toml")
    found = {f.name for f in app.functions.values() if f.trigger_type == "eventGridTrigger"}
    assert found == ON_EVENTS == {s.function for s in subscriptions}
    heard = {type_ for s in subscriptions for type_ in s.event_types}
    assert heard <= events
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]+\.v\d+", type_) for type_ in events)


async def test_function_names_carry_their_domain(app: App) -> None:
    """A line of a log names its function, and so the room to look in."""
    for name in app.functions:
        assert name in EVERYBODYS or name.partition("_")[0] in ROOMS, name
    for function in app.functions.values():
        if function.trigger_type != "httpTrigger":
            assert ROOMS[function.name.partition("_")[0]] == function.name.partition("_")[0]


async def test_every_function_is_async_and_has_only_bindings_that_the_real_host_has_too(app: App) -> None:
    """A sync function would lose the trace, an exotic binding would need an extension."""
    for function in app.functions.values():
        assert function.is_async, function.name
        kinds = {binding["type"] for binding in function.bindings}
        assert kinds <= {"httpTrigger", "http", "timerTrigger", "eventGridTrigger"}, function.name


def _is_event(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Event) and value is not Event


# --- what happens before the first call

PROBE = """
import json, sys
opened, reached = [], []

def notice(event, arguments):
    if event == "open":
        opened.append([str(arguments[0]), str(arguments[1])])
    elif event.startswith(("socket.", "sqlite3.")):
        reached.append(event)

sys.addaudithook(notice)
import function_app
functions = [function.get_function_name() for function in function_app.app.get_functions()]
modules = sorted(sys.modules)
print(json.dumps({"functions": functions, "modules": modules, "opened": opened, "reached": reached}))
"""


def settings() -> dict[str, str]:
    """The least with which every function is there; nobody listens at these addresses."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "",
        "EVENT_GRID_TOPIC_ENDPOINT": "http://127.0.0.1:9/topic/api/events",
        "AZURE_SIGNALR_CONNECTION_STRING": f"Endpoint=http://127.0.0.1;Port=9;AccessKey={'k' * 40};Version=1.0;",
        "DISCORD_WEBHOOK_URL": f"http://127.0.0.1:9/api/webhooks/{DEFAULT_WEBHOOK[0]}/{'t' * 68}",
        "ALPHA_VANTAGE_KEY": "a-key",
        "FINNHUB_KEY": "a-key",
        "DEAD_LETTERS_URL": "http://127.0.0.1:9/deadletters",
    }


def run(code: str, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def indexed() -> dict[str, list[str]]:
    """What a fresh process did to index the app."""
    done = run(PROBE, settings())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def test_indexing_imports_nothing_that_a_call_may_never_need(indexed: dict[str, list[str]]) -> None:
    """The first event waits for every import, so clients and numerics are imported by who uses them."""
    assert not _of(indexed["modules"], LATE)
    assert _of(indexed["modules"], ("azure.functions", "pydantic")), "the probe sees what is imported"


async def test_nothing_of_the_app_leans_on_what_is_not_deployed(indexed: dict[str, list[str]], app: App) -> None:
    """infra, tests and the worker's library stay at home; the app runs without them."""
    assert not _of(indexed["modules"], FOREIGN)
    assert set(indexed["functions"]) == set(app.functions)


async def test_indexing_reaches_nobody_and_reads_only_what_is_configured(indexed: dict[str, list[str]]) -> None:
    """Nothing touches the network or the storage before the first call; a wrong entry is found at the start."""
    ours = [path.removeprefix(f"{ROOT}/") for path, mode in indexed["opened"] if mode == "r" and str(ROOT) in path]
    read = {path for path in ours if not path.startswith(".venv") and not path.endswith((".py", ".pyc"))}
    assert read == {"signals/entries.toml", "alerts/subscriptions.toml", "shared/market/registry.toml"}
    assert indexed["reached"] == []


WRONG = {
    "ALPHA_VANTAGE_KEY": "",
    "FINNHUB_KEY": "  ",
    "MARKET_CLOCK": "noon",
    "LIVE_FROM": "yesterday",
    "ALPHA_VANTAGE_PLAN": "gold",
    "MARKET_PROVIDERS": "bloomberg",
    "DOCUMENTS_URL": "mysql://user:secret-hook@db",
    "DISCORD_WEBHOOK_URL": "http://example.com/secret-hook",
    "AZURE_SIGNALR_CONNECTION_STRING": "secret-hook",
    "SUBSCRIPTIONS_FILE": "nowhere.toml",
    "ENTRIES_FILE": "nowhere.toml",
}

TRY_EACH = """
import json, os, runpy, sys
said = {}
for name, value in json.loads(sys.argv[1]).items():
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        runpy.run_path("function_app.py")
    except Exception as e:
        said[name] = [type(e).__name__, str(e)]
    os.environ.pop(name)
    if before is not None:
        os.environ[name] = before
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def refusals() -> dict[str, list[str]]:
    """What indexing said to each wrong setting."""
    done = run(TRY_EACH, settings(), json.dumps(WRONG))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("setting", WRONG)
async def test_a_missing_or_wrong_setting_ends_indexing_with_one_sentence(
    refusals: dict[str, list[str]], setting: str
) -> None:
    """It names the setting, says what to do, and shows no secret."""
    kind, text = refusals[setting]
    assert kind == "ConfigurationError"
    assert setting in text
    assert "\n" not in text
    assert re.search(r"[Ss]et it|write|choose|must have the form|cannot be read", text), text
    assert "secret-hook" not in text


def _of(modules: list[str], names: tuple[str, ...]) -> list[str]:
    return [m for m in modules if m in names or m.startswith(tuple(f"{name}." for name in names))]


# --- what is deployed


async def test_host_json_says_what_the_app_relies_on() -> None:
    """Routes under /api, one trace from end to end, and a limit that the handlers stay far below."""
    host = json.loads((ROOT / "host.json").read_text())
    assert host["version"] == "2.0"
    assert host["telemetryMode"] == "OpenTelemetry"
    assert host["extensions"]["http"]["routePrefix"] == "api"
    assert host["functionTimeout"] == "00:05:00"
    assert host["extensionBundle"]["id"] == "Microsoft.Azure.Functions.ExtensionBundle"
    sampling = host["logging"]["applicationInsights"]["samplingSettings"]
    assert "Exception" in sampling["excludedTypes"], "no exception is sampled away"


async def test_only_the_app_is_deployed() -> None:
    """What a laptop needs stays on the laptop, and no file with a key leaves it."""
    left_out = (ROOT / ".funcignore").read_text().split()
    assert {"tests", "infra", "bench", "docs", "web", ".venv", ".troop", "local.settings*.json"} <= set(left_out)
    needed = {"function_app.py", "host.json", "requirements.txt", "shared", "signals", "alerts", "content"}
    assert not needed & set(left_out)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-sessions.txt"])
async def test_every_locked_package_has_its_hashes_and_no_host(name: str) -> None:
    """The same bytes everywhere, from whichever index the installing side trusts."""
    text = (ROOT / name).read_text()
    packages = re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n?", "", text).strip())
    assert len(packages) > 5
    for package in packages:
        assert re.match(r"[a-z0-9._-]+==\S+", package), package.splitlines()[0]
        assert "--hash=sha256:" in package, package.splitlines()[0]
    assert not re.search(r"(?m)^[^#\n]*(https?://|file:|@ )|^--", text)


async def test_what_is_deployed_may_be_deployed() -> None:
    """No runtime package is under a licence that would spread to ours."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not re.match(r"[a-z0-9]", line):
            continue
        wanted = Requirement(line.removesuffix("\\").strip())
        if wanted.marker and not wanted.marker.evaluate():
            continue
        said = _licence(wanted.name)
        assert not re.search(r"\b[AL]?GPL|SSPL|BUSL", said), f"{wanted.name}: {said}"
        assert LICENCES.search(said) or wanted.name in OTHER_LICENCES, f"{wanted.name}: {said or 'says nothing'}"


def _licence(package: str) -> str:
    """What a package says of its licence: the expression, the classifiers, or the first words of the field."""
    about = metadata.metadata(package)
    classifiers = [c for c in about.get_all("Classifier", []) if c.startswith("License")]
    return " ".join([about.get("License-Expression") or (about.get("License") or "")[:200], *classifiers])


async def test_the_interpreter_is_the_one_that_azure_runs() -> None:
    """One version everywhere: what is pinned, what is required, what runs here."""
    pinned = (ROOT / ".python-version").read_text().strip()
    assert pinned.startswith("3.13")
    assert 'requires-python = ">=3.13,<3.14"' in (ROOT / "pyproject.toml").read_text()
    assert sys.version_info[:2] == (3, 13)


async def test_the_example_settings_are_complete_and_harmless() -> None:
    """local.settings.example.json shows every setting once, and copied as it is the app starts with it."""
    values = json.loads((ROOT / "local.settings.example.json").read_text())["Values"]
    assert {name for name in values if name not in ("FUNCTIONS_WORKER_RUNTIME", "AzureWebJobsStorage")} == {
        name.upper() for name in Settings.model_fields
    }
    read = Settings.from_env(values)
    for name, known in Settings.model_fields.items():
        if name.endswith("_schedule"):
            assert getattr(read, name) == known.default
    assert "your-key" in read.secrets()
