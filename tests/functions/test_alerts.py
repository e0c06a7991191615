"""When the alerts domain wakes up: its triggers and endpoints, called as the Functions worker calls them."""

import json
from datetime import timedelta
from typing import Any

import azure.functions as func
import jwt
import pytest

from alerts.functions import AlertItem, blueprint
from alerts.models import Alert
from alerts.ports import Connection
from alerts.wiring import Wired
from shared.errors import ConfigurationError, RefusedError, TroopError, UnavailableError
from shared.http import Api
from shared.inbound import DeadLetters, RedeliverError
from signals.events import SignalRaised
from tests.builders import a_cloud_event, a_request
from tests.standins import a_signal
from tests.unit.alerts.house import House, ScriptedChannel

KEY = "a-key-of-at-least-thirty-two-bytes-long"


class SignedHub:
    """A hub whose tokens are its users, signed."""

    def __init__(self) -> None:
        self.groups: list[tuple[str, str]] = []
        self.trouble: TroopError | None = None

    def connection(self, user_id: str) -> Connection:
        return Connection(url="http://hub/client/?hub=alerts", access_token=jwt.encode({"user": user_id}, KEY))

    def user_of(self, token: str) -> str | None:
        try:
            return str(jwt.decode(token, KEY, algorithms=["HS256"])["user"])
        except jwt.InvalidTokenError:
            return None

    async def join(self, user_id: str, group: str) -> None:
        if self.trouble:
            raise self.trouble
        self.groups.append((user_id, group))


class App:
    """The domain's blueprint, indexed, around a house of stand-ins."""

    def __init__(self, *channels: ScriptedChannel) -> None:
        self.house = House(*channels)
        self.hub = SignedHub()
        self.dead_letters = DeadLetters(self.house.documents, self.house.wall)
        wired = Wired(service=self.house.service(hub=self.hub), dead_letters=self.dead_letters)
        app = func.FunctionApp()
        app.register_functions(blueprint(wired, Api()))
        self.functions = {f.get_function_name(): f for f in app.get_functions()}

    async def call(self, name: str, argument: object) -> Any:
        return await self.functions[name].get_user_function()(argument)

    async def hear(self, data: object, **event: str) -> None:
        await self.call("alerts_on_signal_raised", a_cloud_event(data, **({"type": SignalRaised.type} | event)))

    async def get(self, name: str = "alerts_list", **params: str) -> func.HttpResponse:
        return await self.call(name, a_request(params=params))

    async def items(self, **params: str) -> list[dict[str, Any]]:
        answer = await self.get(**params)
        assert answer.status_code == 200, answer.get_body()
        return body_of(answer)["items"]

    async def negotiate(self, *, headers: dict[str, str] | None = None, **params: str) -> func.HttpResponse:
        return await self.call("alerts_negotiate", a_request("POST", params=params, headers=headers))

    async def buried(self) -> list[dict[str, Any]]:
        return [dict(d.body) for d in await self.dead_letters.newest(after=None, limit=100)]


@pytest.fixture
def app() -> App:
    return App()


def body_of(answer: func.HttpResponse) -> Any:
    return json.loads(answer.get_body())


def user_of(answer: func.HttpResponse) -> str:
    assert answer.status_code == 200, answer.get_body()
    return jwt.decode(body_of(answer)["accessToken"], KEY, algorithms=["HS256"])["user"]


def wire(name: str = "one", **changes) -> dict[str, Any]:
    return a_signal(name, **changes).to_wire()["data"]


# --- what wakes it up


def test_the_domain_has_these_triggers(app):
    """Names, triggers, routes and who may call: what the host is told."""
    shown = {}
    for name, function in app.functions.items():
        trigger = function.get_trigger()
        asked = getattr(trigger, "schedule", None) or getattr(trigger, "route", None)
        level = getattr(trigger, "auth_level", None)
        methods = [str(getattr(m, "value", m)) for m in getattr(trigger, "methods", None) or ()]
        shown[name] = (trigger.type, asked, level.value if level else None, methods)

    assert shown == {
        "alerts_on_signal_raised": ("eventGridTrigger", None, None, []),
        "alerts_sweep": ("timerTrigger", "%ALERTS_SWEEP_SCHEDULE%", None, []),
        "alerts_list": ("httpTrigger", "alerts", "anonymous", ["GET"]),
        "alerts_negotiate": ("httpTrigger", "negotiate", "anonymous", ["POST"]),
    }


