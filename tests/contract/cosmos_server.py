"""
A Cosmos DB to run against: a server from npm that nobody here wrote, or what COSMOS_ENDPOINT names.

The server speaks TLS and forgets everything when it ends; it ends with its standard input, so also when the tests are
killed. COSMOS_ENDPOINT is an emulator (compose.yaml starts one) or an account; COSMOS_KEY its key, the emulator's
well-known one when it is not set, none for an account: there the identity of ``az login`` counts, and the database
``troop-tests`` with the containers below must exist.
"""

import os
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from azure.cosmos import ContainerProxy, CosmosClient, PartitionKey
from azure.cosmos.exceptions import CosmosResourceNotFoundError
from azure.identity import DefaultAzureCredential
from pydantic import SecretStr

from shared.adapters.cosmos import CosmosDocuments
from shared.adapters.cosmos_client import PARTITION_KEY, is_local
from shared.clock import Clock

NODE = Path(__file__).resolve().parent.parent / "e2e/node"
SCRIPT = """
const server = require("@vercel/cosmosdb-server").createHttpsServer({ keepAlive: true });
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.stdin.on("end", () => process.exit()).resume();
"""
CONTAINERS = ("things", "others", "nowhere")
EMULATOR_KEY = "C2y6yDjf5/R+ob0N8A7Cgv30VRDJIWEHLM+4QDU5DE2nQ9nDuVTqobD4b8mGGyPMbIZnqyMsEcaGQy67XIw/Jw=="
"""The same in every emulator, and in its documentation: no secret."""
_MISSING = "the server from npm answers 500 for a missing item: test_cosmos.py has the documented answer"
_BATCH = "the server from npm cannot replace or delete in a batch: test_cosmos.py has the documented answers"
NPM_GAPS = {
    "test_missing_document_is_not_found": _MISSING,
    "test_deleted_document_is_gone_and_can_come_again": _MISSING,
    "test_all_operations_happen_in_order": _BATCH,
    "test_one_refused_operation_undoes_all": _BATCH,
}
"""The tests of the contract that it cannot pass, and why."""
ENDPOINT = os.environ.get("COSMOS_ENDPOINT", "")


class CosmosPlace:
    """Makes fresh, empty storage at one endpoint."""

    def __init__(self, endpoint: str, key: str, *, forgets: bool) -> None:
        self.endpoint = endpoint
        self.key = SecretStr(key)
        self._forgets = forgets
        self._client: CosmosClient | None = None

    def fresh(self, wall: Clock) -> CosmosDocuments:
        """Storage with nothing in it."""
        database = f"d{uuid4().hex}" if self._forgets else "troop-tests"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the certificate is the server's own
            self._prepare(database)
        return CosmosDocuments(self.endpoint, database, self.key, wall)

    def _prepare(self, database: str) -> None:
        proxy = self.client.get_database_client(database)
        if self._forgets or (self.key.get_secret_value() and not _exists(proxy)):
            proxy = self.client.create_database(database)
        for name in CONTAINERS:
            container = proxy.get_container_client(name)
            if self._forgets or not _exists(container):
                proxy.create_container(name, partition_key=PartitionKey(path=PARTITION_KEY), default_ttl=-1)
            else:
                _empty(container)

    @property
    def client(self) -> CosmosClient:
        """The SDK's synchronous client, to make what the tests need."""
        if self._client is None:
            key = self.key.get_secret_value()
            self._client = CosmosClient(
                self.endpoint, key or DefaultAzureCredential(), connection_verify=not is_local(self.endpoint)
            )
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def _exists(proxy: Any) -> bool:
    try:
        proxy.read()
    except CosmosResourceNotFoundError:
        return False
    return True


def _empty(container: ContainerProxy) -> None:
    found = container.query_items("SELECT c.id, c.partition FROM c", enable_cross_partition_query=True)
    for item in list(found):
        container.delete_item(item["id"], item["partition"])


@contextmanager
def running_server() -> Iterator[str]:
    """The server from npm, on a free port of this machine; yields its endpoint."""
    process = subprocess.Popen(
        ["node", "-e", SCRIPT],
        cwd=NODE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # it writes a stack trace for every 500
        text=True,
    )
    try:
        port = process.stdout.readline().strip() if process.stdout else ""
        assert port, "the Cosmos DB server from npm did not start: run npm ci in tests/e2e/node"
        yield f"https://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def npm_cosmos() -> Iterator[CosmosPlace]:
    """The server from npm."""
    with running_server() as endpoint:
        place = CosmosPlace(endpoint, "a2V5", forgets=True)
        yield place
        place.close()


@pytest.fixture(scope="session")
def given_cosmos() -> Iterator[CosmosPlace]:
    """What COSMOS_ENDPOINT names."""
    key = os.environ.get("COSMOS_KEY", EMULATOR_KEY if is_local(ENDPOINT) else "")
    place = CosmosPlace(ENDPOINT, key, forgets=False)
    yield place
    place.close()
