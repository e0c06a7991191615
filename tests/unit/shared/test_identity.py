import asyncio
import base64
import hashlib
import hmac
import json
import logging
from datetime import timedelta
from functools import cache
from types import SimpleNamespace

import azure.functions as func
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel

from infra.db.subscribers import _subscriber
from shared.clock import StoppedClock
from shared.errors import ConfigurationError, InvalidPayloadError, UnavailableError
from shared.http import Api
from shared.http_client import HttpClient
from shared.identity import (
    LARGEST_KEYS,
    LARGEST_TOKEN,
    LIFE,
    NOBODY,
    PAUSE,
    STALE,
    Caller,
    KeySet,
    Tokens,
    UnauthenticatedError,
    bearer_of,
    caller_of,
    identify,
    subscriber_name,
)
from tests.builders import WALL, a_request

ISSUER = "https://issuer.test"
AUDIENCE = "troop"
JWKS = f"{ISSUER}/keys"
SECOND = timedelta(seconds=1)
NOW = int(WALL.timestamp())


@cache
def private_key(name):
    """A key of its own for every name; made once, for it takes a while."""
    return rsa.generate_private_key(public_exponent=65537, key_size=1024 if name == "weak" else 2048)


def public_jwk(name, **more):
    return {**RSAAlgorithm.to_jwk(private_key(name).public_key(), as_dict=True), "kid": name, **more}


def pem(name):
    return (
        private_key(name)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def a_token(key="one", algorithm="RS256", header=None, without=(), **claims):
    """A good token; *claims* and *header* change it."""
    body = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW + 600, "iat": NOW, **claims}
    said = {name: value for name, value in body.items() if name not in without}
    return jwt.encode(said, private_key(key), algorithm=algorithm, headers={"kid": "one", **(header or {})})


def encoded(value):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def by_hand(header, claims=None, sign=None):
    """A token that no library would make."""
    body = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW + 600} if claims is None else claims
    text = f"{encoded(header)}.{encoded(body)}"
    return f"{text}.{encoded(sign(text.encode())) if sign else ''}"


def signed_by_hand(claims, key="one", **header):
    """Signed with the right key, whatever it says."""
    algorithm = jwt.get_algorithm_by_name("RS256")
    return by_hand(
        {"alg": "RS256", "kid": "one", **header}, claims, lambda text: algorithm.sign(text, private_key(key))
    )


def tampered():
    header, _, signature = a_token().split(".")
    return f"{header}.{encoded({'iss': ISSUER, 'aud': AUDIENCE, 'sub': 'mallory', 'exp': NOW + 600})}.{signature}"


class Issuer(httpx.AsyncBaseTransport):
    """Lists keys, or fails as told, and counts how often it was asked."""

    def __init__(self):
        self.keys = [public_jwk("one", use="sig", alg="RS256")]
        self.answer = None
        self.asked = 0

    async def handle_async_request(self, request):
        self.asked += 1
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or httpx.Response(200, json={"keys": self.keys})


@pytest.fixture
async def world():
    """An issuer, a clock that stands, and what checks tokens by them."""
    issuer, clock = Issuer(), StoppedClock(WALL)
    keys = KeySet(JWKS, HttpClient("issuer", transport=lambda: issuer), clock)
    tokens = Tokens(issuer=ISSUER, audience=AUDIENCE, keys=keys, wall=clock)
    yield SimpleNamespace(issuer=issuer, clock=clock, tokens=tokens)
    await tokens.aclose()


