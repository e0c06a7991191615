"""What the signals domain does: bring bars in, evaluate them, tell of signals."""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from shared.clock import Clock
from shared.documents import Document
from shared.errors import PermanentError, StaleError
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

STEP = 500
"""Bars that are evaluated and written down together."""
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
        while first < len(columns):
            # In steps that are written down, so that a long history never has to fit into one handler's time.
            step = columns[: first + STEP]
            with span("signals.evaluate", symbol=series.symbol, bars=len(step) - first):
                found, states = await self._find(series, step, first, watchers)
            owing = [pair for signal in found if (pair := await self._keep(signal))]
            # Every kept signal owes its event in storage: trouble with the topic must not hold up what is evaluated.
            series = await self._advance(series, instant_of(step.closed[-1]), states)
            await self._tell(owing)
            first += STEP

    async def sweep(self) -> int:
        """Tell of signals whose event is still owed; returns how many."""
        untold = await self.signals.untold(self.wall.now())
        told = len(untold)
        try:
            await self._tell(untold)
        except PermanentError:
            for one in untold:  # one that the topic refuses must not hold up the others
                try:
                    await self._tell([one])
                except PermanentError as e:
                    told -= 1
                    log.error("signal.refused", signal_id=one[0].signal_id, reason=str(e))  # noqa: TRY400
        if told:
            log.info("signals.told_late", count=told)
        return told

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

    async def _keep(self, signal: Signal) -> tuple[Signal, Document] | None:
        """Store a signal as recorded at this moment: a reader behind ``?after=`` looks back no further than 60 s."""
        return await self.signals.keep(replace(signal, recorded_at=self.wall.now()))

    async def _tell(self, owing: Sequence[tuple[Signal, Document]]) -> None:
        """Publish stored signals that owe their event, and write that down."""
        if owing:
            await self.publisher.publish([_event(signal) for signal, _ in owing])
        for _, document in owing:
            await self.signals.told(document)

    async def _advance(self, series: Series, through: datetime, states: dict[str, Any]) -> Series:
        """Write down how far the series was evaluated, unless a twin is further already."""
        while series.evaluated_through is None or series.evaluated_through < through:
            due_at = self.market.ingest.next_due(series.interval, through) if series.is_active else None
            advanced = replace(series, evaluated_through=through, entries=states, due_at=due_at, told_at=None)
            try:
                return await self.market.series.save(advanced)
            except StaleError:
                series = await self.market.series.get(series.symbol, series.interval)
        return series


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
