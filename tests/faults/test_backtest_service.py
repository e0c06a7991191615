"""Backtests as a service: one a question, worked off in steps, variants counted and hold-outs opened once."""

import json
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from shared.errors import (
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    PermanentError,
    RefusedError,
    UnavailableError,
)
from shared.inbound import DeadLetters
from shared.market.models import Columns
from shared.outbox import Outbox
from signals.backtest_models import Backtest, BacktestState, Trigger
from signals.backtests import GRACE, LEASE, MOST_CLAIMS
from signals.events import BacktestRequested
from signals.logic.arrays import Tape
from signals.logic.backtesting import Ground, folds_of
from signals.logic.evaluation import Watcher
from signals.logic.simulation import Rules, simulate
from tests.builders import daily_bars
from tests.standins import Topic
from tests.unit.signals.backtest_house import BARS, GRID, BacktestHouse, Ticking, prices, request
from tests.unit.signals.house import a_watcher


@pytest.fixture
async def house() -> BacktestHouse:
    house = BacktestHouse()
    await house.open()
    return house


# --- one backtest


async def test_a_backtest_says_what_the_engine_finds(house: BacktestHouse) -> None:
    """Its numbers are those of following the strategy's marks over the stored bars."""
    backtest, result = await house.done()
    assert backtest.state is BacktestState.DONE
    tape = Tape.of(Columns.of(BARS))
    marks = Watcher.of(a_watcher("any", "sma_cross", fast=3, slow=9).entry).mark_all(tape).direction
    run = simulate(tape.raw.cut(9, len(tape)), marks[9:], Rules())
    assert result["metrics"]["total_return"]["value"] == pytest.approx(run.total_return, rel=1e-12)
    assert result["metrics"]["trade_count"]["value"] == len(run.trades) - run.trades.is_open.sum()
    assert result["curve"]["equity"][-1] == pytest.approx(run.equity[-1])
    assert result["provenance"] == {"provider": "alpha_vantage", "adjustment": "raw", "revision": 0}
    assert (result["range"]["bars"], result["range"]["warmup"]) == (311, 9)
    assert backtest.summary
    assert backtest.summary["total_return"] == result["metrics"]["total_return"]["value"]


async def test_every_measure_is_a_number_or_says_why_not(house: BacktestHouse) -> None:
    """Null never comes without a reason, and buy-and-hold stands beside."""
    _, result = await house.done(params={"fast": 100, "slow": 250}, **{"from": "2013-12-01"})
    for metrics in (result["metrics"], result["buy_and_hold"]):
        assert all(m["value"] is not None or m["reason"] for m in metrics.values())
    assert result["metrics"]["win_rate"] == {"value": None, "reason": "no trade was closed"}
    assert result["buy_and_hold"]["total_return"]["value"] is not None
    json.dumps(result, allow_nan=False)


async def test_the_same_question_on_the_same_bars_is_one_backtest(house: BacktestHouse) -> None:
    """However often and in whatever words it is asked; another rule, range or parameter is another."""
    first, _ = await house.done()
    again = await house.ask(params={"slow": 9.0, "fast": 3.0}, **{"from": "2012-01-01", "interval": "1d"})
    assert again.backtest_id == first.backtest_id
    assert again.state is BacktestState.DONE
    others = [
        await house.ask(rules={"fee": 0.002}),
        await house.ask(params={"fast": 4, "slow": 9}),
        await house.ask(**{"from": "2013-06-03"}),
        await house.ask(entry="cross"),
        await house.ask(validation="walk_forward"),
    ]
    assert len({first.backtest_id, *(other.backtest_id for other in others)}) == 6
    assert len(await house.all()) == 6


async def test_new_bars_make_a_new_backtest_of_an_open_range(house: BacktestHouse) -> None:
    """Without ``to`` the newest bar is the end; what was asked before stays what it was."""
    early = BacktestHouse(BARS[:200])
    await early.open()
    _, before = await early.done()
    more = daily_bars(320, prices=prices(320))[200:]
    await early.service.bars.append("AAPL|1d", (await early.ask()).job.entry.interval, 0, more)
    later, after = await early.done()
    assert after["range"]["bars"] == before["range"]["bars"] + 120
    assert len(await early.all()) == 2
    assert later.job.last == BARS[-1].closed_at


