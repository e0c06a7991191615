"""
An Event Grid custom topic: what it has accepted it delivers to the app's functions, at least once.

It speaks what ``EventGridPublisherClient`` speaks, keeps Event Grid's retry schedule (the waits can be
scaled), buries what cannot be delivered, and keeps its promises over a kill -9: a delivery stands in SQLite
before the publisher hears 200, and leaves it after the function has answered.

What it buries it offers as Event Grid does: blobs in a container, ``FUNCTION/2026/11/21/9/<id>.json``, each an array of
the event with what the topic says of it, which the app lists, reads and deletes over HTTP.
"""

import asyncio
import json
import logging
import re
import sqlite3
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hmac import compare_digest
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID, uuid4
from xml.sax.saxutils import escape

import aiohttp
from aiohttp import web
from yarl import URL

from infra.local.faults import Switchboard, problem
from shared.clock import Clock, SystemClock, format_instant
from shared.errors import ConfigurationError

log = logging.getLogger(__name__)

API_VERSION = "2018-01-01"
MAX_BYTES = 1_048_576
ACKNOWLEDGED = frozenset({200, 201, 202, 203, 204})
NEVER_RETRIED = frozenset({400, 403, 413})

# Seconds to wait after the first, second, ... attempt; the last one repeats.
SCHEDULE = (10, 30, 60, 300, 600, 1_800, 3_600, 10_800, 21_600, 43_200)
# No sooner than this after such an answer (401 and 404: the app may still be starting).
PATIENCE = {401: 300, 404: 300, 408: 120, 503: 30}

BLOBS = "/topic/deadletters"
"""The container that dead letters lie in."""
MOST_BLOBS = 5000

OUTCOMES = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    408: "TimedOut",
    413: "PayloadTooLarge",
    503: "Busy",
}

_ATTRIBUTE = re.compile(r"[a-z0-9]+|data_base64")
_TABLES = """
CREATE TABLE IF NOT EXISTS topic_deliveries (
    id INTEGER PRIMARY KEY, function TEXT NOT NULL, event_id TEXT NOT NULL, event_type TEXT NOT NULL,
    body BLOB NOT NULL, accepted_at REAL NOT NULL, expires_at REAL NOT NULL, due_at REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS topic_dead_letters (
    id INTEGER PRIMARY KEY, function TEXT NOT NULL, event_id TEXT NOT NULL, event_type TEXT NOT NULL,
    body BLOB NOT NULL, accepted_at REAL NOT NULL, buried_at REAL NOT NULL, reason TEXT NOT NULL,
    attempts INTEGER NOT NULL, last_outcome TEXT NOT NULL, last_status INTEGER, last_answer TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS topic_collected (id INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS topic_alive (id INTEGER PRIMARY KEY CHECK (id = 1), at REAL NOT NULL);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """Which events one function hears, and how long the topic tries."""

    function: str
    event_types: frozenset[str]
    max_attempts: int = 30
    time_to_live: timedelta = timedelta(days=1)
    dead_letter: bool = True

    def __post_init__(self) -> None:
        if not self.event_types:
            raise ConfigurationError(f"subscription of {self.function}: event_types is empty")
        if not 1 <= self.max_attempts <= 30:
            raise ConfigurationError(f"subscription of {self.function}: max_attempts must be 1 to 30")
        if not timedelta(minutes=1) <= self.time_to_live <= timedelta(days=1):
            raise ConfigurationError(f"subscription of {self.function}: ttl_minutes must be 1 to 1440")


def load_subscriptions(path: Path) -> tuple[Subscription, ...]:
    """
    Read ``subscriptions.toml``.

    Raises:
        ConfigurationError: it is missing or wrong; the text names the file and the row.

    """
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("subscription", [])
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise ConfigurationError(f"{path}: {e}") from e
    found = tuple(_subscription(path, number, row) for number, row in enumerate(rows, start=1))
    functions = [s.function for s in found]
    for function in functions:
        if functions.count(function) > 1:
            raise ConfigurationError(f"{path}: {function} is subscribed twice; list its event_types in one row")
    return found


def _subscription(path: Path, number: int, row: dict[str, Any]) -> Subscription:
    known = {"function", "event_types", "max_attempts", "ttl_minutes", "dead_letter"}
    if unknown := row.keys() - known:
        raise ConfigurationError(f"{path}: row {number} has unknown {', '.join(sorted(unknown))}")
    try:
        return Subscription(
            function=row["function"],
            event_types=frozenset(row["event_types"]),
            max_attempts=row.get("max_attempts", 30),
            time_to_live=timedelta(minutes=row.get("ttl_minutes", 1440)),
            dead_letter=row.get("dead_letter", True),
        )
    except KeyError as e:
        raise ConfigurationError(f"{path}: row {number} has no {e.args[0]}") from e


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast the topic works: waits are scaled, the time a function has to answer is not."""

    time_scale: float = 0.02
    parallel: int = 64
    response_timeout: float = 30.0
    connect_timeout: float = 5.0
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class _Delivery:
    subscription: Subscription
    event_id: str
    event_type: str
    body: bytes
    accepted_at: float
    expires_at: float
    id: int = 0
    attempts: int = 0
    is_twin: bool = False


