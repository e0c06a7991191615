"""
A Discord webhook inbox: it refuses what Discord refuses, and keeps what people would have seen.

Execute, read, edit and delete speak Discord's wire format under ``/discord/api`` (with or without a version);
``GET /discord/inbox`` shows the truth: every message, who it would have pinged, when it came.
``POST /discord/webhooks`` makes further webhooks. Whoever keeps asking after being refused is banned for a while.
"""

import hashlib
import json
import math
import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from infra.local.faults import problem
from shared.clock import Clock, SystemClock, format_instant

DEFAULT_WEBHOOK = ("100000000000000001", "local-" + "troop_Discord-Inbox_" * 3 + "Aa")
CHANNEL_ID = "100000000000000002"
GUILD_ID = "100000000000000003"
LIMIT = 5
WINDOW = timedelta(seconds=2)
INVALID, INVALID_WINDOW = 10_000, timedelta(minutes=10)
"""So many answers of 401, 403 or 429 in this time, and Cloudflare lets nothing of the address through."""
OLD, OLD_EDITS = timedelta(hours=1), 30
"""Messages older than this can be edited so often in such a time; Discord says only that there is a limit."""
MOST_NEW = 1000
EMBEDS, EMBED_SUM = 10, 6000
COUNTED = {"title": 256, "description": 4096}
NAMED = {"footer": ("text", 2048), "author": ("name", 256)}
FIELDS, FIELD = 25, {"name": 256, "value": 1024}

_DISCORD_EPOCH_MS = 1_420_070_400_000
_SNOWFLAKE = re.compile(r"[0-9]{1,19}")
_LARGEST = 2**63 - 1  # what SQLite can hold
_TABLES = """
CREATE TABLE IF NOT EXISTS discord_messages (
    id INTEGER PRIMARY KEY, webhook_id TEXT NOT NULL, username TEXT NOT NULL, body TEXT NOT NULL,
    pings TEXT NOT NULL, received_at TEXT NOT NULL, edited_at TEXT, deleted_at TEXT
);
CREATE TABLE IF NOT EXISTS discord_gone (webhook_id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS discord_webhooks (webhook_id TEXT PRIMARY KEY, token TEXT NOT NULL);
"""


@dataclass(slots=True)
class _Bucket:
    """One webhook's allowance for one kind of call, in a fixed window."""

    opened_at: datetime
    used: int = 0


@dataclass(slots=True)
class _Complaints:
    """What is wrong with a body, gathered in the tree Discord answers with."""

    tree: dict[str, Any] = field(default_factory=dict)

    def add(self, path: tuple[str, ...], code: str, message: str) -> None:
        node = self.tree
        for part in path:
            node = node.setdefault(part, {})
        node.setdefault("_errors", []).append({"code": code, "message": message})


class _RefusedError(Exception):
    """Discord answers with an error."""

    def __init__(self, status: int, code: int, message: str, **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"message": message, "code": code, **more}


