"""What a month costs, from what one event costs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from infra.cost.scenario import Measured

SESSIONS = 21
"""Exchange sessions a month."""
SYMBOLS = (10, 1_000, 100_000)
SUBSCRIBERS = (100, 10_000, 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What cannot be counted: how people behave and what a unit costs."""

    price: float = 0.25
    """US dollars a million request units (serverless; look at your region's price)."""
    followed: int = 10
    """Symbols a subscriber follows."""
    reads: int = 60
    """API lists a subscriber reads a month."""
    minutes_between_ticks: float = 0.25
    """How often every timer fires; the quickest default, though most fire half as often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Month:
    """Request units of a month by what causes them."""

    symbols: int
    subscribers: int
    bars: float
    signals: float
    alerts: float
    posts: float
    reads: float
    timers: float

    @property
    def units(self) -> float:
        return self.bars + self.signals + self.alerts + self.posts + self.reads + self.timers


def month(measured: Measured, symbols: int, subscribers: int, a: Assumptions) -> Month:
    """The month of so many daily symbols and subscribers; the public subscriber hears every symbol."""
    units = {name: cost.units_each for name, cost in measured.costs.items()}
    bars = symbols * SESSIONS
    signals = bars * measured.signals / measured.bars
    heard = signals + subscribers * min(a.followed, symbols) * SESSIONS * measured.signals / measured.bars
    reads = (units["GET alerts (50)"] + units["GET signals (50)"] + units["GET posts (50)"]) / 3
    return Month(
        symbols=symbols,
        subscribers=subscribers,
        bars=bars * units["bar without a signal"],
        signals=signals
        * (units["bar with a signal"] + units["bar with an outcome"] - 2 * units["bar without a signal"]),
        alerts=heard * units["alert on two channels"],
        posts=signals * units["post"] + SESSIONS * units["digest of a session"],
        reads=subscribers * a.reads * reads,
        timers=30 * 24 * 60 / a.minutes_between_ticks * units["all timers once, nothing to do"],
    )


def report(measured: Measured, a: Assumptions) -> str:
    """Both tables as Markdown."""
    counted = (
        f"Counted on {measured.bars:,} daily bars with {measured.signals} signals. A bar holds one lease of the "
        "throttle (container quota) and one look at the watchlist file's version (container system); the slot query "
        "(due series) is counted with the timers, because one answers for every series."
    )
    month_of = (
        f"A month has {SESSIONS} sessions; a subscriber follows {a.followed} symbols on two channels and reads "
        f"{a.reads} lists; timers fire every {a.minutes_between_ticks:g} min; a million RU cost {a.price:.2f} USD. "
        "Columns are million RU."
    )
    head = ("symbols", "subscribers", "bars", "signals", "alerts", "posts", "reads", "timers", "sum", "USD")
    lines = [counted, "", *_table(("what", "RU", "operations"), _events(measured)), "", month_of, ""]
    return "\n".join([*lines, *_table(head, _months(measured, a))])


def _events(measured: Measured) -> Iterable[tuple[str, ...]]:
    for name, cost in measured.costs.items():
        shown = ", ".join(f"{n:.2g} {what}" for what, n in cost.each.items() if n >= 0.01)
        yield name, f"{cost.units_each:,.0f}", shown


def _months(measured: Measured, a: Assumptions) -> Iterable[tuple[str, ...]]:
    for symbols in SYMBOLS:
        for subscribers in SUBSCRIBERS:
            m = month(measured, symbols, subscribers, a)
            millions = [f"{part / 1e6:,.1f}" for part in (m.bars, m.signals, m.alerts, m.posts, m.reads, m.timers)]
            dollars = f"{m.units / 1e6 * a.price:,.2f}"
            yield f"{symbols:,}", f"{subscribers:,}", *millions, f"{m.units / 1e6:,.1f}", dollars


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [_row(head), _row(tuple("---" for _ in head)), *(_row(row) for row in rows)]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def recorded_operations(measured: Measured) -> Mapping[str, Mapping[str, float]]:
    """Operations a time by event, rounded: what the test holds still."""
    return {
        name: {what: round(n, 2) for what, n in cost.each.items() if n >= 0.01} for name, cost in measured.costs.items()
    }
