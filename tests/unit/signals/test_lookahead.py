"""The lookahead check: cheats are caught and told, and honest strategies pass."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import talib
from pydantic import Field

from infra.strategies import invented_bars
from shared.market.models import Interval
from signals.logic.arrays import Arrays
from signals.logic.lookahead import Rule, Verdict, check, told
from signals.logic.strategies import Marks, Params, Strategy, said
from signals.models import Direction, Opinion

BARS = invented_bars(Interval.DAY, count=240, seed=5)


class Period(Params):
    """Bars of an average."""

    period: int = Field(default=20, ge=2)


class Needy(Params):
    """A parameter nobody gives."""

    period: int


def strategy(mark: Callable[[Arrays, Any], Marks], lookback: int = 21, **fields: Any) -> Strategy:
    """A strategy of one's own."""
    wanted = {"name": "mine", "version": 1, "title": "it likes to", "params": Period} | fields
    return Strategy(lookback=lambda _: lookback, mark=mark, **wanted)


def examined(mark: Callable[[Arrays, Any], Marks], lookback: int = 21, **fields: Any) -> Verdict:
    return check(strategy(mark, lookback, **fields), BARS, cuts=20)


def plain(level: np.ndarray, close: np.ndarray) -> Marks:
    """Long above a level, short below, in arrays alone: how somebody writes it who never heard of the last bar."""
    above = np.nan_to_num(close - level) > 0
    begins = above & ~np.concatenate([[True], above[:-1]])
    ends = ~above & np.concatenate([[False], above[:-1]])
    return Marks(
        direction=begins.astype(np.int8) - ends.astype(np.int8),
        strength=np.full(len(close), 0.5),
        features={"level": level},
    )


def honest(bars: Arrays, params: Period) -> Marks:
    return plain(talib.SMA(bars.close, params.period), bars.close)


# --- cheats


def tomorrows_close(bars: Arrays, _: Period) -> Marks:
    return plain(bars.close, np.append(bars.close[1:], bars.close[-1]))


def only_winners(bars: Arrays, params: Period) -> Marks:
    """Drops signals that the next bar proves wrong."""
    marks = honest(bars, params)
    rises = np.append(np.diff(bars.close), 0)
    wins = marks.direction * rises >= 0
    return Marks(direction=np.where(wins, marks.direction, 0).astype(np.int8), strength=marks.strength, features={})


def normalised_by_the_whole(bars: Arrays, _: Period) -> Marks:
    score = (bars.close - bars.close.mean()) / bars.close.std()
    return plain(np.full(len(score), 0.3), score)


def centred_average(bars: Arrays, _: Period) -> Marks:
    padded = np.pad(bars.close, 5, mode="edge")
    return plain(np.convolve(padded, np.ones(11) / 11, mode="valid"), bars.close)


def seen_from_the_last_bar(bars: Arrays, params: Period) -> Marks:
    return plain(np.full(len(bars), bars.close[-1] * 0.9), bars.close)


def lowest_of_all(bars: Arrays, _: Period) -> Marks:
    """Buys what turns out to be the bottom."""
    direction = np.zeros(len(bars), dtype=np.int8)
    direction[np.argmin(bars.close)] = 1
    return Marks(direction=direction, strength=np.ones(len(bars)), features={})


def filled_from_behind(bars: Arrays, params: Period) -> Marks:
    """A gap in the indicator is filled with the value that comes after it."""
    level = talib.SMA(bars.close, params.period)
    level[::2] = np.append(level[2:], [level[-1]] * 2)[::2]
    return plain(level, bars.close)


def feature_of_the_future(bars: Arrays, params: Period) -> Marks:
    """Its direction is honest, the reason it gives is not."""
    marks = honest(bars, params)
    return Marks(
        direction=marks.direction, strength=marks.strength, features={"next": np.append(bars.close[1:], bars.close[-1])}
    )


def strength_of_the_future(bars: Arrays, params: Period) -> Marks:
    marks = honest(bars, params)
    return Marks(direction=marks.direction, strength=bars.close.min() / bars.close, features={})


