"""Whom to ask, when, and what to make of a no: one answer out of several providers under their quotas."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import cast

from shared.clock import Clock
from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    NotEntitledError,
    PermanentError,
    RateLimitedError,
    RefusedError,
    TransientError,
    TroopError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.market.entitlements import Entitlements, Refusal
from shared.market.health import Health, Kind, LeftAloneError, Report
from shared.market.models import (
    Adjustment,
    Bar,
    CorporateAction,
    EarningsDate,
    Fetched,
    Interval,
    NewsItem,
    Priority,
    Quote,
)
from shared.market.ports import Provider, SellsActions, SellsEarnings, SellsNews, Turn
from shared.market.quota import ThrottleState
from shared.market.registry import providers as registered
from shared.market.registry import weight_of
from shared.market.sessions import calendar
from shared.market.throttle import PATIENCE, Throttle
from shared.market.turns import ProviderTurn
from shared.telemetry import get_logger

log = get_logger(__name__)

SOON = timedelta(seconds=1.5)
"""While others could answer a throttled provider is waited for no longer; when they could not, until the deadline."""
RETRY_WAIT = (0.05, 0.3)
"""Between these many seconds a hiccup is given to pass, once a provider."""
SAME = 1e-3
"""Relative difference up to which two providers mean the same close: they round, and their last trade may differ."""
LIVE_QUOTE = timedelta(minutes=20)
"""In an open session an older quote is no longer fresh."""
USUALLY = 0.5
QUOTA_VIEW = timedelta(minutes=1)
STATUS_VIEW = timedelta(seconds=5)
LONG_WINDOW = timedelta(minutes=1)
"""What is left of shorter windows says nothing about the next minute."""

LASTING = timedelta(minutes=5)
"""A breaker that waits so long has been open for longer, or for a key that is wrong."""

PREFERENCES: Mapping[Kind, Sequence[str]] = {
    Kind.QUOTE: ("finnhub", "twelve_data", "polygon", "alpha_vantage"),
    Kind.EARNINGS: ("finnhub", "twelve_data", "alpha_vantage"),
}
"""Who is asked first where it is not the order of the settings: quotes of those who have the last price, and many
calls; the calls of whoever keeps the histories are too good for them."""


USE_CASES: Mapping[Kind | Interval, Sequence[str]] = {
    Interval.DAY: ("daily bars",),
    Interval.HOUR: ("hourly bars",),
    Interval.MINUTE: ("minute bars",),
    Kind.QUOTE: ("quotes",),
    Kind.NEWS: ("news",),
    Kind.EARNINGS: ("earnings calendar",),
    Kind.ACTIONS: ("splits", "dividends"),
}
"""What the registry calls what we ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderStatus:
    """All there is to know of a provider, for people."""

    provider: str
    plan: str
    health: Report
    throttle: ThrottleState
    not_entitled: Sequence[Refusal]

    @property
    def hit_rate(self) -> float | None:
        """The share of requests for its data that needed no call."""
        hits = sum(self.health.hits.values())
        return hits / (hits + self.health.calls) if hits + self.health.calls else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    kind: Kind
    symbol: str | None
    priority: Priority
    deadline: datetime | None
    interval: Interval | None = None
    only: str | None = None
    but: str | None = None
    is_first: bool = False


class _NothingThereError(UnknownSymbolError):
    """A stand-in has nothing, which proves nothing."""


class _OutdatedError(UnavailableError):
    """An answer that is older than it could be."""


