import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    NotFoundError,
    RateLimitedError,
    RefusedError,
    StaleError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.market.ingest import (
    BUDGET,
    FIRST_WAIT,
    LONGEST_WAIT,
    OUTAGE_WAIT,
    REPEAT_AFTER,
    Ingest,
    Watch,
    read_watchlist,
)
from shared.market.models import Interval, Quote
from shared.market.sessions import calendar
from shared.market.stores import Bars, Quotes, SeriesStore, WantedQuote
from tests.builders import (
    CLOSE,
    WALL,
    MemoryPublisher,
    RecordedProvider,
    bars_closing_at,
    closes_from,
    daily_bars,
    documents,
    fetcher_of,
)

DAY, HOUR = Interval.DAY, Interval.HOUR
DELAY = timedelta(minutes=15)
MINUTE, SECOND, MICROSECOND = timedelta(minutes=1), timedelta(seconds=1), timedelta(microseconds=1)
BARS = daily_bars(40)
CLOSES = [bar.closed_at for bar in BARS]
AAPL = Watch(symbol="AAPL", interval=DAY)


class House:
    """The market room over one provider, its clocks in our hands; `evaluate` stands for the signals domain."""

    def __init__(self, store, folder, *, live_from=None, wall=None, market=None, provider=None, publisher=None):
        self.store = store
        self.folder = folder
        self.file = folder / "watchlist.toml"
        self.wall = wall or StoppedClock(WALL)
        self.market = market or StoppedClock(CLOSES[9] + DELAY)
        self.provider = provider or RecordedProvider(bars={"AAPL": BARS})
        self.publisher = publisher or MemoryPublisher()
        self.series = SeriesStore(store, self.wall)
        self.bars = Bars(store, self.wall)
        self.quotes = Quotes(store, self.wall)
        self.ingest = Ingest(
            documents=store,
            series=self.series,
            bars=self.bars,
            quotes=self.quotes,
            fetcher=fetcher_of(store, self.wall, self.market, self.provider),
            publisher=self.publisher,
            wall=self.wall,
            market=self.market,
            delay=DELAY,
            live_from=live_from,
            watchlist_file=self.file,
        )
        if not self.file.exists():
            self.list()

    def twin(self):
        """Another instance on the same storage."""
        return House(
            self.store,
            self.folder,
            wall=self.wall,
            market=self.market,
            provider=self.provider,
            publisher=self.publisher,
        )

    def list(self, *symbols, interval="1d"):
        """Write the watchlist file."""
        quoted = ", ".join(f'"{symbol}"' for symbol in symbols)
        self.file.write_text(f'[[watch]]\ninterval = "{interval}"\nsymbols = [{quoted}]\n')

    async def run(self, times=1):
        for _ in range(times):
            await self.ingest.ingest()

    async def get(self, symbol="AAPL", interval=DAY):
        return await self.series.get(symbol, interval)

    async def stored(self, symbol="AAPL", interval=DAY):
        series = await self.get(symbol, interval)
        columns = await Bars(self.store, self.wall).window(series.key, series.revision, since=None, lookback=0)
        return [columns.bar(i) for i in range(len(columns))]

    async def evaluate(self, symbol="AAPL"):
        series, bars = await self.get(symbol), await self.stored(symbol)
        await self.series.save(replace(series, evaluated_through=bars[-1].closed_at))

    async def settle(self):
        """One slot done to its end: fetched, told, evaluated, next slot set."""
        await self.run()
        await self.evaluate()
        await self.run()

    @property
    def told(self):
        """What was said of the bars: symbol, first and last close, how many."""
        return [(e.symbol, e.first_closed_at, e.last_closed_at, e.count) for e in self.publisher.published]


@pytest.fixture
async def store():
    store = documents()
    yield store
    await store.close()


@pytest.fixture
def house(store, tmp_path):
    return House(store, tmp_path)


@pytest.fixture
async def watching(house):
    """A house whose AAPL is stored, told and evaluated through the tenth bar."""
    house.list("AAPL")
    await house.settle()
    assert len(await house.stored()) == 10
    return house


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda _: sleep(0))


