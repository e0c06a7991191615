"""Digests: what closes together is one message a subscriber, channel and window."""

from datetime import time, timedelta

import pytest

from alerts.logic.policy import bucket_id
from alerts.models import Severity, State, digest_id
from alerts.subscriptions import Digest, Mute, Preferences
from shared.clock import MarketTime
from shared.errors import OutcomeUnknownError, RateLimitedError, RecipientGoneError, UnavailableError
from tests.builders import WALL
from tests.standins import CLOSE, a_signal
from tests.unit.alerts.house import House, ScriptedChannel, a_listener, a_subscription

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)


def a_house(*trouble: Exception, channel: str = "email", **changes) -> House:
    """Alice gathers an hour; the market is at the beginning of one."""
    mine = a_subscription(channel, subscriber="alice", **({"digest": Digest.HOUR} | changes))
    names = {"signalr", channel}
    return House(
        *(ScriptedChannel(name, *(trouble if name == channel else ())) for name in sorted(names)),
        listeners=[a_listener(mine)],
    )


async def announce(house: House, *names: str, **changes) -> None:
    for name in names:
        await house.service().announce(a_signal(name, **changes))
        house.wall.at += timedelta(seconds=1)


async def states_of(house: House) -> list[State]:
    return [record.deliveries[0].state for record in await house.records("alice")]


async def test_what_closes_together_is_one_message():
    """Nothing is sent before the window closes; then one message stands for all, and each of them says so."""
    house = a_house()
    await announce(house, "one", "two", "three")
    await house.later(*[MINUTE] * 58)
    assert house.channels["email"].asked == []
    assert await states_of(house) == [State.PENDING] * 3

    await house.later(*[MINUTE] * 3)

    [message] = house.channels["email"].messages
    records = await house.records("alice")
    assert message.digest is not None
    assert [item["alert_id"] for item in message.digest] == sorted(r.alert.alert_id for r in records)
    assert message.alert.title == "3 alerts: AAPL"
    assert message.to is not None
    assert {(d.state, d.provider_id, d.by) for r in records for d in r.deliveries} == {
        (State.SENT, "m-1", message.delivery_id)
    }
    assert message.delivery_id == digest_id("alice", "email", bucket_id("alice", "email", Digest.HOUR, CLOSE))
    assert await house.ledger.due(house.wall.at + 9 * HOUR, 9) == []


async def test_every_window_is_a_message_of_its_own():
    """The next hour's alerts are in the next hour's digest; what closes at the boundary is in exactly one."""
    house = a_house()
    await announce(house, "one")
    house.wall.at += HOUR
    await announce(house, "two", occurred_at=CLOSE + HOUR)
    await house.later(*[MINUTE] * 62)

    contents = [[item["occurred_at"] for item in m.digest or ()] for m in house.channels["email"].messages]
    assert contents == [["2012-11-21T21:00:00Z"], ["2012-11-21T22:00:00Z"]]


async def test_what_comes_after_its_window_is_in_the_open_one():
    """A late alert is neither lost nor a message of its own at once."""
    house = a_house()
    await announce(house, "one")
    await house.later(*[MINUTE] * 61)
    await announce(house, "late")
    assert len(house.channels["email"].messages) == 1

    await house.later(*[MINUTE] * 61)

    assert [len(m.digest or ()) for m in house.channels["email"].messages] == [1, 1]
    assert await states_of(house) == [State.SENT] * 2


async def test_a_critical_alert_does_not_wait_for_the_digest():
    """Critical passes digests."""
    house = a_house(severity=Severity.CRITICAL)

    await announce(house, "one")

    [message] = house.channels["email"].messages
    assert message.digest is None


async def test_a_digest_is_tried_again_as_the_same_message():
    """Trouble that passes repeats the digest under the same key; its members wait with it."""
    house = a_house(UnavailableError("down"), RateLimitedError("slow down"))
    await announce(house, "one", "two")
    await house.later(*[MINUTE] * 60)
    assert await states_of(house) == [State.PENDING] * 2

    await house.later(*[MINUTE] * 3)

    assert len(house.channels["email"].asked) == 3
    assert len(house.channels["email"].messages) == 1
    assert await states_of(house) == [State.SENT] * 2


@pytest.mark.parametrize(("channel", "state", "messages"), [("email", State.SENT, 1), ("discord", State.UNKNOWN, 0)])
async def test_a_digest_without_an_answer_follows_the_policy(channel, state, messages):
    """Where a repeat does not show it is sent again with its key, elsewhere all its members are in doubt."""
    house = a_house(OutcomeUnknownError("no answer"), channel=channel)
    await announce(house, "one", "two")

    await house.later(*[MINUTE] * 63)

    assert await states_of(house) == [state] * 2
    assert len(house.channels[channel].messages) == messages


