"""The local Discord inbox, held against Discord's documented limits and answers."""

import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from infra.local.discord import DEFAULT_WEBHOOK, DiscordInbox
from infra.local.faults import Switchboard
from shared.clock import StoppedClock

WEBHOOK_ID, TOKEN = DEFAULT_WEBHOOK
START = datetime(2026, 11, 21, 9, tzinfo=UTC)


class Discord:
    """One inbox behind a real socket, with a clock that stands."""

    def __init__(self, inbox: DiscordInbox, url: str, clock: StoppedClock, client: httpx.AsyncClient) -> None:
        self.inbox = inbox
        self.webhook = f"{url}/discord/api/webhooks/{WEBHOOK_ID}/{TOKEN}"
        self.url = url
        self.clock = clock
        self.client = client

    async def say(self, **body) -> httpx.Response:
        return await self.client.post(self.webhook, params={"wait": "true"}, json=body)

    async def refused(self, **body) -> dict:
        answer = await self.say(**body)
        assert answer.status_code == 400, answer.text
        assert self.inbox.count() == 0
        return answer.json()


@pytest.fixture
def state():
    one = sqlite3.connect(":memory:", isolation_level=None)
    yield one
    one.close()


@pytest.fixture
def faults() -> Switchboard:
    return Switchboard()


@pytest.fixture
async def discord(state, faults) -> AsyncIterator[Discord]:
    clock = StoppedClock(START)
    inbox = DiscordInbox(state, clock=clock)
    app = web.Application(middlewares=[faults.middleware()])
    app.add_routes(inbox.routes())
    async with TestServer(app, host="127.0.0.1") as server, httpx.AsyncClient(trust_env=False) as client:
        yield Discord(inbox, str(server.make_url("")).rstrip("/"), clock, client)


def errors_at(body: dict, *path: str) -> list[str]:
    assert (body["code"], body["message"]) == (50035, "Invalid Form Body")
    node = body["errors"]
    for part in path:
        node = node[part]
    return [one["code"] for one in node["_errors"]]


# --- what people see


async def test_a_message_is_seen_and_answered(discord):
    """With wait=true Discord answers the message it saved, and the inbox shows the same."""
    embed = {"title": "AAPL crossed up", "color": 0x00FF00, "fields": [{"name": "close", "value": "544.47"}]}

    answer = await discord.say(content="  AAPL long  ", username="TROOP", embeds=[embed])

    message = answer.json()
    [seen] = discord.inbox.inbox()
    assert answer.status_code == 200
    assert message["id"] == seen["message_id"]
    assert (message["content"], message["author"]["username"]) == ("AAPL long", "TROOP")
    assert seen["embeds"][0]["fields"] == [{"name": "close", "value": "544.47", "inline": False}]
    assert seen["received_at"] == "2026-11-21T09:00:00Z"


async def test_without_wait_the_answer_is_empty(discord):
    """wait defaults to false: 204, and no id to remember."""
    answer = await discord.client.post(discord.webhook, json={"content": "hello"})

    assert (answer.status_code, answer.content) == (204, b"")
    assert discord.inbox.count() == 1


async def test_a_versioned_address_works_as_well(discord):
    """Discord serves the same API under /api/v10."""
    url = discord.webhook.replace("/discord/api/", "/discord/api/v10/")

    answer = await discord.client.post(url, json={"content": "hello"})

    assert answer.status_code == 204


async def test_the_inbox_lists_newest_first_and_after_an_id(discord):
    """The inbox pages by message id; ids grow even within one millisecond."""
    ids = [(await discord.say(content=f"m{n}")).json()["id"] for n in range(4)]

    page = (await discord.client.get(f"{discord.url}/discord/inbox", params={"limit": 2})).json()
    newer = (await discord.client.get(f"{discord.url}/discord/inbox", params={"after": ids[1]})).json()

    assert ids == sorted(ids, key=int)
    assert [item["content"] for item in page["items"]] == ["m3", "m2"]
    assert page["count"] == 4
    assert [item["content"] for item in newer["items"]] == ["m3", "m2"]


