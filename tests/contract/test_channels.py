"""
One contract for every channel, held against the embedded services over real sockets.

A channel returns when the service took the alert; everything else is an error of the right kind, and no error,
log or repr shows a credential.
"""

import asyncio
import json
import logging
import os
import socket
import sqlite3
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr

from alerts.adapters.discord import DiscordChannel
from alerts.adapters.email import EmailChannel
from alerts.adapters.signalr import SignalRChannel
from alerts.logic.wording import word
from alerts.models import Alert, Severity, delivery_id
from alerts.ports import Address, Channel, Message
from infra.local.discord import DEFAULT_WEBHOOK, LIMIT, WINDOW, DiscordInbox
from infra.local.faults import Switchboard
from infra.local.mailbox import PASSWORD, USER, Mailbox
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
NAMES = ["signalr", "discord", "email"]
HTTP = ["signalr", "discord"]
ALICE = "alice.canary@example.org"
ITEM = {"alert_id": "a1", "title": "AAPL: long at 561.70", "symbol": "AAPL"}


def an_alert(name: str = "one", subscriber: str = "public", **changes) -> Alert:
    return word(a_signal(name, **changes), subscriber, Severity.INFO, now=WALL)


def an_address(value: str) -> Address:
    return Address(value=SecretStr(value), shown="***")


def a_message(name: str = "one", *, to: str | None = None, **changes) -> Message:
    """What reaches everybody, or with *to* one subscriber's own address."""
    alert = changes.pop("alert", None) or an_alert(name)
    fields = {"item": ITEM, "delivery_id": f"delivery-{name}", "to": an_address(to) if to else None} | changes
    return Message(alert=alert, **fields)


def for_channel(channel: str, name: str = "one", **changes) -> Message:
    """A message as the channel gets it: mail always has an address."""
    return a_message(name, **({"to": ALICE} if channel == "email" else {}) | changes)


@dataclass
class Cloud:
    """The embedded services behind one address: what reached them, and what they answer instead when told to."""

    url: str
    faults: Switchboard
    inbox: DiscordInbox
    hub: SignalRService
    mailbox: Mailbox
    storage: Storage
    clock: StoppedClock
    reached: list[tuple[str, str]] = field(default_factory=list)
    instead: list[web.Response] = field(default_factory=list)
    clients: list[HttpClient | EmailChannel] = field(default_factory=list)

    def channel(self, name: str, *, url: str | None = None, total: float = 8, **parts: Any) -> Any:
        """A channel as one app instance has it, at *url* or here."""
        if name == "email":
            return self.mail(total=total, **({"port": int(url.rpartition(":")[2])} if url else {}) | parts)
        client = HttpClient(name, total=timedelta(seconds=total))
        self.clients.append(client)
        at = url or self.url
        if name == "signalr":
            connection = f"Endpoint={at};AccessKey={parts.get('key', KEY)};Version=1.0;"
            return SignalRChannel(connection, client, self.clock)
        hook = f"{at}/discord/api/webhooks/{WEBHOOK_ID}/{parts.get('token', TOKEN)}"
        return DiscordChannel(hook, client, self.storage, self.clock, patience=timedelta())

    def mail(self, *, total: float = 8, port: int | None = None, password: str = PASSWORD) -> EmailChannel:
        at = f"127.0.0.1:{port or self.mailbox.port}"
        channel = EmailChannel(
            f"smtp://{USER}:{password}@{at}?starttls=0",
            "TROOP <alerts@troop.test>",
            self.clock,
            total=timedelta(seconds=total),
        )
        self.clients.append(channel)
        return channel

    def wrong(self, name: str, **fault: object) -> None:
        """Something goes wrong with every call from now on."""
        if name == "email":
            self.mailbox.set({"faults": [MAIL_FAULTS[key, value] for key, value in fault.items()]})
        else:
            self.faults.set({name: fault})

    def right(self) -> None:
        self.faults.clear()
        self.mailbox.set({})

    def taken(self, name: str) -> int:
        """How many messages a service took, whatever it said about it."""
        match name:
            case "discord":
                return self.inbox.count()
            case "email":
                return self.mailbox.stats()["messages"]
            case _:
                return len([path for _, path in self.reached if path.endswith(":send")])


