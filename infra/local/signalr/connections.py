"""Connected clients: one class a transport, and the outbox that writes to all of them."""

import asyncio
import logging
import os
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from aiohttp import WSMsgType, web

from infra.local.signalr import protocol
from infra.local.signalr.options import Options
from infra.local.signalr.protocol import HubProtocol, Kind, ProtocolError, Record

log = logging.getLogger(__name__)

_PER_TICK = 1024
_STRAIGHT = 2
"""How many broadcasts of a tick are written as they are; more are a burst."""
_EVENT_STREAM = "ServerSentEvents"
_IGNORED = (Kind.PING, Kind.COMPLETION, Kind.STREAM_ITEM, Kind.CANCEL_INVOCATION)
_NO_UPSTREAM = (
    "This service is serverless and has no upstream: clients cannot invoke hub methods. "
    "Call the app's HTTP API instead."
)


class Outbox:
    """Writes to clients at the end of the loop's tick, never more than some of them at once.

    A message to many is written straight from here, client after client; a burst of messages is
    joined into one write a client. Either way each client gets what it gets in order.
    """

    def __init__(self) -> None:
        self._broadcasts: deque[tuple[Record, Iterator[Connection]]] = deque()
        self._waiting: deque[Connection] = deque()
        self._is_scheduled = False

    def touch(self, connection: "Connection") -> None:
        """Remember that a connection has something to write."""
        self._waiting.append(connection)
        self._schedule()

    def broadcast(self, record: Record, connections: Collection["Connection"]) -> None:
        """Write the record to all of these."""
        if self._waiting or len(self._broadcasts) >= _STRAIGHT:
            self.hand_out()
            for connection in connections:
                connection.put(record)
        else:
            self._broadcasts.append((record, iter(tuple(connections))))
            self._schedule()

    def hand_out(self) -> None:
        """Queue what is still to be broadcast with each client, so that what follows comes behind it."""
        while self._broadcasts:
            record, connections = self._broadcasts.popleft()
            for connection in connections:
                connection.put(record)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_scheduled = False
        now = time.monotonic()
        left = _PER_TICK
        try:
            while left and self._broadcasts:
                record, connections = self._broadcasts[0]
                records = [record]
                for connection in islice(connections, left):
                    left -= 1
                    connection.write(records, now)
                if left:
                    self._broadcasts.popleft()
            while left and self._waiting:
                left -= 1
                self._waiting.popleft().flush(now)
        finally:
            if self._broadcasts or self._waiting:
                self._schedule()


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every connection is given by the service it belongs to."""

    options: Options
    outbox: Outbox
    on_ready: "Callable[[Connection], None]"
    on_gone: "Callable[[Connection], None]"


class Connection(ABC):
    """One client, from its handshake to its end; nothing here ever waits for it."""

    # Slots: thousands of these are walked through for one message, and each dict is one more cache miss.
    __slots__ = (
        "_around",
        "_last_sent",
        "_opened",
        "_options",
        "_over",
        "_pending",
        "_transport",
        "connection_id",
        "hub",
        "is_gone",
        "is_ready",
        "protocol",
        "user_id",
    )

    transport_name: ClassVar[str]

    def __init__(
        self,
        connection_id: str,
        hub: str,
        user_id: str | None,
        transport: asyncio.Transport,
        around: Surroundings,
    ) -> None:
        self.connection_id = connection_id
        self.hub = hub
        self.user_id = user_id
        self.protocol = HubProtocol.JSON
        self.is_ready = False
        self.is_gone = False
        self._transport = transport
        self._around = around
        self._options = around.options
        self._opened = self._last_sent = time.monotonic()
        self._pending: list[Record] = []
        self._over = asyncio.Event()

    def queue(self, record: Record) -> None:
        """Write the record at the end of this tick, behind everything said before."""
        self._around.outbox.hand_out()
        self.put(record)

    def put(self, record: Record) -> None:
        """Write the record at the end of this tick; whoever calls takes care of the order."""
        if self.is_gone:
            return
        if not self._pending:
            self._around.outbox.touch(self)
        self._pending.append(record)

    def flush(self, now: float) -> None:
        """Write what is queued, all at once."""
        if self._pending:
            records, self._pending = self._pending, []
            self.write(records, now)

    def write(self, records: list[Record], now: float) -> None:
        """Write to a client that is there and reads; cut it when its line is dead or it reads too slowly."""
        if self.is_gone:
            return
        self._last_sent = now
        if self._is_broken():
            self.abort()
            return
        backlog = self._backlog()
        if backlog > self._options.buffer_limit:
            log.warning("connection.cut_slow", extra={"connection_id": self.connection_id})
            self.abort()
        else:
            self._write(records, backlog)

    def receive(self, data: bytes) -> None:
        """Hear the client: its handshake first, then whole records."""
        if self.is_gone:
            return
        try:
            rest = data if self.is_ready else self._shake_hands(data)
            for kind in protocol.read_kinds(self.protocol, rest):
                self._hear(kind)
        except ProtocolError as e:
            self.end(protocol.close(str(e)) if self.is_ready else protocol.refused(str(e)))

    def end(self, record: Record | None = None, *, going_away: bool = False) -> None:
        """Say a last word and close in good order."""
        if self.is_gone:
            return
        self._around.outbox.hand_out()
        if record:
            self._pending.append(record)
        self.flush(time.monotonic())
        # Writing may have cut a slow client already.
        if self.leave():
            self._finish(going_away=going_away)

    def abort(self) -> None:
        """Cut the line without a word."""
        if self.leave():
            self._cut()

    def leave(self) -> bool:
        """Stop belonging to the hub; True the first time."""
        if self.is_gone:
            return False
        self.is_gone = True
        self._around.on_gone(self)
        return True

    async def closed(self) -> None:
        """Wait until nothing more will be written or heard."""
        await self._over.wait()

    def tend(self, now: float) -> None:
        """Keep the client's line alive, and notice a line that is dead."""
        if self._is_broken():
            self.abort()
        elif not self.is_ready:
            self._hurry(now)
        elif now - self._last_sent >= self._options.keep_alive.total_seconds():
            self.queue(protocol.PING)

    @property
    def is_over(self) -> bool:
        """Say whether the client's token for this connection means nothing any more."""
        return self.is_gone

    def _hurry(self, now: float) -> None:
        if now - self._opened > self._options.handshake_timeout.total_seconds():
            self.end(protocol.refused("Handshake was canceled: it took too long."))

    def _shake_hands(self, data: bytes) -> bytes:
        shaken = protocol.read_handshake(data)
        if shaken.protocol is HubProtocol.MESSAGEPACK and self.transport_name == _EVENT_STREAM:
            raise ProtocolError("Server-Sent Events carry text only: use the json protocol.")
        self.protocol = shaken.protocol
        self.queue(protocol.ACCEPTED)
        self.is_ready = True
        self._around.on_ready(self)
        return shaken.rest

    def _hear(self, kind: int) -> None:
        if kind == Kind.CLOSE:
            self.end()
        elif kind in {Kind.INVOCATION, Kind.STREAM_INVOCATION}:
            self.end(protocol.close(_NO_UPSTREAM))
        elif kind not in _IGNORED:
            raise ProtocolError(f"there is no record of type {kind}")

    def _is_broken(self) -> bool:
        return self._transport.is_closing()

    def _backlog(self) -> int:
        return self._transport.get_write_buffer_size()

    @abstractmethod
    def _write(self, records: list[Record], backlog: int) -> None: ...

    @abstractmethod
    def _finish(self, *, going_away: bool) -> None: ...

    @abstractmethod
    def _cut(self) -> None: ...


