import asyncio
import random
from datetime import date, timedelta

import pytest

from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    DailyQuotaError,
    InvalidPayloadError,
    NotEntitledError,
    PermanentError,
    QuotaSpentError,
    RateLimitedError,
    RefusedError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.market.entitlements import Entitlements
from shared.market.fetcher import RETRY_WAIT, SAME, SOON, Fetcher
from shared.market.health import FAILURES, FIRST_WAIT, BreakerState, Health, Kind, LeftAloneError
from shared.market.models import Adjustment, Bar, Fetched, Interval, Priority, Quote
from shared.market.ports import Limits
from shared.market.registry import Window
from shared.market.throttle import PATIENCE, Throttle
from tests.builders import CLOSE, WALL, daily_bars, documents
from tests.standins import Around

SECOND, MINUTE, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)
BARS = daily_bars(3)
NOW = BARS[-1].closed_at + timedelta(hours=1)
DOWN = UnavailableError("down")
LASTING = [NotEntitledError("not on this plan"), UnknownSymbolError("no such symbol"), RefusedError("no")]
NAMES = ("first", "second", "third")


class Seller:
    """
    Sells bars and quotes, every call in a turn of its own.

    It raises what lies in *says*, one a call (None: it answers), then *trouble* while that is set.
    """

    def __init__(self, name, wall, *, bars=BARS, adjustment=Adjustment.RAW, as_of=BARS[-1].closed_at):
        self.name = name
        self.wall = wall
        self.history = list(bars)
        self.adjustment = adjustment
        self.as_of = as_of
        self.says = []
        self.trouble = None
        self.takes = timedelta()
        self.limits = None
        self.parameter = ""
        self.asked = []

    def calls(self, interval, *, since, now):
        return 1

    async def call(self, turn, endpoint, about):
        async with turn(endpoint, parameter=self.parameter) as call:
            self.asked.append((endpoint, about, self.wall.now()))
            await asyncio.sleep(0)
            self.wall.at += self.takes
            call.limits = self.limits
            trouble = self.says.pop(0) if self.says else self.trouble
            if trouble:
                raise trouble

    async def bars(self, symbol, interval, *, since, now, turn, until=None):
        await self.call(turn, "bars", (symbol, since, until))
        bars = tuple(b for b in self.history if since is None or b.closed_at >= since)
        return Fetched(symbol=symbol, interval=interval, provider=self.name, adjustment=self.adjustment, bars=bars)

    async def quote(self, symbol, *, turn):
        await self.call(turn, "quote", symbol)
        return Quote(symbol=symbol, price=1.0, previous_close=None, as_of=self.as_of, provider=self.name)


class NewsSeller(Seller):
    """Sells news, the calendar and corporate actions besides."""

    async def news(self, symbol, *, since, until, turn):
        await self.call(turn, "news", symbol)
        return []

    async def earnings(self, *, first, last, turn, symbol=None):
        await self.call(turn, "earnings", symbol)
        return []

    async def actions(self, symbol, *, turn):
        await self.call(turn, "actions", symbol)
        return []


class House:
    """Three sellers, one storage, as many instances as asked for; waiting moves the wall."""

    def __init__(self):
        self.wall = StoppedClock(WALL)
        self.market = StoppedClock(NOW)
        self.operations = []

        async def step(name, call):
            self.operations.append(name)
            return await call()

        self.store = Around(documents(self.wall), step)
        self.first, self.second, self.third = (Seller(name, self.wall) for name in NAMES)
        self.sellers = [self.first, self.second, self.third]
        self.windows = {}
        self.slept = []
        self.stands_still = False
        self.keys = {name: f"key of {name}" for name in NAMES}
        self.fetcher = self.instance()

    async def sleep(self, seconds):
        if self.stands_still:
            await asyncio.Event().wait()
        self.slept.append(seconds)
        self.wall.at += timedelta(seconds=seconds)
        await asyncio.sleep(0)

    def instance(self):
        throttles = {
            name: Throttle(self.store, self.wall, name, self.windows.get(name, ()), sleep=self.sleep) for name in NAMES
        }
        return Fetcher(
            providers=self.sellers,
            throttles=throttles,
            health=Health(self.store, self.wall, self.keys),
            entitlements=Entitlements(self.store, self.wall, self.keys),
            wall=self.wall,
            market=self.market,
            plans=dict.fromkeys(NAMES, "free"),
            weigh=lambda *_: 1,
            dice=random.Random(7),
            sleep=self.sleep,
        )

    async def bars(self, **asked):
        return await self.fetcher.bars("AAPL", Interval.DAY, **{"since": None, "now": NOW, **asked})

    def limit(self, name, *windows):
        self.windows[name] = windows
        self.fetcher = self.instance()

    async def lose(self, seller):
        """Let the breaker of a seller open, and begin to answer again."""
        seller.trouble = DOWN
        for _ in range(3):
            with pytest.raises(UnavailableError):
                await self.bars(provider=seller.name)
        seller.trouble = None
        return len(seller.asked)

    def counts(self):
        return tuple(len(s.asked) for s in self.sellers)


