"""The rules of the moment decide, at the fan-out and again before every send; what is held back says so."""

import asyncio
from dataclasses import replace
from datetime import time, timedelta
from random import Random

import pytest

from alerts.adapters.documents import CONTAINER
from alerts.items import explanation_of
from alerts.models import Severity, State, windows_id
from alerts.service import AT_ONCE, SEND_BUDGET
from alerts.subscriptions import Digest, Mute, Preferences
from shared.clock import MarketTime
from shared.errors import RateLimitedError, UnavailableError
from tests.builders import WALL
from tests.standins import CLOSE, Around, a_signal, shuffled
from tests.unit.alerts.house import House, ScriptedChannel, a_listener, a_subscription, listeners_of

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
QUIET = Preferences(subscriber="alice", zone="America/New_York", quiet_from=time(15), quiet_to=time(17))
"""The market is at 16:00 in New York: an hour is left of these."""
LOUD = Preferences(subscriber="alice")
MUTE = Mute(mute_id="m1", subscriber="alice", author="alice", until=CLOSE + timedelta(days=1), reason="on holiday")


def alices(*trouble: Exception, preferences: Preferences = LOUD, mutes=(), **changes) -> House:
    """A house where alice listens on her own webhook."""
    mine = a_subscription("discord", subscriber="alice", **changes)
    return House(
        ScriptedChannel("signalr"),
        ScriptedChannel("discord", *trouble),
        ScriptedChannel("email"),
        listeners=[a_listener(mine, preferences=preferences, mutes=mutes)],
    )


async def decisions_of(house: House) -> list[tuple[str, str]]:
    told = explanation_of(await house.whole("alice"))["deliveries"][0]
    return [(decision["rule"], decision["outcome"]) for decision in told["decisions"]]


# --- the link that ends it


@pytest.mark.parametrize(
    ("others", "ends"),
    [
        ((), "alice-discord"),
        (("email",), "alice-discord"),  # hears it too, but by another channel
        (("email", "discord"), ""),  # ending one of two would not end the messages
    ],
)
@pytest.mark.parametrize("digest", [Digest.NONE, Digest.HOUR])
async def test_link_in_a_message_ends_what_asks_for_it_on_this_channel(others, ends, digest):
    """Who follows it hears no more of it there, whatever else asked for the same."""
    mine = a_subscription("discord", subscriber="alice", digest=digest)
    other = [a_subscription(*others, subscriber="alice", digest=digest)] if others else []
    channels = [ScriptedChannel(name) for name in ("signalr", "discord", "email")]
    house = House(*channels, listeners=[a_listener(*other, mine)])
    service = house.service()
    told = replace(service.courier, unsubscribe_url=lambda *what: "|".join(what))
    await replace(service, courier=told).announce(a_signal())
    house.wall.at += HOUR + MINUTE
    await replace(service, courier=told).sweep()

    [message] = house.channels["discord"].messages
    assert message.unsubscribe_url == f"alice|discord|{ends}"


# --- quiet hours


async def test_quiet_hours_hold_an_alert_until_they_end():
    """Nothing is sent at night; in the morning it is, once, and the record says why it waited."""
    house = alices(preferences=QUIET)
    await house.service().announce(a_signal())
    assert await house.states("alice") == {"discord": State.PENDING}

    await house.later(*[MINUTE] * 59)
    assert house.channels["discord"].asked == []
    await house.later(MINUTE, MINUTE)

    assert await house.states("alice") == {"discord": State.SENT}
    assert len(house.channels["discord"].seen) == 1
    assert ("quiet_hours", "hold") in await decisions_of(house)


