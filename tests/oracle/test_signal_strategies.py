"""The strategies: what they mark, how little history they need, and what must not matter to them."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np
import pytest
import talib
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.strategies import invented_bars, recorded_bars
from shared.market.models import Bar, Columns, Interval, minute_of
from shared.market.sessions import calendar
from shared.settings import ROOT
from signals.adapters.entries_file import read_entries
from signals.logic.arrays import Arrays, Tape
from signals.logic.evaluation import NotReady, Watcher
from signals.logic.lookahead import check
from signals.logic.strategies import STRATEGIES, Marks, opinion_at
from signals.models import Direction, Entry, Opinion
from tests.unit.signals.oracle import ORACLES, adjusted, column, recorded

SHIPPED = {entry.name: entry for entry in read_entries(ROOT / "signals/entries.toml")}
DAILY = ["sma-10-30", "rsi-14", "bollinger-20"]
OF_DAYS = [name for name, strategy in STRATEGIES.items() if Interval.DAY in strategy.intervals]
SPARSE = {"momentum": {"period": 60, "least": 0.05}, "donchian_breakout": {"period": 10}, "atr_burst": {"factor": 1.5}}
"""Parameters with which a strategy that speaks seldom has something to say in a short test."""
SEEDS = st.integers(min_value=0, max_value=2**32 - 1)
SESSIONS = calendar().sessions(date(2013, 2, 25), date(2013, 4, 30))
every_strategy = pytest.mark.parametrize("kind", STRATEGIES)
a_few_times = settings(max_examples=max(settings.default.max_examples // 4, 1))
"""An example here is a market of hundreds of bars."""


def watcher(kind: str, **params: Any) -> Watcher:
    """An entry of this strategy; parameters that are not given are the strategy's own."""
    strategy = STRATEGIES[kind]
    chosen = strategy.params(**(params or SPARSE.get(kind, {})))
    return Watcher.of(
        Entry(
            name=kind,
            strategy=kind,
            version=strategy.version,
            params=chosen.model_dump(),
            interval=strategy.intervals[0],
            symbols=None,
            lookback=strategy.lookback(chosen),
        )
    )


