"""When the market room wakes up: its HTTP, and the timers that refresh quotes and work off requests for history."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import azure.functions as func
from pydantic import ConfigDict, Field

from shared.http import CURSOR, LIMIT, Api, Body, Page, Query
from shared.identity import Caller as SignedIn
from shared.identity import caller_of
from shared.inbound import on_time
from shared.market.callers import Caller
from shared.market.fetcher import ProviderStatus
from shared.market.fetches import Fetch
from shared.market.hooks import FinnhubHook
from shared.market.models import symbol_of
from shared.market.service import FetchDraft, Market, Supply

KEY_HOLDER = Caller(id="function-key")
"""Who shows the function key and no token: one caller, whoever it is."""
FETCHES_A_DAY = 200
"""How many requests for history a subscriber may queue in a day."""

INTERVAL = Query(
    name="interval",
    description="The length of a bar.",
    schema={"type": "string", "enum": ["1d", "1h", "1m"], "default": "1d"},
)

FROM = Query(name="from", description="The first moment: a date (the exchange's whole day) or an instant with a zone.")
TO = Query(name="to", description="The last moment: a date (the exchange's whole day) or an instant with a zone.")


class BarItem(Body):
    """A closed bar as traded; ``split`` is the factor that became effective at its open."""

    opened_at: datetime
    closed_at: datetime
    open: float
    high: float
    low: float
    close: float
    volume: float
    split: float


class BarsPage(Page[BarItem]):
    """Bars newest first, and how good they are; ``reason``: what could not be fetched for who is signed in, and why."""

    symbol: str
    interval: str
    as_of: datetime | None
    is_stale: bool
    provider: str | None
    adjustment: str | None
    revision: int
    reason: str | None = None


class QuoteItem(Body):
    """The last price known, and how good it is; ``reason``: why it could not be renewed for who is signed in."""

    symbol: str
    price: float
    previous_close: float | None
    as_of: datetime
    is_stale: bool
    provider: str
    reason: str | None = None


class ChangeItem(Body):
    """
    A change of where a series' bars are from, or of what they say, and why.

    ``through``: the last bar that the former provider brought.
    """

    kind: str
    provider: str
    former: str | None
    revision: int
    through: datetime
    occurred_at: datetime
    reason: str


class SeriesItem(Body):
    """What is held of one series, since when it is live, and why there may be no signal."""

    symbol: str
    interval: str
    is_watched: bool
    bar_count: int
    first_closed_at: datetime | None
    last_closed_at: datetime | None
    live_from: datetime
    evaluated_through: datetime | None
    next_due_at: datetime | None
    provider: str | None
    adjustment: str | None
    revision: int
    misses: int
    trouble: Mapping[str, Any] | None
    entries: Mapping[str, Any]
    changes: Sequence[ChangeItem]


class WatchItem(Body):
    """One watched series."""

    symbol: str
    interval: str
    is_watched: bool
    watched_by: str
    live_from: datetime
    evaluated_through: datetime | None
    trouble: Mapping[str, Any] | None


class Watchlist(Page[WatchItem]):
    """Every series ever watched or fetched."""


class RangeItem(Body):
    """Bars in a row; ``provider`` and ``asked_at`` say who has not got absent ones, as of when."""

    first: datetime
    last: datetime
    count: int
    provider: str | None
    asked_at: datetime | None


class ActionItem(Body):
    """A split that the stored bars carry: *split* new shares for one old from this bar's open on."""

    closed_at: datetime
    split: float


class CoverageItem(Body):
    """
    Which bars of a series are held, missing (nobody was asked yet) and absent (the provider has not got them).

    ``is_cut``: only the newest 500 ranges of a kind are shown; the counts are of all.
    """

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, defer_build=True)

    symbol: str
    interval: str
    first: datetime | None = Field(alias="from")
    last: datetime = Field(alias="to")
    bar_count: int
    first_closed_at: datetime | None
    as_of: datetime | None
    is_stale: bool
    provider: str | None
    adjustment: str | None
    revision: int
    counts: Mapping[str, int]
    held: Sequence[RangeItem]
    missing: Sequence[RangeItem]
    absent: Sequence[RangeItem]
    is_cut: bool
    actions: Sequence[ActionItem]


class WindowItem(Body):
    """One window of a provider's quota."""

    amount: int
    span_seconds: float
    used: int
    left: int
    resets_at: datetime | None


class RefusalItem(Body):
    """What the plan of our key does not include."""

    endpoint: str
    parameter: str
    reason: str
    recorded_at: datetime


class ProviderItem(Body):
    """How a provider does: ``breaker`` open means that it is left alone until ``retry_at``."""

    provider: str
    plan: str
    breaker: str
    retry_at: datetime | None
    success_rate: float | None
    latency_seconds: float | None
    freshness: float | None
    hit_rate: float | None
    calls: int
    failures: int
    hits: Mapping[str, int]
    last_error: str | None
    last_error_at: datetime | None
    cool_down_until: datetime | None
    refusals: int
    probes: int
    failed_probes: int
    waiting: Mapping[str, int]
    windows: Sequence[WindowItem]
    not_entitled: Sequence[RefusalItem]


