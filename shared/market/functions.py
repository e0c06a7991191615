"""When the market room wakes up: its HTTP, and the timer that refreshes quotes."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import azure.functions as func

from shared.http import CURSOR, LIMIT, Api, Body, Page, Query
from shared.inbound import on_time
from shared.market.models import symbol_of
from shared.market.service import Market

INTERVAL = Query(
    name="interval",
    description="The length of a bar.",
    schema={"type": "string", "enum": ["1d", "1h", "1m"], "default": "1d"},
)


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
    """Bars newest first, and how good they are."""

    symbol: str
    interval: str
    as_of: datetime | None
    is_stale: bool
    provider: str | None
    adjustment: str | None
    revision: int


class QuoteItem(Body):
    """The last price known, and how good it is."""

    symbol: str
    price: float
    previous_close: float | None
    as_of: datetime
    is_stale: bool
    provider: str


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


class WatchItem(Body):
    """One watched series."""

    symbol: str
    interval: str
    is_watched: bool
    watched_by: str
    live_from: datetime
    evaluated_through: datetime | None
    trouble: Mapping[str, Any] | None


class Watchlist(Body):
    """Every series ever watched."""

    items: Sequence[WatchItem]
    next: None = None


def blueprint(market: Market, api: Api) -> func.Blueprint:
    bp = func.Blueprint()

    @bp.function_name("market_refresh_quotes")
    @bp.timer_trigger(arg_name="timer", schedule="%MARKET_QUOTES_SCHEDULE%")
    async def market_refresh_quotes(timer: func.TimerRequest) -> None:
        async with on_time("market_refresh_quotes"):
            await market.ingest.refresh_quotes()

    @api.endpoint(
        bp,
        "market_bars",
        "bars/{symbol}",
        summary="The stored bars of a symbol, newest first.",
        answer=BarsPage,
        query=(INTERVAL, LIMIT, CURSOR),
    )
    async def market_bars(req: func.HttpRequest) -> BarsPage:
        return BarsPage.model_validate(await market.list_bars(req))

    @api.endpoint(
        bp,
        "market_quote",
        "quotes/{symbol}",
        summary="The last price known of a symbol.",
        answer=QuoteItem,
    )
    async def market_quote(req: func.HttpRequest) -> QuoteItem:
        return QuoteItem.model_validate(await market.quote(symbol_of(req.route_params["symbol"])))

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

    @api.endpoint(bp, "market_watchlist", "watchlist", summary="Every watched series.", answer=Watchlist)
    async def market_watchlist(req: func.HttpRequest) -> Watchlist:
        return Watchlist.model_validate({"items": await market.watchlist()})

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
