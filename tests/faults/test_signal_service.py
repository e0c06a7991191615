"""The signals domain on its own storage: what it finds, tells, and never loses."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import cast

import pytest

from shared.clock import format_instant, parse_instant
from shared.errors import NotFoundError, RefusedError, TroopError, UnavailableError
from shared.events import Event
from shared.inbound import DeadLetters
from shared.market.events import BarsIngested
from shared.market.sessions import calendar
from shared.outbox import Outbox
from signals.service import SignalService
from tests.builders import RecordedProvider, daily_bars
from tests.standins import Around, Fuse, Killed, Topic, fused, shuffled
from tests.unit.signals.house import DELAY, WATCHERS, House, a_watcher, as_bytes
from tests.unit.signals.oracle import ORACLES, recorded

BARS = [bar for bar in recorded("AAPL") if date(2004, 9, 1) <= bar.closed_at.date() < date(2005, 6, 1)]
"""Half a year before and a quarter after the split of 2005-02-28."""
LIVE = 90
"""The number of the first bar that is live."""
ZIGZAG = daily_bars(16, prices=[100 + (i * 7) % 11 for i in range(16)])
"""A market that turns almost every day."""


def at_live() -> House:
    return House(BARS, live_from=BARS[LIVE - 1].closed_at)


async def all_at_once() -> House:
    """The reference: one process, one event."""
    house = at_live()
    await house.open()
    await house.instance().evaluate(await house.store(0, len(BARS)))
    return house


# --- history and live


async def test_what_is_found_is_what_the_oracle_finds() -> None:
    """Every entry is asked about every bar: stored are the oracle's signals, with their bar's raw close."""
    house = await all_at_once()
    expected = {
        (w.entry.name, format_instant(BARS[i].closed_at), direction, BARS[i].close)
        for w in WATCHERS
        for i, (direction, _) in ORACLES[w.entry.strategy](BARS, **w.entry.params).items()
        if i >= w.entry.lookback - 1
    }
    assert any(bar.split == 2.0 for bar in BARS)
    assert {entry for entry, *_ in expected} == {"cross", "rsi", "bands"}
    ledger = (await house.ledger()).values()
    assert {(s["entry"], s["closed_at"], s["direction"], s["reference_price"]) for s in ledger} == expected
    assert len(ledger) == len(expected), "at most one signal per entry and bar"


async def test_history_is_stored_as_backfill_and_told_to_nobody() -> None:
    """A first start floods nobody: what closed up to live_from owes no event."""
    house = House(BARS, live_from=BARS[-1].closed_at)
    await house.open()
    service = house.instance()
    await service.evaluate(await house.store(0, len(BARS)))
    house.wall.at += timedelta(days=1)
    assert await service.sweep() == 0
    assert {s["origin"] for s in (await house.ledger()).values()} == {"backfill"}
    assert house.topic.told == []
    assert await house.owing() == []
    assert (await house.series()).evaluated_through == BARS[-1].closed_at


async def test_each_live_signal_is_told_once_as_it_is_stored() -> None:
    """Bars closed after live_from are live; an event says what the document says, at the bar's close."""
    house = await all_at_once()
    ledger = await house.ledger()
    live = {id_: s for id_, s in ledger.items() if s["origin"] == "live"}
    assert live
    assert set(live) == {id_ for id_, s in ledger.items() if parse_instant(s["closed_at"]) > BARS[LIVE - 1].closed_at}
    assert sorted(event.event_id for event in house.raised()) == sorted(live)
    for event in house.raised():
        stored = live[event.event_id]
        assert event.subject == "symbols/AAPL"
        assert event.occurred_at == parse_instant(stored["closed_at"])
        assert event.strategy == f"{stored['strategy']}@{stored['version']}"
        assert event.known_at == event.occurred_at
        same = event.model_dump(mode="json", exclude={"strategy", "occurred_at", "recorded_at", "known_at"})
        assert same == {name: stored[name] for name in same}
    assert await house.owing() == []


