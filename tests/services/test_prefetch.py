"""What is foreseen of requests, where calls are spent, and when that stops."""

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import combinations, pairwise
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from bench._prefetch import (
    CALLS,
    LIFE,
    REQUESTS,
    SIGMA,
    SLEEPS,
    SYMBOLS,
    WAKES,
    on_demand,
    oracle,
    play,
    trace,
    wasted,
    zipf,
)
from shared.market.prefetch import FLOOR, LIMIT, RETURN, SLOT, SLOTS, Gate, Habits, Prefetcher, outlook, slack

DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def habitual(days=20, *, hour=9, symbol="AAPL", each=3, **how):
    """A prefetcher that saw a symbol asked for at the same hour on so many days."""
    prefetcher = Prefetcher(life=HOUR, **how)
    for day in range(days):
        for n in range(each):
            prefetcher.asked(symbol, BEGIN + day * DAY + hour * HOUR + n * 10 * MINUTE)
    return prefetcher, BEGIN + days * DAY


def slots_of(prefetcher, begin, *, budget, hours=24):
    """When it wants something over a day, told of nothing but its own calls."""
    wanted = []
    for slot in range(hours * 12):
        now = begin + slot * SLOT
        for symbol in prefetcher.wanted(now, budget=budget - len(wanted), until=begin + DAY):
            prefetcher.fetched(symbol, now, is_ahead=True)
            wanted.append((symbol, (now - begin) / HOUR))
    return wanted


class TestTrace:
    def test_days_have_what_the_benchmark_says(self):
        """200 requests a day of 50 symbols, in order, and away from midnight."""
        days = trace(days=40)
        assert {len(day) for day in days} == {REQUESTS}
        assert all(day == sorted(day) for day in days)
        assert {symbol for day in days for _, symbol in day} <= set(range(SYMBOLS))
        assert all(WAKES - 6 * SIGMA < at < SLEEPS + 6 * SIGMA for day in days for at, _ in day)

    def test_memoryless_requests_are_as_popular_as_zipf_says(self):
        """Of many requests the first symbol has the share that Zipf 1.0 gives it, the second half of that."""
        counts = Counter(symbol for day in trace(days=100, habitual=0.0) for _, symbol in day)
        whole = sum(zipf(SYMBOLS))
        for symbol in (0, 1, 4):
            assert counts[symbol] / (100 * REQUESTS) == pytest.approx(1 / (symbol + 1) / whole, rel=0.1)

    def test_four_fifths_are_habits_with_a_spread_of_five_minutes(self):
        """The least popular symbols' requests fall into the same quarter of an hour day after day, or are strays."""
        days = trace(days=200, habitual=1.0, popularity=[1.0] * 5000)
        by_symbol: dict[int, list[float]] = {}
        for day in days:
            for at, symbol in day:
                by_symbol.setdefault(symbol, []).append(at)
        single = [instants for instants in by_symbol.values() if len(instants) == 200]
        assert len(single) > 100
        assert np.mean([np.std(instants) for instants in single]) == pytest.approx(SIGMA, rel=0.05)
        mixed = trace(days=2, popularity=[1.0] * 5000)
        again = {symbol for _, symbol in mixed[0]} & {symbol for _, symbol in mixed[1]}
        assert len(again) == pytest.approx(0.8 * REQUESTS, rel=0.08)

    def test_same_seed_makes_the_same_trace(self):
        """A committed seed is a committed trace."""
        assert trace(days=3) == trace(days=3) != trace(days=3, seed=1)


class TestOracle:
    def test_it_finds_what_trying_everything_finds(self):
        """On small days no choice of instants covers more."""
        for seed in range(5):
            day = trace(days=1, popularity=[1.0, 1.0, 1.0], seed=seed)[0][:14]
            best = max(
                len({i for at, symbol in chosen for i, (t, s) in enumerate(day) if s == symbol and at <= t < at + LIFE})
                for chosen in combinations(day, 3)
            )
            assert oracle(day, 3) == best

    def test_it_is_never_beaten(self):
        """Who knows the trace serves at least as many as who fetches on demand."""
        for day in trace(days=5):
            assert oracle(day) >= on_demand(day)


