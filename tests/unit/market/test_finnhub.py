import json
import logging
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    NotEntitledError,
    RateLimitedError,
    RefusedError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.http_client import HttpClient
from shared.market.adapters.finnhub import Finnhub
from shared.market.models import Adjustment, Interval
from shared.market.ports import Limits
from tests.unit.market.turns import TakingTurns, Turns, everything_told

ROOT = Path(__file__).resolve().parents[3]
PAYLOADS = ROOT / "tests" / "payloads" / "finnhub"
RECORDED = ROOT.parent / "shared" / "payloads" / "finnhub"
KEY = "CANARY7KEY9QX"
NOW = datetime(2024, 7, 8, 12, tzinfo=UTC)
WALL = datetime(2026, 11, 21, 9, tzinfo=UTC)


def payload(name: str) -> str:
    return (PAYLOADS / name).read_text(encoding="utf-8")


def epoch(text: str) -> int:
    return int(datetime.fromisoformat(f"{text}+00:00").timestamp())


def instant(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


def candles(*stamps: object, **columns: list[object]) -> str:
    one = {"o": 5.0, "h": 6.0, "l": 4.0, "c": 5.0, "v": 10}
    return json.dumps({"s": "ok", "t": list(stamps)} | {name: [one[name]] * len(stamps) for name in one} | columns)


class Endpoint:
    """Answers as told and remembers what was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.turns = Turns()

    def __call__(self, request):
        assert self.turns.inside == 1
        assert KEY not in str(request.url)
        assert request.headers["X-Finnhub-Token"] == KEY
        params = dict(request.url.params)
        self.asked.append((request.url.path, params))
        answer = self.answer(params) if callable(self.answer) else self.answer
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, text=answer)


@pytest.fixture
async def provider():
    opened = []

    def make(answer, plan="premium"):
        endpoint = Endpoint(answer)
        http = HttpClient("Finnhub", transport=lambda: httpx.MockTransport(endpoint))
        opened.append(http)
        made = Finnhub(
            base_url="https://provider.test/api/v1/",
            key=SecretStr(KEY),
            plan=plan,
            http=http,
            clock=StoppedClock(WALL),
            market_clock=StoppedClock(NOW),
        )
        return TakingTurns(made, endpoint.turns), endpoint

    yield make
    for http in opened:
        await http.aclose()


SECONDS = timedelta(seconds=1)
REFUSALS = [
    (401, payload("refusals/no_key.json"), {}, ConfigurationError, None),
    (401, payload("refusals/invalid_key.json"), {}, ConfigurationError, None),
    (401, payload("refusals/no_access.json"), {}, NotEntitledError, None),
    (403, payload("refusals/no_access.json"), {}, NotEntitledError, None),
    (403, "", {}, NotEntitledError, None),
    (429, "API limit reached. Please sign up for a free account to get more.", {}, ConfigurationError, None),
    (429, payload("refusals/limit.json"), {}, RateLimitedError, 60 * SECONDS),
    (429, "API limit reached.", {}, RateLimitedError, 60 * SECONDS),
    (429, "error\nAPI limit reached.\n", {}, RateLimitedError, 60 * SECONDS),
    (
        429,
        payload("refusals/limit.json"),
        {"X-Ratelimit-Reset": str(int(WALL.timestamp()) + 42)},
        RateLimitedError,
        42 * SECONDS,
    ),
    (429, payload("refusals/limit.json"), {"X-Ratelimit-Reset": "17"}, RateLimitedError, 17 * SECONDS),
    (
        429,
        payload("refusals/limit.json"),
        {"X-Ratelimit-Reset": str(int(WALL.timestamp()) - 5)},
        RateLimitedError,
        SECONDS,
    ),
    (429, "", {"X-Ratelimit-Reset": "soon"}, RateLimitedError, 60 * SECONDS),
    (429, "", {"X-Ratelimit-Reset": "nan"}, RateLimitedError, 60 * SECONDS),
    (429, "", {"X-Ratelimit-Reset": "999999999"}, RateLimitedError, 3600 * SECONDS),
    (429, "", {"X-Ratelimit-Remaining": "0", "X-Ratelimit-Reset": "9"}, RateLimitedError, 9 * SECONDS),
    (429, "", {"X-Ratelimit-Remaining": "31", "X-Ratelimit-Reset": "40"}, RateLimitedError, SECONDS),
    (429, "", {"Retry-After": "5"}, RateLimitedError, 5 * SECONDS),
    (200, payload("refusals/limit.json"), {}, RateLimitedError, 60 * SECONDS),
    (200, payload("refusals/symbol_not_supported.json"), {}, UnknownSymbolError, None),
    (200, payload("refusals/unknown_prose.json"), {}, UnavailableError, None),
    (422, '{"error": "Wrong resolution"}', {}, RefusedError, None),
    (404, "<html>Not found</html>", {}, RefusedError, None),
    (302, "", {}, UnavailableError, None),
    (500, "<html>Sign up for our status page about any symbol</html>", {}, UnavailableError, None),
    (503, "", {}, UnavailableError, None),
    (200, "<html>We will be right back</html>", {}, UnavailableError, None),
    (200, '{"s": "ok", "t": [17', {}, UnavailableError, None),
    (200, "[]", {}, UnavailableError, None),
    (200, "[" * 100_000, {}, UnavailableError, None),
    (200, "{}", {}, UnavailableError, None),
]


@pytest.mark.parametrize(
    ("status", "body", "headers", "error", "wait"), REFUSALS, ids=[f"{r[0]} {r[1][:40]!r} {r[2]}" for r in REFUSALS]
)
async def test_refusal_becomes_our_error(provider, status, body, headers, error, wait):
    """Finnhub's status and its words together say whether to wait, to stop or to call a person."""
    finnhub, _ = provider(httpx.Response(status, text=body, headers=headers))

    with pytest.raises(TroopError) as caught:
        await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert type(caught.value) is error
    assert getattr(caught.value, "retry_after", None) == wait


def test_every_refusal_on_file_is_judged():
    """A sentence somebody adds to the payloads needs a row in the table above."""
    judged = {body for _, body, *_ in REFUSALS}

    assert {path.name for path in (PAYLOADS / "refusals").iterdir() if path.read_text() not in judged} == set()


async def test_missing_entitlement_names_the_plan(provider):
    """Whoever reads the refusal learns which setting it is about."""
    finnhub, _ = provider(httpx.Response(403, text=payload("refusals/no_access.json")), plan="free")

    with pytest.raises(NotEntitledError, match=r"plan \(free\).*FINNHUB_PLAN"):
        await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)


