"""Folds that leak nothing, a hold-out that opens once, and a choice that remembers all it tried."""

import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.errors import InvalidPayloadError
from signals.logic.metrics import Value
from signals.logic.validation import (
    Choice,
    Evaluation,
    Fold,
    HoldOut,
    HoldOutOpenedError,
    choose,
    combinatorial_purged,
    overfitting_probability,
    purged_kfold,
    walk_forward,
)


def rows_of(ranges: tuple[range, ...]) -> list[int]:
    return [row for one in ranges for row in one]


@st.composite
def labelled(draw: st.DrawFn) -> tuple[int, list[int] | None, int, int]:
    """A number of rows, how long each label lasts, purge and embargo."""
    count = draw(st.integers(4, 40))
    ends = draw(st.none() | st.lists(st.integers(0, 6), min_size=count, max_size=count))
    label_end = None if ends is None else [row + more for row, more in enumerate(ends)]
    return count, label_end, draw(st.integers(0, 4)), draw(st.integers(0, 4))


def should_train(fold: Fold, candidates: range, labels: tuple[int, list[int] | None, int, int]) -> list[int]:
    """By the definition, row by row: no label overlaps a test span, and none begins in an embargo."""
    count, label_end, purge, embargo = labels
    ends = [max(row + purge, label_end[row] if label_end else row) for row in range(count)]
    tests = set(rows_of(fold.test))
    kept = []
    for row in candidates:
        fine = row not in tests
        for test in fold.test:
            last = max(ends[t] for t in test)
            overlaps = row <= last and ends[row] >= test.start
            fine = fine and not overlaps and not last < row <= last + embargo
        if fine:
            kept.append(row)
    return kept


@given(labels=labelled(), data=st.data())
def test_walk_forward_drops_exactly_what_leaks(labels, data: st.DataObject) -> None:
    """Training is all rows before the test whose labels end before it; the test is whole, wherever the gap is."""
    count, label_end, purge, embargo = labels
    train_size = data.draw(st.integers(1, count - 1))
    test_size = data.draw(st.integers(1, count - train_size))
    step = data.draw(st.none() | st.integers(1, 5))
    anchored = data.draw(st.booleans())

    try:
        folds = list(
            walk_forward(
                count,
                train_size=train_size,
                test_size=test_size,
                step=step,
                is_anchored=anchored,
                purge=purge,
                embargo=embargo,
                label_end=label_end,
            )
        )
    except InvalidPayloadError as e:
        assert "leave no rows" in str(e)  # noqa: PT017 - either the folds or a sentence that helps
        return

    starts = list(range(train_size, count - test_size + 1, step or test_size))
    assert [fold.test for fold in folds] == [(range(start, start + test_size),) for start in starts]
    for fold, start in zip(folds, starts, strict=True):
        candidates = range(0 if anchored else start - train_size, start)
        assert rows_of(fold.train) == should_train(fold, candidates, labels)
        assert max(rows_of(fold.train)) < start


@given(labels=labelled(), data=st.data())
def test_purged_folds_drop_exactly_what_leaks(labels, data: st.DataObject) -> None:
    """On both sides of every test span, whatever the labels, and not a row more."""
    count, label_end, purge, embargo = labels
    n_folds = data.draw(st.integers(2, min(6, count)))
    n_test_folds = data.draw(st.integers(1, n_folds - 1))

    try:
        folds = list(
            combinatorial_purged(
                count,
                n_folds=n_folds,
                n_test_folds=n_test_folds,
                purge=purge,
                embargo=embargo,
                label_end=label_end,
            )
        )
    except InvalidPayloadError:
        assume(False)

    assert len(folds) == math.comb(n_folds, n_test_folds)
    for fold in folds:
        assert rows_of(fold.train) == should_train(fold, range(count), labels)
    tested = sorted(row for fold in folds for row in rows_of(fold.test))
    assert tested == sorted(list(range(count)) * math.comb(n_folds - 1, n_test_folds - 1))


def test_a_purge_shortens_training_and_never_the_test() -> None:
    """With and without a gap the tests are the same; the gap is cut from the training's end."""
    plain, purged = (list(walk_forward(20, train_size=8, test_size=4, purge=n)) for n in (0, 3))

    assert [fold.test for fold in plain] == [fold.test for fold in purged]
    assert (plain[0].train, purged[0].train) == ((range(8),), (range(5),))


def test_an_embargo_drops_rows_behind_a_test() -> None:
    """Where training resumes after a test, its echo is left out."""
    middle = list(purged_kfold(12, n_splits=3, purge=1, embargo=2))[1]

    assert (middle.train, middle.test) == ((range(3), range(11, 12)), (range(4, 8),))


