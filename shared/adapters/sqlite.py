"""
Documents in one SQLite file, shared by every process that opens it.

Statements run on the event loop: they take microseconds, a hop to a thread costs ten times more. WAL with
synchronous=NORMAL survives kill -9 at any moment; the last commits may be lost when the power fails.
Nobody waits inside SQLite (busy_timeout 0): a locked file is tried again with jitter, off the loop.
"""

import asyncio
import json
import random
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from shared.clock import Clock, parse_instant, sortable
from shared.documents import BATCH_LIMIT, Document, Operation
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    StaleError,
    UnavailableError,
)

SCHEMA = 2
"""The newest layout of the file; every older one works too, until `troop db migrate` brings it up to date."""
BUSY_TRIES = 60
SWEEP_LIMIT, SWEEP_CHUNK = 10_000, 500

LAYOUT = {
    1: """
CREATE TABLE IF NOT EXISTS documents (
  container TEXT NOT NULL, partition TEXT NOT NULL, id TEXT NOT NULL,
  sort TEXT NOT NULL, due_at TEXT, expires_at TEXT, schema INTEGER NOT NULL, etag TEXT NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (container, partition, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS documents_by_partition ON documents (container, partition, sort);
CREATE UNIQUE INDEX IF NOT EXISTS documents_by_sort ON documents (container, sort);
CREATE INDEX IF NOT EXISTS documents_by_due_at ON documents (container, due_at) WHERE due_at IS NOT NULL
""",
    2: """
CREATE INDEX IF NOT EXISTS documents_by_expires_at ON documents (expires_at) WHERE expires_at IS NOT NULL
""",
}
"""Layout → the statements that make it from the one before."""
_COLUMNS = "id, partition, sort, due_at, expires_at, schema, etag, body"
_CONTAINERS = "SELECT DISTINCT container FROM documents ORDER BY container"
_ALIVE = "(expires_at IS NULL OR expires_at > ?)"

type _Row = tuple[str, str, str, str | None, str | None, int, str, str]


