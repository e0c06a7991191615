"""Time is virtual here: the loop's clock jumps to the next timer, and the wall follows it."""

import asyncio
import json
import selectors
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from functools import wraps
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import format_instant
from shared.documents import Document, sort_key
from shared.errors import (
    DailyQuotaError,
    NotEntitledError,
    QuotaSpentError,
    RateLimitedError,
    RefusedError,
    UnavailableError,
)
from shared.market.models import Priority
from shared.market.pacing import micros
from shared.market.ports import Limits
from shared.market.quota import Quota
from shared.market.registry import Kind, Window, windows_of
from shared.market.throttle import PATIENCE, Throttle
from tests.builders import WALL

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
A_SECOND_APART = (Window(amount=1, span=SECOND),)
TWO_A_DAY = (Window(amount=2, span=DAY),)
SOON = 0.1
"""Seconds: the guard and the stagger, but no window."""


OPENED = []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that never waits: its time is that of the next timer."""

    def __init__(self):
        super().__init__(selectors.SelectSelector())
        self.virtual = 0.0
        select = self._selector.select

        def jump(timeout):
            assert timeout is not None, "everybody waits for nobody"
            self.virtual += max(timeout, 0.0)
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.virtual


class Wall:
    """The wall clock of a virtual loop."""

    def __init__(self):
        self.ahead = timedelta()

    def now(self):
        return WALL + self.ahead + timedelta(seconds=asyncio.get_running_loop().time())


class Store:
    """Storage that counts what it is asked, takes its time when told, and raises *trouble* while that is set."""

    def __init__(self, wall, path=":memory:", *, dice=None, most=0.005):
        self.inner = SQLiteDocuments(path, wall)
        self.asked = Counter()
        self.trouble = None
        self.dice, self.most = dice, most
        OPENED.append(self)

    def __getattr__(self, name):
        async def call(*args, **kwargs):
            self.asked[name] += 1
            if self.dice:
                await asyncio.sleep(self.dice.uniform(0, self.most))
            if self.trouble and name in self.trouble[0]:
                raise self.trouble[1]
            found = await getattr(self.inner, name)(*args, **kwargs)
            await asyncio.sleep(self.dice.uniform(0, self.most) if self.dice else 0)
            return found

        return call


class House:
    """A provider's windows and some instances that share one store."""

    def __init__(self, windows=A_SECOND_APART, *, dice=None):
        self.wall = Wall()
        self.windows = windows
        self.store = Store(self.wall, dice=dice)
        self.left = []

    def throttle(self, windows=None, provider="p", store=None):
        given = self.windows if windows is None else windows
        return Throttle(store or self.store, self.wall, provider, given, dice=Random(1))

    def seconds(self):
        return (self.wall.now() - WALL).total_seconds()

    async def call(self, throttle, name=None, *, takes=0.0, raising=None, **wanted):
        """One call, from the permit to its answer; when it left."""
        wanted.setdefault("deadline", self.wall.now() + 30 * DAY)
        async with throttle.permit(**wanted) as permit:
            permit.sent()
            at = self.seconds()
            self.left.append((name, at))
            await asyncio.sleep(takes)
            if raising:
                raise raising
        return at

    async def body(self):
        return (await self.store.inner.read("quota", "p", "throttle")).body


def virtually(test):
    """Run an asynchronous test on a loop of virtual time."""

    async def whole(*args, **kwargs):
        try:
            await test(*args, **kwargs)
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            while OPENED:
                await OPENED.pop().inner.close()

    @wraps(test)
    def run(*args, **kwargs):
        loop = VirtualLoop()
        try:
            loop.run_until_complete(whole(*args, **kwargs))
        finally:
            loop.close()

    return run


