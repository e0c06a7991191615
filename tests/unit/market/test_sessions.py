import hashlib
import json
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigurationError, InvalidPayloadError
from shared.market import sessions
from shared.market.models import Interval
from shared.market.sessions import Calendar, Session, calendar

NEW_YORK = ZoneInfo("America/New_York")
TABLE = Path(sessions.__file__).with_name("sessions.json")
TABLE_DIGEST = "235037425991d31d8445cd8e7f89cc612bf9929e4b199052aa1c96697a7c1849"

CALENDARS = st.sampled_from(["XNYS", "24/7"]).map(calendar)
INTERVALS = st.sampled_from(list(Interval))
DAYS = st.dates(date(1980, 1, 15), date(2035, 12, 15))
INSTANTS = st.datetimes(
    datetime(1980, 1, 15),  # noqa: DTZ001  hypothesis adds the zone itself
    datetime(2035, 12, 15),  # noqa: DTZ001
    timezones=st.just(UTC),
)


def wall(instant: datetime) -> str:
    return instant.astimezone(NEW_YORK).strftime("%Y-%m-%d %H:%M")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=NEW_YORK).astimezone(UTC)


def bars_of(market: Calendar, session: Session, interval: Interval) -> list[tuple[datetime, datetime]]:
    bars = []
    opened_at = session.opens_at
    while opened_at < session.closes_at:
        closed_at = market.bar_opening_at(interval, opened_at)
        bars.append((opened_at, closed_at))
        opened_at = closed_at
    return bars


def test_table_is_the_generated_one():
    """The table is written by make sessions, never by hand: a changed digest means somebody did."""
    content = json.loads(TABLE.read_bytes())

    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    assert hashlib.sha256(canonical).hexdigest() == TABLE_DIGEST


def test_table_says_where_it_comes_from_and_what_it_covers():
    """Whoever finds a wrong day in the table must know which library and version to ask."""
    content = json.loads(TABLE.read_bytes())

    assert content["source"].startswith("exchange_calendars ")
    assert (content["first"], content["last"]) == ("1980-01-01", "2035-12-31")
    assert TABLE.stat().st_size < 50_000


@pytest.mark.parametrize(
    ("day", "why"),
    [
        ("1985-09-27", "hurricane Gloria"),
        ("1994-04-27", "Nixon's funeral"),
        ("2001-09-11", "the attacks"),
        ("2001-09-12", "the attacks"),
        ("2001-09-13", "the attacks"),
        ("2001-09-14", "the attacks"),
        ("2004-06-11", "Reagan's funeral"),
        ("2007-01-02", "Ford's funeral"),
        ("2008-03-21", "Good Friday"),
        ("2012-10-29", "hurricane Sandy"),
        ("2012-10-30", "hurricane Sandy"),
        ("2018-12-05", "Bush's funeral"),
        ("2022-06-20", "Juneteenth, observed on Monday"),
        ("2023-06-19", "Juneteenth"),
        ("2024-03-29", "Good Friday"),
        ("2024-11-28", "Thanksgiving"),
        ("2024-12-25", "Christmas"),
        ("2025-01-09", "Carter's funeral"),
        ("2024-07-06", "a Saturday"),
        ("2024-07-07", "a Sunday"),
    ],
)
def test_closed_days(day, why):
    """On a holiday, a weekend or a day of mourning there is no session and no daily bar."""
    market = calendar()

    assert market.session(date.fromisoformat(day)) is None, why
    with pytest.raises(InvalidPayloadError, match=f"{day} is no session of XNYS"):
        market.bar_of_date(date.fromisoformat(day))


@pytest.mark.parametrize("day", ["2001-09-10", "2001-09-17", "2012-10-31", "2007-01-03", "2021-06-18"])
def test_open_days_beside_the_closed_ones(day):
    """The exchange reopens when history says it did; Juneteenth was no holiday before 2022."""
    assert calendar().session(date.fromisoformat(day)) is not None


@pytest.mark.parametrize(
    ("day", "opens", "closes"),
    [
        ("1980-12-24", "10:00", "14:00"),
        ("1985-09-26", "10:00", "16:00"),
        ("1985-09-30", "09:30", "16:00"),
        ("1992-11-27", "09:30", "14:00"),
        ("1999-12-31", "09:30", "13:00"),
        ("2003-12-26", "09:30", "13:00"),
        ("2012-11-23", "09:30", "13:00"),
        ("2013-07-03", "09:30", "13:00"),
        ("2024-11-29", "09:30", "13:00"),
        ("2024-12-24", "09:30", "13:00"),
        ("2024-12-26", "09:30", "16:00"),
    ],
)
def test_hours_on_the_exchange_wall(day, opens, closes):
    """Half days close early, and before 30 September 1985 the exchange opened at ten."""
    opened_at, closed_at = calendar().bar_of_date(date.fromisoformat(day))

    assert (wall(opened_at), wall(closed_at)) == (f"{day} {opens}", f"{day} {closes}")


