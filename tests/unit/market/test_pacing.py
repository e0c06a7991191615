from datetime import timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.market.pacing import SPACED, next_permit, remembered, spacing
from shared.market.registry import WINDOWS, Window, windows_of
from tests.builders import WALL

SECOND, MINUTE, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)
LAWS = st.lists(
    st.builds(
        Window,
        amount=st.integers(1, 12),
        span=st.sampled_from([SECOND, 10 * SECOND, MINUTE, timedelta(hours=1), timedelta(hours=5), DAY]),
    ),
    min_size=1,
    max_size=3,
)
GAPS = st.lists(st.sampled_from([0, 0, 0, 0.3, 1, 61, 1700, 3601, 90_000]), min_size=1, max_size=60)


def reserved(windows, gaps):
    """The instants of calls that are asked for *gaps* seconds after one another, or when they may leave."""
    now, instants = WALL, []
    for gap in gaps:
        now += timedelta(seconds=gap)
        now = next_permit(windows, now=now, recent=instants[-remembered(windows) :])
        instants.append(now)
    return instants


def most_in(instants, span):
    """How many fall together into a window of *span*, wherever it begins."""
    return max(sum(begin <= at < begin + span for at in instants) for begin in instants)


@given(windows=LAWS, gaps=GAPS)
@example(windows=[Window(amount=1, span=timedelta(hours=1)), Window(amount=5, span=DAY)], gaps=[0] * 12)
def test_no_window_ever_holds_more_calls_than_allowed(windows, gaps):
    """Wherever the provider lets a window begin, it sees at most the amount it allows, of all windows at once."""
    instants = reserved(windows, gaps)

    assert instants == sorted(instants)
    for window in windows:
        assert most_in(instants, window.span) <= window.amount


@given(windows=LAWS, gaps=GAPS)
def test_nobody_waits_without_need(windows, gaps):
    """A call leaves at once unless a window forbids it, and long windows can be used up."""
    instants = reserved(windows, gaps)
    now = instants[-1] + timedelta(days=3)

    assert next_permit(windows, now=now, recent=instants) == now
    assert next_permit(windows, now=now, recent=[]) == now


def test_day_of_a_free_key_is_25_calls_a_second_apart():
    """The whole quota can be used in half a minute; then the first call's day must be over."""
    windows = windows_of("alpha_vantage", "free")

    instants = reserved(windows, [0] * 27)

    assert instants[24] - instants[0] < timedelta(seconds=30)
    assert timedelta(0) < instants[25] - instants[0] - DAY < MINUTE
    assert instants[26] > instants[25]


def test_late_burst_does_not_meet_the_next_days():
    """One call in the morning and 24 at night leave one for the next morning, not 25."""
    windows = windows_of("alpha_vantage", "free")
    gaps = [0, 86_000, *[0] * 23, 500, *[0] * 10]

    instants = reserved(windows, gaps)

    assert most_in(instants, DAY) == 25


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=["-".join(key) for key in WINDOWS])
def test_spacing_keeps_every_short_window(windows):
    """Evenly spaced calls never meet in one of the provider's short windows, with room for jitter."""
    gap = spacing(windows)

    for window in windows:
        if window.span <= SPACED:
            assert window.span / gap < window.amount


def test_nothing_short_needs_no_spacing():
    """Only a day's limit lets calls leave together."""
    assert spacing([Window(amount=25, span=DAY)]) == timedelta(0)
    assert spacing([]) == timedelta(0)


def test_only_what_is_needed_is_remembered():
    """The last call is enough for spacing; a long window needs as many as it allows."""
    assert remembered([Window(amount=1200, span=MINUTE)]) == 1
    assert remembered([Window(amount=1, span=SECOND), Window(amount=25, span=DAY)]) == 25
