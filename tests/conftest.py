"""Profiles: short by default, long in CI (TROOP_TEST_PROFILE=long): more seeds, kills and examples."""

import os

import pytest
from hypothesis import HealthCheck, settings

LONG = os.environ.get("TROOP_TEST_PROFILE") == "long"

settings.register_profile("short", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("long" if LONG else "short")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``seed`` runs once in the short profile and more often in the long one."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(4) if LONG else range(1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that start real processes come first: they wait more than they compute."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)
