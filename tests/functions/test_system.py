"""What the app does for its own storage."""

import sqlite3
import sys
from contextlib import closing
from datetime import timedelta

import pytest

from shared.settings import ROOT
from tests.builders import a_document
from tests.functions.running_app import App

pytestmark = [pytest.mark.asyncio(loop_scope="session")]


async def test_timer_deletes_what_has_expired(app: App) -> None:
    """An expired document, which nobody can read any more, also stops taking room; others stay."""
    core = sys.modules["function_app"].core
    now = core.wall.now()
    await core.documents.create("things", a_document("gone", at=now, expires_at=now))
    later = now + timedelta(hours=1)
    await core.documents.create("things", a_document("here", at=later, expires_at=later))

    outcome = await app.fire("system_sweep")

    assert outcome.error is None, outcome.error
    with closing(sqlite3.connect(ROOT / core.settings.documents_url.removeprefix("sqlite:"))) as db:
        assert db.execute("SELECT id FROM documents WHERE container='things'").fetchall() == [("here",)]
