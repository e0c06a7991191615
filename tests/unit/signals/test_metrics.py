"""The metrics: pinned definitions by hand, what is undefined and why, days, months and falls."""

import math
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.market.models import Interval, minute_of
from signals.logic import metrics
from signals.logic.arrays import Arrays
from signals.logic.metrics import Curve, Measured, Value
from signals.logic.simulation import Rules, simulate

FREE: dict[str, Any] = {"cash": 1000.0, "fee": 0.0, "slippage": 0.0}
BEGIN = minute_of(datetime(2012, 1, 2, tzinfo=UTC))
DAY = 1440


def daily(close, open=None) -> Arrays:
    """Daily bars from 2012-01-02 on, weekends included; opens are the closes before."""
    close = np.asarray(close, dtype=float)
    open = np.append(close[:1], close[:-1]) if open is None else np.asarray(open, dtype=float)  # noqa: A001
    midnight = BEGIN + DAY * np.arange(len(close), dtype=np.int64)
    columns = {
        "open": open,
        "high": np.maximum(open, close),
        "low": np.minimum(open, close),
        "close": close,
        "volume": np.full(len(close), 1e5),
        "opened": midnight + 870,
        "closed": midnight + 1260,
    }
    return Arrays(**{field.name: columns[field.name] for field in fields(Arrays)})


def marked(count: int, **at: int) -> np.ndarray:
    """Marks by bar: ``marked(5, b1=1, b3=-1)``."""
    direction = np.zeros(count, dtype=np.int8)
    for name, mark in at.items():
        direction[int(name[1:])] = mark
    return direction


def measured(close, direction, **rules: Any) -> Measured:
    bars = daily(close)
    return metrics.measure(simulate(bars, direction, Rules(**(FREE | rules))), bars)


def curve_of(*equity: float) -> Curve:
    minute = BEGIN + 1260 + DAY * np.arange(len(equity), dtype=np.int64)
    return Curve(equity=np.array(equity), minute=minute)


RISING = 10 * np.exp(0.001 * np.arange(40) + 0.02 * np.sin(np.arange(40)))


def test_every_pinned_name_is_measured() -> None:
    """The names that the field expects are all there, with a number or a reason."""
    values = measured(RISING, marked(40, b3=1, b20=-1)).values

    names = """exposure_time_pct equity_final equity_peak total_return buy_hold_return annual_return annual_volatility
        cagr sharpe sortino calmar alpha beta information_ratio max_drawdown avg_drawdown max_drawdown_duration
        drawdown_recovery_days trade_count win_rate best_trade worst_trade avg_trade avg_trade_duration profit_factor
        expectancy payoff_ratio sqn kelly turnover fees_paid slippage_paid var_95 duration probabilistic_sharpe treynor
        tracking_error expectancy_ratio avg_mae avg_mfe longest_winning_streak longest_losing_streak open_trades"""
    assert set(names.split()) <= values.keys()
    assert all(value.value is not None or value.reason for value in values.values())


@pytest.mark.parametrize("direction", [marked(40), marked(40, b3=1), marked(40, b2=-1, b3=1, b4=-1, b5=1)])
@pytest.mark.parametrize("close", [RISING, np.full(40, 10.0), RISING[:3], np.linspace(10, 500, 40)])
def test_no_measure_is_ever_infinite_or_no_number(close: np.ndarray, direction: np.ndarray) -> None:
    """Undefined is None with a reason, on still markets, short runs, without trades and after ruin alike."""
    found = measured(close, direction[: len(close)])

    for value in (*found.values.values(), *found.buy_and_hold.values()):
        assert value.reason if value.value is None else math.isfinite(value.value)


def test_nothing_is_said_of_a_year_after_a_few_days() -> None:
    """Nineteen returns are no sample: ratios are None and say how many there are."""
    values = measured(RISING[:19], marked(19, b3=1)).values

    for name in ("sharpe", "sortino", "cagr", "annual_return", "annual_volatility", "beta", "var_95", "calmar"):
        assert values[name] == Value(None, "needs 20 returns, has 19")
    assert values["total_return"].value is not None


def test_without_a_trade_ratios_have_a_reason() -> None:
    """Cash has no variance, no drawdown and no trade; none of them is 0 or infinity."""
    values = measured(RISING, marked(40)).values

    assert values["sharpe"] == Value(None, "returns have no variance")
    assert values["sortino"] == Value(None, "no return was below the minimum")
    assert values["calmar"] == Value(None, "there was no drawdown")
    assert values["win_rate"] == Value(None, "no trade was closed")
    assert (values["max_drawdown"].value, values["exposure_time_pct"].value) == (0.0, 0.0)