@pytest.fixture
async def house():
    house = House()
    yield house
    await house.store.close()


def said(caplog, event):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(event)]


# --- who is asked


async def test_first_choice_answers_alone(house):
    """While the first provider answers the others cost nothing, and every answer says whose it is."""
    fetched = await house.bars()

    assert (fetched.provider, fetched.adjustment) == ("first", Adjustment.RAW)
    assert house.counts() == (1, 0, 0)


@pytest.mark.parametrize("trouble", LASTING, ids=lambda e: type(e).__name__)
async def test_lasting_no_leads_to_the_next_at_once(house, trouble):
    """What a provider will never do is asked of the next without a second try or a wait."""
    house.first.trouble = trouble

    assert (await house.bars()).provider == "second"
    assert house.counts() == (1, 1, 0)
    assert house.wall.now() == WALL


async def test_outage_costs_one_quick_retry(house):
    """What may be a hiccup is tried once more, with jitter; then the next provider answers."""
    house.first.trouble = DOWN

    assert (await house.bars()).provider == "second"
    assert house.counts() == (2, 1, 0)
    [pause] = house.slept
    assert RETRY_WAIT[0] <= pause <= RETRY_WAIT[1]


async def test_hiccup_costs_no_change_of_provider(house):
    """Who fails once and answers then has answered."""
    house.first.says = [DOWN]

    assert (await house.bars()).provider == "first"
    assert house.counts() == (2, 0, 0)


async def test_first_choices_trouble_is_the_one_reported(house, caplog):
    """When nobody can, the operator hears why the provider he chose could not, and of the others in the log."""
    caplog.set_level("INFO")
    house.first.trouble = NotEntitledError("the first's plan")
    house.second.trouble = UnknownSymbolError("the second's list")
    house.third.trouble = DOWN

    with pytest.raises(NotEntitledError, match="the first's plan"):
        await house.bars()
    lines = said(caplog, "provider.passed_over")
    assert ["first" in lines[0], "the second's list" in lines[1], "UnavailableError: down" in lines[2]] == [True] * 3


async def test_silence_of_a_stand_in_proves_nothing(house):
    """The first choice may answer with nothing; a stand-in that has nothing does not become the series' provider."""
    house.second.history = house.third.history = []
    house.first.trouble = RefusedError("the first's reason")
    for _ in range(2):
        with pytest.raises(RefusedError, match="the first's reason"):
            await house.bars()
    assert len(house.second.asked) == 2

    house.first.trouble, house.first.history = None, []
    assert (await house.bars()).bars == ()


async def test_what_is_asked_reaches_the_provider(house):
    """Only what is missing is fetched."""
    await house.bars(since=BARS[1].closed_at, until=BARS[2].closed_at)

    assert [about for _, about, _ in house.first.asked] == [("AAPL", BARS[1].closed_at, BARS[2].closed_at)]


async def test_bug_is_not_papered_over(house):
    """An error that is none of ours is a mistake of ours: it comes out."""
    house.first.trouble = ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        await house.bars()


async def test_news_earnings_and_actions_are_asked_of_who_sells_them(house):
    """A provider without the ability is no candidate, and nobody at all is said so."""
    with pytest.raises(PermanentError, match="no provider is configured for news of AAPL"):
        await house.fetcher.news("AAPL", since=WALL - DAY, until=WALL)
    seller = house.sellers[1] = NewsSeller("second", house.wall)
    await house.fetcher.news("AAPL", since=WALL - DAY, until=WALL)
    await house.fetcher.earnings(first=date(2013, 1, 1), last=date(2013, 1, 31))
    await house.fetcher.actions("AAPL")

    assert [(endpoint, about) for endpoint, about, _ in seller.asked] == [
        ("news", "AAPL"),
        ("earnings", None),
        ("actions", "AAPL"),
    ]
    with pytest.raises(PermanentError, match="first is not among them"):
        await house.fetcher.actions("AAPL", provider="first")


