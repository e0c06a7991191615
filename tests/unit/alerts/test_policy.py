"""Whether now is the moment: every rule, its order, and that no order of arrival lets more through than it allows."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from itertools import pairwise, permutations
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alerts.logic import policy
from alerts.logic.policy import (
    KEPT_FOR,
    PLACES,
    Kind,
    Verdict,
    bucket_id,
    judge,
    judge_channels,
    windows_body,
    windows_of,
)
from alerts.logic.quiet import Span, quiet_until, zone_of
from alerts.models import Severity
from alerts.subscriptions import Digest, Endpoint, Listener, Match, Mute, Preferences, Subscription, Windows
from shared.errors import InvalidPayloadError

NOON = datetime(2013, 1, 2, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
ALLOWANCE = timedelta(minutes=10)
NIGHT = {"zone": "Europe/Berlin", "quiet_from": time(22), "quiet_to": time(7)}


def a_subscription(**changes) -> Subscription:
    fields = {"subscription_id": "s1", "subscriber": "ada", "channels": ("signalr", "email", "discord")}
    return Subscription(**(fields | changes))


def a_match(symbol="AAPL", entry="sma-10-30", **changes) -> Match:
    return Match(subscription=a_subscription(**changes), symbol=symbol, entry=entry, reason="asked for: all symbols")


def an_endpoint(channel="email", **changes) -> Endpoint:
    return Endpoint(endpoint_id=f"e-{channel}", subscriber="ada", channel=channel, shown="a***@example.com", **changes)


BOTH = (an_endpoint(), an_endpoint("discord"))


def ada(*, mutes=(), endpoints=BOTH, **preferences) -> Listener:
    return Listener(
        subscriber="ada",
        preferences=Preferences(subscriber="ada", **preferences),
        mutes=mutes,
        endpoints={e.channel: e for e in endpoints},
    )


def judged(*matches: Match, listener: Listener | None = None, windows: Windows | None = None, **changes) -> Verdict:
    fields = {
        "alert_id": "a1",
        "closed_at": NOON,
        "market_now": changes.get("closed_at", NOON) + MINUTE,
        "allowance": ALLOWANCE,
        "channel": "signalr",
    }
    return judge(matches or (a_match(),), listener or ada(), windows or Windows(), **(fields | changes))


class TestOrder:
    def test_alert_that_nothing_speaks_against_is_sent(self):
        """The trail says why it was heard and that it may go."""
        verdict = judged()

        assert (verdict.kind, verdict.rule, verdict.deadline) == (Kind.SEND, None, None)
        assert [(d.rule, d.outcome) for d in verdict.decisions] == [("match", "heard"), ("send", "send")]
        assert all(d.reason for d in verdict.decisions)

    def test_subscriber_without_rules_needs_no_windows(self):
        """Nothing is written for who has no cooldown and no cap."""
        windows = Windows()

        assert judged(windows=windows).windows is windows

    def test_first_rule_that_speaks_against_it_decides(self):
        """Mute before endpoint before cooldown before cap before digest before freshness before quiet hours."""
        against = {
            "mute": {"mutes": (Mute(mute_id="m1", subscriber="ada", author="ada", until=NOON + HOUR),)},
            "disabled": {"endpoints": (an_endpoint(is_enabled=False),)},
        }
        match = a_match(
            cooldown=HOUR, cap_per_day=1, digest=Digest.HOUR, freshness=timedelta(minutes=1), channels=("email",)
        )
        windows = judged(match, channel="email", alert_id="before").windows
        more = {"zone": "UTC", "quiet_from": time(11), "quiet_to": time(20)}
        given_up: list[str] = []
        late = {"market_now": NOON + timedelta(minutes=30), "channel": "email", "windows": windows}

        for rule in ("mute", "disabled", "cooldown", "cap", "digest", "freshness", "quiet_hours"):
            listener = ada(
                **{k: v for name, some in against.items() if name not in given_up for k, v in some.items()}, **more
            )
            changes = {
                "cooldown": {"cooldown": None},
                "cap": {"cap_per_day": None},
                "digest": {"digest": Digest.NONE},
                "freshness": {"freshness": None},
            }
            asked = replace(match.subscription, **{k: v for name in given_up for k, v in changes.get(name, {}).items()})
            assert judged(replace(match, subscription=asked), listener=listener, **late).rule == rule
            given_up.append(rule)

    def test_critical_alert_passes_every_rule_about_time_but_freshness(self):
        """It waits for no digest and no morning, is not counted, and keeps no other out."""
        critical = a_match(severity=Severity.CRITICAL, cooldown=HOUR, cap_per_day=1, digest=Digest.DAY, freshness=HOUR)
        night = ada(cap_per_day=1, zone="UTC", quiet_from=time(11), quiet_to=time(20))
        windows = judged(a_match(cooldown=HOUR, cap_per_day=1)).windows

        verdict = judged(critical, listener=night, windows=windows, alert_id="a2")

        assert verdict.kind is Kind.SEND
        assert verdict.windows is windows
        assert [d.rule for d in verdict.decisions] == ["match", "critical", "send"]
        assert judged(critical, market_now=NOON + 2 * HOUR).rule == "freshness"

    def test_critical_alert_is_muted_all_the_same(self):
        """Who mutes means it."""
        mute = Mute(mute_id="m1", subscriber="ada", author="ada", until=NOON + HOUR)

        assert judged(a_match(severity=Severity.CRITICAL), listener=ada(mutes=(mute,))).rule == "mute"

    def test_of_several_subscriptions_the_most_willing_decides(self):
        """One holds it back, the other sends it; both say why, by name, and only the sender is counted."""
        quiet = a_match(subscription_id="quiet", cooldown=HOUR)
        keen = a_match(subscription_id="keen", cap_per_day=5)
        windows = judged(quiet, alert_id="a0").windows

        verdict = judged(quiet, keen, windows=windows)

        assert verdict.kind is Kind.SEND
        assert [d.reason.split(":")[0] for d in verdict.decisions if d.rule == "cooldown"] == ["subscription quiet"]
        places = {key: [p.alert_id for p in w.places] for key, w in verdict.windows.by_key.items()}
        assert places == {"cooldown|quiet|AAPL": ["a0"], "cap|keen": ["a1"]}


class TestMutesAndEndpoints:
    @pytest.mark.parametrize(
        ("of", "is_muted"),
        [
            ({}, True),
            ({"symbols": frozenset({"AAPL"})}, True),
            ({"symbols": frozenset({"MSFT"})}, False),
            ({"entries": frozenset({"sma-10-30"})}, True),
            ({"entries": frozenset({"rsi-14"})}, False),
            ({"until": NOON + MINUTE}, False),
            ({"until": NOON + MINUTE + timedelta.resolution}, True),
        ],
    )
    def test_mute_silences_what_it_names_until_its_end(self, of, is_muted):
        """Everything if it names nothing; at its end it is over."""
        mute = Mute(
            **({"mute_id": "m1", "subscriber": "ada", "author": "op", "until": NOON + HOUR, "reason": "noise"} | of)
        )

        verdict = judged(listener=ada(mutes=(mute,)))

        assert (verdict.rule == "mute") is is_muted
        if is_muted:
            assert verdict.by == "m1"
            assert verdict.reason.startswith("muted by op until 2013-01-02 1")
            assert verdict.reason.endswith(": noise")

    def test_mute_of_entries_says_nothing_of_rules_about_bars(self):
        """They have no entry."""
        mute = Mute(mute_id="m", subscriber="ada", author="ada", until=NOON + HOUR, entries=frozenset({"sma-10-30"}))

        assert judged(a_match(entry=None), listener=ada(mutes=(mute,))).kind is Kind.SEND

    def test_channel_that_no_subscription_names_is_not_used(self):
        """Also when a preference changed after the alert was written."""
        assert judged(a_match(channels=("signalr",)), channel="discord").rule == "unsubscribed"
        assert (
            judge([], ada(), Windows(), alert_id="a", closed_at=NOON, market_now=NOON, allowance=ALLOWANCE).rule
            == "unsubscribed"
        )

    @pytest.mark.parametrize("channel", ["email", "discord"])
    def test_nobody_is_sent_for_without_an_address(self, channel):
        """Only SignalR finds people by their name, and public is at home everywhere."""
        bare = ada(endpoints=())

        assert judged(listener=bare, channel=channel).rule == "unsubscribed"
        assert judged(listener=bare, channel="signalr").kind is Kind.SEND
        assert (
            judged(a_match(digest=Digest.NONE), listener=replace(bare, subscriber="public"), channel=channel).kind
            is Kind.SEND
        )

    def test_disabled_endpoint_says_why(self):
        """Its owner finds out from the explanation."""
        off = an_endpoint("discord", is_enabled=False, disabled_reason="the webhook was deleted")

        verdict = judged(listener=ada(endpoints=(off,)), channel="discord")

        assert (verdict.kind, verdict.rule, verdict.by) == (Kind.SUPPRESS, "disabled", "e-discord")
        assert verdict.reason == "the discord address a***@example.com is disabled: the webhook was deleted"


class TestCooldown:
    def test_second_alert_within_it_is_held_back_by_the_first(self):
        """Of the same subscription and symbol; exactly the cooldown later is late enough."""
        asked = a_match(cooldown=HOUR)
        windows = judged(asked).windows

        near = judged(asked, windows=windows, alert_id="a2", closed_at=NOON + HOUR - MINUTE)
        assert (near.kind, near.rule, near.by) == (Kind.SUPPRESS, "cooldown", "a1")
        assert near.reason == "within 1 hour of AAPL's alert of 2013-01-02 12:00 UTC"
        assert near.windows is windows
        assert judged(asked, windows=windows, alert_id="a2", closed_at=NOON + HOUR).kind is Kind.SEND
        other = a_match("MSFT", cooldown=HOUR)
        assert judged(other, windows=windows, alert_id="a2").kind is Kind.SEND
        assert judged(a_match(subscription_id="s2", cooldown=HOUR), windows=windows, alert_id="a2").kind is Kind.SEND

    def test_alert_that_occurred_before_but_came_after_is_held_back_too(self):
        """What counts is when things occurred."""
        asked = a_match(cooldown=HOUR)
        windows = judged(asked).windows

        assert judged(asked, windows=windows, alert_id="a2", closed_at=NOON - HOUR + MINUTE).by == "a1"

    def test_all_channels_of_one_alert_share_its_place(self):
        """An alert is one alert, however many ways it is told."""
        asked = a_match(cooldown=HOUR, cap_per_day=1, digest=Digest.NONE)

        verdicts, windows = judge_channels(
            [asked], ada(), Windows(), alert_id="a1", closed_at=NOON, market_now=NOON, allowance=ALLOWANCE
        )

        assert {channel: v.kind for channel, v in verdicts.items()} == {
            "signalr": Kind.SEND,
            "email": Kind.SEND,
            "discord": Kind.SEND,
        }
        assert [len(w.places) for w in windows.by_key.values()] == [1, 1]

    def test_alert_that_waited_keeps_its_place(self):
        """What was let through is not counted again when its time comes, even if nobody remembers it."""
        asked = a_match(cooldown=HOUR, cap_per_day=1)
        full = judged(asked, alert_id="other").windows

        assert judged(asked, windows=full, is_accepted=True).kind is Kind.SEND
        assert judged(asked, windows=full, is_accepted=True).windows is full

    def test_suppressed_alert_takes_no_place(self):
        """Only what is let through keeps others out."""
        asked = a_match(cooldown=HOUR, cap_per_day=1)
        windows = judged(asked).windows
        blocked = judged(asked, windows=windows, alert_id="a2", closed_at=NOON + 30 * MINUTE)

        next_day = judged(asked, windows=blocked.windows, alert_id="a3", closed_at=NOON + 24 * HOUR)

        assert (blocked.kind, next_day.kind) == (Kind.SUPPRESS, Kind.SEND)


class TestCap:
    def test_day_of_the_subscribers_zone_has_its_share(self):
        """23:30 and 00:30 in Berlin are two days, though one in UTC."""
        asked = a_match(cap_per_day=1)
        berlin = ada(zone="Europe/Berlin")
        evening = datetime(2013, 1, 2, 22, 30, tzinfo=UTC)
        windows = judged(asked, listener=berlin, closed_at=evening).windows

        full = judged(asked, listener=berlin, windows=windows, alert_id="a2", closed_at=evening - HOUR)
        assert (full.rule, full.by) == ("cap", "a1")
        assert "may send 1 a day" in full.reason
        assert "Europe/Berlin" in full.reason
        assert (
            judged(asked, listener=berlin, windows=windows, alert_id="a2", closed_at=evening + HOUR).kind is Kind.SEND
        )
        assert judged(asked, windows=windows, alert_id="a2", closed_at=evening + HOUR).rule == "cap"

    def test_cap_of_the_subscriber_is_over_all_subscriptions(self):
        """Preferences hold for everything."""
        listener = ada(cap_per_day=2)
        windows = Windows()
        kinds = []
        for n in range(4):
            verdict = judged(
                a_match(f"S{n}", subscription_id=f"s{n}"), listener=listener, windows=windows, alert_id=f"a{n}"
            )
            windows = verdict.windows
            kinds.append(verdict.kind)

        assert kinds == [Kind.SEND, Kind.SEND, Kind.SUPPRESS, Kind.SUPPRESS]
        assert judged(listener=listener, windows=windows, alert_id="a9").by == "a1"


def spread(accepted: list[datetime], cooldown: timedelta) -> bool:
    """Whether no two of them lie within the cooldown."""
    ordered = sorted(accepted)
    return all(b - a >= cooldown for a, b in pairwise(ordered))


events = st.lists(
    st.tuples(st.integers(0, 72), st.sampled_from(["AAPL", "MSFT"])), min_size=1, max_size=14, unique=True
)


class TestAnyOrder:
    @settings(max_examples=80, deadline=None)
    @given(
        some=events,
        order=st.randoms(use_true_random=False),
        cooldown=st.sampled_from([None, 1, 3, 24]),
        cap=st.sampled_from([None, 1, 2]),
        overall=st.sampled_from([None, 3]),
        zone=st.sampled_from(["UTC", "Asia/Kathmandu", "America/New_York"]),
    )
    def test_no_order_and_no_repetition_lets_more_through_than_the_rules_allow(
        self, some, order, cooldown, cap, overall, zone
    ):
        """Shuffled, with repetitions, each stored and read in between: per window never more, and a repetition
        is judged as before."""
        arrivals = [*some, *some[: len(some) // 2]]
        order.shuffle(arrivals)
        listener = ada(zone=zone, cap_per_day=overall)
        asked = a_subscription(cooldown=cooldown and cooldown * HOUR, cap_per_day=cap)
        windows = Windows()
        said: dict[str, Kind] = {}
        because: dict[tuple[str, str | None], str | None] = {}

        for hours, symbol in arrivals:
            alert_id, at = f"{symbol}-{hours}", NOON + hours * HOUR
            match = Match(subscription=asked, symbol=symbol, entry="e", reason="r")
            verdict = judged(match, listener=listener, windows=windows, alert_id=alert_id, closed_at=at)
            assert said.setdefault(alert_id, verdict.kind) is verdict.kind
            assert because.setdefault((alert_id, verdict.rule), verdict.by) == verdict.by
            assert verdict.kind is Kind.SEND or verdict.by in said
            windows = windows_of(windows_body(verdict.windows))

        sent = [(symbol, NOON + hours * HOUR) for hours, symbol in some if said[f"{symbol}-{hours}"] is Kind.SEND]
        for symbol in ("AAPL", "MSFT"):
            assert spread([at for s, at in sent if s == symbol], (cooldown or 0) * HOUR)
        days = Counter(at.astimezone(ZoneInfo(zone)).date() for _, at in sent)
        most = min((limit for limit in (cap, overall) if limit), default=None)
        assert most is None or max(days.values()) <= most
        assert sent, "rules hold back what is too much, not everything"

    def test_every_order_of_a_few_alerts_sends_at_least_one_and_at_most_the_allowed(self):
        """Which of them is sent may follow arrival; how many may not exceed the rule."""
        at = {"a": NOON, "b": NOON + 30 * MINUTE, "c": NOON + 60 * MINUTE, "d": NOON + 90 * MINUTE}
        asked = a_match(cooldown=HOUR)
        counts = set()
        for order in permutations(at):
            windows = Windows()
            sent = []
            for alert_id in order:
                verdict = judged(asked, windows=windows, alert_id=alert_id, closed_at=at[alert_id])
                windows = verdict.windows
                sent += [at[alert_id]] if verdict.kind is Kind.SEND else []
            assert spread(sent, HOUR)
            counts.add(len(sent))
        assert counts <= {1, 2}

    def test_what_is_no_longer_kept_is_not_let_through_again(self):
        """A flood from long ago finds the windows full, though the places around it are forgotten."""
        asked = a_match(cooldown=HOUR, cap_per_day=200)
        windows = Windows()
        for n in range(PLACES + 3):
            windows = judged(asked, windows=windows, alert_id=f"a{n}", closed_at=NOON + n * HOUR).windows
        assert len(windows.by_key["cooldown|s1|AAPL"].places) == PLACES

        late = judged(asked, windows=windows, alert_id="late", closed_at=NOON + MINUTE)

        assert (late.kind, late.rule, late.by) == (Kind.SUPPRESS, "cooldown", None)
        assert "came so late" in late.reason

    def test_windows_stay_small_whatever_is_heard(self, monkeypatch):
        """They are one document that is written with every alert."""
        monkeypatch.setattr(policy, "ALL_PLACES", 60)
        windows = Windows()
        for n in range(100):
            asked = a_match(f"S{n}", cooldown=HOUR)
            windows = judged(asked, windows=windows, alert_id=f"a{n}", closed_at=NOON + n * MINUTE).windows
        assert sum(len(w.places) for w in windows.by_key.values()) == 60
        assert judged(a_match("S3", cooldown=HOUR), windows=windows, alert_id="x", closed_at=NOON).rule == "cooldown"

        later = NOON + KEPT_FOR + timedelta(days=10)
        windows = judged(a_match(cooldown=HOUR), windows=windows, alert_id="new", closed_at=later).windows

        assert list(windows.by_key) == ["cooldown|s1|AAPL"]
        assert judged(a_match("S3", cooldown=HOUR), windows=windows, alert_id="y", closed_at=later).kind is Kind.SEND

    def test_empty_windows_are_stored_as_nothing_in_particular(self):
        """And read from nothing."""
        assert windows_of({}) == windows_of(windows_body(Windows())) == Windows()


class TestDigest:
    def test_email_gathers_a_day_unless_told_otherwise(self):
        """The others send at once."""
        verdict = judged(channel="email")

        assert (verdict.kind, verdict.until) == (Kind.DIGEST, datetime(2013, 1, 3, tzinfo=UTC))
        assert judged(a_match(digest=Digest.NONE), channel="email").kind is Kind.SEND
        assert judged(channel="discord").kind is Kind.SEND

    def test_bucket_is_the_same_for_whoever_asks_and_differs_by_what_it_is_of(self):
        """Its id is made of facts."""
        first = judged(a_match(digest=Digest.HOUR), closed_at=NOON + MINUTE)
        second = judged(a_match("MSFT", digest=Digest.HOUR), alert_id="b", closed_at=NOON + 50 * MINUTE)

        assert first.bucket_id == second.bucket_id == bucket_id("ada", "signalr", Digest.HOUR, NOON)
        others = {
            bucket_id("bob", "signalr", Digest.HOUR, NOON),
            bucket_id("ada", "email", Digest.HOUR, NOON),
            bucket_id("ada", "signalr", Digest.DAY, NOON),
            bucket_id("ada", "signalr", Digest.HOUR, NOON + HOUR),
        }
        assert len(others | {first.bucket_id}) == 5
        assert bucket_id("ada", "email", Digest.DAY, NOON) == "4bf9dc71-f88b-574b-893c-72cada0cd9e9"

    def test_event_exactly_at_the_boundary_belongs_to_the_digest_that_begins(self):
        """To that one alone."""
        at_end = judged(a_match(digest=Digest.HOUR), closed_at=NOON)
        just_before = judged(
            a_match(digest=Digest.HOUR), closed_at=NOON - timedelta.resolution, market_now=NOON - timedelta.resolution
        )

        assert at_end.bucket_id == bucket_id("ada", "signalr", Digest.HOUR, NOON)
        assert just_before.bucket_id == bucket_id("ada", "signalr", Digest.HOUR, NOON - HOUR)
        assert (just_before.until, at_end.until) == (NOON, NOON + HOUR)

    def test_alert_that_comes_when_its_digest_has_closed_goes_into_the_open_one(self):
        """Nothing is lost, and no digest goes out twice."""
        late = judged(a_match(digest=Digest.HOUR), closed_at=NOON - 2 * HOUR, market_now=NOON)

        assert (late.kind, late.until) == (Kind.DIGEST, NOON + HOUR)
        again = judged(
            a_match(digest=Digest.HOUR),
            closed_at=NOON - 2 * HOUR,
            market_now=NOON + 30 * MINUTE,
            is_accepted=True,
            in_bucket=late.bucket_id,
        )
        assert (again.kind, again.bucket_id) == (Kind.DIGEST, late.bucket_id)

    def test_digest_is_due_when_it_closes_and_gets_no_older(self):
        """Freshness is about news; a digest tells what was."""
        asked = a_match(digest=Digest.HOUR, freshness=MINUTE)
        gathered = judged(asked)

        due = judged(asked, market_now=gathered.until, is_accepted=True, in_bucket=gathered.bucket_id)

        assert (due.kind, due.deadline) == (Kind.SEND, None)

    def test_digest_of_a_day_closes_at_the_subscribers_midnight(self):
        """A day in March has 23 hours where the clocks change."""
        berlin = ada(zone="Europe/Berlin")
        verdict = judged(listener=berlin, channel="email", closed_at=datetime(2013, 3, 31, 12, tzinfo=UTC))

        assert verdict.until == datetime(2013, 3, 31, 22, tzinfo=UTC)
        assert verdict.bucket_id == bucket_id("ada", "email", Digest.DAY, datetime(2013, 3, 30, 23, tzinfo=UTC))

    def test_digest_waits_for_the_morning_too(self):
        """Quiet hours hold for it."""
        night = ada(**NIGHT)
        asked = a_match(digest=Digest.HOUR)
        at = datetime(2013, 1, 2, 20, 30, tzinfo=UTC)
        gathered = judged(asked, listener=night, closed_at=at)

        due = judged(asked, listener=night, closed_at=at, market_now=gathered.until, is_accepted=True)

        assert (due.kind, due.until) == (Kind.HOLD, datetime(2013, 1, 3, 6, tzinfo=UTC))


class TestFreshness:
    def test_alert_is_sent_up_to_its_deadline_and_expires_behind_it(self):
        """With a record of when it was news."""
        asked = a_match(freshness=HOUR)

        assert judged(asked, market_now=NOON + HOUR).kind is Kind.SEND
        old = judged(asked, market_now=NOON + HOUR + timedelta.resolution)
        assert (old.kind, old.rule, old.deadline) == (Kind.EXPIRE, "freshness", NOON + HOUR)
        assert old.reason == "it occurred at 2013-01-02 12:00 UTC and was news until 2013-01-02 13:00 UTC"

    def test_what_is_merely_on_its_way_does_not_expire(self):
        """Under a fast replay market days pass between a close and its alert."""
        asked = a_match(freshness=MINUTE)

        assert judged(asked, market_now=NOON + timedelta(days=3), allowance=timedelta(days=600)).kind is Kind.SEND

    def test_expired_alert_takes_no_place(self):
        """It was not sent."""
        asked = a_match(freshness=HOUR, cooldown=HOUR)
        windows = judged(asked, market_now=NOON + 2 * HOUR).windows

        assert windows == Windows()


class TestQuietHours:
    def test_alert_of_the_night_is_held_until_the_morning(self):
        """Until the quiet hours end in the subscriber's zone."""
        verdict = judged(listener=ada(**NIGHT), closed_at=datetime(2013, 1, 2, 23, tzinfo=UTC))

        assert (verdict.kind, verdict.rule, verdict.until) == (
            Kind.HOLD,
            "quiet_hours",
            datetime(2013, 1, 3, 6, tzinfo=UTC),
        )

    def test_alert_that_would_be_old_by_the_morning_is_dropped_with_a_record(self):
        """02:00's price is no news at 07:00; exactly at its deadline it still is."""
        at = datetime(2013, 1, 3, 1, tzinfo=UTC)

        def verdict(hours):
            return judged(a_match(freshness=hours * HOUR), listener=ada(**NIGHT), closed_at=at)

        assert verdict(4).kind is Kind.EXPIRE
        assert verdict(4).rule == "quiet_hours"
        assert verdict(4).reason == (
            "quiet hours of ada until 2013-01-03 06:00 UTC; it is news until 2013-01-03 05:00 UTC only"
        )
        assert (verdict(5).kind, verdict(5).deadline) == (Kind.HOLD, at + 5 * HOUR)

    def test_held_alert_is_sent_when_it_is_judged_again_in_the_morning(self):
        """And holds its place in the windows meanwhile."""
        asked = a_match(freshness=12 * HOUR, cooldown=HOUR)
        held = judged(asked, listener=ada(**NIGHT), closed_at=datetime(2013, 1, 2, 23, tzinfo=UTC))

        morning = judged(
            asked,
            listener=ada(**NIGHT),
            windows=held.windows,
            closed_at=datetime(2013, 1, 2, 23, tzinfo=UTC),
            market_now=held.until,
            is_accepted=True,
        )

        assert [p.alert_id for p in held.windows.by_key["cooldown|s1|AAPL"].places] == ["a1"]
        assert morning.kind is Kind.SEND

    @pytest.mark.parametrize(
        ("held_at", "allowance", "kind"),
        [
            ("2013-01-02T23:01:00Z", timedelta(days=9), Kind.SEND),
            ("2013-01-02T23:01:00Z", 10 * MINUTE, Kind.HOLD),  # nobody looked for a day, and it is night again
            ("2013-01-03T23:00:00Z", timedelta(days=9), Kind.HOLD),  # this very night holds it
        ],
    )
    def test_night_that_is_over_holds_no_longer_what_is_merely_on_its_way(self, held_at, allowance, kind):
        """In a fast replay every look may fall into a night: the one that held it has ended all the same."""
        verdict = judged(
            a_match(freshness=None),
            listener=ada(**NIGHT),
            closed_at=datetime(2013, 1, 2, 23, tzinfo=UTC),
            market_now=datetime(2013, 1, 3, 23, 1, tzinfo=UTC),
            allowance=allowance,
            is_accepted=True,
            held_at=datetime.fromisoformat(held_at),
        )

        assert verdict.kind is kind

    @pytest.mark.parametrize(
        ("instant", "until"),
        [
            ("2013-01-02T20:59:59Z", None),
            ("2013-01-02T21:00:00Z", "2013-01-03T06:00:00Z"),
            ("2013-01-03T05:59:59Z", "2013-01-03T06:00:00Z"),
            ("2013-01-03T06:00:00Z", None),
            # summer time begins on 31 March at 01:00 UTC, and ends on 27 October at 01:00 UTC
            ("2013-03-30T21:00:00Z", "2013-03-31T05:00:00Z"),
            ("2013-03-31T04:59:59Z", "2013-03-31T05:00:00Z"),
            ("2013-10-26T20:00:00Z", "2013-10-27T06:00:00Z"),
            ("2013-10-27T05:30:00Z", "2013-10-27T06:00:00Z"),
        ],
    )
    def test_night_in_berlin_ends_at_seven_by_the_clocks_there(self, instant, until):
        """Also in the night that has 23 or 25 hours in its day."""
        night = Preferences(subscriber="ada", **NIGHT)

        assert quiet_until(night, datetime.fromisoformat(instant)) == (until and datetime.fromisoformat(until))

    @pytest.mark.parametrize(
        ("begins", "ends", "instant", "until"),
        [
            # 02:30 is skipped on 31 March: the quiet hours are over when it is
            ("01:00", "02:30", "2013-03-31T00:30:00Z", "2013-03-31T01:00:00Z"),
            ("01:00", "02:30", "2013-03-31T01:00:00Z", None),
            # quiet hours that are skipped whole are none
            ("02:10", "02:40", "2013-03-31T01:00:00Z", None),
            # hours that begin in what is skipped begin behind it
            ("02:30", "04:00", "2013-03-31T01:00:00Z", "2013-03-31T02:00:00Z"),
            # 02:30 comes twice on 27 October: the night ends at its second coming, and is never interrupted
            ("01:00", "02:30", "2013-10-27T00:45:00Z", "2013-10-27T01:30:00Z"),
            ("01:00", "02:30", "2013-10-27T01:29:00Z", "2013-10-27T01:30:00Z"),
            ("02:30", "04:00", "2013-10-27T00:30:00Z", "2013-10-27T03:00:00Z"),
        ],
    )
    def test_times_that_clocks_skip_or_show_twice_are_meant_once(self, begins, ends, instant, until):
        """Quiet hours are one stretch."""
        quiet = Preferences(
            subscriber="ada",
            zone="Europe/Berlin",
            quiet_from=time.fromisoformat(begins),
            quiet_to=time.fromisoformat(ends),
        )

        assert quiet_until(quiet, datetime.fromisoformat(instant)) == (until and datetime.fromisoformat(until))

    @settings(max_examples=150, deadline=None)
    @given(
        zone=st.sampled_from(
            ["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Pacific/Apia", "America/Havana"]
        ),
        begins=st.times().map(lambda t: t.replace(second=0, microsecond=0)),
        ends=st.times().map(lambda t: t.replace(second=0, microsecond=0)),
        instant=st.datetimes(datetime(1990, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    )
    def test_end_of_the_quiet_hours_is_the_first_instant_that_is_not_quiet(self, zone, begins, ends, instant):
        """Wherever and whenever: what is held comes exactly then, and the wait is shorter than 26 hours."""
        quiet = Preferences(subscriber="ada", zone=zone, quiet_from=begins, quiet_to=ends)

        until = quiet_until(quiet, instant)

        if until is not None and begins != ends:
            assert instant < until <= instant + timedelta(hours=26)
            assert quiet_until(quiet, until - timedelta.resolution) == until
            assert quiet_until(quiet, until) is None

    @settings(max_examples=150, deadline=None)
    @given(
        zone=st.sampled_from(
            ["UTC", "Europe/Berlin", "America/St_Johns", "America/Sao_Paulo", "Pacific/Apia", "Asia/Beirut"]
        ),
        instant=st.datetimes(datetime(1950, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    )
    def test_every_instant_belongs_to_exactly_one_day(self, zone, instant):
        """Days of a zone follow each other without a gap, also where clocks go back over midnight."""
        day = Span.day(instant, zone)

        assert instant in day
        assert Span.day(day.start, zone) == Span.day(day.end - timedelta.resolution, zone) == day
        assert Span.day(day.end, zone).start == day.end


@pytest.mark.parametrize(
    "name", ["", "Mars/Olympus", "localtime", "../../etc/passwd", "Europe", "/etc/localtime", "a/\x00", "é/ü"]
)
def test_what_is_no_zone_is_said_so(name):
    """With what to write instead."""
    with pytest.raises(InvalidPayloadError, match="write an IANA name such as Europe/Berlin"):
        zone_of(name)
