"""How an opinion fared: prices that could be traded, windows by exchange hours, and no invented number."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.market.models import Bar, Columns, Interval
from signals.logic.freshness import Freshness
from signals.logic.scoring import (
    COST_PER_SIDE,
    TREND_BARS,
    confidence_of,
    edge_of,
    expiry,
    horizon_close,
    outcome_of,
    trend_at,
    wilson,
)
from signals.models import Direction, OpenSignal, State, Tally
from tests.builders import daily_bars

BARS = [
    replace(bar, open=o, high=h, low=low, close=c)
    for bar, (o, h, low, c) in zip(
        daily_bars(5),
        [(99, 101, 98, 100), (102, 104, 101, 103), (103, 110, 95, 96), (96, 99, 94, 98), (97, 120, 97, 119)],
        strict=True,
    )
]
"""The signal's own bar, three bars of its horizon, and one behind it."""


def an_open(bars: Sequence[Bar] = BARS, way: Direction = Direction.LONG, horizon: int = 3) -> OpenSignal:
    closed_at = bars[0].closed_at
    closes_at = horizon_close(Interval.DAY, closed_at, horizon)
    return OpenSignal(
        signal_id="s1",
        variant="v1",
        direction=way,
        strength=0.5,
        confidence=None,
        reference_price=bars[0].close,
        trend=None,
        horizon=horizon,
        closed_at=closed_at,
        closes_at=closes_at,
        expires_at=expiry(closes_at),
    )


def test_a_long_is_scored_from_the_next_open_to_the_close_of_its_horizon() -> None:
    """The close that raised it could not be traded any more; what comes behind the horizon does not count."""
    o = outcome_of(an_open(), Columns.of(BARS))
    assert (o.state, o.entry_price, o.exit_price) == (State.SCORED, 102, 98)
    assert o.base_return == o.forward_return == pytest.approx(98 / 102 - 1)
    assert o.is_hit is False
    assert o.mfe == pytest.approx(110 / 102 - 1)
    assert o.mae == pytest.approx(94 / 102 - 1)
    paid = COST_PER_SIDE * (102 + 98) / 102
    assert o.net_return == pytest.approx(98 / 102 - 1 - paid)


def test_a_short_gains_where_the_price_falls() -> None:
    """The same windows seen the other way round; the base return stays that of a bet on rising prices."""
    long, short = (outcome_of(an_open(way=way), Columns.of(BARS)) for way in Direction)
    assert short.is_hit is True
    assert short.base_return == long.base_return
    assert short.forward_return == pytest.approx(1 - 98 / 102)
    assert (short.mfe, short.mae) == pytest.approx((1 - 94 / 102, 1 - 110 / 102))
    assert short.net_return == pytest.approx(1 - 98 / 102 - COST_PER_SIDE * 200 / 102)


@pytest.mark.parametrize("way", list(Direction))
def test_a_price_that_stands_still_is_no_hit(way: Direction) -> None:
    """Neither an opinion of rising nor one of falling prices came true."""
    bars = [replace(bar, open=100, close=100, high=101, low=99) for bar in BARS]
    assert outcome_of(an_open(bars, way), Columns.of(bars)).is_hit is False


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("way", list(Direction))
def test_a_split_inside_the_horizon_is_no_move(at: int, way: Direction) -> None:
    """Two new shares for one old halve every price from then on, and change no return."""
    halved = [
        replace(b, open=b.open / 2, high=b.high / 2, low=b.low / 2, close=b.close / 2) if i >= at else b
        for i, b in enumerate(BARS)
    ]
    split = [replace(b, split=2.0) if i == at else b for i, b in enumerate(halved)]
    there, here = (outcome_of(an_open(way=way), Columns.of(bars)) for bars in (split, BARS))
    for name in ("forward_return", "net_return", "base_return", "mfe", "mae"):
        assert getattr(there, name) == pytest.approx(getattr(here, name)), name
    assert there.is_hit == here.is_hit


