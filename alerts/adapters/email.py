"""
E-mail over SMTP: one message a recipient, with a Message-ID that is the same for every attempt.

A server that answered the final dot has the message; one that vanished after it may have it. Replies as RFC 5321
and 3463 describe them (facts: delivery.md B2); their text is never shown, because it often holds the address.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from email.header import Header
from email.headerregistry import Address as Mailbox
from email.headerregistry import HeaderRegistry
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import format_datetime, parseaddr
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import SecretStr

from alerts.models import Severity, delivery_id
from alerts.ports import Message
from shared.clock import Clock, format_instant
from shared.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    RateLimitedError,
    RecipientGoneError,
    RefusedError,
    TroopError,
    UnavailableError,
)
from shared.telemetry import span

if TYPE_CHECKING:
    from aiosmtplib import SMTP
    from jinja2 import Template

CONNECT = timedelta(seconds=3)
TOTAL = timedelta(seconds=5)
CONNECTIONS = 4
"""At most so many at once; mail servers count them."""
IDLE = timedelta(seconds=20)
MESSAGES = 100
"""A connection is given up after so many: servers cut those that never end."""
SUBJECT, TITLE, TEXT, ITEMS = 150, 300, 10_000, 50
CLOSING = "An automatic observation, not investment advice."
POSSIBLE_REPEAT = "Possible repeat: an earlier attempt ended without an answer."
WAIT = timedelta(seconds=60)
"""How long we are quiet when a server asks us to slow down; SMTP has no word for how long."""
HERE = frozenset({"127.0.0.1", "::1", "localhost"})
TEMPLATES = Path(__file__).resolve().parent / "templates"
USED_LATELY = timedelta(seconds=1)
"""A kept connection that was quiet for longer is asked whether it still works."""
_FORM = "smtp://USER:PASSWORD@HOST:587 or smtps://USER:PASSWORD@HOST:465"
_ADDRESS = re.compile(r"[\x21-\x3f\x41-\x7e]{1,64}@[A-Za-z0-9.-]{1,253}")
_URL = re.compile(r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+)[\x21-\x3b\x3d\x3f-\x7e]{0,1800}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")
_ENHANCED = re.compile(r"\s*([245]\.\d{1,3}\.\d{1,3})\b")


class Stage(StrEnum):
    """How far a conversation got."""

    CONNECT = "the connection"
    LOGIN = "our login"
    SENDER = "the sender"
    RECIPIENT = "the recipient"
    DATA = "the message"
    CONTENT = "the message's content"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """SMTP_URL, taken apart."""

    host: str
    port: int
    tls: Literal["tls", "starttls", "none"]
    user: str
    password: SecretStr

    @classmethod
    def parse(cls, url: str) -> Self:
        """
        Read ``smtp://USER:PASSWORD@HOST:587`` (STARTTLS) or ``smtps://USER:PASSWORD@HOST:465`` (TLS at once).

        ``?starttls=0`` talks in the clear, on this machine only.

        Raises:
            ConfigurationError: it has another form; the message never shows it.

        """
        parts, port, starttls = _parts_of(url)
        if parts is None or parts.scheme not in ("smtp", "smtps") or not parts.hostname or port == 0:
            raise ConfigurationError(f"SMTP_URL must have the form {_FORM}, with special characters as %XX")
        if starttls is None or (parts.scheme == "smtps" and parts.query):
            raise ConfigurationError("SMTP_URL: the only option is ?starttls=1 or ?starttls=0, and only with smtp://")
        is_clear = parts.scheme == "smtp" and not starttls
        if is_clear and parts.hostname not in HERE:
            raise ConfigurationError("SMTP_URL: ?starttls=0 would show password and mail to the network: leave it out")
        return cls(
            host=parts.hostname,
            port=port or (465 if parts.scheme == "smtps" else 587),
            tls="tls" if parts.scheme == "smtps" else "none" if is_clear else "starttls",
            user=unquote(parts.username or ""),
            password=SecretStr(unquote(parts.password or "")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """EMAIL_FROM: who mails are from."""

    name: str
    address: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Read ``alerts@example.org`` or ``TROOP <alerts@example.org>``.

        Raises:
            ConfigurationError: it has another form.

        """
        name, address = parseaddr(text.strip())
        if not _ADDRESS.fullmatch(address) or "\n" in text or "\r" in text:
            raise ConfigurationError("EMAIL_FROM must be an address such as TROOP <alerts@example.org>")
        return cls(name=name, address=address)

    @property
    def domain(self) -> str:
        return self.address.rpartition("@")[2]


@dataclass(slots=True)
class _Line:
    """An open connection, with what it has carried."""

    smtp: "SMTP"
    carried: int = 0
    idle_since: float = 0.0