class TestHabits:
    def test_daily_requests_become_a_rate(self):
        """What came once a day is expected about once a day."""
        habits = Habits()
        for _ in range(40):
            habits.see("AAPL", 100)
            habits.end_day()
        assert habits.expected("AAPL", 100, 101) == pytest.approx(1, abs=0.1)
        assert habits.expected("AAPL", 101, SLOTS) == 0

    def test_dropped_habit_is_forgotten(self):
        """After as many days without as with, the newer ones count more; in the end nothing is kept of it."""
        habits = Habits()
        for day in range(28):
            habits.see("AAPL" if day < 14 else "MSFT", 100)
            habits.end_day()
        assert habits.expected("AAPL", 0, SLOTS) < habits.expected("MSFT", 0, SLOTS) / 1.9
        for _ in range(120):
            habits.end_day()
        assert habits.learnt == {}

    def test_busy_day_raises_what_is_expected(self):
        """A symbol asked for far more than usual this morning is expected more for the rest of the day."""
        habits = Habits()
        for _ in range(20):
            habits.see("AAPL", 100)
            habits.see("AAPL", 200)
            habits.end_day()
        usual = habits.rates(["AAPL"], 150, {})[0, 200]
        habits.see("AAPL", 120, 20)
        assert habits.rates(["AAPL"], 150, {})[0, 200] > 2 * usual

    def test_assumption_gives_way_to_what_is_seen(self):
        """What a watcher lets us expect weighs less with each day of knowing better."""
        habits = Habits()
        habits.see("AAPL", 100)
        habits.end_day()
        early = habits.rates(["AAPL"], 0, {"AAPL": 12.0})[0, 0]
        for _ in range(20):
            habits.end_day()
        late = habits.rates(["AAPL"], 0, {"AAPL": 12.0})[0, 0]
        assert early > 5 * late > 0

    def test_number_of_symbols_is_bounded(self):
        """Whoever asks for all there are makes the stored model no larger; the popular ones stay."""
        habits = Habits()
        for n in range(500):
            habits.see(f"S{n}", n % SLOTS, 1)
        habits.see("AAPL", 5, 3)
        habits.end_day()
        assert len(habits.learnt) == 64
        assert "AAPL" in habits.learnt


class TestOutlook:
    def test_calls_go_where_most_is_served(self):
        """With one call the densest hour has it, and the price says what the next one would bring."""
        rates = np.zeros((2, SLOTS))
        rates[0, 120:126] = 1.0
        rates[1, 200:204] = 1.0
        plan = outlook(rates, [0, 0], first=0, last=SLOTS, budget=1, life=12)
        assert plan.gain(0, 120) > 0 > plan.gain(1, 200)
        assert 4 <= plan.price <= 6
        both = outlook(rates, [0, 0], first=0, last=SLOTS, budget=2, life=12)
        assert both.gain(0, 120) > 0 < both.gain(1, 200)

    def test_best_moment_is_waited_for(self):
        """A call that would serve some now is held back where it serves more a little later."""
        rates = np.zeros((1, SLOTS))
        rates[0, 100:124] = 0.2
        rates[0, 112:124] = 0.6
        plan = outlook(rates, [0], first=0, last=SLOTS, budget=1, life=12)
        assert plan.gain(0, 100) < 0 < plan.gain(0, 112)

    @pytest.mark.parametrize("budget", [1, 3, 7])
    def test_plan_keeps_to_its_budget(self, budget):
        """Followed as if all came as expected, a plan makes no more calls than it was given, and few less."""
        rates = np.random.default_rng(5).random((6, SLOTS)) * 0.3
        plan = outlook(rates, [0] * 6, first=0, last=SLOTS, budget=budget, life=12)
        calls = 0
        for row in range(6):
            slot = 0
            while slot < SLOTS:
                is_call = plan.gain(row, slot) > 0
                calls += is_call
                slot += 12 if is_call else 1
        assert budget - 2 <= calls <= budget

    def test_what_serves_nobody_is_not_planned(self):
        """A call that promises less than half a request is no plan, however many calls are left."""
        rates = np.full((1, SLOTS), 0.9 * FLOOR / 12)
        plan = outlook(rates, [0], first=0, last=SLOTS, budget=1000, life=12)
        assert all(plan.gain(0, slot) <= 0 for slot in range(SLOTS))


