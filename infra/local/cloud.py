"""
The cloud's process: everything the app talks to, on one port of 127.0.0.1.

``python -m infra.local.cloud --port P --data DIR --app-url URL`` mounts the Event Grid topic, the SignalR
service, the market replay with Finnhub's webhook and the Discord inbox, and gives their control: the market clock,
the faults, the status. It outlives the app's instances; its state is in DIR/cloud.db.
"""

import argparse
import asyncio
import contextlib
import errno
import fcntl
import json
import math
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from infra.local.discord import LIMIT, DiscordInbox
from infra.local.faults import Switchboard, problem
from infra.local.mailbox import Mailbox
from infra.local.oidc import PATH as OIDC
from infra.local.oidc import OidcIssuer
from infra.local.topic import Pace, Topic, load_subscriptions
from shared.clock import Clock, MarketTime, SystemClock, format_instant, parse_instant
from shared.errors import ConfigurationError, ConflictError, InvalidPayloadError

if TYPE_CHECKING:
    from infra.local.replay.market import Market
    from infra.local.replay.webhook import EarningsWebhook

SUBSCRIPTIONS = Path(__file__).parent.parent / "subscriptions.toml"
STATE = "cloud.db"
SCHEMA = 1
MAX_REQUEST = 26 * 1024 * 1024  # Discord's own limit is 25 MiB
LOCAL_ORIGIN = re.compile(r"http://(127\.0\.0\.1|localhost)(:\d+)?")

STOPPED_BY = (signal.SIGTERM, signal.SIGINT)

EXIT_CANNOT_START = 2
EXIT_DAMAGED = 3


class DamagedStateError(ConfigurationError):
    """The state file cannot be read; the text says what to do with it."""


