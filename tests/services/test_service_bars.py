"""Rules about bars: what they saw is told once, in any order of events, and corrected when it is over."""

from collections.abc import Sequence
from datetime import timedelta
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest

from alerts.models import PUBLIC, State, alert_id
from alerts.service import AlertService
from alerts.subscriptions import Digest, Kind
from shared.errors import NotFoundError, RateLimitedError
from shared.market.events import BarsIngested
from shared.market.models import Bar, Interval
from shared.market.stores import Bars, Series, SeriesStore
from tests.builders import WALL, daily_bars
from tests.standins import a_signal
from tests.unit.alerts.house import House, ScriptedChannel, a_listener, a_subscription

MINUTE = timedelta(minutes=1)


class Tape:
    """A house with stored daily bars of AAPL, live from a bar on, and rules that alice has about them."""

    def __init__(self, prices: Sequence[float], *rules: dict[str, Any], live_behind: int = 0) -> None:
        asked = [
            a_subscription(
                "signalr",
                "discord",
                subscriber="alice",
                subscription_id=f"r{number}",
                **({"kind": Kind.PRICE, "interval": "1d"} | rule),
            )
            for number, rule in enumerate(rules)
        ]
        self.house = House(ScriptedChannel("signalr"), ScriptedChannel("discord"), listeners=[a_listener(*asked)])
        self.bars: list[Bar] = daily_bars(len(prices), prices=prices)
        self.series = SeriesStore(self.house.documents, self.house.wall)
        self.store = Bars(self.house.documents, self.house.wall)
        self.live_from = self.bars[live_behind].closed_at

    async def begin(self) -> AlertService:
        series = Series(symbol="AAPL", interval=Interval.DAY, live_from=self.live_from)
        await self.series.create(series)
        await self.store.append(series.key, Interval.DAY, 0, self.bars)
        return self.service()

    def service(self) -> AlertService:
        return self.house.service(market=SimpleNamespace(series=self.series, bars=self.store))

    def event(self, first: int, last: int, symbol: str = "AAPL") -> BarsIngested:
        return BarsIngested(
            occurred_at=self.bars[last].closed_at,
            recorded_at=WALL,
            symbol=symbol,
            interval=Interval.DAY,
            revision=0,
            first_closed_at=self.bars[first].closed_at,
            last_closed_at=self.bars[last].closed_at,
            count=last - first + 1,
        )

    async def told(self) -> list[tuple[str, int, bool]]:
        """Every alert of alice: title, version, and whether it is over; in order of its bar."""
        found = [record.alert for record in await self.house.records("alice")]
        found.sort(key=lambda a: (a.occurred_at, a.alert_id))
        return [(a.title, a.version, a.resolved_at is not None) for a in found]


ABOVE = {"price_above": 110.0, "hysteresis": 0.05}
PRICES = [100, 105, 111, 112, 108, 103, 104, 115, 116]
EXPECTED = [
    ("AAPL: price above, at 111.00 (over)", 2, True),
    ("AAPL: price above, at 115.00", 1, False),
]


async def test_a_price_that_is_reached_is_told_once_and_over_when_it_went_back():
    """It fires where the level is reached, is silent inside the hysteresis, and is corrected when it is over."""
    tape = Tape(PRICES, ABOVE)
    service = await tape.begin()

    for n in range(1, len(PRICES)):
        await service.bars(tape.event(n, n))
        tape.house.wall.at += MINUTE

    assert await tape.told() == EXPECTED
    assert tape.house.seen() == {"signalr": 2, "discord": 2}
    [(message_id, edit)] = tape.house.channels["discord"].edited
    assert message_id == "m-1"
    assert edit.item["title"].endswith("(over)")
    assert [(m.item["version"]) for _, m in tape.house.channels["signalr"].edited] == [2]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("order", list(permutations(range(4))))
async def test_any_order_and_repetition_of_the_events_tells_the_same(order, times):
    """What a rule says follows from the bars, not from the order in which they were told."""
    tape = Tape(PRICES, ABOVE)
    service = await tape.begin()
    events = [tape.event(1, 2), tape.event(3, 4), tape.event(5, 6), tape.event(7, 8)]

    for n in order * times:
        await service.bars(events[n])

    assert await tape.told() == EXPECTED
    assert tape.house.seen() == {"signalr": 2, "discord": 2}


async def test_one_event_with_everything_tells_the_same():
    """Catching up in one piece is no different: fired, over and fired again, in this order."""
    tape = Tape(PRICES, ABOVE)

    await (await tape.begin()).bars(tape.event(1, 8))

    assert await tape.told() == EXPECTED


async def test_what_fired_in_history_is_not_told():
    """Bars of before the series was live raise nothing, and their end raises nothing either."""
    tape = Tape(PRICES, ABOVE, live_behind=4)
    service = await tape.begin()

    await service.bars(tape.event(1, 8))

    assert await tape.told() == EXPECTED[1:]


