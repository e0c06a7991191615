"""
What the fetcher makes of scarce calls.

``refusals``, ``used_share``, ``peer_refusals``: 8 processes saturate one key of 60 per 6 s and 30 per 0.1 s, with our
throttle and with aiolimiter in each process. ``coalesced_calls``, ``cached_vs_store``: 1,000 who ask the same at once,
and warm reads against the bare store reads they need. ``prefetch_…``: a seeded trace of requests against TTL and LRU
and against a clairvoyant. ``answered_share``, ``falsely_fresh``: a simulated day of provider faults. Each part says in
its own module how it measures.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping

from bench import _faults, _library, _prefetch, _throttle
from bench._report import BenchError, report, say

PARTS: Mapping[str, Callable[[], Awaitable[Mapping[str, float]]]] = {
    "throttle": _throttle.figures,
    "library": _library.figures,
    "prefetch": lambda: asyncio.to_thread(_prefetch.figures),
    "faults": _faults.figures,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    chosen = parser.parse_args().only
    figures: dict[str, float] = {}
    try:
        for name, measure in PARTS.items():
            if chosen in (None, name):
                say(f"measuring: {name}")
                figures |= asyncio.run(_measured(measure))
    except BenchError as e:
        say(str(e))
        return 1
    report("fetcher", figures)
    return 0


async def _measured(measure: Callable[[], Awaitable[Mapping[str, float]]]) -> Mapping[str, float]:
    return await measure()


if __name__ == "__main__":
    sys.exit(main())
