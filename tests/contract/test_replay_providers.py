"""Twelve Data and Polygon in the replay, and what it makes up of news and earnings: shapes, credits, plans, pages."""

import csv
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from io import StringIO

import pytest

from infra.local.replay.almanac import NOTICE, SOURCE, Almanac
from infra.local.replay.catalogue import Catalogue, Series
from infra.local.replay.tapes import Tapes
from shared.market.models import Bar, ReportTime
from shared.market.sessions import AROUND_THE_CLOCK, calendar
from tests.contract.replaying import DAY, HOUR, MINUTE, NOON, days, epoch, intraday, replaying, utc

LAST = {
    "datetime": "2012-03-01",
    "open": "548.17000",
    "high": "548.21000",
    "low": "538.77000",
    "close": "544.47000",
    "volume": "24402500",
}
DAY_RANGE = "/v2/aggs/ticker/{}/range/1/day/{}/{}"


def spent(*, used: int, of: int, period: str = "current minute") -> dict[str, object]:
    text = f"You have run out of API credits for the {period}. {used} API credits were used, with the current limit"
    return {"code": 429, "message": f"{text} being {of}.", "status": "error"}


# --- Twelve Data


async def test_daily_series_has_the_documented_shape():
    """Thirty rows of strings, newest first, under what they are of."""
    async with replaying("2012-03-01T21:00") as replay:
        body = (await replay.twelve("/time_series", symbol="aapl", interval="1day")).json()

    assert body["meta"] == {
        "symbol": "AAPL",
        "interval": "1day",
        "currency": "USD",
        "exchange_timezone": "America/New_York",
        "exchange": "XNYS",
        "mic_code": "XNYS",
        "type": "Common Stock",
    }
    assert (body["status"], len(body["values"]), body["values"][0]) == ("ok", 30, LAST)
    assert body["values"] == sorted(body["values"], key=lambda row: row["datetime"], reverse=True)


async def test_the_end_of_a_range_is_left_out():
    """start_date counts, end_date does not; between two dates there are more than thirty rows."""
    wish = {"symbol": "AAPL", "interval": "1day", "start_date": "2012-02-27", "end_date": "2012-03-01"}
    async with replaying("2012-03-05T21:00") as replay:
        rows = (await replay.twelve("/time_series", **wish, order="asc")).json()["values"]
        year = (await replay.twelve("/time_series", **wish | {"start_date": "2011-03-01"})).json()["values"]
        none = await replay.twelve("/time_series", **wish | {"end_date": "2012-02-27"})

    assert [row["datetime"] for row in rows] == ["2012-02-27", "2012-02-28", "2012-02-29"]
    assert len(year) > 250
    assert (none.status_code, none.json()["code"]) == (400, 400)
    assert none.json()["message"].startswith("No data is available on the specified dates")


async def test_prices_are_adjusted_for_splits_unless_told_otherwise():
    """Before a split prices are divided and volumes multiplied, but not with adjust=none."""
    wish = {"symbol": "AAPL", "interval": "1day", "start_date": "2005-02-25", "end_date": "2005-03-01"}
    async with replaying("2005-02-28T21:00") as replay:
        adjusted = (await replay.twelve("/time_series", **wish)).json()["values"][1]
        raw = (await replay.twelve("/time_series", **wish, adjust="none")).json()["values"][1]

    assert (adjusted["close"], adjusted["volume"]) == ("44.49500", "32696800")
    assert (raw["close"], raw["volume"]) == ("88.99000", "16348400")


async def test_hours_are_stamped_at_their_start_in_the_zone_that_was_asked_for():
    """The exchange's own zone is the default."""
    wish = {"symbol": "AAPL", "interval": "1h", "outputsize": 2}
    async with replaying("2026-08-05T20:00", intraday()) as replay:
        local = (await replay.twelve("/time_series", **wish)).json()["values"]
        utc_rows = (await replay.twelve("/time_series", **wish, timezone="UTC")).json()["values"]

    assert [row["datetime"] for row in local] == ["2026-08-05 15:30:00", "2026-08-05 14:30:00"]
    assert [row["datetime"] for row in utc_rows] == ["2026-08-05 19:30:00", "2026-08-05 18:30:00"]
    assert [row["close"] for row in local] == [row["close"] for row in utc_rows]


async def test_several_symbols_come_under_their_names_with_their_own_refusals():
    """A symbol that is not known spoils only its own place."""
    async with replaying("2012-03-01T21:00") as replay:
        body = (await replay.twelve("/time_series", symbol="AAPL,TSLA", interval="1day", outputsize=1)).json()

    assert body["AAPL"]["values"] == [LAST]
    assert (body["TSLA"]["code"], body["TSLA"]["status"]) == (400, "error")
    assert "**symbol** not found: TSLA" in body["TSLA"]["message"]


