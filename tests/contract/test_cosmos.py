"""What Cosmos DB answers when not all is well, by its documentation; the rest is in test_documents.py."""

import ast
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, Self

import pytest
from azure.core.credentials import AccessToken
from azure.core.exceptions import ClientAuthenticationError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr

from shared.adapters.cosmos import CosmosDocuments
from shared.adapters.cosmos_provision import CONTAINERS, INDEXED
from shared.adapters.cosmos_wire import escape_id, unescape_id
from shared.clock import StoppedClock
from shared.documents import Document, Operation
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    RateLimitedError,
    RefusedError,
    StaleError,
    TroopError,
    UnavailableError,
)
from shared.settings import ROOT
from shared.wiring import open_documents
from tests.builders import WALL, a_document
from tests.contract.cosmos_account import CLOUD, REFUSED, CosmosAccount, answered, cut, silence
from tests.contract.cosmos_server import CosmosPlace, npm_cosmos  # noqa: F401

LOCAL = "https://localhost:8081/"
KEY = SecretStr("c2VjcmV0LWtleQ==")
THINGS = "things"
SECOND = timedelta(seconds=1)
SHORT = timedelta(milliseconds=400)
"""A budget for calls that are to use it up."""

type Write = Callable[[CosmosDocuments, Document], Awaitable[Document]]


class Identity:
    """The app's identity; *trouble* is why there is no token."""

    def __init__(self, trouble: str = "") -> None:
        self._trouble = trouble

    async def get_token(self, *scopes: str, **_options: Any) -> AccessToken:
        if self._trouble:
            raise ClientAuthenticationError(self._trouble)
        return AccessToken("token-of-the-app", int(time.time()) + 3600)

    async def close(self) -> None:
        return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_args: object) -> None:
        return


@pytest.fixture
def account() -> CosmosAccount:
    return CosmosAccount(endpoint=LOCAL)


@pytest.fixture
def wall() -> StoppedClock:
    return StoppedClock(WALL)


@pytest.fixture
async def store(account: CosmosAccount, wall: StoppedClock) -> AsyncIterator[CosmosDocuments]:
    store = CosmosDocuments(LOCAL, "troop", KEY, wall, transport=lambda: account)
    yield store
    await store.close()


@pytest.fixture
async def hasty(account: CosmosAccount, wall: StoppedClock) -> AsyncIterator[CosmosDocuments]:
    """The same with little patience, for calls that end by running out of it."""
    store = CosmosDocuments(LOCAL, "troop", KEY, wall, transport=lambda: account, budget=SHORT)
    yield store
    await store.close()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


async def create(store: CosmosDocuments, document: Document) -> Document:
    return await store.create(THINGS, document)


async def replaced(store: CosmosDocuments, document: Document) -> Document:
    return await store.replace(THINGS, document.with_body({"n": 2}))


async def batched(store: CosmosDocuments, document: Document) -> Document:
    steps = [
        Operation(kind="create", document=a_document("other")),
        Operation(kind="replace", document=document.with_body({"n": 2})),
    ]
    return (await store.batch(THINGS, steps))[1]


async def deleted(store: CosmosDocuments, document: Document) -> Document:
    await store.delete(THINGS, document)
    return document


