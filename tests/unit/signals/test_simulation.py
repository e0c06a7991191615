"""The simulation: what it promises about fills, costs, sizes and ruin, held against a slow one, bar by bar."""

import itertools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import InvalidPayloadError
from signals.logic.arrays import Arrays
from signals.logic.simulation import FixedFraction, Rules, Simulation, VolatilityTarget, buy_and_hold, simulate

FREE: dict[str, Any] = {"cash": 1000.0, "fee": 0.0, "slippage": 0.0}


def bars_of(close, open=None, high=None, low=None, volume=None) -> Arrays:
    """Bars on which only what matters varies; opens are the closes before."""
    close = np.asarray(close, dtype=float)
    open = np.append(close[:1], close[:-1]) if open is None else np.asarray(open, dtype=float)  # noqa: A001
    columns = {
        "open": open,
        "high": np.maximum(open, close) if high is None else np.asarray(high, dtype=float),
        "low": np.minimum(open, close) if low is None else np.asarray(low, dtype=float),
        "close": close,
        "volume": np.full(len(close), 1e5) if volume is None else np.asarray(volume, dtype=float),
        "opened": np.arange(len(close)) * 1440 + 870,
        "closed": np.arange(len(close)) * 1440 + 1260,
    }
    return Arrays(**{field.name: columns[field.name] for field in fields(Arrays)})


def marks(*directions: int) -> np.ndarray:
    return np.array(directions, dtype=np.int8)


@dataclass
class Held:
    """What the slow simulator holds."""

    side: int
    entry: int
    entry_price: float
    size: float
    spent: float
    fees: float
    expires: int | None
    worst: float
    best: float