class TestGoodTokens:
    async def test_subject_becomes_the_caller(self, world):
        """Who has a valid token is a subscriber."""
        assert await world.tokens.caller(a_token()) == Caller(subject="alice", roles=frozenset({"subscriber"}))

    @pytest.mark.parametrize(
        ("roles", "is_operator"),
        [
            (["operator"], True),
            (["reader", "operator"], True),
            (["Operator"], False),
            (["operators"], False),
            ("operator", False),
            ({"operator": True}, False),
            ([["operator"]], False),
            (None, False),
        ],
    )
    async def test_only_the_word_in_the_list_makes_an_operator(self, world, roles, is_operator):
        """The role is the issuer's to give, in the claim `roles`, exactly written."""
        caller = await world.tokens.caller(a_token(roles=roles))

        assert caller.is_operator is is_operator
        assert "subscriber" in caller.roles

    @pytest.mark.parametrize(
        "given",
        [
            {"exp": NOW - 59},
            {"nbf": NOW + 59},
            {"iat": NOW + 59},
            {"exp": NOW + 0.5},
            {"aud": ["other", AUDIENCE]},
            {"header": {"typ": "at+jwt"}},
            {"header": {"typ": "application/AT+JWT"}},
            {"without": ["iat"]},
        ],
        ids=str,
    )
    async def test_what_other_issuers_do_is_accepted(self, world, given):
        """Clocks differ by up to a minute, and an audience may be one of several."""
        assert (await world.tokens.caller(a_token(**given))).subject == "alice"


