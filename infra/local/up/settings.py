"""The embedded defaults: what the app is told when neither the environment nor local.settings.json says otherwise."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.local.discord import DEFAULT_WEBHOOK
from infra.local.mailbox import PASSWORD, USER
from shared.clock import MarketTime
from shared.errors import ConfigurationError
from shared.settings import ROOT

TOPIC_KEY = "local-topic-key"
WEBHOOK_KEY = "local-webhook-secret"
UNSUBSCRIBE_KEY = "local-unsubscribe-key-of-32-characters-or-more"
ENDPOINT_KEY = "local:bG9jYWwtZW5kcG9pbnQta2V5LW9mLTMyLWJ5dGVzISE="
"""Public knowledge: it seals addresses that lie on this machine only."""
SIGNALR_KEY = "local-signalr-access-key-of-32-bytes-or-more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the app, the cloud and their data are."""

    app_url: str
    cloud_url: str
    data: Path
    smtp_port: int = 0


def embedded(place: Place, *, time: MarketTime | None, live_from: str, plan: str, live: bool) -> dict[str, str]:
    """The embedded defaults by setting; with *live*, providers and clock are left to the user."""
    webhook_id, token = DEFAULT_WEBHOOK
    cloud = place.cloud_url
    host, _, port = cloud.rpartition(":")
    values = {
        "FUNCTIONS_WORKER_RUNTIME": "python",
        "DOCUMENTS_URL": f"sqlite:{place.data / 'app.db'}",
        "PUBLIC_URL": place.app_url,
        "SMTP_URL": f"smtp://{USER}:{PASSWORD}@127.0.0.1:{place.smtp_port}?starttls=0" if place.smtp_port else "",
        "UNSUBSCRIBE_KEY": UNSUBSCRIBE_KEY,
        "ENDPOINT_KEYS": ENDPOINT_KEY,
        "OIDC_ISSUER": f"{cloud}/oidc",
        "OIDC_AUDIENCE": "troop",
        "OIDC_JWKS_URL": f"{cloud}/oidc/keys",
        "EVENT_GRID_TOPIC_ENDPOINT": f"{cloud}/topic/api/events",
        "EVENT_GRID_TOPIC_KEY": TOPIC_KEY,
        "AZURE_SIGNALR_CONNECTION_STRING": f"Endpoint={host};Port={port};AccessKey={SIGNALR_KEY};Version=1.0;",
        "DISCORD_WEBHOOK_URL": f"{cloud}/discord/api/webhooks/{webhook_id}/{token}",
        "MARKET_QUOTES_SCHEDULE": "*/10 * * * * *",
        "MARKET_FETCHES_SCHEDULE": "*/2 * * * * *",
        "MARKET_PREFETCH_SCHEDULE": "*/10 * * * * *",
        "SIGNALS_INGEST_SCHEDULE": "*/2 * * * * *",
        "SIGNALS_SWEEP_SCHEDULE": "*/2 * * * * *",
        "ALERTS_SWEEP_SCHEDULE": "*/2 * * * * *",
        "CONTENT_DIGEST_SCHEDULE": "*/2 * * * * *",
        "CONTENT_SWEEP_SCHEDULE": "*/2 * * * * *",
        "SYSTEM_DEADLETTERED_SCHEDULE": "*/5 * * * * *",
        "DEAD_LETTERS_URL": f"{cloud}/topic/deadletters",
        "SYSTEM_SWEEP_SCHEDULE": "0 */10 * * * *",
        "CANARY_SCHEDULE": "0 */5 * * * *",
        "ALERTS_LEASE_SECONDS": "10",
        "CONTENT_DIGEST_SETTLE_SECONDS": "5",
    }
    if live:
        return values
    return values | {
        "MARKET_CLOCK": str(time) if time else "",
        "LIVE_FROM": live_from,
        "MARKET_DATA_DELAY_SECONDS": "0",
        "ALPHA_VANTAGE_URL": f"{cloud}/alpha_vantage",
        "ALPHA_VANTAGE_KEY": f"local-{plan}",
        "ALPHA_VANTAGE_PLAN": plan,
        "FINNHUB_URL": f"{cloud}/finnhub/api/v1",
        "FINNHUB_KEY": f"local-{plan}",
        "FINNHUB_PLAN": plan,
        "FINNHUB_WEBHOOK_SECRET": WEBHOOK_KEY,
        "TWELVE_DATA_URL": f"{cloud}/twelve_data",
        "TWELVE_DATA_KEY": f"local-{plan}",
        "TWELVE_DATA_PLAN": plan,
        "POLYGON_URL": f"{cloud}/polygon",
        "POLYGON_KEY": f"local-{plan}",
        "POLYGON_PLAN": plan,
        "WATCHLIST_FILE": str(place.data / "watchlist.toml"),
    }


def local_settings(app: Path = ROOT) -> dict[str, str]:
    """
    The values of local.settings.json; none without the file.

    Raises:
        ConfigurationError: it is no JSON object with ``Values``.

    """
    path = app / "local.settings.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())["Values"]
        return {str(name): str(value) for name, value in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigurationError(
            f"{path} cannot be read ({e}): write an object with Values, as in local.settings.example.json"
        ) from e


def merged(defaults: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    """What a process is started with: the environment, else local.settings.json, else the embedded default."""
    given = {name: value for name, value in env.items() if value.strip() or name not in defaults}
    file = {name: value for name, value in local_settings().items() if value.strip()}
    return {**defaults, **file, **given}


def watchlist(series: Iterable[tuple[str, str]]) -> str:
    """The watchlist file of a replay: one table an interval."""
    by_interval: dict[str, list[str]] = {}
    for symbol, interval in series:
        by_interval.setdefault(interval, []).append(symbol)
    tables = [
        f"[[watch]]\ninterval = {json.dumps(interval)}\nsymbols = [{', '.join(map(json.dumps, symbols))}]\n"
        for interval, symbols in sorted(by_interval.items())
    ]
    return "\n".join(["# Written by troop up.", *tables])
