"""
The switchboard of faults: what the embedded cloud does wrong on purpose, and how often.

``PUT /faults`` replaces what is switched on, ``GET`` shows it in the same form, ``DELETE`` ends all of it.
``GET /faults/known`` lists what there is to script for the replayed providers. The dice are seeded, so the same
requests in the same order meet the same faults.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from http import HTTPStatus
from random import Random
from typing import Annotated, Any, Literal, Self, get_args

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infra.local.replay.desk import Strike
from infra.local.replay.refusals import REFUSALS
from shared.errors import InvalidPayloadError

Chance = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(ge=0, le=600_000)]

PREFIXES: Mapping[str, str] = {
    "/topic/api/events": "topic",
    "/api/events": "topic",
    "/discord/api/": "discord",
    "/client": "signalr",
    "/api/hubs": "signalr",
    "/api/v1": "signalr",
    "/alpha_vantage": "alpha_vantage",
    "/finnhub": "finnhub",
    "/twelve_data": "twelve_data",
    "/polygon": "polygon",
}

# The replayed providers call ``asked`` on their own, to count what struck.
ASK_THEMSELVES = frozenset(REFUSALS)

type Kind = Literal["latency", "reset", "truncated", "html", "throttled", "stale", "prose", "refusal"]

# What a step of this kind may say beside its rate, its count and where it strikes.
DETAILS: Mapping[str, frozenset[str]] = {
    "latency": frozenset({"ms"}),
    "reset": frozenset(),
    "truncated": frozenset(),
    "html": frozenset({"status"}),
    "throttled": frozenset({"headers", "retry_after"}),
    "stale": frozenset({"sessions"}),
    "prose": frozenset(),
    "refusal": frozenset({"refusal", "headers"}),
}


class Fault(BaseModel):
    """What goes wrong with requests to one target; ``rate`` says how often latency and status strike."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    latency_ms: Milliseconds = 0
    status: Annotated[int, Field(ge=400, le=599)] | None = None
    retry_after: Annotated[float, Field(ge=0)] = 1.0
    rate: Chance = 1
    cut: Chance = 0
    accept_then_cut: Chance = 0


class Step(BaseModel):
    """
    One fault of a provider's script: of the calls whose path and query hold *where*, it strikes *rate* of them.

    After *times* strikes it is over; without it it goes on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Kind
    rate: Chance = 1
    times: Annotated[int, Field(ge=1)] | None = None
    where: str = ""
    ms: Milliseconds = 1000
    status: Annotated[int, Field(ge=500, le=599)] = 502
    headers: bool = True
    retry_after: Annotated[float, Field(ge=0)] | None = None
    sessions: Annotated[int, Field(ge=1, le=250)] = 1
    refusal: str = ""

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        known = DETAILS[self.kind] | {"kind", "rate", "times", "where"}
        if foreign := sorted(self.model_fields_set - known):
            raise ValueError(f"{foreign[0]!r} says nothing of {self.kind!r}; it takes {', '.join(sorted(known))}")
        if self.kind == "refusal" and not self.refusal:
            raise ValueError("'refusal' is missing: name one of those that GET /faults/known lists")
        return self

    def strike(self) -> Strike:
        """What the provider shall do."""
        match self.kind:
            case "truncated":
                return Strike(is_truncated=True)
            case "html":
                return Strike(page=self.status)
            case "stale":
                return Strike(sessions=self.sessions)
            case "prose":
                return Strike(refusal="unknown_sentence")
            case "throttled":
                return Strike(refusal="per_minute", status=429, retry_after=self.retry_after, is_bare=not self.headers)
            case _:
                return Strike(refusal=self.refusal, is_bare=not self.headers)


class ProviderFault(Fault):
    """What goes wrong with a replayed provider: as with every target, and by a script, whose first strike counts."""

    script: list[Step] = []


class TopicFault(Fault):
    """What goes wrong with the topic: its front door, and how it delivers."""

    duplicate: Annotated[int, Field(ge=1, le=20)] = 1
    reorder_ms: Milliseconds = 0
    drop_answer: Chance = 0


class ClockFault(BaseModel):
    """How far the providers' clocks are ahead of the app's; below zero they are behind."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    market_skew_s: float = 0
    wall_skew_s: float = 0