async def test_a_bad_inbox_query_is_named(discord):
    """A limit that is no number is a 400 that names it."""
    answer = await discord.client.get(f"{discord.url}/discord/inbox", params={"limit": "many"})

    assert answer.status_code == 400
    assert "limit" in answer.json()["detail"]


async def test_an_edited_message_shows_its_new_text(discord):
    """PATCH replaces what is given and keeps the rest."""
    message_id = (await discord.say(content="first", embeds=[{"title": "kept"}])).json()["id"]

    answer = await discord.client.patch(f"{discord.webhook}/messages/{message_id}", json={"content": "second"})
    read = (await discord.client.get(f"{discord.webhook}/messages/{message_id}")).json()

    assert answer.status_code == 200
    assert (read["content"], read["embeds"][0]["title"]) == ("second", "kept")
    assert read["edited_timestamp"]


async def test_a_deleted_message_is_gone_for_discord_and_kept_in_the_record(discord):
    """DELETE answers 204, then 10008; the inbox still knows that people saw it."""
    message_id = (await discord.say(content="oops")).json()["id"]
    url = f"{discord.webhook}/messages/{message_id}"

    first, second = await discord.client.delete(url), await discord.client.get(url)

    assert first.status_code == 204
    assert (second.status_code, second.json()["code"]) == (404, 10008)
    assert discord.inbox.inbox()[0]["deleted_at"]


async def test_messages_survive_a_new_process(discord, state):
    """What people saw is in the database, not in memory."""
    await discord.say(content="hello")

    again = DiscordInbox(state)

    assert [item["content"] for item in again.inbox()] == ["hello"]


# --- what Discord refuses


@pytest.mark.parametrize(
    ("webhook_id", "token"), [("1", TOKEN), (WEBHOOK_ID, "another"), ("999999999999999999999", "x")]
)
async def test_an_unknown_webhook_is_a_404(discord, webhook_id, token):
    """The token is the credential: any other pair of id and token is unknown."""
    url = f"{discord.url}/discord/api/webhooks/{webhook_id}/{token}"

    answer = await discord.client.post(url, json={"content": "hello"})

    assert answer.status_code == 404
    assert answer.json() == {"message": "Unknown Webhook", "code": 10015}


async def test_a_deleted_webhook_is_gone_for_ever(discord, state):
    """After DELETE every call answers 10015, in the next process too."""
    shown = await discord.client.get(discord.webhook)
    gone = await discord.client.delete(discord.webhook)
    after = await discord.say(content="hello")

    assert (shown.json()["id"], shown.json()["token"]) == DEFAULT_WEBHOOK
    assert gone.status_code == 204
    assert (after.status_code, after.json()["code"]) == (404, 10015)
    assert state.execute("SELECT count(*) FROM discord_gone").fetchone() == (1,)


@pytest.mark.parametrize("body", [{}, {"content": ""}, {"content": "  \n"}, {"embeds": []}, {"embeds": [{}]}])
async def test_an_empty_message_is_refused(discord, body):
    """At least something must be visible: 50006."""
    answer = await discord.refused(**body)

    assert answer == {"message": "Cannot send an empty message", "code": 50006}


def field(name: str = "n", value: str = "v") -> dict[str, str]:
    return {"name": name, "value": value}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"content": "x" * 2001}, ["content"]),
        ({"embeds": [{"title": "t"}] * 11}, ["embeds"]),
        ({"embeds": [{"title": "x" * 257}]}, ["embeds", "0", "title"]),
        ({"embeds": [{"description": "x" * 4097}]}, ["embeds", "0", "description"]),
        ({"embeds": [{"title": "t"}, {"footer": {"text": "x" * 2049}}]}, ["embeds", "1", "footer", "text"]),
        ({"embeds": [{"author": {"name": "x" * 257}}]}, ["embeds", "0", "author", "name"]),
        ({"embeds": [{"fields": [field()] * 26}]}, ["embeds", "0", "fields"]),
        ({"embeds": [{"fields": [field("x" * 257)]}]}, ["embeds", "0", "fields", "0", "name"]),
        ({"embeds": [{"fields": [field(), field(value="x" * 1025)]}]}, ["embeds", "0", "fields", "1", "value"]),
    ],
)
async def test_too_long_is_refused_where_it_is_too_long(discord, body, path):
    """Every documented length has its error at its place in the tree."""
    assert errors_at(await discord.refused(**body), *path) == ["BASE_TYPE_MAX_LENGTH"]


