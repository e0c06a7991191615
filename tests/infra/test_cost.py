"""What storage is asked for is counted, written down, and cannot grow unnoticed."""

import json
from pathlib import Path

import pytest

from infra.cost.counting import charge
from infra.cost.scenario import Measured, run
from infra.cost.table import Assumptions, month, recorded_operations, report
from shared.settings import ROOT

RECORDED = Path(__file__).with_name("cost_operations.json")


@pytest.fixture(scope="module")
def measured() -> Measured:
    return run()


def test_a_bar_without_a_signal_stays_cheap(measured: Measured) -> None:
    """At most 2 writes and 3 reads, plus one for the one lookback page a new quarter leaves uncached."""
    cost = measured.costs["bar without a signal"]
    assert cost.most_writes <= 2
    assert cost.most_reads <= 3 + 1
    reads = sum(n for what, n in cost.each.items() if what.split()[0] in ("read", "page") and "quota" not in what)
    assert reads - cost.each["read system"] <= 3.05


def test_no_operation_was_added_unnoticed(measured: Measured) -> None:
    """If this fails on purpose, write the new counts into cost_operations.json and run troop cost for the docs."""
    assert recorded_operations(measured) == json.loads(RECORDED.read_text())


def test_the_page_shows_what_is_counted(measured: Measured) -> None:
    """docs/operations.md carries the tables as troop cost prints them."""
    page = (ROOT / "docs/operations.md").read_text()
    shown = page.split("<!-- troop cost -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == report(measured, Assumptions())


def test_more_of_anything_costs_more(measured: Measured) -> None:
    """The month grows with symbols, with subscribers and with what they do."""
    small = month(measured, 10, 100, Assumptions())
    assert small.units < month(measured, 1_000, 100, Assumptions()).units
    assert small.units < month(measured, 10, 10_000, Assumptions()).units
    assert small.units < month(measured, 10, 100, Assumptions(reads=600)).units


def test_model_follows_the_documented_ratios() -> None:
    """A kB read is 1 RU, an insert about 5.5 and a replace about twice that, before indexes (delivery facts A4)."""
    assert charge("read", 1, 1) == 1
    assert charge("create", 1, 1) == pytest.approx(7.0)
    assert charge("replace", 1, 1) == pytest.approx(12.5)
    assert charge("page", 4, 0) == pytest.approx(2.5)
