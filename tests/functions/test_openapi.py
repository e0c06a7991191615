"""openapi.json is the API: its routes, its keys, and what it really answers."""

import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator, FormatChecker
from openapi_spec_validator import OpenAPIV31SpecValidator, validate
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from alerts.logic.unsubscribing import Leaving
from tests.functions.running_app import Answer, App, Reply

pytestmark = [pytest.mark.asyncio(loop_scope="session")]

READS = {
    "/health": {},
    "/audit": {"limit": "5"},
    "/deadletters": {"limit": "5"},
    "/deadletters/{dead_letter_id}": {"source": "alerts_on_signal_raised"},
    "/openapi.json": {},
    "/bars/{symbol}": {"limit": "20", "interval": "1d"},
    "/quotes/{symbol}": {},
    "/series/{symbol}": {},
    "/watchlist": {},
    "/coverage/{symbol}": {},
    "/providers": {},
    "/fetches/{id}": {},
    "/signals": {"symbol": "WAVE", "limit": "100"},
    "/signals/{signal_id}": {"symbol": "WAVE"},
    "/entries/{name}/performance": {},
    "/strategies": {},
    "/backtests": {},
    "/backtests/{id}": {},
    "/alerts": {},
    "/alerts/{alert_id}/explain": {},
    "/alerts/{alert_id}/deliveries": {},
    "/subscriptions": {},
    "/subscriptions/{id}": {},
    "/endpoints": {},
    "/endpoints/{channel}": {},
    "/preferences": {},
    "/mutes": {},
    "/unsubscribe": {},
    "/posts": {"kind": "digest"},
    "/posts/{post_id}": {},
    "/feed.xml": {},
}
"""A question to every GET; a route that is missing here fails the test of coverage."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def description(filled: App) -> dict[str, Any]:
    """The description as the app serves it."""
    return (await filled.get("/api/openapi.json")).json()


def operations(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and operation of everything described."""
    for path, item in description["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def faults(description: dict[str, Any], schema: dict[str, Any], value: object) -> list[str]:
    """What is wrong with a value by a schema of the description."""
    resource = Resource.from_contents(description, default_specification=DRAFT202012)
    rooted = {"$ref": f"openapi:{schema['$ref']}"} if "$ref" in schema else schema
    registry: Registry[Any] = Registry().with_resource("openapi:", resource)
    validator = Draft202012Validator(rooted, registry=registry, format_checker=FormatChecker())
    return [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(value)]


async def ask(app: App, path: str, **query: str) -> Answer:
    """Ask a described path with real names in it; where one must be, signed in as an operator with her own rules."""
    personal = {f"/{endpoint.route}" for endpoint in sys.modules["function_app"].api.endpoints if endpoint.is_personal}
    headers = await app.signed_in("olga", role="operator") if path in personal else {}
    if path == "/unsubscribe":
        query["token"] = await link_of(app)
    whole = "/api" + path
    for name, make in NAMES.items():
        if f"{{{name}}}" in whole:
            whole = whole.replace(f"{{{name}}}", await make(app, path))
    return await app.ask("GET", whole, headers=headers, **query)


async def first_of(app: App, path: str, id_: str, **query: str) -> str:
    """The id of the newest thing in a list."""
    return str((await ask(app, path, **query)).json()["items"][0][id_])


async def made(app: App, path: str) -> str:
    """The id of something that was asked for just now."""
    if path.startswith("/fetches"):
        wanted = {"symbol": "WAVE", "interval": "1d", "from": "2012-06-01", "to": "2012-07-01"}
        return str((await app.ask("POST", "/api/fetches", key=True, json=wanted)).json()["fetch_id"])
    if path.startswith("/backtests"):
        answer = await app.ask("POST", "/api/backtests", key=True, json={"entry": "sma-10-30", "symbol": "WAVE"})
        return str(answer.json()["items"][0]["backtest_id"])
    operator = await app.signed_in("olga", role="operator")
    answer = await app.ask("POST", "/api/subscriptions", headers=operator, json={"channels": ["signalr"]})
    return str(answer.json()["subscription_id"])


def webhook_of(app: App) -> str:
    """A webhook of somebody's at our own stand-in, so that nothing is sent elsewhere."""
    return f"{app.neighbours.url}/discord/api/webhooks/{'1' * 18}/{'t' * 68}"


async def address(app: App, path: str) -> str:
    """The channel for which an address was given just now."""
    operator = await app.signed_in("olga", role="operator")
    webhook = {"address": webhook_of(app)}
    assert (await app.ask("PUT", "/api/endpoints/discord", headers=operator, json=webhook)).status == 200
    return "discord"


async def buried(app: App, path: str) -> str:
    """The id of an event that nobody could use."""
    event = {"specversion": "1.0", "id": "no-signal", "source": "/stranger", "type": "signals.signal_raised.v1"}
    assert (await app.notify("alerts_on_signal_raised", {**event, "data": {"symbol": 7}})).status == 202
    letters = (await ask(app, "/deadletters", source="alerts_on_signal_raised", limit="500")).json()["items"]
    return next(str(letter["dead_letter_id"]) for letter in letters if letter["event_id"] == "no-signal")


async def link_of(app: App) -> str:
    """The token of an unsubscribe link that the app signed."""
    links = sys.modules["function_app"].alerting.rules.links
    leaving = Leaving(subscriber="olga", channel="signalr", subscription_id=None)
    return str(links.sign(leaving, now=sys.modules["function_app"].core.wall.now()))


async def known(app: App, path: str) -> str:
    """What the small run was about."""
    return "WAVE" if "{symbol}" in path else "sma-10-30"


type Make = Callable[[App, str], Awaitable[str]]

NAMES: dict[str, Make] = {
    "symbol": known,
    "name": known,
    "id": made,
    "channel": address,
    "dead_letter_id": buried,
    "post_id": lambda app, _: first_of(app, "/posts", "post_id"),
    "signal_id": lambda app, _: first_of(app, "/signals", "signal_id", symbol="WAVE"),
    "alert_id": lambda app, _: first_of(app, "/alerts", "alert_id"),
}
"""What stands in a path, and how to get one that exists."""


async def test_it_is_valid_openapi_3_1(description: dict[str, Any]) -> None:
    """Any tool that reads OpenAPI 3.1 can read it."""
    assert description["openapi"].startswith("3.1")
    validate(description, cls=OpenAPIV31SpecValidator)
    assert description["servers"] == [{"url": "http://127.0.0.1:7071/api"}], "PUBLIC_URL says where the API is"


async def test_it_describes_the_routes_that_exist_and_no_other(description: dict[str, Any], app: App) -> None:
    """Paths and methods are those of the HTTP functions; an operation is named as its function."""
    described = {(method, path, operation["operationId"]) for method, path, operation in operations(description)}
    assert described == {
        (method, f"/{function.trigger['route']}", function.name)
        for function in app.functions.values()
        if function.trigger_type == "httpTrigger"
        for method in function.trigger["methods"]
    }


async def test_security_stands_where_a_caller_is_refused(description: dict[str, Any], app: App) -> None:
    """An operation says that it needs the function key, or a token, exactly if one without is refused for that."""
    assert set(description["components"]["securitySchemes"]) == {"functionKey", "bearer"}
    for method, path, operation in operations(description):
        answer = await app.ask(method, "/api" + path.replace("{", "").replace("}", ""))
        if answer.status != 401 or path == "/hooks/finnhub":  # which asks for a header of the provider's own
            wanted = []
        elif answer.content_type == "application/problem+json":
            wanted = [{"bearer": []}]
        else:  # the host, not the app
            wanted = [{"functionKey": []}]
        assert operation.get("security", []) == wanted, path


async def test_every_get_has_a_question_in_this_file(description: dict[str, Any]) -> None:
    """No read is left out of the tests below."""
    assert {path for method, path, _ in operations(description) if method == "GET"} == set(READS)


@pytest.mark.parametrize("path", READS)
async def test_what_a_read_answers_is_as_described(filled: App, description: dict[str, Any], path: str) -> None:
    """After a small run every GET answers 200 with the described type, and JSON fits its schema."""
    answer = await ask(filled, path, **READS[path])
    [(content_type, content)] = description["paths"][path]["get"]["responses"]["200"]["content"].items()
    assert (answer.status, answer.content_type) == (200, content_type), answer.text
    if content_type.endswith("xml"):
        assert len(list(ET.fromstring(answer.text))) > 3
    elif content_type == "application/json":
        assert faults(description, content["schema"], answer.json()) == []


@pytest.mark.parametrize("path", ["/bars/{symbol}", "/signals", "/alerts", "/posts", "/watchlist"])
async def test_the_lists_have_items_to_judge(filled: App, description: dict[str, Any], path: str) -> None:
    """The schemas are held against real items; one field less or of another type would be seen."""
    answer = (await ask(filled, path)).json()
    assert answer["items"]
    schema = description["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    field = next(iter(answer["items"][0]))
    assert faults(description, schema, {**answer, "items": [{**answer["items"][0], field: {}}]})
    del answer["items"][0][field]
    assert faults(description, schema, answer)


async def test_a_dead_letter_is_as_described(filled: App, description: dict[str, Any]) -> None:
    """An event that nobody can use is shown with its reason."""
    id_ = await buried(filled, "")
    answer = (await ask(filled, "/deadletters", limit="500")).json()
    [item] = [item for item in answer["items"] if item["dead_letter_id"] == id_]
    assert (item["source"], item["event_id"]) == ("alerts_on_signal_raised", "no-signal")
    assert "signal_id: Field required" in item["reason"]
    schema = description["paths"]["/deadletters"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert faults(description, schema, answer) == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("PUT", "/watchlist/{symbol}", 200), ("DELETE", "/watchlist/{symbol}", 200), ("POST", "/negotiate", 200)],
)
async def test_what_a_change_answers_is_as_described(
    filled: App, description: dict[str, Any], method: str, path: str, status: int
) -> None:
    """The answers of PUT, DELETE and POST fit their schemas too."""
    symbol = "DESCRIBED"
    if method == "DELETE":
        await filled.ask("PUT", f"/api/watchlist/{symbol}", key=True)
    answer = await filled.ask(method, "/api" + path.replace("{symbol}", symbol), key=True)
    content = description["paths"][path][method.lower()]["responses"][str(status)]["content"]["application/json"]
    assert (answer.status, faults(description, content["schema"], answer.json())) == (status, [])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/bars/ZZZZ", 404),
        ("GET", "/bars/no symbol", 400),
        ("GET", "/bars/WAVE?interval=1y", 400),
        ("GET", "/quotes/ZZZZ", 404),
        ("GET", "/series/ZZZZ", 404),
        ("GET", "/signals?symbol=$", 400),
        ("GET", "/signals?limit=0", 400),
        ("GET", "/alerts?cursor=not-ours", 400),
        ("GET", "/alerts?after=not-ours", 400),
        ("GET", "/posts?kind=poem", 400),
        ("GET", "/posts/none", 404),
        ("DELETE", "/watchlist/ZZZZ", 404),
        ("POST", "/negotiate?symbols=$", 400),
    ],
)
async def test_every_refusal_is_a_problem_that_says_what_to_do(
    filled: App, description: dict[str, Any], method: str, path: str, status: int
) -> None:
    """RFC 9457: the type of the content, the status inside as outside, and a sentence for a person."""
    answer = await filled.ask(method, "/api" + path, key=True)
    assert (answer.status, answer.content_type) == (status, "application/problem+json"), answer.text
    schema = description["components"]["schemas"]["Problem"]
    assert faults(description, {"$ref": "#/components/schemas/Problem"}, answer.json()) == []
    assert set(schema["required"]) <= set(answer.json())
    assert answer.json()["status"] == status
    assert len(answer.json()["detail"]) > 10


async def test_a_neighbour_that_is_down_makes_a_problem_with_a_time_to_come_back(
    filled: App, description: dict[str, Any]
) -> None:
    """503 carries Retry-After, and the text names who is in trouble but no address."""
    with filled.neighbours.trouble(signalr=Reply(503)):
        answer = await filled.ask("POST", "/api/negotiate")
    assert (answer.status, answer.content_type) == (503, "application/problem+json")
    assert int(answer.headers["Retry-After"]) >= 1
    assert "SignalR" in answer.json()["detail"]
    assert filled.neighbours.url not in answer.text
    assert faults(description, {"$ref": "#/components/schemas/Problem"}, answer.json()) == []


async def test_an_unchanged_answer_is_not_sent_twice(filled: App) -> None:
    """A read carries an ETag; who shows it again gets 304 and no body."""
    first = await filled.get("/api/bars/WAVE", limit="3")
    again = await filled.ask("GET", "/api/bars/WAVE", headers={"If-None-Match": first.headers["ETag"]}, limit="3")
    assert (first.status, again.status, again.text) == (200, 304, "")