class SQLiteDocuments:
    """
    Documents over a file; ``:memory:`` keeps them for as long as the object lives.

    Raises ConfigurationError when the file is damaged or was written by a newer version.
    """

    def __init__(self, path: str | Path, wall: Clock) -> None:
        self._path = str(path)
        self._wall = wall
        self._connection: sqlite3.Connection | None = None

    async def read(self, container: str, partition: str, id: str) -> Document:
        now = sortable(self._wall.now())
        rows = await self._rows(
            f"SELECT {_COLUMNS} FROM documents WHERE container=? AND partition=? AND id=? AND {_ALIVE}",
            (container, partition, id, now),
        )
        if not rows:
            raise NotFoundError(f"no {container}/{partition}/{id}")
        return _document(rows[0])

    async def create(self, container: str, document: Document) -> Document:
        return await self._busy(lambda db: self._create(db, container, document))

    async def replace(self, container: str, document: Document) -> Document:
        return await self._busy(lambda db: self._replace(db, container, document))

    async def delete(self, container: str, document: Document) -> None:
        await self._busy(lambda db: self._delete(db, container, document))

    async def batch(self, container: str, operations: Sequence[Operation]) -> list[Document]:
        partitions = {operation.document.partition for operation in operations}
        if not operations or len(operations) > BATCH_LIMIT or len(partitions) != 1:
            raise InvalidPayloadError(
                f"a batch takes 1 to {BATCH_LIMIT} operations in one partition, "
                f"not {len(operations)} in {len(partitions)}"
            )
        steps = {"create": self._create, "replace": self._replace, "delete": self._delete}

        def run(db: sqlite3.Connection) -> list[Document]:
            db.execute("BEGIN IMMEDIATE")
            try:
                done = [steps[o.kind](db, container, o.document) for o in operations]
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return done

        return await self._busy(run)

    async def page(
        self,
        container: str,
        partition: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        return await self._list(
            "container=? AND partition=?",
            (container, partition),
            after,
            newest_first=newest_first,
            limit=limit,
        )

    async def feed(
        self,
        container: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        return await self._list("container=?", (container,), after, newest_first=newest_first, limit=limit)

    async def due(self, container: str, *, before: datetime, limit: int = 100) -> list[Document]:
        rows = await self._rows(
            f"SELECT {_COLUMNS} FROM documents WHERE container=? AND due_at IS NOT NULL AND due_at<=? "
            f"AND {_ALIVE} ORDER BY due_at LIMIT ?",
            (container, sortable(before), sortable(self._wall.now()), limit),
        )
        return [_document(row) for row in rows]

    async def containers(self) -> list[str]:
        """The containers that hold anything."""
        return [name for (name,) in await self._busy(lambda db: db.execute(_CONTAINERS).fetchall())]

    async def sweep_expired(self, *, limit: int = SWEEP_LIMIT) -> int:
        """
        Delete up to *limit* documents that have expired; the number of them.

        In a thread, over a connection of its own and in short transactions: neither the loop nor a writer waits.
        """
        now = sortable(self._wall.now())
        if self._path == ":memory:":
            return await self._busy(lambda db: _sweep(db, now, limit))
        try:
            return await asyncio.to_thread(self._sweep_file, now, limit)
        except sqlite3.DatabaseError as e:
            raise self._trouble(e) from e

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _list(
        self, where: str, values: tuple[str, ...], after: str | None, *, newest_first: bool, limit: int
    ) -> list[Document]:
        beyond, order = ("<", "DESC") if newest_first else (">", "ASC")
        if after is not None:
            where, values = f"{where} AND sort{beyond}?", (*values, after)
        rows = await self._rows(
            f"SELECT {_COLUMNS} FROM documents WHERE {where} AND {_ALIVE} ORDER BY sort {order} LIMIT ?",
            (*values, sortable(self._wall.now()), limit),
        )
        return [_document(row) for row in rows]

    async def _rows(self, sql: str, values: tuple[Any, ...]) -> list[_Row]:
        return await self._busy(lambda db: db.execute(sql, values).fetchall())

    def _create(self, db: sqlite3.Connection, container: str, document: Document) -> Document:
        etag = uuid4().hex
        # A document that has expired is gone, even while its row still lies there.
        written = db.execute(
            f"INSERT INTO documents (container, {_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?) "
            "ON CONFLICT (container, partition, id) DO UPDATE SET sort=excluded.sort, due_at=excluded.due_at, "
            "expires_at=excluded.expires_at, schema=excluded.schema, etag=excluded.etag, body=excluded.body "
            "WHERE documents.expires_at <= ?",
            (container, *_values(document, etag), sortable(self._wall.now())),
        )
        if written.rowcount == 0:
            raise ConflictError(f"{container}/{document.partition}/{document.id} exists already")
        return _stored(document, etag)

    def _replace(self, db: sqlite3.Connection, container: str, document: Document) -> Document:
        etag = uuid4().hex
        id_, partition, sort, due_at, expires_at, schema, _, body = _values(document, etag)
        written = db.execute(
            "UPDATE documents SET sort=?, due_at=?, expires_at=?, schema=?, etag=?, body=? "
            f"WHERE container=? AND partition=? AND id=? AND etag=? AND {_ALIVE}",
            (
                *(sort, due_at, expires_at, schema, etag, body),
                *(container, partition, id_, document.etag, sortable(self._wall.now())),
            ),
        )
        if written.rowcount == 0:
            raise self._lost(db, container, document)
        return _stored(document, etag)

    def _delete(self, db: sqlite3.Connection, container: str, document: Document) -> Document:
        written = db.execute(
            f"DELETE FROM documents WHERE container=? AND partition=? AND id=? AND etag=? AND {_ALIVE}",
            (container, document.partition, document.id, document.etag, sortable(self._wall.now())),
        )
        if written.rowcount == 0:
            raise self._lost(db, container, document)
        return document

    def _lost(self, db: sqlite3.Connection, container: str, document: Document) -> Exception:
        name = f"{container}/{document.partition}/{document.id}"
        found = db.execute(
            f"SELECT 1 FROM documents WHERE container=? AND partition=? AND id=? AND {_ALIVE}",
            (container, document.partition, document.id, sortable(self._wall.now())),
        ).fetchone()
        return StaleError(f"{name} was written by somebody else") if found else NotFoundError(f"no {name}")

    async def _busy[T](self, work: Callable[[sqlite3.Connection], T]) -> T:
        for attempt in range(BUSY_TRIES):
            try:
                return work(self._open())
            except sqlite3.IntegrityError as e:
                raise ConflictError(f"{self._path}: {e}") from e
            except sqlite3.OperationalError as e:
                if not _is_busy(e):
                    raise self._trouble(e) from e
            except sqlite3.DatabaseError as e:
                raise self._trouble(e) from e
            await asyncio.sleep(random.uniform(0.0005, 0.004) * min(attempt + 1, 20))  # noqa: S311 - jitter
        raise UnavailableError(f"{self._path} stayed locked by another process")

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self._connection = self._connect()
            except sqlite3.DatabaseError as e:
                if isinstance(e, sqlite3.OperationalError) and _is_busy(e):
                    raise
                raise self._trouble(e) from e
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        self._make_folder()
        db = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            if 0 < db.execute("PRAGMA user_version").fetchone()[0] <= SCHEMA:
                db.execute("PRAGMA synchronous=NORMAL")
                return db
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("BEGIN IMMEDIATE")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise ConfigurationError(
                    f"{self._path} was written by a newer version (schema {version}, this one knows {SCHEMA}): "
                    "update the app, or give it another file"
                )
            if version == 0:  # otherwise another process made it between the two looks
                lay_out(db, since=0)
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    def _sweep_file(self, now: str, limit: int) -> int:
        with closing(self._connect()) as db:
            db.execute("PRAGMA busy_timeout=2000")  # a thread may wait
            return _sweep(db, now, limit)

    def _make_folder(self) -> None:
        if self._path == ":memory:":
            return
        try:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigurationError(f"the folder of {self._path} cannot be made ({e.strerror}): give another") from e

    def _trouble(self, e: sqlite3.DatabaseError) -> Exception:
        text = str(e)
        if "not a database" in text or "malformed" in text or "corrupt" in text:
            return ConfigurationError(
                f"{self._path} is damaged ({text}): move it away and start again, or put a backup in its place; "
                "`troop db check` says what can be saved, `troop db restore` takes a backup"
            )
        if "unable to open" in text or "readonly" in text:
            return ConfigurationError(f"{self._path} cannot be written: check who may write the file and its folder")
        return UnavailableError(f"{self._path}: {text}")


def lay_out(db: sqlite3.Connection, *, since: int) -> None:
    """Bring a file of layout *since* to the newest, inside the caller's transaction."""
    for layout in range(since + 1, SCHEMA + 1):
        for statement in LAYOUT[layout].split(";"):
            db.execute(statement)
    db.execute(f"PRAGMA user_version={SCHEMA}")


def _sweep(db: sqlite3.Connection, now: str, limit: int) -> int:
    swept = 0
    while swept < limit:
        gone = db.execute(
            "DELETE FROM documents WHERE (container, partition, id) IN "
            "(SELECT container, partition, id FROM documents WHERE expires_at <= ? LIMIT ?)",
            (now, min(SWEEP_CHUNK, limit - swept)),
        ).rowcount
        swept += gone
        if gone < SWEEP_CHUNK:
            break
    return swept


def _is_busy(e: sqlite3.OperationalError) -> bool:
    return e.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _values(document: Document, etag: str) -> tuple[str, str, str, str | None, str | None, int, str, str]:
    try:
        body = json.dumps(document.body, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        f"{document.id}{document.partition}{document.sort}{body}".encode()  # half a surrogate pair is no text
    except (TypeError, ValueError) as e:
        raise InvalidPayloadError(f"{document.partition}/{document.id}: the body is no JSON: {e}") from e
    due_at = sortable(document.due_at) if document.due_at else None
    expires_at = sortable(document.expires_at) if document.expires_at else None
    return (document.id, document.partition, document.sort, due_at, expires_at, document.schema, etag, body)


def _stored(document: Document, etag: str) -> Document:
    return Document(
        id=document.id,
        partition=document.partition,
        sort=document.sort,
        body=document.body,
        due_at=document.due_at,
        expires_at=document.expires_at,
        schema=document.schema,
        etag=etag,
    )


def _document(row: _Row) -> Document:
    id_, partition, sort, due_at, expires_at, schema, etag, body = row
    return Document(
        id=id_,
        partition=partition,
        sort=sort,
        body=json.loads(body),
        due_at=parse_instant(due_at) if due_at else None,
        expires_at=parse_instant(expires_at) if expires_at else None,
        schema=schema,
        etag=etag,
    )
