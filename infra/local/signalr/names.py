"""Which names the service takes for hubs, groups, users and connections."""

import re

from infra.local.signalr.refusal import RefusalError

_HUB = re.compile(r"[A-Za-z][A-Za-z0-9_`,.\[\]]{0,127}")
_LONGEST = 1024


def hub_name(given: str) -> str:
    """Lower-case a hub's name.

    Raises:
        RefusalError: 400, when the name is not one Azure would take.
    """
    if not _HUB.fullmatch(given):
        raise RefusalError(
            400,
            f"hub name {given!r} is not valid: start with a letter, then letters, digits "
            "and _ ` , . [ ] only, at most 128 characters",
        )
    return given.lower()


def part_name(kind: str, given: str) -> str:
    """Take the name of a group, user or connection as it is.

    Raises:
        RefusalError: 400, when the name is blank or too long.
    """
    if not given.strip():
        raise RefusalError(400, f"{kind} name is blank: give at least one visible character")
    if len(given) > _LONGEST:
        raise RefusalError(400, f"{kind} name has {len(given)} characters: at most {_LONGEST} are taken")
    return given
