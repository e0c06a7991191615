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
from urllib.parse import SplitResult, quote, urlsplit

from pydantic import SecretStr

from alerts.adapters.discord_buckets import PATIENCE, Buckets, News
from alerts.adapters.discord_message import message_of, safe_message_of
from alerts.ports import Message
from shared.clock import Clock
from shared.documents import Documents
from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    OutcomeUnknownError,
    RateLimitedError,
    RecipientGoneError,
    RefusedError,
    TroopError,
    UnavailableError,
)
from shared.http_client import Answer, HttpClient
from shared.telemetry import get_logger

log = get_logger(__name__)

HOSTS = frozenset({"discord.com", "discordapp.com", "ptb.discord.com", "canary.discord.com"})
HERE = frozenset({"127.0.0.1", "localhost"})
BASE = "https://discord.com"
EXECUTE, EDIT = "execute", "edit"
LONGEST_WAIT = timedelta(days=1)
BANNED = timedelta(minutes=1)
"""How long we are quiet when Cloudflare stops us before Discord, and does not say how long."""
_PATH = re.compile(r"(?P<base>.*)/api/(?:v\d+/)?webhooks/(?P<id>\d{17,20})/(?P<token>[A-Za-z0-9_-]{20,128})")
_FORM = "https://discord.com/api/webhooks/ID/TOKEN"

UNKNOWN_MESSAGE, UNKNOWN_WEBHOOK, INVALID_TOKEN, TOO_MANY_OLD_EDITS = 10008, 10015, 50027, 30046


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A webhook's address, taken apart and made anew; its token is the whole credential."""

    base: str
    id: str
    token: SecretStr

    @classmethod
    def parse(cls, url: str) -> Self:
        """
        Read the setting: a webhook of Discord's, or of an inbox on this machine.

        Raises:
            ConfigurationError: it has another form; the message never shows it.

        """
        found = cls._found(url, is_local_allowed=True)
        if found is None:
            raise ConfigurationError(f"DISCORD_WEBHOOK_URL must have the form {_FORM}; copy it again")
        return found

    @classmethod
    def of_subscriber(cls, url: str, *, beside: Self | None = None) -> Self:
        """
        Read a subscriber's own: Discord's hosts only, and the local inbox where *beside* is there, too.

        Raises:
            InvalidPayloadError: it has another form or host; the message never shows it.

        """
        found = cls._found(url, is_local_allowed=beside is not None and beside.is_local)
        if found is None or (found.is_local and (beside is None or found.base != beside.base)):
            raise InvalidPayloadError(f"is no Discord webhook: it has the form {_FORM}")
        return found

    @classmethod
    def _found(cls, url: str, *, is_local_allowed: bool) -> Self | None:
        parts = _split(url.strip(" "))
        found = _PATH.fullmatch(parts.path) if parts else None
        if parts is None or found is None:
            return None
        if parts.scheme == "https" and parts.hostname in HOSTS and parts.port in (None, 443) and not found["base"]:
            base = BASE
        elif is_local_allowed and parts.hostname in HERE:
            base = f"{parts.scheme}://{parts.netloc}{found['base']}"
        else:
            return None
        return cls(base=base, id=found["id"], token=SecretStr(found["token"]))

    @property
    def is_local(self) -> bool:
        """Whether it belongs to an inbox on this machine."""
        return self.base != BASE

    @property
    def url(self) -> str:
        return f"{self.base}/api/webhooks/{self.id}/{self.token.get_secret_value()}"


class DiscordChannel:
    """
    The webhook of the setting, and those of subscribers.

    A webhook's rate bucket is kept in storage, so that all instances together stay within it, and so is that it is
    gone: Discord wants such a webhook never to be used again.
    """

    name = "discord"
    is_keyed = False
    can_edit = True
    needs_address = True

    def __init__(
        self,
        webhook_url: str,
        http: HttpClient,
        documents: Documents,
        wall: Clock,
        *,
        patience: timedelta = PATIENCE,
    ) -> None:
        self._webhook = Webhook.parse(webhook_url)
        self._http = http
        self._buckets = Buckets(documents, wall, patience=patience)

    async def send(self, message: Message) -> str | None:
        hook = self._webhook_of(message)
        answer = await self._ask(EXECUTE, "POST", hook, "", message_of(message))
        if answer.status == 400:
            # Our embed displeased, so what it says goes out as text: a refusal took nothing.
            log.warning("message.simplified", channel=self.name, delivery_id=message.delivery_id, code=_code(answer))
            answer = await self._ask(EXECUTE, "POST", hook, "", safe_message_of(message))
        _classify(answer)
        found = _json(answer).get("id")
        return str(found) if found else None

    async def edit(self, provider_id: str | None, message: Message) -> None:
        if not provider_id:
            return
        hook, path = self._webhook_of(message), f"/messages/{quote(provider_id, safe='')}"
        try:
            answer = await self._ask(EDIT, "PATCH", hook, path, message_of(message))
            if answer.status == 400 and _code(answer) != TOO_MANY_OLD_EDITS:
                answer = await self._ask(EDIT, "PATCH", hook, path, safe_message_of(message))
            if answer.status == 404 and not _is_gone(answer, EDIT) and not _is_html(answer):
                return  # the message was deleted: there is nothing to correct
            _classify(answer)
        except OutcomeUnknownError as e:  # correcting twice is correcting once
            raise UnavailableError(str(e)) from None

    def _webhook_of(self, message: Message) -> Webhook:
        if message.to is None:
            return self._webhook
        try:
            return Webhook.of_subscriber(message.to.value.get_secret_value(), beside=self._webhook)
        except InvalidPayloadError:
            raise RecipientGoneError("the stored address is no Discord webhook: enter it again") from None

    async def _ask(self, call: str, method: str, hook: Webhook, path: str, body: Mapping[str, Any]) -> Answer:
        token = hook.token.get_secret_value()
        permit = await self._buckets.reserve(hook.id, token, call)
        try:
            answer = await self._http.send(
                method,
                f"{hook.url}{path}",
                params={"wait": "true"},
                headers={"Content-Type": "application/json"},
                content=json.dumps(body).encode(),
                url_is_secret=True,
            )
        except UnavailableError:
            await self._settle(hook, call, permit, None)
            raise
        except OutcomeUnknownError:
            await self._settle(hook, call, permit, News(is_lost=True))
            raise
        await self._settle(hook, call, permit, _news(answer, call))
        return answer

    async def _settle(self, hook: Webhook, call: str, permit: str, news: News | None) -> None:
        try:
            await self._buckets.settle(hook.id, hook.token.get_secret_value(), call, permit, news)
        except TroopError as e:
            # What the service took, it took: trouble of our own storage must not look like its refusal.
            log.warning("bucket.not_kept", channel=self.name, reason=str(e))


