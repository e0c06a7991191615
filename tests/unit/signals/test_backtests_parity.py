"""A backtest trades exactly what the live service would have said."""

from datetime import UTC, datetime
from functools import cache

import numpy as np
import pytest

from infra.local.replay.samples import load_packaged
from shared.market.models import Bar, Columns, Interval, instant_of
from shared.settings import ROOT
from signals.adapters.entries_file import read_entries
from signals.backtest_models import Job, NoValidation
from signals.logic.backtesting import Ground
from signals.logic.evaluation import Watcher
from signals.logic.simulation import Rules
from tests.unit.signals.house import House

ENTRIES = [entry for entry in read_entries(ROOT / "signals/entries.toml") if entry.interval is Interval.DAY]
FIRST = datetime(2003, 6, 1, tzinfo=UTC)


@cache
def recorded(symbol: str) -> tuple[Bar, ...]:
    """Real bars around a split: Apple's of 28 February 2005."""
    bars = load_packaged([symbol], Interval.DAY)[symbol, Interval.DAY].bars
    return tuple(bar for bar in bars if bar.closed_at > FIRST)[:700]


@pytest.mark.parametrize("symbol", ["AAPL", "MSFT"])
async def test_the_marks_of_a_backtest_are_the_signals_of_the_live_service(symbol: str) -> None:
    """On real bars, a split among them, for every configured entry: the same bars, the same directions."""
    bars = recorded(symbol)
    watchers = [Watcher.of(entry) for entry in ENTRIES if entry.watches(symbol, Interval.DAY)]
    house = House(bars, live_from=bars[0].closed_at, symbol=symbol, watchers=watchers)
    await house.open()
    await house.instance().evaluate(await house.store(0, len(bars)))
    stored = [(body["entry"], body["closed_at"], body["direction"]) for body in (await house.ledger()).values()]
    assert len(stored) > 20
    traded = []
    columns = Columns.of(bars)
    for watcher in watchers:
        warmup = watcher.entry.lookback - 1
        if warmup > len(bars) - 2:
            continue
        job = Job(
            name=watcher.entry.name,
            entry=watcher.entry,
            symbol=symbol,
            begin=bars[0].closed_at,
            first=bars[warmup].closed_at,
            last=bars[-1].closed_at,
            bars=len(bars) - warmup,
            warmup=warmup,
            provider="recorded",
            adjustment="raw",
            revision=0,
            rules=Rules(),
            validation=NoValidation(),
            candidates=[watcher.entry.params],
        )
        ground = Ground.of(job, columns)
        marks = ground.marks(watcher.entry.params)
        traded += [
            (
                watcher.entry.name,
                f"{instant_of(int(ground.bars.closed[i])):%Y-%m-%dT%H:%M:%SZ}",
                "long" if marks[i] > 0 else "short",
            )
            for i in np.flatnonzero(marks)
        ]
    assert sorted(traded) == sorted(stored)
