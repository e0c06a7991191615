from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import StoppedClock
from shared.errors import ConfigurationError, RateLimitedError, UnavailableError
from shared.market.health import (
    CLOSED_VIEW,
    FAILURE_WINDOW,
    FAILURES,
    FALL_BACK,
    FIRST_WAIT,
    FLUSH,
    HALF_LIFE,
    KEY_WAIT,
    LONGEST_WAIT,
    OVERTAKE,
    PROBE_LEASE,
    QUIET_FLUSH,
    Breaker,
    BreakerState,
    Health,
    Kind,
    LeftAloneError,
    Tally,
    rank,
    rate,
)
from tests.builders import WALL, documents
from tests.standins import Around

SECOND = timedelta(seconds=1)
KEYS = {"p": "aaaa1111", "q": "bbbb2222"}
DOWN = UnavailableError("down")
FINE = Tally(calls=20, good=20, seconds=4, judged=20, fresh=20)


class Counted(Around):
    """Storage that counts what it is asked, and is down while told so."""

    def __init__(self, target):
        self.asked = []
        self.is_down = False

        async def step(name, call):
            self.asked.append(name)
            if self.is_down:
                raise UnavailableError("storage is down")
            return await call()

        super().__init__(target, step)


@pytest.fixture
def wall():
    return StoppedClock(WALL)


@pytest.fixture
async def store(wall):
    store = Counted(documents(wall))
    yield store
    await store.close()


def instance(store, wall, keys=KEYS):
    return Health(store, wall, keys)


async def fail(health, times=1, provider="p", error=DOWN):
    for _ in range(times):
        await health.failed(await health.admit(provider), Kind.BARS, SECOND, error)


async def answer(health, provider="p", kind=Kind.BARS, took=SECOND):
    await health.answered(await health.admit(provider), kind, took)


def told(caplog, event):
    return [r for r in caplog.records if r.getMessage().startswith(event)]


# --- tallies and order


@given(
    st.lists(
        st.tuples(st.integers(0, 3600), st.booleans(), st.floats(0, 10), st.integers(0, 2)), min_size=1, max_size=30
    )
)
def test_instances_add_up_in_any_order(calls):
    """Three instances that each keep their own share know together what one would have known."""
    end = timedelta(hours=1)
    one, shares = Tally(), [Tally(), Tally(), Tally()]
    for at, is_good, seconds, who in calls:
        call = Tally(calls=1, good=float(is_good), seconds=seconds).after(end - timedelta(seconds=at))
        one += call
        shares[who] += call
    together = shares[2] + shares[0] + shares[1]

    for name in ("calls", "good", "seconds"):
        assert getattr(together, name) == pytest.approx(getattr(one, name))


def test_what_is_long_ago_is_forgotten():
    """After an outage a provider is thought well of again, though nobody asked it meanwhile."""
    outage = Tally(calls=50, seconds=400)

    assert rate(outage) < 0.1
    assert rate(outage.after(HALF_LIFE)) < rate(outage.after(6 * HALF_LIFE)) < rate(outage.after(20 * HALF_LIFE))
    assert rate(outage.after(20 * HALF_LIFE)) == pytest.approx(rate(Tally()), abs=0.01)


@pytest.mark.parametrize(
    "worse",
    [
        Tally(calls=20, good=10, seconds=4, judged=20, fresh=20),
        Tally(calls=20, good=20, seconds=160, judged=20, fresh=20),
        Tally(calls=20, good=20, seconds=4, judged=20, fresh=2),
    ],
    ids=["fails", "slow", "stale"],
)
def test_failing_slow_or_stale_is_worse(worse):
    """Success, latency and freshness all count."""
    assert rate(FINE) - rate(worse) > OVERTAKE


def test_scarce_quota_is_spared():
    """A quota that runs out makes its provider a later choice; a half full one says nothing."""
    assert rate(FINE, left=0.5) == rate(FINE, left=1.0) == rate(FINE)
    assert rate(FINE, left=0.2) > rate(FINE, left=0.1) > rate(FINE, left=0.0) > 0
    assert rate(FINE) - rate(FINE, left=0.0) > OVERTAKE


