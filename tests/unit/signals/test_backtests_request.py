"""What may be asked of a backtest: everything that cannot be is refused by the name of its field."""

import json
from datetime import UTC, datetime

import pytest
from pydantic import BaseModel, Field

from shared.errors import InvalidPayloadError
from signals.backtest_models import MOST_VARIANTS, Request, instants, variants
from signals.logic.strategies import STRATEGIES

SMA = STRATEGIES["sma_cross"].params


def read(text: str = "", **fields: object) -> Request:
    return Request.read(text or json.dumps({"strategy": "sma_cross", "symbol": "AAPL", **fields}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strategy": None}, "give an entry, or a strategy"),
        ({"entry": "sma-10-30"}, "give an entry, or a strategy"),
        ({"symbol": None}, "give a symbol"),
        ({"symbols": ["IBM"]}, "give a symbol"),
        ({"symbol": None, "symbols": [f"S{i}" for i in range(21)]}, "symbols: "),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"rules": {"fee": -1}}, "rules.fee: "),
        ({"rules": {"fees": 0.1}}, "rules.fees: Extra inputs"),
        ({"rules": {"side": "up"}}, "rules.side: "),
        ({"rules": {"cash": 0}}, "rules.cash: "),
        ({"rules": {"size": {"kind": "volatility", "target": 9}}}, "rules.size.target: "),
        ({"rules": {"exit": "horizon"}}, "rules: horizon belongs to"),
        ({"validation": "guess"}, "validation: "),
        ({"validation": {"kind": "walk_forward", "n_splits": 0}}, "validation.n_splits: "),
        ({"validation": {"kind": "walk_forward", "train_size": 50}}, "validation: train_size and test_size"),
        ({"validation": {"kind": "purged_cv", "n_splits": 3, "n_test_folds": 3}}, "validation: n_test_folds"),
        ({"validation": {"kind": "purged_cv", "hold_out": 0.9}}, "validation.hold_out: "),
        ({"grid": {"fast": [1, 2]}}, "grid needs a validation"),
        ({"params": {"fast": "quick"}}, "params.fast: "),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, object], said: str) -> None:
    """The text begins with the field, so that whoever sent it knows where to look."""
    with pytest.raises(InvalidPayloadError) as e:
        read(**fields)
    assert str(e.value).startswith(said)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("where", "field"),
    [('"params": {"fast": %s}', "params.fast"), ('"rules": {"fee": %s}', "rules.fee")],
)
def test_no_number_is_no_number(where: str, field: str, number: str) -> None:
    """JSON has no NaN, but readers of it let some through."""
    with pytest.raises(InvalidPayloadError, match=rf"^{field}: "):
        read(f'{{"strategy": "sma_cross", "symbol": "AAPL", {where % number}}}')


def test_what_is_no_json_is_refused() -> None:
    """With a text that says so."""
    with pytest.raises(InvalidPayloadError, match="JSON"):
        read("no json")


def test_a_validation_can_be_named_alone() -> None:
    """Its name takes the defaults."""
    assert read(validation="walk_forward").validation.kind == "walk_forward"
    assert read().validation.kind == "none"


def test_a_date_means_the_exchanges_whole_day() -> None:
    """New York's midnight is 5 o'clock UTC in winter; an instant is itself, and a bar that closes at it belongs."""
    assert instants("2012-01-03", "2012-01-03") == (
        datetime(2012, 1, 3, 5, tzinfo=UTC),
        datetime(2012, 1, 4, 5, tzinfo=UTC),
    )
    first, last = instants("2012-01-03T21:00:00Z", "2012-01-04T21:00:00Z")
    assert first is not None
    assert first < datetime(2012, 1, 3, 21, tzinfo=UTC)
    assert last == datetime(2012, 1, 4, 21, tzinfo=UTC)
    assert instants(None, None) == (None, None)


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        ("yesterday", None, "from: 'yesterday' is neither"),
        (None, "2012-02-30", "to: '2012-02-30' is neither"),
        (None, "2012-01-03T21:00:00", "to: "),
        ("2012-01-04", "2012-01-03", "from: 2012-01-04 does not lie before"),
    ],
)
def test_a_range_that_cannot_be_is_refused(first: str | None, last: str | None, said: str) -> None:
    """Neither a date nor an instant with a zone, or the wrong way round."""
    with pytest.raises(InvalidPayloadError, match=said):
        instants(first, last)


def test_the_grid_leaves_out_what_the_strategy_itself_rules_out() -> None:
    """Fast must be smaller than slow: such a combination is no mistake of the caller's, and equal ones are one."""
    found = variants({"fast": 10, "slow": 30}, {"fast": [5, 20, 5], "slow": [10, 20, 30]}, SMA)
    assert [(one["fast"], one["slow"]) for one in found] == [(5, 10), (5, 20), (5, 30), (20, 30)]


def test_without_a_grid_there_is_one_variant() -> None:
    """The parameters that were given."""
    assert variants({"fast": 10, "slow": 30}, {}, SMA) == [{"fast": 10, "slow": 30}]


@pytest.mark.parametrize(
    ("base", "grid", "said"),
    [
        ({"fast": 0, "slow": 30}, {}, "params.fast: "),
        ({"fast": 30, "slow": 10}, {}, "params: fast"),
        ({"fast": 3, "slow": 9}, {"quick": [1]}, "grid.quick: there is no such parameter; choose from fast, slow"),
        ({"fast": 3, "slow": 9}, {"fast": []}, "grid.fast: give at least one"),
        ({"fast": 3, "slow": 9}, {"fast": [2.5]}, "grid.fast: "),
        ({"fast": 3, "slow": 9}, {"fast": [-1, 2]}, "grid.fast: "),
        ({"fast": 3, "slow": 9}, {"fast": [50], "slow": [20]}, "grid: fast"),
        ({"fast": 3, "slow": 9}, {"fast": [*range(1, 31)], "slow": [*range(31, 51)]}, "grid: 600 variants; 500"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(
    base: dict[str, float], grid: dict[str, list[float]], said: str
) -> None:
    """In params or in the grid, whichever said it."""
    with pytest.raises(InvalidPayloadError) as e:
        variants(base, grid, SMA)
    assert str(e.value).startswith(said)


def test_the_largest_grid_is_still_taken() -> None:
    """500 variants."""

    class Wide(BaseModel):
        a: int = Field(default=1)
        b: int = Field(default=1)

    assert len(variants({}, {"a": [*range(50)], "b": [*range(10)]}, Wide)) == MOST_VARIANTS