def test_a_sharpe_ratio_is_of_all_days() -> None:
    """Days out of the market count as 0: mean over deviation with ddof 1, times the root of 252."""
    returns = np.array([0.01, -0.005, 0.0, 0.0] * 10)

    expected = returns.mean() / math.sqrt(((returns - returns.mean()) ** 2).sum() / 39) * math.sqrt(252)
    assert metrics.sharpe(returns, 252).value == pytest.approx(expected)
    assert metrics.sharpe(returns, 252, 0.001).value == pytest.approx(
        expected - 0.001 / returns.std(ddof=1) * math.sqrt(252)
    )


def test_a_sortino_ratio_divides_by_all_days() -> None:
    """The downside deviation is over all n, not over the losing days alone."""
    returns = np.array([0.01, -0.01] * 10)

    assert metrics.sortino(returns + 0.001, 252).value == pytest.approx(0.001 / (0.009 / math.sqrt(2)) * math.sqrt(252))


@pytest.mark.parametrize(
    ("interval", "always", "expected"),
    [
        ("1d", False, 252),
        ("1w", False, 52),
        ("1mo", False, 12),
        ("1d", True, 365),
        ("1h", False, 252),
        ("1m", True, 365),
    ],
)
def test_periods_a_year_follow_the_interval(interval: str, always: bool, expected: float) -> None:
    """252 sessions, 52 weeks, 12 months; 365 days where the market never closes; within a day, days count."""
    assert metrics.periods_per_year(interval, is_always_open=always) == expected


def test_growth_is_by_calendar_time() -> None:
    """A quarter more in 365.25 days is 25 % a year, however many bars there were."""
    minute = np.linspace(BEGIN, BEGIN + 365.25 * DAY, 31).astype(np.int64)
    equity = np.append(100.0, np.linspace(101, 125, 30))

    assert metrics.cagr(Curve(equity=equity, minute=minute)).value == pytest.approx(0.25, rel=1e-6)


def test_the_first_drawdown_may_begin_at_the_starting_capital() -> None:
    """A strategy that only loses has fallen from the cash it was given."""
    [fall] = metrics.drawdowns(np.array([100.0, 90.0, 80.0, 85.0]))

    assert (fall.peak, fall.trough, fall.recovered) == (0, 2, None)
    assert fall.depth == pytest.approx(-0.2)


def test_falls_are_told_apart() -> None:
    """Depths, their mean, the longest from peak to recovery and the deepest's way up, in calendar days."""
    bars = daily(np.append([100, 100, 90, 95, 100, 110, 55, 110, 120], np.full(20, 120)))
    done = simulate(bars, marked(29, b0=1), Rules(**FREE))

    values = metrics.measure(done, bars).values

    assert values["max_drawdown"].value == pytest.approx(-0.5)
    assert values["avg_drawdown"].value == pytest.approx(-0.3)
    assert values["max_drawdown_duration"] == Value(3.0)
    assert values["drawdown_recovery_days"] == Value(1.0)


def test_a_fall_that_was_not_recovered_says_so() -> None:
    """Its duration is up to the end and marked as open; there is no recovery to time."""
    values = measured(np.append([100, 110, 120], np.full(27, 60)), marked(30, b0=1)).values

    assert values["max_drawdown_duration"] == Value(27.0, "not recovered by the end")
    assert values["drawdown_recovery_days"] == Value(None, "not recovered by the end")


@given(equity=st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40))
def test_falls_cover_every_moment_below_the_peak(equity: list[float]) -> None:
    """Each point below the running peak lies in exactly one fall, and the deepest is the maximum drawdown."""
    curve = np.array(equity)
    peak = np.maximum.accumulate(curve)

    falls = metrics.drawdowns(curve)

    inside = [at for fall in falls for at in range(fall.peak + 1, fall.recovered or len(curve))]
    assert inside == np.flatnonzero(curve < peak).tolist()
    assert min((fall.depth for fall in falls), default=0.0) == pytest.approx((curve / peak - 1).min())


def test_hours_are_measured_by_the_days_last_close() -> None:
    """Three bars a day give one return a day; a close at midnight ends the day before."""
    closed = BEGIN + np.array([900, 1200, 1440, 1440 + 900, 1440 + 1200, 2 * 1440], dtype=np.int64)
    close = np.array([10.0, 11, 12, 9, 8, 6])
    bars = Arrays(
        open=close, high=close, low=close, close=close, volume=np.full(6, 5.0), opened=closed - 60, closed=closed
    )
    done = simulate(bars, np.array([1, 0, 0, 0, 0, 0], dtype=np.int8), Rules(fill="close", **FREE))

    found = metrics.measure(done, bars, interval=Interval.HOUR)

    assert (found.bars, found.periods, found.periods_per_year) == (6, 2, 252)
    assert Curve.of(done.equity, 1000.0, bars).equity.tolist() == pytest.approx([1000.0, 1200.0, 600.0])
    assert found.values["max_drawdown"].value == pytest.approx(-0.5)
    assert (found.start, found.end) == (datetime(2012, 1, 2, 14, tzinfo=UTC), datetime(2012, 1, 4, tzinfo=UTC))


