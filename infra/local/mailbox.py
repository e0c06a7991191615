"""
A mail server with one mailbox: it takes what is sent to anybody, and shows what people would have seen.

SMTP with login on a port of its own; ``GET /mailbox`` is a page to look at the mails, ``/mailbox/inbox`` the same as
JSON. ``PUT /mailbox/faults`` makes it refuse, cut or dawdle at any stage; the dice are seeded.
"""

import asyncio
import contextlib
import hmac
import html
import json
import re
import sqlite3
import ssl
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from email import message_from_bytes
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.policy import default as modern
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infra.local.faults import Chance, Milliseconds, problem
from shared.clock import Clock, SystemClock, format_instant
from shared.errors import ConfigurationError, InvalidPayloadError

if TYPE_CHECKING:
    from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

USER, PASSWORD = "troop", "local-mailbox-password"
LIMIT = 10 * 1024 * 1024
HOST = "127.0.0.1"
SHOWN = 100
_LARGEST = 2**63 - 1  # what SQLite can hold
_NUMBER = re.compile(r"[0-9]{1,18}")
_TABLES = """
CREATE TABLE IF NOT EXISTS mailbox_messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, sender TEXT NOT NULL, recipient TEXT NOT NULL, message_id TEXT NOT NULL,
    subject TEXT NOT NULL, raw BLOB NOT NULL, received_at TEXT NOT NULL, repeat_of INTEGER
);
CREATE INDEX IF NOT EXISTS mailbox_by_key ON mailbox_messages (recipient, message_id);
"""

type Stage = Literal["connect", "login", "sender", "recipient", "data", "dot"]


class Trouble(BaseModel):
    """
    What goes wrong at one stage: ``rate`` says how often, ``times`` how often at most.

    A ``reply`` refuses, ``cut`` drops the connection; at the stage ``dot`` a message may be taken before the cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stage: Stage
    reply: Annotated[str, Field(pattern=r"^[45][0-9]{2} [ -~]{1,200}$")] | None = None
    cut: bool = False
    accept: bool = False
    latency_ms: Milliseconds = 0
    rate: Chance = 1
    times: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.reply and self.cut:
            raise ValueError("give reply or cut, not both")
        if self.accept and not (self.cut and self.stage == "dot"):
            raise ValueError("accept goes with cut at the stage dot only")
        return self


class Troubles(BaseModel):
    """Everything that goes wrong, as it stands on the wire."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = 0
    faults: list[Trouble] = []


