"""One contract for every market-data provider: what the fetcher may rely on, whoever answers."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    DailyQuotaError,
    NotEntitledError,
    QuotaSpentError,
    RateLimitedError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.http_client import Answer
from shared.market.adapters.alpha_vantage import AlphaVantage
from shared.market.adapters.finnhub import Finnhub
from shared.market.adapters.polygon import Polygon
from shared.market.adapters.twelve_data import TwelveData
from shared.market.models import Adjustment, Interval
from shared.market.registry import provider as facts_of
from tests.unit.market.turns import Turns, everything_told

PAYLOADS = Path(__file__).resolve().parents[1] / "payloads"
KEY = "CANARY7KEY9QX"
NOW = datetime(2024, 7, 8, 12, tzinfo=UTC)
WALL = datetime(2026, 11, 21, 9, tzinfo=UTC)


def instant(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


class Wire:
    """The neighbour: answers by what the address and the parameters say, and remembers that it was asked."""

    def __init__(self, answers: Callable[[str, Mapping[str, Any]], str], *, status: int = 200) -> None:
        self.answers = answers
        self.status = status
        self.headers: dict[str, str] = {}
        self.turns = Turns()
        self.asked = 0

    async def get(self, url, *, params, headers=None, url_is_secret=False):
        assert self.turns.inside == 1, "every call is made inside a turn"
        assert url_is_secret or KEY not in f"{url} {params}", "a key in a URL is hidden from traces"
        self.asked += 1
        return Answer(
            status=self.status, headers=self.headers, body=self.answers(url, params).encode("utf-8", "replace")
        )

    async def aclose(self) -> None:
        pass


@dataclass(frozen=True)
class Kind:
    """One provider: how it is made, what it answers, and how it says each no."""

    made_of: Callable[..., Any]
    answers: Mapping[str, str]
    """By a part of the address or a parameter's value, the first that fits: the payload on file."""
    noes: Mapping[type[TroopError], tuple[int, str]]
    clocks: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def payload(self, url: str, params: Mapping[str, Any]) -> str:
        asked = f"{url}?" + "&".join(f"{name}={value}" for name, value in params.items())
        name = next(name for part, name in self.answers.items() if part in asked)
        return (PAYLOADS / self.made_of.name / name).read_text(encoding="utf-8")

    def make(self, wire: Wire) -> Any:
        clocks = {"clock": StoppedClock(WALL), "market_clock": StoppedClock(NOW)}
        return self.made_of(
            base_url="https://provider.test",
            key=KEY,
            plan="free",
            http=wire,
            **{name: clocks[name] for name in self.clocks},
        )


KINDS = {
    "alpha_vantage": Kind(
        made_of=AlphaVantage,
        answers={
            "DAILY_ADJUSTED": "daily_adjusted.json",
            "60min": "intraday_60min.json",
            "GLOBAL_QUOTE": "global_quote.json",
            "NEWS_SENTIMENT": "news.json",
            "EARNINGS_CALENDAR": "earnings_calendar.csv",
            "SPLITS": "splits.json",
            "DIVIDENDS": "dividends.json",
        },
        noes={
            RateLimitedError: (200, "refusals/burst.json"),
            DailyQuotaError: (200, "refusals/quota_with_key.json"),
            NotEntitledError: (200, "refusals/premium_endpoint.json"),
            ConfigurationError: (200, "refusals/bad_key.json"),
            UnknownSymbolError: (200, "refusals/invalid_call.json"),
            UnavailableError: (200, "refusals/unknown_prose.json"),
        },
        clocks=("market_clock",),
    ),
    "finnhub": Kind(
        made_of=Finnhub,
        answers={
            "resolution=D": "candle_daily_midnight.json",
            "resolution=60": "candle_hours.json",
            "/quote": "quote.json",
            "/company-news": "company_news.json",
            "/calendar/earnings": "calendar_earnings.json",
            "/stock/split": "split.json",
        },
        noes={
            RateLimitedError: (429, "refusals/limit.json"),
            NotEntitledError: (403, "refusals/no_access.json"),
            ConfigurationError: (401, "refusals/invalid_key.json"),
            UnknownSymbolError: (200, "refusals/symbol_not_supported.json"),
            UnavailableError: (200, "refusals/unknown_prose.json"),
        },
        clocks=("clock", "market_clock"),
    ),
    "twelve_data": Kind(
        made_of=TwelveData,
        answers={
            "interval=1day": "time_series_1day.json",
            "interval=1h": "time_series_1h.json",
            "/quote": "quote.json",
            "/earnings_calendar": "earnings_calendar.json",
            "/splits": "splits.json",
            "/dividends": "dividends.json",
        },
        noes={
            RateLimitedError: (200, "refusals/minute_credits.json"),
            DailyQuotaError: (200, "refusals/day_credits.json"),
            NotEntitledError: (200, "refusals/endpoint_plan.json"),
            ConfigurationError: (200, "refusals/bad_key.json"),
            UnknownSymbolError: (200, "refusals/unknown_symbol.json"),
            UnavailableError: (200, "refusals/unknown_prose.json"),
        },
        clocks=("clock", "market_clock"),
    ),
    "polygon": Kind(
        made_of=Polygon,
        answers={
            "/1/day/": "aggs_day.json",
            "/30/minute/": "aggs_half_hours.json",
            "/prev": "prev.json",
            "/grouped/": "grouped.json",
            "/reference/news": "news.json",
            "/reference/splits": "splits.json",
            "/reference/dividends": "dividends.json",
        },
        noes={
            RateLimitedError: (429, "refusals/429_limit.json"),
            NotEntitledError: (403, "refusals/403_not_entitled.json"),
            ConfigurationError: (401, "refusals/401_unknown_key.json"),
            UnknownSymbolError: (404, "refusals/404_unknown_ticker.json"),
            UnavailableError: (200, "refusals/200_unknown_prose.json"),
        },
        clocks=("market_clock",),
    ),
}
SELLS = {
    "alpha_vantage": {"news", "earnings", "actions"},
    "finnhub": {"news", "earnings", "actions"},
    "twelve_data": {"earnings", "actions"},
    "polygon": {"news", "actions", "grouped"},
}
ALL = sorted(KINDS)
WAYS = [(name, way) for name in ALL for way in ("day", "hour", "quote", *sorted(SELLS[name]))]