async def test_a_digest_to_nobody_ends_all_its_members():
    """An address that is gone is a reason for each of them."""
    house = a_house(RecipientGoneError("the mailbox was closed"))
    await announce(house, "one", "two")

    await house.later(*[MINUTE] * 62)

    ends = [record.deliveries[0] for record in await house.records("alice") if record.alert.kind == "signal"]
    assert [d.state for d in ends] == [State.DEAD] * 2
    assert all("the mailbox was closed" in (d.reason or "") for d in ends)


async def test_each_member_is_judged_again_when_the_digest_closes():
    """What was muted meanwhile is left out and says why; the others go."""
    house = a_house()
    await announce(house, "one")
    await announce(house, "two", symbol="MSFT")
    mute = Mute(mute_id="m1", subscriber="alice", author="alice", symbols=frozenset({"MSFT"}), until=CLOSE + 9 * HOUR)
    house.directory.change("alice", mutes=[mute])

    await house.later(*[MINUTE] * 62)

    [message] = house.channels["email"].messages
    assert [item["symbol"] for item in message.digest or ()] == ["AAPL"]
    assert sorted(await states_of(house)) == [State.SENT, State.SUPPRESSED]


async def test_a_digest_of_which_nothing_is_left_is_not_sent():
    """A digest without members ends as SUPPRESSED; no empty message is sent."""
    house = a_house()
    await announce(house, "one", "two")
    house.directory.change("alice", subscriptions=())

    await house.later(*[MINUTE] * 62)

    assert house.channels["email"].asked == []
    assert await states_of(house) == [State.SUPPRESSED] * 2
    digest = await house.ledger.digest(
        "alice", digest_id("alice", "email", bucket_id("alice", "email", Digest.HOUR, CLOSE))
    )
    assert (digest.state, digest.rule) == (State.SUPPRESSED, "digest")
    assert await house.ledger.due(house.wall.at + 9 * HOUR, 9) == []


async def test_a_digest_that_closes_in_quiet_hours_waits_for_their_end():
    """The night holds digests too."""
    house = a_house()
    quiet = Preferences(subscriber="alice", zone="UTC", quiet_from=time(22), quiet_to=time(23))
    house.directory.change("alice", preferences=quiet)
    await announce(house, "one")

    await house.later(*[MINUTE] * 118)
    assert house.channels["email"].asked == []
    await house.later(*[MINUTE] * 4)

    assert await states_of(house) == [State.SENT]


@pytest.mark.parametrize("digest", [Digest.NONE, Digest.DAY])
async def test_a_replay_that_is_always_looked_at_by_night_delivers_after_one_night(digest):
    """A market day between two sweeps must not make every sweep's night one more to wait for."""
    day_a_second = MarketTime(market=CLOSE + 2 * HOUR, wall=WALL, speed=86_400)
    quiet = Preferences(subscriber="alice", zone="UTC", quiet_from=time(20), quiet_to=time(8))
    mine = a_subscription("email", subscriber="alice", digest=digest)
    house = House(ScriptedChannel("email"), listeners=[a_listener(mine, preferences=quiet)], market=day_a_second)
    await house.service().announce(a_signal("one"))
    assert house.channels["email"].asked == []

    await house.later(*[timedelta(seconds=1)] * 3)

    assert await states_of(house) == [State.SENT]


async def test_a_digest_of_late_ones_waits_for_its_close_however_often_it_is_looked_at():
    """Where the market is slower than the wall's minute allows, a digest is looked at before it closes."""
    mine = a_subscription("email", subscriber="alice", digest=Digest.HOUR)
    slow = MarketTime(market=CLOSE + HOUR + MINUTE, wall=WALL, speed=2)
    house = House(ScriptedChannel("email"), listeners=[a_listener(mine)], market=slow)
    await house.service().announce(a_signal("late"))

    await house.later(*[MINUTE] * 29)
    assert house.channels["email"].asked == []
    await house.later(*[MINUTE] * 3)

    assert await states_of(house) == [State.SENT]


async def test_more_than_fit_into_one_digest_are_two():
    """Nobody is left out of a busy hour."""
    house = a_house()
    await announce(house, *map(str, range(100)))

    await house.later(*[MINUTE] * 63)

    assert sorted(len(m.digest or ()) for m in house.channels["email"].messages) == [10, 90]
    shown = {item["alert_id"] for m in house.channels["email"].messages for item in m.digest or ()}
    assert len(shown) == 100


async def test_mail_is_gathered_by_day_unless_asked_otherwise():
    """E-mail's own habit is a digest a day."""
    house = a_house(digest=None)
    await announce(house, "one", "two")

    await house.later(*[HOUR] * 2)
    assert house.channels["email"].asked == []
    await house.later(*[HOUR] * 2)

    assert len(house.channels["email"].messages) == 1
