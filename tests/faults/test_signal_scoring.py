"""What becomes of signals: scored when their horizon closes, muted without an edge, never raised on old bars."""

from collections.abc import Awaitable, Callable
from datetime import date, timedelta
from functools import cache
from typing import Any

import pytest

from shared.clock import format_instant, parse_instant
from shared.documents import BATCH_LIMIT, Document, sort_key
from shared.errors import UnavailableError
from shared.market.models import Bar, Interval, minute_of
from signals.adapters.documents import CONTAINER
from signals.events import SignalScored
from signals.logic.scoring import COST_PER_SIDE
from signals.service import SignalService
from tests.builders import daily_bars
from tests.standins import Around, Fuse, Killed, Topic, fused
from tests.unit.signals.house import DELAY, House, a_watcher, as_bytes
from tests.unit.signals.oracle import recorded

ZIGZAG = daily_bars(40, prices=[100 + (i * 7) % 11 for i in range(40)])
"""A market that turns almost every day."""
TALKATIVE = a_watcher("cross", "sma_cross", fast=1, slow=2)
WRONG = daily_bars(200, prices=[100 + i * 0.5 + (3 if i % 2 else 0) for i in range(200)])
"""A rising market that jumps to and fro, so that whoever follows the last move is wrong and prices rise."""


@cache
def around_a_split() -> list[Bar]:
    """Half a year before and a quarter after the split of 2005-02-28."""
    return [bar for bar in recorded("AAPL") if date(2004, 9, 1) <= bar.closed_at.date() < date(2005, 6, 1)]


async def opened(**kwargs: Any) -> House:
    house = House(**({"bars": ZIGZAG, "live_from": ZIGZAG[9].closed_at, "watchers": [TALKATIVE]} | kwargs))
    await house.open()
    return house


# --- scoring


async def test_every_outcome_is_what_the_bars_say() -> None:
    """Computed again from whole arrays in the last bar's shares: returns, and all that were known for confidence."""
    bars = around_a_split()
    house = House(bars, live_from=bars[90].closed_at)
    await house.open()
    service = house.instance()
    for first in range(0, len(bars), 23):
        await service.evaluate(await house.store(first, first + 23))

    factors, factor = [], 1.0
    for bar in reversed(bars):
        factors.append(factor)
        factor *= bar.split
    factors.reverse()
    index = {format_instant(bar.closed_at): i for i, bar in enumerate(bars)}
    ledger = list((await house.ledger()).values())
    assert {s["outcome"]["state"] for s in ledger} == {"scored", "pending"}
    for s in ledger:
        at = index[s["closed_at"]]
        horizon = s["horizon"]
        if at + horizon >= len(bars):
            assert s["outcome"]["state"] == "pending"
            continue
        assert s["closes_at"] == format_instant(bars[at + horizon].closed_at)
        way = 1 if s["direction"] == "long" else -1
        bought, sold = bars[at + 1].open / factors[at + 1], bars[at + horizon].close / factors[at + horizon]
        assert s["outcome"]["base_return"] == pytest.approx(sold / bought - 1)
        assert s["outcome"]["forward_return"] == pytest.approx(way * (sold / bought - 1))
        assert s["outcome"]["net_return"] == pytest.approx(
            way * (sold / bought - 1) - COST_PER_SIDE * (1 + sold / bought)
        )
        known = [
            o["outcome"]["is_hit"]
            for o in ledger
            if o["entry"] == s["entry"] and o["closes_at"] and o["closes_at"] <= s["closed_at"]
        ]
        assert s["sample_size"] == len(known)
        assert s["confidence"] == (pytest.approx((sum(known) + 1) / (len(known) + 2)) if known else None)
    assert any(s["sample_size"] > 5 for s in ledger)


