"""
What people can ask of the market room over HTTP.

``Market`` reads what is stored and never spends a provider call; ``Supply`` is how well we are supplied, and what
callers we know have fetched, be it for the answer they wait for.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal

import azure.functions as func
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import sort_key
from shared.errors import ConfigurationError, InvalidPayloadError, NotFoundError, TroopError, UnavailableError
from shared.http import cursor_of, json_of, limit_of, listed, sort_of
from shared.identity import ForbiddenError
from shared.market.callers import Caller
from shared.market.fetcher import Fetcher, ProviderStatus
from shared.market.fetches import Fetch, Fetches, Wanted
from shared.market.gaps import Kind, Stretch
from shared.market.health import Kind as Sold
from shared.market.ingest import Ingest, Watch
from shared.market.library import MINUTE, Library, quote_is_stale
from shared.market.mending import Mending
from shared.market.models import EPOCH, Columns, Interval, Priority, instant_of, interval_of, minute_of, symbol_of
from shared.market.prefetching import Prefetching, PrefetchReport
from shared.market.sessions import calendar
from shared.market.stores import Bars, Extent, Quotes, Series, SeriesStore
from shared.telemetry import redact

SHOWN = {Interval.MINUTE: timedelta(days=30), Interval.HOUR: timedelta(days=730)}
"""How much of a long series /api/coverage looks at unless told; days are looked at from the first on."""
MOST_BARS = 120_000
"""How many bars /api/coverage looks at in one answer: a year of minutes."""
MOST_RANGES = 500
_OPEN = 0.2
"""The share of the time that an exchange is open, a little less than it is."""
_LATEST = datetime(9000, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
PATIENCE = timedelta(seconds=3)
"""How long a read by a caller we know waits for what is missing."""
OVERTIME = timedelta(seconds=2)
"""How long a call that was begun in time may go on behind that; then the answer is what is stored."""


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
        """Bars newest first, by ``?interval=``, ``?from=``, ``?to=``, ``?limit=`` and ``?cursor=``; it is noted."""
        answer = await self.page(req)
        await self.quotes.interest.note(answer["symbol"])
        return answer

    async def page(self, req: func.HttpRequest) -> dict[str, Any]:
        """The same without a note of the interest."""
        series = await self._series(req)
        count = limit_of(req)
        first, end = page_of(req)
        columns = await self.bars.latest(series.key, series.revision, end=end, count=count + 1)
        if end is None:
            newest = instant_of(columns.closed[-1]) if len(columns) else None
        else:
            extent = await self.bars.extent(series.key, series.revision)
            newest = extent.last if extent else None
        columns = columns[_count_below(columns, first) :]
        shown = columns[max(0, len(columns) - count) :]
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
        The stored quote, else the newest daily close; that somebody asked is noted.

        Raises:
            NotFoundError: nothing is known of the symbol.

        """
        await self.quotes.interest.note(symbol)
        return await self.price(symbol)

    async def price(self, symbol: str) -> dict[str, Any]:
        """The same without a note of the interest."""
        wanted = await self.quotes.get(symbol)
        if wanted and wanted.quote:
            q = wanted.quote
            return {
                "symbol": symbol,
                "price": q.price,
                "previous_close": q.previous_close,
                "as_of": q.as_of,
                "is_stale": quote_is_stale(q.as_of, self.clock.now()),
                "provider": q.provider,
            }
        try:
            series = await self.series.get(symbol, Interval.DAY)
        except NotFoundError:
            raise NotFoundError(
                f"no price of {symbol} is stored; PUT /api/watchlist/{symbol} makes us follow it"
            ) from None
        columns = await self.bars.latest(series.key, series.revision, count=2)
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
        extent = await self.bars.extent(s.key, s.revision)
        return {
            **_watch_item(s),
            "bar_count": extent.count if extent else 0,
            "first_closed_at": extent.first if extent else None,
            "last_closed_at": extent.last if extent else None,
            "next_due_at": s.due_at,
            "provider": s.provider,
            "adjustment": s.adjustment,
            "revision": s.revision,
            "misses": s.misses,
            "entries": s.entries,
            "changes": await self._changes(s),
        }

    async def _changes(self, s: Series) -> list[dict[str, Any]]:
        """How the bars came to be what they are: other providers, other writings of their history."""
        provenance = self.ingest.provenance
        return [
            {
                "kind": c.kind,
                "provider": c.provider,
                "former": c.former,
                "revision": c.revision,
                "through": c.through,
                "occurred_at": c.occurred_at,
                "reason": c.reason,
            }
            for c in (await provenance.of(s) if provenance else ())
        ]

    async def watchlist(self, req: func.HttpRequest) -> dict[str, Any]:
        """Every series ever watched or fetched, by ``?limit=`` and ``?cursor=``: the newest known first."""
        found, cursor = await listed(
            req, lambda after, newest_first, limit: self.series.page(after, newest_first=newest_first, limit=limit)
        )
        return {"items": [_watch_item(s) for s in found], "next": cursor}

    async def watch(self, req: func.HttpRequest) -> dict[str, Any]:
        """Watch what the request names, live from this market instant."""
        return _watch_item(await self.ingest.watch(_watch(req), by="api", live_from=self.clock.now()))

    async def unwatch(self, req: func.HttpRequest) -> dict[str, Any]:
        """Stop watching what the request names."""
        return _watch_item(await self.ingest.unwatch(_watch(req), by="api"))

    async def _series(self, req: func.HttpRequest) -> Series:
        watch = _watch(req)
        return await self.series.get(watch.symbol, watch.interval)

    def _expected(self, interval: Interval) -> datetime:
        return calendar().last_bar_close(interval, self.clock.now() - self.delay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """
    How well we are supplied with data, and what known callers ask to have fetched.

    A read by somebody we know is first supplied with what is missing, as far as that can be had in three seconds and
    within the caller's share of the day; one by anybody else spends no call.
    """

    market: Market
    library: Library
    fetches: Fetches
    fetcher: Fetcher
    prefetching: Prefetching
    mending: Mending
    bars: Bars
    clock: Clock

    async def list_bars(self, req: func.HttpRequest, caller: Caller | None) -> dict[str, Any]:
        """
        Bars as ``Market.list_bars`` shows them; for a *caller* those missing on this page are fetched first.

        ``reason`` says what could not be fetched, and why. Raises what fetching raised where nothing at all is held
        of this page: CappedError once the caller's share of the day is spent.
        """
        if caller is None:
            answer = await self.market.list_bars(req)
            self.fetcher.count_hit(Sold.BARS, answer["provider"])
            return answer
        brought = await self._bring(req, caller)
        answer = await self.market.page(req)
        return answer | {"reason": brought.reason, "is_stale": answer["is_stale"] or brought.has_failed}

    async def quote(self, symbol: str, caller: Caller | None) -> dict[str, Any]:
        """
        A quote as ``Market.quote`` shows it; for a *caller* one that is no longer good is renewed first.

        ``reason`` says why that could not be. Raises why where no price of any kind is stored.
        """
        if caller is None:
            answer = await self.market.quote(symbol)
            self.fetcher.count_hit(Sold.QUOTE, answer["provider"] or None)
            return answer
        trouble, reason = None, None
        try:
            answered = await _in_time(self.library.quote(symbol, caller=caller, deadline=self._deadline()))
            reason = answered.reason if answered else None
        except TroopError as e:
            trouble, reason = e, f"{type(e).__name__}: {e}"
        try:
            answer = await self.market.price(symbol)
        except NotFoundError:
            if trouble:
                raise trouble from None
            raise
        return answer | {"reason": _shown(reason), "is_stale": answer["is_stale"] or reason is not None}

    async def providers(self) -> Sequence[ProviderStatus]:
        """Every provider: its health, what is left of its quotas, what it refused us, how often it was spared."""
        return await self.fetcher.status()

    async def prefetched(self) -> PrefetchReport:
        """How well what will be asked for is foreseen."""
        return await self.prefetching.report()

    async def coverage(self, req: func.HttpRequest) -> dict[str, Any]:
        """
        Which bars of a series are held, missing and absent, by ``?interval=``, ``?from=`` and ``?to=``.

        Raises:
            InvalidPayloadError: the range is too long to look at in one answer.

        """
        watch = _watch(req)
        first, last = range_of(req)
        series = await self.library.series.get(watch.symbol, watch.interval)
        extent = await self.bars.extent(series.key, series.revision)
        if first is None and extent:
            span = SHOWN.get(watch.interval)
            first = max(extent.first, self.clock.now() - span) if span else extent.first
        since = first - MINUTE if first else None
        if since and ((last or self.clock.now()) - since) / watch.interval.span * _OPEN > MOST_BARS:
            raise InvalidPayloadError(
                f"that is more than {MOST_BARS} bars at {watch.interval}: name a shorter range with from and to"
            )
        looked = await self.library.look(watch.symbol, watch.interval, since=since, until=last)
        ranges = {kind: [s for s in looked.stretches if s.kind is kind] for kind in Kind}
        newest = looked.stretches[-1] if looked.stretches else None
        return {
            "symbol": series.symbol,
            "interval": series.interval,
            "from": first,
            "to": looked.until,
            "bar_count": extent.count if extent else 0,
            "first_closed_at": extent.first if extent else None,
            "as_of": extent.last if extent else None,
            "is_stale": extent is None or (newest is not None and newest.kind is Kind.MISSING),
            "provider": series.provider,
            "adjustment": series.adjustment,
            "revision": series.revision,
            "counts": {kind: sum(s.count for s in found) for kind, found in ranges.items()},
            **{kind: [_range(s) for s in found[-MOST_RANGES:]] for kind, found in ranges.items()},
            "is_cut": any(len(found) > MOST_RANGES for found in ranges.values()),
            "actions": _actions(looked.columns),
        }

    async def request(self, req: func.HttpRequest, caller: Caller) -> Fetch:
        """Queue the fetch that the request's body describes."""
        return await self.fetches.request(wanted_of(json_of(req)), caller)

    async def fetch(self, req: func.HttpRequest) -> Fetch:
        """How a fetch stands."""
        return await self.fetches.get(req.route_params["id"])

    async def cancel(self, req: func.HttpRequest, caller: Caller | None = None) -> Fetch:
        """
        Stop a fetch; a *caller* only one of their own.

        Raises:
            ForbiddenError: somebody else asked for it.

        """
        id_ = req.route_params["id"]
        if caller and (await self.fetches.get(id_)).caller != caller.id:
            raise ForbiddenError("somebody else asked for this fetch: only they, or an operator, may cancel it")
        return await self.fetches.cancel(id_)

    async def _bring(self, req: func.HttpRequest, caller: Caller) -> "_Brought":
        """Fetch what is missing of the page that the request asks for."""
        watch = _watch(req)
        first, end = page_of(req)
        newest = calendar().last_bar_close(watch.interval, self.clock.now() - self.market.delay)
        until = min(newest, instant_of(end - 1)) if end is not None else newest
        try:
            begin = _page_begin(watch.interval, until, limit_of(req) + 1)
        except ConfigurationError:
            return _Brought()  # before the exchange's table begins there is nothing to be had
        series, extent = await self._held(watch)
        since = max(first - MINUTE, begin) if first else _held_from(watch.interval, extent, begin)
        later = None
        if series and extent and until > extent.last and series.is_active and _is_later(series, self.clock.now()):
            # The timer has asked in vain, and knows when to ask again: readers asking meanwhile would only spend calls.
            until, later = extent.last, series.due_at
        try:
            answered = await _in_time(
                self.library.bars(
                    watch.symbol, watch.interval, since=since, until=until, caller=caller, deadline=self._deadline()
                )
            )
        except UnavailableError as e:
            looked = await self.library.look(watch.symbol, watch.interval, since=since, until=until)
            if not len(looked.columns):
                raise
            return _Brought(reason=_shown(f"{type(e).__name__}: {e}"), has_failed=True)
        if answered.reason:
            return _Brought(reason=_shown(answered.reason), has_failed=True)
        if missing := sum(stretch.count for stretch in answered.missing):
            return _Brought(reason=f"{missing} bars are missing still: ask again later, or POST /api/my/fetches")
        if later:
            return _Brought(reason=f"newer bars were not to be had yet: they are asked for at {format_instant(later)}")
        return _Brought()

    async def _held(self, watch: Watch) -> tuple[Series | None, Extent | None]:
        try:
            series = await self.market.series.get(watch.symbol, watch.interval)
        except NotFoundError:
            return None, None
        return series, await self.bars.extent(series.key, series.revision)

    def _deadline(self) -> datetime:
        return self.library.wall.now() + PATIENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Brought:
    """What could not be brought of a page, and why; ``has_failed``: it was to be had, and fetching it failed."""

    reason: str | None = None
    has_failed: bool = False


def wanted_of(body: bytes) -> Wanted:
    """
    Read ``{"symbol", "interval", "from", "to", "priority"}``.

    Raises:
        InvalidPayloadError: names what is wrong and what to write.

    """
    try:
        read = FetchDraft.model_validate_json(body)
    except ValidationError as e:
        fault = e.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, fault["loc"])) or "the body"
        raise InvalidPayloadError(
            f'{name}: {fault["msg"]}; send such as {{"symbol": "AAPL", "interval": "1d", "from": "2012-01-01", '
            '"to": "2012-06-30"}'
        ) from None
    first, last = _first_of(read.first), _last_of(read.last)
    return Wanted(
        symbol=symbol_of(read.symbol),
        interval=interval_of(read.interval),
        since=first - MINUTE,
        until=last,
        priority=Priority[read.priority.upper()],
    )


