"""The one command line: what can be asked, what is refused, and that it only delegates."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import infra.doctor
import infra.local.up.supervisor
import infra.watch
from infra.cli import app
from infra.local.up.supervisor import Options
from shared.settings import ROOT


class Asked:
    """Stands where the work is done, remembers what was asked, and ends with an exit code of its own."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.with_: Any = None


def troop(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked(3)

    class Standin:
        def __init__(self, options: Options) -> None:
            asked.with_ = options

        async def run(self) -> int:
            await asyncio.sleep(0)
            return asked.code

    monkeypatch.setattr(infra.local.up.supervisor, "Supervisor", Standin)
    return asked


def test_up_without_options_replays_a_market_day_a_second(supervisor: Asked) -> None:
    """The defaults are what `make run` shows a newcomer."""
    assert troop("up").exit_code == supervisor.code
    options = supervisor.with_
    assert (options.host, options.port, options.instances, options.live) == ("127.0.0.1", 7071, 1, False)
    assert (options.data, options.plan) == (ROOT / ".troop", "premium")
    replay = options.replay
    assert (replay.symbols, replay.interval, replay.folder, replay.speed) == (None, "1d", None, 86_400)
    assert (replay.first, replay.last) == (None, None)


def test_up_passes_on_every_option(supervisor: Asked) -> None:
    """What the user writes is what the supervisor gets; the exit code is the supervisor's."""
    said = troop(
        *("up", "--host", "0.0.0.0", "--port", "7500", "--instances", "3", "--replay", "bars", "--speed", "3600"),
        *("--symbols", "A,B", "--interval", "1h", "--from", "2012-03-01", "--to", "2012-04-01"),
        *("--data", "kept", "--plan", "unlimited", "--live"),
    )
    assert said.exit_code == supervisor.code
    options = supervisor.with_
    assert (options.host, options.port, options.instances, options.live) == ("0.0.0.0", 7500, 3, True)
    assert (options.data, options.plan) == (Path("kept"), "unlimited")
    replay = options.replay
    assert (replay.symbols, replay.interval, replay.folder, replay.speed) == ("A,B", "1h", Path("bars"), 3600)
    assert (replay.first, replay.last) == ("2012-03-01", "2012-04-01")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "0"),
        ("--port", "65536"),
        ("--port", "http"),
        ("--instances", "0"),
        ("--instances", "17"),
        ("--speed", "-1"),
        ("--speed", "1000000"),
        ("--interval", "5m"),
        ("--plan", "gold"),
        ("--color", "red"),
    ],
)
def test_an_option_that_cannot_be_is_named(supervisor: Asked, option: str, value: str) -> None:
    """Exit code 2, the option, and nothing is started."""
    said = troop("up", option, value)
    assert said.exit_code == 2
    assert option in said.output
    assert supervisor.with_ is None


def test_watch_listens_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address and the symbols are passed on, and the exit code comes back."""
    asked = Asked(4)

    async def listen(url: str, symbols: str) -> int:
        asked.with_ = (url, symbols)
        return asked.code

    monkeypatch.setattr(infra.watch, "watch", listen)
    assert troop("watch").exit_code == 4
    assert asked.with_ == ("http://127.0.0.1:7071", "all")
    troop("watch", "--url", "https://troop.example.com", "--symbols", "AAPL")
    assert asked.with_ == ("https://troop.example.com", "AAPL")


def test_doctor_examines_what_up_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port, folder and mode are passed on, and the exit code comes back."""
    asked = Asked(1)

    def examine(**with_: object) -> int:
        asked.with_ = with_
        return asked.code

    monkeypatch.setattr(infra.doctor, "examine", examine)
    assert troop("doctor", "--port", "7500", "--data", "kept", "--live").exit_code == 1
    assert asked.with_ == {"port": 7500, "data": Path("kept"), "live": True}
    troop("doctor")
    assert asked.with_ == {"port": 7071, "data": ROOT / ".troop", "live": False}


def test_without_a_command_it_says_what_there_is() -> None:
    """Each command in one line."""
    said = troop()
    for command in ("up", "watch", "doctor"):
        assert command in said.output
