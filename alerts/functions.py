"""When the alerts domain wakes up."""

from collections.abc import Sequence
from datetime import datetime

import azure.functions as func

from alerts.items import explanation_of, item_of, log_of
from alerts.models import PUBLIC, Record
from alerts.wiring import Wired
from shared.errors import NotFoundError
from shared.http import AFTER, CURSOR, LIMIT, Api, Body, Page, Query, listed
from shared.identity import ForbiddenError, bearer_of, caller_of
from shared.inbound import on_time, settle
from shared.market.events import BarsIngested
from signals.events import SignalRaised


class DeliveryItem(Body):
    """An alert on one channel, with its outcome."""

    channel: str
    state: str
    reason: str | None
    attempts: int
    sent_at: datetime | None


class AlertItem(Body):
    """What happened, worded for people; the hub pushes the same. A later ``version`` replaces an earlier one."""

    alert_id: str
    kind: str
    version: int
    signal_id: str
    subscriber: str
    symbol: str
    interval: str
    entry: str
    strategy: str
    direction: str
    strength: float
    confidence: float | None
    severity: str
    reference_price: float
    title: str
    text: str
    occurred_at: datetime
    recorded_at: datetime
    resolved_at: datetime | None
    acknowledged_at: datetime | None
    cursor: str
    deliveries: Sequence[DeliveryItem]


class AlertPage(Page[AlertItem]):
    """Alerts, newest first, or oldest first behind ``?after=``."""


class DecisionItem(Body):
    """One step of a judgement; ``at`` is the market's time."""

    at: datetime
    rule: str
    outcome: str
    reason: str


class ExplainedDelivery(Body):
    """Where one delivery stands, and every decision that led there; ``by`` is what it gave way to."""

    channel: str
    version: int
    state: str
    because: str
    rule: str | None
    by: str | None
    reason: str | None
    decisions: Sequence[DecisionItem]


class Explanation(Body):
    """Why somebody got an alert, or did not."""

    alert_id: str
    subscriber: str
    title: str
    kind: str
    version: int
    severity: str
    occurred_at: datetime
    recorded_at: datetime
    subscription_ids: Sequence[str]
    decisions: Sequence[DecisionItem]
    deliveries: Sequence[ExplainedDelivery]


class AttemptItem(Body):
    """One try of a delivery."""

    number: int
    started_at: datetime
    ended_at: datetime | None
    outcome: str
    reason: str | None
    provider_id: str | None


class LoggedDelivery(Body):
    """A delivery with its last attempts, the oldest first."""

    delivery_id: str
    channel: str
    version: int
    state: str
    rule: str | None
    by: str | None
    reason: str | None
    attempts: int
    doubts: int
    is_possible_repeat: bool
    due_at: datetime | None
    sent_at: datetime | None
    log: Sequence[AttemptItem]


class DeliveryLog(Body):
    """Every delivery of an alert, those of later versions last."""

    items: Sequence[LoggedDelivery]


class ConnectionItem(Body):
    """What a SignalR client needs to connect: the official clients read it by themselves."""

    url: str
    accessToken: str  # noqa: N815 - the name the clients look for


SYMBOLS = Query(name="symbols", description="What to hear: symbols separated by commas, or `all` (the default).")
SUBSCRIBER = Query(name="subscriber", description="Whose alert it is: for operators, who may see everybody's.")


