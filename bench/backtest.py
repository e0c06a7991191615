"""
Our backtest engine against vectorbt, on the same marks with the same fills and costs.

``speedup_vs_vectorbt_daily``: SMA 10/30, long and short, 0.2 % fees, next open, on GOOG daily 2004 to 2013;
``speedup_vs_vectorbt_1m``: the same on 1,000,000 synthetic bars. Both sides go from ready marks to trades, equity at
every close and total return; vectorbt is compiled and warm, gets its marks already moved to the bar of the fill, and
does no more than that, while ours also finds every trade's excursions and checks what it was given. The number of
trades, their prices, the equity and the total return must agree to 1e-9, or there is no figure.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench._report import BenchError, report, say
from signals.logic.arrays import Arrays
from signals.logic.simulation import Rules, simulate

RULES = Rules(cash=100_000, fee=0.002, slippage=0.0, side="both", exit="opposite", fill="next_open")
FAST, SLOW = 10, 30
BARS = 1_000_000
AGREE = 1e-9
MEMORY, DRIFT, NOISE = 0.97, 0.000125, 0.004
"""How long the synthetic market's drift lasts, how much it changes, and what moves the price besides."""

type Floats = NDArray[np.float64]
type Marks = NDArray[np.int8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a backtester made of the marks."""

    entry_price: Floats
    exit_price: Floats
    equity: Floats
    total_return: float


def goog() -> Arrays:
    """GOOG as traded, daily, 2004-08-19 to 2013-03-01; it had no split in that time."""
    from bokeh_sampledata.stocks import GOOG

    days = [datetime.combine(date.fromisoformat(str(day)[:10]), time(), UTC) for day in GOOG["date"]]
    midnights = np.array([int(day.timestamp()) // 60 for day in days], dtype=np.int64)
    prices = {name: np.array(GOOG[name], dtype=np.float64) for name in ("open", "high", "low", "close", "volume")}
    return Arrays(**prices, opened=midnights + 870, closed=midnights + 1260)


def synthetic(count: int) -> Arrays:
    """
    A market with momentum, in which following the averages earns about what it costs.

    Without momentum 0.2 % a fill would leave nothing of any sum after some ten thousand trades, and nothing is easily
    equal to nothing.
    """
    rng = np.random.default_rng(2013)
    shocks = rng.standard_normal(count) * DRIFT
    drift = np.empty(count)
    level = 0.0
    for index, shock in enumerate(shocks.tolist()):
        level = MEMORY * level + shock
        drift[index] = level
    close = 100.0 * np.exp(np.cumsum(drift + NOISE * rng.standard_normal(count)))
    opening = np.append(100.0, close[:-1]) * np.exp(NOISE / 4 * rng.standard_normal(count))
    spread = 1.0 + NOISE * rng.random((2, count))
    minutes = np.arange(count, dtype=np.int64)
    return Arrays(
        open=opening,
        high=np.maximum(opening, close) * spread[0],
        low=np.minimum(opening, close) / spread[1],
        close=close,
        volume=np.round(1e5 * rng.lognormal(0.0, 0.5, count)) + 1.0,
        opened=minutes,
        closed=minutes + 1,
    )


def crosses(close: Floats) -> Marks:
    """+1 where the fast moving average rises above the slow one, -1 where it falls below."""
    import talib

    is_above = talib.SMA(close, FAST) > talib.SMA(close, SLOW)
    marks = np.zeros(len(close), dtype=np.int8)
    marks[SLOW:] = np.diff(is_above.astype(np.int8))[SLOW - 1 :]
    return marks


def ours(bars: Arrays, marks: Marks) -> Callable[[], Found]:
    """Our engine, from marks to total return."""

    def turn() -> Found:
        done = simulate(bars, marks, RULES)
        return Found(
            entry_price=done.trades.entry_price,
            exit_price=done.trades.exit_price,
            equity=done.equity,
            total_return=done.total_return,
        )

    return turn


def theirs(bars: Arrays, marks: Marks) -> Callable[[], Found]:
    """vectorbt on the same marks, a bar later at that bar's open, which is the same fill."""
    try:
        import vectorbt  # type: ignore[import-not-found]  # it lives in .bench-venv alone
    except (ImportError, ValueError) as e:  # a plotly that is too new for it is a ValueError
        raise BenchError(f"vectorbt cannot be imported, run make bench NAME=backtest: {str(e).splitlines()[0]}") from e

    moved = np.append(np.int8(0), marks[:-1])
    goes_long, goes_short = moved > 0, moved < 0

    def turn() -> Found:
        portfolio: Any = vectorbt.Portfolio.from_signals(
            bars.close,
            entries=goes_long,
            short_entries=goes_short,
            price=bars.open,
            fees=RULES.fee,
            init_cash=RULES.cash,
        )
        trades = portfolio.trades.values
        return Found(
            entry_price=trades["entry_price"],
            exit_price=trades["exit_price"],
            equity=portfolio.value().to_numpy(),
            total_return=float(portfolio.total_return()),
        )

    return turn


def agree(mine: Found, other: Found) -> None:
    """
    Both found the same.

    Raises:
        BenchError: they did not; the text says in what.

    """
    if len(mine.entry_price) != len(other.entry_price):
        raise BenchError(f"{len(mine.entry_price)} trades here, {len(other.entry_price)} by vectorbt")
    for name in ("entry_price", "exit_price", "equity"):
        here, there = getattr(mine, name), getattr(other, name)
        off = float(np.max(np.abs(here / there - 1.0)))
        if not off <= AGREE:
            raise BenchError(f"{name} differs from vectorbt's by {off:.1e} of its value")
    if not abs(mine.total_return - other.total_return) <= AGREE * max(1.0, abs(other.total_return)):
        raise BenchError(f"total return {mine.total_return} here, {other.total_return} by vectorbt")


def compare(title: str, bars: Arrays, rounds: int) -> float:
    """Median time of vectorbt over median time of ours; what is compared takes turns."""
    marks = crosses(bars.close)
    turns = (ours(bars, marks), theirs(bars, marks))
    for _ in range(2):
        agree(turns[0](), turns[1]())
    took: tuple[list[float], list[float]] = ([], [])
    for one in range(rounds):
        for side in (0, 1) if one % 2 else (1, 0):
            began = perf_counter()
            turns[side]()
            took[side].append(perf_counter() - began)
    found = turns[0]()
    mine, other = median(took[0]), median(took[1])
    say(
        f"{title}: {len(bars):,} bars, {len(found.entry_price):,} trades, total return {found.total_return:.2%}: "
        f"{1e3 * mine:,.2f} ms, {1e3 * other:,.2f} ms by vectorbt"
    )
    return other / mine


def measure(rounds: int) -> Mapping[str, float]:
    """Every figure."""
    daily = compare("GOOG daily", goog(), 10 * rounds)
    large = compare("synthetic", synthetic(BARS), rounds)
    return {"speedup_vs_vectorbt_daily": round(daily, 2), "speedup_vs_vectorbt_1m": round(large, 2)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser("bench.backtest", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="how often every comparison is made (9; daily ten times)")
    options = parser.parse_args(arguments)
    try:
        report("backtest", measure(options.rounds))
    except BenchError as e:
        say(f"bench.backtest: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
