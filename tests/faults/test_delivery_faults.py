"""Trouble at every await of a delivery's way, each point once; and the faults of the list that need a test by name."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

from alerts.adapters.documents import DeliveryDocuments
from alerts.models import Severity, State, alert_id
from alerts.service import AlertService
from alerts.subscriptions import Digest, Listener, Mute, Preferences
from tests.conftest import LONG
from tests.faults.delivery_house import (
    QUIET_FROM,
    QUIET_TO,
    DeliveryHouse,
    Inspector,
    Process,
    finish,
)
from tests.standins import CLOSE, a_signal
from tests.unit.alerts.house import a_listener, a_subscription

SIGNAL, ANOTHER = a_signal("one"), a_signal("two", symbol="MSFT")
ADA = alert_id(SIGNAL.signal_id, "ada")
LEASES = timedelta(minutes=1)
"""Longer than any claim or lease."""

type Work = Callable[[AlertService], Awaitable[object]]


def announce(service: AlertService) -> Awaitable[object]:
    return service.announce(SIGNAL)


def announce_another(service: AlertService) -> Awaitable[object]:
    return service.announce(ANOTHER)


def sweep(service: AlertService) -> Awaitable[object]:
    return service.sweep()


def resolve(service: AlertService) -> Awaitable[object]:
    return service.resolve("ada", ADA, "it is over")


def ada(*channels: str, severity: Severity = Severity.INFO, **changes: Any) -> Listener:
    return a_listener(a_subscription(*channels, subscriber="ada", severity=severity, **changes))


def ada_at_night() -> Listener:
    wishes = Preferences(subscriber="ada", quiet_from=QUIET_FROM, quiet_to=QUIET_TO)
    return a_listener(a_subscription("email", "discord", subscriber="ada"), preferences=wishes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a process does, one thing after the other with time in between, and the weather it meets."""

    listener: Callable[[], Listener]
    works: Sequence[tuple[timedelta, Work]]
    weather: tuple[str, ...] = ()
    signals: tuple[Any, ...] = (SIGNAL,)
    shows: int = 1
    """How many messages there are in the end on each channel, when nothing goes wrong."""


NOW, SOON = timedelta(), timedelta(seconds=31)
SCENES = {
    "mail": Scene(listener=lambda: ada("email"), works=[(NOW, announce)]),
    "webhook": Scene(listener=lambda: ada("discord"), works=[(NOW, announce)]),
    "critical webhook": Scene(
        listener=lambda: ada("discord", severity=Severity.CRITICAL), works=[(NOW, announce), (SOON, sweep)]
    ),
    "tried again": Scene(
        listener=lambda: ada("discord", "email"),
        works=[(NOW, announce), (SOON, sweep)],
        weather=("down",),
    ),
    "in doubt": Scene(
        listener=lambda: ada("discord", "email", severity=Severity.CRITICAL),
        works=[(NOW, announce), (SOON, sweep)],
        weather=("cut before",),
    ),
    "digest": Scene(
        listener=lambda: ada("email", "discord", digest=Digest.HOUR),
        works=[(NOW, announce), (NOW, announce_another), (timedelta(hours=1), sweep)],
        signals=(SIGNAL, ANOTHER),
    ),
    "held in quiet hours": Scene(
        listener=ada_at_night,
        works=[(timedelta(hours=2), announce), (timedelta(hours=8), sweep)],
    ),
    "corrected in its place": Scene(
        listener=lambda: ada("signalr", "discord"), works=[(NOW, announce), (NOW, resolve)]
    ),
}
RARE = ("kill before", "freeze before", "lose before", "stale") if LONG else ()
# Storage that is throttled for twenty calls on end leaves doubts of its own (what was sent cannot be written down), so
# that belongs to the state machine, which counts them.
MODES = ["kill after", "freeze after", "lose after", *RARE]


async def play(scene: Scene, at: int, mode: str) -> tuple[DeliveryHouse, int]:
    """Play a scene in which the *at*-th await goes wrong; how many awaits it has."""
    house = DeliveryHouse(scene.listener())
    for name, channel in house.truth.items():
        channel.weather += scene.weather if name != "signalr" else ()
    process, is_over = house.process(), False
    process.wire.plan(at, mode, times=20 if mode == "throttle" else 4)
    for wait, work in scene.works:
        house.wall.at += wait
        await process.run(_of(work, process))
        is_over = is_over or process.wire.is_frozen.is_set() or process.wire.is_dead
        if is_over:
            process = house.process()
    return house, sum(p.wire.calls for p in house.processes[:1])


async def _of(work: Work, process: Process) -> None:
    await work(process.service)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCENES)
