"""When an endpoint is given up. Pure."""

from dataclasses import replace
from datetime import datetime, timedelta

from alerts.subscriptions import Endpoint

SUSTAINED_FAILURES = 10
SUSTAINED_FOR = timedelta(days=1)
"""An endpoint that failed so often over so long, and took nothing in between, is disabled."""
COUNTED_EVERY = timedelta(minutes=1)
"""Failures nearer together count as one: an outage with thousands pending is one trouble."""


def counts(endpoint: Endpoint, now: datetime, *, is_gone: bool) -> bool:
    """Whether a failure now says anything new of an endpoint."""
    if not endpoint.is_enabled:
        return False
    return is_gone or endpoint.last_failed_at is None or abs(now - endpoint.last_failed_at) >= COUNTED_EVERY


def failed(endpoint: Endpoint, reason: str, now: datetime, *, is_gone: bool) -> Endpoint:
    """An endpoint after a failure; disabled when it is gone, or failed for long enough and often enough."""
    first = endpoint.first_failed_at or now
    worse = replace(endpoint, failures=endpoint.failures + 1, first_failed_at=first, last_failed_at=now)
    if is_gone:
        return replace(worse, is_enabled=False, disabled_reason=reason)
    if worse.failures >= SUSTAINED_FAILURES and now - first >= SUSTAINED_FOR:
        hours = (now - first) // timedelta(hours=1)
        why = f"{worse.failures} attempts in {hours} hours failed and none arrived, the last: {reason}"
        return replace(worse, is_enabled=False, disabled_reason=why)
    return worse


def worked(endpoint: Endpoint) -> Endpoint:
    """An endpoint that took a message."""
    return replace(endpoint, failures=0, first_failed_at=None, last_failed_at=None)
