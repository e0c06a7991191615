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
    InvalidPayloadError,
    NotEntitledError,
    RateLimitedError,
    RefusedError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.http_client import HttpClient
from shared.market.adapters.polygon import MINUTE, OLD, TODAY, Polygon
from shared.market.models import Adjustment, Interval
from tests.unit.market.turns import TakingTurns, Turns, everything_told

ROOT = Path(__file__).resolve().parents[3]
PAYLOADS = ROOT / "tests" / "payloads" / "polygon"
RECORDED = ROOT.parent / "shared" / "payloads" / "polygon"
KEY = "CANARY7KEY9QX"
NOW = datetime(2024, 7, 8, 12, tzinfo=UTC)
AGGS = "/v2/aggs/ticker/ACME/range"
EMPTY = '{"status": "OK", "resultsCount": 0, "queryCount": 0}'


def payload(name: str) -> str:
    return (PAYLOADS / name).read_text(encoding="utf-8").replace("@KEY@", KEY)


def instant(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


def ms(text: str) -> int:
    return int(instant(text).timestamp()) * 1000


def aggs(*stamps: object, **columns: object) -> str:
    one = {"o": 5.0, "h": 6.0, "l": 4.0, "c": 5.0, "v": 10} | columns
    return json.dumps({"status": "OK", "results": [{"t": stamp, **one} for stamp in stamps]})


class Endpoint:
    """Answers as told, by the beginning of the path, and remembers what was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []
        self.turns = Turns()

    def __call__(self, request):
        assert self.turns.inside == 1
        assert KEY not in str(request.url)
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        params, path = dict(request.url.params), request.url.path
        self.asked.append((path, params))
        answer = self.answers
        if isinstance(answer, dict):
            answer = next(a for begin, a in answer.items() if path.startswith(begin))
        answer = answer(request) if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, text=answer)

    @property
    def paths(self):
        return [path for path, _ in self.asked]


@pytest.fixture
async def provider():
    opened = []

    def make(answers, base_url="https://provider.test"):
        endpoint = Endpoint(answers)
        http = HttpClient("Polygon", transport=lambda: httpx.MockTransport(endpoint))
        opened.append(http)
        made = Polygon(base_url=base_url, key=SecretStr(KEY), plan="free", http=http, market_clock=StoppedClock(NOW))
        return TakingTurns(made, endpoint.turns), endpoint

    yield make
    for http in opened:
        await http.aclose()


REFUSALS = [
    ("429_limit.json", RateLimitedError, MINUTE),
    ("403_timeframe.json", RefusedError, None),
    ("403_not_entitled.json", NotEntitledError, None),
    ("403_today.json", RefusedError, None),
    ("401_unknown_key.json", ConfigurationError, None),
    ("401_no_key.json", ConfigurationError, None),
    ("400_bad_request.json", RefusedError, None),
    ("404_unknown_ticker.json", UnknownSymbolError, None),
    ("200_unknown_prose.json", UnavailableError, None),
]


@pytest.mark.parametrize(("name", "error", "wait"), REFUSALS)
async def test_refusal_becomes_our_error(provider, name, error, wait):
    """The status and the words together say whether to wait, to stop or to call a person."""
    polygon, endpoint = provider(httpx.Response(int(name[:3]), text=payload(f"refusals/{name}")))

    with pytest.raises(TroopError) as caught:
        await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert type(caught.value) is error
    assert getattr(caught.value, "retry_after", None) == wait
    assert endpoint.turns.entered[0].error is caught.value


def test_every_refusal_on_file_is_judged():
    """A sentence somebody adds to the payloads needs a row in the table above."""
    assert {path.name for path in (PAYLOADS / "refusals").iterdir()} == {name for name, *_ in REFUSALS}


@pytest.mark.parametrize(("name", "error", "wait"), [r for r in REFUSALS if r[0][:3] not in ("400", "404")])
async def test_refusal_in_a_body_alone(provider, name, error, wait):
    """A gateway that turns every status into 200 changes no verdict on what is told in words."""
    polygon, _ = provider(payload(f"refusals/{name}"))

    with pytest.raises(TroopError) as caught:
        await polygon.quote("ACME")

    assert type(caught.value) is error
    assert getattr(caught.value, "retry_after", None) == wait


async def test_refused_dates_are_not_the_endpoint(provider):
    """A range that is refused for its dates must not cost the key all its bars: a refusal is remembered for good."""
    polygon, endpoint = provider(httpx.Response(403, text=payload("refusals/403_timeframe.json")))

    with pytest.raises(RefusedError, match=r"plan \(free\) does not include these dates.*POLYGON_PLAN"):
        await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert endpoint.turns.refused == set()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, "<html>We will be right back</html>"),
        (200, '{"status": "OK", "results": [{"t": 17'),
        (200, ""),
        (200, "[]"),
        (200, "{}"),
        (200, '{"status": "OK", "results": "later"}'),
        (200, "[" * 100_000),
        (302, ""),
        (500, "<html>oops</html>"),
        (503, '{"status": "ERROR", "error": "Unknown API Key"}'),
    ],
)
async def test_unreadable_answer_is_trouble_that_passes(provider, status, body):
    """Half an answer, a web page or a server error is never an empty series and never a bad key."""
    polygon, _ = provider(httpx.Response(status, text=body))

    with pytest.raises(UnavailableError):
        await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)
    with pytest.raises(UnavailableError):
        await polygon.quote("ACME")


async def test_missing_entitlement_names_the_plan(provider):
    """Whoever reads the refusal learns which setting it is about."""
    polygon, _ = provider(httpx.Response(403, text=payload("refusals/403_not_entitled.json")))

    with pytest.raises(NotEntitledError, match=r"plan \(free\).*POLYGON_PLAN"):
        await polygon.news("ACME", since=NOW, until=NOW)


async def test_omitted_results_are_an_empty_answer(provider):
    """What is empty is left out: that is an answer, not an error, and no splits are asked for."""
    polygon, endpoint = provider(payload("aggs_empty.json"))

    fetched = await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert (fetched.bars, fetched.refused_rows) == ((), ())
    assert len(endpoint.asked) == 1


async def test_first_daily_fetch_is_as_traded_with_its_splits(provider):
    """Raw prices are asked for, so the splits are too; a bar covers its session, half days included."""
    polygon, endpoint = provider({AGGS: payload("aggs_day.json"), "/v3": payload("splits.json")})

    fetched = await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert endpoint.asked[0] == (
        f"{AGGS}/1/day/2003-09-09/2024-07-05",
        {"adjusted": "false", "sort": "asc", "limit": "50000"},
    )
    assert endpoint.paths[1] == "/v3/reference/splits"
    assert endpoint.turns.asked == [("aggs", 1, ""), ("reference/splits", 1, "")]
    assert polygon.calls(Interval.DAY, since=None, now=NOW) == 2
    assert fetched.adjustment is Adjustment.RAW
    assert [(bar.opened_at, bar.closed_at) for bar in fetched.bars] == [
        (instant("2024-07-01T13:30:00"), instant("2024-07-01T20:00:00")),
        (instant("2024-07-02T13:30:00"), instant("2024-07-02T20:00:00")),
        (instant("2024-07-03T13:30:00"), instant("2024-07-03T17:00:00")),
        (instant("2024-07-05T13:30:00"), instant("2024-07-05T20:00:00")),
    ]
    assert [bar.close for bar in fetched.bars] == [100.0, 50.5, 51.0, 51.5]
    assert [bar.split for bar in fetched.bars] == [1.0, 2.0, 1.0, 1.0]
    assert fetched.refused_rows == ()


@pytest.mark.parametrize(("since", "calls"), [("2024-07-01T20:00:00", 2), ("2024-07-02T20:00:00", 1)])
async def test_update_asks_for_splits_after_a_jump_only(provider, since, calls):
    """Day by day one call is enough, as long as nothing looks like a split."""
    rows = json.loads(payload("aggs_day.json"))
    rows["results"] = rows["results"][0 if calls == 2 else 1 :]
    polygon, endpoint = provider({AGGS: json.dumps(rows), "/v3": payload("splits.json")})

    fetched = await polygon.bars("ACME", Interval.DAY, since=instant(since), now=NOW)

    assert len(endpoint.asked) == calls
    assert [bar.split for bar in fetched.bars][-3:] == [2.0 if calls == 2 else 1.0, 1.0, 1.0]


async def test_bars_are_not_sold_without_their_splits(provider):
    """When the splits are refused, the bars are not taken for unsplit ones."""
    limit = httpx.Response(429, text=payload("refusals/429_limit.json"))
    polygon, _ = provider({AGGS: payload("aggs_day.json"), "/v3": limit})

    with pytest.raises(RateLimitedError):
        await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)


async def test_hours_are_put_together_of_half_hours(provider):
    """Its hours begin on the full hour, ours with the session; a half hour without trades takes nothing away."""
    polygon, endpoint = provider(payload("aggs_half_hours.json"))

    fetched = await polygon.bars("ACME", Interval.HOUR, since=instant("2024-07-02T20:00:00"), now=NOW)

    assert endpoint.paths == [f"{AGGS}/30/minute/{ms('2024-07-02T19:00:00')}/{ms('2024-07-05T20:00:00') - 1}"]
    assert [(bar.closed_at, bar.open, bar.high, bar.low, bar.close, bar.volume) for bar in fetched.bars] == [
        (instant("2024-07-03T14:30:00"), 50.5, 50.7, 50.25, 50.6, 200),
        (instant("2024-07-03T15:30:00"), 50.6, 51.0, 50.5, 50.9, 200),
        (instant("2024-07-03T16:30:00"), 50.9, 51.25, 50.8, 51.2, 200),
        (instant("2024-07-03T17:00:00"), 51.2, 51.3, 51.1, 51.25, 300),
    ]
    assert fetched.refused_rows == ()


async def test_half_hours_that_make_no_hour_are_named(provider):
    """A row told twice or off the grid is not added to an hour; one without numbers spoils its hour and says so."""
    rows = json.loads(payload("aggs_half_hours.json"))
    rows["results"][1]["v"] = None
    rows["results"].append(dict(rows["results"][4]))
    rows["results"].append(rows["results"][5] | {"t": rows["results"][5]["t"] + 60_000})
    rows["results"].append(rows["results"][5] | {"t": ms("2024-07-03T12:00:00")})
    polygon, _ = provider(json.dumps(rows))

    fetched = await polygon.bars("ACME", Interval.HOUR, since=instant("2024-07-02T20:00:00"), now=NOW)

    assert [(bar.closed_at.hour, bar.volume) for bar in fetched.bars] == [(15, 200), (16, 200), (17, 300)]
    told = "\n".join(fetched.refused_rows)
    assert len(fetched.refused_rows) == 4
    assert "(2024-07-03 13:30): open is 'None', not a number" in told
    assert "no 1h bar of XNYS opens at 2024-07-03T16:00:00" in told
    assert "no 1h bar of XNYS opens at 2024-07-03T16:31:00" in told
    assert "1 rows outside the session" in told


async def test_minutes_outside_the_session_are_left_out_and_counted(provider):
    """Early and late trading is left out, and the answer says so."""
    stamps = [ms(f"2024-07-05T{at}") for at in ("12:00:00", "13:30:00", "13:31:30", "20:00:00")]
    polygon, _ = provider(aggs(*stamps, "x", None, 1e300))

    fetched = await polygon.bars("ACME", Interval.MINUTE, since=None, now=NOW)

    assert [bar.closed_at for bar in fetched.bars] == [instant("2024-07-05T13:31:00")]
    assert [line.split(":")[0] for line in fetched.refused_rows[:3]] == ["t=x", "t=?", "t=?"]
    assert fetched.refused_rows[4].startswith("2 rows outside the session")


async def test_row_that_cannot_be_true_is_named(provider):
    """An impossible row is left out, and the answer says which and why."""
    rows = json.loads(payload("aggs_day.json"))
    rows["results"][1]["h"] = 1
    rows["results"][2]["c"] = 0
    rows["results"][3]["t"] = ms("2024-07-04T04:00:00")
    polygon, _ = provider({AGGS: json.dumps(rows), "/v3": EMPTY})

    fetched = await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert [bar.opened_at.day for bar in fetched.bars] == [1]
    assert [line.split("(")[1][:10] for line in fetched.refused_rows] == ["2024-07-02", "2024-07-03", "2024-07-04"]


@pytest.mark.parametrize(
    ("now", "day", "parameter"),
    [
        ("2024-07-05T19:59:59", "2024-07-03", ""),
        ("2024-07-05T20:00:00", "2024-07-05", TODAY),
        ("2024-07-06T03:59:59", "2024-07-05", TODAY),
        ("2024-07-06T04:00:00", "2024-07-05", ""),
    ],
)
async def test_today_is_asked_for_only_when_it_has_closed(provider, now, day, parameter):
    """A session still open is not asked for; after the close it is today's until New York's midnight."""
    polygon, endpoint = provider(EMPTY)

    await polygon.bars("ACME", Interval.DAY, since=instant("2024-06-28T20:00:00"), now=instant(now))

    assert endpoint.paths[0].endswith(day)
    assert endpoint.turns.asked == [("aggs", 1, parameter)]


async def test_free_key_learns_once_that_today_is_not_its_own(provider):
    """Refused today's bars, the key still gets the others, and the next fetch asks for those at once."""
    now = instant("2024-07-05T21:00:00")

    def answer(request):
        if request.url.path.endswith("2024-07-05"):
            return httpx.Response(403, text=payload("refusals/403_today.json"))
        return payload("aggs_day.json")

    polygon, endpoint = provider({AGGS: answer, "/v3": payload("splits.json")})
    since = instant("2024-07-01T20:00:00")

    first = await polygon.bars("ACME", Interval.DAY, since=since, now=now)
    await polygon.bars("ACME", Interval.DAY, since=since, now=now)

    assert first.bars[-1].closed_at == instant("2024-07-05T20:00:00")
    assert [p for e, _, p in endpoint.turns.asked if e == "aggs"] == [TODAY, "", ""]
    assert endpoint.turns.refused == {("aggs", TODAY)}


async def test_nothing_but_today_is_left_to_ask_for(provider):
    """When today is all that is missing, the refusal is the answer, at no call once it is known."""
    polygon, endpoint = provider(httpx.Response(403, text=payload("refusals/403_today.json")))
    since, now = instant("2024-07-03T17:00:00"), instant("2024-07-05T21:00:00")

    for _ in range(2):
        with pytest.raises(NotEntitledError):
            await polygon.bars("ACME", Interval.DAY, since=since, now=now)

    assert len(endpoint.asked) == 1


async def test_free_key_learns_how_far_back_it_reaches(provider):
    """Refused what is older than two years, the key gets the rest, and old ranges are not asked for again."""
    oldest = NOW - timedelta(days=730)

    def answer(request):
        until = int(request.url.path.rsplit("/", 1)[1])
        is_old = until < oldest.timestamp() * 1000
        return httpx.Response(403, text=payload("refusals/403_timeframe.json")) if is_old else EMPTY

    polygon, endpoint = provider(answer)

    for _ in range(2):
        await polygon.bars("ACME", Interval.MINUTE, since=instant("2020-01-02T21:00:00"), now=NOW)

    assert endpoint.turns.asked == [("aggs", 1, OLD), *[("aggs", 1, "")] * 12]
    begins = [int(path.split("/")[-2]) / 1000 for path in endpoint.paths[1:7]]
    assert begins[0] == oldest.timestamp()
    assert begins == sorted(begins)


async def test_only_what_is_too_old_is_asked_for(provider):
    """A gap of years ago has no smaller call."""
    polygon, endpoint = provider(httpx.Response(403, text=payload("refusals/403_timeframe.json")))

    with pytest.raises(NotEntitledError):
        await polygon.bars(
            "ACME",
            Interval.DAY,
            since=instant("2015-01-02T21:00:00"),
            now=NOW,
            until=instant("2015-02-02T21:00:00"),
        )

    assert endpoint.turns.asked == [("aggs", 1, OLD)]


async def test_nothing_is_asked_where_no_bar_has_closed(provider):
    """A call that can bring nothing is not made."""
    polygon, endpoint = provider(EMPTY)

    fetched = await polygon.bars("ACME", Interval.DAY, since=instant("2024-07-05T20:00:00"), now=NOW)

    assert (fetched.bars, endpoint.asked) == ((), [])


@pytest.mark.parametrize(
    ("base_url", "next_url", "second"),
    [
        ("https://provider.test", "https://provider.test/v2/more?cursor=abc&symbol=X", "/v2/more"),
        (
            "https://provider.test/polygon",
            "https://provider.test/polygon/v2/more?cursor=abc&apiKey=x",
            "/polygon/v2/more",
        ),
        ("https://api.massive.com", "https://api.polygon.io/v2/more?cursor=abc", "/v2/more"),
    ],
)
async def test_next_page_is_asked_for_on_our_base(provider, base_url, next_url, second):
    """Pages are followed with a turn each, on the host we were given, also where they still bear the old name."""

    def answer(request):
        if request.url.params.get("cursor") == "abc":
            return aggs(ms("2024-07-05T13:31:00"))
        return json.dumps(json.loads(aggs(ms("2024-07-05T13:30:00"))) | {"next_url": next_url})

    polygon, endpoint = provider(answer, base_url=base_url)

    fetched = await polygon.bars("ACME", Interval.MINUTE, since=instant("2024-07-05T13:29:00"), now=NOW)

    assert [bar.closed_at.minute for bar in fetched.bars] == [31, 32]
    assert endpoint.paths[1] == second
    assert "apiKey" not in endpoint.asked[1][1]
    assert endpoint.turns.asked == [("aggs", 1, ""), ("aggs", 1, "")]


@pytest.mark.parametrize(
    "next_url",
    [
        "https://evil.test/v2/more?cursor=abc",
        "http://provider.test/v2/more",
        "https://provider.test.evil.test/v2",
        "https://user@provider.test/v2",
        "//evil.test/v2",
        "https://api.polygon.io/v2/more",
        "http://[::1",
        7,
    ],
)
async def test_key_goes_to_no_other_host(provider, next_url):
    """A next page elsewhere is not followed, and half a series is not sold as a whole one."""
    polygon, endpoint = provider(json.dumps(json.loads(EMPTY) | {"next_url": next_url}))

    with pytest.raises(UnavailableError, match="next page"):
        await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert len(endpoint.asked) == 1


async def test_pages_without_end(provider):
    """A next page that leads back to itself ends."""
    polygon, endpoint = provider(json.dumps(json.loads(EMPTY) | {"next_url": "https://provider.test/v2/again"}))

    with pytest.raises(UnavailableError, match="more than 10 pages"):
        await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)

    assert len(endpoint.asked) == 10