class TestWindows:
    @virtually
    async def test_calls_leave_one_after_the_other(self):
        """A permit is the right moment, waited for."""
        house = House()
        throttle = house.throttle()

        times = [await house.call(throttle) for _ in range(3)]

        assert times[0] < SOON
        assert 1 <= times[1] < 1 + SOON
        assert 2 <= times[2] < 2 + 2 * SOON

    @virtually
    async def test_instances_share_one_count(self):
        """Two instances, or a restarted one, spend one quota; another provider's is another."""
        house = House(TWO_A_DAY)
        one, other = house.throttle(), house.throttle()
        await house.call(one)
        await house.call(other)

        for instance in (one, other, house.throttle()):
            with pytest.raises(QuotaSpentError, match=r"^p: "):
                await house.call(instance, deadline=house.wall.now() + MINUTE)
        await house.call(house.throttle(provider="q"))

    @virtually
    async def test_spent_quota_says_so_at_once_and_when_to_come_again(self):
        """Coming back when told is enough; coming back sooner is refused again and costs nothing."""
        house = House(TWO_A_DAY)
        throttle = house.throttle()
        for _ in range(2):
            await house.call(throttle)
        began, calls = house.seconds(), (await house.body())["calls"]

        with pytest.raises(QuotaSpentError) as caught:
            async with throttle.permit():
                raise AssertionError("nobody may enter")

        assert house.seconds() - began < SOON
        assert DAY - SECOND <= caught.value.retry_after <= DAY + SECOND
        await asyncio.sleep((caught.value.retry_after - PATIENCE - SECOND).total_seconds())
        with pytest.raises(QuotaSpentError):
            async with throttle.permit():
                raise AssertionError("nobody may enter")
        assert (await house.body())["calls"] == calls
        await asyncio.sleep((PATIENCE + SECOND).total_seconds())
        async with throttle.permit() as permit:
            permit.sent()

    @virtually
    async def test_deadline_decides_what_is_waited_for(self):
        """A wait within it is slept; one that turns out longer, because better calls came, is given up in time."""
        house = House((Window(amount=1, span=10 * SECOND),))
        throttle = house.throttle()
        await house.call(throttle)

        with pytest.raises(QuotaSpentError):
            await house.call(throttle, deadline=house.wall.now() + 9 * SECOND)
        patient = asyncio.create_task(
            house.call(throttle, priority=Priority.PREFETCH, deadline=house.wall.now() + 12 * SECOND)
        )
        await asyncio.sleep(5)
        assert 10 <= await house.call(throttle) < 10 + SOON
        with pytest.raises(QuotaSpentError):
            await patient
        assert house.seconds() < 11

    @virtually
    async def test_weights_count(self):
        """A call that weighs more leaves less for the others; one that never fits is told so."""
        house = House((Window(amount=8, span=MINUTE, kind=Kind.ALIGNED),))
        throttle = house.throttle()
        await house.call(throttle, weight=5)
        await house.call(throttle, weight=3)

        assert await house.call(throttle) >= 60
        with pytest.raises(RefusedError, match="counts 9 never fits"):
            await house.call(throttle, weight=9)

    @virtually
    async def test_one_permit_costs_one_read_and_one_write(self):
        """What calls teach is written with the next reservation."""
        house = House(windows_of("finnhub", "free"))
        throttle = house.throttle()
        for _ in range(10):
            await house.call(throttle, takes=0.05)
            throttle.latency(0.05)
        house.store.asked.clear()

        for left in range(49, 39, -1):
            await house.call(throttle, takes=0.05)
            throttle.latency(0.05)
            await throttle.observe(Limits(amount=60, left=left, resets_at=house.wall.now() + 30 * SECOND))

        assert house.store.asked == {"read": 10, "replace": 10}

    @virtually
    async def test_calls_that_wait_together_are_reserved_together(self):
        """Forty callers at once cost far fewer than forty writes."""
        house = House((Window(amount=60, span=MINUTE),))
        throttle = house.throttle()

        await asyncio.gather(*(house.call(throttle) for _ in range(40)))

        assert house.store.asked["replace"] + house.store.asked["create"] <= 8
        assert (await house.body())["calls"] == 40

    @virtually
    async def test_old_document_is_read_on(self):
        """Instants written by the version before count."""
        house = House(TWO_A_DAY)
        recent = [format_instant(WALL - HOUR), format_instant(WALL - 2 * HOUR)]
        body = {"recent": sorted(recent), "calls": 7, "refusals": 3, "blocked_until": format_instant(WALL - DAY)}
        document = Document(id="throttle", partition="p", sort=sort_key(WALL, "p"), body=body)
        await house.store.inner.create("quota", document)

        assert 22 * 3600 <= await house.call(house.throttle()) <= 22 * 3600 + 2

        state = await house.throttle().state()
        assert (state.calls, state.refusals, state.windows[0].used) == (8, 3, 2)

    @virtually
    async def test_another_plan_goes_on_with_what_was_counted(self):
        """A changed plan does not give the minute away twice."""
        house = House((Window(amount=60, span=MINUTE),))
        for _ in range(5):
            await house.call(house.throttle())

        await house.call(house.throttle((Window(amount=6, span=30 * SECOND),)))
        assert await house.call(house.throttle((Window(amount=6, span=30 * SECOND),))) >= 30

    def test_document_stays_small(self):
        """Below 8 KB with the largest windows, full, and calls of several weights."""
        windows = (Window(amount=256, span=10 * SECOND), Window(amount=1200, span=MINUTE))
        quota = Quota.of({}, windows, micros(WALL))
        for number in range(1000):
            quota.reserve(micros(WALL) + number * 39_123, 1, "")

        body = Quota.of(quota.body(), windows, micros(WALL + 39 * SECOND)).body()

        assert len(body["windows"]["10s"]["at"]) >= 256
        assert sum(body["windows"]["60s"]["n"]) == 1000
        assert len(json.dumps(body)) < 8192

    @virtually
    async def test_wall_set_back_holds_nobody_longer_than_a_window(self):
        """Instants that now lie in the future count as made just now."""
        house = House((Window(amount=1, span=2 * HOUR),))
        house.wall.ahead = HOUR
        await house.call(house.throttle())
        house.wall.ahead = timedelta()

        assert 7200 <= await house.call(house.throttle()) < 7207


