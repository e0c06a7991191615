"""
Choosing parameters without fooling oneself: walk-forward, purged folds, a hold-out that is opened once. Pure.

The label of row i lasts from i to ``label_end[i]``, both included: it is the time within which the outcome of a
decision at i becomes known (``i + purge`` where no ends are given). A training row is dropped when its label overlaps
the test span, which lasts from the first test row to the last test label's end; ``embargo`` more rows behind that end
are dropped too. The gap shortens training, never the test. López de Prado, Advances in Financial Machine Learning,
2018, chapters 7 and 12.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from shared.errors import InvalidPayloadError, PermanentError
from signals.logic.metrics import Value

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]
    type Ints = NDArray[np.int64]
    type Bools = NDArray[np.bool_]

BLOCKS = 16
"""Blocks into which combinatorially symmetric cross-validation cuts time, as its authors did: 12,870 ways."""


class HoldOutOpenedError(PermanentError):
    """The hold-out was looked at before: what it says now is no longer news."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Rows to learn from and rows to be judged on, as ranges in order."""

    train: tuple[range, ...]
    test: tuple[range, ...]

    @property
    def trained_on(self) -> int:
        """How many rows are learned from."""
        return sum(map(len, self.train))


def walk_forward(
    count: int,
    *,
    train_size: int,
    test_size: int,
    step: int | None = None,
    is_anchored: bool = False,
    purge: int = 0,
    embargo: int = 0,
    label_end: Sequence[int] | None = None,
) -> Iterator[Fold]:
    """
    Folds that learn from the past and are judged on what follows, moving on by *step* (a test's length).

    Rolling training has ``train_size`` rows before the gap, anchored training all rows from the first. A last test
    that would be shorter is left out. Training lies before its test, so an embargo drops nothing here.

    Raises:
        InvalidPayloadError: there is no such fold, or nothing is left to learn from; the text names the number.

    """
    _at_least(1, train_size=train_size, test_size=test_size, step=test_size if step is None else step)
    if train_size + test_size > count:
        raise InvalidPayloadError(f"train_size ({train_size}) and test_size ({test_size}) exceed the {count} rows")
    ends = _label_ends(count, purge, embargo, label_end)
    for start in range(train_size, count - test_size + 1, test_size if step is None else step):
        first = 0 if is_anchored else start - train_size
        yield _fold(range(first, start), (range(start, start + test_size),), ends, embargo)


def purged_kfold(
    count: int, *, n_splits: int, purge: int = 0, embargo: int = 0, label_end: Sequence[int] | None = None
) -> Iterator[Fold]:
    """
    Each of *n_splits* blocks of rows once as the test, learning from what is left of all others.

    Raises:
        InvalidPayloadError: too few or too many splits, or nothing is left to learn from.

    """
    yield from combinatorial_purged(
        count, n_folds=n_splits, n_test_folds=1, purge=purge, embargo=embargo, label_end=label_end
    )