async def test_whole_day_in_one_call(provider):
    """One call brings the day of all symbols, as traded; rows that cannot be true are left out."""
    polygon, endpoint = provider(payload("grouped.json"))

    bars = await polygon.grouped(date(2024, 7, 5))

    assert endpoint.asked == [("/v2/aggs/grouped/locale/us/market/stocks/2024-07-05", {"adjusted": "false"})]
    assert endpoint.turns.asked == [("grouped", 1, "")]
    assert {symbol: bar.close for symbol, bar in bars.items()} == {"ACME": 51.5, "OTHER": 10.02}
    assert (bars["ACME"].opened_at, bars["ACME"].closed_at) == (
        instant("2024-07-05T13:30:00"),
        instant("2024-07-05T20:00:00"),
    )


async def test_whole_day_that_is_not_over(provider):
    """A day without trading is our mistake, a session still open has no bars; neither costs a call."""
    polygon, endpoint = provider(payload("grouped.json"))

    with pytest.raises(InvalidPayloadError, match="no session"):
        await polygon.grouped(date(2024, 7, 4))
    assert await polygon.grouped(date(2024, 7, 8)) == {}
    assert endpoint.asked == []

    polygon.adapter._clock.at = instant("2024-07-05T21:00:00")
    await polygon.grouped(date(2024, 7, 5))
    await polygon.grouped(date(2022, 7, 5))
    assert endpoint.turns.asked == [("grouped", 1, TODAY), ("grouped", 1, OLD)]


