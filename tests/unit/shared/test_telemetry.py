import io
import logging
from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared import telemetry
from shared.errors import ConfigurationError, RefusedError, UnavailableError
from shared.telemetry import get_logger, guard, redact, span, trace_headers

CANARY = "CANARY7KEY9QX"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Whatever a test configures, the next one does not see."""
    monkeypatch.setattr(telemetry, "_secrets", set())
    monkeypatch.setattr(telemetry, "_guard", {"known": None})
    names = ("shared", "signals", "alerts", "content", "azure", "httpx", "httpcore", "opentelemetry")
    levels = {name: logging.getLogger(name).level for name in names}
    make = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(make)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def written():
    """What a log file would hold, and the records as an exporter would see them."""
    stream, records = io.StringIO(), []
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    handler.addFilter(lambda record: records.append(record) or True)
    logging.getLogger().addHandler(handler)
    yield SimpleNamespace(text=stream.getvalue, records=records)
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


def configure(level="INFO", secrets=(CANARY,)):
    telemetry.configure(connection_string="", level=level, secrets=secrets)


class TestRedact:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (f"GET /query?function=X&apikey={CANARY}&symbol=IBM", "GET /query?function=X&apikey=***&symbol=IBM"),
            (f"wss://ws.test?token={CANARY}", "wss://ws.test?token=***"),
            (f"/api/watchlist/IBM?code={CANARY}==&x=1", "/api/watchlist/IBM?code=***&x=1"),
            (f"?ACCESS_TOKEN={CANARY}", "?ACCESS_TOKEN=***"),
            (f"?sig={CANARY}%3D&se=2026", "?sig=***&se=2026"),
            (f"password={CANARY} user=me", "password=*** user=me"),
            (f"POST https://d.test/api/webhooks/123/{CANARY}_-a?wait=true", "POST https://d.test/api/webhooks/123/***?wait=true"),
            (f"Authorization: Bearer {CANARY}.eyJ.x-_/+=", "Authorization: Bearer ***"),
            (f"Endpoint=https://s.test;AccessKey={CANARY}=;Version=1.0;", "Endpoint=https://s.test;AccessKey=***;Version=1.0;"),
            (f"InstrumentationKey={CANARY};IngestionEndpoint=https://i.test/", "InstrumentationKey=***;IngestionEndpoint=https://i.test/"),
            (
                f"We have detected your API key as {CANARY} and our standard API rate limit is 25 requests per day.",
                "We have detected your API key as *** and our standard API rate limit is 25 requests per day.",
            ),
        ],
    )  # fmt: skip
    def test_what_looks_like_a_secret_is_taken_out(self, text, shown):
        """A key nobody told us about is recognised by where it stands; the rest of the line stays readable."""
        assert redact(text) == shown

    @pytest.mark.parametrize(
        "text",
        [
            "bars.stored series=AAPL|1d count=64 through=2013-01-02T21:00:00Z",
            "the token of this page is short",
            "monkey=banana zipcode=12345",
            "bearer of news",
        ],
    )
    def test_plain_text_stays_as_it_is(self, text):
        """A log that hides everything tells nothing."""
        assert redact(text) == text

    def test_guarded_secret_is_hidden_wherever_it_stands(self):
        """A secret we know is hidden whole, the longer before the shorter it contains."""
        guard([CANARY, f"{CANARY}-and-more"])

        assert redact(f"<{CANARY}-and-more><{CANARY}>x{CANARY}x") == "<***><***>x***x"

    @pytest.mark.parametrize("shown", [CANARY.lower(), CANARY.title(), CANARY.swapcase()])
    def test_guarded_secret_is_hidden_in_other_capitals_too(self, shown):
        """Who repeats a key does not always repeat its capitals."""
        guard([CANARY])

        assert redact(f"the key {shown} is wrong") == "the key *** is wrong"

    def test_guarded_secret_is_taken_literally(self):
        """A secret is text, whatever its characters mean elsewhere."""
        guard(["a.c+(d", "[x]*$"])

        assert redact("a.c+(d abcc(d [x]*$ xxx") == "*** abcc(d *** xxx"

    def test_guard_remembers_and_ignores_what_is_no_secret(self):
        """Guarding more keeps what was guarded; an unset or tiny value would only blacken the log."""
        guard([CANARY])
        guard(["", "abc", "SECOND-SECRET"])

        assert redact(f"{CANARY} SECOND-SECRET abc") == "*** *** abc"


class TestRecords:
    def test_secret_in_a_message_or_its_arguments_is_not_written(self, written):
        """Whoever logs, a library too, through any logger: the record itself is clean."""
        configure()
        logger = logging.getLogger("some.library")

        logger.warning("calling https://x.test?apikey=%s now", "NEVER-TOLD-7")
        logger.warning("key is %(key)s", {"key": CANARY})
        logger.error(f"key is {CANARY}")  # noqa: G004 - libraries do

        assert written.text().splitlines() == [
            "WARNING some.library calling https://x.test?apikey=*** now",
            "WARNING some.library key is ***",
            "ERROR some.library key is ***",
        ]
        assert CANARY not in "".join(repr(vars(record)) for record in written.records)

    def test_secret_in_an_exception_is_not_written(self, written):
        """A traceback is kept as text, and the exception that carries the secret goes no further."""
        configure()

        try:
            raise ValueError(f"wrong key {CANARY}")
        except ValueError:
            logging.getLogger("some.library").exception("call.failed")
            get_logger("shared.test").exception("call.failed", key=CANARY)

        assert CANARY not in written.text()
        assert written.text().count("ValueError: wrong key ***") == 2
        assert all(record.exc_info is None for record in written.records)

    def test_harmless_exception_keeps_its_traceback(self, written):
        """Where there is nothing to hide, an exporter sees the exception itself."""
        configure()

        try:
            raise ValueError("no secret")
        except ValueError:
            get_logger("shared.test").exception("call.failed")

        assert written.records[0].exc_info[0] is ValueError
        assert "ValueError: no secret" in written.text()

    def test_fields_are_clean_and_named(self, written):
        """A field can be searched for under its own name; numbers stay numbers; secrets are taken out."""
        configure()

        get_logger("shared.test").info("bars.stored", count=3, url=f"https://x?apikey={CANARY}", on=True, none=None)

        [record] = written.records
        assert written.text() == "INFO shared.test bars.stored count=3 url=https://x?apikey=*** on=True none=None\n"
        fields = {name: value for name, value in vars(record).items() if name.startswith("troop.")}
        assert fields == {"troop.count": 3, "troop.url": "https://x?apikey=***", "troop.on": True, "troop.none": None}
        assert CANARY not in repr(vars(record))

    def test_record_names_the_line_that_logged(self, written):
        """A reader finds the place that spoke, not the logger's own lines."""
        configure()

        get_logger("shared.test").info("bars.stored")

        assert written.records[0].funcName == "test_record_names_the_line_that_logged"

    def test_percent_sign_in_a_field_is_text(self, written):
        """What users typed is never taken for a format."""
        configure()

        get_logger("shared.test").info("post.written", title="100%s %d")

        assert written.text() == "INFO shared.test post.written title=100%s %d\n"

    def test_field_that_is_no_text_can_be_written(self, written):
        """Half a surrogate pair in what somebody sent stops no handler and no exporter."""
        configure()

        get_logger("shared.test").info("event.buried", event_id="a\ud800b")

        assert written.text() == "INFO shared.test event.buried event_id=a\\ud800b\n"

    def test_wrong_log_call_of_a_library_does_no_harm(self, written):
        """A library that counts its arguments wrong does not bring the app down, and still leaks nothing."""
        configure()

        logging.getLogger("some.library").warning("two %s %s", *[CANARY])

        assert "two %s %s" in written.text()
        assert CANARY not in written.text()

    def test_configuring_twice_is_configuring_once(self, written):
        """A second call adds secrets and nothing else."""
        configure(secrets=[CANARY])
        factory = logging.getLogRecordFactory()
        configure(secrets=["SECOND-SECRET"])

        logging.getLogger("some.library").warning("%s %s", CANARY, "SECOND-SECRET")

        assert logging.getLogRecordFactory() is factory
        assert written.text() == "WARNING some.library *** ***\n"


