"""What `troop up` decides before it starts anything, what it refuses, and how it stops and goes on."""

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.local.replay.catalogue import Catalogue
from infra.local.replay.samples import load_folder
from infra.local.up import settings as local
from infra.local.up.ports import check_app_port, cloud_port, is_free
from infra.local.up.replay import Wanted, newest_close, plan, read_catalogue
from infra.local.up.settings import Place, embedded, local_settings, merged, watchlist
from infra.local.up.supervisor import Options, Supervisor
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import MarketTime, SystemClock, parse_instant
from shared.errors import ConfigurationError
from shared.market.ingest import read_watchlist
from shared.market.models import Interval
from shared.market.stores import Bars, Series, SeriesStore
from shared.settings import ROOT, Settings
from tests.e2e.harness import troop_up

NOW = datetime(2026, 11, 21, 9, tzinfo=UTC)
HEADER = "timestamp,open,high,low,close,volume"


def wanted(**asked: object) -> Wanted:
    nothing = {"symbols": None, "interval": "1d", "folder": None, "first": None, "last": None, "speed": 86_400.0}
    return Wanted(**{**nothing, **asked})


def options(data: Path, port: int, **asked: object) -> Options:
    return Options(
        **{"host": "127.0.0.1", "port": port, "instances": 1, "data": data, "live": False, "replay": wanted(), **asked}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to replay: 40 sessions of one symbol, the last one 2013-03-01."""
    days = [
        day for day in (datetime(2013, 3, 1, tzinfo=UTC) - timedelta(days=n) for n in range(60)) if day.weekday() < 5
    ]
    rows = [f"{day:%Y-%m-%d}T00:00:00Z,10,12,9,11,1000" for day in reversed(days)]
    holidays = ("2013-01-01", "2013-01-21", "2013-02-18")
    rows = [row for row in rows if not row.startswith(holidays)]
    made = tmp_path / "csv"
    made.mkdir()
    (made / "ACME_1d.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return made


@pytest.fixture
def catalogue(folder: Path) -> Catalogue:
    return load_folder(folder)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


# --- settings: the environment, then local.settings.json, then the embedded default


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where local.settings.json would lie; there is none yet."""
    monkeypatch.setattr(local.local_settings, "__defaults__", (tmp_path,))
    return tmp_path / "local.settings.json"


def write(file: Path, **values: str) -> None:
    file.write_text(json.dumps({"IsEncrypted": False, "Values": values}))


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(settings_file: Path) -> None:
    """Each setting comes from the first place that gives it a value."""
    write(settings_file, A="file", B="file")
    found = merged({"A": "default", "B": "default", "C": "default"}, {"A": "env"})
    assert found == {"A": "env", "B": "file", "C": "default"}


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_value_counts_as_not_set(settings_file: Path, blank: str) -> None:
    """A line left empty in the file or the environment hides no value that is there."""
    write(settings_file, A=blank, B="file")
    assert merged({"A": "default", "B": "default"}, {"A": blank, "B": blank}) == {"A": "default", "B": "file"}


def test_without_the_file_there_is_nothing_in_it(settings_file: Path) -> None:
    """A newcomer has none and needs none."""
    assert local_settings(settings_file.parent) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"Values": 7}', "{}", '{"Values": ["A"]}', "\x00"])
def test_a_file_that_cannot_be_read_is_named(settings_file: Path, text: str) -> None:
    """One sentence: which file, and what it should look like."""
    settings_file.write_text(text)
    with pytest.raises(
        ConfigurationError, match=r"local\.settings\.json cannot be read .* as in local\.settings\.example"
    ):
        merged({}, {})


def embedded_for(tmp_path: Path, *, live: bool) -> dict[str, str]:
    place = Place(app_url="http://127.0.0.1:7500", cloud_url="http://127.0.0.1:7501", data=tmp_path)
    time = MarketTime(market=NOW, wall=NOW, speed=60.0)
    return embedded(place, time=time, live_from="2012-03-01T00:00:00Z", plan="premium", live=live)


def test_the_embedded_defaults_are_settings_that_need_nothing_from_anybody(tmp_path: Path) -> None:
    """They are complete, and every neighbour is the embedded cloud."""
    values = embedded_for(tmp_path, live=False)
    settings = Settings.from_env(values)
    assert settings.market_time() is not None
    names = [
        name
        for name, value in values.items()
        if name.endswith(("_URL", "_ENDPOINT")) and value and name not in ("PUBLIC_URL", "DOCUMENTS_URL")
    ]
    assert len(names) == 8
    assert all(values[name].startswith("http://127.0.0.1:7501/") for name in names)
    assert values["FINNHUB_WEBHOOK_SECRET"], "the cloud sends it, and the app wants it"
    assert set(values) - {"FUNCTIONS_WORKER_RUNTIME"} <= {name.upper() for name in Settings.model_fields}


