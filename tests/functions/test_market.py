"""The market room over HTTP: what a reader, and an operator with the key, can ask of it."""

import base64
from typing import Any

import pytest

from tests.functions.running_app import SESSIONS, Answer, App, Reply, waves

pytestmark = [pytest.mark.asyncio(loop_scope="session")]


def is_problem(answer: Answer, status: int, *words: str) -> bool:
    """A problem+json of this status whose sentence holds these words."""
    assert (answer.status, answer.content_type) == (status, "application/problem+json"), answer.text
    for word in words:
        assert word in answer.json()["detail"], answer.text
    return True


def closed_at(items: list[dict[str, Any]]) -> list[str]:
    return [item["closed_at"] for item in items]


# --- bars


@pytest.mark.parametrize("limit", [1, 7, 64, 100, 500])
async def test_bars_come_newest_first_and_each_once_through_all_pages(filled: App, limit: int) -> None:
    """However long a page is, its cursor goes on where it ended, down to the first bar."""
    seen: list[str] = []
    query = {"limit": str(limit)}
    while len(seen) <= len(SESSIONS):
        page = (await filled.get("/api/bars/WAVE", **query)).json()
        assert 0 < len(page["items"]) <= limit
        seen += closed_at(page["items"])
        if page["next"] is None or (limit == 1 and len(seen) == 70):
            break
        query["cursor"] = page["next"]
    expected = [s.closes_at.isoformat().replace("+00:00", "Z") for s in reversed(SESSIONS)]
    assert seen == expected[: len(seen)]
    assert len(seen) == (70 if limit == 1 else len(SESSIONS)), "70 bars reach over a stored page's edge"


async def test_a_last_page_that_is_exactly_full_has_no_next(filled: App) -> None:
    """A reader is never sent to an empty page."""
    await filled.follow("EXACT", waves(10))
    page = (await filled.get("/api/bars/EXACT", limit="10")).json()
    assert (len(page["items"]), page["next"]) == (10, None)


async def test_bars_say_how_good_they_are(filled: App) -> None:
    """As of which close, from whom, adjusted or not, and whether a newer one should be there."""
    page = (await filled.get("/api/bars/WAVE", limit="1")).json()
    last = SESSIONS[-1].closes_at.isoformat().replace("+00:00", "Z")
    assert page["as_of"] == last
    assert (page["is_stale"], page["provider"], page["adjustment"]) == (False, "alpha_vantage", "raw")
    assert page["items"][0]["open"] == pytest.approx(waves()[-1], abs=1e-4)
    older = (await filled.get("/api/bars/WAVE", limit="1", cursor=page["next"])).json()
    assert older["as_of"] == last, "every page of a list speaks of the same series"


async def test_small_letters_name_the_same_symbol(filled: App) -> None:
    """Symbols are written in capitals, and read in any."""
    assert (await filled.get("/api/bars/wave", limit="1")).json()["symbol"] == "WAVE"


@pytest.mark.parametrize("symbol", ["%24", "A B", "ABCDEFGHIJKLMNOP", "-A", "é", "A%2FB", "..%2F..%2Fetc"])
@pytest.mark.parametrize("what", ["bars", "quotes", "series"])
async def test_what_is_no_symbol_is_refused(filled: App, what: str, symbol: str) -> None:
    """400, and the form of a symbol."""
    answer = await filled.get(f"/api/{what}/{symbol}")
    assert is_problem(answer, 400, "is no symbol", "such as AAPL")


@pytest.mark.parametrize("limit", ["0", "-1", "501", "1e2", "ten", "", " 5", "５", "9" * 400])  # noqa: RUF001
async def test_what_is_no_limit_is_refused(filled: App, limit: str) -> None:
    """400, and the range; an empty parameter is one that was not given."""
    answer = await filled.get("/api/bars/WAVE", limit=limit)
    if limit:
        assert is_problem(answer, 400, "limit", "1 to 500")
    else:
        assert answer.status == 200


