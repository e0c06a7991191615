"""When backtests wake up: their triggers and their HTTP, called as the Functions worker calls them."""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import azure.functions as func
import pytest

from shared.http import Api
from shared.inbound import DeadLetters, RedeliverError
from signals.backtest_functions import ResultItem, blueprint
from signals.logic.strategies import STRATEGIES
from tests.builders import a_cloud_event, a_request
from tests.standins import Fuse, fused
from tests.unit.signals.backtest_house import GRID, BacktestHouse

ASKED = {"strategy": "sma_cross", "params": {"fast": 3, "slow": 9}, "symbol": "AAPL"}


class Woken:
    """The functions by name, over a house of their own."""

    def __init__(self) -> None:
        self.house = BacktestHouse()
        self.dead_letters = DeadLetters(self.house.storage, self.house.wall)
        self.api = Api()
        self.functions = self.over(self.house.service)

    def over(self, service: Any) -> dict[str, Any]:
        app = func.FunctionApp()
        app.register_functions(blueprint(lambda: service, self.dead_letters, self.api))
        return {f.get_function_name(): f for f in app.get_functions()}

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.functions[name].get_user_function()

    async def post(self, body: object) -> func.HttpResponse:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return await self["signals_backtest_request"](a_request("POST", "/api/backtests", body=text, headers=headers))

    async def get(self, function: str, params: Mapping[str, str] | None = None, **route: str) -> Mapping[str, Any]:
        answer = await self[function](a_request(params=params, route=route))
        assert answer.status_code == 200, answer.get_body()
        return json.loads(answer.get_body())

    async def hear(self) -> None:
        """Deliver what was told, oldest first, until nothing is told any more."""
        while self.house.topic.told:
            sent = self.house.topic.told.pop(0).to_wire()
            event = a_cloud_event(sent["data"], type=sent["type"], id=sent["id"], subject=sent["subject"])
            await self["signals_on_backtest_requested"](event)


@pytest.fixture
async def woken() -> Woken:
    woken = Woken()
    await woken.house.open()
    return woken


async def test_a_backtest_is_asked_for_done_and_read(woken: Woken) -> None:
    """202 with the place to look at; queued, then done, with everything that it found."""
    answer = await woken.post(ASKED)
    assert answer.status_code == 202
    [item] = json.loads(answer.get_body())["items"]
    assert answer.headers["Location"] == f"/api/backtests/{item['backtest_id']}"
    queued = await woken.get("signals_backtest", id=item["backtest_id"])
    assert (queued["state"], queued["progress"], queued["result"]) == ("queued", {"done": 0, "total": 1}, None)
    await woken.hear()
    done = await woken.get("signals_backtest", id=item["backtest_id"])
    assert (done["state"], done["progress"]) == ("done", {"done": 1, "total": 1})
    assert done["provenance"] == {"provider": "alpha_vantage", "adjustment": "raw", "revision": 0}
    assert done["result"]["metrics"]["sharpe"]["value"] == done["summary"]["sharpe"]
    assert set(done["result"]["metrics"]["sortino"]) == {"value", "reason"}
    assert len(done["result"]["curve"]["at"]) == len(done["result"]["curve"]["equity"])
    assert done["result"]["rules"]["fee"] == done["rules"]["fee"] == 0.001


async def test_nothing_of_a_result_is_lost_on_its_way(woken: Woken) -> None:
    """The model that openapi.json shows has every field that the engine writes."""
    await woken.post({**ASKED, "validation": "walk_forward", "grid": GRID})
    await woken.hear()
    [backtest] = await woken.house.all()
    result = await woken.house.service.backtests.result(backtest)
    assert result
    shown = ResultItem.model_validate(result).model_dump(mode="json")
    assert set(shown) == set(result)
    for name in ("range", "trades", "curve", "fills", "marks", "deflated_sharpe"):
        assert set(shown[name]) == set(result[name]), name
    assert set(shown["trades"]["items"][0]) == set(result["trades"]["items"][0])
    assert set(shown["validation"]["folds"][0]) == set(result["validation"]["folds"][0])
    assert set(shown["validation"]["hold_out"]) == set(result["validation"]["hold_out"])


async def test_lists_are_the_houses_lists(woken: Woken) -> None:
    """Newest first with a cursor, ``after`` oldest first, and one strategy's alone."""
    for fast in (2, 3, 4):
        await woken.post({**ASKED, "params": {"fast": fast, "slow": 9}})
        woken.house.wall.at += timedelta(minutes=2)
    await woken.post({"strategy": "donchian_breakout", "params": {"period": 5}, "symbol": "AAPL"})
    first = await woken.get("signals_backtests", {"limit": "3"})
    rest = await woken.get("signals_backtests", {"limit": "3", "cursor": first["next"]})
    assert [len(first["items"]), len(rest["items"]), rest["next"]] == [3, 1, None]
    asked = [item["requested_at"] for item in [*first["items"], *rest["items"]]]
    assert asked == sorted(asked, reverse=True)
    later = await woken.get("signals_backtests", {"after": rest["items"][0]["cursor"]})
    assert [item["requested_at"] for item in later["items"]] == sorted(asked), "the last minute before is repeated"
    only = await woken.get("signals_backtests", {"strategy": "donchian_breakout"})
    assert [item["strategy"] for item in only["items"]] == ["donchian_breakout@1"]
    assert only["items"][0]["summary"] is None