def test_live_leaves_providers_and_clock_to_the_user(tmp_path: Path) -> None:
    """No replay, no market clock, no borrowed key: what is missing is named."""
    values = embedded_for(tmp_path, live=True)
    owned = ("ALPHA_VANTAGE", "FINNHUB", "TWELVE_DATA", "POLYGON", "MARKET_CLOCK", "LIVE_FROM")
    assert not [name for name in values if name.startswith(owned)]
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_env(values)
    assert "ALPHA_VANTAGE_KEY is not set" in str(refused.value)
    assert "FINNHUB_KEY is not set" in str(refused.value)
    assert "TWELVE_DATA" not in str(refused.value), "it is left out without a key"
    assert "POLYGON" not in str(refused.value), "so is it"
    assert Settings.from_env(values | {"ALPHA_VANTAGE_KEY": "a", "FINNHUB_KEY": "b"}).market_time() is None


def test_the_replays_clock_is_a_default_like_any_other(tmp_path: Path, settings_file: Path) -> None:
    """A clock that the user set stays, though the replay's moves on; an empty one is none."""
    supervisor = Supervisor(options(tmp_path, 7500))
    supervisor._setting = "2012-03-01T00:00:00Z@2026-11-21T09:00:00Z*60"
    assert supervisor._env()["MARKET_CLOCK"] == supervisor._setting
    write(settings_file, MARKET_CLOCK="")
    assert supervisor._env()["MARKET_CLOCK"] == supervisor._setting
    write(settings_file, MARKET_CLOCK="2012-03-02T00:00:00Z@2026-11-21T09:00:00Z*1")
    assert supervisor._env()["MARKET_CLOCK"].startswith("2012-03-02")


