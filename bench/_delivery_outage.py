"""
An hour without Discord, with thousands of messages waiting, on a clock that is turned by hand.

The alerts domain is wired as in the app, over SQLite in memory, with the real Discord channel; only what it asks is
replaced: a provider that cannot be reached for an hour and then takes everything, within its limits.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from alerts.adapters.discord import DiscordChannel
from alerts.adapters.rule_documents import RuleDocuments
from alerts.logic.breaking import FIRST_PAUSE, LONGEST_PAUSE, MOST_FAILURES
from alerts.models import Severity
from alerts.service import AT_ONCE
from alerts.subscriptions import Subscription
from alerts.wiring import wire
from bench._delivery_plan import LOUD, signal_of, subscribe, symbol_of
from bench._report import BenchError, say
from infra.local.discord import LIMIT, WINDOW
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import MarketClock, StoppedClock
from shared.documents import Documents
from shared.events import fact_id
from shared.http_client import HttpClient
from shared.sealing import Sealer
from shared.settings import Settings
from shared.wiring import Core, wire_core

if TYPE_CHECKING:
    import httpx

    from alerts.service import AlertService

LASTS = timedelta(hours=1)
SWEEP_EVERY = timedelta(seconds=15)
PATIENCE = timedelta(hours=3)
"""How long after the outage everything must be told at the latest."""
BEGINS_AT = datetime(2013, 1, 2, 21, tzinfo=UTC)
_DUE = "SELECT count(*) FROM documents WHERE container = 'deliveries' AND due_at IS NOT NULL"


def most_requests() -> int:
    """
    How many requests an outage may cost: the failures that open the breaker, what was under way then, and a probe
    after each pause.
    """
    pause, spent, probes = FIRST_PAUSE, timedelta(), 0
    while spent < LASTS:
        spent += pause
        probes += 1
        pause = min(2 * pause, LONGEST_PAUSE)
    return MOST_FAILURES + AT_ONCE + probes


class Provider:
    """Discord as far as a caller sees it: unreachable, then well and within its limits."""

    def __init__(self, wall: StoppedClock) -> None:
        self._wall = wall
        self._windows: dict[str, tuple[datetime, int]] = {}
        self.is_down = True
        self.asked = 0
        self.limited = 0
        self.shown: Counter[str] = Counter()

    def transport(self) -> "httpx.AsyncBaseTransport":
        """What stands for the network."""
        import httpx

        async def answer(request: httpx.Request) -> httpx.Response:
            self.asked += 1
            if self.is_down:
                raise httpx.ConnectError("nobody listens", request=request)
            return self._taken(request)

        return httpx.MockTransport(answer)

    def _taken(self, request: "httpx.Request") -> "httpx.Response":
        import httpx

        hook, now = request.url.path, self._wall.now()
        opened_at, used = self._windows.get(hook, (now, 0))
        if now - opened_at >= WINDOW:
            opened_at, used = now, 0
        left = (opened_at + WINDOW - now).total_seconds()
        if used >= LIMIT:
            self.limited += 1
            return httpx.Response(429, json={"retry_after": left, "global": False}, headers={"Retry-After": f"{left}"})
        self._windows[hook] = (opened_at, used + 1)
        self.shown[json.loads(request.content)["embeds"][0]["footer"]["text"]] += 1
        headers = {
            "X-RateLimit-Limit": f"{LIMIT}",
            "X-RateLimit-Remaining": f"{LIMIT - used - 1}",
            "X-RateLimit-Reset-After": f"{left}",
        }
        return httpx.Response(200, json={"id": f"{self.asked}"}, headers=headers)


class _Silent:
    """A topic that takes everything: what the house is told is not looked at here."""

    async def publish(self, events: object) -> None:
        return

    async def close(self) -> None:
        return


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """What an outage came to."""

    requests: int
    bound: int
    lost: int
    repeated: int
    drained: timedelta


async def outage(settings: Mapping[str, str], *, pending: int, webhooks: int) -> Outage:
    """Let Discord be away for an hour with *pending* messages to *webhooks* webhooks, and come back."""
    begun = time.monotonic()
    wall = StoppedClock(BEGINS_AT)
    provider = Provider(wall)
    core = wire_core(Settings.from_env(settings))
    documents = SQLiteDocuments(":memory:", wall)
    core = replace(core, wall=wall, market_clock=MarketClock(wall), documents=documents, publisher=_Silent())
    service = _service(core, provider, wall)
    await _subscribe(core, documents, wall, webhooks)
    for n in range(pending):
        await service.announce(signal_of(n, symbol_of(n % webhooks), LOUD))
    if provider.shown:
        raise BenchError("somebody was reached while nobody could be")
    say(f"outage: {pending} messages wait after {provider.asked} requests and {time.monotonic() - begun:.1f} s")
    while wall.at < BEGINS_AT + LASTS:
        await _turn(service, wall)
    requests = provider.asked
    say(f"outage: {requests} requests in the hour, {time.monotonic() - begun:.1f} s")
    provider.is_down, back_at = False, wall.at
    while provider.shown.total() < pending and wall.at < back_at + PATIENCE:
        await _turn(service, wall)
    say(f"outage: {provider.shown.total()} told {wall.at - back_at} later, {time.monotonic() - begun:.1f} s")
    return Outage(
        requests=requests,
        bound=most_requests(),
        lost=pending - len(provider.shown),
        repeated=provider.shown.total() - len(provider.shown),
        drained=wall.at - back_at,
    )


async def _turn(service: "AlertService", wall: StoppedClock) -> None:
    wall.at += SWEEP_EVERY
    await service.sweep()


def _service(core: Core, provider: Provider, wall: StoppedClock) -> "AlertService":
    service = wire(core).service
    webhook = core.settings.discord_webhook_url.get_secret_value()
    http = HttpClient("discord", transport=provider.transport)
    # No waiting for a place in the bucket: the clock stands still while it would.
    discord = DiscordChannel(webhook, http, core.documents, wall, patience=timedelta())
    courier = replace(service.courier, channels={**service.courier.channels, "discord": discord})
    return replace(service, courier=courier)


async def _subscribe(core: Core, documents: Documents, wall: StoppedClock, webhooks: int) -> None:
    book = RuleDocuments(documents, wall, Sealer(core.settings.endpoint_keys.get_secret_value()))
    base = core.settings.discord_webhook_url.get_secret_value().partition("/webhooks/")[0]
    for i in range(webhooks):
        asked = Subscription(
            subscription_id=fact_id("bench", "outage", str(i)),
            subscriber=f"user-{i}",
            channels=("discord",),
            symbols=frozenset({symbol_of(i)}),
            severity=Severity.INFO,
        )
        hook = f"{base}/webhooks/{200_000_000_000_000_000 + i}/{'outage' * 10}"
        await subscribe(book, f"user-{i}", [asked], {"discord": hook})
