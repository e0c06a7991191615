"""
One backtest from bars to everything that is said of it. Pure.

The marks are those of the decision function that runs live, on the whole tape at once. A variant is judged on rows by
the Sharpe ratio of what following its marks there alone would have returned: each range of rows begins without a
position and with the whole cash, so nothing of one range is known in another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidPayloadError, PermanentError
from shared.market.models import Columns, instant_of
from signals.backtest_models import Job, NoValidation, WalkForward
from signals.logic.arrays import Arrays, Tape
from signals.logic.checks import checks, deflated_sharpe, on_hold_out
from signals.logic.evaluation import Watcher
from signals.logic.metrics import Curve, Measured, Value, drawdowns, measure, monthly_returns, periods_per_year, sharpe
from signals.logic.simulation import Simulation, Trades, buy_and_hold, simulate
from signals.logic.strategies import STRATEGIES
from signals.logic.validation import (
    Choice,
    Evaluation,
    Fold,
    HoldOut,
    choose,
    combinatorial_purged,
    walk_forward,
)
from signals.models import Entry, StateGate, params_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]
    type Marks = NDArray[np.int8]

POINTS = 600
"""About how many points of a curve are shown; extremes are always among them."""
TRADES = 1000
"""The newest trades that are shown one by one."""

type Params = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """
    How one variant did: per fold in training and in the test, and before the hold-out as a whole.

    ``sharpe`` is per period. ``returns`` are the tests', fold by fold, as float32: what is kept between two steps of
    the work must be small, and what is kept must be what is computed with.
    """

    train: tuple[float | None, ...]
    test: tuple[float | None, ...]
    benchmark: tuple[float | None, ...]
    sharpe: float | None
    returns: "tuple[NDArray[np.float32], ...]" = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The bars of a job: ``tape`` with those that are only looked at, ``bars`` those that are traded on."""

    job: Job
    tape: Tape
    bars: Arrays
    held: dict[tuple[range, ...], float | None] = field(default_factory=dict)
    """Buy-and-hold's score on ranges of rows, once computed."""

    @classmethod
    def of(cls, job: Job, columns: Columns) -> "Ground":
        """
        The ground of *job* on *columns*, which begin with its warm-up.

        Raises:
            PermanentError: these are not the bars that the job was made for.
            InvalidPayloadError: a number in them cannot be true.

        """
        traded = columns.closed[job.warmup :]
        if len(traded) != job.bars or (traded[0], traded[-1]) != job.minutes:
            raise PermanentError(
                f"bars: {len(traded)} are stored where there were {job.bars} when the backtest was asked for; "
                "ask for it again"
            )
        tape = Tape.of(columns)
        return cls(job=job, tape=tape, bars=tape.window(0, len(tape)).cut(job.warmup, len(tape)))

    @property
    def yearly(self) -> float:
        return periods_per_year(self.job.entry.interval)

    def marks(self, params: Params) -> "Marks":
        """
        What the strategy says of each bar that is traded on.

        Raises:
            InvalidPayloadError: there are fewer bars than it must see.

        """
        return Watcher.of(with_params(self.job.entry, params)).mark_all(self.tape).direction[self.job.warmup :]

    def returns(self, direction: "Marks", rows: Sequence[range]) -> "Floats":
        """Returns of following the marks on each of these ranges of rows, one after another."""
        import numpy as np

        parts = [self.bars.cut(one.start, one.stop) for one in rows]
        runs = [
            simulate(part, direction[one.start : one.stop], self.job.rules)
            for part, one in zip(parts, rows, strict=True)
        ]
        return np.concatenate([_curve(run, part).returns for run, part in zip(runs, parts, strict=True)])

    def score(self, direction: "Marks", rows: Sequence[range]) -> float | None:
        """The Sharpe ratio on these rows, a year; None where it is undefined."""
        return sharpe(self.returns(direction, rows), self.yearly).value

    def benchmark(self, rows: tuple[range, ...]) -> float | None:
        """Buy-and-hold's."""
        import numpy as np

        if rows not in self.held:
            parts = [self.bars.cut(one.start, one.stop) for one in rows]
            returns = [_curve(buy_and_hold(part, self.job.rules), part).returns for part in parts]
            self.held[rows] = sharpe(np.concatenate(returns), self.yearly).value
        return self.held[rows]

    def test(self, params: Params, folds: Sequence[Fold], before: int) -> Tested:
        """Try one variant on every fold, and on all rows before *before*, where the hold-out begins."""
        import numpy as np

        direction = self.marks(params)
        tests = [self.returns(direction, fold.test) for fold in folds]
        whole = sharpe(self.returns(direction, [range(before)]), 1.0).value
        return Tested(
            train=tuple(self.score(direction, fold.train) for fold in folds),
            test=tuple(sharpe(one, self.yearly).value for one in tests),
            benchmark=tuple(self.benchmark(fold.test) for fold in folds),
            sharpe=whole,
            returns=tuple(one.astype(np.float32) for one in tests) if _are_apart(folds) else (),
        )