class DiscordInbox:
    """Discord as an incoming webhook sees it."""

    def __init__(
        self,
        state: sqlite3.Connection,
        webhooks: Mapping[str, str] | None = None,
        *,
        limit: int = LIMIT,
        window: timedelta = WINDOW,
        invalid: int = INVALID,
        clock: Clock | None = None,
    ) -> None:
        self._state = state
        self._webhooks = dict(webhooks if webhooks is not None else [DEFAULT_WEBHOOK])
        self._limit = limit
        self._window = window
        self._clock = clock or SystemClock()
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._limited = 0
        self._most_invalid = invalid
        self._invalid = _Bucket(self._clock.now())
        self._banned = 0
        state.executescript(_TABLES)
        self._webhooks |= dict(state.execute("SELECT webhook_id, token FROM discord_webhooks"))

    def routes(self) -> list[web.AbstractRouteDef]:
        """Discord's paths, and the inbox people look into."""
        found: list[web.AbstractRouteDef] = [
            web.get("/discord/inbox", self._show_inbox),
            web.post("/discord/webhooks", self._make_webhooks),
        ]
        for api in ("/discord/api", r"/discord/api/v{version:\d+}"):
            hook = f"{api}/webhooks/{{id}}/{{token}}"
            message = f"{hook}/messages/{{message_id}}"
            found += [
                web.post(hook, self._execute),
                web.get(hook, self._show_webhook),
                web.delete(hook, self._delete_webhook),
                web.get(message, self._show_message),
                web.patch(message, self._edit),
                web.delete(message, self._delete),
            ]
        return found

    def count(self) -> int:
        """How many messages ever arrived."""
        [[count]] = self._state.execute("SELECT count(*) FROM discord_messages")
        return int(count)

    def stats(self) -> dict[str, Any]:
        """How many messages came, and how many calls were told to slow down or banned since the start."""
        return {
            "messages": self.count(),
            "rate_limited": self._limited,
            "banned": self._banned,
            "limit": self._limit,
        }

    def make_webhook(self) -> tuple[str, str]:
        """A further webhook, for ever: its id and its token."""
        number = int(DEFAULT_WEBHOOK[0]) + 1_000_000 + len(self._webhooks)
        webhook_id, token = str(number), secrets.token_urlsafe(51)
        self._state.execute("INSERT INTO discord_webhooks VALUES (?, ?)", (webhook_id, token))
        self._webhooks[webhook_id] = token
        return webhook_id, token

    def inbox(self, *, after: int = 0, limit: int = 50) -> list[dict[str, Any]]:
        """The messages newer than the id ``after``, newest first."""
        rows = self._state.execute(
            "SELECT id, webhook_id, username, body, pings, received_at, edited_at, deleted_at"
            " FROM discord_messages WHERE id > ? ORDER BY id DESC LIMIT ?",
            (after, limit),
        )
        return [
            {
                "message_id": str(row[0]),
                "webhook_id": row[1],
                "username": row[2],
                **json.loads(row[3]),
                "pings": json.loads(row[4]),
                "received_at": row[5],
                "edited_at": row[6],
                "deleted_at": row[7],
            }
            for row in rows
        ]

    # --- Discord's calls

    async def _execute(self, request: web.Request) -> web.Response:
        return await self._answer(request, "execute", self._do_execute)

    async def _show_webhook(self, request: web.Request) -> web.Response:
        return await self._answer(request, "webhook", self._do_show_webhook)

    async def _delete_webhook(self, request: web.Request) -> web.Response:
        return await self._answer(request, "webhook", self._do_delete_webhook)

    async def _show_message(self, request: web.Request) -> web.Response:
        return await self._answer(request, "messages.get", self._do_show_message)

    async def _edit(self, request: web.Request) -> web.Response:
        return await self._answer(request, "messages.patch", self._do_edit)

    async def _delete(self, request: web.Request) -> web.Response:
        return await self._answer(request, "messages.delete", self._do_delete)

    async def _answer(self, request: web.Request, call: str, do: Any) -> web.Response:  # noqa: ANN401
        webhook_id = request.match_info["id"]
        headers: dict[str, str] = {}
        if (wait := self._ban()) is not None:
            return _cloudflare(wait)
        try:
            self._check_webhook(webhook_id, request.match_info["token"])
            headers = self._take(webhook_id, call)
            response: web.Response = await do(request, webhook_id)
        except _LimitedError as e:
            response = e.response
        except _RefusedError as e:
            response = web.json_response(e.body, status=e.status)
            if e.status == 429:
                response.headers["Retry-After"] = f"{e.body['retry_after']:.3f}"
        response.headers.update(headers)
        self._invalid.used += response.status in {401, 403, 429}
        return response

    async def _do_execute(self, request: web.Request, webhook_id: str) -> web.Response:
        payload = await _read(request)
        body = _checked(payload)
        username = payload.get("username") or "troop"
        now = self._clock.now()
        message_id = self._next_id(now)
        pings = _pings(body["content"], payload.get("allowed_mentions"))
        row = (message_id, webhook_id, username, json.dumps(body), json.dumps(pings), format_instant(now))
        self._state.execute(
            "INSERT INTO discord_messages (id, webhook_id, username, body, pings, received_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            row,
        )
        if request.query.get("wait", "false").lower() not in {"true", "1"}:
            return web.Response(status=204)
        return web.json_response(self._message(webhook_id, str(message_id)))

    async def _do_show_webhook(self, request: web.Request, webhook_id: str) -> web.Response:
        return web.json_response(
            {
                "id": webhook_id,
                "type": 1,
                "name": "troop",
                "avatar": None,
                "channel_id": CHANNEL_ID,
                "guild_id": GUILD_ID,
                "application_id": None,
                "token": self._webhooks[webhook_id],
            }
        )

    async def _do_delete_webhook(self, request: web.Request, webhook_id: str) -> web.Response:
        self._state.execute("INSERT OR IGNORE INTO discord_gone VALUES (?)", (webhook_id,))
        return web.Response(status=204)

    async def _do_show_message(self, request: web.Request, webhook_id: str) -> web.Response:
        return web.json_response(self._message(webhook_id, request.match_info["message_id"]))

    async def _do_edit(self, request: web.Request, webhook_id: str) -> web.Response:
        message_id = request.match_info["message_id"]
        before = self._message(webhook_id, message_id)
        self._check_age(webhook_id, before)
        payload = await _read(request)
        body = _checked({"content": before["content"], "embeds": before["embeds"]} | payload)
        pings = _pings(body["content"], payload.get("allowed_mentions"))
        self._state.execute(
            "UPDATE discord_messages SET body = ?, pings = ?, edited_at = ? WHERE id = ?",
            (json.dumps(body), json.dumps(pings), format_instant(self._clock.now()), int(message_id)),
        )
        return web.json_response(self._message(webhook_id, message_id))

    async def _do_delete(self, request: web.Request, webhook_id: str) -> web.Response:
        message_id = request.match_info["message_id"]
        self._message(webhook_id, message_id)
        self._state.execute(
            "UPDATE discord_messages SET deleted_at = ? WHERE id = ?",
            (format_instant(self._clock.now()), int(message_id)),
        )
        return web.Response(status=204)

    # --- what stands behind them

    def _check_webhook(self, webhook_id: str, token: str) -> None:
        gone = self._state.execute("SELECT 1 FROM discord_gone WHERE webhook_id = ?", (webhook_id,)).fetchone()
        if gone or self._webhooks.get(webhook_id) != token:
            raise _RefusedError(404, 10015, "Unknown Webhook")

    def _check_age(self, webhook_id: str, message: Mapping[str, Any]) -> None:
        now = self._clock.now()
        if now - datetime.fromisoformat(message["timestamp"]) <= OLD:
            return
        bucket = self._buckets.get((webhook_id, "old edits"))
        if bucket is None or now - bucket.opened_at >= OLD:
            bucket = self._buckets[webhook_id, "old edits"] = _Bucket(now)
        if bucket.used >= OLD_EDITS:
            self._limited += 1
            wait = (bucket.opened_at + OLD - now).total_seconds()
            text = "Maximum number of edits to messages older than 1 hour reached. Try again later"
            raise _RefusedError(429, 30046, text, retry_after=wait, **{"global": False})
        bucket.used += 1

    def _ban(self) -> float | None:
        """For how many seconds nothing is let through; None while everything is."""
        now = self._clock.now()
        if now - self._invalid.opened_at >= INVALID_WINDOW:
            self._invalid = _Bucket(now)
        if self._invalid.used < self._most_invalid:
            return None
        self._banned += 1
        return (self._invalid.opened_at + INVALID_WINDOW - now).total_seconds()

    def _take(self, webhook_id: str, call: str) -> dict[str, str]:
        now = self._clock.now()
        bucket = self._buckets.get((webhook_id, call))
        if bucket is None or now - bucket.opened_at >= self._window:
            bucket = self._buckets[webhook_id, call] = _Bucket(now)
        reset = bucket.opened_at + self._window
        left = max((reset - now).total_seconds(), 0.001)
        taken = bucket.used < self._limit
        bucket.used += taken
        headers = {
            "X-RateLimit-Limit": str(self._limit),
            "X-RateLimit-Remaining": str(self._limit - bucket.used),
            "X-RateLimit-Reset": f"{reset.timestamp():.3f}",
            "X-RateLimit-Reset-After": f"{left:.3f}",
            "X-RateLimit-Bucket": hashlib.sha256(f"{webhook_id}/{call}".encode()).hexdigest()[:32],
        }
        if not taken:
            self._limited += 1
            wait = math.ceil(left * 1000) / 1000
            body = {"message": "You are being rate limited.", "retry_after": wait, "global": False}
            headers |= {"X-RateLimit-Scope": "user", "Retry-After": f"{wait:.3f}"}
            raise _LimitedError(web.json_response(body, status=429, headers=headers))
        return headers

    def _next_id(self, now: datetime) -> int:
        snowflake = (int(now.timestamp() * 1000) - _DISCORD_EPOCH_MS) << 22
        [[newest]] = self._state.execute("SELECT coalesce(max(id), 0) FROM discord_messages")
        return max(snowflake, int(newest) + 1)

    def _message(self, webhook_id: str, message_id: str) -> dict[str, Any]:
        number = int(message_id) if _SNOWFLAKE.fullmatch(message_id) else 0
        row = self._state.execute(
            "SELECT username, body, pings, received_at, edited_at FROM discord_messages"
            " WHERE id = ? AND webhook_id = ? AND deleted_at IS NULL",
            (min(number, _LARGEST), webhook_id),
        ).fetchone()
        if row is None:
            raise _RefusedError(404, 10008, "Unknown Message")
        body, pings = json.loads(row[1]), json.loads(row[2])
        author = {"id": webhook_id, "username": row[0], "avatar": None, "discriminator": "0000", "bot": True}
        return {
            "id": message_id,
            "type": 0,
            "channel_id": CHANNEL_ID,
            "webhook_id": webhook_id,
            "author": author,
            "content": body["content"],
            "embeds": body["embeds"],
            "attachments": [],
            "components": [],
            "mentions": [{"id": user} for user in pings["users"]],
            "mention_roles": pings["roles"],
            "mention_everyone": pings["everyone"],
            "pinned": False,
            "tts": False,
            "flags": 0,
            "timestamp": row[3],
            "edited_timestamp": row[4],
        }

    async def _make_webhooks(self, request: web.Request) -> web.Response:
        given = request.query.get("count", "1")
        if not _SNOWFLAKE.fullmatch(given) or not 1 <= int(given) <= MOST_NEW:
            return problem(400, f"count is {given!r}; write a whole number from 1 to {MOST_NEW:,}")
        made = [self.make_webhook() for _ in range(int(given))]
        base = request.url.origin()
        items = [
            {"id": id_, "token": token, "url": f"{base}/discord/api/webhooks/{id_}/{token}"} for id_, token in made
        ]
        return web.json_response({"items": items}, status=201)

    async def _show_inbox(self, request: web.Request) -> web.Response:
        after, limit = request.query.get("after", "0"), request.query.get("limit", "50")
        for name, given in (("after", after), ("limit", limit)):
            if not _SNOWFLAKE.fullmatch(given):
                return problem(400, f"{name} is {given!r}; write a whole number")
        items = self.inbox(after=min(int(after), _LARGEST), limit=min(int(limit), 10_000))
        return web.json_response({"items": items, "count": self.count()})


