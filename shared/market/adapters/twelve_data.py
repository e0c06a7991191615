"""
Twelve Data: bars, quotes, the earnings calendar, splits and dividends, paid for in credits.

It says no in the body, with a code that counts whatever the HTTP status is. Prices are asked for divided by later
splits and nothing else, intraday times in UTC, and a row is labelled by its start. The key travels in a header.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
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
    count_of,
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
from shared.market.models import (
    Adjustment,
    CorporateAction,
    EarningsDate,
    Fetched,
    Interval,
    Quote,
    ReportTime,
)
from shared.market.ports import Limits, Turn
from shared.market.rows import Rows
from shared.market.sessions import EXCHANGE, Calendar, calendar
from shared.settings import Plan

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
GRACE = timedelta(hours=1)
"""A quote is live: an hour after the close it is of that session."""

ROWS_A_CREDIT = 100
"""Every hundred rows bill a credit more; the two observations of it disagree, this is the dearer one."""
MOST_ROWS = {"free": 800}
"""How many rows one call may ask for: what the credits of one minute pay, or else it could never be made."""
MOST_ROWS_PAID = 5000
"""How many rows an answer holds on any plan."""
SLICES = 3
"""How many calls one fetch makes; the next fetch goes on from there."""
BEGINNING = datetime(1980, 1, 2, tzinfo=UTC)
REACH = {Interval.DAY: timedelta(days=1100), Interval.HOUR: timedelta(days=150), Interval.MINUTE: timedelta(days=30)}
"""How much history a first fetch brings."""

_PLAN = "the Twelve Data plan ({plan}) does not include this: see TWELVE_DATA_PLAN"
_KEY = "Twelve Data does not accept the key: set TWELVE_DATA_KEY to yours"

REFUSALS = (
    # credits: both sentences go on to praise dearer plans
    Rule(error=DailyQuotaError, says=("api credits for the day",), tells="the day's credits at Twelve Data are spent"),
    Rule(
        error=RateLimitedError,
        says=("run out of api credits",),
        tells="the minute's credits at Twelve Data are spent",
    ),
    Rule(error=RateLimitedError, status=(429,), tells="Twelve Data asks us to slow down"),
    # the plan: of a symbol, which says nothing of the endpoint, or of the endpoint
    Rule(
        error=UnknownSymbolError,
        says=("this symbol is available",),
        tells="the Twelve Data plan ({plan}) does not include the symbol {symbol}: see TWELVE_DATA_PLAN",
    ),
    Rule(error=NotEntitledError, status=(403,), tells=_PLAN),
    Rule(error=NotEntitledError, says=("available starting with", "available exclusively with"), tells=_PLAN),
    # the key
    Rule(error=ConfigurationError, status=(401,), tells=_KEY),
    Rule(error=ConfigurationError, says=("**apikey** parameter is",), tells=_KEY),
    # the request
    Rule(
        error=UnknownSymbolError,
        status=(400, 404),
        says=("**symbol**", "symbol not found"),
        tells="Twelve Data knows no symbol {symbol}",
    ),
    Rule(error=RefusedError, status=range(400, 500), tells="Twelve Data refused with {status}: {said}"),
    Rule(error=UnavailableError, status=range(500, 600), tells="Twelve Data answered {status}"),
    Rule(error=UnavailableError, tells="no verdict on {status} and what Twelve Data says: {said}"),
)
"""Every refusal it is known to give, judged from the top by the body's code."""

