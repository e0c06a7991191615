"""
Copies documents between any two stores through a file of JSON lines.

The first line says what the file is; every other line is one document with its container and everything but its
etag; the last line counts them. Both ways go on where they were stopped, and keep a page in memory, never a store.
While an app writes, an export is no snapshot: documents written meanwhile may be in it or not.
"""

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from infra.db.place import Place, Progress, containers_of, pages, steadily
from infra.db.rows import SORT
from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    PermanentError,
    StaleError,
)
from shared.migrations import MIGRATIONS, Migrated, Migrations, is_bookkeeping, read_marker
from shared.wiring import VERSION

KIND, FORMAT = "troop documents", 1
LONGEST_LINE = 32 * 1024 * 1024
AT_ONCE = 32
SHOWN = 50

type _Instant = Annotated[datetime | None, BeforeValidator(lambda v: parse_instant(v) if isinstance(v, str) else v)]
type _Text = Annotated[str, Field(min_length=1)]


class Line(BaseModel):
    """One document on the wire."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    container: _Text
    id: _Text
    partition: str
    sort: Annotated[str, Field(pattern=SORT.pattern)]
    due_at: _Instant
    expires_at: _Instant
    schema_: Annotated[int, Field(alias="schema", ge=1)]
    body: dict[str, Any]

    def document(self) -> Document:
        return Document(
            id=self.id,
            partition=self.partition,
            sort=self.sort,
            body=self.body,
            due_at=self.due_at,
            expires_at=self.expires_at,
            schema=self.schema_,
        )


@dataclass(slots=True)
class Imported:
    """What became of the lines of a file."""

    created: int = 0
    replaced: int = 0
    unchanged: int = 0
    expired: int = 0
    refused: int = 0


# --- out


async def export(place: Place, file: Path, wall: Clock, *, migrations: Migrations = MIGRATIONS) -> bool:
    """
    Write every document of a store into *file*, print how many; True. A run that was stopped is continued.

    Raises:
        ConfigurationError: the file is there already, or its unfinished part is of another store.

    """
    place.existing_file()
    if file.exists():  # noqa: ASYNC240 - before anything runs
        raise ConfigurationError(f"{file} exists already: name a file that does not")
    store = place.open(wall)
    try:
        await steadily(partial(read_marker, store, migrations))
        try:
            await _export(store, place, file)
        except OSError as e:
            raise ConfigurationError(f"{file} cannot be written: {e.strerror}") from e
    finally:
        await store.close()
    return True


async def _export(store: Documents, place: Place, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    progress = Progress()
    header = {
        "troop": KIND,
        "format": FORMAT,
        "app": VERSION,
        "store": sha256(place.name.encode()).hexdigest()[:16],
    }
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with part.open("r+b") as out:
        came_to = _came_to(out, part, header)
        count = came_to.documents
        if not out.tell():
            out.write(_line(header))
        for container in await containers_of(store):
            if container < came_to.container:
                continue
            after = came_to.sort if container == came_to.container else None
            async for page in pages(store, container, after=after):
                ours = [document for document in page if not is_bookkeeping(container, document)]
                out.writelines(_line(_wire(container, document)) for document in ours)
                count += len(ours)
                progress(f"{count:,} documents exported ({container})")
        out.write(_line({"documents": count}))
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
    progress.done()
    print(f"{count:,} documents exported to {file}")


@dataclass(frozen=True, slots=True)
class _CameTo:
    """Where an unfinished export came to."""

    documents: int = 0
    container: str = ""
    sort: str | None = None


def _came_to(out: BinaryIO, part: Path, header: Mapping[str, Any]) -> _CameTo:
    """Cut an unfinished file behind its last whole document, and say which that is."""
    lines, whole, last = 0, 0, b""
    for text in out:
        if not text.endswith(b"\n") or text.startswith(b'{"documents":'):
            break
        if lines == 0 and text != _line(header):
            raise ConfigurationError(f"{part} is no unfinished export of this store by this version: delete it first")
        lines, whole, last = lines + 1, whole + len(text), text
    out.seek(whole)
    out.truncate()
    if lines < 2:
        return _CameTo()
    found = json.loads(last)
    print(f"continuing behind {lines - 1:,} documents")
    return _CameTo(lines - 1, found["container"], found["sort"])


def _wire(container: str, document: Document) -> dict[str, Any]:
    return {
        "container": container,
        "id": document.id,
        "partition": document.partition,
        "sort": document.sort,
        "due_at": format_instant(document.due_at) if document.due_at else None,
        "expires_at": format_instant(document.expires_at) if document.expires_at else None,
        "schema": document.schema,
        "body": document.body,
    }


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"


# --- in


async def import_(
    file: Path, place: Place, wall: Clock, *, overwrite: bool = False, migrations: Migrations = MIGRATIONS
) -> bool:
    """
    Store every document of a file that is not there yet, print what became of them; whether none was refused.

    A document that is there with other content stays, and is told, unless *overwrite*. Asked again, it goes on:
    what is stored already is left alone. Older documents are upgraded on their way in.

    Raises:
        ConfigurationError: the file is no export, or the store is newer than this app.

    """
    store = place.open(wall)
    importer = _Importer(Migrated(store, wall, app=VERSION, migrations=migrations), wall, migrations, overwrite)
    try:
        with file.open("rb") as lines:
            return await importer.run(lines)
    except OSError as e:
        raise ConfigurationError(f"{file} cannot be read: {e.strerror}") from e
    finally:
        await store.close()


class _Importer:
    def __init__(self, documents: Documents, wall: Clock, migrations: Migrations, overwrite: bool) -> None:  # noqa: FBT001
        self._documents = documents
        self._wall = wall
        self._migrations = migrations
        self._overwrite = overwrite
        self._progress = Progress()
        self._shown = 0
        self.outcome = Imported()

    async def run(self, lines: BinaryIO) -> bool:
        _check_header(lines.readline(LONGEST_LINE))
        counted: int | None = None
        total = 0
        for chunk in _chunks(lines):
            wanted = []
            for number, text in chunk:
                try:
                    found = _parse(text)
                except InvalidPayloadError as e:
                    self._refuse(number, str(e))
                    total += 1
                    continue
                if isinstance(found, int):
                    counted = found
                else:
                    wanted.append((number, found))
            total += len(wanted)
            answers = await asyncio.gather(*(self._store(line) for _, line in wanted), return_exceptions=True)
            for (number, _), answer in zip(wanted, answers, strict=True):
                if isinstance(answer, PermanentError):
                    self._refuse(number, str(answer))
                elif isinstance(answer, BaseException):
                    raise answer
            self._progress(f"{total:,} documents read, {self.outcome.created:,} new")
        self._progress.done()
        return self._tell(total, counted)

    async def _store(self, line: Line) -> None:
        document = self._migrations.upgraded(line.container, line.document())
        if document.expires_at and document.expires_at <= self._wall.now():
            self.outcome.expired += 1
            return
        try:
            await steadily(partial(self._documents.create, line.container, document))
            self.outcome.created += 1
        except ConflictError:
            await self._settle(line.container, document)

    async def _settle(self, container: str, document: Document) -> None:
        """Deal with what is stored already."""
        name = f"{container}/{document.partition}/{document.id}"
        while True:
            try:
                stored = await steadily(partial(self._documents.read, container, document.partition, document.id))
            except NotFoundError:
                raise ConflictError(f"{name}: another document has its place in the order ({document.sort})") from None
            if replace(stored, etag=None) == document:
                self.outcome.unchanged += 1
                return
            if not self._overwrite:
                raise ConflictError(f"{name} is stored with other content, which stays; --overwrite replaces it")
            try:
                await steadily(partial(self._documents.replace, container, replace(document, etag=stored.etag)))
            except StaleError:
                continue
            self.outcome.replaced += 1
            return

    def _refuse(self, number: int, reason: str) -> None:
        self.outcome.refused += 1
        if self.outcome.refused <= SHOWN:
            self._progress.done()
            print(f"line {number}: {reason}")

    def _tell(self, total: int, counted: int | None) -> bool:
        o = self.outcome
        if o.refused > SHOWN:
            print(f"and {o.refused - SHOWN:,} more")
        is_whole = counted == total
        if not is_whole:
            said = "has no last line with the count" if counted is None else f"counts {counted:,} documents"
            print(f"the file {said}, {total:,} were read: it was cut or changed; what was read is stored")
        print(
            f"{o.created:,} created, {o.replaced:,} replaced, {o.unchanged:,} there already, "
            f"{o.expired:,} expired, {o.refused:,} refused"
        )
        return is_whole and not o.refused


def _check_header(text: bytes) -> None:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("troop") != KIND:
        raise ConfigurationError("the file is no export of documents: `troop db export` makes one")
    if header.get("format") != FORMAT:
        raise ConfigurationError(f"the file was exported by another version ({header.get('app')}): update the app")


def _chunks(lines: BinaryIO) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines, a few at a time; of a line that is too long only the beginning, which is no JSON."""
    chunk: list[tuple[int, bytes]] = []
    number = 1
    while text := lines.readline(LONGEST_LINE):
        number += 1
        if len(text) == LONGEST_LINE and not text.endswith(b"\n"):
            while (rest := lines.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
        chunk.append((number, text))
        if len(chunk) == AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _parse(text: bytes) -> Line | int:
    """A document, or the count of the last line."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if isinstance(value, dict) and value.keys() == {"documents"} and isinstance(value["documents"], int):
            return int(value["documents"])
        return Line.model_validate(value)
    except ValidationError as e:
        where = "; ".join(
            f"{'.'.join(map(str, error['loc'])) or 'line'}: {error['msg']}"
            for error in e.errors(include_input=False, include_url=False)[:3]
        )
        raise InvalidPayloadError(f"no document: {where}") from None
    except (ValueError, RecursionError) as e:
        raise InvalidPayloadError(f"no JSON: {e}") from None


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
