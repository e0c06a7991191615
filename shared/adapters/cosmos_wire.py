"""
How a document lies in Cosmos DB, and what Cosmos DB's answers mean in our words.

An item is the document's own fields beside its ``body``, plus ``claim`` (the token of the attempt that wrote it) and
``ttl``. Cosmos DB counts ``ttl`` from the last write and by its own clock, so it only sweeps up, a little late: whether
a document has expired is decided by ``expires_at``.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from shared.clock import parse_instant, sortable
from shared.documents import Document
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    RateLimitedError,
    RefusedError,
    StaleError,
    TroopError,
    UnavailableError,
)

NO_ETAG = '"never-stored"'
"""An etag that nothing in storage ever has."""
SWEEP_AFTER = timedelta(minutes=1)
"""How long an expired item may still lie there: more than two clocks differ."""

_ODD = re.compile(r"[^A-Za-z0-9_.:|,=@-]")
_ESCAPED = re.compile(r"(?:~[0-9A-F]{2})+")
_CHARGE, _RETRY_AFTER = "x-ms-request-charge", "x-ms-retry-after-ms"
_OWNER_MISSING, _OTHER_PARTITION_KEY, _PARTITION_FULL = 1003, 1001, 1014
_FAILING_OVER = (3, 1008)


def escape_id(id: str) -> str:
    """Write an id without what Cosmos DB forbids or its gateway mangles: odd characters become ``~XX`` of UTF-8."""
    return _ODD.sub(lambda odd: "".join(f"~{byte:02X}" for byte in odd[0].encode()), id)


def unescape_id(id: str) -> str:
    """Read an id that ``escape_id`` wrote."""
    return _ESCAPED.sub(lambda found: bytes.fromhex(found[0].replace("~", "")).decode(), id) if "~" in id else id


def item_of(document: Document, *, claim: str, now: datetime) -> dict[str, Any]:
    """
    Write a document as an item.

    Raises:
        InvalidPayloadError: the body is no JSON.

    """
    try:
        # The SDK would write NaN, and half a surrogate pair as something else.
        json.dumps(document.body, ensure_ascii=False, allow_nan=False).encode()
        f"{document.id}{document.partition}{document.sort}".encode()
    except (TypeError, ValueError) as e:
        raise InvalidPayloadError(f"{document.partition}/{document.id}: the body is no JSON: {e}") from e
    item: dict[str, Any] = {
        "id": escape_id(document.id),
        "partition": document.partition,
        "sort": document.sort,
        "schema": document.schema,
        "body": document.body,
        "claim": claim,
    }
    if document.due_at:
        item["due_at"] = sortable(document.due_at)
    if document.expires_at:
        item["expires_at"] = sortable(document.expires_at)
        left = max(document.expires_at - now, timedelta()) + SWEEP_AFTER
        item["ttl"] = min(math.ceil(left.total_seconds()), 2**31 - 1)
    return item


def document_of(item: Mapping[str, Any]) -> Document:
    """Read an item."""
    due_at, expires_at = item.get("due_at"), item.get("expires_at")
    return Document(
        id=unescape_id(item["id"]),
        partition=item["partition"],
        sort=item["sort"],
        body=item["body"],
        due_at=parse_instant(due_at) if due_at else None,
        expires_at=parse_instant(expires_at) if expires_at else None,
        schema=item["schema"],
        etag=etag_with(item["_etag"], expires_at),
    )


def has_expired(item: Mapping[str, Any], now: datetime) -> bool:
    """Whether a stored item is gone by our clock, though it still lies there."""
    expires_at = item.get("expires_at")
    return expires_at is not None and str(expires_at) <= sortable(now)


def stored(document: Document, etag: str) -> Document:
    """The document as it is known after it was written."""
    return Document(
        id=document.id,
        partition=document.partition,
        sort=document.sort,
        body=document.body,
        due_at=document.due_at,
        expires_at=document.expires_at,
        schema=document.schema,
        etag=etag_with(etag, sortable(document.expires_at) if document.expires_at else None),
    )


def etag_with(etag: str, expires_at: str | None) -> str:
    """
    Our etag: Cosmos DB's and the instant at which that version expires.

    So a write knows without reading whether what it replaces is still alive.
    """
    return f"{etag} {expires_at}" if expires_at else etag


def etag_parts(etag: str | None) -> tuple[str, str | None]:
    """Cosmos DB's part of our etag, and the instant at which that version expires."""
    theirs, _, expires_at = (etag or NO_ETAG).partition(" ")
    return theirs, expires_at or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came instead of a success; ``status`` is 0 when nothing came."""

    status: int
    sub_status: int = 0
    retry_after: timedelta | None = None
    charge: float = 0.0
    index: int = 0
    """Which operation of a batch it is about."""
    is_unknown: bool = False
    """Whether what was asked for may have happened, or may still happen."""
    trouble: str = ""

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed a moment later."""
        return self.is_unknown or self.status in (0, 410, 429, 449, 503) or self._is_failing_over

    @property
    def _is_failing_over(self) -> bool:
        return self.status == 403 and self.sub_status in _FAILING_OVER