async def test_refusal_of_a_foreign_exchange_is_not_the_endpoint(provider):
    """A free key that is refused a German stock must not lose all quotes: a refusal is remembered for good."""
    finnhub, endpoint = provider(
        lambda params: (
            httpx.Response(403, text=payload("refusals/no_access.json"))
            if params["symbol"] == "ACME.DE"
            else payload("quote.json")
        )
    )

    with pytest.raises(NotEntitledError):
        await finnhub.quote("ACME.DE")

    assert endpoint.turns.refused == {("quote", "symbol=*.DE")}
    assert (await finnhub.quote("ACME")).price == 51.5


@pytest.mark.parametrize("name", ["candle_daily_midnight.json", "candle_daily_at_open.json"])
async def test_daily_bars_cover_their_session(provider, name):
    """Daily stamps come at midnight UTC or at the open; either way the bar is that session's, half days included."""
    finnhub, endpoint = provider(payload(name))

    fetched = await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)

    [(path, params)] = endpoint.asked
    assert path == "/api/v1/stock/candle"
    assert params == {
        "symbol": "ACME",
        "resolution": "D",
        "from": str(epoch("1980-01-02T00:00:00")),
        "to": str(epoch("2024-07-08T12:00:00")),
    }
    assert (fetched.symbol, fetched.provider, fetched.adjustment) == ("ACME", "finnhub", Adjustment.SPLIT)
    assert [(bar.opened_at, bar.closed_at) for bar in fetched.bars] == [
        (instant("2024-07-01T13:30:00"), instant("2024-07-01T20:00:00")),
        (instant("2024-07-02T13:30:00"), instant("2024-07-02T20:00:00")),
        (instant("2024-07-03T13:30:00"), instant("2024-07-03T17:00:00")),
        (instant("2024-07-05T13:30:00"), instant("2024-07-05T20:00:00")),
    ]
    assert [bar.close for bar in fetched.bars] == [50.0, 50.5, 51.0, 51.5]
    assert {bar.split for bar in fetched.bars} == {1.0}
    assert fetched.refused_rows == ()


