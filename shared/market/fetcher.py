"""Permission first, then the call, then what the answer teaches us about the quota."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from shared.errors import NotEntitledError, PermanentError, QuotaSpentError, RateLimitedError, UnknownSymbolError
from shared.market.models import Fetched, Interval, Quote
from shared.market.ports import Provider
from shared.market.throttle import Throttle
from shared.retry import retry
from shared.telemetry import get_logger, span

log = get_logger(__name__)

REFUSED_WAIT = timedelta(seconds=10)
"""How long to leave a provider alone that refused without saying for how long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """
    Asks providers in order of preference, each under its throttle.

    A series stays with the provider that answered first, because adjusted and raw prices never mix. So only a
    lasting no leads to the next provider; what passes by itself is waited for.
    """

    providers: Sequence[Provider]
    throttles: Mapping[str, Throttle]

    async def bars(
        self, symbol: str, interval: Interval, *, since: datetime | None, now: datetime, provider: str | None
    ) -> Fetched:
        """
        Fetch bars closing after *since*; from *provider* alone when the series has one.

        Raises what the first provider asked raised (the others only stood in): RateLimitedError,
        UnavailableError, RefusedError, ConfigurationError.
        """
        able = [p for p in self.providers if provider in (None, p.name)]

        async def some(p: Provider) -> Fetched:
            fetched = await p.bars(symbol, interval, since=since, now=now)
            if not fetched.bars and p is not able[0]:
                raise UnknownSymbolError(f"{p.name} has no bars of {symbol}")  # a stand-in's silence proves nothing
            return fetched

        return await self._first(able, some, symbol)

    async def quote(self, symbol: str) -> Quote:
        """Fetch the last price; quotes are cheapest where they are not also history, so the order is reversed."""
        return await self._first(list(reversed(self.providers)), lambda p: p.quote(symbol), symbol)

    async def _first[T](self, able: Sequence[Provider], call: Callable[[Provider], Awaitable[T]], symbol: str) -> T:
        trouble: Exception | None = None
        for provider in able:
            try:
                return await retry(lambda provider=provider: self._ask(provider, call), attempts=2)  # type: ignore[misc]
            except (NotEntitledError, UnknownSymbolError) as e:
                log.info("provider.passed_over", provider=provider.name, symbol=symbol, reason=str(e))
                # The answer of the first choice is the one to report: the others only stood in.
                trouble = trouble or e
        raise trouble or PermanentError(f"no provider is configured for {symbol}")

    async def _ask[T](self, provider: Provider, call: Callable[[Provider], Awaitable[T]]) -> T:
        throttle = self.throttles[provider.name]
        await throttle.permit()
        with span("provider.call", provider=provider.name):
            try:
                return await call(provider)
            except QuotaSpentError:
                raise  # our own restraint, between the calls of one fetch: the provider refused nothing
            except RateLimitedError as e:
                await throttle.refused(e.retry_after or REFUSED_WAIT)
                raise
