"""
When a channel's service is left alone for a while. Pure.

After a few failures in a row nobody asks it any more; when the pause is over one delivery is the probe, and what
becomes of it decides. So an outage costs a handful of requests, whatever waits.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

MOST_FAILURES = 5
FIRST_PAUSE = timedelta(seconds=10)
LONGEST_PAUSE = timedelta(minutes=5)
PROBE = timedelta(seconds=15)
"""How long a probe may take before somebody else may try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """What is known of a channel's service: failures in a row, and until when it is left alone."""

    channel: str
    failures: int = 0
    pauses: int = 0
    paused_until: datetime | None = None
    is_probed: bool = False
    reason: str | None = None


def probed(breaker: Breaker, now: datetime) -> Breaker:
    """One delivery tries; nobody else does until it has had the time to end."""
    return replace(breaker, paused_until=now + PROBE, is_probed=True)


def failed(breaker: Breaker, reason: str, now: datetime) -> Breaker:
    """One more failure in a row; from the fifth on the service is left alone, longer each time a probe fails."""
    after = replace(breaker, failures=breaker.failures + 1, reason=reason)
    is_late = breaker.paused_until is not None and breaker.paused_until > now and not breaker.is_probed
    if after.failures < MOST_FAILURES or is_late:  # late: it was under way when the pause began
        return after
    pause = min(FIRST_PAUSE * (1 << min(breaker.pauses, 10)), LONGEST_PAUSE)
    return replace(after, pauses=breaker.pauses + 1, paused_until=now + pause, is_probed=False)
