"""Secrets are planted in every secret setting, everything goes wrong that can, and nothing that leaves shows one."""

import base64
import json
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
from azure.core.settings import settings as azure_settings
from opentelemetry import trace
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.documents import Document, sort_key
from shared.market.ingest import Ingest
from shared.telemetry import redact, redacting_processor
from tests.functions.running_app import HANGS_UP, HOST_KEYS, NOW, SECRETS, Answer, App, Reply, waves

pytestmark = [pytest.mark.asyncio(loop_scope="session")]

CANARIES = SECRETS | HOST_KEYS
ALL_SECRETS = " ".join(SECRETS.values())
PAYLOADS = Path(__file__).parent.parent / "payloads"


# --- the scanner


def leaks(text: str) -> set[str]:
    """The names of the secrets that a text shows: as they are, in other capitals, in a URL, or in base64."""
    lowered = text.lower()
    return {
        name
        for name, secret in CANARIES.items()
        if secret.lower() in lowered
        or quote(secret, safe="").lower() in lowered
        or any(form in text for form in _in_base64(secret.encode()))
    }


def _in_base64(secret: bytes) -> Iterator[str]:
    """What of a secret shows in base64, wherever in the encoded text it begins."""
    for shift, first in ((0, 0), (1, 2), (2, 3)):
        whole = base64.b64encode(bytes(shift) + secret).decode()
        sure = whole[first : (shift + len(secret)) * 8 // 6]
        yield sure
        yield sure.replace("+", "-").replace("/", "_")


@dataclass(slots=True, kw_only=True)
class Evidence:
    """Everything that left the app, as text."""

    logs: list[str] = field(default_factory=list)
    spans: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)

    def leaks(self, place: str) -> dict[str, str]:
        """The secrets one place shows, each with the text that shows it."""
        texts: Sequence[str] = getattr(self, place)
        return {name: text[:2000] for text in texts for name in leaks(text)}


