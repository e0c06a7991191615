"""The result checks: what each finds, what it lets pass, and the statistics behind them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from shared.errors import InvalidPayloadError
from signals.logic.arrays import Arrays
from signals.logic.bootstrap import block_bootstrap, confidence, stationary_rows, usual_block
from signals.logic.checks import Finding, checks, deflated_sharpe, expected_best_sharpe, hac_mean, on_hold_out
from signals.logic.simulation import Rules, simulate


def bars_of(close, volume=1e5) -> Arrays:
    close = np.asarray(close, dtype=float)
    open_ = np.append(close[:1], close[:-1])
    minutes = 1440 * np.arange(len(close), dtype=np.int64)
    return Arrays(
        open=open_,
        high=np.maximum(open_, close),
        low=np.minimum(open_, close),
        close=close,
        volume=np.broadcast_to(np.asarray(volume, dtype=float), close.shape).copy(),
        opened=minutes + 870,
        closed=minutes + 1260,
    )


def judged(gains: Sequence[float], *, parameters: int = 2, trials: int = 1, **rules: Any) -> dict[str, Finding]:
    """Findings on a market in which each trade of two bars brings one of *gains*."""
    steps = np.repeat(np.asarray(gains) / 2, 2)
    close = 100 * np.cumprod(1 + np.append(0.0, steps))
    direction = np.tile([1, 0], len(gains) + 1)[: len(close)].astype(np.int8)
    chosen = {"fee": 0.0, "slippage": 0.0, "side": "long", "exit": "horizon", "horizon": 2} | rules
    bars = bars_of(close)
    done = simulate(bars, direction, Rules(**chosen))
    return {finding.name: finding for finding in checks(done, bars, parameters=parameters, trials=trials)}


STEADY = 0.01 + 0.01 * np.sin(np.arange(100))


def test_a_steady_gain_over_many_trades_passes() -> None:
    """What is broad, long and significant has nothing against it but that it is not better than holding."""
    found = judged(STEADY)

    assert [name for name, finding in found.items() if not finding.is_passed] in ([], ["behind_buy_and_hold"])
    assert all(finding.detail.endswith((".", "asked.")) for finding in found.values())


def test_few_trades_are_found() -> None:
    """Ten trades prove nothing, and two parameters are too many for them."""
    found = judged(STEADY[:10])

    assert not found["too_few_trades"].is_passed
    assert found["too_few_trades"].detail.startswith("10 trades closed")
    assert not found["too_many_parameters"].is_passed


def test_one_lucky_trade_is_found() -> None:
    """Ninety-nine small losses and one windfall: the sum is a gain and says nothing."""
    gains = np.full(100, -0.001)
    gains[50] = 1.0

    finding = judged(gains)["one_trade_luck"]

    assert not finding.is_passed
    assert "of 100 trades brought 100% of all gains" in finding.detail


def test_returns_around_nothing_are_insignificant() -> None:
    """A mean that could as well be 0 is told so, with t, p and a bootstrap interval."""
    finding = judged(0.02 * np.sin(np.arange(100) * 2.1))["insignificant_mean"]

    assert not finding.is_passed
    assert "Newey-West" in finding.detail
    assert "bootstrap 95 % interval" in finding.detail


def test_a_significant_loss_does_not_pass() -> None:
    """To lose reliably is no merit."""
    assert not judged(-STEADY)["insignificant_mean"].is_passed


def test_too_many_parameters_are_found_on_any_number_of_trades() -> None:
    """Eleven numbers can be bent to fit anything."""
    assert not judged(np.tile(STEADY, 2), parameters=11)["too_many_parameters"].is_passed
    assert judged(np.tile(STEADY, 2), parameters=10)["too_many_parameters"].is_passed


def test_stale_fills_are_found() -> None:
    """One fill after a bar without volume is enough to look twice."""
    volume = np.full(60, 5.0)
    volume[1] = 0
    bars = bars_of(np.linspace(100, 120, 60), volume)
    direction = np.zeros(60, dtype=np.int8)
    direction[0] = 1

    found = {f.name: f for f in checks(simulate(bars, direction, Rules()), bars, parameters=1)}

    assert not found["stale_fills"].is_passed
    assert found["stale_fills"].detail.startswith("1 of 1 fills")


def test_a_flat_curve_is_found() -> None:
    """A strategy that traded in one month of a year is judged by that month alone."""
    bars = bars_of(100 + np.sin(np.arange(100)))
    direction = np.zeros(100, dtype=np.int8)
    direction[[60, 80]] = 1, -1

    found = {f.name: f for f in checks(simulate(bars, direction, Rules(side="long")), bars, parameters=1)}

    assert not found["flat_curve"].is_passed
    assert "at most 61 of 100 periods" in found["flat_curve"].detail


def test_without_any_trade_nothing_is_believed() -> None:
    """What cannot be judged has not passed."""
    bars = bars_of([100.0] * 50)

    found = {f.name: f for f in checks(simulate(bars, np.zeros(50, dtype=np.int8), Rules()), bars, parameters=1)}

    failed = {name for name, finding in found.items() if not finding.is_passed}
    assert {"too_few_trades", "flat_curve", "one_trade_luck", "insignificant_mean", "deflated_sharpe"} <= failed


def test_ruin_is_found() -> None:
    """Nothing left is the first thing to be said."""
    bars = bars_of([10, 10, 30, 30])

    first = checks(simulate(bars, np.array([-1, 0, 0, 0], dtype=np.int8), Rules()), bars, parameters=1)[0]

    assert (first.name, first.is_passed) == ("ruined", False)
    assert "at bar 2" in first.detail


def test_less_than_buy_and_hold_is_found() -> None:
    """To trade for less than holding brings is said, with both figures."""
    assert not judged(np.full(60, 0.01), slippage=0.01)["behind_buy_and_hold"].is_passed


def test_many_tried_variants_deflate_a_result() -> None:
    """The same returns that pass as the only try fail as the best of a thousand."""
    gains = 0.0018 + 0.02 * np.sin(np.arange(300) * 2.1)

    alone, chosen = (judged(gains, trials=n)["deflated_sharpe"] for n in (1, 1000))

    assert alone.is_passed
    assert not chosen.is_passed
    assert "After 1000 variants" in chosen.detail


def test_the_best_of_lucky_trials_is_that_of_the_paper() -> None:
    """Bailey and López de Prado, 2014: 100 trials with a variance of 1/2 a year give 0.1132 a day."""
    assert expected_best_sharpe(100, math.sqrt(0.5 / 250)) == pytest.approx(0.1132, abs=5e-5)
    assert expected_best_sharpe(1, 0.05) == 0.0


def test_the_best_of_lucky_trials_is_what_chance_gives() -> None:
    """The formula is the mean maximum of as many normal draws."""
    best = np.random.default_rng(5).standard_normal((4000, 50)).max(axis=1).mean()

    assert expected_best_sharpe(50, 1.0) == pytest.approx(best, rel=0.02)


def test_no_trial_is_an_error() -> None:
    """The variant that is shown was tried."""
    with pytest.raises(InvalidPayloadError, match="trials: 0"):
        expected_best_sharpe(0, 1.0)


def test_a_measured_spread_of_trials_replaces_the_assumed_one() -> None:
    """Known Sharpe ratios of the trials are used; without them the reason says what was assumed."""
    returns = 0.001 + 0.01 * np.sin(np.arange(500) * 2.1)

    assumed = deflated_sharpe(returns, trials=20)
    alike = deflated_sharpe(returns, trials=20, trial_sharpes=[0.1, 0.1001] * 10)

    assert assumed.reason is not None
    assert alike.reason is None
    assert alike.value > assumed.value


def test_hanging_together_widens_the_error_of_a_mean() -> None:
    """Returns that come in runs carry less news: with lags t is smaller, without any it is the ordinary one."""
    rng = np.random.default_rng(3)
    values = 0.1 + np.repeat(rng.standard_normal(100), 5)

    plain, robust = hac_mean(values, lags=0), hac_mean(values, lags=8)

    assert plain.t == pytest.approx(values.mean() / (values.std() / math.sqrt(500)))
    assert robust.t < plain.t
    assert hac_mean(np.full(50, 0.01)) is None


def test_the_robust_error_is_the_sum_of_weighted_covariances() -> None:
    """Newey and West's estimator written out term by term."""
    values = np.random.default_rng(4).standard_normal(60).cumsum()
    away = values - values.mean()
    covariance = [sum(away[i] * away[i - lag] for i in range(lag, 60)) / 60 for lag in range(4)]
    variance = covariance[0] + 2 * sum((1 - lag / 4) * covariance[lag] for lag in (1, 2, 3))

    assert hac_mean(values, lags=3).t == pytest.approx(values.mean() / math.sqrt(variance / 60))