MAIL_FAULTS: dict[tuple[str, object], dict[str, Any]] = {
    ("accept_then_cut", 1.0): {"stage": "dot", "cut": True, "accept": True},
    ("cut", 1.0): {"stage": "dot", "cut": True},
    ("latency_ms", 5000.0): {"stage": "dot", "latency_ms": 5000.0},
    ("status", 400): {"stage": "dot", "reply": "554 5.6.0 cannot be accepted"},
    ("status", 401): {"stage": "login", "reply": "535 5.7.8 wrong"},
    ("status", 404): {"stage": "recipient", "reply": f"550 5.1.1 <{ALICE}> does not live here"},
    ("status", 413): {"stage": "sender", "reply": "552 5.3.4 too big"},
    ("status", 429): {"stage": "recipient", "reply": "452 4.5.3 too many"},
    ("status", 503): {"stage": "connect", "reply": "421 4.3.2 not now"},
}
"""What other services say over HTTP, in a mail server's words."""


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
            mailbox=Mailbox(state, clock=clock),
            storage=Storage(clock),
            clock=clock,
        )
        app.add_routes([*made.inbox.routes(), *made.hub.routes()])
        await made.hub.start()
        stack.push_async_callback(made.hub.close)
        await made.mailbox.start()
        stack.push_async_callback(made.mailbox.close)
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
    provider_id = await channel.send(for_channel(name))

    assert cloud.taken(name)
    if name == "discord":
        [seen] = cloud.inbox.inbox()
        assert provider_id == seen["message_id"]
        assert seen["embeds"][0]["title"] == "AAPL: long at 561.70"
        assert seen["pings"] == {"users": [], "roles": [], "everyone": False}
    elif name == "email":
        [seen] = cloud.mailbox.inbox()
        assert provider_id == seen["message_id"] == "<delivery-one@troop.test>"
        assert (seen["to"], seen["subject"]) == (ALICE, "AAPL: long at 561.70")
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
    async with listening(channel, "guest-1") as client:
        for number, symbol in enumerate(["AAPL", "MSFT", "AAPL"], 1):
            alert = an_alert(symbol=symbol)
            await channel.send(a_message(alert=alert, item={"alert_id": f"a{number}"}))
        records = await _heard(cloud, client)

    assert records == [{"type": 1, "target": "alert", "arguments": [{"alert_id": id_}]} for id_ in heard]


@pytest.mark.parametrize("subscriber", ["alice", "auth0|5f7c/8 ä"])
async def test_a_personal_alert_is_heard_by_its_subscriber_alone(cloud, subscriber):
    """What is nobody else's business goes to the user, and to no group."""
    channel = cloud.channel("signalr")
    await channel.join("guest-1", "symbols/all")
    async with listening(channel, subscriber) as mine, listening(channel, "guest-1") as other:
        await channel.send(a_message(alert=an_alert(subscriber=subscriber), item={"alert_id": "mine"}))
        records = await _heard(cloud, mine), await _heard(cloud, other)

    assert records == ([{"type": 1, "target": "alert", "arguments": [{"alert_id": "mine"}]}], [])


async def test_a_digest_on_the_hub_is_its_alerts_one_by_one(cloud):
    """Clients know one argument: the alert; they get as many calls as there are alerts."""
    channel = cloud.channel("signalr")
    async with listening(channel, "alice") as client:
        items = [{"alert_id": f"a{number}"} for number in range(3)]
        await channel.send(a_message(alert=an_alert(subscriber="alice"), digest=items))
        records = await _heard(cloud, client)

    assert sorted(record["arguments"][0]["alert_id"] for record in records) == ["a0", "a1", "a2"]


async def test_a_new_version_on_the_hub_replaces_the_old_one_at_the_client(cloud):
    """Editing sends the new version again: it has the same alert id."""
    channel = cloud.channel("signalr")
    async with listening(channel, "alice") as client:
        alert = an_alert(subscriber="alice")
        await channel.send(a_message(alert=alert, item={"alert_id": "a1", "version": 1}))
        await channel.edit(None, a_message(alert=alert, item={"alert_id": "a1", "version": 2}))
        records = await _heard(cloud, client)

    assert [record["arguments"] for record in records] == [
        [{"alert_id": "a1", "version": 1}],
        [{"alert_id": "a1", "version": 2}],
    ]


@asynccontextmanager
async def listening(channel: Any, user: str) -> AsyncIterator[ClientWebSocketResponse]:
    """A client of *user* at the hub."""
    place = channel.connection(user)
    headers = {"Authorization": f"Bearer {place.access_token}"}
    async with ClientSession() as session, session.ws_connect(place.url, headers=headers) as client:
        await client.send_str('{"protocol":"json","version":1}\x1e')
        assert (await client.receive()).data == "{}\x1e"
        yield client


