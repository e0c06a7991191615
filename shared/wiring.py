"""Who stands in which place in the shared rooms. Nothing here touches the network or a file; first use does."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

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
from shared.market.adapters.alpha_vantage import AlphaVantage
from shared.market.adapters.finnhub import Finnhub
from shared.market.fetcher import Fetcher
from shared.market.ingest import Ingest
from shared.market.ports import Provider
from shared.market.registry import windows_of
from shared.market.service import Market
from shared.market.stores import Bars, Quotes, SeriesStore
from shared.market.throttle import Throttle
from shared.migrations import Migrated
from shared.settings import ROOT, Settings

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
    version: str = VERSION


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
        market=wire_market(settings, wall, market_clock, documents, publisher),
    )


def wire_market(
    settings: Settings, wall: Clock, market_clock: Clock, documents: Documents, publisher: EventPublisher
) -> Market:
    """Build the market room."""
    delay = timedelta(seconds=settings.market_data_delay_seconds)
    series = SeriesStore(documents, wall)
    bars, quotes = Bars(documents, wall), Quotes(documents, wall)
    plans = {"alpha_vantage": settings.alpha_vantage_plan, "finnhub": settings.finnhub_plan}
    throttles = {name: Throttle(documents, wall, name, windows_of(name, plan)) for name, plan in plans.items()}
    providers = _providers(settings, wall, market_clock, throttles)
    ingest = Ingest(
        documents=documents,
        series=series,
        bars=bars,
        quotes=quotes,
        fetcher=Fetcher(providers=providers, throttles=throttles),
        publisher=publisher,
        wall=wall,
        market=market_clock,
        delay=delay,
        live_from=settings.live_from_instant(),
        watchlist_file=settings.file(settings.watchlist_file),
    )
    return Market(series=series, bars=bars, quotes=quotes, ingest=ingest, clock=market_clock, delay=delay)


def _providers(
    settings: Settings, wall: Clock, market_clock: Clock, throttles: Mapping[str, Throttle]
) -> list[Provider]:
    known: dict[str, Provider] = {
        "alpha_vantage": AlphaVantage(
            base_url=settings.alpha_vantage_url,
            key=settings.alpha_vantage_key,
            plan=settings.alpha_vantage_plan,
            market_clock=market_clock,
            permit=throttles["alpha_vantage"].permit,
        ),
        "finnhub": Finnhub(
            base_url=settings.finnhub_url,
            key=settings.finnhub_key,
            plan=settings.finnhub_plan,
            clock=wall,
            permit=throttles["finnhub"].permit,
        ),
    }
    names = [name.strip() for name in settings.market_providers.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigurationError(
            f"MARKET_PROVIDERS names {', '.join(unknown) or 'nobody'}: choose from {', '.join(known)}"
        )
    return [known[name] for name in names]


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
