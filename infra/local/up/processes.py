"""One child process: start it, know when it is ready, end it, and start it again when it dies."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.errors import ConfigurationError
from shared.settings import ROOT

READY_WITHIN = 60.0
STOP_WITHIN = 8.0
TAIL = 15


class Child:
    """A process of this program, its output in a log file."""

    def __init__(self, name: str, arguments: Sequence[str], *, ready: str, log: Path) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.process: asyncio.subprocess.Process | None = None
        self._ready = ready
        self._log = log
        self._reader: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    async def start(self, env: Mapping[str, str]) -> None:
        """
        Start it and wait until it says that it is ready.

        Raises:
            ConfigurationError: it ended or stayed silent instead; the text is what it said.

        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self.process is None:
            self._log.write_bytes(b"")  # a log tells of this run, its restarts included
        is_ready = asyncio.Event()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self.arguments,
            cwd=ROOT,
            env={**env, "TROOP_PARENT_PID": str(os.getpid())},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on: instances end before the cloud
        )
        self._reader = asyncio.create_task(self._read(self.process, is_ready))
        ready = asyncio.create_task(is_ready.wait())
        ended = asyncio.create_task(self.process.wait())
        await asyncio.wait({ready, ended}, timeout=READY_WITHIN, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        ended.cancel()
        if is_ready.is_set():
            return
        if self.is_running:
            await self.stop()
        await self._reader
        raise ConfigurationError(self.last_words() or f"{self.name} did not get ready; see {self._log}")

    async def stop(self) -> None:
        """Ask it to end, and make it end."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_WITHIN)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def last_words(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-TAIL:])
        return ""

    async def _read(self, process: asyncio.subprocess.Process, is_ready: asyncio.Event) -> None:
        assert process.stdout is not None, "it was started with a pipe"  # noqa: S101
        with self._log.open("ab") as log:
            async for line in process.stdout:
                log.write(line)
                log.flush()
                if line.startswith(self._ready.encode()):
                    is_ready.set()