async def test_quote_is_the_close_of_the_last_session(provider):
    """No plan sells a younger price here: the quote is as old as the close it tells."""
    polygon, endpoint = provider(payload("prev.json"))

    quote = await polygon.quote("ACME")

    assert endpoint.paths == ["/v2/aggs/ticker/ACME/prev"]
    assert (quote.price, quote.previous_close, quote.as_of) == (51.5, None, instant("2024-07-05T20:00:00"))


async def test_quote_of_an_unknown_symbol(provider):
    """An answer without results has no price of such a symbol."""
    polygon, _ = provider(payload("aggs_empty.json"))

    with pytest.raises(UnknownSymbolError, match="NOPE"):
        await polygon.quote("NOPE")


@pytest.mark.parametrize(
    "changed", [{"c": 0}, {"c": None}, {"t": None}, {"t": -1}, {"t": 1e300}, {"t": ms("2024-07-04T20:00:00")}]
)
async def test_quote_that_cannot_be_true(provider, changed):
    """A quote without a price or a trading day is no answer we can judge."""
    body = json.loads(payload("prev.json"))
    body["results"][0] |= changed
    polygon, _ = provider(json.dumps(body))

    with pytest.raises(UnavailableError, match="cannot be true"):
        await polygon.quote("ACME")


async def test_stale_quote(provider):
    """Twelve hours after Monday's close, Friday's is no quote."""
    polygon, _ = provider(payload("prev.json"))
    polygon.adapter._clock.at = instant("2024-07-09T08:00:00")

    with pytest.raises(UnavailableError, match="3 days 12 hours old"):
        await polygon.quote("ACME")


