import asyncio
import csv
import json
import logging
from datetime import UTC, date, datetime, timedelta
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
from shared.market.adapters.alpha_vantage import BURST, FULL, MINUTE, QUOTA_SPENT, AlphaVantage
from shared.market.models import Adjustment, Interval, ReportTime
from shared.market.sessions import calendar
from tests.unit.market.turns import TakingTurns, Turns, everything_told

ROOT = Path(__file__).resolve().parents[3]
PAYLOADS = ROOT / "tests" / "payloads" / "alpha_vantage"
RECORDED = ROOT.parent / "shared" / "payloads" / "alpha_vantage"
KEY = "CANARY7KEY9QX"
NOW = datetime(2024, 7, 8, 12, tzinfo=UTC)


def payload(name: str) -> str:
    return (PAYLOADS / name).read_text(encoding="utf-8").replace("@KEY@", KEY)


class Endpoint:
    """Answers as told, per function, and remembers what was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []
        self.turns = Turns()

    def __call__(self, request):
        assert self.turns.inside == 1
        params = dict(request.url.params)
        assert request.url.path == "/query"
        assert params.pop("apikey") == KEY
        self.asked.append(params)
        answer = self.answers[params["function"]] if isinstance(self.answers, dict) else self.answers
        if callable(answer):
            answer = answer(params)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(200, text=answer)


@pytest.fixture
async def provider():
    opened = []

    def make(answers, plan="premium"):
        endpoint = Endpoint(answers)
        if plan == "free":
            endpoint.turns.refused |= {("TIME_SERIES_DAILY_ADJUSTED", ""), ("TIME_SERIES_DAILY", FULL)}
        http = HttpClient("Alpha Vantage", transport=lambda: httpx.MockTransport(endpoint))
        opened.append(http)

        made = AlphaVantage(
            base_url="https://provider.test",
            key=SecretStr(KEY),
            plan=plan,
            http=http,
            market_clock=StoppedClock(NOW),
        )
        return TakingTurns(made, endpoint.turns), endpoint

    yield make
    for http in opened:
        await http.aclose()


def daily(*rows):
    """A daily answer of (day, open, high, low, close, volume) rows, newest first as they come."""
    names = ("1. open", "2. high", "3. low", "4. close", "5. volume")
    series = {day: dict(zip(names, numbers, strict=False)) for day, *numbers in reversed(rows)}
    return json.dumps({"Meta Data": {"5. Time Zone": "US/Eastern"}, "Time Series (Daily)": series})


def intraday(*labels, zone="US/Eastern", interval="1min"):
    row = {"1. open": "5", "2. high": "6", "3. low": "4", "4. close": "5", "5. volume": "10"}
    series = dict.fromkeys(sorted(labels, reverse=True), row)
    return json.dumps({"Meta Data": {"6. Time Zone": zone}, f"Time Series ({interval})": series})


REFUSALS = [
    ("burst.json", RateLimitedError, BURST),
    ("burst_naming_daily_limits.json", RateLimitedError, BURST),
    ("burst_older.json", RateLimitedError, BURST),
    ("minute_oldest.json", RateLimitedError, MINUTE),
    ("volume_contact.json", RateLimitedError, MINUTE),
    ("quota_with_key.json", DailyQuotaError, QUOTA_SPENT),
    ("quota.json", DailyQuotaError, QUOTA_SPENT),
    ("premium_endpoint.json", NotEntitledError, None),
    ("premium_parameter.json", NotEntitledError, None),
    ("bad_key.json", ConfigurationError, None),
    ("bad_key_as_information.json", ConfigurationError, None),
    ("demo_key.json", ConfigurationError, None),
    ("invalid_call.json", UnknownSymbolError, None),
    ("unknown_function.json", RefusedError, None),
    ("invalid_inputs.json", RefusedError, None),
    ("not_acceptable.json", UnavailableError, None),
    ("empty_object.json", UnavailableError, None),
    ("unknown_prose.json", UnavailableError, None),
]


@pytest.mark.parametrize(("name", "error", "wait"), REFUSALS)
async def test_refusal_becomes_our_error(provider, name, error, wait):
    """Everything comes with HTTP 200: the prose alone says whether to wait, to stop or to call a person."""
    alpha_vantage, _ = provider(payload(f"refusals/{name}"))

    with pytest.raises(TroopError) as caught:
        await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert type(caught.value) is error
    assert getattr(caught.value, "retry_after", None) == wait


def test_every_refusal_on_file_is_judged():
    """A sentence somebody adds to the payloads needs a row in the table above."""
    assert {path.name for path in (PAYLOADS / "refusals").iterdir()} == {name for name, *_ in REFUSALS}


def test_spent_quota_and_burst_can_be_told_apart():
    """A burst is over in a second; a spent quota is worth falling over to another provider."""
    assert BURST <= timedelta(seconds=3) < MINUTE < QUOTA_SPENT


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, "<html><body>We will be right back</body></html>"),
        (200, '{"Meta Data": {"2. Symbol": "ACME"}, "Time Series (Daily)": {"2024-07-05": {"1. op'),
        (200, ""),
        (200, "[]"),
        (200, '"soon"'),
        (200, "\xff\xfe"),
        (200, "[" * 100_000),
        (200, '{"Meta Data": {}, "Time Series (Daily)": "later"}'),
        (200, "timestamp,open,high,low,close,volume\n2024-07-05,1,1,1,1,1\n"),
        (302, ""),
        (404, "{}"),
        (500, "oops"),
        (502, "<html>Bad gateway</html>"),
        (503, "{}"),
    ],
)
async def test_unreadable_answer_is_trouble_that_passes(provider, status, body):
    """Half an answer, a web page or a server error is never an empty series."""
    alpha_vantage, _ = provider(httpx.Response(status, content=body.encode("latin-1")))

    with pytest.raises(UnavailableError):
        await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)
    with pytest.raises(UnavailableError):
        await alpha_vantage.quote("ACME")


async def test_too_many_requests_by_status(provider):
    """A gateway's 429 is a throttle too."""
    alpha_vantage, _ = provider(httpx.Response(429, text="slow down"))

    with pytest.raises(RateLimitedError) as caught:
        await alpha_vantage.quote("ACME")

    assert caught.value.retry_after == MINUTE