async def test_quote_is_of_the_last_day():
    """Strings, the change since the day before, and when the last trade was."""
    async with replaying("2012-03-01T21:00") as replay:
        body = (await replay.twelve("/quote", symbol="AAPL")).json()

    assert (body["close"], body["previous_close"], body["percent_change"]) == ("544.47000", "542.44000", "0.37423")
    assert (body["datetime"], body["last_quote_at"]) == ("2012-03-01", epoch("2012-03-01T21:00"))
    assert body["is_market_open"] is False


async def test_credits_are_counted_by_symbols_and_rows():
    """A symbol's row of a hundred costs one credit; the ninth of a minute is refused with HTTP 200."""
    wish = {"interval": "1day", "key": "local-free"}
    async with replaying("2012-03-01T21:00") as replay:
        two = await replay.twelve("/time_series", symbol="AAPL,IBM", **wish)
        four = await replay.twelve("/time_series", symbol="AAPL", outputsize=301, **wish)
        over = await replay.twelve("/time_series", symbol="AAPL,IBM,MSFT", **wish)
        fits = await replay.twelve("/quote", symbol="AAPL,IBM", key="local-free")
        never = await replay.twelve("/time_series", symbol="AAPL", outputsize=1000, key="local-free", interval="1day")

    told = [(a.headers["api-credits-used"], a.headers["api-credits-left"]) for a in (two, four, over, fits, never)]
    assert told == [("2", "6"), ("6", "2"), ("6", "2"), ("8", "0"), ("8", "0")]
    assert [a.status_code for a in (two, four, over, fits, never)] == [200] * 5
    assert (over.json(), never.json()) == (spent(used=9, of=8), spent(used=18, of=8))


async def test_the_minute_of_credits_begins_on_the_clock():
    """What was spent at the end of one minute does not count in the next."""
    async with replaying("2012-03-01T21:00") as replay:
        replay.wall.at = NOON + timedelta(seconds=59)
        first = await replay.twelve("/time_series", symbol="AAPL", interval="1day", outputsize=800, key="local-free")
        refused = await replay.twelve("/quote", symbol="AAPL", key="local-free")
        replay.wall.at = NOON + timedelta(seconds=60)
        again = await replay.twelve("/quote", symbol="AAPL", key="local-free")

    assert (len(first.json()["values"]), refused.json()["code"]) == (800, 429)
    assert (again.json()["symbol"], again.headers["api-credits-left"]) == ("AAPL", "7")


async def test_the_day_of_credits_ends_at_midnight():
    """After 800 credits the sentence names the day, and the next day begins at 00:00 UTC."""
    async with replaying("2012-03-01T21:00") as replay:
        replay.wall.at = datetime(2026, 11, 21, 22, tzinfo=UTC)
        for _ in range(100):
            await replay.twelve("/time_series", symbol="AAPL", interval="1day", outputsize=800, key="local-free")
            replay.wall.at += timedelta(minutes=1)
        over = await replay.twelve("/quote", symbol="AAPL", key="local-free")
        replay.wall.at = datetime(2026, 11, 22, tzinfo=UTC)
        again = await replay.twelve("/quote", symbol="AAPL", key="local-free")

    assert over.json() == spent(used=801, of=800, period="day")
    assert again.json()["symbol"] == "AAPL"


@pytest.mark.parametrize(
    ("path", "params", "key", "code", "text"),
    [
        ("/quote", {"symbol": "AAPL"}, "", 401, "**apikey** parameter is incorrect or not specified"),
        ("/quote", {"symbol": "AAPL"}, "guess", 401, "**apikey** parameter is incorrect or not specified"),
        ("/quote", {}, "local-free", 404, "**symbol** or **figi** parameter is missing"),
        ("/quote", {"symbol": "TSLA"}, "local-free", 400, "**symbol** not found: TSLA"),
        ("/splits", {"symbol": "AAPL"}, "local-free", 403, "/splits is available exclusively with grow"),
        ("/earnings_calendar", {}, "local-free", 403, "/earnings_calendar is available exclusively with grow"),
        ("/time_series", {"symbol": "AAPL"}, "local-free", 400, "Invalid **interval** provided: . Supported"),
        ("/time_series", {"symbol": "AAPL", "interval": "1week"}, "local-free", 400, "No data is available"),
        ("/time_series", {"symbol": "AAPL", "interval": "1day", "outputsize": 5001}, "local-free", 400, "outputsize"),
        ("/time_series", {"symbol": "AAPL", "interval": "1day", "timezone": "Moon"}, "local-free", 400, "timezone"),
        ("/time_series", {"symbol": "AAPL", "interval": "1day", "adjust": "some"}, "local-free", 400, "adjust"),
        ("/time_series", {"symbol": "AAPL", "interval": "1day", "end_date": "x"}, "local-free", 400, "end_date"),
    ],
)
async def test_twelve_data_says_no_in_the_body(path, params, key, code, text):
    """The code stands in the body beside the sentence."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.twelve(path, key=key, **params)

    assert (answer.status_code, answer.json()["code"], answer.json()["status"]) == (code, code, "error")
    assert text in answer.json()["message"]


async def test_splits_count_the_new_shares_first():
    """The provider's ratio is old for new; range=last is the newest alone; nobody has recorded a dividend."""
    async with replaying("2012-03-01T21:00") as replay:
        every = (await replay.twelve("/splits", symbol="AAPL", range="full")).json()["splits"]
        last = (await replay.twelve("/splits", symbol="AAPL")).json()["splits"]
        dividends = (await replay.twelve("/dividends", symbol="AAPL")).json()["dividends"]

    newest = {"date": "2005-02-28", "description": "2-for-1 split", "ratio": 0.5, "from_factor": 2.0, "to_factor": 1}
    assert ([split["date"] for split in every], last, dividends) == (["2005-02-28", "2000-06-21"], [newest], [])