@pytest.mark.parametrize(
    ("year", "before_spring", "after_spring", "before_autumn", "after_autumn"),
    [
        (1986, "04-25", "04-28", "10-24", "10-27"),
        (1999, "04-01", "04-05", "10-29", "11-01"),
        (2006, "03-31", "04-03", "10-27", "10-30"),
        (2007, "03-09", "03-12", "11-02", "11-05"),
        (2013, "03-08", "03-11", "11-01", "11-04"),
        (2024, "03-08", "03-11", "11-01", "11-04"),
    ],
)
def test_close_moves_with_daylight_saving(year, before_spring, after_spring, before_autumn, after_autumn):
    """The close is 16:00 in New York: 21:00 UTC in winter and 20:00 UTC in summer, whatever the year's rule."""
    market = calendar()

    def close(day: str) -> str:
        return market.bar_of_date(date.fromisoformat(f"{year}-{day}"))[1].strftime("%H:%M")

    assert [close(day) for day in (before_spring, after_spring, before_autumn, after_autumn)] == [
        "21:00",
        "20:00",
        "20:00",
        "21:00",
    ]


@pytest.mark.parametrize(
    ("year", "count"),
    [
        (1985, 252),
        (1996, 254),
        (2000, 252),
        (2001, 248),
        (2006, 251),
        (2008, 253),
        (2012, 250),
        (2013, 252),
        (2020, 253),
        (2022, 251),
        (2023, 250),
        (2024, 252),
        (2025, 250),
    ],
)
def test_sessions_in_a_year(year, count):
    """A year has as many sessions as the exchange held."""
    assert len(calendar().sessions(date(year, 1, 1), date(year, 12, 31))) == count


def test_sessions_include_both_ends():
    """The first and the last date asked for belong to the answer."""
    found = calendar().sessions(date(2024, 12, 23), date(2024, 12, 27))

    assert [session.date.day for session in found] == [23, 24, 26, 27]


def test_no_sessions_when_the_dates_are_the_wrong_way_round():
    """An empty span holds no session."""
    assert calendar().sessions(date(2024, 12, 27), date(2024, 12, 23)) == []
    assert calendar("24/7").sessions(date(2024, 12, 27), date(2024, 12, 23)) == []


def test_session_is_open_from_its_open_until_before_its_close():
    """A session covers its first instant and not its last."""
    market = calendar()
    session = market.session(date(2024, 7, 3))

    assert session is not None
    assert market.session_at(session.opens_at) == session
    assert market.session_at(session.closes_at - timedelta(microseconds=1)) == session
    assert market.session_at(session.opens_at - timedelta(microseconds=1)) is None
    assert market.session_at(session.closes_at) is None


@pytest.mark.parametrize(
    ("instant", "interval", "last", "following"),
    [
        ("2024-07-03T12:45", Interval.DAY, "2024-07-02 16:00", "2024-07-03 13:00"),
        ("2024-07-03T12:45", Interval.HOUR, "2024-07-03 12:30", "2024-07-03 13:00"),
        ("2024-07-03T12:45", Interval.MINUTE, "2024-07-03 12:45", "2024-07-03 12:46"),
        ("2024-07-03T13:00", Interval.HOUR, "2024-07-03 13:00", "2024-07-05 10:30"),
        ("2024-07-03T13:00", Interval.DAY, "2024-07-03 13:00", "2024-07-05 16:00"),
        ("2024-07-04T12:00", Interval.MINUTE, "2024-07-03 13:00", "2024-07-05 09:31"),
        ("2024-07-05T09:30", Interval.HOUR, "2024-07-03 13:00", "2024-07-05 10:30"),
        ("2024-07-05T10:30", Interval.HOUR, "2024-07-05 10:30", "2024-07-05 11:30"),
        ("2024-07-05T15:59", Interval.HOUR, "2024-07-05 15:30", "2024-07-05 16:00"),
        ("2024-07-05T09:30:30", Interval.MINUTE, "2024-07-03 13:00", "2024-07-05 09:31"),
    ],
)
def test_bar_closes_around_an_instant(instant, interval, last, following):
    """Hours run from the open and the last one ends with the session, early on a half day."""
    market = calendar()

    assert wall(market.last_bar_close(interval, at(instant))) == last
    assert wall(market.next_bar_close(interval, at(instant))) == following


@pytest.mark.parametrize(
    ("opened", "interval", "closed"),
    [
        ("2024-07-05T09:30", Interval.DAY, "2024-07-05 16:00"),
        ("2024-07-05T15:30", Interval.HOUR, "2024-07-05 16:00"),
        ("2024-07-03T12:30", Interval.HOUR, "2024-07-03 13:00"),
        ("2024-07-05T15:59", Interval.MINUTE, "2024-07-05 16:00"),
    ],
)
def test_bar_opening_at_an_instant(opened, interval, closed):
    """A bar's open says when it closes."""
    assert wall(calendar().bar_opening_at(interval, at(opened))) == closed


