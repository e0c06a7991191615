"""When the signals domain wakes up."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import azure.functions as func
from pydantic import ConfigDict

from shared.http import AFTER, CURSOR, LIMIT, Api, Body, Page, Query, cursor_of, listed
from shared.inbound import on_time, settle
from shared.market.events import BarsIngested
from shared.market.models import symbol_of
from signals.logic.performance import Performance
from signals.wiring import Wired


class OutcomeItem(Body):
    """
    How an opinion fared: pending, scored, expired or unscorable; the last two with the reason.

    Returns are fractions, from the next bar's open to the close of the horizon; `forward_return` is the opinion's
    own, `net_return` what is left of it behind `cost_per_side`, `base_return` what a bet on rising prices made.
    """

    state: str
    reason: str | None
    is_hit: bool | None
    entry_price: float | None
    exit_price: float | None
    forward_return: float | None
    net_return: float | None
    base_return: float | None
    mfe: float | None
    mae: float | None
    cost_per_side: float | None


class SignalItem(Body):
    """
    One entry's opinion of one symbol at one bar, the numbers that caused it, and how it fared.

    `confidence` comes from `sample_size` outcomes of the same entry on the same series that were known at
    `closed_at`; null without any.
    """

    signal_id: str
    entry: str
    strategy: str
    version: int
    params: Mapping[str, float]
    symbol: str
    interval: str
    direction: str
    strength: float
    confidence: float | None
    sample_size: int
    reference_price: float
    closed_at: datetime
    horizon: int | None
    closes_at: datetime | None
    expires_at: datetime | None
    features: Mapping[str, float]
    trend: float | None
    why: str
    origin: str
    muted_because: str | None
    provider: str
    adjustment: str | None
    revision: int
    recorded_at: datetime
    outcome: OutcomeItem
    cursor: str


class SignalPage(Page[SignalItem]):
    """Signals, newest first, or oldest first behind ``?after=``."""


class BinItem(Body):
    """Opinions of about the same confidence, and the share of them that was right."""

    model_config = ConfigDict(from_attributes=True)

    low: float
    high: float
    n: int
    mean_confidence: float
    hit_rate: float


class StatisticsItem(Body):
    """
    What opinions did: `n` scored ones, the others counted beside them.

    `base_rate` is the share of the same windows in which the price rose; `effective_n` counts windows that do not
    overlap; `ic` is the rank correlation of strength times direction with the price's return. What cannot be
    computed is null, and `undefined` says why.
    """

    model_config = ConfigDict(from_attributes=True)

    n: int
    pending: int
    expired: int
    unscorable: int
    effective_n: int
    hit_rate: float | None
    hit_rate_low: float | None
    hit_rate_high: float | None
    base_rate: float | None
    mean_forward_return: float | None
    median_forward_return: float | None
    mean_net_return: float | None
    mean_base_return: float | None
    edge_over_base: float | None
    mean_mfe: float | None
    mean_mae: float | None
    ic: float | None
    ic_t: float | None
    brier: float | None
    reliability: Sequence[BinItem]
    is_edge_gone: bool
    undefined: Mapping[str, str]


class PerformanceItem(Body):
    """
    How the opinions of an entry, as it is configured now, fared: together, by symbol and by regime.

    A regime is a tercile of the series' own return over the `trend_bars` bars before a signal. `is_edge_gone`:
    of 50 or more outcomes so few were right that the 95 % interval lies below the base rate.
    """

    entry: str
    strategy: str
    version: int
    params: Mapping[str, float]
    interval: str
    horizon: int
    is_muted_without_edge: bool
    symbol: str | None
    cost_per_side: float
    trend_bars: int
    total: StatisticsItem
    by_symbol: Mapping[str, StatisticsItem]
    by_regime: Mapping[str, StatisticsItem]


SYMBOL = Query(name="symbol", description="Only this symbol.")
OF_SYMBOL = Query(name="symbol", description="Its symbol; signals found in history are found by it only.")


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
            heard = BarsIngested.from_wire(event.type, event.get_json())
            await service.evaluate(heard)
            if heard.count > 1 or heard.revision:  # new history, perhaps; a live bar asks for nothing more
                await signals.backtests().heard(heard)

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
        symbol = _symbol(req)
        found, cursor = await listed(
            req, lambda after, newest, limit: service.listed(symbol, after, newest_first=newest, limit=limit)
        )
        return SignalPage(
            items=[SignalItem.model_validate({**d.body, "cursor": cursor_of(d.sort)}) for d in found], next=cursor
        )

    @api.endpoint(
        bp,
        "signals_read",
        "signals/{signal_id}",
        summary="One signal: why it was raised, and how it fared.",
        answer=SignalItem,
        query=(OF_SYMBOL,),
    )
    async def signals_read(req: func.HttpRequest) -> SignalItem:
        found = await service.read(req.route_params["signal_id"], _symbol(req))
        return SignalItem.model_validate({**found.body, "cursor": cursor_of(found.sort)})

    @api.endpoint(
        bp,
        "signals_performance",
        "entries/{name}/performance",
        summary="How the opinions of an entry fared.",
        answer=PerformanceItem,
        query=(SYMBOL,),
    )
    async def signals_performance(req: func.HttpRequest) -> PerformanceItem:
        symbol = _symbol(req)
        return _performance(await service.performance(req.route_params["name"], symbol), symbol)

    return bp


def _symbol(req: func.HttpRequest) -> str | None:
    return symbol_of(req.params["symbol"]) if req.params.get("symbol") else None


def _performance(p: Performance, symbol: str | None) -> PerformanceItem:
    return PerformanceItem(
        entry=p.entry.name,
        strategy=p.entry.strategy,
        version=p.entry.version,
        params=p.entry.params,
        interval=p.entry.interval,
        horizon=p.entry.horizon,
        is_muted_without_edge=p.entry.mute_without_edge,
        symbol=symbol,
        cost_per_side=p.cost_per_side,
        trend_bars=p.trend_bars,
        total=StatisticsItem.model_validate(p.total),
        by_symbol={name: StatisticsItem.model_validate(one) for name, one in p.by_symbol.items()},
        by_regime={name: StatisticsItem.model_validate(one) for name, one in p.by_regime.items()},
    )