class TestSlots:
    async def test_history_comes_first(self, house):
        """A new series is fetched as far back as there is anything, and told as one event."""
        house.list("AAPL")

        assert await house.ingest.ingest() == 1

        assert house.provider.asked == [("AAPL", None)]
        assert await house.stored() == BARS[:10]
        assert house.told == [("AAPL", CLOSES[0], CLOSES[9], 10)]
        event = house.publisher.published[0]
        assert (event.occurred_at, event.recorded_at, event.revision) == (CLOSES[9], WALL, 0)

    async def test_next_slot_is_the_next_close_and_the_delay(self, watching):
        """Nothing is fetched before a bar has closed and the provider may know it; then exactly it is."""
        assert (await watching.get()).due_at == CLOSES[10] + DELAY
        calls = len(watching.provider.asked)

        for at in (CLOSES[9] + timedelta(hours=5), CLOSES[10] - SECOND, CLOSES[10], CLOSES[10] + DELAY - MICROSECOND):
            watching.market.at = at
            assert await watching.ingest.ingest() == 0
        assert len(watching.provider.asked) == calls

        watching.market.at = CLOSES[10] + DELAY
        assert await watching.ingest.ingest() == 1
        assert watching.provider.asked[calls:] == [("AAPL", CLOSES[9])]
        assert watching.told[1:] == [("AAPL", CLOSES[10], CLOSES[10], 1)]

    async def test_slots_slept_through_are_done_at_once(self, watching):
        """What is due follows from what is stored: ten missed days are one fetch and one event, in order."""
        watching.market.at = CLOSES[19] + DELAY

        await watching.run()

        assert await watching.stored() == BARS[:20]
        assert watching.told[1:] == [("AAPL", CLOSES[10], CLOSES[19], 10)]

    async def test_weekend_has_no_slots(self, watching):
        """A slot is a close of the exchange, not a day of the week."""
        friday, tuesday = CLOSES[12], CLOSES[13]
        assert tuesday - friday == timedelta(days=4)  # Martin Luther King's day
        watching.market.at = friday + DELAY
        await watching.settle()

        assert (await watching.get()).due_at == tuesday + DELAY

    async def test_bar_the_provider_cannot_have_yet_is_not_asked_for(self, watching):
        """Whatever makes a series due early, a close within the provider's delay costs no call."""
        watching.market.at = CLOSES[10] + DELAY - SECOND
        await watching.ingest.unwatch(AAPL, by="api")
        await watching.ingest.watch(AAPL, by="api", live_from=watching.market.at)

        await watching.run(3)

        assert len(watching.provider.asked) == 1
        assert (await watching.get()).due_at == CLOSES[10] + DELAY

    async def test_bar_that_has_not_closed_is_no_bar(self, watching):
        """A provider's row of the running session changes until its close and is left out."""
        watching.market.at = CLOSES[11] - MINUTE

        await watching.run()

        assert await watching.stored() == BARS[:11]

    async def test_longest_due_comes_first(self, house):
        """When there is more to do than time, what waits longest is done first."""
        house.provider.history = dict.fromkeys("ABC", BARS)
        for n, symbol in enumerate("CAB"):
            house.market.at = CLOSES[n]
            await house.ingest.watch(Watch(symbol=symbol, interval=DAY), by="api", live_from=CLOSE)

        await house.run()

        assert [symbol for symbol, _ in house.provider.asked] == ["C", "A", "B"]

    async def test_intervals_are_series_of_their_own(self, house):
        """Hours of a symbol are due by the hour, beside its days."""
        hours = bars_closing_at(closes_from(CLOSES[8], 20, interval=HOUR))
        house.provider.history = {"AAPL": hours}
        house.list("AAPL", interval="1h")

        await house.run()

        assert await house.stored(interval=HOUR) == [b for b in hours if b.closed_at <= house.market.at]
        with pytest.raises(NotFoundError):
            await house.get()

    async def test_two_instances_at_once_store_and_mean_the_same(self, house):
        """A timer that runs twice does no harm: the same bars once, the same event ids."""
        series = await house.ingest.watch(AAPL, by="api", live_from=CLOSE)

        await asyncio.gather(house.ingest._slot(series), house.twin().ingest._slot(series))

        assert await house.stored() == BARS[:10]
        assert len(house.provider.asked) == 2
        assert len({event.event_id for event in house.publisher.published}) == 1

    async def test_eight_seconds_are_enough(self, house):
        """A run stops beginning slots after 8 s of the wall; what is left stays due for the next."""
        symbols = [f"S{n:02}" for n in range(30)]
        house.list(*symbols)
        house.provider.history = dict.fromkeys(symbols, BARS)
        ask, begun = house.provider.bars, []

        async def slow(symbol, interval, **how):
            begun.append(house.wall.at)
            answer = await ask(symbol, interval, **how)
            house.wall.at += SECOND / 2
            return answer

        house.provider.bars = slow

        first = await house.ingest.ingest()

        assert max(begun) < WALL + BUDGET
        assert 0 < first < 30
        done = first
        for _ in range(30):
            done += await house.ingest.ingest()
            for symbol in {symbol for symbol, *_ in house.told}:
                await house.evaluate(symbol)
        assert {symbol for symbol, *_ in house.told} == set(symbols)