async def test_bars_before_the_range_are_seen_and_not_traded(house: BacktestHouse) -> None:
    """As live: a strategy looks back over its lookback, wherever trading begins."""
    _, result = await house.done(**{"from": "2013-06-03", "to": "2013-12-31"})
    assert result["range"]["first_closed_at"].startswith("2013-06-03")
    assert result["range"]["last_closed_at"].startswith("2013-12-31")
    assert result["range"]["warmup"] == 9
    whole = Tape.of(Columns.of(BARS))
    marks = Watcher.of(a_watcher("any", "sma_cross", fast=3, slow=9).entry).mark_all(whole).direction
    inside = [i for i, bar in enumerate(BARS) if "2013-06-03" <= f"{bar.closed_at:%Y-%m-%d}" <= "2013-12-31"]
    assert result["marks"]["long"] == (marks[inside] > 0).sum()


async def test_a_backtest_reads_the_revision_it_was_asked_on(house: BacktestHouse) -> None:
    """A history that is written again meanwhile changes nothing of what was asked before."""
    asked = await house.ask()
    await house.revise(daily_bars(320, prices=[2 * p for p in prices(320, drift=-0.05)]))
    backtest, result = await house.service.read((await house.service.run(asked.backtest_id)).backtest_id)
    assert backtest.state is BacktestState.DONE
    assert result
    assert result["curve"]["price"][-1] == BARS[-1].close


async def test_a_volatility_target_counts_the_bars_of_its_interval(house: BacktestHouse) -> None:
    """252 days a year, unless the caller says otherwise."""
    backtest = await house.ask(rules={"size": {"kind": "volatility", "target": 0.1}})
    assert backtest.job.rules.size.model_dump()["bars_per_year"] == 252
    backtest = await house.ask(rules={"size": {"kind": "volatility", "bars_per_year": 50}})
    assert backtest.job.rules.size.model_dump()["bars_per_year"] == 50


async def test_one_request_asks_for_several_symbols(house: BacktestHouse) -> None:
    """One backtest each; if one of them cannot be, none is queued."""
    with pytest.raises(NotFoundError, match=r"^symbol: no bars of IBM at 1d are stored"):
        await house.service.request(request(symbols=["AAPL", "IBM"]))
    assert await house.all() == []
    assert len(await house.service.request(request(symbols=["AAPL", "aapl"]))) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strategy": "magic"}, "strategy: 'magic' is unknown; choose from sma_cross, "),
        ({"entry": "magic"}, "entry: none is called 'magic'; there is cross, apart"),
        ({"entry": "cross", "params": {"fast": 2}}, "params: the entry cross has its own"),
        ({"entry": "cross", "interval": "1h"}, "interval: the entry cross watches 1d"),
        ({"interval": "1w"}, "interval: '1w' is no interval"),
        ({"strategy": "vwap_deviation", "params": {}}, "interval: vwap_deviation makes no sense at 1d"),
        ({"params": {"quick": 1}}, "params.quick: there is no such parameter"),
        ({"params": {"fast": 9, "slow": 3}}, "params: "),
        ({"params": {"fast": -1, "slow": 3}}, "params.fast: "),
        ({"symbol": "not a symbol"}, "symbol: 'not a symbol' is no symbol"),
        ({"from": "2020-01-01"}, "from, to: 0 bars of AAPL at 1d close in this range; stored are 2013-01-02"),
        ({"to": "2012-01-01"}, "from, to: 0 bars"),
        ({"params": {"fast": 3, "slow": 320}}, "params: sma_cross must see 321 bars before it says anything"),
        ({"validation": {"kind": "walk_forward", "train_size": 900, "test_size": 50}}, "validation: train_size"),
        ({"validation": {"kind": "purged_cv", "purge": 2}}, "validation.purge: 2 bars; an opinion lasts 10"),
    ],
)
async def test_what_cannot_be_tried_is_refused_at_once(
    house: BacktestHouse, fields: dict[str, object], said: str
) -> None:
    """By the name of the field, before anything is queued."""
    with pytest.raises(InvalidPayloadError) as e:
        await house.ask(**fields)
    assert str(e.value).casefold().startswith(said.casefold())
    assert await house.all() == []


