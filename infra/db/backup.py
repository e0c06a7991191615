"""
Copies of an SQLite store, and the way back to one.

A backup is one file, `backups/app-INSTANT.db` beside the store, made by SQLite's online backup from one snapshot
while the app goes on. Restoring never deletes what is in place: it is moved to `backups/replaced-INSTANT/`.
"""

import fcntl
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from infra.db.place import Place, Progress, Say
from shared.adapters.sqlite import SCHEMA
from shared.clock import Clock
from shared.errors import ConfigurationError

FOLDER = "backups"
KEPT = 5
PAGES = 2_000
SIDE_FILES = ("-wal", "-shm")


def open_readonly(file: Path) -> sqlite3.Connection:
    """A connection that can change nothing, and waits for others."""
    return sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=30)


def layout_of(file: Path) -> int:
    """
    The layout of a file; 0 for an empty one.

    Raises:
        ConfigurationError: it is no database, or of a newer version.

    """
    try:
        with closing(open_readonly(file)) as db:
            layout = int(db.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.DatabaseError as e:
        raise ConfigurationError(f"{file} cannot be read ({e}): `troop db check` says what to do") from e
    if layout > SCHEMA:
        raise ConfigurationError(
            f"{file} was written by a newer version (schema {layout}, this one knows {SCHEMA}): update the app"
        )
    return layout


def backups_of(file: Path) -> list[Path]:
    """The backups of a store, the newest first."""
    form = re.compile(rf"{re.escape(file.stem)}-\d{{8}}T\d{{12}}Z\.db")
    return sorted((f for f in file.parent.glob(f"{FOLDER}/*.db") if form.fullmatch(f.name)), reverse=True)


def back_up(file: Path, now: datetime, say: Say) -> Path:
    """
    Copy a store as it is at this moment; the newest five copies are kept.

    Raises:
        ConfigurationError: the store cannot be read, or the disk has no room for it.

    """
    target = file.parent / FOLDER / f"{file.stem}-{_stamp(now)}.db"
    _copy(file, target, say)
    for old in backups_of(file)[KEPT:]:
        old.unlink()
    return target


def restore(backup: Path, file: Path, now: datetime, say: Say) -> Path | None:
    """
    Put a copy of *backup* in the store's place; says where what was there lies now.

    Raises:
        ConfigurationError: the backup cannot be used, or the app is running.

    """
    if not backup.is_file():
        raise ConfigurationError(f"{backup} does not exist: {_choice(file)}")
    if file.exists() and backup.samefile(file):
        raise ConfigurationError(f"{backup} is the store itself: {_choice(file)}")
    layout_of(backup)
    with _nobody_else(file):
        new = file.with_name(f"{file.name}.restoring")
        new.unlink(missing_ok=True)
        _copy(backup, new, say)
        with closing(sqlite3.connect(new)) as db:
            health = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            db.execute("PRAGMA journal_mode=WAL")
        if health != "ok":
            new.unlink()
            raise ConfigurationError(f"{backup} is damaged itself ({health}): {_choice(file)}")
        replaced = _set_aside(file, now)
        new.replace(file)
        _sync(file.parent)
    return replaced


async def restore_place(backup: Path, place: Place, wall: Clock) -> bool:
    """
    Restore the store of a place, and print where things are; True, or an error.

    Raises:
        ConfigurationError: as `restore`; or the storage keeps its own backups.

    """
    if place.file is None:
        raise ConfigurationError("only an SQLite file is restored here: Azure keeps the backups of Cosmos DB")
    progress = Progress()
    replaced = restore(backup, place.file, wall.now(), progress)
    progress.done()
    print(f"{place.file} is now a copy of {backup}" + (f"; what was there lies in {replaced}" if replaced else ""))
    return True


def _copy(source: Path, target: Path, say: Say) -> None:
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        _need_room(source, target.parent)
        with closing(open_readonly(source)) as db, closing(sqlite3.connect(part)) as copy:
            db.execute("BEGIN")  # one snapshot: otherwise a busy writer would start the copy over and over
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            db.backup(
                copy, pages=PAGES, progress=lambda _, left, total: say(f"copied {total - left:,} of {total:,} pages")
            )
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without others beside it
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(target)
        _sync(target.parent)
    except sqlite3.DatabaseError as e:
        part.unlink(missing_ok=True)
        raise ConfigurationError(f"{source} cannot be copied ({e}): `troop db check` says what to do") from e
    except OSError as e:
        part.unlink(missing_ok=True)
        raise ConfigurationError(f"{target} cannot be written: {e.strerror}") from e


def _need_room(source: Path, folder: Path) -> None:
    needed = sum(f.stat().st_size for f in (source, *_side_files(source)) if f.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigurationError(f"{folder} has room for {free:,} bytes, the copy needs {needed:,}: make room first")


def _set_aside(file: Path, now: datetime) -> Path | None:
    """Move the store away, the database last: without its write-ahead log it would be an older state of itself."""
    there = [f for f in (*_side_files(file), file) if f.exists()]
    if not there:
        return None
    folder = file.parent / FOLDER / f"replaced-{_stamp(now)}"
    folder.mkdir(parents=True)
    for one in there:
        one.replace(folder / one.name)
    return folder


def _side_files(file: Path) -> list[Path]:
    return [file.with_name(f"{file.name}{end}") for end in SIDE_FILES]


@contextmanager
def _nobody_else(file: Path) -> Iterator[None]:
    """
    Hold the lock of `troop up`, and make sure that no other process has the file open.

    Raises:
        ConfigurationError: somebody uses the store.

    """
    in_use = ConfigurationError(f"{file} is in use: stop the app first")
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / "up.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise in_use from e
        if file.exists() and _is_open_elsewhere(file):
            raise in_use
        yield


def _is_open_elsewhere(file: Path) -> bool:
    with closing(sqlite3.connect(file, isolation_level=None, timeout=0)) as db, suppress(sqlite3.DatabaseError):
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as e:
            return e.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
        db.execute("ROLLBACK")
    return False


def _choice(file: Path) -> str:
    newest = backups_of(file)[:1]
    return f"the newest backup is {newest[0]}" if newest else f"there is no backup in {file.parent / FOLDER}"


def _stamp(now: datetime) -> str:
    return f"{now:%Y%m%dT%H%M%S%f}Z"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
