"""
What is stored of a provider's quota: one document for all instances. Pure; instants are microseconds since 1970.

Two bodies are read: this one, and the older one that kept the last instants in ``recent``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Self

from shared.clock import format_instant, parse_instant
from shared.market.models import Priority
from shared.market.pacing import FIRST_GUARD, LEAST_GUARD, MOST_GUARD, Count, Pace, instant_at, micros
from shared.market.ports import Limits
from shared.market.registry import Window

_SECOND = 1_000_000
_MICROSECOND = timedelta(microseconds=1)

PROBE_LEASE = 30 * _SECOND
"""How long a probe belongs to the instance that makes it; longer than any call may take."""
REFUSED_WAIT = timedelta(seconds=10)
"""How long to leave a provider alone that refused without saying for how long."""
DAY_WAIT = timedelta(hours=1)
"""The same where it refused because the day's quota is spent; then one probe asks again."""
PROBE_WAIT = timedelta(seconds=10)
"""How long to wait after a probe that was not answered."""
_FUTURE = 5 * _SECOND
"""Nobody reserves further ahead: a later instant was written before the wall was set back."""
_CALM = 0.98
"""What is left of the difference to a smaller guard after each reservation: it rises at once and sinks slowly."""


@dataclass(slots=True)
class Claim:
    """A call that waits in some instance; calls that matter less leave its instant alone."""

    priority: int
    key: int
    weight: int
    until: int