def with_params(entry: Entry, params: Params) -> Entry:
    """The entry with other parameters, and the lookback that they need."""
    strategy = STRATEGIES[entry.strategy]
    chosen = strategy.params.model_validate(dict(params))
    gates = [gate.lookback for gate in entry.gates if isinstance(gate, StateGate)]
    return replace(entry, params=chosen.model_dump(), lookback=max([strategy.lookback(chosen), *gates]))


def longest_lookback(entry: Entry, candidates: Sequence[Params]) -> int:
    """The bars that the neediest variant must see."""
    return max(with_params(entry, params).lookback for params in candidates)


def folds_of(job: Job) -> tuple[Sequence[Fold], HoldOut]:
    """
    What a job's variants are judged on, and the rows that are kept for the end.

    Raises:
        InvalidPayloadError: that is more than the bars give; the text names the number.

    """
    validation = job.validation
    assert not isinstance(validation, NoValidation), "without a validation nothing is judged"  # noqa: S101
    purge, embargo = gaps(job)
    try:
        hold_out = HoldOut.last(job.bars, validation.hold_out)
        count = hold_out.rows.start - purge
        if isinstance(validation, WalkForward):
            test = validation.test_size or count // (validation.n_splits + 1)
            train = validation.train_size or count - validation.n_splits * test
            folds = walk_forward(
                count,
                train_size=train,
                test_size=test,
                step=validation.step,
                is_anchored=validation.is_anchored,
                purge=purge,
                embargo=embargo,
            )
        else:
            folds = combinatorial_purged(
                count,
                n_folds=validation.n_splits,
                n_test_folds=validation.n_test_folds,
                purge=purge,
                embargo=embargo,
            )
        return list(folds), hold_out
    except InvalidPayloadError as e:
        raise InvalidPayloadError(f"validation: {e}; the range has {job.bars} bars, hold-out included") from None


def gaps(job: Job) -> tuple[int, int]:
    """
    Purge and embargo in bars.

    Raises:
        InvalidPayloadError: one is shorter than an opinion lasts.

    """
    validation = job.validation
    if isinstance(validation, NoValidation):
        return 0, 0
    found = []
    for name, given in (("purge", validation.purge), ("embargo", validation.embargo)):
        if given is not None and given < job.label:
            raise InvalidPayloadError(
                f"validation.{name}: {given} bars; an opinion lasts {job.label}, so it must be at least that"
            )
        found.append(job.label if given is None else given)
    return found[0], found[1]


