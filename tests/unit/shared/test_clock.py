from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import (
    MarketClock,
    MarketTime,
    StoppedClock,
    SystemClock,
    format_instant,
    parse_instant,
    sortable,
)
from shared.errors import ConfigurationError
from tests.builders import WALL

MARKET = datetime(2012, 3, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)
ZONES = st.integers(-12 * 60, 12 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
INSTANTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=ZONES)  # noqa: DTZ001 - zones are given


class TestInstants:
    @given(INSTANTS)
    def test_written_instant_is_read_as_itself(self, instant):
        """Both ways of writing an instant lose nothing and come back in UTC."""
        for text in (format_instant(instant), sortable(instant)):
            assert text.endswith("Z")
            assert parse_instant(text) == instant
            assert parse_instant(text).tzinfo is UTC

    @given(INSTANTS, INSTANTS)
    def test_text_order_is_time_order(self, one, other):
        """Lists in storage are sorted by text and mean time."""
        assert (sortable(one) < sortable(other)) == (one < other)

    def test_zone_is_understood(self):
        """An instant is the same wherever it was written."""
        assert parse_instant(" 2013-01-02T16:00:00-05:00 ") == datetime(2013, 1, 2, 21, tzinfo=UTC)

    @pytest.mark.parametrize(
        "text", ["", "today", "2013-01-02", "2013-01-02T21:00:00", "2013-13-02T00:00:00Z", "0001-01-01T00:00:00+05:00"]
    )
    def test_what_is_no_instant_is_refused(self, text):
        """A time without a zone means different things to different people; one we cannot hold means none."""
        with pytest.raises(ValueError):  # noqa: PT011 - the texts are Python's own
            parse_instant(text)


class TestMarketTime:
    @pytest.mark.parametrize("speed", ["1", "86400", "0", "0.5"])
    @pytest.mark.parametrize("end", ["", "..2013-03-01T00:00:00Z"])
    def test_setting_is_written_as_it_was_read(self, speed, end):
        """What is saved is what the next start reads."""
        text = f"2012-03-01T00:00:00Z@2026-11-21T09:00:00Z*{speed}{end}"

        assert str(MarketTime.parse(text)) == text

    @pytest.mark.parametrize(
        "text",
        [
            "now",
            "2012-03-01T00:00:00Z",
            "2012-03-01T00:00:00@2026-11-21T09:00:00Z*1",
            "2012-03-01T00:00:00Z@2026-11-21T09:00:00Z*-1",
            "2012-03-01T00:00:00Z@2026-11-21T09:00:00Z*fast",
            "2012-03-01T00:00:00Z@2026-11-21T09:00:00Z*1..",
        ],
    )
    def test_other_text_is_refused_with_an_example(self, text):
        """The error names the setting and shows one that works."""
        with pytest.raises(ConfigurationError, match="MARKET_CLOCK") as caught:
            MarketTime.parse(text)

        example = str(caught.value).rsplit(" ", 1)[1]
        assert MarketTime.parse(example).speed == 86400

    def test_market_runs_as_fast_as_told(self):
        """A wall second is a market day at the default speed, counted from the anchor."""
        time = MarketTime(market=MARKET, wall=WALL, speed=86400)

        assert time.at(WALL) == MARKET
        assert time.at(WALL + 1.5 * SECOND) == MARKET + timedelta(days=1, hours=12)

    def test_before_the_anchor_the_market_stands_still(self):
        """A wall clock that is set back never moves the market back beyond its anchor."""
        assert MarketTime(market=MARKET, wall=WALL, speed=2).at(WALL - timedelta(days=1)) == MARKET

    def test_at_the_end_it_stops(self):
        """At the last bar the market stands still, however late it gets."""
        end = MARKET + timedelta(days=3)
        time = MarketTime(market=MARKET, wall=WALL, speed=86400, end=end)

        assert time.at(WALL + 2 * SECOND) == MARKET + timedelta(days=2)
        assert time.at(WALL + 3 * SECOND) == end
        assert time.at(WALL + timedelta(days=400)) == end
        assert MarketTime(market=end + SECOND, wall=WALL, speed=1, end=end).at(WALL + SECOND) == end + SECOND

    @given(st.floats(0, 1e6), st.integers(0, 10**7), st.integers(0, 10**7))
    def test_it_never_runs_backwards(self, speed, one, other):
        """While the wall goes on, the market does or stands still."""
        time = MarketTime(market=MARKET, wall=WALL, speed=speed, end=MARKET + timedelta(days=4000))
        early, late = sorted((one, other))

        assert MARKET <= time.at(WALL + early * SECOND) <= time.at(WALL + late * SECOND)


