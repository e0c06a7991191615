import asyncio
from datetime import timedelta

import pytest

from shared.audit import Audit
from shared.clock import StoppedClock
from shared.errors import ConfigurationError, ConflictError, NotFoundError, RefusedError, UnavailableError
from shared.inbound import CONTAINER, DeadLetters, settle
from shared.market.events import BarsIngested
from shared.replays import BUDGET, KEEP, Desk, Wanted
from tests.builders import WALL, MemoryPublisher, a_cloud_event, documents

MINUTE = timedelta(minutes=1)


class World:
    """A desk, and two functions that hear the same event; ``trouble`` is what the first one meets."""

    def __init__(self, storage, wall):
        self.wall = wall
        self.storage = storage
        self.letters = DeadLetters(storage, wall)
        self.publisher = MemoryPublisher()
        self.audit = Audit(storage, wall)
        self.desk = Desk(documents=storage, letters=self.letters, publisher=self.publisher, audit=self.audit, wall=wall)
        self.trouble = None
        self.heard = []
        self.other = []
        self.on_call = lambda: None

        @self.letters.replayable
        async def first_function(event):
            async with settle(event, "first_function", self.letters):
                self.on_call()
                if self.trouble is not None:
                    raise self.trouble
                self.heard.append(event)

        @self.letters.replayable
        async def other_function(event):
            async with settle(event, "other_function", self.letters):
                self.other.append(event)

        self.first_function = first_function

    async def bury(self, n=1, **more):
        """Let the first function refuse an event; returns its letter's id."""
        self.trouble = RefusedError("not yet")
        await self.first_function(a_cloud_event({"n": n}, id=f"e{n}", **more))
        self.trouble = None
        return (await self.letters.newest(after=None, limit=1))[0].id

    async def letter(self, id_):
        return (await self.desk.find(id_)).body

    async def acts(self):
        return [entry.body for entry in await self.audit.listed(None, newest_first=False, limit=100)]


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


def outcomes(progress):
    return [one.outcome for one in progress.results]