class TestLevels:
    @pytest.mark.parametrize(
        ("level", "seen"),
        [("DEBUG", "diwe"), ("INFO", "iwe"), ("WARNING", "we"), ("ERROR", "e")],
    )
    def test_setting_decides_what_our_rooms_say(self, written, level, seen):
        """LOG_LEVEL rules every domain of ours."""
        configure(level=level)

        for room in ("shared.market", "signals", "alerts.adapters.discord", "content"):
            log = get_logger(room)
            for name, say in (("d", log.debug), ("i", log.info), ("w", log.warning), ("e", log.error)):
                say(name)

        assert [record.getMessage() for record in written.records] == list(seen) * 4

    @pytest.mark.parametrize("chatty", ["azure.core.pipeline", "httpx", "httpcore.http11", "opentelemetry.sdk"])
    def test_libraries_that_log_every_request_are_quiet(self, written, chatty):
        """The exporter's own requests must not become records that it exports."""
        configure(level="DEBUG")

        logging.getLogger(chatty).info("HTTP Request: GET …")
        logging.getLogger(chatty).warning("trouble")

        assert [record.getMessage() for record in written.records] == ["trouble"]


class TestSpan:
    def test_work_that_succeeds_is_a_span_without_status(self, spans):
        """A span carries its name and the attributes that are known, cleaned."""
        guard([CANARY])

        with span("series.ingest", symbol="AAPL", count=2, reason=CANARY, unknown=None):
            pass

        [done] = spans()
        assert done.name == "series.ingest"
        assert dict(done.attributes) == {"troop.symbol": "AAPL", "troop.count": 2, "troop.reason": "***"}
        assert done.status.is_unset

    def test_trouble_that_passes_is_an_attribute(self, spans):
        """An expected retry is no error: nobody is paged for it."""
        with pytest.raises(UnavailableError), span("provider.call"):
            raise UnavailableError("503")

        [done] = spans()
        assert done.status.is_unset
        assert done.attributes["troop.transient"] == "UnavailableError"

    @pytest.mark.parametrize(
        "error",
        [RefusedError(f"apikey={CANARY}"), ConfigurationError(f"apikey={CANARY}"), ValueError(f"apikey={CANARY}")],
        ids=lambda e: type(e).__name__,
    )
    def test_other_trouble_is_an_error_without_secrets(self, spans, error):
        """What will not pass is news; the exception itself, which may hold the request, is not recorded."""
        with pytest.raises(type(error)), span("provider.call"):
            raise error

        [done] = spans()
        assert done.status.status_code is trace.StatusCode.ERROR
        assert done.status.description == f"{type(error).__name__}: apikey=***"
        assert done.events == ()

    def test_trace_goes_on_where_the_event_was_published(self, spans):
        """What one function puts on an event, the next continues: one trace from call to delivery."""
        with span("signals_ingest"):
            headers = trace_headers()
        with span("signals_on_bars_ingested", parent={**headers, "somethingelse": "x"}):
            pass

        first, second = spans()
        assert second.context.trace_id == first.context.trace_id
        assert second.parent.span_id == first.context.span_id
        assert second.kind is trace.SpanKind.CONSUMER

    @pytest.mark.parametrize("parent", [{}, {"traceparent": "nonsense"}, {"traceparent": 7}])
    def test_event_without_a_trace_begins_one(self, spans, parent):
        """An event from elsewhere is no trouble."""
        with span("alerts_on_signal_raised", parent=parent):
            pass

        [done] = spans()
        assert done.parent is None

    def test_outside_a_span_there_is_no_trace_to_carry(self):
        """Nothing is put on an event that belongs to no trace."""
        assert trace_headers() == {}
