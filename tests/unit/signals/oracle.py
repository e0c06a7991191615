"""
What the strategies must say, computed another way: TA-Lib over whole adjusted arrays, then a plain loop.

Two numbers that agree in nine digits are equal: averages of whole cents meet exactly now and then.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import talib

from infra.local.replay.samples import load_packaged
from shared.market.models import Bar, Interval

type Marked = dict[int, tuple[str, float]]
"""Bar number: direction and strength."""


@cache
def recorded(symbol: str) -> Sequence[Bar]:
    """The recorded daily bars of a symbol, 2000 to 2013."""
    return load_packaged(["AAPL", "GOOG", "IBM", "MSFT"], Interval.DAY)[(symbol, Interval.DAY)].bars


def adjusted(bars: Sequence[Bar]) -> tuple[np.ndarray, np.ndarray]:
    """Closes and volumes in terms of the last bar's shares."""
    closes, volumes, factor = [], [], 1.0
    for bar in reversed(bars):
        closes.append(bar.close / factor)
        volumes.append(bar.volume * factor)
        factor *= bar.split
    return np.array(closes[::-1]), np.array(volumes[::-1])


def exceeds(one: float, other: float) -> bool:
    """Whether one number is larger than the other, and not only by rounding."""
    return one > other and not math.isclose(one, other, rel_tol=1e-9)


def sma_cross(bars: Sequence[Bar], fast: int, slow: int) -> Marked:
    close, _ = adjusted(bars)
    quick, lazy = talib.SMA(close, fast), talib.SMA(close, slow)
    marked: Marked = {}
    for i in range(slow, len(close)):
        strength = min(abs(quick[i] - lazy[i]) / lazy[i] / 0.02, 1.0)
        if not exceeds(quick[i - 1], lazy[i - 1]) and exceeds(quick[i], lazy[i]):
            marked[i] = ("long", strength)
        if not exceeds(lazy[i - 1], quick[i - 1]) and exceeds(lazy[i], quick[i]):
            marked[i] = ("short", strength)
    return marked


def rsi_reversal(bars: Sequence[Bar], period: int, low: float, high: float) -> Marked:
    close, _ = adjusted(bars)
    rsi = talib.RSI(close, period)
    marked: Marked = {}
    for i in range(period + 1, len(close)):
        if exceeds(low, rsi[i - 1]) and not exceeds(low, rsi[i]):
            marked[i] = ("long", min((low - rsi[i - 1]) / 10, 1.0))
        if exceeds(rsi[i - 1], high) and not exceeds(rsi[i], high):
            marked[i] = ("short", min((rsi[i - 1] - high) / 10, 1.0))
    return marked


def bollinger_breakout(bars: Sequence[Bar], period: int, width: float, volume_factor: float) -> Marked:
    close, volume = adjusted(bars)
    upper, _, lower = talib.BBANDS(close, timeperiod=period, nbdevup=width, nbdevdn=width, matype=0)
    marked: Marked = {}
    for i in range(period, len(close)):
        usual = sum(volume[i - period : i]) / period
        if exceeds(volume_factor * usual, volume[i]):
            continue
        strength = min(volume[i] / usual / (2 * volume_factor), 1.0)
        if exceeds(close[i], upper[i]) and not exceeds(close[i - 1], upper[i - 1]):
            marked[i] = ("long", strength)
        if exceeds(lower[i], close[i]) and not exceeds(lower[i - 1], close[i - 1]):
            marked[i] = ("short", strength)
    return marked


ORACLES = {"sma_cross": sma_cross, "rsi_reversal": rsi_reversal, "bollinger_breakout": bollinger_breakout}
