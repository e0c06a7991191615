"""
One contract for every channel, held against the embedded services over real sockets.

A channel returns when the service took the alert; everything else is an error of the right kind, and no error,
log or repr shows a credential.
"""

import json
import logging
import os
import socket
import sqlite3
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, web
from aiohttp.test_utils import TestServer

from alerts.adapters.discord import DiscordChannel
from alerts.adapters.signalr import SignalRChannel
from alerts.logic.wording import word
from alerts.models import Alert, Severity
from alerts.ports import Channel
from infra.local.discord import DEFAULT_WEBHOOK, LIMIT, WINDOW, DiscordInbox
from infra.local.faults import Switchboard
from infra.local.signalr import protocol
from infra.local.signalr.service import SignalRService
from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    RateLimitedError,
    RecipientGoneError,
    RefusedError,
    TroopError,
    UnavailableError,
)
from shared.http_client import HttpClient
from tests.builders import WALL
from tests.standins import Storage, a_signal

KEY = "canary-signalr-key-of-at-least-32-bytes"
WEBHOOK_ID, TOKEN = DEFAULT_WEBHOOK
NAMES = ["signalr", "discord"]
ITEM = {"alert_id": "a1", "title": "AAPL: long at 561.70"}


def an_alert(name: str = "one", **changes) -> Alert:
    return word(a_signal(name, **changes), "public", Severity.INFO, now=WALL)


