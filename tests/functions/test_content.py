"""When the content domain wakes up: its triggers and endpoints, called as the Functions worker calls them."""

import json
from datetime import timedelta
from typing import Any
from xml.etree import ElementTree as ET

import azure.functions as func
import pytest

from content.functions import FEED_LENGTH, PostItem, blueprint
from content.logic.atom import ATOM
from content.models import Kind, signal_post_id
from content.wiring import Wired
from shared.errors import ConfigurationError, UnavailableError
from shared.http import Api
from shared.inbound import DeadLetters, RedeliverError
from signals.events import SignalRaised
from tests.builders import a_cloud_event, a_request
from tests.standins import a_signal
from tests.unit.content.newsroom import SETTLE, Newsroom, a_post


class App:
    """The domain's blueprint, indexed, around a newsroom."""

    def __init__(self) -> None:
        self.room = Newsroom()
        self.dead_letters = DeadLetters(self.room.documents, self.room.wall)
        wired = Wired(service=self.room.service(), dead_letters=self.dead_letters, public_url="https://troop.example")
        app = func.FunctionApp()
        app.register_functions(blueprint(wired, Api()))
        self.functions = {f.get_function_name(): f for f in app.get_functions()}

    async def call(self, name: str, argument: object) -> Any:
        return await self.functions[name].get_user_function()(argument)

    async def hear(self, data: object, **event: str) -> None:
        await self.call("content_on_signal_raised", a_cloud_event(data, **({"type": SignalRaised.type} | event)))

    async def get(self, name: str = "posts_list", *, headers: dict[str, str] | None = None, **params: str) -> Any:
        return await self.call(name, a_request(params=params, headers=headers))

    async def read(self, post_id: str) -> func.HttpResponse:
        return await self.call("posts_read", a_request(route={"post_id": post_id}))

    async def items(self, **params: str) -> list[dict[str, Any]]:
        answer = await self.get(**params)
        assert answer.status_code == 200, answer.get_body()
        return body_of(answer)["items"]

    async def buried(self) -> list[dict[str, Any]]:
        return [dict(d.body) for d in await self.dead_letters.newest(after=None, limit=100)]

    async def write_digest(self) -> None:
        await self.call("content_open_digests", None)
        self.room.wall.at += SETTLE
        await self.call("content_sweep", None)


@pytest.fixture
def app() -> App:
    return App()


def body_of(answer: func.HttpResponse) -> Any:
    return json.loads(answer.get_body())


def wire(name: str = "one", **changes) -> dict[str, Any]:
    return a_signal(name, **changes).to_wire()["data"]


# --- what wakes it up


def test_the_domain_has_these_triggers(app):
    """Names, triggers, routes and who may call: what the host is told."""
    shown = {}
    for name, function in app.functions.items():
        trigger = function.get_trigger()
        asked = getattr(trigger, "schedule", None) or getattr(trigger, "route", None)
        level = getattr(trigger, "auth_level", None)
        shown[name] = (trigger.type, asked, level.value if level else None)

    assert shown == {
        "content_on_signal_raised": ("eventGridTrigger", None, None),
        "content_open_digests": ("timerTrigger", "%CONTENT_DIGEST_SCHEDULE%", None),
        "content_sweep": ("timerTrigger", "%CONTENT_SWEEP_SCHEDULE%", None),
        "posts_list": ("httpTrigger", "posts", "anonymous"),
        "posts_read": ("httpTrigger", "posts/{post_id}", "anonymous"),
        "posts_feed": ("httpTrigger", "feed.xml", "anonymous"),
    }


async def test_a_signal_on_the_wire_becomes_a_post(app):
    """The event function decodes, writes and is done; the same event again changes nothing."""
    await app.hear(wire())
    await app.hear(wire())

    [item] = await app.items()
    assert item["title"] == "AAPL: long at 561.70"
    assert item["post_id"] == signal_post_id(a_signal().signal_id)
    assert len(app.room.topic.told) == 1


@pytest.mark.parametrize("data", [None, "hello", [], {}, wire() | {"strength": float("inf")}])
async def test_an_event_that_cannot_be_used_is_buried_with_its_reason(app, data):
    """It is kept where people see it, and acknowledged."""
    await app.hear(data)

    [letter] = await app.buried()
    assert (letter["source"], letter["event_id"]) == ("content_on_signal_raised", "e1")
    assert "InvalidPayloadError" in letter["reason"]
    assert await app.items() == []


async def test_the_two_domains_bury_the_same_event_apart(app):
    """A dead letter belongs to one function and one event; burying again counts another time."""
    await app.hear(None)
    await app.hear(None)
    await app.dead_letters.bury("alerts_on_signal_raised", "e1", "no", {})

    assert sorted((d["source"], d["times"]) for d in await app.buried()) == [
        ("alerts_on_signal_raised", 1),
        ("content_on_signal_raised", 2),
    ]


@pytest.mark.parametrize("error", [UnavailableError("s3cret"), ConfigurationError("s3cret"), RuntimeError("s3cret")])
async def test_trouble_that_may_pass_asks_for_redelivery_without_details(app, error):
    """Event Grid shall come again, and is told no detail."""
    app.room.topic.trouble = [error]

    with pytest.raises(RedeliverError) as caught:
        await app.hear(wire())

    assert "s3cret" not in str(caught.value)
    await app.hear(wire())
    assert len(app.room.topic.told) == 1


