"""A place at the hub: who a caller is, what they hear, and what they cannot claim."""

from datetime import UTC, datetime, timedelta

import httpx
import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts.adapters.signalr import HUB, MEMBERSHIP, Service, SignalRChannel
from alerts.logic.wording import word
from alerts.models import Severity
from alerts.ports import Message
from alerts.service import HUB_GROUPS
from shared.clock import StoppedClock
from shared.errors import ConfigurationError, InvalidPayloadError, UnavailableError
from shared.http_client import HttpClient
from tests.builders import WALL
from tests.standins import a_signal
from tests.unit.alerts.house import House

KEY = "canary-key-of-at-least-thirty-two-bytes"
CONNECTION = f"Endpoint=http://127.0.0.1;Port=7072;AccessKey={KEY};Version=1.0;"
CLIENT_URL = f"http://127.0.0.1:7072/client/?hub={HUB}"


class Hub:
    """The real adapter in front of a service that remembers who joined what."""

    def __init__(self, now: datetime = WALL) -> None:
        self.wall = StoppedClock(now)
        self.joined: list[tuple[str, str]] = []
        self.lives: set[str] = set()
        self.status = 200
        http = HttpClient("signalr", transport=lambda: httpx.MockTransport(self._answer))
        self.channel = SignalRChannel(CONNECTION, http, self.wall)
        self.service = House().service(hub=self.channel, wall=self.wall)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        _, api, hubs, hub, users, user, groups, group = request.url.raw_path.decode().split("?")[0].split("/")
        assert (request.method, api, hubs, hub, users, groups) == ("PUT", "api", "hubs", HUB, "users", "groups")
        self.joined.append((user, group))
        self.lives.add(request.url.params["ttl"])
        return httpx.Response(self.status)

    def user_of(self, token: str) -> str:
        options = {"verify_exp": False, "verify_nbf": False, "verify_iat": False}
        claims = jwt.decode(token, KEY, algorithms=["HS256"], audience=CLIENT_URL, options=options)
        return claims["asrs.s.uid"]

    def groups(self) -> list[str]:
        return sorted(group for _, group in self.joined)


def signed(key: str = KEY, algorithm: str = "HS256", **claims) -> str:
    return jwt.encode(claims, key, algorithm=algorithm)


# --- what a caller hears


@pytest.mark.parametrize(
    ("symbols", "groups"),
    [
        ("all", ["all"]),
        ("", ["all"]),
        (" , ,", ["all"]),
        ("AAPL", ["AAPL"]),
        ("aapl, msft,", ["AAPL", "MSFT"]),
        ("ALL", ["ALL"]),
        ("brk.b,all", ["BRK.B", "all"]),
    ],
)
async def test_a_caller_hears_the_symbols_it_asked_for(symbols, groups):
    """Symbols are normalised, all is the default, and ALL is a company."""
    hub = Hub()

    place = await hub.service.negotiate(symbols, None)

    assert hub.groups() == sorted(f"symbols%2F{group}" for group in groups)
    assert {user for user, _ in hub.joined} == {hub.user_of(place.access_token)}
    assert hub.lives == {str(int(MEMBERSHIP.total_seconds()))}


async def test_what_is_pushed_goes_to_the_groups_that_negotiate_fills():
    """Sender and negotiate mean the same groups."""
    sent = []

    def take(request: httpx.Request) -> httpx.Response:
        sent.append(request.url.raw_path.decode().split("?")[0])
        return httpx.Response(202)

    channel = SignalRChannel(
        CONNECTION, HttpClient("signalr", transport=lambda: httpx.MockTransport(take)), StoppedClock(WALL)
    )
    alert = word(a_signal(), "public", Severity.INFO, now=WALL)
    await channel.send(Message(alert=alert, item={"alert_id": "a1", "symbol": "AAPL"}, delivery_id="d1"))

    assert sent == [
        f"/api/hubs/{HUB}/groups/symbols%2FAAPL/:send",
        f"/api/hubs/{HUB}/groups/symbols%2Fall/:send",
    ]


@pytest.mark.parametrize("symbols", ["a b", "../x", "A" * 16, "AAPL,€", ",".join(["AAPL"] * (HUB_GROUPS + 1))])
async def test_a_wrong_list_joins_nothing(symbols):
    """A name no exchange would list, or too many of them, is refused before anything is asked."""
    hub = Hub()

    with pytest.raises(InvalidPayloadError):
        await hub.service.negotiate(symbols, None)

    assert hub.joined == []


async def test_as_many_symbols_as_allowed_can_be_heard():
    """The limit itself is allowed."""
    hub = Hub()

    await hub.service.negotiate(",".join(f"S{n}" for n in range(HUB_GROUPS)), None)

    assert len(hub.joined) == HUB_GROUPS


async def test_a_service_that_is_down_gives_no_place():
    """Nobody is told to connect to what would not hear them."""
    hub = Hub()
    hub.status = 503

    with pytest.raises(UnavailableError):
        await hub.service.negotiate("all", None)


# --- who a caller is


async def test_every_newcomer_is_another_guest():
    """Without a token of ours a caller gets an id nobody had."""
    hub = Hub()

    users = {hub.user_of((await hub.service.negotiate("all", None)).access_token) for _ in range(5)}

    assert len(users) == 5
    assert all(user.startswith("guest-") for user in users)