def range_of(req: func.HttpRequest) -> tuple[datetime | None, datetime | None]:
    """
    The instants that ``?from=`` and ``?to=`` name: the first and the last moment at which a bar may close.

    Raises:
        InvalidPayloadError: one of them is neither a date nor an instant, or they are the wrong way round.

    """
    first, last = req.params.get("from"), req.params.get("to")
    found = (_first_of(first) if first else None, _last_of(last) if last else None)
    if found[0] and found[1] and found[0] > found[1]:
        raise InvalidPayloadError(f"from ({first}) lies behind to ({last})")
    return found


def page_of(req: func.HttpRequest) -> tuple[datetime | None, int | None]:
    """
    The first moment that ``?from=`` names, and the minute before which bars close by ``?to=`` and ``?cursor=``.

    Raises:
        InvalidPayloadError: one of them is not what it should be.

    """
    first, last = range_of(req)
    end = minute_of(last) + 1 if last else None
    if cursor := req.params.get("cursor"):
        place = minute_of(parse_instant(sort_of(cursor).split("|", 1)[0]))
        end = min(end, place) if end else place
    return first, end


async def _in_time[T](work: Awaitable[T]) -> T:
    """
    Wait for a read that may fetch, and no longer than the answer can wait.

    Raises:
        UnavailableError: it took too long; what was stored until then stays.

    """
    try:
        async with asyncio.timeout((PATIENCE + OVERTIME).total_seconds()):
            return await work
    except TimeoutError:
        raise UnavailableError("the provider took too long: try again", retry_after=PATIENCE) from None


