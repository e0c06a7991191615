"""What comes next for a delivery: every edge of its life, and what holds on all of them."""

from datetime import timedelta
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alerts.logic import delivering
from alerts.logic.delivering import FIRST_WAIT, LONGEST_WAIT, MOST_ATTEMPTS, Step
from alerts.models import FINAL, Delivery, Severity, State
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
EVERYWHERE = list(product(("signalr", "discord"), Severity))


def a_delivery(**changes) -> Delivery:
    fields = {
        "delivery_id": "d1",
        "alert_id": "a1",
        "subscriber": "public",
        "channel": "discord",
        "severity": INFO,
    }
    return Delivery(**(fields | changes))


def a_claim(**changes) -> Delivery:
    return delivering.claimed(a_delivery(**changes), "token", until=WALL + LEASE)


# --- what to do now


@pytest.mark.parametrize(
    ("state", "due_at", "step"),
    [
        (State.PENDING, None, Step.SEND),
        (State.PENDING, FUTURE, Step.SEND),
        (State.RETRY_AT, FUTURE, Step.WAIT),
        (State.RETRY_AT, WALL, Step.SEND),
        (State.RETRY_AT, PAST, Step.SEND),
        (State.RETRY_AT, None, Step.SEND),
        (State.SENDING, FUTURE, Step.WAIT),
        (State.SENDING, None, Step.WAIT),
        (State.SENT, None, Step.NOTHING),
        (State.UNKNOWN, None, Step.NOTHING),
        (State.DEAD, PAST, Step.NOTHING),
    ],
)
@pytest.mark.parametrize(("channel", "severity"), EVERYWHERE)
def test_what_is_stored_decides_what_to_do(state, due_at, step, channel, severity):
    """A fresh delivery is sent, a scheduled one waits for its time, a claimed one for its lease, a final one rests."""
    delivery = a_delivery(state=state, due_at=due_at, channel=channel, severity=severity)

    assert delivering.next_step(delivery, WALL) is step


@pytest.mark.parametrize(
    ("channel", "severity", "attempts", "step"),
    [
        ("signalr", INFO, 1, Step.SEND),
        ("signalr", CRITICAL, 1, Step.SEND),
        ("discord", CRITICAL, 1, Step.SEND),
        ("discord", INFO, 1, Step.GIVE_UP_KNOWING),
        ("email", INFO, 1, Step.GIVE_UP_KNOWING),
        ("signalr", INFO, MOST_ATTEMPTS, Step.GIVE_UP_KNOWING),
        ("discord", CRITICAL, MOST_ATTEMPTS, Step.GIVE_UP_KNOWING),
    ],
)
def test_a_lease_that_ran_out_is_an_unknown_outcome(channel, severity, attempts, step):
    """It is sent again only where repeating does not show or silence is worse, and not for ever."""
    delivery = a_delivery(state=State.SENDING, due_at=PAST, channel=channel, severity=severity, attempts=attempts)

    assert delivering.next_step(delivery, WALL) is step


def test_a_claim_counts_an_attempt_and_holds_a_lease():
    """Who claims owns the delivery until the lease runs out."""
    claim = a_claim(attempts=2, reason="UnavailableError: down")

    assert (claim.state, claim.attempts, claim.token, claim.due_at) == (State.SENDING, 3, "token", WALL + LEASE)
    assert claim.reason == "UnavailableError: down"


def test_taking_over_a_claim_says_that_it_may_be_a_repetition():
    """A reader of the ledger sees that the message may have been shown before."""
    assert "possible repeat" in a_claim(state=State.SENDING, attempts=1).reason


def test_a_sent_delivery_keeps_the_services_id_and_drops_old_reasons():
    """SENT has a time, the service's own id and no leftover trouble."""
    done = delivering.sent(a_claim(reason="UnavailableError: down"), "m-1", now=FUTURE)

    assert (done.state, done.sent_at, done.provider_id, done.reason, done.due_at) == (
        State.SENT,
        FUTURE,
        "m-1",
        None,
        None,
    )


# --- what a failure leads to

TROUBLE = UnavailableError("down")
KNOWN_NOT_SENT = [TROUBLE, TransientError("odd"), StaleError("odd")]
NEVER = [RefusedError("no"), RecipientGoneError("gone"), InvalidPayloadError("no"), NotFoundError("no")]


@pytest.mark.parametrize("error", [*KNOWN_NOT_SENT, ConfigurationError("set it")])
@pytest.mark.parametrize(("channel", "severity"), EVERYWHERE)
def test_what_was_surely_not_sent_is_tried_again_later(error, channel, severity):
    """A service that is down, or a setting a person may correct, is tried again after the back-off."""
    after = delivering.failed(a_claim(channel=channel, severity=severity), error, now=WALL)

    assert (after.state, after.due_at) == (State.RETRY_AT, WALL + FIRST_WAIT)
    assert after.reason == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("error", [*KNOWN_NOT_SENT, ConfigurationError("set it")])
