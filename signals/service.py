"""What the signals domain does: bring bars in, evaluate them, tell of signals, and find out how they fared."""

import asyncio
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from shared.clock import Clock, format_instant
from shared.documents import BATCH_LIMIT, Document
from shared.errors import NotFoundError, StaleError
from shared.events import Event, EventPublisher
from shared.market.events import BarsIngested
from shared.market.models import Columns, instant_of, minute_of
from shared.market.service import Market
from shared.market.stores import Series
from shared.telemetry import get_logger, span
from signals.events import SignalRaised, SignalScored
from signals.logic.arrays import Tape
from signals.logic.bookkeeping import Draft, owed
from signals.logic.evaluation import NotReady, Watcher
from signals.logic.freshness import LATE, Freshness
from signals.logic.performance import Performance, performance_of
from signals.logic.scoring import (
    TREND_BARS,
    Edge,
    confidence_of,
    edge_of,
    expiry,
    horizon_close,
    outcome_of,
    trend_at,
)
from signals.logic.wording import why
from signals.models import Book, OpenSignal, Opinion, Origin, Outcome, Signal, State, Tally, signal_id, variant_of
from signals.ports import Entries, Kept, Signals

log = get_logger(__name__)

STEP = 500
"""Bars that are evaluated and written down together."""
BREATH = 250
"""Bars after which a long evaluation lets other work on."""
RACES = 20
"""How often another process may write a book first before its event is left to be delivered again."""
FULL = BATCH_LIMIT - 2
"""Documents at which what was found so far is written; one more signal and its record fit in."""
LOOK_AGAIN = timedelta(minutes=10)
"""The least time (wall) between two looks for expired signals of one series."""
LONGEST = timedelta(days=7)