class TestOne:
    async def test_a_replay_is_the_same_event_to_the_same_function_only(self, world):
        """Id, source, type, subject, time and data as published; nobody else hears it again."""
        id_ = await world.bury()
        world.wall.at += timedelta(days=10)

        done = await world.desk.replay(id_, "alice", "the fix is out")

        [event] = world.heard
        original = a_cloud_event({"n": 1})
        for name in ("id", "source", "type", "subject", "time"):
            assert getattr(event, name) == getattr(original, name), name
        assert event.get_json() == {"n": 1}
        assert (done.outcome, world.other, world.publisher.published) == ("replayed", [], [])

    async def test_the_letter_says_who_replayed_it_when_and_why(self, world):
        """State, actor, reason and outcome are read from the letter itself."""
        id_ = await world.bury()
        world.wall.at += MINUTE

        await world.desk.replay(id_, "alice", "the fix is out")

        letter = await world.letter(id_)
        assert letter["state"] == "replayed"
        assert letter["history"] == [
            {
                "at": "2026-11-21T09:01:00Z",
                "by": "alice",
                "action": "replay",
                "reason": "the fix is out",
                "outcome": "done",
            }
        ]

    async def test_the_audit_knows_it_too(self, world):
        """Who, what, on which letter, and why."""
        id_ = await world.bury()
        await world.desk.replay(id_, "alice", "the fix is out")

        [act] = await world.acts()
        assert (act["actor"], act["action"], act["subject"]) == ("alice", "deadletters.replay", id_)
        assert act["reason"] == "the fix is out"

    async def test_replaying_again_runs_nothing(self, world):
        """An operator may press twice."""
        id_ = await world.bury()
        await world.desk.replay(id_, "alice", "once")

        again = await world.desk.replay(id_, "alice", "twice")

        assert (again.outcome, len(world.heard)) == ("already replayed", 1)

    async def test_two_operators_at_once_both_hear_how_it_went(self, world):
        """Effects are idempotent; the letter keeps both notes and is replayed."""
        id_ = await world.bury()

        done = await asyncio.gather(*(world.desk.replay(id_, who, "now") for who in ("alice", "bob")))

        assert {one.outcome for one in done} <= {"replayed", "already replayed"}
        letter = await world.letter(id_)
        assert letter["state"] == "replayed"
        assert len(letter["history"]) == len(world.heard)

    async def test_a_slow_failure_does_not_open_what_a_twin_has_done(self, world, wall, storage):
        """Whoever comes last adds a note; the letter stays replayed."""
        id_ = await world.bury()
        twin = World(storage, wall)
        begun, go_on = asyncio.Event(), asyncio.Event()

        @world.letters.replayable
        async def first_function(event):
            async with settle(event, "first_function", world.letters):
                begun.set()
                await go_on.wait()
                raise UnavailableError("too late")

        slow = asyncio.create_task(world.desk.replay(id_, "alice", "a try"))
        await begun.wait()
        assert (await twin.desk.replay(id_, "bob", "a try")).outcome == "replayed"
        go_on.set()

        assert (await slow).outcome == "postponed"
        letter = await world.letter(id_)
        assert letter["state"] == "replayed"
        assert [one["by"] for one in letter["history"]] == ["bob", "alice"]

    async def test_what_is_refused_again_stays_open_and_is_no_second_letter(self, world):
        """The operator hears the reason at once, and the letter waits for the next try."""
        id_ = await world.bury()
        world.trouble = RefusedError("still not")

        done = await world.desk.replay(id_, "alice", "a try")

        assert (done.outcome, done.reason) == ("refused again", "RefusedError: still not")
        letter = await world.letter(id_)
        assert (letter["state"], letter["times"]) == ("open", 1)
        assert letter["history"][-1]["outcome"] == "RefusedError: still not"
        assert len(await world.letters.newest(after=None, limit=10)) == 1

    @pytest.mark.parametrize(
        ("trouble", "said"),
        [
            (UnavailableError("storage is away"), "UnavailableError: storage is away"),
            (ConfigurationError("set X"), "ConfigurationError: set X"),
            (KeyError("a secret perhaps"), "unexpected trouble"),
        ],
    )
    async def test_trouble_that_passes_leaves_it_open(self, world, trouble, said):
        """Try again later; what has no name of this house tells no text."""
        id_ = await world.bury()
        world.trouble = trouble

        done = await world.desk.replay(id_, "alice", "a try")

        assert (done.outcome, done.reason) == ("postponed", said)
        assert (await world.letter(id_))["state"] == "open"

    async def test_an_act_that_cannot_be_audited_is_not_done(self, world, monkeypatch):
        """Nothing is replayed behind the audit's back."""
        id_ = await world.bury()

        async def down(*_):
            raise UnavailableError("storage is away")

        monkeypatch.setattr(Audit, "record", down)
        with pytest.raises(UnavailableError):
            await world.desk.replay(id_, "alice", "a try")
        assert world.heard == []

    async def test_a_shortened_payload_is_not_replayed(self, world):
        """Half an event would be another event."""
        world.trouble = RefusedError("too much")
        await world.first_function(a_cloud_event({"text": "x" * 100_000}))
        world.trouble = None
        [letter] = await world.letters.newest(after=None, limit=1)

        done = await world.desk.replay(letter.id, "alice", "a try")

        assert done.outcome == "impossible"
        assert "shortened" in done.reason
        assert (world.heard, await world.acts()) == ([], [])

    async def test_a_function_that_is_no_more_is_named(self, world):
        """A letter of an older version is shown, and says why it cannot be replayed."""
        letter = await world.letters.bury("gone_function", "e1", "no", {"type": "t", "is_whole": True, "data": {}})

        done = await world.desk.replay(letter.id, "alice", "a try")

        assert (done.outcome, done.reason) == ("impossible", "there is no function gone_function in this version")

    @pytest.mark.parametrize(
        ("data", "outcome"), [({"n": 1}, "replayed"), ({"shortened": "{'text': 'xxx"}, "impossible")]
    )
    async def test_a_letter_of_an_earlier_version_is_one_too(self, world, storage, data, outcome):
        """Letters buried before there were states are open; what they hold whole can be replayed."""
        event = {"type": "test.happened.v1", "subject": None, "time": "2026-11-20T09:00:00Z", "data": data}
        letter = await world.letters.bury("first_function", "e1", "no", event)
        old = {k: v for k, v in letter.body.items() if k not in ("state", "history", "digest", "origin", "report")}
        await storage.replace(CONTAINER, letter.with_body(old))

        found, _ = await world.desk.listed(Wanted(state="open"), None, 10)

        assert [one.id for one in found] == [letter.id]
        assert (await world.desk.replay(letter.id, "alice", "a try")).outcome == outcome

    async def test_an_unknown_letter_is_not_found(self, world):
        """A wrong id is said to be one."""
        with pytest.raises(NotFoundError, match="no dead letter nothing"):
            await world.desk.replay("nothing", "alice", "a try")

    async def test_an_event_buried_again_after_its_replay_is_open_again(self, world):
        """It is new trouble, and keeps the history of the old."""
        id_ = await world.bury()
        await world.desk.replay(id_, "alice", "a try")
        world.heard.clear()

        await world.bury()

        letter = await world.letter(id_)
        assert (letter["state"], letter["times"]) == ("open", 2)
        assert [one["action"] for one in letter["history"]] == ["replay", "buried again"]
        assert (await world.desk.replay(id_, "alice", "again")).outcome == "replayed"

    async def test_what_is_done_with_expires_what_is_open_stays(self, world):
        """Nobody has to clean up, and nothing open is lost."""
        done, left = await world.bury(1), await world.bury(2)
        await world.desk.replay(done, "alice", "a try")
        world.wall.at += KEEP

        with pytest.raises(NotFoundError):
            await world.desk.find(done)
        assert await world.desk.find(left)