async def _heard(cloud: Cloud, client: ClientWebSocketResponse) -> list[dict[str, Any]]:
    """Everything the client heard until now."""
    cloud.hub.hub("alerts").send_to_all(protocol.invocation("end", []), frozenset())
    found: list[dict[str, Any]] = []
    while True:
        message = await client.receive(timeout=5)
        assert message.type is WSMsgType.TEXT, message
        for part in filter(None, message.data.split("\x1e")):
            record = json.loads(part)
            if record.get("target") == "end":
                return [one for one in found if one.get("target") != "end"]
            found.append(record)


@pytest.mark.parametrize("name", ["discord", "email"])
async def test_hostile_text_is_taken_and_pings_nobody(cloud, name):
    """The services themselves accept whatever a signal says, however long, and mention nobody."""
    entry = "@everyone <@100000000000000001> [x](https://e.example) 😀\r\nBcc: all@example.org" * 200
    alert = an_alert(entry=entry, strategy="@here ||x||\r\n.\r\n" * 900, symbol="@everyone\r\n" * 60)
    message = for_channel(name, alert=alert, is_possible_repeat=True)

    await cloud.channel(name).send(message)
    await cloud.channel(name).send(replace(message, digest=[{"title": entry, "text": entry}] * 60))

    assert cloud.taken(name) == 2
    if name == "discord":
        assert [seen["pings"] for seen in cloud.inbox.inbox()] == [{"users": [], "roles": [], "everyone": False}] * 2
    else:
        assert {seen["to"] for seen in cloud.mailbox.inbox()} == {ALICE}
        for seen in cloud.mailbox.inbox():
            names = [name for name, _ in cloud.mailbox.message(seen["id"])["headers"]]
            assert "Bcc" not in names
            assert len(names) == len(set(names))


# --- a subscriber's own address


async def test_a_subscribers_own_webhook_gets_what_is_theirs(cloud):
    """The message goes to the webhook it is addressed to, with a bucket of its own, and not to the default one."""
    webhook_id, token = cloud.inbox.make_webhook()
    mine = f"{cloud.url}/discord/api/webhooks/{webhook_id}/{token}"
    channel = cloud.channel("discord")
    for number in range(LIMIT):
        await channel.send(a_message(str(number)))

    await channel.send(a_message("mine", to=mine))

    assert cloud.inbox.inbox()[0]["webhook_id"] == webhook_id
    with pytest.raises(RateLimitedError):
        await channel.send(a_message("public"))


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1:9/discord/api/webhooks/{id}/{token}",
        "https://evil.example/api/webhooks/{id}/{token}",
        "http://169.254.169.254/api/webhooks/{id}/{token}",
        "https://discord.com.evil.example/api/webhooks/{id}/{token}",
        "https://discord.com:8443/api/webhooks/{id}/{token}",
        "https://discord.com@evil.example/api/webhooks/{id}/{token}",
        "nonsense",
    ],
)
async def test_an_address_elsewhere_is_never_asked(cloud, to):
    """A stored address that is no Discord webhook is a recipient that is gone: nothing leaves the house."""
    message = a_message(to=to.format(id=WEBHOOK_ID, token=TOKEN))

    with pytest.raises(RecipientGoneError) as caught:
        await cloud.channel("discord").send(message)

    assert cloud.reached == []
    assert TOKEN not in f"{caught.value!r} {caught.value.__context__!r}"


@pytest.mark.parametrize("to", ["", "alice", "a@b\r\nRCPT TO:<x@example.org>", "alice@", "é@example.org", "a b@c.org"])
async def test_an_address_that_is_none_gets_no_mail(cloud, to):
    """A stored address that is no e-mail address is a recipient that is gone; nothing is said to the server."""
    with pytest.raises(RecipientGoneError):
        await cloud.channel("email").send(replace(a_message(), to=an_address(to)))

    assert cloud.mailbox.connections == 0


async def test_mail_without_an_address_needs_a_person(cloud):
    """There is no default place for mail: who subscribed the public to it must change that."""
    with pytest.raises(ConfigurationError, match="public"):
        await cloud.channel("email").send(a_message())


# --- correcting what was sent


