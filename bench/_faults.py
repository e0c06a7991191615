"""
One day of provider faults: four providers that fail in every way, and everybody who asks wants an answer.

The day is simulated (a clock that requests and waits move, seeded dice); fetcher, throttles, library and storage are
the real ones. Every price says which instant it is of, so that whether an answer is as fresh as it claims is judged
by what it holds, with arithmetic of its own.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from bench._report import report, say
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    DailyQuotaError,
    NotEntitledError,
    RateLimitedError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.events import Event
from shared.market.callers import Caller, Callers
from shared.market.entitlements import Entitlements, fingerprint
from shared.market.fetcher import Fetcher
from shared.market.flights import Flights
from shared.market.gaps import expected
from shared.market.health import Health
from shared.market.library import Library
from shared.market.models import EPOCH, Adjustment, Bar, Fetched, Interval, Quote, instant_of
from shared.market.ports import Turn
from shared.market.registry import providers as registered
from shared.market.registry import windows_of
from shared.market.sessions import calendar
from shared.market.stores import Bars, Quotes, SeriesStore
from shared.market.throttle import Throttle
from shared.settings import Plan

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
BEGIN = datetime(2013, 1, 3, tzinfo=UTC)
OPENS_AT, CLOSES_AT = BEGIN + 14.5 * HOUR, BEGIN + 21 * HOUR
CLOSED_BEFORE = CLOSES_AT - DAY
"""An ordinary Thursday in New York, and the close before it."""
DELAY = 15 * MINUTE
QUOTE_LIMIT = 20 * MINUTE
SYMBOLS = [f"S{n:02}" for n in range(24)]
PLANS: dict[str, Plan] = {"alpha_vantage": "premium", "finnhub": "free", "twelve_data": "free", "polygon": "free"}
CASES = {Interval.DAY: "daily bars", Interval.HOUR: "hourly bars", Interval.MINUTE: "minute bars"}


class Fault(StrEnum):
    """What a provider does instead of what it should."""

    CUT = "cuts the connection"
    HANGS = "does not answer"
    TRUNCATED = "sends half of its JSON"
    HTML = "sends a page with status 503"
    THROTTLES = "answers 429"
    DAY_SPENT = "says that the day is spent"
    STALE = "answers with yesterday's data and status 200"
    SLOW = "takes its time"
    KEY = "does not know the key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A time in which a provider has a fault."""

    begin: datetime
    end: datetime
    fault: Fault


def weather(dice: random.Random, *, begin: datetime, end: datetime) -> list[Episode]:
    """The bad times of one provider: about a third of the day, from seconds to an hour and a half each."""
    episodes: list[Episode] = []
    at = begin
    while True:
        at += timedelta(minutes=dice.expovariate(1 / 30))
        if at >= end:
            return episodes
        until = at + timedelta(minutes=min(dice.expovariate(1 / 15), 90))
        episodes.append(Episode(begin=at, end=until, fault=dice.choice(list(Fault))))
        at = until


def price_of(at: datetime) -> float:
    """A price that says which minute it is of."""
    return 1.0 + (at - EPOCH) / MINUTE / 1000


def instant_behind(price: float) -> datetime:
    """The minute that a price is of."""
    return EPOCH + round((price - 1.0) * 1000) * MINUTE


def last_trade(now: datetime) -> datetime:
    """When anything was traded last, as of *now* on this day."""
    if now < OPENS_AT:
        return CLOSED_BEFORE
    return min(now, CLOSES_AT).replace(second=0, microsecond=0)


