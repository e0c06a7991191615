"""
One call to Cosmos DB: its budget, its tries, what it costs, and what became of a write.

A call ends within its budget (5 s, half of it for each try) after at most three tries, so a handler's ten seconds hold
two. A 429 is waited for if the wait fits; otherwise it is the caller's schedule.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from shared.adapters.cosmos_wire import (
    NO_ETAG,
    Answer,
    answer_of,
    charge_of,
    error_of,
    escape_id,
    etag_parts,
    has_expired,
    item_of,
    stored,
)
from shared.documents import Document, Operation
from shared.errors import ConflictError, NotFoundError, StaleError, UnavailableError

if TYPE_CHECKING:
    from azure.cosmos.aio import ContainerProxy

BUDGET = timedelta(seconds=5)
TRIES = 3


class NoSuccessError(Exception):
    """A try brought something else than success."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.answer = answer


class Verdict(Enum):
    """What is known of a write that was not simply confirmed."""

    DONE = auto()
    OPEN = auto()
    AGAIN = auto()


@dataclass(slots=True, kw_only=True)
class Step:
    """One document to be written; ``over`` is the etag of an expired item that a create takes the place of."""

    kind: Literal["create", "replace", "delete"]
    document: Document
    id: str
    item: dict[str, Any]
    etag: str
    over: str | None = None

    @classmethod
    def of(cls, operation: Operation, *, claim: str, now: datetime) -> "Step":
        """Prepare an operation of the port."""
        document = operation.document
        deletes = operation.kind == "delete"
        return cls(
            kind=operation.kind,
            document=document,
            id=escape_id(document.id),
            item={} if deletes else item_of(document, claim=claim, now=now),
            etag=etag_parts(document.etag)[0],
        )


class Call:
    """A call in progress; ``charge`` is what it has cost so far and ``etag`` what the last answer said."""

    container: "ContainerProxy"

    def __init__(self, name: str, budget: timedelta) -> None:
        self.name = name
        self.charge = 0.0
        self.etag = ""
        self._share = budget.total_seconds() / 2
        self._deadline = asyncio.get_running_loop().time() + budget.total_seconds()

    def note(self, headers: Mapping[str, Any], _result: object = None) -> None:
        """Take what an answer says about itself."""
        self.charge += charge_of(headers)
        self.etag = headers.get("etag") or ""

    async def once[T](self, attempt: Callable[[], Awaitable[T]]) -> T:
        """
        Try once, for at most half of the budget.

        Raises:
            NoSuccessError: carries the answer.

        """
        from azure.core.exceptions import AzureError

        try:
            async with asyncio.timeout_at(min(asyncio.get_running_loop().time() + self._share, self._deadline)):
                return await attempt()
        except (AzureError, TimeoutError) as e:
            answer = answer_of(e)
        # Raised outside the handler: what was caught holds the request.
        self.charge += answer.charge
        raise NoSuccessError(answer)

    async def ask[T](self, attempt: Callable[[], Awaitable[T]], name: str) -> T:
        """Do what may be repeated, until it succeeds or cannot."""
        tries = 0
        while True:
            tries += 1
            try:
                return await self.once(attempt)
            except NoSuccessError as e:
                answer = e.answer
            if not answer.is_passing or not await self.pause(answer, tries):
                raise error_of(answer, name)

    async def look(self, step: Step) -> dict[str, Any] | None:
        """The item that is stored where *step* writes; None when there is none."""
        try:
            return await self.once(lambda: self.read(step.id, step.document.partition))
        except NoSuccessError as e:
            if e.answer.status == 404:
                return None
            raise

    async def find(self, step: Step) -> dict[str, Any] | None:
        """The same, patiently."""
        try:
            return await self.ask(lambda: self.read(step.id, step.document.partition), self.name)
        except NotFoundError:
            return None

    async def read(self, id: str, partition: str) -> dict[str, Any]:
        """The item itself."""
        return await self.container.read_item(id, partition_key=partition, response_hook=self.note)

    async def pause(self, answer: Answer, tries: int) -> bool:
        """Wait before the next try; False when there is none left in the budget."""
        pause = random.uniform(0.5, 1.0) * 0.025 * 2**tries  # noqa: S311 - jitter
        if answer.retry_after is not None:
            pause = answer.retry_after.total_seconds()
        if tries >= TRIES or asyncio.get_running_loop().time() + pause >= self._deadline:
            return False
        await asyncio.sleep(pause)
        return True


