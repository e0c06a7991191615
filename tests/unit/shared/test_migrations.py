from dataclasses import replace

import pytest

from shared.clock import StoppedClock
from shared.documents import Operation
from shared.errors import ConfigurationError, InvalidPayloadError
from shared.migrations import Migrated, Migrations, claim_version, read_marker
from shared.settings import Settings
from shared.wiring import open_documents, wire_core
from tests.builders import WALL, a_document, documents

THINGS = "things"
NAMED = Migrations({(THINGS, 1): lambda b: {"name": b["said"]}})
LOUD = Migrations({(THINGS, 1): lambda b: {"name": b["said"]}, (THINGS, 2): lambda b: {"name": b["name"].upper()}})
"""The next app, and the one after it."""
NONE = Migrations({})
SETTINGS = {
    "EVENT_GRID_TOPIC_ENDPOINT": "http://127.0.0.1/topic",
    "AZURE_SIGNALR_CONNECTION_STRING": "Endpoint=http://127.0.0.1;AccessKey=k;Version=1.0;",
    "DISCORD_WEBHOOK_URL": "http://127.0.0.1/api/webhooks/100000000000000001/token",
    "ALPHA_VANTAGE_KEY": "k",
    "FINNHUB_KEY": "k",
}


@pytest.fixture
async def store():
    store = documents()
    yield store
    await store.close()


def app(store, migrations) -> Migrated:
    """An app that knows so many steps."""
    return Migrated(store, StoppedClock(WALL), app="9.9.9", migrations=migrations)


class TestUpgraded:
    def test_older_document_goes_through_every_step_in_order(self):
        """A document of any age comes out in the version that the app speaks."""
        found = LOUD.upgraded(THINGS, replace(a_document("ada"), etag="e"))

        assert found == replace(a_document("ada"), etag="e", schema=3, body={"name": "ADA"})

    def test_current_document_is_left_as_it_is(self):
        """What has been upgraded is not upgraded again."""
        current = replace(a_document(body={"name": "Ada"}), schema=3)

        assert LOUD.upgraded(THINGS, current) is current
        assert NONE.upgraded(THINGS, a_document()) == a_document()

    def test_steps_are_a_containers_own(self):
        """A container without steps stays in version 1."""
        assert LOUD.upgraded("others", a_document()) == a_document()
        assert (LOUD.version("others"), LOUD.version(THINGS), LOUD.store_version) == (1, 3, 3)

    def test_newer_document_is_refused_by_name(self):
        """An old app neither misreads nor overwrites what a newer one wrote."""
        with pytest.raises(ConfigurationError, match=r"things/p/d1 .*schema 3, this one knows 2.*update the app"):
            NAMED.upgraded(THINGS, replace(a_document(), schema=3))

    def test_body_that_a_step_cannot_read_is_named(self):
        """Whoever has to repair it learns which document, and from which version."""
        with pytest.raises(InvalidPayloadError, match=r"things/p/d1 cannot be upgraded from schema 1 \(KeyError"):
            NAMED.upgraded(THINGS, a_document(body={}))

    def test_step_that_is_missing_is_found_at_once(self):
        """Versions have no gap: a registry with one never starts."""
        with pytest.raises(ConfigurationError, match="things from 2 on"):
            Migrations({(THINGS, 1): dict, (THINGS, 3): dict})


