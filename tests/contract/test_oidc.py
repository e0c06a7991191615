"""The local OIDC issuer over a real socket: its tokens in the app's own hands, and the code flow a web page goes."""

import base64
import hashlib
import hmac
import json
import re
import secrets
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from html import unescape
from urllib.parse import parse_qs, urlencode, urlsplit

import azure.functions as func
import httpx
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm
from pydantic import BaseModel

from infra.local.oidc import AUDIENCE, CLIENT_ID, KEPT, OidcIssuer
from shared.clock import StoppedClock
from shared.http import Api
from shared.identity import LIFE, PAUSE, Caller, Tokens, UnauthenticatedError, caller_of
from tests.builders import WALL, a_request

REDIRECT = "http://127.0.0.1:5173/signed-in"
SECOND = timedelta(seconds=1)


class Cloud:
    """An issuer behind a socket, the app's checker of tokens, and somebody's browser."""

    def __init__(self, url: str, clock: StoppedClock, browser: httpx.AsyncClient) -> None:
        self.issuer = f"{url}/oidc"
        self.clock = clock
        self.browser = browser
        self.keys_asked = 0
        self.tokens = Tokens.of(issuer=self.issuer, audience=AUDIENCE, jwks_url=f"{self.issuer}/keys", wall=clock)

    async def token(self, subject: str = "alice", **query: str) -> str:
        answer = await self.browser.post(f"{self.issuer}/token", params={"subject": subject, **query})
        assert answer.status_code == 200, answer.text
        return answer.json()["access_token"]

    async def caller(self, token: str) -> Caller:
        return await self.tokens.caller(token)

    async def rotate(self, **query: str) -> dict:
        return (await self.browser.post(f"{self.issuer}/rotate", params=query)).json()

    async def sign_in(self, verifier: str, *, subject: str = "alice", roles: list[str] | None = None, **changes: str):
        """Open the page, send its form; the address the browser is sent back to."""
        page = await self.browser.get(f"{self.issuer}/authorize", params={**asking(verifier), **changes})
        assert page.status_code == 200, page.text
        action = unescape(re.search(r'action="([^"]+)"', page.text)[1])
        return await self.browser.post(
            self.issuer.removesuffix("/oidc") + action,
            data={"subject": subject, "role": roles or []},
            headers={"Origin": self.issuer.removesuffix("/oidc")},
        )

    async def change(self, code: str, verifier: str, **changes: str) -> httpx.Response:
        """Change a code into tokens."""
        form = {
            "grant_type": "authorization_code",
            "client_id": CLIENT_ID,
            "redirect_uri": REDIRECT,
            "code": code,
            "code_verifier": verifier,
        }
        return await self.browser.post(f"{self.issuer}/token", data={**form, **changes})


def encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def asking(verifier: str) -> dict[str, str]:
    """What a page says when it sends somebody to sign in."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return {
        "response_type": "code",
        "client_id": CLIENT_ID,
        "redirect_uri": REDIRECT,
        "scope": "openid profile",
        "state": "s t&te",
        "nonce": "n-1",
        "code_challenge": encoded(digest),
        "code_challenge_method": "S256",
    }


def answer_in(response: httpx.Response) -> dict[str, str]:
    """What the browser brings back to the page."""
    assert response.status_code == 303, response.text
    target = urlsplit(response.headers["Location"])
    assert target._replace(query="").geturl() == REDIRECT
    return {name: value for name, [value] in parse_qs(target.query).items()}


@asynccontextmanager
async def running(state: sqlite3.Connection, clock: StoppedClock, port: int | None = None) -> AsyncIterator[Cloud]:
    """An issuer over this state; the same port is another run of the same cloud."""
    urls: list[str] = []
    app, clouds = web.Application(), []

    @web.middleware
    async def count(request: web.Request, handler):
        clouds[0].keys_asked += request.path == "/oidc/keys"
        return await handler(request)

    app.middlewares.append(count)
    app.add_routes(OidcIssuer(state, lambda: f"{urls[0]}/oidc", clock=clock).routes())
    async with TestServer(app, host="127.0.0.1", port=port) as server, httpx.AsyncClient(trust_env=False) as browser:
        urls.append(str(server.make_url("")).rstrip("/"))
        cloud = Cloud(urls[0], clock, browser)
        clouds.append(cloud)
        try:
            yield cloud
        finally:
            await cloud.tokens.aclose()


@pytest.fixture
def state():
    one = sqlite3.connect(":memory:", isolation_level=None)
    yield one
    one.close()


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock(WALL)


@pytest.fixture
async def cloud(state, clock) -> AsyncIterator[Cloud]:
    async with running(state, clock) as one:
        yield one


# --- tokens in the app's hands


async def test_a_script_gets_a_token_that_the_app_accepts(cloud: Cloud) -> None:
    """One POST with a name, and the app knows the caller by the issuer's real keys."""
    assert await cloud.caller(await cloud.token()) == Caller(subject="alice", roles=frozenset({"subscriber"}))
    assert (await cloud.caller(await cloud.token("olga", role="operator"))).is_operator


