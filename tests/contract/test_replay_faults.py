"""Scripted faults of the replayed providers, and what our adapters make of every refusal the replay can give."""

import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from infra.local.faults import DETAILS, Switchboard
from infra.local.replay.refusals import REFUSALS
from shared.errors import (
    ConfigurationError,
    DailyQuotaError,
    InvalidPayloadError,
    NotEntitledError,
    RateLimitedError,
    RefusedError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.http_client import HttpClient
from shared.market.adapters.alpha_vantage import AlphaVantage
from shared.market.adapters.finnhub import Finnhub
from shared.market.adapters.polygon import Polygon
from shared.market.adapters.twelve_data import TwelveData
from tests.contract.replaying import DAY, FINNHUB, POLYGON, TWELVE_DATA, Replay, replaying, utc
from tests.unit.market.turns import Turns

PROVIDERS = tuple(REFUSALS)
NOW = "2012-03-01T21:00"
KEY = "local-unlimited"


@asynccontextmanager
async def faulty(**faults: object) -> AsyncIterator[tuple[Replay, Switchboard]]:
    board = Switchboard()
    board.set(faults)
    async with replaying(NOW, faults=board.asked) as replay:
        yield replay, board


async def asked(replay: Replay, provider: str, *, symbol: str = "AAPL", key: str = KEY) -> httpx.Response:
    match provider:
        case "alpha_vantage":
            return await replay.av("GLOBAL_QUOTE", symbol=symbol, key=key)
        case "finnhub":
            return await replay.finnhub("/quote", symbol=symbol, key=key)
        case "twelve_data":
            return await replay.twelve("/quote", symbol=symbol, key=key)
        case _:
            return await replay.polygon(f"/v2/aggs/ticker/{symbol}/prev", key=key)


def price(provider: str, answer: httpx.Response) -> float:
    body = answer.json()
    match provider:
        case "alpha_vantage":
            return float(body["Global Quote"]["05. price"])
        case "finnhub":
            return float(body["c"])
        case "twelve_data":
            return float(body["close"])
        case _:
            return float(body["results"][0]["c"])


# --- the switchboard's script


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"finnhub": {"script": [{"kind": "gremlin"}]}}, "finnhub.script.0.kind"),
        ({"finnhub": {"script": [{"kind": "stale", "ms": 5}]}}, "'ms' says nothing of 'stale'"),
        ({"finnhub": {"script": [{"kind": "stale", "sessions": 0}]}}, "finnhub.script.0.sessions"),
        ({"finnhub": {"script": [{"kind": "refusal"}]}}, "'refusal' is missing"),
        ({"finnhub": {"script": [{"kind": "refusal", "refusal": "per_day"}]}}, "finnhub has no refusal 'per_day'"),
        ({"finnhub": {"script": [{"kind": "reset", "times": 0}]}}, "finnhub.script.0.times"),
        ({"discord": {"script": []}}, "unknown field 'script' of discord"),
    ],
)
def test_a_wrong_step_is_named(wanted, named):
    """A typing mistake in a script must not look like a healthy provider."""
    board = Switchboard()

    with pytest.raises(InvalidPayloadError, match=re.escape(named)):
        board.set(wanted)

    assert board.shown() == {}


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_step_strikes_as_often_as_it_says(provider):
    """Twice a page in HTML, then the truth; the script tells what struck and what is left."""
    script = [{"kind": "html", "times": 2, "status": 503}, {"kind": "stale", "where": "NOWHERE"}]
    async with faulty(**{provider: {"script": script}}) as (replay, board):
        answers = [await asked(replay, provider) for _ in range(3)]
        stats = replay.market.stats()[provider]

    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert {answer.headers["Content-Type"] for answer in answers[:2]} == {"text/html; charset=utf-8"}
    assert price(provider, answers[2]) == 544.47
    assert stats == {"calls": 3, "answers": 1, "faulted": 2, "refusals": {}}
    assert board.script() == [
        {"target": provider, **script[0], "struck": 2, "left": 0},
        {"target": provider, **script[1], "struck": 0, "left": None},
    ]
    assert board.hits == {f"{provider}.html": 2}


