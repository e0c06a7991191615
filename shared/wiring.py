"""Who stands in which place in the shared rooms. Nothing here touches the network or a file; first use does."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain

from pydantic import SecretStr

from shared.adapters.dead_letter_blobs import DeadLetterBlobs
from shared.adapters.event_grid import EventGridPublisher
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import Clock, MarketClock, SystemClock
from shared.documents import Documents, ExpiresByItself, Expiry
from shared.errors import ConfigurationError
from shared.events import EventPublisher
from shared.http_client import HttpClient
from shared.identity import Tokens
from shared.inbound import DeadLetters
from shared.limits import DailyQuota, Limits, RateLimit
from shared.market.actions import Actions, Provenance
from shared.market.adapters.alpha_vantage import AlphaVantage
from shared.market.adapters.finnhub import Finnhub
from shared.market.adapters.polygon import Polygon
from shared.market.adapters.twelve_data import TwelveData
from shared.market.callers import Callers, allowance
from shared.market.earnings import Earnings
from shared.market.entitlements import Entitlements, fingerprint
from shared.market.fetcher import Fetcher
from shared.market.fetches import Fetches
from shared.market.flights import Flights
from shared.market.health import Health
from shared.market.hooks import FinnhubHook
from shared.market.ingest import Ingest
from shared.market.library import Library
from shared.market.mending import Mending
from shared.market.ports import Provider
from shared.market.prefetching import Prefetching
from shared.market.registry import windows_of
from shared.market.service import Market, Supply
from shared.market.stores import Bars, Quotes, SeriesStore
from shared.market.throttle import Throttle
from shared.migrations import Migrated
from shared.outbox import Outbox
from shared.settings import ROOT, Plan, Settings

VERSION = "0.1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """What every domain is given."""

    settings: Settings
    wall: Clock
    market_clock: Clock
    documents: Documents
    expiry: Expiry
    publisher: EventPublisher
    dead_letters: DeadLetters
    dead_letter_blobs: DeadLetterBlobs | None
    market: Market
    tokens: Tokens | None
    limits: Limits
    supply: Supply
    finnhub_hook: FinnhubHook
    version: str = VERSION

    def outbox(self, source: str) -> Outbox:
        """Where the domain *source* leaves its events: what the topic refuses for good becomes a dead letter."""
        return Outbox(self.publisher, self.dead_letters, source)


def wire_core(settings: Settings) -> Core:
    """
    Build the shared rooms.

    Raises:
        ConfigurationError: a setting names something this version does not have.

    """
    wall = SystemClock()
    store = open_documents(settings.documents_url, wall, settings.cosmos_key)
    documents = Migrated(store, wall, app=VERSION)
    publisher = EventGridPublisher(settings.event_grid_topic_endpoint, settings.event_grid_topic_key)
    market_clock = MarketClock(wall, settings.market_time())
    dead_letters = DeadLetters(documents, wall)
    outbox = Outbox(publisher, dead_letters, "market")
    market, supply = wire_market(settings, wall, market_clock, documents, outbox)
    return Core(
        settings=settings,
        wall=wall,
        market_clock=market_clock,
        documents=documents,
        expiry=store if isinstance(store, SQLiteDocuments) else ExpiresByItself(),
        publisher=publisher,
        dead_letters=dead_letters,
        dead_letter_blobs=DeadLetterBlobs(settings.dead_letters_url, HttpClient("dead letters"), dead_letters)
        if settings.dead_letters_url
        else None,
        tokens=Tokens.of(
            issuer=settings.oidc_issuer,
            audience=settings.oidc_audience,
            jwks_url=settings.oidc_jwks_url,
            wall=wall,
        ),
        limits=Limits(rate=RateLimit(wall, settings.api_rate_per_minute), quota=DailyQuota(documents, wall)),
        market=market,
        supply=supply,
        finnhub_hook=FinnhubHook(documents, outbox, wall, market_clock, settings.finnhub_webhook_secret),
    )


def wire_market(
    settings: Settings, wall: Clock, market_clock: Clock, documents: Documents, publisher: EventPublisher
) -> tuple[Market, Supply]:
    """
    Build the market room: what it holds, and how it is supplied.

    Raises:
        ConfigurationError: MARKET_PROVIDERS names somebody unknown, or nobody who has a key.

    """
    delay = timedelta(seconds=settings.market_data_delay_seconds)
    series = SeriesStore(documents, wall)
    bars, quotes = Bars(documents, wall), Quotes(documents, wall)
    providers = _providers(settings, wall, market_clock)
    plans = {name: plan for name, (_, plan) in _accounts(settings).items()}
    keys = {name: fingerprint(key.get_secret_value(), plan) for name, (key, plan) in _accounts(settings).items()}
    windows = {provider.name: windows_of(provider.name, plans[provider.name]) for provider in providers}
    fetcher = Fetcher(
        providers=providers,
        throttles={name: Throttle(documents, wall, name, found) for name, found in windows.items()},
        health=Health(documents, wall, keys),
        entitlements=Entitlements(documents, wall, keys),
        wall=wall,
        market=market_clock,
        delay=delay,
        plans=plans,
    )
    library = Library(
        documents=documents,
        series=series,
        bars_held=bars,
        quotes=quotes,
        fetcher=fetcher,
        flights=Flights(documents=documents, wall=wall),
        callers=Callers(documents=documents, wall=wall, allowed=allowance(chain.from_iterable(windows.values()))),
        publisher=publisher,
        wall=wall,
        market=market_clock,
        delay=delay,
    )
    ingest = Ingest(
        documents=documents,
        series=series,
        bars=bars,
        quotes=quotes,
        fetcher=fetcher,
        publisher=publisher,
        wall=wall,
        market=market_clock,
        delay=delay,
        live_from=settings.live_from_instant(),
        watchlist_file=settings.file(settings.watchlist_file),
        actions=Actions(documents, wall),
        provenance=Provenance(documents, wall),
        earnings=Earnings(documents, wall),
    )
    market = Market(series=series, bars=bars, quotes=quotes, ingest=ingest, clock=market_clock, delay=delay)
    fetches = Fetches(documents=documents, library=library, wall=wall)
    prefetching = Prefetching(
        documents=documents, quotes=quotes, series=series, fetcher=fetcher, wall=wall, market=market_clock
    )
    mending = Mending(documents=documents, library=library, fetches=fetches, wall=wall)
    supply = Supply(
        market=market,
        library=library,
        fetches=fetches,
        fetcher=fetcher,
        prefetching=prefetching,
        mending=mending,
        bars=bars,
        clock=market_clock,
    )
    return market, supply


def _accounts(settings: Settings) -> dict[str, tuple[SecretStr, Plan]]:
    """Every provider that could be asked, with our key and plan there."""
    return {
        "alpha_vantage": (settings.alpha_vantage_key, settings.alpha_vantage_plan),
        "finnhub": (settings.finnhub_key, settings.finnhub_plan),
        "twelve_data": (settings.twelve_data_key, settings.twelve_data_plan),
        "polygon": (settings.polygon_key, settings.polygon_plan),
    }


def _providers(settings: Settings, wall: Clock, market_clock: Clock) -> list[Provider]:
    known: dict[str, Callable[[], Provider]] = {
        "alpha_vantage": lambda: AlphaVantage(
            base_url=settings.alpha_vantage_url,
            key=settings.alpha_vantage_key,
            plan=settings.alpha_vantage_plan,
            market_clock=market_clock,
        ),
        "finnhub": lambda: Finnhub(
            base_url=settings.finnhub_url,
            key=settings.finnhub_key,
            plan=settings.finnhub_plan,
            clock=wall,
            market_clock=market_clock,
        ),
        "twelve_data": lambda: TwelveData(
            base_url=settings.twelve_data_url,
            key=settings.twelve_data_key,
            plan=settings.twelve_data_plan,
            clock=wall,
            market_clock=market_clock,
        ),
        "polygon": lambda: Polygon(
            base_url=settings.polygon_url,
            key=settings.polygon_key,
            plan=settings.polygon_plan,
            market_clock=market_clock,
        ),
    }
    names = [name.strip() for name in settings.market_providers.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    keyed = [name for name in names if name in known and _accounts(settings)[name][0].get_secret_value()]
    if unknown or not keyed:
        raise ConfigurationError(
            f"MARKET_PROVIDERS names {', '.join(unknown) or 'nobody who has a key'}: choose from {', '.join(known)}"
        )
    return [known[name]() for name in keyed]


def open_documents(url: str, wall: Clock, cosmos_key: SecretStr | None = None) -> Documents:
    """
    The storage that a DOCUMENTS_URL names, as it is: documents of any version.

    Raises:
        ConfigurationError: it names none.

    """
    scheme, _, path = url.partition(":")
    if scheme == "cosmos":
        from shared.adapters.cosmos import CosmosDocuments

        return CosmosDocuments.from_url(url, cosmos_key, wall)
    if scheme != "sqlite" or not path:
        raise ConfigurationError(
            "DOCUMENTS_URL names no storage: write sqlite:FILE, such as sqlite:.troop/app.db, "
            "or cosmos:https://ACCOUNT.documents.azure.com:443/?database=troop"
        )
    if path == ":memory:":
        return SQLiteDocuments(path, wall)
    return SQLiteDocuments(ROOT / path, wall)
