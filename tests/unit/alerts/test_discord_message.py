"""What Discord is shown: within every limit, as it was written, and nobody is mentioned."""

import re
from dataclasses import replace
from datetime import timedelta
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from alerts.adapters.discord import DiscordChannel, Webhook
from alerts.adapters.discord_message import COLOURS, message_of, plain, safe_message_of
from alerts.logic.wording import word
from alerts.models import Alert, Severity
from alerts.ports import Message
from shared.errors import (
    ConfigurationError,
    InvalidPayloadError,
    OutcomeUnknownError,
    RateLimitedError,
    RefusedError,
    UnavailableError,
)
from shared.http_client import HttpClient
from tests.builders import WALL
from tests.standins import Around, Storage, a_signal

BREAK = "\u200b"
TOKEN = "Kx-canary_" * 6
WEBHOOK_ID = "100000000000000001"
GOOD = f"https://discord.com/api/webhooks/{WEBHOOK_ID}/{TOKEN}"
HOSTILE = [
    "@everyone",
    "@here",
    "<@100000000000000001>",
    "<@!100000000000000001>",
    "<@&100000000000000001>",
    "<#100000000000000001>",
    "<t:1700000000:R>",
    "<:smile:100000000000000001>",
    "[click](https://evil.example/x)",
    "https://evil.example",
    "**bold** __under__ ~~gone~~ ||spoiler|| `code` ```block```",
    "> quote",
    "# heading",
    "\\",
    "\\\\*",
    "😀" * 40,
    "\u200b\u200d\ufeff",
    "\u202e",
    "e\u0301",
    "\r\n",
    "\x00",
    "{{ 7 * 7 }}",
    "<script>alert(1)</script>",
]
hostile = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=30), max_size=150).map("".join)
UNITS = {"title": 256, "description": 4096}


def units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def texts_of(message: dict) -> list[str]:
    """Everything a message shows."""
    found = [message["content"]]
    for embed in message["embeds"]:
        fields = [text for field in embed.get("fields", ()) for text in (field["name"], field["value"])]
        found += [embed["title"], embed["description"], *fields, embed["footer"]["text"]]
        found.append(embed.get("author", {}).get("name", ""))
    return found


def an_alert(**changes) -> Alert:
    fields = {"title": "t", "text": "x", "entry": "e", "interval": "1d", "direction": "long"} | changes
    return replace(word(a_signal(), "public", Severity.INFO, now=WALL), **fields)


def a_message(alert: Alert | None = None, **changes) -> Message:
    return Message(alert=alert or an_alert(), **{"item": {}, "delivery_id": "delivery-1"} | changes)


def check(message: dict) -> None:
    """What Discord checks, and what we promise of every text."""
    assert message["allowed_mentions"] == {"parse": []}
    assert units(message["content"]) <= 2000
    assert message["content"].strip() or message["embeds"]
    for embed in message["embeds"]:
        assert all(units(embed[name]) <= most for name, most in UNITS.items())
        assert units(embed["footer"]["text"]) <= 2048
        assert units(embed.get("author", {}).get("name", "")) <= 256
        assert len(embed["fields"]) <= 25
        for field in embed["fields"]:
            assert 1 <= units(field["name"].strip()) <= 256
            assert 1 <= units(field["value"].strip()) <= 1024
    assert sum(map(units, texts_of(message)[1:])) <= 6000
    for shown in texts_of(message):
        shown.encode()  # no half of a character is left
        assert not re.search(r"@(?!\u200b|…)|<(?!\u200b|…)|:/", shown)
        assert not re.search(r"(?<!\\)(\\\\)*[*_~`|>\[\]()#]", shown)


@given(title=hostile, text=hostile, entry=hostile, interval=hostile, direction=st.text(max_size=5), doubt=st.booleans())
@example(title="😀" * 300, text="😀" * 5000, entry="😀" * 600, interval="\\" * 2000, direction="long", doubt=True)
@example(title="@" * 300, text="*" * 9000, entry="", interval=" \n ", direction="", doubt=False)
def test_no_text_breaks_a_limit_or_mentions_anyone(title, text, entry, interval, direction, doubt):
    """Whatever a signal says, the message is one that Discord takes whole, and that pings and links nothing."""
    alert = an_alert(title=title, text=text, entry=entry, interval=interval, direction=direction)

    check(message_of(a_message(alert, is_possible_repeat=doubt)))
    check(safe_message_of(a_message(alert, is_possible_repeat=doubt)))


