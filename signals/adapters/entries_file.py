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

FIELDS = ("name", "strategy", "interval", "symbols", "params")


def read_entries(path: Path) -> list[Entry]:
    """
    Read every entry.

    Raises:
        ConfigurationError: names the file, the entry, the field and what to write instead.

    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigurationError(f"ENTRIES_FILE: {path} cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"{path}: {e}") from e
    tables = content.pop("entry", [])
    if content or not isinstance(tables, list):
        wrong = ", ".join(sorted(content)) or "[entry]"
        raise ConfigurationError(f"{path}: {wrong} is not known here; begin each entry with a line [[entry]]")
    entries = [_entry(table, f"{path}: entry {number}") for number, table in enumerate(tables, 1)]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(f"{path}: name {', '.join(twice)} is there twice; every entry needs one of its own")
    return entries


def _entry(table: object, where: str) -> Entry:
    if not isinstance(table, Mapping):
        raise ConfigurationError(f"{where}: {table!r} is no table; begin each entry with a line [[entry]]")
    unknown = sorted(set(table) - set(FIELDS))
    if unknown:
        raise ConfigurationError(f"{where}: {', '.join(unknown)} is no field of an entry; use {', '.join(FIELDS)}")
    name, kind = table.get("name"), table.get("strategy")
    if not isinstance(name, str) or not name or "|" in name:
        raise ConfigurationError(f"{where}: name must be a text without |")
    where = f"{where} ({name})"
    if not isinstance(kind, str) or kind not in STRATEGIES:
        raise ConfigurationError(f"{where}: strategy {kind!r} is unknown; choose from {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[kind]
    try:
        params = strategy.params.model_validate(table.get("params", {}))
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        field = ".".join(["params", *map(str, error["loc"])])
        raise ConfigurationError(f"{where}: {field}: {error['msg']}") from None
    try:
        interval = interval_of(str(table.get("interval", "1d")))
    except InvalidPayloadError as e:
        raise ConfigurationError(f"{where}: interval: {e}") from e
    return Entry(
        name=name,
        strategy=kind,
        version=strategy.version,
        params=params.model_dump(),
        interval=interval,
        symbols=_symbols(table.get("symbols", "all"), where),
        lookback=strategy.lookback(params),
    )


def _symbols(given: Any, where: str) -> frozenset[str] | None:  # noqa: ANN401 - whatever the file holds
    if given == "all":
        return None
    if not isinstance(given, list) or not given or not all(isinstance(symbol, str) for symbol in given):
        raise ConfigurationError(f'{where}: symbols is {given!r}; write "all" or a list such as ["AAPL", "MSFT"]')
    try:
        return frozenset(symbol_of(symbol) for symbol in given)
    except InvalidPayloadError as e:
        raise ConfigurationError(f"{where}: symbols: {e}") from e
