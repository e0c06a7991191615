"""`troop backtest`: what it prints, what it writes, what it remembers, and how it ends."""

import asyncio
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from infra.backtest import numbers, register
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.errors import ConfigurationError
from shared.market.models import Interval
from shared.market.stores import Bars, Series, SeriesStore
from tests.builders import WALL, daily_bars
from tests.unit.signals.backtest_house import prices

APP = typer.Typer()
register(APP)
SHORT = ("--from", "2011-01-03", "--to", "2011-12-30")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "kept.db"


def troop(*arguments: object, store: Path | None = None) -> Result:
    kept = ["--samples", "--store", str(store)] if store else []
    texts = [*map(str, arguments), *kept]
    return CliRunner().invoke(APP, texts, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_a_strategy_is_tried_on_recorded_bars(store: Path, tmp_path: Path) -> None:
    """A table with buy-and-hold beside and the checks, a page, and the same numbers as JSON."""
    page, numbers_ = tmp_path / "page.html", tmp_path / "page.json"
    result = troop(
        "sma_cross", "goog", "--params", "fast=5", "slow=20", *SHORT, "--report", page, "--json", numbers_, store=store
    )
    assert result.exit_code == 0, result.output
    said = json.loads(numbers_.read_text())
    assert said["params"] == {"fast": 5, "slow": 20}
    assert (said["range"]["first_closed_at"][:10], said["range"]["last_closed_at"][:10]) == ("2011-01-03", "2011-12-30")
    total, held = (said[name]["total_return"]["value"] for name in ("metrics", "buy_and_hold"))
    [line] = [line for line in result.output.splitlines() if line.strip().startswith("Total return ")]
    assert line.split()[-2:] == [f"{total:.2%}", f"{held:.2%}"]
    for check in said["checks"]:
        assert f"{'✓' if check['is_passed'] else '✗'} {check['name']} " in result.output
    assert f"{total:.2%}" in page.read_text()
    assert "bokeh-sampledata" in page.read_text()


def test_an_entry_is_tried_by_its_name(store: Path, tmp_path: Path) -> None:
    """Of the file that is named; its parameters are its own."""
    entries = tmp_path / "entries.toml"
    entries.write_text('[[entry]]\nname = "mine"\nstrategy = "donchian_breakout"\nparams = { period = 9 }\n')
    result = troop("mine", "IBM", *SHORT, "--entries", entries, store=store)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("mine on IBM at 1d  period=9\n")


def test_parameters_are_chosen_and_the_hold_out_is_opened_once(store: Path) -> None:
    """The same command shows the same result; another grid on the same range is refused and nothing is shown."""
    search = ("sma_cross", "MSFT", "--walk-forward", "2", "--from", "2009-01-02", "--to", "2011-12-30")
    first = troop(*search, "--grid", "fast=3,5", "slow=20:30:10", store=store)
    assert first.exit_code == 0, first.output
    assert "hold-out, opened once" in first.output
    assert "after 4 variants tried on this series" in first.output
    again = troop(*search, "--grid", "fast=3,5", "slow=20:30:10", store=store)
    assert again.output == first.output
    other = troop(*search, "--grid", "fast=4,6", "slow=20,30", store=store)
    assert other.exit_code == 1
    assert "were opened by backtest" in other.output
    assert "Sharpe" not in other.output
    plain = troop("sma_cross", "MSFT", "--params", "fast=4 slow=20", *SHORT, store=store)
    assert "after 5 variants tried on this series" in plain.output


def test_a_page_that_has_no_place_is_refused_before_the_hold_out_is_opened(store: Path, tmp_path: Path) -> None:
    """Nothing was done: the same search with another grid is still free."""
    search = ("sma_cross", "IBM", "--purged-cv", "2", "--from", "2009-01-02", "--to", "2011-12-30")
    for option in ("--report", "--json"):
        result = troop(*search, "--grid", "fast=3,5", option, tmp_path / "none" / "out", store=store)
        assert result.exit_code == 2
        assert f"{option}: there is no folder" in result.output
        assert f"{option}: {tmp_path} is a folder" in troop(*search, option, tmp_path, store=store).output
    assert troop(*search, "--grid", "fast=4,6", store=store).exit_code == 0


def test_strict_tells_by_its_exit_code_that_a_check_failed(store: Path) -> None:
    """3, so that a script can refuse what does not convince."""
    assert troop("gap", "MSFT", *SHORT, "--strict", store=store).exit_code == 3
    assert troop("gap", "MSFT", *SHORT, store=store).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("magic", "AAPL"), "strategy: 'magic' is unknown"),
        (("sma_cross", "ZZZZ"), "no data package has ZZZZ at 1d"),
        (("sma_cross", "no symbol"), "is no symbol"),
        (("sma_cross", "AAPL", "--interval", "1w"), "is no interval"),
        (("sma_cross", "AAPL", "--params", "fast"), "--params: 'fast' cannot be read"),
        (("sma_cross", "AAPL", "--params", "fast=1,2"), "give them to --grid"),
        (("sma_cross", "AAPL", "--params", "fast=nan"), "params.fast: "),
        (("sma_cross", "AAPL", "--params", "fast=50"), "params: "),
        (("sma_cross", "AAPL", "--fees", "-1"), "rules.fee: "),
        (("sma_cross", "AAPL", "--side", "up"), "rules.side: "),
        (("sma_cross", "AAPL", "--target-vol", "9"), "rules.size.target: "),
        (("sma_cross", "AAPL", "--from", "2030-01-01"), "from, to: 0 bars"),
        (("sma_cross", "AAPL", "--from", "soon"), "from: 'soon' is neither"),
        (("sma_cross", "AAPL", "--grid", "fast=1,2"), "grid needs a validation"),
        (("sma_cross", "AAPL", "--walk-forward", "2", "--purged-cv", "2"), "choose one of them"),
        (("sma_cross", "AAPL", "--walk-forward", "2", "--grid", "fast=1:600:1"), "grid: 600 variants"),
    ],
)
def test_what_cannot_be_ends_with_2_and_a_sentence(store: Path, arguments: tuple[str, ...], said: str) -> None:
    """It names the field or the option; there is no traceback."""
    result = troop(*arguments, store=store)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("troop backtest: ")
    assert said in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_search_that_finds_nothing_ends_with_1(store: Path) -> None:
    """With the reason."""
    result = troop("gap", "MSFT", "--params", "size=0.5", "--purged-cv", "2", store=store)
    assert result.exit_code == 1
    assert "no candidate has a score" in result.output


