"""Stored columns as float64 arrays, split-adjusted to the last bar. Pure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidPayloadError
from shared.market.models import Columns, instant_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]
    type Minutes = NDArray[np.int64]
    type Claims = NDArray[np.bool_]

TOLERANCE = 1e-9
"""Numbers that differ by less, relative to their size, are equal to a strategy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrays:
    """
    Bars as arrays of equal length, oldest first; prices comparable with the last bar's, times in minutes since 1970.

    A rule is written once, with ``now`` and ``ago``: here they are whole arrays, on LastBar two numbers.
    """

    open: "Floats"
    high: "Floats"
    low: "Floats"
    close: "Floats"
    volume: "Floats"
    opened: "Minutes"
    closed: "Minutes"

    def __len__(self) -> int:
        return len(self.close)

    def cut(self, start: int, end: int) -> "Arrays":
        """Bars [start, end), without copying."""
        return Arrays(**self._between(start, end))

    def last(self, start: int, end: int) -> "LastBar":
        """The same, to decide about bar end-1 alone."""
        return LastBar(**self._between(start, end))

    def now(self, values: "Floats") -> "Floats":
        """The value of each bar that is decided about."""
        return values

    def ago(self, values: "Floats", bars: int = 1) -> "Floats":
        """The value some bars earlier; NaN where there was none."""
        import numpy as np

        earlier = np.empty(len(values))
        earlier[:bars] = np.nan
        earlier[bars:] = values[:-bars]
        return earlier

    def recent(self, values: "Floats", bars: int) -> "Floats":
        """The values that the last few bars need; all, where every bar is decided about."""
        return values

    def ratio(self, part: "Floats", whole: "Floats") -> "Floats":
        """Part / whole; 0 where the whole is nothing, or is not known."""
        import numpy as np

        is_something = (whole > TOLERANCE) & (whole > TOLERANCE * part)
        return np.divide(part, whole, out=np.zeros_like(whole), where=is_something)

    def _between(self, start: int, end: int) -> dict[str, Any]:
        cut = slice(start, end)
        return {
            "open": self.open[cut],
            "high": self.high[cut],
            "low": self.low[cut],
            "close": self.close[cut],
            "volume": self.volume[cut],
            "opened": self.opened[cut],
            "closed": self.closed[cut],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LastBar(Arrays):
    """
    A window of which only the last bar is decided about.

    ``now`` and ``ago`` are numpy scalars, which know the operators of arrays and cost a tenth; they are typed as
    arrays so that one rule serves both.
    """

    def now(self, values: "Floats") -> "Floats":
        return values[-1]  # type: ignore[no-any-return]

    def ago(self, values: "Floats", bars: int = 1) -> "Floats":
        return values[-1 - bars]  # type: ignore[no-any-return]

    def recent(self, values: "Floats", bars: int) -> "Floats":
        return values[-bars:]

    def ratio(self, part: "Floats", whole: "Floats") -> "Floats":
        if whole > TOLERANCE and whole > TOLERANCE * part:
            return part / whole
        return part * 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """
    The whole of what was read, as traded, ready to be cut into windows.

    Raises:
        InvalidPayloadError: a number cannot be true; the text names the field and the bar.

    """

    raw: Arrays
    split: "Floats"
    splits: tuple[int, ...]

    def __post_init__(self) -> None:
        import numpy as np

        fields = {name: getattr(self.raw, name) for name in ("open", "high", "low", "close", "volume")}
        for name, values in (fields | {"split": self.split}).items():
            if len(values) != len(self.raw.closed):
                raise InvalidPayloadError(f"{name}: there are {len(values)} numbers for {len(self.raw.closed)} bars")
            lowest = values.min(initial=np.inf)  # NaN, if there is one
            if (lowest >= 0 if name == "volume" else lowest > 0) and values.max(initial=0.0) < np.inf:
                continue
            wrong = ~np.isfinite(values) | ((values < 0) if name == "volume" else (values <= 0))
            place = int(np.flatnonzero(wrong)[0])
            least = "not below 0" if name == "volume" else "above 0"
            closed_at = instant_of(int(self.raw.closed[place]))
            raise InvalidPayloadError(
                f"{name}: {values[place]} at bar {closed_at:%Y-%m-%dT%H:%M:%SZ}; it must be finite and {least}"
            )

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
            opened=np.asarray(columns.opened, dtype=np.int64),
            closed=np.asarray(columns.closed, dtype=np.int64),
        )
        return cls(raw=raw, split=split, splits=tuple(int(i) for i in np.flatnonzero(split != 1.0)))

    def __len__(self) -> int:
        return len(self.raw)

    def window(self, start: int, end: int) -> Arrays:
        """
        Bars [start, end), split-adjusted to bar end-1 with the factors known by then.

        A price is divided by every split that became effective after its bar; volume is multiplied.
        """
        if not self._has_split(start, end):
            return self.raw.cut(start, end)
        return self._adjusted(start, end)

    def last(self, start: int, end: int) -> LastBar:
        """The same window, to decide about bar end-1 alone."""
        if not self._has_split(start, end):
            return self.raw.last(start, end)
        return self._adjusted(start, end).last(0, end - start)

    def _has_split(self, start: int, end: int) -> bool:
        return bool(self.splits) and any(start < i < end for i in self.splits)

    def _adjusted(self, start: int, end: int) -> Arrays:
        import numpy as np

        raw = self.raw.cut(start, end)
        factor = np.ones(end - start)
        factor[:-1] = np.cumprod(self.split[start + 1 : end][::-1])[::-1]
        return Arrays(
            open=raw.open / factor,
            high=raw.high / factor,
            low=raw.low / factor,
            close=raw.close / factor,
            volume=raw.volume * factor,
            opened=raw.opened,
            closed=raw.closed,
        )
