"""The embedded SignalR service, as the official clients and the data plane see it."""

import asyncio
import json
import os
import socket
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx
import jwt
import msgpack
import pytest
from aiohttp import WSMsgType, web
from hypothesis import given, settings
from hypothesis import strategies as st
from pysignalr.client import SignalRClient
from pysignalr.exceptions import AuthorizationError
from pysignalr.protocol.json import JSONProtocol
from pysignalr.protocol.messagepack import MessagepackProtocol

from infra.local.signalr.connections import LongPollingConnection, WebSocketConnection
from infra.local.signalr.options import FREE_TIER, Options
from infra.local.signalr.protocol import PING, HubProtocol, Record, close, invocation, read_kinds
from infra.local.signalr.service import SignalRService

KEY = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789ABCDEFGH"
ROOT = Path(__file__).parents[2]
NODE = ROOT / "tests" / "e2e" / "node"
PATIENCE = 20
QUICK = Options(sweep_every=timedelta(milliseconds=20))
VERSION = {"api-version": "2022-06-01"}
END = "\x1e"
HANDSHAKE = '{"protocol":"json","version":1}' + END


# --- what the app, the service and its callers look like ------------------------------------------


def a_client_token(user: str | None = "alice", *, key: str = KEY, **claims: object) -> str:
    """A token as the binding mints it: aud has no port."""
    now = int(time.time())
    body: dict[str, object] = {
        "nbf": now,
        "iat": now,
        "exp": now + 3600,
        "aud": "http://localhost/client/?hub=chat",
    }
    if user:
        body["asrs.s.uid"] = user
    return jwt.encode(body | claims, key, algorithm="HS256")


def a_server_token(url: str, **claims: object) -> str:
    """A token as a caller of the data plane mints it."""
    body = {"aud": url.partition("?")[0], "exp": int(time.time()) + 60}
    return jwt.encode(body | claims, KEY, algorithm="HS256")


class MovingClock:
    """A clock that is right until you move it."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@dataclass
class Caller:
    """A caller of a service's data plane."""

    url: str
    http: httpx.AsyncClient

    async def call(self, method: str, path: str, body: object = None, **query: Any) -> httpx.Response:
        """One data plane request, in the current API version unless the path says v1."""
        params = query if "/v1/" in path else VERSION | query
        headers = {"Authorization": f"Bearer {a_server_token(self.url + path)}"}
        content = json.dumps(body) if body is not None else None
        return await self.http.request(method, self.url + path, params=params, headers=headers, content=content)

    async def say(self, to: str, *arguments: object) -> None:
        """Send newMessage to the hub, or to users/…, groups/…, connections/…."""
        path = f"/api/hubs/chat/{to}/:send" if to else "/api/hubs/chat/:send"
        body = {"target": "newMessage", "arguments": list(arguments)}
        response = await self.call("POST", path, body)
        assert response.status_code == 202, response.text

    async def negotiate(self, token: str | None = None, version: int = 1) -> dict[str, Any]:
        """What the service answers a client that was sent here."""
        response = await self.http.post(
            f"{self.url}/client/negotiate?hub=chat&negotiateVersion={version}",
            headers={"Authorization": f"Bearer {token or a_client_token()}"},
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@dataclass
class Cloud(Caller):
    """A service running right here, with a caller of its data plane."""

    service: SignalRService


def an_http_client() -> httpx.AsyncClient:
    """A client for plain HTTP: no certificates to load, no proxies to ask."""
    return httpx.AsyncClient(verify=False, trust_env=False)


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def a_cloud(
    state: sqlite3.Connection | Path | str = ":memory:",
    *,
    options: Options = QUICK,
    now: MovingClock | None = None,
) -> AsyncIterator[Cloud]:
    service = SignalRService(KEY, state, options=options, now=now or MovingClock())
    app = web.Application()
    app.add_routes(service.routes())
    async with serving(app) as url, an_http_client() as http:
        await service.start()
        try:
            yield Cloud(url, http, service)
        finally:
            await service.close()


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    async with a_cloud() as running:
        yield running


@dataclass
class App:
    """The app's negotiate endpoint: it mints a token and sends the client to the service."""

    service: str
    url: str = ""
    asked: list[web.Request] = field(default_factory=list)

    async def negotiate(self, request: web.Request) -> web.Response:
        self.asked.append(request)
        token = a_client_token(request.query.get("user"))
        return web.json_response({"url": f"{self.service}/client/?hub=chat", "accessToken": token})


@asynccontextmanager
async def an_app(service: str) -> AsyncIterator[App]:
    app = App(service)
    routes = web.Application()
    routes.add_routes([web.post("/api/negotiate", app.negotiate)])
    async with serving(routes) as url:
        app.url = f"{url}/api"
        yield app


class NodeClient:
    """The official JavaScript client in a Node process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.connection_id = ""

    async def anything(self) -> dict[str, Any]:
        """The next thing it tells."""
        assert self._process.stdout
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE)
        told: dict[str, Any] = json.loads(line)
        return told

    async def next(self, event: str) -> dict[str, Any]:
        """The next thing it tells, which must be this event."""
        told = await self.anything()
        assert told["event"] == event, told
        return told

    async def hears(self) -> list[Any]:
        """The arguments of the next message."""
        arguments: list[Any] = (await self.next("message"))["arguments"]
        return arguments

    async def do(self, command: str, **fields: object) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"command": command, **fields}).encode() + b"\n")
        await self._process.stdin.drain()


@asynccontextmanager
async def a_node_client(url: str, **options: str) -> AsyncIterator[NodeClient]:
    arguments = [f"--{name}={value}" for name, value in ({"url": url} | options).items()]
    process = await asyncio.create_subprocess_exec(
        "node",
        str(NODE / "signalr_client.mjs"),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1024 * 1024,
    )
    client = NodeClient(process)
    try:
        client.connection_id = (await client.next("connected"))["connectionId"]
        yield client
    finally:
        assert process.stdin
        process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 5)
        if process.returncode is None:
            process.kill()
            await process.wait()


class RawClient:
    """A WebSocket client that shows the bare records."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self._records: list[dict[str, Any]] = []

    async def next(self) -> dict[str, Any]:
        """The next record."""
        while not self._records:
            text = await self.socket.receive_str(timeout=PATIENCE)
            self._records = [json.loads(record) for record in text.split(END)[:-1]]
        return self._records.pop(0)

    async def hears(self) -> list[Any]:
        """The arguments of the next record, which must be a message."""
        record = await self.next()
        assert record["type"] == 1, record
        arguments: list[Any] = record["arguments"]
        return arguments

    async def ends(self) -> int | None:
        """The WebSocket close code, once the service has closed."""
        message = await self.socket.receive(timeout=PATIENCE)
        assert message.type in {WSMsgType.CLOSE, WSMsgType.CLOSED}, message
        return self.socket.close_code


@asynccontextmanager
async def a_raw_client(
    cloud: Cloud,
    user: str | None = "alice",
    *,
    hello: str = HANDSHAKE,
    connection_id: str = "",
    token: str = "",
) -> AsyncIterator[RawClient]:
    query = f"hub=chat&id={connection_id}" if connection_id else "hub=chat"
    headers = {"Authorization": f"Bearer {token or a_client_token(user)}"}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{cloud.url}/client/?{query}", headers=headers) as socket,
    ):
        client = RawClient(socket)
        if hello:
            await socket.send_str(hello)
        if hello == HANDSHAKE:
            assert await client.next() == {}
        yield client


