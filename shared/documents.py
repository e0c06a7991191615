"""
The one storage port: eight operations, two adapters (SQLite here, Cosmos DB in the cloud).

A document lives in a container, inside a partition. ``sort`` is a UTC instant followed by the id, so it is
unique and every list is a keyset page over it. ``due_at`` says that the document owes an effect; the
conditional write that records the effect clears it, and one sweep per domain redoes what ``due()`` returns.
No upsert, patch, offset, continuation token or free query: that is what keeps both adapters small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, Protocol, Self

from shared.clock import sortable

BATCH_LIMIT = 100
"""Most operations in one batch (Cosmos DB's transactional batch limit)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A JSON body with what storage must know about it; ``etag`` is None until it was stored."""

    id: str
    partition: str
    sort: str
    body: Mapping[str, Any] = field(default_factory=dict)
    due_at: datetime | None = None
    expires_at: datetime | None = None
    schema: int = 1
    etag: str | None = None

    def with_body(self, body: Mapping[str, Any], *, due_at: datetime | None = None) -> Self:
        """The same document saying something else, owing *due_at* (None: nothing)."""
        return replace(self, body=body, due_at=due_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One step of a batch."""

    kind: Literal["create", "replace", "delete"]
    document: Document


class Documents(Protocol):
    """
    Stores documents.

    Every call may raise RateLimitedError or UnavailableError. A write that raised UnavailableError may have
    happened: decide again from what ``read`` returns. Bodies must be JSON without NaN (InvalidPayloadError).
    """

    async def read(self, container: str, partition: str, id: str) -> Document:
        """
        Read one document.

        Raises:
            NotFoundError: there is none, or it has expired.

        """
        ...

    async def create(self, container: str, document: Document) -> Document:
        """
        Store a new document and return it with its etag.

        Raises:
            ConflictError: one with this id is there already: go on with the stored one, it may still owe
                its effect.

        """
        ...

    async def replace(self, container: str, document: Document) -> Document:
        """
        Overwrite the stored document if its etag is still ``document.etag``.

        Raises:
            StaleError: somebody else wrote first.
            NotFoundError: it is gone.

        """
        ...

    async def delete(self, container: str, document: Document) -> None:
        """
        Remove the stored document if its etag is still ``document.etag``.

        Raises:
            StaleError: somebody else wrote first.
            NotFoundError: it is gone.

        """
        ...

    async def batch(self, container: str, operations: Sequence[Operation]) -> list[Document]:
        """
        Do up to 100 operations in one partition, all or nothing; the deleted are returned as given.

        Raises:
            ConflictError, StaleError, NotFoundError: as the single operations; nothing was written.
            InvalidPayloadError: more than 100, none, or more than one partition.

        """
        ...

    async def page(
        self,
        container: str,
        partition: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        """List a partition by ``sort``, strictly behind *after* in the direction of reading."""
        ...

    async def feed(
        self,
        container: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        """List a whole container by ``sort``, strictly behind *after* in the direction of reading."""
        ...

    async def due(self, container: str, *, before: datetime, limit: int = 100) -> list[Document]:
        """List documents whose ``due_at`` is not after *before*, the longest due first."""
        ...

    async def close(self) -> None:
        """Let go of files and connections; the next call opens them again."""
        ...


class Expiry(Protocol):
    """Storage whose expired documents, invisible already, are deleted when somebody asks."""

    async def sweep_expired(self) -> int:
        """Delete documents that have expired; the number of them."""
        ...


class ExpiresByItself:
    """Storage that deletes what has expired without being asked, as Cosmos DB does."""

    async def sweep_expired(self) -> int:
        return 0


def sort_key(instant: datetime, id: str = "") -> str:
    """The ``sort`` of a document; without an id, the position just before all of that instant."""
    return f"{sortable(instant)}|{id}"