def chosen(ground: Ground, tested: Sequence[Tested], *, is_opened: bool = False) -> Choice:
    """
    The best variant of all that were tested, looked at once on the hold-out.

    Raises:
        HoldOutOpenedError: it was opened before.
        InvalidPayloadError: no variant has a score everywhere.

    """
    job = ground.job
    folds, hold_out = folds_of(job)
    hold_out.is_opened = is_opened
    scores: dict[tuple[str, tuple[range, ...]], Evaluation] = {}
    for params, one in zip(job.candidates, tested, strict=True):
        digest = params_digest(params)
        scores |= {(digest, fold.train): Evaluation(score=score) for fold, score in zip(folds, one.train, strict=True)}
        for place, fold in enumerate(folds):
            scores[digest, fold.test] = Evaluation(
                score=one.test[place],
                benchmark=one.benchmark[place],
                returns=one.returns[place].astype("float64") if one.returns else None,
            )

    def evaluate(params: Params, rows: tuple[range, ...]) -> Evaluation:
        if rows == (hold_out.rows,):
            return Evaluation(score=ground.score(ground.marks(params), rows), benchmark=ground.benchmark(rows))
        return scores[params_digest(params), rows]

    try:
        return choose(job.candidates, folds, evaluate, hold_out, purge=gaps(job)[0])
    except InvalidPayloadError as e:
        raise InvalidPayloadError(f"validation: {str(e).removeprefix('evaluate: ')}") from None


def sharpe_of(ground: Ground, params: Params) -> float | None:
    """A variant's Sharpe ratio per period over all bars."""
    return sharpe(ground.returns(ground.marks(params), [range(len(ground.bars))]), 1.0).value


def result_of(
    ground: Ground,
    *,
    trials: int,
    trial_sharpes: Sequence[float],
    choice: Choice | None = None,
    tested: Sequence[Tested] = (),
    points: int = POINTS,
    trades: int = TRADES,
) -> dict[str, Any]:
    """
    Everything that is said of a backtest, as JSON.

    *trials* is how many variants were ever tried on this series, this one included, *trial_sharpes* what they showed.
    """
    job, bars = ground.job, ground.bars
    params = dict(choice.params if choice else job.candidates[0])
    direction = ground.marks(params)
    run = simulate(bars, direction, job.rules)
    held = buy_and_hold(bars, job.rules)
    measured = measure(run, bars, interval=job.entry.interval)
    curves = _curve(run, bars), _curve(held, bars)
    strategy = STRATEGIES[job.strategy]
    gates = job.entry.gates
    numbers = len(strategy.params.model_fields) + sum(len(g.params) for g in gates if isinstance(g, StateGate))
    shown = _shown_trades(run.trades, bars, trades)
    findings = list(checks(run, bars, parameters=numbers, trials=max(trials, 1), trial_sharpes=trial_sharpes))
    if choice:
        findings.append(on_hold_out(choice.hold_out.score, choice.hold_out.benchmark))
    return {
        "entry": job.name,
        "strategy": f"{job.strategy}@{job.entry.version}",
        "title": strategy.title,
        "params": params,
        "gates": [gate.digest for gate in gates],
        "symbol": job.symbol,
        "interval": str(job.entry.interval),
        "range": _range_of(job, measured),
        "provenance": {"provider": job.provider, "adjustment": job.adjustment, "revision": job.revision},
        "rules": job.rules.model_dump(mode="json"),
        "assumptions": _assumptions(job, measured),
        "metrics": {name: _value(value) for name, value in measured.values.items()},
        "buy_and_hold": {name: _value(value) for name, value in measured.buy_and_hold.items()},
        "deflated_sharpe": _value(
            deflated_sharpe(curves[0].returns, trials=max(trials, 1), trial_sharpes=trial_sharpes)
        ),
        "variants": {"here": len(job.candidates), "ever": trials},
        "checks": [{"name": one.name, "is_passed": one.is_passed, "detail": one.detail} for one in findings],
        "validation": _validation(ground, choice, tested, direction) if choice else None,
        "marks": {"long": int((direction > 0).sum()), "short": int((direction < 0).sum())},
        "fills": {
            "count": run.fills,
            "stale": run.stale_fills,
            "unfilled": run.unfilled,
            "unsized": run.unsized,
            "ruined_at": _instant(bars.closed[run.ruined_at]) if run.ruined_at is not None else None,
        },
        "trades": {"count": len(run.trades), "left_out": len(run.trades) - len(shown), "items": shown},
        "curve": _points(run, held, bars, points),
        "months": _months(*curves),
    }