def test_the_last_attempt_ends_a_delivery(error):
    """Twenty attempts are enough; the reason is kept."""
    after = delivering.failed(a_claim(attempts=MOST_ATTEMPTS - 1), error, now=WALL)

    assert (after.state, after.due_at) == (State.DEAD, None)
    assert after.reason == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("error", [*NEVER, PermanentError("no")])
@pytest.mark.parametrize(("channel", "severity"), EVERYWHERE)
def test_a_refusal_ends_a_delivery_at_once(error, channel, severity):
    """What the service will never do is not tried again."""
    after = delivering.failed(a_claim(channel=channel, severity=severity), error, now=WALL)

    assert (after.state, after.reason) == (State.DEAD, f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("channel", "severity", "attempts", "state"),
    [
        ("signalr", INFO, 0, State.RETRY_AT),
        ("discord", CRITICAL, 0, State.RETRY_AT),
        ("discord", INFO, 0, State.UNKNOWN),
        ("signalr", INFO, MOST_ATTEMPTS - 1, State.UNKNOWN),
        ("discord", CRITICAL, MOST_ATTEMPTS - 1, State.UNKNOWN),
    ],
)
def test_an_unknown_outcome_follows_the_policy(channel, severity, attempts, state):
    """signalr and critical are sent again, everything else ends as UNKNOWN with a reason."""
    claim = a_claim(channel=channel, severity=severity, attempts=attempts)

    after = delivering.failed(claim, OutcomeUnknownError("no answer"), now=WALL)

    assert after.state is state
    assert after.reason


def test_a_bug_in_a_channel_is_an_unknown_outcome_that_is_not_repeated():
    """Nobody knows what an unexpected error had done before; its text may hold a secret and stays in the log."""
    after = delivering.failed(a_claim(channel="signalr"), RuntimeError("s3cret"), now=WALL)

    assert after.state is State.UNKNOWN
    assert "RuntimeError" in after.reason
    assert "s3cret" not in after.reason


@given(
    attempts=st.integers(min_value=0, max_value=MOST_ATTEMPTS - 1),
    wait=st.none() | st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=1)),
    channel=st.sampled_from(["signalr", "discord"]),
    severity=st.sampled_from(Severity),
)
def test_being_asked_to_wait_is_a_schedule_and_no_failure(attempts, wait, channel, severity):
    """A rate limit never ends a delivery and costs no attempt; the wait is exactly the one that was asked for."""
    before = a_delivery(attempts=attempts, channel=channel, severity=severity)
    claim = delivering.claimed(before, "token", until=WALL + LEASE)

    after = delivering.failed(claim, RateLimitedError("slow down", retry_after=wait), now=WALL)

    assert (after.state, after.attempts) == (State.RETRY_AT, attempts)
    assert after.due_at == WALL + wait if wait else after.due_at > WALL


def test_a_service_that_names_a_time_is_obeyed_when_it_is_down():
    """retry_after of an outage replaces the back-off."""
    after = delivering.failed(a_claim(), UnavailableError("503", retry_after=timedelta(minutes=7)), now=WALL)

    assert after.due_at == WALL + timedelta(minutes=7)


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
    once = delivering.failed(a_claim(severity=CRITICAL), OutcomeUnknownError("no answer"), now=WALL)

    later = delivering.failed(delivering.claimed(once, "t2", until=WALL + LEASE), error, now=WALL)

    assert later.state is state
    assert "possible repeat" in later.reason
    if state is State.RETRY_AT:
        done = delivering.sent(delivering.claimed(later, "t3", until=WALL + LEASE), None, now=WALL)
        assert "possible repeat" in done.reason


@given(st.integers(min_value=0, max_value=10_000))
def test_the_back_off_grows_and_stays_within_its_bounds(attempts):
    """From 2 s, never shorter than after fewer attempts, never longer than ten minutes."""
    wait = delivering.backoff(attempts)

    assert FIRST_WAIT <= wait <= LONGEST_WAIT
    assert wait <= delivering.backoff(attempts + 1)


def test_the_back_off_doubles():
    """2 s, 4 s, 8 s … 512 s, then ten minutes."""
    seconds = [delivering.backoff(attempts).total_seconds() for attempts in range(1, 12)]

    assert seconds == [2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]


# --- a whole life

KNOWN = [*KNOWN_NOT_SENT, ConfigurationError("set it")]