async def test_byte_order_mark_is_no_trouble(provider):
    """Some recorded answers begin with one."""
    alpha_vantage, _ = provider("\ufeff" + payload("daily_adjusted.json"))

    assert (await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)).bars


async def test_daily_bars_come_raw_with_their_split(provider):
    """Paid plans tell splits with the bars; a bar covers its session, half days included, and is as traded."""
    alpha_vantage, endpoint = provider(payload("daily_adjusted.json"))

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert endpoint.asked == [{"function": "TIME_SERIES_DAILY_ADJUSTED", "symbol": "ACME", "outputsize": "full"}]
    assert (fetched.symbol, fetched.provider, fetched.adjustment) == ("ACME", "alpha_vantage", Adjustment.RAW)
    assert [bar.close for bar in fetched.bars] == [100.0, 50.5, 51.0, 51.5]
    assert [bar.split for bar in fetched.bars] == [1.0, 2.0, 1.0, 1.0]
    assert [bar.volume for bar in fetched.bars] == [1000.0, 2000.0, 900.0, 2100.0]
    assert (fetched.bars[2].opened_at, fetched.bars[2].closed_at) == (
        datetime(2024, 7, 3, 13, 30, tzinfo=UTC),
        datetime(2024, 7, 3, 17, tzinfo=UTC),
    )
    assert fetched.refused_rows == ()


async def test_free_backfill_asks_for_the_splits_too(provider):
    """The free plan's bars carry no splits: the first fetch asks for them too, with a permit, and marks the bars."""
    alpha_vantage, endpoint = provider(
        {"TIME_SERIES_DAILY": payload("daily.json"), "SPLITS": payload("splits.json")}, plan="free"
    )

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert endpoint.asked == [
        {"function": "TIME_SERIES_DAILY", "symbol": "ACME", "outputsize": "compact"},
        {"function": "SPLITS", "symbol": "ACME"},
    ]
    assert [bar.split for bar in fetched.bars] == [1.0, 2.0, 1.0, 1.0]


async def test_free_update_is_one_call(provider):
    """Day by day the free plan spends one call, as long as nothing looks like a split."""
    alpha_vantage, endpoint = provider({"TIME_SERIES_DAILY": payload("daily.json")}, plan="free")
    since = datetime(2024, 7, 2, 20, tzinfo=UTC)

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=since, now=NOW)

    assert len(endpoint.asked) == alpha_vantage.calls(Interval.DAY, since=since, now=NOW) == 1
    assert fetched.bars[-1].closed_at == datetime(2024, 7, 5, 20, tzinfo=UTC)


async def test_free_update_looks_for_a_split_after_a_jump(provider):
    """A price that halves overnight is a split until the provider says that it is not."""
    alpha_vantage, endpoint = provider(
        {"TIME_SERIES_DAILY": payload("daily.json"), "SPLITS": payload("splits.json")}, plan="free"
    )

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=datetime(2024, 7, 1, 20, tzinfo=UTC), now=NOW)

    assert [asked["function"] for asked in endpoint.asked] == ["TIME_SERIES_DAILY", "SPLITS"]
    assert [bar.split for bar in fetched.bars] == [1.0, 2.0, 1.0, 1.0]


async def test_bars_are_not_sold_without_their_splits(provider):
    """When the splits are refused, the bars are not taken for unsplit ones."""
    alpha_vantage, _ = provider(
        {"TIME_SERIES_DAILY": payload("daily.json"), "SPLITS": payload("refusals/burst.json")}, plan="free"
    )

    with pytest.raises(RateLimitedError):
        await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)


async def test_split_on_a_day_without_trading_shows_in_the_next_bar(provider):
    """Whoever buys after a split on a holiday trades in new shares."""
    splits = {"data": [{"effective_date": "2024-07-04", "split_factor": "3.0000"}]}
    alpha_vantage, _ = provider({"TIME_SERIES_DAILY": payload("daily.json"), "SPLITS": json.dumps(splits)}, plan="free")

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert [bar.split for bar in fetched.bars] == [1.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize("body", ['{"data": [{"effective_date": "soon"}]}', '{"data": 7}', '{"data": ["2:1"]}'])
async def test_unreadable_splits(provider, body):
    """Splits that cannot be read are no reason to believe that there are none."""
    alpha_vantage, _ = provider({"TIME_SERIES_DAILY": payload("daily.json"), "SPLITS": body}, plan="free")

    with pytest.raises(UnavailableError, match="splits of ACME"):
        await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)


@pytest.mark.parametrize(
    ("plan", "days_ago", "function", "size"),
    [
        ("premium", 7, "TIME_SERIES_DAILY_ADJUSTED", "compact"),
        ("premium", 130, "TIME_SERIES_DAILY_ADJUSTED", "compact"),
        ("premium", 200, "TIME_SERIES_DAILY_ADJUSTED", "full"),
        ("unlimited", None, "TIME_SERIES_DAILY_ADJUSTED", "full"),
        ("free", 200, "TIME_SERIES_DAILY", "compact"),
    ],
)
async def test_how_much_daily_history_is_asked_for(provider, plan, days_ago, function, size):
    """A compact answer holds a hundred sessions; more is asked for only when needed and paid for."""
    alpha_vantage, endpoint = provider(
        {function: payload("daily_adjusted.json"), "SPLITS": payload("splits.json")}, plan=plan
    )
    since = None if days_ago is None else NOW - timedelta(days=days_ago)

    await alpha_vantage.bars("ACME", Interval.DAY, since=since, now=NOW)

    assert endpoint.asked[0] == {"function": function, "symbol": "ACME", "outputsize": size}