class Slow:
    """The same rules bar by bar, with cash and shares, as a person would do it."""

    def __init__(self, bars: Arrays, direction, rules: Rules) -> None:
        self.bars, self.direction, self.rules = bars, direction, rules
        self.cash, self.held = rules.cash, None
        self.trades: list[dict[str, Any]] = []
        self.equity: list[float] = []
        self.fills = self.stale = self.unfilled = self.unsized = 0
        self.ruined_at: int | None = None
        self.waiting: list[tuple[int, int]] = []
        self.untraded_matters = any(v > 0 for v in bars.volume)

    def traded(self, t: int) -> bool:
        return not self.untraded_matters or self.bars.volume[t] > 0

    def weight(self, mark: int) -> float:
        size = self.rules.size
        if isinstance(size, FixedFraction):
            return size.fraction
        closes = self.bars.close[mark - size.window : mark + 1]
        returns = [b / a - 1 for a, b in itertools.pairwise(closes)]
        mean = sum(returns) / len(returns)
        deviation = (sum((r - mean) ** 2 for r in returns) / (len(returns) - 1)) ** 0.5
        yearly = deviation * size.bars_per_year**0.5
        return min(size.target / yearly, size.cap) if yearly > 0 else size.cap

    def sell(self, t: int, price: float, expected: int | None) -> None:
        held, rules = self.held, self.rules
        paid = price * (1 - held.side * rules.slippage)
        fee = held.size * paid * rules.fee
        self.cash += held.side * held.size * paid - fee
        self.record(t, paid, held.fees + fee, is_open=False)
        self.held = None
        self.fills += 1
        if expected is not None and (t - expected > rules.stale_after or not self.traded(t)):
            self.stale += 1

    def record(self, t: int, price: float, fees: float, *, is_open: bool) -> None:
        held = self.held
        net = held.side * held.size * (price - held.entry_price) - fees
        worst, best = min(held.worst, price), max(held.best, price)
        low, high = worst / held.entry_price - 1, best / held.entry_price - 1
        self.trades.append(
            {
                "entry_index": held.entry,
                "exit_index": t,
                "entry_price": held.entry_price,
                "exit_price": price,
                "side": held.side,
                "size": held.size,
                "fees": fees,
                "net": net,
                "net_return": net / (held.size * held.entry_price),
                "mae": low if held.side > 0 else -high,
                "mfe": high if held.side > 0 else -low,
                "is_open": is_open,
            }
        )

    def obey(self, t: int, price: float, mark: int, wanted: int) -> None:
        rules, held = self.rules, self.held
        expected = mark if rules.fill == "close" else mark + 1
        expires = mark + rules.horizon if rules.horizon and wanted else None
        if held and held.side == wanted:
            held.expires = expires
            return
        if held:
            self.sell(t, price, expected)
            if self.cash <= 0:
                self.ruined_at = t
                return
        if wanted:
            paid = price * (1 + wanted * rules.slippage)
            size = self.weight(mark) * self.cash / (paid * (1 + rules.fee))
            fee = size * paid * rules.fee
            self.held = Held(wanted, t, paid, size, 0.0, fee, expires, paid, paid)
            self.cash -= wanted * size * paid + fee
            self.fills += 1
            if t - expected > rules.stale_after or not self.traded(t):
                self.stale += 1

    def at_open(self, t: int) -> None:
        if not self.waiting or not self.traded(t):
            return
        in_time = []
        for mark, wanted in self.waiting:
            if self.rules.horizon and wanted and t > mark + self.rules.horizon:
                self.unfilled += 1
            else:
                in_time.append((mark, wanted))
        self.waiting = []
        if in_time:
            self.obey(t, self.bars.open[t], *in_time[-1])

    def at_close(self, t: int) -> None:
        bars, rules = self.bars, self.rules
        d = int(self.direction[t])
        wanted = d if rules.side == "both" or d == {"long": 1, "short": -1}[rules.side] else 0
        if d and isinstance(rules.size, VolatilityTarget) and t < rules.size.window:
            self.unsized += 1
            d = 0
        if self.held:
            self.held.worst = min(self.held.worst, bars.low[t])
            self.held.best = max(self.held.best, bars.high[t])
        over = self.held and self.held.expires is not None and t >= self.held.expires and self.traded(t)
        if d and rules.fill == "close":
            self.obey(t, bars.close[t], t, wanted)
            over = over and False
        elif over:
            self.sell(t, bars.close[t], self.held.expires)
        if d and rules.fill == "next_open":
            self.waiting.append((t, wanted))

    def run(self) -> "Slow":
        for t in range(len(self.bars.close)):
            if self.ruined_at is None and self.rules.fill == "next_open":
                self.at_open(t)
            if self.ruined_at is None:
                self.at_close(t)
            worth = self.cash + (self.held.side * self.held.size * self.bars.close[t] if self.held else 0.0)
            if self.ruined_at is None and worth <= 0:
                if self.held:
                    self.sell(t, self.bars.close[t], None)
                self.ruined_at, worth = t, self.cash
            self.equity.append(worth)
        holding = self.held.side if self.held else 0
        if self.ruined_at is None:
            self.unfilled += sum(wanted != holding for _, wanted in self.waiting)
        if self.held:
            self.record(len(self.equity) - 1, self.bars.close[-1], self.held.fees, is_open=True)
        return self


@st.composite
def markets(draw: st.DrawFn) -> tuple[Arrays, np.ndarray]:
    """Bars that jump, stand still and are not always traded, with marks on some of them."""
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    wild = draw(st.sampled_from([0.01, 0.1, 0.6]))
    close = np.round(50 * np.exp(np.cumsum(wild * rng.standard_normal(count) * (rng.random(count) > 0.2))), 2) + 0.01
    open_ = np.round(close * np.exp(wild / 2 * rng.standard_normal(count)), 2) + 0.01
    spread = 1 + wild * rng.random((2, count))
    volume = 1e5 * (rng.random(count) >= draw(st.sampled_from([0.0, 0.3, 1.1])))
    chance = draw(st.sampled_from([0.1, 0.5]))
    direction = rng.choice([-1, 1], count) * (rng.random(count) < chance)
    high, low = np.maximum(open_, close) * spread[0], np.minimum(open_, close) / spread[1]
    return bars_of(close, open_, high, low, volume), direction.astype(np.int8)