# --- a series and its provider


@pytest.mark.parametrize("trouble", [*LASTING, DOWN, ConfigurationError("key")], ids=lambda e: type(e).__name__)
async def test_series_stays_with_its_provider(house, trouble):
    """Adjusted and raw prices never mix: a series that has a provider hears that provider's trouble."""
    house.first.trouble = trouble

    with pytest.raises(type(trouble)):
        await house.bars(provider="first", since=BARS[0].closed_at)
    assert house.counts()[1:] == (0, 0)
    assert (await house.bars(provider="second")).provider == "second"


async def test_provider_that_is_no_longer_configured_is_named_as_such(house):
    """A series whose provider was taken out of the settings cannot be continued by another."""
    with pytest.raises(PermanentError, match=r"no provider is configured for bars of AAPL \(yahoo"):
        await house.bars(provider="yahoo")


def shifted(bars, factor):
    return [
        Bar(
            opened_at=b.opened_at,
            closed_at=b.closed_at,
            open=b.open * factor,
            high=b.high * factor,
            low=b.low * factor,
            close=b.close * factor,
            volume=b.volume,
        )
        for b in bars
    ]


async def stand_in(house, held=BARS[:2], adjustment=Adjustment.RAW):
    return await house.fetcher.stand_in(
        "AAPL", Interval.DAY, held=held, adjustment=adjustment, instead_of="first", now=NOW
    )


@pytest.mark.parametrize("factor", [1.0, 1 + 0.9 * SAME, 1 - 0.9 * SAME])
async def test_provider_that_agrees_may_go_on_with_a_series(house, factor):
    """Who says the same of a bar we hold, up to rounding, may bring the next ones."""
    house.second.history = shifted(BARS, factor)

    fetched = await stand_in(house)

    assert fetched.provider == "second"
    assert house.first.asked == []
    closes = [b.closed_at for b in fetched.bars]
    assert BARS[1].closed_at in closes
    assert BARS[2].closed_at in closes


@pytest.mark.parametrize("held", [BARS[:1], BARS[:2]])
async def test_provider_that_disagrees_is_refused_with_both_values(house, held):
    """A split that only one of them has made would look like a crash."""
    house.second.history = house.third.history = shifted(BARS, 0.5)
    ours = f"{held[0].close:g}"

    with pytest.raises(RefusedError) as caught:
        await stand_in(house, held)

    assert f"is {held[0].close / 2:g}, ours {ours}" in str(caught.value)
    assert "second" in str(caught.value)


async def test_next_but_one_may_agree(house):
    """One who disagrees does not stop another who agrees."""
    house.second.history = shifted(BARS, 1 + 2 * SAME)

    assert (await stand_in(house)).provider == "third"


async def test_adjusted_and_raw_never_mix(house):
    """Equal closes of differently adjusted prices prove nothing; what is known of it costs no further call."""
    house.second.adjustment = house.third.adjustment = Adjustment.SPLIT

    for _ in range(2):
        with pytest.raises(RefusedError, match="the prices of second are split, ours raw"):
            await stand_in(house)
    assert house.counts() == (0, 1, 1)
    assert (await stand_in(house, adjustment=Adjustment.SPLIT)).provider == "second"


async def test_change_without_an_overlapping_bar_is_refused(house):
    """Without one bar of both there is nothing to compare."""
    house.second.history = house.third.history = BARS[2:]

    with pytest.raises(RefusedError, match=r"has no bar of .* to compare with ours"):
        await stand_in(house)
    with pytest.raises(InvalidPayloadError, match="must be held"):
        await stand_in(house, [])


async def test_outage_of_the_others_is_no_disagreement(house):
    """When nobody can be asked the caller hears that, and may try again."""
    house.second.trouble = house.third.trouble = DOWN

    with pytest.raises(UnavailableError):
        await stand_in(house)


# --- quotas


async def test_throttled_first_choice_is_waited_for_briefly(house):
    """A second's wait is no reason to change the provider."""
    house.limit("first", Window(amount=1, span=SECOND))

    for _ in range(2):
        assert (await house.bars()).provider == "first"
    assert house.wall.now() - WALL >= SECOND


