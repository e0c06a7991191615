"""What backtests ask of storage."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from signals.backtest_models import Backtest, Trials
from signals.logic.backtesting import Tested


class Backtests(Protocol):
    """
    Keeps backtests, what they found, which variants were tried and which hold-outs were opened.

    Raises RateLimitedError or UnavailableError when storage does.
    """

    async def create(self, backtest: Backtest, *, due_at: datetime) -> Backtest:
        """
        Store a new backtest.

        Raises:
            ConflictError: it is known already.

        """
        ...

    async def read(self, backtest_id: str) -> Backtest:
        """
        A backtest as it stands.

        Raises:
            NotFoundError: there is none with this id.

        """
        ...

    async def save(self, backtest: Backtest, *, due_at: datetime | None) -> Backtest:
        """
        Write how far it has come.

        Raises:
            StaleError: somebody else wrote first.

        """
        ...

    async def step(self, backtest: Backtest, tested: Sequence[Tested], *, due_at: datetime) -> Backtest:
        """
        Write what the next variants gave and how far it has come, at once.

        Raises:
            StaleError: somebody else wrote first.

        """
        ...

    async def tested(self, backtest: Backtest) -> list[Tested]:
        """What was written down of all variants so far, in their order."""
        ...

    async def finish(self, backtest: Backtest, result: Mapping[str, Any], trials: Trials) -> Backtest:
        """
        Write the end, the result, the variants that were tried and the hold-outs that were opened, all or nothing.

        Raises:
            StaleError: somebody else wrote first, of this backtest or of the same series' variants.

        """
        ...

    async def result(self, backtest: Backtest) -> Mapping[str, Any] | None:
        """What a backtest that is done has found."""
        ...

    async def trials(self, strategy: str, name: str) -> Trials:
        """The variants that were ever tried of a strategy on a series, and the hold-outs that were opened."""
        ...

    async def standard(self, key: str) -> Mapping[str, Any]:
        """For which history the standard backtests of a series were queued; empty if for none."""
        ...

    async def set_standard(self, key: str, body: Mapping[str, Any]) -> None:
        """Write that down; whoever does so last wins, because all would write the same."""
        ...

    async def due(self, before: datetime, limit: int) -> list[Backtest]:
        """Backtests that are to be worked on since before *before* (wall), the longest due first."""
        ...

    async def listed(
        self, strategy: str | None, after: str | None, *, newest_first: bool, limit: int
    ) -> list[Backtest]:
        """Backtests of a strategy, or of all, in the order in which they were asked for."""
        ...
