import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from shared.adapters.sqlite import SCHEMA, SQLiteDocuments
from shared.clock import StoppedClock, SystemClock
from shared.errors import ConfigurationError, ConflictError, UnavailableError
from tests.builders import WALL, a_document

ROOT = Path(__file__).resolve().parents[2]

# One whole process each: what they share is the file and nothing else.
COUNT_UP = """
import asyncio, sys
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.errors import StaleError

async def main(path, times):
    store = SQLiteDocuments(path, SystemClock())
    for _ in range(times):
        while True:
            read = await store.read("things", "p", "counter")
            try:
                await store.replace("things", read.with_body({"n": read.body["n"] + 1}))
                break
            except StaleError:
                continue

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""
WRITE_BATCHES = """
import asyncio, sys
from datetime import timedelta
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.documents import Document, Operation, sort_key

async def main(path):
    wall = SystemClock()
    store = SQLiteDocuments(path, wall)
    for n in range(1_000_000):
        ids = [f"{n}-{i}" for i in range(5)]
        await store.batch("things", [
            Operation(kind="create", document=Document(
                id=id, partition="p", sort=sort_key(wall.now(), id), body={"batch": n, "filler": "x" * 2000}))
            for id in ids
        ])
        if n == 20:
            print("going", flush=True)

asyncio.run(main(sys.argv[1]))
"""


def start(program: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "app.db"


@pytest.fixture
async def opened():
    stores = []

    def open_(path) -> SQLiteDocuments:
        stores.append(SQLiteDocuments(path, StoppedClock(WALL)))
        return stores[-1]

    yield open_
    for store in stores:
        await store.close()


async def test_processes_on_one_file_lose_no_update(path, opened):
    """Three processes that count by etag count to the sum of their steps."""
    store = opened(path)
    await store.create("things", a_document("counter", body={"n": 0}))

    processes = [start(COUNT_UP, path, 60) for _ in range(3)]
    codes = [await asyncio.to_thread(process.wait) for process in processes]
    for process in processes:
        process.stdout.close()

    assert codes == [0, 0, 0]
    assert (await store.read("things", "p", "counter")).body == {"n": 180}


async def test_killed_writer_leaves_whole_batches_only(path, opened):
    """After kill -9 in the middle of writing the file opens at once and holds no part of a batch."""
    process = start(WRITE_BATCHES, path)
    try:
        assert await asyncio.to_thread(process.stdout.readline) == "going\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

    found = await opened(path).feed("things", limit=1_000_000)

    batches = [document.body["batch"] for document in found]
    last = max(batches)
    assert last >= 20
    assert sorted(batches) == [n for n in range(last + 1) for _ in range(5)]
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


async def test_file_keeps_what_was_written(path, opened):
    """Another process, or the same one tomorrow, finds what was stored."""
    first = opened(path)
    stored = await first.create("things", a_document())
    await first.close()

    assert await opened(path).feed("things") == [stored]


async def test_missing_folder_is_made(tmp_path, opened):
    """A newcomer's first start needs no mkdir."""
    path = tmp_path / "not" / "yet" / "there" / "app.db"

    await opened(path).create("things", a_document())

    assert path.exists()


async def test_folder_that_cannot_be_is_named(tmp_path, opened):
    """A path through a file is an operator's mistake: the error names it."""
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ConfigurationError, match=r"file/app\.db"):
        await opened(tmp_path / "file" / "app.db").feed("things")


async def test_file_that_is_a_folder_is_named(tmp_path, opened):
    """So is a folder in the file's place."""
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        await opened(tmp_path).feed("things")


async def test_file_that_cannot_be_written_asks_for_a_person(path, opened):
    """Trying again would not help where writing is forbidden."""
    store = opened(path)
    await store.feed("things")
    store._connection.execute("PRAGMA query_only=ON")

    with pytest.raises(ConfigurationError, match=r"app\.db cannot be written"):
        await store.create("things", a_document())


async def test_damaged_file_is_named_with_the_remedy(path, opened):
    """A file that is no database stops the app with its name and what to do, and is left as it is."""
    path.write_bytes(b"this was a database once" * 500)

    with pytest.raises(ConfigurationError, match=r"app\.db is damaged.*move it away.*backup"):
        await opened(path).feed("things")

    assert path.read_bytes().startswith(b"this was")


async def test_file_damaged_inside_is_named_too(path, opened):
    """Damage behind an intact beginning is found when it is read."""
    store = opened(path)
    for n in range(200):
        await store.create("things", a_document(f"{n}", body={"filler": "x" * 500}))
    await store.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))

    with pytest.raises(ConfigurationError, match=r"app\.db is damaged"):
        await opened(path).feed("things", limit=500)


async def test_newer_file_is_refused_and_untouched(path, opened):
    """An old version never writes into what a newer one keeps."""
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={SCHEMA + 1}")
        db.execute("CREATE TABLE documents (newer TEXT)")
    db.close()

    with pytest.raises(ConfigurationError, match=rf"newer version \(schema {SCHEMA + 1}.*update"):
        await opened(path).create("things", a_document())

    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM pragma_table_info('documents')").fetchall() == [("newer",)]
    db.close()


async def test_lock_that_is_let_go_is_waited_for(path, opened):
    """A writer who meets a lock tries again and leaves the loop free meanwhile."""
    store = opened(path)
    await store.feed("things")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    writing = asyncio.create_task(store.create("things", a_document()))
    await asyncio.sleep(0)
    assert not writing.done()
    other.execute("ROLLBACK")
    other.close()

    assert (await writing).etag


async def test_lock_that_stays_is_trouble_that_passes(path, opened, monkeypatch):
    """Nobody waits for ever: the caller hears that storage is unavailable, which is tried again later."""
    monkeypatch.setattr("shared.adapters.sqlite.BUSY_TRIES", 3)
    store = opened(path)
    await store.feed("things")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(UnavailableError, match="locked"):
        await store.create("things", a_document())

    assert await store.feed("things") == []  # readers are never locked out
    other.close()


async def test_first_openers_of_one_file_agree(path):
    """Many instances starting at once on a new file all find it ready."""
    stores = [SQLiteDocuments(path, SystemClock()) for _ in range(8)]

    answers = await asyncio.gather(
        *(store.create("things", a_document(str(n))) for n, store in enumerate(stores)), return_exceptions=True
    )

    assert not [answer for answer in answers if isinstance(answer, Exception)]
    assert len(await stores[0].feed("things")) == 8
    for store in stores:
        await store.close()


async def test_two_documents_never_share_a_place(opened):
    """A place in a container's list is one document's: otherwise a page could skip its twin."""
    store = opened(":memory:")
    await store.create("things", a_document("d1", partition="p"))

    with pytest.raises(ConflictError):
        await store.create("things", a_document("d1", partition="q"))
