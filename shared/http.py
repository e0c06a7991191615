"""
The API's manners: who may call, problem+json (RFC 9457), ETag, cursors, and openapi.json made from the routes.

A handler takes the request and returns a model (or a ready response); errors of this house become problems. Before
it is called, the Api has found out who asks (``shared.identity.caller_of``) and whether they may.
"""

import base64
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import azure.functions as func
from pydantic import BaseModel, ConfigDict, ValidationError

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
from shared.identity import NOBODY, Auth, Caller, ForbiddenError, Tokens, UnauthenticatedError, bearer_of, identify
from shared.limits import Limits, client_of
from shared.telemetry import get_logger, redact, span

log = get_logger(__name__)

BEARER = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "An access token of the issuer OIDC_ISSUER, meant for OIDC_AUDIENCE and signed with RS256.",
}

ABOUT = "Signals, alerts and posts from market data. A query parameter without a value counts as not given."

PAGE_LIMIT = 500
OVERLAP = timedelta(seconds=60)
"""How far ``?after=`` looks back, so that a commit that came late is seen; clients drop ids they know."""

LARGEST_BODY = 64 * 1024
DEEPEST_BODY = 20

FIRST_INSTANT = datetime.min.replace(tzinfo=UTC)

type Handler = Callable[[func.HttpRequest], Awaitable[BaseModel | func.HttpResponse]]


class Body(BaseModel):
    """What an endpoint says. How to check it is worked out at its first use: a cold start seldom needs any."""

    model_config = ConfigDict(defer_build=True)


