"""What the signals domain thinks with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time
from enum import StrEnum

from shared.documents import Document
from shared.events import fact_id
from shared.market.models import Interval


class Direction(StrEnum):
    """Which way a signal points."""

    LONG = "long"
    SHORT = "short"


class Origin(StrEnum):
    """
    Whether a signal was seen as its bar closed, or found in history afterwards.

    ``muted``: seen as its bar closed, but its entry has no edge left and asked to be silent then.
    """

    LIVE = "live"
    BACKFILL = "backfill"
    MUTED = "muted"


class State(StrEnum):
    """What became of a signal: pending until its horizon has closed, then one of the others, for ever."""

    PENDING = "pending"
    SCORED = "scored"
    EXPIRED = "expired"
    UNSCORABLE = "unscorable"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateGate:
    """Lets an opinion through only while a strategy's state points the same way, or only while it does not."""

    strategy: str
    version: int
    params: Mapping[str, float]
    agrees: bool
    lookback: int

    @property
    def digest(self) -> str:
        """The gate as one short text; a gate that decides the same has the same."""
        return f"{self.strategy}@{self.version}({params_digest(self.params)})={'agrees' if self.agrees else 'differs'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionGate:
    """Lets an opinion through only on bars that close from *first* to *last*, both included, in exchange time."""

    first: time
    last: time

    @property
    def digest(self) -> str:
        """The gate as one short text; a gate that decides the same has the same."""
        return f"session={self.first:%H:%M}-{self.last:%H:%M}"


type Gate = StateGate | SessionGate
"""What must hold besides, for an entry's opinion to count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """
    A row of the entries file: one strategy with its parameters, watching some symbols at one interval.

    ``symbols`` None means every watched symbol; ``lookback`` covers the gates' as well. A signal is an opinion of the
    ``horizon`` bars after it, and bars that come more than ``stale_after`` bars late are not evaluated.
    """

    name: str
    strategy: str
    version: int
    params: Mapping[str, float]
    interval: Interval
    symbols: frozenset[str] | None
    lookback: int
    gates: tuple[Gate, ...] = ()
    horizon: int = 5
    stale_after: int = 3
    mute_without_edge: bool = False

    def watches(self, symbol: str, interval: Interval) -> bool:
        """Whether this entry has an opinion about the series."""
        return interval is self.interval and (self.symbols is None or symbol in self.symbols)

    @property
    def digest(self) -> str:
        """Parameters and gates as one text, part of every signal's id; the order of gates does not matter."""
        return "".join([params_digest(self.params), *(f",{text}" for text in sorted(g.digest for g in self.gates))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """What a strategy says of one bar: where to, how strongly (0 to 1), and which numbers caused it."""

    direction: Direction
    strength: float
    features: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """
    How an opinion fared; without the numbers where it could not be scored, with the reason.

    Returns are fractions, from the first tradable price after the signal's bar to the close of its horizon.
    ``forward_return`` is the opinion's own (a short gains where the price falls), ``net_return`` what is left of
    it behind ``cost_per_side``, ``base_return`` what a bet on rising prices made. ``mfe`` and ``mae`` are the best
    (0 or more) and the worst (0 or less) that the opinion saw while it was held.
    """

    state: State
    reason: str | None = None
    is_hit: bool | None = None
    entry_price: float | None = None
    exit_price: float | None = None
    forward_return: float | None = None
    net_return: float | None = None
    base_return: float | None = None
    mfe: float | None = None
    mae: float | None = None
    cost_per_side: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """
    One entry's opinion of one symbol at one bar. ``reference_price`` is the bar's close as traded.

    It is known from ``closed_at`` on, and says where the price goes until ``closes_at``: the close of the
    ``horizon``-th trading bar after it. What has not been scored by ``expires_at`` never is, unless bars come
    first. ``confidence`` is the share of earlier opinions of this entry on this series that were right, by Laplace's
    rule of succession, from the ``sample_size`` outcomes whose horizons had closed by ``closed_at``. ``trend`` is
    the return of the bars before it. Signals of earlier versions have no horizon, and so no outcome.
    """

    signal_id: str
    entry: str
    strategy: str
    version: int
    params: Mapping[str, float]
    symbol: str
    interval: Interval
    direction: Direction
    strength: float
    reference_price: float
    closed_at: datetime
    features: Mapping[str, float]
    origin: Origin
    provider: str
    revision: int
    recorded_at: datetime
    adjustment: str | None = None
    variant: str = ""
    horizon: int | None = None
    closes_at: datetime | None = None
    expires_at: datetime | None = None
    confidence: float | None = None
    sample_size: int = 0
    trend: float | None = None
    why: str = ""
    muted_because: str | None = None
    outcome: Outcome = Outcome(state=State.PENDING)
    scored_at: datetime | None = None
    """When the outcome was written (wall)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSignal:
    """What scoring must know of a signal whose horizon has not closed."""

    signal_id: str
    variant: str
    direction: Direction
    strength: float
    confidence: float | None
    reference_price: float
    trend: float | None
    horizon: int
    closed_at: datetime
    closes_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How the opinions of one variant of an entry on one series fared so far: counts, and nothing to re-read."""

    entry: str
    resolved: int = 0
    scored: int = 0
    hits: int = 0
    ups: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """
    The open signals of a series, and how its closed ones fared.

    It is true as of ``through``, the last bar that changed it: every signal of bars up to there is in storage, and
    every horizon that had closed by then is scored. It is written together with the signals and outcomes it speaks
    of, under its etag.
    """

    symbol: str
    interval: Interval
    through: datetime | None = None
    open: Mapping[str, OpenSignal] = field(default_factory=dict)
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    document: Document | None = None

    @property
    def scoring_at(self) -> datetime | None:
        """When the first horizon closes."""
        return min((one.closes_at for one in self.open.values()), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """One line of a record: an opinion and what became of it."""

    closed_at: datetime
    closes_at: datetime
    direction: Direction
    strength: float
    confidence: float | None
    trend: float | None
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Some of the closed signals of one variant of an entry on one series, in the order in which they closed."""

    entry: str
    variant: str
    symbol: str
    interval: Interval
    number: int
    lines: Sequence[Resolved] = ()
    document: Document | None = None


def params_digest(params: Mapping[str, float]) -> str:
    """The parameters as one short text; the same values give the same text."""
    return ",".join(f"{name}={params[name]:.12g}" for name in sorted(params))


def signal_id(entry: Entry, symbol: str, closed_at: datetime) -> str:
    """At most one signal per entry and bar: the same bar gives the same id on every run (docs/events.md)."""
    return fact_id(
        *_rule(entry),
        symbol,
        entry.interval,
        closed_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def variant_of(entry: Entry) -> str:
    """Which opinions may be counted together: those of one name, strategy, parameters, gates and horizon."""
    return fact_id("variant", *_rule(entry), str(entry.horizon))


def _rule(entry: Entry) -> tuple[str, str, str]:
    return entry.name, f"{entry.strategy}@{entry.version}", entry.digest
