"""The alerts domain at work: announcing, racing, retrying, sweeping."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from random import Random
from typing import Any

import pytest

from alerts.events import AlertRaised
from alerts.items import item_of
from alerts.models import Severity, State
from alerts.ports import Message
from alerts.service import TELL_AGAIN
from shared.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    RateLimitedError,
    RecipientGoneError,
    UnavailableError,
)
from tests.builders import WALL
from tests.standins import Topic, a_signal, shuffled
from tests.unit.alerts.house import LEASE, HangingChannel, House, ScriptedChannel, a_subscription

# --- announcing


async def test_a_signal_reaches_every_channel_and_is_told_once():
    """One alert, one delivery a channel, one event, all recorded."""
    house = House()

    await house.service().announce(a_signal())

    [record] = await house.records()
    assert house.seen() == {"signalr": 1, "discord": 1}
    assert [(d.state, d.attempts, d.sent_at, d.reason) for d in record.deliveries] == [
        (State.SENT, 1, WALL, None),
        (State.SENT, 1, WALL, None),
    ]
    [told] = house.topic.told
    assert isinstance(told, AlertRaised)
    assert (told.alert_id, told.event_id) == (record.alert.alert_id, record.alert.alert_id)
    assert list(told.channels) == ["signalr", "discord"]
    assert not record.owes_event


async def test_every_hearer_has_an_alert_on_their_own_channels():
    """Subscribers are independent; two subscriptions of one join their channels, the worst severity counts."""
    house = House(
        subscriptions=[
            a_subscription("signalr"),
            a_subscription("signalr", "discord", severity=Severity.CRITICAL),
            a_subscription("discord", subscriber="desk"),
        ]
    )

    await house.service().announce(a_signal())

    [public], [desk] = await house.records(), await house.records("desk")
    assert [d.channel for d in public.deliveries] == ["signalr", "discord"]
    assert (public.alert.severity, desk.alert.severity) == (Severity.CRITICAL, Severity.INFO)
    assert [d.channel for d in desk.deliveries] == ["discord"]
    assert house.seen() == {"signalr": 1, "discord": 2}
    assert len(set(house.topic.ids())) == 2


async def test_a_signal_that_nobody_hears_leaves_nothing():
    """No hearer: no alert, no event."""
    house = House(subscriptions=[a_subscription("signalr", subscriber="desk")])

    house.directory.by_name.clear()
    await house.service().announce(a_signal())

    assert (await house.records("desk"), house.topic.told) == ([], [])


async def test_what_a_channel_is_given_is_the_apis_item():
    """The hub pushes the same JSON that the API lists, cursor included."""
    given: list[Mapping[str, Any]] = []

    class Noting(ScriptedChannel):
        async def send(self, message: Message) -> str | None:
            given.append(message.item)
            return await super().send(message)

    house = House(Noting("signalr"))

    await house.service().announce(a_signal())

    [record] = await house.records()
    [item] = given
    listed = item_of(record)
    assert {k: v for k, v in item.items() if k != "deliveries"} == {
        k: v for k, v in listed.items() if k != "deliveries"
    }
    assert listed["deliveries"] == [
        {"channel": "signalr", "state": "SENT", "reason": None, "attempts": 1, "sent_at": "2026-11-21T09:00:00Z"}
    ]


# --- the same event again


async def test_the_same_event_again_changes_nothing():
    """A repetition finds everything done: nothing is sent or told again."""
    house = House()
    await house.service().announce(a_signal())
    before = await house.records()

    for _ in range(3):
        house.wall.at += timedelta(hours=1)
        await house.service().announce(a_signal())
        await house.service().sweep()

    assert await house.records() == before
    assert house.seen() == {"signalr": 1, "discord": 1}
    assert len(house.topic.told) == 1


@pytest.mark.parametrize("start", range(12))
async def test_twins_on_three_instances_send_once(start):
    """Three service objects handle one event at the same time, in any interleaving: each channel gets it once."""
    dice = Random(start)
    house = House()
    services = [house.service(documents=shuffled(house.documents, dice)) for _ in range(3)]

    await asyncio.gather(*(service.announce(a_signal()) for service in services))
    house.wall.at += LEASE
    await asyncio.gather(*(service.sweep() for service in services))

    assert house.seen() == {"signalr": 1, "discord": 1}
    assert await house.states() == {"signalr": State.SENT, "discord": State.SENT}
    assert house.topic.told
    assert len(set(house.topic.ids())) == 1


@pytest.mark.parametrize("start", range(6))
async def test_two_sweeps_at_once_send_once(start):
    """A timer that fires on two instances does the work once."""
    dice = Random(start)
    house = House(ScriptedChannel("signalr", UnavailableError("down")), ScriptedChannel("discord"))
    await house.service().announce(a_signal())
    house.wall.at += timedelta(seconds=10)

    await asyncio.gather(*(house.service(documents=shuffled(house.documents, dice)).sweep() for _ in range(3)))

    assert house.seen() == {"signalr": 1, "discord": 1}


# --- trouble on one channel


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("down"),
        RateLimitedError("slow down", retry_after=timedelta(seconds=3)),
        ConfigurationError("the key is wrong"),
    ],
)
async def test_the_sweep_finishes_one_channel_and_leaves_the_other(error):
    """Trouble that passes on one channel neither loses the alert there nor repeats it on the other."""
    house = House(ScriptedChannel("signalr"), ScriptedChannel("discord", error))

    await house.service().announce(a_signal())
    assert await house.states() == {"signalr": State.SENT, "discord": State.RETRY_AT}
    assert len(house.topic.told) == 1
    await house.service().sweep()
    assert house.seen() == {"signalr": 1, "discord": 0}

    house.wall.at += timedelta(seconds=3)
    await house.service().sweep()

    assert await house.states() == {"signalr": State.SENT, "discord": State.SENT}
    assert house.seen() == {"signalr": 1, "discord": 1}
    assert len(house.topic.told) == 1


async def test_a_dead_channel_is_recorded_with_its_reason():
    """A webhook that is gone ends that delivery and is never asked again."""
    house = House(ScriptedChannel("signalr"), ScriptedChannel("discord", RecipientGoneError("the webhook is gone")))

    await house.service().announce(a_signal())
    house.wall.at += timedelta(days=1)
    await house.service().sweep()

    assert await house.states() == {"signalr": State.SENT, "discord": State.DEAD}
    assert "the webhook is gone" in (await house.reasons())["discord"]
    assert len(house.channels["discord"].asked) == 1


async def test_an_outage_of_an_hour_costs_bounded_attempts_and_loses_nothing():
    """A service that is down for long is asked seldom, and gets the alert when it is back."""
    house = House(ScriptedChannel("discord", *[UnavailableError("down")] * 12))
    await house.service().announce(a_signal())

    for _ in range(120):
        house.wall.at += timedelta(seconds=30)
        await house.service().sweep()

    assert await house.states() == {"discord": State.SENT}
    assert len(house.channels["discord"].asked) == 13


@pytest.mark.parametrize(
    ("name", "severity", "state", "seen"),
    [
        ("discord", Severity.INFO, State.UNKNOWN, 0),
        ("discord", Severity.CRITICAL, State.SENT, 1),
        ("signalr", Severity.INFO, State.SENT, 1),
    ],
)
async def test_an_answer_that_never_came_follows_the_policy(name, severity, state, seen):
    """Sent again for signalr and critical alerts, and marked; recorded as UNKNOWN otherwise."""
    channel = ScriptedChannel(name, OutcomeUnknownError("no answer"))
    house = House(channel, subscriptions=[a_subscription(name, severity=severity)])

    await house.service().announce(a_signal())
    house.wall.at += timedelta(seconds=2)
    await house.service().sweep()

    assert await house.states() == {name: state}
    assert house.seen() == {name: seen}
    assert (await house.reasons())[name]


@pytest.mark.parametrize(("name", "is_over"), [("discord", True), ("signalr", False)])
async def test_a_channel_that_hangs_is_an_unknown_outcome(name, is_over):
    """An attempt ends at half its lease, so nobody takes over what is still being sent."""
    house = House(HangingChannel(name))

    await house.service(lease=timedelta(milliseconds=20)).announce(a_signal())

    delivery = await house.delivery(name)
    assert (delivery.state, delivery.is_over, delivery.doubts) == (State.UNKNOWN, is_over, 1)
    assert delivery.reason


@pytest.mark.parametrize(
    ("name", "state", "seen"),
    [("discord", State.UNKNOWN, 1), ("signalr", State.SENT, 2)],
)
async def test_a_zombie_cannot_record_over_what_was_decided_meanwhile(name, state, seen):
    """An instance that froze beyond its lease comes back and loses: the outcome stays the one of its successor."""
    house = House(HangingChannel(name))
    zombie = asyncio.create_task(house.service().announce(a_signal()))
    await house.channels[name].took.wait()
    house.wall.at += LEASE
    successor = ScriptedChannel(name)

    await house.service(channels={name: successor}).sweep()
    house.wall.at += timedelta(seconds=2)
    await house.service(channels={name: successor}).sweep()
    decided = await house.records()
    house.channels[name].let_go.set()
    await zombie

    [record], [before] = await house.records(), decided
    assert record.deliveries == before.deliveries
    assert record.deliveries[0].state is state
    assert record.deliveries[0].reason
    assert len(house.channels[name].seen) + len(successor.seen) == seen


async def test_a_bug_in_a_channel_hurts_nobody_else():
    """An unexpected error ends that delivery as UNKNOWN; the other channel and the event are not touched."""
    house = House(ScriptedChannel("signalr", RuntimeError("bug")), ScriptedChannel("discord"))

    await house.service().announce(a_signal())

    assert await house.states() == {"signalr": State.UNKNOWN, "discord": State.SENT}
    assert "RuntimeError" in (await house.reasons())["signalr"]
    assert len(house.topic.told) == 1


async def test_a_channel_that_was_taken_away_is_named():
    """A delivery on a channel that is no longer set up waits for a person and says which it is."""
    house = House()
    await house.service(channels={"signalr": house.channels["signalr"]}).announce(a_signal())

    assert await house.states() == {"signalr": State.SENT, "discord": State.RETRY_AT}
    assert "discord is not set up" in (await house.reasons())["discord"]

    house.wall.at += timedelta(seconds=2)
    await house.service().sweep()
    assert await house.states() == {"signalr": State.SENT, "discord": State.SENT}


# --- trouble with storage and topic


async def test_an_event_that_could_not_be_told_is_told_by_the_sweep():
    """A topic that is down makes the event come back; the deliveries are not repeated for it."""
    house = House()
    house.topic.trouble = [UnavailableError("down")]
    with pytest.raises(UnavailableError):
        await house.service().announce(a_signal())
    assert house.topic.told == []

    house.wall.at += TELL_AGAIN
    await house.service().sweep()

    assert len(house.topic.told) == 1
    assert house.seen() == {"signalr": 1, "discord": 1}


async def test_an_announcement_ends_when_all_of_it_has_ended():
    """Nothing goes on behind the answer: trouble on one channel is raised after the other has come to its end."""
    house = House()

    class Locked:
        """Storage that cannot write what concerns SignalR."""

        def __getattr__(self, name):
            return getattr(house.documents, name)

        async def replace(self, container, document):
            if document.body.get("channel") == "signalr":
                raise UnavailableError("locked")
            return await house.documents.replace(container, document)

    with pytest.raises(UnavailableError, match="locked"):
        await house.service(documents=Locked()).announce(a_signal())

    states = await house.states()
    assert states == {"signalr": State.CLAIMED, "discord": State.SENT}
    await asyncio.sleep(0)
    assert await house.states() == states


async def test_an_alert_that_cannot_be_finished_holds_up_no_other():
    """The sweep leaves behind what is in trouble, again and again, and finishes all the rest."""
    house = House()
    for number in range(40):
        house.topic.trouble = [UnavailableError("down")]
        with pytest.raises(UnavailableError):
            await house.service().announce(a_signal(str(number)))
    refused = {r.alert.alert_id for r in (await house.records())[:20]}

    class Picky(Topic):
        async def publish(self, events):
            if any(event.event_id in refused for event in events):
                raise UnavailableError("the topic will not take this one now")
            await super().publish(events)

    topic = Picky()
    house.wall.at += TELL_AGAIN
    assert await house.service(publisher=topic).sweep() == 20

    assert len(topic.told) == 20
    assert sum(r.owes_event for r in await house.records()) == 20
    assert house.seen() == {"signalr": 40, "discord": 40}


async def test_a_sweep_stops_at_its_budget_and_goes_on_next_time():
    """One run works for eight seconds at most; what is left is done by the next."""
    house = House(ScriptedChannel("discord", *[RateLimitedError("slow down")] * 30))
    for number in range(30):
        await house.service().announce(a_signal(str(number)))
    house.wall.at += timedelta(minutes=1)

    class Slow(ScriptedChannel):
        async def send(self, message: Message) -> str | None:
            house.wall.at += timedelta(seconds=5)
            return await super().send(message)

    slow = Slow("discord")
    first = await house.service(channels={"discord": slow}).sweep()
    assert 0 < first < 30
    while await house.service(channels={"discord": slow}).sweep():
        pass

    assert sorted(slow.seen) == sorted(r.alert.alert_id for r in await house.records())