@pytest.mark.parametrize(
    "wish",
    [
        {"start_date": "0001-01-01", "end_date": "9999-12-31"},
        {"start_date": "9999-12-31", "end_date": "0001-01-01"},
        {"start_date": "0001-01-01 00:00:00", "end_date": "9999-12-31 23:59:59", "timezone": "Asia/Tokyo"},
    ],
)
@pytest.mark.parametrize("interval", ["1day", "1h"])
async def test_twelve_data_answers_any_stretch_of_time(wish, interval):
    """Stretches beyond all time are cut, not crashed on."""
    async with replaying("2025-01-15T20:45", days() | intraday()) as replay:
        answer = await replay.twelve("/time_series", symbol="AAPL", interval=interval, **wish)

    assert answer.json()["status"] == ("error" if wish["start_date"].startswith("9") else "ok")


# --- Polygon


async def test_aggregates_have_the_documented_shape():
    """Numbers, oldest first, stamped with the milliseconds of New York's midnight."""
    async with replaying("2012-03-01T21:00") as replay:
        body = (await replay.polygon(DAY_RANGE.format("aapl", "2012-02-29", "2012-03-01"))).json()

    assert body.pop("request_id")
    assert body == {
        "ticker": "AAPL",
        "queryCount": 2,
        "resultsCount": 2,
        "adjusted": True,
        "status": "OK",
        "count": 2,
        "results": [
            {"v": 34000400.0, "o": 541.56, "c": 542.44, "h": 547.61, "l": 535.7, "t": epoch("2012-02-29T05:00") * 1000},
            {
                "v": 24402500.0,
                "o": 548.17,
                "c": 544.47,
                "h": 548.21,
                "l": 538.77,
                "t": epoch("2012-03-01T05:00") * 1000,
            },
        ],
    }


async def test_a_range_without_bars_leaves_results_out():
    """Neither an unknown ticker nor a weekend has an empty list: there is none at all."""
    async with replaying("2012-03-05T21:00") as replay:
        unknown = (await replay.polygon(DAY_RANGE.format("TSLA", "2012-02-29", "2012-03-01"))).json()
        weekend = (await replay.polygon(DAY_RANGE.format("AAPL", "2012-03-03", "2012-03-04"))).json()
        holiday = (await replay.polygon("/v2/aggs/grouped/locale/us/market/stocks/2012-02-20")).json()
        dividends = (await replay.polygon("/v3/reference/dividends", ticker="AAPL")).json()

    for body in (unknown, weekend, holiday, dividends):
        assert body["status"] == "OK"
        assert "results" not in body
    assert (unknown["resultsCount"], holiday["resultsCount"]) == (0, 0)


async def test_adjusted_is_asked_for_by_name():
    """adjusted=false shows what was traded, the default what it is in today's shares."""
    path = DAY_RANGE.format("AAPL", "2005-02-25", "2005-02-28")
    async with replaying("2005-02-28T21:00") as replay:
        adjusted = (await replay.polygon(path)).json()
        raw = (await replay.polygon(path, adjusted="false", sort="desc")).json()

    assert ([bar["c"] for bar in adjusted["results"]], adjusted["adjusted"]) == ([44.495, 44.86], True)
    assert ([bar["c"] for bar in raw["results"]], raw["adjusted"]) == ([44.86, 88.99], False)


async def test_pages_follow_one_another_until_all_was_told():
    """next_url leads to the rest, with the parameters of the first page, and is left out at the end."""
    path = DAY_RANGE.format("AAPL", "2012-02-01", "2012-02-29")
    async with replaying("2012-03-01T21:00") as replay:
        whole = (await replay.polygon(path, adjusted="false")).json()["results"]
        page = (await replay.polygon(path, adjusted="false", limit=8)).json()
        pages = [page]
        while "next_url" in page:
            assert page["next_url"].startswith(f"{replay.url}/polygon/")
            answer = await replay.client.get(page["next_url"], headers={"Authorization": "Bearer local-free"})
            pages.append(page := answer.json())
        wrong = await replay.polygon(path, cursor="bm9uZQ==")

    assert [len(page["results"]) for page in pages] == [8, 8, 4]
    assert [bar for page in pages for bar in page["results"]] == whole
    assert not any(page["adjusted"] for page in pages)
    assert "next_url" not in pages[-1]
    assert wrong.status_code == 400


