"""From a provider's rows to bars: what cannot be true is left out and named."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from itertools import pairwise
from math import inf

from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import Adjustment, Bar, Fetched, Interval
from shared.market.sessions import Calendar

JUMP = 1.25
"""Between two sessions a price that moves by this factor may have been split."""


class Rows:
    """
    Gathers the rows of one fetch, oldest first, and makes closed bars of them.

    A row is left out and named when it cannot be true; rows outside the market's sessions are counted in one
    line; a row whose bar has not closed by *now* is no news and is left out unsaid.
    """

    def __init__(self, *, market: Calendar, interval: Interval, now: datetime) -> None:
        self.bars: list[Bar] = []
        self.market = market
        self._interval = interval
        self._now = now
        self._refused: list[str] = []
        self._outside: list[str] = []
        self._split_owed = 1.0

    def add(self, label: str, opening: date | datetime, numbers: Sequence[object], *, split: object = 1.0) -> None:
        """
        Take one row: *numbers* are open, high, low, close, volume as the provider wrote them.

        *opening* is the session's date for a daily bar, and the instant the bar opens otherwise. The split of
        a row that is left out moves on to the next bar, which is the first to be traded in new shares.
        """
        label = _printable(label)
        try:
            span = self._span(label, opening)
            if span is None or span[1] > self._now:
                return
            if self.bars and span[0] <= self.bars[-1].opened_at:
                raise InvalidPayloadError("a second row for the same bar")
            self._split_owed *= _factor(split)
            names = ("open", "high", "low", "close", "volume")
            opened, high, low, close, volume = map(_number, numbers, names)
            bar = Bar(
                opened_at=span[0],
                closed_at=span[1],
                open=opened,
                high=high,
                low=low,
                close=close,
                volume=volume,
                split=self._split_owed,
            )
        except OverflowError:
            self._refused.append(f"{label}: its time is in no calendar")
        except (InvalidPayloadError, ConfigurationError) as e:
            self._refused.append(f"{label}: {e}")
        else:
            self.bars.append(bar)
            self._split_owed = 1.0

    def refuse(self, label: str, why: str) -> None:
        """Name a row that cannot even be read."""
        self._refused.append(f"{_printable(label)}: {why}")

    def may_hide_a_split(self, *, since: datetime | None) -> bool:
        """
        Whether a price that closed after *since* jumped between two sessions, with no split told.

        Without a bar before the jump it cannot be seen.
        """
        for before, after in pairwise(self.bars):
            is_new = since is None or after.closed_at > since
            jumped = after.split == 1.0 and not 1 / JUMP < after.open / before.close < JUMP
            if is_new and jumped and self._day(before) != self._day(after):
                return True
        return False

    def mark_splits(self, splits: Iterable[tuple[date, float]]) -> None:
        """
        Mark splits, told apart from the bars by their effective day, on the bars that were first to trade after them.

        Splits before the first bar are of no concern to these. A fetch that begins in the middle of the
        effective session leaves out the first bar of the new shares, and so the mark.
        """
        days = [self._day(bar) for bar in self.bars]
        for effective, factor in splits:
            place = bisect_left(days, effective)
            if place == len(days) or (place == 0 and (effective < days[0] or not self._begins_a_session())):
                continue
            self.bars[place] = replace(self.bars[place], split=self.bars[place].split * factor)

    def fetched(
        self,
        *,
        symbol: str,
        provider: str,
        adjustment: Adjustment,
        covers_since: datetime | None = None,
        covers_through: datetime | None = None,
    ) -> Fetched:
        """Everything gathered, as the answer of the provider port."""
        refused = list(self._refused)
        if self._outside:
            first, last = self._outside[0], self._outside[-1]
            refused.append(f"{len(self._outside)} rows outside the session, from {first} to {last}")
        return Fetched(
            symbol=symbol,
            interval=self._interval,
            provider=provider,
            adjustment=adjustment,
            bars=tuple(self.bars),
            refused_rows=tuple(refused),
            covers_since=covers_since,
            covers_through=covers_through,
        )

    def _day(self, bar: Bar) -> date:
        return bar.opened_at.astimezone(self.market.zone).date()

    def _begins_a_session(self) -> bool:
        first = self.bars[0].opened_at
        session = self.market.session_at(first)
        return session is not None and session.opens_at == first

    def _span(self, label: str, opening: date | datetime) -> tuple[datetime, datetime] | None:
        if not isinstance(opening, datetime):
            return self.market.bar_of_date(opening)
        if self.market.session_at(opening) is None:
            self._outside.append(label)
            return None
        return opening.astimezone(UTC), self.market.bar_opening_at(self._interval, opening)


def _printable(label: str) -> str:
    # JSON can spell half a surrogate pair, which nothing could store.
    return label[:60].encode("ascii", "backslashreplace").decode()


def _factor(value: object) -> float:
    factor = _number(value, "split")
    if not 0 < factor < inf:
        raise InvalidPayloadError(f"split is {factor}, not a number above 0")
    return factor


def _number(value: object, name: str) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    told = type(value).__name__ if isinstance(value, list | dict) else repr(str(value)[:20])
    raise InvalidPayloadError(f"{name} is {told}, not a number")
