"""What the signals domain does: bring bars in, evaluate them, tell of signals."""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from shared.clock import Clock
from shared.documents import Document
from shared.errors import StaleError
from shared.events import EventPublisher
from shared.market.events import BarsIngested
from shared.market.models import Columns, instant_of, minute_of
from shared.market.service import Market
from shared.market.stores import Series
from shared.telemetry import get_logger, span
from signals.events import SignalRaised
from signals.logic.arrays import Tape
from signals.logic.evaluation import NotReady, Watcher
from signals.models import Opinion, Origin, Signal, signal_id
from signals.ports import Signals

log = get_logger(__name__)

BREATH = 250
"""Bars after which a long evaluation lets other work on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalService:
    """The signals domain."""

    market: Market
    signals: Signals
    publisher: EventPublisher
    watchers: Sequence[Watcher]
    wall: Clock

    async def ingest(self) -> int:
        """Fetch every slot that is due; returns how many."""
        return await self.market.ingest.ingest()

    async def evaluate(self, event: BarsIngested) -> None:
        """
        Let every entry see every bar closed since the series was last evaluated, in order.

        The event says where to look; what is evaluated follows from what is stored.
        """
        series = await self.market.series.get(event.symbol, event.interval)
        watchers = [w for w in self.watchers if w.entry.watches(series.symbol, series.interval)]
        lookback = max((w.entry.lookback for w in watchers), default=1)
        columns = await self.market.bars.window(
            series.key, series.revision, since=series.evaluated_through, lookback=lookback - 1
        )
        first = _first_after(columns, series.evaluated_through)
        if first == len(columns):
            return
        with span("signals.evaluate", symbol=series.symbol, bars=len(columns) - first):
            found, states = await self._find(series, columns, first, watchers)
        await self._tell([pair for signal in found if (pair := await self.signals.keep(signal))])
        await self._advance(series, instant_of(columns.closed[-1]), states)

    async def sweep(self) -> int:
        """Tell of signals whose event is still owed; returns how many."""
        untold = await self.signals.untold(self.wall.now())
        await self._tell(untold)
        if untold:
            log.info("signals.told_late", count=len(untold))
        return len(untold)

    async def listed(self, symbol: str | None, after: str | None, *, newest_first: bool, limit: int) -> list[Document]:
        """Stored signals, in order of ``recorded_at``."""
        return await self.signals.listed(symbol, after, newest_first=newest_first, limit=limit)

    async def _find(
        self, series: Series, columns: Columns, first: int, watchers: Sequence[Watcher]
    ) -> tuple[list[Signal], dict[str, Any]]:
        tape = Tape.of(columns)
        found: list[Signal] = []
        states: dict[str, Any] = {}
        for index in range(first, len(columns)):
            for watcher in watchers:
                said = watcher.decide(tape, index)
                if isinstance(said, Opinion):
                    found.append(self._signal(series, columns, index, watcher, said))
                if index == len(columns) - 1:
                    unready = isinstance(said, NotReady)
                    states[watcher.entry.name] = {
                        "is_ready": not unready,
                        "reason": said.reason if isinstance(said, NotReady) else None,
                    }
            if index % BREATH == BREATH - 1:
                await asyncio.sleep(0)
        return found, states

    def _signal(self, series: Series, columns: Columns, index: int, watcher: Watcher, said: Opinion) -> Signal:
        entry = watcher.entry
        closed_at = instant_of(columns.closed[index])
        return Signal(
            signal_id=signal_id(entry, series.symbol, closed_at),
            entry=entry.name,
            strategy=entry.strategy,
            version=entry.version,
            params=entry.params,
            symbol=series.symbol,
            interval=series.interval,
            direction=said.direction,
            strength=said.strength,
            reference_price=columns.close[index],
            closed_at=closed_at,
            features=said.features,
            origin=Origin.LIVE if closed_at > series.live_from else Origin.BACKFILL,
            provider=series.provider or "",
            revision=series.revision,
            recorded_at=self.wall.now(),
        )

    async def _tell(self, owing: Sequence[tuple[Signal, Document]]) -> None:
        """Publish stored signals that owe their event, and write that down."""
        if owing:
            await self.publisher.publish([_event(signal) for signal, _ in owing])
        for _, document in owing:
            await self.signals.told(document)

    async def _advance(self, series: Series, through: datetime, states: dict[str, Any]) -> None:
        """Write down how far the series was evaluated, unless a twin is further already."""
        while series.evaluated_through is None or series.evaluated_through < through:
            due_at = self.market.ingest.next_due(series.interval, through) if series.is_active else None
            try:
                await self.market.series.save(replace(series, evaluated_through=through, entries=states, due_at=due_at))
            except StaleError:
                series = await self.market.series.get(series.symbol, series.interval)
                continue
            return


def _first_after(columns: Columns, through: datetime | None) -> int:
    return 0 if through is None else bisect_right(columns.closed, minute_of(through))


def _event(s: Signal) -> SignalRaised:
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
    )
