"""
Alpha Vantage as the app sees it: one path, the key in the query, and HTTP 200 whatever happens.

Prices are as traded. A bar is shown once it has closed: of the day that is still trading we hold only what
became of it, so there is no row of today before the session's close.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from aiohttp import web

from infra.local.replay.almanac import SOURCE, Almanac, Article
from infra.local.replay.desk import Desk
from infra.local.replay.plans import Plan
from infra.local.replay.refusals import RefusalError
from infra.local.replay.tapes import LastDay, Tape, Tapes, View, quoted_bar
from shared.market.models import Bar, Interval, ReportTime
from shared.market.sessions import EXCHANGE, calendar

PATH = "/alpha_vantage/query"

_COMPACT = 100
_TRAILING = timedelta(days=30)
_DELAY = timedelta(minutes=15)
_MONTH = re.compile(r"(?P<year>20\d{2})-(?P<month>0[1-9]|1[0-2])")
_INTERVALS = {"1min": Interval.MINUTE, "60min": Interval.HOUR}
_ACCEPTED = ("*/*", "application/*", "application/json")
_HORIZONS = {"3month": 91, "6month": 182, "12month": 365}
_MOMENTS = {ReportTime.BEFORE_OPEN: "pre-market", ReportTime.AFTER_CLOSE: "post-market"}
_MOST_NEWS = 1000
_TOPIC = "financial_markets"
"""What every article of the replay is about."""
_BANDS = ((-0.35, "Bearish"), (-0.15, "Somewhat-Bearish"), (0.15, "Neutral"), (0.35, "Somewhat-Bullish"))
_SENTIMENT_DEFINITION = (
    "x <= -0.35: Bearish; -0.35 < x <= -0.15: Somewhat-Bearish; -0.15 < x < 0.15: Neutral; "
    "0.15 <= x < 0.35: Somewhat_Bullish; x >= 0.35: Bullish"
)
_RELEVANCE_DEFINITION = "0 < x <= 1, with a higher score indicating higher relevance."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    function: str
    params: Mapping[str, str]
    plan: Plan

    def param(self, name: str, default: str = "") -> str:
        return self.params.get(name, default).strip()

    @property
    def symbol(self) -> str:
        return self.param("symbol").upper()

    @property
    def is_csv(self) -> bool:
        return self.param("datatype") == "csv"

    def invalid(self) -> RefusalError:
        return RefusalError("invalid_call")

    def premium_only(self) -> None:
        if not self.plan.is_premium:
            raise RefusalError("premium_endpoint")

    def premium_parameter(self, name: str) -> None:
        if not self.plan.is_premium:
            raise RefusalError("premium_parameter", parameter=f"{name}={self.param(name)}")

    def is_full(self) -> bool:
        size = self.param("outputsize", "compact")
        if size not in {"compact", "full"}:
            raise self.invalid()
        if size == "full":
            self.premium_parameter("outputsize")
        return size == "full"


class AlphaVantage:
    """Answers /alpha_vantage/query from tapes."""

    def __init__(self, tapes: Tapes, almanac: Almanac, desk: Desk) -> None:
        self._tapes = tapes
        self._almanac = almanac
        self._desk = desk
        self._functions: Mapping[str, Callable[[_Call], str]] = {
            "TIME_SERIES_DAILY": self._daily,
            "TIME_SERIES_DAILY_ADJUSTED": self._daily_adjusted,
            "TIME_SERIES_INTRADAY": self._intraday,
            "GLOBAL_QUOTE": self._global_quote,
            "SYMBOL_SEARCH": self._symbol_search,
            "MARKET_STATUS": self._market_status,
            "SPLITS": self._splits,
            "DIVIDENDS": self._dividends,
            "EARNINGS_CALENDAR": self._earnings_calendar,
            "NEWS_SENTIMENT": self._news_sentiment,
        }

    def routes(self) -> list[web.RouteDef]:
        """The path of this provider."""
        return [web.get(PATH, self._query)]

    async def _query(self, request: web.Request) -> web.StreamResponse:
        function, key = request.query.get("function", ""), request.query.get("apikey", "")

        def answer() -> web.Response:
            if not any(kind in request.headers.get("Accept", "*/*") for kind in _ACCEPTED):
                raise RefusalError("not_acceptable")
            plan = self._plan(key)
            known = self._functions.get(function)
            if known is None:
                raise RefusalError("unknown_function")
            text = known(_Call(function=function, params=request.query, plan=plan))
            kind = "application/json" if text.startswith("{") else "application/x-download"
            return web.Response(text=text, content_type=kind)

        symbol = request.query.get("symbol", request.query.get("tickers", "")).strip().upper()
        return await self._desk.serve(request, answer, symbol=symbol, words={"function": function, "key": key})

    def _plan(self, key: str) -> Plan:
        if key == "demo":
            raise RefusalError("demo_key")
        plan = self._desk.plans.get(key)
        if plan is None:
            raise RefusalError("invalid_key")
        full = self._desk.turnstile.admit(key, plan.alpha_vantage)
        if full is not None:
            raise RefusalError(f"per_{full.name}", calls=full.calls)
        return plan

    def _view(self, call: _Call, interval: Interval) -> View:
        view = self._tapes.view(call.symbol, interval)
        if view is None:
            raise call.invalid()
        return view

    def _daily(self, call: _Call) -> str:
        view = self._view(call, Interval.DAY)
        places = _days(call, view)
        if call.is_csv:
            return _csv("timestamp,open,high,low,close,volume", view.tape.texts(places, _daily_csv))
        meta = _daily_meta(call, view, "Daily Prices (open, high, low, close) and Volumes")
        return _series(meta, "Time Series (Daily)", view.tape.texts(places, _daily_json))

    def _daily_adjusted(self, call: _Call) -> str:
        call.premium_only()
        view = self._view(call, Interval.DAY)
        places = _days(call, view)
        if view.tape.has_splits:
            write = _adjusted_csv if call.is_csv else _adjusted_json
            rows = [write(view.tape, place, view.divisor(place)) for place in reversed(places)]
        else:
            rows = view.tape.texts(places, _unsplit_csv if call.is_csv else _unsplit_json)
        if call.is_csv:
            header = "timestamp,open,high,low,close,adjusted_close,volume,dividend_amount,split_coefficient"
            return _csv(header, rows)
        meta = _daily_meta(call, view, "Daily Time Series with Splits and Dividend Events")
        return _series(meta, "Time Series (Daily)", rows)

    def _intraday(self, call: _Call) -> str:
        call.premium_only()
        interval = _INTERVALS.get(call.param("interval"))
        if interval is None:
            raise call.invalid()
        view = self._view(call, interval)
        places = self._stretch(call, view)
        if call.param("adjusted", "true") == "false" or not view.tape.has_splits:
            rows = view.tape.texts(places, _intraday_csv if call.is_csv else _intraday_json)
        else:
            write = _bar_csv if call.is_csv else _bar_json
            bars = (quoted_bar(view, place) for place in reversed(places))
            rows = [write(_label(bar.opened_at, view.tape.zone), bar) for bar in bars]
        if call.is_csv:
            return _csv("timestamp,open,high,low,close,volume", rows)
        name = call.param("interval")
        newest = view.tape.opens[places[-1]] if places else self._tapes.now()
        meta = {
            "1. Information": f"Intraday ({name}) open, high, low, close prices and volume",
            "2. Symbol": call.symbol,
            "3. Last Refreshed": _label(newest, view.tape.zone),
            "4. Interval": name,
            "5. Output Size": "Full size" if call.is_full() else "Compact",
            "6. Time Zone": _zone_name(view),
        }
        return _series(meta, f"Time Series ({name})", rows)

    def _stretch(self, call: _Call, view: View) -> Sequence[int]:
        begin, end = 0, view.count
        if call.param("month"):
            month = _MONTH.fullmatch(call.param("month"))
            if month is None:
                raise call.invalid()
            first = datetime(int(month["year"]), int(month["month"]), 1, tzinfo=view.tape.zone)
            following = (first + timedelta(days=32)).replace(day=1)
            begin, end = view.since(first), view.since(following)
        elif call.is_full():
            begin = view.since(self._tapes.now() - _TRAILING)
        places: Sequence[int] = range(begin, end)
        if call.param("extended_hours", "true") == "false" and view.tape.outside:
            places = [place for place in places if place not in view.tape.outside]
        return places if call.is_full() else places[-_COMPACT:]

    def _global_quote(self, call: _Call) -> str:
        if not call.symbol:
            raise call.invalid()
        name, last = self._last_day(call)
        fields = _quote_fields(call.symbol, last) if last else {}
        if call.is_csv:
            header = "symbol,open,high,low,price,volume,latestDay,previousClose,change,changePercent"
            return _csv(header, [",".join(fields.values())] if fields else [])
        return json.dumps({name: fields})

    def _last_day(self, call: _Call) -> tuple[str, LastDay | None]:
        """What the quote is called, and the day it tells of: the last that is over, unless the key buys a fresher."""
        entitlement = call.param("entitlement")
        if not entitlement:
            return "Global Quote", self._tapes.last_day(call.symbol, is_over=True)
        if entitlement not in {"realtime", "delayed"}:
            raise call.invalid()
        call.premium_parameter("entitlement")
        if entitlement == "realtime":
            return "Global Quote", self._tapes.last_day(call.symbol)
        with self._tapes.at(self._tapes.now() - _DELAY):
            return "Global Quote - DATA DELAYED BY 15 MINUTES", self._tapes.last_day(call.symbol)

    def _symbol_search(self, call: _Call) -> str:
        if not call.param("keywords"):
            raise call.invalid()
        offset = self._tapes.now().astimezone(calendar(EXCHANGE).zone).utcoffset() or timedelta()
        matches = [
            {
                "1. symbol": symbol,
                "2. name": name,
                "3. type": "Equity",
                "4. region": "United States",
                "5. marketOpen": "09:30",
                "6. marketClose": "16:00",
                "7. timezone": f"UTC{offset // timedelta(hours=1):+03d}",
                "8. currency": "USD",
                "9. matchScore": f"{score:.4f}",
            }
            for symbol, name, score in self._tapes.matching(call.param("keywords"))[:10]
        ]
        if call.is_csv:
            header = "symbol,name,type,region,marketOpen,marketClose,timezone,currency,matchScore"
            return _csv(header, (",".join(map(_quoted, match.values())) for match in matches))
        return json.dumps({"bestMatches": matches})

    def _market_status(self, call: _Call) -> str:
        is_open = calendar(EXCHANGE).session_at(self._tapes.now()) is not None
        market = {
            "market_type": "Equity",
            "region": "United States",
            "primary_exchanges": "NASDAQ, NYSE, AMEX, BATS",
            "local_open": "09:30",
            "local_close": "16:15",
            "current_status": "open" if is_open else "closed",
            "notes": "",
        }
        return json.dumps({"endpoint": "Global Market Open & Close Status", "markets": [market]})

    def _splits(self, call: _Call) -> str:
        if not call.symbol:
            raise call.invalid()
        splits = [(str(day), f"{factor:.4f}") for day, factor in self._tapes.splits(call.symbol)]
        if call.is_csv:
            return _csv("effective_date,split_factor", map(",".join, splits))
        if not self._tapes.knows(call.symbol):
            return "{}"
        data = [{"effective_date": day, "split_factor": factor} for day, factor in splits]
        return json.dumps({"symbol": call.symbol, "data": data})

    def _dividends(self, call: _Call) -> str:
        # No package has recorded a dividend, and none is made up.
        if not call.symbol:
            raise call.invalid()
        if call.is_csv:
            return _csv("ex_dividend_date,declaration_date,record_date,payment_date,amount", [])
        if not self._tapes.knows(call.symbol):
            return "{}"
        return json.dumps({"symbol": call.symbol, "data": []})

    def _earnings_calendar(self, call: _Call) -> str:
        days = _HORIZONS.get(call.param("horizon", "3month"))
        if days is None:
            raise call.invalid()
        today = self._tapes.now().astimezone(calendar(EXCHANGE).zone).date()
        reports = self._almanac.reports(today, today + timedelta(days=days), call.symbol or None)
        rows = (
            f"{r.symbol},{_quoted(f'{self._tapes.names[r.symbol]} ({SOURCE})')},{r.day},{r.fiscal_end},"
            f"{r.eps_estimate:g},USD,{_MOMENTS.get(r.time, '')}"
            for r in reports
            if r.out_at > self._tapes.now()
        )
        return _csv("symbol,name,reportDate,fiscalDateEnding,estimate,currency,timeOfTheDay", rows)

    def _news_sentiment(self, call: _Call) -> str:
        wanted = [one.strip().upper() for one in call.param("tickers").split(",") if one.strip()]
        topics = [one.strip() for one in call.param("topics").split(",") if one.strip()]
        order = call.param("sort", "LATEST")
        try:
            limit = int(call.param("limit", "50"))
            since = _news_time(call.param("time_from")) or datetime.min.replace(tzinfo=UTC)
            until = _news_time(call.param("time_to")) or self._tapes.now()
        except ValueError as e:
            raise RefusalError("no_news") from e
        # Each article is about one symbol, so none mentions two, and there is one topic.
        is_empty = len(wanted) > 1 or any(topic != _TOPIC for topic in topics)
        if is_empty or not 0 < limit <= _MOST_NEWS or order not in {"LATEST", "EARLIEST", "RELEVANCE"}:
            raise RefusalError("no_news")
        known = self._almanac
        found = known.articles(wanted[0], since, until) if wanted else known.articles_of_all(since, until)
        if not found:
            raise RefusalError("no_news")
        found.sort(key=lambda article: (article.published_at, article.number), reverse=order != "EARLIEST")
        feed = [_article(article) for article in found[:limit]]
        return json.dumps(
            {
                "items": str(len(feed)),
                "sentiment_score_definition": _SENTIMENT_DEFINITION,
                "relevance_score_definition": _RELEVANCE_DEFINITION,
                "feed": feed,
            }
        )


def _series(meta: Mapping[str, str], name: str, rows: Iterable[str]) -> str:
    return f'{{"Meta Data":{json.dumps(meta)},{json.dumps(name)}:{{{",".join(rows)}}}}}'


def _csv(header: str, rows: Iterable[str]) -> str:
    return "\r\n".join([header, *rows, ""])


def _quoted(text: str) -> str:
    return f'"{text.replace('"', '""')}"' if "," in text or '"' in text else text


def _days(call: _Call, view: View) -> range:
    return range(0 if call.is_full() else max(view.count - _COMPACT, 0), view.count)


def _daily_meta(call: _Call, view: View, information: str) -> dict[str, str]:
    return {
        "1. Information": information,
        "2. Symbol": call.symbol,
        "3. Last Refreshed": str(view.last_date) if view.count else "",
        "4. Output Size": "Full size" if call.is_full() else "Compact",
        "5. Time Zone": _zone_name(view),
    }


def _zone_name(view: View) -> str:
    return "US/Eastern" if view.tape.series.calendar == EXCHANGE else "UTC"


def _label(opened_at: datetime, zone: ZoneInfo) -> str:
    return opened_at.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")


def _volume(volume: float) -> str:
    return str(int(volume)) if volume.is_integer() else repr(volume)


def _news_time(text: str) -> datetime | None:
    """A time such as 20120301T0930, in UTC; None for no text."""
    return datetime.strptime(text, "%Y%m%dT%H%M").replace(tzinfo=UTC) if text else None


def _article(article: Article) -> dict[str, Any]:
    label = next((name for bound, name in _BANDS if article.sentiment <= bound), "Bullish")
    return {
        "title": article.title,
        "url": article.url,
        "time_published": article.published_at.strftime("%Y%m%dT%H%M%S"),
        "authors": [],
        "summary": article.summary,
        "banner_image": None,
        "source": SOURCE,
        "category_within_source": "n/a",
        "source_domain": "replay.example",
        "topics": [{"topic": "Financial Markets", "relevance_score": "1.0"}],
        "overall_sentiment_score": article.sentiment,
        "overall_sentiment_label": label,
        "ticker_sentiment": [
            {
                "ticker": article.symbol,
                "relevance_score": "1.0",
                "ticker_sentiment_score": f"{article.sentiment:.6f}",
                "ticker_sentiment_label": label,
            }
        ],
    }


def _daily_json(tape: Tape, place: int) -> str:
    return _bar_json(str(tape.local_date(place)), tape.bars[place])


def _daily_csv(tape: Tape, place: int) -> str:
    return _bar_csv(str(tape.local_date(place)), tape.bars[place])


def _intraday_json(tape: Tape, place: int) -> str:
    return _bar_json(_label(tape.opens[place], tape.zone), tape.bars[place])


def _intraday_csv(tape: Tape, place: int) -> str:
    return _bar_csv(_label(tape.opens[place], tape.zone), tape.bars[place])


def _bar_json(label: str, bar: Bar) -> str:
    return (
        f'"{label}":{{"1. open":"{bar.open:.4f}","2. high":"{bar.high:.4f}","3. low":"{bar.low:.4f}",'
        f'"4. close":"{bar.close:.4f}","5. volume":"{_volume(bar.volume)}"}}'
    )


def _bar_csv(label: str, bar: Bar) -> str:
    return f"{label},{bar.open:.4f},{bar.high:.4f},{bar.low:.4f},{bar.close:.4f},{_volume(bar.volume)}"


# The adjusted endpoint writes numbers as short as they go, unlike the raw one with its four decimals.


def _adjusted_json(tape: Tape, place: int, divisor: float) -> str:
    bar = tape.bars[place]
    return (
        f'"{tape.local_date(place)}":{{"1. open":"{bar.open}","2. high":"{bar.high}","3. low":"{bar.low}",'
        f'"4. close":"{bar.close}","5. adjusted close":"{bar.close / divisor}","6. volume":"{_volume(bar.volume)}",'
        f'"7. dividend amount":"0.0000","8. split coefficient":"{bar.split}"}}'
    )


def _adjusted_csv(tape: Tape, place: int, divisor: float) -> str:
    bar = tape.bars[place]
    return (
        f"{tape.local_date(place)},{bar.open},{bar.high},{bar.low},{bar.close},{bar.close / divisor},"
        f"{_volume(bar.volume)},0.0000,{bar.split}"
    )


def _unsplit_json(tape: Tape, place: int) -> str:
    return _adjusted_json(tape, place, 1.0)


def _unsplit_csv(tape: Tape, place: int) -> str:
    return _adjusted_csv(tape, place, 1.0)


def _quote_fields(symbol: str, last: LastDay) -> dict[str, str]:
    before = last.previous_close
    change = last.price - before if before is not None else 0.0
    return {
        "01. symbol": symbol,
        "02. open": f"{last.open:.4f}",
        "03. high": f"{last.high:.4f}",
        "04. low": f"{last.low:.4f}",
        "05. price": f"{last.price:.4f}",
        "06. volume": _volume(last.volume),
        "07. latest trading day": str(last.date),
        "08. previous close": f"{before or 0.0:.4f}",
        "09. change": f"{change:.4f}",
        "10. change percent": f"{100 * change / before if before else 0.0:.4f}%",
    }
