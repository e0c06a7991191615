"""Strategies that follow a trend and keep a state, so that they can gate others: up, down or neither."""

import math
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from signals.logic.arrays import TOLERANCE, Arrays
from signals.logic.strategies.marks import OVER, UNDER, Marks, said, settle, silent, spared, turning
from signals.logic.strategies.registered import Params, Strategy

if TYPE_CHECKING:
    from signals.logic.arrays import Claims, Floats


NUDGE = 1e-8
"""What decides between two moves of the same size, as a share of the price: far above rounding, far below a cent."""


FORGOTTEN_MOVES = 1e-7
"""Smoothed moves that are less than this share of the price are all but forgotten: the market stood still."""


class SmaCrossParams(Params):
    """Bars in the fast and in the slow average."""

    fast: int = Field(default=10, ge=1, le=1000)
    slow: int = Field(default=30, ge=2, le=2000)

    @model_validator(mode="after")
    def _ordered(self) -> "SmaCrossParams":
        if self.fast >= self.slow:
            raise ValueError(f"fast ({self.fast}) must be smaller than slow ({self.slow})")
        return self


def mark_sma_cross(bars: Arrays, params: SmaCrossParams) -> Marks:
    """
    Long when the fast simple moving average rises above the slow one, short when it falls below.

    SMA: the mean of the last n closes (TA-Lib SMA; H. M. Gartley, Profits in the Stock Market, 1935). A *fast* of 1
    is the close itself. Strength: the distance of the two, 2 % of the slow = 1. State: above or below.
    """
    import talib

    fast, slow = talib.SMA(bars.close, params.fast), talib.SMA(bars.close, params.slow)
    long, short, state = turning(bars, fast, slow, slow)
    fast, slow = bars.now(fast), bars.now(slow)
    return said(
        bars,
        long=long,
        short=short,
        strength=abs(fast - slow) / slow / 0.02,
        features={"fast": fast, "slow": slow},
        state=state,
    )


class MacdCrossParams(Params):
    """Bars of the fast and the slow exponential average, and of the smoothing of their difference."""

    fast: int = Field(default=12, ge=2, le=199)
    slow: int = Field(default=26, ge=3, le=200)
    signal: int = Field(default=9, ge=1, le=200)

    @model_validator(mode="after")
    def _ordered(self) -> "MacdCrossParams":
        if self.fast >= self.slow:
            raise ValueError(f"fast ({self.fast}) must be smaller than slow ({self.slow})")
        return self


def lookback_macd(params: MacdCrossParams) -> int:
    """An exponential average keeps (n-1)/(n+1) of the past a bar; here one smooths another."""
    n = max(params.slow, params.signal)
    return settle((n - 1) / (n + 1), times=2) + params.slow + params.signal + 2


def mark_macd_cross(bars: Arrays, params: MacdCrossParams) -> Marks:
    """
    Long when the MACD rises above its signal line, short when it falls below.

    MACD: the fast exponential average of the closes less the slow one; its signal line is its own exponential average
    (Gerald Appel, Technical Analysis: Power Tools for Active Investors, 2005; TA-Lib MACD). Strength: the distance of
    the two, 0.2 % of the close = 1. State: above or below the signal line.
    """
    import talib

    macd, line, _ = talib.MACD(bars.close, params.fast, params.slow, params.signal)
    long, short, state = turning(bars, macd, line, bars.close)
    macd, line = bars.now(macd), bars.now(line)
    return said(
        bars,
        long=long,
        short=short,
        strength=abs(macd - line) / bars.now(bars.close) / 0.002,
        features={"macd": macd, "signal": line},
        state=state,
    )


class AdxTrendParams(Params):
    """Bars of Wilder's smoothing, and the ADX from which a market has a trend."""

    period: int = Field(default=14, ge=2, le=100)
    level: float = Field(default=25, gt=0, lt=100)


def lookback_adx(params: AdxTrendParams) -> int:
    """Wilder's smoothing keeps (n-1)/n of the past a bar; here one smooths another."""
    return settle((params.period - 1) / params.period, times=2) + 2 * params.period + 2


