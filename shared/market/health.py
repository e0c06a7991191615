"""
How well each provider does, and whether to leave it alone for a while.

Everything that decides is pure and takes the time as an argument; ``Health`` keeps it, in the process and in
storage. What it counts are sums that halve with time: they can be added up in any order, so every instance adds
its own share to what is stored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Self
from uuid import uuid4

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Documents
from shared.errors import NotFoundError, TroopError, UnavailableError
from shared.market.conditional import QUOTA, changed
from shared.telemetry import get_logger, redact

log = get_logger(__name__)


class Kind(StrEnum):
    """What a provider can be asked for."""

    BARS = "bars"
    QUOTE = "quote"
    NEWS = "news"
    EARNINGS = "earnings"
    ACTIONS = "actions"


# --- how well it does -------------------------------------------------------------------------------------------

HALF_LIFE = timedelta(minutes=10)
"""A call this old counts half: an outage is forgotten within the hour, and with it the reason to avoid a provider."""
BENEFIT = 8.0
"""Of whom we know little we think well: so many good calls are added in thought."""
SLOW = timedelta(seconds=10)
"""An answer that takes so long is worth half."""
SCARCE = 0.25
"""Above this share left a quota says nothing; below it a provider is spared more and more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """
    Calls and how they went, the older the lighter.

    ``seconds`` is what they took together; ``judged`` counts the answers whose age was looked at, ``fresh`` those
    that were as young as they could be.
    """

    calls: float = 0.0
    good: float = 0.0
    seconds: float = 0.0
    judged: float = 0.0
    fresh: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in _SUMS})

    def after(self, passed: timedelta) -> "Tally":
        """The same calls, *passed* later."""
        lighter = 0.5 ** max(0.0, passed / HALF_LIFE)
        return Tally(**{name: getattr(self, name) * lighter for name in _SUMS})

    @property
    def success_rate(self) -> float | None:
        """The share of calls that were answered, between 0 and 1."""
        return self.good / self.calls if self.calls else None

    @property
    def latency(self) -> timedelta | None:
        """How long a call takes."""
        return timedelta(seconds=self.seconds / self.calls) if self.calls else None

    @property
    def freshness(self) -> float | None:
        """The share of answers that were as young as they could be, between 0 and 1."""
        return self.fresh / self.judged if self.judged else None


_SUMS = ("calls", "good", "seconds", "judged", "fresh")


def rate(tally: Tally, *, left: float | None = None) -> float:
    """
    Rate a provider between 0 and 1 by what its calls came to and the share of its quota that is *left*.

    None: nothing is known of the quota, or there is none.
    """
    success = (tally.good + BENEFIT) / (tally.calls + BENEFIT)
    fresh = (tally.fresh + BENEFIT) / (tally.judged + BENEFIT)
    speed = 1 / (1 + timedelta(seconds=tally.seconds / (tally.calls + BENEFIT)) / SLOW)
    spare = 1.0 if left is None else 0.3 + 0.7 * min(1.0, max(0.0, left) / SCARCE)
    return success * speed * (0.5 + 0.5 * fresh) * spare


OVERTAKE, FALL_BACK = 0.15, 0.05


def rank(
    preferred: Sequence[str], ratings: Mapping[str, float], ahead: frozenset[tuple[str, str]]
) -> tuple[list[str], frozenset[tuple[str, str]]]:
    """
    Order providers by rating, in *preferred* order where it makes no great difference.

    A later one overtakes when it is better by OVERTAKE and falls back when it is better by less than FALL_BACK, so
    that two who are nearly equal do not change places with every call. *ahead* are the (later, earlier) pairs that
    had changed places before; returned are the order and those who have now.
    """
    place = {name: number for number, name in enumerate(preferred)}

    def overtakes(later: str, earlier: str) -> bool:
        needed = FALL_BACK if (later, earlier) in ahead else OVERTAKE
        return ratings[later] - ratings[earlier] > needed

    order = list(preferred)
    for end in range(len(order) - 1, 0, -1):
        for i in range(end):
            if place[order[i]] < place[order[i + 1]] and overtakes(order[i + 1], order[i]):
                order[i], order[i + 1] = order[i + 1], order[i]
    position = {name: number for number, name in enumerate(order)}
    now_ahead = {
        (later, earlier)
        for earlier in preferred
        for later in preferred
        if place[later] > place[earlier] and position[later] < position[earlier] and overtakes(later, earlier)
    }
    others = {pair for pair in ahead if not set(pair) <= set(preferred)}
    return order, frozenset(now_ahead | others)


