"""What a mail says and how it is made: headers nobody can break, text and HTML, settings, and what replies mean."""

from dataclasses import replace
from email import message_from_bytes
from email.policy import default
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from alerts.adapters.email import (
    ITEMS,
    SUBJECT,
    EmailChannel,
    Sender,
    Server,
    Stage,
    classify,
    mail_of,
    one_line,
    wire_form,
)
from alerts.logic.wording import word
from alerts.models import Alert, Severity
from alerts.ports import Address, Message
from shared.clock import StoppedClock
from shared.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    RateLimitedError,
    RecipientGoneError,
    RefusedError,
    TroopError,
    UnavailableError,
)
from tests.builders import WALL
from tests.standins import a_signal

FROM = Sender.parse("TROOP alerts <alerts@troop.test>")
TO = "alice@example.org"
LINK = "https://troop.test/api/unsubscribe?token=v1." + "A" * 300
HEADERS = (
    *("From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "X-Auto-Response-Suppress"),
    *("MIME-Version", "Content-Type"),
)
HOSTILE = [
    "\r\nBcc: all@example.org",
    "\n\n<script>alert(1)</script>",
    "\u2028",
    "\u202e",
    "\x00",
    "\ud800",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "${7*7}",
    "=?utf-8?q?=0D=0ABcc=3A?=",
    "\r\n.\r\nMAIL FROM:<x@example.org>\r\n",
    ".",
    "é😀",
    '"><img src=https://evil.example/x>',
]
hostile = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=20), max_size=20).map("".join)


def an_alert(**changes) -> Alert:
    return replace(word(a_signal(), "alice", Severity.INFO, now=WALL), **changes)


def a_message(alert: Alert | None = None, **changes) -> Message:
    fields = {"item": {}, "delivery_id": "delivery-1", "to": Address(value=SecretStr(TO), shown="a***")} | changes
    return Message(alert=alert or an_alert(), **fields)


def read(message: Message, sender: Sender = FROM, to: str = TO):
    """The mail as the other side reads it from the wire."""
    wire = wire_form(mail_of(message, to, sender, StoppedClock(WALL)))
    assert wire.endswith(b"\r\n.\r\n")
    assert b"\r\n.\r\n" not in wire[:-5]
    lines = wire[:-3].split(b"\r\n")
    assert not any(b"\n" in line or b"\r" in line or len(line) > 998 for line in lines)
    return message_from_bytes(b"\r\n".join(line.removeprefix(b".") for line in lines), policy=default)


def parts(message: Message) -> tuple[str, str]:
    mail = read(message)
    return mail.get_body(("plain",)).get_content(), mail.get_body(("html",)).get_content()


# --- headers


