"""The local Event Grid topic, spoken to by the real publisher client."""

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ServiceRequestError
from azure.core.messaging import CloudEvent
from azure.eventgrid.aio import EventGridPublisherClient
from yarl import URL

from infra.local.cloud import open_state
from infra.local.faults import Switchboard
from infra.local.topic import MAX_BYTES, SCHEDULE, Pace, Subscription, Topic, load_subscriptions
from shared.adapters.dead_letter_blobs import DeadLetterBlobs
from shared.clock import StoppedClock, SystemClock, parse_instant
from shared.errors import ConfigurationError, UnavailableError
from shared.http_client import HttpClient
from shared.inbound import DeadLetters
from tests.builders import documents

KEY = "a-topic-key"
SIGNALS = Subscription(function="signals_on_bars", event_types=frozenset({"market.bars_ingested.v1"}))
ALERTS = Subscription(function="alerts_on_bars", event_types=frozenset({"market.bars_ingested.v1"}))
QUICK = Pace(time_scale=0.0005)
IN_TIME = 10


@dataclass
class Receiver:
    """The app's host as the topic sees it: answers by a script, then 202."""

    script: list[int] = field(default_factory=list)
    got: list[tuple[str, dict[str, object], dict[str, str]]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            event = await request.json()
            self.got.append((request.query["functionName"], event, dict(request.headers)))
            status = self.script.pop(0) if self.script else 202
            if self.gate is not None:
                await self.gate.wait()
            return web.Response(status=status, text="an answer")
        finally:
            self.at_once -= 1

    def ids(self) -> list[str]:
        return [str(event["id"]) for _, event, _ in self.got]


@asynccontextmanager
async def served(routes: Sequence[web.AbstractRouteDef], *middlewares) -> AsyncIterator[str]:
    app = web.Application(client_max_size=26 * MAX_BYTES, middlewares=middlewares)
    app.add_routes(routes)
    async with TestServer(app, host="127.0.0.1") as server:
        yield str(server.make_url("")).rstrip("/")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    one = Receiver()
    async with served([web.post("/runtime/webhooks/EventGrid", one.answer)]) as url:
        one.url = url
        yield one
        if one.gate is not None:
            one.gate.set()


@pytest.fixture
async def letters() -> AsyncIterator[DeadLetters]:
    """The app's own dead letters."""
    store = documents(SystemClock())
    yield DeadLetters(store, SystemClock())
    await store.close()


@pytest.fixture
def faults() -> Switchboard:
    return Switchboard()


@pytest.fixture
async def open_topic(receiver, faults) -> AsyncIterator[Callable[..., Awaitable[tuple[Topic, str]]]]:
    async with AsyncExitStack() as stack:

        async def opened(*subscriptions: Subscription, pace: Pace = QUICK, state=None, app_url="", **more):
            if state is None:
                state = sqlite3.connect(":memory:", isolation_level=None)
                stack.callback(state.close)
            url = app_url or receiver.url
            topic = Topic(
                state, subscriptions or [SIGNALS], url, "the-system-key", key=KEY, pace=pace, faults=faults, **more
            )
            address = await stack.enter_async_context(served(topic.routes(), faults.middleware()))
            await topic.start()
            stack.push_async_callback(topic.close)
            return topic, f"{address}/topic/api/events"

        yield opened


def an_event(event_id: str = "e1", event_type: str = "market.bars_ingested.v1", data: object = None) -> CloudEvent:
    return CloudEvent(
        source="/market", type=event_type, id=event_id, subject="symbols/AAPL", data=data or {"symbol": "AAPL"}
    )


async def publish(address: str, *events: CloudEvent, key: str = KEY) -> None:
    client = EventGridPublisherClient(address, AzureKeyCredential(key), retry_total=0)
    async with client:
        await client.send(list(events))


async def post(address: str, body: str | bytes, key: str = KEY) -> tuple[int, dict]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(address, data=body, headers={"aeg-sas-key": key}) as answer,
    ):
        text = await answer.text()
        return answer.status, json.loads(text) if text else {}


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(IN_TIME):
        while not holds():  # noqa: ASYNC110 - the condition is the other side's
            await asyncio.sleep(0.002)


async def quiet(topic: Topic) -> None:
    await until(lambda: topic.stats()["pending"] == topic.stats()["in_flight"] == 0)


# --- the front door


