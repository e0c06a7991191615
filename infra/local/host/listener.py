"""The host's socket: taken before the app is indexed, so a taken port is told at once."""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from infra.local.host.errors import StartError


def bind(host: str, port: int, *, is_shared: bool, data_dir: Path) -> socket.socket:
    """A bound socket that does not listen yet.

    A shared one lets the instances over one data folder answer on the same port; anybody else's
    program on that port is still refused.

    Raises:
        StartError: the port cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        raise StartError(f"--host {host} is no address of this machine: {e.strerror}") from e
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            if port:
                _join_instances(family, address, data_dir / f"port-{port}.lock")
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as e:
        listener.close()
        raise StartError(describe(e, host, port)) from e
    except StartError:
        listener.close()
        raise
    return listener


def describe(error: OSError, host: str, port: int) -> str:
    """One sentence on why a port cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken by another program: stop it, or choose another port with --port"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"cannot listen on {host} port {port} ({reason}): change it with --host or --port"


def _join_instances(family: int, address: tuple[object, ...], lock_path: Path) -> None:
    # Every instance holds the file's lock, shared, for as long as it lives. With SO_REUSEPORT
    # a stranger's socket would not stop ours: so if the port is in use and nobody holds
    # the lock, the user is a stranger.
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_in_use(family, address):
            os.close(lock)
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    fcntl.flock(lock, fcntl.LOCK_SH)


def _is_in_use(family: int, address: tuple[object, ...]) -> bool:
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as e:
            return e.errno == errno.EADDRINUSE
    return False