@pytest.mark.parametrize(
    "cursor",
    [
        "not-ours",
        "é",
        "%00",
        base64.urlsafe_b64encode(b"yesterday|x").decode(),
        base64.urlsafe_b64encode(b"2013-01-17T21:00:00|~").decode(),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    ],
)
async def test_what_is_no_cursor_is_refused(filled: App, cursor: str) -> None:
    """400, and where a cursor comes from."""
    answer = await filled.get("/api/bars/WAVE", cursor=cursor)
    assert is_problem(answer, 400, "cursor", "`next`")


async def test_what_is_no_interval_is_refused(filled: App) -> None:
    """400, and the intervals there are."""
    assert is_problem(await filled.get("/api/bars/WAVE", interval="5m"), 400, "is no interval", "1d, 1h, 1m")


@pytest.mark.parametrize("what", ["bars", "series"])
async def test_a_series_nobody_watches_is_not_found_and_the_remedy_is_told(filled: App, what: str) -> None:
    """404, and the call that makes us follow it, for this very interval."""
    answer = await filled.get(f"/api/{what}/NOBODY", interval="1h")
    assert is_problem(answer, 404, "NOBODY at 1h is not watched", "PUT /api/watchlist/NOBODY?interval=1h")


# --- quotes


async def test_a_quote_is_the_providers_last_price(filled: App) -> None:
    """The price, its time and from whom, with the close before it."""
    quote = (await filled.get("/api/quotes/WAVE")).json()
    assert quote["price"] == pytest.approx(waves()[-1])
    assert quote["previous_close"] == pytest.approx(waves()[-2])
    assert (quote["provider"], quote["is_stale"]) == ("finnhub", False)


async def test_without_a_quote_the_last_close_stands_in(filled: App) -> None:
    """A symbol whose quote was never fetched still has a price: its newest daily close, as of that close."""
    await filled.follow("CLOSES", waves(30))
    quote = (await filled.get("/api/quotes/CLOSES")).json()
    assert quote["price"] == pytest.approx(waves(30)[-1], abs=1e-4)
    assert quote["previous_close"] == pytest.approx(waves(30)[-2], abs=1e-4)
    assert quote["as_of"] == SESSIONS[-1].closes_at.isoformat().replace("+00:00", "Z")
    assert (quote["provider"], quote["is_stale"]) == ("alpha_vantage", False)


async def test_prices_that_should_be_newer_say_so(filled: App) -> None:
    """A provider that lags by two sessions leaves a price that is shown and marked stale."""
    prices = waves(40)
    filled.neighbours.late["LAGS"] = 2
    await filled.follow("LAGS", prices)
    quote, bars = (await filled.get("/api/quotes/LAGS")).json(), (await filled.get("/api/bars/LAGS")).json()
    assert quote["as_of"] == bars["as_of"] == SESSIONS[-3].closes_at.isoformat().replace("+00:00", "Z")
    assert (quote["is_stale"], bars["is_stale"]) == (True, True)


async def test_a_price_of_nothing_we_know_is_not_found(filled: App) -> None:
    """404, and the call that makes us follow the symbol."""
    assert is_problem(await filled.get("/api/quotes/UNSEEN"), 404, "UNSEEN", "PUT /api/watchlist/UNSEEN")


async def test_anonymous_reads_spend_no_provider_call(filled: App) -> None:
    """Whatever anybody asks, known or not, is answered from storage."""
    before = filled.neighbours.provider_calls()
    for symbol in ("WAVE", "UNSEEN2"):
        for what in ("bars", "quotes", "series"):
            await filled.get(f"/api/{what}/{symbol}")
    for path in ("watchlist", "signals", "alerts", "posts", "feed.xml", "health", "openapi.json"):
        assert (await filled.get(f"/api/{path}")).status == 200
    assert filled.neighbours.provider_calls() == before


async def test_interest_in_an_unknown_price_fetches_nothing_later_either(filled: App) -> None:
    """Anonymous interest is noted, not obeyed: the next refresh asks for watched symbols only."""
    for _ in range(3):
        await filled.get("/api/quotes/CURIOUS")
    await filled.fire("market_refresh_quotes")
    assert not [a for a in filled.neighbours.asked if a.query.get("symbol") == "CURIOUS"]