@dataclass(slots=True)
class _Talk:
    """How far one conversation got, for when it breaks off."""

    stage: Stage = Stage.CONNECT


class _Headers(HeaderRegistry):
    """The library's kinds of headers; it would make a class for each header of each mail, and these are kept."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, type] = {}

    def __getitem__(self, name: str) -> type:
        kind = self._kept.get(name)
        if kind is None:  # the names are ours, so there are few
            kind = self._kept[name] = super().__getitem__(name)
        return kind


_HEADERS = _Headers()


class _Wire(EmailPolicy):
    """How headers are written: two of them not as the library does it."""

    def fold_binary(self, name: str, value: str) -> bytes:
        if name == "Subject" and not value.isascii():  # would get blanks between encoded words and others
            value = Header(str(value), "utf-8", header_name=name).encode(linesep="\r\n")
        elif name not in ("Subject", "List-Unsubscribe"):
            return super().fold_binary(name, value)
        return f"{name}: {value}\r\n".encode()  # a link in encoded words would be found by no mail program


class EmailChannel:
    """
    Mail to subscribers' own addresses.

    It is keyed by the Message-ID, made from the delivery id: a repeat is the same message again, which the large
    mailbox services and servers with duplicate suppression show once. SMTP itself promises nothing, so elsewhere a
    repeat after an unknown outcome may be seen twice.
    """

    name = "email"
    is_keyed = True
    can_edit = False
    needs_address = True

    def __init__(
        self,
        smtp_url: str,
        email_from: str,
        wall: Clock,
        *,
        connect: timedelta = CONNECT,
        total: timedelta = TOTAL,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self._server = Server.parse(smtp_url)
        self._sender = Sender.parse(email_from)
        self._wall = wall
        self._connect = connect
        self._total = total
        self._tls_context = tls_context
        self._idle: list[_Line] = []
        self._places = asyncio.Semaphore(CONNECTIONS)

    async def send(self, message: Message) -> str | None:
        if message.to is None:
            raise ConfigurationError("e-mail goes to subscribers' own addresses: take it from the public subscription")
        to = message.to.value.get_secret_value()
        if not _ADDRESS.fullmatch(to):
            raise RecipientGoneError("the stored address is no e-mail address: enter it again")
        mail = mail_of(message, to, self._sender, self._wall)
        with span("mail.sent"):
            error = await self._carried(to, wire_form(mail))
        if error is not None:
            raise error  # outside of any handler: what was caught there holds the address
        return str(mail["Message-ID"])

    async def edit(self, provider_id: str | None, message: Message) -> None:
        """A mail cannot be changed: the new version is sent as an answer to the first."""
        await self.send(message)

    async def aclose(self) -> None:
        """End the connections that were kept; the next mail opens a new one."""
        lines, self._idle = self._idle, []
        for line in lines:
            await _part(line.smtp)

    async def _carried(self, to: str, wire: bytes) -> TroopError | None:
        """What went wrong, in our words; None when the server took it."""
        import aiosmtplib

        talk = _Talk()
        try:
            async with asyncio.timeout(self._total.total_seconds()), self._line(talk) as line:
                await self._say(line.smtp, talk, to, wire)
        except aiosmtplib.SMTPResponseException as e:
            return classify(talk.stage, e.code, e.message)
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as e:
            return _broken_off(talk.stage, e)
        return None

    async def _say(self, smtp: "SMTP", talk: _Talk, to: str, wire: bytes) -> None:
        """One mail transaction; returning means that the server answered the final dot with yes."""
        from aiosmtplib import SMTPDataError

        talk.stage = Stage.SENDER
        size = [f"SIZE={len(wire)}"] if smtp.supports_extension("size") else []
        await smtp.mail(self._sender.address, options=size)
        talk.stage = Stage.RECIPIENT
        await smtp.rcpt(to)
        talk.stage = Stage.DATA
        # Not the library's data(): it does not tell whether a connection was lost before the content or after it.
        reply = await smtp.execute_command(b"DATA")
        if reply.code != 354 or smtp.protocol is None:
            raise SMTPDataError(reply.code, reply.message)
        talk.stage = Stage.CONTENT
        smtp.protocol.write(wire)
        reply = await smtp.protocol.read_response()
        if not 200 <= reply.code < 300:
            raise SMTPDataError(reply.code, reply.message)

    @asynccontextmanager
    async def _line(self, talk: _Talk) -> AsyncIterator[_Line]:
        """A connection for one mail; it is kept for the next one if this one went well."""
        async with self._places:
            line = await self._kept() or _Line(smtp=await self._opened(talk))
            try:
                yield line
            except BaseException:
                line.smtp.close()
                raise
            line.carried += 1
            line.idle_since = asyncio.get_running_loop().time()
            if line.carried < MESSAGES:
                self._idle.append(line)
            else:
                await _part(line.smtp)

    async def _kept(self) -> _Line | None:
        """A connection of an earlier mail that still works."""
        from aiosmtplib import SMTPException

        while self._idle:
            line = self._idle.pop()
            quiet = timedelta(seconds=asyncio.get_running_loop().time() - line.idle_since)
            try:
                if line.smtp.is_connected and quiet < IDLE:
                    if quiet > USED_LATELY:
                        await line.smtp.noop()
                    return line
            except (SMTPException, OSError):
                pass  # the server gave it up, and so do we
            except BaseException:
                line.smtp.close()
                raise
            line.smtp.close()
        return None

    async def _opened(self, talk: _Talk) -> "SMTP":
        from aiosmtplib import SMTP

        server = self._server
        smtp = SMTP(
            hostname=server.host,
            port=server.port,
            use_tls=server.tls == "tls",
            start_tls=server.tls == "starttls",
            local_hostname=self._sender.domain,
            timeout=self._connect.total_seconds(),
            tls_context=self._tls_context,
        )
        try:
            await smtp.connect()
            talk.stage = Stage.LOGIN
            if server.user:
                await smtp.login(server.user, server.password.get_secret_value())
        except BaseException:
            smtp.close()
            raise
        return smtp


def classify(stage: Stage, code: int, text: str) -> TroopError:
    """A mail server's refusal at some stage, in our words."""
    found = _ENHANCED.match(text)
    enhanced = found[1] if found else ""
    shown = f"{code} {enhanced}".strip()
    match stage, code:
        case Stage.CONTENT, _ if not 400 <= code <= 599:
            return OutcomeUnknownError(f"the mail server gave no answer we can read to {stage}")
        case _, _ if not 400 <= code <= 599:
            return UnavailableError(f"the mail server gave no answer we can read to {stage}")
        case _, _ if code < 500 and (code == 452 or enhanced.startswith("4.7.")):
            return RateLimitedError(f"the mail server asked us to slow down ({shown})", retry_after=WAIT)
        case _, _ if code < 500:
            return UnavailableError(f"the mail server does not take {stage} now ({shown})")
        case ((Stage.CONNECT | Stage.LOGIN), _):
            return ConfigurationError(f"the mail server refused {stage} ({shown}): check SMTP_URL")
        case Stage.SENDER, (530 | 535):
            return ConfigurationError(f"the mail server wants a login ({shown}): put user and password into SMTP_URL")
        case Stage.SENDER, (552 | 554):
            return RefusedError(f"the mail server refused the message ({shown})")
        case Stage.SENDER, _:
            return ConfigurationError(f"the mail server refused {stage} ({shown}): check EMAIL_FROM")
        case Stage.RECIPIENT, (550 | 551 | 553) if not enhanced.startswith("5.7."):
            return RecipientGoneError(f"the mail server knows no such recipient ({shown})")
        case _, _ if enhanced.startswith("5.1."):
            return RecipientGoneError(f"the mail server knows no such recipient ({shown})")
        case _:
            return RefusedError(f"the mail server refused {stage} ({shown})")