class TestLateProvider:
    async def test_wait_grows_and_ends_at_the_next_slot(self, watching):
        """A bar the provider has not got is asked for again, later and later, and not after the next bar is due."""
        watching.provider.history["AAPL"] = BARS[:10]
        watching.market.at = begin = CLOSES[10] + DELAY
        waits = []

        while watching.market.at < CLOSES[11] + DELAY:
            asked = watching.market.at
            await watching.run(2)
            series = await watching.get()
            waits.append(series.due_at - asked)
            watching.market.at = series.due_at

        assert waits[:4] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT, 8 * FIRST_WAIT]
        assert watching.market.at == CLOSES[11] + DELAY
        assert sum(waits, begin) == watching.market.at
        assert series.misses == len(waits)
        assert len(watching.provider.asked) == 1 + len(waits)

    async def test_bar_that_came_late_is_a_bar(self, watching):
        """Once it is there it is stored and told, and the misses are forgotten."""
        watching.provider.history["AAPL"] = BARS[:10]
        watching.market.at = CLOSES[10] + DELAY
        await watching.run()
        assert (await watching.get()).misses == 1

        watching.provider.history["AAPL"] = BARS
        watching.market.at += FIRST_WAIT
        await watching.run()

        assert watching.told[1:] == [("AAPL", CLOSES[10], CLOSES[10], 1)]
        assert (await watching.get()).misses == 0

    async def test_provider_without_anything_is_asked_again(self, house):
        """A series that has no bars yet is no error and no busy loop."""
        house.list("AAPL")
        house.provider.history = {}

        await house.run(5)

        assert len(house.provider.asked) == 1
        assert house.told == []
        assert (await house.get()).due_at == house.market.at + FIRST_WAIT


class TestOwedEvents:
    async def test_bars_nobody_evaluated_are_told_again(self, watching):
        """An event that got lost is repeated after 20 s, not before, with the same id, until it was heard."""
        watching.market.at = CLOSES[11] + DELAY
        await watching.run()
        [_, told] = watching.publisher.published

        watching.wall.at += REPEAT_AFTER - MICROSECOND
        await watching.run(3)
        assert len(watching.publisher.published) == 2

        watching.wall.at += MICROSECOND
        await watching.run()
        [_, _, again] = watching.publisher.published
        assert again.event_id == told.event_id
        assert watching.told[2] == ("AAPL", CLOSES[10], CLOSES[11], 2)

        await watching.evaluate()
        watching.wall.at += timedelta(hours=1)
        await watching.run(3)
        assert len(watching.publisher.published) == 3

    async def test_whole_backfill_is_told_again_too(self, house):
        """A first event that got lost leaves no series unevaluated."""
        house.list("AAPL")
        await house.run()
        house.wall.at += REPEAT_AFTER

        await house.run()

        assert house.told == [("AAPL", CLOSES[0], CLOSES[9], 10)] * 2

    async def test_repeating_costs_no_call(self, house):
        """What is stored is told from storage."""
        house.list("AAPL")
        await house.run()
        house.wall.at += REPEAT_AFTER
        await house.run(3)

        assert len(house.provider.asked) == 1

    async def test_topic_that_was_down_is_told_later(self, watching):
        """Bars are stored, then told: what could not be told is kept in mind and told when the topic is back."""
        watching.publisher.failing_with = UnavailableError("the event topic answered 503")
        watching.market.at = CLOSES[10] + DELAY
        await watching.run()
        assert len(await watching.stored()) == 11
        assert (await watching.get()).trouble["kind"] == "UnavailableError"
        assert len(watching.told) == 1

        watching.publisher.failing_with = None
        await watching.run()
        assert len(watching.told) == 1
        watching.wall.at += REPEAT_AFTER
        watching.market.at += OUTAGE_WAIT
        await watching.run()

        assert watching.told[1:] == [("AAPL", CLOSES[10], CLOSES[10], 1)]
        assert len(watching.provider.asked) == 2
        await watching.run()
        assert len(watching.told) == 2, "once in twenty seconds, not at every tick"

    async def test_killed_between_storing_and_telling(self, watching, monkeypatch):
        """A process that dies right after the write leaves everything a successor needs to tell."""

        async def dies(events):
            raise KeyboardInterrupt

        monkeypatch.setattr(watching.publisher, "publish", dies)
        watching.market.at = CLOSES[10] + DELAY
        with pytest.raises(KeyboardInterrupt):
            await watching.ingest._slot(await watching.get())
        monkeypatch.undo()

        watching.wall.at += REPEAT_AFTER
        await watching.twin().run()

        assert watching.told[1:] == [("AAPL", CLOSES[10], CLOSES[10], 1)]