async def test_quiet_hours_that_begin_between_claim_and_send_hold_it():
    """The rules are asked again before the bytes leave: the claim is given back."""
    house = alices()
    calls = 0

    async def step(name, call):
        nonlocal calls
        calls += name == "listeners"
        if calls == 2:
            house.directory.change("alice", preferences=QUIET)
        return await call()

    await house.service(directory=Around(house.directory, step)).announce(a_signal())

    delivery = await house.delivery("discord", "alice")
    assert (delivery.state, delivery.token, delivery.attempts) == (State.PENDING, None, 0)
    assert house.channels["discord"].asked == []
    await house.later(HOUR)
    assert len(house.channels["discord"].seen) == 1


async def test_quiet_hours_that_begin_while_it_is_tried_again_hold_it():
    """A retry is judged like a first attempt."""
    house = alices(RateLimitedError("slow down", retry_after=MINUTE))
    await house.service().announce(a_signal())
    house.directory.change("alice", preferences=QUIET)

    await house.later(MINUTE, MINUTE)
    assert len(house.channels["discord"].asked) == 1
    await house.later(HOUR)

    assert await house.states("alice") == {"discord": State.SENT}


async def test_quiet_hours_that_were_taken_away_end_the_wait():
    """A changed preference is seen within a minute, not only at the end that was once computed."""
    house = alices(preferences=QUIET)
    await house.service().announce(a_signal())
    house.directory.change("alice", preferences=LOUD)

    await house.later(MINUTE)

    assert await house.states("alice") == {"discord": State.SENT}


async def test_a_critical_alert_is_sent_in_quiet_hours():
    """Critical passes quiet hours."""
    house = alices(preferences=QUIET, severity=Severity.CRITICAL)

    await house.service().announce(a_signal())

    assert await house.states("alice") == {"discord": State.SENT}


@pytest.mark.parametrize(
    ("market", "wait", "first_look"),
    [
        (None, HOUR, HOUR),
        (MarketTime(market=CLOSE, wall=WALL, speed=1), HOUR, MINUTE),
        (MarketTime(market=CLOSE, wall=WALL, speed=3600), HOUR, timedelta(seconds=1)),
        (MarketTime(market=CLOSE, wall=WALL, speed=0), HOUR, MINUTE),
        (MarketTime(market=CLOSE, wall=WALL, speed=1, end=CLOSE + MINUTE), HOUR, MINUTE),
        (None, -HOUR, timedelta()),
    ],
)
def test_a_market_instant_is_waited_for_on_the_wall(market, wait, first_look):
    """Exactly, where the market's clock is the wall; where it may be moved, it is looked at again every minute."""
    house = House(market=market or MarketTime(market=WALL, wall=WALL, speed=1))
    house.market.time = market

    assert house.service().courier.due_at((CLOSE if market else WALL) + wait) == WALL + first_look


# --- what changed after the fan-out


async def retried(house: House, *, severity: Severity = Severity.INFO) -> None:
    """An alert for alice that is to be tried again in a minute."""
    await house.service().announce(a_signal())
    assert await house.states("alice") == {"discord": State.RETRY_AT}


async def test_a_mute_that_came_meanwhile_suppresses_what_waits():
    """The record names the rule, the mute and its reason; nothing more is sent."""
    house = alices(RateLimitedError("slow down", retry_after=MINUTE))
    await retried(house)
    house.directory.change("alice", mutes=[MUTE])

    await house.later(MINUTE)

    delivery = await house.delivery("discord", "alice")
    assert (delivery.state, delivery.rule, delivery.by) == (State.SUPPRESSED, "mute", "m1")
    assert "on holiday" in (delivery.reason or "")
    assert len(house.channels["discord"].asked) == 1


async def test_a_subscription_that_was_deleted_meanwhile_sends_nothing_more():
    """Unsubscribing takes effect on what is on its way."""
    house = alices(UnavailableError("down", retry_after=MINUTE))
    await retried(house)
    house.directory.change("alice", subscriptions=())

    await house.later(MINUTE)

    delivery = await house.delivery("discord", "alice")
    assert (delivery.state, delivery.rule) == (State.SUPPRESSED, "unsubscribed")
    assert len(house.channels["discord"].asked) == 1


