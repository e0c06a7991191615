"""
What the library adds to storage, and how many calls many identical requests make.

``coalesced_calls``: calls a provider hears for 1,000 identical requests at once, the worse of all in one process and
of all spread over processes on one file. ``cached_vs_store``: a warm read of a series through the library against the
two store reads it needs (the series and its bars), the worst of days, minutes and a whole history; what is compared
takes turns.
"""

import asyncio
import multiprocessing
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from time import perf_counter

from bench._report import BenchError, report, say
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import StoppedClock, SystemClock
from shared.events import Event
from shared.market.callers import Caller, Callers
from shared.market.entitlements import Entitlements
from shared.market.fetcher import Fetcher
from shared.market.flights import Flights
from shared.market.gaps import expected
from shared.market.health import Health
from shared.market.library import Library
from shared.market.models import Adjustment, Bar, Columns, Fetched, Interval, Quote, instant_of
from shared.market.ports import Turn
from shared.market.sessions import calendar
from shared.market.stores import Bars, Quotes, Series, SeriesStore
from shared.market.throttle import Throttle

SYMBOL, NAME = "AAPL", "alpha_vantage"
NOW = datetime(2012, 12, 31, 22, tzinfo=UTC)
BEGIN = datetime(2003, 1, 1, tzinfo=UTC)
REQUESTS = 1000
PROCESSES = 4
LATENCY = 0.3
"""Seconds a call takes, as a provider's does."""


def bars_of(interval: Interval, *, since: datetime, until: datetime) -> list[Bar]:
    """Bars to the session table, of prices that go up."""
    found = []
    for n, minute in enumerate(expected(calendar(), interval, since=since, until=until)):
        price, closed_at = 100 + n / 100, instant_of(minute)
        opened_at = closed_at - (timedelta(hours=3) if interval is Interval.DAY else interval.span)
        found.append(
            Bar(
                opened_at=opened_at,
                closed_at=closed_at,
                open=price,
                high=price + 1,
                low=price - 1,
                close=price,
                volume=1e6,
            )
        )
    return found


class _Told:
    async def publish(self, events: Sequence[Event]) -> None:
        raise BenchError("nobody watches the series of this benchmark")

    async def close(self) -> None:
        return


@dataclass(slots=True)
class _Seller:
    """A provider of one year of days; every call takes a while and is counted, whichever process makes it."""

    bars_sold: Sequence[Bar]
    calls_made: "Synchronized[int]"
    name: str = NAME

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        return 1

    async def bars(
        self,
        symbol: str,
        interval: Interval,
        *,
        since: datetime | None,
        now: datetime,
        turn: Turn,
        until: datetime | None = None,
    ) -> Fetched:
        async with turn("TIME_SERIES_DAILY"):
            with self.calls_made.get_lock():
                self.calls_made.value += 1
            await asyncio.sleep(LATENCY)
        return Fetched(
            symbol=symbol, interval=interval, provider=self.name, adjustment=Adjustment.RAW, bars=self.bars_sold
        )

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        raise BenchError("no quote is asked for")


def library_on(documents: SQLiteDocuments, sold: Sequence[Bar], calls: "Synchronized[int]") -> Library:
    """The real library and fetcher on a file, with a provider that counts."""
    wall, market = SystemClock(), StoppedClock(NOW)
    seller, key = _Seller(sold, calls), {NAME: "bench"}
    return Library(
        documents=documents,
        series=SeriesStore(documents, wall),
        bars_held=Bars(documents, wall),
        quotes=Quotes(documents, wall),
        fetcher=Fetcher(
            providers=[seller],
            throttles={NAME: Throttle(documents, wall, NAME, ())},
            health=Health(documents, wall, key),
            entitlements=Entitlements(documents, wall, key),
            wall=wall,
            market=market,
        ),
        flights=Flights(documents=documents, wall=wall),
        callers=Callers(documents=documents, wall=wall, allowed=REQUESTS),
        publisher=_Told(),
        wall=wall,
        market=market,
        delay=timedelta(),
    )


# --- one call for many


