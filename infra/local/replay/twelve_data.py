"""
Twelve Data as the app sees it: credits instead of calls, and errors whose code is in the body.

Credits count in minutes and days of the clock; being over them comes with HTTP 200. Prices are strings, newest
first, adjusted for splits unless told otherwise, and ``end_date`` is exclusive; only closed bars are shown.
"""

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from aiohttp import web

from infra.local.replay.almanac import NOTICE, Almanac
from infra.local.replay.desk import Desk
from infra.local.replay.plans import Plan
from infra.local.replay.refusals import RefusalError
from infra.local.replay.tapes import Tapes, View, quoted_bar
from shared.market.models import Bar, Interval, ReportTime
from shared.market.sessions import EXCHANGE, calendar

PREFIX = "/twelve_data"

_INTERVALS = {"1min": Interval.MINUTE, "1h": Interval.HOUR, "1day": Interval.DAY}
_OTHERS = ("5min", "15min", "30min", "45min", "2h", "4h", "8h", "1week", "1month")
_SPANS = {"minute": "current minute", "day": "day"}
_ROWS_PER_CREDIT = 100
_MOST_ROWS = 5000
_TIMES = {
    ReportTime.BEFORE_OPEN: "Pre Market",
    ReportTime.AFTER_CLOSE: "After Hours",
    ReportTime.DURING: "During Market",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Path:
    """What a call to this path costs, each symbol, and which plans may make it."""

    credits: int
    is_premium: bool = False


_PATHS = {
    "/time_series": _Path(credits=1),
    "/quote": _Path(credits=1),
    "/earnings_calendar": _Path(credits=40, is_premium=True),
    "/splits": _Path(credits=20, is_premium=True),
    "/dividends": _Path(credits=20, is_premium=True),
}


class TwelveData:
    """Answers /twelve_data from tapes."""

    def __init__(self, tapes: Tapes, almanac: Almanac, desk: Desk) -> None:
        self._tapes = tapes
        self._almanac = almanac
        self._desk = desk

    def routes(self) -> list[web.RouteDef]:
        """The paths of this provider."""
        answers: Mapping[str, Callable[[web.Request], object]] = {
            "/time_series": self._time_series,
            "/quote": self._quotes,
            "/earnings_calendar": self._earnings_calendar,
            "/splits": self._splits,
            "/dividends": self._dividends,
        }
        return [web.get(PREFIX + path, self._handler(path, answer)) for path, answer in answers.items()]

    def _handler(
        self, path: str, answer: Callable[[web.Request], object]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            plan = self._desk.plans.get(_key(request))

            def admitted() -> web.Response:
                if plan is None:
                    raise RefusalError("invalid_key")
                self._admit(request, path, plan)
                return web.json_response(answer(request))

            symbol = ",".join(_symbols(request))
            return await self._desk.serve(
                request,
                admitted,
                symbol=symbol,
                limits=lambda is_spent: self._limits(plan, is_spent=is_spent),
                words={"path": path, "symbol": symbol},
            )

        return handle

    def _admit(self, request: web.Request, path: str, plan: Plan) -> None:
        if _PATHS[path].is_premium and not plan.is_premium:
            raise RefusalError("premium_endpoint")
        rows = _rows(request) if path == "/time_series" else 1
        weight = _PATHS[path].credits * max(len(_symbols(request)), 1) * math.ceil(rows / _ROWS_PER_CREDIT)
        full = self._desk.turnstile.admit(plan.key, plan.twelve_data, weight=weight)
        if full is not None:
            used = self._desk.turnstile.room(plan.key, full).used + weight
            raise RefusalError(f"per_{full.name}", used=used, calls=full.calls)

    def _limits(self, plan: Plan | None, *, is_spent: bool) -> dict[str, str]:
        if plan is None or not plan.twelve_data:
            return {}
        minute = plan.twelve_data[-1]
        room = self._desk.turnstile.room(plan.key, minute)
        used, left = (minute.calls, 0) if is_spent else (room.used, room.left)
        return {"api-credits-used": str(used), "api-credits-left": str(left)}

    # --- bars and quotes

    def _time_series(self, request: web.Request) -> object:
        name = request.query.get("interval", "")
        if name not in _INTERVALS and name not in _OTHERS:
            known = ", ".join([*_INTERVALS, *_OTHERS])
            raise _invalid(f"Invalid **interval** provided: {name}. Supported intervals: {known}")
        return self._each(request, lambda symbol: self._series(request, symbol, name))

    def _series(self, request: web.Request, symbol: str, name: str) -> dict[str, Any]:
        view = self._tapes.view(symbol, _INTERVALS[name]) if name in _INTERVALS else None
        if view is None or not view.count:
            raise RefusalError("no_data")
        zone = _zone(request, view.tape.zone)
        places = self._places(request, view, zone)
        adjust = request.query.get("adjust", "splits")
        if adjust not in {"all", "splits", "dividends", "none"}:
            raise _invalid(f"Invalid **adjust** provided: {adjust}. Supported: all, splits, dividends, none")
        rows = [
            _row(
                _label(view, place, zone),
                quoted_bar(view, place) if adjust in {"all", "splits"} else view.tape.bars[place],
            )
            for place in places
        ]
        if not rows:
            raise RefusalError("no_data")
        if request.query.get("order", "desc").lower() != "asc":
            rows.reverse()
        return {"meta": {**self._meta(symbol, view), "interval": name}, "values": rows, "status": "ok"}

    def _places(self, request: web.Request, view: View, zone: ZoneInfo) -> Sequence[int]:
        """The bars from start_date up to but without end_date, at most outputsize of them, the newest."""
        is_daily = view.tape.series.interval is Interval.DAY
        begin, end = 0, view.count
        if "start_date" in request.query:
            begin = _place(view, _moment(request, "start_date"), zone, is_daily=is_daily)
        if "end_date" in request.query:
            end = _place(view, _moment(request, "end_date"), zone, is_daily=is_daily)
        places: Sequence[int] = range(begin, max(end, begin))
        if request.query.get("prepost", "false") != "true" and view.tape.outside:
            places = [place for place in places if place not in view.tape.outside]
        return places[-_rows(request) :]

    def _quotes(self, request: web.Request) -> object:
        return self._each(request, self._quote)

    def _quote(self, symbol: str) -> dict[str, Any]:
        last = self._tapes.last_day(symbol)
        if last is None:
            raise RefusalError("no_data")
        before = last.previous_close
        change = last.price - before if before is not None else 0.0
        market = calendar(self._tapes.trades_at(symbol))
        opened = market.session(last.date)
        return {
            "symbol": symbol,
            "name": self._tapes.names[symbol],
            "exchange": market.name,
            "mic_code": market.name,
            "currency": "USD",
            "datetime": str(last.date),
            "timestamp": int((opened.opens_at if opened else last.closed_at).timestamp()),
            "last_quote_at": int(last.closed_at.timestamp()),
            "open": _price(last.open),
            "high": _price(last.high),
            "low": _price(last.low),
            "close": _price(last.price),
            "volume": _volume(last.volume),
            "previous_close": _price(before if before is not None else last.price),
            "change": _price(change),
            "percent_change": _price(100 * change / before if before else 0.0),
            "is_market_open": market.session_at(self._tapes.now()) is not None,
        }

    # --- what companies did

    def _earnings_calendar(self, request: web.Request) -> object:
        today = self._tapes.now().astimezone(calendar(EXCHANGE).zone).date()
        first = _moment(request, "start_date").date() if "start_date" in request.query else today
        last = _moment(request, "end_date").date() if "end_date" in request.query else today
        symbols = _symbols(request)
        now = self._tapes.now()
        days: dict[str, list[dict[str, Any]]] = {}
        for report in self._almanac.reports(first, last, symbols[0] if symbols else None):
            is_out = report.out_at <= now
            surprise = report.eps_actual - report.eps_estimate
            days.setdefault(str(report.day), []).append(
                {
                    "symbol": report.symbol,
                    "name": self._tapes.names[report.symbol],
                    "currency": "USD",
                    "exchange": EXCHANGE,
                    "mic_code": EXCHANGE,
                    "country": "United States",
                    "time": _TIMES[report.time],
                    "eps_estimate": report.eps_estimate,
                    "eps_actual": report.eps_actual if is_out else None,
                    "difference": round(surprise, 2) if is_out else None,
                    "surprise_prc": round(100 * surprise / report.eps_estimate, 2) if is_out else None,
                }
            )
        return {"earnings": days, "status": "ok", "source": NOTICE}

    def _splits(self, request: web.Request) -> object:
        def splits(symbol: str) -> dict[str, Any]:
            found = self._tapes.splits(symbol)
            return {"meta": self._company(symbol), "splits": [_split(*one) for one in _within(request, found)]}

        return self._each(request, splits)

    def _dividends(self, request: web.Request) -> object:
        # No package has recorded a dividend, and none is made up.
        return self._each(request, lambda symbol: {"meta": self._company(symbol), "dividends": []})

    # --- in common

    def _each(self, request: web.Request, answer: Callable[[str], dict[str, Any]]) -> object:
        """One symbol's answer as it is; of several, each under its name, and their refusals likewise."""
        symbols = _symbols(request)
        if not symbols:
            raise RefusalError("missing_symbol")
        if len(symbols) == 1:
            return self._known(symbols[0], answer)
        found: dict[str, Any] = {}
        for symbol in symbols:
            try:
                found[symbol] = self._known(symbol, answer)
            except RefusalError as e:
                found[symbol] = self._desk.told(e.reason, {"symbol": symbol, **e.words})
        return found

    def _known(self, symbol: str, answer: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        if not self._tapes.knows(symbol):
            raise RefusalError("unknown_symbol")
        return answer(symbol)

    def _company(self, symbol: str) -> dict[str, Any]:
        market = calendar(self._tapes.trades_at(symbol))
        return {
            "symbol": symbol,
            "name": self._tapes.names[symbol],
            "currency": "USD",
            "exchange": market.name,
            "mic_code": market.name,
            "exchange_timezone": market.zone.key,
        }

    def _meta(self, symbol: str, view: View) -> dict[str, Any]:
        market = calendar(view.tape.series.calendar)
        return {
            "symbol": symbol,
            "currency": "USD",
            "exchange_timezone": market.zone.key,
            "exchange": market.name,
            "mic_code": market.name,
            "type": "Common Stock",
        }


def _key(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "apikey" else request.query.get("apikey", "")


def _symbols(request: web.Request) -> list[str]:
    return [one.strip().upper() for one in request.query.get("symbol", "").split(",") if one.strip()]


def _invalid(text: str) -> RefusalError:
    return RefusalError("invalid_call", text=text)


def _rows(request: web.Request) -> int:
    # Between two dates everything is meant, as far as one answer goes.
    default = _MOST_ROWS if "start_date" in request.query else 30
    text = request.query.get("outputsize", str(default))
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= _MOST_ROWS):
        raise _invalid(f"Invalid **outputsize** provided: {text}. It must be a number from 1 to {_MOST_ROWS}")
    return int(text)


def _zone(request: web.Request, own: ZoneInfo) -> ZoneInfo:
    name = request.query.get("timezone", "Exchange")
    if name.lower() == "exchange":
        return own
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as e:
        raise _invalid(f"Invalid **timezone** provided: {name}") from e


def _moment(request: web.Request, name: str) -> datetime:
    """A date or a naive time of the zone that was asked for."""
    text = request.query[name]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as e:
        raise _invalid(f"Invalid **{name}** provided: {text}. Use 2012-03-01 or 2012-03-01 15:30:00") from e
    return moment.replace(tzinfo=None)


def _place(view: View, moment: datetime, zone: ZoneInfo, *, is_daily: bool) -> int:
    """The place of the first bar stamped at or after a moment; a day is stamped with its date's midnight."""
    try:
        if not is_daily:
            return view.since(moment.replace(tzinfo=zone).astimezone(UTC))
        day = moment.date() if moment.time() == time() else moment.date() + timedelta(days=1)
        return view.since(datetime.combine(day, time(), view.tape.zone).astimezone(UTC))
    except OverflowError:
        return 0 if moment.year < 2000 else view.count


def _label(view: View, place: int, zone: ZoneInfo) -> str:
    if view.tape.series.interval is Interval.DAY:
        return str(view.tape.local_date(place))
    return view.tape.opens[place].astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")


def _row(label: str, bar: Bar) -> dict[str, str]:
    return {
        "datetime": label,
        "open": _price(bar.open),
        "high": _price(bar.high),
        "low": _price(bar.low),
        "close": _price(bar.close),
        "volume": _volume(bar.volume),
    }


def _within(request: web.Request, found: Iterable[tuple[date, float]]) -> list[tuple[date, float]]:
    first = _moment(request, "start_date").date() if "start_date" in request.query else date.min
    last = _moment(request, "end_date").date() if "end_date" in request.query else date.max
    kept = [one for one in found if first <= one[0] <= last]
    is_last = request.query.get("range", "last") == "last" and "start_date" not in request.query
    return kept[:1] if is_last else kept


def _split(day: date, factor: float) -> dict[str, Any]:
    # The provider's ratio is old shares for one new, and its "from" counts the new ones.
    new, old = (factor, 1) if factor >= 1 else (1, round(1 / factor, 6))
    return {
        "date": str(day),
        "description": f"{new:g}-for-{old:g} split",
        "ratio": round(old / new, 6),
        "from_factor": new,
        "to_factor": old,
    }


def _price(price: float) -> str:
    return f"{price:.5f}"


def _volume(volume: float) -> str:
    return str(int(volume)) if volume.is_integer() else repr(volume)