class TestAnswers:
    async def test_missing_document_is_not_found(self, store):
        """A point read of nothing is 404, and so are a replace and a delete of it."""
        gone = a_document(body={})
        for call in (store.read(THINGS, "p", "d1"), store.replace(THINGS, gone), store.delete(THINGS, gone)):
            with pytest.raises(NotFoundError, match="no things/p/d1"):
                await call

    @pytest.mark.parametrize(
        ("status", "sub_status", "error"),
        [
            (400, 0, InvalidPayloadError),
            (400, 1001, ConfigurationError),
            (401, 0, ConfigurationError),
            (403, 0, ConfigurationError),
            (403, 1014, RefusedError),
            (404, 1003, ConfigurationError),
            (408, 0, UnavailableError),
            (410, 1002, UnavailableError),
            (413, 0, InvalidPayloadError),
            (418, 0, RefusedError),
            (429, 3200, RateLimitedError),
            (449, 0, UnavailableError),
            (500, 0, UnavailableError),
            (503, 0, UnavailableError),
        ],
    )
    async def test_every_answer_has_its_error(self, account, store, status, sub_status, error):
        """What the service says becomes one of the house's errors, for reads and writes, and no text of it leaks."""
        for call in (lambda: store.read(THINGS, "p", "d1"), lambda: store.create(THINGS, a_document())):
            account.faults = [answered(status, sub_status=sub_status, x_ms_retry_after_ms="1")] * 12

            with pytest.raises(TroopError) as caught:
                await call()

            assert type(caught.value) is error
            assert "secret" not in str(caught.value)
            assert "localhost" not in str(caught.value)

    @pytest.mark.parametrize("fault", [REFUSED, cut(), silence()], ids=lambda fault: fault.kind)
    async def test_no_answer_is_unavailable(self, account, hasty, fault):
        """Refused, broken and silent connections are the same to the caller: try again later."""
        account.faults = [fault] * 12

        with pytest.raises(UnavailableError, match="gave no answer"):
            await hasty.read(THINGS, "p", "d1")

    @pytest.mark.parametrize(
        "fault",
        [answered(status, x_ms_retry_after_ms="1") for status in (408, 410, 429, 449, 500, 503)] + [REFUSED, cut()],
        ids=lambda fault: fault.kind if fault.kind != "answer" else str(fault.status),
    )
    async def test_passing_trouble_is_passed_over(self, account, store, fault):
        """One bad answer is tried again: for a write, a read and a list."""
        for n, call in enumerate(
            (
                lambda: store.create(THINGS, a_document()),
                lambda: store.read(THINGS, "p", "d1"),
                lambda: store.feed(THINGS),
            )
        ):
            account.faults = [fault]
            await call()
            assert not account.faults, n

    async def test_missing_container_says_what_to_do(self, account, store):
        """An account that was not provisioned is a configuration's fault, and no empty storage."""
        with pytest.raises(ConfigurationError, match="no container missing in the database troop: run troop db migr"):
            await store.read("missing", "p", "d1")
        account.partition_key = "/id"
        with pytest.raises(ConfigurationError, match="other is not partitioned by /partition"):
            await store.create("other", a_document())

        assert account.asked == []


class TestBudget:
    @pytest.mark.parametrize(
        ("wait", "requests"), [("10", 3), ("60000", 1), ("", 3)], ids=["soon", "too late", "not said"]
    )
    async def test_always_429_ends_in_time_with_the_wait(self, account, store, wait, requests):
        """A wait that fits is waited, three tries in all; any other is the caller's schedule, at once."""
        account.faults = [answered(429, **({"x_ms_retry_after_ms": wait} if wait else {}))] * 20

        with pytest.raises(RateLimitedError) as caught:
            await store.read(THINGS, "p", "d1")

        assert caught.value.retry_after == (timedelta(milliseconds=int(wait)) if wait else None)
        assert len(account.asked) == requests

    async def test_throttled_write_is_not_repeated_by_the_sdk(self, account, store):
        """The tries are ours: three requests, not three times the SDK's."""
        account.faults = [answered(429, x_ms_retry_after_ms="1")] * 20

        with pytest.raises(RateLimitedError):
            await store.create(THINGS, a_document())

        assert len(account.writes) == 3

    async def test_silence_uses_the_budget_once(self, account, hasty):
        """A server that never answers is asked twice, each time for half of the budget."""
        account.faults = [silence()] * 20

        async with asyncio.timeout(10 * SHORT.total_seconds()):
            with pytest.raises(UnavailableError):
                await hasty.feed(THINGS)

        assert len(account.asked) == 2

    async def test_other_region_is_asked(self, wall):
        """After 503 the SDK turns to another region of the account by itself."""
        account = CosmosAccount(answered(503), regions=2)
        store = CosmosDocuments(CLOUD, "troop", None, wall, credential=Identity(), transport=lambda: account)

        with pytest.raises(NotFoundError):
            await store.read(THINGS, "p", "d1")
        await store.close()

        assert len(account.asked) == 2


LOST = (cut, lambda effect: answered(408, effect), lambda effect: answered(500, effect))
WRITES = pytest.mark.parametrize("write", [create, replaced, batched], ids=lambda write: write.__name__)
LOSSES = pytest.mark.parametrize("lose", LOST, ids=["cut", "408", "500"])