async def test_the_real_client_publishes_and_the_function_hears(open_topic, receiver):
    """An accepted event reaches its function as one CloudEvent in one POST, with Event Grid's headers and key."""
    topic, address = await open_topic()

    await publish(address, an_event("e1"), an_event("e2"))
    await quiet(topic)

    function, event, headers = receiver.got[0]
    assert sorted(receiver.ids()) == ["e1", "e2"]
    assert function == "signals_on_bars"
    assert event["specversion"] == "1.0"
    assert event["data"] == {"symbol": "AAPL"}
    assert headers["aeg-event-type"] == "Notification"
    assert headers["aeg-delivery-count"] == "0"
    assert headers["aeg-subscription-name"] == "SIGNALS_ON_BARS"
    assert topic.stats()["delivered"] == 2


async def test_the_system_key_travels_in_the_query(open_topic, receiver):
    """The webhook is opened with the host's system key, as Event Grid does it."""
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(dict(request.query))
        return web.Response(status=202)

    async with served([web.post("/runtime/webhooks/EventGrid", answer)]) as url:
        _, address = await open_topic(app_url=url)
        await publish(address, an_event())
        await until(lambda: seen)

    assert seen == [{"functionName": "signals_on_bars", "code": "the-system-key"}]


async def test_every_subscriber_of_a_type_hears_it_and_nobody_else(open_topic, receiver):
    """Subscriptions select by event type; an event nobody subscribed to is accepted and counted."""
    topic, address = await open_topic(SIGNALS, ALERTS)

    await publish(address, an_event("e1"), an_event("e2", "nobody.heard.v1"))
    await quiet(topic)

    assert sorted((name, event["id"]) for name, event, _ in receiver.got) == [
        ("alerts_on_bars", "e1"),
        ("signals_on_bars", "e1"),
    ]
    assert (topic.stats()["accepted"], topic.stats()["unmatched"]) == (2, 1)


async def test_a_wrong_key_is_refused(open_topic, receiver):
    """Without the topic's key nothing is accepted."""
    topic, address = await open_topic()

    with pytest.raises(ClientAuthenticationError):
        await publish(address, an_event(), key="another key")

    assert topic.stats()["accepted"] == 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("{", "no JSON"),
        ('[{"data": NaN}]', "NaN"),
        ("[1]", "events[0]"),
        ('{"eventType": "x", "id": "1"}', "specversion"),
        ('[{"specversion": "0.3", "id": "1", "source": "s", "type": "t"}]', "specversion"),
        ('[{"specversion": "1.0", "source": "s", "type": "t"}]', "events[0].id"),
        ('[{"specversion": "1.0", "id": "1", "source": "", "type": "t"}]', "events[0].source"),
        ('[{"specversion": "1.0", "id": "1", "source": "s", "type": 7}]', "events[0].type"),
        ('[{"specversion": "1.0", "id": "1", "source": "s", "type": "t", "Trace": "x"}]', "events[0].Trace"),
        ('[{"specversion": "1.0", "id": "1", "source": "s", "type": "t", "time": "noon"}]', "events[0].time"),
        ('[{"specversion": "1.0", "id": "1", "source": "s", "type": "t", "data": 1, "data_base64": ""}]', "both"),
    ],
)
async def test_what_is_no_cloud_event_is_refused_with_a_reason(open_topic, body, named):
    """A body that is not CloudEvents 1.0 gets a 400 that names what is wrong, and nothing of it is kept."""
    topic, address = await open_topic()

    status, answer = await post(address, body)

    assert status == 400
    assert named in answer["error"]["message"]
    assert topic.stats()["accepted"] == 0


async def test_one_bad_event_refuses_the_batch(open_topic, receiver):
    """A batch is taken whole or not at all."""
    topic, address = await open_topic()
    good = '{"specversion": "1.0", "id": "1", "source": "s", "type": "market.bars_ingested.v1"}'

    status, answer = await post(address, f"[{good}, {{}}]")

    assert status == 400
    assert "events[1]" in answer["error"]["message"]
    assert topic.stats()["pending"] == 0


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_more_than_a_megabyte_is_too_large(open_topic):
    """A request over 1 MB is a 413."""
    _, address = await open_topic()

    with pytest.raises(HttpResponseError) as refused:
        await publish(address, an_event(data="x" * MAX_BYTES))

    assert refused.value.status_code == 413