class TestGate:
    def test_it_opens_only_after_shadows_were_of_use(self):
        """Nothing is fetched before enough of what would have been fetched was used."""
        gate = Gate()
        switched = [gate.judge(is_used=True, now=BEGIN) for _ in range(20)]
        assert 10 <= switched.index(True) < 20
        assert gate.is_on
        assert gate.switched_at == BEGIN

    def test_waste_past_the_limit_shuts_it(self):
        """Half in vain is too much; a tenth is not."""
        gate = Gate(is_on=True)
        for n in range(200):
            assert not gate.judge(is_used=n % 10 != 0, now=BEGIN)
        for n in range(200):
            gate.judge(is_used=n % 2 == 0, now=BEGIN)
            if not gate.is_on:
                break
        assert not gate.is_on

    def test_between_the_limits_it_stays_as_it_is(self):
        """A third in vain neither shuts nor opens it, so it does not flap."""
        assert RETURN < 1 / 3 < LIMIT
        for gate in (Gate(is_on=True), Gate(is_on=False)):
            is_on = gate.is_on
            for n in range(300):
                gate.judge(is_used=n % 3 != 0, now=BEGIN)
            assert gate.is_on is is_on

    def test_it_survives_storage(self):
        """What is read back is what was written."""
        gate = Gate(is_on=True, used=3.5, wasted=0.25, switched_at=BEGIN)
        assert Gate.of(json.loads(json.dumps(gate.to_json()))) == gate


class TestPrefetcher:
    def test_habit_is_fetched_just_before_it(self):
        """One call covers the requests of the hour that come every day."""
        prefetcher, today = habitual(gate=Gate(is_on=True))
        assert slots_of(prefetcher, today, budget=3) == [("AAPL", 9.0)]

    def test_gate_shut_makes_no_call_and_still_judges(self):
        """Off, it only notes what it would have fetched; when that is used day after day it comes on by itself."""
        prefetcher, today = habitual()
        assert not prefetcher.gate.is_on
        for day in range(20):
            nine = today + day * DAY + 9 * HOUR
            if slots_of(prefetcher, nine - HOUR / 6, budget=3, hours=1):
                break
            prefetcher.asked("AAPL", nine + 55 * MINUTE)
            prefetcher.pass_to(nine + 2 * HOUR)
        assert prefetcher.gate.is_on
        assert (prefetcher.used, prefetcher.wasted) == (0, 0)

    def test_symbol_nobody_asked_for_is_never_fetched(self):
        """However much a watcher lets us expect, an unused key costs nothing."""
        prefetcher, today = habitual(gate=Gate(is_on=True))
        wanted = [
            symbol
            for slot in range(SLOTS)
            for symbol in prefetcher.wanted(
                today + slot * SLOT, budget=25, until=today + DAY, assumed={"MSFT": 1e6, "AAPL": 1.0}
            )
        ]
        assert set(wanted) <= {"AAPL"}

    def test_no_slack_no_call(self):
        """Without a call that would be lost nothing is wanted."""
        prefetcher, today = habitual(gate=Gate(is_on=True))
        assert slots_of(prefetcher, today, budget=0) == []

    def test_fresh_symbol_is_left_alone(self):
        """What somebody else has fetched is not fetched again while it is fresh."""
        prefetcher, today = habitual(gate=Gate(is_on=True))
        prefetcher.pass_to(today)
        prefetcher.fetched("AAPL", today + 8.75 * HOUR)
        assert slots_of(prefetcher, today, budget=3, hours=10)[:1] != [("AAPL", 9.0)]

    def test_used_and_unused_answers_are_told_apart(self):
        """An answer counts as used by a request before it went stale, as waste otherwise; hits are counted."""
        prefetcher = Prefetcher(life=HOUR, gate=Gate(is_on=True))
        prefetcher.pass_to(BEGIN)
        prefetcher.fetched("AAPL", BEGIN, is_ahead=True)
        prefetcher.fetched("MSFT", BEGIN, is_ahead=True)
        prefetcher.asked("AAPL", BEGIN + 59 * MINUTE, 2)
        prefetcher.asked("MSFT", BEGIN + 61 * MINUTE)
        assert (prefetcher.used, prefetcher.wasted, prefetcher.waste) == (1, 1, 0.5)
        assert prefetcher.hit_rate == pytest.approx(2 / 3)

    def test_habits_are_of_local_time(self):
        """When clocks change, people's habits go with them."""
        zone = ZoneInfo("America/New_York")
        prefetcher = Prefetcher(life=HOUR, zone=zone, gate=Gate(is_on=True))
        first = datetime(2026, 2, 20, 10, tzinfo=zone)
        for day in range(16):
            prefetcher.asked("AAPL", (first + day * DAY).astimezone(UTC), 3)
        summer = datetime(2026, 3, 9, tzinfo=zone).astimezone(UTC)
        [(symbol, hour)] = slots_of(prefetcher, summer, budget=1)
        assert symbol == "AAPL"
        assert 9 < hour <= 10

    def test_stored_and_read_it_decides_the_same(self):
        """An instance that reads the model goes on as the one that wrote it would have."""
        prefetcher, today = habitual(gate=Gate(is_on=True))
        prefetcher.asked("AAPL", today + 8 * HOUR)
        again = Prefetcher.of(json.loads(json.dumps(prefetcher.to_json())), life=HOUR)
        begin = today + 8 * HOUR
        assert slots_of(again, begin, budget=3, hours=12) == slots_of(prefetcher, begin, budget=3, hours=12) != []


