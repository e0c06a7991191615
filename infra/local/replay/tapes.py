"""The recorded series as they stand at one market instant: nothing that closes later can be read here."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import cached_property
from itertools import accumulate
from operator import mul

from infra.local.replay.catalogue import Key, Series
from shared.market.models import Bar, Interval
from shared.market.sessions import EXCHANGE, Session, calendar

_PRETENDED: ContextVar[datetime | None] = ContextVar("pretended", default=None)


class Tape:
    """One series, kept so that cutting it off at an instant is quick."""

    def __init__(self, series: Series) -> None:
        self.series = series
        self.bars = series.bars
        self.zone = calendar(series.calendar).zone
        self.closes = [bar.closed_at for bar in series.bars]
        self.opens = [bar.opened_at for bar in series.bars]
        splits = [bar.split for bar in series.bars]
        self.has_splits = any(split != 1.0 for split in splits)
        self.shares: list[float] = list(accumulate(splits, mul))
        self._texts: dict[object, list[str | None]] = {}

    def local_date(self, place: int) -> date:
        """The session date of a bar."""
        return self.opens[place].astimezone(self.zone).date()

    @cached_property
    def outside(self) -> frozenset[int]:
        """The places of bars that open before or after their session."""
        market = calendar(self.series.calendar)
        hours: dict[date, Session | None] = {}
        places = []
        for place, opened_at in enumerate(self.opens):
            day = self.local_date(place)
            if day not in hours:
                hours[day] = market.session(day)
            session = hours[day]
            if session is None or not session.opens_at <= opened_at < session.closes_at:
                places.append(place)
        return frozenset(places)

    def texts(self, places: Sequence[int], write: Callable[["Tape", int], str]) -> list[str]:
        """These bars as text, newest first; each is written once and kept."""
        kept = self._texts.get(write)
        if kept is None:
            kept = self._texts[write] = [None] * len(self.bars)
        texts = []
        for place in reversed(places):
            text = kept[place]
            if text is None:
                text = kept[place] = write(self, place)
            texts.append(text)
        return texts


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The first ``count`` bars of a tape: those that have closed."""

    tape: Tape
    count: int

    @property
    def last_date(self) -> date:
        """The session date of the newest bar."""
        return self.tape.local_date(self.count - 1)

    @property
    def first_of_last_date(self) -> int:
        """The place of the first bar of the newest session date."""
        day, place = self.last_date, self.count - 1
        while place and self.tape.local_date(place - 1) == day:
            place -= 1
        return place

    def since(self, instant: datetime) -> int:
        """The place of the first bar that opens at or after an instant."""
        return bisect_left(self.tape.opens, instant, 0, self.count)

    def until(self, instant: datetime) -> int:
        """The place behind the last bar that opens at or before an instant."""
        return bisect_right(self.tape.opens, instant, 0, self.count)

    def of_date(self, day: date) -> int | None:
        """The place of the first bar of a session date, or None."""
        try:
            place = self.since(datetime.combine(day, time(), self.tape.zone))
        except OverflowError:
            return None
        return place if place < self.count and self.tape.local_date(place) == day else None

    def divisor(self, place: int) -> float:
        """What a bar's prices are divided by, and its volume multiplied with, for the splits known by now."""
        return self.tape.shares[self.count - 1] / self.tape.shares[place]

    def splits(self) -> list[tuple[date, float]]:
        """Every split so far, newest first."""
        return [
            (self.tape.local_date(place), self.tape.bars[place].split)
            for place in range(self.count - 1, -1, -1)
            if self.tape.has_splits and self.tape.bars[place].split != 1.0
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastDay:
    """The newest trading day so far; ``previous_close`` is in today's shares."""

    date: date
    closed_at: datetime
    open: float
    high: float
    low: float
    price: float
    volume: float
    previous_close: float | None


class Tapes:
    """Every series of a catalogue, seen from the market's now."""

    def __init__(self, catalogue: Mapping[Key, Series], now: Callable[[], datetime]) -> None:
        self._now = now
        self._tapes = {key: Tape(series) for key, series in catalogue.items()}
        self.names: dict[str, str] = {}
        self._calendars = {series.symbol: series.calendar for series in catalogue.values()}
        for series in catalogue.values():
            self.names[series.symbol] = self.names.get(series.symbol) or series.name or series.symbol

    def now(self) -> datetime:
        """The market's now, or the instant that is pretended to be it."""
        return _PRETENDED.get() or self._now()

    @contextmanager
    def at(self, instant: datetime) -> Iterator[None]:
        """Pretend that the market has got only that far."""
        token = _PRETENDED.set(instant)
        try:
            yield
        finally:
            _PRETENDED.reset(token)

    def sessions_ago(self, sessions: int) -> AbstractContextManager[None]:
        """Pretend that it is the close of the session that many before the last one that closed."""
        instant = calendar(EXCHANGE).previous_close(self.now()).closes_at
        for _ in range(sessions):
            instant = calendar(EXCHANGE).previous_close(instant - timedelta(minutes=1)).closes_at
        return self.at(instant)

    def first_at(self, symbol: str) -> datetime | None:
        """When the oldest bar of a symbol that has closed by now opened; None while there is none."""
        views = (self.view(symbol, interval) for interval in Interval)
        return min((view.tape.opens[0] for view in views if view and view.count), default=None)

    def trades_at(self, symbol: str) -> str:
        """The name of the calendar a symbol trades by."""
        return self._calendars[symbol]

    def splits(self, symbol: str) -> list[tuple[date, float]]:
        """Every split of a symbol so far, newest first, from the first of its series that has any bar."""
        views = (self.view(symbol, interval) for interval in Interval)
        view = next((view for view in views if view and view.count), None)
        return view.splits() if view else []

    def knows(self, symbol: str) -> bool:
        """Whether there is any series of a symbol."""
        return symbol in self.names

    def view(self, symbol: str, interval: Interval) -> View | None:
        """A series up to now, or None when there is no such series."""
        tape = self._tapes.get((symbol, interval))
        return View(tape=tape, count=bisect_right(tape.closes, self.now())) if tape else None

    def last_day(self, symbol: str, *, is_over: bool = False) -> LastDay | None:
        """
        The newest trading day of a symbol, from whichever of its series is freshest; None before its first bar.

        With *is_over* the newest whose session has closed.
        """
        views = [view for interval in Interval if (view := self.view(symbol, interval))]
        if is_over:
            views = [self._without_today(view) for view in views]
        views = [view for view in views if view.count]
        if not views:
            return None
        # Of equally fresh ones the first, which is the daily one: its open and volume are the official ones.
        view = max(views, key=lambda one: one.tape.closes[one.count - 1])
        begin = view.first_of_last_date
        bars = view.tape.bars[begin : view.count]
        return LastDay(
            date=view.last_date,
            closed_at=bars[-1].closed_at,
            open=bars[0].open / view.divisor(begin),
            high=max(bar.high / view.divisor(begin + n) for n, bar in enumerate(bars)),
            low=min(bar.low / view.divisor(begin + n) for n, bar in enumerate(bars)),
            price=bars[-1].close,
            volume=sum(bar.volume * view.divisor(begin + n) for n, bar in enumerate(bars)),
            previous_close=view.tape.bars[begin - 1].close / view.divisor(begin - 1) if begin else None,
        )

    def _without_today(self, view: View) -> View:
        if not view.count:
            return view
        session = calendar(view.tape.series.calendar).session(view.last_date)
        if session is None or session.closes_at <= self.now():
            return view
        return View(tape=view.tape, count=view.first_of_last_date)

    def matching(self, text: str) -> list[tuple[str, str, float]]:
        """Symbols and names that hold a text, with how much of them it is, best first."""
        wanted = text.strip().upper()
        found = [
            (symbol, name, max(_likeness(wanted, symbol), _likeness(wanted, name.upper())))
            for symbol, name in self.names.items()
        ]
        return sorted((one for one in found if one[2] > 0), key=lambda one: (-one[2], one[0]))


def quoted_bar(view: View, place: int) -> Bar:
    """A bar in the shares of the view's newest one."""
    bar = view.tape.bars[place]
    by = view.divisor(place)
    if by == 1.0:
        return bar
    return Bar(
        opened_at=bar.opened_at,
        closed_at=bar.closed_at,
        open=bar.open / by,
        high=bar.high / by,
        low=bar.low / by,
        close=bar.close / by,
        volume=bar.volume * by,
    )


def _likeness(wanted: str, text: str) -> float:
    if not wanted or wanted not in text:
        return 0.0
    return 2 * len(wanted) / (len(wanted) + len(text))