async def test_the_next_slot_is_the_next_close_and_the_delay() -> None:
    """After bars were evaluated their series is due when the next bar can be fetched."""
    house = await all_at_once()
    series = await house.series()
    following = calendar().next_close(BARS[-1].closed_at).closes_at
    assert series.evaluated_through == BARS[-1].closed_at
    assert series.due_at == following + DELAY


async def test_a_series_nobody_watches_any_more_is_evaluated_but_not_due() -> None:
    """Bars that came in before the end are still seen; nothing is fetched after them."""
    house = at_live()
    await house.open()
    event = await house.store(0, 80)
    await house.change(is_active=False, due_at=None)
    await house.instance().evaluate(event)
    series = await house.series()
    assert series.evaluated_through == BARS[79].closed_at
    assert series.due_at is None


async def test_too_few_bars_are_stored_as_a_reason_until_there_are_enough() -> None:
    """The series document says of each entry whether it can decide, and what it lacks."""
    house = at_live()
    await house.open()
    service = house.instance()
    await service.evaluate(await house.store(0, 5))
    rest = {"skipped": None, "edge": None}
    ready, unready = {"is_ready": True, "reason": None} | rest, {"is_ready": False} | rest
    assert (await house.series()).entries == {
        "cross": unready | {"reason": "needs 6 bars, has 5"},
        "rsi": unready | {"reason": "needs 64 bars, has 5"},
        "bands": unready | {"reason": "needs 6 bars, has 5"},
    }
    assert await house.ledger() == {}
    await service.evaluate(await house.store(5, 6))
    states = (await house.series()).entries
    assert states["cross"] == states["bands"] == ready
    assert states["rsi"] == unready | {"reason": "needs 64 bars, has 6"}
    await service.evaluate(await house.store(6, 64))
    states = (await house.series()).entries.values()
    assert [(state["is_ready"], state["reason"]) for state in states] == [(True, None)] * 3


async def test_an_entry_sees_only_the_symbols_it_names() -> None:
    """A series that no entry watches is evaluated all the same, so that its slots go on."""
    house = House(ZIGZAG, live_from=ZIGZAG[0].closed_at, watchers=[a_watcher("other", "sma_cross", symbols=["MSFT"])])
    await house.open()
    service = house.instance()
    for first, end in ((0, 6), (6, 7), (7, 16)):
        await service.evaluate(await house.store(first, end))
        assert (await house.series()).evaluated_through == ZIGZAG[end - 1].closed_at
    assert await house.ledger() == {}
    assert (await house.series()).entries == {}


async def test_an_event_of_a_series_nobody_ever_watched_is_permanent_trouble() -> None:
    """There is nothing to wait for: the error says how to watch it."""
    house = House(ZIGZAG, live_from=ZIGZAG[0].closed_at, symbol="IBM")
    event = await house.store(0, 3)
    with pytest.raises(NotFoundError, match="PUT /api/watchlist/IBM"):
        await house.instance().evaluate(event)


async def test_bars_fetched_from_a_provider_become_signals(tmp_path: Path) -> None:
    """From the slot that is due to the stored signal: the event in between is all that wakes the evaluation."""
    provider = RecordedProvider("finnhub", {"AAPL": BARS})
    house = House(BARS, live_from=BARS[LIVE - 1].closed_at, provider=provider)
    house.watchlist = tmp_path / "watchlist.toml"
    house.watchlist.write_text('[[watch]]\nsymbols = ["AAPL"]\n')
    service = house.instance()
    for day in (100, len(BARS) - 1):
        house.market.at = BARS[day].closed_at + DELAY
        await service.ingest()
        event = house.topic.told[-1]
        assert isinstance(event, BarsIngested)
        assert event.last_closed_at == BARS[day].closed_at
        await service.evaluate(event)
    reference = await (await all_at_once()).ledger()
    assert await house.ledger() == {
        id_: {**s, "provider": "finnhub", "adjustment": "raw"} for id_, s in reference.items()
    }


