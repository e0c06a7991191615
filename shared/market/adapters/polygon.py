"""
Polygon, which now calls itself Massive: bars, whole days of all symbols, news, splits and dividends.

It says no with HTTP status codes. Prices are asked for as traded, a bar is stamped with its start in milliseconds,
and what is empty is left out of an answer. The key travels in a header.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import SecretStr

from shared.clock import Clock, SystemClock
from shared.errors import (
    ConfigurationError,
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
    actions_of,
    clean,
    every,
    factor_of,
    fresh,
    instant_of_epoch,
    json_of,
    judge,
    keyless,
    number_of,
    paid,
    readable,
)
from shared.market.models import Adjustment, Bar, CorporateAction, Fetched, Interval, NewsItem, Quote, symbol_of
from shared.market.ports import Turn
from shared.market.rows import Rows
from shared.market.sessions import EXCHANGE, Calendar, calendar
from shared.settings import Plan

MINUTE = timedelta(minutes=1)
HALF = timedelta(minutes=30)
GRACE = timedelta(hours=12)
"""The previous day's bar may come hours after the close: a free key gets it the day after."""
BEGINNING = datetime(2003, 9, 10, tzinfo=UTC)
"""Nothing older is sold."""
FREE_HISTORY = timedelta(days=730)
MONTHS = timedelta(days=60)
"""How much intraday history one call may ask for: 50,000 minutes count, those before and after the session too."""
SLICES = 6
"""How many slices of intraday bars one fetch asks for; the next fetch goes on from there."""
MOST_ROWS = 50_000
MOST_PAGES = 10
MOST_NEWS = 1000

TODAY = "to=today"
"""A free key is refused any range that reaches into today, whatever else it holds."""
OLD = "from=older than two years"
"""A free key is refused any range that ends more than two years ago."""

DATES = ("data timeframe", "before end of day")
"""What it says where the plan includes the call, but not for these dates."""

_DATES = "the Polygon plan ({plan}) does not include these dates: see POLYGON_PLAN"
_PLAN = "the Polygon plan ({plan}) does not include this: see POLYGON_PLAN"
_KEY = "Polygon does not accept the key: set POLYGON_KEY to yours"

REFUSALS = (
    Rule(error=UnavailableError, status=range(500, 600), tells="Polygon answered {status}"),
    Rule(error=RateLimitedError, status=(429,), tells="Polygon asks for fewer requests a minute", wait=MINUTE),
    # its sentence also praises dearer plans, so it stands before those
    Rule(
        error=RateLimitedError,
        says=("exceeded the maximum requests",),
        tells="Polygon asks for fewer requests a minute",
        wait=MINUTE,
    ),
    Rule(error=ConfigurationError, status=(401,), tells=_KEY),
    Rule(error=ConfigurationError, says=("unknown api key", "api key was not provided"), tells=_KEY),
    # dates: of this one request, and never of the endpoint
    Rule(error=RefusedError, says=DATES, tells=_DATES),
    Rule(error=NotEntitledError, status=(403,), tells=_PLAN),
    Rule(error=NotEntitledError, says=("not_authorized", "not entitled", "your plan doesn't include"), tells=_PLAN),
    Rule(error=UnknownSymbolError, status=(404,), says=("ticker",), tells="Polygon knows no symbol {symbol}"),
    Rule(error=RefusedError, status=range(400, 500), tells="Polygon refused with {status}: {said}"),
    Rule(error=UnavailableError, tells="no verdict on {status} and what Polygon says: {said}"),
)
"""Every refusal it is known to give, judged from the top."""

_HOSTS = ("api.polygon.io", "api.massive.com")
_OK = ("OK", "DELAYED")
_GRID = {Interval.DAY: "1/day", Interval.HOUR: "30/minute", Interval.MINUTE: "1/minute"}
"""Its hours begin on the clock's full hour, ours with the session: they are put together of half hours."""
_RATINGS = {"positive": 1.0, "neutral": 0.0, "negative": -1.0}