async def test_the_same_seed_meets_the_same_faults():
    """Half of the calls are struck, the same ones in every run; another seed strikes others."""

    async def struck(seed: int) -> list[int]:
        async with faulty(seed=seed, finnhub={"script": [{"kind": "html", "rate": 0.5}]}) as (replay, _):
            return [(await asked(replay, "finnhub")).status_code for _ in range(30)]

    first = await struck(1)
    assert first == await struck(1) != await struck(2)
    assert 5 < first.count(502) < 25


async def test_a_step_strikes_only_where_it_says():
    """``where`` is a part of the path or the query."""
    script = [{"kind": "refusal", "refusal": "premium_endpoint", "where": "symbol=IBM"}]
    async with faulty(alpha_vantage={"script": script}) as (replay, _):
        ibm = await asked(replay, "alpha_vantage", symbol="IBM")
        aapl = await asked(replay, "alpha_vantage")

    assert "premium endpoint" in ibm.json()["Information"]
    assert price("alpha_vantage", aapl) == 544.47


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_truncated_answer_is_the_first_half_of_the_real_one(provider):
    """HTTP 200, complete for HTTP, and no JSON."""
    async with faulty(**{provider: {"script": [{"kind": "truncated", "times": 1}]}}) as (replay, _):
        half, whole = await asked(replay, provider), await asked(replay, provider)

    assert half.status_code == 200
    assert half.content == whole.content[: len(whole.content) // 2]
    with pytest.raises(json.JSONDecodeError):
        half.json()


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_stale_answer_is_the_market_of_some_sessions_ago(provider):
    """HTTP 200 and a price that was true: two sessions before 2012-03-01 AAPL closed at 535.41."""
    async with faulty(**{provider: {"script": [{"kind": "stale", "sessions": 2, "times": 1}]}}) as (replay, _):
        stale, fresh = await asked(replay, provider), await asked(replay, provider)

    assert (stale.status_code, price(provider, stale), price(provider, fresh)) == (200, 535.41, 544.47)


@pytest.mark.parametrize(
    ("provider", "left"),
    [
        ("alpha_vantage", None),
        ("finnhub", "x-ratelimit-remaining"),
        ("twelve_data", "api-credits-left"),
        ("polygon", None),
    ],
)
async def test_a_throttle_comes_with_headers_or_without(provider, left):
    """429 in the provider's own words; its headers say that nothing is left, unless they are left out."""
    script = [
        {"kind": "throttled", "times": 1, "retry_after": 7.5},
        {"kind": "throttled", "times": 1, "headers": False},
    ]
    async with faulty(**{provider: {"script": script}}) as (replay, _):
        told, bare, free = [await asked(replay, provider, key="local-free") for _ in range(3)]

    assert [answer.status_code for answer in (told, bare, free)] == [429, 429, 200]
    assert (told.headers["Retry-After"], "Retry-After" in bare.headers) == ("7.5", False)
    if left is not None:
        assert (told.headers[left], left in bare.headers) == ("0", False)
        assert int(free.headers[left]) > 0


async def test_a_reset_cuts_the_connection():
    """The client sees no answer at all, and the next call is well."""
    async with faulty(polygon={"script": [{"kind": "reset", "times": 1}]}) as (replay, _):
        with pytest.raises(httpx.RemoteProtocolError):
            await asked(replay, "polygon")
        assert price("polygon", await asked(replay, "polygon")) == 544.47


async def test_latency_delays_and_lets_the_next_step_strike():
    """Slow and wrong at once: waiting ends no script."""
    script = [{"kind": "latency", "ms": 60, "times": 1}, {"kind": "prose", "times": 1}]
    async with faulty(twelve_data={"script": script}) as (replay, board):
        begun = time.monotonic()
        answer = await asked(replay, "twelve_data")
        waited = time.monotonic() - begun

    assert waited >= 0.06
    assert answer.json()["status"] == "error"
    assert board.hits == {"twelve_data.latency": 1, "twelve_data.prose": 1}


# --- every refusal, as our adapters judge it

VERDICTS: dict[str, dict[str, type[TroopError]]] = {
    "alpha_vantage": {
        "per_second": RateLimitedError,
        "per_second_older": RateLimitedError,
        "per_old_minute": RateLimitedError,
        "per_old_day": RateLimitedError,
        "per_day": DailyQuotaError,
        "per_minute": RateLimitedError,
        "premium_endpoint": NotEntitledError,
        "premium_parameter": NotEntitledError,
        "invalid_key": ConfigurationError,
        "demo_key": ConfigurationError,
        "invalid_call": UnknownSymbolError,
        "unknown_function": RefusedError,
        "no_news": RefusedError,  # to a question for news it means that there is none
        "not_acceptable": UnavailableError,
        "empty_object": UnavailableError,  # to a question for splits it means that there is none
        "empty_quote": UnknownSymbolError,
        "unknown_sentence": UnavailableError,
    },
    "finnhub": {
        "per_second": RateLimitedError,
        "per_minute": RateLimitedError,
        "sign_up": ConfigurationError,
        "limit_as_text": RateLimitedError,
        "missing_key": ConfigurationError,
        "invalid_key": ConfigurationError,
        "premium_endpoint": NotEntitledError,
        "premium_endpoint_older": NotEntitledError,
        "invalid_call": RefusedError,
        "no_data": UnavailableError,  # to a question for candles it means that there is none
        "zero_quote": UnknownSymbolError,
        "unknown_sentence": UnavailableError,
    },
    "twelve_data": {
        "per_minute": RateLimitedError,
        "per_day": DailyQuotaError,
        "per_minute_with_status": RateLimitedError,
        "invalid_key": ConfigurationError,
        "premium_endpoint": NotEntitledError,
        "unknown_symbol": UnknownSymbolError,
        "missing_symbol": UnknownSymbolError,
        "invalid_call": RefusedError,
        "no_data": RefusedError,  # to a question for bars it means that there is none
        "unknown_sentence": UnavailableError,
    },
    "polygon": {
        "per_second": RateLimitedError,
        "per_minute": RateLimitedError,
        "missing_key": ConfigurationError,
        "invalid_key": ConfigurationError,
        "not_authorized": RefusedError,  # these dates are not sold, the endpoint is
        "not_entitled": NotEntitledError,
        "invalid_call": RefusedError,
        "no_results": UnknownSymbolError,
        "unknown_sentence": UnavailableError,
    },
}


@asynccontextmanager
async def adapter(provider: str, replay: Replay, *, key: str = KEY) -> AsyncIterator[object]:
    http = HttpClient(provider)
    clocks = {"market_clock": replay.market_clock}
    common = {"key": key, "plan": "free", "http": http, **clocks}
    made = {
        "alpha_vantage": lambda: AlphaVantage(base_url=f"{replay.url}/alpha_vantage", **common),
        "finnhub": lambda: Finnhub(base_url=replay.url + FINNHUB, clock=replay.wall, **common),
        "twelve_data": lambda: TwelveData(base_url=replay.url + TWELVE_DATA, clock=replay.wall, **common),
        "polygon": lambda: Polygon(base_url=replay.url + POLYGON, **common),
    }[provider]()
    try:
        yield made
    finally:
        await made.aclose()


async def trouble(call) -> TroopError | None:
    try:
        await call
    except TroopError as e:
        return e
    return None


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_every_documented_refusal_is_judged_as_its_table_says(provider):
    """Over real HTTP: the replay gives each of its refusals, the adapter raises our error, and shows no key."""
    found: dict[str, type[BaseException]] = {}
    async with faulty() as (replay, board), adapter(provider, replay) as asking:
        for reason in REFUSALS[provider]:
            board.set({provider: {"script": [{"kind": "refusal", "refusal": reason}]}})
            error = await trouble(asking.quote("AAPL", turn=Turns()))
            found[reason] = type(error)
            assert KEY not in str(error)
            if isinstance(error, RateLimitedError):
                assert error.retry_after.total_seconds() > 0

    assert found == VERDICTS[provider]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"kind": "html"}, UnavailableError),
        ({"kind": "truncated"}, UnavailableError),
        ({"kind": "reset"}, UnavailableError),
        ({"kind": "prose"}, UnavailableError),
        ({"kind": "stale", "sessions": 5}, UnavailableError),
        ({"kind": "throttled"}, RateLimitedError),
        ({"kind": "throttled", "headers": False}, RateLimitedError),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value.__name__,
)
async def test_every_kind_of_fault_is_trouble_that_passes(provider, step, expected):
    """No fault of the wire is taken for a price, for "no data" or for a bad key, and the next call is well."""
    script = [step | {"times": 1}]
    async with (
        faulty(**{provider: {"script": script}}) as (replay, _),
        adapter(provider, replay, key="local-free") as asking,
    ):
        error = await trouble(asking.quote("AAPL", turn=Turns()))
        replay.wall.at = replay.wall.at.replace(minute=5)
        if provider == "polygon":  # a free key sees yesterday's close, which is fresh before today's
            replay.market_clock.at = utc("2012-03-01T20:00")
        quote = await asking.quote("AAPL", turn=Turns())

    assert type(error) is expected
    assert quote.price == (542.44 if provider == "polygon" else 544.47)