def test_equals_stay_in_the_configured_order():
    """Where it makes no great difference the operator's order holds."""
    order, ahead = rank(["a", "b", "c"], {"a": 0.8, "b": 0.8 + OVERTAKE - 0.01, "c": 0.8}, frozenset())

    assert order == ["a", "b", "c"]
    assert not ahead


def test_nearly_equal_providers_do_not_change_places_all_the_time():
    """Who overtook stays ahead until the difference is nearly gone: between the two limits nothing moves."""
    overtaken, between, gone = 0.5 - OVERTAKE - 0.01, 0.5 - (OVERTAKE + FALL_BACK) / 2, 0.5 - FALL_BACK + 0.01
    ahead = frozenset()
    orders = []
    for first in (0.5, between, overtaken, between, overtaken, between, gone, between):
        order, ahead = rank(["a", "b"], {"a": first, "b": 0.5}, ahead)
        orders.append(order[0])

    assert orders == ["a", "a", "b", "b", "b", "b", "a", "a"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.randoms())
def test_ranking_loses_nobody(ratings, dice):
    """Whatever the ratings are everybody is in the order once, and who is far better than all is first."""
    names = [f"p{n}" for n in range(len(ratings))]
    dice.shuffle(names)
    rated = dict(zip(names, ratings, strict=True))
    order, ahead = rank(names, rated, frozenset())

    assert sorted(order) == sorted(names)
    best = max(names, key=rated.__getitem__)
    if all(rated[best] - rated[name] > OVERTAKE for name in names if name != best):
        assert order[0] == best
    assert rank(names, rated, ahead)[0] == order


def test_pairs_that_were_not_ranked_are_not_forgotten():
    """A ranking of some providers leaves what is known of the others."""
    _, ahead = rank(["a", "b"], {"a": 0.2, "b": 0.9}, frozenset())
    _, ahead = rank(["c", "d"], {"c": 0.9, "d": 0.9}, ahead)

    assert rank(["a", "b"], {"a": 0.9 - FALL_BACK - 0.01, "b": 0.9}, ahead)[0] == ["b", "a"]


# --- the breaker


def test_breaker_survives_storage():
    """What is written is what was meant."""
    b = Breaker().failed(WALL, "down", since=None, probe=None)
    for _ in range(FAILURES):
        b = b.failed(WALL, "down", since=None, probe=None)
    b = b.claimed(WALL + FIRST_WAIT, "me")

    assert Breaker.from_body(b.to_body()) == b
    assert Breaker.from_body({}) == Breaker()


async def test_breaker_opens_for_every_instance(store, wall, caplog):
    """Failures are counted over all instances; then nobody asks, and the operator hears of it once."""
    first, second = instance(store, wall), instance(store, wall)
    await fail(first, 3)
    await fail(second, 2)

    for health in (second, instance(store, wall)):
        with pytest.raises(LeftAloneError, match="p is left alone for now: UnavailableError: down") as caught:
            await health.admit("p")
        assert caught.value.retry_after == FIRST_WAIT
    assert len(told(caplog, "provider.left_alone")) == 1
    await first.admit("q")


async def test_instance_that_missed_the_opening_learns_it_with_one_call(store, wall):
    """A process believes for some minutes that a breaker is closed; its first failure makes it look."""
    late, others = instance(store, wall), instance(store, wall)
    await answer(late)
    await fail(others, FAILURES)

    await fail(late)

    with pytest.raises(LeftAloneError):
        await late.admit("p")


async def test_failures_that_are_not_in_a_row_open_nothing(store, wall):
    """A provider that fails now and then is worse, not down."""
    health = instance(store, wall)
    for _ in range(4 * FAILURES):
        await fail(health)
        wall.at += SECOND
        await answer(health)
        wall.at += SECOND

    await health.admit("p")


async def test_failures_far_apart_open_nothing(store, wall):
    """What happened minutes ago says nothing about now."""
    health = instance(store, wall)
    for _ in range(4 * FAILURES):
        await fail(health)
        wall.at += FAILURE_WINDOW / (FAILURES - 1)

    await health.admit("p")


