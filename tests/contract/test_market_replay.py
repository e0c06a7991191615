"""The replayed providers over real HTTP: shapes, refusals, windows, splits, and nothing from the future."""

import asyncio
import json
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.local.replay.catalogue import Catalogue, Series
from infra.local.replay.samples import load_packaged
from shared.market.models import Bar
from tests.contract.replaying import (
    DAY,
    FINNHUB,
    HOUR,
    MINUTE,
    NOON,
    POLYGON,
    QUERY,
    TWELVE_DATA,
    days,
    epoch,
    intraday,
    replaying,
    utc,
)

# --- Alpha Vantage: shapes


async def test_daily_answer_has_the_recorded_shape():
    """Raw prices as strings of four decimals, newest first, a hundred days of them."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.av("TIME_SERIES_DAILY", symbol="aapl")

    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    body = answer.json()
    assert body["Meta Data"] == {
        "1. Information": "Daily Prices (open, high, low, close) and Volumes",
        "2. Symbol": "AAPL",
        "3. Last Refreshed": "2012-03-01",
        "4. Output Size": "Compact",
        "5. Time Zone": "US/Eastern",
    }
    rows = body["Time Series (Daily)"]
    assert len(rows) == 100
    assert list(rows) == sorted(rows, reverse=True)
    assert rows["2012-03-01"] == {
        "1. open": "548.1700",
        "2. high": "548.2100",
        "3. low": "538.7700",
        "4. close": "544.4700",
        "5. volume": "24402500",
    }


async def test_today_appears_with_the_close():
    """A day is not shown a second before its session closes, and is shown when it does."""
    async with replaying("2012-11-23T17:59:59") as replay:
        before = (await replay.av("TIME_SERIES_DAILY", symbol="IBM")).json()
        replay.market_clock.at = utc("2012-11-23T18:00")
        after = (await replay.av("TIME_SERIES_DAILY", symbol="IBM")).json()

    assert before["Meta Data"]["3. Last Refreshed"] == "2012-11-21"
    assert "2012-11-23" not in before["Time Series (Daily)"]
    assert after["Meta Data"]["3. Last Refreshed"] == "2012-11-23"


async def test_full_answer_goes_back_to_the_first_day():
    """On a premium plan outputsize=full has everything that has closed."""
    async with replaying("2013-03-01T21:00") as replay:
        body = (await replay.av("TIME_SERIES_DAILY", symbol="MSFT", outputsize="full", key="local-premium")).json()

    rows = body["Time Series (Daily)"]
    assert body["Meta Data"]["4. Output Size"] == "Full size"
    assert (len(rows), list(rows)[-1]) == (3270, "2000-03-01")


async def test_csv_has_the_same_rows():
    """datatype=csv gives the same rows as lines."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.av("TIME_SERIES_DAILY", symbol="AAPL", datatype="csv")
        adjusted = await replay.av("TIME_SERIES_DAILY_ADJUSTED", symbol="AAPL", datatype="csv")

    lines = answer.text.split("\r\n")
    assert lines[:2] == [
        "timestamp,open,high,low,close,volume",
        "2012-03-01,548.1700,548.2100,538.7700,544.4700,24402500",
    ]
    assert (len(lines), lines[-1]) == (102, "")
    assert adjusted.text.split("\r\n")[:2] == [
        "timestamp,open,high,low,close,adjusted_close,volume,dividend_amount,split_coefficient",
        "2012-03-01,548.17,548.21,538.77,544.47,544.47,24402500,0.0000,1.0",
    ]


async def test_symbol_before_its_first_day_has_no_rows():
    """A symbol we know, before its first bar closed, has an empty series and no quote."""
    async with replaying("2012-05-17T21:00") as replay:
        daily = (await replay.av("TIME_SERIES_DAILY", symbol="FB")).json()
        quote = (await replay.av("GLOBAL_QUOTE", symbol="FB")).json()
        price = (await replay.finnhub("/quote", symbol="FB")).json()

    assert daily["Time Series (Daily)"] == {}
    assert quote == {"Global Quote": {}}
    assert price["c"] == 0


async def test_split_is_in_the_adjusted_close_only_once_it_happened():
    """Before the split the adjusted close is the raw one; from its day on older closes are divided."""
    async with replaying("2005-02-25T21:00") as replay:
        before = (await replay.av("TIME_SERIES_DAILY_ADJUSTED", symbol="AAPL")).json()["Time Series (Daily)"]
        splits_before = (await replay.av("SPLITS", symbol="AAPL")).json()
        replay.market_clock.at = utc("2005-02-28T21:00")
        after = (await replay.av("TIME_SERIES_DAILY_ADJUSTED", symbol="AAPL")).json()["Time Series (Daily)"]
        raw = (await replay.av("TIME_SERIES_DAILY", symbol="AAPL")).json()["Time Series (Daily)"]
        splits_after = (await replay.av("SPLITS", symbol="AAPL")).json()
        splits_csv = await replay.av("SPLITS", symbol="AAPL", datatype="csv")

    assert before["2005-02-25"]["4. close"] == before["2005-02-25"]["5. adjusted close"] == "88.99"
    assert after["2005-02-25"] == {
        "1. open": "89.62",
        "2. high": "89.91",
        "3. low": "88.19",
        "4. close": "88.99",
        "5. adjusted close": "44.495",
        "6. volume": "16348400",
        "7. dividend amount": "0.0000",
        "8. split coefficient": "1.0",
    }
    assert after["2005-02-28"]["5. adjusted close"] == "44.86"
    assert after["2005-02-28"]["8. split coefficient"] == "2.0"
    assert raw["2005-02-25"]["4. close"] == "88.9900"
    assert splits_before["data"] == [{"effective_date": "2000-06-21", "split_factor": "2.0000"}]
    assert splits_after == {
        "symbol": "AAPL",
        "data": [
            {"effective_date": "2005-02-28", "split_factor": "2.0000"},
            {"effective_date": "2000-06-21", "split_factor": "2.0000"},
        ],
    }
    assert splits_csv.text == "effective_date,split_factor\r\n2005-02-28,2.0000\r\n2000-06-21,2.0000\r\n"