class TestDiscard:
    async def test_a_discarded_letter_says_why_and_is_not_replayed(self, world):
        """Somebody decided, and is named."""
        id_ = await world.bury()

        await world.desk.discard(id_, "alice", "a test event")
        await world.desk.discard(id_, "bob", "me too")

        letter = await world.letter(id_)
        assert (letter["state"], [one["by"] for one in letter["history"]]) == ("discarded", ["alice"])
        assert [act["action"] for act in await world.acts()] == ["deadletters.discard"]
        assert (await world.desk.replay(id_, "alice", "a try")).outcome == "impossible"

    async def test_a_discarded_event_that_comes_again_stays_discarded(self, world):
        """A decision holds; the times are counted."""
        id_ = await world.bury()
        await world.desk.discard(id_, "alice", "a test event")

        await world.bury()

        letter = await world.letter(id_)
        assert (letter["state"], letter["times"]) == ("discarded", 2)

    async def test_a_replayed_letter_cannot_be_discarded(self, world):
        """What was done was done."""
        id_ = await world.bury()
        await world.desk.replay(id_, "alice", "a try")

        with pytest.raises(ConflictError, match="replayed"):
            await world.desk.discard(id_, "alice", "no")


class TestRange:
    async def test_a_dry_run_says_what_would_be_done_and_does_nothing(self, world):
        """Look first: nothing runs, nothing is written."""
        for n in range(3):
            await world.bury(n)

        progress = await world.desk.replay_range(Wanted(), "alice", "look", is_dry=True)

        assert outcomes(progress) == ["would replay"] * 3
        assert (world.heard, await world.acts(), progress.next) == ([], [], None)

    async def test_the_oldest_go_first_and_at_most_so_many(self, world):
        """In the order they were buried; the rest is for the next call."""
        for n in range(5):
            await world.bury(n)
            world.wall.at += MINUTE

        first = await world.desk.replay_range(Wanted(), "alice", "fixed", limit=2, is_dry=False)
        assert [event.id for event in world.heard] == ["e0", "e1"]
        rest = await world.desk.replay_range(Wanted(), "alice", "fixed", after=first.next, is_dry=False)

        assert [event.id for event in world.heard] == [f"e{n}" for n in range(5)]
        assert (outcomes(rest), rest.next) == (["replayed"] * 3, None)

    async def test_only_what_was_asked_for(self, world):
        """Source, type and the time of burial, the end excluded."""
        await world.bury(0)
        world.wall.at += MINUTE
        await world.bury(1)
        await world.bury(2, type="other.happened.v1")
        await world.letters.bury("other_function", "x", "no", {"type": "test.happened.v1", "is_whole": True})
        world.wall.at += MINUTE
        await world.bury(3)

        wanted = Wanted(source="first_function", type="test.happened.v1", since=WALL + MINUTE, until=WALL + 2 * MINUTE)
        progress = await world.desk.replay_range(wanted, "alice", "fixed", is_dry=False)

        assert [one.letter.body["event_id"] for one in progress.results] == ["e1"]

    async def test_one_that_fails_holds_up_no_other(self, world):
        """What fails stays open; the others are replayed."""
        for n in range(3):
            await world.bury(n)
        calls = []

        def second_fails():
            calls.append(1)
            world.trouble = RefusedError("no") if len(calls) == 2 else None

        world.on_call = second_fails
        progress = await world.desk.replay_range(Wanted(), "alice", "fixed", is_dry=False)

        assert outcomes(progress) == ["replayed", "refused again", "replayed"]

    async def test_a_long_range_answers_how_far_it_got(self, world):
        """The answer comes in time and says where to go on, behind what failed too: nothing is tried twice."""
        for n in range(4):
            await world.bury(n)
            world.wall.at += MINUTE

        def slow():
            world.wall.at += BUDGET / 2
            world.trouble = RefusedError("no")

        world.on_call = slow
        first = await world.desk.replay_range(Wanted(), "alice", "fixed", is_dry=False)
        rest = await world.desk.replay_range(Wanted(), "alice", "fixed", after=first.next, is_dry=False)

        done = [[one.letter.body["event_id"] for one in progress.results] for progress in (first, rest)]
        assert done == [["e0", "e1"], ["e2", "e3"]]
        assert rest.next is None

    async def test_the_audit_has_one_entry_for_a_range(self, world):
        """With what was asked, and how many it met."""
        for n in range(3):
            await world.bury(n)

        await world.desk.replay_range(Wanted(source="first_function"), "alice", "fixed", is_dry=False)

        [act] = await world.acts()
        assert (act["action"], act["subject"]) == ("deadletters.replay_range", "first_function")
        assert act["details"]["letters"] == 3


