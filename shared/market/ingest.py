"""Which slots are due, and how their bars get in. Derived from stored state, so a missed timer costs nothing."""

import asyncio
import hashlib
import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.clock import Clock, format_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    PermanentError,
    RateLimitedError,
    StaleError,
    TransientError,
    TroopError,
    UnavailableError,
)
from shared.events import EventPublisher
from shared.market.events import BarsIngested
from shared.market.fetcher import Fetcher
from shared.market.models import (
    Adjustment,
    Bar,
    Columns,
    Fetched,
    Interval,
    instant_of,
    interval_of,
    minute_of,
    symbol_of,
)
from shared.market.sessions import calendar
from shared.market.stores import SYSTEM, Bars, Quotes, Series, SeriesStore, WantedQuote
from shared.telemetry import get_logger, span

log = get_logger(__name__)

BUDGET = timedelta(seconds=8)
OVERTIME = 1.0
"""Seconds a slot that was begun in time may go on behind the budget."""
AT_ONCE = 8
DUE_LIMIT = 1000
REPEAT_AFTER = timedelta(seconds=20)
"""When stored bars are still not evaluated this long after, their event is told again."""
FIRST_WAIT = timedelta(minutes=15)
OUTAGE_WAIT = timedelta(minutes=1)
LONGEST_WAIT = timedelta(days=1)
SAME = 1e-6
"""Relative difference up to which two prices of one bar count as the same (providers round to 4 decimals)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """One line of the watchlist."""

    symbol: str
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingest:
    """Brings closed bars in and says so."""

    documents: Documents
    series: SeriesStore
    bars: Bars
    quotes: Quotes
    fetcher: Fetcher
    publisher: EventPublisher
    wall: Clock
    market: Clock
    delay: timedelta
    live_from: datetime | None
    watchlist_file: Path

    async def ingest(self) -> int:
        """Do every slot that is due by the market clock, oldest first, for at most 8 s; returns how many."""
        deadline = self.wall.now() + BUDGET
        await self.apply_watchlist_file()
        due = await self.series.due(self.market.now(), DUE_LIMIT)
        # Oldest first, but those that were in trouble last time behind the others: eight slow ones would starve all.
        queue = iter(sorted(due, key=lambda series: series.trouble is not None))
        done = 0

        async def work() -> None:
            nonlocal done
            for series in queue:
                if self.wall.now() >= deadline:
                    return
                left = (deadline - self.wall.now()).total_seconds() + OVERTIME
                try:
                    async with asyncio.timeout(left):
                        await self._slot(series)
                except TimeoutError:  # as safe as a kill: what is stored is stored, the rest is still due
                    await self._postpone_safely(series, UnavailableError("the slot took too long"))
                done += 1

        await asyncio.gather(*(work() for _ in range(min(AT_ONCE, len(due)))))
        return done

    async def watch(self, watch: Watch, *, by: str, live_from: datetime) -> Series:
        """Begin to watch a series, or begin again: what closed while nobody watched raises no alert."""
        now = self.market.now()
        series = Series(symbol=watch.symbol, interval=watch.interval, live_from=live_from, watched_by=by, due_at=now)
        try:
            watched = await self.series.create(series)
        except ConflictError:
            watched = await self.series.get(watch.symbol, watch.interval)
            if not watched.is_active:
                live_from = max(watched.live_from, live_from)
                watched = await self.series.save(
                    replace(watched, is_active=True, watched_by=by, live_from=live_from, due_at=now, misses=0)
                )
        await self._want_quote(watch.symbol, now)
        return watched

    async def unwatch(self, watch: Watch, *, by: str) -> Series:
        """Stop fetching a series; what is stored stays. Raises NotFoundError if it never was watched."""
        stored = await self.series.get(watch.symbol, watch.interval)
        saved = await self.series.save(replace(stored, is_active=False, watched_by=by, due_at=None))
        if not any(s.is_active for s in await self.series.all() if s.symbol == watch.symbol):
            await self._want_quote(watch.symbol, None)
        return saved

    async def apply_watchlist_file(self) -> None:
        """Make the watchlist file's last word true, once for each of its versions."""
        text = await asyncio.to_thread(_text_of, self.watchlist_file)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        try:
            applied = await self.documents.read(SYSTEM, "watchlist", "file")
        except NotFoundError:
            applied = None
        if applied and applied.body["digest"] == digest:
            return
        wanted = read_watchlist(text, str(self.watchlist_file))
        live_from = self.live_from or self.market.now()
        for watch in wanted:
            await self.watch(watch, by="file", live_from=live_from)
        listed = {(w.symbol, w.interval) for w in wanted}
        for series in await self.series.all():
            if series.is_active and series.watched_by == "file" and (series.symbol, series.interval) not in listed:
                await self.unwatch(Watch(symbol=series.symbol, interval=series.interval), by="file")
        body = {"digest": digest, "count": len(wanted)}
        try:
            if applied:
                await self.documents.replace(SYSTEM, applied.with_body(body))
            else:
                sort = sort_key(self.wall.now(), "watchlist|file")
                await self.documents.create(SYSTEM, Document(id="file", partition="watchlist", sort=sort, body=body))
        except (ConflictError, StaleError):
            return  # another instance applied the same file
        log.info("watchlist.applied", count=len(wanted))

    async def _want_quote(self, symbol: str, due_at: datetime | None) -> None:
        """Have the quote refreshed from *due_at* on, or (None) no longer."""
        while True:
            known = await self.quotes.get(symbol) or WantedQuote(symbol=symbol)
            if bool(known.due_at) == bool(due_at):
                return
            try:
                await self.quotes.put(replace(known, due_at=due_at))
            except (ConflictError, StaleError):
                continue  # a reader noted its interest, or a refresh came in, at the same moment
            return

    async def _slot(self, series: Series) -> None:
        """One slot; no trouble of one series may end the others."""
        with span("series.ingest", symbol=series.symbol, interval=series.interval):
            try:
                await self._ingest(series)
            except (StaleError, ConflictError) as e:
                log.info("slot.raced", series=series.key, reason=str(e))  # another instance did it: see next time
            except TroopError as e:
                await self._postpone_safely(series, e)
            except Exception as e:
                log.exception("slot.broke", series=series.key)
                await self._postpone_safely(series, PermanentError(f"unexpected trouble ({type(e).__name__})"))

    async def _postpone_safely(self, series: Series, e: Exception) -> None:
        try:
            await self._postpone(series, e, e.retry_after if isinstance(e, RateLimitedError) else None)
        except TroopError as trouble:
            log.warning("slot.left_due", series=series.key, reason=str(trouble))  # storage itself is in trouble

    async def _ingest(self, series: Series) -> None:
        if not series.is_active:
            return
        now = self.market.now()
        newest = await self.bars.newest(series.key, series.revision)
        stored = instant_of(newest.columns.closed[-1]) if newest else None
        expected = calendar().last_bar_close(series.interval, now - self.delay)
        owed = stored is not None and (series.evaluated_through is None or series.evaluated_through < stored)
        if newest and stored and owed:
            series = await self._repeat(series, newest.recorded_at, stored)
        if stored and stored >= expected:
            if not owed:
                await self.series.save(replace(series, due_at=self.next_due(series.interval, stored)))
            return
        fetched = await self.fetcher.bars(
            series.symbol, series.interval, since=stored, now=now, provider=series.provider
        )
        for row in fetched.refused_rows:
            log.warning("bar.refused", series=series.key, provider=fetched.provider, reason=row)
        closed = [b for b in fetched.bars if b.closed_at <= now]
        if newest and _was_revised(newest.columns, closed):
            series, closed = await self._revise(series, now)
            newest = None
        new = [b for b in closed if stored is None or b.closed_at > stored]
        if not new:
            await self._miss(series, now, fetched)
            return
        if series.provider is None or series.misses or series.trouble:
            series = await self.series.save(
                replace(series, provider=fetched.provider, adjustment=fetched.adjustment, misses=0, trouble=None)
            )
        await self.bars.append(series.key, series.interval, series.revision, closed, behind=newest)
        log.info("bars.stored", series=series.key, count=len(new), through=format_instant(new[-1].closed_at))
        await self._tell(series, new[0].closed_at, new[-1].closed_at, len(new))

    async def _revise(self, series: Series, now: datetime) -> tuple[Series, list[Bar]]:
        """The provider changed history (a split, a correction): write all of it again under the next revision."""
        whole = await self.fetcher.bars(series.symbol, series.interval, since=None, now=now, provider=series.provider)
        closed = [b for b in whole.bars if b.closed_at <= now]
        held = await self.bars.window(series.key, series.revision, since=None, lookback=0)
        if not closed or minute_of(closed[-1].closed_at) < held.closed[-1]:
            raise UnavailableError("the provider's new history ends before what is stored")
        first = minute_of(closed[0].closed_at)
        if first > held.closed[0]:
            if series.adjustment is not Adjustment.RAW:
                raise UnavailableError("the provider's new history begins after what is stored")
            # Raw prices from before the provider's answer are as true as ever.
            closed = [held.bar(i) for i in range(bisect_left(held.closed, first))] + closed
        await self.bars.append(series.key, series.interval, series.revision + 1, closed)
        log.warning("series.revised", series=series.key, revision=series.revision + 1)
        return await self.series.save(replace(series, revision=series.revision + 1)), closed

    async def _repeat(self, series: Series, recorded_at: datetime, stored: datetime) -> Series:
        """Tell again of stored bars that nobody has evaluated for a while, once in a while."""
        last = max(recorded_at, series.told_at or recorded_at)
        if self.wall.now() - last < REPEAT_AFTER:
            return series
        window = await self.bars.window(series.key, series.revision, since=series.evaluated_through, lookback=0)
        if len(window):
            series = await self.series.save(replace(series, told_at=self.wall.now()))
            await self._tell(series, instant_of(window.closed[0]), stored, len(window))
        return series

    async def _tell(self, series: Series, first: datetime, last: datetime, count: int) -> None:
        event = BarsIngested(
            occurred_at=last,
            recorded_at=self.wall.now(),
            symbol=series.symbol,
            interval=series.interval,
            revision=series.revision,
            first_closed_at=first,
            last_closed_at=last,
            count=count,
        )
        await self.publisher.publish([event])

    async def _miss(self, series: Series, now: datetime, fetched: Fetched) -> None:
        """The provider has not got the bar yet: ask again later and later, until the next slot at the latest."""
        wait = _wait(series.misses, FIRST_WAIT, LONGEST_WAIT)
        await self.series.save(
            replace(
                series,
                misses=series.misses + 1,
                trouble=None,
                due_at=min(now + wait, self.next_due(series.interval, now)),
            )
        )
        log.info("slot.empty", series=series.key, provider=fetched.provider, misses=series.misses + 1)

    async def _postpone(self, series: Series, e: Exception, retry_after: timedelta | None) -> None:
        log.warning("slot.postponed", series=series.key, reason=f"{type(e).__name__}: {e}")
        now = self.market.now()
        # A provider that is down is asked less and less: every try costs a call. Being told to slow down costs none,
        # because the throttle then refuses by itself, so such a slot simply stays due.
        is_down = isinstance(e, UnavailableError)
        wait = (
            _wait(series.misses, OUTAGE_WAIT, FIRST_WAIT) if is_down else _wait(series.misses, FIRST_WAIT, LONGEST_WAIT)
        )
        passes = isinstance(e, TransientError) and not is_down
        trouble: dict[str, Any] = {
            "kind": type(e).__name__,
            "text": str(e),
            "recorded_at": format_instant(self.wall.now()),
            "retry_after_seconds": retry_after.total_seconds() if retry_after else None,
        }
        try:
            current = await self.series.get(series.symbol, series.interval)
            if not current.is_active:
                return
            if passes and current.trouble and current.trouble["kind"] == trouble["kind"]:
                return  # known already; a slot that stays due for minutes is not written about each time
            await self.series.save(
                replace(
                    current,
                    misses=current.misses if passes else current.misses + 1,
                    trouble=trouble,
                    due_at=current.due_at if passes else now + wait,
                )
            )
        except (StaleError, NotFoundError):
            return  # somebody else wrote about it at the same moment; it stays due

    def next_due(self, interval: Interval, after: datetime) -> datetime:
        """The market instant at which the first bar closing after *after* can be fetched."""
        return calendar().next_bar_close(interval, after) + self.delay

    async def refresh_quotes(self) -> int:
        """Fetch the quotes that are due: every 15 minutes of an open session, and once after it."""
        deadline = self.wall.now() + BUDGET
        now = self.market.now()
        done = 0
        for wanted in await self.quotes.due(now, 20):
            if self.wall.now() >= deadline:
                break
            open_session = calendar().session_at(now)
            again = now + FIRST_WAIT if open_session else calendar().next_close(now).opens_at
            try:
                quote = await self.fetcher.quote(wanted.symbol)
                fresh = replace(wanted, quote=quote, recorded_at=self.wall.now(), wanted=0, due_at=again)
                await self.quotes.put(fresh)
                done += 1
            except StaleError:
                continue
            except RateLimitedError as e:
                log.info("quote.postponed", symbol=wanted.symbol, reason=str(e))
                break
            except TransientError as e:
                log.info("quote.postponed", symbol=wanted.symbol, reason=str(e))
                with suppress(StaleError):  # behind the others, so that one bad quote stops no other
                    await self.quotes.put(replace(wanted, due_at=now + FIRST_WAIT))
            except PermanentError as e:
                log.warning("quote.refused", symbol=wanted.symbol, reason=str(e))
                with suppress(StaleError):  # a reader noted its interest: it stays due
                    await self.quotes.put(replace(wanted, due_at=now + LONGEST_WAIT))
        return done