async def test_a_resolved_alert_is_corrected_in_its_place(cloud):
    """One message before and after; the edit mentions nobody either."""
    channel = cloud.channel("discord")
    provider_id = await channel.send(a_message())
    alert = replace(an_alert(), title="@everyone over", resolved_at=WALL, version=2)

    await channel.edit(provider_id, a_message(alert=alert))

    [seen] = cloud.inbox.inbox()
    assert seen["embeds"][0]["title"].endswith("everyone over")
    assert seen["edited_at"]
    assert seen["pings"] == {"users": [], "roles": [], "everyone": False}


async def test_a_message_that_was_deleted_has_nothing_to_correct(cloud):
    """Somebody deleted it in Discord: resolving it is done, and the webhook goes on working."""
    channel = cloud.channel("discord")
    provider_id = await channel.send(a_message())
    async with ClientSession() as session:
        await session.delete(f"{cloud.url}/discord/api/webhooks/{WEBHOOK_ID}/{TOKEN}/messages/{provider_id}")

    await channel.edit(provider_id, a_message())
    await channel.edit(None, a_message())

    assert await channel.send(a_message("two"))


async def test_correcting_twice_is_correcting_once(cloud):
    """An edit whose answer was lost is simply tried again: it is not an unknown outcome."""
    channel = cloud.channel("discord")
    provider_id = await channel.send(a_message())
    for fault in ({"accept_then_cut": 1}, {"status": 500}):
        cloud.wrong("discord", **fault)
        with pytest.raises(UnavailableError):
            await channel.edit(provider_id, a_message())


async def test_edits_of_old_messages_wait_as_discord_says(cloud):
    """Discord limits edits of messages older than an hour (30046): that is a wait, and no refusal."""
    channel = cloud.channel("discord")
    provider_id = await channel.send(a_message())
    cloud.clock.at += timedelta(hours=2)
    edits = 0
    with pytest.raises(RateLimitedError) as caught:
        while True:
            await channel.edit(provider_id, a_message())
            edits += 1
            cloud.clock.at += WINDOW

    assert edits > 1
    assert timedelta(minutes=30) < caught.value.retry_after < timedelta(hours=1)


async def test_a_mail_that_changed_answers_the_first_one(cloud):
    """A mail cannot be changed: the next version comes as an answer, so people see both together."""
    channel = cloud.channel("email")
    await channel.send(for_channel("email", delivery_id=delivery_id(an_alert().alert_id, "email")))
    [first] = cloud.mailbox.inbox()

    await channel.edit(None, for_channel("email", alert=replace(an_alert(), version=2), delivery_id="second"))

    newest = dict(cloud.mailbox.message(cloud.mailbox.inbox()[0]["id"])["headers"])
    assert newest["In-Reply-To"] == newest["References"] == first["message_id"]
    assert newest["Message-ID"] != first["message_id"]


# --- asked to wait


@pytest.mark.parametrize("name", HTTP)
@pytest.mark.parametrize("wait", [0.25, 1.0, 1.25, 65.0, 1337.0])
async def test_a_limit_is_told_with_its_wait(cloud, channel, name, wait):
    """429 is a schedule: the wait comes out exactly as it was asked for, fractions included."""
    cloud.wrong(name, status=429, retry_after=wait)

    with pytest.raises(RateLimitedError) as caught:
        await channel.send(for_channel(name))

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
        (refusal(429, text="<html>Cloudflare</html>"), 60),
        (refusal(429, body={"retry_after": -5}, Retry_After="-5"), 1),
        (refusal(429, body={"retry_after": 1e12}), 86_400),
        (refusal(429, text='{"retry_after": NaN}'), 1),
        (refusal(429, body=[]), 1),
        (refusal(400, body={"code": 30046, "retry_after": 5}), 5),
    ],
    ids=range(12),
)
async def test_discord_says_how_long_in_two_places(cloud, answer, seconds):
    """Header or body, whichever says longer; nonsense in one does not hide the other, and a day is the most."""
    cloud.instead += [_copy(answer), _copy(answer)]

    with pytest.raises(RateLimitedError) as caught:
        await cloud.channel("discord").send(a_message())

    assert caught.value.retry_after == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2), ("0.5", 0.5), ("soon", None), ("\xb2", None), ("nan", None), ("-1", None), ("1e12", 86_400)],
)
async def test_signalr_says_how_long_in_its_header(cloud, header, seconds):
    """A wait in seconds is obeyed; anything else is no wait, and no error."""
    cloud.instead.append(refusal(429, Retry_After=header))

    with pytest.raises(RateLimitedError) as caught:
        await cloud.channel("signalr").send(a_message())

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
        await one.send(a_message(str(number)))

    with pytest.raises(RateLimitedError) as caught:
        await other.send(a_message("late"))

    assert caught.value.retry_after == WINDOW
    assert len(cloud.reached) == LIMIT
    assert cloud.inbox.stats() == {"messages": LIMIT, "rate_limited": 0, "banned": 0, "limit": LIMIT}


