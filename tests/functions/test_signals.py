"""When the signals domain wakes up: its triggers and its list, called as the Functions worker calls them."""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import azure.functions as func
import pytest

from shared.clock import parse_instant
from shared.errors import UnavailableError
from shared.http import Api, cursor_of
from shared.inbound import DeadLetters, RedeliverError
from shared.market.events import BarsIngested
from signals.functions import blueprint
from signals.wiring import Wired
from tests.builders import RecordedProvider, a_cloud_event, a_request, daily_bars
from tests.unit.signals.house import House, a_watcher

BARS = daily_bars(40, prices=[100 + (i * 7) % 11 for i in range(40)])
"""A market that turns almost every day."""


class NoBacktests:
    """Nobody tries anything on the past here."""

    async def heard(self, event: BarsIngested) -> int:
        return 0


class Woken:
    """The domain's functions by name, over a house of its own."""

    def __init__(self, folder: Path) -> None:
        self.house = House(
            BARS,
            live_from=BARS[9].closed_at,
            watchers=[a_watcher("cross", "sma_cross", fast=1, slow=2)],
            provider=RecordedProvider("alpha_vantage", {"AAPL": BARS}),
        )
        self.house.watchlist = folder / "watchlist.toml"
        self.house.watchlist.write_text('[[watch]]\nsymbols = ["AAPL"]\n')
        self.dead_letters = DeadLetters(self.house.storage, self.house.wall)
        app = func.FunctionApp()
        wired = Wired(service=self.house.instance(), backtests=NoBacktests, dead_letters=self.dead_letters)
        app.register_functions(blueprint(wired, Api()))
        self.functions = {f.get_function_name(): f for f in app.get_functions()}

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.functions[name].get_user_function()

    async def get(self, **params: str) -> func.HttpResponse:
        return await self["signals_list"](a_request(path="/api/signals", params=params))

    async def answer(
        self, function: str, params: Mapping[str, str] | None = None, *, status: int = 200, **route: str
    ) -> Mapping[str, Any]:
        answer = await self[function](a_request(params=params, route=route))
        assert answer.status_code == status, answer.get_body()
        return json.loads(answer.get_body())

    async def page(self, **params: str) -> Mapping[str, Any]:
        answer = await self.get(**params)
        assert answer.status_code == 200, answer.get_body()
        return json.loads(answer.get_body())

    async def letters(self) -> list[Mapping[str, Any]]:
        return [d.body for d in await self.dead_letters.newest(after=None, limit=10)]


@pytest.fixture
def woken(tmp_path: Path) -> Woken:
    return Woken(tmp_path)


async def spread_out(woken: Woken) -> None:
    """Bars come in one after another, two minutes apart on the wall, so that signals have an order."""
    await woken.house.open()
    for i in range(len(BARS)):
        event = await woken.house.store(i, i + 1)
        await woken["signals_on_bars_ingested"](wire(event))
        woken.house.wall.at += timedelta(minutes=2)


def wire(event: BarsIngested, **changes: Any) -> func.CloudEvent:
    """The event as the worker hands it over."""
    sent = event.to_wire()
    return a_cloud_event(sent["data"] | changes, type=sent["type"], id=sent["id"], subject=sent["subject"])


# --- triggers


async def test_bars_become_signals_from_timer_to_topic(woken: Woken) -> None:
    """The ingest timer fetches what is due and says so; that event makes signals and tells of the live ones."""
    await woken["signals_ingest"](None)
    [event] = woken.house.topic.told
    assert isinstance(event, BarsIngested)
    await woken["signals_on_bars_ingested"](wire(event))
    assert len(await woken.house.ledger()) > 20
    assert {e.event_id for e in woken.house.raised()} == await woken.house.told()
    assert woken.house.scored(), "horizons have closed within these bars"
    assert await woken.letters() == []
    series = await woken.house.series()
    assert series.evaluated_through == BARS[-1].closed_at


