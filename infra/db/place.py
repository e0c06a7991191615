"""Which storage a command means, what may be asked of it, and how a long work shows that it goes on."""

import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from pydantic import SecretStr

from infra.local.up.settings import merged
from shared.clock import Clock
from shared.documents import Document, Documents
from shared.errors import ConfigurationError
from shared.retry import retry
from shared.settings import ROOT
from shared.wiring import open_documents

SQLITE = "sqlite:"
APP_FILE = "app.db"
PAGE = 200

type Say = Callable[[str], None]


@runtime_checkable
class Listed(Protocol):
    """Storage that knows its containers."""

    async def containers(self) -> list[str]: ...


@runtime_checkable
class Provisioned(Protocol):
    """Storage whose containers are made before they are used; the answer says what was, or would be, made."""

    async def provision(self, *, dry_run: bool) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A storage by its DOCUMENTS_URL."""

    url: str

    @classmethod
    def of(cls, *, url: str | None = None, data: Path | None = None) -> "Place":
        """What the command line names; else DOCUMENTS_URL, from the environment or local.settings.json."""
        if url:
            return cls(url=url)
        if data:
            return cls(url=f"{SQLITE}{data.resolve() / APP_FILE}")
        return cls(url=setting("DOCUMENTS_URL") or f"{SQLITE}.troop/{APP_FILE}")

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for any other storage."""
        path = self.url.removeprefix(SQLITE)
        return ROOT / path if self.url.startswith(SQLITE) and path not in ("", ":memory:") else None

    @property
    def name(self) -> str:
        """For people."""
        return str(self.file or self.url)

    def existing_file(self) -> Path | None:
        """
        The SQLite file, which must be there; None for any other storage.

        Raises:
            ConfigurationError: there is no such file.

        """
        file = self.file
        if file and not file.is_file():
            raise ConfigurationError(f"{file} does not exist: name the folder with --data, or the storage with its URL")
        return file

    def open(self, wall: Clock) -> Documents:
        """The documents as they lie there, of any version."""
        return open_documents(self.url, wall, SecretStr(setting("COSMOS_KEY")))


def setting(name: str) -> str:
    """A setting from the environment, else from local.settings.json, else empty."""
    return merged({}, os.environ).get(name, "")


async def containers_of(store: Documents) -> list[str]:
    """
    The containers of a store, sorted.

    Raises:
        ConfigurationError: it cannot tell.

    """
    if not isinstance(store, Listed):
        raise ConfigurationError(f"{type(store).__name__} cannot list its containers")
    return sorted(await store.containers())


async def steadily[T](call: Callable[[], Awaitable[T]]) -> T:
    """Await *call*, with the patience of somebody who runs a command: throttling and short outages are waited out."""
    return await retry(call, attempts=8, patience=timedelta(seconds=30))


async def pages(store: Documents, container: str, *, after: str | None = None) -> AsyncIterator[list[Document]]:
    """A whole container from *after* on, oldest first, a page at a time."""
    while True:
        page = await steadily(partial(store.feed, container, after=after, limit=PAGE))
        if not page:
            return
        yield page
        after = page[-1].sort


class Progress:
    """Says at most once a second how far a work is, on standard error; a terminal sees one line that changes."""

    def __init__(self, every: float = 1.0) -> None:
        self._every = every
        self._said_at = time.monotonic()
        self._is_open = False

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said_at < self._every:
            return
        self._said_at = now
        self._is_open = sys.stderr.isatty()
        print(f"\r{text}\x1b[K" if self._is_open else text, end="" if self._is_open else "\n", file=sys.stderr)

    def done(self) -> None:
        """End the changing line."""
        if self._is_open:
            print("\r\x1b[K", end="", file=sys.stderr)
            self._is_open = False