async def test_global_quote_is_the_last_close():
    """The quote is the last closed day, with the change since the day before."""
    async with replaying("2012-03-02T15:00") as replay:
        body = (await replay.av("GLOBAL_QUOTE", symbol="AAPL")).json()
        table = (await replay.av("GLOBAL_QUOTE", symbol="AAPL", datatype="csv")).text

    assert body == {
        "Global Quote": {
            "01. symbol": "AAPL",
            "02. open": "548.1700",
            "03. high": "548.2100",
            "04. low": "538.7700",
            "05. price": "544.4700",
            "06. volume": "24402500",
            "07. latest trading day": "2012-03-01",
            "08. previous close": "542.4400",
            "09. change": "2.0300",
            "10. change percent": "0.3742%",
        }
    }
    assert table.split("\r\n")[1] == ",".join(body["Global Quote"].values())


async def test_change_on_the_day_of_a_split_is_in_new_shares():
    """A split is no fall of the price: the previous close is divided by it."""
    async with replaying("2005-02-28T21:00") as replay:
        quote = (await replay.av("GLOBAL_QUOTE", symbol="AAPL")).json()["Global Quote"]
        price = (await replay.finnhub("/quote", symbol="AAPL")).json()

    assert (quote["05. price"], quote["08. previous close"]) == ("44.8600", "44.4950")
    assert (price["c"], price["pc"], price["d"], price["dp"]) == (44.86, 44.495, 0.365, 0.8203)


async def test_hours_carry_their_start_in_new_york():
    """Intraday rows are labelled with their start, in local time, newest first; the open hour is absent."""
    async with replaying("2026-08-05T19:45", intraday()) as replay:
        body = (await replay.av("TIME_SERIES_INTRADAY", symbol="AAPL", interval="60min")).json()
        replay.market_clock.at = utc("2026-08-05T20:00")
        closed = (await replay.av("TIME_SERIES_INTRADAY", symbol="AAPL", interval="60min")).json()

    rows = body["Time Series (60min)"]
    assert body["Meta Data"] == {
        "1. Information": "Intraday (60min) open, high, low, close prices and volume",
        "2. Symbol": "AAPL",
        "3. Last Refreshed": "2026-08-05 14:30:00",
        "4. Interval": "60min",
        "5. Output Size": "Compact",
        "6. Time Zone": "US/Eastern",
    }
    assert (len(rows), list(rows)[:2]) == (100, ["2026-08-05 14:30:00", "2026-08-05 13:30:00"])
    assert rows["2026-08-05 14:30:00"] == {
        "1. open": "308.2092",
        "2. high": "309.8790",
        "3. low": "308.0850",
        "4. close": "309.6201",
        "5. volume": "4050737",
    }
    assert closed["Meta Data"]["3. Last Refreshed"] == "2026-08-05 15:30:00"


async def test_intraday_month_and_trailing_days():
    """month= gives that month alone, outputsize=full without it the last thirty days."""
    async with replaying("2025-01-15T21:00", intraday()) as replay:
        wish = {"symbol": "AAPL", "interval": "60min", "outputsize": "full", "datatype": "csv"}
        november = (await replay.av("TIME_SERIES_INTRADAY", month="2024-11", **wish)).text.split("\r\n")[1:-1]
        trailing = (await replay.av("TIME_SERIES_INTRADAY", **wish)).text.split("\r\n")[1:-1]
        later = (await replay.av("TIME_SERIES_INTRADAY", month="2025-02", **wish)).text.split("\r\n")[1:-1]
        last_of_month = (
            (await replay.av("TIME_SERIES_INTRADAY", month="2024-11", **wish | {"outputsize": "compact"}))
            .text.split("\r\n")[1:-1]
        )  # fmt: skip

    assert (november[0][:19], november[-1][:19]) == ("2024-11-29 11:30:00", "2024-11-01 09:30:00")
    assert (trailing[0][:19], trailing[-1][:19]) == ("2025-01-15 15:30:00", "2024-12-17 09:30:00")
    assert later == []
    assert last_of_month == november[:100]


async def test_minutes_that_did_not_trade_are_absent():
    """The replay invents no minute: what was not recorded has no row."""
    first, _, third = load_packaged(["AAPL"], MINUTE)["AAPL", MINUTE].bars[:3]
    thin = Catalogue([Series(symbol="AAPL", interval=MINUTE, bars=[first, third], source="test")])
    async with replaying("2026-08-01T00:00", thin) as replay:
        body = (await replay.av("TIME_SERIES_INTRADAY", symbol="AAPL", interval="1min", adjusted="true")).json()

    assert list(body["Time Series (1min)"]) == ["2026-07-31 09:32:00", "2026-07-31 09:30:00"]


