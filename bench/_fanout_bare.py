"""
The least that can stand in for the service, as a process of its own: ``python -m bench._fanout_bare``.

It writes two ports. On the first it takes the data plane's calls: ``PUT /frame`` says which bytes to send, and a POST
that ends in ``:send`` is answered 202 and sends them, with one ``send`` a socket, to half of those who connected on
the second port: every other one for the first group, the rest for the second. A receiver gets one byte when it is in.
"""

import gc
import selectors
import socket

WELCOME = b"!"
GROUPS = (b"symbols%2FAAPL", b"symbols%2Fall")
"""As they stand in a URL; receivers take turns between them."""

_TAKEN = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
_SIZE = 64 * 1024


class Loop:
    """Sockets, and a loop that sends to them."""

    def __init__(self) -> None:
        self._halves: tuple[list[socket.socket], list[socket.socket]] = ([], [])
        self._frame = b""

    def let_in(self, receiver: socket.socket) -> None:
        """Take a receiver."""
        receiver.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        receiver.settimeout(0)
        receiver.send(WELCOME)
        first, second = self._halves
        (first if len(first) == len(second) else second).append(receiver)

    def answer(self, caller: socket.socket) -> bool:
        """Answer one request; False when the caller has left."""
        said = caller.recv(_SIZE)
        while said and b"\r\n\r\n" not in said:
            said += caller.recv(_SIZE)
        if not said:
            return False
        head, _, body = said.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(maxsplit=1)[0])
        while len(body) < length:
            body += caller.recv(_SIZE)
        caller.sendall(_TAKEN)
        if head.startswith(b"PUT "):
            self._frame = body
            return True
        for group, half in zip(GROUPS, self._halves, strict=True):
            if group in head:
                for one in half:
                    one.send(self._frame)
        return True


def main() -> None:
    """Serve until told to end."""
    doors = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(2)]
    calls, receivers = doors
    print(*(door.getsockname()[1] for door in doors), flush=True)
    loop = Loop()
    gc.disable()
    with selectors.DefaultSelector() as ready:
        for door in doors:
            ready.register(door, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                found = key.fileobj
                assert isinstance(found, socket.socket)
                if found is receivers:
                    loop.let_in(found.accept()[0])
                elif found is calls:
                    ready.register(found.accept()[0], selectors.EVENT_READ)
                elif not loop.answer(found):
                    ready.unregister(found)
                    found.close()


if __name__ == "__main__":
    main()
