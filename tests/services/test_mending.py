from datetime import timedelta

import pytest

from shared.market.fetches import Fetches, State, Wanted
from shared.market.mending import AGAIN, ROUND_EVERY, Mending
from shared.market.models import Priority
from tests.unit.market.library_house import DAY, HISTORY, House


class Menders(House):
    """Instances that look for holes over one storage."""

    def mender(self):
        library = self.another()
        fetches = Fetches(documents=self.store, library=library, wall=self.wall)
        return Mending(documents=self.store, library=library, fetches=fetches, wall=self.wall)

    async def held(self):
        columns = (await self.another().look("AAPL", DAY)).columns
        return [columns.bar(i) for i in range(len(columns))]


@pytest.fixture
async def house():
    house = Menders()
    yield house
    await house.store.close()


async def test_holes_of_what_is_watched_are_filled_unasked(house):
    """Slots look behind the newest bar only: a hole before it is found by the round and filled with spare calls."""
    await house.hold(HISTORY[:100] + HISTORY[120:200] + HISTORY[203:], is_active=True)
    mender = house.mender()

    assert await mender.work() == 1
    house.wall.at += timedelta(seconds=3)
    await mender.fetches.work()

    assert await house.held() == HISTORY
    assert {priority for *_, priority in house.seller.asked} == {Priority.BACKFILL}


@pytest.mark.parametrize("how", ["whole", "behind", "unwatched"])
async def test_nothing_is_queued_where_there_is_no_hole(house, how):
    """A whole series, bars that the next slot brings, and what nobody watches cost no call."""
    bars = {"whole": HISTORY, "behind": HISTORY[:-5], "unwatched": HISTORY[:100] + HISTORY[120:]}[how]
    await house.hold(bars, is_active=how != "unwatched")

    assert await house.mender().work() == 0


async def test_series_is_looked_at_once_a_day_by_all_instances(house):
    """A round reads whole histories: no two instances look at the same series, and none does so all the time."""
    await house.hold(HISTORY[:100] + HISTORY[120:], is_active=True)
    one, two = house.mender(), house.mender()
    assert [await one.work(), await two.work()] == [1, 0]

    house.wall.at += ROUND_EVERY
    assert [await one.work(), await two.work()] == [0, 0]

    house.wall.at += AGAIN
    assert sorted([await one.work(), await two.work()]) == [0, 1]


async def test_hole_that_is_being_filled_is_not_queued_twice(house):
    """Found again the next day, a hole that waits for its provider is the same fetch."""
    await house.hold(HISTORY[:100] + HISTORY[120:], is_active=True)
    mender = house.mender()
    await mender.work()
    house.wall.at += AGAIN + ROUND_EVERY
    await mender.work()

    found = await house.store.page("system", "fetches")
    assert len(found) == 1


async def test_hole_that_no_provider_can_fill_is_left(house):
    """What a provider was asked for and has not got is absent, and no hole any more."""
    await house.hold(HISTORY[:100] + HISTORY[120:], is_active=True)
    house.seller.history["AAPL"] = HISTORY[:100] + HISTORY[120:]
    mender = house.mender()
    await mender.work()
    house.wall.at += timedelta(seconds=3)
    await mender.fetches.work()
    calls = len(house.seller.asked)

    house.wall.at += AGAIN + ROUND_EVERY
    assert (await mender.work(), len(house.seller.asked)) == (0, calls)


async def test_mended_fetch_is_told_apart(house):
    """A fetch that nobody asked for is shown with who did: the mending."""
    await house.hold(HISTORY[:100] + HISTORY[120:], is_active=True)
    mender = house.mender()
    await mender.work()

    [document] = await house.store.page("system", "fetches")
    fetch = await mender.fetches.get(document.id)
    assert (fetch.caller, fetch.state, fetch.left_bars) == ("mending", State.QUEUED, 20)
    assert isinstance(fetch.wanted, Wanted)
