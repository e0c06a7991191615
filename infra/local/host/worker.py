"""Microsoft's worker library, driven without sockets: index an app, invoke its functions.

The library keeps the app in process globals, so there is one worker a process.
The calls go through `native_invocation`, the door the library opens to hosts that speak no
protobuf; tests/contract/test_function_host.py notices if an upgrade moves it.
"""

import asyncio
import contextvars
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.cookies import SimpleCookie
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Self
from uuid import uuid4

import azure_functions_runtime as library
from azure_functions_runtime import handle_event, otel
from azure_functions_runtime.bindings.datumdef import Datum
from azure_functions_runtime.native_invocation import invocation_request_native
from azure_functions_runtime.utils import threadpool

from infra.local.host import protos_shim
from infra.local.host.errors import StartError
from infra.local.host.spans import Cause, Span, Tracing

log = logging.getLogger(__name__)

# What the library appends to an import error: a link and the whole of sys.path.
_NOISE = ". Cannot find module. Please check the requirements.txt"
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_INTERNAL = Cause()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why the attempt before failed, as a function finds it in its retry context."""

    message: str
    stack_trace: str
    source: str = "local host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Which attempt an invocation is; the first is 0."""

    count: int = 0
    most: int = 0
    failure: Failure | None = None


_FIRST = Attempt()


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a failed timer is invoked again, and how long after."""

    strategy: str
    most: int
    delay: timedelta
    longest: timedelta

    def wait(self, attempt: int) -> timedelta:
        """The wait after the given failed attempt; the first is 0."""
        if self.strategy == "fixed_delay":
            return self.delay
        # Bounded only to keep the number finite.
        return min(self.longest, self.delay * (1 << min(attempt, 20)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """An indexed function, as its raw bindings describe it."""

    name: str
    function_id: str
    is_async: bool
    trigger: Mapping[str, Any]
    bindings: tuple[Mapping[str, Any], ...]
    retry: RetryPolicy | None

    @property
    def trigger_type(self) -> str:
        """`httpTrigger`, `timerTrigger`, `eventGridTrigger` …"""
        return str(self.trigger["type"])

    @property
    def parameter(self) -> str:
        """The name of the argument the trigger fills."""
        return str(self.trigger["name"])


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an invocation ended; `error` is None when it succeeded."""

    returned: Any
    outputs: Sequence[tuple[str, Any]]
    error: str | None
    traceback: str


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What an HTTP function answered, in plain values."""

    status: int
    headers: Mapping[str, str]
    cookies: Sequence[str]
    body: bytes


class ContextThreads(ThreadPoolExecutor):
    """Threads that run each call in a copy of the caller's context, so a trace reaches sync code."""

    def __init__(self, max_workers: int | None) -> None:
        super().__init__(max_workers, thread_name_prefix="function")
        self.busy = 0
        self._guard = threading.Lock()

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue the call."""
        context = contextvars.copy_context()
        future = super().submit(lambda: context.run(fn, *args, **kwargs))
        with self._guard:
            self.busy += 1
        future.add_done_callback(self._finished)
        return future

    def _finished(self, future: Future[Any]) -> None:
        with self._guard:
            self.busy -= 1


class Worker:
    """An indexed app whose functions can be invoked."""

    def __init__(self, functions: Mapping[str, Function], threads: ContextThreads, limit: timedelta | None) -> None:
        self.functions = functions
        self.running = 0
        self._threads = threads
        self._limit = limit
        self._tracing = Tracing()

    @classmethod
    async def start(cls, app_dir: str | Path, *, limit: timedelta | None = timedelta(minutes=5)) -> Self:
        """Import and index function_app.py in the folder.

        Raises:
            StartError: there is no app in the folder, or it cannot be indexed.
        """
        folder = _make_importable(Path(app_dir))
        library.start_threadpool_executor()
        threads = _replace_threads()
        found = await _index(folder)
        return cls({f.name: f for f in found}, threads, limit)

    @property
    def is_busy(self) -> bool:
        """Whether an invocation is still running, or a thread of one that timed out."""
        return self.running > 0 or self._threads.busy > 0

    @property
    def has_stuck_threads(self) -> bool:
        """Whether a sync function is still running; nothing can stop it."""
        return self._threads.busy > 0

    async def invoke_http(
        self,
        name: str,
        *,
        method: str = "GET",
        url: str = "http://127.0.0.1/",
        headers: Mapping[str, str] = _NOTHING,
        query: Mapping[str, str] = _NOTHING,
        params: Mapping[str, str] = _NOTHING,
        body: bytes = b"",
        route: str = "",
        cause: Cause = _INTERNAL,
    ) -> HttpAnswer:
        """Invoke an HTTP function; a failed one answers 500 with the exception's text."""
        function = self.functions[name]
        request = Datum(
            {
                "method": Datum(method, "string"),
                "url": Datum(url, "string"),
                "headers": _strings(headers),
                "query": _strings(query),
                "params": _strings(params),
                "body": Datum(body, "bytes"),
            },
            "http",
        )
        outcome = await self.invoke(
            function,
            request,
            cause=cause,
            # Without the query: it may carry a key.
            attributes={
                "http.request.method": method,
                "http.route": route,
                "url.full": url.partition("?")[0],
            },
        )
        return _http_answer(function, outcome)

    async def invoke_event_grid(self, name: str, event_json: str, *, cause: Cause | None = None) -> Outcome:
        """Invoke an Event Grid function with one event."""
        event = Datum(event_json, "json")
        return await self.invoke(
            self.functions[name],
            event,
            metadata={"data": event},
            cause=cause or Cause(kind="CONSUMER"),
        )

    async def invoke_timer(self, name: str, timer_json: str, *, attempt: Attempt = _FIRST) -> Outcome:
        """Invoke a timer function with its schedule information."""
        return await self.invoke(self.functions[name], Datum(timer_json, "json"), attempt=attempt)

    async def invoke_text(self, name: str, text: str) -> Outcome:
        """Invoke a function of any other trigger with a message text."""
        kind = "json" if self.functions[name].trigger_type == "cosmosDBTrigger" else "string"
        return await self.invoke(self.functions[name], Datum(text, kind), cause=Cause(kind="CONSUMER"))

    async def invoke(
        self,
        function: Function,
        trigger: object,
        *,
        metadata: Mapping[str, object] = _NOTHING,
        cause: Cause = _INTERNAL,
        attributes: Mapping[str, str | int] = _NOTHING,
        attempt: Attempt = _FIRST,
    ) -> Outcome:
        """Invoke a function in a task of its own; never raises for what the function does.

        The library attaches a trace context and never detaches it: hence the task.
        """
        invocation_id = str(uuid4())
        span = self._tracing.open(
            function.name,
            cause,
            {"faas.name": function.name, "faas.invocation_id": invocation_id, **attributes},
        )
        self.running += 1
        error: str | None = "cancelled"
        answered: Mapping[str, int] = _NOTHING
        try:
            call = self._call(function, invocation_id, trigger, metadata, span, attempt)
            outcome = await asyncio.Task(call, loop=asyncio.get_running_loop(), eager_start=True)
            error = outcome.error
            if span.recorded is not None and function.trigger_type == "httpTrigger":
                answered = {"http.response.status_code": _http_answer(function, outcome).status}
            return outcome
        finally:
            self.running -= 1
            span.end(error, answered)

    async def _call(
        self,
        function: Function,
        invocation_id: str,
        trigger: object,
        metadata: Mapping[str, object],
        span: Span,
        attempt: Attempt,
    ) -> Outcome:
        if not function.is_async:
            _attach(span)
        limit = self._limit.total_seconds() if self._limit else None
        try:
            async with asyncio.timeout(limit):
                _, returned, outputs, error, trace = await invocation_request_native(
                    invocation_id,
                    function.function_id,
                    [(function.parameter, trigger)],
                    metadata,
                    span.traceparent,
                    span.tracestate,
                    attempt.count,
                    attempt.most,
                    attempt.failure,
                )
        except TimeoutError:
            text = f"Timeout value of {self._limit} exceeded by function {function.name}"
            log.exception("invocation.timed_out", extra={"reason": text})
            return Outcome(None, (), text, "")
        except SystemExit as e:
            return Outcome(None, (), f"function {function.name} ended with {e!r}", "")
        return Outcome(returned, outputs, error, trace or "")


