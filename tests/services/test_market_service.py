import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest

from shared.clock import StoppedClock, format_instant
from shared.errors import InvalidPayloadError, NotFoundError, UnavailableError, UnknownSymbolError
from shared.identity import ForbiddenError
from shared.market import service
from shared.market.callers import Callers, CappedError
from shared.market.fetches import Fetches
from shared.market.flights import Flights
from shared.market.gaps import SETTLED
from shared.market.ingest import Ingest, Watch
from shared.market.library import STALE_QUOTE, Library
from shared.market.mending import Mending
from shared.market.models import Adjustment, Interval, Priority, Quote
from shared.market.prefetching import Prefetching
from shared.market.service import Market, Supply, range_of, wanted_of
from shared.market.sessions import calendar
from shared.market.stores import Bars, Quotes, Series, SeriesStore, WantedQuote
from tests.builders import CLOSE, WALL, MemoryPublisher, a_request, closes_from, daily_bars, documents
from tests.unit.market.library_house import ANN, BOB, Seller

DAY = Interval.DAY
DELAY = timedelta(minutes=15)
SECOND = timedelta(seconds=1)
BARS = daily_bars(150)
LONG = daily_bars(1100)
QUOTE = Quote(symbol="AAPL", price=101.5, previous_close=100.0, as_of=CLOSE, provider="finnhub")


class House:
    """The market room with AAPL's bars stored, evaluated through the last of them."""

    def __init__(self, store, folder):
        self.store = store
        self.wall = StoppedClock(WALL)
        self.market_clock = StoppedClock(BARS[-1].closed_at + DELAY)
        self.seller = Seller(AAPL=BARS)
        self.series, self.bars, self.quotes = (room(store, self.wall) for room in (SeriesStore, Bars, Quotes))
        file = folder / "watchlist.toml"
        file.write_text("")
        self.ingest = Ingest(
            documents=store,
            series=self.series,
            bars=self.bars,
            quotes=self.quotes,
            fetcher=self.seller,
            publisher=MemoryPublisher(),
            wall=self.wall,
            market=self.market_clock,
            delay=DELAY,
            live_from=None,
            watchlist_file=file,
        )
        self.market = Market(
            series=self.series,
            bars=self.bars,
            quotes=self.quotes,
            ingest=self.ingest,
            clock=self.market_clock,
            delay=DELAY,
        )
        library = Library(
            documents=store,
            series=self.series,
            bars_held=self.bars,
            quotes=self.quotes,
            fetcher=self.seller,
            flights=Flights(documents=store, wall=self.wall),
            callers=Callers(documents=store, wall=self.wall, allowed=5),
            publisher=self.ingest.publisher,
            wall=self.wall,
            market=self.market_clock,
            delay=DELAY,
        )
        fetches = Fetches(documents=store, library=library, wall=self.wall)
        self.supply = Supply(
            market=self.market,
            library=library,
            fetches=fetches,
            fetcher=self.seller,
            mending=Mending(documents=store, library=library, fetches=fetches, wall=self.wall),
            prefetching=Prefetching(
                documents=store,
                quotes=self.quotes,
                series=self.series,
                fetcher=self.seller,
                wall=self.wall,
                market=self.market_clock,
            ),
            bars=self.bars,
            clock=self.market_clock,
        )

    async def hold(self, bars, revision=0):
        await self.bars.append("AAPL|1d", DAY, revision, bars)
        await self.series.create(
            Series(
                symbol="AAPL",
                interval=DAY,
                live_from=BARS[0].closed_at,
                evaluated_through=bars[-1].closed_at if bars else None,
                provider="alpha_vantage",
                adjustment=Adjustment.RAW,
                revision=revision,
            )
        )

    async def cover(self, symbol="AAPL", **params):
        return await self.supply.coverage(a_request(params=params, route={"symbol": symbol}))

    async def ask(self, symbol="AAPL", caller=ANN, **params):
        """Bars as somebody we know reads them, later than any call that answers for all."""
        self.wall.at += 3 * SECOND
        return await self.supply.list_bars(a_request(params=params, route={"symbol": symbol}), caller)

    async def price(self, symbol="AAPL", caller=ANN):
        self.wall.at += 3 * SECOND
        return await self.supply.quote(symbol, caller)

    @property
    def calls(self):
        return len(self.seller.asked)

    async def list(self, symbol="AAPL", **params):
        return await self.market.list_bars(a_request(params=params, route={"symbol": symbol}))


