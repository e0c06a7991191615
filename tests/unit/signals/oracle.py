"""
What the strategies must say, computed another way: TA-Lib over whole adjusted arrays, then a plain loop.

Two numbers that agree in nine digits are equal: averages of whole cents meet exactly now and then.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate, groupby

import numpy as np
import talib

from infra.local.replay.samples import load_packaged
from shared.market.models import Bar, Interval

type Marked = dict[int, tuple[str, float]]
"""Bar number: direction and strength."""


@cache
def recorded(symbol: str, interval: Interval = Interval.DAY) -> Sequence[Bar]:
    """The recorded bars of a symbol: daily 2000 to 2013, and AAPL's hours and minutes."""
    symbols = ["AAPL", "GOOG", "IBM", "MSFT"] if interval is Interval.DAY else [symbol]
    return load_packaged(symbols, interval)[(symbol, interval)].bars


def column(bars: Sequence[Bar], name: str) -> np.ndarray:
    """Prices or volumes in terms of the last bar's shares."""
    numbers, factor = [], 1.0
    for bar in reversed(bars):
        value = getattr(bar, name)
        numbers.append(value * factor if name == "volume" else value / factor)
        factor *= bar.split
    return np.array(numbers[::-1])


def adjusted(bars: Sequence[Bar]) -> tuple[np.ndarray, np.ndarray]:
    """Closes and volumes in terms of the last bar's shares."""
    return column(bars, "close"), column(bars, "volume")


def exceeds(one: float, other: float) -> bool:
    """Whether one number is larger than the other, and not only by rounding."""
    return one > other and not math.isclose(one, other, rel_tol=1e-9)


def changes(stands: Callable[[int], str | None], strength: Callable[[int], float], places: range) -> Marked:
    """A mark wherever a state begins."""
    return {i: (now, min(strength(i), 1.0)) for i in places if (now := stands(i)) and now != stands(i - 1)}


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


def macd_cross(bars: Sequence[Bar], fast: int, slow: int, signal: int) -> Marked:
    """Both averages written out: each begins at the mean of its first values, the fast one no earlier than the slow."""
    close, _ = adjusted(bars)

    def smoothed(values: Sequence[float], n: int, first: int) -> dict[int, float]:
        line = {first: float(np.mean(values[first - n + 1 : first + 1]))}
        for i in range(first + 1, len(values)):
            line[i] = line[i - 1] + 2 / (n + 1) * (values[i] - line[i - 1])
        return line

    quick, lazy = smoothed(close, fast, slow - 1), smoothed(close, slow, slow - 1)
    macd = [quick[i] - lazy[i] for i in range(slow - 1, len(close))]
    line = smoothed(macd, signal, signal - 1)
    gap = {i + slow - 1: macd[i] - value for i, value in line.items()}

    def stands(i: int) -> str | None:
        return None if abs(gap[i]) <= 1e-9 * close[i] else "long" if gap[i] > 0 else "short"

    return changes(stands, lambda i: abs(gap[i]) / close[i] / 0.002, range(slow + signal - 1, len(close)))


def adx_trend(bars: Sequence[Bar], period: int, level: float) -> Marked:
    """Wilder's own worksheet, sums first; of two equal moves the one counts on whose side the bar closed, else down."""
    high, low, close = (column(bars, name) for name in ("high", "low", "close"))
    up = [max(high[i] - high[i - 1], 0.0) if i else 0.0 for i in range(len(close))]
    down = [max(low[i - 1] - low[i], 0.0) if i else 0.0 for i in range(len(close))]
    plus, minus = [0.0] * len(close), [0.0] * len(close)
    for i in range(1, len(close)):
        is_tie = abs(up[i] - down[i]) <= 1e-9 * close[i]
        rises = close[i] - close[i - 1] > 1e-9 * close[i] if is_tie else up[i] > down[i]
        (plus if rises else minus)[i] = up[i] if rises else down[i]
    reach = [max(high[i], close[i - 1]) - min(low[i], close[i - 1]) if i else 0.0 for i in range(len(close))]

    def summed(values: Sequence[float]) -> list[float]:
        line = [sum(values[1:period])]
        for value in values[period:]:
            line.append(line[-1] * (1 - 1 / period) + value)
        return line[1:]  # of bar *period* and later

    plus_di, minus_di = ([100 * a / b for a, b in zip(summed(dm), summed(reach), strict=True)] for dm in (plus, minus))
    dx = [100 * abs(a - b) / (a + b) for a, b in zip(plus_di, minus_di, strict=True)]
    adx = {period - 1: sum(dx[:period]) / period}
    for k in range(period, len(dx)):
        adx[k] = (adx[k - 1] * (period - 1) + dx[k]) / period

    def stands(i: int) -> str | None:
        k = i - period
        if exceeds(level, adx[k]) or not (exceeds(plus_di[k], minus_di[k]) or exceeds(minus_di[k], plus_di[k])):
            return None
        return "long" if plus_di[k] > minus_di[k] else "short"

    return changes(stands, lambda i: adx[i - period] / 50, range(2 * period, len(close)))


