"""The subscriptions file: what the operator lets whom hear, in TOML, read once. Its signals need no rules of time."""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from alerts.models import Severity
from alerts.subscriptions import Subscription
from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import symbol_of

FIELDS = {
    "subscriber",
    "channels",
    "symbols",
    "entries",
    "directions",
    "min_strength",
    "min_confidence",
    "severity",
}
DIRECTIONS = ("long", "short")


def read_subscriptions(path: Path, channels: Collection[str]) -> list[Subscription]:
    """
    Read every subscription; *channels* are the ones that exist.

    Raises:
        ConfigurationError: names the file, the subscription, the field and what to write instead.

    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigurationError(f"SUBSCRIPTIONS_FILE: {path} cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"{path}: {e}") from e
    tables = found.pop("subscription", [])
    if found:
        raise ConfigurationError(f"{path}: {', '.join(sorted(found))} is nothing we know; write [[subscription]]")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigurationError(f"{path}: subscription must be a list of tables; write [[subscription]]")
    return [_subscription(t, f"file-{n}", f"{path}: subscription {n}", channels) for n, t in enumerate(tables, 1)]


def _subscription(table: Mapping[str, Any], id_: str, where: str, channels: Collection[str]) -> Subscription:
    unknown = sorted(set(table) - FIELDS)
    if unknown:
        raise ConfigurationError(f"{where}: {', '.join(unknown)} is no field; use {', '.join(sorted(FIELDS))}")
    subscriber = table.get("subscriber")
    if not isinstance(subscriber, str) or not subscriber:
        raise ConfigurationError(f"{where}: subscriber must be a name")
    symbols = _names(table, "symbols", where)
    entries = _names(table, "entries", where)
    try:
        return Subscription(
            subscription_id=id_,
            subscriber=subscriber,
            channels=_channels(table.get("channels"), where, channels),
            symbols=None if symbols is None else frozenset(map(symbol_of, symbols)),
            entries=None if entries is None else frozenset(entries),
            directions=_directions(table, where),
            min_strength=_share("min_strength", table.get("min_strength", 0.0), where),
            min_confidence=_share("min_confidence", table["min_confidence"], where)
            if "min_confidence" in table
            else None,
            severity=_severity(table.get("severity", "info"), where),
        )
    except InvalidPayloadError as e:
        raise ConfigurationError(f"{where}: symbols: {e}") from e


def _channels(value: object, where: str, known: Collection[str]) -> tuple[str, ...]:
    choices = f"choose from {', '.join(sorted(known))}"
    if not isinstance(value, list) or not value:
        raise ConfigurationError(f"{where}: channels must be a list; {choices}")
    strangers = [str(c) for c in value if not isinstance(c, str) or c not in known]
    if strangers:
        raise ConfigurationError(f"{where}: channels {', '.join(strangers)} do not exist; {choices}")
    return tuple(value)


def _names(table: Mapping[str, Any], field: str, where: str) -> list[str] | None:
    """A list of names; None for all."""
    value = table.get(field, "all")
    if value == "all":
        return None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ConfigurationError(f'{where}: {field} must be "all" or a list of names')
    return value


def _directions(table: Mapping[str, Any], where: str) -> frozenset[str] | None:
    names = _names(table, "directions", where)
    if names is not None and not set(names) <= set(DIRECTIONS):
        raise ConfigurationError(f'{where}: directions must be "all" or a list of {", ".join(DIRECTIONS)}')
    return None if names is None else frozenset(names)


def _share(field: str, value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigurationError(f"{where}: {field} must be a number from 0 to 1, not {value!r}")
    return float(value)


def _severity(value: object, where: str) -> Severity:
    try:
        return Severity(str(value))
    except ValueError:
        raise ConfigurationError(f"{where}: severity must be one of {', '.join(Severity)}, not {value!r}") from None
