"""
Brings a store up to date: its containers or its layout first, then every document that is older than the app.

Safe beside a running app and after any crash: a document is upgraded by a conditional write and carries its own
version, so nothing is upgraded twice; how far each container is, is kept in the store. An SQLite file is backed up
before the first change.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from infra.db.backup import FOLDER, back_up, layout_of
from infra.db.place import Place, Progress, Provisioned, pages, steadily
from shared.adapters.sqlite import SCHEMA, lay_out
from shared.clock import Clock
from shared.documents import Document, Documents, sort_key
from shared.errors import ConfigurationError, ConflictError, InvalidPayloadError, NotFoundError, StaleError
from shared.migrations import MIGRATIONS, PARTITION, SYSTEM, Migrations, claim_version, read_marker, read_note
from shared.wiring import VERSION

SHOWN = 20
BACKUP = "backup"


@dataclass(slots=True)
class Outcome:
    """What became of the documents of one container."""

    looked_at: int = 0
    upgraded: int = 0
    refused: list[str] = field(default_factory=list)


async def migrate(
    place: Place,
    wall: Clock,
    *,
    dry_run: bool = False,
    migrations: Migrations = MIGRATIONS,
    on_page: Callable[[str], Any] | None = None,
) -> bool:
    """
    Print and do what is needed, with *dry_run* only print it; whether nothing is left to do by a person.

    *on_page* is told after every page that was upgraded, with the container's name.

    Raises:
        ConfigurationError: the store is newer than this app, damaged, or cannot be written.

    """
    migration = _Migration(place, wall, dry_run=dry_run, migrations=migrations, on_page=on_page)
    try:
        return await migration.run()
    finally:
        await migration.close()


class _Migration:
    def __init__(
        self,
        place: Place,
        wall: Clock,
        *,
        dry_run: bool,
        migrations: Migrations,
        on_page: Callable[[str], Any] | None,
    ) -> None:
        self._place = place
        self._wall = wall
        self._dry_run = dry_run
        self._migrations = migrations
        self._on_page = on_page
        self._progress = Progress()
        self._store: Documents = place.open(wall)

    async def run(self) -> bool:
        file = self._place.file
        if file and not file.exists() and self._dry_run:
            print(f"{file} would be made")
            return True
        layout = layout_of(file) if file and file.exists() else 0
        if isinstance(self._store, Provisioned):
            lines = await steadily(partial(self._store.provision, dry_run=self._dry_run))
            for line in lines:
                print(line)
            if lines and self._dry_run:
                return True  # what lies in containers that are still to be made, nobody can say
        marker = await self._marker()
        is_behind = marker is None or marker.body["upgraded"] < self._migrations.store_version
        owes_documents = bool(self._migrations.containers) and is_behind
        is_old = file is not None and 0 < layout < SCHEMA
        if is_old:
            print(f"layout {layout} {'would become' if self._dry_run else 'becomes'} {SCHEMA}")
        if file and layout and (is_old or owes_documents) and not self._dry_run:
            await self._back_up(file)
            _lay_out(file)
        refused = await self._upgrade_all() if owes_documents else 0
        if not self._dry_run:
            await self._finish(is_upgraded=not refused)
        if refused:
            print(f"{refused:,} documents stay as they are: the app cannot read them; see above")
        elif self._dry_run and (owes_documents or is_old):
            print("this was a dry run: nothing was changed")
        else:
            print(f"{self._place.name} is up to date (store version {self._migrations.store_version})")
        return not refused

    async def close(self) -> None:
        self._progress.done()
        await self._store.close()

    async def _marker(self) -> Document | None:
        return await steadily(partial(read_marker, self._store, self._migrations))

    async def _back_up(self, file: Path) -> None:
        """Copy the file, once a migration: a run that continues another one keeps that one's copy."""
        target = self._target()
        kept = await self._note(BACKUP)
        if kept and kept.body["to"] == target and (file.parent / FOLDER / kept.body["name"]).exists():
            print(f"continuing; the backup is {file.parent / FOLDER / kept.body['name']}")
            return
        backup = back_up(file, self._wall.now(), self._progress)
        self._progress.done()
        print(f"backup: {backup}")
        await self._keep_note(BACKUP, {"to": target, "name": backup.name})

    async def _upgrade_all(self) -> int:
        if not self._dry_run:
            await self._claim(is_upgraded=False)  # from here on an older app refuses the store
        refused = 0
        for container in self._migrations.containers:
            outcome = await self._upgrade(container)
            self._progress.done()
            verb = "to upgrade" if self._dry_run else "upgraded"
            print(f"{container}: {outcome.looked_at:,} documents looked at, {outcome.upgraded:,} {verb}")
            for text in outcome.refused[:SHOWN]:
                print(f"  ! {text}")
            if len(outcome.refused) > SHOWN:
                print(f"  ! and {len(outcome.refused) - SHOWN:,} more")
            refused += len(outcome.refused)
        return refused

    async def _upgrade(self, container: str) -> Outcome:
        """Upgrade what is left of one container, from where the last run came to."""
        outcome = Outcome()
        note = f"cursor|{container}"
        target = self._migrations.version(container)
        cursor = await self._note(note)
        after = cursor.body["after"] if cursor and cursor.body["to"] == target else None
        async for page in pages(self._store, container, after=after):
            for document in page:
                outcome.looked_at += 1
                try:
                    outcome.upgraded += await self._upgrade_one(container, document)
                except InvalidPayloadError as e:
                    outcome.refused.append(str(e))
            self._progress(f"{container}: {outcome.looked_at:,} documents looked at, {outcome.upgraded:,} upgraded")
            if not self._dry_run and not outcome.refused:  # what was refused is looked at again next time
                await self._keep_note(note, {"to": target, "after": page[-1].sort})
            if self._on_page:
                self._on_page(container)
        return outcome

    async def _upgrade_one(self, container: str, document: Document) -> bool:
        while not self._migrations.is_current(container, document):
            upgraded = self._migrations.upgraded(container, document)
            if self._dry_run:
                return True
            try:
                await steadily(partial(self._store.replace, container, upgraded))
            except StaleError:  # the app wrote meanwhile, or our own write did happen
                try:
                    document = await steadily(partial(self._store.read, container, document.partition, document.id))
                except NotFoundError:
                    return False
                continue
            except NotFoundError:
                return False
            return True
        return False

    async def _finish(self, *, is_upgraded: bool) -> None:
        await self._claim(is_upgraded=is_upgraded)
        if not is_upgraded:
            return
        for name in (BACKUP, *(f"cursor|{container}" for container in self._migrations.containers)):
            note = await self._note(name)
            if note:
                with suppress(StaleError, NotFoundError):
                    await steadily(partial(self._store.delete, SYSTEM, note))

    async def _claim(self, *, is_upgraded: bool) -> None:
        claim = partial(claim_version, app=VERSION, migrations=self._migrations, is_upgraded=is_upgraded)
        await steadily(partial(claim, self._store, self._wall))

    async def _note(self, name: str) -> Document | None:
        return await steadily(partial(read_note, self._store, name))

    async def _keep_note(self, name: str, body: dict[str, Any]) -> None:
        """Remember how far we are; when another run writes at the same moment, its note is as good."""
        note = await self._note(name)
        with suppress(ConflictError, StaleError, NotFoundError):
            if note:
                await steadily(partial(self._store.replace, SYSTEM, note.with_body(body)))
            else:
                sort = sort_key(self._wall.now(), f"{PARTITION}|{name}")
                new = Document(id=name, partition=PARTITION, sort=sort, body=body)
                await steadily(partial(self._store.create, SYSTEM, new))

    def _target(self) -> str:
        return f"{SCHEMA}.{self._migrations.store_version}"


def _lay_out(file: Path) -> None:
    """Bring a file to the newest layout; it stays usable for those who have it open."""
    try:
        with closing(sqlite3.connect(file, isolation_level=None, timeout=30)) as db:
            db.execute("BEGIN IMMEDIATE")
            lay_out(db, since=int(db.execute("PRAGMA user_version").fetchone()[0]))
            db.execute("COMMIT")
    except sqlite3.DatabaseError as e:
        raise ConfigurationError(f"{file} cannot be changed ({e}): stop the app, and try again") from e
