"""What comes next for a delivery, as values with reasons. Pure: it takes *now* and asks nobody."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from enum import StrEnum
from zlib import crc32

from alerts.models import Attempt, Decision, Delivery, Severity, State
from shared.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    PermanentError,
    RateLimitedError,
    RecipientGoneError,
    TransientError,
)

MOST_ATTEMPTS = 20
GIVEN_UP_AFTER = timedelta(days=1)
"""What surely was not sent is tried for a day at least, however many attempts that takes."""
MOST_LOGGED = 20
FIRST_WAIT = timedelta(seconds=2)
LONGEST_WAIT = timedelta(minutes=10)

_UNSENT = frozenset({State.EXPIRED, State.SUPPRESSED, State.DISABLED, State.UNKNOWN})
EDGES: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.CLAIMED, State.PENDING}) | _UNSENT,
    State.CLAIMED: frozenset({State.SENDING, State.PENDING}) | _UNSENT,
    State.SENDING: frozenset({State.SENT, State.RETRY_AT, State.UNKNOWN, State.DEAD, State.EXPIRED}),
    State.RETRY_AT: frozenset({State.CLAIMED, State.RETRY_AT}) | _UNSENT,
    State.UNKNOWN: frozenset({State.CLAIMED, State.UNKNOWN}),
    State.SENT: frozenset(),
    State.EXPIRED: frozenset(),
    State.SUPPRESSED: frozenset(),
    State.DEAD: frozenset(),
    State.DISABLED: frozenset(),
}
"""
The only ways from one state to another.