async def test_a_live_outcome_is_told_once_and_one_of_history_to_nobody() -> None:
    """The event says what the document says, at the close of the horizon."""
    house = await opened()
    await house.instance().evaluate(await house.store(0, 40))
    scored = {
        id_: s
        for id_, s in (await house.ledger()).items()
        if s["origin"] == "live" and s["outcome"]["state"] == "scored"
    }
    assert sorted(event.signal_id for event in house.scored()) == sorted(scored)
    for event in house.scored():
        stored = scored[event.signal_id]
        assert event.occurred_at == parse_instant(stored["closes_at"])
        assert event.is_hit == stored["outcome"]["is_hit"]
        assert event.net_return == stored["outcome"]["net_return"]
        assert event.sample_size == stored["sample_size"]
    await house.instance().evaluate(await house.store(39, 40))
    assert len(set(house.topic.ids())) == len(house.topic.ids())


async def test_the_books_and_records_account_for_every_signal() -> None:
    """What is open is in the book, what has closed on a record, in parts that are written no more once full."""
    house = await opened(bars=WRONG, live_from=WRONG[0].closed_at)
    service = house.instance()
    await service.evaluate(await house.store(0, 150))
    first = (await house.kept())[next(id_ for id_ in await house.kept() if id_.endswith("|000000"))]
    await service.evaluate(await house.store(150, 200))
    ledger, book, kept = await house.ledger(), await house.book(), await house.kept()
    assert set(book.open) == {id_ for id_, s in ledger.items() if s["outcome"]["state"] == "pending"}
    records = [body for id_, body in sorted(kept.items()) if id_.startswith("record|")]
    closed = len(ledger) - len(book.open)
    assert [len(body["lines"]) for body in records] == [64] * (closed // 64) + [closed % 64]
    assert len(records) > 2
    assert records[0] == first
    [tally] = book.tallies.values()
    assert tally.resolved == tally.scored == len(ledger) - len(book.open)
    assert tally.hits == sum(bool(s["outcome"]["is_hit"]) for s in ledger.values())


async def test_no_batch_is_larger_than_storage_takes() -> None:
    """Many entries that speak on every bar: what does not fit is written before, and nothing is missing."""
    watchers = [a_watcher(f"cross-{n}", "sma_cross", fast=1, slow=2, horizon=1 + n % 2) for n in range(70)]
    sizes: list[int] = []

    async def weighed(name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        done = await call()
        if name == "batch":
            sizes.append(len(done))
        return done

    bars = WRONG[:6]
    house = await opened(bars=bars, live_from=bars[-1].closed_at, watchers=watchers)
    await house.instance(Around(house.storage, weighed)).evaluate(await house.store(0, 6))
    assert 70 < max(sizes) <= BATCH_LIMIT
    reference = await opened(bars=bars, live_from=bars[-1].closed_at, watchers=watchers)
    for i in range(6):
        await reference.instance().evaluate(await reference.store(i, i + 1))
    assert await house.ledger() == await reference.ledger()
    assert await house.kept() == await reference.kept()
    assert len(await house.ledger()) > 200


async def test_a_bar_that_fills_several_batches_can_be_cut_off_between_them() -> None:
    """What a process wrote of the bar it died in is neither written again nor counted twice."""
    bars = WRONG[:5]
    watchers = [a_watcher(f"cross-{n}", "sma_cross", fast=1, slow=2, horizon=1) for n in range(60)]
    reference = await opened(bars=bars, live_from=bars[-1].closed_at, watchers=watchers)
    await reference.instance().evaluate(await reference.store(0, 5))
    for at in range(1, 20):
        house = await opened(bars=bars, live_from=bars[-1].closed_at, watchers=watchers)
        written = 0

        async def dies(name: str, call: Callable[[], Awaitable[Any]], at: int = at) -> Any:
            nonlocal written
            written += name == "batch"
            done = await call()
            if name == "batch" and written == at:
                raise UnavailableError("gone")
            return done

        try:
            await house.instance(Around(house.storage, dies)).evaluate(await house.store(0, 5))
        except UnavailableError:
            await house.instance().evaluate(await house.store(0, 5))
        else:
            break
        assert await house.ledger() == await reference.ledger()
        assert await house.kept() == await reference.kept()
    assert at > 4, "there were batches to die between"


async def test_a_bar_that_closes_no_horizon_and_raises_nothing_asks_for_nothing_more() -> None:
    """Open signals are free until the first of them closes: one read and one write of the series, and the bars."""
    flat = [replace_close(bar, 100.0 if i < 5 else 101.0) for i, bar in enumerate(ZIGZAG)]
    asked: list[tuple[str, Any]] = []

    async def counted(name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        asked.append((name, None))
        return await call()

    house = await opened(bars=flat, live_from=flat[0].closed_at)
    await house.instance().evaluate(await house.store(0, 6))
    assert len((await house.book()).open) == 1
    closes = parse_instant(next(iter((await house.ledger()).values()))["closes_at"])
    for i in range(6, 12):
        event = await house.store(i, i + 1)
        asked.clear()
        await house.instance(Around(house.storage, counted)).evaluate(event)
        names = [name for name, _ in asked if name != "page"]
        if flat[i].closed_at == closes:
            assert names == ["read", "read", "read", "batch", "replace", "replace"], "series, book, signal; told"
        else:
            assert names == ["read", "replace"], flat[i].closed_at


def replace_close(bar: Bar, close: float) -> Bar:
    return daily_bars(1, first=bar.closed_at, prices=[close])[0]


async def test_a_history_that_was_rewritten_underneath_makes_a_signal_unscorable() -> None:
    """It spoke of another bar; the reason is kept, the event is not told."""
    house = await opened()
    service = house.instance()
    await service.evaluate(await house.store(0, 20))
    opinions = set((await house.book()).open)
    other = [replace_close(bar, bar.close * 2) for bar in ZIGZAG]
    bars = house.instance().market.bars
    await bars.append("AAPL|1d", Interval.DAY, 1, other)
    await house.change(revision=1)
    await house.instance().evaluate(await house.store(20, 21))
    await house.instance().evaluate(await house.store(21, 40))
    ledger = await house.ledger()
    assert opinions
    for id_ in opinions:
        assert ledger[id_]["outcome"]["state"] == "unscorable"
        assert "history was rewritten underneath" in ledger[id_]["outcome"]["reason"]
    assert not opinions & {event.signal_id for event in house.scored()}
    total = (await house.instance().performance("cross", None)).total
    assert total.unscorable == len(opinions)


async def test_telling_of_one_event_leaves_the_other_owed() -> None:
    """A signal whose raising is told late may owe its outcome's event by then: that one is not forgotten."""
    house = await opened()
    service = house.instance(topic=Topic(UnavailableError("down"), UnavailableError("down")))
    with pytest.raises(UnavailableError):
        await service.evaluate(await house.store(0, 12))
    due, _ = await service.signals.due(house.wall.at + timedelta(days=1))
    assert {tuple(kept.owes) for kept in due} == {("raised",)}
    with pytest.raises(UnavailableError):
        await service.evaluate(await house.store(12, 40))
    for kept in due:
        await service.signals.told(kept)
    left, _ = await service.signals.due(house.wall.at + timedelta(days=1))
    known = {kept.signal.signal_id for kept in due}
    assert known
    assert {tuple(kept.owes) for kept in left if kept.signal.signal_id in known} == {("scored",)}
    house.wall.at += timedelta(minutes=1)
    await service.sweep()
    assert known <= {event.signal_id for event in house_scored(service)}
    assert await house.owing() == []


def house_scored(service: SignalService) -> list[SignalScored]:
    """The outcomes that a service with a topic of its own told of."""
    topic = service.publisher
    assert isinstance(topic, Topic)
    return [event for event in topic.told if isinstance(event, SignalScored)]


# --- bars that never come


async def test_a_signal_expires_when_its_bars_never_come() -> None:
    """By the market's clock, behind five sessions of patience; it is counted and never scored afterwards."""
    house = await opened(speed=1.0, live_from=ZIGZAG[-1].closed_at)
    service = house.instance()
    await service.evaluate(await house.store(0, 20))
    pending = dict((await house.book()).open)
    last = max(one.expires_at for one in pending.values())
    house.market.at = ZIGZAG[19].closed_at
    house.wall.at += timedelta(days=8)
    await service.sweep()
    assert (await house.book()).open == pending, "its bars may still come"
    house.market.at = last + timedelta(minutes=1)
    house.wall.at += timedelta(days=8)
    await service.sweep()
    assert (await house.book()).open == {}
    ledger = await house.ledger()
    for id_, one in pending.items():
        assert ledger[id_]["outcome"]["state"] == "expired"
        assert (
            ledger[id_]["outcome"]["reason"]
            == f"no bar of its horizon's close came by {format_instant(one.expires_at)}"
        )
    await service.evaluate(await house.store(20, 40))
    after = await house.ledger()
    assert {id_: after[id_] for id_ in pending} == {id_: ledger[id_] for id_ in pending}
    total = (await service.performance("cross", "AAPL")).total
    assert total.expired == len(pending)
    house.wall.at += timedelta(days=30)
    house.market.at += timedelta(days=300)
    await service.sweep()
    await service.sweep()
    assert await house.storage.due(CONTAINER, before=house.wall.at) == [], "nothing is looked at for ever"


async def test_the_reason_says_that_a_series_is_no_longer_watched() -> None:
    """Whoever reads it knows why no bar came."""
    house = await opened(speed=1.0)
    house.market.at = ZIGZAG[19].closed_at + DELAY
    await house.instance().evaluate(await house.store(0, 20))
    await house.change(is_active=False, due_at=None)
    house.market.at += timedelta(days=100)
    house.wall.at += timedelta(days=100)
    await house.instance().sweep()
    reasons = {s["outcome"]["reason"] for s in (await house.ledger()).values() if s["outcome"]["state"] == "expired"}
    assert reasons
    assert all(reason.endswith(", and the series is no longer watched") for reason in reasons)


async def test_bars_in_storage_that_are_still_to_be_evaluated_let_nothing_expire() -> None:
    """An outage of ours is no halt: the evaluation that is under way will score it."""
    house = await opened(speed=1.0)
    house.market.at = ZIGZAG[19].closed_at + DELAY
    service = house.instance()
    await service.evaluate(await house.store(0, 20))
    pending = set((await house.book()).open)
    late = await house.store(20, 40)
    house.market.at += timedelta(days=100)
    house.wall.at += timedelta(days=8)
    await service.sweep()
    assert set((await house.book()).open) == pending
    await service.evaluate(late)
    ledger = await house.ledger()
    assert {ledger[id_]["outcome"]["state"] for id_ in pending} == {"scored"}


async def expired_house() -> House:
    """Signals whose bars have not come, long after they should have."""
    house = await opened(speed=1.0)
    house.market.at = ZIGZAG[19].closed_at + DELAY
    await house.instance().evaluate(await house.store(0, 20))
    house.market.at += timedelta(days=100)
    house.wall.at += timedelta(days=100)
    return house


@pytest.mark.parametrize("mode", Fuse.MODES)
async def test_a_sweep_that_dies_anywhere_is_finished_by_the_next(mode: str) -> None:
    """Each signal expires once, whichever call to storage fails, before or after its effect."""
    reference = await expired_house()
    await reference.instance().sweep()
    expected = as_bytes(await reference.ledger()) + as_bytes(await reference.kept())
    assert (await reference.book()).open == {}
    for at in range(1, 100):
        house, fuse = await expired_house(), Fuse(at, mode)
        try:
            await house.instance(fused(house.storage, fuse), fused(house.topic, fuse)).sweep()
        except (Killed, UnavailableError):
            pass
        else:
            assert fuse.calls < at
            break
        house.wall.at += timedelta(minutes=1)
        await house.instance().sweep()
        assert as_bytes(await house.ledger()) + as_bytes(await house.kept()) == expected, at
    assert at > 5, "there were calls to fail at"


async def test_a_sweep_and_an_evaluation_at_the_same_moment_resolve_each_signal_once() -> None:
    """Bars come in while the sweep lets their signals expire: who writes the book first is right, for both."""
    house = await expired_house()
    pending = set((await house.book()).open)
    late = await house.store(20, 40)
    service = house.instance()

    async def overtaken(name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        if name == "batch" and (await house.series()).evaluated_through == ZIGZAG[19].closed_at:
            await service.evaluate(late)
        return await call()

    slow = Around(house.storage, overtaken)
    slower = Around(slow, lambda name, call: unseen(call) if name == "page" else call())

    async def unseen(call: Callable[[], Awaitable[Any]]) -> Any:
        """The sweep looked before the bars came."""
        return [d for d in await call() if d.body["closed"][-1] + d.body["start"] <= minute_of(ZIGZAG[19].closed_at)]

    await house.instance(slower).sweep()
    ledger = await house.ledger()
    assert {ledger[id_]["outcome"]["state"] for id_ in pending} == {"scored"}
    records = [body for id_, body in (await house.kept()).items() if id_.startswith("record|")]
    [tally] = (await house.book()).tallies.values()
    assert sum(len(body["lines"]) for body in records) == tally.resolved


async def test_a_signal_whose_process_died_is_scored_by_the_sweep_if_nobody_finds_it_again() -> None:
    """The batch was written, the series does not know; the next process has no such entry any more."""
    house = await opened()

    async def dies(name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        done = await call()
        if name == "batch":
            raise UnavailableError("gone")
        return done

    with pytest.raises(UnavailableError):
        await house.instance(Around(house.storage, dies)).evaluate(await house.store(0, 20))
    pending = set((await house.book()).open)
    assert pending
    house.watchers = []
    service = house.instance()
    await service.evaluate(await house.store(20, 40))
    assert set((await house.book()).open) == pending, "nobody looked"
    house.wall.at += timedelta(days=8)
    await service.sweep()
    ledger = await house.ledger()
    assert {ledger[id_]["outcome"]["state"] for id_ in pending} == {"scored"}
    assert pending <= {event.signal_id for event in house.scored()}
    assert await house.owing() == []


# --- old bars


async def late_house(stale_after: int = 3) -> House:
    return await opened(speed=1.0, watchers=[a_watcher("cross", "sma_cross", fast=1, slow=2, stale_after=stale_after)])


async def test_no_opinion_is_formed_on_live_bars_that_came_too_late() -> None:
    """After an outage only the fresh bars of the batch are evaluated; the series says which were not, and why."""
    house = await late_house()
    service = house.instance()
    await service.evaluate(await house.store(0, 40))
    ledger = (await house.ledger()).values()
    assert {s["origin"] for s in ledger} == {"backfill", "live"}, "history is exempt"
    fresh = [format_instant(bar.closed_at) for bar in ZIGZAG[36:]]
    assert {s["closed_at"] for s in ledger if s["origin"] == "live"} <= set(fresh)
    series = await house.series()
    assert series.evaluated_through == ZIGZAG[-1].closed_at
    assert series.entries["cross"]["skipped"] == {
        "count": 26,
        "from": format_instant(ZIGZAG[10].closed_at),
        "through": format_instant(ZIGZAG[35].closed_at),
        "reason": "came more than 3 bars late: too old to act on",
    }
    assert {event.occurred_at for event in house.raised()} <= {bar.closed_at for bar in ZIGZAG[36:]}


async def test_each_entry_has_patience_of_its_own_and_counts_go_on() -> None:
    """A later outage is added to what was skipped before; an entry that acts on old bars skips none."""
    house = await late_house()
    house.watchers = [*house.watchers, a_watcher("patient", "sma_cross", fast=1, slow=2, stale_after=100)]
    service = house.instance()
    house.market.at = ZIGZAG[19].closed_at + DELAY
    await service.evaluate(await house.store(0, 20))
    house.market.at = ZIGZAG[29].closed_at + DELAY
    await service.evaluate(await house.store(20, 30))
    entries = (await house.series()).entries
    assert entries["patient"]["skipped"] is None
    skipped = entries["cross"]["skipped"]
    assert (skipped["count"], skipped["from"], skipped["through"]) == (
        6 + 6,
        format_instant(ZIGZAG[10].closed_at),
        format_instant(ZIGZAG[25].closed_at),
    )
    house.market.at = ZIGZAG[30].closed_at + DELAY
    await service.evaluate(await house.store(30, 31))
    assert (await house.series()).entries["cross"]["skipped"] == skipped


async def test_old_bars_score_all_the_same() -> None:
    """What is too old to act on is not too old to learn from."""
    house = await late_house()
    service = house.instance()
    house.market.at = ZIGZAG[19].closed_at + DELAY
    await service.evaluate(await house.store(0, 20))
    pending = set((await house.book()).open)
    assert pending
    house.market.at = ZIGZAG[39].closed_at + DELAY
    await service.evaluate(await house.store(20, 40))
    ledger = await house.ledger()
    assert {ledger[id_]["outcome"]["state"] for id_ in pending} == {"scored"}


async def test_a_series_too_short_and_too_old_is_not_called_ready() -> None:
    """An entry that has not seen enough bars says so, whatever it skipped."""
    house = await opened(speed=1.0, live_from=ZIGZAG[0].closed_at, watchers=[a_watcher("slow", "sma_cross")])
    house.market.at = ZIGZAG[39].closed_at
    await house.instance().evaluate(await house.store(0, 10))
    state = (await house.series()).entries["slow"]
    assert (state["is_ready"], state["reason"]) == (False, "needs 31 bars, has 10")
    assert state["skipped"]["count"] == 9


# --- edges


async def without_edge(*, mute: bool, live: int = 150) -> House:
    """An entry that follows the last move where moves are taken back, in a market that rises."""
    follows = a_watcher("follows", "sma_cross", fast=1, slow=2, horizon=1, mute_without_edge=mute)
    bars = [with_open(bar, previous) for bar, previous in zip(WRONG[1:], WRONG, strict=False)]
    house = await opened(bars=bars, live_from=bars[live].closed_at, watchers=[follows])
    await house.instance().evaluate(await house.store(0, len(bars)))
    return house


def with_open(bar: Bar, previous: Bar) -> Bar:
    """The bar, opened where the one before closed."""
    low, high = min(previous.close, bar.close), max(previous.close, bar.close)
    values = {"open": previous.close, "low": low, "high": high}
    return Bar(**{name: getattr(bar, name) for name in Bar.__slots__} | values)


async def test_an_entry_without_an_edge_is_flagged_where_it_is_looked_at() -> None:
    """On the series and in its performance; unless it asked to be silent then, it goes on."""
    house = await without_edge(mute=False)
    edge = (await house.series()).entries["follows"]["edge"]
    assert edge["is_gone"] is True
    assert edge["hit_rate_high"] < edge["base_rate"]
    performance = await house.instance().performance("follows", None)
    assert performance.total.is_edge_gone
    assert performance.by_symbol["AAPL"].n == edge["n"]
    assert {s["origin"] for s in (await house.ledger()).values()} == {"backfill", "live"}
    assert house.raised()


async def test_an_entry_that_wants_it_is_muted_without_an_edge() -> None:
    """Its signals are stored with the reason and scored on, so that the edge may come back; nobody is told."""
    house = await without_edge(mute=True)
    ledger = (await house.ledger()).values()
    assert {s["origin"] for s in ledger} == {"backfill", "muted"}
    for s in ledger:
        if s["origin"] == "muted":
            assert s["muted_because"].startswith("the hit rate of its ")
            assert s["sample_size"] >= 50
        else:
            assert s["muted_because"] is None
    assert {s["outcome"]["state"] for s in ledger if s["origin"] == "muted"} == {"scored", "pending"}
    assert house.topic.told == []
    assert await house.owing() == []


async def test_no_entry_is_muted_before_fifty_outcomes() -> None:
    """With fewer nothing can be said of its edge."""
    house = await without_edge(mute=True, live=2)
    ledger = sorted((await house.ledger()).values(), key=lambda s: s["closed_at"])
    assert [s["origin"] for s in ledger if s["sample_size"] < 50 and s["origin"] == "muted"] == []
    assert ledger[-1]["origin"] == "muted"
    assert len(house.raised()) == sum(s["origin"] == "live" for s in ledger) >= 48


# --- signals of an earlier version

NEW_FIELDS = (
    *("variant", "confidence", "sample_size", "horizon", "closes_at", "expires_at", "trend", "why", "muted_because"),
    *("adjustment", "outcome", "scored_at", "owes"),
)


async def earlier(house: House, document: Document, *, is_told: bool) -> None:
    """Store a signal as the version before kept it."""
    body = {name: value for name, value in document.body.items() if name not in NEW_FIELDS} | {"provider": "earlier"}
    await house.storage.create(
        CONTAINER,
        Document(
            id=document.id,
            partition=document.partition,
            sort=sort_key(parse_instant(body["recorded_at"]), document.id),
            body=body,
            due_at=None if is_told else house.wall.at,
        ),
    )


async def live_documents() -> list[Document]:
    """What this version stores of the first signals of the zigzag."""
    house = await opened(live_from=ZIGZAG[0].closed_at)
    await house.instance().evaluate(await house.store(0, 8))
    return [d for d in await house.storage.feed(CONTAINER, limit=100) if d.body.get("origin") == "live"]


async def test_a_signal_of_an_earlier_version_is_shown_and_told() -> None:
    """It has no horizon, so it has no outcome, and says why; the event it owes is told by the sweep."""
    [document, *_] = await live_documents()
    house = await opened()
    await earlier(house, document, is_told=False)
    service = house.instance()
    shown = await service.read(document.id, "AAPL")
    assert shown.body["outcome"]["state"] == "unscorable"
    assert "kept no outcomes" in shown.body["outcome"]["reason"]
    [listed] = await service.listed(None, None, newest_first=True, limit=10)
    assert listed.body == shown.body
    assert await service.sweep() == 1
    [event] = house.raised()
    assert (event.signal_id, event.horizon) == (document.id, None)
    assert await house.owing() == []


@pytest.mark.parametrize("is_told", [True, False])
async def test_an_evaluation_that_an_earlier_version_did_not_finish_is_finished(is_told: bool) -> None:
    """It stored signals and died: they stay as they are, still owe what they owed, and are scored like others."""
    documents = await live_documents()
    house = await opened(live_from=ZIGZAG[0].closed_at)
    for document in documents[:3]:
        await earlier(house, document, is_told=is_told)
    house.wall.at += timedelta(minutes=1)
    await house.instance().evaluate(await house.store(0, 20))
    await house.instance().sweep()
    reference = await opened(live_from=ZIGZAG[0].closed_at)
    await reference.instance().evaluate(await reference.store(0, 20))
    known = {document.id for document in documents[:3]}
    expected_ledger = {
        id_: {**body, "provider": "earlier"} if id_ in known else body
        for id_, body in (await reference.ledger()).items()
    }
    assert await house.ledger() == expected_ledger
    assert await house.kept() == await reference.kept()
    expected = {event.event_id for event in reference.raised()} - (known if is_told else set())
    assert {event.event_id for event in house.raised()} == expected
    assert await house.owing() == []