class PrefetchItem(Body):
    """
    What was fetched ahead: ``waste`` is the share that nobody used before it went stale.

    While ``is_on`` is false nothing is fetched, and what would have been is judged all the same.
    """

    is_on: bool
    switched_at: datetime | None
    days: float
    hit_rate: float | None
    waste: float | None
    recent_waste: float | None
    used: int
    wasted: int


class Providers(Page[ProviderItem]):
    """Every provider, the first choice first."""

    prefetch: PrefetchItem
    webhooks: Mapping[str, Mapping[str, int]]


class FetchItem(Body):
    """
    A request for history. ``bars``: how many of those asked for are held; ``calls``: requests to providers so far.

    ``left``: the first 20 ranges still missing; ``left_bars``: how many bars in all.
    """

    fetch_id: str
    symbol: str
    interval: str
    since: datetime
    until: datetime
    priority: str
    state: str
    bars: int
    calls: int
    left: Sequence[RangeItem]
    left_bars: int
    reason: str | None
    retry_at: datetime | None
    requested_at: datetime
    updated_at: datetime | None


def blueprint(market: Market, api: Api) -> func.Blueprint:
    bp = func.Blueprint()

    @bp.function_name("market_refresh_quotes")
    @bp.timer_trigger(arg_name="timer", schedule="%MARKET_QUOTES_SCHEDULE%")
    async def market_refresh_quotes(timer: func.TimerRequest) -> None:
        async with on_time("market_refresh_quotes"):
            await market.ingest.refresh_quotes()

    @api.endpoint(
        bp,
        "market_series",
        "series/{symbol}",
        summary="What is held of a series, since when it is live, and why there is no signal.",
        answer=SeriesItem,
        query=(INTERVAL,),
    )
    async def market_series(req: func.HttpRequest) -> SeriesItem:
        return SeriesItem.model_validate(await market.describe(req))

    @api.endpoint(
        bp,
        "market_watchlist",
        "watchlist",
        summary="Every series ever watched or fetched, the newest known first.",
        answer=Watchlist,
        query=(LIMIT, CURSOR),
    )
    async def market_watchlist(req: func.HttpRequest) -> Watchlist:
        return Watchlist.model_validate(await market.watchlist(req))

    @api.endpoint(
        bp,
        "market_watch",
        "watchlist/{symbol}",
        method="PUT",
        summary="Watch a symbol: its history is fetched first, what closes from now on raises alerts.",
        answer=WatchItem,
        query=(INTERVAL,),
        anonymous=False,
    )
    async def market_watch(req: func.HttpRequest) -> WatchItem:
        return WatchItem.model_validate(await market.watch(req))

    @api.endpoint(
        bp,
        "market_unwatch",
        "watchlist/{symbol}",
        method="DELETE",
        summary="Stop watching a symbol; what is stored stays.",
        answer=WatchItem,
        query=(INTERVAL,),
        anonymous=False,
    )
    async def market_unwatch(req: func.HttpRequest) -> WatchItem:
        return WatchItem.model_validate(await market.unwatch(req))

    return bp