def test_a_gap_that_leaves_nothing_is_an_error() -> None:
    """It says what to change instead of learning from nothing."""
    with pytest.raises(InvalidPayloadError, match="make training longer or labels shorter"):
        list(walk_forward(20, train_size=4, test_size=4, purge=4))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: walk_forward(10, train_size=0, test_size=2), "train_size"),
        (lambda: walk_forward(10, train_size=5, test_size=6), "test_size"),
        (lambda: walk_forward(10, train_size=5, test_size=2, step=0), "step"),
        (lambda: walk_forward(10, train_size=5, test_size=2, purge=-1), "purge"),
        (lambda: walk_forward(10, train_size=5, test_size=2, embargo=-1), "embargo"),
        (lambda: walk_forward(3, train_size=1, test_size=1, label_end=[0, 1]), "label_end"),
        (lambda: walk_forward(3, train_size=1, test_size=1, label_end=[0, 0, 2]), "label of row 1"),
        (lambda: purged_kfold(10, n_splits=1), "n_folds"),
        (lambda: combinatorial_purged(10, n_folds=4, n_test_folds=4), "n_test_folds"),
    ],
)
def test_folds_that_make_no_sense_name_the_number(call, named: str) -> None:
    """The error names the field that is wrong."""
    with pytest.raises(InvalidPayloadError, match=named):
        list(call())


def test_a_hold_out_opens_once() -> None:
    """A second look is refused, because its answer would be chosen by the first."""
    kept = HoldOut.last(100, share=0.2)

    assert kept.open() == range(80, 100)
    with pytest.raises(HoldOutOpenedError, match="rows 80 to 99 was opened before"):
        kept.open()
    with pytest.raises(InvalidPayloadError, match="share"):
        HoldOut.last(3, share=0.01)


class Market:
    """Scores by parameter and row, and a memory of what was asked."""

    def __init__(self, count: int = 200, variants: int = 3) -> None:
        rng = np.random.default_rng(8)
        self.returns = 0.01 * rng.standard_normal((count, variants))
        self.returns[:, 1] += 0.004
        self.asked: list[tuple[float, tuple[range, ...]]] = []

    def evaluate(self, params: Mapping[str, float], rows: tuple[range, ...]) -> Evaluation:
        self.asked.append((params["n"], rows))
        returns = self.returns[rows_of(rows), int(params["n"])]
        return Evaluation(score=float(returns.mean()), benchmark=0.0, returns=returns)


def chosen_from(market: Market, variants: int = 3) -> Choice:
    candidates = [{"n": float(n)} for n in range(variants)]
    folds = list(walk_forward(160, train_size=40, test_size=20))
    return choose(candidates, folds, market.evaluate, HoldOut(range(160, 200)))


def test_the_better_variant_is_chosen_and_every_trial_recorded() -> None:
    """The one with an edge wins; all that were tried are there, with their scores on every fold."""
    choice = chosen_from(Market())

    assert choice.params == {"n": 1.0}
    assert [trial.params["n"] for trial in choice.trials] == [0.0, 1.0, 2.0]
    assert {len(trial.test_scores) for trial in choice.trials} == {6}
    assert choice.hold_out.returns is not None
    assert len(choice.hold_out.returns) == 40


def test_the_hold_out_is_looked_at_once_and_last() -> None:
    """Nothing but the chosen variant sees it, after everything else was decided."""
    market = Market()

    chosen_from(market)

    seen = [(n, rows) for n, rows in market.asked if any(one.stop > 160 for one in rows)]
    assert seen == [(1.0, (range(160, 200),))] == market.asked[-1:]


def test_a_second_search_on_an_opened_hold_out_evaluates_nothing() -> None:
    """It is refused before anything is tried."""
    market, kept = Market(), HoldOut(range(160, 200))
    kept.open()

    with pytest.raises(HoldOutOpenedError):
        choose([{"n": 0.0}], list(walk_forward(160, train_size=40, test_size=20)), market.evaluate, kept)
    assert market.asked == []


def test_the_table_of_folds_chooses_by_training_alone() -> None:
    """Each fold takes what was best in its past; mean, deviation, worst and share are of what came after."""
    market = Market()

    choice = chosen_from(market)

    scores = []
    for row in choice.folds:
        past = market.returns[rows_of(row.fold.train)].mean(axis=0)
        assert row.params["n"] == past.argmax()
        assert row.train_score == pytest.approx(past.max())
        scores.append(market.returns[rows_of(row.fold.test), int(row.params["n"])].mean())
    assert [row.test_score for row in choice.folds] == pytest.approx(scores)
    assert choice.mean.value == pytest.approx(np.mean(scores))
    assert choice.std.value == pytest.approx(np.std(scores, ddof=1))
    assert choice.worst.value == pytest.approx(min(scores))
    assert choice.share_beating == np.mean(np.array(scores) > 0)