async def test_an_unknown_api_version_is_refused(open_topic):
    """The topic speaks one api-version and says so."""
    _, address = await open_topic()

    status, answer = await post(f"{address}?api-version=2099-01-01", "[]")

    assert (status, answer["error"]["code"]) == (400, "UnsupportedApiVersion")


async def test_recent_events_carry_the_instant_of_their_arrival(open_topic):
    """The last accepted events can be read back, newest first, with the wall's time."""
    topic, address = await open_topic(remember=2)
    before = datetime.now(UTC)

    for name in ("e1", "e2", "e3"):
        await publish(address, an_event(name))

    recent = topic.recent(10)
    assert [one["event"]["id"] for one in recent] == ["e3", "e2"]
    assert before <= parse_instant(recent[1]["received_at"]) <= parse_instant(recent[0]["received_at"])
    assert [one["event"]["id"] for one in topic.recent(1)] == ["e3"]


# --- the postman


@pytest.mark.parametrize("status", [500, 502, 503, 408, 401, 404, 429, 302])
async def test_trouble_that_may_pass_is_tried_again(open_topic, receiver, status):
    """Everything but 400, 403 and 413 is delivered again, with the number of tries in the header."""
    topic, address = await open_topic()
    receiver.script = [status, status]

    await publish(address, an_event())
    await quiet(topic)

    assert [headers["aeg-delivery-count"] for _, _, headers in receiver.got] == ["0", "1", "2"]
    assert (topic.stats()["delivered"], topic.stats()["retried"], topic.stats()["dead"]) == (1, 2, 0)


@pytest.mark.parametrize(("status", "outcome"), [(400, "BadRequest"), (403, "Forbidden"), (413, "PayloadTooLarge")])
async def test_a_verdict_is_not_tried_again(open_topic, receiver, status, outcome):
    """400, 403 and 413 bury the event at once."""
    topic, address = await open_topic()
    receiver.script = [status]

    await publish(address, an_event())
    await quiet(topic)

    [letter] = topic.dead_letters()
    assert len(receiver.got) == 1
    assert (letter["reason"], letter["attempts"]) == ("Undeliverable", 1)
    assert (letter["last_outcome"], letter["last_status"], letter["last_answer"]) == (outcome, status, "an answer")
    assert letter["event"]["id"] == "e1"


async def test_the_last_attempt_buries_the_event(open_topic, receiver):
    """After max_attempts the event is a dead letter with its reason."""
    topic, address = await open_topic(
        Subscription(function="signals_on_bars", event_types=SIGNALS.event_types, max_attempts=3)
    )
    receiver.script = [500] * 9

    await publish(address, an_event())
    await quiet(topic)

    [letter] = topic.dead_letters()
    assert len(receiver.got) == 3
    assert (letter["reason"], letter["attempts"]) == ("MaxDeliveryAttemptsExceeded", 3)
    assert topic.stats()["dead"] == 1


async def test_without_dead_letter_a_lost_event_is_at_least_counted(open_topic, receiver):
    """dead_letter = false drops the event, and the count says so."""
    topic, address = await open_topic(
        Subscription(function="signals_on_bars", event_types=SIGNALS.event_types, dead_letter=False)
    )
    receiver.script = [400]

    await publish(address, an_event())
    await quiet(topic)

    assert topic.dead_letters() == []
    assert topic.stats()["dropped"] == 1


async def test_an_event_older_than_its_time_to_live_is_not_tried(open_topic, receiver):
    """Time to live is judged when a try is due, and is scaled like the waits."""
    clock = StoppedClock(datetime(2026, 11, 21, tzinfo=UTC))
    topic, address = await open_topic(pace=Pace(time_scale=0.002), clock=clock)
    receiver.script = [500] * 9
    await publish(address, an_event())
    await until(lambda: topic.stats()["retried"])

    clock.at += timedelta(days=1) * 0.002
    await quiet(topic)

    [letter] = topic.dead_letters()
    assert letter["reason"] == "TimeToLiveExceeded"


async def test_an_app_that_is_down_is_waited_for(open_topic, receiver):
    """A refused connection counts as a try; the event arrives when the app is up."""
    async with served([]) as url:
        gone = url  # the port of a server that has ended
    topic, address = await open_topic(app_url=gone)
    await publish(address, an_event())
    await until(lambda: topic.stats()["retried"])
    assert topic.stats()["latest"][0]["outcome"] == "SocketError"

    app = web.Application()
    app.add_routes([web.post("/runtime/webhooks/EventGrid", receiver.answer)])
    async with TestServer(app, host="127.0.0.1", port=int(gone.rpartition(":")[2])):
        await quiet(topic)

    assert receiver.ids() == ["e1"]


