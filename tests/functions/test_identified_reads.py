"""Bars, quotes and history for who is signed in: fetched on demand, at the cost of their own share of the day."""

import json
import sys
from datetime import date
from typing import Any

import pytest

from shared.documents import Document, sort_key
from shared.market.callers import PARTITION, WITHOUT_A_DAY, Caller
from shared.market.conditional import QUOTA
from shared.market.fetches import PARTITION as FETCHES
from tests.functions.running_app import SESSIONS, Answer, App, Reply, waves

pytestmark = [pytest.mark.asyncio(loop_scope="session")]

LAST = SESSIONS[-1].closes_at.isoformat().replace("+00:00", "Z")


def core() -> Any:
    return sys.modules["function_app"].core


async def read(app: App, path: str, who: str | None, **query: str) -> tuple[Answer, int]:
    """A GET by somebody, and how many calls to providers it took."""
    headers = await app.signed_in(who) if who else {}
    before = app.neighbours.provider_calls()
    answer = await app.ask("GET", path, headers=headers, **query)
    return answer, app.neighbours.provider_calls() - before


async def calls_of(caller: str) -> int:
    """How many calls of today are charged to a caller."""
    callers = core().supply.library.callers
    return int(callers.allowed - await callers.left(Caller(id=caller)))


async def spend(subject: str) -> None:
    """Let a subscriber's share of the day be spent."""
    callers = core().supply.library.callers
    assert callers.allowed == WITHOUT_A_DAY
    name = f"subscriber:{subject}"
    document = Document(
        id=callers._id(Caller(id=name)),
        partition=PARTITION,
        sort=sort_key(core().wall.now(), name),
        body={"caller": name, "calls": callers.allowed},
    )
    await core().documents.create(QUOTA, document)


async def stored_fetch(fetch_id: str) -> Document:
    found: Document = await core().documents.read("system", FETCHES, fetch_id)
    return found


async def test_bars_nobody_holds_are_fetched_for_who_is_signed_in_alone(app: App) -> None:
    """Anonymous reads never spend a call; a token does, once, and then everybody has the bars."""
    app.neighbours.prices["FRESH"] = waves(80)

    stranger, calls = await read(app, "/api/bars/FRESH", None)
    assert (stranger.status, calls) == (404, 0)

    answer, calls = await read(app, "/api/bars/FRESH", "ada", limit="80")
    page = answer.json()
    assert (answer.status, calls) == (200, 1)
    assert [item["closed_at"] for item in page["items"]][:1] == [LAST]
    assert len(page["items"]) == 80
    assert {name: page[name] for name in ("as_of", "is_stale", "provider", "adjustment", "revision", "reason")} == {
        "as_of": LAST,
        "is_stale": False,
        "provider": "alpha_vantage",
        "adjustment": "raw",
        "revision": 0,
        "reason": None,
    }
    assert answer.headers["Cache-Control"].startswith("private")
    assert await calls_of("subscriber:ada") == 1

    for who in ("ada", "bob", None):
        again, calls = await read(app, "/api/bars/FRESH", who, limit="80")
        assert (again.status, len(again.json()["items"]), calls) == (200, 80, 0), who


async def test_a_quote_nobody_holds_is_fetched_for_who_is_signed_in_alone(app: App) -> None:
    """The same for the last price."""
    app.neighbours.prices["PRICED"] = waves(20)

    stranger, calls = await read(app, "/api/quotes/PRICED", None)
    assert (stranger.status, calls) == (404, 0)

    answer, calls = await read(app, "/api/quotes/PRICED", "ada")
    assert (answer.status, calls) == (200, 1)
    quote = answer.json()
    assert quote["price"] == pytest.approx(waves(20)[-1])
    assert (quote["provider"], quote["as_of"], quote["is_stale"], quote["reason"]) == ("finnhub", LAST, False, None)

    for who in ("bob", None):
        again, calls = await read(app, "/api/quotes/PRICED", who)
        assert (again.json()["price"], calls) == (quote["price"], 0)


async def test_a_token_of_somebody_else_is_nobody_and_a_forged_one_is_refused(app: App) -> None:
    """Only a token that we verified spends anything; the function key is no person."""
    app.neighbours.prices["FORGED"] = waves(20)
    token = await app.token("ada")
    for headers, status in (
        ({"Authorization": "Bearer not-a-token"}, 404),
        ({"Authorization": f"Bearer {token[:-8]}AAAAAAAA"}, 401),
        ({"x-ms-client-principal-id": "ada"}, 404),
    ):
        before = app.neighbours.provider_calls()
        answer = await app.ask("GET", "/api/bars/FORGED", headers=headers)
        assert (answer.status, app.neighbours.provider_calls() - before) == (status, 0), headers
    before = app.neighbours.provider_calls()
    assert (await app.ask("GET", "/api/bars/FORGED", key=True)).status == 404
    assert app.neighbours.provider_calls() == before


async def test_what_cannot_be_fetched_leaves_what_is_held_and_says_why(filled: App) -> None:
    """A provider in trouble makes the answer stale, with the reason; where nothing is held it is the answer."""
    await filled.follow("HELD", waves(30))
    first = date(2012, 10, 1).isoformat()
    with filled.neighbours.trouble(**dict.fromkeys(("alpha_vantage", "finnhub"), Reply(429, "slow down"))):
        answer, _ = await read(filled, "/api/bars/HELD", "ada", limit="500", **{"from": first})
        nothing, _ = await read(filled, "/api/bars/NOTHELD", "ada")
    await filled.forgive()

    assert answer.status == 200
    page = answer.json()
    assert (len(page["items"]), page["is_stale"], page["as_of"]) == (30, True, LAST)
    assert page["reason"]
    assert nothing.status in (429, 503), nothing.text
    assert int(nothing.headers["Retry-After"]) >= 1


