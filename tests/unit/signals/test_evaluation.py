"""What an entry says of a bar: gates, missing history, and numbers that cannot be."""

from dataclasses import replace
from datetime import UTC, date, datetime, time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.strategies import invented_bars
from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import Columns, Interval, instant_of, minute_of
from shared.market.sessions import calendar
from signals.logic.arrays import Arrays, LastBar, Tape
from signals.logic.evaluation import NotReady, Watcher
from signals.logic.strategies import STRATEGIES
from signals.models import Entry, Gate, Opinion, SessionGate, StateGate
from tests.unit.signals.oracle import recorded

COLUMNS = ("open", "high", "low", "close", "volume")


def tape_of(bars: Arrays) -> Tape:
    return Tape(raw=bars, split=np.ones(len(bars)), splits=())


def state_gate(kind: str, *, agrees: bool = True, **params: float) -> StateGate:
    strategy = STRATEGIES[kind]
    chosen = strategy.params.model_validate(params)
    return StateGate(
        strategy=kind,
        version=strategy.version,
        params=chosen.model_dump(),
        agrees=agrees,
        lookback=strategy.lookback(chosen),
    )


def an_entry(kind: str, *gates: Gate, interval: Interval = Interval.HOUR, **params: float) -> Entry:
    strategy = STRATEGIES[kind]
    chosen = strategy.params.model_validate(params)
    return Entry(
        name=kind,
        strategy=kind,
        version=strategy.version,
        params=chosen.model_dump(),
        interval=interval,
        symbols=None,
        lookback=max([strategy.lookback(chosen), *(g.lookback for g in gates if isinstance(g, StateGate))]),
        gates=gates,
    )


def live(watcher: Watcher, tape: Tape) -> dict[int, int]:
    """What is said bar by bar: the directions, by bar."""
    said = {i: watcher.decide(tape, i) for i in range(watcher.entry.lookback - 1, len(tape))}
    return {i: 1 if o.direction.value == "long" else -1 for i, o in said.items() if isinstance(o, Opinion)}


def at_once(watcher: Watcher, tape: Tape) -> dict[int, int]:
    direction = watcher.mark_all(tape).direction
    return {int(i): int(direction[i]) for i in np.flatnonzero(direction)}


# --- gates

HOURS = tape_of(invented_bars(Interval.HOUR, count=400, seed=3))
CROSS = {"fast": 2, "slow": 5}


def states(fast: int, slow: int) -> np.ndarray:
    """Where two averages stand, computed another way."""
    close = HOURS.raw.close
    return np.array(
        [
            0 if i < slow - 1 else np.sign(close[i - fast + 1 : i + 1].mean() - close[i - slow + 1 : i + 1].mean())
            for i in range(len(close))
        ]
    )


def test_a_trend_gate_lets_through_what_goes_its_way() -> None:
    """A long passes only in an up state, a short only in a down state; nothing else changes."""
    free = live(Watcher.of(an_entry("sma_cross", **CROSS)), HOURS)
    stands = states(1, 40)
    gated = Watcher.of(an_entry("sma_cross", state_gate("sma_cross", fast=1, slow=40), **CROSS))
    assert gated.entry.lookback == 41
    expected = {i: way for i, way in free.items() if i >= 40 and stands[i] == way}
    assert 0 < len(expected) < len(free)
    assert live(gated, HOURS) == at_once(gated, HOURS) == expected


def test_a_gate_that_must_not_agree_lets_the_others_through() -> None:
    """Together the two gates let every signal through, and none twice."""
    both = [
        live(Watcher.of(an_entry("sma_cross", state_gate("sma_cross", fast=1, slow=40, agrees=agrees), **CROSS)), HOURS)
        for agrees in (True, False)
    ]
    free = live(Watcher.of(an_entry("sma_cross", **CROSS)), HOURS)
    assert not both[0].keys() & both[1].keys()
    assert both[0] | both[1] == {i: way for i, way in free.items() if i >= 40}


def test_a_session_gate_goes_by_the_exchanges_clock() -> None:
    """A bar passes that closes in the window, both ends included, in summer as in winter."""
    tape = tape_of(invented_bars(Interval.HOUR, count=600, seed=3))
    free = live(Watcher.of(an_entry("sma_cross", **CROSS)), tape)
    window = Watcher.of(an_entry("sma_cross", SessionGate(first=time(10, 30), last=time(12, 30)), **CROSS))
    zone = calendar().zone

    def clock(i: int) -> time:
        return instant_of(int(tape.raw.closed[i])).astimezone(zone).time()

    expected = {i: way for i, way in free.items() if time(10, 30) <= clock(i) <= time(12, 30)}
    assert {clock(i) for i in expected} == {time(10, 30), time(11, 30), time(12, 30)}
    offsets = {instant_of(int(tape.raw.closed[i])).astimezone(zone).utcoffset() for i in expected}
    assert len(offsets) == 2, "bars of both halves of the year"
    assert live(window, tape) == at_once(window, tape) == expected


