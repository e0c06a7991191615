"""The cloud as a process: its control, its exit codes, and what it remembers over a kill."""

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from azure.core.credentials import AzureKeyCredential
from azure.core.messaging import CloudEvent
from azure.eventgrid.aio import EventGridPublisherClient

from infra.local.cloud import AdjustableClock, DamagedStateError, Options, open_state, read_saved_instant, serve
from infra.local.discord import DEFAULT_WEBHOOK
from infra.local.faults import Switchboard
from shared.clock import MarketTime, StoppedClock
from shared.errors import ConflictError, InvalidPayloadError

REPOSITORY = Path(__file__).parents[2]
IN_TIME = 15
WALL = datetime(2026, 11, 21, 9, tzinfo=UTC)
MARKET = datetime(2012, 3, 1, tzinfo=UTC)
SETTING = "2012-03-01T00:00:00Z@2026-11-21T09:00:00Z*0..2013-03-01T21:00:00Z"
SUBSCRIPTIONS = """
[[subscription]]
function = "signals_on_bars"
event_types = ["market.bars_ingested.v1"]
"""


# --- the clock


@pytest.fixture
def wall() -> StoppedClock:
    return StoppedClock(WALL)


def a_clock(wall: StoppedClock, *, speed: float = 3600, end: datetime | None = None) -> AdjustableClock:
    return AdjustableClock(wall, MarketTime(market=MARKET, wall=WALL, speed=speed, end=end))


def test_a_change_of_speed_starts_at_the_present_instant(wall):
    """Changing the speed moves no time: the market goes on from where it is."""
    clock = a_clock(wall)
    wall.at += timedelta(seconds=10)

    clock.adjust({"speed": 60})
    now = clock.now()
    wall.at += timedelta(seconds=10)

    assert now == MARKET + timedelta(hours=10)
    assert clock.now() == now + timedelta(minutes=10)
    assert MarketTime.parse(str(clock.time)) == clock.time


def test_a_paused_market_goes_on_at_its_old_speed(wall):
    """Pausing twice still remembers how fast the market ran."""
    clock = a_clock(wall)
    for order in ({"paused": True}, {"paused": True}):
        clock.adjust(order)
        wall.at += timedelta(hours=1)
    stood = clock.now()

    clock.adjust({"paused": False})
    wall.at += timedelta(seconds=1)

    assert stood == MARKET
    assert clock.now() == MARKET + timedelta(hours=1)


def test_the_market_can_be_moved_forward(wall):
    """A jump keeps the speed."""
    clock = a_clock(wall)

    clock.adjust({"now": "2012-06-01T00:00:00Z"})
    wall.at += timedelta(seconds=1)

    assert clock.now() == datetime(2012, 6, 1, 1, tzinfo=UTC)


def test_the_market_never_goes_back(wall):
    """An earlier instant is a conflict that tells both instants."""
    clock = a_clock(wall)

    with pytest.raises(ConflictError, match=r"never goes back.*2012-03-01T00:00:00Z.*2012-02-29"):
        clock.adjust({"now": "2012-02-29T00:00:00Z"})

    assert clock.now() == MARKET


def test_the_market_does_not_go_past_its_end(wall):
    """Where the recorded bars end there is nothing to jump to."""
    clock = a_clock(wall, end=MARKET + timedelta(days=1))

    with pytest.raises(ConflictError, match="ends at 2012-03-02"):
        clock.adjust({"now": "2012-03-03T00:00:00Z"})


@pytest.mark.parametrize(
    "order",
    [
        None,
        [],
        {},
        {"speed": 1, "paused": True},
        {"pace": 1},
        {"speed": -1},
        {"speed": True},
        {"speed": "fast"},
        {"speed": 1e6},
        {"speed": 1e-9},
        {"speed": float("nan")},
        {"paused": 1},
        {"now": "noon"},
        {"now": "2012-03-02T00:00:00"},
        {"now": None},
    ],
)
def test_a_wrong_order_changes_nothing(wall, order):
    """What the setting's text could not carry is refused."""
    clock = a_clock(wall)
    before = str(clock.time)

    with pytest.raises(InvalidPayloadError):
        clock.adjust(order)

    assert str(clock.time) == before


