from datetime import UTC, date, datetime, timedelta

import pytest

from shared.clock import StoppedClock
from shared.market.earnings import (
    AFTER_CLOSE,
    AFTER_OPEN,
    AGAIN,
    Diary,
    Earnings,
    Slot,
    planned,
    slots_of,
    told,
)
from shared.market.events import EarningsReported
from shared.market.models import EarningsDate, ReportTime
from shared.market.sessions import calendar
from tests.builders import WALL, documents

DAY = date(2012, 11, 20)
SESSION = calendar().session(DAY)
OPEN, CLOSE = SESSION.opens_at + AFTER_OPEN, SESSION.closes_at + AFTER_CLOSE
BMO, AMC, DURING, UNKNOWN = (
    ReportTime.BEFORE_OPEN,
    ReportTime.AFTER_CLOSE,
    ReportTime.DURING,
    ReportTime.UNKNOWN,
)
MINUTE = timedelta(minutes=1)


def a_report(time=AMC, *, day=DAY, symbol="AAPL"):
    return EarningsDate(
        symbol=symbol,
        day=day,
        time=time,
        eps_estimate=1.5,
        eps_actual=None,
        revenue_estimate=None,
        revenue_actual=2e9,
        provider="finnhub",
    )


def out(at=CLOSE - MINUTE, *, day=DAY, eps=1.6):
    return EarningsReported(
        occurred_at=at,
        recorded_at=WALL,
        symbol="AAPL",
        day=day,
        eps_estimate=1.5,
        eps_actual=eps,
        revenue_estimate=None,
        revenue_actual=None,
        provider="finnhub",
    )


