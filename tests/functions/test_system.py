"""What the app does for itself: its storage, its dead letters, its audit, its health."""

import json
import sqlite3
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import azure.functions as func
import pytest
import pytest_asyncio

from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import StoppedClock
from shared.errors import RefusedError, UnavailableError
from shared.functions import RANGES_A_DAY, blueprint
from shared.http import Api
from shared.identity import Caller, UnauthenticatedError
from shared.inbound import DeadLetters, settle
from shared.limits import DailyQuota, Limits, RateLimit
from shared.settings import ROOT
from tests.builders import WALL, MemoryPublisher, a_cloud_event, a_document, a_request, documents
from tests.functions.running_app import App

pytestmark = [pytest.mark.asyncio(loop_scope="session")]


async def test_timer_deletes_what_has_expired(app: App) -> None:
    """An expired document, which nobody can read any more, also stops taking room; others stay."""
    core = sys.modules["function_app"].core
    now = core.wall.now()
    await core.documents.create("things", a_document("gone", at=now, expires_at=now))
    later = now + timedelta(hours=1)
    await core.documents.create("things", a_document("here", at=later, expires_at=later))

    outcome = await app.fire("system_sweep")

    assert outcome.error is None, outcome.error
    with closing(sqlite3.connect(ROOT / core.settings.documents_url.removeprefix("sqlite:"))) as db:
        assert db.execute("SELECT id FROM documents WHERE container='things'").fetchall() == [("here",)]


# --- dead letters and the audit, as operators see them


class Tokens:
    """Two people that the issuer knows; a token is a name."""

    async def caller(self, token: str) -> Caller:
        if token not in ("alice-operator", "bob"):
            raise UnauthenticatedError("the token's signature is wrong: sign in again")
        roles = {"subscriber", "operator"} if token == "alice-operator" else {"subscriber"}
        return Caller(subject=token, roles=frozenset(roles))

    def claims_to_be_ours(self, token: str) -> bool:
        return True


class Desk:
    """The system's routes over storage in memory, and one function that refuses events while ``is_broken``."""

    def __init__(self, storage: SQLiteDocuments, wall: StoppedClock) -> None:
        self.wall = wall
        self.storage = storage
        self.letters = DeadLetters(storage, wall)
        self.is_broken = True
        self.heard: list[str] = []
        self.pulse: Mapping[str, Any] | Exception = {
            "last_sent_at": None,
            "last_arrived_at": None,
            "latency_ms": None,
            "age_s": None,
            "is_late": False,
        }
        self.blobs = SimpleNamespace(collected=0, collect=self._collect)
        core = SimpleNamespace(
            documents=storage,
            wall=wall,
            market_clock=wall,
            dead_letters=self.letters,
            publisher=MemoryPublisher(),
            expiry=storage,
            settings=SimpleNamespace(public_url="http://127.0.0.1"),
            version="0",
        )
        self.api = Api(Tokens(), Limits(rate=RateLimit(wall, 10_000), quota=DailyQuota(storage, wall)))
        app = func.FunctionApp()
        app.register_functions(blueprint(core, self.api, blobs=self.blobs, canary=self._pulse))
        self.functions = {f.get_function_name(): f.get_user_function() for f in app.get_functions()}

        @self.letters.replayable
        async def a_function(event: func.CloudEvent) -> None:
            async with settle(event, "a_function", self.letters):
                if self.is_broken:
                    raise RefusedError("not yet")
                self.heard.append(event.id)

        self.a_function = a_function

    async def bury(self, count: int = 1) -> list[str]:
        """Let the function refuse events, a minute apart; their letters, the oldest first."""
        for n in range(count):
            await self.a_function(a_cloud_event({"n": n}, id=f"e{n}"))
            self.wall.at += timedelta(minutes=1)
        return [letter.id for letter in reversed(await self.letters.newest(after=None, limit=count))]

    async def ask(
        self, name: str, order: object = None, *, token: str | None = "alice-operator", id_: str = "", **params: str
    ) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        body = b"" if order is None else json.dumps(order).encode()
        method = "GET" if order is None else "POST"
        answer = await self.functions[name](
            a_request(
                method,
                params=params,
                route={"dead_letter_id": id_},
                headers={**headers, "content-type": "application/json"},
                body=body,
            )
        )
        return answer.status_code, json.loads(answer.get_body())

    async def _pulse(self) -> Mapping[str, Any]:
        if isinstance(self.pulse, Exception):
            raise self.pulse
        return self.pulse

    async def _collect(self) -> int:
        self.blobs.collected += 1
        return 0


