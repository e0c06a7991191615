from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    NotFoundError,
    QuotaSpentError,
    UnavailableError,
)
from shared.market import gaps
from shared.market.callers import CappedError
from shared.market.fetches import AGAIN, LEASE, NOT_YET, Fetches, State, Wanted
from shared.market.gaps import SLICES
from shared.market.models import Interval, Priority
from tests.builders import WALL, closes_from
from tests.unit.market.library_house import ANN, BOB, DAY, HISTORY, House, Killed

SECOND = timedelta(seconds=1)
WANTED = Wanted(
    symbol="AAPL", interval=DAY, since=datetime(2013, 1, 1, tzinfo=UTC), until=datetime(2013, 7, 1, tzinfo=UTC)
)
ASKED_FOR = [b for b in HISTORY if WANTED.since < b.closed_at <= WANTED.until]


class Desk(House):
    """Where history is asked for, in slices of thirty days so that it takes several."""

    def __init__(self, **how):
        super().__init__(**how)
        self.fetches = self.another_desk()

    def another_desk(self):
        return Fetches(documents=self.store, library=self.another(), wall=self.wall)

    async def work(self, desk=None):
        self.wall.at += timedelta(seconds=3)
        return await (desk or self.fetches).work()

    async def state(self):
        return (await self.fetches.get(WANTED.fetch_id)).state


@pytest.fixture
async def desk(monkeypatch):
    monkeypatch.setitem(SLICES, DAY, timedelta(days=30))
    desk = Desk()
    yield desk
    await desk.store.close()


async def test_history_is_fetched_in_slices_until_it_is_there(desk):
    """Queued, running, done; what was asked for is held, and the calls it took are counted."""
    queued = await desk.fetches.request(WANTED, ANN)
    assert (queued.state, queued.bars, queued.left_bars) == (State.QUEUED, 0, len(ASKED_FOR))
    assert queued.left == [(ASKED_FOR[0].closed_at, ASKED_FOR[-1].closed_at, len(ASKED_FOR))]

    assert await desk.work() == 6

    done = await desk.fetches.get(queued.fetch_id)
    assert (done.state, done.bars, done.calls, done.left, done.left_bars) == (State.DONE, len(ASKED_FOR), 6, [], 0)
    answer = await desk.library.bars("AAPL", DAY, since=WANTED.since, until=WANTED.until)
    assert [b.closed_at for b in ASKED_FOR] == [answer.columns.bar(i).closed_at for i in range(len(answer.columns))]
    assert {priority for *_, priority in desk.seller.asked} == {Priority.ASKED}
    assert await desk.work() == 0


async def test_same_request_is_the_same_fetch(desk):
    """Who asks twice, or for what somebody asked, is shown the fetch that is there; no call is spent again."""
    first = await desk.fetches.request(WANTED, ANN)
    assert (await desk.fetches.request(replace(WANTED, priority=Priority.BACKFILL), BOB)).fetch_id == first.fetch_id
    await desk.work()
    again = await desk.fetches.request(WANTED, ANN)

    assert (again.state, again.caller) == (State.DONE, "ann")
    assert await desk.work() == 0


async def test_id_is_made_of_facts():
    """docs/events.md lists the formula: the same question has the same id on every machine."""
    assert WANTED.fetch_id == "3811f0cf-1159-56ec-907f-86fc8c1983f9"


async def test_what_is_held_already_takes_no_call(desk):
    """A fetch of what is there is done at once."""
    await desk.hold(HISTORY, is_active=False)
    await desk.fetches.request(WANTED, ANN)
    await desk.work()

    assert ((await desk.state()), desk.seller.asked) == (State.DONE, [])


@pytest.mark.parametrize(
    ("since", "until", "match"),
    [
        (WANTED.until, WANTED.since, "before it begins"),
        (datetime(2013, 6, 1, tzinfo=UTC), datetime(2013, 6, 2, tzinfo=UTC), "no 1d bar closes"),
        (datetime(2030, 6, 1, tzinfo=UTC), datetime(2030, 6, 9, tzinfo=UTC), "clock has come"),
        (datetime(1871, 6, 1, tzinfo=UTC), datetime(2012, 6, 9, tzinfo=UTC), "session table"),
    ],
)
async def test_range_without_bars_is_refused(desk, since, until, match):
    """A weekend, the future, the wrong way round, before there was an exchange: said at once."""
    with pytest.raises(InvalidPayloadError, match=match):
        await desk.fetches.request(replace(WANTED, since=since, until=until), ANN)


async def test_unknown_fetch_is_not_found(desk):
    """With the call that makes one."""
    for ask in (desk.fetches.get, desk.fetches.cancel):
        with pytest.raises(NotFoundError, match="POST /api/fetches"):
            await ask("nothing")


