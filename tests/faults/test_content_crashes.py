"""A process may die, and an answer may be lost, at every single call: no signal is lost to its post or its digest."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest

from content.models import Kind
from content.service import ContentService
from shared.errors import TroopError
from tests.standins import Fuse, Killed, Topic, a_signal, fused
from tests.unit.content.newsroom import SESSION, SETTLE, Newsroom

ONE, TWO = a_signal("one"), a_signal("two", symbol="MSFT")


def a_process(room: Newsroom, fuse: Fuse) -> ContentService:
    """A service whose every neighbour stands behind one fuse."""
    topic: Topic = fused(room.topic, fuse)
    return room.service(documents=fused(room.documents, fuse), publisher=topic)


@contextmanager
def dying() -> Iterator[None]:
    """What a host sees of a process that died or failed: nothing was acknowledged."""
    try:
        yield
    except (Killed, TroopError):
        return


async def at_every_call(
    prepare: Callable[[Newsroom], Awaitable[None]], work: Callable[[ContentService], Awaitable[object]], mode: str
) -> AsyncIterator[Newsroom]:
    """A newsroom for each call that *work* makes, in which that call went wrong."""
    for at in count(1):
        room, fuse = Newsroom(), Fuse(at, mode)
        await prepare(room)
        with dying():
            await work(a_process(room, fuse))
        if fuse.calls < at:
            assert at > 2, "there was nothing to go wrong"
            return
        yield room


async def nothing(_: Newsroom) -> None:
    return


async def a_draft(room: Newsroom) -> None:
    await room.service().collect(ONE)
    await room.service().open_digests()
    room.wall.at += SETTLE


async def a_touched_draft_of_a_written_digest(room: Newsroom) -> None:
    await a_draft(room)
    with dying():
        await a_process(room, Fuse(8, "kill before")).sweep()
    assert await room.digest() is not None
    assert await room.owed() == 1, "the sweep died before it closed the draft"
    await room.service().collect(TWO)


async def a_digest(room: Newsroom) -> None:
    await room.service().collect(ONE)
    await room.settled()


async def check(room: Newsroom, *signals: str) -> None:
    """Every post is there, whole and told of; doing it all again changes nothing."""
    await room.check_digest(set(signals))
    posts = await room.listed()
    assert sorted(i for p in posts if p.kind is Kind.SIGNAL for i in p.signal_ids) == sorted(signals)
    assert {(p.post_id, p.version) for p in posts} <= {(e.post_id, e.version) for e in room.topic.told}
    told = len(room.topic.told)
    for signal in (ONE, TWO):
        if signal.signal_id in signals:
            await room.service().collect(signal)
    await room.settled()
    assert await room.listed() == posts
    assert len(room.topic.told) == told


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_collecting_a_first_signal(mode):
    """The event that was not acknowledged comes again: the post is there, told of, and in the digest."""
    async for room in at_every_call(nothing, lambda s: s.collect(ONE), mode):
        await room.service().collect(ONE)
        await room.settled()
        await check(room, ONE.signal_id)


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_collecting_into_a_draft(mode):
    """A signal that was being added to an open draft is in the digest."""
    async for room in at_every_call(a_draft, lambda s: s.collect(TWO), mode):
        await room.service().collect(TWO)
        await room.settled()
        await check(room, ONE.signal_id, TWO.signal_id)


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_collecting_into_a_written_digest(mode):
    """A correction that was being written is finished."""
    async for room in at_every_call(a_digest, lambda s: s.collect(TWO), mode):
        await room.service().collect(TWO)
        await room.settled()
        await check(room, ONE.signal_id, TWO.signal_id)


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_opening_a_digest(mode):
    """The session is opened by the next timer."""
    async for room in at_every_call(nothing, lambda s: s.open_digests(), mode):
        await room.service().collect(ONE)
        await room.settled()
        await check(room, ONE.signal_id)
        assert [p.session for p in await room.listed(Kind.DIGEST)] == [SESSION]


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_writing_a_digest(mode):
    """The next sweep writes it, or goes on with what is written."""
    async for room in at_every_call(a_draft, lambda s: s.sweep(), mode):
        await room.settled()
        await check(room, ONE.signal_id)


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_correcting_a_digest_whose_draft_was_left_open(mode):
    """Two deaths in a row: the draft that the first left open still brings the late signal in."""
    async for room in at_every_call(a_touched_draft_of_a_written_digest, lambda s: s.sweep(), mode):
        await room.settled()
        await check(room, ONE.signal_id, TWO.signal_id)


@pytest.mark.parametrize("mode", ["kill before", "kill after"])
async def test_a_signal_that_arrives_while_the_sweep_lies_dead(mode):
    """Between the death and the next sweep the world goes on: the late signal is in the digest."""
    async for room in at_every_call(a_draft, lambda s: s.sweep(), mode):
        await room.service().collect(TWO)
        await room.settled()
        await check(room, ONE.signal_id, TWO.signal_id)
