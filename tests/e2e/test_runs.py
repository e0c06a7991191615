"""The same bars give the same ledger: at any speed, with any number of instances, twins, disorder and kills."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Running, troop_up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SPAN = ("--from", "2012-03-01", "--to", "2012-04-20")
FAST = ("--speed", "864000")


class Ledger:
    """Everything a run left behind that people can see."""

    def __init__(self, run: Running) -> None:
        self.signals = {s["signal_id"]: s for s in run.everything("/api/signals")}
        self.alerts = {a["alert_id"]: a for a in run.everything("/api/alerts")}
        self.posts = {p["post_id"]: p for p in run.everything("/api/posts")}
        self.seen = Counter(_alert_of(message) for message in run.inbox())

    def facts(self) -> dict[str, Any]:
        """The parts that must not depend on the run."""
        return {
            "signals": {i: _without(s, "recorded_at", "cursor", "revision") for i, s in self.signals.items()},
            "alerts": {i: _without(a, "recorded_at", "cursor", "deliveries") for i, a in self.alerts.items()},
            "posts": {i: _without(p, "recorded_at", "cursor", "updated_at", "version") for i, p in self.posts.items()},
        }


def _without(item: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in names}


def _alert_of(message: dict[str, Any]) -> str:
    """The alert a Discord message shows: its footer names it."""
    return message["embeds"][0]["footer"]["text"].split()[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """One quiet run on one instance."""
    with troop_up(tmp_path_factory.mktemp("reference"), *SPAN, *FAST) as run:
        run.until("the end of the replay", run.is_done, within=120)
        yield Ledger(run)


def test_a_quiet_run_shows_everything(reference: Ledger) -> None:
    """Bars become signals, alerts SENT on both channels, a post a signal and a digest a session."""
    live = [s for s in reference.signals.values() if s["origin"] == "live"]
    assert len(live) >= 5
    assert {s["signal_id"] for s in live} == {a["signal_id"] for a in reference.alerts.values()}
    states = {(d["channel"], d["state"]) for a in reference.alerts.values() for d in a["deliveries"]}
    assert states == {("signalr", "SENT"), ("discord", "SENT")}
    assert reference.seen == Counter(dict.fromkeys(reference.alerts, 1))
    kinds = Counter(p["kind"] for p in reference.posts.values())
    assert kinds["signal"] == len(live)
    assert kinds["digest"] == 35, "sessions of the exchange from 2012-03-01 to 2012-04-19, Good Friday off"


def test_history_raises_no_alert(reference: Ledger) -> None:
    """Signals found before live_from are kept as backfill and nobody is told of them."""
    backfill = {i for i, s in reference.signals.items() if s["origin"] == "backfill"}
    assert len(backfill) > 100
    assert not backfill & {a["signal_id"] for a in reference.alerts.values()}
    assert not backfill & {i for p in reference.posts.values() for i in p["signal_ids"]}


def test_three_instances_with_twins_and_disorder_change_nothing(reference: Ledger, tmp_path: Path) -> None:
    """Each event comes twice and out of order, to three instances at another speed: the ledger is the same."""
    with troop_up(tmp_path, *SPAN, "--speed", "600000", "--instances", "3") as run:
        run.tell_cloud("/faults", {"topic": {"duplicate": 2, "reorder_ms": 300}, "seed": 7})
        run.until("the end of the replay", run.is_done, within=120)
        ledger = Ledger(run)
        status = run.ask_cloud("/status")

    twins = status["faults"]["hits"]["topic.duplicate"]
    assert twins >= 0.9 * status["topic"]["delivered"], "the twins must have been delivered"
    assert ledger.facts() == reference.facts()
    assert ledger.seen == Counter(dict.fromkeys(reference.alerts, 1))


def test_kills_lose_nothing_and_repeat_nothing(reference: Ledger, tmp_path: Path, seed: int) -> None:
    """Instances die by kill -9 at random moments and the cloud dies once: no signal, alert or post is lost."""
    chance = random.Random(seed)
    with troop_up(tmp_path, *SPAN, "--speed", "430000", "--instances", "2") as run:
        kills = 0
        for number in range(6):
            time.sleep(chance.uniform(0.4, 2.2))
            kills += run.kill("cloud" if number == 3 else "app", chance)
        assert kills >= 4
        run.until("the end of the replay", run.is_done, within=150)
        ledger = Ledger(run)

    assert ledger.facts() == reference.facts()
    for alert_id, alert in ledger.alerts.items():
        states = {d["channel"]: d["state"] for d in alert["deliveries"]}
        assert states["signalr"] == "SENT"
        assert states["discord"] in {"SENT", "UNKNOWN"}
        if states["discord"] == "SENT":
            assert ledger.seen[alert_id] == 1, "a SENT delivery is seen, and seen once"
        assert ledger.seen[alert_id] <= 1
    doubtful = sum(d["state"] == "UNKNOWN" for a in ledger.alerts.values() for d in a["deliveries"])
    assert doubtful <= kills, "an outcome is unknown only where a process died"