def combinatorial_purged(
    count: int,
    *,
    n_folds: int,
    n_test_folds: int,
    purge: int = 0,
    embargo: int = 0,
    label_end: Sequence[int] | None = None,
) -> Iterator[Fold]:
    """
    Every choice of *n_test_folds* of *n_folds* blocks as the test, learning from what is left of the others.

    Raises:
        InvalidPayloadError: the numbers of folds make no sense, or nothing is left to learn from.

    """
    if not 2 <= n_folds <= count:
        raise InvalidPayloadError(f"n_folds ({n_folds}) must be 2 to the number of rows, which is {count}")
    if not 1 <= n_test_folds < n_folds:
        raise InvalidPayloadError(f"n_test_folds ({n_test_folds}) must be 1 to {n_folds - 1}, one less than n_folds")
    ends = _label_ends(count, purge, embargo, label_end)
    edges = [count * one // n_folds for one in range(n_folds + 1)]
    blocks = [range(first, after) for first, after in pairwise(edges)]
    for chosen in combinations(blocks, n_test_folds):
        yield _fold(range(count), _joined(chosen), ends, embargo)


class HoldOut:
    """The last rows, kept for one look at the end."""

    def __init__(self, rows: range, *, is_opened: bool = False) -> None:
        self.rows = rows
        self.is_opened = is_opened

    @classmethod
    def last(cls, count: int, share: float = 0.2) -> "HoldOut":
        """
        The last *share* of *count* rows.

        Raises:
            InvalidPayloadError: that leaves nothing on one side.

        """
        first = count - round(count * share)
        if not 0 < first < count:
            raise InvalidPayloadError(f"share ({share}) of {count} rows must leave rows on both sides")
        return cls(range(first, count))

    def open(self) -> range:
        """
        The rows, once.

        Raises:
            HoldOutOpenedError: it was opened before.

        """
        if self.is_opened:
            raise HoldOutOpenedError(
                f"the hold-out of rows {self.rows.start} to {self.rows.stop - 1} was opened before; "
                "wait for newer bars to judge on"
            )
        self.is_opened = True
        return self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How parameters did on some rows: the objective (None: undefined), buy-and-hold's, and the returns."""

    score: float | None
    benchmark: float | None = None
    returns: "Floats | None" = None


type Params = Mapping[str, float]
type Evaluate = Callable[[Params, tuple[range, ...]], Evaluation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One variant that was tried, with its scores fold by fold."""

    params: Params
    train_scores: tuple[float | None, ...]
    test_scores: tuple[float | None, ...]

    @property
    def mean(self) -> float | None:
        """Mean score over the tests; None where it was undefined in one."""
        return _mean(self.test_scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRow:
    """What one fold taught: the variant that was best in training, and how it did in the test."""

    fold: Fold
    params: Params
    train_score: float
    test_score: float | None
    benchmark: float | None

    @property
    def is_beating(self) -> bool:
        """Whether it did better than buy-and-hold; where either is undefined it did not."""
        return self.test_score is not None and self.benchmark is not None and self.test_score > self.benchmark


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """
    The chosen parameters with everything that was tried to find them.

    ``mean``, ``std`` (ddof 1) and ``worst`` are of the folds' test scores: of the procedure, each fold choosing by its
    own training. ``overfitting`` is the probability that the best variant of the past is below the median of the
    future.
    """

    params: Params
    trials: tuple[Trial, ...]
    folds: tuple[FoldRow, ...]
    mean: Value
    std: Value
    worst: Value
    share_beating: float
    overfitting: Value
    hold_out: Evaluation


def choose(
    candidates: Sequence[Params],
    folds: Sequence[Fold],
    evaluate: Evaluate,
    hold_out: HoldOut,
    *,
    purge: int = 0,
) -> Choice:
    """
    Try every candidate on every fold, take the one with the best mean test score, look at the hold-out with it once.

    *purge* is the label's length in rows: what is chosen from must end that long before the hold-out.

    Raises:
        InvalidPayloadError: there is no candidate or fold, two candidates are equal, a fold reaches into the hold-out,
            or no candidate has a score everywhere.
        HoldOutOpenedError: the hold-out was opened before; nothing was evaluated.

    """
    _choosable(candidates, folds, hold_out, purge)
    trained = [[evaluate(params, fold.train).score for fold in folds] for params in candidates]
    tested = [[evaluate(params, fold.test) for fold in folds] for params in candidates]
    trials = tuple(
        Trial(params=params, train_scores=tuple(map(_real, past)), test_scores=tuple(_real(one.score) for one in later))
        for params, past, later in zip(candidates, trained, tested, strict=True)
    )
    rows = tuple(_fold_row(fold, place, trials, tested) for place, fold in enumerate(folds))
    judged = [trial for trial in trials if trial.mean is not None]
    if not judged:
        raise InvalidPayloadError("evaluate: no candidate has a score on every fold; use longer tests")
    best = max(judged, key=lambda trial: trial.mean or 0.0)
    scores = [row.test_score for row in rows]
    mean = _mean(scores)
    known = [score for score in scores if score is not None]
    undefined = "a fold has no score"
    return Choice(
        params=best.params,
        trials=trials,
        folds=rows,
        mean=Value(mean, None if mean is not None else undefined),
        std=_deviation(known) if mean is not None else Value(None, undefined),
        worst=Value(min(known)) if mean is not None else Value(None, undefined),
        share_beating=sum(row.is_beating for row in rows) / len(rows),
        overfitting=_overfitting(folds, tested),
        hold_out=evaluate(best.params, (hold_out.open(),)),
    )


def overfitting_probability(returns: "Floats", blocks: int = BLOCKS) -> Value:
    """
    PBO: how often the variant with the best Sharpe ratio in one half of time is at or below the median in the other.

    *returns* has a row a period and a column a variant; time is cut into *blocks*, and every half of them is tried.
    Bailey, Borwein, López de Prado and Zhu, The Probability of Backtest Overfitting, 2017 (CSCV).

    Raises:
        InvalidPayloadError: *blocks* is not even, or returns are not a table of numbers.

    """
    import numpy as np

    if blocks < 2 or blocks % 2:
        raise InvalidPayloadError(f"blocks ({blocks}) must be even and at least 2")
    if returns.ndim != 2 or not np.isfinite(returns).all():
        raise InvalidPayloadError("returns: must be a table of finite numbers, a row a period, a column a variant")
    periods, variants = returns.shape
    if variants < 2:
        return Value(None, f"needs 2 variants, has {variants}")
    if periods < 2 * blocks:
        return Value(None, f"needs {2 * blocks} returns, has {periods}")
    edges = [periods * one // blocks for one in range(blocks)]
    away = returns - returns.mean(axis=0)
    lengths = np.diff([*edges, periods]).astype(np.float64)
    sums = np.add.reduceat(returns, edges)
    shifted, squares = np.add.reduceat(away, edges), np.add.reduceat(away**2, edges)
    chosen = np.zeros((math.comb(blocks, blocks // 2), blocks))
    for row, half in enumerate(combinations(range(blocks), blocks // 2)):
        chosen[row, list(half)] = 1.0

    def sharpes(picked: "Floats") -> "Floats":
        size = (picked @ lengths)[:, np.newaxis]
        variance = (picked @ squares) / size - ((picked @ shifted) / size) ** 2
        moves = variance > 1e-26 * max(float(np.abs(returns).max()) ** 2, 1e-300)
        return np.divide(
            (picked @ sums) / size, np.sqrt(np.maximum(variance, 0.0)), out=np.zeros_like(variance), where=moves
        )

    past, future = sharpes(chosen), sharpes(1.0 - chosen)
    best = past.argmax(axis=1)
    found = future[np.arange(len(best)), best][:, np.newaxis]
    rank = (future < found).sum(axis=1) + ((future == found).sum(axis=1) + 1) / 2
    return Value(float((rank / (variants + 1) <= 0.5).mean()))


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise InvalidPayloadError(f"{name} ({number}) must be at least {least}")


def _label_ends(count: int, purge: int, embargo: int, label_end: Sequence[int] | None) -> "Ints":
    import numpy as np

    _at_least(0, purge=purge, embargo=embargo)
    rows = np.arange(count)
    if label_end is None:
        return rows + purge
    ends = np.asarray(label_end, dtype=np.int64)
    if ends.shape != (count,):
        raise InvalidPayloadError(f"label_end: {len(ends)} ends for {count} rows; give one a row")
    if (ends < rows).any():
        early = int(np.argmax(ends < rows))
        raise InvalidPayloadError(f"label_end: the label of row {early} ends before it, at {ends[early]}")
    return np.maximum(ends, rows + purge)


def _fold(candidates: range, tests: Sequence[range], ends: "Ints", embargo: int) -> Fold:
    import numpy as np

    rows = np.arange(len(ends))
    kept = (rows >= candidates.start) & (rows < candidates.stop)
    for test in tests:
        last = int(ends[test.start : test.stop].max())
        kept &= (ends < test.start) | (rows > last + embargo)
        kept[test.start : test.stop] = False
    if not kept.any():
        raise InvalidPayloadError(
            f"purge and embargo leave no rows to learn from beside the test rows {tests[0].start} to "
            f"{tests[-1].stop - 1}: make training longer or labels shorter"
        )
    return Fold(train=_ranges(kept), test=tuple(tests))


def _ranges(kept: "Bools") -> tuple[range, ...]:
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(np.int8))).tolist()
    return tuple(range(first, after) for first, after in zip(edges[::2], edges[1::2], strict=True))


def _joined(blocks: Sequence[range]) -> tuple[range, ...]:
    """Neighbouring ranges as one."""
    joined = [blocks[0]]
    for block in blocks[1:]:
        if joined[-1].stop == block.start:
            joined[-1] = range(joined[-1].start, block.stop)
        else:
            joined.append(block)
    return tuple(joined)


def _choosable(candidates: Sequence[Params], folds: Sequence[Fold], hold_out: HoldOut, purge: int) -> None:
    if not candidates or not folds:
        raise InvalidPayloadError("candidates and folds: there must be at least one of each")
    if len({tuple(sorted(params.items())) for params in candidates}) < len(candidates):
        raise InvalidPayloadError("candidates: two are equal; a variant that is tried twice would be counted twice")
    if hold_out.is_opened:
        hold_out.open()
    last = max(rows.stop for fold in folds for rows in (*fold.train, *fold.test))
    if last + purge > hold_out.rows.start:
        raise InvalidPayloadError(
            f"folds: they reach to row {last - 1}, with labels to {last - 1 + purge}, into the hold-out, "
            f"which begins at {hold_out.rows.start}"
        )


def _fold_row(fold: Fold, place: int, trials: Sequence[Trial], tested: Sequence[Sequence[Evaluation]]) -> FoldRow:
    scores = [trial.train_scores[place] for trial in trials]
    known = [(score, one) for one, score in enumerate(scores) if score is not None]
    if not known:
        raise InvalidPayloadError(f"evaluate: no candidate has a score in the training of fold {place}")
    score, best = max(known, key=lambda found: found[0])
    return FoldRow(
        fold=fold,
        params=trials[best].params,
        train_score=score,
        test_score=trials[best].test_scores[place],
        benchmark=_real(tested[best][place].benchmark),
    )


def _overfitting(folds: Sequence[Fold], tested: Sequence[Sequence[Evaluation]]) -> Value:
    import numpy as np

    tests = sorted((rows for fold in folds for rows in fold.test), key=lambda rows: rows.start)
    if any(later.start < earlier.stop for earlier, later in pairwise(tests)):
        return Value(None, "tests overlap, so no half of time would be apart from the other")
    columns = []
    for evaluations in tested:
        parts = [one.returns for one in evaluations if one.returns is not None]
        if len(parts) < len(evaluations):
            return Value(None, "evaluations carry no returns")
        columns.append(np.concatenate(parts))
    if len({len(column) for column in columns}) > 1:
        return Value(None, "variants have returns of different lengths")
    return overfitting_probability(np.column_stack(columns))


def _real(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None


def _deviation(scores: Sequence[float]) -> Value:
    if len(scores) < 2:
        return Value(None, "there is one fold only")
    mean = sum(scores) / len(scores)
    return Value(math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)))
