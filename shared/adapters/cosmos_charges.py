"""What calls to Cosmos DB cost, in request units."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter


@dataclass(slots=True)
class Charge:
    """What one kind of call has cost."""

    calls: int = 0
    units: float = 0.0


class Charges:
    """
    Counts request units by operation and container, for this process and as the metric ``troop.request_charge``.

    Failed calls cost too, and are counted.
    """

    def __init__(self) -> None:
        self._by: dict[tuple[str, str], Charge] = {}
        self._metric: Counter | None = None

    @property
    def units(self) -> float:
        """The sum of everything."""
        return sum(charge.units for charge in self._by.values())

    def by_operation(self) -> Mapping[tuple[str, str], Charge]:
        """What each operation on each container has cost so far."""
        return self._by

    def add(self, operation: str, container: str, units: float) -> None:
        """Count a call."""
        charge = self._by.get((operation, container))
        if charge is None:
            charge = self._by[operation, container] = Charge()
        charge.calls += 1
        charge.units += units
        self._counter().add(units, {"operation": operation, "container": container})

    def _counter(self) -> "Counter":
        if self._metric is None:
            from opentelemetry import metrics

            self._metric = metrics.get_meter("troop").create_counter(
                "troop.request_charge", unit="RU", description="Request units that Cosmos DB charged"
            )
        return self._metric
