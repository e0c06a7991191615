"""
The one Cosmos DB client of a process: built at its first use, closed once.

The SDK's own retries are cut to what only it can do: asking another region of the account (after 503, a lost read
or a connection that could not be made). Everything else is ours, in cosmos_call.py, because the SDK's knobs bound the
number of tries but not the wait a 429 asks for, and because its retry of a cut connection would repeat a write blindly.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from pydantic import SecretStr

from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from azure.core.credentials_async import AsyncTokenCredential
    from azure.core.pipeline.transport import AsyncHttpTransport
    from azure.cosmos.aio import ContainerProxy, CosmosClient, DatabaseProxy

type Transport = Callable[[], "AsyncHttpTransport[Any, Any]"]

PARTITION_KEY = "/partition"
EXAMPLE = "cosmos:https://ACCOUNT.documents.azure.com:443/?database=troop"
KNOBS: dict[str, Any] = {
    "retry_total": 0,  # connections and reads that broke: we repeat them, and know what we wrote
    "retry_throttle_total": -1,  # 429: none; a 0 would mean the default of 9
    "retry_write": 0,  # a write whose outcome is unknown is resolved by its claim
    "connection_timeout": 2,
    "read_timeout": 5,
    "no_response_on_write": True,
    "enable_compact_utf8_item_writes": True,
    "user_agent_suffix": "troop",
}
"""How the SDK is set up, whatever the endpoint."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "host.docker.internal")


def parse_url(url: str) -> tuple[str, str]:
    """
    Read DOCUMENTS_URL for Cosmos DB: the endpoint and the database.

    Raises:
        ConfigurationError: it has another form; the message shows the right one.

    """
    parts = urlsplit(url.removeprefix("cosmos:"))
    query = parse_qs(parts.query)
    databases = query.pop("database", [])
    odd = query or parts.path.strip("/") or parts.username is not None or not _has_port(parts)
    if not parts.hostname or len(databases) != 1 or odd:
        raise ConfigurationError(f"DOCUMENTS_URL names no storage: write sqlite:FILE or {EXAMPLE}")
    return f"{parts.scheme}://{parts.netloc}/", databases[0]


def _has_port(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def is_local(endpoint: str) -> bool:
    """Whether an emulator answers there: this machine, or a container by its bare name."""
    host = urlsplit(endpoint).hostname or ""
    return host in _LOOPBACK or "." not in host


class CosmosConnection:
    """
    Opens the client and the containers, each once, however many ask at the same time.

    Raises ConfigurationError when the endpoint is not https, or when a key is given for an account in the cloud.
    """

    def __init__(
        self,
        endpoint: str,
        database: str,
        key: SecretStr | None,
        *,
        credential: "AsyncTokenCredential | None" = None,
        transport: Transport | None = None,
    ) -> None:
        self.is_local = is_local(endpoint)
        if urlsplit(endpoint).scheme != "https" and not self.is_local:
            raise ConfigurationError(f"the Cosmos DB endpoint must be https: write {EXAMPLE}")
        self._key = key.get_secret_value() if key else ""
        if self._key and not self.is_local:
            raise ConfigurationError(
                "COSMOS_KEY is for emulators only: clear it, and give this app's identity the role "
                "Cosmos DB Built-in Data Contributor on the account (on a laptop: az login)"
            )
        self._endpoint = endpoint
        self._database = database
        self._given_credential = credential
        self._credential: AsyncTokenCredential | None = None
        self._transport = transport
        self._client: CosmosClient | None = None
        self._containers: dict[str, ContainerProxy] = {}
        self._opening: dict[str, asyncio.Task[Any]] = {}

    def open_container(self, name: str) -> "ContainerProxy | None":
        """The container, if it is open."""
        return self._containers.get(name)

    async def container(self, name: str) -> "ContainerProxy":
        """
        Open a container.

        Raises:
            ConfigurationError: it is missing, or partitioned otherwise.

        """
        opened = self._containers.get(name)
        return opened if opened is not None else await self._once(name, lambda: self._open_container(name))

    async def database(self) -> "DatabaseProxy":
        """The database, which may not exist."""
        return (await self.client()).get_database_client(self._database)

    async def client(self) -> "CosmosClient":
        """The SDK's client."""
        return self._client if self._client is not None else await self._once("", self._open_client)

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        for task in list(self._opening.values()):
            task.cancel()
        client, self._client = self._client, None
        credential, self._credential = self._credential, None
        self._containers.clear()
        if client is not None:
            await client.close()
        if credential is not None:
            await credential.close()

    async def _once[T](self, name: str, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        # A caller that runs out of time gives up waiting; what it waited for goes on for the next one.
        task = self._opening.get(name)
        if task is None:
            task = self._opening[name] = asyncio.create_task(make())
            task.add_done_callback(lambda done: self._opened(name, done))
        result: T = await asyncio.shield(task)
        return result

    def _opened(self, name: str, task: asyncio.Task[Any]) -> None:
        self._opening.pop(name, None)
        if not task.cancelled():
            task.exception()  # nobody may be waiting for it any more

    async def _open_client(self) -> "CosmosClient":
        from azure.core.pipeline.transport import AioHttpTransport
        from azure.cosmos.aio import CosmosClient

        local: dict[str, Any] = {"connection_verify": False, "enable_endpoint_discovery": False}
        client = CosmosClient(
            self._endpoint,
            self._key or self._identity(),
            # A proxy and a netrc file would be looked up for every request, in a thread.
            transport=self._transport() if self._transport else AioHttpTransport(use_env_settings=False),
            **KNOBS,
            **(local if self.is_local else {}),
        )
        try:
            await client.__aenter__()
        except BaseException:
            await client.close()
            raise
        self._client = client
        return client

    async def _open_container(self, name: str) -> "ContainerProxy":
        from azure.cosmos.exceptions import CosmosResourceNotFoundError

        container = (await self.database()).get_container_client(name)
        try:
            properties = await container.read()
        except CosmosResourceNotFoundError:
            raise ConfigurationError(
                f"Cosmos DB has no container {name} in the database {self._database}: run troop db migrate"
            ) from None
        if properties["partitionKey"]["paths"] != [PARTITION_KEY]:
            raise ConfigurationError(f"the container {name} is not partitioned by {PARTITION_KEY}: make it anew")
        self._containers[name] = container
        return container

    def _identity(self) -> "AsyncTokenCredential":
        if self._given_credential is not None:
            return self._given_credential
        from azure.identity.aio import DefaultAzureCredential

        self._credential = DefaultAzureCredential()
        return self._credential
