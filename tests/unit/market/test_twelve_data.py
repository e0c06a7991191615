import json
import logging
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    DailyQuotaError,
    NotEntitledError,
    RateLimitedError,
    RefusedError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.http_client import HttpClient
from shared.market.adapters.twelve_data import TwelveData
from shared.market.models import Adjustment, Interval, ReportTime
from shared.market.ports import Limits
from shared.market.sessions import calendar
from tests.unit.market.turns import TakingTurns, Turns, everything_told

PAYLOADS = Path(__file__).resolve().parents[2] / "payloads" / "twelve_data"
KEY = "CANARY7KEY9QX"
NOW = datetime(2024, 7, 8, 12, tzinfo=UTC)
WALL = datetime(2026, 11, 21, 22, 58, 18, tzinfo=UTC)
TO_MINUTE_END = timedelta(seconds=42)
TO_MIDNIGHT = timedelta(hours=1, seconds=102)


def payload(name: str) -> str:
    return (PAYLOADS / name).read_text(encoding="utf-8").replace("@KEY@", KEY)


def instant(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


def series(*labels: str, **columns: object) -> str:
    one = {"open": "5", "high": "6", "low": "4", "close": "5", "volume": "10"} | columns
    return json.dumps({"meta": {}, "values": [{"datetime": label, **one} for label in labels], "status": "ok"})


class Endpoint:
    """Answers as told and remembers what was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []
        self.turns = Turns()

    def __call__(self, request):
        assert self.turns.inside == 1
        assert KEY not in str(request.url)
        assert request.headers["Authorization"] == f"apikey {KEY}"
        params = dict(request.url.params)
        self.asked.append((request.url.path, params))
        answer = self.answers[request.url.path[1:]] if isinstance(self.answers, dict) else self.answers
        answer = answer(params) if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, text=answer)


@pytest.fixture
async def provider():
    opened = []

    def make(answers, plan="free"):
        endpoint = Endpoint(answers)
        http = HttpClient("Twelve Data", transport=lambda: httpx.MockTransport(endpoint))
        opened.append(http)
        made = TwelveData(
            base_url="https://provider.test/",
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


REFUSALS = [
    (429, "minute_credits.json", RateLimitedError, TO_MINUTE_END),
    (429, "day_credits.json", DailyQuotaError, TO_MIDNIGHT),
    (401, "bad_key.json", ConfigurationError, None),
    (403, "endpoint_plan.json", NotEntitledError, None),
    (404, "symbol_plan.json", UnknownSymbolError, None),
    (404, "unknown_symbol.json", UnknownSymbolError, None),
    (400, "symbol_not_found.json", UnknownSymbolError, None),
    (400, "bad_parameter.json", RefusedError, None),
    (414, "too_long.json", RefusedError, None),
    (500, "internal.json", UnavailableError, None),
    (299, "unknown_prose.json", UnavailableError, None),
]


@pytest.mark.parametrize("is_told_by_status", [False, True])
@pytest.mark.parametrize(("status", "name", "error", "wait"), REFUSALS)
async def test_refusal_becomes_our_error(provider, status, name, error, wait, is_told_by_status):
    """The body's code says whether to wait, to stop or to call a person, with HTTP 200 as with its own status."""
    twelve_data, endpoint = provider(
        httpx.Response(status if is_told_by_status else 200, text=payload(f"refusals/{name}"))
    )

    with pytest.raises(TroopError) as caught:
        await twelve_data.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert type(caught.value) is error
    assert getattr(caught.value, "retry_after", None) == wait
    assert endpoint.turns.entered[0].error is caught.value


def test_every_refusal_on_file_is_judged():
    """A sentence somebody adds to the payloads needs a row in the table above."""
    assert {path.name for path in (PAYLOADS / "refusals").iterdir()} == {name for _, name, *_ in REFUSALS}


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, "<html>We will be right back</html>", UnavailableError),
        (200, '{"meta": {}, "values": [{"dat', UnavailableError),
        (200, "", UnavailableError),
        (200, "[]", UnavailableError),
        (200, "{}", UnavailableError),
        (200, '{"status": "ok", "values": "later"}', UnavailableError),
        (200, '{"status": "error"}', UnavailableError),
        (200, '{"status": "error", "code": "429", "message": "later"}', UnavailableError),
        (200, "[" * 100_000, UnavailableError),
        (200, "datetime;open;high;low;close\n2024-07-05;1;1;1;1\n", UnavailableError),
        (302, "", UnavailableError),
        (429, "slow down", RateLimitedError),
        (502, "<html>Bad gateway</html>", UnavailableError),
    ],
)
async def test_unreadable_answer_is_trouble_that_passes(provider, status, body, error):
    """Half an answer, a web page or a server error is never an empty series."""
    twelve_data, _ = provider(httpx.Response(status, text=body))

    with pytest.raises(TroopError) as caught:
        await twelve_data.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert type(caught.value) is error


