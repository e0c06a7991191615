"""
How what is stored keeps up with what the app expects.

Every document carries ``schema``, the version its body was written in. A step turns the body of one version of a
container into the next; the current version of a container is 1 plus its steps. ``Migrated`` stands before any
adapter: what is read is upgraded at once, what is written is of the current version, so the app runs before,
during and after ``troop db migrate``, which upgrades what lies there. One marker document tells the version of the
whole store; an app that is older than it stops.

A step is never edited or removed once it was released: a store may be of any age.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from shared.clock import Clock, sortable
from shared.documents import Document, Documents, Operation
from shared.errors import ConfigurationError, ConflictError, InvalidPayloadError, NotFoundError, StaleError

type Body = Mapping[str, Any]
type Step = Callable[[Body], Body]

SYSTEM, PARTITION, STORE = "system", "schema", "store"
"""Where a store keeps what it knows about its own version: container, partition and id of the marker."""

NOTES = 500
"""More than a store ever keeps about itself: the marker, and while it is migrated a cursor for each container."""

STEPS: Mapping[tuple[str, int], Step] = {}
"""(container, version it reads) → pure function from that version's body to the next one's."""


class Migrations:
    """The steps that this app knows; each container's versions are 1, 2, 3 … without a gap."""

    def __init__(self, steps: Mapping[tuple[str, int], Step] = STEPS) -> None:
        self._steps = dict(steps)
        self._versions: dict[str, int] = {}
        for container, version in sorted(self._steps):
            if version != self.version(container):
                raise ConfigurationError(f"the step of {container} from {self.version(container)} on is missing")
            self._versions[container] = version + 1

    @property
    def store_version(self) -> int:
        """The version of a store in which every container is current: 1 plus all steps."""
        return 1 + len(self._steps)

    @property
    def containers(self) -> Sequence[str]:
        """The containers that have steps."""
        return sorted(self._versions)

    def version(self, container: str) -> int:
        """The version that this app writes into a container."""
        return self._versions.get(container, 1)

    def is_current(self, container: str, document: Document) -> bool:
        """Whether nothing is left to do; what a store knows of its own version has none itself."""
        return document.schema == self.version(container) or is_bookkeeping(container, document)

    def upgraded(self, container: str, document: Document) -> Document:
        """
        The same document in the current version; its etag stays, so it can be written back.

        Raises:
            ConfigurationError: it was written by a newer version of the app.
            InvalidPayloadError: a step cannot read its body.

        """
        current = self.version(container)
        if self.is_current(container, document):
            return document
        name = f"{container}/{document.partition}/{document.id}"
        if document.schema > current:
            raise ConfigurationError(
                f"{name} was written by a newer version (schema {document.schema}, this one knows {current}): "
                "update the app"
            )
        body: Body = document.body
        for version in range(max(document.schema, 1), current):
            try:
                body = self._steps[container, version](body)
            except (LookupError, TypeError, ValueError, AttributeError) as e:
                raise InvalidPayloadError(
                    f"{name} cannot be upgraded from schema {version} ({type(e).__name__}: {e})"
                ) from e
        return replace(document, body=body, schema=current)


def is_bookkeeping(container: str, document: Document) -> bool:
    """Whether it is part of what a store knows of its own version: no step is for it, and no copy takes it along."""
    return container == SYSTEM and document.partition == PARTITION


MIGRATIONS = Migrations()


class Migrated:
    """
    Documents in the current version, whatever version the *store* holds.

    The first use compares the store's marker with what this app knows, and moves it on when the app is newer:
    from then on an older app refuses the store. Every call may therefore raise ConfigurationError.
    """

    def __init__(self, store: Documents, wall: Clock, *, app: str, migrations: Migrations = MIGRATIONS) -> None:
        self._store = store
        self._wall = wall
        self._app = app
        self._migrations = migrations
        self._is_checked = False

    async def read(self, container: str, partition: str, id: str) -> Document:
        store = await self._checked()
        return self._migrations.upgraded(container, await store.read(container, partition, id))

    async def create(self, container: str, document: Document) -> Document:
        store = await self._checked()
        return await store.create(container, self._current(container, document))

    async def replace(self, container: str, document: Document) -> Document:
        store = await self._checked()
        return await store.replace(container, self._current(container, document))

    async def delete(self, container: str, document: Document) -> None:
        await (await self._checked()).delete(container, document)

    async def batch(self, container: str, operations: Sequence[Operation]) -> list[Document]:
        store = await self._checked()
        current = [replace(o, document=self._current(container, o.document)) for o in operations]
        return await store.batch(container, current)

    async def page(
        self,
        container: str,
        partition: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        store = await self._checked()
        found = await store.page(container, partition, after=after, newest_first=newest_first, limit=limit)
        return self._upgraded(container, found)

    async def feed(
        self,
        container: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        store = await self._checked()
        found = await store.feed(container, after=after, newest_first=newest_first, limit=limit)
        return self._upgraded(container, found)

    async def due(self, container: str, *, before: datetime, limit: int = 100) -> list[Document]:
        store = await self._checked()
        return self._upgraded(container, await store.due(container, before=before, limit=limit))

    async def close(self) -> None:
        self._is_checked = False
        await self._store.close()

    def _current(self, container: str, document: Document) -> Document:
        if self._migrations.is_current(container, document):
            return document
        return replace(document, schema=self._migrations.version(container))

    def _upgraded(self, container: str, documents: Iterable[Document]) -> list[Document]:
        return [self._migrations.upgraded(container, document) for document in documents]

    async def _checked(self) -> Documents:
        if not self._is_checked:
            await claim_version(self._store, self._wall, app=self._app, migrations=self._migrations)
            self._is_checked = True
        return self._store


async def read_marker(store: Documents, migrations: Migrations = MIGRATIONS) -> Document | None:
    """
    The marker of a store; None while nobody has written one, as in a store of version 1.

    Raises:
        ConfigurationError: the store was used by a newer version of the app.

    """
    marker = await read_note(store, STORE)
    if marker is None:
        return None
    version, known = int(marker.body["version"]), migrations.store_version
    if version > known:
        raise ConfigurationError(
            f"the store was used by a newer version of the app ({marker.body.get('app')}: store version {version}, "
            f"this one knows {known}): update the app, or give it another store"
        )
    return marker


async def read_note(store: Documents, name: str) -> Document | None:
    """What a store keeps about itself under a name; it is listed, because that it is missing is no error."""
    notes = await store.page(SYSTEM, PARTITION, limit=NOTES)
    return next((note for note in notes if note.id == name), None)


async def claim_version(
    store: Documents, wall: Clock, *, app: str, migrations: Migrations = MIGRATIONS, is_upgraded: bool = False
) -> None:
    """
    Say in the store that an app of this version writes into it, and with *is_upgraded* that nothing older is left.

    Raises:
        ConfigurationError: the store was used by a newer version of the app.

    """
    while True:
        marker = await read_marker(store, migrations)
        said = marker.body if marker else {"version": 1, "upgraded": 1}
        version = migrations.store_version
        wanted = {"version": version, "upgraded": version if is_upgraded else said["upgraded"], "app": app}
        if (said["version"], said["upgraded"]) == (wanted["version"], wanted["upgraded"]):
            return
        try:
            if marker is None:
                sort = f"{sortable(wall.now())}|{PARTITION}|{STORE}"
                await store.create(SYSTEM, Document(id=STORE, partition=PARTITION, sort=sort, body=wanted))
            else:
                await store.replace(SYSTEM, marker.with_body(wanted))
        except (ConflictError, StaleError, NotFoundError):
            continue  # another instance said it at the same moment; it may be a newer one
        return