@st.composite
def rule_books(draw: st.DrawFn) -> Rules:
    horizon = draw(st.none() | st.integers(1, 6))
    return Rules(
        cash=draw(st.sampled_from([1.0, 1000.0, 1e6])),
        fee=draw(st.sampled_from([0.0, 0.002, 0.1])),
        slippage=draw(st.sampled_from([0.0, 0.001, 0.05])),
        side=draw(st.sampled_from(["long", "short", "both"])),
        exit="horizon" if horizon else "opposite",
        horizon=horizon,
        size=draw(
            st.sampled_from(
                [
                    FixedFraction(),
                    FixedFraction(fraction=0.4),
                    FixedFraction(fraction=3.0),
                    VolatilityTarget(target=0.2, window=2, cap=2.0),
                    VolatilityTarget(target=0.2, window=7, cap=0.8, bars_per_year=1764),
                ]
            )
        ),
        fill=draw(st.sampled_from(["next_open", "close"])),
        stale_after=draw(st.integers(0, 2)),
    )


@given(market=markets(), rules=rule_books())
def test_the_fast_simulation_is_the_slow_one(market: tuple[Arrays, np.ndarray], rules: Rules) -> None:
    """Whatever the market and the rules: the same trades, the same equity, the same counts as bar by bar."""
    bars, direction = market

    fast, slow = simulate(bars, direction, rules), Slow(bars, direction, rules).run()

    assert len(fast.trades) == len(slow.trades)
    for name in slow.trades[0] if slow.trades else ():
        expected = [trade[name] for trade in slow.trades]
        size = 1e-9 * max(1.0, *(abs(float(value)) for value in expected))
        np.testing.assert_allclose(getattr(fast.trades, name), expected, rtol=1e-9, atol=size, err_msg=name)
    scale = max(rules.cash, *(abs(value) for value in slow.equity))
    np.testing.assert_allclose(fast.equity, slow.equity, rtol=1e-9, atol=1e-9 * scale)
    counts = (fast.fills, fast.stale_fills, fast.unfilled, fast.unsized, fast.ruined_at)
    assert counts == (slow.fills, slow.stale, slow.unfilled, slow.unsized, slow.ruined_at)


@given(market=markets(), rules=rule_books())
def test_the_books_balance(market: tuple[Arrays, np.ndarray], rules: Rules) -> None:
    """Cash plus what all trades earned is the equity at the end; gross less costs is net; returns compound to it."""
    bars, direction = market

    done = simulate(bars, direction, rules)

    trades = done.trades
    scale = rules.cash + np.abs(done.equity).max() + np.abs(trades.gross).sum() + trades.fees.sum()
    assert done.equity[-1] == pytest.approx(rules.cash + trades.net.sum(), abs=1e-9 * scale)
    np.testing.assert_allclose(trades.gross - trades.fees - trades.slippage, trades.net, atol=1e-9 * scale)
    alive = slice(0, done.ruined_at)
    np.testing.assert_allclose(rules.cash * np.cumprod(1 + done.returns[alive]), done.equity[alive], rtol=1e-9)
    assert (done.position != 0).mean() == pytest.approx(done.exposure)
    assert (trades.mae <= 0).all()
    assert (trades.mfe >= 0).all()
    assert (trades.fees >= 0).all()
    assert (trades.slippage >= 0).all()
    if done.ruined_at is not None:
        assert (done.equity[done.ruined_at :] == done.equity[-1]).all()
        assert done.equity[-1] <= 0
        assert not done.returns[done.ruined_at + 1 :].any()


@given(market=markets(), rules=rule_books(), cut=st.integers(1, 40))
def test_the_past_of_a_simulation_does_not_depend_on_its_future(
    market: tuple[Arrays, np.ndarray], rules: Rules, cut: int
) -> None:
    """Equity up to a bar is the same when the bars after it are taken away."""
    bars, direction = market
    cut = min(cut, len(direction))
    if not bars.volume[:cut].any():
        return  # a series without any volume is another kind of series
    early = Arrays(**{field.name: getattr(bars, field.name)[:cut] for field in fields(Arrays)})

    whole, part = simulate(bars, direction, rules), simulate(early, direction[:cut], rules)

    scale = rules.cash + np.abs(whole.equity).max()
    np.testing.assert_allclose(part.equity, whole.equity[:cut], rtol=1e-9, atol=1e-12 * scale)