class TestRevision:
    async def test_changed_bar_rewrites_history_under_a_new_revision(self, watching):
        """A provider that says something else about the bar we hold has changed history: all of it is taken again."""
        halved = [
            replace(b, open=b.open / 2, high=b.high / 2, low=b.low / 2, close=b.close / 2, volume=b.volume * 2)
            for b in BARS
        ]
        watching.provider.history["AAPL"] = halved
        watching.market.at = CLOSES[10] + DELAY

        await watching.run()

        series = await watching.get()
        assert series.revision == 1
        assert await watching.stored() == halved[:11]
        assert watching.provider.asked[1:] == [("AAPL", CLOSES[9]), ("AAPL", None)]
        assert watching.told[1:] == [("AAPL", CLOSES[10], CLOSES[10], 1)]
        assert watching.publisher.published[-1].revision == 1
        old = await watching.bars.window(series.key, 0, since=None, lookback=0)
        assert [old.bar(i) for i in range(len(old))] == BARS[:10]

    async def test_rounding_is_no_revision(self, watching):
        """Providers round to four decimals, and not always the same way."""
        last = BARS[9]
        watching.provider.history["AAPL"] = [replace(last, close=last.close + 4e-5), *BARS[10:]]
        watching.market.at = CLOSES[10] + DELAY

        await watching.run()

        assert (await watching.get()).revision == 0
        assert await watching.stored() == BARS[:11]

    async def test_revision_that_was_interrupted_is_made_whole(self, watching, monkeypatch):
        """Pages of a revision nobody points to yet are completed, then the pointer moves."""
        doubled = [replace(b, open=b.open * 2, high=b.high * 2, close=b.close * 2, low=b.low * 2) for b in BARS]
        watching.provider.history["AAPL"] = doubled
        watching.market.at = CLOSES[10] + DELAY
        save = watching.series.save

        async def dies(series):
            if series.revision:
                raise KeyboardInterrupt
            return await save(series)

        monkeypatch.setattr(watching.series, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            await watching.ingest._slot(await watching.get())
        assert await watching.stored() == BARS[:10]
        monkeypatch.undo()
        watching.market.at = CLOSES[11] + DELAY

        await watching.twin().run()

        assert await watching.stored() == doubled[:12]
        assert watching.told[1:] == [("AAPL", CLOSES[10], CLOSES[11], 2)]


class TestTrouble:
    async def test_unknown_symbol_is_kept_as_trouble_and_waits(self, house):
        """What will not succeed is stored with its reason and asked again ever more seldom."""
        house.list("AAPL")
        house.provider.failing_with = UnknownSymbolError("no such symbol")
        waits = []
        for _ in range(9):
            asked = house.market.at
            await house.run(3)
            series = await house.get()
            waits.append(series.due_at - asked)
            house.market.at = series.due_at

        assert (series.trouble["kind"], series.trouble["text"]) == ("UnknownSymbolError", "no such symbol")
        assert waits[:3] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]
        assert max(waits) == waits[-1] == LONGEST_WAIT
        assert len(house.provider.asked) == 9

    @pytest.mark.parametrize("error", [RefusedError("no"), ConfigurationError("FINNHUB_KEY is wrong")])
    async def test_one_series_in_trouble_stops_no_other(self, house, error):
        """Each slot is on its own."""
        house.provider.history["IBM"] = BARS
        house.list("AAPL", "IBM")
        ask = house.provider.bars

        async def bars(symbol, interval, **how):
            if symbol == "AAPL":
                raise error
            return await ask(symbol, interval, **how)

        house.provider.bars = bars

        assert await house.ingest.ingest() == 2

        assert house.told == [("IBM", CLOSES[0], CLOSES[9], 10)]
        assert (await house.get()).trouble["kind"] == type(error).__name__

    @pytest.mark.parametrize(
        ("error", "seconds"),
        [(RateLimitedError("quota", retry_after=timedelta(hours=3)), 10_800)],
        ids=["rate limit"],
    )
    async def test_trouble_that_passes_keeps_the_slot_due(self, house, error, seconds):
        """Nothing is counted as missed: the slot is done as soon as the provider can, and the trouble is forgotten."""
        house.list("AAPL")
        house.provider.failing_with = error
        due_at = house.market.at

        await house.run()

        series = await house.get()
        assert (series.due_at, series.misses) == (due_at, 0)
        assert series.trouble["kind"] == type(error).__name__
        assert series.trouble["retry_after_seconds"] == seconds

        house.provider.failing_with = None
        house.wall.at += timedelta(hours=3)
        await house.run()
        assert (await house.get()).trouble is None
        assert len(await house.stored()) == 10

    async def test_lasting_trouble_is_written_once(self, house):
        """A provider that is down for an hour does not fill storage with the news of it."""
        house.list("AAPL")
        house.provider.failing_with = UnavailableError("down")
        await house.run()
        first = (await house.get()).document.etag

        await house.run(5)

        assert (await house.get()).document.etag == first

    async def test_history_with_a_hole_is_stored_as_it_is(self, house):
        """A row the adapter had to refuse leaves its neighbours alone."""
        house.list("AAPL")
        house.provider.history["AAPL"] = [BARS[0], *BARS[2:12]]

        await house.run()

        assert await house.stored() == [BARS[0], *BARS[2:10]]


