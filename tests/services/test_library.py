import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InvalidPayloadError, QuotaSpentError, RefusedError, UnavailableError, UnknownSymbolError
from shared.inbound import DeadLetters
from shared.market.callers import WITHOUT_A_DAY, CappedError, allowance
from shared.market.gaps import SETTLED, Kind
from shared.market.library import QUOTE_LIVES, QUOTE_RESTS
from shared.market.models import Adjustment, Columns, Interval, Priority, Quote, instant_of, minute_of
from shared.market.registry import Window
from shared.market.sessions import calendar
from shared.market.stores import Series
from shared.outbox import Outbox
from tests.builders import CLOSE, WALL, bars_closing_at, closes_from
from tests.unit.market.library_house import ANN, BOB, DAY, HISTORY, House, Killed

MINUTE = Interval.MINUTE
SECOND = timedelta(seconds=1)
BEFORE = HISTORY[0].closed_at - timedelta(days=1)


@pytest.fixture
async def house():
    house = House()
    yield house
    await house.store.close()


def rows(columns: Columns):
    return [columns.bar(i) for i in range(len(columns))]


def ranges(answer, kind=Kind.MISSING):
    return [(s.first, s.last) for s in answer.stretches if s.kind is kind]


class TestBars:
    async def test_unknown_series_is_fetched_once_and_then_held(self, house):
        """The first caller has it fetched whole; from then on storage is the answer, and it says how good it is."""
        first = await house.ask()
        second = await house.ask(BOB)

        assert rows(first.columns) == rows(second.columns) == HISTORY
        assert (first.as_of, first.provider, first.adjustment, first.revision, first.is_stale, first.missing) == (
            HISTORY[-1].closed_at,
            "alpha_vantage",
            Adjustment.RAW,
            0,
            False,
            [],
        )
        assert len(house.seller.asked) == 1
        assert house.seller.asked[0][1] is None
        assert house.seller.hits == ["bars"]

    async def test_what_was_only_fetched_is_not_watched(self, house):
        """Nobody hears of the bars of a series that nobody follows."""
        await house.ask()

        series = await house.library.series.get("AAPL", DAY)
        assert (series.is_active, series.due_at, series.watched_by) == (False, None, "fetch")
        assert house.publisher.published == []

    async def test_nobody_unknown_spends_a_call(self, house):
        """A reader without identity has what is stored, told what is missing; his interest is noted."""
        await house.hold(HISTORY[:200])

        answer = await house.ask(caller=None, since=BEFORE)

        assert rows(answer.columns) == HISTORY[:200]
        assert ranges(answer) == [(HISTORY[200].closed_at, HISTORY[-1].closed_at)]
        assert (answer.is_stale, house.seller.asked) == (True, [])
        assert [(a.symbol, a.count) for a in await house.library.quotes.interest.since(WALL)] == [("AAPL", 1)]

    @given(held=st.sets(st.integers(0, 90)), begin=st.integers(0, 90), length=st.integers(1, 90))
    @settings(max_examples=30)
    async def test_any_holes_anywhere_are_filled(self, held, begin, length):
        """Whatever is held, a caller's answer is the whole range; nothing that is held changes, nothing comes twice."""
        end = min(begin + length, 91)
        house = House()
        if held:
            await house.hold([HISTORY[n] for n in sorted(held)], is_active=False)

        answer = await house.ask(since=HISTORY[begin].closed_at - SECOND * 60, until=HISTORY[end - 1].closed_at)

        assert rows(answer.columns) == HISTORY[begin:end]
        assert (answer.missing, answer.is_stale) == ([], False)
        everything = rows((await house.ask(caller=None)).columns)
        assert everything == sorted({b.closed_at: b for b in everything}.values(), key=lambda b: b.closed_at)
        assert {HISTORY[n].closed_at for n in held} <= {b.closed_at for b in everything}
        assert len(house.seller.asked) == (not {*range(begin, end)} <= held)
        await house.store.close()

    async def test_hole_in_the_middle_is_filled_under_the_next_revision(self, house):
        """Pages of the past are never edited: who reads the old revision sees the old history, cold or warm."""
        await house.hold(HISTORY[:100] + HISTORY[150:], is_active=True)
        warm = house.another()
        assert len((await warm.bars("AAPL", DAY)).columns) == 250

        answer = await house.ask()

        series = await house.library.series.get("AAPL", DAY)
        assert rows(answer.columns) == rows((await warm.bars("AAPL", DAY)).columns) == HISTORY
        assert (series.revision, series.evaluated_through, series.is_active) == (1, HISTORY[-1].closed_at, True)
        assert len(await warm.bars_held.window("AAPL|1d", 0, since=None, lookback=0)) == 250
        assert house.publisher.published == []

    async def test_refused_event_takes_no_bars_from_a_reader(self, house):
        """The topic's no is a dead letter of the market; whoever asked has the bars."""
        await house.hold(HISTORY[:250], is_active=True)
        house.publisher.failing_with = RefusedError("the event topic answered 400")
        letters = DeadLetters(house.store, house.wall)
        house.publisher = Outbox(house.publisher, letters, "market")
        house.library = house.another()

        answered = await house.ask()

        assert (len(answered.columns), answered.is_stale, answered.reason) == (300, False, None)
        [letter] = await letters.newest(after=None, limit=10)
        assert (letter.partition, letter.body["event"]["data"]["count"]) == ("market", 50)

    async def test_new_bars_of_a_watched_series_are_told(self, house):
        """Bars behind the newest are everybody's business, older ones nobody's: they were never live."""
        await house.hold(HISTORY[50:250], is_active=True)

        await house.ask(since=BEFORE)

        [event] = house.publisher.published
        assert (event.first_closed_at, event.last_closed_at, event.count, event.revision) == (
            HISTORY[250].closed_at,
            HISTORY[-1].closed_at,
            50,
            0,
        )

    async def test_first_history_of_a_watched_series_is_the_watchlists(self, house):
        """What the watchlist is about to fetch whole is not begun in the middle."""
        await house.library.series.create(Series(symbol="AAPL", interval=DAY, live_from=CLOSE))

        with pytest.raises(UnavailableError, match="being fetched for the watchlist"):
            await house.ask(since=HISTORY[100].closed_at)
        assert house.seller.asked == []

    async def test_absent_bars_are_asked_for_once(self, house):
        """What the provider has not got is remembered with its name and day, and nobody asks for it again."""
        house.seller.history["AAPL"] = HISTORY[20:100] + HISTORY[110:]

        first, second = [await house.ask(since=BEFORE) for _ in range(2)]

        assert second.missing == []
        assert ranges(second, Kind.ABSENT) == [
            (HISTORY[0].closed_at, HISTORY[19].closed_at),
            (HISTORY[100].closed_at, HISTORY[109].closed_at),
        ]
        absent = next(s for s in second.stretches if s.kind is Kind.ABSENT)
        assert (absent.provider, absent.asked_at) == ("alpha_vantage", WALL + 3 * SECOND)
        assert rows(first.columns) == rows(second.columns) == house.seller.history["AAPL"]
        assert len(house.seller.asked) == 1

    async def test_absence_ends_with_a_revision(self, house):
        """A history that is written anew may have what the old one had not."""
        house.seller.history["AAPL"] = HISTORY[:100] + HISTORY[110:]
        await house.ask(since=BEFORE)
        series = await house.library.series.get("AAPL", DAY)
        house.seller.history["AAPL"] = HISTORY
        held = await house.library.bars_held.window(series.key, 0, since=None, lookback=0)
        await house.library.bars_held.rewrite(series.key, DAY, 1, held)
        await house.library.series.save(replace(series, revision=1))

        assert rows((await house.ask(since=BEFORE)).columns) == HISTORY

    async def test_bar_that_is_only_late_is_not_absent(self, house):
        """What closed just now may come later; what closed days ago will not."""
        house.seller.history["AAPL"] = HISTORY[:-1]
        await house.ask()
        late = await house.ask()
        assert (ranges(late), late.is_stale) == ([(HISTORY[-1].closed_at,) * 2], True)

        house.market.at += SETTLED + timedelta(days=1)
        settled = await house.ask(until=HISTORY[-1].closed_at)
        assert (ranges(settled), ranges(settled, Kind.ABSENT)) == ([], [(HISTORY[-1].closed_at,) * 2])
        assert settled.is_stale is False

    async def test_unclosed_bar_is_not_stored(self, house):
        """A provider that shows a bar before it has closed shows a number that will change."""
        house.market.at = HISTORY[100].closed_at - timedelta(hours=1)

        answer = await house.ask()

        assert rows(answer.columns) == HISTORY[:100]

    async def test_long_minutes_come_in_slices_and_the_rest_is_said_to_be_missing(self, house):
        """One answer waits for a few calls only; what it had no time for, it names."""
        minutes = bars_closing_at(closes_from(HISTORY[1].opened_at + SECOND, 390 * 8, interval=MINUTE))
        house.seller.history["AAPL"], house.seller.most = minutes, 500

        answer = await house.ask(interval=MINUTE, since=HISTORY[0].closed_at, until=minutes[-1].closed_at)

        # Each further call sees the last bar of the call before again.
        assert rows(answer.columns) == minutes[: len(answer.columns)]
        assert len(answer.columns) == 500 + 3 * 499
        assert ranges(answer) == [(minutes[len(answer.columns)].closed_at, minutes[-1].closed_at)]
        assert [a[4] for a in house.seller.asked] == [Priority.ASKED] * 4

    async def test_range_beyond_the_calendar_is_refused(self, house):
        """Nobody can say which bars the nineteenth century has."""
        with pytest.raises(InvalidPayloadError, match="session table"):
            await house.ask(since=CLOSE.replace(year=1871))


