"""
The lookahead check: a strategy must say the same of a bar whether or not the future is there to be seen. Pure.

The future is cut off after many bars and the rule runs again; then every bar is decided as live evaluation decides
it, from its lookback alone. What differs looked ahead, or needs more of the past than it says.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from pydantic import ValidationError

from signals.logic.arrays import Arrays
from signals.logic.strategies import Marks, Params, Strategy, opinion_at
from signals.logic.strategies.marks import LastMark
from signals.models import Opinion

if TYPE_CHECKING:
    from signals.logic.arrays import Floats

COLUMNS = ("open", "high", "low", "close", "volume", "opened", "closed")
CLOSE_ENOUGH = 1e-6
"""Relative difference of strengths and features that rounding may cause."""


SLACK = 1e-8
"""Difference of strengths that means nothing, however small they are."""


class Rule(StrEnum):
    """What a strategy must keep to."""

    AHEAD = "looks ahead"
    BEHIND = "lookback is too short"
    FORM = "marks are not well-formed"
    CHANGES = "says different things of the same bars"
    FAILS = "fails"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """
    The first bar at which a strategy breaks a rule, in words, and the two opinions that differ.

    ``index`` is the bar's place among those checked, None where the trouble is of no one bar; ``expected`` is what
    was said with all bars at hand, ``found`` what was said without those after ``cut`` or before the lookback.
    """

    rule: Rule
    detail: str
    index: int | None = None
    cut: int | None = None
    expected: Opinion | None = None
    found: Opinion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was checked and what was found; a check that compared no opinion proves little and says so."""

    bars: int
    cuts: int
    decided: int
    opinions: int
    troubles: Sequence[Trouble]

    @property
    def is_passed(self) -> bool:
        return not self.troubles


def check(strategy: Strategy, bars: Arrays, params: Params | None = None, *, cuts: int = 60) -> Verdict:
    """
    Check a strategy on *bars*, with its default parameters unless others are given.

    The future is cut off after up to *cuts* bars at which something was said, and after as many others; the live
    decision is compared at every bar.
    """
    examined = _Examination(strategy, bars, params)
    return examined.verdict(cuts)


class _Stopped(Exception):  # noqa: N818 - carries a finding, not an error
    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.detail)
        self.trouble = trouble