class TestWatchlist:
    async def watched(self, house):
        return {s.symbol: s.watched_by for s in await house.series.all() if s.is_active}

    async def test_file_is_applied_once(self, house, monkeypatch):
        """The same file again changes nothing, however often a timer reads it."""
        house.list("AAPL", "IBM")
        await house.ingest.apply_watchlist_file()
        assert await self.watched(house) == {"AAPL": "file", "IBM": "file"}
        before = [await house.store.feed(c) for c in ("series", "quotes", "system")]

        for instance in (house, house.twin()):
            await instance.ingest.apply_watchlist_file()

        assert [await house.store.feed(c) for c in ("series", "quotes", "system")] == before

    async def test_changed_file_has_the_last_word(self, house):
        """What was added is watched, what the file no longer lists is not, what it lists stays as it is."""
        house.list("AAPL", "IBM")
        await house.ingest.apply_watchlist_file()
        kept = await house.get("IBM")

        house.list("IBM", "MSFT")
        await house.ingest.apply_watchlist_file()

        assert await self.watched(house) == {"IBM": "file", "MSFT": "file"}
        assert await house.get("IBM") == kept
        assert (await house.get("AAPL")).due_at is None

    async def test_what_was_added_over_http_is_not_the_files_to_remove(self, house):
        """A file speaks only of what it listed itself."""
        await house.ingest.watch(AAPL, by="api", live_from=CLOSE)
        house.list("IBM")
        await house.ingest.apply_watchlist_file()
        house.list("MSFT")
        await house.ingest.apply_watchlist_file()

        assert await self.watched(house) == {"AAPL": "api", "MSFT": "file"}

    async def test_removal_over_http_holds_although_the_file_lists_it(self, house):
        """The later word counts: an unchanged file does not bring a series back, a changed one does."""
        house.list("AAPL", "IBM")
        await house.run()
        await house.evaluate("AAPL")
        calls = len(house.provider.asked)
        await house.ingest.unwatch(AAPL, by="api")

        house.market.at = CLOSES[15] + DELAY
        await house.run(3)
        assert not (await house.get()).is_active
        assert all(symbol != "AAPL" for symbol, _ in house.provider.asked[calls:])
        assert len(await house.stored()) == 10

        house.list("AAPL", "IBM", "MSFT")
        await house.ingest.apply_watchlist_file()
        assert (await house.get()).is_active

    async def test_watching_again_is_the_same_as_watching(self, house):
        """PUT twice is PUT once."""
        first = await house.ingest.watch(AAPL, by="api", live_from=CLOSE)

        assert await house.ingest.watch(AAPL, by="file", live_from=CLOSE + MINUTE) == first

    async def test_what_closed_while_nobody_watched_raises_nothing(self, watching):
        """A series taken up again is live from then on: its gap is history."""
        before = (await watching.get()).live_from
        await watching.ingest.unwatch(AAPL, by="api")
        watching.market.at = CLOSES[20] + DELAY

        await watching.ingest.watch(AAPL, by="api", live_from=watching.market.at)

        series = await watching.get()
        assert before < series.live_from == watching.market.at
        await watching.run()
        assert await watching.stored() == BARS[:21]

    @pytest.mark.parametrize("live_from", [None, CLOSES[3]], ids=["from now on", "as set"])
    async def test_listed_series_is_live_from(self, store, tmp_path, live_from):
        """LIVE_FROM under replay, else the market instant at which the series was first seen."""
        house = House(store, tmp_path, live_from=live_from)
        house.list("AAPL")
        await house.run()

        assert (await house.get()).live_from == (live_from or house.market.at)

    async def test_never_watched_series_cannot_be_unwatched(self, house):
        """A typo is answered, not ignored."""
        with pytest.raises(NotFoundError, match="AAPL"):
            await house.ingest.unwatch(AAPL, by="api")

    async def test_missing_file_is_named(self, house):
        """The setting and the file, and why it cannot be read."""
        house.file.unlink()

        with pytest.raises(ConfigurationError, match=r"WATCHLIST_FILE: .*watchlist\.toml cannot be read: No such file"):
            await house.ingest.ingest()

    async def test_file_that_is_no_text_is_named(self, house):
        """What an editor saved in another encoding is said to be that."""
        house.file.write_bytes(b"\xff\xfe[[watch]]")

        with pytest.raises(ConfigurationError, match=r"WATCHLIST_FILE: .*watchlist\.toml is no UTF-8"):
            await house.ingest.ingest()

    @pytest.mark.parametrize(
        "text",
        [
            "symbols = [",
            "[[watch]]\nsymbols = ['NO SYMBOL']",
            "[[watch]]\nsymbols = [7]",
            "[[watch]]\nsymbols = 7",
            "[[watch]]\ninterval = '5m'\nsymbols = ['AAPL']",
            "[[watch]]\ninterval = 7\nsymbols = ['AAPL']",
            "[[watch]]\ninterval = '1d'",
            "watch = 7",
            "watch = ['AAPL']",
            "[watch]\nsymbols = ['AAPL']",
            "[[watch]]\nsymbols = 'AAPL'",
            "[[wacth]]\nsymbols = ['AAPL']",
            "[[watch]]\nsymbols = ['AAPL']\nintreval = '1h'",
        ],
    )
    async def test_wrong_file_is_named_and_changes_nothing(self, house, text):
        """An operator reads which file it is and how it should look; nothing of it is half applied."""
        house.file.write_text(text)

        with pytest.raises(ConfigurationError, match=r"watchlist\.toml: .*\[\[watch\]\]"):
            await house.ingest.ingest()

        assert await house.series.all() == []

    def test_file_may_list_nothing_or_twice(self):
        """An empty file watches nothing; a day is the interval unless told."""
        assert read_watchlist("", "f") == []
        assert read_watchlist("[[watch]]\nsymbols = [' aapl', 'BRK.B']", "f") == [
            AAPL,
            Watch(symbol="BRK.B", interval=DAY),
        ]


