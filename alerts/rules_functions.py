"""How subscribers say what they want to hear: /api/subscriptions, endpoints, preferences, mutes and unsubscribe."""

import hashlib
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Annotated, Any, Literal

import azure.functions as func
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, Strict

from alerts.logic.policy import LONGEST_COOLDOWN
from alerts.models import Severity
from alerts.rules import LONGEST_MUTE, MOST_ENTRIES, MOST_SYMBOLS, Actor, ChangedError, RuleService, actor_of
from alerts.subscriptions import (
    ADDRESSED,
    Digest,
    Endpoint,
    Kind,
    Mute,
    Preferences,
    Rules,
    Subscription,
    preferences_id,
)
from shared.errors import InvalidPayloadError, NotFoundError
from shared.http import Api, Body, Page, Query, body_of, problem
from shared.identity import ForbiddenError, caller_of

TESTS_A_DAY = 10
_DAY_MINUTES = 24 * 60

type Name = Annotated[str, Field(min_length=1, max_length=100)]
type Symbol = Annotated[str, Field(min_length=1, max_length=20)]
type Price = Annotated[float, Field(gt=0, le=1e9)]
type Count = Annotated[int, Field(ge=1, le=1000)]
type ClockTime = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]


class SubscriptionDraft(Body):
    """What to hear, and on which channels. null for symbols, entries and directions means all."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    channels: Annotated[list[Name], Field(min_length=1, max_length=10)]
    kind: Kind = Kind.SIGNAL
    symbols: Annotated[list[Symbol], Field(min_length=1, max_length=MOST_SYMBOLS)] | None = None
    entries: Annotated[list[Name], Field(min_length=1, max_length=MOST_ENTRIES)] | None = None
    directions: Annotated[list[Literal["long", "short"]], Field(min_length=1, max_length=2)] | None = None
    min_strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    severity: Severity = Severity.INFO
    interval: Literal["1d", "1h", "1m"] | None = None
    price_above: Price | None = None
    price_below: Price | None = None
    percent: Annotated[float, Field(gt=0, le=1000)] | None = None
    window: Annotated[int, Field(ge=1, le=100)] | None = None
    times_usual: Annotated[float, Field(gt=1, le=1000)] | None = None
    hysteresis: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    cooldown_minutes: Annotated[int, Field(ge=1, le=LONGEST_COOLDOWN // timedelta(minutes=1))] | None = None
    digest: Digest | None = None
    cap_per_day: Count | None = None
    freshness_minutes: Annotated[int, Field(ge=1, le=30 * _DAY_MINUTES)] | None = _DAY_MINUTES
    resolves: bool = True

    def of(self, subscriber: str, id_: str = "") -> Subscription:
        """The subscription that this describes."""
        return Subscription(
            subscription_id=id_,
            subscriber=subscriber,
            channels=tuple(self.channels),
            symbols=_names(self.symbols),
            entries=_names(self.entries),
            directions=_names(self.directions),
            cooldown=_span(self.cooldown_minutes),
            freshness=_span(self.freshness_minutes),
            **{name: getattr(self, name) for name in _ALIKE},
        )


_ALIKE = (
    "kind",
    "min_strength",
    "min_confidence",
    "severity",
    "interval",
    "price_above",
    "price_below",
    "percent",
    "window",
    "times_usual",
    "hysteresis",
    "digest",
    "cap_per_day",
    "resolves",
)


class SubscriptionItem(Body):
    """A subscription as it is stored; see SubscriptionDraft."""

    subscription_id: str
    subscriber: str
    channels: Sequence[str]
    kind: Kind
    symbols: Sequence[str] | None
    entries: Sequence[str] | None
    directions: Sequence[str] | None
    min_strength: float
    min_confidence: float | None
    severity: Severity
    interval: str | None
    price_above: float | None
    price_below: float | None
    percent: float | None
    window: int | None
    times_usual: float | None
    hysteresis: float
    cooldown_minutes: float | None
    digest: Digest | None
    cap_per_day: int | None
    freshness_minutes: float | None
    resolves: bool
    since: datetime | None


class SubscriptionPage(Page[SubscriptionItem]):
    """All subscriptions of a subscriber."""


class EndpointDraft(Body):
    """Where to reach you: an e-mail address, or a Discord webhook's URL. It is never shown again, only masked."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    address: Annotated[SecretStr, Field(min_length=3, max_length=400)]


