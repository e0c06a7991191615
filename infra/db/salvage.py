"""Saves what can be read of a damaged file into a new one; the damaged file is opened for reading only."""

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from infra.db.place import Say
from infra.db.rows import COLUMNS, Key, Row, document_of, key_of, name_of, open_raw, row, rows_between, shown
from shared.adapters.sqlite import lay_out
from shared.errors import ConfigurationError

NAMED = 20
LOWEST, HIGHEST = ("", "", ""), ("\x7f", "", "")
DIGITS = 64
HALVED_IN_VAIN = 7
"""How often a span around damage is halved again although the last halving found nothing."""
COMMIT_EVERY = 1_000
_INSERT = (
    "INSERT OR IGNORE INTO documents (container, partition, id, sort, due_at, expires_at, schema, etag, body) "
    "VALUES (?,?,?,?,?,?,?,?,?)"
)
_KEYS = (
    ("SELECT container, partition, id FROM documents INDEXED BY documents_by_sort ORDER BY ", ("container", "sort")),
    (
        "SELECT container, partition, id FROM documents INDEXED BY documents_by_partition ORDER BY ",
        ("container", "partition", "sort"),
    ),
)


@dataclass(slots=True)
class Saved:
    """What was read out of a file, and what was not."""

    documents: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)


def salvage(file: Path, target: Path, say: Say) -> Saved:
    """
    Copy every document that can be read into a new file.

    Raises:
        ConfigurationError: the new file is there already, or cannot be written.

    """
    if target.exists():
        raise ConfigurationError(f"{target} exists already: name a file that does not")
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with closing(open_raw(file)) as source, closing(sqlite3.connect(part, isolation_level=None)) as new:
            saved = _Salvage(source, new, say).run()
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(target)
    except (OSError, sqlite3.DatabaseError) as e:
        part.unlink(missing_ok=True)
        raise ConfigurationError(f"{target} cannot be written: {e}") from e
    return saved


def try_salvage(file: Path, say: Say) -> Saved:
    """What a salvage would save; it is kept in a temporary database only."""
    with closing(open_raw(file)) as source, closing(sqlite3.connect("", isolation_level=None)) as scratch:
        return _Salvage(source, scratch, say).run()


class _Salvage:
    """
    Reads what it can of the table itself, then one by one what only its indexes know.

    A row is taken only if it is a document. What cannot be read, or is none, is lost, and named.
    """

    def __init__(self, source: sqlite3.Connection, new: sqlite3.Connection, say: Say) -> None:
        self._source = source
        self._new = new
        self._say = say
        self._steps = 0
        self.saved = Saved()

    def run(self) -> Saved:
        lay_out(self._new, since=0)
        self._new.execute("CREATE TEMP TABLE lost (container, partition, id, PRIMARY KEY (container, partition, id))")
        self._new.execute("BEGIN")
        if self._is_a_store():
            self._save_between(LOWEST, HIGHEST)
        for statement, columns in _KEYS:
            for order in ("ASC", "DESC"):
                for key in _until_damage(partial(self._keys, statement, columns, order)):
                    if key is not None and not self._has(key):
                        self._keep(row(self._source, key) or key)
        self._new.execute("COMMIT")
        return self.saved

    def _is_a_store(self) -> bool:
        try:
            self._source.execute("SELECT 1 FROM documents WHERE 0")
        except sqlite3.DatabaseError:
            return False
        return True

    def _save_between(self, low: Key, high: Key, in_vain: int = 0) -> None:
        """Read a span from both ends until the damage; what is left in the middle is halved, and halved again."""
        is_whole, first = self._read(low, high, "ASC")
        if is_whole:
            return
        _, last = self._read(first, high, "DESC")
        in_vain = in_vain + 1 if (first, last) == (low, high) else 0
        middle = _between(first, last) if in_vain < HALVED_IN_VAIN else None
        if middle:
            self._save_between(first, middle, in_vain)
            self._save_between(middle, last, in_vain)

    def _read(self, low: Key, high: Key, order: str) -> tuple[bool, Key]:
        """Save the rows of a span in one direction; whether all could be read, and the key it came to."""
        came_to = low if order == "ASC" else high
        for found in _until_damage(partial(rows_between, self._source, low, high, order)):
            if found is None:
                return False, came_to
            self._keep(found)
            came_to = key_of(found)
        return True, came_to

    def _keys(self, statement: str, columns: tuple[str, ...], order: str) -> Iterator[Row]:
        return self._source.execute(statement + ", ".join(f"{column} {order}" for column in columns))

    def _keep(self, found: Row) -> None:
        """Take a row; a bare key is a row that nobody can read."""
        self._steps += 1
        if self._steps % COMMIT_EVERY == 0:
            self._new.execute("COMMIT")
            self._new.execute("BEGIN")
        is_document = len(found) == len(COLUMNS) and not isinstance(document_of(found), str)
        if is_document and self._new.execute(_INSERT, shown(found)).rowcount:
            self.saved.documents[str(shown(found)[0])] += 1
        elif not self._has(found):
            self._lose(found)
        self._say(f"{self.saved.documents.total():,} documents read, {self.saved.lost.total():,} lost")

    def _lose(self, found: Row) -> None:
        key = key_of(found)
        if self._new.execute("INSERT OR IGNORE INTO temp.lost VALUES (?,?,?)", key).rowcount:
            self.saved.lost[key[0]] += 1
            if len(self.saved.names) < NAMED:
                self.saved.names.append(name_of(found))

    def _has(self, found: Row) -> bool:
        sql = "SELECT 1 FROM documents WHERE container=? AND partition=? AND id=?"
        return self._new.execute(sql, key_of(found)).fetchone() is not None


def _between(low: Key, high: Key) -> Key | None:
    """A key about half way; None where there is no room for one."""
    for place, (a, b) in enumerate(zip(low, high, strict=True)):
        if a == b:
            continue
        first = _as_number(str(a)) + 1
        half = (first + _as_number(str(b))) // 2
        letters = "".join(chr(half >> shift & 0x7F) for shift in range(7 * (DIGITS - 1), -1, -7)).rstrip("\0")
        middle = key_of([*low[:place], letters, *[""] * (len(low) - place - 1)])
        return middle if low < middle < high else None
    return None


def _as_number(text: str) -> int:
    """The beginning of a text as digits to the base of 128; order is kept, what is not ASCII counts as its last."""
    number = 0
    for letter in text[:DIGITS].ljust(DIGITS, "\0"):
        number = number << 7 | min(ord(letter), 0x7F)
    return number


def _until_damage(read: Callable[[], Iterator[Row]]) -> Iterator[Row | None]:
    """The rows as far as they can be read; None behind them says that more could not be."""
    try:
        yield from read()
    except sqlite3.DatabaseError:
        yield None
