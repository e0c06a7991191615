"""
Polygon (now Massive) as the app sees it: numbers, milliseconds of a bar's start, pages, and plain status codes.

A free key buys ended days of the last two years: a range that begins earlier is cut, one that ends earlier or
reaches into today is refused for good. ``results`` is left out where there are none. Only closed bars are shown.

Longer bars are put together of recorded minutes on the clock's grid. Recorded hours begin with the session, off that
grid; where there are no minutes, each is shown as the half hour it begins with, and the other half did not trade.
"""

import base64
import binascii
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from hashlib import blake2b
from typing import Any

from aiohttp import web

from infra.local.replay.almanac import NOTICE, SOURCE, Almanac, Article
from infra.local.replay.desk import Desk
from infra.local.replay.plans import Plan
from infra.local.replay.refusals import RefusalError
from infra.local.replay.tapes import Tapes, View, quoted_bar
from shared.clock import parse_instant
from shared.market.models import Bar, Interval
from shared.market.sessions import EXCHANGE, calendar

PREFIX = "/polygon"

_SPANS = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}
_OTHERS = ("second", "week", "month", "quarter", "year")
_MINUTE, _HALF_HOUR, _DAY = timedelta(minutes=1), timedelta(minutes=30), timedelta(days=1)
_MOST_BARS = 50_000
_MOST_ROWS = 1000
_DIGITS = 6
_FAR = 2**33 * 1000  # the year 2242
_FIRST_DAY, _LAST_DAY = date(1970, 1, 2), date(2242, 1, 1)
_FREE_YEARS = timedelta(days=2 * 365)
_NEUTRAL = 0.05

type _Answer = tuple[dict[str, Any], list[dict[str, Any]]]
"""What stands beside the results, and the results."""