async def test_moves_and_volumes_are_rules_too():
    """Each rule speaks for itself; what it saw has its numbers in it."""
    tape = Tape(
        [100.0] * 30 + [107.0],
        {"kind": Kind.MOVE, "percent": 5.0},
        {"kind": Kind.VOLUME, "times_usual": 3.0},
        {"kind": Kind.MOVE, "percent": 8.0},
    )
    loud = tape.bars[-1]
    tape.bars[-1] = Bar(**{name: getattr(loud, name) for name in Bar.__slots__} | {"volume": 4000.0})

    await (await tape.begin()).bars(tape.event(30, 30))

    titles = sorted(title for title, _, _ in await tape.told())
    assert titles == ["AAPL: 4.0 times the usual volume, at 107.00", "AAPL: moved +7.00 %, at 107.00"]


async def test_bars_that_nobody_asked_about_read_nothing():
    """Without a rule about this series an event costs no more than knowing so."""
    tape = Tape(PRICES, ABOVE)
    service = tape.service()

    await service.bars(tape.event(1, 8))  # not even watched
    await tape.begin()
    await service.bars(tape.event(1, 8, symbol="MSFT"))

    assert await tape.told() == []


async def test_a_rules_alert_obeys_the_rules_of_its_owner():
    """Cooldowns hold for alerts made of bars as for those of signals."""
    tape = Tape([100, 111, 100, 111, 100, 111], {"price_above": 110.0, "cooldown": timedelta(days=3)})

    await (await tape.begin()).bars(tape.event(1, 5))

    records = await tape.house.records("alice")
    states = sorted(record.deliveries[0].state for record in records)
    assert states == [State.SENT, State.SENT, State.SUPPRESSED]
    assert [d.rule for r in records for d in r.deliveries if d.state is State.SUPPRESSED] == ["cooldown"] * 2


async def test_a_rule_that_does_not_resolve_is_left_as_it_is():
    """Who asked for no corrections gets none."""
    tape = Tape(PRICES, ABOVE | {"resolves": False})

    await (await tape.begin()).bars(tape.event(1, 8))

    assert [version for _, version, _ in await tape.told()] == [1, 1]


# --- what is over


async def test_what_is_over_is_corrected_only_where_it_was_shown():
    """Nothing is shown anew for an alert that never arrived; the record says why."""
    house = House(ScriptedChannel("signalr"), ScriptedChannel("discord", RuntimeError("bug")))
    signal = a_signal()
    await house.service().announce(signal)
    assert (await house.states())["discord"] is State.UNKNOWN

    await house.service().resolve(PUBLIC, alert_id(signal.signal_id, PUBLIC), "it is over")

    record = await house.whole()
    ends = {d.channel: (d.state, d.rule) for d in record.deliveries if d.version == 2}
    assert ends == {"signalr": (State.SENT, None), "discord": (State.SUPPRESSED, "order")}
    assert house.channels["discord"].edited == []
    assert [d.rule for d in record.alert.trail] == ["resolve"]


async def test_a_correction_waits_for_what_it_corrects():
    """The older version is never shown after the newer one."""
    house = House(ScriptedChannel("discord", RateLimitedError("slow down", retry_after=MINUTE)))
    signal = a_signal()
    await house.service().announce(signal)
    await house.service().resolve(PUBLIC, alert_id(signal.signal_id, PUBLIC), "it is over")
    assert house.channels["discord"].edited == []

    await house.later(MINUTE, MINUTE, MINUTE)

    [message] = house.channels["discord"].messages
    assert message.item["title"].endswith("(over)"), "what is sent late says what is true now"
    record = await house.whole()
    assert [(d.version, d.state) for d in record.deliveries] == [(1, State.SENT), (2, State.SENT)]


async def test_what_waits_in_a_digest_is_told_as_it_is_then():
    """An alert that is over before its digest closes is in it once, as over."""
    mine = a_subscription("email", subscriber="alice", digest=Digest.HOUR)
    house = House(ScriptedChannel("email"), listeners=[a_listener(mine)])
    signal = a_signal()
    await house.service().announce(signal)

    await house.service().resolve("alice", alert_id(signal.signal_id, "alice"), "it is over")
    await house.later(*[MINUTE] * 61)

    [message] = house.channels["email"].messages
    assert [item["title"] for item in message.digest or ()] == ["AAPL: long at 561.70 (over)"]


async def test_what_is_over_is_over_once():
    """Saying so again changes nothing; what does not exist cannot be over."""
    house = House()
    signal = a_signal()
    await house.service().announce(signal)
    name = alert_id(signal.signal_id, PUBLIC)
    first = await house.service().resolve(PUBLIC, name, "it is over")

    assert (await house.service().resolve(PUBLIC, name, "again")).alert == first.alert
    with pytest.raises(NotFoundError):
        await house.service().resolve("alice", name, "it is over")
    assert [len(channel.edited) for channel in house.channels.values()] == [1, 1]


async def test_an_alert_is_acknowledged_by_the_first():
    """Who was first, and when, is kept; being over and being seen do not hide each other."""
    house = House()
    signal = a_signal()
    await house.service().announce(signal)
    name = alert_id(signal.signal_id, PUBLIC)
    await house.service().acknowledge(PUBLIC, name, "alice")
    house.wall.at += MINUTE
    await house.service().acknowledge(PUBLIC, name, "bob")
    await house.service().resolve(PUBLIC, name, "it is over")

    alert = (await house.whole()).alert
    assert (alert.acknowledged_by, alert.acknowledged_at, alert.version) == ("alice", WALL, 2)
