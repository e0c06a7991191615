"""
Finnhub: quotes, news, the earnings calendar on every plan; bars and splits on the paid ones.

It says no with HTTP status codes, tells in headers what is left of the minute, and its daily prices are already
divided by later splits. The key travels in a header.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from operator import itemgetter
from typing import Any

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
    above_zero,
    actions_of,
    clean,
    count_of,
    every,
    factor_of,
    fresh,
    instant_of_epoch,
    json_of,
    judge,
    keyless,
    number_of,
    readable,
    reset_of,
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
from shared.market.ports import Limits, Turn
from shared.market.rows import Rows
from shared.market.sessions import EXCHANGE, Calendar, calendar
from shared.settings import Plan

BURST = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
LONGEST_WAIT = timedelta(hours=1)
GRACE = timedelta(hours=1)
"""A quote is live: an hour after the close it is of that session."""
MONTH = timedelta(days=30)
"""How much intraday history one call may ask for."""
MONTHS = 6
"""How many months of intraday bars one fetch asks for; the next fetch goes on from there."""
BEGINNING = datetime(1980, 1, 2, tzinfo=UTC)

REFUSALS = (
    Rule(error=UnavailableError, status=range(500, 600), tells="Finnhub answered {status}"),
    # the plan: 403, formerly 401 with the same sentence
    Rule(
        error=NotEntitledError,
        says=("have access",),
        tells="the Finnhub plan ({plan}) does not include this call: see FINNHUB_PLAN",
    ),
    # the key: with an empty one the refusal is a 429 that invites us to sign up
    Rule(error=ConfigurationError, status=(401,), tells="Finnhub does not accept the key: set FINNHUB_KEY to yours"),
    Rule(
        error=ConfigurationError, says=("sign up",), tells="Finnhub does not accept the key: set FINNHUB_KEY to yours"
    ),
    Rule(
        error=NotEntitledError,
        status=(403,),
        tells="the Finnhub plan ({plan}) does not include this call: see FINNHUB_PLAN",
    ),
    Rule(error=RateLimitedError, status=(429,), tells="Finnhub asks us to slow down"),
    Rule(error=RateLimitedError, says=("limit reached",), tells="Finnhub asks us to slow down"),
    Rule(error=UnknownSymbolError, says=("symbol",), tells="Finnhub does not serve the symbol {symbol}"),
    Rule(error=RefusedError, status=range(400, 500), tells="Finnhub refused with {status}: {said}"),
    Rule(error=UnavailableError, tells="no verdict on {status} and what Finnhub says: {said}"),
)
"""Every refusal it is known to give, judged from the top."""

_RESOLUTIONS = {Interval.DAY: "D", Interval.HOUR: "60", Interval.MINUTE: "1"}


class Finnhub:
    """
    The provider port over Finnhub's REST API.

    *plan* is only named in refusals. *clock* is the wall, which Finnhub's windows run by; *market_clock* judges
    how old a quote is.
    """

    name = "finnhub"

    def __init__(
        self,
        *,
        base_url: str,
        key: SecretStr | str,
        plan: Plan,
        http: HttpClient | None = None,
        market: str = EXCHANGE,
        clock: Clock | None = None,
        market_clock: Clock | None = None,
    ) -> None:
        self._url = base_url.rstrip("/") + "/"
        self._key = key_of("FINNHUB_KEY", key)
        self._plan = plan
        self._http = http or HttpClient("Finnhub")
        self._market = market
        self._clock = clock or SystemClock()
        self._market_clock = market_clock or SystemClock()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        """How many calls ``bars`` will make; a suspected split among raw bars takes one more."""
        return len(_windows(interval, since=since, until=now))

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
        Fetch the bars that have closed by *now*: daily ones adjusted for splits, the others as traded.

        Intraday bars from long ago come some months at a time, oldest first.
        """
        market = calendar(self._market)
        rows = Rows(market=market, interval=interval, now=now)
        last = min(until or now, now)
        windows = _windows(interval, since=since, until=last)
        for begin, end in windows:
            candles = await self._ask(
                turn,
                "stock/candle",
                _candles,
                symbol=symbol,
                resolution=_RESOLUTIONS[interval],
                **{"from": int(begin.timestamp()), "to": int(end.timestamp())},
            )
            for opened, *numbers in candles:
                label = f"t={str(opened)[:20]}"
                try:
                    instant = datetime.fromtimestamp(opened, UTC)
                    opening = _session_date(instant, market) if interval is Interval.DAY else instant
                except (TypeError, ValueError, OverflowError, OSError):
                    rows.refuse(label, "the label is no time")
                    continue
                rows.add(f"{label} ({opening})", opening, numbers)
        if interval is Interval.DAY:
            return rows.fetched(symbol=symbol, provider=self.name, adjustment=Adjustment.SPLIT)
        if rows.may_hide_a_split(since=since):
            rows.mark_splits(await self._splits(symbol, turn))
        through = windows[-1][1]
        return rows.fetched(
            symbol=symbol,
            provider=self.name,
            adjustment=Adjustment.RAW,
            covers_through=through if through < last else None,
        )

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        """Fetch the last price."""
        now = self._market_clock.now()

        def read(answer: object) -> Quote:
            found = _object(answer)
            try:
                price = float(found["c"])
                if price == 0:
                    raise UnknownSymbolError(f"Finnhub knows no symbol {symbol}: its price is 0")
                quote = Quote(
                    symbol=symbol,
                    price=price,
                    previous_close=above_zero(found.get("pc")),
                    as_of=instant_of_epoch(found.get("t")),
                    provider=self.name,
                )
            except (KeyError, TypeError, ValueError, OverflowError, InvalidPayloadError) as e:
                raise _unreadable(f"a quote of {symbol} that cannot be true ({clean(str(e))[:80]})") from e
            return fresh(quote, title="Finnhub", market=calendar(self._market), now=now, grace=GRACE)

        return await self._ask(turn, "quote", read, symbol=symbol)

    async def news(self, symbol: str, *, since: datetime, until: datetime, turn: Turn) -> Sequence[NewsItem]:
        """Fetch articles about *symbol* published from *since* to *until*, oldest first; none is rated."""

        def read(answer: object) -> list[NewsItem]:
            what = f"Finnhub sent news of {symbol}"
            found = readable(answer, lambda row: _article(row, symbol), what=what)
            return sorted((n for n in found if since <= n.published_at <= until), key=lambda n: n.published_at)

        return await self._ask(
            turn,
            "company-news",
            read,
            symbol=symbol,
            **{"from": since.astimezone(UTC).date().isoformat(), "to": until.astimezone(UTC).date().isoformat()},
        )

    async def earnings(
        self, *, first: date, last: date, turn: Turn, symbol: str | None = None
    ) -> Sequence[EarningsDate]:
        """Fetch the reports due from *first* through *last*, with results once they are known."""

        def read(answer: object) -> list[EarningsDate]:
            rows = _object(answer).get("earningsCalendar")
            found = readable(rows, _report, what="Finnhub sent reports")
            return sorted(
                (r for r in found if first <= r.day <= last and symbol in (None, r.symbol)),
                key=lambda r: (r.day, r.symbol),
            )

        params: dict[str, str | int] = {"from": first.isoformat(), "to": last.isoformat()}
        return await self._ask(turn, "calendar/earnings", read, **params | ({"symbol": symbol} if symbol else {}))

    async def actions(self, symbol: str, *, turn: Turn) -> Sequence[CorporateAction]:
        """Fetch every split known of *symbol*, oldest first; dividends are not asked for: they weigh ten calls."""
        return actions_of(symbol, self.name, splits=await self._splits(symbol, turn))

    async def _splits(self, symbol: str, turn: Turn) -> list[tuple[date, float]]:
        def read(answer: object) -> list[tuple[date, float]]:
            return every(answer, _split, what=f"Finnhub sent splits of {symbol}")

        last = self._market_clock.now().date()
        return await self._ask(
            turn,
            "stock/split",
            read,
            symbol=symbol,
            **{"from": BEGINNING.date().isoformat(), "to": last.isoformat()},
        )

    async def _ask[T](self, turn: Turn, endpoint: str, read: Callable[[object], T], **params: str | int) -> T:
        key = self._key.get_secret_value()
        symbol = str(params.get("symbol", ""))
        # Foreign exchanges are refused in the words in which a whole endpoint is.
        parameter = f"symbol=*.{symbol.rpartition('.')[2]}" if "." in symbol else ""
        async with turn(endpoint, parameter=parameter) as call:
            answer = await self._http.get(
                self._url + endpoint,
                params=params,
                headers={"X-Finnhub-Token": key, "Accept": "*/*"},
            )
            now = self._clock.now()
            call.limits = limits(answer.headers, now)
            body = keyless(answer.body, key)
            found = json_of(body)
            refusal = found.get("error") if isinstance(found, dict) else None
            if answer.status != 200 or refusal is not None:
                raise classify(
                    answer.status,
                    str(refusal or body[:500].decode("utf-8", "replace")),
                    wait=_wait(answer.headers, now),
                    symbol=symbol,
                    plan=self._plan,
                    key=key,
                )
            if not isinstance(found, dict | list):
                raise _unreadable(f"{len(body)} bytes that are no JSON object or list")
            return read(found)


