"""Documents that count what is asked of them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from math import ceil

from shared.documents import Document, Documents, Operation

READ_RU = 1.0
"""A point read, per started kB (delivery facts A4: 1 kB = 1 RU, 100 kB = 10 RU: larger ones are cheaper a kB)."""
CREATE_RU = 5.5
"""An insert without indexes, per started kB (A4)."""
REPLACE_FACTOR = 2.0
"""A replace costs about twice an insert (A4)."""
INDEXED_RU = 0.5
"""ASSUMED: what each of the three indexed paths adds to a write (A4 says only that each adds)."""
QUERY_RU = 2.5
"""ASSUMED: a query inside one partition before its first result; its results cost as reads do."""

INDEXED_PATHS = 3
WRITES = ("create", "replace", "delete")


def charge(kind: str, kilobytes: int, items: int) -> float:
    """The request units of one operation by the model above."""
    match kind:
        case "read":
            return READ_RU * kilobytes
        case "create" | "delete":
            return CREATE_RU * kilobytes + INDEXED_RU * INDEXED_PATHS
        case "replace":
            return REPLACE_FACTOR * CREATE_RU * kilobytes + INDEXED_RU * INDEXED_PATHS
        case _:
            return QUERY_RU + READ_RU * kilobytes * (items > 0)


@dataclass(slots=True)
class Tally:
    """Operations by (kind, container), and what they cost by the model."""

    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    units: float = 0.0

    def add(self, kind: str, container: str, documents: Sequence[Document]) -> None:
        """Count one operation on *documents*."""
        size = sum(len(json.dumps(d.body, separators=(",", ":"))) + 250 for d in documents)  # 250: our own fields
        self.operations[kind, container] += 1
        self.units += charge(kind, max(1, ceil(size / 1024)), len(documents))

    def reads(self, *without: str) -> int:
        """Point reads and queries, leaving some containers out."""
        return sum(n for (kind, where), n in self.operations.items() if kind not in WRITES and where not in without)

    def writes(self, *without: str) -> int:
        """Writes, leaving some containers out."""
        return sum(n for (kind, where), n in self.operations.items() if kind in WRITES and where not in without)


class CountingDocuments:
    """Passes everything on and counts it in ``tally``; give it a new one to begin anew."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self.tally = Tally()

    async def read(self, container: str, partition: str, id: str) -> Document:
        self.tally.operations["read", container] += 1
        try:
            document = await self._documents.read(container, partition, id)
        except Exception:
            self.tally.units += READ_RU
            raise
        self.tally.operations["read", container] -= 1
        self.tally.add("read", container, [document])
        return document

    async def create(self, container: str, document: Document) -> Document:
        self.tally.add("create", container, [document])
        return await self._documents.create(container, document)

    async def replace(self, container: str, document: Document) -> Document:
        self.tally.add("replace", container, [document])
        return await self._documents.replace(container, document)

    async def delete(self, container: str, document: Document) -> None:
        self.tally.add("delete", container, [document])
        await self._documents.delete(container, document)

    async def batch(self, container: str, operations: Sequence[Operation]) -> list[Document]:
        for operation in operations:
            self.tally.add(operation.kind, container, [operation.document])
        return await self._documents.batch(container, operations)

    async def page(
        self,
        container: str,
        partition: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        found = await self._documents.page(container, partition, after=after, newest_first=newest_first, limit=limit)
        self.tally.add("page", container, found)
        return found

    async def feed(
        self, container: str, *, after: str | None = None, newest_first: bool = False, limit: int = 100
    ) -> list[Document]:
        found = await self._documents.feed(container, after=after, newest_first=newest_first, limit=limit)
        self.tally.add("feed", container, found)
        return found

    async def due(self, container: str, *, before: datetime, limit: int = 100) -> list[Document]:
        found = await self._documents.due(container, before=before, limit=limit)
        self.tally.add("due", container, found)
        return found

    async def close(self) -> None:
        await self._documents.close()
