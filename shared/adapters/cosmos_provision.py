"""The containers that this version needs in Cosmos DB, and how they come to be."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from shared.adapters.cosmos_client import PARTITION_KEY, CosmosConnection
from shared.adapters.cosmos_wire import answer_of, error_of
from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from azure.cosmos.aio import ContainerProxy, DatabaseProxy

CONTAINERS = (
    "series",
    "bars",
    "quotes",
    "quota",
    "signals",
    "deliveries",
    "rules",
    "posts",
    "backtests",
    "deadletters",
    "audit",
    "system",
)
INDEXED = ("/sort/?", "/due_at/?", "/partition/?")
"""Every indexed path is paid for by every write."""
INDEXING: Mapping[str, Any] = {
    "indexingMode": "consistent",
    "automatic": True,
    "includedPaths": [{"path": path} for path in INDEXED],
    "excludedPaths": [{"path": "/*"}],
}
FOREVER = -1
"""Items expire by their own ``ttl`` only."""
TIMEOUT = 60
"""Seconds for one step: making a container takes longer than any read or write."""


async def existing(connection: CosmosConnection) -> list[str]:
    """The known containers that are there; asked one by one, because not every emulator can list them."""
    database = await _asked("the database", connection.database)
    return [name for name in CONTAINERS if await _read(name, database.get_container_client(name).read) is not None]


async def provision(connection: CosmosConnection, database: str, *, dry_run: bool) -> list[str]:
    """
    Make what is missing, and set right what differs; asked again, it finds nothing to do.

    Raises:
        ConfigurationError: a container is partitioned otherwise, or this identity may not make any.

    """
    said: list[str] = []
    verb = "Would make" if dry_run else "Made"
    proxy = await _asked(database, connection.database)
    is_missing = await _read(database, proxy.read) is None
    if is_missing:
        said.append(f"{verb} the database {database}.")
        if not dry_run:
            client = await connection.client()
            await _asked(database, lambda: client.create_database(database, read_timeout=TIMEOUT))
    for name in CONTAINERS:
        container = proxy.get_container_client(name)
        found = None if is_missing and dry_run else await _read(name, container.read)
        if found is None:
            said.append(f"{verb} the container {name}.")
            if not dry_run:
                await _asked(name, lambda name=name: _make(proxy, name))  # type: ignore[misc]
        # An emulator keeps no index policy, and cannot change one.
        elif not connection.is_local and _differs(name, found):
            said.append(f"{'Would set' if dry_run else 'Set'} the index policy and time to live of {name}.")
            if not dry_run:
                await _asked(name, lambda container=container: _mend(proxy, container))  # type: ignore[misc]
    return said


async def _make(database: "DatabaseProxy", name: str) -> None:
    from azure.cosmos import PartitionKey

    await database.create_container(
        name,
        partition_key=PartitionKey(path=PARTITION_KEY),
        indexing_policy=dict(INDEXING),
        default_ttl=FOREVER,
        read_timeout=TIMEOUT,
    )


async def _mend(database: "DatabaseProxy", container: "ContainerProxy") -> None:
    from azure.cosmos import PartitionKey

    await database.replace_container(
        container,
        partition_key=PartitionKey(path=PARTITION_KEY),
        indexing_policy=dict(INDEXING),
        default_ttl=FOREVER,
        read_timeout=TIMEOUT,
    )


def _differs(name: str, found: Mapping[str, Any]) -> bool:
    if found["partitionKey"]["paths"] != [PARTITION_KEY]:
        raise ConfigurationError(f"the container {name} is not partitioned by {PARTITION_KEY}: make it anew")
    policy = found.get("indexingPolicy") or {}
    included = {path["path"] for path in policy.get("includedPaths", [])}
    excluded = {path["path"] for path in policy.get("excludedPaths", [])}
    return found.get("defaultTtl") != FOREVER or included != set(INDEXED) or "/*" not in excluded


async def _read[T](name: str, read: Callable[[], Awaitable[T]]) -> T | None:
    """The properties of a database or container; None when there is none."""
    from azure.cosmos.exceptions import CosmosResourceNotFoundError

    async def look() -> T | None:
        try:
            return await read()
        except CosmosResourceNotFoundError:
            return None

    return await _asked(name, look)


async def _asked[T](name: str, ask: Callable[[], Awaitable[T]]) -> T:
    from azure.core.exceptions import AzureError

    try:
        return await ask()
    except AzureError as e:
        answer = answer_of(e)
    raise error_of(answer, name)
