from datetime import timedelta

import pytest

from shared import telemetry
from shared.audit import CONTAINER, LONGEST, Audit
from shared.clock import StoppedClock
from shared.errors import UnavailableError
from tests.builders import WALL, documents


@pytest.fixture
def wall():
    return StoppedClock(WALL)


@pytest.fixture
async def storage(wall):
    store = documents(wall)
    yield store
    await store.close()


@pytest.fixture
def audit(storage, wall):
    return Audit(storage, wall, timedelta(days=30))


async def entries(audit):
    return [entry.body for entry in await audit.listed(None, newest_first=True, limit=100)]


async def test_an_act_is_kept_with_who_what_why_and_when(audit, storage):
    """One entry says all that somebody asks later; a day is a partition."""
    id_ = await audit.record("alice", "deadletters.replay", "letter-1", "the fix is out", {"letters": 3, "at": WALL})

    assert await entries(audit) == [
        {
            "audit_id": id_,
            "recorded_at": "2026-11-21T09:00:00Z",
            "actor": "alice",
            "action": "deadletters.replay",
            "subject": "letter-1",
            "reason": "the fix is out",
            "details": {"letters": 3, "at": "2026-11-21T09:00:00Z"},
        }
    ]
    assert await storage.read(CONTAINER, "2026-11-21", id_)


async def test_the_same_act_twice_is_two_entries_newest_first(audit, wall):
    """An audit counts; it does not merge."""
    for n in range(2):
        wall.at += timedelta(hours=20)
        await audit.record("alice", "mute.create", "bob", f"reason {n}")

    assert [entry["reason"] for entry in await entries(audit)] == ["reason 1", "reason 0"]


async def test_secrets_are_taken_out_of_every_field(audit, monkeypatch):
    """Who reads the audit learns who did what, and no key."""
    monkeypatch.setattr(telemetry, "_secrets", set())
    monkeypatch.setattr(telemetry, "_guard", {"known": None})
    telemetry.guard(["CANARY7KEY9QX"])
    told = "https://x?code=NEVER-TOLD-7 CANARY7KEY9QX"

    await audit.record(told, "mute.create", told, told, {"why": told, "many": [told], "deep": {"one": told}})

    assert "CANARY7KEY9QX" not in str(await entries(audit))
    assert "NEVER-TOLD-7" not in str(await entries(audit))


async def test_what_storage_cannot_hold_is_made_storable(audit):
    """Half a surrogate pair or a novel in a reason must not keep the act from being written down."""
    await audit.record("alice", "mute.create", "\ud800", "x" * 10_000)

    [entry] = await entries(audit)
    assert (entry["subject"], len(entry["reason"])) == ("?", LONGEST)


async def test_entries_go_when_their_time_is_over(audit, wall):
    """They are about people, and kept as long as was said."""
    await audit.record("alice", "mute.create", "bob", "why")
    wall.at += timedelta(days=30)

    assert await entries(audit) == []


async def test_an_act_that_cannot_be_written_down_says_so(audit, storage, monkeypatch):
    """Its caller must not go on as if somebody would ever know."""

    async def down(*_):
        raise UnavailableError("storage is away")

    monkeypatch.setattr(storage, "create", down)
    with pytest.raises(UnavailableError):
        await audit.record("alice", "mute.create", "bob", "why")
