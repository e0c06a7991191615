"""The local mail server: what a real client meets, what people would see, and the trouble it can make."""

import json
import sqlite3
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path

import aiosmtplib
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from alerts.adapters.email import EmailChannel
from alerts.logic.wording import word
from alerts.models import Severity
from alerts.ports import Address, Message
from infra.local.mailbox import PASSWORD, USER, Mailbox
from shared.clock import StoppedClock
from shared.errors import ConfigurationError, InvalidPayloadError
from tests.builders import WALL
from tests.standins import a_signal


@pytest.fixture
def state():
    one = sqlite3.connect(":memory:", isolation_level=None)
    yield one
    one.close()


@pytest.fixture
async def mailbox(state) -> AsyncIterator[Mailbox]:
    one = Mailbox(state, clock=StoppedClock(WALL), limit=20_000)
    await one.start()
    yield one
    await one.close()


@pytest.fixture
async def url(mailbox) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(mailbox.routes())
    async with TestServer(app, host="127.0.0.1") as server:
        yield str(server.make_url("")).rstrip("/")


def a_mail(subject: str = "Hello", *, message_id: str = "<one@test>", html: str | None = None) -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"], mail["Message-ID"] = "a@test.org", "b@test.org", subject, message_id
    mail.set_content("first line\n.second line begins with a dot\n")
    if html is not None:
        mail.add_alternative(html, subtype="html")
    return mail


async def post(mailbox: Mailbox, mail: EmailMessage, *, to: list[str] | None = None, **options: object) -> None:
    """As any mail program does it."""
    login = {"username": USER, "password": PASSWORD} | options
    await aiosmtplib.send(
        mail, hostname="127.0.0.1", port=mailbox.port, recipients=to, start_tls=False, local_hostname="test", **login
    )


async def get(url: str) -> tuple[int, dict[str, str], str]:
    async with ClientSession() as session, session.get(url) as answer:
        return answer.status, dict(answer.headers), await answer.text()


# --- what people see


async def test_a_mail_is_shown_as_it_was_sent(mailbox, url):
    """Sender, recipient, subject, text and HTML, dots and umlauts included; in the next process too."""
    await post(mailbox, a_mail("Grüße 😀", html="<p>hi</p>"))

    status, _, text = await get(f"{url}/mailbox/inbox")
    [item] = json.loads(text)["items"]
    _, _, whole = await get(f"{url}/mailbox/messages/{item['id']}")
    mail = json.loads(whole)
    assert status == 200
    assert (item["from"], item["to"], item["subject"]) == ("a@test.org", "b@test.org", "Grüße 😀")
    assert item["received_at"] == "2026-11-21T09:00:00Z"
    assert mail["text"].splitlines() == ["first line", ".second line begins with a dot"]
    assert mail["html"].strip() == "<p>hi</p>"
    assert ["Subject", "Grüße 😀"] in mail["headers"]


async def test_mails_survive_a_new_process(mailbox, state):
    """What people would have received is in the database, not in memory."""
    await post(mailbox, a_mail())

    assert [item["subject"] for item in Mailbox(state).inbox()] == ["Hello"]


async def test_a_repeat_is_told_from_a_new_mail(mailbox):
    """The same Message-ID for the same recipient is a repeat; for somebody else, or with another id, it is not."""
    await post(mailbox, a_mail())
    await post(mailbox, a_mail())
    await post(mailbox, a_mail(), to=["c@test.org"])
    await post(mailbox, a_mail(message_id="<two@test>"))
    await post(mailbox, a_mail(message_id=""))
    await post(mailbox, a_mail(message_id=""))

    assert [item["repeat_of"] for item in mailbox.inbox()] == [None, None, None, None, 1, None]
    assert {name: mailbox.stats()[name] for name in ("messages", "repeats")} == {"messages": 6, "repeats": 1}


async def test_the_inbox_lists_newest_first_and_after_a_number(mailbox, url):
    """Numbers grow; ``after``, ``limit`` and ``to`` narrow the list."""
    for number in range(3):
        await post(mailbox, a_mail(f"m{number}", message_id=f"<{number}@test>"), to=[f"p{number % 2}@test.org"])

    assert [item["subject"] for item in mailbox.inbox()] == ["m2", "m1", "m0"]
    for query, subjects in (("after=1", ["m2", "m1"]), ("limit=1", ["m2"]), ("to=p1@test.org", ["m1"])):
        _, _, text = await get(f"{url}/mailbox/inbox?{query}")
        assert [item["subject"] for item in json.loads(text)["items"]] == subjects


