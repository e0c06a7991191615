"""
What a backtest is measured by; the definitions are pinned here and nowhere else. Pure.

Returns are simple, from mark-to-market equity at each exchange close, 0 on flat days, net of fees and slippage; the
first is from the cash. Bars within a day are sampled at the day's last close. A measure that is undefined is None and
says why: never 0, never infinity, never a sentinel. Ratios that speak of a year need 20 returns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from shared.market.models import Interval, instant_of
from signals.logic.arrays import Arrays
from signals.logic.simulation import Simulation, Trades, buy_and_hold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]
    type Ints = NDArray[np.int64]

ENOUGH = 20
"""Returns below which nothing is said of a year: a month of days."""
DAY = 1440
YEAR_DAYS = 365.25


@dataclass(frozen=True, slots=True)
class Value:
    """A measure, or None with the reason; a value may carry a remark as its reason, such as a drawdown still open."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawdown:
    """A fall from a peak: indices into the curve, whose 0 is the start; ``recovered`` None: not by the end."""

    peak: int
    trough: int
    recovered: int | None
    depth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Equity at each exchange close, with the start before it: ``equity[0]`` is the cash, ``minute[0]`` the opening."""

    equity: "Floats"
    minute: "Ints"

    @classmethod
    def of(cls, equity: "Floats", cash: float, bars: Arrays) -> "Curve":
        """
        The curve of a simulation over *bars*.

        Bars within a day count by their day in UTC, to which a close at midnight belongs that ends it: the exchanges
        of New York close and the 24/7 markets turn within one.
        """
        import numpy as np

        day = (bars.closed - 1) // DAY
        last = np.append(np.flatnonzero(day[1:] != day[:-1]), len(day) - 1)
        return cls(equity=np.append(cash, equity[last]), minute=np.append(bars.opened[0], bars.closed[last]))

    @property
    def returns(self) -> "Floats":
        """Simple returns; 0 once nothing is left."""
        import numpy as np

        before = self.equity[:-1]
        return np.divide(self.equity[1:], before, out=np.ones_like(before), where=before > 0) - 1.0

    @property
    def days(self) -> float:
        """Calendar days from the first opening to the last close."""
        return float(self.minute[-1] - self.minute[0]) / DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Every measure of a backtest and of buy-and-hold over the same bars, with what they were computed from."""

    start: datetime
    end: datetime
    bars: int
    periods: int
    periods_per_year: float
    risk_free: float
    minimum_return: float
    values: Mapping[str, Value]
    buy_and_hold: Mapping[str, Value]


def periods_per_year(interval: str, *, is_always_open: bool = False) -> float:
    """Returns in a year: 252, 52 or 12 by interval, 365 where the market never closes; within a day, days count."""
    return {"1w": 52.0, "1mo": 12.0}.get(interval, 365.0 if is_always_open else 252.0)


def measure(
    simulation: Simulation,
    bars: Arrays,
    *,
    interval: Interval = Interval.DAY,
    is_always_open: bool = False,
    risk_free: float = 0.0,
    minimum_return: float = 0.0,
) -> Measured:
    """
    Measure *simulation*, which ran over *bars*, beside buy-and-hold with the same costs.

    ``risk_free`` and ``minimum_return`` (Sortino's) are yearly.
    """
    yearly = periods_per_year(interval, is_always_open=is_always_open)
    free, least = per_period(risk_free, yearly), per_period(minimum_return, yearly)
    held = buy_and_hold(bars, simulation.rules)
    curves = [Curve.of(one.equity, one.rules.cash, bars) for one in (simulation, held)]
    mine, other = (dict(_of_curve(curve, yearly, free, least)) for curve in curves)
    mine["buy_hold_return"] = other["total_return"]
    mine |= _of_both(curves[0].returns, curves[1].returns, yearly, free)
    mine |= _of_costs(simulation, curves[0])
    mine |= of_trades(simulation.trades, bars)
    return Measured(
        start=instant_of(int(curves[0].minute[0])),
        end=instant_of(int(curves[0].minute[-1])),
        bars=len(bars),
        periods=len(curves[0].equity) - 1,
        periods_per_year=yearly,
        risk_free=risk_free,
        minimum_return=minimum_return,
        values=mine,
        buy_and_hold=other,
    )


