"""The ledger of alerts and deliveries over real storage."""

from dataclasses import replace
from datetime import UTC, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts.adapters.documents import GRACE, DeliveryDocuments
from alerts.logic import delivering
from alerts.logic.wording import word
from alerts.models import Alert, Severity, State
from shared.clock import StoppedClock
from shared.errors import NotFoundError, StaleError
from tests.builders import WALL
from tests.standins import Storage, a_signal

BOTH = ["signalr", "discord"]


def an_alert(name: str = "one", *, subscriber: str = "public", seconds: float = 0, **changes) -> Alert:
    now = WALL + timedelta(seconds=seconds)
    return word(a_signal(name, **changes), subscriber, Severity.INFO, now=now)


@pytest.fixture
def ledger() -> DeliveryDocuments:
    return DeliveryDocuments(Storage())


async def test_an_alert_is_read_as_it_was_opened(ledger):
    """Nothing of an alert or its deliveries is lost on the way through storage."""
    alert = an_alert(strength=0.1 + 0.2, symbol="BRK.B", reference_price=0.000123)

    opened = await ledger.open(alert, BOTH)
    read = await ledger.read("public", alert.alert_id)

    assert read == opened
    assert read.alert == alert
    assert read.alert.occurred_at.tzinfo is UTC
    assert [(d.channel, d.state, d.attempts) for d in read.deliveries] == [
        ("signalr", State.PENDING, 0),
        ("discord", State.PENDING, 0),
    ]
    assert read.owes_event


async def test_opening_twice_finds_the_first(ledger):
    """A repeated event meets the stored alert with its time, its words and its deliveries, whatever it says now."""
    first = await ledger.open(an_alert(), BOTH)
    later = an_alert(seconds=50, strength=0.9)

    second = await ledger.open(later, ["email"])

    assert second == first
    assert [r.alert.alert_id for r in await ledger.listed("public", None, newest_first=True, limit=10)] == [
        first.alert.alert_id
    ]


async def test_two_subscribers_have_an_alert_each(ledger):
    """One subscriber's list never shows another's alert."""
    await ledger.open(an_alert(), BOTH)
    await ledger.open(an_alert(subscriber="desk"), ["discord"])

    [mine] = await ledger.listed("public", None, newest_first=True, limit=10)
    [theirs] = await ledger.listed("desk", None, newest_first=True, limit=10)

    assert (mine.alert.subscriber, theirs.alert.subscriber) == ("public", "desk")
    assert mine.alert.alert_id != theirs.alert.alert_id
    with pytest.raises(NotFoundError, match="there is no alert"):
        await ledger.read("desk", mine.alert.alert_id)


async def test_a_move_is_read_back_whole(ledger):
    """Every field that a delivery gains on its way is kept."""
    record = await ledger.open(an_alert(), BOTH)
    claim = await ledger.move(delivering.claimed(record.deliveries[1], "t1", until=WALL + GRACE))
    done = await ledger.move(delivering.sent(claim, "m-1", now=WALL + timedelta(microseconds=1)))

    read = (await ledger.read("public", record.alert.alert_id)).deliveries[1]

    assert read == done
    assert (read.state, read.provider_id, read.attempts, read.token) == (State.SENT, "m-1", 1, "t1")
    assert read.sent_at == WALL + timedelta(microseconds=1)


async def test_only_one_of_two_moves_wins(ledger):
    """A claim is a conditional write: whoever read the same state and comes second is told."""
    record = await ledger.open(an_alert(), BOTH)
    mine = delivering.claimed(record.deliveries[0], "mine", until=WALL + GRACE)
    theirs = delivering.claimed(record.deliveries[0], "theirs", until=WALL + GRACE)

    await ledger.move(mine)
    with pytest.raises(StaleError):
        await ledger.move(theirs)

    assert (await ledger.read("public", record.alert.alert_id)).deliveries[0].token == "mine"


async def test_an_outcome_cannot_be_written_over_anothers(ledger):
    """A process that lost its lease cannot record SENT over what was decided meanwhile."""
    record = await ledger.open(an_alert(), ["discord"])
    claim = await ledger.move(delivering.claimed(record.deliveries[0], "zombie", until=WALL))
    taken_over = (await ledger.read("public", record.alert.alert_id)).deliveries[0]
    await ledger.move(delivering.unknown(taken_over, "the process died while it was being sent"))

    with pytest.raises(StaleError):
        await ledger.move(delivering.sent(claim, "m-1", now=WALL))

    assert (await ledger.read("public", record.alert.alert_id)).deliveries[0].state is State.UNKNOWN