@pytest.fixture
async def house(tmp_path):
    store = documents()
    yield House(store, tmp_path)
    await store.close()


@pytest.fixture
async def holding(house):
    await house.hold(BARS)
    return house


class TestBars:
    async def test_newest_come_first_with_how_good_they_are(self, holding):
        """The last 50 bars as traded, and whether anything newer should be there."""
        answer = await holding.list()

        newest, last = answer["items"][0], BARS[-1]
        assert [item["closed_at"] for item in answer["items"]] == [b.closed_at for b in reversed(BARS[-50:])]
        assert {name: newest[name] for name in newest} == {name: getattr(last, name) for name in newest}
        assert {name: answer[name] for name in answer if name not in ("items", "next")} == {
            "symbol": "AAPL",
            "interval": DAY,
            "as_of": last.closed_at,
            "is_stale": False,
            "provider": "alpha_vantage",
            "adjustment": "raw",
            "revision": 0,
        }

    @pytest.mark.parametrize("limit", [*range(60, 66), 125, 499, 500])
    async def test_following_next_shows_everything_once(self, house, limit):
        """Every page is full until the last, nothing is missing and nothing comes twice."""
        await house.hold(LONG)
        seen, lengths, params = [], [], {"limit": str(limit)}
        while True:
            answer = await house.list(**params)
            seen += [item["closed_at"] for item in answer["items"]]
            lengths.append(len(answer["items"]))
            if answer["next"] is None:
                break
            params["cursor"] = answer["next"]

        assert seen == [b.closed_at for b in reversed(LONG)]
        assert set(lengths[:-1]) <= {limit}
        assert 0 < lengths[-1] <= limit

    @pytest.mark.parametrize("limit", [7, 500])
    async def test_range_is_shown_whole_page_after_page(self, house, limit):
        """From a day to a day at the exchange, both included; an instant means itself."""
        await house.hold(LONG)
        held = LONG[100:301]
        for first, last in (
            (f"{held[0].closed_at:%Y-%m-%d}", f"{held[-1].closed_at:%Y-%m-%d}"),
            (f"{held[0].closed_at:%Y-%m-%dT%H:%MZ}", f"{held[-1].closed_at:%Y-%m-%dT%H:%MZ}"),
        ):
            seen, params = [], {"limit": str(limit), "from": first, "to": last}
            while True:
                answer = await house.list(**params)
                seen += [item["closed_at"] for item in answer["items"]]
                assert answer["as_of"] == LONG[-1].closed_at
                if answer["next"] is None:
                    break
                params["cursor"] = answer["next"]
            assert seen == [b.closed_at for b in reversed(held)]

    async def test_range_without_bars_is_an_empty_page_of_a_series_that_is_there(self, holding):
        """Nothing in it does not mean nothing at all."""
        answer = await holding.list(**{"from": "2031-01-01"})

        assert (answer["items"], answer["next"], answer["as_of"]) == ([], None, BARS[-1].closed_at)

    async def test_missing_bar_makes_the_answer_stale(self, holding):
        """From the moment the next bar could be there, an answer without it says that it is old."""
        next_close = closes_from(BARS[-1].closed_at + SECOND)[0]

        holding.market_clock.at = next_close + DELAY - SECOND
        assert not (await holding.list())["is_stale"]
        holding.market_clock.at = next_close + DELAY
        assert (await holding.list())["is_stale"]

    async def test_only_the_current_revision_is_shown(self, holding):
        """History that was replaced is no longer shown, also while the next revision is being written."""
        halved = [replace(b, low=b.low / 2, close=b.low / 2) for b in BARS]
        await holding.bars.append("AAPL|1d", DAY, 1, halved)
        assert (await holding.list())["items"][0]["close"] == BARS[-1].close

        series = await holding.series.get("AAPL", DAY)
        await holding.series.save(replace(series, revision=1))

        answer = await holding.list(limit="500")
        assert (answer["revision"], len(answer["items"])) == (1, 150)
        assert answer["items"][0]["close"] == halved[-1].close

    async def test_series_without_bars_yet_is_an_empty_list(self, house):
        """Watched but not yet fetched is an answer, and a stale one."""
        await house.hold([])

        answer = await house.list()

        assert (answer["items"], answer["next"], answer["as_of"], answer["is_stale"]) == ([], None, None, True)

    @pytest.mark.parametrize(
        ("symbol", "params", "error"),
        [
            ("IBM", {}, NotFoundError),
            ("AAPL", {"interval": "1h"}, NotFoundError),
            ("AAPL", {"interval": "5m"}, InvalidPayloadError),
            ("NO SYMBOL", {}, InvalidPayloadError),
            ("AAPL", {"limit": "0"}, InvalidPayloadError),
            ("AAPL", {"cursor": "x"}, InvalidPayloadError),
            ("AAPL", {"from": "yesterday"}, InvalidPayloadError),
            ("AAPL", {"to": "2012-06-30T21:00:00"}, InvalidPayloadError),
            ("AAPL", {"from": "2012-06-30", "to": "2012-01-01"}, InvalidPayloadError),
        ],
    )
    async def test_wrong_question_is_answered_as_such(self, holding, symbol, params, error):
        """What nobody watches is not there; what cannot be is refused."""
        with pytest.raises(error):
            await holding.list(symbol, **params)

    async def test_symbol_may_be_written_in_small_letters(self, holding):
        """aapl is AAPL."""
        assert (await holding.list("aapl"))["symbol"] == "AAPL"