async def until(condition: Any) -> None:
    """Wait for something that happens by itself."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to wait on
            await asyncio.sleep(0.01)


# --- the official clients -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "protocol"),
    [
        ("WebSockets", "json"),
        ("WebSockets", "messagepack"),
        ("ServerSentEvents", "json"),
        ("LongPolling", "json"),
        ("LongPolling", "messagepack"),
    ],
)
async def test_official_client_on_every_transport(cloud: Cloud, transport: str, protocol: str) -> None:
    """The unmodified client hears hub, user, group and connection, in order and in full."""
    async with an_app(cloud.url) as app:
        url = f"{app.url}?user=alice"
        async with a_node_client(url, transport=transport, protocol=protocol) as client:
            await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/symbols%2FAAPL")
            for to in (
                "",
                "users/alice",
                "groups/symbols%2FAAPL",
                f"connections/{client.connection_id}",
            ):
                await cloud.say(to, {"to": to, "price": 1.5, "note": "Größe ✓ 📈", "none": None})
                heard = await client.hears()
                assert heard == [{"to": to, "price": 1.5, "note": "Größe ✓ 📈", "none": None}]
            hub = cloud.service.hub("chat")
            assert [one.transport_name for one in hub.connections.values()] == [transport]

            await cloud.say("", "x" * 70_000, 2**40)
            assert await client.hears() == ["x" * 70_000, 2**40]
            for number in range(5):
                await cloud.say("", number)
            assert [await client.hears() for _ in range(5)] == [[n] for n in range(5)]

            await client.do("stop")
            await client.next("closed")
            await until(lambda: cloud.service.connections() == 0)


@pytest.mark.parametrize("transport", ["WebSockets", "ServerSentEvents", "LongPolling"])
async def test_invocation_by_a_client(cloud: Cloud, transport: str) -> None:
    """A client that calls the hub is told that nobody is there to answer."""
    async with (
        an_app(cloud.url) as app,
        a_node_client(app.url, transport=transport) as client,
    ):
        await client.do("invoke", target="broadcast", arguments=["hi"])

        told = {(one := await client.anything())["event"]: one["error"] for _ in range(2)}
        assert told.keys() == {"refused", "closed"}
        assert "serverless and has no upstream" in told["refused"]


@pytest.mark.parametrize("transport", ["WebSockets", "ServerSentEvents", "LongPolling"])
async def test_cut_line_is_mended_by_the_client(cloud: Cloud, transport: str) -> None:
    """A client whose line is cut comes back through the app, with its old token in hand."""
    async with an_app(cloud.url) as app:
        url = f"{app.url}?user=alice"
        async with a_node_client(url, transport=transport, delays="0,50,100,200") as client:
            await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/g")
            assert cloud.service.drop_all() == 1

            await client.next("reconnecting")
            again = await client.next("reconnected")
            await cloud.say("groups/g", "after")

            assert await client.hears() == ["after"]
            assert again["connectionId"] != client.connection_id
            assert "Authorization" not in app.asked[0].headers
            assert app.asked[1].headers["Authorization"].startswith("Bearer ")


async def test_close_record_that_allows_reconnect(cloud: Cloud) -> None:
    """A client told to reconnect does."""
    async with an_app(cloud.url) as app, a_node_client(app.url, delays="0,50") as client:
        assert cloud.service.close_all(allow_reconnect=True) == 1

        await client.next("reconnecting")
        await client.next("reconnected")


async def test_close_record_with_an_error(cloud: Cloud) -> None:
    """A client told that it is over stays away, and knows why."""
    async with an_app(cloud.url) as app, a_node_client(app.url, delays="0,50") as client:
        cloud.service.close_all(allow_reconnect=False, error="bye")

        assert (await client.next("closed"))["error"].endswith("bye")


@asynccontextmanager
async def a_process(data: Path, port: int = 0) -> AsyncIterator[tuple[Any, int]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "infra.local.signalr", f"--port={port}", f"--data={data}"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
        yield process, int(line.rpartition(b":")[2])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("how", ["kill", "terminate"])
async def test_service_dies_and_comes_back(tmp_path: Path, how: str) -> None:
    """User groups outlive the process, and clients find their way back to them."""
    data, group = tmp_path / "signalr.db", "groups/symbols%2FAAPL"
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(an_http_client())
        async with a_process(data) as (process, port):
            caller = Caller(f"http://127.0.0.1:{port}", http)
            app = await stack.enter_async_context(an_app(caller.url))
            client = await stack.enter_async_context(
                a_node_client(f"{app.url}?user=alice", delays=",".join(["50"] * 200))
            )
            await caller.call("PUT", f"/api/hubs/chat/users/alice/{group}")
            await caller.say(group, "before")
            assert await client.hears() == ["before"]
            getattr(process, how)()
            await process.wait()
            await client.next("reconnecting")

        async with a_process(data, port):
            await client.next("reconnected")
            await caller.say(group, "after")

            assert await client.hears() == ["after"]


@pytest.mark.parametrize("protocol", [JSONProtocol, MessagepackProtocol])
async def test_pysignalr(cloud: Cloud, protocol: type[Any]) -> None:
    """pysignalr connects without an id, and returns with the same token after a cut."""
    heard: asyncio.Queue[Any] = asyncio.Queue()
    opened: asyncio.Queue[None] = asyncio.Queue()

    async def on_message(arguments: Any) -> None:
        await heard.put(arguments)

    async def on_open() -> None:
        await opened.put(None)

    async with an_app(cloud.url) as app:
        client = SignalRClient(f"{app.url}?user=bob", protocol=protocol())
        client.on("newMessage", on_message)
        client.on_open(on_open)
        running = asyncio.create_task(client.run())
        try:
            for round_ in range(2):
                await asyncio.wait_for(opened.get(), PATIENCE)
                await cloud.say("users/bob", {"round": round_})
                assert await asyncio.wait_for(heard.get(), PATIENCE) == [{"round": round_}]
                if round_ == 0:
                    cloud.service.close_all(allow_reconnect=True)
            assert len(app.asked) == 1
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


async def test_pysignalr_with_a_bad_token(cloud: Cloud) -> None:
    """A client with a stranger's token is told it is not authorized."""
    url = f"{cloud.url}/client/?hub=chat"
    token = a_client_token(key="0" * 44)
    client = SignalRClient(url, headers={"Authorization": f"Bearer {token}"})

    with pytest.raises(AuthorizationError):
        await asyncio.wait_for(client.run(), PATIENCE)


# --- negotiate and tokens -------------------------------------------------------------------------


async def test_negotiate_version_1(cloud: Cloud) -> None:
    """Version 1 hides the id others may see from the token that connects."""
    answer = await cloud.negotiate()

    assert answer["negotiateVersion"] == 1
    assert answer["connectionToken"] != answer["connectionId"]
    assert [one["transport"] for one in answer["availableTransports"]] == [
        "WebSockets",
        "ServerSentEvents",
        "LongPolling",
    ]
    async with a_raw_client(cloud, connection_id=answer["connectionToken"]):
        assert list(cloud.service.hub("chat").connections) == [answer["connectionId"]]


async def test_negotiate_version_0_with_a_stray_id(cloud: Cloud) -> None:
    """Version 0 has one id for both, and an old id in the query does no harm."""
    response = await cloud.http.post(
        f"{cloud.url}/client/negotiate?hub=chat&id=old",
        headers={"Authorization": f"Bearer {a_client_token()}"},
    )

    answer = response.json()
    assert "connectionToken" not in answer
    async with a_raw_client(cloud, connection_id=answer["connectionId"]):
        assert list(cloud.service.hub("chat").connections) == [answer["connectionId"]]


@pytest.mark.parametrize(
    "audience",
    [
        "http://localhost/client/?hub=chat",
        "http://localhost:8888/client/?hub=chat",
        "https://x.service.signalr.net/client?hub=Chat",
        ["http://elsewhere/", "http://localhost/client/?hub=chat"],
    ],
)
async def test_audience_is_path_and_hub(cloud: Cloud, audience: object) -> None:
    """Scheme, host and port of aud say nothing; path and hub do."""
    assert await cloud.negotiate(a_client_token(aud=audience))


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("", "no token"),
        ("nonsense", "not good"),
        (a_client_token(key="0" * 44), "not good"),
        (jwt.encode({"aud": "x", "exp": 2**31}, "", algorithm="none"), "not good"),
        (a_client_token(exp=int(time.time()) - 1), "expired"),
        (a_client_token(nbf=int(time.time()) + 3600), "not valid before"),
        (a_client_token(exp="soon"), "must be seconds"),
        (a_client_token(exp=None), "must be seconds"),
        (a_client_token(aud="http://localhost/client/?hub=other"), "must be .../client/?hub=chat"),
        (a_client_token(aud="http://localhost/api/hubs/chat"), "must be .../client/?hub=chat"),
        (a_client_token(aud=None), "must be .../client/?hub=chat"),
    ],
)
async def test_token_that_is_not_good(cloud: Cloud, token: str, says: str) -> None:
    """Without a good token nothing opens, and the answer says what is wrong with it."""
    for method, path in (("POST", "/client/negotiate"), ("GET", "/client/")):
        response = await cloud.http.request(method, f"{cloud.url}{path}?hub=chat&access_token={token}")

        assert response.status_code == 401
        assert says in response.json()["message"]