@dataclass(slots=True, kw_only=True)
class _Lane:
    """The deliveries of one subscription: a slow function holds up nobody else."""

    url: URL
    waiting: deque[_Delivery] = field(default_factory=deque)
    in_flight: int = 0
    pending: int = 0
    delivered: int = 0
    retried: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    name: str
    status: int | None = None
    answer: str = ""


class Topic:
    """The topic: a front door for publishers, and a patient postman behind it."""

    def __init__(
        self,
        state: sqlite3.Connection,
        subscriptions: Sequence[Subscription],
        app_url: str,
        system_key: str,
        *,
        key: str,
        pace: Pace | None = None,
        faults: Switchboard | None = None,
        clock: Clock | None = None,
        remember: int = 1000,
    ) -> None:
        self._state = state
        self._key = key
        self._pace = pace or Pace()
        self._faults = faults or Switchboard()
        self._clock = clock or SystemClock()
        self._dice = Random(self._pace.seed)  # noqa: S311 - jitter, no secret
        self._by_type: dict[str, list[Subscription]] = {}
        self._lanes: dict[str, _Lane] = {}
        self._subscriptions = {s.function: s for s in subscriptions}
        hook = URL(app_url) / "runtime/webhooks/EventGrid"
        for subscription in subscriptions:
            name = subscription.function
            self._lanes[name] = _Lane(url=hook.with_query(functionName=name, code=system_key))
            for event_type in subscription.event_types:
                self._by_type.setdefault(event_type, []).append(subscription)
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._done: list[int] = []
        self._accepted = 0
        self._unmatched = 0
        self._dropped = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=remember)
        self._log: deque[dict[str, Any]] = deque(maxlen=remember)
        state.executescript(_TABLES)
        [[self._dead]] = state.execute("SELECT count(*) FROM topic_dead_letters")

    def routes(self) -> list[web.AbstractRouteDef]:
        """Where publishers post, and where people look."""
        return [
            web.post("/topic/api/events", self._accept),
            web.post("/api/events", self._accept),
            web.get("/topic/dead_letters", self._show_dead_letters),
            web.get("/topic/recent", self._show_recent),
            web.get(BLOBS, self._list_blobs),
            web.get(f"{BLOBS}/{{name:.+}}", self._read_blob),
            web.delete(f"{BLOBS}/{{name:.+}}", self._delete_blob),
        ]

    async def start(self) -> None:
        """Begin to deliver; what an earlier process left unfinished goes first."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=self._pace.response_timeout, sock_connect=self._pace.connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )
        now = self._now()
        self._forgive_downtime(now)
        for row in self._state.execute(
            "SELECT id, function, event_id, event_type, body, accepted_at, expires_at, attempts, due_at"
            " FROM topic_deliveries ORDER BY id"
        ).fetchall():
            self._resume(row, now)
        self._spawn(self._stay_alive())

    async def close(self) -> None:
        """Stop; whatever was under way is delivered again after the next start."""
        session, self._session = self._session, None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._settle()
        if session is not None:
            await session.close()

    def stats(self, latest: int = 20) -> dict[str, Any]:
        """Counts since the start (``dead`` and ``pending`` since ever) and the last deliveries, newest first."""
        lanes = self._lanes
        return {
            "accepted": self._accepted,
            "unmatched": self._unmatched,
            "delivered": sum(lane.delivered for lane in lanes.values()),
            "retried": sum(lane.retried for lane in lanes.values()),
            "dead": self._dead,
            "dropped": self._dropped,
            "pending": sum(lane.pending for lane in lanes.values()),
            "in_flight": sum(lane.in_flight for lane in lanes.values()),
            "functions": {
                name: {"delivered": lane.delivered, "retried": lane.retried, "pending": lane.pending}
                for name, lane in lanes.items()
            },
            "latest": list(self._log)[: -latest - 1 : -1] if latest else [],
        }

    def dead_letters(self, limit: int = 100) -> list[dict[str, Any]]:
        """What could not be delivered, newest first, with the reason."""
        rows = self._state.execute(
            "SELECT id, function, event_id, event_type, body, accepted_at, buried_at, reason, attempts,"
            " last_outcome, last_status, last_answer FROM topic_dead_letters ORDER BY id DESC LIMIT ?",
            (limit,),
        )
        return [
            {
                "dead_letter_id": row[0],
                "function": row[1],
                "event_id": row[2],
                "event_type": row[3],
                "event": json.loads(row[4]),
                "accepted_at": _instant(row[5]),
                "buried_at": _instant(row[6]),
                "reason": row[7],
                "attempts": row[8],
                "last_outcome": row[9],
                "last_status": row[10],
                "last_answer": row[11],
            }
            for row in rows
        ]

    def recent(self, n: int) -> list[dict[str, Any]]:
        """The last accepted events with the wall instant of their arrival, newest first."""
        return list(self._recent)[: -n - 1 : -1] if n > 0 else []

    # --- the front door

    async def _accept(self, request: web.Request) -> web.Response:
        try:
            self._admit(request)
            events = _read_events(await _read_body(request))
            deliveries = self._keep(events)
        except _RefusedError as e:
            return _refusal(e.status, e.code, str(e))
        except sqlite3.Error as e:
            log.exception("topic.unavailable")
            return _refusal(503, "ServiceUnavailable", f"the events could not be stored: {e}")
        for delivery in deliveries:
            self._send_out(delivery)
        return web.Response(status=200)

    def _admit(self, request: web.Request) -> None:
        if not compare_digest(request.headers.get("aeg-sas-key", "").encode(), self._key.encode()):
            raise _RefusedError(401, "Unauthorized", "the header aeg-sas-key does not hold this topic's key")
        version = request.query.get("api-version", API_VERSION)
        if version != API_VERSION:
            raise _RefusedError(400, "UnsupportedApiVersion", f"api-version {version} is not {API_VERSION}")

    def _keep(self, events: list[dict[str, Any]]) -> list[_Delivery]:
        now = self._now()
        deliveries = []
        with _transaction(self._state):
            for event in events:
                body = json.dumps(event, separators=(",", ":")).encode()
                for subscription in self._by_type.get(event["type"], ()):
                    life = subscription.time_to_live.total_seconds() * self._pace.time_scale
                    delivery = _Delivery(
                        subscription=subscription,
                        event_id=event["id"],
                        event_type=event["type"],
                        body=body,
                        accepted_at=now,
                        expires_at=now + life,
                    )
                    self._store(delivery)
                    deliveries.append(delivery)
        received_at = _instant(now)
        for event in events:
            self._recent.append({"received_at": received_at, "event": event})
            self._unmatched += event["type"] not in self._by_type
        self._accepted += len(events)
        return deliveries

    def _store(self, new: _Delivery) -> None:
        function = new.subscription.function
        row = self._state.execute(
            "INSERT INTO topic_deliveries"
            " (function, event_id, event_type, body, accepted_at, expires_at, due_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (function, new.event_id, new.event_type, new.body, new.accepted_at, new.expires_at, new.accepted_at),
        )
        new.id = row.lastrowid or 0

    # --- the postman

    def _send_out(self, delivery: _Delivery) -> None:
        self._lane(delivery).pending += 1
        fault = self._faults.topic
        twins = [replace(delivery, is_twin=True) for _ in range(fault.duplicate - 1)]
        for copy in (delivery, *twins):
            if copy.is_twin:
                self._faults.strikes("topic.duplicate", 1)
            self._queue(copy, self._faults.up_to(fault.reorder_ms / 1000) if fault.reorder_ms else 0.0)

    def _queue(self, delivery: _Delivery, wait: float) -> None:
        if wait > 0:
            asyncio.get_running_loop().call_later(wait, self._queue, delivery, 0.0)
            return
        lane = self._lane(delivery)
        lane.waiting.append(delivery)
        self._pump(lane)

    def _pump(self, lane: _Lane) -> None:
        while lane.waiting and lane.in_flight < self._pace.parallel and self._session is not None:
            lane.in_flight += 1
            self._spawn(self._carry(self._session, lane, lane.waiting.popleft()))

    async def _carry(self, session: aiohttp.ClientSession, lane: _Lane, delivery: _Delivery) -> None:
        try:
            if self._now() >= delivery.expires_at:
                self._bury(delivery, "TimeToLiveExceeded", _Outcome(name="Expired"))
            else:
                outcome = await self._attempt(session, lane, delivery)
                self._conclude(lane, delivery, outcome)
        finally:
            lane.in_flight -= 1
            self._pump(lane)

    async def _attempt(self, session: aiohttp.ClientSession, lane: _Lane, delivery: _Delivery) -> _Outcome:
        headers = {
            "Content-Type": "application/cloudevents+json; charset=utf-8",
            "aeg-event-type": "Notification",
            "aeg-subscription-name": delivery.subscription.function.upper(),
            "aeg-delivery-count": str(delivery.attempts),
            "aeg-metadata-version": "1",
            "aeg-data-version": "",
            "aeg-output-event-id": str(uuid4()),
        }
        try:
            async with session.post(lane.url, data=delivery.body, headers=headers, allow_redirects=False) as answer:
                if answer.status in ACKNOWLEDGED:
                    outcome = _Outcome(name="Delivered", status=answer.status)
                else:
                    said = (await answer.content.read(400)).decode(errors="replace")
                    name = OUTCOMES.get(answer.status, "GenericError")
                    outcome = _Outcome(name=name, status=answer.status, answer=said)
        except TimeoutError:
            return _Outcome(name="TimedOut", answer=f"no answer in {self._pace.response_timeout:g} s")
        except (aiohttp.ClientError, OSError) as e:
            return _Outcome(name="SocketError", answer=str(e) or type(e).__name__)
        if self._faults.strikes("topic.drop_answer", self._faults.topic.drop_answer):
            return _Outcome(name="TimedOut", answer="fault: the answer was dropped")
        return outcome

    def _conclude(self, lane: _Lane, delivery: _Delivery, outcome: _Outcome) -> None:
        delivery.attempts += 1
        self._note(delivery, outcome)
        if delivery.is_twin:
            return
        if outcome.name == "Delivered":
            lane.delivered += 1
            lane.pending -= 1
            self._done.append(delivery.id)
            if len(self._done) == 1:
                asyncio.get_running_loop().call_later(0.05, self._settle)
        elif outcome.status in NEVER_RETRIED:
            self._bury(delivery, "Undeliverable", outcome)
        elif delivery.attempts >= delivery.subscription.max_attempts:
            self._bury(delivery, "MaxDeliveryAttemptsExceeded", outcome)
        else:
            lane.retried += 1
            wait = self._wait_after(delivery.attempts, outcome.status)
            self._queue(delivery, wait)
            self._state.execute(
                "UPDATE topic_deliveries SET attempts = ?, due_at = ? WHERE id = ?",
                (delivery.attempts, self._now() + wait, delivery.id),
            )

    def _wait_after(self, attempts: int, status: int | None) -> float:
        planned = SCHEDULE[min(attempts, len(SCHEDULE)) - 1]
        seconds = max(planned, PATIENCE.get(status or 0, 0))
        return seconds * self._dice.uniform(1.0, 1.1) * self._pace.time_scale

    def _bury(self, delivery: _Delivery, reason: str, outcome: _Outcome) -> None:
        if delivery.is_twin:
            return
        self._lane(delivery).pending -= 1
        self._inter(delivery, reason, outcome)

    def _inter(self, delivery: _Delivery, reason: str, outcome: _Outcome) -> None:
        fields = {"event_id": delivery.event_id, "function": delivery.subscription.function, "reason": reason}
        log.warning("event.buried", extra=fields)
        with _transaction(self._state):
            self._state.execute("DELETE FROM topic_deliveries WHERE id = ?", (delivery.id,))
            if not delivery.subscription.dead_letter:
                self._dropped += 1
                return
            self._dead += 1
            self._state.execute(
                "INSERT INTO topic_dead_letters (function, event_id, event_type, body, accepted_at,"
                " buried_at, reason, attempts, last_outcome, last_status, last_answer)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    delivery.subscription.function,
                    delivery.event_id,
                    delivery.event_type,
                    delivery.body,
                    delivery.accepted_at,
                    self._now(),
                    reason,
                    delivery.attempts,
                    outcome.name,
                    outcome.status,
                    outcome.answer,
                ),
            )

    def _note(self, delivery: _Delivery, outcome: _Outcome) -> None:
        now = self._now()
        self._log.append(
            {
                "at": _instant(now),
                "event_id": delivery.event_id,
                "event_type": delivery.event_type,
                "function": delivery.subscription.function,
                "attempt": delivery.attempts,
                "outcome": outcome.name,
                "status": outcome.status,
                "is_twin": delivery.is_twin,
                "since_accepted_ms": round((now - delivery.accepted_at) * 1000, 3),
            }
        )

    def _settle(self) -> None:
        # Late and in bulk: a delivery forgotten here by a kill is only delivered once more.
        done, self._done = self._done, []
        if done:
            with _transaction(self._state):
                self._state.executemany("DELETE FROM topic_deliveries WHERE id = ?", ((i,) for i in done))

    # --- over restarts

    def _forgive_downtime(self, now: float) -> None:
        # Event Grid is never down, so its time to live cannot pass while nobody could deliver.
        for (alive_at,) in self._state.execute("SELECT at FROM topic_alive").fetchall():
            self._state.execute(
                "UPDATE topic_deliveries SET expires_at = expires_at + max(0, ? - max(?, accepted_at))",
                (now, alive_at),
            )

    def _resume(self, row: tuple[Any, ...], now: float) -> None:
        function = row[1]
        subscription = self._subscriptions.get(function)
        delivery = _Delivery(
            id=row[0],
            subscription=subscription or Subscription(function=function, event_types=frozenset({row[3]})),
            event_id=row[2],
            event_type=row[3],
            body=row[4],
            accepted_at=row[5],
            expires_at=row[6],
            attempts=row[7],
        )
        if subscription is None:
            self._inter(delivery, "SubscriptionDeleted", _Outcome(name="Undelivered"))
            return
        self._lane(delivery).pending += 1
        self._queue(delivery, row[8] - now)

    async def _stay_alive(self) -> None:
        while True:
            self._state.execute("INSERT OR REPLACE INTO topic_alive VALUES (1, ?)", (self._now(),))
            await asyncio.sleep(1)

    # --- small things

    async def _show_dead_letters(self, request: web.Request) -> web.Response:
        return web.json_response({"items": self.dead_letters(), "count": self._dead})

    async def _list_blobs(self, request: web.Request) -> web.Response:
        wanted = request.query.get("maxresults", str(MOST_BLOBS))
        if request.query.get("comp") != "list" or not wanted.isdecimal():
            return problem(400, "ask for ?restype=container&comp=list, with a whole number as maxresults")
        rows = self._state.execute(
            "SELECT id, function, buried_at FROM topic_dead_letters"
            " WHERE id NOT IN (SELECT id FROM topic_collected) ORDER BY id LIMIT ?",
            (min(int(wanted), MOST_BLOBS),),
        )
        blobs = "".join(f"<Blob><Name>{escape(_blob_name(*row))}</Name></Blob>" for row in rows)
        xml = f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>{blobs}</Blobs></EnumerationResults>'
        return web.Response(text=xml, content_type="application/xml")

    async def _read_blob(self, request: web.Request) -> web.Response:
        row = self._blob(request.match_info["name"])
        if row is None:
            return problem(404, "there is no such blob")
        _, _, _, body, reason, attempts, outcome, accepted_at = row
        said = {
            "deadletterreason": reason,
            "deliveryattempts": attempts,
            "lastdeliveryoutcome": outcome,
            "publishtime": _instant(accepted_at),
        }
        return web.json_response([json.loads(body) | said])

    async def _delete_blob(self, request: web.Request) -> web.Response:
        row = self._blob(request.match_info["name"])
        if row is None:
            return problem(404, "there is no such blob")
        # The letter itself stays for who looks at the topic; it is only offered no more.
        self._state.execute("INSERT OR IGNORE INTO topic_collected VALUES (?)", (row[0],))
        return web.Response(status=202)

    def _blob(self, name: str) -> tuple[Any, ...] | None:
        """The dead letter of a blob that was not deleted."""
        try:
            id_ = UUID(name.rpartition("/")[2].removesuffix(".json")).int
        except ValueError:
            return None
        if id_ >= 2**63:
            return None
        row: tuple[Any, ...] | None = self._state.execute(
            "SELECT id, function, buried_at, body, reason, attempts, last_outcome, accepted_at FROM topic_dead_letters"
            " WHERE id = ? AND id NOT IN (SELECT id FROM topic_collected)",
            (id_,),
        ).fetchone()
        return row if row is not None and _blob_name(*row[:3]) == name else None

    async def _show_recent(self, request: web.Request) -> web.Response:
        n = request.query.get("n", "100")
        if not n.isdecimal():
            return problem(400, f"n is {n!r}; write a whole number")
        return web.json_response({"items": self.recent(int(n))})

    def _lane(self, delivery: _Delivery) -> _Lane:
        return self._lanes[delivery.subscription.function]

    def _now(self) -> float:
        return self._clock.now().timestamp()

    def _spawn(self, work: Any) -> None:  # noqa: ANN401 - any coroutine
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (e := task.exception()) is not None:
            log.error("topic.task_failed", exc_info=e)


@contextmanager
def _transaction(state: sqlite3.Connection) -> Iterator[None]:
    state.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        state.execute("ROLLBACK")
        raise
    state.execute("COMMIT")


class _RefusedError(Exception):
    """The topic does not take this request; the publisher hears why."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