class TestHandingBack:
    @virtually
    async def test_unused_instant_is_used_by_the_next(self):
        """A permit that was left without a call costs nothing."""
        house = House(TWO_A_DAY)
        throttle = house.throttle()
        for _ in range(5):
            async with throttle.permit():
                pass
            with suppress(ValueError):
                async with throttle.permit():
                    raise ValueError("it never left")

        await house.call(throttle)
        assert await house.call(throttle) < 5
        assert (await house.body())["calls"] == 2

    @virtually
    async def test_call_that_left_counts_whatever_became_of_it(self):
        """Nobody knows whether the provider counted it."""
        house = House(TWO_A_DAY)
        throttle = house.throttle()
        for error in (UnavailableError("cut"), ValueError("a bug")):
            with suppress(UnavailableError, ValueError):
                await house.call(throttle, raising=error)

        with pytest.raises(QuotaSpentError):
            await house.call(throttle, deadline=house.wall.now() + MINUTE)

    @pytest.mark.parametrize("steps", range(24))
    def test_cancelled_call_leaves_nothing_behind(self, steps):
        """Wherever it is cancelled: while it reads, writes, waits, or has its permit."""

        @virtually
        async def scenario():
            house = House((Window(amount=3, span=DAY),))
            throttle = house.throttle()
            await house.call(throttle)
            task = asyncio.create_task(throttle.permit(deadline=house.wall.now() + HOUR).__aenter__())
            other = asyncio.create_task(house.call(throttle))
            for _ in range(steps):
                await asyncio.sleep(0)
            if task.done():
                return
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await other

            body = await house.body()
            assert body["calls"] == 2
            assert "claims" not in body
            assert (await throttle.state()).waiting == dict.fromkeys(Priority, 0)
            assert await house.call(throttle) < 4

        scenario()

    @virtually
    async def test_caller_cancelled_within_its_permit_hands_it_back(self):
        """A caller that gives up before its call leaves has used nothing."""
        house = House(TWO_A_DAY)
        throttle = house.throttle()

        async def never_sends():
            async with throttle.permit():
                await asyncio.sleep(3600)

        task = asyncio.create_task(never_sends())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert (await throttle.state()).windows[0].used == 0

    @virtually
    async def test_nothing_is_lost_while_somebody_else_writes(self):
        """Instants handed back during another call's write are handed back with the next."""
        house = House((Window(amount=100, span=DAY),), dice=Random(2))
        house.store.most = 0.03
        throttle = house.throttle()

        async def gives_up(number):
            async with throttle.permit():
                await asyncio.sleep(number * 0.0007)

        await asyncio.gather(*(gives_up(n) for n in range(40)))

        assert (await throttle.state()).windows[0].used == 0
        assert (await house.body())["calls"] == 0

    @virtually
    async def test_slow_storage_costs_no_second_reservation(self):
        """An instant is never reserved so near that it has passed when it is written."""
        house = House((Window(amount=100, span=DAY),))
        house.store.dice, house.store.most = Random(4), 0.06
        throttle = house.throttle()

        for _ in range(20):
            await house.call(throttle)

        assert house.store.asked["replace"] + house.store.asked["create"] <= 30

    @virtually
    async def test_permit_that_would_leave_late_is_reserved_anew(self):
        """Others count on an instant being kept: who overslept asks again."""
        house = House()
        overslept = Random(3)

        async def sleep(seconds):
            await asyncio.sleep(seconds + overslept.choice([0, 0, 0.4]))

        throttles = [Throttle(house.store, house.wall, "p", house.windows, sleep=sleep) for _ in range(2)]
        await asyncio.gather(*(house.call(throttles[n % 2]) for n in range(8)))

        times = sorted(at for _, at in house.left)
        assert min(later - at for at, later in pairwise(times)) >= 1

    @virtually
    async def test_call_that_took_long_counts_as_late_as_it_may_have_arrived(self):
        """The provider's second begins when the call reaches it, not when it left."""
        house = House()
        throttle = house.throttle()
        first = await house.call(throttle, takes=0.5)
        second = await house.call(house.throttle())
        assert second >= first + 1.5

        for _ in range(10):
            await house.call(throttle, takes=0.1)
            throttle.latency(0.1)
        quick = await house.call(throttle, takes=0.1)
        slow = await house.call(throttle, takes=0.9)
        following = await house.call(house.throttle())

        assert slow < quick + 1 + SOON
        assert following >= slow + 0.8 + 1