async def test_exactly_one_probe_goes_out(store, wall):
    """When the wait is over one call of all instances finds out whether the provider is back."""
    instances = [instance(store, wall) for _ in range(4)]
    await fail(instances[0], FAILURES)
    wall.at += FIRST_WAIT

    passes = []
    for health in instances * 2:
        try:
            passes.append(await health.admit("p"))
        except LeftAloneError as e:
            assert e.retry_after == PROBE_LEASE  # noqa: PT017 - most of them are refused, one is not
    assert [bool(leave.probe) for leave in passes] == [True]

    report = await instances[3].report("p")
    assert report.breaker is BreakerState.HALF_OPEN


async def test_answered_probe_closes_it_for_everybody(store, wall, caplog):
    """The provider is back: all ask again, and the operator hears of it once."""
    first, second = instance(store, wall), instance(store, wall)
    await fail(first, FAILURES)
    wall.at += FIRST_WAIT
    await answer(second)

    for health in (first, second, instance(store, wall)):
        assert (await health.admit("p")).probe is None
    assert len(told(caplog, "provider.recovered")) == 1
    await fail(first, FAILURES - 1)
    await first.admit("p")


async def test_failed_probe_doubles_the_wait_up_to_a_limit(store, wall, caplog):
    """The longer it lasts the less often it is asked, at least every quarter of an hour; nobody is told again."""
    health = instance(store, wall)
    await fail(health, FAILURES)
    waits = []
    for _ in range(10):
        with pytest.raises(LeftAloneError) as caught:
            await health.admit("p")
        waits.append(caught.value.retry_after)
        wall.at += caught.value.retry_after
        await fail(health)

    assert waits[:3] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]
    assert waits[-1] == LONGEST_WAIT
    assert len(told(caplog, "provider.left_alone")) == 1


async def test_probe_that_is_never_reported_is_replaced(store, wall):
    """Who is killed with the probe in hand does not leave the provider alone for ever."""
    first, second = instance(store, wall), instance(store, wall)
    await fail(first, FAILURES)
    wall.at += FIRST_WAIT
    await first.admit("p")

    wall.at += PROBE_LEASE - SECOND
    with pytest.raises(LeftAloneError):
        await second.admit("p")
    wall.at += SECOND
    assert (await second.admit("p")).probe


async def test_unused_probe_is_given_back(store, wall):
    """Who got the probe and then had nothing to ask leaves it to the next."""
    first, second = instance(store, wall), instance(store, wall)
    await fail(first, FAILURES)
    wall.at += FIRST_WAIT
    await first.given_back(await first.admit("p"))

    assert (await second.admit("p")).probe


async def test_a_probe_that_is_told_to_slow_down_was_answered(store, wall):
    """Who answers 429 is there: the throttle holds us back, not the breaker."""
    health = instance(store, wall)
    await fail(health, FAILURES)
    wall.at += FIRST_WAIT
    await health.held_back(await health.admit("p"), Kind.BARS, SECOND, RateLimitedError("slow down"))

    assert (await health.admit("p")).probe is None


async def test_late_failure_of_an_older_call_changes_nothing(store, wall):
    """A call that left before the breaker opened does not make the wait longer."""
    health = instance(store, wall)
    late = await health.admit("p")
    await fail(health, FAILURES)
    wall.at += SECOND
    await health.failed(late, Kind.BARS, SECOND, DOWN)

    assert (await health.report("p")).retry_at == WALL + FIRST_WAIT


async def test_wrong_key_takes_the_provider_out_at_once(store, wall, caplog):
    """A person must correct a key: he is told once, as an error, and the provider is left alone until then."""
    health = instance(store, wall)
    wrong = ConfigurationError("set FINNHUB_KEY to yours")
    await health.key_refused(await health.admit("p"), Kind.BARS, SECOND, wrong)
    with pytest.raises(LeftAloneError, match="set FINNHUB_KEY"):
        await health.admit("p")
    wall.at += KEY_WAIT
    await health.key_refused(await health.admit("p"), Kind.BARS, SECOND, wrong)

    [line] = told(caplog, "provider.left_alone")
    assert line.levelname == "ERROR"
    assert (await health.report("p")).retry_at == wall.now() + 2 * KEY_WAIT


