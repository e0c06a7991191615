"""Who may call what, asked of the running app: no identity comes from a header, and no door is left ajar."""

import base64
import json
import sys

import pytest

from shared.http import Api, Endpoint
from tests.functions.running_app import App

pytestmark = [pytest.mark.asyncio(loop_scope="session")]

FORGED = {
    "x-ms-client-principal": base64.b64encode(
        json.dumps({"userId": "root", "userRoles": ["operator"]}).encode()
    ).decode(),
    "x-ms-client-principal-id": "root",
    "x-ms-client-principal-name": "root",
    "x-ms-client-principal-idp": "aad",
    "x-ms-signalr-userid": "root",
    "x-ms-token-aad-id-token": "root",
    "x-forwarded-user": "root",
}
"""What platforms write in front of an app whose sign-in they do, and anybody can write where they do not."""

NONSENSE = ("x", "a.b.c", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJyb290Iiwicm9sZXMiOlsib3BlcmF0b3IiXX0.", "x" * 8000)


def declared() -> list[Endpoint]:
    """Every endpoint that the app declared."""
    api = sys.modules["function_app"].api
    assert isinstance(api, Api)
    return api.endpoints


def path_of(endpoint: Endpoint) -> str:
    return "/api/" + endpoint.route.replace("{", "").replace("}", "")


async def test_the_host_lets_through_only_to_what_is_for_all_or_verified_by_us(app: App) -> None:
    """A route without the host's check either serves anybody or asks for a token itself: exactly one of them."""
    for endpoint in declared():
        level = app.functions[endpoint.name].trigger["authLevel"]
        assert (level == "FUNCTION") == (endpoint.auth == "key"), endpoint.name
        assert endpoint.anonymous + endpoint.is_personal + (level == "FUNCTION") == 1, endpoint.name
    http = {name for name, f in app.functions.items() if f.trigger_type == "httpTrigger"}
    assert http == {endpoint.name for endpoint in declared()}, "every HTTP function is declared by the Api"


@pytest.mark.parametrize("token", [None, *NONSENSE], ids=["none", "word", "parts", "alg none", "long"])
async def test_forged_headers_open_no_door(app: App, token: str | None) -> None:
    """With every header that platforms use and no good token, whatever is not for all answers 401."""
    headers = {**FORGED, **({"Authorization": f"Bearer {token}"} if token else {})}
    closed = [endpoint for endpoint in declared() if not endpoint.anonymous]
    assert closed
    for endpoint in closed:
        answer = await app.ask(endpoint.method, path_of(endpoint), headers=headers)
        assert answer.status == 401, endpoint.name
        if endpoint.is_personal:
            assert answer.headers["WWW-Authenticate"].startswith("Bearer "), endpoint.name
            assert answer.content_type == "application/problem+json"
            assert len(answer.json()["detail"]) > 30


async def test_the_function_key_opens_nothing_personal(app: App) -> None:
    """A key is no person: what is somebody's is shown to them alone."""
    for endpoint in declared():
        if endpoint.is_personal:
            answer = await app.ask(endpoint.method, path_of(endpoint), key=True, headers=FORGED)
            assert answer.status == 401, endpoint.name


async def test_the_hub_knows_a_guest_whatever_the_headers_say(app: App) -> None:
    """SignalR's user id comes from a verified token, or is a guest's: personal alerts go by it."""
    answer = await app.ask("POST", "/api/negotiate", headers=FORGED, userid="root", user="root")

    assert answer.status == 200
    payload = answer.json()["accessToken"].split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert claims["asrs.s.uid"].startswith("guest-")
    assert "root" not in json.dumps(claims)


@pytest.mark.parametrize("token", NONSENSE, ids=["word", "parts", "alg none", "long"])
async def test_a_strangers_token_is_no_offence_where_none_is_needed(app: App, token: str) -> None:
    """SignalR's clients send along the hub's own token when they reconnect; reads for all stay for all."""
    headers = {"Authorization": f"Bearer {token}"}

    assert (await app.ask("GET", "/api/alerts", headers=headers)).status == 200
    assert (await app.ask("POST", "/api/negotiate", headers=headers)).status == 200