class Write:
    """
    A write of one or more documents, which happens once or not at all.

    Every attempt carries the same claim. When no answer came, or when an attempt meets a document that is already
    there, the stored claim says whether it was us: nothing is guessed.
    """

    def __init__(self, call: Call, steps: Sequence[Step], claim: str, now: datetime) -> None:
        self._call = call
        self._steps = steps
        self._claim = claim
        self._now = now
        self._is_uncertain = False
        self._seen: dict[str, dict[str, Any] | None] = {}

    async def run(self, send: Callable[[], Awaitable[list[Document]]]) -> list[Document]:
        """Attempt it until it is known to have happened, or to be impossible."""
        tries = 0
        while True:
            tries += 1
            try:
                return await self._call.once(send)
            except NoSuccessError as e:
                answer = e.answer
            self._is_uncertain |= answer.is_unknown
            verdict = await self._judge(answer)
            if verdict is Verdict.DONE:
                return await self._written()
            if (verdict is Verdict.AGAIN and tries < TRIES) or await self._call.pause(answer, tries):
                continue
            self._give_up(answer)

    async def _judge(self, answer: Answer) -> Verdict:
        """Look at what is stored where the answer does not say enough; raises what is certain."""
        step = self._steps[answer.index]
        if answer.status == 404 and not (step.kind == "create" and step.over is None):
            return self._compare(step, None)
        if not answer.is_unknown and answer.status not in (409, 412):
            if answer.is_passing:
                return Verdict.OPEN
            raise error_of(answer, self._name(step))
        try:
            return await self._look_around(step)
        except NoSuccessError:
            return Verdict.OPEN

    async def _look_around(self, step: Step) -> Verdict:
        # Of a batch whose outcome is unknown, one document may have been written again since: ask for all.
        others = [other for other in self._steps if other.item and other is not step] if self._is_uncertain else []
        for one in (step, *others):
            found = self._seen[one.id] = await self._call.look(one)
            if self._is_ours(found):
                return Verdict.DONE
        return self._compare(step, self._seen[step.id])

    def _is_ours(self, found: Mapping[str, Any] | None) -> bool:
        return found is not None and found.get("claim") == self._claim

    def _compare(self, step: Step, found: Mapping[str, Any] | None) -> Verdict:
        gone = found is None or has_expired(found, self._now)
        if step.kind == "create":
            if not gone:
                raise ConflictError(f"{self._name(step)} exists already")
            step.over = found["_etag"] if found else None
            return Verdict.AGAIN if found else Verdict.OPEN
        if found and found["_etag"] == step.etag and not gone:
            return Verdict.OPEN
        if step.kind == "delete" and found is None and self._is_uncertain:
            return Verdict.DONE
        if gone:
            raise NotFoundError(f"no {self._name(step)}")
        raise StaleError(f"{self._name(step)} was written by somebody else")

    async def _written(self) -> list[Document]:
        """What we are now known to have written."""
        documents = []
        for step in self._steps:
            if not step.item:
                documents.append(step.document)
                continue
            found = self._seen.get(step.id)
            if not self._is_ours(found):
                found = await self._call.find(step)
            # Somebody may have written after us: our etag is lost then, and the next write must find out.
            etag = found["_etag"] if found and self._is_ours(found) else NO_ETAG
            documents.append(stored(step.document, etag))
        return documents

    def _give_up(self, answer: Answer) -> NoReturn:
        name = self._name(self._steps[answer.index])
        if self._is_uncertain or answer.status in (404, 409, 412):
            raise UnavailableError(f"it is not known whether {name} was written", retry_after=answer.retry_after)
        raise error_of(answer, name)

    def _name(self, step: Step) -> str:
        return f"{self._call.name}/{step.document.partition}/{step.document.id}"