async def test_intraday_is_adjusted_unless_told_otherwise():
    """Intraday rows are divided by later splits by default, and as traded with adjusted=false."""
    old, new = load_packaged(["AAPL"], MINUTE)["AAPL", MINUTE].bars[:2]
    split = Series(symbol="AAPL", interval=MINUTE, bars=[old, replace(new, split=2.0)], source="test")
    async with replaying("2026-08-01T00:00", Catalogue([split])) as replay:
        wish = {"symbol": "AAPL", "interval": "1min"}
        adjusted = (await replay.av("TIME_SERIES_INTRADAY", **wish)).json()["Time Series (1min)"]
        raw = (await replay.av("TIME_SERIES_INTRADAY", adjusted="false", **wish)).json()["Time Series (1min)"]

    assert raw["2026-07-31 09:30:00"]["4. close"] == "304.0500"
    assert adjusted["2026-07-31 09:30:00"]["4. close"] == "152.0250"
    assert adjusted["2026-07-31 09:30:00"]["5. volume"] == str(2 * int(old.volume))
    assert adjusted["2026-07-31 09:31:00"] == raw["2026-07-31 09:31:00"]


async def test_hours_outside_the_session_can_be_left_out():
    """extended_hours=false shows the session alone."""
    first, second = load_packaged(["AAPL"], MINUTE)["AAPL", MINUTE].bars[:2]
    early = replace(first, opened_at=utc("2026-07-31T13:29"), closed_at=first.opened_at)
    series = Series(symbol="AAPL", interval=MINUTE, bars=[early, first, second], source="test")
    async with replaying("2026-08-01T00:00", Catalogue([series])) as replay:
        wish = {"symbol": "AAPL", "interval": "1min"}
        extended = (await replay.av("TIME_SERIES_INTRADAY", **wish)).json()["Time Series (1min)"]
        session = (await replay.av("TIME_SERIES_INTRADAY", extended_hours="false", **wish)).json()

    assert list(extended) == ["2026-07-31 09:31:00", "2026-07-31 09:30:00", "2026-07-31 09:29:00"]
    assert list(session["Time Series (1min)"]) == ["2026-07-31 09:31:00", "2026-07-31 09:30:00"]


async def test_global_quote_is_renewed_after_the_close():
    """Alpha Vantage quotes finished days: during a session its quote is the day before."""
    async with replaying("2026-08-03T19:59", intraday()) as replay:
        during = (await replay.av("GLOBAL_QUOTE", symbol="AAPL")).json()["Global Quote"]
        replay.market_clock.at = utc("2026-08-03T20:00")
        after = (await replay.av("GLOBAL_QUOTE", symbol="AAPL")).json()["Global Quote"]

    assert (during["07. latest trading day"], after["07. latest trading day"]) == ("2026-07-31", "2026-08-03")
    assert after["08. previous close"] == during["05. price"]


async def test_quote_follows_the_freshest_series():
    """With minutes at hand the quote is the last closed minute, against the close of the session before."""
    async with replaying("2026-08-03T13:32:30", intraday()) as replay:
        price = (await replay.finnhub("/quote", symbol="AAPL")).json()

    minutes = load_packaged(["AAPL"], MINUTE)["AAPL", MINUTE].bars
    today = minutes[390:392]
    assert price["t"] == epoch("2026-08-03T13:32")
    assert (price["o"], price["c"], price["pc"]) == (today[0].open, today[1].close, minutes[389].close)
    assert (price["h"], price["l"]) == (max(bar.high for bar in today), min(bar.low for bar in today))


async def test_search_and_market_status():
    """Symbols are found by symbol and by name; the market is open while its session is."""
    async with replaying("2012-03-01T15:00") as replay:
        by_symbol = (await replay.av("SYMBOL_SEARCH", keywords="goog")).json()["bestMatches"]
        by_name = (await replay.av("SYMBOL_SEARCH", keywords="micro", datatype="csv")).text
        nothing = (await replay.av("SYMBOL_SEARCH", keywords="zzz")).json()
        opened = (await replay.av("MARKET_STATUS")).json()
        replay.market_clock.at = utc("2012-03-03T15:00")
        closed = (await replay.av("MARKET_STATUS")).json()

    assert by_symbol == [
        {
            "1. symbol": "GOOG",
            "2. name": "Google Inc",
            "3. type": "Equity",
            "4. region": "United States",
            "5. marketOpen": "09:30",
            "6. marketClose": "16:00",
            "7. timezone": "UTC-05",
            "8. currency": "USD",
            "9. matchScore": "1.0000",
        }
    ]
    assert by_name.split("\r\n")[1] == "MSFT,Microsoft Corp,Equity,United States,09:30,16:00,UTC-05,USD,0.5263"
    assert nothing == {"bestMatches": []}
    assert opened["endpoint"] == "Global Market Open & Close Status"
    assert opened["markets"][0]["primary_exchanges"] == "NASDAQ, NYSE, AMEX, BATS"
    assert [body["markets"][0]["current_status"] for body in (opened, closed)] == ["open", "closed"]


