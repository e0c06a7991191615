"""
What would have become of money that followed a strategy's marks: trades, costs and equity. Pure.

The rules of the game, exactly:

- **A mark is known at its bar's close.** It is filled at the open of the next bar that was traded (volume above 0;
  where a series states no volume at all, every bar counts as traded). ``fill="close"`` fills at the mark's own close,
  which nobody can: it is for comparison with other backtesters only.
- **The newest opinion rules.** A mark of the position's own direction changes nothing but, where there is a horizon,
  renews it. An opposite mark closes the position and, if the side may be traded, opens the other at the same price. Of
  several marks that wait for the same price, the newest is filled. ``side="long"`` takes short marks as exits, and the
  other way round.
- **A horizon ends at a close.** The opinion of bar i ends at the close of bar i + horizon, or of the first traded bar
  after it; the exit is an order placed beforehand, so a mark that becomes known at that very close comes too late
  to renew it (with ``fill="close"`` it does not). A mark that could not be filled by bar i + horizon is given up.
- **An order without a price is unfilled**: a mark on the last bar, or one before bars without volume up to the end.
  It is counted if it would have changed anything.
- **Costs are fractions.** Slippage moves the price against us, the fee is taken of the value at that price.
- **Size is a fraction of equity at the fill**, so that price and fee together are paid by that fraction. It is not
  changed while the position is held. Borrowed cash and lent shares cost nothing.
- **A volatility target** sizes by what was known at the mark: target / (deviation of the last ``window`` returns up to
  the mark's close, annualised), at most the cap. A mark before there are that many returns cannot be sized and is left.
- **Ruin ends it.** At the first close at which equity is not above 0, the position is closed at that close; after the
  first exit that leaves nothing, nothing is opened any more. What is owed stays owed. Only closes and fills are looked
  at, not the prices between.
- **A stale fill** is one more than ``stale_after`` bars later than expected, or on a bar without volume.
- What is held at the end is open: valued at the last close, without the costs of selling.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import InvalidPayloadError
from signals.logic.arrays import Arrays

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]
    type Ints = NDArray[np.int64]
    type Bools = NDArray[np.bool_]

AT_ONCE = 1 << 18
"""Numbers in the largest block of windows that is computed at once."""


class _Rule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class FixedFraction(_Rule):
    """The same share of equity in every trade; above 1 is borrowed."""

    kind: Literal["fixed"] = "fixed"
    fraction: float = Field(default=1.0, gt=0, le=10)


class VolatilityTarget(_Rule):
    """So much of equity that its yearly volatility would have been *target*, at most *cap*."""

    kind: Literal["volatility"] = "volatility"
    target: float = Field(default=0.15, gt=0, le=5)
    window: int = Field(default=20, ge=2, le=5000)
    cap: float = Field(default=1.0, gt=0, le=10)
    bars_per_year: float = Field(default=252, gt=0)


class Rules(_Rule):
    """How marks become trades; this module's docstring says what each word means."""

    cash: float = Field(default=100_000, gt=0)
    fee: float = Field(default=0.001, ge=0, le=0.2)
    slippage: float = Field(default=0.0005, ge=0, le=0.2)
    side: Literal["long", "short", "both"] = "both"
    exit: Literal["opposite", "horizon"] = "opposite"
    horizon: int | None = Field(default=None, ge=1)
    size: Annotated[FixedFraction | VolatilityTarget, Field(discriminator="kind")] = FixedFraction()
    fill: Literal["next_open", "close"] = "next_open"
    stale_after: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.exit == "horizon") != (self.horizon is not None):
            raise ValueError('horizon belongs to exit="horizon": give both, or neither')
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Trades:
    """
    Trades as columns of equal length, oldest first.

    Prices are those paid, with slippage; ``gross``, ``fees``, ``slippage`` and ``net`` are money, ``net_return`` is
    ``net`` over the value at entry. ``mae`` and ``mfe`` are the worst and the best that the price did while the trade
    was held, as a fraction of the entry price (never above and never below 0). ``bars_held`` counts the bars during
    which it was held. An open trade's exit is the last close.
    """

    mark_index: "Ints"
    entry_index: "Ints"
    exit_index: "Ints"
    entry_at_close: "Bools"
    exit_at_close: "Bools"
    entry_price: "Floats"
    exit_price: "Floats"
    side: "NDArray[np.int8]"
    size: "Floats"
    weight: "Floats"
    gross: "Floats"
    fees: "Floats"
    slippage: "Floats"
    net: "Floats"
    net_return: "Floats"
    mae: "Floats"
    mfe: "Floats"
    bars_held: "Ints"
    is_open: "Bools"

    def __len__(self) -> int:
        return len(self.side)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """
    What became of the cash: ``equity`` is marked to market at every bar's close.

    ``ruined_at`` is the bar at which nothing was left; ``stale_fills`` and ``fills`` count entries and exits;
    ``unsized`` counts marks that came before a volatility target had its window.
    """

    rules: Rules
    trades: Trades
    equity: "Floats"
    traded: float
    fills: int
    stale_fills: int
    unfilled: int
    unsized: int
    ruined_at: int | None

    @property
    def returns(self) -> "Floats":
        """Simple returns from close to close, net of costs; the first bar's is from the cash. After ruin 0."""
        import numpy as np

        before = np.empty_like(self.equity)
        before[0] = self.rules.cash
        before[1:] = self.equity[:-1]
        return np.divide(self.equity, before, out=np.ones_like(before), where=before > 0) - 1.0

    @property
    def position(self) -> "NDArray[np.int8]":
        """For each bar the side held while it was traded: +1 long, -1 short, 0 nothing."""
        import numpy as np

        trades = self.trades
        first = trades.entry_index + trades.entry_at_close
        spans = _spans(first, first + trades.bars_held, len(self.equity))
        return np.repeat(_between(trades.side, np.zeros(len(trades) + 1, dtype=np.int8)), spans)

    @property
    def exposure(self) -> float:
        """The share of bars during which a position was held."""
        return float(self.trades.bars_held.sum()) / len(self.equity)

    @property
    def fees_paid(self) -> float:
        return float(self.trades.fees.sum())

    @property
    def slippage_paid(self) -> float:
        return float(self.trades.slippage.sum())

    @property
    def total_return(self) -> float:
        return float(self.equity[-1]) / self.rules.cash - 1.0


