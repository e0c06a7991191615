"""Strategies that follow a market out of its range, and one that awaits it back."""

import math
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from signals.logic.arrays import TOLERANCE, Arrays, LastBar
from signals.logic.strategies.marks import OVER, UNDER, Marks, said, settle, silent, spared
from signals.logic.strategies.registered import Params, Strategy

if TYPE_CHECKING:
    from signals.logic.arrays import Floats

AT_ONCE = 1 << 18
"""Numbers in the largest block of windows that is computed at once."""


class RsiReversalParams(Params):
    """Bars of smoothing, and the levels below which and above which a market counts as stretched."""

    period: int = Field(default=14, ge=2, le=200)
    low: float = Field(default=30, gt=0, lt=100)
    high: float = Field(default=70, gt=0, lt=100)

    @model_validator(mode="after")
    def _ordered(self) -> "RsiReversalParams":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be smaller than high ({self.high})")
        return self


def lookback_wilder(period: int) -> int:
    """Wilder's smoothing keeps (n-1)/n of the past a bar: as many bars as it takes to forget, plus its start."""
    return settle((period - 1) / period) + period + 2


def mark_rsi_reversal(bars: Arrays, params: RsiReversalParams) -> Marks:
    """
    Long when the RSI comes back up through the low level, short when it comes back down through the high one.

    RSI: J. Welles Wilder, New Concepts in Technical Trading Systems, 1978 (TA-Lib RSI). Where the market stood
    still for n bars there was no RSI to come back from. Strength: how far beyond the level the bar before was,
    10 points = 1.
    """
    import talib

    low, high = params.low, params.high
    rsi = talib.RSI(bars.close, params.period)
    now, past = bars.now(rsi), bars.ago(rsi)
    long, short = (past < low * UNDER) & (now >= low * UNDER), (past > high * OVER) & (now <= high * OVER)
    if spared(bars, long, short):
        return silent()
    close = bars.recent(bars.close, params.period + 2)
    highest, lowest = talib.MAX(close, params.period + 1), talib.MIN(close, params.period + 1)
    moved = bars.ago(highest) > bars.ago(lowest) * OVER
    return said(
        bars,
        long=moved & long,
        short=moved & short,
        strength=(abs(past - (low + high) / 2) - (high - low) / 2) / 10,
        features={"rsi": now, "rsi_before": past},
    )


class BollingerBreakoutParams(Params):
    """Bars in the bands, their width in standard deviations, and how many times the usual volume it takes."""

    period: int = Field(default=20, ge=2, le=1000)
    width: float = Field(default=2.0, gt=0, le=10)
    volume_factor: float = Field(default=1.5, ge=0, le=100)


def mark_bollinger_breakout(bars: Arrays, params: BollingerBreakoutParams) -> Marks:
    """
    Long when the close leaves the upper Bollinger band on high volume, short when it leaves the lower one.

    Bands: the mean of the last n closes, plus and minus *width* population standard deviations (as TA-Lib BBANDS;
    John Bollinger, Bollinger on Bollinger Bands, 2001). Volume: at least *volume_factor* times the mean of the
    n bars before; where nothing was traded in them, no volume is high. Strength: the volume against twice that.
    """
    import talib

    usual = bars.ago(talib.SMA(bars.volume, params.period))
    times = bars.ratio(bars.now(bars.volume), usual)
    is_high = times >= params.volume_factor * UNDER
    if spared(bars, is_high):
        return silent()
    middle = talib.SMA(bars.close, params.period)
    deviation, past_deviation = _deviations(bars, middle, params.period)
    now, past = bars.now(middle), bars.ago(middle)
    upper, lower = now + params.width * deviation, now - params.width * deviation
    past_upper, past_lower = past + params.width * past_deviation, past - params.width * past_deviation
    close, past_close = bars.now(bars.close), bars.ago(bars.close)
    return said(
        bars,
        long=is_high & (close > upper * OVER) & (past_close <= past_upper * OVER),
        short=is_high & (close < lower * UNDER) & (past_close >= past_lower * UNDER),
        strength=times / max(2 * params.volume_factor, TOLERANCE),
        features={"upper": upper, "lower": lower, "volume_times_usual": times},
    )