async def test_missing_entitlement_names_the_plan(provider):
    """Whoever reads the refusal learns which setting it is about."""
    twelve_data, _ = provider(payload("refusals/endpoint_plan.json"))

    with pytest.raises(NotEntitledError, match=r"plan \(free\).*TWELVE_DATA_PLAN"):
        await twelve_data.actions("ACME")


async def test_dates_without_data_are_an_empty_answer(provider):
    """Nothing traded on the dates asked for: an error to them, an answer to us."""
    twelve_data, _ = provider(payload("no_data.json"))

    fetched = await twelve_data.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert (fetched.bars, fetched.refused_rows) == ((), ())


async def test_no_data_for_a_quote_is_no_answer(provider):
    """What is empty for a range is a refusal for a price."""
    twelve_data, _ = provider(payload("no_data.json"))

    with pytest.raises(RefusedError):
        await twelve_data.quote("ACME")


async def test_daily_bars_cover_their_session_and_are_adjusted(provider):
    """String numbers, newest first, become sessions oldest first; the adjustment is asked for, so it is known."""
    twelve_data, endpoint = provider(payload("time_series_1day.json"))

    fetched = await twelve_data.bars("ACME", Interval.DAY, since=instant("2024-06-28T20:00:00"), now=NOW)

    assert endpoint.asked == [
        (
            "/time_series",
            {
                "symbol": "ACME",
                "interval": "1day",
                "start_date": "2024-06-27",
                "end_date": "2024-07-06",
                "outputsize": "7",
                "adjust": "splits",
                "timezone": "UTC",
            },
        )
    ]
    assert (fetched.symbol, fetched.provider, fetched.adjustment) == ("ACME", "twelve_data", Adjustment.SPLIT)
    assert [(bar.opened_at, bar.closed_at) for bar in fetched.bars] == [
        (instant("2024-07-01T13:30:00"), instant("2024-07-01T20:00:00")),
        (instant("2024-07-02T13:30:00"), instant("2024-07-02T20:00:00")),
        (instant("2024-07-03T13:30:00"), instant("2024-07-03T17:00:00")),
        (instant("2024-07-05T13:30:00"), instant("2024-07-05T20:00:00")),
    ]
    assert [bar.close for bar in fetched.bars] == [50.0, 50.5, 51.0, 51.5]
    assert fetched.refused_rows == ()


async def test_hours_are_in_utc_and_end_with_the_session(provider):
    """Labels are starts in UTC; on a half day the last hour is half an hour long."""
    twelve_data, endpoint = provider(payload("time_series_1h.json"))

    fetched = await twelve_data.bars("ACME", Interval.HOUR, since=instant("2024-07-02T20:00:00"), now=NOW)

    [(_, params)] = endpoint.asked
    assert (params["interval"], params["timezone"]) == ("1h", "UTC")
    assert (params["start_date"], params["end_date"]) == ("2024-07-02T19:00:00", "2024-07-05T20:00:00")
    assert [bar.closed_at for bar in fetched.bars] == [
        instant("2024-07-03T14:30:00"),
        instant("2024-07-03T15:30:00"),
        instant("2024-07-03T16:30:00"),
        instant("2024-07-03T17:00:00"),
    ]


async def test_minute_still_forming_is_left_out_and_not_paid_for(provider):
    """A minute is a bar when it is over; one that is not over is not even asked for."""
    twelve_data, endpoint = provider(series("2024-07-05 13:30:00", "2024-07-05 13:31:00"))

    fetched = await twelve_data.bars(
        "ACME", Interval.MINUTE, since=instant("2024-07-05T13:30:00"), now=instant("2024-07-05T13:31:59")
    )

    assert [bar.closed_at for bar in fetched.bars] == [instant("2024-07-05T13:31:00")]
    assert endpoint.asked[0][1]["end_date"] == "2024-07-05T13:31:00"


async def test_nothing_is_asked_where_no_bar_has_closed(provider):
    """A call that can bring nothing is not made."""
    twelve_data, endpoint = provider(payload("no_data.json"))
    since = instant("2024-07-05T20:00:00")

    fetched = await twelve_data.bars("ACME", Interval.DAY, since=since, now=NOW)

    assert (fetched.bars, endpoint.asked) == ((), [])
    assert twelve_data.calls(Interval.DAY, since=since, now=NOW) == 0


