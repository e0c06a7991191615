"""
Who hears what. Pure.

Rules about bars are told by bars alone: whether one fires at a bar follows from the ``BACK`` values up to it (and the
bars that these are made of), never from what was told before, so any order of events and any cut of the bars gives
the same. A rule latches: it *fires* where its value reaches the level, stays silent while the value stays there or
inside the hysteresis, and *resets* where the value lies beyond the hysteresis; only then can it fire again. It never
fires at the first value there is, because nobody saw it get there. What lies further back than ``BACK`` values is
forgotten: a rule that was inside its hysteresis all that time counts as reset.

Prices are compared as they were quoted at the judged bar: earlier ones are divided by the splits since, volumes
multiplied.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import overload, override

from alerts.subscriptions import Crossing, Kind, Listener, Match, Subscription
from shared.market.models import Columns, instant_of, minute_of
from signals.events import SignalRaised

BACK = 128
"""Values that a rule looks back for when it last fired or reset: two pages of stored bars."""
WINDOW = {Kind.MOVE: 1, Kind.VOLUME: 20}
"""Bars that a move is measured over, and that the usual volume is the mean of, unless the subscription says so."""
SAME = 1e-9
"""Numbers closer than this, relatively, are the same."""
UP, DOWN = "long", "short"


class Audience(Sequence[Listener]):
    """Listeners, indexed once by what they listen to, so that a signal meets only those who may hear it."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)
        self._signals: dict[str | None, list[tuple[Listener, Subscription]]] = {}
        self._bars: dict[tuple[str | None, str | None], list[tuple[Listener, Subscription]]] = {}
        for listener in self._listeners:
            for asked in listener.subscriptions:
                for symbol in asked.symbols if asked.symbols is not None else (None,):
                    if asked.kind is Kind.SIGNAL:
                        self._signals.setdefault(symbol, []).append((listener, asked))
                    else:
                        self._bars.setdefault((symbol, asked.interval), []).append((listener, asked))

    @overload
    def __getitem__(self, index: int) -> Listener: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Listener, ...]: ...
    @override
    def __getitem__(self, index: int | slice) -> Listener | tuple[Listener, ...]:
        return self._listeners[index]

    @override
    def __len__(self) -> int:
        return len(self._listeners)

    @override
    def __iter__(self) -> Iterator[Listener]:
        return iter(self._listeners)

    def of_signals(self, symbol: str) -> Iterator[tuple[Listener, Subscription]]:
        """Subscriptions to signals of *symbol* or of all."""
        yield from self._signals.get(symbol, ())
        yield from self._signals.get(None, ())

    def of_bars(self, symbol: str, interval: str) -> list[tuple[Listener, Subscription]]:
        """Rules about bars of this series, in no promised order."""
        names = ((s, i) for s in (symbol, None) for i in (interval, None))
        return [pair for name in names for pair in self._bars.get(name, ())]


def heard_signal(signal: SignalRaised, listeners: Sequence[Listener]) -> dict[str, list[Match]]:
    """The subscriptions that a signal matches, by subscriber; a subscriber hears it once, on all channels together."""
    audience = listeners if isinstance(listeners, Audience) else Audience(listeners)
    found: dict[str, list[Match]] = {}
    for listener, asked in audience.of_signals(signal.symbol):
        if wants(signal, asked):
            match = Match(subscription=asked, symbol=signal.symbol, entry=signal.entry, reason=_why(signal, asked))
            found.setdefault(listener.subscriber, []).append(match)
    return found


def wants(signal: SignalRaised, asked: Subscription) -> bool:
    """
    Whether the subscription asks for this signal.

    Where a confidence is asked for, a signal of which none is known (its entry has too few outcomes) is not meant.
    """
    return (
        asked.kind is Kind.SIGNAL
        and (asked.symbols is None or signal.symbol in asked.symbols)
        and (asked.entries is None or signal.entry in asked.entries)
        and (asked.directions is None or signal.direction in asked.directions)
        and (asked.interval is None or signal.interval == asked.interval)
        and (asked.since is None or signal.occurred_at >= asked.since)
        and signal.strength >= asked.min_strength
        and (asked.min_confidence is None or _reaches(_confidence(signal), asked.min_confidence))
    )