# --- the watchlist


async def test_watching_needs_the_key(filled: App) -> None:
    """Following a symbol spends provider calls, so it is asked for by somebody we know."""
    assert (await filled.ask("PUT", "/api/watchlist/KEYLESS")).status == 401
    assert (await filled.ask("DELETE", "/api/watchlist/WAVE")).status == 401
    assert "KEYLESS" not in (await filled.get("/api/watchlist")).text


async def test_a_watched_symbol_is_fetched_and_an_unwatched_one_keeps_what_is_stored(filled: App) -> None:
    """PUT brings the history in, silently; DELETE stops the fetching; PUT again goes on."""
    filled.neighbours.prices["PUTTED"] = waves(120)
    watched = (await filled.ask("PUT", "/api/watchlist/putted", key=True)).json()
    assert (watched["symbol"], watched["is_watched"], watched["watched_by"]) == ("PUTTED", True, "api")
    assert (await filled.fire("signals_ingest")).error is None
    await filled.deliver()

    series = (await filled.get("/api/series/PUTTED")).json()
    assert (series["bar_count"], series["provider"]) == (120, "alpha_vantage")
    signals = (await filled.get("/api/signals", symbol="PUTTED")).json()["items"]
    assert signals
    assert {signal["origin"] for signal in signals} == {"backfill"}, "watched now, so all of it is history"
    assert "PUTTED" not in (await filled.get("/api/alerts", limit="500")).text

    left = (await filled.ask("DELETE", "/api/watchlist/PUTTED", key=True)).json()
    assert left["is_watched"] is False
    series = (await filled.get("/api/series/PUTTED")).json()
    assert (series["bar_count"], series["next_due_at"]) == (120, None)
    calls = filled.neighbours.provider_calls()
    await filled.fire("signals_ingest")
    assert filled.neighbours.provider_calls() == calls

    again = (await filled.ask("PUT", "/api/watchlist/PUTTED", key=True)).json()
    assert again["is_watched"] is True
    assert again["live_from"] == watched["live_from"]


async def test_watching_twice_is_watching_once(filled: App) -> None:
    """The second PUT changes nothing, and one line stands in the list."""
    first = await filled.ask("PUT", "/api/watchlist/TWICE", key=True)
    second = await filled.ask("PUT", "/api/watchlist/TWICE", key=True)
    assert first.json() == second.json()
    items = (await filled.get("/api/watchlist")).json()["items"]
    assert [item["symbol"] for item in items].count("TWICE") == 1


async def test_a_symbol_has_a_line_per_interval(filled: App) -> None:
    """Days and hours of one symbol are two series."""
    for interval in ("1d", "1h"):
        await filled.ask("PUT", "/api/watchlist/BOTH", key=True, interval=interval)
    items = (await filled.get("/api/watchlist")).json()["items"]
    assert sorted(item["interval"] for item in items if item["symbol"] == "BOTH") == ["1d", "1h"]
    await filled.ask("DELETE", "/api/watchlist/BOTH", key=True, interval="1h")
    items = (await filled.get("/api/watchlist")).json()["items"]
    assert {i["interval"]: i["is_watched"] for i in items if i["symbol"] == "BOTH"} == {"1d": True, "1h": False}


async def test_what_was_never_watched_cannot_be_unwatched(filled: App) -> None:
    """404, by name."""
    assert is_problem(await filled.ask("DELETE", "/api/watchlist/NEVER", key=True), 404, "NEVER at 1d is not watched")


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_nonsense_cannot_be_watched(filled: App, method: str) -> None:
    """400 for a symbol or an interval that is none; nothing is stored."""
    before = (await filled.get("/api/watchlist")).text
    assert is_problem(await filled.ask(method, "/api/watchlist/%24%24", key=True), 400, "is no symbol")
    assert is_problem(await filled.ask(method, "/api/watchlist/OK", key=True, interval="2d"), 400, "is no interval")
    assert (await filled.get("/api/watchlist")).text == before