def classify(status: int, text: str, *, wait: timedelta, symbol: str, plan: Plan, key: str) -> TroopError:
    """Turn a status and what was said with it into our error; *wait* is how long a throttle lasts."""
    return judge(REFUSALS, status=status, said=text, key=key, symbol=symbol, plan=plan, wait=wait)


def limits(headers: Mapping[str, str], now: datetime) -> Limits | None:
    """What the headers tell of the minute's window, if anything."""
    amount, left = count_of(headers, "x-ratelimit-limit"), count_of(headers, "x-ratelimit-remaining")
    resets_at = reset_of(headers, "x-ratelimit-reset", now)
    if resets_at is not None and resets_at - now > LONGEST_WAIT:
        resets_at = None  # no minute ends then
    if amount is None and left is None and resets_at is None:
        return None
    return Limits(amount=amount, left=left, resets_at=resets_at, span=MINUTE)


def _wait(headers: Mapping[str, str], now: datetime) -> timedelta:
    if count_of(headers, "x-ratelimit-remaining"):
        return BURST  # calls are left in this minute, so it was the gate of 30 a second
    seconds = number_of(headers.get("retry-after"))
    if seconds is None:
        resets_at = reset_of(headers, "x-ratelimit-reset", now)
        if resets_at is None:
            return MINUTE
        seconds = (resets_at - now).total_seconds()
    return timedelta(seconds=min(max(seconds, BURST.total_seconds()), LONGEST_WAIT.total_seconds()))


