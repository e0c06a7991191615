"""Who hears what: signals, and bars by rules that are told by bars alone."""

from array import array
from datetime import timedelta
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts.logic.matching import BACK, Audience, bars_needed, heard_bars, heard_signal, wants
from alerts.models import Severity
from alerts.subscriptions import Crossing, Kind, Listener, Preferences, Subscription
from shared.market.models import EPOCH, Columns, instant_of
from signals.events import SignalRaised
from tests.standins import a_signal

DAY = timedelta(days=1)


class Sure(SignalRaised):
    """A signal that says how sure its entry is."""

    confidence: float | None = None


def a_subscription(**changes) -> Subscription:
    fields = {"subscription_id": "s1", "subscriber": "ada", "channels": ("signalr",)}
    return Subscription(**(fields | changes))


def a_listener(*asked: Subscription, subscriber: str = "ada") -> Listener:
    return Listener(subscriber=subscriber, subscriptions=asked, preferences=Preferences(subscriber=subscriber))


def bars(closes, *, volumes=None, splits=None) -> Columns:
    """One bar a day with these closes, as traded."""
    count = len(closes)
    prices = array("d", closes)
    return Columns(
        opened=array("q", (n * 1440 + 870 for n in range(count))),
        closed=array("q", (n * 1440 + 1260 for n in range(count))),
        open=prices,
        high=prices,
        low=prices,
        close=prices,
        volume=array("d", volumes or [1000.0] * count),
        split=array("d", splits or [1.0] * count),
    )