@pytest.mark.parametrize(
    ("stamp", "session"),
    [
        ("2024-03-08T00:00:00", "2024-03-08"),
        ("2024-03-08T05:00:00", "2024-03-08"),
        ("2024-03-08T14:30:00", "2024-03-08"),
        ("2024-03-11T00:00:00", "2024-03-11"),
        ("2024-03-11T04:00:00", "2024-03-11"),
        ("2024-03-11T13:30:00", "2024-03-11"),
        ("2024-11-04T05:00:00", "2024-11-04"),
        ("2024-11-04T14:30:00", "2024-11-04"),
    ],
)
async def test_daily_stamp_names_a_session_on_both_sides_of_daylight_saving(provider, stamp, session):
    """Midnight UTC, midnight in New York and the open all mean the same day, in summer and in winter."""
    finnhub, _ = provider(candles(epoch(stamp)))

    fetched = await finnhub.bars("ACME", Interval.DAY, since=None, now=datetime(2025, 1, 1, tzinfo=UTC))

    assert [bar.opened_at.date() for bar in fetched.bars] == [date.fromisoformat(session)]
    assert wall_hour(fetched.bars[0].opened_at) == "09:30"


def wall_hour(at: datetime) -> str:
    from zoneinfo import ZoneInfo

    return at.astimezone(ZoneInfo("America/New_York")).strftime("%H:%M")


async def test_hours_are_raw_and_end_with_the_session(provider):
    """Intraday prices are as traded; on a half day the last hour is half an hour long."""
    finnhub, endpoint = provider(payload("candle_hours.json"))

    fetched = await finnhub.bars("ACME", Interval.HOUR, since=instant("2024-07-02T20:00:00"), now=NOW)

    [(_, params)] = endpoint.asked
    assert (params["resolution"], params["from"]) == ("60", str(epoch("2024-07-02T19:00:00")))
    assert fetched.adjustment is Adjustment.RAW
    assert [bar.closed_at for bar in fetched.bars] == [
        instant("2024-07-03T14:30:00"),
        instant("2024-07-03T15:30:00"),
        instant("2024-07-03T16:30:00"),
        instant("2024-07-03T17:00:00"),
    ]


async def test_minutes_outside_the_session_are_left_out_and_counted(provider):
    """Early and late trading is left out, and the answer says so."""
    finnhub, endpoint = provider(
        candles(
            epoch("2024-07-05T12:00:00"),
            epoch("2024-07-05T13:30:00"),
            epoch("2024-07-05T13:31:30"),
            epoch("2024-07-05T20:00:00"),
        )
    )

    fetched = await finnhub.bars("ACME", Interval.MINUTE, since=None, now=NOW)

    assert endpoint.asked[0][1]["resolution"] == "1"
    assert [bar.closed_at for bar in fetched.bars] == [instant("2024-07-05T13:31:00")]
    assert "no 1m bar of XNYS opens at" in fetched.refused_rows[0]
    assert fetched.refused_rows[1].startswith("2 rows outside the session, from t=")


async def test_no_data_is_an_empty_answer(provider):
    """Finnhub's no_data is an answer, not an error."""
    finnhub, _ = provider(payload("candle_no_data.json"))

    fetched = await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert (fetched.bars, fetched.refused_rows) == ((), ())


@pytest.mark.parametrize(
    ("now", "last"),
    [
        ("2024-07-05T19:59:59", "2024-07-03T17:00:00"),
        ("2024-07-05T20:00:00", "2024-07-05T20:00:00"),
    ],
)
async def test_session_still_open_is_left_out(provider, now, last):
    """Today's row moves until the close: it is no bar yet."""
    finnhub, _ = provider(payload("candle_daily_midnight.json"))

    fetched = await finnhub.bars("ACME", Interval.DAY, since=None, now=instant(now))

    assert fetched.bars[-1].closed_at == instant(last)
    assert fetched.refused_rows == ()