@pytest.mark.parametrize(
    "body",
    [
        {"content": "x" * 2000},
        {"content": " " * 50 + "x" * 2000},
        {"embeds": [{"title": "t"}] * 10},
        {"embeds": [{"title": "x" * 256, "description": "x" * 4096}]},
        {"embeds": [{"title": "t", "footer": {"text": "x" * 2048}, "author": {"name": "x" * 256}}]},
        {"embeds": [{"fields": [field("x" * 100, "y" * 100)] * 25}]},
        {"embeds": [{"description": "x" * 3000}, {"description": "x" * 3000}]},
        {"content": "x", "username": "x" * 80},
    ],
)
async def test_exactly_at_the_limit_is_taken(discord, body):
    """A limit is inclusive, and surrounding blanks do not count."""
    assert (await discord.say(**body)).status_code == 200


async def test_all_embeds_together_have_a_limit(discord):
    """The texts of all embeds sum to 6,000 at most."""
    body = await discord.refused(embeds=[{"description": "x" * 3000}, {"description": "x" * 3000, "title": "t"}])

    assert errors_at(body, "embeds") == ["MAX_EMBED_SIZE_EXCEEDED"]


@pytest.mark.parametrize(
    ("embed", "path", "code"),
    [
        ({"fields": [{"name": "n", "value": ""}]}, ["fields", "0", "value"], "BASE_TYPE_REQUIRED"),
        ({"title": "t", "color": 0x1000000}, ["color"], "NUMBER_TYPE_MAX"),
        ({"title": "t", "color": "red"}, ["color"], "NUMBER_TYPE_COERCE"),
        ({"title": "t", "url": "javascript:alert(1)"}, ["url"], "URL_TYPE_INVALID_SCHEME"),
        ({"title": "t", "image": {"url": "file:///x"}}, ["image", "url"], "URL_TYPE_INVALID_SCHEME"),
        ({"title": "t", "timestamp": "noon"}, ["timestamp"], "DATE_TIME_TYPE_PARSE"),
        ({"title": 7}, ["title"], "STRING_TYPE_CONVERT"),
        ({"title": "t", "footer": "f"}, ["footer"], "MODEL_TYPE_CONVERT"),
    ],
)
async def test_a_wrong_part_of_an_embed_is_named(discord, embed, path, code):
    """What an embed cannot carry is refused at its place."""
    assert errors_at(await discord.refused(embeds=[embed]), "embeds", "0", *path) == [code]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("", "BASE_TYPE_BAD_LENGTH"),
        ("x" * 81, "BASE_TYPE_BAD_LENGTH"),
        ("My Discord", "USERNAME_INVALID_CONTAINS"),
        ("CLYDE", "USERNAME_INVALID_CONTAINS"),
    ],
)
async def test_a_username_must_not_pretend(discord, name, code):
    """1 to 80 characters, and neither 'clyde' nor 'discord' in any case."""
    assert errors_at(await discord.refused(content="x", username=name), "username") == [code]


