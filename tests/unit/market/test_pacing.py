"""Wherever a provider lets its windows begin, and however calls jitter, it sees no more than it allows."""

import json
from datetime import UTC, datetime, timedelta
from random import Random
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.market.models import Priority
from shared.market.pacing import EXACT, FIRST_GUARD, MOST_GUARD, Count, Pace, instant_at, micros
from shared.market.registry import Kind, Window, providers, windows_of
from tests.builders import WALL

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
START = micros(WALL)
ONE_SECOND = 1_000_000

ROLLING = st.builds(
    Window,
    amount=st.integers(1, 12),
    span=st.sampled_from([SECOND, 10 * SECOND, MINUTE, HOUR, 5 * HOUR, DAY]),
    kind=st.sampled_from([Kind.ROLLING, Kind.UNKNOWN]),
    is_weighted=st.booleans(),
)
ALIGNED = st.builds(
    Window,
    amount=st.integers(1, 12),
    span=st.sampled_from([SECOND, MINUTE, HOUR, DAY]),
    kind=st.just(Kind.ALIGNED),
    zone=st.sampled_from(["UTC", "America/New_York"]),
    is_weighted=st.booleans(),
)
LAWS = st.lists(ROLLING | ALIGNED, min_size=1, max_size=3)
GAPS = st.lists(st.sampled_from([0, 0, 0, 0.3, 0.98, 1, 59.99, 61, 1700, 3601, 90_000]), min_size=1, max_size=50)


def reserved(windows, gaps, *, dice=None, weights=(1,)):
    """Calls as (instant, weight), asked for *gaps* seconds after one another; with *dice* some are handed back."""
    pace, now, kept = Pace.of(windows), START, []
    for number, gap in enumerate(gaps):
        now += int(gap * ONE_SECOND)
        weight = weights[number % len(weights)]
        ahead = dice.choice([0, 0, 100_000]) if dice else 0  # somebody else planned a little further ahead
        at = pace.next_instant(now + ahead, weight)
        if at is None:
            continue
        pace.add(at, weight)
        if dice and dice.random() < 0.2:
            pace.take_back(at, weight)
        else:
            kept.append((at, weight))
            now = max(now, at - ahead)
        pace.prune(now)
    return kept


def arrivals(calls, dice, most=FIRST_GUARD):
    """When the provider sees them: each up to the guard late."""
    return sorted((at + dice.randint(0, most), weight) for at, weight in calls)


