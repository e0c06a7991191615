"""The benchmarks' promise to whoever reads their output: the last line of stdout is one JSON object."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest

from bench._market import write_market
from bench._report import quantile
from infra.local.replay.samples import load_folder
from shared.settings import ROOT


def run(*arguments: str) -> dict[str, float]:
    """The figures of a benchmark, run as `make bench` runs it."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "CONTENT_DIGEST_SETTLE_SECONDS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["bench"] == arguments[0].removeprefix("bench.")
    return said["figures"]


class TestFigures:
    def test_a_quantile_is_one_of_the_values(self):
        """At least the share asked for does not exceed it."""
        values = [5.0, 1.0, 4.0, 2.0, 3.0]

        assert [quantile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1.0, 1.0, 3.0, 5.0, 5.0]

    def test_every_symbol_has_as_many_bars_on_the_same_sessions(self, tmp_path):
        """The market can be replayed, also where the record of a symbol is shorter than what is wanted."""
        market = write_market(tmp_path / "market", symbols=3, history=240, days=10)

        catalogue = load_folder(tmp_path / "market")
        closes = [[bar.closed_at for bar in series.bars] for series in catalogue.values()]
        assert catalogue.symbols == list(market.symbols)
        assert len(market.symbols) == 3
        assert all(len(own) == 250 for own in closes)
        assert all(one == other for one, other in pairwise(closes))
        assert (closes[0][239], closes[0][-1]) == (market.history_closes_at, market.closes_at)


@pytest.mark.e2e
class TestRuns:
    def test_coldstart_says_its_ratios(self):
        """Both sides load the same libraries and do the same work, or there is no figure."""
        figures = run("bench.coldstart", "--runs", "1")

        assert {"first_event_vs_bare", "index_vs_sdks"} <= figures.keys()
        assert all(value > 0 for value in figures.values())

    def test_the_pipeline_counts_what_it_did(self):
        """Every bar is stored and every live signal is pushed, or there is no figure."""
        figures = run("bench.pipeline", "--symbols", "12", "--history", "40", "--days", "5", "--within", "100")

        assert {"events_per_s", "p50_ms", "p99_ms", "peak_mb"} <= figures.keys()
        assert figures["bars"] == 12 * 45
        assert 0 < figures["signals"] == figures["pushed"]
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]
