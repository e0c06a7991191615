"""How much of the day's calls one caller may have spent, so that none takes the others' and the timers' share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from shared.clock import Clock
from shared.documents import Documents
from shared.errors import NotFoundError, QuotaSpentError
from shared.market.conditional import QUOTA, Change, changed
from shared.market.registry import Window

PARTITION = "callers"
SHARE = 0.2
"""The share of the scarcest provider's day that one caller may have."""
WITHOUT_A_DAY = 2000
"""How many calls a day where no provider counts days."""
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody we know, who may have calls made."""

    id: str


class CappedError(QuotaSpentError):
    """This caller's share of the day is spent; another's may not be."""


def allowance(windows: Iterable[Window], *, share: float = SHARE) -> int:
    """How many calls a day one caller may have under these windows of providers; never none."""
    days = [w.amount for w in windows if w.span >= _DAY]
    return max(1, int(share * min(days))) if days else WITHOUT_A_DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Callers:
    """Counts each caller's calls by the day (UTC), in storage, for all instances."""

    documents: Documents
    wall: Clock
    allowed: int

    async def left(self, caller: Caller) -> int:
        """How many calls the caller may still have today."""
        try:
            document = await self.documents.read(QUOTA, PARTITION, self._id(caller))
        except NotFoundError:
            return self.allowed
        return max(0, self.allowed - int(document.body["calls"]))

    async def check(self, caller: Caller) -> None:
        """Raises CappedError when nothing is left."""
        if not await self.left(caller):
            raise self._capped()

    async def charge(self, caller: Caller) -> None:
        """Count one call before it is made; raises CappedError when nothing is left."""

        def one_more(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            calls = body.get("calls", 0)
            return {"caller": caller.id, "calls": calls + 1} if calls < self.allowed else None

        if await self._change(caller, one_more) is None:
            raise self._capped()

    async def refund(self, caller: Caller) -> None:
        """Take back a call that was not made."""

        def one_less(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            return {**body, "calls": body["calls"] - 1} if body.get("calls", 0) else None

        await self._change(caller, one_less)

    async def _change(self, caller: Caller, change: Change) -> Mapping[str, Any] | None:
        expires_at = self._tomorrow() + _DAY
        return await changed(self.documents, self.wall, PARTITION, self._id(caller), change, expires_at=expires_at)

    def _capped(self) -> CappedError:
        return CappedError(
            f"your share of today's provider calls is spent ({self.allowed} a day)",
            retry_after=self._tomorrow() - self.wall.now(),
        )

    def _id(self, caller: Caller) -> str:
        return f"{caller.id}|{self.wall.now().astimezone(UTC):%Y-%m-%d}"

    def _tomorrow(self) -> datetime:
        midnight = self.wall.now().astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        return midnight + _DAY