async def ask(adapter: Any, way: str, turns: Turns) -> Any:
    since = instant("2024-06-30T00:00:00")
    match way:
        case "day" | "hour":
            interval = Interval.DAY if way == "day" else Interval.HOUR
            return await adapter.bars("ACME", interval, since=since, now=NOW, turn=turns)
        case "quote":
            return await adapter.quote("ACME", turn=turns)
        case "news":
            return await adapter.news("ACME", since=since, until=NOW, turn=turns)
        case "earnings":
            return await adapter.earnings(first=date(2024, 7, 1), last=date(2024, 7, 31), turn=turns, symbol="ACME")
        case "actions":
            return await adapter.actions("ACME", turn=turns)
        case _:
            return await adapter.grouped(date(2024, 7, 5), turn=turns)


@pytest.mark.parametrize("name", ALL)
async def test_same_days_whatever_the_shape(name):
    """The same sessions come out of every provider's shape, with the adjustment it said beforehand."""
    wire = Wire(KINDS[name].payload)

    fetched = await ask(KINDS[name].make(wire), "day", wire.turns)

    assert [(bar.opened_at, bar.closed_at) for bar in fetched.bars] == [
        (instant("2024-07-01T13:30:00"), instant("2024-07-01T20:00:00")),
        (instant("2024-07-02T13:30:00"), instant("2024-07-02T20:00:00")),
        (instant("2024-07-03T13:30:00"), instant("2024-07-03T17:00:00")),
        (instant("2024-07-05T13:30:00"), instant("2024-07-05T20:00:00")),
    ]
    is_raw = fetched.adjustment is Adjustment.RAW
    assert [bar.close for bar in fetched.bars] == [100.0 if is_raw else 50.0, 50.5, 51.0, 51.5]
    assert [bar.split for bar in fetched.bars] == [1.0, 2.0 if is_raw else 1.0, 1.0, 1.0]
    assert (fetched.symbol, fetched.interval, fetched.provider) == ("ACME", Interval.DAY, name)
    assert fetched.refused_rows == ()


@pytest.mark.parametrize("name", ALL)
async def test_same_hours_whatever_the_shape(name):
    """Hours begin with the session and end with it, also where a provider's begin with the clock."""
    wire = Wire(KINDS[name].payload)

    fetched = await ask(KINDS[name].make(wire), "hour", wire.turns)

    assert [bar.opened_at for bar in fetched.bars] == [
        instant(f"2024-07-03T{at}:00") for at in ("13:30", "14:30", "15:30", "16:30")
    ]
    assert fetched.bars[-1].closed_at == instant("2024-07-03T17:00:00")
    assert fetched.refused_rows == ()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seconds", [-1, 0])