class TestMigrated:
    async def test_every_way_of_reading_gives_current_documents(self, store):
        """Domains know one version only, before and after a migration."""
        await store.create(THINGS, a_document("ada", due_at=WALL))
        now = app(store, LOUD)

        found = [
            await now.read(THINGS, "p", "ada"),
            *await now.page(THINGS, "p"),
            *await now.feed(THINGS),
            *await now.due(THINGS, before=WALL),
        ]

        assert [(d.schema, d.body) for d in found] == [(3, {"name": "ADA"})] * 4

    async def test_every_way_of_writing_writes_the_current_version(self, store):
        """What was written is never upgraded again."""
        now = app(store, NAMED)
        first = await now.create(THINGS, a_document("d1", body={"name": "one"}))
        await now.replace(THINGS, replace(first, body={"name": "uno"}, schema=1))
        await now.batch(
            THINGS,
            [
                Operation(kind="create", document=a_document(f"b{i}", partition="q", body={"name": str(i)}))
                for i in (1, 2)
            ],
        )

        assert [(d.id, d.schema, d.body["name"]) for d in await store.page(THINGS, "p")] == [("d1", 2, "uno")]
        assert {d.schema for d in await store.page(THINGS, "q")} == {2}

    async def test_read_document_is_written_back_upgraded(self, store):
        """The etag of an older document holds through its upgrade, so reading and writing is one step as ever."""
        await store.create(THINGS, a_document("ada"))
        now = app(store, NAMED)

        read = await now.read(THINGS, "p", "ada")
        await now.replace(THINGS, read.with_body({**read.body, "seen": True}))

        stored = await store.read(THINGS, "p", "ada")
        assert (stored.schema, stored.body) == (2, {"name": "ada", "seen": True})

    async def test_upgraded_document_can_be_deleted(self, store):
        """Deleting asks for the stored etag too."""
        await store.create(THINGS, a_document("ada"))
        now = app(store, NAMED)

        await now.delete(THINGS, await now.read(THINGS, "p", "ada"))

        assert await store.feed(THINGS) == []

    async def test_store_that_a_newer_app_used_is_refused_by_every_call(self, store):
        """Before it has read or written anything, the older app stops and says what to do."""
        await app(store, LOUD).create(THINGS, a_document(body={"name": "NEW"}))
        old = app(store, NAMED)
        calls = [
            lambda: old.read(THINGS, "p", "d1"),
            lambda: old.create(THINGS, a_document("d2")),
            lambda: old.replace(THINGS, a_document()),
            lambda: old.delete(THINGS, a_document()),
            lambda: old.batch(THINGS, [Operation(kind="create", document=a_document("d2"))]),
            lambda: old.page(THINGS, "p"),
            lambda: old.feed("others"),
            lambda: old.due(THINGS, before=WALL),
        ]

        for call in calls:
            with pytest.raises(ConfigurationError, match=r"newer version.*9\.9\.9: store version 3.*update the app"):
                await call()
        assert [d.id for d in await store.feed(THINGS)] == ["d1"]

    async def test_newer_app_that_only_read_shuts_out_the_older(self, store):
        """A newer app may write at any moment, so its first use counts."""
        await app(store, NAMED).feed(THINGS)

        with pytest.raises(ConfigurationError):
            await app(store, NONE).feed(THINGS)

    async def test_apps_that_start_together_agree(self, store):
        """Claiming a store is a conditional write: the newest version wins, whoever comes first."""
        await claim_version(store, StoppedClock(WALL), app="1", migrations=LOUD)
        await claim_version(store, StoppedClock(WALL), app="1", migrations=LOUD, is_upgraded=True)

        assert (await read_marker(store, LOUD)).body == {"version": 3, "upgraded": 3, "app": "1"}

    async def test_app_without_steps_writes_nothing_of_its_own(self, store):
        """A store of version 1 carries no marker: an older release than this page is not shut out by it."""
        await app(store, NONE).feed(THINGS)

        assert await store.feed("system") == []


async def test_app_starts_and_then_refuses_a_newer_store(tmp_path):
    """Indexing functions touches no storage; the first use says to update the app, and health shows it."""
    url = f"sqlite:{tmp_path / 'app.db'}"
    newer = open_documents(url, StoppedClock(WALL))
    await app(newer, LOUD).create(THINGS, a_document(body={"name": "NEW"}))
    await newer.close()

    core = wire_core(Settings.from_env({**SETTINGS, "DOCUMENTS_URL": url}))

    with pytest.raises(ConfigurationError, match="newer version of the app"):
        await core.documents.feed("system", limit=1)
    await core.documents.close()