def test_compact_reaches_as_far_back_as_we_count_on():
    """Nowhere in the table do 135 days hold more than the hundred sessions of a compact answer."""
    market = calendar()
    for year in range(1981, 2035):
        for month in range(1, 13):
            end = date(year, month, 15)
            assert len(market.sessions(end - timedelta(days=135), end)) <= 100


@pytest.mark.parametrize(
    ("now", "last"),
    [
        ("2024-07-05T19:59:59", "2024-07-03T17:00:00"),
        ("2024-07-05T20:00:00", "2024-07-05T20:00:00"),
        ("2024-07-03T16:59:59", "2024-07-02T20:00:00"),
        ("2024-07-03T17:00:00", "2024-07-03T17:00:00"),
    ],
)
async def test_session_still_open_is_left_out(provider, now, last):
    """Today's row moves until the close, at 13:00 on a half day: it is no bar yet."""
    alpha_vantage, _ = provider(payload("daily_adjusted.json"))

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=datetime.fromisoformat(f"{now}+00:00"))

    assert fetched.bars[-1].closed_at == datetime.fromisoformat(f"{last}+00:00")
    assert fetched.refused_rows == ()


async def test_row_that_cannot_be_true_is_named(provider):
    """An impossible row is left out, and the answer says which and why."""
    alpha_vantage, _ = provider(
        daily(
            ("2024-06-28", "9", "11", "8", "10", "100"),
            ("2024-07-01", "9", "8", "10", "9", "100"),
            ("2024-07-02", "0", "0", "0", "0", "0"),
            ("2024-07-03", "9", "None", "8", "10", "100"),
            ("2024-07-04", "9", "11", "8", "10", "100"),
            ("2024-07-05", "9", "11", "8", "10"),
            ("some day", "9", "11", "8", "10", "100"),
        )
    )

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert [bar.opened_at.date() for bar in fetched.bars] == [date(2024, 6, 28)]
    assert [line.split(":")[0] for line in fetched.refused_rows] == [
        "2024-07-01",
        "2024-07-02",
        "2024-07-03",
        "2024-07-04",
        "2024-07-05",
        "some day",
    ]
    assert "between low 10.0 and high 8.0" in fetched.refused_rows[0]
    assert "high is 'None', not a number" in fetched.refused_rows[2]
    assert "no session of XNYS" in fetched.refused_rows[3]
    assert "volume is 'None'" in fetched.refused_rows[4]


async def test_split_of_a_refused_row_is_not_lost(provider):
    """When the bar of the split cannot be true, the next bar is the first in new shares."""
    broken = json.loads(payload("daily_adjusted.json"))
    broken["Time Series (Daily)"]["2024-07-02"]["2. high"] = "1.0"
    alpha_vantage, _ = provider(json.dumps(broken))

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert [(bar.opened_at.day, bar.split) for bar in fetched.bars] == [(1, 1.0), (3, 2.0), (5, 1.0)]
    assert len(fetched.refused_rows) == 1


@pytest.mark.parametrize("split", ["0", "-2", "nan", "inf", "two"])
async def test_split_that_cannot_be_true(provider, split):
    """A nonsense split costs its own row and no other."""
    broken = json.loads(payload("daily_adjusted.json"))
    broken["Time Series (Daily)"]["2024-07-03"]["8. split coefficient"] = split
    alpha_vantage, _ = provider(json.dumps(broken))

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert [bar.opened_at.day for bar in fetched.bars] == [1, 2, 5]
    assert fetched.refused_rows[0].startswith("2024-07-03: split is")


async def test_minutes_follow_new_york_through_daylight_saving(provider):
    """Labels are New York's wall clock at the bar's start: 14:30 UTC on Friday, 13:30 UTC on Monday."""
    alpha_vantage, endpoint = provider(payload("intraday_1min.json"))

    fetched = await alpha_vantage.bars("ACME", Interval.MINUTE, since=None, now=datetime(2024, 3, 12, 12, tzinfo=UTC))

    assert endpoint.asked == [
        {
            "function": "TIME_SERIES_INTRADAY",
            "symbol": "ACME",
            "interval": "1min",
            "adjusted": "false",
            "extended_hours": "false",
            "outputsize": "full",
        }
    ]
    assert [(bar.opened_at, bar.closed_at - bar.opened_at) for bar in fetched.bars] == [
        (datetime(2024, 3, 8, 14, 30, tzinfo=UTC), timedelta(minutes=1)),
        (datetime(2024, 3, 8, 20, 59, tzinfo=UTC), timedelta(minutes=1)),
        (datetime(2024, 3, 11, 13, 30, tzinfo=UTC), timedelta(minutes=1)),
        (datetime(2024, 3, 11, 13, 31, tzinfo=UTC), timedelta(minutes=1)),
        (datetime(2024, 3, 11, 19, 59, tzinfo=UTC), timedelta(minutes=1)),
    ]
    assert all(bar.opened_at.tzinfo is UTC for bar in fetched.bars)
    assert fetched.adjustment is Adjustment.RAW
    assert fetched.refused_rows == ()


@pytest.mark.parametrize(
    ("friday", "monday"), [(("2024-11-01", 13), ("2024-11-04", 14)), (("2006-10-27", 13), ("2006-10-30", 14))]
)
async def test_minutes_follow_new_york_back_in_autumn(provider, friday, monday):
    """Whatever rule the year had, the open is 9:30 in New York."""
    alpha_vantage, _ = provider(intraday(f"{friday[0]} 09:30:00", f"{monday[0]} 09:30:00"))

    fetched = await alpha_vantage.bars("ACME", Interval.MINUTE, since=None, now=datetime(2024, 12, 1, tzinfo=UTC))

    assert [bar.opened_at.hour for bar in fetched.bars] == [friday[1], monday[1]]