def one_trade(done: Simulation) -> dict[str, float]:
    [_] = done.trades.side
    return {field.name: getattr(done.trades, field.name)[0] for field in fields(done.trades)}


def test_a_mark_is_filled_at_the_next_open() -> None:
    """Nobody can buy at a close that he learned from that close."""
    done = simulate(bars_of([10, 10, 12], open=[9, 9, 8]), marks(0, 1, 0), Rules(**FREE))

    trade = one_trade(done)
    assert (trade["entry_index"], trade["entry_price"], trade["size"]) == (2, 8.0, 125.0)
    assert done.equity.tolist() == [1000.0, 1000.0, 1500.0]


def test_costs_are_taken_at_both_ends() -> None:
    """The fee is a fraction of the value at the price that slippage has made worse."""
    rules = Rules(cash=1000.0, fee=0.01, slippage=0.1, fill="close", side="long")

    trade = one_trade(simulate(bars_of([10, 20]), marks(1, -1), rules))

    size = 1000.0 / (11.0 * 1.01)
    assert trade["entry_price"] == pytest.approx(11.0)
    assert trade["exit_price"] == pytest.approx(18.0)
    assert trade["size"] == pytest.approx(size)
    assert trade["gross"] == pytest.approx(size * 10.0)
    assert trade["slippage"] == pytest.approx(size * 3.0)
    assert trade["fees"] == pytest.approx(size * 0.29)
    assert trade["net"] == pytest.approx(size * 6.71)
    assert trade["net_return"] == pytest.approx(6.71 / 11.0)


def test_an_opposite_mark_turns_the_position_at_one_price() -> None:
    """Both sides may be traded, so a long position becomes a short one of all that there is."""
    done = simulate(bars_of([10, 10, 20, 20, 10]), marks(1, 0, -1, 0, 0), Rules(**FREE))

    assert done.trades.side.tolist() == [1, -1]
    assert done.trades.exit_price[0] == done.trades.entry_price[1] == 20.0
    assert done.trades.size.tolist() == [100.0, 100.0]
    assert done.equity[-1] == 3000.0
    assert done.position.tolist() == [0, 1, 1, -1, -1]


@pytest.mark.parametrize(("side", "sides"), [("long", [1]), ("short", [-1, -1])])
def test_a_side_that_may_not_be_traded_only_closes(side: str, sides: list[int]) -> None:
    """With one side, marks of the other are exits."""
    done = simulate(bars_of([10] * 8), marks(-1, 0, 1, 1, -1, 0, 0, 0), Rules(side=side, **FREE))

    assert done.trades.side.tolist() == sides
    assert not done.trades.is_open[0] or side == "short"


def test_a_mark_on_the_last_bar_is_unfilled() -> None:
    """There is no next open, so nothing was traded, and that is said."""
    done = simulate(bars_of([10, 11]), marks(0, 1), Rules(**FREE))

    assert (len(done.trades), done.unfilled, done.equity.tolist()) == (0, 1, [1000.0, 1000.0])


def test_a_last_mark_that_would_change_nothing_is_not_unfilled() -> None:
    """Who is long already needs no price to stay long."""
    assert simulate(bars_of([10, 11, 12]), marks(1, 0, 1), Rules(**FREE)).unfilled == 0


def test_a_fill_waits_for_a_traded_bar() -> None:
    """A price at which nothing was traded is no price; what came late is counted as stale."""
    bars = bars_of([10, 11, 12, 13], open=[10, 11, 12, 13], volume=[5, 0, 0, 5])

    late, allowed = (simulate(bars, marks(1, 0, 0, 0), Rules(stale_after=n, **FREE)) for n in (1, 2))

    assert (one_trade(late)["entry_index"], one_trade(late)["entry_price"]) == (3, 13.0)
    assert (late.stale_fills, allowed.stale_fills) == (1, 0)


