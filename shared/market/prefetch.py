"""
What will be asked for, and which calls that would be lost otherwise are worth making for it. Pure.

A day is cut into slots of five minutes of local time. ``Habits`` learns how often each symbol is asked for in each of
them, ``outlook`` finds the instants at which a few calls keep most of the coming requests fresh, ``Gate`` stops it
all when too many of them are in vain, and ``Prefetcher`` puts the three together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any, Self

from shared.market.models import instant_of, minute_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SLOT = timedelta(minutes=5)
SLOTS = timedelta(days=1) // SLOT
HALF_LIFE = 14
"""After this many days what was learnt counts half."""
PRIOR_DAYS = 1.0
"""How many days the assumptions about a symbol weigh against what was seen of it."""
TODAY = 8.0
"""How many requests of today weigh as much as what was learnt, when we tell whether it is a busy day for a symbol."""
MOST_SYMBOLS = 64
FORGOTTEN = 0.05
"""What was seen less often than this is dropped."""
FLOOR = 0.5
"""How many requests a call must promise to serve before it is thought of at all."""
LIMIT, RETURN = 0.4, 0.25
"""The waste at which prefetching stops, and the one it must have come down to before it goes on."""
_FADES = 0.96
_ENOUGH = 10.0
_PRICES, _NARROWED = 12, 2
"""How many prices of a call are tried at once, and how often between the last that was too low and the first that was
not."""
_PLAN_HOLDS = 12
"""After how many slots the price of a call is worked out again although nothing happened."""


@dataclass(slots=True)
class Habits:
    """
    How often each symbol is asked for in each slot of a day, the longer ago the less it counts.

    What is seen today counts from tomorrow on; a day on which nobody looked neither teaches nor ages anything.
    """

    days: float = 0.0
    learnt: dict[str, dict[int, float]] = field(default_factory=dict)
    today: dict[str, dict[int, float]] = field(default_factory=dict)

    def see(self, symbol: str, slot: int, count: float = 1.0) -> None:
        """Note requests of today."""
        slots = self.today.setdefault(symbol, {})
        slots[slot] = slots.get(slot, 0.0) + count

    def end_day(self) -> None:
        """Let today become a part of what is known."""
        keeps = 0.5 ** (1 / HALF_LIFE)
        self.days = self.days * keeps + 1
        for slots in self.learnt.values():
            for slot in slots:
                slots[slot] *= keeps
        for symbol, slots in self.today.items():
            known = self.learnt.setdefault(symbol, {})
            for slot, count in slots.items():
                known[slot] = known.get(slot, 0.0) + count
        self.today = {}
        kept = {
            symbol: {slot: weight for slot, weight in slots.items() if weight >= FORGOTTEN}
            for symbol, slots in self.learnt.items()
        }
        most = sorted((s for s in kept if kept[s]), key=lambda s: (-sum(kept[s].values()), s))[:MOST_SYMBOLS]
        self.learnt = {symbol: kept[symbol] for symbol in most}

    def expected(self, symbol: str, first: int, last: int) -> float:
        """How many requests of *symbol* a day brings from slot *first* to before slot *last*."""
        known = self.learnt.get(symbol, {})
        return sum(weight for slot, weight in known.items() if first <= slot < last) / (self.days + PRIOR_DAYS)

    def rates(self, symbols: Sequence[str], slot: int, assumed: Mapping[str, float]) -> "NDArray[np.float64]":
        """
        The requests to expect of each symbol (rows) in each slot of a day (columns), seen from *slot* of today.

        *assumed* says for some symbols how many a day there would be if nothing were known.
        """
        import numpy as np

        rates = np.zeros((len(symbols), SLOTS))
        for row, symbol in enumerate(symbols):
            rates[row] = PRIOR_DAYS * assumed.get(symbol, 0.0) / SLOTS
            for at, weight in self.learnt.get(symbol, {}).items():
                rates[row, at] += weight
            rates[row] /= self.days + PRIOR_DAYS
            seen = sum(self.today.get(symbol, {}).values())
            rates[row] *= (seen + TODAY) / (float(rates[row, :slot].sum()) + TODAY)
        return rates

    def to_json(self) -> dict[str, Any]:
        """What storage keeps."""

        def written(table: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
            return {name: {str(slot): round(n, 3) for slot, n in slots.items()} for name, slots in table.items()}

        return {"days": round(self.days, 4), "learnt": written(self.learnt), "today": written(self.today)}

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` wrote; ``{}`` knows nothing."""

        def read(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[int, float]]:
            return {name: {int(slot): n for slot, n in slots.items()} for name, slots in table.items()}

        return cls(body.get("days", 0.0), read(body.get("learnt", {})), read(body.get("today", {})))