def minutes(count: int) -> np.ndarray:
    """When the bars of whole sessions of minutes open; clocks change within the first weeks."""
    opens = [minute_of(session.opens_at) for session in SESSIONS[: count // 390 + 1]]
    return np.concatenate([opened + np.arange(390) for opened in opens])[:count]


def tape_of(close, volume, split=None, *, opening=None, high=None, low=None) -> Tape:
    """A tape on which only closes and volumes vary, unless other prices are given; every bar is a minute long."""
    close, volume = np.asarray(close, dtype=float), np.asarray(volume, dtype=float)
    split = np.ones(len(close)) if split is None else np.asarray(split, dtype=float)
    prices = [close if values is None else values for values in (opening, high, low)]
    opened = minutes(len(close))
    raw = Arrays(
        open=prices[0], high=prices[1], low=prices[2], close=close, volume=volume, opened=opened, closed=opened + 1
    )
    return Tape(raw=raw, split=split, splits=tuple(int(i) for i in np.flatnonzero(split != 1.0)))


def walk(rng: np.random.Generator, count: int, start: float = 50.0) -> tuple[np.ndarray, np.ndarray]:
    """A market in whole cents with calm and wild days, days without a change, and busy and idle volumes."""
    daily = rng.choice([0.002, 0.01, 0.04], count) * rng.standard_normal(count) * (rng.random(count) > 0.15)
    close = np.maximum(np.round(start * np.exp(np.cumsum(daily)), 2), 0.01)
    volume = np.round(1e5 * rng.lognormal(0.0, 0.7, count)) * (rng.random(count) > 0.02)
    return close, volume


def market(rng: np.random.Generator, count: int) -> Tape:
    """Such a market with opens, highs and lows in whole cents around its closes."""
    close, volume = walk(rng, count)
    opening = np.round(np.roll(close, 1) * np.exp(0.01 * rng.standard_normal(count)), 2).clip(0.01)
    high = np.round(np.maximum(opening, close) * (1 + 0.01 * rng.random(count)), 2)
    low = np.minimum(np.round(np.minimum(opening, close) * (1 - 0.01 * rng.random(count)), 2).clip(0.01), close)
    return tape_of(close, volume, opening=opening, high=np.maximum(high, close), low=low)


def scaled(tape: Tape, price: Any, shares: Any, split: Any = None) -> Tape:
    """The same market in other units."""
    raw = tape.raw
    return tape_of(
        raw.close * price,
        raw.volume * shares,
        split,
        opening=raw.open * price,
        high=raw.high * price,
        low=raw.low * price,
    )


def with_splits(rng: np.random.Generator, tape: Tape) -> Tape:
    """The same market as traded, had its shares been split now and then."""
    split = np.ones(len(tape))
    split[rng.integers(1, len(tape), 3)] = rng.choice([2.0, 3.0, 1.5, 0.1], 3)
    shares = np.cumprod(split)
    return scaled(tape, 1 / shares, shares, split)


def part_of(tape: Tape, start: int, end: int) -> Tape:
    """Bars [start, end) alone, as traded."""
    split = tape.split[start:end]
    return Tape(raw=tape.raw.cut(start, end), split=split, splits=tuple(int(i) for i in np.flatnonzero(split != 1.0)))


def bar_by_bar(one: Watcher, tape: Tape, first: int = 0) -> dict[int, Opinion]:
    """What an entry says when it sees every bar from *first* on as it closes."""
    said = {i: one.decide(tape, i) for i in range(first, len(tape.raw))}
    return {i: opinion for i, opinion in said.items() if isinstance(opinion, Opinion)}


def at_once(one: Watcher, tape: Tape, first: int = 0) -> dict[int, Opinion]:
    """What an entry says of the whole array, where it can decide."""
    marks = one.mark_all(tape)
    decided = range(max(first, one.entry.lookback - 1), len(tape.raw))
    return {i: opinion for i in decided if (opinion := opinion_at(marks, i))}


def directions(opinions: Mapping[int, Opinion]) -> dict[int, str]:
    return {i: opinion.direction.value for i, opinion in opinions.items()}


def assert_same(found: Mapping[int, Opinion], expected: Mapping[int, Opinion]) -> None:
    """The same bars and directions, and the same strengths as far as they are shown."""
    assert directions(found) == directions(expected)
    for i, opinion in found.items():
        assert opinion.strength == pytest.approx(expected[i].strength, rel=1e-6, abs=1e-8)


# --- against an independent calculation


def assert_as_the_oracle(one: Watcher, bars: Sequence[Bar]) -> None:
    """Bar by bar, over the whole array and by the oracle: the same bars, directions and strengths."""
    entry, tape = one.entry, Tape.of(Columns.of(bars))
    live = bar_by_bar(one, tape)
    expected = {i: mark for i, mark in ORACLES[entry.strategy](bars, **entry.params).items() if i >= entry.lookback - 1}
    assert expected, "a test of nothing proves nothing"
    assert directions(live) == {i: direction for i, (direction, _) in expected.items()}
    for i, opinion in live.items():
        assert opinion.strength == pytest.approx(expected[i][1], rel=1e-6, abs=1e-8)
    assert_same(at_once(one, tape), live)


@pytest.mark.parametrize("symbol", ["AAPL", "GOOG", "IBM", "MSFT"])
@pytest.mark.parametrize("kind", OF_DAYS)
def test_recorded_years_are_marked_as_an_independent_calculation_marks_them(symbol: str, kind: str) -> None:
    """Real splits, gaps and crashes: three ways to the same marks."""
    assert_as_the_oracle(watcher(kind, **STRATEGIES[kind].params().model_dump()), recorded(symbol))


@pytest.mark.parametrize(
    ("kind", "interval", "params"),
    [
        ("vwap_deviation", Interval.MINUTE, {"distance": 0.004}),
        ("vwap_deviation", Interval.HOUR, {"distance": 0.01, "session_bars": 7}),
        ("bollinger_breakout", Interval.MINUTE, {"width": 2.5, "volume_factor": 3.0}),
        ("adx_trend", Interval.HOUR, {}),
    ],
)
def test_recorded_hours_and_minutes_are_marked_as_an_independent_calculation_marks_them(
    kind: str, interval: Interval, params: Mapping[str, float]
) -> None:
    """Two years of hours and four sessions of minutes, half days and a bar without volume among them."""
    assert_as_the_oracle(watcher(kind, **params), recorded("AAPL", interval))


def test_the_oracle_covers_every_registered_strategy() -> None:
    """A strategy without an independent calculation in tests/unit/signals/oracle.py is not proven."""
    assert set(ORACLES) == set(STRATEGIES)


@pytest.mark.parametrize("symbol", ["AAPL", "MSFT"])
def test_bands_and_rsi_are_talibs(symbol: str) -> None:
    """The numbers a signal shows are the ones anybody gets from TA-Lib on the same adjusted closes."""
    bars = recorded(symbol)
    close, _ = adjusted(bars)
    tape = Tape.of(Columns.of(bars))
    bands = watcher("bollinger_breakout", period=20, width=2.0).mark_all(tape).features
    upper, _, lower = talib.BBANDS(close, timeperiod=20, nbdevup=2.0, nbdevdn=2.0, matype=0)
    np.testing.assert_allclose(bands["upper"], upper, rtol=1e-12)
    np.testing.assert_allclose(bands["lower"], lower, rtol=1e-12)
    np.testing.assert_allclose(watcher("rsi_reversal").mark_all(tape).features["rsi"], talib.RSI(close, 14), rtol=1e-12)


@pytest.mark.parametrize(("symbol", "count"), [("AAPL", 2), ("MSFT", 1)])
@pytest.mark.parametrize("name", DAILY)
def test_a_recorded_split_inside_the_window_is_no_move_of_the_market(symbol: str, count: int, name: str) -> None:
    """The raw price halves; what is said of the bars around is what is said of the market without the split."""
    bars, one = recorded(symbol), Watcher.of(SHIPPED[name])
    tape, smooth = Tape.of(Columns.of(bars)), tape_of(*adjusted(bars))
    splits = [i for i, bar in enumerate(bars) if bar.split != 1.0]
    assert len(splits) == count
    for split in splits:
        first = max(split - 2, one.entry.lookback - 1)
        assert bars[split].open < 0.6 * bars[split - 1].close
        around = range(first, first + one.entry.lookback + 5)
        said, expected = ([one.decide(bars_, i) for i in around] for bars_ in (tape, smooth))
        assert [o and o.direction for o in said] == [o and o.direction for o in expected]


@pytest.mark.parametrize(("symbol", "day"), [("AAPL", "2003-02-07"), ("IBM", "2005-06-27")])
def test_averages_that_meet_exactly_have_not_crossed(symbol: str, day: str) -> None:
    """On these days the ten and the thirty day averages of whole cents are equal; rounding decides nothing."""
    bars = recorded(symbol)
    [i] = [i for i, bar in enumerate(bars) if bar.closed_at.date().isoformat() == day]
    cents = [round(bar.close * 100) for bar in bars[: i + 1]]
    assert 3 * sum(cents[-10:]) == sum(cents[-30:])
    one, tape = Watcher.of(SHIPPED["sma-10-30"]), Tape.of(Columns.of(bars))
    assert one.decide(tape, i) is None
    assert one.mark_all(tape).direction[i] == 0


# --- what a strategy may look at


@every_strategy
@a_few_times
@given(seed=SEEDS)
def test_bar_by_bar_equals_the_whole_array(kind: str, seed: int) -> None:
    """A strategy run bar by bar says what it says when it is run once over the whole array, splits included."""
    rng = np.random.default_rng(seed)
    one = watcher(kind)
    tape = with_splits(rng, market(rng, one.entry.lookback + 60))
    assert_same(at_once(one, tape), bar_by_bar(one, tape, one.entry.lookback - 1))


@every_strategy
@a_few_times
@given(seed=SEEDS)
def test_the_future_changes_no_mark_of_the_past(kind: str, seed: int) -> None:
    """Marks up to a bar are the same whether the tape ends there or goes on: nobody looks ahead."""
    rng = np.random.default_rng(seed)
    one = watcher(kind)
    whole = with_splits(rng, market(rng, one.entry.lookback + 120))
    end = int(rng.integers(one.entry.lookback, len(whole)))
    cut = part_of(whole, 0, end)
    assert_same(at_once(one, cut), {i: o for i, o in at_once(one, whole).items() if i < end})


@every_strategy
@a_few_times
@given(seed=SEEDS, level=st.sampled_from([0.01, 1.0, 30.0]), wildness=st.sampled_from([0.1, 1.0, 5.0]))
def test_bars_older_than_the_lookback_do_not_matter(kind: str, seed: int, level: float, wildness: float) -> None:
    """A history at up to a hundred times today's price changes no mark, and no indicator by 1e-12 of its value."""
    rng = np.random.default_rng(seed)
    one = watcher(kind)
    lookback = one.entry.lookback
    close, volume = walk(rng, lookback + 40)
    past, past_volume = walk(rng, 300, start=50.0 * level)
    past = np.minimum(past**wildness * (50.0 * level) ** (1 - wildness), 100 * np.median(close))
    tape = tape_of([*past, *close], [*past_volume, *volume])
    short, long = one.mark_all(part_of(tape, len(past), len(tape))), one.mark_all(tape)
    assert_same(
        {i: o for i in range(lookback - 1, len(close)) if (o := opinion_at(short, i))},
        {i: o for i in range(lookback - 1, len(close)) if (o := opinion_at(long, i + len(past)))},
    )
    for name, values in short.features.items():
        known, same = values[lookback - 1 :], long.features[name][len(past) + lookback - 1 :]
        np.testing.assert_array_equal(np.isnan(known), np.isnan(same), err_msg=name)
        known, same = known[~np.isnan(known)], same[~np.isnan(known)]
        assert np.all(np.abs(known - same) <= 1e-12 * np.maximum(np.abs(known), np.abs(known).max(initial=0))), name


def test_one_bar_less_than_its_lookback_is_too_few() -> None:
    """An entry says how many bars it needs and how many there are until it can decide."""
    one = watcher("sma_cross", fast=2, slow=4)
    tape = tape_of(np.arange(1.0, 10.0), np.ones(9))
    unready = one.decide(tape, 3)
    assert unready == NotReady(needed=5, have=4)
    assert isinstance(unready, NotReady)
    assert unready.reason == "needs 5 bars, has 4"
    assert not isinstance(one.decide(tape, 4), NotReady)


@every_strategy
@a_few_times
@given(seed=SEEDS)
def test_the_number_of_new_bars_that_arrive_together_changes_no_byte(kind: str, seed: int) -> None:
    """An entry sees exactly its lookback: the same bar gives an identical opinion from any longer tape."""
    rng = np.random.default_rng(seed)
    one = watcher(kind)
    lookback = one.entry.lookback
    tape = with_splits(rng, market(rng, lookback + 30))
    for i in range(lookback - 1, lookback + 30):
        start = int(rng.integers(0, i + 2 - lookback))
        end = int(rng.integers(i + 1, lookback + 31))
        assert one.decide(part_of(tape, start, end), i - start) == one.decide(tape, i)


# --- what must not matter


@every_strategy
@a_few_times
@given(seed=SEEDS, price=st.floats(1e-3, 1e3), shares=st.floats(1e-3, 1e3))
def test_the_unit_of_prices_and_volumes_does_not_matter(kind: str, seed: int, price: float, shares: float) -> None:
    """Cents or dollars, shares or lots: the same marks, equally strong."""
    rng = np.random.default_rng(seed)
    one = watcher(kind)
    tape = market(rng, one.entry.lookback + 60)
    assert_same(at_once(one, scaled(tape, price, shares)), at_once(one, tape))


@every_strategy
@a_few_times
@given(seed=SEEDS)
def test_splits_do_not_matter(kind: str, seed: int) -> None:
    """A market whose shares were split is marked as the same market without the splits."""
    rng = np.random.default_rng(seed)
    one = watcher(kind)
    tape = market(rng, one.entry.lookback + 60)
    assert_same(at_once(one, with_splits(rng, tape)), at_once(one, tape))


# --- markets at the edge


@every_strategy
@a_few_times
@given(seed=SEEDS)
def test_every_opinion_is_finite_and_its_strength_between_0_and_1(kind: str, seed: int) -> None:
    """Storage takes no NaN: not even a market without any volume may cause one."""
    rng = np.random.default_rng(seed)
    one = watcher(kind, **({"volume_factor": 0.0} if kind == "bollinger_breakout" else {}))
    close, volume = walk(rng, one.entry.lookback + 150)
    for traded in (volume, np.zeros_like(volume), volume * (np.arange(len(volume)) % 50 > 40)):
        for opinion in at_once(one, tape_of(close, traded)).values():
            assert 0.0 <= opinion.strength <= 1.0
            assert all(np.isfinite(value) for value in opinion.features.values()), opinion


@every_strategy
def test_a_market_that_stands_still_causes_no_opinion(kind: str) -> None:
    """Equal closes leave no level and break out of no band."""
    one = watcher(kind)
    assert not at_once(one, tape_of(np.full(one.entry.lookback + 50, 123.45), np.full(one.entry.lookback + 50, 1e6)))


@every_strategy
@a_few_times
@given(seed=SEEDS)
def test_a_market_that_stood_still_for_longer_than_the_lookback_starts_anew(kind: str, seed: int) -> None:
    """What was before the halt is forgotten, also by averages that are ratios of what they remember."""
    rng = np.random.default_rng(seed)
    one = watcher(kind)
    before, volume = walk(rng, one.entry.lookback)
    after, more = walk(rng, 60, start=float(before[-1]))
    halt = one.entry.lookback + 20
    tape = tape_of([*before, *np.full(halt, before[-1]), *after], [*volume, *np.full(halt, 1000.0), *more])
    first = len(before) + halt - 5
    assert_same(at_once(one, tape, first), bar_by_bar(one, tape, first))


@pytest.mark.parametrize("period", [2, 14, 200])
def test_the_rsi_forgets_a_past_that_was_a_thousand_times_as_wild(period: int) -> None:
    """Wilder's smoothing never drops a bar; the lookback is long enough for its weight to be nothing."""
    rng = np.random.default_rng(3)
    one = watcher("rsi_reversal", period=period)
    calm = 100.0 + 0.05 * np.cumsum(rng.standard_normal(one.entry.lookback + 30))
    wild = 100.0 + 40.0 * rng.standard_normal(400).clip(-2, 2)
    alone = one.mark_all(tape_of(calm, np.ones(len(calm)))).features["rsi"]
    behind = one.mark_all(tape_of([*wild, *calm], np.ones(400 + len(calm)))).features["rsi"]
    first = one.entry.lookback - 1
    np.testing.assert_allclose(behind[400 + first :], alone[first:], rtol=0, atol=1e-12)


def test_a_breakout_from_a_quiet_market_is_seen_after_a_fall_to_a_hundredth() -> None:
    """Bands are exact for the bars they cover, whatever the price was long ago."""
    rng = np.random.default_rng(1)
    one = watcher("bollinger_breakout", volume_factor=0.0)
    quiet = 1.0 + 1e-6 * rng.standard_normal(200)
    quiet[150] = 1.00001
    past = 100.0 + rng.standard_normal(2000)
    alone = one.mark_all(tape_of(quiet, np.ones(200))).features
    behind = one.mark_all(tape_of([*past, *quiet], np.ones(2200))).features
    for name in ("upper", "lower"):
        np.testing.assert_allclose(behind[name][2020:], alone[name][20:], rtol=1e-12)
    assert bar_by_bar(one, tape_of(quiet, np.ones(200)))[150].direction is Direction.LONG


@pytest.mark.parametrize(
    ("volume_factor", "direction"),
    [(1.5, 0), (0.0, 1)],
    ids=["a breakout wants volume", "a breakout of any volume"],
)
def test_a_market_without_volume_breaks_out_only_where_volume_is_not_asked_for(
    volume_factor: float, direction: int
) -> None:
    """Currencies have no volume: none of it is no high volume."""
    close = np.where(np.arange(40) % 2, 10.0, 10.1)
    close[35] = 12.0
    marks = watcher("bollinger_breakout", volume_factor=volume_factor).mark_all(tape_of(close, np.zeros(40)))
    assert marks.direction[35] == direction


# --- parameters


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("sma_cross", {"fast": 1, "slow": 2}),
        ("sma_cross", {"fast": 1000, "slow": 2000}),
        ("rsi_reversal", {"period": 2, "low": 1e-6, "high": 99.999}),
        ("rsi_reversal", {"period": 200, "low": 49.9, "high": 50}),
        ("bollinger_breakout", {"period": 2, "width": 1e-3, "volume_factor": 0}),
        ("bollinger_breakout", {"period": 1000, "width": 10, "volume_factor": 100}),
        ("macd_cross", {"fast": 2, "slow": 3, "signal": 1}),
        ("macd_cross", {"fast": 199, "slow": 200, "signal": 200}),
        ("adx_trend", {"period": 2, "level": 1e-3}),
        ("adx_trend", {"period": 100, "level": 99.9}),
        ("momentum", {"period": 1, "least": 0}),
        ("momentum", {"period": 2000, "least": 10}),
        ("donchian_breakout", {"period": 2}),
        ("donchian_breakout", {"period": 2000}),
        ("atr_burst", {"period": 2, "factor": 1e-3}),
        ("atr_burst", {"period": 200, "factor": 100}),
        ("volume_spike", {"period": 2, "factor": 1e-3}),
        ("volume_spike", {"period": 1000, "factor": 1000}),
        ("vwap_deviation", {"distance": 1e-6, "session_bars": 2}),
        ("vwap_deviation", {"distance": 1, "session_bars": 1440}),
        ("gap", {"size": 1e-6}),
        ("gap", {"size": 1}),
    ],
)
def test_parameters_at_their_limits_work(kind: str, params: Mapping[str, float]) -> None:
    """Whatever an entry may ask for can be computed, and decides at the bar its lookback names."""
    one = watcher(kind, **params)
    lookback = one.entry.lookback
    tape = tape_of(*walk(np.random.default_rng(7), lookback + 3))
    assert isinstance(one.decide(tape, lookback - 2), NotReady)
    assert_same(at_once(one, tape), bar_by_bar(one, tape))


