"""What comes next for a delivery: every edge of its life, and what holds on all of them."""

from dataclasses import replace
from datetime import timedelta
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alerts.logic import delivering
from alerts.logic.delivering import EDGES, FIRST_WAIT, LONGEST_WAIT, MOST_ATTEMPTS, MOST_LOGGED, Step, is_allowed
from alerts.models import FINAL, Decision, Delivery, Severity, State
from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    NotFoundError,
    OutcomeUnknownError,
    PermanentError,
    RateLimitedError,
    RecipientGoneError,
    RefusedError,
    StaleError,
    TransientError,
    UnavailableError,
)
from tests.builders import WALL

LEASE = timedelta(seconds=30)
PAST, FUTURE = WALL - timedelta(seconds=1), WALL + timedelta(seconds=1)
INFO, CRITICAL = Severity.INFO, Severity.CRITICAL
EVERYWHERE = list(product((True, False), Severity))
HOLD = Decision(at=WALL, rule="quiet_hours", outcome="hold", reason="until 07:00")


def a_delivery(**changes) -> Delivery:
    fields = {
        "delivery_id": "d1",
        "alert_id": "a1",
        "subscriber": "public",
        "channel": "discord",
        "severity": INFO,
    }
    return Delivery(**(fields | changes))


def begun(delivery: Delivery, *, at=WALL) -> Delivery:
    """The delivery while it is being sent."""
    claim = delivering.claimed(delivery, "token", until=at + LEASE)
    return delivering.sending(claim, now=at, until=at + LEASE)


def a_sending(**changes) -> Delivery:
    return begun(a_delivery(**changes))


def failed(delivery: Delivery, error: Exception, *, is_keyed: bool = False, deadline=None) -> Delivery:
    return delivering.failed(delivery, error, now=WALL, is_keyed=is_keyed, deadline=deadline)


# --- what to do now


@pytest.mark.parametrize(
    ("state", "due_at", "step"),
    [
        (State.PENDING, None, Step.SEND),
        (State.PENDING, WALL, Step.SEND),
        (State.PENDING, FUTURE, Step.WAIT),
        (State.RETRY_AT, FUTURE, Step.WAIT),
        (State.RETRY_AT, WALL, Step.SEND),
        (State.CLAIMED, FUTURE, Step.WAIT),
        (State.CLAIMED, WALL, Step.RELEASE),
        (State.SENDING, FUTURE, Step.WAIT),
        (State.SENDING, PAST, Step.DOUBT),
        (State.UNKNOWN, FUTURE, Step.WAIT),
        (State.UNKNOWN, PAST, Step.SEND),
        (State.UNKNOWN, None, Step.NOTHING),
        *((state, None, Step.NOTHING) for state in sorted(FINAL)),
        *((state, PAST, Step.NOTHING) for state in sorted(FINAL)),
    ],
)
def test_what_is_stored_decides_what_to_do(state, due_at, step):
    """What waits is sent when it is due, an old claim is released, an old SENDING is in doubt, what is over rests."""
    assert delivering.next_step(a_delivery(state=state, due_at=due_at), WALL) is step


def test_what_waits_in_a_digest_is_left_to_it():
    """Nobody sends a member by itself; the digest, which has members, is sent."""
    member = a_delivery(bucket_id="b1")

    assert delivering.next_step(member, WALL) is Step.NOTHING
    assert delivering.next_step(replace(member, members=("a1",)), WALL) is Step.SEND


