"""`troop strategies`: what is listed, what a check of one's own file says, and how its mistakes are named."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from infra.strategies import MODULE, app, invented_bars, read_strategies
from shared.errors import ConfigurationError
from shared.market.models import Interval, instant_of
from shared.market.sessions import calendar
from signals.logic.strategies import STRATEGIES

GOOD = """
from signals.logic.strategies import Marks, Params, Strategy, said


class Steps(Params):
    bars: int = 3


def mark(bars, params):
    now, past = bars.now(bars.close), bars.ago(bars.close, params.bars)
    before, past_before = bars.ago(bars.close), bars.ago(bars.close, params.bars + 1)
    return said(
        bars,
        long=(now > past) & (before <= past_before),
        short=(now < past) & (before >= past_before),
        strength=abs(now / past - 1) * 10,
        features={"past": past},
    )


STEPS = Strategy(name="steps", version=1, title="it steps", params=Steps, lookback=lambda p: p.bars + 2, mark=mark)
"""
CHEAT = (
    GOOD
    + """

def peek(bars, params):
    import numpy as np
    rises = np.append(bars.close[1:] > bars.close[:-1], False)
    marks = mark(bars.cut(0, len(bars)), params)
    return Marks(direction=np.where(rises, marks.direction, 0), strength=marks.strength, features={})