class _LimitedError(Exception):
    def __init__(self, response: web.Response) -> None:
        super().__init__("rate limited")
        self.response = response


def _cloudflare(wait: float) -> web.Response:
    """What stands before Discord answers in HTML, and says less."""
    page = "<!DOCTYPE html><html><head><title>Error 1015</title></head><body>You are being rate limited</body></html>"
    headers = {"Retry-After": str(math.ceil(wait))}
    return web.Response(status=429, text=page, content_type="text/html", headers=headers)


async def _read(request: web.Request) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise _RefusedError(
            400, 50035, 'Expected "Content-Type" header to be application/json (this inbox takes no files).'
        )
    try:
        payload = json.loads(await request.read())
    except (ValueError, RecursionError) as e:
        raise _RefusedError(400, 50109, "The request body contains invalid JSON.") from e
    if not isinstance(payload, dict):
        raise _RefusedError(400, 50109, "The request body contains invalid JSON.")
    return payload


def _checked(payload: dict[str, Any]) -> dict[str, Any]:
    wrong = _Complaints()
    content = _text(wrong, ("content",), payload.get("content"), 2000)
    embeds = _embeds(wrong, payload.get("embeds"))
    _username(wrong, payload.get("username"))
    _mentions(wrong, payload.get("allowed_mentions"))
    if wrong.tree:
        raise _RefusedError(400, 50035, "Invalid Form Body", errors=wrong.tree)
    if not content and not any(embed.keys() - {"type", "color", "url", "timestamp"} for embed in embeds):
        raise _RefusedError(400, 50006, "Cannot send an empty message")
    return {"content": content, "embeds": embeds}