class TestList:
    async def test_pages_meet_without_a_gap(self, world):
        """Newest first; the position leads to the next page, filters included."""
        for n in range(5):
            await world.bury(n, type="even.v1" if n % 2 == 0 else "odd.v1")
            world.wall.at += MINUTE

        first, position = await world.desk.listed(Wanted(type="even.v1"), None, 2)
        second, end = await world.desk.listed(Wanted(type="even.v1"), position, 2)

        assert [one.body["event_id"] for one in [*first, *second]] == ["e4", "e2", "e0"]
        assert end is None

    async def test_since_ends_the_list(self, world):
        """What is older is not looked at."""
        for n in range(3):
            await world.bury(n)
            world.wall.at += MINUTE

        found, end = await world.desk.listed(Wanted(since=WALL + MINUTE), None, 10)

        assert [one.body["event_id"] for one in found] == ["e2", "e1"]
        assert end is None


class TestUnpublished:
    async def test_what_never_got_onto_the_topic_is_published(self, world):
        """Nobody has heard it yet, so everybody may: the same event with the same id."""
        event = BarsIngested(
            occurred_at=WALL, recorded_at=WALL, symbol="AAPL", interval="1d", revision=0,
            first_closed_at=WALL, last_closed_at=WALL, count=1,
        )  # fmt: skip
        await world.letters.bury_unpublished("market", event, "413")
        [letter] = await world.letters.newest(after=None, limit=1)

        done = await world.desk.replay(letter.id, "alice", "the topic takes it now")

        assert (done.outcome, world.publisher.published) == ("replayed", [event])

    async def test_a_topic_that_still_refuses_leaves_it_open(self, world):
        """The outcome is the topic's."""
        event = BarsIngested(
            occurred_at=WALL, recorded_at=WALL, symbol="AAPL", interval="1d", revision=0,
            first_closed_at=WALL, last_closed_at=WALL, count=1,
        )  # fmt: skip
        await world.letters.bury_unpublished("market", event, "413")
        [letter] = await world.letters.newest(after=None, limit=1)
        world.publisher.failing_with = RefusedError("the event topic answered 413")

        done = await world.desk.replay(letter.id, "alice", "a try")

        assert (done.outcome, done.letter.body["state"]) == ("refused again", "open")
