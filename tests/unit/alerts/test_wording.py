"""In which words people are told, and what those things are called."""

import re
import string
from datetime import UTC, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts.logic.wording import (
    price,
    resolved,
    rule_id,
    word,
    word_digest,
    word_disabled,
    word_rule,
    worst,
)
from alerts.models import Severity, alert_id, delivery_id, digest_id, endpoint_alert_id, rule_alert_id, windows_id
from alerts.subscriptions import Crossing, Endpoint, Kind, Subscription
from signals.logic.strategies import STRATEGIES
from tests.builders import WALL
from tests.standins import CLOSE, PARAMS, a_signal

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?%?")


@pytest.mark.parametrize(
    ("severities", "all_together"),
    [
        ([Severity.INFO], Severity.INFO),
        ([Severity.INFO, Severity.CRITICAL], Severity.CRITICAL),
        ([Severity.CRITICAL, Severity.INFO], Severity.CRITICAL),
        ([Severity.INFO, Severity.WARNING], Severity.WARNING),
        ([Severity.WARNING, Severity.CRITICAL, Severity.WARNING], Severity.CRITICAL),
    ],
)
def test_the_most_severe_subscription_decides(severities, all_together):
    """One critical subscription makes the alert critical."""
    assert worst(severities) is all_together


def test_ids_are_made_from_facts():
    """The same signal, subscriber and channel always give the same ids; another fact gives another id."""
    assert alert_id("s", "public") == "19a35a7f-1fb4-5e7a-96dc-08b5ec2d69bd"
    assert delivery_id("a", "signalr") == "2d8f7b39-2df1-5004-b916-71881ee58667"
    assert delivery_id("a", "signalr", 1) == delivery_id("a", "signalr")
    names = {delivery_id("a", "signalr", 2), digest_id("a", "signalr", "b"), digest_id("a", "signalr", "b", 2)}
    names |= {windows_id("a"), endpoint_alert_id("e", CLOSE), endpoint_alert_id("e", None), delivery_id("a", "signalr")}
    assert len(names) == 7
    assert digest_id("a", "signalr", "b", 1) == digest_id("a", "signalr", "b")
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


# --- rules about bars


def a_rule(kind: Kind = Kind.PRICE, **changes) -> Subscription:
    return Subscription(
        subscription_id="s1", subscriber="alice", channels=("email",), kind=kind, interval="1d", **changes
    )


def a_crossing(**changes) -> Crossing:
    fields = {
        "closed_at": CLOSE,
        "value": 561.7,
        "reason": "the close 561.7 is at or above 560",
        "direction": "long",
        "fired_at": CLOSE,
    }
    return Crossing(**(fields | changes))


@pytest.mark.parametrize(
    ("kind", "crossing", "title"),
    [
        (Kind.PRICE, a_crossing(), "AAPL: price above, at 561.70"),
        (Kind.PRICE, a_crossing(direction="short"), "AAPL: price below, at 561.70"),
        (Kind.MOVE, a_crossing(value=-5.25, direction="short"), "AAPL: moved -5.25 %, at 561.70"),
        (Kind.VOLUME, a_crossing(value=3.21), "AAPL: 3.2 times the usual volume, at 561.70"),
    ],
)
def test_what_a_rule_saw_reads_well(kind, crossing, title):
    """A title with the numbers, and a sentence with the bar and the reason."""
    alert = word_rule(a_rule(kind), "AAPL", "1d", crossing, 561.7, now=WALL)

    assert alert.title == title
    assert alert.text == "On the daily bar of 2012-11-21, the close 561.7 is at or above 560."
    assert (alert.kind, alert.subscriber, alert.subscription_ids) == (kind, "alice", ("s1",))
    assert (alert.occurred_at, alert.recorded_at, alert.signal_id) == (CLOSE, WALL, "")


@pytest.mark.parametrize("kind", [Kind.PRICE, Kind.MOVE, Kind.VOLUME])
def test_a_resolve_leads_to_the_alert_that_fired(kind):
    """Wherever the bar of the reset closed, and whichever way it went, the id is that of the firing."""
    fired = word_rule(a_rule(kind), "AAPL", "1d", a_crossing(), 561.7, now=WALL)
    way = "short" if kind is Kind.VOLUME else "long"
    back = a_crossing(closed_at=CLOSE + timedelta(days=5), direction=way, is_resolve=True, value=550.0)

    assert rule_id(a_rule(kind), "AAPL", "1d", back) == fired.alert_id


def test_each_side_of_a_price_is_an_alert_of_its_own():
    """Above and below, another bar, symbol, interval or rule: each is another alert."""
    names = {
        rule_id(a_rule(), "AAPL", "1d", a_crossing()),
        rule_id(a_rule(), "AAPL", "1d", a_crossing(direction="short")),
        rule_id(a_rule(), "AAPL", "1d", a_crossing(fired_at=CLOSE + timedelta(days=1))),
        rule_id(a_rule(), "MSFT", "1d", a_crossing()),
        rule_id(a_rule(), "AAPL", "1h", a_crossing()),
        rule_id(a_rule(Kind.MOVE), "AAPL", "1d", a_crossing()),
        rule_alert_id("price", "s2", "AAPL", "1d", "long", CLOSE),
    }

    assert len(names) == 7


# --- other things to say


def test_an_alert_that_is_over_says_so():
    """The next version, with what ended it; nothing of what was said is taken back."""
    alert = word(a_signal(), "public", Severity.INFO, now=WALL)

    over = resolved(alert, "the close 550 is below 555.", now=WALL + timedelta(days=1))

    assert (over.alert_id, over.version, over.resolved_at) == (alert.alert_id, 2, WALL + timedelta(days=1))
    assert over.title == f"{alert.title} (over)"
    assert over.text == f"{alert.text} Over: the close 550 is below 555."


def test_the_owner_of_an_endpoint_is_told_what_and_why_without_the_address():
    """Only the masked form is shown, with the reason and what to do."""
    endpoint = Endpoint(
        endpoint_id="e1",
        subscriber="alice",
        channel="discord",
        shown="webhook 123/***",
        is_enabled=False,
        disabled_reason="RecipientGoneError: the webhook was deleted",
        first_failed_at=WALL,
    )

    alert = word_disabled(endpoint, now=WALL, market_now=CLOSE)

    assert alert.title == "Your discord address was switched off"
    assert "webhook 123/***" in alert.text
    assert "the webhook was deleted" in alert.text
    assert (alert.kind, alert.subscriber, alert.severity) == ("system", "alice", Severity.WARNING)


def test_a_digest_says_how_many_and_of_what():
    """One message names every symbol once, up to five, and repeats each alert."""
    alerts = [word(a_signal(str(n), symbol=f"S{n % 7}"), "alice", Severity.INFO, now=WALL) for n in range(9)]
    alerts[3] = word(a_signal("3", symbol="S3"), "alice", Severity.CRITICAL, now=WALL)

    digest = word_digest(alerts, "g1", now=WALL)

    assert digest.title == "9 alerts: S0, S1, S2, S3, S4 and 2 more"
    assert digest.text.count("On the daily bar") == 9
    assert (digest.alert_id, digest.kind, digest.severity) == ("g1", "digest", Severity.CRITICAL)
    assert word_digest(alerts[:1], "g1", now=WALL).title == "1 alert: S0"