def test_of_two_marks_that_wait_for_one_price_the_newest_is_filled() -> None:
    """An opinion that was replaced before it could be traded is not traded."""
    bars = bars_of([10, 10, 10, 10], volume=[5, 0, 0, 5])

    assert simulate(bars, marks(1, -1, 0, 0), Rules(**FREE)).trades.side.tolist() == [-1]


def test_a_series_without_volumes_is_traded_on_every_bar() -> None:
    """A currency pair states no volume; that is no reason never to trade it."""
    done = simulate(bars_of([10, 11, 12], volume=[0, 0, 0]), marks(1, 0, 0), Rules(**FREE))

    assert (one_trade(done)["entry_index"], done.stale_fills) == (1, 0)


def test_a_fill_at_a_close_without_volume_is_stale() -> None:
    """The comparison mode takes the price but says that nobody traded there."""
    done = simulate(bars_of([10, 11], volume=[0, 5]), marks(1, 0), Rules(fill="close", **FREE))

    assert done.stale_fills == 1


def test_a_horizon_ends_at_the_close_of_its_last_bar() -> None:
    """Two bars after a mark on bar 0 is the close of bar 2, entered at the open of bar 1."""
    rules = Rules(exit="horizon", horizon=2, **FREE)

    done = simulate(bars_of([10, 11, 12, 13]), marks(1, 0, 0, 0), rules)

    trade = one_trade(done)
    assert (trade["entry_index"], trade["exit_index"], trade["exit_price"]) == (1, 2, 12.0)
    assert (trade["bars_held"], trade["exit_at_close"], done.exposure) == (2, True, 0.5)


def test_a_renewed_opinion_is_held_on() -> None:
    """A mark of the same direction before the horizon's end moves the end and costs nothing."""
    rules = Rules(exit="horizon", horizon=2, **FREE)

    done = simulate(bars_of([10, 11, 12, 13, 14, 15]), marks(1, 1, 0, 0, 0, 0), rules)

    assert one_trade(done)["exit_index"] == 3


def test_an_opinion_whose_horizon_passed_without_a_price_is_given_up() -> None:
    """A signal for two days is not traded on the fifth."""
    bars = bars_of([10] * 6, volume=[5, 0, 0, 0, 5, 5])

    done = simulate(bars, marks(1, 0, 0, 0, 0, 0), Rules(exit="horizon", horizon=2, **FREE))

    assert (len(done.trades), done.unfilled) == (0, 1)


def test_a_short_that_doubles_is_ruin_and_says_so() -> None:
    """Equity at or below zero ends the run: the position is closed, later marks are not followed, the debt stays."""
    bars = bars_of([10, 10, 25, 5, 5, 5])

    done = simulate(bars, marks(-1, 0, 0, 1, 0, 0), Rules(**FREE))

    assert done.ruined_at == 2
    assert (len(done.trades), done.trades.is_open[0], done.trades.exit_index[0]) == (1, False, 2)
    assert done.equity.tolist() == [1000.0, 1000.0, -500.0, -500.0, -500.0, -500.0]
    assert done.returns.tolist() == [0.0, 0.0, -1.5, 0.0, 0.0, 0.0]


def test_volatility_targeting_looks_at_nothing_after_the_mark() -> None:
    """The weight is that of the window up to the mark, whatever the price does next."""
    rules = Rules(size=VolatilityTarget(target=0.1, window=3, cap=5.0, bars_per_year=252), **FREE)
    close = [100, 101, 99, 102, 103, 104]
    deviation = np.std(np.diff(close[:4]) / close[:3], ddof=1) * np.sqrt(252)

    for after in (103, 300):
        done = simulate(bars_of([*close[:4], after, after]), marks(0, 0, 0, 1, 0, 0), rules)
        assert one_trade(done)["weight"] == pytest.approx(0.1 / deviation)


def test_a_mark_before_the_volatility_window_is_counted_and_left() -> None:
    """What cannot be sized is not guessed."""
    rules = Rules(size=VolatilityTarget(window=3), **FREE)

    done = simulate(bars_of([10, 11, 10, 11, 12, 13]), marks(1, 0, 0, 0, 0, 0), rules)

    assert (len(done.trades), done.unsized) == (0, 1)


