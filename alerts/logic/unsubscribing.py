"""
Signed links that end one subscription on one channel. Pure: who holds a link needs no login, so it can do only this.

A token is ``v1.KEY-ID.CLAIMS.MAC``. It names the subscriber, the channel, perhaps one subscription, and when it
ends; the MAC is HMAC-SHA256 over everything before it. Reading a token changes nothing: mail scanners follow links.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from shared.errors import ConfigurationError, InvalidPayloadError

FORM = "v1"
LIFE = timedelta(days=180)
"""A link works as long as somebody may reasonably find it in an old mail."""
SHORTEST_KEY = 32
LONGEST_TOKEN = 2048
_PURPOSE = b"troop: unsubscribe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """What the holder of a token may end: one subscription, or with None everything on the channel."""

    subscriber: str
    channel: str
    subscription_id: str | None = None


class UnsubscribeKeys:
    """Keys that sign and verify links: the first signs, all verify."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {hashlib.sha256(_PURPOSE + key).hexdigest()[:8]: key for key in keys}

    @classmethod
    def of_settings(cls, unsubscribe_key: str, endpoint_keys: Mapping[str, bytes]) -> Self:
        """
        Read UNSUBSCRIBE_KEY, one or more texts separated by commas; empty, keys are derived from ENDPOINT_KEYS.

        Raises:
            ConfigurationError: a key is too short; says which by its place, and shows nothing of it.

        """
        texts = [text.strip() for text in unsubscribe_key.split(",")] if unsubscribe_key.strip() else []
        for number, text in enumerate(texts, 1):
            if len(text) < SHORTEST_KEY:
                raise ConfigurationError(
                    f"key {number} of UNSUBSCRIBE_KEY has fewer than {SHORTEST_KEY} characters: "
                    "openssl rand -base64 32 makes a good one"
                )
        derived = [hmac.digest(key, _PURPOSE, "sha256") for key in endpoint_keys.values()]
        return cls([text.encode() for text in texts] or derived)

    def __bool__(self) -> bool:
        """Whether there is a key at all: without one no link can be made."""
        return bool(self._keys)

    def sign(self, leaving: Leaving, *, now: datetime, life: timedelta = LIFE) -> str:
        """
        A token for *leaving* that works until *life* after *now*.

        Raises:
            ConfigurationError: there is no key.

        """
        if not self._keys:
            raise ConfigurationError("no key signs unsubscribe links: set UNSUBSCRIBE_KEY or ENDPOINT_KEYS")
        key_id, key = next(iter(self._keys.items()))
        ends = int((now.astimezone(UTC) + life).timestamp())
        claims = json.dumps([leaving.subscriber, leaving.channel, leaving.subscription_id, ends], separators=(",", ":"))
        signed = f"{FORM}.{key_id}.{_to_text(claims.encode())}"
        return f"{signed}.{_to_text(_mac(key, signed))}"

    def verify(self, token: str, *, now: datetime) -> Leaving:
        """
        What *token* allows.

        Raises:
            InvalidPayloadError: it is not ours, was changed, or has ended; says what to do instead.

        """
        signed, _, mac = token.rpartition(".")
        parts = signed.split(".")
        if len(token) > LONGEST_TOKEN or not token.isascii() or len(parts) != 3 or parts[0] != FORM:
            raise _no_link()
        key = self._keys.get(parts[1])
        # An unknown key costs as much time as a known one, and no token is read before its MAC was right.
        is_ours = hmac.compare_digest(_to_text(_mac(key or b"none", signed)), mac) and key is not None
        if not is_ours:
            raise _no_link()
        subscriber, channel, subscription_id, ends = json.loads(_from_text(parts[2]))
        if now >= datetime.fromtimestamp(ends, UTC):
            raise InvalidPayloadError("this link has ended: use the link of a newer message, or sign in")
        return Leaving(subscriber=subscriber, channel=channel, subscription_id=subscription_id)


def _no_link() -> InvalidPayloadError:
    return InvalidPayloadError("this is no valid unsubscribe link: copy it whole from the message")


def _mac(key: bytes, signed: str) -> bytes:
    return hmac.digest(key, _PURPOSE + b"|" + signed.encode(), "sha256")


def _to_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _from_text(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise _no_link() from None
