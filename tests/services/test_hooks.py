import asyncio
import json
import logging
from contextlib import suppress
from datetime import timedelta

import pytest
from pydantic import SecretStr

from shared.clock import StoppedClock
from shared.errors import ConfigurationError, NotFoundError, RefusedError, UnavailableError
from shared.inbound import DeadLetters
from shared.market import hooks
from shared.market.hooks import (
    COUNTED_EVERY,
    HEADER,
    KEPT,
    LARGEST,
    PARTITION,
    SWEEP_AFTER,
    FinnhubHook,
    Outcome,
    WrongSecretError,
)
from shared.outbox import Outbox
from tests.builders import CLOSE, WALL, MemoryPublisher, documents

SECRET = "a-secret-that-nobody-shall-see"
ROW = {
    "date": "2012-04-24",
    "eps_actual": 12.3,
    "eps_estimate": 10.04,
    "revenue_actual": 39186000000,
    "revenue_estimate": None,
    "symbol": "AAPL",
}


def a_body(*rows, event="earnings"):
    return json.dumps({"event": event, "data": list(rows or [ROW])}).encode()


class Hook:
    """The webhook over one store, its clocks and the topic in our hands."""

    def __init__(self, store, *, secret=SECRET):
        self.store = store
        self.wall, self.market = StoppedClock(WALL), StoppedClock(CLOSE)
        self.publisher = MemoryPublisher()
        self.secret = secret
        self.hook = self.another()

    def another(self):
        """The webhook in another process on the same store."""
        return FinnhubHook(self.store, self.publisher, self.wall, self.market, SecretStr(self.secret))

    async def receive(self, body, secret=SECRET):
        return await self.hook.receive(secret, body)

    async def stored(self):
        return await self.store.page("system", PARTITION)

    @property
    def told(self):
        return [(e.symbol, e.event_id) for e in self.publisher.published]


@pytest.fixture
async def store():
    store = documents()
    yield store
    await store.close()


@pytest.fixture
def hook(store):
    return Hook(store)


class TestTaking:
    async def test_report_is_stored_and_told(self, hook):
        """The body is kept as it came, the event says what it says, and nothing is owed any more."""
        received = await hook.receive(a_body())

        assert (received.outcome, received.reports) == (Outcome.TAKEN, 1)
        [document] = await hook.stored()
        assert json.loads(document.body["text"]) == {"event": "earnings", "data": [ROW]}
        assert (document.due_at, document.expires_at) == (None, WALL + KEPT)
        [event] = hook.publisher.published
        assert (event.symbol, str(event.day), event.eps_actual, event.revenue_estimate) == (
            "AAPL",
            "2012-04-24",
            12.3,
            None,
        )
        assert (event.occurred_at, event.recorded_at, event.provider) == (CLOSE, WALL, "finnhub")
        assert event.subject == "symbols/AAPL"
        assert await hook.hook.counts() == {"taken": 1}

    async def test_stored_before_it_is_told(self, hook, monkeypatch):
        """Whoever dies between the two leaves a document that owes its event."""
        seen = []

        async def look(events):
            seen.extend(await hook.stored())

        monkeypatch.setattr(hook.publisher, "publish", look)
        await hook.receive(a_body())
        assert [d.due_at for d in seen] == [WALL + SWEEP_AFTER]

    async def test_same_content_is_the_same_report(self, hook):
        """In whatever order and spelling it comes, and whenever: one document, told once."""
        first, second = ROW, {**ROW, "symbol": "IBM"}
        await hook.receive(a_body(first, second))
        hook.wall.at += timedelta(days=3)
        hook.market.at += timedelta(days=3)
        again = json.dumps({"data": [dict(reversed(second.items())), first, first], "event": "earnings"}, indent=2)

        received = await hook.another().receive(SECRET, again.encode())

        assert received.outcome is Outcome.REPEATED
        assert len(await hook.stored()) == 1
        assert [symbol for symbol, _ in hook.told] == ["AAPL", "IBM"]
        assert await hook.hook.counts() == {"taken": 1, "repeated": 1}

    @pytest.mark.parametrize("changed", ["eps_actual", "eps_estimate", "revenue_actual", "date", "symbol"])
    async def test_corrected_report_is_another_event(self, hook, changed):
        """A number that was wrong at first comes again and is told again."""
        await hook.receive(a_body())
        other = {"date": "2012-04-25", "symbol": "IBM"}.get(changed, 7)
        await hook.receive(a_body({**ROW, changed: other}))
        assert len({event_id for _, event_id in hook.told}) == 2

    async def test_at_once_in_two_instances(self, hook):
        """Both are acknowledged; the event has one id."""
        both = await asyncio.gather(hook.hook.receive(SECRET, a_body()), hook.another().receive(SECRET, a_body()))
        assert sorted(r.outcome for r in both) == [Outcome.REPEATED, Outcome.TAKEN]
        assert len(await hook.stored()) == 1
        assert len({event_id for _, event_id in hook.told}) == 1
        assert (await hook.stored())[0].due_at is None

    async def test_rows_that_cannot_be_read_are_left_out_and_counted(self, hook):
        """The others are told."""
        rows = [{**ROW, "symbol": "NO SYMBOL"}, {**ROW, "date": "soon"}, {"symbol": "IBM"}, {}, ROW]
        rows.append({**ROW, "symbol": "IBM", "eps_actual": "1e999"})

        received = await hook.receive(a_body(*rows))

        assert received.reports == 1
        assert [symbol for symbol, _ in hook.told] == ["AAPL"]
        assert await hook.hook.counts() == {"taken": 1, "rows_refused": 5}