class TestTrouble:
    @pytest.mark.parametrize("trouble", [UnavailableError("down"), QuotaSpentError("spent", retry_after=SECOND)])
    async def test_stored_bars_answer_when_fetching_fails(self, house, trouble):
        """Old but marked is better than nothing: stale, as of when, and why."""
        await house.hold(HISTORY[:200], is_active=False)
        house.seller.trouble = trouble

        answer = await house.ask()

        assert rows(answer.columns) == HISTORY[:200]
        assert (answer.is_stale, answer.as_of) == (True, HISTORY[199].closed_at)
        assert answer.reason == f"{type(trouble).__name__}: {trouble}"

    async def test_nothing_stored_is_the_error(self, house):
        """Who asks for what nobody knows hears so."""
        with pytest.raises(UnknownSymbolError, match="nobody knows XYZ"):
            await house.ask(symbol="XYZ")
        assert await house.library.series.all() == []

    async def test_other_prices_never_mix(self, house):
        """Adjusted prices are no continuation of raw ones."""
        await house.hold(HISTORY[:200], is_active=False)
        house.seller.adjustment = Adjustment.SPLIT

        answer = await house.ask()

        assert "never mix" in answer.reason
        assert rows(answer.columns) == HISTORY[:200]

    async def test_corrected_bar_is_a_revision(self, house):
        """A raw price that the provider corrected takes the old one's place, under the next revision."""
        await house.hold(HISTORY[10:200], is_active=False)
        house.seller.history["AAPL"] = [
            *HISTORY[:199],
            replace(HISTORY[199], close=HISTORY[199].close + 0.5),
            *HISTORY[200:],
        ]

        answer = await house.ask()

        assert (answer.revision, answer.columns.close[189]) == (1, HISTORY[199].close + 0.5)
        assert rows(answer.columns) == house.seller.history["AAPL"][10:]

    async def test_split_adjusts_the_whole_history_anew(self, house):
        """Where prices are adjusted, one that changed means that all before it did: all of it is fetched again."""
        await house.hold(HISTORY[:200], is_active=False, adjustment=Adjustment.SPLIT)
        house.seller.adjustment = Adjustment.SPLIT
        halved = [replace(b, open=b.open / 2, high=b.high / 2, low=b.low / 2, close=b.close / 2) for b in HISTORY]
        house.seller.history["AAPL"] = halved

        await house.ask()
        answer = await house.ask()

        assert rows(answer.columns) == halved
        assert answer.revision == 1

    async def test_part_of_an_adjusted_history_is_refused(self, house):
        """Half of it at new prices and half at old ones would be wrong without a trace."""
        await house.hold(HISTORY[:200], is_active=False, adjustment=Adjustment.SPLIT)
        house.seller.adjustment = Adjustment.SPLIT
        house.seller.history["AAPL"] = [replace(b, low=b.low / 2, close=b.close / 2) for b in HISTORY[100:]]

        answer = await house.ask()

        assert "whole history" in answer.reason
        assert rows(answer.columns) == HISTORY[:200]

    @pytest.mark.parametrize(
        "held", [HISTORY[50:250], HISTORY[:100] + HISTORY[150:250]], ids=["at both ends", "in the middle"]
    )
    async def test_killed_anywhere_it_is_done_again(self, held):
        """After a kill at any write the history reads whole, old or new, and asking again completes it."""
        outcomes = set()
        for allowed in range(12):
            house = House()
            store = house.store
            await house.hold(held, is_active=False)
            left = allowed

            def dying(write):
                async def maybe(*args):
                    nonlocal left
                    if left == 0:
                        raise Killed
                    left -= 1
                    return await write(*args)

                return maybe

            names = ("create", "replace", "batch")
            real = {name: getattr(store, name) for name in names}
            for name in names:
                setattr(store, name, dying(real[name]))
            try:
                await house.ask(since=BEFORE)
                outcomes.add("done")
            except Killed:
                outcomes.add("killed")
            for name in names:
                setattr(store, name, real[name])

            seen = rows((await house.another().bars("AAPL", DAY)).columns)
            assert seen == [b for b in HISTORY if b in seen]
            assert set(held) <= set(seen)
            house.wall.at += timedelta(minutes=1)
            house.library = house.another()
            assert rows((await house.ask(since=BEFORE)).columns) == HISTORY
            await store.close()
        assert outcomes == {"done", "killed"}


