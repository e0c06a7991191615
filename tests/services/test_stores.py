from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.clock import StoppedClock
from shared.errors import ConflictError, NotFoundError, StaleError, UnavailableError
from shared.market import stores
from shared.market.models import Adjustment, Bar, Columns, Interval, Quote, minute_of
from shared.market.stores import Asked, Bars, Interest, Quotes, Series, SeriesStore, WantedQuote, merged
from tests.builders import CLOSE, WALL, a_bar, bars_closing_at, closes_from, daily_bars, documents, opened_documents

KEY = "AAPL|1d"
DAY = Interval.DAY
MICROSECOND = timedelta(microseconds=1)
HISTORY = daily_bars(400, prices=[100 + i / 7 for i in range(400)])
"""A year and a half of sessions: seven pages."""
MINUTES = {bar.closed_at: minute_of(bar.closed_at) for bar in HISTORY}


def rows(columns: Columns) -> list[Bar]:
    return [columns.bar(i) for i in range(len(columns))]


def page_of(bar: Bar) -> tuple[int, int]:
    return bar.closed_at.year, (bar.closed_at.month - 1) // 3


def expected(bars: Sequence[Bar], since, lookback, through) -> list[Bar]:
    """What ``window`` promises, the plain way."""
    old = [b for b in bars if since is not None and b.closed_at <= since]
    new = [b for b in bars if since is None or b.closed_at > since]
    found = old[max(0, len(old) - lookback) :] + new
    return [b for b in found if through is None or b.closed_at <= through]


@pytest.fixture
async def store():
    store = documents()
    yield store
    await store.close()


@pytest.fixture
def bars(store):
    return Bars(store, StoppedClock(WALL))


async def pages(store) -> list:
    return await store.page("bars", KEY, limit=1000)