A claim returns to PENDING (nothing was sent for it), SENDING never does. PENDING, RETRY_AT and UNKNOWN lead to
themselves when it is not yet the time. What is not sent any more though an earlier attempt may have arrived ends as
UNKNOWN.
"""


class Step(StrEnum):
    """What to do with a delivery now."""

    SEND = "send"
    RELEASE = "release"
    DOUBT = "doubt"
    WAIT = "wait"
    NOTHING = "nothing"


def is_allowed(before: Delivery, after: Delivery) -> bool:
    """Whether a delivery may go from *before* to *after*; one that waits in a digest ends as the digest does."""
    if before.is_over:
        return False
    return after.state in EDGES[before.state] or (is_member(before) and after.is_over)


def is_member(delivery: Delivery) -> bool:
    """Whether a digest speaks for it."""
    return delivery.bucket_id is not None and not delivery.members


def next_step(delivery: Delivery, now: datetime) -> Step:
    """
    Decide from what is stored.

    A claim whose lease ran out has sent nothing: it is released. A SENDING whose lease ran out belonged to a process
    that died or froze: whether the service took it is in doubt. Everything else is sent when it is due.
    """
    if delivery.is_over:
        return Step.NOTHING
    if delivery.due_at is not None and delivery.due_at > now:
        return Step.WAIT
    match delivery.state:
        case State.CLAIMED:
            return Step.RELEASE
        case State.SENDING:
            return Step.DOUBT
        case State.PENDING if is_member(delivery):
            return Step.NOTHING
        case _:
            return Step.SEND


def may_repeat(delivery: Delivery, *, is_keyed: bool) -> bool:
    """
    Whether a delivery with an unknown outcome is sent again.

    It is where a repetition does not show, or where silence would be worse (critical); but not for ever: what kills
    every process that sends it would never end.
    """
    return (is_keyed or delivery.severity is Severity.CRITICAL) and delivery.attempts < MOST_ATTEMPTS


def claimed(delivery: Delivery, token: str, *, until: datetime) -> Delivery:
    """Ours until the lease runs out; nothing has been sent for this claim."""
    return replace(delivery, state=State.CLAIMED, token=token, due_at=until)


def released(delivery: Delivery, *, due_at: datetime) -> Delivery:
    """A claim that sent nothing goes back to where it waits."""
    return replace(delivery, state=State.PENDING, token=None, due_at=due_at)


def followed(member: Delivery, digest: Delivery) -> Delivery:
    """What waited in a digest ends as the digest did."""
    return replace(
        member,
        state=digest.state,
        reason=digest.reason,
        rule=digest.rule,
        by=digest.delivery_id,
        attempts=digest.attempts,
        doubts=digest.doubts,
        sent_at=digest.sent_at,
        provider_id=digest.provider_id,
        due_at=None,
    )


def sending(delivery: Delivery, *, now: datetime, until: datetime) -> Delivery:
    """The bytes leave after this is written; whoever lost the claim loses this write and must not send."""
    attempt = Attempt(number=delivery.attempts + 1, started_at=now, ended_at=None, outcome="sending")
    reason = _POSSIBLE_REPEAT if delivery.doubts else delivery.reason
    started = replace(delivery, state=State.SENDING, attempts=delivery.attempts + 1, due_at=until, reason=reason)
    return _logged(started, attempt)


def sent(delivery: Delivery, provider_id: str | None, *, now: datetime) -> Delivery:
    """The service took it."""
    reason = _POSSIBLE_REPEAT if delivery.doubts else None
    done = replace(delivery, state=State.SENT, sent_at=now, provider_id=provider_id, reason=reason, due_at=None)
    return _answered(done, now, "taken", provider_id=provider_id)


def doubted(delivery: Delivery, reason: str, *, now: datetime, is_keyed: bool) -> Delivery:
    """It may have been taken: to be sent again where that is the policy, else over, with the reason."""
    again = may_repeat(delivery, is_keyed=is_keyed)
    after = replace(
        delivery,
        state=State.UNKNOWN,
        doubts=delivery.doubts + 1,
        reason=_POSSIBLE_REPEAT if again else _carried(delivery, reason),
        first_failed_at=delivery.first_failed_at or now,
        due_at=now + backoff(delivery) if again else None,
    )
    return _answered(after, now, "unknown", reason)


def ended(delivery: Delivery, state: State, *, rule: str, reason: str, by: str | None = None) -> Delivery:
    """
    It is over without having been sent: EXPIRED, SUPPRESSED or DISABLED.

    Where an earlier attempt may have arrived, that stays what is known of it: UNKNOWN.
    """
    if delivery.doubts:
        return replace(delivery, state=State.UNKNOWN, rule=rule, by=by, reason=_carried(delivery, reason), due_at=None)
    return replace(delivery, state=state, rule=rule, by=by, reason=reason, due_at=None)


def put_off(delivery: Delivery, until: datetime, decision: Decision) -> Delivery:
    """Not now: it waits until *until* (wall), with the reason; a claim is given back."""
    if delivery.state is State.CLAIMED:
        delivery = released(delivery, due_at=until)
    return _noted(replace(delivery, due_at=until), decision)


def failed(
    delivery: Delivery, error: Exception, *, now: datetime, is_keyed: bool, deadline: datetime | None = None
) -> Delivery:
    """
    What a failed attempt leads to.

    *deadline* is the wall instant behind which it is no news: a next attempt that would lie there is not waited for.
    """
    plain = f"{type(error).__name__}: {error}"
    reason = _carried(delivery, plain)
    match error:
        case OutcomeUnknownError():
            return doubted(delivery, plain, now=now, is_keyed=is_keyed)
        case RateLimitedError():
            # Being asked to wait is no failure: it never ends a delivery, so it does not count as an attempt.
            wait = error.retry_after or backoff(delivery)
            after = _again(delivery, reason, now + wait, deadline)
            return _answered(replace(after, attempts=after.attempts - 1), now, "asked to wait", plain)
        case TransientError() | ConfigurationError() if delivery.attempts < MOST_ATTEMPTS or _is_young(delivery, now):
            wait = (error.retry_after if isinstance(error, TransientError) else None) or backoff(delivery)
            after = _again(_first_failed(delivery, now), reason, now + wait, deadline)
            return _answered(after, now, "failed", plain)
        case TransientError() | PermanentError() | ConfigurationError():
            after = replace(_first_failed(delivery, now), state=State.DEAD, reason=reason, due_at=None)
            outcome = "gone" if isinstance(error, RecipientGoneError) else "refused"
            return _answered(after, now, "failed" if isinstance(error, TransientError) else outcome, plain)
        case _:
            # Nobody knows what a bug had done before it showed, and it would show again.
            trouble = f"unexpected trouble ({type(error).__name__}): the log has it"
            after = replace(
                _first_failed(delivery, now),
                state=State.UNKNOWN,
                doubts=delivery.doubts + 1,
                reason=_carried(delivery, trouble),
                due_at=None,
            )
            return _answered(after, now, "unknown", trouble)


def _is_young(delivery: Delivery, now: datetime) -> bool:
    """Whether it has failed for less than a day: outages pass, and an alert shall outlive them."""
    return delivery.first_failed_at is None or now - delivery.first_failed_at < GIVEN_UP_AFTER


def backoff(delivery: Delivery) -> timedelta:
    """How long to wait after its attempts: doubling from 2 s to 10 min, of which a half to the whole by its id."""
    doublings = max(0, min(delivery.attempts - 1, 12))
    longest = min(FIRST_WAIT * (1 << doublings), LONGEST_WAIT)
    return longest * (1 + spread(f"{delivery.delivery_id}|{delivery.attempts}")) / 2


def spread(seed: str) -> float:
    """A number from 0 to 1 that follows from *seed* alone, so that what failed together does not return together."""
    return crc32(seed.encode()) / 0xFFFFFFFF


POSSIBLE_REPEAT = "possible repeat"
_POSSIBLE_REPEAT = f"{POSSIBLE_REPEAT}: an earlier attempt ended without an answer"


def _carried(delivery: Delivery, reason: str) -> str:
    """The reason of a failure; once a delivery may have been sent, every later reason says so too."""
    return f"{_POSSIBLE_REPEAT}; {reason}" if delivery.doubts else reason


def _again(delivery: Delivery, reason: str, at: datetime, deadline: datetime | None) -> Delivery:
    if deadline is not None and at > deadline:
        late = f"would be no news any more when it could be tried again; {reason}"
        return ended(delivery, State.EXPIRED, rule="freshness", reason=late)
    return replace(delivery, state=State.RETRY_AT, reason=reason, due_at=at)


def _first_failed(delivery: Delivery, now: datetime) -> Delivery:
    return replace(delivery, first_failed_at=delivery.first_failed_at or now)


def _logged(delivery: Delivery, attempt: Attempt) -> Delivery:
    log = delivery.attempts_log
    if log and log[-1].number == attempt.number:
        log = log[:-1]  # the service asked to wait: the same attempt goes on
    return replace(delivery, attempts_log=(*log, attempt)[-MOST_LOGGED:])


def _answered(
    delivery: Delivery, now: datetime, outcome: str, reason: str | None = None, provider_id: str | None = None
) -> Delivery:
    """The last attempt in the log has ended."""
    if not delivery.attempts_log:
        return delivery  # it was begun by a version that kept no log
    last = replace(delivery.attempts_log[-1], ended_at=now, outcome=outcome, reason=reason, provider_id=provider_id)
    return replace(delivery, attempts_log=(*delivery.attempts_log[:-1], last))


def _noted(delivery: Delivery, decision: Decision) -> Delivery:
    """One more decision in the trail; the same one again only moves its time."""
    trail = delivery.trail
    if trail and (trail[-1].rule, trail[-1].reason) == (decision.rule, decision.reason):
        trail = trail[:-1]
    return replace(delivery, trail=(*trail, decision)[-MOST_LOGGED:])
