"""Who hears a signal, and in which words."""

import re
import string
from datetime import UTC, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts.logic.routing import hearers, wants
from alerts.logic.wording import price, word, worst
from alerts.models import Severity, Subscription, alert_id, delivery_id
from signals.logic.strategies import STRATEGIES
from tests.builders import WALL
from tests.standins import CLOSE, PARAMS, a_signal

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?%?")


def a_subscription(**changes) -> Subscription:
    fields = {
        "subscriber": "public",
        "channels": ("signalr",),
        "symbols": None,
        "entries": None,
        "min_strength": 0.0,
        "severity": Severity.INFO,
    }
    return Subscription(**(fields | changes))


# --- who hears it


@pytest.mark.parametrize(
    ("asked", "heard"),
    [
        ({}, True),
        ({"symbols": frozenset({"AAPL", "MSFT"})}, True),
        ({"symbols": frozenset({"MSFT"})}, False),
        ({"symbols": frozenset()}, False),
        ({"entries": frozenset({"sma-10-30"})}, True),
        ({"entries": frozenset({"rsi-14"})}, False),
        ({"min_strength": 0.62}, True),
        ({"min_strength": 0.63}, False),
        ({"symbols": frozenset({"AAPL"}), "entries": frozenset({"rsi-14"})}, False),
    ],
)
def test_a_subscription_hears_what_it_asks_for(asked, heard):
    """Symbols, entries and strength must all fit; the least strength is included."""
    assert wants(a_signal(), a_subscription(**asked)) is heard


def test_a_subscriber_with_two_matching_subscriptions_is_one_hearer():
    """A subscriber hears a signal once, however many subscriptions match."""
    mine = [a_subscription(), a_subscription(channels=("discord",), severity=Severity.CRITICAL)]
    other = a_subscription(subscriber="desk")
    deaf = a_subscription(subscriber="deaf", symbols=frozenset({"MSFT"}))

    assert hearers(a_signal(), [*mine, other, deaf]) == {"public": mine, "desk": [other]}


def test_nobody_asked_nobody_hears():
    """Without a matching subscription there is no hearer."""
    assert hearers(a_signal(), []) == {}


@pytest.mark.parametrize(
    ("severities", "all_together"),
    [
        ([Severity.INFO], Severity.INFO),
        ([Severity.INFO, Severity.CRITICAL], Severity.CRITICAL),
        ([Severity.CRITICAL, Severity.INFO], Severity.CRITICAL),
    ],
)
def test_the_most_severe_subscription_decides(severities, all_together):
    """One critical subscription makes the alert critical."""
    assert worst(severities) is all_together


def test_ids_are_made_from_facts():
    """The same signal, subscriber and channel always give the same ids; another fact gives another id."""
    assert alert_id("s", "public") == "19a35a7f-1fb4-5e7a-96dc-08b5ec2d69bd"
    assert delivery_id("a", "signalr") == "2d8f7b39-2df1-5004-b916-71881ee58667"
    assert len({alert_id("s", "public"), alert_id("t", "public"), alert_id("s", "desk")}) == 3
    assert delivery_id("a", "signalr") != delivery_id("a", "discord")


# --- in which words


@pytest.mark.parametrize("direction", ["long", "short"])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_shipped_strategy_has_a_sentence_for_each_direction(strategy, direction):
    """Nobody reads the general words for a strategy that we ship."""
    params = {name: float(value) for name, value in STRATEGIES[strategy].params().model_dump().items()}
    version = STRATEGIES[strategy].version
    signal = a_signal(strategy=f"{strategy}@{version}", direction=direction, params=params)

    alert = word(signal, "public", Severity.INFO, now=WALL)

    assert "saw its pattern" not in alert.text
    assert strategy not in alert.text
    assert not set("{}") & set(alert.text)