# --- whether to leave it alone ----------------------------------------------------------------------------------


class BreakerState(StrEnum):
    """Closed: calls pass. Open: none does. Half open: one is out to see whether the provider is back."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


FAILURES = 5
FAILURE_WINDOW = timedelta(minutes=2)
FIRST_WAIT, LONGEST_WAIT = timedelta(seconds=15), timedelta(minutes=15)
KEY_WAIT, LONGEST_KEY_WAIT = timedelta(minutes=5), timedelta(hours=1)
"""A key that is wrong is made right by a person."""
PROBE_LEASE = timedelta(seconds=30)
"""Longer than any call may take; whoever is killed with the probe holds it no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """
    One provider's circuit breaker, as it is stored.

    ``failures`` are the last ones in a row. ``key`` is the fingerprint of the key that was refused, when that is why
    it opened: with another key it is closed.
    """

    failures: Sequence[datetime] = ()
    retry_at: datetime | None = None
    wait: timedelta = FIRST_WAIT
    reason: str = ""
    key: str | None = None
    opened_at: datetime | None = None
    openings: int = 0
    probe: str | None = None
    probe_until: datetime | None = None

    def state(self, now: datetime) -> BreakerState:
        """What it lets through."""
        if self.retry_at is None:
            return BreakerState.CLOSED
        is_out = self.probe_until is not None and self.probe_until > now
        return BreakerState.HALF_OPEN if is_out else BreakerState.OPEN

    def failed(self, now: datetime, reason: str, *, since: datetime | None, probe: str | None) -> Self:
        """
        After a call that failed; *since* is the last success the caller knows of, *probe* the caller's claim.

        The fifth failure in a row within two minutes opens it; a failed probe keeps it open for twice as long.
        """
        if self.retry_at is not None:
            if probe is None or self.probe != probe:
                return self  # a call that left before the others failed says nothing new
            wait = min(self.wait * 2, LONGEST_KEY_WAIT if self.key else LONGEST_WAIT)
            return replace(self, wait=wait, retry_at=now + wait, reason=reason, probe=None, probe_until=None)
        oldest = max(now - FAILURE_WINDOW, since) if since else now - FAILURE_WINDOW
        failures = (*(at for at in self.failures if at > oldest), now)
        if len(failures) < FAILURES:
            return replace(self, failures=failures, reason=reason)
        return self._opened(now, FIRST_WAIT, reason)

    def key_refused(self, now: datetime, reason: str, *, key: str, probe: str | None) -> Self:
        """After the provider said that the key is wrong."""
        if self.retry_at is not None and self.key == key:
            return self.failed(now, reason, since=None, probe=probe)
        return replace(self._opened(now, KEY_WAIT, reason), key=key)

    def under(self, key: str) -> Self:
        """As it counts for *key*: what another key was refused is no reason to leave the provider alone."""
        return self if self.key in (None, key) else self.closed()

    def claimed(self, now: datetime, probe: str) -> Self | None:
        """With the probe given to *probe*; None: it is not time yet, or another has it."""
        if self.retry_at is None or self.retry_at > now or self.state(now) is BreakerState.HALF_OPEN:
            return None
        return replace(self, probe=probe, probe_until=now + PROBE_LEASE)

    def returned(self, probe: str) -> Self | None:
        """With the probe given back unused; None: *probe* did not have it."""
        return replace(self, probe=None, probe_until=None) if self.probe == probe else None

    def closed(self) -> Self:
        """After a probe that was answered."""
        return type(self)(openings=self.openings)

    def _opened(self, now: datetime, wait: timedelta, reason: str) -> Self:
        return type(self)(retry_at=now + wait, wait=wait, reason=reason, opened_at=now, openings=self.openings + 1)

    def to_body(self) -> dict[str, Any]:
        """As stored."""
        return {
            "failures": [format_instant(at) for at in self.failures],
            "retry_at": _text(self.retry_at),
            "wait_seconds": self.wait.total_seconds(),
            "reason": self.reason,
            "key": self.key,
            "opened_at": _text(self.opened_at),
            "openings": self.openings,
            "probe": self.probe,
            "probe_until": _text(self.probe_until),
        }

    @classmethod
    def from_body(cls, b: Mapping[str, Any]) -> Self:
        """As read; an empty body is a breaker that never opened."""
        if not b:
            return cls()
        return cls(
            failures=tuple(parse_instant(at) for at in b["failures"]),
            retry_at=_instant(b["retry_at"]),
            wait=timedelta(seconds=b["wait_seconds"]),
            reason=b["reason"],
            key=b["key"],
            opened_at=_instant(b["opened_at"]),
            openings=b["openings"],
            probe=b["probe"],
            probe_until=_instant(b["probe_until"]),
        )