@dataclass
class Cloud:
    """The embedded services behind one address: what reached them, and what they answer instead when told to."""

    url: str
    faults: Switchboard
    inbox: DiscordInbox
    hub: SignalRService
    storage: Storage
    clock: StoppedClock
    reached: list[tuple[str, str]] = field(default_factory=list)
    instead: list[web.Response] = field(default_factory=list)
    clients: list[HttpClient] = field(default_factory=list)

    def channel(self, name: str, *, url: str | None = None, total: float = 8, **parts: Any) -> Any:
        """A channel as one app instance has it, at *url* or here."""
        client = HttpClient(name, total=timedelta(seconds=total))
        self.clients.append(client)
        at = url or self.url
        if name == "signalr":
            connection = f"Endpoint={at};AccessKey={parts.get('key', KEY)};Version=1.0;"
            return SignalRChannel(connection, client, self.clock)
        hook = f"{at}/discord/api/webhooks/{WEBHOOK_ID}/{parts.get('token', TOKEN)}"
        return DiscordChannel(hook, client, self.storage, self.clock)

    def wrong(self, name: str, **fault: object) -> None:
        self.faults.set({name: fault})


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    state = sqlite3.connect(":memory:", isolation_level=None)
    faults, clock = Switchboard(), StoppedClock(WALL)

    @web.middleware
    async def watch(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        made.reached.append((request.method, request.path))
        if made.instead:
            return made.instead.pop(0)
        return await handler(request)

    app = web.Application(middlewares=[faults.middleware(), watch])
    async with AsyncExitStack() as stack:
        stack.callback(state.close)
        made = Cloud(
            url="",
            faults=faults,
            inbox=DiscordInbox(state, clock=clock),
            hub=SignalRService(KEY, state, now=clock.now),
            storage=Storage(clock),
            clock=clock,
        )
        app.add_routes([*made.inbox.routes(), *made.hub.routes()])
        await made.hub.start()
        stack.push_async_callback(made.hub.close)
        server = await stack.enter_async_context(TestServer(app, host="127.0.0.1"))
        made.url = str(server.make_url("")).rstrip("/")
        yield made
        for client in made.clients:
            await client.aclose()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def channel(cloud: Cloud, name: str) -> Channel:
    return cloud.channel(name)


def refusal(status: int, *, body: object = None, text: str = "", **headers: str) -> web.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        return web.json_response(body, status=status, headers=given)
    return web.Response(status=status, text=text, headers=given)


# --- taken


async def test_returning_means_that_the_service_took_it(cloud, channel, name):
    """An accepted alert returns; the service's own id comes back where it has one."""
    provider_id = await channel.send(an_alert(), ITEM)

    assert cloud.reached
    if name == "discord":
        [seen] = cloud.inbox.inbox()
        assert provider_id == seen["message_id"]
        assert seen["embeds"][0]["title"] == "AAPL: long at 561.70"
        assert seen["pings"] == {"users": [], "roles": [], "everyone": False}
    else:
        assert provider_id is None


@pytest.mark.parametrize(
    ("group", "heard"),
    [("symbols/AAPL", ["a1", "a3"]), ("symbols/MSFT", ["a2"]), ("symbols/all", ["a1", "a2", "a3"])],
)
async def test_who_joined_a_group_hears_its_items_on_the_hub(cloud, group, heard):
    """Target alert, one argument: exactly the item, once, and only of the symbols that were asked for."""
    channel = cloud.channel("signalr")
    await channel.join("guest-1", group)
    place = channel.connection("guest-1")
    headers = {"Authorization": f"Bearer {place.access_token}"}
    async with ClientSession() as session, session.ws_connect(place.url, headers=headers) as client:
        await client.send_str('{"protocol":"json","version":1}\x1e')
        assert (await client.receive()).data == "{}\x1e"
        for number, symbol in enumerate(["AAPL", "MSFT", "AAPL"], 1):
            await channel.send(an_alert(symbol=symbol), {"alert_id": f"a{number}"})
        cloud.hub.hub("alerts").send_to_all(protocol.invocation("end", []), frozenset())
        records = await _records_until(client, "end")

    assert records == [{"type": 1, "target": "alert", "arguments": [{"alert_id": id_}]} for id_ in heard]


async def _records_until(client: ClientWebSocketResponse, target: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        message = await client.receive(timeout=5)
        assert message.type is WSMsgType.TEXT, message
        for part in filter(None, message.data.split("\x1e")):
            record = json.loads(part)
            if record.get("target") == target:
                return found
            found.append(record)


async def test_hostile_text_is_taken_and_pings_nobody(cloud):
    """Discord itself accepts whatever a signal says, however long, and mentions nobody."""
    entry = "@everyone <@100000000000000001> [x](https://e.example) 😀" * 200
    alert = an_alert(entry=entry, strategy="@here ||x||" * 900, symbol="@everyone" * 60)

    await cloud.channel("discord").send(alert, ITEM)

    [seen] = cloud.inbox.inbox()
    assert seen["pings"] == {"users": [], "roles": [], "everyone": False}


# --- asked to wait


@pytest.mark.parametrize("wait", [0.25, 1.0, 1.25, 65.0, 1337.0])
async def test_a_limit_is_told_with_its_wait(cloud, channel, name, wait):
    """429 is a schedule: the wait comes out exactly as it was asked for, fractions included."""
    cloud.wrong(name, status=429, retry_after=wait)

    with pytest.raises(RateLimitedError) as caught:
        await channel.send(an_alert(), ITEM)

    assert caught.value.retry_after == timedelta(seconds=wait)


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (refusal(429, body={"retry_after": 0.3}, Retry_After="1"), 1),
        (refusal(429, body={"retry_after": 2.5}, Retry_After="1"), 2.5),
        (refusal(429, body={"retry_after": 2.5}), 2.5),
        (refusal(429, body={"retry_after": 2.5}, Retry_After="soon"), 2.5),
        (refusal(429, body={"retry_after": "x"}, Retry_After="4"), 4),
        (refusal(429, text="<html>Cloudflare</html>", Retry_After="30"), 30),
        (refusal(429, text="<html>Cloudflare</html>"), 1),
        (refusal(429, body={"retry_after": -5}, Retry_After="-5"), 1),
        (refusal(429, body={"retry_after": 1e12}), 86_400),
        (refusal(429, text='{"retry_after": NaN}'), 1),
        (refusal(429, body=[]), 1),
    ],
    ids=range(11),
)
async def test_discord_says_how_long_in_two_places(cloud, answer, seconds):
    """Header or body, whichever says longer; nonsense in one does not hide the other, and a day is the most."""
    cloud.instead.append(_copy(answer))

    with pytest.raises(RateLimitedError) as caught:
        await cloud.channel("discord").send(an_alert(), ITEM)

    assert caught.value.retry_after == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2), ("0.5", 0.5), ("soon", None), ("\xb2", None), ("nan", None), ("-1", None), ("1e12", 86_400)],
)
async def test_signalr_says_how_long_in_its_header(cloud, header, seconds):
    """A wait in seconds is obeyed; anything else is no wait, and no error."""
    cloud.instead.append(refusal(429, Retry_After=header))

    with pytest.raises(RateLimitedError) as caught:
        await cloud.channel("signalr").send(an_alert(), ITEM)

    assert caught.value.retry_after == (None if seconds is None else timedelta(seconds=seconds))


def _copy(answer: web.Response) -> web.Response:
    """Responses are used once, parameters more often."""
    return web.Response(
        status=answer.status,
        body=answer.body,
        headers={k: v for k, v in answer.headers.items() if k in ("Retry-After", "Content-Type")},
    )