class TestPriority:
    @virtually
    async def test_better_calls_go_first(self):
        """Of those who wait together the class decides, within a class who came first."""
        house = House()
        throttle = house.throttle()
        await house.call(throttle)
        wanted = [Priority.PREFETCH, Priority.BACKFILL, Priority.SCORING, Priority.ASKED, Priority.LIVE, Priority.LIVE]

        await asyncio.gather(*(house.call(throttle, (p.name, n), priority=p) for n, p in enumerate(wanted)))

        order = [name for name, _ in house.left[1:]]
        assert order == [
            ("LIVE", 4),
            ("LIVE", 5),
            ("ASKED", 3),
            ("SCORING", 2),
            ("BACKFILL", 1),
            ("PREFETCH", 0),
        ]

    @virtually
    async def test_waiting_live_call_is_seen_by_other_instances(self):
        """A backfill elsewhere does not take the instant a live call waits for."""
        house = House((Window(amount=1, span=10 * SECOND),))
        one, other = house.throttle(), house.throttle()
        await house.call(one)
        live = asyncio.create_task(house.call(one, "live"))
        await asyncio.sleep(9.9)
        backfill = asyncio.create_task(house.call(other, "backfill", priority=Priority.BACKFILL))
        await asyncio.gather(live, backfill)

        assert [name for name, _ in house.left[1:]] == ["live", "backfill"]

    @virtually
    async def test_claim_of_an_instance_that_died_lapses(self):
        """Nobody waits for long for a call that will never be made."""
        house = House((Window(amount=1, span=10 * SECOND),))
        one, other = house.throttle(), house.throttle()
        await house.call(one)
        await asyncio.sleep(8)
        document = await house.store.inner.read("quota", "p", "throttle")
        key = (document.body["windows"]["10s"]["at"])[0]
        claims = {"dead": [[0, key, 1, key + 12_500_000]]}
        await house.store.inner.replace("quota", document.with_body({**document.body, "claims": claims}))

        at = await house.call(other, priority=Priority.BACKFILL)

        assert 12 <= at < 14

    @virtually
    async def test_nothing_starves(self):
        """A prefetch among ever new live calls leaves after its ageing at the latest."""
        house = House()
        throttle = house.throttle()

        async def live_for_ever():
            while True:
                await house.call(throttle)

        crowd = [asyncio.create_task(live_for_ever()) for _ in range(4)]
        waited = await house.call(throttle, priority=Priority.PREFETCH)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)

        assert 30 <= waited <= 50

    @virtually
    async def test_low_calls_never_fill_a_queue_of_instants(self):
        """A live call among fifty backfills waits for one of them, not for all."""
        house = House((Window(amount=20, span=SECOND),))
        one, other = house.throttle(), house.throttle()
        backfills = [asyncio.create_task(house.call(one, priority=Priority.BACKFILL)) for _ in range(50)]
        await asyncio.sleep(1.99)  # the second's last backfill left long ago, the next second's are near

        assert await house.call(other) < 2.1
        await asyncio.gather(*backfills)

    @virtually
    async def test_last_share_of_the_day_is_kept(self):
        """Backfill may spend four fifths of a day and prefetch three; the rest is for better calls."""
        house = House((Window(amount=10, span=DAY),))
        throttle, near = house.throttle(), {"deadline": WALL + HOUR}
        spent = Counter()
        for priority in (Priority.PREFETCH, Priority.BACKFILL, Priority.SCORING):
            with suppress(QuotaSpentError):
                while True:
                    await house.call(throttle, priority=priority, **near)
                    spent[priority] += 1

        assert spent == {Priority.PREFETCH: 6, Priority.BACKFILL: 2, Priority.SCORING: 2}