def _text(wrong: _Complaints, path: tuple[str, ...], given: object, most: int, *, is_required: bool = False) -> str:
    if given is not None and not isinstance(given, str):
        wrong.add(path, "STRING_TYPE_CONVERT", f'Could not interpret "{given}" as string.')
        return ""
    text = (given or "").strip()
    if len(text) > most:
        wrong.add(path, "BASE_TYPE_MAX_LENGTH", f"Must be {most} or fewer in length.")
    if is_required and not text:
        wrong.add(path, "BASE_TYPE_REQUIRED", "This field is required")
    return text


def _embeds(wrong: _Complaints, given: object) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list):
        wrong.add(("embeds",), "LIST_TYPE_CONVERT", "Only iterables may be used in a ListType")
        return []
    if len(given) > EMBEDS:
        wrong.add(("embeds",), "BASE_TYPE_MAX_LENGTH", f"Must be {EMBEDS} or fewer in length.")
    embeds = []
    for number, embed in enumerate(given):
        path = ("embeds", str(number))
        if isinstance(embed, dict):
            embeds.append(_embed(wrong, path, embed))
        else:
            wrong.add(path, "MODEL_TYPE_CONVERT", "Only dictionaries may be used in a ModelType")
    if not wrong.tree and sum(len(text) for embed in embeds for text in _counted(embed)) > EMBED_SUM:
        wrong.add(("embeds",), "MAX_EMBED_SIZE_EXCEEDED", f"Embed size exceeds maximum size of {EMBED_SUM}")
    return embeds