async def test_next_answers_when_it_can_do_so_sooner(house):
    """A quota that is spent for a while sends us to the next, without a wait."""
    house.limit("first", Window(amount=1, span=3 * SECOND))
    await house.bars()
    before = house.wall.now()

    assert (await house.bars()).provider == "second"
    assert house.wall.now() == before


async def test_when_all_are_throttled_the_soonest_is_waited_for(house):
    """Within the deadline waiting is better than failing; the nearest instant wins."""
    for name, seconds in (("first", 3), ("second", 2), ("third", 60)):
        house.windows[name] = (Window(amount=1, span=seconds * SECOND),)
    house.fetcher = house.instance()
    for _ in NAMES:
        await house.bars()
    assert house.counts() == (1, 1, 1)
    before = house.wall.now()

    assert (await house.bars()).provider == "second"
    assert SOON < house.wall.now() - before < 3 * SECOND


async def test_deadline_bounds_the_wait(house):
    """Who cannot be asked in time is not waited for, and the error says when he could."""
    house.sellers[:] = [house.first]
    house.limit("first", Window(amount=1, span=3 * SECOND))
    await house.bars()
    before = house.wall.now()

    with pytest.raises(QuotaSpentError) as caught:
        await house.bars(deadline=before + SECOND)
    assert SECOND < caught.value.retry_after <= 4 * SECOND
    assert house.wall.now() == before
    assert (await house.bars(deadline=before + 5 * SECOND)).provider == "first"


async def test_patience_is_the_deadline_of_who_gives_none(house):
    """Without a deadline a call waits four seconds for its permit."""
    house.sellers[:] = [house.first]
    house.limit("first", Window(amount=1, span=PATIENCE + SECOND))
    await house.bars()

    with pytest.raises(QuotaSpentError):
        await house.bars()


async def test_refusal_of_the_provider_holds_back_everybody(house):
    """Who was told to slow down leaves the provider alone in every instance, and the next answers meanwhile."""
    house.first.says = [RateLimitedError("slow", retry_after=MINUTE)]

    assert (await house.bars()).provider == "second"
    assert (await house.instance().bars("AAPL", Interval.DAY, since=None, now=NOW)).provider == "second"
    assert house.counts() == (1, 2, 0)
    with pytest.raises(QuotaSpentError):
        await house.bars(provider="first")
    house.wall.at += MINUTE
    assert (await house.bars(provider="first")).provider == "first"


async def test_short_refusal_is_waited_out_when_nobody_else_can(house):
    """A burst refusal of a second passes within the deadline."""
    house.sellers[:] = [house.first, house.second]
    house.first.says = [RateLimitedError("slow", retry_after=2 * SECOND)]
    house.second.trouble = RefusedError("no")

    assert (await house.bars()).provider == "first"
    assert 2 * SECOND <= house.wall.now() - WALL < PATIENCE


async def test_spent_day_fails_over(house):
    """A spent day's quota is not waited for."""
    house.first.trouble = DailyQuotaError("25 a day", retry_after=timedelta(hours=1))

    for _ in range(2):
        assert (await house.bars()).provider == "second"
    assert house.counts() == (1, 2, 0)


async def test_no_new_provider_is_asked_behind_the_deadline(house):
    """An answer nobody waits for any more is not worth a call."""
    house.first.trouble, house.first.takes = DOWN, 2 * SECOND

    with pytest.raises(UnavailableError):
        await house.bars(deadline=WALL + SECOND)
    assert house.counts() == (1, 0, 0)


async def test_scarce_quota_sends_others_first(house):
    """A quota that runs out is kept while somebody else can answer, and used when nobody can."""
    house.limit("first", Window(amount=20, span=DAY))
    for _ in range(20):
        await house.bars()
        house.wall.at += 2 * MINUTE

    used = len(house.first.asked)
    assert 15 <= used < 20
    house.second.trouble = house.third.trouble = RefusedError("no")
    assert (await house.bars()).provider == "first"


async def test_headers_correct_the_throttle(house):
    """What an answer says of the quota counts, whoever spent it."""
    house.sellers[:] = [house.first]
    house.limit("first", Window(amount=10, span=MINUTE))
    house.first.limits = Limits(amount=10, left=0, resets_at=WALL + 50 * SECOND)

    await house.bars()

    with pytest.raises(QuotaSpentError):
        await house.bars()


