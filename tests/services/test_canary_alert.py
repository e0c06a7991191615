import json
import logging
from datetime import timedelta

import httpx
import pytest

from alerts.adapters.documents import DeliveryDocuments
from alerts.canary import (
    CHANNEL,
    KEEP,
    LATE,
    PERIOD,
    SUBSCRIBER,
    Canary,
    CanaryChannel,
    CanarySent,
    PulseDocument,
    blueprint,
    canary_id,
)
from alerts.courier import Courier
from alerts.models import State
from shared.clock import MarketClock, StoppedClock
from shared.errors import ConfigurationError, InvalidPayloadError, UnavailableError
from shared.http_client import HttpClient
from shared.inbound import DeadLetters
from tests.builders import WALL, a_cloud_event, documents
from tests.standins import Fuse, Killed, Topic, fused

SECOND = timedelta(seconds=1)


class Nobody:
    """A directory without subscribers, and a breaker that never trips."""

    async def listeners(self):
        return []

    async def admits(self, channel):
        return None

    async def worked(self, *args):
        return

    async def failed(self, *args):
        return


class Sink(httpx.AsyncBaseTransport):
    """The private sink: counts its calls, and answers as told."""

    def __init__(self):
        self.status = 200
        self.called = 0

    async def handle_async_request(self, request):
        self.called += 1
        return httpx.Response(self.status)


class World:
    """An instance of the app with its canary, over storage that instances share."""

    def __init__(self, storage, wall, topic=None, sink=None):
        self.wall = wall
        self.storage = storage
        self.topic = topic or Topic()
        self.book = PulseDocument(storage, wall)
        http = HttpClient("sink", transport=lambda: sink) if sink else None
        channel = CanaryChannel(self.book, wall, url="https://sink.test/ping/secret" if sink else "", http=http)
        self.deliveries = DeliveryDocuments(storage, KEEP)
        self.courier = Courier(
            deliveries=self.deliveries,
            directory=Nobody(),
            channels={CHANNEL: channel},
            breakers=Nobody(),
            wall=wall,
            market=MarketClock(wall),
            lease=timedelta(seconds=30),
        )
        self.canary = Canary(courier=self.courier, deliveries=self.deliveries, publisher=self.topic, book=self.book)

    async def deliver(self):
        """Bring what was published to who hears it."""
        while self.topic.told:
            await self.canary.hear(self.topic.told.pop(0))

    async def ledger(self):
        return await self.deliveries.listed(SUBSCRIBER, None, newest_first=True, limit=100)


@pytest.fixture
def wall():
    return StoppedClock(WALL)


@pytest.fixture
async def storage(wall):
    store = documents(wall)
    yield store
    await store.close()


@pytest.fixture
def world(storage, wall):
    return World(storage, wall)


async def test_a_canary_comes_back_and_says_how_long_it_took(world, wall):
    """From the topic through function, ledger and channel: arrival and latency are recorded."""
    assert await world.canary.send()
    wall.at += 2 * SECOND
    await world.deliver()
    wall.at += 10 * SECOND

    [record] = await world.ledger()
    assert [d.state for d in record.deliveries] == [State.SENT]
    assert not record.owes_event
    assert await world.canary.health() == {
        "last_sent_at": WALL,
        "last_arrived_at": WALL + 2 * SECOND,
        "latency_ms": 2000.0,
        "age_s": 10.0,
        "is_late": False,
    }


async def test_two_instances_let_out_one_a_period(storage, wall):
    """However many fire in a period, one alert stands in the ledger; the next period has its own."""
    topic = Topic()
    one, two = World(storage, wall, topic), World(storage, wall, topic)
    assert await one.canary.send()
    wall.at += SECOND
    assert not await two.canary.send()
    await one.deliver()
    wall.at += PERIOD
    assert await two.canary.send()
    await two.deliver()

    assert len(await one.ledger()) == 2


async def test_twins_that_saw_nothing_of_each_other_leave_one_alert(storage, wall):
    """The same period gives the same id, so the ledger knows the second one."""
    one, two = World(storage, wall), World(storage, wall)
    event = CanarySent(occurred_at=wall.now(), recorded_at=wall.now(), canary_id=canary_id(wall.now()))
    await one.canary.hear(event)
    await two.canary.hear(event.model_copy(update={"recorded_at": wall.now() + SECOND}))
    await two.canary.hear(event)

    assert len(await one.ledger()) == 1


@pytest.mark.parametrize("mode", ["kill before", "kill after"])
@pytest.mark.parametrize("at", range(1, 12))
async def test_a_kill_anywhere_loses_no_canary(storage, wall, at, mode):
    """Whoever comes next in the period lets the same one out, and the ledger has one alert, told."""
    fuse = Fuse(at, mode)
    topic = Topic()
    first = World(fused(storage, fuse), wall, fused(topic, fuse))
    try:
        await first.canary.send()
        while topic.told:
            await first.canary.hear(topic.told[0])
            topic.told.pop(0)
    except Killed:
        pass
    wall.at += timedelta(minutes=1)
    second = World(storage, wall, topic)
    await second.canary.send()
    await second.deliver()
    for due in await second.deliveries.due(wall.now() + timedelta(minutes=1), 10):
        record = await second.deliveries.read(due.subscriber, due.id)
        wall.at += timedelta(minutes=1)
        for delivery in record.deliveries:
            await second.courier.deliver(record, delivery)

    [record] = await second.ledger()
    assert [d.state for d in record.deliveries] == [State.SENT]
    assert (await second.canary.health())["last_arrived_at"] is not None


