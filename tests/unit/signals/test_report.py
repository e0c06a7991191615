"""The page of a backtest: complete, of one piece, and safe whatever names it was given."""

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest

from shared.market.models import Columns
from signals.backtest_models import Job, PurgedCV
from signals.logic.backtesting import Ground, chosen, folds_of, result_of
from signals.logic.simulation import Rules
from signals.report.rendering import METRICS, metric_rows, render
from tests.builders import daily_bars
from tests.unit.signals.backtest_house import prices
from tests.unit.signals.house import a_watcher

EVIL = """</script><script>alert(1)</script>"'&<img src=x onerror=alert(2)>{{ 7 * 7 }}"""
GRID = [{"fast": fast, "slow": 8} for fast in (2, 3)]


@pytest.fixture(scope="module")
def result() -> Mapping[str, Any]:
    """A result with a validation, from the engine itself."""
    bars = daily_bars(190, prices=prices(190))
    entry = a_watcher("cross", "sma_cross", fast=2, slow=8).entry
    job = Job(
        name="cross",
        entry=entry,
        symbol="AAPL",
        begin=bars[0].closed_at,
        first=bars[8].closed_at,
        last=bars[-1].closed_at,
        bars=182,
        warmup=8,
        provider="alpha_vantage",
        adjustment="raw",
        revision=3,
        rules=Rules(),
        validation=PurgedCV(kind="purged_cv", n_splits=2),
        candidates=GRID,
    )
    ground = Ground.of(job, Columns.of(bars))
    folds, hold_out = folds_of(job)
    tested = [ground.test(params, folds, hold_out.rows.start) for params in GRID]
    return result_of(
        ground, trials=2, trial_sharpes=[], choice=chosen(ground, tested), tested=tested, points=80, trades=9
    )


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and the content of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def test_the_page_has_no_need_of_anything_else(result: Mapping[str, Any]) -> None:
    """No file, no font, no picture from elsewhere: it can be mailed, and reading it tells nobody."""
    page = Page(render(result))
    for tag, attributes in page.elements:
        assert not attributes.get("src"), tag
        assert (attributes.get("href") or "data:,") == "data:,", tag
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttp|import\(", render(result))
    [policy] = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert policy.startswith("default-src 'none'")


def test_the_page_says_all_of_it(result: Mapping[str, Any]) -> None:
    """Metrics beside buy-and-hold, checks, folds, the hold-out, months, assumptions, parameters and variants."""
    page = Page(render(result))
    for _, names in METRICS:
        for label, _ in names.values():
            assert label in page.text
    for check in result["checks"]:
        assert check["detail"] in page.text
    for line in result["assumptions"]:
        assert line in page.text
    for fold in result["validation"]["folds"]:
        assert f"{fold['test'][0][0][:10]} to {fold['test'][0][1][:10]}" in page.text
    assert "Hold-out, opened once" in page.text
    assert "2 variants here, 2 on this series ever" in page.text
    assert page.text.count("✓") + page.text.count("✗") == len(result["checks"]) + len(result["validation"]["folds"])
    assert {str(one["year"]) for one in result["months"]} <= set(re.findall(r"\b20\d\d\b", page.text))


def test_a_search_is_judged_on_the_bars_that_nothing_was_chosen_by(result: Mapping[str, Any]) -> None:
    """A result on the bars of the search flatters; the check speaks of the hold-out alone, and the page warns."""
    hold_out = result["validation"]["hold_out"]
    [check] = [one for one in result["checks"] if one["name"] == "behind_on_hold_out"]
    assert check["is_passed"] is (hold_out["score"] > hold_out["benchmark"])
    assert f"Sharpe ratio {hold_out['score']:.2f} on the hold-out" in check["detail"]
    page = Page(render(result))
    assert "Ahead on the hold-out as well" in page.text
    assert "those that the parameters were chosen by included" in page.text


def test_every_metric_has_its_place(result: Mapping[str, Any]) -> None:
    """None that is measured is left out of the page, and what is undefined says why."""
    shown = {row["name"] for _, rows in metric_rows(result) for row in rows}
    assert shown == set(result["metrics"])
    undefined = {"value": None, "reason": "returns have no variance"}
    rows = metric_rows({**result, "metrics": {**result["metrics"], "sharpe": undefined}})
    [sharpe] = [row for _, group in rows for row in group if row["name"] == "sharpe"]
    assert (sharpe["value"], sharpe["reason"]) == ("n/a", "returns have no variance")


def test_the_drawings_have_the_same_numbers(result: Mapping[str, Any]) -> None:
    """What the script draws is what the result says."""
    [data, _] = Page(render(result)).scripts
    drawn = json.loads(data)
    assert drawn["at"] == result["curve"]["at"]
    assert drawn["equity"] == pytest.approx(result["curve"]["equity"], rel=1e-7)
    assert drawn["held"] == pytest.approx(result["curve"]["buy_and_hold"], rel=1e-7)
    assert [t["from"] for t in drawn["trades"]] == [t["entered_at"] for t in result["trades"]["items"]]
    assert drawn["holdOut"] == result["validation"]["hold_out"]["first_closed_at"]


def test_a_plain_backtest_has_no_validation(result: Mapping[str, Any]) -> None:
    """The page does without it."""
    page = Page(render({**result, "validation": None, "entry": None}))
    assert "Validation" not in page.text
    assert "sma_cross@1 on AAPL" in page.text
    assert json.loads(page.scripts[0])["holdOut"] is None


def test_everything_is_escaped(result: Mapping[str, Any]) -> None:
    """A name from a file or a provider stays text, in the page and in its data, and is no template."""
    evil = json.loads(json.dumps(result))
    evil |= {"entry": EVIL, "symbol": EVIL, "title": EVIL, "gates": [EVIL], "assumptions": [EVIL]}
    evil["provenance"] |= {"provider": EVIL, "adjustment": EVIL}
    evil["checks"][0] |= {"name": EVIL, "detail": EVIL}
    evil["metrics"]["sharpe"] = {"value": None, "reason": EVIL}
    evil["curve"]["at"][0] = EVIL
    html = render(evil)
    page = Page(html)
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script", "script"]
    assert page.text.count(EVIL) >= 8
    assert json.loads(page.scripts[0])["at"][0] == EVIL
    assert "<img" not in html


def test_no_name_of_the_template_is_missing(result: Mapping[str, Any]) -> None:
    """A field that a result lacks is an error, not an empty place."""
    from jinja2 import UndefinedError

    with pytest.raises((UndefinedError, KeyError)):
        render({name: value for name, value in result.items() if name != "fills"})