def test_the_two_directions_are_worded_differently():
    """Long and short never read the same."""
    for strategy, params in PARAMS.items():
        texts = {
            word(a_signal(strategy=strategy, params=params, direction=d), "public", Severity.INFO, now=WALL).text
            for d in ("long", "short")
        }
        assert len(texts) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "tea_leaves@3", "params": {}},
        {"strategy": "sma_cross@2", "params": {"quick": 3.0}},
        {"strategy": "{period.__class__}@1"},
        {"strategy": "{fast}"},
        {"strategy": ""},
    ],
)
def test_an_unknown_strategy_is_worded_in_general_words(changes):
    """A strategy or parameters we have no sentence for end in a plain one, and are never read as a template."""
    strategy = changes["strategy"].split("@")[0]

    text = word(a_signal(**changes), "public", Severity.INFO, now=WALL).text

    assert f"{strategy} saw its pattern" in text


def test_the_alert_of_a_daily_bar_reads_well():
    """The whole sentence, once."""
    alert = word(a_signal(), "public", Severity.INFO, now=WALL)

    assert alert.title == "AAPL: long at 561.70"
    assert alert.text == (
        "On the daily bar of 2012-11-21, the 10-bar average rose above the 30-bar average. Close 561.70, strength 62%."
    )
    assert (alert.occurred_at, alert.recorded_at) == (CLOSE, WALL)


def test_an_instant_with_another_zone_is_shown_in_utc():
    """What is called UTC is UTC, however the event wrote it."""
    tokyo = CLOSE.astimezone(timezone(timedelta(hours=9)))

    alert = word(a_signal(interval="1h", occurred_at=tokyo), "public", Severity.INFO, now=WALL)

    assert "hourly bar of 2012-11-21 21:00 UTC" in alert.text
    assert alert.occurred_at.tzinfo is UTC


@given(
    strategy=st.sampled_from(sorted(PARAMS)),
    direction=st.sampled_from(["long", "short"]),
    close=st.floats(min_value=1e-4, max_value=1e7),
    strength=st.floats(min_value=0, max_value=1),
    numbers=st.lists(st.integers(min_value=1, max_value=2000), min_size=3, max_size=3),
    interval=st.sampled_from(["1d", "1h", "1m"]),
    at=st.timedeltas(min_value=timedelta(), max_value=timedelta(days=20_000)).map(lambda gone: CLOSE + gone),
)
def test_every_number_in_the_words_stands_in_the_signal(strategy, direction, close, strength, numbers, interval, at):
    """Title and text hold no number that the signal does not: nothing is computed, rounded twice or invented."""
    params = dict(zip(PARAMS[strategy], map(float, numbers), strict=False))
    signal = a_signal(
        strategy=f"{strategy}@1",
        direction=direction,
        params=params,
        reference_price=close,
        strength=strength,
        interval=interval,
        occurred_at=at,
    )
    known = {f"{close:,.2f}" if close >= 1 else f"{close:.4f}", f"{strength:.0%}"}
    known |= {f"{value:g}" for value in params.values()}
    known |= set(NUMBER.findall(f"{at:%Y-%m-%d %H:%M}"))

    alert = word(signal, "public", Severity.INFO, now=WALL)

    assert set(NUMBER.findall(alert.title)) | set(NUMBER.findall(alert.text)) <= known
    assert price(close) in alert.title
    assert signal.symbol in alert.title
    assert direction in alert.title


@given(name=st.text(alphabet=string.printable + "äπ😀{}%", max_size=40), direction=st.sampled_from(["long", "short"]))
def test_whatever_a_strategy_is_called_it_is_worded(name, direction):
    """No name of a strategy makes wording fail."""
    alert = word(a_signal(strategy=name, direction=direction, params={}), "public", Severity.INFO, now=WALL)

    assert alert.text.startswith("On the daily bar of 2012-11-21, ")


@pytest.mark.parametrize(
    ("value", "shown"), [(1234567.891, "1,234,567.89"), (1.0, "1.00"), (0.99994, "0.9999"), (0.00004, "0.0000")]
)
def test_prices_are_shown_as_people_write_them(value, shown):
    """Cents from one up, four digits below."""
    assert price(value) == shown