class TestPlay:
    def test_no_call_depends_on_what_comes_later(self):
        """Cut off at any moment, a trace leads to the same calls before it."""
        days = trace(days=3)
        whole = play(days, Prefetcher(life=HOUR, gate=Gate(is_on=True)))
        cut = 14 * 60.0
        short = [*days[:2], [(at, symbol) for at, symbol in days[2] if at < cut]]
        parted = play(short, Prefetcher(life=HOUR, gate=Gate(is_on=True)))
        assert [one.calls for one in parted[:2]] == [one.calls for one in whole[:2]]
        earlier = [call for call in whole[2].calls if call[0] < cut]
        assert earlier == [call for call in parted[2].calls if call[0] < cut]
        assert earlier

    def test_day_costs_no_more_calls_than_it_has(self):
        """Ahead and on demand together stay within the quota, and no symbol is fetched while it is fresh."""
        for one in play(trace(days=2), Prefetcher(life=HOUR, gate=Gate(is_on=True))):
            assert len(one.calls) <= CALLS
            by_symbol: dict[int, list[float]] = {}
            for at, symbol, _ in one.calls:
                by_symbol.setdefault(symbol, []).append(at)
            assert all(b - a >= LIFE for instants in by_symbol.values() for a, b in pairwise(sorted(instants)))

    def test_broken_habits_switch_it_off(self):
        """When requests become unforeseeable it stops after a few calls in vain."""
        prefetcher = Prefetcher(life=HOUR, gate=Gate(is_on=True))
        days = trace(days=3, habitual=0.0, popularity=[1.0] * SYMBOLS)
        played = play(days, prefetcher)
        count, vain = wasted(days, played)
        assert 0 < vain <= count < 2 * CALLS
        assert not prefetcher.gate.is_on
        assert not played[-1].calls
        assert prefetcher.wasted >= vain - 1


@pytest.mark.parametrize(
    ("left", "demand", "amount", "share", "expected"),
    [
        (25, 0.0, 25, 1.0, 25),
        (25, 9.0, 25, 1.0, 10),
        (10, 9.0, 25, 1.0, 0),
        (25, 0.0, 25, 0.6, 15),
        (10, 0.0, 25, 0.6, 0),
        (0, 0.0, 25, 1.0, 0),
    ],
)
def test_only_what_would_be_lost_is_slack(left, demand, amount, share, expected):
    """What demand will likely take (two deviations more than expected) is left to it, and the others' share too."""
    assert slack(left, demand=demand, amount=amount, share=share) == expected
