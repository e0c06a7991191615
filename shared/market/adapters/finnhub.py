"""
Finnhub: quotes on every plan, bars on the paid ones.

It says no with HTTP status codes, and its daily prices are already divided by later splits. The key travels in
a header.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from math import isfinite
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
from shared.http_client import Answer, HttpClient, key_of
from shared.market.models import Adjustment, Fetched, Interval, Quote
from shared.market.rows import Rows
from shared.market.sessions import EXCHANGE, Calendar, calendar
from shared.settings import Plan
from shared.telemetry import redact

BURST = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
LONGEST_WAIT = timedelta(hours=1)
MONTH = timedelta(days=30)
"""How much intraday history one call may ask for."""
MONTHS = 6
"""How many months of intraday bars one fetch asks for; the next fetch goes on from there."""
BEGINNING = datetime(1980, 1, 2, tzinfo=UTC)

_RESOLUTIONS = {Interval.DAY: "D", Interval.HOUR: "60", Interval.MINUTE: "1"}


class Finnhub:
    """
    The provider port over Finnhub's REST API.

    *permit* is awaited before every call after the first of one fetch. *clock* is the wall, which Finnhub's
    windows run by.
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
        permit: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._url = base_url.rstrip("/")
        self._key = key_of("FINNHUB_KEY", key)
        self._plan = plan
        self._http = http or HttpClient("Finnhub")
        self._market = market
        self._clock = clock or SystemClock()
        self._permit = permit

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        """How many calls on the quota ``bars`` will make."""
        return len(_windows(interval, since=since, now=now))

    async def bars(self, symbol: str, interval: Interval, *, since: datetime | None, now: datetime) -> Fetched:
        """
        Fetch the bars that have closed by *now*: daily ones adjusted for splits, the others as traded.

        Intraday bars from long ago come some months at a time, oldest first.
        """
        market = calendar(self._market)
        rows = Rows(market=market, interval=interval, now=now)
        for number, (begin, end) in enumerate(_windows(interval, since=since, now=now)):
            if number and self._permit:
                await self._permit()
            answer = await self._ask(
                "/stock/candle",
                symbol=symbol,
                resolution=_RESOLUTIONS[interval],
                **{"from": int(begin.timestamp()), "to": int(end.timestamp())},
            )
            for opened, *numbers in _candles(answer):
                label = f"t={str(opened)[:20]}"
                try:
                    instant = datetime.fromtimestamp(opened, UTC)
                except (TypeError, ValueError, OverflowError, OSError):
                    rows.refuse(label, "the label is no time")
                    continue
                opening = _session_date(instant, market) if interval is Interval.DAY else instant
                rows.add(f"{label} ({opening})", opening, numbers)
        adjustment = Adjustment.SPLIT if interval is Interval.DAY else Adjustment.RAW
        return rows.fetched(symbol=symbol, provider=self.name, adjustment=adjustment)

    async def quote(self, symbol: str) -> Quote:
        """Fetch the last price."""
        answer = await self._ask("/quote", symbol=symbol)
        try:
            price, previous, stamp = float(answer["c"]), float(answer.get("pc") or 0), float(answer.get("t") or 0)
            if price == 0:
                raise UnknownSymbolError(f"Finnhub knows no symbol {symbol}: its price is 0")
            if stamp <= 0:
                raise InvalidPayloadError("it has no time")
            return Quote(
                symbol=symbol,
                price=price,
                previous_close=previous if previous > 0 else None,
                as_of=datetime.fromtimestamp(stamp, UTC),
                provider=self.name,
            )
        except (KeyError, TypeError, ValueError, OverflowError, OSError, InvalidPayloadError) as e:
            raise _unreadable(f"a quote of {symbol} that cannot be true ({e})") from e

    async def _ask(self, path: str, **params: str | int) -> dict[str, Any]:
        key = self._key.get_secret_value()
        answer = await self._http.get(
            self._url + path,
            params=params,
            headers={"X-Finnhub-Token": key, "Accept": "*/*"},
        )
        found = _read(answer)
        refusal = found.get("error") if isinstance(found, dict) else None
        if answer.status != 200 or refusal is not None:
            said = str(refusal or answer.body[:500].decode("utf-8", "replace"))
            raise classify(
                answer.status,
                said.replace(key, "***") if key else said,
                wait=_wait(answer.headers, self._clock.now()),
                symbol=str(params["symbol"]),
                plan=self._plan,
            )
        if not isinstance(found, dict):
            raise _unreadable(f"{len(answer.body)} bytes that are no JSON object")
        return found


