"""
What prefetching is worth on a trace of habits, and that it stops where there are none.

A day has 200 requests for 50 symbols (Zipf 1.0) between 6 and 22 o'clock: 160 are habits (one symbol at one time of
day, every day, sigma 5 minutes), 40 come at any time. 25 calls a day; an answer is fresh for an hour. What counts is
how many requests of 10 days, after 30 to learn, find a fresh answer without waiting.

``prefetch_vs_oracle``: against who knows the trace: the best instants of each symbol and the best split of the calls
over symbols, by dynamic programming. ``prefetch_vs_lru``: against fetching on a miss while calls last. ``waste``: the
share of answers fetched ahead that nobody used on memoryless traces, the worse of symbols as popular as before and of
symbols that are all alike; on the latter nothing can be foreseen, and ``memoryless_off_share`` is the share of the ten
days that it is off there. ``calls_until_off``: how many calls are wasted when people drop all habits overnight.
"""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from bench._report import report, say
from shared.market.prefetch import SLOT, Prefetcher

SEED = 20_260_101
SYMBOLS, REQUESTS, CALLS = 50, 200, 25
HABITUAL, SIGMA = 0.8, 5.0
LEARN, SCORE = 30, 10
LIFE = 60.0
"""Minutes an answer is fresh."""
WAKES, SLEEPS = 6 * 60.0, 22 * 60.0
"""Nobody asks around midnight, so the days do not depend on each other, and the oracle is exact day by day."""
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
_DAY = timedelta(days=1)

type Day = Sequence[tuple[float, int]]
"""The requests of a day: minute of the day and symbol, in order."""


def zipf(count: int) -> list[float]:
    """How popular symbols are: the second half as much as the first, the third a third."""
    return [1 / (rank + 1) for rank in range(count)]


def trace(
    *, days: int, habitual: float = HABITUAL, popularity: Sequence[float] | None = None, seed: int = SEED
) -> list[Day]:
    """Days of requests, the same ones for the same arguments; *popularity* weighs the symbols."""
    dice = random.Random(seed)
    weights = zipf(SYMBOLS) if popularity is None else popularity
    symbols = range(len(weights))
    habits = [
        (dice.uniform(WAKES, SLEEPS), dice.choices(symbols, weights)[0]) for _ in range(round(REQUESTS * habitual))
    ]
    made: list[Day] = []
    for _ in range(days):
        kept = [(dice.gauss(at, SIGMA), symbol) for at, symbol in habits]
        others = [
            (dice.uniform(WAKES, SLEEPS), dice.choices(symbols, weights)[0]) for _ in range(REQUESTS - len(habits))
        ]
        made.append(sorted(kept + others))
    return made


def oracle(day: Day, calls: int = CALLS) -> int:
    """The most requests that so many calls can keep fresh, for who knows them all."""
    whole = [0] * (calls + 1)
    for symbol in sorted({symbol for _, symbol in day}):
        alone = _best_cover([at for at, other in day if other == symbol], calls)
        whole = [max(whole[n - k] + alone[k] for k in range(n + 1)) for n in range(calls + 1)]
    return whole[calls]


def _best_cover(instants: Sequence[float], calls: int) -> list[int]:
    """The most of one symbol's requests that 0, 1, 2... calls keep fresh."""
    best = [[0] * (len(instants) + 1) for _ in range(calls + 1)]
    for place in range(len(instants) - 1, -1, -1):
        behind = bisect_left(instants, instants[place] + LIFE)
        for k in range(1, calls + 1):
            best[k][place] = max(best[k][place + 1], best[k - 1][behind] + behind - place)
    return [row[0] for row in best]


def on_demand(day: Day, calls: int = CALLS) -> int:
    """How many requests find a fresh answer when every miss is fetched while calls last."""
    fresh_until: dict[int, float] = {}
    score = 0
    for at, symbol in day:
        if fresh_until.get(symbol, -1.0) > at:
            score += 1
        elif calls:
            calls -= 1
            fresh_until[symbol] = at + LIFE
    return score


@dataclass(frozen=True, slots=True, kw_only=True)
class DayPlayed:
    """What became of a day: requests that found a fresh answer, and every call as (minute, symbol, was ahead)."""

    score: int
    calls: Sequence[tuple[float, int, bool]]
    off_share: float


