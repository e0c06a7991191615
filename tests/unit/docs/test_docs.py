"""The documents say what the code does: every promise here that can be checked is checked."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from uuid import UUID, uuid5

import pytest
import typer

import alerts.canary
import alerts.events
import content.events
import shared.market.events
import signals.events
from alerts.logic.policy import bucket_id
from alerts.models import alert_id, delivery_id, digest_id, endpoint_alert_id, rule_alert_id, windows_id
from alerts.subscriptions import Digest
from content.models import digest_post_id, signal_post_id
from infra import cli
from infra.db.subscribers import endpoint_id, subscription_id
from infra.local.up.settings import Place, embedded
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import StoppedClock
from shared.events import NAMESPACE, Event
from shared.inbound import DeadLetters, letter_id
from shared.market.fetches import Wanted
from shared.market.models import Interval
from shared.market.sessions import EXCHANGE
from shared.settings import ROOT, Settings
from signals.backtest_models import Job, NoValidation, Trigger
from signals.logic.simulation import Rules
from signals.logic.strategies import STRATEGIES
from signals.models import Entry, StateGate, signal_id

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EVENTS = (ROOT / "docs/events.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLOSE = datetime(2012, 4, 23, 20, tzinfo=UTC)
DEFAULTS = embedded(
    Place(app_url="http://127.0.0.1:7071", cloud_url="http://127.0.0.1:7072", data=Path(".troop")),
    time=None,
    live_from="",
    plan="premium",
    live=False,
)


def event_types() -> dict[str, type[Event]]:
    """Every type of event that any domain tells."""
    modules = (shared.market.events, signals.events, alerts.events, content.events)
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {cls.type: cls for cls in found if issubclass(cls, Event) and cls is not Event}


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next of its rank or above."""
    rank = heading.split(maxsplit=1)[0]
    begin = page.index(f"{heading}\n")
    after = re.compile(rf"^#{{1,{len(rank)}}} ", re.MULTILINE).search(page, begin + len(heading))
    return page[begin : after.start() if after else None]