async def test_token_that_is_too_long(cloud: Cloud) -> None:
    """Azure takes tokens up to 4 KB; so does this."""
    token = a_client_token(padding="x" * 4096)
    response = await cloud.http.post(
        f"{cloud.url}/client/negotiate?hub=chat", headers={"Authorization": f"Bearer {token}"}
    )

    assert response.status_code == 413


@pytest.mark.parametrize("query", ["", "hub=chat&hub=other", "hub=1chat", "hub=a%2Fb"])
async def test_hub_that_is_not_one_good_name(cloud: Cloud, query: str) -> None:
    """The URL names one hub, by a name Azure would take."""
    response = await cloud.http.post(f"{cloud.url}/client/negotiate?{query}&access_token={a_client_token()}")

    assert response.status_code == 400
    assert "hub" in response.json()["message"]


@pytest.mark.parametrize(
    "claims",
    [
        {"asrs.s.uid": "ann"},
        {"nameid": "ann"},
        {"http://schemas.xmlsoap.org/ws/2005/05/identity/claims/nameidentifier": "ann"},
        {"sub": "ann"},
        {"sub": ["ann", "bob"]},
        {"asrs.s.uid": "ann", "sub": "bob"},
    ],
)
async def test_user_id_claims(cloud: Cloud, claims: dict[str, Any]) -> None:
    """The user is the first of the claims Azure looks at."""
    token = a_client_token(None, **claims)

    async with a_raw_client(cloud, token=token):
        assert [one.user_id for one in cloud.service.list_connections()] == ["ann"]


async def test_id_nobody_negotiated(cloud: Cloud) -> None:
    """An unknown id is not found, whatever the transport and method."""
    headers = {"Authorization": f"Bearer {a_client_token()}"}
    for method in ("GET", "POST", "DELETE"):
        response = await cloud.http.request(method, f"{cloud.url}/client/?hub=chat&id=none", headers=headers)
        assert response.status_code == 404
    with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
        async with a_raw_client(cloud, connection_id="none"):
            pass


async def test_id_of_another_hub(cloud: Cloud) -> None:
    """An id opens the hub it was negotiated for, no other."""
    answer = await cloud.negotiate()
    token = a_client_token(aud="http://localhost/client/?hub=other")
    response = await cloud.http.get(
        f"{cloud.url}/client/?hub=other&id={answer['connectionToken']}&access_token={token}"
    )

    assert response.status_code == 404


async def test_id_used_twice(cloud: Cloud) -> None:
    """An id in use is taken, and used up once its connection has gone."""
    token = (await cloud.negotiate())["connectionToken"]
    async with a_raw_client(cloud, connection_id=token):
        with pytest.raises(aiohttp.WSServerHandshakeError, match="409"):
            async with a_raw_client(cloud, connection_id=token):
                pass
        poll = f"{cloud.url}/client/?hub=chat&id={token}&access_token={a_client_token()}"
        assert (await cloud.http.get(poll)).status_code == 409
    await until(lambda: cloud.service.connections() == 0)
    with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
        async with a_raw_client(cloud, connection_id=token):
            pass


async def test_id_that_came_too_late() -> None:
    """A strict service takes an id only within the connect window."""
    async with a_cloud(options=Options(connect_window=timedelta())) as cloud:
        token = (await cloud.negotiate())["connectionToken"]

        with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
            async with a_raw_client(cloud, connection_id=token):
                pass


async def test_websocket_outlives_its_token() -> None:
    """A token opens a line; its end does not cut it, but opens no other."""
    clock = MovingClock()
    async with a_cloud(now=clock) as cloud:
        async with a_raw_client(cloud) as client:
            clock.ahead = timedelta(hours=2)
            cloud.service.hub("chat").send_to_all(PING)
            assert await client.next() == {"type": 6}

        with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
            async with a_raw_client(cloud):
                pass


# --- groups ---------------------------------------------------------------------------------------


async def test_connection_group_ends_with_the_connection(cloud: Cloud) -> None:
    """A client that joined by its connection has to join again."""
    async with a_raw_client(cloud) as client:
        [connection_id] = cloud.service.hub("chat").connections
        joined = await cloud.call("PUT", f"/api/hubs/chat/groups/g/connections/{connection_id}")
        await cloud.say("groups/g", 1)
        assert (joined.status_code, await client.hears()) == (200, [1])
    await until(lambda: cloud.service.connections() == 0)

    async with a_raw_client(cloud) as client:
        await cloud.say("groups/g", 2)
        await cloud.say("", 3)
        assert await client.hears() == [3]


async def test_user_group_before_the_user_connects(cloud: Cloud) -> None:
    """A user may be put into a group first and connect later, twice at once."""
    await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/g")

    async with a_raw_client(cloud) as one, a_raw_client(cloud) as two, a_raw_client(cloud, "bob"):
        await cloud.say("groups/g", "hi")
        assert (await one.hears(), await two.hears()) == (["hi"], ["hi"])
        assert cloud.service.sent() == 2


async def test_user_group_survives_the_service(tmp_path: Path) -> None:
    """Another service on the same file knows who belongs where."""
    async with a_cloud(tmp_path / "state.db") as cloud:
        await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/g")

    async with a_cloud(tmp_path / "state.db") as cloud, a_raw_client(cloud) as client:
        await cloud.say("groups/g", "still")
        assert await client.hears() == ["still"]


async def test_user_group_on_a_shared_connection() -> None:
    """The state may be a connection that belongs to others, who close it."""
    with sqlite3.connect(":memory:") as state:
        async with a_cloud(state) as cloud:
            await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/g")
        found = state.execute("SELECT hub, user_id, group_name FROM signalr_user_groups")
        assert found.fetchall() == [("chat", "alice", "g")]
    state.close()


async def test_user_group_hears_whoever_came_since(cloud: Cloud) -> None:
    """A message to a group reaches the user's clients of that moment, however often the group was told before."""
    await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/g")
    async with a_raw_client(cloud) as first:
        await cloud.say("groups/g", 1)
        async with a_raw_client(cloud) as second:
            await cloud.say("groups/g", 2)
            assert await second.hears() == [2]
        await until(lambda: cloud.service.connections() == 1)
        await cloud.say("groups/g", 3)
        assert [await first.hears() for _ in range(3)] == [[1], [2], [3]]
        assert cloud.service.sent() == 4


async def test_user_group_with_a_time_to_live() -> None:
    """A membership with a ttl ends by itself, for clients connected all along too."""
    clock = MovingClock()
    async with a_cloud(now=clock) as cloud, a_raw_client(cloud) as client:
        await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/short", ttl=60)
        await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/long")
        await cloud.say("groups/short", 1)
        clock.ahead = timedelta(seconds=61)
        cloud.service.hub("chat").send_to_group("short", PING)
        cloud.service.hub("chat").send_to_group("long", PING)

        assert await client.hears() == [1]
        assert await client.next() == {"type": 6}
        assert cloud.service.sent() == 2
        assert not cloud.service.hub("chat").has_user("alice", "short")
        clock.ahead = timedelta(days=364)
        assert cloud.service.hub("chat").has_user("alice", "long")


