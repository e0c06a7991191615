import asyncio
from datetime import timedelta

import pytest

from shared.clock import StoppedClock
from shared.errors import RateLimitedError
from shared.market.registry import Window, windows_of
from shared.market.throttle import PATIENCE, Throttle
from tests.builders import WALL, documents

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
A_SECOND_APART = (Window(amount=1, span=SECOND),)
TWO_A_DAY = (Window(amount=2, span=DAY),)


@pytest.fixture
def wall():
    return StoppedClock(WALL)


@pytest.fixture
async def store(wall):
    store = documents(wall)
    yield store
    await store.close()


@pytest.fixture(autouse=True)
def left(monkeypatch, wall):
    """The instants at which permitted calls leave; waiting moves the wall instead of taking time."""
    sleep = asyncio.sleep

    async def wait(seconds: float) -> None:
        wall.at += timedelta(seconds=seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", wait)


def throttle(store, wall, windows=A_SECOND_APART, provider="p"):
    return Throttle(store, wall, provider, windows)


async def leaving(throttle, wall, times):
    instants = []
    for _ in range(times):
        await throttle.permit()
        instants.append(wall.now() - WALL)
    return instants


async def test_calls_leave_one_after_the_other(store, wall):
    """A permit is the right moment, waited for."""
    first, second, third = await leaving(throttle(store, wall), wall, 3)

    assert first == timedelta(0)
    assert second >= first + SECOND
    assert third >= second + SECOND


async def test_instances_share_one_count(store, wall):
    """Two instances, or a restarted one, spend one quota."""
    one, other = (throttle(store, wall, TWO_A_DAY) for _ in range(2))

    await one.permit()
    await other.permit()
    with pytest.raises(RateLimitedError):
        await one.permit()
    with pytest.raises(RateLimitedError):
        await throttle(store, wall, TWO_A_DAY).permit()


async def test_providers_are_counted_apart(store, wall):
    """What one provider was asked costs the other nothing."""
    for provider in ("p", "q"):
        for _ in range(2):
            await throttle(store, wall, TWO_A_DAY, provider).permit()

    for provider in ("p", "q"):
        with pytest.raises(RateLimitedError, match=f"^{provider}: "):
            await throttle(store, wall, TWO_A_DAY, provider).permit()


async def test_spent_quota_says_when_to_come_again(store, wall):
    """Coming back when told is enough; coming back sooner is refused again and costs nothing."""
    spent = throttle(store, wall, TWO_A_DAY)
    await spent.permit()
    await spent.permit()

    with pytest.raises(RateLimitedError) as caught:
        await spent.permit()
    assert DAY <= caught.value.retry_after <= DAY + 2 * SECOND

    wall.at += caught.value.retry_after - PATIENCE - SECOND
    with pytest.raises(RateLimitedError):
        await spent.permit()
    wall.at += SECOND + PATIENCE
    await spent.permit()


async def test_only_a_short_wait_is_waited(store, wall):
    """The caller's patience decides; a wait within it is slept, a longer one is left to the next slot."""
    slow = throttle(store, wall, (Window(amount=1, span=10 * SECOND),))
    await slow.permit()

    with pytest.raises(RateLimitedError):
        await slow.permit(patience=10 * SECOND)
    before = wall.now()
    await slow.permit(patience=11 * SECOND)

    assert wall.now() - before >= 10 * SECOND


async def test_many_at_once_each_get_their_own_instant(store, wall):
    """Permits asked for together are handed out one by one: nobody shares an instant, nobody is forgotten."""
    throttles = [throttle(store, wall, (Window(amount=10, span=SECOND),)) for _ in range(2)]

    answers = await asyncio.gather(*(throttles[n % 2].permit() for n in range(20)), return_exceptions=True)

    assert answers == [None] * 20
    document = await store.read("quota", "p", "throttle")
    assert document.body["calls"] == 20
    assert wall.now() - WALL >= 19 * SECOND / 10


async def test_refusal_holds_everybody_back(store, wall):
    """A provider that says no is left alone by all instances until the time it named, and not longer."""
    one, other = (throttle(store, wall) for _ in range(2))
    await one.permit()

    await one.refused(timedelta(minutes=1))

    with pytest.raises(RateLimitedError) as caught:
        await other.permit()
    assert caught.value.retry_after == timedelta(minutes=1)
    wall.at += timedelta(minutes=1)
    await other.permit()
    assert wall.now() == WALL + timedelta(minutes=1)


async def test_short_refusal_is_waited_for(store, wall):
    """A pause within the caller's patience only delays the call."""
    blocked = throttle(store, wall)
    await blocked.refused(2 * SECOND)

    await blocked.permit()

    assert wall.now() - WALL == 2 * SECOND


async def test_refusals_are_counted(store, wall):
    """An operator sees how often a provider refused although we kept its windows."""
    for _ in range(3):
        await throttle(store, wall).refused(SECOND)

    assert (await store.read("quota", "p", "throttle")).body["refusals"] == 3


class TestUnlimited:
    async def test_nothing_is_counted(self, store, wall):
        """A plan without windows costs no storage write."""
        unlimited = throttle(store, wall, windows_of("alpha_vantage", "unlimited"))

        assert await leaving(unlimited, wall, 50) == [timedelta(0)] * 50

        assert await store.feed("quota") == []

    async def test_refusal_holds_all_the_same(self, store, wall):
        """A provider that refuses is left alone, whatever its plan promised."""
        one, other = (throttle(store, wall, ()) for _ in range(2))
        await one.refused(timedelta(minutes=1))
        written = await store.feed("quota")

        with pytest.raises(RateLimitedError) as caught:
            await other.permit()
        assert caught.value.retry_after == timedelta(minutes=1)

        wall.at += timedelta(seconds=58)
        await other.permit()
        assert wall.now() == WALL + timedelta(minutes=1)
        await other.permit()
        assert await store.feed("quota") == written
