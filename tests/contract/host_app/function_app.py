"""A small app with one function for every shape the host must get right."""

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import azure.functions as func

app = func.FunctionApp(http_auth_level=func.AuthLevel.FUNCTION)
FREE = func.AuthLevel.ANONYMOUS


def note(kind: str, **fields: object) -> None:
    """Append one line to the file the test reads."""
    with Path(os.environ["NOTES"]).open("a") as notes:
        notes.write(json.dumps({"kind": kind, "pid": os.getpid(), **fields}) + "\n")


def record_spans() -> None:
    """Note every span that ends, the host's and the app's own."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class Notes(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            for span in spans:
                note(
                    "span",
                    name=span.name,
                    span_kind=span.kind.name,
                    trace=f"{span.context.trace_id:032x}",
                    span=f"{span.context.span_id:016x}",
                    parent=f"{span.parent.span_id:016x}" if span.parent else None,
                    links=[f"{link.context.trace_id:032x}" for link in span.links],
                    status=span.attributes.get("http.response.status_code"),
                    is_error=span.status.status_code is trace.StatusCode.ERROR,
                )
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Notes()))
    trace.set_tracer_provider(provider)


if "RECORD_SPANS" in os.environ:
    record_spans()


@contextmanager
def work(name: str) -> Iterator[None]:
    """A span of the app's own."""
    from opentelemetry import trace

    with trace.get_tracer("app").start_as_current_span(name):
        yield


def answer(value: object, status: int = 200) -> func.HttpResponse:
    return func.HttpResponse(json.dumps(value), status_code=status, mimetype="application/json")


@app.route(route="echo/{a}/{n:int?}", methods=["GET", "POST"], auth_level=FREE)
async def echo(req: func.HttpRequest, context: func.Context) -> func.HttpResponse:
    response = answer(
        {
            "method": req.method,
            "url": req.url,
            "params": dict(req.route_params),
            "query": dict(req.params),
            "body": req.get_body().decode(),
            "header": req.headers.get("X-Custom"),
            "function": context.function_name,
            "traceparent": context.trace_context.trace_parent,
        },
        status=201,
    )
    response.headers["X-Answer"] = "yes"
    response.headers.add("Set-Cookie", "a=1; Path=/; HttpOnly")
    response.headers.add("Set-Cookie", "b=2")
    return response


@app.route(route="files/{*rest}", methods=["GET"], auth_level=FREE)
def files(req: func.HttpRequest) -> str:
    return req.route_params.get("rest", "nothing")


@app.route(route="files/known", methods=["GET"], auth_level=FREE)
def known(req: func.HttpRequest) -> str:
    return "the literal route"


@app.route(route="locked", methods=["GET"])
async def locked(req: func.HttpRequest) -> str:
    return "open"


@app.route(route="admins", methods=["GET"], auth_level=func.AuthLevel.ADMIN)
async def admins(req: func.HttpRequest) -> str:
    return "open"


@app.route(route="traced", auth_level=FREE)
async def traced(req: func.HttpRequest) -> str:
    with work("inside traced"):
        return "done"


@app.route(route="traced-sync", auth_level=FREE)
def traced_sync(req: func.HttpRequest) -> str:
    with work("inside traced_sync"):
        return "done"


@app.route(route="fails", auth_level=FREE)
async def fails(req: func.HttpRequest) -> str:
    raise LookupError("no such luck")


@app.route(route="exits", auth_level=FREE)
async def exits(req: func.HttpRequest) -> str:
    raise SystemExit(3)


@app.route(route="hangs", auth_level=FREE)
async def hangs(req: func.HttpRequest) -> str:
    await asyncio.sleep(60)
    return "never"


@app.route(route="slow", auth_level=FREE)
async def slow(req: func.HttpRequest) -> str:
    note("slow.started")
    await asyncio.sleep(0.4)
    return "done"


@app.timer_trigger(arg_name="timer", schedule="%TICK_SCHEDULE%", use_monitor=False)
async def tick(timer: func.TimerRequest) -> None:
    note("tick", past_due=timer.past_due, status=timer.schedule_status)


@app.timer_trigger(arg_name="timer", schedule="0 0 3 1 1 *")
@app.retry(strategy="fixed_delay", max_retry_count="2", delay_interval="00:00:00")
def yearly(timer: func.TimerRequest, context: func.Context) -> None:
    retry = context.retry_context
    reason = retry.rpc_exception.message if retry.rpc_exception else None
    note("yearly", past_due=timer.past_due, count=retry.retry_count, most=retry.max_retry_count, reason=reason)
    raise RuntimeError("not this year")


@app.event_grid_trigger(arg_name="event")
async def on_event(event: func.CloudEvent) -> None:
    if event.get_json() == "bad":
        raise ValueError("spoilt event")
    note(
        "event",
        type=event.type,
        subject=event.subject,
        data=event.get_json(),
        time=event.time.isoformat() if event.time else None,
        extensions=event.extension_attrs,
    )


@app.event_grid_trigger(arg_name="event")
def on_text(event: str) -> None:
    note("text", raw=json.loads(event))
