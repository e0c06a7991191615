"""When the alerts domain wakes up."""

from collections.abc import Sequence
from datetime import datetime

import azure.functions as func

from alerts.service import item_of
from alerts.wiring import Wired
from shared.http import AFTER, CURSOR, LIMIT, Api, Body, Page, Query, listed
from shared.inbound import on_time, settle
from signals.events import SignalRaised


class DeliveryItem(Body):
    """An alert on one channel, with its outcome."""

    channel: str
    state: str
    reason: str | None
    attempts: int
    sent_at: datetime | None


class AlertItem(Body):
    """A signal worded for people; the hub pushes the same."""

    alert_id: str
    signal_id: str
    subscriber: str
    symbol: str
    interval: str
    entry: str
    strategy: str
    direction: str
    strength: float
    severity: str
    reference_price: float
    title: str
    text: str
    occurred_at: datetime
    recorded_at: datetime
    cursor: str
    deliveries: Sequence[DeliveryItem]


class AlertPage(Page[AlertItem]):
    """Alerts, newest first, or oldest first behind ``?after=``."""


class ConnectionItem(Body):
    """What a SignalR client needs to connect: the official clients read it by themselves."""

    url: str
    accessToken: str  # noqa: N815 - the name the clients look for


SYMBOLS = Query(name="symbols", description="What to hear: symbols separated by commas, or `all` (the default).")


def blueprint(alerts: Wired, api: Api) -> func.Blueprint:
    bp = func.Blueprint()
    service = alerts.service

    @bp.function_name("alerts_on_signal_raised")
    @bp.event_grid_trigger(arg_name="event")
    async def alerts_on_signal_raised(event: func.CloudEvent) -> None:
        async with settle(event, "alerts_on_signal_raised", alerts.dead_letters):
            await service.announce(SignalRaised.from_wire(event.type, event.get_json()))

    @bp.function_name("alerts_sweep")
    @bp.timer_trigger(arg_name="timer", schedule="%ALERTS_SWEEP_SCHEDULE%")
    async def alerts_sweep(timer: func.TimerRequest) -> None:
        async with on_time("alerts_sweep"):
            await service.sweep()

    @api.endpoint(
        bp,
        "alerts_list",
        "alerts",
        summary="Alerts of the public subscriber with their deliveries, newest first.",
        answer=AlertPage,
        query=(LIMIT, CURSOR, AFTER),
    )
    async def alerts_list(req: func.HttpRequest) -> AlertPage:
        found, cursor = await listed(
            req, lambda after, newest, limit: service.listed(after, newest_first=newest, limit=limit)
        )
        return AlertPage(items=[AlertItem.model_validate(item_of(record)) for record in found], next=cursor)

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
        bearer = req.headers.get("Authorization", "").removeprefix("Bearer ").strip() or None
        place = await service.negotiate(req.params.get("symbols", "all"), bearer)
        return ConnectionItem(url=place.url, accessToken=place.access_token)

    return bp