def table(text: str, first_column: str) -> list[dict[str, str]]:
    """The rows of the table whose first column has this heading."""
    lines = iter(text.splitlines())
    names = next(cells(line) for line in lines if line.startswith(f"| {first_column} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(names, cells(line), strict=True)))
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def code(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# --- docs/events.md


def test_every_event_type_has_a_section_and_no_section_is_left_over() -> None:
    """A type nobody wrote down is a type nobody can listen to."""
    assert re.findall(r"^## `(.+)`$", EVENTS, re.MULTILINE) == sorted(event_types(), key=EVENTS.index)


@pytest.mark.parametrize("type_", sorted(event_types()))
def test_an_events_fields_are_all_described(type_: str) -> None:
    """Exactly the fields of the class, in its order."""
    described = [code(row["field"])[0] for row in table(section(EVENTS, f"## `{type_}`"), "field")]

    assert described == list(event_types()[type_].model_fields)


@pytest.mark.parametrize("type_", sorted(event_types()))
def test_an_events_example_is_what_the_code_would_tell(type_: str) -> None:
    """Read from the page and told again, it is the same: id, subject, source and every field."""
    [example] = [json.loads(text) for text in fenced(section(EVENTS, f"## `{type_}`"), "json")]

    event = event_types()[type_].from_wire(example["type"], example["data"])

    assert event.to_wire() == example
    assert set(example["data"]) == set(type(event).model_fields)


@pytest.mark.parametrize("type_", sorted(event_types()))
def test_who_hears_an_event_is_who_is_subscribed(type_: str) -> None:
    """The page, and infra/subscriptions.toml by which events are delivered, name the same functions."""
    rows = tomllib.loads((ROOT / "infra/subscriptions.toml").read_text(encoding="utf-8"))["subscription"]
    [line] = re.findall(r"^- Heard by: (.+)$", section(EVENTS, f"## `{type_}`"), re.MULTILINE)

    assert code(line) == [row["function"] for row in rows if type_ in row["event_types"]]
    assert code(line) or line == "nobody yet"


def test_every_subscription_is_for_an_event_that_exists() -> None:
    """A listener of a type that nobody tells would wait for ever."""
    rows = tomllib.loads((ROOT / "infra/subscriptions.toml").read_text(encoding="utf-8"))["subscription"]

    assert {type_ for row in rows for type_ in row["event_types"]} <= set(event_types())


def written_ids() -> dict[str, tuple[str, str]]:
    """The examples of the page: name → (the facts, the id they give)."""
    [block] = fenced(section(EVENTS, "## Ids"), "text")
    found = {}
    for paragraph in block.strip().split("\n\n"):
        formula, facts, id_ = paragraph.splitlines()
        found[formula.partition(" = ")[0]] = (facts, id_)
    return found


def made_ids() -> dict[str, str]:
    """The same ids, made by the code."""
    entry = Entry(
        name="sma-10-30",
        strategy="sma_cross",
        version=1,
        params={"slow": 30, "fast": 10},
        interval=Interval.DAY,
        symbols=None,
        lookback=31,
    )
    signal = signal_id(entry, "AAPL", CLOSE)
    alert = alert_id(signal, "public")
    trend = StateGate(strategy="sma_cross", version=1, params={"slow": 200, "fast": 1}, agrees=True, lookback=201)
    gated = replace(
        entry,
        name="macd-in-trend",
        strategy="macd_cross",
        params={"fast": 12, "slow": 26, "signal": 9},
        gates=(trend,),
    )
    first, last = datetime(2013, 1, 1, tzinfo=UTC), datetime(2013, 7, 1, tzinfo=UTC)
    begun = datetime(2000, 4, 12, 20, tzinfo=UTC)
    job = Job(
        name="sma-10-30",
        entry=entry,
        symbol="AAPL",
        begin=begun,
        first=begun,
        last=CLOSE,
        bars=3027,
        warmup=30,
        provider="alpha_vantage",
        adjustment="raw",
        revision=0,
        rules=Rules(),
        validation=NoValidation(),
        candidates=[entry.params],
    )
    bucket = bucket_id("alice", "email", Digest.DAY, datetime(2012, 4, 23, tzinfo=UTC))
    made = {
        "correction's delivery_id": delivery_id(alert, "discord", 2),
        "rule's alert_id": rule_alert_id("price", subscription_id("alice"), "AAPL", "1d", "long", CLOSE),
        "endpoint's alert_id": endpoint_alert_id(endpoint_id("alice", "discord"), CLOSE),
        "digest's bucket_id": bucket,
        "digest_id": digest_id("alice", "email", bucket),
        "windows_id": windows_id("alice"),
        "backtest_id": job.backtest_id,
        "backtest's how": job.how,
        "standard backtest_id": replace(job, trigger=Trigger.HISTORY).backtest_id,
        "signal_id": signal,
        "gated signal_id": signal_id(gated, "IBM", CLOSE),
        "fetch_id": Wanted(symbol="AAPL", interval=Interval.DAY, since=first, until=last).fetch_id,
        "alert_id": alert,
        "delivery_id": delivery_id(alert, "discord"),
        "signal post_id": signal_post_id(signal),
        "digest post_id": digest_post_id(EXCHANGE, date(2012, 4, 23)),
        "subscription_id": subscription_id("alice"),
        "endpoint_id": endpoint_id("alice", "discord"),
        "feed id": str(uuid5(NAMESPACE, "feed")),
        "another payload's dead_letter_id": letter_id(
            "alerts_on_signal_raised", signal, "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
        ),
        "canary_id": (canary := alerts.canary.canary_id(datetime(2026, 11, 21, 12, 17, 20, tzinfo=UTC))),
        "canary's alert_id": alerts.canary.canary_alert_id(canary),
    }
    for type_, cls in event_types().items():
        [example] = [json.loads(text) for text in fenced(section(EVENTS, f"## `{type_}`"), "json")]
        made[f"{type_} id"] = cls.from_wire(type_, example["data"]).event_id
    return made


async def dead_letter_id() -> str:
    """The id under which a dead letter is kept."""
    documents = SQLiteDocuments(":memory:", StoppedClock(CLOSE))
    letters = DeadLetters(documents, StoppedClock(CLOSE))
    await letters.bury("alerts_on_signal_raised", made_ids()["signal_id"], "for the test", {})
    [letter] = await letters.newest(after=None, limit=2)
    await documents.close()
    return letter.id


async def test_the_golden_ids_are_what_the_code_makes() -> None:
    """An id that changes by accident is a thing done twice: this test is the one that notices."""
    made = made_ids() | {"dead_letter_id": await dead_letter_id()}

    assert {name: id_ for name, (_, id_) in written_ids().items()} == made


@pytest.mark.parametrize("name", sorted(written_ids()))
def test_a_golden_id_follows_from_the_facts_beside_it(name: str) -> None:
    """Whoever has the facts can make the id with any library: a version 5 UUID in the namespace of the page."""
    facts, id_ = written_ids()[name]
    [namespace] = re.findall(r"namespace `([0-9a-f-]{36})`", EVENTS)

    assert str(uuid5(UUID(namespace), facts)) == id_


# --- README.md


def test_the_settings_table_is_the_settings() -> None:
    """Every setting, in order, with its default."""
    rows = {code(row["setting"])[0]: row for row in table(section(README, "## Configuration"), "setting")}

    assert list(rows) == [name.upper() for name in Settings.model_fields]
    assert {name: shown_default(row["default"]) for name, row in rows.items()} == {
        name.upper(): default_of(name) for name in Settings.model_fields
    }


def test_the_settings_table_says_what_make_run_brings() -> None:
    """Where the table shows a value for `make run`, it is the embedded default; where it shows none, there is none."""
    for row in table(section(README, "## Configuration"), "setting"):
        [name], told = code(row["setting"]), row["with `make run`"]
        if not told:
            assert name not in DEFAULTS, name
        elif value := code(told):
            assert ([DEFAULTS[name]], name) == (value, name) or "--" in value[0]
        else:
            assert name in DEFAULTS, name


def shown_default(cell: str) -> str | None:
    return None if cell == "required" else "".join(code(cell))


def default_of(name: str) -> str | None:
    field = Settings.model_fields[name]
    if field.is_required():
        return None
    value = field.default
    text = value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
    return text.removeprefix(f"{ROOT}/")


@pytest.fixture(scope="module")
def endpoints() -> list[Mapping[str, object]]:
    """What the app serves, asked in a process of its own: function_app is made once a process."""
    script = (
        "import json, function_app as f; print(json.dumps([[e.method, '/api/' + e.route, e.auth, "
        "[q.name for q in e.query]] for e in f.api.endpoints]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **DEFAULTS, "DOCUMENTS_URL": "sqlite::memory:", "WATCHLIST_FILE": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = ("method", "path", "key", "query")
    return [dict(zip(names, one, strict=True)) for one in json.loads(done.stdout)]


def test_the_api_table_is_the_routes(endpoints: list[Mapping[str, object]]) -> None:
    """Every route with its method, and what a caller has to show."""
    rows = table(section(README, "## The API"), "method")
    shown = {"no": "anonymous", "yes": "key", "token": "subscriber", "operator": "operator"}
    told = {(row["method"], code(row["path"])[0], shown[row["key"]]) for row in rows}

    assert told == {(e["method"], e["path"], e["key"]) for e in endpoints}
    assert len(rows) == len(told)


def test_the_api_table_names_every_parameter(endpoints: list[Mapping[str, object]]) -> None:
    """Behind the semicolon stand the query's names; the two that a route alone explains may be missing."""
    told = {
        (row["method"], code(row["path"])[0]): code(row["what"].partition(";")[2])
        for row in table(section(README, "## The API"), "method")
    }

    for e in endpoints:
        names = told[str(e["method"]), str(e["path"])]
        assert names == e["query"] or (e["path"] == "/api/watchlist/{symbol}" and not names), e["path"]


def test_every_address_of_the_api_in_the_pages_exists(endpoints: list[Mapping[str, object]]) -> None:
    """No page sends a reader to a route that is not there."""
    known = [re.compile(re.sub(r"\{\w+\}", r"[^/]+", str(e["path"]))) for e in endpoints]
    for page in PAGES:
        for path in re.findall(r"(?<![\w.])/api/[a-z][\w./{}]*", page.read_text(encoding="utf-8")):
            is_cloud = path.startswith("/api/hubs/") or path == "/api/webhooks/"
            assert is_cloud or any(one.fullmatch(path.rstrip("./")) for one in known), f"{page.name}: {path}"


def commands() -> list[tuple[str, set[str]]]:
    """Each command with its options."""
    leaves = []

    def walk(group: typer.core.TyperGroup, before: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{before}{name} ")
                continue
            options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
            leaves.append((f"{before}{name}", options - {"--help"}))

    walk(typer.main.get_command(cli.app), "")
    return leaves


@pytest.mark.parametrize(("command", "options"), commands())
def test_every_option_of_the_command_line_is_told(command: str, options: set[str]) -> None:
    """Each command's options, and no option that it has not."""
    text = section(README, "## The command line")
    told = re.split(r"^\*\*`troop ([a-z ]+)`\*\*", text, flags=re.MULTILINE)
    paragraphs = dict(zip(told[1::2], told[2::2], strict=True))
    said = code(paragraphs[command].partition("**Bars")[0].replace("troop up ", ""))

    assert {one for one in said if re.fullmatch(r"--[a-z-]+", one)} == options


def test_every_strategy_is_told_with_its_parameters_and_lookback() -> None:
    """The README's table of strategies is the registry."""
    rows = {code(row["strategy"])[0]: row for row in table(section(README, "## Configuration"), "strategy")}

    assert {name: code(row["parameters"]) for name, row in rows.items()} == {
        name: list(strategy.params.model_fields) for name, strategy in STRATEGIES.items()
    }
    needs = {name: strategy.lookback(strategy.params()) for name, strategy in STRATEGIES.items()}
    assert rows["sma_cross"]["bars it needs"] == "`slow` + 1"
    assert needs["sma_cross"] == 30 + 1
    assert rows["rsi_reversal"]["bars it needs"] == f"{needs['rsi_reversal']} for a period of 14"
    assert rows["bollinger_breakout"]["bars it needs"] == "`period` + 1"
    assert needs["bollinger_breakout"] == 20 + 1


# --- all pages


def without_blocks(page: Path) -> str:
    """A page's text, its examples taken out."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)


def anchor(heading: str) -> str:
    """How a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page leads to a file, and to a heading in it where it names one."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, wanted = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if wanted:
            assert wanted in map(anchor, headings(file)), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A path in backticks is a file or folder of the repository."""
    of_ours = "|".join(folder.name for folder in ROOT.iterdir() if folder.is_dir() and folder.name[0] != ".")
    path = re.compile(rf"(?:{of_ours})/[\w./-]*|[\w.-][\w./-]*\.(?:py|toml|json|md)")
    for named in code(without_blocks(page)):
        if path.fullmatch(named) and named != "local.settings.json":
            places = (ROOT / named, ROOT / "signals" / named)  # a room's file may go without its domain
            assert any(place.exists() for place in places), named


RECORDS = {
    "0001": "Layout and import contracts",
    "0002": "CloudEvents and versioning",
    "0003": "Error kinds and redelivery",
    "0004": "Idempotency: facts as ids, claims with leases, UNKNOWN",
    "0005": "Where the throttle counts",
    "0006": "float64, UTC, session closes",
}


@pytest.mark.parametrize("number", RECORDS)
def test_a_decision_is_recorded_in_one_shape(number: str) -> None:
    """One page a decision: what forced it, what was decided, what else there was, what follows."""
    [page] = (ROOT / "docs/adr").glob(f"{number}-*.md")

    assert headings(page) == [
        f"{number}. {RECORDS[number]}",
        "Context",
        "Decision",
        "Alternatives",
        "Consequences",
    ]


def test_the_picture_is_small_enough_to_load() -> None:
    """A real picture, under 300 kB."""
    picture = ROOT / "docs/images/running.png"

    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size < 300_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_no_place_of_one_machine(page: Path) -> None:
    """A reader has neither our folders nor our home."""
    assert not re.search(r"(?<![\w.])/(root|home|work|Users)/", page.read_text(encoding="utf-8"))