@given(
    items=st.lists(st.fixed_dictionaries({"title": hostile, "text": hostile, "occurred_at": st.text(max_size=5)})),
    copies=st.integers(min_value=1, max_value=60),
    title=hostile,
)
@example(items=[{"title": "", "text": "", "occurred_at": ""}], copies=1, title="")
@example(items=[{"title": "t" * 300, "text": "@" * 900, "occurred_at": ""}], copies=60, title="😀" * 300)
def test_no_digest_breaks_a_limit(items, copies, title):
    """Many alerts in one message stay within all limits, the sum of 6,000 too."""
    check(message_of(a_message(an_alert(title=title, text=title), digest=items * copies)))
    check(safe_message_of(a_message(an_alert(title=title, text=title), digest=items * copies)))


@pytest.mark.parametrize(
    ("count", "shown", "rest"),
    [(1, 1, None), (24, 24, None), (25, 25, None), (26, 24, "2 more"), (1500, 24, "1,476 more")],
)
def test_a_digest_says_how_many_it_leaves_out(count, shown, rest):
    """Every alert has a field, or is counted in the last one: none is lost without a word."""
    items = [{"title": f"alert {number}", "text": "up", "occurred_at": "noon"} for number in range(count)]

    [embed] = message_of(a_message(digest=items))["embeds"]

    fields = [(field["name"], field["value"]) for field in embed["fields"]]
    assert fields[:shown] == [(f"alert {number}", "up · noon") for number in range(shown)]
    assert fields[shown:] == ([("and", rest)] if rest else [])


def test_long_alerts_in_a_digest_are_counted_too():
    """Where the sum of all texts ends it before the number of fields does, the rest is counted as well."""
    items = [{"title": "t" * 200, "text": "x" * 300} for _ in range(20)]

    [embed] = message_of(a_message(digest=items))["embeds"]

    *shown, last = embed["fields"]
    assert 5 < len(shown) < 20
    assert last["value"] == f"{20 - len(shown)} more"


def test_a_possible_repeat_says_so():
    """Who sees the same twice is told why, in the embed and as text."""
    for made in (message_of, safe_message_of):
        assert "possible repeat" in "".join(texts_of(made(a_message(is_possible_repeat=True))))
        assert "possible repeat" not in "".join(texts_of(made(a_message())))


def test_an_alert_that_is_over_loses_its_colour():
    """People see at a glance that it no longer calls for anything."""
    [embed] = message_of(a_message(an_alert(resolved_at=WALL)))["embeds"]

    assert embed["color"] not in COLOURS.values()


def test_an_edit_leaves_nothing_of_what_was_there():
    """Whatever was sent first, the other form takes its whole place: both name content and embeds."""
    assert all({"content", "embeds"} <= made(a_message()).keys() for made in (message_of, safe_message_of))


@given(st.text() | hostile)
def test_what_people_see_is_what_was_written(text):
    """Escapes and breaks are invisible: taking them away gives the text back, letter by letter."""
    shown = plain(text, 10**6)

    assert re.sub(r"\\(.)", r"\1", shown).replace(BREAK, "") == text.replace(BREAK, "")


@given(text=st.text(alphabet="😀a\\*@<", min_size=1), most=st.integers(min_value=1, max_value=60))
def test_a_cut_text_ends_in_an_ellipsis(text, most):
    """A text that is too long is cut between characters, never inside an escape, and says that it was cut."""
    shown = plain(text, most)

    assert units(shown) <= most
    whole = plain(text, 10**6)
    if shown != whole:
        assert shown.endswith("…")
        kept = shown.removesuffix("…")
        assert whole.startswith(kept)
        assert not kept.endswith("\\")


def test_a_very_long_text_is_cut_at_once():
    """A megabyte of hostile text costs no more than reading it."""
    assert units(plain("*@😀" * 300_000, 4096)) <= 4096