async def test_instances_share_what_discord_said_of_the_bucket(cloud):
    """Once one instance emptied the bucket, another does not even ask: Discord never has to answer 429."""
    one, other = cloud.channel("discord"), cloud.channel("discord")
    for number in range(LIMIT):
        await one.send(an_alert(str(number)), ITEM)

    with pytest.raises(RateLimitedError) as caught:
        await other.send(an_alert("late"), ITEM)

    assert caught.value.retry_after == WINDOW
    assert len(cloud.reached) == LIMIT
    assert cloud.inbox.stats() == {"messages": LIMIT, "rate_limited": 0, "limit": LIMIT}


async def test_a_bucket_that_is_full_again_is_used_again(cloud):
    """Everybody waits as long as Discord said, and no longer."""
    instances = [cloud.channel("discord") for _ in range(2)]
    sent = waited = 0
    while sent < 3 * LIMIT:
        try:
            await instances[sent % 2].send(an_alert(str(sent)), ITEM)
            sent += 1
        except RateLimitedError as e:
            waited += 1
            cloud.clock.at += e.retry_after

    assert cloud.inbox.stats() == {"messages": 3 * LIMIT, "rate_limited": 0, "limit": LIMIT}
    assert waited == 2


async def test_a_limit_that_one_instance_met_holds_for_all(cloud):
    """A 429 that came out of the blue is kept as well."""
    cloud.instead.append(refusal(429, body={"retry_after": 60.0}))
    with pytest.raises(RateLimitedError):
        await cloud.channel("discord").send(an_alert(), ITEM)

    with pytest.raises(RateLimitedError):
        await cloud.channel("discord").send(an_alert("two"), ITEM)

    assert len(cloud.reached) == 1


# --- refused


@pytest.mark.parametrize("status", [400, 404, 405, 410, 413])
async def test_a_refusal_is_final(cloud, channel, name, status):
    """What the service will not take is not tried again."""
    cloud.wrong(name, status=status)

    with pytest.raises(RefusedError):
        await channel.send(an_alert(), ITEM)


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_webhook_that_is_gone_is_a_recipient_that_is_gone(cloud, status):
    """Discord wants a webhook that is gone never to be used again."""
    cloud.wrong("discord", status=status)

    with pytest.raises(RecipientGoneError):
        await cloud.channel("discord").send(an_alert(), ITEM)


async def test_a_webhook_that_somebody_deleted_is_gone(cloud):
    """The inbox's own answer, not a fault: 404 with code 10015."""
    channel = cloud.channel("discord")
    await channel.send(an_alert(), ITEM)
    async with ClientSession() as session:
        await session.delete(f"{cloud.url}/discord/api/webhooks/{WEBHOOK_ID}/{TOKEN}")

    with pytest.raises(RecipientGoneError):
        await channel.send(an_alert("two"), ITEM)


async def test_a_wrong_token_is_a_recipient_that_is_gone(cloud):
    """Discord does not tell a wrong token from a deleted webhook."""
    with pytest.raises(RecipientGoneError):
        await cloud.channel("discord", token="another-token-of-enough-letters").send(an_alert(), ITEM)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_needs_a_person(cloud, status):
    """SignalR that refuses our key is a wrong setting; the error names it."""
    cloud.wrong("signalr", status=status)

    with pytest.raises(ConfigurationError, match="AZURE_SIGNALR_CONNECTION_STRING"):
        await cloud.channel("signalr").send(an_alert(), ITEM)


async def test_a_wrong_key_needs_a_person(cloud):
    """The embedded service's own 401, not a fault."""
    channel = cloud.channel("signalr", key="another-key-of-at-least-thirty-two-bytes")

    with pytest.raises(ConfigurationError):
        await channel.send(an_alert(), ITEM)
    with pytest.raises(ConfigurationError):
        await channel.join("guest-1", "symbols/all")


async def test_a_redirect_is_not_followed(cloud, channel, name):
    """An answer that points elsewhere is a refusal: nothing is sent anywhere else."""
    cloud.instead.append(refusal(302, Location=f"{cloud.url}/elsewhere"))

    with pytest.raises(RefusedError):
        await channel.send(an_alert(), ITEM)

    assert cloud.reached
    assert not [path for _, path in cloud.reached if path == "/elsewhere"]


# --- not reached, or nobody knows


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that refuses connections: the port is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


async def test_a_service_that_cannot_be_reached_was_surely_not_told(cloud, name, nowhere):
    """A refused connection sent nothing: it is tried again."""
    with pytest.raises(UnavailableError):
        await cloud.channel(name, url=nowhere).send(an_alert(), ITEM)