def mark_adx_trend(bars: Arrays, params: AdxTrendParams) -> Marks:
    """
    Long when an upward trend begins, short when a downward one does: the ADX is at its level, and one DI leads.

    +DI, -DI and ADX: J. Welles Wilder, New Concepts in Technical Trading Systems, 1978 (TA-Lib). All are ratios, which
    stay as they are while nothing moves; so where the market stood still for so long within the lookback that its moves
    were forgotten, there is no trend to speak of. Where high and low part by the same, which is common in whole cents
    and would be left to rounding, the bar counts for the side it closes on, if for none as falling: a nudge of 1e-8 of
    the price decides. Strength: an ADX of 50 = 1. State: the ADX is at its level and +DI or -DI leads.
    """
    import talib

    period, close = params.period, bars.close
    nudge = NUDGE * close
    high, low = bars.high, bars.low * (1 + NUDGE / 100) + nudge
    adx = talib.ADX(high, low, close, period)
    if spared(bars, bars.now(adx) >= params.level * UNDER):
        return silent()
    rises, falls = talib.PLUS_DM(high, low, period), talib.MINUS_DM(high, low, period)
    up, down = _leading(bars.now(adx), bars.now(rises), bars.now(falls), params.level)
    if spared(bars, up, down):
        return silent()
    was_up, was_down = _leading(bars.ago(adx), bars.ago(rises), bars.ago(falls), params.level)
    least = talib.MIN(rises + falls, _remembered(params))
    is_known = bars.now(least) > FORGOTTEN_MOVES * bars.now(close)
    was_known = bars.ago(least) > FORGOTTEN_MOVES * bars.ago(close)
    long, short = up & ~was_up & is_known & was_known, down & ~was_down & is_known & was_known
    state = up & is_known, down & is_known
    if spared(bars, long, short):
        return silent(state)
    adx = bars.now(adx)
    reach = period * bars.now(talib.ATR(high, low, close, period))
    return said(
        bars,
        long=long,
        short=short,
        strength=adx / 50,
        features={
            "adx": adx,
            "plus_di": 100 * bars.ratio(bars.now(rises), reach),
            "minus_di": 100 * bars.ratio(bars.now(falls), reach),
        },
        state=state,
    )


def _remembered(params: AdxTrendParams) -> int:
    """For how many bars the smoothed moves must not have been forgotten: the lookback, but for their own start."""
    start = math.log(FORGOTTEN_MOVES) / math.log((params.period - 1) / params.period)
    return lookback_adx(params) - math.ceil(start)


def _leading(adx: "Floats", rises: "Floats", falls: "Floats", level: float) -> "tuple[Claims, Claims]":
    """Whether there is a trend, up or down: both DI are divided by the same range, so their moves say which leads."""
    has_trend = adx >= level * UNDER
    return has_trend & (rises > falls * OVER), has_trend & (falls > rises * OVER)


class MomentumParams(Params):
    """Bars over which the market's own return is taken, and the return from which it counts."""

    period: int = Field(default=252, ge=1, le=2000)
    least: float = Field(default=0, ge=0, le=10)


def mark_momentum(bars: Arrays, params: MomentumParams) -> Marks:
    """
    Long when the return of the last n bars rises above *least*, short when it falls below its negative.

    Time-series momentum: T. Moskowitz, Y. H. Ooi and L. H. Pedersen, Time Series Momentum, Journal of Financial
    Economics 104 (2012); their n is a year (TA-Lib ROCP). Strength: a return of 20 % = 1. State: above or below.
    """
    import talib

    change = talib.ROCP(bars.close, params.period)
    now, past = bars.now(change), bars.ago(change)
    most = params.least + TOLERANCE
    up, down = now > most, now < -most
    return said(
        bars,
        long=up & (past <= most),
        short=down & (past >= -most),
        strength=abs(now) / 0.2,
        features={"return": now},
        state=(up, down),
    )


TREND = (
    Strategy(
        name="sma_cross",
        version=1,
        title="the fast moving average crosses the slow one",
        params=SmaCrossParams,
        lookback=lambda p: p.slow + 1,
        mark=mark_sma_cross,
        horizon=10,
        has_state=True,
    ),
    Strategy(
        name="macd_cross",
        version=1,
        title="the MACD crosses its signal line",
        params=MacdCrossParams,
        lookback=lookback_macd,
        mark=mark_macd_cross,
        horizon=10,
        has_state=True,
    ),
    Strategy(
        name="adx_trend",
        version=1,
        title="the ADX says that a trend begins, and the leading DI says which way",
        params=AdxTrendParams,
        lookback=lookback_adx,
        mark=mark_adx_trend,
        horizon=10,
        has_state=True,
    ),
    Strategy(
        name="momentum",
        version=1,
        title="the return of the last bars changes its sign",
        params=MomentumParams,
        lookback=lambda p: p.period + 2,
        mark=mark_momentum,
        horizon=21,
        has_state=True,
    ),
)
