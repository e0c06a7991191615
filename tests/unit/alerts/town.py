"""A town for tests: the endpoints of rules over real stores, callers whose token is their name, channels that keep."""

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import azure.functions as func

from alerts.adapters.directory import DocumentDirectory
from alerts.adapters.rule_documents import RuleDocuments
from alerts.logic.unsubscribing import UnsubscribeKeys
from alerts.ports import Message
from alerts.rules import RuleService
from alerts.rules_functions import RulesWired, blueprint
from alerts.trial import TrialMessages
from shared.audit import Audit
from shared.clock import StoppedClock
from shared.http import Api
from shared.identity import Caller, UnauthenticatedError
from shared.limits import DailyQuota, Limits, RateLimit
from shared.sealing import Sealer
from tests.builders import WALL, a_request
from tests.standins import Storage

MARKET = datetime(2013, 1, 2, 12, tzinfo=UTC)
KEY = "k1:" + base64.b64encode(bytes(range(32))).decode()
TOKEN = "sEcret_Token-" + "x7" * 28
WEBHOOK = f"https://discord.com/api/webhooks/123456789012345678/{TOKEN}"
PRICE = {"kind": "price", "channels": ["signalr"], "symbols": ["AAPL"], "price_above": 100}


class People:
    """Tokens that are names; op is an operator."""

    async def caller(self, token: str) -> Caller:
        if token not in ("ada", "bob", "op"):
            raise UnauthenticatedError("who is that?")
        roles = {"subscriber", "operator"} if token == "op" else {"subscriber"}
        return Caller(subject=token, roles=frozenset(roles))  # type: ignore[arg-type]

    def claims_to_be_ours(self, token: str) -> bool:
        return True


class Post:
    """A channel that remembers where it sent what, or refuses."""

    can_edit = False
    is_keyed = True
    needs_address = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent: list[Message] = []
        self.trouble: Exception | None = None

    async def send(self, message: Message) -> str | None:
        if self.trouble:
            raise self.trouble
        self.sent.append(message)
        return None

    async def edit(self, provider_id: str | None, message: Message) -> None:
        raise AssertionError


class Town:
    """The endpoints over real stores, and whoever calls them."""

    def __init__(self, *, webhook_base: str | None = None) -> None:
        self.wall, self.market = StoppedClock(WALL), StoppedClock(MARKET)
        self.documents = Storage(self.wall)
        self.audit = Audit(self.documents, self.wall)
        self.keys = UnsubscribeKeys([b"k" * 32])
        self.directory = DocumentDirectory(self.documents, self.wall, Sealer(KEY))
        self.channels = {"email": Post("email"), "discord": Post("discord"), "signalr": Post("signalr")}
        self.service = RuleService(
            book=RuleDocuments(self.documents, self.wall, Sealer(KEY), on_change=self.directory.look_again),
            wall=self.wall,
            market=self.market,
            audit=self.audit,
            links=self.keys,
            tester=TrialMessages(directory=self.directory, channels=self.channels, wall=self.wall, market=self.market),
            channels=self.channels,
            webhook_base=webhook_base,
        )
        limits = Limits(rate=RateLimit(self.wall, 0), quota=DailyQuota(self.documents, self.wall))
        self.api = Api(People(), limits)  # type: ignore[arg-type]
        app = func.FunctionApp()
        app.register_functions(blueprint(RulesWired(rules=self.service), self.api))
        self.functions = {f.get_function_name(): f.get_user_function() for f in app.get_functions()}

    async def ask(
        self,
        name: str,
        body: Any = None,
        *,
        by: str | None = "ada",
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        route: Mapping[str, str] | None = None,
        **params: str,
    ) -> func.HttpResponse:
        given = {**({"Authorization": f"Bearer {by}"} if by else {}), **(headers or {})}
        if body is not None:
            given["Content-Type"] = "application/json"
        request = a_request(
            method,
            params=params,
            route=route,
            headers=given,
            body=b"" if body is None else json.dumps(body).encode(),
        )
        return await self.functions[f"alerts_{name}"](request)

    async def create(self, body: Any = None, **changes) -> dict[str, Any]:
        answer = await self.ask("subscriptions_create", body or PRICE, method="POST", **changes)
        assert answer.status_code in (200, 201), answer.get_body()
        return read(answer)

    async def subscriptions(self, by: str = "ada") -> list[dict[str, Any]]:
        return read(await self.ask("subscriptions_list", by=by))["items"]

    async def reach(self, channel: str = "email", address: str = "ada@example.com", **changes) -> func.HttpResponse:
        return await self.ask(
            "endpoints_replace", {"address": address}, method="PUT", route={"channel": channel}, **changes
        )


def read(answer: func.HttpResponse) -> Any:
    return json.loads(answer.get_body())


def refused(answer: func.HttpResponse, status: int) -> str:
    """The detail of a problem."""
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json"), answer.get_body()
    return str(read(answer)["detail"])