class TestRefusals:
    @virtually
    async def test_refusal_holds_everybody_back(self):
        """A provider that says no is left alone by all instances until the time it named, and it is counted."""
        house = House()
        one, other = house.throttle(), house.throttle()
        with pytest.raises(RateLimitedError):
            await house.call(one, raising=RateLimitedError("slow down", retry_after=MINUTE))

        with pytest.raises(QuotaSpentError) as caught:
            async with other.permit():
                raise AssertionError("nobody may enter")
        assert MINUTE - SECOND <= caught.value.retry_after <= MINUTE
        assert 60 <= await house.call(other) < 60 + SOON
        state = await one.state()
        assert (state.refusals, state.probes) == (1, 0)

    @virtually
    async def test_our_own_restraint_is_no_refusal(self):
        """QuotaSpentError inside a permit came from us: nobody is held back for it."""
        house = House()
        throttle = house.throttle()
        with pytest.raises(QuotaSpentError):
            await house.call(throttle, raising=QuotaSpentError("ours", retry_after=HOUR))

        assert await house.call(throttle) < 2
        assert (await throttle.state()).refusals == 0

    @virtually
    async def test_spent_day_ends_with_exactly_one_probe(self):
        """Of many instances and callers one asks whether the day has begun anew; the others wait for its answer."""
        house = House((Window(amount=25, span=DAY),), dice=Random(5))
        throttles = [house.throttle() for _ in range(4)]
        with pytest.raises(DailyQuotaError):
            await house.call(throttles[0], raising=DailyQuotaError("spent", retry_after=HOUR))
        asked, probes = [], []

        async def caller(throttle):
            async with throttle.permit(deadline=house.wall.now() + DAY) as permit:
                permit.sent()
                asked.append((permit.is_probe, house.seconds()))
                probes.extend([permit] * permit.is_probe)
                await asyncio.sleep(2)

        await asyncio.gather(*(caller(throttles[n % 4]) for n in range(12)))

        first, *others = sorted(asked, key=lambda one: one[1])
        assert first[0]
        assert 3600 <= first[1] < 3601
        assert len(probes) == 1
        assert min(at for _, at in others) >= first[1] + 2
        state = await throttles[1].state()
        assert (state.refusals, state.probes, state.failed_probes, state.cool_down_until) == (1, 1, 0, None)

    @virtually
    async def test_failed_probe_prolongs_the_cool_down(self):
        """It is counted apart from refusals that came as a surprise, and the next probe is one again."""
        house = House((Window(amount=25, span=DAY),))
        throttle = house.throttle()
        for _ in range(3):
            with pytest.raises(DailyQuotaError):
                await house.call(throttle, raising=DailyQuotaError("spent", retry_after=HOUR))
        left = [at for _, at in house.left]
        async with throttle.permit(deadline=house.wall.now() + DAY) as permit:
            permit.sent()
            assert permit.is_probe

        assert [round(at / 3600) for at in left] == [0, 1, 2]
        state = await throttle.state()
        assert (state.refusals, state.probes, state.failed_probes) == (1, 3, 2)
        assert await house.call(throttle) < 3 * 3600 + 1

    @virtually
    async def test_probe_that_is_no_answer_is_made_again(self):
        """A cut connection proves nothing; an answer of another kind proves that the quota is back."""
        house = House((Window(amount=25, span=DAY),))
        throttle = house.throttle()
        for error in (DailyQuotaError("spent", retry_after=HOUR), UnavailableError("cut"), NotEntitledError("no")):
            with pytest.raises(type(error)):
                await house.call(throttle, raising=error)

        state = await throttle.state()
        assert (state.probes, state.failed_probes, state.cool_down_until) == (2, 0, None)
        assert [round(at) for _, at in house.left] == [0, 3600, 3610]

    @virtually
    async def test_probe_that_never_left_belongs_to_the_next(self):
        """A prober that was cancelled hands the probe back; one that died loses it after a while."""
        house = House((Window(amount=25, span=DAY),))
        one, other = house.throttle(), house.throttle()
        with pytest.raises(DailyQuotaError):
            await house.call(one, raising=DailyQuotaError("spent", retry_after=HOUR))
        far = house.wall.now() + DAY
        async with one.permit(deadline=far) as permit:
            assert permit.is_probe
            with pytest.raises(QuotaSpentError):
                async with other.permit():
                    raise AssertionError("nobody may enter")
        dead = one.permit(deadline=far)
        assert (await dead.__aenter__()).is_probe

        at = house.seconds()
        async with other.permit(deadline=far) as permit:
            permit.sent()
            assert permit.is_probe

        assert 29 <= house.seconds() - at <= 32
        with suppress(RuntimeError):
            await dead.__aexit__(None, None, None)


