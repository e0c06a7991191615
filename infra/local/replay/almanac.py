"""
What no package has recorded: earnings dates and news, made up by rule and said to be.

The same symbol has the same reports and articles in every run. Dates come from the session table and articles
tell of recorded closes, so nothing speaks of bars that have not closed; what a company earned is invented.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from hashlib import blake2b

from infra.local.replay.tapes import Tapes
from shared.errors import ConfigurationError
from shared.market.models import Interval, ReportTime
from shared.market.sessions import EXCHANGE, Session, calendar

SOURCE = "TROOP replay"
NOTICE = "TROOP replay: made up by rule, nobody reported or wrote this"

_AHEAD = timedelta(days=366)
"""How far ahead of the market's now a report is known to be due."""
_FIRST_DAY, _LAST_DAY = 12, 14
"""Reports of a quarter fall between the 12th of its first month and the 14th of the next."""
_MONTHS = (1, 4, 7, 10)
_WEEK = timedelta(days=7)
_MONTH = timedelta(days=31)
_ARTICLES = (2, 3, 4)
_MORNING = 7 * 60
_DAYTIME = 12 * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One company's quarterly report; ``out_at`` is the market instant from which its results are known."""

    symbol: str
    day: date
    time: ReportTime
    out_at: datetime
    year: int
    quarter: int
    fiscal_end: date
    eps_estimate: float
    eps_actual: float
    revenue_estimate: int
    revenue_actual: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Article:
    """One article about one symbol; ``sentiment`` lies between -1 and 1."""

    number: int
    symbol: str
    published_at: datetime
    title: str
    summary: str
    sentiment: float

    @property
    def url(self) -> str:
        """An address that nobody can own."""
        return f"https://replay.example/news/{self.number}"


