"""
The one way this house asks other people's HTTP APIs.

No redirects, no proxies from the environment, a deadline on everything, and no URL in any log, span or error:
some neighbours want their key in it.
"""

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pydantic import SecretStr

from shared.errors import ConfigurationError, OutcomeUnknownError, UnavailableError
from shared.telemetry import span

if TYPE_CHECKING:
    import httpx

CONNECT = timedelta(seconds=2)
TOTAL = timedelta(seconds=8)
CONNECTIONS = 16
"""To one neighbour, all of them kept: what comes on top waits for one of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the other side said; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class HttpClient:
    """
    Asks one neighbour, over one pool of connections that is made at its first use.

    *transport* replaces the network in tests.
    """

    def __init__(
        self,
        neighbour: str,
        *,
        connect: timedelta = CONNECT,
        total: timedelta = TOTAL,
        transport: "Callable[[], httpx.AsyncBaseTransport] | None" = None,
    ) -> None:
        self.neighbour = neighbour
        self._connect = connect
        self._total = total
        self._transport = transport
        self._client: httpx.AsyncClient | None = None

    @property
    def client(self) -> "httpx.AsyncClient":
        """The httpx client itself."""
        if self._client is None:
            import httpx

            _silence()
            _remember_missing("sniffio")
            self._client = httpx.AsyncClient(
                follow_redirects=False,
                trust_env=False,
                limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
                timeout=httpx.Timeout(self._total.total_seconds(), connect=self._connect.total_seconds()),
                transport=self._transport() if self._transport else None,
            )
        return self._client

    async def get(
        self,
        url: str,
        *,
        params: Mapping[str, str | int],
        headers: Mapping[str, str] | None = None,
        url_is_secret: bool = False,
    ) -> Answer:
        """
        Fetch *url*; with *url_is_secret* the trace shows that we asked, but not what.

        Raises:
            UnavailableError: no answer came in time, or it broke off.
            ConfigurationError: this is no URL.

        """
        import httpx

        # Nothing is raised inside the handlers: what they caught holds the request, and so the key.
        try:
            with span("http.asked", neighbour=self.neighbour), _untraced() if url_is_secret else nullcontext():
                async with asyncio.timeout(self._total.total_seconds()):
                    response = await self.client.get(url, params=dict(params), headers=dict(headers or {}))
            return Answer(
                status=response.status_code,
                headers={name.lower(): value for name, value in response.headers.items()},
                body=response.content,
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as e:
            wrong, trouble = True, type(e).__name__
        except (httpx.HTTPError, TimeoutError) as e:
            wrong, trouble = False, type(e).__name__
        if wrong:
            raise ConfigurationError(f"the address of {self.neighbour} is no http URL ({trouble}): correct the setting")
        raise UnavailableError(f"{self.neighbour} gave no answer ({trouble})")

    async def send(
        self,
        method: str,
        url: str,
        *,
        params: Mapping[str, str | int],
        headers: Mapping[str, str],
        content: bytes,
        url_is_secret: bool = False,
    ) -> Answer:
        """
        Send something that must not happen twice by accident.

        Raises:
            UnavailableError: the connection could not be made, so nothing was sent.
            OutcomeUnknownError: it was sent, or part of it, and no answer came.
            ConfigurationError: this is no URL.

        """
        import httpx

        try:
            with span("http.sent", neighbour=self.neighbour), _untraced() if url_is_secret else nullcontext():
                async with asyncio.timeout(self._total.total_seconds()):
                    response = await self.client.request(
                        method, url, params=dict(params), headers=dict(headers), content=content
                    )
            return Answer(
                status=response.status_code,
                headers={name.lower(): value for name, value in response.headers.items()},
                body=response.content,
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as e:
            error: Exception = ConfigurationError(
                f"the address of {self.neighbour} is no http URL ({type(e).__name__}): correct the setting"
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as e:
            error = UnavailableError(f"{self.neighbour} could not be reached ({type(e).__name__})")
        except (httpx.HTTPError, TimeoutError) as e:
            error = OutcomeUnknownError(f"{self.neighbour} gave no answer ({type(e).__name__})")
        # Raised outside the handlers: what they caught holds the request, and so the key.
        raise error

    async def aclose(self) -> None:
        """Close the connections; the next call would open new ones."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()


def key_of(setting: str, key: SecretStr | str) -> SecretStr:
    """
    Wrap a key so that no repr shows it.

    Raises:
        ConfigurationError: it holds what no key holds, and would break out of its header or URL.

    """
    text = key if isinstance(key, str) else key.get_secret_value()
    if not (text.isascii() and text.isprintable() and " " not in text):
        raise ConfigurationError(f"{setting} holds blanks or special characters: copy the key again")
    return SecretStr(text)


def _untraced() -> AbstractContextManager[None]:
    # The Azure exporter instruments httpx and would send the whole URL as an attribute of the span.
    from opentelemetry.instrumentation.utils import suppress_http_instrumentation

    return suppress_http_instrumentation()


def _remember_missing(module: str) -> None:
    # httpcore tries to import it for every request, and Python would search every folder each time.
    if module not in sys.modules and find_spec(module) is None:
        sys.modules[module] = None  # type: ignore[assignment]  # documented to mean: there is none


def _hushed(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _silence() -> None:
    # httpx writes every URL at INFO. A filter holds even where somebody sets the level afterwards.
    logging.getLogger("httpx").addFilter(_hushed)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