def test_a_bootstrap_repeats_itself() -> None:
    """The same values and the same seed give the same replicas; another seed gives others."""
    values = np.arange(30.0)

    def run(seed: int) -> list[float]:
        return block_bootstrap(values, lambda rows: rows.mean(axis=1), replicas=20, seed=seed).tolist()

    assert run(1) == run(1) != run(2)


def test_blocks_have_the_length_that_was_asked_for() -> None:
    """Rows follow one another in blocks whose mean length is the one given, wrapped at the end."""
    rows = stationary_rows(400, 200, block=10, rng=np.random.default_rng(1))

    follows = (rows[:, 1:] - rows[:, :-1]) % 400 == 1
    assert rows.min() >= 0
    assert rows.max() < 400
    assert 1 / (1 - follows.mean()) == pytest.approx(10, rel=0.1)


def test_independent_values_bootstrap_to_the_ordinary_error() -> None:
    """With blocks of one the spread of the mean is the deviation over √n, and its interval holds the mean."""
    values = np.random.default_rng(2).standard_normal(400)

    found = block_bootstrap(values, lambda rows: rows.mean(axis=1), block=1, replicas=3000)

    assert found.std() == pytest.approx(values.std() / 20, rel=0.06)
    span = confidence(found)
    assert span.low < values.mean() < span.high
    assert span.above_zero == (found > 0).mean()