class TestLostAnswers:
    async def _begin(self, account: CosmosAccount, store: CosmosDocuments, write: Write) -> Document:
        """What *write* starts from."""
        document = a_document(expires_at=WALL + SECOND)
        begun = document if write is create else await store.create(THINGS, document)
        account.asked.clear()
        return begun

    @WRITES
    @LOSSES
    async def test_commit_then_lost_answer_is_resolved_by_the_claim(self, account, store, write, lose):
        """The write happened and nobody said so: the stored claim does, and the etag serves the next write."""
        begun = await self._begin(account, store, write)
        account.faults = [lose("done")]

        written = await write(store, begun)

        assert len(account.writes) == 1
        assert await store.read(THINGS, "p", "d1") == written
        again = await store.replace(THINGS, written.with_body({"n": 3}))
        assert (await store.read(THINGS, "p", "d1")) == again

    @WRITES
    async def test_commit_then_silence_is_resolved_by_the_claim(self, account, hasty, write):
        """The same when there never is an answer: half of the budget is left to find out."""
        begun = await self._begin(account, hasty, write)
        account.faults = [silence("done")]

        written = await write(hasty, begun)

        assert len(account.writes) == 1
        assert await hasty.read(THINGS, "p", "d1") == written

    @WRITES
    @LOSSES
    async def test_lost_request_is_written_once(self, account, store, write, lose):
        """Nothing happened: the next attempt does it."""
        begun = await self._begin(account, store, write)
        account.faults = [lose("none")]

        written = await write(store, begun)

        assert len(account.writes) == 2
        assert await store.read(THINGS, "p", "d1") == written

    @WRITES
    async def test_late_commit_is_ours(self, account, store, write):
        """The first attempt takes effect after we looked: the second meets it, and knows it by the claim."""
        begun = await self._begin(account, store, write)
        account.faults = [cut("late")]

        written = await write(store, begun)

        assert len(account.writes) == 2
        assert await store.read(THINGS, "p", "d1") == written

    @pytest.mark.parametrize(("write", "error"), [(create, ConflictError), (replaced, StaleError)])
    async def test_somebody_elses_write_is_not_taken_for_ours(self, account, store, write, error):
        """A document that is there with another claim was written by another: the caller must look again."""
        begun = await self._begin(account, store, write)
        theirs = a_document(body={"by": "them"})

        def interfere() -> None:
            account.put(THINGS, {"id": "d1", "partition": "p", "sort": theirs.sort, "schema": 1, "body": theirs.body})

        account.on_write = interfere
        account.faults = [cut()]

        with pytest.raises(error):
            await write(store, begun)

        assert account.only()["body"] == {"by": "them"}

    @pytest.mark.parametrize("write", [create, replaced, batched, deleted], ids=lambda write: write.__name__)
    async def test_what_cannot_be_known_is_not_guessed(self, account, hasty, write):
        """While storage stays dark the outcome is open: the port's answer for that is UnavailableError."""
        begun = await self._begin(account, hasty, write)
        account.faults = [cut("done"), *[cut()] * 20]

        with pytest.raises(UnavailableError, match="it is not known whether things/p/"):
            await write(hasty, begun)

    async def test_throttling_after_a_lost_answer_says_that_it_may_have_happened(self, account, store):
        """RateLimitedError would promise that nothing was written."""
        account.faults = [cut("done"), answered(429, x_ms_retry_after_ms="60000")]
        account.faults.append(answered(429, x_ms_retry_after_ms="60000"))

        with pytest.raises(UnavailableError) as caught:
            await store.create(THINGS, a_document())

        assert caught.value.retry_after == timedelta(minutes=1)

    @LOSSES
    @pytest.mark.parametrize("effect", ["done", "late", "none"])
    async def test_delete_is_done_when_nothing_is_left(self, account, store, lose, effect):
        """A delete needs no claim: what is gone is gone."""
        begun = await self._begin(account, store, deleted)
        account.faults = [lose(effect)]

        await store.delete(THINGS, begun)

        assert account.items == {}

    async def test_delete_that_somebody_overtook_is_stale(self, account, store):
        """Nobody deletes what he has not seen, also not at the second attempt."""
        begun = await self._begin(account, store, deleted)
        account.on_write = lambda: account.put(THINGS, account.only()) and None
        account.faults = [cut()]

        with pytest.raises(StaleError):
            await store.delete(THINGS, begun)

    async def test_batch_overwritten_since_is_still_ours(self, account, store):
        """One document of a batch was changed again before we looked: the others tell that the batch happened."""
        begun = await self._begin(account, store, batched)
        account.faults = [cut("done"), REFUSED]  # the look is lost too, so the batch is attempted again

        def overwrite() -> None:
            if len(account.items) == 2:
                account.put(THINGS, {**account.items[THINGS, "p", "d1"], "claim": "theirs", "body": {"n": 9}})

        account.on_write = overwrite

        ours = await batched(store, begun)

        with pytest.raises(StaleError):
            await store.replace(THINGS, ours.with_body({"n": 3}))
        assert account.items[THINGS, "p", "d1"]["body"] == {"n": 9}

    async def test_batch_of_deletes_is_done_when_they_are_gone(self, account, store):
        """A batch that only deletes carries no claim, and needs none."""
        documents = [await store.create(THINGS, a_document(name)) for name in ("a", "b")]
        account.faults = [cut("done")]

        steps = [Operation(kind="delete", document=document) for document in documents]

        assert await store.batch(THINGS, steps) == documents
        assert account.items == {}