class TestBars:
    @given(
        lengths=st.lists(st.integers(0, 150), max_size=4),
        looks=st.lists(
            st.tuples(st.none() | st.integers(-1, 399), st.integers(0, 150), st.none() | st.integers(0, 80)), max_size=3
        ),
        revision=st.integers(0, 1),
    )
    async def test_any_look_at_any_history_is_the_naive_one(self, lengths, looks, revision):
        """However the bars came in and whatever was read before, a window is what a plain list would give."""
        async with opened_documents() as store:
            first, second = (Bars(store, StoppedClock(WALL)) for _ in range(2))
            stored: list[Bar] = []
            for turn, length in enumerate([*lengths, 0]):
                writer, reader = (first, second) if turn % 2 else (second, first)
                # The three bars before are given again, as providers do.
                await writer.append(KEY, DAY, revision, HISTORY[max(0, len(stored) - 3) : len(stored) + length])
                stored = HISTORY[: len(stored) + length]
                for since_index, lookback, more in looks:
                    since = None if since_index is None else HISTORY[max(0, since_index)].closed_at
                    if since_index == -1:
                        since -= timedelta(days=1)
                    through = None if more is None else (since or HISTORY[0].closed_at) + timedelta(days=more)
                    for eye in (reader, writer, Bars(store, StoppedClock(WALL))):
                        found = await eye.window(KEY, revision, since=since, lookback=lookback, through=through)
                        wanted = expected(stored, since, lookback, through)
                        assert list(found.closed) == [MINUTES[b.closed_at] for b in wanted]
                        assert list(found.close) == [b.close for b in wanted]
            assert len(await first.window(KEY, 1 - revision, since=None, lookback=0)) == 0

    @given(have=st.integers(0, 400), count=st.integers(1, 200), end=st.none() | st.integers(0, 399))
    async def test_latest_are_the_last_before_a_minute(self, have, count, end):
        """The bars asked for and perhaps some older ones, the last of them just before the minute."""
        held = HISTORY[:have]
        limit = None if end is None else minute_of(HISTORY[end].closed_at)
        async with opened_documents() as store:
            bars = Bars(store, StoppedClock(WALL))
            await bars.append(KEY, DAY, 0, held)

            found = rows(await bars.latest(KEY, 0, end=limit, count=count))

        older = held if end is None else held[:end]
        assert found == older[max(0, len(older) - len(found)) :]
        assert len(found) >= min(count, len(older))

    async def test_latest_goes_on_behind_a_page_of_any_size(self, store, bars):
        """Around the clock a week holds 168 hours: a place in the middle of it hides no older bar."""
        closes = [CLOSE + timedelta(hours=n) for n in range(500)]
        hours = [a_bar(at, opened_at=at - timedelta(hours=1)) for at in closes]
        await bars.append("BTC|1h", Interval.HOUR, 0, hours)

        found = rows(await bars.latest("BTC|1h", 0, end=minute_of(closes[300]), count=250))

        assert found[-250:] == hours[50:300]

    @given(
        begin=st.integers(0, 400),
        steps=st.lists(st.tuples(st.sampled_from(["append", "prepend"]), st.integers(0, 120)), max_size=6),
        look=st.integers(0, 399),
    )
    @settings(max_examples=30)
    async def test_history_grows_at_both_ends(self, begin, steps, look):
        """However it grew, it reads as one history, cold or warm, and knows how far it reaches without being read."""
        first, last = begin, begin
        async with opened_documents() as store:
            warm = Bars(store, StoppedClock(WALL))
            for end, count in steps:
                if end == "append":
                    last = min(400, last + count)
                    await warm.append(KEY, DAY, 0, HISTORY[first:last])
                elif first < last:  # the first bars held are given again, as providers do
                    first = max(0, first - count)
                    await warm.prepend(KEY, DAY, 0, HISTORY[first : first + count + 3])
                held, cold = HISTORY[first:last], Bars(store, StoppedClock(WALL))
                for eye in (warm, cold):
                    assert rows(await eye.window(KEY, 0, since=None, lookback=0)) == held
                    since = HISTORY[look].closed_at
                    assert rows(await eye.window(KEY, 0, since=since, lookback=9)) == expected(held, since, 9, None)
                    assert rows(await eye.latest(KEY, 0, count=500)) == held
                    extent = await eye.extent(KEY, 0)
                    known = extent and (extent.first, extent.last, extent.count)
                    assert known == ((held[0].closed_at, held[-1].closed_at, len(held)) if held else None)

    async def test_prepending_edits_no_page_of_the_past(self, store, bars):
        """Older history is more pages: those that a process may have kept stay as they are."""
        await bars.append(KEY, DAY, 0, HISTORY[150:350])
        *closed, newest = await pages(store)

        await bars.prepend(KEY, DAY, 0, HISTORY[100:150])
        await bars.prepend(KEY, DAY, 0, HISTORY[90:100])

        now = await pages(store)
        assert now[-1 - len(closed) : -1] == closed
        assert now[-1].id == newest.id
        assert now[-1].body["recorded_at"] == newest.body["recorded_at"]

    @pytest.mark.parametrize("rival", ["prepend", "append"])
    async def test_of_two_writers_at_once_one_reads_again(self, store, rival, monkeypatch):
        """Nothing is stored twice and no count goes wrong, whoever is faster at whichever end."""
        slow, fast = (Bars(store, StoppedClock(WALL)) for _ in range(2))
        await fast.append(KEY, DAY, 0, HISTORY[100:200])
        read = await slow.newest(KEY, 0)
        await (fast.prepend(KEY, DAY, 0, HISTORY[:100]) if rival == "prepend" else fast.append(KEY, DAY, 0, HISTORY))

        async def as_read_before(key, revision):
            return read

        monkeypatch.setattr(slow, "newest", as_read_before)
        with pytest.raises((ConflictError, StaleError)):
            await slow.prepend(KEY, DAY, 0, HISTORY[50:100])

        held = HISTORY[:200] if rival == "prepend" else HISTORY[100:]
        assert rows(await fast.window(KEY, 0, since=None, lookback=0)) == held
        assert (await fast.extent(KEY, 0)).count == len(held)

    async def test_long_prepending_that_is_cut_leaves_no_hole(self, store, bars, monkeypatch):
        """A crash between two batches leaves the newer part, right to the bars that were there; again finishes it."""
        minutes = bars_closing_at(closes_from(CLOSE, 60 * 130, interval=Interval.MINUTE))
        await bars.append("AAPL|1m", Interval.MINUTE, 0, minutes[-10:])
        batches, batch = [], store.batch

        async def dying(container, operations):
            if batches:
                raise KeyboardInterrupt
            batches.append(operations)
            return await batch(container, operations)

        monkeypatch.setattr(store, "batch", dying)
        with pytest.raises(KeyboardInterrupt):
            await bars.prepend("AAPL|1m", Interval.MINUTE, 0, minutes)
        monkeypatch.setattr(store, "batch", batch)

        left = rows(await bars.window("AAPL|1m", 0, since=None, lookback=0))
        assert left == minutes[-len(left) :]
        assert 10 < len(left) < len(minutes)
        assert (await bars.extent("AAPL|1m", 0)).count == len(left)
        await bars.prepend("AAPL|1m", Interval.MINUTE, 0, minutes)
        assert rows(await bars.window("AAPL|1m", 0, since=None, lookback=0)) == minutes

    async def test_extent_of_what_was_stored_before_pages_were_counted(self, store, bars):
        """Old pages tell too, at the price of reading them once; the next bar makes them tell at once."""
        await bars.append(KEY, DAY, 0, HISTORY[:150])
        for page in await pages(store):
            body = {name: value for name, value in page.body.items() if name not in ("older", "first")}
            await store.replace("bars", page.with_body(body))

        assert (await bars.extent(KEY, 0)).count == 150
        await bars.append(KEY, DAY, 0, HISTORY[:151])
        assert (await bars.newest(KEY, 0)).first == minute_of(HISTORY[0].closed_at)
        assert (await bars.extent(KEY, 0)).count == 151

    async def test_rewritten_history_is_another_revision(self, bars):
        """A whole history is written where nobody reads yet; what lies there already is never mixed with it."""
        await bars.append(KEY, DAY, 0, HISTORY[:100] + HISTORY[200:])

        await bars.rewrite(KEY, DAY, 1, Columns.of(HISTORY))

        assert rows(await bars.window(KEY, 1, since=None, lookback=0)) == HISTORY
        assert rows(await bars.window(KEY, 0, since=None, lookback=0)) == HISTORY[:100] + HISTORY[200:]
        assert (await bars.extent(KEY, 1)).count == 400
        with pytest.raises(ConflictError):
            await bars.rewrite(KEY, DAY, 1, Columns.of(HISTORY[:50]))

    @given(held=st.sets(st.integers(0, 60)), fresh=st.sets(st.integers(0, 60)))
    def test_merged_history_has_every_bar_once_and_the_fresh_one_counts(self, held, fresh):
        """Bars fall into their places."""
        dearer = {n: replace(HISTORY[n], close=HISTORY[n].close + 0.5) for n in fresh}

        found = rows(
            merged(
                *(Columns.of(part) for part in ([HISTORY[n] for n in sorted(held)], [dearer[n] for n in sorted(fresh)]))
            )
        )

        assert found == [dearer.get(n, HISTORY[n]) for n in sorted(held | fresh)]

    @pytest.mark.parametrize(
        ("interval", "names", "count"),
        [
            (Interval.DAY, ["2013-01-01", "2013-04-01", "2013-07-01"], 130),
            (Interval.HOUR, ["2012-12-31", "2013-01-07", "2013-01-14"], 60),
            (Interval.MINUTE, ["2013-01-02T21", "2013-01-03T14", "2013-01-03T15", "2013-01-03T16"], 120),
        ],
    )
    async def test_pages_are_named_by_quarter_week_and_hour(self, store, bars, interval, names, count):
        """A page is small enough to be rewritten with each bar, and found by its name."""
        key = f"AAPL|{interval}"
        await bars.append(key, interval, 0, bars_closing_at(closes_from(CLOSE, count, interval=interval)))

        found = await store.page("bars", key)

        assert [page.body["name"] for page in found] == names
        assert sum(len(page.body["closed"]) for page in found) == count

    @pytest.mark.parametrize("interval", list(Interval))
    async def test_pages_stay_small(self, store, bars, interval):
        """No page of an exchange's bars holds more than about 64 of them: Cosmos DB bills a write by its size."""
        key = f"AAPL|{interval}"
        await bars.append(key, interval, 0, bars_closing_at(closes_from(CLOSE, 2000, interval=interval)))

        found = await store.page("bars", key, limit=1000)

        assert max(len(page.body["closed"]) for page in found) <= 70

    async def test_closed_page_is_never_edited(self, store, bars):
        """Appending rewrites the newest page only; what lies behind it can be kept by every process for ever."""
        seen = {}
        for end in range(3, 150, 3):
            await bars.append(KEY, DAY, 0, HISTORY[max(0, end - 30) : end])
            *closed, _ = await pages(store)
            for page in closed:
                assert seen.setdefault(page.id, page) == page
        assert len(seen) == 2

    async def test_stored_bar_is_left_as_it_is(self, store, bars):
        """A provider that says something else later changes no history: that is what a revision is for."""
        await bars.append(KEY, DAY, 0, HISTORY[:5])
        before = await pages(store)

        await bars.append(KEY, DAY, 0, [replace(b, close=b.close + 0.5) for b in HISTORY[:5]])

        assert await pages(store) == before

    async def test_numbers_come_back_to_the_last_bit(self, bars):
        """Prices, volumes and splits are the float64 that came in."""
        odd = [replace(b, volume=0.1 + i, split=[1.0, 7.0, 0.1][i % 3]) for i, b in enumerate(HISTORY[:80])]

        await bars.append(KEY, DAY, 0, odd)

        assert rows(await bars.window(KEY, 0, since=None, lookback=0)) == odd

    async def test_revision_is_another_history(self, bars):
        """Who reads under the old revision sees the old bars, under the new one the new, warm caches or not."""
        old, new = HISTORY[:200], [replace(b, open=b.open / 2, low=b.low / 2) for b in HISTORY[:200]]
        await bars.append(KEY, DAY, 0, old)
        assert rows(await bars.window(KEY, 0, since=None, lookback=0)) == old

        await bars.append(KEY, DAY, 1, new)

        for _ in range(2):
            assert rows(await bars.window(KEY, 1, since=None, lookback=0)) == new
            assert rows(await bars.window(KEY, 0, since=None, lookback=0)) == old
        since = HISTORY[190].closed_at
        assert rows(await bars.window(KEY, 1, since=since, lookback=100)) == new[91:]

    async def test_series_may_be_revised_often(self, bars):
        """The newest page of a revision is found among those of many others, later and earlier."""
        for revision in range(12):
            await bars.append(KEY, DAY, revision, HISTORY[: 70 + revision])

        for revision in range(12):
            newest = await bars.newest(KEY, revision)
            assert newest.columns.closed[-1] == minute_of(HISTORY[69 + revision].closed_at)
        assert await bars.newest(KEY, 12) is None

    async def test_newest_page_says_when_it_was_written(self, store):
        """The wall's time of the last write tells how long an event may be owed."""
        wall = StoppedClock(WALL)
        bars = Bars(store, wall)
        await bars.append(KEY, DAY, 0, HISTORY[:3])
        wall.at += timedelta(seconds=7)
        await bars.append(KEY, DAY, 0, HISTORY[:4])

        assert (await bars.newest(KEY, 0)).recorded_at == wall.at
        assert await bars.newest("IBM|1d", 0) is None

    @pytest.mark.parametrize("have", [0, 3, 62], ids=["new series", "page grows", "page opens"])
    async def test_of_two_appending_at_once_one_reads_again(self, store, have, monkeypatch):
        """Nothing is stored twice and nothing is overwritten, whoever is faster."""
        slow, fast = (Bars(store, StoppedClock(WALL)) for _ in range(2))
        await fast.append(KEY, DAY, 0, HISTORY[:have])
        read = await slow.newest(KEY, 0)
        await fast.append(KEY, DAY, 0, HISTORY[: have + 1])

        async def as_read_before(key, revision):
            return read

        monkeypatch.setattr(slow, "newest", as_read_before)
        with pytest.raises((ConflictError, StaleError)):
            await slow.append(KEY, DAY, 0, HISTORY[: have + 2])

        assert rows(await fast.window(KEY, 0, since=None, lookback=0)) == HISTORY[: have + 1]

    async def test_kept_pages_are_not_read_again(self, store, bars, monkeypatch):
        """A warm process reads the page being filled, not the history behind it."""
        await bars.append(KEY, DAY, 0, HISTORY)
        since = HISTORY[-2].closed_at
        await bars.window(KEY, 0, since=since, lookback=250)
        read, page = [], store.page

        async def counting(*args, **how):
            found = await page(*args, **how)
            read.extend(found)
            return found

        monkeypatch.setattr(store, "page", counting)
        assert rows(await bars.window(KEY, 0, since=since, lookback=250)) == HISTORY[-251:]

        assert len(read) <= 2

    async def test_memory_has_a_limit(self, store, bars, monkeypatch):
        """A process that looks at many series lets the longest unread go, and still reads all of them right."""
        monkeypatch.setattr(stores, "CACHED_PAGES", 10)
        keys = [f"S{n}|1d" for n in range(6)]
        for key in keys:
            await bars.append(key, DAY, 0, HISTORY)

        for key in [*keys, *reversed(keys)]:
            assert rows(await bars.window(key, 0, since=None, lookback=0)) == HISTORY
            assert sum(map(len, bars._closed.values())) == bars._kept <= 10

    async def test_long_history_is_stored_oldest_first(self, store, bars, monkeypatch):
        """A crash between two batches leaves a beginning of the history, never a hole."""
        minutes = bars_closing_at(closes_from(CLOSE, 60 * 130, interval=Interval.MINUTE))
        batches, batch = [], store.batch

        async def dying(container, operations):
            if batches:
                raise KeyboardInterrupt
            batches.append(operations)
            return await batch(container, operations)

        monkeypatch.setattr(store, "batch", dying)
        with pytest.raises(KeyboardInterrupt):
            await bars.append("AAPL|1m", Interval.MINUTE, 0, minutes)
        monkeypatch.setattr(store, "batch", batch)

        left = rows(await bars.window("AAPL|1m", 0, since=None, lookback=0))
        assert left == minutes[: len(left)]
        assert 0 < len(left) < len(minutes)
        await bars.append("AAPL|1m", Interval.MINUTE, 0, minutes)
        assert rows(await bars.window("AAPL|1m", 0, since=None, lookback=0)) == minutes


