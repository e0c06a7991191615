"""What people can ask of the market room over HTTP; a read never spends a provider call."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import azure.functions as func

from shared.clock import Clock, parse_instant
from shared.documents import sort_key
from shared.errors import ConflictError, NotFoundError, StaleError
from shared.http import cursor_of, limit_of, sort_of
from shared.market.ingest import Ingest, Watch
from shared.market.models import Interval, instant_of, interval_of, minute_of, symbol_of
from shared.market.sessions import calendar
from shared.market.stores import Bars, Quotes, Series, SeriesStore, WantedQuote

STALE_QUOTE = timedelta(minutes=20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """The market room."""

    series: SeriesStore
    bars: Bars
    quotes: Quotes
    ingest: Ingest
    clock: Clock
    delay: timedelta

    async def list_bars(self, req: func.HttpRequest) -> dict[str, Any]:
        """Bars newest first, by ``?interval=``, ``?limit=`` and ``?cursor=``."""
        series = await self._series(req)
        count = limit_of(req)
        cursor = req.params.get("cursor")
        through = parse_instant(sort_of(cursor).split("|", 1)[0]) if cursor else None
        before = sort_key(through, "~") if through else None
        columns = await self.bars.latest(series.key, series.revision, before=before, count=count + 65)
        if through:
            limit = minute_of(through)
            keep = sum(1 for minute in columns.closed if minute < limit)
            columns = columns[:keep]
        shown = columns[max(0, len(columns) - count) :]
        as_of = instant_of(columns.closed[-1]) if len(columns) else None
        more = len(columns) > len(shown)
        items = [
            {
                "opened_at": instant_of(shown.opened[i]),
                "closed_at": instant_of(shown.closed[i]),
                "open": shown.open[i],
                "high": shown.high[i],
                "low": shown.low[i],
                "close": shown.close[i],
                "volume": shown.volume[i],
                "split": shown.split[i],
            }
            for i in reversed(range(len(shown)))
        ]
        newest = as_of if not cursor else series.evaluated_through
        return {
            "items": items,
            "next": cursor_of(sort_key(instant_of(shown.closed[0]))) if more else None,
            "symbol": series.symbol,
            "interval": series.interval,
            "as_of": newest,
            "is_stale": newest is None or newest < self._expected(series.interval),
            "provider": series.provider,
            "adjustment": series.adjustment,
            "revision": series.revision,
        }

    async def quote(self, symbol: str) -> dict[str, Any]:
        """
        The stored quote, else the newest daily close; interest in what is missing is noted.

        Raises:
            NotFoundError: nothing is known of the symbol.

        """
        wanted = await self.quotes.get(symbol)
        now = self.clock.now()
        if wanted and wanted.quote:
            q = wanted.quote
            open_session = calendar().session_at(now)
            newest = now - STALE_QUOTE if open_session else calendar().previous_close(now).closes_at
            return {
                "symbol": symbol,
                "price": q.price,
                "previous_close": q.previous_close,
                "as_of": q.as_of,
                "is_stale": q.as_of < newest,
                "provider": q.provider,
            }
        await self._note_interest(wanted, symbol)
        try:
            series = await self.series.get(symbol, Interval.DAY)
        except NotFoundError:
            raise NotFoundError(
                f"no price of {symbol} is stored; PUT /api/watchlist/{symbol} makes us follow it"
            ) from None
        columns = await self.bars.latest(series.key, series.revision, before=None, count=2)
        if not len(columns):
            raise NotFoundError(f"no price of {symbol} is stored yet; its history is still being fetched")
        as_of = instant_of(columns.closed[-1])
        return {
            "symbol": symbol,
            "price": columns.close[-1],
            "previous_close": columns.close[-2] if len(columns) > 1 else None,
            "as_of": as_of,
            "is_stale": as_of < self._expected(Interval.DAY),
            "provider": series.provider or "",
        }

    async def describe(self, req: func.HttpRequest) -> dict[str, Any]:
        """What is held of a series."""
        s = await self._series(req)
        columns = await self.bars.window(s.key, s.revision, since=None, lookback=0)
        return {
            **_watch_item(s),
            "bar_count": len(columns),
            "first_closed_at": instant_of(columns.closed[0]) if len(columns) else None,
            "last_closed_at": instant_of(columns.closed[-1]) if len(columns) else None,
            "next_due_at": s.due_at,
            "provider": s.provider,
            "adjustment": s.adjustment,
            "revision": s.revision,
            "misses": s.misses,
            "entries": s.entries,
        }

    async def watchlist(self) -> list[dict[str, Any]]:
        """Every series ever watched."""
        return [_watch_item(s) for s in await self.series.all()]

    async def watch(self, req: func.HttpRequest) -> dict[str, Any]:
        """Watch what the request names, live from this market instant."""
        return _watch_item(await self.ingest.watch(_watch(req), by="api", live_from=self.clock.now()))

    async def unwatch(self, req: func.HttpRequest) -> dict[str, Any]:
        """Stop watching what the request names."""
        return _watch_item(await self.ingest.unwatch(_watch(req), by="api"))

    async def _series(self, req: func.HttpRequest) -> Series:
        watch = _watch(req)
        return await self.series.get(watch.symbol, watch.interval)

    async def _note_interest(self, wanted: WantedQuote | None, symbol: str) -> None:
        known = wanted or WantedQuote(symbol=symbol)
        try:
            await self.quotes.put(replace(known, wanted=known.wanted + 1))
        except (ConflictError, StaleError):
            return  # noted by somebody else at the same moment

    def _expected(self, interval: Interval) -> datetime:
        return calendar().last_bar_close(interval, self.clock.now() - self.delay)


def _watch(req: func.HttpRequest) -> Watch:
    return Watch(symbol=symbol_of(req.route_params["symbol"]), interval=interval_of(req.params.get("interval", "1d")))


def _watch_item(s: Series) -> dict[str, Any]:
    return {
        "symbol": s.symbol,
        "interval": s.interval,
        "is_watched": s.is_active,
        "watched_by": s.watched_by,
        "live_from": s.live_from,
        "evaluated_through": s.evaluated_through,
        "trouble": s.trouble,
    }