# --- the switchboard


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"telegram": {}}, "telegram"),
        ({"discord": {"speed": 1}}, "unknown field 'speed' of discord"),
        ({"discord": {"duplicate": 2}}, "duplicate"),
        ({"discord": {"status": 200}}, "discord.status"),
        ({"discord": {"rate": 1.5}}, "discord.rate"),
        ({"topic": {"duplicate": 0}}, "topic.duplicate"),
        ({"signalr": {"cut": "often"}}, "signalr.cut"),
        ([], "object of targets"),
    ],
)
def test_an_unknown_fault_is_named(wanted, named):
    """A typing mistake in a fault must not look like a healthy system."""
    board = Switchboard()

    with pytest.raises(InvalidPayloadError, match=named):
        board.set(wanted)

    assert board.shown() == {}


# --- the process


@dataclass
class Process:
    """One running cloud."""

    process: asyncio.subprocess.Process
    url: str
    client: httpx.AsyncClient

    async def get(self, path: str, **more) -> dict:
        answer = await self.client.get(f"{self.url}{path}", **more)
        answer.raise_for_status()
        return answer.json()

    async def put(self, path: str, body: object) -> httpx.Response:
        return await self.client.put(f"{self.url}{path}", json=body)

    async def publish(self, *names: str) -> None:
        client = EventGridPublisherClient(f"{self.url}/topic/api/events", AzureKeyCredential("k"), retry_total=0)
        async with client:
            await client.send([CloudEvent(source="/market", type="market.bars_ingested.v1", id=n) for n in names])

    async def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), IN_TIME)


def options(data: Path, *more: str) -> Options:
    return Options.parse(arguments(data, "http://127.0.0.1:9", *more)[3:])


def arguments(data: Path, app_url: str, *more: str) -> list[str]:
    file = data.parent / "subscriptions.toml"
    file.write_text(SUBSCRIPTIONS)
    return [
        *(sys.executable, "-m", "infra.local.cloud", "--data", str(data), "--app-url", app_url),
        *("--subscriptions", str(file), "--topic-key", "k", "--time-scale", "0.001", "--market-time", SETTING),
        *more,
    ]


@pytest.fixture
async def start(tmp_path) -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))

        async def started(*more: str, app_url: str = "http://127.0.0.1:9", env=None) -> Process:
            command = arguments(tmp_path / "data", app_url, "--port", "0", *more)
            process = await asyncio.create_subprocess_exec(
                *command, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE, env=os.environ | (env or {})
            )
            assert process.stdout is not None
            line = (await asyncio.wait_for(process.stdout.readline(), IN_TIME)).decode()
            assert line.startswith("cloud ready http://127.0.0.1:"), line
            cloud = Process(process, line.split()[-1], client)
            stack.push_async_callback(cloud.end, signal.SIGKILL)
            return cloud

        yield started


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(IN_TIME):
        while not await holds():  # noqa: ASYNC110 - the condition is another process's
            await asyncio.sleep(0.01)


async def test_killed_with_events_pending_it_delivers_them_after_the_restart(start):
    """kill -9 loses nothing accepted: every event published before it reaches its function after it."""
    names = [f"e{n}" for n in range(40)]
    first = await start("--no-market")
    await first.publish(*names)
    assert await first.end(signal.SIGKILL) == -signal.SIGKILL
    got: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        got.append((await request.json())["id"])
        return web.Response(status=202)

    app = web.Application()
    app.router.add_post("/runtime/webhooks/EventGrid", answer)
    async with TestServer(app, host="127.0.0.1") as receiver:
        second = await start("--no-market", app_url=str(receiver.make_url("")).rstrip("/"))

        async def nothing_pends() -> bool:
            return (await second.get("/status"))["topic"]["pending"] == 0

        await until(nothing_pends)
        assert await second.end() == 0

    assert set(got) == set(names)