def bars_needed(asked: Subscription) -> int:
    """How many bars, the judged one among them, decide what a rule says of a bar; fewer only where a series begins."""
    return BACK + _window(asked) + 1


def heard_bars(asked: Subscription, columns: Columns, *, after: datetime | None = None) -> list[Crossing]:
    """
    Where a rule about bars fired or went back at bars closed later than *after* (None: at any).

    The same for every cut of a series that begins ``bars_needed`` before the first bar asked about, or where the
    series begins. A resolve whose firing lies further back is not told: nobody could say what it resolves.
    """
    lines = _lines(asked)
    found = [
        crossing
        for i in range(_first_asked(asked, columns, after), len(columns))
        for line in lines
        if (crossing := _crossing(line, columns, i))
    ]
    return [crossing for crossing in found if asked.resolves or not crossing.is_resolve]


def _first_asked(asked: Subscription, columns: Columns, after: datetime | None) -> int:
    """The first bar that closed behind *after* and not before the subscription was made."""
    first = 0 if after is None else bisect_right(columns.closed, minute_of(after))
    if asked.since is None:
        return first
    return max(first, bisect_right(columns.closed, minute_of(asked.since - timedelta.resolution)))


# --- a rule as lines that a value reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """
    A level with the side on which it is reached, and the value that is held against it.

    ``value(columns, j, factor)`` is the value at bar *j* in the terms of a bar before which the splits *factor* came;
    None where there is none.
    """

    level: float
    is_above: bool
    direction: str
    hysteresis: float
    value: Callable[[Columns, int, float], float | None]
    says: Callable[[float], str]

    def is_reached(self, value: float) -> bool:
        return _reaches(value, self.level) if self.is_above else _reaches(-value, -self.level)

    def is_reset(self, value: float) -> bool:
        away = self.hysteresis * abs(self.level)
        if self.is_above:
            return not _reaches(value, self.level - away)
        return not _reaches(-value, -(self.level + away))


def _lines(asked: Subscription) -> list[_Line]:
    match asked.kind:
        case Kind.PRICE:
            return _price_lines(asked)
        case Kind.MOVE:
            return _move_lines(asked)
        case Kind.VOLUME:
            return _volume_lines(asked)
        case Kind.SIGNAL:
            return []


def _price_lines(asked: Subscription) -> list[_Line]:
    def close(columns: Columns, j: int, factor: float) -> float:
        return columns.close[j] / factor

    def line(level: float, *, is_above: bool) -> _Line:
        side = "at or above" if is_above else "at or below"
        return _Line(
            level=level,
            is_above=is_above,
            direction=UP if is_above else DOWN,
            hysteresis=asked.hysteresis,
            value=close,
            says=lambda value: f"close {value:g}, asked for is {side} {level:g}",
        )

    above = [] if asked.price_above is None else [line(asked.price_above, is_above=True)]
    below = [] if asked.price_below is None else [line(asked.price_below, is_above=False)]
    return above + below


def _move_lines(asked: Subscription) -> list[_Line]:
    bars = _window(asked)
    percent = asked.percent or math.inf

    def move(columns: Columns, j: int, _: float) -> float | None:
        if j < bars:
            return None
        before = columns.close[j - bars] / math.prod(columns.split[j - bars + 1 : j + 1])
        return (columns.close[j] / before - 1) * 100

    over = "1 bar" if bars == 1 else f"{bars} bars"
    return [
        _Line(
            level=percent if is_up else -percent,
            is_above=is_up,
            direction=UP if is_up else DOWN,
            hysteresis=asked.hysteresis,
            value=move,
            says=lambda value: f"the close moved {value:+.2f} % over {over}, asked for is {percent:g} %",
        )
        for is_up in (True, False)
        if asked.directions is None or (UP if is_up else DOWN) in asked.directions
    ]


def _volume_lines(asked: Subscription) -> list[_Line]:
    bars = _window(asked)
    times = asked.times_usual or math.inf

    def share(columns: Columns, j: int, _: float) -> float | None:
        if j < bars:
            return None
        factor, total = 1.0, 0.0
        for k in range(j - 1, j - bars - 1, -1):
            factor *= columns.split[k + 1]
            total += columns.volume[k] * factor
        return columns.volume[j] * bars / total if total > 0 else None

    return [
        _Line(
            level=times,
            is_above=True,
            direction="",
            hysteresis=asked.hysteresis,
            value=share,
            says=lambda value: f"the volume is {value:.2f} times the mean of {bars} bars, asked for is {times:g}",
        )
    ]


def _crossing(line: _Line, columns: Columns, i: int) -> Crossing | None:
    """What a line says of bar *i*, if it fired or reset there."""
    value = line.value(columns, i, 1.0)
    if value is None:
        return None
    closed_at = instant_of(columns.closed[i])
    direction = line.direction or (UP if columns.close[i] >= columns.open[i] else DOWN)
    if line.is_reached(value):
        if _was_reached(line, columns, i) is not False:
            return None
        return Crossing(
            closed_at=closed_at, value=value, reason=line.says(value), direction=direction, fired_at=closed_at
        )
    if line.is_reset(value) and _was_reached(line, columns, i) and (fired := _fired(line, columns, i)) is not None:
        return Crossing(
            closed_at=closed_at,
            value=value,
            reason=f"no longer: {line.says(value)}",
            direction=direction,
            fired_at=instant_of(columns.closed[fired]),
            is_resolve=True,
        )
    return None


def _before(line: _Line, columns: Columns, i: int) -> Iterator[tuple[int, float]]:
    """The values before bar *i* that count, newest first, in the terms of bar *i*."""
    factor = 1.0
    for j in range(i - 1, max(-1, i - BACK - 1), -1):
        factor *= columns.split[j + 1]
        value = line.value(columns, j, factor)
        if value is not None:
            yield j, value


def _was_reached(line: _Line, columns: Columns, i: int) -> bool | None:
    """Whether the line was latched before bar *i*; None where there was no value yet."""
    latched: bool | None = None
    for _, value in _before(line, columns, i):
        if line.is_reached(value):
            return True
        if line.is_reset(value):
            return False
        latched = False
    return latched


def _fired(line: _Line, columns: Columns, i: int) -> int | None:
    """The bar at which a line that is latched before bar *i* fired; None if that lies too far back, or nowhere."""
    fired: int | None = None
    for j, value in _before(line, columns, i):
        if line.is_reached(value):
            fired = j
        elif line.is_reset(value):
            return fired
    return None


def _window(asked: Subscription) -> int:
    return asked.window or WINDOW.get(asked.kind, 0)


def _reaches(value: float | None, level: float) -> bool:
    return value is not None and value >= level - SAME * abs(level)


def _confidence(signal: SignalRaised) -> float | None:
    known: float | None = getattr(signal, "confidence", None)
    return known


def _why(signal: SignalRaised, asked: Subscription) -> str:
    """What made it match, in words."""
    named = [
        "all symbols" if asked.symbols is None else signal.symbol,
        "all entries" if asked.entries is None else signal.entry,
        *([] if asked.directions is None else [signal.direction]),
        *([f"strength {signal.strength:.2f} of at least {asked.min_strength:.2f}"] if asked.min_strength else []),
        *(
            []
            if asked.min_confidence is None
            else [f"confidence {_confidence(signal):.2f} of at least {asked.min_confidence:.2f}"]
        ),
    ]
    return f"asked for: {', '.join(named)}"
