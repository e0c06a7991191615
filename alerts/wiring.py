"""Who stands in which place in the alerts domain."""

from dataclasses import dataclass
from datetime import timedelta

from alerts.adapters.discord import DiscordChannel
from alerts.adapters.documents import DeliveryDocuments
from alerts.adapters.signalr import SignalRChannel
from alerts.adapters.subscriptions_file import read_subscriptions
from alerts.ports import Channel
from alerts.service import AlertService
from shared.http_client import HttpClient
from shared.inbound import DeadLetters
from shared.wiring import Core


@dataclass(frozen=True, slots=True, kw_only=True)
class Wired:
    """What the triggers need."""

    service: AlertService
    dead_letters: DeadLetters


def wire(core: Core) -> Wired:
    """
    Build the alerts domain.

    Raises:
        ConfigurationError: an address or the subscriptions file is wrong.

    """
    settings = core.settings
    hub = SignalRChannel(settings.azure_signalr_connection_string.get_secret_value(), HttpClient("signalr"), core.wall)
    discord = DiscordChannel(
        settings.discord_webhook_url.get_secret_value(), HttpClient("discord"), core.documents, core.wall
    )
    channels: dict[str, Channel] = {channel.name: channel for channel in (hub, discord)}
    service = AlertService(
        subscriptions=read_subscriptions(settings.file(settings.subscriptions_file), channels),
        deliveries=DeliveryDocuments(core.documents, timedelta(days=settings.retention_days)),
        channels=channels,
        hub=hub,
        publisher=core.publisher,
        wall=core.wall,
        lease=timedelta(seconds=settings.alerts_lease_seconds),
    )
    return Wired(service=service, dead_letters=core.dead_letters)
