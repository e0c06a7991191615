"""The one way small shared documents are changed: read, decide, write if nobody else did meanwhile."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from shared.clock import Clock
from shared.documents import Document, Documents, sort_key
from shared.errors import ConflictError, NotFoundError, StaleError

QUOTA = "quota"
"""The container of what is known of providers, one partition each."""
TRIES = 8

type Change = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
"""Makes a new body of the stored one (empty: there is no document yet); None leaves it as it is."""


async def changed(
    documents: Documents,
    wall: Clock,
    partition: str,
    id: str,
    change: Change,
    *,
    expires_at: datetime | None = None,
) -> Mapping[str, Any] | None:
    """
    Write what *change* makes of a document in ``quota`` and return it; None: there was nothing to change.

    Raises:
        StaleError: others wrote first, time and again.

    """
    for _ in range(TRIES):
        document = await _read(documents, partition, id)
        body = change(document.body if document else {})
        if body is None:
            return None
        try:
            if document:
                await documents.replace(QUOTA, replace(document, body=body, expires_at=expires_at))
            else:
                sort = sort_key(wall.now(), f"{partition}|{id}")
                new = Document(id=id, partition=partition, sort=sort, body=body, expires_at=expires_at)
                await documents.create(QUOTA, new)
        except (StaleError, ConflictError, NotFoundError):
            continue  # another instance was first: decide again from what it wrote
        return body
    raise StaleError(f"{partition}/{id} is written by others all the time")


async def _read(documents: Documents, partition: str, id: str) -> Document | None:
    try:
        return await documents.read(QUOTA, partition, id)
    except NotFoundError:
        return None
