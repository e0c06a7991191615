"""Stored columns as float64 arrays, split-adjusted to the last bar. Pure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.market.models import Columns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrays:
    """Bars as float64 arrays of equal length, oldest first; prices comparable with the last bar's."""

    open: "Floats"
    high: "Floats"
    low: "Floats"
    close: "Floats"
    volume: "Floats"

    def __len__(self) -> int:
        return len(self.close)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """The whole of what was read, as traded, ready to be cut into windows."""

    raw: Arrays
    split: "Floats"
    splits: tuple[int, ...]

    @classmethod
    def of(cls, columns: Columns) -> "Tape":
        """Arrays over *columns*, without copying."""
        import numpy as np

        def floats(values: object) -> "Floats":
            return np.asarray(values, dtype=np.float64)

        split = floats(columns.split)
        raw = Arrays(
            open=floats(columns.open),
            high=floats(columns.high),
            low=floats(columns.low),
            close=floats(columns.close),
            volume=floats(columns.volume),
        )
        return cls(raw=raw, split=split, splits=tuple(int(i) for i in np.flatnonzero(split != 1.0)))

    def window(self, start: int, end: int) -> Arrays:
        """
        Bars [start, end), split-adjusted to bar end-1 with the factors known by then.

        A price is divided by every split that became effective after its bar; volume is multiplied.
        """
        raw = self.raw
        cut = slice(start, end)
        if not any(start < i < end for i in self.splits):
            return Arrays(
                open=raw.open[cut], high=raw.high[cut], low=raw.low[cut], close=raw.close[cut], volume=raw.volume[cut]
            )
        import numpy as np

        factor = np.ones(end - start)
        factor[:-1] = np.cumprod(self.split[start + 1 : end][::-1])[::-1]
        return Arrays(
            open=raw.open[cut] / factor,
            high=raw.high[cut] / factor,
            low=raw.low[cut] / factor,
            close=raw.close[cut] / factor,
            volume=raw.volume[cut] * factor,
        )
