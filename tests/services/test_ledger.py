"""The ledger of alerts and deliveries over real storage."""

from dataclasses import replace
from datetime import UTC, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts.adapters.documents import CONTAINER, GRACE, MOST_MEMBERS, DeliveryDocuments
from alerts.logic import delivering
from alerts.logic.wording import word
from alerts.models import Alert, Attempt, Decision, Delivery, Record, Severity, State, delivery_id, digest_id
from alerts.ports import Due, StoredWindows
from alerts.subscriptions import Place, Window, Windows
from shared.clock import StoppedClock
from shared.errors import NotFoundError, StaleError
from tests.builders import WALL
from tests.standins import Storage, a_signal

BOTH = ["signalr", "discord"]
LATER = WALL + timedelta(hours=1)


def deliveries_of(alert: Alert, channels: list[str], **changes) -> list[Delivery]:
    """Fresh deliveries, due when the handler should be done with them."""
    fields = {"due_at": alert.recorded_at + GRACE} | changes
    return [
        Delivery(
            delivery_id=delivery_id(alert.alert_id, channel),
            alert_id=alert.alert_id,
            subscriber=alert.subscriber,
            channel=channel,
            severity=alert.severity,
            **fields,
        )
        for channel in channels
    ]


async def opened(ledger: DeliveryDocuments, alert: Alert, channels: list[str], **changes) -> Record:
    return await ledger.open(alert, deliveries_of(alert, channels, **changes))


async def begun(ledger: DeliveryDocuments, delivery: Delivery, token: str = "t1", *, until=WALL + GRACE) -> Delivery:
    """The delivery as a process that is sending it has written it."""
    claim = await ledger.move(delivering.claimed(delivery, token, until=until))
    return await ledger.move(delivering.sending(claim, now=WALL, until=until))


def an_alert(name: str = "one", *, subscriber: str = "public", seconds: float = 0, **changes) -> Alert:
    now = WALL + timedelta(seconds=seconds)
    return word(a_signal(name, **changes), subscriber, Severity.INFO, now=now)


@pytest.fixture
def ledger() -> DeliveryDocuments:
    return DeliveryDocuments(Storage())


async def test_an_alert_is_read_as_it_was_opened(ledger):
    """Nothing of an alert or its deliveries is lost on the way through storage."""
    alert = an_alert(strength=0.1 + 0.2, symbol="BRK.B", reference_price=0.000123)

    stored = await opened(ledger, alert, BOTH)
    read = await ledger.read("public", alert.alert_id)

    assert read == stored
    assert read.alert == alert
    assert read.alert.occurred_at.tzinfo is UTC
    assert [(d.channel, d.state, d.attempts) for d in read.deliveries] == [
        ("signalr", State.PENDING, 0),
        ("discord", State.PENDING, 0),
    ]
    assert read.owes_event


async def test_opening_twice_finds_the_first(ledger):
    """A repeated event meets the stored alert with its time, its words and its deliveries, whatever it says now."""
    first = await opened(ledger, an_alert(), BOTH)
    later = an_alert(seconds=50, strength=0.9)

    second = await opened(ledger, later, ["email"])

    assert second == first
    assert [r.alert.alert_id for r in await ledger.listed("public", None, newest_first=True, limit=10)] == [
        first.alert.alert_id
    ]


async def test_two_subscribers_have_an_alert_each(ledger):
    """One subscriber's list never shows another's alert."""
    await opened(ledger, an_alert(), BOTH)
    await opened(ledger, an_alert(subscriber="desk"), ["discord"])

    [mine] = await ledger.listed("public", None, newest_first=True, limit=10)
    [theirs] = await ledger.listed("desk", None, newest_first=True, limit=10)

    assert (mine.alert.subscriber, theirs.alert.subscriber) == ("public", "desk")
    assert mine.alert.alert_id != theirs.alert.alert_id
    with pytest.raises(NotFoundError, match="there is no alert"):
        await ledger.read("desk", mine.alert.alert_id)


