"""`troop doctor`: everything in order is one line each, and each trouble says what to do."""

import os
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path

import pytest

from infra.doctor import examine
from infra.local.cloud import open_state
from infra.local.up import settings as local
from shared.settings import Settings


class Healthy:
    """A machine with nothing to complain of; tests spoil one thing each."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.data = folder / "data"
        self.patch = patch
        self.port = free_port()
        self._capture = capture
        self._bin = folder / "bin"
        self._bin.mkdir()
        self.install_node("v22.1.0")
        patch.setenv("PATH", f"{self._bin}:/usr/bin:/bin")
        patch.setattr(local.local_settings, "__defaults__", (folder,))
        for name in Settings.model_fields:
            patch.delenv(name.upper(), raising=False)

    def install_node(self, says: str) -> None:
        node = self._bin / "node"
        node.write_text(f"#!/bin/sh\necho '{says}'\n")
        node.chmod(0o755)

    def examine(self, *, live: bool = False) -> tuple[int, dict[str, str], str]:
        """The exit code, what is to do by check, and the last line."""
        code = examine(port=self.port, data=self.data, live=live)
        *lines, last = self._capture.readouterr().out.splitlines()
        rows = [line.strip() for line in lines]
        assert all(row.startswith(("ok ", "TO DO ")) for row in rows)
        todo = [row.removeprefix("TO DO").strip().partition(": ") for row in rows if row.startswith("TO DO")]
        return code, {name: text for name, _, text in todo}, last


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Healthy]:
    return Healthy(tmp_path, monkeypatch, capsys)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1], 65_000)


def test_everything_in_order(machine: Healthy) -> None:
    """Exit code 0, nothing to do, and what comes next."""
    assert machine.examine() == (0, {}, "everything is ready: make run")
    assert not machine.data.exists(), "who looks changes nothing"


def test_a_taken_port_is_to_do_and_a_taken_one_behind_it_is_not(machine: Healthy) -> None:
    """The app needs its port; the cloud takes the next free one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        machine.port = taken
        code, todo, last = machine.examine()
        assert (code, last) == (1, "1 to do")
        assert todo["port"] == f"port {taken} is taken: stop what listens there, or choose another with --port"
        machine.port = taken - 1
        assert "cloud's port" not in machine.examine()[1]


def test_no_port_behind_the_last_one(machine: Healthy) -> None:
    """The highest port leaves no room for the cloud."""
    machine.port = 65_535
    assert "no free port for the cloud" in machine.examine()[1]["cloud's port"]


@pytest.mark.parametrize("name", ["app.db", "cloud.db"])
def test_a_damaged_file_is_named(machine: Healthy, name: str) -> None:
    """The data folder is to do, with the file and what to do with it."""
    machine.data.mkdir()
    (machine.data / name).write_text("this is no database, " * 400)
    code, todo, _ = machine.examine()
    assert (code, set(todo)) == (1, {"data folder"})
    assert str(machine.data / name) in todo["data folder"]


def test_a_folder_that_was_used_before_is_in_order(machine: Healthy) -> None:
    """What an earlier run left is opened and read."""
    machine.data.mkdir()
    open_state(machine.data / "cloud.db").close()
    with closing(sqlite3.connect(machine.data / "app.db")):
        pass
    assert machine.examine()[:2] == (0, {})


@pytest.mark.parametrize("says", ["v18.20.0", "v9.0.0"])
def test_an_old_node_is_to_do(machine: Healthy, says: str) -> None:
    """The version found and the one needed."""
    machine.install_node(says)
    assert machine.examine()[1]["Node.js"] == f"{says} is too old: install 20 or newer"


def test_a_node_that_is_none_is_to_do(machine: Healthy) -> None:
    """Something else of that name says no version."""
    machine.install_node("hello")
    assert "does not say its version: install Node.js 20 or newer" in machine.examine()[1]["Node.js"]


def test_no_node_at_all_is_to_do(machine: Healthy) -> None:
    """Who needs it is said, too."""
    machine.patch.setenv("PATH", os.devnull)
    assert "make test needs it, make run does not" in machine.examine()[1]["Node.js"]


def test_packages_that_are_not_as_locked_are_named(machine: Healthy) -> None:
    """Missing or of another version: the name, and how to get the locked ones."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "httpx":
            raise metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "pydantic" else real(name)

    machine.patch.setattr(metadata, "version", version)
    code, todo, _ = machine.examine()
    assert (code, todo) == (1, {"packages": "httpx, pydantic not as locked: run make clean, then make setup"})


def test_another_python_is_to_do(machine: Healthy) -> None:
    """The version that runs, and the one to install."""
    machine.patch.setattr(sys, "version_info", (3, 12, 4, "final", 0))
    assert "install Python 3.13 and run make setup" in machine.examine()[1]["Python"]


def test_live_needs_the_keys(machine: Healthy) -> None:
    """Without them both are named; with them all is well."""
    code, todo, _ = machine.examine(live=True)
    assert code == 1
    assert "ALPHA_VANTAGE_KEY is not set; FINNHUB_KEY is not set" in todo["settings"]
    machine.patch.setenv("ALPHA_VANTAGE_KEY", "a-key")
    machine.patch.setenv("FINNHUB_KEY", "another")
    assert machine.examine(live=True)[:2] == (0, {})


def test_a_provider_without_a_key_is_left_out_and_nothing_to_do(
    machine: Healthy, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two keys are needed; the other two providers come in with theirs."""
    machine.patch.setenv("ALPHA_VANTAGE_KEY", "a-key")
    machine.patch.setenv("FINNHUB_KEY", "another")
    machine.patch.setenv("POLYGON_KEY", "a-third")
    assert examine(port=machine.port, data=machine.data, live=True) == 0
    said = capsys.readouterr().out
    assert "ok      Twelve Data: left out; TWELVE_DATA_KEY would bring it in" in said
    assert "ok      Polygon: key set, plan free" in said
    assert "a-third" not in said
    machine.patch.setenv("MARKET_PROVIDERS", "alpha_vantage,finnhub")
    assert examine(port=machine.port, data=machine.data, live=True) == 0
    assert "ok      Polygon: left out by MARKET_PROVIDERS (alpha_vantage,finnhub)" in capsys.readouterr().out


def test_a_provider_that_was_set_wrongly_is_to_do(machine: Healthy) -> None:
    """A key that was copied with a blank, an address that is none: each is named, and the key is not shown."""
    machine.patch.setenv("TWELVE_DATA_KEY", "my secret")
    machine.patch.setenv("POLYGON_URL", "api.massive.com")
    code, todo, last = machine.examine()
    assert (code, last, set(todo)) == (1, "2 to do", {"Twelve Data", "Polygon"})
    assert todo["Twelve Data"].startswith("TWELVE_DATA_KEY holds blanks")
    assert "secret" not in todo["Twelve Data"]
    assert todo["Polygon"] == "POLYGON_URL is no address: write one such as https://api.massive.com"


def test_a_wrong_setting_is_named(machine: Healthy) -> None:
    """The setting, and what can be written instead."""
    machine.patch.setenv("LOG_LEVEL", "LOUD")
    assert machine.examine()[1]["settings"].startswith("LOG_LEVEL is wrong: ")


def test_several_troubles_are_all_told(machine: Healthy) -> None:
    """One look finds everything there is to do."""
    machine.install_node("v1.0.0")
    machine.patch.setenv("LOG_LEVEL", "LOUD")
    machine.port = 65_535
    code, todo, last = machine.examine()
    assert (code, last) == (1, "3 to do")
    assert list(todo) == ["Node.js", "cloud's port", "settings"]
