"""A process may die, and an answer may be lost, at every single call: no alert is lost and nothing is sent twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, product

import pytest

from alerts.adapters.documents import GRACE
from alerts.models import PUBLIC, Severity, State, alert_id
from alerts.service import AlertService
from alerts.subscriptions import Digest
from shared.errors import OutcomeUnknownError, RecipientGoneError, TroopError
from tests.standins import Fuse, Killed, a_signal, fused
from tests.unit.alerts.house import LEASE, House, ScriptedChannel, a_subscription

SIGNAL = a_signal()
SEVERITIES = [Severity.INFO, Severity.CRITICAL]


def a_process(house: House, fuse: Fuse) -> AlertService:
    """A service whose every neighbour stands behind one fuse; a channel that loses its answer leaves a doubt."""
    lost = OutcomeUnknownError("no answer")
    return house.service(
        documents=fused(house.documents, fuse),
        channels={name: fused(channel, fuse, lost) for name, channel in house.channels.items()},
        directory=fused(house.directory, fuse),
        publisher=fused(house.topic, fuse),
    )


@contextmanager
def dying() -> Iterator[None]:
    """What a host sees of a process that died or failed: nothing was acknowledged."""
    try:
        yield
    except (Killed, TroopError):
        return


async def settle(house: House) -> None:
    """Let healthy instances sweep until nothing is owed."""
    for _ in range(6):
        house.wall.at += max(GRACE, LEASE) + timedelta(seconds=1)
        await house.service().sweep()


def a_house(severity: Severity) -> House:
    return House(subscriptions=[a_subscription(severity=severity)])


async def check(house: House, severity: Severity) -> None:
    """What must hold once the trouble is over."""
    [record] = await house.records()
    states = {d.channel: d for d in record.deliveries}
    seen = house.seen()
    assert all(d.is_over for d in record.deliveries), states
    assert not record.owes_event
    assert set(house.topic.ids()) == {record.alert.alert_id}
    assert states["signalr"].state is State.SENT
    assert seen["signalr"] >= 1
    discord = states["discord"]
    if severity is Severity.INFO:
        assert seen["discord"] <= 1, "an alert that is not critical was shown twice"
        assert discord.state in (State.SENT, State.UNKNOWN)
        assert discord.state is State.UNKNOWN or seen["discord"] == 1
    else:
        assert discord.state is State.SENT
        assert seen["discord"] >= 1
    for delivery in record.deliveries:
        if delivery.doubts or delivery.state is not State.SENT or seen[delivery.channel] > 1:
            assert delivery.reason, "a doubt without a reason"
        assert 1 <= delivery.attempts <= 3
    calm = await house.records(), list(house.topic.ids()), house.seen()
    await house.service().announce(SIGNAL)
    await settle(house)
    assert (await house.records(), house.topic.ids(), house.seen()) == calm


async def calls_of(severity: Severity) -> int:
    """How many calls an announcement makes when all goes well."""
    house, fuse = a_house(severity), Fuse()
    await a_process(house, fuse).announce(SIGNAL)
    return fuse.calls


@pytest.mark.parametrize(("mode", "severity"), list(product(Fuse.MODES, SEVERITIES)))
async def test_trouble_at_every_call_and_the_event_comes_again(mode, severity):
    """Whatever call fails, the redelivered event and the sweep bring the alert to its end on every channel."""
    for at in range(1, await calls_of(severity) + 1):
        house = a_house(severity)
        with dying():
            await a_process(house, Fuse(at, mode)).announce(SIGNAL)
        await house.service().announce(SIGNAL)
        await settle(house)
        await check(house, severity)


@pytest.mark.parametrize(("mode", "severity"), list(product(Fuse.MODES, SEVERITIES)))
async def test_trouble_at_every_call_and_only_the_sweep_comes(mode, severity):
    """Once an alert is stored, the sweep alone finishes it: events only make it fast."""
    stored = 0
    for at in range(1, await calls_of(severity) + 1):
        house = a_house(severity)
        with dying():
            await a_process(house, Fuse(at, mode)).announce(SIGNAL)
        if not await house.records():
            assert house.seen() == {"signalr": 0, "discord": 0}
            continue
        stored += 1
        await settle(house)
        await check(house, severity)
    assert stored >= await calls_of(severity) - 2, "before the batch only the rules are read"


@pytest.mark.parametrize(("first", "second"), [("kill before", "kill after"), ("kill after", "kill before")])
async def test_the_successor_dies_too(first, second):
    """A second death, at any call of the sweep that cleans up after the first, loses and repeats nothing either."""
    for at in range(1, await calls_of(Severity.INFO) + 1):
        for then in count(1):
            house = a_house(Severity.INFO)
            with dying():
                await a_process(house, Fuse(at, first)).announce(SIGNAL)
            house.wall.at += LEASE
            fuse = Fuse(then, second)
            with dying():
                await a_process(house, fuse).sweep()
            if fuse.calls < then:
                break
            await house.service().announce(SIGNAL)
            await settle(house)
            await check(house, Severity.INFO)


async def test_an_alert_that_is_shown_twice_is_critical_and_says_so():
    """Only a critical alert is ever repeated on a channel that cannot hide it, and the ledger tells."""
    repeated = 0
    for at in range(1, await calls_of(Severity.CRITICAL) + 1):
        house = a_house(Severity.CRITICAL)
        with dying():
            await a_process(house, Fuse(at, "kill after")).announce(SIGNAL)
        await settle(house)
        if house.seen()["discord"] > 1:
            repeated += 1
            assert "possible repeat" in ((await house.reasons())["discord"] or "")
    assert repeated


# --- digests, corrections and endpoints that are gone

DIGEST_END = timedelta(hours=2)
ALERT_ID = alert_id(SIGNAL.signal_id, PUBLIC)


async def crashed(house: House, at: int, mode: str, work) -> int:
    """Let *work* run in a process that fails at its *at*-th call; how many calls it made."""
    fuse = Fuse(at, mode)
    with dying():
        await work(a_process(house, fuse))
    return fuse.calls


def a_digest_house(*channels: str) -> House:
    subscription = a_subscription(*channels, subscriber="alice", digest=Digest.HOUR)
    return House(*map(ScriptedChannel, channels), subscriptions=[subscription])


@pytest.mark.parametrize("mode", Fuse.MODES)
@pytest.mark.parametrize("channel", ["email", "discord"])
async def test_trouble_at_every_call_of_a_digest_is_one_message_or_a_doubt(channel, mode):
    """Whatever call fails while a digest is sent, its alerts end alike, and a keyed channel shows one message."""
    for at in count(1):
        house = a_digest_house(channel)
        for name in ("one", "two", "three"):
            await house.service().announce(a_signal(name))
        house.wall.at += DIGEST_END
        made = await crashed(house, at, mode, AlertService.sweep)
        await settle(house)

        records = await house.records("alice")
        digest = await house.ledger.digest("alice", (await house.delivery_of(records[0], channel)).by or "")
        members = [(await house.delivery_of(record, channel)) for record in records]
        assert {(m.state, m.by, m.provider_id) for m in members} == {
            (digest.state, digest.delivery_id, digest.provider_id)
        }
        assert digest.is_over
        shown = {message.delivery_id for message in house.channels[channel].messages}
        assert shown <= {digest.delivery_id}
        if channel == "email":
            assert (digest.state, shown) == (State.SENT, {digest.delivery_id})
        else:
            assert len(house.channels[channel].messages) <= 1
            assert digest.state is State.UNKNOWN or len(house.channels[channel].messages) == 1
        assert await house.ledger.due(house.wall.at + timedelta(days=1), 10) == []
        if made < at:
            break


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_trouble_at_every_call_while_a_digest_is_joined_loses_nothing(mode):
    """An alert whose opening fails at any call is in the digest once, after the event has come again."""
    for at in count(1):
        house = a_digest_house("email")
        await house.service().announce(a_signal("one"))
        made = await crashed(house, at, mode, lambda service: service.announce(a_signal("two")))
        await house.service().announce(a_signal("two"))
        house.wall.at += DIGEST_END
        await settle(house)

        [message] = house.channels["email"].messages
        assert message.digest is not None
        assert len(message.digest) == len({item["alert_id"] for item in message.digest}) == 2
        if made < at:
            break


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_trouble_at_every_call_of_a_correction_corrects_in_its_place(mode):
    """Whatever call fails while an alert is resolved, what was shown is corrected and nothing is shown anew."""
    for at in count(1):
        house = a_house(Severity.INFO)
        await house.service().announce(SIGNAL)
        made = await crashed(house, at, mode, lambda service: service.resolve(PUBLIC, ALERT_ID, "it is over"))
        await house.service().resolve(PUBLIC, ALERT_ID, "it is over")
        await settle(house)

        record = await house.whole()
        assert (record.alert.version, record.alert.title) == (2, "AAPL: long at 561.70 (over)")
        assert [(d.version, d.state) for d in record.deliveries] == [(n, State.SENT) for n in (1, 1, 2, 2)]
        assert house.seen() == {"signalr": 1, "discord": 1}
        for channel in house.channels.values():
            assert {(id_, message.item["version"]) for id_, message in channel.edited} == {("m-1", 2)}
        if made < at:
            break


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_trouble_at_every_call_after_a_webhook_was_deleted_asks_it_once(mode):
    """
    Once a webhook has said that it is gone and that was written, it is never asked again, and its owner is told once.

    A process that dies between the answer and the first write after it knows nothing of the answer.
    """
    for at in count(1):
        gone = ScriptedChannel("discord", *[RecipientGoneError("the webhook was deleted")] * 9)
        house = House(
            ScriptedChannel("signalr"),
            gone,
            ScriptedChannel("email"),
            subscriptions=[a_subscription("discord", subscriber="alice", severity=Severity.CRITICAL)],
        )
        made = await crashed(house, at, mode, lambda service: service.announce(SIGNAL))
        await house.service().announce(SIGNAL)
        await settle(house)
        await house.service().announce(a_signal("another"))
        await settle(house)

        asked_blindly = len(gone.asked) - len(house.directory.failures)
        assert asked_blindly <= 1
        assert len(house.directory.failures) <= 1 or mode == "raise after"
        told = [m.alert for m in house.channels["email"].messages if m.alert.kind == "system"]
        assert len(told) == 1, (at, mode)
        states = [
            d.state for record in await house.records("alice") for d in record.deliveries if d.channel == "discord"
        ]
        assert not {State.SENT, State.RETRY_AT, State.PENDING} & set(states)
        if made < at:
            break