async def test_a_function_that_never_answers_is_sent_the_event_again(open_topic, receiver):
    """After the response timeout the event is delivered again while the first run still goes on."""
    receiver.gate = asyncio.Event()
    topic, address = await open_topic(pace=Pace(time_scale=0.0005, response_timeout=0.05))

    await publish(address, an_event())
    await until(lambda: len(receiver.got) >= 2)
    receiver.gate.set()
    await quiet(topic)

    assert set(receiver.ids()) == {"e1"}
    assert any(line["outcome"] == "TimedOut" for line in topic.stats()["latest"])


async def test_waits_follow_event_grids_schedule(open_topic):
    """10 s, 30 s, 1 min, 5 min, 10 min, ... then every 12 h; an answer may ask for more patience; up to 10 % jitter."""
    topic, _ = await open_topic(pace=Pace(time_scale=1.0))

    for attempt, seconds in enumerate([*SCHEDULE, SCHEDULE[-1]], start=1):
        assert seconds <= topic._wait_after(attempt, 500) <= seconds * 1.1
    for status, seconds in ((401, 300), (404, 300), (408, 120), (503, 30)):
        assert seconds <= topic._wait_after(1, status) <= seconds * 1.1
    assert SCHEDULE[:5] == (10, 30, 60, 300, 600)


async def test_a_slow_function_does_not_hold_up_the_others(open_topic, receiver):
    """Each subscription has its own bounded lane."""
    slow_calls = []
    release = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.query["functionName"] == "signals_on_bars":
            slow_calls.append(1)
            await release.wait()
        return web.Response(status=202)

    async with served([web.post("/runtime/webhooks/EventGrid", answer)]) as url:
        topic, address = await open_topic(SIGNALS, ALERTS, app_url=url, pace=Pace(time_scale=0.001, parallel=2))
        await publish(address, *(an_event(f"e{n}") for n in range(5)))
        await until(lambda: topic.stats()["functions"]["alerts_on_bars"]["delivered"] == 5)

        assert len(slow_calls) == 2
        release.set()
        await quiet(topic)


async def test_deliveries_in_flight_are_bounded(open_topic, receiver):
    """A burst is delivered by so many at once and no more."""
    receiver.gate = asyncio.Event()
    topic, address = await open_topic(pace=Pace(time_scale=0.001, parallel=8))

    await publish(address, *(an_event(f"e{n}") for n in range(50)))
    await until(lambda: receiver.at_once == 8)
    receiver.gate.set()
    await quiet(topic)

    assert receiver.most_at_once == 8
    assert sorted(receiver.ids()) == sorted(f"e{n}" for n in range(50))


# --- dead letters, as the app fetches them


def blobs_of(address: str, letters: DeadLetters) -> DeadLetterBlobs:
    container = URL(address).origin() / "topic/deadletters"
    return DeadLetterBlobs(str(container), HttpClient("dead letters"), letters)


async def letters_of(letters: DeadLetters) -> list[dict]:
    return [dict(letter.body) for letter in await letters.newest(after=None, limit=100)]


@pytest.mark.parametrize("status", [400, 403, 413, 500, 401])
async def test_what_cannot_be_delivered_ends_among_the_apps_dead_letters(open_topic, receiver, letters, status):
    """Refused at once, or failing for ever: it can be seen, with the reason, and the event is whole."""
    topic, address = await open_topic(
        Subscription(function="signals_on_bars", event_types=SIGNALS.event_types, max_attempts=2)
    )
    receiver.script = [status] * 9
    await publish(address, an_event())
    await quiet(topic)
    blobs = blobs_of(address, letters)

    assert await blobs.collect() == 1

    [letter] = await letters_of(letters)
    attempts = 1 if status in (400, 403, 413) else 2
    reason = "Undeliverable" if attempts == 1 else "MaxDeliveryAttemptsExceeded"
    assert (letter["source"], letter["event_id"], letter["origin"]) == ("signals_on_bars", "e1", "topic")
    assert letter["reason"].startswith(f"{reason}: ")
    assert (letter["report"]["reason"], letter["report"]["attempts"]) == (reason, attempts)
    assert parse_instant(letter["report"]["published_at"]) <= datetime.now(UTC)
    assert letter["event"]["data"] == {"symbol": "AAPL"}
    assert (letter["event"]["source"], letter["event"]["is_whole"]) == ("/market", True)
    await blobs.aclose()