def simulate(bars: Arrays, direction: "NDArray[np.int8]", rules: Rules) -> Simulation:
    """
    Follow the marks in *direction* (+1, -1, 0 for each bar) through *bars* by *rules*.

    Raises:
        InvalidPayloadError: there are no bars, lengths differ, a number cannot be a price or a volume, or a mark is
            none of -1, 0 and 1; the text names the field and the bar.

    """
    direction = _checked(bars, direction)
    orders = _orders(bars, direction, rules)
    legs = _legs(orders, len(bars.close))
    account = _account(legs, bars, rules)
    ruined_at = _ruin(legs, account)
    if ruined_at is not None:
        legs = _cut(legs, ruined_at, account)
        account = _account(legs, bars, rules)
    return Simulation(
        rules=rules,
        trades=_trades(legs, account, bars),
        equity=account.equity,
        traded=float((account.size * (account.entry_price + account.exit_price * ~legs.is_open)).sum()),
        fills=2 * len(legs) - int(legs.is_open.sum()),
        stale_fills=int(legs.entry_is_stale.sum() + legs.exit_is_stale.sum()),
        unfilled=_unfilled(orders, legs, ruined_at),
        unsized=orders.unsized,
        ruined_at=ruined_at,
    )


def buy_and_hold(bars: Arrays, rules: Rules) -> Simulation:
    """All of the cash into the first bar's long mark, held to the end: the same fill and the same costs."""
    import numpy as np

    direction = np.zeros(len(bars), dtype=np.int8)
    direction[:1] = 1
    plain: dict[str, Any] = {"side": "long", "exit": "opposite", "horizon": None, "size": FixedFraction()}
    return simulate(bars, direction, rules.model_copy(update=plain))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Orders:
    """
    Marks that found a price and were the newest to wait for it.

    Times count halves of bars: 2 t is the open of bar t, 2 t + 1 its close.
    """

    mark: "Ints"
    wanted: "NDArray[np.int8]"
    time: "Ints"
    is_stale: "Bools"
    expiry: "Ints"
    expires_stale: "Bools"
    given_up: "Ints"
    pending: "NDArray[np.int8]"
    unsized: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Legs:
    """Trades as times and sides, before money."""

    mark: "Ints"
    side: "NDArray[np.int8]"
    start: "Ints"
    end: "Ints"
    entry_is_stale: "Bools"
    exit_is_stale: "Bools"
    is_open: "Bools"

    def __len__(self) -> int:
        return len(self.side)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """The money side of the legs; ``factor`` is equity after a leg over equity before it."""

    weight: "Floats"
    size: "Floats"
    entry_price: "Floats"
    exit_price: "Floats"
    gross: "Floats"
    fees: "Floats"
    slippage: "Floats"
    factor: "Floats"
    equity: "Floats"