async def test_a_token_ends_when_it_says(cloud: Cloud, clock: StoppedClock) -> None:
    """An hour, or the life that was asked for; the app allows the clocks a minute."""
    short = await cloud.token(life="30")
    clock.at += 89 * SECOND
    assert (await cloud.caller(short)).subject == "alice"
    clock.at += SECOND
    with pytest.raises(UnauthenticatedError, match="expired"):
        await cloud.caller(short)


async def test_a_new_key_opens_and_the_old_one_goes_on_for_a_while(cloud: Cloud, clock: StoppedClock) -> None:
    """After a rotation nobody is signed out: E3 fault 54."""
    before = await cloud.token()
    await cloud.caller(before)
    told = await cloud.rotate()
    after = await cloud.token("bob")

    assert jwt.get_unverified_header(after)["kid"] == told["kid"] != jwt.get_unverified_header(before)["kid"]
    clock.at += PAUSE
    assert [(await cloud.caller(token)).subject for token in (after, before)] == ["bob", "alice"]
    assert len((await cloud.browser.get(f"{cloud.issuer}/keys")).json()["keys"]) == 2
    clock.at = WALL + KEPT
    assert [key["kid"] for key in (await cloud.browser.get(f"{cloud.issuer}/keys")).json()["keys"]] == [told["kid"]]


async def test_a_stolen_key_is_forgotten_within_the_hour(cloud: Cloud, clock: StoppedClock) -> None:
    """What the issuer lists no more opens nothing, an hour after the app last saw it listed."""
    stolen = await cloud.token()
    await cloud.caller(stolen)
    told = await cloud.rotate(forget="true")

    assert told["keys"] == [told["kid"]]
    clock.at += LIFE
    with pytest.raises(UnauthenticatedError):
        await cloud.caller(stolen)


async def test_a_restart_keeps_the_key(state: sqlite3.Connection, clock: StoppedClock) -> None:
    """Who is signed in stays so when the cloud is started again, and the app need not learn anything new."""
    async with running(state, clock) as first:
        token, port = await first.token(), urlsplit(first.issuer).port
    async with running(state, clock, port) as again:
        assert (await again.caller(token)).subject == "alice"
        assert jwt.get_unverified_header(await again.token()) == jwt.get_unverified_header(token)


