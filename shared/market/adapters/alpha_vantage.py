"""
Alpha Vantage: stock bars and end-of-day quotes.

It answers everything with HTTP 200 and says no in prose; the key travels in the URL and comes back in one of
those sentences. Prices are as traded, times are New York's, and an intraday row is labelled by its start.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from itertools import pairwise
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
from shared.http_client import Answer, HttpClient, key_of
from shared.market.models import Adjustment, Fetched, Interval, Quote
from shared.market.rows import Rows
from shared.market.sessions import EXCHANGE, Calendar, calendar
from shared.settings import Plan
from shared.telemetry import redact

BURST = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
QUOTA_SPENT = timedelta(hours=1)
"""When the day's calls are spent, ask again no sooner; nobody documents when the day begins."""

COMPACT_DAYS = timedelta(days=135)
"""How far back a compact daily answer surely reaches: 100 sessions are 20 weeks or more."""
COMPACT_ROWS = 95
"""How many rows a compact answer surely holds: 100, less some slack."""
TRAILING = timedelta(days=29)
"""How far back an intraday answer reaches when no month is named: 30 days, less some slack."""
MONTHS = 6
"""How many months of intraday bars one fetch asks for; the next fetch goes on from there."""
JUMP = 1.25
"""An overnight move by this factor makes a plan without split coefficients look for a split."""

_REFUSALS = ("Information", "Note", "Error Message", "detail")
_ZONES = ("US/Eastern", "America/New_York")
_INTRADAY = {Interval.MINUTE: "1min", Interval.HOUR: "60min"}

type _Request = dict[str, str]