class TestHeaders:
    @virtually
    async def test_foreign_calls_are_counted_until_the_window_resets(self):
        """Somebody else uses the key: what headers say is left is all that is left."""
        house = House((Window(amount=10, span=MINUTE),))
        one, other = house.throttle(), house.throttle()
        await house.call(one)

        await one.observe(Limits(amount=10, left=2, resets_at=WALL + 40 * SECOND))

        state = await other.state()
        assert (state.windows[0].used, state.windows[0].left) == (8, 2)
        times = [await house.call(other) for _ in range(3)]
        assert times[1] < 1
        assert 40 <= times[2] < 41

    @virtually
    async def test_another_amount_replaces_ours(self):
        """The provider knows best what the plan allows; more is used, and less is kept."""
        house = House((Window(amount=2, span=MINUTE),))
        throttle = house.throttle()
        await house.call(throttle)
        await throttle.observe(Limits(amount=4, left=3, resets_at=WALL + MINUTE, span=MINUTE))
        assert [await house.call(throttle) < 2 for _ in range(3)] == [True] * 3
        assert await house.call(house.throttle()) >= 60

        await throttle.observe(Limits(amount=1, left=0, resets_at=house.wall.now() + MINUTE, span=MINUTE))
        first = await house.call(throttle)
        assert await house.call(throttle) >= first + 60

    @virtually
    async def test_reset_in_decades_is_not_believed(self):
        """A misread unit holds nobody back for longer than the window lasts."""
        house = House((Window(amount=10, span=MINUTE),))
        throttle = house.throttle()
        await house.call(throttle)
        await throttle.observe(Limits(amount=10, left=0, resets_at=WALL + 20_000 * DAY))

        assert 60 <= await house.call(throttle) < 62
        assert max([await house.call(throttle) for _ in range(9)]) < 62

    @virtually
    async def test_headers_that_agree_write_nothing(self):
        """Neither do those that leave us more than we thought."""
        house = House((Window(amount=30, span=SECOND), Window(amount=60, span=MINUTE)))
        throttle = house.throttle()
        await house.call(throttle)
        house.store.asked.clear()

        for left in (59, 60):
            await throttle.observe(Limits(amount=60, left=left, resets_at=WALL + MINUTE))
        await throttle.observe(Limits())
        assert house.store.asked == {}

        await throttle.observe(Limits(amount=60, left=20, resets_at=WALL + MINUTE))
        assert (await throttle.state()).windows[1].left == 20
        house.store.asked.clear()
        await throttle.observe(Limits(amount=60, left=40, resets_at=WALL + MINUTE))
        assert house.store.asked == {}
        await house.call(throttle)
        assert (await throttle.state()).windows[1].left == 39