BAD = {
    "test button": b"This is a test of your webhook.",
    "nothing": b"",
    "no JSON": b'{"event": "earnings", "data": [',
    "no UTF-8": b'\xff\xfe{"event"',
    "a list": b"[]",
    "null": b"null",
    "another event": a_body(event="dividends"),
    "no event": b'{"data": []}',
    "no rows": b'{"event": "earnings", "data": []}',
    "rows that are none": b'{"event": "earnings", "data": [1, "two", null]}',
    "one row, no list": json.dumps({"event": "earnings", "data": ROW}).encode(),
    "no readable row": a_body({"symbol": "AAPL"}),
    "deep": b"[" * 100_000,
    "too large": a_body(*[ROW] * (LARGEST // 100)),
    "half a surrogate": b'{"event": "earnings", "data": [{"symbol": "\\ud800", "date": "2012-04-24"}]}',
    "not a number": b'{"event": "earnings", "data": [{"symbol": "AAPL", "date": "2012-04-24", "eps_actual": NaN}]}',
}


class TestDropping:
    @pytest.mark.parametrize("body", BAD.values(), ids=BAD)
    async def test_bad_body_is_acknowledged_and_counted(self, hook, body):
        """A webhook whose answers are refusals is switched off by its sender; nothing of it is stored or told."""
        received = await hook.receive(body)

        assert received.outcome is Outcome.DROPPED
        assert received.reason
        assert await hook.stored() == []
        assert hook.told == []
        assert await hook.hook.counts() == {"dropped": 1}

    async def test_reason_shows_nothing_of_the_body(self, hook, caplog):
        """A test button may send anything, the secret included."""
        caplog.set_level(logging.DEBUG)
        body = json.dumps({"event": SECRET, SECRET: 1, "data": SECRET})
        received = await hook.receive(body.encode())
        assert SECRET not in f"{received} {caplog.text}"


class TestSecret:
    @pytest.mark.parametrize(
        "secret", [None, "", "x", SECRET[:-1], SECRET + "x", SECRET.upper(), "é", "\udc80", f" {SECRET}"]
    )
    async def test_stranger_is_refused_and_counted(self, hook, secret):
        """Nothing but the very secret opens it."""
        with pytest.raises(WrongSecretError, match=HEADER):
            await hook.receive(a_body(), secret)

        assert await hook.stored() == []
        assert hook.told == []
        assert await hook.hook.counts() == {"strangers": 1}

    @pytest.mark.parametrize("secret", [None, "", "x"])
    async def test_without_a_secret_there_is_no_webhook(self, store, secret):
        """An empty setting lets nobody in, whatever they show; the text says what to set."""
        off = Hook(store, secret="")
        with pytest.raises(NotFoundError, match="FINNHUB_WEBHOOK_SECRET"):
            await off.receive(a_body(), secret)
        assert await off.hook.sweep() == 0

    async def test_strangers_do_not_make_us_write(self, hook):
        """A hundred calls are one write; the rest is counted with the next one or by the sweep."""
        for _ in range(100):
            with pytest.raises(WrongSecretError):
                await hook.receive(a_body(), "guessed")
        assert await hook.hook.counts() == {"strangers": 1}

        hook.wall.at += COUNTED_EVERY
        await hook.hook.sweep()
        assert await hook.hook.counts() == {"strangers": 100}

    async def test_comparison_takes_the_same_time(self, monkeypatch, hook):
        """It is left to the function that is made for it, over values of one length."""
        compared = []
        compare = hooks.hmac.compare_digest
        monkeypatch.setattr(hooks.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
        for secret in ("x", SECRET):
            with suppress(WrongSecretError):
                await hook.receive(a_body(), secret)
        assert len(compared) == 2
        assert {len(value) for pair in compared for value in pair} == {32}

    async def test_secret_is_never_kept(self, hook, caplog):
        """In no document and in no line of a log."""
        caplog.set_level(logging.DEBUG)
        await hook.receive(a_body())
        with pytest.raises(WrongSecretError):
            await hook.receive(a_body(), SECRET + "!")
        kept = [d.body for container in ("system", "quota") for d in await hook.store.feed(container)]
        assert SECRET not in json.dumps(kept)
        assert SECRET not in caplog.text


class TestOwing:
    async def test_topic_that_is_down_is_told_by_the_sweep(self, hook):
        """The report is acknowledged, because it is stored; its event comes as soon as the topic takes it."""
        hook.publisher.failing_with = UnavailableError("the topic answered 503")
        received = await hook.receive(a_body())
        assert received.outcome is Outcome.TAKEN
        assert hook.told == []

        assert await hook.hook.sweep() == 0, "the handler may still be at it"
        hook.wall.at += SWEEP_AFTER
        assert await hook.another().sweep() == 0
        hook.publisher.failing_with = None
        hook.market.at += timedelta(days=1)
        assert await hook.another().sweep() == 1
        assert await hook.another().sweep() == 0

        [event] = hook.publisher.published
        assert (event.occurred_at, event.recorded_at) == (CLOSE, WALL), "it is as old as it is"

    async def test_repetition_tells_what_is_owed(self, hook):
        """The sender's next try is as good as a sweep."""
        hook.publisher.failing_with = ConfigurationError("the topic's key is wrong")
        await hook.receive(a_body())
        hook.publisher.failing_with = None

        assert (await hook.receive(a_body())).outcome is Outcome.REPEATED
        assert len(hook.told) == 1
        hook.wall.at += SWEEP_AFTER
        assert await hook.hook.sweep() == 0

    async def test_slow_topic_does_not_keep_the_sender_waiting(self, hook, monkeypatch):
        """It is acknowledged in time, and told by the sweep."""
        monkeypatch.setattr(hooks, "PATIENCE", timedelta(milliseconds=1))
        publish = hook.publisher.publish

        async def slow(events):
            await asyncio.Event().wait()

        monkeypatch.setattr(hook.publisher, "publish", slow)
        assert (await hook.receive(a_body())).outcome is Outcome.TAKEN
        monkeypatch.setattr(hook.publisher, "publish", publish)
        hook.wall.at += SWEEP_AFTER
        assert await hook.hook.sweep() == 1

    async def test_event_the_topic_refuses_holds_up_no_other(self, hook):
        """It is kept as a dead letter of the market with the reason, and tried no more."""
        letters = DeadLetters(hook.store, hook.wall)
        topic, hook.publisher = hook.publisher, Outbox(hook.publisher, letters, "market")
        topic.failing_with = RefusedError("too large for the topic")
        assert (await hook.another().receive(SECRET, a_body())).outcome is Outcome.TAKEN
        [document] = await hook.stored()
        assert document.due_at is None
        topic.failing_with = None
        hook.wall.at += SWEEP_AFTER
        assert await hook.another().sweep() == 0
        [letter] = await letters.newest(after=None, limit=10)
        assert (letter.partition, letter.body["origin"]) == ("market", "outbox")
        assert "too large for the topic" in letter.body["reason"]

    async def test_body_that_cannot_be_stored_is_not_acknowledged(self, hook, monkeypatch):
        """Then the sender shall come again."""

        async def down(container, document):
            raise UnavailableError("storage is down")

        monkeypatch.setattr(hook.store, "create", down)
        with pytest.raises(UnavailableError):
            await hook.receive(a_body())
        assert hook.told == []

    async def test_counter_in_trouble_is_nobodys_trouble(self, hook, monkeypatch):
        """What cannot be counted is still taken, dropped or refused."""

        async def down(*_, **__):
            raise UnavailableError("storage is down")

        monkeypatch.setattr(hooks, "changed", down)
        assert (await hook.receive(a_body())).outcome is Outcome.TAKEN
        assert (await hook.receive(b"")).outcome is Outcome.DROPPED
        with pytest.raises(WrongSecretError):
            await hook.receive(a_body(), "guessed")