class TestQuote:
    SESSION = calendar().session(CLOSE.date())

    async def stored(self, house, as_of):
        await house.quotes.put(WantedQuote(symbol="AAPL", quote=replace(QUOTE, as_of=as_of), recorded_at=WALL))

    async def test_stored_quote_is_the_answer(self, house):
        """Price, time, provider and whether it is old."""
        house.market_clock.at = CLOSE + SECOND
        await self.stored(house, CLOSE)

        assert await house.market.quote("AAPL") == {
            "symbol": "AAPL",
            "price": 101.5,
            "previous_close": 100.0,
            "as_of": CLOSE,
            "is_stale": False,
            "provider": "finnhub",
        }

    async def test_quote_ages_while_the_market_trades(self, house):
        """In a session a quote is old after 20 minutes; at night the last of the session is the newest there is."""
        as_of = self.SESSION.opens_at + timedelta(hours=1)
        await self.stored(house, as_of)
        stale = []
        for at in (as_of + STALE_QUOTE, as_of + STALE_QUOTE + SECOND):
            house.market_clock.at = at
            stale.append((await house.market.quote("AAPL"))["is_stale"])
        assert stale == [False, True]

    @pytest.mark.parametrize(("as_of", "is_stale"), [(CLOSE, False), (CLOSE - timedelta(hours=1), True)])
    async def test_weekend_does_not_make_a_last_price_old(self, house, as_of, is_stale):
        """Outside sessions what counts is whether it is the last session's close."""
        house.market_clock.at = CLOSE + timedelta(hours=12)
        await self.stored(house, as_of)

        assert (await house.market.quote("AAPL"))["is_stale"] is is_stale

    async def test_daily_close_stands_in(self, holding):
        """Without a quote the newest bar is the last price known, and that somebody asked is noted."""
        answer = await holding.market.quote("AAPL")

        assert (answer["price"], answer["previous_close"]) == (BARS[-1].close, BARS[-2].close)
        assert (answer["as_of"], answer["is_stale"], answer["provider"]) == (
            BARS[-1].closed_at,
            False,
            "alpha_vantage",
        )
        assert [(a.symbol, a.count) for a in await holding.quotes.interest.since(WALL)] == [("AAPL", 1)]

    async def test_first_bar_has_nothing_before_it(self, house):
        """One bar is a price without a previous close."""
        await house.hold(BARS[:1])

        assert (await house.market.quote("AAPL"))["previous_close"] is None

    async def test_unknown_price_is_not_found_with_the_remedy(self, house):
        """Who asks for what nobody follows learns how to have it followed; a followed one is on its way."""
        with pytest.raises(NotFoundError, match="PUT /api/watchlist/AAPL"):
            await house.market.quote("AAPL")
        await house.hold([])
        with pytest.raises(NotFoundError, match="still being fetched"):
            await house.market.quote("AAPL")

    async def test_note_that_cannot_be_written_is_no_readers_trouble(self, holding, monkeypatch):
        """Whoever asks has his answer."""

        async def down(*args):
            raise UnavailableError("down")

        monkeypatch.setattr(holding.store, "create", down)

        assert (await holding.market.quote("AAPL"))["price"] == BARS[-1].close