def _deviations(bars: Arrays, mean: "Floats", period: int) -> "tuple[Floats, Floats]":
    """
    The population standard deviation of the last *period* closes around their *mean*: each bar's, and the bar before's.

    Each window is summed afresh: TA-Lib's running sums of squares keep the rounding errors of prices long gone,
    which are large when a market has fallen far.
    """
    import numpy as np

    close = bars.close
    if isinstance(bars, LastBar):
        gaps, past_gaps = close[-period:] - mean[-1], close[-1 - period : -1] - mean[-2]
        root, past_root = math.sqrt(gaps.dot(gaps) / period), math.sqrt(past_gaps.dot(past_gaps) / period)
        return root, past_root  # type: ignore[return-value] # numbers, as LastBar has them
    from numpy.lib.stride_tricks import sliding_window_view

    deviation = np.full_like(close, np.nan)
    if len(close) >= period:
        windows, means = sliding_window_view(close, period), mean[period - 1 :, np.newaxis]
        block = max(AT_ONCE // period, 1)
        for start in range(0, len(windows), block):
            gaps = windows[start : start + block] - means[start : start + block]
            first = start + period - 1
            deviation[first : first + len(gaps)] = np.sqrt(np.einsum("ij,ij->i", gaps, gaps) / period)
    return deviation, bars.ago(deviation)


class DonchianBreakoutParams(Params):
    """Bars in the channel."""

    period: int = Field(default=20, ge=2, le=2000)


def mark_donchian_breakout(bars: Arrays, params: DonchianBreakoutParams) -> Marks:
    """
    Long when the close rises above the highest high of the n bars before, short when it falls below their lowest low.

    Richard Donchian's rule of four weeks, High Finance in Copper, Financial Analysts Journal 16 (1960); TA-Lib MAX
    and MIN. Strength: how far beyond the channel the close is, 2 % of it = 1.
    """
    import talib

    highest, lowest = talib.MAX(bars.high, params.period), talib.MIN(bars.low, params.period)
    upper, lower = bars.ago(highest), bars.ago(lowest)
    close, past = bars.now(bars.close), bars.ago(bars.close)
    above, below = close > upper * OVER, close < lower * UNDER
    if spared(bars, above, below):
        return silent()
    return said(
        bars,
        long=above & (past <= bars.ago(highest, 2) * OVER),
        short=below & (past >= bars.ago(lowest, 2) * UNDER),
        strength=(abs(close - (upper + lower) / 2) - (upper - lower) / 2) / close / 0.02,
        features={"upper": upper, "lower": lower},
    )


class AtrBurstParams(Params):
    """Bars of Wilder's smoothing, and how many average true ranges make a burst."""

    period: int = Field(default=14, ge=2, le=200)
    factor: float = Field(default=2.0, gt=0, le=100)


def mark_atr_burst(bars: Arrays, params: AtrBurstParams) -> Marks:
    """
    Long when the close is *factor* average true ranges above the close before, short when it is as far below.

    ATR: J. Welles Wilder, New Concepts in Technical Trading Systems, 1978, whose volatility system leaves the market
    that moves so far against it (TA-Lib ATR, that of the bar before). Strength: the move against twice that.
    """
    import talib

    atr = bars.ago(talib.ATR(bars.high, bars.low, bars.close, params.period))
    past = bars.ago(bars.close)
    move = bars.now(bars.close) - past
    reach = params.factor * atr
    has_range = atr > TOLERANCE * past
    return said(
        bars,
        long=has_range & (move >= reach * UNDER),
        short=has_range & (move <= -reach * UNDER),
        strength=bars.ratio(abs(move), 2 * reach),
        features={"atr": atr, "move": move},
    )


BREAKOUT = (
    Strategy(
        name="rsi_reversal",
        version=1,
        title="the RSI comes back from below the low or above the high level",
        params=RsiReversalParams,
        lookback=lambda p: lookback_wilder(p.period),
        mark=mark_rsi_reversal,
    ),
    Strategy(
        name="bollinger_breakout",
        version=1,
        title="the close leaves the Bollinger band on high volume",
        params=BollingerBreakoutParams,
        lookback=lambda p: p.period + 1,
        mark=mark_bollinger_breakout,
    ),
    Strategy(
        name="donchian_breakout",
        version=1,
        title="the close leaves the channel of the highest high and the lowest low",
        params=DonchianBreakoutParams,
        lookback=lambda p: p.period + 2,
        mark=mark_donchian_breakout,
        horizon=20,
    ),
    Strategy(
        name="atr_burst",
        version=1,
        title="the close moves by several average true ranges at once",
        params=AtrBurstParams,
        lookback=lambda p: lookback_wilder(p.period),
        mark=mark_atr_burst,
    ),
)
