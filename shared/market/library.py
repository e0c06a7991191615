"""
What is stored first, and a provider only for what is missing.

Bars that have closed are never fetched twice; what is missing is worked out from the session table, fetched once
however many ask for it, and only for a caller we know. Where fetching fails the stored bars are the answer, and
they say so.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol

from shared.clock import Clock
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    QuotaSpentError,
    RefusedError,
    StaleError,
    TroopError,
    UnavailableError,
)
from shared.events import EventPublisher
from shared.market.callers import Caller, Callers, CappedError
from shared.market.events import BarsIngested
from shared.market.flights import Flights
from shared.market.gaps import SETTLED, Asked, Kind, Slice, Stretch, expected, first_slice, noted, survey
from shared.market.health import Kind as Sold
from shared.market.models import (
    EPOCH,
    Adjustment,
    Bar,
    Columns,
    Fetched,
    Interval,
    Priority,
    Quote,
    instant_of,
    minute_of,
    series_key,
)
from shared.market.sessions import calendar
from shared.market.stores import SYSTEM, Bars, Extent, Quotes, Series, SeriesStore, WantedQuote, merged
from shared.telemetry import get_logger, span

log = get_logger(__name__)

COVERAGE = "coverage"
SAME = 1e-6
"""Relative difference up to which two prices of one bar count as the same (providers round to 4 decimals)."""
STEPS = 4
"""How many fetches one answer waits for; what is still missing then, it says."""
RACES = 6
MINUTE = timedelta(minutes=1)

QUOTE_LIVES = timedelta(seconds=60)
"""How long a quote of an open session answers without a call (wall time)."""
CLOSED_QUOTE_LIVES = timedelta(minutes=15)
"""How long to wait before a quote that misses the session's close is asked for again (wall time)."""
QUOTE_RESTS = timedelta(seconds=5)
"""A quote is asked for no more often, however fast the market's clock runs."""
STALE_QUOTE = timedelta(minutes=20)
"""Market time after which the quote of an open session is stale."""