class TestConditions:
    async def test_conflict_and_stale(self, store):
        """409 and 412 that are not ours are the port's answers."""
        first = await store.create(THINGS, a_document())
        second = await store.replace(THINGS, first.with_body({"n": 2}))

        with pytest.raises(ConflictError, match="things/p/d1 exists already"):
            await store.create(THINGS, a_document())
        with pytest.raises(StaleError):
            await store.replace(THINGS, first.with_body({"n": 3}))
        with pytest.raises(StaleError):
            await store.delete(THINGS, first)

        assert await store.read(THINGS, "p", "d1") == second

    async def test_twenty_writers_lose_nothing(self, store):
        """A storm of 412s: everybody reads again and decides again, and every increment counts."""
        await store.create(THINGS, a_document(body={"n": 0}))

        async def increment() -> None:
            while True:
                read = await store.read(THINGS, "p", "d1")
                try:
                    await store.replace(THINGS, read.with_body({"n": read.body["n"] + 1}))
                except StaleError:
                    continue
                return

        await asyncio.gather(*(increment() for _ in range(20)))

        assert (await store.read(THINGS, "p", "d1")).body == {"n": 20}

    @pytest.mark.parametrize(
        ("trouble", "error"),
        [("conflict", ConflictError), ("stale", StaleError), ("gone", NotFoundError), ("stale delete", StaleError)],
    )
    async def test_refused_operation_of_a_batch_is_named(self, account, store, trouble, error):
        """The answer is 207 with 424 for all but one: that one decides the error, and nothing was written."""
        stored = await store.create(THINGS, a_document("stored"))
        old = await store.create(THINGS, a_document("old"))
        await store.replace(THINGS, old.with_body({"n": 2}))
        before = dict(account.items)
        refused = {
            "conflict": Operation(kind="create", document=a_document("old")),
            "stale": Operation(kind="replace", document=old),
            "gone": Operation(kind="replace", document=replace(old, id="never")),
            "stale delete": Operation(kind="delete", document=old),
        }[trouble]

        with pytest.raises(error, match="never" if trouble == "gone" else "things/p/old"):
            await store.batch(
                THINGS,
                [
                    Operation(kind="create", document=a_document("new")),
                    refused,
                    Operation(kind="delete", document=stored),
                ],
            )

        assert account.items == before

    async def test_batch_is_one_request(self, account, store):
        """Create, replace and delete go together, and come back with their etags."""
        old = await store.create(THINGS, a_document("old"))
        gone = await store.create(THINGS, a_document("gone"))
        account.asked.clear()

        made, changed, given_back = await store.batch(
            THINGS,
            [
                Operation(kind="create", document=a_document("new")),
                Operation(kind="replace", document=old.with_body({"n": 2})),
                Operation(kind="delete", document=gone),
            ],
        )

        assert len(account.asked) == 1
        assert given_back == gone
        assert [await store.read(THINGS, "p", name) for name in ("new", "old")] == [made, changed]
        with pytest.raises(NotFoundError):
            await store.read(THINGS, "p", "gone")

    async def test_throttled_batch_tries_again(self, account, store):
        """429 for the whole batch is waited for like any other."""
        account.faults = [answered(429, x_ms_retry_after_ms="1")]

        assert (await store.batch(THINGS, [Operation(kind="create", document=a_document())]))[0].etag


