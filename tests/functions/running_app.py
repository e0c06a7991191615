"""The real app in this process, behind the real host; everyone it talks to is one obedient stand-in."""

import json
import os
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import sin
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from infra.local.discord import DEFAULT_WEBHOOK
from infra.local.host.host import Host, Options
from infra.local.host.worker import Function, Outcome
from infra.local.oidc import PATH as OIDC
from infra.local.oidc import OidcIssuer
from infra.local.topic import load_subscriptions
from infra.local.up.settings import Place, embedded
from shared.clock import MarketTime
from shared.market.sessions import calendar
from shared.settings import ROOT, Settings

NOW = datetime(2013, 1, 18, 22, tzinfo=UTC)
"""The market instant at which the app's market stands still: a Friday, one hour after the close."""
LIVE_FROM = "2013-01-02T00:00:00Z"
SESSIONS = [s for s in calendar().sessions(datetime(2012, 3, 1, tzinfo=UTC).date(), NOW.date()) if s.closes_at < NOW]

SECRETS = {
    "ALPHA_VANTAGE_KEY": "CANARYALPHAVANTAGE7Q",
    "FINNHUB_KEY": "canaryfinnhub4x2m9k7w",
    "FINNHUB_WEBHOOK_SECRET": "canary-finnhub-webhook-3Vv9kq",
    "TWELVE_DATA_KEY": "canarytwelvedata8s1n5b3z",
    "POLYGON_KEY": "canary_polygon_6Jd0wX2mQ",
    "EVENT_GRID_TOPIC_KEY": "canary-topic-key-8h3Lq0",
    "SIGNALR_ACCESS_KEY": "canary-signalr-access-key-of-32-bytes-or-more",
    "DISCORD_TOKEN": "canary-discord-token_" + "Zq9" * 15,
    "UNSUBSCRIBE_KEY": "canary-unsubscribe-key-of-32-characters-4Tz",
    "ENDPOINT_KEYS": "canary:Y2FuYXJ5LWVuZHBvaW50LWtleS0zMi1ieXRlcyE5SmE=",
}
"""What must never be seen anywhere: each is, or is inside, a secret setting of the app."""

HOST_KEYS = {
    "TROOP_FUNCTION_KEY": "canary-function-key-5Tt1",
    "TROOP_SYSTEM_KEY": "canary-system-key-2Pp8",
    "TROOP_MASTER_KEY": "canary-master-key-6Rr4",
}
"""The host's keys: callers show them in headers and addresses, and the app never learns them."""

TIMER = json.dumps(
    {
        "Schedule": {"AdjustForDST": True},
        "ScheduleStatus": {"Last": NOW.isoformat(), "LastUpdated": NOW.isoformat(), "Next": NOW.isoformat()},
        "IsPastDue": False,
    }
)


PROVIDERS = ("alpha_vantage", "finnhub", "twelve_data", "polygon")

