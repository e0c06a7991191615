"""Reads rows of a file that may be damaged: a text comes as the bytes that lie there, and is believed when proven."""

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infra.db.backup import open_readonly
from shared.clock import parse_instant, sortable
from shared.documents import Document

type Row = Sequence[Any]
type Key = tuple[str, str, str]
"""Container, partition, id."""

COLUMNS = ("container", "partition", "id", "sort", "due_at", "expires_at", "schema", "etag", "body")
_ROWS = "SELECT container, partition, id, sort, due_at, expires_at, schema, etag, body FROM documents NOT INDEXED "
_IN_ORDER = {
    "ASC": "ORDER BY container, partition, id",
    "DESC": "ORDER BY container DESC, partition DESC, id DESC",
}
SORT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\|")


def open_raw(file: Path) -> sqlite3.Connection:
    """A connection for reading only, that gives every text as bytes."""
    db = open_readonly(file)
    db.text_factory = bytes
    return db


def rows(db: sqlite3.Connection) -> Iterator[Row]:
    """Every row, in the order of the table itself, without asking an index."""
    return db.execute(_ROWS + _IN_ORDER["ASC"])


def rows_between(db: sqlite3.Connection, low: Key, high: Key, order: str) -> Iterator[Row]:
    """The rows from key *low* on and before key *high*, in the order of the table itself, either way."""
    where = "WHERE (container, partition, id) >= (?,?,?) AND (container, partition, id) < (?,?,?) "
    return db.execute(_ROWS + where + _IN_ORDER[order], (*low, *high))


def row(db: sqlite3.Connection, key: Row) -> Row | None:
    """One row, without asking an index; None if there is none or it cannot be read."""
    try:
        found: Row | None = db.execute(_ROWS + "WHERE container=? AND partition=? AND id=?", shown(key)).fetchone()
    except sqlite3.DatabaseError:
        return None
    return found


def shown(values: Row) -> list[Any]:
    """The values with texts as texts, whatever lay there."""
    return [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]


def key_of(row: Row) -> Key:
    """What a row is known by."""
    container, partition, id_ = map(str, shown(row[:3]))
    return container, partition, id_


def name_of(row: Row) -> str:
    """How a row is called."""
    return "/".join(key_of(row))


def document_of(row: Sequence[Any]) -> Document | str:
    """The document of a row, or what is wrong with it."""
    values = dict(zip(COLUMNS, row, strict=True))
    schema = values.pop("schema")
    if not isinstance(schema, int) or schema < 1:
        return "its schema is no number from 1 on"
    try:
        text = {name: v.decode() if isinstance(v, bytes) else v for name, v in values.items()}
    except UnicodeDecodeError:
        return "it holds bytes that are no text"
    optional = {name: text.pop(name) for name in ("due_at", "expires_at")}
    if not all(isinstance(v, str) for v in text.values()) or not text["container"]:
        return "a column that must be text is none"
    if not SORT.match(text["sort"]):
        return "its place in the order (sort) does not begin with an instant"
    try:
        instants = {name: parse_instant(v) if v is not None else None for name, v in optional.items()}
    except (ValueError, AttributeError):
        return "due_at or expires_at is no instant"
    if any(v and sortable(v) != optional[name] for name, v in instants.items()):
        return "due_at or expires_at is written so that it cannot be compared"
    try:
        body = json.loads(text["body"], parse_constant=_refuse)
    except (ValueError, RecursionError):
        return "its body is no JSON"
    if not isinstance(body, dict):
        return "its body is no JSON object"
    return Document(
        id=text["id"],
        partition=text["partition"],
        sort=text["sort"],
        body=body,
        due_at=instants["due_at"],
        expires_at=instants["expires_at"],
        schema=schema,
        etag=text["etag"],
    )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