async def test_user_group_with_no_time_to_live(cloud: Cloud) -> None:
    """ttl=0 means the clients of this moment, not the user."""
    async with a_raw_client(cloud) as now_here:
        await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/g", ttl=0)
        async with a_raw_client(cloud) as later:
            await cloud.say("groups/g", 1)
            await cloud.say("", 2)
            assert (await now_here.hears(), await later.hears()) == ([1], [2])


async def test_user_in_more_than_a_hundred_groups(cloud: Cloud) -> None:
    """Without a ttl the latest hundred count; renewed is latest."""
    hub = cloud.service.hub("chat")
    for number in range(100):
        hub.add_user("alice", f"g{number}")
    hub.add_user("alice", "with-ttl", timedelta(hours=1))
    hub.add_user("alice", "g0")
    hub.add_user("alice", "g100")

    kept = [name for name in ("g0", "g1", "g2", "g100", "with-ttl") if hub.has_user("alice", name)]
    assert kept == ["g0", "g2", "g100", "with-ttl"]


async def test_removed_user_hears_no_more(cloud: Cloud) -> None:
    """A user taken out of a group, or of all, hears it no more."""
    async with a_raw_client(cloud) as client:
        for name in ("a", "b", "c"):
            await cloud.call("PUT", f"/api/hubs/chat/users/alice/groups/{name}")
        await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/d", ttl=0)
        await cloud.call("DELETE", "/api/hubs/chat/users/alice/groups/a")
        await cloud.say("groups/a", "a")
        await cloud.say("groups/b", "b")
        await cloud.call("DELETE", "/api/hubs/chat/users/alice/groups")
        for name in ("b", "c", "d"):
            await cloud.say(f"groups/{name}", name)
        await cloud.say("", "end")

        assert [await client.hears(), await client.hears()] == [["b"], ["end"]]


async def test_hubs_do_not_mix(cloud: Cloud) -> None:
    """A hub's name is one whatever its case; another hub is another room."""
    async with a_raw_client(cloud) as client:
        message = {"target": "newMessage", "arguments": []}
        await cloud.call("POST", "/api/hubs/other/:send", message)
        await cloud.call("POST", "/api/hubs/CHAT/:send", message | {"arguments": ["here"]})

        assert await client.hears() == ["here"]


async def test_group_names_are_exact(cloud: Cloud) -> None:
    """Slashes, blanks, case and letters of any script make a group's name."""
    names = ["symbols/AAPL", "symbols/aapl", "a b+c", "ценá%2F", "50%", "x:y?z#w", ":send"]
    async with a_raw_client(cloud) as client:
        for name in names:
            await cloud.call("PUT", f"/api/hubs/chat/users/alice/groups/{quote(name, safe='')}")
        for name in names:
            await cloud.say(f"groups/{quote(name, safe='')}", name)
            assert await client.hears() == [name]


async def test_state_that_is_busy(tmp_path: Path) -> None:
    """When somebody else holds the state, the caller is told to try again."""
    holder = sqlite3.connect(tmp_path / "state.db")
    state = sqlite3.connect(tmp_path / "state.db", timeout=0)
    async with a_cloud(state) as cloud:
        holder.execute("BEGIN IMMEDIATE")
        await cloud.service.start()
        busy = await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/g")
        holder.rollback()
        free = await cloud.call("PUT", "/api/hubs/chat/users/alice/groups/g")

        assert (busy.status_code, free.status_code) == (503, 200)
    holder.close()
    state.close()


async def test_excluded_connections(cloud: Cloud) -> None:
    """A message may leave some clients out."""
    async with a_raw_client(cloud, "alice") as alice, a_raw_client(cloud, "bob") as bob:
        [left_out] = [one.connection_id for one in cloud.service.list_connections() if one.user_id == "alice"]
        message = {"target": "newMessage", "arguments": ["psst"]}
        await cloud.call("POST", "/api/hubs/chat/:send", message, excluded=[left_out, "x"])
        await cloud.say("", "all")

        assert (await alice.hears(), await bob.hears()) == (["all"], ["psst"])


# --- the data plane -------------------------------------------------------------------------------

MESSAGE = {"target": "newMessage", "arguments": [1]}
V2022 = "/api/hubs/chat"
V1 = "/api/v1/hubs/chat"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", f"{V2022}/:send", 202),
        ("POST", f"{V2022}/users/alice/:send", 202),
        ("POST", f"{V2022}/groups/g/:send", 202),
        ("POST", f"{V2022}/connections/{{id}}/:send", 202),
        ("PUT", f"{V2022}/users/alice/groups/h", 200),
        ("HEAD", f"{V2022}/users/alice/groups/g", 200),
        ("DELETE", f"{V2022}/users/alice/groups/g", 204),
        ("DELETE", f"{V2022}/users/alice/groups", 204),
        ("PUT", f"{V2022}/groups/h/connections/{{id}}", 200),
        ("DELETE", f"{V2022}/groups/h/connections/{{id}}", 200),
        ("DELETE", f"{V2022}/connections/{{id}}/groups", 200),
        ("HEAD", f"{V2022}/connections/{{id}}", 200),
        ("HEAD", f"{V2022}/groups/g", 200),
        ("HEAD", f"{V2022}/users/alice", 200),
        ("DELETE", f"{V2022}/connections/{{id}}", 200),
        ("POST", f"{V2022}/:closeConnections", 204),
        ("POST", f"{V2022}/groups/g/:closeConnections", 204),
        ("POST", f"{V2022}/users/alice/:closeConnections", 204),
        ("POST", V1, 202),
        ("POST", f"{V1}/", 202),
        ("POST", f"{V1}/users/alice", 202),
        ("POST", f"{V1}/groups/g", 202),
        ("POST", f"{V1}/connections/{{id}}", 202),
        ("PUT", f"{V1}/groups/h/users/alice", 202),
        ("PUT", f"{V1}/users/alice/groups/h", 202),
        ("GET", f"{V1}/groups/g/users/alice", 200),
        ("GET", f"{V1}/users/alice/groups/g", 200),
        ("DELETE", f"{V1}/groups/g/users/alice", 202),
        ("DELETE", f"{V1}/users/alice/groups/g", 202),
        ("DELETE", f"{V1}/users/alice/groups", 200),
        ("PUT", f"{V1}/groups/h/connections/{{id}}", 200),
        ("DELETE", f"{V1}/groups/h/connections/{{id}}", 200),
        ("GET", f"{V1}/connections/{{id}}", 200),
        ("GET", f"{V1}/groups/g", 200),
        ("GET", f"{V1}/users/alice", 200),
        ("DELETE", f"{V1}/connections/{{id}}", 202),
        ("HEAD", "/api/health", 200),
        ("GET", "/api/health", 200),
        ("GET", "/api/v1/health", 200),
    ],
)
async def test_data_plane_status_codes(cloud: Cloud, method: str, path: str, status: int) -> None:
    """Each operation answers with the status its reference gives."""
    async with a_raw_client(cloud):
        cloud.service.hub("chat").add_user("alice", "g")
        [connection_id] = cloud.service.hub("chat").connections
        body = MESSAGE if method == "POST" else None

        response = await cloud.call(method, path.format(id=connection_id), body)

    assert (response.status_code, response.content) == (status, b"")


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("HEAD", f"{V2022}/connections/none", "Warning.Connection.NotExisted"),
        ("HEAD", f"{V2022}/groups/none", "Warning.Group.NotExisted"),
        ("HEAD", f"{V2022}/users/none", "Warning.User.NotExisted"),
        ("HEAD", f"{V2022}/users/none/groups/g", "Info.User.NotInGroup"),
        ("PUT", f"{V2022}/groups/g/connections/none", "Error.Connection.NotExisted"),
        ("DELETE", f"{V2022}/groups/g/connections/none", "Error.Connection.NotExisted"),
        ("DELETE", f"{V2022}/connections/none/groups", "Error.Connection.NotExisted"),
        ("GET", f"{V1}/connections/none", "Warning.Connection.NotExisted"),
        ("GET", f"{V1}/groups/none", "Warning.Group.NotExisted"),
        ("GET", f"{V1}/users/none", "Warning.User.NotExisted"),
        ("GET", f"{V1}/groups/g/users/none", "Info.User.NotInGroup"),
        ("PUT", f"{V1}/groups/g/connections/none", "Error.Connection.NotExisted"),
    ],
)
async def test_data_plane_not_found(cloud: Cloud, method: str, path: str, code: str) -> None:
    """What is not there is named by the header the SDK reads."""
    response = await cloud.call(method, path)

    assert (response.status_code, response.headers["x-ms-error-code"]) == (404, code)