def _unreadable(what: str) -> UnavailableError:
    return UnavailableError(f"Finnhub sent {what}")


def _object(answer: object) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise _unreadable("a list where we expect an object")
    return answer


def _candles(answer: object) -> list[tuple[Any, ...]]:
    """Rows of time, open, high, low, close, volume, oldest first."""
    found = _object(answer)
    if found.get("s") == "no_data":
        return []
    try:
        rows = list(zip(*(found[name] for name in "tohlcv"), strict=True))
        rows.sort(key=itemgetter(0))
    except (KeyError, TypeError, ValueError) as e:
        raise _unreadable(f"bars whose columns do not match ({type(e).__name__})") from e
    return rows


def _article(row: Mapping[str, Any], symbol: str) -> NewsItem:
    url = clean(row["url"])
    related = tuple(s for s in clean(row.get("related")).replace(" ", "").split(",") if s)
    return NewsItem(
        news_id=str(row["id"]) if isinstance(row.get("id"), int) and row["id"] else url,
        published_at=instant_of_epoch(row["datetime"]),
        title=clean(row["headline"]),
        summary=clean(row.get("summary")),
        url=url,
        source=clean(row.get("source")),
        symbols=related or (symbol,),
        sentiment=None,
        provider=Finnhub.name,
    )


def _report(row: Mapping[str, Any]) -> EarningsDate:
    told = row.get("hour")
    return EarningsDate(
        symbol=clean(row["symbol"]),
        day=date.fromisoformat(row["date"]),
        time=ReportTime(told) if told in ("bmo", "amc", "dmh") else ReportTime.UNKNOWN,
        eps_estimate=number_of(row.get("epsEstimate")),
        eps_actual=number_of(row.get("epsActual")),
        revenue_estimate=number_of(row.get("revenueEstimate")),
        revenue_actual=number_of(row.get("revenueActual")),
        provider=Finnhub.name,
    )


def _split(row: Mapping[str, Any]) -> tuple[date, float]:
    return date.fromisoformat(row["date"]), factor_of(row["toFactor"], row["fromFactor"])


def _session_date(instant: datetime, market: Calendar) -> date:
    # Daily stamps are seen at midnight UTC, at the exchange's midnight and at its open.
    return instant.date() if instant.time() == time() else instant.astimezone(market.zone).date()


def _windows(interval: Interval, *, since: datetime | None, until: datetime) -> list[tuple[datetime, datetime]]:
    if interval is Interval.DAY:
        begin = max(since, BEGINNING) if since else BEGINNING
        return [(datetime.combine(begin.astimezone(UTC).date(), time(), UTC), until)]
    begin = max(since - interval.span, BEGINNING) if since else until - MONTH
    windows: list[tuple[datetime, datetime]] = []
    while len(windows) < MONTHS and (begin < until or not windows):
        end = max(min(begin + MONTH, until), begin)
        windows.append((begin, end))
        begin = end + timedelta(seconds=1)
    return windows
