"""
What each provider allows on each plan (facts: documented limits, read 2026-11; providers change them at will).

Alpha Vantage: 25 a day and 1 a second on free keys, up to 1,200 a minute on premium ones. Finnhub: 60 a minute on
free keys, 300 on paid ones, never more than 30 a second.
"""

from dataclasses import dataclass
from datetime import timedelta

from shared.settings import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """At most *amount* calls within any *span*."""

    amount: int
    span: timedelta


SECOND, MINUTE, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)

WINDOWS: dict[tuple[str, Plan], tuple[Window, ...]] = {
    ("alpha_vantage", "free"): (Window(amount=1, span=SECOND), Window(amount=25, span=DAY)),
    ("alpha_vantage", "premium"): (Window(amount=1200, span=MINUTE),),
    ("alpha_vantage", "unlimited"): (),
    ("finnhub", "free"): (Window(amount=30, span=SECOND), Window(amount=60, span=MINUTE)),
    ("finnhub", "premium"): (Window(amount=30, span=SECOND), Window(amount=300, span=MINUTE)),
    ("finnhub", "unlimited"): (),
}


def windows_of(provider: str, plan: Plan) -> tuple[Window, ...]:
    """The windows that hold at once for calls to *provider*; none means no limit."""
    return WINDOWS[provider, plan]
