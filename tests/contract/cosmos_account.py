"""
A Cosmos DB account behind azure-core's transport seam, which answers as the documentation says.

It keeps items, etags and conditions for real, so that what happened can be told from what was answered; *faults*
come between the two: an answer, a broken connection or silence, before the request takes effect, after it, or with
the effect coming late.
"""

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from aiohttp import ServerDisconnectedError
from azure.core.exceptions import ServiceRequestError, ServiceResponseError
from azure.core.pipeline.transport import AsyncHttpResponse, AsyncHttpTransport

CLOUD = "https://account.documents.azure.com:443/"
CHARGES = {"GET": 1.0, "POST": 6.5, "PUT": 10.25, "DELETE": 5.0}
"""What the account charges for each method."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """
    What comes instead of an answer: a status, a cut connection, a refused one, or silence.

    *effect* says whether the request does its work all the same: "none", "done", or "late" (before the next write).
    """

    status: int = 0
    sub_status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = "answer"
    effect: str = "none"


def cut(effect: str = "none") -> Fault:
    """The connection breaks after the request was sent."""
    return Fault(kind="cut", effect=effect)


def silence(effect: str = "none") -> Fault:
    """No answer ever comes."""
    return Fault(kind="silence", effect=effect)


def answered(status: int, effect: str = "none", *, sub_status: int = 0, **headers: str) -> Fault:
    """An answer that does not come from the item."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(status=status, sub_status=sub_status, headers=named, effect=effect)


REFUSED = Fault(kind="refused")
"""The connection cannot be made."""


