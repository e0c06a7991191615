from datetime import UTC, date, datetime, timedelta

import pytest

from shared.market.models import Adjustment, Interval
from shared.market.rows import Rows
from shared.market.sessions import calendar

NOW = datetime(2024, 7, 8, 12, tzinfo=UTC)
NUMBERS = (5, 6, 4, 5, 10)


def rows_of(interval=Interval.DAY, now=NOW) -> Rows:
    return Rows(market=calendar(), interval=interval, now=now)


def instant(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


def fetched(rows: Rows):
    return rows.fetched(symbol="ACME", provider="somebody", adjustment=Adjustment.RAW)


def days(*prices: tuple[str, float]) -> Rows:
    """Daily rows that open and close at one price."""
    rows = rows_of()
    for day, price in prices:
        rows.add(day, date.fromisoformat(day), (price, price, price, price, 10))
    return rows


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ((0, 6, 0, 5, 10), "prices and split must be above 0"),
        ((5, 6, -4, 5, 10), "prices and split must be above 0"),
        ((5, 6, 4, 5, -1), "volume not below 0"),
        ((7, 6, 4, 5, 10), "between low 4.0 and high 6.0"),
        (("5", "inf", "4", "5", "10"), "every number must be finite"),
        ((5, 6, 4, None, 10), "close is 'None', not a number"),
        ((5, 6, 4, [[5]], 10), "close is list, not a number"),
        ((True, 6, 4, 5, 10), "open is 'True', not a number"),
        ((5, 6, 4, 5, 10**400), "volume is"),
    ],
)
def test_row_that_cannot_be_true_is_named(numbers, why):
    """An impossible row is left out, and its line says why."""
    rows = rows_of()
    rows.add("2024-07-05", date(2024, 7, 5), numbers)

    assert rows.bars == []
    [line] = fetched(rows).refused_rows
    assert line.startswith("2024-07-05: ")
    assert why in line


@pytest.mark.parametrize(
    ("opening", "why"),
    [
        (datetime(2024, 7, 5, 9, 30), "has no time zone"),  # noqa: DTZ001  # that is the point
        (datetime(2024, 7, 5, 13, 30, 30, tzinfo=UTC), "no 1m bar of XNYS opens at"),
        (datetime(1, 1, 1, tzinfo=UTC), "in no calendar"),
        (datetime(1960, 1, 4, 15, tzinfo=UTC), "the session table of XNYS covers"),
    ],
)
def test_time_that_names_no_bar(opening, why):
    """A time without a zone, off the grid or beyond the table is not guessed at: its row is named."""
    rows = rows_of(Interval.MINUTE)
    rows.add("a row", opening, NUMBERS)

    [line] = fetched(rows).refused_rows
    assert why in line


def test_label_that_could_not_be_stored():
    """Half a surrogate pair in a foreign label, and a label without end, are shown so that they can be stored."""
    rows = rows_of()
    rows.refuse("\ud800" + "x" * 1000, "no time")

    [line] = fetched(rows).refused_rows
    assert len(line.encode()) < 100


@pytest.mark.parametrize(("seconds", "count"), [(-1, 0), (0, 1)])
def test_bar_counts_from_its_close_on(seconds, count):
    """A bar that has not closed is no news: neither told nor refused."""
    rows = rows_of(now=instant("2024-07-03T17:00:00") + timedelta(seconds=seconds))
    rows.add("2024-07-03", date(2024, 7, 3), NUMBERS)

    assert len(rows.bars) == count
    assert fetched(rows).refused_rows == ()


@pytest.mark.parametrize(
    ("prices", "since", "hides"),
    [
        ([("2024-07-01", 100), ("2024-07-02", 50)], None, True),
        ([("2024-07-01", 50), ("2024-07-02", 100)], None, True),
        ([("2024-07-01", 100), ("2024-07-02", 81)], None, False),
        ([("2024-07-01", 100), ("2024-07-02", 50)], "2024-07-02T20:00:00", False),
        ([("2024-07-01", 100), ("2024-07-02", 50)], "2024-07-01T20:00:00", True),
        ([("2024-07-02", 50)], "2024-07-01T20:00:00", False),
        ([], None, False),
    ],
)
def test_jump_between_sessions_may_hide_a_split(prices, since, hides):
    """A price that moves by a quarter overnight is suspicious where it is news, in both directions."""
    assert days(*prices).may_hide_a_split(since=instant(since) if since else None) is hides


def test_jump_within_a_session_hides_no_split():
    """Nobody splits shares at noon."""
    rows = rows_of(Interval.MINUTE)
    rows.add("a", instant("2024-07-05T14:00:00"), (10, 10, 10, 10, 1))
    rows.add("b", instant("2024-07-05T14:01:00"), (5, 5, 5, 5, 1))

    assert not rows.may_hide_a_split(since=None)


def test_split_that_was_told_is_not_looked_for():
    """Where the row itself says that it was split, the jump is explained."""
    rows = rows_of()
    rows.add("a", date(2024, 7, 1), (100, 100, 100, 100, 1))
    rows.add("b", date(2024, 7, 2), (50, 50, 50, 50, 1), split="2.0")

    assert not rows.may_hide_a_split(since=None)


@pytest.mark.parametrize(
    ("splits", "marked"),
    [
        ([("2024-07-02", 2.0)], [1, 2, 1, 1]),
        ([("2024-07-04", 3.0)], [1, 1, 1, 3]),
        ([("2024-07-04", 3.0), ("2024-07-05", 2.0)], [1, 1, 1, 6]),
        ([("2024-07-01", 2.0)], [2, 1, 1, 1]),
        ([("1999-05-27", 2.0), ("2024-07-06", 2.0)], [1, 1, 1, 1]),
        ([], [1, 1, 1, 1]),
    ],
)
def test_split_is_marked_on_the_first_bar_after_it(splits, marked):
    """A split on a day without trading shows in the next bar; those before and after the bars are not theirs."""
    rows = days(("2024-07-01", 5), ("2024-07-02", 5), ("2024-07-03", 5), ("2024-07-05", 5))

    rows.mark_splits([(date.fromisoformat(day), factor) for day, factor in splits])

    assert [bar.split for bar in rows.bars] == marked


@pytest.mark.parametrize(("first", "marked"), [("13:30", [2.0, 1.0]), ("13:31", [1.0, 1.0])])
def test_split_is_not_marked_in_the_middle_of_its_session(first, marked):
    """Minutes that begin after the open do not hold the bar the split belongs to: marked twice it would count twice."""
    rows = rows_of(Interval.MINUTE)
    rows.add("a", instant(f"2024-07-02T{first}:00"), NUMBERS)
    rows.add("b", instant("2024-07-02T15:00:00"), NUMBERS)

    rows.mark_splits([(date(2024, 7, 2), 2.0)])

    assert [bar.split for bar in rows.bars] == marked


def test_no_bars_no_marks():
    """Splits of a series without bars are nobody's."""
    rows = rows_of()

    rows.mark_splits([(date(2024, 7, 2), 2.0)])

    assert fetched(rows).bars == ()
