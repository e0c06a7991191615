"""
What the reading of all providers' answers has in common.

A provider's documented refusals are a table of rules, judged from the top; numbers, stamps and texts from outside
are believed only after they were looked at.
"""

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from shared.errors import (
    DailyQuotaError,
    InvalidPayloadError,
    RateLimitedError,
    TransientError,
    TroopError,
    UnavailableError,
)
from shared.market.models import CorporateAction, Quote
from shared.market.sessions import Calendar
from shared.telemetry import redact

SHORTEST_KEY = 6
"""What is shorter (``demo``) stands in ordinary sentences; a real key does not."""
EPOCH_BEGINS = 1e9
"""A reset above this is an instant; below it is a number of seconds from now."""

UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, OSError, InvalidPayloadError)
"""What reading a row of unknown shape may raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """
    One documented refusal: an answer with one of these statuses that says one of these phrases is this error.

    *tells* is our sentence; it may show {status}, {symbol}, {plan} and, taken clean of secrets, what was {said}.
    """

    error: type[TroopError]
    tells: str
    says: tuple[str, ...] = ()
    status: Container[int] | None = None
    wait: timedelta | None = None

    def fits(self, status: int, said: str) -> bool:
        """Whether the refusal is this one; *said* is in lower case."""
        in_status = self.status is None or status in self.status
        return in_status and (not self.says or any(phrase in said for phrase in self.says))


def judge(
    rules: Sequence[Rule],
    *,
    status: int,
    said: str,
    key: str,
    symbol: str,
    plan: str,
    wait: timedelta | None = None,
    day: timedelta | None = None,
) -> TroopError:
    """
    Turn a refusal into our error by the first rule that fits; the last rule of a table fits everything.

    *wait* and *day* are how long a throttle and a spent day last where the rule itself does not say.
    """
    rule = next(rule for rule in rules if rule.fits(status, said.lower()))
    text = rule.tells.format(status=status, said=repr(shown(said, key)), symbol=clean(symbol)[:20], plan=plan)
    if not issubclass(rule.error, TransientError):
        return rule.error(text)
    default = None
    if issubclass(rule.error, RateLimitedError):
        default = day if issubclass(rule.error, DailyQuotaError) else wait
    return rule.error(text, retry_after=rule.wait or default)


def shown(text: str, key: str) -> str:
    """The beginning of a foreign sentence, as an error or a log may show it."""
    if key:
        text = re.sub(re.escape(key), "***", text, flags=re.IGNORECASE)
    return redact(clean(text))[:120]


def clean(value: object) -> str:
    """A text that can be stored: JSON can spell half a surrogate pair, UTF-8 cannot."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def keyless(body: bytes, key: str) -> bytes:
    """The answer without the key, wherever the other side echoed it."""
    if len(key) < SHORTEST_KEY:
        return body
    return re.sub(re.escape(key.encode()), b"***", body, flags=re.IGNORECASE)


def json_of(body: bytes) -> object:
    """What the JSON says, or None where it is none: a page in HTML, CSV, half an answer."""
    try:
        found: object = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return found


def number_of(value: object) -> float | None:
    """A finite number, also one written as a string; None for everything else."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def above_zero(value: object) -> float | None:
    """A finite number above 0, or None: a price or a factor that is 0 stands for one nobody knows."""
    number = number_of(value)
    return number if number is not None and number > 0 else None


def count_of(headers: Mapping[str, str], name: str) -> int | None:
    """A header's whole number that is not below 0, or None."""
    number = number_of(headers.get(name))
    return int(number) if number is not None and number >= 0 else None


def instant_of_epoch(seconds: object) -> datetime:
    """
    Read seconds since 1970.

    Raises:
        ValueError: they name no instant.

    """
    number = number_of(seconds)
    if number is None or number <= 0:
        raise ValueError("it has no time")
    try:
        return datetime.fromtimestamp(number, UTC)
    except (OverflowError, OSError) as e:
        raise ValueError("its time is in no calendar") from e


