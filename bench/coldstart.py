"""
How long the first event waits for a new process, and how long indexing takes.

``first_event_vs_bare``: a new process indexes the app and answers its first ``signals_on_bars_ingested`` (in
SQLite lie as many bars as the strategies look back, the last of them raises a signal, which is published to a
local topic), against bench/bare_app: the same libraries and the same calls with nothing in between.
``index_vs_sdks``: a new process indexes the app, against one that imports the SDKs the app is built on.
What is compared takes turns, and each figure is the median of the ratios of neighbours, so that a machine that
is busy for a while slows both. All byte code was written before.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from time import perf_counter

from bench._report import BenchError, report, say
from infra.local.replay.samples import load_packaged
from infra.local.up.settings import Place, embedded
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import MarketTime, SystemClock
from shared.market.events import BarsIngested
from shared.market.models import Adjustment, Bar, Columns, Interval
from shared.market.stores import Bars, Series, SeriesStore
from shared.settings import ROOT
from signals.adapters.entries_file import read_entries
from signals.logic.arrays import Tape
from signals.logic.evaluation import Watcher
from signals.models import Opinion

BARE = ROOT / "bench/bare_app"
SYMBOL = "AAPL"
SDKS = """
import azure.eventgrid.aio, azure.functions, azure_functions_runtime, aiohttp, httpx
import opentelemetry.trace
from pydantic import BaseModel
print("done", flush=True)
"""
"""The SDKs of a first event and its delivery. Left out are those that no local start loads: azure-identity and
azure-monitor-opentelemetry would only make our figure look better."""
TIMEOUT = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Everything a cold start needs, in one folder."""

    folder: Path
    env: Mapping[str, str]
    closed_at: datetime

    @property
    def event(self) -> Path:
        return self.folder / "event.json"

    @property
    def stored(self) -> Path:
        return self.folder / "stored.db"

    def first(self, app: Path) -> float:
        """Milliseconds from the start of a process to its first event answered."""
        database = self.folder / "app.db"
        for name in ("app.db", "app.db-wal", "app.db-shm"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.copy(self.stored, database)
        took = self._time(["-m", "bench._child", "first", str(app), str(self.event)])
        _check(database, app, self.closed_at)
        return took

    def index(self) -> float:
        """Milliseconds from the start of a process to the app being indexed."""
        return self._time(["-m", "bench._child", "index", str(ROOT)])

    def sdks(self) -> float:
        """Milliseconds from the start of a process to the SDKs being imported."""
        return self._time(["-c", SDKS])

    def libraries(self, app: Path) -> set[str]:
        """What a first event loads that is neither Python's nor ours."""
        shutil.copy(self.stored, self.folder / "app.db")
        with self._child(["-m", "bench._child", "libraries", str(app), str(self.event)]) as child:
            return set(_line(child).split())

    def _time(self, arguments: Sequence[str]) -> float:
        began = perf_counter()
        with self._child(arguments) as child:
            said = _line(child)
            took = perf_counter() - began
        if said != "done" or child.returncode:
            raise BenchError(f"{' '.join(arguments[:3])} failed: {(self.folder / 'words').read_text()}")
        return 1000 * took

    @contextlib.contextmanager
    def _child(self, arguments: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
        with (
            (self.folder / "words").open("w") as words,
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=dict(self.env),
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
            ) as child,
        ):
            try:
                yield child
                child.wait(TIMEOUT)
            finally:
                child.kill()


def _line(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None, "it was started with a pipe"
    return child.stdout.readline().strip()


def _check(database: Path, app: Path, closed_at: datetime) -> None:
    """Both sides must have done the work: one signal kept and told of, the series moved on."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        counted = "SELECT count(*), count(due_at) FROM documents WHERE container='signals' AND id NOT LIKE '%|%'"
        kept = db.execute(counted).fetchone()
        [through] = db.execute("SELECT body ->> 'evaluated_through' FROM documents WHERE container='series'").fetchone()
    if kept != (1, 0) or datetime.fromisoformat(through) != closed_at:
        raise BenchError(f"{app.name} kept {kept[0]} signals, owes {kept[1]} events and evaluated through {through}")


@contextlib.contextmanager
def _topic(folder: Path) -> Iterator[str]:
    """The embedded cloud's topic, without subscribers: it only takes."""
    folder.mkdir()
    nobody = folder / "subscriptions.toml"
    nobody.touch()
    arguments = ["-m", "infra.local.cloud", "--port", "0", "--data", str(folder), "--app-url", "http://127.0.0.1:9"]
    arguments += ["--no-market", "--subscriptions", str(nobody)]
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True) as cloud:
        try:
            said = _line(cloud)
            if not said.startswith("cloud ready "):
                raise BenchError(f"the cloud did not start: {said}")
            yield said.removeprefix("cloud ready ")
        finally:
            cloud.terminate()
            cloud.wait(TIMEOUT)


def _history() -> list[Bar]:
    """Recorded bars of which the last makes exactly one entry speak."""
    bars = list(load_packaged([SYMBOL], Interval.DAY)[SYMBOL, Interval.DAY].bars)
    entries = [e for e in read_entries(ROOT / "signals/entries.toml") if e.watches(SYMBOL, Interval.DAY)]
    watchers, tape = [Watcher.of(entry) for entry in entries], Tape.of(Columns.of(bars))
    lookback = max(entry.lookback for entry in entries)
    for last in range(len(bars) - 1, lookback, -1):
        if sum(isinstance(watcher.decide(tape, last), Opinion) for watcher in watchers) == 1:
            return bars[last + 1 - lookback : last + 1]
    raise BenchError(f"no recorded bar of {SYMBOL} makes exactly one entry speak")


async def _store(bars: Sequence[Bar], path: Path) -> None:
    """A series that has seen all of its bars but the last."""
    documents = SQLiteDocuments(path, wall := SystemClock())
    seen, last = bars[-2].closed_at, bars[-1].closed_at
    series = Series(
        symbol=SYMBOL,
        interval=Interval.DAY,
        live_from=seen,
        evaluated_through=seen,
        provider="alpha_vantage",
        adjustment=Adjustment.RAW,
        due_at=last,
    )
    await SeriesStore(documents, wall).create(series)
    await Bars(documents, wall).append(series.key, Interval.DAY, 0, bars)
    await documents.close()


def _event(bars: Sequence[Bar]) -> str:
    last = bars[-1].closed_at
    event = BarsIngested(
        occurred_at=last,
        recorded_at=SystemClock().now(),
        symbol=SYMBOL,
        interval=Interval.DAY,
        revision=0,
        first_closed_at=last,
        last_closed_at=last,
        count=1,
    )
    return json.dumps(event.to_wire())


def _environment(folder: Path, cloud_url: str, bars: Sequence[Bar]) -> dict[str, str]:
    place = Place(app_url="http://127.0.0.1:7071", cloud_url=cloud_url, data=folder)
    time = MarketTime(market=bars[-1].closed_at, wall=SystemClock().now(), speed=0)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    # Nothing else of the shell: byte code is written even where it says otherwise.
    return {
        **kept,
        **embedded(place, time=time, live_from="", plan="premium", live=False),
        "BENCH_LOOKBACK": str(len(bars)),
    }


def measure(runs: int) -> dict[str, float]:
    """Run everything *runs* times, in turns; the figures."""
    with tempfile.TemporaryDirectory(prefix="troop-coldstart-") as name:
        folder = Path(name)
        bars = _history()
        asyncio.run(_store(bars, folder / "stored.db"))
        (folder / "event.json").write_text(_event(bars))
        with _topic(folder / "cloud") as url:
            bench = Bench(folder=folder, env=_environment(folder, url, bars), closed_at=bars[-1].closed_at)
            return _in_turns(bench, runs)


def _in_turns(bench: Bench, runs: int) -> dict[str, float]:
    say("warming up: byte code is written, and both sides must load the same libraries")
    ours, bare = bench.libraries(ROOT), bench.libraries(BARE)
    if ours != bare:
        raise BenchError(f"only the app loads {sorted(ours - bare)}, only the bare function {sorted(bare - ours)}")
    bench.sdks()
    taken: dict[str, list[float]] = {"first_event": [], "bare": [], "index": [], "sdks": []}
    for number in range(1, runs + 1):
        taken["first_event"].append(bench.first(ROOT))
        taken["bare"].append(bench.first(BARE))
        taken["index"].append(bench.index())
        taken["sdks"].append(bench.sdks())
        say(f"{number}/{runs}  " + "  ".join(f"{name} {values[-1]:.0f} ms" for name, values in taken.items()))
    return {
        "first_event_vs_bare": round(_ratio(taken["first_event"], taken["bare"]), 3),
        "index_vs_sdks": round(_ratio(taken["index"], taken["sdks"]), 3),
        **{f"{name}_ms": round(median(values), 1) for name, values in taken.items()},
        "runs": runs,
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser("bench.coldstart", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--runs", type=int, default=15, help="how often each process is started (15)")
    options = parser.parse_args(arguments)
    try:
        report("coldstart", measure(options.runs))
    except BenchError as e:
        say(f"bench.coldstart: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
