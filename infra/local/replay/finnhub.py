"""
Finnhub as the app sees it: the key in a header or in the query, real status codes, limits in headers.

Daily candles are adjusted for the splits known by now, intraday ones are as traded; only closed bars are shown.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from aiohttp import web

from infra.local.replay.almanac import NOTICE, SOURCE, Almanac
from infra.local.replay.desk import Desk
from infra.local.replay.plans import Plan
from infra.local.replay.refusals import RefusalError
from infra.local.replay.tapes import Tapes, View, quoted_bar
from shared.market.models import Bar, Interval
from shared.market.sessions import EXCHANGE, calendar

PREFIX = "/finnhub/api/v1"

_RECORDED = {"1": Interval.MINUTE, "60": Interval.HOUR, "D": Interval.DAY}
_RESOLUTIONS = {*_RECORDED, "5", "15", "30", "W", "M"}
_INTRADAY_REACH = timedelta(days=31)
_EARNINGS_REACH = timedelta(days=30)
_MOST_EARNINGS = 1500
_ZERO = {"c": 0, "d": None, "dp": None, "h": 0, "l": 0, "o": 0, "pc": 0, "t": 0}
_FAR = 2**33  # the year 2242
_PRE_MARKET = time(4, 0)
_POST_MARKET_ENDS = time(20, 0)


class Finnhub:
    """Answers /finnhub/api/v1 from tapes."""

    def __init__(self, tapes: Tapes, almanac: Almanac, desk: Desk) -> None:
        self._tapes = tapes
        self._almanac = almanac
        self._desk = desk

    def routes(self) -> list[web.RouteDef]:
        """The paths of this provider."""
        answers: Mapping[str, Callable[[web.Request, Plan], object]] = {
            "/quote": self._quote,
            "/stock/candle": self._candle,
            "/stock/split": self._split,
            "/company-news": self._company_news,
            "/calendar/earnings": self._earnings,
            "/search": self._search,
            "/stock/market-status": self._market_status,
        }
        return [web.get(PREFIX + path, self._handler(answer)) for path, answer in answers.items()]

    def _handler(
        self, answer: Callable[[web.Request, Plan], object]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            given = request.headers.get("X-Finnhub-Token", request.query.get("token"))
            plan = self._desk.plans.get(given or "")

            def admitted() -> web.Response:
                if plan is None:
                    if given is None:
                        raise RefusalError("missing_key")
                    raise RefusalError("invalid_key" if given else "sign_up")
                full = self._desk.turnstile.admit(plan.key, plan.finnhub)
                if full is not None:
                    raise RefusalError(f"per_{full.name}")
                return web.json_response(answer(request, plan))

            return await self._desk.serve(
                request,
                admitted,
                symbol=request.query.get("symbol", "").strip().upper(),
                limits=lambda is_spent: self._limits(plan, is_spent=is_spent),
            )

        return handle

    def _limits(self, plan: Plan | None, *, is_spent: bool) -> dict[str, str]:
        if plan is None or not plan.finnhub:
            return {}
        widest = plan.finnhub[0]
        room = self._desk.turnstile.room(plan.key, widest)
        return {
            "X-Ratelimit-Limit": str(widest.calls),
            "X-Ratelimit-Remaining": str(0 if is_spent else room.left),
            "X-Ratelimit-Reset": str(math.ceil(room.frees_at.timestamp())),
        }

    def _quote(self, request: web.Request, plan: Plan) -> dict[str, Any]:
        last = self._tapes.last_day(_required(request, "symbol").upper())
        if last is None:
            return dict(_ZERO)
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
            raise RefusalError("premium_endpoint")
        resolution = _required(request, "resolution")
        symbol = _required(request, "symbol").upper()
        begins, ends = _instant(request, "from"), _instant(request, "to")
        if resolution not in _RESOLUTIONS:
            raise RefusalError("invalid_call", text="wrong resolution")
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

    def _split(self, request: web.Request, plan: Plan) -> list[dict[str, Any]]:
        if not plan.is_premium:
            raise RefusalError("premium_endpoint")
        symbol = _required(request, "symbol").upper()
        first, last = _day(request, "from"), _day(request, "to")
        return [
            {
                "symbol": symbol,
                "date": str(day),
                "fromFactor": 1 if factor >= 1 else round(1 / factor, 6),
                "toFactor": max(factor, 1),
            }
            for day, factor in self._tapes.splits(symbol)
            if first <= day <= last
        ]

    def _company_news(self, request: web.Request, plan: Plan) -> list[dict[str, Any]]:
        symbol = _required(request, "symbol").upper()
        since = datetime.combine(_day(request, "from"), time(), UTC)
        until = datetime.combine(_day(request, "to"), time.max, UTC)
        return [
            {
                "category": "company",
                "datetime": _epoch(article.published_at),
                "headline": article.title,
                "id": article.number,
                "image": "",
                "related": symbol,
                "source": SOURCE,
                "summary": article.summary,
                "url": article.url,
            }
            for article in reversed(self._almanac.articles(symbol, since, until))
        ]

    def _earnings(self, request: web.Request, plan: Plan) -> dict[str, Any]:
        today = self._tapes.now().astimezone(calendar(EXCHANGE).zone).date()
        first = _day(request, "from") if "from" in request.query else today
        last = _day(request, "to") if "to" in request.query else today + _EARNINGS_REACH
        now = self._tapes.now()
        rows = [
            {
                "date": str(r.day),
                "epsActual": r.eps_actual if r.out_at <= now else None,
                "epsEstimate": r.eps_estimate,
                "hour": str(r.time),
                "quarter": r.quarter,
                "revenueActual": r.revenue_actual if r.out_at <= now else None,
                "revenueEstimate": r.revenue_estimate,
                "symbol": r.symbol,
                "year": r.year,
            }
            for r in self._almanac.reports(first, last, request.query.get("symbol", "").strip().upper() or None)
        ]
        return {"earningsCalendar": rows[:_MOST_EARNINGS], "source": NOTICE}

    def _search(self, request: web.Request, plan: Plan) -> dict[str, Any]:
        found = [
            {"description": name, "displaySymbol": symbol, "symbol": symbol, "type": "Common Stock"}
            for symbol, name, _ in self._tapes.matching(_required(request, "q"))
        ]
        return {"count": len(found), "result": found}

    def _market_status(self, request: web.Request, plan: Plan) -> dict[str, Any]:
        exchange = _required(request, "exchange").upper()
        if exchange != "US":
            raise RefusalError("invalid_call", text="exchange is not supported")
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
        raise RefusalError("invalid_call", text="Missing parameters")
    return value


def _day(request: web.Request, name: str) -> date:
    try:
        return date.fromisoformat(_required(request, name))
    except ValueError as e:
        raise RefusalError("invalid_call", text=f"{name} must be a date such as 2012-03-01") from e


def _instant(request: web.Request, name: str) -> datetime:
    try:
        seconds = int(_required(request, name))
    except ValueError as e:
        raise RefusalError("invalid_call", text=f"{name} must be seconds since 1970") from e
    return datetime.fromtimestamp(min(max(seconds, 0), _FAR), UTC)


def _epoch(at: datetime) -> int:
    return int(at.timestamp())