def test_trades_are_measured_net_and_closed() -> None:
    """Won 10 %, lost 5 %, broke even, and one that is still open: by hand."""
    close = [100, 100, 110, 110, 110, 104.5, 104.5, 104.5, 104.5, 104.5, 104.5, 200]
    direction = marked(12, b0=1, b2=-1, b3=1, b5=-1, b6=1, b8=-1, b9=1)

    values = {name: one.value for name, one in measured(close, direction, side="long").values.items()}

    expected = {
        "trade_count": 3.0,
        "open_trades": 1.0,
        "win_rate": 1 / 3,
        "best_trade": 0.1,
        "worst_trade": -0.05,
        "expectancy": 0.05 / 3,
        "avg_trade": (1.1 * 0.95) ** (1 / 3) - 1,
        "profit_factor": 100 / 55,
        "payoff_ratio": 2.0,
        "expectancy_ratio": 2 / 3 - 1 / 3,
        "kelly": 1 / 3 - 2 / 3 / 2,
        "avg_trade_duration": 2.0,
        "sqn": math.sqrt(3) * (0.05 / 3) / np.std([0.1, -0.05, 0.0], ddof=1),
        "avg_mfe": 0.1 / 3,
        "worst_mae": -0.05,
        "longest_winning_streak": 1.0,
        "longest_losing_streak": 1.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_a_break_even_trade_did_not_win() -> None:
    """No gain, no win: and no loss either."""
    values = measured([100] * 6, marked(6, b0=1, b2=-1), side="long").values

    assert values["win_rate"].value == 0.0
    assert values["profit_factor"] == Value(None, "no losing trade")
    assert values["payoff_ratio"] == Value(None, "no losing trade")


def test_turnover_and_costs_are_stated() -> None:
    """Bought and sold once in 365.25 days at a standing price is twice the equity a year; fees are the sum."""
    bars = daily([100.0] * 366)
    done = simulate(bars, marked(366, b0=1, b300=-1), Rules(side="long", cash=1000.0, fee=0.001, slippage=0.0))

    values = metrics.measure(done, bars).values

    assert values["turnover"].value == pytest.approx(2.0, rel=0.01)
    assert values["fees_paid"].value == pytest.approx(2 * 0.001 * 1000 / 1.001)
    assert values["exposure_time_pct"].value == pytest.approx(100 * 300 / 366)


def test_buy_and_hold_stands_beside_itself() -> None:
    """A strategy that buys on the first bar and holds has beta 1, alpha 0 and no tracking error."""
    found = measured(RISING, marked(40, b0=1), fee=0.001)

    assert found.values["beta"].value == pytest.approx(1.0)
    assert found.values["alpha"].value == pytest.approx(0.0, abs=1e-12)
    assert found.values["tracking_error"].value == 0.0
    assert found.values["information_ratio"] == Value(None, "it did exactly what buy-and-hold did")
    assert found.values["buy_hold_return"] == found.values["total_return"]
    assert found.buy_and_hold["sharpe"] == found.values["sharpe"]


def test_the_probability_of_a_sharpe_ratio_is_that_of_its_paper() -> None:
    """Bailey and López de Prado, 2014: 2.5 a year over 1,250 days, skewness -3, kurtosis 10, against 0.1132 a day."""
    found = metrics.sharpe_above(2.5 / math.sqrt(250), 0.1132, count=1250, skewness=-3, kurtosis=10)

    assert found.value == pytest.approx(0.9004, abs=5e-4)


def test_the_probability_grows_with_the_sample() -> None:
    """The same returns seen four times as long are surer."""
    returns = 0.01 * np.sin(np.arange(63)) + 0.001

    once, long = (metrics.probabilistic_sharpe(np.tile(returns, n)).value for n in (1, 4))

    assert 0.5 < once < long < 1


def test_after_ruin_growth_is_undefined() -> None:
    """Nothing compounds from nothing; the loss itself is stated in full."""
    values = measured(np.append([10, 10, 25], np.full(30, 25)), marked(33, b0=-1)).values

    assert values["cagr"] == values["annual_return"] == Value(None, "nothing was left")
    assert values["total_return"].value == pytest.approx(-1.5)


def test_months_compound_to_the_whole() -> None:
    """Each calendar month has its return, the first from the cash."""
    equity = np.append(100.0, 100 * np.exp(np.cumsum(0.01 * np.sin(np.arange(100)))))
    minute = np.append(BEGIN + 870, BEGIN + 1260 + DAY * np.arange(100))

    months = metrics.monthly_returns(Curve(equity=equity, minute=minute))

    assert [(year, month) for year, month, _ in months] == [(2012, 1), (2012, 2), (2012, 3), (2012, 4)]
    assert math.prod(1 + value for _, _, value in months) == pytest.approx(equity[-1] / 100)
    assert months[0][2] == pytest.approx(equity[30] / 100 - 1)
