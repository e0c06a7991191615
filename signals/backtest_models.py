"""What a backtest is asked, what it is known by, and how far it has come."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from shared.clock import format_instant, parse_instant
from shared.documents import Document
from shared.errors import InvalidPayloadError
from shared.events import fact_id
from shared.market.models import EPOCH, Interval, minute_of
from shared.market.sessions import calendar
from signals.logic.simulation import Rules
from signals.models import Entry, params_digest

MOST_VARIANTS = 500
"""Variants that one backtest may try."""
MOST_SYMBOLS = 20
"""Backtests that one request may ask for."""
SESSION_BARS = {Interval.DAY: 1.0, Interval.HOUR: 7.0, Interval.MINUTE: 390.0}
"""Bars in an exchange session."""
_LATEST = datetime(9000, 1, 1, tzinfo=UTC)


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class _Splits(_Wire):
    """``purge`` and ``embargo`` in bars; at least the horizon of an opinion, which they are unless told."""

    purge: int | None = Field(default=None, ge=0, le=10_000)
    embargo: int | None = Field(default=None, ge=0, le=10_000)
    hold_out: float = Field(default=0.2, ge=0.05, le=0.5)
    """The last share of the bars, looked at once, with the parameters that were chosen on those before."""


class NoValidation(_Wire):
    """The given parameters on all of the bars."""

    kind: Literal["none"] = "none"


class WalkForward(_Splits):
    """
    Learn from the past, be judged on what follows, move on.

    Sizes are in bars. Without them each of the ``n_splits`` tests has as many bars as the training before the first.
    """

    kind: Literal["walk_forward"]
    n_splits: int = Field(default=5, ge=1, le=100)
    train_size: int | None = Field(default=None, ge=20)
    test_size: int | None = Field(default=None, ge=20)
    step: int | None = Field(default=None, ge=1)
    is_anchored: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.train_size is None) != (self.test_size is None):
            raise ValueError("train_size and test_size belong together: give both, or neither and n_splits")
        if self.step is not None and self.test_size is None:
            raise ValueError("step belongs to train_size and test_size")
        return self


class PurgedCV(_Splits):
    """Each block of bars once as the test (or every choice of ``n_test_folds`` blocks), learning from all others."""

    kind: Literal["purged_cv"]
    n_splits: int = Field(default=5, ge=2, le=20)
    n_test_folds: int = Field(default=1, ge=1, le=19)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.n_test_folds >= self.n_splits:
            raise ValueError(f"n_test_folds ({self.n_test_folds}) must be smaller than n_splits ({self.n_splits})")
        if (folds := math.comb(self.n_splits, self.n_test_folds)) > 100:
            raise ValueError(f"{self.n_test_folds} of {self.n_splits} blocks make {folds} folds; 100 is the most")
        return self


def _named(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


type Validation = Annotated[
    NoValidation | WalkForward | PurgedCV,
    Field(discriminator="kind"),
    BeforeValidator(
        _named,
        json_schema_input_type=Literal["none", "walk_forward", "purged_cv"] | NoValidation | WalkForward | PurgedCV,
    ),
]
"""How parameters are judged; its name alone takes the defaults."""


class Request(_Wire):
    """
    What a caller asks for: an entry, or a strategy with parameters; symbols; a range; rules; a validation with a grid.

    ``from`` and ``to`` are dates (the exchange's whole day) or instants with a zone; without them all that is stored.
    """

    entry: str | None = None
    strategy: str | None = None
    params: Mapping[str, FiniteFloat] = {}
    symbol: str | None = None
    symbols: Sequence[str] = Field(default=(), max_length=MOST_SYMBOLS)
    interval: str | None = None
    first: str | None = Field(default=None, alias="from")
    last: str | None = Field(default=None, alias="to")
    rules: Rules = Field(default_factory=Rules)
    validation: Validation = Field(default_factory=NoValidation)
    grid: Mapping[str, Sequence[FiniteFloat]] = {}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.entry is None) == (self.strategy is None):
            raise ValueError("give an entry, or a strategy with its params: one of the two")
        if bool(self.symbols) == (self.symbol is not None):
            raise ValueError('give a symbol such as "AAPL", or a list of symbols: one of the two')
        if self.grid and self.validation.kind == "none":
            raise ValueError(
                "grid needs a validation (walk_forward or purged_cv), so that what is chosen is judged on other bars"
            )
        return self

    @classmethod
    def read(cls, body: bytes | str) -> Self:
        """
        Read the body of a request.

        Raises:
            InvalidPayloadError: names the field and says what to write.

        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as e:
            raise refused(e) from None


def refused(e: ValidationError, within: str = "") -> InvalidPayloadError:
    """The first thing that is wrong, with the name of its field."""
    error = e.errors(include_url=False, include_input=False)[0]
    kinds = {"none", "walk_forward", "purged_cv", "fixed", "volatility"}  # a union's member is no field of the caller's
    parts = [within, *(str(part) for part in error["loc"] if part not in kinds)]
    field_ = ".".join(filter(None, parts))
    text = error["msg"].removeprefix("Value error, ")
    return InvalidPayloadError(f"{field_}: {text}" if field_ else text)


def instants(first: str | None, last: str | None) -> tuple[datetime | None, datetime | None]:
    """
    The moments after which and up to which bars close; a date means the exchange's whole day.

    Raises:
        InvalidPayloadError: one is neither a date nor an instant, or they are the wrong way round.

    """
    begin = _instant("from", first, timedelta()) if first else None
    end = _instant("to", last, timedelta(days=1)) if last else None
    if begin and end and begin >= end:
        raise InvalidPayloadError(f"from: {first} does not lie before to, {last}")
    return begin, end


def _instant(name: str, text: str, day: timedelta) -> datetime:
    try:
        found = datetime.combine(date.fromisoformat(text), time(), calendar().zone) + day
    except (ValueError, OverflowError):
        try:
            # A bar that closes at this very instant belongs to both.
            found = parse_instant(text) - (timedelta() if day else timedelta(minutes=1))
        except (ValueError, OverflowError):
            raise InvalidPayloadError(
                f"{name}: {text[:40]!r} is neither a date such as 2012-01-31 nor an instant such as "
                "2012-01-31T21:00:00Z"
            ) from None
    return max(min(found.astimezone(UTC), _LATEST), EPOCH)


def variants(
    base: Mapping[str, float], grid: Mapping[str, Sequence[float]], params: type[BaseModel]
) -> list[dict[str, float]]:
    """
    Every combination of the grid, over *base*; combinations that the strategy itself rules out are left out.

    Raises:
        InvalidPayloadError: a name, a value or the size of the grid cannot be; the text names it.

    """
    for name, values in grid.items():
        if name not in params.model_fields:
            known = ", ".join(params.model_fields)
            raise InvalidPayloadError(f"grid.{name}: there is no such parameter; choose from {known}")
        if not values:
            raise InvalidPayloadError(f"grid.{name}: give at least one value")
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_VARIANTS:
        raise InvalidPayloadError(f"grid: {count} variants; {MOST_VARIANTS} is the most, so give fewer values")
    found: dict[str, dict[str, float]] = {}
    impossible = ""
    for values in product(*grid.values()):
        try:
            chosen = params.model_validate({**base, **dict(zip(grid, values, strict=True))}).model_dump()
        except ValidationError as e:
            error = e.errors(include_url=False, include_input=False)[0]
            if error["loc"]:
                raise refused(e, "grid" if error["loc"][0] in grid else "params") from None
            impossible = error["msg"].removeprefix("Value error, ")
            continue
        found.setdefault(params_digest(chosen), chosen)
    if not found:
        raise InvalidPayloadError(f"{'grid' if grid else 'params'}: {impossible}")
    return list(found.values())


class Trigger(StrEnum):
    """What a backtest was made for: somebody asked, or new history arrived."""

    REQUEST = "request"
    HISTORY = "history"


class BacktestState(StrEnum):
    """Where a backtest stands; the last two are its ends."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self in (BacktestState.DONE, BacktestState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """
    All that decides what a backtest says: the same job on the same bars is the same backtest.

    ``entry`` is the row that is tried, with the parameters at which the search begins; ``name`` is its name in the
    entries file, None for a strategy with parameters of the caller's. ``first`` and ``last`` are the closes of the
    first and the last bar traded on, and ``warmup`` bars before them are only looked at; the range that was asked for
    begins at ``begin``, perhaps before there was enough to look at.
    """

    name: str | None
    entry: Entry
    symbol: str
    begin: datetime
    first: datetime
    last: datetime
    bars: int
    warmup: int
    provider: str
    adjustment: str | None
    revision: int
    rules: Rules
    validation: NoValidation | WalkForward | PurgedCV
    candidates: Sequence[Mapping[str, float]]
    trigger: Trigger = Trigger.REQUEST
    opens_from: datetime | None = None
    """The close of the first bar of its hold-out, which ends with ``last``; None without a validation."""

    @property
    def strategy(self) -> str:
        """The partition it is kept in."""
        return self.entry.strategy

    @property
    def backtest_id(self) -> str:
        """
        Known by what is tried, on which bars, by which rules (docs/events.md).

        The standard backtest of an entry is known by the history it was made for, whatever has come since.
        """
        rule = (self.name or "", f"{self.strategy}@{self.entry.version}", self.entry.digest)
        series = (self.symbol, str(self.entry.interval), str(self.revision))
        if self.trigger is Trigger.HISTORY:
            return fact_id("backtest", self.trigger, *rule, *series)
        span = (format_instant(self.first), format_instant(self.last), str(self.warmup))
        return fact_id("backtest", *rule, *series, *span, self.how)

    @property
    def how(self) -> str:
        """The rules, the validation and the variants, as one id."""
        tried = (params_digest(one) for one in self.candidates)
        return fact_id("how", self.rules.model_dump_json(), self.validation.model_dump_json(), *tried)

    @property
    def variants_of_series(self) -> str:
        """Where the variants are counted that were tried on this series."""
        return f"trials|{self.strategy}|{self.symbol}|{self.entry.interval}"

    def variant(self, params: Mapping[str, float]) -> str:
        """What a variant is known by among all that were tried: what decides, and how it is traded."""
        gates = "".join(sorted(gate.digest for gate in self.entry.gates))
        facts = (str(self.entry.version), params_digest(params), gates, self.rules.model_dump_json())
        return fact_id("trial", *facts)[:13]

    @property
    def label(self) -> int:
        """How many bars an opinion is about: what lies nearer than that to a test knows of it."""
        return self.rules.horizon or self.entry.horizon

    @property
    def since(self) -> datetime:
        """The minute before the first close."""
        return self.first - timedelta(minutes=1)

    @property
    def minutes(self) -> tuple[int, int]:
        """First and last close as storage counts."""
        return minute_of(self.first), minute_of(self.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backtest:
    """
    A job and how far it has come.

    ``done`` of ``len(job.candidates)`` variants were tried; ``parts`` is how many documents keep what they gave.
    ``claims`` counts how often work on it began since something was last written down.
    """

    job: Job
    requested_at: datetime
    state: BacktestState = BacktestState.QUEUED
    done: int = 0
    parts: int = 0
    claims: int = 0
    leased_until: datetime | None = None
    reason: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    summary: Mapping[str, Any] | None = None
    document: Document | None = field(default=None, repr=False)

    @property
    def backtest_id(self) -> str:
        return self.job.backtest_id

    @property
    def total(self) -> int:
        """How many variants are to be tried."""
        return len(self.job.candidates)

    @property
    def sort(self) -> str:
        """Its place in the list of backtests."""
        assert self.document is not None, "a listed backtest was read"  # noqa: S101
        return self.document.sort


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A hold-out that was looked at: from the close of its first bar to that of its last, and by which backtest."""

    backtest_id: str
    first: datetime
    last: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """
    Every variant that was ever tried on a series, with its Sharpe ratio per period where it has one.

    ``opened`` are the hold-outs that were looked at; no bar is in two of them.
    """

    sharpes: Mapping[str, float | None] = field(default_factory=dict)
    beyond: int = 0
    """How many more were counted after there was no more room to tell them apart."""
    opened: Sequence[Opened] = ()
    document: Document | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        return len(self.sharpes) + self.beyond

    @property
    def known(self) -> list[float]:
        """The Sharpe ratios that are defined."""
        return [ratio for ratio in self.sharpes.values() if ratio is not None]

    def opener(self, job: Job) -> Opened | None:
        """The hold-out of another backtest that has bars in common with that of *job*."""
        first = job.opens_from
        if first is None:
            return None
        return next(
            (
                one
                for one in self.opened
                if one.backtest_id != job.backtest_id and one.first <= job.last and first <= one.last
            ),
            None,
        )
