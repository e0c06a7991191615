"""
What Event Grid gave up: blobs in a container, brought into our own dead letters and then deleted.

Event Grid writes what it could not deliver as ``SUBSCRIPTION/2026/11/21/9/<id>.json``, the name of the subscription in
capitals, the date without leading zeros. A timer lists the container and buries what it finds. The other way, an event
of the storage account for every blob, was left out: it needs a second topic with a subscription of its own, whose
deliveries fail just when ours do, and then a sweep all the same. Listing costs one request a minute, finds whatever
lies there however long the app was down, and speaks plain HTTPS with the app's own identity: no key, no further
library. A blob is deleted after its events are stored, so a kill in between only buries them again.
"""

import html
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from shared.errors import ConfigurationError, NotFoundError, TransientError, UnavailableError
from shared.http_client import Answer, HttpClient
from shared.inbound import DeadLetters, seen
from shared.telemetry import get_logger

if TYPE_CHECKING:
    from azure.identity.aio import DefaultAzureCredential

log = get_logger(__name__)

VERSION = "2021-08-06"
SCOPE = "https://storage.azure.com/.default"
AT_A_TIME = 50
"""Blobs collected by one call; the rest waits for the next."""
LARGEST = 2 * 1024 * 1024
"""Bytes of a blob that are read; an event has 1 MB at most."""
SAID = {
    "deadletterreason": "reason",
    "deliveryattempts": "attempts",
    "lastdeliveryoutcome": "last_outcome",
    "publishtime": "published_at",
    "lastdeliveryattempttime": "last_attempt_at",
}
"""What Event Grid adds to an event, in lower case as CloudEvents writes it, and what a letter calls it."""

_NAME = re.compile(r"<Name>([^<]+)</Name>")


class DeadLetterBlobs:
    """The container at *url*, such as ``https://ACCOUNT.blob.core.windows.net/deadletters``."""

    def __init__(self, url: str, http: HttpClient, letters: DeadLetters) -> None:
        parts = urlsplit(url)
        is_here = parts.scheme == "http" and parts.hostname in {"127.0.0.1", "localhost"}
        if not (parts.scheme == "https" or is_here) or not parts.path.strip("/") or parts.query:
            raise ConfigurationError(
                "DEAD_LETTERS_URL is no container: write https://ACCOUNT.blob.core.windows.net/CONTAINER"
            )
        self._url = url.rstrip("/")
        self._http = http
        self._letters = letters
        self._is_open = is_here
        self._credential: DefaultAzureCredential | None = None

    async def collect(self) -> int:
        """
        Bury what lies in the container, the oldest names first; returns how many events.

        Raises:
            TransientError: the container does not answer now; the next call goes on.
            ConfigurationError: we may not read it, or there is none.

        """
        listing = await self._ask("GET", "", {"restype": "container", "comp": "list", "maxresults": AT_A_TIME})
        names = [html.unescape(name) for name in _NAME.findall(listing.body.decode(errors="replace"))]
        count = 0
        for name in names[:AT_A_TIME]:
            try:
                blob = await self._ask("GET", f"/{quote(name)}", {})
            except NotFoundError:
                continue  # another instance was faster
            count += await self._bury(name, blob.body)
            try:
                await self._ask("DELETE", f"/{quote(name)}", {})
            except NotFoundError:
                continue
        if count:
            log.warning("letters.collected", count=count)
        return count

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        if self._credential is not None:
            credential, self._credential = self._credential, None
            await credential.close()

    async def _bury(self, name: str, body: bytes) -> int:
        source = source_of(name)
        try:
            content = json.loads(body) if len(body) <= LARGEST else None
        except (ValueError, RecursionError):
            content = None
        events = content if isinstance(content, list) else [content]
        for number, event in enumerate(events):
            if isinstance(event, dict) and isinstance(event.get("id"), str) and isinstance(event.get("type"), str):
                report, wire = _parted(event)
                shown, digest = seen(wire)
                await self._letters.bury(
                    source, wire["id"], _told(report), shown, digest, origin="topic", report={**report, "blob": name}
                )
                continue
            shown, digest = seen({"type": "", "data": body[:LARGEST].decode(errors="replace")})
            await self._letters.bury(
                source,
                f"{name}#{number}",
                "the topic's dead letter holds no CloudEvent",
                {**shown, "is_whole": False},
                digest,
                origin="topic",
                report={"blob": name},
            )
        return len(events)

    async def _ask(self, method: str, path: str, params: Mapping[str, str | int]) -> Answer:
        headers = {"x-ms-version": VERSION, **await self._authorization()}
        if method == "GET":
            answer = await self._http.get(f"{self._url}{path}", params=params, headers=headers)
        else:
            answer = await self._http.send(method, f"{self._url}{path}", params=params, headers=headers, content=b"")
        match answer.status:
            case 200 | 202 | 204:
                return answer
            case 404 if path:
                raise NotFoundError("the blob is gone")
            case 401 | 403 | 404:
                raise ConfigurationError(
                    f"the container of dead letters refused us ({answer.status}): check DEAD_LETTERS_URL, and that "
                    "this app's identity is Storage Blob Data Contributor there"
                )
            case _:
                raise UnavailableError(f"the container of dead letters answered {answer.status}")

    async def _authorization(self) -> dict[str, str]:
        if self._is_open:
            return {}
        from azure.core.exceptions import AzureError

        if self._credential is None:
            from azure.identity.aio import DefaultAzureCredential

            self._credential = DefaultAzureCredential()
        try:
            token = await self._credential.get_token(SCOPE)
        except AzureError as e:
            trouble: TransientError = UnavailableError(
                f"no token for the container of dead letters ({type(e).__name__})"
            )
        else:
            return {"Authorization": f"Bearer {token.token}"}
        raise trouble


def source_of(name: str) -> str:
    """The function a blob's events were for: subscriptions are named like functions, with hyphens in Azure."""
    parts = name.split("/")
    subscription = parts[-6] if len(parts) >= 6 else parts[0]
    return subscription.lower().replace("-", "_")[:100]


def _parted(event: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Event Grid says of it, and the event as it was published."""
    report = {SAID[name.lower()]: value for name, value in event.items() if name.lower() in SAID}
    return report, {name: value for name, value in event.items() if name.lower() not in SAID}


def _told(report: Mapping[str, Any]) -> str:
    reason, outcome = report.get("reason", "Undelivered"), report.get("last_outcome", "Unknown")
    attempts = report.get("attempts", 0)
    return f"{reason}: {outcome} at the last of {attempts} attempts"