class _Examination:
    """One strategy on one array of bars; what a rule is given cannot be written to."""

    def __init__(self, strategy: Strategy, bars: Arrays, params: Params | None) -> None:
        self._strategy = strategy
        self._bars = _copy(bars)
        self._given = params
        self._count = len(bars)
        self._cuts = self._decided = self._opinions = 0

    def verdict(self, cuts: int) -> Verdict:
        troubles: list[Trouble] = []
        try:
            params = self._params()
            lookback = self._lookback(params)
            whole = self._marks(params, self._count, lookback)
            self._again(params, whole, lookback)
            self._opinions = sum(1 for i in range(lookback - 1, self._count) if whole.direction[i])
            for step in (self._without_future, self._from_lookback):
                found = step(params, whole, lookback, cuts)
                if found and not (troubles and found.rule is troubles[0].rule):
                    troubles.append(found)
        except _Stopped as e:
            troubles.append(e.trouble)
        return Verdict(
            bars=self._count, cuts=self._cuts, decided=self._decided, opinions=self._opinions, troubles=troubles
        )

    # --- running it

    def _params(self) -> Params:
        try:
            return self._strategy.params() if self._given is None else self._given
        except ValidationError as e:
            error = e.errors(include_url=False)[0]
            where = ".".join(map(str, error["loc"]))
            raise _Stopped(
                Trouble(rule=Rule.FAILS, detail=f"the parameter {where} needs a default: {error['msg']}")
            ) from e

    def _lookback(self, params: Params) -> int:
        lookback = self._strategy.lookback(params)
        if not isinstance(lookback, int) or lookback < 1:
            raise _Stopped(
                Trouble(rule=Rule.FORM, detail=f"lookback is {lookback!r}; it must be a whole number of bars from 1 up")
            )
        if self._count < lookback:
            detail = f"needs {lookback} bars, there are {self._count}: check it on more bars or with smaller parameters"
            raise _Stopped(Trouble(rule=Rule.FAILS, detail=detail))
        return lookback

    def _run(self, bars: Arrays, params: Params, what: str) -> Marks:
        try:
            return self._strategy.mark(bars, params)
        except Exception as e:  # a user's own code may raise anything; it is reported
            kind = type(e).__name__
            raise _Stopped(Trouble(rule=Rule.FAILS, detail=f"{kind} on {what}: {e}")) from e

    def _marks(self, params: Params, end: int, lookback: int) -> Marks:
        what = f"the first {end} bars" if end < self._count else f"all {end} bars"
        marks = self._run(self._bars.cut(0, end), params, what)
        for trouble in _malformed(marks, end, lookback, has_state=self._strategy.has_state):
            raise _Stopped(Trouble(rule=Rule.FORM, detail=f"{trouble} (on {what})"))
        return marks

    # --- what is compared

    def _again(self, params: Params, whole: Marks, lookback: int) -> None:
        again = self._marks(params, self._count, lookback)
        place = self._difference(whole, again, lookback - 1, self._count)
        if place is not None:
            raise _Stopped(
                Trouble(
                    rule=Rule.CHANGES,
                    detail="two runs on the same bars differ: a rule may use no chance, clock or memory",
                    index=place,
                    expected=opinion_at(whole, place),
                    found=opinion_at(again, place),
                )
            )

    def _without_future(self, params: Params, whole: Marks, lookback: int, cuts: int) -> Trouble | None:
        """Run again on the first bars alone; everything said of them must stay."""
        first: Trouble | None = None
        for cut in _cuts(whole, lookback, self._count, cuts):
            self._cuts += 1
            part = self._marks(params, cut, lookback)
            place = self._difference(whole, part, lookback - 1, cut)
            if place is not None and (first is None or place < (first.index or 0)):
                expected, found = opinion_at(whole, place), opinion_at(part, place)
                detail = (
                    f"with the bars after number {cut - 1} it says {told(expected)}, without them {told(found)}: "
                    "it used bars that had not closed yet"
                )
                first = Trouble(
                    rule=Rule.AHEAD, detail=detail, index=place, cut=cut - 1, expected=expected, found=found
                )
        return first

    def _from_lookback(self, params: Params, whole: Marks, lookback: int, _cuts: int) -> Trouble | None:
        """Decide every bar from its lookback alone, as live evaluation does."""
        sizes = _sizes(whole)
        for i in range(lookback - 1, self._count):
            self._decided += 1
            what = f"the {lookback} bars that end with number {i}"
            live = self._run(self._bars.last(i + 1 - lookback, i + 1), params, what)
            if not isinstance(live, LastMark):
                for wrong in _malformed(live, lookback, lookback, has_state=self._strategy.has_state):
                    raise _Stopped(Trouble(rule=Rule.FORM, detail=f"{wrong} (on {what})", index=i))
            expected, found = opinion_at(whole, i), opinion_at(live, lookback - 1)
            is_same = _same(expected, found, sizes)
            if is_same and whole.state is not None and live.state is not None:
                state = live.state if isinstance(live, LastMark) else live.state[lookback - 1]
                is_same = bool(state == whole.state[i])
            if not is_same:
                return self._why(params, whole, lookback, i, found)
        return None

    def _why(self, params: Params, whole: Marks, lookback: int, i: int, found: Opinion | None) -> Trouble:
        """A decision that differs with less history: because the future is missing as well, or the past alone?"""
        until = self._marks(params, i + 1, lookback)
        expected = opinion_at(whole, i)
        if self._difference(whole, until, i, i + 1) is not None:
            detail = (
                f"with the bars after number {i} it says {told(expected)}, without them "
                f"{told(opinion_at(until, i))}: it used bars that had not closed yet"
            )
            return Trouble(
                rule=Rule.AHEAD, detail=detail, index=i, cut=i, expected=expected, found=opinion_at(until, i)
            )
        detail = (
            f"with all {i} bars before it says {told(expected)}, with only its lookback of {lookback} bars "
            f"{told(found)}: state a longer lookback, or use an indicator that forgets"
        )
        return Trouble(rule=Rule.BEHIND, detail=detail, index=i, cut=i, expected=expected, found=found)

    def _difference(self, one: Marks, other: Marks, start: int, end: int) -> int | None:
        """The first bar of [start, end) of which two runs say different things."""
        import numpy as np

        cut, sizes = slice(start, end), _sizes(one)
        differs = one.direction[cut] != other.direction[cut]
        if one.state is not None and other.state is not None:
            differs |= one.state[cut] != other.state[cut]
        if one.features.keys() != other.features.keys():
            differs |= one.direction[cut] != 0
        for name in ("", *(one.features.keys() & other.features.keys())):
            mine, others = (marks.features[name] if name else marks.strength for marks in (one, other))
            slack = CLOSE_ENOUGH * 1e-3 * sizes[name] if name else SLACK
            same = np.isclose(mine[cut], others[cut], rtol=CLOSE_ENOUGH, atol=slack)
            differs |= (one.direction[cut] != 0) & ~same
        return start + int(differs.argmax()) if differs.any() else None