def most_seen(window, calls):
    """How many a provider counts in its fullest window."""
    counted = [(at, weight if window.is_weighted else 1) for at, weight in calls]
    if window.kind is Kind.ALIGNED:
        sums = {}
        for at, number in counted:
            local = instant_at(at).astimezone(ZoneInfo(window.zone))
            day = local.replace(hour=0, minute=0, second=0, microsecond=0)
            cell = (day, (local - day) // window.span)
            sums[cell] = sums.get(cell, 0) + number
        return max(sums.values(), default=0)
    span = window.span // timedelta(microseconds=1)
    return max((sum(n for at, n in counted if begin <= at < begin + span) for begin, _ in counted), default=0)


@given(windows=LAWS, gaps=GAPS, seed=st.integers(0, 2**32))
@example(windows=[Window(amount=1, span=HOUR), Window(amount=5, span=DAY)], gaps=[0] * 12, seed=1)
@example(windows=[Window(amount=8, span=MINUTE, kind=Kind.ALIGNED)], gaps=[59.99] + [0] * 20, seed=2)
def test_no_window_ever_holds_more_calls_than_allowed(windows, gaps, seed):
    """Of all windows at once, with weights, jitter up to the guard, and instants handed back in between."""
    dice = Random(seed)
    calls = reserved(windows, gaps, dice=dice, weights=(1, 2, 1, 5))

    seen = arrivals(calls, dice)
    for window in windows:
        assert most_seen(window, seen) <= window.amount


@given(windows=LAWS, gaps=GAPS)
def test_nobody_waits_without_need(windows, gaps):
    """A call leaves at once where every window is empty."""
    calls = reserved(windows, gaps)
    pace = Pace.of(windows)
    for at, weight in calls:
        pace.add(at, weight)
    later = calls[-1][0] + 3 * 24 * 3600 * ONE_SECOND

    assert pace.next_instant(later) == later
    assert Pace.of(windows).next_instant(START) == START


@pytest.mark.parametrize("most_late", [0, 30_000])
@pytest.mark.parametrize("amount", [257, 600])
def test_large_windows_hold_too(amount, most_late):
    """Calls of large windows are remembered together: none is lost by it, and less than one in a hundred is unused."""
    dice = Random(amount)
    pace, at, calls = Pace.of([Window(amount=amount, span=MINUTE)]), START, []
    for _ in range(int(amount * 1.5)):
        at = pace.next_instant(at + dice.choice([0, 0, 0, most_late]))
        pace.add(at, 1)
        calls.append(at)
        pace.prune(at)

    laps = [later - first for first, later in zip(calls, calls[amount:], strict=False)]
    assert min(laps) >= 60 * ONE_SECOND + FIRST_GUARD
    if not most_late:
        assert max(laps) <= 60 * ONE_SECOND * 1.01


def test_calls_kept_together_hold_also_for_an_earlier_instant():
    """A call asked for before others that are reserved already does not meet the first of them."""
    pace = Pace.of([Window(amount=300, span=MINUTE)])
    cell = START // 234_375 * 234_375
    for number in range(300):
        pace.counts[0].add(cell + number * 500, 1)
    early = cell - 60 * ONE_SECOND - FIRST_GUARD

    assert pace.next_instant(early - 1000) == early - 1000
    assert pace.next_instant(early + 50_000) >= cell + 60 * ONE_SECOND


@pytest.mark.parametrize("amount", [EXACT, EXACT + 1, 1200, 100_000])
def test_document_stays_small(amount):
    """However large the window, what storage keeps of it stays below 4 KB."""
    count = Count(Window(amount=amount, span=MINUTE))
    for number in range(min(amount, 5000)):
        count.add(START + number * 60 * ONE_SECOND // min(amount, 5000), 1)

    assert len(json.dumps(count.encode())) < 4096
    assert sum(n for _, n in count.calls) == min(amount, 5000)


@given(windows=LAWS, gaps=GAPS)
def test_what_was_stored_goes_on_the_same(windows, gaps):
    """A restart forgets nothing: the next instant is the same."""
    pace = Pace.of(windows)
    for at, weight in reserved(windows, gaps, weights=(1, 3)):
        pace.add(at, weight)
        pace.prune(at)
        again = Pace([Count(c.window, is_staggering=c.is_staggering).decode(c.encode()) for c in pace.counts])

        assert again.next_instant(at, 2) == pace.next_instant(at, 2)


def test_an_instant_handed_back_is_the_next_one():
    """Whoever asks next gets it."""
    pace = Pace.of([Window(amount=2, span=HOUR)])
    first = pace.next_instant(START)
    pace.add(first, 1)
    second = pace.next_instant(START)
    pace.add(second, 1)
    assert pace.next_instant(START) >= first + 3600 * ONE_SECOND

    pace.take_back(second, 1)

    assert pace.next_instant(START) == second


def test_call_that_can_never_fit_has_no_instant():
    """A weight above the whole window is told apart from a wait."""
    pace = Pace.of([Window(amount=8, span=MINUTE)])

    assert pace.next_instant(START, 9) is None
    assert pace.next_instant(START, 8) == START


def test_gate_without_weights_counts_calls():
    """A heavy call is one call at such a gate."""
    gate = Window(amount=2, span=SECOND, is_weighted=False)
    pace = Pace.of([gate, Window(amount=60, span=MINUTE)])

    pace.add(pace.next_instant(START, 10), 10)

    assert pace.next_instant(START, 10) < START + ONE_SECOND


class TestAligned:
    def test_whole_window_can_be_used_on_both_sides_of_its_edge(self):
        """Eight just before the minute and eight just after are sixteen in a rolling one, and allowed."""
        minute = Window(amount=8, span=MINUTE, kind=Kind.ALIGNED)
        calls = [at for at, _ in reserved([minute], [55] + [0] * 15)]

        assert calls[7] < START + 56 * ONE_SECOND
        assert START + 60 * ONE_SECOND + FIRST_GUARD <= calls[8] < START + 61 * ONE_SECOND
        assert calls[15] < START + 62 * ONE_SECOND

    def test_near_the_edge_a_call_counts_on_both_sides(self):
        """Nobody knows on which side of the provider's clock it arrives."""
        pace = Pace.of([Window(amount=1, span=MINUTE, kind=Kind.ALIGNED)])
        pace.add(START - 5_000, 1)

        assert pace.next_instant(START + 1_000_000) == START + 60 * ONE_SECOND + FIRST_GUARD

    @pytest.mark.parametrize(
        ("now", "begins"),
        [
            (datetime(2026, 3, 8, 3, tzinfo=UTC), datetime(2026, 3, 8, 5, tzinfo=UTC)),
            (datetime(2026, 3, 8, 12, tzinfo=UTC), datetime(2026, 3, 9, 4, tzinfo=UTC)),
            (datetime(2026, 11, 1, 12, tzinfo=UTC), datetime(2026, 11, 2, 5, tzinfo=UTC)),
        ],
    )
    def test_day_begins_at_midnight_of_its_zone(self, now, begins):
        """Also on the days of 23 and 25 hours."""
        pace = Pace.of([Window(amount=1, span=DAY, kind=Kind.ALIGNED, zone="America/New_York")])
        pace.add(micros(now), 1)

        found = pace.next_instant(micros(now) + 60 * ONE_SECOND)

        assert instant_at(found) - begins == timedelta(microseconds=FIRST_GUARD)


class TestGuard:
    def test_wider_guard_keeps_calls_further_apart(self):
        """Calls that may arrive late leave later, where that costs nothing in the long run in full."""
        windows = [Window(amount=1, span=SECOND), Window(amount=25, span=DAY)]
        pace = Pace.of(windows)
        pace.guard = MOST_GUARD
        pace.add(START, 1)

        assert pace.next_instant(START) == START + ONE_SECOND + MOST_GUARD

    def test_window_that_limits_us_loses_little(self):
        """However much answers jitter, 98 % of the quota can be used."""
        pace = Pace.of([Window(amount=30, span=SECOND / 10), Window(amount=60, span=6 * SECOND)])
        pace.guard = MOST_GUARD
        at, calls = START, []
        for _ in range(240):
            at = pace.next_instant(at)
            pace.add(at, 1)
            calls.append(at)

        laps = [later - first for first, later in zip(calls, calls[60:], strict=False)]
        assert max(laps) <= 6 / 0.98 * ONE_SECOND
        assert min(laps) >= 6 * ONE_SECOND


class TestFreeKey:
    def test_its_day_is_25_calls_a_second_apart(self):
        """The whole quota can be used in half a minute; then the first call's day must be over."""
        calls = [at for at, _ in reserved(windows_of("alpha_vantage", "free"), [0] * 27)]

        assert calls[24] - calls[0] < 30 * ONE_SECOND
        assert 0 < calls[25] - calls[0] - 86_400 * ONE_SECOND < 60 * ONE_SECOND
        assert calls[26] > calls[25]

    def test_late_burst_does_not_meet_the_next_days(self):
        """One call in the morning and 24 at night leave one for the next morning, not 25."""
        windows = windows_of("alpha_vantage", "free")
        calls = reserved(windows, [0, 86_000, *[0] * 23, 500, *[0] * 10])

        assert most_seen(windows[1], calls) == 25

    @pytest.mark.parametrize(
        ("priority", "allowed"),
        [
            (Priority.LIVE, 25),
            (Priority.ASKED, 25),
            (Priority.SCORING, 25),
            (Priority.BACKFILL, 20),
            (Priority.PREFETCH, 15),
        ],
    )
    def test_last_share_of_a_day_is_kept_for_better_calls(self, priority, allowed):
        """Backfill leaves a fifth of the day alone, prefetch two fifths."""
        pace, at = Pace.of(windows_of("alpha_vantage", "free")), START
        calls = 0
        while (at := pace.next_instant(at, 1, priority)) < START + 3600 * ONE_SECOND:
            pace.add(at, 1)
            calls += 1

        assert calls == allowed


@pytest.mark.parametrize("facts", providers().values(), ids=providers())
@pytest.mark.parametrize("plan", ["free", "premium"])
def test_every_plan_can_be_kept(facts, plan):
    """Saturated, a plan's windows hold by arrival, and its slowest window is used to 98 %."""
    dice, windows = Random(7), facts.windows[plan]
    longest = max(windows, key=lambda w: w.span / w.amount)
    calls = reserved(windows, [0] * min(longest.amount * 3, 900))

    for window in windows:
        assert most_seen(window, arrivals(calls, dice)) <= window.amount
    spent = (calls[-1][0] - calls[0][0]) / ONE_SECOND
    possible = (len(calls) / longest.amount + 1) * longest.span.total_seconds()
    assert spent <= possible / 0.98