def places(found: list[Crossing], *, resolves: bool = False) -> list[int]:
    """The bars, counted from the first, at which a rule fired (or went back)."""
    return [(c.closed_at - EPOCH) // DAY for c in found if c.is_resolve is resolves]


class TestSignals:
    @pytest.mark.parametrize(
        ("asked", "heard"),
        [
            ({}, True),
            ({"symbols": frozenset({"AAPL", "MSFT"})}, True),
            ({"symbols": frozenset({"MSFT"})}, False),
            ({"symbols": frozenset()}, False),
            ({"entries": frozenset({"sma-10-30"})}, True),
            ({"entries": frozenset({"rsi-14"})}, False),
            ({"directions": frozenset({"long"})}, True),
            ({"directions": frozenset({"short"})}, False),
            ({"interval": "1d"}, True),
            ({"interval": "1h"}, False),
            ({"min_strength": 0.62}, True),
            ({"min_strength": 0.63}, False),
            ({"since": a_signal().occurred_at}, True),
            ({"since": a_signal().occurred_at + timedelta.resolution}, False),
            ({"symbols": frozenset({"AAPL"}), "entries": frozenset({"rsi-14"})}, False),
            ({"kind": Kind.PRICE, "price_above": 1.0}, False),
        ],
    )
    def test_subscription_hears_what_it_asks_for(self, asked, heard):
        """Everything it names must fit; the least strength and the first instant are included."""
        assert wants(a_signal(), a_subscription(**asked)) is heard

    @pytest.mark.parametrize(("known", "heard"), [(0.6, True), (0.7, True), (0.59, False), (None, False)])
    def test_signal_whose_confidence_is_not_known_is_not_sure_enough(self, known, heard):
        """Who asks for a confidence does not mean signals of entries that were seldom tried."""
        asked = a_subscription(min_confidence=0.6)
        signal = Sure.model_validate(a_signal().model_dump() | {"confidence": known})

        assert bool(heard_signal(signal, [a_listener(asked)])) is heard

    def test_subscriber_with_two_matching_subscriptions_is_one_hearer_with_two_reasons(self):
        """A subscriber hears a signal once, however many subscriptions match, and can see why."""
        mine = a_listener(
            a_subscription(subscription_id="a"),
            a_subscription(subscription_id="b", symbols=frozenset({"AAPL"}), min_strength=0.5),
            a_subscription(subscription_id="c", symbols=frozenset({"MSFT"})),
        )
        deaf = a_listener(a_subscription(subscriber="bob", symbols=frozenset({"MSFT"})), subscriber="bob")

        found = heard_signal(a_signal(), [mine, deaf])

        assert {who: {m.subscription.subscription_id for m in some} for who, some in found.items()} == {
            "ada": {"a", "b"}
        }
        reasons = {m.subscription.subscription_id: m.reason for m in found["ada"]}
        assert reasons["a"] == "asked for: all symbols, all entries"
        assert reasons["b"] == "asked for: AAPL, all entries, strength 0.62 of at least 0.50"

    @given(st.lists(st.sampled_from([None, "AAPL", "MSFT", "TSLA"]), max_size=8))
    def test_an_index_finds_exactly_who_would_be_found_without_one(self, wanted):
        """An audience is only faster."""
        listeners = [
            a_listener(
                a_subscription(subscriber=f"s{n}", symbols=None if w is None else frozenset({w, "IBM"})),
                subscriber=f"s{n}",
            )
            for n, w in enumerate(wanted)
        ]

        found = heard_signal(a_signal(), Audience(listeners))

        assert set(found) == {
            one.subscriber for one in listeners if any(wants(a_signal(), asked) for asked in one.subscriptions)
        }

    def test_audience_knows_which_rules_are_about_a_series(self):
        """By symbol and interval; signals are none of them."""
        price = a_subscription(kind=Kind.PRICE, symbols=frozenset({"AAPL"}), interval="1d", price_above=1.0)
        move = a_subscription(kind=Kind.MOVE, interval="1h", percent=5.0)
        audience = Audience([a_listener(price, move, a_subscription())])

        assert [asked for _, asked in audience.of_bars("AAPL", "1d")] == [price]
        assert [asked for _, asked in audience.of_bars("MSFT", "1h")] == [move]
        assert audience.of_bars("MSFT", "1d") == []


class TestPrices:
    def test_price_rule_fires_once_where_the_level_is_reached_and_again_after_it_went_back(self):
        """It says so when the close gets there, stays silent while it stays there, and tells the end."""
        asked = a_subscription(kind=Kind.PRICE, price_above=100.0)

        found = heard_bars(asked, bars([99, 100, 101, 102, 99, 98, 103, 99]))

        assert places(found) == [1, 6]
        assert [((c.closed_at - EPOCH) // DAY, (c.fired_at - EPOCH) // DAY) for c in found if c.is_resolve] == [
            (4, 1),
            (7, 6),
        ]
        assert found[0].reason == "close 100, asked for is at or above 100"
        assert found[0].direction == "long"

    def test_price_below_is_the_mirror_of_price_above(self):
        """The same rule, seen from the other side."""
        asked = a_subscription(kind=Kind.PRICE, price_below=100.0)

        found = heard_bars(asked, bars([101, 100, 99, 101, 99]))

        assert (places(found), places(found, resolves=True)) == ([1, 4], [3])
        assert found[0].direction == "short"

    def test_both_levels_are_watched_apart(self):
        """A range is left upwards and downwards."""
        asked = a_subscription(kind=Kind.PRICE, price_above=110.0, price_below=90.0)

        found = heard_bars(asked, bars([100, 111, 100, 89, 100]))

        assert [((c.closed_at - EPOCH) // DAY, c.direction, c.is_resolve) for c in found] == [
            (1, "long", False),
            (2, "long", True),
            (3, "short", False),
            (4, "short", True),
        ]

    def test_price_that_dances_around_its_level_is_told_once(self):
        """Inside the hysteresis nothing happens; exactly on its edge neither."""
        asked = a_subscription(kind=Kind.PRICE, price_above=100.0, hysteresis=0.02)

        found = heard_bars(asked, bars([97, 100, 99.5, 100.5, 98.0, 101, 97.9, 100]))

        assert (places(found), places(found, resolves=True)) == ([1, 7], [6])

    def test_price_that_is_there_from_the_first_bar_on_was_not_seen_getting_there(self):
        """A first start floods nobody."""
        asked = a_subscription(kind=Kind.PRICE, price_above=100.0)

        found = heard_bars(asked, bars([105, 106, 99, 101]))

        assert (places(found), places(found, resolves=True)) == ([3], [])

    def test_split_is_no_fall_of_the_price(self):
        """Earlier closes count in the terms of the judged bar: 2 for 1 halves them all."""
        asked = a_subscription(kind=Kind.PRICE, price_below=80.0)

        found = heard_bars(asked, bars([150, 151, 76, 75, 82, 79], splits=[1, 1, 2, 1, 1, 1]))

        assert places(found) == [5]

    def test_numbers_that_differ_by_rounding_only_are_the_same(self):
        """A level is reached by what a sum of tenths comes to."""
        asked = a_subscription(kind=Kind.PRICE, price_above=0.3)

        assert places(heard_bars(asked, bars([0.2, 0.1 + 0.2 - 1e-16]))) == [1]

    def test_who_wants_no_end_hears_none(self):
        """resolves=False."""
        asked = a_subscription(kind=Kind.PRICE, price_above=100.0, resolves=False)

        found = heard_bars(asked, bars([99, 101, 99, 101]))

        assert (places(found), places(found, resolves=True)) == ([1, 3], [])

    def test_nothing_before_the_subscription_was_made_is_heard(self):
        """A bar that closed at that very instant is."""
        closes = [99, 101, 99, 101, 99, 101]
        at = instant_of(bars(closes).closed[3])

        def heard(since):
            return places(heard_bars(a_subscription(kind=Kind.PRICE, price_above=100.0, since=since), bars(closes)))

        assert heard(at) == [3, 5]
        assert heard(at + timedelta.resolution) == [5]

    def test_end_of_something_that_began_too_long_ago_is_not_told(self):
        """Nobody could say what it would be the end of."""
        asked = a_subscription(kind=Kind.PRICE, price_above=100.0)

        assert places(heard_bars(asked, bars([99, *[101] * (BACK - 1), 99])), resolves=True) == [BACK]
        assert places(heard_bars(asked, bars([99, *[101] * BACK, 99])), resolves=True) == []


class TestMovesAndVolumes:
    def test_move_over_a_window_of_bars_is_told_in_both_directions(self):
        """In percent of the close that many bars before."""
        asked = a_subscription(kind=Kind.MOVE, percent=5.0, window=2)

        found = heard_bars(asked, bars([100, 100, 102, 106, 106, 104, 99, 98]))

        assert [((c.closed_at - EPOCH) // DAY, c.direction, c.is_resolve) for c in found] == [
            (3, "long", False),
            (4, "long", True),
            (6, "short", False),
        ]

    def test_move_is_told_where_it_first_comes_to_the_percent(self):
        """Exactly the percent is enough; it is over when the window's move is smaller."""
        asked = a_subscription(kind=Kind.MOVE, percent=5.0, window=1)

        found = heard_bars(asked, bars([100, 100, 105, 105, 99]))

        assert [((c.closed_at - EPOCH) // DAY, c.direction, c.is_resolve) for c in found] == [
            (2, "long", False),
            (3, "long", True),
            (4, "short", False),
        ]
        assert found[0].reason == "the close moved +5.00 % over 1 bar, asked for is 5 %"

    def test_direction_narrows_a_move(self):
        """long is up, short is down."""
        closes = [100, 100, 110, 110, 90, 90]

        def heard(direction):
            asked = a_subscription(kind=Kind.MOVE, percent=5.0, directions=frozenset({direction}))
            return places(heard_bars(asked, bars(closes)))

        assert (heard("long"), heard("short")) == ([2], [4])

    def test_split_inside_the_window_is_no_move(self):
        """The earlier close is divided by it."""
        asked = a_subscription(kind=Kind.MOVE, percent=5.0, window=3)

        assert heard_bars(asked, bars([100, 100, 100, 100, 50, 50, 51], splits=[1, 1, 1, 1, 2, 1, 1])) == []

    def test_volume_is_held_against_the_mean_of_the_bars_before(self):
        """Three times the usual is enough; the judged bar is no part of the usual."""
        asked = a_subscription(kind=Kind.VOLUME, times_usual=3.0, window=4)

        found = heard_bars(asked, bars([10.0] * 7, volumes=[100, 100, 100, 100, 110, 307.5, 100]))

        assert places(found) == [5]
        assert found[0].value == pytest.approx(3.0)

    def test_split_is_no_rush_of_volume(self):
        """Earlier volumes are multiplied by it."""
        asked = a_subscription(kind=Kind.VOLUME, times_usual=3.0, window=4)
        volumes = [100] * 6 + [400] * 4

        assert heard_bars(asked, bars([80] * 6 + [20] * 4, volumes=volumes, splits=[1] * 6 + [4] + [1] * 3)) == []

    def test_usual_volume_of_nothing_is_no_measure(self):
        """A series that nobody trades says nothing."""
        asked = a_subscription(kind=Kind.VOLUME, times_usual=3.0, window=2)

        assert heard_bars(asked, bars([10] * 5, volumes=[0, 0, 0, 0, 50])) == []


RULES = [
    a_subscription(kind=Kind.PRICE, price_above=100.0, price_below=96.0, hysteresis=0.01),
    a_subscription(kind=Kind.PRICE, price_above=100.0),
    a_subscription(kind=Kind.MOVE, percent=3.0, window=3, hysteresis=0.3),
    a_subscription(kind=Kind.VOLUME, times_usual=1.5, window=5, hysteresis=0.1),
]


def a_long_series(seed: int, count: int) -> Columns:
    dice = Random(seed)
    closes, splits, price = [], [], 100.0
    for _ in range(count):
        split = dice.choice([2.0, 0.5]) if dice.random() < 0.01 else 1.0
        price = max(1.0, price / split * (1 + dice.gauss(0, 0.01)))
        price += (100.0 - price) * 0.05
        closes.append(round(price, 2))
        splits.append(split)
    return bars(closes, volumes=[dice.uniform(500, 2000) for _ in range(count)], splits=splits)


@pytest.mark.parametrize("asked", RULES, ids=["range", "level", "move", "volume"])
@pytest.mark.parametrize("number", range(3))
def test_any_cut_of_the_bars_and_any_order_of_the_cuts_tells_the_same(asked, number):
    """What a rule says of a bar follows from the bars up to it, however few or many are looked at together."""
    columns = a_long_series(number, 2 * BACK + 60)
    whole = heard_bars(asked, columns)
    assert sum(not c.is_resolve for c in whole) > 2, "the series gives the rule something to say"
    dice = Random(number)
    edges = [0, *sorted(dice.sample(range(1, len(columns)), 25)), len(columns)]
    steps = list(pairwise(edges))
    dice.shuffle(steps)

    found = []
    for first, end in steps:
        cut = columns[max(0, first - bars_needed(asked) + 1) : end]
        after = instant_of(columns.closed[first - 1]) if first else None
        found += heard_bars(asked, cut, after=after)

    assert sorted(found, key=lambda c: (c.closed_at, c.direction)) == sorted(
        whole, key=lambda c: (c.closed_at, c.direction)
    )


@pytest.mark.parametrize(
    ("asked", "closes"),
    [
        (a_subscription(kind=Kind.PRICE, price_above=100.0, hysteresis=0.05), [90, 101, *[97] * (BACK - 1), 100]),
        (
            a_subscription(kind=Kind.MOVE, percent=10.0, window=1, hysteresis=0.5),
            [100, 100, 110, *(110 * 1.06**n for n in range(1, BACK)), 110 * 1.06 ** (BACK - 1) * 1.1],
        ),
    ],
    ids=["price", "move"],
)
def test_bars_needed_are_enough_to_know_what_happened_as_far_back_as_a_rule_looks(asked, closes):
    """A rule that fired exactly so far back, and was inside its hysteresis since, is silent; with fewer bars it
    would not know."""
    columns = bars(closes)
    after = instant_of(columns.closed[-2])

    assert places(heard_bars(asked, columns)) == [len(closes) - BACK - 1]
    assert heard_bars(asked, columns[len(columns) - bars_needed(asked) :], after=after) == []
    assert heard_bars(asked, columns[len(columns) - bars_needed(asked) + 1 :], after=after) != []


def test_a_signals_rule_says_nothing_of_bars():
    """Its own events tell it."""
    assert heard_bars(a_subscription(severity=Severity.CRITICAL), bars([1, 2, 3])) == []