def charge_of(headers: Mapping[str, Any]) -> float:
    """The request units a call cost."""
    return float(headers.get(_CHARGE) or 0)


def answer_of(e: Exception) -> Answer:
    """Read what the SDK raised."""
    from azure.core.exceptions import ClientAuthenticationError, DecodeError, HttpResponseError, ServiceRequestError
    from azure.cosmos.exceptions import CosmosBatchOperationError, CosmosHttpResponseError

    trouble = type(e).__name__
    if isinstance(e, CosmosBatchOperationError):
        headers: Mapping[str, Any] = e.headers or {}
        failed = (e.operation_responses or [{}])[e.error_index or 0]
        return Answer(
            status=int(e.status_code or 0),
            sub_status=int(failed.get("subStatusCode") or 0),
            retry_after=_milliseconds(failed.get("retryAfterMilliseconds") or headers.get(_RETRY_AFTER)),
            charge=charge_of(headers),
            index=e.error_index or 0,
        )
    if isinstance(e, CosmosHttpResponseError) and e.status_code:
        status = int(e.status_code)
        return Answer(
            status=status,
            sub_status=int(e.sub_status or 0),
            retry_after=_milliseconds(e.headers.get(_RETRY_AFTER)),
            charge=charge_of(e.headers),
            is_unknown=status == 408 or (status >= 500 and status != 503),
        )
    if isinstance(e, ClientAuthenticationError):
        return Answer(status=401, trouble=trouble)
    if isinstance(e, HttpResponseError) and not isinstance(e, DecodeError) and e.status_code:
        return Answer(status=int(e.status_code), trouble=trouble)
    # What was never sent cannot have happened.
    return Answer(status=0, is_unknown=not isinstance(e, ServiceRequestError), trouble=trouble)


def error_of(answer: Answer, name: str) -> TroopError:
    """Say in our words what went wrong with *name*."""
    code = f"{answer.status}/{answer.sub_status}" if answer.sub_status else str(answer.status)
    if answer.is_passing and answer.status != 429:
        said = f"answered {code}" if answer.status else f"gave no answer ({answer.trouble})"
        return UnavailableError(f"Cosmos DB {said} for {name}", retry_after=answer.retry_after)
    match answer.status:
        case 404 if answer.sub_status == _OWNER_MISSING:
            return ConfigurationError(f"the container of {name} is missing: run troop db migrate")
        case 404:
            return NotFoundError(f"no {name}")
        case 409:
            return ConflictError(f"{name} exists already")
        case 412:
            return StaleError(f"{name} was written by somebody else")
        case 429:
            return RateLimitedError(f"Cosmos DB asked us to slow down ({name})", retry_after=answer.retry_after)
        case 401 | 403 if answer.sub_status != _PARTITION_FULL:
            return ConfigurationError(
                f"Cosmos DB refused us ({code}): give this app's identity the role Cosmos DB Built-in Data Contributor "
                "(on a laptop: az login), and for an emulator set COSMOS_KEY"
            )
        case 400 if answer.sub_status == _OTHER_PARTITION_KEY:
            return ConfigurationError(
                f"the container of {name} has another partition key than /partition: make it anew"
            )
        case 400:
            return InvalidPayloadError(f"Cosmos DB refused {name} as malformed ({code})")
        case 413:
            return InvalidPayloadError(f"{name} is larger than the 2 MB that Cosmos DB takes")
        case 403:
            return RefusedError(f"the partition of {name} is full (20 GB): spread it over more partitions")
        case _:
            return RefusedError(f"Cosmos DB answered {code} for {name}")


def _milliseconds(value: object) -> timedelta | None:
    try:
        return timedelta(milliseconds=float(str(value))) if value else None
    except ValueError:
        return None
