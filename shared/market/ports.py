"""What the house asks of market-data providers."""

from datetime import datetime
from typing import Protocol

from shared.market.models import Fetched, Interval, Quote


class Provider(Protocol):
    """
    Sells us market data: a call of these is one call on our quota, or a few where history comes in slices.

    Raises RateLimitedError (slow down), UnavailableError (down, or an answer we cannot judge),
    NotEntitledError (not on our plan), UnknownSymbolError, RefusedError (any other permanent no),
    ConfigurationError (the key is wrong). No text ever carries the key.
    """

    name: str

    async def bars(self, symbol: str, interval: Interval, *, since: datetime | None, now: datetime) -> Fetched:
        """
        Fetch bars closing after *since* (None: as far back as the plan allows) up to *now*.

        *now* is market time. The answer may hold older bars than asked for, and a last bar that has not
        closed yet; the caller decides.
        """
        ...

    async def quote(self, symbol: str) -> Quote:
        """Fetch the last price."""
        ...