async def test_a_subscriber_who_is_gone_is_left_in_peace():
    """A deleted subscriber's open deliveries end with a reason."""
    house = alices(UnavailableError("down", retry_after=MINUTE))
    await retried(house)
    house.directory.by_name.clear()

    await house.later(MINUTE)

    delivery = await house.delivery("discord", "alice")
    assert (delivery.state, delivery.rule) == (State.SUPPRESSED, "unsubscribed")


async def test_what_may_have_arrived_before_it_was_muted_is_not_called_unsent():
    """A doubt stays one: UNKNOWN, with both reasons."""
    house = alices(severity=Severity.CRITICAL)
    house.channels["discord"].trouble = [TimeoutError()]
    await house.service().announce(a_signal())
    house.directory.change("alice", mutes=[MUTE])

    await house.later(MINUTE)

    delivery = await house.delivery("discord", "alice")
    assert (delivery.state, delivery.is_over, delivery.rule) == (State.UNKNOWN, True, "mute")
    assert "possible repeat" in (delivery.reason or "")


# --- freshness


async def test_what_is_no_news_any_more_is_dropped_with_a_record():
    """A stale alert is never delivered late as if it were new."""
    house = alices(freshness=30 * MINUTE)
    house.wall.at += 31 * MINUTE

    await house.service().announce(a_signal())

    delivery = await house.delivery("discord", "alice")
    assert (delivery.state, delivery.rule) == (State.EXPIRED, "freshness")
    assert house.channels["discord"].asked == []
    assert await house.ledger.due(house.wall.at + HOUR, 9) == []


async def test_a_retry_that_would_come_too_late_expires_at_once():
    """Nothing waits for a moment at which it is no news."""
    house = alices(RateLimitedError("slow down", retry_after=2 * HOUR), freshness=HOUR)

    await house.service().announce(a_signal())

    assert await house.states("alice") == {"discord": State.EXPIRED}


async def test_what_merely_was_on_its_way_is_still_news():
    """Ten minutes of the wall are allowed at any speed of the market."""
    day = timedelta(days=1)
    mine = a_listener(a_subscription("discord", subscriber="alice", freshness=HOUR))
    fast = MarketTime(market=CLOSE, wall=WALL, speed=86_400)
    house = House(listeners=[mine], market=fast)
    house.wall.at += 2 * timedelta(seconds=1)
    assert house.market.now() == CLOSE + 2 * day

    await house.service().announce(a_signal())

    assert await house.states("alice") == {"discord": State.SENT}


# --- cooldowns and caps


async def test_a_cooldown_lets_one_through_and_names_it():
    """The second within the window is stored as SUPPRESSED by the first, and told like any alert."""
    house = alices(cooldown=HOUR)
    await house.service().announce(a_signal("one"))
    house.wall.at += MINUTE
    await house.service().announce(a_signal("two", occurred_at=CLOSE + MINUTE))

    first, second = await house.records("alice")
    held = second.deliveries[0]
    assert first.deliveries[0].state is State.SENT
    assert (held.state, held.rule, held.by) == (State.SUPPRESSED, "cooldown", first.alert.alert_id)
    assert len(house.topic.told) == 2
    before = await house.records("alice")
    for name in ("two", "one"):
        await house.service().announce(a_signal(name))
    assert await house.records("alice") == before