async def test_live_without_keys_does_not_start(
    tmp_path: Path, settings_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence with the names of the keys, before any process was started."""
    for name in ("ALPHA_VANTAGE_KEY", "FINNHUB_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert await Supervisor(options(tmp_path / "data", free_port(), live=True)).run() == 1
    said = capsys.readouterr().err
    assert "ALPHA_VANTAGE_KEY is not set; FINNHUB_KEY is not set." in said
    assert not (tmp_path / "data" / "logs").exists()


def test_the_replays_watchlist_is_one_the_app_can_read() -> None:
    """Every symbol of the replay at its interval."""
    watches = read_watchlist(watchlist([("AAPL", "1d"), ("AAPL", "1h"), ("BRK.B", "1h")]), "watchlist.toml")
    hour, day = Interval.HOUR, Interval.DAY
    assert [(w.symbol, w.interval) for w in watches] == [("AAPL", day), ("AAPL", hour), ("BRK.B", hour)]


# --- the plan: from when to when


def test_a_first_start_begins_a_year_before_the_end() -> None:
    """A year of market days is shown, behind all the history there is."""
    made = plan(wanted(), read_catalogue(wanted()), saved=None, now=NOW)
    assert made.series == [(symbol, "1d") for symbol in ("AAPL", "GOOG", "IBM", "MSFT")]
    assert made.time.market == made.live_from == parse_instant("2012-02-29T21:00:00Z")
    assert made.time.end == parse_instant("2013-03-01T22:00:00Z"), "an hour goes on behind the last close"
    assert (made.time.speed, made.time.wall, made.resumed) == (86_400.0, NOW, False)


def test_short_data_begins_a_day_before_its_end_at_the_latest(catalogue: Catalogue) -> None:
    """With less than a year, history comes first, but something is left to happen."""
    made = plan(wanted(), catalogue, saved=None, now=NOW)
    bars = catalogue["ACME", Interval.DAY].bars
    assert bars[0].closed_at < made.time.market <= bars[-1].closed_at - timedelta(days=1)


@pytest.mark.parametrize("text", ["2013-02-01", "2013-02-01T00:00:00Z", "2013-01-31T19:00:00-05:00"])
def test_from_and_to_are_instants_of_the_market(catalogue: Catalogue, text: str) -> None:
    """A date is its midnight in UTC; an instant carries its zone."""
    made = plan(wanted(first=text, last="2013-02-15"), catalogue, saved=None, now=NOW)
    assert made.time.market == made.live_from == datetime(2013, 2, 1, tzinfo=UTC)
    assert made.time.end == datetime(2013, 2, 15, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"first": "yesterday"}, r"--from 'yesterday' is no date: write 2012-03-01 or 2012-03-01T14:30:00Z"),
        ({"last": "2013-02-30"}, r"--to '2013-02-30' is no date"),
        ({"first": "2013-02-01T00:00:00"}, r"--from .* is no date"),
        ({"first": "2013-02-15", "last": "2013-02-01"}, r"nothing to replay between 2013-02-15 and 2013-02-01"),
        ({"first": "2020-01-01"}, r"nothing to replay between 2020-01-01 and 2013-03-01: change --from or --to"),
        ({"last": "2000-01-01"}, r"nothing to replay .* change --from or --to"),
        ({"speed": float("nan")}, r"--speed nan is no speed"),
    ],
)
def test_a_span_that_cannot_be_is_refused(catalogue: Catalogue, asked: dict[str, object], says: str) -> None:
    """The option is named, and how to write it."""
    with pytest.raises(ConfigurationError, match=says):
        plan(wanted(**asked), catalogue, saved=None, now=NOW)


@pytest.mark.parametrize(
    ("saved", "begins", "resumed"),
    [
        ("2013-01-15T00:00:00Z", "2013-02-01T00:00:00Z", False),
        ("2013-02-10T12:00:00Z", "2013-02-10T12:00:00Z", True),
        ("2013-02-20T12:00:00Z", "2013-02-20T12:00:00Z", True),
        ("2014-01-01T00:00:00Z", "2014-01-01T00:00:00Z", True),
    ],
)
def test_the_market_never_goes_back(catalogue: Catalogue, saved: str, begins: str, resumed: bool) -> None:
    """The next start goes on where the last one was, even past --to: there it stands still."""
    made = plan(wanted(first="2013-02-01", last="2013-02-15"), catalogue, saved=parse_instant(saved), now=NOW)
    assert (made.time.market, made.resumed) == (parse_instant(begins), resumed)
    assert made.time.end is not None
    assert made.time.end >= made.time.market
    assert made.live_from == datetime(2013, 2, 1, tzinfo=UTC), "what is live is not moved by a restart"
    assert made.time.at(NOW + timedelta(days=1000)) == made.time.end


async def test_the_newest_stored_bar_counts_where_the_clock_was_not_saved(tmp_path: Path, catalogue: Catalogue) -> None:
    """Killed before it could save the instant, a start still begins no earlier than what is stored."""
    clock = SystemClock()
    documents = SQLiteDocuments(tmp_path / "app.db", clock)
    bars = catalogue["ACME", Interval.DAY].bars
    await SeriesStore(documents, clock).create(Series(symbol="ACME", interval=Interval.DAY, live_from=NOW))
    await SeriesStore(documents, clock).create(Series(symbol="NONE", interval=Interval.DAY, live_from=NOW))
    await Bars(documents, clock).append("ACME|1d", Interval.DAY, 0, bars[:20])
    await documents.close()
    assert await newest_close(tmp_path / "app.db", clock) == bars[19].closed_at
    assert await newest_close(tmp_path / "other.db", clock) is None


# --- what is refused


def test_a_port_is_free_or_taken_or_cannot_be_had(taken: int) -> None:
    """The cloud steps over a taken port; the app says what to do about it."""
    assert not is_free("127.0.0.1", taken)
    with pytest.raises(ConfigurationError, match=rf"port {taken} is taken: stop what listens there, or .* --port"):
        check_app_port("127.0.0.1", taken)
    assert cloud_port(taken - 1) > taken
    with pytest.raises(ConfigurationError, match=r"no free port for the cloud behind 65535"):
        cloud_port(65_535)
    with pytest.raises(ConfigurationError, match=r"cannot listen on no\.such\.host\.invalid, port 80 .* --host"):
        check_app_port("no.such.host.invalid", 80)


async def test_a_taken_port_is_said_before_anything_starts(
    tmp_path: Path, taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, one sentence, no process, no log."""
    assert await Supervisor(options(tmp_path, taken)).run() == 1
    assert capsys.readouterr().err.startswith(f"troop up: port {taken} is taken")
    assert not (tmp_path / "logs").exists()


async def test_a_second_troop_up_on_the_same_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two clouds on one folder would each deliver: the second says whose folder it is."""
    first = Supervisor(options(tmp_path, free_port()))
    with first._only_one():
        assert await Supervisor(options(tmp_path, free_port())).run() == 1
    assert (
        f"another troop up is using {tmp_path}: stop it, or choose another folder with --data"
        in capsys.readouterr().err
    )


async def test_a_data_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The option and the path are named."""
    (tmp_path / "data").write_text("mine")
    assert await Supervisor(options(tmp_path / "data", free_port())).run() == 1
    assert f"--data {tmp_path / 'data'} cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"symbols": "AAPL,NOSUCH"}, "NOSUCH"),
        ({"symbols": "$$$"}, "'$$$' is no symbol"),
        ({"symbols": ","}, "no symbol was asked for"),
        ({"symbols": "MSFT", "interval": "1h"}, "MSFT"),
        ({"folder": Path("no/such/folder")}, "no/such/folder is no folder"),
    ],
)
async def test_a_replay_that_cannot_be_is_refused(
    tmp_path: Path, asked: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The symbol or the folder is named in one sentence."""
    assert await Supervisor(options(tmp_path, free_port(), replay=wanted(**asked))).run() == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("troop up: ")
    assert says in line


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("2013-01-02T00:00:00Z,10,9,8,11,1000", "open and close must lie between"),
        ("2013-01-02T00:00:00Z,ten,12,9,11,1000", "ACME_1d.csv, line 2"),
        ("not a time,10,12,9,11,1000", "ACME_1d.csv, line 2"),
        ("2013-01-02T00:00:00Z,10,12,9,11", "ACME_1d.csv, line 2"),
    ],
)
async def test_a_broken_csv_folder_is_refused(
    tmp_path: Path, row: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file, the line and the trouble are named; nothing is started on half of the data."""
    made = tmp_path / "csv"
    made.mkdir()
    (made / "ACME_1d.csv").write_text(f"{HEADER}\n{row}\n")
    assert await Supervisor(options(tmp_path, free_port(), replay=wanted(folder=made))).run() == 1
    said = capsys.readouterr().err
    assert "ACME_1d.csv, line 2" in said
    assert says in said


@pytest.mark.parametrize("name", ["app.db", "cloud.db"])
@pytest.mark.parametrize("damage", ["text", "cut", "newer"])
async def test_damaged_data_is_said_and_left_as_it_is(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and the file's name; nothing of what is stored is thrown away."""
    spoil(tmp_path / name, damage)
    before = kept_of(tmp_path / name, damage)
    assert await Supervisor(options(tmp_path, free_port())).run() == 1
    said = capsys.readouterr().err
    assert said.startswith("troop up: ")
    assert str(tmp_path / name) in said
    assert "Traceback" not in said
    assert kept_of(tmp_path / name, damage) == before


def kept_of(path: Path, damage: str) -> object:
    """What is in it: the rows where they can be read, else the bytes."""
    if damage != "newer":
        return path.read_bytes()
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT * FROM documents").fetchall(), db.execute("PRAGMA user_version").fetchall()


def spoil(path: Path, damage: str) -> None:
    """Make a database that cannot be used."""
    if damage == "text":
        path.write_text("this is no database, " * 400)
        return
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE documents (container TEXT, body TEXT)")
        db.executemany("INSERT INTO documents VALUES (?, ?)", [("bars", "x" * 3000)] * 20)
        db.execute("PRAGMA user_version=99")
        db.commit()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])