@pytest.mark.parametrize(
    ("plan", "interval", "since", "units"),
    [
        ("free", Interval.DAY, "2024-07-03T17:00:00", [1]),
        ("free", Interval.DAY, None, [8]),
        ("free", Interval.DAY, "2010-01-01T00:00:00", [8, 8, 8]),
        ("premium", Interval.DAY, "2010-01-01T00:00:00", [37]),
        ("free", Interval.MINUTE, "2024-07-05T13:30:00", [4]),
        ("free", Interval.MINUTE, None, [8, 8, 8]),
        ("premium", Interval.MINUTE, None, [47, 30]),
        ("free", Interval.HOUR, None, [8]),
    ],
)
async def test_credits_follow_the_rows(provider, plan, interval, since, units):
    """A credit per hundred rows: no call weighs more than a free minute holds, and long history comes in parts."""
    twelve_data, endpoint = provider(payload("no_data.json"), plan=plan)
    start = None if since is None else instant(since)
    calls = twelve_data.calls(interval, since=start, now=NOW)

    await twelve_data.bars("ACME", interval, since=start, now=NOW)

    assert [weight for _, weight, _ in endpoint.turns.asked] == units
    assert calls == len(units)
    asked = [params for _, params in endpoint.asked]
    assert [-(-int(params["outputsize"]) // 100) for params in asked] == units
    assert [params["start_date"] for params in asked] == sorted(params["start_date"] for params in asked)


async def test_slices_leave_no_session_out(provider):
    """Every session between the first and the last of a long fetch lies in one slice."""
    twelve_data, endpoint = provider(payload("no_data.json"))

    await twelve_data.bars("ACME", Interval.DAY, since=instant("2015-01-02T21:00:00"), now=NOW)

    ranges = [(params["start_date"], params["end_date"]) for _, params in endpoint.asked]
    for (_, end), (begin, _) in pairwise(ranges):
        assert timedelta(0) <= date.fromisoformat(begin) - date.fromisoformat(end) <= timedelta(days=3)


async def test_row_that_cannot_be_true_is_named(provider):
    """An impossible row is left out, and the answer says which and why."""
    rows = json.loads(series("2024-07-05", "2024-07-04", "2024-07-03", "some day", "2024-07-02"))
    rows["values"][2]["high"] = "3"
    rows["values"][4]["low"] = "0"
    rows["values"].append(7)
    twelve_data, _ = provider(json.dumps(rows))

    fetched = await twelve_data.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert [bar.opened_at.day for bar in fetched.bars] == [5]
    assert [line.split(":")[0] for line in fetched.refused_rows] == [
        "2024-07-02",
        "2024-07-03",
        "2024-07-04",
        "None",
        "some day",
    ]


@pytest.mark.parametrize(
    ("headers", "limits"),
    [
        ({}, None),
        (
            {"api-credits-used": "3", "api-credits-left": "5"},
            Limits(amount=8, left=5, resets_at=WALL + TO_MINUTE_END, span=timedelta(minutes=1)),
        ),
        (
            {"api-credits-left": "5"},
            Limits(left=5, resets_at=WALL + TO_MINUTE_END, span=timedelta(minutes=1)),
        ),
        ({"api-credits-used": "3", "api-credits-left": "some"}, None),
    ],
)
async def test_credit_headers_are_written_down(provider, headers, limits):
    """What is left of the minute's credits is told by every answer; the minute is the wall's."""
    twelve_data, endpoint = provider(httpx.Response(200, text=payload("quote.json"), headers=headers))

    await twelve_data.quote("ACME")

    assert endpoint.turns.entered[0].limits == limits


async def test_quote(provider):
    """The day's stamp is its open; the time of the price is when it was last seen."""
    twelve_data, endpoint = provider(payload("quote.json"))

    quote = await twelve_data.quote("ACME")

    assert endpoint.asked == [("/quote", {"symbol": "ACME"})]
    assert (quote.symbol, quote.price, quote.previous_close) == ("ACME", 51.5, 51.0)
    assert quote.as_of == instant("2024-07-05T19:59:00")


async def test_quote_without_its_minute_is_as_old_as_its_close(provider):
    """Where only the day is told, the price is the session's close, or as new as the market's clock."""
    only_day = json.loads(payload("quote.json"))
    del only_day["last_quote_at"]
    twelve_data, _ = provider(json.dumps(only_day))

    assert (await twelve_data.quote("ACME")).as_of == instant("2024-07-05T20:00:00")
    twelve_data.adapter._market_clock.at = instant("2024-07-05T15:00:00")
    assert (await twelve_data.quote("ACME")).as_of == instant("2024-07-05T15:00:00")


async def test_stale_quote(provider):
    """A price of the session before last is no quote."""
    twelve_data, _ = provider(payload("quote.json"))
    twelve_data.adapter._market_clock.at = instant("2024-07-08T21:00:00")

    with pytest.raises(UnavailableError, match="3 days 1 hours old"):
        await twelve_data.quote("ACME")


@pytest.mark.parametrize(
    "changed",
    [
        {"close": "0"},
        {"close": "n/a"},
        {"close": None},
        {"close": "nan"},
        {"last_quote_at": -1},
        {"last_quote_at": "x"},
    ],
)
async def test_quote_that_cannot_be_true(provider, changed):
    """A quote without a price or a time is no answer we can judge."""
    twelve_data, _ = provider(json.dumps(json.loads(payload("quote.json")) | changed))

    with pytest.raises(UnavailableError, match="cannot be true"):
        await twelve_data.quote("ACME")


async def test_earnings_calendar(provider):
    """Reports are told by day, for the whole country: we pick the symbol ourselves."""
    twelve_data, endpoint = provider(payload("earnings_calendar.json"))

    reports = await twelve_data.earnings(first=date(2024, 7, 1), last=date(2024, 7, 31))

    assert endpoint.asked == [
        (
            "/earnings_calendar",
            {"start_date": "2024-07-01", "end_date": "2024-07-31", "country": "United States"},
        )
    ]
    assert [(r.day.isoformat(), r.symbol, r.time, r.eps_estimate, r.eps_actual) for r in reports] == [
        ("2024-07-24", "OTHER", ReportTime.BEFORE_OPEN, None, 0.4),
        ("2024-07-25", "ACME", ReportTime.AFTER_CLOSE, 1.52, None),
    ]
    [later] = await twelve_data.earnings(first=date(2024, 8, 1), last=date(2024, 12, 31), symbol="ACME")
    assert later.time is ReportTime.UNKNOWN


async def test_splits_and_dividends(provider):
    """A "2-for-1 split" has from_factor 2 and to_factor 1, and means two new shares for one old."""
    twelve_data, endpoint = provider({"splits": payload("splits.json"), "dividends": payload("dividends.json")})

    actions = await twelve_data.actions("ACME")

    assert [(a.day.isoformat(), a.split, a.dividend) for a in actions] == [
        ("1999-05-27", 1.5, 0.0),
        ("2024-04-02", 1.0, 0.24),
        ("2024-07-02", 2.0, 0.25),
    ]
    assert [params["range"] for _, params in endpoint.asked] == ["full", "full"]
    assert endpoint.asked[1][1]["adjust"] == "false"


async def test_split_that_contradicts_itself(provider):
    """Factors the wrong way round would multiply prices that must be divided: nothing is better than that."""
    split = {"date": "2024-07-02", "description": "4-for-1 split", "ratio": 4, "from_factor": 1, "to_factor": 4}
    twelve_data, _ = provider(json.dumps({"splits": [split]}))

    with pytest.raises(UnavailableError, match="splits of ACME"):
        await twelve_data.actions("ACME")


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError(KEY),
        httpx.LocalProtocolError(f"Illegal header value b'apikey {KEY}'"),
        httpx.Response(401, text=json.dumps({"code": 401, "message": f"{KEY} is wrong", "status": "error"})),
        httpx.Response(200, text=json.dumps({"code": 422, "message": f"what is {KEY.lower()}", "status": "error"})),
        httpx.Response(200, text=json.dumps({"code": 222, "message": f"{KEY} is moving", "status": "error"})),
        httpx.Response(200, text=f"<html>{KEY}</html>"),
        httpx.Response(500, text=KEY),
    ],
    ids=str,
)
async def test_key_is_never_told(provider, caplog, answer):
    """The key is in no URL, error, repr or log, whatever the level."""
    caplog.set_level(logging.DEBUG)
    twelve_data, _ = provider(answer)

    with pytest.raises(TroopError) as caught:
        await twelve_data.quote("ACME")

    assert KEY.lower() not in everything_told(caught.value).lower()
    assert KEY not in caplog.text
    assert KEY not in repr(twelve_data.adapter) + repr(vars(twelve_data.adapter))


async def test_long_history_speaks_of_the_slices_it_asked_for(provider):
    """A free key's three slices are some years: that they are empty says nothing of the years behind them."""
    twelve_data, endpoint = provider(series())

    fetched = await twelve_data.bars("ACME", Interval.DAY, since=instant("2000-01-03T21:00:00"), now=NOW)
    few = await twelve_data.bars("ACME", Interval.DAY, since=instant("2023-01-03T21:00:00"), now=NOW)

    assert len(endpoint.asked) == 4
    paid_for = calendar().sessions(date(2000, 1, 3), NOW.date())[: 3 * 799]
    assert fetched.covers_through == paid_for[-1].closes_at
    assert few.covers_through is None
