"""`troop db export` and `import`: what leaves a store comes into another one the same, whatever happens on the way."""

import asyncio
import json
import tempfile
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from itertools import batched
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from infra.cli import app
from infra.db.place import Place
from infra.db.transfer import export, import_
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import StoppedClock
from shared.documents import Document, Operation, sort_key
from shared.errors import ConfigurationError
from shared.migrations import Migrations, claim_version
from tests.builders import WALL, a_document

THINGS = "things"
CLOCK = StoppedClock(WALL)
NAMED = Migrations({(THINGS, 1): lambda b: {"name": b["said"]}})
"""The next app."""

type Contents = dict[str, list[Document]]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
offsets = st.integers(0, 10**12).map(lambda us: timedelta(microseconds=us))
bodies = st.dictionaries(texts, values, max_size=3)
made = st.builds(
    lambda id_, partition, at, body, due, left, schema: Document(
        id=id_,
        partition=partition,
        sort=sort_key(WALL + at, id_),
        body=body,
        due_at=due and WALL + due,
        expires_at=left and WALL + timedelta(seconds=1) + left,
        schema=schema,
    ),
    texts,
    texts,
    offsets,
    bodies,
    st.none() | offsets,
    st.none() | offsets,
    st.just(1),
)


def troop(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["db", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def place(file: Path) -> Place:
    return Place(url=f"sqlite:{file}")


def fill(file: Path, documents: Iterable[Document], container: str = THINGS) -> None:
    async def write() -> None:
        store = SQLiteDocuments(file, CLOCK)
        for chunk in batched(documents, 100, strict=False):
            await store.batch(container, [Operation(kind="create", document=document) for document in chunk])
        await store.close()

    asyncio.run(write())


async def contents(file: Path) -> Contents:
    store = SQLiteDocuments(file, CLOCK)
    found = {
        name: [replace(d, etag=None) for d in await store.feed(name, limit=100_000)]
        for name in await store.containers()
    }
    await store.close()
    return found


def stored(file: Path) -> Contents:
    return asyncio.run(contents(file))


def numbered(count: int, **body: Any) -> list[Document]:
    return [a_document(f"d{n:04}", at=WALL + timedelta(seconds=n), body={"n": n, **body}) for n in range(count)]


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return tmp_path / "first.db"


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return tmp_path / "second.db"


@pytest.fixture
def wire(tmp_path: Path) -> Path:
    return tmp_path / "all.jsonl"


class TestRoundTrip:
    @settings(max_examples=settings.default.max_examples // 4)
    @given(
        documents=st.lists(
            st.tuples(st.sampled_from(["signals", "bars", "système"]), made),
            min_size=1,
            max_size=16,
            unique_by=(lambda x: (x[0], x[1].partition, x[1].id), lambda x: (x[0], x[1].sort)),
        )
    )
    def test_every_document_arrives_as_it_was(self, documents):
        """Through the file and into an empty store: equal in everything but the etag."""
        with tempfile.TemporaryDirectory() as folder:
            here, there, wire = (Path(folder) / name for name in ("here.db", "there.db", "all.jsonl"))
            for container, document in documents:
                fill(here, [document], container)

            assert asyncio.run(export(place(here), wire, CLOCK))
            assert asyncio.run(import_(wire, place(there), CLOCK))

            assert stored(there) == stored(here)

    def test_commands_move_a_store(self, first, second, wire):
        """The two commands an operator types, and what they say."""
        fill(first, numbered(250))
        fill(first, [a_document("s")], "signals")

        out = troop("export", wire, "--from-url", f"sqlite:{first}")
        back = troop("import", wire, "--to-url", f"sqlite:{second}")

        assert (out.exit_code, back.exit_code) == (0, 0), out.output + back.output
        assert "251 documents exported" in out.stdout
        assert "251 created, 0 replaced, 0 there already, 0 expired, 0 refused" in back.stdout
        assert stored(second) == stored(first)

    def test_file_is_json_lines_that_anybody_can_read(self, first, wire):
        """A header, one document a line with its container and no etag, and the count."""
        fill(first, [a_document("ada", due_at=WALL, body={"said": "Grüezi"})])

        troop("export", wire, "--from-url", f"sqlite:{first}")

        header, line, count = lines(wire)
        assert header["troop"] == "troop documents"
        assert header["app"] == "0.1.0"
        assert line == {
            "container": THINGS,
            "id": "ada",
            "partition": "p",
            "sort": "2026-11-21T09:00:00.000000Z|ada",
            "due_at": "2026-11-21T09:00:00Z",
            "expires_at": None,
            "schema": 1,
            "body": {"said": "Grüezi"},
        }
        assert count == {"documents": 1}
        assert "Grüezi" in wire.read_text(encoding="utf-8")

    def test_what_a_store_knows_of_its_own_version_stays_there(self, first, second, wire):
        """A copy says about itself what it is, not what the original was."""
        fill(first, [a_document("d")])

        async def claim() -> None:
            store = SQLiteDocuments(first, CLOCK)
            await claim_version(store, CLOCK, app="1", migrations=NAMED)
            await store.close()

        asyncio.run(claim())
        asyncio.run(export(place(first), wire, CLOCK, migrations=NAMED))

        assert [line.get("container") for line in lines(wire)] == [None, THINGS, None]

    def test_memory_holds_a_page_and_not_the_store(self, first, second, wire, monkeypatch):
        """A store of any size goes through."""
        monkeypatch.setattr("infra.db.place.PAGE", 10)
        monkeypatch.setattr("infra.db.transfer.AT_ONCE", 10)
        fill(first, numbered(150, filler="x" * 20_000))

        tracemalloc.start()
        try:
            asyncio.run(export(place(first), wire, CLOCK))
            asyncio.run(import_(wire, place(second), CLOCK))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert wire.stat().st_size > 3_000_000
        assert peak < 2_000_000


class TestExport:
    @pytest.mark.parametrize("kept", [0, 10, 150, 20_000, 60_000, 1.0])
    def test_stopped_export_goes_on(self, first, wire, kept):
        """Wherever it was cut, even in the middle of a line, the finished file is the same as without a stop."""
        fill(first, numbered(450))
        fill(first, numbered(30), "signals")
        asyncio.run(export(place(first), wire, CLOCK))
        whole = wire.read_bytes()
        part = wire.with_name("all.jsonl.part")
        part.write_bytes(whole[: int(len(whole) * kept) if kept == 1.0 else kept])
        wire.unlink()

        asyncio.run(export(place(first), wire, CLOCK))

        assert wire.read_bytes() == whole
        assert not part.exists()

    def test_part_of_another_store_is_not_continued(self, first, second, wire):
        """Two stores never end in one file."""
        fill(first, numbered(3))
        fill(second, numbered(5))
        asyncio.run(export(place(first), wire, CLOCK))
        part = wire.rename(wire.with_name("all.jsonl.part"))
        before = part.read_bytes()

        found = troop("export", wire, "--from-url", f"sqlite:{second}")

        assert found.exit_code == 1
        assert "delete it first" in found.stderr
        assert part.read_bytes() == before

    def test_existing_file_is_never_written_over(self, first, wire):
        """An older export is somebody's backup."""
        fill(first, numbered(3))
        wire.write_text("mine")

        found = troop("export", wire, "--from-url", f"sqlite:{first}")

        assert found.exit_code == 1
        assert "exists already" in found.stderr
        assert wire.read_text() == "mine"

    def test_missing_store_is_named(self, first, wire):
        """An export of nothing would look like an empty store."""
        found = troop("export", wire, "--from-url", f"sqlite:{first}")

        assert found.exit_code == 1
        assert "does not exist" in found.stderr
        assert not first.exists()
        assert not wire.exists()

    def test_expired_documents_are_left_behind(self, first, wire):
        """What is gone for every reader is gone for a copy."""
        fill(first, [a_document("gone", expires_at=WALL), a_document("here", at=WALL + timedelta(seconds=1))])

        asyncio.run(export(place(first), wire, CLOCK))

        assert [line["id"] for line in lines(wire)[1:-1]] == ["here"]


class TestImport:
    @pytest.fixture
    def exported(self, first, wire) -> Path:
        fill(first, numbered(100))
        asyncio.run(export(place(first), wire, CLOCK))
        return wire

    def test_second_import_changes_nothing(self, exported, second):
        """Not even an etag: what is stored already is left alone."""
        asyncio.run(import_(exported, place(second), CLOCK))
        before = second.read_bytes()

        found = troop("import", exported, "--to-url", f"sqlite:{second}")

        assert found.exit_code == 0
        assert "0 created, 0 replaced, 100 there already" in found.stdout
        assert second.read_bytes() == before

    def test_stored_document_that_differs_stays_and_is_told(self, exported, second):
        """An import never takes back what happened since; the line and the document are named."""
        fill(second, [a_document("d0007", at=WALL, body={"n": "newer"})])

        found = troop("import", exported, "--to-url", f"sqlite:{second}")

        assert found.exit_code == 1
        assert "line 9: things/p/d0007 is stored with other content, which stays" in found.stdout
        assert "99 created, 0 replaced, 0 there already, 0 expired, 1 refused" in found.stdout
        assert {d.id: d.body["n"] for d in stored(second)[THINGS]}["d0007"] == "newer"

    def test_overwrite_replaces_what_differs(self, exported, first, second):
        """On demand the file wins."""
        fill(second, [a_document("d0007", at=WALL - timedelta(1), body={"n": "newer"})])

        found = troop("import", exported, "--to-url", f"sqlite:{second}", "--overwrite")

        assert found.exit_code == 0
        assert "99 created, 1 replaced" in found.stdout
        assert stored(second) == stored(first)

    def test_place_that_another_document_has_is_told(self, exported, second):
        """Two documents cannot share a place in a list; the one that is there stays."""
        fill(second, [a_document("other", partition="q", at=WALL + timedelta(seconds=3))])
        changed = exported.read_text().replace('|d0003"', '|other"')
        exported.write_text(changed)

        found = troop("import", exported, "--to-url", f"sqlite:{second}")

        assert found.exit_code == 1
        assert "line 5: things/p/d0003: another document has its place" in found.stdout

    @pytest.mark.parametrize(
        ("broken", "says"),
        [
            (b"{half", "no JSON"),
            (b"\xff\xfe", "no JSON"),
            (b"", "no JSON"),
            (b"[" * 100_000, "no JSON"),
            (b"[]", "no document"),
            (b'{"documents":"many"}', "no document: container: Field required"),
            (b'{"container":"things","body":NaN}', "no JSON: NaN"),
        ],
        ids=range(7),
    )
    def test_broken_line_is_told_with_its_number_and_costs_only_itself(self, exported, second, broken, says):
        """One bad line among thousands: the rest is stored."""
        whole = exported.read_bytes().splitlines()
        exported.write_bytes(b"\n".join([*whole[:50], broken, *whole[51:]]) + b"\n")

        found = troop("import", exported, "--to-url", f"sqlite:{second}")

        assert found.exit_code == 1
        assert f"line 51: {says}" in found.stdout
        assert "99 created" in found.stdout

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"schema": 0}, "schema"),
            ({"schema": "1"}, "schema"),
            ({"sort": "first"}, "sort"),
            ({"due_at": "tomorrow"}, "due_at"),
            ({"due_at": 7}, "due_at"),
            ({"due_at": "2026-11-21T09:00:00"}, "due_at"),
            ({"body": []}, "body"),
            ({"id": ""}, "id"),
            ({"etag": "mine"}, "etag"),
        ],
        ids=str,
    )
    def test_line_that_cannot_be_a_document_names_the_field(self, exported, second, change, says):
        """Whoever made the file by hand learns what to correct."""
        header, line, *_ = lines(exported)
        written = [header, {**line, **change}, {"documents": 1}]
        exported.write_text("".join(json.dumps(one) + "\n" for one in written))

        found = troop("import", exported, "--to-url", f"sqlite:{second}")

        assert found.exit_code == 1
        assert "line 2: no document" in found.stdout
        assert f"{says}:" in found.stdout

    def test_cut_file_is_told_and_what_came_is_stored(self, exported, first, second):
        """A copy that broke off is no success; with the whole file the import goes on from there."""
        whole = exported.read_bytes()
        exported.write_bytes(b"".join(whole.splitlines(keepends=True)[:60]))
        cut = troop("import", exported, "--to-url", f"sqlite:{second}")
        exported.write_bytes(whole)

        again = troop("import", exported, "--to-url", f"sqlite:{second}")

        assert cut.exit_code == 1
        assert "no last line with the count" in cut.stdout
        assert "59 created" in cut.stdout
        assert again.exit_code == 0
        assert "41 created, 0 replaced, 59 there already" in again.stdout
        assert stored(second) == stored(first)

    def test_line_without_an_end_is_read_to_its_end_in_pieces(self, exported, second, monkeypatch):
        """A line longer than any document costs no memory, and the next line is read as itself."""
        monkeypatch.setattr("infra.db.transfer.LONGEST_LINE", 1000)
        whole = exported.read_bytes().splitlines(keepends=True)
        exported.write_bytes(b"".join([*whole[:50], b'"' + b"x" * 10_000 + b'"\n', *whole[50:]]))

        found = troop("import", exported, "--to-url", f"sqlite:{second}")

        assert "line 51: no JSON" in found.stdout
        assert "100 created" in found.stdout

    def test_expired_documents_are_not_brought_back(self, first, second, wire):
        """A file may be older than what it holds was meant to live."""
        fill(first, [a_document("short", expires_at=WALL + timedelta(hours=1))])
        asyncio.run(export(place(first), wire, CLOCK))

        assert asyncio.run(import_(wire, place(second), StoppedClock(WALL + timedelta(days=1))))

        assert stored(second) == {}

    def test_older_documents_are_upgraded_on_their_way_in(self, first, second, wire):
        """An export of last year goes into today's store, and again without a change."""
        fill(first, [a_document("ada")])
        asyncio.run(export(place(first), wire, CLOCK))

        for _ in range(2):
            assert asyncio.run(import_(wire, place(second), CLOCK, migrations=NAMED))

        assert [(d.schema, d.body) for d in stored(second)[THINGS]] == [(2, {"name": "ada"})]

    def test_newer_documents_are_refused(self, first, second, wire):
        """An old app does not store what it cannot read."""
        fill(first, [replace(a_document("ada"), schema=2)])
        asyncio.run(export(place(first), wire, CLOCK, migrations=NAMED))

        with pytest.raises(ConfigurationError, match=r"things/p/ada .*newer version.*update the app"):
            asyncio.run(import_(wire, place(second), CLOCK))

        assert stored(second) == {}

    @pytest.mark.parametrize(
        "content", ["", "{}\n", "[1]\n", "subscriber,email\n", '{"troop":"troop documents","format":2}']
    )
    def test_other_file_is_refused_before_anything_is_stored(self, second, wire, content):
        """The wrong file is a slip of the hand."""
        wire.write_text(content)

        found = troop("import", wire, "--to-url", f"sqlite:{second}")

        assert found.exit_code == 1
        assert "export" in found.stderr

    def test_missing_file_is_named(self, second, wire):
        """So is the wrong name."""
        found = troop("import", wire, "--to-url", f"sqlite:{second}")

        assert found.exit_code == 1
        assert str(wire) in found.stderr

    @pytest.mark.parametrize("arguments", [[], ["a.jsonl", "--subscribers", "b.csv"]])
    def test_one_file_is_asked_for(self, arguments):
        """Neither nothing nor two things at once."""
        found = troop("import", *arguments)

        assert found.exit_code == 2
        assert "name one file" in found.stderr
