"""`python -m infra.local.host`: serve one app until told to stop."""

import argparse
import asyncio
import atexit
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from infra.local.host.console import configure_logging
from infra.local.host.errors import StartError
from infra.local.host.listener import bind, describe
from infra.local.host.settings import fill_environment

if TYPE_CHECKING:
    from infra.local.host.host import Options

_PARENT_CHECK = 1.0


def main() -> int:
    """Run the host; the exit code is 0 when it was asked to stop."""
    arguments = _parse()
    try:
        return _run(arguments)
    except StartError as e:
        print(e, file=sys.stderr)
        if e.details and os.environ.get("TROOP_DEBUG"):
            print(e.details, file=sys.stderr)
        return 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infra.local.host", description="Serve a Functions app on this machine."
    )
    parser.add_argument("--app", type=Path, default=Path(), help="the folder with function_app.py (.)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7071, help="the port to listen on (7071); 0 takes a free one")
    parser.add_argument("--data", type=Path, default=Path(".troop"), help="the folder for locks (.troop)")
    parser.add_argument("--cloud", default="", help="the embedded cloud's URL, shown by the page")
    parser.add_argument("--no-timers", action="store_true", help="never fire a timer here")
    parser.add_argument(
        "--shared",
        action="store_true",
        help="share the port with the other instances over the same --data",
    )
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> int:
    app_dir, data_dir = arguments.app.resolve(), arguments.data.resolve()
    if not 0 <= arguments.port <= 65535:
        raise StartError(f"--port {arguments.port} is not between 0 and 65535")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StartError(f"--data {data_dir} cannot be a folder: {e.strerror}") from e
    fill_environment(app_dir, os.environ)
    configure_logging(os.environ)
    listener = bind(arguments.host, arguments.port, is_shared=arguments.shared, data_dir=data_dir)

    from infra.local.host.host import Options

    options = Options(
        app_dir=app_dir,
        data_dir=data_dir,
        cloud=arguments.cloud,
        timers=not arguments.no_timers,
    )
    is_stuck = asyncio.run(_serve(options, listener, arguments.host))
    if is_stuck:
        # A thread cannot be stopped, and the interpreter would wait for it;
        # telemetry leaves in the exit functions.
        atexit._run_exitfuncs()  # noqa: SLF001
        sys.stdout.flush()
        os._exit(0)
    return 0


async def _serve(options: "Options", listener: socket.socket, address: str) -> bool:
    from infra.local.host.host import Host

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watch = loop.create_task(_watch_parent(stop))
    host = await Host.open(options, os.environ)
    port = listener.getsockname()[1]
    try:
        await host.serve(listener)
    except OSError as e:
        raise StartError(describe(e, address, port)) from e
    name = f"[{address}]" if ":" in address else address
    print(f"host ready http://{name}:{port} {len(host.worker.functions)} functions", flush=True)
    await stop.wait()
    watch.cancel()
    await host.close()
    return host.worker.has_stuck_threads


async def _watch_parent(stop: asyncio.Event) -> None:
    given = os.environ.get("TROOP_PARENT_PID", "")
    if not given.isdecimal():
        return
    parent, first = int(given), os.getppid()
    while _is_alive(parent) and (first != parent or os.getppid() == parent):  # noqa: ASYNC110 - nothing wakes us
        await asyncio.sleep(_PARENT_CHECK)
    stop.set()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    sys.exit(main())
