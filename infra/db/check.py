"""
Says whether a store is whole; of a damaged one, what is lost and the ways back.

Nothing here changes the store: an SQLite file is opened for reading only, and what is saved goes to a new file.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from infra.db.backup import FOLDER, backups_of, open_readonly
from infra.db.place import Place, Progress, Say, containers_of, pages, steadily
from infra.db.rows import document_of, name_of, open_raw, rows, shown
from infra.db.salvage import Saved, salvage, try_salvage
from shared.adapters.sqlite import LAYOUT, SCHEMA
from shared.clock import Clock, format_instant
from shared.documents import Document
from shared.errors import ConfigurationError, InvalidPayloadError
from shared.migrations import MIGRATIONS, Migrations, read_marker

SHOWN = 20


@dataclass(slots=True)
class Count:
    """What lies in one container."""

    documents: int = 0
    expired: int = 0
    outdated: int = 0
    oldest_due: datetime | None = None


@dataclass(slots=True)
class Findings:
    """What a look at a store found; without problems it is whole."""

    counts: dict[str, Count] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unnamed: int = 0

    def trouble(self, text: str) -> None:
        """Note a problem; beyond the first few they are only counted."""
        if len(self.problems) < SHOWN:
            self.problems.append(text)
        else:
            self.unnamed += 1

    def add(self, container: str, document: Document, now: datetime, migrations: Migrations) -> None:
        count = self.counts.setdefault(container, Count())
        count.documents += 1
        count.expired += document.expires_at is not None and document.expires_at <= now
        count.outdated += not migrations.is_current(container, document)
        due = document.due_at
        if due and (count.oldest_due is None or due < count.oldest_due):
            count.oldest_due = due
        try:
            migrations.upgraded(container, document)
        except (ConfigurationError, InvalidPayloadError) as e:
            self.trouble(str(e))


async def check(
    place: Place, wall: Clock, *, salvage_to: Path | None = None, migrations: Migrations = MIGRATIONS
) -> bool:
    """
    Print what a look at the store finds, and with *salvage_to* save what can be read; whether the store is whole.

    Raises:
        ConfigurationError: there is no such store, it is newer than this app, or it cannot be written where asked.

    """
    file = place.existing_file()
    progress = Progress()
    if file is None:
        if salvage_to:
            raise ConfigurationError("--salvage is for SQLite files: `troop db export` copies any other storage")
        findings = await _check_store(place, wall, migrations, progress)
        progress.done()
        _tell(findings, place.name)
        return not findings.problems
    findings = check_file(file, wall.now(), migrations, progress)
    progress.done()
    _tell(findings, place.name, counts=not findings.problems)
    if salvage_to:
        print(f"saving what can be read into {salvage_to} …")
        saved = salvage(file, salvage_to, progress)
        progress.done()
        _tell_saved(saved, f"saved into {salvage_to}: ")
        print(f"To use it: troop db restore {salvage_to}")
    elif findings.problems:
        _tell_saved(try_salvage(file, progress), "readable: ")
        progress.done()
        _tell_ways_back(file)
    return not findings.problems


def check_file(file: Path, now: datetime, migrations: Migrations, say: Say) -> Findings:
    """
    Look at every page, index and row of a file.

    Raises:
        ConfigurationError: it was written by a newer version of the app.

    """
    findings = Findings()
    with closing(open_readonly(file)) as db:
        try:
            layout = int(db.execute("PRAGMA user_version").fetchone()[0])
            if layout > SCHEMA:
                raise ConfigurationError(
                    f"{file} was written by a newer version (schema {layout}, this one knows {SCHEMA}): update the app"
                )
            for (text,) in db.execute("PRAGMA integrity_check(20)"):
                if text != "ok":
                    findings.trouble(str(text))
            for text in _differences(db, layout):
                findings.trouble(text)
        except sqlite3.DatabaseError as e:
            findings.trouble(str(e))
    with closing(open_raw(file)) as db:
        try:
            for number, row in enumerate(rows(db), 1):
                document = document_of(row)
                if isinstance(document, str):
                    findings.trouble(f"{name_of(row)}: {document}")
                else:
                    findings.add(shown(row)[0], document, now, migrations)
                say(f"{number:,} documents checked")
        except sqlite3.DatabaseError as e:
            findings.trouble(f"rows cannot be read to the end: {e}")
    return findings


def _differences(db: sqlite3.Connection, layout: int) -> Iterator[str]:
    """How the tables and indexes differ from what this layout has."""
    with closing(sqlite3.connect(":memory:")) as ours:
        for n in range(1, layout + 1):
            ours.executescript(LAYOUT[n])
        expected, found = _shape(ours), _shape(db)
    for name, columns in expected.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != columns:
            yield f"{name} has other columns than it should: {found[name]}"


def _shape(db: sqlite3.Connection) -> dict[str, Any]:
    shape: dict[str, Any] = {}
    columns = db.execute("SELECT name, type, pk FROM pragma_table_info('documents')").fetchall()
    if columns:
        shape["table documents"] = columns
    indexes = "SELECT name, \"unique\", partial FROM pragma_index_list('documents') WHERE origin='c'"
    for name, *kind in db.execute(indexes).fetchall():
        indexed = db.execute("SELECT name FROM pragma_index_xinfo(?) WHERE key", (name,)).fetchall()
        shape[f"index {name}"] = (kind, [column for (column,) in indexed])
    return shape


async def _check_store(place: Place, wall: Clock, migrations: Migrations, say: Say) -> Findings:
    findings = Findings()
    store = place.open(wall)
    try:
        await steadily(partial(read_marker, store, migrations))
        for container in await containers_of(store):
            findings.counts[container] = Count()
            async for page in pages(store, container):
                for document in page:
                    findings.add(container, document, wall.now(), migrations)
                say(f"{container}: {findings.counts[container].documents:,} documents checked")
    finally:
        await store.close()
    return findings


def _tell(findings: Findings, name: str, *, counts: bool = True) -> None:
    print(f"{name}: {'damaged' if findings.problems else 'whole'}")
    shown_counts = sorted(findings.counts.items()) if counts else []
    if shown_counts:
        print(f"  {'container':<14}{'documents':>12}{'expired':>10}{'outdated':>10}  oldest due")
    for container, count in shown_counts:
        due = format_instant(count.oldest_due) if count.oldest_due else "-"
        print(f"  {container:<14}{count.documents:>12,}{count.expired:>10,}{count.outdated:>10,}  {due}")
    for problem in findings.problems:
        print(f"  ! {problem}")
    if findings.unnamed:
        print(f"  ! and {findings.unnamed:,} more")


def _tell_saved(saved: Saved, lead: str) -> None:
    print(f"{lead}{saved.documents.total():,} documents; known to be lost: {saved.lost.total():,}")
    for container in sorted(saved.documents.keys() | saved.lost.keys()):
        print(f"  {container:<14}{saved.documents[container]:>12,}{saved.lost[container]:>10,} lost")
    for name in saved.names:
        print(f"  ! lost: {name}")
    if saved.lost.total() > len(saved.names):
        print(f"  ! and {saved.lost.total() - len(saved.names):,} more")


def _tell_ways_back(file: Path) -> None:
    print("The way back; nothing is deleted by it:")
    newest = backups_of(file)[:1]
    if newest:
        print(f"  the newest backup:     troop db restore {newest[0]}")
    else:
        print(f"  there is no backup in {file.parent / FOLDER}")
    print("  what can be read:      troop db check --salvage NEW.db, then troop db restore NEW.db")