async def test_hours_end_with_the_session(provider):
    """On a half day the last hour is half an hour long."""
    alpha_vantage, endpoint = provider(payload("intraday_60min.json"))

    fetched = await alpha_vantage.bars("ACME", Interval.HOUR, since=None, now=NOW)

    assert endpoint.asked[0]["interval"] == "60min"
    assert [bar.closed_at.strftime("%H:%M") for bar in fetched.bars] == ["14:30", "15:30", "16:30", "17:00"]


async def test_rows_outside_the_session_are_left_out_and_counted(provider):
    """Early and late trading is not ours, nor are hours that start off the grid; both are told."""
    alpha_vantage, _ = provider(
        intraday(
            "2024-07-05 04:00:00",
            "2024-07-05 09:29:00",
            "2024-07-05 09:30:00",
            "2024-07-05 09:30:30",
            "2024-07-05 16:00:00",
            "2024-11-03 01:30:00",
            "noon",
        )
    )

    fetched = await alpha_vantage.bars("ACME", Interval.MINUTE, since=None, now=datetime(2024, 12, 1, tzinfo=UTC))

    assert [bar.opened_at for bar in fetched.bars] == [datetime(2024, 7, 5, 13, 30, tzinfo=UTC)]
    assert fetched.refused_rows[0].startswith("2024-07-05 09:30:30: no 1m bar of XNYS opens at")
    assert fetched.refused_rows[1] == "noon: the label is no time"
    assert fetched.refused_rows[2] == "4 rows outside the session, from 2024-07-05 04:00:00 to 2024-11-03 01:30:00"


async def test_minute_still_forming_is_left_out(provider):
    """A minute is a bar when it is over."""
    alpha_vantage, _ = provider(intraday("2024-07-05 09:30:00", "2024-07-05 09:31:00"))

    fetched = await alpha_vantage.bars(
        "ACME", Interval.MINUTE, since=None, now=datetime(2024, 7, 5, 13, 31, 59, tzinfo=UTC)
    )

    assert [bar.closed_at.minute for bar in fetched.bars] == [31]


async def test_minutes_of_another_zone_are_not_guessed_at(provider):
    """Labels without a zone mean nothing until the answer says whose clock they are."""
    alpha_vantage, _ = provider(intraday("2024-07-05 09:30:00", zone="UTC"))

    with pytest.raises(UnavailableError, match="zone 'UTC'"):
        await alpha_vantage.bars("ACME", Interval.MINUTE, since=None, now=NOW)


@pytest.mark.parametrize(
    ("since", "asked"),
    [
        (None, [{"outputsize": "full"}]),
        ("2024-07-08T11:30:00", [{"outputsize": "compact"}]),
        ("2024-07-01T00:00:00", [{"outputsize": "full"}]),
        (
            "2024-05-01T01:00:00",
            [
                {"outputsize": "full", "month": "2024-04"},
                {"outputsize": "full", "month": "2024-05"},
                {"outputsize": "full", "month": "2024-06"},
                {"outputsize": "full", "month": "2024-07"},
            ],
        ),
        (
            "2022-11-15T00:00:00",
            [
                {"outputsize": "full", "month": month}
                for month in ("2022-11", "2022-12", "2023-01", "2023-02", "2023-03", "2023-04")
            ],
        ),
    ],
)
async def test_how_much_intraday_history_is_asked_for(provider, since, asked):
    """Recent minutes are one call; older ones come by New York's months, six at most, oldest first."""
    alpha_vantage, endpoint = provider(intraday("2024-07-05 09:30:00"))
    start = None if since is None else datetime.fromisoformat(f"{since}+00:00")
    calls = alpha_vantage.calls(Interval.MINUTE, since=start, now=NOW)

    await alpha_vantage.bars("ACME", Interval.MINUTE, since=start, now=NOW)

    shown = [{name: a[name] for name in ("outputsize", "month") if name in a} for a in endpoint.asked]
    assert shown == asked
    assert calls == len(asked)
    assert endpoint.turns.asked == [
        ("TIME_SERIES_INTRADAY", 1, FULL if size["outputsize"] == "full" else "") for size in asked
    ]


async def test_months_are_put_together_in_order(provider):
    """Several months make one answer, oldest bar first."""
    alpha_vantage, _ = provider(
        lambda params: intraday(f"{params['month']}-14 09:30:00", f"{params['month']}-15 09:30:00")
    )

    fetched = await alpha_vantage.bars(
        "ACME", Interval.MINUTE, since=datetime(2024, 2, 10, tzinfo=UTC), now=datetime(2024, 3, 30, tzinfo=UTC)
    )

    assert [bar.opened_at.strftime("%m-%d %H:%M") for bar in fetched.bars] == [
        "02-14 14:30",
        "02-15 14:30",
        "03-14 13:30",
        "03-15 13:30",
    ]


async def test_quote_is_the_close_of_its_trading_day(provider):
    """The end-of-day quote is as old as the close it tells."""
    alpha_vantage, endpoint = provider(payload("global_quote.json"))

    quote = await alpha_vantage.quote("ACME")

    assert endpoint.asked == [{"function": "GLOBAL_QUOTE", "symbol": "ACME"}]
    assert (quote.symbol, quote.price, quote.previous_close) == ("ACME", 51.5, 51.0)
    assert quote.as_of == datetime(2024, 7, 5, 20, tzinfo=UTC)
    assert quote.provider == "alpha_vantage"


async def test_quote_of_an_open_session_is_not_from_the_future(provider):
    """Only the day of a price is told: before the close it is at most as new as the market's clock."""
    alpha_vantage, _ = provider(payload("global_quote.json"))
    alpha_vantage._clock.at = datetime(2024, 7, 5, 15, tzinfo=UTC)

    assert (await alpha_vantage.quote("ACME")).as_of == datetime(2024, 7, 5, 15, tzinfo=UTC)


