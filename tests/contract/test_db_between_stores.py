"""`troop db` between two kinds of stores: SQLite, and a Cosmos DB server that nobody here wrote."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from infra.cli import app
from infra.db.migrate import migrate
from infra.db.place import Place, containers_of
from shared.adapters.cosmos_provision import CONTAINERS
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.documents import Document
from shared.migrations import Migrations
from tests.builders import WALL, a_document
from tests.contract.cosmos_server import CosmosPlace, npm_cosmos

__all__ = ["npm_cosmos"]

pytestmark = pytest.mark.filterwarnings("ignore")  # the certificate is the server's own

COUNTED = Migrations({("signals", 1): lambda b: {**b, "n": b["n"] + 1}})


def troop(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["db", *map(str, arguments)], env={"COSMOS_KEY": "a2V5", "COLUMNS": "200"})


async def contents(place: Place) -> dict[str, list[Document]]:
    store = place.open(SystemClock())
    try:
        found = {name: await store.feed(name, limit=1000) for name in await containers_of(store)}
    finally:
        await store.close()
    return {name: [replace(d, etag=None) for d in documents] for name, documents in found.items() if documents}


def test_documents_travel_from_sqlite_to_cosmos_and_back(
    npm_cosmos: CosmosPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was exported from one kind of store and came through the other is the same in every field."""
    monkeypatch.setenv("COSMOS_KEY", "a2V5")
    cosmos = f"cosmos:{npm_cosmos.endpoint}?database=travel"
    here, there = (Place(url=f"sqlite:{tmp_path / name}") for name in ("here.db", "there.db"))
    documents = [
        a_document(f"d{n}|ü", at=WALL + timedelta(seconds=n), body={"n": n}, due_at=WALL if n % 7 == 0 else None)
        for n in range(230)
    ]

    async def fill() -> None:
        store = SQLiteDocuments(tmp_path / "here.db", SystemClock())
        for document in documents:
            await store.create("signals", document)
        await store.close()

    asyncio.run(fill())

    dry = troop("migrate", "--url", cosmos, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.stdout.count("Would make the container") == len(CONTAINERS)
    for command in (
        ("migrate", "--url", cosmos),
        ("migrate", "--url", cosmos),
        ("export", tmp_path / "out.jsonl", "--from-url", here.url),
        ("import", tmp_path / "out.jsonl", "--to-url", cosmos),
        ("import", tmp_path / "out.jsonl", "--to-url", cosmos),
        ("check", "--url", cosmos),
        ("export", tmp_path / "back.jsonl", "--from-url", cosmos),
        ("import", tmp_path / "back.jsonl", "--to-url", there.url),
    ):
        done = troop(*command)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "out.jsonl").read_bytes().splitlines()[1:] == (
        tmp_path / "back.jsonl"
    ).read_bytes().splitlines()[1:]
    assert asyncio.run(contents(there)) == asyncio.run(contents(here)) == {"signals": documents}

    assert asyncio.run(migrate(Place(url=cosmos), SystemClock(), migrations=COUNTED))
    upgraded = asyncio.run(contents(Place(url=cosmos)))["signals"]
    assert [(d.schema, d.body["n"]) for d in upgraded] == [(2, n + 1) for n in range(230)]