async def test_several_symbols_are_several_backtests(woken: Woken) -> None:
    """One answer lists them; its place is the list."""
    answer = await woken.post({**ASKED, "symbol": None, "symbols": ["AAPL", "aapl"]})
    assert len(json.loads(answer.get_body())["items"]) == 1
    answer = await woken.post({"entry": "cross", "symbol": "AAPL"})
    assert json.loads(answer.get_body())["items"][0]["entry"] == "cross"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "JSON"),
        (b"[]", 400, "object"),
        ({**ASKED, "strategy": "magic"}, 400, "strategy: 'magic' is unknown"),
        ({"entry": "magic", "symbol": "AAPL"}, 400, "entry: none is called 'magic'"),
        ({**ASKED, "params": {"fast": 0}}, 400, "params.fast: "),
        (b'{"strategy": "sma_cross", "symbol": "AAPL", "params": {"fast": NaN}}', 400, "the body holds NaN"),
        ({**ASKED, "from": "2030-01-01"}, 400, "from, to: 0 bars"),
        ({**ASKED, "params": {"slow": 900}}, 400, "params: sma_cross must see 901 bars"),
        ({**ASKED, "validation": "purged_cv", "grid": {"fast": [*range(1, 502)]}}, 400, "grid: 501 variants"),
        ({**ASKED, "symbol": "ZZZZ"}, 404, "symbol: no bars of ZZZZ"),
    ],
)
async def test_bad_input_gets_a_problem_that_names_the_field(
    woken: Woken, body: object, status: int, said: str
) -> None:
    """problem+json, before anything is queued or told."""
    answer = await woken.post(body)
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert said in json.loads(answer.get_body())["detail"]
    assert woken.house.topic.told == []


async def test_a_second_opening_of_the_hold_out_is_a_conflict(woken: Woken) -> None:
    """409, with the backtest that opened it and what to do."""
    await woken.post({**ASKED, "validation": "walk_forward", "grid": GRID})
    await woken.hear()
    answer = await woken.post({**ASKED, "validation": "walk_forward", "grid": {"fast": [4]}})
    assert answer.status_code == 409
    assert "choose a to before" in json.loads(answer.get_body())["detail"]


async def test_an_unknown_backtest_is_not_found(woken: Woken) -> None:
    """404 with how to make one."""
    answer = await woken["signals_backtest"](a_request(route={"id": "none"}))
    assert answer.status_code == 404
    assert "POST /api/backtests makes one" in json.loads(answer.get_body())["detail"]


async def test_an_event_of_no_backtest_is_buried(woken: Woken) -> None:
    """It can never succeed; so can one that is none of ours."""
    await woken.post(ASKED)
    sent = woken.house.topic.told[0].to_wire()
    for data in ({**sent["data"], "backtest_id": "gone"}, {"nonsense": 1}):
        await woken["signals_on_backtest_requested"](a_cloud_event(data, type=sent["type"], id=str(len(data))))
    assert len(await woken.dead_letters.newest(after=None, limit=10)) == 2


async def test_storage_in_trouble_is_tried_again(woken: Woken) -> None:
    """The event is asked for again, and then the backtest is done."""
    await woken.post(ASKED)
    sent = woken.house.topic.told[0].to_wire()
    event = a_cloud_event(sent["data"], type=sent["type"])
    broken = woken.over(woken.house.instance(storage=fused(woken.house.storage, Fuse(3, "raise before"))))
    with pytest.raises(RedeliverError):
        await broken["signals_on_backtest_requested"].get_user_function()(event)
    woken.house.wall.at += timedelta(seconds=31)
    await woken.hear()
    [backtest] = await woken.house.all()
    assert backtest.state == "done"
    assert await woken.dead_letters.newest(after=None, limit=10) == []


async def test_the_sweep_timer_does_what_no_event_did(woken: Woken) -> None:
    """What was queued by new history, and what lost its event."""
    await woken.house.service.heard(woken.house.heard(woken.house.bars))
    await woken["signals_backtest_sweep"](None)
    [item] = (await woken.get("signals_backtests"))["items"]
    assert (item["state"], item["trigger"], item["entry"]) == ("done", "history", "cross")


async def test_strategies_can_be_looked_up(woken: Woken) -> None:
    """Each with its parameters and their bounds, where its formula comes from, and the entries that use it."""
    items = {item["name"]: item for item in (await woken.get("signals_strategies"))["items"]}
    assert set(items) == set(STRATEGIES)
    sma = items["sma_cross"]
    assert sma["entries"] == ["cross", "apart"]
    fast = next(param for param in sma["params"] if param["name"] == "fast")
    assert (fast["type"], fast["default"], fast["minimum"]) == ("integer", 10, 1)
    level = next(param for param in items["adx_trend"]["params"] if param["name"] == "level")
    assert (level["above"], level["below"], level["minimum"], level["maximum"]) == (0, 100, None, None)
    assert sma["lookback"] == 31
    assert all(item["source"] and item["intervals"] for item in items.values())


def test_only_asking_needs_the_key(woken: Woken) -> None:
    """Reading is for anybody; a backtest costs us work."""
    keyed = {e.name for e in woken.api.endpoints if not e.anonymous}
    assert keyed == {"signals_backtest_request"}