BAD = {
    "alg none": lambda: by_hand({"alg": "none", "kid": "one"}),
    "alg None in capitals": lambda: by_hand({"alg": "NONE", "kid": "one"}),
    "alg none with a signature": lambda: by_hand({"alg": "none", "kid": "one"}, sign=lambda text: b"x" * 256),
    "no alg": lambda: by_hand({"kid": "one"}),
    "alg a list": lambda: by_hand({"alg": ["RS256"], "kid": "one"}),
    "HS256 with the public key as secret": lambda: by_hand(
        {"alg": "HS256", "kid": "one"}, sign=lambda text: hmac.digest(pem("one"), text, hashlib.sha256)
    ),
    "RS256 in the header, HMAC in the signature": lambda: by_hand(
        {"alg": "RS256", "kid": "one"}, sign=lambda text: hmac.digest(pem("one"), text, hashlib.sha256)
    ),
    "RS512": lambda: a_token(algorithm="RS512"),
    "PS256": lambda: a_token(algorithm="PS256"),
    "wrong audience": lambda: a_token(aud="other"),
    "audiences without ours": lambda: a_token(aud=["other", "troop-web"]),
    "audience that begins like ours": lambda: a_token(aud="troop-web"),
    "no audience": lambda: a_token(without=["aud"]),
    "audience a number": lambda: signed_by_hand({"iss": ISSUER, "aud": 7, "sub": "alice", "exp": NOW + 600}),
    "wrong issuer": lambda: a_token(iss="https://other.test"),
    "issuer with a slash more": lambda: a_token(iss=f"{ISSUER}/"),
    "issuers in a list": lambda: signed_by_hand({"iss": [ISSUER], "aud": AUDIENCE, "sub": "alice", "exp": NOW + 600}),
    "no issuer": lambda: a_token(without=["iss"]),
    "expired": lambda: a_token(exp=NOW - 60),
    "never expires": lambda: a_token(without=["exp"]),
    "expires null": lambda: a_token(exp=None),
    "expires true": lambda: signed_by_hand({"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": True}),
    "expires in words": lambda: signed_by_hand({"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": str(NOW + 600)}),
    "expires NaN": lambda: signed_by_hand({"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": float("nan")}),
    "expires Infinity": lambda: signed_by_hand({"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": float("inf")}),
    "not yet": lambda: a_token(nbf=NOW + 61),
    "nbf NaN": lambda: signed_by_hand(
        {"iss": ISSUER, "aud": AUDIENCE, "sub": "a", "exp": NOW + 9, "nbf": float("nan")}
    ),
    "nbf true": lambda: signed_by_hand({"iss": ISSUER, "aud": AUDIENCE, "sub": "a", "exp": NOW + 9, "nbf": True}),
    "made in the future": lambda: a_token(iat=NOW + 61),
    "unknown kid": lambda: a_token(header={"kid": "nowhere"}),
    "no kid": lambda: by_hand({"alg": "RS256"}, sign=lambda text: b"x" * 256),
    "kid empty": lambda: a_token(header={"kid": ""}),
    "kid a number": lambda: by_hand({"alg": "RS256", "kid": 1}, sign=lambda text: b"x" * 256),
    "kid of another key": lambda: a_token(key="two"),
    "its own key in the header": lambda: a_token(key="two", header={"jwk": public_jwk("two"), "kid": "two"}),
    "an address for keys in the header": lambda: a_token(
        key="two", header={"jku": "https://evil.test/keys", "kid": "two"}
    ),
    "a changed payload": tampered,
    "half a signature": lambda: a_token()[:-100],
    "no signature": lambda: a_token().rpartition(".")[0] + ".",
    "a critical extension": lambda: by_hand(
        {"alg": "RS256", "kid": "one", "crit": ["exp"], "exp": NOW + 600}, sign=lambda text: b"x" * 256
    ),
    "an extension the library knows": lambda: signed_by_hand(
        {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW + 600}, crit=["b64"], b64=True
    ),
    "a detached payload": lambda: by_hand({"alg": "RS256", "kid": "one", "crit": ["b64"], "b64": False}, b""),
    "another kind of token": lambda: a_token(header={"typ": "logout+jwt"}),
    "typ a number": lambda: signed_by_hand({"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW + 600}, typ=7),
    "huge": lambda: a_token(padding="x" * LARGEST_TOKEN),
    "huge nonsense": lambda: "a." * 1_000_000,
    "no subject": lambda: a_token(without=["sub"]),
    "an empty subject": lambda: a_token(sub=""),
    "a number for a subject": lambda: signed_by_hand({"iss": ISSUER, "aud": AUDIENCE, "sub": 7, "exp": NOW + 600}),
    "a list for claims": lambda: signed_by_hand([ISSUER, AUDIENCE]),
    "no JSON for claims": lambda: signed_by_hand(b"{"),
    "nested without end": lambda: signed_by_hand(b"[" * 5000),
    "nothing": lambda: "",
    "a word": lambda: "token",
    "two parts": lambda: a_token().rpartition(".")[0],
    "four parts": lambda: a_token() + ".x",
    "dots": lambda: "..",
    "no ASCII": lambda: a_token() + "é",
    "half a character": lambda: a_token() + "\ud800",
    "two tokens": lambda: f"{a_token()},{a_token()}",
    "a header that is a list": lambda: by_hand(["RS256"]),
    "a header of brackets": lambda: f"{encoded(b'[' * 5000)}.e30.e30",
}


@cache
def bad(kind):
    """A token that must be refused."""
    return BAD[kind]()


class TestBadTokens:
    @pytest.mark.parametrize("kind", BAD)
    async def test_bad_token_is_refused_with_a_sentence(self, world, kind):
        """RFC 8725: what is not exactly as agreed proves nothing; the text says what to do and shows nothing of it."""
        with pytest.raises(UnauthenticatedError) as refused:
            await world.tokens.caller(bad(kind))

        text = str(refused.value)
        assert len(text) > 30
        assert not refused.value.is_missing
        assert not [part for part in bad(kind).split(".") if len(part) > 8 and part in text]

    async def test_what_cannot_be_a_token_asks_nobody(self, world):
        """A caller who sends nonsense costs the issuer nothing."""
        for kind in ("alg none", "HS256 with the public key as secret", "huge", "a word", "no kid"):
            with pytest.raises(UnauthenticatedError):
                await world.tokens.caller(bad(kind))

        assert world.issuer.asked == 0

    async def test_token_that_is_too_long_is_told_so(self, world):
        """Its sender can do something about it: fewer claims."""
        with pytest.raises(UnauthenticatedError, match="longer than 8,192"):
            await world.tokens.caller(bad("huge"))

    @given(st.text(max_size=200) | st.binary(max_size=100).map(lambda raw: f"{encoded(raw)}.{encoded(raw)}.e30"))
    async def test_nonsense_is_never_more_than_refused(self, text):
        """Whatever comes in, the answer is 401 and no bug."""
        clock = StoppedClock(WALL)
        tokens = Tokens(issuer=ISSUER, audience=AUDIENCE, keys=KeySet(JWKS, HttpClient("none"), clock), wall=clock)

        assert not tokens.claims_to_be_ours(text)
        with pytest.raises(UnauthenticatedError):
            await tokens.caller(text)


class TestKeys:
    async def test_keys_are_asked_for_once(self, world):
        """A thousand calls in an hour cost one question."""
        for minute in range(60):
            world.clock.at = WALL + timedelta(minutes=minute)
            await world.tokens.caller(a_token(exp=NOW + 9999))
        assert world.issuer.asked == 1

        world.clock.at = WALL + LIFE
        await world.tokens.caller(a_token(exp=NOW + 9999))
        assert world.issuer.asked == 2

    async def test_callers_at_the_start_wait_for_one_question(self, world):
        """A crowd behind a cold start does not ask once each."""
        found = await asyncio.gather(*(world.tokens.caller(a_token()) for _ in range(20)))

        assert {caller.subject for caller in found} == {"alice"}
        assert world.issuer.asked == 1

    async def test_storm_of_unknown_kids_asks_once_a_minute(self, world):
        """Whoever invents key ids cannot make us flood the issuer."""
        await world.tokens.caller(a_token())
        for second in range(181):
            world.clock.at = WALL + second * SECOND
            with pytest.raises(UnauthenticatedError, match="does not list"):
                await world.tokens.caller(a_token(header={"kid": f"invented-{second}"}, exp=NOW + 9999))

        assert world.issuer.asked == 1 + 3

    async def test_storm_while_the_issuer_is_down_asks_no_more_often(self, world):
        """A failed question counts like any other."""
        await world.tokens.caller(a_token())
        world.issuer.answer = httpx.ConnectError("down")
        for second in range(121):
            world.clock.at = WALL + second * SECOND
            with pytest.raises(UnauthenticatedError):
                await world.tokens.caller(a_token(header={"kid": f"invented-{second}"}, exp=NOW + 9999))

        assert world.issuer.asked == 1 + 2

    async def test_new_key_is_found_when_its_first_token_comes(self, world):
        """Rotation needs nobody's hand: a minute after the last question the new key is known."""
        await world.tokens.caller(a_token())
        world.issuer.keys.append(public_jwk("two"))
        world.clock.at += PAUSE

        assert (await world.tokens.caller(a_token(key="two", header={"kid": "two"}))).subject == "alice"

    async def test_key_that_is_listed_no_more_serves_out_its_hour(self, world):
        """Tokens signed just before a rotation stay good; an hour after it was last seen the key opens nothing."""
        await world.tokens.caller(a_token())
        world.issuer.keys = [public_jwk("two")]
        world.clock.at += PAUSE
        await world.tokens.caller(a_token(key="two", header={"kid": "two"}))

        world.clock.at = WALL + LIFE - SECOND
        assert (await world.tokens.caller(a_token(exp=NOW + 9999))).subject == "alice"
        world.clock.at = WALL + LIFE
        with pytest.raises(UnauthenticatedError, match="does not list"):
            await world.tokens.caller(a_token(exp=NOW + 9999))

    @pytest.mark.parametrize(
        "answer",
        [
            lambda: httpx.ConnectError("down"),
            lambda: httpx.Response(500),
            lambda: httpx.Response(503, json={"keys": [public_jwk("two")]}),
            lambda: httpx.Response(302, headers={"Location": "https://evil.test/keys"}),
            lambda: httpx.Response(200, text="<html>"),
            lambda: httpx.Response(200, json={"keys": []}),
            lambda: httpx.Response(200, json=[]),
            lambda: httpx.Response(200, json={"keys": 7}),
            lambda: httpx.Response(200, content=b"[" * 100_000),
            lambda: httpx.Response(200, json={"keys": [public_jwk("one")], "padding": "x" * LARGEST_KEYS}),
        ],
        ids=["no answer", "500", "503 with keys", "redirect", "html", "no keys", "list", "number", "brackets", "huge"],
    )
    async def test_known_keys_outlive_an_issuer_in_trouble(self, world, answer, caplog):
        """A day long nobody is locked out because the issuer cannot be asked; then its silence counts."""
        await world.tokens.caller(a_token())
        world.issuer.answer = answer()

        world.clock.at = WALL + STALE - SECOND
        with caplog.at_level(logging.WARNING):
            assert (await world.tokens.caller(a_token(exp=NOW + 99_999))).subject == "alice"
        assert "identity.keys_not_read" in caplog.text
        world.clock.at = WALL + STALE
        with pytest.raises(UnauthenticatedError):
            await world.tokens.caller(a_token(exp=NOW + 99_999))
        world.issuer.answer = None
        world.clock.at += PAUSE
        assert (await world.tokens.caller(a_token(exp=NOW + 99_999))).subject == "alice"

    async def test_without_any_key_the_caller_is_told_to_come_back(self, world):
        """Nothing can be said of a token then, so it is not called wrong: 503, and soon asked again."""
        world.issuer.answer = httpx.ConnectError("down")
        for _ in range(3):
            with pytest.raises(UnavailableError) as refused:
                await world.tokens.caller(a_token())
            assert refused.value.retry_after == 5 * SECOND
        assert world.issuer.asked == 1

        world.issuer.answer = None
        world.clock.at += 5 * SECOND
        assert (await world.tokens.caller(a_token())).subject == "alice"

    async def test_clock_that_was_put_back_stops_no_question(self, world):
        """A pause is never longer than it is."""
        world.issuer.answer = httpx.ConnectError("down")
        with pytest.raises(UnavailableError):
            await world.tokens.caller(a_token())
        world.issuer.answer = None
        world.clock.at -= timedelta(days=1)

        assert (await world.tokens.caller(a_token(iat=NOW - 86_400))).subject == "alice"

    async def test_only_keys_that_may_sign_are_taken(self, world):
        """A JWKS may hold keys for other purposes, weak ones and nonsense."""
        curve = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True)
        others = {
            "weak": public_jwk("weak"),
            "encryption": public_jwk("two", kid="encryption", use="enc"),
            "other-algorithm": public_jwk("two", kid="other-algorithm", alg="RS512"),
            "curve": {**curve, "kid": "curve"},
            "secret": {"kty": "oct", "k": encoded(b"secret"), "kid": "secret"},
            "broken": {"kty": "RSA", "n": "!", "e": "AQAB", "kid": "broken"},
            "half": {"kty": "RSA", "n": public_jwk("two")["n"], "kid": "half"},
        }
        world.issuer.keys = [
            "text",
            7,
            {"kty": "RSA"},
            *others.values(),
            public_jwk("one"),
            public_jwk("two", kid="one"),
        ]

        assert (await world.tokens.caller(a_token())).subject == "alice"
        for kid in others:
            with pytest.raises(UnauthenticatedError, match="does not list"):
                claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW + 600}
                await world.tokens.caller(signed_by_hand(claims, key="weak" if kid == "weak" else "two", kid=kid))
        with pytest.raises(UnauthenticatedError, match="signature"):
            await world.tokens.caller(a_token(key="two", header={"kid": "one"}))


