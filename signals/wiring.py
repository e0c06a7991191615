"""Who stands in which place in the signals domain."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from shared.inbound import DeadLetters
from shared.wiring import Core
from signals.adapters.documents import SignalDocuments
from signals.adapters.entries_file import read_entries
from signals.logic.evaluation import Watcher
from signals.service import SignalService

if TYPE_CHECKING:
    from signals.backtests import BacktestService


@dataclass(frozen=True, slots=True, kw_only=True)
class Wired:
    """What the triggers need."""

    service: SignalService
    backtests: "Callable[[], BacktestService]"
    dead_letters: DeadLetters


def wire(core: Core) -> Wired:
    """
    Build the signals domain.

    Raises:
        ConfigurationError: the entries file is wrong.

    """
    settings = core.settings
    time = settings.market_time()
    outbox = core.outbox("signals")
    watchers = [Watcher.of(entry) for entry in read_entries(settings.file(settings.entries_file))]

    @cache
    def backtests() -> "BacktestService":
        """Made at its first use: a cold start seldom needs it."""
        from signals.adapters.backtest_documents import BacktestDocuments
        from signals.backtests import BacktestService

        return BacktestService(
            series=core.market.series,
            bars=core.market.bars,
            backtests=BacktestDocuments(core.documents, core.wall, timedelta(days=settings.retention_days)),
            publisher=outbox,
            watchers=watchers,
            wall=core.wall,
            on_new_history=settings.backtest_on_history,
        )

    service = SignalService(
        market=core.market,
        signals=SignalDocuments(core.documents),
        publisher=outbox,
        watchers=watchers,
        wall=core.wall,
        speed=time.speed if time else 1.0,
    )
    return Wired(service=service, backtests=backtests, dead_letters=core.dead_letters)
