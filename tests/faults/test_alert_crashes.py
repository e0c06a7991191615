"""A process may die, and an answer may be lost, at every single call: no alert is lost and nothing is sent twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, product

import pytest

from alerts.adapters.documents import GRACE
from alerts.models import FINAL, Severity, State
from alerts.service import AlertService
from shared.errors import OutcomeUnknownError, TroopError
from tests.standins import Fuse, Killed, a_signal, fused
from tests.unit.alerts.house import LEASE, House, a_subscription

SIGNAL = a_signal()
SEVERITIES = [Severity.INFO, Severity.CRITICAL]


def a_process(house: House, fuse: Fuse) -> AlertService:
    """A service whose every neighbour stands behind one fuse; a channel that loses its answer leaves a doubt."""
    lost = OutcomeUnknownError("no answer")
    return house.service(
        documents=fused(house.documents, fuse),
        channels={name: fused(channel, fuse, lost) for name, channel in house.channels.items()},
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
    assert all(d.state in FINAL for d in record.deliveries), states
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
        if delivery.state is not State.SENT or seen[delivery.channel] > 1:
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
    assert stored >= await calls_of(severity) - 1


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
