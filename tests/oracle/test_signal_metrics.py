"""Our metrics against empyrical-reloaded, wherever the pinned definitions agree with its."""

import math

import numpy as np
import pytest

from signals.logic import metrics
from signals.logic.arrays import Arrays
from signals.logic.metrics import Curve
from signals.logic.simulation import Rules, Simulation, simulate

YEARLY = 252.0


@pytest.fixture(scope="module")
def theirs():
    """empyrical, loaded late: pandas takes its time."""
    import empyrical

    return empyrical


def market(count: int, volatility: float, market_seed: int) -> Arrays:
    rng = np.random.default_rng(market_seed)
    close = 50 * np.exp(np.cumsum(volatility * rng.standard_normal(count)))
    open_ = close * np.exp(volatility / 3 * rng.standard_normal(count))
    minutes = np.arange(count, dtype=np.int64) * 1440
    return Arrays(
        open=open_,
        high=np.maximum(open_, close) * 1.01,
        low=np.minimum(open_, close) * 0.99,
        close=close,
        volume=np.full(count, 1e6),
        opened=minutes + 870,
        closed=minutes + 1260,
    )


def backtest(bars: Arrays, market_seed: int) -> Simulation:
    direction = np.random.default_rng(market_seed).choice([-1, 0, 0, 0, 0, 1], len(bars)).astype(np.int8)
    return simulate(bars, direction, Rules(fee=0.002, slippage=0.001, side="both" if market_seed % 2 else "long"))


CASES = [(500, 0.01, 1), (21, 0.02, 2), (3000, 0.03, 3), (252, 0.002, 4), (600, 0.05, 6)]


@pytest.mark.parametrize(("count", "volatility", "market_seed"), CASES)
@pytest.mark.parametrize("free", [0.0, 0.0002])
def test_ratios_of_returns_are_those_of_empyrical(theirs, count: int, volatility: float, market_seed: int, free: float):
    """Sharpe, Sortino, volatility, geometric return, drawdown, beta, alpha and value at risk agree to 1e-9."""
    bars = market(count, volatility, market_seed)
    curve = Curve.of(backtest(bars, market_seed).equity, 100_000, bars)
    returns, other = curve.returns, np.append(0.0, np.diff(bars.close) / bars.close[:-1])
    slope = theirs.beta_aligned(returns, other, risk_free=free)

    found = {
        "sharpe": metrics.sharpe(returns, YEARLY, free),
        "sortino": metrics.sortino(returns, YEARLY, free),
        "volatility": metrics.annual_volatility(returns, YEARLY),
        "annual_return": metrics.annual_return(returns, YEARLY),
        "beta": metrics.beta(returns, other, free),
        "var_95": metrics.var_95(returns),
        "information_ratio": metrics.information_ratio(returns, other, YEARLY),
        "tracking_error": metrics.tracking_error(returns, other, YEARLY),
    }
    compounded = theirs.alpha_aligned(returns, other, risk_free=free, _beta=slope)
    expected = {
        "sharpe": theirs.sharpe_ratio(returns, risk_free=free),
        "sortino": theirs.sortino_ratio(returns, required_return=free),
        "volatility": theirs.annual_volatility(returns),
        "annual_return": theirs.annual_return(returns),
        "beta": slope,
        "var_95": theirs.value_at_risk(returns),
        "information_ratio": theirs.excess_sharpe(returns, other) * math.sqrt(YEARLY),
        "tracking_error": theirs.annual_volatility(returns - other),
    }

    assert {name: value.value for name, value in found.items()} == pytest.approx(expected, rel=1e-9)
    ours = metrics.alpha(returns, other, YEARLY, free).value
    assert (1 + ours / YEARLY) ** YEARLY - 1 == pytest.approx(compounded, rel=1e-9)


@pytest.mark.parametrize(("count", "volatility", "market_seed"), CASES)
def test_drawdown_and_total_return_are_those_of_empyrical(theirs, count: int, volatility: float, market_seed: int):
    """What a whole measurement says of the curve is what empyrical says of its returns."""
    bars = market(count, volatility, market_seed)
    done = backtest(bars, market_seed)

    values = metrics.measure(done, bars).values

    assert values["max_drawdown"].value == pytest.approx(theirs.max_drawdown(done.returns), rel=1e-9)
    assert values["total_return"].value == pytest.approx(theirs.cum_returns_final(done.returns), rel=1e-9)
    assert values["sharpe"].value == pytest.approx(theirs.sharpe_ratio(done.returns), rel=1e-9)
    assert values["sortino"].value == pytest.approx(theirs.sortino_ratio(done.returns), rel=1e-9)
    calmar = values["cagr"].value / -theirs.max_drawdown(done.returns)
    assert values["calmar"].value == pytest.approx(calmar, rel=1e-9)


@pytest.mark.parametrize(("count", "volatility", "market_seed"), CASES)
def test_months_compound_as_those_of_empyrical(theirs, count: int, volatility: float, market_seed: int):
    """The table of months holds what empyrical aggregates by calendar month."""
    import pandas as pd

    bars = market(count, volatility, market_seed)
    curve = Curve.of(backtest(bars, market_seed).equity, 100_000, bars)
    series = pd.Series(curve.returns, index=pd.to_datetime(bars.closed, unit="m", utc=True))

    expected = theirs.aggregate_returns(series, "monthly")

    ours = metrics.monthly_returns(curve)
    assert [(year, month) for year, month, _ in ours] == list(expected.index)
    np.testing.assert_allclose([value for _, _, value in ours], expected.to_numpy(), rtol=1e-9, atol=1e-12)