class TestUnlimited:
    @virtually
    async def test_nothing_is_counted(self):
        """A plan without windows costs no storage write."""
        house = House(windows_of("alpha_vantage", "unlimited"))
        throttle = house.throttle()

        assert [await house.call(throttle) for _ in range(50)] == [0] * 50

        assert house.store.asked == {"read": 50}

    @virtually
    async def test_refusal_holds_all_the_same(self):
        """A provider that refuses is left alone, whatever its plan promised, and waiting writes nothing."""
        house = House(())
        one, other = house.throttle(), house.throttle()
        with pytest.raises(RateLimitedError):
            await house.call(one, raising=RateLimitedError("no", retry_after=MINUTE))
        written = await house.body()

        with pytest.raises(QuotaSpentError):
            async with other.permit():
                raise AssertionError("nobody may enter")
        assert 60 <= await house.call(other) < 61
        assert await house.body() == written


class TestStorage:
    @pytest.mark.parametrize("operation", ["read", "create"])
    @pytest.mark.parametrize("trouble", [UnavailableError("down"), RateLimitedError("slow", retry_after=SECOND)])
    def test_trouble_is_raised_to_all_who_wait(self, operation, trouble):
        """As storage raised it; the next call tries anew."""

        @virtually
        async def scenario():
            house = House()
            throttle = house.throttle()
            house.store.trouble = ({operation}, trouble)

            answers = await asyncio.gather(*(house.call(throttle) for _ in range(3)), return_exceptions=True)
            assert answers == [trouble] * 3

            house.store.trouble = None
            assert await house.call(throttle) < SOON

        scenario()

    @virtually
    async def test_refusal_that_could_not_be_stored_is_not_forgotten(self):
        """It is stored with the next write, and the caller hears what the provider said."""
        house = House(())
        throttle = house.throttle()
        house.store.trouble = ({"create", "replace"}, UnavailableError("down"))
        with pytest.raises(RateLimitedError, match="the provider's no"):
            await house.call(throttle, raising=RateLimitedError("the provider's no", retry_after=MINUTE))
        house.store.trouble = None

        assert await house.call(throttle) >= 60

    @virtually
    async def test_state_says_who_waits(self):
        """By priority, of all instances."""
        house = House((Window(amount=1, span=10 * SECOND),))
        one, other = house.throttle(), house.throttle()
        await house.call(one)
        wanted = [(one, Priority.LIVE), (other, Priority.LIVE), (one, Priority.BACKFILL)]
        tasks = [asyncio.create_task(house.call(t, priority=p)) for t, p in wanted]
        await asyncio.sleep(0.5)

        state = await one.state()

        assert state.waiting[Priority.LIVE] == 2
        assert state.waiting[Priority.BACKFILL] == 1
        assert state.windows[0].left == 0
        assert 9 * SECOND < state.windows[0].resets_at - house.wall.now() <= 10 * SECOND
        await asyncio.gather(*tasks)