type Found = Mapping[int, Sequence[tuple[Watcher, Opinion]]]
"""What was said of each bar, by its index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalService:
    """The signals domain. ``speed`` is how fast the market's clock runs against the wall's."""

    market: Market
    signals: Signals
    publisher: EventPublisher
    watchers: Sequence[Watcher]
    wall: Clock
    speed: float = 1.0

    async def ingest(self) -> int:
        """Fetch every slot that is due; returns how many."""
        return await self.market.ingest.ingest()

    async def evaluate(self, event: BarsIngested) -> None:
        """
        Let every entry see every bar closed since the series was last evaluated, in order, and score open signals.

        The event says where to look; what is evaluated follows from what is stored. An entry does not see live bars
        that are too old for it to act on; the series' state says which.
        """
        series = await self.market.series.get(event.symbol, event.interval)
        watchers = [w for w in self.watchers if w.entry.watches(series.symbol, series.interval)]
        older = max((max(w.entry.lookback - 1, w.entry.horizon) for w in watchers), default=0)
        columns = await self.market.bars.window(
            series.key, series.revision, since=series.evaluated_through, lookback=max(older, TREND_BARS)
        )
        first = _first_after(columns, series.evaluated_through)
        while first < len(columns):
            # In steps that are written down, so that a long history never has to fit into one handler's time.
            step = columns[: first + STEP]
            with span("signals.evaluate", symbol=series.symbol, bars=len(step) - first):
                found, states = await self._find(series, step, first, watchers)
                book, owing = await self._settle(series, step, first, found)
            # Every kept signal owes its event in storage: trouble with the topic must not hold up what is evaluated.
            states = _with_edges(states, series, watchers, book)
            series = await self._advance(series, instant_of(step.closed[-1]), states, book)
            await self._tell(owing)
            first += STEP

    async def sweep(self) -> int:
        """Tell of signals whose event is still owed, and let those expire whose bars never came; how many were told."""
        untold, books = await self.signals.due(self.wall.now())
        await self._tell(untold)
        if untold:
            log.info("signals.told_late", count=len(untold))
        for book in books:
            await self._expire(book)
        return len(untold)

    async def listed(self, symbol: str | None, after: str | None, *, newest_first: bool, limit: int) -> list[Document]:
        """Stored signals, in order of ``recorded_at``."""
        return await self.signals.listed(symbol, after, newest_first=newest_first, limit=limit)

    async def read(self, signal_id: str, symbol: str | None) -> Document:
        """
        One signal with its outcome.

        Raises:
            NotFoundError: there is none; without its symbol only a live signal is found.

        """
        try:
            return await self.signals.shown(signal_id, symbol)
        except NotFoundError:
            hint = f"{symbol} has none" if symbol else "add ?symbol= if it was found in history"
            raise NotFoundError(f"no signal {signal_id[:60]!r} is stored: {hint}") from None

    async def performance(self, entry: str, symbol: str | None) -> Performance:
        """
        How the opinions of an entry, as it is configured now, fared: together, by symbol and by regime.

        Raises:
            NotFoundError: no entry has this name.

        """
        watcher = next((w for w in self.watchers if w.entry.name == entry), None)
        if watcher is None:
            known = ", ".join(sorted(w.entry.name for w in self.watchers)) or "none is configured"
            raise NotFoundError(f"no entry is called {entry[:60]!r}: there is {known}")
        variant = variant_of(watcher.entry)
        records = await self.signals.records(entry, variant, symbol)
        pending = {
            book.symbol: count
            for book in await self.signals.books(symbol)
            if (count := sum(one.variant == variant for one in book.open.values()))
        }
        return performance_of(watcher.entry, records, pending)

    # --- evaluation

    async def _find(
        self, series: Series, columns: Columns, first: int, watchers: Sequence[Watcher]
    ) -> tuple[Found, dict[str, Any]]:
        tape = Tape.of(columns)
        fresh = {watcher.entry.name: self._fresh_from(series, columns, first, watcher) for watcher in watchers}
        found: dict[int, list[tuple[Watcher, Opinion]]] = {}
        states: dict[str, Any] = {}
        live = max(first, bisect_right(columns.closed, minute_of(series.live_from)))
        last = len(columns) - 1
        for index in range(first, len(columns)):
            for watcher in watchers:
                if live <= index < fresh[watcher.entry.name]:
                    continue
                said = watcher.decide(tape, index)
                if isinstance(said, Opinion):
                    found.setdefault(index, []).append((watcher, said))
                if index == last and isinstance(said, NotReady):
                    states[watcher.entry.name] = {"is_ready": False, "reason": said.reason}
            if index % BREATH == BREATH - 1:
                await asyncio.sleep(0)
        for watcher in watchers:
            name = watcher.entry.name
            if last < fresh[name] and len(columns) < watcher.entry.lookback:
                unseen = NotReady(needed=watcher.entry.lookback, have=len(columns))
                states[name] = {"is_ready": False, "reason": unseen.reason}
            state = states.setdefault(name, {"is_ready": True, "reason": None})
            known = series.entries.get(name, {}).get("skipped")
            state["skipped"] = _skipped(known, columns, live, fresh[name], watcher)
        return found, states

    def _fresh_from(self, series: Series, columns: Columns, first: int, watcher: Watcher) -> int:
        """The index of the first live bar that the entry may still act on."""
        freshness = Freshness(now=self.market.clock.now(), delay=self.market.delay, speed=self.speed)
        live = max(first, bisect_right(columns.closed, minute_of(series.live_from)))
        return freshness.first_fresh(series.interval, columns, live, watcher.entry.stale_after)

    async def _settle(
        self, series: Series, columns: Columns, first: int, found: Found
    ) -> tuple[Book | None, Sequence[Kept]]:
        """Write down what was found and what has closed; the book, if it was touched, and signals that owe events."""
        if not found and (series.scoring_at is None or series.scoring_at > instant_of(columns.closed[-1])):
            return None, ()
        for _ in range(RACES):
            try:
                return await self._go_through(series, columns, first, found)
            except StaleError:
                continue  # another process wrote the book first: what it wrote is not found again
        raise StaleError(f"{series.key}: other processes kept writing its book")

    async def _go_through(
        self, series: Series, columns: Columns, first: int, found: Found
    ) -> tuple[Book, Sequence[Kept]]:
        draft = Draft(book=await self.signals.book(series.symbol, series.interval))
        kept: dict[str, Kept] = {}
        for index in range(max(first, _first_after(columns, draft.through)), len(columns)):
            closed_at = instant_of(columns.closed[index])
            ended = draft.ends_by(closed_at)
            for one in ended:
                outcome = outcome_of(one, await self._held(series, columns, one))
                await self._resolve(draft, kept, one, outcome)
            # Only behind the outcomes of this bar: they are what its confidence is made of.
            for watcher, said in found.get(index, ()):
                signal = self._signal(series, columns, index, watcher, said, draft)
                if signal.signal_id in draft.open:
                    continue  # stored before a crash that came in the middle of this bar
                await self._make_room(draft, kept)
                draft.add(signal)
            if ended or index in found:
                draft.through = closed_at
        if draft.is_changed:
            await self._write(draft, kept)
        return draft.next_book(), [one for one in kept.values() if one.owes]

    async def _held(self, series: Series, columns: Columns, one: OpenSignal) -> Columns:
        """Bars from the signal's own to the close of its horizon: nearly always among those at hand."""
        if len(columns) and columns.closed[0] <= minute_of(one.closed_at):
            return columns
        return await self.market.bars.window(
            series.key, series.revision, since=one.closed_at, lookback=1, through=one.closes_at
        )

    async def _resolve(self, draft: Draft, kept: dict[str, Kept], one: OpenSignal, outcome: Outcome) -> None:
        """Write an outcome into the draft, with the documents it needs at hand."""
        if draft.fills_a_record(one):
            await self._write(draft, kept)
        await self._make_room(draft, kept)
        signal = draft.raised.get(one.signal_id)
        if signal is None:
            if one.signal_id not in kept:
                kept[one.signal_id] = await self.signals.read(draft.book.symbol, one.signal_id)
            signal = kept[one.signal_id].signal
        if (number := draft.tail(one)) is not None:
            draft.records[one.variant] = await self.signals.record(one.variant, draft.book, number)
        draft.resolve(signal, one, outcome)

    async def _make_room(self, draft: Draft, kept: dict[str, Kept]) -> None:
        if draft.size >= FULL:
            await self._write(draft, kept)

    async def _write(self, draft: Draft, kept: dict[str, Kept]) -> None:
        """Write the draft as far as it is; *kept* learns what is stored and what that owes."""
        now = self.wall.now()
        # As recorded at this moment: a reader behind ?after= looks back no further than 60 s.
        raised = [replace(signal, recorded_at=now) for signal in draft.raised.values()]
        scored = [replace(kept[id_], signal=signal) for id_, signal in draft.scored.items()]
        book, stored, records = await self.signals.write(
            Entries(
                book=draft.next_book(),
                raised=[(_stamped(signal, now), owed(signal)) for signal in raised],
                scored=[replace(one, signal=_stamped(one.signal, now), owes=_owed_since(one)) for one in scored],
                records=[draft.records[variant] for variant in sorted(draft.touched)],
                look_again_at=self._look_again_at(draft.next_book()),
            )
        )
        kept |= {one.signal.signal_id: one for one in stored}
        draft.written(book, records)

    def _signal(
        self, series: Series, columns: Columns, index: int, watcher: Watcher, said: Opinion, draft: Draft
    ) -> Signal:
        entry = watcher.entry
        closed_at = instant_of(columns.closed[index])
        closes_at = horizon_close(series.interval, closed_at, entry.horizon)
        variant = variant_of(entry)
        tally = draft.tallies.get(variant)
        confidence, sample_size = confidence_of(tally)
        origin = Origin.LIVE if closed_at > series.live_from else Origin.BACKFILL
        edge = _edge(tally) if origin is Origin.LIVE and entry.mute_without_edge else None
        is_muted = edge is not None and edge.is_gone
        return Signal(
            signal_id=signal_id(entry, series.symbol, closed_at),
            entry=entry.name,
            variant=variant,
            strategy=entry.strategy,
            version=entry.version,
            params=entry.params,
            symbol=series.symbol,
            interval=series.interval,
            direction=said.direction,
            strength=said.strength,
            confidence=confidence,
            sample_size=sample_size,
            reference_price=columns.close[index],
            closed_at=closed_at,
            horizon=entry.horizon,
            closes_at=closes_at,
            expires_at=expiry(closes_at),
            features=said.features,
            trend=trend_at(columns, index),
            why=why(watcher.strategy.title, said),
            origin=Origin.MUTED if is_muted else origin,
            muted_because=edge.reason if edge is not None and is_muted else None,
            provider=series.provider or "",
            adjustment=series.adjustment,
            revision=series.revision,
            recorded_at=self.wall.now(),
        )

    # --- what never closed

    async def _expire(self, book: Book) -> None:
        """
        Let open signals expire whose bars did not come in time; while some may still come, look again later.

        One whose horizon was evaluated without being scored is scored here: the process that raised it died before
        the series knew of it, and the next one did not find it again, because its entry is gone or its bar too old.
        """
        series = await self.market.series.get(book.symbol, book.interval)
        newest = await self.market.bars.newest(series.key, series.revision)
        stored = instant_of(newest.columns.closed[-1]) if newest else None
        seen = series.evaluated_through
        draft, kept = Draft(book=book), dict[str, Kept]()
        why_not = "" if series.is_active else ", and the series is no longer watched"
        try:
            for one in sorted(book.open.values(), key=lambda one: (one.closes_at, one.closed_at, one.signal_id)):
                if seen and one.closes_at <= seen:
                    outcome = outcome_of(one, await self._held(series, Columns(), one))
                    await self._resolve(draft, kept, one, outcome)
                # A bar behind the horizon that is in storage is being evaluated, and that scores the signal.
                elif (stored is None or stored < one.closes_at) and self._has_expired(one):
                    reason = f"no bar of its horizon's close came by {format_instant(one.expires_at)}{why_not}"
                    await self._resolve(draft, kept, one, Outcome(state=State.EXPIRED, reason=reason))
            await self._write(draft, kept)
        except StaleError:
            return  # bars came in at the same moment; it is still due if need be
        await self._tell([one for one in kept.values() if one.owes])

    def _has_expired(self, one: OpenSignal) -> bool:
        late = one.closes_at + self.market.delay + LATE * self.speed
        return self.speed > 0 and self.market.clock.now() > max(one.expires_at, late)

    def _look_again_at(self, book: Book) -> datetime | None:
        """The instant of the wall at which the market clock will probably have reached the first expiry."""
        if not book.open:
            return None
        left = min(one.expires_at for one in book.open.values()) - self.market.clock.now()
        wait = left / self.speed if self.speed else LOOK_AGAIN
        return self.wall.now() + min(max(wait, LOOK_AGAIN), LONGEST)

    # --- events and state

    async def _tell(self, owing: Sequence[Kept]) -> None:
        """Publish the events that stored signals owe, and write that down."""
        events = [
            event
            for kind, made in EVENTS.items()
            for event in sorted(
                (made(one.signal) for one in owing if kind in one.owes), key=lambda e: (e.occurred_at, e.event_id)
            )
        ]
        if events:
            await self.publisher.publish(events)
        for one in owing:
            await self.signals.told(one)

    async def _advance(self, series: Series, through: datetime, states: dict[str, Any], book: Book | None) -> Series:
        """Write down how far the series was evaluated, unless a twin is further already."""
        while series.evaluated_through is None or series.evaluated_through < through:
            due_at = self.market.ingest.next_due(series.interval, through) if series.is_active else None
            advanced = replace(series, evaluated_through=through, entries=states, due_at=due_at, told_at=None)
            if book is not None:
                advanced = replace(advanced, scoring_at=book.scoring_at)
            try:
                return await self.market.series.save(advanced)
            except StaleError:
                series = await self.market.series.get(series.symbol, series.interval)
        return series