async def test_what_was_fetched_is_offered_no_more(open_topic, receiver, letters):
    """The app deletes what it has; who looks at the topic still sees it."""
    topic, address = await open_topic()
    receiver.script = [400] * 3
    await publish(address, *(an_event(f"e{n}") for n in range(3)))
    await quiet(topic)
    blobs = blobs_of(address, letters)

    assert (await blobs.collect(), await blobs.collect()) == (3, 0)

    assert len(topic.dead_letters()) == 3
    assert {letter["times"] for letter in await letters_of(letters)} == {1}
    await blobs.aclose()


async def test_a_kill_between_burying_and_deleting_counts_nothing_twice(open_topic, receiver, letters):
    """The blob comes again; it is the same burial, also when the letter was dealt with meanwhile."""
    topic, address = await open_topic()
    receiver.script = [400]
    await publish(address, an_event())
    await quiet(topic)
    killed = blobs_of(address, letters)
    ask = killed._ask

    async def dies_at_delete(method, path, params):
        if method == "DELETE":
            raise UnavailableError("the process was killed")
        return await ask(method, path, params)

    killed._ask = dies_at_delete
    with pytest.raises(UnavailableError):
        await killed.collect()
    blobs = blobs_of(address, letters)
    assert await blobs.collect() == 1

    [letter] = await letters_of(letters)
    assert letter["times"] == 1
    for one in (killed, blobs):
        await one.aclose()


async def test_a_blob_is_named_and_filled_as_event_grid_does(open_topic, receiver):
    """FUNCTION in capitals, the date without leading zeros, an array with what the topic says beside the event."""
    clock = StoppedClock(datetime(2026, 3, 5, 7, tzinfo=UTC))
    topic, address = await open_topic(clock=clock)
    receiver.script = [400]
    await publish(address, an_event())
    await quiet(topic)
    container = URL(address).origin() / "topic/deadletters"

    async with aiohttp.ClientSession() as session:
        async with session.get(container, params={"restype": "container", "comp": "list"}) as answer:
            [name] = re.findall("<Name>(.*?)</Name>", await answer.text())
        async with session.get(f"{container}/{name}") as answer:
            [event] = await answer.json()
        async with session.get(f"{container}/{name.replace('SIGNALS', 'ALERTS')}") as answer:
            assert answer.status == 404
        async with session.get(container, params={"maxresults": "many", "comp": "list"}) as answer:
            assert answer.status == 400

    assert re.fullmatch(r"SIGNALS_ON_BARS/2026/3/5/7/[0-9a-f-]{36}\.json", name)
    assert event["id"] == "e1"
    said = {
        "deadletterreason": "Undeliverable",
        "deliveryattempts": 1,
        "lastdeliveryoutcome": "BadRequest",
        "publishtime": "2026-03-05T07:00:00Z",
    }
    assert {name: event[name] for name in said} == said


STRANGE = [
    (b"{no json", "SIGNALS-ON-BARS/2026/11/21/9/a.json#0", "the topic's dead letter holds no CloudEvent"),
    (b'[{"eventType": "old", "id": "1"}]', "SIGNALS-ON-BARS/2026/11/21/9/a.json#0", "holds no CloudEvent"),
    (
        b"""[{"id": "e1", "type": "t.v1", "data": {},
        "deadLetterReason": "TimeToLiveExceeded", "deliveryAttempts": 30, "lastDeliveryOutcome": "NotFound"}]""",
        "e1",
        "TimeToLiveExceeded: NotFound at the last of 30 attempts",
    ),
]