async def test_a_signal_on_the_wire_becomes_an_alert(app):
    """The event function decodes, delivers and is done."""
    await app.hear(wire())

    [item] = await app.items()
    assert item["title"] == "AAPL: long at 561.70"
    assert app.house.seen() == {"signalr": 1, "discord": 1}
    assert await app.buried() == []


async def test_the_same_event_twice_is_one_alert(app):
    """At-least-once delivery is the rule."""
    await app.hear(wire())
    await app.hear(wire())

    assert len(await app.items()) == 1
    assert app.house.seen() == {"signalr": 1, "discord": 1}


async def test_a_field_from_the_future_is_ignored(app):
    """Fields may be added to a version."""
    await app.hear(wire() | {"mood": "bullish"})

    assert len(await app.items()) == 1


BROKEN = {
    "nothing": None,
    "a text": "hello",
    "a list": [],
    "no fields": {},
    "another direction": wire(direction="long") | {"direction": "sideways"},
    "no number": wire() | {"strength": float("nan")},
    "no zone": wire() | {"occurred_at": "2012-11-21T21:00:00"},
    "a missing field": {k: v for k, v in wire().items() if k != "signal_id"},
}


@pytest.mark.parametrize("name", sorted(BROKEN))
async def test_an_event_that_cannot_be_used_is_buried_with_its_reason(app, name):
    """Raising would only bring it back: it is kept where people see it, and acknowledged."""
    await app.hear(BROKEN[name])

    [letter] = await app.buried()
    assert (letter["source"], letter["event_id"]) == ("alerts_on_signal_raised", "e1")
    assert "InvalidPayloadError" in letter["reason"]
    assert await app.items() == []


async def test_an_event_of_another_type_is_buried(app):
    """A wrong subscription is seen, not guessed at."""
    await app.hear(wire(), type="signals.signal_raised.v2")

    [letter] = await app.buried()
    assert "expected an event of type signals.signal_raised.v1" in letter["reason"]


@pytest.mark.parametrize("error", [UnavailableError("s3cret"), ConfigurationError("s3cret"), RuntimeError("s3cret")])
async def test_trouble_that_may_pass_asks_for_redelivery_without_details(app, error):
    """Event Grid shall come again; the text it is given, which ends in a 500, names no detail."""
    app.house.topic.trouble = [error]

    with pytest.raises(RedeliverError) as caught:
        await app.hear(wire())

    assert "s3cret" not in str(caught.value)
    assert await app.buried() == []
    await app.hear(wire())
    assert len(app.house.topic.told) == 1
    assert app.house.seen() == {"signalr": 1, "discord": 1}


async def test_a_refused_event_of_ours_is_buried_and_still_owed(app):
    """A topic that refuses for good does not make the signal come back."""
    app.house.topic.trouble = [RefusedError("too large")]

    await app.hear(wire())

    [letter] = await app.buried()
    assert "too large" in letter["reason"]
    assert app.house.seen() == {"signalr": 1, "discord": 1}


async def test_the_timer_finishes_what_is_left():
    """The sweep runs on its trigger."""
    app = App(ScriptedChannel("signalr"), ScriptedChannel("discord", UnavailableError("down")))
    await app.hear(wire())
    app.house.wall.at += timedelta(seconds=2)

    await app.call("alerts_sweep", None)

    assert app.house.seen() == {"signalr": 1, "discord": 1}


# --- the list


async def test_an_item_shows_the_alert_and_every_delivery(app):
    """What the API says is what openapi.json promises, with each channel's outcome."""
    await app.hear(wire())

    [item] = await app.items()

    assert AlertItem.model_validate(item).alert_id == item["alert_id"]
    assert set(item) == set(AlertItem.model_fields)
    assert (item["subscriber"], item["symbol"], item["severity"]) == ("public", "AAPL", "info")
    assert (item["occurred_at"], item["recorded_at"]) == ("2012-11-21T21:00:00Z", "2026-11-21T09:00:00Z")
    assert item["deliveries"] == [
        {"channel": name, "state": "SENT", "reason": None, "attempts": 1, "sent_at": "2026-11-21T09:00:00Z"}
        for name in ("signalr", "discord")
    ]


async def test_pages_lead_through_the_whole_list_newest_first(app):
    """next is the cursor of the following page and null at the end."""
    for number in range(5):
        await app.hear(wire(str(number)))
        app.house.wall.at += timedelta(minutes=5)

    pages, cursor = [], {}
    while True:
        page = body_of(await app.get(limit="2", **cursor))
        pages.append([item["recorded_at"] for item in page["items"]])
        if page["next"] is None:
            break
        cursor = {"cursor": page["next"]}

    assert [len(page) for page in pages] == [2, 2, 1]
    instants = [at for page in pages for at in page]
    assert instants == sorted(instants, reverse=True)
    assert len(set(instants)) == 5


