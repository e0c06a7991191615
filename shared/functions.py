"""
What every operator and client asks first: health, openapi.json, dead letters, the audit. And the system's own timers.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import azure.functions as func
from pydantic import ConfigDict, Field, Strict

from shared.adapters.dead_letter_blobs import DeadLetterBlobs
from shared.audit import Audit
from shared.clock import parse_instant
from shared.errors import ConfigurationError, InvalidPayloadError, TroopError
from shared.http import AFTER, CURSOR, LIMIT, Api, Body, Page, Query, body_of, cursor_of, limit_of, listed, sort_of
from shared.identity import caller_of
from shared.inbound import on_time
from shared.replays import MOST, Desk, Replayed, Wanted
from shared.telemetry import redact
from shared.wiring import Core

type Pulse = Callable[[], Awaitable[Mapping[str, Any]]]
"""What the canary says of itself: the fields of CanaryItem."""

type Instant = Annotated[datetime, Strict()]
"""An instant as text: a bare number is none."""

REPLAYS_A_DAY = 500
RANGES_A_DAY = 200


class CanaryItem(Body):
    """Whether a synthetic alert came through the whole path, when last, and how long it took."""

    last_sent_at: datetime | None
    last_arrived_at: datetime | None
    latency_ms: float | None
    age_s: float | None
    is_late: bool


class Health(Body):
    """Whether the app can do its work, and what time it thinks it is."""

    status: str
    checks: Mapping[str, str]
    wall_at: datetime
    market_at: datetime
    version: str
    canary: CanaryItem | None = None


class HistoryItem(Body):
    """Something done with a dead letter, and by whom."""

    at: datetime
    by: str
    action: str
    reason: str
    outcome: str


class DeadLetterItem(Body):
    """
    An event we will not try again by ourselves.

    ``source`` is the function it was for, or the domain whose event it is; ``origin`` who gave it up: the function,
    the topic (``report`` is what it said), or the outbox. ``state`` is open, replayed or discarded.
    """

    dead_letter_id: str
    source: str
    event_id: str
    reason: str
    event: Mapping[str, Any]
    times: int
    recorded_at: datetime
    origin: str = "function"
    state: str = "open"
    digest: str | None = None
    report: Mapping[str, Any] = Field(default_factory=dict)
    history: Sequence[HistoryItem] = ()


class DeadLetterPage(Page[DeadLetterItem]):
    """Dead letters, newest first."""


class Order(Body):
    """What an operator orders, and why."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(min_length=3, max_length=500, pattern=r"\S")


class RangeOrder(Order):
    """
    Which open letters to replay: those buried from ``since`` until before ``until``, of one source and type.

    A dry run says what would be done; ``cursor`` goes on where an earlier answer ended.
    """

    source: str | None = Field(default=None, max_length=100)
    type: str | None = Field(default=None, max_length=200)
    since: Instant | None = None
    until: Instant | None = None
    limit: int = Field(default=MOST, ge=1, le=MOST)
    dry_run: bool = True
    cursor: str | None = Field(default=None, max_length=500)


class ReplayItem(Body):
    """What became of one letter: replayed, already replayed, refused again, postponed, impossible, or would replay."""

    dead_letter_id: str
    source: str
    event_id: str
    outcome: str
    reason: str
    state: str


class RangeItem(Body):
    """How far a range got; with ``next`` there is more, to be asked for as ``cursor``."""

    dry_run: bool
    counts: Mapping[str, int]
    items: Sequence[ReplayItem]
    next: str | None


class AuditItem(Body):
    """Something that somebody did, and why; ``actor`` is the subject of a verified token."""

    audit_id: str
    recorded_at: datetime
    actor: str
    action: str
    subject: str
    reason: str
    details: Mapping[str, Any]


class AuditPage(Page[AuditItem]):
    """What was done, newest first, or oldest first behind ``?after=``."""


class Description(Body):
    """An OpenAPI 3.1 document."""

    openapi: str
    info: Mapping[str, Any]
    servers: Sequence[Mapping[str, Any]]
    paths: Mapping[str, Any]
    components: Mapping[str, Any]


SOURCE = Query(name="source", description="Only letters of this function, or of this domain's outbox.")
WHERE = Query(name="source", description="The letter's source: with it, it is found at once.")
TYPE = Query(name="type", description="Only events of this type.")
STATE = Query(
    name="state",
    description="Only letters in this state.",
    schema={"type": "string", "enum": ["open", "replayed", "discarded"]},
)
SINCE = Query(
    name="since",
    description="Only what was buried since this instant, such as 2026-11-21T09:00:00Z.",
)