def play(days: Sequence[Day], prefetcher: Prefetcher | None = None) -> list[DayPlayed]:
    """
    Play days one after the other: the prefetcher is told of each request as it comes, and never more.

    A miss may be fetched as well, where that is worth more than the call is later.
    """
    prefetcher = prefetcher or Prefetcher(life=timedelta(minutes=LIFE))
    return [_played(prefetcher, BEGIN + n * _DAY, day) for n, day in enumerate(days)]


def _played(prefetcher: Prefetcher, midnight: datetime, day: Day) -> DayPlayed:
    tomorrow = midnight + _DAY
    requests = [(midnight + timedelta(minutes=at), at, symbol) for at, symbol in day]
    left, score, place, off = CALLS, 0, 0, 0
    calls: list[tuple[float, int, bool]] = []
    fresh_until: dict[int, datetime] = {}

    def fetch(at: datetime, symbol: int, *, is_ahead: bool) -> None:
        nonlocal left
        left -= 1
        fresh_until[symbol] = at + timedelta(minutes=LIFE)
        prefetcher.fetched(name_of(symbol), at, is_ahead=is_ahead)
        calls.append(((at - midnight) / timedelta(minutes=1), symbol, is_ahead))

    slots = _DAY // SLOT
    for slot in range(slots):
        now = midnight + slot * SLOT
        for name in prefetcher.wanted(now, budget=left, until=tomorrow):
            fetch(now, int(name[1:]), is_ahead=True)
        off += not prefetcher.gate.is_on
        while place < len(requests) and (slot == slots - 1 or requests[place][0] < now + SLOT):
            at, _, symbol = requests[place]
            place += 1
            is_fresh = fresh_until.get(symbol, midnight) > at
            score += is_fresh
            prefetcher.asked(name_of(symbol), at)
            if (
                not is_fresh
                and prefetcher.gate.is_on
                and prefetcher.is_worth(name_of(symbol), at, budget=left, until=tomorrow)
            ):
                fetch(at, symbol, is_ahead=False)
    return DayPlayed(score=score, calls=calls, off_share=off / slots)


def name_of(symbol: int) -> str:
    """What a symbol of a trace is called."""
    return f"S{symbol}"


def wasted(days: Sequence[Day], played: Sequence[DayPlayed]) -> tuple[int, int]:
    """How many answers were fetched ahead, and how many of them nobody used before they went stale."""
    count = vain = 0
    for day, one in zip(days, played, strict=True):
        for at, symbol, is_ahead in one.calls:
            if is_ahead:
                count += 1
                vain += not any(other == symbol and at <= asked < at + LIFE for asked, other in day)
    return count, vain


def figures() -> dict[str, float]:
    """All figures."""
    habits = trace(days=LEARN + SCORE)
    ours = sum(one.score for one in play(habits)[LEARN:])
    best = sum(oracle(day) for day in habits[LEARN:])
    lru = sum(on_demand(day) for day in habits[LEARN:])
    say(f"{SCORE} days of habits: {ours} fresh; {best} for who knows the trace, {lru} fetched on demand")

    shares = []
    off_share = 0.0
    for name, popularity in (("as popular as before", zipf(SYMBOLS)), ("all alike", [1.0] * SYMBOLS)):
        memoryless = trace(days=LEARN + SCORE, habitual=0.0, popularity=popularity)
        played = play(memoryless)
        count, vain = wasted(memoryless[LEARN:], played[LEARN:])
        off_share = sum(one.off_share for one in played[LEARN:]) / SCORE
        score = sum(one.score for one in played[LEARN:])
        say(f"memoryless, {name}: {count} ahead, {vain} in vain, {score} fresh, off {off_share:.0%} of the time")
        shares.append(vain / count if count else 0.0)

    dropped = trace(days=SCORE, habitual=0.0, popularity=[1.0] * SYMBOLS, seed=SEED + 1)
    after = play([*habits[:LEARN], *dropped])[LEARN:]
    count, vain = wasted(dropped, after)
    say(f"habits dropped overnight: {count} ahead, {vain} in vain, off {after[-1].off_share:.0%} of the last day")
    return {
        "prefetch_vs_oracle": round(ours / best, 3),
        "prefetch_vs_lru": round(ours / lru, 3),
        "waste": round(max(shares), 3),
        "memoryless_off_share": round(off_share, 3),
        "calls_until_off": vain,
    }


if __name__ == "__main__":
    report("prefetch", figures())
