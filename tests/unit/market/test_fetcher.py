import asyncio
from datetime import timedelta

import pytest

from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    NotEntitledError,
    PermanentError,
    RateLimitedError,
    RefusedError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.market.fetcher import REFUSED_WAIT, Fetcher
from shared.market.models import Interval, Quote
from shared.market.registry import Window
from shared.market.throttle import Throttle
from tests.builders import CLOSE, WALL, RecordedProvider, daily_bars, documents

BARS = daily_bars(3)
ONE_A_DAY = (Window(amount=1, span=timedelta(days=1)),)
LASTING = [NotEntitledError("not on this plan"), UnknownSymbolError("no such symbol")]
PASSING = [UnavailableError("down"), RateLimitedError("slow", retry_after=timedelta(minutes=1))]


class House:
    """Two providers under throttles of their own."""

    def __init__(self, store) -> None:
        quotes = {"AAPL": Quote(symbol="AAPL", price=1.0, previous_close=None, as_of=CLOSE, provider="x")}
        self.first, self.second = (
            RecordedProvider(name, {"AAPL": BARS}, quotes=quotes) for name in ("first", "second")
        )
        self.store = store
        self.throttles = {name: Throttle(store, StoppedClock(WALL), name, ()) for name in ("first", "second")}

    async def bars(self, provider=None, *, since=None):
        fetcher = Fetcher(providers=[self.first, self.second], throttles=self.throttles)
        return await fetcher.bars("AAPL", Interval.DAY, since=since, now=CLOSE, provider=provider)

    async def quote(self):
        return await Fetcher(providers=[self.first, self.second], throttles=self.throttles).quote("AAPL")

    def limit(self, name, windows):
        self.throttles[name] = Throttle(self.store, StoppedClock(WALL), name, windows)


@pytest.fixture
async def house():
    store = documents()
    yield House(store)
    await store.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda _: sleep(0))


async def test_first_choice_answers_alone(house):
    """While the first provider answers the second costs nothing."""
    fetched = await house.bars()

    assert fetched.provider == "first"
    assert (len(house.first.asked), len(house.second.asked)) == (1, 0)


@pytest.mark.parametrize("trouble", LASTING, ids=lambda e: type(e).__name__)
async def test_second_stands_in_for_a_new_series(house, trouble):
    """A series nobody has supplied yet may begin with whoever can."""
    house.first.failing_with = trouble

    assert (await house.bars()).provider == "second"


@pytest.mark.parametrize("trouble", PASSING, ids=lambda e: type(e).__name__)
async def test_what_passes_is_waited_for(house, trouble):
    """A series stays with whoever begins it, so a bad minute of the first choice must not decide that."""
    house.first.failing_with = trouble

    with pytest.raises(type(trouble)):
        await house.bars()

    assert house.second.asked == []


async def test_silence_of_a_stand_in_proves_nothing(house):
    """The first choice may answer with nothing; a stand-in that has nothing does not become the series' provider."""
    house.second.history = {}
    house.first.failing_with = NotEntitledError("the first's plan")
    with pytest.raises(NotEntitledError, match="the first's plan"):
        await house.bars()

    house.first.failing_with, house.first.history = None, {}
    assert (await house.bars()).bars == ()


@pytest.mark.parametrize("trouble", [*LASTING, *PASSING], ids=lambda e: type(e).__name__)
async def test_series_stays_with_its_provider(house, trouble):
    """Adjusted and raw prices never mix: a series that has a provider waits for it."""
    house.first.failing_with = trouble

    with pytest.raises(type(trouble)):
        await house.bars("first", since=BARS[0].closed_at)

    assert house.second.asked == []
    assert (await house.bars("second")).provider == "second"


@pytest.mark.parametrize("trouble", [ConfigurationError("the key is wrong"), RefusedError("no"), ValueError("bug")])
async def test_trouble_somebody_must_see_is_not_papered_over(house, trouble):
    """A wrong key would otherwise go unnoticed for as long as the other provider stands in."""
    house.first.failing_with = trouble

    with pytest.raises(type(trouble)):
        await house.bars()

    assert house.second.asked == []


async def test_first_choices_trouble_is_the_one_reported(house):
    """When nobody can, the operator hears why the provider he chose could not."""
    house.first.failing_with = NotEntitledError("the first's plan")
    house.second.failing_with = UnknownSymbolError("the second's list")

    with pytest.raises(NotEntitledError, match="the first's plan"):
        await house.bars()


async def test_trouble_that_passes_is_tried_once_more(house):
    """A hiccup costs one more call, and no slot."""

    def recover():
        if len(house.first.asked) == 2:
            house.first.failing_with = None

    house.first.failing_with, house.first.on_call = UnavailableError("down"), recover

    assert (await house.bars()).provider == "first"
    assert len(house.first.asked) == 2


async def test_every_try_needs_a_permit(house):
    """Nobody is called on a spent quota, neither at first nor when trying again."""
    house.limit("first", ONE_A_DAY)
    house.first.failing_with = UnavailableError("down")

    for _ in range(2):
        with pytest.raises(RateLimitedError, match="quota is spent"):
            await house.bars("first")

    assert len(house.first.asked) == 1


@pytest.mark.parametrize(("told", "wait"), [(timedelta(minutes=7), timedelta(minutes=7)), (None, REFUSED_WAIT)])
async def test_refusal_of_the_provider_is_remembered(house, told, wait):
    """Who was told to slow down leaves the provider alone, in every instance, for as long as it said."""
    house.first.failing_with = RateLimitedError("slow down", retry_after=told)
    with pytest.raises(RateLimitedError):
        await house.bars("first")
    house.first.failing_with = None
    calls = len(house.first.asked)

    with pytest.raises(RateLimitedError) as caught:
        await house.bars("first")

    assert calls == len(house.first.asked) == 1
    assert caught.value.retry_after == wait


async def test_quotes_are_asked_of_the_last_first(house):
    """Calls of the history's provider are kept for history; it stands in when the other cannot."""
    await house.quote()
    assert (house.first.quotes_asked, house.second.quotes_asked) == ([], ["AAPL"])

    house.second.failing_with = NotEntitledError("no quotes")
    await house.quote()
    assert house.first.quotes_asked == ["AAPL"]


async def test_provider_that_is_no_longer_configured_is_named_as_such(house):
    """A series whose provider was taken out of the settings cannot be continued by another."""
    with pytest.raises(PermanentError, match="no provider is configured for AAPL"):
        await house.bars("yahoo")


async def test_what_is_asked_reaches_the_provider(house):
    """Only what is missing is fetched."""
    fetched = await house.bars("second", since=BARS[1].closed_at)

    assert house.second.asked == [("AAPL", BARS[1].closed_at)]
    assert list(fetched.bars) == [b for b in BARS[1:] if b.opened_at <= CLOSE]
