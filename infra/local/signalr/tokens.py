"""Who may come in: bearer tokens signed with the access key."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import jwt
from aiohttp import web

from infra.local.signalr.names import hub_name
from infra.local.signalr.refusal import RefusalError

_LONGEST = 4096
_SHORTEST_KEY = 32
_EARLY = timedelta(minutes=5)
_USER_CLAIMS = (
    "asrs.s.uid",
    "nameid",
    "http://schemas.xmlsoap.org/ws/2005/05/identity/claims/nameidentifier",
    "sub",
)
_ONLY_SIGNATURE: jwt.types.Options = {
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_aud": False,
    "verify_sub": False,
    "verify_jti": False,
    "verify_iss": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who a client's token says it is, and which hub it opens."""

    hub: str
    user_id: str | None


class Tokens:
    """Checks and mints the service's tokens; the key is the text of the access key itself."""

    def __init__(self, access_key: str, now: Callable[[], datetime]) -> None:
        self._key = access_key.encode()
        self._now = now
        if len(self._key) < _SHORTEST_KEY:
            raise ValueError(f"access_key has {len(self._key)} bytes: HS256 needs at least {_SHORTEST_KEY}")

    def client(self, request: web.Request) -> Principal:
        """Let a client through to the one hub its request names.

        Raises:
            RefusalError: 400 without exactly one hub, 401 without a good token, 413 for a huge one.
        """
        hubs = request.query.getall("hub", [])
        if len(hubs) != 1:
            raise RefusalError(400, f"the URL names {len(hubs)} hubs: give exactly one, as ?hub=name")
        hub = hub_name(hubs[0])
        claims = self._claims(_bearer(request) or request.query.get("access_token"))
        if not any(_opens(audience, hub) for audience in _audiences(claims)):
            raise RefusalError(
                401,
                f"the token's aud is {claims.get('aud')!r}: it must be .../client/?hub={hub}",
            )
        return Principal(hub=hub, user_id=_user_id(claims))

    def server(self, request: web.Request) -> None:
        """Let a caller of the data plane through.

        Raises:
            RefusalError: 401 without a good token, or with one that was made for a client.
        """
        claims = self._claims(_bearer(request))
        audiences = _audiences(claims)
        if not audiences:
            raise RefusalError(401, "the token has no aud: it must be the URL of the request")
        if all(_path(audience) == "/client" for audience in audiences):
            raise RefusalError(401, "the token opens a client connection, not the data plane")

    def mint(self, hub: str, user_id: str | None, lifetime: timedelta) -> str:
        """Make a token that lets a client into the hub."""
        now = self._now()
        issued = int(now.timestamp())
        claims: dict[str, object] = {
            "nbf": issued,
            "exp": int((now + lifetime).timestamp()),
            "iat": issued,
            "aud": f"http://localhost/client/?hub={hub}",
        }
        if user_id:
            claims["asrs.s.uid"] = user_id
        return jwt.encode(claims, self._key, algorithm="HS256")

    def _claims(self, token: str | None) -> Mapping[str, object]:
        if not token:
            raise RefusalError(401, "no token: send Authorization: Bearer <token>")
        if len(token) > _LONGEST:
            raise RefusalError(413, f"the token has {len(token)} characters: at most {_LONGEST} are taken")
        try:
            claims: Mapping[str, object] = jwt.decode(token, self._key, algorithms=["HS256"], options=_ONLY_SIGNATURE)
        except jwt.InvalidTokenError as e:
            raise RefusalError(401, f"the token is not good: {e}") from e
        self._refuse_untimely(claims)
        return claims

    def _refuse_untimely(self, claims: Mapping[str, object]) -> None:
        now = self._now()
        ends, starts = claims.get("exp"), claims.get("nbf", 0)
        if not isinstance(ends, int | float) or not isinstance(starts, int | float):
            raise RefusalError(401, "the token's exp (and nbf) must be seconds since 1970")
        if ends <= now.timestamp():
            raise RefusalError(401, f"the token expired at {int(ends)}: negotiate again")
        if starts > (now + _EARLY).timestamp():
            raise RefusalError(401, f"the token is not valid before {int(starts)}")


def _bearer(request: web.Request) -> str | None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _audiences(claims: Mapping[str, object]) -> list[str]:
    given = claims.get("aud")
    many = given if isinstance(given, list) else [given]
    return [audience for audience in many if isinstance(audience, str)]


def _path(audience: str) -> str:
    try:
        return urlsplit(audience).path.rstrip("/").lower()
    except ValueError:
        return ""


def _opens(audience: str, hub: str) -> bool:
    # The SDK leaves the port out of aud, so scheme, host and port say nothing here.
    if _path(audience) != "/client":
        return False
    return [name.lower() for name in parse_qs(urlsplit(audience).query).get("hub", [])] == [hub]


def _user_id(claims: Mapping[str, object]) -> str | None:
    for name in _USER_CLAIMS:
        value = claims.get(name)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, str) and first:
            return first
    return None
