"""Backtests on storage that lives as long as the test, over bars stored by hand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from math import sin
from typing import Any

from shared.clock import StoppedClock
from shared.market.events import BarsIngested
from shared.market.models import Adjustment, Bar, Columns, Interval
from shared.market.stores import Bars, Series, SeriesStore
from signals.adapters.backtest_documents import BacktestDocuments
from signals.backtest_models import Backtest, Request
from signals.backtests import BacktestService
from signals.logic.evaluation import Watcher
from tests.builders import WALL, daily_bars
from tests.standins import Storage, Topic
from tests.unit.signals.house import a_watcher


def prices(count: int, drift: float = 0.05) -> list[float]:
    """A market that swings, leans and shivers, the same every time."""
    return [100 + drift * i + 12 * sin(i / 9) + 5 * sin(i / 2.3) + ((i * 37) % 11 - 5) * 0.4 for i in range(count)]


BARS = daily_bars(320, prices=prices(320))
WATCHERS = (
    a_watcher("cross", "sma_cross", fast=3, slow=9),
    a_watcher("apart", "sma_cross", symbols=["IBM"], fast=2, slow=5),
)


class Ticking(StoppedClock):
    """A wall that goes on by *step* whenever it is looked at."""

    def __init__(self, at: datetime, step: timedelta) -> None:
        super().__init__(at)
        self.step = step

    def now(self) -> datetime:
        self.at += self.step
        return self.at


class BacktestHouse:
    """AAPL's daily bars; ``instance`` gives another process over the same storage."""

    def __init__(self, bars: Sequence[Bar] = BARS, watchers: Sequence[Watcher] = WATCHERS) -> None:
        self.bars = bars
        self.watchers = watchers
        self.wall = StoppedClock(WALL)
        self.storage = Storage(self.wall)
        self.topic = Topic()
        self.service = self.instance()

    def instance(self, storage: Any = None, topic: Any = None, wall: Any = None, **more: Any) -> BacktestService:
        documents, clock = storage or self.storage, wall or self.wall
        return BacktestService(
            series=SeriesStore(documents, clock),
            bars=Bars(documents, clock),
            backtests=BacktestDocuments(documents, clock),
            publisher=topic or self.topic,
            watchers=self.watchers,
            wall=clock,
            **more,
        )

    async def open(self) -> None:
        """Have the bars stored."""
        store = SeriesStore(self.storage, self.wall)
        await store.create(
            Series(
                symbol="AAPL",
                interval=Interval.DAY,
                live_from=self.bars[0].closed_at,
                provider="alpha_vantage",
                adjustment=Adjustment.RAW,
            )
        )
        await Bars(self.storage, self.wall).append("AAPL|1d", Interval.DAY, 0, self.bars)

    async def revise(self, bars: Sequence[Bar]) -> None:
        """The provider says something else: the history is written again under the next revision."""
        store = SeriesStore(self.storage, self.wall)
        series = await store.claim(await store.get("AAPL", Interval.DAY))
        await Bars(self.storage, self.wall).rewrite("AAPL|1d", Interval.DAY, series.claimed, Columns.of(bars))
        await store.save(replace(series, revision=series.claimed))

    async def ask(self, **fields: Any) -> Backtest:
        """Ask for one backtest."""
        [backtest] = await self.service.request(request(**fields))
        return backtest

    async def done(self, **fields: Any) -> tuple[Backtest, Mapping[str, Any]]:
        """Ask for one and have it done."""
        backtest = await self.service.run((await self.ask(**fields)).backtest_id)
        backtest, result = await self.service.read(backtest.backtest_id)
        assert result is not None, backtest.reason
        return backtest, result

    def heard(self, bars: Sequence[Bar], revision: int = 0) -> BarsIngested:
        """The event that says that *bars* came."""
        return BarsIngested(
            occurred_at=bars[-1].closed_at,
            recorded_at=self.wall.now(),
            symbol="AAPL",
            interval=Interval.DAY,
            revision=revision,
            first_closed_at=bars[0].closed_at,
            last_closed_at=bars[-1].closed_at,
            count=len(bars),
        )

    async def all(self) -> list[Backtest]:
        """Every backtest, oldest first."""
        return await self.service.listed(None, None, newest_first=False, limit=500)


def request(**fields: Any) -> Request:
    """A request as it comes over HTTP: an SMA cross on AAPL unless told."""
    named: dict[str, Any] = {} if "entry" in fields else {"strategy": "sma_cross", "params": {"fast": 3, "slow": 9}}
    symbol: dict[str, Any] = {} if "symbols" in fields else {"symbol": "AAPL"}
    return Request.read(json.dumps({**named, **symbol, **fields}))


GRID = {"fast": [2, 3, 5], "slow": [8, 13]}