@pytest.mark.parametrize(
    ("kind", "params", "said"),
    [
        ("sma_cross", {"fast": 30, "slow": 10}, "fast (30) must be smaller than slow (10)"),
        ("sma_cross", {"fast": 10, "slow": 10}, "fast (10) must be smaller than slow (10)"),
        ("macd_cross", {"fast": 26, "slow": 12}, "fast (26) must be smaller than slow (12)"),
        ("macd_cross", {"fast": 12, "slow": 12}, "fast (12) must be smaller than slow (12)"),
        ("sma_cross", {"fast": 0}, "greater than or equal to 1"),
        ("sma_cross", {"slow": 2001}, "less than or equal to 2000"),
        ("sma_cross", {"fast": 2.5}, "integer"),
        ("sma_cross", {"quick": 3}, "not permitted"),
        ("rsi_reversal", {"period": 1}, "greater than or equal to 2"),
        ("rsi_reversal", {"low": 70, "high": 30}, "low (70.0) must be smaller than high (30.0)"),
        ("rsi_reversal", {"low": 0}, "greater than 0"),
        ("rsi_reversal", {"high": 100}, "less than 100"),
        ("rsi_reversal", {"low": float("nan")}, "less than 100"),
        ("bollinger_breakout", {"period": 1}, "greater than or equal to 2"),
        ("bollinger_breakout", {"width": 0}, "greater than 0"),
        ("bollinger_breakout", {"width": float("inf")}, "less than or equal to 10"),
        ("bollinger_breakout", {"volume_factor": -1}, "greater than or equal to 0"),
        ("bollinger_breakout", {"volume_factor": float("nan")}, "less than or equal to 100"),
    ],
)
def test_parameters_that_cannot_be_are_refused(kind: str, params: Mapping[str, float], said: str) -> None:
    """The message says what would be right."""
    with pytest.raises(ValidationError) as e:
        STRATEGIES[kind].params(**params)
    assert said in str(e.value)