async def test_one_call_tells_a_whole_day_of_every_symbol():
    """Grouped bars are stamped with the close, as is the previous day's."""
    async with replaying("2012-03-01T21:00") as replay:
        grouped = (await replay.polygon("/v2/aggs/grouped/locale/us/market/stocks/2012-03-01")).json()
        before = (await replay.polygon("/v2/aggs/grouped/locale/us/market/stocks/2012-02-29")).json()
        previous = (await replay.polygon("/v2/aggs/ticker/AAPL/prev")).json()["results"]

    assert [bar["T"] for bar in grouped["results"]] == ["AAPL", "GOOG", "IBM", "MSFT"]
    assert {bar["t"] for bar in grouped["results"]} == {epoch("2012-03-01T21:00") * 1000}
    assert previous == [bar for bar in grouped["results"] if bar["T"] == "AAPL"]
    assert before["results"][0]["c"] == 542.44


NOT_AUTHORIZED = "Your plan doesn't include this data timeframe."


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        ("2012-02-29", "2012-02-29", 1),
        ("2012-02-29", "2012-03-01", None),
        ("2012-03-01", "2012-03-01", None),
        ("2009-01-02", "2010-02-01", None),
        ("2009-01-02", "2010-03-05", 4),
    ],
)
async def test_a_free_key_buys_ended_days_of_two_years(first, last, told):
    """What begins earlier is cut; what ends earlier, or reaches into today, is refused for good."""
    async with replaying("2012-03-01T21:00") as replay:
        free = await replay.polygon(DAY_RANGE.format("AAPL", first, last), key="local-free")
        premium = await replay.polygon(DAY_RANGE.format("AAPL", first, last), key="local-premium")

    assert premium.status_code == 200
    if told is None:
        assert (free.status_code, free.json()["status"]) == (403, "NOT_AUTHORIZED")
        assert free.json()["message"].startswith(NOT_AUTHORIZED)
    else:
        assert (free.status_code, free.json()["resultsCount"]) == (200, told)


async def test_a_free_key_sees_yesterday_as_the_previous_day():
    """Also after today's close; and a grouped day is refused while it is today's."""
    async with replaying("2012-03-01T22:00") as replay:
        previous = (await replay.polygon("/v2/aggs/ticker/AAPL/prev", key="local-free")).json()
        today = await replay.polygon("/v2/aggs/grouped/locale/us/market/stocks/2012-03-01", key="local-free")
        yesterday = await replay.polygon("/v2/aggs/grouped/locale/us/market/stocks/2012-02-29", key="local-free")

    assert previous["results"][0]["c"] == 542.44
    assert (today.status_code, yesterday.status_code) == (403, 200)


async def test_five_calls_a_minute_are_free():
    """The sixth is 429 and carries no header that tells when; a minute after the first there is one more."""
    async with replaying("2012-03-01T21:00") as replay:
        answers = [await replay.polygon("/v2/aggs/ticker/AAPL/prev", key="local-free") for _ in range(6)]
        replay.wall.at += timedelta(minutes=1)
        again = await replay.polygon("/v2/aggs/ticker/AAPL/prev", key="local-free")

    assert [answer.status_code for answer in [*answers, again]] == [200] * 5 + [429, 200]
    assert answers[5].json()["error"].startswith("You've exceeded the maximum requests per minute, please wait")
    assert not [name for name in answers[5].headers if "limit" in name or name == "retry-after"]