@pytest.mark.parametrize("direction", ["long", "short"])
def test_directions_have_colours_of_their_own(direction):
    """People see the direction before they read it."""
    [embed] = message_of(a_message(an_alert(direction=direction)))["embeds"]

    assert embed["color"] == COLOURS[direction]
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_message_names_its_alert():
    """The footer leads from a message back to the ledger, and says what it is not."""
    alert = an_alert()
    [embed] = message_of(a_message(alert))["embeds"]

    assert "delivery-1" in embed["footer"]["text"]
    assert alert.alert_id in embed["footer"]["text"]
    assert "not advice" in embed["footer"]["text"]
    assert embed["timestamp"] == "2012-11-21T21:00:00Z"


# --- the webhook's address


@pytest.mark.parametrize(
    ("url", "rebuilt"),
    [
        (GOOD, GOOD),
        (f"https://discord.com/api/v10/webhooks/{WEBHOOK_ID}/{TOKEN}", GOOD),
        (f"  {GOOD} ", GOOD),
        (GOOD.replace("discord.com", "canary.discord.com:443"), GOOD),
        (GOOD.replace("discord.com", "PTB.discordapp.com").replace("PTB.", ""), GOOD),
        (
            f"http://127.0.0.1:7072/discord/api/webhooks/{WEBHOOK_ID}/{TOKEN}",
            f"http://127.0.0.1:7072/discord/api/webhooks/{WEBHOOK_ID}/{TOKEN}",
        ),
    ],
)
def test_a_webhooks_address_is_rebuilt_from_its_parts(url, rebuilt):
    """What is asked is made from the id and the token, not from the text that was given."""
    webhook = Webhook.parse(url)

    assert webhook.url == rebuilt
    assert webhook.id == WEBHOOK_ID


BAD = [
    "",
    "nonsense",
    GOOD.replace("https", "http"),
    GOOD.replace("https", "ftp"),
    GOOD.replace("https://", "//"),
    GOOD.replace("discord.com", "user@discord.com"),
    GOOD.replace("discord.com", ":pw@discord.com"),
    GOOD.replace("discord.com", "[discord.com"),
    GOOD.replace("discord.com", "discord.com:port"),
    GOOD.replace("discord.com", "discord.com:99999"),
    GOOD.replace("discord.com", "disc\u2100ord.com"),
    f"{GOOD}?wait=false",
    f"{GOOD}#part",
    f"{GOOD}/slack",
    f"{GOOD}/",
    f"{GOOD}\n",
    f"{GOOD}\t",
    GOOD.replace("/api", "/a\tpi"),
    GOOD.replace("discord.com", "evil.example"),
    GOOD.replace("discord.com", "discord.com.evil.example"),
    GOOD.replace("discord.com", "discord.com."),
    GOOD.replace("discord.com", "evil.example\\@discord.com"),
    GOOD.replace("discord.com", "discord.com:8443"),
    GOOD.replace("discord.com", "discord.com:80"),
    GOOD.replace("discord.com", "d\u0456scord.com"),
    GOOD.replace("discord.com", "169.254.169.254"),
    GOOD.replace("discord.com", "[::1]"),
    GOOD.replace("/api", "/x/api"),
    GOOD.replace("/api", "/../api"),
    GOOD.replace("/api", "/%61pi"),
    GOOD.replace(WEBHOOK_ID, "12"),
    GOOD.replace(WEBHOOK_ID, "x"),
    GOOD.replace(TOKEN, quote("a/b", safe="") * 20),
    GOOD.replace(f"/{TOKEN}", ""),
]


@pytest.mark.parametrize("url", BAD)
def test_another_address_is_refused_without_showing_it(url):
    """The message says what to write and where, and holds nothing of what was given: it may be a credential."""
    with pytest.raises(ConfigurationError, match="DISCORD_WEBHOOK_URL must have the form") as caught:
        Webhook.parse(url)

    told = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert TOKEN not in told
    assert WEBHOOK_ID not in told


@pytest.mark.parametrize("url", [*BAD, GOOD.replace("https://discord.com", "http://127.0.0.1:7072/discord")])
def test_a_subscribers_address_is_discords_or_none(url):
    """What a subscriber enters is held to Discord's own hosts, and refused without showing it."""
    with pytest.raises(InvalidPayloadError) as caught:
        Webhook.of_subscriber(url)

    assert TOKEN not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    with pytest.raises(InvalidPayloadError):
        Webhook.of_subscriber(url, beside=Webhook.parse(GOOD))