async def test_a_storm_of_made_up_kids_asks_for_the_keys_once_a_minute(cloud: Cloud, clock: StoppedClock) -> None:
    """Over the real socket too, nobody can make the app flood its issuer."""
    good = await cloud.token()
    await cloud.caller(good)
    _, rest = good.split(".", 1)
    for n in range(130):
        made_up = encoded(json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": f"k{n}"}).encode())
        with pytest.raises(UnauthenticatedError):
            await cloud.caller(f"{made_up}.{rest}")
        clock.at += SECOND

    assert cloud.keys_asked == 1 + 2


async def test_the_public_key_is_no_secret_to_sign_with(cloud: Cloud) -> None:
    """Kid and key as published, HS256 instead of RS256: refused."""
    [key] = (await cloud.browser.get(f"{cloud.issuer}/keys")).json()["keys"]
    _, payload, _ = (await cloud.token(role="operator")).split(".")
    text = f"{encoded(json.dumps({'alg': 'HS256', 'kid': key['kid']}).encode())}.{payload}"
    pem = RSAAlgorithm.from_jwk(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for secret in (pem, json.dumps(key).encode(), key["n"].encode(), base64.urlsafe_b64decode(key["n"] + "==")):
        with pytest.raises(UnauthenticatedError, match="RS256"):
            await cloud.caller(f"{text}.{encoded(hmac.digest(secret, text.encode(), 'sha256'))}")


async def test_an_endpoint_serves_who_signed_in_here(cloud: Cloud) -> None:
    """From the sign-in to the handler, with nothing replaced: token, keys, Api."""

    class Who(BaseModel):
        subject: str

    api, blueprint = Api(cloud.tokens), func.Blueprint()

    @api.endpoint(blueprint, "me", "me", summary="Me.", answer=Who, auth="subscriber")
    async def me(req: func.HttpRequest) -> Who:
        return Who(subject=caller_of(req).subject)

    app = func.FunctionApp()
    app.register_functions(blueprint)
    [function] = app.get_functions()

    async def ask(**headers: str) -> func.HttpResponse:
        return await function.get_user_function()(a_request(headers=headers))

    assert (await ask()).status_code == 401
    served = await ask(Authorization=f"Bearer {await cloud.token('auth0|7')}")
    assert (served.status_code, json.loads(served.get_body())["subject"][:4]) == (200, "sub-")


# --- the code flow


async def test_discovery_leads_to_everything(cloud: Cloud) -> None:
    """A client that knows the issuer alone finds the rest; every address that is named answers."""
    found = (await cloud.browser.get(f"{cloud.issuer}/.well-known/openid-configuration")).json()

    assert found["issuer"] == cloud.issuer
    assert (await cloud.browser.get(found["jwks_uri"])).json()["keys"]
    assert (await cloud.browser.get(found["authorization_endpoint"], params=asking("v" * 43))).status_code == 200
    assert (await cloud.browser.post(found["token_endpoint"], params={"subject": "a"})).status_code == 200


async def test_the_keys_hold_nothing_private(cloud: Cloud) -> None:
    """What anybody may read can check tokens and make none."""
    await cloud.rotate()
    for key in (await cloud.browser.get(f"{cloud.issuer}/keys")).json()["keys"]:
        assert set(key) == {"kty", "n", "e", "kid", "use", "alg", "key_ops"}
        assert (key["kty"], key["use"], key["alg"], key["key_ops"]) == ("RSA", "sig", "RS256", ["verify"])


async def test_a_person_signs_in_with_a_page_and_pkce(cloud: Cloud) -> None:
    """Page, form, code, tokens: the page gets its state back, the id token its nonce, the app the roles."""
    verifier = secrets.token_urlsafe(32)
    back = answer_in(await cloud.sign_in(verifier, subject="olga", roles=["operator"]))
    given = await cloud.change(back["code"], verifier)

    assert back["state"] == "s t&te"
    assert (given.status_code, given.json()["token_type"], given.json()["expires_in"]) == (200, "Bearer", 3600)
    assert given.headers["Cache-Control"] == "no-store"
    caller = await cloud.caller(given.json()["access_token"])
    assert (caller.subject, caller.is_operator) == ("olga", True)
    said = jwt.decode(given.json()["id_token"], options={"verify_signature": False})
    assert (said["aud"], said["nonce"], said["sub"]) == (CLIENT_ID, "n-1", "olga")


async def test_the_id_token_opens_no_api(cloud: Cloud) -> None:
    """It tells the page who somebody is; it is not meant for the app."""
    verifier = secrets.token_urlsafe(32)
    given = await cloud.change(answer_in(await cloud.sign_in(verifier))["code"], verifier)

    with pytest.raises(UnauthenticatedError, match="aud"):
        await cloud.caller(given.json()["id_token"])


async def test_a_code_is_good_once_for_a_minute_and_for_who_asked(cloud: Cloud, clock: StoppedClock) -> None:
    """A code that somebody picked up on its way is worth nothing, and its use ends it."""
    verifier = secrets.token_urlsafe(32)
    for wrong in (
        {"code_verifier": secrets.token_urlsafe(32)},
        {"code_verifier": ""},
        {"redirect_uri": f"{REDIRECT}/other"},
        {"client_id": "other"},
    ):
        code = answer_in(await cloud.sign_in(verifier))["code"]
        assert (await cloud.change(code, verifier, **wrong)).json()["error"] == "invalid_grant"
        assert (await cloud.change(code, verifier)).json()["error"] == "invalid_grant", "one try, right or wrong"
    code = answer_in(await cloud.sign_in("guessable"))["code"]
    assert (await cloud.change(code, "guessable")).json()["error"] == "invalid_grant"
    code = answer_in(await cloud.sign_in(verifier))["code"]
    clock.at += 60 * SECOND
    assert (await cloud.change(code, verifier)).json()["error"] == "invalid_grant"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge": ""}, "invalid_request"),
        ({"scope": "profile"}, "invalid_scope"),
        ({"prompt": "none"}, "login_required"),
    ],
)
async def test_what_this_issuer_does_not_do_is_told_to_the_page(cloud: Cloud, changes: dict, error: str) -> None:
    """With OAuth's word and a sentence, at the address that asked."""
    answer = await cloud.browser.get(f"{cloud.issuer}/authorize", params={**asking("v" * 43), **changes})

    told = answer_in(answer)
    assert (told["error"], told["state"]) == (error, "s t&te")
    assert len(told["error_description"]) > 15


