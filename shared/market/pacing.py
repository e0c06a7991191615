"""When the next call may leave, by every window at once. Pure."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from shared.market.registry import Window

SPACED = timedelta(minutes=1)
"""Windows up to this long are kept by spacing calls evenly; for longer ones the last calls are remembered."""
GUARD = 1.05
"""Calls travel with jitter: spacing them a little wider keeps two from meeting in one of the provider's windows."""

LATE = timedelta(seconds=1)
"""For the same reason a long window is taken to last a little longer."""


def spacing(windows: Sequence[Window]) -> timedelta:
    """The least time between two calls that keeps every short window, wherever the provider lets it begin."""
    short = [w.span / w.amount for w in windows if w.span <= SPACED]
    return max(short, default=timedelta()) * GUARD


def remembered(windows: Sequence[Window]) -> int:
    """How many of the instants reserved last must be known to keep every window."""
    return max((w.amount for w in windows if w.span > SPACED), default=1)


def next_permit(windows: Sequence[Window], *, now: datetime, recent: Sequence[datetime]) -> datetime:
    """
    Say when one more call may leave; *recent* are the instants reserved last, oldest first.

    Long windows roll: a provider that does not document when its day begins may let it begin at any call.
    """
    instant = now
    if recent:
        instant = max(instant, recent[-1] + spacing(windows))
    for window in windows:
        if window.span > SPACED and len(recent) >= window.amount:
            instant = max(instant, recent[-window.amount] + window.span + LATE)
    return instant
