"""
A process may die, and an answer may be lost, at every single call of the ingest and of the webhook.

No bar, revision, change of provider or report is lost or doubled by it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest
from pydantic import SecretStr

from shared.clock import StoppedClock
from shared.errors import NotEntitledError, TroopError
from shared.market.actions import Actions, Provenance
from shared.market.earnings import AFTER_OPEN, Earnings
from shared.market.events import BarsIngested, EarningsReported
from shared.market.hooks import SWEEP_AFTER, FinnhubHook
from shared.market.ingest import Ingest, Watch
from shared.market.models import (
    Adjustment,
    Bar,
    CorporateAction,
    EarningsDate,
    Interval,
    Quote,
    ReportTime,
)
from shared.market.sessions import calendar
from shared.market.stores import Bars, Quotes, Series, SeriesStore
from tests.builders import CLOSE, WALL, RecordedProvider, daily_bars, fetcher_of
from tests.standins import Fuse, Killed, Storage, Topic, fused

BARS = daily_bars(20)
CLOSES = [bar.closed_at for bar in BARS]
HALVED = [replace(b, open=b.open / 2, high=b.high / 2, low=b.low / 2, close=b.close / 2) for b in BARS]
CORRECTED = [replace(b, close=b.close + 0.5) if i == 9 else b for i, b in enumerate(BARS)]
DELAY = timedelta(minutes=15)
SESSION = calendar().session(CLOSES[10].date())
QUOTE = Quote(symbol="AAPL", price=101.0, previous_close=100.0, as_of=CLOSES[9], provider="alpha_vantage")
SECRET = "the-secret"
ROW = f'{{"symbol": "AAPL", "date": "{SESSION.date}", "eps_actual": 1.5}}' if SESSION else ""
BODY = f'{{"event": "earnings", "data": [{ROW}]}}'.encode()


class Seller(RecordedProvider):
    """Sells splits and the earnings calendar as well."""

    splits: list[CorporateAction]
    reports: list[EarningsDate]

    async def actions(self, symbol, *, turn):
        async with turn("actions"):
            return self.splits

    async def earnings(self, *, first, last, turn, symbol=None):
        async with turn("earnings"):
            return [r for r in self.reports if first <= r.day <= last]


def a_seller(name="alpha_vantage", bars=BARS, *, adjustment=Adjustment.RAW):
    seller = Seller(name, bars={"AAPL": bars}, quotes={"AAPL": QUOTE}, adjustment=adjustment)
    seller.splits, seller.reports = [], []
    return seller


class Room:
    """One storage and one topic; a process on them lives as long as its fuse."""

    def __init__(self, folder: Path, *, adjustment: Adjustment = Adjustment.RAW) -> None:
        self.file = folder / "watchlist.toml"
        self.file.touch()
        self.storage, self.topic = Storage(), Topic()
        self.wall, self.market = StoppedClock(WALL), StoppedClock(CLOSES[9] + DELAY)
        self.sellers = [a_seller(adjustment=adjustment)]
        self.health = Storage()  # that the fetcher survives is tested elsewhere
        self.heard = 0

    def process(self, fuse: Fuse | None = None) -> tuple[Ingest, FinnhubHook]:
        fuse = fuse or Fuse()
        store, topic = fused(self.storage, fuse), fused(self.topic, fuse)
        fetcher = fetcher_of(self.health, self.wall, self.market, *(fused(s, fuse) for s in self.sellers))
        fetcher.sleep = _at_once
        ingest = Ingest(
            documents=store,
            series=SeriesStore(store, self.wall),
            bars=Bars(store, self.wall),
            quotes=Quotes(store, self.wall),
            fetcher=fetcher,
            publisher=topic,
            wall=self.wall,
            market=self.market,
            delay=DELAY,
            live_from=CLOSE,
            watchlist_file=self.file,
            actions=Actions(store, self.wall),
            provenance=Provenance(store, self.wall),
            earnings=Earnings(store, self.wall),
        )
        return ingest, FinnhubHook(store, topic, self.wall, self.market, SecretStr(SECRET))

    async def hear(self) -> None:
        """What is told reaches its listeners; those of the signals domain write down how far they have seen."""
        while self.heard < len(self.topic.told):
            event = self.topic.told[self.heard]
            self.heard += 1
            ingest, _ = self.process()
            match event:
                case BarsIngested():
                    series = await ingest.series.get("AAPL", Interval.DAY)
                    if series.evaluated_through is None or series.evaluated_through < event.last_closed_at:
                        await ingest.series.save(replace(series, evaluated_through=event.last_closed_at))
                case EarningsReported():
                    await ingest.reported(event)

    async def settle(self) -> None:
        """Other processes go on for a while, with every timer; no bar closes meanwhile."""
        for _ in range(5):
            ingest, hook = self.process()
            await ingest.ingest()
            await ingest.refresh_quotes()
            await hook.sweep()
            await self.hear()
            self.wall.at += SWEEP_AFTER
            self.market.at += DELAY

    async def series(self) -> Series:
        return await self.process()[0].series.get("AAPL", Interval.DAY)

    async def stored(self) -> list[Bar]:
        series = await self.series()
        columns = await self.process()[0].bars.window(series.key, series.revision, since=None, lookback=0)
        return [columns.bar(i) for i in range(len(columns))]

    async def check(self, bars: list[Bar], *, provider: str = "alpha_vantage") -> Series:
        """Each bar is there once and told; nothing is in trouble or waits; and doing it all again changes nothing."""
        series = await self.series()
        assert await self.stored() == bars
        assert (series.provider, series.trouble) == (provider, None)
        assert series.evaluated_through == bars[-1].closed_at
        assert series.due_at
        assert series.due_at > self.market.at
        told = [e for e in self.topic.told if isinstance(e, BarsIngested)]
        assert max(e.last_closed_at for e in told) == bars[-1].closed_at
        before, known = [await self.storage.feed(c) for c in ("series", "bars")], len(told)
        await self.settle()
        assert [await self.storage.feed(c) for c in ("series", "bars")] == before
        assert len([e for e in self.topic.told if isinstance(e, BarsIngested)]) == known
        return series


async def _at_once(_: float) -> None:
    return


@contextmanager
def dying():
    """What a host sees of a process that died or failed."""
    try:
        yield
    except (Killed, TroopError):
        return


type Prepare = Callable[[Room], Awaitable[None]]
type Work = Callable[[Ingest, FinnhubHook], Awaitable[object]]


async def at_every_call(
    folder: Path, prepare: Prepare, work: Work, mode: str, *, adjustment: Adjustment = Adjustment.RAW
) -> AsyncIterator[Room]:
    """A room for each call that *work* makes, in which that call went wrong."""
    for at in count(1):
        room, fuse = Room(folder, adjustment=adjustment), Fuse(at, mode)
        await prepare(room)
        with dying():
            await work(*room.process(fuse))
        if fuse.calls < at:
            assert at > 3, "there was nothing to go wrong"
            return
        yield room


async def watched(room: Room) -> None:
    ingest, _ = room.process()
    await ingest.watch(Watch(symbol="AAPL", interval=Interval.DAY), by="api", live_from=CLOSE)


async def held(room: Room) -> None:
    """Ten bars are stored and evaluated, and the next has closed."""
    await watched(room)
    await room.settle()
    room.market.at = CLOSES[10] + DELAY


async def corrected(room: Room) -> None:
    await held(room)
    room.sellers[0].history["AAPL"] = CORRECTED


async def halved(room: Room) -> None:
    await held(room)
    room.sellers[0].history["AAPL"] = HALVED
    room.sellers[0].splits = [
        CorporateAction(symbol="AAPL", day=CLOSES[10].date(), split=2.0, dividend=0.0, provider="alpha_vantage")
    ]


async def refused(room: Room) -> None:
    await held(room)
    room.sellers[0].failing_with = NotEntitledError("a premium endpoint")
    room.sellers.append(a_seller("polygon"))


async def ingest(one: Ingest, _: FinnhubHook) -> object:
    return await one.ingest()


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_first_history(tmp_path, mode):
    """However often it is begun, it is stored once."""
    async for room in at_every_call(tmp_path, watched, ingest, mode):
        await room.settle()
        assert (await room.check(BARS[:10])).revision == 0


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_next_bar(tmp_path, mode):
    """It is stored and told whatever happens in between."""
    async for room in at_every_call(tmp_path, held, ingest, mode):
        await room.settle()
        assert (await room.check(BARS[:11])).revision == 0


@pytest.mark.parametrize("mode", Fuse.MODES)
@pytest.mark.parametrize(
    ("prepare", "adjustment", "expected"),
    [(corrected, Adjustment.RAW, CORRECTED), (halved, Adjustment.SPLIT, HALVED)],
    ids=["correction", "split"],
)
async def test_revision(tmp_path, mode, prepare, adjustment, expected):
    """A history is the old one or the new one, never a mixture; what was recorded of it is what happened."""
    async for room in at_every_call(tmp_path, prepare, ingest, mode, adjustment=adjustment):
        assert await room.stored() in (BARS[:10], expected[:11])
        await room.settle()
        series = await room.check(expected[:11])
        changes = await room.process()[0].provenance.of(series)
        assert [c.revision for c in changes] == [series.revision]
        if expected is HALVED:
            assert await room.process()[0].actions.get("AAPL") == room.sellers[0].splits


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_change_of_provider(tmp_path, mode):
    """The series moves once, and from whom its bars are is written down once."""
    async for room in at_every_call(tmp_path, refused, ingest, mode):
        assert await room.stored() in (BARS[:10], BARS[:11])
        await room.settle()
        series = await room.check(BARS[:11], provider="polygon")
        [change] = await room.process()[0].provenance.of(series)
        assert (change.former, change.provider, change.through) == ("alpha_vantage", "polygon", CLOSES[9])
        assert series.revision == 0


# --- reports


async def opened(room: Room) -> None:
    """The market is open on the day of a report before the open, of which nobody knows yet."""
    await held(room)
    room.market.at = SESSION.opens_at
    room.sellers[0].reports = [
        EarningsDate(
            symbol="AAPL",
            day=SESSION.date,
            time=ReportTime.BEFORE_OPEN,
            eps_estimate=1.5,
            eps_actual=None,
            revenue_estimate=None,
            revenue_actual=None,
            provider="alpha_vantage",
        )
    ]


async def due(room: Room) -> None:
    """The slot of a report is due, and the provider has corrected a bar."""
    await opened(room)
    await room.process()[0].refresh_quotes()
    room.market.at += AFTER_OPEN
    room.sellers[0].history["AAPL"] = CORRECTED


async def refresh(one: Ingest, _: FinnhubHook) -> object:
    return await one.refresh_quotes()


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_planning_the_reports_of_a_day(tmp_path, mode):
    """The slot is there and served once, and the quote is refreshed as ever."""
    async for room in at_every_call(tmp_path, opened, refresh, mode):
        room.market.at = SESSION.opens_at + AFTER_OPEN
        room.wall.at += timedelta(minutes=2)
        await room.settle()
        diary = await room.process()[0].earnings.get("AAPL")
        assert [(s.at, s.is_done) for s in diary.slots] == [(SESSION.opens_at + AFTER_OPEN, True)]
        wanted = await room.process()[0].quotes.get("AAPL")
        assert wanted.quote == QUOTE
        assert wanted.due_at > room.market.at - DELAY


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_looking_at_a_series_for_a_report(tmp_path, mode):
    """The correction is found, and the slot is done in the end."""
    async for room in at_every_call(tmp_path, due, refresh, mode):
        await room.settle()
        assert await room.stored() == CORRECTED[:10]
        diary = await room.process()[0].earnings.get("AAPL")
        assert [s.is_done for s in diary.slots] == [True]


# --- the webhook


async def followed(room: Room) -> None:
    await held(room)
    room.market.at = SESSION.opens_at + timedelta(hours=1)
    await room.settle()


async def unheard(room: Room) -> None:
    """A report was taken while the topic was down."""
    await followed(room)
    room.topic.trouble = [TroopError("down")]
    await room.process()[1].receive(SECRET, BODY)
    room.wall.at += SWEEP_AFTER


def a_report(room: Room) -> list[EarningsReported]:
    return [e for e in room.topic.told if isinstance(e, EarningsReported)]


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_taking_a_report(tmp_path, mode):
    """Acknowledged or sent again: it is stored once, told under one id, and looked for."""
    async for room in at_every_call(tmp_path, followed, lambda _, hook: hook.receive(SECRET, BODY), mode):
        await room.process()[1].receive(SECRET, BODY)
        await room.settle()
        [document] = await room.storage.page("system", "hooks/finnhub")
        assert document.due_at is None
        assert len({event.event_id for event in a_report(room)}) == 1
        diary = await room.process()[0].earnings.get("AAPL")
        assert [s.is_done for s in diary.slots] == [True]


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_acknowledged_report_is_told_without_being_sent_again(tmp_path, mode):
    """What was answered with 2xx is owed by nobody but us, whatever becomes of the sweep."""
    async for room in at_every_call(tmp_path, unheard, lambda _, hook: hook.sweep(), mode):
        await room.settle()
        assert len({event.event_id for event in a_report(room)}) == 1
        [document] = await room.storage.page("system", "hooks/finnhub")
        assert document.due_at is None


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_making_the_slot_of_a_report_due(tmp_path, mode):
    """An event that was not acknowledged comes again: the slot is served once."""
    event = EarningsReported(
        occurred_at=SESSION.opens_at + timedelta(hours=1),
        recorded_at=WALL,
        symbol="AAPL",
        day=SESSION.date,
        eps_estimate=None,
        eps_actual=1.5,
        revenue_estimate=None,
        revenue_actual=None,
        provider="finnhub",
    )
    async for room in at_every_call(tmp_path, followed, lambda ingest, _: ingest.reported(event), mode):
        calls = len(room.sellers[0].asked)
        await room.process()[0].reported(event)
        await room.settle()
        await room.process()[0].reported(event)
        await room.settle()
        assert len(room.sellers[0].asked) == calls + 1
        diary = await room.process()[0].earnings.get("AAPL")
        assert [s.is_done for s in diary.slots] == [True]