@dataclass(frozen=True)
class Asked:
    """A request for items, as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any

    @property
    def is_query(self) -> bool:
        return "query" in self.headers.get("content-type", "")

    @property
    def is_write(self) -> bool:
        return self.method != "GET" and not self.is_query


class Answered(AsyncHttpResponse):
    """An answer."""

    def __init__(self, request: Any, status: int, body: Any, headers: Mapping[str, str]) -> None:
        super().__init__(request, None)
        self.status_code = status
        self.headers = {"content-type": "application/json", **headers}
        self.content_type = "application/json"
        self._body = b"" if body is None else json.dumps(body).encode()

    def body(self) -> bytes:
        return self._body


class CosmosAccount(AsyncHttpTransport):
    """One account with one database ``troop``; every container exists but ``missing``."""

    def __init__(self, *faults: Fault, endpoint: str = CLOUD, regions: int = 1) -> None:
        self.items: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.faults = list(faults)
        self.asked: list[Asked] = []
        self.results: list[list[dict[str, Any]]] = []
        """What the next queries find."""
        self.metadata: list[str] = []
        self.containers: dict[str, dict[str, Any]] = {}
        self.partition_key = "/partition"
        self.on_write: Callable[[], None] = lambda: None
        self.opened = self.closed = 0
        self._endpoint = endpoint
        self._regions = regions
        self._late: list[Asked] = []
        self._etags = iter(range(1, 1_000_000))

    @property
    def writes(self) -> list[Asked]:
        """The writes that arrived."""
        return [asked for asked in self.asked if asked.is_write]

    def put(self, container: str, item: Mapping[str, Any]) -> dict[str, Any]:
        """Store an item, as another writer."""
        new = {**item, "_etag": f'"{next(self._etags)}"'}
        self.items[container, item["partition"], item["id"]] = new
        return new

    def only(self) -> dict[str, Any]:
        """The one item that is there."""
        (item,) = self.items.values()
        return item

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_args: object) -> None:
        await self.close()

    async def send(self, request: Any, **_options: Any) -> Answered:
        await asyncio.sleep(0)  # as a real one, it lets others run
        path = [unquote(part) for part in urlsplit(request.url).path.split("/") if part]
        headers = {name.lower(): str(value) for name, value in request.headers.items()}
        data = getattr(request, "data", None)
        asked = Asked(request.method, "/".join(path), headers, json.loads(data) if data else None)
        if len(path) < 5 or path[4] != "docs":
            self.metadata.append(f"{asked.method} {asked.path}")
            return self._answer(request, *self._metadata(asked, path))
        self.asked.append(asked)
        return self._answer(request, *await self._meet(asked, path))

    async def _meet(self, asked: Asked, path: list[str]) -> tuple[int, Any, Mapping[str, str]]:
        if asked.is_write:
            late, self._late = self._late, []
            for one in late:
                self._apply(one, one.path.split("/"))
            self.on_write()
        fault = self.faults.pop(0) if self.faults else None
        if fault is None:
            return self._apply(asked, path)
        if fault.effect == "done":
            self._apply(asked, path)
        elif fault.effect == "late":
            self._late.append(asked)
        match fault.kind:
            case "cut":
                inner = ServerDisconnectedError()
                raise ServiceResponseError(inner, error=inner)
            case "refused":
                raise ServiceRequestError("the connection was refused")
            case "silence":
                await asyncio.sleep(3600)
        headers = {"x-ms-substatus": str(fault.sub_status)} if fault.sub_status else {}
        return fault.status, {"code": "Fault", "message": "secret-text"}, {**headers, **fault.headers}

    def _apply(self, asked: Asked, path: list[str]) -> tuple[int, Any, Mapping[str, str]]:
        container, headers = path[3], asked.headers
        partition = json.loads(headers.get("x-ms-documentdb-partitionkey", "[null]"))[0]
        if asked.is_query:
            return 200, {"Documents": self.results.pop(0) if self.results else []}, {}
        if headers.get("x-ms-cosmos-is-batch-request"):
            return self._batch(container, partition, asked.body)
        id_ = path[5] if len(path) > 5 else asked.body["id"]
        return self._one(asked.method, container, partition, id_, asked.body, headers.get("if-match"))

    def _one(
        self, method: str, container: str, partition: str, id_: str, body: Any, etag: str | None
    ) -> tuple[int, Any, Mapping[str, str]]:
        place = container, partition, id_
        found = self.items.get(place)
        match method:
            case "POST" if found:
                return 409, {"code": "Conflict"}, {}
            case "GET" | "PUT" | "DELETE" if not found:
                return 404, {"code": "NotFound"}, {}
            case "PUT" | "DELETE" if etag and found and etag != found["_etag"]:
                return 412, {"code": "PreconditionFailed"}, {}
            case "GET":
                return 200, found, {"etag": found["_etag"]} if found else {}
            case "DELETE":
                del self.items[place]
                return 204, None, {}
        new = self.put(container, body)
        return (201 if method == "POST" else 200), None, {"etag": new["_etag"]}

    def _batch(self, container: str, partition: str, steps: Iterable[Any]) -> tuple[int, Any, Mapping[str, str]]:
        before, steps, results = dict(self.items), list(steps), []
        methods = {"Create": "POST", "Replace": "PUT", "Delete": "DELETE"}
        for n, step in enumerate(steps):
            id_ = step.get("id") or step["resourceBody"]["id"]
            method, body = methods[step["operationType"]], step.get("resourceBody")
            status, _, headers = self._one(method, container, partition, id_, body, step.get("ifMatch"))
            if status >= 400:
                self.items = before
                others: list[dict[str, Any]] = [{"statusCode": 424, "requestCharge": 0} for _ in steps]
                return 207, [*others[:n], {"statusCode": status, "requestCharge": 1}, *others[n + 1 :]], {}
            results.append({"statusCode": status, "requestCharge": 1, "eTag": headers.get("etag")})
        return 200, results, {}

    def _metadata(self, asked: Asked, path: list[str]) -> tuple[int, Any, Mapping[str, str]]:
        match path:
            case []:
                return 200, self._account(), {}
            case [*_, "pkranges"] if "if-none-match" in asked.headers:
                return 304, None, {"etag": '"ranges"'}
            case [*_, "pkranges"]:
                return (
                    200,
                    {"PartitionKeyRanges": [{"id": "0", "minInclusive": "", "maxExclusive": "FF"}]},
                    {"etag": '"ranges"'},
                )
            case ["dbs", _, "colls", name] if asked.method == "PUT":
                self.containers[name] = asked.body
                return 200, {**asked.body, "_rid": "r"}, {}
            case ["dbs", _, "colls", "missing"]:
                return 404, {"code": "NotFound"}, {}
            case ["dbs", _, "colls", name]:
                key = {"paths": [self.partition_key], "kind": "Hash", "version": 2}
                return 200, {"id": name, "_rid": "r", "partitionKey": key, **self.containers.get(name, {})}, {}
            case _:
                return 200, {"id": path[-1], "_rid": "r"}, {}

    def _account(self) -> dict[str, Any]:
        places = [
            {"name": f"Region {n}", "databaseAccountEndpoint": self._endpoint.replace("account.", f"account-{n}.")}
            for n in range(self._regions)
        ]
        return {
            "id": "account",
            "writableLocations": places[:1],
            "readableLocations": places,
            "enableMultipleWriteLocations": False,
            "userConsistencyPolicy": {"defaultConsistencyLevel": "Session"},
        }

    def _answer(self, request: Any, status: int, body: Any, headers: Mapping[str, str]) -> Answered:
        charge = {"x-ms-request-charge": str(CHARGES[request.method])}
        return Answered(request, status, body, {**charge, **headers})