def _classify(answer: Answer) -> None:
    """Discord's answers, in our words."""
    match answer.status, _code(answer):
        case ((200 | 204), _):
            return
        case 429, _:
            raise RateLimitedError("Discord asked us to slow down", retry_after=_wait_of(answer))
        case _, code if code == TOO_MANY_OLD_EDITS:
            raise RateLimitedError("Discord takes no more edits of old messages now", retry_after=_wait_of(answer))
        case ((401 | 403 | 404), _) if _is_html(answer):
            raise UnavailableError(f"something before Discord refused the call ({answer.status})")
        case ((401 | 403 | 404), code):
            raise RecipientGoneError(f"the Discord webhook is gone or closed to us ({answer.status}, code {code})")
        case ((400 | 413), code):
            raise RefusedError(f"Discord refused the message ({answer.status}, code {code})")
        case status, _ if status >= 500:
            raise OutcomeUnknownError(f"Discord answered {status}")
        case status, _:
            raise RefusedError(f"Discord answered {status}")


def _news(answer: Answer, call: str) -> News:
    """What an answer says of the webhook's bucket."""
    headers = answer.headers
    limit, remaining = _number(headers.get("x-ratelimit-limit")), _number(headers.get("x-ratelimit-remaining"))
    reset = _number(headers.get("x-ratelimit-reset-after"))
    body = _json(answer)
    return News(
        limit=int(limit) if limit and limit >= 1 else None,
        remaining=int(remaining) if remaining is not None else None,
        reset_after=timedelta(seconds=reset) if reset is not None else None,
        wait=_wait_of(answer),
        is_global=answer.status == 429
        and (_is_banned(answer) or body.get("global") is True or headers.get("x-ratelimit-scope") == "global"),
        is_gone=_is_gone(answer, call),
    )


def _is_gone(answer: Answer, call: str) -> bool:
    """Whether it is the webhook that is no more, and not only a message of it."""
    if answer.status not in (401, 403, 404) or _is_html(answer):
        return False
    return call == EXECUTE or answer.status != 404 or _code(answer) in (UNKNOWN_WEBHOOK, INVALID_TOKEN)


def _wait_of(answer: Answer) -> timedelta | None:
    """How long we are asked to wait, header or body, whichever says longer; None when we are not."""
    if answer.status != 429 and _code(answer) != TOO_MANY_OLD_EDITS:
        return None
    told = [_number(answer.headers.get("retry-after")), _number(_json(answer).get("retry_after"))]
    unless_told = BANNED.total_seconds() if answer.status != 429 or _is_banned(answer) else 1.0
    return timedelta(seconds=max((n for n in told if n is not None), default=unless_told) or unless_told)


def _is_banned(answer: Answer) -> bool:
    """Whether Cloudflare answered instead of Discord: after too many invalid requests of this address."""
    return answer.status == 429 and _is_html(answer)


def _is_html(answer: Answer) -> bool:
    return answer.body.lstrip()[:1] == b"<" or answer.headers.get("content-type", "").startswith("text/html")


def _split(url: str) -> SplitResult | None:
    """The parts of an address that may be a webhook's: https or this machine, and nothing that a webhook lacks."""
    if not url.isascii() or not url.isprintable() or re.search(r"[\s\\%@?#]", url):
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    is_plain = parts.scheme == "http" and parts.hostname in HERE
    return parts if parts.scheme == "https" or is_plain else None


def _code(answer: Answer) -> int | None:
    code = _json(answer).get("code")
    return code if isinstance(code, int) and not isinstance(code, bool) else None


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
