"""From when to when the market is replayed, and how fast."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median_low

from infra.local.replay.catalogue import Catalogue
from infra.local.replay.samples import load_folder, load_packaged
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import Clock, MarketTime, parse_instant
from shared.errors import ConfigurationError
from shared.market.models import instant_of
from shared.market.stores import Bars, SeriesStore

DEFAULT_SYMBOLS = ("AAPL", "GOOG", "IBM", "MSFT")
HISTORY = 100
"""Bars of history a replay begins with where the data does not reach a year before its end."""
AFTERWARDS = timedelta(hours=1)
"""How far the market clock goes on behind the last bar: long enough for that session's digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line asks of the replay."""

    symbols: str | None
    interval: str
    folder: Path | None
    first: str | None
    last: str | None
    speed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A replay that can start."""

    series: list[tuple[str, str]]
    """What is watched: symbol and interval, sorted."""
    live_from: datetime
    time: MarketTime
    resumed: bool


def read_catalogue(wanted: Wanted) -> Catalogue:
    """
    Load the recorded bars.

    Raises:
        ConfigurationError: an unknown symbol, or a file that cannot be true; names it and the remedy.

    """
    text = (wanted.symbols or "").strip()
    symbols = None if text.lower() in ("", "all") else [s.strip().upper() for s in text.split(",") if s.strip()]
    if wanted.folder:
        return _chosen(load_folder(wanted.folder), symbols, wanted.folder)
    if text.lower() == "all":
        return load_packaged(None, wanted.interval)
    if symbols is None:
        symbols = list(DEFAULT_SYMBOLS) if wanted.interval == "1d" else ["AAPL"]
    return load_packaged(symbols, wanted.interval)


def plan(wanted: Wanted, catalogue: Catalogue, *, saved: datetime | None, now: datetime) -> Plan:
    """
    Decide where the market begins and ends.

    Raises:
        ConfigurationError: a date or speed that is none, or an empty span.

    """
    if not math.isfinite(wanted.speed):
        raise ConfigurationError(f"--speed {wanted.speed} is no speed: write a number from 0 to 999999")
    closes = {key: [bar.closed_at for bar in one.bars] for key, one in catalogue.items() if one.bars}
    if not closes:
        raise ConfigurationError("the replay holds no bar at all: choose other symbols or another folder")
    end = max(c[-1] for c in closes.values())
    first = _instant("--from", wanted.first) if wanted.first else _default_start(closes.values(), end)
    last = min(_instant("--to", wanted.last), end) if wanted.last else end
    if first >= last:
        raise ConfigurationError(
            f"nothing to replay between {first:%Y-%m-%d} and {last:%Y-%m-%d}: change --from or --to"
        )
    start = max(first, saved) if saved else first
    stop = max(last + AFTERWARDS, start)
    return Plan(
        series=sorted((symbol, str(interval)) for symbol, interval in closes),
        live_from=first,
        time=MarketTime(market=start, wall=now, speed=wanted.speed, end=stop),
        resumed=saved is not None and saved > first,
    )


def _chosen(catalogue: Catalogue, symbols: list[str] | None, folder: Path) -> Catalogue:
    """The series of a folder that were asked for; all of them where nothing was."""
    if symbols is None:
        return catalogue
    known = {symbol for symbol, _ in catalogue}
    if missing := sorted(set(symbols) - known):
        raise ConfigurationError(f"{folder} has no file of {', '.join(missing)}; there is {', '.join(sorted(known))}")
    return Catalogue(one for (symbol, _), one in catalogue.items() if symbol in symbols)


async def newest_close(path: Path, wall: Clock) -> datetime | None:
    """The newest bar the app has stored; None without any."""
    if not path.exists():  # noqa: ASYNC240 - before anything runs
        return None
    documents = SQLiteDocuments(path, wall)
    bars = Bars(documents, wall)
    newest: datetime | None = None
    try:
        for series in await SeriesStore(documents, wall).all():
            page = await bars.newest(series.key, series.revision)
            if page:
                closed = instant_of(page.columns.closed[-1])
                newest = max(newest or closed, closed)
    finally:
        await documents.close()
    return newest


def _default_start(closes: Iterable[list[datetime]], end: datetime) -> datetime:
    """A year before the end, but behind enough history (for half of the series, at least) where there is less."""
    behind = median_low(c[max(min(HISTORY, len(c) - 1) - 1, 0)] for c in closes)
    return max(end - timedelta(days=366), min(behind, end - timedelta(days=1)))


def _instant(option: str, text: str) -> datetime:
    try:
        if len(text) == len("2012-03-01"):
            return datetime.fromisoformat(text).replace(tzinfo=UTC)
        return parse_instant(text)
    except ValueError as e:
        raise ConfigurationError(f"{option} {text!r} is no date: write 2012-03-01 or 2012-03-01T14:30:00Z") from e
