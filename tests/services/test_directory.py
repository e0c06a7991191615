"""The directory: everybody's rules, kept in memory and never older than a few seconds."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from alerts.adapters.directory import LOOK, RENEW, DocumentDirectory
from alerts.adapters.rule_documents import (
    CONTAINER,
    REMEMBERED,
    RuleDocuments,
    bump,
    changed_since,
    revision_of,
)
from alerts.logic.health import COUNTED_EVERY, SUSTAINED_FAILURES, SUSTAINED_FOR
from alerts.models import Severity
from alerts.subscriptions import Endpoint, Kind, Preferences, Subscription, endpoint_id
from shared.clock import StoppedClock
from shared.documents import Document, sort_key
from shared.errors import ConfigurationError, InvalidPayloadError, StaleError, UnavailableError
from shared.sealing import Sealer
from tests.builders import WALL
from tests.standins import Around, Storage

KEY = "k1:" + base64.b64encode(bytes(range(32))).decode()
NEW_KEY = "k2:" + base64.b64encode(bytes(range(32, 64))).decode()
SECONDS = timedelta(seconds=1)


class Counted:
    """Storage that counts what it is asked."""

    def __init__(self, documents: Storage) -> None:
        self.asked: list[str] = []
        self.store: Any = Around(documents, self._step)

    async def _step(self, name: str, call: Callable[[], Awaitable[object]]) -> object:
        self.asked.append(name)
        return await call()


class Town:
    """One storage, and as many instances that read and write it as wanted."""

    def __init__(self) -> None:
        self.wall = StoppedClock(WALL)
        self.documents = Storage(self.wall)

    def directory(self, *, keys: str = KEY, house: tuple[Subscription, ...] = (), documents=None) -> DocumentDirectory:
        return DocumentDirectory(documents or self.documents, self.wall, Sealer(keys), house)

    def book(self, directory: DocumentDirectory | None = None) -> RuleDocuments:
        on_change = directory.look_again if directory else (lambda: None)
        return RuleDocuments(self.documents, self.wall, Sealer(KEY), on_change=on_change)

    async def subscribe(self, subscriber: str, name: str = "1") -> None:
        book = self.book()
        new = a_subscription(subscriber=subscriber, subscription_id=f"{subscriber}-{name}")
        await book.save(await book.read(subscriber), put=[new])

    async def reach(self, subscriber: str, channel: str = "email", address: str = "ada@example.com") -> None:
        book = self.book()
        await book.save(
            await book.read(subscriber), put=[an_endpoint(subscriber, channel)], addresses={channel: address}
        )


def a_subscription(**changes) -> Subscription:
    return Subscription(**({"subscription_id": "s1", "subscriber": "ada", "channels": ("signalr",)} | changes))


def an_endpoint(subscriber: str = "ada", channel: str = "email", **changes) -> Endpoint:
    fields = {
        "endpoint_id": endpoint_id(subscriber, channel),
        "subscriber": subscriber,
        "channel": channel,
        "shown": "a***@example.com",
    }
    return Endpoint(**(fields | changes))


@pytest.fixture
def town() -> Town:
    return Town()


async def heard(directory: DocumentDirectory) -> dict[str, list[str]]:
    return {one.subscriber: sorted(s.subscription_id for s in one.subscriptions) for one in await directory.listeners()}


class TestReading:
    async def test_public_comes_first_and_needs_nothing_stored(self, town):
        """Everybody of the file and everybody in storage; who is in both has both."""
        house = (a_subscription(subscriber="ada", subscription_id="f1"), a_subscription(subscriber="public"))
        await town.subscribe("bob")
        await town.subscribe("ada")

        found = await heard(town.directory(house=house))

        assert list(found) == ["public", "ada", "bob"]
        assert found["ada"] == ["ada-1", "f1"]

    async def test_everything_a_subscriber_has_is_read_as_it_was_written(self, town):
        """Every field of every kind survives storage."""
        full = a_subscription(
            channels=("signalr", "email"),
            kind=Kind.PRICE,
            symbols=frozenset({"AAPL"}),
            directions=frozenset({"long"}),
            min_confidence=0.5,
            severity=Severity.WARNING,
            interval="1d",
            price_above=10.5,
            hysteresis=0.01,
            cooldown=timedelta(hours=1),
            cap_per_day=3,
            freshness=timedelta(minutes=90),
            resolves=False,
            since=WALL,
        )
        book = town.book()
        await book.save(await book.read("ada"), put=[full])

        one = await town.directory().listener("ada")

        assert one is not None
        assert one.subscriptions == (full,)

    async def test_subscriptions_of_an_older_import_are_read_with_defaults(self, town):
        """Their documents know nothing of the newer fields."""
        body = {
            "kind": "subscription",
            "subscriber": "ada",
            "channels": ["email"],
            "symbols": ["AAPL"],
            "entries": None,
            "min_strength": 0.25,
            "severity": "critical",
        }
        await town.documents.create(
            CONTAINER, Document(id="old", partition="ada", sort=sort_key(WALL, "old"), body=body)
        )

        one = await town.directory().listener("ada")

        assert one is not None
        assert one.subscriptions == (
            a_subscription(
                subscription_id="old",
                channels=("email",),
                symbols=frozenset({"AAPL"}),
                min_strength=0.25,
                severity=Severity.CRITICAL,
            ),
        )

    async def test_document_that_cannot_be_read_silences_nobody_else(self, town):
        """Written by a newer version, or by hand: it is left out."""
        await town.subscribe("bob")
        for number, body in enumerate(
            (
                {"kind": "subscription", "channels": ["email"], "symbols": None, "entries": None, "min_strength": 0},
                {"kind": "subscription", "rule": "astrology", "channels": [], "symbols": None, "entries": None},
                {"kind": "preferences", "zone": "Mars/Olympus", "quiet_from": None, "quiet_to": None},
                {"kind": "mute", "until": "tomorrow"},
                {"kind": "horoscope"},
            )
        ):
            id_ = f"x{number}"
            await town.documents.create(
                CONTAINER, Document(id=id_, partition="bob", sort=sort_key(WALL, id_), body=body)
            )

        one = await town.directory().listener("bob")

        assert one is not None
        assert [s.subscription_id for s in one.subscriptions] == ["bob-1"]
        assert (one.mutes, one.preferences) == ((), Preferences(subscriber="bob"))

    async def test_unknown_subscriber_listens_to_nothing(self, town):
        """None, so that what is on its way to somebody who left ends."""
        assert await town.directory().listener("nobody") is None


class TestFreshness:
    async def test_change_of_another_instance_is_seen_within_seconds(self, town):
        """Added, changed, removed."""
        here = town.directory()
        assert await heard(here) == {}

        await town.subscribe("ada")
        town.wall.at += LOOK
        assert await heard(here) == {"ada": ["ada-1"]}

        book = town.book()
        await book.save(await book.read("ada"), drop=["ada-1"])
        town.wall.at += LOOK
        assert await heard(here) == {"ada": []}
        assert LOOK < 5 * SECONDS

    async def test_own_change_is_seen_at_once(self, town):
        """Who changed something and asks again sees it."""
        here = town.directory()
        book = town.book(here)
        await here.listeners()

        await book.save(await book.read("ada"), put=[a_subscription()])

        assert await heard(here) == {"ada": ["s1"]}

    async def test_only_those_who_changed_are_read_again(self, town):
        """However many others there are."""
        counted = Counted(town.documents)
        here = town.directory(documents=counted.store)
        for n in range(20):
            await town.subscribe(f"s{n}")
        await here.listeners()
        await town.subscribe("s7", "2")
        counted.asked.clear()
        town.wall.at += LOOK

        assert (await heard(here))["s7"] == ["s7-1", "s7-2"]
        assert counted.asked == ["read", "page"]

    async def test_nothing_is_asked_twice_within_a_moment(self, town):
        """A burst of signals costs one read."""
        counted = Counted(town.documents)
        here = town.directory(documents=counted.store)
        await here.listeners()
        town.wall.at += LOOK
        counted.asked.clear()

        for _ in range(10):
            await here.listeners()

        assert counted.asked == ["read"]

    async def test_who_missed_more_changes_than_are_remembered_reads_everything(self, town):
        """The count says that there were more than it names."""
        here = town.directory()
        await here.listeners()
        await town.subscribe("early")
        for n in range(REMEMBERED):
            await bump(town.documents, town.wall, [f"n{n}"])
        revision = await revision_of(town.documents)
        assert revision is not None
        assert changed_since(revision, 0) is None
        assert len(revision.body["changed"]) <= REMEMBERED

        town.wall.at += LOOK

        assert "early" in await heard(here)

    async def test_import_of_many_is_one_change_that_is_read_whole(self, town):
        """It names more than are remembered, so everything is read."""
        await bump(town.documents, town.wall, ["first"])
        await bump(town.documents, town.wall, [f"n{n}" for n in range(REMEMBERED + 5)])

        revision = await revision_of(town.documents)

        assert revision is not None
        assert changed_since(revision, 1) is None
        assert changed_since(revision, 2) == set()

    async def test_change_whose_writer_died_before_counting_it_is_seen_in_the_end(self, town):
        """Everything is read again from time to time."""
        here = town.directory()
        await here.listeners()
        document = Document(
            id="s1",
            partition="ada",
            sort=sort_key(WALL, "s1"),
            body={
                "kind": "subscription",
                "channels": ["signalr"],
                "symbols": None,
                "entries": None,
                "min_strength": 0.0,
                "severity": "info",
            },
        )
        await town.documents.create(CONTAINER, document)
        town.wall.at += LOOK
        assert await heard(here) == {}

        town.wall.at += RENEW

        assert await heard(here) == {"ada": ["s1"]}

    async def test_clock_that_goes_back_keeps_nothing_for_ever(self, town):
        """What was read in the future is old, too."""
        here = town.directory()
        await here.listeners()
        await town.subscribe("ada")
        town.wall.at -= timedelta(hours=1)

        assert await heard(here) == {"ada": ["ada-1"]}

    async def test_trouble_of_storage_is_told_and_passes(self, town):
        """Whoever asks raises, so that the event comes again; nothing half-read is kept."""
        fail = True

        async def step(name: str, call: Callable[[], Awaitable[object]]) -> object:
            if fail and name == "feed":
                raise UnavailableError("down")
            return await call()

        await town.subscribe("ada")
        here = town.directory(documents=Around(town.documents, step))
        with pytest.raises(UnavailableError):
            await here.listeners()

        fail = False
        assert await heard(here) == {"ada": ["ada-1"]}

    async def test_thousand_subscribers_are_read_with_few_questions(self, town):
        """In pages of the whole container, not one by one."""
        for n in range(1000):
            name = f"s{n:04}"
            body = {
                "kind": "subscription",
                "channels": ["signalr"],
                "symbols": None,
                "entries": None,
                "min_strength": 0.0,
                "severity": "info",
            }
            await town.documents.create(
                CONTAINER, Document(id="s", partition=name, sort=sort_key(WALL, f"{name}"), body=body)
            )
        counted = Counted(town.documents)

        assert len(await town.directory(documents=counted.store).listeners()) == 1000
        assert counted.asked == ["read", "feed", "feed", "feed"]


class TestAddresses:
    async def test_address_is_opened_when_it_is_asked_for(self, town):
        """With what may be shown of it; in storage it is sealed."""
        await town.reach("ada")

        found = await town.directory().address("ada", "email")

        assert found is not None
        assert (found.value.get_secret_value(), found.shown) == ("ada@example.com", "a***@example.com")
        assert "ada@example.com" not in repr(found)
        [stored] = [d for d in await town.documents.feed(CONTAINER) if d.body["kind"] == "endpoint"]
        assert "ada@example.com" not in str(stored.body)

    async def test_who_has_no_address_is_not_reached(self, town):
        """Nor at one that was disabled."""
        await town.reach("ada")
        here = town.directory()
        assert await here.address("ada", "discord") is None
        assert await here.address("bob", "email") is None

        await here.failed("ada", "email", "the mailbox is gone", WALL, is_gone=True)

        assert await here.address("ada", "email") is None

    async def test_address_opens_after_a_rotation_while_its_key_is_kept(self, town):
        """The new key seals, all open."""
        await town.reach("ada")

        found = await town.directory(keys=f"{NEW_KEY},{KEY}").address("ada", "email")

        assert found is not None
        assert found.value.get_secret_value() == "ada@example.com"

    @pytest.mark.parametrize("keys", ["", NEW_KEY], ids=["none", "another"])
    async def test_lost_key_is_named(self, town, keys):
        """An operator reads what to do."""
        await town.reach("ada")

        with pytest.raises(ConfigurationError, match="sealed with key k1, which ENDPOINT_KEYS lacks"):
            await town.directory(keys=keys).address("ada", "email")

    async def test_address_that_was_moved_to_another_does_not_open(self, town):
        """What is sealed for one subscriber is nothing to another."""
        await town.reach("ada")
        [stored] = [d for d in await town.documents.feed(CONTAINER) if d.body["kind"] == "endpoint"]
        stolen = endpoint_id("eve", "email")
        await town.documents.create(
            CONTAINER, replace(stored, id=stolen, partition="eve", sort=sort_key(WALL, stolen), etag=None)
        )

        with pytest.raises(InvalidPayloadError, match="sealed for somebody else"):
            await town.directory().address("eve", "email")


class TestHealth:
    async def endpoint(self, directory: DocumentDirectory) -> Endpoint:
        one = await directory.listener("ada")
        assert one is not None
        return one.endpoints["email"]

    async def test_endpoint_that_is_gone_is_disabled_at_once_and_told_once(self, town):
        """A webhook that answers 404 is never asked again; only the first to learn it is told that it was the first."""
        await town.reach("ada")
        here, there = town.directory(), town.directory()
        await there.listeners()

        told = [await d.failed("ada", "email", "no such mailbox", WALL, is_gone=True) for d in (here, here, there)]

        assert told == [True, False, False]
        assert not (await self.endpoint(here)).is_enabled
        assert (await self.endpoint(here)).disabled_reason == "no such mailbox"
        town.wall.at += LOOK
        assert not (await self.endpoint(there)).is_enabled

    async def test_address_that_took_the_place_of_a_gone_one_is_not_blamed_for_it(self, town):
        """What was on its way to the old webhook must not switch off the new one."""
        await town.reach("ada")
        here = town.directory()
        old = await here.address("ada", "email")
        await town.reach("ada", address="new@example.com")
        town.wall.at += LOOK

        assert not await here.failed("ada", "email", "no such mailbox", WALL, is_gone=True, seal=old.seal)
        assert (await self.endpoint(here)).is_enabled
        new = await here.address("ada", "email")
        assert await here.failed("ada", "email", "no such mailbox", WALL, is_gone=True, seal=new.seal)

    async def test_sustained_failure_disables_and_a_bad_hour_does_not(self, town):
        """Often, and over a day, with nothing taken in between."""
        await town.reach("ada")
        here = town.directory()
        for _ in range(3 * SUSTAINED_FAILURES):
            assert not await here.failed("ada", "email", "down", town.wall.at)
            town.wall.at += COUNTED_EVERY
        assert (await self.endpoint(here)).is_enabled

        town.wall.at = WALL + SUSTAINED_FOR
        assert await here.failed("ada", "email", "down", town.wall.at)

        assert "attempts in 24 hours failed and none arrived, the last: down" in str(
            (await self.endpoint(here)).disabled_reason
        )

    async def test_seldom_failures_disable_nothing(self, town):
        """Two in two days are no sustained failure."""
        await town.reach("ada")
        here = town.directory()

        assert not await here.failed("ada", "email", "down", WALL)
        assert not await here.failed("ada", "email", "down", WALL + 2 * SUSTAINED_FOR)

    async def test_success_anywhere_forgets_the_failures(self, town):
        """The instance that succeeds need not be the one that failed."""
        await town.reach("ada")
        here, there = town.directory(), town.directory()
        await there.listeners()
        await here.failed("ada", "email", "down", WALL)
        town.wall.at += LOOK
        await there.listeners()

        await there.worked("ada", "email", town.wall.at)

        town.wall.at += LOOK
        assert (await self.endpoint(here)).failures == 0
        assert (await self.endpoint(here)).first_failed_at is None

    async def test_success_of_what_never_failed_costs_nothing(self, town):
        """It is what happens thousands of times."""
        await town.reach("ada")
        counted = Counted(town.documents)
        here = town.directory(documents=counted.store)
        await here.listeners()
        counted.asked.clear()

        await here.worked("ada", "email", WALL)

        assert counted.asked == []

    async def test_outage_with_thousands_pending_is_one_trouble_a_minute(self, town):
        """Failures nearer together say nothing new, and cost nothing."""
        await town.reach("ada")
        counted = Counted(town.documents)
        here = town.directory(documents=counted.store)
        await here.listeners()
        await here.failed("ada", "email", "down", WALL)
        counted.asked.clear()

        for _ in range(50):
            await here.failed("ada", "email", "down", WALL + SECONDS)

        assert (await self.endpoint(here)).failures == 1
        assert counted.asked == ["read", "page"], "the count of changes, and what changed"

    async def test_public_has_no_endpoint_to_lose(self, town):
        """The house's own addresses are nobody's to disable."""
        here = town.directory(house=(a_subscription(subscriber="public"),))

        assert not await here.failed("public", "discord", "down", WALL, is_gone=True)
        await here.worked("public", "discord", WALL)

    async def test_failure_and_a_new_address_at_the_same_time_keep_the_address(self, town):
        """Health is written only onto what it was read from."""
        await town.reach("ada")
        here = town.directory()
        await here.listeners()
        await town.reach("ada", address="new@example.com")

        await here.failed("ada", "email", "down", WALL)
        town.wall.at += LOOK

        found = await here.address("ada", "email")
        assert found is not None
        assert found.value.get_secret_value() == "new@example.com"


async def test_rules_that_changed_meanwhile_are_not_written_over(town):
    """A change is decided on what was read, so of two at once one decides again."""
    book = town.book()
    before = await book.read("ada")
    await book.save(before, put=[a_subscription()])

    with pytest.raises(StaleError):
        await book.save(before, put=[a_subscription(subscription_id="s2")])

    assert set((await book.read("ada")).subscriptions) == {"s1"}


async def test_every_change_counts_however_many_are_made_at_once(town):
    """Nobody's change is lost from the count."""
    await asyncio.gather(*(town.subscribe(f"s{n}") for n in range(12)))

    revision = await revision_of(town.documents)
    assert revision is not None
    assert revision.body["revision"] == 12
    assert changed_since(revision, 0) == {f"s{n}" for n in range(12)}