async def test_news(provider):
    """News come oldest first, from the time asked for; a word of praise or blame for the symbol is its sentiment."""
    polygon, endpoint = provider(payload("news.json"))

    news = await polygon.news("ACME", since=instant("2024-07-01T00:00:00"), until=instant("2024-07-06T00:00:00"))

    [(path, params)] = endpoint.asked
    assert (path, params["ticker"], params["published_utc.gte"]) == (
        "/v2/reference/news",
        "ACME",
        "2024-07-01T00:00:00Z",
    )
    assert [(n.news_id, n.published_at, n.sentiment, n.source) for n in news] == [
        ("a2", instant("2024-07-02T09:00:00"), None, "Wire"),
        ("a3", instant("2024-07-05T17:38:34"), -1.0, "Wire"),
    ]


async def test_splits_and_dividends(provider):
    """A split is told as shares before and after; one action a day, oldest first."""
    polygon, endpoint = provider(
        {"/v3/reference/splits": payload("splits.json"), "/v3/reference/dividends": payload("dividends.json")}
    )

    actions = await polygon.actions("ACME")

    assert [(a.day.isoformat(), a.split, a.dividend) for a in actions] == [
        ("1999-05-27", 1.5, 0.0),
        ("2024-04-02", 1.0, 0.24),
        ("2024-07-02", 2.0, 0.25),
    ]
    assert endpoint.turns.asked == [("reference/splits", 1, ""), ("reference/dividends", 1, "")]


