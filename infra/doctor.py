"""`troop doctor`: looks at everything `troop up` needs and says what to do."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

from infra.local.up import settings as local
from infra.local.up.ports import check_app_port, cloud_port
from shared.errors import ConfigurationError
from shared.settings import ROOT, Settings

NODE = 20
OPTIONAL = {"twelve_data": "Twelve Data", "polygon": "Polygon"}
"""The providers that are left out without a key, and how people call them."""


def examine(*, port: int, data: Path, live: bool) -> int:
    """Print one line a check; the exit code is 1 if anything must be done."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Python", _python),
        ("packages", _packages),
        ("Node.js", _node),
        ("port", lambda: _port(port)),
        ("cloud's port", lambda: f"{cloud_port(port)} is free"),
        ("data folder", lambda: _data(data)),
        ("settings", lambda: _settings(port, live=live)),
        *((title, partial(_optional, name, port, live=live)) for name, title in OPTIONAL.items()),
    ]
    troubles = 0
    for name, check in checks:
        try:
            print(f"  ok      {name}: {check()}")
        except ConfigurationError as e:
            troubles += 1
            print(f"  TO DO   {name}: {e}")
    print("everything is ready: make run" if not troubles else f"{troubles} to do")
    return 1 if troubles else 0


def _python() -> str:
    if sys.version_info[:2] != (3, 13):
        raise ConfigurationError(f"this is {sys.version.split()[0]}; install Python 3.13 and run make setup")
    return sys.version.split()[0]


def _packages() -> str:
    """Every locked package that applies here is installed in its locked version."""
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for line in (ROOT / "requirements-dev.txt").read_text().splitlines():
        if not line or line.startswith((" ", "#")):
            continue
        wanted = Requirement(line.removesuffix("\\").strip())
        if wanted.marker and not wanted.marker.evaluate():
            continue
        count += 1
        try:
            if metadata.version(wanted.name) not in wanted.specifier:
                wrong.append(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(wanted.name)
    if wrong:
        raise ConfigurationError(f"{', '.join(wrong[:5])} not as locked: run make clean, then make setup")
    return f"{count} as locked"


def _node() -> str:
    node = shutil.which("node")
    if node is None:
        raise ConfigurationError(f"not found: install Node.js {NODE} or newer (make test needs it, make run does not)")
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    major = re.match(r"v(\d+)\.", said)
    if major is None:
        raise ConfigurationError(f"{node} does not say its version: install Node.js {NODE} or newer")
    if int(major[1]) < NODE:
        raise ConfigurationError(f"{said} is too old: install {NODE} or newer")
    return said


def _port(port: int) -> str:
    check_app_port("127.0.0.1", port)
    return f"{port} is free"


def _data(path: Path) -> str:
    from infra.local.cloud import open_state

    if not path.exists():
        return f"{path} will be made"
    if (path / "cloud.db").exists():
        open_state(path / "cloud.db").close()
    app = path / "app.db"
    if app.exists():
        import asyncio

        from shared.adapters.sqlite import SQLiteDocuments
        from shared.clock import SystemClock

        async def look() -> None:
            documents = SQLiteDocuments(app, SystemClock())
            await documents.feed("system", limit=1)
            await documents.close()

        asyncio.run(look())
    return str(path)


def _settings(port: int, *, live: bool) -> str:
    Settings.from_env(_values(port, live=live))
    return "complete" if live else "complete (the embedded defaults need no key)"


def _optional(provider: str, port: int, *, live: bool) -> str:
    """A provider without a key is left out; with one, everything that belongs to it must be right."""
    from shared.http_client import key_of

    values = _values(port, live=live)
    name = provider.upper()
    key = values.get(f"{name}_KEY", "").strip()
    if not key:
        return f"left out; {name}_KEY would bring it in"
    key_of(f"{name}_KEY", key)
    fields = Settings.model_fields
    url = values.get(f"{name}_URL", "").strip() or str(fields[f"{provider}_url"].default)
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
        raise ConfigurationError(f"{name}_URL is no address: write one such as {fields[f'{provider}_url'].default}")
    order = values.get("MARKET_PROVIDERS", "").strip() or str(fields["market_providers"].default)
    if provider not in [one.strip() for one in order.split(",")]:
        return f"left out by MARKET_PROVIDERS ({order})"
    return f"key set, plan {values.get(f'{name}_PLAN', '').strip() or fields[f'{provider}_plan'].default}"


def _values(port: int, *, live: bool) -> dict[str, str]:
    place = local.Place(
        app_url=f"http://127.0.0.1:{port}", cloud_url=f"http://127.0.0.1:{port + 1}", data=ROOT / ".troop"
    )
    defaults = local.embedded(place, time=None, live_from="", plan="premium", live=live)
    return local.merged(defaults, os.environ)
