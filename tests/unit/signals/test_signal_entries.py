"""The entries file: what it may say, and how its mistakes are named."""

from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.market.models import Interval
from shared.settings import Settings
from signals.adapters.entries_file import read_entries

GOOD = '[[entry]]\nname = "good"\nstrategy = "sma_cross"\n'


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "entries.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_shipped_file_is_valid_and_every_name_is_its_own() -> None:
    """What is delivered works: five entries, at all three intervals, watching whatever is watched."""
    entries = read_entries(Path(Settings.model_fields["entries_file"].default))
    assert [e.name for e in entries] == [
        "sma-10-30",
        "rsi-14",
        "bollinger-20",
        "sma-10-30-hourly",
        "bollinger-20-minute",
    ]
    assert {e.interval for e in entries} == set(Interval)
    assert all(e.symbols is None for e in entries)


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    """Daily bars, all symbols and the strategy's own parameters."""
    [entry] = read_entries(write(tmp_path, GOOD))
    assert (entry.name, entry.strategy, entry.version) == ("good", "sma_cross", 1)
    assert entry.params == {"fast": 10, "slow": 30}
    assert entry.interval is Interval.DAY
    assert entry.symbols is None
    assert entry.lookback == 31


def test_symbols_are_normalised(tmp_path: Path) -> None:
    """aapl is AAPL."""
    [entry] = read_entries(write(tmp_path, GOOD + 'symbols = ["aapl", "BRK.B"]\ninterval = "1h"\n'))
    assert entry.symbols == frozenset({"AAPL", "BRK.B"})
    assert entry.interval is Interval.HOUR


def test_a_file_without_entries_watches_nothing(tmp_path: Path) -> None:
    """An empty file is a choice, not a mistake."""
    assert read_entries(write(tmp_path, "# nothing yet\n")) == []


BAD_ENTRIES = [
    ('strategy = "sma_cross"', "entry 2: name must be a text without |"),
    ('name = ""\nstrategy = "sma_cross"', "entry 2: name must be a text without |"),
    ('name = 5\nstrategy = "sma_cross"', "entry 2: name must be a text without |"),
    ('name = "a|b"\nstrategy = "sma_cross"', "entry 2: name must be a text without |"),
    ('name = "a"', "entry 2 (a): strategy None is unknown; choose from sma_cross, rsi_reversal, bollinger_breakout"),
    ('name = "a"\nstrategy = "magic"', "entry 2 (a): strategy 'magic' is unknown; choose from sma_cross"),
    ('name = "a"\nstrategy = ["sma_cross"]', "entry 2 (a): strategy ['sma_cross'] is unknown"),
    ('name = "a"\nstrategy = "sma_cross"\nsymbol = "AAPL"', "entry 2: symbol is no field of an entry; use name"),
    (
        'name = "a"\nstrategy = "sma_cross"\ninterval = "5m"',
        "entry 2 (a): interval: '5m' is no interval: use one of 1d",
    ),
    ('name = "a"\nstrategy = "sma_cross"\ninterval = 1', "entry 2 (a): interval: '1' is no interval"),
    ('name = "a"\nstrategy = "sma_cross"\nsymbols = "AAPL"', "entry 2 (a): symbols is 'AAPL'; write \"all\" or a list"),
    ('name = "a"\nstrategy = "sma_cross"\nsymbols = []', "entry 2 (a): symbols is []; write"),
    ('name = "a"\nstrategy = "sma_cross"\nsymbols = [1]', "entry 2 (a): symbols is [1]; write"),
    ('name = "a"\nstrategy = "sma_cross"\nsymbols = 5', "entry 2 (a): symbols is 5; write"),
    ('name = "a"\nstrategy = "sma_cross"\nsymbols = ["A A"]', "entry 2 (a): symbols: 'A A' is no symbol: use 1 to 15"),
    (
        'name = "a"\nstrategy = "sma_cross"\nparams = { fast = 50 }',
        "entry 2 (a): params: Value error, fast (50) must be smaller than slow (30)",
    ),
    ('name = "a"\nstrategy = "sma_cross"\nparams = { fast = 0 }', "entry 2 (a): params.fast: Input should be greater"),
    ('name = "a"\nstrategy = "sma_cross"\nparams = { fats = 5 }', "entry 2 (a): params.fats: Extra inputs are not"),
    (
        'name = "a"\nstrategy = "sma_cross"\nparams = { fast = "x" }',
        "entry 2 (a): params.fast: Input should be a valid",
    ),
    ('name = "a"\nstrategy = "rsi_reversal"\nparams = { low = nan }', "entry 2 (a): params.low: Input should be"),
    ('name = "a"\nstrategy = "sma_cross"\nparams = 5', "entry 2 (a): params: Input should be a valid dictionary"),
    (GOOD.removeprefix("[[entry]]\n"), "name good is there twice; every entry needs one of its own"),
]


@pytest.mark.parametrize(("text", "said"), BAD_ENTRIES)
def test_a_wrong_entry_is_named_with_its_file_its_number_and_its_field(tmp_path: Path, text: str, said: str) -> None:
    """The second entry is wrong: the text says where and what to write instead."""
    path = write(tmp_path, f"{GOOD}\n[[entry]]\n{text}\n")
    with pytest.raises(ConfigurationError) as e:
        read_entries(path)
    assert str(path) in str(e.value)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[entry\n", "line 1"),
        (b'[[entry]]\nname = "\xff"\n', "utf-8"),
        ('[entry]\nname = "a"\n', "begin each entry with a line [[entry]]"),
        ('[[entries]]\nname = "a"\n', "entries is not known here; begin each entry with a line [[entry]]"),
        ('entry = ["sma_cross"]\n', "entry 1: 'sma_cross' is no table; begin each entry with a line [[entry]]"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, text: str | bytes, said: str) -> None:
    """A file whose entries would silently be ignored is refused."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as e:
        read_entries(path)
    assert str(path) in str(e.value)
    assert said in str(e.value)


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    """The operator learns which setting points nowhere."""
    with pytest.raises(ConfigurationError, match=r"ENTRIES_FILE: .*gone\.toml cannot be read: No such file"):
        read_entries(tmp_path / "gone.toml")