async def _read_body(request: web.Request) -> bytes:
    body = b"" if (request.content_length or 0) > MAX_BYTES else await request.read()
    if len(body) > MAX_BYTES or (request.content_length or 0) > MAX_BYTES:
        raise _RefusedError(413, "RequestEntityTooLarge", f"a request is at most {MAX_BYTES} bytes")
    return body


def _read_events(body: bytes) -> list[dict[str, Any]]:
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise _bad(f"the body is no JSON: {e}") from e
    events = found if isinstance(found, list) else [found]
    for position, event in enumerate(events):
        _check_event(f"events[{position}]", event)
    return events


def _check_event(where: str, event: object) -> None:
    if not isinstance(event, dict):
        raise _bad(f"{where} is no object")
    if event.get("specversion") != "1.0":
        raise _bad(f"{where}.specversion must be '1.0': this topic takes CloudEvents 1.0")
    for name in ("id", "source", "type"):
        if not isinstance(event.get(name), str) or not event[name]:
            raise _bad(f"{where}.{name} must be a text that is not empty")
    for name in event:
        if not _ATTRIBUTE.fullmatch(name):
            raise _bad(f"{where}.{name}: names have lower-case letters and digits only")
    if "data" in event and "data_base64" in event:
        raise _bad(f"{where} has both data and data_base64")
    if (time := event.get("time")) is not None:
        try:
            has_zone = datetime.fromisoformat(time).tzinfo is not None
        except (TypeError, ValueError):
            has_zone = False
        if not has_zone:
            raise _bad(f"{where}.time must be an RFC 3339 instant")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bad(message: str) -> _RefusedError:
    return _RefusedError(400, "BadRequest", message)


def _refusal(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message}}, status=status)


def _blob_name(id_: int, function: str, buried_at: float) -> str:
    at = datetime.fromtimestamp(buried_at, UTC)
    return f"{function.upper()}/{at.year}/{at.month}/{at.day}/{at.hour}/{UUID(int=id_)}.json"


def _instant(seconds: float) -> str:
    return format_instant(datetime.fromtimestamp(seconds, UTC))
