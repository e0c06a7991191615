"""What every replayed provider does at the front desk: strike faults, count calls, refuse, and keep count of it."""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiohttp import web

from infra.local.replay.plans import Plan, Turnstile
from infra.local.replay.refusals import REFUSALS, RefusalError
from infra.local.replay.tapes import Tapes
from shared.clock import Clock

REMEMBERED = 2000
_BROKEN_GATEWAY = (
    "<!doctype html><html><head><title>{status}</title></head>"
    "<body><h1>{status}</h1><p>The replay shows this page because a fault told it to.</p></body></html>"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """What goes wrong with one answer that the provider itself must give."""

    refusal: str = ""
    status: int = 0
    """Give that refusal with this status instead of its own."""
    retry_after: float | None = None
    page: int = 0
    """Answer with an HTML page of this status instead."""
    sessions: int = 0
    """Answer, with HTTP 200, the market as it was that many sessions ago."""
    is_truncated: bool = False
    is_bare: bool = False
    """Leave out the headers that tell of limits."""


type Faults = Callable[[str, web.Request], Awaitable[web.StreamResponse | Strike | None]]
"""Asked before each answer with the provider's name; gives an answer of its own, a strike, or None to go on."""


@dataclass(slots=True, kw_only=True)
class Desk:
    """One provider's front desk."""

    provider: str
    plans: Mapping[str, Plan]
    turnstile: Turnstile
    tapes: Tapes
    wall: Clock
    faults: Faults | None = None
    calls: int = 0
    answers: int = 0
    faulted: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    latest: deque[tuple[datetime, str]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    async def serve(
        self,
        request: web.Request,
        answer: Callable[[], web.Response],
        *,
        symbol: str,
        limits: Callable[[bool], Mapping[str, str]] = lambda _: {},
        words: Mapping[str, object] | None = None,
    ) -> web.StreamResponse:
        """
        Give one answer, or what faults make of it.

        *answer* may raise RefusalError, whose texts *words* fill; *limits* gives the headers that tell what is
        left, or, when a fault says so, that nothing is.
        """
        self.calls += 1
        struck = await self.faults(self.provider, request) if self.faults else None
        if isinstance(struck, web.StreamResponse):
            self.faulted += 1
            return struck
        strike = struck or Strike()
        refused = ""
        with self.tapes.sessions_ago(strike.sessions) if strike.sessions else nullcontext():
            try:
                if strike.refusal:
                    raise RefusalError(strike.refusal, calls=0, used=1, text="a fault refuses this", parameter="fault")
                response = _page(strike.page) if strike.page else answer()
            except RefusalError as e:
                refused = e.reason
                response = REFUSALS[self.provider][refused].response({**(words or {}), **e.words})
        if strike.status:
            response.set_status(strike.status)
        if not (strike.is_bare or strike.page):
            response.headers.update(limits(bool(strike.status)))
        if strike.retry_after is not None:
            response.headers["Retry-After"] = f"{strike.retry_after:g}"
        if struck:
            self.faulted += 1
        elif refused:
            self.refusals[refused] += 1
        else:
            self.answered(symbol)
        return _cut_short(response) if strike.is_truncated else response

    def told(self, reason: str, words: Mapping[str, object]) -> Any:  # noqa: ANN401 - any JSON
        """The body of one of the provider's refusals, for an answer that holds several."""
        return REFUSALS[self.provider][reason].filled(words)

    def answered(self, symbol: str) -> None:
        """Count an answer, and remember when it was given."""
        self.answers += 1
        self.latest.append((self.wall.now(), symbol))

    def stats(self) -> dict[str, Any]:
        """How many calls came, how they ended, and why some were refused."""
        return {
            "calls": self.calls,
            "answers": self.answers,
            "faulted": self.faulted,
            "refusals": dict(self.refusals),
        }

    def state(self) -> dict[str, Any]:
        """The counts and the windows, as plain values."""
        return {**self.stats(), "windows": self.turnstile.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.calls, self.answers, self.faulted = state["calls"], state["answers"], state["faulted"]
        self.refusals = Counter(state["refusals"])
        self.turnstile.restore(state["windows"])


def _page(status: int) -> web.Response:
    return web.Response(text=_BROKEN_GATEWAY.format(status=status), status=status, content_type="text/html")


def _cut_short(response: web.Response) -> web.Response:
    """The first half of an answer, as if that were all of it."""
    body = response.body if isinstance(response.body, bytes) else b""
    response.body = body[: len(body) // 2]
    return response
