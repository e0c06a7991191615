import asyncio
from datetime import timedelta

import pytest

from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    QuotaSpentError,
    RateLimitedError,
    RefusedError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.market import flights as module
from shared.market.flights import CONTAINER, LEASE, PARTITION, TOLD, Flights
from tests.builders import WALL

KEY = "bars|AAPL|1d|1|2"


class Airport:
    """Several instances on one file; ``shelf`` is what storage holds, ``calls`` who fetched it."""

    def __init__(self, path):
        self.path = path
        self.wall = StoppedClock(WALL)
        self.stores = []
        self.shelf = None
        self.calls = []
        self.gate, self.begun = asyncio.Event(), asyncio.Event()
        self.trouble = None

    def instance(self, name="one"):
        store = SQLiteDocuments(self.path, self.wall)
        self.stores.append(store)
        return Instance(self, name, Flights(documents=store, wall=self.wall))


class Instance:
    def __init__(self, airport, name, flights):
        self.airport, self.name, self.flights = airport, name, flights

    async def ask(self, **how):
        return await self.flights.once(KEY, self.fetch, self.landed, **how)

    async def fetch(self):
        self.airport.calls.append(self.name)
        self.airport.begun.set()
        await self.airport.gate.wait()
        if self.airport.trouble:
            raise self.airport.trouble
        self.airport.shelf = f"brought by {self.name}"
        return self.airport.shelf

    async def landed(self, *, is_over):
        return self.airport.shelf or ("nothing new" if is_over else None)


@pytest.fixture
async def airport(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_LOOK", 0.02)
    airport = Airport(tmp_path / "app.db")
    yield airport
    for store in airport.stores:
        await store.close()


async def under_way(airport):
    await airport.begun.wait()
    await asyncio.sleep(0.005)


async def test_thousand_in_one_process_make_one_call(airport):
    """However many ask for the same at once, the provider hears it once and all have the answer."""
    one = airport.instance()
    asking = [asyncio.create_task(one.ask()) for _ in range(1000)]
    await under_way(airport)
    airport.gate.set()

    assert set(await asyncio.gather(*asking)) == {"brought by one"}
    assert airport.calls == ["one"]


async def test_instances_share_one_call(airport):
    """Who does not hold the lease waits for what the holder brings."""
    instances = [airport.instance(name) for name in ("one", "two", "three")]
    asking = [asyncio.create_task(i.ask()) for i in instances for _ in range(20)]
    await under_way(airport)
    airport.gate.set()

    assert len(set(await asyncio.gather(*asking))) == 1
    assert len(airport.calls) == 1


async def test_what_has_landed_meanwhile_is_not_fetched_again(airport):
    """Who gets the lease looks once more: somebody may have brought it since he saw that it was missing."""
    airport.shelf = "brought by another"

    assert await airport.instance().ask() == "brought by another"
    assert airport.calls == []


async def test_call_that_brought_nothing_new_answers_for_all(airport):
    """A provider that has not got it yet is not asked by every instance in turn."""
    one, two = airport.instance("one"), airport.instance("two")

    async def nothing():
        airport.calls.append("one")
        airport.begun.set()
        await airport.gate.wait()
        return "nothing new"

    asking = [asyncio.create_task(one.flights.once(KEY, nothing, one.landed))]
    await under_way(airport)
    asking.append(asyncio.create_task(two.ask()))
    await asyncio.sleep(0.01)
    airport.gate.set()

    assert await asyncio.gather(*asking) == ["nothing new", "nothing new"]
    assert airport.calls == ["one"]


@pytest.mark.parametrize(
    "trouble",
    [
        RateLimitedError("slow down", retry_after=timedelta(seconds=7)),
        QuotaSpentError("our quota is spent", retry_after=timedelta(hours=1)),
        UnavailableError("down"),
        UnknownSymbolError("no such symbol"),
        RefusedError("not this"),
    ],
    ids=lambda e: type(e).__name__,
)
async def test_failure_is_everybodys(airport, trouble):
    """One call fails once, for all who waited for it: same kind, words and advice; soon after it may be tried."""
    one, two = airport.instance("one"), airport.instance("two")
    airport.trouble = trouble
    asking = [asyncio.create_task(i.ask()) for i in (one, one, two, two)]
    await under_way(airport)
    airport.gate.set()

    for outcome in await asyncio.gather(*asking, return_exceptions=True):
        assert type(outcome) is type(trouble)
        assert str(outcome) == str(trouble)
        assert getattr(outcome, "retry_after", None) == getattr(trouble, "retry_after", None)
    assert len(airport.calls) == 1

    airport.wall.at += TOLD
    airport.trouble = None
    assert await two.ask() == "brought by two"


async def test_trouble_that_only_a_person_mends_is_nobody_elses(airport):
    """What is not the provider's answer holds nobody up."""
    one, two = airport.instance("one"), airport.instance("two")
    airport.gate.set()
    airport.trouble = ConfigurationError("no key")
    with pytest.raises(ConfigurationError):
        await one.ask()
    airport.trouble = None

    assert await two.ask() == "brought by two"


@pytest.mark.parametrize("leads", [True, False], ids=["leader", "follower"])
async def test_cancelled_caller_takes_nothing_from_the_others(airport, leads):
    """Whoever hangs up: the call goes on for those who wait."""
    one = airport.instance()
    asking = [asyncio.create_task(one.ask()) for _ in range(3)]
    await under_way(airport)
    gone = asking.pop(0 if leads else -1)
    gone.cancel()
    await asyncio.wait([gone])
    airport.gate.set()

    assert await asyncio.gather(*asking) == ["brought by one"] * 2
    assert airport.calls == ["one"]


async def test_call_ends_with_the_last_who_wanted_it(airport):
    """Nothing runs on for nobody, and the lease is given back at once."""
    one, two = airport.instance("one"), airport.instance("two")
    asking = [asyncio.create_task(one.ask()) for _ in range(3)]
    await under_way(airport)
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)

    assert await airport.stores[0].page(CONTAINER, PARTITION) == []
    airport.gate.set()
    assert await two.ask() == "brought by two"