@pytest.mark.parametrize("later", [timedelta(seconds=1), timedelta(days=30), timedelta(days=-30)])
async def test_a_reconnecting_guest_stays_the_same(later):
    """The token the official clients send along by themselves keeps the guest's id, expired or not."""
    hub = Hub()
    first = await hub.service.negotiate("AAPL", None)
    hub.wall.at += later

    again = await hub.service.negotiate("MSFT", first.access_token)

    assert hub.user_of(again.access_token) == hub.user_of(first.access_token)
    assert again.access_token != first.access_token
    assert jwt.decode(again.access_token, options={"verify_signature": False})["exp"] > hub.wall.at.timestamp()


FOREIGN = {
    "another key": signed("another-key-of-at-least-thirty-two-bytes!", **{"asrs.s.uid": "guest-1"}),
    "no signature": jwt.encode({"asrs.s.uid": "guest-1"}, None, algorithm="none"),
    "another algorithm": signed(KEY * 2, "HS512", **{"asrs.s.uid": "guest-1"}),
    "no user": signed(aud="x"),
    "an operator": signed(**{"asrs.s.uid": "operator"}),
    "a list": signed(**{"asrs.s.uid": ["guest-1"]}),
    "a subject": signed(sub="guest-1"),
    "no token": "guest-1",
    "empty parts": "..",
}


@pytest.mark.parametrize("name", sorted(FOREIGN))
async def test_a_foreign_token_is_ignored(name):
    """Whatever is not signed by us as a guest's token makes a newcomer, and no error."""
    hub = Hub()

    place = await hub.service.negotiate("all", FOREIGN[name])

    user = hub.user_of(place.access_token)
    assert user.startswith("guest-")
    assert user != "guest-1"


@given(st.text() | st.lists(st.text(alphabet="abcXYZ019_-=", max_size=30), min_size=3, max_size=3).map(".".join))
def test_no_text_is_a_token_by_accident(text):
    """Any text is either ours or nobody's, and never an error."""
    assert Hub().channel.user_of(text) is None


def test_a_tampered_token_is_nobodys():
    """Changing one letter of a token's claims breaks its signature."""
    hub = Hub()
    token = hub.channel.connection("guest-1").access_token
    head, claims, signature = token.split(".")
    flipped = claims[:10] + ("A" if claims[10] != "A" else "B") + claims[11:]

    assert hub.channel.user_of(token) == "guest-1"
    assert hub.channel.user_of(f"{head}.{flipped}.{signature}") is None


def test_a_place_is_an_hour_long_and_for_this_hub_only():
    """What a client gets opens the hub and nothing else, and ends."""
    place = Hub().channel.connection("guest-1")

    claims = jwt.decode(place.access_token, options={"verify_signature": False})

    assert place.url == CLIENT_URL
    assert claims["aud"] == CLIENT_URL
    assert datetime.fromtimestamp(claims["exp"], UTC) - WALL == timedelta(hours=1)
    assert len(place.access_token) < 4096


# --- the connection string


@pytest.mark.parametrize(
    ("text", "endpoint", "client"),
    [
        (
            f"Endpoint=https://x.service.signalr.net;AccessKey={KEY};Version=1.0;",
            "https://x.service.signalr.net",
            "https://x.service.signalr.net",
        ),
        (CONNECTION, "http://127.0.0.1:7072", "http://127.0.0.1:7072"),
        (f" accesskey = {KEY} ;ENDPOINT=http://h/;", "http://h", "http://h"),
        (f"Endpoint=http://h;AccessKey={KEY}==;ClientEndpoint=https://c.example/", "http://h", "https://c.example"),
    ],
)
def test_a_connection_string_is_taken_apart(text, endpoint, client):
    """As the official SDKs read it: names in any case, values to the first =, an optional port."""
    service = Service.parse(text)

    assert (service.endpoint, service.client_endpoint) == (endpoint, client)
    assert service.access_key.get_secret_value().startswith(KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        KEY,
        f"AccessKey={KEY}",
        f"Endpoint=;AccessKey={KEY}",
        f"Endpoint=x.service.signalr.net;AccessKey={KEY}",
        f"Endpoint=ftp://x;AccessKey={KEY}",
        f"Endpoint=https://{KEY};AccessKey=",
        f"Endpoint=http://h;Port={KEY};AccessKey={KEY}",
        f"Endpoint=http://h;Port=0;AccessKey={KEY}",
        f"Endpoint=http://h;Port=65536;AccessKey={KEY}",
        f"Endpoint=http://h;Port=²;AccessKey={KEY}",
    ],
)
def test_a_wrong_connection_string_is_refused_without_showing_it(text):
    """The message shows the form and nothing of the value."""
    with pytest.raises(ConfigurationError, match="AZURE_SIGNALR_CONNECTION_STRING must have the form") as caught:
        Service.parse(text)

    assert KEY not in f"{caught.value!r} {caught.value.__context__!r}"


def test_nothing_shows_the_key_unasked():
    """repr and str of the parts and of the channel hide it."""
    channel = Hub().channel

    assert KEY not in f"{Service.parse(CONNECTION)!r} {channel!r} {vars(channel)}"
