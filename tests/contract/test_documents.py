"""
What every adapter of the storage port must do.

A new adapter joins by one more name in ADAPTERS and one more branch in `make`; nothing else here knows which is which.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import Clock, StoppedClock
from shared.documents import BATCH_LIMIT, Document, Documents, Operation, sort_key
from shared.errors import ConflictError, InvalidPayloadError, NotFoundError, StaleError
from tests.builders import WALL, a_document
from tests.contract.cosmos_server import ENDPOINT, NPM_GAPS, CosmosPlace, given_cosmos, npm_cosmos  # noqa: F401

ADAPTERS = ("sqlite_memory", "sqlite_file", "npm_cosmos") + (("given_cosmos",) if ENDPOINT else ())
THINGS = "things"
SECOND = timedelta(seconds=1)

type Make = Callable[[Clock], Documents]


@pytest.fixture(params=ADAPTERS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Opens fresh, empty storage; may be called often."""
    count = iter(range(1_000_000))
    if request.param == "npm_cosmos" and (reason := NPM_GAPS.get(request.node.originalname)):
        pytest.skip(reason)

    def fresh(wall: Clock) -> Documents:
        if request.param == "sqlite_memory":
            return SQLiteDocuments(":memory:", wall)
        if request.param.endswith("_cosmos"):
            place: CosmosPlace = request.getfixturevalue(request.param)
            return place.fresh(wall)
        return SQLiteDocuments(tmp_path / f"{next(count)}.db", wall)

    return fresh


@pytest.fixture
def wall() -> StoppedClock:
    return StoppedClock(WALL)


@pytest.fixture
async def store(make: Make, wall: StoppedClock) -> AsyncIterator[Documents]:
    store = make(wall)
    yield store
    await store.close()


def ids(found: list[Document]) -> list[str]:
    return [document.id for document in found]


class TestCreate:
    async def test_what_was_created_is_read_as_it_was(self, store):
        """Nothing of a document is lost or changed in storage."""
        body = {"text": "Zürich — 東京 — 🚀 \u0000 ' \" \\", "n": [1, 0.1, -2.5e-300, True, None], "deep": {"": {}}}
        given_ = a_document(
            "i|d/é#?", partition="p|é", body=body, due_at=WALL, expires_at=WALL + timedelta(microseconds=1)
        )

        created = await store.create(THINGS, given_)

        assert created.etag
        assert replace(created, etag=None) == given_
        assert await store.read(THINGS, "p|é", "i|d/é#?") == created

    async def test_second_create_conflicts_and_changes_nothing(self, store):
        """The first writer of an id wins; the second goes on with what is stored."""
        first = await store.create(THINGS, a_document(body={"by": "first"}))

        with pytest.raises(ConflictError):
            await store.create(THINGS, a_document(at=WALL + SECOND, body={"by": "second"}))

        assert await store.read(THINGS, "p", "d1") == first

    async def test_same_id_elsewhere_is_another_document(self, store):
        """An id is known inside its partition and its container only."""
        await store.create(THINGS, a_document(body={"in": "p"}))
        await store.create(THINGS, a_document(partition="q", at=WALL + SECOND, body={"in": "q"}))
        await store.create("others", a_document(body={"in": "others"}))

        found = [await store.read(*place, "d1") for place in ((THINGS, "p"), (THINGS, "q"), ("others", "p"))]

        assert [d.body["in"] for d in found] == ["p", "q", "others"]

    @pytest.mark.parametrize(
        "bad", [float("nan"), float("inf"), -float("inf"), {1, 2}, WALL, "\ud800"], ids=lambda v: repr(v)[:12]
    )
    async def test_body_that_is_no_json_is_refused(self, store, bad):
        """What another reader could not read again never gets in, neither alone nor in a batch."""
        wrong = a_document(body={"deep": [{"in": bad}]})

        with pytest.raises(InvalidPayloadError):
            await store.create(THINGS, wrong)
        with pytest.raises(InvalidPayloadError):
            await store.batch(THINGS, [Operation(kind="create", document=wrong)])

        assert await store.feed(THINGS) == []

    async def test_missing_document_is_not_found(self, store):
        """Reading what is not there says so, also in a container nobody ever wrote to."""
        with pytest.raises(NotFoundError):
            await store.read("nowhere", "p", "d1")