def _embed(wrong: _Complaints, path: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"type": "rich"}
    for name, most in COUNTED.items():
        if text := _text(wrong, (*path, name), given.get(name), most):
            kept[name] = text
    for name, (inner, most) in NAMED.items():
        if (part := given.get(name)) is None:
            continue
        if not isinstance(part, dict):
            wrong.add((*path, name), "MODEL_TYPE_CONVERT", "Only dictionaries may be used in a ModelType")
        elif text := _text(wrong, (*path, name, inner), part.get(inner), most, is_required=name == "author"):
            kept[name] = {inner: text}
    if fields := _fields(wrong, (*path, "fields"), given.get("fields")):
        kept["fields"] = fields
    _extras(wrong, path, given, kept)
    return kept


def _fields(wrong: _Complaints, path: tuple[str, ...], given: object) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list):
        wrong.add(path, "LIST_TYPE_CONVERT", "Only iterables may be used in a ListType")
        return []
    if len(given) > FIELDS:
        wrong.add(path, "BASE_TYPE_MAX_LENGTH", f"Must be {FIELDS} or fewer in length.")
    kept = []
    for number, row in enumerate(given):
        at = (*path, str(number))
        if not isinstance(row, dict):
            wrong.add(at, "MODEL_TYPE_CONVERT", "Only dictionaries may be used in a ModelType")
            continue
        texts = {name: _text(wrong, (*at, name), row.get(name), most, is_required=True) for name, most in FIELD.items()}
        kept.append({**texts, "inline": bool(row.get("inline", False))})
    return kept