CHEATS = [
    tomorrows_close,
    only_winners,
    normalised_by_the_whole,
    centred_average,
    seen_from_the_last_bar,
    lowest_of_all,
    filled_from_behind,
    feature_of_the_future,
    strength_of_the_future,
]


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_caught_with_its_first_bar_and_both_opinions(cheat: Callable[[Arrays, Any], Marks]) -> None:
    """Whatever it is that uses bars which have not closed yet, it says something else without them."""
    verdict = examined(cheat)
    assert not verdict.is_passed
    trouble = verdict.troubles[0]
    assert trouble.rule is Rule.AHEAD
    assert trouble.index is not None
    assert trouble.cut is not None
    assert 20 <= trouble.index <= trouble.cut < len(BARS)
    assert trouble.expected != trouble.found
    assert told(trouble.expected) in trouble.detail
    assert told(trouble.found) in trouble.detail


def test_the_bar_that_is_named_is_the_first_that_differs_at_its_cut() -> None:
    """Before it, the rule says the same with and without what follows the cut: there is no earlier culprit."""
    [trouble, *_] = examined(tomorrows_close).troubles
    assert (trouble.index, trouble.cut) != (None, None)
    whole, part = (tomorrows_close(BARS.cut(0, end), Period()) for end in (len(BARS), (trouble.cut or 0) + 1))
    same = whole.direction[20 : trouble.index] == part.direction[20 : trouble.index]
    assert same.all()
    assert whole.direction[trouble.index or 0] != part.direction[trouble.index or 0]


# --- too little past


def test_a_lookback_that_is_too_short_is_found_and_not_mistaken_for_the_future() -> None:
    """An exponential average still remembers what lies before the stated lookback."""

    def slowly(bars: Arrays, params: Period) -> Marks:
        return plain(talib.EMA(bars.close, params.period), bars.close)

    [trouble] = examined(slowly, lookback=25).troubles
    assert trouble.rule is Rule.BEHIND
    assert "its lookback of 25 bars" in trouble.detail
    assert examined(slowly, lookback=200).is_passed


def test_a_sum_since_the_first_bar_needs_all_the_past_there_is() -> None:
    """No lookback is long enough for what never forgets."""

    def since_ever(bars: Arrays, _: Period) -> Marks:
        return plain(np.cumsum(bars.close) / np.arange(1, len(bars) + 1), bars.close)

    assert [trouble.rule for trouble in examined(since_ever, lookback=100).troubles] == [Rule.BEHIND]


# --- honest ones


def test_a_strategy_written_in_arrays_alone_passes() -> None:
    """Whoever does not know of now and ago pays with time only."""
    verdict = examined(honest)
    assert verdict.is_passed
    assert verdict.opinions > 10
    assert verdict.decided == len(BARS) - 20
    assert verdict.cuts > 30


def test_a_strategy_with_another_rule_for_the_last_bar_is_caught() -> None:
    """Live and backtest must be the same code: a special case for the last bar is found as a lookback's fault."""

    def two_faced(bars: Arrays, params: Period) -> Marks:
        marks = honest(bars, params)
        if len(bars) == 21:
            return Marks(direction=-marks.direction, strength=marks.strength, features=marks.features)
        return marks

    assert [trouble.rule for trouble in examined(two_faced).troubles] == [Rule.BEHIND]


def test_a_state_that_looks_ahead_is_caught_where_no_opinion_does() -> None:
    """A gate asks for the state alone."""

    def knowing(bars: Arrays, params: Period) -> Marks:
        rises = np.append(bars.close[1:] > bars.close[:-1], False)
        nowhere = np.zeros(len(bars), dtype=bool)
        return Marks(
            direction=nowhere.astype(np.int8),
            strength=np.zeros(len(bars)),
            features={},
            state=rises.astype(np.int8),
        )

    assert examined(knowing, has_state=True).troubles[0].rule is Rule.AHEAD


# --- what is no strategy at all


def broken(**changes: Any) -> Callable[[Arrays, Period], Marks]:
    def mark(bars: Arrays, params: Period) -> Marks:
        marks = honest(bars, params)
        fields = {"direction": marks.direction, "strength": marks.strength, "features": marks.features}
        return Marks(**(fields | {name: change(bars) for name, change in changes.items()}))

    return mark


