"""
What speaks against believing a backtest, in words. Pure.

The list is Lean's (too few trades, stale fills, luck, insignificant returns, too many parameters, flat curves, nothing
left, behind the benchmark); how each is judged is ours. What cannot be judged has not passed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.errors import InvalidPayloadError
from signals.logic.arrays import Arrays
from signals.logic.bootstrap import block_bootstrap, confidence
from signals.logic.metrics import Curve, Value, longest_run, normal_cdf, probabilistic_sharpe
from signals.logic.simulation import Simulation, buy_and_hold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]

ENOUGH_TRADES = 30
TRADES_A_PARAMETER = 10
MOST_PARAMETERS = 10
BEST_SHARE = 0.05
"""Share of the trades, at least one, without which there must still be a gain."""
LUCK = 0.9
"""Share of resampled orders of trades that must end with a gain."""
FLAT_SHARE = 0.25
SIGNIFICANT = 1.96
SURE = 0.95
EULER = 0.5772156649015329


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check, whether it passed, and why, for a person to read."""

    name: str
    is_passed: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean with its t statistic against 0, robust to changing variance and to returns that hang together."""

    mean: float
    t: float
    p: float
    lags: int


def checks(
    simulation: Simulation,
    bars: Arrays,
    *,
    parameters: int,
    trials: int = 1,
    trial_sharpes: Sequence[float] = (),
    seed: int = 2014,
) -> Sequence[Finding]:
    """
    Every check of *simulation*, which ran over *bars*.

    *parameters* is how many numbers of the strategy could have been chosen otherwise, *trials* how many variants were
    tried before this one was shown, *trial_sharpes* their Sharpe ratios per period where they are known.
    """
    returns = Curve.of(simulation.equity, simulation.rules.cash, bars).returns
    return [
        _ruined(simulation),
        _too_few_trades(simulation),
        _stale_fills(simulation),
        _flat_curve(returns),
        _one_trade_luck(simulation, seed),
        _insignificant_mean(returns, seed),
        _too_many_parameters(simulation, parameters),
        _behind_buy_and_hold(simulation, bars),
        _deflated(returns, trials, trial_sharpes),
    ]


def on_hold_out(score: float | None, benchmark: float | None) -> Finding:
    """Whether chosen parameters did better than buy-and-hold, by Sharpe ratio, where nothing was chosen by."""
    if score is None or benchmark is None:
        whose = "its" if score is None else "buy-and-hold's"
        detail = f"Cannot be judged: {whose} Sharpe ratio on the hold-out is undefined."
        return Finding(name="behind_on_hold_out", is_passed=False, detail=detail)
    return Finding(
        name="behind_on_hold_out",
        is_passed=score > benchmark,
        detail=f"Sharpe ratio {score:.2f} on the hold-out, buy-and-hold {benchmark:.2f}; every other check is also of "
        "bars that the parameters were chosen by.",
    )


def hac_mean(values: "Floats", lags: int | None = None) -> Mean | None:
    """
    The mean over its standard error with Bartlett weights; None where values do not vary.

    Newey and West, 1987; *lags* by their rule 4 (n / 100)^(2/9).
    """
    count = len(values)
    used = min(math.floor(4 * (count / 100) ** (2 / 9)) if lags is None else lags, max(count - 1, 0))
    if count < 2:
        return None
    away = values - values.mean()
    variance = float(away @ away)
    if variance <= count * (1e-13 * float(abs(values).max())) ** 2:
        return None
    for lag in range(1, used + 1):
        variance += 2 * (1 - lag / (used + 1)) * float(away[lag:] @ away[:-lag])
    t = float(values.mean()) / (math.sqrt(variance) / count)
    return Mean(mean=float(values.mean()), t=t, p=2 * normal_cdf(-abs(t)), lags=used)


def expected_best_sharpe(trials: int, deviation: float) -> float:
    """
    The Sharpe ratio that the best of *trials* variants without any skill is expected to show.

    Bailey and López de Prado, The Deflated Sharpe Ratio, 2014.

    Raises:
        InvalidPayloadError: fewer than one trial.

    """
    from statistics import NormalDist

    if trials < 1:
        raise InvalidPayloadError(f"trials: {trials}; the variant that is shown was tried, so it is at least 1")
    if trials == 1:
        return 0.0
    normal = NormalDist()
    once, more = normal.inv_cdf(1 - 1 / trials), normal.inv_cdf(1 - 1 / (trials * math.e))
    return deviation * ((1 - EULER) * once + EULER * more)


def deflated_sharpe(returns: "Floats", *, trials: int, trial_sharpes: Sequence[float] = (), free: float = 0.0) -> Value:
    """
    The probability that the true Sharpe ratio is above what the best of *trials* lucky variants would show.

    Where the trials' own Sharpe ratios (per period) are not known, they are taken to differ as much as estimates from
    this many returns differ by chance, which the reason says. Bailey and López de Prado, 2014.
    """
    import numpy as np

    guessed = len(trial_sharpes) < 2
    deviation = 1 / math.sqrt(max(len(returns) - 1, 1)) if guessed else float(np.std(trial_sharpes, ddof=1))
    found = probabilistic_sharpe(returns, expected_best_sharpe(trials, deviation), free)
    if guessed and trials > 1 and found.value is not None:
        return Value(found.value, "the spread of the trials' Sharpe ratios is assumed, not measured")
    return found


def _closed(simulation: Simulation) -> int:
    return len(simulation.trades) - int(simulation.trades.is_open.sum())


def _ruined(simulation: Simulation) -> Finding:
    at = simulation.ruined_at
    return Finding(
        name="ruined",
        is_passed=at is None,
        detail="Equity stayed above 0."
        if at is None
        else f"Nothing was left at bar {at}: equity {simulation.equity[at]:,.2f}. Trade a smaller fraction.",
    )


def _too_few_trades(simulation: Simulation) -> Finding:
    count = _closed(simulation)
    return Finding(
        name="too_few_trades",
        is_passed=count >= ENOUGH_TRADES,
        detail=f"{_trades(count)} closed; fewer than {ENOUGH_TRADES} say little.",
    )


def _stale_fills(simulation: Simulation) -> Finding:
    stale, fills = simulation.stale_fills, simulation.fills
    return Finding(
        name="stale_fills",
        is_passed=stale == 0,
        detail="No fill came late or without volume."
        if stale == 0
        else f"{stale} of {fills} fills came late or on a bar without volume; such prices may not have been there.",
    )


def _flat_curve(returns: "Floats") -> Finding:
    longest = longest_run(returns == 0)
    share = longest / len(returns)
    return Finding(
        name="flat_curve",
        is_passed=share <= FLAT_SHARE,
        detail=f"Equity stood still for at most {longest} of {len(returns)} periods in a row ({share:.0%}); "
        f"above {FLAT_SHARE:.0%} the result stands on a part of the time only.",
    )


def _one_trade_luck(simulation: Simulation, seed: int) -> Finding:
    import numpy as np

    name = "one_trade_luck"
    trades = simulation.trades
    closed = ~trades.is_open
    count = int(closed.sum())
    if count < 2:
        return Finding(name=name, is_passed=False, detail=f"{_trades(count)} closed: luck cannot be told from skill.")
    staked = trades.size * trades.entry_price * (1 + simulation.rules.fee) / trades.weight
    growth = (trades.net / staked)[closed]
    if growth.min() <= -1:
        return Finding(name=name, is_passed=False, detail="One trade lost everything: there is no luck to speak of.")
    log = np.sort(np.log1p(growth))
    best = max(1, math.ceil(BEST_SHARE * count))
    without = math.expm1(float(log[:-best].sum()))
    gains = float(log[log > 0].sum())
    top = float(log[-best:].clip(min=0).sum()) / gains if gains else 0.0
    lucky = confidence(block_bootstrap(np.log1p(growth), lambda rows: rows.sum(axis=1), seed=seed)).above_zero
    return Finding(
        name=name,
        is_passed=without > 0 and lucky >= LUCK,
        detail=f"The best {best} of {count} trades brought {top:.0%} of all gains; without them the result is "
        f"{without:+.1%}. {lucky:.0%} of resampled runs of the same trades end with a gain ({LUCK:.0%} is asked).",
    )


def _insignificant_mean(returns: "Floats", seed: int) -> Finding:
    name = "insignificant_mean"
    mean = hac_mean(returns)
    if mean is None:
        return Finding(name=name, is_passed=False, detail="Returns do not vary: nothing can be said of their mean.")
    spread = confidence(block_bootstrap(returns, lambda rows: rows.mean(axis=1), seed=seed))
    return Finding(
        name=name,
        is_passed=mean.t >= SIGNIFICANT,
        detail=f"Mean return of a period {mean.mean:+.4%}, t = {mean.t:.2f} (Newey-West, {mean.lags} lags, "
        f"p = {mean.p:.3f}); bootstrap 95 % interval {spread.low:+.4%} to {spread.high:+.4%}. "
        f"It must be above 0 with t of at least {SIGNIFICANT}.",
    )


def _too_many_parameters(simulation: Simulation, parameters: int) -> Finding:
    count = _closed(simulation)
    return Finding(
        name="too_many_parameters",
        is_passed=parameters <= MOST_PARAMETERS and count >= TRADES_A_PARAMETER * parameters,
        detail=f"{parameters} parameters on {_trades(count)}; at most {MOST_PARAMETERS}, and at least "
        f"{TRADES_A_PARAMETER} trades for each.",
    )


def _behind_buy_and_hold(simulation: Simulation, bars: Arrays) -> Finding:
    mine, held = simulation.total_return, buy_and_hold(bars, simulation.rules).total_return
    return Finding(
        name="behind_buy_and_hold",
        is_passed=mine > held,
        detail=f"Total return {mine:+.1%}, buy-and-hold {held:+.1%} with the same costs.",
    )


def _deflated(returns: "Floats", trials: int, trial_sharpes: Sequence[float]) -> Finding:
    found = deflated_sharpe(returns, trials=trials, trial_sharpes=trial_sharpes)
    tried = "1 variant" if trials == 1 else f"{trials} variants"
    if found.value is None:
        return Finding(name="deflated_sharpe", is_passed=False, detail=f"Cannot be computed: {found.reason}.")
    remark = f" ({found.reason})" if found.reason else ""
    return Finding(
        name="deflated_sharpe",
        is_passed=found.value >= SURE,
        detail=f"After {tried}, the Sharpe ratio is better than luck with a probability of {found.value:.1%}{remark}; "
        f"{SURE:.0%} is asked.",
    )


def _trades(count: int) -> str:
    return "1 trade" if count == 1 else f"{count} trades"