def momentum(bars: Sequence[Bar], period: int, least: float) -> Marked:
    close, _ = adjusted(bars)
    change = {i: close[i] / close[i - period] - 1 for i in range(period, len(close))}

    def stands(i: int) -> str | None:
        return None if abs(change[i]) <= least + 1e-9 else "long" if change[i] > 0 else "short"

    return changes(stands, lambda i: abs(change[i]) / 0.2, range(period + 1, len(close)))


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


def donchian_breakout(bars: Sequence[Bar], period: int) -> Marked:
    high, low, close = (column(bars, name) for name in ("high", "low", "close"))

    def stands(i: int) -> tuple[str, float] | None:
        upper, lower = max(high[i - period : i]), min(low[i - period : i])
        if exceeds(close[i], upper):
            return "long", close[i] - upper
        return ("short", lower - close[i]) if exceeds(lower, close[i]) else None

    marked: Marked = {}
    for i in range(period + 1, len(close)):
        now, past = stands(i), stands(i - 1)
        if now and not (past and past[0] == now[0]):
            marked[i] = (now[0], min(now[1] / close[i] / 0.02, 1.0))
    return marked


def atr_burst(bars: Sequence[Bar], period: int, factor: float) -> Marked:
    high, low, close = (column(bars, name) for name in ("high", "low", "close"))
    reach = [max(high[i], close[i - 1]) - min(low[i], close[i - 1]) for i in range(1, len(close))]
    atr = {period: sum(reach[:period]) / period}
    marked: Marked = {}
    for i in range(period + 1, len(close)):
        move = close[i] - close[i - 1]
        if not exceeds(factor * atr[i - 1], abs(move)):
            marked[i] = ("long" if move > 0 else "short", min(abs(move) / (2 * factor * atr[i - 1]), 1.0))
        atr[i] = (atr[i - 1] * (period - 1) + reach[i - 1]) / period
    return marked


def volume_spike(bars: Sequence[Bar], period: int, factor: float) -> Marked:
    close, volume = adjusted(bars)
    times = {i: volume[i] / (sum(volume[i - period : i]) / period) for i in range(period, len(close))}
    marked: Marked = {}
    for i in range(period + 1, len(close)):
        if not exceeds(factor, times[i]) and exceeds(factor, times[i - 1]) and close[i] != close[i - 1]:
            marked[i] = ("long" if close[i] > close[i - 1] else "short", min(times[i] / (2 * factor), 1.0))
    return marked


def vwap_deviation(bars: Sequence[Bar], distance: float, session_bars: int) -> Marked:
    """Sessions of recorded bars are the dates in New York; all of them lie within a UTC date."""
    marked: Marked = {}
    for _, numbered in groupby(enumerate(bars), lambda pair: pair[1].opened_at.date()):
        day = list(numbered)[:session_bars]
        paid = accumulate((bar.high + bar.low + bar.close) / 3 * bar.volume for _, bar in day)
        traded = accumulate(bar.volume for _, bar in day)
        away = [bar.close / (p / t) - 1 if t else math.nan for (_, bar), p, t in zip(day, paid, traded, strict=True)]
        for k in range(1, len(day)):
            if not exceeds(distance, abs(away[k])) and (away[k - 1] * np.sign(away[k])) < distance * (1 - 1e-9):
                marked[day[k][0]] = ("short" if away[k] > 0 else "long", min(abs(away[k]) / (2 * distance), 1.0))
    return marked


def gap(bars: Sequence[Bar], size: float) -> Marked:
    opening, close = column(bars, "open"), column(bars, "close")
    marked: Marked = {}
    for i in range(1, len(close)):
        away = opening[i] / close[i - 1] - 1
        if not exceeds(size, abs(away)) and not exceeds((opening[i] - close[i]) * np.sign(away), 0):
            marked[i] = ("long" if away > 0 else "short", min(abs(away) / (2 * size), 1.0))
    return marked


ORACLES: Mapping[str, Callable[..., Marked]] = {
    rule.__name__: rule
    for rule in (
        sma_cross,
        macd_cross,
        adx_trend,
        momentum,
        rsi_reversal,
        bollinger_breakout,
        donchian_breakout,
        atr_burst,
        volume_spike,
        vwap_deviation,
        gap,
    )
}