@dataclass(slots=True)
class Quota:
    """The stored state, taken out, changed, and put back by a conditional write."""

    pace: Pace
    calls: int = 0
    refusals: int = 0
    probes: int = 0
    failed_probes: int = 0
    blocked_until: int = 0
    is_probe_due: bool = False
    prober: str = ""
    probing_until: int = 0
    trip: int = 0
    claims: dict[str, list[Claim]] = field(default_factory=dict)
    is_changed: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any], windows: Sequence[Window], now: int) -> Self:
        """Read a stored body; ``{}`` is a provider nobody called yet."""
        pace = Pace.of(windows)
        pace.guard = min(max(int(body.get("guard", FIRST_GUARD)), LEAST_GUARD), MOST_GUARD)
        stored = body.get("windows", {})
        was_set_back = False
        for count in pace.counts:
            if count.key in stored and not count.is_staggering:
                count.decode(stored[count.key])
            elif count.is_staggering:
                count.seed([(at, 1) for at in body.get("latest", ())])
            else:  # another plan, or an older body: what other windows knew is better than nothing
                count.seed(_known_calls(body, count.window))
            was_set_back |= count.no_later_than(now + _FUTURE)
            count.prune(now)
        blocked = body.get("blocked_until")
        return cls(
            pace=pace,
            calls=body.get("calls", 0),
            refusals=body.get("refusals", 0),
            probes=body.get("probes", 0),
            failed_probes=body.get("failed_probes", 0),
            blocked_until=micros(parse_instant(blocked)) if blocked else 0,
            is_probe_due=body.get("is_probe_due", False),
            prober=body.get("prober", ""),
            probing_until=body.get("probing_until", 0),
            trip=body.get("trip", 0),
            claims={
                owner: alive
                for owner, rows in body.get("claims", {}).items()
                if (alive := [c for c in (Claim(*row) for row in rows) if c.until > now])
            },
            is_changed=was_set_back,
        )

    def body(self) -> dict[str, Any]:
        """What storage keeps."""
        said: dict[str, Any] = {
            "windows": {count.key: count.encode() for count in self.pace.windows},
            "latest": [at for count in self.pace.counts if count.is_staggering for at, _ in count.calls],
            "guard": self.pace.guard,
            "trip": self.trip,
            "calls": self.calls,
            "refusals": self.refusals,
            "probes": self.probes,
            "failed_probes": self.failed_probes,
            "blocked_until": format_instant(instant_at(self.blocked_until)) if self.blocked_until else None,
        }
        if self.is_probe_due:
            said |= {"is_probe_due": True, "prober": self.prober, "probing_until": self.probing_until}
        if self.claims:
            said["claims"] = {
                owner: [[c.priority, c.key, c.weight, c.until] for c in claims] for owner, claims in self.claims.items()
            }
        return said

    # --- reservations

    def opens_at(self, now: int, token: str) -> int:
        """When the cool-down lets the call known by *token* leave; where a probe is due, that call would be it."""
        if self.is_probe_due and self.prober != token and self.probing_until > now:
            return max(now, self.probing_until)
        return max(now, self.blocked_until)

    def reserve(self, at: int, weight: int, token: str) -> bool:
        """Count a call that leaves at *at*; whether it is the probe that ends a cool-down."""
        if self.is_probe_due:
            self.prober, self.probing_until = token, at + PROBE_LEASE
        if self.pace.counts:
            self.pace.add(at, weight)
            self.calls += 1
        self.is_changed = self.is_changed or bool(self.pace.counts) or self.is_probe_due
        return self.is_probe_due

    def hand_back(self, at: int, weight: int, token: str) -> None:
        """Undo a reservation that was never used."""
        if self.pace.counts:
            self.pace.take_back(at, weight)
            self.calls -= 1
        if self.is_probe_due and self.prober == token:
            self.prober, self.probing_until = "", 0
        self.is_changed = True

    def came_late(self, at: int, later: int, weight: int) -> None:
        """Count a call as late as it may have reached the provider."""
        self.pace.move(at, later, weight)
        self.is_changed = True

    def learn(self, guard: int, trip: int) -> None:
        """
        Widen the guard at once and narrow it slowly, the quickest round trip the other way round.

        Written with the next reservation.
        """
        self.trip = min(trip, self.trip + int((trip - self.trip) * (1 - _CALM))) if self.trip else trip
        own = min(max(guard, LEAST_GUARD), MOST_GUARD)
        self.pace.guard = max(own, int(own + (self.pace.guard - own) * _CALM))

    def claim(self, owner: str, claims: Sequence[Claim], now: int) -> None:
        """Say which calls wait in an instance; written only when that changed or is about to lapse."""
        before = self.claims.get(owner, [])
        is_same = [(c.key, c.weight) for c in before] == [(c.key, c.weight) for c in claims]
        if is_same and all(c.until > now + _SECOND for c in before):
            return
        if claims:
            self.claims[owner] = list(claims)
        else:
            self.claims.pop(owner, None)
        self.is_changed = True

    # --- what answers teach

    def refused(self, now: int, wait: timedelta | None, *, is_day_spent: bool, token: str) -> None:
        """The provider refused a call: everybody leaves it alone for a while, and then one asks first."""
        is_probe = self.is_probe_due and self.prober == token
        if is_probe:
            self.probes += 1
            self.failed_probes += 1
            self.prober, self.probing_until = "", 0
        else:
            self.refusals += 1
        usual = DAY_WAIT if is_day_spent else REFUSED_WAIT
        until = now + max(wait or usual, timedelta()) // _MICROSECOND
        self.blocked_until = max(self.blocked_until, until)
        self.is_probe_due = self.is_probe_due or is_day_spent
        self.is_changed = True

    def probed(self, now: int, token: str, *, is_answered: bool) -> None:
        """A probe came back: answered, it ends the cool-down; else another is due a little later."""
        if not self.is_probe_due or self.prober != token:
            return
        self.probes += 1
        self.prober, self.probing_until = "", 0
        if is_answered:
            self.is_probe_due, self.blocked_until = False, 0
        else:
            self.blocked_until = max(self.blocked_until, now + PROBE_WAIT // _MICROSECOND)
        self.is_changed = True

    def observe(self, limits: Limits, now: int) -> bool | None:
        """
        Correct a window by what rate headers said; whether that left us less room, None: nothing changed.

        A smaller ``left`` than ours means calls that we did not make: they count until ``resets_at``. Another amount
        replaces ours.
        """
        count = self._meant(limits, now)
        if count is None:
            return None
        before = (count.amount, count.phantom, count.phantom_until)
        if limits.amount is not None and limits.amount > 0:
            count.amount = limits.amount
        if limits.left is not None:
            foreign = count.amount - max(limits.left, 0) - count.used(now, guard=self.pace.guard)
            until = now + count.window.span // _MICROSECOND
            if limits.resets_at is not None:
                until = min(until, micros(limits.resets_at))  # what lies further ahead was misread
            has_any = foreign > 0 and until > now
            count.phantom, count.phantom_until = (foreign, until) if has_any else (0, 0)
        after = (count.amount, count.phantom, count.phantom_until)
        if after[:2] == before[:2] and after[2] <= before[2] + _SECOND:
            count.phantom_until = before[2]
            return None
        self.is_changed = True
        return after[0] - after[1] < before[0] - before[1] or after[2] > before[2]

    def _meant(self, limits: Limits, now: int) -> Count | None:
        counts = sorted(self.pace.windows, key=lambda count: count.window.span)
        if limits.span is not None:
            return next((count for count in counts if count.window.span == limits.span), None)
        if limits.amount is not None:
            same = [count for count in counts if limits.amount in (count.amount, count.window.amount)]
            if same:
                return same[0]
        if limits.resets_at is not None:
            ahead = limits.resets_at - instant_at(now)
            return next((count for count in counts if count.window.span >= ahead), counts[-1] if counts else None)
        return counts[0] if len(counts) == 1 else None


def _known_calls(body: Mapping[str, Any], window: Window) -> list[tuple[int, int]]:
    older = [(micros(parse_instant(text)), 1) for text in body.get("recent", ())]
    return max([older, *(Count(window).decode(kept).calls for kept in body.get("windows", {}).values())], key=len)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowState:
    """One window as it stands: ``resets_at`` is when it next holds less, None while it holds nothing."""

    amount: int
    span: timedelta
    kind: str
    used: int
    left: int
    resets_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleState:
    """
    What an operator sees of a provider's quota.

    ``refusals`` came although we kept every window we know; ``probes`` asked whether a spent day has begun anew.
    ``waiting`` counts calls that wait now, by priority, in this instance and as far as others claimed an instant.
    """

    windows: Sequence[WindowState]
    cool_down_until: datetime | None
    is_probing: bool
    calls: int
    refusals: int
    probes: int
    failed_probes: int
    guard: timedelta
    waiting: Mapping[Priority, int]

    @classmethod
    def of(cls, quota: Quota, now: int, waiting: Sequence[Priority]) -> Self:
        """The state at *now*, with the calls that wait in this instance."""
        everybody = [*waiting, *(Priority(c.priority) for claims in quota.claims.values() for c in claims)]
        is_cooling = quota.is_probe_due or quota.blocked_until > now
        return cls(
            windows=tuple(_window_state(count, now) for count in quota.pace.windows),
            cool_down_until=instant_at(quota.blocked_until) if is_cooling else None,
            is_probing=quota.is_probe_due and quota.probing_until > now,
            calls=quota.calls,
            refusals=quota.refusals,
            probes=quota.probes,
            failed_probes=quota.failed_probes,
            guard=quota.pace.guard * _MICROSECOND,
            waiting={priority: everybody.count(priority) for priority in Priority},
        )


def _window_state(count: Count, now: int) -> WindowState:
    used = count.used(now) + (count.phantom if count.phantom_until > now else 0)
    resets = count.resets_at(now)
    return WindowState(
        amount=count.amount,
        span=count.window.span,
        kind=count.window.kind.value,
        used=used,
        left=max(count.amount - used, 0),
        resets_at=instant_at(resets) if resets is not None else None,
    )