HANGS_UP = 599
"""A neighbour with this status says nothing at all."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a neighbour in trouble answers."""

    status: int
    body: object = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request a neighbour got."""

    neighbour: str
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class Neighbours:
    """
    Providers, topic, SignalR, Discord and the OIDC issuer on one port; each does as asked, or as ``trouble`` says.

    ``prices`` are the last closes by symbol; a symbol in ``late`` misses so many of the newest sessions.
    """

    def __init__(self) -> None:
        self.url = ""
        self.prices: dict[str, Sequence[float]] = {}
        self.late: dict[str, int] = {}
        self.events: list[dict[str, Any]] = []
        self.asked: list[Asked] = []
        self._state = sqlite3.connect(":memory:", isolation_level=None)
        self._issuer = OidcIssuer(self._state, lambda: f"{self.url}{OIDC}")
        self._troubles: dict[str, Reply] = {}

    @contextmanager
    def trouble(self, **replies: Reply) -> Iterator[None]:
        """Let the named neighbours answer *replies* to everything."""
        before = dict(self._troubles)
        self._troubles |= replies
        try:
            yield
        finally:
            self._troubles = before

    def provider_calls(self) -> int:
        """How often a market-data provider was asked so far."""
        return sum(a.neighbour in PROVIDERS for a in self.asked)

    def close(self) -> None:
        """Forget the issuer's keys."""
        self._state.close()

    def application(self) -> web.Application:
        app = web.Application()
        app.add_routes(self._issuer.routes())
        app.router.add_route("*", "/{path:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        neighbour = _neighbour_of(request.path)
        body = await request.read()
        query = dict(request.query)
        self.asked.append(Asked(neighbour, request.method, request.path, query, dict(request.headers), body))
        if trouble := self._troubles.get(neighbour):
            if trouble.status == HANGS_UP and request.transport:
                request.transport.abort()
            return _reply(trouble)
        match neighbour:
            case "alpha_vantage":
                return web.json_response(self._daily(query["symbol"]))
            case "finnhub":
                if not request.path.endswith("/quote"):  # bars are on its paid plans
                    return _reply(Reply(403, {"error": "You don't have access to this resource."}))
                return web.json_response(self._quote(query["symbol"]))
            case "twelve_data":
                refusal = {"code": 404, "message": "**symbol** not found", "status": "error"}
                return web.json_response(refusal)
            case "polygon":
                return web.json_response({"status": "OK", "resultsCount": 0})
            case "topic":
                self.events += json.loads(body)
                return web.Response()
            case "discord":
                return web.json_response({"id": str(len(self.asked))})
            case _:
                return web.Response(status=202)

    def _daily(self, symbol: str) -> dict[str, Any]:
        if symbol not in self.prices:
            return {"Error Message": "Invalid API call. Please retry or visit the documentation."}
        prices, end = self.prices[symbol], len(SESSIONS) - self.late.get(symbol, 0)
        rows = {
            str(session.date): {
                "1. open": f"{price:.4f}",
                "2. high": f"{price * 1.01:.4f}",
                "3. low": f"{price * 0.99:.4f}",
                "4. close": f"{price:.4f}",
                "5. adjusted close": f"{price:.4f}",
                "6. volume": "1000",
                "7. dividend amount": "0.0000",
                "8. split coefficient": "1.0",
            }
            for session, price in zip(SESSIONS[end - len(prices) : end], prices, strict=True)
        }
        return {"Meta Data": {"2. Symbol": symbol, "5. Time Zone": "US/Eastern"}, "Time Series (Daily)": rows}

    def _quote(self, symbol: str) -> dict[str, Any]:
        prices = self.prices.get(symbol, [0.0])
        last = SESSIONS[-1].closes_at.timestamp() if symbol in self.prices else 0
        return {"c": prices[-1], "pc": prices[-2] if len(prices) > 1 else 0, "t": last}


def _neighbour_of(path: str) -> str:
    for name in (*PROVIDERS, "topic"):
        if path.startswith(f"/{name}"):
            return name
    return "discord" if path.startswith("/discord") else "signalr"


def _reply(trouble: Reply) -> web.Response:
    if isinstance(trouble.body, str):
        return web.Response(status=trouble.status, text=trouble.body)
    return web.json_response(trouble.body, status=trouble.status)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the app answered."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0]

    def json(self) -> Any:
        return json.loads(self.text)


class App:
    """
    The running app: ask it over HTTP, fire its timers, bring it events.

    ``answers`` and ``outcomes`` keep whatever left it; ``secrets`` is what it was told to keep to itself.
    """

    def __init__(self, host: Host, url: str, http: aiohttp.ClientSession, neighbours: Neighbours, folder: Path) -> None:
        self.secrets: list[str] = sys.modules["function_app"].settings.secrets()
        self.functions: Mapping[str, Function] = host.worker.functions
        self.neighbours = neighbours
        self.folder = folder
        self.answers: list[Answer] = []
        self.outcomes: list[Outcome] = []
        self._worker = host.worker
        self._url = url
        self._http = http
        self._tokens: dict[tuple[str, str], str] = {}
        self._watched: dict[str, None] = {}
        self._subscriptions = load_subscriptions(ROOT / "infra/subscriptions.toml")

    async def ask(
        self,
        method: str,
        path: str,
        *,
        key: bool = False,
        headers: Mapping[str, str] | None = None,
        json: object = None,
        **query: str,
    ) -> Answer:
        """Call a route as anybody, or with the function key."""
        sent = {**({"x-functions-key": HOST_KEYS["TROOP_FUNCTION_KEY"]} if key else {}), **(headers or {})}
        async with self._http.request(method, self._url + path, params=query, headers=sent, json=json) as answer:
            return self._kept(Answer(answer.status, answer.headers, await answer.text()))

    async def get(self, path: str, **query: str) -> Answer:
        """GET as anybody."""
        return await self.ask("GET", path, **query)

    async def token(self, subject: str, *, role: str = "subscriber") -> str:
        """An access token of the issuer that the app trusts, for a subscriber or an operator."""
        if (subject, role) not in self._tokens:
            wanted = {"subject": subject, "role": role}
            async with self._http.post(f"{self.neighbours.url}{OIDC}/token", params=wanted) as answer:
                self._tokens[subject, role] = (await answer.json())["access_token"]
        return self._tokens[subject, role]

    async def signed_in(self, subject: str, *, role: str = "subscriber") -> dict[str, str]:
        """The header with which somebody is signed in."""
        return {"Authorization": f"Bearer {await self.token(subject, role=role)}"}

    async def forgive(self) -> None:
        """Forget what providers refused, so that they are asked again at once."""
        core = sys.modules["function_app"].core
        documents, fetcher = core.documents, core.supply.fetcher
        fetcher.health._of.clear()  # what this process believes of providers, besides what is stored
        for learned in (fetcher.entitlements._refused, fetcher.entitlements._read_at, fetcher.entitlements._unknown):
            learned.clear()
        for provider in (*PROVIDERS, "unknown"):
            for document in await documents.page("quota", provider):
                await documents.delete("quota", document)
        for series in await documents.feed("series", limit=500):
            if series.body["trouble"] and series.due_at:
                await documents.replace(
                    "series", series.with_body(series.body, due_at=series.due_at - timedelta(days=1))
                )

    async def fire(self, timer: str) -> Outcome:
        """Invoke a timer function once."""
        outcome = await self._worker.invoke_timer(timer, TIMER)
        self.outcomes.append(outcome)
        return outcome

    async def notify(self, function: str, event: object) -> Answer:
        """Deliver one event to one function, as Event Grid does."""
        async with self._http.post(
            f"{self._url}/runtime/webhooks/EventGrid",
            params={"functionName": function, "code": HOST_KEYS["TROOP_SYSTEM_KEY"]},
            headers={"aeg-event-type": "Notification"},
            data=json.dumps([event]),
        ) as answer:
            return self._kept(Answer(answer.status, answer.headers, await answer.text()))

    async def deliver(self) -> list[Answer]:
        """Bring every published event to whom it wakes, until none is left; returns what was answered."""
        answers: list[Answer] = []
        while self.neighbours.events:
            event = self.neighbours.events.pop(0)
            woken = [s.function for s in self._subscriptions if event["type"] in s.event_types]
            answers += [await self.notify(function, event) for function in woken]
        return answers

    def watch(self, *symbols: str) -> None:
        """Put symbols on the watchlist file; the next ingest sees them."""
        self._watched |= dict.fromkeys(symbols)
        listed = ", ".join(json.dumps(symbol) for symbol in self._watched)
        (self.folder / "watchlist.toml").write_text(f'[[watch]]\ninterval = "1d"\nsymbols = [{listed}]\n')

    async def follow(self, symbol: str, prices: Sequence[float]) -> None:
        """Watch a symbol whose last closes are *prices*, and bring everything in that follows from them."""
        self.neighbours.prices[symbol] = prices
        self.watch(symbol)
        outcome = await self.fire("signals_ingest")
        assert outcome.error is None, outcome.error
        assert {answer.status for answer in await self.deliver()} <= {202}

    def _kept(self, answer: Answer) -> Answer:
        self.answers.append(answer)
        return answer


def waves(count: int = len(SESSIONS)) -> list[float]:
    """Closes that swing enough to raise signals, in the last days too."""
    return [100 + 15 * sin(day / 4) for day in range(count)]


@asynccontextmanager
async def running_app(folder: Path) -> AsyncIterator[App]:
    """
    Index function_app.py in this process and serve it.

    The worker library, the module and the tracer live in process globals: there is one app a process.
    """
    assert "function_app" not in sys.modules, "the app was imported before its settings were made"
    neighbours = Neighbours()
    async with _served(neighbours), aiohttp.ClientSession() as http:
        with pytest.MonkeyPatch.context() as patch:
            for name in Settings.model_fields:
                patch.delenv(name.upper(), raising=False)
            for name, value in _environment(folder, neighbours.url).items():
                patch.setenv(name, value)
            (folder / "watchlist.toml").write_text("")
            host = await Host.open(Options(app_dir=ROOT, data_dir=folder, timers=False), dict(os.environ))
        listener = _listener()
        await host.serve(listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield App(host, url, http, neighbours, folder)
        finally:
            await host.close()
            await _close_connections()


def _environment(folder: Path, url: str) -> dict[str, str]:
    time = MarketTime(market=NOW, wall=datetime(2020, 1, 1, tzinfo=UTC), speed=0)
    place = Place(app_url="http://127.0.0.1:7071", cloud_url=url, data=folder)
    values = embedded(place, time=time, live_from=LIVE_FROM, plan="unlimited", live=False)
    host, _, port = url.rpartition(":")
    return values | {
        **HOST_KEYS,
        **{name: value for name, value in SECRETS.items() if name in values},
        "AZURE_SIGNALR_CONNECTION_STRING": (
            f"Endpoint={host};Port={port};AccessKey={SECRETS['SIGNALR_ACCESS_KEY']};Version=1.0;"
        ),
        "DISCORD_WEBHOOK_URL": f"{url}/discord/api/webhooks/{DEFAULT_WEBHOOK[0]}/{SECRETS['DISCORD_TOKEN']}",
        "CONTENT_DIGEST_SETTLE_SECONDS": "0",
        "API_RATE_PER_MINUTE": "100000",
        "LOG_LEVEL": "DEBUG",
    }


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


@asynccontextmanager
async def _served(neighbours: Neighbours) -> AsyncIterator[None]:
    runner = web.AppRunner(neighbours.application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    neighbours.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield
    finally:
        await runner.cleanup()
        neighbours.close()


async def _close_connections() -> None:
    core = sys.modules["function_app"].core
    for provider in core.market.ingest.fetcher.providers:
        await provider.aclose()
    await core.tokens.aclose()
    await core.dead_letter_blobs.aclose()
    await core.publisher.close()
    await core.documents.close()
