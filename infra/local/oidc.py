"""
A small OpenID Connect issuer: whoever sits at this machine signs in under any name, as an operator if they like.

It speaks what the app and the web page rely on: discovery, a JWKS, the authorization code flow with PKCE behind a
sign-in page. ``POST /oidc/token?subject=NAME`` gives scripts and tests a token at once; ``POST /oidc/rotate`` makes a
new key, and the one before stays listed for two hours. The keys are in the cloud's state, in the clear: they open
nothing but this machine's app.
"""

import asyncio
import hashlib
import html
import re
import secrets
import sqlite3
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hmac import compare_digest
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode, urlsplit

from aiohttp import web

from infra.local.faults import problem
from shared.clock import Clock, SystemClock, format_instant, parse_instant

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

PATH = "/oidc"
AUDIENCE = "troop"
CLIENT_ID = "troop-web"
TOKEN_LIFE = timedelta(hours=1)
CODE_LIFE = timedelta(minutes=1)
KEPT = timedelta(hours=2)
"""How long a retired key stays listed: longer than any token that it signed."""
KEY_BITS = 2048
CODES = 1000

_LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
_LOCAL_ORIGIN = re.compile(r"http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_TABLES = """
CREATE TABLE IF NOT EXISTS oidc_keys (
    kid TEXT PRIMARY KEY, pem TEXT NOT NULL, made_at TEXT NOT NULL, retired_at TEXT
);
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign in to TROOP</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ margin: 12vh auto; max-width: 22rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }}
  label {{ display: block; margin: 1rem 0; }}
  input[name=subject] {{ display: block; width: 100%; box-sizing: border-box; padding: .5rem; font: inherit; }}
  button {{ padding: .5rem 1.2rem; font: inherit; }}