class Recorder(logging.Handler):
    """Keeps all that a log record carries: its text, its fields, and the exception it holds."""

    def __init__(self, logs: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self._logs = logs
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        self._logs.append(f"{self._formatter.format(record)} {record.__dict__!r}")


def shown(span: ReadableSpan) -> str:
    """All of a span that an exporter would send."""
    events = [(event.name, dict(event.attributes or {})) for event in span.events]
    links = [dict(link.attributes or {}) for link in span.links]
    return f"{span.name} {dict(span.attributes or {})!r} {span.status.description} {events!r} {links!r}"


def content_of(database: Path) -> list[str]:
    """The bytes of a database and of what lies beside it, freed pages included."""
    return [file.read_bytes().decode("latin-1") for file in sorted(database.parent.glob(f"{database.name}*"))]


@contextmanager
def everything_logged(logs: list[str]) -> Iterator[None]:
    """All loggers at DEBUG, whatever the app has set."""
    recorder = Recorder(logs)
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before = {logger: logger.level for logger in [logging.root, *known]}
    for logger in before:
        logger.setLevel(logging.DEBUG)
    logging.root.addHandler(recorder)
    try:
        yield
    finally:
        logging.root.removeHandler(recorder)
        for logger, level in before.items():
            logger.setLevel(level)


@contextmanager
def everything_traced(spans: list[str]) -> Iterator[None]:
    """Every span recorded, with the instrumentation of httpx and of the Azure SDK that runs in Azure."""
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(redacting_processor())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    HTTPXClientInstrumentor().instrument()
    azure_settings.tracing_implementation = "opentelemetry"
    try:
        yield
    finally:
        azure_settings.tracing_implementation.unset_value()
        HTTPXClientInstrumentor().uninstrument()
        spans += [shown(span) for span in exporter.get_finished_spans()]
        exporter.shutdown()


# --- the scenario


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def evidence(app: App) -> AsyncIterator[Evidence]:
    """What a broad run with every kind of trouble left behind."""
    found = Evidence()
    with everything_logged(found.logs), everything_traced(found.spans):
        await refusals_that_echo_the_key(app)
        await channels_that_fail(app)
        await a_topic_that_refuses(app)
        await events_that_carry_secrets(app)
        await bugs_that_speak(app)
        await every_read(app)
    found.documents = content_of(app.folder / "app.db")
    found.answers = [f"{dict(answer.headers)} {answer.text}" for answer in app.answers]
    found.exceptions = [f"{outcome.error} {outcome.traceback}" for outcome in app.outcomes if outcome.error]
    yield found


async def refusals_that_echo_the_key(app: App) -> None:
    """Providers refuse, each in a sentence that repeats the key, and once say nothing at all."""
    key, other = SECRETS["ALPHA_VANTAGE_KEY"], SECRETS["FINNHUB_KEY"]
    third, fourth = SECRETS["TWELVE_DATA_KEY"], SECRETS["POLYGON_KEY"]
    quota = (PAYLOADS / "alpha_vantage/refusals/quota_with_key.json").read_text().replace("@KEY@", key)
    refusals = [
        (Reply(200, json.loads(quota)), Reply(429, {"error": f"API limit reached for {other}"})),
        (Reply(200, {"Note": f"Dear {key.lower()}, something new."}), Reply(401, {"error": f"Invalid key {other}"})),
        (Reply(200, {"Error Message": f"apikey={key} is odd"}), Reply(418, {"error": f"teapot of {other}"})),
        (Reply(500, f"<html>{key} {other}</html>"), Reply(200, f"no json, {other}")),
        (Reply(HANGS_UP), Reply(HANGS_UP)),
    ]
    for number, (alpha_vantage, finnhub) in enumerate(refusals):
        symbol = f"REFUSED{number}"
        app.watch(symbol)
        others = {
            "twelve_data": Reply(200, {"code": 429, "status": "error", "message": f"out of credits, {third}"}),
            "polygon": Reply(403, {"status": "NOT_AUTHORIZED", "message": f"{fourth} does not include this"}),
        }
        with app.neighbours.trouble(alpha_vantage=alpha_vantage, finnhub=finnhub, **others):
            for timer in ("signals_ingest", "market_refresh_quotes"):
                await app.fire(timer)
        for what in ("bars", "quotes", "series"):
            await app.get(f"/api/{what}/{symbol}")
        await app.forgive()


async def channels_that_fail(app: App) -> None:
    """Discord and SignalR refuse an alert, repeat what they were sent, and once say nothing at all."""
    for number, status in enumerate((400, 401, 404, 429, 500, HANGS_UP)):
        reply = Reply(status, {"message": f"no: {ALL_SECRETS}", "code": 1, "retry_after": 0.01})
        with app.neighbours.trouble(discord=reply, signalr=reply):
            await app.follow(f"UNHEARD{number}", waves())
            await app.fire("alerts_sweep")
            await app.ask("POST", "/api/negotiate")


async def a_topic_that_refuses(app: App) -> None:
    """The topic refuses every event; timers and functions fail on it."""
    with app.neighbours.trouble(topic=Reply(401, {"error": {"code": "Unauthorized"}})):
        app.neighbours.prices["NOTOPIC"] = waves()
        app.watch("NOTOPIC")
        for timer in ("signals_ingest", "signals_sweep", "content_open_digests", "content_sweep"):
            await app.fire(timer)
        for function in ("alerts_on_signal_raised", "content_on_signal_raised"):
            assert (await app.notify(function, signal_event("NOTOPIC"))).status == 500


async def events_that_carry_secrets(app: App) -> None:
    """Events that nobody can use, with secrets wherever an event has room for text."""
    functions = ("signals_on_bars_ingested", "alerts_on_signal_raised", "content_on_signal_raised")
    whole = signal_event("SECRETS")
    for number, secret in enumerate(app.secrets):
        malformed = [
            {**whole, "id": f"data-{number}", "data": {"symbol": secret, "note": [secret]}},
            {**whole, "id": f"text-{number}", "data": f"key={secret}"},
            {**whole, "id": f"trace-{number}", "traceparent": secret, "tracestate": secret, "data": {}},
            {**whole, "id": f"extra-{number}", "comment": secret, "data": {**whole["data"], "symbol": 7, "x": secret}},
        ]
        for event in malformed:
            for function in functions:
                await app.notify(function, event)


async def bugs_that_speak(app: App) -> None:
    """Something of ours breaks with a secret in its text."""

    async def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"connecting with {' '.join(app.secrets)} failed")

    with pytest.MonkeyPatch.context() as patch:
        for place in ("alerts.service.AlertService.announce", "content.service.ContentService.collect"):
            patch.setattr(place, broken)
        for place in ("shared.market.service.Market.quote", "alerts.service.AlertService.negotiate"):
            patch.setattr(place, broken)
        for function in ("alerts_on_signal_raised", "content_on_signal_raised"):
            assert (await app.notify(function, signal_event("BROKEN"))).status == 500
        assert (await app.get("/api/quotes/WAVE")).status == 500
        assert (await app.ask("POST", "/api/negotiate")).status == 500