class TestExpiry:
    async def test_storage_is_told_how_long_to_keep_it(self, account, store):
        """Time to live counts from the last write and by another clock, so it is the time left and a minute."""
        await store.create(THINGS, a_document(expires_at=WALL + timedelta(seconds=90.5)))
        assert account.only()["ttl"] == 151

        await store.replace(THINGS, replace(await store.read(THINGS, "p", "d1"), expires_at=None))
        assert not {"ttl", "expires_at"} & account.only().keys()

    @pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a batch"])
    async def test_expired_item_makes_room(self, account, store, wall, alone):
        """A lease that ran out is taken while its item still lies there: by its etag, so by one of two."""
        await store.create(THINGS, a_document(body={"by": "first"}, expires_at=WALL + SECOND))
        wall.at += SECOND
        new = a_document(body={"by": "next"})

        if alone:
            taken = await store.create(THINGS, new)
        else:
            (taken,) = await store.batch(THINGS, [Operation(kind="create", document=new)])

        assert await store.read(THINGS, "p", "d1") == taken
        with pytest.raises(ConflictError):
            await store.create(THINGS, a_document())

    async def test_item_swept_between_conflict_and_look_is_made(self, account, store):
        """Storage said 409 and swept the item before we looked: the id is free after all."""
        account.faults = [answered(409)]

        assert (await store.create(THINGS, a_document())).etag

    async def test_lease_taken_by_another_is_a_conflict(self, account, store, wall):
        """Two take over the same expired item: the second is told that it exists, not that it was stale."""
        await store.create(THINGS, a_document(expires_at=WALL + SECOND))
        wall.at += SECOND
        item = {"id": "d1", "partition": "p", "sort": "s", "schema": 1, "body": {}, "claim": "theirs"}
        account.on_write = lambda: account.put(THINGS, item) and None if len(account.writes) > 1 else None

        account.asked.clear()
        with pytest.raises(ConflictError):
            await store.create(THINGS, a_document())

    async def test_lists_read_past_what_has_expired(self, account, store):
        """A page is full or the list has ended, however many expired items lie between."""
        items = [
            {"id": f"d{n}", "partition": "p", "sort": f"s{n}", "schema": 1, "body": {}, "_etag": str(n)}
            for n in range(5)
        ]
        for n in (0, 2):
            items[n]["expires_at"] = "2020-01-01T00:00:00.000000Z"
        account.results = [items[:2], items[2:3], items[3:4]]

        assert [d.id for d in await store.page(THINGS, "p", limit=2)] == ["d1", "d3"]
        account.results = [items[:2], items[:3], items[:4]]
        assert [d.id for d in await store.due(THINGS, before=WALL, limit=2)] == ["d1", "d3"]


class TestRequests:
    async def test_lists_are_keyset_queries(self, account, store):
        """Only sort, due_at and partition are indexed, so a query names nothing else."""
        await store.page(THINGS, "p|é", after="a", newest_first=True, limit=7)
        await store.feed(THINGS, after="b")
        await store.feed(THINGS, newest_first=True, limit=1)
        await store.due(THINGS, before=WALL)

        assert [(asked.body["query"], [p["value"] for p in asked.body["parameters"]]) for asked in account.asked] == [
            (
                "SELECT TOP 7 * FROM c WHERE c.partition=@partition AND c.sort<@after ORDER BY c.sort DESC",
                ["p|é", "a"],
            ),
            ("SELECT TOP 100 * FROM c WHERE c.sort>@after ORDER BY c.sort ASC", ["b"]),
            ("SELECT TOP 1 * FROM c ORDER BY c.sort DESC", []),
            ("SELECT TOP 100 * FROM c WHERE c.due_at<=@before ORDER BY c.due_at ASC", ["2026-11-21T09:00:00.000000Z"]),
        ]
        keys = [asked.headers.get("x-ms-documentdb-partitionkey") for asked in account.asked]
        assert keys == [json.dumps(["p|é"]), None, None, None]

    async def test_item_carries_no_nulls(self, account, store):
        """What is not there is not stored, not indexed and not paid for."""
        await store.create(THINGS, a_document())

        assert account.only().keys() == {"id", "partition", "sort", "schema", "body", "claim", "_etag"}

    async def test_one_client_however_many_begin_at_once(self, account, store):
        """The client and each container are opened once a process, by whoever comes first."""
        await asyncio.gather(*(store.feed(THINGS) for _ in range(10)))

        assert account.opened == 1
        assert [asked for asked in account.metadata if asked == "GET dbs/troop/colls/things"] == [
            "GET dbs/troop/colls/things"
        ]
        await store.close()
        assert account.closed == account.opened == 1

    @given(st.text())
    def test_every_id_is_escaped_and_read_back(self, id):
        """Cosmos DB forbids some characters in ids, and its gateway mangles more."""
        escaped = escape_id(id)

        assert not set(escaped) & set("/\\?#% \t\r\n")
        assert escaped.isascii()
        assert unescape_id(escaped) == id


