"""One span an invocation, as the Functions host opens it, and the traceparent a function gets.

OpenTelemetry is never imported here first: while neither the app nor the worker library has loaded
it, nobody records spans, and the start stays short. A traceparent is passed on anyway.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span as RecordedSpan
    from opentelemetry.trace import Tracer

Kind = Literal["SERVER", "CONSUMER", "INTERNAL"]
_LENGTH = 55


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What led to an invocation: a parent to continue, or a trace to link."""

    kind: Kind = "INTERNAL"
    traceparent: str = ""
    tracestate: str = ""
    link: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """An open span; its function sees `traceparent` as the parent."""

    traceparent: str
    tracestate: str
    recorded: "RecordedSpan | None" = None

    def end(self, error: str | None, attributes: Mapping[str, int]) -> None:
        """Close it, with the reason if the invocation failed."""
        if self.recorded is None:
            return
        if attributes:
            self.recorded.set_attributes(attributes)
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self.recorded.set_status(Status(StatusCode.ERROR, error))
        self.recorded.end()


class Tracing:
    """Opens spans with whatever tracer provider the app has set."""

    def __init__(self) -> None:
        self._provider: Any = None
        self._tracer: Tracer | None = None

    def open(self, name: str, cause: Cause, attributes: Mapping[str, str | int]) -> Span:
        """Open the span of one invocation.

        It is not made current: in Azure the host is another process, and a trace that only
        joins here must not be taken for working code.
        """
        tracer = self._find_tracer()
        if tracer is None:
            return Span(_continued(cause.traceparent), cause.tracestate)
        from opentelemetry.trace import Link, SpanKind, get_current_span

        linked = get_current_span(_context(cause.link)).get_span_context()
        span = tracer.start_span(
            name,
            context=_context(cause.traceparent, cause.tracestate),
            kind=SpanKind[cause.kind],
            attributes=attributes,
            links=[Link(linked)] if linked.is_valid else None,
        )
        own = span.get_span_context()
        traceparent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"
        return Span(traceparent, own.trace_state.to_header(), span)

    def _find_tracer(self) -> "Tracer | None":
        trace = sys.modules.get("opentelemetry.trace")
        if trace is None:
            return None
        provider = trace.get_tracer_provider()
        if provider is not self._provider:
            idle = isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)
            self._tracer = None if idle else provider.get_tracer("infra.local.host")
            self._provider = provider
        return self._tracer


def _context(traceparent: str, tracestate: str = "") -> "Context":
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": traceparent, "tracestate": tracestate}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _continued(traceparent: str) -> str:
    if len(traceparent) == _LENGTH and traceparent.startswith("00-"):
        return f"{traceparent[:36]}{token_hex(8)}{traceparent[52:]}"
    return f"00-{token_hex(16)}-{token_hex(8)}-01"