async def every_read(app: App) -> None:
    """Every route, as an operator, with a key in the query and secrets where parameters are read."""
    await app.fire("market_refresh_quotes")
    operator = await app.signed_in("olga", role="operator")
    for function in list(app.functions.values()):
        if function.trigger_type != "httpTrigger":
            continue
        path = "/api/" + function.trigger["route"].replace("{symbol}", "UNHEARD0").replace("{post_id}", "none")
        [method] = function.trigger["methods"]
        await app.ask(method, path, headers=operator, code=HOST_KEYS["TROOP_FUNCTION_KEY"])
        for name in ("limit", "cursor", "after", "kind", "interval", "symbol", "symbols", "source", "state", "token"):
            secret = {name: SECRETS["ALPHA_VANTAGE_KEY"]}
            await app.ask(method, path, headers=operator, code=HOST_KEYS["TROOP_FUNCTION_KEY"], **secret)
    bearer = {"Authorization": f"Bearer {SECRETS['SIGNALR_ACCESS_KEY']}"}
    assert (await app.ask("POST", "/api/negotiate", headers=bearer)).status == 200


def signal_event(symbol: str) -> dict[str, Any]:
    """A well-formed signals.signal_raised.v1."""
    return {
        "specversion": "1.0",
        "id": f"canary-{symbol}",
        "source": "/troop/signals",
        "type": "signals.signal_raised.v1",
        "subject": f"symbols/{symbol}",
        "time": "2013-01-18T21:00:01Z",
        "data": {
            "occurred_at": "2013-01-18T21:00:00Z",
            "recorded_at": "2013-01-18T21:00:01Z",
            "signal_id": f"canary-{symbol}",
            "entry": "sma-10-30",
            "strategy": "sma_cross@1",
            "params": {"fast": 10, "slow": 30},
            "symbol": symbol,
            "interval": "1d",
            "direction": "long",
            "strength": 0.5,
            "reference_price": 100,
            "features": {"fast": 101, "slow": 100},
            "provider": "alpha_vantage",
        },
    }


# --- the verdict


@pytest.mark.parametrize("place", ["logs", "spans", "documents", "answers", "exceptions"])
async def test_no_secret_is_seen(evidence: Evidence, place: str) -> None:
    """Whatever went wrong: no log record, span, stored byte, answer or exception shows a secret."""
    assert evidence.leaks(place) == {}


async def test_the_secrets_were_in_use(app: App, evidence: Evidence) -> None:
    """Each neighbour was really called with its secret, so there was something to lose."""
    asked = {neighbour: [a for a in app.neighbours.asked if a.neighbour == neighbour] for neighbour in TALKED_TO}
    for neighbour, secret in TALKED_TO.items():
        calls = [f"{a.path} {dict(a.query)} {dict(a.headers)}" for a in asked[neighbour]]
        assert calls
        if secret:
            assert all(SECRETS[secret] in call for call in calls), neighbour
        else:
            assert all("Bearer ey" in call for call in calls), "SignalR gets tokens, never the key"


TALKED_TO = {
    "alpha_vantage": "ALPHA_VANTAGE_KEY",
    "finnhub": "FINNHUB_KEY",
    "twelve_data": "TWELVE_DATA_KEY",
    "polygon": "POLYGON_KEY",
    "topic": "EVENT_GRID_TOPIC_KEY",
    "discord": "DISCORD_TOKEN",
    "signalr": "",
}


async def test_the_scenario_went_where_secrets_could_show(evidence: Evidence) -> None:
    """Trouble was logged, traced, stored and answered; a run where nothing happens proves nothing."""
    logs, spans = "\n".join(evidence.logs), "\n".join(evidence.spans)
    for event in ("slot.postponed", "delivery.failed", "event.buried", "event.failed"):
        assert event in logs, event
    assert "UnavailableError" in logs
    assert "Traceback" in logs
    assert "***" in logs, "something had to be taken out"
    for name in ("provider.call", "http.asked", "http.sent", "delivery.attempt", "signals_ingest", "alerts_negotiate"):
        assert name in spans, name
    assert "finnhub/api/v1" in spans, "the instrumentation of httpx records addresses"
    documents = "".join(evidence.documents)
    for word in ("UnknownSymbolError", "DEAD", "InvalidPayloadError", "UNHEARD5"):
        assert word in documents, word
    statuses = "".join(evidence.answers)
    assert '"status":500' in statuses
    assert "Result: Failure" in statuses


