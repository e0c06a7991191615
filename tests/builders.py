"""Valid things for tests, and stand-ins that remember what they were asked and fail on demand."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import azure.functions as func

from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import Clock, StoppedClock
from shared.documents import Document, Documents, sort_key
from shared.events import Event
from shared.market.entitlements import Entitlements
from shared.market.fetcher import Fetcher
from shared.market.health import Health
from shared.market.models import Adjustment, Bar, Fetched, Interval, Quote
from shared.market.ports import Turn
from shared.market.sessions import calendar
from shared.market.throttle import Throttle

WALL = datetime(2026, 11, 21, 9, tzinfo=UTC)
"""What the wall clock of a test says unless it says otherwise."""
CLOSE = datetime(2013, 1, 2, 21, tzinfo=UTC)
"""The close of a real session: the first of 2013."""


def documents(wall: Clock | None = None) -> SQLiteDocuments:
    """Storage that lives as long as the test."""
    return SQLiteDocuments(":memory:", wall or StoppedClock(WALL))


@asynccontextmanager
async def opened_documents(wall: Clock | None = None) -> AsyncIterator[SQLiteDocuments]:
    """The same for tests that need more than one, one after the other."""
    store = documents(wall)
    try:
        yield store
    finally:
        await store.close()


def a_document(
    id: str = "d1",
    *,
    partition: str = "p",
    at: datetime = WALL,
    body: Mapping[str, Any] | None = None,
    due_at: datetime | None = None,
    expires_at: datetime | None = None,
) -> Document:
    """A document whose place in a list is *at*."""
    return Document(
        id=id,
        partition=partition,
        sort=sort_key(at, id),
        body={"said": id} if body is None else body,
        due_at=due_at,
        expires_at=expires_at,
    )


def a_bar(
    closed_at: datetime = CLOSE,
    close: float = 100.0,
    *,
    opened_at: datetime | None = None,
    volume: float = 1000.0,
    split: float = 1.0,
    spread: float = 1.0,
) -> Bar:
    """A bar around *close*; by default it covers the exchange session that ends at its close."""
    return Bar(
        opened_at=opened_at or closed_at - timedelta(hours=6, minutes=30),
        closed_at=closed_at,
        open=close,
        high=close + spread,
        low=max(close - spread, close / 2),
        close=close,
        volume=volume,
        split=split,
    )


def closes_from(first: datetime = CLOSE, count: int = 1, *, interval: Interval = Interval.DAY) -> list[datetime]:
    """*count* instants at which the exchange's bars close, beginning with the first one not before *first*."""
    found: list[datetime] = []
    at = first - timedelta(microseconds=1)
    while len(found) < count:
        at = calendar().next_bar_close(interval, at)
        found.append(at)
    return found


def bars_closing_at(closes: Sequence[datetime], prices: Sequence[float] | None = None) -> list[Bar]:
    """One bar for each close; without *prices* every bar is one dearer than the bar before."""
    wanted = prices if prices is not None else [100.0 + i for i in range(len(closes))]
    bars: list[Bar] = []
    for closed_at, price in zip(closes, wanted, strict=True):
        session = timedelta(hours=6, minutes=30)
        length = min(session, closed_at - bars[-1].closed_at) if bars else session
        bars.append(a_bar(closed_at, price, opened_at=closed_at - length))
    return bars


def daily_bars(count: int, *, first: datetime = CLOSE, prices: Sequence[float] | None = None) -> list[Bar]:
    """The bars of *count* exchange sessions in a row."""
    return bars_closing_at(closes_from(first, count), prices)


def a_request(
    method: str = "GET",
    path: str = "/api/things",
    *,
    params: Mapping[str, str] | None = None,
    route: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> func.HttpRequest:
    """A request as the Functions worker hands it to a handler."""
    return func.HttpRequest(
        method,
        f"http://127.0.0.1{path}",
        headers=dict(headers or {}),
        params=dict(params or {}),
        route_params=dict(route or {}),
        body=body,
    )


def a_cloud_event(
    data: object, *, type: str = "test.happened.v1", id: str = "e1", subject: str | None = "symbols/AAPL", **more: str
) -> func.CloudEvent:
    """An event as the Functions worker hands it to a function; *more* are its extensions."""
    return func.CloudEvent(
        id=id, source="/troop/test", type=type, specversion="1.0", data=data, time=WALL, subject=subject, **more
    )


class MemoryPublisher:
    """Remembers what was published; raises *failing_with* instead while it is set."""

    def __init__(self, *, failing_with: Exception | None = None) -> None:
        self.published: list[Any] = []
        self.failing_with = failing_with

    async def publish(self, events: Sequence[Event]) -> None:
        if self.failing_with is not None:
            raise self.failing_with
        self.published += events

    async def close(self) -> None:
        return


class RecordedProvider:
    """
    A provider that sells the bars it was given, the overlap bar included, and counts what it was asked.

    It raises *failing_with* instead while that is set, and calls *on_call* first at every call.
    """

    def __init__(
        self,
        name: str = "alpha_vantage",
        bars: Mapping[str, Sequence[Bar]] | None = None,
        *,
        quotes: Mapping[str, Quote] | None = None,
        adjustment: Adjustment = Adjustment.RAW,
        failing_with: Exception | None = None,
        on_call: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.history = dict(bars or {})
        self.quotes = dict(quotes or {})
        self.adjustment = adjustment
        self.failing_with = failing_with
        self.on_call = on_call
        self.asked: list[tuple[str, datetime | None]] = []
        self.quotes_asked: list[str] = []

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        return 1

    async def bars(
        self,
        symbol: str,
        interval: Interval,
        *,
        since: datetime | None,
        now: datetime,
        turn: Turn,
        until: datetime | None = None,
    ) -> Fetched:
        self.asked.append((symbol, since))
        async with turn("bars"):
            await self._react()
        return Fetched(
            symbol=symbol,
            interval=interval,
            provider=self.name,
            adjustment=self.adjustment,
            bars=tuple(
                b
                for b in self.history.get(symbol, ())
                if b.opened_at <= now and (since is None or b.closed_at >= since)
            ),
        )

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        self.quotes_asked.append(symbol)
        async with turn("quote"):
            await self._react()
        return self.quotes[symbol]

    async def _react(self) -> None:
        await asyncio.sleep(0)  # whoever else is at work gets a turn, as with a real provider
        if self.on_call is not None:
            self.on_call()
        if self.failing_with is not None:
            raise self.failing_with


def fetcher_of(documents: Documents, wall: Clock, market: Clock, *providers: RecordedProvider) -> Fetcher:
    """A fetcher over stand-in providers that allow any number of calls."""
    return Fetcher(
        providers=providers,
        throttles={p.name: Throttle(documents, wall, p.name, ()) for p in providers},
        health=Health(documents, wall, {}),
        entitlements=Entitlements(documents, wall, {}),
        wall=wall,
        market=market,
        weigh=lambda *_: 1,
    )