async def test_a_move_is_read_back_whole(ledger):
    """Every field that a delivery gains on its way is kept."""
    record = await opened(ledger, an_alert(), BOTH, deadline=LATER)
    sending = await begun(ledger, record.deliveries[1])
    done = await ledger.move(delivering.sent(sending, "m-1", now=WALL + timedelta(microseconds=1)))

    read = (await ledger.read("public", record.alert.alert_id)).deliveries[1]

    assert read == done
    assert (read.state, read.provider_id, read.attempts, read.token) == (State.SENT, "m-1", 1, "t1")
    assert (read.sent_at, read.deadline) == (WALL + timedelta(microseconds=1), LATER)
    assert [a.outcome for a in read.attempts_log] == ["taken"]


WHOLE = {
    "rule": "cooldown",
    "by": "a0",
    "doubts": 2,
    "first_failed_at": WALL,
    "deadline": LATER,
    "attempts": 1,
    "attempts_log": (
        Attempt(number=1, started_at=WALL, ended_at=LATER, outcome="failed", reason="down", provider_id="p"),
        Attempt(number=2, started_at=WALL, ended_at=None, outcome="sending"),
    ),
    "trail": (Decision(at=WALL, rule="cooldown", outcome="suppress", reason="within 1 hour"),),
}


async def test_everything_that_is_known_of_a_delivery_is_kept(ledger):
    """Attempts, decisions, doubts and deadlines come back from storage as they were."""
    record = await opened(ledger, an_alert(), ["discord"], **WHOLE)

    [read] = (await ledger.read("public", record.alert.alert_id)).deliveries

    assert replace(read, document=None) == deliveries_of(an_alert(), ["discord"], **WHOLE)[0]


async def test_everything_that_is_known_of_an_alert_is_kept(ledger):
    """A confidence of nothing is not none, and what was decided and acknowledged comes back."""
    alert = replace(
        an_alert(),
        kind="price",
        version=2,
        confidence=0.0,
        subscription_ids=("s1", "s2"),
        trail=(Decision(at=WALL, rule="resolve", outcome="over", reason="back below"),),
        resolved_at=LATER,
        acknowledged_by="alice",
        acknowledged_at=LATER,
    )
    await opened(ledger, alert, BOTH)

    assert (await ledger.read("public", alert.alert_id)).alert == alert


async def test_only_one_of_two_moves_wins(ledger):
    """A claim is a conditional write: whoever read the same state and comes second is told."""
    record = await opened(ledger, an_alert(), BOTH)
    mine = delivering.claimed(record.deliveries[0], "mine", until=WALL + GRACE)
    theirs = delivering.claimed(record.deliveries[0], "theirs", until=WALL + GRACE)

    await ledger.move(mine)
    with pytest.raises(StaleError):
        await ledger.move(theirs)

    assert (await ledger.read("public", record.alert.alert_id)).deliveries[0].token == "mine"


async def test_a_claim_that_was_lost_cannot_begin_to_send(ledger):
    """A process that froze with a claim loses the write before the bytes leave."""
    record = await opened(ledger, an_alert(), ["discord"])
    claim = await ledger.move(delivering.claimed(record.deliveries[0], "zombie", until=WALL))
    taken = await ledger.move(delivering.released(claim, due_at=WALL))
    await begun(ledger, taken, "successor")

    with pytest.raises(StaleError):
        await ledger.move(delivering.sending(claim, now=WALL, until=LATER))


async def test_an_outcome_cannot_be_written_over_anothers(ledger):
    """A process that lost its lease cannot record SENT over what was decided meanwhile."""
    record = await opened(ledger, an_alert(), ["discord"])
    sending = await begun(ledger, record.deliveries[0], "zombie", until=WALL)
    taken_over = (await ledger.read("public", record.alert.alert_id)).deliveries[0]
    await ledger.move(delivering.doubted(taken_over, "the process died", now=WALL, is_keyed=False))

    with pytest.raises(StaleError):
        await ledger.move(delivering.sent(sending, "m-1", now=WALL))

    assert (await ledger.read("public", record.alert.alert_id)).deliveries[0].state is State.UNKNOWN


async def test_a_move_that_is_no_edge_is_refused(ledger):
    """Nothing is sent that was not claimed, whoever asks for it; what is stored stays."""
    record = await opened(ledger, an_alert(), ["discord"])
    [delivery] = record.deliveries

    with pytest.raises(ValueError, match="cannot go from PENDING to SENT"):
        await ledger.move(delivering.sent(delivery, "m-1", now=WALL))

    done = await ledger.move(delivering.sent(await begun(ledger, delivery), "m-1", now=WALL))
    with pytest.raises(ValueError, match="cannot go from SENT to CLAIMED"):
        await ledger.move(delivering.claimed(done, "t", until=LATER))


