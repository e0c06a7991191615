"""
What providers tell us unasked: Finnhub's webhook, which says that companies have reported.

Its secret is a plain header, so it is compared in constant time and never kept. What it brings is stored first, then
told, then acknowledged; the same content is the same document however often it comes. Finnhub switches a webhook off
whose answers are no 2xx for days, so what cannot be used is acknowledged as well, and counted.
"""

import asyncio
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from shared.clock import Clock, format_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    PermanentError,
    StaleError,
    TransientError,
    TroopError,
)
from shared.events import EventPublisher, fact_id
from shared.market.conditional import QUOTA, changed
from shared.market.events import EarningsReported
from shared.market.models import symbol_of
from shared.market.stores import SYSTEM
from shared.telemetry import get_logger, redact

log = get_logger(__name__)

PARTITION = "hooks/finnhub"
COUNTS, FINNHUB = "hooks", "finnhub"
"""The document in ``quota`` that counts what came of the calls."""
HEADER = "X-Finnhub-Secret"

LARGEST = 256 * 1024
"""More bytes than any day of reports takes."""
PATIENCE = timedelta(seconds=3)
"""How long the answer waits for the topic; after that the sweep tells."""
SWEEP_AFTER = timedelta(seconds=30)
"""Events that are still owed so long after their body came are told by the sweep."""
DUE_LIMIT = 500
KEPT = timedelta(days=90)
COUNTED_EVERY = timedelta(seconds=10)
"""Strangers are written down no more often: they must not make us write."""


class WrongSecretError(PermanentError):
    """The caller is not who the webhook was made for."""


class Outcome(StrEnum):
    """What became of a call; ``dropped`` is a body that cannot be used."""

    TAKEN = "taken"
    REPEATED = "repeated"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What became of a call, and for a dropped one why."""

    outcome: Outcome
    reports: int = 0
    reason: str | None = None


class FinnhubHook:
    """Takes what Finnhub's webhook sends; without a *secret* there is no webhook."""

    def __init__(
        self, documents: Documents, publisher: EventPublisher, wall: Clock, market: Clock, secret: SecretStr
    ) -> None:
        self._documents = documents
        self._publisher = publisher
        self._wall = wall
        self._market = market
        self._secret = secret
        self._strangers = 0
        self._counted_at: datetime | None = None

    async def receive(self, secret: str | None, body: bytes) -> Received:
        """
        Take one call. What it returns is acknowledged; everything but NotFoundError and WrongSecretError is.

        Raises:
            NotFoundError: no secret is set, so nobody may call.
            WrongSecretError: the caller's is another.
            TransientError: it could not be stored; the caller shall come again.

        """
        ours = self._secret.get_secret_value()
        if not ours:
            raise NotFoundError("no webhook is set up here: set FINNHUB_WEBHOOK_SECRET to what Finnhub shall send")
        if not _is_same(secret or "", ours):
            await self._count_stranger()
            raise WrongSecretError(f"the header {HEADER} does not carry the secret of this webhook")
        try:
            reports, refused = _read(body, self._wall.now(), self._market.now())
        except InvalidPayloadError as e:
            log.warning("hook.dropped", reason=str(e), size=len(body))
            await self._count(dropped=1)
            return Received(outcome=Outcome.DROPPED, reason=str(e))
        document, is_new = await self._store(body, reports, refused)
        await self._count(**{"taken" if is_new else "repeated": 1, "rows_refused": refused})
        if document.due_at is not None:
            await self._tell_in_time(document)
        log.info("hook.taken" if is_new else "hook.repeated", reports=len(reports), refused=refused)
        return Received(outcome=Outcome.TAKEN if is_new else Outcome.REPEATED, reports=len(reports))

    async def sweep(self) -> int:
        """Tell of the reports whose events are still owed; returns how many bodies that was."""
        if not self._secret.get_secret_value():
            return 0
        if self._strangers:
            await self._count_stranger(0)
        done = 0
        for document in await self._documents.due(SYSTEM, before=self._wall.now(), limit=DUE_LIMIT):
            if document.partition == PARTITION:
                done += await self._tell(document)
        if done:
            log.info("hook.told_late", count=done)
        return done

    async def counts(self) -> Mapping[str, int]:
        """How many calls were taken, repeated, dropped and refused so far, and how many rows could not be read."""
        try:
            return (await self._documents.read(QUOTA, COUNTS, FINNHUB)).body["counts"]  # type: ignore[no-any-return]
        except NotFoundError:
            return {}

    async def _store(self, text: bytes, reports: Sequence[EarningsReported], refused: int) -> tuple[Document, bool]:
        """The stored document of this content, and whether it is new; it owes its events while it is due."""
        now = self._wall.now()
        id_ = fact_id("hook", FINNHUB, *sorted(report.event_id for report in reports))
        body = {
            "received_at": format_instant(now),
            "text": redact(text.decode()),
            "reports": [report.model_dump(mode="json") for report in reports],
            "rows_refused": refused,
        }
        document = Document(
            id=id_,
            partition=PARTITION,
            sort=sort_key(now, f"{PARTITION}|{id_}"),
            body=body,
            due_at=now + SWEEP_AFTER,
            expires_at=now + KEPT,
        )
        try:
            return await self._documents.create(SYSTEM, document), True
        except ConflictError:
            return await self._documents.read(SYSTEM, PARTITION, id_), False

    async def _tell_in_time(self, document: Document) -> None:
        try:
            async with asyncio.timeout(PATIENCE.total_seconds()):
                await self._tell(document)
        except TimeoutError:
            log.info("hook.postponed", reason="the topic did not answer in time")

    async def _tell(self, document: Document) -> bool:
        """Publish what a stored body owes and write that down; whether it is done."""
        events = [EarningsReported.from_wire(EarningsReported.type, report) for report in document.body["reports"]]
        try:
            await self._publisher.publish(events)
        except TroopError as e:
            log.info("hook.postponed", reason=f"{type(e).__name__}: {e}")
            return False
        try:
            await self._documents.replace(SYSTEM, document.with_body(document.body))
        except (StaleError, NotFoundError):
            return True  # a twin told as well
        except TransientError as e:
            log.info("hook.told_again", reason=f"{type(e).__name__}: {e}")  # by the sweep, under the same ids
            return False
        return True

    async def _count_stranger(self, more: int = 1) -> None:
        """Count calls with a wrong secret in the process, and write them down now and then."""
        self._strangers += more
        now = self._wall.now()
        if self._counted_at is not None and now - self._counted_at < COUNTED_EVERY:
            return
        self._counted_at = now
        strangers, self._strangers = self._strangers, 0
        log.warning("hook.strangers", count=strangers)
        await self._count(strangers=strangers)

    async def _count(self, **more: int) -> None:
        """Add to the stored counts; storage in trouble changes nothing of what is answered."""

        def added(body: Mapping[str, Any]) -> Mapping[str, Any]:
            counts = dict(body.get("counts", {}))
            for name, n in more.items():
                if n:
                    counts[name] = counts.get(name, 0) + n
            return {"counts": counts, "recorded_at": format_instant(self._wall.now())}

        try:
            await changed(self._documents, self._wall, COUNTS, FINNHUB, added)
        except TroopError as e:
            log.info("hook.uncounted", reason=f"{type(e).__name__}: {e}", **more)


