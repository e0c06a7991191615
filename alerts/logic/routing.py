"""Who hears a signal. Pure."""

from collections.abc import Sequence

from alerts.models import Subscription
from signals.events import SignalRaised


def hearers(signal: SignalRaised, subscriptions: Sequence[Subscription]) -> dict[str, list[Subscription]]:
    """The subscriptions a signal matches, by subscriber; a subscriber hears it once, on all channels together."""
    found: dict[str, list[Subscription]] = {}
    for subscription in subscriptions:
        if wants(signal, subscription):
            found.setdefault(subscription.subscriber, []).append(subscription)
    return found


def wants(signal: SignalRaised, subscription: Subscription) -> bool:
    """Whether the subscription asks for this signal."""
    return (
        (subscription.symbols is None or signal.symbol in subscription.symbols)
        and (subscription.entries is None or signal.entry in subscription.entries)
        and signal.strength >= subscription.min_strength
    )