PEEK = Strategy(name="peek", version=2, title="it peeks", params=Steps, lookback=lambda p: p.bars + 2, mark=peek)
"""
)


def troop(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.py"


def test_every_strategy_is_listed_with_what_it_takes() -> None:
    """Name and version, when it speaks, its parameters, bars, intervals and horizon."""
    lines = troop("list").output.splitlines()
    assert [line.split("@")[0] for line in lines[1:]] == list(STRATEGIES)
    [rsi] = [line for line in lines if line.startswith("rsi_reversal@1")]
    assert "period=14 low=30 high=70" in rsi
    assert rsi.split()[-5:] == ["576", "1d", "1h", "1m", "5"]
    assert STRATEGIES["rsi_reversal"].title in rsi


def test_an_honest_strategy_of_ones_own_passes(file: Path) -> None:
    """On recorded and on invented bars, at the interval that was asked for."""
    file.write_text(GOOD)
    result = troop("check", str(file), "--symbol", "ibm", "--interval", "1d")
    assert result.exit_code == 0, result.output
    first, second, last = result.output.splitlines()
    assert first.startswith("ok      steps@1 at 1d on IBM's bars: 1500 bars, ")
    assert second.startswith("ok      steps@1 at 1d on invented bars: 1500 bars, ")
    assert last == "2 checks, all passed"


def test_a_cheat_fails_and_the_text_names_the_bar_and_what_differs(file: Path) -> None:
    """The exit code is 1; the honest strategy beside it passes."""
    file.write_text(CHEAT)
    result = troop("check", str(file), "--interval", "1d")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line.split()[:2] for line in lines if line[0] != " "] == [
        ["ok", "steps@1"],
        ["ok", "steps@1"],
        ["FAILED", "peek@2"],
        ["FAILED", "peek@2"],
        ["4", "checks,"],
    ]
    assert lines[-1] == "4 checks, 2 failed"
    [told, *_] = [line for line in lines if line.startswith("        looks ahead at bar ")]
    assert "UTC: with the bars after number" in told
    assert "it used bars that had not closed yet" in told


def test_a_strategy_that_says_nothing_passes_with_a_warning(file: Path) -> None:
    """No difference was found because there was nothing to differ."""
    file.write_text(GOOD.replace("(now > past)", "(now > 1e9 * past)").replace("(now < past)", "(now < 0)"))
    result = troop("check", str(file), "--interval", "1d")
    assert result.exit_code == 0
    assert result.output.count("It said nothing, which proves little: check it on other bars.") == 2


WRONG = [
    ("", "defines no strategy: write one at its top level, such as MINE = Strategy("),
    ("STEPS = 5", "defines no strategy"),
    ("x = 1\ny = (", "mine.py, line 2: '(' was never closed"),
    (
        "x = 1\n\nimport no_such_module_here",
        "mine.py, line 3: ModuleNotFoundError: No module named 'no_such_module_here'",
    ),
    ("raise SystemExit(3)", "mine.py, line 1: SystemExit: 3"),
    ("def f():\n    return 1 / 0\n\nf()", "mine.py, line 2: ZeroDivisionError: division by zero"),
    (GOOD.replace("version=1, ", ""), "TypeError: Strategy.__init__() missing 1 required keyword-only argument"),
    (
        GOOD + "AGAIN = Strategy(name='steps', version=2, title='', params=Steps, lookback=len, mark=mark)\n",
        "steps is there twice",
    ),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_file_that_cannot_be_used_is_explained(file: Path, text: str, said: str) -> None:
    """The exit code is 2; the text names the file, the line and the reason."""
    file.write_text(text)
    result = troop("check", str(file))
    assert result.exit_code == 2
    assert said in result.output
    assert str(file) in result.output
    assert "Traceback" not in result.output


def test_a_file_that_is_none_is_explained(tmp_path: Path) -> None:
    """Neither a folder nor a text file is one."""
    assert "gone.py is no file: name a Python file" in troop("check", str(tmp_path / "gone.py")).output
    assert "is no file" in troop("check", str(tmp_path)).output
    (tmp_path / "mine.txt").write_text(GOOD)
    result = troop("check", str(tmp_path / "mine.txt"))
    assert (result.exit_code, "its name must end in .py" in result.output) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--symbol", "A A"], "'A A' is no symbol"),
        (["--symbol", "ZZZZ"], "no data package has ZZZZ at 1d"),
        (["--interval", "5m"], "'5m' is no interval: use one of 1d, 1h, 1m"),
        (["--interval", "1m", "--symbol", "IBM"], "no data package has IBM at 1m"),
    ],
)
def test_bars_that_do_not_exist_are_explained(file: Path, options: list[str], said: str) -> None:
    """The exit code is 2 and the text says what there is."""
    file.write_text(GOOD)
    result = troop("check", str(file), *options)
    assert (result.exit_code, said in result.output) == (2, True)


def test_an_interval_at_which_nothing_makes_sense_is_no_pass(file: Path) -> None:
    """Nothing checked is nothing proven."""
    file.write_text(GOOD.replace("mark=mark)", "mark=mark, intervals=('1d',))"))
    result = troop("check", str(file), "--interval", "1h")
    assert result.exit_code == 2
    assert "nothing makes sense at 1h: steps (1d)" in result.output


def test_strategies_in_a_list_are_found_once(file: Path) -> None:
    """However often a file names the same one; what it imports of ours in a mapping is not its own."""
    file.write_text(GOOD + "ALL = [STEPS, STEPS]\nfrom signals.logic.strategies import STRATEGIES\n")
    assert [one.name for one in read_strategies(file)] == ["steps"]
    assert sys.modules[MODULE].__file__ == str(file)


def test_a_file_is_read_anew_each_time(file: Path) -> None:
    """A corrected file is the one that is checked."""
    file.write_text("nothing = 1")
    with pytest.raises(ConfigurationError):
        read_strategies(file)
    file.write_text(GOOD)
    assert read_strategies(file)[0].name == "steps"


@pytest.mark.parametrize("interval", list(Interval))
def test_invented_bars_could_be_true_and_are_the_same_each_time(interval: Interval) -> None:
    """They tile real sessions and keep every rule of a bar; another seed gives others."""
    bars, again = invented_bars(interval, count=300), invented_bars(interval, count=300)
    assert all((getattr(bars, name) == getattr(again, name)).all() for name in ("open", "close", "volume", "closed"))
    assert (bars.close != invented_bars(interval, count=300, seed=1).close).any()
    assert (bars.low <= bars.open.clip(max=bars.close)).all()
    assert (bars.high >= bars.open.clip(min=bars.close)).all()
    assert bars.low.min() > 0
    assert (bars.opened[1:] >= bars.closed[:-1]).all()
    for i in range(0, 300, 37):
        opened = instant_of(int(bars.opened[i]))
        assert calendar().bar_opening_at(interval, opened) == instant_of(int(bars.closed[i]))
