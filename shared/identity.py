"""
Who calls: verified by us, from a token that its issuer signed, and from nothing else.

A caller is what a JWT says that is signed with RS256 by a key of OIDC_JWKS_URL, comes from OIDC_ISSUER and is meant
for OIDC_AUDIENCE. Headers such as ``x-ms-client-principal`` or ``x-ms-signalr-userid`` prove nothing where the
platform's own sign-in is not switched on, so no code of this house reads them.
"""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import azure.functions as func

from shared.clock import Clock
from shared.errors import ConfigurationError, PermanentError, TroopError, UnavailableError
from shared.http_client import HttpClient
from shared.telemetry import get_logger

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

log = get_logger(__name__)

type Role = Literal["subscriber", "operator"]
type Auth = Literal["anonymous", "key", "subscriber", "operator"]
"""Whom an endpoint serves: anybody, a holder of the function key, anybody signed in, an operator signed in."""

ALGORITHM = "RS256"
"""The only one; what a token itself says about it is compared with this, never obeyed."""
TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
LEEWAY = timedelta(seconds=60)
LARGEST_TOKEN = 8192
LARGEST_KEYS = 256 * 1024
SMALLEST_KEY = 2048

LIFE = timedelta(hours=1)
"""How long a key is used after its issuer last listed it."""
STALE = timedelta(hours=24)
"""How long the keys last listed are used while the issuer cannot be asked."""
PAUSE = timedelta(minutes=1)
"""The least time between two questions for keys, whatever tokens come in."""
FIRST_PAUSE = timedelta(seconds=5)
"""The same as long as no key is known, when every caller waits for the first."""
PATIENCE = timedelta(seconds=3)

_NAME = re.compile(r"[^\s|/\\?#\x00-\x1f\x7f]{1,100}")
_RESERVED = ("guest-", "sub-", "_")


class UnauthenticatedError(PermanentError):
    """Nobody we know calls: no token, or one that we do not accept. ``is_missing`` says which."""

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


class ForbiddenError(PermanentError):
    """We know who calls, and this is not theirs to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """
    Who made a request.

    *subject* is a subscriber's name, empty for whoever is not signed in; *is_key* says that the host was shown the
    function key.
    """

    subject: str = ""
    roles: frozenset[Role] = frozenset()
    is_key: bool = False

    @property
    def is_known(self) -> bool:
        """Whether this is somebody, by a token that we verified."""
        return bool(self.subject)

    @property
    def is_operator(self) -> bool:
        """Whether the token carries the role operator."""
        return "operator" in self.roles

    @property
    def actor(self) -> str:
        """What an audit writes; no subscriber can have the names of those who have none."""
        return self.subject or ("the function key" if self.is_key else "not signed in")


NOBODY = Caller()

_callers: WeakKeyDictionary[func.HttpRequest, Caller] = WeakKeyDictionary()


def caller_of(req: func.HttpRequest) -> Caller:
    """Who made this request, as the Api found out before it called the handler; NOBODY where it never asked."""
    return _callers.get(req, NOBODY)


def identify(req: func.HttpRequest, caller: Caller) -> None:
    """Remember who made a request, for as long as the request lives."""
    _callers[req] = caller


def subscriber_name(subject: str) -> str:
    """
    The subscriber that a token's subject stands for: itself where it can be a name, otherwise ``sub-`` and a digest.

    A subscriber's name is a partition of storage and stands in ids, so it has 1 to 100 printable characters and no
    blank or ``| / \\ ? #``; ``public``, ``guest-…`` and ``_…`` are the house's own. Two subjects never share a name:
    those that begin with ``sub-`` themselves are digested too.
    """
    is_name = _NAME.fullmatch(subject) is not None and subject.isprintable()
    if is_name and subject != "public" and not subject.startswith(_RESERVED):
        return subject
    digest = hashlib.blake2b(subject.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return f"sub-{digest}"


def bearer_of(headers: Mapping[str, str]) -> str | None:
    """The token of ``Authorization: Bearer TOKEN``; None without one."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


