"""
Azure SignalR Service in serverless mode, over its REST data plane (api-version 2022-06-01).

Not the output binding: a delivery is recorded only after the service took it.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self
from urllib.parse import quote

from pydantic import SecretStr

from alerts.models import PUBLIC, Alert
from alerts.ports import Connection, Message
from shared.clock import Clock
from shared.errors import ConfigurationError, OutcomeUnknownError, RateLimitedError, RefusedError, UnavailableError
from shared.http_client import Answer, HttpClient

HUB = "alerts"
TARGET = "alert"
VERSION = "2022-06-01"
TOKEN_LIFE = timedelta(hours=1)
CALL_LIFE = timedelta(minutes=5)
LONGEST_WAIT = timedelta(days=1)
MEMBERSHIP = timedelta(days=1)
"""How long a user stays in a group without negotiating again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A connection string, taken apart."""

    endpoint: str
    client_endpoint: str
    access_key: SecretStr

    @classmethod
    def parse(cls, connection_string: str) -> Self:
        """
        Read ``Endpoint=...;AccessKey=...;Version=1.0;`` with optional Port and ClientEndpoint.

        Raises:
            ConfigurationError: a part is missing; the message shows the form, never the value.

        """
        pairs = (part.split("=", 1) for part in connection_string.split(";") if "=" in part)
        parts = {name.strip().lower(): value.strip() for name, value in pairs}
        endpoint, port = parts.get("endpoint", "").rstrip("/"), parts.get("port", "")
        is_address = endpoint.startswith(("http://", "https://")) and (not port or _is_port(port))
        if not is_address or not parts.get("accesskey"):
            raise ConfigurationError(
                "AZURE_SIGNALR_CONNECTION_STRING must have the form "
                "Endpoint=https://NAME.service.signalr.net;AccessKey=KEY;Version=1.0; with an optional Port=1 to 65535;"
            )
        if port:
            endpoint = f"{endpoint}:{port}"
        client = parts.get("clientendpoint", "").rstrip("/") or endpoint
        return cls(endpoint=endpoint, client_endpoint=client, access_key=SecretStr(parts["accesskey"]))


class SignalRChannel:
    """
    Channel and Hub over one SignalR service.

    Whoever is connected hears an alert once: receivers drop a version of an alert that they know by its id, and let
    a later version replace an earlier one. Who is not connected reads it from the API.
    """

    name = "signalr"
    is_keyed = True
    can_edit = True
    needs_address = False

    def __init__(self, connection_string: str, http: HttpClient, wall: Clock) -> None:
        self._service = Service.parse(connection_string)
        self._http = http
        self._wall = wall

    async def send(self, message: Message) -> str | None:
        calls = [
            self._call("POST", f"/api/hubs/{HUB}/{place}/:send", body)
            for item in ([message.item] if message.digest is None else message.digest)
            for body in [json.dumps({"target": TARGET, "arguments": [item]}).encode()]
            for place in _places(message.alert, item)
        ]
        ended = await asyncio.gather(*calls, return_exceptions=True)
        for trouble in filter(None, ended):
            raise trouble
        return None

    async def edit(self, provider_id: str | None, message: Message) -> None:
        """Send the new version: receivers put it in the place of the one they know."""
        await self.send(message)

    def connection(self, user_id: str) -> Connection:
        url = f"{self._service.client_endpoint}/client/?hub={HUB}"
        return Connection(url=url, access_token=self._token(url, TOKEN_LIFE, **{"asrs.s.uid": user_id}))

    def user_of(self, token: str) -> str | None:
        import jwt

        try:
            # Its times are not asked: whoever held this token is still the same guest.
            claims = jwt.decode(
                token,
                self._service.access_key.get_secret_value(),
                algorithms=["HS256"],
                options={"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False},
            )
        except jwt.InvalidTokenError:
            return None
        user_id = claims.get("asrs.s.uid")
        return user_id if isinstance(user_id, str) and user_id.startswith("guest-") else None

    async def join(self, user_id: str, group: str) -> None:
        path = f"/api/hubs/{HUB}/users/{quote(user_id, safe='')}/groups/{quote(group, safe='')}"
        try:
            await self._call("PUT", path, b"", ttl=int(MEMBERSHIP.total_seconds()))
        except OutcomeUnknownError as e:  # joining twice is joining once
            raise UnavailableError(str(e)) from None

    async def _call(self, method: str, path: str, body: bytes, **query: int) -> None:
        url = f"{self._service.endpoint}{path}"
        answer = await self._http.send(
            method,
            url,
            params={"api-version": VERSION, **query},
            headers={
                "Authorization": f"Bearer {self._token(url, CALL_LIFE)}",
                "Content-Type": "application/json",
            },
            content=body,
        )
        _check(answer)

    def _token(self, audience: str, life: timedelta, **claims: str) -> str:
        import jwt

        now = self._wall.now()
        whole = {"aud": audience, "iat": now, "nbf": now, "exp": now + life, **claims}
        return jwt.encode(whole, self._service.access_key.get_secret_value(), algorithm="HS256")


def _places(alert: Alert, item: Mapping[str, Any]) -> list[str]:
    """Who hears an item: the groups of its symbol and of all for what is public, else the subscriber alone."""
    if alert.subscriber != PUBLIC:
        return [f"users/{quote(alert.subscriber, safe='')}"]
    groups = (f"symbols/{item.get('symbol') or alert.symbol}", "symbols/all")
    return [f"groups/{quote(group, safe='')}" for group in groups]


def _check(answer: Answer) -> None:
    """The service's answers, in our words (facts: signalr.md section 5)."""
    match answer.status:
        case status if 200 <= status < 300:
            return
        case 401 | 403:
            raise ConfigurationError(
                f"SignalR refused our key ({answer.status}): check AZURE_SIGNALR_CONNECTION_STRING"
            )
        case 429:
            raise RateLimitedError("SignalR asked us to slow down", retry_after=_wait_of(answer))
        case 503:
            raise UnavailableError("SignalR answered 503")
        case status if status >= 500:
            raise OutcomeUnknownError(f"SignalR answered {status}")
        case status:
            raise RefusedError(f"SignalR refused the call ({status})")


def _wait_of(answer: Answer) -> timedelta | None:
    """How long the service asks us to wait; None when it does not say so in seconds."""
    try:
        seconds = float(answer.headers.get("retry-after", ""))
    except ValueError:
        return None
    return timedelta(seconds=min(seconds, LONGEST_WAIT.total_seconds())) if seconds >= 0 else None


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65_535