def test_a_mail_has_what_machines_and_people_look_for():
    """Who it is from and for, that a machine wrote it, and how to stop it with one click."""
    mail = read(a_message(unsubscribe_url=LINK))

    assert mail["From"] == "TROOP alerts <alerts@troop.test>"
    assert mail["To"] == TO
    assert mail["Subject"] == "AAPL: long at 561.70"
    assert mail["Message-ID"] == "<delivery-1@troop.test>"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["Date"].datetime == WALL
    assert mail["List-Unsubscribe"] == f"<{LINK}>"
    assert mail["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"


def test_a_long_link_stays_in_one_piece_on_the_wire():
    """Mail programs look for the bare link: it must not be folded or encoded, however long it is."""
    wire = wire_form(mail_of(a_message(unsubscribe_url=LINK), TO, FROM, StoppedClock(WALL)))

    assert f"List-Unsubscribe: <{LINK}>\r\n".encode() in wire


@pytest.mark.parametrize(
    ("url", "has_link", "has_click"),
    [
        (LINK, True, True),
        ("http://127.0.0.1:7071/api/unsubscribe?token=x", True, True),
        ("http://troop.test/api/unsubscribe?token=x", True, False),
        ("javascript:alert(1)", False, False),
        ("https://troop.test/\r\nBcc: x@example.org", False, False),
        ("https://troop.test/>x", False, False),
        (None, False, False),
    ],
)
def test_one_click_is_for_links_that_are_safe_to_post_to(url, has_link, has_click):
    """RFC 8058 wants HTTPS; what is no link is left out everywhere."""
    message = a_message(unsubscribe_url=url)
    mail = read(message)

    assert (mail["List-Unsubscribe"] is not None, mail["List-Unsubscribe-Post"] is not None) == (has_link, has_click)
    for text in parts(message):
        assert ("unsubscribe?token" in text) == has_link
        assert "javascript" not in text


def test_every_attempt_is_the_same_mail_to_a_mailbox():
    """The Message-ID comes from the delivery, not from the attempt."""
    first, second = read(a_message()), read(a_message(is_possible_repeat=True))

    assert first["Message-ID"] == second["Message-ID"] != read(a_message(delivery_id="delivery-2"))["Message-ID"]


@given(title=hostile, text=hostile, entry=hostile, delivery=hostile)
@example(title="😀" * 400, text="x" * 30_000, entry="", delivery="")
def test_no_text_breaks_out_of_its_place(title, text, entry, delivery):
    """Whatever a signal says, the mail has the headers we gave it, one recipient, and a subject of one line."""
    alert = an_alert(title=title, text=text, entry=entry)
    mail = read(a_message(alert, delivery_id=delivery, digest=[{"title": title, "text": text}] * 3))

    names = sorted(name.lower() for name in mail.keys())  # noqa: SIM118 - each as often as it is there
    assert names == sorted(name.lower() for name in HEADERS)
    assert mail["To"] == TO
    assert len(str(mail["Subject"])) <= SUBJECT
    assert len(str(mail["Subject"]).splitlines()) <= 1
    assert [part.get_content_type() for part in mail.walk()] == ["multipart/alternative", "text/plain", "text/html"]
    assert "<script" not in mail.get_body(("html",)).get_content()
    assert "<img" not in mail.get_body(("html",)).get_content()


@given(st.text(max_size=200) | hostile)
@example("0𐀀 Bcc: all@example.org Bcc: all@example.org𐀀𐀀𐀀 Bcc: all@example.org Bcc: all@example.org")
@example("a " * 70 + "é")
def test_a_subject_is_read_as_it_was_meant(title):
    """Long, and in any script: no blank is added or lost on the way, and nothing is taken for an encoding."""
    meant = one_line(title.replace("=?", "= ?"), SUBJECT)

    assert read(a_message(an_alert(title=title)))["Subject"] == meant


@given(hostile)
def test_a_line_is_one_line(text):
    """No break, no control and nothing that turns the direction of writing is left, and nothing is longer."""
    line = one_line(text, 40)

    assert len(line) <= 40
    assert len(line.splitlines()) <= 1
    assert "\u202e" not in line
    line.encode()


def test_the_longest_address_is_written_whole():
    """254 characters are an address; a header that broke it apart would go to nobody."""
    longest = f"{'a' * 60}@{'.'.join(['b' * 60, 'c' * 60, 'd' * 60])}.example"

    assert read(a_message(), to=longest)["To"] == longest


# --- what people read


def test_text_and_html_say_the_same():
    """Who reads plain text misses nothing."""
    plain, page = parts(a_message(unsubscribe_url=LINK))

    for said in ("AAPL: long at 561.70", "Close 561.70", "2012-11-21T21:00:00Z", "sma-10-30", "not investment advice"):
        assert said in plain
        assert said in page
    assert LINK in plain
    assert "delivery delivery-1" in plain


def test_html_is_escaped_and_fetches_nothing():
    """What came from outside is text, and no picture tells anybody that the mail was read."""
    _, page = parts(a_message(an_alert(title="<b>&", text="{{ 7 * 7 }}")))

    assert "&lt;b&gt;&amp;" in page
    assert "{{ 7 * 7 }}" in page
    assert "src=" not in page
    assert "http" not in page


def test_a_digest_lists_its_alerts_and_counts_the_rest():
    """Every alert is there up to a bound, and none is left out without a word."""
    items = [{"title": f"alert {n}", "text": f"because {n}", "occurred_at": "noon"} for n in range(ITEMS + 7)]
    for text in parts(a_message(digest=items)):
        assert all(f"because {number}" in text for number in range(ITEMS))
        assert f"alert {ITEMS}" not in text
        assert "and 7 more" in text
    for text in parts(a_message(digest=items[:2])):
        assert "more" not in text


def test_a_possible_repeat_says_so():
    """Who gets the same twice is told why."""
    assert all("Possible repeat" in text for text in parts(a_message(is_possible_repeat=True)))
    assert not any("Possible repeat" in text for text in parts(a_message()))


def test_what_is_critical_says_so_in_its_subject():
    """It is seen before the mail is opened."""
    assert read(a_message(an_alert(severity=Severity.CRITICAL)))["Subject"] == "Critical: AAPL: long at 561.70"


# --- settings


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "user", "password"),
    [
        ("smtp://u:p@mail.example.org", "mail.example.org", 587, "starttls", "u", "p"),
        ("smtp://u:p@mail.example.org:2525?starttls=1", "mail.example.org", 2525, "starttls", "u", "p"),
        ("smtps://u:p@mail.example.org/", "mail.example.org", 465, "tls", "u", "p"),
        ("smtp://u:p@127.0.0.1:1025?starttls=0", "127.0.0.1", 1025, "none", "u", "p"),
        (f"smtps://{quote('u@x', safe='')}:{quote('p/@:%', safe='')}@h.org", "h.org", 465, "tls", "u@x", "p/@:%"),
        ("smtp://mail.example.org:25", "mail.example.org", 25, "starttls", "", ""),
    ],
)
def test_a_mail_servers_address_is_read(url, host, port, tls, user, password):
    """TLS is the default everywhere, and special characters come as %XX."""
    server = Server.parse(url)

    assert (server.host, server.port, server.tls, server.user) == (host, port, tls, user)
    assert server.password.get_secret_value() == password


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mail.example.org",
        "https://u:canary@h.org",
        "smtp://",
        "smtp://u:canary@:25",
        "smtp://u:canary@h.org:99999",
        "smtp://u:canary@h.org:0",
        "smtp://u:canary@h.org:x",
        "smtp://u:canary@h.org/path",
        "smtp://u:canary@h.org?starttls=0",
        "smtp://u:canary@h.org?tls=1",
        "smtps://u:canary@h.org?starttls=1",
        "smtp://u:canary@h.org?starttls=1&x=y",
        "smtp://u:canary@[h.org",
    ],
)
def test_another_address_is_refused_without_showing_it(url):
    """The error names the setting and its form, and holds nothing of the password."""
    with pytest.raises(ConfigurationError, match="SMTP_URL") as caught:
        Server.parse(url)

    assert "canary" not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"