# --- the same bars, the same signals


@pytest.mark.parametrize("size", [1, 7, 64])
async def test_the_size_of_a_batch_changes_no_byte(size: int) -> None:
    """One bar at a time, a week late or a quarter at once: ids, strengths and features are identical."""
    house = at_live()
    await house.open()
    service = house.instance()
    for first in range(0, len(BARS), size):
        await service.evaluate(await house.store(first, first + size))
    reference = await all_at_once()
    assert as_bytes(await house.ledger()) == as_bytes(await reference.ledger())
    assert as_bytes(await house.kept()) == as_bytes(await reference.kept())
    assert [e.event_id for e in house.raised()] == [e.event_id for e in reference.raised()]
    assert [e.event_id for e in house.scored()] == [e.event_id for e in reference.scored()]


async def test_another_process_at_every_bar_changes_nothing() -> None:
    """No truth is kept in memory."""
    house = at_live()
    await house.open()
    for first in range(0, len(BARS), 20):
        await house.instance().evaluate(await house.store(first, first + 20))
    assert as_bytes(await house.ledger()) == as_bytes(await (await all_at_once()).ledger())


async def test_repeated_and_late_events_change_nothing() -> None:
    """An event says where to look; what was evaluated once is not evaluated again."""
    house = at_live()
    await house.open()
    service = house.instance()
    events = [await house.store(first, first + 30) for first in range(0, len(BARS), 30)]
    await service.evaluate(events[-1])
    before = await house.storage.feed("signals", limit=1000)
    series = await house.series()
    for event in [*reversed(events), *events]:
        await service.evaluate(event)
    assert await house.storage.feed("signals", limit=1000) == before
    assert await house.series() == series
    assert sorted(e.event_id for e in house.raised()) == sorted(await house.told())
    assert len(set(house.topic.ids())) == len(house.topic.ids())


@pytest.mark.parametrize("instances", [1, 3])
async def test_instances_that_race_over_repeated_and_reordered_events_find_the_same(instances: int, seed: int) -> None:
    """Bars come in while handlers and sweeps overtake one another: the ledger is the reference's."""
    dice = Random(f"{seed}/{instances}")
    house = at_live()
    await house.open()
    services = [house.instance(shuffled(house.storage, dice), shuffled(house.topic, dice)) for _ in range(instances)]
    events: list[BarsIngested] = []
    waiting: list[BarsIngested] = []
    is_over = False

    async def bring() -> None:
        nonlocal is_over
        first = 0
        while first < len(BARS):
            size = dice.choice([1, 5, 20, 40])
            event = await house.store(first, first + size)
            events.append(event)
            waiting.extend([event] * dice.randint(1, 3))
            first += size
            for _ in range(dice.randrange(60)):
                await asyncio.sleep(0)
        is_over = True

    async def handle(service) -> None:
        while waiting or not is_over:
            if waiting:
                await service.evaluate(waiting.pop(dice.randrange(len(waiting))))
            if dice.random() < 0.1:
                house.wall.at += timedelta(seconds=11)
                await service.sweep()
            await asyncio.sleep(0)

    reached = []

    async def watch() -> None:
        while waiting or not is_over:
            reached.append((await house.series()).evaluated_through or BARS[0].opened_at)
            await asyncio.sleep(0)

    await asyncio.gather(bring(), watch(), *(handle(s) for s in services for _ in range(2)))
    dice.shuffle(events)
    await asyncio.gather(*(dice.choice(services).evaluate(event) for event in events))

    reference = await all_at_once()
    assert as_bytes(await house.ledger()) == as_bytes(await reference.ledger())
    assert as_bytes(await house.kept()) == as_bytes(await reference.kept())
    assert set(house.topic.ids()) == set(reference.topic.ids())
    assert await house.owing() == []
    assert reached == sorted(reached), "evaluated_through moved back"
    assert (await house.series()).evaluated_through == BARS[-1].closed_at