class Polygon:
    """Answers /polygon from tapes."""

    def __init__(self, tapes: Tapes, almanac: Almanac, desk: Desk) -> None:
        self._tapes = tapes
        self._almanac = almanac
        self._desk = desk

    def routes(self) -> list[web.RouteDef]:
        """The paths of this provider."""
        answers: Mapping[str, Callable[[web.Request, Plan, Mapping[str, str]], _Answer]] = {
            "/v2/aggs/ticker/{ticker}/range/{multiplier}/{timespan}/{from}/{to}": self._range,
            "/v2/aggs/ticker/{ticker}/prev": self._previous,
            "/v2/aggs/grouped/locale/us/market/stocks/{date}": self._grouped,
            "/v3/reference/splits": self._splits,
            "/v3/reference/dividends": self._dividends,
            "/v2/reference/news": self._news,
        }
        return [web.get(PREFIX + path, self._handler(answer)) for path, answer in answers.items()]

    def _handler(
        self, answer: Callable[[web.Request, Plan, Mapping[str, str]], _Answer]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            number = blake2b(request.path_qs.encode(), digest_size=16).hexdigest()

            def admitted() -> web.Response:
                plan = self._plan(request)
                full = self._desk.turnstile.admit(plan.key, plan.polygon)
                if full is not None:
                    raise RefusalError(f"per_{full.name}")
                beside, results = answer(request, plan, _asked(request))
                body = {**beside, "status": "OK", "request_id": number}
                if results:
                    body |= {"results": results, "count": len(results)}
                return web.json_response(body)

            ticker = request.match_info.get("ticker", request.query.get("ticker", "")).upper()
            return await self._desk.serve(request, admitted, symbol=ticker, words={"request_id": number})

        return handle

    def _plan(self, request: web.Request) -> Plan:
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else request.query.get("apiKey", "")
        if not key:
            raise RefusalError("missing_key")
        plan = self._desk.plans.get(key)
        if plan is None:
            raise RefusalError("invalid_key")
        return plan

    # --- bars

    def _range(self, request: web.Request, plan: Plan, asked: Mapping[str, str]) -> _Answer:
        ticker = request.match_info["ticker"].upper()
        span, multiplier = request.match_info["timespan"], request.match_info["multiplier"]
        if span not in _SPANS and span not in _OTHERS:
            raise _invalid(f"The parameter 'timespan' cannot be {span}")
        if not (multiplier.isascii() and multiplier.isdecimal() and int(multiplier)):
            raise _invalid("The parameter 'multiplier' must be a positive number")
        begins, ends = _moment(request, "from", is_end=False), _moment(request, "to", is_end=True)
        if begins > ends:
            raise _invalid("The 'to' time must not be before the 'from' time")
        limit = _limit(asked, default=5000, most=_MOST_BARS)
        begins, ends = self._allowed(plan, begins, ends)
        adjusted = asked.get("adjusted", "true") != "false"
        step = int(multiplier) * _SPANS[span] if span in _SPANS and len(multiplier) <= _DIGITS else None
        stamped = self._stamped(ticker, step, begins, ends, adjusted=adjusted) if step else []
        if asked.get("sort", "asc") == "desc":
            stamped.reverse()
        offset = _number(asked, "offset")
        page = stamped[offset : offset + limit]
        results = [{**_numbers(bar), "t": _milliseconds(at)} for at, bar in page]
        beside = {
            "ticker": ticker,
            "queryCount": len(page),
            "resultsCount": len(page),
            "adjusted": adjusted,
            **_next(request, asked, offset + limit if offset + limit < len(stamped) else None),
        }
        return beside, results

    def _stamped(
        self, ticker: str, step: timedelta, begins: datetime, ends: datetime, *, adjusted: bool
    ) -> list[tuple[datetime, Bar]]:
        """The bars of this length that are stamped within a range, oldest first."""
        minutes = self._tapes.view(ticker, Interval.MINUTE)
        if step == _DAY:
            view = self._tapes.view(ticker, Interval.DAY)
        elif minutes and minutes.count:
            view = minutes
        else:
            view = self._tapes.view(ticker, Interval.HOUR) if step == _HALF_HOUR else None
        if view is None or not view.count:
            return []
        if view is minutes and step != _MINUTE:
            return _folded(view, step, begins, ends, now=self._tapes.now(), adjusted=adjusted)
        return [(_stamp(view, place), _bar(view, place, adjusted=adjusted)) for place in _places(view, begins, ends)]

    def _previous(self, request: web.Request, plan: Plan, asked: Mapping[str, str]) -> _Answer:
        ticker = request.match_info["ticker"].upper()
        view = self._tapes.view(ticker, Interval.DAY)
        adjusted = asked.get("adjusted", "true") != "false"
        place = -1
        if view is not None:
            place = view.count - 1
            while place >= 0 and not plan.is_premium and view.tape.local_date(place) >= self._today():
                place -= 1
        results = [_of_close(view, place, ticker, adjusted=adjusted)] if view and place >= 0 else []
        count = len(results)
        return {"ticker": ticker, "queryCount": count, "resultsCount": count, "adjusted": adjusted}, results

    def _grouped(self, request: web.Request, plan: Plan, asked: Mapping[str, str]) -> _Answer:
        day = _day(request.match_info["date"], "date")
        self._allowed(plan, _midnight(day), _last_instant(day))
        adjusted = asked.get("adjusted", "true") != "false"
        results = []
        for symbol in sorted(self._tapes.names):
            view = self._tapes.view(symbol, Interval.DAY)
            place = view.of_date(day) if view else None
            if view is not None and place is not None:
                results.append(_of_close(view, place, symbol, adjusted=adjusted))
        return {"queryCount": len(results), "resultsCount": len(results), "adjusted": adjusted}, results

    def _allowed(self, plan: Plan, begins: datetime, ends: datetime) -> tuple[datetime, datetime]:
        """What of a range the key buys."""
        if plan.is_premium:
            return begins, ends
        today = self._today()
        oldest = _midnight(today - _FREE_YEARS)
        if ends < oldest or ends >= _midnight(today):
            raise RefusalError("not_authorized")
        return max(begins, oldest), ends

    def _today(self) -> date:
        return self._tapes.now().astimezone(calendar(EXCHANGE).zone).date()

    # --- reference data

    def _splits(self, request: web.Request, plan: Plan, asked: Mapping[str, str]) -> _Answer:
        wanted = asked.get("ticker", "").upper()
        found = [
            (day, symbol, factor)
            for symbol in ([wanted] if wanted else sorted(self._tapes.names))
            for day, factor in self._tapes.splits(symbol)
            if _is_asked(asked, "execution_date", str(day))
        ]
        found.sort(key=lambda one: (one[0], one[1]), reverse=asked.get("order", "desc") != "asc")
        results = [
            {
                "execution_date": str(day),
                "id": blake2b(f"{symbol}|{day}".encode(), digest_size=16).hexdigest(),
                "split_from": 1 if factor >= 1 else round(1 / factor, 6),
                "split_to": max(factor, 1),
                "ticker": symbol,
            }
            for day, symbol, factor in found
        ]
        return _paged(request, asked, results)

    def _dividends(self, request: web.Request, plan: Plan, asked: Mapping[str, str]) -> _Answer:
        # No package has recorded a dividend, and none is made up.
        return _paged(request, asked, [])

    def _news(self, request: web.Request, plan: Plan, asked: Mapping[str, str]) -> _Answer:
        wanted = asked.get("ticker", "").upper()
        beginning, now = datetime(1970, 1, 1, tzinfo=UTC), self._tapes.now()
        known = self._almanac
        found = [
            article
            for article in (known.articles(wanted, beginning, now) if wanted else known.articles_of_all(beginning, now))
            if _is_asked(asked, "published_utc", f"{article.published_at:%Y-%m-%dT%H:%M:%SZ}")
        ]
        found.sort(key=lambda one: (one.published_at, one.number), reverse=asked.get("order", "desc") != "asc")
        return _paged(request, asked, [_article(article) for article in found])


# --- what was asked


def _asked(request: web.Request) -> dict[str, str]:
    """The parameters; those of a next page are in its cursor."""
    given = dict(request.query)
    cursor = given.pop("cursor", None)
    if cursor is None:
        return {name: value for name, value in given.items() if name != "offset"}
    try:
        kept = json.loads(base64.urlsafe_b64decode(cursor))
        return {str(name): str(value) for name, value in kept.items()}
    except (binascii.Error, ValueError, AttributeError) as e:
        raise _invalid("The parameter 'cursor' is none of ours") from e


def _next(request: web.Request, asked: Mapping[str, str], offset: int | None) -> dict[str, str]:
    if offset is None:
        return {}
    kept = {name: value for name, value in asked.items() if name not in {"apiKey", "offset"}} | {"offset": str(offset)}
    cursor = base64.urlsafe_b64encode(json.dumps(kept).encode()).decode()
    return {"next_url": str(request.url.origin().with_path(request.path).with_query(cursor=cursor))}


def _paged(request: web.Request, asked: Mapping[str, str], found: Sequence[dict[str, Any]]) -> _Answer:
    limit, offset = _limit(asked, default=10, most=_MOST_ROWS), _number(asked, "offset")
    page = found[offset : offset + limit]
    return _next(request, asked, offset + limit if offset + limit < len(found) else None), list(page)


def _is_asked(asked: Mapping[str, str], name: str, value: str) -> bool:
    """Whether a date or time lies within ``name``, ``name.gte``, ``name.gt``, ``name.lte`` and ``name.lt``."""
    tests: Mapping[str, Callable[[str], bool]] = {
        f"{name}.gte": lambda bound: value >= bound,
        f"{name}.gt": lambda bound: value > bound,
        f"{name}.lte": lambda bound: value <= bound,
        f"{name}.lt": lambda bound: value < bound,
        name: value.startswith,
    }
    return all(holds(_bound(asked[key])) for key, holds in tests.items() if key in asked)


def _bound(text: str) -> str:
    """A date as it is; a time as UTC to the second, so that texts compare."""
    if len(text) == len("2012-03-01"):
        return str(_day(text, "date"))
    try:
        return f"{parse_instant(text):%Y-%m-%dT%H:%M:%SZ}"
    except ValueError as e:
        raise _invalid(f"Could not parse the time {text!r}. Use YYYY-MM-DD or an RFC 3339 time") from e


def _invalid(text: str) -> RefusalError:
    return RefusalError("invalid_call", text=text)


def _number(asked: Mapping[str, str], name: str) -> int:
    text = asked.get(name, "0")
    if not (text.isascii() and text.isdecimal()):
        raise _invalid(f"The parameter '{name}' must be a number")
    return int(text)


def _limit(asked: Mapping[str, str], *, default: int, most: int) -> int:
    limit = _number(asked, "limit") or default
    if limit > most:
        raise _invalid(f"The parameter 'limit' cannot exceed {most}")
    return limit


def _day(text: str, name: str) -> date:
    try:
        return min(max(date.fromisoformat(text), _FIRST_DAY), _LAST_DAY)
    except ValueError as e:
        raise _invalid(f"Could not parse the time parameter: '{name}'. Use YYYY-MM-DD or Unix MS Timestamps") from e


def _moment(request: web.Request, name: str, *, is_end: bool) -> datetime:
    """Milliseconds as they are; a date is its midnight in New York, or the last instant of it."""
    text = request.match_info[name]
    if text.isascii() and text.isdecimal() and len(text) != len("20120301"):
        return datetime.fromtimestamp(min(int(text), _FAR) / 1000, UTC)
    day = _day(text, name)
    return _last_instant(day) if is_end else _midnight(day)


def _midnight(day: date) -> datetime:
    """When a day begins in New York."""
    return datetime.combine(day, time(), calendar(EXCHANGE).zone).astimezone(UTC)


def _last_instant(day: date) -> datetime:
    """The last millisecond of a day in New York."""
    return _midnight(day + timedelta(days=1)) - timedelta(milliseconds=1)


# --- what is answered


def _stamp(view: View, place: int) -> datetime:
    if view.tape.series.interval is Interval.DAY:
        return _midnight(view.tape.local_date(place))
    return view.tape.opens[place]


def _places(view: View, begins: datetime, ends: datetime) -> range:
    # A day's stamp is its midnight, so its open lies up to a day behind the stamp.
    begin, end = view.since(begins), view.until(ends)
    while begin < end and _stamp(view, begin) < begins:
        begin += 1
    while end < view.count and _stamp(view, end) <= ends:
        end += 1
    return range(begin, end)


def _bar(view: View, place: int, *, adjusted: bool) -> Bar:
    return quoted_bar(view, place) if adjusted else view.tape.bars[place]


def _folded(
    view: View, step: timedelta, begins: datetime, ends: datetime, *, now: datetime, adjusted: bool
) -> list[tuple[datetime, Bar]]:
    """Minutes put together to longer bars that begin at multiples of *step* from midnight in New York."""
    found: dict[datetime, Bar] = {}
    for place in _places(view, begins - step, ends + step):
        bar = _bar(view, place, adjusted=adjusted)
        midnight = _midnight(view.tape.local_date(place))
        at = midnight + (bar.opened_at - midnight) // step * step
        if not begins <= at <= ends or at + step > now:
            continue
        first = found.get(at)
        found[at] = bar if first is None else _joined(first, bar)
    return sorted(found.items())


def _joined(first: Bar, then: Bar) -> Bar:
    return Bar(
        opened_at=first.opened_at,
        closed_at=then.closed_at,
        open=first.open,
        high=max(first.high, then.high),
        low=min(first.low, then.low),
        close=then.close,
        volume=first.volume + then.volume,
    )


def _of_close(view: View, place: int, ticker: str, *, adjusted: bool) -> dict[str, Any]:
    """A whole day's aggregate: unlike a range's, its stamp is the close."""
    return {"T": ticker, **_numbers(_bar(view, place, adjusted=adjusted)), "t": _milliseconds(view.tape.closes[place])}


# No package has recorded trades, so there is neither their number nor a volume-weighted price.
def _numbers(bar: Bar) -> dict[str, float]:
    return {"v": bar.volume, "o": bar.open, "c": bar.close, "h": bar.high, "l": bar.low}


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def _article(article: Article) -> dict[str, Any]:
    mood = "positive" if article.sentiment > _NEUTRAL else "negative" if article.sentiment < -_NEUTRAL else "neutral"
    return {
        "id": f"{article.number:032x}",
        "publisher": {"name": SOURCE, "homepage_url": "https://replay.example/"},
        "title": article.title,
        "author": SOURCE,
        "published_utc": f"{article.published_at:%Y-%m-%dT%H:%M:%SZ}",
        "article_url": article.url,
        "tickers": [article.symbol],
        "description": article.summary,
        "keywords": [],
        "insights": [{"ticker": article.symbol, "sentiment": mood, "sentiment_reasoning": NOTICE}],
    }
