"""
Fetches quotes ahead of those who will ask for them, with calls that would be lost otherwise.

A run reads the interest counters, tells the stored model what is new, and fetches what it wants now. Requests are
counted by the hour, but a run looks every minute, so it knows to the minute when they came.
"""

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from uuid import uuid4

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConflictError,
    NotFoundError,
    PermanentError,
    RateLimitedError,
    StaleError,
    TransientError,
)
from shared.market.conditional import QUOTA
from shared.market.fetcher import PREFERENCES, ProviderStatus
from shared.market.health import Kind
from shared.market.models import Priority, Quote
from shared.market.pacing import DAY_SHARES
from shared.market.prefetch import SLOT, SLOTS, Habits, Prefetcher, slack
from shared.market.quota import WindowState
from shared.market.sessions import Session, calendar
from shared.market.stores import Quotes, SeriesStore, WantedQuote
from shared.telemetry import get_logger

log = get_logger(__name__)

PARTITION, MODEL, LEASE = "prefetch", "model", "lease"
LIVES = timedelta(minutes=20)
"""How long (market time) a reader takes a quote of an open session for fresh."""
LOOKS = timedelta(minutes=1)
"""The counters are written no more often."""
BUDGET = timedelta(seconds=8)
LEASED = timedelta(seconds=30)
"""How long the work belongs to one instance; a killed one holds the others up for no longer."""
GAP = timedelta(minutes=10)
"""After a longer pause nobody can tell when requests came, so they teach nothing."""
LONG = timedelta(hours=1)
"""Shorter windows fill again before it matters; the throttle sees to them."""
UNCOUNTED = 500
"""How many calls may be planned for a day where no long window counts them."""
WATCHED, OPEN_SIGNAL = 6.0, 12.0
"""How many requests a day are assumed of a symbol that is watched, or has a signal open, until more is known."""
RACES = 4
_DAY = timedelta(days=1)