class TestSettings:
    def test_without_settings_there_is_no_sign_in(self):
        """All three empty: personal endpoints refuse, the rest works."""
        assert Tokens.of(issuer="", audience="", jwks_url="", wall=StoppedClock(WALL)) is None

    @pytest.mark.parametrize(
        ("given", "missing"),
        [
            ({"issuer": ISSUER}, ["OIDC_AUDIENCE", "OIDC_JWKS_URL"]),
            ({"issuer": ISSUER, "audience": AUDIENCE}, ["OIDC_JWKS_URL"]),
            ({"audience": AUDIENCE, "jwks_url": JWKS}, ["OIDC_ISSUER"]),
        ],
    )
    def test_half_a_sign_in_is_a_mistake(self, given, missing):
        """It would let in other people's tokens; the text names what is missing."""
        with pytest.raises(ConfigurationError) as refused:
            Tokens.of(**{"issuer": "", "audience": "", "jwks_url": "", **given}, wall=StoppedClock(WALL))

        assert str(refused.value).partition(" must")[0].split(" and ") == missing

    @pytest.mark.parametrize(
        ("url", "is_safe"),
        [
            ("https://issuer.test/keys", True),
            ("http://127.0.0.1:7072/oidc/keys", True),
            ("http://localhost/keys", True),
            ("http://[::1]:7072/keys", True),
            ("http://issuer.test/keys", False),
            ("http://127.0.0.1.evil.test/keys", False),
            ("http://localhost@evil.test/keys", False),
            ("ftp://issuer.test/keys", False),
            ("https://", False),
            ("https://issuer.test:port/keys", False),
            ("keys.json", False),
        ],
    )
    def test_keys_come_over_a_closed_line(self, url, is_safe):
        """Who could change the keys on their way could sign any token."""
        given = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": url, "wall": StoppedClock(WALL)}
        if is_safe:
            assert Tokens.of(**given) is not None
        else:
            with pytest.raises(ConfigurationError, match="OIDC_JWKS_URL must be an https address"):
                Tokens.of(**given)