def test_the_local_inbox_is_for_those_who_have_the_default_there():
    """Where alerts go to the inbox of this machine, subscribers may too; to the same one, and no other address here."""
    local = GOOD.replace("https://discord.com", "http://127.0.0.1:7072/discord")
    here = Webhook.parse(local)

    assert Webhook.of_subscriber(local, beside=here).url == local
    assert Webhook.of_subscriber(GOOD, beside=here).url == GOOD
    for other in (
        local.replace("7072", "7073"),
        local.replace("127.0.0.1", "localhost"),
        local.replace("/discord", ""),
    ):
        with pytest.raises(InvalidPayloadError):
            Webhook.of_subscriber(other, beside=here)


@given(st.text(max_size=80) | st.tuples(st.sampled_from(BAD), st.text(max_size=10)).map("".join))
def test_any_text_is_an_address_or_a_clear_error(text):
    """No text makes reading the setting fail in any other way."""
    try:
        webhook = Webhook.parse(text)
    except ConfigurationError as e:
        assert TOKEN not in str(e)  # noqa: PT017 - either outcome is right
    else:
        assert webhook.url.startswith(("https://discord.com/", "http://127.0.0.1", "http://localhost"))


def test_nothing_shows_the_token_unasked():
    """repr and str of a webhook and of the channel hide it."""
    webhook = Webhook.parse(GOOD)
    channel = DiscordChannel(GOOD, HttpClient("discord"), Storage(), Around(None, None))

    assert TOKEN not in f"{webhook} {webhook!r} {channel} {channel!r} {vars(channel)}"


# --- our own storage in between


def a_channel(handler, step=None) -> DiscordChannel:
    import httpx

    from shared.clock import StoppedClock

    wall = StoppedClock(WALL)
    storage = Storage(wall)
    client = HttpClient("discord", transport=lambda: httpx.MockTransport(handler))
    return DiscordChannel(GOOD, client, Around(storage, step) if step else storage, wall)


class Locked:
    """Storage that takes the reservation of a call, and loses every write after it."""

    def __init__(self) -> None:
        self.writes = 0

    async def __call__(self, name, call):
        if name == "read":
            return await call()
        self.writes += 1
        if self.writes == 1:
            return await call()
        raise UnavailableError("locked")


async def test_trouble_of_our_own_storage_does_not_look_like_discords():
    """A message that Discord took is sent, even if what it said of its bucket could not be kept."""
    import httpx

    def take(_: httpx.Request) -> httpx.Response:
        headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset-After": "2"}
        return httpx.Response(200, json={"id": "m-1"}, headers=headers)

    assert await a_channel(take, Locked()).send(a_message()) == "m-1"


async def test_a_limit_that_could_not_be_kept_is_still_told():
    """The delivery waits as it was asked to, even if the other instances do not hear of it."""
    import httpx

    def limit(_: httpx.Request) -> httpx.Response:
        return httpx.Response(429, json={"retry_after": 3.5})

    with pytest.raises(RateLimitedError) as caught:
        await a_channel(limit, Locked()).send(a_message())

    assert caught.value.retry_after == timedelta(seconds=3.5)


async def test_storage_that_is_down_before_the_call_means_surely_not_sent():
    """Without knowing the bucket nothing is asked; the delivery is tried again."""
    asked = []

    async def down(name, call):
        raise UnavailableError("locked")

    with pytest.raises(UnavailableError):
        await a_channel(asked.append, down).send(a_message())

    assert asked == []


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, OutcomeUnknownError), (503, OutcomeUnknownError), (302, RefusedError), (201, RefusedError)],
)
@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"[" * 50_000, b'{"id": null}', b"\xff"])
async def test_bodies_that_are_not_discords_change_nothing(status, error, body):
    """A status alone decides; whatever a proxy puts into the body is not believed and breaks nothing."""
    import httpx

    with pytest.raises(error):
        await a_channel(lambda _: httpx.Response(status, content=body)).send(a_message())


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"[" * 50_000, b'{"id": null}', b"\xff"])
async def test_a_success_without_an_id_is_a_success(body):
    """Discord took it, whatever it says about it."""
    import httpx

    assert await a_channel(lambda _: httpx.Response(200, content=body)).send(a_message()) is None