def per_period(yearly_rate: float, yearly: float) -> float:
    """The rate that compounds to *yearly_rate* in a year."""
    return float((1.0 + yearly_rate) ** (1.0 / yearly) - 1.0)


def sharpe(returns: "Floats", yearly: float, free: float = 0.0) -> Value:
    """Mean excess return over its deviation (ddof 1), times √periods a year. Sharpe, The Sharpe Ratio, 1994."""
    return _ratio(returns - free, yearly)


def sortino(returns: "Floats", yearly: float, least: float = 0.0) -> Value:
    """Mean return above the minimum over the downside deviation of all n. Sortino and Price, 1994."""
    import numpy as np

    if few := _too_few(returns):
        return few
    above = returns - least
    downside = math.sqrt(float(np.mean(np.minimum(above, 0.0) ** 2)))
    if downside == 0:
        return Value(None, "no return was below the minimum")
    return Value(float(above.mean()) / downside * math.sqrt(yearly))


def annual_volatility(returns: "Floats", yearly: float) -> Value:
    """Deviation of returns (ddof 1), times √periods a year."""
    return _too_few(returns) or Value(float(returns.std(ddof=1)) * math.sqrt(yearly))


def annual_return(returns: "Floats", yearly: float) -> Value:
    """The geometric mean return of a period, compounded over a year's periods. CFA Institute, GIPS, 2020."""
    import numpy as np

    if few := _too_few(returns):
        return few
    grown = float(np.prod(1.0 + returns))
    return Value(grown ** (yearly / len(returns)) - 1.0) if grown > 0 else Value(None, "nothing was left")


def cagr(curve: Curve) -> Value:
    """The constant yearly growth from the first to the last value, by calendar time (years of 365.25 days)."""
    if few := _too_few(curve.returns):
        return few
    grown = float(curve.equity[-1] / curve.equity[0])
    return Value(grown ** (YEAR_DAYS / curve.days) - 1.0) if grown > 0 else Value(None, "nothing was left")


def drawdowns(equity: "Floats") -> Sequence[Drawdown]:
    """Every fall below the running peak, the starting capital included. Magdon-Ismail and Atiya, 2004."""
    import numpy as np

    peak = np.maximum.accumulate(equity)
    below = np.append(equity < peak, False)
    edges = np.flatnonzero(below[1:] != below[:-1]) + 1
    found = []
    for first, after in edges.reshape(-1, 2).tolist():
        trough = first + int(np.argmin(equity[first:after]))
        found.append(
            Drawdown(
                peak=first - 1,
                trough=trough,
                recovered=after if after < len(equity) else None,
                depth=float(equity[trough] / peak[trough]) - 1.0,
            )
        )
    return found


def beta(returns: "Floats", benchmark: "Floats", free: float = 0.0) -> Value:
    """Covariance with the benchmark over the benchmark's variance. Sharpe, Capital Asset Prices, 1964."""
    if few := _too_few(returns):
        return few
    if _is_still(benchmark):
        return Value(None, "buy-and-hold did not move")
    mine, other = returns - free, benchmark - free
    away = other - other.mean()
    return Value(float((mine - mine.mean()) @ away) / float(away @ away))


def alpha(returns: "Floats", benchmark: "Floats", yearly: float, free: float = 0.0) -> Value:
    """Mean excess return beyond beta times the benchmark's, times periods a year. Jensen, 1968."""
    slope = beta(returns, benchmark, free)
    if slope.value is None:
        return slope
    return Value((float((returns - free).mean()) - slope.value * float((benchmark - free).mean())) * yearly)