@pytest.mark.parametrize(
    ("path", "query", "says"),
    [
        ("/api/hubs/1chat/:send", {}, "hub name '1chat'"),
        (f"/api/hubs/{'x' * 129}/:send", {}, "at most 128"),
        (f"{V2022}/groups/%20%20/:send", {}, "group name is blank"),
        (f"{V2022}/groups/{'x' * 1025}/:send", {}, "at most 1024"),
        (f"{V2022}/users/%09/:send", {}, "user name is blank"),
        (f"{V2022}/:send", {"api-version": "2021-10-01"}, "use 2022-06-01 or later"),
        (f"{V2022}/:send", {"api-version": "latest"}, "use 2022-06-01 or later"),
    ],
)
async def test_data_plane_names_and_versions(cloud: Cloud, path: str, query: dict[str, str], says: str) -> None:
    """A name Azure would refuse is refused here, in a sentence."""
    response = await cloud.call("POST", path, MESSAGE, **query)

    assert response.status_code == 400
    assert says in response.json()["message"]


async def test_data_plane_without_a_version(cloud: Cloud) -> None:
    """The current API wants its version said."""
    url = f"{cloud.url}{V2022}/:send"
    headers = {"Authorization": f"Bearer {a_server_token(url)}"}
    response = await cloud.http.post(url, json=MESSAGE, headers=headers)

    assert response.status_code == 400
    assert "api-version is missing" in response.json()["message"]


@pytest.mark.parametrize("version", ["2022-06-01", "2022-11-01", "2023-07-01", "2024-12-01"])
async def test_data_plane_versions(cloud: Cloud, version: str) -> None:
    """Every version since 2022-06-01 is served."""
    response = await cloud.call("POST", f"{V2022}/:send", MESSAGE, **{"api-version": version})

    assert response.status_code == 202


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"target":"t","arguments":[NaN]}', "NaN is not JSON"),
        (b'{"target":"t","arguments":[1e999]}', "cannot be sent"),
        (b'{"target":"t","arguments":["\\ud800"]}', "cannot be sent"),
        (b'{"target":"t","arguments":' + b"[" * 99 + b"]" * 99 + b"}", "deeper than 64"),
        (b'["target"]', "body must be"),
        (b'{"arguments":[]}', "target is missing"),
        (b'{"target":""}', "target is missing"),
        (b'{"target":"t","arguments":"x"}', "must be a list"),
    ],
)
async def test_message_that_cannot_be_sent(cloud: Cloud, body: bytes, says: str) -> None:
    """A message some client could not read is refused with the reason."""
    url = f"{cloud.url}{V2022}/:send"
    headers = {"Authorization": f"Bearer {a_server_token(url)}"}
    response = await cloud.http.post(url, params=VERSION, content=body, headers=headers)

    assert response.status_code == 400
    assert says in response.json()["message"]


