"""Starts the cloud and the app's instances, keeps them running, shows progress, and stops them in order."""

import asyncio
import contextlib
import fcntl
import io
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from infra.local.cloud import DamagedStateError, read_saved_instant
from infra.local.up import settings as local
from infra.local.up.ports import check_app_port, cloud_port
from infra.local.up.processes import Child
from infra.local.up.replay import Plan, Wanted, newest_close, plan, read_catalogue
from shared.clock import SystemClock, format_instant, parse_instant
from shared.errors import ConfigurationError, InvalidPayloadError, TroopError
from shared.settings import ROOT, Settings

LOOK_EVERY = 0.5
SHOW_EVERY = 10.0
MOST_CRASHES = 5
CRASH_SPAN = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for."""

    host: str
    port: int
    instances: int
    data: Path
    live: bool
    replay: Wanted
    plan: str = "premium"
    time_scale: float = 0.02
    discord_limit: int | None = None
    quiet: bool = False


@dataclass(slots=True, kw_only=True)
class Crashes:
    """When a child died of late."""

    at: list[float] = field(default_factory=list)

    def too_many(self, now: float) -> bool:
        self.at = [one for one in self.at if now - one < CRASH_SPAN] + [now]
        return len(self.at) > MOST_CRASHES


class Supervisor:
    """The processes behind one URL."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._data = options.data.resolve()
        self._app_url = f"http://{options.host}:{options.port}"
        self._cloud_url = ""
        self._smtp_port = 0
        self._cloud: Child | None = None
        self._instances: list[Child] = []
        self._defaults: dict[str, str] = {}
        self._plan: Plan | None = None
        self._setting = ""
        self._stopping = asyncio.Event()
        self._crashes: dict[str, Crashes] = {}
        self._shown_at = 0.0

    async def run(self) -> int:
        """Run until told to stop; the exit code is 0 then."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        try:
            with self._only_one():
                await self._start()
                self._say(f"TROOP is ready: {self._app_url}  (the cloud: {self._cloud_url}, data: {self._data})")
                while not self._stopping.is_set():
                    await self._look()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), LOOK_EVERY)
        except (TroopError, DamagedStateError) as e:
            self._say(f"troop up: {e}", error=True)
            return 1
        finally:
            await self._stop()
        self._say("stopped; the next start continues from here")
        return 0

    async def _start(self) -> None:
        self._prepare_ports()
        await self._bring_up_to_date()
        if not self._options.live:
            self._plan = await self._make_plan()
            if self._plan.resumed:
                self._say(f"continuing at {format_instant(self._plan.time.market)}")
            watchlist = local.watchlist(self._plan.series)
            (self._data / "watchlist.toml").write_text(watchlist)
            self._setting = str(self._plan.time)
        self._defaults = local.embedded(
            local.Place(app_url=self._app_url, cloud_url=self._cloud_url, data=self._data, smtp_port=self._smtp_port),
            time=self._plan.time if self._plan else None,
            live_from=format_instant(self._plan.live_from) if self._plan else "",
            plan=self._options.plan,
            live=self._options.live,
        )
        Settings.from_env(self._env())  # a wrong setting is said here, once, and not by every instance
        self._cloud = Child(
            "the cloud", self._cloud_arguments(), ready="cloud ready", log=self._data / "logs" / "cloud.log"
        )
        await self._cloud.start(self._env())
        self._instances = [self._instance(number) for number in range(1, self._options.instances + 1)]
        await self._instances[0].start(self._env())
        await asyncio.gather(*(child.start(self._env()) for child in self._instances[1:]))

    async def _bring_up_to_date(self) -> None:
        """Migrate the storage of an earlier version, after a backup; says so only when there was something to do."""
        from infra.db.migrate import migrate
        from infra.db.place import Place

        if not (self._data / "app.db").exists():
            return
        with contextlib.redirect_stdout(io.StringIO()) as told:
            is_whole = await migrate(Place.of(data=self._data), SystemClock())
        steps = told.getvalue().strip().splitlines()
        if len(steps) > 1 or not is_whole:
            self._say("\n".join(steps))
        if not is_whole:
            raise ConfigurationError(
                f"{self._data / 'app.db'} could not be brought up to date; the reason stands above"
            )

    async def _stop(self) -> None:
        await asyncio.gather(*(child.stop() for child in self._instances))
        if self._cloud:
            await self._cloud.stop()

    def _env(self) -> dict[str, str]:
        clock = {"MARKET_CLOCK": self._setting} if self._setting else {}
        return local.merged(self._defaults | clock, os.environ)

    async def _make_plan(self) -> Plan:
        wall = SystemClock()
        try:
            catalogue = read_catalogue(self._options.replay)
        except InvalidPayloadError as e:
            raise ConfigurationError(str(e)) from e
        saved = [read_saved_instant(self._data / "cloud.db"), await newest_close(self._data / "app.db", wall)]
        latest = max([instant for instant in saved if instant], default=None)
        return plan(self._options.replay, catalogue, saved=latest, now=wall.now())

    async def _look(self) -> None:
        """Start again what died, follow the cloud's market clock, show progress."""
        for child in [self._cloud, *self._instances]:
            if child and not child.is_running and not self._stopping.is_set():
                await self._revive(child)
        shown = await self._ask_clock()
        if shown is None:
            return
        if self._plan and shown["setting"] != self._setting:
            self._setting = shown["setting"]
            if self._cloud:
                self._cloud.arguments = self._cloud_arguments()
            for child in self._instances:  # as in Azure, a changed setting restarts the app
                await child.stop()
                await child.start(self._env())
        self._show(shown)

    async def _revive(self, child: Child) -> None:
        crashes = self._crashes.setdefault(child.name, Crashes())
        if crashes.too_many(time.monotonic()):
            raise ConfigurationError(f"{child.name} ends again and again:\n{child.last_words()}")
        self._say(f"{child.name} ended; starting it again")
        try:
            await child.start(self._env())
        except ConfigurationError:
            return  # it died while starting: the next look counts it and tries again

    async def _ask_clock(self) -> dict[str, Any] | None:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=2)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{self._cloud_url}/clock") as r:
                shown: dict[str, Any] = await r.json()
                return shown
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None

    def _show(self, clock: Mapping[str, Any]) -> None:
        progress = clock["progress"]
        if self._options.quiet or not self._plan or not progress:
            return
        first, end = self._plan.live_from, self._plan.time.end or self._plan.live_from
        gone = (parse_instant(clock["now"]) - first) / (end - first) if end > first else 1.0
        text = (
            f"market {clock['now'][:10]}  {min(max(gone, 0), 1):4.0%}  "
            f"{progress['bars_closed']:,} of {progress['bars']:,} bars closed"
        )
        if sys.stdout.isatty():
            print(f"\r{text}\x1b[K", end="", flush=True)
        elif time.monotonic() - self._shown_at >= SHOW_EVERY:
            self._shown_at = time.monotonic()
            print(text, flush=True)

    def _say(self, text: str, *, error: bool = False) -> None:
        lead = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{lead}{text}", file=sys.stderr if error else sys.stdout, flush=True)

    def _instance(self, number: int) -> Child:
        o = self._options
        arguments = ["-m", "infra.local.host", "--app", str(ROOT), "--host", o.host, "--port", str(o.port)]
        arguments += ["--data", str(self._data), "--cloud", self._cloud_url]
        if o.instances > 1:
            arguments.append("--shared")
        log = self._data / "logs" / f"app-{number}.log"
        return Child(f"app instance {number}", arguments, ready="host ready", log=log)

    def _cloud_arguments(self) -> list[str]:
        o, port = self._options, self._cloud_url.rpartition(":")[2]
        arguments = ["-m", "infra.local.cloud", "--port", port, "--data", str(self._data), "--app-url", self._app_url]
        arguments += ["--topic-key", local.TOPIC_KEY, "--signalr-key", local.SIGNALR_KEY]
        arguments += ["--time-scale", str(o.time_scale), "--smtp-port", str(self._smtp_port)]
        if o.discord_limit:
            arguments += ["--discord-limit", str(o.discord_limit)]
        if self._plan is None:
            return [*arguments, "--no-market"]
        arguments += ["--market-time", self._setting, "--interval", o.replay.interval]
        if o.replay.folder:
            return [*arguments, "--replay", str(o.replay.folder.resolve())]
        everything = (o.replay.symbols or "").strip().lower() == "all"
        return [*arguments, "--symbols", "all" if everything else ",".join(s for s, _ in self._plan.series)]

    def _prepare_ports(self) -> None:
        port = self._options.port
        check_app_port(self._options.host, port)
        free = cloud_port(port)
        self._cloud_url = f"http://127.0.0.1:{free}"
        self._smtp_port = cloud_port(free)
        if free != port + 1:
            self._say(f"port {port + 1} is taken; the cloud takes {free}")

    @contextlib.contextmanager
    def _only_one(self) -> Any:  # noqa: ANN401 - a generator made a context manager
        try:
            self._data.mkdir(parents=True, exist_ok=True)
            lock: IO[str] = (self._data / "up.lock").open("w")
        except OSError as e:
            raise ConfigurationError(f"--data {self._data} cannot be used: {e.strerror}") from e
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise ConfigurationError(
                    f"another troop up is using {self._data}: stop it, or choose another folder with --data"
                ) from e
            yield
