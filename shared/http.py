"""
The API's manners: problem+json (RFC 9457), ETag, cursors, and openapi.json made from the routes themselves.

A handler takes the request and returns a model (or a ready response); errors of this house become problems.
"""

import base64
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import azure.functions as func
from pydantic import BaseModel, ConfigDict

from shared.clock import parse_instant
from shared.documents import sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    PermanentError,
    RateLimitedError,
    TransientError,
    UnknownSymbolError,
)
from shared.telemetry import get_logger, redact, span

log = get_logger(__name__)

PAGE_LIMIT = 500
OVERLAP = timedelta(seconds=60)
"""How far ``?after=`` looks back, so that a commit that came late is seen; clients drop ids they know."""

FIRST_INSTANT = datetime.min.replace(tzinfo=UTC)

type Handler = Callable[[func.HttpRequest], Awaitable[BaseModel | func.HttpResponse]]


class Body(BaseModel):
    """What an endpoint says. How to check it is worked out at its first use: a cold start seldom needs any."""

    model_config = ConfigDict(defer_build=True)


class Page[T](Body):
    """A page of a list; ``next`` is the cursor of the following page, null at the end."""

    items: Sequence[T]
    next: str | None = None


class Problem(Body):
    """What went wrong and what to do (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query parameter, as openapi.json shows it."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})


LIMIT = Query(
    name="limit",
    description="How many items at most.",
    schema={"type": "integer", "minimum": 1, "maximum": PAGE_LIMIT, "default": 50},
)
CURSOR = Query(name="cursor", description="Continue a list: the `next` of the page before.")
AFTER = Query(
    name="after",
    description="Only what was recorded after this cursor, oldest first. The last 60 s before it are repeated: "
    "drop the ids you know.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A route as openapi.json shows it."""

    name: str
    method: str
    route: str
    summary: str
    answer: type[BaseModel] | str
    query: Sequence[Query]
    anonymous: bool
    status: int


class Api:
    """Declares endpoints on blueprints and remembers them for openapi.json."""

    def __init__(self) -> None:
        self.endpoints: list[Endpoint] = []

    def endpoint(
        self,
        blueprint: func.Blueprint,
        name: str,
        route: str,
        *,
        summary: str,
        answer: type[BaseModel] | str,
        method: str = "GET",
        query: Sequence[Query] = (),
        anonymous: bool = True,
        status: int = 200,
    ) -> Callable[[Handler], Handler]:
        """
        Serve *route* under /api with the decorated handler.

        *answer* is the model of the body, or its content type when it is not JSON. Without *anonymous* the
        caller needs a function key.
        """
        self.endpoints.append(
            Endpoint(
                name=name,
                method=method,
                route=route,
                summary=summary,
                answer=answer,
                query=query,
                anonymous=anonymous,
                status=status,
            )
        )
        level = func.AuthLevel.ANONYMOUS if anonymous else func.AuthLevel.FUNCTION

        def register(handler: Handler) -> Handler:
            async def serve(req: func.HttpRequest) -> func.HttpResponse:
                return await _serve(name, handler, req, status)

            blueprint.function_name(name)(blueprint.route(route, methods=[method], auth_level=level)(serve))
            return handler

        return register

    def openapi(self, *, server: str) -> dict[str, Any]:
        """The OpenAPI 3.1 description of every declared endpoint."""
        return _openapi(self.endpoints, server)


async def _serve(name: str, handler: Handler, req: func.HttpRequest, status: int) -> func.HttpResponse:
    with span(name):
        try:
            answer = await handler(req)
        except Exception as e:  # noqa: BLE001 - every trouble becomes a problem, the unexpected is logged in it
            return _problem(name, e)
    if isinstance(answer, func.HttpResponse):
        return answer
    body = answer.model_dump_json().encode()
    headers: dict[str, str] = {}
    if req.method == "GET":
        headers["ETag"] = etag = f'W/"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        if etag in req.headers.get("If-None-Match", ""):
            return func.HttpResponse(status_code=304, headers=headers)
    return func.HttpResponse(body, status_code=status, mimetype="application/json", headers=headers)


def _problem(name: str, e: Exception) -> func.HttpResponse:
    match e:
        case InvalidPayloadError():
            return problem(400, "That cannot be", str(e))
        case NotFoundError() | UnknownSymbolError():
            return problem(404, "Not found", str(e))
        case ConflictError():
            return problem(409, "Already there", str(e))
        case RateLimitedError():
            return problem(429, "Too many requests", str(e), retry_after=e.retry_after or timedelta(seconds=5))
        case TransientError():
            log.warning("request.postponed", function=name, reason=str(e))
            return problem(503, "Try again", str(e), retry_after=e.retry_after or timedelta(seconds=2))
        case PermanentError():
            return problem(422, "Refused", str(e))
        case ConfigurationError():
            log.error("request.blocked", function=name, reason=str(e))
            return problem(500, "The service is not set up right", "An operator must look at the log.")
        case _:
            log.exception("request.failed", function=name)  # noqa: LOG004 - called while it is being handled
            return problem(500, "Unexpected trouble", "The log has the details.")


