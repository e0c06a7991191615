"""The door for clients, /client/: negotiate, then one of three transports."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import hdrs, web

from infra.local.signalr import cors
from infra.local.signalr.body import LARGEST, read_body
from infra.local.signalr.connections import (
    Connection,
    EventStreamConnection,
    LongPollingConnection,
    Outbox,
    Surroundings,
    WebSocketConnection,
)
from infra.local.signalr.hub import Switchboard
from infra.local.signalr.options import Options
from infra.local.signalr.refusal import RefusalError
from infra.local.signalr.tokens import Principal, Tokens

type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_TRANSPORTS = [
    {"transport": "WebSockets", "transferFormats": ["Text", "Binary"]},
    {"transport": "ServerSentEvents", "transferFormats": ["Text"]},
    {"transport": "LongPolling", "transferFormats": ["Text", "Binary"]},
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ticket:
    """A negotiated connection that nobody has opened yet."""

    connection_id: str
    hub: str
    made: float


class ClientDoor:
    """Lets clients in and serves their transports."""

    def __init__(self, switchboard: Switchboard, tokens: Tokens, outbox: Outbox, options: Options) -> None:
        self.is_closing = False
        self._switchboard = switchboard
        self._tokens = tokens
        self._options = options
        self._tickets: dict[str, _Ticket] = {}
        self._by_token: dict[str, Connection] = {}
        self._around = Surroundings(
            options=options,
            outbox=outbox,
            on_ready=switchboard.ready,
            on_gone=switchboard.gone,
        )

    def routes(self) -> list[web.RouteDef]:
        """List the client paths, with and without the slash before the query."""
        return [
            web.route("*", "/client/negotiate", _with_cors(self._on_negotiate)),
            web.route("*", "/client/", _with_cors(self._on_client)),
            web.route("*", "/client", _with_cors(self._on_client)),
        ]

    def forget_old(self) -> None:
        """Drop tickets nobody came for and connections that are over."""
        oldest = time.monotonic() - self._options.connect_window.total_seconds()
        for token in [token for token, ticket in self._tickets.items() if ticket.made < oldest]:
            del self._tickets[token]
        for token in [token for token, one in self._by_token.items() if one.is_over]:
            del self._by_token[token]

    async def _on_negotiate(self, request: web.Request) -> web.StreamResponse:
        if request.method != hdrs.METH_POST:
            raise RefusalError(405, "negotiate is a POST")
        who = self._tokens.client(request)
        self._refuse_when_full()
        token, connection_id = _unguessable(), _unguessable()
        answer: dict[str, object] = {"connectionId": connection_id}
        if _asks_for_version_1(request):
            answer |= {"negotiateVersion": 1, "connectionToken": token}
        else:
            token = connection_id
            answer["negotiateVersion"] = 0
        self._tickets[token] = _Ticket(connection_id=connection_id, hub=who.hub, made=time.monotonic())
        return web.json_response(answer | {"availableTransports": _TRANSPORTS})

    async def _on_client(self, request: web.Request) -> web.StreamResponse:
        who = self._tokens.client(request)
        match request.method:
            case hdrs.METH_GET if _is_upgrade(request):
                return await self._serve_websocket(request, who)
            case hdrs.METH_GET if "text/event-stream" in request.headers.get(hdrs.ACCEPT, ""):
                return await self._serve_events(request, who)
            case hdrs.METH_GET:
                return await self._serve_poll(request, who)
            case hdrs.METH_POST:
                self._existing(request, who).receive(await read_body(request))
                return web.Response(status=202)
            case hdrs.METH_DELETE:
                self._existing(request, who).end()
                return web.Response(status=202)
        raise RefusalError(405, f"{request.method} means nothing here: use GET, POST or DELETE")

    async def _serve_websocket(self, request: web.Request, who: Principal) -> web.StreamResponse:
        token, connection_id = self._admit(request, who)
        response = web.WebSocketResponse(
            compress=False,
            heartbeat=None,
            timeout=self._options.close_timeout.total_seconds(),
            max_msg_size=LARGEST,
        )
        await response.prepare(request)
        connection = WebSocketConnection(
            connection_id,
            who.hub,
            who.user_id,
            _transport(request),
            self._around,
            socket=response,
        )
        self._open(token, connection)
        await connection.listen()
        return response

    async def _serve_events(self, request: web.Request, who: Principal) -> web.StreamResponse:
        token, connection_id = self._admit(request, who)
        response = web.StreamResponse(
            headers=cors.headers(request) | {hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-cache"}
        )
        # Chunks are written past aiohttp later, so the framing must not be its choice.
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b":\r\n\r\n")
        connection = EventStreamConnection(connection_id, who.hub, who.user_id, _transport(request), self._around)
        self._open(token, connection)
        try:
            await connection.closed()
        finally:
            connection.leave()
        with suppress(ConnectionError):
            await response.write_eof()
        return response

    async def _serve_poll(self, request: web.Request, who: Principal) -> web.StreamResponse:
        transport = _transport(request)
        connection = self._by_token.get(request.query.get("id", ""))
        if connection is None or connection.is_over:
            token, connection_id = self._admit(request, who)
            connection = LongPollingConnection(connection_id, who.hub, who.user_id, transport, self._around)
            self._open(token, connection)
        elif not isinstance(connection, LongPollingConnection):
            raise RefusalError(409, f"this id is in use by {connection.transport_name}")
        elif connection.hub != who.hub:
            raise _unknown_id(who)
        status, body = await connection.poll(transport)
        return web.Response(status=status, body=body, content_type=_poll_type(connection))

    def _admit(self, request: web.Request, who: Principal) -> tuple[str, str]:
        """Spend the request's ticket; a WebSocket may come without one."""
        token = request.query.get("id")
        if not token and not _is_upgrade(request):
            raise RefusalError(400, "the URL has no id: negotiate first, or use a WebSocket")
        if not token:
            self._refuse_when_full()
            return _unguessable(), _unguessable()
        open_one = self._by_token.get(token)
        if open_one is not None and not open_one.is_over:
            raise RefusalError(409, f"this id is in use by {open_one.transport_name}")
        ticket = self._tickets.get(token)
        window = self._options.connect_window.total_seconds()
        if ticket is None or ticket.hub != who.hub or time.monotonic() - ticket.made > window:
            raise _unknown_id(who)
        self._refuse_when_full()
        del self._tickets[token]
        return token, ticket.connection_id

    def _existing(self, request: web.Request, who: Principal) -> Connection:
        connection = self._by_token.get(request.query.get("id", ""))
        if connection is None or connection.is_over or connection.hub != who.hub:
            raise _unknown_id(who)
        if isinstance(connection, WebSocketConnection):
            raise RefusalError(405, "this id belongs to a WebSocket: send there")
        return connection

    def _open(self, token: str, connection: Connection) -> None:
        self._by_token[token] = connection
        self._switchboard.admit(connection)

    def _refuse_when_full(self) -> None:
        if self.is_closing:
            raise RefusalError(503, "the service is shutting down: try again soon")
        limit = self._options.max_connections
        if limit is not None and len(self._switchboard.live) >= limit:
            raise RefusalError(429, "Connection count reaches limit.")


def _with_cors(handler: Handler) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method == hdrs.METH_OPTIONS:
            return cors.preflight(request)
        response: web.StreamResponse
        try:
            response = await handler(request)
        except RefusalError as refusal:
            response = refusal.response()
        if not response.prepared:
            response.headers.update(cors.headers(request))
        return response

    return answer


def _unknown_id(who: Principal) -> RefusalError:
    return RefusalError(404, f"hub {who.hub} knows no connection of this id: negotiate again")


def _unguessable() -> str:
    return secrets.token_urlsafe(18)


def _asks_for_version_1(request: web.Request) -> bool:
    given = request.query.get("negotiateVersion", "0")
    if not given.isdecimal() or len(given) > 3:
        raise RefusalError(400, f"negotiateVersion is {given!r}: give 0 or 1")
    return int(given) >= 1


def _is_upgrade(request: web.Request) -> bool:
    return request.headers.get(hdrs.UPGRADE, "").lower() == "websocket"


def _poll_type(connection: Connection) -> str:
    is_text = connection.protocol == "json"
    return "text/plain" if is_text else "application/octet-stream"


def _transport(request: web.Request) -> asyncio.Transport:
    if request.transport is None:
        raise ConnectionResetError("the client left before it was answered")
    return request.transport
