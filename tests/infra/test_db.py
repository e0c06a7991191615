"""`troop db` check, restore and migrate, and the sweep: what an operator may do to a store, and what stays whole."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import batched
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from infra.cli import app
from infra.db import salvage
from infra.db.backup import back_up, backups_of
from infra.db.migrate import migrate
from infra.db.place import Place
from shared.adapters.sqlite import SCHEMA, SQLiteDocuments
from shared.clock import StoppedClock
from shared.documents import Document, Operation
from shared.errors import ConfigurationError
from shared.market.models import Interval
from shared.market.stores import Bars, SeriesStore
from shared.migrations import Migrated, Migrations, read_marker
from shared.settings import ROOT
from tests.builders import WALL, a_document

THINGS = "things"
VERSION_1 = Path(__file__).with_name("store_v1.sql")
COUNTED = Migrations({(THINGS, 1): lambda b: {**b, "n": b["n"] + 1}})
"""The next app: its step changes a body every time it is applied."""
CLOCK = StoppedClock(WALL)


def troop(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["db", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def fill(file: Path, documents: Iterable[Document], container: str = THINGS) -> None:
    async def write() -> None:
        store = SQLiteDocuments(file, CLOCK)
        for chunk in batched(documents, 100, strict=False):
            await store.batch(container, [Operation(kind="create", document=document) for document in chunk])
        await store.close()

    asyncio.run(write())


def numbered(count: int, **body: Any) -> list[Document]:
    return [a_document(f"d{n:04}", at=WALL + timedelta(seconds=n), body={"n": n, **body}) for n in range(count)]


def stored(file: Path, container: str = THINGS) -> list[Document]:
    async def read() -> list[Document]:
        store = SQLiteDocuments(file, CLOCK)
        found = await store.feed(container, limit=100_000)
        await store.close()
        return found

    return asyncio.run(read())


def sql(file: Path, *statements: str) -> list[Any]:
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        return [db.execute(statement).fetchall() for statement in statements][-1]


def damage(file: Path, pages: Iterable[int]) -> None:
    data = bytearray(file.read_bytes())
    for page in pages:
        data[page * 4096 : (page + 1) * 4096] = b"\xa5" * 4096
    file.write_bytes(data)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def file(data: Path) -> Path:
    data.mkdir()
    return data / "app.db"


@pytest.fixture
def version_1(file: Path) -> Path:
    """A store that the first release wrote."""
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(VERSION_1.read_text(encoding="utf-8"))
    return file


class TestCheck:
    def test_whole_store_is_counted(self, data, file):
        """An operator sees what lies in each container and what is owed longest."""
        fill(file, [*numbered(3), a_document("owes", at=WALL - timedelta(days=1), due_at=WALL)])
        fill(
            file,
            [a_document("gone", expires_at=datetime.min.replace(tzinfo=WALL.tzinfo) + timedelta(days=1))],
            "others",
        )

        found = troop("check", "--data", data)

        assert found.exit_code == 0
        lines = {line.split()[0]: line.split()[1:] for line in found.stdout.splitlines()}
        assert lines[f"{file}:"] == ["whole"]
        assert lines["things"] == ["4", "0", "0", "2026-11-21T09:00:00Z"]
        assert lines["others"] == ["1", "1", "0", "-"]

    def test_missing_store_is_named_and_not_made(self, data):
        """Looking at nothing is a mistake in the command, and leaves nothing behind."""
        found = troop("check", "--data", data)

        assert found.exit_code == 1
        assert f"{data / 'app.db'} does not exist" in found.stderr
        assert not data.exists()

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ("UPDATE documents SET body='{\"half' WHERE id='d0002'", "things/p/d0002: its body is no JSON"),
            ("UPDATE documents SET body='[1]' WHERE id='d0002'", "things/p/d0002: its body is no JSON object"),
            ("UPDATE documents SET body='{\"n\":NaN}' WHERE id='d0002'", "things/p/d0002: its body is no JSON"),
            (
                "UPDATE documents SET body=x'7b22ff227d' WHERE id='d0002'",
                "things/p/d0002: it holds bytes that are no text",
            ),
            ("UPDATE documents SET due_at='tomorrow' WHERE id='d0002'", "things/p/d0002: due_at or expires_at is no"),
            ("UPDATE documents SET due_at='2026-11-21T09:00:00Z' WHERE id='d0002'", "cannot be compared"),
            ("UPDATE documents SET sort='later' WHERE id='d0002'", "things/p/d0002: its place in the order"),
            (
                "UPDATE documents SET schema=7 WHERE id='d0002'",
                "things/p/d0002 was written by a newer version (schema 7",
            ),
            ("UPDATE documents SET schema='x' WHERE id='d0002'", "things/p/d0002: its schema is no number"),
            ("DROP INDEX documents_by_sort", "index documents_by_sort is missing"),
            ("DROP TABLE documents", "table documents is missing"),
        ],
    )
    def test_fault_in_a_store_is_named(self, data, file, change, says):
        """Whatever the app could stumble over is found before it does."""
        fill(file, numbered(4))
        sql(file, change)

        found = troop("check", "--data", data)

        assert found.exit_code == 1
        assert "damaged" in found.stdout
        assert says in found.stdout

    def test_index_that_disagrees_is_found(self, data, file):
        """A list that misses a document is damage, though every document can be read."""
        fill(file, numbered(4))
        with closing(sqlite3.connect(file, isolation_level=None)) as db:
            [[root, text]] = db.execute(
                "SELECT rootpage, sql FROM sqlite_master WHERE name='documents_by_sort'"
            ).fetchall()
            db.execute("PRAGMA writable_schema=ON")
            db.execute("DELETE FROM sqlite_master WHERE name='documents_by_sort'")
            db.execute("PRAGMA writable_schema=RESET")
        sql(file, "DELETE FROM documents WHERE id='d0001'")
        with closing(sqlite3.connect(file, isolation_level=None)) as db:
            db.execute("PRAGMA writable_schema=ON")
            row = ("index", "documents_by_sort", "documents", root, text)
            db.execute("INSERT INTO sqlite_master VALUES (?,?,?,?,?)", row)

        found = troop("check", "--data", data)

        assert found.exit_code == 1
        assert "documents_by_sort" in found.stdout

    def test_damaged_file_gets_two_ways_back_and_is_left_alone(self, data, file):
        """What is lost is said, the newest backup is named, and nothing is touched before somebody decides."""
        fill(file, numbered(200, filler="x" * 300))
        backup = back_up(file, WALL, lambda _: None)
        damage(file, [14, 15])
        before = file.read_bytes()

        found = troop("check", "--data", data)

        assert found.exit_code == 1
        assert f"troop db restore {backup}" in found.stdout
        assert "troop db check --salvage" in found.stdout
        readable = next(line for line in found.stdout.splitlines() if line.startswith("readable"))
        saved, lost = (int(word.rstrip(";")) for word in readable.split() if word.rstrip(";").isdigit())
        assert saved + lost == 200
        assert lost > 0
        assert file.read_bytes() == before

    @pytest.mark.parametrize("content", [b"", b"this was a database once" * 500], ids=["empty", "nonsense"])
    def test_file_that_is_no_store_is_damage_too(self, data, file, content):
        """The answer is the same list of ways back, and no traceback."""
        file.write_bytes(content)

        found = troop("check", "--data", data)

        assert found.exit_code == 1
        assert "there is no backup in" in found.stdout

    def test_newer_file_is_refused(self, data, file):
        """An old app does not judge what it does not know."""
        sql(file, f"PRAGMA user_version={SCHEMA + 1}")

        found = troop("check", "--data", data)

        assert found.exit_code == 1
        assert "newer version" in found.stderr

    def test_store_behind_a_url_is_checked_document_by_document(self, capsys, tmp_path):
        """Cosmos DB has no file to look into: every document is read and judged."""
        shelf = Shelf(url="shelf:", file_=tmp_path / "x.db")
        fill(shelf.file_, [*numbered(3), replace(a_document("new", at=WALL - timedelta(1)), schema=5)])
        from infra.db.check import check

        assert asyncio.run(check(shelf, CLOCK)) is False

        assert "things/p/new was written by a newer version" in capsys.readouterr().out


class TestSalvage:
    @pytest.mark.parametrize("pages", [[15, 16], [2, 30], list(range(18, 23))], ids=str)
    def test_every_row_that_can_be_read_is_saved_and_the_others_are_counted(self, data, file, pages, tmp_path):
        """Damage costs what lay on the damaged pages, and nothing else goes missing unnamed."""
        fill(file, numbered(300, filler="x" * 200))
        whole = {document.id: document for document in stored(file)}
        sql(file, "PRAGMA wal_checkpoint(TRUNCATE)")
        damage(file, pages)

        found = troop("check", "--data", data, "--salvage", tmp_path / "new.db")

        saved = stored(tmp_path / "new.db")
        lost = int(next(line for line in found.stdout.splitlines() if line.startswith("saved into")).split()[-1])
        assert found.exit_code == 1
        assert len(saved) + lost == 300 or len(pages) > 3  # where an index lost the same ones, nobody knows their names
        assert all(document == whole[document.id] for document in saved)
        assert 300 - len(saved) <= 20 * len(pages)  # a page holds less than 20 of these
        assert troop("check", "--url", f"sqlite:{tmp_path / 'new.db'}").exit_code == 0

    @pytest.mark.parametrize("pages", [[0], [1, 2, 3], [2, 3, 16, 17]], ids=str)
    def test_what_is_saved_is_true_however_bad_the_damage(self, data, file, pages, tmp_path):
        """Little may be left, or nothing, but nothing is made up and the new file is whole."""
        fill(file, numbered(300, filler="x" * 200))
        whole = {document.id: document for document in stored(file)}
        sql(file, "PRAGMA wal_checkpoint(TRUNCATE)")
        damage(file, pages)

        found = troop("check", "--data", data, "--salvage", tmp_path / "new.db")

        assert found.exit_code == 1
        assert "saved into" in found.stdout
        assert all(document == whole[document.id] for document in stored(tmp_path / "new.db"))

    def test_saved_file_takes_the_damaged_ones_place(self, data, file, tmp_path):
        """The way back that check names leads back: the app reads and writes again."""
        fill(file, numbered(200, filler="x" * 200))
        damage(file, [12])
        assert troop("check", "--data", data, "--salvage", tmp_path / "new.db").exit_code == 1

        restored = troop("restore", tmp_path / "new.db", "--data", data)

        assert restored.exit_code == 0, restored.output
        assert stored(file) == stored(tmp_path / "new.db")
        fill(file, [a_document("after", at=WALL - timedelta(1))])
        assert troop("check", "--data", data).exit_code == 0

    def test_trouble_of_the_new_file_is_not_taken_for_damage(self, data, file, tmp_path, monkeypatch):
        """When the disk is full, nothing is called lost: the error names the new file, and no half of it is left."""
        fill(file, numbered(300, filler="x" * 200))
        lay_out_fully = salvage.lay_out

        def lay_out_on_a_small_disk(db: sqlite3.Connection, *, since: int) -> None:
            lay_out_fully(db, since=since)
            db.execute("PRAGMA max_page_count=12")

        monkeypatch.setattr(salvage, "lay_out", lay_out_on_a_small_disk)

        found = troop("check", "--data", data, "--salvage", tmp_path / "new.db")

        assert found.exit_code == 1
        assert f"{tmp_path / 'new.db'} cannot be written: database or disk is full" in found.stderr
        assert not list(tmp_path.glob("new.db*"))

    def test_existing_file_is_never_written_over(self, data, file, tmp_path):
        """Salvage goes to a new file or nowhere."""
        fill(file, numbered(1))
        (tmp_path / "new.db").write_text("mine")

        found = troop("check", "--data", data, "--salvage", tmp_path / "new.db")

        assert found.exit_code == 1
        assert "exists already" in found.stderr
        assert (tmp_path / "new.db").read_text() == "mine"


class TestRestore:
    def test_what_was_there_is_moved_aside_with_its_log(self, data, file):
        """A wrong restore can be undone: the replaced store lies whole in its own folder."""
        fill(file, numbered(2))
        backup = back_up(file, WALL, lambda _: None)
        fill(file, [a_document("later", at=WALL + timedelta(days=1))])

        found = troop("restore", backup, "--data", data)

        assert found.exit_code == 0
        assert [d.id for d in stored(file)] == ["d0000", "d0001"]
        [aside] = (data / "backups").glob("replaced-*")
        assert str(aside) in found.stdout
        assert [d.id for d in stored(aside / "app.db")] == ["d0000", "d0001", "later"]

    def test_store_in_use_is_not_replaced(self, data, file):
        """Under a running app a restore would lose what the app writes: it asks to stop it first."""
        fill(file, numbered(1))
        backup = back_up(file, WALL, lambda _: None)
        with closing(sqlite3.connect(file, isolation_level=None)) as running:
            running.execute("SELECT count(*) FROM documents").fetchone()

            found = troop("restore", backup, "--data", data)

        assert found.exit_code == 1
        assert "stop the app first" in found.stderr
        assert not list((data / "backups").glob("replaced-*"))

    def test_backup_that_is_damaged_is_refused(self, data, file):
        """A store is never replaced by something worse."""
        fill(file, numbered(200, filler="x" * 200))
        backup = back_up(file, WALL, lambda _: None)
        damage(backup, [5])

        found = troop("restore", backup, "--data", data)

        assert found.exit_code == 1
        assert len(stored(file)) == 200
        assert not list(data.glob("*restoring*"))

    @pytest.mark.parametrize("name", ["nothing.db", "app.db"])
    def test_backup_that_is_none_is_refused_with_the_newest_one(self, data, file, name):
        """A slip of the pen is answered by the name that was probably meant."""
        fill(file, numbered(1))
        backup = back_up(file, WALL, lambda _: None)

        found = troop("restore", data / name, "--data", data)

        assert found.exit_code == 1
        assert str(backup) in found.stderr

    def test_the_newest_five_backups_are_kept(self, file):
        """A disk does not fill with backups, and what others put into the folder is not ours to delete."""
        fill(file, numbered(1))
        (file.parent / "backups").mkdir()
        (file.parent / "backups" / "app-of-mine.db").write_text("mine")

        made = [back_up(file, WALL + timedelta(minutes=n), lambda _: None) for n in range(7)]

        assert backups_of(file) == made[:1:-1]
        assert (file.parent / "backups" / "app-of-mine.db").exists()

    def test_backup_is_one_moment_of_a_busy_store(self, file, monkeypatch):
        """What is written while pages are copied is not in it, not even half."""
        monkeypatch.setattr("infra.db.backup.PAGES", 10)
        fill(file, numbered(200, filler="x" * 1000))
        writer = sqlite3.connect(file, isolation_level=None)

        def write_meanwhile(_: str) -> None:
            writer.execute("UPDATE documents SET body='{}'")

        with closing(writer):
            backup = back_up(file, WALL, write_meanwhile)

        assert Counter("filler" in d.body for d in stored(backup)) == {True: 200}
        assert Counter("filler" in d.body for d in stored(file)) == {False: 200}


class TestVersion1:
    def test_the_app_reads_and_writes_it_as_it_is(self, version_1):
        """Nobody has to migrate before the new release starts."""

        async def use() -> None:
            store = SQLiteDocuments(version_1, CLOCK)
            documents = Migrated(store, CLOCK, app="0.2.0")
            series = await SeriesStore(documents, CLOCK).get("AAPL", Interval.DAY)
            page = await Bars(documents, CLOCK).newest(series.key, series.revision)
            await SeriesStore(documents, CLOCK).save(replace(series, misses=1))
            assert list(page.columns.close) == [100.0, 101.0, 102.0]
            assert await store.sweep_expired() == 1
            await documents.close()

        asyncio.run(use())

        assert stored(version_1, "series")[0].body["misses"] == 1
        assert sql(version_1, "PRAGMA user_version") == [(1,)]

    def test_migrate_brings_it_up_to_date_and_keeps_every_document(self, version_1, data):
        """The layout becomes today's, a backup of yesterday's is kept, and what was stored is the same."""
        before = {name: stored(version_1, name) for name in ("bars", "series", THINGS)}

        found = troop("migrate", "--data", data)

        assert found.exit_code == 0, found.output
        assert sql(version_1, "PRAGMA user_version") == [(SCHEMA,)]
        assert {name: stored(version_1, name) for name in before} == before
        [backup] = backups_of(version_1)
        assert str(backup) in found.stdout
        assert sql(backup, "PRAGMA user_version") == [(1,)]
        assert stored(backup, "bars") == before["bars"]
        assert troop("check", "--data", data).exit_code == 0

    def test_dry_run_says_the_same_and_writes_nothing(self, version_1, data):
        """An operator may always look first."""
        before = version_1.read_bytes()

        found = troop("migrate", "--data", data, "--dry-run")

        assert found.exit_code == 0
        assert f"layout 1 would become {SCHEMA}" in found.stdout
        assert version_1.read_bytes() == before
        assert not (data / "backups").exists()

    def test_second_migration_has_nothing_to_do(self, version_1, data):
        """Asked again it makes no second backup and changes no byte."""
        troop("migrate", "--data", data)
        before = version_1.read_bytes()

        found = troop("migrate", "--data", data)

        assert found.exit_code == 0
        assert version_1.read_bytes() == before
        assert len(backups_of(version_1)) == 1

    def test_first_migration_makes_the_store(self, data):
        """A deployment runs the same command whether there is a store or not."""
        assert troop("migrate", "--data", data, "--dry-run").exit_code == 0
        assert not data.exists()

        assert troop("migrate", "--data", data).exit_code == 0

        assert troop("check", "--data", data).exit_code == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf(Place):
    """A storage that is no file to the commands: it must be provisioned, as Cosmos DB must."""

    file_: Path
    class_: type[SQLiteDocuments] = SQLiteDocuments

    def open(self, wall: Any) -> SQLiteDocuments:
        return self.class_(self.file_, wall)


class Provisioned(SQLiteDocuments):
    """Remembers how it was provisioned."""

    asked: list[bool] = []  # noqa: RUF012 - one test, one list

    async def provision(self, *, dry_run: bool) -> list[str]:
        self.asked.append(dry_run)
        return ["made the container things"]


class Busy(SQLiteDocuments):
    """A store into which the app writes just before each of our writes."""

    async def replace(self, container: str, document: Document) -> Document:
        if container == THINGS and "seen" not in document.body:
            app = Migrated(SQLiteDocuments(self._path, CLOCK), CLOCK, app="2", migrations=COUNTED)
            read = await app.read(container, document.partition, document.id)
            await app.replace(container, read.with_body({**read.body, "seen": True}))
            await app.close()
        return await super().replace(container, document)


def upgrade(file: Path, migrations: Migrations = COUNTED, **options: Any) -> bool:
    return asyncio.run(migrate(Place(url=f"sqlite:{file}"), CLOCK, migrations=migrations, **options))


def numbers(file: Path) -> list[int]:
    return [document.body["n"] for document in stored(file)]


MIGRATE = """
import asyncio, sys
from infra.db.migrate import migrate
from infra.db.place import Place
from shared.clock import SystemClock
from shared.migrations import Migrations

