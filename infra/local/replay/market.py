"""The replayed market as a whole: every provider over one catalogue, one market clock and one wall clock."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from aiohttp import web

from infra.local.replay.almanac import Almanac
from infra.local.replay.alpha_vantage import AlphaVantage
from infra.local.replay.catalogue import Catalogue, Progress
from infra.local.replay.desk import Desk, Faults
from infra.local.replay.finnhub import Finnhub
from infra.local.replay.plans import PLANS, Plan, Turnstile
from infra.local.replay.polygon import Polygon
from infra.local.replay.refusals import REFUSALS
from infra.local.replay.tapes import Tapes
from infra.local.replay.twelve_data import TwelveData
from shared.clock import Clock, format_instant


class Market:
    """
    Shows a catalogue through provider-shaped APIs, up to the market's now and never beyond.

    ``now`` is the market's clock; ``wall`` is what the providers' windows roll on. ``faults`` is asked before
    each answer and may give one of its own.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        now: Callable[[], datetime],
        wall: Clock,
        *,
        plans: Mapping[str, Plan] = PLANS,
        faults: Faults | None = None,
    ) -> None:
        self.catalogue = catalogue
        self._now = now
        tapes = Tapes(catalogue, now)
        self.almanac = Almanac(tapes)
        self._desks = {
            name: Desk(provider=name, plans=plans, turnstile=Turnstile(wall), tapes=tapes, wall=wall, faults=faults)
            for name in REFUSALS
        }
        self._routes = [
            *AlphaVantage(tapes, self.almanac, self._desks["alpha_vantage"]).routes(),
            *Finnhub(tapes, self.almanac, self._desks["finnhub"]).routes(),
            *TwelveData(tapes, self.almanac, self._desks["twelve_data"]).routes(),
            *Polygon(tapes, self.almanac, self._desks["polygon"]).routes(),
        ]

    def routes(self) -> list[web.RouteDef]:
        """Every path of every provider, and where people look, to mount in an aiohttp application."""
        return [*self._routes, web.get("/market/answers", self._show_answers)]

    def progress(self, now: datetime | None = None) -> Progress:
        """How much of the catalogue has closed, by the market's now unless told otherwise."""
        return self.catalogue.progress(now or self._now())

    def stats(self) -> dict[str, Any]:
        """By provider: how many calls came, how many were answered, faulted, and refused for which reason."""
        return {provider: desk.stats() for provider, desk in self._desks.items()}

    def state(self) -> dict[str, Any]:
        """The counted windows and statistics as plain values, for whoever outlives this object."""
        return {provider: desk.state() for provider, desk in self._desks.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave; a provider it does not name starts afresh."""
        for provider, desk in self._desks.items():
            if provider in state:
                desk.restore(state[provider])

    async def _show_answers(self, request: web.Request) -> web.Response:
        answers = [(at, provider, symbol) for provider, desk in self._desks.items() for at, symbol in desk.latest]
        items = [
            {"provider": provider, "symbol": symbol, "answered_at": format_instant(at)}
            for at, provider, symbol in sorted(answers, reverse=True)
        ]
        return web.json_response({"items": items})