def _checked(bars: Arrays, direction: "NDArray[np.int8]") -> "NDArray[np.int8]":
    import numpy as np

    count = len(bars.close)
    if count == 0:
        raise InvalidPayloadError("bars: there are none; choose a range in which the symbol was traded")
    for name in ("open", "high", "low", "close", "volume"):
        values: Floats = getattr(bars, name)
        if len(values) != count:
            raise InvalidPayloadError(f"bars.{name}: {len(values)} values for {count} closes")
        lowest, highest = values.min(), values.max()
        if not (highest < np.inf and (lowest >= 0 if name == "volume" else lowest > 0)):
            wrong = ~np.isfinite(values) | (values < 0 if name == "volume" else values <= 0)
            index = int(np.argmax(wrong))
            bound = "not below 0" if name == "volume" else "above 0"
            raise InvalidPayloadError(f"bars.{name}: bar {index} is {values[index]}; it must be finite and {bound}")
    marks = np.asarray(direction)
    if marks.shape != (count,):
        raise InvalidPayloadError(f"direction: {marks.shape} marks for {count} bars; give one a bar")
    narrow = marks.astype(np.int8, copy=False)
    if narrow.min() < -1 or narrow.max() > 1 or (narrow is not marks and not np.array_equal(narrow, marks)):
        raise InvalidPayloadError("direction: a mark must be -1, 0 or 1")
    return narrow


def _orders(bars: Arrays, direction: "NDArray[np.int8]", rules: Rules) -> _Orders:
    import numpy as np

    count = len(bars.close)
    mark = np.flatnonzero(direction)
    needed = rules.size.window if isinstance(rules.size, VolatilityTarget) else 0
    unsized = int(np.searchsorted(mark, needed))
    mark = mark[unsized:]
    wanted = direction[mark]
    if rules.side != "both":
        wanted = np.where(wanted == (1 if rules.side == "long" else -1), wanted, 0).astype(np.int8)
    at_close = rules.fill == "close"
    known = bool(bars.volume.any())
    traded = np.flatnonzero(bars.volume > 0) if known and bars.volume.min() == 0 else None
    fill = mark if at_close else _first_traded(mark + 1, traded, count)
    late = fill - (mark if at_close else mark + 1)
    is_stale = late > rules.stale_after
    expiry = np.full(len(mark), 2 * count)
    expires_stale = np.zeros(len(mark), dtype=bool)
    kept = fill < count
    pending = wanted[~kept]
    given_up = np.zeros(0, dtype=np.int64)
    if rules.horizon is not None:
        over = mark + rules.horizon
        end = _first_traded(over, traded, count)
        ends = (wanted != 0) & (end < count)
        expiry[ends] = 2 * end[ends] + 1
        expires_stale = end - over > rules.stale_after
        expired = kept & (wanted != 0) & (fill > over)
        given_up = 2 * fill[expired]
        kept &= ~expired
    mark, wanted, fill, is_stale = mark[kept], wanted[kept], fill[kept], is_stale[kept]
    expiry, expires_stale = expiry[kept], expires_stale[kept]
    if traded is not None:
        if at_close:
            is_stale |= bars.volume[fill] == 0
        newest = np.append(fill[1:] != fill[:-1], True)[: len(fill)]
        mark, wanted, fill, is_stale = mark[newest], wanted[newest], fill[newest], is_stale[newest]
        expiry, expires_stale = expiry[newest], expires_stale[newest]
    return _Orders(
        mark=mark,
        wanted=wanted,
        time=2 * fill + at_close,
        is_stale=is_stale,
        expiry=expiry,
        expires_stale=expires_stale,
        given_up=given_up,
        pending=pending,
        unsized=unsized,
    )


def _first_traded(index: "Ints", traded: "Ints | None", count: int) -> "Ints":
    """The first traded bar at or after each index; *count* where there is none. None: all are traded."""
    import numpy as np

    if traded is None:
        return np.minimum(index, count)
    return np.append(traded, count)[np.searchsorted(traded, index)]