@pytest.mark.parametrize("kind", [name for name, s in STRATEGIES.items() if Interval.HOUR in s.intervals])
@pytest.mark.parametrize("gate", [name for name, s in STRATEGIES.items() if s.has_state])
def test_gated_entries_say_the_same_live_and_at_once(kind: str, gate: str) -> None:
    """Gates are decided by the same code on the same window."""
    quick = {
        "sma_cross": {"fast": 1, "slow": 30},
        "macd_cross": {"fast": 2, "slow": 3, "signal": 2},
        "adx_trend": {"period": 2},
        "momentum": {"period": 20},
        "rsi_reversal": {"period": 2},
        "atr_burst": {"period": 2, "factor": 1},
        "vwap_deviation": {"session_bars": 7, "distance": 0.003},
    }
    gates = (state_gate(gate, **quick[gate]), SessionGate(first=time(10), last=time(15, 30)))
    watcher = Watcher.of(an_entry(kind, *gates, **quick.get(kind, {})))
    assert live(watcher, HOURS) == at_once(watcher, HOURS)


def test_every_gate_must_let_an_opinion_through() -> None:
    """Two gates that exclude each other leave nothing."""
    gates = [state_gate("sma_cross", fast=1, slow=40, agrees=agrees) for agrees in (True, False)]
    assert live(Watcher.of(an_entry("sma_cross", *gates, **CROSS)), HOURS) == {}


def test_a_strategy_without_a_state_cannot_gate() -> None:
    """Also where no file was read: the text says which can."""
    with pytest.raises(ConfigurationError, match=r"gap keeps no state that could gate; use sma_cross, macd_cross"):
        Watcher.of(an_entry("sma_cross", state_gate("gap"), **CROSS))


def test_gates_make_another_digest_and_their_order_does_not() -> None:
    """Ids of entries without gates stay what they were; every fact of a gate counts."""
    base = an_entry("sma_cross", **CROSS)
    trend, session = state_gate("momentum", period=20), SessionGate(first=time(10), last=time(15, 30))
    assert base.digest == "fast=2,slow=5"
    assert replace(base, gates=(trend, session)).digest == (
        "fast=2,slow=5,momentum@1(least=0,period=20)=agrees,session=10:00-15:30"
    )
    assert replace(base, gates=(session, trend)).digest == replace(base, gates=(trend, session)).digest
    others: list[tuple[Gate, ...]] = [
        (),
        (trend,),
        (replace(trend, agrees=False),),
        (replace(trend, version=2),),
        (replace(trend, params={"period": 21, "least": 0}),),
        (session,),
        (replace(session, last=time(15, 31)),),
        (trend, session),
    ]
    assert len({replace(base, gates=gates).digest for gates in others}) == len(others)


# --- what cannot be decided


def test_too_short_a_series_is_not_ready_live_and_an_error_in_a_backtest() -> None:
    """Live there will be more bars one day; who asks for a backtest of too few is told how many it takes."""
    watcher = Watcher.of(an_entry("sma_cross", **CROSS))
    short = tape_of(HOURS.raw.cut(0, 5))
    assert watcher.decide(short, 4) == NotReady(needed=6, have=5)
    with pytest.raises(InvalidPayloadError, match="bars: sma_cross needs 6 of them, there are 5"):
        watcher.mark_all(short)
    with pytest.raises(InvalidPayloadError, match="bars: sma_cross needs 6 of them, there are 0"):
        watcher.mark_all(Tape.of(Columns()))
    assert len(watcher.mark_all(tape_of(HOURS.raw.cut(0, 6))).direction) == 6


@pytest.mark.parametrize("kind", STRATEGIES)
def test_nothing_is_said_of_bars_before_the_lookback(kind: str) -> None:
    """A backtest begins where live would have."""
    strategy = STRATEGIES[kind]
    bars = invented_bars(Interval.HOUR, count=strategy.lookback(strategy.params()) + 20)
    watcher = Watcher.of(an_entry(kind))
    assert not watcher.mark_all(tape_of(bars)).direction[: watcher.entry.lookback - 1].any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("name", [*COLUMNS, "split"])
def test_a_number_that_cannot_be_is_refused_with_its_field_and_its_bar(name: str, wrong: float) -> None:
    """No strategy ever sees NaN; only a volume may be 0."""
    bars = HOURS.raw.cut(0, 50)
    columns = {field: getattr(bars, field).copy() for field in (*COLUMNS, "opened", "closed")}
    split = np.ones(50)
    (split if name == "split" else columns[name])[17] = wrong
    if (name, wrong) == ("volume", 0.0):
        assert len(Tape(raw=Arrays(**columns), split=split, splits=())) == 50
        return
    with pytest.raises(InvalidPayloadError) as e:
        Tape(raw=Arrays(**columns), split=split, splits=())
    closed_at = instant_of(int(bars.closed[17]))
    assert str(e.value).startswith(f"{name}: {wrong} at bar {closed_at:%Y-%m-%dT%H:%M:%SZ}; it must be finite and")