@pytest.mark.parametrize(("body", "event_id", "reason"), STRANGE)
async def test_whatever_lies_in_the_container_becomes_a_letter(letters, body, event_id, reason):
    """Azure's names with hyphens and its other spelling are understood; what is no event is kept to be looked at."""
    held = {"SIGNALS-ON-BARS/2026/11/21/9/a.json": body}

    async def listing(request: web.Request) -> web.Response:
        assert request.headers["x-ms-version"]
        return web.Response(text="".join(f"<Blob><Name>{name}</Name></Blob>" for name in held))

    async def read(request: web.Request) -> web.Response:
        return web.Response(body=held[request.match_info["name"]])

    async def delete(request: web.Request) -> web.Response:
        del held[request.match_info["name"]]
        return web.Response(status=202)

    async with served(
        [web.get("/dead", listing), web.get("/dead/{name:.+}", read), web.delete("/dead/{name:.+}", delete)]
    ) as url:
        blobs = DeadLetterBlobs(f"{url}/dead", HttpClient("dead letters"), letters)
        assert (await blobs.collect(), await blobs.collect()) == (1, 0)
        await blobs.aclose()

    [letter] = await letters_of(letters)
    assert (letter["source"], letter["event_id"]) == ("signals_on_bars", event_id)
    assert reason in letter["reason"]
    assert letter["event"]["is_whole"] is (event_id == "e1")


@pytest.mark.parametrize(
    ("status", "error"), [(403, ConfigurationError), (404, ConfigurationError), (503, UnavailableError)]
)
async def test_a_container_that_cannot_be_read_says_what_to_do(letters, status, error):
    """A missing role or a wrong address is for a person; trouble that passes is for the next minute."""

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with served([web.get("/dead", refuse)]) as url:
        blobs = DeadLetterBlobs(f"{url}/dead", HttpClient("dead letters"), letters)
        with pytest.raises(error, match=str(status)):
            await blobs.collect()
        await blobs.aclose()


@pytest.mark.parametrize("url", ["", "http://account.example/dead", "https://account.example", "https://a.b/c?sig=x"])
def test_an_address_that_is_no_container_is_refused_at_the_start(letters, url):
    """An open line, a missing container or a signature in the address is a wrong setting."""
    with pytest.raises(ConfigurationError, match="DEAD_LETTERS_URL"):
        DeadLetterBlobs(url, HttpClient("dead letters"), letters)


# --- over restarts


async def test_what_was_not_delivered_is_delivered_after_a_restart(open_topic, receiver, tmp_path):
    """Accepted and undelivered events survive the process; delivered ones are not sent again."""
    state = open_state(tmp_path / "cloud.db")
    first, address = await open_topic(state=state)
    await publish(address, an_event("delivered"))
    await quiet(first)
    receiver.gate = asyncio.Event()
    await publish(address, an_event("under-way"))
    await until(lambda: len(receiver.got) == 2)
    await first.close()
    receiver.gate.set()

    second, _ = await open_topic(state=state)
    await quiet(second)
    await second.close()
    state.close()

    assert receiver.ids() == ["delivered", "under-way", "under-way"]


async def test_time_to_live_does_not_pass_while_the_topic_is_down(open_topic, receiver, tmp_path):
    """An event that waited out the cloud's own downtime is still delivered."""
    clock = StoppedClock(datetime(2026, 11, 21, tzinfo=UTC))
    state = open_state(tmp_path / "cloud.db")
    async with served([]) as url:
        gone = url
    pace = Pace(time_scale=0.02)
    first, address = await open_topic(state=state, clock=clock, app_url=gone, pace=pace)
    await publish(address, an_event())
    await until(lambda: first.stats()["retried"])
    await first.close()

    clock.at += timedelta(days=3)
    second, _ = await open_topic(state=state, clock=clock, pace=pace)
    await quiet(second)
    await second.close()

    assert (receiver.ids(), second.dead_letters()) == (["e1"], [])
    state.close()


async def test_a_delivery_whose_subscription_is_gone_is_buried(open_topic, receiver, tmp_path):
    """Nothing accepted vanishes: without its subscription it becomes a dead letter."""
    state = open_state(tmp_path / "cloud.db")
    receiver.script = [500] * 9
    first, address = await open_topic(state=state, pace=Pace(time_scale=1))
    await publish(address, an_event())
    await until(lambda: first.stats()["retried"])
    await first.close()

    second, _ = await open_topic(ALERTS, state=state)
    await second.close()

    assert [one["reason"] for one in second.dead_letters()] == ["SubscriptionDeleted"]
    state.close()


# --- faults


async def test_duplicates_arrive_as_often_as_asked(open_topic, receiver, faults):
    """duplicate = 3 hands the same event over three times; the ledger counts one delivery."""
    faults.set({"topic": {"duplicate": 3}})
    topic, address = await open_topic()

    await publish(address, an_event())
    await until(lambda: len(receiver.got) == 3)
    await quiet(topic)

    assert receiver.ids() == ["e1"] * 3
    assert topic.stats()["delivered"] == 1


