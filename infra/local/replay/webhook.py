"""
Finnhub's earnings webhook: posts a report to the app when its instant passes on the market clock.

The secret goes along as a plain header. An answer that is no 2xx is tried again; after several deliveries in a row
that were given up the webhook is switched off, as Finnhub does after days of failure, until somebody switches it
on. Reports that pass meanwhile are not told later.
"""

import asyncio
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from aiohttp import web

from infra.local.faults import problem
from infra.local.replay.almanac import Almanac, Report
from shared.clock import Clock, format_instant, parse_instant
from shared.errors import NotFoundError

if TYPE_CHECKING:
    from aiohttp import ClientSession

SENT_AS = "X-Finnhub-Secret"
PATH = "/webhooks/finnhub"
LOOK_EVERY = 0.5
PATIENCE = 5.0
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Between the attempts of one delivery."""
MOST_GIVEN_UP = 3
"""Deliveries given up in a row that switch the webhook off."""
REMEMBERED = 50
_TEST = "This is a test of your Finnhub webhook, sent by the TROOP replay."


@dataclass(slots=True, kw_only=True)
class _Counts:
    delivered: int = 0
    given_up: int = 0
    in_a_row: int = 0
    attempts: int = 0


@dataclass(slots=True, kw_only=True)
class EarningsWebhook:
    """Posts every report once to *url*, at the latest half a second after it came out."""

    almanac: Almanac
    wall: Clock
    url: str
    secret: str
    waits: Sequence[float] = WAITS
    enabled: bool = True
    through: datetime | None = None
    """The market instant up to which every report was told, or given up."""
    disabled_because: str = ""
    _counts: _Counts = field(default_factory=_Counts)
    _latest: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _session: "ClientSession | None" = None
    _runner: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look for reports; a first start tells of none that came out before it."""
        if self.through is None:
            self.through = self.almanac.now()
        self._runner = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop; a delivery under way is begun again at the next start."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def look(self) -> None:
        """Tell of every report that came out since the last look, oldest first."""
        now = self.almanac.now()
        since = self.through or now
        if now < since:
            return
        if self.enabled:
            for out_at, reports in groupby(self.almanac.came_out(since, now), key=attrgetter("out_at")):
                await self._deliver(list(reports))
                self.through = out_at
                if not self.enabled:
                    break
        self.through = now

    def stats(self) -> dict[str, Any]:
        """Whether it is on, and how its deliveries ended."""
        return {
            "url": self.url,
            "enabled": self.enabled,
            "disabled_because": self.disabled_because,
            "delivered": self._counts.delivered,
            "given_up": self._counts.given_up,
            "attempts": self._counts.attempts,
        }

    def state(self) -> dict[str, Any]:
        """What outlives the process, as plain values."""
        counts = self._counts
        return {
            "through": format_instant(self.through) if self.through else None,
            "enabled": self.enabled,
            "disabled_because": self.disabled_because,
            "counts": [counts.delivered, counts.given_up, counts.in_a_row, counts.attempts],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.through = parse_instant(state["through"]) if state["through"] else None
        self.enabled, self.disabled_because = state["enabled"], state["disabled_because"]
        delivered, given_up, in_a_row, attempts = state["counts"]
        self._counts = _Counts(delivered=delivered, given_up=given_up, in_a_row=in_a_row, attempts=attempts)

    def routes(self) -> list[web.RouteDef]:
        """The webhook's page at the provider: look, switch, test, and send a report now."""
        return [
            web.get(PATH, self._show),
            web.put(PATH, self._switch),
            web.post(f"{PATH}/test", self._test),
            web.post(f"{PATH}/send", self._send_now),
        ]

    async def send(self, symbol: str) -> int:
        """
        Post the newest report of a symbol now, once, whether the webhook is on or not; gives the answer's status.

        Raises:
            NotFoundError: no report of it has come out yet.

        """
        now = self.almanac.now()
        reports = [r for r in self.almanac.reports(date.min, now.date(), symbol) if r.out_at <= now]
        if not reports:
            raise NotFoundError(f"no report of {symbol} has come out by {format_instant(now)}")
        status, why = await self._post(payload([reports[-1]]), "application/json")
        self._remember([symbol], 1, status, why, kind="sent by hand")
        return status

    async def _run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY)

    async def _deliver(self, reports: Sequence[Report]) -> None:
        body = payload(reports)
        symbols = [report.symbol for report in reports]
        status, why = 0, ""
        for number, wait in enumerate([*self.waits, None], start=1):
            status, why = await self._post(body, "application/json")
            if _is_taken(status):
                self._counts.delivered += 1
                self._counts.in_a_row = 0
                self._remember(symbols, number, status, why, kind="earnings")
                return
            if wait is not None:
                await asyncio.sleep(wait)
        self._counts.given_up += 1
        self._counts.in_a_row += 1
        self._remember(symbols, len(self.waits) + 1, status, why, kind="earnings")
        if self._counts.in_a_row >= MOST_GIVEN_UP:
            self.enabled = False
            self.disabled_because = f"{MOST_GIVEN_UP} deliveries in a row were given up; the last one: {why}"

    async def _post(self, body: str, content_type: str) -> tuple[int, str]:
        """The status, 0 where there was no answer, and what became of it in words."""
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE))
        self._counts.attempts += 1
        headers = {"Content-Type": content_type, SENT_AS: self.secret}
        try:
            async with self._session.post(self.url, data=body, headers=headers, allow_redirects=False) as answer:
                return answer.status, f"answered {answer.status}"
        except (aiohttp.ClientError, TimeoutError) as e:
            return 0, f"no answer ({type(e).__name__})"

    def _remember(self, symbols: Sequence[str], attempts: int, status: int, why: str, *, kind: str) -> None:
        self._latest.appendleft(
            {
                "kind": kind,
                "symbols": list(symbols),
                "market_instant": format_instant(self.almanac.now()),
                "ended_at": format_instant(self.wall.now()),
                "attempts": attempts,
                "delivered": _is_taken(status),
                "outcome": why,
            }
        )

    # --- the provider's page

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response({**self.stats(), "items": list(self._latest)})

    async def _switch(self, request: web.Request) -> web.Response:
        wanted = _object(await request.text()).get("enabled")
        if not isinstance(wanted, bool):
            return problem(400, 'send {"enabled": true} or {"enabled": false}')
        self.enabled = wanted
        self._counts.in_a_row = 0
        self.disabled_because = "" if wanted else "switched off by hand"
        return web.json_response(self.stats())

    async def _test(self, request: web.Request) -> web.Response:
        status, why = await self._post(_TEST, "text/plain")
        self._remember([], 1, status, why, kind="test")
        return web.json_response({"status": status, "outcome": why})

    async def _send_now(self, request: web.Request) -> web.Response:
        symbol = _object(await request.text()).get("symbol")
        if not isinstance(symbol, str):
            return problem(400, 'send {"symbol": "AAPL"}')
        try:
            status = await self.send(symbol.strip().upper())
        except NotFoundError as e:
            return problem(404, str(e))
        return web.json_response({"status": status, "outcome": self._latest[0]["outcome"]})


def payload(reports: Sequence[Report]) -> str:
    """The webhook's body: unlike the calendar's, its names are in snake case."""
    data = [
        {
            "date": str(report.day),
            "eps_actual": report.eps_actual,
            "eps_estimate": report.eps_estimate,
            "revenue_actual": report.revenue_actual,
            "revenue_estimate": report.revenue_estimate,
            "symbol": report.symbol,
        }
        for report in reports
    ]
    return json.dumps({"event": "earnings", "data": data})


def _is_taken(status: int) -> bool:
    return 200 <= status < 300


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