async def test_killed_instance_is_succeeded_when_its_lease_ends(airport):
    """What a killed instance had begun is done by exactly one of those who wait."""
    dead = airport.instance("dead")
    lease = await dead.flights._take(KEY)
    assert lease is not None
    asking = [asyncio.create_task(airport.instance(name).ask()) for name in ("one", "two", "three")]
    airport.gate.set()
    await asyncio.sleep(0.05)
    assert airport.calls == []

    airport.wall.at += LEASE

    assert len(set(await asyncio.gather(*asking))) == 1
    assert len(airport.calls) == 1


async def test_patience_ends_at_the_deadline(airport):
    """Who cannot wait for another instance is told to come back."""
    await airport.instance("dead").flights._take(KEY)

    with pytest.raises(UnavailableError, match="another instance"):
        await airport.instance().ask(deadline=airport.wall.at)


async def test_own_trouble_leads_to_the_next(airport):
    """A caller who may not have the call made fails alone; the next of those who wait makes it."""
    one, two = airport.instance("one"), airport.instance("two")

    class MyOwnError(QuotaSpentError):
        pass

    async def not_mine():
        await airport.gate.wait()
        raise MyOwnError("your share is spent")

    capped = [asyncio.create_task(one.flights.once(KEY, not_mine, one.landed, private=(MyOwnError,)))]
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(i.ask(private=(MyOwnError,))) for i in (one, one, two)]
    await asyncio.sleep(0.01)
    airport.gate.set()

    [refused] = await asyncio.gather(*capped, return_exceptions=True)
    assert isinstance(refused, MyOwnError)
    assert len(set(await asyncio.gather(*others))) == 1
    assert len(airport.calls) == 1


async def test_call_that_hangs_ends_before_its_lease(airport, monkeypatch):
    """There are never two calls: the holder gives up before somebody may take over."""
    monkeypatch.setattr(module, "CALL", timedelta(milliseconds=20))
    one = airport.instance()

    with pytest.raises(UnavailableError, match="too long"):
        await one.ask()


async def test_who_has_less_time_than_the_one_who_asked_first_does_not_wait_for_his(airport):
    """A reader in a hurry is told to come back while a patient backfill's call goes on, and finds what it brought."""
    one = airport.instance()
    patient = asyncio.create_task(one.ask())
    await under_way(airport)

    with pytest.raises(UnavailableError, match="for somebody else") as hurried:
        await one.ask(deadline=airport.wall.at + timedelta(milliseconds=5))
    airport.gate.set()

    assert hurried.value.retry_after == TOLD
    assert await patient == "brought by one"
    assert airport.calls == ["one"]