_NO_DATA = "no data is available on the specified dates"
_INTERVALS = {Interval.DAY: "1day", Interval.HOUR: "1h", Interval.MINUTE: "1min"}
_TIMES = {
    "pre market": ReportTime.BEFORE_OPEN,
    "before open": ReportTime.BEFORE_OPEN,
    "after hours": ReportTime.AFTER_CLOSE,
    "after close": ReportTime.AFTER_CLOSE,
    "during market": ReportTime.DURING,
}
_RATIO = re.compile(r"(\d+(?:\.\d+)?)-for-(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slice:
    begin: datetime
    end: datetime
    rows: int


class TwelveData:
    """
    The provider port over Twelve Data's REST API.

    *plan* bounds the rows of one call (``MOST_ROWS``) and is named in refusals. *clock* is the wall, which the
    windows run by; *market_clock* judges how old a quote is.
    """

    name = "twelve_data"

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
        self._key = key_of("TWELVE_DATA_KEY", key)
        self._plan = plan
        self._http = http or HttpClient("Twelve Data")
        self._market = market
        self._clock = clock or SystemClock()
        self._market_clock = market_clock or SystemClock()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        """How many calls ``bars`` will make; each weighs a credit per hundred rows."""
        return len(self._slices(interval, since=since, until=now))

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
        Fetch the bars that have closed by *now*, divided by later splits.

        A long history comes some slices at a time, oldest first. Nothing is asked where no bar has closed.
        """
        rows = Rows(market=calendar(self._market), interval=interval, now=now)
        last = min(until or now, now)
        parts = self._slices(interval, since=since, until=last)
        for part in parts:
            for label, row in await self._slice(symbol, interval, part, turn):
                try:
                    at = date.fromisoformat(label[:10]) if interval is Interval.DAY else _utc(label)
                except ValueError:
                    rows.refuse(label, "the label is no time")
                    continue
                rows.add(label, at, [row.get(name) for name in ("open", "high", "low", "close", "volume")])
        is_cut = bool(parts) and parts[-1].end < rows.market.last_bar_close(interval, last)
        return rows.fetched(
            symbol=symbol,
            provider=self.name,
            adjustment=Adjustment.SPLIT,
            covers_through=parts[-1].end if is_cut else None,
        )

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        """Fetch the last price."""
        now = self._market_clock.now()
        market = calendar(self._market)

        def read(found: Mapping[str, Any]) -> Quote:
            try:
                quote = Quote(
                    symbol=symbol,
                    price=float(found["close"]),
                    previous_close=above_zero(found.get("previous_close")),
                    as_of=self._told_at(found, market),
                    provider=self.name,
                )
            except (KeyError, TypeError, ValueError, OverflowError, ConfigurationError, InvalidPayloadError) as e:
                raise _unreadable(f"a quote of {symbol} that cannot be true ({clean(str(e))[:80]})") from e
            return fresh(quote, title="Twelve Data", market=market, now=now, grace=GRACE)

        return await self._ask(turn, "quote", read, symbol=symbol)

    async def earnings(
        self, *, first: date, last: date, turn: Turn, symbol: str | None = None
    ) -> Sequence[EarningsDate]:
        """Fetch the reports due from *first* through *last* in the United States; revenues are not told."""

        def read(found: Mapping[str, Any]) -> list[EarningsDate]:
            days = found.get("earnings")
            if not isinstance(days, dict):
                raise _unreadable("reports that are told by no day")
            rows = [(day, row) for day, rows in days.items() for row in (rows if isinstance(rows, list) else [None])]
            reports = readable(rows, _report, what="Twelve Data sent reports")
            return sorted(
                (r for r in reports if first <= r.day <= last and symbol in (None, r.symbol)),
                key=lambda r: (r.day, r.symbol),
            )

        return await self._ask(
            turn,
            "earnings_calendar",
            read,
            start_date=first.isoformat(),
            end_date=last.isoformat(),
            country="United States",
        )

    async def actions(self, symbol: str, *, turn: Turn) -> Sequence[CorporateAction]:
        """Fetch every split and dividend known of *symbol*, oldest first, in two calls; dividends as paid."""

        def splits(found: Mapping[str, Any]) -> list[tuple[date, float]]:
            return every(found.get("splits"), _split, what=f"Twelve Data sent splits of {symbol}")

        def dividends(found: Mapping[str, Any]) -> list[tuple[date, float]]:
            return every(found.get("dividends"), _dividend, what=f"Twelve Data sent dividends of {symbol}")

        told = await self._ask(turn, "splits", splits, symbol=symbol, range="full")
        paid_out = await self._ask(turn, "dividends", dividends, symbol=symbol, range="full", adjust="false")
        return actions_of(symbol, self.name, splits=told, dividends=paid_out)

    async def _slice(
        self, symbol: str, interval: Interval, part: _Slice, turn: Turn
    ) -> list[tuple[str, Mapping[str, Any]]]:
        zone = calendar(self._market).zone
        if interval is Interval.DAY:
            # The last day of a range is seen to be left out.
            start = part.begin.astimezone(zone).date().isoformat()
            end = (part.end.astimezone(zone).date() + DAY).isoformat()
        else:
            start, end = (f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%S}" for at in (part.begin, part.end))
        return await self._ask(
            turn,
            "time_series",
            _oldest_first,
            units=math.ceil(part.rows / ROWS_A_CREDIT),
            symbol=symbol,
            interval=_INTERVALS[interval],
            start_date=start,
            end_date=end,
            outputsize=part.rows,
            adjust="splits",
            timezone="UTC",
        )

    def _slices(self, interval: Interval, *, since: datetime | None, until: datetime) -> list[_Slice]:
        """Cut the sessions after *since* so that one call's credits pay for each slice; the oldest come first."""
        market = calendar(self._market)
        most = MOST_ROWS.get(self._plan, MOST_ROWS_PAID) - 1  # one row more is asked for, see below
        end = market.last_bar_close(interval, until)
        # The last bar of those known before is looked at again: it shows a revision.
        begin = max(since - interval.span, BEGINNING) if since else end - REACH[interval]
        if since and end <= since:
            return []
        slices: list[_Slice] = []
        first, last = (at.astimezone(market.zone).date() for at in (begin, end))
        for session in market.sessions(first, last):
            opens, closes = max(session.opens_at, begin), min(session.closes_at, end)
            if interval is Interval.DAY:
                opens, closes = session.opens_at, session.closes_at
            if opens >= closes or closes > end:
                continue
            rows = 1 if interval is Interval.DAY else math.ceil((closes - opens) / interval.span)
            if slices and slices[-1].rows + rows <= most:
                slices[-1] = _Slice(begin=slices[-1].begin, end=closes, rows=slices[-1].rows + rows)
            elif len(slices) == SLICES:
                break
            else:
                slices.append(_Slice(begin=opens, end=closes, rows=rows))
        # Newest rows come first: where the end counts after all, one more row keeps the oldest.
        return [_Slice(begin=s.begin, end=s.end, rows=s.rows + 1) for s in slices]

    def _told_at(self, found: Mapping[str, Any], market: Calendar) -> datetime:
        # "timestamp" is when the day's bar opened; what tells the minute is younger and not always there.
        if found.get("last_quote_at") is not None:
            return instant_of_epoch(found["last_quote_at"])
        day = date.fromisoformat(found["datetime"][:10])
        return min(market.bar_of_date(day)[1], self._market_clock.now())

    async def _ask[T](
        self,
        turn: Turn,
        endpoint: str,
        read: Callable[[Mapping[str, Any]], T],
        *,
        units: int = 1,
        **params: str | int,
    ) -> T:
        key = self._key.get_secret_value()
        async with turn(endpoint, units=units) as call:
            answer = await self._http.get(
                self._url + endpoint,
                params=params,
                headers={"Authorization": f"apikey {key}", "Accept": "*/*"},
            )
            now = self._clock.now()
            call.limits = limits(answer.headers, now)
            found = json_of(keyless(answer.body, key))
            code = _code(found, answer.status)
            if code != 200:
                said = str(found.get("message")) if isinstance(found, dict) else ""
                if endpoint == "time_series" and _NO_DATA in said.lower():
                    return read({"values": []})
                raise classify(code, said, now=now, symbol=str(params.get("symbol", "")), plan=self._plan, key=key)
            if not isinstance(found, dict):
                raise _unreadable(f"{len(answer.body)} bytes that are no JSON object")
            return read(found)


def classify(code: int, text: str, *, now: datetime, symbol: str, plan: Plan, key: str) -> TroopError:
    """
    Turn a code and what was said with it into our error.

    A throttle lasts to the end of the wall's minute; a spent day is taken to end at midnight UTC.
    """
    midnight = datetime.combine(now.astimezone(UTC).date() + DAY, time(), UTC)
    return judge(
        REFUSALS,
        status=code,
        said=text,
        key=key,
        symbol=symbol,
        plan=plan,
        wait=_minute_end(now) - now,
        day=midnight - now,
    )


def limits(headers: Mapping[str, str], now: datetime) -> Limits | None:
    """What the headers tell of the minute's credits, if anything."""
    used, left = count_of(headers, "api-credits-used"), count_of(headers, "api-credits-left")
    if left is None:
        return None
    amount = used + left if used is not None else None
    return Limits(amount=amount, left=left, resets_at=_minute_end(now), span=MINUTE)


def _minute_end(now: datetime) -> datetime:
    return now.replace(second=0, microsecond=0) + MINUTE


def _code(found: object, status: int) -> int:
    """What the body says counts; an error whose code cannot be read is no success either."""
    if isinstance(found, dict) and (found.get("status") == "error" or "code" in found):
        code = found.get("code")
        if isinstance(code, int) and code != 200:
            return code
        return status if status != 200 else 0
    return status


def _unreadable(what: str) -> UnavailableError:
    return UnavailableError(f"Twelve Data sent {what}")


def _oldest_first(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    rows = found.get("values")
    if not isinstance(rows, list):
        raise _unreadable("bars that are no list")
    told = [row if isinstance(row, dict) else {} for row in rows]
    return sorted(((str(row.get("datetime")), row) for row in told), key=lambda pair: pair[0])


def _utc(label: str) -> datetime:
    at = datetime.fromisoformat(label)
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _report(told: tuple[str, Mapping[str, Any]]) -> EarningsDate:
    day, row = told
    return EarningsDate(
        symbol=clean(row["symbol"]),
        day=date.fromisoformat(day),
        time=_TIMES.get(clean(row.get("time")).lower(), ReportTime.UNKNOWN),
        eps_estimate=number_of(row.get("eps_estimate")),
        eps_actual=number_of(row.get("eps_actual")),
        revenue_estimate=None,
        revenue_actual=None,
        provider=TwelveData.name,
    )


def _split(row: Mapping[str, Any]) -> tuple[date, float]:
    # Against all intuition "4-for-1" has from_factor 4, to_factor 1 and ratio 0.25.
    factor = factor_of(row["from_factor"], row["to_factor"])
    said = _RATIO.search(clean(row.get("description")))
    if said and not math.isclose(factor, factor_of(said[1], said[2]), rel_tol=1e-3):
        raise ValueError("its factors contradict its description")
    return date.fromisoformat(row["date"]), factor


def _dividend(row: Mapping[str, Any]) -> tuple[date, float]:
    return date.fromisoformat(row["ex_date"]), paid(row["amount"])