def test_stored_bars_are_read_from_the_apps_own_storage(tmp_path: Path) -> None:
    """By its folder or its URL; a file that is not there is not made."""
    file = tmp_path / "app.db"

    async def fill() -> None:
        documents = SQLiteDocuments(file, SystemClock())
        store = SeriesStore(documents, SystemClock())
        await store.create(Series(symbol="ACME", interval=Interval.DAY, live_from=WALL, provider="polygon"))
        await Bars(documents, SystemClock()).append("ACME|1d", Interval.DAY, 0, daily_bars(120, prices=prices(120)))
        await documents.close()

    asyncio.run(fill())
    asked = ("sma_cross", "ACME", "--params", "fast=3 slow=9")
    by_folder = troop(*asked, "--data", tmp_path)
    assert by_folder.exit_code == 0, by_folder.output
    assert "111 bars from polygon, revision 0" in by_folder.output
    assert troop(*asked, "--db", f"sqlite:{file}").output == by_folder.output
    missing = troop(*asked, "--data", tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert "--samples" in missing.output
    assert not (tmp_path / "nowhere").exists()
    unknown = troop("sma_cross", "IBM", "--data", tmp_path)
    assert unknown.exit_code == 2
    assert "symbol: no bars of IBM at 1d are stored" in unknown.output


def test_values_are_read_one_by_one_or_as_a_range() -> None:
    """``k=v`` alone is a parameter, with several values a grid; a range has both of its ends."""
    assert numbers(["a=1 b=2.5"], ["c=1"], ["d=3", "e=4,5"]) == ({"a": 1, "b": 2.5, "d": 3}, {"c": [1], "e": [4, 5]})
    assert numbers([], ["f=0.1:0.5:0.1"], [])[1] == {"f": [0.1, 0.2, 0.3, 0.4, 0.5]}


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=x", "a=1:2", "a=3:1:1", "a=1:9:0", "a=1:1e9:1"])
def test_what_cannot_be_read_is_shown(text: str) -> None:
    """With what to write instead."""
    with pytest.raises(ConfigurationError, match="write such as fast=10"):
        numbers([], [text], [])
