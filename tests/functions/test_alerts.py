"""When the alerts domain wakes up: its triggers and endpoints, called as the Functions worker calls them."""

import json
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import azure.functions as func
import jwt
import pytest

from alerts.canary import Canary
from alerts.functions import AlertItem, DeliveryLog, Explanation, blueprint
from alerts.ports import Connection, Message
from alerts.rules import RuleService
from alerts.subscriptions import Kind, Subscription
from alerts.wiring import Wired
from shared.audit import Audit
from shared.errors import ConfigurationError, NotFoundError, RefusedError, TroopError, UnavailableError
from shared.http import Api
from shared.identity import Caller, Role, Tokens, UnauthenticatedError
from shared.inbound import RedeliverError
from shared.market.events import BarsIngested
from shared.market.models import Interval
from signals.events import SignalRaised
from tests.builders import a_cloud_event, a_request
from tests.standins import CLOSE, a_signal
from tests.unit.alerts.house import House, ScriptedChannel, a_subscription

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


class OpenTokens:
    """An issuer whose tokens are ``ours.NAME`` and ``ours.NAME.operator``."""

    def claims_to_be_ours(self, token: str) -> bool:
        return token.startswith("ours.")

    async def caller(self, token: str) -> Caller:
        ours, name, *roles = token.split(".")
        if ours != "ours":
            raise UnauthenticatedError("this is no token of ours")
        return Caller(subject=name, roles=frozenset({"subscriber", *cast("list[Role]", roles)}))


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer ours.{name}"}


class App:
    """The domain's blueprint, indexed, around a house of stand-ins."""

    def __init__(self, *channels: ScriptedChannel, subscriptions: Sequence[Subscription] | None = None) -> None:
        self.house = House(*channels, subscriptions=subscriptions)
        self.hub = SignedHub()
        self.dead_letters = self.house.dead_letters
        self.service = self.house.service(hub=self.hub)
        wired = Wired(
            service=self.service,
            dead_letters=self.dead_letters,
            rules=cast("RuleService", None),
            canary=cast("Canary", None),
            audit=Audit(self.house.documents, self.house.wall),
        )
        app = func.FunctionApp()
        app.register_functions(blueprint(wired, Api(cast("Tokens", OpenTokens()))))
        self.functions = {f.get_function_name(): f for f in app.get_functions()}

    async def call(self, name: str, argument: object) -> Any:
        return await self.functions[name].get_user_function()(argument)

    async def hear(self, data: object, **event: str) -> None:
        await self.call("alerts_on_signal_raised", a_cloud_event(data, **({"type": SignalRaised.type} | event)))

    async def get(self, name: str = "alerts_list", *, who: str | None = None, **params: str) -> func.HttpResponse:
        route = {"alert_id": params.pop("alert_id")} if "alert_id" in params else {}
        method = "POST" if name == "alerts_acknowledge" else "GET"
        return await self.call(name, a_request(method, params=params, route=route, headers=as_(who) if who else {}))

    async def items(self, *, who: str | None = None, **params: str) -> list[dict[str, Any]]:
        answer = await self.get(who=who, **params)
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
        "alerts_on_bars_ingested": ("eventGridTrigger", None, None, []),
        "alerts_sweep": ("timerTrigger", "%ALERTS_SWEEP_SCHEDULE%", None, []),
        "alerts_list": ("httpTrigger", "alerts", "anonymous", ["GET"]),
        "alerts_explain": ("httpTrigger", "alerts/{alert_id}/explain", "anonymous", ["GET"]),
        "alerts_deliveries": ("httpTrigger", "alerts/{alert_id}/deliveries", "anonymous", ["GET"]),
        "alerts_acknowledge": ("httpTrigger", "alerts/{alert_id}/acknowledge", "anonymous", ["POST"]),
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


async def test_a_refused_event_of_ours_is_buried_and_told_no_more(app):
    """A topic that refuses for good neither makes the signal come back nor is asked for ever."""
    app.house.topic.trouble = [RefusedError("too large")]

    await app.hear(wire())
    app.house.wall.at += timedelta(hours=1)
    await app.call("alerts_sweep", None)

    [letter] = await app.buried()
    assert (letter["source"], letter["origin"], letter["reason"]) == ("alerts", "outbox", "too large")
    assert app.house.seen() == {"signalr": 1, "discord": 1}
    assert app.house.topic.told == []


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
        async def send(self, message: Message) -> str | None:
            pushed.append(message.item["cursor"])
            return await super().send(message)

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


