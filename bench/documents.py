"""
What our storage adapters cost over what they stand on.

``sqlite_vs_bare``: read, replace and page of 100 through SQLiteDocuments against bare sqlite3 statements on the same
layout, with the same JSON and one commit a write. ``cosmos_vs_sdk``: the same through CosmosDocuments against
azure.cosmos.aio alone, both on the Cosmos DB server from npm (every answer crosses TLS and a real process). Each is the
worst of its three ratios of medians; what is compared takes turns.
"""

import argparse
import asyncio
import json
import random
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from uuid import uuid4

from pydantic import SecretStr

from bench._report import BenchError, report, say
from shared.adapters.cosmos import CosmosDocuments
from shared.adapters.cosmos_client import PARTITION_KEY
from shared.adapters.cosmos_wire import item_of
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.documents import Document, Documents, sort_key
from tests.contract.cosmos_server import NODE, running_server

CONTAINER, PARTITION = "signals", "AAPL"
BEGIN = datetime(2013, 1, 2, 21, tzinfo=UTC)
PAGE = 100
KEY = "a2V5"
OPERATIONS = ("read", "replace", "page")

type Turn = Callable[[int], Awaitable[object]]


def body_of(n: int) -> dict[str, Any]:
    """A signal's body, as the app stores them."""
    return {
        "signal_id": str(uuid4()),
        "entry": "sma-10-30",
        "strategy": "sma_cross@1",
        "params": {"fast": 10.0, "slow": 30.0},
        "symbol": PARTITION,
        "interval": "1d",
        "direction": "long",
        "strength": random.random(),
        "reference_price": 561.7 + n,
        "features": {"fast": 552.1 + n, "slow": 550.3 + n, "spread": random.random()},
        "provider": "alpha_vantage",
        "origin": "live",
        "occurred_at": (BEGIN + timedelta(days=n)).isoformat(),
        "recorded_at": BEGIN.isoformat(),
        "score": None,
    }


def document_at(n: int) -> Document:
    """The *n*-th document of the partition."""
    id_ = f"{n:06}"
    return Document(id=id_, partition=PARTITION, sort=sort_key(BEGIN + timedelta(days=n), id_), body=body_of(n))


class Ours:
    """Documents through one of our adapters."""

    def __init__(self, store: Documents, documents: Sequence[Document]) -> None:
        self._store = store
        self._documents = list(documents)

    async def read(self, n: int) -> object:
        return (await self._store.read(CONTAINER, PARTITION, self._documents[n].id)).body

    async def replace(self, n: int) -> object:
        self._documents[n] = await self._store.replace(CONTAINER, self._documents[n].with_body(body_of(n)))
        return self._documents[n].etag

    async def page(self, n: int) -> object:
        return await self._store.page(CONTAINER, PARTITION, after=self._documents[n].sort, limit=PAGE)


class BareSQLite:
    """The statements alone, on a file of the same layout."""

    def __init__(self, db: sqlite3.Connection, documents: Sequence[Document]) -> None:
        self._db = db
        self._documents = list(documents)
        self._etags = [document.etag for document in documents]

    async def read(self, n: int) -> object:
        [body] = self._db.execute(
            "SELECT body FROM documents WHERE container=? AND partition=? AND id=?",
            (CONTAINER, PARTITION, self._documents[n].id),
        ).fetchone()
        return json.loads(body)

    async def replace(self, n: int) -> object:
        etag = uuid4().hex
        written = self._db.execute(
            "UPDATE documents SET body=?, etag=? WHERE container=? AND partition=? AND id=? AND etag=?",
            (json.dumps(body_of(n)), etag, CONTAINER, PARTITION, self._documents[n].id, self._etags[n]),
        )
        self._etags[n] = etag
        return written.rowcount

    async def page(self, n: int) -> object:
        rows = self._db.execute(
            "SELECT id, sort, etag, body FROM documents WHERE container=? AND partition=? AND sort>? "
            "ORDER BY sort LIMIT ?",
            (CONTAINER, PARTITION, self._documents[n].sort, PAGE),
        ).fetchall()
        return [(id_, sort, etag, json.loads(body)) for id_, sort, etag, body in rows]