async def test_bar_is_told_from_its_close_on(name, seconds):
    """One second before its close a bar is not yet closed, whatever the provider already shows of it."""
    wire = Wire(KINDS[name].payload)
    now = instant("2024-07-03T17:00:00") + timedelta(seconds=seconds)

    fetched = (
        await KINDS[name]
        .make(wire)
        .bars("ACME", Interval.DAY, since=instant("2024-06-28T20:00:00"), now=now, turn=wire.turns)
    )

    assert fetched.bars[-1].closed_at == instant("2024-07-03T17:00:00" if seconds == 0 else "2024-07-02T20:00:00")


@pytest.mark.parametrize("name", ALL)
async def test_same_quote_whatever_the_shape(name):
    """Friday's last price, and an instant that is its own."""
    wire = Wire(KINDS[name].payload)

    quote = await ask(KINDS[name].make(wire), "quote", wire.turns)

    assert (quote.symbol, quote.price, quote.provider) == ("ACME", 51.5, name)
    assert instant("2024-07-05T19:59:00") <= quote.as_of <= instant("2024-07-05T20:00:00")


@pytest.mark.parametrize(("name", "way"), [w for w in WAYS if w[1] in ("news", "earnings", "actions")])
async def test_same_facts_whatever_the_shape(name, way):
    """News, reports and actions mean the same and stand in the same order, whoever tells them."""
    wire = Wire(KINDS[name].payload)

    found = await ask(KINDS[name].make(wire), way, wire.turns)

    assert {one.provider for one in found} == {name}
    match way:
        case "news":
            assert [n.url for n in found] == ["https://news.test/early", "https://news.test/plant"]
            assert [n.published_at for n in found] == [instant("2024-07-02T09:00:00"), instant("2024-07-05T17:38:34")]
            assert all("ACME" in n.symbols for n in found)
            assert all(n.sentiment is None or -1 <= n.sentiment <= 1 for n in found)
        case "earnings":
            assert [(r.symbol, r.day, r.time, r.eps_estimate) for r in found] == [
                ("ACME", date(2024, 7, 25), "amc", 1.52)
            ]
        case _:
            assert [(a.day, a.split) for a in found if a.split != 1.0][-1] == (date(2024, 7, 2), 2.0)
            assert [a.day for a in found] == sorted(a.day for a in found)


@pytest.mark.parametrize(("name", "way"), WAYS)
async def test_turn_is_asked_by_the_registrys_names(name, way):
    """Weights and windows are looked up by these names: one nobody knows would weigh nothing it should."""
    wire = Wire(KINDS[name].payload)

    await ask(KINDS[name].make(wire), way, wire.turns)

    assert wire.turns.entered
    assert {entered.endpoint for entered in wire.turns.entered} <= set(facts_of(name).endpoints)
    assert len(wire.turns.entered) == wire.asked


@pytest.mark.parametrize("name", ALL)
async def test_calls_are_told_beforehand(name):
    """What a fetch will cost is known before it is made."""
    wire = Wire(KINDS[name].payload)
    adapter = KINDS[name].make(wire)
    since = instant("2024-07-02T20:00:00")

    await adapter.bars("ACME", Interval.HOUR, since=since, now=NOW, turn=wire.turns)

    assert adapter.calls(Interval.HOUR, since=since, now=NOW) == wire.asked


@pytest.mark.parametrize(("name", "error"), [(name, error) for name in ALL for error in KINDS[name].noes])
@pytest.mark.parametrize("way", ["day", "quote", "actions"])
async def test_each_no_is_the_same_error_inside_the_turn(name, error, way):
    """A refusal is one of our errors for every call, and the turn sees it: it learns from nothing else."""
    status, path = KINDS[name].noes[error]
    body = (PAYLOADS / name / path).read_text(encoding="utf-8").replace("@KEY@", KEY)
    wire = Wire(lambda url, params: body, status=status)

    with pytest.raises(TroopError) as caught:
        await ask(KINDS[name].make(wire), way, wire.turns)

    assert type(caught.value) is error
    assert wire.turns.entered[-1].error is caught.value
    if issubclass(error, RateLimitedError):
        assert caught.value.retry_after > timedelta(0)


@pytest.mark.parametrize(("name", "way"), WAYS)
async def test_refused_key_makes_no_call(name, way):
    """What this key is known to be refused costs nothing, and the refusal is told as such."""
    wire = Wire(KINDS[name].payload)
    wire.turns.refused |= {(endpoint, "") for endpoint in facts_of(name).endpoints}

    with pytest.raises(NotEntitledError):
        await ask(KINDS[name].make(wire), way, wire.turns)

    assert wire.asked == 0