class TestSeries:
    @pytest.fixture
    def series(self, store):
        return SeriesStore(store, StoppedClock(WALL))

    async def test_everything_known_survives(self, series):
        """What is saved is what is read."""
        made = await series.create(Series(symbol="BRK.B", interval=Interval.HOUR, live_from=CLOSE, due_at=CLOSE))
        saved = await series.save(
            replace(
                made,
                is_active=False,
                watched_by="api",
                evaluated_through=CLOSE + timedelta(hours=1),
                provider="finnhub",
                adjustment=Adjustment.SPLIT,
                revision=3,
                claimed=4,
                misses=2,
                trouble={"kind": "UnavailableError", "text": "down"},
                entries={"cross": {"state": "not_ready"}},
                due_at=CLOSE + timedelta(hours=2),
            )
        )

        assert await series.get("BRK.B", Interval.HOUR) == saved
        assert saved.key == "BRK.B|1h"

    async def test_unwatched_series_is_not_found_with_the_remedy(self, series):
        """Who asks for what nobody watches learns how to watch it."""
        with pytest.raises(NotFoundError, match=r"PUT /api/watchlist/AAPL\?interval=1h"):
            await series.get("AAPL", Interval.HOUR)

    async def test_series_is_created_once_and_saved_by_the_last_reader(self, series):
        """Two instances never overwrite what the other learnt."""
        made = await series.create(Series(symbol="AAPL", interval=DAY, live_from=CLOSE))
        await series.save(replace(made, misses=1))

        with pytest.raises(ConflictError):
            await series.create(Series(symbol="AAPL", interval=DAY, live_from=CLOSE))
        with pytest.raises(StaleError):
            await series.save(replace(made, misses=9))

        assert (await series.get("AAPL", DAY)).misses == 1

    async def test_revision_is_claimed_once(self, series):
        """Who writes a history writes it under a number of his own; a claim that came to nothing is passed over."""
        made = await series.create(Series(symbol="AAPL", interval=DAY, live_from=CLOSE, revision=2))

        first = await series.claim(made)
        with pytest.raises(StaleError):
            await series.claim(made)
        second = await series.claim(first)

        assert [made.revision, first.claimed, second.claimed, second.revision] == [2, 3, 4, 2]

    async def test_due_series_come_longest_due_first(self, series):
        """What waits longest is fetched first; what is not watched is never due."""
        for symbol, days in (("A", 2), ("B", 0), ("C", 1), ("D", 5)):
            due_at = CLOSE + timedelta(days=days)
            await series.create(Series(symbol=symbol, interval=DAY, live_from=CLOSE, due_at=due_at))
        await series.create(Series(symbol="E", interval=DAY, live_from=CLOSE))

        assert [s.symbol for s in await series.due(CLOSE + timedelta(days=2), 10)] == ["B", "C", "A"]
        assert [s.symbol for s in await series.due(CLOSE + timedelta(days=9), 2)] == ["B", "C"]

    async def test_all_means_all(self, store):
        """A long watchlist comes whole."""
        wall = StoppedClock(WALL)
        series = SeriesStore(store, wall)
        for n in range(501):
            wall.at += timedelta(milliseconds=n % 2)
            await series.create(Series(symbol=f"S{n}", interval=DAY, live_from=CLOSE))

        everything = await series.all()

        assert {s.symbol for s in everything} == {f"S{n}" for n in range(501)}
        assert len(everything) == 501
        assert all(a.document.sort < b.document.sort for a, b in pairwise(everything))
        newest = await series.page(None, newest_first=True, limit=300)
        assert newest + await series.page(newest[-1].sort, newest_first=True, limit=300) == everything[::-1]


