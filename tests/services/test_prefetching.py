"""The prefetch timer over a real store: what it learns from the counters, what it spends, and when it leaves it."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest

from shared.clock import StoppedClock
from shared.errors import NotEntitledError, QuotaSpentError, UnavailableError, UnknownSymbolError
from shared.market.fetcher import ProviderStatus
from shared.market.health import BreakerState, Report
from shared.market.models import Interval, Priority, Quote
from shared.market.prefetch import Gate, Habits, Prefetcher
from shared.market.prefetching import LEASED, LIVES, MODEL, PARTITION, Prefetching
from shared.market.quota import ThrottleState, WindowState
from shared.market.sessions import calendar
from shared.market.stores import Quotes, Series, SeriesStore, WantedQuote
from tests.builders import documents

NOW = datetime(2026, 3, 4, 15, tzinfo=UTC)
"""A Wednesday, half an hour into the session."""
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)


@dataclass
class Seller:
    """Stands where the fetcher stands: sells quotes as of now, counts calls, and fails on demand."""

    market: StoppedClock
    left: int = 25
    calls: int = 0
    names: tuple[str, ...] = ("alpha_vantage",)
    breaker: BreakerState = BreakerState.CLOSED
    cool_down_until: datetime | None = None
    age: timedelta = timedelta()
    troubles: dict[str, Exception] = field(default_factory=dict)
    asked: list = field(default_factory=list)

    async def quote(self, symbol, *, priority=Priority.LIVE, deadline=None):
        self.asked.append((symbol, priority, deadline))
        if symbol in self.troubles:
            raise self.troubles[symbol]
        self.calls += 1
        self.left -= 1
        as_of = self.market.now() - self.age
        return Quote(symbol=symbol, price=10.0, previous_close=None, as_of=as_of, provider=self.names[0])

    async def status(self):
        window = WindowState(amount=25, span=DAY, kind="aligned", used=25 - self.left, left=self.left, resets_at=None)
        throttle = ThrottleState(
            windows=(window,),
            cool_down_until=self.cool_down_until,
            is_probing=False,
            calls=self.calls,
            refusals=0,
            probes=0,
            failed_probes=0,
            guard=timedelta(),
            waiting={},
        )
        health = Report(
            breaker=self.breaker,
            retry_at=None,
            success_rate=None,
            latency=None,
            freshness=None,
            calls=0,
            failures=0,
            hits={},
            last_error=None,
            last_error_at=None,
        )
        return [
            ProviderStatus(provider=name, plan="free", health=health, throttle=throttle, not_entitled=())
            for name in self.names
        ]


class House:
    """One store and one market, and as many instances as a test wants."""

    def __init__(self):
        self.wall, self.market = StoppedClock(NOW), StoppedClock(NOW)
        self.store = documents(self.wall)
        self.seller = Seller(self.market)
        self.quotes, self.series = Quotes(self.store, self.wall), SeriesStore(self.store, self.wall)
        self.one = self.another()

    def another(self):
        return Prefetching(
            documents=self.store,
            quotes=self.quotes,
            series=self.series,
            fetcher=self.seller,
            wall=self.wall,
            market=self.market,
        )

    def pass_to(self, instant):
        self.wall.at = self.market.at = instant

    async def knows(self, *symbols, days=20, is_on=True, demand=0.0, **how):
        """Make it know symbols that are asked for all through the coming hour, every day."""
        prefetcher = Prefetcher(life=LIVES, zone=calendar().zone, gate=Gate(is_on=is_on), **how)
        habits = Habits()
        for day in range(days, 0, -1):
            for n in range(12):
                for symbol in symbols:
                    prefetcher.asked(symbol, NOW - day * DAY + n * 5 * MINUTE, 2)
            habits.see("alpha_vantage", 200, demand)
            habits.end_day()
        prefetcher.pass_to(NOW - MINUTE)
        await self.one._keep(None, {"prefetcher": prefetcher.to_json(), "demand": habits.to_json()}, self.wall.now())

    async def model(self):
        return (await self.store.read("quota", PARTITION, MODEL)).body


@pytest.fixture
async def house():
    house = House()
    yield house
    await house.store.close()


class TestFetchingAhead:
    async def test_what_is_asked_for_every_day_is_fetched_before(self, house):
        """A quote is stored under the lowest priority and with a deadline, before anybody asks."""
        await house.knows("AAPL")
        assert await house.one.work() == 1
        [(symbol, priority, deadline)] = house.seller.asked
        assert (symbol, priority) == ("AAPL", Priority.PREFETCH)
        assert NOW < deadline <= NOW + timedelta(seconds=8)
        assert (await house.quotes.get("AAPL")).quote.as_of == NOW

    async def test_unused_key_costs_nothing(self, house):
        """A watched symbol that nobody ever asked for is not fetched."""
        await house.knows("AAPL")
        await house.series.create(Series(symbol="MSFT", interval=Interval.DAY, live_from=NOW, scoring_at=NOW))
        await house.one.work()
        assert [symbol for symbol, *_ in house.seller.asked] == ["AAPL"]

    async def test_outside_sessions_nothing_is_done(self, house):
        """At night and on Sundays no counter is read and nothing is fetched."""
        await house.knows("AAPL")
        for closed in (NOW + timedelta(hours=9), NOW + 4 * DAY):
            house.pass_to(closed)
            assert await house.one.work() == 0
        assert house.seller.asked == []

    async def test_fresh_quote_is_not_fetched_again(self, house):
        """What a timer or a caller brought a minute ago is as good as ours."""
        await house.knows("AAPL")
        quote = Quote(symbol="AAPL", price=1.0, previous_close=None, as_of=NOW - MINUTE, provider="alpha_vantage")
        await house.quotes.put(WantedQuote(symbol="AAPL", quote=quote, recorded_at=NOW))
        assert await house.one.work() == 0
        assert house.seller.asked == []

    async def test_gate_shut_spends_nothing(self, house):
        """While it is off, what it would have fetched is noted and no provider hears of it."""
        await house.knows("AAPL", is_on=False)
        assert await house.one.work() == 0
        assert house.seller.asked == []
        assert [row[0] for row in (await house.model())["prefetcher"]["ahead"]] == ["AAPL"]

    async def test_due_date_of_a_watched_quote_stays(self, house):
        """The timer that refreshes watched quotes still finds the quote when it is due."""
        await house.knows("AAPL")
        await house.quotes.put(WantedQuote(symbol="AAPL", due_at=NOW + MINUTE))
        assert await house.one.work() == 1
        assert (await house.quotes.get("AAPL")).due_at == NOW + MINUTE


class TestSlack:
    @pytest.mark.parametrize(
        ("how", "reason"),
        [
            ({"left": 0}, "nothing is left"),
            ({"left": 10}, "others have used three fifths of the day"),
            ({"cool_down_until": NOW + MINUTE}, "the provider cools down"),
            ({"breaker": BreakerState.OPEN}, "the provider is down"),
        ],
    )
    async def test_calls_that_are_not_spare_are_not_spent(self, house, how, reason):
        """Nothing is fetched ahead where the first choice has no call to lose."""
        await house.knows("AAPL")
        house.seller = house.one.fetcher = replace(house.seller, **how)
        assert await house.one.work() == 0, reason
        assert house.seller.asked == []

    async def test_what_demand_will_likely_take_is_left_to_it(self, house):
        """Where others spend the whole day's calls every day, nothing is spare."""
        await house.knows("AAPL", demand=24.0)
        assert await house.one.work() == 0
        assert house.seller.asked == []

    async def test_demand_is_learnt_without_our_own_calls(self, house):
        """Calls of callers and timers count as demand, those made ahead do not."""
        await house.knows("AAPL")
        await house.one.work()
        house.seller.calls += 3
        house.pass_to(NOW + 2 * MINUTE)
        await house.one.work()
        assert (await house.model())["demand"]["today"] == {"alpha_vantage": {"120": 3}}

    async def test_first_choice_for_quotes_pays(self, house):
        """Of two providers the one that is asked for quotes first decides, though it is not the first of the list."""
        await house.knows("AAPL")
        house.seller.names = ("alpha_vantage", "finnhub")
        await house.one.work()
        assert set((await house.model())["calls"]) == {"finnhub"}