def reset_of(headers: Mapping[str, str], name: str, now: datetime) -> datetime | None:
    """When a window ends, from a header that holds an epoch or a number of seconds: both are seen."""
    number = number_of(headers.get(name))
    if number is None or number < 0:
        return None
    try:
        return datetime.fromtimestamp(number, UTC) if number > EPOCH_BEGINS else now + timedelta(seconds=number)
    except (OverflowError, OSError, ValueError):
        return None


def readable[T](rows: object, read: Callable[[Any], T | None], *, what: str) -> list[T]:
    """
    Read what can be read of a list of rows; None from *read* leaves a row out.

    Raises:
        UnavailableError: it is no list, or not one of its rows can be read; *what* begins the sentence.

    """
    if not isinstance(rows, list):
        raise UnavailableError(f"{what} that are no list")
    read_rows: list[T] = []
    spoilt = 0
    for row in rows:
        try:
            found = read(row)
        except UNREADABLE:
            spoilt += 1
        else:
            if found is not None:
                read_rows.append(found)
    if spoilt and spoilt == len(rows):
        raise UnavailableError(f"{what} of which not one can be read")
    return read_rows


def every[T](rows: object, read: Callable[[Any], T], *, what: str) -> list[T]:
    """
    Read all of a list of rows: splits of which one is missing would falsify prices.

    Raises:
        UnavailableError: it is no list, or one row cannot be read; *what* begins the sentence.

    """
    if not isinstance(rows, list):
        raise UnavailableError(f"{what} that are no list")
    try:
        return [read(row) for row in rows]
    except UNREADABLE as e:
        raise UnavailableError(f"{what} that cannot be read ({type(e).__name__})") from e


def factor_of(new: object, old: object) -> float:
    """
    How many new shares there are for one old.

    Raises:
        ValueError: one of the two is no number above 0.

    """
    shares, before = above_zero(new), above_zero(old)
    if shares is None or before is None:
        raise ValueError("a split needs two numbers above 0")
    return shares / before


def paid(value: object) -> float:
    """
    A dividend; nothing where the amount is not known yet.

    Raises:
        ValueError: it is no amount.

    """
    if value is None or value in ("None", ""):
        return 0.0
    amount = number_of(value)
    if amount is None or amount < 0:
        raise ValueError("a dividend is an amount not below 0")
    return amount


def actions_of(
    symbol: str, provider: str, *, splits: Iterable[tuple[date, float]], dividends: Iterable[tuple[date, float]] = ()
) -> tuple[CorporateAction, ...]:
    """One action a day, oldest first, of splits and dividends that were told apart."""
    split: dict[date, float] = {}
    dividend: dict[date, float] = {}
    for day, factor in splits:
        split[day] = split.get(day, 1.0) * factor
    for day, amount in dividends:
        dividend[day] = dividend.get(day, 0.0) + amount
    return tuple(
        CorporateAction(
            symbol=symbol, day=day, split=split.get(day, 1.0), dividend=dividend.get(day, 0.0), provider=provider
        )
        for day in sorted(split.keys() | dividend.keys())
        if split.get(day, 1.0) != 1.0 or dividend.get(day)
    )


def fresh(quote: Quote, *, title: str, market: Calendar, now: datetime, grace: timedelta) -> Quote:
    """
    The quote, unless it is from before the last session that closed at least *grace* ago.

    Raises:
        UnavailableError: it is that old, which providers serve with HTTP 200; the text names its age.

    """
    session = market.previous_close(now - grace)
    if quote.as_of >= session.opens_at:
        return quote
    age = now - quote.as_of
    raise UnavailableError(
        f"{title} sent a quote of {quote.symbol} from {quote.as_of:%Y-%m-%d %H:%M} UTC, {age.days} days "
        f"{age.seconds // 3600} hours old: from before the session of {session.date}"
    )