@pytest.mark.parametrize(
    "text", ["", "TROOP", "a b@c.org", "x@", "@x.org", "a@b.org\r\nBcc: c@d.org", "a@b.org, c@d.org"]
)
def test_a_wrong_sender_is_refused(text):
    """EMAIL_FROM is one address, with or without a name."""
    with pytest.raises(ConfigurationError, match="EMAIL_FROM"):
        Sender.parse(text)


def test_nothing_shows_the_password_unasked():
    """repr and str of the server and of the channel hide it."""
    url = "smtp://user:canary@mail.example.org"
    channel = EmailChannel(url, "a@b.org", StoppedClock(WALL))

    assert "canary" not in f"{Server.parse(url)!r} {channel!r} {vars(channel)}"


# --- what a reply means

STAGES = list(Stage)


@given(stage=st.sampled_from(STAGES), code=st.integers(-1, 999), text=st.text(max_size=30))
def test_any_reply_is_one_of_our_errors(stage, code, text):
    """Nothing a server says breaks us, and its own words, which often hold the address, are never repeated."""
    error = classify(stage, code, f"<{TO}> {text}")

    assert isinstance(error, TroopError)
    assert TO not in str(error)


@pytest.mark.parametrize("stage", STAGES)
def test_only_4xx_is_tried_again(stage):
    """A 5xx never leads to another attempt by itself, a 4xx always does."""
    assert all(
        isinstance(classify(stage, code, ""), UnavailableError | RateLimitedError) for code in (421, 450, 451, 452)
    )
    final = (RefusedError, RecipientGoneError, ConfigurationError)
    assert all(isinstance(classify(stage, code, ""), final) for code in (500, 550, 551, 552, 553, 554))


def test_an_answer_nobody_can_read_leaves_the_outcome_open_only_after_the_message():
    """Before the content nothing was sent, whatever was answered."""
    assert isinstance(classify(Stage.CONTENT, -1, "?"), OutcomeUnknownError)
    assert isinstance(classify(Stage.DATA, -1, "?"), UnavailableError)