def blueprint(alerts: Wired, api: Api) -> func.Blueprint:
    bp = func.Blueprint()
    service = alerts.service

    @bp.function_name("alerts_on_signal_raised")
    @bp.event_grid_trigger(arg_name="event")
    @alerts.dead_letters.replayable
    async def alerts_on_signal_raised(event: func.CloudEvent) -> None:
        async with settle(event, "alerts_on_signal_raised", alerts.dead_letters):
            await service.announce(SignalRaised.from_wire(event.type, event.get_json()))

    @bp.function_name("alerts_on_bars_ingested")
    @bp.event_grid_trigger(arg_name="event")
    @alerts.dead_letters.replayable
    async def alerts_on_bars_ingested(event: func.CloudEvent) -> None:
        async with settle(event, "alerts_on_bars_ingested", alerts.dead_letters):
            await service.bars(BarsIngested.from_wire(event.type, event.get_json()))

    @bp.function_name("alerts_sweep")
    @bp.timer_trigger(arg_name="timer", schedule="%ALERTS_SWEEP_SCHEDULE%")
    async def alerts_sweep(timer: func.TimerRequest) -> None:
        async with on_time("alerts_sweep"):
            await service.sweep()

    @api.endpoint(
        bp,
        "alerts_list",
        "alerts",
        summary="Your alerts with their deliveries, newest first; those of `public` for who is not signed in.",
        answer=AlertPage,
        query=(LIMIT, CURSOR, AFTER),
    )
    async def alerts_list(req: func.HttpRequest) -> AlertPage:
        whose = caller_of(req).subject or PUBLIC
        found, cursor = await listed(
            req, lambda after, newest, limit: service.listed(whose, after, newest_first=newest, limit=limit)
        )
        return AlertPage(items=[AlertItem.model_validate(item_of(record)) for record in found], next=cursor)

    @api.endpoint(
        bp,
        "alerts_explain",
        "alerts/{alert_id}/explain",
        summary="Why an alert came, or did not: every decision with its reason.",
        answer=Explanation,
        query=(SUBSCRIBER,),
    )
    async def alerts_explain(req: func.HttpRequest) -> Explanation:
        return Explanation.model_validate(explanation_of(await _seen(req)))

    @api.endpoint(
        bp,
        "alerts_deliveries",
        "alerts/{alert_id}/deliveries",
        summary="Every delivery of an alert, with the log of its attempts.",
        answer=DeliveryLog,
        query=(SUBSCRIBER,),
    )
    async def alerts_deliveries(req: func.HttpRequest) -> DeliveryLog:
        return DeliveryLog.model_validate({"items": log_of(await _seen(req))})

    @api.endpoint(
        bp,
        "alerts_acknowledge",
        "alerts/{alert_id}/acknowledge",
        method="POST",
        summary="Say that an alert of yours was seen; who was first is kept.",
        answer=AlertItem,
        query=(SUBSCRIBER,),
        auth="subscriber",
    )
    async def alerts_acknowledge(req: func.HttpRequest) -> AlertItem:
        caller, record = caller_of(req), await _seen(req)
        whose = record.alert.subscriber
        if whose != caller.subject and not caller.is_operator:
            raise ForbiddenError("public alerts are acknowledged by operators: acknowledge your own")
        record = await service.acknowledge(whose, record.alert.alert_id, caller.subject)
        return AlertItem.model_validate(item_of(record))

    @api.endpoint(
        bp,
        "alerts_negotiate",
        "negotiate",
        method="POST",
        summary="A place at the hub `alerts` (SignalR clients call this by themselves).",
        answer=ConnectionItem,
        query=(SYMBOLS,),
    )
    async def alerts_negotiate(req: func.HttpRequest) -> ConnectionItem:
        caller = caller_of(req)
        place = await service.negotiate(
            req.params.get("symbols", "all"), bearer_of(req.headers), caller.subject or None
        )
        return ConnectionItem(url=place.url, accessToken=place.access_token)

    async def _seen(req: func.HttpRequest) -> Record:
        """The alert of the path, if the caller may see it: what is somebody else's is not there at all."""
        caller, wanted = caller_of(req), req.params.get("subscriber")
        mine = [*([caller.subject] if caller.is_known else []), PUBLIC]
        if wanted and wanted not in mine and not caller.is_operator:
            raise NotFoundError(f"there is no alert {req.route_params['alert_id']}")
        record = await service.find([wanted] if wanted else mine, req.route_params["alert_id"])
        if record.alert.subscriber not in mine:
            action = "alerts.acknowledge" if req.method == "POST" else "alerts.read"
            await alerts.audit.record(caller.actor, action, record.alert.subscriber, "", {"id": record.alert.alert_id})
        return record

    return bp
