"""The entries file: TOML, read once."""

import re
import tomllib
from collections.abc import Mapping
from datetime import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import Interval, interval_of, symbol_of
from signals.logic.gating import STATEFUL
from signals.logic.strategies import STRATEGIES, Params, Strategy
from signals.models import Entry, Gate, SessionGate, StateGate

FIELDS = (
    "name",
    "strategy",
    "interval",
    "symbols",
    "params",
    "gate",
    "horizon",
    "stale_after",
    "mute_without_edge",
)
STATE_FIELDS = ("strategy", "params", "agrees")
MOST_BARS = 10_000
"""The longest horizon, and the latest an entry may still look at bars."""
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


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
    params = _params(strategy, table.get("params", {}), where)
    try:
        interval = interval_of(str(table.get("interval", "1d")))
    except InvalidPayloadError as e:
        raise ConfigurationError(f"{where}: interval: {e}") from e
    if interval not in strategy.intervals:
        sensible = " or ".join(strategy.intervals)
        raise ConfigurationError(f"{where}: interval: {kind} makes no sense at {interval}; write {sensible}")
    gates = _gates(table.get("gate", []), interval, where)
    muted = table.get("mute_without_edge", False)
    if not isinstance(muted, bool):
        raise ConfigurationError(f"{where}: mute_without_edge is {muted!r}; write true or false")
    return Entry(
        name=name,
        strategy=kind,
        version=strategy.version,
        params=params.model_dump(),
        interval=interval,
        symbols=_symbols(table.get("symbols", "all"), where),
        lookback=max([strategy.lookback(params), *(gate.lookback for gate in gates if isinstance(gate, StateGate))]),
        gates=gates,
        horizon=_bars(table, "horizon", strategy.horizon, where),
        stale_after=_bars(table, "stale_after", 3, where),
        mute_without_edge=muted,
    )


def _params(strategy: Strategy, given: object, where: str) -> Params:
    try:
        return strategy.params.model_validate(given)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        field = ".".join(["params", *map(str, error["loc"])])
        raise ConfigurationError(f"{where}: {field}: {error['msg']}") from None


def _bars(table: Mapping[str, Any], field: str, default: int, where: str) -> int:
    bars = table.get(field, default)
    if not isinstance(bars, int) or isinstance(bars, bool) or not 1 <= bars <= MOST_BARS:
        raise ConfigurationError(f"{where}: {field} is {bars!r}; write a number of bars from 1 to {MOST_BARS}")
    return bars


def _gates(given: object, interval: Interval, where: str) -> tuple[Gate, ...]:
    if not isinstance(given, list) or not all(isinstance(table, Mapping) for table in given):
        raise ConfigurationError(
            f'{where}: gate is {given!r}; write a list such as [{{ strategy = "adx_trend" }}, '
            '{ session = "10:00-15:30" }]'
        )
    return tuple(_gate(table, interval, f"{where}: gate {number}") for number, table in enumerate(given, 1))


def _gate(table: Mapping[str, Any], interval: Interval, where: str) -> Gate:
    if "session" in table:
        return _session_gate(table, interval, where)
    if unknown := sorted(set(table) - set(STATE_FIELDS)):
        raise ConfigurationError(
            f"{where}: {', '.join(unknown)} is no field of a gate; use session, or {', '.join(STATE_FIELDS)}"
        )
    kind, agrees = table.get("strategy"), table.get("agrees", True)
    if kind not in STATEFUL:
        raise ConfigurationError(
            f"{where}: strategy {kind!r} keeps no state that could gate; choose from {', '.join(STATEFUL)}"
        )
    if not isinstance(agrees, bool):
        raise ConfigurationError(f"{where}: agrees is {agrees!r}; write true or false")
    strategy = STRATEGIES[kind]
    if interval not in strategy.intervals:
        sensible = " or ".join(strategy.intervals)
        raise ConfigurationError(f"{where}: {kind} makes no sense at {interval}, only at {sensible}")
    params = _params(strategy, table.get("params", {}), where)
    return StateGate(
        strategy=kind,
        version=strategy.version,
        params=params.model_dump(),
        agrees=agrees,
        lookback=strategy.lookback(params),
    )


def _session_gate(table: Mapping[str, Any], interval: Interval, where: str) -> SessionGate:
    if len(table) > 1:
        raise ConfigurationError(f"{where}: session stands alone; write {', '.join(STATE_FIELDS)} into another gate")
    if interval is Interval.DAY:
        raise ConfigurationError(f"{where}: session: a daily bar has no time of day; use it at 1h or 1m")
    window = table["session"]
    found = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    if found is None:
        raise ConfigurationError(f'{where}: session is {window!r}; write two exchange times such as "10:00-15:30"')
    hour, minute, last_hour, last_minute = map(int, found.groups())
    first, last = time(hour, minute), time(last_hour, last_minute)
    if first > last:
        raise ConfigurationError(f"{where}: session {window} ends before it begins; write the earlier time first")
    return SessionGate(first=first, last=last)


def _symbols(given: Any, where: str) -> frozenset[str] | None:  # noqa: ANN401 - whatever the file holds
    if given == "all":
        return None
    if not isinstance(given, list) or not given or not all(isinstance(symbol, str) for symbol in given):
        raise ConfigurationError(f'{where}: symbols is {given!r}; write "all" or a list such as ["AAPL", "MSFT"]')
    try:
        return frozenset(symbol_of(symbol) for symbol in given)
    except InvalidPayloadError as e:
        raise ConfigurationError(f"{where}: symbols: {e}") from e