def _extras(wrong: _Complaints, path: tuple[str, ...], given: dict[str, Any], kept: dict[str, Any]) -> None:
    color = given.get("color")
    if color is not None:
        if not isinstance(color, int) or isinstance(color, bool):
            wrong.add((*path, "color"), "NUMBER_TYPE_COERCE", f'Value "{color}" is not int.')
        elif not 0 <= color <= 0xFFFFFF:
            wrong.add((*path, "color"), "NUMBER_TYPE_MAX", "int value should be between 0 and 16777215.")
        kept["color"] = color
    for name in ("url", "image", "thumbnail"):
        part = given.get(name)
        url = part.get("url") if isinstance(part, dict) else part
        if url is None:
            continue
        where = (*path, name) if name == "url" else (*path, name, "url")
        if not isinstance(url, str) or urlsplit(url).scheme not in {"http", "https"}:
            wrong.add(where, "URL_TYPE_INVALID_SCHEME", "Scheme must be one of ('http', 'https', 'attachment').")
        kept[name] = part
    if (timestamp := given.get("timestamp")) is not None:
        try:
            datetime.fromisoformat(timestamp)
        except (TypeError, ValueError):
            wrong.add(
                (*path, "timestamp"),
                "DATE_TIME_TYPE_PARSE",
                f'Could not parse "{timestamp}". Should be ISO8601.',
            )
        kept["timestamp"] = timestamp


def _counted(embed: dict[str, Any]) -> Iterator[str]:
    for name in COUNTED:
        yield embed.get(name, "")
    for name, (inner, _) in NAMED.items():
        yield embed.get(name, {}).get(inner, "")
    for row in embed.get("fields", ()):
        yield row["name"]
        yield row["value"]


def _username(wrong: _Complaints, given: object) -> None:
    if given is None:
        return
    if not isinstance(given, str) or not 1 <= len(given.strip()) <= 80:
        wrong.add(("username",), "BASE_TYPE_BAD_LENGTH", "Must be between 1 and 80 in length.")
        return
    for word in ("clyde", "discord"):
        if word in given.lower():
            wrong.add(("username",), "USERNAME_INVALID_CONTAINS", f'Username cannot contain "{word}"')


def _mentions(wrong: _Complaints, given: object) -> None:
    if given is None:
        return
    path = ("allowed_mentions",)
    if not isinstance(given, dict):
        wrong.add(path, "MODEL_TYPE_CONVERT", "Only dictionaries may be used in a ModelType")
        return
    parse = given.get("parse", [])
    for kind in ("parse", "users", "roles"):
        if not isinstance(given.get(kind, []), list):
            wrong.add((*path, kind), "LIST_TYPE_CONVERT", "Only iterables may be used in a ListType")
            return
    for number, kind in enumerate(parse):
        if kind not in ("users", "roles", "everyone"):
            wrong.add(
                (*path, "parse", str(number)),
                "BASE_TYPE_CHOICES",
                "Value must be one of ('users', 'everyone', 'roles').",
            )
    for kind in ("users", "roles"):
        ids = given.get(kind, [])
        if len(ids) > 100:
            wrong.add((*path, kind), "BASE_TYPE_MAX_LENGTH", "Must be 100 or fewer in length.")
        if ids and kind in parse:
            wrong.add(
                path,
                "MESSAGE_ALLOWED_MENTIONS_PARSE_EXCLUSIVE",
                f'parse:["{kind}"] and {kind}: [ids...] are mutually exclusive.',
            )


def _pings(content: str, allowed: dict[str, Any] | None) -> dict[str, Any]:
    rules = {"parse": ["users"]} if allowed is None else allowed  # what webhooks do unasked
    parse = rules.get("parse", [])
    found = {
        "users": list(dict.fromkeys(re.findall(r"<@!?(\d+)>", content))),
        "roles": list(dict.fromkeys(re.findall(r"<@&(\d+)>", content))),
    }
    heard: dict[str, Any] = {
        kind: [one for one in ids if kind in parse or one in rules.get(kind, [])] for kind, ids in found.items()
    }
    heard["everyone"] = "everyone" in parse and bool(re.search(r"@(everyone|here)\b", content))
    return heard