def _broken_off(stage: Stage, e: Exception) -> TroopError:
    """A conversation that ended without an answer, in our words."""
    cause = e.__cause__ or e
    match stage:
        case Stage.CONTENT:
            return OutcomeUnknownError(f"the mail server gave no answer to the message ({type(e).__name__})")
        case _ if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigurationError("the certificate of the mail server is not valid for the host in SMTP_URL")
        case Stage.CONNECT if not isinstance(e, OSError):
            return ConfigurationError("the mail server of SMTP_URL offers no STARTTLS: use smtps:// if it wants that")
        case Stage.LOGIN if not isinstance(e, OSError):
            return ConfigurationError("the mail server offers no way to log in: take user and password from SMTP_URL")
        case _:
            return UnavailableError(f"the mail server broke off at {stage} ({type(e).__name__})")


def mail_of(message: Message, to: str, sender: Sender, wall: Clock) -> EmailMessage:
    """A message as a mail: plain text always, and the same as HTML without anything that would be fetched."""
    alert = message.alert
    shown = _shown(message)
    mail = EmailMessage(policy=_Wire(linesep="\r\n", header_factory=_HEADERS))
    mail["From"] = Mailbox(display_name=sender.name, addr_spec=sender.address)
    mail["To"] = Mailbox(addr_spec=to)
    mail["Subject"] = shown["subject"]
    mail["Date"] = format_datetime(wall.now())
    mail["Message-ID"] = _message_id(message.delivery_id, sender)
    if alert.version > 1:
        mail["In-Reply-To"] = mail["References"] = _message_id(delivery_id(alert.alert_id, EmailChannel.name), sender)
    mail["Auto-Submitted"] = "auto-generated"
    mail["X-Auto-Response-Suppress"] = "All"
    if found := _URL.fullmatch(message.unsubscribe_url or ""):
        mail["List-Unsubscribe"] = f"<{found[0]}>"
        if found["scheme"] == "https" or found["host"] in HERE:
            mail["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    mail.set_content(_text(shown), cte="quoted-printable")
    mail.add_alternative(_template().render(shown), subtype="html", cte="quoted-printable")
    return mail


def wire_form(mail: EmailMessage) -> bytes:
    """A mail as DATA carries it, to the final dot: lines that begin with a dot get another one."""
    lines = mail.as_bytes().split(b"\r\n")
    stuffed = b"\r\n".join(b"." + line if line.startswith(b".") else line for line in lines)
    return stuffed.removesuffix(b"\r\n") + b"\r\n.\r\n"


def _shown(message: Message) -> dict[str, Any]:
    """What a mail says, as plain values: templates get nothing else."""
    alert = message.alert
    title = one_line(alert.title, TITLE)
    urgent = "Critical: " if alert.severity is Severity.CRITICAL else ""
    items = [_item(item) for item in (message.digest or ())[:ITEMS]]
    left = len(message.digest or ()) - len(items)
    url = message.unsubscribe_url or ""
    closed = ("Bar closed", f"{format_instant(alert.occurred_at)}")
    facts = [closed, ("Entry", alert.entry), ("Interval", alert.interval)] if message.digest is None else []
    return {
        # Whoever reads the header decodes what looks encoded, line breaks included: nothing may look so.
        "subject": one_line(f"{urgent}{alert.title}".replace("=?", "= ?"), SUBJECT),
        "title": title,
        "note": POSSIBLE_REPEAT if message.is_possible_repeat else "",
        "text": _clean(alert.text, TEXT) if message.digest is None else "",
        "items": items,
        "more": f"and {left:,} more" if left else "",
        "facts": [(name, one_line(value, TITLE)) for name, value in facts if value.strip()],
        "closing": one_line(f"{CLOSING} Alert {alert.alert_id}, delivery {message.delivery_id}.", TITLE),
        "unsubscribe_url": url if _URL.fullmatch(url) else "",
    }


def _item(item: Mapping[str, Any]) -> dict[str, str]:
    return {
        "title": one_line(str(item.get("title") or "-"), TITLE),
        "text": _clean(str(item.get("text") or ""), 2 * TITLE),
        "when": one_line(str(item.get("occurred_at") or ""), 40),
    }


def _text(shown: Mapping[str, Any]) -> str:
    """The plain text."""
    items: Sequence[Mapping[str, str]] = shown["items"]
    parts = [
        shown["title"],
        shown["note"],
        shown["text"],
        *("\n".join(filter(None, (f"* {one['title']}", one["text"], one["when"]))) for one in items),
        shown["more"],
        "\n".join(f"{name}: {value}" for name, value in shown["facts"]),
        "-- \n" + shown["closing"],
        f"Stop these messages: {shown['unsubscribe_url']}" if shown["unsubscribe_url"] else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def one_line(text: str, most: int) -> str:
    """Text for a header or a heading: no line break, no control, cut to *most* characters."""
    line = " ".join(_UNPRINTABLE.sub(" ", _encodable(text)).split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def _clean(text: str, most: int) -> str:
    """Text of several lines, each without controls."""
    lines = "\n".join(_UNPRINTABLE.sub(" ", line).strip() for line in _encodable(text).split("\n"))
    return lines if len(lines) <= most else f"{lines[: most - 1].rstrip()}…"


def _encodable(text: str) -> str:
    """The text without halves of characters, which no mail can carry."""
    return text.encode(errors="replace").decode()


def _message_id(delivery: str, sender: Sender) -> str:
    return f"<{re.sub(r'[^A-Za-z0-9._-]', '-', delivery)}@{sender.domain}>"


def _parts_of(url: str) -> tuple[Any, int | None, bool | None]:
    """An address's parts, its port, and whether STARTTLS is wanted (None: it says something else)."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return None, None, None
    is_bare = parts.path in ("", "/") and not parts.fragment
    query = parse_qsl(parts.query, keep_blank_values=True)
    wanted = {(): True, (("starttls", "1"),): True, (("starttls", "0"),): False}.get(tuple(query))
    return (parts if is_bare else None), port, wanted


@cache
def _template() -> "Template":
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    loader = FileSystemLoader(TEMPLATES)
    environment = SandboxedEnvironment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("email.html.j2")


async def _part(smtp: "SMTP") -> None:
    """Say goodbye, if there is still somebody to say it to."""
    from aiosmtplib import SMTPException

    try:
        await smtp.quit(timeout=1)
    except (SMTPException, OSError):
        pass  # it is over either way
    finally:
        smtp.close()