async def test_row_that_cannot_be_true_is_named(provider):
    """An impossible row is left out, and the answer says which and why."""
    days = [f"2024-07-0{day}T00:00:00" for day in (1, 2, 3, 4, 5)]
    finnhub, _ = provider(
        candles(*map(epoch, days), h=[6.0, 3.0, None, 6.0, 6.0], v=[10, 10, 10, 10, -1]),
    )

    fetched = await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert [bar.opened_at.day for bar in fetched.bars] == [1]
    assert [line.split("(")[1][:10] for line in fetched.refused_rows] == [
        "2024-07-02",
        "2024-07-03",
        "2024-07-04",
        "2024-07-05",
    ]
    assert "high is 'None', not a number" in fetched.refused_rows[1]
    assert "no session of XNYS" in fetched.refused_rows[2]


async def test_day_told_twice_counts_once(provider):
    """The same session stamped at midnight and at its open is one bar, and the second row is named."""
    finnhub, _ = provider(candles(epoch("2024-07-05T00:00:00"), epoch("2024-07-05T13:30:00")))

    fetched = await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert len(fetched.bars) == 1
    assert fetched.refused_rows[0].endswith("a second row for the same bar")


async def test_rows_come_oldest_first_whatever_the_order(provider):
    """The answer's order is not relied on."""
    finnhub, _ = provider(candles(epoch("2024-07-05T00:00:00"), epoch("2024-07-01T00:00:00")))

    fetched = await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert [bar.opened_at.day for bar in fetched.bars] == [1, 5]


async def test_stamp_beyond_all_calendars_is_named(provider):
    """Milliseconds where seconds belong name no session, and cost only their row."""
    finnhub, _ = provider(candles(epoch("2024-07-05T00:00:00"), 1720137600000, 10**30))

    fetched = await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert len(fetched.bars) == 1
    assert [line.split(":")[0] for line in fetched.refused_rows] == [
        "t=1720137600000",
        "t=10000000000000000000",
    ]


@pytest.mark.parametrize(
    "body",
    [
        candles(1720137600, c=[1.0, 2.0]),
        candles(1720137600, v=7),
        candles(1720137600, "1720137600"),
        '{"s": "ok", "t": [1720137600]}',
        '{"s": "perhaps"}',
    ],
)
async def test_columns_that_do_not_match(provider, body):
    """Columns of different lengths cannot be put together by guessing."""
    finnhub, _ = provider(body)

    with pytest.raises(UnavailableError, match="columns do not match"):
        await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)


@pytest.mark.parametrize(
    ("interval", "since", "windows"),
    [
        (Interval.DAY, "2024-07-03T17:00:00", [("2024-07-03T00:00:00", "2024-07-08T12:00:00")]),
        (Interval.DAY, "1950-01-01T00:00:00", [("1980-01-02T00:00:00", "2024-07-08T12:00:00")]),
        (Interval.MINUTE, None, [("2024-06-08T12:00:00", "2024-07-08T12:00:00")]),
        (Interval.MINUTE, "2024-07-08T11:00:00", [("2024-07-08T10:59:00", "2024-07-08T12:00:00")]),
        (Interval.MINUTE, "2024-07-09T00:00:00", [("2024-07-08T23:59:00", "2024-07-08T23:59:00")]),
        (
            Interval.MINUTE,
            "2024-05-20T00:01:00",
            [("2024-05-20T00:00:00", "2024-06-19T00:00:00"), ("2024-06-19T00:00:01", "2024-07-08T12:00:00")],
        ),
    ],
)
async def test_what_history_is_asked_for(provider, interval, since, windows):
    """One call covers all days, but only a month of minutes; windows neither overlap nor leave a gap."""
    finnhub, endpoint = provider(payload("candle_no_data.json"))
    start = None if since is None else instant(since)
    calls = finnhub.calls(interval, since=start, now=NOW)

    await finnhub.bars("ACME", interval, since=start, now=NOW)

    asked = [(int(params["from"]), int(params["to"])) for _, params in endpoint.asked]
    assert asked == [(epoch(begin), epoch(end)) for begin, end in windows]
    assert calls == len(windows)
    assert endpoint.turns.asked == [("stock/candle", 1, "")] * calls


