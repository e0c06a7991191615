import json
import traceback
from datetime import timedelta

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared import telemetry
from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    RateLimitedError,
    RefusedError,
    StaleError,
    UnavailableError,
)
from shared.inbound import LARGEST_PAYLOAD, DeadLetters, RedeliverError, settle
from shared.market.events import BarsIngested
from tests.builders import WALL, a_cloud_event, documents

CANARY = "CANARY7KEY9QX"
SOURCE = "signals_on_bars_ingested"


@pytest.fixture
def wall():
    return StoppedClock(WALL)


@pytest.fixture
async def storage(wall):
    store = documents(wall)
    yield store
    await store.close()


@pytest.fixture
def dead_letters(storage, wall):
    return DeadLetters(storage, wall)


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


async def settled(dead_letters, event, error=None):
    async with settle(event, SOURCE, dead_letters):
        if error is not None:
            raise error


async def buried(dead_letters):
    return [letter.body for letter in await dead_letters.newest(after=None, limit=100)]


class TestDone:
    async def test_success_leaves_no_letter(self, dead_letters):
        """Returning is an acknowledgement, and nothing else happens."""
        await settled(dead_letters, a_cloud_event({"n": 1}))

        assert await buried(dead_letters) == []

    async def test_permanent_trouble_is_buried_and_acknowledged(self, dead_letters):
        """An event that can never succeed is kept with its reason and does not come again."""
        await settled(dead_letters, a_cloud_event({"n": 1}), RefusedError("not here"))

        [letter] = await buried(dead_letters)
        assert letter == {
            "dead_letter_id": letter["dead_letter_id"],
            "source": SOURCE,
            "event_id": "e1",
            "reason": "RefusedError: not here",
            "times": 1,
            "recorded_at": "2026-11-21T09:00:00Z",
            "origin": "function",
            "state": "open",
            "history": [],
            "report": {},
            "digest": letter["digest"],
            "event": {
                "type": "test.happened.v1",
                "source": "/troop/test",
                "subject": "symbols/AAPL",
                "time": "2026-11-21T09:00:00Z",
                "data": {"n": 1},
                "is_whole": True,
            },
        }

    async def test_second_burial_counts(self, dead_letters, wall):
        """The same event twice is one letter that says so, with the newest reason, in its old place."""
        await settled(dead_letters, a_cloud_event({}), RefusedError("first"))
        wall.at += timedelta(hours=1)
        await settled(dead_letters, a_cloud_event({}), RefusedError("second"))

        [letter] = await buried(dead_letters)
        assert (letter["times"], letter["reason"]) == (2, "RefusedError: second")
        assert letter["recorded_at"] == "2026-11-21T09:00:00Z"

    async def test_each_function_keeps_its_own_letter(self, dead_letters):
        """One event can be too much for two functions, which are put right one by one."""
        for source in ("alerts_on_signal_raised", "content_on_signal_raised"):
            async with settle(a_cloud_event({}), source, dead_letters):
                raise RefusedError("no")

        assert {letter["source"] for letter in await buried(dead_letters)} == {
            "alerts_on_signal_raised",
            "content_on_signal_raised",
        }

    async def test_letters_are_listed_newest_first(self, dead_letters, wall):
        """An operator sees what went wrong last, page by page."""
        for n in range(3):
            wall.at += timedelta(seconds=1)
            await settled(dead_letters, a_cloud_event({}, id=f"e{n}"), RefusedError("no"))

        newest = await dead_letters.newest(after=None, limit=2)
        rest = await dead_letters.newest(after=newest[-1].sort, limit=2)

        assert [letter.body["event_id"] for letter in [*newest, *rest]] == ["e2", "e1", "e0"]