async def test_trouble_at_every_await_loses_nothing_and_repeats_nothing_unsaid(name, mode):
    """
    Each await of the way fails once; others take over, and who froze comes back after all is done.

    The event comes again, as it was not acknowledged. In the end every delivery has come to its end, keyed channels
    showed it once, and a webhook showed it twice only if it is critical and says so.
    """
    scene = SCENES[name]
    for at in count(1):
        house, made = await play(scene, at, mode)
        inspector = Inspector(house)
        await inspector.check()
        house.wall.at += LEASES
        healthy = house.service()
        await healthy.sweep()
        await inspector.check()
        for signal in scene.signals:
            await healthy.announce(signal)
        if resolve in [work for _, work in scene.works]:
            await healthy.resolve("ada", ADA, "it is over")
        await finish(house)
        await inspector.check_end({})
        check_shows(house, scene)
        if made < at:
            break
    assert at > 5, "the way has more awaits than that"


def check_shows(house: DeliveryHouse, scene: Scene) -> None:
    """Keyed channels showed it; a webhook did, or the ledger says that nobody knows."""
    expected = {alert_id(s.signal_id, "ada") for s in scene.signals}
    for channel in scene.listener().subscriptions[0].channels:
        shown = [one for one in house.truth[channel].shown if not one.is_edit]
        told = {id_ for one in shown for id_ in one.alert_ids}
        assert told <= expected
        if house.truth[channel].is_keyed:
            assert told == expected
        elif not house.doubtful:
            assert told == expected
            assert len(shown) == 1


async def settled(house: DeliveryHouse) -> Inspector:
    """Let everything come to its end and hold it against the invariants."""
    inspector = Inspector(house)
    await inspector.check()
    await finish(house)
    await inspector.check_end({})
    return inspector


# --- events


@pytest.mark.parametrize("after", [timedelta(hours=23), timedelta(days=10)])
async def test_a_duplicate_after_days_changes_nothing(after):
    """E3-3, E3-4: however late an event comes again, nobody sees anything of it."""
    house = DeliveryHouse()
    await house.service().announce(SIGNAL)
    inspector = await settled(house)
    before, shown = await inspector.ledger(), list(house.shown)
    house.wall.at += after
    await house.service().announce(SIGNAL)
    await finish(house)
    assert (await inspector.ledger(), house.shown) == (before, shown)


async def test_an_event_dated_in_the_future_is_told_once_and_keeps_every_rule():
    """E3-11: a bar that closes tomorrow by a wrong clock is an alert like any other."""
    house = DeliveryHouse()
    await house.service().announce(a_signal(occurred_at=CLOSE + timedelta(days=1)))
    await settled(house)
    assert {one.subscriber for one in house.shown} == {"public", "ada", "bob", "cyd"}


async def test_a_flood_of_late_events_in_any_order_keeps_every_rule(seed):
    """E3-17: three hours of events arrive at once, mixed and repeated; cooldown, cap and freshness hold."""
    dice = Random(seed)
    house = DeliveryHouse()
    house.wall.at += timedelta(hours=13)
    signals = [
        a_signal(
            f"{i}", symbol=dice.choice(["AAPL", "MSFT"]), occurred_at=house.market.now() - timedelta(minutes=15 * i)
        )
        for i in range(12)
    ]
    flood = signals * 2
    dice.shuffle(flood)
    for signal in flood:
        await house.service().announce(signal)
    await settled(house)
    assert 1 <= len({one.alert_ids for one in house.truth["email"].shown if one.subscriber == "ada"}) <= 3
    told = {id_ for one in house.shown if one.subscriber == "cyd" for id_ in one.alert_ids}
    assert told == {alert_id(s.signal_id, "cyd") for s in signals}


async def test_any_order_and_multiplicity_gives_the_same_alerts_and_deliveries(seed):
    """I23: ids follow from the events alone; who is sent within a window may differ, and never too many are."""
    dice = Random(seed)
    signals = [a_signal(f"{i}", occurred_at=CLOSE - timedelta(minutes=20 * i)) for i in range(8)]
    ledgers = []
    for _ in range(3):
        order = [s for s in signals for _ in range(dice.randint(1, 3))]
        dice.shuffle(order)
        house = DeliveryHouse()
        for signal in order:
            await house.service().announce(signal)
        inspector = await settled(house)
        documents, deliveries = await inspector.ledger()
        alerts = {d.id for d in documents if "channels" in d.body}
        singles = {d.delivery_id for d in deliveries.values() if not d.members}
        ledgers.append((alerts, singles))
        assert {d.state for d in deliveries.values()} <= {State.SENT, State.SUPPRESSED, State.EXPIRED}
    assert ledgers[0] == ledgers[1] == ledgers[2]
    assert len(ledgers[0][0]) == 8 * 4


# --- processes and clocks


