"""
When companies report, and which looks at the market that makes due.

On the day of a report its symbol gets a slot more than the session table gives it: shortly after the open for a
report before it, shortly after the close for a later one. A report that is told us while it comes out makes that
slot due at once. A slot hangs on the due instant of the symbol's quote, which only the ingest writes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Documents
from shared.errors import NotFoundError
from shared.market.conditional import QUOTA, changed
from shared.market.events import EarningsReported
from shared.market.models import EarningsDate, ReportTime
from shared.market.sessions import calendar

PARTITION, CALENDAR = "earnings", "calendar"
"""One document a symbol, and one, in small letters as no symbol is, of the day whose calendar was fetched."""

AFTER_OPEN = timedelta(minutes=5)
"""How long after the open the market has found its first prices."""
AFTER_CLOSE = timedelta(minutes=30)
"""How long after the close most of those have reported who report then."""
NEWS = timedelta(days=7)
"""A report of a day further away than this is no news of now."""
AGAIN = timedelta(minutes=1)
"""The calendar is asked for no more often (wall), however fast the market's clock runs, and however often it fails."""
KEPT = 12
"""How many reports and slots of a symbol are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A market instant from which a look is due because of the report of ``day``; ``event`` told us that it is out."""

    day: date
    at: datetime
    event: str | None = None
    is_done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Diary:
    """What is known of one company's reports, and the slots they make."""

    symbol: str
    reports: Sequence[EarningsDate] = ()
    slots: Sequence[Slot] = ()

    def is_due(self, now: datetime) -> bool:
        """Whether a slot is to be served now; one that was slept through still is."""
        return any(s.at <= now for s in self.slots if not s.is_done)

    def next_after(self, now: datetime) -> datetime | None:
        """The next slot to come."""
        return min((s.at for s in self.slots if not s.is_done and s.at > now), default=None)


def slots_of(day: date, time: ReportTime) -> list[datetime]:
    """The market instants at which the report of a day is looked for; where nobody knows its time there are two."""
    market = calendar()
    session = market.session(day)
    if session is None:  # a report on a day without trade moves the next open
        following = market.next_close(market.sessions(day - NEWS, day)[-1].closes_at)
        return [following.opens_at + AFTER_OPEN]
    found = []
    if time in (ReportTime.BEFORE_OPEN, ReportTime.UNKNOWN):
        found.append(session.opens_at + AFTER_OPEN)
    if time is not ReportTime.BEFORE_OPEN:
        found.append(session.closes_at + AFTER_CLOSE)
    return found


def planned(slots: Iterable[Slot], reports: Iterable[EarningsDate], *, first: date, last: date) -> list[Slot]:
    """
    *slots* as the calendar of [first, last] has them now, the earliest first.

    Slots that were served stay, and so do those of a report that is out already.
    """
    kept = [s for s in slots if s.is_done or s.event or not first <= s.day <= last]
    out = {s.day for s in kept if s.event}
    known = {(s.day, s.at) for s in kept}
    new = [Slot(day=r.day, at=at) for r in reports if r.day not in out for at in slots_of(r.day, r.time)]
    return sorted([*kept, *(s for s in new if (s.day, s.at) not in known)], key=lambda s: s.at)[-KEPT:]


def told(slots: Sequence[Slot], *, day: date, at: datetime, event: str) -> list[Slot]:
    """*slots* once an event said at market instant *at* that the report of *day* is out: told twice it is told once."""
    if any(s.event == event for s in slots):
        return list(slots)
    waiting = [s for s in slots if s.day == day and not s.is_done]
    out = [replace(s, at=min(s.at, at), event=event) for s in waiting] or [Slot(day=day, at=at, event=event)]
    return sorted([*(s for s in slots if s not in waiting), *out], key=lambda s: s.at)[-KEPT:]