@given(
    st.lists(st.tuples(*[st.floats(1, 1000)] * 4), min_size=4, max_size=4),
    st.sampled_from(list(Direction)),
    st.integers(1, 3),
)
def test_what_was_earned_lies_between_the_best_and_the_worst_on_the_way(
    prices: list[tuple[float, ...]], way: Direction, horizon: int
) -> None:
    """MAE <= forward return <= MFE, the best is a gain and the worst a loss; costs only ever take."""
    bars = [
        replace(bar, open=p[0], close=p[1], high=max(p), low=min(p))
        for bar, p in zip(daily_bars(4), prices, strict=True)
    ]
    o = outcome_of(an_open(bars, way, horizon), Columns.of(bars))
    assert o.state is State.SCORED
    assert o.forward_return is not None
    assert o.base_return is not None
    assert o.mae <= o.forward_return + 1e-12
    assert o.forward_return <= o.mfe + 1e-12
    assert o.mae <= 1e-12
    assert o.mfe >= -1e-12
    assert o.net_return < o.forward_return
    assert o.is_hit == (o.forward_return > 0)
    assert abs(o.forward_return) == abs(o.base_return)


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ({1}, "1 of the 3 bars of its horizon are missing"),
        ({2, 3}, "2 of the 3 bars"),
        ({3}, "1 of the 3 bars"),
        ({0}, "its own bar is no longer"),
    ],
)
def test_missing_bars_are_a_reason_and_no_number(left_out: set[int], said: str) -> None:
    """A halt or a gap is not bridged: there was no price to trade at."""
    o = outcome_of(an_open(), Columns.of([bar for i, bar in enumerate(BARS) if i not in left_out]))
    assert o.state is State.UNSCORABLE
    assert said in (o.reason or "")
    assert (o.is_hit, o.forward_return, o.entry_price, o.mfe) == (None, None, None, None)


def test_who_waits_for_a_price_gets_the_open_of_the_first_bar_that_was_traded() -> None:
    """What lies before it could not be had, nor held: neither its open nor its extremes count."""
    still = [BARS[0], replace(BARS[1], volume=0.0), *BARS[2:]]
    o = outcome_of(an_open(), Columns.of(still))
    assert (o.entry_price, o.exit_price) == (BARS[2].open, BARS[3].close)
    assert o.base_return == pytest.approx(98 / 103 - 1)
    assert o.mfe == pytest.approx(110 / 103 - 1)
    assert o.mae == pytest.approx(94 / 103 - 1)
    split = [*still[:2], replace(BARS[2], split=2.0), *BARS[3:]]
    assert outcome_of(an_open(), Columns.of(split)) == o, "its price is in the shares that were bought"


def test_a_horizon_without_a_trade_is_a_reason_and_no_number() -> None:
    """Bars of a halt repeat a price at which nobody could deal; a series without any volume states none."""
    halted = [BARS[0], *(replace(bar, volume=0.0) for bar in BARS[1:4]), BARS[4]]
    o = outcome_of(an_open(), Columns.of(halted))
    assert o.state is State.UNSCORABLE
    assert o.reason == "nothing was traded in the 3 bars of its horizon: a halt"
    assert outcome_of(an_open(), Columns.of([replace(bar, volume=0.0) for bar in BARS])).entry_price == BARS[1].open


def test_a_rewritten_history_is_a_reason_and_no_number() -> None:
    """The opinion was about another bar than the one that now lies there; a rounding is none."""
    rewritten = [replace(BARS[0], close=100.5), *BARS[1:]]
    o = outcome_of(an_open(), Columns.of(rewritten))
    assert o.state is State.UNSCORABLE
    assert o.reason == "history was rewritten underneath: its bar's close was 100, now it is 100.5"
    rounded = [replace(BARS[0], close=100.00001), *BARS[1:]]
    assert outcome_of(an_open(), Columns.of(rounded)).state is State.SCORED


@pytest.mark.parametrize(
    ("interval", "closed_at", "horizon", "expected"),
    [
        (Interval.DAY, datetime(2012, 4, 5, 20, tzinfo=UTC), 1, datetime(2012, 4, 9, 20, tzinfo=UTC)),  # Good Friday
        (Interval.DAY, datetime(2012, 11, 1, 20, tzinfo=UTC), 2, datetime(2012, 11, 5, 21, tzinfo=UTC)),  # clocks back
        (Interval.HOUR, datetime(2012, 7, 2, 19, 30, tzinfo=UTC), 2, datetime(2012, 7, 3, 14, 30, tzinfo=UTC)),
        (Interval.MINUTE, datetime(2012, 7, 3, 16, 59, tzinfo=UTC), 2, datetime(2012, 7, 5, 13, 31, tzinfo=UTC)),
    ],
)
def test_horizons_close_by_exchange_hours(
    interval: Interval, closed_at: datetime, horizon: int, expected: datetime
) -> None:
    """Holidays, weekends, half days and the change of clocks are no bars."""
    assert horizon_close(interval, closed_at, horizon) == expected


