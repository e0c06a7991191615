"""
Alpha Vantage: stock bars, end-of-day quotes, news, the earnings calendar, splits and dividends.

It answers everything with HTTP 200 and says no in prose; the key travels in the URL, the only place it takes it,
and comes back in one of those sentences. Prices are as traded, times are New York's, and an intraday row is
labelled by its start.
"""

import csv
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from pydantic import SecretStr

from shared.clock import Clock, SystemClock
from shared.errors import (
    ConfigurationError,
    DailyQuotaError,
    InvalidPayloadError,
    NotEntitledError,
    RateLimitedError,
    RefusedError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.http_client import HttpClient, key_of
from shared.market.adapters.answers import (
    Rule,
    above_zero,
    actions_of,
    clean,
    every,
    factor_of,
    fresh,
    json_of,
    judge,
    keyless,
    number_of,
    paid,
    readable,
)
from shared.market.models import (
    Adjustment,
    CorporateAction,
    EarningsDate,
    Fetched,
    Interval,
    NewsItem,
    Quote,
    ReportTime,
)
from shared.market.ports import Turn
from shared.market.rows import Rows
from shared.market.sessions import EXCHANGE, calendar
from shared.settings import Plan

BURST = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
QUOTA_SPENT = timedelta(hours=1)
"""When the day's calls are spent, ask again no sooner; nobody documents when the day begins."""
GRACE = timedelta(hours=12)
"""A quote is renewed once a day, some hours after the close."""

COMPACT_DAYS = timedelta(days=135)
"""How far back a compact daily answer surely reaches: 100 sessions are 20 weeks or more."""
COMPACT_MOST_DAYS = timedelta(days=160)
"""Further back no compact daily answer reaches."""
COMPACT_ROWS = 95
"""How many rows a compact answer surely holds: 100, less some slack."""
TRAILING = timedelta(days=29)
"""How far back an intraday answer reaches when no month is named: 30 days, less some slack."""
MONTHS = 6
"""How many months of intraday bars one fetch asks for; the next fetch goes on from there."""
MOST_NEWS = 1000
HORIZONS = {"3month": timedelta(days=85), "6month": timedelta(days=175)}
"""How far ahead an earnings calendar surely reaches; there is a 12month one above these."""

FULL = "outputsize=full"
"""The parameter that a key may be refused where it is allowed the function."""

REFUSALS = (
    # quota: the sentence that shows the key
    Rule(
        error=DailyQuotaError,
        says=("detected your api key",),
        tells="the day's calls to Alpha Vantage are spent",
        wait=QUOTA_SPENT,
    ),
    # throttle: these sentences speak of days and premium plans, too
    Rule(
        error=RateLimitedError,
        says=("spreading out", "per second"),
        tells="Alpha Vantage takes one request a second",
        wait=BURST,
    ),
    Rule(
        error=RateLimitedError,
        says=("calls per minute", "requests per minute", "call frequency", "call volume"),
        tells="Alpha Vantage asks for fewer requests a minute",
        wait=MINUTE,
    ),
    # quota again: the same without the key
    Rule(
        error=DailyQuotaError,
        says=("daily rate limit", "requests per day"),
        tells="the day's calls to Alpha Vantage are spent",
        wait=QUOTA_SPENT,
    ),
    # premium: a function, or one value of a parameter
    Rule(
        error=NotEntitledError,
        says=("premium endpoint", "premium feature"),
        tells="the Alpha Vantage plan ({plan}) does not include this call: see ALPHA_VANTAGE_PLAN",
    ),
    # auth
    Rule(
        error=ConfigurationError,
        says=("apikey is invalid or missing", "demo purposes"),
        tells="Alpha Vantage does not accept the key: set ALPHA_VANTAGE_KEY to yours",
    ),
    # invalid
    Rule(
        error=UnknownSymbolError,
        says=("invalid api call",),
        tells="Alpha Vantage knows no symbol {symbol}, or not for this call",
    ),
    Rule(
        error=RefusedError,
        says=("api function", "invalid inputs"),
        tells="Alpha Vantage says that our request makes no sense: this is our mistake",
    ),
    Rule(error=UnavailableError, tells="no verdict on what Alpha Vantage says: {said}"),
)
"""Every sentence it refuses with, in the order in which they can be told apart; the field decides nothing."""

_FIELDS = ("Information", "Note", "Error Message", "detail")
_NO_NEWS = "invalid inputs"
_ZONES = ("US/Eastern", "America/New_York")
_INTRADAY = {Interval.MINUTE: "1min", Interval.HOUR: "60min"}
_TIMES = {"pre-market": ReportTime.BEFORE_OPEN, "post-market": ReportTime.AFTER_CLOSE}

type _Request = dict[str, str]


class AlphaVantage:
    """
    The provider port over Alpha Vantage's one endpoint.

    *plan* is only named in refusals: what the key may ask for is found out by asking for the better call once.
    *market_clock* bounds the time of a quote, of which only the day is told, and judges its age.
    """

    name = "alpha_vantage"

    def __init__(
        self,
        *,
        base_url: str,
        key: SecretStr | str,
        plan: Plan,
        http: HttpClient | None = None,
        market: str = EXCHANGE,
        market_clock: Clock | None = None,
    ) -> None:
        self._url = base_url.rstrip("/") + "/query"
        self._key = key_of("ALPHA_VANTAGE_KEY", key)
        self._plan = plan
        self._http = http or HttpClient("Alpha Vantage")
        self._market = market
        self._clock = market_clock or SystemClock()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        """How many calls ``bars`` will make; a suspected split, and what this key is refused, takes one more each."""
        if interval is Interval.DAY:
            return 1
        return len(self._intraday_requests("", interval, since=since, until=now, now=now))

    async def bars(
        self,
        symbol: str,
        interval: Interval,
        *,
        since: datetime | None,
        now: datetime,
        turn: Turn,
        until: datetime | None = None,
    ) -> Fetched:
        """
        Fetch the bars that have closed by *now*; older ones than asked for may be among them.

        Intraday bars from long ago come some months at a time, oldest first. A key that is refused long answers gets
        what a short one holds, and NotEntitledError where that is nothing of what is asked for.
        """
        rows = Rows(market=calendar(self._market), interval=interval, now=now)
        begin = end = None
        if interval is Interval.DAY:
            knows_splits, begin = await self._daily(rows, symbol, since=since, until=until, now=now, turn=turn)
        else:
            knows_splits = False
            last = min(until or now, now)
            for request in self._intraday_requests(symbol, interval, since=since, until=last, now=now):
                found, is_cut = await self._minutes(request, turn)
                self._add_intraday(rows, found)
                begin = rows.bars[0].opened_at if is_cut and rows.bars else None
                self._refuse_before(begin, until)
                end = self._month_end(request, last)
        is_first = interval is Interval.DAY and since is None and bool(rows.bars)
        if not knows_splits and (is_first or rows.may_hide_a_split(since=since)):
            rows.mark_splits(await self._splits(symbol, turn))
        return rows.fetched(
            symbol=symbol, provider=self.name, adjustment=Adjustment.RAW, covers_since=begin, covers_through=end
        )

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        """Fetch the last price; without an entitlement it is the close, and is renewed once a day."""
        now = self._clock.now()
        market = calendar(self._market)

        def read(answer: Mapping[str, Any]) -> Quote:
            # With an entitlement the key goes on: "Global Quote - DATA DELAYED BY 15 MINUTES".
            found = _only(answer, "Global Quote")
            if not found:
                raise UnknownSymbolError(f"Alpha Vantage knows no symbol {symbol}")
            try:
                day = date.fromisoformat(found["07. latest trading day"])
                quote = Quote(
                    symbol=symbol,
                    price=float(found["05. price"]),
                    previous_close=above_zero(float(found["08. previous close"])),
                    as_of=min(market.bar_of_date(day)[1], self._clock.now()),
                    provider=self.name,
                )
            except (KeyError, TypeError, ValueError, ConfigurationError, InvalidPayloadError) as e:
                raise _unreadable(f"a quote of {symbol} that cannot be true ({clean(str(e))[:80]})") from e
            return fresh(quote, title="Alpha Vantage", market=market, now=now, grace=GRACE)

        return await self._ask(turn, {"function": "GLOBAL_QUOTE", "symbol": symbol}, read)

    async def news(self, symbol: str, *, since: datetime, until: datetime, turn: Turn) -> Sequence[NewsItem]:
        """
        Fetch articles about *symbol* published from *since* to *until*, oldest first, with a sentiment for it.

        There are at most a thousand of them: after the last of a thousand, ask again.
        """
        request = {
            "function": "NEWS_SENTIMENT",
            "tickers": symbol,
            "time_from": f"{since.astimezone(UTC):%Y%m%dT%H%M}",
            "time_to": f"{until.astimezone(UTC) + MINUTE:%Y%m%dT%H%M}",
            "sort": "EARLIEST",
            "limit": str(MOST_NEWS),
        }

        def read(answer: Mapping[str, Any]) -> list[NewsItem]:
            what = f"Alpha Vantage sent news of {symbol}"
            found = readable(answer.get("feed"), lambda row: _article(row, symbol), what=what)
            return sorted((n for n in found if since <= n.published_at <= until), key=lambda n: n.published_at)

        return await self._ask(turn, request, read)

    async def earnings(
        self, *, first: date, last: date, turn: Turn, symbol: str | None = None
    ) -> Sequence[EarningsDate]:
        """Fetch the reports due from *first* through *last*; Alpha Vantage knows only those still to come."""
        ahead = last - self._clock.now().date()
        horizon = next((name for name, reach in HORIZONS.items() if ahead <= reach), "12month")
        request = {"function": "EARNINGS_CALENDAR", "horizon": horizon}

        def read(answer: str) -> list[EarningsDate]:
            rows = list(csv.DictReader(answer.splitlines()))
            found = readable(rows, _report, what="Alpha Vantage sent reports")
            return sorted(
                (r for r in found if first <= r.day <= last and symbol in (None, r.symbol)),
                key=lambda r: (r.day, r.symbol),
            )

        return await self._ask(turn, request | ({"symbol": symbol} if symbol else {}), read, is_csv=True)

    async def actions(self, symbol: str, *, turn: Turn) -> Sequence[CorporateAction]:
        """Fetch every split and dividend known of *symbol*, oldest first, in two calls."""
        splits = await self._splits(symbol, turn)

        def read(answer: Mapping[str, Any]) -> list[tuple[date, float]]:
            return every(_data(answer), _dividend, what=f"Alpha Vantage sent dividends of {symbol}")

        dividends = await self._ask(turn, {"function": "DIVIDENDS", "symbol": symbol}, read)
        return actions_of(symbol, self.name, splits=splits, dividends=dividends)

    async def _splits(self, symbol: str, turn: Turn) -> list[tuple[date, float]]:
        def read(answer: Mapping[str, Any]) -> list[tuple[date, float]]:
            return every(_data(answer), _split, what=f"Alpha Vantage sent splits of {symbol}")

        return await self._ask(turn, {"function": "SPLITS", "symbol": symbol}, read)

    async def _daily(
        self, rows: Rows, symbol: str, *, since: datetime | None, until: datetime | None, now: datetime, turn: Turn
    ) -> tuple[bool, datetime | None]:
        """
        Gather the daily rows by the best call this key is not refused.

        Tells whether splits came with them, and since when the answer speaks for the asked range if not for all of it.
        """
        is_long = since is None or now - since > COMPACT_DAYS
        begins_at = None
        size = "full" if is_long else "compact"
        choices = [("TIME_SERIES_DAILY_ADJUSTED", size, "")]
        if is_long:
            choices.append(("TIME_SERIES_DAILY", "full", FULL))
        for function, outputsize, parameter in choices:
            if not turn.may(function, parameter):
                continue
            request = {"function": function, "symbol": symbol, "outputsize": outputsize}
            try:
                found = await self._ask(turn, request, _oldest_first, parameter=parameter)
            except NotEntitledError:
                continue  # the turn has learnt it; the next choice is smaller
            break
        else:
            function = "TIME_SERIES_DAILY"
            request = {"function": function, "symbol": symbol, "outputsize": "compact"}
            self._refuse_before(now - COMPACT_MOST_DAYS, until)
            found = await self._ask(turn, request, _oldest_first)
            if is_long and len(found) >= COMPACT_ROWS:
                begins_at = self._opening_of(found[0][0])
                self._refuse_before(begins_at, until)
        has_splits = function == "TIME_SERIES_DAILY_ADJUSTED"
        # The last bar of those known before is looked at again: it shows a revision, and a jump after it a split.
        known = since.astimezone(rows.market.zone).date().isoformat() if since else ""
        begin = max(bisect_right([label for label, _ in found], known) - 1, 0)
        for label, row in found[begin:]:
            try:
                day = date.fromisoformat(label)
            except ValueError:
                rows.refuse(label, "the label is no date")
                continue
            split = row.get("8. split coefficient", "1.0") if has_splits else 1.0
            rows.add(label, day, _numbers(row), split=split)
        return has_splits, begins_at

    def _refuse_before(self, begins_at: datetime | None, until: datetime | None) -> None:
        """
        Say no where nothing of what is asked for is within reach: an empty answer would say that there is nothing.

        Raises:
            NotEntitledError: all of it lies before *begins_at*.

        """
        if begins_at is not None and until is not None and until <= begins_at:
            raise NotEntitledError(
                f"the Alpha Vantage plan ({self._plan}) includes no such bars before {begins_at:%Y-%m-%d}: "
                "see ALPHA_VANTAGE_PLAN"
            )

    def _opening_of(self, label: str) -> datetime | None:
        try:
            return calendar(self._market).bar_of_date(date.fromisoformat(label))[0]
        except (ValueError, ConfigurationError, InvalidPayloadError):
            return None  # named as a row that cannot be true

    def _month_end(self, request: _Request, last: datetime) -> datetime | None:
        """Where the month that is asked for ends, if that is before the *last* instant wanted."""
        if "month" not in request:
            return None
        year, month = map(int, request["month"].split("-"))
        end = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=calendar(self._market).zone)
        return end.astimezone(UTC) if end < last else None

    async def _minutes(self, request: _Request, turn: Turn) -> tuple[list[tuple[str, Mapping[str, Any]]], bool]:
        """The rows, and whether there are older ones that this key does not get."""
        is_full = request["outputsize"] == "full"
        try:
            return await self._ask(turn, request, _intraday, parameter=FULL if is_full else ""), False
        except NotEntitledError:
            if not is_full or "month" in request:
                raise
        found = await self._ask(turn, request | {"outputsize": "compact"}, _intraday)
        return found, len(found) >= COMPACT_ROWS

    def _add_intraday(self, rows: Rows, found: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        for label, row in found:
            try:
                naive = datetime.fromisoformat(label)
            except ValueError:
                rows.refuse(label, "the label is no time")
                continue
            rows.add(label, naive.replace(tzinfo=rows.market.zone), _numbers(row))

    def _intraday_requests(
        self, symbol: str, interval: Interval, *, since: datetime | None, until: datetime, now: datetime
    ) -> list[_Request]:
        request = {
            "function": "TIME_SERIES_INTRADAY",
            "symbol": symbol,
            "interval": _INTRADAY[interval],
            "adjusted": "false",
            "extended_hours": "false",
            "outputsize": "full",
        }
        if since is None:
            return [request]
        if now - since <= TRAILING:
            few = now - since <= COMPACT_ROWS * interval.span
            return [request | {"outputsize": "compact" if few else "full"}]
        zone = calendar(self._market).zone
        months = _months(since.astimezone(zone).date(), max(since, until).astimezone(zone).date())
        return [request | {"month": month} for month in months[:MONTHS]]

    async def _ask[T](
        self, turn: Turn, request: _Request, read: Callable[[Any], T], *, parameter: str = "", is_csv: bool = False
    ) -> T:
        key = self._key.get_secret_value()
        async with turn(request["function"], parameter=parameter):
            answer = await self._http.get(
                self._url,
                params={**request, "apikey": key},
                headers={"Accept": "*/*"},
                url_is_secret=True,
            )
            body = keyless(answer.body, key)
            # A CSV request, too, is refused in JSON: what was asked for does not tell what came.
            found = json_of(body)
            said = _refusal(found)
            if said is not None:
                if request["function"] == "NEWS_SENTIMENT" and _NO_NEWS in said.lower():
                    return read({"feed": []})
                symbol = request.get("symbol") or request.get("tickers", "")
                raise classify(said, symbol=symbol, plan=self._plan, key=key)
            if answer.status == 429:
                raise RateLimitedError("Alpha Vantage answered 429", retry_after=MINUTE)
            if answer.status != 200:
                raise UnavailableError(f"Alpha Vantage answered {answer.status}")
            if is_csv and body.lstrip()[:7] == b"symbol,":
                return read(body.decode("utf-8", "replace"))
            if is_csv or not isinstance(found, dict):
                raise _unreadable(f"{len(body)} bytes that are no {'CSV' if is_csv else 'JSON object'}")
            return read(found)


def classify(text: str, *, symbol: str, plan: Plan, key: str) -> TroopError:
    """Turn one of Alpha Vantage's sentences into our error: the prose decides, not the field it came in."""
    return judge(REFUSALS, status=200, said=text, key=key, symbol=symbol, plan=plan)


def _refusal(found: object) -> str | None:
    return next((str(found[field]) for field in _FIELDS if field in found), None) if isinstance(found, dict) else None


def _unreadable(what: str) -> UnavailableError:
    return UnavailableError(f"Alpha Vantage sent {what}")


def _only(answer: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for name, value in answer.items():
        if name.startswith(prefix) and isinstance(value, dict):
            return value
    names = ", ".join(clean(name)[:20] for name in answer)[:80]
    raise _unreadable(f"no {prefix!r}, only {names or 'an empty object'}")


def _oldest_first(answer: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    rows = _only(answer, "Time Series")
    return [(label, row if isinstance(row, dict) else {}) for label, row in sorted(rows.items())]


def _intraday(answer: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    meta = answer.get("Meta Data")
    names = meta if isinstance(meta, dict) else {}
    zone = next((z for name, z in names.items() if name.endswith("Time Zone")), _ZONES[0])
    if zone not in _ZONES:
        raise _unreadable(f"bars in the zone {clean(zone)[:20]!r}, where we expect {_ZONES[0]}")
    return _oldest_first(answer)


def _numbers(row: Mapping[str, Any]) -> list[object]:
    volume = row.get("6. volume", row.get("5. volume"))
    return [row.get("1. open"), row.get("2. high"), row.get("3. low"), row.get("4. close"), volume]


def _data(answer: Mapping[str, Any]) -> object:
    # An object with nothing in it is how a symbol without any is answered.
    return answer.get("data") if answer else []


def _split(row: Mapping[str, Any]) -> tuple[date, float]:
    return date.fromisoformat(row["effective_date"]), factor_of(row["split_factor"], 1)


def _dividend(row: Mapping[str, Any]) -> tuple[date, float]:
    return date.fromisoformat(row["ex_dividend_date"]), paid(row["amount"])


def _article(row: Mapping[str, Any], symbol: str) -> NewsItem:
    shares = {clean(s["ticker"]): number_of(s.get("ticker_sentiment_score")) for s in row.get("ticker_sentiment", ())}
    sentiment = shares.get(symbol, number_of(row.get("overall_sentiment_score")))
    url = clean(row["url"])
    return NewsItem(
        news_id=url,
        published_at=datetime.strptime(row["time_published"], "%Y%m%dT%H%M%S").replace(tzinfo=UTC),
        title=clean(row["title"]),
        summary=clean(row.get("summary")),
        url=url,
        source=clean(row.get("source")),
        symbols=tuple(shares) or (symbol,),
        sentiment=sentiment if sentiment is not None and -1 <= sentiment <= 1 else None,
        provider=AlphaVantage.name,
    )


def _report(row: Mapping[str, Any]) -> EarningsDate | None:
    return EarningsDate(
        symbol=row["symbol"],
        day=date.fromisoformat(row["reportDate"]),
        time=_TIMES.get(row.get("timeOfTheDay") or "", ReportTime.UNKNOWN),
        eps_estimate=number_of(row.get("estimate")),
        eps_actual=None,
        revenue_estimate=None,
        revenue_actual=None,
        provider=AlphaVantage.name,
    )


def _months(first: date, last: date) -> list[str]:
    begin, end = first.year * 12 + first.month - 1, last.year * 12 + last.month - 1
    return [f"{n // 12}-{n % 12 + 1:02}" for n in range(begin, end + 1)]