def told(opinion: Opinion | None) -> str:
    """An opinion in few words."""
    if opinion is None:
        return "nothing"
    features = ", ".join(f"{name} {value:.6g}" for name, value in opinion.features.items())
    return f"{opinion.direction} {opinion.strength:.3g}" + (f" ({features})" if features else "")


def _copy(bars: Arrays) -> Arrays:
    copies = {name: getattr(bars, name).copy() for name in COLUMNS}
    for column in copies.values():
        column.flags.writeable = False
    return Arrays(**copies)


def _cuts(whole: Marks, lookback: int, count: int, most: int) -> Iterator[int]:
    """After bars at which something was said, before them, and evenly over the rest: sorted, each once."""
    import numpy as np

    said = np.flatnonzero(whole.direction[lookback - 1 :]) + lookback - 1
    if len(said) > most:
        said = said[np.linspace(0, len(said) - 1, most).astype(int)]
    even = np.linspace(lookback, count - 1, min(most, count - lookback)).astype(int)
    wanted = {int(i) + 1 for i in said} | {int(i) for i in said} | {int(i) for i in even}
    yield from sorted(cut for cut in wanted if lookback <= cut < count)


def _sizes(marks: Marks) -> Mapping[str, float]:
    """How large each feature gets: what counts as rounding beside it."""
    import numpy as np

    return {
        name: float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
        for name, values in marks.features.items()
    }


def _same(one: Opinion | None, other: Opinion | None, sizes: Mapping[str, float]) -> bool:
    if one is None or other is None:
        return one is other
    return (
        one.direction is other.direction
        and math.isclose(one.strength, other.strength, rel_tol=CLOSE_ENOUGH, abs_tol=SLACK)
        and one.features.keys() == other.features.keys()
        and all(
            math.isclose(
                value, other.features[name], rel_tol=CLOSE_ENOUGH, abs_tol=CLOSE_ENOUGH * 1e-3 * sizes.get(name, 0.0)
            )
            for name, value in one.features.items()
        )
    )


def _malformed(marks: object, count: int, lookback: int, *, has_state: bool) -> Iterator[str]:
    """What is wrong with marks as such."""
    import numpy as np

    if not isinstance(marks, Marks) or isinstance(marks, LastMark):
        yield f"mark returned {type(marks).__name__} instead of Marks with one value a bar"
        return
    columns: dict[str, Floats] = {"strength": marks.strength, **marks.features}
    for name, values in (("direction", marks.direction), *columns.items()):
        shape = getattr(values, "shape", None)
        if shape != (count,):
            yield f"{name} is {type(values).__name__} of shape {shape} for {count} bars; give one value a bar"
            return
    if has_state and marks.state is None:
        yield "the strategy says has_state and marks none"
        return
    said = marks.direction != 0
    said[: lookback - 1] = False
    if not np.isin(marks.direction, (-1, 0, 1)).all():
        yield "direction must be -1, 0 or +1"
    for name, values in columns.items():
        wrong = np.flatnonzero(said & ~np.isfinite(values))
        if len(wrong):
            yield f"{name} is {values[wrong[0]]} at bar number {wrong[0]}, of which something is said"
    wrong = np.flatnonzero(said & ((marks.strength < 0) | (marks.strength > 1)))
    if len(wrong):
        yield f"strength is {marks.strength[wrong[0]]:g} at bar number {wrong[0]}; it must lie between 0 and 1"