class TestReplace:
    async def test_new_body_gets_a_new_etag(self, store):
        """Everything but id and partition may change; the etag always does."""
        created = await store.create(THINGS, a_document(due_at=WALL))
        changed = replace(created, body={"n": 2}, due_at=None, sort=sort_key(WALL + SECOND, "d1"), schema=2)

        replaced = await store.replace(THINGS, changed)

        assert replaced.etag != created.etag
        assert replace(replaced, etag=created.etag) == changed
        assert await store.read(THINGS, "p", "d1") == replaced
        assert await store.due(THINGS, before=WALL) == []

    async def test_old_etag_is_stale_even_when_nothing_changed(self, store):
        """Of two writers that read the same, one must read again."""
        read = await store.create(THINGS, a_document())
        winner = await store.replace(THINGS, read.with_body(read.body))

        with pytest.raises(StaleError):
            await store.replace(THINGS, read.with_body({"by": "loser"}))

        assert await store.read(THINGS, "p", "d1") == winner

    async def test_never_stored_document_replaces_nothing(self, store):
        """A document without an etag is nobody's successor."""
        with pytest.raises(NotFoundError):
            await store.replace(THINGS, a_document())
        stored = await store.create(THINGS, a_document())

        with pytest.raises(StaleError):
            await store.replace(THINGS, a_document(body={}))

        assert await store.read(THINGS, "p", "d1") == stored


class TestDelete:
    async def test_deleted_document_is_gone_and_can_come_again(self, store):
        """After a delete the id is free."""
        first = await store.create(THINGS, a_document())
        await store.delete(THINGS, first)

        with pytest.raises(NotFoundError):
            await store.read(THINGS, "p", "d1")
        with pytest.raises(NotFoundError):
            await store.delete(THINGS, first)
        with pytest.raises(NotFoundError):
            await store.replace(THINGS, first)

        again = await store.create(THINGS, a_document())
        assert again.etag != first.etag

    async def test_delete_needs_the_newest_etag(self, store):
        """Nobody deletes what he has not seen."""
        old = await store.create(THINGS, a_document())
        new = await store.replace(THINGS, old.with_body({"n": 2}))

        with pytest.raises(StaleError):
            await store.delete(THINGS, old)

        assert await store.read(THINGS, "p", "d1") == new

    async def test_etag_of_a_former_life_is_stale(self, store):
        """A document that was deleted and made again is another one."""
        former = await store.create(THINGS, a_document())
        await store.delete(THINGS, former)
        await store.create(THINGS, a_document())

        with pytest.raises(StaleError):
            await store.replace(THINGS, former)
        with pytest.raises(StaleError):
            await store.delete(THINGS, former)


class TestBatch:
    async def test_all_operations_happen_in_order(self, store):
        """The answer holds one document for each operation: the written with their etags, the deleted as given."""
        old = await store.create(THINGS, a_document("old"))
        gone = await store.create(THINGS, a_document("gone"))

        made, replaced, deleted = await store.batch(
            THINGS,
            [
                Operation(kind="create", document=a_document("new")),
                Operation(kind="replace", document=old.with_body({"n": 2})),
                Operation(kind="delete", document=gone),
            ],
        )

        assert deleted == gone
        assert await store.read(THINGS, "p", "new") == made
        assert await store.read(THINGS, "p", "old") == replaced
        assert replaced.body == {"n": 2}
        assert sorted(ids(await store.page(THINGS, "p"))) == ["new", "old"]

    @pytest.mark.parametrize("trouble", ["conflict", "stale", "gone", "stale delete"])
    async def test_one_refused_operation_undoes_all(self, store, trouble):
        """All or nothing: what came before and after the refused one did not happen either."""
        stored = await store.create(THINGS, a_document("stored"))
        stale = await store.create(THINGS, a_document("stale"))
        await store.replace(THINGS, stale.with_body({"n": 2}))
        before = await store.page(THINGS, "p")
        refused, error = {
            "conflict": (Operation(kind="create", document=a_document("stale")), ConflictError),
            "stale": (Operation(kind="replace", document=stale), StaleError),
            "gone": (Operation(kind="replace", document=replace(stale, id="never")), NotFoundError),
            "stale delete": (Operation(kind="delete", document=stale), StaleError),
        }[trouble]

        with pytest.raises(error):
            await store.batch(
                THINGS,
                [
                    Operation(kind="create", document=a_document("new")),
                    Operation(kind="replace", document=stored.with_body({"n": 3})),
                    refused,
                    Operation(kind="delete", document=stored),
                ],
            )

        assert await store.page(THINGS, "p") == before

    async def test_hundred_fit(self, store):
        """The largest batch is written whole."""
        await store.batch(
            THINGS, [Operation(kind="create", document=a_document(f"{i:03}")) for i in range(BATCH_LIMIT)]
        )

        assert len(await store.page(THINGS, "p", limit=500)) == BATCH_LIMIT

    @pytest.mark.parametrize(
        "documents_",
        [
            [],
            [a_document(f"{i:03}") for i in range(BATCH_LIMIT + 1)],
            [a_document("a"), a_document("b", partition="q")],
        ],
        ids=["none", "101", "two partitions"],
    )
    async def test_impossible_batch_is_refused_whole(self, store, documents_):
        """What the narrowest adapter cannot do, none does."""
        with pytest.raises(InvalidPayloadError):
            await store.batch(THINGS, [Operation(kind="create", document=d) for d in documents_])

        assert await store.feed(THINGS) == []