def _curve(run: Simulation, bars: Arrays) -> Curve:
    return Curve.of(run.equity, run.rules.cash, bars)


def _are_apart(folds: Sequence[Fold]) -> bool:
    """Whether no bar is in two tests, so that returns can be laid end to end."""
    tests = sorted((rows for fold in folds for rows in fold.test), key=lambda rows: rows.start)
    return all(one.stop <= other.start for one, other in pairwise(tests))


def _value(value: Value) -> dict[str, Any]:
    return {"value": value.value, "reason": value.reason}


def _instant(minute: int) -> str:
    return _text(instant_of(int(minute)))


def _text(instant: datetime) -> str:
    return f"{instant:%Y-%m-%dT%H:%M:%SZ}"


def _range_of(job: Job, measured: Measured) -> dict[str, Any]:
    return {
        "start": _text(measured.start),
        "end": _text(measured.end),
        "first_closed_at": _text(job.first),
        "last_closed_at": _text(job.last),
        "bars": job.bars,
        "warmup": job.warmup,
        "periods": measured.periods,
        "periods_per_year": measured.periods_per_year,
        "risk_free": measured.risk_free,
        "minimum_return": measured.minimum_return,
    }


def _assumptions(job: Job, measured: Measured) -> list[str]:
    """What was assumed, in sentences."""
    rules = job.rules
    fill = (
        "A mark is known at its bar's close and filled at the open of the next bar that was traded."
        if rules.fill == "next_open"
        else "Fills are at the mark's own close, which nobody can get: for comparison only."
    )
    size = (
        f"{rules.size.fraction:.0%} of equity in every trade."
        if rules.size.kind == "fixed"
        else f"Sized to a yearly volatility of {rules.size.target:.0%} over {rules.size.window} bars, "
        f"at most {rules.size.cap:.0%} of equity."
    )
    side = {"both": "Long and short.", "long": "Long only; a short mark sells.", "short": "Short only."}[rules.side]
    held = (
        f"A position is held until {rules.horizon} bars after its newest mark, or until an opposite mark."
        if rules.horizon
        else "A position is held until the opposite mark."
    )
    searched = (
        "Measures, curves and trades are of all bars, those that the parameters were chosen by included; nothing was "
        "chosen by the hold-out."
    )
    return [
        fill,
        f"Fee {rules.fee:.3%} and slippage {rules.slippage:.3%} of the value of every fill; borrowing costs nothing.",
        f"{side} {held}",
        size,
        f"Cash at the start: {rules.cash:,.2f}. Prices are split-adjusted to the last bar; dividends are not counted.",
        f"Returns are simple, per exchange day, mark to market, after costs: {measured.periods} of them.",
        f"A year has {measured.periods_per_year:g}; the risk-free rate is {measured.risk_free:.1%}.",
        "Buy-and-hold pays the same costs, is bought whole at the first fill and never sold.",
        *([] if isinstance(job.validation, NoValidation) else [searched]),
    ]


