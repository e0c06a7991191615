"""
Many receivers of one message, as a process of their own: ``python -m bench._fanout_clients``.

It reads one JSON command a line and answers each with a line: ``hub`` and ``plain`` open sockets, ``hear`` waits until
every socket has received one message, ``quiet`` tells what came uncalled-for. A message is a WebSocket frame on either
kind of socket, so that both are received by the same lines; pings of the hub protocol are passed over.
"""

import base64
import gc
import json
import os
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench._fanout_bare import WELCOME

PINGS = (b'{"type":6}\x1e', b"\x02\x91\x06")
PATIENCE = 10.0
LOOK_EVERY = 0.0005
"""Seconds between two looks, so that the sender does not pay for waking its one reader with every message: clients
elsewhere in the world would not cost it that either."""
_SIZE = 16 * 1024


class Receivers:
    """Sockets that wait for messages, all in one epoll."""

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self._rest: dict[int, bytes] = {}
        self._poll = select.epoll()

    def hub(self, *, host: str, port: int, path: str, protocol: str, tokens: list[str]) -> dict[str, Any]:
        """Open a WebSocket a token and shake hands in the hub protocol."""
        for token in tokens:
            self._add(_hub_socket(host, port, path, protocol, token))
        return {"open": len(self._sockets)}

    def plain(self, *, host: str, port: int, count: int) -> dict[str, Any]:
        """Open bare sockets."""
        for _ in range(count):
            opened = socket.create_connection((host, port), PATIENCE)
            _read(opened, lambda said: said == WELCOME)
            self._add(opened)
        return {"open": len(self._sockets)}

    def hear(self) -> dict[str, Any]:
        """Wait for one message a socket: when the last came, and how often each message did."""
        _answer({"ready": True})
        heard: dict[int, bytes] = {}
        more: Counter[bytes] = Counter()
        last = 0.0
        wanted, expected = len(self._sockets), b""
        sockets, poll = self._sockets, self._poll.poll
        while len(heard) < wanted:
            ready = poll(PATIENCE, wanted)
            if not ready:
                break
            for fd, _ in ready:
                data = sockets[fd].recv(_SIZE)
                if data == expected and fd not in heard:
                    heard[fd] = data
                    continue
                for frame in self._frames(fd, data):
                    if fd in heard:
                        more[frame] += 1
                    heard[fd] = expected = frame
            last = time.monotonic()
            if len(heard) < wanted:
                time.sleep(LOOK_EVERY)
        return {"last": last, "heard": _shown(Counter(heard.values()) + more)}

    def quiet(self, *, seconds: float) -> dict[str, Any]:
        """Tell what comes for a while."""
        heard: Counter[bytes] = Counter()
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left):
                heard.update(self._frames(fd, self._sockets[fd].recv(_SIZE)))
        return {"heard": _shown(heard)}

    def _add(self, opened: socket.socket) -> None:
        opened.settimeout(0)
        self._sockets[opened.fileno()] = opened
        self._poll.register(opened, select.EPOLLIN)

    def _frames(self, fd: int, data: bytes) -> Iterator[bytes]:
        """Whole frames but pings; what is not whole yet is kept."""
        if not data:
            raise SystemExit("the server closed a socket")
        data = self._rest.pop(fd, b"") + data
        while data:
            begin, end = _payload(data)
            if end > len(data):
                self._rest[fd] = data
                return
            frame, data = data[:end], data[end:]
            if frame[begin:] not in PINGS:
                yield frame


def _payload(data: bytes) -> tuple[int, int]:
    """Where the payload of an unmasked frame begins and ends; past the end of *data* when that is not all."""
    if len(data) < 2:
        return 2, 2
    length, begin = data[1], 2
    if length >= 126:
        begin, form = (4, "!H") if length == 126 else (10, "!Q")
        if len(data) < begin:
            return begin, begin
        (length,) = struct.unpack(form, data[2:begin])
    return begin, begin + length


def payload_of(frame: bytes) -> bytes:
    """What a frame carries."""
    begin, end = _payload(frame)
    return frame[begin:end]


def _hub_socket(host: str, port: int, path: str, protocol: str, token: str) -> socket.socket:
    opened = socket.create_connection((host, port), PATIENCE)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}:{port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
        f"Authorization: Bearer {token}",
    ]
    opened.sendall("\r\n".join([*lines, "", ""]).encode())
    said = _read(opened, lambda said: said.endswith(b"\r\n\r\n"))
    if not said.startswith(b"HTTP/1.1 101 "):
        raise SystemExit(f"the service did not take a client: {said.decode(errors='replace')}")
    hello = json.dumps({"protocol": protocol, "version": 1}).encode() + b"\x1e"
    # Masked with zeros: a client must mask, and zeros leave the text as it is.
    opened.sendall(bytes([0x81, 0x80 | len(hello)]) + bytes(4) + hello)
    said = _read(opened, lambda said: len(said) > 2 and len(said) == _payload(said)[1])
    if payload_of(said) != b"{}\x1e":
        raise SystemExit(f"the service refused the handshake: {said!r}")
    return opened


def _read(opened: socket.socket, is_whole: Callable[[bytes], bool]) -> bytes:
    said = b""
    while not is_whole(said):
        data = opened.recv(_SIZE)
        if not data:
            raise SystemExit(f"the service left during the handshake: {said!r}")
        said += data
    return said


def _shown(heard: Mapping[bytes, int]) -> list[tuple[str, int]]:
    return [(base64.b64encode(frame).decode(), times) for frame, times in heard.items()]


def _answer(value: Mapping[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    """Do as told until there is nobody to tell it."""
    receivers = Receivers()
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "hub": receivers.hub,
        "plain": receivers.plain,
        "hear": receivers.hear,
        "quiet": receivers.quiet,
    }
    gc.disable()  # thousands of sockets are no garbage, and a pause would count as delivery
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        _answer(commands[command.pop("do")](**command))


if __name__ == "__main__":
    main()
