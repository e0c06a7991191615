"""One app a process: built at first use, shared by every test of this folder that asks for it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.functions.running_app import App, running_app, waves


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    """The real function_app behind the real host; nothing is stored yet unless another test did it."""
    async with running_app(tmp_path_factory.mktemp("app")) as one:
        yield one


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def filled(app: App) -> App:
    """The app after a small run: bars, signals, alerts, posts and digests of the symbol WAVE are stored."""
    await app.follow("WAVE", waves())
    for timer in ("market_refresh_quotes", "content_open_digests", "content_sweep"):
        outcome = await app.fire(timer)
        assert outcome.error is None, outcome.error
    return app