class TestCharges:
    async def test_every_call_is_counted(self, account, wall):
        """Reads, lists, writes and failures: what was charged is known by operation and container."""
        heard: list[tuple[str, str, float]] = []
        store = CosmosDocuments(
            LOCAL, "troop", KEY, wall, transport=lambda: account, on_charge=lambda *told: heard.append(told)
        )
        await store.create(THINGS, a_document())
        await store.read(THINGS, "p", "d1")
        with pytest.raises(ConflictError):
            await store.create(THINGS, a_document())
        await store.page("others", "p")
        await store.close()

        counted = {place: (charge.calls, charge.units) for place, charge in store.charges.by_operation().items()}
        assert counted == {
            ("create", THINGS): (2, 6.5 + 6.5 + 1.0),  # a conflict is looked at
            ("read", THINGS): (1, 1.0),
            ("page", "others"): (1, 6.5),
        }
        assert store.charges.units == sum(units for _, _, units in heard)
        assert [told[:2] for told in heard] == [
            ("create", THINGS),
            ("read", THINGS),
            ("create", THINGS),
            ("page", "others"),
        ]

    async def test_span_of_a_call_shows_its_charge(self, spans, store):
        """One span a call, with its cost; an absent document is no failure."""
        with pytest.raises(NotFoundError):
            await store.read(THINGS, "p", "d1")

        (span,) = spans.get_finished_spans()
        assert span.name == "documents.read"
        assert span.attributes == {"troop.container": THINGS, "troop.request_charge": 1.0}
        assert span.status.is_ok or span.status.is_unset


class TestIdentity:
    async def test_cloud_is_asked_with_a_token(self, wall):
        """An account is reached as the app's identity."""
        account = CosmosAccount()
        store = CosmosDocuments(CLOUD, "troop", None, wall, credential=Identity(), transport=lambda: account)
        await store.feed(THINGS)
        await store.close()

        assert "token-of-the-app" in account.asked[0].headers["authorization"]

    async def test_identity_without_a_token_says_what_to_do(self, wall):
        """No role, or nobody logged in: a person must act."""
        store = CosmosDocuments(CLOUD, "troop", None, wall, credential=Identity("canary"), transport=CosmosAccount)
        with pytest.raises(ConfigurationError, match="Built-in Data Contributor") as caught:
            await store.feed(THINGS)
        await store.close()

        assert "canary" not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "key", "message"),
        [
            ("cosmos:https://a.documents.azure.com/?database=troop", "k", "COSMOS_KEY is for emulators only"),
            ("cosmos:http://a.documents.azure.com/?database=troop", "", "must be https"),
            ("cosmos:https://a.documents.azure.com/", "", "or cosmos:https://ACCOUNT"),
            ("cosmos:https://a.documents.azure.com/?database=a&more=b", "", "or cosmos:https://ACCOUNT"),
            ("cosmos:https://user:canary@a.documents.azure.com/?database=a", "", "or cosmos:https://ACCOUNT"),
            ("cosmos:https://a.documents.azure.com:canary/?database=a", "", "or cosmos:https://ACCOUNT"),
            ("cosmos:https://a.documents.azure.com/canary?database=a", "", "or cosmos:https://ACCOUNT"),
            ("cosmos:", "", "or cosmos:https://ACCOUNT"),
        ],
    )
    def test_wrong_setting_is_refused(self, wall, url, key, message):
        """What cannot work is said at the start, without showing what was given."""
        with pytest.raises(ConfigurationError, match=message) as caught:
            open_documents(url, wall, SecretStr(key))

        assert "canary" not in str(caught.value)

    @pytest.mark.parametrize("host", ["localhost:8081", "127.0.0.1:8081", "[::1]:8081", "cosmos:8081"])
    def test_emulator_takes_a_key(self, wall, host):
        """This machine and a container by its bare name are emulators."""
        store = open_documents(f"cosmos:https://{host}/?database=troop", wall, KEY)

        assert isinstance(store, CosmosDocuments)

    def test_sdk_is_loaded_at_first_use(self):
        """A cold start that stores in SQLite never loads it, and one that stores in Cosmos DB not before it must."""
        code = (
            "import sys, shared.wiring, shared.adapters.cosmos\n"
            "from shared.clock import SystemClock\n"
            "shared.wiring.open_documents('cosmos:https://a.documents.azure.com/?database=d', SystemClock())\n"
            "print([name for name in ('azure.cosmos', 'azure.identity', 'aiohttp') if name in sys.modules])"
        )

        said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

        assert said.stdout.strip() == "[]"