def test_the_choice_says_how_likely_it_is_overfitted() -> None:
    """With returns of several variants the probability is there; with one it says why not."""
    assert chosen_from(Market()).overfitting.value is not None
    assert chosen_from(Market(), variants=1).overfitting == Value(None, "needs 2 variants, has 1")


def test_overlapping_tests_have_no_probability_of_overfitting() -> None:
    """Combinatorial folds test a row many times, so time cannot be cut in two by them."""
    folds = list(combinatorial_purged(160, n_folds=4, n_test_folds=2))

    choice = choose([{"n": 0.0}, {"n": 1.0}], folds, Market().evaluate, HoldOut(range(160, 200)))

    assert choice.overfitting.value is None
    assert "overlap" in choice.overfitting.reason


@pytest.mark.parametrize(
    ("candidates", "folds", "purge", "said"),
    [
        ([], list(walk_forward(160, train_size=40, test_size=20)), 0, "at least one of each"),
        ([{"n": 1.0}], [], 0, "at least one of each"),
        ([{"n": 1.0}, {"n": 1.0}], list(walk_forward(160, train_size=40, test_size=20)), 0, "two are equal"),
        ([{"n": 1.0}], list(walk_forward(180, train_size=40, test_size=20)), 0, "into the hold-out"),
        ([{"n": 1.0}], list(walk_forward(160, train_size=40, test_size=20)), 1, "into the hold-out"),
    ],
)
def test_a_search_that_would_fool_us_is_refused(candidates, folds, purge: int, said: str) -> None:
    """No candidates, doubled ones, or folds whose labels reach into the hold-out."""
    with pytest.raises(InvalidPayloadError, match=said):
        choose(candidates, folds, Market().evaluate, HoldOut(range(160, 200)), purge=purge)


def test_a_variant_without_a_score_is_never_chosen() -> None:
    """Undefined is not good; it is kept in the record all the same."""
    market = Market()

    def evaluate(params: Mapping[str, float], rows: tuple[range, ...]) -> Evaluation:
        return Evaluation(score=math.nan) if params["n"] == 1 else market.evaluate(params, rows)

    folds = list(walk_forward(160, train_size=40, test_size=20))
    choice = choose([{"n": float(n)} for n in range(3)], folds, evaluate, HoldOut(range(160, 200)))

    assert choice.params["n"] != 1
    assert choice.trials[1].mean is None
    with pytest.raises(InvalidPayloadError, match="no candidate has a score"):
        choose([{"n": 1.0}], folds, evaluate, HoldOut(range(160, 200)))


def slow_probability(returns: np.ndarray, blocks: int) -> float:
    """The paper's steps, one split at a time."""
    parts = [np.arange(len(returns) * b // blocks, len(returns) * (b + 1) // blocks) for b in range(blocks)]
    logits = []
    for half in combinations(range(blocks), blocks // 2):
        past = np.concatenate([parts[b] for b in half])
        future = np.concatenate([parts[b] for b in range(blocks) if b not in half])
        here, there = (returns[rows].mean(axis=0) / returns[rows].std(axis=0) for rows in (past, future))
        rank = (there <= there[here.argmax()]).sum() / (returns.shape[1] + 1)
        logits.append(math.log(rank / (1 - rank)))
    return float(np.mean(np.array(logits) <= 0))


@pytest.mark.parametrize("variants", [2, 5, 12])
def test_the_probability_of_overfitting_is_that_of_its_paper(variants: int) -> None:
    """The matrix form gives what the steps of the paper give one by one."""
    returns = 0.01 * np.random.default_rng(variants).standard_normal((101, variants))

    assert overfitting_probability(returns, blocks=6).value == pytest.approx(slow_probability(returns, 6))


def test_noise_is_overfitted_and_an_edge_is_not() -> None:
    """The best of many variants without skill is a coin toss later; one with a clear edge stays ahead."""
    rng = np.random.default_rng(11)
    noise = 0.01 * rng.standard_normal((600, 20))
    edge = noise.copy()
    edge[:, 7] += 0.006

    assert overfitting_probability(noise, blocks=8).value > 0.2
    assert overfitting_probability(edge, blocks=8).value == 0.0


def test_the_probability_needs_a_table_of_numbers() -> None:
    """Odd blocks and missing numbers are errors, too few returns a reason."""
    with pytest.raises(InvalidPayloadError, match="blocks"):
        overfitting_probability(np.ones((50, 2)), blocks=5)
    with pytest.raises(InvalidPayloadError, match="returns"):
        overfitting_probability(np.full((50, 2), np.nan))
    assert overfitting_probability(np.ones((20, 2))).reason == "needs 32 returns, has 20"
