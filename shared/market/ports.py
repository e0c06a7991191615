"""What the house asks of market-data providers."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Protocol

from shared.market.models import CorporateAction, EarningsDate, Fetched, Interval, NewsItem, Quote


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an answer's rate headers said of one window; None: not said."""

    amount: int | None = None
    left: int | None = None
    resets_at: datetime | None = None
    span: timedelta | None = None


@dataclass(slots=True)
class Call:
    """One call under way; the adapter writes down here what its answer said of the quota."""

    limits: Limits | None = None


class Turn(Protocol):
    """
    Leave to make calls for one request: it waits for the quota, counts, and learns from how each call ends.

    An adapter enters it before every HTTP call and raises the call's trouble inside it. Entering raises
    QuotaSpentError when the next free instant lies behind the request's deadline, and NotEntitledError when
    this key was refused that endpoint, or that parameter of it, before.
    """

    def __call__(self, endpoint: str, *, units: int = 1, parameter: str = "") -> AbstractAsyncContextManager[Call]:
        """Wait until the call may leave; *units* multiply the endpoint's weight (symbols, thousands of rows)."""
        ...

    def may(self, endpoint: str, parameter: str = "") -> bool:
        """Whether the key may use the endpoint with *parameter*, as far as we have been told."""
        ...


class Provider(Protocol):
    """
    Sells us market data: a call of these is one call on our quota, or a few where history comes in slices.

    Raises RateLimitedError (slow down), UnavailableError (down, or an answer we cannot judge),
    NotEntitledError (not on our plan), UnknownSymbolError, RefusedError (any other permanent no),
    ConfigurationError (the key is wrong). No text ever carries the key.
    """

    name: str

    def calls(self, interval: Interval, *, since: datetime | None, now: datetime) -> int:
        """How many calls ``bars`` will make, as far as can be told beforehand."""
        ...

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
        """
        Fetch bars closing after *since* (None: as far back as the plan allows) up to *until*, or to *now*.

        *now* is market time. The answer may hold older and newer bars than asked for, and a last bar that has not
        closed yet; the caller decides. Where history is cut in slices the oldest come first and the caller goes on.
        """
        ...

    async def quote(self, symbol: str, *, turn: Turn) -> Quote:
        """Fetch the last price."""
        ...


class SellsNews(Protocol):
    """A provider that also sells news."""

    name: str

    async def news(self, symbol: str, *, since: datetime, until: datetime, turn: Turn) -> Sequence[NewsItem]:
        """Fetch articles about *symbol* published from *since* to *until*, oldest first."""
        ...


class SellsEarnings(Protocol):
    """A provider that also sells the earnings calendar."""

    name: str

    async def earnings(
        self, *, first: date, last: date, turn: Turn, symbol: str | None = None
    ) -> Sequence[EarningsDate]:
        """Fetch the reports due from *first* through *last*, of *symbol* or of all."""
        ...


class SellsActions(Protocol):
    """A provider that also sells splits and dividends."""

    name: str

    async def actions(self, symbol: str, *, turn: Turn) -> Sequence[CorporateAction]:
        """Fetch every split and dividend known of *symbol*, oldest first."""
        ...
