import asyncio
from dataclasses import replace
from datetime import date, timedelta

import pytest

from shared.clock import MarketClock, MarketTime, StoppedClock
from shared.errors import (
    ConfigurationError,
    NotEntitledError,
    NotFoundError,
    RateLimitedError,
    RefusedError,
    StaleError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.inbound import DeadLetters
from shared.market.actions import Actions, Provenance
from shared.market.earnings import AFTER_CLOSE, AFTER_OPEN, Earnings
from shared.market.events import EarningsReported
from shared.market.health import FIRST_WAIT as BREAKER_WAIT
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
from shared.market.models import Adjustment, CorporateAction, EarningsDate, Interval, Priority, Quote, ReportTime
from shared.market.sessions import calendar
from shared.market.stores import Bars, Quotes, SeriesStore, WantedQuote
from shared.outbox import Outbox
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
THANKSGIVING = date(2012, 11, 22)


class Seller(RecordedProvider):
    """Sells splits, dividends and the earnings calendar as well, and counts every call of whatever kind."""

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.actions_known, self.reports = [], []
        self.actions_asked, self.earnings_asked = [], []
        self.trouble = None

    async def actions(self, symbol, *, turn):
        self.actions_asked.append(symbol)
        async with turn("actions"):
            await self._react()
        return [a for a in self.actions_known if a.symbol == symbol]

    async def earnings(self, *, first, last, turn, symbol=None):
        self.earnings_asked.append((first, last))
        async with turn("earnings"):
            if self.trouble:
                raise self.trouble
            await self._react()
        return [r for r in self.reports if first <= r.day <= last]

    @property
    def calls_made(self):
        return len(self.asked) + len(self.quotes_asked) + len(self.actions_asked) + len(self.earnings_asked)


class Noting:
    """A fetcher that notes how urgent each request for bars and quotes is."""

    def __init__(self, fetcher):
        self._fetcher = fetcher
        self.how = []

    def __getattr__(self, name):
        return getattr(self._fetcher, name)

    async def bars(self, symbol, interval, *, priority=Priority.LIVE, deadline, **how):
        self.how.append((symbol, priority, deadline))
        return await self._fetcher.bars(symbol, interval, priority=priority, deadline=deadline, **how)

    async def quote(self, symbol, *, priority, deadline):
        self.how.append((symbol, priority, deadline))
        return await self._fetcher.quote(symbol, priority=priority, deadline=deadline)


class House:
    """The market room over one provider, its clocks in our hands; `evaluate` stands for the signals domain."""

    def __init__(
        self, store, folder, *, live_from=None, wall=None, market=None, provider=None, publisher=None, others=()
    ):
        self.store = store
        self.folder = folder
        self.file = folder / "watchlist.toml"
        self.wall = wall or StoppedClock(WALL)
        self.market = market or StoppedClock(CLOSES[9] + DELAY)
        self.provider = provider or Seller(bars={"AAPL": BARS})
        self.others = others
        self.publisher = publisher or MemoryPublisher()
        self.series = SeriesStore(store, self.wall)
        self.bars = Bars(store, self.wall)
        self.quotes = Quotes(store, self.wall)
        self.ingest = Ingest(
            documents=store,
            series=self.series,
            bars=self.bars,
            quotes=self.quotes,
            fetcher=fetcher_of(store, self.wall, self.market, self.provider, *self.others),
            publisher=self.publisher,
            wall=self.wall,
            market=self.market,
            delay=DELAY,
            live_from=live_from,
            watchlist_file=self.file,
            actions=Actions(store, self.wall),
            provenance=Provenance(store, self.wall),
            earnings=Earnings(store, self.wall),
        )
        self.ingest.fetcher.sleep = self.at_once
        if not self.file.exists():
            self.list()

    @staticmethod
    async def at_once(_):
        """A hiccup of a provider passes without anybody waiting for it."""

    def twin(self):
        """Another instance on the same storage."""
        return House(
            self.store,
            self.folder,
            wall=self.wall,
            market=self.market,
            provider=self.provider,
            publisher=self.publisher,
            others=self.others,
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
        assert watching.provider.asked[calls:] == [("AAPL", CLOSES[7])], "the last three bars are looked at again"
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

    @pytest.mark.parametrize("before", [SECOND, MICROSECOND])
    async def test_bar_closes_at_its_close_and_not_before(self, store, tmp_path, before):
        """To the microsecond: a row of the running session is stored only once the session is over."""
        house = House(store, tmp_path, market=StoppedClock(CLOSES[10] - before))
        house.list("AAPL")
        await house.run()
        assert await house.stored() == BARS[:10]

        house.market.at = CLOSES[10]
        [series] = await house.series.all()
        await house.ingest._ingest(series, look=True)
        assert await house.stored() == BARS[:11]

    async def test_closed_market_costs_no_call(self, store, tmp_path):
        """Over a holiday, a half day and a weekend there are calls in the open hours and once after each close."""
        closes = closes_from(calendar().session(THANKSGIVING - timedelta(days=15)).closes_at, 20)
        quote = Quote(symbol="AAPL", price=1.0, previous_close=None, as_of=closes[0], provider="alpha_vantage")
        wednesday = calendar().session(THANKSGIVING - timedelta(days=1))
        friday = calendar().session(THANKSGIVING + timedelta(days=1))
        assert calendar().session(THANKSGIVING) is None
        assert friday.closes_at - friday.opens_at == timedelta(hours=3, minutes=30)
        provider = Seller(bars={"AAPL": bars_closing_at(closes)}, quotes={"AAPL": quote})
        house = House(store, tmp_path, market=StoppedClock(wednesday.opens_at - FIRST_WAIT), provider=provider)
        house.list("AAPL")
        await house.settle()
        await house.ingest.refresh_quotes()
        calls, hours = provider.calls_made, []
        monday = calendar().next_close(friday.closes_at)
        while house.market.at < monday.opens_at - FIRST_WAIT:
            house.market.at += FIRST_WAIT
            house.wall.at += FIRST_WAIT
            await house.run()
            await house.ingest.refresh_quotes()
            if provider.calls_made > calls:
                hours.append(house.market.at)
                await house.evaluate()
            calls = provider.calls_made

        open_hours = [s.opens_at + n * FIRST_WAIT for s in (wednesday, friday) for n in range(27)]
        open_hours = [at for at in open_hours if at <= wednesday.closes_at or friday.opens_at <= at <= friday.closes_at]
        assert hours == sorted([*open_hours, wednesday.closes_at + DELAY, friday.closes_at + DELAY])
        assert len(provider.earnings_asked) == 2, "the calendar once a market day"
        assert [b.closed_at for b in await house.stored()][-2:] == [wednesday.closes_at, friday.closes_at]

    async def test_first_history_gives_way_to_what_is_live(self, house):
        """What people wait for goes first: new bars are live, the first fill of a series is backfill."""
        house.ingest = replace(house.ingest, fetcher=Noting(house.ingest.fetcher))
        house.list("AAPL")
        await house.settle()
        house.market.at = CLOSES[10] + DELAY
        await house.run()

        assert house.ingest.fetcher.how == [
            ("AAPL", Priority.BACKFILL, WALL + BUDGET),
            ("AAPL", Priority.LIVE, WALL + BUDGET),
        ]

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

    async def test_bars_nobody_can_use_are_told_ever_more_seldom(self, watching):
        """Each wait is as long as all before it: a day of trouble is a dozen events and not thousands."""
        watching.market.at = CLOSES[10] + DELAY
        await watching.run()
        begun, after = watching.wall.at, []
        for _ in range(200):
            watching.wall.at += REPEAT_AFTER
            await watching.run()
            if len(watching.told) - 2 > len(after):
                after.append((watching.wall.at - begun) / REPEAT_AFTER)

        assert after == [1, 2, 4, 8, 16, 32, 64, 128]

    async def test_refused_event_is_buried_and_holds_up_no_later_bar(self, house):
        """The series goes on; the bars of the event that was refused are evaluated with those behind them."""
        letters = DeadLetters(house.store, house.wall)
        house = House(house.store, house.folder, wall=house.wall, publisher=Outbox(house.publisher, letters, "market"))
        topic = house.publisher._publisher
        house.list("AAPL")
        topic.failing_with = RefusedError("the event topic answered 400")
        await house.run()
        house.market.at = CLOSES[10] + DELAY
        house.wall.at += REPEAT_AFTER
        await house.run()
        topic.failing_with = None
        house.market.at = CLOSES[11] + DELAY
        await house.run()

        assert len(await house.stored()) == 12
        assert (await house.get()).trouble is None
        assert [(e.first_closed_at, e.last_closed_at) for e in topic.published] == [(CLOSES[11], CLOSES[11])]
        found = await letters.newest(after=None, limit=10)
        assert {letter.partition for letter in found} == {"market"}
        assert {letter.body["event"]["data"]["count"] for letter in found} == {1, 10}

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


def scaled(bars, price, volume=1.0):
    """The same bars at another price and volume."""
    return [
        replace(b, open=b.open * price, high=b.high * price, low=b.low * price, close=b.close * price)
        if volume == 1.0
        else replace(
            b,
            open=b.open * price,
            high=b.high * price,
            low=b.low * price,
            close=b.close * price,
            volume=b.volume * volume,
        )
        for b in bars
    ]


def corrected(index, **changes):
    """The recorded bars, one of which the provider corrected."""
    return [replace(b, **changes) if i == index else b for i, b in enumerate(BARS)]


class TestRevision:
    @pytest.fixture
    async def adjusted(self, store, tmp_path):
        """A house whose AAPL is stored through the tenth bar, from a provider that divides by later splits."""
        house = House(store, tmp_path, provider=Seller(bars={"AAPL": BARS}, adjustment=Adjustment.SPLIT))
        house.list("AAPL")
        await house.settle()
        return house

    async def test_split_rewrites_adjusted_history_under_a_new_revision(self, adjusted):
        """Prices that are divided by later splits all change with one: all of them are taken again."""
        split = CorporateAction(symbol="AAPL", day=CLOSES[10].date(), split=2.0, dividend=0.0, provider="alpha_vantage")
        halved = scaled(BARS, 0.5, 2.0)
        adjusted.provider.history["AAPL"] = halved
        adjusted.provider.actions_known = [split]
        adjusted.market.at = CLOSES[10] + DELAY

        await adjusted.run()

        series = await adjusted.get()
        assert series.revision == 1
        assert await adjusted.stored() == halved[:11]
        assert adjusted.provider.asked[1:] == [("AAPL", CLOSES[7]), ("AAPL", CLOSES[0] - MINUTE)]
        assert adjusted.told[1:] == [("AAPL", CLOSES[10], CLOSES[10], 1)]
        assert adjusted.publisher.published[-1].revision == 1
        old = await adjusted.bars.window(series.key, 0, since=None, lookback=0)
        assert [old.bar(i) for i in range(len(old))] == BARS[:10]
        assert await adjusted.ingest.actions.get("AAPL") == [split]
        [change] = await adjusted.ingest.provenance.of(series)
        assert (change.kind, change.provider, change.revision) == ("revision", "alpha_vantage", 1)
        assert change.splits == [(split.day, 2.0)]
        assert f"{CLOSES[7]:%Y-%m-%d}" in change.reason

    async def test_split_is_believed_although_nobody_tells_of_it(self, adjusted):
        """Where all older prices moved by one factor that is enough: nobody has to sell corporate actions."""
        adjusted.provider.history["AAPL"] = [*scaled(BARS[:10], 0.2), *BARS[10:]]
        adjusted.provider.actions_known = []
        adjusted.market.at = CLOSES[10] + DELAY

        await adjusted.run()

        assert (await adjusted.get()).revision == 1
        assert (await adjusted.stored())[:10] == scaled(BARS[:10], 0.2)

    async def test_revision_waits_a_little_for_who_knows_the_splits(self, adjusted):
        """Corporate actions that cannot be had for a moment are asked for again; an outage holds nothing up."""
        adjusted.provider.history["AAPL"] = scaled(BARS, 0.5)
        adjusted.market.at = CLOSES[10] + DELAY

        async def down(symbol, *, turn):
            adjusted.provider.actions_asked.append(symbol)
            raise UnavailableError("down")

        adjusted.provider.actions = down
        for _ in range(4):
            assert (await adjusted.get()).revision == 0
            await adjusted.run()
            adjusted.market.at = max(adjusted.market.at, (await adjusted.get()).due_at)

        assert (await adjusted.get()).revision == 1
        assert len(adjusted.provider.actions_asked) == 4

    async def test_history_that_is_another_is_not_believed(self, adjusted):
        """A provider that suddenly sells another company's prices changes nothing, and the series says why."""
        others = bars_closing_at(CLOSES, [300.0 + 17 * (i % 5) for i in range(len(BARS))])
        adjusted.provider.history["AAPL"] = others
        adjusted.market.at = CLOSES[10] + DELAY

        await adjusted.run()

        series = await adjusted.get()
        assert (series.revision, series.claimed) == (0, 0)
        assert await adjusted.stored() == BARS[:10]
        assert series.trouble["kind"] == "RefusedError"
        assert "10 of 10 closes are not what they were" in series.trouble["text"]
        assert await adjusted.ingest.provenance.of(series) == []

    @pytest.mark.parametrize("lost", ["beginning", "end"])
    async def test_shorter_history_is_not_believed(self, adjusted, lost):
        """What is held is not given up for less."""
        halved = scaled(BARS, 0.5)
        increment = adjusted.provider.bars

        async def shortened(symbol, interval, *, since, **how):
            answer = await increment(symbol, interval, since=since, **how)
            if since == CLOSES[7]:
                return answer
            kept = CLOSES[3:] if lost == "beginning" else CLOSES[:6]
            return replace(answer, bars=[b for b in answer.bars if b.closed_at in kept])

        adjusted.provider.history["AAPL"] = halved
        adjusted.provider.bars = shortened
        adjusted.market.at = CLOSES[10] + DELAY

        await adjusted.run()

        series = await adjusted.get()
        assert (await adjusted.stored(), series.revision) == (BARS[:10], 0)
        assert ("begins after" if lost == "beginning" else "ends before") in series.trouble["text"]

    @pytest.mark.parametrize("index", [7, 8, 9])
    @pytest.mark.parametrize("changes", [{"close": 100.5}, {"volume": 2001.0}], ids=["close", "volume"])
    async def test_each_of_the_last_three_bars_is_compared(self, watching, index, changes):
        """A correction of any of them is found with the next increment, and written under the next revision."""
        history = corrected(index, **({"close": BARS[index].close + 0.5} if "close" in changes else changes))
        watching.provider.history["AAPL"] = history
        watching.market.at = CLOSES[10] + DELAY

        await watching.run()

        assert (await watching.get()).revision == 1
        assert await watching.stored() == history[:11]

    @pytest.mark.parametrize(
        "changes", [{"close": BARS[9].close + 4e-5}, {"volume": 1900.0}], ids=["rounding", "late trades"]
    )
    async def test_rounding_and_late_trades_are_no_revision(self, watching, changes):
        """Providers round to four decimals, and not always the same way; volume grows a little after the close."""
        watching.provider.history["AAPL"] = corrected(9, **changes)
        watching.market.at = CLOSES[10] + DELAY

        await watching.run()

        assert (await watching.get()).revision == 0
        assert await watching.stored() == BARS[:11]
        assert watching.provider.actions_asked == []

    async def test_old_bars_as_traded_are_kept_where_the_provider_sells_them_no_more(self, watching):
        """Raw prices of which it says nothing now are as true as ever."""
        history = corrected(9, close=BARS[9].close + 0.5)
        watching.provider.history["AAPL"] = history[4:]
        watching.market.at = CLOSES[10] + DELAY

        await watching.run()

        assert await watching.stored() == [*BARS[:4], *history[4:11]]

    async def test_raw_history_does_not_change_all_at_once(self, watching):
        """A provider that begins to divide what it sells as traded is not believed: the two never mix."""
        watching.provider.history["AAPL"] = scaled(BARS, 0.5)
        watching.market.at = CLOSES[10] + DELAY

        await watching.run()

        assert await watching.stored() == BARS[:10]
        assert "prices as traded do not change" in (await watching.get()).trouble["text"]

    async def test_answer_with_another_adjustment_is_refused(self, watching):
        """What a series holds is raw or adjusted for ever; an answer of the other kind is trouble that is stored."""
        watching.provider.adjustment = Adjustment.SPLIT
        watching.market.at = CLOSES[10] + DELAY

        await watching.run()

        series = await watching.get()
        assert await watching.stored() == BARS[:10]
        assert series.adjustment is Adjustment.RAW
        assert series.trouble["kind"] == "RefusedError"
        assert "never mix" in series.trouble["text"]

    async def test_split_marks_that_are_held_outlive_a_correction(self, store, tmp_path):
        """A provider that does not repeat which day was split does not take that knowledge away."""
        split = [replace(b, split=2.0) if i == 5 else b for i, b in enumerate(BARS)]
        house = House(store, tmp_path, provider=Seller(bars={"AAPL": split}))
        house.list("AAPL")
        await house.settle()
        house.provider.history["AAPL"] = corrected(8, close=BARS[8].close + 0.5)
        house.market.at = CLOSES[10] + DELAY

        await house.run()

        stored = await house.stored()
        assert stored[8].close == BARS[8].close + 0.5
        assert [b.split for b in stored] == [2.0 if i == 5 else 1.0 for i in range(11)]

    async def test_stored_split_is_marked_where_the_provider_does_not_tell_it(self, watching):
        """Bars as traded without a split column: the first bar in new shares carries the factor we were told."""
        told = CorporateAction(symbol="AAPL", day=CLOSES[10].date(), split=2.0, dividend=0.0, provider="polygon")
        await watching.ingest.actions.keep("AAPL", [told])
        halved = scaled(BARS[10:], 0.5)
        watching.provider.history["AAPL"] = [*BARS[:10], *halved]
        watching.market.at = CLOSES[11] + DELAY

        await watching.run()

        assert [b.split for b in await watching.stored()] == [1.0] * 10 + [2.0, 1.0]
        assert (await watching.get()).revision == 0

    async def test_revision_that_was_interrupted_is_done_again(self, watching, monkeypatch):
        """Pages of a revision nobody points to are never read; the next attempt writes under a revision of its own."""
        history = corrected(9, close=BARS[9].close + 0.5)
        watching.provider.history["AAPL"] = history
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
        history[3] = replace(history[3], close=history[3].close - 0.5)
        watching.market.at = CLOSES[11] + DELAY

        await watching.twin().run()

        series = await watching.get()
        assert await watching.stored() == history[:12]
        assert (series.revision, series.claimed) == (2, 2)
        assert watching.told[1:] == [("AAPL", CLOSES[10], CLOSES[11], 2)]
        assert [c.revision for c in await watching.ingest.provenance.of(series)] == [2]

    async def test_long_history_is_taken_again_slice_by_slice(self, watching):
        """A provider that cuts a long answer is asked on from where it stopped."""
        history = corrected(9, close=BARS[9].close + 0.5)
        watching.provider.history["AAPL"] = history
        sell = watching.provider.bars

        async def sliced(symbol, interval, *, since, **how):
            answer = await sell(symbol, interval, since=since, **how)
            return replace(answer, bars=answer.bars[:5])

        watching.provider.bars = sliced
        watching.market.at = CLOSES[10] + DELAY

        await watching.run()

        assert await watching.stored() == history[:11]
        assert [since for _, since in watching.provider.asked[2:]] == [CLOSES[0] - MINUTE, CLOSES[4], CLOSES[8]]


class TestProviderChange:
    """The provider of a series is gone for good: another goes on, if it says the same of the bars that are held."""

    @pytest.fixture
    async def two(self, store, tmp_path):
        """A house that holds ten bars of alpha_vantage, and polygon beside it."""
        other = Seller("polygon", bars={"AAPL": BARS})
        house = House(store, tmp_path, provider=Seller(bars={"AAPL": BARS}), others=[other])
        house.list("AAPL")
        await house.settle()
        assert (await house.get()).provider == "alpha_vantage"
        house.market.at = CLOSES[10] + DELAY
        return house

    @pytest.mark.parametrize(
        "gone",
        [NotEntitledError("a premium endpoint"), UnknownSymbolError("delisted there"), ConfigurationError("wrong key")],
        ids=lambda e: type(e).__name__,
    )
    async def test_series_moves_to_who_agrees(self, two, gone):
        """It goes on at once with the next bar, and from whom its bars are is written down."""
        two.provider.failing_with = gone

        await two.run()

        series = await two.get()
        assert await two.stored() == BARS[:11]
        assert (series.provider, series.trouble, series.revision) == ("polygon", None, 0)
        [change] = await two.ingest.provenance.of(series)
        assert (change.kind, change.former, change.provider) == ("provider", "alpha_vantage", "polygon")
        assert (change.through, change.occurred_at, change.recorded_at) == (CLOSES[9], two.market.at, WALL)
        assert str(gone) in change.reason
        assert two.told[1:] == [("AAPL", CLOSES[10], CLOSES[10], 1)]

        await two.evaluate()
        two.provider.asked.clear()
        two.market.at = CLOSES[11] + DELAY
        await two.run()
        assert await two.stored() == BARS[:12]
        assert two.provider.asked == []

    async def test_series_stays_where_the_other_says_something_else(self, two):
        """Nothing is mixed; why it waits is in its trouble, with both values."""
        two.provider.failing_with = NotEntitledError("a premium endpoint")
        two.others[0].history["AAPL"] = scaled(BARS, 0.25)

        await two.run()

        series = await two.get()
        assert (series.provider, await two.stored()) == ("alpha_vantage", BARS[:10])
        assert series.trouble["kind"] == "NotEntitledError"
        for said in ("a premium endpoint", "polygon", "is 27, ours 108"):
            assert said in series.trouble["text"]
        assert await two.ingest.provenance.of(series) == []

    async def test_raw_series_never_goes_on_with_adjusted_bars(self, two):
        """Where there was no split the closes agree, and still the two never mix."""
        two.provider.failing_with = NotEntitledError("a premium endpoint")
        two.others[0].adjustment = Adjustment.SPLIT

        await two.run()

        series = await two.get()
        assert (series.provider, await two.stored()) == ("alpha_vantage", BARS[:10])
        assert "never mix" in series.trouble["text"]

    async def test_who_has_nothing_newer_gets_no_series(self, two):
        """Moving is for good, so it has to bring the bar that is missing."""
        two.provider.failing_with = NotEntitledError("a premium endpoint")
        two.others[0].history["AAPL"] = BARS[:10]

        await two.run()

        series = await two.get()
        assert series.provider == "alpha_vantage"
        assert "nothing newer" in series.trouble["text"]

    async def test_what_two_providers_round_differently_is_no_revision(self, two):
        """Bars that the former provider brought are compared as those of two are; later ones to the last cent."""
        two.others[0].history["AAPL"] = [
            replace(b, close=b.close * (1 + 4e-4), high=b.high + 1, volume=b.volume * 5) for b in BARS
        ]
        two.provider.failing_with = NotEntitledError("a premium endpoint")
        await two.run()
        assert (await two.get()).provider == "polygon"
        for day in (11, 12, 13, 14):
            await two.evaluate()
            two.market.at = CLOSES[day] + DELAY
            await two.run()
        assert (await two.get()).revision == 0
        assert [b.close for b in await two.stored()] == [
            *(b.close for b in BARS[:10]),
            *(b.close * (1 + 4e-4) for b in BARS[10:15]),
        ]

        two.others[0].history["AAPL"] = [
            replace(b, close=b.close * (1 + 4e-4) + (0.02 if i == 14 else 0), high=b.high + 1, volume=b.volume * 5)
            for i, b in enumerate(BARS)
        ]
        await two.evaluate()
        two.market.at = CLOSES[15] + DELAY
        await two.run()
        assert (await two.get()).revision == 1, "a correction of its own bars is found"

    async def test_short_outage_moves_nothing(self, two):
        """A provider that is down for a moment is waited for."""
        two.provider.failing_with = UnavailableError("down")

        for _ in range(3):
            await two.run()
            two.market.at = (await two.get()).due_at
            two.wall.at += timedelta(seconds=1)

        series = await two.get()
        assert series.provider == "alpha_vantage"
        assert two.others[0].asked == []

    async def test_long_outage_moves_the_series(self, two):
        """Once the breaker has kept it away at three slots in a row, or for minutes, somebody else is asked."""
        two.provider.failing_with = UnavailableError("down")
        for _ in range(12):
            await two.run()
            if (await two.get()).provider == "polygon":
                break
            two.market.at = (await two.get()).due_at
            two.wall.at += BREAKER_WAIT / 4

        assert (await two.get()).provider == "polygon"
        assert await two.stored() == BARS[:11]

    async def test_who_disagrees_is_not_asked_at_every_slot_of_an_outage(self, two):
        """Each time costs a call: at every third slot that was missed is often enough."""
        two.provider.failing_with = UnavailableError("down")
        two.others[0].history["AAPL"] = scaled(BARS, 0.25)
        left_alone = 0
        for _ in range(20):
            two.wall.at += SECOND
            await two.run()
            series = await two.get()
            left_alone += series.trouble["kind"] == "LeftAloneError"
            two.market.at = series.due_at

        assert left_alone >= 12
        assert 3 <= len(two.others[0].asked) <= left_alone // 3 + 1
        assert (await two.get()).provider == "alpha_vantage"

    async def test_series_without_bars_belongs_to_nobody_yet(self, two):
        """A provider that was written down and then never brought a bar holds nothing back."""
        await two.ingest.watch(Watch(symbol="IBM", interval=DAY), by="api", live_from=CLOSE)
        two.others[0].history["IBM"] = BARS
        two.provider.failing_with = NotEntitledError("a premium endpoint")
        series = await two.get("IBM")
        await two.series.save(replace(series, provider="alpha_vantage", adjustment=Adjustment.RAW))

        await two.run()

        assert (await two.get("IBM")).provider == "polygon"
        assert len(await two.stored("IBM")) == 11


class TestTrouble:
    async def test_outage_at_the_end_of_the_market_is_outlived(self, house):
        """A market that stands still brings no later instant: what was put off is due again at once."""
        house.list("AAPL")
        end = MarketTime(market=house.market.at, wall=WALL, speed=86_400, end=house.market.at)
        house.ingest = replace(house.ingest, market=MarketClock(house.wall, end))
        house.provider.failing_with = UnavailableError("down")
        await house.run(2)
        house.provider.failing_with = None

        house.wall.at += timedelta(minutes=1)
        await house.run()

        assert len(await house.stored()) == 10

    async def test_unknown_symbol_is_kept_as_trouble_and_waits(self, house):
        """What will not succeed is stored with its reason and tried ever more seldom, and asked for once a day."""
        house.list("AAPL")
        house.provider.failing_with = UnknownSymbolError("no such symbol")
        waits = []
        for _ in range(9):
            asked = house.market.at
            await house.run(3)
            series = await house.get()
            waits.append(series.due_at - asked)
            house.market.at = series.due_at

        assert series.trouble["kind"] == "UnknownSymbolError"
        assert waits[:3] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]
        assert max(waits) == waits[-1] == LONGEST_WAIT
        assert len(house.provider.asked) == 1, "it stays in mind who knows no such symbol"

        house.wall.at += timedelta(days=1)
        await house.run()
        assert len(house.provider.asked) == 2
        assert (await house.get()).trouble["text"] == "no such symbol"

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

        async def refusing(symbol, *, turn):
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

    async def test_quote_somebody_asked_for_goes_first(self, quoting):
        """A quote that nobody asked for lately is fetched with what is left; each within the time of the round."""
        await quoting.ingest.watch(Watch(symbol="IBM", interval=DAY), by="api", live_from=CLOSE)
        quoting.provider.quotes["IBM"] = replace(quoting.provider.quotes["AAPL"], symbol="IBM")
        await quoting.quotes.interest.note("IBM")
        quoting.ingest = replace(quoting.ingest, fetcher=Noting(quoting.ingest.fetcher))

        await quoting.ingest.refresh_quotes()

        how = quoting.ingest.fetcher.how
        assert sorted(how) == [("AAPL", Priority.BACKFILL, WALL + BUDGET), ("IBM", Priority.LIVE, WALL + BUDGET)]

        how.clear()
        quoting.wall.at += timedelta(hours=3)
        quoting.market.at += FIRST_WAIT
        await quoting.ingest.refresh_quotes()
        assert {priority for _, priority, _ in how} == {Priority.BACKFILL}, "interest is forgotten"


REPORTED = CLOSES[10].date()


def a_report(symbol="AAPL", day=REPORTED, time=ReportTime.AFTER_CLOSE):
    return EarningsDate(
        symbol=symbol,
        day=day,
        time=time,
        eps_estimate=1.5,
        eps_actual=None,
        revenue_estimate=None,
        revenue_actual=None,
        provider="alpha_vantage",
    )


def out(symbol="AAPL", *, at, day=REPORTED, eps=1.62):
    """The event that a company has reported."""
    return EarningsReported(
        occurred_at=at,
        recorded_at=WALL,
        symbol=symbol,
        day=day,
        eps_estimate=1.5,
        eps_actual=eps,
        revenue_estimate=None,
        revenue_actual=None,
        provider="finnhub",
    )


class TestReports:
    """On the day of a report its symbol gets a slot more."""

    SESSION = calendar().session(CLOSES[10].date())

    @pytest.fixture
    async def open(self, watching):
        """AAPL is followed, and the market opens."""
        watching.provider.quotes = {
            "AAPL": Quote(symbol="AAPL", price=101.0, previous_close=100.0, as_of=CLOSE, provider="alpha_vantage")
        }
        watching.market.at = self.SESSION.opens_at
        return watching

    async def through(self, house, until):
        """Run both timers every five market minutes; the instants at which bars or a quote were asked for."""
        bars, quotes = [], []
        while house.market.at < until:
            before = len(house.provider.asked), len(house.provider.quotes_asked)
            await house.run()
            await house.ingest.refresh_quotes()
            if len(house.provider.asked) > before[0]:
                bars.append(house.market.at)
                await house.evaluate()
            if len(house.provider.quotes_asked) > before[1]:
                quotes.append(house.market.at)
            house.market.at += timedelta(minutes=5)
        return bars, quotes

    async def test_calendar_is_fetched_once_a_market_day(self, open):
        """By the first tick of an open session, for it and the next one, and never while the market is closed."""
        open.market.at = self.SESSION.opens_at - SECOND
        await open.ingest.refresh_quotes()
        assert open.provider.earnings_asked == []

        open.market.at = self.SESSION.opens_at
        for instance in (open, open, open.twin()):
            await instance.ingest.refresh_quotes()
            open.wall.at += timedelta(hours=1)
        following = calendar().session(CLOSES[11].date())
        assert open.provider.earnings_asked == [(self.SESSION.date, following.date)]

        open.market.at = following.opens_at
        await open.ingest.refresh_quotes()
        assert len(open.provider.earnings_asked) == 2

    async def test_report_after_the_close_is_looked_for_after_the_close(self, open):
        """The quote and the bars held are asked for once more, and the next morning all is as usual."""
        open.provider.reports = [a_report()]
        slot = self.SESSION.closes_at + AFTER_CLOSE

        bars, quotes = await self.through(open, self.SESSION.closes_at + timedelta(hours=4))

        assert bars == [self.SESSION.closes_at + DELAY, slot]
        assert [at for at in quotes if at > self.SESSION.closes_at + FIRST_WAIT] == [slot]
        assert (await open.quotes.get("AAPL")).due_at == calendar().session(CLOSES[11].date()).opens_at

    async def test_report_before_the_open_is_looked_for_after_the_open(self, open):
        """The first prices it moved are fetched five minutes after the open, not with the quarter of an hour."""
        open.provider.reports = [a_report(time=ReportTime.BEFORE_OPEN)]

        bars, quotes = await self.through(open, self.SESSION.opens_at + timedelta(minutes=18))

        assert bars == [self.SESSION.opens_at + AFTER_OPEN]
        assert self.SESSION.opens_at + AFTER_OPEN in quotes

    async def test_report_of_a_symbol_nobody_watches_costs_nothing(self, open):
        """The calendar knows thousands of companies; we follow ours."""
        open.provider.reports = [a_report("IBM"), a_report("IBM", time=ReportTime.BEFORE_OPEN)]

        await open.ingest.refresh_quotes()

        assert await open.ingest.earnings.get("IBM") is None
        bars, _ = await self.through(open, self.SESSION.closes_at + timedelta(hours=1))
        assert bars == [self.SESSION.closes_at + DELAY]

    async def test_look_finds_a_correction(self, open):
        """The slot compares what is held with the provider's word, and writes a correction under a new revision."""
        open.provider.reports = [a_report(time=ReportTime.BEFORE_OPEN)]
        history = corrected(9, close=BARS[9].close + 0.5)
        open.provider.history["AAPL"] = history

        await self.through(open, self.SESSION.opens_at + timedelta(minutes=8))

        assert (await open.get()).revision == 1
        assert await open.stored() == history[:10]

    async def test_report_that_is_out_makes_its_slot_due_now(self, open):
        """Who is told does not wait for the calendar's hour; the slot is served once, not twice."""
        open.provider.reports = [a_report()]
        await open.ingest.refresh_quotes()
        calls = len(open.provider.asked)
        open.market.at += timedelta(minutes=5)

        await open.ingest.reported(out(at=open.market.at))
        await open.ingest.refresh_quotes()

        assert len(open.provider.asked) == calls + 1
        assert len(open.provider.quotes_asked) == 2
        bars, _ = await self.through(open, self.SESSION.closes_at + timedelta(hours=2))
        assert bars == [self.SESSION.closes_at + DELAY]
        [report] = (await open.ingest.earnings.get("AAPL")).reports
        assert (report.eps_actual, report.time) == (1.62, ReportTime.AFTER_CLOSE)

    async def test_report_the_calendar_did_not_know_is_looked_for_as_well(self, open):
        """Outside the session too: a report that is out is a reason to look."""
        open.market.at = self.SESSION.closes_at + timedelta(hours=2)
        await open.settle()
        await open.ingest.refresh_quotes()
        calls = len(open.provider.asked), len(open.provider.quotes_asked)

        await open.ingest.reported(out(at=open.market.at))
        await open.ingest.refresh_quotes()

        assert (len(open.provider.asked), len(open.provider.quotes_asked)) == (calls[0] + 1, calls[1] + 1)

    async def test_event_told_twice_is_served_once(self, open):
        """Before the slot was served, after it, and with another instance in between."""
        event = out(at=open.market.at)
        await open.ingest.reported(event)
        await open.ingest.reported(event)
        await open.ingest.refresh_quotes()
        calls = open.provider.calls_made

        await open.twin().ingest.reported(event)
        await open.ingest.refresh_quotes()

        assert open.provider.calls_made == calls

    @pytest.mark.parametrize("days", [-30, 30])
    async def test_report_of_another_month_is_kept_and_makes_nobody_look(self, open, days):
        """Providers repeat old reports with new numbers: known, but no news of now."""
        await open.ingest.refresh_quotes()
        calls = open.provider.calls_made

        await open.ingest.reported(out(at=open.market.at, day=self.SESSION.date + timedelta(days=days)))
        await open.ingest.refresh_quotes()

        assert open.provider.calls_made == calls
        assert len((await open.ingest.earnings.get("AAPL")).reports) == 1

    async def test_event_of_a_symbol_nobody_watches_is_nothing_to_do(self, open):
        """It costs a read and no call."""
        await open.ingest.reported(out("IBM", at=open.market.at))

        assert await open.quotes.get("IBM") is None
        assert await open.ingest.earnings.get("IBM") is None

    async def test_look_that_fails_is_tried_again(self, open):
        """Trouble that passes leaves the slot open, for a quarter of an hour at a time; the quote comes meanwhile."""
        await open.ingest.refresh_quotes()
        await open.ingest.reported(out(at=open.market.at))
        ask = open.provider.bars

        async def down(*args, turn, **how):
            async with turn("bars"):
                raise UnavailableError("down")

        open.provider.bars = down
        assert await open.ingest.refresh_quotes() == 1
        asked = len(open.provider.asked)
        assert (await open.quotes.get("AAPL")).due_at == open.market.at + FIRST_WAIT

        open.provider.bars = ask
        open.market.at += FIRST_WAIT
        await open.ingest.refresh_quotes()
        assert len(open.provider.asked) == asked + 1
        assert not (await open.ingest.earnings.get("AAPL")).is_due(open.market.at)

    async def test_refused_look_is_not_repeated(self, open):
        """What stays refused is logged; the slot is done."""
        await open.ingest.reported(out(at=open.market.at))
        open.provider.history["AAPL"] = scaled(BARS, 0.5)

        await open.ingest.refresh_quotes()

        assert not (await open.ingest.earnings.get("AAPL")).is_due(open.market.at)
        assert await open.stored() == BARS[:10]

    async def test_calendar_in_trouble_stops_no_quote(self, open):
        """Quotes come as usual, and the calendar is asked for again a minute later (wall), not at every tick."""
        open.provider.trouble = UnavailableError("down")

        assert await open.ingest.refresh_quotes() == 1
        asked = len(open.provider.earnings_asked)
        await open.ingest.refresh_quotes()
        assert len(open.provider.earnings_asked) == asked

        open.provider.trouble = None
        open.wall.at += timedelta(minutes=1)
        await open.ingest.refresh_quotes()
        assert len(open.provider.earnings_asked) == asked + 1

    async def test_fast_market_does_not_spend_the_quota_on_calendars(self, open):
        """A replay of a market day a second asks once a minute of the wall."""
        for _ in range(30):
            await open.ingest.refresh_quotes()
            open.market.at = calendar().next_close(calendar().session_at(open.market.at).closes_at).opens_at
            open.wall.at += SECOND

        assert len(open.provider.earnings_asked) == 1

    async def test_nobody_sells_a_calendar(self, store, tmp_path):
        """Then there is none, and quotes are what they were."""
        quote = Quote(symbol="AAPL", price=101.0, previous_close=100.0, as_of=CLOSE, provider="alpha_vantage")
        provider = RecordedProvider(bars={"AAPL": BARS}, quotes={"AAPL": quote})
        house = House(store, tmp_path, market=StoppedClock(self.SESSION.opens_at), provider=provider)
        await house.ingest.watch(AAPL, by="api", live_from=CLOSE)

        assert await house.ingest.refresh_quotes() == 1
