"""The library in a room of its own: every neighbour a small stand-in, clocks that stand still."""

import asyncio
from datetime import timedelta

from shared.clock import StoppedClock
from shared.errors import UnknownSymbolError
from shared.market.callers import Caller, Callers
from shared.market.flights import Flights
from shared.market.library import Library
from shared.market.models import Adjustment, Fetched, Interval
from shared.market.stores import Bars, Quotes, Series, SeriesStore
from tests.builders import CLOSE, WALL, MemoryPublisher, daily_bars, documents

DAY = Interval.DAY
DELAY = timedelta(minutes=15)
HISTORY = daily_bars(300)
ANN, BOB = Caller(id="ann"), Caller(id="bob")


class Killed(BaseException):
    """The process ends here."""


class Seller:
    """Stands where the fetcher stands: sells what it was given, counts what it was asked, fails on demand."""

    def __init__(self, **bars):
        self.history = bars
        self.provider, self.adjustment = "alpha_vantage", Adjustment.RAW
        self.asked, self.hits = [], []
        self.trouble = None
        self.price = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.most = None
        self.covers = (None, None)

    async def bars(
        self, symbol, interval, *, since, now, until=None, provider=None, priority, deadline=None, is_first=False
    ):
        self.asked.append((symbol, since, until, provider, priority))
        await self.gate.wait()
        await asyncio.sleep(0)
        if self.trouble:
            raise self.trouble
        if symbol not in self.history:
            raise UnknownSymbolError(f"nobody knows {symbol}")
        bars = [
            b
            for b in self.history[symbol]
            if b.opened_at < now and (since is None or b.closed_at >= since) and (until is None or b.closed_at <= until)
        ]
        return Fetched(
            symbol=symbol,
            interval=interval,
            provider=provider or self.provider,
            adjustment=self.adjustment,
            bars=tuple(bars[: self.most]),
            covers_since=self.covers[0],
            covers_through=self.covers[1],
        )

    async def quote(self, symbol, *, priority, deadline=None):
        self.asked.append((symbol, priority))
        await self.gate.wait()
        if self.trouble:
            raise self.trouble
        return self.price

    def count_hit(self, kind, provider=None):
        self.hits.append(kind)


class House:
    """The library over one store, at the close of the last bar of HISTORY."""

    def __init__(self, seller=None, *, allowed=1000):
        self.wall = StoppedClock(WALL)
        self.store = documents(self.wall)
        self.market = StoppedClock(HISTORY[-1].closed_at + DELAY)
        self.seller = seller or Seller(AAPL=HISTORY)
        self.publisher = MemoryPublisher()
        self.library = self.another(allowed)

    def another(self, allowed=1000):
        """The library of another process on the same store."""
        return Library(
            documents=self.store,
            series=SeriesStore(self.store, self.wall),
            bars_held=Bars(self.store, self.wall),
            quotes=Quotes(self.store, self.wall),
            fetcher=self.seller,
            flights=Flights(documents=self.store, wall=self.wall),
            callers=Callers(documents=self.store, wall=self.wall, allowed=allowed),
            publisher=self.publisher,
            wall=self.wall,
            market=self.market,
            delay=DELAY,
        )

    async def hold(self, bars, interval=DAY, **how):
        library = self.library
        await library.bars_held.append(f"AAPL|{interval}", interval, 0, bars)
        series = Series(
            symbol="AAPL",
            interval=interval,
            live_from=CLOSE,
            provider="alpha_vantage",
            evaluated_through=bars[-1].closed_at,
            **{"adjustment": Adjustment.RAW, **how},
        )
        return await library.series.create(series)

    async def ask(self, caller=ANN, symbol="AAPL", interval=DAY, **how):
        self.wall.at += timedelta(seconds=3)  # later than any call that answers for all
        return await self.library.bars(symbol, interval, caller=caller, **how)