async def test_what_is_owed_is_due_until_it_was_done(ledger):
    """The sweep sees an alert from the end of its grace until its event and all its deliveries are recorded."""
    record = await ledger.open(an_alert(), BOTH)
    mine = [("public", record.alert.alert_id)]
    assert await ledger.due(WALL + GRACE - timedelta(microseconds=1), 10) == []
    assert await ledger.due(WALL + GRACE, 10) == mine

    await ledger.told(record)
    assert await ledger.due(WALL + GRACE, 10) == mine
    for delivery in record.deliveries:
        claim = await ledger.move(delivering.claimed(delivery, "t", until=WALL + timedelta(minutes=1)))
        assert await ledger.due(WALL + timedelta(minutes=2), 10) == mine
        await ledger.move(delivering.sent(claim, None, now=WALL))

    assert await ledger.due(WALL + timedelta(days=1), 10) == []


async def test_telling_twice_is_harmless(ledger):
    """A twin that told of the same alert finds it told."""
    record = await ledger.open(an_alert(), BOTH)

    await ledger.told(record)
    await ledger.told(record)

    assert not (await ledger.read("public", record.alert.alert_id)).owes_event


# --- lists


@given(
    channels=st.lists(st.sampled_from([[], ["signalr"], BOTH, ["signalr", "discord", "email"]]), max_size=9),
    instants=st.lists(st.integers(min_value=0, max_value=3), min_size=9, max_size=9),
    limit=st.integers(min_value=1, max_value=10),
    newest_first=st.booleans(),
)
async def test_pages_show_every_alert_once_and_whole(channels, instants, limit, newest_first):
    """
    Pages of any size, wherever they cut, list every alert once, in order, with all of its deliveries.

    Several alerts may share an instant, and a page of storage may end between an alert and its deliveries.
    """
    ledger = DeliveryDocuments(Storage())
    opened = {}
    for number, (wanted, instant) in enumerate(zip(channels, instants, strict=False)):
        record = await ledger.open(an_alert(str(number), seconds=instant), wanted)
        opened[record.sort] = (record.alert.alert_id, wanted)

    pages, after = [], None
    while page := await ledger.listed("public", after, newest_first=newest_first, limit=limit):
        assert len(page) <= limit
        pages += page
        after = page[-1].sort

    expected = [opened[sort] for sort in sorted(opened, reverse=newest_first)]
    assert [(r.alert.alert_id, [d.channel for d in r.deliveries]) for r in pages] == expected


async def test_a_full_page_is_full(ledger):
    """A page holds as many alerts as were asked for, while there are that many."""
    for number in range(7):
        await ledger.open(an_alert(str(number), seconds=number), ["signalr", "discord", "email"])

    found = await ledger.listed("public", None, newest_first=True, limit=5)

    assert [r.alert.recorded_at for r in found] == [WALL + timedelta(seconds=n) for n in (6, 5, 4, 3, 2)]


async def test_a_list_shows_the_present_state(ledger):
    """Lists are read from the deliveries themselves."""
    record = await ledger.open(an_alert(), BOTH)
    await ledger.move(replace(record.deliveries[0], state=State.DEAD, reason="no"))

    [listed] = await ledger.listed("public", None, newest_first=True, limit=5)

    assert [(d.state, d.reason) for d in listed.deliveries] == [(State.DEAD, "no"), (State.PENDING, None)]


async def test_an_alert_and_its_deliveries_expire_together():
    """After the retention nothing of an alert is left, so the partition that every alert goes to stays bounded."""
    wall = StoppedClock(WALL)
    ledger = DeliveryDocuments(Storage(wall), retention=timedelta(days=30))
    opened = await ledger.open(an_alert(), BOTH)
    await ledger.move(replace(opened.deliveries[0], state=State.SENT, due_at=None))

    wall.at = WALL + timedelta(days=29)
    assert len((await ledger.read("public", opened.alert.alert_id)).deliveries) == 2

    wall.at = WALL + timedelta(days=30)
    assert await ledger.listed("public", None, newest_first=True, limit=10) == []
    assert await ledger.due(wall.at, 10) == []
    with pytest.raises(NotFoundError):
        await ledger.read("public", opened.alert.alert_id)
