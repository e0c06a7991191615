"""A signals domain on storage that lives as long as the test, with bars stored by hand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from shared.clock import StoppedClock
from shared.market.events import BarsIngested
from shared.market.ingest import Ingest
from shared.market.models import Bar, Fetched, Interval
from shared.market.service import Market
from shared.market.stores import Bars, Quotes, Series, SeriesStore
from shared.settings import ROOT
from signals.adapters.documents import CONTAINER, SignalDocuments
from signals.adapters.outcomes import FIRST_SIGNAL
from signals.events import SignalRaised, SignalScored
from signals.logic.evaluation import Watcher
from signals.logic.strategies import STRATEGIES
from signals.models import Book, Entry
from signals.service import SignalService
from tests.builders import WALL, RecordedProvider
from tests.standins import Storage, Topic

DELAY = timedelta(minutes=15)
WRITTEN = ("recorded_at", "scored_at", "owes")
END_OF_TIME = datetime.max.replace(tzinfo=UTC)


def a_watcher(
    name: str,
    kind: str,
    *,
    symbols: Sequence[str] | None = None,
    horizon: int = 5,
    stale_after: int = 3,
    mute_without_edge: bool = False,
    **params: float,
) -> Watcher:
    """A daily entry of a strategy."""
    strategy = STRATEGIES[kind]
    chosen = strategy.params.model_validate(params)
    return Watcher.of(
        Entry(
            name=name,
            strategy=kind,
            version=strategy.version,
            params=chosen.model_dump(),
            interval=Interval.DAY,
            symbols=None if symbols is None else frozenset(symbols),
            lookback=strategy.lookback(chosen),
            horizon=horizon,
            stale_after=stale_after,
            mute_without_edge=mute_without_edge,
        )
    )


WATCHERS = (
    a_watcher("cross", "sma_cross", fast=2, slow=5),
    a_watcher("rsi", "rsi_reversal", period=2, low=20, high=80),
    a_watcher("bands", "bollinger_breakout", period=5, width=1.2, volume_factor=0.8),
)
"""One entry of each strategy, quick enough to say much about few bars."""


class Seller:
    """Sells what a provider has recorded, without quotas and turns: here it matters what comes in, not how."""

    def __init__(self, provider: RecordedProvider) -> None:
        self._provider = provider

    async def bars(
        self, symbol: str, interval: Interval, *, since: datetime | None, now: datetime, **_: Any
    ) -> Fetched:
        bars = self._provider.history.get(symbol, ())
        return Fetched(
            symbol=symbol,
            interval=interval,
            provider=self._provider.name,
            adjustment=self._provider.adjustment,
            bars=[bar for bar in bars if bar.opened_at <= now and (since is None or bar.closed_at >= since)],
        )


class House:
    """
    One symbol's series; ``instance`` gives another process over the same storage.

    The market stands still unless a speed is given, so that bars may come as late as a test likes.
    """

    def __init__(
        self,
        bars: Sequence[Bar],
        *,
        live_from: datetime,
        symbol: str = "AAPL",
        watchers: Sequence[Watcher] = WATCHERS,
        provider: RecordedProvider | None = None,
        speed: float = 0.0,
    ) -> None:
        self.bars = bars
        self.symbol = symbol
        self.watchers = watchers
        self.live_from = live_from
        self.speed = speed
        self.provider = provider or RecordedProvider()
        self.wall = StoppedClock(WALL)
        self.market = StoppedClock(bars[-1].closed_at + DELAY)
        self.storage = Storage(self.wall)
        self.topic = Topic()
        self.watchlist = ROOT / "shared/market/watchlist.toml"

    def instance(self, storage: Any = None, topic: Any = None) -> SignalService:
        """A process of its own: it shares nothing with others but storage and topic."""
        documents, publisher = storage or self.storage, topic or self.topic
        series, bars = SeriesStore(documents, self.wall), Bars(documents, self.wall)
        quotes = Quotes(documents, self.wall)
        ingest = Ingest(
            documents=documents,
            series=series,
            bars=bars,
            quotes=quotes,
            fetcher=Seller(self.provider),
            publisher=publisher,
            wall=self.wall,
            market=self.market,
            delay=DELAY,
            live_from=self.live_from,
            watchlist_file=self.watchlist,
        )
        return SignalService(
            market=Market(series=series, bars=bars, quotes=quotes, ingest=ingest, clock=self.market, delay=DELAY),
            signals=SignalDocuments(documents),
            publisher=publisher,
            watchers=self.watchers,
            wall=self.wall,
            speed=self.speed,
        )

    async def open(self) -> None:
        """Begin to watch the series."""
        await SeriesStore(self.storage, self.wall).create(
            Series(
                symbol=self.symbol,
                interval=Interval.DAY,
                live_from=self.live_from,
                provider=self.provider.name,
                due_at=self.bars[0].closed_at,
            )
        )

    async def store(self, first: int, end: int) -> BarsIngested:
        """Store bars [first, end) and return the event that says so."""
        bars = self.bars[first:end]
        await Bars(self.storage, self.wall).append(f"{self.symbol}|1d", Interval.DAY, 0, bars)
        return BarsIngested(
            occurred_at=bars[-1].closed_at,
            recorded_at=self.wall.now(),
            symbol=self.symbol,
            interval=Interval.DAY,
            revision=0,
            first_closed_at=bars[0].closed_at,
            last_closed_at=bars[-1].closed_at,
            count=len(bars),
        )

    async def series(self) -> Series:
        """The series as it is stored now."""
        return await SeriesStore(self.storage, self.wall).get(self.symbol, Interval.DAY)

    async def change(self, **fields: Any) -> None:
        """Write other facts of the series."""
        store = SeriesStore(self.storage, self.wall)
        await store.save(replace(await store.get(self.symbol, Interval.DAY), **fields))

    async def ledger(self) -> dict[str, Mapping[str, Any]]:
        """Every stored signal by id, with its outcome, without when it was written and what it owes."""
        found = await self.storage.feed(CONTAINER, after=FIRST_SIGNAL, limit=10_000)
        return {d.id: {name: value for name, value in d.body.items() if name not in WRITTEN} for d in found}

    async def kept(self) -> dict[str, Mapping[str, Any]]:
        """The books and records beside the signals, by id."""
        found = await self.storage.page(CONTAINER, self.symbol, limit=10_000)
        return {d.id: d.body for d in found if d.sort < FIRST_SIGNAL}

    async def book(self) -> Book:
        """What is open, and how the rest fared."""
        return await SignalDocuments(self.storage).book(self.symbol, Interval.DAY)

    async def told(self, origin: str = "live") -> set[str]:
        """The ids of stored signals of this origin."""
        return {id_ for id_, body in (await self.ledger()).items() if body["origin"] == origin}

    async def owing(self) -> list[str]:
        """The ids of signals whose event is still owed."""
        found = await self.storage.due(CONTAINER, before=END_OF_TIME, limit=10_000)
        return [d.id for d in found if d.sort > FIRST_SIGNAL]

    def raised(self) -> list[SignalRaised]:
        """The signals that were told of, in that order."""
        return [event for event in self.topic.told if isinstance(event, SignalRaised)]

    def scored(self) -> list[SignalScored]:
        """The outcomes that were told of, in that order."""
        return [event for event in self.topic.told if isinstance(event, SignalScored)]


def as_bytes(ledger: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A ledger to the last digit."""
    return json.dumps(ledger, sort_keys=True).encode()