type Step = Callable[[Breaker], Breaker | None]
"""What becomes of a breaker; None: nothing."""


def _text(at: datetime | None) -> str | None:
    return format_instant(at) if at else None


def _instant(text: str | None) -> datetime | None:
    return parse_instant(text) if text else None


# --- who keeps it -----------------------------------------------------------------------------------------------

CLOSED_VIEW = timedelta(minutes=5)
"""How long a process believes that a breaker is closed. Its first failure makes it look again, so that an outage
which others have noticed costs it one call."""
TALLY_VIEW = timedelta(minutes=5)
FLUSH = timedelta(seconds=30)
"""What went wrong is written down at most so often, a provider and process."""
QUIET_FLUSH = timedelta(hours=1)
"""What went well is no news: it is written this often, or along with what did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Leave to ask a provider; ``probe`` is set for the one who finds out whether it is back."""

    provider: str
    probe: str | None = None


class LeftAloneError(UnavailableError):
    """The breaker is open: the provider was not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a provider does, for people."""

    breaker: BreakerState
    retry_at: datetime | None
    success_rate: float | None
    latency: timedelta | None
    freshness: float | None
    calls: int
    failures: int
    hits: Mapping[str, int]
    last_error: str | None
    last_error_at: datetime | None


@dataclass(slots=True)
class _Notes:
    """What this process knows of one provider: what was stored when it last looked, and what it saw itself since."""

    stored: dict[Kind, Tally] = field(default_factory=dict)
    stored_at: datetime | None = None
    seen: dict[Kind, Tally] = field(default_factory=dict)
    seen_at: datetime | None = None
    counts: dict[str, int] = field(default_factory=dict)
    stored_counts: dict[str, int] = field(default_factory=dict)
    is_news: bool = False
    flushed_at: datetime | None = None
    last_error: str | None = None
    last_error_at: datetime | None = None
    breaker: Breaker = field(default_factory=Breaker)
    breaker_read_at: datetime | None = None
    last_success: datetime | None = None