@dataclass(slots=True)
class Gate:
    """
    Stops prefetching that is in vain.

    While it is off nothing is fetched; what would have been is judged all the same, which costs no call. It begins
    off, so that it never spends a call before it has shown that it would be of use.
    """

    is_on: bool = False
    used: float = 0.0
    wasted: float = 0.0
    switched_at: datetime | None = None

    @property
    def waste(self) -> float | None:
        """The share of the last few dozen answers that nobody used; None: too few were judged."""
        judged = self.used + self.wasted
        return self.wasted / judged if judged >= _ENOUGH else None

    def judge(self, *, is_used: bool, now: datetime) -> bool:
        """Take in how one answer ended; whether that switched the gate."""
        self.used = self.used * _FADES + is_used
        self.wasted = self.wasted * _FADES + (not is_used)
        waste = self.waste
        if waste is None or (waste <= LIMIT if self.is_on else waste > RETURN):
            return False
        self.is_on, self.switched_at = not self.is_on, now
        self.used = self.wasted = 0.0
        return True

    def to_json(self) -> dict[str, Any]:
        """What storage keeps."""
        return {
            "is_on": self.is_on,
            "used": round(self.used, 4),
            "wasted": round(self.wasted, 4),
            "switched": minute_of(self.switched_at) if self.switched_at else None,
        }

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` wrote; ``{}`` is a gate that nothing has passed yet."""
        switched = body.get("switched")
        return cls(
            is_on=body.get("is_on", False),
            used=body.get("used", 0.0),
            wasted=body.get("wasted", 0.0),
            switched_at=None if switched is None else instant_of(switched),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """
    What the rest of a day can bring with the calls that are left.

    ``price``: the requests that one more call would serve. By slot and symbol: ``cover``, the requests that a call
    serves; ``value``, what a symbol that is not fresh any more is worth from there on, calls paid.
    """

    price: float
    cover: "NDArray[np.float64]"
    value: "NDArray[np.float64]"
    life: int

    def gain(self, row: int, slot: int) -> float:
        """By how much a call for the symbol of *row* at *slot* is better than waiting for a better moment."""
        gain = self.cover[slot, row] - self.price + self.value[slot + self.life, row] - self.value[slot + 1, row]
        return float(gain)


def outlook(
    rates: "NDArray[np.float64]", free: Sequence[int], *, first: int, last: int, budget: int, life: int
) -> Outlook:
    """
    Plan at most *budget* calls from slot *first* to before *last*, each of which is fresh for *life* slots.

    *free* says from which slot on each symbol is not fresh. Each symbol's best instants are found by dynamic
    programming under one price of a call, and the price is the least at which the budget suffices: it is what a call
    now must beat, because a later one would serve as many.
    """
    import numpy as np

    count = len(rates)
    summed = np.concatenate([np.zeros((count, 1)), rates, np.zeros((count, life))], axis=1).cumsum(axis=1)
    cover = np.ascontiguousarray((summed[:, life : life + SLOTS] - summed[:, :SLOTS]).T)
    rows, starts = np.arange(count), np.clip(np.asarray(free, dtype=np.intp), first, SLOTS)
    low, high = FLOOR, max(FLOOR, float(cover[first:last].max(initial=0.0))) + 1e-9
    price = high
    value = np.zeros((SLOTS + life + 1, count))
    values, calls = (np.zeros((SLOTS + life + 1, _PRICES, count)) for _ in range(2))
    for _ in range(_NARROWED):
        prices = np.linspace(low, high, _PRICES)[:, None]
        for slot in range(last - 1, first - 1, -1):
            called, waited = cover[slot] - prices + values[slot + life], values[slot + 1]
            np.maximum(called, waited, out=values[slot])
            np.copyto(calls[slot], calls[slot + 1])
            np.add(calls[slot + life], 1, out=calls[slot], where=called > waited)
        enough = np.nonzero(calls[starts, :, rows].sum(axis=0) <= budget)[0]
        best = int(enough[0]) if len(enough) else _PRICES - 1
        price, value = float(prices[best, 0]), values[:, best].copy()
        low, high = float(prices[max(best - 1, 0), 0]), price
    return Outlook(price=price, cover=cover, value=value, life=life)


@dataclass(slots=True, kw_only=True)
class Ahead:
    """One answer that was fetched ahead, or (a shadow) would have been: fresh over [at, until)."""

    symbol: str
    at: datetime
    until: datetime
    is_shadow: bool
    is_used: bool = False


@dataclass(slots=True, kw_only=True)
class Prefetcher:
    """
    Decides what to fetch ahead; knows nothing but what it was told so far.

    Tell it every request (``asked``), every answer (``fetched``), and ask it (``wanted``) now and then, at least once
    a slot. Instants must not go back. ``life`` is how long an answer stays fresh.
    """

    life: timedelta
    zone: tzinfo = UTC
    habits: Habits = field(default_factory=Habits)
    gate: Gate = field(default_factory=Gate)
    day: int | None = None
    decided: int = -1
    fresh: dict[str, datetime] = field(default_factory=dict)
    ahead: list[Ahead] = field(default_factory=list)
    shadows: int = 0
    requests: float = 0.0
    hits: float = 0.0
    used: int = 0
    wasted: int = 0
    _outlook: Outlook | None = field(default=None, init=False)
    _rows: dict[str, int] = field(default_factory=dict, init=False)
    _basis: tuple[Any, ...] = field(default=(), init=False)

    @property
    def hit_rate(self) -> float | None:
        """The share of the requests of the last weeks that an answer fetched ahead was fresh for."""
        return self.hits / self.requests if self.requests else None

    @property
    def waste(self) -> float | None:
        """The share of all answers fetched ahead that nobody used before they went stale."""
        judged = self.used + self.wasted
        return self.wasted / judged if judged else None

    def pass_to(self, now: datetime) -> None:
        """Let time pass: days end, answers go stale and are judged."""
        day = now.astimezone(self.zone).toordinal()
        if self.day is not None and day > self.day:
            self.habits.end_day()
            keeps = 0.5 ** (1 / HALF_LIFE)
            self.requests, self.hits = self.requests * keeps, self.hits * keeps
            self.decided, self.shadows = -1, 0
        self.day = day if self.day is None else max(day, self.day)
        self.fresh = {symbol: until for symbol, until in self.fresh.items() if until > now}
        over = [a for a in self.ahead if a.until <= now]
        self.ahead = [a for a in self.ahead if a.until > now]
        for answer in over:
            if not answer.is_shadow:
                self.used += answer.is_used
                self.wasted += not answer.is_used
            if answer.is_shadow is not self.gate.is_on:  # what was begun under the other sign counts no more
                self.gate.judge(is_used=answer.is_used, now=now)

    def asked(self, symbol: str, at: datetime, count: int = 1) -> None:
        """Note *count* requests for a symbol."""
        self.pass_to(at)
        self.habits.see(symbol, self._slot(at), count)
        self.requests += count
        for answer in self.ahead:
            if answer.symbol == symbol and answer.at <= at:
                answer.is_used = True
                self.hits += 0 if answer.is_shadow else count

    def fetched(self, symbol: str, at: datetime, until: datetime | None = None, *, is_ahead: bool = False) -> None:
        """Note that a symbol is fresh until *until*; *is_ahead*: because we wanted it, not because somebody waited."""
        until = at + self.life if until is None else until
        self.fresh[symbol] = max(until, self.fresh.get(symbol, until))
        if is_ahead:
            self.ahead.append(Ahead(symbol=symbol, at=at, until=until, is_shadow=False))

    def wanted(
        self, now: datetime, *, budget: int, until: datetime, assumed: Mapping[str, float] | None = None
    ) -> list[str]:
        """
        What to fetch now, the most useful first, at most once a slot; nothing while the gate is off.

        *budget* is how many calls would be lost by *until*. Only symbols that were asked for are thought of;
        *assumed* says how many requests a day a watched symbol or an open signal leads us to expect of them.
        """
        self.pass_to(now)
        slot = self._slot(now)
        budget -= 0 if self.gate.is_on else self.shadows
        if slot <= self.decided or budget <= 0 or until <= now:
            return []
        self.decided = slot
        plan = self._plan(now, budget, until, assumed or {})
        if plan is None:
            return []
        busy = self._busy()
        gains = {s: plan.gain(row, slot) for s, row in self._rows.items() if s not in busy}
        best = sorted((s for s, gain in gains.items() if gain > 0), key=lambda s: (-gains[s], s))[:budget]
        if self.gate.is_on:
            return best
        self.ahead += [Ahead(symbol=s, at=now, until=now + self.life, is_shadow=True) for s in best]
        self.shadows += len(best)
        return []

    def is_worth(self, symbol: str, now: datetime, *, budget: int, until: datetime) -> bool:
        """Whether a call for somebody who asks now is worth more than what is planned with the calls left."""
        self.pass_to(now)
        if budget <= 0 or until <= now:
            return False
        plan = self._plan(now, budget, until, {})
        row = self._rows.get(symbol)
        return plan is not None and row is not None and plan.gain(row, self._slot(now)) > 0

    def _plan(self, now: datetime, budget: int, until: datetime, assumed: Mapping[str, float]) -> Outlook | None:
        slot = self._slot(now)
        is_today = until.astimezone(self.zone).toordinal() == self.day
        last = min(self._slot(until - SLOT / SLOTS) + 1, SLOTS) if is_today else SLOTS
        basis = (self.day, slot // _PLAN_HOLDS, budget, last, self.gate.is_on, tuple(sorted(assumed.items())))
        if basis != self._basis or self._outlook is None:
            symbols = sorted(self.habits.learnt)
            self._basis, self._rows = basis, {symbol: row for row, symbol in enumerate(symbols)}
            self._outlook = None
            if symbols:
                busy = self._busy()
                free = [self._free(busy.get(symbol), slot) for symbol in symbols]
                rates = self.habits.rates(symbols, slot, assumed)
                life = max(self.life // SLOT, 1)
                self._outlook = outlook(rates, free, first=slot, last=max(last, slot + 1), budget=budget, life=life)
        return self._outlook

    def _busy(self) -> Mapping[str, datetime]:
        """Until when symbols are fresh; while the gate is off, or would be."""
        if self.gate.is_on:
            return self.fresh
        return {**self.fresh, **{a.symbol: a.until for a in self.ahead if a.is_shadow}}

    def _free(self, until: datetime | None, slot: int) -> int:
        if until is None:
            return slot
        if until.astimezone(self.zone).toordinal() != self.day:
            return SLOTS
        return self._slot(until + SLOT - timedelta(microseconds=1))

    def _slot(self, at: datetime) -> int:
        local = at.astimezone(self.zone)
        return (local.hour * 60 + local.minute) // (SLOT // timedelta(minutes=1))

    def to_json(self) -> dict[str, Any]:
        """What storage keeps; instants to the minute."""
        return {
            "habits": self.habits.to_json(),
            "gate": self.gate.to_json(),
            "day": self.day,
            "decided": self.decided,
            "fresh": {symbol: minute_of(until) for symbol, until in self.fresh.items()},
            "ahead": [[a.symbol, minute_of(a.at), minute_of(a.until), a.is_shadow, a.is_used] for a in self.ahead],
            "shadows": self.shadows,
            "requests": round(self.requests, 3),
            "hits": round(self.hits, 3),
            "used": self.used,
            "wasted": self.wasted,
        }

    @classmethod
    def of(cls, body: Mapping[str, Any], *, life: timedelta, zone: tzinfo = UTC) -> Self:
        """Read what ``to_json`` wrote; ``{}`` is one that has seen nothing."""
        rows: Iterable[tuple[str, int, int, bool, bool]] = body.get("ahead", ())
        return cls(
            life=life,
            zone=zone,
            habits=Habits.of(body.get("habits", {})),
            gate=Gate.of(body.get("gate", {})),
            day=body.get("day"),
            decided=body.get("decided", -1),
            fresh={symbol: instant_of(until) for symbol, until in body.get("fresh", {}).items()},
            ahead=[
                Ahead(symbol=s, at=instant_of(at), until=instant_of(until), is_shadow=shadow, is_used=used)
                for s, at, until, shadow, used in rows
            ],
            shadows=body.get("shadows", 0),
            requests=body.get("requests", 0.0),
            hits=body.get("hits", 0.0),
            used=body.get("used", 0),
            wasted=body.get("wasted", 0),
        )


def slack(left: int, *, demand: float, amount: int, share: float = 1.0) -> int:
    """
    How many of the calls *left* in a window would be lost: what *demand* will likely take is left alone.

    Likely is two deviations above what was expected. *share* of the *amount* is all that prefetching may use up at
    all, whatever was used before.
    """
    likely = demand + 2 * max(demand, 0.0) ** 0.5
    used = amount - left
    return max(0, min(int(left - likely), int(share * amount) - used))