class TestPayload:
    @pytest.mark.parametrize("data", ["{not json", None, 7, [], {}, {"symbol": "AAPL"}, {"occurred_at": "yesterday"}])
    async def test_payload_that_is_no_event_is_buried(self, dead_letters, data):
        """Whatever somebody posts to the topic, the function acknowledges it and keeps it."""
        event = a_cloud_event(data, type=BarsIngested.type)

        async with settle(event, SOURCE, dead_letters):
            BarsIngested.from_wire(event.type, event.get_json())

        [letter] = await buried(dead_letters)
        assert letter["reason"].startswith(f"InvalidPayloadError: {BarsIngested.type}: ")
        assert letter["event"]["data"] == data

    @pytest.mark.parametrize("text", ['{"close": NaN}', '{"name": "\\ud800"}', "-Infinity"])
    async def test_payload_storage_cannot_hold_is_kept_as_text(self, dead_letters, text):
        """Python reads more than JSON allows; even that can be buried and looked at."""
        event = a_cloud_event(json.loads(text), id="\udcff", type="\ud800", subject="\ud800")

        await settled(dead_letters, event, InvalidPayloadError("no event"))

        [letter] = await buried(dead_letters)
        assert letter["event"]["data"] == {"unreadable": repr(json.loads(text))}

    async def test_payload_that_cannot_even_be_read_is_buried(self, dead_letters):
        """A letter without contents is still a letter."""

        class Broken:
            id, type, subject, time = "e1", "test.happened.v1", None, None
            extension_attrs = {}  # noqa: RUF012 - read only

            def get_json(self):
                raise ValueError("no JSON")

        await settled(dead_letters, Broken(), InvalidPayloadError("no event"))

        [letter] = await buried(dead_letters)
        assert letter["event"] == {
            "type": "test.happened.v1",
            "source": None,
            "subject": None,
            "time": None,
            "data": None,
            "is_whole": True,
        }

    async def test_huge_payload_is_shortened(self, dead_letters):
        """A letter is read by people and paid by its size."""
        await settled(dead_letters, a_cloud_event({"text": "x" * 1_000_000}), RefusedError("too much"))

        [letter] = await buried(dead_letters)
        assert letter["event"]["data"]["shortened"].startswith("{'text': 'xxx")
        assert len(letter["event"]["data"]["shortened"]) == LARGEST_PAYLOAD

    async def test_secrets_are_taken_out(self, dead_letters, monkeypatch):
        """Neither the payload nor the reason nor any name keeps a secret, known or only recognised."""
        monkeypatch.setattr(telemetry, "_secrets", set())
        monkeypatch.setattr(telemetry, "_guard", {"known": None})
        telemetry.guard([CANARY])
        event = a_cloud_event({"key": CANARY, "url": "https://x?apikey=NEVER-TOLD-7"}, subject=f"s/{CANARY}")

        await settled(dead_letters, event, RefusedError(f"the key {CANARY} is wrong, ?token=NEVER-TOLD-7"))

        letters = json.dumps(await buried(dead_letters))
        assert CANARY not in letters
        assert "NEVER-TOLD-7" not in letters
        assert "RefusedError: the key *** is wrong, ?token=***" in letters
        assert "https://x?apikey=***" in letters


class TestRedelivered:
    @pytest.mark.parametrize(
        "error",
        [
            UnavailableError(f"no answer from {CANARY}"),
            RateLimitedError(f"slow {CANARY}", retry_after=timedelta(seconds=9)),
            StaleError(f"{CANARY} was written"),
            ConfigurationError(f"{CANARY} is wrong"),
            KeyError(CANARY),
            ZeroDivisionError(CANARY),
        ],
        ids=lambda e: type(e).__name__,
    )
    async def test_other_trouble_asks_for_redelivery_without_detail(self, dead_letters, error):
        """The text of what is raised ends in a 500 that Event Grid stores: it names a kind and nothing else."""
        with pytest.raises(RedeliverError) as caught:
            await settled(dead_letters, a_cloud_event({}), error)

        assert CANARY not in "".join(traceback.format_exception(caught.value))
        assert await buried(dead_letters) == []

    async def test_kind_of_trouble_is_named(self, dead_letters):
        """Who reads Event Grid's own log sees whether it was the neighbour, a setting or us."""
        said = []
        for error in (UnavailableError("x"), ConfigurationError("x"), KeyError("x")):
            with pytest.raises(RedeliverError) as caught:
                await settled(dead_letters, a_cloud_event({}), error)
            said.append(str(caught.value))

        assert said == ["UnavailableError", "ConfigurationError", "unexpected trouble: the log has it"]

    async def test_letter_that_cannot_be_stored_asks_for_redelivery(self, dead_letters, monkeypatch):
        """An event is never acknowledged before its letter is safe."""

        async def down(*_):
            raise UnavailableError(f"{CANARY} stayed locked")

        monkeypatch.setattr(dead_letters._documents, "create", down)

        with pytest.raises(RedeliverError, match=r"^UnavailableError$") as caught:
            await settled(dead_letters, a_cloud_event({}), RefusedError("no"))

        assert CANARY not in "".join(traceback.format_exception(caught.value))

    async def test_buried_twice_at_once_is_buried(self, dead_letters, monkeypatch):
        """Two instances burying the same event do not make each other fail."""
        await settled(dead_letters, a_cloud_event({}), RefusedError("no"))

        async def beaten(*_):
            raise StaleError("the twin was faster")

        monkeypatch.setattr(dead_letters._documents, "replace", beaten)

        await settled(dead_letters, a_cloud_event({}), RefusedError("no"))

        assert len(await buried(dead_letters)) == 1


