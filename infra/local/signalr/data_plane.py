"""The door for servers, /api/: the REST data plane, in its current shape and in v1."""

import re
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import unquote

from aiohttp import web

from infra.local.signalr import protocol
from infra.local.signalr.body import read_body
from infra.local.signalr.hub import Hub, Switchboard
from infra.local.signalr.names import hub_name, part_name
from infra.local.signalr.protocol import Record, strict_json
from infra.local.signalr.refusal import RefusalError
from infra.local.signalr.tokens import Tokens

_OLDEST = "2022-06-01"
_VERSION = re.compile(r"\d{4}-\d{2}-\d{2}(-preview)?")
_V1 = "/api/v1/hubs/"
_CURRENT = "/api/hubs/"

_NO_CONNECTION = "Warning.Connection.NotExisted"
_NO_CONNECTION_TO_GROUP = "Error.Connection.NotExisted"
_NO_GROUP = "Warning.Group.NotExisted"
_NO_USER = "Warning.User.NotExisted"
_NOT_IN_GROUP = "Info.User.NotInGroup"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One request, understood: the hub, the names in its path, and the request itself."""

    hub: Hub
    names: Mapping[str, str]
    request: web.Request
    tokens: Tokens

    @property
    def user(self) -> str:
        return self.names["user"]

    @property
    def group(self) -> str:
        return self.names["group"]

    @property
    def connection(self) -> str:
        return self.names["connection"]

    @property
    def excluded(self) -> frozenset[str]:
        return frozenset(self.request.query.getall("excluded", []))

    def whole(self, name: str, least: int) -> int | None:
        given = self.request.query.get(name)
        if given is None:
            return None
        if not given.isdecimal() or len(given) > 10 or int(given) < least:
            raise RefusalError(400, f"{name} is {given!r}: give a whole number from {least}")
        return int(given)

    async def message(self) -> Record:
        try:
            body = strict_json(await read_body(self.request))
        except ValueError as e:
            raise RefusalError(400, f"the body is not JSON: {e}") from e
        if not isinstance(body, dict):
            raise RefusalError(400, 'the body must be {"target": "...", "arguments": [...]}')
        fields = {str(name).lower(): value for name, value in body.items()}
        target, arguments = fields.get("target"), fields.get("arguments")
        if not isinstance(target, str) or not target:
            raise RefusalError(400, "target is missing: name the method clients listen to")
        if arguments is not None and not isinstance(arguments, list):
            raise RefusalError(400, "arguments must be a list, even for a single argument")
        try:
            return protocol.invocation(target, arguments or [])
        except ValueError as e:
            raise RefusalError(400, f"the arguments cannot be sent: {e}") from e

    def end(self, connections: list[str]) -> None:
        for connection_id in connections:
            found = self.hub.connections.get(connection_id)
            if found is not None and connection_id not in self.excluded:
                found.end(protocol.close(self.request.query.get("reason")))


type _Verb = Callable[[_Call], Awaitable[object]]


async def _send_to_all(call: _Call) -> None:
    call.hub.send_to_all(await call.message(), call.excluded)


async def _send_to_user(call: _Call) -> None:
    call.hub.send_to_user(call.user, await call.message())


async def _send_to_group(call: _Call) -> None:
    call.hub.send_to_group(call.group, await call.message(), call.excluded)


async def _send_to_connection(call: _Call) -> None:
    call.hub.send_to_connection(call.connection, await call.message())


async def _add_user(call: _Call) -> None:
    seconds = call.whole("ttl", 0)
    ttl = None if seconds is None else timedelta(seconds=min(seconds, 10**9))
    call.hub.add_user(call.user, call.group, ttl)


async def _remove_user(call: _Call) -> None:
    call.hub.remove_user(call.user, call.group)


async def _remove_user_from_all(call: _Call) -> None:
    call.hub.remove_user_from_all(call.user)


async def _find_user_in_group(call: _Call) -> None:
    if not call.hub.has_user(call.user, call.group):
        raise RefusalError(404, f"user {call.user} is not in group {call.group}", code=_NOT_IN_GROUP)


async def _add_connection(call: _Call) -> None:
    _require(call, there_is=call.hub.add_connection(call.connection, call.group))


async def _remove_connection(call: _Call) -> None:
    _require(call, there_is=call.hub.remove_connection(call.connection, call.group))


async def _remove_connection_from_all(call: _Call) -> None:
    _require(call, there_is=call.hub.remove_connection_from_all(call.connection))


async def _close_connection(call: _Call) -> None:
    call.end([call.connection])


async def _close_all(call: _Call) -> None:
    call.end(list(call.hub.connections))


async def _close_group(call: _Call) -> None:
    call.end([one.connection_id for one in call.hub.of_group(call.group)])


async def _close_user(call: _Call) -> None:
    call.end([one.connection_id for one in call.hub.of_user(call.user)])


async def _find_connection(call: _Call) -> None:
    if call.connection not in call.hub.connections:
        raise RefusalError(404, f"there is no connection {call.connection}", code=_NO_CONNECTION)


async def _find_group(call: _Call) -> None:
    if not call.hub.of_group(call.group):
        raise RefusalError(404, f"nobody is in group {call.group}", code=_NO_GROUP)


async def _find_user(call: _Call) -> None:
    if not call.hub.of_user(call.user):
        raise RefusalError(404, f"user {call.user} is not connected", code=_NO_USER)


async def _list_group(call: _Call) -> object:
    return {
        "value": [{"connectionId": one.connection_id, "userId": one.user_id} for one in call.hub.of_group(call.group)]
    }


async def _generate_token(call: _Call) -> object:
    minutes = call.whole("minutesToExpire", 1) or 60
    lifetime = timedelta(minutes=min(minutes, 10**6))
    user = call.request.query.get("userId")
    return {"token": call.tokens.mint(call.hub.name, user, lifetime)}


def _require(call: _Call, *, there_is: bool) -> None:
    if not there_is:
        raise RefusalError(404, f"there is no connection {call.connection}", code=_NO_CONNECTION_TO_GROUP)


@dataclass(frozen=True, slots=True)
class _Door:
    method: str
    path: tuple[str, ...]
    verb: _Verb
    status: int

    def names(self, segments: list[str]) -> dict[str, str] | None:
        """Read the path's names, when it is this door's."""
        if len(segments) != len(self.path):
            return None
        names = {}
        for expected, given in zip(self.path, segments, strict=True):
            if expected.startswith("{"):
                names[expected[1:-1]] = given
            elif expected != given:
                return None
        return names


def _door(line: str, verb: _Verb, status: int) -> list[_Door]:
    methods, _, path = line.partition(" ")
    segments = tuple(path.split("/")) if path else ()
    return [_Door(method, segments, verb, status) for method in methods.split(",")]


_DOORS = (
    *_door("POST :send", _send_to_all, 202),
    *_door("POST users/{user}/:send", _send_to_user, 202),
    *_door("POST groups/{group}/:send", _send_to_group, 202),
    *_door("POST connections/{connection}/:send", _send_to_connection, 202),
    *_door("PUT users/{user}/groups/{group}", _add_user, 200),
    *_door("DELETE users/{user}/groups/{group}", _remove_user, 204),
    *_door("HEAD users/{user}/groups/{group}", _find_user_in_group, 200),
    *_door("DELETE users/{user}/groups", _remove_user_from_all, 204),
    *_door("PUT groups/{group}/connections/{connection}", _add_connection, 200),
    *_door("DELETE groups/{group}/connections/{connection}", _remove_connection, 200),
    *_door("GET groups/{group}/connections", _list_group, 200),
    *_door("DELETE connections/{connection}/groups", _remove_connection_from_all, 200),
    *_door("DELETE connections/{connection}", _close_connection, 200),
    *_door("POST :closeConnections", _close_all, 204),
    *_door("POST groups/{group}/:closeConnections", _close_group, 204),
    *_door("POST users/{user}/:closeConnections", _close_user, 204),
    *_door("HEAD connections/{connection}", _find_connection, 200),
    *_door("HEAD groups/{group}", _find_group, 200),
    *_door("HEAD users/{user}", _find_user, 200),
    *_door("POST :generateToken", _generate_token, 200),
)
_DOORS_V1 = (
    *_door("POST", _send_to_all, 202),
    *_door("POST users/{user}", _send_to_user, 202),
    *_door("POST groups/{group}", _send_to_group, 202),
    *_door("POST connections/{connection}", _send_to_connection, 202),
    *_door("PUT groups/{group}/users/{user}", _add_user, 202),
    *_door("PUT users/{user}/groups/{group}", _add_user, 202),
    *_door("DELETE groups/{group}/users/{user}", _remove_user, 202),
    *_door("DELETE users/{user}/groups/{group}", _remove_user, 202),
    *_door("GET,HEAD groups/{group}/users/{user}", _find_user_in_group, 200),
    *_door("GET,HEAD users/{user}/groups/{group}", _find_user_in_group, 200),
    *_door("DELETE users/{user}/groups", _remove_user_from_all, 200),
    *_door("PUT groups/{group}/connections/{connection}", _add_connection, 200),
    *_door("DELETE groups/{group}/connections/{connection}", _remove_connection, 200),
    *_door("DELETE connections/{connection}", _close_connection, 202),
    *_door("GET,HEAD connections/{connection}", _find_connection, 200),
    *_door("GET,HEAD groups/{group}", _find_group, 200),
    *_door("GET,HEAD users/{user}", _find_user, 200),
)


class DataPlane:
    """Answers the REST calls that send messages and manage groups."""

    def __init__(self, switchboard: Switchboard, tokens: Tokens) -> None:
        self._switchboard = switchboard
        self._tokens = tokens

    def routes(self) -> list[web.RouteDef]:
        """List the data plane's paths; health comes without a token."""
        return [
            web.get("/api/health", _health),
            web.get("/api/v1/health", _health),
            web.route("*", _CURRENT + "{rest:.*}", self._on_call),
            web.route("*", _V1 + "{rest:.*}", self._on_call),
        ]

    async def _on_call(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except RefusalError as refusal:
            return refusal.response()
        except sqlite3.OperationalError as e:
            return RefusalError(503, f"the service's state is busy ({e}): try again").response()

    async def _answer(self, request: web.Request) -> web.Response:
        self._tokens.server(request)
        # Read raw: an encoded slash belongs to a name, as in groups/symbols%2FAAPL.
        raw = request.rel_url.raw_path
        is_v1 = raw.startswith(_V1)
        if not is_v1:
            _refuse_old(request.query.get("api-version"))
        hub, *segments = [unquote(part) for part in raw.removeprefix(_V1).removeprefix(_CURRENT).split("/")]
        if segments and not segments[-1]:
            segments.pop()
        name = hub_name(hub)
        door, names = _find(_DOORS_V1 if is_v1 else _DOORS, request.method, segments)
        for kind, given in names.items():
            part_name(kind, given)
        call = _Call(hub=self._switchboard.hub(name), names=names, request=request, tokens=self._tokens)
        answer = await door.verb(call)
        if answer is None:
            return web.Response(status=door.status)
        return web.json_response(answer, status=door.status)


async def _health(_request: web.Request) -> web.StreamResponse:
    return web.Response(status=200)


def _refuse_old(version: str | None) -> None:
    if version is None:
        raise RefusalError(400, f"api-version is missing: add ?api-version={_OLDEST} or later")
    if not _VERSION.fullmatch(version) or version < _OLDEST:
        raise RefusalError(400, f"api-version {version!r} is not served: use {_OLDEST} or later")


def _find(doors: tuple[_Door, ...], method: str, segments: list[str]) -> tuple[_Door, dict[str, str]]:
    others = []
    for door in doors:
        names = door.names(segments)
        if names is None:
            continue
        if door.method == method:
            return door, names
        others.append(door.method)
    path = "/".join(segments)
    if others:
        raise RefusalError(405, f"{method} is not served at {path!r}: use {', '.join(others)}")
    raise RefusalError(404, f"there is no operation at {path!r}: see the data plane's reference")