class TestProvision:
    async def test_missing_containers_are_made_once(self, npm_cosmos: CosmosPlace, wall):  # noqa: F811
        """A dry run only says so; the next run makes them with our indexes; the one after has nothing to do."""
        store = CosmosDocuments(npm_cosmos.endpoint, "provisioned", npm_cosmos.key, wall)

        planned = await store.provision(dry_run=True)
        made = await store.provision(dry_run=False)
        again = await store.provision(dry_run=False)
        known = await store.containers()
        for name in CONTAINERS:
            await store.create(name, a_document())
        await store.close()

        assert planned == [line.replace("Made", "Would make") for line in made]
        assert made == ["Made the database provisioned.", *(f"Made the container {name}." for name in CONTAINERS)]
        assert again == []
        assert known == list(CONTAINERS)

    def test_every_container_of_the_app_is_made(self):
        """A container that is named somewhere and made nowhere would be missing in production only."""
        named: set[str] = set()
        for place in ("shared", "signals", "alerts", "content", "infra/db"):
            for path in (ROOT / place).rglob("*.py"):
                named |= _containers_named(ast.parse(path.read_text()))

        assert named >= {"series", "signals", "deliveries", "posts", "deadletters", "rules"}
        assert named <= set(CONTAINERS)

    async def test_policy_that_differs_is_set(self, wall):
        """A container somebody made by hand indexes everything: every write would pay for that."""
        account = CosmosAccount()
        good = {
            "defaultTtl": -1,
            "indexingPolicy": {
                "includedPaths": [{"path": path} for path in INDEXED],
                "excludedPaths": [{"path": "/*"}, {"path": '/"_etag"/?'}],
            },
        }
        account.containers = {name: good for name in CONTAINERS if name != "bars"}
        store = CosmosDocuments(CLOUD, "troop", None, wall, credential=Identity(), transport=lambda: account)

        said = [await store.provision(dry_run=dry_run) for dry_run in (True, False, False)]
        await store.close()

        assert said == [
            ["Would set the index policy and time to live of bars."],
            ["Set the index policy and time to live of bars."],
            [],
        ]
        assert account.containers["bars"]["defaultTtl"] == -1

    async def test_other_partition_key_is_refused(self, wall):
        """A partition key cannot be changed: a person must decide what becomes of the data."""
        account = CosmosAccount()
        account.partition_key = "/id"
        store = CosmosDocuments(CLOUD, "troop", None, wall, credential=Identity(), transport=lambda: account)

        with pytest.raises(ConfigurationError, match="series is not partitioned by /partition"):
            await store.provision(dry_run=True)
        await store.close()


def _containers_named(module: ast.Module) -> set[str]:
    """The module's constants that stand where a call of the storage port names its container."""
    constants: dict[str, object] = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Tuple):
            names, values = node.targets[0], node.value
            pairs = zip(names.elts, values.elts, strict=True) if isinstance(names, ast.Tuple) else [(names, values)]
            constants |= {n.id: v.value for n, v in pairs if isinstance(n, ast.Name) and isinstance(v, ast.Constant)}
    operations = {"read", "create", "replace", "delete", "batch", "page", "feed", "due"}
    calls = [(node.func, node.args) for node in ast.walk(module) if isinstance(node, ast.Call) and node.args]
    calls += [(args[0], args[1:]) for func, args in calls if ast.unparse(func) == "partial" and len(args) > 1]
    firsts = [
        args[0]
        for func, args in calls
        if isinstance(func, ast.Attribute)
        and func.attr in operations
        and ast.unparse(func.value).endswith(("documents", "store"))
    ]
    named = [constants.get(first.id) for first in firsts if isinstance(first, ast.Name)]
    literal = [first.value for first in firsts if isinstance(first, ast.Constant)]
    return {name for name in [*named, *literal] if isinstance(name, str)}