@pytest.mark.parametrize(
    ("is_keyed", "severity", "attempts", "again"),
    [
        (True, INFO, 1, True),
        (True, CRITICAL, 1, True),
        (False, CRITICAL, 1, True),
        (False, INFO, 1, False),
        (False, Severity.WARNING, 1, False),
        (True, INFO, MOST_ATTEMPTS, False),
        (False, CRITICAL, MOST_ATTEMPTS, False),
    ],
)
@pytest.mark.parametrize("how", ["it died", "no answer"])
def test_an_unknown_outcome_follows_the_policy(how, is_keyed, severity, attempts, again):
    """It is sent again only where repeating does not show or silence is worse, and not for ever."""
    sending = a_sending(severity=severity, attempts=attempts - 1)

    if how == "it died":
        after = delivering.doubted(sending, "the process died", now=WALL, is_keyed=is_keyed)
    else:
        after = failed(sending, OutcomeUnknownError("no answer"), is_keyed=is_keyed)

    assert (after.state, after.doubts) == (State.UNKNOWN, 1)
    assert after.reason
    assert after.is_over is not again
    assert after.attempts_log[-1].outcome == "unknown"
    if again:
        assert after.due_at > WALL
        assert delivering.next_step(after, after.due_at) is Step.SEND


def test_a_claim_holds_a_lease_and_is_no_attempt():
    """Who claims owns the delivery until the lease runs out; nothing has been sent for it."""
    claim = delivering.claimed(a_delivery(attempts=2), "token", until=WALL + LEASE)

    assert (claim.state, claim.attempts, claim.token, claim.due_at) == (State.CLAIMED, 2, "token", WALL + LEASE)
    assert claim.attempts_log == ()


def test_sending_counts_and_logs_an_attempt():
    """The log says when it began, before anybody knows how it ends."""
    sending = a_sending(attempts=2, reason="UnavailableError: down")

    assert (sending.state, sending.attempts, sending.due_at) == (State.SENDING, 3, WALL + LEASE)
    [attempt] = sending.attempts_log
    assert (attempt.number, attempt.started_at, attempt.ended_at, attempt.outcome) == (3, WALL, None, "sending")
    assert sending.reason == "UnavailableError: down"


def test_a_released_claim_waits_again():
    """An expired claim has sent nothing: it is due as before, with all that was known of it."""
    claim = delivering.claimed(a_delivery(attempts=2), "token", until=PAST)

    after = delivering.released(claim, due_at=WALL)

    assert (after.state, after.token, after.due_at, after.attempts) == (State.PENDING, None, WALL, 2)


def test_a_sent_delivery_keeps_the_services_id_and_drops_old_reasons():
    """SENT has a time, the service's own id and no leftover trouble."""
    done = delivering.sent(a_sending(reason="UnavailableError: down"), "m-1", now=FUTURE)

    assert (done.state, done.sent_at, done.provider_id, done.reason, done.due_at) == (
        State.SENT,
        FUTURE,
        "m-1",
        None,
        None,
    )
    assert (done.attempts_log[-1].outcome, done.attempts_log[-1].provider_id) == ("taken", "m-1")


# --- what a failure leads to

TROUBLE = UnavailableError("down")
KNOWN_NOT_SENT = [TROUBLE, TransientError("odd"), StaleError("odd")]
NEVER = [RefusedError("no"), RecipientGoneError("gone"), InvalidPayloadError("no"), NotFoundError("no")]


@pytest.mark.parametrize("error", [*KNOWN_NOT_SENT, ConfigurationError("set it")])
@pytest.mark.parametrize(("is_keyed", "severity"), EVERYWHERE)
def test_what_was_surely_not_sent_is_tried_again_later(error, is_keyed, severity):
    """A service that is down, or a setting a person may correct, is tried again after the back-off."""
    sending = a_sending(severity=severity)

    after = failed(sending, error, is_keyed=is_keyed)

    assert (after.state, after.due_at) == (State.RETRY_AT, WALL + delivering.backoff(sending))
    assert after.reason == f"{type(error).__name__}: {error}"
    assert after.first_failed_at == WALL