</style>
</head>
<body>
<h1>Sign in to TROOP</h1>
<p>This is the issuer of your own machine: choose who you are.</p>
<form method="post" action="{action}">
<label>Name <input name="subject" value="{hint}" required maxlength="255" autofocus autocomplete="username"></label>
<label><input type="checkbox" name="role" value="operator"> as an operator</label>
<button>Sign in</button>
</form>
</body>
</html>
"""


class _RefusedError(Exception):
    """The request is wrong; ``code`` is OAuth's word for how."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a page asks for when it sends somebody to sign in."""

    redirect_uri: str
    state: str | None
    nonce: str | None
    challenge: str

    @classmethod
    def read(cls, query: Mapping[str, str]) -> Self:
        """
        Check a request for a code, except where its answer goes.

        Raises:
            _RefusedError: it asks for what this issuer does not do.

        """
        if query.get("response_type") != "code":
            raise _RefusedError("unsupported_response_type", "response_type must be code")
        if query.get("code_challenge_method") != "S256" or not _CHALLENGE.fullmatch(query.get("code_challenge", "")):
            raise _RefusedError("invalid_request", "send a PKCE code_challenge with code_challenge_method=S256")
        if "openid" not in query.get("scope", "").split():
            raise _RefusedError("invalid_scope", "scope must hold openid")
        return cls(
            redirect_uri=query["redirect_uri"],
            state=query.get("state"),
            nonce=query.get("nonce"),
            challenge=query["code_challenge"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grant:
    """What a code may be changed into, once."""

    asked: _Asked
    subject: str
    roles: Sequence[str]
    expires_at: datetime


class OidcIssuer:
    """
    Signs people in, and their tokens with a key that survives a restart.

    *issuer* is the address that tokens carry; it is asked for late, because a free port is known late.
    """

    def __init__(self, state: sqlite3.Connection, issuer: Callable[[], str], *, clock: Clock | None = None) -> None:
        self._state = state
        self._issuer = issuer
        self._clock = clock or SystemClock()
        self._codes: dict[str, _Grant] = {}
        self._one_at_a_time = asyncio.Lock()
        self._signed = 0
        state.executescript(_TABLES)

    def routes(self) -> list[web.AbstractRouteDef]:
        """The issuer's paths."""
        return [
            web.get(f"{PATH}/.well-known/openid-configuration", self._show_configuration),
            web.get(f"{PATH}/keys", self._show_keys),
            web.get(f"{PATH}/authorize", self._show_page),
            web.post(f"{PATH}/authorize", self._sign_in),
            web.post(f"{PATH}/token", self._give_token),
            web.options(f"{PATH}/token", self._allow),
            web.post(f"{PATH}/rotate", self._rotate),
        ]

    def stats(self) -> dict[str, Any]:
        """How many tokens were signed since the start, and how many keys are listed."""
        return {"tokens": self._signed, "keys": len(self._listed())}

    # --- what clients read

    async def _show_configuration(self, request: web.Request) -> web.Response:
        issuer = self._issuer()
        return _json(
            request,
            {
                "issuer": issuer,
                "authorization_endpoint": f"{issuer}/authorize",
                "token_endpoint": f"{issuer}/token",
                "jwks_uri": f"{issuer}/keys",
                "response_types_supported": ["code"],
                "response_modes_supported": ["query"],
                "grant_types_supported": ["authorization_code"],
                "code_challenge_methods_supported": ["S256"],
                "token_endpoint_auth_methods_supported": ["none"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "scopes_supported": ["openid", "profile"],
                "claims_supported": ["sub", "name", "roles"],
            },
        )

    async def _show_keys(self, request: web.Request) -> web.Response:
        from jwt.algorithms import RSAAlgorithm

        await self._signing_key()
        keys = [
            {
                **RSAAlgorithm.to_jwk(_private(pem).public_key(), as_dict=True),
                "kid": kid,
                "use": "sig",
                "alg": "RS256",
                "key_ops": ["verify"],
            }
            for kid, pem in self._listed()
        ]
        return _json(request, {"keys": keys})

    # --- a person signs in

    async def _show_page(self, request: web.Request) -> web.Response:
        if fault := _wrong_client(request.query):
            return problem(400, fault)
        try:
            _Asked.read(request.query)
        except _RefusedError as e:
            return _back(request.query, error=e.code, error_description=str(e))
        if request.query.get("prompt") == "none":
            return _back(request.query, error="login_required", error_description="somebody must choose a name")
        action, hint = f"{PATH}/authorize?{request.query_string}", request.query.get("login_hint", "")
        page = _PAGE.format(action=html.escape(action), hint=html.escape(hint))
        headers = {
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
            "Referrer-Policy": "same-origin",  # with none at all the form would come with Origin: null
        }
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def _sign_in(self, request: web.Request) -> web.Response:
        if fault := _wrong_client(request.query) or _foreign(request):
            return problem(400, fault)
        form = await request.post()
        try:
            asked = _Asked.read(request.query)
            subject = _subject(str(form.get("subject", "")).strip())
        except _RefusedError as e:
            return _back(request.query, error=e.code, error_description=str(e))
        now = self._clock.now()
        self._codes = {code: grant for code, grant in self._codes.items() if now < grant.expires_at}
        while len(self._codes) >= CODES:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(32)
        roles = _roles([str(role) for role in form.getall("role", [])])
        self._codes[code] = _Grant(asked=asked, subject=subject, roles=roles, expires_at=now + CODE_LIFE)
        return _back(request.query, code=code)

    # --- tokens

    async def _allow(self, request: web.Request) -> web.Response:
        headers = {
            "Access-Control-Allow-Methods": "POST",
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
        }
        return web.Response(status=204, headers={**_cors(request), **headers})

    async def _give_token(self, request: web.Request) -> web.Response:
        try:
            if fault := _foreign(request):
                raise _RefusedError("invalid_request", fault)
            if "subject" in request.query:
                query = request.query
                roles, life = _roles(query.getall("role", [])), _life(query.get("life"))
                given = await self._tokens(_subject(query["subject"]), roles, life=life)
            else:
                form = {name: str(value) for name, value in (await request.post()).items()}
                grant = self._granted(form)
                given = await self._tokens(grant.subject, grant.roles, life=TOKEN_LIFE, asked=grant.asked)
        except _RefusedError as e:
            return _json(request, {"error": e.code, "error_description": str(e)}, status=400)
        return _json(request, given)

    def _granted(self, form: Mapping[str, str]) -> _Grant:
        if form.get("grant_type") != "authorization_code":
            raise _RefusedError(
                "unsupported_grant_type", "grant_type must be authorization_code (scripts: POST ?subject=NAME)"
            )
        grant = self._codes.pop(form.get("code", ""), None)  # a code is good for one try, right or wrong
        if grant is None or self._clock.now() >= grant.expires_at:
            raise _RefusedError("invalid_grant", "the code is unknown, used or older than a minute: sign in again")
        if form.get("client_id") != CLIENT_ID or form.get("redirect_uri") != grant.asked.redirect_uri:
            raise _RefusedError("invalid_grant", "the code was given to another client_id or redirect_uri")
        verifier = form.get("code_verifier", "")
        challenge = _base64(hashlib.sha256(verifier.encode()).digest())
        if not _VERIFIER.fullmatch(verifier) or not compare_digest(challenge, grant.asked.challenge):
            raise _RefusedError("invalid_grant", "the code_verifier does not fit the code_challenge")
        return grant

    async def _tokens(
        self, subject: str, roles: Sequence[str], *, life: timedelta, asked: _Asked | None = None
    ) -> dict[str, Any]:
        import jwt

        kid, pem = await self._signing_key()
        now = int(self._clock.now().timestamp())
        seconds = int(life.total_seconds())
        claims = {
            "iss": self._issuer(),
            "sub": subject,
            "name": subject,
            "roles": list(roles),
            "iat": now,
            "nbf": now,
            "exp": now + seconds,
        }

        def signed(kind: str, **more: str | None) -> str:
            said = {**claims, **{name: value for name, value in more.items() if value is not None}}
            return jwt.encode(said, pem, algorithm="RS256", headers={"kid": kid, "typ": kind})

        self._signed += 1
        given: dict[str, Any] = {
            "access_token": signed("at+jwt", aud=AUDIENCE, client_id=CLIENT_ID, jti=secrets.token_urlsafe(16)),
            "token_type": "Bearer",
            "expires_in": seconds,
            "scope": "openid profile",
        }
        if asked is not None:
            given["id_token"] = signed("JWT", aud=CLIENT_ID, nonce=asked.nonce)
        return given

    # --- keys

    async def _rotate(self, request: web.Request) -> web.Response:
        """Make a new key; with ``?forget=true`` those before are gone at once, as after a theft."""
        if fault := _foreign(request):
            return problem(400, fault)
        async with self._one_at_a_time:
            made = await asyncio.to_thread(_made)
            now = format_instant(self._clock.now())
            self._state.execute("UPDATE oidc_keys SET retired_at = ? WHERE retired_at IS NULL", (now,))
            if request.query.get("forget") == "true":
                self._state.execute("DELETE FROM oidc_keys")
            self._keep(*made)
        return _json(request, {"kid": made[0], "keys": [kid for kid, _ in self._listed()]})

    async def _signing_key(self) -> tuple[str, str]:
        async with self._one_at_a_time:
            row = self._state.execute("SELECT kid, pem FROM oidc_keys WHERE retired_at IS NULL").fetchone()
            if row is not None:
                return str(row[0]), str(row[1])
            made = await asyncio.to_thread(_made)
            self._keep(*made)
            return made

    def _keep(self, kid: str, pem: str) -> None:
        now = format_instant(self._clock.now())
        self._state.execute("INSERT INTO oidc_keys (kid, pem, made_at) VALUES (?, ?, ?)", (kid, pem, now))

    def _listed(self) -> list[tuple[str, str]]:
        now = self._clock.now()
        rows = self._state.execute(
            "SELECT kid, pem, retired_at FROM oidc_keys ORDER BY retired_at IS NULL DESC, made_at"
        )
        return [(kid, pem) for kid, pem, retired in rows if retired is None or now < parse_instant(retired) + KEPT]


def _made() -> tuple[str, str]:
    """A new key with its id, the thumbprint of RFC 7638."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from jwt.algorithms import RSAAlgorithm

    key = rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)
    jwk = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    thumb = f'{{"e":"{jwk["e"]}","kty":"RSA","n":"{jwk["n"]}"}}'
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    return _base64(hashlib.sha256(thumb.encode()).digest()), pem


def _private(pem: str) -> "RSAPrivateKey":
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(pem.encode(), password=None)
    assert isinstance(key, RSAPrivateKey)  # noqa: S101 - we wrote it ourselves
    return key


def _base64(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode().rstrip("=")


def _subject(text: str) -> str:
    if not 1 <= len(text) <= 255 or not text.isprintable():
        raise _RefusedError("invalid_request", "a name has 1 to 255 printable characters")
    return text


def _roles(wanted: Sequence[str]) -> Sequence[str]:
    unknown = set(wanted) - {"subscriber", "operator"}
    if unknown:
        raise _RefusedError("invalid_request", "role must be subscriber or operator")
    return ("subscriber", "operator") if "operator" in wanted else ("subscriber",)


def _life(text: str | None) -> timedelta:
    if text is None:
        return TOKEN_LIFE
    most = int(TOKEN_LIFE.total_seconds())
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= most:
        raise _RefusedError("invalid_request", f"life must be a whole number of seconds from 1 to {most}")
    return timedelta(seconds=int(text))


def _wrong_client(query: Mapping[str, str]) -> str | None:
    """Why no answer may be sent where the request says; None if it may."""
    if query.get("client_id") != CLIENT_ID:
        return f"client_id must be {CLIENT_ID}"
    uri = query.get("redirect_uri", "")
    if _is_local_page(uri):
        return None
    return "redirect_uri must be a page of this machine, such as http://127.0.0.1:5173/"


def _is_local_page(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        is_local = parts.scheme == "http" and parts.hostname in _LOCAL and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        return False
    return is_local and uri.isascii() and uri.isprintable() and not set(uri) & set("\\ #")


def _back(query: Mapping[str, str], **answer: str) -> web.Response:
    uri = query["redirect_uri"]
    state = {"state": query["state"]} if "state" in query else {}
    joint = "&" if urlsplit(uri).query else "?"
    headers = {"Location": f"{uri}{joint}{urlencode({**answer, **state})}", "Cache-Control": "no-store"}
    return web.Response(status=303, headers=headers)


def _foreign(request: web.Request) -> str | None:
    origin = request.headers.get("Origin")
    if origin is None or _LOCAL_ORIGIN.fullmatch(origin):
        return None
    return "only pages of this machine may sign in here"


def _cors(request: web.Request) -> dict[str, str]:
    origin = request.headers.get("Origin", "")
    is_local = _LOCAL_ORIGIN.fullmatch(origin) is not None
    return {"Vary": "Origin", **({"Access-Control-Allow-Origin": origin} if is_local else {})}


def _json(request: web.Request, body: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.json_response(body, status=status, headers={"Cache-Control": "no-store", **_cors(request)})