def test_the_command_itself_ends_with_one_sentence(tmp_path: Path) -> None:
    """A damaged file makes `troop up` exit with 1 and a single line that names it."""
    (tmp_path / "app.db").write_text("this is no database, " * 400)
    command = [sys.executable, "-m", "infra.cli", "up", "--port", str(free_port()), "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"troop up: {tmp_path / 'app.db'}")


def free_port() -> int:
    """A port nobody listens on, with room for the cloud behind it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1], 65_000)


# --- a stop, and the next start


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_ctrl_c_stops_cleanly_and_the_next_start_continues(tmp_path: Path) -> None:
    """Exit code 0 within seconds, no process left; then the market goes on, and no bar is stored twice."""
    asked = ("--symbols", "AAPL", "--from", "2012-06-01", "--speed", "400000")
    with troop_up(tmp_path, *asked) as run:
        run.until("bars", lambda: any(w["evaluated_through"] for w in run.get("/api/watchlist")["items"]))
        children = [pid for pids in run.children().values() for pid in pids]
        stopped_at = parse_instant(run.ask_cloud("/clock")["now"])
        held = run.get("/api/series/AAPL")
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(10) == 0
    assert len(children) == 2
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert "stopped; the next start continues from here" in (tmp_path / "up.log").read_text()

    with troop_up(tmp_path, *asked) as run:
        assert parse_instant(run.ask_cloud("/clock")["now"]) >= stopped_at
        run.until("the next bar", lambda: run.get("/api/series/AAPL")["bar_count"] > held["bar_count"])
        assert run.get("/api/series/AAPL")["live_from"] == held["live_from"]
        closes = [bar["closed_at"] for bar in run.everything("/api/bars/AAPL")]
        assert closes == sorted(set(closes), reverse=True)
    assert f"continuing at {stopped_at:%Y}" in (tmp_path / "up.log").read_text()