def test_a_market_that_stands_still_is_sized_at_the_cap() -> None:
    """Without volatility every target is met; the cap says how far to go."""
    rules = Rules(size=VolatilityTarget(window=2, cap=0.5), **FREE)

    assert one_trade(simulate(bars_of([10] * 5), marks(0, 0, 1, 0, 0), rules))["weight"] == 0.5


def test_excursions_are_of_the_bars_in_which_the_trade_was_held() -> None:
    """A high before the entry or after the exit was nobody's."""
    bars = bars_of(
        [10, 10, 10, 10], open=[10, 10, 10, 10], high=[90, 12, 11, 90], low=[1, 9, 8, 1], volume=[5, 5, 5, 5]
    )

    trade = one_trade(simulate(bars, marks(1, 0, -1, 0), Rules(side="long", **FREE)))

    assert (trade["mae"], trade["mfe"]) == (pytest.approx(-0.2), pytest.approx(0.2))


def test_an_open_trade_at_the_very_end_has_no_excursion() -> None:
    """Bought at the last close, it was held during no bar."""
    done = simulate(bars_of([10, 11]), marks(0, 1), Rules(fill="close", **FREE))

    trade = one_trade(done)
    assert (trade["bars_held"], trade["mae"], trade["mfe"], trade["is_open"]) == (0, 0.0, 0.0, True)


def test_buy_and_hold_pays_for_one_entry() -> None:
    """The benchmark buys by the same fill with the same costs, whatever the strategy's side, exit and size."""
    size = FixedFraction(fraction=0.5)
    rules = Rules(cash=1000.0, fee=0.01, slippage=0.0, side="short", exit="horizon", horizon=1, size=size)

    held = buy_and_hold(bars_of([10, 10, 20]), rules)

    assert held.equity[-1] == pytest.approx(2000.0 / 1.01)
    assert held.trades.is_open.tolist() == [True]


def broken(name: str, values: Any) -> Arrays:
    bars = bars_of([10, 11, 12])
    return Arrays(**({field.name: getattr(bars, field.name) for field in fields(Arrays)} | {name: np.array(values)}))


@pytest.mark.parametrize(
    ("bars", "direction", "said"),
    [
        (bars_of([]), marks(), "bars: there are none"),
        (broken("close", [10, np.nan, 12]), marks(0, 0, 0), "bars.close: bar 1 is nan"),
        (broken("open", [10, 11, np.inf]), marks(0, 0, 0), "bars.open: bar 2 is inf"),
        (broken("low", [0.0, 11, 12]), marks(0, 0, 0), "bars.low: bar 0 is 0.0"),
        (broken("volume", [1.0, -1.0, 1.0]), marks(0, 0, 0), "bars.volume: bar 1 is -1.0"),
        (broken("high", [10.0, 11.0]), marks(0, 0, 0), "bars.high: 2 values for 3 closes"),
        (bars_of([10, 11, 12]), marks(0, 0), "direction: (2,) marks for 3 bars"),
        (bars_of([10, 11, 12]), marks(0, 2, 0), "direction: a mark must be -1, 0 or 1"),
        (bars_of([10, 11, 12]), np.array([0.0, 0.5, 1.0]), "direction: a mark must be -1, 0 or 1"),
        (bars_of([10, 11, 12]), np.array([0, 257, 0]), "direction: a mark must be -1, 0 or 1"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(bars: Arrays, direction: np.ndarray, said: str) -> None:
    """The error names the field and the bar."""
    with pytest.raises(InvalidPayloadError) as e:
        simulate(bars, direction, Rules())

    assert said in str(e.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"exit": "horizon"},
        {"horizon": 3},
        {"cash": 0},
        {"fee": -0.1},
        {"slippage": float("nan")},
        {"side": "up"},
        {"size": {"kind": "fixed", "fraction": 0}},
        {"size": {"kind": "volatility", "window": 1}},
        {"leverage": 2},
    ],
)
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    """A rule out of range, or one that nobody knows, is an error before anything is simulated."""
    with pytest.raises(ValidationError):
        Rules.model_validate(wrong)
