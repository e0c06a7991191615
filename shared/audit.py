"""
Who did what to what, why and when: every act of an operator, and of whoever acts for another.

Container audit, partition day (of the wall, UTC). An actor is the subject of a verified token, never an address; what
was secret in a detail is taken out before it is stored.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from shared.clock import Clock, format_instant
from shared.documents import Document, Documents, sort_key
from shared.telemetry import redact

CONTAINER = "audit"
LONGEST = 500


class Audit:
    """Keeps what was done, for *keep*; an act that cannot be written down shall not be done."""

    def __init__(self, documents: Documents, wall: Clock, keep: timedelta = timedelta(days=730)) -> None:
        self._documents = documents
        self._wall = wall
        self._keep = keep

    async def record(
        self, actor: str, action: str, subject: str, reason: str, details: Mapping[str, Any] | None = None
    ) -> str:
        """
        Write down that *actor* does *action* (``deadletters.replay``) to *subject*; returns the entry's id.

        Raises:
            TransientError: it could not be written: do not do it.

        """
        now = self._wall.now()
        id_ = str(uuid4())  # two equal acts are two acts
        body = {
            "audit_id": id_,
            "recorded_at": format_instant(now),
            "actor": _told(actor),
            "action": action,
            "subject": _told(subject),
            "reason": _told(reason),
            "details": {name: _detail(value) for name, value in (details or {}).items()},
        }
        day = now.date().isoformat()
        document = Document(id=id_, partition=day, sort=sort_key(now, id_), body=body, expires_at=now + self._keep)
        await self._documents.create(CONTAINER, document)
        return id_

    async def listed(self, after: str | None, *, newest_first: bool, limit: int) -> list[Document]:
        """What was done by everybody, in order of time."""
        return await self._documents.feed(CONTAINER, after=after, newest_first=newest_first, limit=limit)


def _detail(value: object) -> object:
    match value:
        case None | bool() | int() | float():
            return value
        case datetime():
            return format_instant(value)
        case list() | tuple() | set() | frozenset():
            return [_told(str(one)) for one in value]
        case _:
            return _told(str(value))


def _told(text: str) -> str:
    safe = redact(text.encode(errors="replace").decode())
    return safe if len(safe) <= LONGEST else f"{safe[: LONGEST - 1]}…"