@dataclass(slots=True, kw_only=True)
class Fetcher:
    """
    Asks the provider that does best, under its throttle, and the next when it must.

    A lasting no and a provider that is down lead to the next at once or after one quick retry; a throttled one is
    waited for within the deadline when nobody can answer sooner. When nobody can, the trouble of the first choice is
    raised: RateLimitedError, UnavailableError, RefusedError, ConfigurationError; where that is that it knows no such
    symbol while somebody else was not able to say, it is theirs: asked later they may know it. Without a deadline a
    call may wait four seconds for its permit. *wall* is the providers' clock, *market* that of the prices.
    """

    providers: Sequence[Provider]
    throttles: Mapping[str, Throttle]
    health: Health
    entitlements: Entitlements
    wall: Clock
    market: Clock
    delay: timedelta = timedelta(minutes=15)
    plans: Mapping[str, str] = field(default_factory=dict)
    preferences: Mapping[Kind, Sequence[str]] = field(default_factory=lambda: PREFERENCES)
    weigh: Callable[[str, str], int] = weight_of
    dice: random.Random = field(default_factory=random.Random)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _left: dict[str, tuple[datetime, float | None]] = field(default_factory=dict, init=False)
    _adjustments: dict[tuple[str, Interval], Adjustment] = field(default_factory=dict, init=False)
    _shown: tuple[datetime, list[ProviderStatus]] | None = field(default=None, init=False)

    async def bars(
        self,
        symbol: str,
        interval: Interval,
        *,
        since: datetime | None,
        now: datetime,
        until: datetime | None = None,
        provider: str | None = None,
        priority: Priority = Priority.LIVE,
        deadline: datetime | None = None,
        is_first: bool = False,
    ) -> Fetched:
        """
        Fetch bars closing after *since* up to *until*, or to *now* (market time).

        With *provider* that one alone is asked: adjusted and raw prices never mix, so a series stays where it began.
        So where these are its first bars (*is_first*) the configured order decides, and only a lasting no or a long
        outage leads on: a busy moment must not choose for years.
        """
        wanted = _Wanted(
            kind=Kind.BARS,
            symbol=symbol,
            interval=interval,
            priority=priority,
            deadline=deadline,
            only=provider,
            is_first=is_first,
        )
        first = self._preferred(wanted)[0].name

        async def some(p: Provider, turn: Turn) -> Fetched:
            fetched = await self._bars_of(p, turn, symbol, interval, since, now, until)
            if not fetched.bars and p.name != first:
                raise _NothingThereError(f"{p.name} has no bars of {symbol}")
            return fetched

        return await self._answer(wanted, some)

    async def stand_in(
        self,
        symbol: str,
        interval: Interval,
        *,
        held: Sequence[Bar],
        adjustment: Adjustment,
        instead_of: str,
        now: datetime,
        priority: Priority = Priority.LIVE,
        deadline: datetime | None = None,
    ) -> Fetched:
        """
        Fetch what comes behind *held*, the last bars of a series, from another provider than *instead_of*.

        The answer holds at least one of them again, equally adjusted and with the same close.

        Raises:
            RefusedError: another provider says something else of a bar we hold; the text names both values.
            TroopError: as ``bars``; nobody else could be asked.

        """
        if not held:
            raise InvalidPayloadError(f"{symbol}: to change its provider, bars of it must be held")
        since = held[-2].closed_at if len(held) > 1 else held[-1].opened_at
        wanted = _Wanted(
            kind=Kind.BARS, symbol=symbol, interval=interval, priority=priority, deadline=deadline, but=instead_of
        )
        disagreement: RefusedError | None = None

        async def agreeing(p: Provider, turn: Turn) -> Fetched:
            nonlocal disagreement
            sold = self._adjustments.get((p.name, interval), adjustment)
            if sold is adjustment:
                fetched = await self._bars_of(p, turn, symbol, interval, since, now, None)
                difference = _difference(fetched, held, adjustment)
                if difference is None:
                    return fetched
            else:  # known from an earlier answer: no call is spent to hear it again
                difference = _other_adjustment(p.name, sold, adjustment)
            refused = RefusedError(f"{symbol} cannot go on with {p.name}: {difference}")
            disagreement = disagreement or refused
            raise refused

        try:
            return await self._answer(wanted, agreeing)
        except TroopError:
            if disagreement:
                raise disagreement from None
            raise

    async def quote(
        self, symbol: str, *, priority: Priority = Priority.LIVE, deadline: datetime | None = None
    ) -> Quote:
        """
        Fetch the last price.

        Where the answer is older than it could be one other provider is asked, if it may know better. A quote from
        before the last close is taken only when nobody has a newer one.
        """
        wanted = _Wanted(kind=Kind.QUOTE, symbol=symbol, priority=priority, deadline=deadline)
        now = self.market.now()
        last_close = calendar().previous_close(now).closes_at
        young = now - LIVE_QUOTE if calendar().session_at(now) else last_close
        outdated: list[Quote] = []

        async def newest(p: Provider, turn: Turn) -> Quote:
            quote = await p.quote(symbol, turn=turn)
            self.health.judged(p.name, Kind.QUOTE, is_fresh=quote.as_of >= young)
            if quote.as_of >= young:
                return quote
            outdated.append(quote)
            best = max(outdated, key=lambda q: q.as_of)
            asked = {q.provider for q in outdated}
            if best.as_of >= last_close and (len(asked) > 1 or not self._may_be_fresher(wanted, asked)):
                return best
            raise _OutdatedError(f"{p.name} has a quote of {symbol} of {quote.as_of:%Y-%m-%d %H:%M} UTC only")

        try:
            return await self._answer(wanted, newest)
        except TroopError:
            if outdated:
                return max(outdated, key=lambda q: q.as_of)
            raise

    async def news(
        self,
        symbol: str,
        *,
        since: datetime,
        until: datetime,
        priority: Priority = Priority.ASKED,
        deadline: datetime | None = None,
    ) -> Sequence[NewsItem]:
        """Fetch articles about *symbol* published from *since* to *until*, oldest first."""
        wanted = _Wanted(kind=Kind.NEWS, symbol=symbol, priority=priority, deadline=deadline)
        return await self._answer(
            wanted, lambda p, turn: cast("SellsNews", p).news(symbol, since=since, until=until, turn=turn)
        )

    async def earnings(
        self,
        *,
        first: date,
        last: date,
        symbol: str | None = None,
        priority: Priority = Priority.ASKED,
        deadline: datetime | None = None,
    ) -> Sequence[EarningsDate]:
        """Fetch the reports due from *first* through *last*, of *symbol* or of all."""
        wanted = _Wanted(kind=Kind.EARNINGS, symbol=symbol, priority=priority, deadline=deadline)
        return await self._answer(
            wanted,
            lambda p, turn: cast("SellsEarnings", p).earnings(first=first, last=last, symbol=symbol, turn=turn),
        )

    async def actions(
        self,
        symbol: str,
        *,
        provider: str | None = None,
        priority: Priority = Priority.ASKED,
        deadline: datetime | None = None,
    ) -> Sequence[CorporateAction]:
        """Fetch every split and dividend known of *symbol*, oldest first; from *provider* alone when it is given."""
        wanted = _Wanted(kind=Kind.ACTIONS, symbol=symbol, priority=priority, deadline=deadline, only=provider)
        return await self._answer(wanted, lambda p, turn: cast("SellsActions", p).actions(symbol, turn=turn))

    def count_hit(self, kind: Kind, provider: str | None = None) -> None:
        """What had been fetched before (from *provider*, else the first) saved a call."""
        self.health.count_hit(kind, provider or self.providers[0].name)

    async def status(self) -> list[ProviderStatus]:
        """How every provider does, as of a few seconds ago."""
        now = self.wall.now()
        if self._shown and now - self._shown[0] < STATUS_VIEW:
            return self._shown[1]
        found = []
        for p in self.providers:
            await self.entitlements.load(p.name)
            found.append(
                ProviderStatus(
                    provider=p.name,
                    plan=self.plans.get(p.name, ""),
                    health=await self.health.report(p.name),
                    throttle=await self.throttles[p.name].state(),
                    not_entitled=self.entitlements.refusals(p.name),
                )
            )
        self._shown = (now, found)
        return found

    async def _bars_of(
        self,
        p: Provider,
        turn: Turn,
        symbol: str,
        interval: Interval,
        since: datetime | None,
        now: datetime,
        until: datetime | None,
    ) -> Fetched:
        fetched = await p.bars(symbol, interval, since=since, now=now, until=until, turn=turn)
        self._adjustments[p.name, interval] = fetched.adjustment
        newest = calendar().last_bar_close(interval, now - self.delay)
        if until is None and (since is None or since < newest):
            is_fresh = any(newest <= bar.closed_at <= now for bar in reversed(fetched.bars))
            self.health.judged(p.name, Kind.BARS, is_fresh=is_fresh)
        return fetched

    def _preferred(self, wanted: _Wanted) -> list[Provider]:
        """Who sells it, the first choice first."""
        able = [
            p
            for p in self.providers
            if wanted.only in (None, p.name) and p.name != wanted.but and hasattr(p, wanted.kind)
        ]
        if not able:
            whom = f" ({wanted.only} is not among them)" if wanted.only else ""
            what = f"{wanted.kind} of {wanted.symbol}" if wanted.symbol else str(wanted.kind)
            raise PermanentError(f"no provider is configured for {what}{whom}: see MARKET_PROVIDERS")
        order = list(self.preferences.get(wanted.kind, ()))
        return sorted(able, key=lambda p: order.index(p.name) if p.name in order else len(order))

    async def _answer[T](self, wanted: _Wanted, ask: Callable[[Provider, Turn], Awaitable[T]]) -> T:
        preferred = self._preferred(wanted)
        troubles = await self._known_troubles(wanted, preferred)
        queue: Sequence[Provider] = [p for p in preferred if p.name not in troubles]
        if not wanted.is_first:
            queue = await self._ranked(wanted.kind, queue)
        held: list[tuple[datetime, int]] = []
        for place, p in enumerate(queue):
            if troubles and self._is_late(wanted):
                break
            alone = wanted.is_first or (not held and place == len(queue) - 1)
            try:
                return await self._try(p, wanted, ask, wanted.deadline if alone else self._soon(wanted))
            except (TransientError, RefusedError, ConfigurationError) as e:
                if wanted.is_first and isinstance(e, TransientError) and not _is_lasting(e):
                    raise
                await self._note(p, wanted, e)
                troubles[p.name] = e
                again = self.wall.now() + e.retry_after if isinstance(e, TransientError) and e.retry_after else None
                if again and again <= self._latest(wanted):
                    held.append((again, place))
        for again, place in sorted(held):
            p = queue[place]
            if not isinstance(troubles[p.name], RateLimitedError):  # who is throttled is waited for by its throttle
                await self.sleep(max(0.0, (again - self.wall.now()).total_seconds()))
            try:
                return await self._try(p, wanted, ask, wanted.deadline)
            except (TransientError, RefusedError, ConfigurationError) as e:
                await self._note(p, wanted, e)
                troubles[p.name] = e
        found = [troubles[p.name] for p in preferred if p.name in troubles]
        if isinstance(found[0], UnknownSymbolError):  # the last word only when nobody else may have another
            raise next((e for e in found if isinstance(e, TransientError)), found[0])
        raise found[0]

    async def _try[T](
        self,
        p: Provider,
        wanted: _Wanted,
        ask: Callable[[Provider, Turn], Awaitable[T]],
        first_deadline: datetime | None,
    ) -> T:
        """One provider's answer; what may be a hiccup is tried once more."""
        for is_second in (False, True):
            leave = await self.health.admit(p.name)
            turn = ProviderTurn(
                provider=p.name,
                kind=wanted.kind,
                leave=leave,
                throttle=self.throttles[p.name],
                health=self.health,
                entitlements=self.entitlements,
                wall=self.wall,
                weigh=self.weigh,
                priority=wanted.priority,
                first_deadline=first_deadline,
                deadline=wanted.deadline,
            )
            try:
                answer = await ask(p, turn)
            except UnavailableError as e:
                is_hiccup = turn.has_failed and not leave.probe and e.retry_after is None
                if is_second or not is_hiccup or self._is_late(wanted):
                    raise
            else:
                if wanted.symbol:
                    self.entitlements.known(wanted.kind, wanted.symbol)
                return answer
            finally:
                await turn.end()
            await self.sleep(self.dice.uniform(*RETRY_WAIT))
        raise AssertionError("the second try returns or raises")

    def _may_be_fresher(self, wanted: _Wanted, asked: Container[str]) -> bool:
        """Whether somebody else is not known to be late most of the time."""
        others = [p.name for p in self._preferred(wanted) if p.name not in asked]
        shares = [self.health.freshness(name, wanted.kind) for name in others]
        return any(share is None or share > USUALLY for share in shares)

    async def _known_troubles(self, wanted: _Wanted, preferred: Sequence[Provider]) -> dict[str, Exception]:
        """Who need not be asked, and why."""
        troubles: dict[str, Exception] = {}
        for p in preferred:
            await self.entitlements.load(p.name)
            if refusals := self._refusals(p.name, wanted):
                troubles[p.name] = NotEntitledError(
                    f"the plan at {p.name} includes no {wanted.kind}: {refusals[0].reason} "
                    f"({refusals[0].endpoint}, {refusals[0].recorded_at:%Y-%m-%d})"
                )
        # Who has brought the bars of a series knows its symbol, whatever it says in a weak hour.
        if wanted.symbol is None or wanted.only or wanted.but:
            return troubles
        for name, until in (await self.entitlements.unknown(wanted.kind, wanted.symbol)).items():
            troubles[name] = UnknownSymbolError(
                f"{name} knows no symbol {wanted.symbol}; it is asked again from {until:%Y-%m-%d %H:%M} UTC on"
            )
        return troubles

    def _refusals(self, provider: str, wanted: _Wanted) -> list[Refusal]:
        """Every way to what is wanted, if each of them was refused to the key; else none."""
        facts = registered().get(provider)
        cases = set(USE_CASES[wanted.interval or wanted.kind])
        ways = [name for name, e in facts.endpoints.items() if cases & set(e.use_cases)] if facts else []
        refusals = [self.entitlements.refusal(provider, name) for name in ways]
        return [r for r in refusals if r] if all(refusals) else []

    async def _note(self, p: Provider, wanted: _Wanted, e: Exception) -> None:
        log.info(
            "provider.passed_over",
            provider=p.name,
            asked_for=wanted.kind,
            symbol=wanted.symbol,
            reason=f"{type(e).__name__}: {e}",
        )
        is_verdict = isinstance(e, UnknownSymbolError) and not isinstance(e, _NothingThereError)
        if is_verdict and wanted.symbol and not wanted.only:
            await self.entitlements.learn_unknown(p.name, wanted.kind, wanted.symbol)

    async def _ranked(self, kind: Kind, able: Sequence[Provider]) -> Sequence[Provider]:
        if len(able) < 2:
            return able
        left = {p.name: await self._quota_left(p.name) for p in able}
        by_name = {p.name: p for p in able}
        return [by_name[name] for name in await self.health.order(kind, list(by_name), left)]

    async def _quota_left(self, provider: str) -> float | None:
        """The share left of the scarcest window, as of a minute ago at most; None: not known, or nothing is counted."""
        now = self.wall.now()
        seen_at, left = self._left.get(provider, (None, None))
        if seen_at is not None and now - seen_at < QUOTA_VIEW:
            return left
        try:
            state = await self.throttles[provider].state()
        except TroopError as e:
            log.warning("quota.unread", provider=provider, reason=str(e))
            return left
        shares = [w.left / w.amount for w in state.windows if w.span >= LONG_WINDOW]
        left = min(shares, default=None)
        self._left[provider] = (now, left)
        return left

    def _latest(self, wanted: _Wanted) -> datetime:
        return wanted.deadline or self.wall.now() + PATIENCE

    def _soon(self, wanted: _Wanted) -> datetime:
        return min(self._latest(wanted), self.wall.now() + SOON)

    def _is_late(self, wanted: _Wanted) -> bool:
        return wanted.deadline is not None and self.wall.now() >= wanted.deadline


def _is_lasting(e: TransientError) -> bool:
    """Whether a provider is left alone for so long that somebody else had better begin a series."""
    return isinstance(e, LeftAloneError) and e.retry_after is not None and e.retry_after >= LASTING


def _difference(fetched: Fetched, held: Sequence[Bar], adjustment: Adjustment) -> str | None:
    """In what the answer contradicts the bars held; None: it agrees."""
    if fetched.adjustment is not adjustment:
        return _other_adjustment(fetched.provider, fetched.adjustment, adjustment)
    ours = {bar.closed_at: bar.close for bar in held}
    both = [(bar, ours[bar.closed_at]) for bar in fetched.bars if bar.closed_at in ours]
    if not both:
        return f"it has no bar of {held[-1].closed_at:%Y-%m-%d %H:%M} UTC to compare with ours"
    for bar, close in both:
        if abs(bar.close - close) > SAME * close:
            return f"its close of {bar.closed_at:%Y-%m-%d %H:%M} UTC is {bar.close:g}, ours {close:g}"
    return None


def _other_adjustment(provider: str, sold: Adjustment, ours: Adjustment) -> str:
    return f"the prices of {provider} are {sold}, ours {ours}, and the two never mix"
