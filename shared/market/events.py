"""What the market room tells the house."""

from datetime import date
from typing import ClassVar

from pydantic import AwareDatetime

from shared.clock import format_instant
from shared.events import Event, fact_id
from shared.market.models import Interval


class BarsIngested(Event):
    """New closed bars of one series are stored: those closing in [first_closed_at, last_closed_at]."""

    type: ClassVar[str] = "market.bars_ingested.v1"
    source: ClassVar[str] = "/troop/market"

    symbol: str
    interval: Interval
    revision: int
    first_closed_at: AwareDatetime
    last_closed_at: AwareDatetime
    count: int

    @property
    def event_id(self) -> str:
        first, last = format_instant(self.first_closed_at), format_instant(self.last_closed_at)
        return fact_id(self.type, self.symbol, self.interval, str(self.revision), first, last)

    @property
    def subject(self) -> str:
        return f"symbols/{self.symbol}"


class EarningsReported(Event):
    """A company's quarterly report is out. ``occurred_at``: the market instant at which we were told."""

    type: ClassVar[str] = "market.earnings_reported.v1"
    source: ClassVar[str] = "/troop/market"

    symbol: str
    day: date
    eps_estimate: float | None
    eps_actual: float | None
    revenue_estimate: float | None
    revenue_actual: float | None
    provider: str

    @property
    def event_id(self) -> str:
        numbers = (self.eps_estimate, self.eps_actual, self.revenue_estimate, self.revenue_actual)
        told = ("" if number is None else f"{number:.12g}" for number in numbers)
        return fact_id(self.type, self.symbol, str(self.day), *told)

    @property
    def subject(self) -> str:
        return f"symbols/{self.symbol}"
