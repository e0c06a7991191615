"""The outbox: whatever the topic refuses for good is kept for people, and everything else is told."""

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.audit import Audit
from shared.clock import StoppedClock
from shared.errors import ConfigurationError, RateLimitedError, RefusedError, UnavailableError
from shared.inbound import DeadLetters
from shared.outbox import Outbox
from shared.replays import Desk
from tests.builders import WALL, MemoryPublisher, documents, opened_documents
from tests.standins import Topic, a_signal

NAMES = [f"signal {i}" for i in range(12)]


class Picky(Topic):
    """A topic that refuses requests in which one of the signals *poison* is, or more than *most* of them."""

    def __init__(self, *poison, most=1000):
        super().__init__()
        self.poison = {a_signal(name).event_id for name in poison}
        self.most = most
        self.asked = 0

    async def publish(self, events):
        self.asked += 1
        if len(events) > self.most:
            raise RefusedError("the request is too large")
        if any(event.event_id in self.poison for event in events):
            raise RefusedError("the event topic answered 400")
        await super().publish(events)


@pytest.fixture
async def store():
    store = documents()
    yield store
    await store.close()


def an_outbox(store, topic):
    return Outbox(topic, DeadLetters(store, StoppedClock(WALL)), "signals")


async def buried(store):
    return await DeadLetters(store, StoppedClock(WALL)).newest(after=None, limit=500)


async def test_what_the_topic_takes_is_told_in_one_request(store):
    """Nothing is kept and nothing is said twice."""
    topic = Picky()
    await an_outbox(store, topic).publish([a_signal(name) for name in NAMES])
    assert topic.ids() == [a_signal(name).event_id for name in NAMES]
    assert (topic.asked, await buried(store)) == (1, [])


@settings(max_examples=25, deadline=None)
@given(poison=st.sets(st.sampled_from(NAMES)), count=st.integers(0, len(NAMES)))
async def test_only_what_is_refused_is_buried(poison, count):
    """Whichever are refused, each event is either told once, in its order, or lies in a letter of its domain."""
    async with opened_documents() as store:
        topic = Picky(*poison)
        await an_outbox(store, topic).publish([a_signal(name) for name in NAMES[:count]])

        refused = [name for name in NAMES[:count] if name in poison]
        assert topic.ids() == [a_signal(name).event_id for name in NAMES[:count] if name not in poison]
        letters = await buried(store)
        assert {letter.body["event_id"] for letter in letters} == {a_signal(name).event_id for name in refused}
        assert all((x.partition, x.body["origin"], x.body["state"]) == ("signals", "outbox", "open") for x in letters)
        assert all("the event topic answered 400" in letter.body["reason"] for letter in letters)


async def test_one_refused_among_many_costs_few_requests(store):
    """The one to blame is found by halving, so a long batch still fits into a handler's time."""
    names = [f"signal {i}" for i in range(500)]
    topic = Picky("signal 77")
    await an_outbox(store, topic).publish([a_signal(name) for name in names])
    assert len(topic.told) == 499
    assert topic.asked < 25


async def test_request_that_is_too_large_is_told_in_parts(store):
    """Where no single event is to blame none is buried."""
    topic = Picky(most=5)
    await an_outbox(store, topic).publish([a_signal(name) for name in NAMES])
    assert topic.ids() == [a_signal(name).event_id for name in NAMES]
    assert await buried(store) == []


@pytest.mark.parametrize(
    "trouble",
    [
        UnavailableError("the event topic answered 503"),
        RateLimitedError("slowly", retry_after=timedelta(seconds=3)),
        ConfigurationError("the event topic refused us (401)"),
    ],
)
async def test_trouble_that_is_not_the_events_buries_nothing(store, trouble):
    """A topic that is down or a wrong key is for the sender to hear of, who still owes the events then."""
    outbox = an_outbox(store, Topic(trouble))
    with pytest.raises(type(trouble)):
        await outbox.publish([a_signal()])
    assert await buried(store) == []


async def test_event_that_cannot_be_buried_is_still_owed(store, monkeypatch):
    """With storage in trouble nothing counts as told; the next try buries it."""

    async def down(*args):
        raise UnavailableError("storage is down")

    outbox = an_outbox(store, Picky("signal 1"))
    with monkeypatch.context() as patch:
        patch.setattr(store, "create", down)
        with pytest.raises(UnavailableError):
            await outbox.publish([a_signal("signal 1")])
    await outbox.publish([a_signal("signal 1")])
    assert len(await buried(store)) == 1


async def test_letter_is_published_when_an_operator_replays_it(store):
    """What was refused by mistake reaches its hearers after all, as it was."""
    wall, event = StoppedClock(WALL), a_signal("signal 1")
    await an_outbox(store, Picky("signal 1")).publish([event])
    [letter] = await buried(store)

    topic = MemoryPublisher()
    desk = Desk(documents=store, letters=DeadLetters(store, wall), publisher=topic, audit=Audit(store, wall), wall=wall)
    done = await desk.replay(letter.id, "olga", "the topic's schema was wrong")

    assert done.outcome == "replayed"
    assert topic.published == [event]