async def test_reading_never_spends_a_call(holding):
    """Whatever is read, known or not: no provider is asked, and nothing becomes due."""
    market, end = holding.market, BARS[-1].closed_at
    due = (await holding.series.due(end, 10), await holding.quotes.due(end, 10))

    await market.watchlist(a_request())
    for symbol in ("AAPL", "IBM"):
        request = a_request(route={"symbol": symbol})
        for read in (
            market.list_bars(request),
            market.describe(request),
            market.quote(symbol),
            holding.supply.list_bars(request, None),
            holding.supply.quote(symbol, None),
            holding.supply.coverage(request),
        ):
            with suppress(NotFoundError):
                await read

    assert holding.seller.asked == []
    assert (await holding.series.due(end, 10), await holding.quotes.due(end, 10)) == due


class TestWatching:
    async def test_watched_symbol_is_live_from_now(self, house):
        """PUT says what is watched, by whom and from when; its quote is wanted too."""
        answer = await house.market.watch(a_request("PUT", route={"symbol": "aapl"}, params={"interval": "1h"}))

        assert answer == {
            "symbol": "AAPL",
            "interval": Interval.HOUR,
            "is_watched": True,
            "watched_by": "api",
            "live_from": house.market_clock.at,
            "evaluated_through": None,
            "trouble": None,
        }
        assert await house.market.watchlist(a_request()) == {"items": [answer], "next": None}
        assert [q.symbol for q in await house.quotes.due(house.market_clock.at, 5)] == ["AAPL"]

    async def test_long_watchlist_comes_in_pages(self, house):
        """The newest known first, each once."""
        for n in range(7):
            house.wall.at += SECOND
            await house.ingest.watch(Watch(symbol=f"S{n}", interval=DAY), by="api", live_from=CLOSE)
        seen, params = [], {"limit": "3"}
        while True:
            page = await house.market.watchlist(a_request(params=params))
            seen += [item["symbol"] for item in page["items"]]
            if page["next"] is None:
                break
            params["cursor"] = page["next"]

        assert seen == [f"S{n}" for n in reversed(range(7))]

    async def test_long_series_is_described_by_its_last_page(self, house, monkeypatch):
        """How much is held costs one read, however much it is."""
        await house.hold(LONG)
        read, page = [], house.store.page

        async def counting(*args, **how):
            found = await page(*args, **how)
            read.extend(found)
            return found

        monkeypatch.setattr(house.store, "page", counting)

        assert (await house.market.describe(a_request(route={"symbol": "AAPL"})))["bar_count"] == len(LONG)
        assert len(read) == 1

    async def test_unwatched_series_is_kept_and_said_to_be(self, holding):
        """DELETE stops the fetching and keeps the bars; what was never watched is not found."""
        answer = await holding.market.unwatch(a_request("DELETE", route={"symbol": "AAPL"}))

        assert (answer["is_watched"], answer["watched_by"]) == (False, "api")
        assert len((await holding.list())["items"]) == 50
        with pytest.raises(NotFoundError):
            await holding.market.unwatch(a_request("DELETE", route={"symbol": "IBM"}))

    async def test_series_tells_what_is_held_and_why_there_is_nothing(self, holding):
        """From when to when, how many, what is next, and the trouble if there is some."""
        series = await holding.series.get("AAPL", DAY)
        trouble = {"kind": "UnavailableError", "text": "down"}
        await holding.series.save(
            replace(series, trouble=trouble, misses=2, due_at=CLOSE, entries={"cross": {"state": "not_ready"}})
        )

        answer = await holding.market.describe(a_request(route={"symbol": "AAPL"}))

        assert (answer["bar_count"], answer["first_closed_at"], answer["last_closed_at"]) == (
            150,
            BARS[0].closed_at,
            BARS[-1].closed_at,
        )
        assert (answer["trouble"], answer["misses"], answer["next_due_at"]) == (trouble, 2, CLOSE)
        assert answer["entries"] == {"cross": {"state": "not_ready"}}

    async def test_new_series_tells_that_it_holds_nothing(self, house):
        """Nothing yet is nulls and zeroes, not an error."""
        await house.ingest.watch(Watch(symbol="AAPL", interval=DAY), by="api", live_from=CLOSE)

        answer = await house.market.describe(a_request(route={"symbol": "AAPL"}))

        assert (answer["bar_count"], answer["first_closed_at"], answer["last_closed_at"]) == (0, None, None)


