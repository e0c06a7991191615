"""Where nobody can be reached: endpoints that are gone, services that are down, and who is told of it."""

from datetime import timedelta

import pytest

from alerts.adapters.breakers import StoredBreakers
from alerts.logic.breaking import FIRST_PAUSE, LONGEST_PAUSE, MOST_FAILURES, PROBE
from alerts.models import State
from alerts.service import AlertService
from alerts.trial import TrialMessages
from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    OutcomeUnknownError,
    RateLimitedError,
    RecipientGoneError,
    RefusedError,
    UnavailableError,
)
from tests.builders import WALL
from tests.standins import Around, a_signal
from tests.unit.alerts.house import House, ScriptedChannel, a_listener, a_subscription

SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
GONE = RecipientGoneError("the webhook was deleted")


def alices(*trouble: Exception, **channels: ScriptedChannel) -> House:
    """Alice hears everything on her own webhook, and has a mailbox too."""
    parts = {name: ScriptedChannel(name) for name in ("signalr", "email")}
    parts["discord"] = ScriptedChannel("discord", *trouble)
    return House(*(parts | channels).values(), listeners=[a_listener(a_subscription("discord", subscriber="alice"))])


def trials_of(house: House) -> TrialMessages:
    return TrialMessages(directory=house.directory, channels=house.channels, wall=house.wall, market=house.market)


async def signals_of(house: House) -> list[State]:
    return [r.deliveries[0].state for r in await house.records("alice") if r.alert.kind == "signal"]


# --- endpoints


@pytest.mark.parametrize(("trouble", "is_enabled"), [(GONE, False), (UnavailableError("down"), True)])
async def test_a_test_message_that_finds_nobody_disables_the_address(trouble, is_enabled):
    """A webhook that is gone is not asked again, whoever learnt it; other trouble is for who tests to see."""
    house = alices(trouble)

    with pytest.raises(type(trouble), match=str(trouble)):
        await trials_of(house).send_test("alice", "discord")

    assert house.directory.by_name["alice"].endpoints["discord"].is_enabled is is_enabled


async def test_a_webhook_that_is_gone_is_never_asked_again_and_its_owner_is_told_once():
    """Stop for ever at the first such answer; the owner hears of it by another channel."""
    house = alices(*[GONE] * 5)
    for number in range(4):
        await house.service().announce(a_signal(str(number)))
        house.wall.at += MINUTE
        await house.service().sweep()

    assert len(house.channels["discord"].asked) == 1
    assert sorted(await signals_of(house)) == [State.DEAD, *[State.DISABLED] * 3]
    [message] = house.channels["email"].messages
    assert message.alert.kind == "system"
    assert "the webhook was deleted" in message.alert.text
    assert "discord" in message.alert.title
    assert house.topic.told
    assert {event.subject for event in house.topic.told} == {"symbols/AAPL"}, "what is personal is told to nobody else"


async def test_what_waits_for_a_switched_off_endpoint_ends_with_it():
    """Open deliveries become DISABLED with the reason, without another request."""
    house = alices(RateLimitedError("slow down", retry_after=HOUR), GONE)
    await house.service().announce(a_signal("waits"))
    await house.service().announce(a_signal("finds out"))

    await house.later(HOUR)

    assert sorted(await signals_of(house)) == [State.DEAD, State.DISABLED]
    assert len(house.channels["discord"].asked) == 2


async def test_without_another_address_the_owner_is_told_at_the_hub():
    """SignalR needs no address: who signs in sees it."""
    house = alices(GONE)
    house.directory.change_endpoint("alice", "email", is_enabled=False)

    await house.service().announce(a_signal())
    await house.later(SECOND)

    assert house.channels["email"].messages == []
    assert [m.alert.kind for m in house.channels["signalr"].messages] == ["system"]


async def test_an_endpoint_that_refuses_again_and_again_is_switched_off():
    """Refusals count against the address; being busy or down does not."""
    house = alices(RefusedError("no"), UnavailableError("down"), RefusedError("no"), RefusedError("no"))
    house.directory.disables = 3
    for number in range(5):
        await house.service().announce(a_signal(str(number)))
        await house.later(3 * SECOND)

    assert house.directory.failures == [("alice", "discord", False)] * 3
    assert not house.directory.by_name["alice"].endpoints["discord"].is_enabled
    assert len(house.channels["discord"].asked) == 4
    assert len([m for m in house.channels["email"].messages if m.alert.kind == "system"]) == 1


async def test_what_works_again_forgets_its_failures():
    """One success is enough, and costs nothing where there was no failure."""
    house = alices(RefusedError("no"))
    house.directory.disables = 3
    for number in range(3):
        await house.service().announce(a_signal(str(number)))

    assert house.directory.successes == [("alice", "discord")]
    assert house.directory.by_name["alice"].endpoints["discord"].failures == 0


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ConfigurationError("ENDPOINT_KEYS has no key k1: add it"), State.RETRY_AT),
        (InvalidPayloadError("what is sealed was changed"), State.DISABLED),
    ],
)
async def test_an_address_that_cannot_be_opened_sends_nothing(error, state):
    """A missing key waits for a person; what was tampered with is nobody's address."""
    house = alices()

    async def step(name, call):
        if name == "address":
            raise error
        return await call()

    await house.service(directory=Around(house.directory, step)).announce(a_signal())

    delivery = await house.delivery("discord", "alice")
    assert (delivery.state, str(error) in (delivery.reason or "")) == (state, True)
    assert house.channels["discord"].asked == []
    if state is State.RETRY_AT:
        await house.later(MINUTE)
        assert (await house.delivery("discord", "alice")).state is State.SENT