class Supplier(Protocol):
    """The part of the fetcher that is needed."""

    async def quote(
        self, symbol: str, *, priority: Priority = Priority.LIVE, deadline: datetime | None = None
    ) -> Quote: ...

    def status(self) -> Awaitable[Sequence[ProviderStatus]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchReport:
    """
    How prefetching does.

    ``is_on`` False: what would have been fetched is judged, and nothing is fetched. ``hit_rate`` is the share of
    requests that found an answer fetched ahead, ``waste`` the share of such answers that nobody used, and
    ``recent_waste`` that of the last few dozen, by which it is switched.
    """

    is_on: bool
    switched_at: datetime | None
    days: float
    hit_rate: float | None
    waste: float | None
    recent_waste: float | None
    used: int
    wasted: int


@dataclass(slots=True)
class _Model:
    """Everything stored between two runs."""

    prefetcher: Prefetcher
    demand: Habits
    seen: Mapping[str, int]
    looked_at: datetime | None
    calls: Mapping[str, int]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "_Model":
        looked = body.get("looked_at")
        return cls(
            prefetcher=Prefetcher.of(body.get("prefetcher", {}), life=LIVES, zone=calendar().zone),
            demand=Habits.of(body.get("demand", {})),
            seen=body.get("seen", {}),
            looked_at=parse_instant(looked) if looked else None,
            calls=body.get("calls", {}),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "prefetcher": self.prefetcher.to_json(),
            "demand": self.demand.to_json(),
            "seen": dict(self.seen),
            "looked_at": format_instant(self.looked_at) if self.looked_at else None,
            "calls": dict(self.calls),
        }


@dataclass(slots=True, kw_only=True)
class Prefetching:
    """Works by a timer, in one instance at a time, while a session is open."""

    documents: Documents
    quotes: Quotes
    series: SeriesStore
    fetcher: Supplier
    wall: Clock
    market: Clock
    _looked_at: datetime | None = field(default=None, init=False)

    async def work(self) -> int:
        """Learn what was asked for since the last run and fetch what is worth it now; returns how many quotes."""
        now = self.wall.now()
        session = calendar().session_at(self.market.now())
        if session is None or (self._looked_at is not None and now - self._looked_at < LOOKS):
            return 0
        lease = await self._take()
        if lease is None:
            return 0
        self._looked_at = now
        try:
            return await self._run(now, session)
        finally:
            with suppress(NotFoundError, StaleError, TransientError):  # it ends by itself
                await self.documents.delete(QUOTA, lease)

    async def report(self) -> PrefetchReport:
        """How it does, as of the last run."""
        model = _Model.of(body.body if (body := await self._stored()) else {})
        p = model.prefetcher
        return PrefetchReport(
            is_on=p.gate.is_on,
            switched_at=p.gate.switched_at,
            days=p.habits.days,
            hit_rate=p.hit_rate,
            waste=p.waste,
            recent_waste=p.gate.waste,
            used=p.used,
            wasted=p.wasted,
        )

    async def _run(self, now: datetime, session: Session) -> int:
        document = await self._stored()
        model = _Model.of(document.body if document else {})
        prefetcher, was_on, day = model.prefetcher, model.prefetcher.gate.is_on, model.prefetcher.day
        if model.looked_at is not None and now - model.looked_at < LOOKS:
            return 0  # another instance looked
        await self._learn(model, now)
        prefetcher.pass_to(now)
        if day is not None and prefetcher.day != day:
            model.demand.end_day()
        supply = await self._first_choice()
        made = 0
        if supply is not None:
            self._learn_demand(model, supply, now)
            closes_at = now + (session.closes_at - self.market.now())
            budget, until = _room(model.demand, supply, now, closes_at)
            wanted = prefetcher.wanted(now, budget=budget, until=until, assumed=await self._assumed(prefetcher))
            made = await self._fetch(prefetcher, wanted, now + BUDGET)
            model.calls = {**model.calls, supply.provider: supply.throttle.calls + made}
        model.looked_at = now
        if prefetcher.gate.is_on is not was_on:
            log.warning("prefetch.switched", is_on=prefetcher.gate.is_on, waste=prefetcher.waste)
        with suppress(StaleError, ConflictError):  # we were too slow, and another instance learnt the same
            await self._keep(document, model.to_json(), now)
        return made

    # --- what is learnt

    async def _learn(self, model: _Model, now: datetime) -> None:
        """Tell the model of the requests counted since the last look."""
        since = _hour(model.looked_at or now)
        found = await self.quotes.interest.since(since)
        if model.looked_at is not None and now - model.looked_at <= GAP:
            between = model.looked_at + (now - model.looked_at) / 2
            for asked in found:
                new = asked.count - model.seen.get(_name(asked.symbol, asked.hour), 0)
                if new > 0:
                    model.prefetcher.asked(asked.symbol, between, new)
        model.seen = {_name(asked.symbol, asked.hour): asked.count for asked in found}

    def _learn_demand(self, model: _Model, supply: ProviderStatus, now: datetime) -> None:
        """Note what others than we spent since the last look, all callers and timers together."""
        before = model.calls.get(supply.provider)
        if before is not None and model.looked_at is not None and now - model.looked_at <= GAP:
            spent = supply.throttle.calls - before
            if spent > 0:
                model.demand.see(supply.provider, _slot(now), spent)

    async def _assumed(self, prefetcher: Prefetcher) -> Mapping[str, float]:
        """What watchers and open signals lead us to expect of symbols that were asked for."""
        assumed: dict[str, float] = {}
        if not prefetcher.habits.learnt:
            return assumed
        for series in await self.series.all():
            if series.symbol in prefetcher.habits.learnt:
                requests = OPEN_SIGNAL if series.scoring_at else WATCHED if series.is_active else 0.0
                assumed[series.symbol] = max(assumed.get(series.symbol, 0.0), requests)
        return assumed

    # --- what is spent

    async def _first_choice(self) -> ProviderStatus | None:
        """Who would be asked for a quote; None while he is in trouble, because the others' calls are not his."""
        by_name = {status.provider: status for status in await self.fetcher.status()}
        names = [name for name in PREFERENCES[Kind.QUOTE] if name in by_name] or list(by_name)
        if not names:
            return None
        first = by_name[names[0]]
        return None if first.throttle.cool_down_until or first.health.breaker != "closed" else first

    async def _fetch(self, prefetcher: Prefetcher, wanted: Sequence[str], deadline: datetime) -> int:
        made = 0
        for symbol in wanted:
            now = self.wall.now()
            if now >= deadline:
                break
            known = await self.quotes.get(symbol)
            if known and known.quote and (until := self._until(known.quote, now)) > now:
                prefetcher.fetched(symbol, now, until)
                continue
            try:
                quote = await self.fetcher.quote(symbol, priority=Priority.PREFETCH, deadline=deadline)
            except RateLimitedError as e:
                log.info("prefetch.postponed", symbol=symbol, reason=str(e))
                break
            except TransientError as e:
                log.info("prefetch.postponed", symbol=symbol, reason=str(e))
                continue
            except PermanentError as e:
                log.info("prefetch.refused", symbol=symbol, reason=str(e))
                prefetcher.fetched(symbol, now, now + _DAY)  # asked for no more today
                continue
            made += 1
            await self._store(quote)
            until = self._until(quote, now)
            prefetcher.fetched(symbol, now, max(until, now), is_ahead=True)
            if until <= now:  # stale as it came: the call was wasted, and the next one would be no better
                prefetcher.fetched(symbol, now, now + LIVES)
        return made

    def _until(self, quote: Quote, now: datetime) -> datetime:
        """Until when (wall) a quote is fresh."""
        return now + (quote.as_of + LIVES - self.market.now())

    async def _store(self, quote: Quote) -> None:
        for _ in range(RACES):
            known = await self.quotes.get(quote.symbol)
            if known and known.quote and known.quote.as_of > quote.as_of:
                return
            fresh = WantedQuote(
                symbol=quote.symbol,
                quote=quote,
                recorded_at=self.wall.now(),
                due_at=known.due_at if known else None,
                document=known.document if known else None,
            )
            with suppress(ConflictError, StaleError):  # a reader or a timer wrote at the same moment
                await self.quotes.put(fresh)
                return

    # --- storage

    async def _stored(self) -> Document | None:
        try:
            return await self.documents.read(QUOTA, PARTITION, MODEL)
        except NotFoundError:
            return None

    async def _keep(self, document: Document | None, body: Mapping[str, Any], now: datetime) -> None:
        if document is None:
            sort = sort_key(now, f"{PARTITION}|{MODEL}")
            await self.documents.create(QUOTA, Document(id=MODEL, partition=PARTITION, sort=sort, body=body))
        else:
            await self.documents.replace(QUOTA, document.with_body(body))

    async def _take(self) -> Document | None:
        """The lease, or None while it is another instance's."""
        now = self.wall.now()
        lease = Document(
            id=LEASE,
            partition=PARTITION,
            sort=sort_key(now, f"{PARTITION}|{LEASE}"),
            body={"owner": uuid4().hex},
            expires_at=now + LEASED,
        )
        try:
            return await self.documents.create(QUOTA, lease)
        except ConflictError:
            return None


def _room(demand: Habits, supply: ProviderStatus, now: datetime, closes_at: datetime) -> tuple[int, datetime]:
    """How many calls would be lost, and by when: in the window that has the fewest of them to lose."""
    long = [w for w in supply.throttle.windows if w.span >= LONG]
    rooms = [(_lost(demand, supply.provider, w, now), min(_resets(w, now), closes_at)) for w in long]
    return min(rooms, default=(UNCOUNTED, closes_at))


def _lost(demand: Habits, provider: str, window: WindowState, now: datetime) -> int:
    expected = _between(demand, provider, now, _resets(window, now))
    share = DAY_SHARES[Priority.PREFETCH] if window.span >= _DAY else 1.0
    return slack(window.left, demand=expected, amount=window.amount, share=share)


def _resets(window: WindowState, now: datetime) -> datetime:
    return window.resets_at if window.resets_at and window.resets_at > now else now + window.span


def _between(demand: Habits, provider: str, now: datetime, until: datetime) -> float:
    """How many calls others will likely make until then, a day of them at most."""
    if until - now >= _DAY:
        return demand.expected(provider, 0, SLOTS)
    first, last = _slot(now), _slot(until)
    if last >= first:
        return demand.expected(provider, first, last + 1)
    return demand.expected(provider, first, SLOTS) + demand.expected(provider, 0, last + 1)


def _slot(at: datetime) -> int:
    local = at.astimezone(calendar().zone)
    return (local.hour * 60 + local.minute) // (SLOT // timedelta(minutes=1))


def _hour(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def _name(symbol: str, hour: datetime) -> str:
    return f"{symbol}|{hour:%Y-%m-%dT%H}"