class TestCoverage:
    async def test_says_what_is_held_missing_and_absent(self, house):
        """In ranges, with counts, and who was asked for what is absent."""
        await house.hold(BARS[:50] + BARS[60:100])
        series = await house.series.get("AAPL", DAY)
        await house.series.save(replace(series, is_active=False))
        house.seller.history["AAPL"] = [replace(b, split=2.0) if b is BARS[55] else b for b in BARS[:57]] + BARS[60:100]
        house.market_clock.at = BARS[99].closed_at + SETTLED + timedelta(days=1)
        await house.supply.library.bars("AAPL", DAY, until=BARS[99].closed_at, caller=ANN)
        house.market_clock.at = BARS[-1].closed_at + DELAY

        answer = await house.cover()

        def shown(kind):
            return [(r["first"], r["last"], r["count"]) for r in answer[kind]]

        assert shown("held") == [
            (BARS[0].closed_at, BARS[56].closed_at, 57),
            (BARS[60].closed_at, BARS[99].closed_at, 40),
        ]
        assert shown("absent") == [(BARS[57].closed_at, BARS[59].closed_at, 3)]
        assert (answer["absent"][0]["provider"], answer["absent"][0]["asked_at"]) == ("alpha_vantage", WALL)
        assert shown("missing") == [(BARS[100].closed_at, BARS[-1].closed_at, 50)]
        assert answer["counts"] == {"held": 97, "missing": 50, "absent": 3}
        assert answer["actions"] == [{"closed_at": BARS[55].closed_at, "split": 2.0}]
        assert (answer["bar_count"], answer["first_closed_at"], answer["as_of"], answer["revision"]) == (
            97,
            BARS[0].closed_at,
            BARS[99].closed_at,
            1,
        )
        assert (answer["is_stale"], answer["is_cut"]) == (True, False)

    async def test_looks_at_a_range(self, holding):
        """Only what closes from a day to a day."""
        answer = await holding.cover(
            **{"from": f"{BARS[10].closed_at:%Y-%m-%d}", "to": f"{BARS[19].closed_at:%Y-%m-%d}"}
        )

        assert [(r["first"], r["last"], r["count"]) for r in answer["held"]] == [
            (BARS[10].closed_at, BARS[19].closed_at, 10)
        ]
        assert (answer["missing"], answer["is_stale"]) == ([], False)

    async def test_series_without_bars_misses_all(self, house):
        """Watched and not yet fetched: nothing is held, and it says so."""
        await house.hold([])

        answer = await house.cover()

        assert (answer["held"], answer["as_of"], answer["is_stale"], answer["bar_count"]) == ([], None, True, 0)

    @pytest.mark.parametrize(
        ("params", "error", "match"),
        [
            ({"interval": "1h"}, NotFoundError, "not watched"),
            ({"from": "1871-01-01"}, InvalidPayloadError, "session table"),
            ({"from": "soon"}, InvalidPayloadError, "2012-01-31"),
        ],
    )
    async def test_wrong_question_is_answered_as_such(self, holding, params, error, match):
        """What is wrong, and what to write."""
        with pytest.raises(error, match=match):
            await holding.cover(**params)

    async def test_decades_of_minutes_are_too_many_for_one_answer(self, house):
        """A range has to be named."""
        await house.series.create(Series(symbol="AAPL", interval=Interval.MINUTE, live_from=CLOSE))

        with pytest.raises(InvalidPayloadError, match="shorter range"):
            await house.cover(interval="1m", **{"from": "2000-01-01"})