@pytest_asyncio.fixture(loop_scope="session")
async def desk() -> AsyncIterator[Desk]:
    wall = StoppedClock(WALL)
    storage = documents(wall)
    yield Desk(storage, wall)
    await storage.close()


OPERATORS_ONLY: list[tuple[str, object]] = [
    ("deadletters_list", None),
    ("deadletters_read", None),
    ("deadletters_replay", {"reason": "because"}),
    ("deadletters_discard", {"reason": "because"}),
    ("deadletters_replay_range", {"reason": "because", "source": "a_function", "dry_run": False}),
    ("audit_list", None),
]


@pytest.mark.parametrize(("name", "order"), OPERATORS_ONLY)
@pytest.mark.parametrize(("token", "status"), [(None, 401), ("forged", 401), ("bob", 403)])
async def test_only_operators_deal_with_dead_letters(
    desk: Desk, name: str, order: object, token: str | None, status: int
) -> None:
    """A replay reaches people: who is nobody, or only a subscriber, changes and sees nothing."""
    [id_] = await desk.bury()
    desk.is_broken = False

    answered, problem = await desk.ask(name, order, token=token, id_=id_)

    assert (answered, problem["status"], desk.heard) == (status, status, [])
    assert await desk.storage.feed("audit") == []


async def test_an_operator_finds_mends_and_accounts_for_a_letter(desk: Desk) -> None:
    """List, read, replay, and the audit says who did it and why."""
    [id_] = await desk.bury()
    desk.is_broken = False

    _, page = await desk.ask("deadletters_list", state="open", source="a_function", type="test.happened.v1")
    assert [item["dead_letter_id"] for item in page["items"]] == [id_]
    status, done = await desk.ask("deadletters_replay", {"reason": "the fix is out"}, id_=id_)
    assert (status, done["outcome"], done["state"], desk.heard) == (200, "replayed", "replayed", ["e0"])

    _, letter = await desk.ask("deadletters_read", id_=id_)
    assert [(one["by"], one["reason"]) for one in letter["history"]] == [("alice-operator", "the fix is out")]
    _, audit = await desk.ask("audit_list")
    assert [(one["actor"], one["action"], one["subject"]) for one in audit["items"]] == [
        ("alice-operator", "deadletters.replay", id_)
    ]
    assert (await desk.ask("deadletters_list", state="open"))[1]["items"] == []


async def test_a_range_is_a_dry_run_unless_told_otherwise(desk: Desk) -> None:
    """Look, then do; the answer counts the outcomes and says where to go on."""
    await desk.bury(3)
    desk.is_broken = False
    order = {"reason": "the fix is out", "source": "a_function", "limit": 2}

    _, dry = await desk.ask("deadletters_replay_range", order)
    assert (dry["dry_run"], dry["counts"], desk.heard) == (True, {"would replay": 2}, [])
    _, first = await desk.ask("deadletters_replay_range", {**order, "dry_run": False})
    _, rest = await desk.ask("deadletters_replay_range", {**order, "dry_run": False, "cursor": first["next"]})

    assert (first["counts"], rest["counts"], rest["next"]) == ({"replayed": 2}, {"replayed": 1}, None)
    assert desk.heard == ["e0", "e1", "e2"]