type _Row = Mapping[str, Any]


class Polygon:
    """
    The provider port over Polygon's REST API, and a whole day's bars of all symbols in one call.

    *plan* is only named in refusals: that a key is refused today's bars, or those of years ago, is found out by
    asking once. *market_clock* bounds the time of a quote, of which only the day is told, and judges its age.
    """

    name = "polygon"

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
        self._url = base_url.rstrip("/")
        self._key = key_of("POLYGON_KEY", key)
        self._plan = plan
        self._http = http or HttpClient("Polygon")
        self._market = market
        self._clock = market_clock or SystemClock()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        """How many calls ``bars`` will make; the splits of a first or a suspicious fetch take one more."""
        begin, end = self._range(interval, since=since, until=now)
        return len(_slices(interval, begin, end)) + (interval is Interval.DAY and since is None)

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
        Fetch the bars that have closed by *now*, as traded.

        Intraday bars from long ago come some months at a time, oldest first. Where the key is refused today's
        bars or very old ones, the rest is fetched; when nothing is left to ask for, that is NotEntitledError.
        """
        market = calendar(self._market)
        rows = Rows(market=market, interval=interval, now=now)
        today = datetime.combine(now.astimezone(market.zone).date(), time(), market.zone)
        oldest = now - FREE_HISTORY
        begin, end = self._range(interval, since=since, until=min(until or now, now))
        pending = _slices(interval, begin, end)
        through = pending[-1][1] if pending else end
        since_when = None
        while pending:
            first, last = pending.pop(0)
            parameter = OLD if last < oldest else TODAY if last >= today else ""
            try:
                found = await self._range_of(symbol, interval, first, last, turn=turn, parameter=parameter)
            except NotEntitledError:
                if parameter == OLD and end > oldest:
                    pending, since_when = _slices(interval, oldest, end), oldest
                    through = pending[-1][1]
                    continue
                before = market.previous_close(today).closes_at
                if parameter != TODAY or before <= first or (since is not None and before <= since):
                    if parameter == TODAY and rows.bars:
                        break
                    raise
                pending = [(first, before)]
                continue
            _add(rows, interval, found)
        is_first = interval is Interval.DAY and since is None and bool(rows.bars)
        if is_first or rows.may_hide_a_split(since=since):
            rows.mark_splits(await self._splits(symbol, turn))
        return rows.fetched(
            symbol=symbol,
            provider=self.name,
            adjustment=Adjustment.RAW,
            covers_since=since_when,
            covers_through=through if through < end else None,
        )

    async def grouped(self, day: date, *, turn: Turn) -> Mapping[str, Bar]:
        """
        Fetch the daily bars of all symbols of one session, as traded, in one call; what cannot be true is left out.

        Raises also InvalidPayloadError where the market stays closed that day.
        """
        market = calendar(self._market)
        _, closed_at = market.bar_of_date(day)
        now = self._clock.now()

        def read(answer: _Row) -> dict[str, Bar]:
            def bar_of(row: _Row) -> tuple[str, Bar]:
                rows = Rows(market=market, interval=Interval.DAY, now=now)
                rows.add("", day, [row.get(name) for name in "ohlcv"])
                return symbol_of(row["T"]), rows.bars[0]

            return dict(readable(_results(answer), bar_of, what=f"Polygon sent bars of {day}"))

        if closed_at > now:
            return {}
        is_today = now.astimezone(market.zone).date() <= day
        parameter = TODAY if is_today else OLD if closed_at < now - FREE_HISTORY else ""
        path = f"/v2/aggs/grouped/locale/us/market/stocks/{day}"
        where = (path, {"adjusted": "false"})
        return await self._ask(turn, "grouped", where, read, symbol="", parameter=parameter)

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        """Fetch the close of the last session that is over: no plan we know sells less."""
        now = self._clock.now()
        market = calendar(self._market)

        def read(answer: _Row) -> Quote:
            found = _results(answer)
            if not found:
                raise UnknownSymbolError(f"Polygon knows no symbol {symbol}")
            try:
                day = instant_of_epoch(found[0]["t"] / 1000).astimezone(market.zone).date()
                last = Quote(
                    symbol=symbol,
                    price=float(found[0]["c"]),
                    previous_close=None,
                    as_of=min(market.bar_of_date(day)[1], self._clock.now()),
                    provider=self.name,
                )
            except (
                KeyError,
                TypeError,
                ValueError,
                OverflowError,
                ConfigurationError,
                InvalidPayloadError,
            ) as e:
                raise _unreadable(f"a quote of {symbol} that cannot be true ({clean(str(e))[:80]})") from e
            return fresh(last, title="Polygon", market=market, now=now, grace=GRACE)

        path = f"/v2/aggs/ticker/{quote(symbol, safe='')}/prev"
        return await self._ask(turn, "prev", (path, {"adjusted": "false"}), read, symbol=symbol)

    async def news(self, symbol: str, *, since: datetime, until: datetime, turn: Turn) -> Sequence[NewsItem]:
        """
        Fetch articles about *symbol* published from *since* to *until*, oldest first.

        Sentiments are words: positive is 1, neutral 0, negative -1. After the last of a thousand, ask again.
        """

        def read(answer: _Row) -> list[NewsItem]:
            what = f"Polygon sent news of {symbol}"
            found = readable(_results(answer), lambda row: _article(row, symbol), what=what)
            return sorted((n for n in found if since <= n.published_at <= until), key=lambda n: n.published_at)

        params: dict[str, str | int] = {
            "ticker": symbol,
            "published_utc.gte": f"{since.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "published_utc.lte": f"{until.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "order": "asc",
            "sort": "published_utc",
            "limit": MOST_NEWS,
        }
        return await self._ask(turn, "reference/news", ("/v2/reference/news", params), read, symbol=symbol)

    async def actions(self, symbol: str, *, turn: Turn) -> Sequence[CorporateAction]:
        """Fetch every split and dividend known of *symbol*, oldest first, in two calls or a few."""
        splits = await self._splits(symbol, turn)
        rows = await self._pages(
            turn,
            "reference/dividends",
            "/v3/reference/dividends",
            symbol=symbol,
            ticker=symbol,
            order="asc",
            sort="ex_dividend_date",
            limit=1000,
        )
        dividends = every(rows, _dividend, what=f"Polygon sent dividends of {symbol}")
        return actions_of(symbol, self.name, splits=splits, dividends=dividends)

    async def _splits(self, symbol: str, turn: Turn) -> list[tuple[date, float]]:
        rows = await self._pages(
            turn,
            "reference/splits",
            "/v3/reference/splits",
            symbol=symbol,
            ticker=symbol,
            order="asc",
            sort="execution_date",
            limit=1000,
        )
        return every(rows, _split, what=f"Polygon sent splits of {symbol}")

    def _range(self, interval: Interval, *, since: datetime | None, until: datetime) -> tuple[datetime, datetime]:
        """From the last bar known before, which is looked at again, to the last that has closed."""
        end = calendar(self._market).last_bar_close(interval, until)
        if since is not None:
            return (max(since - interval.span, BEGINNING) if since < end else end), end
        return (BEGINNING if interval is Interval.DAY else end - MONTHS), end

    async def _range_of(
        self, symbol: str, interval: Interval, first: datetime, last: datetime, *, turn: Turn, parameter: str
    ) -> list[_Row]:
        zone = calendar(self._market).zone
        if interval is Interval.DAY:
            begin, end = (at.astimezone(zone).date().isoformat() for at in (first, last))
        else:
            begin, end = (str(int(at.timestamp() * 1000)) for at in (first, last - timedelta(milliseconds=1)))
        return await self._pages(
            turn,
            "aggs",
            f"/v2/aggs/ticker/{quote(symbol, safe='')}/range/{_GRID[interval]}/{begin}/{end}",
            symbol=symbol,
            parameter=parameter,
            adjusted="false",
            sort="asc",
            limit=MOST_ROWS,
        )

    async def _pages(
        self, turn: Turn, endpoint: str, path: str, *, symbol: str, parameter: str = "", **params: str | int
    ) -> list[_Row]:
        """All results of a call, over as many pages as they take."""
        found: list[_Row] = []

        def read(answer: _Row) -> tuple[str, dict[str, str]] | None:
            found.extend(_results(answer))
            following = answer.get("next_url")
            return self._following(following) if following else None

        here: tuple[str, Mapping[str, str | int]] = (path, params)
        for _ in range(MOST_PAGES):
            following = await self._ask(turn, endpoint, here, read, symbol=symbol, parameter=parameter)
            if following is None:
                return found
            here = following
        raise _unreadable(f"more than {MOST_PAGES} pages of {endpoint}")

    def _following(self, url: object) -> tuple[str, dict[str, str]]:
        """
        Where the next page lies on our own base: the key goes nowhere else.

        Raises:
            UnavailableError: it lies elsewhere.

        """
        try:
            there, ours = urlsplit(str(url)), urlsplit(self._url)
            is_ours = (there.scheme, there.netloc) == (ours.scheme, ours.netloc) and there.path.startswith(ours.path)
            is_twin = there.scheme == "https" and there.netloc in _HOSTS and ours.netloc in _HOSTS
            query = dict(parse_qsl(there.query))
        except ValueError as e:
            raise _unreadable("a next page that is no address") from e
        if not is_ours and not is_twin:
            raise _unreadable("a next page on another host, where our key does not go")
        query.pop("apiKey", None)
        return there.path.removeprefix(ours.path), query

    async def _ask[T](
        self,
        turn: Turn,
        endpoint: str,
        where: tuple[str, Mapping[str, str | int]],
        read: Callable[[_Row], T],
        *,
        symbol: str,
        parameter: str = "",
    ) -> T:
        path, params = where
        key = self._key.get_secret_value()
        async with turn(endpoint, parameter=parameter):
            answer = await self._http.get(
                self._url + path,
                params=params,
                headers={"Authorization": f"Bearer {key}", "Accept": "*/*"},
            )
            body = keyless(answer.body, key)
            found = json_of(body)
            if answer.status != 200 or (isinstance(found, dict) and found.get("status", "OK") not in _OK):
                raise classify(
                    answer.status, _said(found), symbol=symbol, plan=self._plan, key=key, parameter=parameter
                )
            if not isinstance(found, dict):
                raise _unreadable(f"{len(body)} bytes that are no JSON object")
            return read(found)


def classify(status: int, text: str, *, symbol: str, plan: Plan, key: str, parameter: str = "") -> TroopError:
    """
    Turn a status and what was said with it into our error.

    Refused dates are remembered only under the *parameter* that stands for them: without one, the refusal of a
    single range would be taken for that of the endpoint.
    """
    error = judge(REFUSALS, status=status, said=text, key=key, symbol=symbol, plan=plan)
    if parameter and any(phrase in text.lower() for phrase in DATES):
        return NotEntitledError(str(error))
    return error


def _said(found: object) -> str:
    if not isinstance(found, dict):
        return ""
    return " ".join(str(found[name]) for name in ("status", "error", "message") if found.get(name))


def _unreadable(what: str) -> UnavailableError:
    return UnavailableError(f"Polygon sent {what}")


def _results(answer: _Row) -> list[_Row]:
    # What is empty is left out, or null; then the counts that stand beside it tell nothing.
    rows = answer.get("results")
    if rows is None and "status" in answer:
        return []
    if not isinstance(rows, list):
        raise _unreadable("results that are no list")
    return [row if isinstance(row, dict) else {} for row in rows]


def _slices(interval: Interval, begin: datetime, end: datetime) -> list[tuple[datetime, datetime]]:
    if begin >= end:
        return []
    if interval is Interval.DAY:
        return [(begin, end)]
    slices: list[tuple[datetime, datetime]] = []
    while begin < end and len(slices) < SLICES:
        slices.append((begin, min(begin + MONTHS, end)))
        begin += MONTHS
    return slices


def _add(rows: Rows, interval: Interval, found: Sequence[_Row]) -> None:
    timed: list[tuple[datetime, _Row]] = []
    for row in found:
        try:
            timed.append((instant_of_epoch(row["t"] / 1000), row))
        except (KeyError, TypeError, ValueError, OverflowError):
            stamp = row.get("t")
            rows.refuse(f"t={str(stamp)[:20] if isinstance(stamp, str | int) else '?'}", "the label is no time")
    timed.sort(key=lambda pair: pair[0])
    if interval is Interval.HOUR:
        timed = _hours(rows.market, timed)
    for at, row in timed:
        opening = at.astimezone(rows.market.zone).date() if interval is Interval.DAY else at
        rows.add(f"t={row['t']} ({at:%Y-%m-%d %H:%M})", opening, [row.get(name) for name in "ohlcv"])


def _hours(market: Calendar, halves: Sequence[tuple[datetime, _Row]]) -> list[tuple[datetime, _Row]]:
    """Put half hours together to the hours that begin with the session; what is none of them stays as it is."""
    hours: dict[datetime, _Row] = {}
    others: list[tuple[datetime, _Row]] = []
    seen: set[datetime] = set()
    for at, row in halves:
        opens_at = _hour_of(market, at)
        if opens_at is None or at in seen:
            others.append((at, row))
        else:
            hours[opens_at] = _joined(hours[opens_at], row) if opens_at in hours else row
        seen.add(at)
    return sorted([*hours.items(), *others], key=lambda pair: pair[0])


def _hour_of(market: Calendar, at: datetime) -> datetime | None:
    try:
        session = market.session_at(at)
    except (ConfigurationError, OverflowError):
        return None
    if session is None or (at - session.opens_at) % HALF:
        return None
    return at - (at - session.opens_at) % Interval.HOUR.span


def _joined(first: _Row, second: _Row) -> _Row:
    high, higher, low, lower, volume, more = (number_of(row.get(name)) for name in "hlv" for row in (first, second))
    if high is None or higher is None or low is None or lower is None or volume is None or more is None:
        return {"t": first["t"]}  # named as a row that cannot be true
    return {
        "t": first["t"],
        "o": first.get("o"),
        "h": max(high, higher),
        "l": min(low, lower),
        "c": second.get("c"),
        "v": volume + more,
    }


def _article(row: _Row, symbol: str) -> NewsItem:
    published_at = datetime.fromisoformat(row["published_utc"])
    insights = {i["ticker"]: i.get("sentiment") for i in row.get("insights") or ()}
    url = clean(row["article_url"])
    return NewsItem(
        news_id=clean(row.get("id")) or url,
        published_at=published_at.astimezone(UTC) if published_at.tzinfo else published_at.replace(tzinfo=UTC),
        title=clean(row["title"]),
        summary=clean(row.get("description")),
        url=url,
        source=clean((row.get("publisher") or {}).get("name")),
        symbols=tuple(clean(t) for t in row.get("tickers") or ()) or (symbol,),
        sentiment=_RATINGS.get(clean(insights.get(symbol))),
        provider=Polygon.name,
    )


def _split(row: _Row) -> tuple[date, float]:
    return date.fromisoformat(row["execution_date"]), factor_of(row["split_to"], row["split_from"])


def _dividend(row: _Row) -> tuple[date, float]:
    return date.fromisoformat(row["ex_dividend_date"]), paid(row["cash_amount"])