@pytest.mark.parametrize("error", [*KNOWN_NOT_SENT, ConfigurationError("set it")])
def test_the_last_attempt_of_a_day_ends_a_delivery(error):
    """Twenty attempts over a day are enough; the reason is kept."""
    after = failed(a_sending(attempts=MOST_ATTEMPTS - 1, first_failed_at=WALL - timedelta(days=1)), error)

    assert (after.state, after.due_at) == (State.DEAD, None)
    assert after.reason == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("error", [*KNOWN_NOT_SENT, ConfigurationError("set it")])
def test_a_long_outage_ends_no_delivery(error):
    """Within a day of the first failure what surely was not sent is tried on, however often it was."""
    after = failed(a_sending(attempts=MOST_ATTEMPTS - 1, first_failed_at=WALL - timedelta(hours=23)), error)

    assert (after.state, after.attempts) == (State.RETRY_AT, MOST_ATTEMPTS)


@pytest.mark.parametrize("error", [*NEVER, PermanentError("no")])
@pytest.mark.parametrize(("is_keyed", "severity"), EVERYWHERE)
def test_a_refusal_ends_a_delivery_at_once(error, is_keyed, severity):
    """What the service will never do is not tried again."""
    after = failed(a_sending(severity=severity), error, is_keyed=is_keyed)

    assert (after.state, after.reason) == (State.DEAD, f"{type(error).__name__}: {error}")
    assert after.attempts_log[-1].outcome == ("gone" if isinstance(error, RecipientGoneError) else "refused")


@pytest.mark.parametrize("is_keyed", [True, False])
def test_a_bug_in_a_channel_is_an_unknown_outcome_that_is_not_repeated(is_keyed):
    """Nobody knows what an unexpected error had done before; its text may hold a secret and stays in the log."""
    after = failed(a_sending(severity=CRITICAL), RuntimeError("s3cret"), is_keyed=is_keyed)

    assert (after.state, after.is_over) == (State.UNKNOWN, True)
    assert "RuntimeError" in after.reason
    assert "s3cret" not in f"{after}"


@given(
    attempts=st.integers(min_value=0, max_value=MOST_ATTEMPTS - 1),
    wait=st.none() | st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=1)),
    is_keyed=st.booleans(),
    severity=st.sampled_from(Severity),
)
def test_being_asked_to_wait_is_a_schedule_and_no_failure(attempts, wait, is_keyed, severity):
    """A rate limit never ends a delivery and costs no attempt; the wait is exactly the one that was asked for."""
    sending = a_sending(attempts=attempts, severity=severity)

    after = failed(sending, RateLimitedError("slow down", retry_after=wait), is_keyed=is_keyed)

    assert (after.state, after.attempts, after.first_failed_at) == (State.RETRY_AT, attempts, None)
    assert after.due_at == WALL + wait if wait else after.due_at > WALL


def test_being_asked_to_wait_often_does_not_fill_the_log():
    """The same attempt goes on: the log keeps its last word, not one line a wait."""
    delivery = a_delivery()
    for _ in range(50):
        delivery = failed(begun(delivery), RateLimitedError("slow down"))

    assert [(a.number, a.outcome) for a in delivery.attempts_log] == [(1, "asked to wait")]


def test_the_log_is_bounded():
    """The last attempts are kept, however many there were."""
    delivery = a_delivery()
    for _ in range(MOST_ATTEMPTS + 10):
        delivery = replace(failed(begun(delivery), TROUBLE), state=State.RETRY_AT)

    numbers = [attempt.number for attempt in delivery.attempts_log]
    assert numbers == list(range(MOST_ATTEMPTS + 11 - MOST_LOGGED, MOST_ATTEMPTS + 11))


def test_a_service_that_names_a_time_is_obeyed_when_it_is_down():
    """retry_after of an outage replaces the back-off."""
    after = failed(a_sending(), UnavailableError("503", retry_after=timedelta(minutes=7)))

    assert after.due_at == WALL + timedelta(minutes=7)


