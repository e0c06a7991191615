import asyncio
import logging
from datetime import timedelta
from types import SimpleNamespace

import httpx
import pytest
from aiohttp import web
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr

from shared.errors import ConfigurationError, OutcomeUnknownError, UnavailableError
from shared.http_client import HttpClient, key_of

CANARY = "CANARY7KEY9QX"
URL = f"https://neighbour.test/{CANARY}"


class Neighbour(httpx.AsyncBaseTransport):
    """Answers or fails as told and remembers the requests."""

    def __init__(self, answer=None) -> None:
        self.answer = answer
        self.asked: list[httpx.Request] = []
        self.closed = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if callable(self.answer):
            return await self.answer(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or httpx.Response(200, content=b"ok")

    async def aclose(self) -> None:
        self.closed += 1


@pytest.fixture
async def client():
    made = []

    def make(answer=None, **limits) -> SimpleNamespace:
        neighbour = Neighbour(answer)
        http = HttpClient("Neighbour", transport=lambda: neighbour, **limits)
        made.append(http)
        return SimpleNamespace(http=http, neighbour=neighbour)

    yield make
    for http in made:
        await http.aclose()


@pytest.fixture
async def real():
    """A server on a port of its own, and an HttpClient over a real socket."""
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        if request.path == "/moved":
            raise web.HTTPFound("/elsewhere")
        return web.Response(text="ok", headers={"X-Rate": "7"})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    http = HttpClient("Neighbour")
    yield SimpleNamespace(http=http, url=f"http://127.0.0.1:{port}", asked=asked)
    await http.aclose()
    await runner.cleanup()


async def asked(client, how):
    """One call, either way."""
    if how == "get":
        return await client.http.get(URL, params={"apikey": CANARY}, headers={"x-key": CANARY})
    return await client.http.send("POST", URL, params={"wait": "true"}, headers={"x-key": CANARY}, content=b"{}")


class TestAnswer:
    async def test_what_the_neighbour_said_comes_back(self, client):
        """Status, headers in lower case, body; and every status is an answer."""
        neighbour = client(httpx.Response(429, headers={"Retry-After": "3"}, content=b"slow"))

        answer = await neighbour.http.get("https://n.test/a", params={"q": "ä b", "n": 1}, headers={"X-Token": "t"})

        assert (answer.status, answer.headers["retry-after"], answer.body) == (429, "3", b"slow")
        [request] = neighbour.neighbour.asked
        assert (request.method, str(request.url)) == ("GET", "https://n.test/a?q=%C3%A4+b&n=1")
        assert request.headers["x-token"] == "t"

    async def test_what_is_sent_arrives(self, client):
        """Method, parameters, headers and body are the caller's."""
        neighbour = client(httpx.Response(204))

        answer = await asked(neighbour, "send")

        [request] = neighbour.neighbour.asked
        assert answer.status == 204
        assert (request.method, request.url.query, request.content) == ("POST", b"wait=true", b"{}")

    async def test_body_is_not_in_the_repr(self, client):
        """An answer that is logged does not fill the log."""
        answer = await asked(client(httpx.Response(200, content=b"a large body")), "get")

        assert "large" not in repr(answer)


class TestTrouble:
    @pytest.mark.parametrize(
        ("failure", "reading", "sending"),
        [
            (httpx.ConnectError(f"refused {URL}"), UnavailableError, UnavailableError),
            (httpx.ConnectTimeout(f"late {URL}"), UnavailableError, UnavailableError),
            (httpx.PoolTimeout(f"crowded {URL}"), UnavailableError, UnavailableError),
            (httpx.ReadTimeout(f"late {URL}"), UnavailableError, OutcomeUnknownError),
            (httpx.WriteTimeout(f"late {URL}"), UnavailableError, OutcomeUnknownError),
            (httpx.ReadError(f"cut {URL}"), UnavailableError, OutcomeUnknownError),
            (httpx.WriteError(f"cut {URL}"), UnavailableError, OutcomeUnknownError),
            (httpx.RemoteProtocolError(f"garbled {URL}"), UnavailableError, OutcomeUnknownError),
            (httpx.UnsupportedProtocol(f"what {URL}"), ConfigurationError, ConfigurationError),
            (httpx.InvalidURL(f"what {URL}"), ConfigurationError, ConfigurationError),
        ],
        ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
    )
    async def test_reading_can_be_repeated_sending_only_if_nothing_left(self, client, failure, reading, sending):
        """A read that failed is tried again; a send that may have arrived is its own kind of trouble."""
        for how, error in (("get", reading), ("send", sending)):
            with pytest.raises(error) as caught:
                await asked(client(failure), how)

            assert "Neighbour" in str(caught.value)
            assert type(failure).__name__ in str(caught.value)
            assert CANARY not in str(caught.value)
            assert caught.value.__cause__ is caught.value.__context__ is None  # they hold the request, and so the key

    async def test_neighbour_that_never_ends_is_left(self, client):
        """One deadline holds over the whole call, however busily the other side drips."""

        async def never(request):
            await asyncio.Event().wait()

        for how, error in (("get", UnavailableError), ("send", OutcomeUnknownError)):
            with pytest.raises(error, match="TimeoutError"):
                await asked(client(never, total=timedelta(milliseconds=20)), how)

    @pytest.mark.parametrize("url", ["ftp://n.test", "no address", "http://[::1", "http://n.test:port", ""])
    async def test_text_that_is_no_address_is_a_setting_to_correct(self, real, url):
        """The error asks a person; nothing was asked of anybody."""
        with pytest.raises(ConfigurationError, match="correct the setting"):
            await real.http.get(url, params={})
        with pytest.raises(ConfigurationError, match="correct the setting"):
            await real.http.send("POST", url, params={}, headers={}, content=b"")


class TestQuiet:
    @pytest.mark.parametrize("how", ["get", "send"])
    async def test_no_log_shows_an_address(self, client, how, caplog):
        """httpx would write every URL, and with it the key, at INFO; later settings of levels change nothing."""
        with caplog.at_level(logging.DEBUG):
            neighbour = client()
            await asked(neighbour, how)
            logging.getLogger("httpx").setLevel(logging.DEBUG)
            await asked(neighbour, how)
        logging.getLogger("httpx").setLevel(logging.NOTSET)

        assert CANARY not in caplog.text

    @pytest.mark.parametrize("how", ["get", "send"])
    async def test_span_names_the_neighbour_only(self, client, how, monkeypatch):
        """The trace says whom we asked, never with which key."""
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)

        await asked(client(), how)

        [done] = exporter.get_finished_spans()
        assert dict(done.attributes) == {"troop.neighbour": "Neighbour"}
        assert CANARY not in done.to_json()


