"""Finnhub's webhook over HTTP, and what follows from a report."""

import json
import sys
from datetime import timedelta
from typing import Any

import pytest

from shared.clock import format_instant
from shared.market.hooks import SWEEP_AFTER
from tests.functions.running_app import NOW, SECRETS, Answer, App, Reply, waves

pytestmark = [pytest.mark.asyncio(loop_scope="session")]

SECRET = SECRETS["FINNHUB_WEBHOOK_SECRET"]
TYPE = "market.earnings_reported.v1"


def a_body(symbol: str, **changes: Any) -> bytes:
    row = {"symbol": symbol, "date": str(NOW.date()), "eps_actual": 1.62, "eps_estimate": 1.5}
    return json.dumps({"event": "earnings", "data": [row | changes]}).encode()


async def post(app: App, body: bytes, secret: str | None = SECRET) -> Answer:
    """Call the webhook as Finnhub does: no key, a secret in a header."""
    headers = {"Content-Type": "application/json", **({"X-Finnhub-Secret": secret} if secret is not None else {})}
    async with app._http.post(f"{app._url}/api/hooks/finnhub", data=body, headers=headers) as answer:
        return app._kept(Answer(answer.status, answer.headers, await answer.text()))


def told(app: App) -> list[dict[str, Any]]:
    """The reports that the topic was told of, taken from it."""
    found = [event for event in app.neighbours.events if event["type"] == TYPE]
    app.neighbours.events = [event for event in app.neighbours.events if event["type"] != TYPE]
    return found


def core() -> Any:
    return sys.modules["function_app"].core


async def test_report_is_taken_stored_and_told(app: App) -> None:
    """No key is asked for; the answer comes when the report is safe."""
    answer = await post(app, a_body("HOOKED"))
    assert (answer.status, answer.json()) == (200, {"outcome": "taken", "reports": 1, "reason": None})
    [event] = told(app)
    assert (event["subject"], event["data"]["eps_actual"]) == ("symbols/HOOKED", 1.62)
    assert event["data"]["occurred_at"] == format_instant(NOW)

    again = await post(app, a_body("HOOKED"))
    assert again.json()["outcome"] == "repeated"
    assert told(app) == []


@pytest.mark.parametrize("secret", [None, "", "guessed", SECRET[:-1], SECRET + " x"])
async def test_stranger_is_not_let_in(app: App, secret: str | None) -> None:
    """401 as problem+json, which says what is missing and shows nothing."""
    answer = await post(app, a_body("STRANGER"), secret)
    assert (answer.status, answer.content_type) == (401, "application/problem+json")
    assert "X-Finnhub-Secret" in answer.json()["detail"]
    assert SECRET not in answer.text
    assert told(app) == []


@pytest.mark.parametrize("body", [b"This is a test.", b"", b"\xff", b"[1]", b"{}", b'{"event":"earnings","data":[]}'])
async def test_what_cannot_be_used_is_acknowledged(app: App, body: bytes) -> None:
    """The dashboard's test button sends no JSON: refusing it for days would switch the webhook off."""
    before = (await core().finnhub_hook.counts()).get("dropped", 0)
    answer = await post(app, body)
    assert (answer.status, answer.json()["outcome"]) == (200, "dropped")
    assert (await core().finnhub_hook.counts())["dropped"] == before + 1
    assert told(app) == []


async def test_too_large_a_body_is_acknowledged(app: App) -> None:
    """It is dropped unread."""
    answer = await post(app, b"[" * 400_000)
    assert (answer.status, answer.json()["reason"]) == (200, "the body has more than 262144 bytes")


async def test_report_is_told_later_when_the_topic_is_down(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acknowledged, because it is stored; a timer tells it."""
    with app.neighbours.trouble(topic=Reply(503, "down")):
        answer = await post(app, a_body("OWED", eps_actual=2.0))
    assert (answer.status, answer.json()["outcome"]) == (200, "taken")
    assert told(app) == []
    hook = core().finnhub_hook
    later = hook._wall.now() + SWEEP_AFTER + timedelta(seconds=1)
    monkeypatch.setattr(hook, "_wall", Later(later))
    outcome = await app.fire("market_sweep_hooks")
    assert outcome.error is None
    assert [event["data"]["eps_actual"] for event in told(app)] == [2.0]


class Later:
    def __init__(self, at: Any) -> None:
        self.at = at

    def now(self) -> Any:
        return self.at


async def test_report_makes_the_quote_of_a_watched_symbol_due(app: App) -> None:
    """The market is closed, and still the event makes somebody look; told twice it is the same."""
    await app.follow("REPORTS", waves(40))
    await app.fire("market_refresh_quotes")
    quotes = core().market.quotes
    assert (await quotes.get("REPORTS")).due_at > NOW
    await post(app, a_body("REPORTS"))
    [event] = told(app)

    for _ in range(2):
        assert (await app.notify("market_on_earnings_reported", event)).status == 202

    assert (await quotes.get("REPORTS")).due_at == NOW
    calls = app.neighbours.provider_calls()
    assert (await app.fire("market_refresh_quotes")).error is None
    assert app.neighbours.provider_calls() > calls
    assert (await quotes.get("REPORTS")).due_at > NOW
    assert (await app.notify("market_on_earnings_reported", event)).status == 202
    assert (await quotes.get("REPORTS")).due_at > NOW, "it has been looked for"


async def test_event_that_cannot_be_read_is_buried(app: App) -> None:
    """It is acknowledged and kept as a dead letter."""
    event = {
        "specversion": "1.0",
        "id": "unreadable-report",
        "source": "/troop/market",
        "type": TYPE,
        "subject": "symbols/AAPL",
        "time": "2026-11-21T12:14:20Z",
        "data": {"symbol": 7},
    }
    assert (await app.notify("market_on_earnings_reported", event)).status == 202
    letters = (await app.ask("GET", "/api/deadletters", headers=await app.signed_in("olga", role="operator"))).json()[
        "items"
    ]
    assert "unreadable-report" in [letter["event_id"] for letter in letters]


async def test_secret_is_in_nothing_that_is_kept(app: App) -> None:
    """Whatever the sender repeats of it in a body, and however often it is guessed."""
    await post(app, a_body("ECHO", note=SECRET))
    await post(app, json.dumps({"event": SECRET}).encode())
    await post(app, a_body("ECHO"), SECRET + "!")
    kept = [
        json.dumps(dict(document.body))
        for container in ("system", "quota")
        for document in await core().documents.feed(container, limit=500)
    ]
    assert any("ECHO" in text for text in kept)
    assert not [text for text in kept if SECRET in text]
    told(app)