async def test_the_sweep_timer_tells_what_is_still_owed(woken: Woken) -> None:
    """A signal whose event was lost is told once its handler's ten seconds are over."""
    await woken.house.open()
    event = await woken.house.store(0, 40)
    woken.house.topic.trouble = [UnavailableError("the topic is down")]
    with pytest.raises(RedeliverError, match="UnavailableError"):
        await woken["signals_on_bars_ingested"](wire(event))
    assert woken.house.topic.told == []
    woken.house.wall.at += timedelta(seconds=10)
    await woken["signals_sweep"](None)
    assert sorted(e.event_id for e in woken.house.raised()) == sorted(await woken.house.told())
    assert await woken.letters() == [], "trouble that passes is not buried"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "data"),
        ("not an object", "data"),
        ({}, "symbol: Field required"),
        ({"interval": "5m"}, "interval"),
        ({"symbol": None}, "symbol"),
        ({"last_closed_at": "2013-01-02T21:00:00"}, "last_closed_at"),
        ({"count": "many"}, "count"),
        ({"symbol": "NOPE"}, "NOPE at 1d is not watched"),
    ],
)
async def test_a_malformed_event_is_buried_and_not_raised(woken: Woken, data: Any, said: str) -> None:
    """Event Grid would deliver it again for a day: it is kept with its reason instead, once however often it comes."""
    await woken.house.open()
    good = wire(await woken.house.store(0, 5))
    broken = {**good.get_json(), **data} if isinstance(data, dict) and data else data
    event = a_cloud_event(broken, type=BarsIngested.type, id="broken-1")
    await woken["signals_on_bars_ingested"](event)
    await woken["signals_on_bars_ingested"](event)
    [letter] = await woken.letters()
    assert letter["source"] == "signals_on_bars_ingested"
    assert letter["event_id"] == "broken-1"
    assert letter["times"] == 2
    assert said in letter["reason"]
    assert await woken.house.ledger() == {}


async def test_an_event_of_another_type_is_buried(woken: Woken) -> None:
    """A subscription that was set up wrong is seen in the dead letters."""
    await woken["signals_on_bars_ingested"](a_cloud_event({}, type="market.bars_ingested.v9"))
    [letter] = await woken.letters()
    assert "expected an event of type market.bars_ingested.v1, got 'market.bars_ingested.v9'" in letter["reason"]


async def test_a_field_we_do_not_know_yet_is_ignored(woken: Woken) -> None:
    """A version of an event may gain fields."""
    await woken.house.open()
    event = await woken.house.store(0, 5)
    await woken["signals_on_bars_ingested"](wire(event, exchange="XNYS"))
    assert await woken.letters() == []
    assert (await woken.house.series()).evaluated_through == BARS[4].closed_at


# --- the list


async def test_signals_are_listed_newest_first_with_all_that_caused_them(woken: Woken) -> None:
    """Every field of the stored signal is shown, how it fared as well; nothing else."""
    await spread_out(woken)
    items = (await woken.page(limit="500"))["items"]
    stored = await woken.house.ledger()
    assert {item["signal_id"] for item in items} == set(stored)
    assert [i["recorded_at"] for i in items] == sorted((i["recorded_at"] for i in items), reverse=True)
    for item in items:
        shown = {name: value for name, value in item.items() if name not in ("recorded_at", "cursor")}
        assert shown == {name: value for name, value in stored[item["signal_id"]].items() if name != "variant"}


async def test_pages_join_without_a_gap_and_the_last_one_says_so(woken: Woken) -> None:
    """Following `next` shows each signal exactly once."""
    await spread_out(woken)
    seen: list[str] = []
    params = {"limit": "7"}
    while True:
        page = await woken.page(**params)
        seen += [item["signal_id"] for item in page["items"]]
        if page["next"] is None:
            break
        params["cursor"] = page["next"]
    assert seen == [item["signal_id"] for item in (await woken.page(limit="500"))["items"]]