class Fetching(Protocol):
    """The part of the fetcher that the library needs."""

    async def bars(
        self,
        symbol: str,
        interval: Interval,
        *,
        since: datetime | None,
        now: datetime,
        until: datetime | None = None,
        provider: str | None = None,
        priority: Priority = Priority.LIVE,
        deadline: datetime | None = None,
        is_first: bool = False,
    ) -> Fetched: ...

    async def quote(
        self, symbol: str, *, priority: Priority = Priority.LIVE, deadline: datetime | None = None
    ) -> Quote: ...

    def count_hit(self, kind: Sold, provider: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """
    Bars, and how good they are.

    ``is_stale``: the newest bar asked for should be here and is not. ``missing``: what nobody has asked a
    provider for yet. ``reason``: why it was not fetched just now.
    """

    symbol: str
    interval: Interval
    columns: Columns
    as_of: datetime | None
    provider: str | None
    adjustment: Adjustment | None
    revision: int
    is_stale: bool
    stretches: Sequence[Stretch]
    reason: str | None = None

    @property
    def missing(self) -> list[Stretch]:
        return [s for s in self.stretches if s.kind is Kind.MISSING]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredQuote:
    """A quote, and how good it is; ``reason`` says why it was not renewed just now."""

    quote: Quote
    is_stale: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What storage knows of a series between two instants."""

    symbol: str
    interval: Interval
    since: datetime | None
    until: datetime
    series: Series | None
    columns: Columns
    stretches: Sequence[Stretch]

    @property
    def missing(self) -> list[Stretch]:
        return [s for s in self.stretches if s.kind is Kind.MISSING]

    def is_as(self, other: "Looked") -> bool:
        """Whether nothing has come of it since *other*."""
        revisions = [looked.series.revision if looked.series else 0 for looked in (self, other)]
        return self.missing == other.missing and revisions[0] == revisions[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Everything we hold of the market, and the way to what we do not hold yet."""

    documents: Documents
    series: SeriesStore
    bars_held: Bars
    quotes: Quotes
    fetcher: Fetching
    flights: Flights
    callers: Callers
    publisher: EventPublisher
    wall: Clock
    market: Clock
    delay: timedelta

    # --- bars

    async def bars(
        self,
        symbol: str,
        interval: Interval,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        caller: Caller | None = None,
        priority: Priority = Priority.ASKED,
        deadline: datetime | None = None,
    ) -> Answered:
        """
        Bars closing in (since, until]; without them all that is held, up to the newest that can be.

        For a *caller* what is missing is fetched first, as much as can be by *deadline*; nobody else's read
        spends a call. Raises what fetching raised only when nothing at all is held.
        """
        await self.quotes.interest.note(symbol)
        looked = await self.look(symbol, interval, since=since, until=until)
        if not looked.missing:
            self._hit(Sold.BARS, looked.series)
            return _answered(looked)
        if caller is None:
            return _answered(looked)
        steps = 0
        try:
            while looked.missing and steps < STEPS and not self._is_over(deadline):
                before = looked
                looked = await self.fill(looked, priority=priority, deadline=deadline, caller=caller)
                steps += 1
                if looked.is_as(before):
                    break  # the provider has not got it yet
        except TroopError as e:
            if not len(looked.columns):
                raise
            return replace(_answered(looked), is_stale=True, reason=f"{type(e).__name__}: {e}")
        return _answered(looked)

    async def look(
        self, symbol: str, interval: Interval, *, since: datetime | None = None, until: datetime | None = None
    ) -> Looked:
        """
        What is held, missing and absent of the bars closing in (since, until]; storage only.

        Raises:
            InvalidPayloadError: the session table does not reach that far.

        """
        newest = calendar().last_bar_close(interval, self.market.now() - self.delay)
        until = min(until, newest) if until else newest
        key = series_key(symbol, interval)
        try:
            series: Series | None = await self.series.get(symbol, interval)
        except NotFoundError:
            series = None
        revision = series.revision if series else 0
        columns = Columns()
        if series and (since is None or since < until):
            columns = await self.bars_held.window(key, revision, since=since, lookback=0, through=until)
        begin = since
        if begin is None:
            # Nothing held and no beginning asked for: what is missing is all there is, down to the newest bar.
            begin = (instant_of(columns.closed[0]) if len(columns) else until) - MINUTE
        try:
            wanted = expected(calendar(), interval, since=begin, until=until)
        except ConfigurationError as e:
            raise InvalidPayloadError(f"from {begin:%Y-%m-%d} to {until:%Y-%m-%d}: {e}") from None
        stretches = survey(wanted, columns.closed, [])
        if any(s.kind is Kind.MISSING for s in stretches) and (asked := await self._asked(key, revision)):
            stretches = survey(wanted, columns.closed, asked)
        return Looked(
            symbol=symbol,
            interval=interval,
            since=since,
            until=until,
            series=series,
            columns=columns,
            stretches=stretches,
        )

    async def fill(
        self,
        looked: Looked,
        *,
        priority: Priority,
        deadline: datetime | None = None,
        caller: Caller | None = None,
    ) -> Looked:
        """
        Fetch the first slice of what is missing, store it, and look again.

        Whoever else asks for the same slice at the same moment, here or in another instance, shares the call.
        Raises what fetching raised, CappedError when the caller's share is spent, UnavailableError while a
        watched series has no history yet: the watchlist is fetching it.
        """
        symbol, interval, series = looked.symbol, looked.interval, looked.series
        if series and series.is_active and not await self.bars_held.newest(series.key, series.revision):
            raise UnavailableError(
                f"the history of {symbol} at {interval} is being fetched for the watchlist",
                retry_after=timedelta(seconds=15),
            )
        newest = calendar().last_bar_close(interval, self.market.now() - self.delay)
        wanted = first_slice(calendar(), interval, looked.missing, until=newest)
        if wanted is None:
            return looked
        if looked.since is None and not len(looked.columns):
            wanted = replace(wanted, since=EPOCH)

        async def landed(*, is_over: bool) -> Looked | None:
            again = await self.look(symbol, interval, since=looked.since, until=looked.until)
            return again if is_over or not again.is_as(looked) else None

        async def fetch() -> Looked:
            await self._bring(looked, wanted, priority=priority, deadline=deadline, caller=caller)
            return await self.look(symbol, interval, since=looked.since, until=looked.until)

        key = f"bars|{symbol}|{interval}|{minute_of(wanted.since)}|{minute_of(wanted.until)}"
        found = await self.flights.once(key, fetch, landed, deadline=deadline, private=(CappedError,))
        if (found.since, found.until) != (looked.since, looked.until):  # another question lacked the same slice
            found = await self.look(symbol, interval, since=looked.since, until=looked.until)
        return found

    async def _bring(
        self, looked: Looked, wanted: Slice, *, priority: Priority, deadline: datetime | None, caller: Caller | None
    ) -> None:
        fetched = await self._fetch(looked, wanted, priority=priority, deadline=deadline, caller=caller)
        try:
            await self._store(looked.symbol, looked.interval, wanted, fetched)
        except _RevisedError as e:
            whole = Slice(since=e.since, until=e.until, first=e.until)
            fetched = await self._fetch(looked, whole, priority=priority, deadline=deadline, caller=caller)
            await self._store(looked.symbol, looked.interval, whole, fetched)

    async def _fetch(
        self, looked: Looked, wanted: Slice, *, priority: Priority, deadline: datetime | None, caller: Caller | None
    ) -> Fetched:
        if caller:
            await self.callers.charge(caller)
        try:
            fetched = await self.fetcher.bars(
                looked.symbol,
                looked.interval,
                since=None if wanted.since is EPOCH else wanted.since,
                until=wanted.until,
                now=self.market.now(),
                provider=looked.series.provider if looked.series else None,
                priority=priority,
                deadline=deadline,
            )
        except QuotaSpentError:
            if caller:
                await self.callers.refund(caller)
            raise
        for row in fetched.refused_rows:
            log.warning("bar.refused", series=series_key(looked.symbol, looked.interval), reason=row)
        return fetched

    async def _store(self, symbol: str, interval: Interval, wanted: Slice, fetched: Fetched) -> None:
        """Bring in what was fetched, whoever else writes the same series at the moment."""
        for attempt in range(RACES):
            try:
                with span("library.store", symbol=symbol, interval=interval):
                    series = await self._known(symbol, interval, fetched)
                    stored, revision = await self._put(series, fetched)
                    await self._remember(stored, wanted, fetched, since_revision=revision)
            except (ConflictError, StaleError):
                await asyncio.sleep(random.uniform(0.01, 0.05) * (attempt + 1))  # noqa: S311 - jitter
                continue
            return
        raise UnavailableError(f"{symbol} at {interval} is written by others all the time")

    async def _known(self, symbol: str, interval: Interval, fetched: Fetched) -> Series:
        """The series, made if nobody knew it; it is not watched then, so nothing of it raises anything."""
        provider, adjustment = (fetched.provider, fetched.adjustment) if fetched.bars else (None, None)
        try:
            series = await self.series.get(symbol, interval)
        except NotFoundError:
            return await self.series.create(
                Series(
                    symbol=symbol,
                    interval=interval,
                    live_from=self.market.now(),
                    is_active=False,
                    watched_by="fetch",
                    provider=provider,
                    adjustment=adjustment,
                )
            )
        if provider is None:
            return series
        if series.provider is None:
            return await self.series.save(replace(series, provider=provider, adjustment=adjustment))
        if (series.provider, series.adjustment) != (provider, adjustment):
            raise RefusedError(
                f"{symbol} at {interval} is held from {series.provider} ({series.adjustment}); bars of "
                f"{provider} ({adjustment}) never mix with them"
            )
        return series

    async def _put(self, series: Series, fetched: Fetched) -> tuple[Series, int]:
        """
        Store the bars we do not hold; existing pages of the past stay as they are.

        Returns the series and the revision since which it only gained bars.
        """
        now, before = self.market.now(), series.revision
        closed = [b for b in fetched.bars if b.closed_at <= now]
        if not closed:
            return series, before
        extent = await self.bars_held.extent(series.key, series.revision)
        if extent is None:
            await self.bars_held.append(series.key, series.interval, series.revision, closed)
            return series, before
        first, last = closed[0].closed_at - MINUTE, closed[-1].closed_at
        held = await self.bars_held.window(series.key, series.revision, since=first, lookback=0, through=last)
        have = set(held.closed)
        fresh = [b for b in closed if minute_of(b.closed_at) not in have]
        older = [b for b in fresh if b.closed_at < extent.first]
        newer = [b for b in fresh if b.closed_at > extent.last]
        if changed := _changed(held, closed):
            series = await self._revise(series, extent, closed, changed)
            before = series.revision
        elif len(older) + len(newer) < len(fresh):
            whole = await self.bars_held.window(series.key, series.revision, since=None, lookback=0)
            series = await self._rewrite(series, merged(whole, Columns.of(fresh)))
        else:
            await self.bars_held.prepend(series.key, series.interval, series.revision, older)
            await self.bars_held.append(series.key, series.interval, series.revision, newer)
        if fresh:
            log.info("bars.filled", series=series.key, count=len(fresh), revision=series.revision)
        if newer and series.is_active:
            await self._tell(series, newer)
        return series, before

    async def _revise(self, series: Series, extent: Extent, closed: Sequence[Bar], changed: str) -> Series:
        """The provider says something else of bars we hold: what it says now counts, under the next revision."""
        log.warning("series.revised", series=series.key, reason=changed)
        if series.adjustment is Adjustment.RAW:
            # Raw prices of which it says nothing now are as true as ever.
            whole = await self.bars_held.window(series.key, series.revision, since=None, lookback=0)
            return await self._rewrite(series, merged(whole, Columns.of(closed)))
        if closed[0].closed_at > extent.first or closed[-1].closed_at < extent.last:
            # A split changes every price before it, so only the whole history will do.
            raise _RevisedError(
                f"{series.provider} now says {changed}; its whole history from {extent.first:%Y-%m-%d} to "
                f"{extent.last:%Y-%m-%d} is needed, and it did not give it",
                since=extent.first - MINUTE,
                until=extent.last,
            )
        return await self._rewrite(series, Columns.of(closed))

    async def _rewrite(self, series: Series, history: Columns) -> Series:
        """Write a history under the next revision, then point to it; a reader sees the old one or the new one."""
        series = await self.series.claim(series)
        await self.bars_held.rewrite(series.key, series.interval, series.claimed, history)
        return await self.series.save(replace(series, revision=series.claimed))

    async def _tell(self, series: Series, newer: Sequence[Bar]) -> None:
        event = BarsIngested(
            occurred_at=newer[-1].closed_at,
            recorded_at=self.wall.now(),
            symbol=series.symbol,
            interval=series.interval,
            revision=series.revision,
            first_closed_at=newer[0].closed_at,
            last_closed_at=newer[-1].closed_at,
            count=len(newer),
        )
        await self.publisher.publish([event])

    # --- what providers were asked for in vain

    async def _asked(self, key: str, revision: int) -> list[Asked]:
        try:
            document = await self.documents.read(SYSTEM, COVERAGE, key)
        except NotFoundError:
            return []
        if document.body["revision"] != revision:
            return []  # of a history that counts no more
        return [Asked.from_json(a) for a in document.body["asked"]]

    async def _remember(self, series: Series, wanted: Slice, fetched: Fetched, *, since_revision: int) -> None:
        """Note which bars the provider has not got, so that nobody asks for them again."""
        now = self.market.now()
        inside = [b.closed_at for b in fetched.bars if wanted.since < b.closed_at <= min(wanted.until, now)]
        # What came may be the first part of more. Where nothing came, nothing more will, once it had time to.
        through = inside[-1] if inside else min(wanted.until, now - SETTLED)
        if fetched.covers_through:
            through = min(through, fetched.covers_through)
        # Asked for all there is, a provider gives what it likes: that says nothing of what lies before it.
        since = (inside[0] if inside else wanted.first) - MINUTE if wanted.since is EPOCH else wanted.since
        if fetched.covers_since:
            since = max(since, fetched.covers_since)
        if through <= since:
            return
        new = Asked(since=since, through=through, provider=fetched.provider, asked_at=self.wall.now())
        try:
            document: Document | None = await self.documents.read(SYSTEM, COVERAGE, series.key)
        except NotFoundError:
            document = None
        known: list[Asked] = []
        if document and document.body["revision"] in (since_revision, series.revision):
            known = [Asked.from_json(a) for a in document.body["asked"]]
        body = {"revision": series.revision, "asked": [a.to_json() for a in noted(known, new)]}
        if document is None:
            sort = sort_key(self.wall.now(), f"{COVERAGE}|{series.key}")
            await self.documents.create(SYSTEM, Document(id=series.key, partition=COVERAGE, sort=sort, body=body))
        elif body != document.body:
            await self.documents.replace(SYSTEM, document.with_body(body))

    # --- quotes

    async def quote(
        self,
        symbol: str,
        *,
        caller: Caller | None = None,
        priority: Priority = Priority.ASKED,
        deadline: datetime | None = None,
    ) -> AnsweredQuote | None:
        """
        The last price: the stored one while it is good, else for a *caller* a new one; None: none is stored.

        Raises what fetching raised only when none is stored.
        """
        await self.quotes.interest.note(symbol)
        wanted = await self.quotes.get(symbol)
        if self._is_good(wanted):
            assert wanted is not None, "only what is there can be good"  # noqa: S101
            assert wanted.quote is not None, "only what is there can be good"  # noqa: S101
            self.fetcher.count_hit(Sold.QUOTE, wanted.quote.provider)
            return self._judged(wanted.quote)
        stored = wanted.quote if wanted else None
        if caller is None:
            return self._judged(stored) if stored else None

        async def landed(*, is_over: bool) -> Quote | None:
            again = await self.quotes.get(symbol)
            return again.quote if again and (is_over or self._is_good(again)) else None

        async def fetch() -> Quote:
            await self.callers.charge(caller)
            try:
                quote = await self.fetcher.quote(symbol, priority=priority, deadline=deadline)
            except QuotaSpentError:
                await self.callers.refund(caller)
                raise
            await self._keep(quote)
            return quote

        try:
            quote = await self.flights.once(f"quote|{symbol}", fetch, landed, deadline=deadline, private=(CappedError,))
        except TroopError as e:
            if stored is None:
                raise
            return AnsweredQuote(quote=stored, is_stale=True, reason=f"{type(e).__name__}: {e}")
        return self._judged(quote)

    async def _keep(self, quote: Quote) -> None:
        for _ in range(RACES):
            known = await self.quotes.get(quote.symbol) or WantedQuote(symbol=quote.symbol)
            fresh = replace(known, quote=quote, recorded_at=self.wall.now(), wanted=0)
            try:
                await self.quotes.put(fresh)
            except (ConflictError, StaleError):
                continue
            return

    def _is_good(self, wanted: WantedQuote | None) -> bool:
        """Whether the stored quote answers without a call."""
        if wanted is None or wanted.quote is None or wanted.recorded_at is None:
            return False
        age = self.wall.now() - wanted.recorded_at
        if age < QUOTE_RESTS:
            return True
        if calendar().session_at(self.market.now()):
            return age < QUOTE_LIVES and not self._judged(wanted.quote).is_stale
        return not self._judged(wanted.quote).is_stale or age < CLOSED_QUOTE_LIVES

    def _judged(self, quote: Quote) -> AnsweredQuote:
        return AnsweredQuote(quote=quote, is_stale=quote_is_stale(quote.as_of, self.market.now()))

    def _hit(self, kind: Sold, series: Series | None) -> None:
        if series and series.provider:
            self.fetcher.count_hit(kind, series.provider)

    def _is_over(self, deadline: datetime | None) -> bool:
        return deadline is not None and self.wall.now() >= deadline


class _RevisedError(RefusedError):
    """Prices were adjusted anew: the history between these closes has to be fetched again, all of it."""

    def __init__(self, message: str, *, since: datetime, until: datetime) -> None:
        super().__init__(message)
        self.since, self.until = since, until


def quote_is_stale(as_of: datetime, now: datetime) -> bool:
    """In a session a quote is stale after 20 minutes; at night the close of the last session is the newest there is."""
    newest = now - STALE_QUOTE if calendar().session_at(now) else calendar().previous_close(now).closes_at
    return as_of < newest


def _changed(held: Columns, fetched: Sequence[Bar]) -> str | None:
    """What the provider now says of a bar we hold, where that is something else."""
    closes = dict(zip(held.closed, held.close, strict=True))
    for bar in fetched:
        known = closes.get(minute_of(bar.closed_at))
        if known is not None and abs(bar.close - known) > SAME * known:
            return f"{bar.close} where {known} is held for the close of {bar.closed_at:%Y-%m-%d %H:%M}"
    return None


def _answered(looked: Looked) -> Answered:
    series, last = looked.series, looked.stretches[-1] if looked.stretches else None
    is_stale = not len(looked.columns) if last is None else last.kind is Kind.MISSING
    return Answered(
        symbol=looked.symbol,
        interval=looked.interval,
        columns=looked.columns,
        as_of=instant_of(looked.columns.closed[-1]) if len(looked.columns) else None,
        provider=series.provider if series else None,
        adjustment=series.adjustment if series else None,
        revision=series.revision if series else 0,
        is_stale=is_stale,
        stretches=looked.stretches,
    )