@pytest.mark.parametrize(("name", "way"), WAYS)
async def test_turn_that_is_not_given_makes_no_call(name, way):
    """When the quota is spent nothing leaves, and the error is the turn's own."""
    wire = Wire(KINDS[name].payload)

    class Spent(Turns):
        @asynccontextmanager
        async def __call__(self, endpoint, *, units=1, parameter=""):
            raise QuotaSpentError("later", retry_after=timedelta(seconds=9))
            yield

    with pytest.raises(QuotaSpentError):
        await ask(KINDS[name].make(wire), way, Spent())

    assert wire.asked == 0


@pytest.mark.parametrize(("name", "way"), WAYS)
@pytest.mark.parametrize("body", ["", "<html>502 Bad Gateway</html>", '{"status": "OK", "res', "null", "7", '"later"'])
async def test_no_answer_is_no_data(name, way, body):
    """A page, half an answer or a bare value is trouble that passes: never an empty answer, never a bad key."""
    for status in (200, 502):
        wire = Wire(lambda url, params: body, status=status)

        with pytest.raises(UnavailableError):
            await ask(KINDS[name].make(wire), way, wire.turns)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(
        [KEY, KEY.lower(), "", "0", "-1", "nan", "1e999", "2024-07-05", "\ud800", 10**400, 1720137600, "ok"]
    ),
    st.text(max_size=8),
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(value: object, here: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *[place for at, one in inside for place in places(one, (*here, at))]]


def put(value: Any, place: tuple[Any, ...], new: object) -> object:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = put(value[place[0]], place[1:], new)
    return copy


def texts_of(value: object) -> Iterator[str]:
    if is_dataclass(value):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, Mapping):
        yield from map(str, value.keys())
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from texts_of(one)
    else:
        yield str(value)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_answer_is_data_or_one_of_our_errors(name, data):
    """Whatever JSON comes, with whatever status, there is no third outcome, and the key is told by neither."""
    way = data.draw(st.sampled_from([way for one, way in WAYS if one == name]))
    spoils = data.draw(st.lists(st.tuples(st.integers(0, 10**6), ANYTHING), min_size=1, max_size=3))
    status = data.draw(st.sampled_from([200, 200, 200, 400, 403, 429]))

    def answers(url, params):
        body = KINDS[name].payload(url, params)
        try:
            value = json.loads(body)
        except ValueError:
            return body.replace("2024-07-25", str(spoils[0][1]))
        for number, new in spoils:
            there = places(value)
            value = put(value, there[number % len(there)], new)
        return json.dumps(value)

    wire = Wire(answers, status=status)
    adapter = KINDS[name].make(wire)
    try:
        told = "\n".join(texts_of(asyncio.run(ask(adapter, way, wire.turns))))
    except TroopError as e:
        told = everything_told(e)
    assert KEY.lower() not in told.lower()
    told.encode()  # a text that cannot be encoded could not be stored


@pytest.mark.parametrize("name", [name for name in ALL if "news" in SELLS[name]])
async def test_texts_from_outside_can_be_stored_and_hold_no_key(name):
    """An article that quotes our key, or half a surrogate pair, is told without them."""
    wire = Wire(lambda url, params: KINDS[name].payload(url, params).replace("opens a plant", f"{KEY} \\ud800"))

    news = await ask(KINDS[name].make(wire), "news", wire.turns)

    assert news[-1].title.encode().startswith(b"ACME ***")


@pytest.mark.parametrize("name", ["alpha_vantage", "twelve_data"])
async def test_refused_rows_can_be_stored_and_hold_no_key(name):
    """The line that names a row shows what the provider wrote, but never our key."""
    wire = Wire(lambda url, params: KINDS[name].payload(url, params).replace("2024-07-03", f"{KEY.lower()} \\ud800"))

    fetched = await ask(KINDS[name].make(wire), "day", wire.turns)

    [line] = fetched.refused_rows
    assert line.startswith("***")
    line.encode()


@pytest.mark.parametrize("name", ALL)
async def test_adapter_shows_no_key(name):
    """Neither what it is nor what it is made of shows the key."""
    adapter = KINDS[name].make(Wire(KINDS[name].payload))

    assert KEY not in repr(adapter) + repr(vars(adapter))
    await adapter.aclose()
