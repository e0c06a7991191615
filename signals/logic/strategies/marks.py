"""What a rule says of bars, and the steps that rules share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from signals.logic.arrays import TOLERANCE, Arrays, LastBar
from signals.models import Direction, Opinion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from signals.logic.arrays import Claims, Floats

OVER, UNDER = 1 + TOLERANCE, 1 - TOLERANCE
"""What a number is multiplied by, so that only what differs from it by more than rounding lies beyond."""
FORGOTTEN = 1e-18
"""
Weight of the oldest bar at which an exponentially smoothed value counts as settled.

Far below 1e-12, because a wild past weighs more: its moves may have been a hundred thousand times today's.
"""
DIGITS = 9
"""Significant digits of stored features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """
    For each bar: +1 long, -1 short, 0 nothing; how strongly; and the numbers behind it.

    ``state`` is where the strategy stands at each bar, whether or not it has just come there: +1 up, -1 down,
    0 neither; None for a strategy that keeps none.
    """

    direction: "NDArray[np.int8]"
    strength: "Floats"
    features: Mapping[str, "Floats"]
    state: "NDArray[np.int8] | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LastMark(Marks):
    """Marks of one bar: plain numbers where Marks has arrays."""


def said(
    bars: Arrays,
    *,
    long: "Claims",
    short: "Claims",
    strength: "Floats",
    features: Mapping[str, "Floats"],
    state: "tuple[Claims, Claims] | None" = None,
) -> Marks:
    """
    What a rule says, given where it is long and where it is short; strength is cut to 0..1.

    ``state`` is where a strategy that keeps one stands up, and where down.
    """
    if isinstance(bars, LastBar):
        stands = (1 if state[0] else -1 if state[1] else 0) if state else 0
        if not (long or short):
            return _SILENT[stands]
        return LastMark(
            direction=1 if long else -1,  # type: ignore[arg-type]
            strength=min(max(strength, 0.0), 1.0),  # type: ignore[arg-type]
            features=features,
            state=stands,  # type: ignore[arg-type]
        )
    import numpy as np

    def sign(up: "Claims", down: "Claims") -> "NDArray[np.int8]":
        return up.astype(np.int8) - down.astype(np.int8)

    return Marks(
        direction=sign(long, short),
        strength=np.clip(strength, 0.0, 1.0),
        features=features,
        state=sign(*state) if state else None,
    )


_SILENT = {
    stands: LastMark(direction=0, strength=0.0, features={}, state=stands)  # type: ignore[arg-type]
    for stands in (0, 1, -1)
}


def silent(state: "tuple[Claims, Claims]" = (False, False)) -> Marks:  # type: ignore[assignment]
    """That nothing is said of the last bar, and where a strategy that keeps a state stands."""
    return _SILENT[1 if state[0] else -1 if state[1] else 0]


def spared(bars: Arrays, *claims: "Claims") -> bool:
    """Whether only the last bar is decided about and none of these hold: then the rest of a rule can be spared."""
    return isinstance(bars, LastBar) and not any(claims)


def opinion_at(marks: Marks, index: int) -> Opinion | None:
    """What the marks say of one bar."""
    if isinstance(marks, LastMark):
        direction, strength, features = int(marks.direction), marks.strength, marks.features
    else:
        direction = int(marks.direction[index])
        if direction == 0:
            return None
        strength, features = marks.strength[index], {name: values[index] for name, values in marks.features.items()}
    if direction == 0:
        return None
    return Opinion(
        direction=Direction.LONG if direction > 0 else Direction.SHORT,
        strength=_shown(strength),
        features={name: _shown(value) for name, value in features.items()},
    )


def _shown(value: object) -> float:
    return float(f"{float(value):.{DIGITS}g}")  # type: ignore[arg-type]


def settle(kept: float, times: int = 1) -> int:
    """
    How many bars it takes to forget, when each keeps this share of what came before.

    A value that is smoothed twice forgets later: what the first smoothing still held entered the second for as long.
    """
    return math.ceil(math.log(FORGOTTEN * 0.01 ** (times - 1)) / math.log(kept))


def turning(
    bars: Arrays, line: "Floats", other: "Floats", size: "Floats"
) -> "tuple[Claims, Claims, tuple[Claims, Claims]]":
    """
    Where one line has just come to lie above another, where below; and where it lies above and below.

    Lines that differ by less than rounding, beside *size*, have met and not crossed.
    """
    gap, past = bars.now(line) - bars.now(other), bars.ago(line) - bars.ago(other)
    slack, past_slack = TOLERANCE * bars.now(size), TOLERANCE * bars.ago(size)
    above, below = gap > slack, gap < -slack
    return above & (past <= past_slack), below & (past >= -past_slack), (above, below)
