"""
Documents in Azure Cosmos DB, through azure.cosmos.aio.

Reads are point reads, lists are keyset queries that need no index but ``sort``, ``due_at`` and ``partition``, writes
are conditional on the etag. Several documents are one transactional batch. One file a concern: cosmos_client (what is
open), cosmos_call (budget, tries, outcome of a write), cosmos_wire (items and answers), cosmos_provision (containers).
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from pydantic import SecretStr

from shared.adapters.cosmos_call import BUDGET, Call, Step, Write
from shared.adapters.cosmos_charges import Charges
from shared.adapters.cosmos_client import CosmosConnection, Transport, parse_url
from shared.adapters.cosmos_provision import existing, provision
from shared.adapters.cosmos_wire import document_of, escape_id, etag_parts, has_expired, stored
from shared.clock import Clock, sortable
from shared.documents import BATCH_LIMIT, Document, Operation
from shared.errors import ConflictError, InvalidPayloadError, NotFoundError, StaleError
from shared.telemetry import span

if TYPE_CHECKING:
    from azure.core.credentials_async import AsyncTokenCredential

type OnCharge = Callable[[str, str, float], None]


class CosmosDocuments:
    """
    Documents over one database of a Cosmos DB account; ``charges`` counts what every call cost.

    The app's identity is asked for a token; a key is taken for emulators only. *on_charge* hears of every call's
    operation, container and request units. *credential* and *transport* replace the identity and the network.

    Raises ConfigurationError when the endpoint is not https, or when a key is given for an account in the cloud.
    """

    def __init__(
        self,
        endpoint: str,
        database: str,
        key: SecretStr | None,
        wall: Clock,
        *,
        budget: timedelta = BUDGET,
        on_charge: OnCharge | None = None,
        credential: "AsyncTokenCredential | None" = None,
        transport: Transport | None = None,
    ) -> None:
        self._connection = CosmosConnection(endpoint, database, key, credential=credential, transport=transport)
        self._database = database
        self._wall = wall
        self._budget = budget
        self._on_charge = on_charge
        self.charges = Charges()

    @classmethod
    def from_url(cls, url: str, key: SecretStr | None, wall: Clock) -> Self:
        """
        Read the setting DOCUMENTS_URL.

        Raises:
            ConfigurationError: it has another form than ``cosmos:https://…/?database=…``.

        """
        endpoint, database = parse_url(url)
        return cls(endpoint, database, key, wall)

    async def read(self, container: str, partition: str, id: str) -> Document:
        name = f"{container}/{partition}/{id}"

        async def work(call: Call) -> Document:
            item = await call.ask(lambda: call.read(escape_id(id), partition), name)
            if has_expired(item, self._wall.now()):
                raise NotFoundError(f"no {name}")
            return document_of(item)

        return await self._run("read", container, work)

    async def create(self, container: str, document: Document) -> Document:
        return (await self._write("create", container, [Operation(kind="create", document=document)]))[0]

    async def replace(self, container: str, document: Document) -> Document:
        return (await self._write("replace", container, [Operation(kind="replace", document=document)]))[0]

    async def delete(self, container: str, document: Document) -> None:
        await self._write("delete", container, [Operation(kind="delete", document=document)])

    async def batch(self, container: str, operations: Sequence[Operation]) -> list[Document]:
        partitions = {operation.document.partition for operation in operations}
        if not operations or len(operations) > BATCH_LIMIT or len(partitions) != 1:
            raise InvalidPayloadError(
                f"a batch takes 1 to {BATCH_LIMIT} operations in one partition, "
                f"not {len(operations)} in {len(partitions)}"
            )
        return await self._write("batch", container, operations)

    async def page(
        self,
        container: str,
        partition: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        return await self._list("page", container, partition, after, newest_first=newest_first, limit=limit)

    async def feed(
        self,
        container: str,
        *,
        after: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        return await self._list("feed", container, None, after, newest_first=newest_first, limit=limit)

    async def due(self, container: str, *, before: datetime, limit: int = 100) -> list[Document]:
        values = {"@before": sortable(before)}

        async def work(call: Call) -> list[Document]:
            expired = 0
            while True:
                # due_at is not unique, so there is no place behind which to go on: read further from the start.
                wanted = limit + expired
                items = await _select(call, "c.due_at<=@before", values, "c.due_at ASC", wanted)
                alive = self._alive(items)
                if len(alive) >= limit or len(items) < wanted:
                    return alive[:limit]
                expired = len(items) - len(alive)

        return await self._run("due", container, work)

    async def containers(self) -> list[str]:
        """The containers that are there, of those that this version knows."""
        return await existing(self._connection)

    async def provision(self, *, dry_run: bool) -> list[str]:
        """
        Make the database and the containers that are missing; say in a sentence each what was, or would be, done.

        Raises:
            ConfigurationError: a container is partitioned otherwise, or this identity may not make any.

        """
        return await provision(self._connection, self._database, dry_run=dry_run)

    async def close(self) -> None:
        await self._connection.close()

    async def _list(
        self,
        operation: str,
        container: str,
        partition: str | None,
        after: str | None,
        *,
        newest_first: bool,
        limit: int,
    ) -> list[Document]:
        beyond, order = ("<", "DESC") if newest_first else (">", "ASC")

        async def work(call: Call) -> list[Document]:
            found: list[Document] = []
            position = after
            while True:
                wanted = limit - len(found)
                where = ["c.partition=@partition"] if partition is not None else []
                where += [f"c.sort{beyond}@after"] if position is not None else []
                values = {"@partition": partition, "@after": position}
                items = await _select(call, " AND ".join(where), values, f"c.sort {order}", wanted, partition)
                found += self._alive(items)
                if len(found) >= limit or len(items) < wanted:
                    return found
                position = items[-1]["sort"]

        return await self._run(operation, container, work)

    def _alive(self, items: Sequence[Mapping[str, Any]]) -> list[Document]:
        # A condition on expires_at would need it indexed, which every write would pay for.
        now = self._wall.now()
        return [document_of(item) for item in items if not has_expired(item, now)]

    async def _write(self, operation: str, container: str, operations: Sequence[Operation]) -> list[Document]:
        now, claim = self._wall.now(), uuid4().hex
        steps = [Step.of(one, claim=claim, now=now) for one in operations]

        async def work(call: Call) -> list[Document]:
            for step in steps:
                await self._refuse_expired(call, step, now)
            send = (lambda: _send_batch(call, steps)) if operation == "batch" else (lambda: _send(call, steps[0]))
            return await Write(call, steps, claim, now).run(send)

        return await self._run(operation, container, work)

    async def _refuse_expired(self, call: Call, step: Step, now: datetime) -> None:
        """Replacing or deleting what has expired brings nothing back, even while the item still lies there."""
        expires_at = etag_parts(step.document.etag)[1]
        if step.kind == "create" or expires_at is None or expires_at > sortable(now):
            return
        name = f"{call.name}/{step.document.partition}/{step.document.id}"
        item = await call.find(step)
        if item is None or has_expired(item, now):
            raise NotFoundError(f"no {name}")
        raise StaleError(f"{name} was written by somebody else")

    async def _run[T](self, operation: str, container: str, work: Callable[[Call], Awaitable[T]]) -> T:
        call = Call(container, self._budget)
        with span(f"documents.{operation}", container=container):
            try:
                opened = self._connection.open_container(container)
                if opened is None:
                    opened = await call.ask(lambda: self._connection.container(container), container)
                call.container = opened
                return await work(call)
            except (NotFoundError, ConflictError) as e:
                answer = e  # an answer like any other: no failure in the trace
            finally:
                self._charge(operation, container, call.charge)
        raise answer

    def _charge(self, operation: str, container: str, units: float) -> None:
        from opentelemetry import trace

        trace.get_current_span().set_attribute("troop.request_charge", units)
        self.charges.add(operation, container, units)
        if self._on_charge is not None:
            self._on_charge(operation, container, units)


async def _select(
    call: Call,
    where: str,
    values: Mapping[str, str | None],
    order: str,
    limit: int,
    partition: str | None = None,
) -> list[dict[str, Any]]:
    """Read one keyset page. The partition is named twice: for routing, and for servers that only read the query."""
    condition = f"WHERE {where} " if where else ""
    query = f"SELECT TOP {limit:d} * FROM c {condition}ORDER BY {order}"  # noqa: S608 - only names of our own fields
    parameters: list[dict[str, object]] = [
        {"name": name, "value": value} for name, value in values.items() if value is not None
    ]

    async def fetch() -> list[dict[str, Any]]:
        items = call.container.query_items(
            query, parameters=parameters, partition_key=partition, max_item_count=limit, response_hook=call.note
        )
        return [item async for item in items]

    return await call.ask(fetch, call.name)


async def _send(call: Call, step: Step) -> list[Document]:
    from azure.core import MatchConditions

    condition: dict[str, Any] = {"match_condition": MatchConditions.IfNotModified, "response_hook": call.note}
    match step.kind:
        case "create" if step.over is None:
            await call.container.create_item(step.item, response_hook=call.note)
        case "create":
            await call.container.replace_item(step.id, step.item, etag=step.over, **condition)
        case "replace":
            await call.container.replace_item(step.id, step.item, etag=step.etag, **condition)
        case "delete":
            partition = step.document.partition
            await call.container.delete_item(step.id, partition, etag=step.etag, **condition)
            return [step.document]
    return [stored(step.document, call.etag)]


async def _send_batch(call: Call, steps: Sequence[Step]) -> list[Document]:
    operations = [_batch_operation(step) for step in steps]
    results = await call.container.execute_item_batch(
        operations, partition_key=steps[0].document.partition, response_hook=call.note
    )
    return [
        stored(step.document, result["eTag"]) if step.item else step.document
        for step, result in zip(steps, results, strict=True)
    ]


def _batch_operation(step: Step) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    match step.kind:
        case "create" if step.over is None:
            return ("create", (step.item,), {})
        case "create":
            return ("replace", (step.id, step.item), {"if_match_etag": step.over})
        case "replace":
            return ("replace", (step.id, step.item), {"if_match_etag": step.etag})
        case "delete":
            return ("delete", (step.id,), {"if_match_etag": step.etag})