class Health:
    """
    Keeps every provider's tally and breaker.

    A call that goes well costs no storage operation beyond a look at the breaker every five minutes and a line in
    the tally every hour. Storage in trouble is logged and changes nothing: the call itself matters more.
    """

    def __init__(self, documents: Documents, wall: Clock, fingerprints: Mapping[str, str]) -> None:
        self._documents = documents
        self._wall = wall
        self._fingerprints = fingerprints
        self._of: dict[str, _Notes] = {}
        self._ahead: dict[Kind, frozenset[tuple[str, str]]] = {}

    # who may be asked

    async def admit(self, provider: str) -> Pass:
        """
        Let a call to the provider pass; whoever gets the probe must end it with one of the verdicts below.

        Raises:
            LeftAloneError: its breaker is open, or another is finding out whether it is back.

        """
        notes, now = self._notes(provider), self._wall.now()
        if notes.breaker_read_at is None or now - notes.breaker_read_at >= CLOSED_VIEW:
            await self._look(provider)
        if notes.breaker.retry_at is None:
            return Pass(provider=provider)
        if notes.breaker.retry_at > now:
            raise self._left_alone(provider, notes.breaker)
        return await self._claim(provider)

    async def _claim(self, provider: str) -> Pass:
        mine = uuid4().hex
        taken = await self._write(provider, lambda b: b.claimed(self._wall.now(), mine))
        breaker = taken or self._notes(provider).breaker
        if taken:
            log.info("provider.probed", provider=provider, waited=taken.wait.total_seconds())
            return Pass(provider=provider, probe=mine)
        if breaker.retry_at is None:
            return Pass(provider=provider)
        raise self._left_alone(provider, breaker)

    def _left_alone(self, provider: str, breaker: Breaker) -> LeftAloneError:
        now = self._wall.now()
        again = max((at for at in (breaker.retry_at, breaker.probe_until) if at), default=now)
        return LeftAloneError(
            f"{provider} is left alone for now: {breaker.reason}", retry_after=max(again - now, timedelta(seconds=1))
        )

    # verdicts

    async def answered(self, leave: Pass, kind: Kind, took: timedelta) -> None:
        """The provider gave an answer, be it that it will not do what it was asked."""
        notes, now = self._notes(leave.provider), self._wall.now()
        self._add(notes, kind, Tally(calls=1, good=1, seconds=took.total_seconds()))
        notes.last_success = now
        if leave.probe:
            breaker = await self._write(leave.provider, lambda b: b.closed() if b.probe == leave.probe else None)
            if breaker:
                log.warning("provider.recovered", provider=leave.provider)
            await self.flush(leave.provider)
        else:
            await self._flush_in_time(leave.provider)

    async def held_back(self, leave: Pass, kind: Kind, took: timedelta, error: Exception) -> None:
        """The provider asked us to slow down: it is there, and the throttle knows what to do."""
        notes = self._notes(leave.provider)
        self._fail(notes, kind, took, error)
        if leave.probe:
            await self._write(leave.provider, lambda b: b.closed() if b.probe == leave.probe else None)
        await self._flush_in_time(leave.provider)

    async def failed(self, leave: Pass, kind: Kind, took: timedelta, error: Exception) -> None:
        """The provider gave no answer, or none that can be judged."""
        notes, now = self._notes(leave.provider), self._wall.now()
        self._fail(notes, kind, took, error)
        reason = notes.last_error or ""
        await self._worse(leave.provider, lambda b: b.failed(now, reason, since=notes.last_success, probe=leave.probe))

    async def key_refused(self, leave: Pass, kind: Kind, took: timedelta, error: Exception) -> None:
        """The provider does not take the key: a person is told, once, and it is left alone."""
        notes, now = self._notes(leave.provider), self._wall.now()
        self._fail(notes, kind, took, error)
        reason, key = notes.last_error or "", self._fingerprints.get(leave.provider, "")
        await self._worse(leave.provider, lambda b: b.key_refused(now, reason, key=key, probe=leave.probe))

    async def given_back(self, leave: Pass) -> None:
        """The provider was not asked after all."""
        if leave.probe:
            await self._write(leave.provider, lambda b: b.returned(leave.probe or ""))

    def judged(self, provider: str, kind: Kind, *, is_fresh: bool) -> None:
        """An answer was as young as it could be, or was not."""
        self._add(self._notes(provider), kind, Tally(judged=1, fresh=float(is_fresh)))

    def count_hit(self, kind: Kind, provider: str) -> None:
        """What this provider had brought before saved a call to it."""
        counts = self._notes(provider).counts
        counts[f"hits.{kind}"] = counts.get(f"hits.{kind}", 0) + 1

    # what people and the fetcher want to know

    async def order(self, kind: Kind, preferred: Sequence[str], left: Mapping[str, float | None]) -> list[str]:
        """*preferred* by rating, the preferred first where it makes no great difference; a due probe before all."""
        now = self._wall.now()
        for provider in preferred:
            notes = self._notes(provider)
            if notes.stored_at is None or now - notes.stored_at >= TALLY_VIEW:
                await self._read(provider)
        ratings = {name: rate(self._tally(name, [kind]), left=left.get(name)) for name in preferred}
        order, self._ahead[kind] = rank(preferred, ratings, self._ahead.get(kind, frozenset()))
        return sorted(order, key=lambda name: not self._is_due(name))  # stable: the rest stays in order

    def freshness(self, provider: str, kind: Kind) -> float | None:
        """The share of the provider's answers that were as young as they could be; None: nobody looked."""
        return self._tally(provider, [kind]).freshness

    async def report(self, provider: str) -> Report:
        """How the provider does, as of now and for all instances."""
        await self._look(provider)
        await self._read(provider)
        notes = self._notes(provider)
        tally, b = self._tally(provider, list(Kind)), notes.breaker
        counts = {name: notes.counts.get(name, 0) + n for name, n in notes.stored_counts.items()}
        counts |= {name: n for name, n in notes.counts.items() if name not in counts}
        return Report(
            breaker=b.state(self._wall.now()),
            retry_at=b.retry_at,
            success_rate=tally.success_rate,
            latency=tally.latency,
            freshness=tally.freshness,
            calls=counts.get("calls", 0),
            failures=counts.get("failures", 0),
            hits={kind: counts[f"hits.{kind}"] for kind in Kind if f"hits.{kind}" in counts},
            last_error=notes.last_error,
            last_error_at=notes.last_error_at,
        )

    async def flush(self, provider: str) -> None:
        """Add what this process saw to what is stored."""
        notes, now = self._notes(provider), self._wall.now()
        seen, seen_at, counts = notes.seen, notes.seen_at or now, notes.counts
        error, error_at = notes.last_error, notes.last_error_at

        def added(body: Mapping[str, Any]) -> Mapping[str, Any]:
            stored = {kind: tally.after(now - _at(body, now)) for kind, tally in _tallies(body).items()}
            for kind, tally in seen.items():
                stored[kind] = stored.get(kind, Tally()) + tally.after(now - seen_at)
            total = dict(body.get("counts", {}))
            for name, n in counts.items():
                total[name] = total.get(name, 0) + n
            newer = error_at if error_at and error_at >= (_instant(body.get("last_error_at")) or error_at) else None
            return {
                "at": format_instant(now),
                "kinds": {kind: {name: round(getattr(t, name), 4) for name in _SUMS} for kind, t in stored.items()},
                "counts": total,
                "last_error": error if newer else body.get("last_error"),
                "last_error_at": _text(newer) if newer else body.get("last_error_at"),
            }

        # Taken first: what comes in during the write belongs to the next one.
        notes.seen, notes.counts, notes.is_news, notes.flushed_at = {}, {}, False, now
        try:
            body = await changed(self._documents, self._wall, provider, "health", added)
        except TroopError as e:
            log.warning("health.unwritten", provider=provider, reason=str(e))
            for kind, tally in seen.items():
                self._add(notes, kind, tally.after(self._wall.now() - seen_at), counts=False)
            for name, n in counts.items():
                notes.counts[name] = notes.counts.get(name, 0) + n
            return
        if body:
            self._take(notes, body, now)

    # how it is kept

    def _notes(self, provider: str) -> _Notes:
        return self._of.setdefault(provider, _Notes())

    def _is_due(self, provider: str) -> bool:
        return self._notes(provider).breaker.claimed(self._wall.now(), "") is not None

    def _tally(self, provider: str, kinds: Sequence[Kind]) -> Tally:
        notes, now = self._notes(provider), self._wall.now()
        total = Tally()
        for kind in kinds:
            total += notes.stored.get(kind, Tally()).after(now - (notes.stored_at or now))
            total += notes.seen.get(kind, Tally()).after(now - (notes.seen_at or now))
        return total

    def _add(self, notes: _Notes, kind: Kind, tally: Tally, *, counts: bool = True) -> None:
        now = self._wall.now()
        notes.seen = {k: t.after(now - (notes.seen_at or now)) for k, t in notes.seen.items()}
        notes.seen_at = now
        notes.seen[kind] = notes.seen.get(kind, Tally()) + tally
        if counts and tally.calls:
            notes.counts["calls"] = notes.counts.get("calls", 0) + 1
            if tally.good < tally.calls:
                notes.counts["failures"] = notes.counts.get("failures", 0) + 1

    def _fail(self, notes: _Notes, kind: Kind, took: timedelta, error: Exception) -> None:
        self._add(notes, kind, Tally(calls=1, seconds=took.total_seconds()))
        notes.is_news = True
        notes.last_error = redact(f"{type(error).__name__}: {error}")[:200]
        notes.last_error_at = self._wall.now()

    async def _flush_in_time(self, provider: str) -> None:
        notes, now = self._notes(provider), self._wall.now()
        if notes.flushed_at is None:
            notes.flushed_at = now if not notes.is_news else now - FLUSH
        if now - notes.flushed_at >= (FLUSH if notes.is_news else QUIET_FLUSH):
            await self.flush(provider)

    async def _worse(self, provider: str, step: Step) -> None:
        openings = 0

        def stepped(before: Breaker) -> Breaker | None:
            nonlocal openings
            openings = before.openings
            return step(before)

        breaker = await self._write(provider, stepped)
        if breaker and breaker.openings > openings:
            tell = log.error if breaker.key else log.warning
            seconds = breaker.wait.total_seconds()
            tell("provider.left_alone", provider=provider, reason=breaker.reason, wait=seconds)
        if breaker and breaker.retry_at:
            await self.flush(provider)
        else:
            await self._flush_in_time(provider)

    async def _write(self, provider: str, step: Step) -> Breaker | None:
        """The breaker after *step*, as stored; None: *step* changed nothing, or it could not be written."""
        found: Breaker | None = None

        def stepped(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            nonlocal found
            before = found = self._ours(provider, body)
            after = step(before)
            if after is None or after == before:
                return None
            found = after
            return after.to_body()

        try:
            written = await changed(self._documents, self._wall, provider, "breaker", stepped)
        except TroopError as e:
            log.warning("breaker.unwritten", provider=provider, reason=str(e))
            return None
        if found:
            self._saw(self._notes(provider), found)
        return found if written is not None else None

    def _ours(self, provider: str, body: Mapping[str, Any]) -> Breaker:
        return Breaker.from_body(body).under(self._fingerprints.get(provider, ""))

    async def _look(self, provider: str) -> None:
        notes = self._notes(provider)
        try:
            body = (await self._documents.read(QUOTA, provider, "breaker")).body
        except NotFoundError:
            body = {}
        except TroopError as e:
            log.warning("breaker.unread", provider=provider, reason=str(e))
            return
        self._saw(notes, self._ours(provider, body))

    def _saw(self, notes: _Notes, breaker: Breaker) -> None:
        notes.breaker, notes.breaker_read_at = breaker, self._wall.now()

    async def _read(self, provider: str) -> None:
        notes, now = self._notes(provider), self._wall.now()
        try:
            body = (await self._documents.read(QUOTA, provider, "health")).body
        except NotFoundError:
            body = {}
        except TroopError as e:
            log.warning("health.unread", provider=provider, reason=str(e))
            return
        self._take(notes, body, now)

    def _take(self, notes: _Notes, body: Mapping[str, Any], now: datetime) -> None:
        notes.stored = {kind: tally.after(now - _at(body, now)) for kind, tally in _tallies(body).items()}
        notes.stored_at = now
        notes.stored_counts = dict(body.get("counts", {}))
        error_at = _instant(body.get("last_error_at"))
        if error_at and (notes.last_error_at is None or error_at > notes.last_error_at):
            notes.last_error, notes.last_error_at = body["last_error"], error_at


def _at(body: Mapping[str, Any], now: datetime) -> datetime:
    return parse_instant(body["at"]) if "at" in body else now


def _tallies(body: Mapping[str, Any]) -> dict[Kind, Tally]:
    return {Kind(kind): Tally(**sums) for kind, sums in body.get("kinds", {}).items() if kind in set(Kind)}