async def test_after_a_cursor_come_newer_signals_oldest_first(woken: Woken) -> None:
    """The last minute before the cursor is repeated, so that a late commit is seen; older ones are not."""
    await spread_out(woken)
    everything = list(reversed((await woken.page(limit="500"))["items"]))
    known = everything[4]
    stored = await woken.house.storage.read("signals", "AAPL", known["signal_id"])
    page = await woken.page(after=cursor_of(stored.sort), limit="500")
    since = parse_instant(known["recorded_at"]) - timedelta(seconds=60)
    assert page["items"] == [i for i in everything if parse_instant(i["recorded_at"]) >= since]
    assert page["items"][0] == known
    again = await woken.page(after=page["next"], limit="500")
    assert [i["signal_id"] for i in again["items"]] == [everything[-1]["signal_id"]], "nothing newer, one repeated"


async def test_a_symbol_filters_the_list(woken: Woken) -> None:
    """In any spelling; a symbol nobody watches has no signals."""
    await spread_out(woken)
    everything = await woken.page(limit="500")
    assert await woken.page(symbol="aapl", limit="500") == everything
    assert await woken.page(symbol="MSFT") == {"items": [], "next": None}
    first = await woken.page(symbol="AAPL", limit="3")
    assert first["items"] == everything["items"][:3]
    assert (await woken.page(symbol="AAPL", limit="3", cursor=first["next"]))["items"] == everything["items"][3:6]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"symbol": "A A"}, "'A A' is no symbol"),
        ({"limit": "0"}, "limit must be a whole number from 1 to 500"),
        ({"limit": "501"}, "limit must be a whole number from 1 to 500"),
        ({"cursor": "nonsense"}, "the cursor is none of ours"),
        ({"after": "nonsense"}, "the cursor is none of ours"),
    ],
)
async def test_a_list_that_cannot_be_is_a_problem(woken: Woken, params: Mapping[str, str], said: str) -> None:
    """The answer is problem+json and names what is wrong."""
    answer = await woken.get(**params)
    assert (answer.status_code, answer.mimetype) == (400, "application/problem+json")
    assert said in json.loads(answer.get_body())["detail"]


# --- one signal


async def test_a_live_signal_is_found_by_its_id_alone_with_why_and_outcome(woken: Woken) -> None:
    """Alerts and posts carry the id and nothing else: it is enough, and shows what the list shows."""
    await spread_out(woken)
    listed = {item["signal_id"]: item for item in (await woken.page(limit="500"))["items"]}
    live = [item for item in listed.values() if item["origin"] == "live"]
    assert {item["outcome"]["state"] for item in live} == {"pending", "scored"}
    for item in live:
        assert await woken.answer("signals_read", signal_id=item["signal_id"]) == item
        assert await woken.answer("signals_read", {"symbol": "aapl"}, signal_id=item["signal_id"]) == item
        assert item["why"].startswith(f"{item['direction'].capitalize()}, because ")
        assert item["sample_size"] == 0 or 0 < item["confidence"] < 1


async def test_a_signal_of_history_is_found_with_its_symbol(woken: Woken) -> None:
    """It was never told of; without the symbol the answer says what is missing."""
    await spread_out(woken)
    items = (await woken.page(limit="500"))["items"]
    old = next(item for item in items if item["origin"] == "backfill")
    assert await woken.answer("signals_read", {"symbol": "AAPL"}, signal_id=old["signal_id"]) == old
    problem = await woken.answer("signals_read", signal_id=old["signal_id"], status=404)
    assert "add ?symbol=" in problem["detail"]


@pytest.mark.parametrize("id_", ["nobody", "book|AAPL|1d"])
async def test_what_is_no_signal_is_not_found(woken: Woken, id_: str) -> None:
    """Neither an id nobody has, nor the id of what is kept beside the signals."""
    await spread_out(woken)
    problem = await woken.answer("signals_read", {"symbol": "AAPL"}, signal_id=id_, status=404)
    assert f"no signal '{id_}' is stored: AAPL has none" in problem["detail"]