def blueprint(
    core: Core, api: Api, *, blobs: DeadLetterBlobs | None = None, canary: Pulse | None = None
) -> func.Blueprint:
    """What Event Grid gave up is fetched from *blobs*; *canary* tells how the synthetic alert is."""
    bp = func.Blueprint()
    audit = Audit(core.documents, core.wall)
    desk = Desk(
        documents=core.documents, letters=core.dead_letters, publisher=core.publisher, audit=audit, wall=core.wall
    )

    @api.endpoint(
        bp,
        "health",
        "health",
        summary="Whether the app can do its work.",
        answer=Health,
        also={503: "It cannot; `checks` says why."},
    )
    async def health(req: func.HttpRequest) -> Health | func.HttpResponse:
        return await _health(core, canary)

    @api.endpoint(bp, "openapi", "openapi.json", summary="This description of the API.", answer=Description)
    async def openapi(req: func.HttpRequest) -> Description:
        return Description.model_validate(api.openapi(server=core.settings.public_url.rstrip("/")))

    @api.endpoint(
        bp,
        "audit_list",
        "audit",
        summary="Who did what to what, and why.",
        answer=AuditPage,
        query=(LIMIT, CURSOR, AFTER),
        auth="operator",
    )
    async def audit_list(req: func.HttpRequest) -> AuditPage:
        found, cursor = await listed(
            req, lambda after, newest, limit: audit.listed(after, newest_first=newest, limit=limit)
        )
        return AuditPage(items=[AuditItem.model_validate(d.body) for d in found], next=cursor)

    _add_dead_letters(bp, api, desk)

    @bp.function_name("system_sweep")
    @bp.timer_trigger(arg_name="timer", schedule="%SYSTEM_SWEEP_SCHEDULE%")
    async def system_sweep(timer: func.TimerRequest) -> None:
        async with on_time("system_sweep"):
            await core.expiry.sweep_expired()

    if blobs is not None:

        @bp.function_name("system_deadlettered")
        @bp.timer_trigger(arg_name="timer", schedule="%SYSTEM_DEADLETTERED_SCHEDULE%")
        async def system_deadlettered(timer: func.TimerRequest) -> None:
            async with on_time("system_deadlettered"):
                await blobs.collect()

    return bp