class TestPool:
    async def test_pool_is_made_at_first_use_and_kept(self, client):
        """Building a client touches nothing; calls share connections; closing lets go and may come twice."""
        neighbour = client()
        assert neighbour.http._client is None

        await asked(neighbour, "get")
        first = neighbour.http.client
        await asked(neighbour, "send")
        assert neighbour.http.client is first

        await neighbour.http.aclose()
        await neighbour.http.aclose()
        assert neighbour.neighbour.closed == 1

        assert (await asked(neighbour, "get")).status == 200

    async def test_redirect_is_an_answer(self, real):
        """A key is never carried to where somebody else points."""
        answer = await real.http.get(f"{real.url}/moved", params={"apikey": CANARY})

        assert (answer.status, answer.headers["location"]) == (302, "/elsewhere")
        assert real.asked == [f"/moved?apikey={CANARY}"]

    async def test_proxy_of_the_environment_is_not_asked(self, real, monkeypatch):
        """Only settings decide who sees our requests."""
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")

        answer = await real.http.get(f"{real.url}/here", params={})

        assert (answer.status, answer.body, answer.headers["x-rate"]) == (200, b"ok", "7")

    async def test_nobody_there_is_trouble_that_passes(self, unused_tcp_port):
        """A refused connection sent nothing, so even a send may be repeated."""
        http = HttpClient("Neighbour")

        with pytest.raises(UnavailableError):
            await http.send("POST", f"http://127.0.0.1:{unused_tcp_port}/", params={}, headers={}, content=b"")

        await http.aclose()


class TestKey:
    def test_key_is_wrapped(self):
        """No repr shows a key."""
        assert key_of("FINNHUB_KEY", CANARY) == key_of("FINNHUB_KEY", SecretStr(CANARY)) == SecretStr(CANARY)
        assert CANARY not in repr(key_of("FINNHUB_KEY", CANARY))

    @pytest.mark.parametrize(
        "text", [f"{CANARY}\n", f"a {CANARY}", f"{CANARY}\r\nX-Evil: 1", f"{CANARY}é", f"\t{CANARY}"]
    )
    def test_key_that_would_break_out_is_refused(self, text):
        """The error names the setting and shows nothing of the key."""
        with pytest.raises(ConfigurationError, match="FINNHUB_KEY") as caught:
            key_of("FINNHUB_KEY", text)

        assert CANARY not in str(caught.value)