class TestManyAtOnce:
    async def test_thousand_identical_requests_make_one_call(self, house):
        """In a process and between processes: the provider hears it once."""
        others = [house.another() for _ in range(3)]
        house.seller.gate.clear()
        asking = [
            asyncio.create_task(library.bars("AAPL", DAY, caller=ANN))
            for library in (house.library, *others)
            for _ in range(50)
        ]
        await asyncio.sleep(0.05)
        house.seller.gate.set()

        answers = await asyncio.gather(*asking)

        assert {len(a.columns) for a in answers} == {300}
        assert len(house.seller.asked) == 1
        assert await house.library.callers.left(ANN) == 999

    async def test_other_questions_share_what_they_lack(self, house):
        """Two ranges that miss the same bars make one call, and each is answered as asked."""
        await house.hold(HISTORY[:200], is_active=False)
        since = [HISTORY[100].closed_at, HISTORY[150].closed_at]

        answers = await asyncio.gather(*(house.library.bars("AAPL", DAY, since=at, caller=ANN) for at in since))

        assert [rows(a.columns) for a in answers] == [HISTORY[101:], HISTORY[151:]]
        assert len(house.seller.asked) == 1


class TestCallers:
    def test_share_is_of_the_scarcest_day(self):
        """A fifth of the calls that the provider with the fewest a day allows; at least one."""
        day, minute = timedelta(days=1), timedelta(minutes=1)
        assert allowance([Window(amount=25, span=day), Window(amount=800, span=day)]) == 5
        assert allowance([Window(amount=3, span=day)]) == 1
        assert allowance([Window(amount=5, span=minute)]) == WITHOUT_A_DAY

    async def test_spent_share_is_429_until_the_day_ends(self, house):
        """Who has had his share waits for tomorrow (UTC); others go on, and what is stored is everybody's."""
        house.library = house.another(allowed=2)
        for symbol in ("AAPL", "IBM"):
            house.seller.history[symbol] = HISTORY
            await house.ask(symbol=symbol)

        with pytest.raises(CappedError, match="2 a day") as refused:
            await house.ask(symbol="MSFT")
        assert refused.value.retry_after == WALL.replace(hour=0) + timedelta(days=1) - house.wall.at
        assert len((await house.ask()).columns) == 300
        house.seller.history["MSFT"] = HISTORY
        assert len((await house.ask(BOB, symbol="MSFT")).columns) == 300

        house.wall.at += timedelta(days=1)
        house.seller.history["GOOG"] = HISTORY
        assert len((await house.ask(symbol="GOOG")).columns) == 300

    async def test_call_that_was_held_back_is_not_charged(self, house):
        """Our own quota refused it, so nothing was spent."""
        house.seller.trouble = QuotaSpentError("spent", retry_after=SECOND)
        with pytest.raises(QuotaSpentError):
            await house.ask()

        assert await house.library.callers.left(ANN) == 1000

    async def test_capped_caller_does_not_stop_another_who_asks_the_same(self, house):
        """The first in line has no calls left; the second makes the call, and only the first hears of a cap."""
        house.library = house.another(allowed=1)
        house.seller.history["IBM"] = HISTORY
        await house.ask(symbol="IBM")
        house.wall.at += timedelta(seconds=3)

        outcomes = await asyncio.gather(
            *(house.library.bars("AAPL", DAY, caller=who) for who in (ANN, BOB)), return_exceptions=True
        )

        assert isinstance(outcomes[0], CappedError)
        assert len(outcomes[1].columns) == 300