async def test_who_has_spent_their_share_waits_until_tomorrow(app: App) -> None:
    """429 with Retry-After for what is not held; what is held is answered, and others go on."""
    await spend("spender")
    app.neighbours.prices["CAPPED"] = waves(20)

    for path in ("/api/bars/CAPPED", "/api/quotes/CAPPED"):
        answer, calls = await read(app, path, "spender")
        assert (answer.status, answer.content_type, calls) == (429, "application/problem+json", 0)
        assert "your share of today's provider calls is spent" in answer.json()["detail"]
        assert 1 <= int(answer.headers["Retry-After"]) <= 86_400

    other, calls = await read(app, "/api/bars/CAPPED", "thrifty")
    assert (other.status, calls) == (200, 1)
    held, calls = await read(app, "/api/bars/CAPPED", "spender")
    assert (held.status, held.json()["is_stale"], calls) == (200, False, 0)


async def test_a_subscriber_has_history_fetched_at_their_own_cost(app: App) -> None:
    """The request is charged to who made it, is worked off as any other, and its state can be read by all."""
    app.neighbours.prices["MINE"] = waves(60)
    wanted = {"symbol": "MINE", "from": str(SESSIONS[-40].date), "to": str(SESSIONS[-1].date)}
    assert (await app.ask("POST", "/api/my/fetches", json=wanted)).status == 401

    answer = await app.ask("POST", "/api/my/fetches", json=wanted, headers=await app.signed_in("carol"))

    assert (answer.status, answer.json()["state"]) == (202, "queued")
    where = answer.headers["Location"]
    assert where == f"/api/fetches/{answer.json()['fetch_id']}"
    assert (await app.fire("market_fetches")).error is None
    assert (await app.get(where)).json()["state"] == "done"
    assert await calls_of("subscriber:carol") == 1
    assert "carol" not in (await app.get(where)).text, "who asked is nobody's business"


async def test_a_fetch_is_charged_to_the_token_where_key_and_token_are_shown(app: App) -> None:
    """The key says that a program may; the token says whose share it spends."""
    for headers, caller, until in ({}, "function-key", -2), (await app.signed_in("dora"), "subscriber:dora", -3):
        wanted = {"symbol": "KEYED", "from": str(SESSIONS[-9].date), "to": str(SESSIONS[until].date)}
        answer = await app.ask("POST", "/api/fetches", key=True, json=wanted, headers=headers)
        assert answer.status == 202
        assert (await stored_fetch(answer.json()["fetch_id"])).body["caller"] == caller
        cancelled = await app.ask("DELETE", f"/api/fetches/{answer.json()['fetch_id']}", key=True)
        assert (cancelled.status, cancelled.json()["state"]) == (200, "cancelled")


async def test_only_who_asked_or_an_operator_or_the_key_cancels_a_fetch(app: App) -> None:
    """What is somebody's is theirs to stop, and the refusal says who may."""
    wanted = {"symbol": "THEIRS", "from": str(SESSIONS[-9].date), "to": str(SESSIONS[-1].date)}
    ann, bob = [await app.signed_in(name) for name in ("ann", "bob")]
    olga = await app.signed_in("olga", role="operator")
    for who in (ann, olga):
        queued = await app.ask("POST", "/api/my/fetches", json=wanted, headers=ann)
        path = f"/api/my/fetches/{queued.json()['fetch_id']}"

        refused = await app.ask("DELETE", path, headers=bob)
        assert (refused.status, refused.content_type) == (403, "application/problem+json")
        assert "operator" in refused.json()["detail"]
        assert (await app.ask("DELETE", path)).status == 401
        assert (await app.get(path.replace("/my", ""))).json()["state"] == "queued"

        assert (await app.ask("DELETE", path, headers=who)).json()["state"] == "cancelled"
    unknown = await app.ask("DELETE", "/api/my/fetches/none", headers=bob)
    assert unknown.status == 404


async def test_events_the_topic_refuses_can_be_seen_and_published_after_all(app: App) -> None:
    """A topic that says 400 leaves dead letters of the domain; an operator replays them once it is mended."""
    app.neighbours.prices["UNTOLD"] = waves(40)
    app.watch("UNTOLD")
    with app.neighbours.trouble(topic=Reply(400, "wrong schema")):
        assert (await app.fire("signals_ingest")).error is None
    olga = await app.signed_in("olga", role="operator")

    listed = await app.ask("GET", "/api/deadletters", headers=olga, source="market", limit="500")
    [letter] = [x for x in listed.json()["items"] if "UNTOLD" in json.dumps(x)]
    assert (letter["origin"], letter["state"]) == ("outbox", "open")
    path = f"/api/deadletters/{letter['dead_letter_id']}/replay"
    replayed = await app.ask("POST", path, headers=olga, json={"reason": "the schema was wrong"})

    assert replayed.status == 200, replayed.text
    assert [event["subject"] for event in app.neighbours.events] == ["symbols/UNTOLD"]
    await app.deliver()
    series = (await app.get("/api/series/UNTOLD")).json()
    assert (series["evaluated_through"], series["trouble"]) == (LAST, None)