async def test_quote_under_its_entitled_name(provider):
    """With an entitlement the quote's key grows a remark."""
    renamed = payload("global_quote.json").replace("Global Quote", "Global Quote - DATA DELAYED BY 15 MINUTES")
    alpha_vantage, _ = provider(renamed)

    assert (await alpha_vantage.quote("ACME")).price == 51.5


async def test_empty_quote_is_an_unknown_symbol(provider):
    """There is no other sign that a symbol is unknown."""
    alpha_vantage, _ = provider(payload("global_quote_unknown_symbol.json"))

    with pytest.raises(UnknownSymbolError, match="ACME"):
        await alpha_vantage.quote("ACME")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("05. price", "0.0000"),
        ("05. price", "n/a"),
        ("05. price", "nan"),
        ("07. latest trading day", "2024-07-04"),
        ("07. latest trading day", ""),
        ("08. previous close", None),
    ],
)
async def test_quote_that_cannot_be_true(provider, field, value):
    """A quote without a price or a trading day is no answer we can judge."""
    broken = json.loads(payload("global_quote.json"))
    broken["Global Quote"][field] = value
    alpha_vantage, _ = provider(json.dumps(broken))

    with pytest.raises(UnavailableError, match="cannot be true"):
        await alpha_vantage.quote("ACME")


async def test_key_learns_once_what_it_is_refused(provider):
    """The better call is asked for once; when the key is refused it, every later fetch makes the smaller one."""
    premium, full = payload("refusals/premium_endpoint.json"), payload("refusals/premium_parameter.json")
    alpha_vantage, endpoint = provider(
        {
            "TIME_SERIES_DAILY_ADJUSTED": premium,
            "TIME_SERIES_DAILY": lambda params: full if params["outputsize"] == "full" else payload("daily.json"),
            "SPLITS": payload("splits.json"),
        }
    )

    first = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)
    asked_first = list(endpoint.turns.asked)
    again = await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert asked_first == [
        ("TIME_SERIES_DAILY_ADJUSTED", 1, ""),
        ("TIME_SERIES_DAILY", 1, FULL),
        ("TIME_SERIES_DAILY", 1, ""),
        ("SPLITS", 1, ""),
    ]
    assert endpoint.turns.asked[4:] == [("TIME_SERIES_DAILY", 1, ""), ("SPLITS", 1, "")]
    assert endpoint.turns.refused == {("TIME_SERIES_DAILY_ADJUSTED", ""), ("TIME_SERIES_DAILY", FULL)}
    assert [bar.split for bar in first.bars] == [1.0, 2.0, 1.0, 1.0]
    assert again == first


async def test_intraday_that_is_refused(provider):
    """Refused the long answer and then the short one, the key is not asked with again."""
    alpha_vantage, endpoint = provider(payload("refusals/premium_endpoint.json"), plan="free")

    with pytest.raises(NotEntitledError, match=r"plan \(free\).*ALPHA_VANTAGE_PLAN"):
        await alpha_vantage.bars("ACME", Interval.MINUTE, since=None, now=NOW)
    with pytest.raises(NotEntitledError):
        await alpha_vantage.bars("ACME", Interval.MINUTE, since=None, now=NOW)

    assert [asked["outputsize"] for asked in endpoint.asked] == ["full", "compact"]


async def test_minutes_of_a_key_without_long_answers(provider):
    """Where only the long answer is refused, the newest hundred minutes are better than none."""
    alpha_vantage, _ = provider(
        lambda params: (
            payload("refusals/premium_parameter.json")
            if params["outputsize"] == "full"
            else intraday("2024-07-05 09:30:00")
        )
    )

    fetched = await alpha_vantage.bars("ACME", Interval.MINUTE, since=None, now=NOW)

    assert len(fetched.bars) == 1


async def test_minutes_that_jump_overnight_are_asked_for_a_split(provider):
    """Raw minutes of two sessions with a split between them are never sold as a crash."""
    minutes = json.loads(intraday("2024-07-01 15:59:00", "2024-07-02 09:30:00", "2024-07-02 09:31:00"))
    before = {"1. open": "10", "2. high": "12", "3. low": "8", "4. close": "10", "5. volume": "5"}
    minutes["Time Series (1min)"]["2024-07-01 15:59:00"] = before
    alpha_vantage, endpoint = provider({"TIME_SERIES_INTRADAY": json.dumps(minutes), "SPLITS": payload("splits.json")})

    fetched = await alpha_vantage.bars("ACME", Interval.MINUTE, since=None, now=NOW)

    assert [asked["function"] for asked in endpoint.asked] == ["TIME_SERIES_INTRADAY", "SPLITS"]
    assert [bar.split for bar in fetched.bars] == [1.0, 2.0, 1.0]


async def test_jump_after_a_weekend_is_seen(provider):
    """The last row before the known day stands for it when the known instant is no session."""
    alpha_vantage, _ = provider(
        {
            "TIME_SERIES_DAILY": daily(
                ("2024-07-05", "9", "11", "8", "10", "1"), ("2024-07-08", "5", "6", "4", "5", "1")
            ),
            "SPLITS": json.dumps({"data": [{"effective_date": "2024-07-08", "split_factor": "2"}]}),
        },
        plan="free",
    )

    fetched = await alpha_vantage.bars(
        "ACME", Interval.DAY, since=datetime(2024, 7, 6, 12, tzinfo=UTC), now=datetime(2024, 7, 9, tzinfo=UTC)
    )

    assert [bar.split for bar in fetched.bars] == [1.0, 2.0]


async def test_refusal_is_raised_inside_the_turn(provider):
    """The turn learns from how a call ends, an unknown symbol told by an empty object included."""
    alpha_vantage, endpoint = provider(payload("global_quote_unknown_symbol.json"))

    with pytest.raises(UnknownSymbolError):
        await alpha_vantage.quote("ACME")

    assert type(endpoint.turns.entered[0].error) is UnknownSymbolError