class AlphaVantage:
    """
    The provider port over Alpha Vantage's one endpoint.

    *permit* is awaited before every call after the first of one fetch; left out, the free plan's second is
    waited for. *market_clock* bounds the time of a quote, of which only the day is told.
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
        permit: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._url = base_url.rstrip("/") + "/query"
        self._key = key_of("ALPHA_VANTAGE_KEY", key)
        self._plan = plan
        self._http = http or HttpClient("Alpha Vantage")
        self._market = market
        self._clock = market_clock or SystemClock()
        self._permit = permit or self._wait_a_second

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        """How many calls on the quota ``bars`` will make; on the free plan a suspected split takes one more."""
        if interval is Interval.DAY:
            return 2 if self._plan == "free" and since is None else 1
        return len(self._intraday_requests("", interval, since=since, now=now))

    async def bars(self, symbol: str, interval: Interval, *, since: datetime | None, now: datetime) -> Fetched:
        """
        Fetch the bars that have closed by *now*; older ones than asked for may be among them.

        Intraday bars from long ago come some months at a time, oldest first.
        """
        rows = Rows(market=calendar(self._market), interval=interval, now=now)
        if interval is Interval.DAY:
            await self._daily(rows, symbol, since=since, now=now)
        else:
            await self._intraday(rows, symbol, interval, since=since, now=now)
        return rows.fetched(symbol=symbol, provider=self.name, adjustment=Adjustment.RAW)

    async def quote(self, symbol: str) -> Quote:
        """Fetch the last price; without an entitlement it is the close, and is renewed once a day."""
        answer = await self._ask({"function": "GLOBAL_QUOTE", "symbol": symbol})
        # With an entitlement the key goes on: "Global Quote - DATA DELAYED BY 15 MINUTES".
        found = _only(answer, "Global Quote")
        if not found:
            raise UnknownSymbolError(f"Alpha Vantage knows no symbol {symbol}")
        try:
            day = date.fromisoformat(found["07. latest trading day"])
            previous = float(found["08. previous close"])
            return Quote(
                symbol=symbol,
                price=float(found["05. price"]),
                previous_close=previous if previous > 0 else None,
                as_of=min(calendar(self._market).bar_of_date(day)[1], self._clock.now()),
                provider=self.name,
            )
        except (KeyError, TypeError, ValueError, InvalidPayloadError) as e:
            raise _unreadable(f"a quote of {symbol} that cannot be true ({e})") from e

    async def _daily(self, rows: Rows, symbol: str, *, since: datetime | None, now: datetime) -> None:
        has_splits = self._plan != "free"
        function = "TIME_SERIES_DAILY_ADJUSTED" if has_splits else "TIME_SERIES_DAILY"
        full = has_splits and (since is None or now - since > COMPACT_DAYS)
        request = {"function": function, "symbol": symbol, "outputsize": "full" if full else "compact"}
        found = _oldest_first(await self._ask(request))
        splits: Mapping[date, float] = {}
        if not has_splits and (since is None or _may_have_split(found, rows.market, since=since, now=now)):
            await self._permit()
            splits = await self._splits(symbol, [label for label, _ in found])
        # The last bar of those known before is looked at again: it shows a revision.
        known = since.astimezone(rows.market.zone).date().isoformat() if since else ""
        for label, row in found:
            if label < known:
                continue
            try:
                day = date.fromisoformat(label)
            except ValueError:
                rows.refuse(label, "the label is no date")
                continue
            split = row.get("8. split coefficient", "1.0") if has_splits else splits.get(day, 1.0)
            rows.add(label, day, _numbers(row), split=split)

    async def _splits(self, symbol: str, labels: Sequence[str]) -> Mapping[date, float]:
        answer = await self._ask({"function": "SPLITS", "symbol": symbol})
        days = sorted(date.fromisoformat(label) for label in labels if _is_date(label))
        found: dict[date, float] = {}
        try:
            for split in answer.get("data", ()):
                effective = date.fromisoformat(split["effective_date"])
                # A split on a day without trading shows in the first bar after it.
                day = next((day for day in days if day >= effective), None)
                if day is not None and days[0] <= effective:
                    found[day] = found.get(day, 1.0) * float(split["split_factor"])
        except (KeyError, TypeError, ValueError) as e:
            raise _unreadable(f"splits of {symbol} that cannot be read ({type(e).__name__})") from e
        return found

    async def _intraday(
        self, rows: Rows, symbol: str, interval: Interval, *, since: datetime | None, now: datetime
    ) -> None:
        market = calendar(self._market)
        for number, request in enumerate(self._intraday_requests(symbol, interval, since=since, now=now)):
            if number:
                await self._permit()
            answer = await self._ask(request)
            zone = next((z for name, z in _meta(answer).items() if name.endswith("Time Zone")), _ZONES[0])
            if zone not in _ZONES:
                raise _unreadable(f"bars of {symbol} in the zone {str(zone)[:20]!r}, where we expect {_ZONES[0]}")
            for label, row in _oldest_first(answer):
                try:
                    naive = datetime.fromisoformat(label)
                except ValueError:
                    rows.refuse(label, "the label is no time")
                    continue
                rows.add(label, naive.replace(tzinfo=market.zone), _numbers(row))

    def _intraday_requests(
        self, symbol: str, interval: Interval, *, since: datetime | None, now: datetime
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
        months = _months(since.astimezone(zone).date(), now.astimezone(zone).date())
        return [request | {"month": month} for month in months[:MONTHS]]

    async def _wait_a_second(self) -> None:
        if self._plan == "free":
            await asyncio.sleep(1.2 * BURST.total_seconds())

    async def _ask(self, request: _Request) -> dict[str, Any]:
        key = self._key.get_secret_value()
        answer = await self._http.get(
            self._url,
            params={**request, "apikey": key},
            headers={"Accept": "*/*"},
            url_is_secret=True,
        )
        found = _read(answer)
        refusal = next((found[field] for field in _REFUSALS if field in found), None)
        if refusal is not None:
            raise classify(str(refusal), symbol=request["symbol"], plan=self._plan, key=key)
        if answer.status != 200:
            raise UnavailableError(f"Alpha Vantage answered {answer.status}")
        return found


def classify(text: str, *, symbol: str, plan: Plan, key: str) -> TroopError:
    """
    Turn one of Alpha Vantage's sentences into our error: the prose decides, not the field it came in.

    The order matters: throttle texts speak of days and premium plans, too.
    """
    said = text.lower()

    def says(*phrases: str) -> bool:
        return any(phrase in said for phrase in phrases)

    if says("detected your api key"):
        return _quota_spent()
    if says("spreading out", "per second"):
        return RateLimitedError("Alpha Vantage takes one request a second", retry_after=BURST)
    if says("calls per minute", "requests per minute", "call frequency", "call volume"):
        return RateLimitedError("Alpha Vantage asks for fewer requests a minute", retry_after=MINUTE)
    if says("daily rate limit", "requests per day"):
        return _quota_spent()
    if says("premium endpoint", "premium feature"):
        return NotEntitledError(f"the Alpha Vantage plan ({plan}) does not include this call: see ALPHA_VANTAGE_PLAN")
    if says("apikey is invalid or missing", "demo purposes"):
        return ConfigurationError("Alpha Vantage does not accept the key: set ALPHA_VANTAGE_KEY to yours")
    if says("invalid api call"):
        return UnknownSymbolError(f"Alpha Vantage knows no symbol {symbol}, or not for this call")
    if says("api function", "invalid inputs"):
        return RefusedError("Alpha Vantage says that our request makes no sense: this is our mistake")
    return UnavailableError(f"no verdict on what Alpha Vantage says: {_shown(text, key)!r}")


def _quota_spent() -> RateLimitedError:
    return RateLimitedError("the day's calls to Alpha Vantage are spent", retry_after=QUOTA_SPENT)


def _shown(text: str, key: str) -> str:
    if key:
        text = re.sub(re.escape(key), "***", text, flags=re.IGNORECASE)
    return redact(text)[:120]


def _read(answer: Answer) -> dict[str, Any]:
    """Read the body of an answer; a page in HTML or a body cut short is trouble that passes."""
    if answer.status == 429:
        raise RateLimitedError("Alpha Vantage answered 429", retry_after=MINUTE)
    try:
        found = json.loads(answer.body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    if answer.status != 200:
        raise UnavailableError(f"Alpha Vantage answered {answer.status}")
    raise _unreadable(f"{len(answer.body)} bytes that are no JSON object")


def _unreadable(what: str) -> UnavailableError:
    return UnavailableError(f"Alpha Vantage sent {what}")


def _only(answer: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for name, value in answer.items():
        if name.startswith(prefix) and isinstance(value, dict):
            return value
    raise _unreadable(f"no {prefix!r}, only {', '.join(name[:20] for name in answer)[:80] or 'an empty object'}")


def _meta(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = answer.get("Meta Data")
    return meta if isinstance(meta, dict) else {}


def _oldest_first(answer: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    rows = _only(answer, "Time Series")
    return [(label, row if isinstance(row, dict) else {}) for label, row in sorted(rows.items())]


def _numbers(row: Mapping[str, Any]) -> list[object]:
    volume = row.get("6. volume", row.get("5. volume"))
    return [row.get("1. open"), row.get("2. high"), row.get("3. low"), row.get("4. close"), volume]


def _may_have_split(
    found: Iterable[tuple[str, Mapping[str, Any]]], market: Calendar, *, since: datetime, now: datetime
) -> bool:
    for (_, before), (label, after) in pairwise(found):
        try:
            is_new = (
                label >= since.date().isoformat() and since < market.bar_of_date(date.fromisoformat(label))[1] <= now
            )
            if is_new and not 1 / JUMP < float(after["1. open"]) / float(before["4. close"]) < JUMP:
                return True
        except (KeyError, TypeError, ValueError, ZeroDivisionError, InvalidPayloadError):
            continue  # a row that cannot be read is named where bars are made
    return False


def _months(first: date, last: date) -> list[str]:
    begin, end = first.year * 12 + first.month - 1, last.year * 12 + last.month - 1
    return [f"{n // 12}-{n % 12 + 1:02}" for n in range(begin, end + 1)]


def _is_date(label: str) -> bool:
    try:
        date.fromisoformat(label)
    except ValueError:
        return False
    return True