def _is_same(given: str, ours: str) -> bool:
    """Compare in a time that tells nothing of either, their lengths included."""
    one, other = (sha256(text.encode(errors="surrogatepass")).digest() for text in (given, ours))
    return hmac.compare_digest(one, other)


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, defer_build=True)

    symbol: str
    date: date
    eps_actual: float | None = None
    eps_estimate: float | None = None
    revenue_actual: float | None = None
    revenue_estimate: float | None = None


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", defer_build=True)

    event: Literal["earnings"]
    data: list[dict[str, Any]]


def _read(body: bytes, recorded_at: datetime, occurred_at: datetime) -> tuple[list[EarningsReported], int]:
    """
    The reports in a body, each once, and how many rows of it cannot be read.

    Raises:
        InvalidPayloadError: there is nothing in it for us; the text shows nothing of it.

    """
    if len(body) > LARGEST:
        raise InvalidPayloadError(f"the body has more than {LARGEST} bytes")
    try:
        rows = _Body.model_validate_json(body).data
    except ValidationError as e:
        fault = e.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:20] for part in fault["loc"]) or "the body"
        raise InvalidPayloadError(f"{where}: {fault['type']}") from None
    reports: dict[str, EarningsReported] = {}
    refused = 0
    for row in rows:
        try:
            read = _Row.model_validate(row)
            report = EarningsReported(
                occurred_at=occurred_at,
                recorded_at=recorded_at,
                symbol=symbol_of(read.symbol),
                day=read.date,
                eps_estimate=read.eps_estimate,
                eps_actual=read.eps_actual,
                revenue_estimate=read.revenue_estimate,
                revenue_actual=read.revenue_actual,
                provider=FINNHUB,
            )
        except (ValidationError, InvalidPayloadError):
            refused += 1
        else:
            reports.setdefault(report.event_id, report)
    if not reports:
        raise InvalidPayloadError(f"none of its {len(rows)} rows is a report")
    return list(reports.values()), refused