def test_every_kind_of_fault_is_tried():
    """A new kind needs a line in the test above; latency and a named refusal have tests of their own."""
    tried = {"html", "truncated", "reset", "prose", "stale", "throttled"}
    assert tried | {"latency", "refusal"} == set(DETAILS)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_adapters_read_the_same_bars_from_every_provider(provider):
    """A fortnight around a split: the same closed sessions, as traded or in new shares, as the adapter says."""
    async with replaying("2005-03-04T22:00") as replay:
        replay.market_clock.at = utc("2005-03-07T12:00")
        async with adapter(provider, replay) as asking:
            since, now = utc("2005-02-18T21:00"), replay.market_clock.now()
            fetched = await asking.bars("AAPL", DAY, since=since, now=now, turn=Turns())

    closes = {str(bar.opened_at.date()): bar.close for bar in fetched.bars}
    new = [day for day in closes if day > "2005-02-18"]
    assert new == [f"2005-02-{n}" for n in (22, 23, 24, 25, 28)] + [f"2005-03-0{n}" for n in (1, 2, 3, 4)]
    assert closes["2005-02-25"] == (88.99 if fetched.adjustment == "raw" else 44.495)
    assert closes["2005-02-28"] == 44.86
    splits = {str(bar.opened_at.date()): bar.split for bar in fetched.bars if bar.split != 1}
    assert splits == ({"2005-02-28": 2.0} if fetched.adjustment == "raw" else {})


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_adapters_read_what_the_replay_makes_up(provider):
    """News, reports and splits, where the provider sells them, arrive as our own models."""
    async with replaying(NOW) as replay, adapter(provider, replay) as asking:
        if hasattr(asking, "news"):
            news = await asking.news("AAPL", since=utc("2012-02-20"), until=utc("2012-03-01"), turn=Turns())
            assert len(news) > 2
            assert {item.source for item in news} == {"TROOP replay"}
            assert [item.published_at for item in news] == sorted(item.published_at for item in news)
        if hasattr(asking, "earnings"):
            first, last = utc("2012-03-02").date(), utc("2012-05-31").date()
            reports = await asking.earnings(first=first, last=last, symbol="IBM", turn=Turns())
            assert [report.symbol for report in reports] == ["IBM"]
            assert reports[0].eps_actual is None
            assert reports[0].eps_estimate
        actions = await asking.actions("AAPL", turn=Turns())

    assert [(str(action.day), action.split, action.dividend) for action in actions] == [
        ("2000-06-21", 2.0, 0.0),
        ("2005-02-28", 2.0, 0.0),
    ]