@pytest.mark.parametrize("minutes", [-5, 5])
@pytest.mark.parametrize("name", ["critical webhook", "tried again"])
async def test_the_clock_jumps_at_any_await(name, minutes):
    """E3-23: a wall clock that is set in the middle of a delivery neither loses nor repeats it in silence."""
    for at in count(1):
        house, made = await play(SCENES[name], at, "freeze after")
        house.jump(timedelta(minutes=minutes))
        for process in house.processes:
            await process.thaw()
        await settled(house)
        check_shows(house, SCENES[name])
        if made < at:
            break


async def test_members_of_a_digest_that_may_have_arrived_are_not_called_unsent():
    """A digest without an answer, then its address is switched off: nobody knows whether its alerts were seen."""
    house = DeliveryHouse(ada("email", digest=Digest.HOUR))
    await house.service().announce(SIGNAL)
    house.truth["email"].weather += ["cut after"]
    house.wall.at += timedelta(hours=1)
    await house.service().sweep()
    house.directory.change_endpoint("ada", "email", is_enabled=False, disabled_reason="it bounced")
    house.note_rules()
    inspector = await settled(house)
    _, deliveries = await inspector.ledger()
    assert {d.state for d in deliveries.values() if d.bucket_id} == {State.UNKNOWN}
    assert len(house.truth["email"].shown) == 1


async def test_a_process_that_stands_still_for_20_seconds_loses_nothing():
    """E3-22: a blocked loop, at whichever await, is either in time or has lost its claim and sends nothing."""
    for at in count(1):
        house, made = await play(SCENES["webhook"], at, "freeze after")
        house.wall.at += timedelta(seconds=20)
        await house.service().sweep()
        for process in house.processes:
            await process.thaw()
        await settled(house)
        assert len(house.truth["discord"].shown) <= 1
        if made < at:
            break


async def test_who_froze_before_sending_obeys_the_rules_of_the_end_of_his_claim():
    """E3-26, E3-59: a zombie whose claim ran out sends nothing, even if nobody has taken over."""
    sent_late = 0
    for at in count(1):
        house, made = await play(SCENES["webhook"], at, "freeze after")
        house.wall.at += timedelta(hours=2)
        before = len(house.shown)
        house.directory.change("ada", subscriptions=())
        house.note_rules()
        for process in house.processes:
            await process.thaw()
        sent_late += len(house.shown) > before
        assert house.violations == []
        await settled(house)
        if made < at:
            break
    assert sent_late == 0


# --- storage


async def test_what_expires_from_storage_while_it_is_tried_again_is_left_in_peace():
    """E3-34: after its retention an alert is gone with its deliveries, and no sweep stumbles over it."""
    house = DeliveryHouse(ada("email", "discord"))
    ledger = DeliveryDocuments(house.strict, retention=timedelta(hours=1))
    house.truth["email"].weather += ["down"]
    house.truth["discord"].weather += ["wait 1337"]
    service = house.service()
    for owner in (service, service.courier):
        object.__setattr__(owner, "deliveries", ledger)
    await service.announce(SIGNAL)
    asked = dict(house.truth["email"].requests)
    house.wall.at += timedelta(hours=2)
    assert await service.sweep() == 0
    assert await house.records("ada") == []
    assert house.truth["email"].requests == asked


# --- people


@pytest.mark.parametrize("change", ["unsubscribed", "deleted", "muted", "switched off"])
async def test_what_people_change_while_a_delivery_is_tried_again_is_obeyed(change):
    """E3-60, E3-61, E3-65: nothing more goes out, and the ledger says why."""
    house = DeliveryHouse(ada("email"))
    house.truth["email"].weather += ["down"]
    await house.service().announce(SIGNAL)
    match change:
        case "unsubscribed":
            house.directory.change("ada", subscriptions=())
        case "deleted":
            del house.directory.by_name["ada"]
        case "muted":
            until = CLOSE + timedelta(days=9)
            house.directory.change("ada", mutes=[Mute(mute_id="m", subscriber="ada", author="ada", until=until)])
        case _:
            house.directory.change_endpoint("ada", "email", is_enabled=False, disabled_reason="it bounced")
    house.note_rules()
    inspector = await settled(house)
    _, deliveries = await inspector.ledger()
    [delivery] = [d for d in deliveries.values() if d.alert_id == ADA]
    assert delivery.state in (State.SUPPRESSED, State.DISABLED)
    assert delivery.rule in ("unsubscribed", "mute", "disabled")
    assert house.truth["email"].shown == []


# --- the list


def test_the_list_of_faults_names_tests_that_exist():
    """Every number of the list has its tests, or a reason why there is none."""
    here = Path(__file__).parent
    rows = re.findall(r"^\| (\d+) \|[^|]+\| (.+) \|$", (here / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 66))
    for number, told in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", told)
        assert named or told.startswith("none: "), number
        for file, name in named:
            assert f"def {name}(" in (here.parent / file).read_text("utf-8"), f"{number}: {file}::{name}"
