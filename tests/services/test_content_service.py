"""The content domain at work: collecting facts, writing digests, correcting them, telling of them."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from content.models import Kind, signal_post_id
from content.service import DIGEST_DELAY, GRACE
from shared.errors import NotFoundError, RefusedError, UnavailableError
from shared.inbound import DeadLetters
from shared.market.sessions import calendar
from shared.outbox import Outbox
from tests.builders import WALL
from tests.standins import CLOSE, Around, Topic, a_signal, shuffled
from tests.unit.content.newsroom import SESSION, SETTLE, Newsroom, a_post

NAMES = ["one", "two", "three", "four"]
SIGNALS = {name: a_signal(name, symbol=f"S{n}", strength=n / 4) for n, name in enumerate(NAMES)}


def ids(*names: str) -> set[str]:
    return {SIGNALS[name].signal_id for name in names}


@pytest.fixture
def room() -> Newsroom:
    return Newsroom()


# --- a signal's post


async def test_a_signal_becomes_one_post_that_is_told_of(room):
    """The post can be read under its id, and the house was told once."""
    await room.service().collect(SIGNALS["one"])

    [post] = await room.listed()
    [told] = room.topic.told
    assert post == await room.service().read(signal_post_id(SIGNALS["one"].signal_id))
    assert (post.kind, post.version, post.session, post.symbols) == (Kind.SIGNAL, 1, SESSION, ["S0"])
    assert (told.post_id, told.version, told.title) == (post.post_id, 1, post.text.title)
    assert told.subject == f"posts/signal/{post.post_id}"
    assert await room.owed() == 0


async def test_the_same_signal_again_is_the_same_post(room):
    """A repetition changes nothing and tells nothing."""
    await room.service().collect(SIGNALS["one"])
    before = await room.listed()

    room.wall.at += timedelta(hours=1)
    for _ in range(3):
        await room.service().collect(SIGNALS["one"])

    assert await room.listed() == before
    assert len(room.topic.told) == 1


@pytest.mark.parametrize("start", range(8))
async def test_twins_make_one_post(room, start):
    """Three instances collect the same signal at once: one post, one event id."""
    dice = Random(start)

    await asyncio.gather(
        *(room.service(documents=shuffled(room.documents, dice)).collect(SIGNALS["one"]) for _ in range(3))
    )

    assert len(await room.listed()) == 1
    assert len(set(room.topic.ids())) == 1
    assert await room.owed() == 0


async def test_a_signal_belongs_to_the_session_of_its_exchange(room):
    """An evening in UTC is an afternoon in New York; another zone on the wire changes nothing."""
    late = a_signal("late", interval="1h", occurred_at="2012-11-22T01:30:00+00:00")
    same = a_signal("same", interval="1h", occurred_at="2012-11-22T10:30:00+09:00")

    for signal in (late, same):
        await room.service().collect(signal)

    posts = await room.listed()
    assert [p.session for p in posts] == [SESSION, SESSION]
    assert len({p.text.html for p in posts}) == 1
    assert "2012-11-22 01:30 UTC" in posts[0].text.html


async def test_reading_what_is_not_there(room):
    """A post that was never written is said not to be there."""
    with pytest.raises(NotFoundError, match="there is no post"):
        await room.service().read("x" * 500)


# --- a digest


async def test_a_digest_waits_for_its_signals_and_is_written_once(room):
    """Opened half an hour of market time after the close, written when the signals had time to arrive."""
    service = room.service()
    room.market.at -= timedelta(seconds=1)
    assert await service.open_digests() == 0
    room.market.at += timedelta(seconds=1)
    await service.collect(SIGNALS["one"])

    assert await service.open_digests() == 1
    room.wall.at += SETTLE - timedelta(seconds=1)
    await service.sweep()
    assert await room.digest() is None
    room.wall.at += timedelta(seconds=1)
    await service.sweep()

    digest = await room.check_digest(ids("one"))
    assert (digest.version, digest.symbols, digest.occurred_at) == (1, ["S0"], CLOSE)
    await room.settled()
    assert await room.digest() == digest


async def test_a_quiet_session_has_a_digest_that_says_so(room):
    """Nothing happened is news too."""
    await room.settled()

    digest = await room.check_digest(set())
    assert digest.text.title == "2012-11-21: a quiet session"


@pytest.mark.parametrize("moment", ["before it is opened", "while it waits", "after it was written"])
async def test_a_signal_finds_its_way_into_the_digest_at_any_time(room, moment):
    """Before the draft, during its wait or after it was written: the digest ends with the same words."""
    service = room.service()
    await service.collect(SIGNALS["one"])
    if moment == "before it is opened":
        await service.collect(SIGNALS["two"])
    await service.open_digests()
    if moment == "while it waits":
        await service.collect(SIGNALS["two"])
    await room.settled()
    if moment == "after it was written":
        await service.collect(SIGNALS["two"])
        await room.settled()

    digest = await room.check_digest(ids("one", "two"))
    assert digest.version == (2 if moment == "after it was written" else 1)


async def test_a_version_rises_only_when_something_changed(room):
    """Repeated signals and repeated sweeps leave a digest as it is; a new signal is one new version, told once."""
    await room.service().collect(SIGNALS["one"])
    await room.settled()
    known = set()
    for name, version in [("one", 1), ("two", 2), ("one", 2), ("two", 2), ("three", 3), ("three", 3)]:
        known |= ids(name)
        await room.service().collect(SIGNALS[name])
        await room.settled()
        assert (await room.check_digest(known)).version == version

    digest = await room.digest()
    assert [e.version for e in room.topic.told if e.post_id == digest.post_id] == [1, 2, 3]
    assert digest.recorded_at < digest.updated_at


async def test_signals_that_come_late_together_make_one_version(room):
    """After an outage hundreds may come at once: the digest is written again when they have settled, not for each."""
    await room.settled()
    for name in ("one", "two", "three"):
        await room.service().collect(SIGNALS[name])
    await room.settled()

    digest = await room.check_digest(ids("one", "two", "three"))
    assert digest.version == 2
    assert [e.version for e in room.topic.told if e.post_id == digest.post_id] == [1, 2]


async def test_a_corrected_digest_stays_in_its_place(room):
    """A correction changes words, version and updated_at; the list of posts keeps its order."""
    await room.settled()
    await room.service().collect(SIGNALS["one"])
    before = [p.post_id for p in await room.listed()]
    first = await room.digest()
    await room.service().collect(SIGNALS["two"])
    await room.settled()

    second = await room.digest()
    assert [p.post_id for p in await room.listed()][: len(before)] == before
    assert (second.post_id, second.recorded_at, second.occurred_at) == (
        first.post_id,
        first.recorded_at,
        first.occurred_at,
    )


# --- any order, any multiplicity, any interleaving

STEPS = st.lists(st.sampled_from([*NAMES, "open", "sweep", "wait"]), max_size=14)


@given(steps=STEPS, again=st.permutations(NAMES))
async def test_any_order_of_signals_and_timers_ends_in_the_same_digest(steps, again):
    """However often and whenever signals arrive and timers fire, the last version says the same."""
    room = Newsroom()
    for step in [*steps, *again]:
        match step:
            case "open":
                await room.service().open_digests()
            case "sweep":
                await room.service().sweep()
            case "wait":
                room.wall.at += SETTLE
            case name:
                await room.service().collect(SIGNALS[name])
    await room.settled()

    digest = await room.check_digest(ids(*NAMES))
    assert digest.symbols == ["S0", "S1", "S2", "S3"]
    assert digest.text.summary == "S3 long, S2 long, S1 long, S0 long."
    assert len(await room.listed(Kind.SIGNAL)) == len(NAMES)


@settings(max_examples=25)
@given(start=st.integers(min_value=0), early=st.sets(st.sampled_from(NAMES)), written=st.booleans())
async def test_instances_at_work_at_once_end_in_the_same_digest(start, early, written):
    """Collecting, opening and sweeping on several instances, in any interleaving, loses and repeats nothing."""
    room, dice = Newsroom(), Random(start)
    for name in early:
        await room.service().collect(SIGNALS[name])
    await room.service().open_digests()
    if written:
        await room.settled()
    room.wall.at += SETTLE

    def an_instance():
        return room.service(documents=shuffled(room.documents, dice), publisher=shuffled(room.topic, dice))

    work = [an_instance().collect(SIGNALS[name]) for name in NAMES]
    work += [an_instance().collect(SIGNALS[name]) for name in NAMES[:2]]
    work += [an_instance().sweep() for _ in range(3)]
    work += [an_instance().open_digests() for _ in range(2)]
    dice.shuffle(work)
    await asyncio.gather(*work)
    await room.settled()

    await room.check_digest(ids(*NAMES))
    assert len(await room.listed(Kind.SIGNAL)) == len(NAMES)


async def a_draft_that_is_due(*, written: bool) -> Newsroom:
    """One signal and a draft; with *written* its digest is there too, and the sweep died before closing the draft."""
    room = Newsroom()
    await room.service().collect(SIGNALS["one"])
    await room.service().open_digests()
    room.wall.at += SETTLE
    if written:

        async def die(name, call):
            if name == "delete":
                raise UnavailableError("died before closing the draft")
            return await call()

        await room.service(documents=Around(room.documents, die)).sweep()
        assert await room.digest() is not None
    return room


@pytest.mark.parametrize(
    "rival", ["a late signal", "a late signal and another sweep", "two late signals around a sweep"]
)
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
@pytest.mark.parametrize("written", [False, True], ids=["first version", "correction"])
async def test_nothing_is_lost_at_any_point_of_a_sweep(rival, after, written):
    """
    At every single storage call of a sweep, others do their whole work in between.

    A fact that arrives between reading the facts and closing the draft is in the digest in the end, and a sweep
    that was overtaken never takes away what its successor wrote.
    """
    late = ids("two", "three") if "two" in rival else ids("two")
    for at in count(1):
        room = await a_draft_that_is_due(written=written)
        calls = 0

        async def others(room=room) -> None:
            await room.service().collect(SIGNALS["two"])
            if "sweep" in rival:
                await room.service().sweep()
            if "two" in rival:
                await room.service().collect(SIGNALS["three"])

        async def step(_, call, at=at, others=others):
            nonlocal calls
            calls += 1
            mine = calls == at
            if mine and not after:
                await others()
            try:
                return await call()
            finally:
                if mine and after:
                    await others()

        await room.service(documents=Around(room.documents, step)).sweep()
        if calls < at:
            break
        await room.settled()
        await room.check_digest(ids("one") | late)


# --- which sessions


def closes(*days: str) -> list[datetime]:
    return [calendar().session(date.fromisoformat(day)).closes_at for day in days]


WEEK = ["2012-11-19", "2012-11-20", "2012-11-21", "2012-11-23", "2012-11-26"]


def a_week() -> Newsroom:
    """Live from a Sunday; Thursday is Thanksgiving, Friday a half day."""
    room = Newsroom()
    room.live_from = datetime(2012, 11, 18, tzinfo=UTC)
    return room


async def sessions_of(room: Newsroom) -> list[str]:
    return sorted(str(p.session) for p in await room.listed(Kind.DIGEST))


async def test_every_session_has_its_digest_once(room):
    """Holidays have none, half days have theirs at their own close, restarts in between lose and repeat none."""
    room = a_week()
    opened = 0
    room.market.at = room.live_from
    while room.market.at < closes("2012-11-26")[0] + DIGEST_DELAY:
        room.market.at += timedelta(minutes=90)
        opened += await room.service().open_digests()
        room.wall.at += SETTLE
        await room.service().sweep()
    await room.settled()

    assert opened == len(WEEK)
    assert await sessions_of(room) == WEEK
    assert [p.occurred_at for p in await room.listed(Kind.DIGEST)] == closes(*WEEK)


@pytest.mark.parametrize("early", [timedelta(seconds=1), timedelta(0)])
async def test_a_half_days_digest_comes_after_its_own_close(early):
    """The Friday after Thanksgiving closes at 13:00 in New York."""
    room = a_week()
    [close] = closes("2012-11-23")
    assert close == datetime(2012, 11, 23, 18, tzinfo=UTC)
    room.market.at = close + DIGEST_DELAY - early

    await room.settled()

    assert ("2012-11-23" in await sessions_of(room)) == (not early)


async def test_what_was_missed_while_down_is_made_up(room):
    """After a week without an instance, each session is opened, oldest first."""
    room = a_week()
    room.market.at = closes("2012-11-26")[0] + DIGEST_DELAY

    assert await room.service().open_digests() == len(WEEK)
    await room.settled()

    assert await sessions_of(room) == WEEK


async def test_a_first_start_floods_nobody():
    """Without a live_from the first session is the next one to close: the past gets no digests."""
    room = Newsroom()
    room.live_from = None

    await room.settled()
    assert await room.listed(Kind.DIGEST) == []
    room.market.at = closes("2012-11-23")[0] + DIGEST_DELAY
    await room.settled()

    assert await sessions_of(room) == ["2012-11-23"]


@pytest.mark.parametrize("start", range(6))
async def test_two_instances_open_each_session_once(start):
    """A timer that fires twice makes no second digest."""
    room, dice = a_week(), Random(start)
    room.market.at = closes("2012-11-26")[0] + DIGEST_DELAY

    await asyncio.gather(*(room.service(documents=shuffled(room.documents, dice)).open_digests() for _ in range(3)))
    await room.settled()

    assert await sessions_of(room) == WEEK
    assert len(set(room.topic.ids())) == len(room.topic.told) == len(WEEK)


async def test_opening_stops_at_its_budget_and_resumes():
    """A run works for eight seconds at most; the next goes on where it stopped."""
    room = a_week()
    room.market.at = closes("2012-11-26")[0] + DIGEST_DELAY

    async def slow(_, call):
        room.wall.at += timedelta(seconds=2)
        return await call()

    opened = [await room.service(documents=Around(room.documents, slow)).open_digests() for _ in range(8)]
    await room.settled()

    assert 0 < opened[0] < len(WEEK)
    assert sum(opened) == len(WEEK)
    assert await sessions_of(room) == WEEK


# --- the sweep


async def test_a_post_whose_event_was_not_told_is_told_by_the_sweep(room):
    """A topic that is down loses nothing."""
    room.topic.trouble = [UnavailableError("down")]
    with pytest.raises(UnavailableError):
        await room.service().collect(SIGNALS["one"])
    assert await room.service().sweep() == 0

    room.wall.at += GRACE
    assert await room.service().sweep() == 1

    assert len(room.topic.told) == 1
    assert await room.owed() == 0


async def test_one_post_in_trouble_holds_up_no_other(room):
    """What the topic refuses for good is kept as a dead letter and tried no more; everything behind it is done."""
    poison = signal_post_id(SIGNALS["one"].signal_id)

    class Picky(Topic):
        async def publish(self, events):
            if any(event.post_id == poison for event in events):
                raise RefusedError("too large")
            await super().publish(events)

    topic = Picky()
    room.topic.trouble = [UnavailableError("down")] * len(NAMES)
    for name in NAMES:
        with pytest.raises(UnavailableError):
            await room.service().collect(SIGNALS[name])
    await room.service().open_digests()
    room.wall.at += SETTLE

    letters = DeadLetters(room.documents, room.wall)
    assert await room.service(publisher=Outbox(topic, letters, "content")).sweep() == len(NAMES) + 1

    assert len(topic.told) == len(NAMES)
    assert await room.digest() is not None
    assert await room.owed() == 0
    [letter] = await letters.newest(after=None, limit=10)
    assert (letter.partition, letter.body["origin"]) == ("content", "outbox")
    assert letter.body["event"]["data"]["post_id"] == poison


async def test_a_sweep_stops_at_its_budget(room):
    """One run works for eight seconds at most; the next goes on."""
    room.topic.trouble = [UnavailableError("down")] * len(NAMES)
    for name in NAMES:
        with pytest.raises(UnavailableError):
            await room.service().collect(SIGNALS[name])
    room.wall.at += GRACE

    class Slow(Topic):
        async def publish(self, events):
            room.wall.at += timedelta(seconds=5)
            await super().publish(events)

    topic = Slow()
    assert await room.service(publisher=topic).sweep() == 2
    assert await room.service(publisher=topic).sweep() == 2
    assert await room.owed() == 0


# --- lists


@given(
    made=st.lists(st.tuples(st.sampled_from(Kind), st.integers(min_value=0, max_value=3)), max_size=9),
    limit=st.integers(min_value=1, max_value=9),
    newest_first=st.booleans(),
    wanted=st.sampled_from([None, *Kind]),
)
async def test_pages_of_posts_show_every_post_once(made, limit, newest_first, wanted):
    """Both kinds come in one order of time, in pages of any size; a kind can be asked for alone."""
    room = Newsroom()
    created = [
        await room.posts.create(a_post(str(number), kind=kind, recorded_at=WALL + timedelta(seconds=seconds)))
        for number, (kind, seconds) in enumerate(made)
    ]

    pages, after = [], None
    while page := await room.service().listed(wanted, after, newest_first=newest_first, limit=limit):
        assert len(page) <= limit
        pages += page
        after = page[-1].sort

    expected = [post for post in created if wanted in (None, post.kind)]
    assert pages == sorted(expected, key=lambda post: post.sort, reverse=newest_first)