# --- Alpha Vantage: refusals, always with HTTP 200

INVALID_CALL = (
    "Invalid API call. Please retry or visit the documentation (https://www.alphavantage.co/documentation/) for "
)
PREMIUM_ENDPOINT = (
    "Thank you for using Alpha Vantage! This is a premium endpoint. You may subscribe to any of the premium plans "
    "at https://www.alphavantage.co/premium/ to instantly unlock all premium endpoints"
)
PREMIUM_PARAMETER = (
    "Thank you for using Alpha Vantage! The outputsize=full parameter value is a premium feature for the "
    "TIME_SERIES_DAILY endpoint. You may subscribe to any of the premium plans at "
    "https://www.alphavantage.co/premium/ to instantly unlock all premium features"
)
DEMO_KEY = (
    "The **demo** API key is for demo purposes only. Please claim your free API key at "
    "(https://www.alphavantage.co/support/#api-key) to explore our full API offerings. "
    "It takes fewer than 20 seconds."
)
BAD_KEY = (
    "the parameter apikey is invalid or missing. Please claim your free API key on "
    "(https://www.alphavantage.co/support/#api-key). It should take less than 20 seconds."
)


@pytest.mark.parametrize(
    ("function", "key", "params", "field", "text"),
    [
        ("TIME_SERIES_DAILY", "local-free", {"symbol": "TSLA"}, "Error Message", f"{INVALID_CALL}TIME_SERIES_DAILY."),
        ("TIME_SERIES_DAILY", "local-free", {}, "Error Message", f"{INVALID_CALL}TIME_SERIES_DAILY."),
        (
            "TIME_SERIES_DAILY",
            "local-premium",
            {"symbol": "AAPL", "outputsize": "huge"},
            "Error Message",
            f"{INVALID_CALL}TIME_SERIES_DAILY.",
        ),
        (
            "TIME_SERIES_INTRADAY",
            "local-premium",
            {"symbol": "AAPL", "interval": "7min"},
            "Error Message",
            f"{INVALID_CALL}TIME_SERIES_INTRADAY.",
        ),
        (
            "TIME_SERIES_INTRADAY",
            "local-premium",
            {"symbol": "AAPL", "interval": "60min"},  # there are only days here
            "Error Message",
            f"{INVALID_CALL}TIME_SERIES_INTRADAY.",
        ),
        ("GLOBAL_QUOTE", "local-free", {}, "Error Message", f"{INVALID_CALL}GLOBAL_QUOTE."),
        ("SYMBOL_SEARCH", "local-free", {}, "Error Message", f"{INVALID_CALL}SYMBOL_SEARCH."),
        ("SPLITS", "local-free", {}, "Error Message", f"{INVALID_CALL}SPLITS."),
        ("", "local-free", {}, "Error Message", "This API function () does not exist."),
        ("PRICES", "local-free", {}, "Error Message", "This API function (PRICES) does not exist."),
        ("TIME_SERIES_DAILY", "", {"symbol": "AAPL"}, "Error Message", BAD_KEY),
        ("TIME_SERIES_DAILY", "guess", {"symbol": "AAPL"}, "Error Message", BAD_KEY),
        (
            "TIME_SERIES_DAILY",
            "demo",
            {"symbol": "AAPL"},
            "Information",
            DEMO_KEY,
        ),
        ("TIME_SERIES_INTRADAY", "local-free", {"symbol": "AAPL"}, "Information", PREMIUM_ENDPOINT),
        ("TIME_SERIES_DAILY_ADJUSTED", "local-free", {"symbol": "AAPL"}, "Information", PREMIUM_ENDPOINT),
        (
            "TIME_SERIES_DAILY",
            "local-free",
            {"symbol": "AAPL", "outputsize": "full"},
            "Information",
            PREMIUM_PARAMETER,
        ),
    ],
)
@pytest.mark.parametrize("datatype", ["json", "csv"])
async def test_refusal_is_a_notice_in_json(datatype, function, key, params, field, text):
    """Whatever is wrong, the answer is HTTP 200 with one notice in JSON, also when CSV was asked for."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.av(function, key=key, datatype=datatype, **params)

    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert answer.json() == {field: text}


async def test_unknown_symbol_has_an_empty_quote():
    """Of a symbol nobody knows there is no error, just nothing."""
    async with replaying("2012-03-01T21:00") as replay:
        quote = await replay.av("GLOBAL_QUOTE", symbol="TSLA")
        splits = await replay.av("SPLITS", symbol="TSLA")

    assert quote.json() == {"Global Quote": {}}
    assert splits.json() == {}


@pytest.mark.parametrize("month", ["2024-13", "1999-12", "last", "2024-1", "9999-12"])
async def test_month_that_is_none_is_an_invalid_call(month):
    """A month is written YYYY-MM and lies in this century."""
    async with replaying("2025-01-15T21:00", intraday()) as replay:
        answer = await replay.av("TIME_SERIES_INTRADAY", symbol="AAPL", interval="60min", month=month)

    assert answer.json() == {"Error Message": f"{INVALID_CALL}TIME_SERIES_INTRADAY."}


async def test_second_call_within_a_second_is_a_burst():
    """The free key is asked to spread out its calls, and may call again a second later."""
    async with replaying("2012-03-01T21:00") as replay:
        first = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json()
        replay.wall.at += timedelta(milliseconds=999)
        second = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json()
        replay.wall.at += timedelta(milliseconds=1)
        third = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json()

    assert first == third
    assert second == {
        "Information": "Thank you for using Alpha Vantage! Please consider spreading out your free API requests more "
        "sparingly (1 request per second). You may subscribe to any of the premium plans at "
        "https://www.alphavantage.co/premium/ to lift the free key rate limit (25 requests per day), raise the "
        "per-second burst limit, and instantly unlock all premium endpoints"
    }


async def test_twenty_sixth_call_of_a_day_is_over_the_quota():
    """The day's notice repeats the key; the window rolls, so a day after the first call there is one more."""
    async with replaying("2012-03-01T21:00") as replay:
        for _ in range(25):
            assert "Global Quote" in (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json()
            replay.wall.at += timedelta(seconds=2)
        over = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json()
        other = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-premium")).json()
        replay.wall.at = NOON + timedelta(days=1)
        next_day = [(await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json() for _ in range(2)]

    assert over == {
        "Information": "We have detected your API key as local-free and our standard API rate limit is 25 requests "
        "per day. Please subscribe to any of the premium plans at https://www.alphavantage.co/premium/ to instantly "
        "remove all daily rate limits."
    }
    assert "Global Quote" in other
    assert [list(body) for body in next_day] == [["Global Quote"], ["Information"]]


async def test_premium_key_has_1200_calls_a_minute():
    """The 1201st call within a minute is asked to get in contact; a minute later all is well."""
    async with replaying("2012-03-01T21:00") as replay:
        bodies = [(await replay.av("MARKET_STATUS", key="local-premium")).json() for _ in range(1201)]
        replay.wall.at += timedelta(minutes=1)
        later = (await replay.av("MARKET_STATUS", key="local-premium")).json()

    assert all("markets" in body for body in [*bodies[:1200], later])
    assert bodies[1200] == {
        "Information": "Thank you for using Alpha Vantage! Please contact premium@alphavantage.co if you are "
        "targeting a higher API call volume."
    }


# --- Finnhub


async def test_finnhub_quote_has_the_recorded_shape():
    """Numbers, the change since the close before, and the close's time in seconds."""
    async with replaying("2012-03-02T15:00") as replay:
        answer = await replay.finnhub("/quote", symbol="AAPL", key="local-free")

    assert answer.json() == {
        "c": 544.47,
        "d": 2.03,
        "dp": 0.3742,
        "h": 548.21,
        "l": 538.77,
        "o": 548.17,
        "pc": 542.44,
        "t": epoch("2012-03-01T21:00"),
    }


async def test_finnhub_answers_an_unknown_symbol_with_zeros():
    """Of a symbol nobody knows there is a quote of zeros and nulls, and no candle."""
    async with replaying("2012-03-01T21:00") as replay:
        quote = await replay.finnhub("/quote", symbol="TSLA")
        candle = await replay.finnhub(
            "/stock/candle", symbol="TSLA", resolution="D", **{"from": 0, "to": 2_000_000_000}
        )

    assert quote.status_code == candle.status_code == 200
    assert quote.json() == {"c": 0, "d": None, "dp": None, "h": 0, "l": 0, "o": 0, "pc": 0, "t": 0}
    assert candle.json() == {"s": "no_data"}


@pytest.mark.parametrize(("key", "text"), [("", "Please use an API key."), ("guess", "Invalid API key.")])
async def test_finnhub_wants_a_key(key, text):
    """Without a key, and with a wrong one, there is 401."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.finnhub("/quote", symbol="AAPL", key=key)

    assert (answer.status_code, answer.json()) == (401, {"error": text})


async def test_finnhub_takes_the_key_from_the_query_too():
    """token= is as good as the header."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.finnhub("/quote", symbol="AAPL", key="", token="local-free")

    assert answer.json()["c"] == 544.47
    assert answer.headers["X-Ratelimit-Limit"] == "60"


async def test_daily_candles_are_adjusted_by_the_splits_known_by_now():
    """Prices before a split are divided by it and volumes multiplied, from the split's day on."""
    wish = {"symbol": "AAPL", "resolution": "D", "from": epoch("2005-02-25T00:00"), "to": epoch("2005-03-01T00:00")}
    async with replaying("2005-02-25T21:00") as replay:
        before = (await replay.finnhub("/stock/candle", **wish)).json()
        replay.market_clock.at = utc("2005-02-28T21:00")
        after = (await replay.finnhub("/stock/candle", **wish)).json()

    assert before == {
        "c": [88.99],
        "h": [89.91],
        "l": [88.19],
        "o": [89.62],
        "s": "ok",
        "t": [epoch("2005-02-25T05:00")],
        "v": [16348400],
    }
    assert after == {
        "c": [44.495, 44.86],
        "h": [44.955, 45.14],
        "l": [44.095, 43.96],
        "o": [44.81, 44.68],
        "s": "ok",
        "t": [epoch("2005-02-25T05:00"), epoch("2005-02-28T05:00")],
        "v": [32696800, 11635900],
    }


async def test_intraday_candles_are_as_traded_and_a_month_at_most():
    """Hourly candles carry their start; one call reaches back no more than a month."""
    async with replaying("2025-01-15T20:45", intraday()) as replay:
        wish = {"symbol": "AAPL", "resolution": "60", "to": epoch("2025-01-15T21:00")}
        day = (await replay.finnhub("/stock/candle", **wish, **{"from": epoch("2025-01-15T14:30")})).json()
        all_time = (await replay.finnhub("/stock/candle", **wish, **{"from": 0})).json()
        weekend = (
            await replay.finnhub(
                "/stock/candle",
                symbol="AAPL",
                resolution="60",
                **{"from": epoch("2025-01-11T00:00"), "to": epoch("2025-01-12T00:00")},
            )
        ).json()

    assert day["t"] == [epoch(f"2025-01-15T{hour}:30") for hour in range(14, 20)]
    assert all_time["t"][0] == epoch("2024-12-16T14:30")
    assert all_time["t"][-6:] == day["t"]
    assert weekend == {"s": "no_data"}


@pytest.mark.parametrize(
    ("path", "params", "text"),
    [
        ("/quote", {}, "Missing parameters"),
        ("/search", {}, "Missing parameters"),
        ("/stock/candle", {"symbol": "AAPL", "resolution": "D", "from": 1}, "Missing parameters"),
        ("/stock/candle", {"symbol": "AAPL", "resolution": "2h", "from": 1, "to": 2}, "wrong resolution"),
        (
            "/stock/candle",
            {"symbol": "AAPL", "resolution": "D", "from": "monday", "to": 2},
            "from must be seconds since 1970",
        ),
        ("/stock/market-status", {"exchange": "MOON"}, "exchange is not supported"),
    ],
)
async def test_finnhub_refuses_what_it_cannot_read(path, params, text):
    """A call with missing or wrong parameters is 422 and says which."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.finnhub(path, **params)

    assert (answer.status_code, answer.json()) == (422, {"error": text})


async def test_any_stretch_of_time_is_answered():
    """Stretches beyond all time are cut, not crashed on."""
    async with replaying("2012-03-01T21:00") as replay:
        wish = {"symbol": "AAPL", "resolution": "D"}
        wide = await replay.finnhub("/stock/candle", **wish, **{"from": -(10**15), "to": 10**18})
        backwards = await replay.finnhub("/stock/candle", **wish, **{"from": 10**9, "to": 10**8})
        absent = await replay.finnhub("/stock/candle", symbol="AAPL", resolution="W", **{"from": 0, "to": 10**9})

    assert len(wide.json()["t"]) == sum(bar.closed_at <= utc("2012-03-01T21:00") for bar in days()["AAPL", DAY].bars)
    assert backwards.json() == absent.json() == {"s": "no_data"}


async def test_candles_are_not_for_free_keys():
    """A free key gets 403 for candles, and the call counts."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.finnhub(
            "/stock/candle", symbol="AAPL", resolution="D", key="local-free", **{"from": 0, "to": 1}
        )

    assert answer.status_code == 403
    assert answer.json() == {"error": "You don't have access to this resource."}
    assert answer.headers["X-Ratelimit-Remaining"] == "59"


async def test_finnhub_limits_are_in_every_answer():
    """Thirty calls in a second and sixty in a minute, then 429; the headers count down and say when it ends."""
    async with replaying("2012-03-01T21:00") as replay:
        first = [await replay.finnhub("/quote", symbol="AAPL", key="local-free") for _ in range(31)]
        replay.wall.at += timedelta(seconds=1)
        second = [await replay.finnhub("/quote", symbol="AAPL", key="local-free") for _ in range(30)]
        replay.wall.at += timedelta(seconds=1)
        over = await replay.finnhub("/quote", symbol="AAPL", key="local-free")
        replay.wall.at = NOON + timedelta(minutes=1)
        again = await replay.finnhub("/quote", symbol="AAPL", key="local-free")
        unlimited = await replay.finnhub("/quote", symbol="AAPL")

    assert [answer.status_code for answer in first] == [200] * 30 + [429]
    assert [answer.status_code for answer in second] == [200] * 30
    assert over.status_code == 429
    assert over.json() == {"error": "API limit reached. Please try again later. Remaining Limit: 0"}
    reset = str(int(NOON.timestamp()) + 60)
    limits = [
        tuple(answer.headers[f"X-Ratelimit-{name}"] for name in ("Limit", "Remaining", "Reset"))
        for answer in (first[0], first[30], over)
    ]
    assert limits == [("60", "59", reset), ("60", "30", reset), ("60", "0", reset)]
    assert (again.status_code, again.headers["X-Ratelimit-Remaining"]) == (200, "29")
    assert "X-Ratelimit-Limit" not in unlimited.headers


@pytest.mark.parametrize(
    ("at", "phase", "is_open", "holiday"),
    [
        ("2012-03-01T08:59", None, False, None),
        ("2012-03-01T09:00", "pre-market", False, None),
        ("2012-03-01T14:30", "regular", True, None),
        ("2012-03-01T21:00", "post-market", False, None),
        ("2012-03-02T01:00", None, False, None),
        ("2012-03-03T15:00", None, False, None),
        ("2012-12-25T15:00", None, False, "Market holiday"),
    ],
)
async def test_finnhub_market_status_follows_the_sessions(at, phase, is_open, holiday):
    """The market is open during its session and nothing at all on a holiday."""
    async with replaying(at) as replay:
        body = (await replay.finnhub("/stock/market-status", exchange="US")).json()

    assert body == {
        "exchange": "US",
        "timezone": "America/New_York",
        "session": phase,
        "holiday": holiday,
        "isOpen": is_open,
        "t": epoch(at),
    }


async def test_finnhub_search_counts_what_it_found():
    """Symbols are found by symbol and by name."""
    async with replaying("2012-03-01T21:00") as replay:
        body = (await replay.finnhub("/search", q="apple")).json()

    assert body == {
        "count": 1,
        "result": [{"description": "Apple Inc", "displaySymbol": "AAPL", "symbol": "AAPL", "type": "Common Stock"}],
    }


# --- the market as a whole


async def test_calls_answers_and_refusals_are_counted():
    """Every call is counted as an answer, a fault or a refusal with its reason."""
    struck = iter([None, web.Response(status=503), None, None, None])

    async def strike(provider: str, request: web.Request) -> web.Response | None:
        assert provider in request.path
        return next(struck)

    async with replaying("2012-03-01T21:00", faults=strike) as replay:
        ok = await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")
        fault = await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")
        await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")
        await replay.av("GLOBAL_QUOTE", symbol="IBM", key="guess")
        await replay.finnhub("/quote", symbol="IBM")
        stats = replay.market.stats()

    assert (ok.status_code, fault.status_code) == (200, 503)
    assert stats == {
        "alpha_vantage": {
            "calls": 4,
            "answers": 1,
            "faulted": 1,
            "refusals": {"per_second": 1, "invalid_key": 1},
        },
        "finnhub": {"calls": 1, "answers": 1, "faulted": 0, "refusals": {}},
        "twelve_data": {"calls": 0, "answers": 0, "faulted": 0, "refusals": {}},
        "polygon": {"calls": 0, "answers": 0, "faulted": 0, "refusals": {}},
    }


async def test_windows_outlive_the_process():
    """A market that goes on from a saved state has not forgotten which calls were made."""
    async with replaying("2012-03-01T21:00") as replay:
        await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")
        await replay.finnhub("/quote", symbol="IBM", key="local-free")
        saved = json.dumps(replay.market.state())

    async with replaying("2012-03-01T21:00") as replay:
        replay.market.restore(json.loads(saved))
        assert json.dumps(replay.market.state()) == saved
        again = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json()
        counted = await replay.finnhub("/quote", symbol="IBM", key="local-free")

    assert "1 request per second" in again["Information"]
    assert counted.headers["X-Ratelimit-Remaining"] == "58"
    assert replay.market.stats()["finnhub"]["calls"] == 2


async def test_wall_set_back_keeps_nobody_waiting_longer_than_a_window():
    """When the wall jumps back an hour, a second's window still ends within a second."""
    async with replaying("2012-03-01T21:00") as replay:
        await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")
        replay.wall.at -= timedelta(hours=1)
        at_once = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json()
        replay.wall.at += timedelta(seconds=1)
        later = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-free")).json()

    assert [list(at_once), list(later)] == [["Information"], ["Global Quote"]]


async def test_progress_tells_how_far_the_market_is():
    """Progress is the share of bars that have closed, from the first open to the last close."""
    async with replaying("2012-05-18T20:00") as replay:
        begun, over = replay.market.progress(), replay.market.progress(utc("2013-03-01T21:00"))

    assert (over.fraction, over.closed, over.bars) == (1.0, 12_154, 12_154)
    assert (over.first_at, over.last_at) == (utc("2000-03-01T14:30"), utc("2013-03-01T21:00"))
    assert begun.fraction == pytest.approx(begun.closed / 12_154)
    assert 0 < begun.closed < 12_154


def as_of(catalogue: Catalogue, now: datetime) -> Catalogue:
    return Catalogue(
        replace(series, bars=[bar for bar in series.bars if bar.closed_at <= now]) for series in catalogue.values()
    )


EVERYWHERE = [
    (f"{QUERY}?function=TIME_SERIES_DAILY&symbol=AAPL&outputsize=full"),
    (f"{QUERY}?function=TIME_SERIES_DAILY&symbol=AAPL&datatype=csv"),
    (f"{QUERY}?function=TIME_SERIES_DAILY_ADJUSTED&symbol=AAPL&outputsize=full"),
    (f"{QUERY}?function=TIME_SERIES_INTRADAY&symbol=AAPL&interval=60min&outputsize=full"),
    (f"{QUERY}?function=TIME_SERIES_INTRADAY&symbol=AAPL&interval=60min&month=2012-03"),
    (f"{QUERY}?function=TIME_SERIES_INTRADAY&symbol=AAPL&interval=60min&adjusted=false&datatype=csv"),
    (f"{QUERY}?function=GLOBAL_QUOTE&symbol=AAPL"),
    (f"{QUERY}?function=SYMBOL_SEARCH&keywords=A"),
    (f"{QUERY}?function=MARKET_STATUS"),
    (f"{QUERY}?function=SPLITS&symbol=AAPL"),
    (f"{FINNHUB}/quote?symbol=AAPL"),
    (f"{FINNHUB}/stock/candle?symbol=AAPL&resolution=D&from=0&to=4000000000"),
    (f"{FINNHUB}/stock/candle?symbol=AAPL&resolution=60&from=0&to=1331000000"),
    (f"{FINNHUB}/search?q=AAPL"),
    (f"{FINNHUB}/stock/market-status?exchange=US"),
    (f"{FINNHUB}/stock/split?symbol=AAPL&from=2000-01-01&to=2030-01-01"),
    (f"{FINNHUB}/company-news?symbol=AAPL&from=2012-01-01&to=2013-01-01"),
    (f"{FINNHUB}/calendar/earnings?from=2012-01-01&to=2012-12-31"),
    (f"{QUERY}?function=EARNINGS_CALENDAR&symbol=AAPL"),
    (f"{QUERY}?function=NEWS_SENTIMENT&tickers=AAPL&limit=1000"),
    (f"{QUERY}?function=DIVIDENDS&symbol=AAPL"),
    (f"{QUERY}?function=GLOBAL_QUOTE&symbol=AAPL&entitlement=delayed"),
    (f"{TWELVE_DATA}/time_series?symbol=AAPL&interval=1day&outputsize=5000"),
    (f"{TWELVE_DATA}/time_series?symbol=AAPL&interval=1h&outputsize=5000&adjust=none&timezone=UTC"),
    (f"{TWELVE_DATA}/quote?symbol=AAPL"),
    (f"{TWELVE_DATA}/splits?symbol=AAPL&range=full"),
    (f"{TWELVE_DATA}/earnings_calendar?symbol=AAPL&start_date=2012-01-01&end_date=2012-12-31"),
    (f"{POLYGON}/v2/aggs/ticker/AAPL/range/1/day/2012-01-01/2013-01-01?apiKey=local-unlimited"),
    (f"{POLYGON}/v2/aggs/ticker/AAPL/range/30/minute/2012-01-01/2013-01-01?apiKey=local-unlimited"),
    (f"{POLYGON}/v2/aggs/ticker/AAPL/prev?apiKey=local-unlimited"),
    (f"{POLYGON}/v2/aggs/grouped/locale/us/market/stocks/2012-03-08?apiKey=local-unlimited"),
    (f"{POLYGON}/v3/reference/splits?ticker=AAPL&apiKey=local-unlimited"),
    (f"{POLYGON}/v2/reference/news?ticker=AAPL&limit=1000&apiKey=local-unlimited"),
]


def ten_days() -> Catalogue:
    """Days and hours of the same fortnight, with a split in the middle of both."""
    recorded = days()["AAPL", DAY].bars
    week = [bar for bar in recorded if utc("2012-03-01T00:00") < bar.closed_at < utc("2012-03-15T00:00")]
    hours = [
        Bar(
            opened_at=bar.opened_at + n * HOUR.span,
            closed_at=min(bar.opened_at + (n + 1) * HOUR.span, bar.closed_at),
            open=bar.open,
            high=bar.high,
            low=bar.low,
            close=bar.close,
            volume=bar.volume + n,
            split=2.0 if (place, n) == (5, 0) else 1.0,
        )
        for place, bar in enumerate(week)
        for n in range(7)
    ]
    week[5] = replace(week[5], split=2.0)
    return Catalogue(
        [
            Series(symbol="AAPL", interval=DAY, bars=week, source="test"),
            Series(symbol="AAPL", interval=HOUR, bars=hours, source="test"),
        ]
    )


async def everything_at(now: datetime, catalogue: Catalogue) -> list[str]:
    async with replaying(now.replace(tzinfo=None).isoformat(), catalogue) as replay:
        key = {"X-Finnhub-Token": "local-unlimited"}
        answers = [await replay.client.get(f"{path}&apikey=local-unlimited", headers=key) for path in EVERYWHERE]
    assert {answer.status_code for answer in answers} <= {200, 400}, "400 is how Twelve Data says that there is none"
    return [answer.text for answer in answers]


@settings(max_examples=25, deadline=None)
@given(minute=st.integers(min_value=0, max_value=15 * 24 * 60))
def test_nothing_of_the_future_is_ever_visible(minute):
    """At any instant every endpoint answers as if what closes later did not exist."""
    now = utc("2012-03-01T00:00") + timedelta(minutes=minute)
    whole = ten_days()

    assert asyncio.run(everything_at(now, whole)) == asyncio.run(everything_at(now, as_of(whole, now)))


@settings(max_examples=20, deadline=None)
@given(place=st.integers(min_value=0, max_value=3268), seconds=st.integers(min_value=0, max_value=60_000))
def test_daily_history_never_runs_ahead(place, seconds):
    """In the real history, too, no row is shown before its session has closed, and none is missing after."""
    bars = days()["AAPL", DAY].bars
    now = min(bars[place].closed_at + timedelta(seconds=seconds), bars[place + 1].closed_at - timedelta(seconds=1))

    async def shown() -> dict[str, object]:
        async with replaying(now.replace(tzinfo=None).isoformat()) as replay:
            return (await replay.av("TIME_SERIES_DAILY", symbol="AAPL")).json()["Time Series (Daily)"]

    expected = [str(bar.closed_at.date()) for bar in bars[max(place - 99, 0) : place + 1]]
    assert list(asyncio.run(shown())) == expected[::-1]
