"""Runs the real services over counted storage on recorded bars, one step at a time."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import azure.functions as func

from alerts.adapters.breakers import StoredBreakers
from alerts.adapters.directory import DocumentDirectory
from alerts.adapters.discord import DiscordChannel
from alerts.adapters.documents import DeliveryDocuments
from alerts.adapters.signalr import SignalRChannel
from alerts.adapters.subscriptions_file import read_subscriptions
from alerts.courier import Courier
from alerts.models import PUBLIC
from alerts.ports import Channel
from alerts.service import AlertService
from content.adapters.documents import PostDocuments
from content.models import Kind
from content.service import ContentService
from infra.cost.counting import CountingDocuments, Tally
from infra.local.replay.samples import load_packaged
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import MarketClock, StoppedClock
from shared.events import Event
from shared.http_client import HttpClient
from shared.inbound import DeadLetters
from shared.market.entitlements import Entitlements
from shared.market.events import BarsIngested
from shared.market.fetcher import Fetcher
from shared.market.health import Health
from shared.market.ingest import Ingest
from shared.market.models import Adjustment, Bar, Fetched, Interval, Quote
from shared.market.ports import Turn
from shared.market.registry import windows_of
from shared.market.service import Market
from shared.market.stores import Bars, Quotes, SeriesStore
from shared.market.throttle import Throttle
from shared.sealing import Sealer
from shared.settings import ROOT
from signals.adapters.documents import SignalDocuments
from signals.adapters.entries_file import read_entries
from signals.events import SignalRaised
from signals.logic.evaluation import Watcher
from signals.service import SignalService

if TYPE_CHECKING:
    import httpx

SYMBOL = "AAPL"
LIVE_FROM = datetime(2011, 12, 30, 22, tzinfo=UTC)
SESSIONS = 250
PACED = ("quota",)
"""The throttle's container: one lease a provider call, whatever the call brings."""
SLOT = ("due", "series")
"""The slot query of the ingest timer: one a run, however many series are due; it is counted with the timers."""


@dataclass(slots=True)
class Cost:
    """What one kind of event takes: how often it was seen, its operations and units a time, and the worst one."""

    seen: int = 0
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    units: float = 0.0
    most_reads: int = 0
    most_writes: int = 0

    def add(self, tally: Tally, *, without: Sequence[str] = ()) -> None:
        """Add one time."""
        self.seen += 1
        self.operations += tally.operations
        self.units += tally.units
        self.most_reads = max(self.most_reads, tally.reads(*without))
        self.most_writes = max(self.most_writes, tally.writes(*without))

    @property
    def each(self) -> dict[str, float]:
        """Operations a time, as ``kind container``."""
        return {f"{kind} {where}": n / self.seen for (kind, where), n in sorted(self.operations.items()) if n}

    @property
    def units_each(self) -> float:
        return self.units / self.seen if self.seen else 0.0


class _Recorded:
    """A provider of recorded bars."""

    name = "alpha_vantage"

    def __init__(self, bars: Sequence[Bar]) -> None:
        self._bars = bars

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
        async with turn("TIME_SERIES_DAILY"):
            pass
        closed = [b for b in self._bars if b.closed_at <= now]
        shown = closed if since is None else closed[-100:]
        return Fetched(symbol=symbol, interval=interval, provider=self.name, adjustment=Adjustment.RAW, bars=shown)

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        async with turn("GLOBAL_QUOTE"):
            pass
        last = self._bars[-1]
        return Quote(symbol=symbol, price=last.close, previous_close=None, as_of=last.closed_at, provider=self.name)