def _shown(reason: str | None) -> str | None:
    return redact(reason) if reason else None


def _held_from(interval: Interval, extent: Extent | None, begin: datetime) -> datetime | None:
    """
    From where on bars are missed by who names no beginning: not before the first that is held.

    None: nothing is held, so a whole history of days is fetched, which takes no more calls than a page of it.
    """
    if extent is None:
        return None if interval is Interval.DAY else begin
    return max(extent.first - MINUTE, begin)


def _is_later(series: Series, now: datetime) -> bool:
    return series.due_at is not None and series.due_at > now


def _page_begin(interval: Interval, until: datetime, count: int) -> datetime:
    """
    The moment before the first of the *count* bars that close last by *until*.

    Raises:
        ConfigurationError: no bar closes by then, as far as the exchange's table says.

    """
    at = calendar().last_bar_close(interval, until)
    with suppress(ConfigurationError):
        for _ in range(count - 1):
            at = calendar().last_bar_close(interval, at - MINUTE)
    return at - MINUTE


class FetchDraft(BaseModel):
    """The bars to fetch; ``from`` and ``to`` are dates (the exchange's whole day) or instants with a zone."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    symbol: str
    interval: str = "1d"
    first: str = Field(alias="from")
    last: str = Field(alias="to")
    priority: Literal["asked", "backfill"] = "asked"


def _first_of(text: str) -> datetime:
    """The first moment of a range; a date means its whole day at the exchange, midnight at its end included."""
    day = _day_of(text)
    return _within(datetime.combine(day, time(), calendar().zone) + MINUTE) if day else _instant_of(text)


def _last_of(text: str) -> datetime:
    """The last moment of a range; a date means its whole day at the exchange."""
    day = _day_of(text)
    return _within(datetime.combine(day + DAY, time(), calendar().zone)) if day else _instant_of(text)


def _day_of(text: str) -> date | None:
    try:
        return min(date.fromisoformat(text), _LATEST.date())
    except ValueError:
        return None


def _within(instant: datetime) -> datetime:
    return max(min(instant.astimezone(UTC), _LATEST), EPOCH)


def _instant_of(text: str) -> datetime:
    try:
        return _within(parse_instant(text))
    except ValueError:
        raise InvalidPayloadError(
            f"{text[:40]!r} is neither a date such as 2012-01-31 nor an instant such as 2012-01-31T21:00:00Z"
        ) from None


def _count_below(columns: Columns, first: datetime | None) -> int:
    return bisect_left(columns.closed, minute_of(first)) if first else 0


def _range(s: Stretch) -> dict[str, Any]:
    return {"first": s.first, "last": s.last, "count": s.count, "provider": s.provider, "asked_at": s.asked_at}


def _actions(columns: Columns) -> list[dict[str, Any]]:
    return [
        {"closed_at": instant_of(columns.closed[i]), "split": factor}
        for i, factor in enumerate(columns.split)
        if factor != 1.0
    ]


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
