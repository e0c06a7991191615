"""Ids that are made from facts: once given, they never change."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.market.models import Interval
from signals.models import Entry, params_digest, signal_id

CLOSE = datetime(2013, 1, 2, 21, tzinfo=UTC)


def entry(name="sma-10-30", strategy="sma_cross", version=1, params=None, interval=Interval.DAY) -> Entry:
    return Entry(
        name=name,
        strategy=strategy,
        version=version,
        params={"fast": 10, "slow": 30} if params is None else params,
        interval=interval,
        symbols=None,
        lookback=31,
    )


@pytest.mark.parametrize(
    ("given_entry", "symbol", "closed_at", "expected"),
    [
        (entry(), "AAPL", CLOSE, "fafd504c-9245-509c-a0cb-c5a079c639d5"),
        (
            entry("rsi-14", "rsi_reversal", params={"period": 14, "low": 30.0, "high": 70.0}),
            "MSFT",
            datetime(2003, 2, 18, 21, tzinfo=UTC),
            "22f08c06-cc28-595d-81ef-b831eceddf7d",
        ),
        (
            entry(
                "bollinger-20-minute",
                "bollinger_breakout",
                params={"period": 20, "width": 2.5, "volume_factor": 3.0},
                interval=Interval.MINUTE,
            ),
            "BRK.B",
            datetime(2012, 7, 3, 17, tzinfo=UTC),
            "7b7ebcf8-1109-509b-a2cc-6f8409b85023",
        ),
    ],
)
def test_signal_ids_are_what_they_have_always_been(
    given_entry: Entry, symbol: str, closed_at: datetime, expected: str
) -> None:
    """uuid5 of "entry|strategy@version|params|symbol|interval|close": stored ids and those told are for ever."""
    assert signal_id(given_entry, symbol, closed_at) == expected


def test_the_zone_in_which_a_close_is_written_does_not_change_the_id() -> None:
    """An id names an instant."""
    assert signal_id(entry(), "AAPL", CLOSE.astimezone(ZoneInfo("America/New_York"))) == signal_id(
        entry(), "AAPL", CLOSE
    )


def test_every_fact_of_a_signal_is_in_its_id() -> None:
    """Two signals that differ in anything that names them have two ids."""
    ids = [
        signal_id(entry(), "AAPL", CLOSE),
        signal_id(entry(name="other"), "AAPL", CLOSE),
        signal_id(entry(strategy="rsi_reversal"), "AAPL", CLOSE),
        signal_id(entry(version=2), "AAPL", CLOSE),
        signal_id(entry(params={"fast": 10, "slow": 31}), "AAPL", CLOSE),
        signal_id(entry(interval=Interval.HOUR), "AAPL", CLOSE),
        signal_id(entry(), "MSFT", CLOSE),
        signal_id(entry(), "AAPL", CLOSE.replace(minute=1)),
    ]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"fast": 10, "slow": 30}, "fast=10,slow=30"),
        ({"slow": 30.0, "fast": 10.0}, "fast=10,slow=30"),
        ({"period": 20, "width": 2.5, "volume_factor": 1.5}, "period=20,volume_factor=1.5,width=2.5"),
        ({"width": 0.1 + 0.2}, "width=0.3"),
        ({}, ""),
    ],
)
def test_parameters_are_digested_by_name_and_value(params: dict[str, float], expected: str) -> None:
    """Order, 10 or 10.0, and the last digit of a sum do not make other parameters."""
    assert params_digest(params) == expected


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2000) | st.floats(0, 100, width=32)), st.randoms())
def test_the_order_of_parameters_does_not_matter(params: dict[str, float], rng) -> None:
    """The same values give the same text."""
    items = list(params.items())
    rng.shuffle(items)
    assert params_digest(dict(items)) == params_digest(params)


@pytest.mark.parametrize(
    ("symbols", "symbol", "interval", "expected"),
    [
        (None, "AAPL", Interval.DAY, True),
        (None, "AAPL", Interval.HOUR, False),
        (frozenset({"MSFT"}), "AAPL", Interval.DAY, False),
        (frozenset({"MSFT", "AAPL"}), "AAPL", Interval.DAY, True),
    ],
)
def test_an_entry_watches_its_symbols_at_its_interval(symbols, symbol: str, interval: Interval, expected: bool) -> None:
    """No list of symbols means all of them."""
    one = entry()
    watching = Entry(
        name=one.name,
        strategy=one.strategy,
        version=one.version,
        params=one.params,
        interval=one.interval,
        symbols=symbols,
        lookback=one.lookback,
    )
    assert watching.watches(symbol, interval) is expected