@pytest.mark.parametrize("error", [RateLimitedError("slow", retry_after=timedelta(minutes=1)), TROUBLE])
def test_what_would_be_late_when_it_is_tried_again_expires(error):
    """Nothing waits for a moment at which it is no news any more; the record says why."""
    after = failed(a_sending(), error, deadline=WALL + timedelta(milliseconds=500))

    assert (after.state, after.rule, after.due_at) == (State.EXPIRED, "freshness", None)
    assert str(error) in after.reason


def test_what_is_tried_again_in_time_does_not_expire():
    """A deadline behind the next attempt changes nothing."""
    assert failed(a_sending(), TROUBLE, deadline=WALL + FIRST_WAIT).state is State.RETRY_AT


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RateLimitedError("slow down"), State.RETRY_AT),
        (TROUBLE, State.RETRY_AT),
        (RecipientGoneError("gone"), State.DEAD),
        (RuntimeError("bug"), State.UNKNOWN),
    ],
)
def test_a_possible_repetition_is_never_forgotten(error, state):
    """Once a message may have been shown, every later reason says so, the one of SENT included."""
    once = failed(a_sending(severity=CRITICAL), OutcomeUnknownError("no answer"))

    again = begun(once)
    later = failed(again, error)

    assert "possible repeat" in again.reason
    assert later.state is state
    assert "possible repeat" in later.reason
    if state is State.RETRY_AT:
        assert "possible repeat" in delivering.sent(begun(later), None, now=WALL).reason


@pytest.mark.parametrize("state", [State.EXPIRED, State.SUPPRESSED, State.DISABLED])
def test_what_may_have_arrived_is_not_called_unsent(state):
    """EXPIRED, SUPPRESSED and DISABLED say that nobody saw it; after a doubt nobody can say that."""
    fresh = delivering.ended(a_delivery(), state, rule="mute", reason="muted", by="m1")
    doubtful = delivering.ended(a_delivery(doubts=1), state, rule="mute", reason="muted")

    assert (fresh.state, fresh.rule, fresh.by, fresh.reason, fresh.is_over) == (state, "mute", "m1", "muted", True)
    assert (doubtful.state, doubtful.is_over) == (State.UNKNOWN, True)
    assert "possible repeat" in doubtful.reason
    assert "muted" in doubtful.reason


@pytest.mark.parametrize("state", [State.PENDING, State.RETRY_AT, State.UNKNOWN, State.CLAIMED])
def test_what_is_put_off_waits_with_its_reason(state):
    """It stays what it is, a claim is given back, and the trail does not grow by the same reason again."""
    delivery = a_delivery(state=state, due_at=PAST)
    for _ in range(3):
        delivery = delivering.put_off(delivery, FUTURE, HOLD)

    assert delivery.state is (State.PENDING if state is State.CLAIMED else state)
    assert (delivery.due_at, delivery.trail) == (FUTURE, (HOLD,))


@given(attempts=st.integers(min_value=0, max_value=10_000), name=st.text(max_size=5))
def test_the_back_off_stays_within_its_bounds(attempts, name):
    """A half to the whole of 2 s doubling up to ten minutes, always the same for the same attempt."""
    delivery = a_delivery(delivery_id=name, attempts=attempts)
    longest = min(FIRST_WAIT * 2 ** min(max(attempts - 1, 0), 20), LONGEST_WAIT)

    wait = delivering.backoff(delivery)

    assert longest / 2 <= wait <= longest
    assert wait == delivering.backoff(delivery)


def test_what_failed_together_does_not_come_back_together():
    """The waits of a thousand deliveries are spread over their whole range."""
    waits = sorted(delivering.backoff(a_delivery(delivery_id=f"d{n}", attempts=12)) for n in range(1000))

    assert waits[0] < LONGEST_WAIT * 0.52
    assert waits[-1] > LONGEST_WAIT * 0.98
    assert max(b - a for a, b in pairwise(waits)) < timedelta(seconds=8)


# --- the table of edges