async def _ask(path: Path, count: int, calls: "Synchronized[int]", ready: Callable[[], object]) -> None:
    documents = SQLiteDocuments(path, SystemClock())
    sold = bars_of(Interval.DAY, since=NOW - timedelta(days=365), until=NOW)
    library = library_on(documents, sold, calls)
    ready()
    since = sold[0].closed_at - timedelta(minutes=1)
    answers = await asyncio.gather(
        *(library.bars(SYMBOL, Interval.DAY, since=since, caller=Caller(id="bench")) for _ in range(count))
    )
    await documents.close()
    if {len(answer.columns) for answer in answers} != {len(sold)}:
        raise BenchError("an answer did not have all bars")


def _child(path: Path, count: int, calls: "Synchronized[int]", start: Barrier) -> None:
    asyncio.run(_ask(path, count, calls, start.wait))


def coalesced(processes: int) -> int:
    """How many calls 1,000 identical requests make, spread over *processes* that begin together."""
    spawn = multiprocessing.get_context("spawn")
    calls, start = spawn.Value("i", 0), spawn.Barrier(processes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "app.db")
        children = [
            spawn.Process(target=_child, args=(path, REQUESTS // processes, calls, start)) for _ in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            if child.is_alive():
                child.kill()
                child.join()
        if any(child.exitcode for child in children):
            raise BenchError("a process did not end well")
    return int(calls.value)


# --- a warm read


async def _timed(turns: dict[str, Callable[[], Awaitable[Columns]]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, read in turns.items():
            begin = perf_counter()
            await read()
            seconds[name].append(perf_counter() - begin)
    return {name: median(values) for name, values in seconds.items()}


async def cached(rounds: int) -> dict[str, float]:
    """Reads through the library over bare store reads, by what is read."""
    calls = multiprocessing.get_context("spawn").Value("i", 0)
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        documents = SQLiteDocuments(Path(folder, "app.db"), SystemClock())
        for name, interval, begin, count in (
            ("250 of 10 years of days", Interval.DAY, BEGIN, 250),
            ("a session of 10 of minutes", Interval.MINUTE, NOW - timedelta(days=14), 390),
            ("10 years of days", Interval.DAY, BEGIN, 0),
        ):
            ratios[name] = await _cached(documents, calls, f"S{len(ratios)}", interval, begin, count, rounds)
        await documents.close()
    if calls.value:
        raise BenchError("a warm read made a call")
    return ratios


async def _cached(
    documents: SQLiteDocuments,
    calls: "Synchronized[int]",
    symbol: str,
    interval: Interval,
    begin: datetime,
    count: int,
    rounds: int,
) -> float:
    wall, bars = SystemClock(), bars_of(interval, since=begin, until=NOW)
    library = library_on(documents, (), calls)
    made = await library.series.create(
        Series(symbol=symbol, interval=interval, live_from=NOW, provider=NAME, adjustment=Adjustment.RAW)
    )
    await library.bars_held.append(made.key, interval, 0, bars)
    series, held = SeriesStore(documents, wall), Bars(documents, wall)
    since = bars[-count - 1].closed_at if count else None

    async def through_library() -> Columns:
        answer = await library.bars(symbol, interval, since=since, caller=Caller(id="bench"))
        return answer.columns

    async def from_store() -> Columns:
        known = await series.get(symbol, interval)
        return await held.window(known.key, known.revision, since=since, lookback=0, through=NOW)

    if await through_library() != await from_store() or len(await from_store()) != (count or len(bars)):
        raise BenchError("library and store do not say the same")
    seconds = await _timed({"library": through_library, "store": from_store}, rounds)
    return seconds["library"] / seconds["store"]


async def figures(rounds: int = 300) -> dict[str, float]:
    """Both figures."""
    made = {n: await asyncio.to_thread(coalesced, n) for n in (1, PROCESSES)}
    for processes, calls in made.items():
        say(f"{REQUESTS} identical requests in {processes} process(es): {calls} call(s)")
    ratios = await cached(rounds)
    for name, ratio in ratios.items():
        say(f"warm read of {name}: {ratio:.2f} times the store's reads")
    return {"coalesced_calls": max(made.values()), "cached_vs_store": round(max(ratios.values()), 3)}


if __name__ == "__main__":
    report("library", asyncio.run(figures()))