# --- why there is no signal


async def test_a_series_says_which_entry_waits_for_more_bars(filled: App) -> None:
    """Not enough history is no silence: each entry says how many bars it needs and how many there are."""
    await filled.follow("YOUNG", waves(25))
    series = (await filled.get("/api/series/YOUNG")).json()
    assert series["bar_count"] == 25
    assert series["entries"]["sma-10-30"]["is_ready"] is False
    assert "has 25" in series["entries"]["sma-10-30"]["reason"]
    assert series["evaluated_through"] == series["last_closed_at"]


async def test_a_symbol_the_providers_do_not_know_says_so(filled: App) -> None:
    """A refusal is shown where a person looks for the bars, with its kind and its text."""
    filled.watch("NOSUCH")
    await filled.fire("signals_ingest")
    series = (await filled.get("/api/series/NOSUCH")).json()
    assert series["bar_count"] == 0
    assert series["trouble"]["kind"] == "UnknownSymbolError"
    assert "NOSUCH" in series["trouble"]["text"]
    assert series["misses"] == 1


async def test_trouble_is_forgotten_when_bars_come(filled: App) -> None:
    """A provider that was down leaves its trouble on the series until it answers again."""
    filled.neighbours.prices["DOWN"] = waves(40)
    filled.watch("DOWN")
    with filled.neighbours.trouble(alpha_vantage=Reply(503), finnhub=Reply(500)):
        await filled.fire("signals_ingest")
    series = (await filled.get("/api/series/DOWN")).json()
    assert series["trouble"]["kind"] == "UnavailableError"
    assert is_problem(await filled.get("/api/quotes/DOWN"), 404, "still being fetched")

    await filled.forgive()
    await filled.fire("signals_ingest")
    await filled.deliver()
    series = (await filled.get("/api/series/DOWN")).json()
    assert (series["trouble"], series["bar_count"]) == (None, 40)


# --- history on demand


def fetch_body(symbol: str, **more: str) -> dict[str, str]:
    return {"symbol": symbol, "from": "2012-06-01", "to": "2012-12-31", **more}


async def test_history_is_asked_for_fetched_and_covered(filled: App) -> None:
    """POST queues it, the timer brings it, GET tells how it stands; the series is readable and not watched."""
    filled.neighbours.prices["ASKED"] = waves()
    answer = await filled.ask("POST", "/api/fetches", key=True, json=fetch_body("asked"))
    queued = answer.json()
    assert (answer.status, queued["state"], queued["symbol"]) == (202, "queued", "ASKED")
    assert answer.headers["Location"] == f"/api/fetches/{queued['fetch_id']}"
    again = await filled.ask("POST", "/api/fetches", key=True, json=fetch_body("ASKED"))
    assert again.json()["fetch_id"] == queued["fetch_id"]

    assert (await filled.fire("market_fetches")).error is None

    done = (await filled.get(answer.headers["Location"])).json()
    assert (done["state"], done["left"], done["reason"]) == ("done", [], None)
    bars = (await filled.get("/api/bars/ASKED", limit="500", **{"from": "2012-06-01", "to": "2012-12-31"})).json()
    assert len(bars["items"]) == done["bars"] > 140
    series = (await filled.get("/api/series/ASKED")).json()
    assert (series["is_watched"], series["next_due_at"]) == (False, None)
    assert series["bar_count"] >= done["bars"]
    coverage = (await filled.get("/api/coverage/ASKED", **{"from": "2012-06-01", "to": "2012-12-31"})).json()
    assert coverage["counts"] == {"held": done["bars"], "missing": 0, "absent": 0}
    assert (coverage["provider"], coverage["is_stale"], coverage["missing"]) == ("alpha_vantage", False, [])
    told = [event["data"].get("symbol") for event in filled.neighbours.events]
    assert "ASKED" not in told, "nobody hears of bars that nobody watches"