async def test_a_slow_twin_does_not_move_a_series_back() -> None:
    """Who comes last with less leaves alone what the faster one wrote."""
    house = at_live()
    await house.open()
    early = await house.store(0, 100)
    faster = house.instance()

    async def overtaken(name, call):
        if name == "replace" and (await house.series()).evaluated_through is None:
            await faster.evaluate(await house.store(100, len(BARS)))
        return await call()

    await house.instance(Around(house.storage, overtaken)).evaluate(early)
    assert (await house.series()).evaluated_through == BARS[-1].closed_at
    assert (await house.series()).due_at == calendar().next_close(BARS[-1].closed_at).closes_at + DELAY
    assert as_bytes(await house.ledger()) == as_bytes(await (await all_at_once()).ledger())


# --- crashes and outages


TALKATIVE = [a_watcher("cross", "sma_cross", fast=1, slow=2)]


async def zigzag() -> House:
    """A house of bars on many of which an entry has an opinion; the first few are history."""
    house = House(ZIGZAG, live_from=ZIGZAG[4].closed_at, watchers=TALKATIVE)
    await house.open()
    return house


class Picky(Topic):
    """A topic that refuses every request in which one of the events *poison* is, and is down while it *is_down*."""

    def __init__(self, *poison: str) -> None:
        super().__init__()
        self.poison = set(poison)
        self.is_down = False

    async def publish(self, events: Sequence[Event]) -> None:
        if self.is_down:
            raise UnavailableError("the event topic answered 503")
        if any(event.event_id in self.poison for event in events):
            raise RefusedError("the event topic answered 400")
        await super().publish(events)


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "by the sweep"])
async def test_an_event_the_topic_refuses_is_buried_and_holds_up_no_other(is_late: bool) -> None:
    """It lies in a dead letter of the signals domain, the others are told, and nothing is owed any more."""
    reference = await zigzag()
    await two_rounds(reference, reference.instance())
    told = reference.topic.ids()
    house, topic = await zigzag(), Picky(told[0], told[-1])
    letters = DeadLetters(house.storage, house.wall)
    service = house.instance(topic=Outbox(topic, letters, "signals"))
    topic.is_down = is_late
    for first in (0, 8):
        event = await house.store(first, first + 8)
        if is_late:
            with pytest.raises(UnavailableError):
                await service.evaluate(event)
            assert await letters.newest(after=None, limit=10) == []
        else:
            await service.evaluate(event)
    topic.is_down = False
    house.wall.at += timedelta(hours=1)
    await service.sweep()

    assert sorted(topic.ids()) == sorted(told[1:-1])
    assert await house.owing() == []
    assert await service.sweep() == 0
    found = await letters.newest(after=None, limit=10)
    assert {letter.body["event_id"] for letter in found} == {told[0], told[-1]}
    assert {(letter.partition, letter.body["origin"], letter.body["times"]) for letter in found} == {
        ("signals", "outbox", 1)
    }
    assert as_bytes(await house.ledger()) == as_bytes(await reference.ledger())


class EveryAnswer(Fuse):
    """A fuse that blows at a refusal as well, such as that there is no book yet: it is an answer like any other."""

    async def run[T](self, call: Callable[[], Awaitable[T]], lost: Exception) -> T:
        refusal: Exception | None = None

        async def answered() -> T | None:
            nonlocal refusal
            try:
                return await call()
            except TroopError as e:
                refusal = e
                return None

        answer = await super().run(answered, lost)
        if refusal:
            raise refusal
        return cast("T", answer)