def test_nothing_leaves_a_final_state():
    """Whatever is over stays so: UNKNOWN too, once nothing is due."""
    for state, after in product([*FINAL, State.UNKNOWN], State):
        assert not is_allowed(a_delivery(state=state), a_delivery(state=after))
        assert not is_allowed(a_delivery(state=state, bucket_id="b1"), a_delivery(state=after))


def test_bytes_leave_only_behind_a_claim_and_doubts_never_wait_as_if_unsent():
    """SENDING comes from CLAIMED alone, CLAIMED never from SENDING, and SENDING never goes back to PENDING."""
    assert [state for state in State if State.SENDING in EDGES[state]] == [State.CLAIMED]
    assert not {State.PENDING, State.CLAIMED, State.SENDING, State.SUPPRESSED, State.DISABLED} & EDGES[State.SENDING]
    assert [state for state in State if State.SENT in EDGES[state]] == [State.SENDING]
    assert not {State.PENDING, State.RETRY_AT, State.EXPIRED} & EDGES[State.UNKNOWN]


def test_a_member_of_a_digest_ends_as_the_digest_does():
    """It is sent without a claim of its own, by its digest, whose id it names."""
    digest = delivering.sent(a_sending(delivery_id="g1", bucket_id="b1", members=("a1",)), "m-1", now=FUTURE)
    member = a_delivery(bucket_id="b1")

    after = delivering.followed(member, digest)

    assert (after.state, after.by, after.provider_id, after.sent_at) == (State.SENT, "g1", "m-1", FUTURE)
    assert is_allowed(member, after)
    assert not is_allowed(a_delivery(), after)


# --- a whole life

KNOWN = [*KNOWN_NOT_SENT, ConfigurationError("set it")]