def problem(status: int, title: str, detail: str, *, retry_after: timedelta | None = None) -> func.HttpResponse:
    """A problem+json answer; secrets are taken out of *detail*."""
    body = Problem(title=title, status=status, detail=redact(detail)).model_dump_json()
    headers = {"Retry-After": str(max(1, round(retry_after.total_seconds())))} if retry_after else {}
    return func.HttpResponse(body, status_code=status, mimetype="application/problem+json", headers=headers)


def cursor_of(sort: str) -> str:
    """The opaque cursor of a position in a list."""
    return base64.urlsafe_b64encode(sort.encode()).decode().rstrip("=")


def sort_of(cursor: str) -> str:
    """
    The position a cursor stands for.

    Raises:
        InvalidPayloadError: it is none of ours.

    """
    try:
        sort = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        instant, _, id_ = sort.partition("|")
        ours = sort == sort_key(parse_instant(instant), id_)
    except ValueError:
        ours, sort = False, ""
    if not ours:
        raise InvalidPayloadError("the cursor is none of ours: take it from `next` of an earlier answer")
    return sort


def limit_of(req: func.HttpRequest) -> int:
    """
    The wanted length of a page, 50 unless told.

    Raises:
        InvalidPayloadError: no number from 1 to 500.

    """
    text = req.params.get("limit", "50")
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= PAGE_LIMIT):
        raise InvalidPayloadError(f"limit must be a whole number from 1 to {PAGE_LIMIT}")
    return int(text)


class Sorted(Protocol):
    """Anything with a place in a list."""

    @property
    def sort(self) -> str: ...


type Read[T] = Callable[[str | None, bool, int], Awaitable[list[T]]]


async def listed[T: Sorted](req: func.HttpRequest, read: Read[T]) -> tuple[list[T], str | None]:
    """
    Answer the house's list parameters from *read(after, newest_first, limit)*: documents and the next cursor.

    Newest first with ``?cursor=``; with ``?after=`` what was recorded later, oldest first, beginning 60 s
    before the cursor.
    """
    limit = limit_of(req)
    after = req.params.get("after")
    if after is None:
        cursor = req.params.get("cursor")
        found = await read(sort_of(cursor) if cursor else None, True, limit)  # noqa: FBT003
        return found, cursor_of(found[-1].sort) if len(found) == limit else None
    known = sort_of(after)
    at = parse_instant(known.split("|", 1)[0])
    position = sort_key(at - min(OVERLAP, at - FIRST_INSTANT))
    items: list[T] = []
    newer = 0
    while newer < limit:
        found = await read(position, False, limit)  # noqa: FBT003
        items += found
        newer += sum(item.sort > known for item in found)
        if len(found) < limit:
            break
        position = found[-1].sort
    newest = max([known, *(item.sort for item in items)])
    return items, cursor_of(newest)


def _openapi(endpoints: Sequence[Endpoint], server: str) -> dict[str, Any]:
    from pydantic.json_schema import models_json_schema

    models = {e.answer for e in endpoints if not isinstance(e.answer, str)} | {Problem}
    ordered = sorted(models, key=lambda model: model.__name__)
    refs, definitions = models_json_schema(
        [(model, "serialization") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for e in endpoints:
        names = [part.strip("{}?").split(":")[0] for part in e.route.split("/") if part.startswith("{")]
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ] + [{"name": q.name, "in": "query", "description": q.description, "schema": dict(q.schema)} for q in e.query]
        content = (
            {e.answer: {"schema": {"type": "string"}}}
            if isinstance(e.answer, str)
            else {"application/json": {"schema": refs[(e.answer, "serialization")]}}
        )
        answers: dict[str, Any] = {
            str(e.status): {"description": e.summary, "content": content},
            "default": {
                "description": "What went wrong and what to do.",
                "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            },
        }
        operation: dict[str, Any] = {"operationId": e.name, "summary": e.summary, "responses": answers}
        if parameters:
            operation["parameters"] = parameters
        if not e.anonymous:
            operation["security"] = [{"functionKey": []}]
        paths.setdefault(f"/{e.route}", {})[e.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "TROOP", "version": "1", "description": "Signals, alerts and posts from market data."},
        "servers": [{"url": f"{server}/api"}],
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"functionKey": {"type": "apiKey", "in": "header", "name": "x-functions-key"}},
        },
    }