async def test_a_number_in_the_bars_that_cannot_be_true_is_named(house: BacktestHouse) -> None:
    """A price of 0 in storage, whoever put it there, is refused with its bar."""
    broken = Columns.of(BARS)
    broken.open[100] = 0.0  # type: ignore[index]
    await house.service.bars.rewrite("AAPL|1d", (await house.ask()).job.entry.interval, 1, broken)
    series = await house.service.series.get("AAPL", (await house.ask()).job.entry.interval)
    await house.service.series.save(replace(series, revision=1))
    with pytest.raises(InvalidPayloadError, match=rf"open: 0.0 at bar {BARS[100].closed_at:%Y-%m-%d}"):
        await house.ask()


# --- validation, trials and the hold-out


@pytest.mark.parametrize("validation", ["walk_forward", "purged_cv"])
async def test_parameters_are_chosen_and_judged_on_other_bars(house: BacktestHouse, validation: str) -> None:
    """No test and no training reaches the hold-out, nor comes nearer to a test than an opinion lasts."""
    backtest, result = await house.done(validation=validation, grid=GRID)
    found = result["validation"]
    assert len(found["folds"]) == 5
    assert len(found["variants"]) == result["variants"]["here"] == backtest.done == 6
    assert {f"{bar.closed_at:%Y-%m-%dT%H:%M:%SZ}" for bar in BARS} >= {found["hold_out"]["first_closed_at"]}
    assert all(end < found["hold_out"]["first_closed_at"] for fold in found["folds"] for _, end in fold["test"])
    folds, hold_out = folds_of(backtest.job)
    assert found["purge"] == backtest.job.entry.horizon == 10
    for fold in folds:
        for test in fold.test:
            assert all(train.stop + 10 <= test.start or test.stop + 10 <= train.start for train in fold.train)
    assert hold_out.rows.stop == backtest.job.bars
    assert result["params"] in [one["params"] for one in found["variants"]]
    best = max(one["mean"] for one in found["variants"] if one["mean"] is not None)
    assert found["variants"][0]["mean"] == best
    assert found["variants"][0]["params"] == result["params"]
    assert 0 <= found["overfitting"]["value"] <= 1


async def test_the_hold_out_is_opened_once(house: BacktestHouse) -> None:
    """Another search whose hold-out has one bar in common is refused; the same request is what it was."""
    first, result = await house.done(validation="walk_forward", grid=GRID)
    with pytest.raises(ConflictError, match=f"were opened by backtest {first.backtest_id}.*choose a to before 201"):
        await house.ask(validation="walk_forward", grid={"fast": [4], "slow": [9]})
    with pytest.raises(ConflictError):
        await house.ask(validation={"kind": "purged_cv", "hold_out": 0.3}, grid=GRID)
    assert (await house.service.read((await house.ask(validation="walk_forward", grid=GRID)).backtest_id))[1] == result
    opened = result["validation"]["hold_out"]
    for moved in (
        {"from": "2013-02-01"},
        {"to": opened["last_closed_at"][:8] + "01"},
        {"to": opened["first_closed_at"]},
    ):
        with pytest.raises(ConflictError):
            await house.ask(validation="walk_forward", grid=GRID, **moved)
    before = f"{datetime.fromisoformat(opened['first_closed_at']) - timedelta(days=1):%Y-%m-%d}"
    other = await house.ask(validation="walk_forward", grid=GRID, to=before)
    assert (await house.service.run(other.backtest_id)).state is BacktestState.DONE
    assert (await house.ask()).state is BacktestState.QUEUED, "without a validation there is no hold-out"


async def test_of_two_that_wait_for_one_hold_out_the_second_fails(house: BacktestHouse) -> None:
    """It was free when both were asked for; the text says who was first."""
    one = await house.ask(validation="walk_forward", grid=GRID)
    two = await house.ask(validation="purged_cv", grid=GRID)
    assert (await house.service.run(one.backtest_id)).state is BacktestState.DONE
    failed = await house.service.run(two.backtest_id)
    assert failed.state is BacktestState.FAILED
    assert failed.reason
    assert one.backtest_id in failed.reason
    assert (await house.service.read(two.backtest_id))[1] is None