async def test_split_that_cannot_be_read(provider):
    """Splits that cannot be read are no reason to believe that there are none."""
    polygon, _ = provider({AGGS: payload("aggs_day.json"), "/v3": '{"status": "OK", "results": [{"split_to": 2}]}'})

    with pytest.raises(UnavailableError, match="splits of ACME"):
        await polygon.bars("ACME", Interval.DAY, since=None, now=NOW)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError(KEY),
        httpx.LocalProtocolError(f"Illegal header value b'Bearer {KEY}'"),
        httpx.Response(401, text=json.dumps({"status": "ERROR", "error": f"Unknown API Key {KEY}"})),
        httpx.Response(422, text=json.dumps({"status": "ERROR", "error": f"what is {KEY.lower()}"})),
        httpx.Response(200, text=json.dumps({"status": KEY, "message": KEY})),
        httpx.Response(200, text=json.dumps({"status": "OK", "results": [{"c": KEY, "t": KEY}]})),
        httpx.Response(500, text=KEY),
    ],
    ids=str,
)
async def test_key_is_never_told(provider, caplog, answer):
    """The key is in no URL, error, repr or log, whatever the level."""
    caplog.set_level(logging.DEBUG)
    polygon, _ = provider(answer)

    with pytest.raises(TroopError) as caught:
        await polygon.quote("ACME")

    assert KEY.lower() not in everything_told(caught.value).lower()
    assert KEY not in caplog.text
    assert KEY not in repr(polygon.adapter) + repr(vars(polygon.adapter))