def treynor(returns: "Floats", benchmark: "Floats", yearly: float, free: float = 0.0) -> Value:
    """Mean excess return a year over beta. Treynor, How to Rate Management of Investment Funds, 1965."""
    slope = beta(returns, benchmark, free)
    if slope.value is None:
        return slope
    if abs(slope.value) < 1e-12:
        return Value(None, "beta is 0")
    return Value(float((returns - free).mean()) * yearly / slope.value)


def information_ratio(returns: "Floats", benchmark: "Floats", yearly: float) -> Value:
    """Mean return beyond the benchmark's over its deviation (ddof 1), times √periods. Grinold and Kahn, 1999."""
    return _ratio(returns - benchmark, yearly, "it did exactly what buy-and-hold did")


def tracking_error(returns: "Floats", benchmark: "Floats", yearly: float) -> Value:
    """Deviation (ddof 1) of the return beyond the benchmark's, times √periods a year. Grinold and Kahn, 1999."""
    return annual_volatility(returns - benchmark, yearly)


def var_95(returns: "Floats") -> Value:
    """The return that 5 % of periods fell below (linear quantile of history); a loss is negative. Jorion, 2006."""
    import numpy as np

    return _too_few(returns) or Value(float(np.percentile(returns, 5)))


def probabilistic_sharpe(returns: "Floats", benchmark_sharpe: float = 0.0, free: float = 0.0) -> Value:
    """
    The probability that the true Sharpe ratio is above *benchmark_sharpe*, given length, skewness and fat tails.

    Both are per period, not annualised. Bailey and López de Prado, The Sharpe Ratio Efficient Frontier, 2012.
    """
    if few := _too_few(returns):
        return few
    excess = returns - free
    if _is_still(excess):
        return Value(None, "returns have no variance")
    away = excess - excess.mean()
    spread = float((away**2).mean())
    skewness, kurtosis = float((away**3).mean()) / spread**1.5, float((away**4).mean()) / spread**2
    ratio = float(excess.mean() / excess.std(ddof=1))
    return sharpe_above(ratio, benchmark_sharpe, count=len(returns), skewness=skewness, kurtosis=kurtosis)


def sharpe_above(ratio: float, benchmark: float, *, count: int, skewness: float, kurtosis: float) -> Value:
    """The same from the moments alone; a normal distribution has skewness 0 and kurtosis 3."""
    variance = 1.0 - skewness * ratio + (kurtosis - 1.0) / 4.0 * ratio**2
    if variance <= 0:
        return Value(None, "the estimate has no variance")
    return Value(normal_cdf((ratio - benchmark) * math.sqrt((count - 1) / variance)))