class TestSlots:
    @pytest.mark.parametrize(
        ("time", "expected"),
        [(BMO, [OPEN]), (AMC, [CLOSE]), (DURING, [CLOSE]), (UNKNOWN, [OPEN, CLOSE])],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_report_is_looked_for_when_its_news_is_in_the_price(self, time, expected):
        """Shortly after the open or the close; where nobody knows when, after both."""
        assert slots_of(DAY, time) == expected

    def test_half_day_closes_early(self):
        """The day after Thanksgiving ends at one in the afternoon of New York."""
        assert slots_of(date(2012, 11, 23), AMC) == [datetime(2012, 11, 23, 18, tzinfo=UTC) + AFTER_CLOSE]

    @pytest.mark.parametrize("day", [date(2012, 11, 22), date(2012, 11, 24), date(2012, 12, 25)])
    @pytest.mark.parametrize("time", ReportTime)
    def test_report_on_a_day_without_trade_moves_the_next_open(self, day, time):
        """Thanksgiving, a Saturday, Christmas."""
        following = next(s for s in calendar().sessions(day, day + timedelta(days=7)))
        assert slots_of(day, time) == [following.opens_at + AFTER_OPEN]

    @pytest.mark.parametrize("day", [date(2012, 3, 9), date(2012, 3, 12), date(2012, 11, 2), date(2012, 11, 5)])
    def test_slots_follow_the_clock_of_the_exchange(self, day):
        """Half past nine in New York, whatever that is in UTC."""
        [at] = slots_of(day, BMO)
        local = at.astimezone(calendar().zone)
        assert (local.date(), local.hour, local.minute) == (day, 9, 35)

    def test_slot_is_due_from_its_instant_until_it_is_served(self):
        """What was slept through is looked for late, as bars are."""
        diary = Diary(symbol="AAPL", slots=[Slot(day=DAY, at=CLOSE)])
        assert not diary.is_due(CLOSE - timedelta(microseconds=1))
        assert diary.is_due(CLOSE)
        assert diary.is_due(CLOSE + timedelta(days=9))
        assert not Diary(symbol="AAPL", slots=[Slot(day=DAY, at=CLOSE, is_done=True)]).is_due(CLOSE)
        assert diary.next_after(CLOSE - MINUTE) == CLOSE
        assert diary.next_after(CLOSE) is None


TWO_DAYS = {"first": DAY, "last": DAY + timedelta(days=1)}


class TestPlanned:
    def test_same_calendar_again_changes_nothing(self):
        once = planned([], [a_report(UNKNOWN)], **TWO_DAYS)
        assert once == [Slot(day=DAY, at=OPEN), Slot(day=DAY, at=CLOSE)]
        assert planned(once, [a_report(UNKNOWN)], **TWO_DAYS) == once

    def test_report_that_was_moved_takes_its_slot_along(self):
        """From before the open to after the close, or to the next day."""
        before = planned([], [a_report(BMO)], **TWO_DAYS)
        assert planned(before, [a_report(AMC)], **TWO_DAYS) == [Slot(day=DAY, at=CLOSE)]
        moved = planned(before, [a_report(BMO, day=DAY + timedelta(days=1))], **TWO_DAYS)
        assert [s.day for s in moved] == [DAY + timedelta(days=1)]

    def test_slot_that_was_served_is_not_served_again(self):
        done = [Slot(day=DAY, at=OPEN, is_done=True)]
        assert planned(done, [a_report(BMO)], **TWO_DAYS) == done

    def test_report_that_is_out_is_not_waited_for(self):
        served = [Slot(day=DAY, at=OPEN - MINUTE, event="e1", is_done=True)]
        assert planned(served, [a_report(AMC)], **TWO_DAYS) == served

    def test_what_lies_outside_the_calendar_is_left_alone(self):
        other = Slot(day=DAY + timedelta(days=5), at=CLOSE + timedelta(days=5))
        assert planned([other], [], **TWO_DAYS) == [other]


class TestTold:
    def test_waiting_slots_of_the_day_become_due(self):
        slots = planned([], [a_report(UNKNOWN)], first=DAY, last=DAY)
        at = OPEN + MINUTE
        assert told(slots, day=DAY, at=at, event="e1") == [
            Slot(day=DAY, at=OPEN, event="e1"),
            Slot(day=DAY, at=at, event="e1"),
        ]

    def test_report_nobody_waited_for_makes_a_slot(self):
        assert told([], day=DAY, at=OPEN, event="e1") == [Slot(day=DAY, at=OPEN, event="e1")]

    def test_told_twice_is_told_once(self):
        once = told([], day=DAY, at=OPEN, event="e1")
        served = [Slot(day=DAY, at=OPEN, event="e1", is_done=True)]
        assert told(once, day=DAY, at=CLOSE, event="e1") == once
        assert told(served, day=DAY, at=CLOSE, event="e1") == served

    def test_corrected_report_is_news_again(self):
        served = [Slot(day=DAY, at=OPEN, event="e1", is_done=True)]
        assert [s.event for s in told(served, day=DAY, at=CLOSE, event="e2") if not s.is_done] == ["e2"]


class TestStore:
    @pytest.fixture
    async def store(self):
        store = documents()
        yield store
        await store.close()

    @pytest.fixture
    def wall(self):
        return StoppedClock(WALL)

    @pytest.fixture
    def earnings(self, store, wall):
        return Earnings(store, wall)

    async def test_diary_outlives_the_process(self, store, wall, earnings):
        planned = await earnings.plan("AAPL", [a_report()], first=DAY, last=DAY)
        assert planned == Diary(symbol="AAPL", reports=[a_report()], slots=[Slot(day=DAY, at=CLOSE)])
        assert await Earnings(store, wall).get("AAPL") == planned
        assert await earnings.get("IBM") is None

    async def test_results_join_what_the_calendar_said(self, earnings):
        """The time of day stays known; a corrected result replaces the first."""
        await earnings.plan("AAPL", [a_report(AMC)], first=DAY, last=DAY)
        await earnings.reported(out(), now=CLOSE)
        diary = await earnings.reported(out(eps=1.7), now=CLOSE)
        [report] = diary.reports
        assert (report.eps_actual, report.time) == (1.7, AMC)

    async def test_what_is_served_is_done(self, earnings):
        await earnings.plan("AAPL", [a_report(UNKNOWN)], first=DAY, last=DAY)
        assert [s.is_done for s in (await earnings.served("AAPL", OPEN)).slots] == [True, False]
        assert [s.is_done for s in (await earnings.served("AAPL", CLOSE)).slots] == [True, True]

    async def test_nothing_new_writes_nothing(self, store, earnings):
        await earnings.plan("AAPL", [a_report()], first=DAY, last=DAY)
        await earnings.reported(out(), now=CLOSE)
        before = await store.feed("quota")
        await earnings.reported(out(), now=CLOSE)
        await earnings.served("IBM", CLOSE)
        assert await store.feed("quota") == before

    async def test_number_of_slots_and_reports_is_bounded(self, earnings):
        """A provider that repeats itself with ever new numbers fills no storage."""
        for n in range(40):
            await earnings.reported(out(eps=float(n)), now=CLOSE)
            await earnings.served("AAPL", CLOSE)
            await earnings.reported(out(day=DAY - timedelta(days=n)), now=CLOSE)
        diary = await earnings.get("AAPL")
        assert len(diary.slots) <= 12
        assert len(diary.reports) <= 12

    async def test_calendar_is_wanted_once_a_day(self, store, wall, earnings):
        """By whichever instance, and over a restart."""
        assert await earnings.is_wanted(DAY)
        await earnings.fetched(DAY)
        wall.at += timedelta(hours=1)
        assert not await earnings.is_wanted(DAY)
        assert not await Earnings(store, wall).is_wanted(DAY)
        assert await earnings.is_wanted(DAY + timedelta(days=1))
        assert await Earnings(store, wall).is_wanted(DAY + timedelta(days=1))

    async def test_calendar_is_wanted_no_more_than_once_a_minute(self, store, wall, earnings):
        """However many market days pass in it, and in whichever instance; after trouble too."""
        await earnings.fetched(DAY)
        for instance in (earnings, Earnings(store, wall)):
            assert not await instance.is_wanted(DAY + timedelta(days=1))
        wall.at += AGAIN
        for instance in (earnings, Earnings(store, wall)):
            assert await instance.is_wanted(DAY + timedelta(days=1))
        earnings.rest()
        assert not await earnings.is_wanted(DAY + timedelta(days=1))

    async def test_slower_twin_turns_no_day_back(self, store, wall, earnings):
        await earnings.fetched(DAY + timedelta(days=1))
        await Earnings(store, wall).fetched(DAY)
        wall.at += AGAIN
        assert not await Earnings(store, wall).is_wanted(DAY + timedelta(days=1))
