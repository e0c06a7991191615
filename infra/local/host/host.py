"""One HTTP server in front of the worker: the app's routes, its webhooks and the admin doors."""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from aiohttp import web
from multidict import CIMultiDict, MultiMapping

from infra.local.host.errors import StartError
from infra.local.host.routes import Found, Router
from infra.local.host.settings import HostFile, Keys, Origins
from infra.local.host.spans import Cause
from infra.local.host.timers import Timer, Timers, read_timers
from infra.local.host.webhook import PATH as EVENT_GRID_PATH
from infra.local.host.webhook import EventGridWebhook
from infra.local.host.worker import Function, HttpAnswer, Worker

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent.parent / "page.html"
_GRACE = 5.0
_FLUSH = 0.5
_BACKLOG = 1024
_LARGEST_BODY = 100 * 1024 * 1024  # the Functions host's own limit
_RESERVED = ("/admin/", "/runtime/")
# These belong to the connection: the server writes them itself.
_CONNECTION_HEADERS = frozenset({"content-length", "transfer-encoding", "connection", "keep-alive"})
_SERVED_BINDINGS = frozenset({("OUT", "http")})
_SERVED_TRIGGERS = frozenset({"httpTrigger", "timerTrigger", "eventGridTrigger"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An HTTP function at its route."""

    function: Function
    route: str
    methods: tuple[str, ...]
    level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line decides."""

    app_dir: Path
    data_dir: Path
    cloud: str = ""
    timers: bool = True


class Host:
    """A running app: `open` indexes it, `serve` answers on a bound socket, `close` ends it."""

    def __init__(self, worker: Worker, options: Options, file: HostFile, env: Mapping[str, str]) -> None:
        self.worker = worker
        self.instance = env.get("WEBSITE_INSTANCE_ID") or f"local-{os.getpid()}"
        self._cloud = options.cloud
        self._keys = Keys.from_env(env)
        self._origins = Origins.from_env(env)
        self._webhook = EventGridWebhook.over(worker)
        self._endpoints = _endpoints(worker, file.route_prefix)
        self._router = _router(self._endpoints)
        self._schedules = read_timers(worker.functions.values(), env)
        self._timers = Timers(worker, self._schedules, options.data_dir)
        self._fires_timers = options.timers
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer_task: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        larger = partial(web.BaseRequest, loop=loop, client_max_size=_LARGEST_BODY)
        self._runner = web.ServerRunner(
            web.Server(self._answer, request_factory=larger, access_log=None),
            shutdown_timeout=_FLUSH,
        )
        self._is_closing = False

    @classmethod
    async def open(cls, options: Options, env: Mapping[str, str]) -> Self:
        """Index the app; nothing listens yet.

        Raises:
            StartError: the app, its host.json or one of its bindings cannot be served.
        """
        file = HostFile.read(options.app_dir)
        worker = await Worker.start(options.app_dir, limit=file.function_timeout)
        for function in worker.functions.values():
            _refuse_unserved(function)
        return cls(worker, options, file, env)

    async def serve(self, listener: socket.socket) -> None:
        """Answer on the socket and start the timers."""
        await self._runner.setup()
        await web.SockSite(self._runner, listener, backlog=_BACKLOG).start()
        if self._fires_timers:
            self._timer_task = self._spawn(self._timers.run())

    async def close(self) -> None:
        """Stop the timers, take no more requests, and give running invocations five seconds."""
        self._is_closing = True
        if self._timer_task is not None:
            self._timer_task.cancel()
        for site in list(self._runner.sites):
            await site.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                while self.worker.is_busy:  # noqa: ASYNC110 - threads count too
                    await asyncio.sleep(0.02)
        await self._runner.cleanup()
        self._timers.release()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        asked = request.headers
        origin = asked.get("Origin")
        if request.method == "OPTIONS" and origin and "Access-Control-Request-Method" in asked:
            response = web.Response(status=204)
        else:
            response = await self._dispatch_safely(request)
        vary = response.headers.get("Vary")
        response.headers["Vary"] = f"{vary}, Origin" if vary else "Origin"
        if origin and self._origins.allow(origin):
            _allow(origin, request, response)
        if self._is_closing:
            response.force_close()
        return response

    async def _dispatch_safely(self, request: web.BaseRequest) -> web.Response:
        try:
            return await self._dispatch(request)
        except web.HTTPRequestEntityTooLarge as e:
            return web.Response(status=413, text=f"the body exceeds {_LARGEST_BODY} bytes: {e}")
        except ConnectionError:
            raise
        except Exception:
            log.exception("request.failed")
            return web.Response(status=500, text="the host itself failed: see its log")

    async def _dispatch(self, request: web.BaseRequest) -> web.Response:
        path = request.rel_url.raw_path
        lowered = path.lower()
        if lowered.startswith(_RESERVED):
            return await self._open_door(request, path, lowered.rstrip("/"))
        found = self._router.find(request.method, path)
        if found is not None:
            return await self._invoke(request, found)
        if path == "/" and request.method in ("GET", "HEAD"):
            return self._page()
        return web.Response(status=404, text=f"no function answers {request.method} {path}")

    async def _invoke(self, request: web.BaseRequest, found: Found[Endpoint]) -> web.Response:
        endpoint = found.target
        if endpoint.level != "ANONYMOUS" and not self._admits(request, endpoint.level):
            return _refusal(endpoint.level)
        headers = _joined(request.headers, lower=True)
        answer = await self.worker.invoke_http(
            endpoint.function.name,
            method=request.method,
            url=f"http://{request.host}{request.raw_path}",
            headers=headers,
            query=_joined(request.query) if request.rel_url.raw_query_string else {},
            params=found.values,
            body=await request.read() if request.can_read_body else b"",
            route=endpoint.route,
            cause=Cause(
                kind="SERVER",
                traceparent=headers.get("traceparent", ""),
                tracestate=headers.get("tracestate", ""),
            ),
        )
        return _response(answer)

    async def _open_door(self, request: web.BaseRequest, path: str, lowered: str) -> web.Response:
        match request.method, lowered:
            case "POST", door if door == EVENT_GRID_PATH:
                return await self._receive_events(request)
            case "GET", "/admin/host/status":
                return web.json_response(self._status())
            case "GET", "/admin/functions":
                if not self._admits(request, "ADMIN"):
                    return _refusal("ADMIN")
                return web.json_response(self._list())
            case "POST", door if door.startswith("/admin/functions/"):
                if not self._admits(request, "ADMIN"):
                    return _refusal("ADMIN")
                return await self._fire(request, lowered.removeprefix("/admin/functions/"))
        return web.Response(status=404, text=f"nothing answers {request.method} {path}")

    async def _receive_events(self, request: web.BaseRequest) -> web.Response:
        if not self._admits(request, "SYSTEM"):
            return _refusal("SYSTEM")
        named = (v for k, v in request.query.items() if k.lower() == "functionname")
        reply = await self._webhook.answer(
            next(named, ""), request.headers.get("aeg-event-type", ""), await request.read()
        )
        if reply.value is not None:
            return web.json_response(reply.value, status=reply.status)
        return web.Response(status=reply.status, text=reply.text)

    async def _fire(self, request: web.BaseRequest, lowered_name: str) -> web.Response:
        functions = self.worker.functions.values()
        function = next((f for f in functions if f.name.lower() == lowered_name), None)
        if function is None:
            return web.Response(status=404, text=f"no function is named {lowered_name!r}")
        try:
            body = json.loads(await request.read() or b"{}")
            given = body.get("input", "")
        except (ValueError, AttributeError):
            return web.Response(status=400, text='the body must look like {"input": "..."}')
        text = given if isinstance(given, str) else json.dumps(given)
        match function.trigger_type:
            case "httpTrigger":
                return web.Response(status=400, text=f"{function.name} is an HTTP function: call its route")
            case "timerTrigger":
                self._spawn(self._timers.fire(function.name))
            case "eventGridTrigger":
                self._spawn(self.worker.invoke_event_grid(function.name, text))
            case _:
                self._spawn(self.worker.invoke_text(function.name, text))
        return web.Response(status=202)

    def _admits(self, request: web.BaseRequest, level: str) -> bool:
        offered = request.headers.get("x-functions-key") or request.query.get("code", "")
        return self._keys.opens(level, offered)

    def _status(self) -> dict[str, Any]:
        return {
            "state": "Running",
            "functions": len(self.worker.functions),
            "pid": os.getpid(),
            "instance": self.instance,
            "holds_timers": self._timers.is_holder,
        }

    def _list(self) -> list[dict[str, Any]]:
        endpoints = {endpoint.function.name: endpoint for endpoint in self._endpoints}
        return [
            _described(function, endpoints.get(function.name), self._schedules.get(function.name))
            for function in self.worker.functions.values()
        ]

    def _page(self) -> web.Response:
        try:
            page = PAGE.read_text(encoding="utf-8")
        except FileNotFoundError:
            return web.Response(status=404, text="no page here: GET /admin/host/status says how the host is")
        return web.Response(
            text=page.replace("{{CLOUD_URL}}", self._cloud),
            content_type="text/html",
            headers={"Cache-Control": "no-store"},
        )

    def _spawn[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background.failed", exc_info=error)


def _endpoints(worker: Worker, prefix: str) -> list[Endpoint]:
    endpoints = []
    for function in worker.functions.values():
        if function.trigger_type != "httpTrigger":
            continue
        trigger = function.trigger
        route = str(trigger.get("route", function.name)).strip("/")
        endpoints.append(
            Endpoint(
                function=function,
                route="/" + "/".join(part for part in (prefix, route) if part),
                methods=tuple(trigger.get("methods") or ()),
                level=trigger.get("authLevel", "FUNCTION"),
            )
        )
    return endpoints


def _router(endpoints: list[Endpoint]) -> Router[Endpoint]:
    router: Router[Endpoint] = Router()
    for endpoint in endpoints:
        try:
            router.add(endpoint.route, endpoint.methods or None, endpoint)
        except ValueError as e:
            raise StartError(f"function {endpoint.function.name}: {e}") from e
    return router


def _refuse_unserved(function: Function) -> None:
    for binding in function.bindings:
        if binding is function.trigger:
            continue
        if (binding["direction"], binding["type"]) not in _SERVED_BINDINGS:
            raise StartError(
                f"function {function.name} has the binding {binding['type']}, which this host does "
                "not serve: use the service's client, or run the app with Azure Functions Core Tools"
            )
    if function.trigger_type not in _SERVED_TRIGGERS:
        log.warning("trigger.unserved", extra={"function": function.name, "trigger": function.trigger_type})


def _described(function: Function, endpoint: Endpoint | None, timer: Timer | None) -> dict[str, Any]:
    return {
        "name": function.name,
        "trigger": function.trigger_type,
        "route": endpoint.route if endpoint else None,
        "methods": list(endpoint.methods) if endpoint else None,
        "auth_level": endpoint.level if endpoint else None,
        "schedule": timer.text if timer else None,
    }


def _joined(values: MultiMapping[str], *, lower: bool = False) -> dict[str, str]:
    joined: dict[str, str] = {}
    for raw, value in values.items():
        name = raw.lower() if lower else raw
        if name in joined:
            joined[name] += f",{value}"
        elif value or lower:
            joined[name] = value
    return joined


def _response(answer: HttpAnswer) -> web.Response:
    headers = CIMultiDict(
        (name, value) for name, value in answer.headers.items() if name.lower() not in _CONNECTION_HEADERS
    )
    for cookie in answer.cookies:
        headers.add("Set-Cookie", cookie)
    return web.Response(status=answer.status, headers=headers, body=answer.body)


def _refusal(level: str) -> web.Response:
    name = {"FUNCTION": "function", "SYSTEM": "system"}.get(level, "master")
    return web.Response(status=401, text=f"give the {name} key in the header x-functions-key or as ?code=")


def _allow(origin: str, request: web.BaseRequest, response: web.Response) -> None:
    headers = response.headers
    headers["Access-Control-Allow-Origin"] = origin
    headers["Access-Control-Allow-Credentials"] = "true"
    asked = request.headers
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in asked:
        headers["Access-Control-Allow-Methods"] = asked["Access-Control-Request-Method"]
        if wanted := asked.get("Access-Control-Request-Headers"):
            headers["Access-Control-Allow-Headers"] = wanted
