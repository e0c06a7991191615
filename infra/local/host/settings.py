"""What the host reads before it starts: local.settings.json, host.json, keys and allowed origins."""

import json
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from hmac import compare_digest
from pathlib import Path
from typing import Any, Self

from infra.local.host.errors import StartError

_SETTING = re.compile(r"%([^%\s]+)%")
_TIME_SPAN = re.compile(r"(?:(\d+)\.)?(\d{1,2}):(\d{2}):(\d{2}(?:\.\d+)?)")
_LOCAL_ORIGIN = re.compile(r"https?://(?:localhost|127\.0\.0\.1)(?::\d+)?")


def fill_environment(app_dir: Path, env: MutableMapping[str, str]) -> None:
    """Add the app's local.settings.json to the environment; what is set there already stays.

    Raises:
        StartError: the file cannot be used.
    """
    settings = _read_json(app_dir / "local.settings.json")
    if settings.get("IsEncrypted"):
        raise StartError("local.settings.json is encrypted: run `func settings decrypt` or write plain values")
    values = settings.get("Values", {})
    if not isinstance(values, dict):
        raise StartError('local.settings.json: "Values" must be an object of strings')
    for name, value in values.items():
        if isinstance(value, dict | list) or value is None:
            raise StartError(f"local.settings.json: the value of {name} must be a string")
        env.setdefault(name, value if isinstance(value, str) else json.dumps(value))


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace each `%SETTING%` by its value.

    Raises:
        StartError: a setting is missing.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name not in env:
            raise StartError(f"the setting {name} is not set: put it into the environment or local.settings.json")
        return env[name]

    return _SETTING.sub(value, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFile:
    """The parts of host.json that matter on a laptop."""

    route_prefix: str = "api"
    function_timeout: timedelta | None = timedelta(minutes=5)

    @classmethod
    def read(cls, app_dir: Path) -> Self:
        """Read host.json; without one the defaults hold.

        Raises:
            StartError: the file cannot be used.
        """
        content = _read_json(app_dir / "host.json")
        http = content.get("extensions", {}).get("http", {})
        prefix = http.get("routePrefix", "api")
        return cls(
            route_prefix=str(prefix).strip("/"),
            function_timeout=_time_span(content.get("functionTimeout", "00:05:00")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The function, master and system key; a laptop's defaults are no secret."""

    function: str
    master: str
    system: str

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """TROOP_FUNCTION_KEY, TROOP_MASTER_KEY and TROOP_SYSTEM_KEY, or the defaults."""
        return cls(
            function=env.get("TROOP_FUNCTION_KEY") or "local-function-key",
            master=env.get("TROOP_MASTER_KEY") or "local-master-key",
            system=env.get("TROOP_SYSTEM_KEY") or "local-system-key",
        )

    def opens(self, level: str, offered: str) -> bool:
        """Whether the key opens a door of this level: ANONYMOUS, FUNCTION, SYSTEM or ADMIN."""
        match level:
            case "ANONYMOUS":
                return True
            case "FUNCTION":
                accepted = {self.function, self.master}
            case "SYSTEM":
                accepted = {self.system, self.master}
            case _:
                accepted = {self.master}
        key = offered.encode()
        # A sum, not any(): every key is compared, so time tells nothing.
        return sum(compare_digest(key, known.encode()) for known in accepted) > 0


@dataclass(frozen=True, slots=True)
class Origins:
    """The web origins that may call with credentials: any local one, and those of CORS_ORIGINS."""

    named: frozenset[str] = frozenset()

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read CORS_ORIGINS, separated by commas."""
        listed = env.get("CORS_ORIGINS", "").split(",")
        return cls(frozenset(o.strip().rstrip("/") for o in listed if o.strip()))

    def allow(self, origin: str) -> bool:
        """Whether a page of this origin may read the answer."""
        return origin in self.named or _LOCAL_ORIGIN.fullmatch(origin) is not None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise StartError(f"{path.name} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise StartError(f"{path.name} must hold one JSON object")
    return content


def _time_span(text: object) -> timedelta | None:
    if text in ("-1", -1):
        return None
    found = _TIME_SPAN.fullmatch(str(text))
    if found is None:
        raise StartError(f"host.json: functionTimeout {text!r} must look like 00:05:00 or be -1")
    days, hours, minutes, seconds = found.groups()
    return timedelta(days=int(days or 0), hours=int(hours), minutes=int(minutes), seconds=float(seconds))