@pytest.mark.parametrize(
    ("path", "params", "key", "status", "text"),
    [
        ("/v2/aggs/ticker/AAPL/prev", {}, "", 401, "API Key was not provided"),
        ("/v2/aggs/ticker/AAPL/prev", {}, "guess", 401, "Unknown API Key"),
        ("/v2/aggs/ticker/AAPL/range/1/day/monday/2012-03-01", {}, "local-free", 400, "time parameter: 'from'"),
        ("/v2/aggs/ticker/AAPL/range/1/day/2012-03-02/2012-03-01", {}, "local-free", 400, "must not be before"),
        ("/v2/aggs/ticker/AAPL/range/0/day/2012-02-28/2012-02-29", {}, "local-free", 400, "'multiplier'"),
        ("/v2/aggs/ticker/AAPL/range/1/moon/2012-02-28/2012-02-29", {}, "local-free", 400, "'timespan'"),
        ("/v2/aggs/ticker/AAPL/range/1/day/2012-02-28/2012-02-29", {"limit": 50001}, "local-free", 400, "'limit'"),
        ("/v2/aggs/grouped/locale/us/market/stocks/today", {}, "local-free", 400, "'date'"),
        ("/v2/reference/news", {"published_utc.gte": "yesterday"}, "local-free", 400, "yesterday"),
    ],
)
async def test_polygon_refuses_what_it_cannot_read(path, params, key, status, text):
    """Real status codes, a status word and a sentence; the key may stand in the query, too."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.polygon(path, key=key, **params)
        in_query = await replay.polygon(path, key="", apiKey=key, **params)

    assert (answer.status_code, answer.json()["status"]) == (status, "ERROR")
    assert text in answer.json()["error"]
    assert (in_query.status_code, in_query.json()["error"]) == (status, answer.json()["error"])


async def test_minutes_fold_into_longer_bars_on_the_clocks_grid():
    """Half hours and hours are put together of recorded minutes, once they are over."""
    async with replaying("2026-08-03T15:10", intraday()) as replay:
        path = "/v2/aggs/ticker/AAPL/range/{}/2026-08-03/2026-08-03"
        minutes, halves, hours = [
            (await replay.polygon(path.format(grid))).json()["results"] for grid in ("1/minute", "30/minute", "1/hour")
        ]

    opened = epoch("2026-08-03T13:30") * 1000
    assert [bar["t"] - opened for bar in halves] == [0, 30 * 60_000, 60 * 60_000]
    first = minutes[:30]
    assert halves[0] == {
        "o": first[0]["o"],
        "h": max(bar["h"] for bar in first),
        "l": min(bar["l"] for bar in first),
        "c": first[-1]["c"],
        "v": pytest.approx(sum(bar["v"] for bar in first)),
        "t": opened,
    }
    assert [bar["t"] for bar in hours] == [epoch("2026-08-03T13:00") * 1000, epoch("2026-08-03T14:00") * 1000]


async def test_recorded_hours_are_the_half_hours_they_begin_with():
    """Where no minute was recorded, an hour of the session is on no grid but that of half hours."""
    hourly = Catalogue([intraday()["AAPL", HOUR]])
    path = "/v2/aggs/ticker/AAPL/range/{}/2026-08-04/2026-08-04"
    async with replaying("2026-08-05T00:00", hourly) as replay:
        halves = (await replay.polygon(path.format("30/minute"))).json()["results"]
        others = [
            (await replay.polygon(path.format(grid))).json() for grid in ("1/hour", "1/minute", "2/day", "1/week")
        ]

    assert [bar["t"] for bar in halves] == [epoch(f"2026-08-04T{hour}:30") * 1000 for hour in range(13, 20)]
    assert not any("results" in body for body in others)


@pytest.mark.parametrize(("first", "last"), [("0001-01-01", "9999-12-31"), ("0", "9" * 30), ("00010101", "2012-03-01")])
async def test_polygon_answers_any_stretch_of_time(first, last):
    """Stretches beyond all time are cut, not crashed on."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.polygon(DAY_RANGE.format("AAPL", first, last), limit=50_000)
        far = await replay.polygon(f"/v2/aggs/grouped/locale/us/market/stocks/{max(last, '9999-12-31')[:10]}")

    assert answer.json()["resultsCount"] == sum(
        b.closed_at <= utc("2012-03-01T21:00") for b in days()["AAPL", DAY].bars
    )
    assert far.status_code in {200, 400}


async def test_polygons_splits_say_from_and_to():
    """One call tells every symbol's splits up to now, newest first, within the dates that were asked for."""
    async with replaying("2012-03-01T21:00") as replay:
        every = (await replay.polygon("/v3/reference/splits", limit=1000)).json()["results"]
        old = (await replay.polygon("/v3/reference/splits", **{"execution_date.lt": "2003-01-01"})).json()["results"]

    told = [(split["ticker"], split["execution_date"], split["split_from"], split["split_to"]) for split in every]
    assert told == [
        ("AAPL", "2005-02-28", 1, 2.0),
        ("MSFT", "2003-02-18", 1, 2.0),
        ("AAPL", "2000-06-21", 1, 2.0),
    ]
    assert old == every[2:]


# --- splits of the others


async def test_finnhubs_splits_are_for_paid_keys():
    """From and to factors within two dates, and 403 for a free key."""
    wish = {"symbol": "AAPL", "from": "2001-01-01", "to": "2012-01-01"}
    async with replaying("2012-03-01T21:00") as replay:
        paid = await replay.finnhub("/stock/split", key="local-premium", **wish)
        free = await replay.finnhub("/stock/split", key="local-free", **wish)

    assert paid.json() == [{"symbol": "AAPL", "date": "2005-02-28", "fromFactor": 1, "toFactor": 2.0}]
    assert (free.status_code, free.json()) == (403, {"error": "You don't have access to this resource."})