class TestQuotes:
    SESSION = calendar().session(CLOSE.date())

    def quote(self, as_of, price=101.5):
        return Quote(symbol="AAPL", price=price, previous_close=100.0, as_of=as_of, provider="finnhub")

    async def test_quote_of_an_open_session_lives_a_minute(self, house):
        """Within it storage answers; after it a caller has it renewed, a stranger sees the old one."""
        house.market.at = self.SESSION.opens_at + timedelta(hours=1)
        house.seller.price = self.quote(house.market.at)
        for step in (timedelta(), QUOTE_LIVES - SECOND, SECOND):
            house.wall.at += step
            assert (await house.library.quote("AAPL", caller=ANN)).quote.price == 101.5
            house.seller.price = replace(house.seller.price, price=101.5)
        assert len(house.seller.asked) == 2
        assert house.seller.hits == ["quote"]

        house.wall.at += QUOTE_LIVES
        assert (await house.library.quote("AAPL")).quote.price == 101.5
        assert len(house.seller.asked) == 2

    async def test_fast_market_renews_a_quote_sooner_but_not_at_every_request(self, house):
        """Where market time flies a quote is stale by the market's clock first; still it rests some seconds."""
        house.market.at = self.SESSION.opens_at + timedelta(hours=1)
        house.seller.price = self.quote(house.market.at)
        await house.library.quote("AAPL", caller=ANN)
        house.market.at += timedelta(hours=1)

        rested = await house.library.quote("AAPL", caller=ANN)
        assert (rested.is_stale, len(house.seller.asked)) == (True, 1)
        house.wall.at += QUOTE_RESTS
        house.seller.price = self.quote(house.market.at)
        assert (await house.library.quote("AAPL", caller=ANN)).is_stale is False
        assert len(house.seller.asked) == 2

    async def test_close_lives_until_the_next_open(self, house):
        """After the session its last price is the price, however long the weekend."""
        house.market.at = CLOSE + timedelta(minutes=1)
        house.seller.price = self.quote(CLOSE)
        await house.library.quote("AAPL", caller=ANN)
        house.market.at = calendar().next_close(CLOSE).opens_at - SECOND
        house.wall.at += timedelta(hours=17)

        assert (await house.library.quote("AAPL", caller=ANN)).is_stale is False
        house.market.at += SECOND
        await house.library.quote("AAPL", caller=ANN)
        assert len(house.seller.asked) == 2

    async def test_old_quote_answers_when_a_new_one_cannot_be_had(self, house):
        """Marked stale, with the reason; without one the trouble is the answer."""
        house.seller.trouble = UnavailableError("down")
        with pytest.raises(UnavailableError):
            await house.library.quote("AAPL", caller=ANN)
        house.wall.at += timedelta(minutes=2)
        house.market.at = self.SESSION.opens_at + timedelta(hours=1)
        await house.library._keep(self.quote(house.market.at))
        house.wall.at += QUOTE_LIVES

        answer = await house.library.quote("AAPL", caller=ANN)

        assert (answer.is_stale, answer.reason) == (True, "UnavailableError: down")

    async def test_stranger_hears_of_no_quote(self, house):
        """Nothing stored is nothing, and no call."""
        assert await house.library.quote("AAPL") is None
        assert house.seller.asked == []

    async def test_many_at_once_make_one_call(self, house):
        """A quote that everybody wants is fetched once."""
        house.seller.price = self.quote(HISTORY[-1].closed_at)
        answers = await asyncio.gather(
            *(library.quote("AAPL", caller=ANN) for library in (house.library, house.another()) for _ in range(50))
        )

        assert {a.quote.price for a in answers} == {101.5}
        assert len(house.seller.asked) == 1