steps = Migrations({("things", 1): lambda b: {**b, "n": b["n"] + 1}})

def stop(container):
    print(container, flush=True)
    sys.stdin.readline()

asyncio.run(migrate(Place(url="sqlite:" + sys.argv[1]), SystemClock(), migrations=steps, on_page=stop))
"""


class TestMigrate:
    def test_every_older_document_is_upgraded_once(self, file):
        """All of them, whatever the number of pages; asked again, none."""
        fill(file, numbered(450))

        assert upgrade(file)
        assert upgrade(file)

        assert numbers(file) == list(range(1, 451))
        assert {d.schema for d in stored(file)} == {2}
        assert len(backups_of(file)) == 1
        assert [d.id for d in stored(file, "system")] == ["store"]

    def test_dry_run_counts_and_writes_nothing(self, file, capsys):
        """How long it will take is known before it begins."""
        fill(file, numbered(450))
        before = file.read_bytes()

        assert upgrade(file, dry_run=True)

        assert "things: 450 documents looked at, 450 to upgrade" in capsys.readouterr().out
        assert file.read_bytes() == before
        assert not (file.parent / "backups").exists()

    def test_migration_killed_in_the_middle_ends_the_same(self, file):
        """After kill -9 at a page's end the next run goes on: each document once, and one backup, from before."""
        fill(file, numbered(500))
        process = subprocess.Popen(
            [sys.executable, "-c", MIGRATE, str(file)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            while process.stdout.readline() != "things\n":
                assert process.poll() is None
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process.stdin.close()
            process.stdout.close()
        half = Counter(d.schema for d in stored(file))
        assert half == {2: 200, 1: 300}

        assert upgrade(file)

        assert numbers(file) == list(range(1, 501))
        assert {d.schema for d in stored(file)} == {2}
        [backup] = backups_of(file)
        assert {d.schema for d in stored(backup)} == {1}
        assert [d.id for d in stored(file, "system")] == ["store"]

    def test_second_run_begins_where_the_first_came_to(self, file, capsys):
        """A large store is not read from its beginning again."""
        fill(file, numbered(500))

        def stop(_: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            upgrade(file, on_page=stop)
        capsys.readouterr()

        assert upgrade(file)

        said = capsys.readouterr().out
        assert "continuing; the backup is" in said
        assert "things: 300 documents looked at, 300 upgraded" in said

    def test_app_that_writes_meanwhile_loses_nothing(self, tmp_path):
        """Every upgrade is a conditional write: what the app wrote in between stays, and is upgraded once."""
        file = tmp_path / "x.db"
        fill(file, numbered(30))

        done = asyncio.run(migrate(Shelf(url="busy:", file_=file, class_=Busy), CLOCK, migrations=COUNTED))

        assert done
        assert numbers(file) == list(range(1, 31))
        assert all(d.body["seen"] and d.schema == 2 for d in stored(file))

    def test_document_deleted_meanwhile_is_nobodys_loss(self, file):
        """What is gone needs no upgrade."""
        fill(file, numbered(250))

        def delete_the_last(_: str) -> None:
            sql(file, "DELETE FROM documents WHERE id IN ('d0249', 'd0001')")

        assert upgrade(file, on_page=delete_the_last)

        assert len(stored(file)) == 248

    def test_document_that_no_step_can_read_is_named_and_stays(self, file, capsys):
        """The others are upgraded; once it is repaired, the next run finishes."""
        fill(file, [*numbered(3), a_document("odd", at=WALL - timedelta(1), body={})])

        assert not upgrade(file)
        assert "things/p/odd cannot be upgraded from schema 1" in capsys.readouterr().out
        assert Counter(d.schema for d in stored(file)) == {2: 3, 1: 1}
        sql(file, "UPDATE documents SET body='{\"n\": -1}' WHERE id='odd'")
        assert upgrade(file)

        assert numbers(file) == [0, 1, 2, 3]

    def test_older_app_is_shut_out_from_the_first_change_on(self, file):
        """From the first upgraded document on, an app that could not read it does not start."""
        fill(file, numbered(300))

        def stop(_: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            upgrade(file, on_page=stop)

        async def start_the_older_app() -> None:
            store = SQLiteDocuments(file, CLOCK)
            try:
                await Migrated(store, CLOCK, app="1", migrations=Migrations({})).feed("others")
            finally:
                await store.close()

        with pytest.raises(ConfigurationError, match="newer version"):
            asyncio.run(start_the_older_app())

    def test_store_that_a_newer_app_used_is_not_migrated(self, file):
        """Running the old command against the new store changes nothing."""
        fill(file, numbered(1))
        assert upgrade(file)

        with pytest.raises(ConfigurationError, match="newer version of the app"):
            upgrade(file, Migrations({}))

        assert len(backups_of(file)) == 1

    @pytest.mark.parametrize("dry_run", [True, False])
    def test_containers_are_provisioned_first(self, tmp_path, capsys, dry_run):
        """Where containers must be made, migrate makes them, and a dry run only says which."""
        Provisioned.asked.clear()
        shelf = Shelf(url="shelf:", file_=tmp_path / "x.db", class_=Provisioned)

        assert asyncio.run(migrate(shelf, CLOCK, dry_run=dry_run))

        assert Provisioned.asked == [dry_run]
        assert "made the container things" in capsys.readouterr().out


class TestSweep:
    @pytest.fixture
    async def store(self, tmp_path):
        store = SQLiteDocuments(tmp_path / "app.db", StoppedClock(WALL))
        yield store
        await store.close()

    async def fill(self, store, count: int) -> None:
        for n in range(count):
            at = WALL + timedelta(seconds=n)
            await store.create(THINGS, a_document(f"d{n}", at=at, expires_at=at if n % 3 else None))

    def rows(self, store) -> Sequence[Any]:
        return sql(Path(store._path), "SELECT id FROM documents ORDER BY sort")

    async def test_expired_are_deleted_and_nothing_else(self, store):
        """At its instant a document is gone; later ones, and those without an end, stay."""
        await self.fill(store, 12)
        store._wall.at = WALL + timedelta(seconds=5)

        assert await store.sweep_expired() == 4

        assert [name for (name,) in self.rows(store)] == ["d0", "d3", *(f"d{n}" for n in range(6, 12))]
        assert await store.sweep_expired() == 0

    async def test_sweep_stops_at_its_limit(self, store):
        """One run never takes longer than it may; the next one goes on."""
        await self.fill(store, 12)
        store._wall.at = WALL + timedelta(days=1)

        assert [await store.sweep_expired(limit=5) for _ in range(3)] == [5, 3, 0]

    async def test_documents_without_a_file_are_swept_too(self):
        """A store in memory obeys the same call."""
        store = SQLiteDocuments(":memory:", StoppedClock(WALL))
        await self.fill(store, 3)
        store._wall.at = WALL + timedelta(days=1)

        assert await store.sweep_expired() == 2
        await store.close()

    async def test_loop_goes_on_while_a_sweep_waits(self, store):
        """The sweep waits for a lock in its own thread; reading goes on meanwhile."""
        await self.fill(store, 3)
        store._wall.at = WALL + timedelta(days=1)
        other = sqlite3.connect(store._path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        sweeping = asyncio.create_task(store.sweep_expired())
        assert len(await store.feed(THINGS)) == 1
        assert not sweeping.done()
        other.execute("ROLLBACK")
        other.close()

        assert await sweeping == 2

    async def test_marker_reads_none_in_a_new_store(self, store):
        """A store nobody claimed is of version 1."""
        assert await read_marker(store) is None
