"""A webhook's rate bucket: however many instances share it and however slow their calls are, it is never exceeded."""

import asyncio
from datetime import timedelta
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from alerts.adapters.discord_buckets import LONGEST_CALL, LOOK_AGAIN, Bucket, Buckets, News
from shared.clock import StoppedClock
from shared.errors import RateLimitedError, RecipientGoneError
from tests.builders import WALL
from tests.standins import Storage, shuffled

WINDOW = timedelta(seconds=2)
TOKEN = "t" * 68


class Discord:
    """A fixed window of so many calls, which begins when the first of them arrives."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.opened_at = WALL - WINDOW
        self.used = 0
        self.refused = 0

    def take(self, now) -> News:
        if now - self.opened_at >= WINDOW:
            self.opened_at, self.used = now, 0
        left = self.opened_at + WINDOW - now
        if self.used == self.limit:
            self.refused += 1
            return News(limit=self.limit, remaining=0, reset_after=left, wait=left)
        self.used += 1
        return News(limit=self.limit, remaining=self.limit - self.used, reset_after=left)


@given(
    seed=st.integers(0, 2**32),
    limit=st.integers(1, 6),
    slowest=st.sampled_from([0.05, 0.5, 2.5, 6.0]),
    lost=st.sampled_from([0.0, 0.2]),
)
@example(seed=0, limit=1, slowest=6.0, lost=0.2)
def test_calls_of_any_slowness_never_exceed_the_bucket(seed, limit, slowest, lost):
    """Whenever calls arrive and answers come back, or never do: Discord never refuses one, and all get through."""
    dice, discord, bucket = Random(seed), Discord(limit), Bucket()
    now, number, passed = WALL, 0, 0
    arriving: list[tuple] = []
    answering: list[tuple] = []
    while passed < 4 * limit + 4:
        now += timedelta(seconds=dice.choice([0.01, 0.1, 0.4]))
        assert now < WALL + timedelta(minutes=30), "calls starve"
        for call in sorted((c for c in arriving if c[0] <= now), key=lambda c: c[0]):
            arriving.remove(call)
            news = discord.take(call[0])
            passed += 1
            back = News(is_lost=True) if bucket.limit and dice.random() < lost else news
            answering.append((call[0] + timedelta(seconds=dice.uniform(0, slowest / 2)), call[1], back))
        for answer in [a for a in answering if a[0] <= now]:
            answering.remove(answer)
            bucket = bucket.answered(answer[1], answer[2], now)
        for _ in range(dice.randrange(4)):
            if bucket.wait(now) <= timedelta():
                number += 1
                bucket = Bucket.read(bucket.taken(f"p{number}", now).body())
                arriving.append((now + timedelta(seconds=dice.uniform(0, slowest / 2)), f"p{number}"))

    assert discord.refused == 0


def test_until_the_limit_is_known_one_call_is_under_way():
    """No number of Discord's is assumed: the first answer tells it."""
    bucket = Bucket()
    first = bucket.taken("a", WALL)

    assert bucket.wait(WALL) == timedelta()
    assert first.wait(WALL) == LOOK_AGAIN
    known = first.answered("a", News(limit=5, remaining=4, reset_after=WINDOW), WALL)
    assert known.wait(WALL) == timedelta()


def test_a_call_that_was_never_made_gives_its_place_back():
    """Nothing was sent, so nothing is counted."""
    bucket = Bucket(limit=1, used=0).taken("a", WALL).answered("a", None, WALL)

    assert bucket.wait(WALL) == timedelta()


def test_a_call_nobody_recorded_keeps_its_place_for_a_while():
    """Its process died: Discord may have counted it or not, so its place is free only when it must be over."""
    bucket = Bucket(limit=1).taken("a", WALL)

    assert bucket.wait(WALL + LONGEST_CALL - timedelta(seconds=1)) > timedelta()
    assert bucket.wait(WALL + LONGEST_CALL) == timedelta()


def test_others_who_use_the_webhook_are_counted():
    """Discord's count is believed over ours when it is higher."""
    bucket = Bucket().taken("a", WALL).answered("a", News(limit=5, remaining=0, reset_after=WINDOW), WALL)

    assert bucket.wait(WALL) == WINDOW
    assert bucket.wait(WALL + WINDOW) == timedelta()


def test_an_empty_bucket_without_a_limit_waits_as_it_was_told():
    """Headers may be missing; what is there is obeyed."""
    bucket = Bucket().taken("a", WALL).answered("a", News(remaining=0, reset_after=WINDOW), WALL)

    assert bucket.wait(WALL) == WINDOW


def test_an_answer_without_headers_still_counts():
    """What stands before Discord answers without them; the call may have been counted all the same."""
    bucket = Bucket().taken("a", WALL).answered("a", News(limit=1, remaining=0, reset_after=WINDOW), WALL)
    later = WALL + WINDOW

    bucket = bucket.taken("b", later).answered("b", News(), later)

    assert bucket.wait(later) == WINDOW


