"""Strategies that look at what is traded, and at what happened while nothing was."""

from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import Field

from shared.market.models import Interval, instant_of, minute_of
from shared.market.sessions import calendar
from signals.logic.arrays import TOLERANCE, Arrays, LastBar
from signals.logic.strategies.marks import OVER, UNDER, Marks, said, silent, spared
from signals.logic.strategies.registered import Params, Strategy

if TYPE_CHECKING:
    from signals.logic.arrays import Floats


DAY = 24 * 60
"""Minutes."""


class VolumeSpikeParams(Params):
    """Bars whose mean volume is the usual one, and how many times that makes a spike."""

    period: int = Field(default=20, ge=2, le=1000)
    factor: float = Field(default=3.0, gt=0, le=1000)


def mark_volume_spike(bars: Arrays, params: VolumeSpikeParams) -> Marks:
    """
    Long when the volume leaps and the close is above the one before, short when it is below.

    Volume leads price: S. Gervais, R. Kaniel and D. Mingelgrin, The High-Volume Return Premium, Journal of Finance 56
    (2001). Usual is the mean of the n bars before (TA-Lib SMA); where nothing was traded in them, no volume is high.
    Only the first bar of a spike counts. Strength: the volume against twice what it takes.
    """
    import talib

    usual = talib.SMA(bars.volume, params.period)
    least = params.factor * UNDER
    times = bars.ratio(bars.now(bars.volume), bars.ago(usual))
    leaps = (times >= least) & (bars.ratio(bars.ago(bars.volume), bars.ago(usual, 2)) < least)
    if spared(bars, leaps):
        return silent()
    close, past = bars.now(bars.close), bars.ago(bars.close)
    return said(
        bars,
        long=leaps & (close > past * OVER),
        short=leaps & (close < past * UNDER),
        strength=times / (2 * params.factor),
        features={"volume_times_usual": times, "return": close / past - 1},
    )


class VwapDeviationParams(Params):
    """The distance from the VWAP as a share of it, and the most bars a session has: 390 minutes, or 7 hours."""

    distance: float = Field(default=0.01, gt=0, le=1)
    session_bars: int = Field(default=390, ge=2, le=1440)


def mark_vwap_deviation(bars: Arrays, params: VwapDeviationParams) -> Marks:
    """
    Long when the close falls *distance* below what the session paid on average, short when it rises as far above it.

    VWAP: the mean of (high + low + close) / 3 weighted by volume, from the session's first bar on (S. Berkowitz,
    D. Logue and E. Noser, The Total Cost of Transactions on the NYSE, Journal of Finance 43, 1988). Nothing is said
    outside of sessions, on a session's first bar, before anything was traded, nor after *session_bars* bars.
    Strength: the distance against twice that.
    """
    vwap, past_vwap = _vwap(bars, params.session_bars)
    away, past = bars.now(bars.close) / vwap - 1, bars.ago(bars.close) / past_vwap - 1
    most = params.distance
    return said(
        bars,
        long=(away <= -most * UNDER) & (past > -most * UNDER),
        short=(away >= most * UNDER) & (past < most * UNDER),
        strength=abs(away) / (2 * most),
        features={"vwap": vwap, "deviation": away},
    )


def _vwap(bars: Arrays, most: int) -> "tuple[Floats, Floats]":
    """Each bar's VWAP of its session, and that of the bar before in the same session; NaN where there is none."""
    import numpy as np

    if isinstance(bars, LastBar):
        start = int(bars.opened.searchsorted(_session_open(int(bars.opened[-1]))))
        if not 2 <= len(bars) - start <= most:  # the lookback is one bar longer, so the session's first is in it
            return _UNKNOWN
        volume = bars.volume[start:]
        thrice = bars.high[start:] + bars.low[start:] + bars.close[start:]
        past_traded = volume[:-1].sum()
        if past_traded <= TOLERANCE:
            return _UNKNOWN
        past_paid = thrice[:-1].dot(volume[:-1])
        paid, traded = past_paid + thrice[-1] * volume[-1], past_traded + volume[-1]
        return paid / (3 * traded), past_paid / (3 * past_traded)
    vwap, past = np.full((2, len(bars)), np.nan)
    for start, end in _sessions(bars):
        session = slice(start, min(end, start + most))
        volume = bars.volume[session]
        paid = ((bars.high[session] + bars.low[session] + bars.close[session]) * volume).cumsum()
        traded = volume.cumsum()
        line = np.divide(paid, 3 * traded, out=np.full_like(paid, np.nan), where=traded > TOLERANCE)
        later = slice(start + 1, start + len(line))
        vwap[later], past[later] = line[1:], line[:-1]
    return vwap, past


def _session_open(opened: int) -> int:
    """When the session opens that is open at this minute, or is the next to be."""
    opens, closes = _next_session(opened - opened % DAY)
    return opens if opened < closes else _next_session(closes)[0]


@lru_cache(maxsize=64)
def _next_session(after: int) -> tuple[int, int]:
    """The first session to close after this minute; kept, because every bar of a day asks."""
    session = calendar().next_close(instant_of(after))
    return minute_of(session.opens_at), minute_of(session.closes_at)


def _sessions(bars: Arrays) -> list[tuple[int, int]]:
    """The places of each session's bars: those that open from its open to its close."""
    first, last = (calendar().next_close(instant_of(int(bars.opened[place]))).date for place in (0, -1))
    found = []
    for session in calendar().sessions(first, last):
        start, end = bars.opened.searchsorted([minute_of(session.opens_at), minute_of(session.closes_at)])
        if end > start:
            found.append((int(start), int(end)))
    return found


class GapParams(Params):
    """The share of the previous close by which the open must lie away from it."""

    size: float = Field(default=0.02, gt=0, le=1)


def mark_gap(bars: Arrays, params: GapParams) -> Marks:
    """
    Long when the market opens *size* above the previous close and does not close below its open, short in mirror image.

    The gap that is not filled at once: R. D. Edwards and J. Magee, Technical Analysis of Stock Trends, 1948.
    Strength: the gap against twice that size.
    """
    past, opening, close = bars.ago(bars.close), bars.now(bars.open), bars.now(bars.close)
    gap = opening / past - 1
    return said(
        bars,
        long=(gap >= params.size * UNDER) & (close >= opening * UNDER),
        short=(gap <= -params.size * UNDER) & (close <= opening * OVER),
        strength=abs(gap) / (2 * params.size),
        features={"gap": gap, "previous_close": past},
    )


_UNKNOWN: "tuple[Floats, Floats]" = (float("nan"), float("nan"))  # type: ignore[assignment]

FLOW = (
    Strategy(
        name="volume_spike",
        version=1,
        title="the volume leaps, and the close says which way",
        params=VolumeSpikeParams,
        lookback=lambda p: p.period + 2,
        mark=mark_volume_spike,
    ),
    Strategy(
        name="vwap_deviation",
        version=1,
        title="the close leaves the volume-weighted average price of its session far behind",
        params=VwapDeviationParams,
        lookback=lambda p: p.session_bars + 1,
        mark=mark_vwap_deviation,
        intervals=(Interval.HOUR, Interval.MINUTE),
    ),
    Strategy(
        name="gap",
        version=1,
        title="the market opens away from the previous close and stays there",
        params=GapParams,
        lookback=lambda _: 2,
        mark=mark_gap,
        intervals=(Interval.DAY,),
    ),
)