@pytest.mark.parametrize("newest", [False, True])
async def test_lists_show_signals_only(woken: Woken, newest: bool) -> None:
    """Books, records and the way from an id to its symbol lie in the same container, and in no list."""
    await spread_out(woken)
    stored = set(await woken.house.ledger())
    assert len(await woken.house.kept()) >= 2
    signals = woken.house.instance().signals
    for symbol in (None, "AAPL"):
        for after in (None, "", "0001"):
            found = await signals.listed(symbol, after if not newest else None, newest_first=newest, limit=1000)
            assert {document.id for document in found} == stored
            few = await signals.listed(symbol, after if not newest else None, newest_first=newest, limit=3)
            assert [document.id for document in few] == [document.id for document in found[:3]]


# --- performance


async def test_the_performance_of_an_entry_accounts_for_every_signal(woken: Woken) -> None:
    """Scored and pending together are what was raised, live or in history; the figures are the outcomes'."""
    await spread_out(woken)
    outcomes = [s["outcome"] for s in (await woken.house.ledger()).values()]
    scored = [o for o in outcomes if o["state"] == "scored"]
    shown = await woken.answer("signals_performance", name="cross")
    total = shown["total"]
    assert (total["n"], total["pending"]) == (len(scored), sum(o["state"] == "pending" for o in outcomes))
    assert total["hit_rate"] == sum(o["is_hit"] for o in scored) / len(scored)
    assert total["base_rate"] == sum(o["base_return"] > 0 for o in scored) / len(scored)
    assert total["mean_forward_return"] == pytest.approx(sum(o["forward_return"] for o in scored) / len(scored))
    assert total["hit_rate_low"] < total["hit_rate"] < total["hit_rate_high"]
    assert shown["by_symbol"] == {"AAPL": total}
    assert sum(one["n"] for one in shown["by_regime"].values()) == total["n"]
    assert (shown["strategy"], shown["horizon"], shown["cost_per_side"]) == ("sma_cross", 5, 0.001)
    of_symbol = await woken.answer("signals_performance", {"symbol": "aapl"}, name="cross")
    assert of_symbol == {**shown, "symbol": "AAPL"}


async def test_an_entry_without_outcomes_has_nulls_with_a_reason(woken: Woken) -> None:
    """Nothing is made up."""
    total = (await woken.answer("signals_performance", name="cross"))["total"]
    assert (total["n"], total["pending"], total["hit_rate"], total["ic"]) == (0, 0, None, None)
    assert total["undefined"]["hit_rate"] == "nothing has been scored yet"
    assert total["undefined"]["ic"] == "needs 3 scored signals, has 0"
    assert total["is_edge_gone"] is False


async def test_an_unknown_entry_is_answered_with_the_known_ones(woken: Woken) -> None:
    """A person who mistyped a name sees the right one."""
    problem = await woken.answer("signals_performance", name="corss", status=404)
    assert problem["detail"] == "no entry is called 'corss': there is cross"


def test_the_domain_wakes_up_for_these_reasons_only(woken: Woken) -> None:
    """Two timers whose schedules are settings, one subscription, three routes."""
    bindings = {
        name: next(b.get_dict_repr() for b in f.get_bindings() if b.name in ("timer", "event", "req"))
        for name, f in woken.functions.items()
    }
    assert {name: b["type"] for name, b in bindings.items()} == {
        "signals_ingest": "timerTrigger",
        "signals_sweep": "timerTrigger",
        "signals_on_bars_ingested": "eventGridTrigger",
        "signals_list": "httpTrigger",
        "signals_read": "httpTrigger",
        "signals_performance": "httpTrigger",
    }
    assert bindings["signals_ingest"]["schedule"] == "%SIGNALS_INGEST_SCHEDULE%"
    assert bindings["signals_sweep"]["schedule"] == "%SIGNALS_SWEEP_SCHEDULE%"