def test_minutes_of_history_are_those_of_the_calendar():
    """What these tests call a history is one to the session table."""
    assert [instant_of(minute_of(b.closed_at)) for b in HISTORY] == closes_from(CLOSE, 300)


class TestReach:
    async def test_answer_that_reaches_less_far_leaves_the_rest_missing(self, house):
        """What a plan or a slice left out was asked of nobody: it stays missing, and can be had another day."""
        house.seller.history["AAPL"] = HISTORY[100:]
        house.seller.covers = (HISTORY[100].opened_at, HISTORY[200].closed_at)
        await house.hold(HISTORY[250:], is_active=False)

        answer = await house.ask(since=BEFORE)

        assert ranges(answer, Kind.ABSENT) == []
        assert ranges(answer) == [(HISTORY[0].closed_at, HISTORY[99].closed_at)]

    async def test_empty_slice_does_not_speak_of_the_next(self, house):
        """Years before a symbol's first day are absent slice by slice; its own years are fetched all the same."""
        house.seller.history["AAPL"] = []
        house.seller.covers = (None, HISTORY[49].closed_at)
        await house.hold(HISTORY[250:], is_active=False)

        answer = await house.ask(since=BEFORE)

        assert ranges(answer, Kind.ABSENT) == [(HISTORY[0].closed_at, HISTORY[49].closed_at)]
        assert ranges(answer) == [(HISTORY[50].closed_at, HISTORY[249].closed_at)]

    async def test_first_history_does_not_speak_of_what_is_older(self, house):
        """Asked for whatever there is, a provider gives some years: older ones are asked for when they are wanted."""
        house.seller.history["AAPL"] = HISTORY[100:]
        await house.ask()
        house.seller.history["AAPL"] = HISTORY

        answer = await house.ask(since=BEFORE)

        assert rows(answer.columns) == HISTORY
