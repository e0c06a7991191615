"""Which ports are free: the app's must be, the cloud takes the next one that is."""

import errno
import socket

from shared.errors import ConfigurationError

LAST = 65_535
SEARCHED = 50


def is_free(host: str, port: int) -> bool:
    """
    Whether *port* can be listened on.

    Raises:
        ConfigurationError: it is not the port that is in the way; names what is.

    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                return False
            raise ConfigurationError(
                f"cannot listen on {host}, port {port} ({e.strerror}): choose another --host or --port"
            ) from e
    return True


def check_app_port(host: str, port: int) -> None:
    """
    Make sure that the app can listen.

    Raises:
        ConfigurationError: it cannot; says what to do.

    """
    if not is_free(host, port):
        raise ConfigurationError(f"port {port} is taken: stop what listens there, or choose another with --port")


def cloud_port(app_port: int) -> int:
    """
    The first free port behind the app's.

    Raises:
        ConfigurationError: none of the next fifty is.

    """
    candidates = range(app_port + 1, min(app_port + SEARCHED, LAST) + 1)
    free = next((port for port in candidates if is_free("127.0.0.1", port)), None)
    if free is None:
        raise ConfigurationError(f"no free port for the cloud behind {app_port}: choose another --port")
    return free