@dataclass(slots=True, kw_only=True)
class Seller:
    """A provider of made-up prices that are true about their time, and of every fault its weather has."""

    name: str
    clock: StoppedClock
    dice: random.Random
    episodes: Sequence[Episode]
    hiccups: float = 0.01
    unknown: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    has_live_quotes: bool = True
    calls_made: Counter[str] = field(default_factory=Counter)

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        return 1

    async def bars(
        self,
        symbol: str,
        interval: Interval,
        *,
        since: datetime | None,
        now: datetime,
        turn: Turn,
        until: datetime | None = None,
    ) -> Fetched:
        newest = await self._call(symbol, CASES[interval], turn)
        span = {Interval.DAY: 60 * DAY, Interval.HOUR: 10 * DAY, Interval.MINUTE: 2 * DAY}[interval]
        closes = [instant_of(m) for m in expected(calendar(), interval, since=newest - span, until=newest)]
        wanted = [at for at in closes if since is None or at >= since]
        return Fetched(
            symbol=symbol,
            interval=interval,
            provider=self.name,
            adjustment=Adjustment.RAW,
            bars=tuple(_bar(at, interval) for at in wanted),
        )

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        newest = await self._call(symbol, "quotes", turn)
        as_of = last_trade(newest)
        if not self.has_live_quotes and newest < CLOSES_AT:
            as_of = CLOSED_BEFORE
        return Quote(symbol=symbol, price=price_of(as_of), previous_close=None, as_of=as_of, provider=self.name)

    async def _call(self, symbol: str, case: str, turn: Turn) -> datetime:
        """Make one call, with all that can happen to it; returns the instant its data are of."""
        endpoint = next(name for name, e in registered()[self.name].endpoints.items() if case in e.use_cases)
        async with turn(endpoint):
            fault = next((e.fault for e in self.episodes if e.begin <= self.clock.now() < e.end), None)
            if fault is None and self.dice.random() < self.hiccups:
                fault = Fault.CUT
            self.calls_made[fault or "answers"] += 1
            self.clock.at += timedelta(seconds=self.dice.uniform(0.05, 0.4))
            self._react(fault)
            if endpoint in self.refuses:
                raise NotEntitledError(f"the plan at {self.name} does not include {endpoint}")
            if symbol in self.unknown:
                raise UnknownSymbolError(f"{self.name} knows no symbol {symbol}")
            return self.clock.now() - DAY if fault is Fault.STALE else self.clock.now()

    def _react(self, fault: Fault | None) -> None:
        match fault:
            case Fault.HANGS:
                self.clock.at += 8 * SECOND
                raise UnavailableError(f"{self.name} gave no answer (TimeoutError)")
            case Fault.SLOW:
                self.clock.at += timedelta(seconds=self.dice.uniform(2, 6))
            case Fault.CUT | Fault.TRUNCATED | Fault.HTML:
                raise UnavailableError(f"{self.name} {fault}")
            case Fault.THROTTLES:
                wait = self.dice.choice([None, SECOND, 5 * SECOND, MINUTE])
                raise RateLimitedError(f"{self.name} {fault}", retry_after=wait)
            case Fault.DAY_SPENT:
                raise DailyQuotaError(f"{self.name} {fault}", retry_after=None)
            case Fault.KEY:
                raise ConfigurationError(f"{self.name} {fault}")


def _bar(closed_at: datetime, interval: Interval) -> Bar:
    is_day = interval is Interval.DAY
    opened_at = calendar().bar_of_date(closed_at.date())[0] if is_day else closed_at - interval.span
    price = price_of(closed_at)
    return Bar(opened_at=opened_at, closed_at=closed_at, open=price, high=price, low=price, close=price, volume=1000.0)


class _Nobody:
    """A topic nobody listens to."""

    async def publish(self, events: Sequence[Event]) -> None:
        return

    async def close(self) -> None:
        return


@dataclass(slots=True)
class House:
    """Fetcher and library over one storage, on a simulated clock."""

    clock: StoppedClock
    store: SQLiteDocuments
    sellers: Sequence[Seller]
    fetcher: Fetcher
    library: Library

    @classmethod
    def of(cls, clock: StoppedClock, sellers: Sequence[Seller], store: SQLiteDocuments, *, seed: int) -> "House":
        """One instance of the app over *store*."""

        async def sleep(seconds: float) -> None:
            clock.at += timedelta(seconds=seconds)
            await asyncio.sleep(0)

        keys = {seller.name: fingerprint(f"key of {seller.name}") for seller in sellers}
        fetcher = Fetcher(
            providers=sellers,
            throttles={
                s.name: Throttle(
                    store, clock, s.name, windows_of(s.name, PLANS[s.name]), sleep=sleep, dice=random.Random(seed)
                )
                for s in sellers
            },
            health=Health(store, clock, keys),
            entitlements=Entitlements(store, clock, keys),
            wall=clock,
            market=clock,
            delay=DELAY,
            plans=PLANS,
            dice=random.Random(seed),
            sleep=sleep,
        )
        library = Library(
            documents=store,
            series=SeriesStore(store, clock),
            bars_held=Bars(store, clock),
            quotes=Quotes(store, clock),
            fetcher=fetcher,
            flights=Flights(documents=store, wall=clock),
            callers=Callers(documents=store, wall=clock, allowed=10**6),
            publisher=_Nobody(),
            wall=clock,
            market=clock,
            delay=DELAY,
        )
        return cls(clock, store, sellers, fetcher, library)


@dataclass(slots=True)
class Tally:
    """How the day's requests went."""

    requests: int = 0
    answered: int = 0
    fresh: int = 0
    falsely_fresh: int = 0
    troubles: Counter[str] = field(default_factory=Counter)