@pytest.mark.parametrize("query", ["limit=many", "after=-1", "limit="])
async def test_a_bad_query_is_named(url, query):
    """A limit that is no number is a 400 that names it."""
    status, _, text = await get(f"{url}/mailbox/inbox?{query}")

    assert status == 400
    assert query.partition("=")[0] in json.loads(text)["detail"]


@pytest.mark.parametrize("path", ["/mailbox/messages/9", "/mailbox/messages/9/html", "/mailbox/messages/x/raw"])
async def test_a_mail_that_is_not_there_is_a_404(url, path):
    """No number, no mail."""
    status, _, _ = await get(f"{url}{path}")

    assert status == 404


async def test_html_from_a_mail_can_do_nothing(mailbox, url):
    """It is shown in a sandbox without scripts and without anything fetched; the page itself has no script at all."""
    hostile = "<script>alert(1)</script>"
    await post(mailbox, a_mail(hostile, html=f"{hostile}<img src=https://evil.example/x>"))

    _, headers, shown = await get(f"{url}/mailbox/messages/1/html")
    _, page_headers, page = await get(f"{url}/mailbox")
    assert hostile in shown
    assert headers["Content-Security-Policy"].startswith("sandbox; default-src 'none'")
    assert "script-src" not in headers["Content-Security-Policy"]
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert '<iframe sandbox src="/mailbox/messages/1/html"' in page
    assert page_headers["Content-Security-Policy"].startswith("default-src 'none'")


async def test_a_mail_without_html_is_shown_as_text(mailbox, url):
    """Escaped, as it was written; and the raw mail can be read as text."""
    mail = a_mail()
    mail.set_content("<b>not bold</b>")
    await post(mailbox, mail)

    _, _, shown = await get(f"{url}/mailbox/messages/1/html")
    _, headers, raw = await get(f"{url}/mailbox/messages/1/raw")
    assert "&lt;b&gt;not bold&lt;/b&gt;" in shown
    assert headers["Content-Type"].startswith("text/plain")
    assert "Message-ID: <one@test>" in raw


async def test_an_empty_mailbox_says_so(url):
    """The page works before the first mail."""
    status, _, page = await get(f"{url}/mailbox")

    assert status == 200
    assert "No mail yet" in page


# --- what a mail server refuses


async def test_nobody_sends_without_a_login(mailbox):
    """As at a real provider."""
    with pytest.raises(aiosmtplib.SMTPSenderRefused) as caught:
        await post(mailbox, a_mail(), username=None, password=None)

    assert caught.value.code == 530


@pytest.mark.parametrize(("user", "password"), [(USER, "wrong"), ("nobody", PASSWORD), ("nobody", "")])
async def test_a_wrong_login_is_refused(mailbox, user, password):
    """Neither user nor password is told to be the wrong one."""
    with pytest.raises(aiosmtplib.SMTPAuthenticationError) as caught:
        await post(mailbox, a_mail(), username=user, password=password)

    assert caught.value.code == 535


async def test_a_mail_that_is_too_large_is_refused(mailbox):
    """A limit of size, told before and checked after."""
    mail = a_mail()
    mail.set_content("x" * 70 + "\n" + ("y" * 70 + "\n") * 400)

    with pytest.raises(aiosmtplib.SMTPResponseException) as caught:
        await post(mailbox, mail)

    assert caught.value.code == 552
    assert mailbox.inbox() == []


async def test_a_port_that_is_taken_is_said_to_be(mailbox, state):
    """Two servers cannot share one; the error names the port."""
    with pytest.raises(ConfigurationError, match=str(mailbox.port)):
        await Mailbox(state).start(mailbox.port)


async def test_a_closed_mailbox_lets_go_of_its_port(mailbox):
    """It can be started again where it was."""
    port = mailbox.port
    await mailbox.close()

    await mailbox.start(port)
    await post(mailbox, a_mail())

    assert mailbox.stats()["messages"] == 1


# --- trouble on demand