async def test_a_canary_that_stays_away_for_two_periods_is_late(world, wall, caplog):
    """The app says so itself, with each tick, until one comes back."""
    await world.canary.send()
    for _ in range(2):
        wall.at += PERIOD
        await world.canary.send()
    assert not (await world.canary.health())["is_late"]
    assert "canary.late" not in caplog.text

    wall.at += SECOND
    assert (await world.canary.health())["is_late"]
    with caplog.at_level(logging.ERROR):
        await world.canary.send()
    assert "canary.late" in caplog.text

    await world.deliver()
    assert not (await world.canary.health())["is_late"]


async def test_a_topic_that_takes_nothing_makes_it_late(storage, wall):
    """A canary that never gets out is missed like one that never comes back."""
    world = World(storage, wall, Topic(*[UnavailableError("down")] * 5))
    for _ in range(4):
        with pytest.raises(UnavailableError):
            await world.canary.send()
        wall.at += PERIOD

    assert (await world.canary.health())["is_late"]


async def test_an_app_that_was_off_begins_anew(world, wall):
    """Nothing was let out while it was off, so nothing is missed when it is on again."""
    await world.canary.send()
    await world.deliver()
    wall.at += timedelta(days=3)

    assert not (await world.canary.health())["is_late"]


async def test_an_old_canary_does_not_excuse_the_newest(world, wall):
    """After a delay of hours the first to come says nothing of those behind it."""
    for _ in range(4):
        await world.canary.send()
        wall.at += PERIOD
    oldest = world.topic.told.pop(0)
    await world.canary.hear(oldest)

    assert (await world.canary.health())["is_late"]
    assert wall.now() - WALL > LATE


async def test_it_is_in_nobodys_list(world):
    """Its alerts are the canary's own, and no event tells the house of them."""
    await world.canary.send()
    await world.deliver()

    assert await world.deliveries.listed("public", None, newest_first=True, limit=10) == []
    assert world.topic.told == []


async def test_its_alerts_leave_the_ledger_after_two_days(world, wall):
    """A hundred thousand a year would be kept for nobody."""
    await world.canary.send()
    await world.deliver()
    wall.at += KEEP

    assert await world.ledger() == []


@pytest.mark.parametrize("changes", [{"canary_id": "made-up"}, {"recorded_at": WALL + timedelta(days=365)}])
async def test_a_forged_canary_is_refused(world, wall, changes):
    """Who may publish to the topic could otherwise keep the alarm silent for ever."""
    event = CanarySent(occurred_at=WALL, recorded_at=WALL, canary_id=canary_id(WALL)).model_copy(update=changes)
    if "recorded_at" in changes:
        event = event.model_copy(update={"canary_id": canary_id(event.recorded_at)})

    with pytest.raises(InvalidPayloadError):
        await world.canary.hear(event)
    assert await world.ledger() == []


@pytest.mark.parametrize("status", [500, 404])
async def test_arrival_counts_only_when_the_sink_took_it(storage, wall, status):
    """The last step of the path is part of it; what was not taken is tried again."""
    sink = Sink()
    sink.status = status
    world = World(storage, wall, sink=sink)
    await world.canary.send()
    await world.deliver()
    assert (await world.canary.health())["last_arrived_at"] is None

    sink.status = 200
    wall.at += timedelta(hours=2)
    [record] = await world.ledger()
    await world.courier.deliver(record, record.deliveries[0])

    assert (await world.canary.health())["last_arrived_at"] == wall.now()
    assert sink.called == 2


async def test_the_sinks_address_is_in_no_ledger(storage, wall):
    """It is a secret: who has it can keep the alarm silent."""
    sink = Sink()
    sink.status = 500
    world = World(storage, wall, sink=sink)
    await world.canary.send()
    await world.deliver()

    everything = [d.body for c in ("deliveries", "system") for d in await storage.feed(c)]
    assert "ping" not in json.dumps(everything)


def test_a_sink_without_an_address_is_named(storage, wall):
    """A wrong setting is said at the start."""
    with pytest.raises(ConfigurationError, match="CANARY_URL"):
        CanaryChannel(PulseDocument(storage, wall), wall, url="sink.test")


async def test_its_function_hears_the_event_as_it_is_on_the_wire(world, wall, storage):
    """What was published is what arrives, and can be replayed."""
    letters = DeadLetters(storage, wall)
    blueprint(world.canary, letters)
    await world.canary.send()
    wire = world.topic.told.pop().to_wire()

    await letters.handlers["alerts_on_canary_sent"](a_cloud_event(wire["data"], type=wire["type"], id=wire["id"]))

    assert (await world.canary.health())["last_arrived_at"] is not None
    assert await letters.newest(after=None, limit=1) == []
