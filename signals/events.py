"""What the signals domain tells the house."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import AwareDatetime

from shared.events import Event, fact_id


class SignalRaised(Event):
    """A strategy formed an opinion of a symbol on a closed bar; ``occurred_at`` is the bar's close."""

    type: ClassVar[str] = "signals.signal_raised.v1"
    source: ClassVar[str] = "/troop/signals"

    signal_id: str
    entry: str
    strategy: str
    params: Mapping[str, float]
    symbol: str
    interval: str
    direction: Literal["long", "short"]
    strength: float
    reference_price: float
    features: Mapping[str, float]
    provider: str
    known_at: AwareDatetime | None = None
    horizon: int | None = None
    closes_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    confidence: float | None = None
    sample_size: int = 0
    adjustment: str | None = None
    revision: int | None = None
    why: str = ""

    @property
    def event_id(self) -> str:
        return self.signal_id

    @property
    def subject(self) -> str:
        return f"symbols/{self.symbol}"


class SignalScored(Event):
    """The horizon of a signal has closed and it is known how the opinion fared; ``occurred_at`` is that close."""

    type: ClassVar[str] = "signals.signal_scored.v1"
    source: ClassVar[str] = "/troop/signals"

    signal_id: str
    entry: str
    strategy: str
    symbol: str
    interval: str
    direction: Literal["long", "short"]
    strength: float
    confidence: float | None
    sample_size: int
    horizon: int
    is_hit: bool
    entry_price: float
    exit_price: float
    forward_return: float
    net_return: float
    base_return: float
    mfe: float
    mae: float
    cost_per_side: float

    @property
    def event_id(self) -> str:
        return fact_id(self.type, self.signal_id)

    @property
    def subject(self) -> str:
        return f"symbols/{self.symbol}"


class BacktestRequested(Event):
    """Somebody asked for a backtest, or some of its variants are done and the others are to be tried."""

    type: ClassVar[str] = "signals.backtest_requested.v1"
    source: ClassVar[str] = "/troop/signals"

    backtest_id: str
    entry: str | None
    strategy: str
    symbol: str
    interval: str
    variants: int
    done: int

    @property
    def event_id(self) -> str:
        return fact_id(self.type, self.backtest_id, str(self.done))

    @property
    def subject(self) -> str:
        return f"symbols/{self.symbol}"