# --- what a key may do, and what nobody knows


async def test_refused_parameter_is_never_asked_again(house):
    """An entitlement is learned once for all instances, and refused without a call from then on."""
    house.sellers[:] = [house.first]
    house.first.parameter, house.first.trouble = "outputsize=full", NotEntitledError("premium feature")

    for fetcher in (house.fetcher, house.fetcher, house.instance()):
        with pytest.raises(NotEntitledError, match="premium feature"):
            await fetcher.bars("AAPL", Interval.DAY, since=None, now=NOW, provider="first")
    assert len(house.first.asked) == 1

    house.first.parameter, house.first.trouble = "", None
    assert (await house.bars()).provider == "first"


async def test_provider_whose_every_way_is_refused_is_not_asked(house):
    """What the registry says can be asked in several ways is given up when the last of them is refused."""
    finnhub = Seller("finnhub", house.wall)
    house.keys["finnhub"] = "key"
    house.fetcher.providers = [finnhub, house.first]
    house.fetcher.throttles = {**house.fetcher.throttles, "finnhub": house.fetcher.throttles["first"]}
    await house.fetcher.entitlements.learn("finnhub", "stock/candle", "", "no access")

    assert (await house.bars()).provider == "first"
    assert finnhub.asked == []
    with pytest.raises(NotEntitledError, match="the plan at finnhub includes no bars: no access"):
        await house.bars(provider="finnhub")
    await house.fetcher.quote("AAPL")
    assert len(finnhub.asked) == 1


async def test_unknown_symbol_costs_no_second_call(house):
    """What all have said they do not know is refused without a call for a day, in every instance."""
    for seller in house.sellers:
        seller.trouble = UnknownSymbolError(f"{seller.name} knows no AAPL")
    for fetcher in (house.fetcher, house.fetcher, house.instance()):
        with pytest.raises(UnknownSymbolError):
            await fetcher.bars("AAPL", Interval.DAY, since=None, now=NOW)
    assert house.counts() == (1, 1, 1)

    house.wall.at += DAY
    for seller in house.sellers:
        seller.trouble = None
    assert (await house.bars()).provider == "first"


async def test_symbol_one_does_not_know_is_asked_of_the_others(house):
    """Only who said so is left out."""
    house.first.trouble = UnknownSymbolError("no such symbol")
    await house.bars()
    house.first.trouble = None

    assert (await house.bars()).provider == "second"
    assert house.counts() == (1, 2, 0)


async def test_series_is_not_stopped_by_one_wrong_no(house):
    """A provider that brought a series' bars knows its symbol: one bad answer costs one slot, not a day."""
    house.first.says = [UnknownSymbolError("no such symbol")]
    with pytest.raises(UnknownSymbolError):
        await house.bars(provider="first")

    assert (await house.bars(provider="first")).provider == "first"


# --- breakers


async def test_provider_that_is_down_is_left_alone(house):
    """After five failures in a row nobody waits for it any more; one probe finds out that it is back."""
    assert await house.lose(house.first) == FAILURES
    for fetcher in (house.fetcher, house.instance()):
        assert (await fetcher.bars("AAPL", Interval.DAY, since=None, now=NOW)).provider == "second"
    assert len(house.first.asked) == FAILURES

    house.wall.at += FIRST_WAIT
    assert (await house.bars()).provider == "first"
    assert (await house.fetcher.status())[0].health.breaker is BreakerState.CLOSED


async def test_failed_probe_is_not_retried(house):
    """The probe is one call, whatever becomes of it."""
    before = await house.lose(house.first)
    house.first.trouble = DOWN
    house.wall.at += FIRST_WAIT

    for _ in range(3):
        assert (await house.bars()).provider == "second"
    assert len(house.first.asked) == before + 1


async def test_series_of_a_provider_that_is_left_alone_waits_within_its_deadline(house):
    """Behind an open breaker the caller hears at once when to come again, unless it is near."""
    await house.lose(house.first)
    opened = house.wall.now()

    with pytest.raises(LeftAloneError) as caught:
        await house.bars(provider="first")
    assert timedelta() < caught.value.retry_after <= FIRST_WAIT
    fetched = await house.bars(provider="first", deadline=opened + 2 * FIRST_WAIT)
    assert fetched.provider == "first"
    assert house.wall.now() - opened <= FIRST_WAIT