class TestIdentifiedReads:
    async def test_what_nobody_held_is_fetched_by_one_call_however_many_pages_are_read(self, house):
        """A symbol we never heard of is answered at once, with where it is from; then it is there for everybody."""
        seen, params = [], {"limit": "40"}
        while True:
            answer = await house.ask(**params)
            assert {name: answer[name] for name in ("as_of", "is_stale", "provider", "revision", "reason")} == {
                "as_of": BARS[-1].closed_at,
                "is_stale": False,
                "provider": "alpha_vantage",
                "revision": 0,
                "reason": None,
            }
            assert answer["adjustment"] == "raw"
            seen += [item["closed_at"] for item in answer["items"]]
            if answer["next"] is None:
                break
            params["cursor"] = answer["next"]

        assert seen == [b.closed_at for b in reversed(BARS)]
        assert (house.calls, house.seller.asked[0][-1]) == (1, Priority.ASKED)
        assert len((await house.list())["items"]) == 50

    async def test_only_what_the_page_lacks_is_fetched(self, house):
        """Held bars and gaps that the page does not show are left alone."""
        await house.hold(BARS[:20] + BARS[40:120])

        newest = await house.ask(limit="35")
        assert [item["closed_at"] for item in newest["items"]] == [b.closed_at for b in reversed(BARS[115:])]
        [(_, since, _, provider, priority)] = house.seller.asked
        assert BARS[110].closed_at < since <= BARS[119].closed_at
        assert (provider, priority) == ("alpha_vantage", Priority.ASKED)

        await house.ask(limit="35")
        assert house.calls == 1, "what is held is never asked for again"
        first, last = (f"{BARS[i].closed_at:%Y-%m-%d}" for i in (25, 30))
        older = await house.ask(limit="10", **{"from": first, "to": last})
        assert [item["closed_at"] for item in older["items"]] == [b.closed_at for b in reversed(BARS[25:31])]
        assert house.calls == 2

    async def test_who_names_no_beginning_misses_nothing_before_the_first_bar_held(self, house):
        """A page longer than what is held is no order for an older history."""
        await house.hold(BARS[100:])
        answer = await house.ask(limit="500")
        assert (len(answer["items"]), answer["reason"], house.calls) == (50, None, 0)

    @pytest.mark.parametrize("params", [{"to": "1950-01-01"}, {"from": "2031-01-01"}])
    async def test_range_that_cannot_hold_bars_is_an_empty_page_and_costs_nothing(self, holding, params):
        """Before the exchange's table, and in the future."""
        answer = await holding.ask(**params)
        assert (answer["items"], answer["reason"], holding.calls) == ([], None, 0)

    async def test_provider_in_trouble_leaves_what_is_held_and_the_answer_says_so(self, holding):
        """Stale if error, always marked, with the reason."""
        holding.market_clock.at = closes_from(BARS[-1].closed_at + SECOND)[0] + DELAY
        holding.seller.trouble = UnavailableError("alpha_vantage answered 503")

        answer = await holding.ask(limit="5")

        assert (len(answer["items"]), answer["is_stale"], answer["as_of"]) == (5, True, BARS[-1].closed_at)
        assert answer["reason"] == "UnavailableError: alpha_vantage answered 503"
        holding.market_clock.at = BARS[-1].closed_at + DELAY
        beyond = await holding.ask(limit="500", **{"from": "2012-06-01"})
        assert (len(beyond["items"]), beyond["is_stale"]) == (150, True), "the newest is there, and not what was asked"

    async def test_trouble_with_nothing_held_is_told_as_it_is(self, house):
        """Where there is nothing to show, why there is not is the answer."""
        house.seller.trouble = UnavailableError("alpha_vantage answered 503")
        with pytest.raises(UnavailableError, match="503"):
            await house.ask()
        with pytest.raises(UnavailableError, match="503"):
            await house.price()
        house.seller.trouble = None
        with pytest.raises(UnknownSymbolError, match="IBM"):
            await house.ask("IBM")

    async def test_share_of_the_day_caps_a_caller_and_no_other(self, house):
        """Beyond it only what is held is answered, marked; for the rest the caller waits until tomorrow."""
        for symbol in ("A", "B", "C", "D", "E"):
            house.seller.history[symbol] = BARS
            await house.ask(symbol)
        house.seller.history["F"] = BARS

        with pytest.raises(CappedError, match="5 a day") as refused:
            await house.ask("F")
        midnight = WALL.replace(hour=0) + timedelta(days=1)
        assert refused.value.retry_after == midnight - house.wall.at
        with pytest.raises(CappedError):
            await house.price("F")

        house.market_clock.at = closes_from(BARS[-1].closed_at + SECOND)[0] + DELAY
        held = await house.ask("A")
        assert (len(held["items"]), held["is_stale"]) == (50, True)
        assert "your share of today's provider calls is spent" in held["reason"]
        assert house.calls == 5
        assert len((await house.ask("F", BOB))["items"]) == 50

    async def test_slow_provider_is_waited_for_no_longer_than_the_answer_can_wait(self, holding, monkeypatch):
        """What is held is the answer then; the call is not left running behind it."""
        monkeypatch.setattr(service, "PATIENCE", timedelta())
        monkeypatch.setattr(service, "OVERTIME", timedelta(milliseconds=20))
        monkeypatch.setattr(holding.supply.library.__class__, "_is_over", lambda *_: False)
        holding.market_clock.at = closes_from(BARS[-1].closed_at + SECOND)[0] + DELAY
        holding.seller.gate.clear()
        before = asyncio.all_tasks()

        answer = await holding.ask()

        assert (len(answer["items"]), answer["is_stale"]) == (50, True)
        assert "took too long" in answer["reason"]
        assert asyncio.all_tasks() == before
        with pytest.raises(UnavailableError, match="took too long"):
            await holding.ask("IBM")

    async def test_bar_the_timer_will_ask_for_again_costs_a_reader_nothing(self, holding):
        """A provider that is late is asked by one, at the pace of the slots, and not by everybody who looks."""
        holding.market_clock.at = closes_from(BARS[-1].closed_at + SECOND)[0] + DELAY
        series = await holding.series.get("AAPL", DAY)
        again = holding.market_clock.at + timedelta(minutes=15)
        await holding.series.save(replace(series, due_at=again, misses=1))

        answer = await holding.ask()
        assert (holding.calls, answer["is_stale"]) == (0, True)
        assert format_instant(again) in answer["reason"]

        holding.market_clock.at = again
        await holding.ask()
        assert holding.calls == 1

    async def test_bars_the_provider_has_not_got_yet_are_named(self, holding):
        """An answer that lacks something says how much, and what to do."""
        holding.market_clock.at = closes_from(BARS[-1].closed_at + SECOND, 2)[-1] + DELAY
        answer = await holding.ask()
        assert (answer["is_stale"], holding.calls) == (True, 1)
        assert answer["reason"].startswith("2 bars are missing still")

    async def test_interest_of_a_reader_counts_once(self, holding):
        """Whoever reads, a read is one sign that the symbol is wanted."""
        holding.seller.price = replace(QUOTE, as_of=BARS[-1].closed_at)
        await holding.list()
        await holding.ask()
        await holding.price()
        holding.wall.at += timedelta(minutes=2)
        await holding.ask()
        assert [(a.symbol, a.count) for a in await holding.quotes.interest.since(WALL)] == [("AAPL", 4)]

    async def test_quote_is_renewed_for_a_caller(self, holding):
        """A price that is no longer good is fetched, and is there for everybody afterwards."""
        holding.seller.price = replace(QUOTE, as_of=BARS[-1].closed_at, price=222.0)
        answer = await holding.price()
        assert (answer["price"], answer["provider"], answer["is_stale"], answer["reason"]) == (
            222.0,
            "finnhub",
            False,
            None,
        )
        assert (await holding.supply.quote("AAPL", None))["price"] == 222.0
        await holding.price()
        assert holding.calls == 1

    async def test_quote_that_cannot_be_renewed_is_marked(self, holding):
        """The old price, or the newest close where there never was one, with the reason."""
        holding.seller.trouble = UnavailableError("finnhub answered 503")
        stand_in = await holding.price()
        assert (stand_in["price"], stand_in["is_stale"]) == (BARS[-1].close, True)
        assert stand_in["reason"] == "UnavailableError: finnhub answered 503"

        await holding.quotes.put(
            WantedQuote(symbol="AAPL", quote=replace(QUOTE, as_of=CLOSE), recorded_at=WALL - timedelta(days=1))
        )
        old = await holding.price()
        assert (old["price"], old["as_of"], old["is_stale"]) == (101.5, CLOSE, True)
        assert "503" in old["reason"]


