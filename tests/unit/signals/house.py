"""A signals domain on storage that lives as long as the test, with bars stored by hand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from shared.clock import StoppedClock
from shared.market.events import BarsIngested
from shared.market.fetcher import Fetcher
from shared.market.ingest import Ingest
from shared.market.models import Bar, Interval
from shared.market.service import Market
from shared.market.stores import Bars, Quotes, Series, SeriesStore
from shared.market.throttle import Throttle
from shared.settings import ROOT
from signals.adapters.documents import CONTAINER, SignalDocuments
from signals.logic.evaluation import Watcher
from signals.logic.strategies import STRATEGIES
from signals.models import Entry
from signals.service import SignalService
from tests.builders import WALL, RecordedProvider
from tests.standins import Storage, Topic

DELAY = timedelta(minutes=15)
END_OF_TIME = datetime.max.replace(tzinfo=UTC)


def a_watcher(name: str, kind: str, *, symbols: Sequence[str] | None = None, **params: float) -> Watcher:
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
        )
    )


WATCHERS = (
    a_watcher("cross", "sma_cross", fast=2, slow=5),
    a_watcher("rsi", "rsi_reversal", period=2, low=20, high=80),
    a_watcher("bands", "bollinger_breakout", period=5, width=1.2, volume_factor=0.8),
)
"""One entry of each strategy, quick enough to say much about few bars."""


class House:
    """One symbol's series; ``instance`` gives another process over the same storage."""

    def __init__(
        self,
        bars: Sequence[Bar],
        *,
        live_from: datetime,
        symbol: str = "AAPL",
        watchers: Sequence[Watcher] = WATCHERS,
        provider: RecordedProvider | None = None,
    ) -> None:
        self.bars = bars
        self.symbol = symbol
        self.watchers = watchers
        self.live_from = live_from
        self.provider = provider or RecordedProvider()
        self.wall = StoppedClock(WALL)
        self.market = StoppedClock(bars[-1].closed_at + DELAY)
        self.storage = Storage(self.wall)
        self.topic = Topic()
        self.watchlist = ROOT / "shared/market/watchlist.toml"

    def instance(self, storage: Any = None, topic: Any = None) -> SignalService:
        """A process of its own: it shares nothing with others but storage and topic."""
        documents, publisher = storage or self.storage, topic or self.topic
        throttle = Throttle(documents, self.wall, self.provider.name, ())
        series, bars = SeriesStore(documents, self.wall), Bars(documents, self.wall)
        quotes = Quotes(documents, self.wall)
        ingest = Ingest(
            documents=documents,
            series=series,
            bars=bars,
            quotes=quotes,
            fetcher=Fetcher(providers=[self.provider], throttles={self.provider.name: throttle}),
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
        """Every stored signal by id, without when it was written."""
        found = await self.storage.feed(CONTAINER, limit=10_000)
        return {d.id: {name: value for name, value in d.body.items() if name != "recorded_at"} for d in found}

    async def told(self, origin: str = "live") -> set[str]:
        """The ids of stored signals of this origin."""
        return {id_ for id_, body in (await self.ledger()).items() if body["origin"] == origin}

    async def owing(self) -> list[str]:
        """The ids of signals whose event is still owed."""
        return [d.id for d in await self.storage.due(CONTAINER, before=END_OF_TIME, limit=10_000)]


def as_bytes(ledger: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A ledger to the last digit."""
    return json.dumps(ledger, sort_keys=True).encode()
