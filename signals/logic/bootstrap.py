"""The stationary block bootstrap: what else could have come of the same returns. Pure and seeded."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.errors import InvalidPayloadError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    type Floats = NDArray[np.float64]
    type Ints = NDArray[np.int64]

REPLICAS = 2000
FEWEST = 200
MOST_NUMBERS = 1 << 23
"""Numbers drawn for all replicas together, above which there are fewer replicas, but never fewer than FEWEST."""
SEED = 1994
AT_ONCE = 1 << 20
"""Numbers in the largest group of replicas that is computed at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """Where a statistic lies in the middle *level* of all replicas, and in which share of them it is above 0."""

    low: float
    high: float
    level: float
    above_zero: float


def usual_block(count: int) -> int:
    """The mean length of a block: the cube root of the count, the order that Politis and Romano found best."""
    return max(1, round(math.cbrt(count)))


def stationary_rows(count: int, replicas: int, *, block: int, rng: "np.random.Generator") -> "Ints":
    """
    Rows of *replicas* resamplings: blocks of geometric length with mean *block*, wrapped around the end.

    Politis and Romano, The Stationary Bootstrap, 1994.
    """
    import numpy as np

    starts = rng.integers(0, count, size=(replicas, count))
    begins = rng.random((replicas, count)) < 1.0 / block
    begins[:, 0] = True
    place = np.arange(count)
    begun = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return (np.take_along_axis(starts, begun, axis=1) + place - begun) % count


def block_bootstrap(
    values: "Floats",
    statistic: "Callable[[Floats], Floats]",
    *,
    replicas: int | None = None,
    block: int | None = None,
    seed: int = SEED,
) -> "Floats":
    """
    The *statistic* of each replica; it gets a matrix, one replica a row, and gives one number a row.

    Where *replicas* is not given there are 2,000, or fewer of a long series. The same values and seed give the same
    numbers.

    Raises:
        InvalidPayloadError: there are no values, or a number asked for is below 1.

    """
    import numpy as np

    count = len(values)
    if count == 0:
        raise InvalidPayloadError("values: there are none to resample")
    length = usual_block(count) if block is None else block
    many = max(FEWEST, min(REPLICAS, MOST_NUMBERS // count)) if replicas is None else replicas
    if length < 1 or many < 1:
        raise InvalidPayloadError(f"block ({length}) and replicas ({many}) must be at least 1")
    rng = np.random.default_rng(seed)
    found = np.empty(many)
    group = max(1, AT_ONCE // count)
    for begin in range(0, many, group):
        some = min(group, many - begin)
        found[begin : begin + some] = statistic(values[stationary_rows(count, some, block=length, rng=rng)])
    return found


def confidence(found: "Floats", level: float = 0.95) -> Confidence:
    """The percentile interval of bootstrapped statistics. Efron, 1979."""
    import numpy as np

    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Confidence(low=float(low), high=float(high), level=level, above_zero=float((found > 0).mean()))