def _validation(ground: Ground, choice: Choice, tested: Sequence[Tested], direction: "Marks") -> dict[str, Any]:
    job, bars = ground.job, ground.bars
    purge, embargo = gaps(job)

    def spans(rows: Sequence[range]) -> list[list[str]]:
        return [[_instant(bars.closed[one.start]), _instant(bars.closed[one.stop - 1])] for one in rows]

    rows = folds_of(job)[1].rows
    part = bars.cut(rows.start, rows.stop)
    run, held = simulate(part, direction[rows.start : rows.stop], job.rules), buy_and_hold(part, job.rules)
    order = sorted(
        zip(choice.trials, tested, strict=True), key=lambda pair: -math.inf if pair[0].mean is None else -pair[0].mean
    )
    order.sort(key=lambda pair: pair[0].mean is None)
    return {
        **job.validation.model_dump(mode="json"),
        "objective": "sharpe",
        "purge": purge,
        "embargo": embargo,
        "folds": [
            {
                "train": spans(row.fold.train),
                "test": spans(row.fold.test),
                "train_bars": row.fold.trained_on,
                "test_bars": sum(map(len, row.fold.test)),
                "params": dict(row.params),
                "train_score": row.train_score,
                "test_score": row.test_score,
                "benchmark": row.benchmark,
                "is_beating": row.is_beating,
            }
            for row in choice.folds
        ],
        "mean": _value(choice.mean),
        "std": _value(choice.std),
        "worst": _value(choice.worst),
        "share_beating": choice.share_beating,
        "overfitting": _value(choice.overfitting),
        "hold_out": {
            "share": job.validation.hold_out if not isinstance(job.validation, NoValidation) else None,
            "first_closed_at": _instant(part.closed[0]),
            "last_closed_at": _instant(part.closed[-1]),
            "bars": len(part),
            "score": choice.hold_out.score,
            "benchmark": choice.hold_out.benchmark,
            "total_return": run.total_return,
            "buy_hold_return": held.total_return,
            "max_drawdown": _deepest(_curve(run, part)),
            "trade_count": int((~run.trades.is_open).sum()),
        },
        "variants": [{"params": dict(trial.params), "mean": trial.mean, "sharpe": one.sharpe} for trial, one in order],
    }


def _deepest(curve: Curve) -> float:
    return min((fall.depth for fall in drawdowns(curve.equity)), default=0.0)


def _shown_trades(trades: Trades, bars: Arrays, most: int) -> list[dict[str, Any]]:
    return [
        {
            "direction": "long" if trades.side[i] > 0 else "short",
            "marked_at": _instant(bars.closed[trades.mark_index[i]]),
            "entered_at": _instant((bars.closed if trades.entry_at_close[i] else bars.opened)[trades.entry_index[i]]),
            "exited_at": _instant((bars.closed if trades.exit_at_close[i] else bars.opened)[trades.exit_index[i]]),
            "is_open": bool(trades.is_open[i]),
            "bars_held": int(trades.bars_held[i]),
            **{name: float(getattr(trades, name)[i]) for name in _OF_A_TRADE},
        }
        for i in range(max(len(trades) - most, 0), len(trades))
    ]


_OF_A_TRADE = (
    *("entry_price", "exit_price", "size", "gross", "fees", "slippage", "net", "net_return"),
    *("mae", "mfe"),
)


def _points(run: Simulation, held: Simulation, bars: Arrays, most: int) -> dict[str, list[Any]]:
    """The curves as columns: at the start the cash, then at closes; of many bars those with the extremes."""
    import numpy as np

    kept = np.arange(len(bars))
    if len(bars) > most:
        edges = np.linspace(0, len(bars), max(most // 4, 1) + 1).astype(np.int64)
        found = {0, len(bars) - 1}
        for first, after in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            for values in (run.equity, bars.close):
                found |= {first + int(values[first:after].argmin()), first + int(values[first:after].argmax())}
        kept = np.array(sorted(found))
    return {
        "at": [_instant(bars.opened[0]), *(_instant(minute) for minute in bars.closed[kept])],
        "price": [float(bars.open[0]), *bars.close[kept].tolist()],
        "equity": [run.rules.cash, *run.equity[kept].tolist()],
        "buy_and_hold": [held.rules.cash, *held.equity[kept].tolist()],
    }


def _months(mine: Curve, held: Curve) -> list[dict[str, Any]]:
    return [
        {"year": year, "month": month, "total_return": value, "buy_hold_return": other}
        for (year, month, value), (_, _, other) in zip(monthly_returns(mine), monthly_returns(held), strict=True)
    ]
