"""
Schemathesis asks the running app whatever its own openapi.json allows, and much that it does not.

It looks for answers of 500 and more, and for anything that is not as described: a status, a type of content, a body,
a header, a door that opens without its key. Cases come from the seed alone, so a failure is found again.

The short profile asks each operation as the caller that it is for; the long one asks each of them as everybody.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from tests.conftest import LONG
from tests.functions.running_app import HOST_KEYS, App
from tests.functions.test_openapi import NAMES, link_of, made, webhook_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1200 if LONG else 120)]

EXAMPLES = 6 if LONG else 2
"""How many random cases an operation gets, behind those at the limits of what is described, which it always gets."""

CALLERS = {"anonymous": ("anonymous",), "subscriber": ("subscriber",), "operator": ("operator", "key")}
"""Who asks, and the kinds of endpoints that are theirs."""

LEFT_OUT = {
    "unsupported_method": "the host answers 404, not 405, to a method that no function has; the app never sees it",
}
"""The only checks of Schemathesis that are not made, each with the reason; no operation is left out."""

MAY_WAIT = {
    "GET /bars/{symbol}": "for somebody we know it waits a little for a provider: 503 and Retry-After while it fetches",
    "GET /quotes/{symbol}": "the same",
}
"""Where 503 is an answer and no trouble of ours, if it says when to come back."""

REFUSED_WITH_REASON = ["2xx", "3xx", "400", "401", "403", "404", "409", "422", "429", "5xx"]
"""What a request that fits its schema may be answered: whether a cursor is ours, or a channel is set up here, no schema
can say. (5xx is another check's matter.)"""


@dataclass(slots=True)
class Findings:
    """What came of a run."""

    asked: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    breaches: dict[tuple[str, str], str] = field(default_factory=dict)

    def note(self, event: events.EngineEvent) -> None:
        """Keep what an event of the engine tells."""
        match event:
            case events.ScenarioFinished():
                self._note_scenario(event)
            case events.NonFatalError():
                self.errors.append(f"{event.label}: {event.value}")
            case events.FatalError():
                self.errors.append(str(event.exception))

    def _note_scenario(self, event: events.ScenarioFinished) -> None:
        recorder = event.recorder
        for case_id, interaction in recorder.interactions.items():
            self.asked[recorder.cases[case_id].value.operation.label] += 1
            if interaction.response is not None:
                self.statuses[interaction.response.status_code] += 1
        for case_id, checks in recorder.checks.items():
            for check in checks:
                case, response = recorder.cases[case_id].value, recorder.interactions[case_id].response
                if check.failure_info is not None and not _is_promised(check.name, case, response):
                    label, failure = case.operation.label, check.failure_info.failure
                    said = response.content[:300] if response else b""
                    text = f"{failure.title}: {failure.message}\n  {check.failure_info.code_sample}\n  {said!r}"
                    self.breaches.setdefault((check.name, label), text)

    def told(self) -> str:
        """Every breach, for a person."""
        return "\n".join(f"{check} | {label}\n  {text}" for (check, label), text in self.breaches.items())


def _is_promised(check: str, case: schemathesis.Case, response: schemathesis.Response | None) -> bool:
    """Whether what a check calls wrong is what the description says in words."""
    if check == "negative_data_rejection":
        return "" in (case.query or {}).values()  # the host drops a parameter without a value before the app sees it
    if check == "not_a_server_error" and response is not None:
        is_told_when = "retry-after" in response.headers
        return response.status_code == 503 and is_told_when and case.operation.label in MAY_WAIT
    return False


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def known(filled: App) -> dict[str, list[str]]:
    """What stands in paths and queries and is really there, so that not every question ends with 404."""
    found = {name: [await make(filled, "")] for name, make in NAMES.items() if name not in ("id", "symbol", "name")}
    found["id"] = [await made(filled, path) for path in ("/fetches", "/backtests", "/subscriptions")]
    first = (await filled.get("/api/alerts", limit="1")).json()["items"][0]
    return found | {
        "symbol": ["WAVE", "wave"],
        "name": ["sma-10-30"],
        "channel": ["discord", "signalr", "email"],
        "cursor": [first["cursor"]],
        "token": [await link_of(filled)],
        "source": ["alerts_on_signal_raised"],
        "subscriber": ["olga", "public"],
        "from": ["2012-12-24", "2013-01-02T21:00:00Z"],
        "zone": ["America/New_York"],
        "address": [webhook_of(filled)],
    }


PLACES = {
    **{f"path.{name}": name for name in (*NAMES, "name")},
    **{f"query.{name}": name for name in ("symbol", "cursor", "token", "source", "subscriber", "from")},
    "query.after": "cursor",
    "body.symbol": "symbol",
    "body.entry": "name",
    "body.from": "from",
    "body.channels[*]": "channel",
    "body.zone": "zone",
    "body.address": "address",
}
"""Where a known value may stand; two of three times it does."""


def run(
    base: str,
    description: Mapping[str, Any],
    headers: Mapping[str, str],
    known: Mapping[str, Sequence[str]],
    operations: Sequence[str],
    seed: int,
) -> Findings:
    """Ask everything as one caller; blocks, so it has a thread of its own."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "base-url": f"{base}/api",
            "headers": dict(headers),
            "workers": 1,
            "generation": {"max-examples": EXAMPLES, "no-shrink": True, "database": "none", "deterministic": False},
            "dictionaries": {name: {"values": list(values)} for name, values in known.items()},
            "parameters": {place: {"dictionary": name, "probability": 0.66} for place, name in PLACES.items()},
            "checks": {
                **{name: {"enabled": False} for name in LEFT_OUT},
                "positive_data_acceptance": {"expected-statuses": REFUSED_WITH_REASON},
            },
            "phases": {"stateful": {"enabled": LONG and seed == 0}, "coverage": {"unexpected-methods": []}},
        }
    )
    schema = schemathesis.openapi.from_dict(dict(description), config=config)
    findings = Findings()
    for event in from_schema(schema.include(operation_id=list(operations))).execute():
        findings.note(event)
    return findings


@pytest.mark.parametrize("caller", CALLERS)
async def test_everything_is_answered_as_described(
    filled: App, known: dict[str, list[str]], caller: str, seed: int
) -> None:
    """Whatever comes in: no 5xx, and nothing that openapi.json does not say."""
    endpoints = [e for e in sys.modules["function_app"].api.endpoints if LONG or e.auth in CALLERS[caller]]
    headers: dict[str, str] = {}
    if caller != "anonymous":
        headers = await filled.signed_in("olga" if caller == "operator" else "ada", role=caller)
    if caller == "operator":
        headers = {**headers, "x-functions-key": HOST_KEYS["TROOP_FUNCTION_KEY"]}
    description = (await filled.get("/api/openapi.json")).json()

    found = await asyncio.to_thread(run, filled._url, description, headers, known, [e.name for e in endpoints], seed)

    assert found.errors == []
    assert not found.breaches, found.told()
    assert set(found.asked) == {f"{e.method} /{e.route}" for e in endpoints}, "each operation was asked"
    assert {200, 400, 404} <= set(found.statuses), "there were good questions, and bad ones"


async def test_a_breach_is_found(filled: App, known: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is not as described, a status that is not, and a bug in a handler are all seen."""

    async def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("alerts.service.AlertService.negotiate", broken)
    description = (await filled.get("/api/openapi.json")).json()
    description["components"]["schemas"]["PostItem"]["properties"]["version"] = {"type": "string"}
    del description["paths"]["/strategies"]["get"]["responses"]["default"]
    description["paths"]["/strategies"]["get"]["responses"]["201"] = description["paths"]["/strategies"]["get"][
        "responses"
    ].pop("200")
    operations = ["posts_list", "signals_strategies", "alerts_negotiate"]

    found = await asyncio.to_thread(run, filled._url, description, {}, known, operations, 0)

    assert {
        ("response_schema_conformance", "GET /posts"),
        ("status_code_conformance", "GET /strategies"),
        ("not_a_server_error", "POST /negotiate"),
    } <= set(found.breaches)