async def test_what_is_owed_is_due_until_it_was_done(ledger):
    """The sweep sees an alert from the end of its grace until its event and all its deliveries are recorded."""
    record = await opened(ledger, an_alert(), BOTH)
    mine = [Due("public", record.alert.alert_id)]
    assert await ledger.due(WALL + GRACE - timedelta(microseconds=1), 10) == []
    assert await ledger.due(WALL + GRACE, 10) == mine

    await ledger.told(record)
    assert await ledger.due(WALL + GRACE, 10) == mine
    for delivery in record.deliveries:
        sending = await begun(ledger, delivery, until=WALL + timedelta(minutes=1))
        assert await ledger.due(WALL + timedelta(minutes=2), 10) == mine
        await ledger.move(delivering.sent(sending, None, now=WALL))

    assert await ledger.due(WALL + timedelta(days=1), 10) == []


async def test_telling_twice_is_harmless(ledger):
    """A twin that told of the same alert finds it told."""
    record = await opened(ledger, an_alert(), BOTH)

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
    expected = {}
    for number, (wanted, instant) in enumerate(zip(channels, instants, strict=False)):
        record = await opened(ledger, an_alert(str(number), seconds=instant), wanted)
        expected[record.sort] = (record.alert.alert_id, wanted)

    pages, after = [], None
    while page := await ledger.listed("public", after, newest_first=newest_first, limit=limit):
        assert len(page) <= limit
        pages += page
        after = page[-1].sort

    in_order = [expected[sort] for sort in sorted(expected, reverse=newest_first)]
    assert [(r.alert.alert_id, [d.channel for d in r.deliveries]) for r in pages] == in_order


async def test_a_full_page_is_full(ledger):
    """A page holds as many alerts as were asked for, while there are that many."""
    for number in range(7):
        await opened(ledger, an_alert(str(number), seconds=number), ["signalr", "discord", "email"])

    found = await ledger.listed("public", None, newest_first=True, limit=5)

    assert [r.alert.recorded_at for r in found] == [WALL + timedelta(seconds=n) for n in (6, 5, 4, 3, 2)]


async def test_a_list_shows_the_present_state(ledger):
    """Lists are read from the deliveries themselves."""
    record = await opened(ledger, an_alert(), BOTH)
    await ledger.move(delivering.ended(record.deliveries[0], State.SUPPRESSED, rule="mute", reason="no"))

    [listed] = await ledger.listed("public", None, newest_first=True, limit=5)

    assert [(d.state, d.reason) for d in listed.deliveries] == [(State.SUPPRESSED, "no"), (State.PENDING, None)]


async def test_an_alert_and_its_deliveries_expire_together():
    """After the retention nothing of an alert is left, so the partition that every alert goes to stays bounded."""
    wall = StoppedClock(WALL)
    ledger = DeliveryDocuments(Storage(wall), retention=timedelta(days=30))
    stored = await opened(ledger, an_alert(), BOTH)
    await ledger.move(delivering.ended(stored.deliveries[0], State.SUPPRESSED, rule="mute", reason="no"))

    wall.at = WALL + timedelta(days=29)
    assert len((await ledger.read("public", stored.alert.alert_id)).deliveries) == 2

    wall.at = WALL + timedelta(days=30)
    assert await ledger.listed("public", None, newest_first=True, limit=10) == []
    assert await ledger.due(wall.at, 10) == []
    with pytest.raises(NotFoundError):
        await ledger.read("public", stored.alert.alert_id)


# --- windows and digests beside the alerts


def in_digest(alert: Alert, bucket: str = "b1", **changes) -> list[Delivery]:
    return deliveries_of(alert, ["email"], **({"due_at": LATER, "bucket_id": bucket} | changes))