async def test_a_reverse_split_is_told_in_whole_shares():
    """One new share for ten old ones: every provider says so in its own words."""
    recorded = days()["IBM", DAY].bars[:3]
    bars = [recorded[0], replace(recorded[1], split=0.1), recorded[2]]
    series = Series(symbol="ETFC", interval=DAY, bars=bars, source="test")
    async with replaying("2000-03-10T00:00", Catalogue([series])) as replay:
        finnhub = (
            await replay.finnhub("/stock/split", symbol="ETFC", **{"from": "2000-01-01", "to": "2001-01-01"})
        ).json()
        twelve = (await replay.twelve("/splits", symbol="ETFC")).json()["splits"]
        polygon = (await replay.polygon("/v3/reference/splits", ticker="ETFC")).json()["results"]

    assert (finnhub[0]["fromFactor"], finnhub[0]["toFactor"]) == (10.0, 1)
    assert (twelve[0]["from_factor"], twelve[0]["to_factor"], twelve[0]["description"]) == (1, 10.0, "1-for-10 split")
    assert (polygon[0]["split_from"], polygon[0]["split_to"]) == (10.0, 1)


async def test_alpha_vantage_knows_no_dividend():
    """None was recorded and none is made up: an empty list of a symbol we know, nothing of another."""
    async with replaying("2012-03-01T21:00") as replay:
        known = (await replay.av("DIVIDENDS", symbol="AAPL")).json()
        unknown = (await replay.av("DIVIDENDS", symbol="TSLA")).json()
        table = (await replay.av("DIVIDENDS", symbol="AAPL", datatype="csv")).text

    assert (known, unknown) == ({"symbol": "AAPL", "data": []}, {})
    assert table == "ex_dividend_date,declaration_date,record_date,payment_date,amount\r\n"


# --- Alpha Vantage: what else A1 documents


async def test_an_entitlement_renames_the_quote():
    """Delayed data is fifteen minutes old and says so in its key; realtime is now; free keys get neither."""
    async with replaying("2026-08-03T13:47:30", intraday()) as replay:
        plain = (await replay.av("GLOBAL_QUOTE", symbol="AAPL")).json()
        delayed = (await replay.av("GLOBAL_QUOTE", symbol="AAPL", entitlement="delayed")).json()
        realtime = (await replay.av("GLOBAL_QUOTE", symbol="AAPL", entitlement="realtime")).json()
        free = (await replay.av("GLOBAL_QUOTE", symbol="AAPL", entitlement="delayed", key="local-free")).json()

    minutes = [bar for bar in intraday()["AAPL", MINUTE].bars if bar.opened_at >= utc("2026-08-03T13:30")]
    assert plain["Global Quote"]["07. latest trading day"] == "2026-07-31"
    [(name, quote)] = delayed.items()
    assert name == "Global Quote - DATA DELAYED BY 15 MINUTES"
    assert quote["05. price"] == f"{minutes[1].close:.4f}"
    assert realtime["Global Quote"]["05. price"] == f"{minutes[16].close:.4f}"
    assert "The entitlement=delayed parameter value is a premium feature for the GLOBAL_QUOTE" in free["Information"]


async def test_an_accept_header_without_json_is_not_served():
    """The answer is a detail, with HTTP 200 like everything else."""
    async with replaying("2012-03-01T21:00") as replay:
        wish = {"function": "GLOBAL_QUOTE", "symbol": "IBM", "apikey": "local-unlimited"}
        refused = await replay.client.get("/alpha_vantage/query", params=wish, headers={"Accept": "image/png"})
        html = await replay.client.get("/alpha_vantage/query", params=wish, headers={"Accept": "text/html, */*;q=0.8"})

    assert (refused.status_code, refused.json()) == (200, {"detail": "Could not satisfy the request Accept header."})
    assert "Global Quote" in html.json()