async def test_long_intraday_history_comes_in_parts(provider):
    """Six months at most in one fetch, oldest first; the next fetch goes on."""
    finnhub, endpoint = provider(payload("candle_no_data.json"))

    await finnhub.bars("ACME", Interval.MINUTE, since=instant("2022-01-03T21:00:00"), now=NOW)

    assert len(endpoint.asked) == 6
    assert endpoint.asked[0][1]["from"] == str(epoch("2022-01-03T20:59:00"))


async def test_quote(provider):
    """A quote has the last price and its time, in seconds."""
    finnhub, endpoint = provider(payload("quote.json"))

    quote = await finnhub.quote("ACME")

    assert endpoint.asked == [("/api/v1/quote", {"symbol": "ACME"})]
    assert (quote.symbol, quote.price, quote.previous_close) == ("ACME", 51.5, 51.0)
    assert quote.as_of == instant("2024-07-05T20:00:00")
    assert quote.provider == "finnhub"


async def test_zero_quote_is_an_unknown_symbol(provider):
    """All zeros with HTTP 200 is how Finnhub says that it knows no such symbol."""
    finnhub, _ = provider(payload("quote_unknown_symbol.json"))

    with pytest.raises(UnknownSymbolError, match="ACME"):
        await finnhub.quote("ACME")


@pytest.mark.parametrize(
    "body",
    [
        '{"c": 51.5, "pc": 51.0}',
        '{"c": -1, "t": 1720209600}',
        '{"c": "n/a", "t": 1720209600}',
        '{"t": 1720209600}',
        '{"c": 51.5, "t": 1e99}',
        '{"c": null, "t": 1720209600}',
        '{"c": NaN, "t": 1720209600}',
    ],
)
async def test_quote_that_cannot_be_true(provider, body):
    """A quote without a price or a time is no answer we can judge."""
    finnhub, _ = provider(body)

    with pytest.raises(UnavailableError, match="cannot be true"):
        await finnhub.quote("ACME")


async def test_quote_without_a_previous_close(provider):
    """A new listing has no previous close."""
    finnhub, _ = provider('{"c": 51.5, "pc": 0, "t": 1720209600}')

    assert (await finnhub.quote("ACME")).previous_close is None


@pytest.mark.parametrize(
    ("headers", "limits"),
    [
        ({}, None),
        (
            {
                "X-Ratelimit-Limit": "60",
                "X-Ratelimit-Remaining": "54",
                "X-Ratelimit-Reset": str(int(WALL.timestamp()) + 42),
            },
            Limits(amount=60, left=54, resets_at=WALL + 42 * SECONDS, span=60 * SECONDS),
        ),
        (
            {"X-Ratelimit-Remaining": "0", "X-Ratelimit-Reset": "17"},
            Limits(left=0, resets_at=WALL + 17 * SECONDS, span=60 * SECONDS),
        ),
        ({"X-Ratelimit-Limit": "many", "X-Ratelimit-Remaining": "-1", "X-Ratelimit-Reset": "nan"}, None),
        ({"X-Ratelimit-Reset": "999999999"}, None),
        ({"X-Ratelimit-Reset": "1e300"}, None),
    ],
)
@pytest.mark.parametrize("status", [200, 429])
async def test_rate_headers_are_written_down(provider, headers, limits, status):
    """What is left of the minute is told by every answer, refusals included, as an epoch or as seconds to go."""
    finnhub, endpoint = provider(httpx.Response(status, text=payload("quote.json"), headers=headers))

    with suppress(RateLimitedError):
        await finnhub.quote("ACME")

    assert endpoint.turns.entered[0].limits == limits


@pytest.mark.parametrize(
    ("now", "is_stale"),
    [("2024-07-08T14:00:00", False), ("2024-07-08T20:59:59", False), ("2024-07-08T21:00:00", True)],
)
async def test_quote_of_the_session_before_last(provider, now, is_stale):
    """An hour after Monday's close a quote of Friday is stale, though it comes with HTTP 200."""
    finnhub, endpoint = provider(payload("quote.json"))
    finnhub.adapter._market_clock.at = instant(now)

    if not is_stale:
        assert (await finnhub.quote("ACME")).price == 51.5
        return
    with pytest.raises(UnavailableError, match="3 days 1 hours old: from before the session of 2024-07-08"):
        await finnhub.quote("ACME")
    assert type(endpoint.turns.entered[0].error) is UnavailableError


