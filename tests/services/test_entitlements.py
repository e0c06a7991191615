from datetime import timedelta

import pytest

from shared.clock import StoppedClock
from shared.errors import UnavailableError
from shared.market.entitlements import READ_AGAIN, UNKNOWN_FOR, Entitlements, fingerprint
from tests.builders import WALL, documents
from tests.standins import Around

KEYS = {"p": fingerprint("one"), "q": fingerprint("other")}


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


async def loaded(store, wall, keys=KEYS, provider="p"):
    entitlements = Entitlements(store, wall, keys)
    await entitlements.load(provider)
    return entitlements


async def test_refused_parameter_is_remembered_by_every_instance(store, wall):
    """What one instance was refused no other asks for again; the endpoint without the parameter stays open."""
    await (await loaded(store, wall)).learn("p", "DAILY", "outputsize=full", "premium feature")

    other = await loaded(store, wall)

    assert other.refusal("p", "DAILY", "outputsize=full").reason == "premium feature"
    assert other.refusal("p", "DAILY") is None
    assert other.refusal("p", "DAILY", "month=2012-01") is None
    assert other.refusal("q", "DAILY", "outputsize=full") is None


async def test_refused_endpoint_is_refused_with_every_parameter(store, wall):
    """An endpoint that a plan lacks is lacking however one asks."""
    entitlements = await loaded(store, wall)
    await entitlements.learn("p", "candle", "", "no access")

    assert entitlements.refusal("p", "candle")
    assert entitlements.refusal("p", "candle", "resolution=D")


async def test_new_key_starts_afresh_and_the_old_one_is_remembered(store, wall):
    """A refusal belongs to the key that heard it, or to its plan where the fingerprint says the plan."""
    await (await loaded(store, wall)).learn("p", "candle", "", "no access")

    assert (await loaded(store, wall, {"p": fingerprint("new")})).refusal("p", "candle") is None
    assert (await loaded(store, wall, {"p": fingerprint("one", "premium")})).refusal("p", "candle") is None
    assert (await loaded(store, wall)).refusal("p", "candle")


async def test_operator_is_told_once(store, wall, caplog):
    """However often and wherever the same refusal is heard, the log says it once."""
    first, second = await loaded(store, wall), await loaded(store, wall)
    for entitlements in (first, second, first):
        await entitlements.learn("p", "candle", "", "no access")

    told = [r for r in caplog.records if "provider.not_entitled" in r.getMessage()]
    assert len(told) == 1
    assert told[0].levelname == "WARNING"
    assert len((await loaded(store, wall)).refusals("p")) == 1


async def test_two_instances_learn_at_once(store, wall):
    """Two refusals that come in together are both kept."""
    first, second = await loaded(store, wall), await loaded(store, wall)
    await first.learn("p", "candle", "", "no access")
    await second.learn("p", "split", "", "no access")

    assert [r.endpoint for r in (await loaded(store, wall)).refusals("p")] == ["candle", "split"]


async def test_storage_is_asked_every_five_minutes_at_most(store, wall):
    """Knowing what is refused costs no read a call; what others learn arrives within five minutes."""
    entitlements = await loaded(store, wall)
    other = await loaded(store, wall)
    await other.learn("p", "candle", "", "no access")
    asked = len(store.asked)

    await entitlements.load("p")
    assert len(store.asked) == asked
    assert entitlements.refusal("p", "candle") is None

    wall.at += READ_AGAIN
    await entitlements.load("p")
    assert len(store.asked) == asked + 1
    assert entitlements.refusal("p", "candle")


async def test_storage_in_trouble_forgets_nothing_and_stops_nobody(store, wall):
    """Without storage the process goes by what it heard itself."""
    store.is_down = True
    entitlements = await loaded(store, wall)
    await entitlements.learn("p", "candle", "", "no access")
    await entitlements.learn_unknown("p", "bars", "ZZZZ")

    assert entitlements.refusal("p", "candle")
    assert set(await entitlements.unknown("bars", "ZZZZ")) == {"p"}

    store.is_down = False
    assert await (await loaded(store, wall)).unknown("bars", "ZZZZ") == {}


async def test_reason_shows_no_secret(store, wall):
    """Reasons end in storage and on a page: a key in them does not."""
    entitlements = await loaded(store, wall)
    await entitlements.learn("p", "candle", "", "no access for apikey=ABCDEFGH1234")

    [refusal] = (await loaded(store, wall)).refusals("p")
    assert "ABCDEFGH1234" not in refusal.reason
    assert "ABCDEFGH1234" not in str((await store.read("quota", "p", f"entitlements-{KEYS['p']}")).body)


async def test_unknown_symbol_is_shared_for_a_day(store, wall):
    """A symbol nobody knows is not asked for again until the next day, by no instance."""
    await Entitlements(store, wall, KEYS).learn_unknown("p", "bars", "ZZZZ")
    await Entitlements(store, wall, KEYS).learn_unknown("q", "bars", "ZZZZ")

    other = Entitlements(store, wall, KEYS)
    assert set(await other.unknown("bars", "ZZZZ")) == {"p", "q"}
    assert await other.unknown("quote", "ZZZZ") == {}
    assert await other.unknown("bars", "AAPL") == {}

    wall.at += UNKNOWN_FOR
    assert await other.unknown("bars", "ZZZZ") == {}
    assert await Entitlements(store, wall, KEYS).unknown("bars", "ZZZZ") == {}


async def test_known_symbol_is_not_looked_up(store, wall):
    """A symbol that was answered for costs no read while the process lives."""
    entitlements = Entitlements(store, wall, KEYS)
    entitlements.known("quote", "AAPL")
    for _ in range(3):
        assert await entitlements.unknown("quote", "AAPL") == {}
    assert store.asked == []

    for _ in range(3):
        await entitlements.unknown("quote", "MSFT")
    assert len(store.asked) == 1

    await entitlements.learn_unknown("p", "quote", "AAPL")
    assert set(await entitlements.unknown("quote", "AAPL")) == {"p"}
    assert await entitlements.unknown("quote", "AAPL") == {"p": wall.now() + timedelta(days=1)}