class SDK:
    """azure.cosmos.aio alone: the calls our adapter makes, written by hand."""

    def __init__(self, container: Any, documents: Sequence[Document]) -> None:  # noqa: ANN401 - the SDK is loaded late
        self._container = container
        self._documents = list(documents)
        self._etags = [document.etag for document in documents]

    async def read(self, n: int) -> object:
        return (await self._container.read_item(self._documents[n].id, partition_key=PARTITION))["body"]

    async def replace(self, n: int) -> object:
        from azure.core import MatchConditions

        document = self._documents[n]
        item = item_of(document.with_body(body_of(n)), claim=uuid4().hex, now=BEGIN)
        written = await self._container.replace_item(
            document.id, item, etag=self._etags[n], match_condition=MatchConditions.IfNotModified
        )
        self._etags[n] = written["_etag"]
        return written

    async def page(self, n: int) -> object:
        found = self._container.query_items(
            f"SELECT TOP {PAGE} * FROM c WHERE c.partition=@partition AND c.sort>@after ORDER BY c.sort ASC",
            parameters=[
                {"name": "@partition", "value": PARTITION},
                {"name": "@after", "value": self._documents[n].sort},
            ],
            partition_key=PARTITION,
            max_item_count=PAGE,
        )
        return [item async for item in found]


async def on_sqlite(rounds: int) -> Mapping[str, float]:
    """Our SQLite adapter against bare statements."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, name) for name in ("ours.db", "bare.db")]
        stores = [SQLiteDocuments(place, SystemClock()) for place in places]
        documents = [await _filled(store, 1000) for store in stores]
        await stores[1].close()
        with closing(sqlite3.connect(places[1], isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=NORMAL")
            sizes = {"read": 400, "replace": 200, "page": 8}
            ratios = await _compare(Ours(stores[0], documents[0]), BareSQLite(db, documents[1]), sizes, rounds)
        await stores[0].close()
    return ratios


async def on_cosmos(rounds: int) -> Mapping[str, float]:
    """Our Cosmos DB adapter against the SDK."""
    from azure.cosmos import PartitionKey
    from azure.cosmos.aio import CosmosClient

    if not (NODE / "node_modules").is_dir():
        raise BenchError("the Cosmos DB server is not installed: run npm ci in tests/e2e/node, or make test once")
    with running_server() as endpoint:
        async with CosmosClient(endpoint, KEY, connection_verify=False) as client:
            containers, filled = [], []
            for name in ("ours", "alone"):
                database = await client.create_database(name)
                containers.append(await database.create_container(CONTAINER, PartitionKey(path=PARTITION_KEY)))
                store = CosmosDocuments(endpoint, name, SecretStr(KEY), SystemClock())
                async with _opened(store):
                    filled.append(await _filled(store, 300))
            ours = CosmosDocuments(endpoint, "ours", SecretStr(KEY), SystemClock())
            async with _opened(ours):
                sizes = {"read": 12, "replace": 12, "page": 3}
                return await _compare(Ours(ours, filled[0]), SDK(containers[1], filled[1]), sizes, rounds)


@asynccontextmanager
async def _opened(store: Documents) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await store.close()


async def _filled(store: Documents, count: int) -> list[Document]:
    return [await store.create(CONTAINER, document_at(n)) for n in range(count)]


async def _compare(ours: Ours, theirs: BareSQLite | SDK, sizes: Mapping[str, int], rounds: int) -> Mapping[str, float]:
    """Median time of ours over median time of theirs, for each operation."""
    ratios = {}
    for operation in OPERATIONS:
        turns: list[Turn] = [getattr(ours, operation), getattr(theirs, operation)]
        took: list[list[float]] = [[], []]
        for _ in range(rounds):
            for one in range(sizes[operation]):
                n = random.randrange(200)
                for side in (0, 1) if one % 2 else (1, 0):
                    began = perf_counter()
                    found = await turns[side](n)
                    took[side].append(perf_counter() - began)
                    if not found or (operation == "page" and isinstance(found, list) and len(found) != PAGE):
                        raise BenchError(f"{operation} by {type((ours, theirs)[side]).__name__} found too little")
        mine, other = median(took[0]), median(took[1])
        say(f"{type(theirs).__name__} {operation}: {1e6 * mine:,.1f} µs, {1e6 * other:,.1f} µs alone")
        ratios[operation] = mine / other
    return ratios


def measure(rounds: int) -> Mapping[str, float]:
    """Every figure."""
    random.seed(7)
    sides = {
        "sqlite_vs_bare": asyncio.run(on_sqlite(rounds)),
        "cosmos_vs_sdk": asyncio.run(on_cosmos(rounds)),
    }
    figures = {name: round(max(ratios.values()), 3) for name, ratios in sides.items()}
    for name, ratios in sides.items():
        figures |= {f"{name}_{operation}": round(ratio, 3) for operation, ratio in ratios.items()}
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser("bench.documents", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often every comparison is made (15)")
    options = parser.parse_args(arguments)
    try:
        report("documents", measure(options.rounds))
    except BenchError as e:
        say(f"bench.documents: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