@pytest.mark.parametrize("start", range(4))
async def test_a_cap_holds_however_many_come_at_once(start):
    """A dozen alerts on three instances in any interleaving: three are sent, each of the others says why not."""
    dice = Random(start)
    house = alices(cap_per_day=3)
    services = [house.service(documents=shuffled(house.documents, dice)) for _ in range(3)]

    work = [services[n % 3].announce(a_signal(str(n // 2))) for n in range(24)]
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        assert outcome is None or isinstance(outcome, UnavailableError), outcome
    for number in range(12):
        await house.service().announce(a_signal(str(number)))

    ends = [record.deliveries[0] for record in await house.records("alice")]
    assert [d.state for d in ends].count(State.SENT) == 3
    assert [(d.state, d.rule) for d in ends].count((State.SUPPRESSED, "cap")) == 9
    assert len(house.channels["discord"].seen) == 3


async def test_who_has_no_windows_costs_none():
    """The public subscriber has no cooldown and no cap: nothing is read or written about them."""
    house = House()
    asked = []

    async def step(name, call):
        asked.append(name)
        return await call()

    await house.service(documents=Around(house.documents, step)).announce(a_signal())

    assert sorted(asked) == sorted(["batch"] + ["replace"] * 5)
    assert (await house.ledger.windows("public")).document is None


async def test_windows_are_no_alert_of_the_list():
    """What is stored beside the alerts is not listed with them."""
    house = alices(cooldown=HOUR)
    await house.service().announce(a_signal())

    assert len(await house.records("alice")) == 1
    assert (await house.documents.read(CONTAINER, "alice", windows_id("alice"))).sort.startswith("0001-01-01")


# --- many hearers


async def test_public_hears_it_first():
    """The built-in subscriber does not wait for thousands of others."""
    others = [a_subscription("discord", subscriber=f"s{n}") for n in range(40)]
    house = House(subscriptions=[a_subscription("discord"), *others])

    await house.service().announce(a_signal())

    [public] = await house.records()
    assert house.channels["discord"].seen[0] == public.alert.alert_id
    assert len(house.channels["discord"].seen) == 41


async def test_what_a_handler_has_no_time_to_send_is_sent_by_the_sweep():
    """Every alert is opened, in time; the sweep sends the rest, each once."""
    house = House(subscriptions=[a_subscription("discord", subscriber=f"s{n}") for n in range(50)])

    class Slow(ScriptedChannel):
        async def send(self, message):
            house.wall.at += SEND_BUDGET / AT_ONCE
            return await super().send(message)

    slow = Slow("discord")
    house.channels["discord"] = slow
    await house.service().announce(a_signal())
    opened = [(await house.records(f"s{n}"))[0].deliveries[0].state for n in range(50)]
    assert 0 < opened.count(State.SENT) < 50
    assert opened.count(State.PENDING) == 50 - opened.count(State.SENT)

    while await house.service().sweep():
        pass

    assert len(slow.seen) == len(set(slow.seen)) == 50


async def test_more_than_one_handler_can_open_come_with_the_event_again():
    """A handler ends in time; the event comes again, and everybody hears it once."""
    house = House(subscriptions=[a_subscription("discord", subscriber=f"s{n}") for n in range(60)])
    slow = True

    async def step(name, call):
        if slow and name == "batch":
            house.wall.at += timedelta(seconds=1)
        return await call()

    with pytest.raises(UnavailableError, match="must come again"):
        await house.service(documents=Around(house.documents, step)).announce(a_signal())
    slow = False
    await house.service().announce(a_signal())
    await house.later(MINUTE, MINUTE)

    assert len(house.channels["discord"].seen) == len(set(house.channels["discord"].seen)) == 60


async def test_the_worst_of_several_subscriptions_counts_for_all_channels():
    """Two subscriptions that hear the same signal are one alert, delivered once a channel."""
    mine = [
        a_subscription("discord", subscriber="alice", subscription_id="a"),
        a_subscription("email", "discord", subscriber="alice", subscription_id="b", severity=Severity.WARNING),
    ]
    house = House(ScriptedChannel("discord"), ScriptedChannel("email"), listeners=listeners_of(mine))

    await house.service().announce(a_signal())

    record = await house.whole("alice")
    assert (record.alert.severity, record.alert.subscription_ids) == (Severity.WARNING, ("a", "b"))
    assert house.seen() == {"discord": 1, "email": 1}
    assert replace(record.alert, severity=Severity.INFO).text == record.alert.text
