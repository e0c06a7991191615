"""
Finnhub as the app sees it: the key in a header or in the query, real status codes, limits in headers.

Daily candles are adjusted for the splits known by now, intraday ones are as traded; only closed bars are shown.
"""

import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, time, timedelta
from typing import Any

from aiohttp import web

from infra.local.replay.desk import Desk
from infra.local.replay.plans import Plan
from infra.local.replay.tapes import Tapes, View, quoted_bar
from shared.market.models import Bar, Interval
from shared.market.sessions import EXCHANGE, calendar

PREFIX = "/finnhub/api/v1"

_RECORDED = {"1": Interval.MINUTE, "60": Interval.HOUR, "D": Interval.DAY}
_RESOLUTIONS = {*_RECORDED, "5", "15", "30", "W", "M"}
_INTRADAY_REACH = timedelta(days=31)
_FAR = 2**33  # the year 2242
_PRE_MARKET = time(4, 0)
_POST_MARKET_ENDS = time(20, 0)


class _RefusalError(Exception):
    """Ends a call with a status; ``reason`` is what the statistics call it."""

    def __init__(self, reason: str, status: int, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.status = status


class Finnhub:
    """Answers /finnhub/api/v1 from tapes."""

    def __init__(self, tapes: Tapes, desk: Desk) -> None:
        self._tapes = tapes
        self._desk = desk

    def routes(self) -> list[web.RouteDef]:
        """The paths of this provider."""
        return [
            web.get(f"{PREFIX}/quote", self._handler(self._quote)),
            web.get(f"{PREFIX}/stock/candle", self._handler(self._candle)),
            web.get(f"{PREFIX}/search", self._handler(self._search)),
            web.get(f"{PREFIX}/stock/market-status", self._handler(self._market_status)),
        ]

    def _handler(
        self, answer: Callable[[web.Request, Plan], dict[str, Any]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            struck = await self._desk.struck(request)
            if struck is not None:
                return struck
            key = request.headers.get("X-Finnhub-Token") or request.query.get("token", "")
            plan = self._desk.plans.get(key)
            try:
                if plan is None:
                    text = "Invalid API key." if key else "Please use an API key."
                    raise _RefusalError("invalid_key" if key else "missing_key", 401, text)
                full = self._desk.turnstile.admit(key, plan.finnhub)
                if full is not None:
                    text = "API limit reached. Please try again later. Remaining Limit: 0"
                    raise _RefusalError(f"per_{full.name}", 429, text)
                body, status = answer(request, plan), 200
            except _RefusalError as e:
                self._desk.refusals[e.reason] += 1
                body, status = {"error": str(e)}, e.status
            else:
                self._desk.answered(request.query.get("symbol", ""))
            return web.json_response(body, status=status, headers=self._limits(plan))

        return handle

    def _limits(self, plan: Plan | None) -> dict[str, str]:
        if plan is None or not plan.finnhub:
            return {}
        widest = plan.finnhub[0]
        room = self._desk.turnstile.room(plan.key, widest)
        return {
            "X-Ratelimit-Limit": str(widest.calls),
            "X-Ratelimit-Remaining": str(room.left),
            "X-Ratelimit-Reset": str(math.ceil(room.frees_at.timestamp())),
        }

    def _quote(self, request: web.Request, plan: Plan) -> dict[str, Any]:
        last = self._tapes.last_day(_required(request, "symbol").upper())
        if last is None:
            return {"c": 0, "d": None, "dp": None, "h": 0, "l": 0, "o": 0, "pc": 0, "t": 0}
        before = last.previous_close
        change = None if before is None else last.price - before
        return {
            "c": last.price,
            "d": None if change is None else round(change, 4),
            "dp": None if change is None or before is None else round(100 * change / before, 4),
            "h": last.high,
            "l": last.low,
            "o": last.open,
            "pc": before or 0,
            "t": _epoch(last.closed_at),
        }

    def _candle(self, request: web.Request, plan: Plan) -> dict[str, Any]:
        if not plan.is_premium:
            raise _RefusalError("premium_endpoint", 403, "You don't have access to this resource.")
        resolution = _required(request, "resolution")
        symbol = _required(request, "symbol").upper()
        begins, ends = _instant(request, "from"), _instant(request, "to")
        if resolution not in _RESOLUTIONS:
            raise _RefusalError("invalid_call", 422, "wrong resolution")
        interval = _RECORDED.get(resolution)
        view = self._tapes.view(symbol, interval) if interval else None
        if view is None or not view.count:
            return {"s": "no_data"}
        if interval is Interval.DAY:
            stamped = [(_midnight(view, place), quoted_bar(view, place)) for place in _places(view, begins, ends)]
        else:
            begins = max(begins, ends - _INTRADAY_REACH)
            stamped = [(view.tape.opens[place], view.tape.bars[place]) for place in _places(view, begins, ends)]
        rows = [(_epoch(at), bar) for at, bar in stamped if begins <= at <= ends]
        return _candles(rows) if rows else {"s": "no_data"}

    def _search(self, request: web.Request, plan: Plan) -> dict[str, Any]:
        found = [
            {"description": name, "displaySymbol": symbol, "symbol": symbol, "type": "Common Stock"}
            for symbol, name, _ in self._tapes.matching(_required(request, "q"))
        ]
        return {"count": len(found), "result": found}

    def _market_status(self, request: web.Request, plan: Plan) -> dict[str, Any]:
        exchange = _required(request, "exchange").upper()
        if exchange != "US":
            raise _RefusalError("invalid_call", 422, "exchange is not supported")
        now = self._tapes.now()
        market = calendar(EXCHANGE)
        local = now.astimezone(market.zone)
        today = market.session(local.date())
        phase = None
        if today is not None:
            if today.opens_at <= now < today.closes_at:
                phase = "regular"
            elif now < today.opens_at and local.time() >= _PRE_MARKET:
                phase = "pre-market"
            elif now >= today.closes_at and local.time() < _POST_MARKET_ENDS:
                phase = "post-market"
        is_holiday = today is None and local.weekday() < 5
        return {
            "exchange": "US",
            "timezone": market.zone.key,
            "session": phase,
            "holiday": "Market holiday" if is_holiday else None,
            "isOpen": phase == "regular",
            "t": _epoch(now),
        }


def _places(view: View, begins: datetime, ends: datetime) -> range:
    # A day's stamp is its midnight, so its open may lie up to a day behind the stamp.
    return range(view.since(begins), view.until(ends + timedelta(days=1)))


def _midnight(view: View, place: int) -> datetime:
    return datetime.combine(view.tape.local_date(place), time(), view.tape.zone).astimezone(UTC)


def _candles(rows: list[tuple[int, Bar]]) -> dict[str, Any]:
    return {
        "c": [bar.close for _, bar in rows],
        "h": [bar.high for _, bar in rows],
        "l": [bar.low for _, bar in rows],
        "o": [bar.open for _, bar in rows],
        "s": "ok",
        "t": [at for at, _ in rows],
        "v": [int(bar.volume) if bar.volume.is_integer() else bar.volume for _, bar in rows],
    }


def _required(request: web.Request, name: str) -> str:
    value = request.query.get(name, "").strip()
    if not value:
        raise _RefusalError("invalid_call", 422, "Missing parameters")
    return value


def _instant(request: web.Request, name: str) -> datetime:
    try:
        seconds = int(_required(request, name))
    except ValueError as e:
        raise _RefusalError("invalid_call", 422, f"{name} must be seconds since 1970") from e
    return datetime.fromtimestamp(min(max(seconds, 0), _FAR), UTC)


def _epoch(at: datetime) -> int:
    return int(at.timestamp())