def _first_after(columns: Columns, through: datetime | None) -> int:
    return 0 if through is None else bisect_right(columns.closed, minute_of(through))


def _stamped(signal: Signal, now: datetime) -> Signal:
    return signal if signal.outcome.state is State.PENDING else replace(signal, scored_at=now)


def _owed_since(one: Kept) -> Sequence[str]:
    """What a stored signal owes once it has its outcome."""
    told = one.signal.origin is Origin.LIVE and one.signal.outcome.state is State.SCORED
    return (*one.owes, "scored") if told else tuple(one.owes)


def _skipped(known: Any, columns: Columns, live: int, fresh: int, watcher: Watcher) -> Any:  # noqa: ANN401 - JSON
    """The bars that an entry has not seen because they came too late: those known, and [live, fresh) beside them."""
    if fresh <= live:
        return known
    return {
        "count": fresh - live + (known["count"] if known else 0),
        "from": known["from"] if known else format_instant(instant_of(columns.closed[live])),
        "through": format_instant(instant_of(columns.closed[fresh - 1])),
        "reason": f"came more than {watcher.entry.stale_after} bars late: too old to act on",
    }


def _edge(tally: Tally | None) -> Edge | None:
    return edge_of(tally.scored, tally.hits, tally.ups) if tally else None


