"""What comes next for a delivery, as values with reasons. Pure: it takes *now* and asks nobody."""

from dataclasses import replace
from datetime import datetime, timedelta
from enum import StrEnum

from alerts.models import FINAL, Delivery, Severity, State
from shared.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    PermanentError,
    RateLimitedError,
    TransientError,
)

MOST_ATTEMPTS = 20
FIRST_WAIT = timedelta(seconds=2)
LONGEST_WAIT = timedelta(minutes=10)

REPEATABLE = frozenset({"signalr"})
"""Channels whose receivers drop what they know by its id: sending twice shows once."""


class Step(StrEnum):
    """What to do with a delivery now."""

    SEND = "send"
    GIVE_UP_KNOWING = "give_up_knowing"
    WAIT = "wait"
    NOTHING = "nothing"


def next_step(delivery: Delivery, now: datetime) -> Step:
    """
    Decide from what is stored.

    A SENDING whose lease ran out belonged to a process that died or froze: whether the service took it is
    unknown. It is sent again where a repetition does not show, or where silence would be worse (critical), but
    not for ever: what kills every process that sends it would never end. Otherwise it ends as UNKNOWN.
    """
    if delivery.state in FINAL:
        return Step.NOTHING
    if delivery.state is State.SENDING:
        if delivery.due_at is None or delivery.due_at > now:
            return Step.WAIT
        return Step.SEND if may_repeat(delivery) and delivery.attempts < MOST_ATTEMPTS else Step.GIVE_UP_KNOWING
    if delivery.state is State.RETRY_AT and delivery.due_at is not None and delivery.due_at > now:
        return Step.WAIT
    return Step.SEND


def may_repeat(delivery: Delivery) -> bool:
    """Whether a delivery with an unknown outcome is sent again."""
    return delivery.channel in REPEATABLE or delivery.severity is Severity.CRITICAL


def claimed(delivery: Delivery, token: str, *, until: datetime) -> Delivery:
    """Ours until the lease runs out; the reason tells a reader when it may be a repetition."""
    again = delivery.state is State.SENDING or _is_repeat(delivery)
    return replace(
        delivery,
        state=State.SENDING,
        attempts=delivery.attempts + 1,
        token=token,
        due_at=until,
        reason=_POSSIBLE_REPEAT if again else delivery.reason,
    )


def sent(delivery: Delivery, provider_id: str | None, *, now: datetime) -> Delivery:
    """The service took it."""
    reason = _POSSIBLE_REPEAT if _is_repeat(delivery) else None
    return replace(delivery, state=State.SENT, sent_at=now, provider_id=provider_id, reason=reason, due_at=None)


def unknown(delivery: Delivery, reason: str) -> Delivery:
    """It may have been taken; it is not sent again."""
    return replace(delivery, state=State.UNKNOWN, reason=reason, due_at=None)


def failed(delivery: Delivery, error: Exception, *, now: datetime) -> Delivery:
    """What a failed attempt leads to."""
    reason = _carried(delivery, f"{type(error).__name__}: {error}")
    match error:
        case OutcomeUnknownError() if may_repeat(delivery) and delivery.attempts < MOST_ATTEMPTS:
            return _again(delivery, _POSSIBLE_REPEAT, now + backoff(delivery.attempts))
        case OutcomeUnknownError():
            return unknown(delivery, reason)
        case RateLimitedError():
            # Being asked to wait is no failure: it never ends a delivery, so it does not count as an attempt.
            wait = error.retry_after or backoff(delivery.attempts)
            return _again(replace(delivery, attempts=delivery.attempts - 1), reason, now + wait)
        case TransientError() if delivery.attempts < MOST_ATTEMPTS:
            return _again(delivery, reason, now + (error.retry_after or backoff(delivery.attempts)))
        case ConfigurationError() if delivery.attempts < MOST_ATTEMPTS:
            return _again(delivery, reason, now + backoff(delivery.attempts))
        case TransientError() | PermanentError() | ConfigurationError():
            return replace(delivery, state=State.DEAD, reason=reason, due_at=None)
        case _:
            trouble = f"unexpected trouble ({type(error).__name__}): the log has it"
            return unknown(delivery, _carried(delivery, trouble))


def backoff(attempts: int) -> timedelta:
    """How long to wait after so many attempts: doubling from 2 s to 10 min."""
    doublings = max(0, min(attempts - 1, 12))
    return min(FIRST_WAIT * (1 << doublings), LONGEST_WAIT)


_POSSIBLE_REPEAT = "possible repeat: an earlier attempt ended without an answer"


def _is_repeat(delivery: Delivery) -> bool:
    return delivery.reason is not None and delivery.reason.startswith(_POSSIBLE_REPEAT)


def _carried(delivery: Delivery, reason: str) -> str:
    """The reason of a failure; once a delivery may have been sent, every later reason says so too."""
    return f"{_POSSIBLE_REPEAT}; {reason}" if _is_repeat(delivery) else reason


def _again(delivery: Delivery, reason: str, at: datetime) -> Delivery:
    return replace(delivery, state=State.RETRY_AT, reason=reason, due_at=at)
