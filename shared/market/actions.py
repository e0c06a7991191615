"""
What happened to shares, and to our histories of them: splits and dividends, corrections, changes of provider.

What decides is pure; ``Actions`` keeps what providers told of a symbol, ``Provenance`` what became of a series.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from itertools import pairwise
from typing import Any

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Documents
from shared.errors import NotFoundError
from shared.market.conditional import QUOTA, changed
from shared.market.models import Adjustment, Bar, Columns, CorporateAction, instant_of, minute_of
from shared.market.sessions import calendar
from shared.market.stores import Series

ACTIONS, PROVENANCE = "actions", "provenance"

SAME = 1e-6
"""Relative difference up to which two prices of one provider for one bar are the same (they round to 4 decimals)."""
ROUNDED = 1e-3
"""The same between two providers: they round, and their last trade may differ."""
FAR_OFF = 2.0
"""A volume that changes by more than this factor is news; less is late trades being counted in."""
WHOLESALE = 0.5
"""A history of which more than this share changed is another history, not a corrected one."""
FEW = 10
"""Of fewer bars nothing can be said in shares."""
GAP = 1.04
"""A session that opens this factor away from the last close may have been split, where we were told of one."""
KEPT = 50
"""How many changes of a series are remembered."""

type Split = tuple[date, float]
"""The session in which new shares are first traded, and how many of them there are for one old share."""


def splits_of(actions: Iterable[CorporateAction]) -> list[Split]:
    """The splits among *actions*, oldest first."""
    return sorted((a.day, a.split) for a in actions if a.split != 1.0)


def contradiction(held: Columns, fetched: Sequence[Bar], *, rounded_through: int = -1) -> str | None:
    """
    In what *fetched* says something else of a bar we hold; None: in nothing.

    Bars that close by minute *rounded_through* came from another provider: its prices are compared as two
    providers' are, its volumes are not.
    """
    place = {minute: i for i, minute in enumerate(held.closed)}
    for bar in fetched:
        minute = minute_of(bar.closed_at)
        if (i := place.get(minute)) is None:
            continue
        is_ours = minute > rounded_through
        when = f"{bar.closed_at:%Y-%m-%d %H:%M} UTC"
        if not _is_same(bar.close, held.close[i], SAME if is_ours else ROUNDED):
            return f"the close of {when} is now {bar.close:.10g}, it was {held.close[i]:.10g}"
        few, many = sorted((bar.volume, held.volume[i]))
        if is_ours and many > FAR_OFF * few:
            return f"the volume of {when} is now {bar.volume:.10g}, it was {held.volume[i]:.10g}"
    return None


def disbelief(held: Columns, fresh: Columns, splits: Sequence[Split], adjustment: Adjustment) -> str | None:
    """
    Why *fresh* cannot be the new history of *held*; None: it can.

    A few bars may be corrected. That most change is explained only by splits, and only where prices are divided by
    later ones: then all older prices moved by one factor, or by factors that follow from *splits*.
    """
    if not len(fresh) or fresh.closed[-1] < held.closed[-1]:
        return "it ends before what is stored"
    if fresh.closed[0] > held.closed[0] and adjustment is not Adjustment.RAW:
        return "it begins after what is stored"
    now = dict(zip(fresh.closed, fresh.close, strict=True))
    both = [(minute, now[minute] / was) for minute, was in zip(held.closed, held.close, strict=True) if minute in now]
    if not both:
        return "it has none of the bars that are stored"
    moved = [(minute, ratio) for minute, ratio in both if not _is_same(ratio, 1.0, ROUNDED)]
    if len(both) < FEW or len(moved) <= WHOLESALE * len(both):
        return None
    share = f"{len(moved)} of {len(both)} closes are not what they were"
    if adjustment is Adjustment.RAW:
        return f"{share}, and prices as traded do not change"
    typical = sorted(ratio for _, ratio in moved)[len(moved) // 2]
    if sum(_is_same(ratio, typical, 2 * ROUNDED) for _, ratio in moved) >= 0.9 * len(moved):
        return None
    if all(_is_explained(instant_of(minute).date(), ratio, splits) for minute, ratio in moved):
        return None
    return f"{share}, which no split explains"


def may_be_split(bars: Sequence[Bar], *, since: datetime | None) -> bool:
    """Whether a session that closed after *since* opened far enough from the close before to have been split."""
    return any(
        (since is None or after.closed_at > since)
        and after.split == 1.0
        and not 1 / GAP < after.open / before.close < GAP
        and _day(before) != _day(after)
        for before, after in pairwise(bars)
    )


def with_splits(bars: Sequence[Bar], splits: Sequence[Split]) -> list[Bar]:
    """
    The bars as traded, every split marked on the first bar in new shares, unless the provider marked one there.

    Its price has to show it: what sellers say of a day may be off by one, and a split counted twice falsifies more
    than one not counted. A split in a session whose first bar is not among them leaves no mark.
    """
    marked = list(bars)
    days = [_day(bar) for bar in bars]
    for effective, factor in splits:
        place = next((i for i, day in enumerate(days) if day >= effective), None)
        if place is None or (place == 0 and not (days[0] == effective and _begins_a_session(bars[0]))):
            continue
        if marked[place].split == 1.0 and (place == 0 or _shows(bars[place].open / bars[place - 1].close, factor)):
            marked[place] = replace(marked[place], split=factor)
    return marked


def with_marks(held: Columns, fresh: Sequence[Bar]) -> list[Bar]:
    """*fresh* with the splits that we hold and it does not tell, where the bar is the same."""
    known = {minute: (held.split[i], held.close[i]) for i, minute in enumerate(held.closed) if held.split[i] != 1.0}
    marked = []
    for bar in fresh:
        split, close = known.get(minute_of(bar.closed_at), (1.0, 0.0))
        keeps = bar.split == 1.0 and split != 1.0 and _is_same(bar.close, close, ROUNDED)
        marked.append(replace(bar, split=split) if keeps else bar)
    return marked


def _shows(ratio: float, factor: float) -> bool:
    """Whether a price that moved by *ratio* overnight was rather split by *factor* than not."""
    return abs(ratio * factor - 1) < abs(ratio - 1)


def _is_same(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * abs(other)


def _is_explained(day: date, ratio: float, splits: Sequence[Split]) -> bool:
    """Whether the price of a day moved by the newest of the later splits, or by the newest few."""
    factor = 1.0
    for effective, split in sorted(splits, reverse=True):
        if effective <= day:
            break
        factor *= split
        if _is_same(ratio * factor, 1.0, 2 * ROUNDED):
            return True
    return False


def _day(bar: Bar) -> date:
    return bar.opened_at.astimezone(calendar().zone).date()


def _begins_a_session(bar: Bar) -> bool:
    session = calendar().session_at(bar.opened_at)
    return session is not None and session.opens_at == bar.opened_at


# --- who keeps it -----------------------------------------------------------------------------------------------


class Actions:
    """The splits and dividends that providers told us of, one document a symbol."""

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall

    async def get(self, symbol: str) -> Sequence[CorporateAction]:
        """What is stored, oldest first; nothing where nobody was asked."""
        return _actions(symbol, (await _body(self._documents, ACTIONS, symbol)).get("actions", ()))

    async def keep(self, symbol: str, told: Sequence[CorporateAction]) -> Sequence[CorporateAction]:
        """Store what a provider told: its word on a day counts, and days of which it says nothing are kept."""

        def added(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            rows = {row[0]: row for row in body.get("actions", ())}
            rows |= {str(a.day): [str(a.day), a.split, a.dividend, a.provider] for a in told}
            actions = [rows[day] for day in sorted(rows)]
            if actions == body.get("actions"):
                return None
            return {"symbol": symbol, "actions": actions, "recorded_at": format_instant(self._wall.now())}

        body = await changed(self._documents, self._wall, ACTIONS, symbol, added)
        return _actions(symbol, body["actions"]) if body else await self.get(symbol)


def _actions(symbol: str, rows: Iterable[Sequence[Any]]) -> list[CorporateAction]:
    return [
        CorporateAction(symbol=symbol, day=date.fromisoformat(day), split=split, dividend=dividend, provider=provider)
        for day, split, dividend, provider in rows
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """
    One thing that happened to a series: its history was written again, or another provider goes on with it.

    ``through`` is the close of the last bar that the former provider brought; ``occurred_at`` is market time.
    """

    kind: str
    provider: str
    former: str | None
    revision: int
    through: datetime
    occurred_at: datetime
    recorded_at: datetime
    reason: str
    splits: Sequence[Split] = ()


class Provenance:
    """
    Where the bars of each series come from, one document a series.

    A change is written down before it is made, so none is made unrecorded; one that was recorded and then not made,
    because the process died, is left out by whoever reads and dropped by whoever writes next.
    """

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall

    async def of(self, series: Series) -> Sequence[Change]:
        """What became of the series so far, oldest first."""
        rows = (await _body(self._documents, PROVENANCE, series.key)).get("changes", ())
        return _made([_change(row) for row in rows], series)

    async def record(
        self,
        series: Series,
        *,
        kind: str,
        provider: str,
        revision: int,
        through: datetime,
        occurred_at: datetime,
        reason: str,
        splits: Sequence[Split] = (),
    ) -> None:
        """Write down what is about to become of *series*."""
        change = Change(
            kind=kind,
            provider=provider,
            former=series.provider,
            revision=revision,
            through=through,
            occurred_at=occurred_at,
            recorded_at=self._wall.now(),
            reason=reason,
            splits=splits,
        )

        def added(body: Mapping[str, Any]) -> Mapping[str, Any]:
            made = _made([_change(row) for row in body.get("changes", ())], series)
            return {"series": series.key, "changes": [_row(c) for c in [*made, change][-KEPT:]]}

        await changed(self._documents, self._wall, PROVENANCE, series.key, added)

    async def rounded_through(self, series: Series) -> int:
        """The minute of the last close that another provider brought; -1: there is none."""
        moves = [c for c in await self.of(series) if c.kind == "provider"]
        return minute_of(moves[-1].through) if moves else -1


def _made(changes: Sequence[Change], series: Series) -> list[Change]:
    """The changes that came about, as the series itself shows."""
    made = [c for c in changes if c.revision <= series.revision]
    while (
        last := next((c for c in reversed(made) if c.kind == "provider"), None)
    ) and last.provider != series.provider:
        made.remove(last)
    return made


def _row(c: Change) -> dict[str, Any]:
    return {
        "kind": c.kind,
        "provider": c.provider,
        "former": c.former,
        "revision": c.revision,
        "through": format_instant(c.through),
        "occurred_at": format_instant(c.occurred_at),
        "recorded_at": format_instant(c.recorded_at),
        "reason": c.reason,
        "splits": [[str(day), factor] for day, factor in c.splits],
    }


def _change(row: Mapping[str, Any]) -> Change:
    return Change(
        kind=row["kind"],
        provider=row["provider"],
        former=row["former"],
        revision=row["revision"],
        through=parse_instant(row["through"]),
        occurred_at=parse_instant(row["occurred_at"]),
        recorded_at=parse_instant(row["recorded_at"]),
        reason=row["reason"],
        splits=[(date.fromisoformat(day), factor) for day, factor in row["splits"]],
    )


async def _body(documents: Documents, partition: str, id: str) -> Mapping[str, Any]:
    try:
        return (await documents.read(QUOTA, partition, id)).body
    except NotFoundError:
        return {}