async def test_accepted_and_cut_is_an_unknown_outcome(cloud, channel, name):
    """The service took it and the answer was lost: nobody may call that a failure."""
    cloud.wrong(name, accept_then_cut=1)

    with pytest.raises(OutcomeUnknownError):
        await channel.send(an_alert(), ITEM)

    assert cloud.reached
    assert len(set(cloud.reached)) == len(cloud.reached), "the channel asked again by itself"
    if name == "discord":
        assert cloud.inbox.count() == 1


async def test_cut_before_an_answer_is_an_unknown_outcome(cloud, channel, name):
    """From outside it looks the same."""
    cloud.wrong(name, cut=1)

    with pytest.raises(OutcomeUnknownError):
        await channel.send(an_alert(), ITEM)


@pytest.mark.parametrize("status", [500, 502, 504])
async def test_an_error_of_the_service_is_an_unknown_outcome(cloud, channel, name, status):
    """A 5xx may come after the effect."""
    cloud.wrong(name, status=status)

    with pytest.raises(OutcomeUnknownError):
        await channel.send(an_alert(), ITEM)


@pytest.mark.parametrize(("name", "error"), [("signalr", UnavailableError), ("discord", OutcomeUnknownError)])
async def test_503_is_no_effect_where_the_service_promises_it(cloud, name, error):
    """SignalR's 503 took nothing; Discord promises nothing."""
    cloud.wrong(name, status=503)

    with pytest.raises(error):
        await cloud.channel(name).send(an_alert(), ITEM)


async def test_no_answer_in_time_is_an_unknown_outcome(cloud, name):
    """A service that is silent may have taken it."""
    cloud.wrong(name, latency_ms=5000)

    with pytest.raises(OutcomeUnknownError):
        await cloud.channel(name, total=0.05).send(an_alert(), ITEM)


async def test_the_channel_works_again_when_the_service_does(cloud, channel, name):
    """No trouble stays in the channel."""
    for fault in ({"status": 500}, {"cut": 1.0}, {"accept_then_cut": 1.0}, {"status": 400}):
        cloud.wrong(name, **fault)
        with pytest.raises(TroopError):
            await channel.send(an_alert(), ITEM)
    cloud.faults.clear()

    await channel.send(an_alert("after"), ITEM)


async def test_a_proxy_of_the_environment_is_not_used(cloud, channel, monkeypatch):
    """A credential never goes through a proxy that the environment happens to name."""
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setitem(os.environ, variable, "http://127.0.0.1:9")

    await channel.send(an_alert(), ITEM)


# --- secrets

TROUBLES: list[dict[str, Any]] = [
    {},
    {"status": 400},
    {"status": 401},
    {"status": 404},
    {"status": 429, "retry_after": 0},
    {"status": 500},
    {"status": 503},
    {"cut": 1.0},
    {"accept_then_cut": 1.0},
    {"latency_ms": 5000.0},
]


async def test_no_error_log_or_repr_shows_a_credential(cloud, name, caplog, nowhere):
    """Whatever goes wrong, neither the webhook's token nor the hub's key nor a token made with it is ever shown."""
    caplog.set_level(logging.DEBUG)
    for noisy in ("httpx", "httpcore", "httpcore.http11", "httpcore.connection", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=noisy)
    shown: list[str] = []
    for fault in TROUBLES:
        cloud.storage = Storage(cloud.clock)  # a bucket of its own, so that every fault is met
        channel = cloud.channel(name, total=0.2 if "latency_ms" in fault else 8)
        shown.append(f"{channel} {channel!r} {vars(channel)}")
        cloud.faults.set({name: fault} if fault else {})
        try:
            await channel.send(an_alert(), ITEM)
        except TroopError as e:
            shown += traceback.format_exception(e)
            shown.append(f"{e!r} {e.__cause__!r} {e.__context__!r} {vars(e)}")
    with pytest.raises(UnavailableError) as caught:
        await cloud.channel(name, url=nowhere).send(an_alert(), ITEM)
    shown += traceback.format_exception(caught.value)
    for record in caplog.records:
        if not record.name.startswith("aiohttp"):  # the other side's own log of the path it was asked
            shown.append(f"{record.getMessage()} {vars(record)}")
            shown.append(str(record.exc_text or ""))

    told = "\n".join(shown)
    assert len(shown) > len(TROUBLES)
    assert TOKEN not in told
    assert KEY not in told
    assert "Bearer ey" not in told
    assert "/webhooks/" not in told