async def test_corrected_key_is_tried_at_once(store, wall):
    """What was refused to another key is no reason to wait, and failures under the new key count."""
    before = instance(store, wall)
    await before.key_refused(await before.admit("p"), Kind.BARS, SECOND, ConfigurationError("wrong"))

    after = instance(store, wall, {"p": "cccc3333"})
    assert (await after.admit("p")).probe is None
    await fail(after, FAILURES)
    with pytest.raises(LeftAloneError):
        await after.admit("p")


# --- what it costs, and what is told


async def test_calls_that_go_well_cost_no_operations(store, wall):
    """A look at the breaker every five minutes and a line every hour is all that good calls cost."""
    health = instance(store, wall)
    minutes = 240
    for _ in range(60 * minutes // 10):
        await answer(health)
        wall.at += timedelta(seconds=10)

    reads = store.asked.count("read")
    writes = len(store.asked) - reads
    flushes = timedelta(minutes=minutes) / QUIET_FLUSH
    assert writes <= flushes
    assert reads <= timedelta(minutes=minutes) / CLOSED_VIEW + flushes


async def test_trouble_is_written_down_every_half_minute_at_most(store, wall):
    """A bad hour does not double the cost of its calls."""
    health = instance(store, wall)
    for _ in range(120):
        leave = await health.admit("p")
        await health.held_back(leave, Kind.BARS, SECOND, RateLimitedError("slow down"))
        wall.at += SECOND

    writes = [name for name in store.asked if name != "read"]
    assert 2 <= len(writes) <= timedelta(seconds=120) / FLUSH + 1


async def test_report_covers_all_instances(store, wall):
    """Calls, failures and hits of every instance add up once they were written down."""
    first, second = instance(store, wall), instance(store, wall)
    for health in (first, second):
        await answer(health, took=2 * SECOND)
        health.judged("p", Kind.BARS, is_fresh=health is first)
        health.count_hit(Kind.BARS, "p")
        health.count_hit(Kind.QUOTE, "p")
        await fail(health, error=UnavailableError("answered 503 to apikey=SECRETSECRET"))
        await health.flush("p")

    report = await instance(store, wall).report("p")

    assert (report.calls, report.failures) == (4, 2)
    assert report.hits == {Kind.BARS: 2, Kind.QUOTE: 2}
    assert report.success_rate == pytest.approx(0.5)
    assert report.latency == pytest.approx(1.5 * SECOND, abs=SECOND / 100)
    assert report.freshness == pytest.approx(0.5)
    assert report.last_error_at == WALL
    assert "503" in report.last_error
    assert "SECRETSECRET" not in report.last_error


async def test_unknown_is_said_to_be_unknown(store, wall):
    """Of a provider that nobody asked there is nothing to tell."""
    report = await instance(store, wall).report("p")

    assert (report.breaker, report.calls) == (BreakerState.CLOSED, 0)
    assert report.success_rate is report.latency is report.freshness is report.last_error is None


async def test_new_instance_knows_who_did_badly(store, wall):
    """A cold start does not begin by asking the provider that fails."""
    before = instance(store, wall)
    for _ in range(3):
        await fail(before, 3)
        wall.at += SECOND
        await answer(before)
        wall.at += SECOND
    await before.flush("p")

    assert await instance(store, wall).order(Kind.BARS, ["p", "q"], {}) == ["q", "p"]
    assert await instance(store, wall).order(Kind.QUOTE, ["p", "q"], {}) == ["p", "q"]


async def test_due_probe_goes_first(store, wall):
    """Or a provider that was down would never be asked again while another answers."""
    health = instance(store, wall)
    await fail(health, FAILURES)
    assert await health.order(Kind.BARS, ["p", "q"], {}) == ["q", "p"]
    wall.at += FIRST_WAIT

    assert await health.order(Kind.BARS, ["p", "q"], {}) == ["p", "q"]


async def test_storage_in_trouble_stops_nobody(store, wall):
    """Without storage providers are asked all the same, and nothing counted is lost."""
    store.is_down = True
    health = instance(store, wall)
    await fail(health, 3)
    await answer(health)
    await health.order(Kind.BARS, ["p", "q"], {})
    store.is_down = False
    await health.flush("p")

    report = await instance(store, wall).report("p")
    assert (report.calls, report.failures) == (4, 3)
