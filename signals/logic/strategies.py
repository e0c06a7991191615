"""
The strategies: pure functions over arrays, each with its parameters, its version and its lookback.

A strategy looks at windows and marks the bars on which it has an opinion. Its ``lookback`` is how many bars it
must see to decide about the last of them: older ones change its indicators by less than 1e-12 of their value
(measured with pasts up to a hundred times as high or a thousand times as wild). Comparisons use a relative
tolerance of 1e-9, so that the same bars give the same opinion however much history came with them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from signals.logic.arrays import Arrays
from signals.models import Direction, Opinion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]

TOLERANCE = 1e-9
FORGOTTEN = 1e-18
"""
Weight of the oldest bar at which an exponentially smoothed value counts as settled.

Far below 1e-12, because a wild past weighs more: its moves may have been a hundred thousand times today's.
"""
AT_ONCE = 1 << 18
"""Numbers in the largest block of windows that is computed at once."""
DIGITS = 9
"""Significant digits of stored features."""


class Params(BaseModel):
    """Parameters of a strategy; a name it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """For each bar of a window: +1 long, -1 short, 0 nothing; how strongly; and the numbers behind it."""

    direction: "NDArray[np.int8]"
    strength: "Floats"
    features: Mapping[str, "Floats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A registered strategy."""

    name: str
    version: int
    params: type[Params]
    lookback: Callable[[Any], int]
    mark: Callable[[Arrays, Any], Marks]


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

    SMA: the mean of the last n closes (TA-Lib SMA). Strength: the distance of the two, 2 % of the slow = 1.
    """
    import numpy as np
    import talib

    fast, slow = talib.SMA(bars.close, params.fast), talib.SMA(bars.close, params.slow)
    above = fast > slow * (1 + TOLERANCE)
    below = fast < slow * (1 - TOLERANCE)
    known = ~np.isnan(_shifted(slow))
    long = above & ~_before(above) & known
    short = below & ~_before(below) & known
    with np.errstate(invalid="ignore"):
        strength = np.minimum(np.abs(fast - slow) / slow / 0.02, 1.0)
    return Marks(direction=_direction(long, short), strength=strength, features={"fast": fast, "slow": slow})


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


def lookback_rsi(params: RsiReversalParams) -> int:
    """Wilder's smoothing keeps (n-1)/n of the past a bar: as many bars as it takes to forget, plus its start."""
    settle = math.ceil(math.log(FORGOTTEN) / math.log((params.period - 1) / params.period))
    return settle + params.period + 2


def mark_rsi_reversal(bars: Arrays, params: RsiReversalParams) -> Marks:
    """
    Long when the RSI comes back up through the low level, short when it comes back down through the high one.

    RSI: J. Welles Wilder, New Concepts in Technical Trading Systems, 1978 (TA-Lib RSI). Where the market stood
    still for n bars there was no RSI to come back from. Strength: how far beyond the level the bar before was,
    10 points = 1.
    """
    import numpy as np
    import talib

    rsi = talib.RSI(bars.close, params.period)
    past = _shifted(rsi)
    highest, lowest = talib.MAX(bars.close, params.period + 1), talib.MIN(bars.close, params.period + 1)
    known = _shifted(highest) > _shifted(lowest) * (1 + TOLERANCE)
    long = known & (past < params.low * (1 - TOLERANCE)) & (rsi >= params.low * (1 - TOLERANCE))
    short = known & (past > params.high * (1 + TOLERANCE)) & (rsi <= params.high * (1 + TOLERANCE))
    depth = np.where(long, params.low - past, past - params.high)
    strength = np.clip(depth / 10, 0.0, 1.0)
    return Marks(direction=_direction(long, short), strength=strength, features={"rsi": rsi, "rsi_before": past})


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
    import numpy as np
    import talib

    middle = talib.SMA(bars.close, params.period)
    width = params.width * _deviation(bars.close, middle, params.period)
    upper, lower = middle + width, middle - width
    usual = _shifted(talib.SMA(bars.volume, params.period))
    above = bars.close > upper * (1 + TOLERANCE)
    below = bars.close < lower * (1 - TOLERANCE)
    times = np.divide(bars.volume, usual, out=np.zeros_like(usual), where=usual > TOLERANCE)
    known = ~np.isnan(_shifted(upper)) & (times >= params.volume_factor * (1 - TOLERANCE))
    strength = np.clip(times / max(2 * params.volume_factor, TOLERANCE), 0.0, 1.0)
    return Marks(
        direction=_direction(above & ~_before(above) & known, below & ~_before(below) & known),
        strength=strength,
        features={"upper": upper, "lower": lower, "volume_times_usual": times},
    )


STRATEGIES: Mapping[str, Strategy] = {
    s.name: s
    for s in (
        Strategy(
            name="sma_cross", version=1, params=SmaCrossParams, lookback=lambda p: p.slow + 1, mark=mark_sma_cross
        ),
        Strategy(
            name="rsi_reversal", version=1, params=RsiReversalParams, lookback=lookback_rsi, mark=mark_rsi_reversal
        ),
        Strategy(
            name="bollinger_breakout",
            version=1,
            params=BollingerBreakoutParams,
            lookback=lambda p: p.period + 1,
            mark=mark_bollinger_breakout,
        ),
    )
}


def opinion_at(marks: Marks, index: int) -> Opinion | None:
    """What the marks say of one bar."""
    direction = int(marks.direction[index])
    if direction == 0:
        return None
    return Opinion(
        direction=Direction.LONG if direction > 0 else Direction.SHORT,
        strength=_shown(marks.strength[index]),
        features={name: _shown(values[index]) for name, values in marks.features.items()},
    )


def _shown(value: object) -> float:
    return float(f"{float(value):.{DIGITS}g}")  # type: ignore[arg-type]


def _shifted(values: "Floats") -> "Floats":
    """Each bar's value of the bar before; NaN for the first."""
    import numpy as np

    shifted = np.empty_like(values)
    shifted[0] = np.nan
    shifted[1:] = values[:-1]
    return shifted


def _deviation(values: "Floats", mean: "Floats", period: int) -> "Floats":
    """
    The population standard deviation of each bar's last *period* values around their *mean*.

    Each window is summed afresh: TA-Lib's running sums of squares keep the rounding errors of prices long gone,
    which are large when a market has fallen far.
    """
    import numpy as np
    from numpy.lib.stride_tricks import as_strided

    deviation = np.full_like(values, np.nan)
    step = values.strides[0]
    block = max(AT_ONCE // period, 1)
    for start in range(0, len(values) - period + 1, block):
        count = min(block, len(values) - period + 1 - start)
        windows = as_strided(values[start:], shape=(count, period), strides=(step, step), writeable=False)
        ends = slice(start + period - 1, start + period - 1 + count)
        gaps = windows - mean[ends, np.newaxis]
        deviation[ends] = np.sqrt(np.einsum("ij,ij->i", gaps, gaps) / period)
    return deviation


def _before(claims: "NDArray[np.bool_]") -> "NDArray[np.bool_]":
    """Whether the claim already held at the bar before."""
    import numpy as np

    before = np.empty_like(claims)
    before[0] = True
    before[1:] = claims[:-1]
    return before


def _direction(long: "NDArray[np.bool_]", short: "NDArray[np.bool_]") -> "NDArray[np.int8]":
    import numpy as np

    return long.astype(np.int8) - short.astype(np.int8)