def _make_importable(app_dir: Path) -> Path:
    folder = app_dir.resolve()
    script = os.environ.get("PYTHON_SCRIPT_FILE_NAME", "function_app.py")
    if not (folder / script).is_file():
        raise StartError(f"no {script} in {folder}: name the app's folder with --app")
    # The library imports the module by its name and leaves the path to the host.
    if sys.path[0] != str(folder):
        sys.path.insert(0, str(folder))
    return folder


def _replace_threads() -> ContextThreads:
    # The library has no setter, and its own pool would lose the caller's context.
    threads = ContextThreads(threadpool._get_max_workers())  # noqa: SLF001
    threadpool._threadpool_executor.shutdown(wait=False)  # noqa: SLF001
    threadpool._threadpool_executor = threads  # noqa: SLF001
    return threads


async def _index(folder: Path) -> list[Function]:
    request = SimpleNamespace(
        request=SimpleNamespace(
            worker_init_request=SimpleNamespace(capabilities={}, function_app_directory=str(folder))
        ),
        properties={"host": "127.0.0.1", "protos": protos_shim},
    )
    try:
        with _quiet_library():
            started = await library.worker_init_request(request)
    except SystemExit as e:
        raise StartError(f"the app in {folder} ended the process while it was imported: {e}") from e
    if started.result.status != protos_shim.StatusResult.Success:
        failure = started.result.exception
        reason = " ".join(failure.message.partition(_NOISE)[0].split())
        raise StartError(f"the app in {folder} cannot be indexed: {reason}", details=failure.stack_trace)
    indexed = await library.functions_metadata_request(None)
    return [_function(metadata) for metadata in indexed.function_metadata_results or ()]