class WebSocketConnection(Connection):
    """A client on a WebSocket; finished frames go straight to the socket."""

    __slots__ = ("_code", "_hearing", "_line", "_socket")

    transport_name: ClassVar[str] = "WebSockets"

    def __init__(
        self,
        connection_id: str,
        hub: str,
        user_id: str | None,
        transport: asyncio.Transport,
        around: Surroundings,
        *,
        socket: web.WebSocketResponse,
    ) -> None:
        super().__init__(connection_id, hub, user_id, transport, around)
        self._socket = socket
        self._hearing = asyncio.timeout(None)
        self._code = 1000
        self._line = _plain_line(transport)
        notice_dead_peer(transport)

    async def listen(self) -> None:
        """Hear the client until one side has had enough, then close in good order."""
        try:
            with suppress(TimeoutError):
                async with self._hearing:
                    await self._hear_all()
            self.leave()
            # Closed here, not by whoever ends the line: only then the client's own goodbye is heard.
            await self._socket.close(code=self._code, drain=False)
        finally:
            self.leave()
            self._over.set()
            self._limit_unsent()

    async def _hear_all(self) -> None:
        async for message in self._socket:
            if message.type is WSMsgType.TEXT:
                self.receive(message.data.encode())
            elif message.type is WSMsgType.BINARY:
                self.receive(message.data)

    def _limit_unsent(self) -> None:
        if self._backlog():
            # A client that does not read would hold what is still unsent for ever.
            patience = self._options.close_timeout.total_seconds()
            asyncio.get_running_loop().call_later(patience, self._transport.abort)

    def _write(self, records: list[Record], backlog: int) -> None:
        if len(records) > 1:
            self._transport.write(b"".join([record.framed(self.protocol) for record in records]))
            return
        frame = records[0].framed(self.protocol)
        if backlog or self._line is None:
            self._transport.write(frame)
            return
        # Nothing waits before it, so what the transport would do is done here, in half the time.
        try:
            sent = os.write(self._line, frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort()
            return
        if sent < len(frame):
            self._transport.write(frame[sent:])

    def _finish(self, *, going_away: bool) -> None:
        self._code = 1001 if going_away else 1000
        self._hearing.reschedule(asyncio.get_running_loop().time())

    def _cut(self) -> None:
        self._transport.abort()


class EventStreamConnection(Connection):
    """A client on Server-Sent Events; it sends by POST."""

    __slots__ = ()

    transport_name: ClassVar[str] = _EVENT_STREAM

    def __init__(
        self,
        connection_id: str,
        hub: str,
        user_id: str | None,
        transport: asyncio.Transport,
        around: Surroundings,
    ) -> None:
        super().__init__(connection_id, hub, user_id, transport, around)
        notice_dead_peer(transport)

    def _write(self, records: list[Record], backlog: int) -> None:
        events = b"".join([b"data: " + record.encoded(HubProtocol.JSON) + b"\r\n\r\n" for record in records])
        self._transport.write(b"%x\r\n%b\r\n" % (len(events), events))

    def _finish(self, *, going_away: bool) -> None:
        self._over.set()

    def _cut(self) -> None:
        self._transport.abort()
        self._over.set()


class LongPollingConnection(Connection):
    """A client that asks again and again; what it has not fetched waits here."""

    __slots__ = ("_holder", "_last_poll", "_poll", "_unfetched", "_wake", "_was_told")

    transport_name: ClassVar[str] = "LongPolling"

    def __init__(
        self,
        connection_id: str,
        hub: str,
        user_id: str | None,
        transport: asyncio.Transport,
        around: Surroundings,
    ) -> None:
        super().__init__(connection_id, hub, user_id, transport, around)
        self._unfetched: list[bytes] = []
        self._wake = asyncio.Event()
        self._poll = 0
        self._holder: asyncio.Transport | None = None
        self._last_poll = time.monotonic()
        self._was_told = False

    @property
    def is_over(self) -> bool:
        """Say whether the client has heard its end, or is too long away to hear it."""
        return self.is_gone and (self._was_told or self._is_away(time.monotonic()))

    async def poll(self, transport: asyncio.Transport) -> tuple[int, bytes]:
        """Hold one poll until there is something to say; a newer poll takes over from an older.

        Gives the status and the body of the answer.
        """
        self._poll += 1
        mine = self._poll
        self._wake.set()
        self._wake = asyncio.Event()
        self._holder = transport
        try:
            if mine > 1 and not self._unfetched and not self.is_gone:
                with suppress(TimeoutError):
                    hold = self._options.poll_hold.total_seconds()
                    await asyncio.wait_for(self._wake.wait(), hold)
        finally:
            if mine == self._poll:
                self._holder = None
                self._last_poll = time.monotonic()
        if mine != self._poll or transport.is_closing():
            return 204, b""
        return self._fetch()

    def tend(self, now: float) -> None:
        """Let go of a client that vanished; a poll has its own life sign, so no pings."""
        if self._holder is not None and self._holder.is_closing():
            self._holder = None
            self._last_poll = now
            self._poll += 1
            self._wake.set()
        if self._is_away(now):
            log.info("connection.reaped", extra={"connection_id": self.connection_id})
            self.abort()
        elif not self.is_ready:
            self._hurry(now)

    def _fetch(self) -> tuple[int, bytes]:
        body = b"".join(self._unfetched)
        self._unfetched.clear()
        if body:
            return 200, body
        self._was_told = self.is_gone
        return (204 if self.is_gone else 200), b""

    def _is_away(self, now: float) -> bool:
        grace = self._options.poll_grace.total_seconds()
        return self._holder is None and now - self._last_poll > grace

    def _is_broken(self) -> bool:
        # Each poll may come on a line of its own.
        return False

    def _backlog(self) -> int:
        return sum(map(len, self._unfetched))

    def _write(self, records: list[Record], backlog: int) -> None:
        self._unfetched.extend(record.encoded(self.protocol) for record in records)
        self._wake.set()

    def _finish(self, *, going_away: bool) -> None:
        self._wake.set()
        self._over.set()

    def _cut(self) -> None:
        self._unfetched.clear()
        self._was_told = True
        if self._holder is not None:
            self._holder.abort()
        self._wake.set()
        self._over.set()


def _plain_line(transport: asyncio.Transport) -> int | None:
    """The descriptor to write to past the transport; None where bytes must go through it, as with TLS."""
    line = transport.get_extra_info("socket")
    if line is None or transport.get_extra_info("sslcontext") is not None or os.name == "nt":
        return None
    descriptor: int = line.fileno()
    return descriptor


def notice_dead_peer(transport: asyncio.Transport) -> None:
    """Have the system probe the line: silent clients are fine, dead ones are not."""
    line = transport.get_extra_info("socket")
    if line is None:
        return
    for name, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        option = getattr(socket, name, None)
        if option is not None:
            line.setsockopt(socket.IPPROTO_TCP, option, seconds)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