async def test_a_bucket_that_is_full_again_is_used_again(cloud):
    """Everybody waits as long as Discord said, and no longer."""
    instances = [cloud.channel("discord") for _ in range(2)]
    sent = waited = 0
    while sent < 3 * LIMIT:
        try:
            await instances[sent % 2].send(a_message(str(sent)))
            sent += 1
        except RateLimitedError as e:
            waited += 1
            cloud.clock.at += e.retry_after

    assert cloud.inbox.stats() == {"messages": 3 * LIMIT, "rate_limited": 0, "banned": 0, "limit": LIMIT}
    assert waited == 2


async def test_a_limit_that_one_instance_met_holds_for_all(cloud):
    """A 429 that came out of the blue is kept as well."""
    cloud.instead.append(refusal(429, body={"retry_after": 60.0}))
    with pytest.raises(RateLimitedError):
        await cloud.channel("discord").send(a_message())

    with pytest.raises(RateLimitedError):
        await cloud.channel("discord").send(a_message("two"))

    assert len(cloud.reached) == 1


async def test_a_limit_on_our_address_holds_for_every_webhook(cloud):
    """Scope global counts for all webhooks, and for the other instances too."""
    other = f"{cloud.url}/discord/api/webhooks/{'/'.join(cloud.inbox.make_webhook())}"
    cloud.instead.append(refusal(429, body={"retry_after": 7.5, "global": True}, X_RateLimit_Scope="global"))
    one = cloud.channel("discord")
    with pytest.raises(RateLimitedError):
        await one.send(a_message())

    for channel in (one, cloud.channel("discord")):
        with pytest.raises(RateLimitedError) as caught:
            await channel.send(a_message("two", to=other))
        assert caught.value.retry_after == timedelta(seconds=7.5)

    assert len(cloud.reached) == 1


async def test_a_limit_that_a_channel_shares_holds_for_its_webhook_only(cloud):
    """Scope shared is about the place this webhook writes to, whoever else writes there."""
    other = f"{cloud.url}/discord/api/webhooks/{'/'.join(cloud.inbox.make_webhook())}"
    channel = cloud.channel("discord")
    cloud.instead.append(refusal(429, body={"retry_after": 60.0, "global": False}, X_RateLimit_Scope="shared"))
    with pytest.raises(RateLimitedError):
        await channel.send(a_message())

    assert await channel.send(a_message("two", to=other))


async def test_many_instances_at_once_never_exceed_the_bucket(cloud):
    """Six instances with a burst each: nobody is told to slow down, and everything arrives in the end."""
    instances = [cloud.channel("discord") for _ in range(6)]
    left = [a_message(str(number)) for number in range(24)]
    while left:
        tries = [instances[number % 6].send(message) for number, message in enumerate(left)]
        ended = await asyncio.gather(*tries, return_exceptions=True)
        assert all(isinstance(one, str | RateLimitedError) for one in ended), ended
        left = [message for message, one in zip(left, ended, strict=True) if not isinstance(one, str)]
        cloud.clock.at += timedelta(seconds=0.5)

    assert cloud.inbox.stats() == {"messages": 24, "rate_limited": 0, "banned": 0, "limit": LIMIT}


@pytest.mark.parametrize("stage", ["connect", "login", "sender", "recipient", "data", "dot"])
@pytest.mark.parametrize(
    ("reply", "error", "wait"),
    [
        ("421 4.3.2 not now", UnavailableError, None),
        ("450 4.2.0 busy", UnavailableError, None),
        ("451 4.3.0 local error", UnavailableError, None),
        ("452 4.3.1 no room", RateLimitedError, timedelta(minutes=1)),
        ("451 4.7.1 greylisted", RateLimitedError, timedelta(minutes=1)),
    ],
)
async def test_a_mail_server_that_cannot_now_is_asked_later(cloud, stage, reply, error, wait):
    """A reply of 4xx is never final, at whatever stage it comes; nothing was taken."""
    cloud.mailbox.set({"faults": [{"stage": stage, "reply": reply}]})

    with pytest.raises(error) as caught:
        await cloud.channel("email").send(for_channel("email"))

    assert caught.value.retry_after == wait
    assert cloud.taken("email") == 0