class TestInterest:
    async def test_requests_are_counted_by_the_hour_and_written_once_a_minute(self, store):
        """What many ask for is known to all instances, for a write a minute a symbol and process."""
        wall = StoppedClock(WALL)
        one, two = Interest(store, wall), Interest(store, wall)
        writes, replace_, create = [], store.replace, store.create

        async def counted(write, *args):
            writes.append(args)
            return await write(*args)

        store.replace, store.create = (lambda *a: counted(replace_, *a)), (lambda *a: counted(create, *a))
        for second in range(121):
            wall.at = WALL + timedelta(seconds=second)
            await one.note("AAPL")
        await two.note("AAPL")
        wall.at = WALL + timedelta(hours=1)
        await two.note("IBM")

        assert await one.since(WALL) == [
            Asked(symbol="AAPL", hour=WALL, count=122),
            Asked(symbol="IBM", hour=WALL + timedelta(hours=1), count=1),
        ]
        assert await one.since(WALL + timedelta(hours=1)) == [
            Asked(symbol="IBM", hour=WALL + timedelta(hours=1), count=1)
        ]
        assert len(writes) == 3 + 1 + 1

    async def test_trouble_with_storage_is_not_the_readers(self, store, monkeypatch):
        """A note that cannot be written is written with the next one."""
        wall = StoppedClock(WALL)
        interest = Interest(store, wall)

        async def down(*args):
            raise UnavailableError("down")

        with monkeypatch.context() as patch:
            patch.setattr(store, "read", down)
            await interest.note("AAPL")
        wall.at += timedelta(minutes=1)
        await interest.note("AAPL")

        assert [a.count for a in await interest.since(WALL)] == [2]

    async def test_all_symbols_there_could_be_are_not_remembered(self, store, monkeypatch):
        """Who asks for endless names fills neither memory nor storage."""
        monkeypatch.setattr(stores, "NOTED_SYMBOLS", 5)
        wall = StoppedClock(WALL)
        interest = Interest(store, wall)
        for n in range(50):
            await interest.note(f"S{n}")
        assert len(await interest.since(WALL)) == len(interest._written) == 5

        wall.at += timedelta(minutes=1)
        await interest.note("NEW")
        assert "NEW" in {a.symbol for a in await interest.since(WALL)}