class Almanac:
    """The reports and articles of every symbol of the tapes, as far as they are known at the market's now."""

    def __init__(self, tapes: Tapes) -> None:
        self._tapes = tapes
        self._reports: dict[tuple[str, int, int], Report | None] = {}

    def now(self) -> datetime:
        """The market's now."""
        return self._tapes.now()

    def has_reports(self, symbol: str) -> bool:
        """Whether a symbol is a company's: crypto and currencies report nothing."""
        return self._tapes.knows(symbol) and self._tapes.trades_at(symbol) == EXCHANGE

    def reports(self, first: date, last: date, symbol: str | None = None) -> list[Report]:
        """The reports due from *first* through *last*, of one symbol or of all, in the order they come out."""
        symbols = [symbol] if symbol is not None else list(self._tapes.names)
        last = min(last, (self.now() + _AHEAD).date())
        found = [
            report
            for one in symbols
            if self.has_reports(one)
            for report in self._of(one, first, last)
            if first <= report.day <= last
        ]
        return sorted(found, key=lambda report: (report.out_at, report.symbol))

    def came_out(self, after: datetime, until: datetime) -> list[Report]:
        """The reports that came out later than *after* and no later than *until*."""
        reports = self.reports(after.date() - timedelta(days=2), until.date() + timedelta(days=2))
        return [report for report in reports if after < report.out_at <= until]

    def articles_of_all(self, since: datetime, until: datetime) -> list[Article]:
        """What was published about any symbol in that time, but no more than the last month of it."""
        until = min(until, self.now())
        since = max(since, until - _MONTH)
        return [article for symbol in self._tapes.names for article in self.articles(symbol, since, until)]

    def articles(self, symbol: str, since: datetime, until: datetime) -> list[Article]:
        """What was published about a symbol from *since* to *until*, oldest first."""
        first = self._tapes.first_at(symbol)
        if first is None:
            return []
        since, until = max(since, first), min(until, self.now())
        monday = since.date() - timedelta(days=since.weekday() + 1)
        found = []
        while monday <= until.date():
            found += [one for one in self._of_week(symbol, monday) if since <= one.published_at <= until]
            monday += _WEEK
        return sorted(found, key=lambda article: (article.published_at, article.number))

    def _of(self, symbol: str, first: date, last: date) -> Iterator[Report]:
        begun = self._tapes.first_at(symbol)
        if begun is None or first > last:
            return
        first = max(first, begun.date())
        for year in range(first.year - 1, last.year + 1):
            for month in _MONTHS:
                if date(year, month, 1) > last or date(year, month, 1) + timedelta(days=62) < first:
                    continue
                key = (symbol, year, month)
                if key not in self._reports:
                    self._reports[key] = _report(*key)
                report = self._reports[key]
                if report is not None and report.out_at >= begun:
                    yield report

    def _of_week(self, symbol: str, monday: date) -> Iterator[Article]:
        zone = calendar(EXCHANGE).zone
        dice = _Dice(f"news|{symbol}|{monday}")
        for _ in range(_ARTICLES[dice.below(len(_ARTICLES))]):
            day = monday + timedelta(days=dice.below(5))
            minute = _MORNING + dice.below(_DAYTIME)
            local = datetime.combine(day, time(minute // 60, minute % 60), zone)
            article = self._article(symbol, local.astimezone(UTC), dice.below(2**31))
            if article is not None:
                yield article

    def _article(self, symbol: str, at: datetime, number: int) -> Article | None:
        """An article about the last two closes before *at*; None when there were not two."""
        for interval in Interval:
            view = self._tapes.view(symbol, interval)
            place = bisect_right(view.tape.closes, at, 0, view.count) - 1 if view else -1
            if view is None or place < 1:
                continue
            bars, shares = view.tape.bars, view.tape.shares
            before = bars[place - 1].close * shares[place - 1] / shares[place]
            change = bars[place].close / before - 1
            name = self._tapes.names[symbol]
            return Article(
                number=number,
                symbol=symbol,
                published_at=at,
                title=f"{name} last closed at {bars[place].close:.2f} ({change:+.2%})",
                summary=f"{symbol} closed its last {interval} bar of {view.tape.local_date(place)} at "
                f"{bars[place].close:.2f}, after {before:.2f}. {NOTICE}.",
                sentiment=round(max(min(change * 10, 1.0), -1.0), 6),
            )
        return None


class _Dice:
    """Numbers that depend on a text alone."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._throws = 0

    def below(self, bound: int) -> int:
        """A number from 0 to below *bound*."""
        self._throws += 1
        digest = blake2b(f"{self._text}|{self._throws}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) % bound

    def between(self, low: float, high: float) -> float:
        """A number from *low* to *high*."""
        return low + (high - low) * self.below(1_000_001) / 1_000_000


def _report(symbol: str, year: int, month: int) -> Report | None:
    """The report of the quarter that ended with *month*; None outside the session table."""
    try:
        following = date(year, month + 1, _LAST_DAY)
        sessions = calendar(EXCHANGE).sessions(date(year, month, _FIRST_DAY), following)
    except ConfigurationError:
        return None
    dice = _Dice(f"earnings|{symbol}|{year}|{month}")
    session = sessions[dice.below(len(sessions))]
    habit = _Dice(f"earnings|{symbol}")
    moment = (ReportTime.BEFORE_OPEN, ReportTime.AFTER_CLOSE, ReportTime.AFTER_CLOSE, ReportTime.DURING)[habit.below(4)]
    fiscal_end = date(year, month, 1) - timedelta(days=1)
    quarters = (fiscal_end.year - 2000) * 4 + fiscal_end.month // 3
    growth = 1.012**quarters
    eps = round(habit.between(0.2, 2.5) * growth * dice.between(0.9, 1.1), 2)
    revenue = round(habit.between(1e9, 3e10) * growth * dice.between(0.95, 1.05))
    return Report(
        symbol=symbol,
        day=session.date,
        time=moment,
        out_at=_out_at(session, moment, dice),
        year=fiscal_end.year,
        quarter=fiscal_end.month // 3,
        fiscal_end=fiscal_end,
        eps_estimate=eps,
        eps_actual=round(eps * dice.between(0.88, 1.15), 2),
        revenue_estimate=revenue,
        revenue_actual=round(revenue * dice.between(0.95, 1.07)),
    )


def _out_at(session: Session, moment: ReportTime, dice: _Dice) -> datetime:
    match moment:
        case ReportTime.BEFORE_OPEN:
            return session.opens_at - timedelta(minutes=60 + dice.below(90))
        case ReportTime.AFTER_CLOSE:
            return session.closes_at + timedelta(minutes=5 + dice.below(55))
        case _:
            return session.opens_at + timedelta(minutes=30 + dice.below(120))
