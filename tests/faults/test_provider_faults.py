"""Providers that fail in every way, on a virtual clock: what callers get, and when everything is well again."""

import random
from datetime import timedelta

import pytest

from bench._faults import BEGIN, HOUR, MINUTE, SECOND, Episode, Fault, House, Seller, day
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import StoppedClock
from shared.errors import TroopError
from shared.market.callers import Caller
from shared.market.health import BreakerState
from shared.market.models import Interval

IN_SESSION = BEGIN + 16 * HOUR
NAMES = ("alpha_vantage", "finnhub", "twelve_data", "polygon")
CALLER = Caller(id="somebody")
OUTAGES = [Fault.CUT, Fault.HANGS, Fault.TRUNCATED, Fault.HTML, Fault.KEY]


class Week:
    """Four sellers that are well unless told otherwise, and instances over one storage."""

    def __init__(self, store, clock):
        self.store, self.clock = store, clock
        self.sellers = [
            Seller(name=name, clock=clock, dice=random.Random(n), episodes=[], hiccups=0.0)
            for n, name in enumerate(NAMES)
        ]

    def instance(self):
        return House.of(self.clock, self.sellers, self.store, seed=1)

    def strike(self, fault, *names, lasts=30 * MINUTE):
        now = self.clock.now()
        for seller in self.sellers:
            if seller.name in names:
                seller.episodes = [Episode(begin=now, end=now + lasts, fault=fault)]

    def calls(self, name):
        return next(seller.calls_made for seller in self.sellers if seller.name == name).total()


@pytest.fixture
async def week():
    clock = StoppedClock(IN_SESSION)
    store = SQLiteDocuments(":memory:", clock)
    yield Week(store, clock)
    await store.close()


async def test_bad_hours_are_answered_and_never_pass_for_fresh(seed):
    """Through three hours of faults nearly everybody gets data, and what is old says so."""
    house, tally = await day(seed, requests=700, begin=BEGIN + 14 * HOUR, lasts=3.5 * HOUR)
    await house.store.close()

    faulty = sum(seller.calls_made.total() - seller.calls_made["answers"] for seller in house.sellers)
    assert faulty > 25, "the weather was too good to prove anything"
    assert tally.falsely_fresh == 0
    assert tally.answered >= 0.99 * tally.requests
    assert tally.fresh < tally.answered


@pytest.mark.parametrize("fault", list(Fault))
async def test_any_fault_of_the_first_choice_is_covered(week, fault):
    """Whatever one provider does wrong, quotes go on fresh from another, within the deadline."""
    house = week.instance()
    await house.library.quote("S03", caller=CALLER)
    week.strike(fault, "finnhub")
    for _ in range(12):
        week.clock.at += 65 * SECOND
        asked_at = week.clock.now()
        answer = await house.library.quote("S03", caller=CALLER, deadline=asked_at + 10 * SECOND)

        assert not answer.is_stale
        assert asked_at - answer.quote.as_of <= 2 * MINUTE
        assert week.clock.now() - asked_at <= 10 * SECOND


@pytest.mark.parametrize("fault", OUTAGES)
async def test_provider_that_is_down_is_spared_and_comes_back(week, fault):
    """During an outage a series' provider is asked less and less; soon after it ends the series goes on."""
    house = week.instance()
    await house.library.bars("S03", Interval.MINUTE, since=IN_SESSION - HOUR, caller=CALLER)
    before = week.calls("alpha_vantage")
    week.strike(fault, "alpha_vantage", lasts=60 * MINUTE)
    for _ in range(120):
        week.clock.at = max(week.clock.at, IN_SESSION) + 30 * SECOND
        answer = await house.library.bars("S03", Interval.MINUTE, since=IN_SESSION - HOUR, caller=CALLER)
        assert len(answer.columns)
        assert answer.provider == "alpha_vantage"

    assert answer.is_stale
    assert answer.reason
    assert week.calls("alpha_vantage") - before <= 16

    week.clock.at = IN_SESSION + 60 * MINUTE + HOUR
    answer = await house.library.bars("S03", Interval.MINUTE, since=IN_SESSION - HOUR, caller=CALLER)
    assert not answer.is_stale
    assert (await house.fetcher.status())[0].health.breaker is BreakerState.CLOSED


async def test_restart_in_the_middle_of_an_outage_asks_nobody_who_is_down(week):
    """What was learned is stored: a new instance begins with the provider that works."""
    week.strike(Fault.HANGS, "finnhub", "twelve_data")
    house = week.instance()
    for n in range(8):
        await house.fetcher.quote(f"S{n:02}")
    asked = week.calls("finnhub") + week.calls("twelve_data")

    again = week.instance()
    before = week.clock.now()
    quote = await again.fetcher.quote("S09")

    assert quote.provider in ("polygon", "alpha_vantage")
    assert week.calls("finnhub") + week.calls("twelve_data") <= asked + 1
    assert week.clock.now() - before < timedelta(seconds=9)


async def test_one_of_many_instances_finds_out(week):
    """However many instances there are, an outage costs its failures once, and one probe at a time."""
    week.strike(Fault.CUT, "alpha_vantage", lasts=10 * MINUTE)
    instances = [week.instance() for _ in range(6)]
    for _ in range(20):
        for house in instances:
            with pytest.raises(TroopError):
                await house.fetcher.bars(
                    "S03", Interval.DAY, since=None, now=week.clock.now(), provider="alpha_vantage"
                )
        week.clock.at += 25 * SECOND

    # Five failures open the breaker; an instance that has not heard of it yet pays one call; then come the probes.
    assert week.calls("alpha_vantage") <= 5 + len(instances) + 6


async def test_when_all_are_down_the_stored_answer_says_so(week):
    """Old data are better than none, marked with their age and the reason."""
    house = week.instance()
    first = await house.library.quote("S03", caller=CALLER)
    week.strike(Fault.HTML, *NAMES)
    week.clock.at += 25 * MINUTE

    answer = await house.library.quote("S03", caller=CALLER)

    assert answer.quote == first.quote
    assert answer.is_stale
    assert "503" in answer.reason


async def test_new_symbol_while_all_are_down_is_an_error(week):
    """Nothing is made up: without stored data the caller hears what is wrong."""
    week.strike(Fault.CUT, *NAMES)

    with pytest.raises(TroopError, match="cuts the connection"):
        await week.instance().library.quote("S03", caller=CALLER)