# --- one's own, and why


@pytest.fixture
def shared_app() -> App:
    """Public and two subscribers, who hear the same signals."""
    mine = a_subscription("discord", subscriber="alice", cooldown=timedelta(hours=1))
    theirs = a_subscription("signalr", "email", subscriber="bob")
    channels = [ScriptedChannel(name) for name in ("signalr", "discord", "email")]
    return App(*channels, subscriptions=[a_subscription("signalr", "discord"), mine, theirs])


async def ids_of(app: App, *whose: str | None) -> list[str]:
    return [(await app.items(who=who))[0]["alert_id"] for who in whose]


async def test_who_is_signed_in_lists_their_own(shared_app):
    """Each sees what is theirs, and nobody else's; without a token it is the public list."""
    await shared_app.hear(wire())

    names = {who: [item["subscriber"] for item in await shared_app.items(who=who)] for who in (None, "alice", "carol")}

    assert names == {None: ["public"], "alice": ["alice"], "carol": []}


async def test_an_explanation_tells_every_decision(shared_app):
    """Why it came, or did not: the rules in order, each with a reason, and by which alert."""
    await shared_app.hear(wire("one"))
    first = (await shared_app.items(who="alice"))[0]["alert_id"]
    shared_app.house.wall.at += timedelta(minutes=5)
    await shared_app.hear(wire("two"))
    [second] = [i["alert_id"] for i in await shared_app.items(who="alice") if i["alert_id"] != first]

    told = body_of(await shared_app.get("alerts_explain", who="alice", alert_id=second))

    assert Explanation.model_validate(told).alert_id == second
    [delivery] = told["deliveries"]
    assert (delivery["state"], delivery["rule"], delivery["by"]) == ("SUPPRESSED", "cooldown", first)
    assert delivery["because"].startswith("the rule cooldown held it back: within 1 hour of AAPL's alert")
    assert [(d["rule"], d["outcome"]) for d in delivery["decisions"]] == [("match", "heard"), ("cooldown", "suppress")]
    sent = body_of(await shared_app.get("alerts_explain", who="alice", alert_id=first))
    assert sent["deliveries"][0]["because"] == "discord took it"


async def test_the_delivery_log_shows_every_attempt():
    """When each began and ended, what came of it, and what the service called it."""
    app = App(ScriptedChannel("discord", UnavailableError("down")), subscriptions=[a_subscription("discord")])
    await app.hear(wire())
    app.house.wall.at += timedelta(seconds=2)
    await app.call("alerts_sweep", None)
    [name] = await ids_of(app, None)

    told = body_of(await app.get("alerts_deliveries", alert_id=name))

    assert DeliveryLog.model_validate(told)
    [delivery] = told["items"]
    assert (delivery["state"], delivery["attempts"], delivery["is_possible_repeat"]) == ("SENT", 2, False)
    assert [(a["number"], a["outcome"], a["reason"], a["provider_id"]) for a in delivery["log"]] == [
        (1, "failed", "UnavailableError: down", None),
        (2, "taken", None, "m-1"),
    ]


EYES = {
    ("public", None): 200,
    ("public", "alice"): 200,
    ("alice", "alice"): 200,
    ("alice", None): 404,
    ("alice", "bob"): 404,
    ("bob", "alice"): 404,
}


@pytest.mark.parametrize("place", ["alerts_explain", "alerts_deliveries"])
@pytest.mark.parametrize(("whose", "who"), list(EYES))
async def test_what_is_somebody_elses_is_not_there(shared_app, place, whose, who):
    """404, as for what does not exist: whether somebody has an alert is theirs to know, however it is asked for."""
    await shared_app.hear(wire())
    [name] = await ids_of(shared_app, whose if whose != "public" else None)

    answer = await shared_app.get(place, who=who, alert_id=name)
    pointed = await shared_app.get(place, who=who, alert_id=name, subscriber=whose)

    assert (answer.status_code, pointed.status_code) == (EYES[whose, who],) * 2
    nothing = await shared_app.get(place, who=who, alert_id="00000000-0000-5000-8000-000000000000")
    if EYES[whose, who] == 404:
        assert body_of(answer)["detail"].replace(name, "") == body_of(nothing)["detail"].replace(
            "00000000-0000-5000-8000-000000000000", ""
        )