def test_marks_without_a_direction_are_no_opinion() -> None:
    """An opinion is long or short; features show nine digits."""
    marks = Marks(
        direction=np.array([0, 1, -1], dtype=np.int8),
        strength=np.array([0.5, 1 / 3, 1.0]),
        features={"price": np.array([1.0, 2 / 3, 1e9 + 1])},
    )
    assert opinion_at(marks, 0) is None
    assert opinion_at(marks, 1) == Opinion(
        direction=Direction.LONG, strength=0.333333333, features={"price": 0.666666667}
    )
    assert opinion_at(marks, 2) == Opinion(direction=Direction.SHORT, strength=1.0, features={"price": 1e9})


# --- every strategy that is registered


@pytest.mark.parametrize(
    ("kind", "interval"), [(name, interval) for name, one in STRATEGIES.items() for interval in one.intervals]
)
def test_no_strategy_looks_ahead_on_recorded_or_invented_bars(kind: str, interval: Interval) -> None:
    """The check that `troop strategies check` makes on one's own: at every interval a strategy makes sense at."""
    strategy = STRATEGIES[kind]
    newest = strategy.lookback(strategy.params()) + 400
    for bars in (recorded_bars("AAPL", interval), invented_bars(interval, count=newest)):
        verdict = check(strategy, bars.cut(max(len(bars) - newest, 0), len(bars)), cuts=15)
        assert verdict.is_passed, verdict.troubles
        assert verdict.cuts >= 15
        assert verdict.decided > 300