def _legs(orders: _Orders, count: int) -> _Legs:
    """Join orders of one direction that follow each other without a pause."""
    import numpy as np

    beyond = 2 * count
    wanted, start = orders.wanted, orders.time
    following = np.append(start[1:], beyond)[: len(start)]
    end = np.minimum(orders.expiry, following)
    joined = np.zeros(len(start) + 1, dtype=bool)
    joined[1:-1] = (wanted[1:] == wanted[:-1]) & (end[:-1] == start[1:])
    first = np.flatnonzero((wanted != 0) & ~joined[:-1])
    last = np.flatnonzero((wanted != 0) & ~joined[1:])
    is_open = end[last] >= beyond
    exit_is_stale = np.where(
        orders.expiry[last] < following[last], orders.expires_stale[last], np.append(orders.is_stale, False)[last + 1]
    )
    return _Legs(
        mark=orders.mark[first],
        side=wanted[first],
        start=start[first],
        end=end[last],
        entry_is_stale=orders.is_stale[first],
        exit_is_stale=exit_is_stale,
        is_open=is_open,
    )


def _account(legs: _Legs, bars: Arrays, rules: Rules) -> _Account:
    """Each leg multiplies equity by its own factor, so all of them are settled at once."""
    import numpy as np

    count = len(bars.close)
    entry, leave = legs.start >> 1, np.minimum(legs.end >> 1, count - 1)
    at_close = rules.fill == "close"
    entry_raw = (bars.close if at_close else bars.open)[entry]
    exit_raw = np.where((legs.end & 1 == 1) | legs.is_open, bars.close[leave], bars.open[leave])
    side = legs.side.astype(np.float64)
    closing = (~legs.is_open).astype(np.float64)
    entry_price = entry_raw * (1.0 + side * rules.slippage)
    exit_price = exit_raw * (1.0 - side * rules.slippage * closing)
    weight = _weights(legs.mark, bars, rules)
    per_equity = weight / (entry_price * (1.0 + rules.fee))
    charged = rules.fee * (entry_price + exit_price * closing)
    factor = 1.0 + per_equity * (side * (exit_price - entry_price) - charged)
    worth = np.empty(len(legs) + 1)
    worth[0] = rules.cash
    np.multiply(np.cumprod(factor), rules.cash, out=worth[1:])
    before = worth[:-1]
    size = per_equity * before
    level = before - size * entry_price * (side + rules.fee)
    spans = _spans(entry, np.minimum(legs.end >> 1, count), count)
    equity = np.repeat(_between(side * size, np.zeros(len(legs) + 1)), spans)
    equity *= bars.close
    equity += np.repeat(_between(level, worth), spans)
    return _Account(
        weight=weight,
        size=size,
        entry_price=entry_price,
        exit_price=exit_price,
        gross=size * side * (exit_raw - entry_raw),
        fees=size * charged,
        slippage=size * rules.slippage * (entry_raw + exit_raw * closing),
        factor=factor,
        equity=equity,
    )


def _spans(first: "Ints", after: "Ints", count: int) -> "Ints":
    """How many bars lie before, in, between and behind the ranges [first, after)."""
    import numpy as np

    edges = np.empty(2 * len(first) + 2, dtype=np.int64)
    edges[0], edges[-1] = 0, count
    edges[1:-1:2] = first
    edges[2:-1:2] = after
    return np.diff(edges)


def _between[T: np.generic](inside: "NDArray[T]", outside: "NDArray[T]") -> "NDArray[T]":
    """Values for the spans: outside, inside, outside and so on."""
    import numpy as np

    values = np.empty(len(inside) + len(outside), dtype=inside.dtype)
    values[0::2] = outside
    values[1::2] = inside
    return values