def four_sellers(clock: StoppedClock, seed: int, *, begin: datetime, end: datetime) -> list[Seller]:
    """The day's providers; around noon in New York all of them are down together for a while."""
    noon = Episode(begin=BEGIN + 17 * HOUR, end=BEGIN + 17.2 * HOUR, fault=Fault.HANGS)
    dice = random.Random(seed)
    sellers = []
    for name in PLANS:
        own = random.Random(dice.random())
        sellers.append(Seller(name=name, clock=clock, dice=own, episodes=[noon, *weather(own, begin=begin, end=end)]))
    _, finnhub, twelve_data, polygon = sellers
    finnhub.refuses = frozenset({"stock/candle"})
    twelve_data.unknown = frozenset(SYMBOLS[:2])
    polygon.has_live_quotes = False
    return sellers


async def ask(house: House, dice: random.Random, tally: Tally) -> None:
    """One request of an identified caller, and whether its answer is what it claims to be."""
    symbol, caller = dice.choice(SYMBOLS), Caller(id="somebody")
    interval = dice.choices([None, Interval.DAY, Interval.HOUR, Interval.MINUTE], [60, 25, 10, 5])[0]
    asked_at = house.clock.now()
    deadline = asked_at + 10 * SECOND
    tally.requests += 1
    try:
        if interval is None:
            quote = await house.library.quote(symbol, caller=caller, deadline=deadline)
            if quote is None:
                return
            of, claims_fresh = instant_behind(quote.quote.price), not quote.is_stale
            is_fresh = of >= _oldest_fresh_quote(asked_at)
        else:
            days = {Interval.DAY: 30, Interval.HOUR: 7, Interval.MINUTE: 1}[interval]
            answer = await house.library.bars(
                symbol, interval, since=BEGIN - days * DAY, caller=caller, deadline=deadline
            )
            if not len(answer.columns):
                return
            of, claims_fresh = instant_behind(answer.columns.close[-1]), not answer.is_stale
            is_fresh = of >= _newest_bar(interval, asked_at)
    except TroopError as e:
        tally.troubles[f"{type(e).__name__}: {e}"[:100]] += 1
        return
    tally.answered += 1
    tally.fresh += claims_fresh
    tally.falsely_fresh += claims_fresh and not is_fresh


def _oldest_fresh_quote(now: datetime) -> datetime:
    if OPENS_AT <= now < CLOSES_AT:
        return now - QUOTE_LIMIT
    return CLOSED_BEFORE if now < OPENS_AT else CLOSES_AT


def _newest_bar(interval: Interval, now: datetime) -> datetime:
    """The close of the newest bar that can be had: providers need DELAY to make it."""
    at = now - DELAY
    if at < OPENS_AT + interval.span or (interval is Interval.DAY and at < CLOSES_AT):
        return CLOSED_BEFORE
    if at >= CLOSES_AT:
        return CLOSES_AT
    return OPENS_AT + (at - OPENS_AT) // interval.span * interval.span


async def day(seed: int, *, requests: int, begin: datetime = BEGIN, lasts: timedelta = DAY) -> tuple[House, Tally]:
    """Let *requests* come in evenly from *begin* on."""
    clock = StoppedClock(begin)
    store = SQLiteDocuments(":memory:", clock)
    house = House.of(clock, four_sellers(clock, seed, begin=begin, end=begin + lasts), store, seed=seed)
    dice, tally = random.Random(seed + 1), Tally()
    for number in range(requests):
        # Slow calls move the clock past the next request's time; it is asked then, late.
        clock.at = max(clock.at, begin + lasts * number / requests)
        await ask(house, dice, tally)
    return house, tally


async def figures(*, seed: int = 4, requests: int = 10_000) -> dict[str, float]:
    """The day's figures; progress and what went wrong are told on stderr."""
    house, tally = await day(seed, requests=requests)
    await house.store.close()
    calls: Counter[str] = Counter()
    for seller in house.sellers:
        calls += seller.calls_made
        say(f"{seller.name}: " + ", ".join(f"{n} x {what}" for what, n in seller.calls_made.most_common()))
    for text, n in tally.troubles.most_common(5):
        say(f"unanswered {n} x {text}")
    return {
        "answered_share": tally.answered / tally.requests,
        "falsely_fresh": float(tally.falsely_fresh),
        "fresh_share": tally.fresh / tally.requests,
        "requests": float(tally.requests),
        "provider_calls": float(calls.total()),
        "faulty_calls": float(calls.total() - calls["answers"]),
    }


if __name__ == "__main__":
    report("faults", asyncio.run(figures()))
