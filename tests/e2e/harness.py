"""Starts `troop up` as a newcomer does and asks it over HTTP, as everybody does."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from shared.clock import parse_instant
from shared.market.sessions import calendar

ROOT = Path(__file__).resolve().parent.parent.parent
BEFORE = "1970-01-01T00:00:00Z"
FINAL = {"SENT", "UNKNOWN", "EXPIRED", "SUPPRESSED", "DEAD", "DISABLED"}


def is_over(delivery: Mapping[str, Any]) -> bool:
    """Whether nothing more will happen to a delivery; at the hub an unknown outcome is sent again."""
    is_again = (delivery["channel"], delivery["state"]) == ("signalr", "UNKNOWN")
    return delivery["state"] in FINAL and not is_again


def free_port() -> int:
    """A port with a free one behind it."""
    for _ in range(200):
        port = random.randrange(20_000, 32_000)  # below the ports that connections take by themselves
        try:
            for one in (port, port + 1):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", one))
        except OSError:
            continue
        return port
    raise AssertionError("no two free ports side by side")


class Running:
    """A running `troop up`."""

    def __init__(self, process: subprocess.Popen[str], port: int, data: Path) -> None:
        self.process = process
        self.port = port
        self.data = data
        self.url = f"http://127.0.0.1:{port}"
        self.cloud = f"http://127.0.0.1:{port + 1}"
        self.http = httpx.Client(trust_env=False, timeout=10)

    def get(self, path: str, **params: str) -> Any:
        """The JSON of the app's answer; restarts in between are waited for."""
        return self._patiently(lambda: self.http.get(f"{self.url}{path}", params=params))

    def ask_cloud(self, path: str) -> Any:
        """The JSON of the cloud's answer."""
        return self._patiently(lambda: self.http.get(f"{self.cloud}{path}"))

    def tell_cloud(self, path: str, body: Mapping[str, Any]) -> Any:
        """Change something in the cloud."""
        return self._patiently(lambda: self.http.put(f"{self.cloud}{path}", json=body))

    def everything(self, path: str) -> list[dict[str, Any]]:
        """All items of a list, by its cursors."""
        items: list[dict[str, Any]] = []
        params = {"limit": "200"}
        while True:
            page = self.get(path, **params)
            items += page["items"]
            if page["next"] is None:
                return items
            params["cursor"] = page["next"]

    def inbox(self) -> list[dict[str, Any]]:
        """What people saw in Discord."""
        return self.ask_cloud("/discord/inbox?limit=500")["items"]

    def until(self, what: str, claim: Callable[[], bool], *, within: float = 60) -> None:
        """Wait for something to become true."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            if claim():
                return
            assert self.process.poll() is None, f"troop up ended: {self.log()}"
            time.sleep(0.2)
        raise AssertionError(f"{what} did not come true within {within} s; {self.log()}")

    def is_done(self) -> bool:
        """The replay has ended, everything was evaluated, delivered and told."""
        clock = self.ask_cloud("/clock")
        end = clock["setting"].rpartition("..")[2]
        if clock["now"] < end:
            return False
        last = calendar().previous_close(parse_instant(end)).closes_at
        watched = self.get("/api/watchlist", limit="500")["items"]
        if not watched or any(parse_instant(w["evaluated_through"] or BEFORE) < last for w in watched):
            return False
        if self.ask_cloud("/status")["topic"]["pending"]:
            return False
        alerts = self.everything("/api/alerts")
        if any(not is_over(d) for a in alerts for d in a["deliveries"]):
            return False
        posts = self.everything("/api/posts")
        live = {s["signal_id"] for s in self.everything("/api/signals") if s["origin"] == "live"}
        told = {p["signal_ids"][0] for p in posts if p["kind"] == "signal"}
        digested = {i for p in posts if p["kind"] == "digest" for i in p["signal_ids"]}
        sessions = [p["session"] for p in posts if p["kind"] == "digest"]
        alerted = {a["signal_id"] for a in alerts}
        return live == told == digested == alerted and last.date().isoformat() in sessions

    def children(self, of: int | None = None) -> dict[str, list[int]]:
        """The running processes by what they are: app or cloud."""
        parent = of or self.process.pid
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        found: dict[str, list[int]] = {"app": [], "cloud": []}
        for pid in map(int, text.split()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            except OSError:
                continue
            for name, module in (("app", "infra.local.host"), ("cloud", "infra.local.cloud")):
                if module in command:
                    found[name].append(pid)
        return found

    def kill(self, kind: str, chance: random.Random) -> bool:
        """kill -9 one of our own processes of a kind; False if none runs at this moment."""
        pids = self.children()[kind]
        if not pids:
            return False
        os.kill(chance.choice(pids), signal.SIGKILL)
        return True

    def log(self) -> str:
        """The end of every log, for a failing test."""
        logs = sorted((self.data / "logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def _patiently(self, ask: Callable[[], httpx.Response]) -> Any:
        end = time.monotonic() + 20
        while True:
            try:
                answer = ask()
                if answer.status_code < 500:
                    assert answer.status_code == 200, answer.text
                    return answer.json()
                trouble = answer.text
            except httpx.TransportError as e:
                trouble = repr(e)
            assert time.monotonic() < end, f"no answer: {trouble}; {self.log()}"
            time.sleep(0.2)


@contextmanager
def troop_up(data: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """`troop up` with a data folder of its own, ended in any case."""
    port = free_port()
    command = [sys.executable, "-m", "infra.cli", "up", "--port", str(port), "--data", str(data), *arguments]
    quick = {
        "SIGNALS_INGEST_SCHEDULE": "* * * * * *",
        "SIGNALS_SWEEP_SCHEDULE": "* * * * * *",
        "ALERTS_SWEEP_SCHEDULE": "* * * * * *",
        "CONTENT_DIGEST_SCHEDULE": "* * * * * *",
        "CONTENT_SWEEP_SCHEDULE": "* * * * * *",
        "CONTENT_DIGEST_SETTLE_SECONDS": "2",
        "ALERTS_LEASE_SECONDS": "4",
        # Another provider of raw bars would stand in while the cloud is killed, and be named in what it raises.
        "MARKET_PROVIDERS": "alpha_vantage,finnhub",
    }
    data.mkdir(parents=True, exist_ok=True)
    with (data / "up.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **quick, **(env or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running = Running(process, port, data)
        try:
            running.until("ready", lambda: "TROOP is ready" in (data / "up.log").read_text())
            yield running
        finally:
            running.http.close()
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