class Earnings:
    """The stored earnings calendar of the symbols we watch."""

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall
        self._day: date | None = None
        self._rests_until: datetime | None = None

    async def get(self, symbol: str) -> Diary | None:
        """What is known of a symbol; None: no report."""
        try:
            return _diary((await self._documents.read(QUOTA, PARTITION, symbol)).body)
        except NotFoundError:
            return None

    async def is_wanted(self, day: date) -> bool:
        """Whether the calendar of market day *day* is still to be fetched; storage is asked once a day and process."""
        now = self._wall.now()
        if (self._day is not None and self._day >= day) or (self._rests_until and now < self._rests_until):
            return False
        try:
            body = (await self._documents.read(QUOTA, PARTITION, CALENDAR)).body
        except NotFoundError:
            return True
        if (known := date.fromisoformat(body["day"])) >= day:
            self._day = known
            return False
        self._rests_until = parse_instant(body["recorded_at"]) + AGAIN
        return now >= self._rests_until

    def rest(self) -> None:
        """It could not be fetched: not again at once."""
        self._rests_until = self._wall.now() + AGAIN

    async def fetched(self, day: date) -> None:
        """The calendar of market day *day* is stored."""
        self.rest()

        def newer(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            is_known = bool(body) and date.fromisoformat(body["day"]) >= day
            return None if is_known else {"day": str(day), "recorded_at": format_instant(self._wall.now())}

        await changed(self._documents, self._wall, PARTITION, CALENDAR, newer)
        self._day = day

    async def plan(self, symbol: str, reports: Sequence[EarningsDate], *, first: date, last: date) -> Diary:
        """Keep what the calendar of [first, last] says of a symbol."""

        def change(known: Diary) -> Diary:
            days = {r.day: r for r in known.reports if not first <= r.day <= last} | {r.day: r for r in reports}
            slots = planned(known.slots, reports, first=first, last=last)
            return replace(known, reports=[days[day] for day in sorted(days)][-KEPT:], slots=slots)

        return await self._change(symbol, change)

    async def reported(self, event: EarningsReported, *, now: datetime) -> Diary:
        """A report is out: keep it, and make its slot due; no slot for one that is no news at market instant *now*."""
        report = EarningsDate(
            symbol=event.symbol,
            day=event.day,
            time=ReportTime.UNKNOWN,
            eps_estimate=event.eps_estimate,
            eps_actual=event.eps_actual,
            revenue_estimate=event.revenue_estimate,
            revenue_actual=event.revenue_actual,
            provider=event.provider,
        )

        def change(known: Diary) -> Diary:
            days = {r.day: r for r in known.reports}
            time = days[event.day].time if event.day in days else ReportTime.UNKNOWN
            days[event.day] = replace(report, time=time)
            is_news = abs(event.day - now.date()) <= NEWS
            slots = told(known.slots, day=event.day, at=event.occurred_at, event=event.event_id)
            return replace(
                known,
                reports=[days[day] for day in sorted(days)][-KEPT:],
                slots=slots if is_news else known.slots,
            )

        return await self._change(event.symbol, change)

    async def served(self, symbol: str, now: datetime) -> Diary:
        """The slots of a symbol that were due by market instant *now* are done."""
        return await self._change(
            symbol,
            lambda known: replace(known, slots=[replace(s, is_done=True) if s.at <= now else s for s in known.slots]),
        )

    async def _change(self, symbol: str, change: "_Change") -> Diary:
        found = Diary(symbol=symbol)

        def changing(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            nonlocal found
            known = _diary(body) if body else Diary(symbol=symbol)
            found = change(known)
            new = _diary_body(found)
            return None if new == body or not (body or found.reports or found.slots) else new

        await changed(self._documents, self._wall, PARTITION, symbol, changing)
        return found


type _Change = Callable[[Diary], Diary]


def _diary_body(d: Diary) -> dict[str, Any]:
    return {
        "symbol": d.symbol,
        "reports": [
            {
                "day": str(r.day),
                "time": r.time,
                "eps_estimate": r.eps_estimate,
                "eps_actual": r.eps_actual,
                "revenue_estimate": r.revenue_estimate,
                "revenue_actual": r.revenue_actual,
                "provider": r.provider,
            }
            for r in d.reports
        ],
        "slots": [
            {"day": str(s.day), "at": format_instant(s.at), "event": s.event, "is_done": s.is_done} for s in d.slots
        ],
    }


def _diary(body: Mapping[str, Any]) -> Diary:
    symbol = body["symbol"]
    return Diary(
        symbol=symbol,
        reports=[
            EarningsDate(**{**r, "symbol": symbol, "day": date.fromisoformat(r["day"]), "time": ReportTime(r["time"])})
            for r in body["reports"]
        ],
        slots=[
            Slot(day=date.fromisoformat(s["day"]), at=parse_instant(s["at"]), event=s["event"], is_done=s["is_done"])
            for s in body["slots"]
        ],
    )