def _weights(mark: "Ints", bars: Arrays, rules: Rules) -> "Floats":
    import numpy as np

    size = rules.size
    if isinstance(size, FixedFraction):
        return np.full(len(mark), size.fraction)
    weight = np.empty(len(mark))
    if len(mark) == 0:
        return weight
    returns = bars.close[1:] / bars.close[:-1] - 1.0
    windows = np.lib.stride_tricks.sliding_window_view(returns, size.window)
    block = max(AT_ONCE // size.window, 1)
    for begin in range(0, len(mark), block):
        some = slice(begin, begin + block)
        weight[some] = windows[mark[some] - size.window].std(axis=1, ddof=1)
    weight *= np.sqrt(size.bars_per_year)
    return np.minimum(np.divide(size.target, weight, out=np.full_like(weight, np.inf), where=weight > 0), size.cap)


def _ruin(legs: _Legs, account: _Account) -> int | None:
    """The first bar at whose close, or at a fill in which, equity is not above 0."""
    import numpy as np

    if account.equity.min() > 0 and (len(legs) == 0 or account.factor.min() > 0):
        return None
    count = len(account.equity)
    below = np.flatnonzero(account.equity <= 0)
    lost = np.flatnonzero((account.factor <= 0) & ~legs.is_open)
    return int(min(below[0] if len(below) else count, legs.end[lost[0]] >> 1 if len(lost) else count))


def _cut(legs: _Legs, ruined_at: int, account: _Account) -> _Legs:
    """The legs up to ruin; a position that ruined us at a close is closed at that close."""
    import numpy as np

    lost = np.flatnonzero((account.factor <= 0) & ~legs.is_open)
    by_fill = len(lost) > 0 and int(legs.end[lost[0]]) >> 1 == ruined_at
    last = int(lost[0]) if by_fill else int(np.searchsorted(legs.start >> 1, ruined_at, side="right")) - 1
    end = legs.end[: last + 1].copy()
    is_open = legs.is_open[: last + 1].copy()
    stale = legs.exit_is_stale[: last + 1].copy()
    if not by_fill:
        end[last], is_open[last], stale[last] = 2 * ruined_at + 1, False, False
    return replace(
        legs,
        mark=legs.mark[: last + 1],
        side=legs.side[: last + 1],
        start=legs.start[: last + 1],
        end=end,
        entry_is_stale=legs.entry_is_stale[: last + 1],
        exit_is_stale=stale,
        is_open=is_open,
    )


def _unfilled(orders: _Orders, legs: _Legs, ruined_at: int | None) -> int:
    if ruined_at is not None:
        return int((orders.given_up <= 2 * ruined_at).sum())
    held = int(legs.side[-1]) if len(legs) and legs.is_open[-1] else 0
    return len(orders.given_up) + int((orders.pending != held).sum())


def _trades(legs: _Legs, account: _Account, bars: Arrays) -> Trades:
    import numpy as np

    count = len(bars.close)
    first, after = (legs.start + 1) >> 1, np.minimum((legs.end + 1) >> 1, count)
    highest = _extreme(np.maximum, bars.high, first, after, nothing=0.0)
    highest = np.maximum(highest, np.maximum(account.entry_price, account.exit_price))
    lowest = _extreme(np.minimum, bars.low, first, after, nothing=np.inf)
    lowest = np.minimum(lowest, np.minimum(account.entry_price, account.exit_price))
    is_long = legs.side > 0
    up, down = highest / account.entry_price - 1.0, lowest / account.entry_price - 1.0
    net = account.gross - account.fees - account.slippage
    return Trades(
        mark_index=legs.mark,
        entry_index=legs.start >> 1,
        exit_index=np.minimum(legs.end >> 1, count - 1),
        entry_at_close=legs.start & 1 == 1,
        exit_at_close=(legs.end & 1 == 1) | legs.is_open,
        entry_price=account.entry_price,
        exit_price=account.exit_price,
        side=legs.side,
        size=account.size,
        weight=account.weight,
        gross=account.gross,
        fees=account.fees,
        slippage=account.slippage,
        net=net,
        net_return=net / (account.size * account.entry_price),
        mae=np.where(is_long, down, -up),
        mfe=np.where(is_long, up, -down),
        bars_held=after - first,
        is_open=legs.is_open,
    )


def _extreme(reduce: "np.ufunc", values: "Floats", first: "Ints", after: "Ints", nothing: float) -> "Floats":
    """The extreme of each range [first, after); *nothing* for an empty one, which only the last can be."""
    import numpy as np

    found = np.full(len(first), nothing)
    filled = len(first) - (1 if len(first) and first[-1] == after[-1] else 0)
    if filled:
        edges = np.empty(2 * filled, dtype=np.int64)
        edges[0::2] = first[:filled]
        edges[1::2] = after[:filled]
        found[:filled] = reduce.reduceat(values, edges[:-1] if edges[-1] == len(values) else edges)[0::2]
    return found
