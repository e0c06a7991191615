"""A replay that runs over real HTTP, with both of its clocks in the test's hand."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

import httpx
from aiohttp import web

from infra.local.replay.catalogue import Catalogue
from infra.local.replay.market import Market
from infra.local.replay.samples import load_packaged
from shared.clock import StoppedClock
from shared.market.models import Interval

DAY, HOUR, MINUTE = Interval.DAY, Interval.HOUR, Interval.MINUTE
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
QUERY = "/alpha_vantage/query"
FINNHUB = "/finnhub/api/v1"
TWELVE_DATA = "/twelve_data"
POLYGON = "/polygon"


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def epoch(text: str) -> int:
    return int(utc(text).timestamp())


@cache
def days() -> Catalogue:
    return load_packaged(["AAPL", "FB", "GOOG", "IBM", "MSFT"], DAY)


@cache
def intraday() -> Catalogue:
    return load_packaged(["AAPL"], HOUR) | load_packaged(["AAPL"], MINUTE)


@dataclass
class Replay:
    """A running replay, its two clocks, and a client for it."""

    market: Market
    market_clock: StoppedClock
    wall: StoppedClock
    client: httpx.AsyncClient

    async def av(self, function: str, *, key: str = "local-unlimited", **params: str) -> httpx.Response:
        return await self.client.get(QUERY, params={"function": function, "apikey": key, **params})

    async def finnhub(self, path: str, *, key: str = "local-unlimited", **params: object) -> httpx.Response:
        return await self.client.get(FINNHUB + path, params=params, headers={"X-Finnhub-Token": key} if key else {})

    async def twelve(self, path: str, *, key: str = "local-unlimited", **params: object) -> httpx.Response:
        headers = {"Authorization": f"apikey {key}"} if key else {}
        return await self.client.get(TWELVE_DATA + path, params=params, headers=headers)

    async def polygon(self, path: str, *, key: str = "local-unlimited", **params: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return await self.client.get(POLYGON + path, params=params, headers=headers)

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")


@asynccontextmanager
async def replaying(at: str, catalogue: Catalogue | None = None, **options: object) -> AsyncIterator[Replay]:
    market_clock, wall = StoppedClock(utc(at)), StoppedClock(NOON)
    market = Market(catalogue or days(), market_clock.now, wall, **options)
    app = web.Application()
    app.add_routes(market.routes())
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            yield Replay(market, market_clock, wall, client)
    finally:
        await runner.cleanup()
