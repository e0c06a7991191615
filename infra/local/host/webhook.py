"""The Event Grid webhook, answering as the Functions host's Event Grid extension does."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.local.host.spans import Cause
from infra.local.host.worker import Function, Worker, failure_text

PATH = "/runtime/webhooks/eventgrid"


@dataclass(frozen=True, slots=True)
class Reply:
    """A status with a plain text or a JSON value."""

    status: int
    text: str = ""
    value: object = None


@dataclass(frozen=True, slots=True)
class EventGridWebhook:
    """Hands the events of one request to a function, all in parallel.

    A failed one fails the request: Event Grid then sends the whole array again.
    """

    worker: Worker
    functions: Mapping[str, Function]

    @classmethod
    def over(cls, worker: Worker) -> "EventGridWebhook":
        """The webhook of all Event Grid functions of a worker."""
        return cls(
            worker,
            {
                name.lower(): function
                for name, function in worker.functions.items()
                if function.trigger_type == "eventGridTrigger"
            },
        )

    async def answer(self, function_name: str, event_type: str, body: bytes) -> Reply:
        """Answer one request; `event_type` is its `aeg-event-type` header."""
        function = self.functions.get(function_name.lower())
        if function is None:
            return Reply(404, f"no Event Grid function is named {function_name!r}")
        match event_type.lower():
            case "subscriptionvalidation":
                return _handshake(body)
            case "notification":
                return await self._notify(function, body)
            case "unsubscribe":
                return Reply(202)
            case _:
                return Reply(
                    400,
                    "the header aeg-event-type must be SubscriptionValidation, Notification or Unsubscribe",
                )

    async def _notify(self, function: Function, body: bytes) -> Reply:
        try:
            content = json.loads(body)
        except ValueError as e:
            return Reply(400, f"the body is not JSON: {e}")
        events = content if isinstance(content, list) else [content]
        if not all(isinstance(event, dict) for event in events):
            return Reply(400, "the body must be an event or an array of events")
        errors = await asyncio.gather(*(self._invoke(function, event) for event in events))
        failed = [error for error in errors if error is not None]
        if failed:
            return Reply(500, failure_text(function.name, "\n".join(failed)))
        return Reply(202)

    async def _invoke(self, function: Function, event: dict[str, Any]) -> str | None:
        link = event.get("traceparent")
        cause = Cause(kind="CONSUMER", link=link if isinstance(link, str) else "")
        outcome = await self.worker.invoke_event_grid(function.name, json.dumps(event), cause=cause)
        return outcome.error


def _handshake(body: bytes) -> Reply:
    try:
        content = json.loads(body)
        event = content[0] if isinstance(content, list) else content
        code = event["data"]["validationCode"]
    except (ValueError, LookupError, TypeError):
        return Reply(400, "the body carries no data.validationCode")
    return Reply(200, value={"validationResponse": code})