async def test_it_shows_its_state_and_obeys_its_control(start):
    """One process serves the replay, SignalR, Discord, the clock, the faults and the status."""
    cloud = await start("--symbols", "AAPL", "--discord-limit", "100")
    webhook_id, token = DEFAULT_WEBHOOK
    hook = f"{cloud.url}/discord/api/webhooks/{webhook_id}/{token}"
    query = {"function": "TIME_SERIES_DAILY", "symbol": "AAPL", "apikey": "local-premium"}

    bars = await cloud.get("/alpha_vantage/query", params=query)
    said = await cloud.client.post(hook, json={"content": "hello"})
    health = await cloud.client.get(f"{cloud.url}/api/health")
    moved = (await cloud.put("/clock", {"now": "2012-03-05T00:00:00Z"})).json()
    back = await cloud.put("/clock", {"now": "2012-03-01T00:00:00Z"})
    wrong = await cloud.put("/clock", {"pace": 1})
    on = (await cloud.put("/faults", {"discord": {"status": 500}})).json()
    refused = await cloud.client.post(hook, json={"content": "hello"})
    status = await cloud.get("/status")

    assert max(bars["Time Series (Daily)"]) == "2012-02-29"
    assert (said.status_code, health.status_code) == (204, 200)
    assert said.headers["X-RateLimit-Limit"] == "100"
    assert (moved["now"], moved["speed"]) == ("2012-03-05T00:00:00Z", 0)
    assert 0.9 < moved["progress"]["fraction"] < 1
    assert moved["progress"]["last_bar_closed_at"] == "2013-03-01T21:00:00Z"
    assert (back.status_code, wrong.status_code) == (409, 400)
    assert "never goes back" in back.json()["detail"]
    assert (on, refused.status_code) == ({"discord": {"status": 500}}, 500)
    assert status["faults"] == {"on": on, "hits": {"discord.status": 1}, "script": []}
    assert status["discord"]["messages"] == 1
    assert status["market"]["alpha_vantage"]["answers"] == 1
    assert status["signalr"] == {"connections": 0, "sent": 0}
    assert status["pid"] == cloud.process.pid
    assert (await cloud.client.delete(f"{cloud.url}/faults")).json() == {}


async def test_the_providers_clock_can_be_wrong(start):
    """A skewed clock shows the app a market that is a day behind its own."""
    cloud = await start("--symbols", "AAPL")
    query = {"function": "TIME_SERIES_DAILY", "symbol": "AAPL", "apikey": "local-premium"}

    await cloud.put("/faults", {"clock": {"market_skew_s": -86400}})
    bars = await cloud.get("/alpha_vantage/query", params=query)

    assert max(bars["Time Series (Daily)"]) == "2012-02-28"
    assert (await cloud.get("/clock"))["now"] == "2012-03-01T00:00:00Z"


async def test_what_the_provider_counted_survives_a_restart(start):
    """A quota is not renewed by killing the cloud after it was saved."""
    first = await start("--symbols", "AAPL")
    query = {"function": "TIME_SERIES_DAILY", "symbol": "AAPL", "apikey": "local-free"}
    await first.get("/alpha_vantage/query", params=query)
    assert await first.end() == 0

    second = await start("--symbols", "AAPL")
    status = await second.get("/status")

    assert status["market"]["alpha_vantage"]["calls"] == 1


