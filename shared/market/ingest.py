"""
Which slots are due, and how their bars get in. Derived from stored state, so a missed timer costs nothing.

Each fetch shows some bars again that are held: one that changed means a split or a correction, and the history is
written again under the next revision. A provider that is gone is replaced by one that agrees with the bars held.
"""

import asyncio
import hashlib
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.clock import Clock, MarketClock, format_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotEntitledError,
    NotFoundError,
    PermanentError,
    RateLimitedError,
    RefusedError,
    StaleError,
    TransientError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.events import EventPublisher
from shared.market.actions import (
    Actions,
    Provenance,
    Split,
    contradiction,
    disbelief,
    may_be_split,
    splits_of,
    with_marks,
    with_splits,
)
from shared.market.earnings import Earnings
from shared.market.events import BarsIngested, EarningsReported
from shared.market.fetcher import Fetcher
from shared.market.health import LeftAloneError
from shared.market.models import (
    Adjustment,
    Bar,
    Columns,
    EarningsDate,
    Fetched,
    Interval,
    Priority,
    instant_of,
    interval_of,
    minute_of,
    symbol_of,
)
from shared.market.sessions import calendar
from shared.market.stores import SYSTEM, BarPage, Bars, Quotes, Series, SeriesStore, WantedQuote, merged
from shared.telemetry import get_logger, redact, span

log = get_logger(__name__)