class TestQuotes:
    @pytest.fixture
    def quotes(self, store):
        return Quotes(store, StoppedClock(WALL))

    async def test_interest_comes_first_and_the_quote_later(self, quotes):
        """A symbol asked for in vain is known as wanted; its quote takes the same place."""
        assert await quotes.get("AAPL") is None
        await quotes.put(WantedQuote(symbol="AAPL", wanted=1))
        wanted = await quotes.get("AAPL")
        assert (wanted.quote, wanted.wanted, wanted.due_at) == (None, 1, None)

        quote = Quote(symbol="AAPL", price=0.1 + 0.2, previous_close=None, as_of=CLOSE, provider="finnhub")
        await quotes.put(replace(wanted, quote=quote, wanted=0, recorded_at=WALL, due_at=CLOSE))

        stored = await quotes.get("AAPL")
        assert (stored.quote, stored.recorded_at, stored.due_at, stored.wanted) == (quote, WALL, CLOSE, 0)

    async def test_nobody_overwrites_a_newer_quote(self, quotes):
        """Of two writers one reads again."""
        await quotes.put(WantedQuote(symbol="AAPL", wanted=1))
        read = await quotes.get("AAPL")
        await quotes.put(replace(read, wanted=2))

        with pytest.raises(StaleError):
            await quotes.put(replace(read, wanted=5))
        with pytest.raises(ConflictError):
            await quotes.put(WantedQuote(symbol="AAPL"))

    async def test_due_quotes_come_longest_due_first(self, quotes):
        """Quotes nobody follows are never due."""
        for symbol, days in (("A", 1), ("B", 0), ("C", 2)):
            await quotes.put(WantedQuote(symbol=symbol, due_at=CLOSE + timedelta(days=days)))
        await quotes.put(WantedQuote(symbol="D", wanted=3))

        assert [q.symbol for q in await quotes.due(CLOSE + timedelta(days=1), 20)] == ["B", "A"]