async def test_a_script_of_faults_is_listed_and_shown(start):
    """What can be scripted is listed by provider; the status tells what struck and what is left."""
    cloud = await start("--symbols", "AAPL")
    step = {"kind": "refusal", "refusal": "premium_endpoint", "times": 2}

    known = await cloud.get("/faults/known")
    on = (await cloud.put("/faults", {"finnhub": {"script": [step]}})).json()
    refused = await cloud.client.get(f"{cloud.url}/finnhub/api/v1/quote?symbol=AAPL&token=local-premium")
    status = await cloud.get("/status")
    wrong = await cloud.put("/faults", {"polygon": {"script": [{"kind": "refusal", "refusal": "zero_quote"}]}})

    assert set(known["refusals"]) == {"alpha_vantage", "finnhub", "twelve_data", "polygon"}
    assert known["refusals"]["finnhub"]["premium_endpoint"]["status"] == refused.status_code == 403
    assert known["kinds"]["stale"] == ["sessions"]
    assert on == {"finnhub": {"script": [step]}}
    assert status["faults"]["script"] == [{"target": "finnhub", **step, "struck": 1, "left": 1}]
    assert status["market"]["finnhub"]["faulted"] == 1
    assert (wrong.status_code, "polygon has no refusal 'zero_quote'" in wrong.json()["detail"]) == (400, True)


async def test_every_provider_answers_and_counts(start):
    """One cloud serves all four, and its status tells their calls."""
    cloud = await start("--symbols", "AAPL")
    key = {"Authorization": "Bearer local-premium"}

    twelve = await cloud.get("/twelve_data/quote?symbol=AAPL&apikey=local-premium")
    polygon = await cloud.get("/polygon/v2/aggs/ticker/AAPL/prev", headers=key)
    status = await cloud.get("/status")

    assert float(twelve["close"]) == polygon["results"][0]["c"]
    assert {name: one["answers"] for name, one in status["market"].items()} == {
        "alpha_vantage": 0,
        "finnhub": 0,
        "twelve_data": 1,
        "polygon": 1,
    }


async def test_earnings_are_posted_to_the_app_as_the_market_clock_passes_them(start):
    """The secret is the app's own setting; what was told before a kill is not told again."""
    got: list[tuple[str, dict]] = []

    async def answer(request: web.Request) -> web.Response:
        got.append((request.headers["X-Finnhub-Secret"], await request.json()))
        return web.Response(status=200)

    app = web.Application()
    app.router.add_post("/api/hooks/finnhub", answer)
    env = {"FINNHUB_WEBHOOK_SECRET": "of-the-user"}
    async with TestServer(app, host="127.0.0.1") as receiver:
        app_url = str(receiver.make_url("")).rstrip("/")
        first = await start("--symbols", "AAPL,IBM", app_url=app_url, env=env)
        await first.put("/clock", {"now": "2012-06-01T00:00:00Z"})

        async def told_of_both() -> bool:
            return len(got) == 2

        await until(told_of_both)
        assert (await first.end()) == 0
        second = await start("--symbols", "AAPL,IBM", "--market-time", SETTING.replace("03-01", "06-01", 1), env=env)
        status = await second.get("/status")

    assert {secret for secret, _ in got} == {"of-the-user"}
    assert sorted(row["symbol"] for _, event in got for row in event["data"]) == ["AAPL", "IBM"]
    assert (status["webhook"]["delivered"], status["webhook"]["enabled"]) == (2, True)


async def test_without_a_market_there_is_no_webhook(start):
    """With real providers nobody here sends earnings."""
    cloud = await start("--no-market")

    assert (await cloud.get("/status"))["webhook"] is None
    assert (await cloud.client.get(f"{cloud.url}/webhooks/finnhub")).status_code == 404


async def test_the_market_instant_is_saved_for_the_next_start(start, tmp_path):
    """The instant in cloud.db is the market's, after a kill as after a clean end."""
    cloud = await start("--no-market")
    await cloud.put("/clock", {"now": "2012-04-01T12:00:00Z"})

    await cloud.end(signal.SIGKILL)

    assert read_saved_instant(tmp_path / "data" / "cloud.db") == datetime(2012, 4, 1, 12, tzinfo=UTC)


async def test_only_local_pages_may_read(start):
    """A page of this machine may read the status; a page from elsewhere may not."""
    cloud = await start("--no-market")

    async def allowed(origin: str) -> str | None:
        answer = await cloud.client.get(f"{cloud.url}/status", headers={"Origin": origin})
        return answer.headers.get("Access-Control-Allow-Origin")

    assert await allowed("http://127.0.0.1:7071") == "http://127.0.0.1:7071"
    assert await allowed("http://localhost:5173") == "http://localhost:5173"
    assert await allowed("http://localhost.example.com") is None
    assert await allowed("https://example.com") is None