class TestFetches:
    async def test_only_who_asked_cancels_a_fetch(self, house):
        """Another caller may not; an operator, and who holds the key, may cancel anybody's."""
        body = b'{"symbol": "AAPL", "from": "2013-01-03", "to": "2013-03-01"}'
        request = a_request("POST", body=body, headers={"content-type": "application/json"})
        for allowed in (ANN, None):
            at = a_request(route={"id": (await house.supply.request(request, ANN)).fetch_id})
            with pytest.raises(ForbiddenError, match="somebody else"):
                await house.supply.cancel(at, BOB)
            assert (await house.supply.fetch(at)).state == "queued"
            assert (await house.supply.cancel(at, allowed)).state == "cancelled"
        with pytest.raises(NotFoundError):
            await house.supply.cancel(a_request(route={"id": "none"}), BOB)

    async def test_body_names_a_range_of_days(self):
        """Whole days at the exchange, in capitals, as urgent as asked for."""
        wanted = wanted_of(b'{"symbol": "aapl", "from": "2012-01-03", "to": "2012-06-29", "priority": "backfill"}')

        closes = closes_from(wanted.since + SECOND, 2)
        assert (wanted.symbol, wanted.interval, wanted.priority) == ("AAPL", DAY, Priority.BACKFILL)
        assert closes[0].date().isoformat() == "2012-01-03"
        assert closes_from(wanted.until)[0].date().isoformat() == "2012-07-02"

    @pytest.mark.parametrize(
        ("body", "match"),
        [
            (b"", "the body"),
            (b"[]", "the body"),
            (b'{"symbol": "AAPL", "from": "2012-01-03"}', "to: Field required"),
            (b'{"symbol": "AAPL", "from": "2012-01-03", "to": "2012-02-03", "form": 1}', "form"),
            (b'{"symbol": "A B", "from": "2012-01-03", "to": "2012-02-03"}', "is no symbol"),
            (b'{"symbol": "AAPL", "interval": "5m", "from": "2012-01-03", "to": "2012-02-03"}', "is no interval"),
            (b'{"symbol": "AAPL", "from": "2012-13-03", "to": "2012-02-03"}', "neither a date"),
            (b'{"symbol": "AAPL", "from": "2012-01-03", "to": "2012-02-03", "priority": "live"}', "priority"),
        ],
    )
    async def test_what_cannot_be_is_named(self, body, match):
        """The field, what is wrong with it, and an example."""
        with pytest.raises(InvalidPayloadError, match=match):
            wanted_of(body)

    async def test_queued_looked_at_and_cancelled(self, house):
        """The way of a request through the desk."""
        body = b'{"symbol": "AAPL", "from": "2013-01-03", "to": "2013-03-01"}'
        queued = await house.supply.request(
            a_request("POST", body=body, headers={"content-type": "application/json"}), ANN
        )
        at = a_request(route={"id": queued.fetch_id})

        assert (await house.supply.fetch(at)).state == "queued"
        assert (await house.supply.cancel(at)).state == "cancelled"
        assert await house.supply.fetches.work() == 0


@pytest.mark.parametrize(
    ("text", "first"),
    [("0001-01-01", "1970"), ("9999-12-31", "9000"), ("9999-12-31T23:59:59Z", "9000"), ("2012-01-31", "2012")],
)
def test_no_date_is_too_far_away(text, first):
    """Any date that can be written can be asked for."""
    assert f"{range_of(a_request(params={'from': text}))[0]:%Y}" == first
