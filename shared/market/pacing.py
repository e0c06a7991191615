"""When the next call may leave, by every window at once. Pure."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from shared.market.registry import Window

SPACED = timedelta(minutes=1)
"""Windows up to this long are kept by spacing calls evenly; longer ones are counted from their first use."""
GUARD = 1.05
"""Calls travel with jitter: spacing them a little wider keeps two from meeting in one of the provider's windows."""


def spacing(windows: Sequence[Window]) -> timedelta:
    """The least time between two calls that keeps every short window, wherever the provider lets it begin."""
    short = [w.span / w.amount for w in windows if w.span <= SPACED]
    return max(short, default=timedelta()) * GUARD


def next_permit(
    windows: Sequence[Window],
    *,
    now: datetime,
    last: datetime | None,
    opened_at: datetime | None,
    used: int,
) -> tuple[datetime, datetime, int]:
    """
    Reserve the instant of one more call: (instant, when the long window opened, calls used in it).

    *last* is the instant reserved before; *opened_at* and *used* tell about the long window (rolling from its
    first use, which is what a provider that does not document its reset allows us to assume).
    """
    instant = now if last is None else max(now, last + spacing(windows))
    long = [w for w in windows if w.span > SPACED]
    if not long:
        return instant, opened_at or instant, used + 1
    window = min(long, key=lambda w: w.amount)
    if opened_at is None or instant >= opened_at + window.span:
        return instant, instant, 1
    if used < window.amount:
        return instant, opened_at, used + 1
    fresh = opened_at + window.span
    return fresh, fresh, 1