@pytest.mark.parametrize(
    ("now", "is_stale"),
    [("2024-07-08T12:00", False), ("2024-07-08T21:00", False), ("2024-07-09T07:59", False), ("2024-07-09T08:00", True)],
)
async def test_quote_of_days_ago(provider, now, is_stale):
    """Friday's close is the quote until Monday's has had twelve hours to arrive; then HTTP 200 makes it no fresher."""
    alpha_vantage, _ = provider(payload("global_quote.json"))
    alpha_vantage.adapter._clock.at = datetime.fromisoformat(f"{now}+00:00")

    if not is_stale:
        assert (await alpha_vantage.quote("ACME")).price == 51.5
        return
    with pytest.raises(UnavailableError, match="3 days 12 hours old: from before the session of 2024-07-08"):
        await alpha_vantage.quote("ACME")


async def test_news(provider):
    """News come oldest first, from the time asked for, rated for the symbol where it is, else as a whole."""
    alpha_vantage, endpoint = provider(payload("news.json"))

    news = await alpha_vantage.news(
        "ACME", since=datetime(2024, 7, 1, tzinfo=UTC), until=datetime(2024, 7, 6, tzinfo=UTC)
    )

    assert endpoint.asked == [
        {
            "function": "NEWS_SENTIMENT",
            "tickers": "ACME",
            "time_from": "20240701T0000",
            "time_to": "20240706T0001",
            "sort": "EARLIEST",
            "limit": "1000",
        }
    ]
    assert [(n.news_id, n.published_at, n.sentiment) for n in news] == [
        ("https://news.test/early", datetime(2024, 7, 2, 9, tzinfo=UTC), -0.2),
        ("https://news.test/plant", datetime(2024, 7, 5, 17, 38, 34, tzinfo=UTC), 0.412),
    ]
    assert (news[1].title, news[1].source, news[1].symbols) == ("ACME opens a plant", "Wire", ("ACME", "OTHER"))


async def test_no_news_is_told_as_invalid_inputs(provider):
    """The sentence that means a senseless request elsewhere means here that nothing was written."""
    alpha_vantage, _ = provider(payload("refusals/invalid_inputs.json"))

    assert await alpha_vantage.news("ACME", since=NOW - timedelta(days=1), until=NOW) == []


@pytest.mark.parametrize(
    ("first", "last", "symbol", "horizon", "found"),
    [
        ("2024-07-08", "2024-07-31", None, "3month", [("2024-07-24", "OTHER"), ("2024-07-25", "ACME")]),
        ("2024-07-08", "2024-11-30", "ACME", "6month", [("2024-07-25", "ACME"), ("2024-10-24", "ACME")]),
        ("2024-07-08", "2025-06-30", None, "12month", None),
        ("2024-08-01", "2024-08-31", None, "3month", []),
    ],
)
async def test_earnings_calendar(provider, first, last, symbol, horizon, found):
    """The calendar comes as CSV, reaches as far as needed, and tells when on its day a company reports."""
    alpha_vantage, endpoint = provider(payload("earnings_calendar.csv"))

    reports = await alpha_vantage.earnings(
        first=date.fromisoformat(first), last=date.fromisoformat(last), symbol=symbol
    )

    assert endpoint.asked[0]["horizon"] == horizon
    assert endpoint.asked[0].get("symbol") == symbol
    if found is not None:
        assert [(r.day.isoformat(), r.symbol) for r in reports] == found
    for report in reports:
        if report.symbol == "OTHER":
            assert (report.time, report.eps_estimate) == (ReportTime.BEFORE_OPEN, None)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (payload("refusals/burst.json"), RateLimitedError),
        (payload("refusals/quota_with_key.json"), DailyQuotaError),
        (payload("refusals/premium_endpoint.json"), NotEntitledError),
        ("{}", UnavailableError),
        ("<html>later</html>", UnavailableError),
        ("symbol,name,reportDate\r\nI,n,f,o,r,m,a\r\n", UnavailableError),
    ],
)
async def test_csv_that_is_none(provider, body, error):
    """A CSV request is refused in JSON, too, and letters in columns are no calendar: neither is an empty one."""
    alpha_vantage, _ = provider(body)

    with pytest.raises(TroopError) as caught:
        await alpha_vantage.earnings(first=date(2024, 7, 1), last=date(2024, 7, 31))

    assert type(caught.value) is error


async def test_calendar_with_no_reports(provider):
    """A header alone is an answer: nobody reports."""
    alpha_vantage, _ = provider("symbol,name,reportDate,fiscalDateEnding,estimate,currency,timeOfTheDay\r\n")

    assert await alpha_vantage.earnings(first=date(2024, 7, 1), last=date(2024, 7, 31)) == []


async def test_splits_and_dividends(provider):
    """One action a day, oldest first, with what was split and what was paid."""
    alpha_vantage, _ = provider({"SPLITS": payload("splits.json"), "DIVIDENDS": payload("dividends.json")})

    actions = await alpha_vantage.actions("ACME")

    assert [(a.day.isoformat(), a.split, a.dividend) for a in actions] == [
        ("1999-05-27", 3.0, 0.0),
        ("2024-04-02", 1.0, 0.24),
        ("2024-07-02", 2.0, 0.25),
    ]


CANARY_CASES = [
    httpx.ConnectError(f"could not reach https://provider.test/query?apikey={KEY}"),
    httpx.ConnectTimeout(f"https://provider.test/query?apikey={KEY}"),
    httpx.ReadTimeout(KEY),
    httpx.RemoteProtocolError(KEY),
    TimeoutError(KEY),
    httpx.Response(500, text=f"apikey={KEY} made us fall over"),
    httpx.Response(200, text=f"<html>{KEY}</html>"),
    *[f"refusals/{name}" for name, *_ in REFUSALS],
]