# --- refused


@pytest.mark.parametrize("status", [400, 404, 405, 410, 413])
async def test_a_refusal_is_final(cloud, channel, name, status):
    """What the service will not take is not tried again."""
    cloud.wrong(name, status=404 if name == "email" and status in (405, 410) else status)

    with pytest.raises(RefusedError):
        await channel.send(for_channel(name))


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_webhook_that_is_gone_is_a_recipient_that_is_gone(cloud, status):
    """Discord wants a webhook that is gone never to be used again."""
    cloud.wrong("discord", status=status)

    with pytest.raises(RecipientGoneError):
        await cloud.channel("discord").send(a_message())


async def test_a_webhook_that_somebody_deleted_is_gone(cloud):
    """The inbox's own answer, not a fault: 404 with code 10015."""
    channel = cloud.channel("discord")
    await channel.send(for_channel(name))
    async with ClientSession() as session:
        await session.delete(f"{cloud.url}/discord/api/webhooks/{WEBHOOK_ID}/{TOKEN}")

    with pytest.raises(RecipientGoneError):
        await channel.send(a_message("two"))


async def test_a_webhook_that_is_gone_is_never_asked_again(cloud):
    """Not by this instance, not by another, and not for an edit; another token is another webhook."""
    channel = cloud.channel("discord")
    provider_id = await channel.send(a_message())
    async with ClientSession() as session:
        await session.delete(f"{cloud.url}/discord/api/webhooks/{WEBHOOK_ID}/{TOKEN}")
    with pytest.raises(RecipientGoneError):
        await channel.send(a_message("two"))
    asked = len(cloud.reached)

    for one in (channel, cloud.channel("discord")):
        with pytest.raises(RecipientGoneError):
            await one.send(a_message("three"))
        with pytest.raises(RecipientGoneError):
            await one.edit(provider_id, a_message("three"))
    assert len(cloud.reached) == asked

    with pytest.raises(RecipientGoneError):
        await cloud.channel("discord", token="another-token-of-enough-letters").send(a_message())
    assert len(cloud.reached) == asked + 1


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_what_stands_before_discord_does_not_end_a_webhook(cloud, status):
    """A page of HTML is not Discord's answer: the webhook is tried again."""
    cloud.instead.append(refusal(status, text="<!DOCTYPE html><title>Access denied</title>"))
    channel = cloud.channel("discord")

    with pytest.raises(UnavailableError):
        await channel.send(a_message())

    assert await channel.send(a_message())


async def test_an_embed_that_displeases_goes_out_as_text(cloud):
    """A 400 is our mistake, and people still hear of it: once more, as plain text."""
    cloud.instead.append(refusal(400, body={"code": 50035, "message": "Invalid Form Body"}))

    provider_id = await cloud.channel("discord").send(a_message())

    [seen] = cloud.inbox.inbox()
    assert (seen["message_id"], seen["embeds"]) == (provider_id, [])
    assert seen["content"].startswith("AAPL: long at 561.70\n")
    assert len(cloud.reached) == 2


async def test_text_that_displeases_too_is_refused(cloud):
    """There is one second try, and no third."""
    cloud.wrong("discord", status=400)

    with pytest.raises(RefusedError):
        await cloud.channel("discord").send(a_message())

    assert cloud.faults.hits == {"discord.status": 2}


@pytest.mark.parametrize(
    ("stage", "reply", "error"),
    [
        ("recipient", "550 5.1.1 no such user", RecipientGoneError),
        ("recipient", "551 5.1.6 has moved", RecipientGoneError),
        ("recipient", "553 5.1.3 bad mailbox", RecipientGoneError),
        ("recipient", "550 no such user", RecipientGoneError),
        ("recipient", "554 5.1.0 rejected", RecipientGoneError),
        ("dot", "550 5.1.1 no such user", RecipientGoneError),
        ("recipient", "552 5.2.2 mailbox full", RefusedError),
        ("recipient", "550 5.7.1 relaying denied", RefusedError),
        ("recipient", "554 5.7.1 blocked", RefusedError),
        ("sender", "552 5.3.4 too big", RefusedError),
        ("data", "554 no valid recipients", RefusedError),
        ("dot", "550 5.7.1 looks like spam", RefusedError),
        ("dot", "552 5.3.4 too big", RefusedError),
        ("dot", "554 5.6.0 malformed", RefusedError),
        ("connect", "554 no service for you", ConfigurationError),
        ("login", "535 5.7.8 wrong", ConfigurationError),
        ("login", "534 5.7.9 mechanism too weak", ConfigurationError),
        ("sender", "530 5.7.0 login first", ConfigurationError),
        ("sender", "550 5.1.8 sender unknown", ConfigurationError),
        ("sender", "553 5.7.1 not your address", ConfigurationError),
    ],
)
async def test_a_mail_server_that_will_not_says_whose_fault_it_is(cloud, stage, reply, error):
    """The same number means something else about the recipient, the message or our own settings."""
    cloud.mailbox.set({"faults": [{"stage": stage, "reply": reply}]})

    with pytest.raises(error) as caught:
        await cloud.channel("email").send(for_channel("email"))

    assert type(caught.value) is error
    assert reply[:3] in str(caught.value)
    assert cloud.taken("email") == 0