def classify(status: int, text: str, *, wait: timedelta, symbol: str, plan: Plan) -> TroopError:
    """Turn a status and what was said with it into our error; *wait* is how long a throttle lasts."""
    said = text.lower()
    if status >= 500:
        return UnavailableError(f"Finnhub answered {status}")
    if "have access" in said:
        return _not_entitled(plan)
    # With an empty key, the refusal is a 429 that invites us to sign up.
    if status == 401 or "sign up" in said:
        return ConfigurationError("Finnhub does not accept the key: set FINNHUB_KEY to yours")
    if status == 403:
        return _not_entitled(plan)
    if status == 429 or "limit reached" in said:
        return RateLimitedError("Finnhub asks us to slow down", retry_after=wait)
    if "symbol" in said:
        return UnknownSymbolError(f"Finnhub does not serve the symbol {symbol}")
    if 400 <= status < 500:
        return RefusedError(f"Finnhub refused with {status}: {redact(text)[:120]!r}")
    return UnavailableError(f"no verdict on {status} and what Finnhub says: {redact(text)[:120]!r}")


def _not_entitled(plan: Plan) -> NotEntitledError:
    return NotEntitledError(f"the Finnhub plan ({plan}) does not include this call: see FINNHUB_PLAN")


def _wait(headers: Mapping[str, str], now: datetime) -> timedelta:
    remaining = _header(headers, "x-ratelimit-remaining")
    if remaining is not None and remaining > 0:
        return BURST  # calls are left in this minute, so it was the gate of 30 a second
    seconds = _header(headers, "retry-after")
    if seconds is None:
        seconds = _header(headers, "x-ratelimit-reset")
        if seconds is not None and seconds > 1e9:
            seconds -= now.timestamp()  # an epoch; some see a number of seconds instead
    if seconds is None:
        return MINUTE
    return timedelta(seconds=min(max(seconds, BURST.total_seconds()), LONGEST_WAIT.total_seconds()))


def _header(headers: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(headers[name])
    except (KeyError, ValueError):
        return None
    return value if isfinite(value) else None


def _read(answer: Answer) -> object:
    try:
        return json.loads(answer.body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _unreadable(what: str) -> UnavailableError:
    return UnavailableError(f"Finnhub sent {what}")


def _candles(answer: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of time, open, high, low, close, volume, oldest first."""
    if answer.get("s") == "no_data":
        return []
    try:
        rows = list(zip(*(answer[name] for name in "tohlcv"), strict=True))
        rows.sort(key=itemgetter(0))
    except (KeyError, TypeError, ValueError) as e:
        raise _unreadable(f"bars whose columns do not match ({type(e).__name__})") from e
    return rows


def _session_date(instant: datetime, market: Calendar) -> date:
    # Daily stamps are seen at midnight UTC, at the exchange's midnight and at its open.
    return instant.date() if instant.time() == time() else instant.astimezone(market.zone).date()


def _windows(interval: Interval, *, since: datetime | None, now: datetime) -> list[tuple[datetime, datetime]]:
    if interval is Interval.DAY:
        begin = max(since, BEGINNING) if since else BEGINNING
        return [(datetime.combine(begin.astimezone(UTC).date(), time(), UTC), now)]
    begin = max(since - interval.span, BEGINNING) if since else now - MONTH
    windows: list[tuple[datetime, datetime]] = []
    while len(windows) < MONTHS and (begin < now or not windows):
        end = max(min(begin + MONTH, now), begin)
        windows.append((begin, end))
        begin = end + timedelta(seconds=1)
    return windows
