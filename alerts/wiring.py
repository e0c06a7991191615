"""Who stands in which place in the alerts domain."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import quote

from alerts.adapters.breakers import StoredBreakers
from alerts.adapters.directory import DocumentDirectory
from alerts.adapters.discord import DiscordChannel
from alerts.adapters.discord_buckets import PATIENCE
from alerts.adapters.documents import DeliveryDocuments
from alerts.adapters.email import EmailChannel
from alerts.adapters.rule_documents import RuleDocuments
from alerts.adapters.signalr import SignalRChannel
from alerts.adapters.subscriptions_file import read_subscriptions
from alerts.canary import KEEP, Canary, CanaryChannel, PulseDocument
from alerts.courier import Courier
from alerts.logic.addresses import webhook_base
from alerts.logic.unsubscribing import Leaving, UnsubscribeKeys
from alerts.ports import Channel
from alerts.rules import RuleService
from alerts.service import AlertService
from alerts.trial import TrialMessages
from shared.audit import Audit
from shared.clock import Clock, MarketClock
from shared.http_client import HttpClient
from shared.inbound import DeadLetters
from shared.sealing import Sealer, parse_keys
from shared.settings import Settings
from shared.wiring import Core


@dataclass(frozen=True, slots=True, kw_only=True)
class Wired:
    """What the triggers need: alerts, the rules of who hears them, and the canary that shows that they arrive."""

    service: AlertService
    dead_letters: DeadLetters
    rules: RuleService
    canary: Canary
    audit: Audit


def wire(core: Core) -> Wired:
    """
    Build the alerts domain.

    Raises:
        ConfigurationError: an address, a key or the subscriptions file is wrong.

    """
    settings, wall = core.settings, core.wall
    webhook = settings.discord_webhook_url.get_secret_value()
    hub = SignalRChannel(settings.azure_signalr_connection_string.get_secret_value(), HttpClient("signalr"), wall)
    channels = _channels(core, hub, webhook)
    sealer = Sealer(settings.endpoint_keys.get_secret_value())
    house = read_subscriptions(settings.file(settings.subscriptions_file), channels)
    directory = DocumentDirectory(core.documents, wall, sealer, house)
    links = UnsubscribeKeys.of_settings(
        settings.unsubscribe_key.get_secret_value(), parse_keys(settings.endpoint_keys.get_secret_value())
    )
    deliveries = DeliveryDocuments(core.documents, timedelta(days=settings.retention_days))
    book = PulseDocument(core.documents, wall)
    sink = CanaryChannel(book, wall, url=settings.canary_url.get_secret_value())
    courier = Courier(
        deliveries=deliveries,
        directory=directory,
        channels={**channels, CanaryChannel.name: sink},
        breakers=StoredBreakers(core.documents, wall),
        wall=wall,
        market=_market_clock(core),
        lease=timedelta(seconds=settings.alerts_lease_seconds),
        unsubscribe_url=_unsubscribe_url(links, settings, wall),
    )
    service = AlertService(
        deliveries=deliveries,
        directory=directory,
        courier=courier,
        hub=hub,
        publisher=core.publisher,
        outbox=core.dead_letters,
        market=core.market,
    )
    audit = Audit(core.documents, wall)
    rules = RuleService(
        book=RuleDocuments(core.documents, wall, sealer, on_change=directory.look_again),
        wall=wall,
        market=core.market_clock,
        audit=audit,
        links=links,
        tester=TrialMessages(directory=directory, channels=channels, wall=wall, market=core.market_clock),
        channels=channels,
        webhook_base=webhook_base(webhook),
    )
    canary = Canary(
        courier=courier, deliveries=DeliveryDocuments(core.documents, KEEP), publisher=core.publisher, book=book
    )
    return Wired(service=service, dead_letters=core.dead_letters, rules=rules, canary=canary, audit=audit)


def _channels(core: Core, hub: SignalRChannel, webhook: str) -> Mapping[str, Channel]:
    """The ways to reach people that are set up here; without SMTP_URL there is no e-mail."""
    settings, wall = core.settings, core.wall
    # Whoever waits for a webhook's bucket is told so well within the attempt, so that it never looks like no answer.
    patience = min(PATIENCE, timedelta(seconds=settings.alerts_lease_seconds) / 4)
    discord = DiscordChannel(webhook, HttpClient("discord"), core.documents, wall, patience=patience)
    channels: dict[str, Channel] = {channel.name: channel for channel in (hub, discord)}
    if smtp_url := settings.smtp_url.get_secret_value():
        channels[EmailChannel.name] = EmailChannel(smtp_url, settings.email_from, wall)
    return channels


def _unsubscribe_url(links: UnsubscribeKeys, settings: Settings, wall: Clock) -> Callable[[str, str, str], str | None]:
    """Makes the one-click unsubscribe link of a message; None while there is no key to sign it with."""

    def url(subscriber: str, channel: str, subscription_id: str) -> str | None:
        if not links:
            return None
        leaving = Leaving(subscriber=subscriber, channel=channel, subscription_id=subscription_id or None)
        token = links.sign(leaving, now=wall.now())
        return f"{settings.public_url.rstrip('/')}/api/unsubscribe?token={quote(token, safe='')}"

    return url


def _market_clock(core: Core) -> MarketClock:
    clock = core.market_clock
    return clock if isinstance(clock, MarketClock) else MarketClock(clock)