class TestSubscriberName:
    @pytest.mark.parametrize(
        "subject", ["alice", "alice@example.com", "9f0c-11", "Zoë", "x" * 100, "publican", "key:1", "a_b", "a.b%2f"]
    )
    def test_name_stays_a_name(self, subject):
        """Most issuers' subjects can be used as they are."""
        assert subscriber_name(subject) == subject

    @pytest.mark.parametrize(
        "subject",
        [
            *("auth0|7", "a/b", "a\\b", "a?b", "a#b", "a b", "a\nb", "a\x00b", "x" * 101, "a\u200bb", "a\ud800b"),
            *("public", "guest-7", "sub-7", "_directory", "the function key", "not signed in"),
        ],
    )
    def test_other_subject_gets_a_name_of_its_own(self, subject):
        """Deterministic, safe for storage and ids, and never one of the house's own names."""
        name = subscriber_name(subject)

        assert name == subscriber_name(subject)
        assert name.startswith("sub-")
        assert _subscriber(name) == name

    def test_formula_is_kept(self):
        """The name is where somebody's subscriptions lie: it must be the same in every version."""
        assert subscriber_name("auth0|7") == "sub-67f5255ba7fc4821ed36a13f19a6b361"

    @given(st.text(min_size=1, max_size=120), st.text(min_size=1, max_size=120))
    def test_two_subjects_never_share_a_name(self, one, other):
        """Nobody gets at somebody's rules by a subject that looks like theirs, or like its digest."""
        assert (subscriber_name(one) == subscriber_name(other)) == (one == other)
        assert subscriber_name(subscriber_name(one)) != subscriber_name(one) or subscriber_name(one) == one

    @given(st.text(max_size=120))
    def test_every_name_may_be_imported_too(self, subject):
        """What a token says and what an operator imports name the same people by one rule."""
        name = subscriber_name(subject)
        try:
            assert _subscriber(name) == name
        except InvalidPayloadError:
            pytest.fail(f"{subject!r} became {name!r}")


