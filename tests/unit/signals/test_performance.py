"""The figures of an entry: everything counted, nothing made up."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.market.models import Interval
from signals.logic.performance import Performance, performance_of
from signals.models import Direction, Entry, Outcome, Record, Resolved, State
from tests.builders import CLOSE

ENTRY = Entry(
    name="e", strategy="sma_cross", version=1, params={}, interval=Interval.DAY, symbols=None, lookback=2, horizon=5
)


def a_line(
    day: int = 0,
    base: float | None = 0.01,
    *,
    way: Direction = Direction.LONG,
    strength: float = 0.5,
    confidence: float | None = None,
    trend: float | None = None,
    days: int = 5,
    state: State = State.SCORED,
) -> Resolved:
    """An opinion of a day, and that the price moved by *base* in its window."""
    forward = (base or 0) * (1 if way is Direction.LONG else -1)
    numbers: dict[str, Any] = {
        "is_hit": forward > 0,
        "forward_return": forward,
        "net_return": forward - 0.002,
        "base_return": base,
        "mfe": max(forward, 0) + 0.01,
        "mae": min(forward, 0) - 0.02,
    }
    closed_at = CLOSE + timedelta(days=day)
    return Resolved(
        closed_at=closed_at,
        closes_at=closed_at + timedelta(days=days),
        direction=way,
        strength=strength,
        confidence=confidence,
        trend=trend,
        outcome=Outcome(state=state, **(numbers if state is State.SCORED else {})),
    )


def measured(lines: Sequence[Resolved], symbol: str = "AAPL", pending: int = 0) -> Performance:
    return performance_of(ENTRY, [a_record(lines, symbol)], {symbol: pending} if pending else {})


def a_record(lines: Sequence[Resolved], symbol: str = "AAPL", number: int = 0) -> Record:
    return Record(entry="e", variant="v", symbol=symbol, interval=Interval.DAY, number=number, lines=lines)


def test_what_was_not_scored_is_counted_beside_and_not_among() -> None:
    """Expired and unscorable opinions do not disappear, and do not count as misses."""
    lines = [a_line(0), a_line(9, state=State.EXPIRED), a_line(18, state=State.UNSCORABLE), a_line(27, -0.01)]
    total = measured(lines, pending=3).total
    assert (total.n, total.pending, total.expired, total.unscorable) == (2, 3, 1, 1)
    assert (total.hit_rate, total.base_rate) == (0.5, 0.5)


def test_an_edge_is_what_is_beyond_a_bet_on_rising_prices() -> None:
    """A long in a rising market has none; a short that falls has twice its return."""
    total = measured([a_line(0, 0.02), a_line(9, -0.01, way=Direction.SHORT)]).total
    assert total.mean_forward_return == pytest.approx(0.015)
    assert total.mean_base_return == pytest.approx(0.005)
    assert total.edge_over_base == pytest.approx(0.01)
    assert total.median_forward_return == pytest.approx(0.015)
    assert total.mean_net_return == pytest.approx(0.013)
    assert (total.hit_rate, total.base_rate) == (1.0, 0.5)


def test_windows_that_overlap_count_once() -> None:
    """Opinions of five days told daily share days: of ten in a row two are independent."""
    assert measured([a_line(day) for day in range(10)]).total.effective_n == 2
    assert measured([a_line(5 * day) for day in range(10)]).total.effective_n == 10
    two = performance_of(ENTRY, [a_record([a_line(0), a_line(1)]), a_record([a_line(0)], "MSFT")], {})
    assert two.total.effective_n == 2, "each series has windows of its own"


def test_ic_is_the_rank_correlation_of_what_was_said_with_what_came() -> None:
    """Signed strengths 0.9, 0.1, -0.2, -0.8 against returns whose ranks are 3, 4, 2, 1: rho = 1 - 6*2/(4*15)."""
    lines = [
        a_line(0, 0.02, strength=0.9),
        a_line(9, 0.05, strength=0.1),
        a_line(18, 0.01, strength=0.2, way=Direction.SHORT),
        a_line(27, -0.03, strength=0.8, way=Direction.SHORT),
    ]
    total = measured(lines).total
    assert total.ic == pytest.approx(0.8)
    assert total.ic_t == pytest.approx(0.8 * (2 / 0.36) ** 0.5)


def test_the_t_of_the_ic_does_not_count_overlapping_windows_twice() -> None:
    """The same opinions, each told twice a day apart, prove no more."""
    once = [a_line(9 * i, base, strength=s) for i, (base, s) in enumerate([(0.01, 0.1), (0.03, 0.4), (0.02, 0.7)])]
    twice = [
        line
        for i, (base, s) in enumerate([(0.01, 0.1), (0.03, 0.4), (0.02, 0.7)])
        for line in (a_line(9 * i, base, strength=s), a_line(9 * i + 1, base, strength=s))
    ]
    assert measured(twice).total.ic_t == pytest.approx(measured(once).total.ic_t)


def test_brier_and_bins_hold_confidence_against_what_came_true() -> None:
    """Opinions without a confidence are left out of both."""
    lines = [
        a_line(0, 0.01, confidence=0.72),
        a_line(9, -0.01, confidence=0.78),
        a_line(18, 0.01, confidence=1.0),
        a_line(27, 0.01),
    ]
    total = measured(lines).total
    assert total.brier == pytest.approx((0.28**2 + 0.78**2 + 0) / 3)
    assert [(b.low, b.high, b.n, b.hit_rate) for b in total.reliability] == [(0.7, 0.8, 2, 0.5), (0.9, 1.0, 1, 1.0)]
    assert total.reliability[0].mean_confidence == pytest.approx(0.75)


def test_regimes_are_terciles_of_each_series_own_trend() -> None:
    """What is a strong trend for one symbol is a weak one for another; opinions without one are kept apart."""
    calm = [a_line(9 * i, 0.01 if i == 5 else -0.01, trend=0.01 * i) for i in range(6)]
    wild = [a_line(9 * i, -0.01, trend=10.0 * i) for i in range(6)]
    found = performance_of(ENTRY, [a_record([*calm, a_line(99)]), a_record(wild, "MSFT")], {})
    assert {name: one.n for name, one in found.by_regime.items()} == {
        "falling": 4,
        "flat": 4,
        "rising": 4,
        "unknown": 1,
    }
    assert found.by_regime["rising"].hit_rate == 0.25
    assert found.by_regime["falling"].hit_rate == 0


def test_symbols_are_told_apart_in_the_order_of_their_records() -> None:
    """A record has several parts, a symbol may have nothing but open signals."""
    parts = [a_record([a_line(9)], number=1), a_record([a_line(0)], number=0), a_record([a_line(0, -0.1)], "MSFT")]
    found = performance_of(ENTRY, parts, {"IBM": 2})
    assert {name: (one.n, one.pending) for name, one in found.by_symbol.items()} == {
        "AAPL": (2, 0),
        "IBM": (0, 2),
        "MSFT": (1, 0),
    }
    assert (found.total.n, found.total.pending) == (3, 2)


@pytest.mark.parametrize(
    ("lines", "undefined"),
    [
        (
            [],
            {"hit_rate": "nothing has been scored yet", "ic": "needs 3 scored", "ic_t": "no ic", "brier": "no scored"},
        ),
        ([a_line(9 * i) for i in range(4)], {"ic": "is the same", "ic_t": "there is no ic", "brier": "no scored"}),
        (
            [a_line(i, 0.01 * i, strength=0.1 * i, confidence=0.5) for i in range(4)],
            {"ic_t": "needs 3 windows that do not overlap, has 1"},
        ),
        (
            [a_line(9 * i, 0.01 * i, strength=0.1 * i, confidence=0.5) for i in range(4)],
            {"ic_t": "the ranks agree perfectly"},
        ),
    ],
)
def test_what_cannot_be_computed_is_null_with_a_reason(lines: Sequence[Resolved], undefined: dict[str, str]) -> None:
    """No sentinel, no infinity."""
    total = measured(lines).total
    assert set(total.undefined) == set(undefined)
    for name, said in undefined.items():
        assert said in total.undefined[name]
        assert getattr(total, name) is None


def test_an_edge_that_is_gone_is_flagged() -> None:
    """Fifty opinions, all wrong, in windows that mostly rose."""
    wrong = [a_line(9 * i, 0.01, way=Direction.SHORT) for i in range(50)]
    assert measured(wrong).total.is_edge_gone
    assert not measured(wrong[:49]).total.is_edge_gone


@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.sampled_from(list(Direction)), st.floats(0, 1)), max_size=30))
def test_regimes_and_symbols_add_up_to_the_total(given_: list[tuple[float, Direction, float]]) -> None:
    """No opinion is counted twice or left out."""
    lines = [a_line(i, base, way=way, trend=trend) for i, (base, way, trend) in enumerate(given_)]
    found = performance_of(ENTRY, [a_record(lines[::2]), a_record(lines[1::2], "MSFT")], {})
    for parts in (found.by_symbol, found.by_regime):
        assert sum(one.n for one in parts.values()) == found.total.n == len(lines)