async def test_message_with_other_casing_and_no_arguments(cloud: Cloud) -> None:
    """Field names are read in any case, and arguments may be left out."""
    async with a_raw_client(cloud) as client:
        await cloud.call("POST", f"{V2022}/:send", {"Target": "newMessage"})

        assert await client.next() == {"type": 1, "target": "newMessage", "arguments": []}


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_message_above_a_megabyte(cloud: Cloud, is_chunked: bool) -> None:
    """A body above 1 MB is too large, announced or not."""
    large = json.dumps({"target": "t", "arguments": ["x" * 1024 * 1024]}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 65536):
            yield large[start : start + 65536]

    url = f"{cloud.url}{V2022}/:send"
    headers = {"Authorization": f"Bearer {a_server_token(url)}"}
    content = chunks() if is_chunked else large
    response = await cloud.http.post(url, params=VERSION, content=content, headers=headers)

    assert response.status_code == 413


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "no token"),
        ("nonsense", "not good"),
        (a_server_token("http://x/", exp=1), "expired"),
        (a_client_token(), "opens a client connection"),
        (a_server_token("http://x/", aud=None, exp=2**31), "no aud"),
        (jwt.encode({"aud": "x", "exp": 2**31}, "0" * 44, algorithm="HS256"), "not good"),
        (jwt.encode({"aud": "x"}, KEY, algorithm="HS256"), "must be seconds"),
    ],
)
async def test_data_plane_token_that_is_not_good(cloud: Cloud, token: str | None, says: str) -> None:
    """The data plane opens to the access key only, and to tokens that end."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for path in (f"{V2022}/:send", V1):
        response = await cloud.http.post(f"{cloud.url}{path}", params=VERSION, json=MESSAGE, headers=headers)

        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert says in response.json()["message"]


async def test_data_plane_wrong_paths(cloud: Cloud) -> None:
    """A wrong method names the right ones; a wrong path is not found."""
    wrong_method = await cloud.call("GET", f"{V2022}/:send")
    wrong_path = await cloud.call("POST", f"{V2022}/:shout", MESSAGE)
    bad_ttl = await cloud.call("PUT", f"{V2022}/users/a/groups/g", ttl="soon")

    assert (wrong_method.status_code, wrong_method.json()["message"][-4:]) == (405, "POST")
    assert wrong_path.status_code == 404
    assert (bad_ttl.status_code, "ttl is 'soon'" in bad_ttl.text) == (400, True)


async def test_generated_token_opens_the_hub(cloud: Cloud) -> None:
    """The service mints tokens for clients too."""
    response = await cloud.call("POST", f"{V2022}/:generateToken", userId="zoe", minutesToExpire=5)

    async with a_raw_client(cloud, token=response.json()["token"]):
        assert [one.user_id for one in cloud.service.list_connections()] == ["zoe"]


async def test_list_of_a_groups_connections(cloud: Cloud) -> None:
    """A group shows who is in it."""
    async with a_raw_client(cloud):
        [connection_id] = cloud.service.hub("chat").connections
        cloud.service.hub("chat").add_user("alice", "g")
        response = await cloud.call("GET", f"{V2022}/groups/g/connections")

    assert response.json() == {"value": [{"connectionId": connection_id, "userId": "alice"}]}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", f"{V2022}/connections/{{id}}"),
        ("POST", f"{V2022}/:closeConnections"),
        ("POST", f"{V2022}/groups/g/:closeConnections"),
        ("POST", f"{V2022}/users/alice/:closeConnections"),
    ],
)
async def test_client_closed_by_the_data_plane(cloud: Cloud, method: str, path: str) -> None:
    """A client that is closed is told the reason."""
    cloud.service.hub("chat").add_user("alice", "g")
    async with a_raw_client(cloud) as client:
        [connection_id] = cloud.service.hub("chat").connections
        await cloud.call(method, path.format(id=connection_id), reason="maintenance")

        assert await client.next() == {"type": 7, "error": "maintenance"}
        assert await client.ends() == 1000
        assert cloud.service.connections() == 0


# --- browsers -------------------------------------------------------------------------------------

PAGE = "http://localhost:3000"


@pytest.mark.parametrize("path", ["/client/negotiate", "/client/", "/client"])
async def test_preflight(cloud: Cloud, path: str) -> None:
    """A page on another origin may ask with credentials and with the headers the client uses."""
    asked = "authorization,x-requested-with,x-signalr-user-agent"
    response = await cloud.http.options(
        f"{cloud.url}{path}?hub=chat",
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": asked,
        },
    )

    assert response.status_code == 204
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert response.headers["Access-Control-Allow-Credentials"] == "true"
    assert response.headers["Access-Control-Allow-Headers"] == asked
    assert response.headers["Vary"] == "Origin"
    assert {"GET", "POST", "DELETE"} <= set(response.headers["Access-Control-Allow-Methods"].split(", "))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/client/negotiate?hub=chat&access_token={token}", 200),
        ("POST", "/client/negotiate?hub=chat", 401),
        ("POST", "/client/negotiate?hub=1&access_token={token}", 400),
        ("GET", "/client/?hub=chat&id=none&access_token={token}", 404),
        ("PUT", "/client/?hub=chat&access_token={token}", 405),
    ],
)
async def test_cors_on_real_answers(cloud: Cloud, method: str, path: str, status: int) -> None:
    """A page can read every answer, a refusal too."""
    response = await cloud.http.request(
        method, cloud.url + path.format(token=a_client_token()), headers={"Origin": PAGE}
    )

    assert response.status_code == status
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert response.headers["Access-Control-Allow-Credentials"] == "true"
    assert response.headers["Vary"] == "Origin"


async def test_event_stream_by_hand(cloud: Cloud) -> None:
    """A page reads the stream from its first byte: a comment, then records."""
    token = (await cloud.negotiate())["connectionToken"]
    url = f"{cloud.url}/client/?hub=chat&id={token}&access_token={a_client_token()}"
    headers = {"Origin": PAGE, "Accept": "text/event-stream"}
    async with cloud.http.stream("GET", url, headers=headers) as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        assert stream.headers["Access-Control-Allow-Origin"] == PAGE
        assert stream.headers["Access-Control-Allow-Credentials"] == "true"
        chunks = stream.aiter_raw()
        assert await anext(chunks) == b":\r\n\r\n"
        posted = await cloud.http.post(url, content=HANDSHAKE)
        assert posted.status_code == 202
        assert await anext(chunks) == b"data: {}\x1e\r\n\r\n"
        cloud.service.close_all(allow_reconnect=True)
        rest = [chunk async for chunk in chunks]

    assert rest == [b'data: {"type":7,"allowReconnect":true}\x1e\r\n\r\n']


async def test_event_stream_with_messagepack(cloud: Cloud) -> None:
    """Server-Sent Events carry text: a binary protocol is refused."""
    token = (await cloud.negotiate())["connectionToken"]
    url = f"{cloud.url}/client/?hub=chat&id={token}&access_token={a_client_token()}"
    async with cloud.http.stream("GET", url, headers={"Accept": "text/event-stream"}) as stream:
        chunks = stream.aiter_raw()
        await anext(chunks)
        await cloud.http.post(url, content=HANDSHAKE.replace("json", "messagepack"))
        rest = b"".join([chunk async for chunk in chunks])

    assert b"carry text only" in rest


# --- long polling ---------------------------------------------------------------------------------


async def a_polling_client(cloud: Cloud, token: str | None = None) -> str:
    """The URL of a long-polling client that has shaken hands."""
    bearer = token or a_client_token()
    connection = (await cloud.negotiate(bearer))["connectionToken"]
    url = f"{cloud.url}/client/?hub=chat&id={connection}&access_token={bearer}"
    first = await cloud.http.get(url)
    assert (first.status_code, first.content) == (200, b"")
    assert (await cloud.http.post(url, content=HANDSHAKE)).status_code == 202
    shaken = await cloud.http.get(url)
    assert (shaken.status_code, shaken.text) == (200, "{}" + END)
    return url


async def a_held_poll(cloud: Cloud) -> LongPollingConnection:
    """The one polling client, once its poll is held."""
    [connection] = cloud.service.hub("chat").connections.values()
    assert isinstance(connection, LongPollingConnection)
    await until(lambda: connection._poll == 3)
    return connection


async def test_poll_with_nothing_to_say() -> None:
    """A poll is held, then answered empty; the client asks again."""
    options = Options(poll_hold=timedelta(milliseconds=10))
    async with a_cloud(options=options) as cloud:
        url = await a_polling_client(cloud)

        response = await cloud.http.get(url)

        assert (response.status_code, response.content) == (200, b"")
        assert cloud.service.connections() == 1


async def test_poll_after_the_end(cloud: Cloud) -> None:
    """A closed client fetches the close record, then hears 204, then is unknown."""
    url = await a_polling_client(cloud)
    await cloud.say("", 1)
    cloud.service.close_all(allow_reconnect=True)

    answers = [await cloud.http.get(url) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 204, 404]
    assert answers[0].text.endswith('[1]}\x1e{"type":7,"allowReconnect":true}' + END)


async def test_poll_taken_over_by_a_newer_one(cloud: Cloud) -> None:
    """A second poll lets go of the first, and messages go to the second."""
    url = await a_polling_client(cloud)
    first = asyncio.create_task(cloud.http.get(url))
    await a_held_poll(cloud)
    second = asyncio.create_task(cloud.http.get(url))

    assert (await first).status_code == 204
    await cloud.say("", "for the second")
    assert "for the second" in (await second).text


async def test_poll_ended_by_the_client(cloud: Cloud) -> None:
    """DELETE ends the connection and lets go of the held poll."""
    url = await a_polling_client(cloud)
    held = asyncio.create_task(cloud.http.get(url))
    await a_held_poll(cloud)

    assert (await cloud.http.delete(url)).status_code == 202
    assert (await held).status_code == 204
    assert cloud.service.connections() == 0


async def test_poll_with_a_token_that_ended() -> None:
    """A long-polling client is asked for a good token at each poll."""
    clock = MovingClock()
    async with a_cloud(now=clock) as cloud:
        url = await a_polling_client(cloud)
        clock.ahead = timedelta(hours=2)

        assert (await cloud.http.get(url)).status_code == 401


async def test_polling_client_that_vanished() -> None:
    """A client that stops asking is forgotten, between polls or with a poll open."""
    options = Options(sweep_every=timedelta(milliseconds=20), poll_grace=timedelta(milliseconds=100))
    async with a_cloud(options=options) as cloud:
        await a_polling_client(cloud)
        url = await a_polling_client(cloud)
        held = asyncio.create_task(cloud.http.get(url))
        await until(lambda: cloud.service.connections() == 1)
        held.cancel()
        await until(lambda: cloud.service.connections() == 0)

        assert (await cloud.http.get(url)).status_code == 404


async def test_message_while_the_poll_is_cut(cloud: Cloud) -> None:
    """What a cut poll could not carry waits for the next one."""
    url = await a_polling_client(cloud)
    async with an_http_client() as other:
        held = asyncio.create_task(other.get(url))
        connection = await a_held_poll(cloud)
        held.cancel()
        with suppress(asyncio.CancelledError):
            await held
    await until(lambda: connection._holder is None)
    await cloud.say("", "kept")

    assert "kept" in (await cloud.http.get(url)).text


async def test_client_body_above_a_megabyte(cloud: Cloud) -> None:
    """What clients post has the same limit."""
    url = await a_polling_client(cloud)

    assert (await cloud.http.post(url, content=b"x" * (1024 * 1024 + 1))).status_code == 413


async def test_post_to_a_websocket(cloud: Cloud) -> None:
    """A WebSocket client has no use for POST, and a GET without id opens nothing."""
    token = (await cloud.negotiate())["connectionToken"]
    async with a_raw_client(cloud, connection_id=token):
        url = f"{cloud.url}/client/?hub=chat&access_token={a_client_token()}"
        assert (await cloud.http.post(f"{url}&id={token}", content=b"")).status_code == 405
        assert (await cloud.http.get(url)).status_code == 400


# --- records --------------------------------------------------------------------------------------


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(ANY_JSON))
def test_arguments_in_both_protocols(arguments: list[Any]) -> None:
    """Whatever JSON can say arrives as it was, in JSON and in MessagePack."""
    record = invocation("t", arguments)
    as_json = record.encoded(HubProtocol.JSON)
    packed = record.encoded(HubProtocol.MESSAGEPACK)

    assert as_json.count(END.encode()) == 1
    assert json.loads(as_json[:-1]) == {"type": 1, "target": "t", "arguments": arguments}
    assert list(read_kinds(HubProtocol.JSON, as_json * 2)) == [1, 1]
    assert list(read_kinds(HubProtocol.MESSAGEPACK, packed * 2)) == [1, 1]
    body = packed[1 if packed[0] < 0x80 else 2 if packed[1] < 0x80 else 3 :]
    assert msgpack.unpackb(body) == [1, {}, None, "t", arguments, []]


@pytest.mark.parametrize("length", [0, 62, 63, 64, 65_470, 65_480, 65_500, 200_000])
async def test_frame_lengths(cloud: Cloud, length: int) -> None:
    """A record of any length is one frame a strict client accepts."""
    async with a_raw_client(cloud) as client:
        await cloud.say("", "x" * length)

        assert await client.hears() == ["x" * length]


async def test_compression_is_refused(cloud: Cloud) -> None:
    """A client may offer compression; it is not taken."""
    headers = {"Authorization": f"Bearer {a_client_token()}"}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{cloud.url}/client/?hub=chat", headers=headers, compress=15) as socket,
    ):
        assert socket.compress == 0


async def test_messagepack_by_hand(cloud: Cloud) -> None:
    """MessagePack records are arrays behind their length; numbers too large become doubles."""
    hello = HANDSHAKE.replace("json", "messagepack")
    async with a_raw_client(cloud, hello=hello) as client:
        assert (await client.socket.receive_bytes()) == b"{}\x1e"
        await cloud.say("", 2**70, 10**400, {"a": ["x" * 200]})
        data = await client.socket.receive_bytes()

        assert (data[0] & 0x7F) | data[1] << 7 == len(data) - 2
        arguments = [float(2**70), float("inf"), {"a": ["x" * 200]}]
        assert msgpack.unpackb(data[2:]) == [1, {}, None, "newMessage", arguments, []]


async def test_several_records_in_one_frame(cloud: Cloud) -> None:
    """A handshake and pings may share a frame; a close record is a goodbye."""
    ping, close = '{"type":6}' + END, '{"type":7}' + END
    async with a_raw_client(cloud, hello=HANDSHAKE + ping + ping) as client:
        assert await client.next() == {}
        await client.socket.send_str(ping + close)

        assert await client.ends() == 1000
        assert cloud.service.connections() == 0


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        ("hello" + END, "not JSON"),
        ('{"protocol":"json","version":1}', "does not end with the record separator"),
        ('{"protocol":"xml","version":1}' + END, "'xml' is not supported"),
        ('{"protocol":"json","version":9}' + END, "Version 9"),
        ("[]" + END, "no JSON object"),
    ],
)
async def test_handshake_that_is_refused(cloud: Cloud, hello: str, says: str) -> None:
    """A client that starts wrongly is told what is wrong, and let go."""
    async with a_raw_client(cloud, hello=hello) as client:
        assert says in (await client.next())["error"]
        await client.ends()


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{" + END, "not JSON"),
        ('{"type":6}', "does not end with the record separator"),
        ('{"type":99}' + END, "no record of type 99"),
        ('{"type":"6"}' + END, "no number as its type"),
        ('{"type":1,"target":"t","arguments":[]}' + END, "no upstream"),
        ('{"type":4,"invocationId":"1","target":"t","arguments":[]}' + END, "no upstream"),
    ],
)
async def test_record_that_is_refused(cloud: Cloud, record: str, says: str) -> None:
    """A client that says what cannot be heard gets a close record with the reason."""
    async with a_raw_client(cloud) as client:
        await client.socket.send_str(record)
        told = await client.next()

        assert (told["type"], says in told["error"]) == (7, True)
        await client.ends()


@pytest.mark.parametrize("data", [b"\x05\x91", b"\x01\xc1", b"\x01\x90", b"\x02\x91\xa0", b"\xff\xff\xff\xff\xff"])
async def test_messagepack_record_that_is_refused(cloud: Cloud, data: bytes) -> None:
    """Broken MessagePack ends in a close record too."""
    hello = HANDSHAKE.replace("json", "messagepack")
    async with a_raw_client(cloud, hello=hello) as client:
        await client.socket.receive_bytes()
        await client.socket.send_bytes(data)
        told = msgpack.unpackb((await client.socket.receive_bytes())[1:])

        assert (told[0], "MessagePack" in told[1], told[2]) == (7, True, False)


async def test_handshake_that_never_comes() -> None:
    """A client that opens a line and says nothing is let go after the handshake timeout."""
    options = Options(sweep_every=timedelta(milliseconds=20), handshake_timeout=timedelta(milliseconds=50))
    async with a_cloud(options=options) as cloud, a_raw_client(cloud, hello="") as client:
        assert "too long" in (await client.next())["error"]
        await client.ends()


# --- lines ----------------------------------------------------------------------------------------


async def test_silent_line_is_kept_alive() -> None:
    """Pings follow silence, and a client that never speaks is not let go."""
    options = Options(sweep_every=timedelta(milliseconds=20), keep_alive=timedelta(milliseconds=50))
    async with a_cloud(options=options) as cloud, a_raw_client(cloud) as client:
        assert [await client.next() for _ in range(3)] == [{"type": 6}] * 3
        [connection] = cloud.service.hub("chat").connections.values()
        connection.tend(time.monotonic() + 10**6)
        assert not connection.is_gone


async def test_ping_only_after_silence(cloud: Cloud) -> None:
    """A line that carried something lately needs no ping."""
    async with a_raw_client(cloud) as client:
        [connection] = cloud.service.hub("chat").connections.values()
        connection.tend(connection._last_sent + 11.9)
        connection.tend(connection._last_sent + 12)
        await cloud.say("", "first")

        assert [(await client.next())["type"] for _ in range(2)] == [6, 1]


async def test_burst_is_one_write(cloud: Cloud) -> None:
    """What a client gets within one tick leaves in one write, in order."""

    class Counting:
        def __init__(self, real: asyncio.Transport) -> None:
            self._real = real
            self.writes: list[bytes] = []

        def write(self, data: bytes) -> None:
            self.writes.append(data)
            self._real.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    async with a_raw_client(cloud) as client:
        [connection] = cloud.service.hub("chat").connections.values()
        assert isinstance(connection, WebSocketConnection)
        counting = Counting(connection._transport)
        connection._transport = counting  # type: ignore[assignment]
        hub = cloud.service.hub("chat")
        for _ in range(50):
            hub.send_to_all(PING)
        heard = [await client.next() for _ in range(50)]

    assert heard == [{"type": 6}] * 50
    assert len(counting.writes) == 1


async def test_order_however_it_is_told(cloud: Cloud) -> None:
    """A client gets what it is told in order, whether it was told alone, with its group or with everybody."""
    async with a_raw_client(cloud) as client:
        hub = cloud.service.hub("chat")
        [connection] = hub.connections.values()
        hub.add_user("alice", "g")
        hub.add_connection(connection.connection_id, "h")
        for told in (1, 2, 3, 5, 7):
            numbers = list(range(7 * told))
            for number in numbers:
                record = invocation("newMessage", [number])
                match number * told % 6:
                    case 0:
                        hub.send_to_all(record)
                    case 1:
                        hub.send_to_group("g", record)
                    case 2:
                        hub.send_to_connection(connection.connection_id, record)
                    case 3:
                        hub.send_to_user("alice", record)
                    case 4:
                        connection.queue(record)
                    case _:
                        hub.send_to_group("h", record)
                if number % told == 0:
                    await asyncio.sleep(0)
            assert [await client.hears() for _ in numbers] == [[number] for number in numbers]


async def test_last_word_comes_last(cloud: Cloud) -> None:
    """What everybody was told just before a client is closed reaches it before the close record."""
    async with a_raw_client(cloud) as client:
        hub = cloud.service.hub("chat")
        [connection] = hub.connections.values()
        hub.send_to_all(invocation("newMessage", ["news"]))
        connection.end(close("bye"))

        assert await client.hears() == ["news"]
        assert await client.next() == {"type": 7, "error": "bye"}


async def test_many_clients_of_one_message(cloud: Cloud) -> None:
    """More clients than are written to at once each hear two messages once, in order, in their own protocol."""
    hello = '{"protocol":"messagepack","version":1}' + END
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(a_raw_client(cloud, f"u{n}")) for n in range(3)]
        packed = await stack.enter_async_context(a_raw_client(cloud, "packed", hello=hello))
        assert await packed.socket.receive_bytes() == b"{}\x1e"
        hub = cloud.service.hub("chat")
        [*_, one] = hub.connections.values()
        counted: list[str] = []

        class Extra(WebSocketConnection):
            """A connection that only notes what it is told."""

            __slots__ = ()

            def write(self, records: list[Record], now: float) -> None:
                counted.extend(record.encoded(HubProtocol.JSON).decode() for record in records)

        for n in range(3000):
            extra = Extra(f"extra-{n}", "chat", None, one._transport, one._around, socket=web.WebSocketResponse())
            hub.connections[extra.connection_id] = extra
        first, second = invocation("newMessage", ["first"]), invocation("newMessage", ["second"])
        hub.send_to_all(first)
        hub.send_to_all(second)

        assert [await one.hears() for one in clients for _ in range(2)] == [["first"], ["second"]] * 3
        data = b""
        while len(data) < len(first.encoded(HubProtocol.MESSAGEPACK) + second.encoded(HubProtocol.MESSAGEPACK)):
            data += (await packed.socket.receive(timeout=PATIENCE)).data
        assert data == first.encoded(HubProtocol.MESSAGEPACK) + second.encoded(HubProtocol.MESSAGEPACK)
        await until(lambda: len(counted) == 6000)
        assert Counter(counted) == {one.encoded(HubProtocol.JSON).decode(): 3000 for one in (first, second)}


async def shake_hands_by_hand(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, user: str) -> None:
    """Open a WebSocket on a bare line, which reads only when told to."""
    writer.write(
        (
            f"GET /client/?hub=chat&access_token={a_client_token(user)} HTTP/1.1\r\n"
            "Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        ).encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    masked = HANDSHAKE.encode()
    writer.write(bytes([0x81, 0x80 | len(masked)]) + bytes(4) + masked)


def in_frames(data: bytes) -> list[Any]:
    """The first argument of each message in a row of large frames."""
    heard = []
    while data:
        assert data[:2] == b"\x81\x7f"
        end = 10 + int.from_bytes(data[2:10])
        assert len(data) >= end
        heard.append(json.loads(data[10 : end - 1])["arguments"][0])
        data = data[end:]
    return heard


async def test_client_that_reads_late(cloud: Cloud) -> None:
    """Messages that do not fit the line at once arrive whole and in order when the client reads."""
    port = int(cloud.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 27)
    await shake_hands_by_hand(reader, writer, "late")
    assert await reader.readexactly(5) == b"\x81\x03{}\x1e"
    hub = cloud.service.hub("chat")
    [connection] = hub.connections.values()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    line = writer.get_extra_info("socket")
    text, count, data = "x" * 300_000, 0, b""
    while not connection._backlog():
        hub.send_to_all(invocation("newMessage", [count, text]))
        count += 1
        await asyncio.sleep(0)
        assert count < 1000

    # The line has room again, and the service has had no turn to write what waits.
    with suppress(BlockingIOError):
        while True:
            data += os.read(line.fileno(), 1 << 20)
    connection.write([invocation("newMessage", [count, text])], time.monotonic())
    connection.end(close("bye"))

    writer.transport.resume_reading()  # type: ignore[attr-defined]
    goodbye = b'\x81\x19{"type":7,"error":"bye"}\x1e'
    data += await asyncio.wait_for(reader.readuntil(goodbye), PATIENCE)
    writer.close()
    messages = data.removesuffix(goodbye)
    assert in_frames(messages) == list(range(count + 1))


async def test_line_that_breaks_while_it_is_told(cloud: Cloud) -> None:
    """A client whose line is found broken is let go of, and the others hear."""
    async with a_raw_client(cloud, "dead") as dead, a_raw_client(cloud, "quick") as quick:
        hub = cloud.service.hub("chat")
        [gone, _] = hub.connections.values()
        gone._transport.get_extra_info("socket").shutdown(socket.SHUT_WR)
        hub.send_to_all(invocation("newMessage", ["news"]))

        assert await quick.hears() == ["news"]
        assert gone.is_gone
        assert list(hub.connections.values()) != [gone]
        await dead.socket.close()


async def test_client_that_does_not_read() -> None:
    """A slow client is cut at the buffer limit, and holds up nobody."""
    options = Options(buffer_limit=256 * 1024)
    async with a_cloud(options=options) as cloud, a_raw_client(cloud, "quick") as quick:
        port = int(cloud.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        await shake_hands_by_hand(reader, writer, "slow")
        await until(lambda: len(cloud.service.hub("chat").connections) == 2)

        text, count = "x" * 64_000, 0
        while cloud.service.connections() == 2:
            count += 1
            await cloud.say("", count, text)
            assert await quick.hears() == [count, text]
            assert count < 1000
        assert [one.user_id for one in cloud.service.list_connections()] == ["quick"]
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_service_that_closes() -> None:
    """On shutdown every client is told to come back, and nothing new is let in."""
    async with a_cloud() as cloud, a_raw_client(cloud) as client:
        closing = asyncio.create_task(cloud.service.close())

        assert await client.next() == {"type": 7, "allowReconnect": True}
        assert await client.ends() == 1001
        await closing
        refused = await cloud.http.post(f"{cloud.url}/client/negotiate?hub=chat&access_token={a_client_token()}")
        assert refused.status_code == 503


async def test_status(cloud: Cloud) -> None:
    """The status shows who is here and how much was delivered."""
    async with a_raw_client(cloud, None):
        await cloud.say("", 1)
        await cloud.say("users/nobody", 2)
        [info] = cloud.service.list_connections()

        assert (cloud.service.connections(), cloud.service.sent()) == (1, 1)
        assert (info.hub, info.user_id, info.transport, info.protocol) == (
            "chat",
            None,
            "WebSockets",
            "json",
        )


# --- strict switches ------------------------------------------------------------------------------


async def test_free_tier_connections() -> None:
    """The free tier takes twenty clients; the next is refused at negotiate and at connect."""
    async with a_cloud(options=FREE_TIER) as cloud:
        waiting = (await cloud.negotiate())["connectionToken"]
        async with asyncio.TaskGroup() as tasks:
            full = asyncio.Event()

            async def stay() -> None:
                async with a_raw_client(cloud):
                    await full.wait()

            for _ in range(20):
                tasks.create_task(stay())
            await until(lambda: len(cloud.service.hub("chat").connections) == 20)
            url = f"{cloud.url}/client/negotiate?hub=chat&access_token={a_client_token()}"
            assert (await cloud.http.post(url)).status_code == 429
            for connection_id in ("", waiting):
                with pytest.raises(aiohttp.WSServerHandshakeError, match="429"):
                    async with a_raw_client(cloud, connection_id=connection_id):
                        pass
            full.set()


async def test_free_tier_messages() -> None:
    """When the day's messages are used up, clients are told and let go until midnight UTC."""
    clock = MovingClock()
    options = Options(max_messages_a_day=5)
    async with a_cloud(options=options, now=clock) as cloud:
        async with a_raw_client(cloud, "a") as one, a_raw_client(cloud, "b") as two:
            await cloud.say("", "x" * 3000)
            assert len((await one.hears())[0]) == len((await two.hears())[0]) == 3000
            await cloud.say("", "one piece to two clients: six in all")
            for client in (one, two):
                assert await client.next() == {"type": 7, "error": "Message count reaches limit."}
                await client.ends()
        async with a_raw_client(cloud) as late:
            assert (await late.next())["error"] == "Message count reaches limit."

        clock.ahead = timedelta(days=1)
        token = a_client_token(exp=int(time.time()) + 10**6)
        async with a_raw_client(cloud, token=token):
            assert cloud.service.connections() == 1


def test_access_key_that_is_too_short() -> None:
    """A key HS256 cannot use is refused when the service is made."""
    with pytest.raises(ValueError, match="at least 32"):
        SignalRService("short", ":memory:")
