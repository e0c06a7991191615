"""Event Grid's custom topic, through azure-eventgrid with its own retries off: one retry policy, ours."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    RateLimitedError,
    RefusedError,
    TroopError,
    UnavailableError,
)
from shared.events import Event
from shared.retry import retry
from shared.telemetry import trace_headers

if TYPE_CHECKING:
    from azure.eventgrid.aio import EventGridPublisherClient

BATCH = 200
"""Events a request; our largest event is under 4 kB and a request may be 1 MB."""
BUDGET = 6.0
"""Seconds for one request and its repetitions; the client's ``timeout`` bounds only the gaps between them."""


class EventGridPublisher:
    """
    Publishes CloudEvents to a custom topic.

    The trace is put on each event here: the client's own policy drops it when there is no tracestate and
    truncates the body when there is one (azure-eventgrid 4.22.1).
    """

    def __init__(self, endpoint: str, key: SecretStr) -> None:
        self._endpoint = endpoint
        self._key = key
        self._client: EventGridPublisherClient | None = None

    async def publish(self, events: Sequence[Event]) -> None:
        for start in range(0, len(events), BATCH):
            wire = [_wire(event) for event in events[start : start + BATCH]]
            try:
                async with asyncio.timeout(BUDGET):
                    await retry(lambda wire=wire: self._send(wire))  # type: ignore[misc]
            except TimeoutError:
                raise UnavailableError("the event topic did not take the events in time") from None

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def _send(self, wire: list[Any]) -> None:
        from azure.core.exceptions import HttpResponseError, ServiceRequestError, ServiceResponseError

        try:
            await self._connect().send(wire)
        except HttpResponseError as e:
            headers = getattr(e.response, "headers", {})
            raise _classify(e.status_code, headers.get("Retry-After")) from None
        except (ServiceRequestError, ServiceResponseError) as e:
            raise UnavailableError(f"the event topic did not answer ({type(e).__name__})") from None

    def _connect(self) -> "EventGridPublisherClient":
        if self._client is None:
            from azure.core.credentials import AzureKeyCredential
            from azure.eventgrid.aio import EventGridPublisherClient

            key = self._key.get_secret_value()
            if key:
                credential: Any = AzureKeyCredential(key)
            else:
                from azure.identity.aio import DefaultAzureCredential

                credential = DefaultAzureCredential()
            self._client = EventGridPublisherClient(
                self._endpoint,
                credential,
                retry_total=0,
                retry_status=0,
                retry_connect=0,
                retry_read=0,
                use_env_settings=False,  # a proxy and a netrc file would be looked up for every request, in a thread
                connection_timeout=2,
                read_timeout=5,
            )
        return self._client


def _wire(event: Event) -> Any:  # noqa: ANN401 - azure.core is imported late
    from azure.core.messaging import CloudEvent

    return CloudEvent(
        source=event.source,
        type=event.type,
        id=event.event_id,
        subject=event.subject,
        time=event.recorded_at,
        datacontenttype="application/json",
        data=event.model_dump(mode="json"),
        extensions=trace_headers() or None,
    )


def _classify(status: int | None, retry_after: str | None) -> TroopError:
    """Event Grid's answers, in our words (facts: functions-host.md section 5)."""
    match status:
        case 408 | 500 | 502 | 503 | 504:
            return UnavailableError(f"the event topic answered {status}")
        case 429:
            from datetime import timedelta

            wait = timedelta(seconds=float(retry_after)) if retry_after and retry_after.isdigit() else None
            return RateLimitedError("the event topic asked us to slow down", retry_after=wait)
        case 401 | 403 | 404 | None:
            return ConfigurationError(
                f"the event topic refused us ({status}): check EVENT_GRID_TOPIC_ENDPOINT and EVENT_GRID_TOPIC_KEY"
            )
        case 400 | 413:
            return InvalidPayloadError(f"the event topic refused an event ({status})")
        case _:
            return RefusedError(f"the event topic answered {status}")