def test_the_trend_is_the_return_of_the_last_twenty_bars_in_todays_shares() -> None:
    """A split among them is no fall; with fewer bars there is no trend."""
    columns = Columns.of(daily_bars(25))
    assert trend_at(columns, TREND_BARS - 1) is None
    assert trend_at(columns, TREND_BARS) == pytest.approx(120 / 100 - 1)
    bars = daily_bars(22, prices=[100.0 + i if i < 10 else (100.0 + i) / 2 for i in range(22)])
    bars[10] = replace(bars[10], split=2.0)
    assert trend_at(Columns.of(bars), 21) == pytest.approx(121 / 101 - 1)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 1, 0, 0.793451), (1, 1, 0.206549, 1), (5, 10, 0.236593, 0.763407), (81, 263, 0.255272, 0.366157)],
)
def test_wilsons_interval_is_the_published_one(hits: int, n: int, low: float, high: float) -> None:
    """81 of 263 is Newcombe's example (Statistics in Medicine 17, 1998); the others follow by hand."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-4)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_where_the_share_is_as_far_off_as_a_95_percent_deviation(given_: tuple[int, int]) -> None:
    """Its ends are the two shares p with |hits/n - p| = 1.96 sqrt(p(1-p)/n)."""
    hits, n = given_
    for end in wilson(hits, n):
        off = abs(hits / n - end)
        assert off == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, rel=1e-5, abs=1e-7)


def test_an_edge_is_gone_only_with_fifty_outcomes_and_an_interval_below_the_base_rate() -> None:
    """A run of bad luck is no proof."""
    assert edge_of(0, 0, 0) is None
    few, many = edge_of(49, 0, 49), edge_of(50, 0, 49)
    assert few is not None
    assert many is not None
    assert not few.is_gone
    assert many.is_gone
    assert "50 outcomes is 0.0%" in many.reason
    good = edge_of(100, 55, 60)
    assert good is not None
    assert not good.is_gone, "55 of 100 may well be 60 %"


def test_confidence_is_cautious_with_few_outcomes() -> None:
    """Nothing is claimed without outcomes, and no certainty with a few."""
    assert confidence_of(None) == (None, 0)
    assert confidence_of(Tally(entry="e", resolved=3)) == (None, 0)
    assert confidence_of(Tally(entry="e", resolved=1, scored=1, hits=1)) == (2 / 3, 1)
    assert confidence_of(Tally(entry="e", resolved=200, scored=98, hits=49)) == (0.5, 98)


# --- which bars are still worth an opinion

CLOSE = datetime(2013, 1, 4, 21, tzinfo=UTC)
"""A Friday's close; the following closes are on Monday, Tuesday and Wednesday."""
DELAY = timedelta(minutes=15)


def at(now: datetime, speed: float = 1.0) -> Freshness:
    return Freshness(now=now, delay=DELAY, speed=speed)


def test_a_bar_is_stale_once_so_many_later_ones_could_have_been_fetched() -> None:
    """In trading time: a weekend ages nothing."""
    limit = datetime(2013, 1, 9, 21, tzinfo=UTC) + DELAY
    assert not at(limit).is_stale(Interval.DAY, CLOSE, 3)
    assert at(limit + timedelta(seconds=1)).is_stale(Interval.DAY, CLOSE, 3)
    assert not at(limit + timedelta(seconds=1)).is_stale(Interval.DAY, CLOSE, 4)


def test_ten_minutes_of_the_wall_are_never_too_late() -> None:
    """Three one-minute bars pass while a process restarts; at a day a second ten minutes are 600 days."""
    minute = datetime(2013, 1, 4, 16, tzinfo=UTC)
    assert not at(minute + DELAY + timedelta(minutes=10)).is_stale(Interval.MINUTE, minute, 3)
    assert at(minute + DELAY + timedelta(minutes=10, seconds=1)).is_stale(Interval.MINUTE, minute, 3)
    assert not at(CLOSE + timedelta(days=590), 86_400).is_stale(Interval.DAY, CLOSE, 3)
    assert at(CLOSE + timedelta(days=601), 86_400).is_stale(Interval.DAY, CLOSE, 3)


def test_a_market_that_stands_still_makes_nobody_late() -> None:
    """A paused replay is moved by hand: there is no wall time to hold a bar against."""
    assert not at(CLOSE + timedelta(days=4000), 0).is_stale(Interval.DAY, CLOSE, 3)


def test_all_bars_before_the_first_fresh_one_are_stale() -> None:
    """A batch after an outage is cut in two."""
    bars = daily_bars(12)
    columns = Columns.of(bars)
    freshness = at(bars[-1].closed_at + DELAY)
    first = freshness.first_fresh(Interval.DAY, columns, 2, 3)
    assert first == 8
    stale = [freshness.is_stale(Interval.DAY, bar.closed_at, 3) for bar in bars]
    assert stale == [i < first for i in range(12)]
    assert freshness.first_fresh(Interval.DAY, columns, 10, 3) == 10
    assert freshness.first_fresh(Interval.DAY, columns, 12, 3) == 12