@pytest.mark.parametrize("kind", SPARSE)
def test_none_looks_ahead_with_other_parameters(kind: str) -> None:
    """What holds for the defaults holds for the rest."""
    strategy = STRATEGIES[kind]
    verdict = check(strategy, invented_bars(Interval.HOUR, count=900), strategy.params(**SPARSE[kind]), cuts=15)
    assert verdict.is_passed, verdict.troubles
    assert verdict.opinions > 5


@every_strategy
def test_a_strategy_says_what_it_is_and_where_its_formula_comes_from(kind: str) -> None:
    """At least ten, each with a line for people, its source, and sensible defaults."""
    strategy = STRATEGIES[kind]
    assert len(STRATEGIES) >= 10
    assert strategy.name == kind
    assert strategy.version >= 1
    assert 10 < len(strategy.title) < 100
    assert strategy.title[0].islower()
    assert re.search(r"\b(19|20)\d\d\b", strategy.mark.__doc__ or ""), "a source has a year"
    assert strategy.horizon >= 1
    assert strategy.intervals
    marked = strategy.mark(recorded_bars("AAPL", strategy.intervals[0]), strategy.params())
    assert (marked.state is not None) == strategy.has_state
    if marked.state is not None:
        assert set(np.unique(marked.state)) <= {-1, 0, 1}
        entered = np.flatnonzero(marked.direction)
        assert (marked.state[entered] == marked.direction[entered]).all(), "an opinion is where a state begins"


