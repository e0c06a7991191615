"""What people saw and what the ledger says of it, and how the two differ from what was promised."""

import contextlib
import json
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bench._delivery_neighbours import CERTAIN
from bench._delivery_plan import Expected, mail_of

_ALERT = re.compile(r"alert ([0-9a-f-]{36})")
_DIED = "the process died"
_OWED = "SELECT count(*) FROM documents WHERE container = 'deliveries' AND due_at IS NOT NULL"
_SENDING = """
SELECT id FROM documents WHERE container = 'deliveries' AND due_at IS NOT NULL
  AND body ->> 'state' = 'SENDING' AND body ->> 'channel' = 'discord'
"""
_LEDGER = "SELECT body FROM documents WHERE container = 'deliveries' AND body ->> 'delivery_id' IS NOT NULL"
_DISCORD = "SELECT webhook_id, body FROM discord_messages"
_MAIL = "SELECT recipient, message_id, received_at FROM mailbox_messages ORDER BY id"


class Shown(NamedTuple):
    """A subscriber, and what they saw on a channel by the id that makes it the same thing for them."""

    subscriber: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """
    What came at the end of each channel.

    At the hub by the alert's id, by mail by the Message-ID: of these people see the first, at the time kept here.
    Discord shows whatever comes.
    """

    signalr: Mapping[Shown, float]
    signals: Mapping[Shown, str]
    resent: int
    mail: Mapping[Shown, float]
    mails: int
    discord: Counter[Shown]


def look(
    folder: Path, *, heard: Mapping[Shown, float], signals: Mapping[Shown, str], pushes: int, hooks: Mapping[str, str]
) -> Seen:
    """Read what the neighbours kept; *hooks* are the subscribers of webhooks by id."""
    mail: dict[Shown, float] = {}
    discord: Counter[Shown] = Counter()
    mails = 0
    with _opened(folder / "cloud.db") as db:
        for recipient, message_id, received_at in db.execute(_MAIL):
            mails += 1
            mail.setdefault(Shown(recipient, message_id), datetime.fromisoformat(received_at).timestamp())
        for webhook_id, body in db.execute(_DISCORD):
            said = json.loads(body)
            footers = [embed.get("footer", {}).get("text", "") for embed in said["embeds"]]
            found = _ALERT.search(" ".join([said["content"], *footers]))
            discord[Shown(hooks.get(webhook_id, webhook_id), found[1] if found else "?")] += 1
    return Seen(signalr=heard, signals=signals, resent=pushes - len(heard), mail=mail, mails=mails, discord=discord)


class Ledger:
    """The app's storage, seen from outside."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "app.db"

    def owed(self) -> int:
        """How many alerts and deliveries are not over."""
        with _opened(self._path) as db:
            [[number]] = db.execute(_OWED)
        return int(number)

    def being_sent(self) -> set[str]:
        """Which deliveries to webhooks are being sent at this moment, as far as is written."""
        with _opened(self._path) as db:
            return {row[0] for row in db.execute(_SENDING)}

    def deliveries(self) -> dict[str, dict[str, Any]]:
        """Every delivery by its id."""
        with _opened(self._path) as db:
            bodies = [json.loads(row[0]) for row in db.execute(_LEDGER)]
        return {body["delivery_id"]: body for body in bodies}


def judge(
    expected: Sequence[Expected],
    seen: Seen,
    ledger: Mapping[str, Mapping[str, Any]],
    faults: Mapping[str, Mapping[str, int]],
    interrupted: Iterable[str],
) -> dict[str, int]:
    """
    The figures that must be right.

    ``lost``: what was neither seen nor, for webhooks that are not critical, recorded as UNKNOWN with its reason.
    ``repeated``: what somebody saw twice at the hub or by mail, that is under two ids, or was never meant for them.
    ``webhook_repeats`` and ``ambiguous_faults`` are of Discord: messages that came again, and calls after which
    nobody can know, faults and kills in the middle of a call alike.
    """
    lost = unknown = false_sent = 0
    missing: Counter[str] = Counter()
    for one in expected:
        state = ledger.get(one.delivery_id, {})
        if _is_seen(one, seen):
            continue
        if one.channel == "discord" and not one.is_critical and state.get("state") == "UNKNOWN" and state["reason"]:
            unknown += 1
            continue
        lost += 1
        missing[f"{one.channel} {state.get('state')}"] += 1
        false_sent += state.get("state") == "SENT"
    again = [d for d in interrupted if any(_DIED in (a.get("reason") or "") for a in ledger[d]["attempts_log"])]
    struck = sum(times for kind, times in faults["discord"].items() if kind not in CERTAIN)
    return {
        "lost": lost,
        "repeated": _repeated(expected, seen),
        "webhook_repeats": sum(times - 1 for times in seen.discord.values()),
        "ambiguous_faults": struck + len(again),
        "webhook_unknown": unknown,
        "webhook_strangers": _strangers(expected, seen),
        "sent_in_vain": false_sent,
    }


def _is_seen(one: Expected, seen: Seen) -> bool:
    match one.channel:
        case "signalr":
            return Shown(one.subscriber, one.alert_id) in seen.signalr
        case "email":
            return Shown(mail_of(one.subscriber), _message_id(one)) in seen.mail
        case _:
            return Shown(one.subscriber, one.alert_id) in seen.discord


def _repeated(expected: Sequence[Expected], seen: Seen) -> int:
    """What was shown beside what had to be shown: each is something told twice, or told to the wrong person."""
    pushed = {Shown(one.subscriber, one.alert_id) for one in expected if one.channel == "signalr"}
    mailed = {Shown(mail_of(one.subscriber), _message_id(one)) for one in expected if one.channel == "email"}
    by_signal: defaultdict[tuple[str, str], int] = defaultdict(int)
    for shown in seen.signalr:
        by_signal[shown.subscriber, seen.signals[shown]] += 1
    twice = sum(times - 1 for times in by_signal.values())
    return max(twice, len(seen.signalr.keys() - pushed)) + len(seen.mail.keys() - mailed)


def _strangers(expected: Sequence[Expected], seen: Seen) -> int:
    wanted = {Shown(one.subscriber, one.alert_id) for one in expected if one.channel == "discord"}
    return len(seen.discord.keys() - wanted)


def _message_id(one: Expected) -> str:
    return f"<{one.delivery_id}@{SENDER}>"


SENDER = "localhost"
"""The domain of EMAIL_FROM."""


@contextlib.contextmanager
def _opened(path: Path) -> Any:  # noqa: ANN401
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        yield db