async def test_a_secret_in_the_envelope_of_an_event_is_not_shown(app: App, evidence: Evidence) -> None:
    """What buried events say of themselves is shown without secrets, as their data is."""
    secret = SECRETS["EVENT_GRID_TOPIC_KEY"]
    event = {**signal_event("ENVELOPE"), "subject": f"symbols/{secret}", "type": f"x.{secret}", "id": f"x-{secret}"}
    await app.notify("alerts_on_signal_raised", event)
    letters = await app.ask("GET", "/api/deadletters", headers=await app.signed_in("olga", role="operator"))
    assert letters.status == 200
    assert "x.***" in letters.text
    assert leaks(letters.text) == set()


# --- known gaps: each is strict, so that whoever closes one has to take its mark away


async def test_a_secret_inside_a_setting_is_a_secret_too(evidence: Evidence) -> None:
    """The access key of a connection string and the token of a webhook are taken out wherever they stand alone."""
    assert leaks(redact(f"refused: {ALL_SECRETS}")) == set()


async def test_a_secret_in_other_capitals_is_a_secret_too(app: App, evidence: Evidence) -> None:
    """A provider that repeats a key does not always repeat its capitals."""
    assert leaks(redact(" ".join(app.secrets).upper())) == set()


async def test_a_bug_in_a_timer_leaves_no_secret_with_the_host(app: App, evidence: Evidence) -> None:
    """The host logs what a function raises, so that text names a kind of trouble and nothing else."""

    async def broken(*args: object) -> None:
        raise RuntimeError(f"connecting with {' '.join(app.secrets)} failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ingest, "ingest", broken)
        outcome = await app.fire("signals_ingest")
    assert outcome.error is not None
    assert leaks(outcome.error) == set()


async def test_what_the_topic_repeats_is_not_traced(app: App, evidence: Evidence) -> None:
    """A span of a library is held to the same rule as ours."""
    spans: list[str] = []
    with everything_traced(spans), app.neighbours.trouble(topic=Reply(401, {"error": {"message": ALL_SECRETS}})):
        await app.notify("alerts_on_signal_raised", signal_event("REPEATED"))
    assert any("EventGrid" in span for span in spans)
    assert leaks("".join(spans)) == set()


# --- the scanner can fail


@pytest.mark.parametrize("secret", CANARIES.values(), ids=CANARIES)
@pytest.mark.parametrize(
    "disguise",
    [
        str,
        str.upper,
        str.lower,
        lambda secret: quote(f"?key={secret}&x"),
        json.dumps,
        lambda secret: base64.b64encode(secret.encode()).decode(),
        lambda secret: base64.urlsafe_b64encode(f"x{secret}y".encode()).decode(),
        lambda secret: base64.urlsafe_b64encode(f"xy{secret}z".encode()).decode(),
    ],
)
async def test_a_leaked_secret_is_found(secret: str, disguise: object) -> None:
    """In any of these forms, in the middle of other text."""
    assert callable(disguise)
    assert leaks(f"before {disguise(secret)} after") == {name for name, s in CANARIES.items() if s == secret}


async def test_a_leak_is_found_in_every_place(tmp_path: Path) -> None:
    """A log record, a span, a document and an answer that do show a secret are seen by the same scanner."""
    secret = SECRETS["FINNHUB_KEY"]
    found = Evidence()

    try:
        raise ValueError(secret)
    except ValueError as e:
        raw = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), (type(e), e, e.__traceback__))
    Recorder(found.logs).emit(raw)

    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("x").start_as_current_span("x", attributes={"url.full": f"http://x/?token={secret}"}):
        pass
    found.spans = [shown(span) for span in exporter.get_finished_spans()]

    documents = SQLiteDocuments(tmp_path / "x.db", SystemClock())
    leaking = Document(id="x", partition="x", sort=sort_key(NOW, "x"), body={"text": secret})
    await documents.create("deadletters", leaking)
    await documents.close()
    found.documents = content_of(tmp_path / "x.db")

    found.answers = [Answer(500, {}, f"refused: {secret}").text]
    found.exceptions = [repr(RuntimeError(secret))]
    for place in ("logs", "spans", "documents", "answers", "exceptions"):
        assert set(found.leaks(place)) == {"FINNHUB_KEY"}, place


async def test_an_innocent_text_is_not_accused() -> None:
    """Half a secret, a redacted one and a token signed with one are no leaks."""
    halves = " ".join(secret[: len(secret) // 2] for secret in CANARIES.values())
    assert leaks(f"{halves} *** apikey=***") == set()
    assert Ingest.__doc__ is not None
    assert leaks(Ingest.__doc__) == set()