async def two_rounds(house: House, service: SignalService) -> None:
    """Half of the bars come in and are evaluated, then the rest."""
    await service.evaluate(await house.store(0, 8))
    await service.evaluate(await house.store(8, 16))


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_trouble_at_any_call_loses_no_signal_and_no_outcome(mode: str) -> None:
    """
    Whichever call to storage or topic fails, before or after its effect, the next event and a sweep mend it.

    In "kill" nothing of the process goes on afterwards, not even a handler of errors.
    """
    reference = await zigzag()
    await two_rounds(reference, reference.instance())
    expected, told = as_bytes(await reference.ledger()), reference.topic.ids()
    book = as_bytes(await reference.kept())
    assert len(set(told)) == len(told) > 5
    assert len(reference.scored()) > 3

    for at in range(1, 1000):
        house, fuse = await zigzag(), EveryAnswer(at, mode)
        try:
            await two_rounds(house, house.instance(fused(house.storage, fuse), fused(house.topic, fuse)))
        except (Killed, UnavailableError):
            pass
        else:
            assert fuse.calls < at, "a failed call was swallowed"
            break
        house.wall.at += timedelta(minutes=1)
        await house.instance().evaluate(await house.store(0, 16))
        await house.instance().sweep()
        assert as_bytes(await house.ledger()) == expected, at
        assert as_bytes(await house.kept()) == book, at
        assert set(house.topic.ids()) == set(told), at
        assert await house.owing() == [], at
        assert (await house.series()).evaluated_through == ZIGZAG[-1].closed_at, at
    assert at > 20, "there were calls to fail at"


async def test_a_topic_that_is_down_is_told_later_by_the_sweep() -> None:
    """Stored signals owe their event; the sweep leaves the handler ten seconds, then tells, once."""
    house = await zigzag()
    house.topic.trouble = [UnavailableError("the topic is down")]
    service = house.instance()
    with pytest.raises(UnavailableError):
        await service.evaluate(await house.store(0, 16))
    owing = await house.owing()
    assert sorted(owing) == sorted(await house.told())
    assert (await house.series()).evaluated_through == ZIGZAG[15].closed_at, "the topic holds up no evaluation"
    house.wall.at += timedelta(seconds=9)
    assert await service.sweep() == 0
    house.wall.at += timedelta(seconds=1)
    assert await service.sweep() == len(owing)
    assert sorted(e.event_id for e in house.raised()) == sorted(owing)
    assert await service.sweep() == 0
    assert await house.owing() == []


async def test_a_sweep_that_fails_is_done_again() -> None:
    """What could not be told stays owed."""
    house = await zigzag()
    house.topic.trouble = [UnavailableError("down"), UnavailableError("still down")]
    service = house.instance()
    with pytest.raises(UnavailableError):
        await service.evaluate(await house.store(0, 16))
    house.wall.at += timedelta(minutes=1)
    with pytest.raises(UnavailableError):
        await service.sweep()
    assert await house.owing()
    await service.sweep()
    assert sorted(e.event_id for e in house.raised()) == sorted(await house.told())


async def test_a_redelivered_event_tells_what_was_stored_the_first_time() -> None:
    """The document is the signal: its event says nothing else, even when the series has changed since."""
    house = await zigzag()
    house.topic.trouble = [UnavailableError("the topic is down")]
    event = await house.store(0, 16)
    with pytest.raises(UnavailableError):
        await house.instance().evaluate(event)
    stored = await house.ledger()
    house.wall.at += timedelta(seconds=10)
    await house.change(provider="finnhub")
    await house.instance().evaluate(event)
    await house.instance().sweep()
    assert await house.ledger() == stored
    assert house.raised()
    for event in house.raised():
        assert event.provider == stored[event.signal_id]["provider"] == "alpha_vantage"
    assert await house.owing() == []


async def test_a_long_history_lets_other_work_on() -> None:
    """Ten years of bars are evaluated without holding the loop to their end."""
    house = House(recorded("AAPL")[:1200], live_from=BARS[0].closed_at, watchers=TALKATIVE)
    await house.open()
    event = await house.store(0, 1200)
    turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(other_work())
    quiet = house.instance(topic=Topic())
    await quiet.evaluate(event)
    working.cancel()
    assert turns >= 4