class TestLearning:
    async def test_counters_teach_when_requests_came(self, house):
        """Requests noted between two looks are learnt, once each, in the slot in which they came."""
        for minutes in (0, 3, 6, 9):
            house.pass_to(NOW + minutes * MINUTE)
            await house.one.work()
            await house.quotes.interest.note("AAPL")
        house.pass_to(NOW + 12 * MINUTE)
        await house.one.work()
        assert (await house.model())["prefetcher"]["habits"]["today"]["AAPL"] == {"120": 2, "121": 1, "122": 1}

    async def test_what_came_during_a_long_pause_teaches_nothing(self, house):
        """After a night, or an outage, nobody knows when the requests came."""
        await house.one.work()
        await house.quotes.interest.note("AAPL")
        house.pass_to(NOW + 45 * MINUTE)
        await house.one.work()
        house.pass_to(NOW + 46 * MINUTE)
        await house.one.work()
        assert (await house.model())["prefetcher"]["habits"]["today"] == {}

    async def test_requests_across_the_hour_are_not_lost(self, house):
        """The counters begin anew with every hour; what they say of the new one counts whole."""
        house.pass_to(NOW + 59 * MINUTE)
        await house.one.work()
        house.pass_to(NOW + 61 * MINUTE)
        await house.quotes.interest.note("AAPL")
        house.pass_to(NOW + 62 * MINUTE)
        await house.one.work()
        assert sum((await house.model())["prefetcher"]["habits"]["today"]["AAPL"].values()) == 1

    async def test_use_of_what_was_fetched_is_reported(self, house):
        """A request that finds the fetched quote fresh is a hit; a quote nobody asks for is waste."""
        await house.knows("AAPL", "MSFT")
        assert await house.one.work() == 2
        house.pass_to(NOW + 2 * MINUTE)
        await house.quotes.interest.note("AAPL")
        for minutes in (3, 9, 15, 21):
            house.pass_to(NOW + minutes * MINUTE)
            await house.one.work()
        report = await house.one.report()
        assert (report.used, report.wasted, report.waste) == (1, 1, 0.5)
        assert report.hit_rate > 0
        assert report.is_on

    async def test_waste_switches_it_off(self, house):
        """When nobody comes any more it stops within the day, and says so in its report."""
        await house.knows(*(f"S{n}" for n in range(6)))
        for minutes in range(0, 90, 5):
            house.pass_to(NOW + minutes * MINUTE)
            house.seller.left = 25
            await house.one.work()
        report = await house.one.report()
        assert not report.is_on
        assert report.switched_at is not None
        asked = len(house.seller.asked)
        house.pass_to(NOW + 100 * MINUTE)
        assert await house.another().work() == 0
        assert len(house.seller.asked) == asked

    async def test_nothing_stored_is_a_report_too(self, house):
        """Before its first run it is off and has nothing to tell."""
        report = await house.one.report()
        assert (report.is_on, report.hit_rate, report.waste, report.used) == (False, None, None, 0)