# --- a service that is down


async def outage(house: House, service: AlertService, length: timedelta, step: timedelta) -> None:
    """Let time pass on one instance, sweeping."""
    end = house.wall.at + length
    while house.wall.at < end:
        house.wall.at += step
        await service.sweep()


async def test_an_hour_of_outage_with_dozens_pending_costs_a_handful_of_requests():
    """One probe at a time finds out for all; when it is back everything is sent, once."""
    down = ScriptedChannel("discord", *[UnavailableError("down")] * 10_000)
    house = House(ScriptedChannel("signalr"), down)
    service = house.service()
    for number in range(60):
        await service.announce(a_signal(str(number)))
    asked_first = len(down.asked)

    await outage(house, service, HOUR, MINUTE)

    assert asked_first <= MOST_FAILURES + 1
    assert len(down.asked) - asked_first <= HOUR / LONGEST_PAUSE + 8
    assert len(house.channels["signalr"].seen) == 60

    down.trouble.clear()
    await outage(house, service, 4 * LONGEST_PAUSE, 30 * SECOND)
    assert len(down.seen) == len(set(down.seen)) == 60


async def test_instances_share_what_they_find_out():
    """A fresh instance that only sweeps asks a service that is down no more than the others."""
    down = ScriptedChannel("discord", *[UnavailableError("down")] * 10_000)
    house = House(down)
    service = house.service()
    for number in range(30):
        await service.announce(a_signal(str(number)))
    before = len(down.asked)

    for _ in range(10):
        house.wall.at += SECOND / 2
        await house.service().sweep()

    assert len(down.asked) == before


@pytest.mark.parametrize("error", [RateLimitedError("slow down"), RefusedError("no")])
async def test_a_service_that_says_no_is_well(error):
    """Neither being asked to wait nor a refusal stops the others."""
    channel = ScriptedChannel("discord", *[error] * 30)
    house = House(channel)
    service = house.service()

    for number in range(40):
        await service.announce(a_signal(str(number)))

    assert len(channel.asked) == 40
    assert len(channel.seen) == 10


class Breakers:
    """Two instances over one storage."""

    def __init__(self) -> None:
        self.house = House()
        self.wall = self.house.wall
        self.mine, self.theirs = (StoredBreakers(self.house.documents, self.wall) for _ in range(2))

    async def break_it(self) -> None:
        for _ in range(MOST_FAILURES):
            assert await self.mine.admits("discord") is None
            await self.mine.failed("discord", "down")


@pytest.fixture
def breakers() -> Breakers:
    return Breakers()


async def test_failures_in_a_row_pause_a_service_and_successes_do_not_let_them_add_up(breakers):
    """Four failures, a success, four failures: nobody pauses; the fifth in a row does."""
    for _ in range(2):
        for _ in range(MOST_FAILURES - 1):
            await breakers.mine.failed("discord", "down")
        await breakers.mine.worked("discord")
    assert await breakers.mine.admits("discord") is None

    await breakers.break_it()

    assert await breakers.mine.admits("discord") == WALL + FIRST_PAUSE
    assert await breakers.mine.admits("signalr") is None


async def test_after_the_pause_one_probe_is_let_through(breakers):
    """However many instances ask, one sends; the others wait for what becomes of it."""
    await breakers.break_it()
    await breakers.theirs.look(["discord"])
    breakers.wall.at += FIRST_PAUSE

    answers = [await each.admits("discord") for each in (breakers.mine, breakers.theirs, breakers.mine)]

    assert [answer is None for answer in answers] == [True, False, False]
    await breakers.mine.worked("discord")
    breakers.wall.at += 6 * SECOND
    assert await breakers.theirs.admits("discord") is None


async def test_a_probe_that_fails_doubles_the_pause_up_to_its_longest(breakers):
    """Each failed probe waits longer; a straggler of before does not."""
    await breakers.break_it()
    await breakers.mine.failed("discord", "a straggler")
    pauses = []
    for _ in range(8):
        until = await breakers.mine.admits("discord")
        assert until is not None
        pauses.append(until - breakers.wall.at)
        breakers.wall.at = until
        assert await breakers.mine.admits("discord") is None
        await breakers.mine.failed("discord", "still down")

    assert pauses[0] == FIRST_PAUSE
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE


async def test_a_probe_that_never_came_back_is_followed_by_another(breakers):
    """An instance that died while it probed does not stop a service for ever."""
    await breakers.break_it()
    breakers.wall.at += FIRST_PAUSE
    assert await breakers.mine.admits("discord") is None

    breakers.wall.at += PROBE

    await breakers.theirs.look(["discord"])
    assert await breakers.theirs.admits("discord") is None


async def test_a_service_that_works_costs_no_storage(breakers):
    """Nothing is read or written while all is well."""
    asked = []

    async def step(name, call):
        asked.append(name)
        return await call()

    quiet = StoredBreakers(Around(breakers.house.documents, step), breakers.wall)
    for _ in range(5):
        assert await quiet.admits("discord") is None
        await quiet.worked("discord")

    assert asked == []


async def test_an_answer_that_never_came_counts_as_trouble():
    """A service that takes connections and says nothing is down, too."""
    channel = ScriptedChannel("discord", *[OutcomeUnknownError("no answer")] * 100)
    house = House(channel)
    service = house.service()

    for number in range(40):
        await service.announce(a_signal(str(number)))

    assert len(channel.asked) == MOST_FAILURES