class KeySet:
    """
    An issuer's public keys, asked for when they are needed and at most once a minute.

    A key that is no longer listed is used until its hour ends; keys that are listed outlive a trouble of the issuer.
    """

    def __init__(self, url: str, http: HttpClient, wall: Clock) -> None:
        self._url = url
        self._http = http
        self._wall = wall
        self._keys: dict[str, tuple[RSAPublicKey, datetime]] = {}
        self._listed: frozenset[str] = frozenset()
        self._listed_at: datetime | None = None
        self._asked_at: datetime | None = None
        self._one_at_a_time = asyncio.Lock()

    async def find(self, kid: str) -> "RSAPublicKey | None":
        """
        The key of this id; None if the issuer has none, as far as we may ask.

        Raises:
            UnavailableError: the issuer was never reached, so that nothing can be said of any key.

        """
        if self._is_wanting(kid):
            async with self._one_at_a_time:
                if self._may_ask():  # else somebody asked while we waited
                    await self._ask()
        if not self._keys:
            raise UnavailableError("who signed the token cannot be checked now: try again", retry_after=FIRST_PAUSE)
        return self._usable(kid)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _is_wanting(self, kid: str) -> bool:
        is_old = self._listed_at is None or self._wall.now() - self._listed_at >= LIFE
        return is_old or self._usable(kid) is None

    def _usable(self, kid: str) -> "RSAPublicKey | None":
        if kid not in self._keys or self._listed_at is None:
            return None
        key, until = self._keys[kid]
        if kid in self._listed:
            until = self._listed_at + STALE
        return key if self._wall.now() < until else None

    def _may_ask(self) -> bool:
        if self._asked_at is None:
            return True
        gone = self._wall.now() - self._asked_at
        return not timedelta() <= gone < (PAUSE if self._keys else FIRST_PAUSE)

    async def _ask(self) -> None:
        now = self._asked_at = self._wall.now()
        try:
            answer = await self._http.get(self._url, params={}, headers={"Accept": "application/json"})
            if answer.status != 200:
                raise UnavailableError(f"it answered {answer.status}")
            found = _keys_in(answer.body)
        except TroopError as e:
            log.warning("identity.keys_not_read", reason=str(e), known=len(self._keys))
            return
        kept = {kid: key for kid, key in self._keys.items() if now < key[1]}
        self._keys = kept | {kid: (key, now + LIFE) for kid, key in found.items()}
        self._listed, self._listed_at = frozenset(found), now