def supply_blueprint(supply: Supply, hook: FinnhubHook, api: Api) -> func.Blueprint:
    bp = func.Blueprint()

    @bp.function_name("market_fetches")
    @bp.timer_trigger(arg_name="timer", schedule="%MARKET_FETCHES_SCHEDULE%")
    async def market_fetches(timer: func.TimerRequest) -> None:
        async with on_time("market_fetches"):
            await supply.mending.work()
            await supply.fetches.work()

    @bp.function_name("market_prefetch")
    @bp.timer_trigger(arg_name="timer", schedule="%MARKET_PREFETCH_SCHEDULE%")
    async def market_prefetch(timer: func.TimerRequest) -> None:
        async with on_time("market_prefetch"):
            await supply.prefetching.work()

    @api.endpoint(
        bp,
        "market_bars",
        "bars/{symbol}",
        summary="The bars of a symbol, newest first; what is missing is fetched for who is signed in.",
        answer=BarsPage,
        query=(INTERVAL, FROM, TO, LIMIT, CURSOR),
    )
    async def market_bars(req: func.HttpRequest) -> BarsPage:
        return BarsPage.model_validate(await supply.list_bars(req, _subscriber(req)))

    @api.endpoint(
        bp,
        "market_quote",
        "quotes/{symbol}",
        summary="The last price known of a symbol; it is renewed for who is signed in.",
        answer=QuoteItem,
    )
    async def market_quote(req: func.HttpRequest) -> QuoteItem:
        return QuoteItem.model_validate(await supply.quote(symbol_of(req.route_params["symbol"]), _subscriber(req)))

    @api.endpoint(
        bp,
        "market_coverage",
        "coverage/{symbol}",
        summary="Which bars of a series are held, missing and absent.",
        answer=CoverageItem,
        query=(INTERVAL, FROM, TO),
    )
    async def market_coverage(req: func.HttpRequest) -> CoverageItem:
        return CoverageItem.model_validate(await supply.coverage(req))

    @api.endpoint(
        bp,
        "market_providers",
        "providers",
        summary="How every provider does, and what is left of its quotas.",
        answer=Providers,
    )
    async def market_providers(req: func.HttpRequest) -> Providers:
        items = [_provider_item(status) for status in await supply.providers()]
        return Providers(
            items=items,
            prefetch=PrefetchItem.model_validate(asdict(await supply.prefetched())),
            webhooks={"finnhub": await hook.counts()},
        )

    @api.endpoint(
        bp,
        "market_fetch",
        "fetches",
        method="POST",
        summary="Have history fetched: {symbol, interval, from, to, priority: asked or backfill}.",
        answer=FetchItem,
        body=FetchDraft,
        anonymous=False,
        status=202,
    )
    async def market_fetch(req: func.HttpRequest) -> func.HttpResponse:
        return _queued(await supply.request(req, _subscriber(req) or KEY_HOLDER))

    @api.endpoint(
        bp,
        "market_fetch_mine",
        "my/fetches",
        method="POST",
        summary="Have history fetched as who is signed in, charged to your share of the day's calls.",
        answer=FetchItem,
        body=FetchDraft,
        auth="subscriber",
        status=202,
        per_day=FETCHES_A_DAY,
    )
    async def market_fetch_mine(req: func.HttpRequest) -> func.HttpResponse:
        return _queued(await supply.request(req, _as_caller(caller_of(req))))

    @api.endpoint(
        bp, "market_fetch_state", "fetches/{id}", summary="How a request for history stands.", answer=FetchItem
    )
    async def market_fetch_state(req: func.HttpRequest) -> FetchItem:
        return _fetch_item(await supply.fetch(req))

    @api.endpoint(
        bp,
        "market_fetch_cancel",
        "fetches/{id}",
        method="DELETE",
        summary="Stop a request for history; what is stored stays.",
        answer=FetchItem,
        anonymous=False,
    )
    async def market_fetch_cancel(req: func.HttpRequest) -> FetchItem:
        return _fetch_item(await supply.cancel(req))

    @api.endpoint(
        bp,
        "market_fetch_cancel_mine",
        "my/fetches/{id}",
        method="DELETE",
        summary="Stop a request for history that you made, or as an operator anybody's; what is stored stays.",
        answer=FetchItem,
        auth="subscriber",
    )
    async def market_fetch_cancel_mine(req: func.HttpRequest) -> FetchItem:
        who = caller_of(req)
        return _fetch_item(await supply.cancel(req, None if who.is_operator else _as_caller(who)))

    return bp


def _as_caller(who: SignedIn) -> Caller:
    """Whose share of the day is spent, under a name that no other kind of caller can have."""
    return Caller(id=f"subscriber:{who.subject}")


def _subscriber(req: func.HttpRequest) -> Caller | None:
    """The same of who may have signed in; None: nobody has, so no call is spent."""
    who = caller_of(req)
    return _as_caller(who) if who.is_known else None


def _queued(fetch: Fetch) -> func.HttpResponse:
    item = _fetch_item(fetch)
    return func.HttpResponse(
        item.model_dump_json(),
        status_code=202,
        mimetype="application/json",
        headers={"Location": f"/api/fetches/{item.fetch_id}"},
    )


def _fetch_item(f: Fetch) -> FetchItem:
    return FetchItem(
        fetch_id=f.fetch_id,
        symbol=f.wanted.symbol,
        interval=f.wanted.interval,
        since=f.wanted.since,
        until=f.wanted.until,
        priority=f.wanted.priority.name.lower(),
        state=f.state,
        bars=f.bars,
        calls=f.calls,
        left=[
            RangeItem(first=first, last=last, count=count, provider=None, asked_at=None)
            for first, last, count in f.left
        ],
        left_bars=f.left_bars,
        reason=f.reason,
        retry_at=f.retry_at,
        requested_at=f.requested_at,
        updated_at=f.updated_at,
    )


def _provider_item(s: ProviderStatus) -> ProviderItem:
    health, throttle = s.health, s.throttle
    return ProviderItem(
        provider=s.provider,
        plan=s.plan,
        breaker=health.breaker,
        retry_at=health.retry_at,
        success_rate=health.success_rate,
        latency_seconds=health.latency.total_seconds() if health.latency is not None else None,
        freshness=health.freshness,
        hit_rate=s.hit_rate,
        calls=health.calls,
        failures=health.failures,
        hits=health.hits,
        last_error=health.last_error,
        last_error_at=health.last_error_at,
        cool_down_until=throttle.cool_down_until,
        refusals=throttle.refusals,
        probes=throttle.probes,
        failed_probes=throttle.failed_probes,
        waiting={priority.name.lower(): count for priority, count in throttle.waiting.items()},
        windows=[
            WindowItem(
                amount=w.amount, span_seconds=w.span.total_seconds(), used=w.used, left=w.left, resets_at=w.resets_at
            )
            for w in throttle.windows
        ],
        not_entitled=[
            RefusalItem(endpoint=r.endpoint, parameter=r.parameter, reason=r.reason, recorded_at=r.recorded_at)
            for r in s.not_entitled
        ],
    )
