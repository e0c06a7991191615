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
from typing import Any

from shared.errors import TransientError

_PATTERNS = (
    (re.compile(r"(?i)\b(apikey|api_key|token|access_token|code|sig|key|secret|password)=([^&\s\"']+)"), r"\1=***"),
    (re.compile(r"(?i)\b(bearer|apikey)\s+[A-Za-z0-9._~+/\-]{8,}=*"), r"\1 ***"),
    (re.compile(r"(/webhooks/\d+)/[A-Za-z0-9_\-]+"), r"\1/***"),
    (re.compile(r"(?i)(detected your API key as)\s+\S+"), r"\1 ***"),
    (re.compile(r"(?i)\b(AccessKey|InstrumentationKey)=([^;\s]+)"), r"\1=***"),
)
_secrets: list[str] = []

HEADERS = ("traceparent", "tracestate")


def guard(secrets: Iterable[str]) -> None:
    """Never show any of *secrets* from now on, wherever it appears."""
    known = {s for s in (*_secrets, *secrets) if len(s) >= 4}
    _secrets[:] = sorted(known, key=len, reverse=True)


def redact(text: str) -> str:
    """The text without known secrets and without anything that looks like one."""
    for secret in _secrets:
        if secret in text:
            text = text.replace(secret, "***")
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def _safe(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))


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

        configure_azure_monitor(connection_string=connection_string, enable_live_metrics=False)


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