def _keys_in(body: bytes) -> "dict[str, RSAPublicKey]":
    """The keys of a JWKS that may sign tokens: RSA, for RS256, of at least 2048 bits, each with an id of its own."""
    import jwt
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from jwt.algorithms import RSAAlgorithm

    trouble = UnavailableError("it listed no key that we can use")
    try:
        listed = json.loads(body)["keys"] if len(body) <= LARGEST_KEYS else []
    except (ValueError, RecursionError, KeyError, TypeError):
        raise trouble from None
    found: dict[str, RSAPublicKey] = {}
    for one in listed if isinstance(listed, list) else []:
        kid = one.get("kid") if isinstance(one, dict) else None
        if not isinstance(kid, str) or not kid or kid in found:
            continue
        if one.get("kty") != "RSA" or one.get("use", "sig") != "sig" or one.get("alg", ALGORITHM) != ALGORITHM:
            continue
        try:
            key = RSAAlgorithm.from_jwk({name: one[name] for name in ("kty", "n", "e")})
        except (jwt.InvalidKeyError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if isinstance(key, RSAPublicKey) and key.key_size >= SMALLEST_KEY:
            found[kid] = key
    if not found:
        raise trouble
    return found


class Tokens:
    """Turns a token into a caller, or says why not."""

    def __init__(self, *, issuer: str, audience: str, keys: KeySet, wall: Clock) -> None:
        self._issuer = issuer
        self._audience = audience
        self._keys = keys
        self._wall = wall

    @classmethod
    def of(cls, *, issuer: str, audience: str, jwks_url: str, wall: Clock) -> "Tokens | None":
        """
        What the settings OIDC_ISSUER, OIDC_AUDIENCE and OIDC_JWKS_URL describe; None if all are empty.

        Raises:
            ConfigurationError: one of them is missing, or the keys would come over an open line.

        """
        given = {"OIDC_ISSUER": issuer, "OIDC_AUDIENCE": audience, "OIDC_JWKS_URL": jwks_url}
        missing = [name for name, value in given.items() if not value]
        if len(missing) == len(given):
            return None
        if missing:
            raise ConfigurationError(f"{' and '.join(missing)} must be set too: set all of {', '.join(given)}, or none")
        if not _is_safe(jwks_url):
            raise ConfigurationError("OIDC_JWKS_URL must be an https address (http only on this machine): write it so")
        keys = KeySet(jwks_url, HttpClient("the token issuer", total=PATIENCE), wall)
        return cls(issuer=issuer, audience=audience, keys=keys, wall=wall)

    async def caller(self, token: str) -> Caller:
        """
        Whom this token speaks for.

        Raises:
            UnauthenticatedError: it is not one that we accept.
            UnavailableError: the issuer's keys cannot be had.

        """
        key = await self._keys.find(_kid_of(token))
        if key is None:
            raise UnauthenticatedError(
                "the token is signed with a key that its issuer does not list: sign in again, or try again in a minute"
            )
        claims = _signed_claims(token, key)
        self._check(claims)
        subject = claims.get("sub")
        if not isinstance(subject, str) or not subject:
            raise UnauthenticatedError("the token names no subject (sub): sign in as somebody")
        roles = claims.get("roles")
        is_operator = isinstance(roles, list) and "operator" in roles
        found: frozenset[Role] = frozenset({"subscriber", "operator"} if is_operator else {"subscriber"})
        return Caller(subject=subscriber_name(subject), roles=found)

    def claims_to_be_ours(self, token: str) -> bool:
        """
        Whether a token says that our issuer made it, true or not.

        SignalR's clients send the hub's own token along when they reconnect; that one is none of ours and no offence.
        """
        import jwt

        if not _is_sound(token):
            return False
        try:
            claims = jwt.decode(token, options={"verify_signature": False})
        except (jwt.InvalidTokenError, ValueError, TypeError):
            return False
        return claims.get("iss") == self._issuer

    async def aclose(self) -> None:
        """Close the connections."""
        await self._keys.aclose()

    def _check(self, claims: Mapping[str, Any]) -> None:
        if claims.get("iss") != self._issuer:
            raise UnauthenticatedError("the token comes from another issuer: sign in where this service does")
        audience = claims.get("aud")
        if self._audience not in (audience if isinstance(audience, list) else [audience]):
            raise UnauthenticatedError("the token is meant for another service (aud): ask for one for this service")
        now, leeway = self._wall.now().timestamp(), LEEWAY.total_seconds()
        expires = _instant(claims, "exp")
        if expires is None:
            raise UnauthenticatedError("the token never expires (exp): ask for one that does")
        if now >= expires + leeway:
            raise UnauthenticatedError("the token has expired: sign in again")
        for name in ("nbf", "iat"):
            begins = _instant(claims, name)
            if begins is not None and begins > now + leeway:
                raise UnauthenticatedError(f"the token is not valid yet ({name}): check the clocks")


def _is_safe(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    is_here = parts.hostname in {"127.0.0.1", "localhost", "::1"}
    return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and is_here))


def _is_sound(token: str) -> bool:
    return len(token) <= LARGEST_TOKEN and token.isascii() and token.count(".") == 2


def _kid_of(token: str) -> str:
    """The id of the key that a token says it is signed with; nothing else of its header is used."""
    import jwt

    if len(token) > LARGEST_TOKEN:
        raise UnauthenticatedError(f"the token is longer than {LARGEST_TOKEN:,} characters: ask for a smaller one")
    try:
        header = jwt.get_unverified_header(token) if _is_sound(token) else {}
    except (jwt.InvalidTokenError, ValueError, TypeError):
        header = {}
    if not header:
        raise UnauthenticatedError("this is no token: send the access token that the sign-in gave")
    if header.get("alg") != ALGORITHM:
        raise UnauthenticatedError(f"the token is not signed with {ALGORITHM}: sign in where this service does")
    if "crit" in header or "b64" in header:
        raise UnauthenticatedError("the token demands extensions (crit) that this service does not have")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in TYPES:
        raise UnauthenticatedError("this is no access token (typ): send the access token that the sign-in gave")
    kid = header.get("kid")
    if not isinstance(kid, str) or not kid:
        raise UnauthenticatedError("the token does not say which key signed it (kid): sign in where this service does")
    return kid


def _signed_claims(token: str, key: "RSAPublicKey") -> Mapping[str, Any]:
    import jwt

    try:
        # Times are compared with our own clock, so only the signature is left to the library.
        signed = jwt.PyJWS(algorithms=[ALGORITHM]).decode_complete(token, key, algorithms=[ALGORITHM])
        claims = json.loads(signed["payload"])
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise UnauthenticatedError("the token's signature is wrong: sign in again") from None
    if not isinstance(claims, dict):
        raise UnauthenticatedError("the token holds no claims: sign in again")
    return claims


def _instant(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnauthenticatedError(f"the token's {name} is no instant: sign in again")
    return value