def read_watchlist(text: str, name: str) -> list[Watch]:
    """
    Read a watchlist: ``[[watch]]`` tables with ``symbols`` and ``interval``.

    Raises:
        ConfigurationError: names the file and what is wrong in it.

    """
    try:
        return [
            Watch(symbol=symbol_of(symbol), interval=interval_of(line.interval))
            for line in _WatchlistFile.model_validate(tomllib.loads(text)).watch
            for symbol in line.symbols
        ]
    except ValidationError as e:
        fault = e.errors(include_url=False)[0]
        why = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    except (tomllib.TOMLDecodeError, InvalidPayloadError) as e:
        why = str(e)
    raise ConfigurationError(f'{name}: {why}; write [[watch]] tables such as symbols = ["AAPL"], interval = "1d"')


class _WatchlistLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    symbols: list[str]
    interval: str = "1d"


class _WatchlistFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    watch: list[_WatchlistLine] = []


def _wait(misses: int, first: timedelta, longest: timedelta) -> timedelta:
    """How long to wait after so many misses in a row: doubling from *first* to *longest*."""
    return min(first * (1 << min(misses, 7)), longest)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigurationError(f"WATCHLIST_FILE: {path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigurationError(f"WATCHLIST_FILE: {path} is no UTF-8 text") from e


def _was_revised(stored: Columns, fetched: Sequence[Bar]) -> bool:
    """Whether the provider now says something else about the last bar we hold."""
    last = stored.closed[-1]
    for bar in fetched:
        if minute_of(bar.closed_at) == last:
            return abs(bar.close - stored.close[-1]) > SAME * stored.close[-1]
    return False