class Life(RuleBasedStateMachine):
    """One delivery, its channel and every process that ever works on it."""

    @initialize(is_keyed=st.booleans(), severity=st.sampled_from(Severity))
    def begin(self, is_keyed, severity):
        self.now = WALL
        self.delivery = a_delivery(severity=severity, due_at=WALL)
        self.is_keyed = is_keyed
        self.may_repeat = is_keyed or severity is CRITICAL
        self.sends = 0
        self.doubts = 0

    def record(self, after: Delivery) -> None:
        assert is_allowed(self.delivery, after), f"{self.delivery.state} became {after.state}"
        self.delivery = after

    def claim(self) -> bool:
        """Do what a process does up to its claim; whether it has one."""
        step = delivering.next_step(self.delivery, self.now)
        if step is Step.RELEASE:
            self.record(delivering.released(self.delivery, due_at=self.now))
        if step is Step.DOUBT:
            self.doubts += 1
            self.record(delivering.doubted(self.delivery, "it died", now=self.now, is_keyed=self.is_keyed))
        if delivering.next_step(self.delivery, self.now) is not Step.SEND:
            return False
        self.record(delivering.claimed(self.delivery, f"t{self.sends}", until=self.now + LEASE))
        return True

    def attempt(self) -> Delivery | None:
        """Do what a process does up to the answer: what it is sending."""
        if not self.claim():
            return None
        if self.doubts:
            assert self.may_repeat
        self.record(delivering.sending(self.delivery, now=self.now, until=self.now + LEASE))
        self.sends += 1
        return self.delivery

    def fail(self, error: Exception) -> bool:
        if sending := self.attempt():
            self.record(delivering.failed(sending, error, now=self.now, is_keyed=self.is_keyed))
        return sending is not None

    @rule(seconds=st.integers(min_value=1, max_value=900))
    def time_passes(self, seconds):
        self.now += timedelta(seconds=seconds)

    @rule()
    def the_service_takes_it(self):
        if sending := self.attempt():
            self.record(delivering.sent(sending, "m-1", now=self.now))

    @rule(error=st.sampled_from(KNOWN))
    def it_is_surely_not_sent(self, error):
        self.fail(error)

    @rule(wait=st.none() | st.integers(min_value=1, max_value=100))
    def the_service_asks_to_wait(self, wait):
        before = self.delivery.attempts
        asked = timedelta(seconds=wait) if wait else None
        if self.fail(RateLimitedError("slow", retry_after=asked)):
            assert self.delivery.state is State.RETRY_AT
            assert self.delivery.attempts == before
            assert delivering.next_step(self.delivery, self.now) is Step.WAIT

    @rule(error=st.sampled_from(NEVER))
    def the_service_refuses(self, error):
        if self.fail(error):
            assert self.delivery.state is State.DEAD

    @rule()
    def no_answer_comes(self):
        if self.fail(OutcomeUnknownError("no answer")):
            self.doubts += 1

    @rule()
    def the_process_dies_before_sending(self):
        self.claim()

    @rule()
    def the_process_dies_while_sending(self):
        self.attempt()

    @precondition(lambda self: delivering.next_step(self.delivery, self.now) is Step.SEND)
    @rule(seconds=st.integers(min_value=1, max_value=900))
    def the_rules_say_not_now(self, seconds):
        self.record(delivering.put_off(self.delivery, self.now + timedelta(seconds=seconds), HOLD))

    @precondition(lambda self: delivering.next_step(self.delivery, self.now) is Step.SEND)
    @rule(state=st.sampled_from([State.EXPIRED, State.SUPPRESSED, State.DISABLED]))
    def the_rules_say_no(self, state):
        self.record(delivering.ended(self.delivery, state, rule="mute", reason="muted"))

    @precondition(lambda self: self.delivery.state in (State.CLAIMED, State.SENDING))
    @rule()
    def a_twin_looks_on(self):
        """While a lease runs nobody else sends."""
        if self.delivery.due_at > self.now:
            assert delivering.next_step(self.delivery, self.now) is Step.WAIT

    @invariant()
    def attempts_are_bounded(self):
        assert 0 <= self.delivery.attempts <= MOST_ATTEMPTS
        assert len(self.delivery.attempts_log) <= MOST_LOGGED

    @invariant()
    def what_is_not_over_is_due_and_what_is_over_is_not(self):
        """A sweep finds everything that is not finished, and nothing else."""
        assert self.delivery.is_over is (self.delivery.due_at is None)

    @invariant()
    def every_trouble_has_a_reason(self):
        if self.delivery.is_over and self.delivery.state is not State.SENT:
            assert self.delivery.reason
        if self.delivery.state in (State.UNKNOWN, State.RETRY_AT):
            assert self.delivery.reason

    @invariant()
    def every_doubt_is_counted_and_told(self):
        """Whoever reads the ledger learns that people may have seen it twice, or not at all."""
        assert self.delivery.doubts <= self.doubts + 1
        if self.doubts and self.delivery.state is State.SENT:
            assert "possible repeat" in self.delivery.reason

    @invariant()
    def what_nobody_saw_was_never_in_doubt(self):
        if self.delivery.state in (State.EXPIRED, State.SUPPRESSED, State.DISABLED):
            assert not self.doubts

    @invariant()
    def doubts_are_repeated_only_by_policy(self):
        if self.doubts and not self.may_repeat:
            assert self.delivery.state is State.UNKNOWN


TestLife = Life.TestCase


def test_a_delivery_that_kills_every_process_ends():
    """What takes its process down each time is given up after twenty attempts, not tried for ever."""
    delivery, now, sends = a_delivery(severity=CRITICAL, due_at=WALL), WALL, 0
    while not delivery.is_over:
        if delivering.next_step(delivery, now) is Step.SEND:
            delivery, sends = begun(delivery, at=now), sends + 1
        now += max(LEASE, LONGEST_WAIT)
        if delivering.next_step(delivery, now) is Step.DOUBT:
            delivery = delivering.doubted(delivery, "it died", now=now, is_keyed=False)

    assert (sends, delivery.state, delivery.doubts) == (MOST_ATTEMPTS, State.UNKNOWN, MOST_ATTEMPTS)
