"""
Logs, spans, and the guard that keeps secrets out of both.

Logs are a name in the past tense and fields: ``log.info("bars.stored", symbol="AAPL")``. A span knows which
failures are news: trouble that passes is an attribute, the rest is an error. Without a connection string
nothing is exported.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shared.errors import TransientError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_PATTERNS = (
    (re.compile(r"(?i)\b(apikey|api_key|token|access_token|code|sig|key|secret|password)=([^&\s\"']+)"), r"\1=***"),
    (re.compile(r"(?i)\b(bearer|apikey)\s+[A-Za-z0-9._~+/\-]{8,}=*"), r"\1 ***"),
    (re.compile(r"(/webhooks/\d+)/[A-Za-z0-9_\-]+"), r"\1/***"),
    (re.compile(r"(?i)(detected your API key as)\s+\S+"), r"\1 ***"),
    (re.compile(r"(?i)\b(AccessKey|InstrumentationKey)=([^;\s]+)"), r"\1=***"),
)
_secrets: set[str] = set()
_guard: dict[str, re.Pattern[str] | None] = {"known": None}

SHORTEST_SECRET = 4
"""What is shorter would be found in ordinary words."""

HEADERS = ("traceparent", "tracestate")


def guard(secrets: Iterable[str]) -> None:
    """Never show any of *secrets* from now on, wherever it appears, in capitals or not."""
    _secrets.update(s for s in secrets if len(s) >= SHORTEST_SECRET)
    longest_first = sorted(_secrets, key=len, reverse=True)
    _guard["known"] = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE) if longest_first else None


def redact(text: str) -> str:
    """The text without known secrets and without anything that looks like one."""
    if known := _guard["known"]:
        text = known.sub("***", text)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def _safe(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    # What senders put into an event may be no text (half a surrogate pair): no handler could write it.
    return redact(str(value)).encode(errors="backslashreplace").decode()


class Log:
    """A logger of names and fields."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: object) -> None:
        self._write(logging.ERROR, event, fields, exc_info=True)

    def _write(self, level: int, event: str, fields: Mapping[str, object], *, exc_info: bool = False) -> None:
        if not self._logger.isEnabledFor(level):
            return
        shown = {name: _safe(value) for name, value in fields.items()}
        text = " ".join([event, *(f"{name}={value}" for name, value in shown.items())])
        extra = {f"troop.{name}": value for name, value in shown.items()}
        self._logger.log(level, "%s", text, exc_info=exc_info, extra=extra, stacklevel=3)


def get_logger(name: str) -> Log:
    """The logger of a module."""
    return Log(name)


def configure(*, connection_string: str, level: str, secrets: Iterable[str]) -> None:
    """
    Set up logging, redaction and, when there is a connection string, the Azure Monitor exporter.

    Called once a process, before anything else is built.
    """
    guard([*secrets, connection_string])
    _redact_every_record()
    for ours in ("shared", "signals", "alerts", "content"):
        logging.getLogger(ours).setLevel(level)
    # These log every request, the exporter's own included: at INFO the export would feed itself for ever.
    for chatty in ("azure", "httpx", "httpcore", "opentelemetry"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if connection_string:
        from azure.monitor.opentelemetry import configure_azure_monitor

        configure_azure_monitor(
            connection_string=connection_string,
            enable_live_metrics=False,
            span_processors=[redacting_processor()],  # before the exporter's own
        )


def redacting_processor() -> "SpanProcessor":
    """
    A span processor that takes secrets out of every span, those of libraries too, before an exporter sees it.

    OpenTelemetry's spans are read-only when they have ended, so it replaces what they hold.
    """
    from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
    from opentelemetry.trace import Status

    class Redactor(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            span._name = redact(span.name)  # noqa: SLF001
            span._attributes = _clean(span.attributes)  # noqa: SLF001
            span._events = [Event(e.name, _clean(e.attributes), e.timestamp) for e in span.events]  # noqa: SLF001
            if span.status.description:
                span._status = Status(span.status.status_code, redact(span.status.description))  # noqa: SLF001

    return Redactor()


def _clean(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: redact(value) if isinstance(value, str) else value for name, value in (attributes or {}).items()}


def _redact_every_record() -> None:
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:  # noqa: ANN401 - as logging calls it
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001 - a library's wrong log call must stay its own trouble
            text = f"{record.msg} {record.args!r}"
            record.msg, record.args = text, None
        safe = redact(text)
        if safe != text:
            record.msg, record.args = safe, None
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            if (safe := redact(trace)) != trace:
                # Exporters would read the exception itself: what carries a secret leaves as text only.
                record.exc_info, record.exc_text = None, safe
        return record

    factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(factory)


@contextmanager
def span(name: str, *, parent: Mapping[str, str] | None = None, **attributes: object) -> Iterator[None]:
    """
    Time a piece of work under *name*.

    With *parent* (the traceparent and tracestate a CloudEvent carried) it continues that trace.
    """
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract(_headers(parent)) if parent else None
    kind = trace.SpanKind.CONSUMER if parent is not None else trace.SpanKind.INTERNAL
    shown: dict[str, Any] = {f"troop.{key}": _safe(value) for key, value in attributes.items() if value is not None}
    with trace.get_tracer("troop").start_as_current_span(
        name, context=context, kind=kind, attributes=shown, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield
        except TransientError as e:
            current.set_attribute("troop.transient", type(e).__name__)
            raise
        except Exception as e:
            current.set_status(trace.Status(trace.StatusCode.ERROR, redact(f"{type(e).__name__}: {e}")))
            raise


def trace_headers() -> dict[str, str]:
    """What to put on an outgoing CloudEvent so that its reader can continue this trace."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier


def _headers(parent: Mapping[str, str]) -> dict[str, str]:
    return {name: str(parent[name]) for name in HEADERS if parent.get(name)}