WRONG: list[tuple[str, object, int, str]] = [
    ("deadletters_replay", {}, 422, "reason"),
    ("deadletters_replay", {"reason": "  \t "}, 422, "reason"),
    ("deadletters_discard", {"reason": "x" * 501}, 422, "reason"),
    ("deadletters_replay_range", {"reason": "because", "dry_run": False}, 400, "name a source"),
    ("deadletters_replay_range", {"reason": "because", "limit": 101}, 422, "limit"),
    ("deadletters_replay_range", {"reason": "because", "since": "2026-11-21T09:00:00"}, 400, "since"),
    ("deadletters_replay_range", {"reason": "because", "cursor": "none of ours"}, 400, "cursor"),
    ("deadletters_replay_range", {"reason": "because", "sorce": "a_function"}, 422, "sorce"),
]


@pytest.mark.parametrize(("name", "order", "status", "named"), WRONG)
async def test_an_order_that_cannot_be_is_refused(
    desk: Desk, name: str, order: object, status: int, named: str
) -> None:
    """A reason is required, a slip of the pen is named, and nothing runs."""
    [id_] = await desk.bury()
    desk.is_broken = False

    answered, problem = await desk.ask(name, order, id_=id_)

    assert (answered, desk.heard) == (status, [])
    assert named in problem["detail"]


@pytest.mark.parametrize(
    ("name", "value"), [("since", "yesterday"), ("state", "lost"), ("cursor", "x"), ("limit", "0")]
)
async def test_a_filter_that_cannot_be_is_named(desk: Desk, name: str, value: str) -> None:
    """Not an empty list, which would look like good news."""
    status, problem = await desk.ask("deadletters_list", **{name: value})
    assert status == 400
    assert name in problem["detail"]


async def test_an_unknown_letter_is_404_and_a_replayed_one_cannot_be_discarded(desk: Desk) -> None:
    """Each answer says what is the matter."""
    [id_] = await desk.bury()
    desk.is_broken = False
    await desk.ask("deadletters_replay", {"reason": "because"}, id_=id_)

    assert (await desk.ask("deadletters_read", id_="unknown"))[0] == 404
    assert (await desk.ask("deadletters_discard", {"reason": "because"}, id_=id_))[0] == 409


async def test_replays_are_counted_a_day(desk: Desk) -> None:
    """A replay is a spam cannon: its operator has so many a day."""
    order = {"reason": "because", "source": "a_function"}
    for _ in range(RANGES_A_DAY):
        assert (await desk.ask("deadletters_replay_range", order))[0] == 200
    assert (await desk.ask("deadletters_replay_range", order))[0] == 429


async def test_the_pages_of_a_list_follow_each_other(desk: Desk) -> None:
    """Newest first, by cursor, to the end."""
    ids = await desk.bury(5)
    seen: list[str] = []
    params: dict[str, str] = {}
    while True:
        _, page = await desk.ask("deadletters_list", limit="2", **params)
        seen += [item["dead_letter_id"] for item in page["items"]]
        if page["next"] is None:
            break
        params = {"cursor": page["next"]}
    assert seen == ids[::-1]


# --- health


async def test_health_shows_the_canary(desk: Desk) -> None:
    """When it was last seen and how long it took; late is said, and takes no instance away."""
    assert (await desk.ask("health", token=None))[1]["checks"] == {"storage": "ok", "canary": "not yet sent"}
    at = datetime(2026, 11, 21, 8, tzinfo=UTC).isoformat().replace("+00:00", "Z")
    desk.pulse = {"last_sent_at": at, "last_arrived_at": at, "latency_ms": 41.5, "age_s": 3600.0, "is_late": True}

    status, health = await desk.ask("health", token=None)

    assert (status, health["status"], health["checks"]["canary"], health["canary"]) == (200, "ok", "late", desk.pulse)


async def test_health_answers_when_the_canary_cannot_be_read(desk: Desk) -> None:
    """What watches must not fall with what is watched."""
    desk.pulse = UnavailableError("storage is slow")

    status, health = await desk.ask("health", token=None)

    assert (status, health["canary"], health["checks"]["canary"]) == (200, None, "UnavailableError")


async def test_a_timer_fetches_what_event_grid_gave_up(desk: Desk) -> None:
    """Each tick looks into the container once."""
    await desk.functions["system_deadlettered"](SimpleNamespace(past_due=False))
    assert desk.blobs.collected == 1