async def test_every_variant_ever_tried_counts_against_the_next(house: BacktestHouse) -> None:
    """Each once, over all backtests of a strategy on a series; the more were tried, the less is a good one worth."""
    _, first = await house.done()
    assert first["variants"] == {"here": 1, "ever": 1}
    _, again = await house.done(**{"from": "2013-03-01"})
    assert again["variants"]["ever"] == 1, "the same variant on other bars"
    _, grid = await house.done(validation="walk_forward", grid={"fast": [2, 3, 4, 5], "slow": [9, 12, 15, 20]})
    assert grid["variants"] == {"here": 16, "ever": 16}
    _, last = await house.done(params={"fast": 6, "slow": 9})
    assert last["variants"]["ever"] == 17
    [check] = [one for one in last["checks"] if one["name"] == "deflated_sharpe"]
    assert "After 17 variants" in check["detail"]
    assert "assumed" not in check["detail"], "the trials' own Sharpe ratios are known"
    assert last["deflated_sharpe"]["value"] < last["metrics"]["probabilistic_sharpe"]["value"]
    _, other = await house.done(strategy="donchian_breakout", params={"period": 5})
    assert other["variants"]["ever"] == 1, "another strategy"


async def test_trials_are_judged_before_the_hold_out(house: BacktestHouse) -> None:
    """What a variant is remembered by must not know of the last bars."""
    backtest, result = await house.done(validation="walk_forward", grid=GRID)
    other = BacktestHouse([*BARS[:270], *daily_bars(320, prices=prices(320, drift=-0.1))[270:]])
    await other.open()
    _, changed = await other.done(validation="walk_forward", grid=GRID)
    hold_out = folds_of(backtest.job)[1].rows.start + 13
    assert hold_out <= 270
    assert changed["validation"]["variants"] == result["validation"]["variants"]
    assert changed["validation"]["hold_out"] != result["validation"]["hold_out"]


# --- the work


async def test_a_request_is_told_and_done_by_whoever_hears(house: BacktestHouse) -> None:
    """The event names the backtest; working twice on what is done changes nothing."""
    asked = await house.ask()
    [event] = house.topic.told
    assert isinstance(event, BacktestRequested)
    assert (event.backtest_id, event.done, event.variants) == (asked.backtest_id, 0, 1)
    assert event.strategy == "sma_cross@1"
    done = await house.service.run(event.backtest_id)
    assert await house.service.run(event.backtest_id) == done
    assert await house.service.sweep() == 0


async def test_an_event_the_topic_refuses_is_buried_and_the_backtest_run_all_the_same() -> None:
    """People see that the topic refuses our events; whoever asked has a result."""
    house = BacktestHouse()
    letters = DeadLetters(house.storage, house.wall)
    house.service = house.instance(
        topic=Outbox(Topic(RefusedError("the event topic answered 400")), letters, "signals")
    )
    await house.open()
    asked = await house.ask()
    house.wall.at += GRACE
    assert await house.service.sweep() == 1
    assert (await house.service.read(asked.backtest_id))[0].state is BacktestState.DONE
    [letter] = await letters.newest(after=None, limit=10)
    assert (letter.partition, letter.body["event"]["data"]["backtest_id"]) == ("signals", asked.backtest_id)


async def test_a_lost_event_is_made_good_by_the_sweep() -> None:
    """A topic that is down refuses nobody's backtest."""
    house = BacktestHouse()
    house.topic = Topic(UnavailableError("down"))
    house.service = house.instance()
    await house.open()
    asked = await house.ask()
    assert await house.service.sweep() == 0, "its event still has time"
    house.wall.at += GRACE
    assert await house.service.sweep() == 1
    assert (await house.service.read(asked.backtest_id))[0].state is BacktestState.DONE


