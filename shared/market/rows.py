"""From a provider's rows to bars: what cannot be true is left out and named."""

from collections.abc import Sequence
from datetime import UTC, date, datetime
from math import inf

from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market.models import Adjustment, Bar, Fetched, Interval
from shared.market.sessions import Calendar


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
        except (InvalidPayloadError, ConfigurationError) as e:
            self._refused.append(f"{label}: {e}")
        else:
            self.bars.append(bar)
            self._split_owed = 1.0

    def refuse(self, label: str, why: str) -> None:
        """Name a row that cannot even be read."""
        self._refused.append(f"{label}: {why}")

    def fetched(self, *, symbol: str, provider: str, adjustment: Adjustment) -> Fetched:
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
        )

    def _span(self, label: str, opening: date | datetime) -> tuple[datetime, datetime] | None:
        if not isinstance(opening, datetime):
            return self.market.bar_of_date(opening)
        if self.market.session_at(opening) is None:
            self._outside.append(label)
            return None
        return opening.astimezone(UTC), self.market.bar_opening_at(self._interval, opening)


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
    raise InvalidPayloadError(f"{name} is {str(value)[:20]!r}, not a number")