async def test_it_ends_when_its_parent_is_gone(start):
    """A cloud does not outlive the command that started it, however that one died."""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    cloud = await start("--no-market", env={"TROOP_PARENT_PID": str(parent.pid)})

    parent.kill()

    assert await asyncio.wait_for(cloud.process.wait(), IN_TIME) == 0
    await parent.wait()


async def test_a_taken_port_is_told_in_one_sentence(start, tmp_path, capsys):
    """Exit 2 and a sentence that names the port and the remedy."""
    cloud = await start("--no-market")
    port = cloud.url.rpartition(":")[2]

    code = await serve(options(tmp_path / "other", "--no-market", "--port", port))

    told = capsys.readouterr().err
    assert code == 2
    assert f"port {port}" in told
    assert "--port" in told
    assert told.count("\n") == 1


async def test_two_clouds_do_not_share_their_data(start, tmp_path, capsys):
    """The same events must not be delivered by two topics."""
    await start("--no-market")

    code = await serve(options(tmp_path / "data", "--no-market", "--port", "0"))

    assert code == 2
    assert "another cloud" in capsys.readouterr().err


def damaged(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"this is no database, and it is long enough to be read as one" * 40)


async def test_a_damaged_state_is_told_in_one_sentence(tmp_path, capsys):
    """Exit 3 and a sentence that names the file and the remedy; the file is left as it is."""
    file = tmp_path / "data" / "cloud.db"
    damaged(file)
    before = file.read_bytes()

    code = await serve(options(file.parent, "--no-market", "--port", "0"))

    told = capsys.readouterr().err
    assert code == 3
    assert str(file) in told
    assert "move it away" in told
    assert told.count("\n") == 1
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--market-time", "yesterday", "MARKET_CLOCK"),
        ("--symbols", "NOSUCH", "NOSUCH"),
        ("--subscriptions", "missing.toml", "missing.toml"),
        ("--replay", "missing", "missing"),
    ],
)
async def test_a_wrong_option_is_told(tmp_path, capsys, option, value, named):
    """Exit 2 and a sentence that names what is wrong."""
    code = await serve(options(tmp_path / "data", "--port", "0", option, value))

    assert code == 2
    assert named in capsys.readouterr().err


# --- the saved instant


def test_without_a_cloud_nothing_was_saved(tmp_path):
    """A first start has no instant to go on from, and asking creates no file."""
    file = tmp_path / "cloud.db"

    assert read_saved_instant(file) is None
    assert not file.exists()


def test_a_new_state_has_no_instant(tmp_path):
    """A cloud that never ran saved nothing."""
    open_state(tmp_path / "cloud.db").close()

    assert read_saved_instant(tmp_path / "cloud.db") is None


def test_a_damaged_state_is_an_error_of_its_own(tmp_path):
    """The command line can tell a damaged file from a first start."""
    damaged(tmp_path / "cloud.db")

    with pytest.raises(DamagedStateError, match="move it away"):
        read_saved_instant(tmp_path / "cloud.db")


def test_a_state_of_a_newer_version_is_left_alone(tmp_path):
    """An older program does not write into what it does not know."""
    file = tmp_path / "cloud.db"
    state = sqlite3.connect(file)
    state.execute("PRAGMA user_version=99")
    state.close()

    with pytest.raises(DamagedStateError, match="version is 99"):
        open_state(file)


# --- the page


def test_the_page_needs_nothing_from_elsewhere():
    """The page is one file: no foreign script, style, font or picture, and no text put in as HTML."""
    page = (REPOSITORY / "infra" / "local" / "page.html").read_text(encoding="utf-8")

    assert "{{CLOUD_URL}}" in page
    assert "innerHTML" not in page
    for foreign in ("src=", "<link", "@import", "https://", "document.write"):
        assert foreign not in page