async def test_a_long_search_goes_in_steps_that_are_told(house: BacktestHouse) -> None:
    """A handler stops after its budget; the next event goes on where it was, and the result is the same."""
    slow = house.instance(wall=Ticking(house.wall.at, timedelta(seconds=2)))
    asked = await house.ask(validation="walk_forward", grid=GRID)
    seen = []
    for _ in range(30):
        backtest = await slow.run(asked.backtest_id)
        seen.append((backtest.state, backtest.done))
        if backtest.state.is_over:
            break
        assert backtest.leased_until is None, "whoever comes next may go on at once"
    assert seen[-1] == (BacktestState.DONE, 6)
    assert len({done for _, done in seen}) > 2
    told = [e.done for e in house.topic.told if isinstance(e, BacktestRequested)]
    assert told == sorted(set(told)), "each step is an event of its own"
    at_once = BacktestHouse()
    await at_once.open()
    _, expected = await at_once.done(validation="walk_forward", grid=GRID)
    assert (await slow.read(asked.backtest_id))[1] == expected


async def test_nobody_works_on_what_another_has_claimed(house: BacktestHouse) -> None:
    """Until its lease has run out: then it was killed, and the next one goes on."""
    asked = await house.ask()
    claimed = await claim(house, asked)
    assert await house.service.run(asked.backtest_id) == claimed
    house.wall.at += LEASE
    assert (await house.service.run(asked.backtest_id)).state is BacktestState.DONE


async def test_what_kills_everybody_is_given_up(house: BacktestHouse) -> None:
    """After some runs that did not come back it fails, and says so; asking again begins anew."""
    asked = await house.ask()
    for _ in range(MOST_CLAIMS):
        asked = await claim(house, asked)
        house.wall.at += LEASE
    failed = await house.service.run(asked.backtest_id)
    assert failed.state is BacktestState.FAILED
    assert failed.reason == "given up after 5 runs that did not come back"
    again = await house.ask()
    assert again.state is BacktestState.QUEUED
    assert (await house.service.run(again.backtest_id)).state is BacktestState.DONE


async def test_a_search_without_a_score_fails_with_the_reason(house: BacktestHouse) -> None:
    """A strategy that never speaks cannot be chosen by what it earned."""
    asked = await house.ask(strategy="gap", params={"size": 0.9}, validation="purged_cv")
    failed = await house.service.run(asked.backtest_id)
    assert failed.state is BacktestState.FAILED
    assert failed.reason
    assert "no candidate has a score" in failed.reason


async def test_bars_that_are_gone_fail_the_backtest(house: BacktestHouse) -> None:
    """Never a result on other bars than were asked about."""
    asked = await house.ask()
    job = asked.job
    with pytest.raises(PermanentError, match="300 are stored where there were 311"):
        Ground.of(job, Columns.of(BARS[:309]))


async def claim(house: BacktestHouse, backtest: Backtest) -> Backtest:
    """Another process claims it and is never heard of again."""
    until = house.wall.at + LEASE
    running = replace(backtest, state=BacktestState.RUNNING, claims=backtest.claims + 1, leased_until=until)
    return await house.service.backtests.save(running, due_at=until)


# --- new history


async def test_new_history_has_every_watching_entry_tried(house: BacktestHouse) -> None:
    """A first fill queues one standard backtest for each entry on the series, once, and tells nobody."""
    assert await house.service.heard(house.heard(BARS)) == 1
    assert await house.service.heard(house.heard(BARS)) == 0
    assert await house.instance().heard(house.heard(BARS)) == 0, "another process knows as well"
    [backtest] = await house.all()
    assert (backtest.job.name, backtest.job.trigger, backtest.job.bars) == ("cross", Trigger.HISTORY, 311)
    assert house.topic.told == []
    assert await house.service.sweep() == 1
    [done] = await house.all()
    assert done.state is BacktestState.DONE


async def test_a_revision_has_them_tried_again(house: BacktestHouse) -> None:
    """Once for each writing of the history, at the next bar that comes under it."""
    await house.service.heard(house.heard(BARS))
    await house.revise(daily_bars(320, prices=prices(320, drift=0.2)))
    assert await house.service.heard(house.heard(BARS[-1:], revision=1)) == 1
    assert await house.service.heard(house.heard(BARS[-1:], revision=1)) == 0
    assert len(await house.all()) == 2


async def test_a_live_bar_asks_nothing_of_storage(house: BacktestHouse) -> None:
    """Not even in a new process; in a revised series it is one look a process."""
    calls: list[str] = []

    class Counted:
        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(house.storage, name)

    service = house.instance(storage=Counted())
    calls.clear()
    assert await service.heard(house.heard(BARS[-1:])) == 0
    assert calls == []
    await house.revise(BARS)
    for _ in range(3):
        await service.heard(house.heard(BARS[-1:], revision=1))
    again = house.instance(storage=Counted())
    calls.clear()
    for _ in range(3):
        await again.heard(house.heard(BARS[-1:], revision=1))
    assert calls == ["read"]