class Life(RuleBasedStateMachine):
    """One delivery, its channel and every process that ever works on it."""

    @initialize(channel=st.sampled_from(["signalr", "discord", "email"]), severity=st.sampled_from(Severity))
    def begin(self, channel, severity):
        self.now = WALL
        self.delivery = a_delivery(channel=channel, severity=severity)
        self.may_repeat = channel == "signalr" or severity is CRITICAL
        self.sends = 0
        self.doubts = 0
        self.ended = None

    def attempt(self) -> Delivery | None:
        """Do what a process does up to the answer: the claim when it sent something."""
        step = delivering.next_step(self.delivery, self.now)
        if step is Step.GIVE_UP_KNOWING:
            self.record(delivering.unknown(self.delivery, "the process died"))
        if step is not Step.SEND:
            return None
        if self.delivery.state is State.SENDING:
            assert self.doubts
        if self.doubts:
            assert self.may_repeat
        self.record(delivering.claimed(self.delivery, f"t{self.sends}", until=self.now + LEASE))
        self.sends += 1
        return self.delivery

    def record(self, after: Delivery) -> None:
        assert self.delivery.state not in FINAL, "a final state was left"
        self.delivery = after

    @rule(seconds=st.integers(min_value=1, max_value=900))
    def time_passes(self, seconds):
        self.now += timedelta(seconds=seconds)

    @rule()
    def the_service_takes_it(self):
        if claim := self.attempt():
            self.record(delivering.sent(claim, "m-1", now=self.now))

    @rule(error=st.sampled_from(KNOWN))
    def it_is_surely_not_sent(self, error):
        if claim := self.attempt():
            self.record(delivering.failed(claim, error, now=self.now))

    @rule(wait=st.none() | st.integers(min_value=1, max_value=100))
    def the_service_asks_to_wait(self, wait):
        before = self.delivery.attempts
        if claim := self.attempt():
            asked = timedelta(seconds=wait) if wait else None
            self.record(delivering.failed(claim, RateLimitedError("slow", retry_after=asked), now=self.now))
            assert self.delivery.state is State.RETRY_AT
            assert self.delivery.attempts == before
            assert delivering.next_step(self.delivery, self.now) is Step.WAIT

    @rule(error=st.sampled_from(NEVER))
    def the_service_refuses(self, error):
        if claim := self.attempt():
            self.record(delivering.failed(claim, error, now=self.now))
            assert self.delivery.state is State.DEAD

    @rule()
    def no_answer_comes(self):
        if claim := self.attempt():
            self.doubts += 1
            self.record(delivering.failed(claim, OutcomeUnknownError("no answer"), now=self.now))

    @rule()
    def the_process_dies_while_sending(self):
        if self.attempt():
            self.doubts += 1

    @precondition(lambda self: self.delivery.state is State.SENDING)
    @rule()
    def a_twin_looks_on(self):
        """While a lease runs nobody else sends."""
        if self.delivery.due_at > self.now:
            assert delivering.next_step(self.delivery, self.now) is Step.WAIT

    @invariant()
    def attempts_are_bounded(self):
        assert 0 <= self.delivery.attempts <= MOST_ATTEMPTS

    @invariant()
    def what_is_not_final_is_due_and_what_is_final_is_not(self):
        """A sweep finds everything that is not finished, and nothing else."""
        if self.delivery.state in FINAL:
            assert self.delivery.due_at is None
        elif self.delivery.state is not State.PENDING:
            assert self.delivery.due_at is not None

    @invariant()
    def every_trouble_has_a_reason(self):
        if self.delivery.state in (State.UNKNOWN, State.DEAD, State.RETRY_AT):
            assert self.delivery.reason

    @invariant()
    def every_doubt_is_told(self):
        """Whoever reads the ledger learns that people may have seen it twice, or not at all."""
        if self.doubts and self.delivery.state is State.SENT:
            assert "possible repeat" in self.delivery.reason

    @invariant()
    def doubts_are_repeated_only_by_policy(self):
        if self.doubts and not self.may_repeat:
            assert self.delivery.state in (State.SENDING, State.UNKNOWN)


TestLife = Life.TestCase


def test_a_delivery_that_kills_every_process_ends():
    """What takes its process down each time is given up after twenty attempts, not tried for ever."""
    delivery, now, sends = a_delivery(severity=CRITICAL), WALL, 0
    while delivering.next_step(delivery, now) is Step.SEND:
        delivery, sends = delivering.claimed(delivery, "t", until=now + LEASE), sends + 1
        now += LEASE

    assert sends == MOST_ATTEMPTS
    assert delivering.next_step(delivery, now) is Step.GIVE_UP_KNOWING
