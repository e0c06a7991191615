from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigurationError
from shared.market.gaps import MOST_ASKED, SLICES, Asked, Kind, expected, first_slice, noted, survey
from shared.market.models import Interval, instant_of, minute_of
from shared.market.sessions import AROUND_THE_CLOCK, EXCHANGE, calendar

DAY, HOUR, MINUTE = Interval.DAY, Interval.HOUR, Interval.MINUTE
ASKED_AT = datetime(2026, 11, 21, 9, tzinfo=UTC)
instants = st.datetimes(datetime(2011, 1, 1), datetime(2014, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis wants them naive


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)


def walked(market, interval, since, until) -> list[int]:
    """The closes that the calendar itself names, one after the other."""
    found, at = [], market.next_bar_close(interval, since)
    while at <= until:
        found.append(minute_of(at))
        at = market.next_bar_close(interval, at)
    return found


def asked(since: int, through: int, provider: str = "alpha_vantage", at: datetime = ASKED_AT) -> Asked:
    return Asked(since=instant_of(since), through=instant_of(through), provider=provider, asked_at=at)


class TestExpected:
    @given(
        name=st.sampled_from([EXCHANGE, AROUND_THE_CLOCK]),
        interval=st.sampled_from([DAY, HOUR]),
        since=instants,
        length=st.timedeltas(timedelta(), timedelta(days=60)),
    )
    def test_any_range_holds_what_the_calendar_names(self, name, interval, since, length):
        """Half days, holidays and both Sundays on which the clocks change: the bars are those of the session table."""
        market = calendar(name)
        until = since + length
        assert list(expected(market, interval, since=since, until=until)) == walked(market, interval, since, until)

    @given(name=st.sampled_from([EXCHANGE, AROUND_THE_CLOCK]), since=instants, minutes=st.integers(0, 3000))
    def test_any_minutes_too(self, name, since, minutes):
        """Minute bars likewise, over nights and weekends."""
        market, until = calendar(name), since + timedelta(minutes=minutes)
        assert list(expected(market, MINUTE, since=since, until=until)) == walked(market, MINUTE, since, until)

    @pytest.mark.parametrize(
        ("day", "hours", "minutes"),
        [
            ((2012, 11, 23), 4, 210),  # the Friday after Thanksgiving ends at 13:00
            ((2012, 12, 24), 4, 210),
            ((2012, 10, 29), 0, 0),  # a hurricane
            ((2012, 3, 9), 7, 390),  # the Friday before summer time
            ((2012, 3, 12), 7, 390),  # the Monday in it: the same session, an hour earlier in UTC
            ((2012, 11, 5), 7, 390),
        ],
    )
    def test_odd_days(self, day, hours, minutes):
        """A session's bars are as many as it is long, the last one cut short."""
        since = utc(*day)
        for interval, count in ((DAY, min(hours, 1)), (HOUR, hours), (MINUTE, minutes)):
            assert len(expected(calendar(), interval, since=since, until=since + timedelta(days=1))) == count

    def test_midnight_belongs_to_the_day_that_ends(self):
        """Around the clock a day closes at the next midnight, which its range includes."""
        market = calendar(AROUND_THE_CLOCK)
        found = expected(market, DAY, since=utc(2012, 6, 30), until=utc(2012, 7, 1))
        assert list(found) == [minute_of(utc(2012, 7, 1))]

    def test_beyond_the_table_is_said(self):
        """A range that no table covers is no empty range."""
        with pytest.raises(ConfigurationError, match="session table"):
            expected(calendar(), DAY, since=utc(1871, 1, 1), until=utc(2012, 1, 1))


class TestSurvey:
    WANTED = tuple(expected(calendar(), DAY, since=utc(2012, 1, 1), until=utc(2012, 12, 31)))

    @given(
        held=st.sets(st.sampled_from(WANTED)),
        spans=st.lists(st.tuples(st.sampled_from(WANTED), st.sampled_from(WANTED)), max_size=4),
    )
    def test_every_bar_is_in_one_stretch_and_of_one_kind(self, held, spans):
        """Held if we have it, absent if somebody was asked for it, else missing; stretches are as long as can be."""
        known: list[Asked] = []
        for a, b in spans:
            if a != b:
                known = noted(known, asked(min(a, b), max(a, b)))
        inside = {m for m in self.WANTED for a, b in spans if min(a, b) < m <= max(a, b)}

        stretches = survey(self.WANTED, sorted(held), known)

        kinds = []
        for s in stretches:
            covered = [m for m in self.WANTED if minute_of(s.first) <= m <= minute_of(s.last)]
            assert len(covered) == s.count
            kinds += [(m, s.kind) for m in covered]
            assert (s.provider is not None) == (s.kind is Kind.ABSENT)
        assert kinds == [
            (m, Kind.HELD if m in held else Kind.ABSENT if m in inside else Kind.MISSING) for m in self.WANTED
        ]
        assert all(a.kind is not b.kind for a, b in pairwise(stretches))

    def test_absence_says_who_and_when(self):
        """A bar that a provider has not got is its provider's, as of the day it was asked."""
        [head, rest] = survey(self.WANTED, [], [asked(self.WANTED[0] - 1, self.WANTED[9])])

        assert (head.kind, head.count, head.provider, head.asked_at) == (Kind.ABSENT, 10, "alpha_vantage", ASKED_AT)
        assert (rest.kind, rest.provider) == (Kind.MISSING, None)


class TestNoted:
    def test_spans_that_touch_become_one(self):
        """A history asked for piece by piece is one span, dated by its oldest piece."""
        known: list[Asked] = []
        for day in (0, 2, 1):
            known = noted(known, asked(day * 100, day * 100 + 100, at=ASKED_AT + timedelta(days=day)))

        assert known == [asked(0, 300)]

    def test_the_newest_answer_counts(self):
        """Another provider's span takes the place of what it covers, and leaves the rest."""
        known = noted([asked(0, 300)], asked(100, 200, "finnhub"))

        assert known == [asked(0, 100), asked(100, 200, "finnhub"), asked(200, 300)]

    def test_memory_is_bounded(self):
        """However ragged a history is, what is remembered stays small; the oldest answers go first."""
        known: list[Asked] = []
        for n in range(MOST_ASKED + 10):
            known = noted(known, asked(n * 100, n * 100 + 10, at=ASKED_AT + timedelta(minutes=n)))

        assert len(known) == MOST_ASKED
        assert known[0].since == instant_of(1000)


class TestSlice:
    def test_first_of_what_is_missing_with_a_held_bar_on_either_side(self):
        """The bars around a hole are asked for again, because they would show a revision."""
        wanted = expected(calendar(), DAY, since=utc(2012, 1, 1), until=utc(2012, 3, 1))
        missing = [s for s in survey(wanted, wanted[:10] + wanted[15:], []) if s.kind is Kind.MISSING]

        found = first_slice(calendar(), DAY, missing, until=utc(2013, 1, 1))

        assert [minute_of(i) for i in (found.since, found.first, found.until)] == [wanted[9], wanted[10], wanted[15]]

    @given(interval=st.sampled_from([HOUR, MINUTE]), days=st.integers(1, 300))
    def test_never_more_than_a_slice(self, interval, days):
        """A long hole is asked for in pieces that every provider answers whole."""
        since = utc(2012, 1, 3, 22)
        until = since + timedelta(days=days)
        missing = survey(expected(calendar(), interval, since=since, until=until), [], [])

        found = first_slice(calendar(), interval, missing, until=until)

        assert found.since == since - timedelta(hours=1)
        assert found.until <= min(found.first + SLICES[interval] + timedelta(days=4), until)

    def test_nothing_missing_is_nothing_to_ask(self):
        """No missing stretch, no slice."""
        assert first_slice(calendar(), DAY, [], until=utc(2012, 1, 1)) is None

    def test_days_come_at_once(self):
        """Decades of days are one call at every provider."""
        wanted = expected(calendar(), DAY, since=utc(1995, 1, 1), until=utc(2012, 1, 1))

        found = first_slice(calendar(), DAY, survey(wanted, [], []), until=utc(2012, 1, 1))

        assert minute_of(found.first) == wanted[0]
        assert found.until == utc(2012, 1, 1)
