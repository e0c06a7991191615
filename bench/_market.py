"""The market of the pipeline benchmark: recorded bars, as many for every symbol, on the same sessions."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

from infra.local.replay.samples import load_packaged
from shared.market.models import Bar, Interval
from shared.market.sessions import Session, calendar

RECORDED_THROUGH = date(2010, 8, 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: the symbols, when the last bar of history closes, and when the last of all does."""

    symbols: Sequence[str]
    history_closes_at: datetime
    closes_at: datetime


def write_market(folder: Path, *, symbols: int, history: int, days: int) -> Written:
    """
    Write a folder to replay: *history* and then *days* bars for each of *symbols* symbols.

    They are the last recorded ones of each symbol. A symbol that left the index early has its bars on the last
    sessions all the same, and one with too few of them begins with its own run backwards.
    """
    folder.mkdir(parents=True)
    sessions = calendar().sessions(date(RECORDED_THROUGH.year - 2, 1, 1), RECORDED_THROUGH)[-(history + days) :]
    recorded = load_packaged(None, Interval.DAY)
    names = recorded.symbols[:symbols]
    for name in names:
        bars = _lengthened(recorded[name, Interval.DAY].bars, len(sessions))
        (folder / f"{name}_1d.csv").write_text(_csv(sessions, bars))
    return Written(symbols=names, history_closes_at=sessions[history - 1].closes_at, closes_at=sessions[-1].closes_at)


def _lengthened(bars: Sequence[Bar], count: int) -> list[Bar]:
    whole = list(bars)
    while len(whole) < count:
        whole = [*reversed(whole), *whole]
    return whole[-count:]


def _csv(sessions: Sequence[Session], bars: Sequence[Bar]) -> str:
    rows = (
        f"{session.date}T00:00:00Z,{bar.open},{bar.high},{bar.low},{bar.close},{bar.volume}"
        for session, bar in zip(sessions, bars, strict=True)
    )
    return "\n".join(["timestamp,open,high,low,close,volume", *rows, ""])