async def test_bars_up_to_an_instant(provider):
    """Who fills a gap asks for no more than the gap."""
    finnhub, endpoint = provider(payload("candle_no_data.json"))

    await finnhub.bars(
        "ACME", Interval.MINUTE, since=instant("2024-07-02T14:00:00"), now=NOW, until=instant("2024-07-02T15:00:00")
    )

    [(_, params)] = endpoint.asked
    assert (params["from"], params["to"]) == (str(epoch("2024-07-02T13:59:00")), str(epoch("2024-07-02T15:00:00")))


async def test_minutes_that_jump_overnight_are_asked_for_a_split(provider):
    """Raw minutes of two sessions with a split between them are never sold as a crash."""
    minutes = candles(
        epoch("2024-07-01T19:59:00"),
        epoch("2024-07-02T13:30:00"),
        o=[10.0, 5.0],
        h=[11.0, 6.0],
        l=[9.0, 4.0],
        c=[10.0, 5.0],
    )
    finnhub, endpoint = provider(lambda params: minutes if "resolution" in params else payload("split.json"))

    fetched = await finnhub.bars("ACME", Interval.MINUTE, since=None, now=NOW)

    assert [path for path, _ in endpoint.asked] == ["/api/v1/stock/candle", "/api/v1/stock/split"]
    assert [bar.split for bar in fetched.bars] == [1.0, 2.0]


async def test_news(provider):
    """News come oldest first, from the time asked for, and are not rated."""
    finnhub, endpoint = provider(payload("company_news.json"))

    news = await finnhub.news("ACME", since=instant("2024-07-01T00:00:00"), until=instant("2024-07-06T00:00:00"))

    assert endpoint.asked == [("/api/v1/company-news", {"symbol": "ACME", "from": "2024-07-01", "to": "2024-07-06"})]
    assert [(n.news_id, n.published_at, n.symbols) for n in news] == [
        ("7000", instant("2024-07-02T09:00:00"), ("ACME", "OTHER")),
        ("7001", instant("2024-07-05T17:38:34"), ("ACME",)),
    ]
    assert {n.sentiment for n in news} == {None}


async def test_earnings_calendar(provider):
    """Who reports when, what is expected and, once it is known, what came."""
    finnhub, endpoint = provider(payload("calendar_earnings.json"))

    reports = await finnhub.earnings(first=date(2024, 7, 1), last=date(2024, 7, 31))

    assert endpoint.asked == [("/api/v1/calendar/earnings", {"from": "2024-07-01", "to": "2024-07-31"})]
    assert [(r.day.isoformat(), r.symbol, r.time, r.eps_estimate, r.eps_actual) for r in reports] == [
        ("2024-07-24", "OTHER", "bmo", None, 0.4),
        ("2024-07-25", "ACME", "amc", 1.52, None),
    ]
    assert (reports[0].revenue_actual, reports[1].revenue_estimate) == (2e6, 110771401872)
    [later] = await finnhub.earnings(first=date(2024, 10, 1), last=date(2024, 10, 31), symbol="ACME")
    assert later.time == "unknown"
    assert endpoint.asked[1][1]["symbol"] == "ACME"


async def test_splits(provider):
    """A split is told as shares before and after; dividends, which weigh ten calls, are not asked for."""
    finnhub, _ = provider(payload("split.json"))

    actions = await finnhub.actions("ACME")

    assert [(a.day.isoformat(), a.split, a.dividend) for a in actions] == [
        ("1999-05-27", 1.5, 0.0),
        ("2024-07-02", 2.0, 0.0),
    ]