async def test_faults_are_put_shown_and_ended_over_http(mailbox, url):
    """One call switches trouble on, another ends it; hits say how often it struck."""
    wanted = {"seed": 3, "faults": [{"stage": "recipient", "reply": "450 4.2.0 busy", "times": 2}]}
    async with ClientSession() as session:
        async with session.put(f"{url}/mailbox/faults", json=wanted) as answer:
            assert await answer.json() == wanted | {"hits": {}}
        for _ in range(2):
            with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
                await post(mailbox, a_mail())
        await post(mailbox, a_mail())
        async with session.get(f"{url}/mailbox/faults") as answer:
            assert (await answer.json())["hits"] == {"recipient": 2}
        async with session.delete(f"{url}/mailbox/faults") as answer:
            assert await answer.json() == {"hits": {}}


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"faults": [{"stage": "middle"}]}, "faults.0.stage"),
        ({"faults": [{"stage": "dot", "reply": "250 fine"}]}, "faults.0.reply"),
        ({"faults": [{"stage": "dot", "reply": "451 a\r\n250 b"}]}, "faults.0.reply"),
        ({"faults": [{"stage": "dot", "reply": "451 a", "cut": True}]}, "not both"),
        ({"faults": [{"stage": "data", "cut": True, "accept": True}]}, "accept goes with cut"),
        ({"faults": [{"stage": "dot", "rate": 2}]}, "faults.0.rate"),
        ({"mail": {}}, "mail"),
        ([], "body"),
    ],
)
async def test_a_wrong_fault_is_named(mailbox, url, wanted, told):
    """What cannot be switched on is a 400 that says what is wrong, and changes nothing."""
    async with ClientSession() as session, session.put(f"{url}/mailbox/faults", json=wanted) as answer:
        assert answer.status == 400
        assert told in (await answer.json())["detail"]

    with pytest.raises(InvalidPayloadError):
        mailbox.set(wanted)
    assert mailbox.strike("dot") is None


async def test_the_same_seed_strikes_the_same_mails(mailbox):
    """Faults with a rate can be repeated."""
    struck = []
    for _ in range(2):
        mailbox.set({"seed": 7, "faults": [{"stage": "dot", "reply": "451 later", "rate": 0.5}]})
        struck.append([mailbox.strike("dot") is not None for _ in range(50)])

    assert struck[0] == struck[1]
    assert 10 < sum(struck[0]) < 40


@pytest.mark.parametrize(("accept", "taken"), [(True, 1), (False, 0)])
async def test_a_cut_after_the_dot_hides_whether_it_was_taken(mailbox, accept, taken):
    """For the sender both look the same; the truth is in the mailbox."""
    mailbox.set({"faults": [{"stage": "dot", "cut": True, "accept": accept}]})

    with pytest.raises(aiosmtplib.SMTPServerDisconnected):
        await post(mailbox, a_mail())

    assert mailbox.stats()["messages"] == taken


# --- over TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate for localhost that signed itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_mail_goes_over_starttls_and_to_nobody_else(state, certificate, is_trusted):
    """The password and the mail wait for TLS, and for a certificate that holds."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    client = ssl.create_default_context(cafile=certificate) if is_trusted else None
    mailbox = Mailbox(state, tls_context=server)
    await mailbox.start()
    channel = EmailChannel(
        f"smtp://{USER}:{PASSWORD}@localhost:{mailbox.port}",
        "alerts@troop.test",
        StoppedClock(WALL),
        total=timedelta(seconds=5),
        tls_context=client,
    )
    alert = word(a_signal(), "alice", Severity.INFO, now=WALL)
    message = Message(alert=alert, item={}, delivery_id="d", to=Address(value=SecretStr("b@test.org"), shown="b"))
    try:
        if is_trusted:
            assert await channel.send(message) == "<d@troop.test>"
        else:
            with pytest.raises(ConfigurationError, match="certificate"):
                await channel.send(message)
        assert mailbox.stats()["messages"] == is_trusted
    finally:
        await channel.aclose()
        await mailbox.close()


async def test_a_server_without_starttls_is_not_trusted_with_a_password(mailbox):
    """STARTTLS is the default and is insisted upon: nothing is said in the clear."""
    channel = EmailChannel(f"smtp://{USER}:{PASSWORD}@localhost:{mailbox.port}", "a@troop.test", StoppedClock(WALL))
    alert = word(a_signal(), "alice", Severity.INFO, now=WALL)
    message = Message(alert=alert, item={}, delivery_id="d", to=Address(value=SecretStr("b@test.org"), shown="b"))

    with pytest.raises(ConfigurationError, match="STARTTLS"):
        await channel.send(message)

    assert mailbox.inbox() == []