async def test_windows_are_written_with_the_alert_or_not_at_all(ledger):
    """Two alerts judged by the same windows: the second is told to judge again, and leaves nothing."""
    before = await ledger.windows("alice")
    assert (before.windows, before.document) == (Windows(), None)
    taken = Windows(by_key={"cap|": Window(places=(Place(at=WALL, alert_id="a1"),))})
    changed = replace(before, windows=taken)

    first, second = an_alert("one", subscriber="alice"), an_alert("two", subscriber="alice")
    await ledger.open(first, deliveries_of(first, ["email"]), changed)
    with pytest.raises(StaleError):
        await ledger.open(second, deliveries_of(second, ["email"]), changed)

    after = await ledger.windows("alice")
    assert after.windows == taken
    assert [r.alert.alert_id for r in await ledger.listed("alice", None, newest_first=False, limit=9)] == [
        first.alert_id
    ]
    await ledger.open(second, deliveries_of(second, ["email"]), replace(after, windows=Windows()))
    with pytest.raises(StaleError):
        third = an_alert("three", subscriber="alice")
        await ledger.open(third, deliveries_of(third, ["email"]), after)


async def test_opening_again_finds_the_alert_whatever_the_windows_say(ledger):
    """A repeated event meets the stored alert, though the windows have moved on since."""
    alert = an_alert(subscriber="alice")
    none = StoredWindows(windows=Windows())
    first = await ledger.open(alert, deliveries_of(alert, ["email"]), none)

    assert await ledger.open(alert, deliveries_of(alert, ["email"]), none) == first


async def test_a_digest_gathers_what_closes_with_it(ledger):
    """Alerts of one bucket are members of one digest, which alone is due, when the bucket closes."""
    alerts = [an_alert(str(n), subscriber="alice", seconds=n) for n in range(3)]
    for alert in alerts:
        await ledger.told(await ledger.open(alert, in_digest(alert)))

    name = digest_id("alice", "email", "b1")
    digest = await ledger.digest("alice", name)
    assert digest.members == tuple(alert.alert_id for alert in alerts)
    assert await ledger.due(LATER - timedelta(microseconds=1), 9) == []
    assert await ledger.due(LATER, 9) == [Due("alice", name, is_digest=True)]
    assert len(await ledger.listed("alice", None, newest_first=False, limit=9)) == 3


async def test_a_repeated_alert_is_one_member(ledger):
    """Opening again changes no digest, before and after it was closed."""
    alert = an_alert(subscriber="alice")
    first = await ledger.open(alert, in_digest(alert))
    assert await ledger.open(alert, in_digest(alert)) == first
    digest = await ledger.digest("alice", digest_id("alice", "email", "b1"))
    await begun(ledger, digest)

    assert await ledger.open(alert, in_digest(alert)) == first
    assert (await ledger.digest("alice", digest.delivery_id)).members == (alert.alert_id,)
    with pytest.raises(NotFoundError):
        await ledger.digest("alice", digest_id("alice", "email", "b1", 2))


async def test_what_comes_while_a_digest_closes_belongs_to_exactly_one(ledger):
    """Whoever claims it closes it: an alert that comes then is in the next part, and a stale claim loses."""
    one, two, three = (an_alert(name, subscriber="alice") for name in ("one", "two", "three"))
    await ledger.open(one, in_digest(one))
    digest = await ledger.digest("alice", digest_id("alice", "email", "b1"))
    await ledger.open(two, in_digest(two))
    with pytest.raises(StaleError):
        await ledger.move(delivering.claimed(digest, "early", until=LATER))
    digest = await ledger.digest("alice", digest.delivery_id)
    await ledger.move(delivering.claimed(digest, "t", until=LATER))
    await ledger.open(three, in_digest(three))

    second = await ledger.digest("alice", digest_id("alice", "email", "b1", 2))
    assert digest.members == (one.alert_id, two.alert_id)
    assert second.members == (three.alert_id,)


async def test_a_full_digest_begins_another(ledger):
    """Its end is written with that of all its members in one batch, so there are not more of them than fit."""
    for number in range(MOST_MEMBERS + 1):
        alert = an_alert(str(number), subscriber="alice")
        await ledger.open(alert, in_digest(alert))

    first = await ledger.digest("alice", digest_id("alice", "email", "b1"))
    second = await ledger.digest("alice", digest_id("alice", "email", "b1", 2))
    assert (len(first.members), len(second.members)) == (MOST_MEMBERS, 1)
    sending = await begun(ledger, first)
    members = [(await ledger.read("alice", id_)).deliveries[0] for id_ in first.members]
    done = delivering.sent(sending, "m-1", now=WALL)
    await ledger.settle(done, [delivering.followed(member, done) for member in members])
    assert (await ledger.digest("alice", first.delivery_id)).state is State.SENT
    assert {(await ledger.read("alice", id_)).deliveries[0].provider_id for id_ in first.members} == {"m-1"}