async def test_asking_for_history_needs_the_key(filled: App) -> None:
    """It spends provider calls, so it is asked for by somebody we know; how it stands anybody may see."""
    assert (await filled.ask("POST", "/api/fetches", json=fetch_body("KEYLESS"))).status == 401
    assert (await filled.ask("DELETE", "/api/fetches/any")).status == 401
    assert is_problem(await filled.get("/api/fetches/any"), 404, "POST /api/fetches")


async def test_a_cancelled_request_fetches_nothing(filled: App) -> None:
    """DELETE ends it before the timer comes."""
    queued = (await filled.ask("POST", "/api/fetches", key=True, json=fetch_body("STOPPED"))).json()
    gone = await filled.ask("DELETE", f"/api/fetches/{queued['fetch_id']}", key=True)
    assert gone.json()["state"] == "cancelled"
    await filled.fire("market_fetches")
    assert not [a for a in filled.neighbours.asked if a.query.get("symbol") == "STOPPED"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"symbol": "A B", "from": "2012-06-01", "to": "2012-07-01"}, "is no symbol"),
        ({"symbol": "WAVE", "from": "2012-06-01"}, "to: Field required"),
        ({"symbol": "WAVE", "from": "2012-07-01", "to": "2012-06-01"}, "before it begins"),
        ({"symbol": "WAVE", "from": "2012-06-02", "to": "2012-06-03"}, "no 1d bar closes"),
        ({"symbol": "WAVE", "from": "2031-06-02", "to": "2031-07-03"}, "clock has come"),
    ],
)
async def test_history_that_cannot_be_is_refused(filled: App, body: dict[str, str], words: str) -> None:
    """400, what is wrong, and an example or a reason."""
    assert is_problem(await filled.ask("POST", "/api/fetches", key=True, json=body), 400, words)


async def test_a_symbol_nobody_knows_ends_its_request(filled: App) -> None:
    """Failed, with the provider's word for it."""
    queued = (await filled.ask("POST", "/api/fetches", key=True, json=fetch_body("NOSUCH2"))).json()
    await filled.fire("market_fetches")
    failed = (await filled.get(f"/api/fetches/{queued['fetch_id']}")).json()
    assert failed["state"] == "failed"
    assert "UnknownSymbolError" in failed["reason"]


# --- how well we are supplied


async def test_providers_say_how_they_do(filled: App) -> None:
    """Every provider with its plan, health, quota and what it refused; never a key."""
    items = (await filled.get("/api/providers")).json()["items"]
    first = items[0]
    assert first["provider"] == "alpha_vantage"
    assert first["calls"] > 0
    assert 0 < first["success_rate"] <= 1
    assert {"breaker", "hit_rate", "windows", "cool_down_until", "not_entitled", "waiting"} <= set(first)


async def test_coverage_shows_what_a_series_lacks(filled: App) -> None:
    """A provider that lags by two sessions leaves two bars missing, and the series stale."""
    filled.neighbours.late["THIN"] = 2
    await filled.follow("THIN", waves(40))
    coverage = (await filled.get("/api/coverage/THIN")).json()
    assert coverage["counts"] == {"held": 40, "missing": 2, "absent": 0}
    assert (coverage["is_stale"], coverage["bar_count"]) == (True, 40)
    assert coverage["as_of"] == coverage["held"][-1]["last"]
    assert is_problem(await filled.get("/api/coverage/NOBODY"), 404, "is not watched")


async def test_the_watchlist_comes_in_pages(filled: App) -> None:
    """However many series there are, each is on one page."""
    for symbol in ("PAGED1", "PAGED2", "PAGED3"):
        await filled.ask("PUT", f"/api/watchlist/{symbol}", key=True)
    seen: list[str] = []
    query = {"limit": "2"}
    while True:
        page = (await filled.get("/api/watchlist", **query)).json()
        seen += [f"{item['symbol']}|{item['interval']}" for item in page["items"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert len(seen) == len(set(seen))
    assert seen[:3] == ["PAGED3|1d", "PAGED2|1d", "PAGED1|1d"]
