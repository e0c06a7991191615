"""
How the opinions of an entry fared, with what it takes to judge the number. Pure.

Every figure is over scored opinions; pending, expired and unscorable ones are counted beside it and never dropped
silently. A figure that cannot be computed is None, and ``undefined`` says why.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from math import fsum, sqrt

from signals.logic.scoring import COST_PER_SIDE, TREND_BARS, edge_of
from signals.models import Direction, Entry, Record, Resolved, State

BINS = 10
"""Equal steps of confidence in which it is held against what came true."""
REGIMES = ("falling", "flat", "rising")
"""Terciles of the series' own return over the 20 bars before a signal, among the signals of that series."""
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Opinions of about the same confidence, and the share of them that was right."""

    low: float
    high: float
    n: int
    mean_confidence: float
    hit_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """
    What opinions did.

    ``base_rate`` is the share of the same windows in which the price rose, ``edge_over_base`` the mean forward
    return beyond that of a bet on rising prices. ``effective_n`` counts only opinions of a series whose windows do
    not overlap. ``ic`` is Spearman's rank correlation of strength times direction with the price's return; its t is
    taken with the effective n. ``brier`` is the mean squared gap between confidence and hit.
    """

    n: int
    pending: int
    expired: int
    unscorable: int
    effective_n: int
    hit_rate: float | None
    hit_rate_low: float | None
    hit_rate_high: float | None
    base_rate: float | None
    mean_forward_return: float | None
    median_forward_return: float | None
    mean_net_return: float | None
    mean_base_return: float | None
    edge_over_base: float | None
    mean_mfe: float | None
    mean_mae: float | None
    ic: float | None
    ic_t: float | None
    brier: float | None
    reliability: Sequence[Bin]
    is_edge_gone: bool
    undefined: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """How an entry fared: altogether, on each symbol, and in each regime."""

    entry: Entry
    cost_per_side: float
    trend_bars: int
    total: Statistics
    by_symbol: Mapping[str, Statistics]
    by_regime: Mapping[str, Statistics]


@dataclass(frozen=True, slots=True)
class _Line:
    symbol: str
    regime: str
    line: Resolved


def performance_of(entry: Entry, records: Sequence[Record], pending: Mapping[str, int]) -> Performance:
    """The figures of an entry from its records; *pending* is how many opinions are open on each symbol."""
    lines = [line for symbol, own in _by_symbol(records).items() for line in _with_regimes(symbol, own)]
    symbols = sorted({line.symbol for line in lines} | set(pending))
    regimes = [name for name in (*REGIMES, UNKNOWN) if any(line.regime == name for line in lines)]
    return Performance(
        entry=entry,
        cost_per_side=COST_PER_SIDE,
        trend_bars=TREND_BARS,
        total=_measured(lines, sum(pending.values())),
        by_symbol={s: _measured([line for line in lines if line.symbol == s], pending.get(s, 0)) for s in symbols},
        by_regime={r: _measured([line for line in lines if line.regime == r], 0) for r in regimes},
    )


def _by_symbol(records: Sequence[Record]) -> dict[str, list[Resolved]]:
    found: dict[str, list[Resolved]] = {}
    for record in sorted(records, key=lambda r: (r.symbol, r.number)):
        found.setdefault(record.symbol, []).extend(record.lines)
    return found


def _with_regimes(symbol: str, lines: Sequence[Resolved]) -> list[_Line]:
    """The lines of a series with the tercile of the trend before them; equal trends are in the same one."""
    trends = sorted(line.trend for line in lines if line.trend is not None)
    if len(trends) < len(REGIMES):
        return [_Line(symbol, UNKNOWN, line) for line in lines]
    first, second = trends[len(trends) // 3], trends[2 * len(trends) // 3]

    def regime(trend: float | None) -> str:
        if trend is None:
            return UNKNOWN
        return REGIMES[(trend >= first) + (trend >= second)]

    return [_Line(symbol, regime(line.trend), line) for line in lines]


def _measured(lines: Sequence[_Line], pending: int) -> Statistics:
    scored = [one for one in lines if one.line.outcome.state is State.SCORED]
    undefined: dict[str, str] = {}

    def mean(name: str) -> float | None:
        return _mean(_of(name, scored)) if scored else None

    edge = edge_of(len(scored), sum(bool(x.line.outcome.is_hit) for x in scored), _ups(scored))
    if edge is None:
        undefined["hit_rate"] = "nothing has been scored yet"
    forward, base = mean("forward_return"), mean("base_return")
    effective = _effective(scored)
    ic = _defined("ic", lambda: _ic(scored), undefined)
    return Statistics(
        n=len(scored),
        pending=pending,
        expired=sum(one.line.outcome.state is State.EXPIRED for one in lines),
        unscorable=sum(one.line.outcome.state is State.UNSCORABLE for one in lines),
        effective_n=effective,
        hit_rate=edge.hit_rate if edge else None,
        hit_rate_low=edge.low if edge else None,
        hit_rate_high=edge.high if edge else None,
        base_rate=edge.base_rate if edge else None,
        mean_forward_return=forward,
        median_forward_return=_median(_of("forward_return", scored)) if scored else None,
        mean_net_return=mean("net_return"),
        mean_base_return=base,
        edge_over_base=forward - base if forward is not None and base is not None else None,
        mean_mfe=mean("mfe"),
        mean_mae=mean("mae"),
        ic=ic,
        ic_t=_defined("ic_t", lambda: _t(ic, effective), undefined),
        brier=_defined("brier", lambda: _brier(scored), undefined),
        reliability=_bins(scored),
        is_edge_gone=edge is not None and edge.is_gone,
        undefined=undefined,
    )


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return fsum(known) / len(known)


def _median(values: Iterable[float]) -> float:
    known = sorted(values)
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2


def _of(name: str, scored: Sequence[_Line]) -> list[float]:
    return [getattr(one.line.outcome, name) for one in scored]


def _ups(scored: Sequence[_Line]) -> int:
    return sum(base > 0 for base in _of("base_return", scored))


class _UndefinedError(Exception):
    """A figure that these outcomes do not have; the text says why."""


def _defined(name: str, compute: Callable[[], float], undefined: dict[str, str]) -> float | None:
    try:
        return compute()
    except _UndefinedError as e:
        undefined[name] = str(e)
        return None


def _effective(scored: Sequence[_Line]) -> int:
    """How many windows, taken greedily from the oldest of each series, do not overlap."""
    count = 0
    for _, own in groupby(scored, key=lambda one: one.symbol):
        free: datetime | None = None
        for line in sorted((one.line for one in own), key=lambda line: line.closed_at):
            if free is None or line.closed_at >= free:
                count, free = count + 1, line.closes_at
    return count


def _ic(scored: Sequence[_Line]) -> float:
    if len(scored) < 3:
        raise _UndefinedError(f"needs 3 scored signals, has {len(scored)}")
    import statistics

    said = [one.line.strength * (1 if one.line.direction is Direction.LONG else -1) for one in scored]
    try:
        return statistics.correlation(said, _of("base_return", scored), method="ranked")
    except statistics.StatisticsError:
        raise _UndefinedError("every opinion, or every return, is the same") from None


def _t(ic: float | None, effective: int) -> float:
    if ic is None:
        raise _UndefinedError("there is no ic")
    if effective < 3:
        raise _UndefinedError(f"needs 3 windows that do not overlap, has {effective}")
    if abs(ic) >= 1:
        raise _UndefinedError("the ranks agree perfectly")
    return ic * sqrt((effective - 2) / (1 - ic * ic))


def _sure(scored: Sequence[_Line]) -> list[tuple[float, bool]]:
    return [(one.line.confidence, bool(one.line.outcome.is_hit)) for one in scored if one.line.confidence is not None]


def _brier(scored: Sequence[_Line]) -> float:
    known = _sure(scored)
    if not known:
        raise _UndefinedError("no scored signal had a confidence: its entry had no outcomes before it")
    return _mean((confidence - hit) ** 2 for confidence, hit in known)


def _bins(scored: Sequence[_Line]) -> list[Bin]:
    """Confidence in ten equal steps, those that hold any."""
    found: dict[int, list[tuple[float, bool]]] = {}
    for confidence, hit in _sure(scored):
        found.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, hit))
    return [
        Bin(
            low=number / BINS,
            high=(number + 1) / BINS,
            n=len(some),
            mean_confidence=_mean(confidence for confidence, _ in some),
            hit_rate=sum(hit for _, hit in some) / len(some),
        )
        for number, some in sorted(found.items())
    ]