def _with_edges(
    states: Mapping[str, Any], series: Series, watchers: Sequence[Watcher], book: Book | None
) -> dict[str, Any]:
    """The entries' states with how they fare on this series; unchanged where nothing was scored."""
    shown: dict[str, Any] = {}
    for watcher in watchers:
        name = watcher.entry.name
        told = series.entries.get(name, {}).get("edge")
        if book is not None:
            edge = _edge(book.tallies.get(variant_of(watcher.entry)))
            told = edge and {
                "is_gone": edge.is_gone,
                "n": edge.n,
                "hit_rate": round(edge.hit_rate, 6),
                "hit_rate_low": round(edge.low, 6),
                "hit_rate_high": round(edge.high, 6),
                "base_rate": round(edge.base_rate, 6),
            }
        shown[name] = {**states[name], "edge": told}
    return shown


def _raised(s: Signal) -> Event:
    return SignalRaised(
        occurred_at=s.closed_at,
        recorded_at=s.recorded_at,
        signal_id=s.signal_id,
        entry=s.entry,
        strategy=f"{s.strategy}@{s.version}",
        params=s.params,
        symbol=s.symbol,
        interval=s.interval,
        direction=s.direction.value,
        strength=s.strength,
        reference_price=s.reference_price,
        features=s.features,
        provider=s.provider,
        known_at=s.closed_at,
        horizon=s.horizon,
        closes_at=s.closes_at,
        expires_at=s.expires_at,
        confidence=s.confidence,
        sample_size=s.sample_size,
        adjustment=s.adjustment,
        revision=s.revision,
        why=s.why,
    )


def _scored(s: Signal) -> Event:
    return SignalScored.model_validate(
        {
            "occurred_at": s.closes_at,
            "recorded_at": s.scored_at,
            "signal_id": s.signal_id,
            "entry": s.entry,
            "strategy": f"{s.strategy}@{s.version}",
            "symbol": s.symbol,
            "interval": s.interval,
            "direction": s.direction.value,
            "strength": s.strength,
            "confidence": s.confidence,
            "sample_size": s.sample_size,
            "horizon": s.horizon,
            **{name: getattr(s.outcome, name) for name in FARED},
        }
    )


EVENTS = {"raised": _raised, "scored": _scored}
"""What a signal may owe, in the order in which it is told."""
FARED = (
    *("is_hit", "entry_price", "exit_price", "forward_return", "net_return", "base_return"),
    *("mfe", "mae", "cost_per_side"),
)