class TestLists:
    @given(
        places=st.lists(st.tuples(st.sampled_from("pqr"), st.integers(0, 6)), max_size=25),
        limit=st.integers(1, 7),
        newest_first=st.booleans(),
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    async def test_pages_together_are_the_sorted_list(self, make, places, limit, newest_first):
        """Read page by page, every document comes once, in order, in both directions, at any page length."""
        store = make(StoppedClock(WALL))
        stored = [
            await store.create(THINGS, a_document(f"{n:02}", partition=partition, at=WALL + second * SECOND))
            for n, (partition, second) in enumerate(places)
        ]
        stored.sort(key=lambda d: d.sort, reverse=newest_first)

        async def walk(read) -> list[Document]:
            found, after = [], None
            while page := await read(after=after, newest_first=newest_first, limit=limit):
                assert len(page) <= limit
                found += page
                after = page[-1].sort
            return found

        assert await walk(lambda **how: store.feed(THINGS, **how)) == stored
        for partition in "pqr":
            wanted = [d for d in stored if d.partition == partition]
            assert await walk(lambda partition=partition, **how: store.page(THINGS, partition, **how)) == wanted
        await store.close()

    async def test_position_need_not_be_a_documents(self, store):
        """A list can begin at any instant: the bare key of an instant stands before everything of that instant."""
        for n in range(4):
            await store.create(THINGS, a_document(str(n), at=WALL + n * SECOND))
        instant = sort_key(WALL + 2 * SECOND)

        assert ids(await store.page(THINGS, "p", after=instant)) == ["2", "3"]
        assert ids(await store.feed(THINGS, after=instant, newest_first=True)) == ["1", "0"]

    async def test_hundred_unless_told(self, store):
        """A list that names no limit is a page of 100."""
        for start in (0, 100):
            await store.batch(
                THINGS,
                [
                    Operation(kind="create", document=a_document(f"{i:03}", due_at=WALL))
                    for i in range(start, start + 60)
                ],
            )

        lists = [await store.page(THINGS, "p"), await store.feed(THINGS), await store.due(THINGS, before=WALL)]

        assert [len(found) for found in lists] == [100, 100, 100]

    async def test_replaced_document_stands_at_its_new_place(self, store):
        """A list shows every document once, where its newest sort says."""
        first = await store.create(THINGS, a_document("a", at=WALL))
        await store.create(THINGS, a_document("b", at=WALL + SECOND))

        await store.replace(THINGS, replace(first, sort=sort_key(WALL + 2 * SECOND, "a")))

        assert ids(await store.feed(THINGS)) == ["b", "a"]


class TestDue:
    async def test_longest_due_first_and_nothing_early(self, store):
        """A sweep gets what is owed by now, the oldest debt first, over all partitions."""
        for partition, seconds in (("p", 2), ("q", 0), ("r", 1), ("s", 3)):
            place = WALL - timedelta(seconds=seconds)  # the list's order says nothing about the debt's
            await store.create(
                THINGS,
                a_document(f"{seconds}", partition=partition, at=place, due_at=WALL + timedelta(seconds=seconds)),
            )
        await store.create(THINGS, a_document("owes nothing"))

        assert ids(await store.due(THINGS, before=WALL + 2 * SECOND)) == ["0", "1", "2"]
        assert ids(await store.due(THINGS, before=WALL + 9 * SECOND, limit=2)) == ["0", "1"]
        assert await store.due(THINGS, before=WALL - timedelta(microseconds=1)) == []
        assert await store.due("others", before=WALL + 9 * SECOND) == []

    async def test_write_that_records_the_effect_clears_the_debt(self, store):
        """The conditional write clears due_at or moves it; there is no second place to forget it in."""
        owing = await store.create(THINGS, a_document(due_at=WALL))
        later = await store.replace(THINGS, owing.with_body({"tries": 1}, due_at=WALL + SECOND))

        assert await store.due(THINGS, before=WALL) == []
        assert await store.due(THINGS, before=WALL + SECOND) == [later]

        await store.replace(THINGS, later.with_body({"done": True}))
        assert await store.due(THINGS, before=WALL + SECOND) == []

    @given(instants=st.lists(st.datetimes(datetime(1990, 1, 1), datetime(2200, 1, 1)), unique=True, max_size=12))  # noqa: DTZ001 - the zone is added
    @settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    async def test_order_is_that_of_time(self, make, instants):
        """Whole seconds and microseconds, this century and the next, come in the order of time."""
        store = make(StoppedClock(WALL))
        zoned = [at.replace(tzinfo=WALL.tzinfo) for at in instants]
        for n, at in enumerate(zoned):
            await store.create(THINGS, a_document(str(n), at=at, due_at=at))

        due = await store.due(THINGS, before=datetime(2200, 1, 1, tzinfo=WALL.tzinfo))

        assert [d.due_at for d in due] == sorted(zoned)
        assert await store.feed(THINGS) == due
        await store.close()


class TestExpiry:
    @pytest.fixture
    async def expired(self, store, wall):
        document = await store.create(THINGS, a_document(due_at=WALL, expires_at=WALL + SECOND))
        wall.at = WALL + SECOND
        return document

    async def test_until_then_it_is_there(self, store, wall):
        """A document lives to the last microsecond before it expires."""
        created = await store.create(THINGS, a_document(due_at=WALL, expires_at=WALL + SECOND))

        wall.at = WALL + SECOND - timedelta(microseconds=1)

        assert await store.read(THINGS, "p", "d1") == created
        assert await store.feed(THINGS) == await store.page(THINGS, "p") == await store.due(THINGS, before=WALL)

    async def test_expired_document_is_absent_from_every_read(self, store, expired):
        """Whoever looks, however he looks, does not see it."""
        with pytest.raises(NotFoundError):
            await store.read(THINGS, "p", "d1")

        assert await store.page(THINGS, "p") == []
        assert await store.feed(THINGS, newest_first=True) == []
        assert await store.due(THINGS, before=WALL + SECOND) == []

    async def test_expired_document_cannot_be_written(self, store, expired):
        """An etag from before the expiry brings nothing back to life."""
        with pytest.raises(NotFoundError):
            await store.replace(THINGS, replace(expired, expires_at=None))
        with pytest.raises(NotFoundError):
            await store.delete(THINGS, expired)
        with pytest.raises(NotFoundError):
            await store.batch(THINGS, [Operation(kind="replace", document=replace(expired, expires_at=None))])

        assert await store.feed(THINGS) == []

    async def test_id_is_free_again(self, store, expired):
        """A lease that ran out can be taken, by one of two."""
        again = await store.create(THINGS, a_document(at=WALL + SECOND, body={"by": "the next"}))

        with pytest.raises(ConflictError):
            await store.create(THINGS, a_document(at=WALL + SECOND, body={"by": "a third"}))

        assert await store.read(THINGS, "p", "d1") == again
        assert again.expires_at is None
        assert again.due_at is None


async def test_closed_storage_opens_again(store):
    """Closing lets go of files and connections, twice if need be; the next call opens them again."""
    await store.create(THINGS, a_document())
    await store.close()
    await store.close()

    await store.create(THINGS, a_document("d2"))

    assert (await store.read(THINGS, "p", "d2")).body == {"said": "d2"}
