"""The embedded SignalR service: mount its routes, start it, close it."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import web

from infra.local.signalr import protocol
from infra.local.signalr.clients import ClientDoor
from infra.local.signalr.connections import Outbox
from infra.local.signalr.data_plane import DataPlane
from infra.local.signalr.hub import Hub, Meter, Switchboard
from infra.local.signalr.memberships import Memberships
from infra.local.signalr.names import hub_name
from infra.local.signalr.options import DEFAULT, Options
from infra.local.signalr.tokens import Tokens

log = logging.getLogger(__name__)

_FORGET_EVERY = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionInfo:
    """One connected client, for a status page."""

    connection_id: str
    hub: str
    user_id: str | None
    transport: str
    protocol: str


class SignalRService:
    """Azure SignalR Service in serverless mode, on one aiohttp app.

    User groups live in *state* and survive a kill; everything else is rebuilt by reconnects. Tokens
    are checked with *access_key*, so a fixed key keeps old tokens good over a restart. A connection
    given as *state* stays its owner's: every change is committed at once, closing is not done here.
    """

    def __init__(
        self,
        access_key: str,
        state: sqlite3.Connection | Path | str,
        *,
        options: Options = DEFAULT,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._options = options
        tokens = Tokens(access_key, now)
        self._owned: sqlite3.Connection | None = None
        if isinstance(state, sqlite3.Connection):
            opened = state
        else:
            opened = self._owned = _open(state)
        self._memberships = Memberships(opened, now)
        self._meter = Meter(now, options.max_messages_a_day)
        outbox = Outbox()
        self._switchboard = Switchboard(self._memberships, self._meter, outbox, now)
        self._clients = ClientDoor(self._switchboard, tokens, outbox, options)
        self._data_plane = DataPlane(self._switchboard, tokens)
        self._sweeper: asyncio.Task[None] | None = None

    def routes(self) -> list[web.RouteDef]:
        """List what to mount at the root of an app: /client, /api/hubs, /api/v1/hubs, /api/health."""
        return [*self._clients.routes(), *self._data_plane.routes()]

    async def start(self) -> None:
        """Begin keeping clients alive and forgetting what is over."""
        self._clients.is_closing = False
        self._forget_expired()
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep(), name="signalr-sweep")

    async def close(self) -> None:
        """Tell every client to come back, and let go of all of them."""
        self._clients.is_closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
        leaving = self._switchboard.all()
        for connection in leaving:
            connection.end(protocol.close(allow_reconnect=True), going_away=True)
        await asyncio.gather(*(connection.closed() for connection in leaving))
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def hub(self, name: str) -> Hub:
        """Give a hub, to send to it without HTTP."""
        return self._switchboard.hub(hub_name(name))

    def connections(self) -> int:
        """Count the open connections."""
        return len(self._switchboard.live)

    def sent(self) -> int:
        """Count the messages delivered since the start, one for each client that was told."""
        return self._meter.sent

    def list_connections(self) -> list[ConnectionInfo]:
        """Show who is connected."""
        return [
            ConnectionInfo(
                connection_id=one.connection_id,
                hub=one.hub,
                user_id=one.user_id,
                transport=one.transport_name,
                protocol=one.protocol.value,
            )
            for one in self._switchboard.all()
        ]

    def drop_all(self) -> int:
        """Cut every line without a word, as a dying network does; gives how many."""
        cut = self._switchboard.all()
        for connection in cut:
            connection.abort()
        return len(cut)

    def close_all(self, *, allow_reconnect: bool, error: str | None = None) -> int:
        """Send every client a close record and close; gives how many."""
        told = self._switchboard.all()
        for connection in told:
            connection.end(protocol.close(error, allow_reconnect=allow_reconnect))
        return len(told)

    async def _sweep(self) -> None:
        forgotten = time.monotonic()
        while True:
            await asyncio.sleep(self._options.sweep_every.total_seconds())
            now = time.monotonic()
            for connection in self._switchboard.all():
                connection.tend(now)
            self._clients.forget_old()
            if now - forgotten > _FORGET_EVERY.total_seconds():
                forgotten = now
                self._forget_expired()

    def _forget_expired(self) -> None:
        try:
            self._memberships.forget_expired()
        except sqlite3.OperationalError as e:
            # Somebody else is writing: what has ended is never read, so later is soon enough.
            log.info("memberships.sweep_put_off", extra={"reason": str(e)})


def _open(path: Path | str) -> sqlite3.Connection:
    state = sqlite3.connect(path)
    state.execute("PRAGMA journal_mode=WAL")
    state.execute("PRAGMA synchronous=NORMAL")
    return state
