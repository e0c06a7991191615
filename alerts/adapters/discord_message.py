"""Alerts as Discord messages: within every limit, as they were written, and nobody is ever mentioned."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from alerts.models import Alert
from alerts.ports import Message
from shared.clock import format_instant

TITLE, DESCRIPTION, AUTHOR, FIELD_NAME, FIELD_VALUE, FOOTER, FIELDS = 256, 4096, 256, 256, 1024, 512, 25
"""Discord's limits of each; for the footer less than its 2,048, which nobody would read."""
SUM = 6000
CONTENT = 2000
DIGEST_INTRODUCTION, DIGEST_VALUE = 512, 320
COLOURS = {"long": 0x2E9E5B, "short": 0xC0392B}
GREY = 0x7F8C8D
POSSIBLE_REPEAT = "possible repeat: an earlier attempt ended without an answer"
_BREAK = "\u200b"
_MARKDOWN = re.compile(r"([\\*_~`|>\[\]()#])")


def message_of(message: Message) -> dict[str, Any]:
    """A message as an embed, for POST and PATCH alike: an edit that left a part out would keep the old one."""
    alert = message.alert
    if message.digest is None:
        embed = _embed(message, DESCRIPTION) | {
            "color": COLOURS.get(alert.direction, GREY) if alert.resolved_at is None else GREY,
            "timestamp": format_instant(alert.occurred_at),
            "fields": _facts(alert),
        }
    else:
        embed = _embed(message, DIGEST_INTRODUCTION) | {"color": GREY}
        embed["fields"] = _items(message.digest, SUM - size_of(embed))
    return {"content": "", "embeds": [embed], "allowed_mentions": {"parse": []}}


def safe_message_of(message: Message) -> dict[str, Any]:
    """The same as plain text, for when Discord refused the embed: the shortest form that still says it."""
    alert = message.alert
    lines = [alert.title, alert.text, *(str(item.get("title", "")) for item in message.digest or ())]
    footer = plain(_footer(message), FOOTER)
    text = plain("\n".join(filter(None, lines)), CONTENT - units(footer) - 1)
    return {"content": f"{text}\n{footer}", "embeds": [], "allowed_mentions": {"parse": []}}


def plain(text: str, most: int) -> str:
    """Text that Discord shows as it is: markdown escaped, mentions and links broken, cut to *most* UTF-16 units."""
    safe = _MARKDOWN.sub(r"\\\1", text)
    for token in ("@", "<", ":/"):
        safe = safe.replace(token, f"{token[0]}{_BREAK}{token[1:]}")
    cut = safe.encode("utf-16-le", errors="replace")
    if len(cut) <= most * 2:
        return cut.decode("utf-16-le")
    # A character of two units that is cut in half is dropped, and so is an escape without what it escaped.
    return cut[: (most - 1) * 2].decode("utf-16-le", errors="ignore").rstrip("\\") + "…"


def units(text: str) -> int:
    """The length of a text as Discord may count it: a character outside the basic plane is two."""
    return len(text.encode("utf-16-le", errors="surrogatepass")) // 2


def size_of(embed: Mapping[str, Any]) -> int:
    """What an embed adds to Discord's sum over all embeds of a message."""
    fields = [text for one in embed.get("fields", ()) for text in (one["name"], one["value"])]
    others = [embed.get("author", {}).get("name", ""), embed.get("footer", {}).get("text", "")]
    return sum(map(units, [embed.get("title", ""), embed.get("description", ""), *others, *fields]))


def _embed(message: Message, description: int) -> dict[str, Any]:
    """What every embed has."""
    alert = message.alert
    is_resolved = alert.resolved_at is not None and not alert.title.lower().startswith("resolved")
    title = f"Resolved: {alert.title}" if is_resolved else alert.title
    embed: dict[str, Any] = {
        "title": filled(title, TITLE),
        "description": plain(alert.text, description),
        "footer": {"text": plain(_footer(message), FOOTER)},
    }
    return embed | ({"author": {"name": plain(POSSIBLE_REPEAT, AUTHOR)}} if message.is_possible_repeat else {})


def _footer(message: Message) -> str:
    """Leads back to the ledger, and says what it is not."""
    repeat = f"{POSSIBLE_REPEAT} · " if message.is_possible_repeat and message.digest is None else ""
    return f"{repeat}alert {message.alert.alert_id} · delivery {message.delivery_id} · information, not advice"


def _facts(alert: Alert) -> list[dict[str, Any]]:
    facts = (("Entry", alert.entry), ("Interval", alert.interval))
    return [{"name": name, "value": filled(text, 256), "inline": True} for name, text in facts if text.strip()]


def _items(items: Sequence[Mapping[str, Any]], room: int) -> list[dict[str, Any]]:
    """A field for each item as long as there is room; the last one says how many are left out."""
    found: list[dict[str, Any]] = []
    rest = {"name": "and", "value": f"{len(items):,} more"}
    room -= units(rest["name"]) + units(rest["value"])
    for number, item in enumerate(items):
        value = " · ".join(filter(None, (str(item.get(name) or "") for name in ("text", "occurred_at"))))
        one = {"name": filled(str(item.get("title", "")), FIELD_NAME), "value": filled(value, DIGEST_VALUE)}
        room -= units(one["name"]) + units(one["value"])
        is_last = number == len(items) - 1
        if room < 0 or (len(found) == FIELDS - 1 and not is_last):
            return [*found, rest | {"value": f"{len(items) - number:,} more"}]
        found.append(one)
    return found


def filled(text: str, most: int) -> str:
    """A text that is shown where Discord refuses an empty one."""
    return plain(text, most) if text.strip() else "-"