async def test_reordered_events_all_arrive(open_topic, receiver, faults):
    """reorder_ms delays each event by chance: the order changes, the set does not."""
    faults.set({"seed": 3, "topic": {"reorder_ms": 60}})
    topic, address = await open_topic()
    sent = [f"e{n:02}" for n in range(20)]

    await publish(address, *(an_event(name) for name in sent))
    await quiet(topic)

    assert receiver.ids() != sent
    assert sorted(receiver.ids()) == sent


async def test_a_dropped_answer_is_a_redelivery(open_topic, receiver, faults):
    """The function did its work, the topic did not hear: the event comes again."""
    faults.set({"topic": {"drop_answer": 1}})
    topic, address = await open_topic()
    await publish(address, an_event())
    await until(lambda: len(receiver.got) >= 2)

    faults.clear()
    await quiet(topic)

    assert set(receiver.ids()) == {"e1"}
    assert topic.stats()["delivered"] == 1


async def test_accepted_and_then_cut_leaves_the_publisher_in_the_dark(open_topic, receiver, faults):
    """The event is accepted although its publisher sees a broken connection."""
    faults.set({"topic": {"accept_then_cut": 1}})
    topic, address = await open_topic()

    with pytest.raises(ServiceRequestError):
        await publish(address, an_event())
    await quiet(topic)

    assert receiver.ids() == ["e1"]


async def test_cut_before_answering_accepts_nothing(open_topic, receiver, faults):
    """A connection cut at the door has no effect behind it."""
    faults.set({"topic": {"cut": 1}})
    topic, address = await open_topic()

    with pytest.raises(ServiceRequestError):
        await publish(address, an_event())

    assert topic.stats()["accepted"] == 0


async def test_the_same_seed_strikes_the_same_requests(open_topic, faults):
    """Dice are seeded: a failing run can be had again."""
    _, address = await open_topic()

    async def run(seed: int) -> list[int]:
        faults.set({"seed": seed, "topic": {"status": 503, "rate": 0.5}})
        return [(await post(address, "[]"))[0] for _ in range(12)]

    first, again, other = await run(1), await run(1), await run(2)

    assert first == again
    assert set(first) == {200, 503}
    assert first != other


# --- subscriptions.toml


def test_subscriptions_are_read_from_toml(tmp_path: Path):
    """A row names the function, its event types and how long the topic tries."""
    file = tmp_path / "subscriptions.toml"
    file.write_text(
        '[[subscription]]\nfunction = "f"\nevent_types = ["a.v1", "b.v1"]\nmax_attempts = 5\n'
        'ttl_minutes = 60\ndead_letter = false\n[[subscription]]\nfunction = "g"\nevent_types = ["a.v1"]\n'
    )

    f, g = load_subscriptions(file)

    assert (f.function, f.event_types, f.max_attempts) == ("f", {"a.v1", "b.v1"}, 5)
    assert (f.time_to_live, f.dead_letter) == (timedelta(hours=1), False)
    assert (g.max_attempts, g.time_to_live, g.dead_letter) == (30, timedelta(days=1), True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[subscription]", "subscriptions.toml"),
        ('[[subscription]]\nevent_types = ["a"]', "row 1 has no function"),
        ('[[subscription]]\nfunction = "f"\nevent_types = ["a"]\nretries = 3', "retries"),
        ('[[subscription]]\nfunction = "f"\nevent_types = []', "event_types is empty"),
        ('[[subscription]]\nfunction = "f"\nevent_types = ["a"]\nmax_attempts = 31', "max_attempts"),
        ('[[subscription]]\nfunction = "f"\nevent_types = ["a"]\nttl_minutes = 0', "ttl_minutes"),
        ('[[subscription]]\nfunction = "f"\nevent_types = ["a"]\n' * 2, "subscribed twice"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, text: str, named: str):
    """A mistake in the file is told with the row and the remedy."""
    file = tmp_path / "subscriptions.toml"
    file.write_text(text)

    with pytest.raises(ConfigurationError, match=named):
        load_subscriptions(file)


async def test_closing_twice_is_harmless(open_topic):
    """A topic that was closed may be closed again."""
    topic, _ = await open_topic()

    await topic.close()
    await topic.close()

    assert topic.stats()["in_flight"] == 0