async def test_a_history_that_is_too_short_waits_for_more() -> None:
    """It is tried when there is enough of it."""
    house = BacktestHouse(BARS[:8])
    await house.open()
    assert await house.service.heard(house.heard(BARS[:8])) == 0
    await house.service.bars.append("AAPL|1d", house.heard(BARS).interval, 0, BARS)
    assert await house.service.heard(house.heard(BARS[8:])) == 1


async def test_an_operator_can_do_without(house: BacktestHouse) -> None:
    """Switched off, history queues nothing."""
    assert await house.instance(on_new_history=False).heard(house.heard(BARS)) == 0


async def test_what_was_asked_for_goes_first(house: BacktestHouse) -> None:
    """A sweep spends a second of its time on what nobody waits for, behind what somebody does."""
    await house.service.heard(house.heard(BARS))
    house.wall.at += timedelta(seconds=1)
    asked = await house.ask()
    house.wall.at += GRACE
    clock = Ticking(house.wall.at, timedelta(seconds=1))
    assert await house.instance(wall=clock).sweep() == 1
    states = {b.job.trigger: b.state for b in await house.all()}
    assert states == {Trigger.REQUEST: BacktestState.DONE, Trigger.HISTORY: BacktestState.QUEUED}
    assert (await house.service.read(asked.backtest_id))[0].state is BacktestState.DONE


# --- what is stored


async def test_lists_show_backtests_and_nothing_else(house: BacktestHouse) -> None:
    """Results, steps, variants and hold-outs lie beside them, unseen; a list can be had of one strategy."""
    first, _ = await house.done(validation="walk_forward", grid=GRID)
    house.wall.at += timedelta(seconds=1)
    second, _ = await house.done(strategy="donchian_breakout", params={"period": 5})
    newest = await house.service.listed(None, None, newest_first=True, limit=50)
    assert [one.backtest_id for one in newest] == [second.backtest_id, first.backtest_id]
    assert [one.backtest_id for one in await house.all()] == [first.backtest_id, second.backtest_id]
    only = await house.service.listed("sma_cross", None, newest_first=True, limit=50)
    assert [one.backtest_id for one in only] == [first.backtest_id]


async def test_a_large_result_stays_below_a_megabyte() -> None:
    """However long the history and however often it trades: the newest trades, and points with the extremes."""
    days = 2400
    house = BacktestHouse(daily_bars(days, prices=[100 + 30 * (i % 2) + (i * 7) % 13 for i in range(days)]))
    await house.open()
    _, result = await house.done(params={"fast": 1, "slow": 2}, validation="walk_forward", grid={"slow": [2, 3]})
    assert result["trades"]["left_out"] > 0
    assert len(result["trades"]["items"]) == 1000
    for document in await house.storage.feed("backtests", limit=500):
        assert len(json.dumps(document.body)) < 1_000_000
    assert max(result["curve"]["price"]) == max(bar.close for bar in house.bars[2:])


async def test_results_expire_and_what_was_tried_does_not(house: BacktestHouse) -> None:
    """Forgetting a variant would make the next one look better than it is."""
    backtest, _ = await house.done(validation="walk_forward", grid=GRID)
    house.wall.at += timedelta(days=731)
    with pytest.raises(NotFoundError, match="POST /api/backtests makes one"):
        await house.service.read(backtest.backtest_id)
    with pytest.raises(ConflictError):
        await house.ask(validation="walk_forward", grid={"fast": [4], "slow": [9]})
    _, later = await house.done(params={"fast": 4, "slow": 9})
    assert later["variants"]["ever"] == 7


def test_the_fixture_trades_enough_to_say_something() -> None:
    """Guards the tests above against a market in which nothing happens."""
    tape = Tape.of(Columns.of(BARS))
    marks = Watcher.of(a_watcher("any", "sma_cross", fast=3, slow=9).entry).mark_all(tape).direction
    assert abs(marks).sum() > 30