@pytest.mark.parametrize(
    ("opened", "interval"),
    [
        ("2024-07-05T00:00", Interval.DAY),
        ("2024-07-05T10:00", Interval.HOUR),
        ("2024-07-05T09:30:30", Interval.MINUTE),
        ("2024-07-05T16:00", Interval.MINUTE),
        ("2024-07-05T09:29", Interval.MINUTE),
        ("2024-07-04T09:30", Interval.DAY),
    ],
)
def test_no_bar_opens_off_the_grid(opened, interval):
    """An instant at which no bar opens is refused by name."""
    with pytest.raises(InvalidPayloadError, match=f"no {interval} bar of XNYS opens at 2024-07"):
        calendar().bar_opening_at(interval, at(opened))


def test_around_the_clock_every_utc_day_is_a_session():
    """Crypto and currencies never close: a day runs from midnight to midnight UTC, weekends too."""
    market = calendar("24/7")

    assert market.bar_of_date(date(2024, 7, 6)) == (
        datetime(2024, 7, 6, tzinfo=UTC),
        datetime(2024, 7, 7, tzinfo=UTC),
    )
    midnight = datetime(2024, 7, 7, tzinfo=UTC)
    assert market.previous_close(midnight).date == date(2024, 7, 6)
    assert market.next_close(midnight).date == date(2024, 7, 7)
    assert market.session_at(midnight) == market.session(date(2024, 7, 7))


@pytest.mark.parametrize("day", [date(1979, 12, 31), date(2036, 1, 1)])
def test_outside_the_table(day):
    """Beyond the table nobody guesses: the error says how to widen it."""
    market = calendar()
    noon = datetime(day.year, day.month, day.day, 17, tzinfo=UTC)

    for ask in (
        lambda: market.session(day),
        lambda: market.sessions(day, day),
        lambda: market.session_at(noon),
        lambda: market.next_close(noon),
        lambda: market.previous_close(noon),
        lambda: market.next_bar_close(Interval.HOUR, noon),
        lambda: market.last_bar_close(Interval.HOUR, noon),
    ):
        with pytest.raises(ConfigurationError, match="make sessions"):
            ask()


def test_edges_of_the_table():
    """The table has no close before its first session and none after its last."""
    market = calendar()

    with pytest.raises(ConfigurationError, match="1980-01-01 to 2035-12-31, not 1979-12-31"):
        market.previous_close(at("1980-01-02T12:00"))
    with pytest.raises(ConfigurationError, match="not 2036-01-01"):
        market.next_close(at("2035-12-31T16:00"))


def test_unknown_calendar():
    """A calendar we do not have is a mistake in the settings, and the error names those we have."""
    with pytest.raises(ConfigurationError, match="'XLON' is no calendar of ours: use XNYS or 24/7"):
        calendar("XLON")


@pytest.mark.parametrize("name", ["XNYS", "24/7"])
def test_instants_need_a_zone(name):
    """A time without a zone is no instant."""
    with pytest.raises(InvalidPayloadError, match="has no time zone"):
        calendar(name).previous_close(datetime(2024, 7, 5, 12))  # noqa: DTZ001  that is the point


def test_calendar_is_made_once():
    """Asking again costs nothing."""
    assert calendar() is calendar("XNYS")


@given(market=CALENDARS, instant=INSTANTS)
def test_closes_lie_around_every_instant(market, instant):
    """Every instant lies between the last close and the next, and no session closes in between."""
    before, after = market.previous_close(instant), market.next_close(instant)

    assert before.closes_at <= instant < after.closes_at
    assert market.next_close(before.closes_at) == after
    assert market.previous_close(after.closes_at) == after
    assert market.sessions(before.date, after.date) == [before, after]


@given(market=CALENDARS, interval=INTERVALS, instant=INSTANTS)
def test_bar_closes_lie_around_every_instant(market, interval, instant):
    """The next bar close follows the last one with nothing between them."""
    before, after = market.last_bar_close(interval, instant), market.next_bar_close(interval, instant)

    assert before <= instant < after
    assert market.next_bar_close(interval, before) == after
    assert market.last_bar_close(interval, after) == after
    assert market.last_bar_close(interval, after - timedelta(microseconds=1)) == before


@settings(max_examples=40)
@given(market=CALENDARS, interval=INTERVALS, day=DAYS)
def test_bars_tile_the_session(market, interval, day):
    """A session's bars follow each other without a gap, each ends where next_bar_close says, none is too long."""
    session = market.session(day)
    if session is None:
        return

    bars = bars_of(market, session, interval)

    assert bars[0][0] == session.opens_at
    assert bars[-1][1] == session.closes_at
    assert all(earlier[1] == later[0] for earlier, later in pairwise(bars))
    for opened_at, closed_at in bars:
        assert timedelta(0) < closed_at - opened_at <= interval.span
        assert market.next_bar_close(interval, opened_at) == closed_at
        assert market.session_at(opened_at) == session


@given(interval=INTERVALS, instant=INSTANTS)
def test_bar_closes_strictly_increase(interval, instant):
    """Stepping from close to close always moves forward, and lands in sessions only."""
    market = calendar()
    closes = [market.next_bar_close(interval, instant)]
    for _ in range(9):
        closes.append(market.next_bar_close(interval, closes[-1]))

    assert all(earlier < later for earlier, later in pairwise(closes))
    assert all(market.session_at(close - timedelta(microseconds=1)) for close in closes)
