"""
What our strategies cost on a new bar, over what they stand on, and against pandas-ta.

Every registered strategy decides about one new bar after another, each from the window of its lookback, on float64
arrays that are ready. ``vs_talib``: the time of all of them over that of the bare TA-Lib calls for the indicators that
they need, on the same windows, and of plain numpy for the VWAP and the gap. ``speedup_vs_pandas_ta``: the time that
pandas-ta takes for the same indicators on the same windows as ready Series, over ours for the whole decision. All
take turns, medians count, and the numbers of all sides must agree.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import talib

from bench._report import BenchError, report, say
from infra.strategies import invented_bars
from shared.market.models import EPOCH, Interval
from signals.logic.arrays import Arrays, LastBar
from signals.logic.strategies import STRATEGIES, LastMark

SEED = 12
BARS = 20
"""New bars that are decided about in a turn: some end a rule early, some do not."""
SIDES = ("ours", "talib", "pandas_ta")

type Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """One strategy's work on one new bar, by each side; ``numbers`` of a side are its indicators at that bar."""

    name: str
    turns: Mapping[str, Callable[[], Any]]
    numbers: Mapping[str, Numbers]


def talib_calls(bars: LastBar) -> Mapping[str, Callable[[], Any]]:
    """For each strategy the bare calls for its indicators."""
    o, h, l, c, v = bars.open, bars.high, bars.low, bars.close, bars.volume  # noqa: E741
    first = int(bars.opened.searchsorted(bars.opened[-1] - bars.opened[-1] % 1440))  # a session lies within a UTC date

    def vwap() -> Any:  # noqa: ANN401
        volume = v[first:]
        return ((h[first:] + l[first:] + c[first:]) / 3 * volume).cumsum() / volume.cumsum()

    return {
        "sma_cross": lambda: (talib.SMA(c, 10), talib.SMA(c, 30)),
        "macd_cross": lambda: talib.MACD(c, 12, 26, 9)[:2],
        "adx_trend": lambda: (talib.ADX(h, l, c, 14), talib.PLUS_DI(h, l, c, 14), talib.MINUS_DI(h, l, c, 14)),
        "momentum": lambda: (talib.ROCP(c, 252),),
        "rsi_reversal": lambda: (talib.RSI(c, 14),),
        "bollinger_breakout": lambda: (*talib.BBANDS(c, 20, 2.0, 2.0)[::2], talib.SMA(v, 20)),
        "donchian_breakout": lambda: (talib.MAX(h, 20), talib.MIN(l, 20)),
        "atr_burst": lambda: (talib.ATR(h, l, c, 14),),
        "volume_spike": lambda: (talib.SMA(v, 20),),
        "vwap_deviation": lambda: (vwap(),),
        "gap": lambda: (o[1:] / c[:-1] - 1,),
    }


def pandas_ta_calls(bars: LastBar) -> Mapping[str, Callable[[], Any]]:
    """The same indicators by pandas-ta, on Series that are ready."""
    import pandas as pd  # type: ignore[import-untyped]
    import pandas_ta as ta  # type: ignore[import-not-found]

    index = pd.DatetimeIndex([EPOCH + timedelta(minutes=int(minute)) for minute in bars.opened]).tz_localize(None)
    o, h, l, c, v = (  # noqa: E741
        pd.Series(getattr(bars, name), index=index) for name in ("open", "high", "low", "close", "volume")
    )
    return {
        "sma_cross": lambda: (ta.sma(c, 10), ta.sma(c, 30)),
        "macd_cross": lambda: ta.macd(c, 12, 26, 9),
        "adx_trend": lambda: ta.adx(
            h, l, c, 14, talib=False
        ),  # with TA-Lib its +DI and -DI are not divided by the range
        "momentum": lambda: (ta.percent_return(c, 252),),
        "rsi_reversal": lambda: (ta.rsi(c, 14),),
        "bollinger_breakout": lambda: (ta.bbands(c, 20, 2.0, 2.0, ddof=0), ta.sma(v, 20)),
        "donchian_breakout": lambda: ta.donchian(h, l, 20, 20),
        "atr_burst": lambda: (ta.atr(h, l, c, 14),),
        "volume_spike": lambda: (ta.sma(v, 20),),
        "vwap_deviation": lambda: (ta.vwap(h, l, c, v, anchor="D"),),
        "gap": lambda: (o / c.shift(1) - 1,),
    }


INDICATORS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "sma_cross": (("fast", 0), ("slow", 0)),
    "macd_cross": (("macd", 0), ("signal", 0)),
    "adx_trend": (("adx", 0), ("plus_di", 0), ("minus_di", 0)),
    "momentum": (("return", 0),),
    "rsi_reversal": (("rsi", 0),),
    "bollinger_breakout": (("upper", 0), ("lower", 0), ("usual", 1)),
    "donchian_breakout": (("upper", 1), ("lower", 1)),
    "atr_burst": (("atr", 1),),
    "volume_spike": (("usual", 1),),
    "vwap_deviation": (("vwap", 0),),
    "gap": (("gap", 0),),
}
"""What the numbers of a strategy's calls are called among its features, and how many bars ago they count."""
PEER_COLUMNS = {
    "macd_cross": ("MACD_12_26_9", "MACDs_12_26_9"),
    "adx_trend": ("ADX_14", "DMP_14", "DMN_14"),
    "donchian_breakout": ("DCU_20_20", "DCL_20_20"),
}


