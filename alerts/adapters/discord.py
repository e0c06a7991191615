"""
Discord incoming webhooks.

They have no idempotency key, so an attempt that ended without an answer has an unknown outcome. Limits and
answers as Discord documents them (facts: delivery.md B1); ``wait=true`` because without it an unsaved message
returns no error.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import SecretStr

from alerts.models import Alert
from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    NotFoundError,
    OutcomeUnknownError,
    RateLimitedError,
    RecipientGoneError,
    RefusedError,
    StaleError,
    TroopError,
)
from shared.http_client import Answer, HttpClient
from shared.telemetry import get_logger

log = get_logger(__name__)

TITLE, DESCRIPTION, FIELD_VALUE, FOOTER = 256, 4096, 256, 512
"""Within Discord's limits of each, and so that the sum of an embed stays below its limit of 6,000."""
LONGEST_WAIT = timedelta(days=1)
COLOURS = {"long": 0x2E9E5B, "short": 0xC0392B}
CONTAINER = "system"
_PATH = re.compile(r"(?P<base>.*)/api/(?:v\d+/)?webhooks/(?P<id>\d{17,20})/(?P<token>[A-Za-z0-9_-]{20,128})")
_BREAK = "\u200b"
_MARKDOWN = re.compile(r"([\\*_~`|>\[\]()#])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A webhook's address, taken apart; its token is the whole credential."""

    base: str
    id: str
    token: SecretStr

    @classmethod
    def parse(cls, url: str) -> Self:
        """
        Read a webhook URL.

        Raises:
            ConfigurationError: it has another form; the message never shows it.

        """
        parts = _split(url)
        found = _PATH.fullmatch(parts.path) if parts else None
        if parts is None or found is None:
            raise ConfigurationError(
                "DISCORD_WEBHOOK_URL must have the form https://discord.com/api/webhooks/ID/TOKEN; copy it again"
            )
        return cls(
            base=f"{parts.scheme}://{parts.netloc}{found['base']}", id=found["id"], token=SecretStr(found["token"])
        )

    @property
    def url(self) -> str:
        return f"{self.base}/api/webhooks/{self.id}/{self.token.get_secret_value()}"


class DiscordChannel:
    """
    One webhook. Its rate bucket is kept in storage, so that every instance waits when one was told to.
    """

    name = "discord"

    def __init__(self, webhook_url: str, http: HttpClient, documents: Documents, wall: Clock) -> None:
        self._webhook = Webhook.parse(webhook_url)
        self._http = http
        self._documents = documents
        self._wall = wall

    async def send(self, alert: Alert, item: Mapping[str, Any]) -> str | None:
        await self._wait_asked()
        answer = await self._http.send(
            "POST",
            self._webhook.url,
            params={"wait": "true"},
            headers={"Content-Type": "application/json"},
            content=json.dumps(message_of(alert)).encode(),
            url_is_secret=True,
        )
        try:
            await self._learn(answer)
        except TroopError as e:
            # What the service took, it took: trouble of our own storage must not look like its refusal.
            log.warning("bucket.not_kept", channel=self.name, reason=str(e))
        return _classify(answer)

    async def _wait_asked(self) -> None:
        bucket = await self._bucket()
        until = bucket and bucket.body["blocked_until"]
        wait = parse_instant(until) - self._wall.now() if until else timedelta()
        if wait > timedelta():
            raise RateLimitedError("the webhook's bucket is empty", retry_after=wait)

    async def _learn(self, answer: Answer) -> None:
        """Keep what the answer says about the bucket: nobody sends before it is full again."""
        wait = _wait_of(answer)
        if wait is None:
            return
        until = self._wall.now() + wait
        body = {"blocked_until": format_instant(until)}
        bucket = await self._bucket()
        try:
            if bucket is None:
                id_ = f"discord|{self._webhook.id}"
                sort = sort_key(self._wall.now(), id_)
                await self._documents.create(CONTAINER, Document(id=id_, partition="discord", sort=sort, body=body))
            elif parse_instant(bucket.body["blocked_until"]) < until:
                await self._documents.replace(CONTAINER, bucket.with_body(body))
        except (ConflictError, StaleError):
            return  # another instance learnt it at the same moment

    async def _bucket(self) -> Document | None:
        try:
            return await self._documents.read(CONTAINER, "discord", f"discord|{self._webhook.id}")
        except NotFoundError:
            return None


def message_of(alert: Alert) -> dict[str, Any]:
    """An alert as an embed within Discord's limits; nobody is ever mentioned."""
    return {
        "embeds": [
            {
                "title": plain(alert.title, TITLE),
                "description": plain(alert.text, DESCRIPTION),
                "color": COLOURS.get(alert.direction, 0x7F8C8D),
                "timestamp": format_instant(alert.occurred_at),
                "fields": [
                    {"name": "Entry", "value": _filled(alert.entry), "inline": True},
                    {"name": "Interval", "value": _filled(alert.interval), "inline": True},
                ],
                "footer": {"text": f"alert {alert.alert_id} · information, not advice"[:FOOTER]},
            }
        ],
        "allowed_mentions": {"parse": []},
    }


def plain(text: str, most: int) -> str:
    """Text that Discord shows as it is: markdown escaped, mentions and links broken, cut to *most* UTF-16 units."""
    safe = _MARKDOWN.sub(r"\\\1", text)
    for token in ("@", "<", ":/"):
        safe = safe.replace(token, f"{token[0]}{_BREAK}{token[1:]}")
    units = safe.encode("utf-16-le", errors="replace")
    if len(units) <= most * 2:
        return units.decode("utf-16-le")
    # A character of two units that is cut in half is dropped, and so is an escape without what it escaped.
    return units[: (most - 1) * 2].decode("utf-16-le", errors="ignore").rstrip("\\") + "…"


def _filled(text: str) -> str:
    """The value of a field: Discord refuses an empty one."""
    return plain(text, FIELD_VALUE).strip() or "-"


def _split(url: str) -> SplitResult | None:
    """The parts of an address that may be a webhook's: https or this machine, and nothing that a webhook lacks."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    is_local = parts.hostname in ("127.0.0.1", "localhost")
    if parts.scheme not in ("https", "http") or (parts.scheme == "http" and not is_local):
        return None
    return None if parts.query or parts.fragment or "@" in parts.netloc else parts


def _wait_of(answer: Answer) -> timedelta | None:
    """How long the bucket is empty; None while it is not. Header or body, whichever says longer."""
    told: list[float] = []
    if answer.status == 429:
        told.append(_number(answer.headers.get("retry-after")) or 1.0)
        told.append(_number(_json(answer).get("retry_after")) or 0.0)
    elif answer.headers.get("x-ratelimit-remaining") == "0":
        told.append(_number(answer.headers.get("x-ratelimit-reset-after")) or 0.0)
    return timedelta(seconds=max(told)) if told else None


def _classify(answer: Answer) -> str | None:
    """Discord's answers, in our words."""
    match answer.status:
        case 200 | 204:
            found = _json(answer).get("id")
            return str(found) if found else None
        case 429:
            raise RateLimitedError("Discord asked us to slow down", retry_after=_wait_of(answer))
        case 401 | 403 | 404:
            raise RecipientGoneError(f"the Discord webhook is gone or closed to us ({answer.status})")
        case 400 | 413:
            code = _json(answer).get("code")
            raise RefusedError(f"Discord refused the message ({answer.status}, code {code})")
        case status if status >= 500:
            raise OutcomeUnknownError(f"Discord answered {status}")
        case status:
            raise RefusedError(f"Discord answered {status}")


def _json(answer: Answer) -> Mapping[str, Any]:
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return min(number, LONGEST_WAIT.total_seconds()) if number >= 0 else None