BUDGET = timedelta(seconds=8)
OVERTIME = 1.0
"""Seconds a slot that was begun in time may go on behind the budget."""
AT_ONCE = 8
DUE_LIMIT = 1000
REPEAT_AFTER = timedelta(seconds=20)
"""When stored bars are still not evaluated this long after, their event is told again; then ever more seldom."""
FIRST_WAIT = timedelta(minutes=15)
OUTAGE_WAIT = timedelta(minutes=1)
LONGEST_WAIT = timedelta(days=1)
OVERLAP = 3
"""So many of the bars held are fetched again with each increment; fewer where a page of them has just begun."""
SLICES = 8
"""In so many fetches at most a whole history is taken again: long ones come in slices."""
LONG_OUTAGE, MANY_MISSES = timedelta(minutes=2), 3
"""A provider that is left alone for so long may be replaced, and otherwise at every so many slots that it missed."""
GONE = (NotEntitledError, UnknownSymbolError, ConfigurationError, LeftAloneError)
"""What a provider that is gone, perhaps for good, is known by."""
MINUTE = timedelta(minutes=1)
LAST_INSTANT = datetime.max.replace(tzinfo=UTC)
ASKED_LATELY = timedelta(hours=1)
"""A quote somebody asked for in this time (wall) goes before all others."""


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
    actions: Actions | None = None
    provenance: Provenance | None = None
    earnings: Earnings | None = None

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
                        await self._slot(series, deadline=deadline)
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

    async def _slot(self, series: Series, *, deadline: datetime | None = None) -> None:
        """One slot; no trouble of one series may end the others."""
        with span("series.ingest", symbol=series.symbol, interval=series.interval):
            try:
                await self._ingest(series, deadline=deadline)
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

    async def _ingest(self, series: Series, *, deadline: datetime | None = None, look: bool = False) -> None:
        """Bring in what has closed; with *look* the provider is asked although nothing has."""
        if not series.is_active:
            return
        now = self.market.now()
        newest = await self.bars.newest(series.key, series.revision)
        stored = instant_of(newest.columns.closed[-1]) if newest else None
        expected = calendar().last_bar_close(series.interval, now - self.delay)
        owed = stored is not None and (series.evaluated_through is None or series.evaluated_through < stored)
        if newest and stored and owed:
            series = await self._repeat(series, newest.recorded_at, stored)
        if stored and stored >= expected and not look:
            if not owed:
                due_at = self.next_due(series.interval, stored)
                await self.series.save(replace(series, due_at=due_at, misses=0, trouble=None))
            return
        fetched = await self._fetch(series, newest, now, deadline)
        for row in fetched.refused_rows:
            log.warning("bar.refused", series=series.key, provider=fetched.provider, reason=row)
        closed = [b for b in fetched.bars if b.closed_at <= now]
        if newest and (why := await self._contradiction(series, newest, fetched, closed)):
            series, closed = await self._revise(series, now, why, deadline)
            newest = None
        else:
            closed = await self._marked(series, fetched, closed, since=stored)
        new = [b for b in closed if stored is None or b.closed_at > stored]
        if not new:
            if not look:
                await self._miss(series, now, fetched)
            return
        if series.provider != fetched.provider or series.misses or series.trouble:
            series = await self.series.save(
                replace(series, provider=fetched.provider, adjustment=fetched.adjustment, misses=0, trouble=None)
            )
        await self.bars.append(series.key, series.interval, series.revision, closed, behind=newest)
        log.info("bars.stored", series=series.key, count=len(new), through=format_instant(new[-1].closed_at))
        await self._tell(series, new[0].closed_at, new[-1].closed_at, len(new))

    async def _fetch(self, series: Series, newest: BarPage | None, now: datetime, deadline: datetime | None) -> Fetched:
        """What the provider has behind the bars held, the last of these again."""
        if newest is None:
            return await self._fetch_first(series, series.provider, now, deadline)
        held = newest.columns[-OVERLAP:]
        try:
            fetched = await self.fetcher.bars(
                series.symbol,
                series.interval,
                since=instant_of(held.closed[0]),
                now=now,
                provider=series.provider,
                deadline=deadline,
            )
        except GONE as e:
            if series.provider is None or series.adjustment is None or not _is_gone(e, series):
                raise
            return await self._stand_in(series, held, now, deadline, e)
        if series.adjustment not in (None, fetched.adjustment):
            raise RefusedError(
                f"{fetched.provider} now sells {fetched.adjustment} prices of {series.key}; those held are "
                f"{series.adjustment}, and the two never mix"
            )
        return fetched

    async def _fetch_first(
        self, series: Series, provider: str | None, now: datetime, deadline: datetime | None
    ) -> Fetched:
        """A first history, which can wait; where no bar is held who was chosen before can be left for good reason."""
        try:
            return await self.fetcher.bars(
                series.symbol,
                series.interval,
                since=None,
                now=now,
                provider=provider,
                priority=Priority.BACKFILL,
                deadline=deadline,
                is_first=True,
            )
        except GONE as e:
            if provider is None or not _is_gone(e, series):
                raise
        return await self._fetch_first(series, None, now, deadline)

    async def _stand_in(
        self, series: Series, held: Columns, now: datetime, deadline: datetime | None, e: TroopError
    ) -> Fetched:
        """Let another provider go on with the series, if it says the same of the bars held."""
        assert series.provider is not None, "only a provider that there was can be gone"  # noqa: S101
        assert series.adjustment is not None, "bars that are held are adjusted or not"  # noqa: S101
        try:
            fetched = await self.fetcher.stand_in(
                series.symbol,
                series.interval,
                held=[held.bar(i) for i in range(len(held))],
                adjustment=series.adjustment,
                instead_of=series.provider,
                now=now,
                deadline=deadline,
            )
        except TroopError as why:
            # Kept as what it was: how long to wait depends on what became of the series' own provider.
            e.args = (f"{e}; nobody stands in: {why}",)
            raise e from None
        if not any(held.closed[-1] < minute_of(b.closed_at) and b.closed_at <= now for b in fetched.bars):
            e.args = (f"{e}; {fetched.provider} could stand in, but has nothing newer",)
            raise e
        through = instant_of(held.closed[-1])
        await self._record(series, "provider", fetched.provider, series.revision, through, now, reason=str(e))
        log.warning("series.moved", series=series.key, former=series.provider, provider=fetched.provider, reason=str(e))
        return fetched

    async def _contradiction(
        self, series: Series, newest: BarPage, fetched: Fetched, closed: Sequence[Bar]
    ) -> str | None:
        """In what the provider now says something else of bars we hold; None: in nothing."""
        if fetched.provider != series.provider:
            return None  # compared already, before it was let in
        held = newest.columns[-OVERLAP:]
        why = contradiction(held, closed)
        if why and self.provenance:
            why = contradiction(held, closed, rounded_through=await self.provenance.rounded_through(series))
        return why

    async def _marked(
        self, series: Series, fetched: Fetched, closed: list[Bar], *, since: datetime | None
    ) -> list[Bar]:
        """The bars with the splits that are stored and that the provider does not tell."""
        is_raw = fetched.adjustment is Adjustment.RAW
        if not (self.actions and is_raw and may_be_split(closed, since=since)):
            return closed
        return with_splits(closed, splits_of(await self.actions.get(series.symbol)))

    async def _revise(
        self, series: Series, now: datetime, why: str, deadline: datetime | None
    ) -> tuple[Series, list[Bar]]:
        """
        The provider changed history: take all of it again, and write it under the next revision if it can be believed.

        What it does not tell any more of prices as traded is as true as ever, and kept.
        """
        log.warning("series.contradicted", series=series.key, provider=series.provider, reason=why)
        splits = await self._splits_told(series, deadline)
        held = await self.bars.window(series.key, series.revision, since=None, lookback=0)
        bars = await self._history(series, instant_of(held.closed[0]), now, deadline)
        adjustment = series.adjustment or Adjustment.RAW
        if adjustment is Adjustment.RAW:
            bars = with_splits(with_marks(held, bars), splits)
        fresh = Columns.of(bars)
        if no := disbelief(held, fresh, splits, adjustment):
            raise RefusedError(f"{series.provider} changed history, and it is not believed: {why}; {no}")
        history = merged(held, fresh) if adjustment is Adjustment.RAW else fresh
        series = await self.series.claim(series)
        through = instant_of(held.closed[-1])
        await self._record(
            series, "revision", series.provider or "", series.claimed, through, now, reason=why, splits=splits
        )
        await self.bars.rewrite(series.key, series.interval, series.claimed, history)
        log.warning("series.revised", series=series.key, revision=series.claimed, reason=why)
        return await self.series.save(replace(series, revision=series.claimed)), bars

    async def _history(self, series: Series, first: datetime, now: datetime, deadline: datetime | None) -> list[Bar]:
        """What the provider has of the series, slice by slice, from the bar closing at *first* to the newest."""
        newest = calendar().last_bar_close(series.interval, now - self.delay)
        bars: list[Bar] = []
        for _ in range(SLICES):
            since = bars[-1].closed_at if bars else first - MINUTE
            part = await self.fetcher.bars(
                series.symbol, series.interval, since=since, now=now, provider=series.provider, deadline=deadline
            )
            if series.adjustment not in (None, part.adjustment):
                raise RefusedError(f"{part.provider} now sells {part.adjustment} prices of {series.key}")
            more = [b for b in part.bars if since < b.closed_at <= now]
            bars += more
            if not more or bars[-1].closed_at >= newest:
                break
        return bars

    async def _splits_told(self, series: Series, deadline: datetime | None) -> list[Split]:
        """
        The splits that providers tell of now, stored; those stored before where none can be asked.

        Who is down may be back at the next slot: a revision waits for that, but not for long.
        """
        if self.actions is None:
            return []
        try:
            told = await self.fetcher.actions(series.symbol, priority=Priority.LIVE, deadline=deadline)
        except TroopError as e:
            if isinstance(e, UnavailableError) and series.misses < MANY_MISSES:
                raise
            log.info("actions.unknown", symbol=series.symbol, reason=f"{type(e).__name__}: {e}")
            return splits_of(await self.actions.get(series.symbol))
        return splits_of(await self.actions.keep(series.symbol, told))

    async def _record(
        self,
        series: Series,
        kind: str,
        provider: str,
        revision: int,
        through: datetime,
        now: datetime,
        *,
        reason: str,
        splits: Sequence[Split] = (),
    ) -> None:
        if self.provenance:
            await self.provenance.record(
                series,
                kind=kind,
                provider=provider,
                revision=revision,
                through=through,
                occurred_at=now,
                reason=redact(reason),
                splits=splits,
            )

    async def _repeat(self, series: Series, recorded_at: datetime, stored: datetime) -> Series:
        """
        Tell again of stored bars that nobody has evaluated for a while.

        Each wait is as long as all before it together: an event that nobody can use is not told for ever.
        """
        last = max(recorded_at, series.told_at or recorded_at)
        if self.wall.now() - last < max(REPEAT_AFTER, last - recorded_at):
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
        due_at = now + wait
        if is_down and isinstance(self.market, MarketClock) and self.market.wall_at(due_at) is None:
            due_at = now  # the market stands still before that, but outages end by the wall
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
                    due_at=current.due_at if passes else due_at,
                )
            )
        except (StaleError, NotFoundError):
            return  # somebody else wrote about it at the same moment; it stays due

    def next_due(self, interval: Interval, after: datetime) -> datetime:
        """The market instant at which the first bar closing after *after* can be fetched."""
        return calendar().next_bar_close(interval, after) + self.delay

    # --- quotes, and the slots that reports make

    async def refresh_quotes(self) -> int:
        """
        Fetch the quotes that are due: every 15 minutes of an open session, once after it, and when a report is out.

        A report makes the symbol's series due as well: what they hold is compared with the provider's word.
        """
        deadline = self.wall.now() + BUDGET
        now = self.market.now()
        await self._plan_reports(now, deadline)
        due = await self.quotes.due(now, 20)
        asked = await self._asked_lately() if due else frozenset()
        done = 0
        for wanted in due:
            if self.wall.now() >= deadline:
                break
            again = now + FIRST_WAIT if calendar().session_at(now) else calendar().next_close(now).opens_at
            priority = Priority.LIVE if wanted.symbol in asked else Priority.BACKFILL
            report = None
            try:
                report = await self._serve_reports(wanted.symbol, now, deadline)
                again = min(report or LAST_INSTANT, again)
                quote = await self.fetcher.quote(wanted.symbol, priority=priority, deadline=deadline)
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
                    await self.quotes.put(replace(wanted, due_at=min(report or LAST_INSTANT, now + LONGEST_WAIT)))
        return done

    async def reported(self, event: EarningsReported) -> None:
        """A company has reported: if we watch it, the slot of its report is due now; told twice it is served once."""
        wanted = await self.quotes.get(event.symbol)
        if self.earnings is None or wanted is None or wanted.due_at is None:
            return
        now = self.market.now()
        diary = await self.earnings.reported(event, now=now)
        if diary.is_due(now):
            await self._bring_forward(event.symbol, now)

    async def _plan_reports(self, now: datetime, deadline: datetime) -> None:
        """Fetch the earnings calendar once a market day, while the market is open, and set the slots of the day."""
        session = calendar().session_at(now)
        if self.earnings is None or session is None:
            return
        is_sold = any(hasattr(provider, "earnings") for provider in self.fetcher.providers)
        if not is_sold or not await self.earnings.is_wanted(session.date):
            return
        # No further than the next session: a provider that cuts a long answer may cut off today.
        first, last = session.date, calendar().next_close(session.closes_at).date
        try:
            told = await self.fetcher.earnings(first=first, last=last, priority=Priority.BACKFILL, deadline=deadline)
        except TroopError as e:
            log.info("earnings.postponed", reason=f"{type(e).__name__}: {e}")
            self.earnings.rest()
            return
        watched = {series.symbol for series in await self.series.all() if series.is_active}
        reports: dict[str, list[EarningsDate]] = {}
        for report in told:
            if report.symbol in watched:
                reports.setdefault(report.symbol, []).append(report)
        for symbol, found in sorted(reports.items()):
            diary = await self.earnings.plan(symbol, found, first=first, last=last)
            slot = now if diary.is_due(now) else diary.next_after(now)
            if slot:
                await self._bring_forward(symbol, slot)
        await self.earnings.fetched(session.date)
        log.info("earnings.planned", day=str(first), reports=len(told), watched=len(reports))

    async def _serve_reports(self, symbol: str, now: datetime, deadline: datetime) -> datetime | None:
        """Look at the series of a symbol whose report is out; returns the market instant of its next slot, if any."""
        diary = await self.earnings.get(symbol) if self.earnings else None
        if self.earnings is None or diary is None:
            return None
        if diary.is_due(now):
            for interval in Interval:
                try:
                    series = await self.series.get(symbol, interval)
                except NotFoundError:
                    continue
                if not await self._look(series, deadline):
                    return now + FIRST_WAIT
            diary = await self.earnings.served(symbol, now)
        return diary.next_after(now)

    async def _look(self, series: Series, deadline: datetime) -> bool:
        """Whether a series was looked at as far as it can be; what passes by itself is worth another try."""
        left = (deadline - self.wall.now()).total_seconds() + OVERTIME
        with span("series.look", symbol=series.symbol, interval=series.interval):
            try:
                async with asyncio.timeout(left):
                    await self._ingest(series, deadline=deadline, look=True)
            except (TransientError, ConflictError, TimeoutError) as e:
                log.info("look.postponed", series=series.key, reason=f"{type(e).__name__}: {e}")
                return False
            except TroopError as e:
                log.warning("look.refused", series=series.key, reason=f"{type(e).__name__}: {e}")
        return True

    async def _bring_forward(self, symbol: str, at: datetime) -> None:
        """Have the quote of a watched symbol due at market instant *at* or before."""
        while (known := await self.quotes.get(symbol)) and known.due_at and known.due_at > at:
            try:
                await self.quotes.put(replace(known, due_at=at))
            except StaleError:
                continue  # a refresh came in at the same moment
            return

    async def _asked_lately(self) -> frozenset[str]:
        """The symbols that somebody asked for in this hour or the one before."""
        since = (self.wall.now() - ASKED_LATELY).replace(minute=0, second=0, microsecond=0)
        return frozenset(asked.symbol for asked in await self.quotes.interest.since(since))


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


def _is_gone(e: TroopError, series: Series) -> bool:
    """Whether the provider of a series will not be back soon."""
    if not isinstance(e, LeftAloneError):
        return True
    if series.misses % MANY_MISSES:
        return False  # others were asked in vain not long ago
    return series.misses > 0 or (e.retry_after is not None and e.retry_after >= LONG_OUTAGE)
