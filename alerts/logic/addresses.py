"""What may be an address: checked, made anew from its parts, and shown so that only its owner knows it. Pure."""

import re
from urllib.parse import SplitResult, urlsplit

from shared.errors import InvalidPayloadError

DISCORD = "https://discord.com"
DISCORD_HOSTS = frozenset({"discord.com", "discordapp.com", "ptb.discord.com", "canary.discord.com"})

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_MAILBOX = re.compile(rf"(?P<local>{_ATOM}(?:\.{_ATOM})*)@(?P<domain>(?:{_LABEL}\.)+{_LABEL})")
_WEBHOOK = re.compile(
    r"(?P<base>.*)/api/(?:v\d{1,2}/)?webhooks/(?P<id>[0-9]{17,20})/(?P<token>[A-Za-z0-9_-]{20,128})", re.DOTALL
)


def address_of(channel: str, text: str, *, webhook_base: str | None = None) -> str:
    """
    The address that *text* gives for *channel*, in the one form in which it is stored.

    Raises:
        InvalidPayloadError: it is none; the reason shows nothing of it.

    """
    if channel == "email":
        return email_of(text)
    if channel == "discord":
        return webhook_of(text, base=webhook_base)
    raise InvalidPayloadError(f"{channel[:40]} needs no address: there are email and discord")


def email_of(text: str) -> str:
    """
    An e-mail address, its domain in small letters.

    Raises:
        InvalidPayloadError: it is none, or one that could be misread.

    """
    found = _MAILBOX.fullmatch(text)
    if found is None or len(text) > 254 or len(found["local"]) > 64:
        raise InvalidPayloadError("is no e-mail address such as name@example.com")
    return f"{found['local']}@{found['domain'].lower()}"


def webhook_of(text: str, *, base: str | None = None) -> str:
    """
    A Discord webhook, made anew from its id and token; of the given text nothing else is used.

    *base* is one more place besides Discord's own where webhooks may lie: the one this house itself posts to.

    Raises:
        InvalidPayloadError: it is none, or would lead elsewhere.

    """
    trouble = InvalidPayloadError("is no Discord webhook: it has the form https://discord.com/api/webhooks/ID/TOKEN")
    if not text.isascii() or not text.isprintable() or len(text) > 400:
        raise trouble
    try:
        parts = urlsplit(text)
        found = _WEBHOOK.fullmatch(parts.path)
        if found is None or parts.query or parts.fragment or "?" in text or "#" in text or parts.username is not None:
            raise trouble
        place = f"{parts.scheme}://{parts.netloc}{found['base']}"
        is_discord = _is_discord(parts) and not found["base"]
    except ValueError:
        raise trouble from None
    if not is_discord and (base is None or place != base):
        raise trouble
    return f"{DISCORD if is_discord else base}/api/webhooks/{found['id']}/{found['token']}"


def webhook_base(url: str) -> str | None:
    """Where this webhook lies if it is not at Discord, such as the embedded cloud's inbox; None otherwise."""
    try:
        parts = urlsplit(url)
        found = _WEBHOOK.fullmatch(parts.path)
        if found is None or _is_discord(parts) or parts.scheme not in ("http", "https"):
            return None
    except ValueError:
        return None
    return f"{parts.scheme}://{parts.netloc}{found['base']}"


def masked(channel: str, address: str) -> str:
    """An address so that its owner knows it again and nobody else can use it."""
    if channel == "email":
        local, _, domain = address.partition("@")
        return f"{local[:1]}***@{domain}"
    return f"webhook {address.rsplit('/', 2)[-2]}/***"


def _is_discord(parts: SplitResult) -> bool:
    """Whether this is one of Discord's own hosts, reached as they are meant to be."""
    return parts.scheme == "https" and parts.hostname in DISCORD_HOSTS and parts.port in (None, 443)