@pytest.mark.parametrize(
    ("trouble", "wait"),
    [(UnavailableError("down"), AGAIN), (QuotaSpentError("spent", retry_after=timedelta(hours=2)), timedelta(hours=2))],
)
async def test_what_passes_is_waited_for(desk, trouble, wait):
    """It says why and until when, and goes on then."""
    await desk.fetches.request(WANTED, ANN)
    desk.seller.trouble = trouble
    await desk.work()

    waiting = await desk.fetches.get(WANTED.fetch_id)
    assert (waiting.state, waiting.reason) == (State.WAITING, f"{type(trouble).__name__}: {trouble}")
    assert waiting.retry_at == desk.wall.at + wait
    desk.wall.at += wait - 4 * SECOND
    assert await desk.work() == 0

    desk.seller.trouble = None
    desk.wall.at += SECOND
    await desk.work()
    assert (await desk.state()) is State.DONE


async def test_what_stays_is_a_failure_with_its_reason(desk):
    """A symbol nobody knows ends the fetch; asked for again it is queued again."""
    del desk.seller.history["AAPL"]
    await desk.fetches.request(WANTED, ANN)
    await desk.work()
    failed = await desk.fetches.get(WANTED.fetch_id)
    assert (failed.state, failed.reason) == (State.FAILED, "UnknownSymbolError: nobody knows AAPL")

    desk.seller.history["AAPL"] = HISTORY
    assert (await desk.fetches.request(WANTED, ANN)).state is State.QUEUED
    await desk.work()
    assert (await desk.state()) is State.DONE


@pytest.mark.parametrize("trouble", [ConfigurationError("ALPHA_VANTAGE_KEY is wrong"), ZeroDivisionError("oops")])
async def test_trouble_of_ours_is_not_told_but_ends_the_fetch(desk, trouble):
    """An operator reads the log; whoever asked reads that he must."""
    await desk.fetches.request(WANTED, ANN)
    desk.seller.trouble = trouble
    await desk.work()

    failed = await desk.fetches.get(WANTED.fetch_id)
    assert failed.state is State.FAILED
    assert "see the log" in failed.reason
    assert str(trouble) not in failed.reason


async def test_one_in_trouble_stops_no_other(desk):
    """Fetches take turns, the more urgent first, and each is its own."""
    desk.seller.history["IBM"] = HISTORY
    wanted = [
        replace(WANTED, symbol="IBM", priority=Priority.BACKFILL),
        replace(WANTED, symbol="XYZ"),
        WANTED,
    ]
    for one in wanted:
        await desk.fetches.request(one, ANN)
    await desk.work()

    assert [(await desk.fetches.get(w.fetch_id)).state for w in wanted] == [State.DONE, State.FAILED, State.DONE]
    assert [a[0] for a in desk.seller.asked[:4]] == ["XYZ", "AAPL", "IBM", "AAPL"]
    assert {a[4] for a in desk.seller.asked if a[0] == "IBM"} == {Priority.BACKFILL}


async def test_bars_that_are_not_there_yet_are_asked_for_later(desk):
    """The newest bar may come late: the fetch waits, and ends when it is there."""
    wanted = replace(WANTED, until=HISTORY[-1].closed_at, since=HISTORY[-5].closed_at)
    desk.seller.history["AAPL"] = HISTORY[:-1]
    await desk.fetches.request(wanted, ANN)
    await desk.work()
    waiting = await desk.fetches.get(wanted.fetch_id)
    assert (waiting.state, waiting.bars, waiting.left_bars) == (State.WAITING, 3, 1)
    assert waiting.retry_at == desk.wall.at + NOT_YET

    desk.seller.history["AAPL"] = HISTORY
    desk.wall.at += NOT_YET
    await desk.work()
    assert (await desk.fetches.get(wanted.fetch_id)).state is State.DONE


async def test_absent_bars_do_not_hold_a_fetch_up(desk):
    """What the provider has not got is not waited for."""
    desk.seller.history["AAPL"] = HISTORY[70:]
    await desk.fetches.request(WANTED, ANN)
    await desk.work()

    done = await desk.fetches.get(WANTED.fetch_id)
    assert (done.state, done.bars) == (State.DONE, len(ASKED_FOR) - 70)


async def test_spent_share_waits_for_tomorrow(desk):
    """The caller's cap holds in the middle of a fetch too; at the door it is a refusal."""
    desk.library = desk.another(allowed=2)
    desk.fetches = Fetches(documents=desk.store, library=desk.library, wall=desk.wall)
    await desk.fetches.request(WANTED, ANN)
    await desk.work()

    waiting = await desk.fetches.get(WANTED.fetch_id)
    assert (waiting.state, waiting.retry_at) == (State.WAITING, WALL.replace(hour=0) + timedelta(days=1))
    assert len(desk.seller.asked) == 2
    with pytest.raises(CappedError):
        await desk.fetches.request(replace(WANTED, symbol="IBM"), ANN)

    desk.wall.at = waiting.retry_at
    await desk.work()
    assert len(desk.seller.asked) == 4