async def test_the_free_key_of_old_had_five_calls_a_minute():
    """The sixth call gets the Note that spoke of 5 calls per minute and 500 per day."""
    async with replaying("2012-03-01T21:00") as replay:
        bodies = [(await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-historic")).json() for _ in range(6)]
        replay.wall.at += timedelta(minutes=1)
        again = (await replay.av("GLOBAL_QUOTE", symbol="IBM", key="local-historic")).json()

    assert all("Global Quote" in body for body in [*bodies[:5], again])
    assert list(bodies[5]) == ["Note"]
    assert "5 calls per minute and 500 calls per day" in bodies[5]["Note"]


# --- earnings


async def reports_by(replay, symbol: str, first: str, last: str) -> list[dict]:
    return (await replay.finnhub("/calendar/earnings", symbol=symbol, **{"from": first, "to": last})).json()[
        "earningsCalendar"
    ]


async def test_every_quarter_has_one_report_on_a_session():
    """Four dates a year, on days the market trades, the same in every run and said to be made up."""
    async with replaying("2012-12-31T21:00") as replay:
        body = (await replay.finnhub("/calendar/earnings", **{"from": "2012-01-01", "to": "2012-12-31"})).json()
        again = (await replay.finnhub("/calendar/earnings", **{"from": "2012-01-01", "to": "2012-12-31"})).json()
        ibm = await reports_by(replay, "IBM", "2012-01-01", "2012-12-31")

    rows = body["earningsCalendar"]
    assert body == again
    assert body["source"] == NOTICE
    assert [(row["year"], row["quarter"]) for row in ibm] == [(2011, 4), (2012, 1), (2012, 2), (2012, 3)]
    assert sum(row["symbol"] == "FB" for row in rows) == 2, "it was listed in May"
    assert all(calendar().session(date.fromisoformat(row["date"])) for row in rows)
    assert {row["hour"] for row in rows} <= {"bmo", "amc", "dmh"}


async def test_results_are_told_from_their_instant_on():
    """Before it there are estimates alone; Alpha Vantage lists only what is still to come."""
    async with replaying("2012-12-31T21:00") as replay:
        [report] = Almanac(Tapes(days(), replay.market_clock.now)).reports(date(2012, 7, 1), date(2012, 8, 31), "IBM")
        told = []
        for at in (report.out_at - timedelta(seconds=1), report.out_at):
            replay.market_clock.at = at
            [row] = await reports_by(replay, "IBM", "2012-07-01", "2012-08-31")
            twelve = await replay.twelve(
                "/earnings_calendar", symbol="IBM", start_date=str(report.day), end_date=str(report.day)
            )
            ahead = (await replay.av("EARNINGS_CALENDAR", symbol="IBM")).text
            [same] = twelve.json()["earnings"][str(report.day)]
            assert (same["eps_estimate"], same["eps_actual"]) == (row["epsEstimate"], row["epsActual"])
            told.append((row["epsEstimate"], row["epsActual"], row["revenueActual"], str(report.day) in ahead))

    assert told == [
        (report.eps_estimate, None, None, True),
        (report.eps_estimate, report.eps_actual, report.revenue_actual, False),
    ]


@pytest.mark.parametrize(("horizon", "least", "most"), [("3month", 0, 2), ("6month", 1, 3), ("12month", 3, 5)])
async def test_the_calendar_of_alpha_vantage_is_a_table(horizon, least, most):
    """Lines of the reports to come within the horizon, with a name that says who made them up."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.av("EARNINGS_CALENDAR", horizon=horizon, symbol="AAPL")
        unknown = (await replay.av("EARNINGS_CALENDAR", symbol="TSLA")).text
        refused = await replay.av("EARNINGS_CALENDAR", key="guess")

    rows = list(csv.DictReader(StringIO(answer.text)))
    assert answer.headers["Content-Type"].startswith("application/x-download")
    assert least <= len(rows) <= most
    for row in rows:
        assert (row["symbol"], row["name"], row["currency"]) == ("AAPL", f"Apple Inc ({SOURCE})", "USD")
        assert "2012-03-01" <= row["reportDate"] <= "2013-03-01"
        assert row["fiscalDateEnding"] < row["reportDate"]
    assert unknown == "symbol,name,reportDate,fiscalDateEnding,estimate,currency,timeOfTheDay\r\n"
    assert list(refused.json()) == ["Error Message"], "a refusal is JSON also here"


def test_reports_fit_their_session_on_short_days_and_in_winter_and_summer():
    """Before the open, after the close or during the session, whenever that session opens and closes."""
    now = utc("2013-03-01T21:00")
    reports = Almanac(Tapes(days(), lambda: now)).reports(date(2000, 1, 1), date(2013, 3, 1))
    assert len(reports) == 3 * 52 + 34 + 3, "AAPL, IBM and MSFT since 2000, GOOG since 2004, FB since 2012"
    assert {report.time for report in reports} >= {ReportTime.AFTER_CLOSE}
    for report in reports:
        session = calendar().session(report.day)
        assert session is not None
        assert {
            ReportTime.BEFORE_OPEN: report.out_at < session.opens_at,
            ReportTime.AFTER_CLOSE: report.out_at > session.closes_at,
            ReportTime.DURING: session.opens_at < report.out_at < session.closes_at,
        }[report.time]


async def test_crypto_reports_no_earnings():
    """What trades around the clock is no company."""
    bar = Bar(opened_at=utc("2012-01-01"), closed_at=utc("2012-01-02"), open=1, high=1, low=1, close=1, volume=1)
    coin = Series(symbol="BTC-USD", interval=DAY, bars=[bar], source="test", calendar=AROUND_THE_CLOCK)
    async with replaying("2012-06-01T00:00", Catalogue([coin])) as replay:
        assert await reports_by(replay, "BTC-USD", "2012-01-01", "2012-12-31") == []


# --- news


async def test_news_is_of_the_past_and_says_who_made_it_up():
    """A few articles a week, newest first, none later than the market's now, about closes that had been."""
    async with replaying("2012-03-01T15:00") as replay:
        rows = (
            await replay.finnhub("/company-news", symbol="AAPL", **{"from": "2012-02-01", "to": "2012-12-31"})
        ).json()

    stamps = [row["datetime"] for row in rows]
    assert 8 <= len(rows) <= 20
    assert stamps == sorted(stamps, reverse=True)
    assert epoch("2012-02-01T00:00") <= min(stamps) < max(stamps) <= epoch("2012-03-01T15:00")
    assert {row["source"] for row in rows} == {SOURCE}
    assert all(NOTICE in row["summary"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


async def test_every_provider_tells_the_same_news():
    """One article has one title and one time, whoever is asked."""
    async with replaying("2012-03-01T21:00") as replay:
        window = {"from": "2012-02-20", "to": "2012-03-01"}
        finnhub = (await replay.finnhub("/company-news", symbol="AAPL", **window)).json()
        av = (await replay.av("NEWS_SENTIMENT", tickers="AAPL", time_from="20120220T0000")).json()
        polygon = (
            await replay.polygon("/v2/reference/news", ticker="AAPL", **{"published_utc.gte": "2012-02-20"})
        ).json()

    told = [(row["headline"], datetime.fromtimestamp(row["datetime"], UTC)) for row in finnhub]
    assert len(told) > 2
    assert told == [
        (row["title"], datetime.strptime(row["time_published"], "%Y%m%dT%H%M%S").replace(tzinfo=UTC))
        for row in av["feed"]
    ]
    assert told == [(row["title"], datetime.fromisoformat(row["published_utc"])) for row in polygon["results"]]


async def test_news_of_everything_reaches_back_a_month():
    """Without a symbol every symbol is meant, and no more than the last month."""
    async with replaying("2012-03-01T21:00") as replay:
        av = (await replay.av("NEWS_SENTIMENT", limit="1000", topics="financial_markets")).json()["feed"]
        polygon = (await replay.polygon("/v2/reference/news", limit=1000)).json()["results"]

    assert {row["ticker_sentiment"][0]["ticker"] for row in av} == {"AAPL", "GOOG", "IBM", "MSFT"}
    assert [row["title"] for row in av] == [row["title"] for row in polygon]
    assert "20120130T210000" <= av[-1]["time_published"] < "20120206T000000"


async def test_sentiment_keeps_the_documented_types():
    """The article's score is a number, those of topics and tickers are texts, and labels follow the bands."""
    async with replaying("2012-03-01T21:00") as replay:
        body = (await replay.av("NEWS_SENTIMENT", tickers="AAPL", limit="1000", sort="EARLIEST")).json()

    assert body["items"] == str(len(body["feed"]))
    for row in body["feed"]:
        score, [ticker] = row["overall_sentiment_score"], row["ticker_sentiment"]
        assert isinstance(score, float)
        assert ticker["ticker_sentiment_score"] == f"{score:.6f}"
        assert isinstance(row["topics"][0]["relevance_score"], str)
        bounds = [(-0.35, "Bearish"), (-0.15, "Somewhat-Bearish"), (0.15, "Neutral"), (0.35, "Somewhat-Bullish")]
        assert row["overall_sentiment_label"] == next((name for top, name in bounds if score <= top), "Bullish")
        assert row["source"] == SOURCE


@pytest.mark.parametrize(
    "wish",
    [
        {"tickers": "TSLA"},
        {"tickers": "AAPL,IBM"},
        {"tickers": "AAPL", "topics": "ipo"},
        {"tickers": "AAPL", "time_from": "20130101T0000"},
        {"tickers": "AAPL", "time_from": "yesterday"},
        {"tickers": "AAPL", "limit": "0"},
        {"tickers": "AAPL", "sort": "BEST"},
    ],
)
async def test_news_without_a_match_is_called_invalid_inputs(wish):
    """That is how Alpha Vantage says that there is none; an article mentions one symbol."""
    async with replaying("2012-03-01T21:00") as replay:
        body = (await replay.av("NEWS_SENTIMENT", **wish)).json()

    text = "Invalid inputs. Please refer to the API documentation https://www.alphavantage.co/documentation#newsapi"
    assert body == {"Information": f"{text} and try again."}


# --- Finnhub: two kinds of 429


async def test_an_empty_token_is_asked_to_sign_up():
    """429 in plain text, though no limit was reached."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.finnhub("/quote", key="", symbol="AAPL", token="")

    assert (answer.status_code, answer.headers["Content-Type"]) == (429, "text/plain; charset=utf-8")
    assert answer.text.startswith("API limit reached. Please sign up")


@pytest.mark.parametrize("path", ["/company-news", "/stock/split"])
async def test_finnhub_wants_dates(path):
    """Anything else than a date is 422 and says which."""
    async with replaying("2012-03-01T21:00") as replay:
        answer = await replay.finnhub(path, symbol="AAPL", **{"from": "monday", "to": "2012-01-01"})

    assert (answer.status_code, answer.json()) == (422, {"error": "from must be a date such as 2012-03-01"})