async def test_the_timers_open_and_write_the_digest(app):
    """Two timers, one digest."""
    await app.hear(wire())

    await app.write_digest()

    [digest] = await app.items(kind="digest")
    assert (digest["title"], digest["version"], digest["session"]) == ("2012-11-21: 1 signal", 1, "2012-11-21")


# --- the list


async def test_an_item_shows_the_whole_post(app):
    """What the API says is what openapi.json promises."""
    await app.hear(wire())

    [item] = await app.items()
    answer = await app.read(item["post_id"])

    assert PostItem.model_validate(item).kind == "signal"
    assert set(item) == set(PostItem.model_fields)
    assert body_of(answer) == item
    assert (item["occurred_at"], item["recorded_at"]) == ("2012-11-21T21:00:00Z", "2026-11-21T09:00:00Z")
    assert "<table>" in item["html"]


async def test_a_corrected_digest_shows_its_new_version(app):
    """The same id, the next version, a later updated_at."""
    await app.write_digest()
    [first] = await app.items(kind="digest")
    app.room.wall.at += timedelta(hours=1)
    await app.hear(wire())
    await app.room.settled()

    [second] = await app.items(kind="digest")

    assert second["post_id"] == first["post_id"]
    assert (first["version"], second["version"]) == (1, 2)
    assert second["updated_at"] > first["updated_at"]
    assert second["recorded_at"] == first["recorded_at"]


async def test_pages_lead_through_both_kinds_newest_first(app):
    """next is the cursor of the following page and null at the end."""
    for number in range(3):
        await app.hear(wire(str(number)))
        app.room.wall.at += timedelta(minutes=5)
    await app.write_digest()

    pages, cursor = [], {}
    while True:
        page = body_of(await app.get(limit="3", **cursor))
        pages.append([item["kind"] for item in page["items"]])
        if page["next"] is None:
            break
        cursor = {"cursor": page["next"]}

    assert pages == [["digest", "signal", "signal"], ["signal"]]


async def test_what_came_later_is_listed_oldest_first(app):
    """?after= takes up a list where a client left it."""
    for number in range(3):
        await app.hear(wire(str(number)))
        app.room.wall.at += timedelta(minutes=5)
    posts = await app.room.listed()
    newest = body_of(await app.get(limit="1", kind="signal"))["next"]

    assert [i["post_id"] for i in await app.items(after=newest)] == [posts[-1].post_id]
    page = body_of(await app.get(limit="3"))
    assert page["next"]
    assert [i["post_id"] for i in await app.items(after=page["next"])] == [p.post_id for p in posts]


@pytest.mark.parametrize("kind", ["signal", "digest"])
async def test_one_kind_can_be_asked_for(app, kind):
    """The other kind is not in the list."""
    await app.hear(wire())
    await app.write_digest()

    assert {item["kind"] for item in await app.items(kind=kind)} == {kind}
    assert len(await app.items(kind="")) == 2


async def test_another_kind_is_a_problem(app):
    """400 with the kinds there are."""
    answer = await app.get(kind="poem")

    assert answer.status_code == 400
    assert "signal, digest" in body_of(answer)["detail"]


@pytest.mark.parametrize("post_id", ["x", "draft|2012-11-21", "../system", "fact|x"])
async def test_a_post_that_is_not_there_is_404(app, post_id):
    """And nothing but posts can be read this way."""
    await app.hear(wire())
    await app.call("content_open_digests", None)

    answer = await app.read(post_id)

    assert answer.status_code == 404


async def test_a_post_that_did_not_change_is_304(app):
    """A reader that knows the post is told so."""
    await app.hear(wire())
    first = await app.get()

    again = await app.get(headers={"If-None-Match": first.headers["ETag"]})

    assert (again.status_code, again.get_body()) == (304, b"")


# --- the feed


async def test_the_feed_is_atom_and_newest_first(app):
    """A feed reader gets both kinds, with the address that people see."""
    await app.hear(wire(entry="<b>&{{ 1 }}"))
    app.room.wall.at += timedelta(minutes=5)
    await app.write_digest()

    answer = await app.get("posts_feed")

    root = ET.fromstring(answer.get_body())
    entries = root.findall(f"{{{ATOM}}}entry")
    assert (answer.status_code, answer.mimetype) == (200, "application/atom+xml")
    assert [e.find(f"{{{ATOM}}}category").get("term") for e in entries] == ["digest", "signal"]
    assert [e.findtext(f"{{{ATOM}}}id") for e in entries] == [
        f"urn:uuid:{post.post_id}" for post in reversed(await app.room.listed())
    ]
    assert "<b>&{{ 1 }}" in entries[1].findtext(f"{{{ATOM}}}summary")
    assert "<b>" not in entries[1].findtext(f"{{{ATOM}}}content")
    assert b"https://troop.example/api/posts/" in answer.get_body()


async def test_the_feed_ends_after_the_newest_fifty(app):
    """A feed is for what is new; the list has everything."""
    for number in range(FEED_LENGTH + 5):
        at = app.room.wall.at + timedelta(seconds=number)
        await app.room.posts.create(a_post(str(number), kind=Kind.SIGNAL, recorded_at=at, updated_at=at))

    root = ET.fromstring((await app.get("posts_feed")).get_body())

    published = [e.findtext(f"{{{ATOM}}}published") for e in root.findall(f"{{{ATOM}}}entry")]
    assert len(published) == FEED_LENGTH
    assert published[0] == "2026-11-21T09:00:54Z"
    assert published == sorted(published, reverse=True)
    assert root.findtext(f"{{{ATOM}}}updated") == published[0]
