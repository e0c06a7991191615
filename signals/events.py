"""What the signals domain tells the house."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from shared.events import Event


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

    @property
    def event_id(self) -> str:
        return self.signal_id

    @property
    def subject(self) -> str:
        return f"symbols/{self.symbol}"