def test_a_late_answer_of_an_earlier_window_ends_nothing():
    """Answers overtake each other: the window that ends last is the one that counts."""
    bucket = Bucket(limit=1).taken("slow", WALL).taken("fast", WALL)
    bucket = bucket.answered("fast", News(limit=1, remaining=0, reset_after=WINDOW), WALL)
    bucket = bucket.answered("slow", News(limit=1, remaining=0, reset_after=WINDOW / 4), WALL)

    assert bucket.wait(WALL) == WINDOW


def test_a_wait_is_never_shortened():
    """Of two answers that ask us to wait the longer one holds, whichever came last."""
    bucket = Bucket(limit=5).taken("a", WALL).taken("b", WALL)
    for permit, seconds in (("a", 65.0), ("b", 0.3)):
        bucket = bucket.answered(permit, News(wait=timedelta(seconds=seconds)), WALL)

    assert bucket.wait(WALL) == timedelta(seconds=65)


@given(
    st.builds(Bucket, limit=st.none() | st.integers(1, 50), window=st.none() | st.just(WINDOW), used=st.integers(0, 9))
)
def test_what_is_stored_is_read_as_it_was(bucket):
    """A bucket survives storage."""
    bucket = bucket.taken("a", WALL).answered("b", News(wait=WINDOW, reset_after=WINDOW), WALL)

    assert Bucket.read(bucket.body()) == bucket


def test_what_an_older_version_stored_is_read():
    """Documents of before hold only how long to wait, for every call at once; they are no error."""
    assert Bucket.read({}).wait(WALL) == timedelta()


# --- stored, and shared


@pytest.fixture
def storage() -> Storage:
    return Storage(StoppedClock(WALL))


def some(storage: Storage, clock: StoppedClock, *, dice: Random | None = None) -> Buckets:
    """The buckets as one instance sees them."""
    return Buckets(shuffled(storage, dice) if dice else storage, clock, patience=timedelta())


async def test_instances_that_write_at_once_share_the_places(storage):
    """Every reservation is a conditional write: of twelve instances only as many get a place as there are."""
    clock = StoppedClock(WALL)
    first = some(storage, clock)
    permit = await first.reserve("1", TOKEN, "execute")
    await first.settle("1", TOKEN, "execute", permit, News(limit=5, remaining=4, reset_after=WINDOW))
    others = [some(storage, clock, dice=Random(number)) for number in range(12)]

    got = await asyncio.gather(*(one.reserve("1", TOKEN, "execute") for one in others), return_exceptions=True)

    assert sum(isinstance(one, str) for one in got) == 4
    assert all(isinstance(one, str | RateLimitedError) for one in got)


async def test_each_webhook_and_each_call_has_a_bucket_of_its_own(storage):
    """Edits do not take the places of messages, nor one webhook those of another."""
    buckets = some(storage, StoppedClock(WALL))
    permit = await buckets.reserve("1", TOKEN, "execute")
    await buckets.settle("1", TOKEN, "execute", permit, News(limit=1, remaining=0, reset_after=WINDOW))

    with pytest.raises(RateLimitedError) as caught:
        await buckets.reserve("1", TOKEN, "execute")

    assert caught.value.retry_after == WINDOW
    assert await buckets.reserve("1", TOKEN, "edit")
    assert await buckets.reserve("2", TOKEN, "execute")


async def test_a_short_wait_is_waited_here(storage):
    """A place that is free in a moment is waited for, so that a burst does not become a queue of later attempts."""
    clock = StoppedClock(WALL)
    patient = Buckets(storage, clock, patience=timedelta(seconds=2))
    permit = await patient.reserve("1", TOKEN, "execute")
    wait = timedelta(milliseconds=30)
    await patient.settle("1", TOKEN, "execute", permit, News(limit=1, remaining=0, reset_after=wait))
    waiting = asyncio.create_task(patient.reserve("1", TOKEN, "execute"))
    await asyncio.sleep(0)
    clock.at += wait

    assert await waiting


async def test_a_webhook_that_is_gone_stays_gone_for_this_token(storage):
    """Neither this instance nor another asks again; the same webhook with a new token is a new one."""
    clock = StoppedClock(WALL)
    one = some(storage, clock)
    permit = await one.reserve("1", TOKEN, "execute")
    await one.settle("1", TOKEN, "execute", permit, News(is_gone=True))

    for instance in (one, some(storage, clock)):
        for call in ("execute", "edit"):
            with pytest.raises(RecipientGoneError):
                await instance.reserve("1", TOKEN, call)
    assert await one.reserve("1", "another", "execute")


async def test_storage_does_not_know_the_token(storage):
    """What is stored tells one token from another, and is of no use to anybody."""
    buckets = some(storage, StoppedClock(WALL))
    permit = await buckets.reserve("1", TOKEN, "execute")
    await buckets.settle("1", TOKEN, "execute", permit, News(is_gone=True))

    [document] = await storage.page("system", "discord")
    assert TOKEN not in str(document)