async def test_wrong_key_is_told_once_and_costs_one_call(house, caplog):
    """A wrong key must not go unnoticed because another stands in, nor stop the house."""
    house.first.trouble = ConfigurationError("first does not accept the key: set FIRST_KEY to yours")
    for _ in range(5):
        assert (await house.bars()).provider == "second"

    assert len(house.first.asked) == 1
    [line] = said(caplog, "provider.left_alone")
    assert "set FIRST_KEY" in line


async def test_cancelled_probe_is_left_to_the_next(house):
    """Whoever is called off with the probe in hand takes nobody's chance."""
    await house.lose(house.first)
    house.wall.at += FIRST_WAIT
    house.first.says = [asyncio.CancelledError()]
    with pytest.raises(asyncio.CancelledError):
        await house.bars()

    assert (await house.bars()).provider == "first"


async def test_cancellation_leaves_nothing_behind(house):
    """A caller who goes away costs at most the call that was on its way."""
    house.limit("first", Window(amount=1, span=3 * SECOND))
    await house.bars()
    waiting = asyncio.ensure_future(house.bars(provider="first"))
    house.stands_still = True
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert len(house.first.asked) == 1
    assert sum((await house.fetcher.throttles["first"].state()).waiting.values()) == 0


# --- order


async def test_who_does_badly_is_asked_later_and_comes_back(house):
    """Success counts before the operator's order, until the trouble is forgotten."""
    for _ in range(6):
        house.first.says = [RefusedError("x"), UnavailableError("down", retry_after=MINUTE)]
        await house.bars()
        await house.bars()
        house.wall.at += SECOND
    asked = len(house.first.asked)
    assert (await house.bars()).provider == "second"
    assert len(house.first.asked) == asked

    house.first.says = []
    house.wall.at += timedelta(hours=2)
    assert (await house.bars()).provider == "first"


async def test_quotes_prefer_who_has_the_last_price(house):
    """Calls of the histories' provider are too good for quotes; it stands in when the others cannot."""
    house.fetcher.preferences = {Kind.QUOTE: ("third", "second")}
    await house.fetcher.quote("AAPL")
    assert house.counts() == (0, 0, 1)

    house.third.trouble = house.second.trouble = RefusedError("no quotes")
    await house.fetcher.quote("AAPL")
    assert house.counts() == (1, 1, 2)


async def test_outdated_quote_is_asked_of_the_next(house):
    """A quote from before the last close with HTTP 200 is no answer while somebody has a newer one."""
    house.first.as_of = CLOSE - 4 * DAY

    assert (await house.fetcher.quote("AAPL")).provider == "second"
    assert house.counts() == (1, 1, 0)


async def test_quote_that_stands_still_in_a_session_is_asked_of_one_other(house):
    """Monday's session with Friday's close and HTTP 200: another may know better; if not, the youngest counts."""
    house.market.at = CLOSE - timedelta(hours=2)
    for seller in house.sellers:
        seller.as_of = CLOSE - timedelta(hours=3)
    house.second.as_of = house.market.at

    assert (await house.fetcher.quote("AAPL")).provider == "second"
    house.second.as_of = CLOSE - timedelta(hours=2.5)
    assert (await house.fetcher.quote("AAPL")).provider == "second"
    assert house.counts() == (2, 2, 0)


async def test_who_is_always_late_is_not_asked_to_know_better(house):
    """Where nobody sells the last price a quote costs one call, not one of everybody."""
    house.market.at = CLOSE - timedelta(hours=2)
    for seller in house.sellers:
        seller.as_of = CLOSE - timedelta(hours=3)
    for _ in range(20):
        await house.fetcher.quote("AAPL")

    assert sum(house.counts()) <= 20 + 6


async def test_outdated_quote_is_better_than_none(house):
    """When nobody has a newer one the youngest is the answer; its time says how old it is."""
    for days, seller in zip((5, 4, 6), house.sellers, strict=True):
        seller.as_of = CLOSE - days * DAY

    assert (await house.fetcher.quote("AAPL")).as_of == CLOSE - 4 * DAY


async def test_stale_bars_with_200_make_a_provider_worse(house):
    """Who answers promptly with yesterday's bars is asked later."""
    house.first.history = BARS[:1]
    for _ in range(8):
        await house.bars()
        house.wall.at += SECOND

    assert (await house.bars()).provider == "second"


