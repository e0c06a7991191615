"""What the benchmarks share: progress on stderr, one JSON object as the last line of stdout."""

import json
import math
import sys
from collections.abc import Mapping, Sequence


class BenchError(Exception):
    """A benchmark cannot be run, or what it ran did not do its work; the text says which."""


def say(text: str) -> None:
    """Tell of progress."""
    print(text, file=sys.stderr, flush=True)


def report(bench: str, figures: Mapping[str, float]) -> None:
    """Write the result."""
    print(json.dumps({"bench": bench, "figures": figures}), flush=True)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of *values* that at least *share* of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