@every_strategy
def test_every_parameter_has_bounds_on_both_sides(kind: str) -> None:
    """No entry can ask for a lookback of a million bars; the message names the field."""
    model = STRATEGIES[kind].params
    for name, field in model.model_fields.items():
        names = {type(bound).__name__ for bound in field.metadata}
        assert names & {"Ge", "Gt"}, name
        assert names & {"Le", "Lt"}, name
        for wrong in (-1e9, 1e9, float("nan"), float("inf"), "many"):
            with pytest.raises(ValidationError) as e:
                model(**{name: wrong})
            assert e.value.errors()[0]["loc"] == (name,)


@pytest.mark.parametrize("symbol", ["AAPL", "IBM"])
def test_what_other_signals_show_is_talibs(symbol: str) -> None:
    """Anybody gets the same from TA-Lib; the ADX within the nudge that keeps rounding out of it."""
    bars = recorded(symbol)
    tape = Tape.of(Columns.of(bars))
    high, low, close = (column(bars, name) for name in ("high", "low", "close"))
    macd, line, _ = talib.MACD(close, 12, 26, 9)
    shown = watcher("macd_cross").mark_all(tape).features
    np.testing.assert_allclose(shown["macd"], macd, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(shown["signal"], line, rtol=1e-9, atol=1e-12)
    atr = watcher("atr_burst").mark_all(tape).features["atr"]
    np.testing.assert_allclose(atr[1:], talib.ATR(high, low, close, 14)[:-1], rtol=1e-9)
    trend = watcher("adx_trend").mark_all(tape).features
    rng = np.random.default_rng(4)  # moves that are never the same on both sides
    apart = market(rng, 900).raw
    wide = [values * (1 + 1e-3 * rng.random(900)) for values in (apart.high, apart.low)]
    loose = tape_of(apart.close, apart.volume, opening=apart.open, high=wide[0] * 1.01, low=wide[1] * 0.99)
    drawn = watcher("adx_trend").mark_all(loose).features
    for name, rule in (("adx", talib.ADX), ("plus_di", talib.PLUS_DI), ("minus_di", talib.MINUS_DI)):
        settled = rule(loose.raw.high, loose.raw.low, loose.raw.close, 14)[300:]
        np.testing.assert_allclose(drawn[name][300:], settled, rtol=1e-5)
        # In whole cents TA-Lib leaves to rounding which of two equal moves counts.
        assert np.nanmedian(np.abs(trend[name] - rule(high, low, close, 14))) < 1


def test_two_moves_of_the_same_size_count_for_the_side_the_bar_closed_on() -> None:
    """In whole cents high and low often part by the same; rounding must not decide which of them leads."""
    rng = np.random.default_rng(8)
    count = watcher("adx_trend").entry.lookback + 30
    middle = 50 + np.cumsum(rng.choice([-0.03, 0.0, 0.03], count))
    width = np.round(1 + 0.5 * rng.random(count), 2)
    close = np.round(middle + 0.4 * rng.choice([-1, 1], count), 2)
    plain = tape_of(close, np.full(count, 1e3), opening=middle, high=middle + width, low=middle - width)
    one = watcher("adx_trend", period=14, level=10)
    shown = one.mark_all(plain).features
    for factor in (1 / 3, 0.1, 7.0):
        other = one.mark_all(scaled(plain, factor, 1 / factor)).features
        for name in ("adx", "plus_di", "minus_di"):
            np.testing.assert_allclose(other[name], shown[name], rtol=1e-9)
