"""The entries file: what it may say, and how its mistakes are named."""

from datetime import time
from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.market.models import Interval
from shared.settings import Settings
from signals.adapters.entries_file import read_entries
from signals.logic.strategies import STRATEGIES
from signals.models import SessionGate, StateGate

GOOD = '[[entry]]\nname = "good"\nstrategy = "sma_cross"\n'


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "entries.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_shipped_file_is_valid_and_every_name_is_its_own() -> None:
    """What is delivered works: five entries watch whatever is watched, at all three intervals, three a few symbols."""
    entries = read_entries(Path(Settings.model_fields["entries_file"].default))
    assert [e.name for e in entries] == [
        "sma-10-30",
        "rsi-14",
        "bollinger-20",
        "sma-10-30-hourly",
        "bollinger-20-minute",
        "macd-in-trend",
        "donchian-20",
        "gap-3",
    ]
    assert {e.interval for e in entries} == set(Interval)
    assert all(e.symbols is None and not e.gates for e in entries[:5])
    assert all(e.symbols for e in entries[5:])
    [gate] = entries[5].gates
    assert gate.digest == "sma_cross@1(fast=1,slow=200)=agrees"


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    """Daily bars, all symbols and the strategy's own parameters."""
    [entry] = read_entries(write(tmp_path, GOOD))
    assert (entry.name, entry.strategy, entry.version) == ("good", "sma_cross", 1)
    assert entry.params == {"fast": 10, "slow": 30}
    assert entry.interval is Interval.DAY
    assert entry.symbols is None
    assert entry.lookback == 31
    assert (entry.gates, entry.horizon, entry.stale_after, entry.mute_without_edge) == ((), 10, 3, False)


def test_an_entry_says_what_it_is_meant_for_and_what_gates_it(tmp_path: Path) -> None:
    """Horizon, lateness, muting and gates are read as they are written; the lookback covers what gates."""
    text = """
        interval = "1m"
        gate = [{ strategy = "adx_trend", params = { period = 7 }, agrees = false }, { session = "10:00-15:30" }]
        horizon = 30
        stale_after = 1
        mute_without_edge = true
    """
    [entry] = read_entries(write(tmp_path, GOOD + text))
    assert (entry.horizon, entry.stale_after, entry.mute_without_edge) == (30, 1, True)
    state, session = entry.gates
    adx = STRATEGIES["adx_trend"]
    assert state == StateGate(
        strategy="adx_trend",
        version=adx.version,
        params={"period": 7, "level": 25},
        agrees=False,
        lookback=adx.lookback(adx.params(period=7)),
    )
    assert session == SessionGate(first=time(10), last=time(15, 30))
    assert entry.lookback == state.lookback > 31


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
    ('name = "a"', "entry 2 (a): strategy None is unknown; choose from sma_cross, macd_cross, adx_trend"),
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
    (
        'name = "a"\nstrategy = "sma_cross"\nparams = { fast = inf }',
        "entry 2 (a): params.fast: Input should be a finite",
    ),
    (
        'name = "a"\nstrategy = "gap"\ninterval = "1m"',
        "entry 2 (a): interval: gap makes no sense at 1m; write 1d",
    ),
    (
        'name = "a"\nstrategy = "vwap_deviation"',
        "entry 2 (a): interval: vwap_deviation makes no sense at 1d; write 1h or 1m",
    ),
    *(
        (f'name = "a"\nstrategy = "sma_cross"\n{field} = {value}', f"entry 2 (a): {field} is {shown}; write a number")
        for field in ("horizon", "stale_after")
        for value, shown in (
            ("0", "0"),
            ("-1", "-1"),
            ("10001", "10001"),
            ("1.5", "1.5"),
            ("true", "True"),
            ('"5"', "'5'"),
        )
    ),
    (
        'name = "a"\nstrategy = "sma_cross"\nmute_without_edge = 1',
        "entry 2 (a): mute_without_edge is 1; write true or false",
    ),
    *(
        (f'name = "a"\nstrategy = "sma_cross"\ninterval = "1h"\ngate = {gate}', f"entry 2 (a): {said}")
        for gate, said in (
            ('"adx_trend"', "gate is 'adx_trend'; write a list such as [{ strategy"),
            ("{ strategy = 'adx_trend' }", "gate is {'strategy': 'adx_trend'}; write a list"),
            ("['adx_trend']", "gate is ['adx_trend']; write a list"),
            ("[{}]", "gate 1: strategy None keeps no state that could gate; choose from sma_cross, macd_cross"),
            ("[{ strategy = 'gap' }]", "gate 1: strategy 'gap' keeps no state that could gate; choose from"),
            ("[{ strategy = ['adx_trend'] }]", "gate 1: strategy ['adx_trend'] keeps no state"),
            (
                "[{ strategy = 'adx_trend', agree = true }]",
                "gate 1: agree is no field of a gate; use session, or strat",
            ),
            ("[{ strategy = 'adx_trend', agrees = 'yes' }]", "gate 1: agrees is 'yes'; write true or false"),
            (
                "[{ session = '10:00-15:30' }, { strategy = 'adx_trend', params = { period = 1 } }]",
                "gate 2: params.period: Input should be greater than or equal to 2",
            ),
            ("[{ session = '10:00-15:30', agrees = true }]", "gate 1: session stands alone; write strategy, params"),
            ("[{ session = '10-15' }]", "gate 1: session is '10-15'; write two exchange times such as"),
            ("[{ session = '10:00-24:00' }]", "gate 1: session is '10:00-24:00'; write two exchange times such as"),
            ("[{ session = 10 }]", "gate 1: session is 10; write two exchange times such as"),
            ("[{ session = '15:30-10:00' }]", "gate 1: session 15:30-10:00 ends before it begins; write the earlier"),
        )
    ),
    (
        'name = "a"\nstrategy = "sma_cross"\ngate = [{ session = "10:00-15:30" }]',
        "entry 2 (a): gate 1: session: a daily bar has no time of day; use it at 1h or 1m",
    ),
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