class TestQuotes:
    SESSION = calendar().session(CLOSES[10].date())

    @pytest.fixture
    async def quoting(self, house):
        """A house that follows AAPL, in the middle of a session."""
        house.provider.quotes = {
            "AAPL": Quote(symbol="AAPL", price=101.0, previous_close=100.0, as_of=CLOSE, provider="alpha_vantage")
        }
        house.market.at = self.SESSION.opens_at + timedelta(hours=1)
        await house.ingest.watch(AAPL, by="api", live_from=CLOSE)
        return house

    async def test_watched_symbol_has_its_quote_refreshed(self, quoting):
        """Every 15 minutes of an open session, and not in between."""
        assert await quoting.ingest.refresh_quotes() == 1
        stored = await quoting.quotes.get("AAPL")
        assert (stored.quote.price, stored.recorded_at) == (101.0, WALL)

        quoting.market.at += FIRST_WAIT - SECOND
        assert await quoting.ingest.refresh_quotes() == 0
        quoting.market.at += SECOND
        assert await quoting.ingest.refresh_quotes() == 1

    async def test_once_after_the_session_and_then_at_the_next_open(self, quoting):
        """The last price of a day is fetched once; nights and weekends cost nothing."""
        quoting.market.at = self.SESSION.closes_at
        assert await quoting.ingest.refresh_quotes() == 1

        opens_at = calendar().session(CLOSES[11].date()).opens_at
        quoting.market.at = opens_at - SECOND
        assert await quoting.ingest.refresh_quotes() == 0
        quoting.market.at = opens_at
        assert await quoting.ingest.refresh_quotes() == 1

    async def test_earlier_interest_does_not_stop_a_watched_quote(self, house):
        """Somebody who asked for a quote before anybody watched the symbol has left a note, not a full stop."""
        await house.quotes.put(WantedQuote(symbol="AAPL", wanted=3))

        await house.ingest.watch(AAPL, by="api", live_from=CLOSE)

        wanted = await house.quotes.get("AAPL")
        assert (wanted.due_at, wanted.wanted) == (house.market.at, 3)

    async def test_quote_of_a_symbol_nobody_watches_costs_nothing(self, quoting):
        """With its last series a symbol's quote is no longer fetched; taken up again, it is."""
        hourly = Watch(symbol="AAPL", interval=HOUR)
        await quoting.ingest.watch(hourly, by="api", live_from=CLOSE)
        await quoting.ingest.unwatch(AAPL, by="api")
        assert await quoting.ingest.refresh_quotes() == 1

        quoting.market.at += FIRST_WAIT
        await quoting.ingest.unwatch(hourly, by="api")
        assert await quoting.ingest.refresh_quotes() == 0
        assert (await quoting.quotes.get("AAPL")).quote.price == 101.0

        await quoting.ingest.watch(AAPL, by="api", live_from=CLOSE)
        assert await quoting.ingest.refresh_quotes() == 1

    async def test_refused_quote_waits_a_day_and_stops_no_other(self, quoting):
        """A symbol without quotes is asked once a day; the others come as usual."""
        quoting.market.at += SECOND
        for symbol in ("IBM", "MSFT"):
            await quoting.ingest.watch(Watch(symbol=symbol, interval=DAY), by="api", live_from=CLOSE)
        quote, asked = quoting.provider.quote, []

        async def refusing(symbol):
            asked.append(symbol)
            if symbol == "AAPL":
                raise UnknownSymbolError("no quotes of it")
            return replace(quoting.provider.quotes["AAPL"], symbol=symbol)

        quoting.provider.quote = refusing

        assert await quoting.ingest.refresh_quotes() == 2
        assert (await quoting.quotes.get("AAPL")).due_at == quoting.market.at + LONGEST_WAIT
        assert asked == ["AAPL", "IBM", "MSFT"]
        quoting.provider.quote = quote

    async def test_trouble_that_passes_ends_the_round(self, quoting):
        """A provider that is down is not asked for every other symbol too; all stay due."""
        await quoting.ingest.watch(Watch(symbol="IBM", interval=DAY), by="api", live_from=CLOSE)
        quoting.provider.failing_with = RateLimitedError("quota", retry_after=timedelta(minutes=1))

        assert await quoting.ingest.refresh_quotes() == 0

        assert len(quoting.provider.quotes_asked) == 1
        assert len(await quoting.quotes.due(quoting.market.at, 10)) == 2

    @pytest.mark.parametrize("error", [None, RefusedError("no")], ids=["fetched", "refused"])
    async def test_reader_who_is_faster_does_no_harm(self, quoting, monkeypatch, error):
        """Interest noted while a quote is fetched makes one of the two read again, never fail."""
        quoting.provider.failing_with = error
        put = quoting.quotes.put

        async def beaten(wanted):
            monkeypatch.setattr(quoting.quotes, "put", put)
            raise StaleError("a reader noted interest")

        monkeypatch.setattr(quoting.quotes, "put", beaten)

        assert await quoting.ingest.refresh_quotes() == 0
        assert len(await quoting.quotes.due(quoting.market.at, 10)) == 1