recorded = pytest.mark.skipif(not RECORDED.exists(), reason="the recorded answers are not beside this checkout")


@recorded
async def test_recorded_answers(provider):
    """What the service's own examples show is understood."""
    bars, _ = provider(
        {
            "/v2": (RECORDED / "v2_aggs_ticker_AAPL_range_1_day_2005-04-01_2005-04-04.json").read_text("utf-8"),
            "/v3": EMPTY,
        }
    )
    prev, _ = provider((RECORDED / "v2_aggs_ticker_AAPL_prev.json").read_text("utf-8"))
    prev.adapter._clock.at = datetime(2022, 4, 27, tzinfo=UTC)

    fetched = await bars.bars("AAPL", Interval.DAY, since=None, now=NOW)

    assert [bar.opened_at.date().isoformat() for bar in fetched.bars] == ["2005-04-01", "2005-04-04"]
    assert fetched.refused_rows == ()
    assert (await prev.quote("AAPL")).price == 156.8


async def test_free_history_does_not_speak_of_what_is_older(provider):
    """Of what the plan leaves out nobody was asked, and of what the next fetch goes on with neither."""
    oldest = NOW - timedelta(days=730)

    def answer(request):
        until = int(request.url.path.rsplit("/", 1)[1])
        is_old = until < oldest.timestamp() * 1000
        return httpx.Response(403, text=payload("refusals/403_timeframe.json")) if is_old else EMPTY

    polygon, _ = provider(answer)

    fetched = await polygon.bars("ACME", Interval.MINUTE, since=instant("2020-01-02T21:00:00"), now=NOW)

    assert (fetched.covers_since, fetched.covers_through) == (oldest, oldest + timedelta(days=360))