class TestTrouble:
    async def test_one_instance_works_at_a_time(self, house):
        """While another holds the lease nothing is done; a killed one's lease ends by itself."""
        await house.knows("AAPL")
        assert await house.another()._take() is not None
        assert await house.one.work() == 0
        house.pass_to(NOW + LEASED + timedelta(seconds=1))
        assert await house.one.work() == 1

    async def test_two_instances_look_once_a_minute_together(self, house):
        """The second one finds that the first has just looked, and spends nothing."""
        await house.knows("AAPL", "MSFT")
        assert await house.one.work() == 2
        looked_at = (await house.model())["looked_at"]
        house.pass_to(NOW + MINUTE / 2)
        assert await house.another().work() == 0
        assert (await house.model())["looked_at"] == looked_at

    async def test_spent_quota_ends_the_run(self, house):
        """Where the throttle says no nothing else is tried; what was learnt is kept."""
        await house.knows("AAPL", "MSFT")
        spent = QuotaSpentError("spent", retry_after=DAY)
        house.seller.troubles = {"AAPL": spent, "MSFT": spent}
        assert await house.one.work() == 0
        assert len(house.seller.asked) == 1
        assert (await house.model())["looked_at"]

    async def test_trouble_with_one_symbol_is_no_trouble_of_another(self, house):
        """A symbol whose call fails is passed over."""
        await house.knows("AAPL", "MSFT")
        house.seller.troubles = {"AAPL": UnavailableError("down")}
        assert await house.one.work() == 1
        assert (await house.quotes.get("MSFT")).quote is not None

    @pytest.mark.parametrize("error", [UnknownSymbolError("nobody knows it"), NotEntitledError("not yours")])
    async def test_lasting_no_is_not_heard_twice_a_day(self, house, error):
        """A symbol that no provider will ever answer is left alone until tomorrow."""
        await house.knows("XXXX")
        house.seller.troubles = {"XXXX": error}
        for minutes in (0, 6, 25):
            house.pass_to(NOW + minutes * MINUTE)
            await house.one.work()
        assert len(house.seller.asked) == 1

    async def test_quote_that_is_stale_when_it_comes_is_not_asked_for_at_once_again(self, house):
        """A provider whose prices lag would otherwise be asked every slot for nothing; what it gave is no hit."""
        await house.knows("AAPL")
        house.seller.age = timedelta(minutes=30)
        await house.one.work()
        house.pass_to(NOW + 5 * MINUTE)
        await house.quotes.interest.note("AAPL")
        house.pass_to(NOW + 6 * MINUTE)
        await house.one.work()
        assert len(house.seller.asked) == 1
        report = await house.one.report()
        assert (report.used, report.wasted, report.hit_rate) == (0, 1, 0.0)