@pytest.mark.parametrize("case", CANARY_CASES, ids=lambda case: case if isinstance(case, str) else type(case).__name__)
async def test_key_is_never_told(provider, caplog, case):
    """The key is in every URL and in one answer, and must be in no error, repr or log, whatever the level."""
    alpha_vantage, endpoint = provider(payload(case) if isinstance(case, str) else case)
    caplog.set_level(logging.DEBUG)

    with pytest.raises(TroopError) as caught:
        await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)
    for chatty in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=chatty)
    with pytest.raises(TroopError) as again:
        await alpha_vantage.quote("ACME")

    assert len(endpoint.asked) >= 1
    for error in (caught.value, again.value):
        assert KEY not in everything_told(error)
    assert KEY not in caplog.text
    assert KEY not in repr(alpha_vantage.adapter) + repr(vars(alpha_vantage.adapter))


async def test_key_is_never_traced(provider):
    """The exporter's instrumentation would send the whole URL: the trace shows that we asked, no more."""
    from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    traces = TracerProvider()
    traces.add_span_processor(SimpleSpanProcessor(exporter))
    alpha_vantage, endpoint = provider(payload("global_quote.json"))
    client = alpha_vantage._http.client
    HTTPXClientInstrumentor.instrument_client(client, tracer_provider=traces)
    try:
        endpoint.turns.inside = 1
        await client.get("https://provider.test/query", params={"apikey": KEY, "function": "GLOBAL_QUOTE"})
        seen_without_care = "".join(span.to_json() for span in exporter.get_finished_spans())
        exporter.clear()
        endpoint.turns.inside = 0
        await alpha_vantage.quote("ACME")
    finally:
        HTTPXClientInstrumentor.uninstrument_client(client)

    assert KEY in seen_without_care
    assert exporter.get_finished_spans() == ()


async def test_slow_answer_is_given_up():
    """Nobody waits longer than the total time for an answer, even one that keeps dripping."""

    async def never(request):
        await asyncio.Event().wait()

    http = HttpClient("Alpha Vantage", total=timedelta(milliseconds=10), transport=lambda: httpx.MockTransport(never))
    alpha_vantage = AlphaVantage(base_url="https://provider.test", key=KEY, plan="free", http=http)

    with pytest.raises(UnavailableError, match=r"Alpha Vantage gave no answer \(TimeoutError\)"):
        await alpha_vantage.quote("ACME", turn=Turns())
    await http.aclose()


@pytest.mark.parametrize("url", ["ftp://provider.test", "provider.test", "https://provider.test:port"])
async def test_address_that_is_none(url):
    """A wrong address is for a person to correct, not to be tried again."""
    http = HttpClient("Alpha Vantage")
    alpha_vantage = AlphaVantage(base_url=url, key=KEY, plan="free", http=http)

    with pytest.raises(ConfigurationError, match="address of Alpha Vantage") as caught:
        await alpha_vantage.quote("ACME", turn=Turns())

    assert KEY not in everything_told(caught.value)
    await http.aclose()


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_key_that_cannot_be_one(key):
    """A key with blanks or line breaks was copied badly, and the error does not show it."""
    with pytest.raises(ConfigurationError, match="ALPHA_VANTAGE_KEY") as caught:
        AlphaVantage(base_url="https://provider.test", key=key, plan="free", http=HttpClient("Alpha Vantage"))

    assert key not in str(caught.value)


recorded = pytest.mark.skipif(not RECORDED.exists(), reason="the recorded answers are not beside this checkout")


@recorded
@pytest.mark.parametrize(
    ("name", "plan", "count"),
    [
        ("kevwk/Stocks_TimeSeriesDaily.json", "free", 100),
        ("kevwk/Stocks_TimeSeriesDailyAdjusted.json", "premium", 100),
        ("erysaj/daily_MSFT_compact.json", "free", 100),
        ("erysaj/daily_MSFT_full.json", "free", 5000),
        ("codespore/daily.json", "free", 1),
        ("codespore/daily_adjusted.json", "premium", 1),
        ("pricehist/ibm-partial-adj.json", "premium", 1),
    ],
)
async def test_recorded_daily_answers(provider, name, plan, count):
    """What the real service once sent is understood."""
    body = (RECORDED / name).read_text(encoding="utf-8")
    function = "TIME_SERIES_DAILY" if plan == "free" else "TIME_SERIES_DAILY_ADJUSTED"
    alpha_vantage, _ = provider({function: body, "SPLITS": '{"data": []}'}, plan=plan)

    fetched = await alpha_vantage.bars("MSFT", Interval.DAY, since=None, now=datetime(2026, 11, 20, tzinfo=UTC))

    assert len(fetched.bars) >= count
    assert fetched.refused_rows == ()


@recorded
@pytest.mark.parametrize(
    ("name", "error", "wait"),
    [
        ("notices/error_invalid_apikey.json", ConfigurationError, None),
        ("notices/error_invalid_call_daily.json", UnknownSymbolError, None),
        ("notices/error_unknown_function.json", RefusedError, None),
        ("notices/information_25_per_day.json", DailyQuotaError, QUOTA_SPENT),
        ("notices/information_25_per_day_key_echo.json", DailyQuotaError, QUOTA_SPENT),
        ("notices/information_burst_1_per_second.json", RateLimitedError, BURST),
        ("notices/information_premium_endpoint.json", NotEntitledError, None),
        ("notices/note_5_per_minute_500_per_day.json", RateLimitedError, MINUTE),
        ("notices/empty_object.json", UnavailableError, None),
        ("kevwk/ApiLimit.json", RateLimitedError, MINUTE),
        ("kevwk/PremiumMessage.json", RateLimitedError, MINUTE),
        ("kevwk/Error.json", UnknownSymbolError, None),
    ],
)
async def test_recorded_refusals(provider, name, error, wait):
    """The service's own sentences find their error."""
    alpha_vantage, _ = provider((RECORDED / name).read_text(encoding="utf-8"))

    with pytest.raises(TroopError) as caught:
        await alpha_vantage.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert type(caught.value) is error
    assert getattr(caught.value, "retry_after", None) == wait