async def test_a_wrong_password_needs_a_person(cloud):
    """The embedded server's own 535, not a fault; the error names the setting."""
    with pytest.raises(ConfigurationError, match="SMTP_URL"):
        await cloud.mail(password="canary-wrong").send(for_channel("email"))


async def test_a_wrong_token_is_a_recipient_that_is_gone(cloud):
    """Discord does not tell a wrong token from a deleted webhook."""
    with pytest.raises(RecipientGoneError):
        await cloud.channel("discord", token="another-token-of-enough-letters").send(a_message())


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_needs_a_person(cloud, status):
    """SignalR that refuses our key is a wrong setting; the error names it."""
    cloud.wrong("signalr", status=status)

    with pytest.raises(ConfigurationError, match="AZURE_SIGNALR_CONNECTION_STRING"):
        await cloud.channel("signalr").send(a_message())


async def test_a_wrong_key_needs_a_person(cloud):
    """The embedded service's own 401, not a fault."""
    channel = cloud.channel("signalr", key="another-key-of-at-least-thirty-two-bytes")

    with pytest.raises(ConfigurationError):
        await channel.send(a_message())
    with pytest.raises(ConfigurationError):
        await channel.join("guest-1", "symbols/all")


@pytest.mark.parametrize("name", HTTP)
async def test_a_redirect_is_not_followed(cloud, channel, name):
    """An answer that points elsewhere is a refusal: nothing is sent anywhere else."""
    cloud.instead.append(refusal(302, Location=f"{cloud.url}/elsewhere"))

    with pytest.raises(RefusedError):
        await channel.send(for_channel(name))

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
        await cloud.channel(name, url=nowhere).send(for_channel(name))


@pytest.mark.parametrize("stage", ["connect", "login", "sender", "recipient", "data"])
async def test_a_mail_server_that_vanishes_before_the_message_has_nothing(cloud, stage):
    """Until the content is on its way nothing was sent: it is tried again."""
    cloud.mailbox.set({"faults": [{"stage": stage, "cut": True}]})

    with pytest.raises(UnavailableError):
        await cloud.channel("email").send(for_channel("email"))


async def test_a_mail_is_the_same_mail_when_it_is_repeated(cloud, channel):
    """After an unknown outcome the repeat has the same Message-ID, so mailboxes can tell."""
    mail = cloud.channel("email")
    cloud.wrong("email", accept_then_cut=1.0)
    with pytest.raises(OutcomeUnknownError):
        await mail.send(for_channel("email"))
    cloud.right()

    await mail.send(for_channel("email", is_possible_repeat=True))

    second, first = cloud.mailbox.inbox()
    assert second["message_id"] == first["message_id"]
    assert second["repeat_of"] == first["id"]


async def test_a_kept_connection_that_the_server_gave_up_is_replaced(cloud):
    """Mails in a row share a connection; one that died meanwhile costs nothing but a new one."""
    mail = cloud.channel("email")
    for number in range(3):
        await mail.send(for_channel("email", str(number)))
    assert cloud.mailbox.connections == 1
    port = cloud.mailbox.port
    await cloud.mailbox.close()
    await cloud.mailbox.start(port)

    await mail.send(for_channel("email", "after"))

    assert (cloud.mailbox.connections, cloud.taken("email")) == (2, 4)