class TestSameIdOtherPayload:
    async def test_another_payload_is_kept_beside_the_first(self, dead_letters):
        """Two events that share an id are two letters: neither is lost, each counts for itself."""
        for n in (1, 2, 2):
            await settled(dead_letters, a_cloud_event({"n": n}), RefusedError("no"))

        letters = await buried(dead_letters)
        assert sorted((one["event"]["data"]["n"], one["times"]) for one in letters) == [(1, 1), (2, 2)]

    async def test_another_payload_after_the_first_was_done_is_kept_and_said_aloud(self, dead_letters, caplog):
        """One of the two is not what it says: a person must look, and can."""
        await settled(dead_letters, a_cloud_event({"n": 1}))
        await settled(dead_letters, a_cloud_event({"n": 2}))

        [letter] = await buried(dead_letters)
        assert letter["event"]["data"] == {"n": 2}
        assert letter["reason"] == "InvalidPayloadError: another payload came under this id before"

    async def test_an_event_told_again_is_the_same_event(self, dead_letters):
        """When it was told is no part of what it says; nor does another function's event count."""
        await settled(dead_letters, a_cloud_event({"n": 1, "recorded_at": "2026-11-21T09:00:00Z"}))
        await settled(dead_letters, a_cloud_event({"recorded_at": "2026-11-21T10:00:00Z", "n": 1}))
        async with settle(a_cloud_event({"n": 2}), "another_function", dead_letters):
            pass

        assert await buried(dead_letters) == []


class TestUnpublished:
    async def test_an_event_the_topic_refuses_for_good_is_kept(self, dead_letters):
        """It is seen where every other trouble is seen, under the domain whose event it is."""
        event = BarsIngested(
            occurred_at=WALL, recorded_at=WALL, symbol="AAPL", interval="1d", revision=0,
            first_closed_at=WALL, last_closed_at=WALL, count=1,
        )  # fmt: skip

        await dead_letters.bury_unpublished("market", event, "the event topic refused an event (413)")

        [letter] = await buried(dead_letters)
        assert (letter["source"], letter["origin"], letter["event_id"]) == ("market", "outbox", event.event_id)
        assert letter["event"]["data"] == event.to_wire()["data"]


class TestTrace:
    async def test_span_continues_the_events_trace(self, dead_letters, spans):
        """What the publisher began goes on in the function."""
        traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

        await settled(dead_letters, a_cloud_event({}, traceparent=traceparent))

        [done] = spans()
        assert done.name == SOURCE
        assert f"{done.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
        assert done.attributes["troop.event_id"] == "e1"

    @pytest.mark.parametrize(
        ("error", "is_news"),
        [
            (UnavailableError("503"), False),
            (StaleError("again"), False),
            (ConfigurationError("key"), True),
            (KeyError("k"), True),
        ],
        ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
    )
    async def test_redelivery_for_what_passes_is_no_error(self, dead_letters, spans, error, is_news):
        """A function that asks for redelivery because somebody else was slow has not failed."""
        with pytest.raises(RedeliverError):
            await settled(dead_letters, a_cloud_event({}), error)

        [done] = spans()
        assert (done.status.status_code is trace.StatusCode.ERROR) is is_news