@pytest.mark.parametrize(
    ("mark", "said_"),
    [
        (
            broken(direction=lambda b: np.ones(len(b) - 1, dtype=np.int8)),
            "direction is ndarray of shape (239,) for 240",
        ),
        (broken(strength=lambda _: 0.5), "strength is float of shape None for 240 bars; give one value a bar"),
        (broken(direction=lambda b: np.full(len(b), 2, dtype=np.int8)), "direction must be -1, 0 or +1"),
        (broken(strength=lambda b: np.full(len(b), 1.5)), "strength is 1.5 at bar number"),
        (broken(strength=lambda b: np.full(len(b), np.nan)), "strength is nan at bar number"),
        (broken(features=lambda b: {"x": np.full(len(b), np.inf)}), "x is inf at bar number"),
        (lambda *_: None, "mark returned NoneType instead of Marks"),
    ],
)
def test_marks_that_cannot_be_are_named(mark: Callable[[Arrays, Any], Marks], said_: str) -> None:
    """The text says which part of what was returned is wrong, and where."""
    [trouble] = examined(mark).troubles
    assert trouble.rule is Rule.FORM
    assert said_ in trouble.detail


def test_a_strategy_that_promises_a_state_must_mark_one() -> None:
    """A gate would ask for it in vain."""
    [trouble] = examined(honest, has_state=True).troubles
    assert "says has_state and marks none" in trouble.detail


def test_chance_is_caught() -> None:
    """The same bars must give the same opinions."""
    rng = np.random.default_rng(1)
    [trouble] = examined(broken(strength=lambda b: rng.random(len(b)))).troubles
    assert trouble.rule is Rule.CHANGES


def test_a_rule_that_writes_into_its_bars_is_caught() -> None:
    """Others see the same arrays."""

    def scribbling(bars: Arrays, params: Period) -> Marks:
        bars.close[0] = 1.0
        return honest(bars, params)

    [trouble] = examined(scribbling).troubles
    assert trouble.rule is Rule.FAILS
    assert "ValueError on all 240 bars: assignment destination is read-only" in trouble.detail
    assert BARS.close.flags.writeable


def test_a_rule_that_fails_on_a_window_says_on_which() -> None:
    """It works on the whole array and not on a lookback's length."""

    def long_only(bars: Arrays, params: Period) -> Marks:
        return plain(np.full(len(bars), bars.close[21]), bars.close)

    [trouble] = examined(long_only).troubles
    assert trouble.rule is Rule.FAILS
    assert "IndexError on the first 21 bars" in trouble.detail


@pytest.mark.parametrize(
    ("fields", "said_"),
    [
        ({"params": Needy}, "the parameter period needs a default: Field required"),
        ({"lookback": 0}, "lookback is 0; it must be a whole number of bars from 1 up"),
        ({"lookback": 2.5}, "lookback is 2.5; it must be a whole number"),
        ({"lookback": 241}, "needs 241 bars, there are 240"),
    ],
)
def test_a_strategy_that_cannot_be_checked_says_why(fields: Any, said_: str) -> None:
    """What is missing is named."""
    [trouble] = examined(honest, **fields).troubles
    assert said_ in trouble.detail


def test_other_parameters_than_the_defaults_can_be_checked() -> None:
    """What passes with one set may fail with another: the lookback must follow the parameters."""
    fixed = strategy(honest)
    assert check(fixed, BARS, Period(period=10)).is_passed
    assert check(fixed, BARS, Period(period=60)).troubles[0].rule is Rule.BEHIND


def test_as_many_bars_as_the_lookback_leave_nothing_to_cut_off() -> None:
    """One decision is compared, and the verdict says how little that is."""
    verdict = check(strategy(honest), BARS.cut(0, 21))
    assert (verdict.is_passed, verdict.cuts, verdict.decided) == (True, 0, 1)


def test_an_opinion_is_told_in_few_words() -> None:
    """What a person compares when two of them differ."""
    opinion = Opinion(direction=Direction.LONG, strength=0.5, features={"fast": 10.123456789})
    assert told(opinion) == "long 0.5 (fast 10.1235)"
    assert told(Opinion(direction=Direction.SHORT, strength=1, features={})) == "short 1"
    assert told(None) == "nothing"


def test_a_rule_said_with_now_and_ago_is_one_rule() -> None:
    """The same lines decide about all bars and about the last alone."""

    def above_its_average(bars: Arrays, params: Period) -> Marks:
        level = talib.SMA(bars.close, params.period)
        now, past = bars.now(bars.close), bars.ago(bars.close)
        return said(
            bars,
            long=(now > bars.now(level)) & (past <= bars.ago(level)),
            short=(now < bars.now(level)) & (past >= bars.ago(level)),
            strength=abs(now / bars.now(level) - 1) * 20,
            features={"level": bars.now(level)},
        )

    verdict = examined(above_its_average)
    assert verdict.is_passed, verdict.troubles
    assert verdict.opinions > 10