class EndpointItem(Body):
    """Where a subscriber is reached on a channel, masked, and how that has been going."""

    channel: str
    shown: str
    is_enabled: bool
    disabled_reason: str | None
    failures: int
    first_failed_at: datetime | None


class EndpointPage(Page[EndpointItem]):
    """All endpoints of a subscriber."""


class PreferencesDraft(Body):
    """What holds for all subscriptions: quiet hours as times of day in the zone, and how many alerts a day."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    zone: Name = "UTC"
    quiet_from: ClockTime | None = None
    quiet_to: ClockTime | None = None
    cap_per_day: Count | None = None


class PreferencesItem(Body):
    """Preferences as they are stored."""

    subscriber: str
    zone: str
    quiet_from: str | None
    quiet_to: str | None
    cap_per_day: int | None


class MuteDraft(Body):
    """Silence, for some symbols or entries or (null) for all, until an instant of market time or for so long."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    until: Annotated[AwareDatetime, Strict()] | None = None
    for_minutes: Annotated[int, Field(ge=1, le=LONGEST_MUTE // timedelta(minutes=1))] | None = None
    symbols: Annotated[list[Symbol], Field(min_length=1, max_length=MOST_SYMBOLS)] | None = None
    entries: Annotated[list[Name], Field(min_length=1, max_length=MOST_ENTRIES)] | None = None
    reason: Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""
    subscriber: Name | None = None


class MuteItem(Body):
    """A mute: whose, by whom, of what, and until when (market time)."""

    mute_id: str
    subscriber: str
    author: str
    symbols: Sequence[str] | None
    entries: Sequence[str] | None
    until: datetime
    reason: str


class MutePage(Page[MuteItem]):
    """All mutes of a subscriber that have not ended."""


class DoneItem(Body):
    """What was done."""

    done: str


SUBSCRIBER = Query(name="subscriber", description="Operators: whose, if not your own. It is written down.")
REASON = Query(name="reason", description="Operators: why, where it is not your own.")
TOKEN = Query(name="token", description="The token of the link in a message.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesWired:
    """What the endpoints need."""

    rules: RuleService


def blueprint(wired: RulesWired, api: Api) -> func.Blueprint:
    bp = func.Blueprint()
    rules = wired.rules
    _subscriptions(bp, api, rules)
    _endpoints(bp, api, rules)
    _preferences(bp, api, rules)
    _mutes(bp, api, rules)
    _unsubscribe(bp, api, rules)
    return bp


def _subscriptions(bp: func.Blueprint, api: Api, rules: RuleService) -> None:
    @api.endpoint(
        bp,
        "alerts_subscriptions_list",
        "subscriptions",
        summary="What you asked to hear.",
        answer=SubscriptionPage,
        query=(SUBSCRIBER,),
        auth="subscriber",
    )
    async def listed(req: func.HttpRequest) -> SubscriptionPage:
        found = await rules.read(_actor(req))
        return SubscriptionPage(items=[_subscription_item(s) for s in found.subscriptions.values()])

    @api.endpoint(
        bp,
        "alerts_subscriptions_create",
        "subscriptions",
        method="POST",
        summary="Ask to hear something; the same again is the same subscription.",
        answer=SubscriptionItem,
        body=SubscriptionDraft,
        auth="subscriber",
        status=201,
        also={200: "You had asked for the same before."},
    )
    async def create(req: func.HttpRequest) -> func.HttpResponse:
        draft = body_of(req, SubscriptionDraft)
        found, new, is_new = await rules.subscribe(draft.of(_own(req).subscriber))
        answer = _tagged(req, _subscription_item(new), _tag(found, new.subscription_id), status=201 if is_new else 200)
        answer.headers["Location"] = f"/api/subscriptions/{new.subscription_id}"
        return answer

    @api.endpoint(
        bp,
        "alerts_subscriptions_read",
        "subscriptions/{id}",
        summary="One subscription, with the ETag that changing it may show.",
        answer=SubscriptionItem,
        auth="subscriber",
    )
    async def read(req: func.HttpRequest) -> func.HttpResponse:
        found = await rules.read(_own(req))
        one = found.subscriptions.get(req.route_params["id"])
        if one is None:
            raise NotFoundError(f"you have no subscription {req.route_params['id'][:64]}")
        return _tagged(req, _subscription_item(one), _tag(found, one.subscription_id))

    @api.endpoint(
        bp,
        "alerts_subscriptions_replace",
        "subscriptions/{id}",
        method="PUT",
        summary="Ask for something else in its place; with If-Match only if it is still as you know it.",
        answer=SubscriptionItem,
        body=SubscriptionDraft,
        auth="subscriber",
    )
    async def replace(req: func.HttpRequest) -> func.HttpResponse:
        wanted = body_of(req, SubscriptionDraft).of(_own(req).subscriber, req.route_params["id"])
        try:
            found, new = await rules.change_subscription(wanted, _is_current(req))
        except ChangedError as e:
            return _changed(e)
        return _tagged(req, _subscription_item(new), _tag(found, new.subscription_id))

    @api.endpoint(
        bp,
        "alerts_subscriptions_delete",
        "subscriptions/{id}",
        method="DELETE",
        summary="Hear it no longer; with If-Match only if it is still as you know it.",
        answer=DoneItem,
        auth="subscriber",
    )
    async def delete(req: func.HttpRequest) -> DoneItem | func.HttpResponse:
        try:
            await rules.unsubscribe(_own(req).subscriber, req.route_params["id"], _is_current(req))
        except ChangedError as e:
            return _changed(e)
        return DoneItem(done="the subscription is deleted")


def _endpoints(bp: func.Blueprint, api: Api, rules: RuleService) -> None:
    @api.endpoint(
        bp,
        "alerts_endpoints_list",
        "endpoints",
        summary="Where you are reached, masked.",
        answer=EndpointPage,
        query=(SUBSCRIBER,),
        auth="subscriber",
    )
    async def listed(req: func.HttpRequest) -> EndpointPage:
        found = await rules.read(_actor(req))
        return EndpointPage(items=[_endpoint_item(e) for e in found.endpoints.values()])

    @api.endpoint(
        bp,
        "alerts_endpoints_read",
        "endpoints/{channel}",
        summary="Where you are reached on a channel, masked.",
        answer=EndpointItem,
        auth="subscriber",
    )
    async def read(req: func.HttpRequest) -> EndpointItem:
        channel = req.route_params["channel"]
        found = await rules.read(_own(req))
        if channel not in found.endpoints:
            raise NotFoundError(f"you have no address for {channel[:40]}; PUT one for {' or '.join(ADDRESSED)}")
        return _endpoint_item(found.endpoints[channel])

    @api.endpoint(
        bp,
        "alerts_endpoints_replace",
        "endpoints/{channel}",
        method="PUT",
        summary="Say where to reach you; enables an address that was disabled.",
        answer=EndpointItem,
        body=EndpointDraft,
        auth="subscriber",
    )
    async def replace(req: func.HttpRequest) -> EndpointItem:
        draft = body_of(req, EndpointDraft)
        channel = req.route_params["channel"]
        _, endpoint = await rules.set_endpoint(_own(req).subscriber, channel, draft.address.get_secret_value())
        return _endpoint_item(endpoint)

    @api.endpoint(
        bp,
        "alerts_endpoints_delete",
        "endpoints/{channel}",
        method="DELETE",
        summary="Be reached there no longer; the address is forgotten.",
        answer=DoneItem,
        auth="subscriber",
    )
    async def delete(req: func.HttpRequest) -> DoneItem:
        await rules.drop_endpoint(_own(req).subscriber, req.route_params["channel"])
        return DoneItem(done="the address is forgotten")

    @api.endpoint(
        bp,
        "alerts_endpoints_test",
        "endpoints/{channel}/test",
        method="POST",
        summary="Send yourself a test message.",
        answer=DoneItem,
        auth="subscriber",
        per_day=TESTS_A_DAY,
    )
    async def test(req: func.HttpRequest) -> DoneItem:
        endpoint = await rules.test_endpoint(_own(req).subscriber, req.route_params["channel"])
        return DoneItem(done=f"a test message is on its way to {endpoint.shown}")


def _preferences(bp: func.Blueprint, api: Api, rules: RuleService) -> None:
    @api.endpoint(
        bp,
        "alerts_preferences_read",
        "preferences",
        summary="What holds for all your subscriptions.",
        answer=PreferencesItem,
        auth="subscriber",
    )
    async def read(req: func.HttpRequest) -> func.HttpResponse:
        found = await rules.read(_own(req))
        return _tagged(req, _preferences_item(found.preferences), _tag(found, preferences_id(found.subscriber)))

    @api.endpoint(
        bp,
        "alerts_preferences_replace",
        "preferences",
        method="PUT",
        summary="Say what holds for all your subscriptions; with If-Match only if it is still as you know it.",
        answer=PreferencesItem,
        body=PreferencesDraft,
        auth="subscriber",
    )
    async def replace(req: func.HttpRequest) -> func.HttpResponse:
        draft = body_of(req, PreferencesDraft)
        wanted = Preferences(
            subscriber=_own(req).subscriber,
            zone=draft.zone,
            quiet_from=time.fromisoformat(draft.quiet_from) if draft.quiet_from else None,
            quiet_to=time.fromisoformat(draft.quiet_to) if draft.quiet_to else None,
            cap_per_day=draft.cap_per_day,
        )
        try:
            found = await rules.prefer(wanted, _is_current(req))
        except ChangedError as e:
            return _changed(e)
        return _tagged(req, _preferences_item(found.preferences), _tag(found, preferences_id(found.subscriber)))


def _mutes(bp: func.Blueprint, api: Api, rules: RuleService) -> None:
    @api.endpoint(
        bp,
        "alerts_mutes_list",
        "mutes",
        summary="What is silent, until when, and by whom.",
        answer=MutePage,
        query=(SUBSCRIBER,),
        auth="subscriber",
    )
    async def listed(req: func.HttpRequest) -> MutePage:
        found = await rules.read(_actor(req))
        now = rules.market.now()
        return MutePage(items=[_mute_item(m) for m in found.mutes.values() if m.until > now])

    @api.endpoint(
        bp,
        "alerts_mutes_create",
        "mutes",
        method="POST",
        summary="Silence alerts for a while; operators may do it for others, with a reason.",
        answer=MuteItem,
        body=MuteDraft,
        auth="subscriber",
        status=201,
    )
    async def create(req: func.HttpRequest) -> MuteItem:
        draft = body_of(req, MuteDraft)
        if (draft.until is None) == (draft.for_minutes is None):
            raise InvalidPayloadError("until: give it (an instant of market time) or for_minutes, one of both")
        actor = _actor(req, draft.subscriber)
        wanted = Mute(
            mute_id="",
            subscriber=actor.subscriber,
            author=actor.name,
            symbols=_names(draft.symbols),
            entries=_names(draft.entries),
            until=draft.until or rules.market.now() + timedelta(minutes=draft.for_minutes or 0),
            reason=draft.reason.strip(),
        )
        return _mute_item(await rules.mute(actor, wanted))

    @api.endpoint(
        bp,
        "alerts_mutes_delete",
        "mutes/{id}",
        method="DELETE",
        summary="End a mute before its time.",
        answer=DoneItem,
        query=(SUBSCRIBER, REASON),
        auth="subscriber",
    )
    async def delete(req: func.HttpRequest) -> DoneItem:
        await rules.unmute(_actor(req), req.route_params["id"], req.params.get("reason", "")[:200])
        return DoneItem(done="the mute is ended")


def _unsubscribe(bp: func.Blueprint, api: Api, rules: RuleService) -> None:
    @api.endpoint(
        bp,
        "alerts_unsubscribe_ask",
        "unsubscribe",
        summary="The page behind a message's unsubscribe link: a button, and nothing changes yet.",
        answer="text/html",
        query=(TOKEN,),
    )
    async def ask(req: func.HttpRequest) -> func.HttpResponse:
        leaving = rules.leaving(req.params.get("token", ""))
        what = "this subscription" if leaving.subscription_id else "everything"
        return _page(
            f"<p>Stop {what} by {html.escape(leaving.channel)}?</p>"
            '<form method="post"><button type="submit">Unsubscribe</button></form>'
        )

    @api.endpoint(
        bp,
        "alerts_unsubscribe",
        "unsubscribe",
        method="POST",
        summary="Unsubscribe at once, without signing in: what mail programs do for their button (RFC 8058).",
        answer="text/html",
        query=(TOKEN,),
    )
    async def leave(req: func.HttpRequest) -> func.HttpResponse:
        leaving = await rules.leave(req.params.get("token", ""))
        return _page(f"<p>Done: nothing more of it comes by {html.escape(leaving.channel)}.</p>")


# --- who asks


def _own(req: func.HttpRequest) -> Actor:
    """The caller, about his own things."""
    return actor_of(caller_of(req).subject, None)


def _actor(req: func.HttpRequest, wanted: str | None = None) -> Actor:
    """The caller, about his own things or as an operator about those of another."""
    caller = caller_of(req)
    actor = actor_of(caller.subject, wanted or req.params.get("subscriber"))
    if actor.is_other and not caller.is_operator:
        raise ForbiddenError("subscriber: only an operator may name another: leave it out")
    return actor


# --- what did they see last


def _tag(rules: Rules, id_: str) -> str:
    """The ETag of what is stored under an id; what is not stored yet has one too."""
    document = rules.documents.get(id_)
    seen = f"{id_}|{document.etag if document else ''}"
    return f'"{hashlib.blake2b(seen.encode(), digest_size=12).hexdigest()}"'


def _is_current(req: func.HttpRequest) -> Callable[[Rules, str], bool]:
    """Whether what is stored is what the caller knows, by If-Match; without one it always is."""
    given = req.headers.get("If-Match", "").strip()
    tags = set(re.findall(r'"[^"]*"', given))
    return lambda rules, id_: given in ("", "*") or _tag(rules, id_) in tags


def _changed(e: ChangedError) -> func.HttpResponse:
    return problem(412, "Changed meanwhile", str(e))


def _tagged(req: func.HttpRequest, model: BaseModel, tag: str, *, status: int = 200) -> func.HttpResponse:
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}
    if req.method == "GET" and tag in req.headers.get("If-None-Match", ""):
        return func.HttpResponse(status_code=304, headers=headers)
    return func.HttpResponse(model.model_dump_json(), status_code=status, mimetype="application/json", headers=headers)


def _page(inside: str) -> func.HttpResponse:
    """A page that loads nothing and tells nobody where it came from: the token stands in its address."""
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; form-action 'self'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    text = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Unsubscribe</title>{inside}</html>'
    return func.HttpResponse(text, status_code=200, mimetype="text/html", headers=headers)


# --- items


def _subscription_item(s: Subscription) -> SubscriptionItem:
    alike: dict[str, Any] = {name: getattr(s, name) for name in _ALIKE}
    return SubscriptionItem(
        subscription_id=s.subscription_id,
        subscriber=s.subscriber,
        channels=s.channels,
        symbols=_listed(s.symbols),
        entries=_listed(s.entries),
        directions=_listed(s.directions),
        cooldown_minutes=_minutes(s.cooldown),
        freshness_minutes=_minutes(s.freshness),
        since=s.since,
        **alike,
    )


def _endpoint_item(e: Endpoint) -> EndpointItem:
    return EndpointItem(
        channel=e.channel,
        shown=e.shown,
        is_enabled=e.is_enabled,
        disabled_reason=e.disabled_reason,
        failures=e.failures,
        first_failed_at=e.first_failed_at,
    )


def _preferences_item(p: Preferences) -> PreferencesItem:
    return PreferencesItem(
        subscriber=p.subscriber,
        zone=p.zone,
        quiet_from=f"{p.quiet_from:%H:%M}" if p.quiet_from else None,
        quiet_to=f"{p.quiet_to:%H:%M}" if p.quiet_to else None,
        cap_per_day=p.cap_per_day,
    )


def _mute_item(m: Mute) -> MuteItem:
    return MuteItem(
        mute_id=m.mute_id,
        subscriber=m.subscriber,
        author=m.author,
        symbols=_listed(m.symbols),
        entries=_listed(m.entries),
        until=m.until,
        reason=m.reason,
    )


def _names(names: Sequence[str] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)


def _listed(names: frozenset[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


def _span(minutes: int | None) -> timedelta | None:
    return None if minutes is None else timedelta(minutes=minutes)


def _minutes(span: timedelta | None) -> float | None:
    return None if span is None else span / timedelta(minutes=1)