class Mailbox:
    """A mail server as the app sees it, and what is in its mailbox."""

    def __init__(
        self,
        state: sqlite3.Connection,
        *,
        users: Mapping[str, str] | None = None,
        limit: int = LIMIT,
        clock: Clock | None = None,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self._state = state
        self._users = dict(users if users is not None else {USER: PASSWORD})
        self._limit = limit
        self._clock = clock or SystemClock()
        self._tls_context = tls_context
        self._troubles = Troubles()
        self._dice = Random(0)  # noqa: S311 - dice must be repeatable, not secret
        self._struck: Counter[int] = Counter()
        self._server: asyncio.Server | None = None
        self.hits: Counter[str] = Counter()
        self.connections = 0
        self.port = 0
        state.executescript(_TABLES)

    async def start(self, port: int = 0) -> None:
        """
        Listen for SMTP on *port* of this machine; 0 takes a free one.

        Raises:
            ConfigurationError: the port is taken.

        """
        loop = asyncio.get_running_loop()
        from infra.local.mailbox_smtp import Conversation

        try:
            self._server = await loop.create_server(
                lambda: Conversation(
                    self,
                    hostname="mail.local",
                    ident="TROOP's local mailbox",
                    data_size_limit=self._limit,
                    auth_require_tls=False,
                    authenticator=self._authenticate,
                    tls_context=self._tls_context,
                    loop=loop,
                ),
                HOST,
                port,
            )
        except OSError as e:
            raise ConfigurationError(f"port {port} of {HOST} cannot be listened on: choose another") from e
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and drop who is connected."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            server.abort_clients()
            await asyncio.sleep(0)
            await server.wait_closed()

    def routes(self) -> list[web.AbstractRouteDef]:
        """The mailbox people look into, and its switches."""
        return [
            web.get("/mailbox", self._show_page),
            web.get("/mailbox/inbox", self._show_inbox),
            web.get("/mailbox/messages/{id}", self._show_message),
            web.get("/mailbox/messages/{id}/html", self._show_html),
            web.get("/mailbox/messages/{id}/raw", self._show_raw),
            web.get("/mailbox/faults", self._show_faults),
            web.put("/mailbox/faults", self._replace_faults),
            web.delete("/mailbox/faults", self._end_faults),
        ]

    def set(self, wanted: object) -> None:
        """
        Replace what goes wrong.

        Raises:
            InvalidPayloadError: a field or a value is wrong; the text names it.

        """
        try:
            self._troubles = Troubles.model_validate(wanted)
        except ValidationError as e:
            first = e.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            raise InvalidPayloadError(f"{where}: {first['msg']}") from e
        self._dice.seed(self._troubles.seed)
        self._struck.clear()
        self.hits.clear()

    def strike(self, stage: Stage) -> Trouble | None:
        """Throw the dice for a stage."""
        for number, trouble in enumerate(self._troubles.faults):
            if trouble.stage != stage or (trouble.times is not None and self._struck[number] >= trouble.times):
                continue
            if trouble.rate >= 1 or self._dice.random() < trouble.rate:
                self._struck[number] += 1
                self.hits[stage] += 1
                return trouble
        return None

    def stats(self) -> dict[str, Any]:
        """How many messages were taken, and how many of them were taken before with the same Message-ID."""
        [[messages, repeats]] = self._state.execute("SELECT count(*), count(repeat_of) FROM mailbox_messages")
        return {"messages": messages, "repeats": repeats, "connections": self.connections, "smtp_port": self.port}

    def inbox(self, *, to: str | None = None, after: int = 0, limit: int = 50) -> list[dict[str, Any]]:
        """The mails newer than the number ``after``, newest first."""
        rows = self._state.execute(
            "SELECT id, sender, recipient, message_id, subject, length(raw), received_at, repeat_of"
            " FROM mailbox_messages WHERE id > ? AND (? IS NULL OR recipient = ?) ORDER BY id DESC LIMIT ?",
            (after, to, to, limit),
        )
        names = ("id", "from", "to", "message_id", "subject", "size", "received_at", "repeat_of")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def message(self, number: int) -> dict[str, Any] | None:
        """One mail, read: every header, the plain text and the HTML."""
        raw = self._raw(number)
        if raw is None:
            return None
        mail = _read(raw)
        text, page = mail.get_body(("plain",)), mail.get_body(("html",))
        return {
            "id": number,
            "headers": [[name, str(value)] for name, value in mail.items()],
            "text": text.get_content() if text is not None else None,
            "html": page.get_content() if page is not None else None,
        }

    # --- what SMTP asks

    async def handle_DATA(self, server: "SMTP", session: "Session", envelope: "Envelope") -> str:  # noqa: N802
        """Take a message, unless trouble strikes first; the name is what aiosmtpd looks for."""
        from infra.local.mailbox_smtp import cut

        trouble = self.strike("dot")
        if trouble is not None:
            await asyncio.sleep(trouble.latency_ms / 1000)
            if trouble.reply:
                return trouble.reply
        number = None
        if trouble is None or not trouble.cut or trouble.accept:
            number = self._take(envelope)
        if trouble is not None and trouble.cut:
            await cut(server)
        return f"250 2.0.0 Taken as {number}"

    def _take(self, envelope: "Envelope") -> int:
        raw = envelope.original_content or b""
        headers = BytesHeaderParser().parsebytes(raw)
        message_id = str(headers["Message-ID"] or "").strip()
        subject = _subject(str(headers["Subject"] or ""))
        number = 0
        for recipient in envelope.rcpt_tos:
            earlier = self._state.execute(
                "SELECT min(id) FROM mailbox_messages WHERE recipient = ? AND message_id = ? AND message_id != ''",
                (recipient, message_id),
            ).fetchone()
            row = (envelope.mail_from, recipient, message_id, subject, raw, self._now(), earlier[0])
            number = (
                self._state.execute(
                    "INSERT INTO mailbox_messages (sender, recipient, message_id, subject, raw, received_at, repeat_of)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                ).lastrowid
                or 0
            )
        return number

    def _authenticate(
        self, server: "SMTP", session: "Session", envelope: "Envelope", mechanism: str, data: object
    ) -> "AuthResult":
        from aiosmtpd.smtp import AuthResult, LoginPassword

        given = data if isinstance(data, LoginPassword) else LoginPassword(b"", b"")
        wanted = self._users.get(given.login.decode(errors="replace"))
        is_right = hmac.compare_digest((wanted or "").encode(), given.password) and wanted is not None
        return AuthResult(success=is_right, handled=False)

    def _now(self) -> str:
        now: datetime = self._clock.now()
        return format_instant(now)

    def _raw(self, number: int) -> bytes | None:
        row = self._state.execute("SELECT raw FROM mailbox_messages WHERE id = ?", (number,)).fetchone()
        return None if row is None else bytes(row[0])

    # --- what people ask

    async def _show_inbox(self, request: web.Request) -> web.Response:
        after, limit = request.query.get("after", "0"), request.query.get("limit", "50")
        for name, given in (("after", after), ("limit", limit)):
            if not _NUMBER.fullmatch(given):
                return problem(400, f"{name} is {given!r}; write a whole number")
        items = self.inbox(to=request.query.get("to"), after=int(after), limit=min(int(limit), 10_000))
        return web.json_response({"items": items, **self.stats()})

    async def _show_message(self, request: web.Request) -> web.Response:
        found = self.message(_number_of(request))
        return web.json_response(found) if found else problem(404, "there is no mail of this number")

    async def _show_raw(self, request: web.Request) -> web.Response:
        raw = self._raw(_number_of(request))
        if raw is None:
            return problem(404, "there is no mail of this number")
        return web.Response(body=raw, content_type="text/plain", headers=_GUARDS)

    async def _show_html(self, request: web.Request) -> web.Response:
        found = self.message(_number_of(request))
        if found is None:
            return problem(404, "there is no mail of this number")
        page = found["html"] or f"<!doctype html><pre>{html.escape(found['text'] or '')}</pre>"
        return web.Response(text=page, content_type="text/html", charset="utf-8", headers=_GUARDS)

    async def _show_page(self, request: web.Request) -> web.Response:
        mails = self.inbox(limit=SHOWN)
        wanted = request.query.get("id", "")
        chosen = int(wanted) if _NUMBER.fullmatch(wanted) else mails[0]["id"] if mails else 0
        return web.Response(text=_page(mails, chosen), content_type="text/html", charset="utf-8", headers=_PAGE_GUARDS)

    async def _show_faults(self, request: web.Request) -> web.Response:
        return web.json_response(self._troubles.model_dump(exclude_unset=True) | {"hits": dict(self.hits)})

    async def _replace_faults(self, request: web.Request) -> web.Response:
        try:
            self.set(json.loads(await request.text()))
        except ValueError as e:
            return problem(400, f"the body is no JSON: {e}")
        except InvalidPayloadError as e:
            return problem(400, str(e))
        return await self._show_faults(request)

    async def _end_faults(self, request: web.Request) -> web.Response:
        self.set({})
        return await self._show_faults(request)


def _read(raw: bytes) -> EmailMessage:
    return message_from_bytes(raw, policy=modern)


def _subject(header: str) -> str:
    """A subject for people; one that cannot be decoded is shown as it came."""
    with contextlib.suppress(HeaderParseError, LookupError, UnicodeError):
        header = str(make_header(decode_header(header)))
    return " ".join(header.split())


def _number_of(request: web.Request) -> int:
    given = request.match_info["id"]
    return min(int(given), _LARGEST) if _NUMBER.fullmatch(given) else 0


# What came by mail is never trusted: it may show styles, and do nothing.
_GUARDS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_PAGE_GUARDS = _GUARDS | {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-src 'self'",
}
_STYLE = """
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #f4f5f7; }
header { padding: 16px 20px; } h1 { margin: 0; font-size: 20px; } header p { margin: 0; color: #5d6670; }
main { display: grid; grid-template-columns: minmax(260px, 380px) 1fr; gap: 16px; padding: 0 20px 20px; }
ol { margin: 0; padding: 0; list-style: none; max-height: 85vh; overflow: auto; }
li { margin: 0 0 8px; padding: 8px 12px; border-radius: 8px; background: #fff; overflow-wrap: anywhere; }
li.chosen { outline: 2px solid #2f6fde; } a { color: inherit; text-decoration: none; font-weight: 600; }
small { display: block; color: #5d6670; } .repeat { color: #8a5a00; }
iframe { width: 100%; height: 85vh; border: 0; border-radius: 8px; background: #fff; }
@media (max-width: 720px) { main { grid-template-columns: 1fr; } ol { max-height: 40vh; } }
"""


def _page(mails: list[dict[str, Any]], chosen: int) -> str:
    """The mailbox as a page without scripts; everything in it is escaped."""
    rows = "".join(_row(mail, is_chosen=mail["id"] == chosen) for mail in mails)
    frame = f'<iframe sandbox src="/mailbox/messages/{chosen}/html" title="the mail"></iframe>' if chosen else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TROOP mailbox</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta http-equiv="refresh" content="10">'
        f"<style>{_STYLE}</style></head><body><header><h1>Mailbox</h1><p>What people would have received, newest "
        f"first, the last {SHOWN}.</p></header><main><ol>{rows or '<li>No mail yet.</li>'}</ol>{frame}</main>"
        "</body></html>"
    )


def _row(mail: Mapping[str, Any], *, is_chosen: bool) -> str:
    shown = {name: html.escape(str(value)) for name, value in mail.items()}
    repeat = f'<small class="repeat">taken before as {shown["repeat_of"]}</small>' if mail["repeat_of"] else ""
    return (
        f'<li{" class=chosen" if is_chosen else ""}><a href="/mailbox?id={shown["id"]}">'
        f"{shown['subject'] or '(no subject)'}</a><small>to {shown['to']} · {shown['received_at'][:19]}</small>"
        f"{repeat}</li>"
    )