def normal_cdf(x: float) -> float:
    """The standard normal distribution."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def monthly_returns(curve: Curve) -> Sequence[tuple[int, int, float]]:
    """Year, month and return of every calendar month (UTC), oldest first; the first and the last may be parts."""
    import numpy as np

    ends = [instant_of(int(minute)) - timedelta(minutes=1) for minute in curve.minute[1:]]
    month = np.array([end.year * 12 + end.month - 1 for end in ends])
    last = np.append(np.flatnonzero(month[1:] != month[:-1]), len(month) - 1)
    marks = curve.equity[np.append(0, last + 1)]
    return [
        (int(month[at]) // 12, int(month[at]) % 12 + 1, float(after / before) - 1.0 if before > 0 else 0.0)
        for at, before, after in zip(last, marks[:-1], marks[1:], strict=True)
    ]


def of_trades(trades: Trades, bars: Arrays) -> Mapping[str, Value]:
    """
    Measures of closed trades, net of costs; a trade that broke even did not win.

    ``avg_trade`` is the geometric mean of net returns, ``expectancy`` the arithmetic one; ``expectancy_ratio`` is
    win rate times payoff ratio less loss rate (Lean's). ``profit_factor`` is of money, ``payoff_ratio`` of returns.
    ``sqn`` is √n times mean over deviation of net returns (Van Tharp, 1998), ``kelly`` is W - (1 - W) / payoff (1956).
    Excursions: Sweeney, Campaign Trading, 1996.
    """
    closed = ~trades.is_open
    count = int(closed.sum())
    found: dict[str, Value] = {
        "trade_count": Value(float(count)),
        "open_trades": Value(float(trades.is_open.sum())),
    }
    if count == 0:
        none = Value(None, "no trade was closed")
        return found | dict.fromkeys(_OF_CLOSED, none)
    returns, net = trades.net_return[closed], trades.net[closed]
    won, lost = net > 0, net < 0
    rate = float(won.mean())
    payoff = _payoff(returns, won, lost)
    gains, losses = float(net[won].sum()), -float(net[lost].sum())
    mae, mfe = trades.mae[closed], trades.mfe[closed]
    found |= {
        "win_rate": Value(rate),
        "best_trade": Value(float(returns.max())),
        "worst_trade": Value(float(returns.min())),
        "avg_trade": _geometric(returns),
        "avg_trade_duration": Value(float(_held_minutes(trades, bars)[closed].mean()) / DAY),
        "profit_factor": Value(gains / losses) if losses else Value(None, "no losing trade"),
        "expectancy": Value(float(returns.mean())),
        "expectancy_ratio": Value(None, payoff.reason)
        if payoff.value is None
        else Value(rate * payoff.value - float(lost.mean())),
        "payoff_ratio": payoff,
        "sqn": _sqn(returns),
        "kelly": Value(None, payoff.reason) if payoff.value is None else Value(rate - (1.0 - rate) / payoff.value),
        "avg_mae": Value(float(mae.mean())),
        "avg_mfe": Value(float(mfe.mean())),
        "worst_mae": Value(float(mae.min())),
        "best_mfe": Value(float(mfe.max())),
        "longest_winning_streak": Value(float(longest_run(won))),
        "longest_losing_streak": Value(float(longest_run(lost))),
    }
    return found


_OF_CLOSED = (
    "win_rate",
    "best_trade",
    "worst_trade",
    "avg_trade",
    "avg_trade_duration",
    "profit_factor",
    "expectancy",
    "expectancy_ratio",
    "payoff_ratio",
    "sqn",
    "kelly",
    "avg_mae",
    "avg_mfe",
    "worst_mae",
    "best_mfe",
    "longest_winning_streak",
    "longest_losing_streak",
)


def longest_run(claims: "NDArray[np.bool_]") -> int:
    """The most that hold one after another."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate(([False], claims, [False])).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max()) if len(edges) else 0


def _of_curve(curve: Curve, yearly: float, free: float, least: float) -> Mapping[str, Value]:
    returns = curve.returns
    growth = cagr(curve)
    falls = drawdowns(curve.equity)
    deepest = min((fall.depth for fall in falls), default=0.0)
    if growth.value is None or falls:
        calmar = growth if growth.value is None else Value(growth.value / abs(deepest))
    else:
        calmar = Value(None, "there was no drawdown")
    return {
        "duration": Value(curve.days),
        "equity_final": Value(float(curve.equity[-1])),
        "equity_peak": Value(float(curve.equity.max())),
        "total_return": Value(float(curve.equity[-1] / curve.equity[0]) - 1.0),
        "annual_return": annual_return(returns, yearly),
        "annual_volatility": annual_volatility(returns, yearly),
        "cagr": growth,
        "sharpe": sharpe(returns, yearly, free),
        "probabilistic_sharpe": probabilistic_sharpe(returns, 0.0, free),
        "sortino": sortino(returns, yearly, least),
        "calmar": calmar,
        "max_drawdown": Value(deepest),
        **_of_drawdowns(falls, curve),
        "var_95": var_95(returns),
    }


def _of_drawdowns(falls: Sequence[Drawdown], curve: Curve) -> Mapping[str, Value]:
    """``max_drawdown_duration``: the longest, peak to recovery; ``drawdown_recovery_days``: the deepest's way up."""
    if not falls:
        none = Value(None, "there was no drawdown")
        return {"avg_drawdown": none, "max_drawdown_duration": none, "drawdown_recovery_days": none}

    def days(begin: int, end: int | None) -> float:
        return float(curve.minute[-1 if end is None else end] - curve.minute[begin]) / DAY

    longest = max(falls, key=lambda fall: days(fall.peak, fall.recovered))
    deepest = min(falls, key=lambda fall: fall.depth)
    return {
        "avg_drawdown": Value(sum(fall.depth for fall in falls) / len(falls)),
        "max_drawdown_duration": Value(
            days(longest.peak, longest.recovered), "not recovered by the end" if longest.recovered is None else None
        ),
        "drawdown_recovery_days": Value(None, "not recovered by the end")
        if deepest.recovered is None
        else Value(days(deepest.trough, deepest.recovered)),
    }


def _of_both(returns: "Floats", benchmark: "Floats", yearly: float, free: float) -> Mapping[str, Value]:
    return {
        "alpha": alpha(returns, benchmark, yearly, free),
        "beta": beta(returns, benchmark, free),
        "treynor": treynor(returns, benchmark, yearly, free),
        "information_ratio": information_ratio(returns, benchmark, yearly),
        "tracking_error": tracking_error(returns, benchmark, yearly),
    }


def _of_costs(simulation: Simulation, curve: Curve) -> Mapping[str, Value]:
    """``turnover``: the value bought and sold, over mean equity, a year; exposure: of bars, in percent, unrounded."""
    mean = float(curve.equity.mean())
    turnover = simulation.traded / mean / (curve.days / YEAR_DAYS) if mean > 0 else None
    return {
        "exposure_time_pct": Value(100.0 * simulation.exposure),
        "fees_paid": Value(simulation.fees_paid),
        "slippage_paid": Value(simulation.slippage_paid),
        "turnover": Value(turnover, None if turnover is not None else "mean equity is not above 0"),
    }


def _too_few(returns: "Floats") -> Value | None:
    return None if len(returns) >= ENOUGH else Value(None, f"needs {ENOUGH} returns, has {len(returns)}")


def _is_still(values: "Floats") -> bool:
    """Whether what varies is no more than rounding."""
    import numpy as np

    return bool(values.std() <= 1e-13 * np.abs(values).max())


def _ratio(excess: "Floats", yearly: float, still: str = "returns have no variance") -> Value:
    if few := _too_few(excess):
        return few
    if _is_still(excess):
        return Value(None, still)
    return Value(float(excess.mean() / excess.std(ddof=1)) * math.sqrt(yearly))


def _payoff(returns: "Floats", won: "NDArray[np.bool_]", lost: "NDArray[np.bool_]") -> Value:
    if not lost.any():
        return Value(None, "no losing trade")
    if not won.any():
        return Value(None, "no winning trade")
    return Value(float(returns[won].mean()) / -float(returns[lost].mean()))


def _geometric(returns: "Floats") -> Value:
    import numpy as np

    if returns.min() <= -1:
        return Value(None, "a trade lost all that it cost")
    return Value(math.expm1(float(np.log1p(returns).mean())))


def _sqn(returns: "Floats") -> Value:
    if len(returns) < 2 or _is_still(returns):
        return Value(None, "trades have no variance" if len(returns) > 1 else "needs 2 trades, has 1")
    return Value(math.sqrt(len(returns)) * float(returns.mean() / returns.std(ddof=1)))


def _held_minutes(trades: Trades, bars: Arrays) -> "Ints":
    import numpy as np

    begin = np.where(trades.entry_at_close, bars.closed[trades.entry_index], bars.opened[trades.entry_index])
    end = np.where(trades.exit_at_close, bars.closed[trades.exit_index], bars.opened[trades.exit_index])
    return end - begin