class Faults(BaseModel):
    """Everything that can be switched on, as it stands on the wire."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = 0
    topic: TopicFault | None = None
    discord: Fault | None = None
    signalr: Fault | None = None
    alpha_vantage: ProviderFault | None = None
    finnhub: ProviderFault | None = None
    twelve_data: ProviderFault | None = None
    polygon: ProviderFault | None = None
    clock: ClockFault | None = None

    @model_validator(mode="after")
    def _knows_its_refusals(self) -> Self:
        for target, known in REFUSALS.items():
            fault = getattr(self, target)
            for step in fault.script if fault else ():
                if step.refusal and step.refusal not in known:
                    raise ValueError(f"{target} has no refusal {step.refusal!r}; known are {', '.join(known)}")
        return self


class Switchboard:
    """Holds the faults that are on, and lets them strike."""

    def __init__(self) -> None:
        self._faults = Faults()
        self._dice = Random(0)  # noqa: S311 - dice must be repeatable, not secret
        self.hits: Counter[str] = Counter()
        self._struck: Counter[tuple[str, int]] = Counter()

    def set(self, wanted: object) -> None:
        """
        Replace what is switched on.

        Raises:
            InvalidPayloadError: a target, a field or a value is wrong; the text names it.

        """
        try:
            self._faults = Faults.model_validate(wanted)
        except ValidationError as e:
            raise InvalidPayloadError(_explain(e)) from e
        self._dice.seed(self._faults.seed)
        self.hits.clear()
        self._struck.clear()

    def clear(self) -> None:
        """Switch everything off."""
        self.set({})

    def shown(self) -> dict[str, Any]:
        """What is on, in the form that ``set`` takes."""
        return self._faults.model_dump(exclude_unset=True)

    def script(self) -> list[dict[str, Any]]:
        """Every step of every script with how often it struck; ``left`` is None where it never ends."""
        return [
            {
                "target": target,
                **step.model_dump(exclude_unset=True),
                "struck": self._struck[target, place],
                "left": None if step.times is None else step.times - self._struck[target, place],
            }
            for target in REFUSALS
            for place, step in enumerate(self._script(target))
        ]

    @property
    def topic(self) -> TopicFault:
        """How the topic misbehaves now."""
        return self._faults.topic or TopicFault()

    @property
    def clock(self) -> ClockFault:
        """How the providers' clocks are wrong now."""
        return self._faults.clock or ClockFault()

    def strikes(self, name: str, chance: float) -> bool:
        """Throw the dice for one fault and count the hit."""
        if chance <= 0 or (chance < 1 and self._dice.random() >= chance):
            return False
        self.hits[name] += 1
        return True

    def up_to(self, most: float) -> float:
        """A random amount between nothing and ``most``."""
        return self._dice.uniform(0.0, most)

    async def before(self, target: str, request: web.Request) -> web.Response | None:
        """Strike before the request takes effect: an answer to give instead, or None to go on."""
        fault = self._fault(target)
        if fault is None:
            return None
        if fault.latency_ms and self.strikes(f"{target}.latency_ms", fault.rate):
            await asyncio.sleep(fault.latency_ms / 1000)
        if self.strikes(f"{target}.cut", fault.cut):
            return _cut(request)
        if fault.status is not None and self.strikes(f"{target}.status", fault.rate):
            return _refusal(fault.status, fault.retry_after)
        return None

    async def asked(self, provider: str, request: web.Request) -> web.Response | Strike | None:
        """Strike as ``before`` does, then by the provider's script."""
        answer = await self.before(provider, request)
        if answer is not None:
            return answer
        for place, step in enumerate(self._script(provider)):
            is_over = step.times is not None and self._struck[provider, place] >= step.times
            if is_over or step.where not in request.path_qs:
                continue
            if not self.strikes(f"{provider}.{step.kind}", step.rate):
                continue
            self._struck[provider, place] += 1
            if step.kind == "latency":
                await asyncio.sleep(step.ms / 1000)
            elif step.kind == "reset":
                return _cut(request)
            else:
                return step.strike()
        return None

    async def after[R: web.StreamResponse](self, target: str, request: web.Request, response: R) -> R:
        """Strike after the request took effect: the caller must not learn what became of it."""
        fault = self._fault(target)
        if fault is not None and self.strikes(f"{target}.accept_then_cut", fault.accept_then_cut):
            _cut(request)
        return response

    def middleware(self) -> Middleware:
        """An aiohttp middleware that lets faults strike by the path's prefix."""

        @web.middleware
        async def strike(request: web.Request, handler: Handler) -> web.StreamResponse:
            target = next((t for prefix, t in PREFIXES.items() if request.path.startswith(prefix)), None)
            if target is None:
                return await handler(request)
            answer = None if target in ASK_THEMSELVES else await self.before(target, request)
            if answer is not None:
                return answer
            return await self.after(target, request, await handler(request))

        return strike

    def routes(self) -> list[web.AbstractRouteDef]:
        """The switchboard's own paths."""
        return [
            web.get("/faults", self._show),
            web.put("/faults", self._replace),
            web.delete("/faults", self._end),
            web.get("/faults/known", self._show_known),
        ]

    def _fault(self, target: str) -> Fault | None:
        fault = getattr(self._faults, target, None)
        return fault if isinstance(fault, Fault) else None

    def _script(self, target: str) -> list[Step]:
        fault = self._fault(target)
        return fault.script if isinstance(fault, ProviderFault) else []

    async def _show_known(self, request: web.Request) -> web.Response:
        kinds = {kind: sorted(details) for kind, details in DETAILS.items()}
        refusals = {
            target: {one.reason: {"status": one.status, "body": one.body} for one in known.values()}
            for target, known in REFUSALS.items()
        }
        return web.json_response({"kinds": kinds, "refusals": refusals})

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response(self.shown())

    async def _replace(self, request: web.Request) -> web.Response:
        try:
            self.set(json.loads(await request.text()))
        except ValueError as e:
            return problem(400, f"the body is no JSON: {e}")
        except InvalidPayloadError as e:
            return problem(400, str(e))
        return web.json_response(self.shown())

    async def _end(self, request: web.Request) -> web.Response:
        self.clear()
        return web.json_response(self.shown())