class TestBearer:
    @pytest.mark.parametrize(
        ("header", "token"),
        [
            ("Bearer abc", "abc"),
            ("bearer abc", "abc"),
            ("  BEARER   abc  ", "abc"),
            ("Bearer", None),
            ("Bearer ", None),
            ("Basic abc", None),
            ("abc", None),
            ("", None),
        ],
    )
    def test_token_stands_behind_the_word(self, header, token):
        """The scheme's name is written in any case."""
        assert bearer_of(a_request(headers={"Authorization": header}).headers) == token


class Who(BaseModel):
    """What a handler learned about its caller."""

    subject: str
    roles: list[str]
    is_key: bool
    actor: str


AUTHS = ("anonymous", "key", "subscriber", "operator")
FORGED = {
    "x-ms-client-principal": encoded({"userId": "root", "userRoles": ["operator"]}),
    "x-ms-client-principal-id": "root",
    "x-ms-client-principal-name": "root",
    "x-ms-client-principal-idp": "aad",
    "x-ms-signalr-userid": "root",
    "x-forwarded-user": "root",
}


class Served:
    """One endpoint of each kind, each telling who called it."""

    def __init__(self, tokens):
        self.api, blueprint, self.handled = Api(tokens), func.Blueprint(), 0

        async def who(req):
            self.handled += 1
            caller = caller_of(req)
            return Who(subject=caller.subject, roles=sorted(caller.roles), is_key=caller.is_key, actor=caller.actor)

        for auth in AUTHS:
            self.api.endpoint(blueprint, f"who_{auth}", f"who/{auth}", summary=auth, answer=Who, auth=auth)(who)
        app = func.FunctionApp(http_auth_level=func.AuthLevel.ADMIN)
        app.register_functions(blueprint)
        self.functions = {f.get_function_name(): f for f in app.get_functions()}

    async def ask(self, auth, token=None, headers=None):
        given = {**(headers or {}), **({"Authorization": f"Bearer {token}"} if token is not None else {})}
        answer = await self.functions[f"who_{auth}"].get_user_function()(a_request(headers=given))
        return SimpleNamespace(status=answer.status_code, body=json.loads(answer.get_body()), headers=answer.headers)