@pytest.mark.parametrize("text", ["", "{", "[1]", "NaN"])
async def test_a_body_that_is_no_object_is_refused(discord, text):
    """Broken JSON is Discord's 50109."""
    headers = {"Content-Type": "application/json"}

    answer = await discord.client.post(discord.webhook, content=text, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (400, 50109)


# --- who would be pinged

LOUD = "@everyone <@1> <@!2> <@&3>"


@pytest.mark.parametrize(
    ("allowed", "pings"),
    [
        (None, {"everyone": False, "users": ["1", "2"], "roles": []}),
        ({"parse": []}, {"everyone": False, "users": [], "roles": []}),
        ({"parse": ["everyone", "roles"]}, {"everyone": True, "users": [], "roles": ["3"]}),
        ({"parse": [], "users": ["2"]}, {"everyone": False, "users": ["2"], "roles": []}),
    ],
)
async def test_the_record_says_who_would_have_been_pinged(discord, allowed, pings):
    """Without allowed_mentions a webhook pings users; with it only whom it names."""
    body = {"content": LOUD} if allowed is None else {"content": LOUD, "allowed_mentions": allowed}

    await discord.say(**body)

    assert discord.inbox.inbox()[0]["pings"] == pings


async def test_an_edit_forgets_who_may_be_pinged(discord):
    """PATCH parses mentions with the defaults unless it repeats allowed_mentions."""
    message_id = (await discord.say(content=LOUD, allowed_mentions={"parse": []})).json()["id"]

    await discord.client.patch(f"{discord.webhook}/messages/{message_id}", json={"content": LOUD})

    assert discord.inbox.inbox()[0]["pings"]["users"] == ["1", "2"]


async def test_contradicting_mentions_are_refused(discord):
    """parse and a list of the same kind exclude each other."""
    body = await discord.refused(content="x", allowed_mentions={"parse": ["users"], "users": ["1"]})

    assert errors_at(body, "allowed_mentions") == ["MESSAGE_ALLOWED_MENTIONS_PARSE_EXCLUSIVE"]


# --- the rate bucket


async def test_the_sixth_call_in_two_seconds_is_told_to_wait(discord):
    """Five calls in 2 s, told in the headers; then 429 with the seconds in body and header, and nothing saved."""
    answers = [await discord.say(content=f"m{n}") for n in range(5)]
    discord.clock.at += timedelta(seconds=0.75)
    refused = await discord.say(content="one too many")

    assert [a.headers["X-RateLimit-Remaining"] for a in answers] == ["4", "3", "2", "1", "0"]
    assert {a.headers["X-RateLimit-Limit"] for a in answers} == {"5"}
    assert float(answers[0].headers["X-RateLimit-Reset"]) == (START + timedelta(seconds=2)).timestamp()
    assert refused.status_code == 429
    assert refused.json() == {"message": "You are being rate limited.", "retry_after": 1.25, "global": False}
    assert (refused.headers["Retry-After"], refused.headers["X-RateLimit-Scope"]) == ("1.250", "user")
    assert refused.headers["X-RateLimit-Bucket"] == answers[0].headers["X-RateLimit-Bucket"]
    assert discord.inbox.count() == 5


async def test_after_the_wait_the_bucket_is_full_again(discord):
    """Whoever waits as long as told is served."""
    for n in range(5):
        await discord.say(content=f"m{n}")
    wait = (await discord.say(content="too many")).json()["retry_after"]

    discord.clock.at += timedelta(seconds=wait)

    assert (await discord.say(content="again")).status_code == 200


async def test_a_wrong_body_costs_an_allowance_as_well(discord):
    """Refused messages count: a loop of bad requests runs into the limit."""
    answers = [(await discord.say()).status_code for _ in range(6)]

    assert answers == [400] * 5 + [429]


async def test_each_webhook_has_its_own_bucket_and_the_limit_can_be_lifted(state):
    """One webhook's traffic does not slow another's; a benchmark may raise the limit."""
    inbox = DiscordInbox(state, {"1": "a", "2": "b"}, limit=50, clock=StoppedClock(START))
    app = web.Application()
    app.add_routes(inbox.routes())
    async with TestServer(app, host="127.0.0.1") as server, ClientSession() as session:

        async def say(webhook: str) -> int:
            url = server.make_url(f"/discord/api/webhooks/{webhook}")
            async with session.post(url, json={"content": "x"}) as answer:
                return answer.status

        first = [await say("1/a") for _ in range(51)]

        assert (first[:50], first[50]) == ([204] * 50, 429)
        assert await say("2/b") == 204


# --- further webhooks, old messages, and too much trouble


async def test_further_webhooks_are_made_on_request_and_stay(discord, state):
    """Each has an address of its own that works at once, and in the next process."""
    answer = await discord.client.post(f"{discord.url}/discord/webhooks", params={"count": 3})
    made = answer.json()["items"]

    said = [(await discord.client.post(one["url"], json={"content": "x"})).status_code for one in made]

    assert (answer.status_code, said) == (201, [204] * 3)
    assert {item["webhook_id"] for item in discord.inbox.inbox()} == {one["id"] for one in made}
    assert len({one["token"] for one in made}) == 3
    assert DiscordInbox(state).make_webhook()[0] not in {one["id"] for one in made}


@pytest.mark.parametrize("count", ["0", "many", "1001", "-1"])
async def test_a_wrong_count_of_webhooks_is_named(discord, count):
    """At least one and at most a thousand at a time."""
    answer = await discord.client.post(f"{discord.url}/discord/webhooks", params={"count": count})

    assert answer.status_code == 400
    assert "count" in answer.json()["detail"]


async def test_old_messages_can_be_edited_only_so_often(discord):
    """Older than an hour: 30 edits an hour, then 30046 with the seconds to wait; younger ones have no such limit."""
    message_id = (await discord.say(content="old")).json()["id"]
    url = f"{discord.webhook}/messages/{message_id}"

    async def edits(count: int) -> list[httpx.Response]:
        answers = []
        for number in range(count):
            discord.clock.at += timedelta(seconds=2)
            answers.append(await discord.client.patch(url, json={"content": f"edit {number}"}))
        return answers

    young = await edits(31)
    discord.clock.at += timedelta(hours=1)
    old = await edits(31)
    discord.clock.at += timedelta(seconds=old[-1].json()["retry_after"])
    [later] = await edits(1)

    assert {answer.status_code for answer in (*young, *old[:30], later)} == {200}
    assert (old[30].status_code, old[30].json()["code"]) == (429, 30046)
    assert float(old[30].headers["Retry-After"]) == old[30].json()["retry_after"] > 3000


async def test_who_keeps_asking_after_a_refusal_is_banned_for_a_while(state):
    """So many invalid requests in ten minutes, and Cloudflare answers in HTML, whatever is asked; then it is over."""
    clock = StoppedClock(START)
    inbox = DiscordInbox(state, limit=1, invalid=3, clock=clock)
    app = web.Application()
    app.add_routes(inbox.routes())
    async with TestServer(app, host="127.0.0.1") as server, httpx.AsyncClient(trust_env=False) as client:
        hook = str(server.make_url(f"/discord/api/webhooks/{WEBHOOK_ID}/{TOKEN}"))
        answers = [await client.post(hook, json={"content": "x"}) for _ in range(6)]
        clock.at += timedelta(minutes=10)
        after = await client.post(hook, json={"content": "x"})

    assert [answer.status_code for answer in answers] == [204] + [429] * 5
    assert [answer.headers["Content-Type"].split(";")[0] for answer in answers[1:]] == ["application/json"] * 3 + [
        "text/html"
    ] * 2
    assert answers[-1].headers["Retry-After"] == "600"
    assert inbox.stats()["banned"] == 2
    assert after.status_code == 204


# --- faults


async def test_a_fault_refuses_before_anything_is_saved(discord, faults):
    """A 429 on demand carries its wait and leaves nothing behind."""
    faults.set({"discord": {"status": 429, "retry_after": 0.3}})

    answer = await discord.say(content="x")

    assert (answer.status_code, answer.json()["retry_after"], answer.headers["Retry-After"]) == (429, 0.3, "0.3")
    assert discord.inbox.count() == 0
    assert faults.hits == {"discord.status": 1}


async def test_accepted_and_then_cut_was_seen_by_people(discord, faults):
    """The sender sees a dead connection, the people see the message: its outcome is unknown."""
    faults.set({"discord": {"accept_then_cut": 1}})

    with pytest.raises(httpx.TransportError):
        await discord.say(content="x")

    assert discord.inbox.count() == 1


async def test_the_inbox_itself_has_no_faults(discord, faults):
    """Looking at the truth works while Discord is down."""
    faults.set({"discord": {"status": 500}})

    answer = await discord.client.get(f"{discord.url}/discord/inbox")

    assert answer.json() == {"items": [], "count": 0}