def test_columns_of_different_length_are_refused() -> None:
    """Bars are rows; the text says which column is short."""
    bars = HOURS.raw.cut(0, 50)
    columns: dict[str, Any] = {field: getattr(bars, field) for field in (*COLUMNS, "opened", "closed")}
    with pytest.raises(InvalidPayloadError, match="low: there are 49 numbers for 50 bars"):
        Tape(raw=Arrays(**(columns | {"low": bars.low[1:]})), split=np.ones(50), splits=())


# --- arrays


@given(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=30), st.integers(1, 3))
def test_the_last_bar_has_the_last_numbers_of_the_whole(values: list[float], ago: int) -> None:
    """What a rule asks for is the same whether it decides about all bars or about the last."""
    numbers = np.array(values)
    fields: dict[str, Any] = dict.fromkeys((*COLUMNS, "opened", "closed"), numbers)
    whole, last = Arrays(**fields), LastBar(**fields)
    other = np.roll(numbers, 1)
    assert whole.now(numbers)[-1] == last.now(numbers)
    assert whole.ago(numbers, ago)[-1] == last.ago(numbers, ago)
    assert np.isnan(whole.ago(numbers, ago)[:ago]).all()
    assert whole.ratio(numbers, other)[-1] == last.ratio(numbers[-1], other[-1])


def test_a_ratio_to_nothing_is_nothing() -> None:
    """A residue of rounding is no usual volume, and an unknown one neither."""
    whole = np.array([0.0, 1e-12, 1e-4, np.nan, -1.0, 2.0])
    part = np.array([5.0, 5.0, 1e9, 5.0, 5.0, 5.0])
    assert HOURS.raw.ratio(part, whole).tolist() == [0, 0, 0, 0, 0, 2.5]


def test_recorded_columns_become_arrays_with_their_times() -> None:
    """Minutes since 1970, as they are stored; cutting copies nothing."""
    bars = recorded("AAPL", Interval.MINUTE)
    tape = Tape.of(Columns.of(bars))
    assert tape.raw.opened[7] == minute_of(bars[7].opened_at)
    assert tape.raw.closed[7] == minute_of(bars[7].closed_at)
    part = tape.window(5, 9)
    assert part.closed.tolist() == tape.raw.closed[5:9].tolist()
    assert np.shares_memory(part.close, tape.raw.close)


# --- sessions


def minutes_of(day: date, first: int, count: int) -> list[int]:
    session = calendar().session(day)
    assert session is not None
    return [minute_of(session.opens_at) + first + i for i in range(count)]


def vwap_marks(opened: list[int], close: list[float], volume: list[float], **params: float) -> Any:
    prices = np.array(close, dtype=float)
    bars = Arrays(
        open=prices,
        high=prices,
        low=prices,
        close=prices,
        volume=np.array(volume, dtype=float),
        opened=np.array(opened),
        closed=np.array(opened) + 1,
    )
    strategy = STRATEGIES["vwap_deviation"]
    return strategy.mark(bars, strategy.params.model_validate(params))


def test_the_vwap_begins_anew_with_every_session() -> None:
    """What was paid yesterday, or before the session opened, is not in today's average."""
    opened = [
        *minutes_of(date(2013, 1, 2), 387, 3),
        *minutes_of(date(2013, 1, 3), -2, 2),  # before the open
        *minutes_of(date(2013, 1, 3), 0, 3),
    ]
    marks = vwap_marks(opened, [50, 60, 70, 500, 500, 10, 20, 40], [1, 1, 2, 9, 9, 1, 1, 2])
    np.testing.assert_array_equal(marks.features["vwap"], [np.nan, 55, 62.5, np.nan, np.nan, np.nan, 15, 27.5])


def test_nothing_is_known_of_a_session_before_it_trades_nor_beyond_its_bars() -> None:
    """An average of no shares is none, and a session longer than was said cannot be seen whole."""
    opened = minutes_of(date(2013, 1, 3), 0, 6)
    marks = vwap_marks(opened, [10, 10, 10, 20, 30, 40], [0, 0, 1, 1, 1, 1], session_bars=5)
    np.testing.assert_array_equal(marks.features["vwap"], [np.nan, np.nan, 10, 15, 20, np.nan])


def test_a_series_that_goes_on_after_the_table_of_sessions_is_named() -> None:
    """The calendar ends one day; the text says how to widen it."""
    far = minute_of(datetime(2150, 1, 4, 15, tzinfo=UTC))
    with pytest.raises(ConfigurationError, match="the session table of XNYS covers"):
        vwap_marks([far, far + 1], [10, 11], [1, 1])