async def test_cancelled_fetch_makes_no_further_call(desk):
    """What is stored stays; one that is over stays as it ended."""
    await desk.fetches.request(WANTED, ANN)
    cancelled = await desk.fetches.cancel(WANTED.fetch_id)
    assert cancelled.state is State.CANCELLED
    assert (await desk.work(), desk.seller.asked) == (0, [])

    await desk.fetches.request(WANTED, ANN)
    await desk.work()
    assert (await desk.fetches.cancel(WANTED.fetch_id)).state is State.DONE


async def test_cancelling_a_running_fetch_ends_it_after_its_slice(desk):
    """The run that does it sees that somebody else wrote."""
    await desk.fetches.request(WANTED, ANN)
    bars = desk.seller.bars

    async def cancelling(*args, **how):
        if len(desk.seller.asked) == 1:
            await desk.fetches.cancel(WANTED.fetch_id)
        return await bars(*args, **how)

    desk.seller.bars = cancelling
    await desk.work()

    assert (await desk.state()) is State.CANCELLED
    assert len(desk.seller.asked) == 2


async def test_two_runs_at_once_share_the_work(desk):
    """Two instances that find the same fetch due make each call once."""
    import asyncio

    await desk.fetches.request(WANTED, ANN)
    await asyncio.gather(desk.work(), desk.work(desk.another_desk()))
    desk.wall.at += LEASE
    await desk.work()

    assert (await desk.state()) is State.DONE
    assert len(desk.seller.asked) == len(set(desk.seller.asked)) == 6


async def test_long_fetch_goes_on_in_the_next_run(desk, monkeypatch):
    """A run ends after eight seconds; what is left is due at once."""
    bars = desk.seller.bars

    async def slow(*args, **how):
        desk.wall.at += timedelta(seconds=5)
        return await bars(*args, **how)

    desk.seller.bars = slow
    await desk.fetches.request(WANTED, ANN)
    assert await desk.work() == 2
    left = await desk.fetches.get(WANTED.fetch_id)
    assert (left.state, left.calls) == (State.QUEUED, 2)
    assert await desk.work() == 2
    assert await desk.work() == 2
    assert (await desk.state()) is State.DONE


async def test_killed_at_any_moment_it_is_done_again(monkeypatch):
    """After a kill at any write the fetch is due again when its lease ends, and ends as if nothing had happened."""
    monkeypatch.setitem(SLICES, DAY, timedelta(days=90))
    outcomes = []
    for allowed in range(20):
        desk = Desk()
        await desk.fetches.request(WANTED, ANN)
        left = allowed
        real = {name: getattr(desk.store, name) for name in ("create", "replace", "batch", "delete")}

        def dying(write):
            async def maybe(*args):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return await write(*args)

            return maybe

        for name, write in real.items():
            setattr(desk.store, name, dying(write))
        try:
            await desk.work()
            outcomes.append("done")
        except Killed:
            outcomes.append("killed")
        for name, write in real.items():
            setattr(desk.store, name, write)

        desk.wall.at += LEASE
        await desk.work(desk.another_desk())

        done = await desk.fetches.get(WANTED.fetch_id)
        assert (done.state, done.bars, done.left_bars) == (State.DONE, len(ASKED_FOR), 0)
        assert len(desk.seller.asked) <= 3, "a call that was killed is made once more, those that were not are not"
        await desk.store.close()
    assert outcomes == sorted(outcomes, reverse=True)
    assert {*outcomes} == {"killed", "done"}


async def test_minutes_come_month_by_month(desk):
    """No slice is longer than every provider answers whole."""
    first = closes_from(HISTORY[0].closed_at, 1, interval=Interval.MINUTE)[0]
    wanted = replace(WANTED, interval=Interval.MINUTE, since=first, until=first + timedelta(days=60))
    await desk.fetches.request(wanted, ANN)
    await desk.work()

    assert len(desk.seller.asked) > 1
    assert all(a[2] - a[1] <= gaps.SLICES[Interval.MINUTE] + timedelta(days=4) for a in desk.seller.asked)


async def test_fetch_that_was_done_too_early_is_queued_again(desk):
    """A range that reaches beyond today is done as far as it goes; asked for later, it goes on from there."""
    far = replace(WANTED, until=datetime(2030, 1, 1, tzinfo=UTC))
    desk.market.at = ASKED_FOR[-1].closed_at + timedelta(minutes=15)
    first = await desk.fetches.request(far, ANN)
    await desk.work()
    assert (await desk.fetches.get(first.fetch_id)).state is State.DONE

    desk.market.at = ASKED_FOR[-1].closed_at + timedelta(days=20)
    again = await desk.fetches.request(far, BOB)
    await desk.work()

    done = await desk.fetches.get(again.fetch_id)
    assert (again.fetch_id, again.state, again.caller) == (first.fetch_id, State.QUEUED, "bob")
    assert (done.state, done.bars > len(ASKED_FOR), done.left_bars) == (State.DONE, True, 0)