def problem(status: int, detail: str) -> web.Response:
    """An RFC 9457 answer, for everything of the cloud that has no form of its own."""
    body = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return web.json_response(body, status=status, content_type="application/problem+json")


def _cut(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)  # nobody reads it: the connection is gone


def _refusal(status: int, retry_after: float) -> web.Response:
    body: dict[str, Any] = {"message": f"fault: this target answers {status}"}
    headers = {}
    if status in {429, 503}:
        body |= {"retry_after": retry_after, "global": False}
        headers["Retry-After"] = f"{retry_after:g}"
    return web.json_response(body, status=status, headers=headers)


def _explain(e: ValidationError) -> str:
    first = e.errors(include_url=False)[0]
    match first["type"], first["loc"]:
        case "value_error", ():
            return str(first["ctx"]["error"])
        case _, ():
            return "the body is one object of targets, such as {'discord': {'status': 500}}"
        case "extra_forbidden", (target,):
            return f"unknown target {target!r}; known are {', '.join(Faults.model_fields)}"
        case "extra_forbidden", (target, field):
            return f"unknown field {field!r} of {target}; known are {', '.join(_fields_of(str(target)))}"
        case _, loc:
            return f"{'.'.join(str(part) for part in loc)}: {first['msg']}"


def _fields_of(target: str) -> list[str]:
    [model] = (kind for kind in get_args(Faults.model_fields[target].annotation) if kind is not type(None))
    return list(model.model_fields)
