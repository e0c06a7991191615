"""When the signals domain wakes up."""

from collections.abc import Mapping
from datetime import datetime

import azure.functions as func

from shared.http import AFTER, CURSOR, LIMIT, Api, Body, Page, Query, cursor_of, listed
from shared.inbound import on_time, settle
from shared.market.events import BarsIngested
from shared.market.models import symbol_of
from signals.wiring import Wired


class SignalItem(Body):
    """One entry's opinion of one symbol at one bar, and the numbers that caused it."""

    signal_id: str
    entry: str
    strategy: str
    version: int
    params: Mapping[str, float]
    symbol: str
    interval: str
    direction: str
    strength: float
    reference_price: float
    closed_at: datetime
    features: Mapping[str, float]
    origin: str
    provider: str
    revision: int
    recorded_at: datetime
    cursor: str


class SignalPage(Page[SignalItem]):
    """Signals, newest first, or oldest first behind ``?after=``."""


SYMBOL = Query(name="symbol", description="Only this symbol.")


def blueprint(signals: Wired, api: Api) -> func.Blueprint:
    bp = func.Blueprint()
    service = signals.service

    @bp.function_name("signals_ingest")
    @bp.timer_trigger(arg_name="timer", schedule="%SIGNALS_INGEST_SCHEDULE%")
    async def signals_ingest(timer: func.TimerRequest) -> None:
        async with on_time("signals_ingest"):
            await service.ingest()

    @bp.function_name("signals_on_bars_ingested")
    @bp.event_grid_trigger(arg_name="event")
    @signals.dead_letters.replayable
    async def signals_on_bars_ingested(event: func.CloudEvent) -> None:
        async with settle(event, "signals_on_bars_ingested", signals.dead_letters):
            await service.evaluate(BarsIngested.from_wire(event.type, event.get_json()))

    @bp.function_name("signals_sweep")
    @bp.timer_trigger(arg_name="timer", schedule="%SIGNALS_SWEEP_SCHEDULE%")
    async def signals_sweep(timer: func.TimerRequest) -> None:
        async with on_time("signals_sweep"):
            await service.sweep()

    @api.endpoint(
        bp,
        "signals_list",
        "signals",
        summary="Signals, newest first.",
        answer=SignalPage,
        query=(SYMBOL, LIMIT, CURSOR, AFTER),
    )
    async def signals_list(req: func.HttpRequest) -> SignalPage:
        symbol = symbol_of(req.params["symbol"]) if req.params.get("symbol") else None
        found, cursor = await listed(
            req, lambda after, newest, limit: service.listed(symbol, after, newest_first=newest, limit=limit)
        )
        return SignalPage(
            items=[SignalItem.model_validate({**d.body, "cursor": cursor_of(d.sort)}) for d in found], next=cursor
        )

    return bp