async def test_a_digest_ends_with_all_its_members_or_not_at_all(ledger):
    """A digest that somebody else ended meanwhile changes none of its members."""
    alert = an_alert(subscriber="alice")
    member = (await ledger.open(alert, in_digest(alert))).deliveries[0]
    sending = await begun(ledger, await ledger.digest("alice", digest_id("alice", "email", "b1")))
    doubted = delivering.doubted(sending, "it died", now=WALL, is_keyed=False)
    await ledger.settle(doubted, [delivering.followed(member, doubted)])

    done = delivering.sent(sending, "m-1", now=WALL)
    with pytest.raises(StaleError):
        await ledger.settle(done, [delivering.followed(member, done)])

    assert (await ledger.read("alice", alert.alert_id)).deliveries[0].state is State.UNKNOWN


# --- later versions, and older documents


async def test_a_correction_is_a_delivery_of_the_next_version(ledger):
    """What an alert says now and who is told so are written together; lists show the first version's deliveries."""
    record = await opened(ledger, an_alert(), BOTH)
    alert = replace(record.alert, version=2, title="over", resolved_at=LATER)
    correction = replace(
        record.deliveries[0], version=2, delivery_id=delivery_id(alert.alert_id, "signalr", 2), document=None
    )

    amended = await ledger.amend(record, alert, [correction])

    read = await ledger.read("public", alert.alert_id)
    assert (read.alert, amended.owes_event) == (alert, True)
    assert [(d.channel, d.version) for d in read.deliveries] == [("signalr", 1), ("discord", 1), ("signalr", 2)]
    [listed] = await ledger.listed("public", None, newest_first=False, limit=1)
    assert [(d.channel, d.version) for d in listed.deliveries] == [("signalr", 1), ("discord", 1)]
    with pytest.raises(StaleError):
        await ledger.amend(record, alert)


@pytest.mark.parametrize(
    ("state", "reason", "doubts"),
    [
        ("PENDING", None, 0),
        ("SENDING", "possible repeat: an earlier attempt ended without an answer", 1),
        ("RETRY_AT", "UnavailableError: down", 0),
        ("UNKNOWN", "OutcomeUnknownError: no answer", 0),
    ],
)
async def test_documents_of_the_version_before_are_read(state, reason, doubts):
    """What was stored before deliveries were claimed, logged and judged is read, and moves on."""
    documents = Storage()
    ledger = DeliveryDocuments(documents)
    alert = an_alert()
    fresh = (await opened(ledger, alert, ["discord"])).deliveries[0]
    old = {
        "delivery_id": fresh.delivery_id,
        "alert_id": alert.alert_id,
        "subscriber": "public",
        "channel": "discord",
        "severity": "info",
        "state": state,
        "reason": reason,
        "attempts": 3,
        "token": "t",
        "sent_at": None,
        "provider_id": None,
    }
    assert fresh.document is not None
    await documents.replace(CONTAINER, fresh.document.with_body(old, due_at=None if state == "UNKNOWN" else WALL))

    [read] = (await ledger.read("public", alert.alert_id)).deliveries

    assert (read.state, read.attempts, read.doubts, read.version) == (State(state), 3, doubts, 1)
    assert (read.attempts_log, read.trail, read.deadline) == ((), (), None)
    if state == "SENDING":
        after = await ledger.move(delivering.doubted(read, "it died", now=WALL, is_keyed=True))
        assert (after.state, after.is_over) == (State.UNKNOWN, False)


async def test_a_document_that_is_no_alert_is_none(ledger):
    """A delivery's id, a digest's and that of the windows lead to no alert."""
    alert = an_alert(subscriber="alice")
    record = await ledger.open(alert, in_digest(alert), StoredWindows(windows=Windows()))
    windows = (await ledger.windows("alice")).document
    assert windows is not None
    names = [record.deliveries[0].delivery_id, digest_id("alice", "email", "b1"), windows.id]

    for name in names:
        with pytest.raises(NotFoundError, match="there is no alert"):
            await ledger.read("alice", name)