WINDOWS = st.lists(
    st.builds(
        Window,
        amount=st.integers(1, 8),
        span=st.sampled_from([SECOND / 10, SECOND, 7 * SECOND, MINUTE, HOUR]),
        kind=st.sampled_from([Kind.ROLLING, Kind.UNKNOWN]),
        is_weighted=st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


class Turnstile:
    """A provider that counts by arrival, exactly."""

    def __init__(self, windows):
        self.windows = windows
        self.arrived = []
        self.refused = 0

    def admits(self, now, weight):
        for window in self.windows:
            begin = now - window.span.total_seconds()
            seen = [w if window.is_weighted else 1 for at, w in self.arrived if at > begin]
            if sum(seen) + (weight if window.is_weighted else 1) > window.amount:
                self.refused += 1
                return False
        self.arrived.append((now, weight))
        return True


async def crowd(house, provider, throttles, dice, callers):
    """Callers of all kinds: most call, some give up within their permit, some are cancelled."""

    async def caller(number):
        await asyncio.sleep(dice.choice([0, 0, 0.5, 3, 20]))
        weight = dice.choice([1, 1, 1, 2])
        with suppress(RefusedError):
            deadline = house.wall.now() + 30 * DAY
            priority = dice.choice(list(Priority))
            async with dice.choice(throttles).permit(weight=weight, priority=priority, deadline=deadline) as permit:
                if number % 5 == 0:
                    return
                permit.sent()
                await asyncio.sleep(dice.uniform(0.030, 0.040))
                if not provider.admits(house.wall.now().timestamp(), weight):
                    raise RateLimitedError("refused")
                await asyncio.sleep(0.030)

    tasks = [asyncio.create_task(caller(n)) for n in range(callers)]
    await asyncio.sleep(1)
    for task in dice.sample(tasks, callers // 8):
        task.cancel()
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert answer is None or isinstance(answer, asyncio.CancelledError), answer


@given(windows=WINDOWS, seed=st.integers(0, 2**32), instances=st.integers(1, 3))
@settings(max_examples=settings().max_examples // 4)  # each is a crowd of its own
def test_no_provider_ever_refuses(windows, seed, instances):
    """Any windows, any instances, slow storage, jitter on the way, cancellations: nobody is refused or starves."""

    @virtually
    async def scenario():
        dice = Random(seed)
        house, provider = House(tuple(windows), dice=dice), Turnstile(windows)
        with suppress(ValueError):
            await crowd(house, provider, [house.throttle() for _ in range(instances)], dice, 24)

        assert provider.refused == 0
        body = await house.body()
        assert body["refusals"] == 0

    if len({(w.span, w.is_weighted) for w in windows}) == len(windows):
        scenario()


def test_two_stores_race_on_one_file(tmp_path):
    """Two processes' connections to one SQLite file: conditional writes keep one count."""

    @virtually
    async def scenario():
        dice = Random(11)
        windows = (Window(amount=3, span=SECOND / 10), Window(amount=10, span=7 * SECOND))
        house, provider = House(windows), Turnstile(windows)
        stores = [Store(house.wall, tmp_path / "quota.db", dice=dice) for _ in range(2)]
        await crowd(house, provider, [house.throttle(store=stores[n % 2]) for n in range(4)], dice, 60)

        document = await stores[0].inner.read("quota", "p", "throttle")
        assert provider.refused == 0
        assert document.body["calls"] == len(provider.arrived)
        assert sum(store.asked["replace"] for store in stores) > len(provider.arrived) / 3

    scenario()
