"""What every operator and client asks first: health, openapi.json, dead letters. And the sweep of what expired."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import azure.functions as func

from shared.documents import Document
from shared.errors import ConfigurationError
from shared.http import CURSOR, LIMIT, Api, Body, Page, cursor_of, limit_of, sort_of
from shared.inbound import on_time
from shared.telemetry import redact
from shared.wiring import Core


class Health(Body):
    """Whether the app can do its work, and what time it thinks it is."""

    status: str
    checks: Mapping[str, str]
    wall_at: datetime
    market_at: datetime
    version: str


class DeadLetterItem(Body):
    """An event we will not try again by ourselves."""

    dead_letter_id: str
    source: str
    event_id: str
    reason: str
    event: Mapping[str, Any]
    times: int
    recorded_at: datetime


class DeadLetterPage(Page[DeadLetterItem]):
    """Dead letters, newest first."""


class Description(Body):
    """An OpenAPI 3.1 document."""

    openapi: str
    info: Mapping[str, Any]
    servers: Sequence[Mapping[str, Any]]
    paths: Mapping[str, Any]
    components: Mapping[str, Any]


def blueprint(core: Core, api: Api) -> func.Blueprint:
    bp = func.Blueprint()

    @api.endpoint(bp, "health", "health", summary="Whether the app can do its work.", answer=Health)
    async def health(req: func.HttpRequest) -> Health | func.HttpResponse:
        return await _health(core)

    @api.endpoint(
        bp,
        "deadletters_list",
        "deadletters",
        summary="Events we will not try again by ourselves, newest first.",
        answer=DeadLetterPage,
        query=(LIMIT, CURSOR),
        anonymous=False,
    )
    async def deadletters_list(req: func.HttpRequest) -> DeadLetterPage:
        limit, cursor = limit_of(req), req.params.get("cursor")
        found = await core.dead_letters.newest(after=sort_of(cursor) if cursor else None, limit=limit)
        return DeadLetterPage(items=_items(found), next=cursor_of(found[-1].sort) if len(found) == limit else None)

    @api.endpoint(bp, "openapi", "openapi.json", summary="This description of the API.", answer=Description)
    async def openapi(req: func.HttpRequest) -> Description:
        return Description.model_validate(api.openapi(server=core.settings.public_url.rstrip("/")))

    @bp.function_name("system_sweep")
    @bp.timer_trigger(arg_name="timer", schedule="%SYSTEM_SWEEP_SCHEDULE%")
    async def system_sweep(timer: func.TimerRequest) -> None:
        async with on_time("system_sweep"):
            await core.expiry.sweep_expired()

    return bp


def _items(documents: Sequence[Document]) -> list[DeadLetterItem]:
    return [DeadLetterItem.model_validate(d.body) for d in documents]


async def _health(core: Core) -> Health | func.HttpResponse:
    try:
        await core.documents.feed("system", limit=1)
        storage = "ok"
    except Exception as e:  # noqa: BLE001 - whatever is wrong with storage, health must say so
        # A wrong setting or a damaged store is for a person to mend, so its text is told; it never holds a secret.
        storage = f"{type(e).__name__}: {redact(str(e))}" if isinstance(e, ConfigurationError) else type(e).__name__
    health = Health(
        status="ok" if storage == "ok" else "unavailable",
        checks={"storage": storage},
        wall_at=core.wall.now(),
        market_at=core.market_clock.now(),
        version=core.version,
    )
    if storage == "ok":
        return health
    return func.HttpResponse(health.model_dump_json(), status_code=503, mimetype="application/json")