async def test_accepted_and_cut_is_an_unknown_outcome(cloud, channel, name):
    """The service took it and the answer was lost: nobody may call that a failure."""
    cloud.wrong(name, accept_then_cut=1.0)

    with pytest.raises(OutcomeUnknownError):
        await channel.send(for_channel(name))

    assert len(set(cloud.reached)) == len(cloud.reached), "the channel asked again by itself"
    assert cloud.taken(name) == (2 if name == "signalr" else 1)  # the hub has one call a group


async def test_cut_before_an_answer_is_an_unknown_outcome(cloud, channel, name):
    """From outside it looks the same."""
    cloud.wrong(name, cut=1.0)

    with pytest.raises(OutcomeUnknownError):
        await channel.send(for_channel(name))


@pytest.mark.parametrize("name", HTTP)
@pytest.mark.parametrize("status", [500, 502, 504])
async def test_an_error_of_the_service_is_an_unknown_outcome(cloud, channel, name, status):
    """A 5xx may come after the effect."""
    cloud.wrong(name, status=status)

    with pytest.raises(OutcomeUnknownError):
        await channel.send(for_channel(name))


@pytest.mark.parametrize(("name", "error"), [("signalr", UnavailableError), ("discord", OutcomeUnknownError)])
async def test_503_is_no_effect_where_the_service_promises_it(cloud, name, error):
    """SignalR's 503 took nothing; Discord promises nothing."""
    cloud.wrong(name, status=503)

    with pytest.raises(error):
        await cloud.channel(name).send(for_channel(name))


async def test_no_answer_in_time_is_an_unknown_outcome(cloud, name):
    """A service that is silent may have taken it."""
    cloud.wrong(name, latency_ms=5000.0)

    with pytest.raises(OutcomeUnknownError):
        await cloud.channel(name, total=0.3 if name == "email" else 0.05).send(for_channel(name))


async def test_the_channel_works_again_when_the_service_does(cloud, channel, name):
    """No trouble stays in the channel."""
    for fault in ({"status": 503}, {"cut": 1.0}, {"accept_then_cut": 1.0}, {"status": 400}):
        cloud.wrong(name, **fault)
        with pytest.raises(TroopError):
            await channel.send(for_channel(name))
    cloud.right()

    await channel.send(for_channel(name, "after"))


async def test_a_proxy_of_the_environment_is_not_used(cloud, channel, name, monkeypatch):
    """A credential never goes through a proxy that the environment happens to name."""
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setitem(os.environ, variable, "http://127.0.0.1:9")

    await channel.send(for_channel(name))


# --- secrets

TROUBLES: list[dict[str, Any]] = [
    {},
    {"status": 400},
    {"status": 401},
    {"status": 404},
    {"status": 429},
    {"status": 413},
    {"status": 503},
    {"cut": 1.0},
    {"accept_then_cut": 1.0},
    {"latency_ms": 5000.0},
]


async def test_no_error_log_or_repr_shows_a_credential(cloud, name, caplog, nowhere):
    """Whatever goes wrong, neither the webhook's token nor the hub's key nor a token made with it is ever shown."""
    caplog.set_level(logging.DEBUG)
    for noisy in ("httpx", "httpcore", "httpcore.http11", "httpcore.connection", "asyncio", "aiosmtplib"):
        caplog.set_level(logging.DEBUG, logger=noisy)
    shown: list[str] = []
    for fault in TROUBLES:
        cloud.storage = Storage(cloud.clock)  # a bucket of its own, so that every fault is met
        channel = cloud.channel(name, total=0.2 if "latency_ms" in fault else 8)
        shown.append(f"{channel} {channel!r} {vars(channel)}")
        cloud.right()
        if fault:
            cloud.wrong(name, **fault)
        try:
            await channel.send(for_channel(name))
        except TroopError as e:
            shown += traceback.format_exception(e)
            shown.append(f"{e!r} {e.__cause__!r} {e.__context__!r} {vars(e)}")
    with pytest.raises(UnavailableError) as caught:
        await cloud.channel(name, url=nowhere).send(for_channel(name))
    shown += traceback.format_exception(caught.value)
    for record in caplog.records:
        if not record.name.startswith(("aiohttp", "mail.log")):  # the other side's own log of what it was asked
            shown.append(f"{record.getMessage()} {vars(record)}")
            shown.append(str(record.exc_text or ""))

    told = "\n".join(shown)
    assert len(shown) > len(TROUBLES)
    assert TOKEN not in told
    assert KEY not in told
    assert "Bearer ey" not in told
    assert "/webhooks/" not in told
    assert PASSWORD not in told
    assert ALICE not in told