class BodyError(InvalidPayloadError):
    """The body of a request is not what the endpoint takes; ``status`` says in which way."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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
    auth: Auth
    status: int
    body: type[BaseModel] | Callable[[], type[BaseModel]] | None = None
    per_day: int | None = None
    also: Mapping[int, str] = field(default_factory=dict)

    @property
    def body_model(self) -> type[BaseModel] | None:
        """The model of what a caller sends; one that is only named so far is loaded now."""
        return self.body if self.body is None or isinstance(self.body, type) else self.body()

    @property
    def anonymous(self) -> bool:
        """Whether anybody may call it."""
        return self.auth == "anonymous"

    @property
    def is_personal(self) -> bool:
        """Whether we ourselves ask who calls: the host lets everybody through to it."""
        return self.auth in ("subscriber", "operator")


class Api:
    """
    Declares endpoints on blueprints, lets through who may call them, and remembers them for openapi.json.

    Without *tokens* nobody can be signed in, so personal endpoints refuse everybody; without *limits* nothing is
    counted.
    """

    def __init__(self, tokens: Tokens | None = None, limits: Limits | None = None) -> None:
        self.endpoints: list[Endpoint] = []
        self._tokens = tokens
        self._limits = limits

    def endpoint(  # noqa: PLR0913 - one name for each thing that can be said of a route
        self,
        blueprint: func.Blueprint,
        name: str,
        route: str,
        *,
        summary: str,
        answer: type[BaseModel] | str,
        method: str = "GET",
        query: Sequence[Query] = (),
        auth: Auth | None = None,
        anonymous: bool = True,
        status: int = 200,
        body: type[BaseModel] | Callable[[], type[BaseModel]] | None = None,
        per_day: int | None = None,
        also: Mapping[int, str] | None = None,
    ) -> Callable[[Handler], Handler]:
        """
        Serve *route* under /api with the decorated handler.

        *answer* is the model of the body, or its content type when it is not JSON; *body* is the model that the
        handler reads with ``body_of``, or what imports it where a cold start shall not. *auth* says whom it serves:
        ``anonymous`` (the default) anybody, ``key`` who shows the host the function key (``anonymous=False`` says the
        same), ``subscriber`` and ``operator`` who is signed in, in that role. A client may call it *per_day* times a
        day. *also* are other statuses under which the answer may come, each with what it says.
        """
        endpoint = Endpoint(
            name=name,
            method=method,
            route=route,
            summary=summary,
            answer=answer,
            query=query,
            auth=auth or ("anonymous" if anonymous else "key"),
            status=status,
            body=body,
            per_day=per_day,
            also=also or {},
        )
        self.endpoints.append(endpoint)
        level = func.AuthLevel.FUNCTION if endpoint.auth == "key" else func.AuthLevel.ANONYMOUS

        def register(handler: Handler) -> Handler:
            async def serve(req: func.HttpRequest) -> func.HttpResponse:
                with span(name):
                    return await self._serve(endpoint, handler, req)

            blueprint.function_name(name)(blueprint.route(route, methods=[method], auth_level=level)(serve))
            return handler

        return register

    async def _serve(self, endpoint: Endpoint, handler: Handler, req: func.HttpRequest) -> func.HttpResponse:
        try:
            caller = await self._admit(endpoint, req)
            answer = await handler(req)
        except Exception as e:  # noqa: BLE001 - every trouble becomes a problem, the unexpected is logged in it
            return _problem(endpoint.name, e)
        if isinstance(answer, func.HttpResponse):
            return answer
        return _answer(req, answer, endpoint.status, caller)

    async def _admit(self, endpoint: Endpoint, req: func.HttpRequest) -> Caller:
        try:
            caller = await self._caller(endpoint, req)
        except UnauthenticatedError:
            self._count(NOBODY, req)  # who tries tokens has no more tries than others have calls
            raise
        self._count(caller, req)
        if endpoint.auth == "operator" and not caller.is_operator:
            raise ForbiddenError("only an operator may do this: sign in as one (the token's `roles` say operator)")
        if endpoint.per_day is not None and self._limits is not None:
            client = client_of(caller, req.headers) or caller.actor
            await self._limits.quota.take(client, endpoint.name, endpoint.per_day)
        identify(req, caller)
        return caller

    def _count(self, caller: Caller, req: func.HttpRequest) -> None:
        if self._limits is not None and (client := client_of(caller, req.headers)) is not None:
            self._limits.rate.take(client)

    async def _caller(self, endpoint: Endpoint, req: func.HttpRequest) -> Caller:
        """Who asks; a token is verified wherever it says that it is of our issuer, also where none is needed."""
        token = bearer_of(req.headers)
        if endpoint.is_personal:
            if self._tokens is None:
                raise UnauthenticatedError(
                    "nobody can sign in here yet: an operator must set OIDC_ISSUER, OIDC_AUDIENCE and OIDC_JWKS_URL",
                    is_missing=True,
                )
            if token is None:
                raise UnauthenticatedError(
                    "sign in, and send the token as Authorization: Bearer TOKEN", is_missing=True
                )
            return await self._tokens.caller(token)
        caller = NOBODY
        if self._tokens is not None and token is not None and self._tokens.claims_to_be_ours(token):
            caller = await self._tokens.caller(token)
        return replace(caller, is_key=True) if endpoint.auth == "key" else caller

    def openapi(self, *, server: str) -> dict[str, Any]:
        """The OpenAPI 3.1 description of every declared endpoint."""
        return _openapi(self.endpoints, server)


def _answer(req: func.HttpRequest, answer: BaseModel, status: int, caller: Caller) -> func.HttpResponse:
    body = answer.model_dump_json().encode()
    # What somebody in particular was told must not be kept for others by a cache in between.
    headers = {"Cache-Control": "private, no-cache", "Vary": "Authorization"} if caller.is_known else {}
    if req.method == "GET":
        headers["ETag"] = etag = f'W/"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        if etag in req.headers.get("If-None-Match", ""):
            return func.HttpResponse(status_code=304, headers=headers)
    return func.HttpResponse(body, status_code=status, mimetype="application/json", headers=headers)


def _problem(name: str, e: Exception) -> func.HttpResponse:
    match e:
        case UnauthenticatedError():
            log.info("request.not_signed_in", function=name, reason=str(e))
            challenge = 'Bearer realm="troop"' + ("" if e.is_missing else ', error="invalid_token"')
            return problem(401, "Sign in first", str(e), headers={"WWW-Authenticate": challenge})
        case ForbiddenError():
            challenge = 'Bearer realm="troop", error="insufficient_scope"'
            return problem(403, "Not yours to do", str(e), headers={"WWW-Authenticate": challenge})
        case BodyError():
            return problem(e.status, "That cannot be", str(e))
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


def problem(
    status: int,
    title: str,
    detail: str,
    *,
    retry_after: timedelta | None = None,
    headers: Mapping[str, str] | None = None,
) -> func.HttpResponse:
    """A problem+json answer; secrets are taken out of *detail*."""
    body = Problem(title=title, status=status, detail=redact(detail)).model_dump_json()
    wait = {"Retry-After": str(max(1, math.ceil(retry_after.total_seconds())))} if retry_after else {}
    return func.HttpResponse(
        body, status_code=status, mimetype="application/problem+json", headers={**wait, **(headers or {})}
    )


def body_of[T: BaseModel](req: func.HttpRequest, model: type[T]) -> T:
    """
    The JSON body of a request as *model*, the one that the endpoint declares.

    Raises:
        BodyError: it is not what the endpoint takes; names the field, and shows no value.

    """
    try:
        return model.model_validate_json(json_of(req))
    except ValidationError as e:
        raise BodyError(422, _explain(e)) from None


def json_of(req: func.HttpRequest) -> bytes:
    """
    The body of a request, which is JSON that has one meaning.

    It may have 64 kB and be 20 levels deep; what two readers could understand differently (a name given twice, NaN,
    half a character) is refused.

    Raises:
        BodyError: it is something else; says what.

    """
    kind = req.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise BodyError(415, "send JSON, with the header Content-Type: application/json")
    raw = req.get_body()
    if len(raw) > LARGEST_BODY:
        raise BodyError(413, f"the body has {len(raw):,} bytes: send {LARGEST_BODY:,} at most")
    if not raw.strip():
        raise BodyError(400, "the body is empty: send a JSON object")
    _must_be_plain_json(raw)
    return raw


def _must_be_plain_json(raw: bytes) -> None:
    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=_once_each, parse_constant=_refuse_constant, parse_float=_finite
        )
        _must_be_shallow(value, 1)
    except RecursionError:
        raise BodyError(400, f"the body is nested more than {DEEPEST_BODY} levels deep: send it flatter") from None
    except UnicodeError:
        raise BodyError(400, "the body holds text that is no UTF-8: send it as UTF-8") from None
    except json.JSONDecodeError as e:
        raise BodyError(400, f"the body is no JSON: {e.msg} in line {e.lineno}, column {e.colno}") from None
    except ValueError:
        raise BodyError(400, "the body holds a number that is too large: send a smaller one") from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BodyError(400, f"the body names {_shown(twice)} twice: send it once")
    return found


def _refuse_constant(name: str) -> float:
    raise BodyError(400, f"the body holds {name}, which is no number in JSON: leave it out or send null")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _must_be_shallow(value: object, level: int) -> None:
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is no text
    elif isinstance(value, dict | list):
        if level > DEEPEST_BODY:
            raise RecursionError
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _must_be_shallow(part, level + 1)


def _explain(e: ValidationError) -> str:
    faults = e.errors(include_input=False, include_url=False, include_context=False)
    shown = [f"{_shown('.'.join(map(str, fault['loc'])) or 'the body')}: {fault['msg']}" for fault in faults[:10]]
    more = f" (and {len(faults) - 10} more)" if len(faults) > 10 else ""
    return "; ".join(shown) + more


def _shown(name: str) -> str:
    """A name that a caller made up, short and in one line."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= 80 else f"{text[:79]}…"


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
    from pydantic.json_schema import JsonSchemaMode, models_json_schema

    answers_in = {e.answer for e in endpoints if not isinstance(e.answer, str)} | {Problem}
    bodies = {e.name: model for e in endpoints if (model := e.body_model) is not None}
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((model, "serialization") for model in sorted(answers_in, key=_name)),
        *((model, "validation") for model in sorted(set(bodies.values()), key=_name)),
    ]
    refs, definitions = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
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
            **{str(status): {"description": text, "content": content} for status, text in e.also.items()},
            **_bare(e),
            "default": {
                "description": "What went wrong and what to do.",
                "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            },
        }
        operation: dict[str, Any] = {"operationId": e.name, "summary": e.summary, "responses": answers}
        if parameters:
            operation["parameters"] = parameters
        if e.name in bodies:
            schema = refs[(bodies[e.name], "validation")]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if e.auth == "operator":
            operation["description"] = "For operators: the token's `roles` must hold `operator`."
        if e.auth != "anonymous":
            operation["security"] = [{"bearer" if e.is_personal else "functionKey": []}]
        paths.setdefault(f"/{e.route}", {})[e.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "TROOP", "version": "1", "description": ABOUT},
        "servers": [{"url": f"{server}/api"}],
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {
                "functionKey": {"type": "apiKey", "in": "header", "name": "x-functions-key"},
                **({"bearer": BEARER} if any(e.is_personal for e in endpoints) else {}),
            },
        },
    }


def _bare(e: Endpoint) -> dict[str, Any]:
    """The answers of an endpoint that are no JSON of ours."""
    answers = {}
    if e.method == "GET" and not isinstance(e.answer, str):
        answers["304"] = {"description": "It is still as you know it, by the ETag in If-None-Match."}
    if e.auth == "key":
        answers["401"] = {"description": "The function key is missing or wrong: the host says so in its own words."}
    return answers


def _name(model: type[BaseModel]) -> str:
    return model.__name__