# --- what it costs and what is told


async def test_normal_call_costs_the_throttle_alone(house):
    """Breaker, entitlements and health are known to the process: a call reads and writes the quota, no more."""
    for name in NAMES:
        house.windows[name] = (Window(amount=600, span=MINUTE),)
    house.fetcher = house.instance()
    await house.bars(provider="first")
    house.operations.clear()
    for _ in range(10):
        await house.bars(provider="first")
        house.wall.at += SECOND

    assert house.operations == ["read", "replace"] * 10


async def test_status_says_everything(house):
    """An operator sees at one place what is left, what is refused, who is left alone, and why."""
    house.limit("first", Window(amount=10, span=DAY))
    house.first.says = [NotEntitledError("premium feature"), None]
    await house.bars()
    await house.bars(provider="second")
    house.third.trouble = UnavailableError("answered 503 for apikey=ABCDEFGH1234")
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await house.bars(provider="third")
    for _ in range(3):
        house.fetcher.count_hit(Kind.BARS, "second")

    first, second, third = await house.fetcher.status()

    assert [s.provider for s in (first, second, third)] == list(NAMES)
    assert first.plan == "free"
    [window] = first.throttle.windows
    assert (window.used, window.left) == (1, 9)
    assert [(r.endpoint, r.reason) for r in first.not_entitled] == [("bars", "premium feature")]
    assert second.hit_rate == pytest.approx(3 / 5)
    assert third.health.breaker is BreakerState.OPEN
    assert third.health.retry_at > house.wall.now()
    assert "503" in third.health.last_error
    assert "ABCDEFGH1234" not in str(third)
    assert await house.fetcher.status() == [first, second, third]


async def test_trace_shows_the_call_and_no_key(house, monkeypatch):
    """A span a call: provider, endpoint, priority and outcome, and nothing of the request itself."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, tracing = InMemorySpanExporter(), TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", tracing.get_tracer)
    house.first.says = [DOWN]

    await house.bars(priority=Priority.SCORING)

    spans = [s for s in exporter.get_finished_spans() if s.name == "provider.call"]
    assert [dict(s.attributes)["troop.outcome"] for s in spans] == ["UnavailableError", "answered"]
    for s in spans:
        found = {k: v for k, v in s.attributes.items() if k != "troop.transient"}
        del found["troop.outcome"]
        assert found == {"troop.provider": "first", "troop.endpoint": "bars", "troop.priority": "scoring"}


async def test_storage_in_trouble_while_counting_takes_no_answer_away(house):
    """An answer that is here is given, though what it teaches could not be written down."""
    broken = house.instance()

    async def down(*_, **__):
        raise UnavailableError("storage is down")

    house.first.limits = Limits(amount=10, left=0)
    broken.throttles["first"].observe = down

    assert (await broken.bars("AAPL", Interval.DAY, since=None, now=NOW)).provider == "first"


async def test_every_trouble_is_one_of_ours(house):
    """Whatever the sellers say, in whatever order, a request ends with an answer or with an error of the house."""
    dice = random.Random(11)
    choices = [
        None,
        DOWN,
        RefusedError("no"),
        NotEntitledError("plan"),
        UnknownSymbolError("who"),
        RateLimitedError("slow"),
        RateLimitedError("slow", retry_after=SECOND),
        ConfigurationError("key"),
    ]
    answered = 0
    for _ in range(120):
        for seller in house.sellers:
            seller.says = [dice.choice(choices)]
            seller.parameter = f"n={dice.randrange(10**9)}"
        try:
            await house.fetcher.quote(f"S{dice.randrange(10**6)}", deadline=house.wall.now() + 2 * SECOND)
            answered += 1
        except TroopError:
            pass
        house.wall.at += timedelta(seconds=dice.uniform(0, 60))
    assert answered > 20


async def test_symbol_is_not_unknown_while_another_cannot_say(house):
    """Who is down or throttled might know it: the caller is told to come back, not that it does not exist."""
    house.first.trouble = UnknownSymbolError("no such symbol")
    house.second.trouble = DailyQuotaError("the day is spent", retry_after=DAY)
    house.third.trouble = RefusedError("neither")

    with pytest.raises(DailyQuotaError):
        await house.fetcher.quote("ACME")