@recorded
@pytest.mark.parametrize("name", ["codespore/quote.json", "erysaj/global_quote.json", "romeltorres/global_quote.json"])
async def test_recorded_quotes(provider, name):
    """Recorded quotes have a price and a trading day."""
    body = (RECORDED / name).read_text(encoding="utf-8")
    alpha_vantage, _ = provider(body)
    day = datetime.fromisoformat(json.loads(body)["Global Quote"]["07. latest trading day"])
    alpha_vantage.adapter._clock.at = day.replace(tzinfo=UTC) + timedelta(days=1)

    assert (await alpha_vantage.quote("ACME")).price > 0


@recorded
async def test_recorded_actions(provider):
    """The newest recordings of splits and dividends are CSV; the JSON of the same rows is understood."""

    def rows(name):
        [path] = (RECORDED / "portfoliotree").glob(f"{name}_*.csv")
        return json.dumps({"symbol": "IBM", "data": list(csv.DictReader(path.read_text().splitlines()))})

    alpha_vantage, _ = provider({"SPLITS": rows("SPLITS"), "DIVIDENDS": rows("DIVIDENDS")})

    actions = await alpha_vantage.actions("IBM")

    assert [(a.day.isoformat(), a.split) for a in actions if a.split != 1.0] == [
        ("1999-05-27", 2.0),
        ("2021-11-04", 1.046),
    ]
    assert (actions[-1].day.isoformat(), actions[-1].dividend) == ("2026-05-08", 1.69)


def hundred_days(last: date) -> str:
    """A compact answer: the hundred sessions through *last*."""
    sessions = calendar().sessions(last - timedelta(days=200), last)[-100:]
    row = {"1. open": "5", "2. high": "6", "3. low": "4", "4. close": "5", "5. volume": "10"}
    return json.dumps({"Time Series (Daily)": {str(session.date): row for session in sessions}})


REFUSED_LONG = [("TIME_SERIES_DAILY_ADJUSTED", ""), ("TIME_SERIES_DAILY", FULL)]


async def test_short_answer_does_not_speak_of_what_lies_before_it(provider):
    """A key that gets a hundred sessions says nothing of those before: they are not for its plan, but they exist."""
    alpha_vantage, endpoint = provider(
        {"TIME_SERIES_DAILY": hundred_days(NOW.date()), "SPLITS": payload("splits.json")}, plan="free"
    )
    endpoint.turns.refused |= set(REFUSED_LONG)

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=NOW - timedelta(days=300), now=NOW)

    assert len(fetched.bars) == 99  # today's has not closed
    assert fetched.covers_since == fetched.bars[0].opened_at


async def test_short_history_is_known_to_be_whole(provider):
    """Less than a hundred sessions are all there are, so what lies before them does not exist."""
    alpha_vantage, endpoint = provider(
        {"TIME_SERIES_DAILY": payload("daily.json"), "SPLITS": payload("splits.json")}, plan="free"
    )
    endpoint.turns.refused |= set(REFUSED_LONG)

    fetched = await alpha_vantage.bars("ACME", Interval.DAY, since=NOW - timedelta(days=300), now=NOW)

    assert (len(fetched.bars), fetched.covers_since) == (4, None)


@pytest.mark.parametrize(("days_ago", "calls"), [(3000, 0), (150, 1)])
async def test_history_out_of_reach_is_refused_rather_than_empty(provider, days_ago, calls):
    """Where nothing asked for can be in a short answer the plan is the reason, at no call where that is sure."""
    alpha_vantage, endpoint = provider({"TIME_SERIES_DAILY": hundred_days(NOW.date())}, plan="free")
    endpoint.turns.refused |= set(REFUSED_LONG)
    until = NOW - timedelta(days=days_ago)

    with pytest.raises(NotEntitledError, match=r"plan \(free\) includes no such bars before .*ALPHA_VANTAGE_PLAN"):
        await alpha_vantage.bars("ACME", Interval.DAY, since=until - timedelta(days=200), until=until, now=NOW)

    assert len(endpoint.asked) == calls


async def test_half_a_year_of_minutes_does_not_speak_of_the_months_behind_it(provider):
    """The first six months are asked for; that the seventh is empty is not said."""
    alpha_vantage, endpoint = provider(intraday())
    since = datetime(2023, 10, 10, tzinfo=UTC)

    fetched = await alpha_vantage.bars("ACME", Interval.MINUTE, since=since, now=NOW)

    assert endpoint.asked[-1]["month"] == "2024-03"
    assert fetched.covers_through == datetime(2024, 4, 1, 4, tzinfo=UTC)


async def test_minutes_out_of_reach_are_refused_rather_than_empty(provider):
    """A key that gets the newest hundred minutes only hears so, and is not told that there were none before."""
    minutes = [f"2024-07-05 {9 + (30 + n) // 60:02}:{(30 + n) % 60:02}:00" for n in range(100)]
    alpha_vantage, endpoint = provider(intraday(*minutes))
    endpoint.turns.refused.add(("TIME_SERIES_INTRADAY", FULL))
    since, noon = datetime(2024, 7, 2, 14, tzinfo=UTC), datetime(2024, 7, 5, 16, tzinfo=UTC)

    fetched = await alpha_vantage.bars("ACME", Interval.MINUTE, since=since, until=noon, now=NOW)
    with pytest.raises(NotEntitledError, match="no such bars before 2024-07-05"):
        await alpha_vantage.bars("ACME", Interval.MINUTE, since=since, until=fetched.covers_since, now=NOW)

    assert fetched.covers_since == datetime(2024, 7, 5, 13, 30, tzinfo=UTC)