@pytest.mark.parametrize("body", ['[{"date": "2024-07-02", "fromFactor": 0, "toFactor": 2}]', '{"error2": 1}', "[7]"])
async def test_splits_that_cannot_be_read(provider, body):
    """Splits that cannot be read are no reason to believe that there are none."""
    finnhub, _ = provider(body)

    with pytest.raises(UnavailableError, match="splits of ACME"):
        await finnhub.actions("ACME")


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError(KEY),
        httpx.LocalProtocolError(f"Illegal header value b'{KEY}'"),
        httpx.PoolTimeout(KEY),
        httpx.Response(401, text=json.dumps({"error": f"Invalid API key {KEY}"})),
        httpx.Response(422, text=f"{KEY} is no resolution"),
        httpx.Response(200, text=json.dumps({"error": f"{KEY} is moving"})),
        httpx.Response(200, text=f"<html>{KEY}</html>"),
        httpx.Response(500, text=KEY),
    ],
    ids=str,
)
async def test_key_is_never_told(provider, caplog, answer):
    """The key is in no URL, error, repr or log, whatever the level."""
    caplog.set_level(logging.DEBUG)
    finnhub, endpoint = provider(answer)

    with pytest.raises(TroopError) as caught:
        await finnhub.quote("ACME")
    for chatty in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=chatty)
    with pytest.raises(TroopError):
        await finnhub.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert len(endpoint.asked) == 2
    assert KEY not in everything_told(caught.value)
    assert KEY not in caplog.text
    assert KEY not in repr(finnhub.adapter) + repr(vars(finnhub.adapter))


recorded = pytest.mark.skipif(not RECORDED.exists(), reason="the recorded answers are not beside this checkout")


@recorded
@pytest.mark.parametrize(
    ("status", "name", "error"),
    [
        (401, "errors/401_invalid_key.json", ConfigurationError),
        (401, "errors/401_no_key.json", ConfigurationError),
        (403, "errors/403_no_access.json", NotEntitledError),
        (403, "salzaki/candle-AAPL.json", NotEntitledError),
        (429, "errors/429_limit.json", RateLimitedError),
    ],
)
async def test_recorded_refusals(provider, status, name, error):
    """The service's own sentences find their error."""
    finnhub, _ = provider(httpx.Response(status, text=(RECORDED / name).read_text(encoding="utf-8")))

    with pytest.raises(error):
        await finnhub.bars("AAPL", Interval.DAY, since=None, now=NOW)


@recorded
async def test_recorded_answers(provider):
    """What the real service once sent is understood."""
    bars, _ = provider((RECORDED / "kevwk/Stock_candles.json").read_text(encoding="utf-8-sig"))
    none, _ = provider((RECORDED / "errors/200_candle_no_data.json").read_text(encoding="utf-8"))
    quote, _ = provider((RECORDED / "salzaki/quote-AAPL.json").read_text(encoding="utf-8"))
    unknown, _ = provider((RECORDED / "salzaki/quote-unknown.json").read_text(encoding="utf-8"))

    fetched = await bars.bars("AAPL", Interval.DAY, since=None, now=NOW)

    assert [bar.opened_at.date().isoformat() for bar in fetched.bars] == ["2019-09-24", "2019-09-25", "2019-09-26"]
    assert (await none.bars("AAPL", Interval.DAY, since=None, now=NOW)).bars == ()
    quote.adapter._market_clock.at = datetime(2026, 5, 23, tzinfo=UTC)
    assert (await quote.quote("AAPL")).price == 308.82
    with pytest.raises(UnknownSymbolError):
        await unknown.quote("NOPE")


@recorded
async def test_recorded_earnings(provider):
    """A recorded calendar is understood."""
    finnhub, _ = provider((RECORDED / "salzaki/calendar-earnings-aapl.json").read_text(encoding="utf-8"))

    [report] = await finnhub.earnings(first=date(2026, 7, 1), last=date(2026, 7, 31), symbol="AAPL")

    assert (report.day, report.time, report.eps_estimate) == (date(2026, 7, 29), "amc", 1.9316)


async def test_half_a_year_of_minutes_does_not_speak_of_what_follows(provider):
    """Six months are asked for at once; that they are empty says nothing of the seventh."""
    finnhub, _ = provider('{"s": "no_data"}', plan="premium")

    fetched = await finnhub.bars("ACME", Interval.MINUTE, since=NOW - timedelta(days=300), now=NOW)
    short = await finnhub.bars("ACME", Interval.MINUTE, since=NOW - timedelta(days=100), now=NOW)

    assert fetched.covers_through is not None
    assert NOW - timedelta(days=121) < fetched.covers_through < NOW - timedelta(days=119)
    assert short.covers_through is None
