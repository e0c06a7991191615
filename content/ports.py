"""What the content domain asks of the outside."""

from collections.abc import Sequence
from datetime import date, datetime
from typing import Protocol

from content.models import Draft, Fact, Kind, Post


class Posts(Protocol):
    """
    Keeps facts and posts. A published post owes its event from the moment it is stored until ``told``.

    Raises ConflictError and StaleError as Documents does.
    """

    async def note(self, fact: Fact) -> None:
        """Keep a fact of its session; noting it again changes nothing."""
        ...

    async def facts(self, session: date) -> Sequence[Fact]:
        """Every fact of a session."""
        ...

    async def create(self, post: Post) -> Post:
        """Store a new post; raises ConflictError if it is there already."""
        ...

    async def save(self, post: Post) -> Post:
        """Write what changed; raises StaleError if somebody else wrote first."""
        ...

    async def read(self, kind: Kind, post_id: str) -> Post | None:
        """The stored post, or None."""
        ...

    async def open_draft(self, draft: Draft) -> None:
        """Store a draft; opening it again changes nothing."""
        ...

    async def touch_draft(self, session: date) -> bool:
        """Make whoever is writing this session's digest look at the facts again; False without a draft."""
        ...

    async def close_draft(self, draft: Draft) -> Draft | None:
        """Remove a draft whose digest is written; gives it back, as it is now, if it was touched meanwhile."""
        ...

    async def due(self, before: datetime, limit: int) -> Sequence[Draft | Post]:
        """What owes something at *before* (wall): a draft its digest, a post its event."""
        ...

    async def listed(self, kind: Kind | None, after: str | None, *, newest_first: bool, limit: int) -> list[Post]:
        """Posts in order of ``recorded_at``."""
        ...

    async def digested_through(self) -> datetime | None:
        """The close of the last session that has a digest."""
        ...

    async def set_digested_through(self, closed_at: datetime) -> None:
        """Move on; moving twice is harmless."""
        ...