def ours_at(name: str, bars: Arrays) -> Numbers:
    """The features of our whole-array run at its last bar; a silent bar has none when it is decided alone."""
    marks = STRATEGIES[name].mark(bars.cut(0, len(bars)), STRATEGIES[name].params())
    numbers = {feature: float(values[-1]) for feature, values in marks.features.items()}
    if "volume_times_usual" in numbers:
        numbers["usual"] = float(bars.volume[-1]) / numbers["volume_times_usual"]
    return {feature: numbers[feature] for feature, _ in INDICATORS[name]}


def peers_at(name: str, answer: Any) -> Numbers:  # noqa: ANN401 - tuples of arrays, Series or a DataFrame
    """The same numbers of another side's answer."""
    if name == "bollinger_breakout" and len(answer) == 2:
        bands, usual = answer
        columns = [bands.iloc[:, 2], bands.iloc[:, 0], usual]  # lower, middle, upper, …
    elif name in PEER_COLUMNS and hasattr(answer, "columns"):
        columns = [answer[column] for column in PEER_COLUMNS[name]]
    else:
        columns = list(answer)
    return {
        feature: float(np.asarray(values)[-1 - ago])
        for (feature, ago), values in zip(INDICATORS[name], columns, strict=True)
    }


def contests() -> Mapping[str, list[Contest]]:
    """Every strategy on the same new bars."""
    most = max(one.lookback(one.params()) for one in STRATEGIES.values())
    whole = invented_bars(Interval.MINUTE, count=most + 20 * BARS, seed=SEED)
    ends = [end for end in range(most + 13, len(whole) + 1) if whole.volume[end - 1] > 0][::17]
    found: dict[str, list[Contest]] = {}
    for name, strategy in STRATEGIES.items():
        params = strategy.params()
        lookback = strategy.lookback(params)
        found[name] = []
        for end in ends[:BARS]:
            bars = whole.last(end - lookback, end)
            turns: dict[str, Callable[[], Any]] = {
                "ours": partial(strategy.mark, bars, params),
                "talib": talib_calls(bars)[name],
                "pandas_ta": pandas_ta_calls(bars)[name],
            }
            numbers = {
                "ours": ours_at(name, bars),
                "talib": peers_at(name, turns["talib"]()),
                "pandas_ta": peers_at(name, turns["pandas_ta"]()),
            }
            found[name].append(Contest(name=name, turns=turns, numbers=numbers))
    return found


def agree(contest: Contest) -> None:
    """
    Every side drew the same numbers, and ours decided about one bar.

    Raises:
        BenchError: they differ.

    """
    if not isinstance(contest.turns["ours"](), LastMark):
        raise BenchError(f"{contest.name} did not decide about the last bar alone")
    ours = contest.numbers["ours"]
    for side in ("talib", "pandas_ta"):
        for feature, value in contest.numbers[side].items():
            # The ADX's moves are nudged by 1e-8 of the price, so that no rounding decides between them.
            tolerance = 1e-5 if contest.name == "adx_trend" else 1e-9
            if not np.isclose(ours[feature], value, rtol=tolerance, atol=1e-12):
                raise BenchError(f"{contest.name}: {feature} is {ours[feature]!r} here and {value!r} by {side}")


def timed(bars: Sequence[Contest], rounds: int, repeats: int) -> Mapping[str, float]:
    """Median seconds of one decision by each side, taking turns at all the bars."""
    took: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            turns = [contest.turns[side] for contest in bars] * (1 if side == "pandas_ta" else repeats)
            began = perf_counter()
            for turn in turns:
                turn()
            took[side].append((perf_counter() - began) / len(turns))
    return {side: median(times) for side, times in took.items()}


def measure(rounds: int, repeats: int) -> Mapping[str, float]:
    """Every figure."""
    total = dict.fromkeys(SIDES, 0.0)
    for name, bars in contests().items():
        for contest in bars:
            agree(contest)
        took = timed(bars, rounds, repeats)
        say(f"{name:20}" + "".join(f"  {side} {1e6 * took[side]:9,.2f} µs" for side in SIDES))
        for side in SIDES:
            total[side] += took[side]
    return {
        "vs_talib": round(total["ours"] / total["talib"], 3),
        "speedup_vs_pandas_ta": round(total["pandas_ta"] / total["ours"], 1),
        "all_strategies_us": round(1e6 * total["ours"], 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser("bench.signals", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="how often the sides take turns (30)")
    parser.add_argument("--repeats", type=int, default=20, help="decisions about each bar in a turn (20)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # pandas-ta's own
    try:
        report("signals", measure(options.rounds, options.repeats))
    except BenchError as e:
        say(f"bench.signals: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