def _add_dead_letters(bp: func.Blueprint, api: Api, desk: Desk) -> None:
    @api.endpoint(
        bp,
        "deadletters_list",
        "deadletters",
        summary="Events we will not try again by ourselves, newest first.",
        answer=DeadLetterPage,
        query=(SOURCE, TYPE, STATE, SINCE, LIMIT, CURSOR),
        auth="operator",
    )
    async def deadletters_list(req: func.HttpRequest) -> DeadLetterPage:
        cursor = req.params.get("cursor")
        wanted = Wanted(
            source=req.params.get("source") or None,
            type=req.params.get("type") or None,
            state=_state_of(req.params.get("state")),
            since=_instant_of("since", req.params.get("since")),
        )
        found, position = await desk.listed(wanted, sort_of(cursor) if cursor else None, limit_of(req))
        return DeadLetterPage(
            items=[DeadLetterItem.model_validate(d.body) for d in found],
            next=cursor_of(position) if position else None,
        )

    @api.endpoint(
        bp,
        "deadletters_read",
        "deadletters/{dead_letter_id}",
        summary="One dead letter, with what was done about it.",
        answer=DeadLetterItem,
        query=(WHERE,),
        auth="operator",
    )
    async def deadletters_read(req: func.HttpRequest) -> DeadLetterItem:
        return DeadLetterItem.model_validate((await desk.find(*_named(req))).body)

    @api.endpoint(
        bp,
        "deadletters_replay",
        "deadletters/{dead_letter_id}/replay",
        method="POST",
        summary="Run the function that gave an event up once more, with the same event.",
        answer=ReplayItem,
        body=Order,
        query=(WHERE,),
        auth="operator",
        per_day=REPLAYS_A_DAY,
    )
    async def deadletters_replay(req: func.HttpRequest) -> ReplayItem:
        order, (id_, source) = body_of(req, Order), _named(req)
        return _outcome(await desk.replay(id_, caller_of(req).actor, order.reason, source))

    @api.endpoint(
        bp,
        "deadletters_discard",
        "deadletters/{dead_letter_id}/discard",
        method="POST",
        summary="Decide that an event is not wanted any more.",
        answer=DeadLetterItem,
        body=Order,
        query=(WHERE,),
        auth="operator",
        per_day=REPLAYS_A_DAY,
    )
    async def deadletters_discard(req: func.HttpRequest) -> DeadLetterItem:
        order, (id_, source) = body_of(req, Order), _named(req)
        return DeadLetterItem.model_validate((await desk.discard(id_, caller_of(req).actor, order.reason, source)).body)

    @api.endpoint(
        bp,
        "deadletters_replay_range",
        "deadletters/replay",
        method="POST",
        summary="Replay open letters of a source, a type or a time, oldest first; a dry run unless told otherwise.",
        answer=RangeItem,
        body=RangeOrder,
        auth="operator",
        per_day=RANGES_A_DAY,
    )
    async def deadletters_replay_range(req: func.HttpRequest) -> RangeItem:
        order = body_of(req, RangeOrder)
        wanted = Wanted(
            source=order.source, type=order.type, since=_zoned("since", order.since), until=_zoned("until", order.until)
        )
        if not order.dry_run and wanted == Wanted():
            raise InvalidPayloadError("name a source, a type, since or until: all letters at once are not replayed")
        progress = await desk.replay_range(
            wanted,
            caller_of(req).actor,
            order.reason,
            limit=order.limit,
            after=sort_of(order.cursor) if order.cursor else None,
            is_dry=order.dry_run,
        )
        items = [_outcome(one) for one in progress.results]
        outcomes = [item.outcome for item in items]
        return RangeItem(
            dry_run=order.dry_run,
            counts={outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
            items=items,
            next=cursor_of(progress.next) if progress.next else None,
        )


def _named(req: func.HttpRequest) -> tuple[str, str | None]:
    return req.route_params["dead_letter_id"], req.params.get("source") or None


def _outcome(one: Replayed) -> ReplayItem:
    letter = one.letter
    return ReplayItem(
        dead_letter_id=letter.id,
        source=letter.partition,
        event_id=letter.body["event_id"],
        outcome=one.outcome,
        reason=one.reason,
        state=letter.body.get("state", "open"),
    )


def _state_of(text: str | None) -> str | None:
    if text and text not in ("open", "replayed", "discarded"):
        raise InvalidPayloadError("state must be open, replayed or discarded")
    return text or None


def _instant_of(name: str, text: str | None) -> datetime | None:
    try:
        return parse_instant(text) if text else None
    except ValueError:
        raise InvalidPayloadError(f"{name} must be an instant with a zone, such as 2026-11-21T09:00:00Z") from None


def _zoned(name: str, instant: datetime | None) -> datetime | None:
    return _instant_of(name, instant.isoformat()) if instant else None


async def _health(core: Core, canary: Pulse | None) -> Health | func.HttpResponse:
    pulse: CanaryItem | None = None
    checks: dict[str, str] = {}
    try:
        await core.documents.feed("system", limit=1)
        checks["storage"] = "ok"
    except Exception as e:  # noqa: BLE001 - whatever is wrong with storage, health must say so
        # A wrong setting or a damaged store is for a person to mend, so its text is told; it never holds a secret.
        told = f"{type(e).__name__}: {redact(str(e))}"
        checks["storage"] = told if isinstance(e, ConfigurationError) else type(e).__name__
    else:
        if canary is not None:
            pulse, checks["canary"] = await _pulse(canary)
    is_well = checks["storage"] == "ok"
    health = Health(
        # A late canary is for people to look at; an instance that can answer is not to be taken away for it.
        status="ok" if is_well else "unavailable",
        checks=checks,
        wall_at=core.wall.now(),
        market_at=core.market_clock.now(),
        version=core.version,
        canary=pulse,
    )
    if is_well:
        return health
    return func.HttpResponse(health.model_dump_json(), status_code=503, mimetype="application/json")


async def _pulse(canary: Pulse) -> tuple[CanaryItem | None, str]:
    try:
        pulse = CanaryItem.model_validate(await canary())
    except TroopError as e:
        return None, type(e).__name__
    if pulse.is_late:
        return pulse, "late"
    return pulse, "ok" if pulse.last_arrived_at else "not yet sent"
