"""What the delivery benchmark sends to whom: events, in which order and how often, and who must see which of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random

from alerts.adapters.rule_documents import RuleDocuments
from alerts.models import Severity, alert_id, delivery_id
from alerts.subscriptions import Digest, Endpoint, Preferences, Rules, Subscription, endpoint_id
from shared.events import fact_id
from signals.events import SignalRaised

CLOSES_AT = datetime(2013, 1, 2, 21, tzinfo=UTC)
LOUD, QUIET = "loud", "quiet"
"""Entries: what webhooks hear, and what they do not."""
LOUD_SHARE, DUPLICATED = 0.1, 0.1
BURSTS = 10
"""Loud events come in so many crowds, so that Discord's limits are met."""
REORDERED = 400
"""An event may come so many places earlier or later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is run; each event is heard by so many ``hearers``."""

    events: int
    subscribers: int
    hearers: int
    webhooks: int
    seed: int

    @property
    def symbols(self) -> int:
        return self.subscribers // self.hearers


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What one subscriber must see of one event on one channel."""

    signal_id: str
    subscriber: str
    channel: str
    alert_id: str
    delivery_id: str
    is_critical: bool
    """Then it must be seen; else a webhook may end as UNKNOWN, with the reason on record."""


class Plan:
    """
    The whole of it, the same for the same size and seed.

    Subscriber *i* follows symbol *i* modulo the number of symbols, on SignalR and by e-mail at once. The first of
    each of the first symbols has a webhook too, for loud events only; every other webhook is critical.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        dice = Random(size.seed)
        self.signals = [signal_of(n, symbol, entry) for n, (symbol, entry) in enumerate(_events(size, dice))]
        self.order = _order(len(self.signals), dice)
        self.subscribers = [name_of(i) for i in range(size.subscribers)]
        self.hooked = self.subscribers[: size.webhooks]

    def expected(self) -> list[Expected]:
        """Everything that must be seen."""
        found = []
        for signal in self.signals:
            first = int(signal.symbol[1:])
            for i in range(first, self.size.subscribers, self.size.symbols):
                has_hook = signal.entry == LOUD and i < self.size.webhooks
                for channel in ("signalr", "email", *(["discord"] if has_hook else [])):
                    alert = alert_id(signal.signal_id, name_of(i))
                    found.append(
                        Expected(
                            signal_id=signal.signal_id,
                            subscriber=name_of(i),
                            channel=channel,
                            alert_id=alert,
                            delivery_id=delivery_id(alert, channel),
                            is_critical=has_hook and is_critical(i),
                        )
                    )
        return found

    async def subscribe(self, book: RuleDocuments, hooks: Sequence[str]) -> None:
        """Store what everybody asked for, and where each is reached; *hooks* are the webhooks' addresses."""
        for i, name in enumerate(self.subscribers):
            symbols = frozenset({symbol_of(i % self.size.symbols)})
            addresses = {"email": mail_of(name)}
            asked = [_asked(name, "all", symbols, ("signalr", "email"), digest=Digest.NONE)]
            if i < len(hooks):
                addresses["discord"] = hooks[i]
                severity = Severity.CRITICAL if is_critical(i) else Severity.INFO
                loud = frozenset({LOUD})
                asked.append(_asked(name, LOUD, symbols, ("discord",), entries=loud, severity=severity))
            await subscribe(book, name, asked, addresses)


async def subscribe(
    book: RuleDocuments, name: str, asked: Sequence[Subscription], addresses: Mapping[str, str]
) -> None:
    """Store a new subscriber's rules and addresses."""
    endpoints = [
        Endpoint(endpoint_id=endpoint_id(name, channel), subscriber=name, channel=channel, shown=f"{channel} of {name}")
        for channel in addresses
    ]
    before = Rules(subscriber=name, preferences=Preferences(subscriber=name))
    await book.save(before, put=[*asked, *endpoints], addresses=addresses)


def is_critical(i: int) -> bool:
    """Whether subscriber *i*'s webhook is."""
    return i % 2 == 0


def name_of(i: int) -> str:
    """The name of subscriber *i*."""
    return f"user-{i:05}"


def symbol_of(k: int) -> str:
    """The name of symbol *k*."""
    return f"S{k:05}"


def mail_of(name: str) -> str:
    """A subscriber's mail address."""
    return f"{name}@example.org"


def _asked(
    name: str,
    what: str,
    symbols: frozenset[str],
    channels: tuple[str, ...],
    *,
    entries: frozenset[str] | None = None,
    severity: Severity = Severity.INFO,
    digest: Digest | None = None,
) -> Subscription:
    return Subscription(
        subscription_id=fact_id("bench", "subscription", name, what),
        subscriber=name,
        channels=channels,
        symbols=symbols,
        entries=entries,
        severity=severity,
        digest=digest,
    )


def _events(size: Size, dice: Random) -> list[tuple[str, str]]:
    """Symbol and entry of every event, the loud ones in crowds of a few webhooks each."""
    loud = int(size.events * LOUD_SHARE) if size.webhooks else 0
    crowds: list[list[tuple[str, str]]] = [[] for _ in range(BURSTS)]
    for n in range(loud):
        hook = n % size.webhooks
        crowds[hook * BURSTS // size.webhooks].append((symbol_of(hook), LOUD))
    quiet = [(symbol_of(dice.randrange(size.symbols)), QUIET) for _ in range(size.events - loud)]
    found: list[tuple[str, str]] = []
    for number, crowd in enumerate(crowds):
        found += quiet[len(quiet) * number // BURSTS : len(quiet) * (number + 1) // BURSTS]
        found += crowd
    return found


def _order(events: int, dice: Random) -> list[int]:
    """The order in which events are handed over, some twice; half of the twins come at the same moment."""
    places = [(n + dice.uniform(0, REORDERED), n) for n in range(events)]
    twins = dice.sample(places, int(events * DUPLICATED))
    again = [(place + (dice.choice((0, 1)) * dice.uniform(0, REORDERED * 5)), n) for place, n in twins]
    return [n for _, n in sorted([*places, *again])]


def signal_of(n: int, symbol: str, entry: str) -> SignalRaised:
    """The *n*-th event."""
    closed_at = CLOSES_AT + timedelta(minutes=n)
    return SignalRaised(
        signal_id=fact_id("bench", "signal", str(n)),
        entry=entry,
        strategy="sma_cross@1",
        params={"fast": 10.0, "slow": 30.0},
        symbol=symbol,
        interval="1d",
        direction="long" if n % 2 else "short",
        strength=0.42,
        reference_price=100 + n / 100,
        features={"fast": 552.1, "slow": 550.3},
        provider="alpha_vantage",
        occurred_at=closed_at,
        recorded_at=closed_at,
    )
