"""The entries file: TOML, read once."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import interval_of, symbol_of
from signals.logic.strategies import STRATEGIES
from signals.models import Entry


def read_entries(path: Path) -> list[Entry]:
    """
    Read every entry.

    Raises:
        ConfigurationError: names the file, the entry, the field and what to write instead.

    """
    try:
        tables = tomllib.loads(path.read_text()).get("entry", [])
    except OSError as e:
        raise ConfigurationError(f"ENTRIES_FILE: {path} cannot be read: {e.strerror}") from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigurationError(f"{path}: {e}") from e
    entries = [_entry(table, f"{path}: entry {number}") for number, table in enumerate(tables, 1)]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(f"{path}: {', '.join(twice)} is named twice; every entry needs a name of its own")
    return entries


def _entry(table: Mapping[str, Any], where: str) -> Entry:
    unknown = sorted(set(table) - {"name", "strategy", "interval", "symbols", "params"})
    if unknown:
        raise ConfigurationError(f"{where}: {', '.join(unknown)} is no field of an entry")
    name, kind = table.get("name"), table.get("strategy")
    if not isinstance(name, str) or not name or "|" in name:
        raise ConfigurationError(f"{where}: name must be a text without |")
    where = f"{where} ({name})"
    if not isinstance(kind, str) or kind not in STRATEGIES:
        raise ConfigurationError(f"{where}: strategy {kind!r} is unknown; choose from {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[kind]
    try:
        params = strategy.params.model_validate(table.get("params", {}))
        interval = interval_of(str(table.get("interval", "1d")))
        symbols = table.get("symbols", "all")
        chosen = None if symbols == "all" else frozenset(symbol_of(symbol) for symbol in symbols)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        field = ".".join(map(str, error["loc"])) or "params"
        raise ConfigurationError(f"{where}: {field}: {error['msg']}") from None
    except (InvalidPayloadError, TypeError, AttributeError) as e:
        raise ConfigurationError(f"{where}: {e}") from e
    return Entry(
        name=name,
        strategy=kind,
        version=strategy.version,
        params=params.model_dump(),
        interval=interval,
        symbols=chosen,
        lookback=strategy.lookback(params),
    )