async def test_a_client_catches_up_from_the_cursor_it_was_pushed():
    """Every pushed alert carries its cursor: what was recorded after it is listed, oldest first, with an overlap."""
    pushed: list[str] = []

    class Noting(ScriptedChannel):
        async def send(self, alert: Alert, item: Any) -> str | None:
            pushed.append(item["cursor"])
            return await super().send(alert, item)

    app = App(Noting("signalr"))
    for number in range(4):
        await app.hear(wire(str(number)))
        app.house.wall.at += timedelta(minutes=5)

    missed = await app.items(after=pushed[1])

    assert [item["cursor"] for item in missed] == pushed[1:]
    assert [item["cursor"] for item in await app.items(after=pushed[3])] == pushed[3:]


async def test_an_empty_list_is_a_list(app):
    """Nothing yet is no error."""
    assert body_of(await app.get()) == {"items": [], "next": None}


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"limit": "0"}, "limit must be"),
        ({"limit": "501"}, "limit must be"),
        ({"limit": "x"}, "limit must be"),
        ({"cursor": "x"}, "the cursor is none of ours"),
        ({"after": "bm9uc2Vuc2U"}, "the cursor is none of ours"),
    ],
)
async def test_a_wrong_parameter_is_a_problem(app, params, named):
    """400, and what to do instead."""
    answer = await app.get(**params)

    assert (answer.status_code, answer.mimetype) == (400, "application/problem+json")
    assert named in body_of(answer)["detail"]


# --- negotiate


async def test_a_newcomer_gets_a_place_and_hears_everything(app):
    """url and accessToken, the names the official clients look for; all symbols unless told."""
    answer = await app.negotiate()

    assert set(body_of(answer)) == {"url", "accessToken"}
    assert app.hub.groups == [(user_of(answer), "symbols/all")]


async def test_a_guest_that_reconnects_stays_the_same(app):
    """The bearer that the official clients send along by themselves is the guest's."""
    first = await app.negotiate()

    again = await app.negotiate(headers={"Authorization": f"Bearer {body_of(first)['accessToken']}"}, symbols="MSFT")

    assert user_of(again) == user_of(first)
    assert app.hub.groups[-1] == (user_of(first), "symbols/MSFT")


FORGED = {
    "a foreign bearer": {"Authorization": f"Bearer {jwt.encode({'user': 'guest-1'}, 'x' * 40)}"},
    "an empty bearer": {"Authorization": "Bearer "},
    "another scheme": {"Authorization": "Basic Z3Vlc3QtMTpwdw=="},
    "a principal": {"X-MS-CLIENT-PRINCIPAL": "eyJ1c2VySWQiOiJndWVzdC0xIn0=", "x-ms-client-principal-id": "guest-1"},
    "a principal's name": {"X-MS-CLIENT-PRINCIPAL-NAME": "guest-1", "X-MS-SIGNALR-USERID": "guest-1"},
}


@pytest.mark.parametrize("name", sorted(FORGED))
async def test_nobody_becomes_somebody_by_a_header(app, name):
    """Only a token of ours says who a caller is: everything else is ignored, and no reason to turn anyone away."""
    users = {user_of(await app.negotiate(headers=FORGED[name])) for _ in range(2)}

    assert len(users) == 2
    assert all(user.startswith("guest-") for user in users)
    assert "guest-1" not in users


async def test_a_user_in_the_query_is_ignored(app):
    """Nor by a parameter."""
    assert user_of(await app.negotiate(userId="guest-1", user="guest-1")) != "guest-1"


@pytest.mark.parametrize("symbols", ["not a symbol", ",".join(f"S{n}" for n in range(51))])
async def test_a_wrong_list_of_symbols_is_a_problem(app, symbols):
    """400 with what to do; nothing is joined."""
    answer = await app.negotiate(symbols=symbols)

    assert (answer.status_code, app.hub.groups) == (400, [])


@pytest.mark.parametrize(("error", "status"), [(UnavailableError("down"), 503), (ConfigurationError("s3cret"), 500)])
async def test_a_hub_in_trouble_is_a_problem_without_details(app, error, status):
    """A caller learns whether to come again, and no more."""
    app.hub.trouble = error

    answer = await app.negotiate()

    assert answer.status_code == status
    assert "s3cret" not in answer.get_body().decode()