@pytest.mark.parametrize(
    "uri",
    [
        "https://evil.test/",
        "http://127.0.0.1.evil.test/",
        "http://localhost@evil.test/",
        "http://user@127.0.0.1/",
        "http://evil.test\\@127.0.0.1/",
        "javascript:alert(1)",
        "//127.0.0.1/",
        "http://127.0.0.1/#here",
        "http://127.0.0.1/\r\nSet-Cookie: a=b",
        "http://127.0.0.1:port/",
        "",
    ],
)
async def test_nobody_is_sent_away_from_this_machine(cloud: Cloud, uri: str) -> None:
    """A redirect to anywhere else would hand out codes; the answer is a problem right here."""
    for method in ("GET", "POST"):
        answer = await cloud.browser.request(
            method, f"{cloud.issuer}/authorize", params={**asking("v" * 43), "redirect_uri": uri}
        )
        assert (answer.status_code, answer.headers["Content-Type"].partition(";")[0]) == (
            400,
            "application/problem+json",
        )
        assert "redirect_uri must be a page of this machine" in answer.json()["detail"]


async def test_what_a_page_asks_is_shown_as_text(cloud: Cloud) -> None:
    """Nothing of the address becomes part of the page."""
    asked = {**asking("v" * 43), "login_hint": '"><script>alert(1)</script>', "state": '"><script>'}
    page = await cloud.browser.get(f"{cloud.issuer}/authorize?{urlencode(asked)}")

    assert "<script" not in page.text
    assert "&lt;script&gt;" in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "query",
    [
        {"subject": ""},
        {"subject": "a\nb"},
        {"subject": "x" * 256},
        {"subject": "a", "role": "root"},
        {"subject": "a", "life": "0"},
        {"subject": "a", "life": "3601"},
        {"subject": "a", "life": "soon"},
        {},
    ],
    ids=str,
)
async def test_a_wrong_order_for_a_token_says_what_is_right(cloud: Cloud, query: dict) -> None:
    """OAuth's form of an error, with a sentence."""
    answer = await cloud.browser.post(f"{cloud.issuer}/token", params=query)

    assert answer.status_code == 400
    assert set(answer.json()) == {"error", "error_description"}
    assert "must" in answer.json()["error_description"] or "has 1 to 255" in answer.json()["error_description"]


async def test_pages_of_this_machine_may_ask_and_others_may_not(cloud: Cloud) -> None:
    """A page in the same browser but from elsewhere gets no token, and could not read one."""
    asked = {"params": {"subject": "a"}}
    ours = await cloud.browser.post(f"{cloud.issuer}/token", headers={"Origin": "http://localhost:5173"}, **asked)
    preflight = await cloud.browser.options(
        f"{cloud.issuer}/token",
        headers={"Origin": "http://localhost:5173", "Access-Control-Request-Headers": "x-any"},
    )

    assert (ours.status_code, ours.headers["Access-Control-Allow-Origin"]) == (200, "http://localhost:5173")
    assert (preflight.status_code, preflight.headers["Access-Control-Allow-Headers"]) == (204, "x-any")
    for origin in ("https://evil.test", "http://localhost.evil.test", "null"):
        for path in ("token", "rotate", "authorize"):
            refused = await cloud.browser.post(
                f"{cloud.issuer}/{path}", headers={"Origin": origin}, params={**asking("v" * 43), "subject": "a"}
            )
            assert refused.status_code == 400
            assert "Access-Control-Allow-Origin" not in refused.headers
    assert len((await cloud.browser.get(f"{cloud.issuer}/keys")).json()["keys"]) == 1