@pytest.fixture
def served(world):
    return Served(world.tokens)


def operator():
    return a_token(sub="olga", roles=["operator"])


class TestEndpoints:
    async def test_signed_in_caller_is_known_to_the_handler(self, served):
        """The subject comes from the verified token, with its roles."""
        answer = await served.ask("subscriber", a_token())

        assert answer.status == 200
        assert answer.body == {"subject": "alice", "roles": ["subscriber"], "is_key": False, "actor": "alice"}

    async def test_operator_needs_the_role(self, served):
        """403 says that we know who asks and that it is not theirs to do."""
        refused = await served.ask("operator", a_token())
        let_in = await served.ask("operator", operator())

        assert (refused.status, refused.body["status"]) == (403, 403)
        assert "operator" in refused.body["detail"]
        assert 'error="insufficient_scope"' in refused.headers["WWW-Authenticate"]
        assert (let_in.status, let_in.body["subject"]) == (200, "olga")
        assert served.handled == 1

    @pytest.mark.parametrize("auth", ["subscriber", "operator"])
    async def test_without_a_token_the_caller_is_told_how(self, served, auth):
        """401 with a challenge that names the scheme, and a sentence for a person."""
        answer = await served.ask(auth)

        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="troop"'
        assert "Authorization: Bearer" in answer.body["detail"]
        assert served.handled == 0

    @pytest.mark.parametrize("kind", ["alg none", "HS256 with the public key as secret", "expired", "wrong audience"])
    @pytest.mark.parametrize("auth", AUTHS)
    async def test_bad_token_of_our_issuer_is_refused_everywhere(self, served, auth, kind):
        """Who thinks to be signed in must not be served as a stranger, and learns what is wrong."""
        answer = await served.ask(auth, bad(kind))

        assert answer.status == 401
        assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
        assert served.handled == 0

    @pytest.mark.parametrize("kind", ["word", "other issuer", "hub", "huge"])
    async def test_token_of_somebody_else_is_no_offence_where_none_is_needed(self, served, kind):
        """SignalR's clients send the hub's own token to negotiate when they reconnect: it names nobody here."""
        tokens = {
            "word": "a.b.c",
            "other issuer": a_token(iss="https://other.test"),
            "hub": jwt.encode({"aud": "http://hub/client/?hub=alerts", "asrs.s.uid": "alice"}, "k" * 32),
            "huge": "x" * 100_000,
        }
        token = tokens[kind]
        anonymous, personal = await served.ask("anonymous", token), await served.ask("subscriber", token)

        assert (anonymous.status, anonymous.body["subject"], anonymous.body["actor"]) == (200, "", "not signed in")
        assert personal.status == 401

    async def test_who_signs_in_without_need_is_known_too(self, served):
        """An endpoint for all may serve those it knows better; behind the key the audit learns a name."""
        everybody, with_key = await served.ask("anonymous", a_token()), await served.ask("key", operator())

        assert everybody.body["subject"] == "alice"
        assert with_key.body == {
            "subject": "olga", "roles": ["operator", "subscriber"], "is_key": True, "actor": "olga"
        }  # fmt: skip

    async def test_function_key_is_a_caller_without_a_name(self, served):
        """Whoever holds it is an operator's program, and no subscriber."""
        answer = await served.ask("key")

        assert answer.body == {"subject": "", "roles": [], "is_key": True, "actor": "the function key"}

    async def test_forged_headers_make_nobody_somebody(self, served):
        """No identity is taken from a header that anybody can write: E3 fault 57."""
        assert (await served.ask("anonymous", headers=FORGED)).body["subject"] == ""
        assert (await served.ask("key", headers=FORGED)).body["actor"] == "the function key"
        assert (await served.ask("subscriber", headers=FORGED)).status == 401
        assert (await served.ask("operator", headers=FORGED)).status == 401
        assert (await served.ask("subscriber", a_token(), headers=FORGED)).body["subject"] == "alice"
        assert (await served.ask("operator", a_token(), headers=FORGED)).status == 403

    async def test_without_an_issuer_personal_endpoints_say_so(self):
        """Nobody can sign in until an operator has said where; all else works, and no token is believed."""
        served = Served(None)

        for auth in ("subscriber", "operator"):
            answer = await served.ask(auth, operator())
            assert answer.status == 401
            assert "OIDC_ISSUER" in answer.body["detail"]
        assert (await served.ask("anonymous", operator())).body["subject"] == ""

    async def test_issuer_that_cannot_be_asked_makes_a_503(self, served, world):
        """Not the caller's fault: come back in a moment."""
        world.issuer.answer = httpx.ConnectError("down")

        answer = await served.ask("subscriber", a_token())

        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")

    async def test_personal_answer_is_kept_by_no_cache_for_others(self, served):
        """What one was told is not shown to the next; the caller's own cache may ask whether it changed."""
        known, unknown = await served.ask("anonymous", a_token()), await served.ask("anonymous")

        assert (known.headers["Cache-Control"], known.headers["Vary"]) == ("private, no-cache", "Authorization")
        assert "Cache-Control" not in unknown.headers
        assert known.headers["ETag"] != unknown.headers["ETag"]

    async def test_log_says_who_was_refused_why_but_shows_no_token(self, served, caplog):
        """An operator can help who cannot sign in."""
        with caplog.at_level(logging.INFO):
            await served.ask("subscriber", bad("expired"))

        assert "who_subscriber" in caplog.text
        assert "expired" in caplog.text
        assert bad("expired").split(".")[1] not in caplog.text

    def test_host_lets_through_to_what_we_verify_ourselves(self, served):
        """FUNCTION is the host's to check; a token is ours."""
        levels = {
            name: json.loads(f.get_function_json())["bindings"][0]["authLevel"] for name, f in served.functions.items()
        }

        assert levels == {
            "who_anonymous": "ANONYMOUS",
            "who_key": "FUNCTION",
            "who_subscriber": "ANONYMOUS",
            "who_operator": "ANONYMOUS",
        }
        assert {e.auth: (e.anonymous, e.is_personal) for e in served.api.endpoints} == {
            "anonymous": (True, False),
            "key": (False, False),
            "subscriber": (False, True),
            "operator": (False, True),
        }

    def test_description_says_who_must_sign_in(self, served):
        """openapi.json names the scheme of each endpoint, and the role where one is needed."""
        described = json.loads(json.dumps(served.api.openapi(server="http://here")))
        operations = {path.rpartition("/")[2]: item["get"] for path, item in described["paths"].items()}

        OpenAPIV31SpecValidator(described).validate()
        assert {auth: operation.get("security") for auth, operation in operations.items()} == {
            "anonymous": None,
            "key": [{"functionKey": []}],
            "subscriber": [{"bearer": []}],
            "operator": [{"bearer": []}],
        }
        assert described["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
        assert "operator" in operations["operator"]["description"]

    def test_request_nobody_looked_at_is_nobodys(self):
        """A handler that is called past the Api has no rights to give."""
        known, unknown = a_request(), a_request()
        identify(known, Caller(subject="alice"))

        assert caller_of(known).is_known
        assert caller_of(unknown) is NOBODY
        assert not NOBODY.is_known
        assert not NOBODY.is_operator