def open_state(path: Path) -> sqlite3.Connection:
    """
    Open, and if need be create, the cloud's state.

    Raises:
        DamagedStateError: the file is no database, is damaged, or is of a newer version.

    """
    state = sqlite3.connect(path, isolation_level=None, timeout=5)
    try:
        state.execute("PRAGMA journal_mode=WAL")
        state.execute("PRAGMA synchronous=NORMAL")
        [[health]] = state.execute("PRAGMA quick_check(1)")
        [[schema]] = state.execute("PRAGMA user_version")
        if health != "ok":
            raise sqlite3.DatabaseError(health)
        if schema > SCHEMA:
            raise sqlite3.DatabaseError(f"its version is {schema}, this program knows {SCHEMA}")
        if schema < SCHEMA:
            state.execute(f"PRAGMA user_version={SCHEMA}")
        state.execute("CREATE TABLE IF NOT EXISTS cloud_settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
    except sqlite3.DatabaseError as e:
        state.close()
        raise DamagedStateError(
            f"{path} cannot be used ({e}): move it away and start again. It holds only what the local topic, "
            "Discord inbox and market clock remember; the app's data is not in it."
        ) from e
    return state


def read_saved_instant(path: Path) -> datetime | None:
    """
    The market instant a cloud last saved in this ``cloud.db``; None if none ever did.

    Raises:
        DamagedStateError: the file is there and cannot be read.

    """
    if not path.exists():
        return None
    with contextlib.closing(open_state(path)) as state:
        saved = _setting(state, "market_instant")
    return parse_instant(saved) if saved else None


def _setting(state: sqlite3.Connection, name: str) -> str | None:
    row = state.execute("SELECT value FROM cloud_settings WHERE name = ?", (name,)).fetchone()
    return str(row[0]) if row else None


class AdjustableClock:
    """The market's clock, with a hand to turn it: every turn starts a new line at the present instant."""

    def __init__(self, wall: Clock, time: MarketTime) -> None:
        self._wall = wall
        self.time = time
        self._running_speed = time.speed or 1.0

    def now(self) -> datetime:
        return self.time.at(self._wall.now())

    def adjust(self, wanted: object) -> None:
        """
        Obey ``{"speed": n}``, ``{"paused": bool}`` or ``{"now": instant}``.

        Raises:
            InvalidPayloadError: the order is none of these.
            ConflictError: the market clock would go back, or past its end.

        """
        if not isinstance(wanted, dict) or len(wanted) != 1:
            raise InvalidPayloadError('send one of {"speed": 86400}, {"paused": true}, {"now": "2012-03-01T00:00:00Z"}')
        [(name, value)] = wanted.items()
        match name:
            case "speed":
                self._anchor(speed=_speed(value))
            case "paused" if isinstance(value, bool):
                self._anchor(speed=0.0 if value else self.time.speed or self._running_speed)
            case "paused":
                raise InvalidPayloadError(f"paused is {value!r}; write true or false")
            case "now":
                self._anchor(market=_market_instant(value))
            case _:
                raise InvalidPayloadError(f"unknown {name!r}; send one of speed, paused, now")

    def _anchor(self, *, market: datetime | None = None, speed: float | None = None) -> None:
        wall = self._wall.now()
        present = self.time.at(wall)
        end = self.time.end
        if market is not None and market < present:
            raise ConflictError(
                f"the market clock never goes back: it is {format_instant(present)}, asked for {format_instant(market)}"
            )
        if market is not None and end is not None and market > end:
            raise ConflictError(f"this market ends at {format_instant(end)}, asked for {format_instant(market)}")
        speed = self.time.speed if speed is None else speed
        self._running_speed = speed or self._running_speed
        self.time = MarketTime(market=market or present, wall=wall, speed=speed, end=end)


def _speed(value: object) -> float:
    # The setting's text carries six digits and no exponent, so no other speed can be kept.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not re.fullmatch(r"\d+(\.\d+)?", f"{value:g}"):
        raise InvalidPayloadError(f"speed is {value!r}; write a number from 0 to 999999")
    return float(f"{value:g}")


def _market_instant(value: object) -> datetime:
    try:
        return parse_instant(str(value))
    except ValueError as e:
        raise InvalidPayloadError(f"now is {value!r}; write an instant such as 2012-03-01T00:00:00Z") from e


@dataclass(frozen=True, slots=True)
class _Skewed:
    """A clock that is wrong by as many seconds as it is told."""

    clock: Clock
    seconds: Callable[[], float]

    def now(self) -> datetime:
        return self.clock.now() + timedelta(seconds=self.seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    port: int
    data: Path
    app_url: str
    market_time: str | None
    symbols: str
    interval: str
    replay: Path | None
    no_market: bool
    subscriptions: Path
    topic_key: str
    signalr_key: str
    system_key: str
    webhook_secret: str
    time_scale: float
    discord_limit: int
    smtp_port: int

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> "Options":
        """Read the command line."""
        parser = argparse.ArgumentParser("infra.local.cloud", description=(__doc__ or "").strip().splitlines()[0])
        add = parser.add_argument
        add("--port", type=int, required=True, help="the port of 127.0.0.1 to listen on; 0 takes a free one")
        add("--data", type=Path, required=True, help="the folder for cloud.db")
        add("--app-url", required=True, help="where the app's host answers, such as http://127.0.0.1:7071")
        add("--market-time", help="<market instant>@<wall instant>*<speed>[..<end>]; without it the wall's time")
        add("--symbols", default="AAPL,FB,GOOG,IBM,MSFT", help="what the replay shows: A,B or all")
        add("--interval", default="1d", help="the length of the replay's bars")
        add("--replay", type=Path, help="a folder of CSV files to replay instead")
        add("--no-market", action="store_true", help="run without a market replay")
        add("--subscriptions", type=Path, default=SUBSCRIPTIONS, help="which function hears which events")
        add("--topic-key", default="local-topic-key", help="what publishers send as aeg-sas-key")
        add("--signalr-key", default="local-signalr-access-key-of-32-bytes-or-more", help="signs SignalR's tokens")
        add("--system-key", default="local-system-key", help="opens the host's Event Grid webhook")
        # A secret of the user's own is handed over in the environment, where no list of processes shows it.
        secret = os.environ.get("FINNHUB_WEBHOOK_SECRET", "").strip() or "local-webhook-secret"
        add("--webhook-secret", default=secret, help="what Finnhub's webhook sends as X-Finnhub-Secret")
        add("--time-scale", type=_positive, default=0.02, help="scales the topic's waits and time to live")
        add("--discord-limit", type=int, default=LIMIT, help="calls a webhook may make in 2 s")
        add("--smtp-port", type=int, default=0, help="the mailbox's port; 0 takes a free one")
        return cls(**vars(parser.parse_args(arguments)))


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


class Cloud:
    """Everything the app talks to, and its control."""

    def __init__(self, options: Options, state: sqlite3.Connection) -> None:
        from infra.local.signalr.service import SignalRService

        self._options = options
        self._state = state
        self._wall = SystemClock()
        self._started_at = self._wall.now()
        self.url = ""
        self.faults = Switchboard()
        self.clock = AdjustableClock(self._wall, _market_time(options, self._wall.now()))
        self.topic = Topic(
            state,
            load_subscriptions(options.subscriptions),
            options.app_url,
            options.system_key,
            key=options.topic_key,
            pace=Pace(time_scale=options.time_scale),
            faults=self.faults,
        )
        self.discord = DiscordInbox(state, limit=options.discord_limit)
        self.signalr = SignalRService(options.signalr_key, state)
        self.mailbox = Mailbox(state)
        self.oidc = OidcIssuer(state, lambda: f"{self.url}{OIDC}")
        self.market: Market | None = None if options.no_market else self._open_market()
        self.webhook: EarningsWebhook | None = None if self.market is None else self._open_webhook(self.market)
        self._keeper: asyncio.Task[None] | None = None
        self._saved: list[tuple[str, str]] = []

    def application(self) -> web.Application:
        """All mounts in one application."""
        app = web.Application(client_max_size=MAX_REQUEST, middlewares=[self.faults.middleware()])
        app.add_routes([*self.faults.routes(), *self.topic.routes(), *self.discord.routes()])
        app.add_routes([*self.signalr.routes(), *self.oidc.routes(), *self.mailbox.routes()])
        if self.market is not None:
            app.add_routes(self.market.routes())
        if self.webhook is not None:
            app.add_routes(self.webhook.routes())
        app.add_routes(
            [
                web.get("/clock", self._show_clock),
                web.put("/clock", self._adjust_clock),
                web.get("/status", self._show_status),
                web.delete("/signalr/connections", self._drop_connections),
            ]
        )
        app.on_response_prepare.append(_let_local_pages_read)
        return app

    async def start(self) -> None:
        """Begin to work."""
        await self.signalr.start()
        await self.mailbox.start(self._options.smtp_port)
        await self.topic.start()
        if self.webhook is not None:
            await self.webhook.start()
        self._keeper = asyncio.create_task(self._keep_saving())

    async def close(self) -> None:
        """End cleanly; the market instant is saved."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._save()
        if self.webhook is not None:
            await self.webhook.close()
        await self.topic.close()
        await self.signalr.close()
        await self.mailbox.close()

    def _open_market(self) -> "Market":
        from infra.local.replay import samples
        from infra.local.replay.market import Market

        options = self._options
        if options.replay is not None:
            catalogue = samples.load_folder(options.replay)
        else:
            symbols = None if options.symbols == "all" else options.symbols.split(",")
            catalogue = samples.load_packaged(symbols, options.interval)
        faults = self.faults
        market = Market(
            catalogue,
            _Skewed(self.clock, lambda: faults.clock.market_skew_s).now,
            _Skewed(self._wall, lambda: faults.clock.wall_skew_s),
            faults=faults.asked,
        )
        if (counted := _setting(self._state, "market")) is not None:
            market.restore(json.loads(counted))
        return market

    def _open_webhook(self, market: "Market") -> "EarningsWebhook":
        from infra.local.replay.webhook import EarningsWebhook

        webhook = EarningsWebhook(
            almanac=market.almanac,
            wall=self._wall,
            url=f"{self._options.app_url}/api/hooks/finnhub",
            secret=self._options.webhook_secret,
        )
        if (kept := _setting(self._state, "webhook")) is not None:
            webhook.restore(json.loads(kept))
        return webhook

    async def _keep_saving(self) -> None:
        while True:
            self._save()
            await asyncio.sleep(1)

    def _save(self) -> None:
        settings = []
        if self._options.market_time is not None:  # the wall's time is nothing to resume from
            settings.append(("market_instant", format_instant(self.clock.now())))
        if self.market is not None:
            settings.append(("market", json.dumps(self.market.state())))
        if self.webhook is not None:
            settings.append(("webhook", json.dumps(self.webhook.state())))
        if settings != self._saved:
            self._state.executemany("INSERT OR REPLACE INTO cloud_settings VALUES (?, ?)", settings)
            self._saved = settings

    # --- control

    def _clock_shown(self) -> dict[str, Any]:
        now = self.clock.now()
        return {
            "setting": str(self.clock.time),
            "now": format_instant(now),
            "speed": self.clock.time.speed,
            "paused": self.clock.time.speed == 0,
            "progress": self._progress(now),
        }

    def _progress(self, now: datetime) -> dict[str, Any] | None:
        if self.market is None or not any(one.bars for one in self.market.catalogue.values()):
            return None
        progress = self.market.progress(now)
        return {
            "fraction": progress.fraction,
            "bars": progress.bars,
            "bars_closed": progress.closed,
            "first_bar_opened_at": format_instant(progress.first_at),
            "last_bar_closed_at": format_instant(progress.last_at),
        }

    async def _show_clock(self, request: web.Request) -> web.Response:
        return web.json_response(self._clock_shown())

    async def _adjust_clock(self, request: web.Request) -> web.Response:
        try:
            self.clock.adjust(json.loads(await request.text()))
        except ConflictError as e:
            return problem(409, str(e))
        except InvalidPayloadError as e:
            return problem(400, str(e))
        except ValueError as e:
            return problem(400, f"the body is no JSON: {e}")
        self._save()
        return web.json_response(self._clock_shown())

    async def _show_status(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "pid": os.getpid(),
                "url": self.url,
                "app_url": self._options.app_url,
                "started_at": format_instant(self._started_at),
                "clock": self._clock_shown(),
                "topic": self.topic.stats(),
                "signalr": {"connections": self.signalr.connections(), "sent": self.signalr.sent()},
                "market": None if self.market is None else self.market.stats(),
                "webhook": None if self.webhook is None else self.webhook.stats(),
                "discord": self.discord.stats(),
                "oidc": self.oidc.stats(),
                "mailbox": self.mailbox.stats(),
                "faults": {
                    "on": self.faults.shown(),
                    "hits": dict(self.faults.hits),
                    "script": self.faults.script(),
                },
            }
        )

    async def _drop_connections(self, request: web.Request) -> web.Response:
        return web.json_response({"dropped": self.signalr.drop_all()})


def _market_time(options: Options, now: datetime) -> MarketTime:
    if options.market_time is None:
        return MarketTime(market=now, wall=now, speed=1.0)
    return MarketTime.parse(options.market_time)


async def _let_local_pages_read(request: web.Request, response: web.StreamResponse) -> None:
    origin = request.headers.get("Origin", "")
    if request.method in {"GET", "HEAD"} and LOCAL_ORIGIN.fullmatch(origin):
        response.headers.setdefault("Access-Control-Allow-Origin", origin)
        response.headers.setdefault("Vary", "Origin")


# --- the process


async def serve(options: Options) -> int:
    """Run until told to stop; gives the exit code."""
    try:
        options.data.mkdir(parents=True, exist_ok=True)
        with _only_one(options.data), contextlib.closing(open_state(options.data / STATE)) as state:
            return await _listen(options, Cloud(options, state))
    except DamagedStateError as e:
        print(e, file=sys.stderr)
        return EXIT_DAMAGED
    except (ConfigurationError, InvalidPayloadError, OSError) as e:
        print(e, file=sys.stderr)
        return EXIT_CANNOT_START


async def _listen(options: Options, cloud: Cloud) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(cloud.application(), access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        await _bind(runner, options.port)
        for number in STOPPED_BY:
            loop.add_signal_handler(number, stop.set)
        cloud.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        await cloud.start()
        print(f"cloud ready {cloud.url}", flush=True)
        await _until(stop.wait, _parent_is_gone)
    finally:
        await cloud.close()
        await runner.cleanup()
    return 0


async def _bind(runner: web.AppRunner, port: int) -> None:
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    except OSError as e:
        if e.errno != errno.EADDRINUSE:
            raise
        raise ConfigurationError(
            f"port {port} of 127.0.0.1 is taken: stop what listens there or choose another with --port"
        ) from e


async def _until(*events: Callable[[], Awaitable[object]]) -> None:
    tasks = [asyncio.ensure_future(event()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _parent_is_gone() -> None:
    given = os.environ.get("TROOP_PARENT_PID", "")
    if not given.isdecimal():
        await asyncio.Event().wait()
    parent = int(given)
    while _is_alive(parent):  # noqa: ASYNC110 - no event tells when a process that is no child ends
        await asyncio.sleep(0.5)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    # Killed, and not yet waited for: it still has its number, and nothing else.
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


@contextlib.contextmanager
def _only_one(data: Path) -> Any:  # noqa: ANN401
    with (data / "cloud.lock").open("w", encoding="utf-8") as file:
        _lock(file, data)
        yield


def _lock(file: TextIOWrapper, data: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ConfigurationError(f"another cloud already works in {data}: stop it, or name another --data") from e


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cloud from the command line."""
    return asyncio.run(serve(Options.parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