def _function(metadata: SimpleNamespace) -> Function:
    bindings = tuple(json.loads(raw) for raw in metadata.raw_bindings)
    info = handle_event._functions.get_function(metadata.function_id)  # noqa: SLF001
    return Function(
        name=metadata.name,
        function_id=metadata.function_id,
        is_async=info.is_async,
        trigger=next(b for b in bindings if b["direction"] == "IN" and b["type"].endswith("Trigger")),
        bindings=bindings,
        retry=_retry_policy(metadata.retry_options),
    )


def _retry_policy(options: SimpleNamespace | None) -> RetryPolicy | None:
    if options is None:
        return None
    if options.retry_strategy == "fixed_delay":
        delay = longest = options.delay_interval
    else:
        delay, longest = options.minimum_interval, options.maximum_interval
    return RetryPolicy(strategy=options.retry_strategy, most=options.max_retry_count, delay=delay, longest=longest)


def _attach(span: Span) -> None:
    # Release 1.3.0 does it for async functions only; the threads carry it on from here.
    manager = otel.otel_manager
    if manager.get_azure_monitor_available() or manager.get_otel_libs_available():
        otel.configure_opentelemetry(
            SimpleNamespace(trace_context=SimpleNamespace(trace_parent=span.traceparent, trace_state=span.tracestate))
        )


def _strings(values: Mapping[str, str]) -> dict[str, Any]:
    return {name: Datum(value, "string") for name, value in values.items()}


def _http_answer(function: Function, outcome: Outcome) -> HttpAnswer:
    text = {"content-type": "text/plain; charset=utf-8"}
    if outcome.error is not None:
        return HttpAnswer(500, text, (), failure_text(function.name, outcome.error).encode())
    answer = outcome.returned
    if answer is None or answer.type is None:
        return HttpAnswer(204, {}, (), b"")
    if answer.type != "http":
        return HttpAnswer(200, text, (), str(answer.value).encode())
    value = answer.value
    cookies: list[SimpleCookie] = value["cookies"] or []
    return HttpAnswer(
        int(value["status_code"].value),
        {name: header.value for name, header in value["headers"].items()},
        [morsel.OutputString() for cookie in cookies for morsel in cookie.values()],
        value["body"].value,
    )


def failure_text(name: str, error: str) -> str:
    """The words of the Functions host for a failed invocation."""
    return f"Exception while executing function: Functions.{name}\nResult: Failure\n{error}"


@contextmanager
def _quiet_library() -> Iterator[None]:
    # A failure to index is told once, in one sentence, by whoever catches StartError.
    logger = logging.getLogger("azure.functions")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was_disabled