async def test_an_operator_sees_everybodys(shared_app):
    """By saying whose."""
    await shared_app.hear(wire())
    [name] = await ids_of(shared_app, "alice")

    answer = await shared_app.get("alerts_explain", who="root.operator", alert_id=name, subscriber="alice")

    assert (answer.status_code, body_of(answer)["subscriber"]) == (200, "alice")


@pytest.mark.parametrize("name", ["", "x", "../..", "00000000-0000-5000-8000-00000000000g", "%00", "ä" * 36])
async def test_an_id_that_is_none_is_not_found(shared_app, name):
    """Nothing but an id of ours reaches storage."""
    assert (await shared_app.get("alerts_explain", alert_id=name)).status_code == 404


async def test_an_alert_is_acknowledged_by_its_owner(shared_app):
    """The item says when; again changes nothing."""
    await shared_app.hear(wire())
    [name] = await ids_of(shared_app, "alice")

    first = await shared_app.get("alerts_acknowledge", who="alice", alert_id=name)
    shared_app.house.wall.at += timedelta(minutes=1)
    again = await shared_app.get("alerts_acknowledge", who="alice", alert_id=name)

    assert (first.status_code, body_of(first)["acknowledged_at"]) == (200, "2026-11-21T09:00:00Z")
    assert body_of(again) == body_of(first)


@pytest.mark.parametrize(
    ("whose", "who", "status"),
    [
        ("alice", None, 401),
        ("alice", "bob", 404),
        ("public", "bob", 403),
        ("public", "root.operator", 200),
        ("bob", "bob", 200),
    ],
)
async def test_who_may_acknowledge(shared_app, whose, who, status):
    """One's own; the public ones by operators; nobody without a token."""
    await shared_app.hear(wire())
    [name] = await ids_of(shared_app, whose if whose != "public" else None)

    answer = await shared_app.get("alerts_acknowledge", who=who, alert_id=name)

    assert answer.status_code == status
    seen = [r.alert.acknowledged_by for r in await shared_app.house.records(whose)]
    assert seen == [(who or "").split(".")[0] if status == 200 else None]


async def test_bars_on_the_wire_wake_the_rules(shared_app):
    """The event function decodes and asks; bars that nobody asked about leave nothing."""
    rule = a_subscription("discord", subscriber="alice", kind=Kind.PRICE, interval="1d", price_above=1.0)
    shared_app.house.directory.change("alice", subscriptions=(rule,))
    asked = []

    class Series:
        async def get(self, symbol, interval):
            asked.append((symbol, interval))
            raise NotFoundError("not watched")

    object.__setattr__(shared_app.service, "market", SimpleNamespace(series=Series()))
    bars = BarsIngested(
        occurred_at=CLOSE,
        recorded_at=CLOSE,
        symbol="AAPL",
        interval=Interval.DAY,
        revision=0,
        first_closed_at=CLOSE,
        last_closed_at=CLOSE,
        count=1,
    )
    event = a_cloud_event(bars.to_wire()["data"], type=BarsIngested.type)

    await shared_app.call("alerts_on_bars_ingested", event)
    await shared_app.call("alerts_on_bars_ingested", a_cloud_event({}, type=BarsIngested.type))

    assert asked == [("AAPL", "1d")]
    [letter] = await shared_app.buried()
    assert letter["source"] == "alerts_on_bars_ingested"


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


async def test_who_is_signed_in_is_themselves_at_the_hub(app):
    """The subject of the verified token is the user, whatever else the request says."""
    headers = as_("alice") | FORGED["a principal's name"]

    answer = await app.negotiate(headers=headers, userId="bob")

    assert user_of(answer) == "alice"
    assert app.hub.groups == [("alice", "symbols/all")]


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
