"""The subscriptions file: TOML, read once."""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from alerts.models import Severity, Subscription
from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import symbol_of

FIELDS = {"subscriber", "channels", "symbols", "entries", "min_strength", "severity"}


def read_subscriptions(path: Path, channels: Collection[str]) -> list[Subscription]:
    """
    Read every subscription; *channels* are the ones that exist.

    Raises:
        ConfigurationError: names the file, the subscription and what to write instead.

    """
    try:
        tables = tomllib.loads(path.read_text()).get("subscription", [])
    except OSError as e:
        raise ConfigurationError(f"SUBSCRIPTIONS_FILE: {path} cannot be read: {e.strerror}") from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigurationError(f"{path}: {e}") from e
    return [_subscription(t, f"{path}: subscription {n}", channels) for n, t in enumerate(tables, 1)]


def _subscription(table: Mapping[str, Any], where: str, channels: Collection[str]) -> Subscription:
    unknown = sorted(set(table) - FIELDS)
    if unknown:
        raise ConfigurationError(f"{where}: {', '.join(unknown)} is no field; use {', '.join(sorted(FIELDS))}")
    subscriber = table.get("subscriber")
    if not isinstance(subscriber, str) or not subscriber:
        raise ConfigurationError(f"{where}: subscriber must be a name")
    wanted = tuple(table.get("channels", ()))
    strangers = [str(c) for c in wanted if c not in channels]
    if strangers or not wanted:
        raise ConfigurationError(
            f"{where}: channels {', '.join(strangers) or 'are missing'}; choose from {', '.join(sorted(channels))}"
        )
    try:
        symbols, entries = table.get("symbols", "all"), table.get("entries", "all")
        return Subscription(
            subscriber=subscriber,
            channels=wanted,
            symbols=None if symbols == "all" else frozenset(symbol_of(s) for s in symbols),
            entries=None if entries == "all" else frozenset(map(str, entries)),
            min_strength=float(table.get("min_strength", 0.0)),
            severity=Severity(table.get("severity", "info")),
        )
    except (InvalidPayloadError, TypeError, ValueError, AttributeError) as e:
        raise ConfigurationError(f"{where}: {e}") from e