class _Told:
    """Keeps what was published until somebody takes it."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def publish(self, events: Sequence[Event]) -> None:
        self.events += events

    async def close(self) -> None:
        return

    def take[T: Event](self, kind: type[T]) -> list[T]:
        """The published events of one kind, once."""
        found = [e for e in self.events if isinstance(e, kind)]
        self.events = [e for e in self.events if not isinstance(e, kind)]
        return found


def _accepts() -> "httpx.AsyncBaseTransport":
    import httpx

    return httpx.MockTransport(lambda _: httpx.Response(200, json={"id": "1"}))


@dataclass(slots=True)
class Measured:
    """Everything `troop cost` and its test speak of."""

    costs: dict[str, Cost] = field(default_factory=dict)
    bars: int = 0
    signals: int = 0

    def of(self, name: str) -> Cost:
        return self.costs.setdefault(name, Cost())


async def measure(sessions: int = SESSIONS, *, progress: Callable[[int], object] = lambda _: None) -> Measured:
    """Replay *sessions* daily bars of one symbol after its history, and count what each step asks of storage."""
    recorded = load_packaged([SYMBOL], "1d")[SYMBOL, Interval.DAY].bars
    live = [b for b in recorded if b.closed_at > LIVE_FROM][:sessions]
    wall, market_clock = StoppedClock(datetime(2026, 1, 5, tzinfo=UTC)), StoppedClock(LIVE_FROM)
    counted = CountingDocuments(SQLiteDocuments(":memory:", wall))
    told = _Told()
    market = _market(recorded, counted, told, wall, market_clock)
    signals = SignalService(
        market=market,
        signals=SignalDocuments(counted),
        publisher=told,
        watchers=[Watcher.of(entry) for entry in read_entries(ROOT / "signals/entries.toml")],
        wall=wall,
    )
    alerts = _alerts(counted, told, wall, market_clock, market)
    content = ContentService(
        posts=PostDocuments(counted),
        publisher=told,
        wall=wall,
        market=market_clock,
        live_from=LIVE_FROM,
        settle=timedelta(seconds=1),
    )
    measured = Measured()

    async def count(name: str, work: Awaitable[object]) -> Tally:
        counted.tally = tally = Tally()
        await work
        measured.of(name)
        return tally

    backfill = await count("history of a series", _bring(signals, told))
    measured.of("history of a series").add(backfill)
    for number, bar in enumerate(live):
        progress(number)
        market_clock.at = bar.closed_at
        wall.at += timedelta(minutes=1)
        tally = await count("bar without a signal", _bring(signals, told))
        raised = told.take(SignalRaised)
        scores = tally.operations["read", "signals"] > 0 and not raised
        name = "bar with a signal" if raised else "bar with an outcome" if scores else "bar without a signal"
        tally.operations[SLOT] -= 1
        measured.of(name).add(tally, without=(*PACED, "system"))
        measured.bars += 1
        measured.signals += len(raised)
        for signal in raised:
            measured.of("alert on two channels").add(await count("alert on two channels", alerts.announce(signal)))
            measured.of("post").add(await count("post", content.collect(signal)))
        market_clock.at = bar.closed_at + timedelta(hours=1)
        tally = await count("digest of a session", _digest(content, wall))
        measured.of("digest of a session").add(tally)
        told.events.clear()
    await _count_reads(measured, count, market, signals, alerts, content)
    await _count_timers(measured, count, market, signals, alerts, content)
    await counted.close()
    return measured


async def _bring(signals: SignalService, told: _Told) -> None:
    await signals.ingest()
    for event in told.take(BarsIngested):
        await signals.evaluate(event)


async def _digest(content: ContentService, wall: StoppedClock) -> None:
    await content.open_digests()
    wall.at += timedelta(seconds=2)
    await content.sweep()


async def _count_reads(
    measured: Measured,
    count: Callable[[str, Awaitable[object]], Awaitable[Tally]],
    market: Market,
    signals: SignalService,
    alerts: AlertService,
    content: ContentService,
) -> None:
    reads: dict[str, Awaitable[object]] = {
        "GET alerts (50)": alerts.listed(PUBLIC, None, newest_first=True, limit=50),
        "GET signals (50)": signals.listed(None, None, newest_first=True, limit=50),
        "GET posts (50)": content.listed(Kind.SIGNAL, None, newest_first=True, limit=50),
        "GET quotes": market.quote(SYMBOL),
        "GET bars (50)": market.list_bars(_request("50")),
        "GET series": market.describe(_request("50")),
        "GET watchlist of 1": market.watchlist(_request("50")),
        "GET one post": _one_post(content),
    }
    for name, work in reads.items():
        measured.of(name).add(await count(name, work))


def _request(limit: str) -> func.HttpRequest:
    return func.HttpRequest(method="GET", url="/", route_params={"symbol": SYMBOL}, params={"limit": limit}, body=b"")


async def _one_post(content: ContentService) -> None:
    [post] = await content.listed(Kind.SIGNAL, None, newest_first=True, limit=1)
    await content.read(post.post_id)


async def _count_timers(
    measured: Measured,
    count: Callable[[str, Awaitable[object]], Awaitable[Tally]],
    market: Market,
    signals: SignalService,
    alerts: AlertService,
    content: ContentService,
) -> None:
    async def idle() -> None:
        await signals.ingest()
        await market.ingest.refresh_quotes()
        await signals.sweep()
        await alerts.sweep()
        await content.open_digests()
        await content.sweep()

    await idle()
    measured.of("all timers once, nothing to do").add(await count("all timers once, nothing to do", idle()))


def _market(
    recorded: Sequence[Bar],
    documents: CountingDocuments,
    told: _Told,
    wall: StoppedClock,
    market_clock: StoppedClock,
) -> Market:
    series, bars, quotes = SeriesStore(documents, wall), Bars(documents, wall), Quotes(documents, wall)
    provider = _Recorded(recorded)
    throttle = Throttle(documents, wall, provider.name, windows_of(provider.name, "premium"))
    watchlist = ROOT / "infra/cost/watchlist.toml"
    ingest = Ingest(
        documents=documents,
        series=series,
        bars=bars,
        quotes=quotes,
        fetcher=Fetcher(
            providers=[provider],
            throttles={provider.name: throttle},
            health=Health(documents, wall, {}),
            entitlements=Entitlements(documents, wall, {}),
            wall=wall,
            market=market_clock,
            delay=timedelta(),
        ),
        publisher=told,
        wall=wall,
        market=market_clock,
        delay=timedelta(),
        live_from=LIVE_FROM,
        watchlist_file=watchlist,
    )
    return Market(series=series, bars=bars, quotes=quotes, ingest=ingest, clock=market_clock, delay=timedelta())


def _alerts(
    documents: CountingDocuments, told: _Told, wall: StoppedClock, market_clock: StoppedClock, market: Market
) -> AlertService:
    hub = SignalRChannel(
        "Endpoint=http://127.0.0.1;AccessKey=a-key-of-at-least-thirty-two-bytes;Version=1.0;",
        HttpClient("signalr", transport=_accepts),
        wall,
    )
    url = "http://127.0.0.1/api/webhooks/100000000000000001/" + "a" * 60
    discord = DiscordChannel(url, HttpClient("discord", transport=_accepts), documents, wall)
    channels: dict[str, Channel] = {hub.name: hub, discord.name: discord}
    house = read_subscriptions(ROOT / "alerts/subscriptions.toml", channels)
    directory = DocumentDirectory(documents, wall, Sealer(""), house)
    deliveries = DeliveryDocuments(documents)
    courier = Courier(
        deliveries=deliveries,
        directory=directory,
        channels=channels,
        breakers=StoredBreakers(documents, wall),
        wall=wall,
        market=MarketClock(market_clock),
        lease=timedelta(seconds=30),
    )
    return AlertService(
        deliveries=deliveries,
        directory=directory,
        courier=courier,
        hub=hub,
        publisher=told,
        outbox=DeadLetters(documents, wall),
        market=market,
    )


def run(sessions: int = SESSIONS, *, progress: Callable[[int], object] = lambda _: None) -> Measured:
    """``measure`` for those without a loop."""
    return asyncio.run(measure(sessions, progress=progress))