def test_nothing_cannot_be_resampled() -> None:
    """No values, or a block of no length, are errors."""
    with pytest.raises(InvalidPayloadError, match="values"):
        block_bootstrap(np.zeros(0), lambda rows: rows.mean(axis=1))
    with pytest.raises(InvalidPayloadError, match="block"):
        block_bootstrap(np.ones(5), lambda rows: rows.mean(axis=1), block=0)
    assert usual_block(1000) == 10


@pytest.mark.parametrize(
    ("score", "benchmark", "is_passed", "said"),
    [
        (1.2, 0.9, True, "Sharpe ratio 1.20 on the hold-out, buy-and-hold 0.90"),
        (-0.13, 0.87, False, "Sharpe ratio -0.13 on the hold-out"),
        (0.9, 0.9, False, "buy-and-hold 0.90"),
        (None, 0.9, False, "its Sharpe ratio on the hold-out is undefined"),
        (0.9, None, False, "buy-and-hold's Sharpe ratio on the hold-out is undefined"),
    ],
)
def test_what_was_chosen_must_do_better_than_holding_where_nothing_was_chosen_by(
    score: float | None, benchmark: float | None, is_passed: bool, said: str
) -> None:
    """What cannot be judged there has not passed."""
    found = on_hold_out(score, benchmark)

    assert (found.name, found.is_passed) == ("behind_on_hold_out", is_passed)
    assert said in found.detail