class TestClocks:
    def test_market_clock_is_the_wall_unless_told(self):
        """Live, both clocks say the same."""
        wall = StoppedClock(WALL)
        clock = MarketClock(wall)

        assert clock.now() == WALL
        wall.at += SECOND
        assert clock.now() == WALL + SECOND

    def test_market_clock_follows_its_time(self):
        """Under replay it derives the market from the wall at every look, and can be given another time."""
        wall = StoppedClock(WALL)
        clock = MarketClock(wall, MarketTime(market=MARKET, wall=WALL, speed=60))

        wall.at += SECOND
        assert clock.now() == MARKET + timedelta(minutes=1)
        clock.time = MarketTime(market=MARKET, wall=wall.at, speed=0)
        wall.at += SECOND
        assert clock.now() == MARKET

    def test_wall_has_a_zone(self):
        """Every instant of this house is in UTC."""
        assert SystemClock().now().tzinfo is UTC


# --- from the market to the wall


@given(
    speed=st.floats(min_value=0.001, max_value=999_999),
    gone=st.timedeltas(min_value=timedelta(), max_value=timedelta(days=20_000)),
    end=st.none() | st.timedeltas(min_value=timedelta(), max_value=timedelta(days=20_000)),
)
def test_the_wall_instant_of_a_market_instant_is_when_the_market_gets_there(speed, gone, end):
    """At that instant the market is there, and just before it is not; None where it never gets there."""
    begin, wall = datetime(2012, 3, 1, tzinfo=UTC), datetime(2026, 11, 21, 9, tzinfo=UTC)
    time = MarketTime(market=begin, wall=wall, speed=speed, end=begin + end if end is not None else None)
    wanted = begin + gone

    at = time.wall_at(wanted)

    if end is not None and gone > end:
        assert at is None
    elif at is None:
        assert gone.total_seconds() / speed > timedelta(days=365 * 7900).total_seconds()
    else:
        # A market second of a fast replay is less than the wall's smallest step.
        step = timedelta(seconds=max(speed, 1) * 2e-6)
        assert time.at(at) >= wanted - timedelta(microseconds=1)
        assert at == wall or time.at(at - timedelta(microseconds=2)) < wanted + step


def test_a_market_that_stands_still_gets_nowhere():
    """What lies behind is there already, what lies ahead is never reached."""
    begin, wall = datetime(2012, 3, 1, tzinfo=UTC), datetime(2026, 11, 21, 9, tzinfo=UTC)
    time = MarketTime(market=begin, wall=wall, speed=0)

    assert time.wall_at(begin) == wall
    assert time.wall_at(begin - timedelta(days=1)) == wall
    assert time.wall_at(begin + timedelta(microseconds=1)) is None


def test_a_market_clock_that_is_the_wall_is_at_an_instant_when_it_is():
    """Without a replay market instants are the wall's, and run as fast."""
    clock = MarketClock(StoppedClock(datetime(2026, 11, 21, 9, tzinfo=UTC)))
    later = datetime(2026, 11, 22, tzinfo=UTC)

    assert (clock.wall_at(later), clock.speed) == (later, 1.0)
    clock.time = MarketTime(market=datetime(2012, 3, 1, tzinfo=UTC), wall=clock.now(), speed=86_400)
    assert (clock.wall_at(datetime(2012, 3, 2, tzinfo=UTC)), clock.speed) == (
        datetime(2026, 11, 21, 9, 0, 1, tzinfo=UTC),
        86_400,
    )
