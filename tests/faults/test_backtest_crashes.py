"""A backtest that is killed at any call, or loses any answer, ends as if nothing had happened."""

from datetime import timedelta
from typing import Any

import pytest

from shared.errors import TransientError
from signals.backtest_models import BacktestState, Trigger
from signals.backtests import LEASE
from tests.standins import Fuse, Killed, fused
from tests.unit.signals.backtest_house import BARS, BacktestHouse, Ticking, request

FEW = BARS[:260]
QUESTION: dict[str, Any] = {
    "validation": {"kind": "purged_cv", "n_splits": 3, "n_test_folds": 2},
    "grid": {"fast": [2, 3]},
}
PASSING = ("requested_at", "started_at", "ended_at", "opened_at", "claims", "parts", "leased_until")


async def disturbed(fuse: Fuse) -> tuple[BacktestHouse, bool]:
    """A house in which a process asked, worked in small steps and heard of history, until the fuse blew."""
    house = BacktestHouse(FEW)
    await house.open()
    clock = Ticking(house.wall.at, timedelta(seconds=3))
    service = house.instance(storage=fused(house.storage, fuse), topic=fused(house.topic, fuse), wall=clock)
    try:
        [asked] = await service.request(request(**QUESTION))
        for _ in range(8):
            asked = await service.run(asked.backtest_id)
        await service.heard(house.heard(FEW))
        await service.sweep()
    except (Killed, TransientError):
        house.wall.at = clock.at
        return house, True
    house.wall.at = clock.at
    return house, fuse.calls >= fuse.at


async def mended(house: BacktestHouse) -> dict[str, Any]:
    """What is stored after whoever asked has asked again, the event came again, and sweeps went by."""
    [asked] = await house.service.request(request(**QUESTION))
    await house.service.heard(house.heard(FEW))
    for _ in range(4):
        house.wall.at += LEASE
        await house.service.sweep()
    assert (await house.service.read(asked.backtest_id))[1]
    assert {b.state for b in await house.all()} == {BacktestState.DONE}
    assert {b.job.trigger for b in await house.all()} == set(Trigger)
    found = await house.storage.feed("backtests", limit=500)
    return {
        d.id: {name: value for name, value in d.body.items() if name not in PASSING}
        for d in found
        if not d.id.startswith("step|")
    }


MODES = [mode for mode in Fuse.MODES if mode != "kill before"]
"""To be killed before a call is to be killed after the one before it."""


@pytest.mark.parametrize("mode", MODES)
async def test_trouble_at_any_call_changes_nothing_of_what_is_found(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One result, one opened hold-out, every variant counted once: whatever call it was that failed."""
    monkeypatch.setattr("signals.logic.bootstrap.REPLICAS", 200)  # what is resampled takes most of the time
    expected = await mended((await disturbed(Fuse()))[0])
    at, blew = 1, True
    while blew:
        house, blew = await disturbed(Fuse(at, mode))
        assert await mended(house) == expected, f"{mode} call {at}"
        at += 1
    assert at > 20
