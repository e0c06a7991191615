"""Route templates as ASP.NET Core reads them: `{a}`, `{a?}`, `{a:int}`, `{a=default}`, `{*rest}`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

_PARAMETER = re.compile(
    r"\{(?P<stars>\*{0,2})(?P<name>[A-Za-z_]\w*)(?P<constraint>:\w+)?(?P<default>=[^}]*)?(?P<optional>\?)?\}"
)
_CONSTRAINTS = {
    "int": r"[+-]?\d+",
    "long": r"[+-]?\d+",
    "decimal": r"[+-]?\d+(?:\.\d+)?",
    "double": r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?",
    "float": r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?",
    "bool": r"true|false",
    "alpha": r"[a-z]+",
    "guid": r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}",
}

# How specific a segment is; a smaller number is tried first.
_LITERAL, _CONSTRAINED, _PLAIN, _CATCH_ALL = 1, 2, 3, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A compiled route; `rank` orders the more specific template first."""

    text: str
    pattern: re.Pattern[str]
    rank: tuple[int, ...]
    defaults: Mapping[str, str]
    is_static: bool

    def match(self, path: str) -> dict[str, str] | None:
        """The route values of a path as it came over the wire, or None."""
        found = self.pattern.fullmatch(path)
        if found is None:
            return None
        values = {name: unquote(value) for name, value in found.groupdict().items() if value}
        return {**self.defaults, **values}


def compile_template(text: str) -> Template:
    """Compile one template.

    Raises:
        ValueError: the template cannot be read; the sentence says which part.
    """
    pattern = ""
    rank: list[int] = []
    defaults: dict[str, str] = {}
    seen: set[str] = set()
    for segment in text.strip("/").split("/"):
        if not segment:
            if text.strip("/"):
                raise ValueError(f"route {text!r} has an empty segment")
            continue
        weight, at, body = _LITERAL, 0, ""
        is_optional = False
        for part in _PARAMETER.finditer(segment):
            name = part["name"]
            if name in seen:
                raise ValueError(f"route {text!r} names the parameter {name!r} twice")
            seen.add(name)
            body += re.escape(segment[at : part.start()])
            at = part.end()
            shape, part_weight = _shape(part, text)
            body += f"(?P<{name}>{shape})"
            weight = max(weight, part_weight)
            if part["default"]:
                defaults[name] = part["default"][1:]
            is_optional = bool(part["stars"] or part["optional"] or part["default"])
        body += re.escape(segment[at:])
        if set("{}") & set(_PARAMETER.sub("", segment)):
            raise ValueError(f"route {text!r}: cannot read the segment {segment!r}")
        pattern += f"(?:/{body})?" if is_optional else f"/{body}"
        rank.append(weight)
    return Template(
        text=text,
        pattern=re.compile(pattern + "/?", re.IGNORECASE),
        rank=tuple(rank),
        defaults=defaults,
        is_static=not seen,
    )


def _shape(part: re.Match[str], text: str) -> tuple[str, int]:
    if part["stars"]:
        return ".*", _CATCH_ALL
    if not part["constraint"]:
        return "[^/]+?", _PLAIN
    constraint = part["constraint"][1:]
    if constraint not in _CONSTRAINTS:
        known = ", ".join(sorted(_CONSTRAINTS))
        raise ValueError(f"route {text!r}: the host knows no constraint {constraint!r}, only {known}")
    return _CONSTRAINTS[constraint], _CONSTRAINED


@dataclass(frozen=True, slots=True)
class Found[T]:
    """What a path leads to, with its route values."""

    target: T
    values: dict[str, str]


@dataclass(slots=True)
class _Entry[T]:
    template: Template
    methods: frozenset[str] | None
    target: T


@dataclass(slots=True)
class Router[T]:
    """Finds the target of a method and a path; a method is a constraint, so a wrong one finds nothing."""

    _static: dict[str, list[_Entry[T]]] = field(default_factory=dict)
    _dynamic: list[_Entry[T]] = field(default_factory=list)

    def add(self, text: str, methods: Iterable[str] | None, target: T) -> None:
        """Register a template; `methods` None means any.

        Raises:
            ValueError: the template cannot be read.
        """
        template = compile_template(text)
        allowed = None if methods is None else frozenset(m.upper() for m in methods)
        entry = _Entry(template, allowed, target)
        if template.is_static:
            self._static.setdefault("/" + text.strip("/").lower(), []).append(entry)
        else:
            self._dynamic.append(entry)
            self._dynamic.sort(key=lambda e: e.template.rank)

    def find(self, method: str, path: str) -> Found[T] | None:
        """The most specific target for a raw path, or None."""
        for entry in self._static.get(path.lower().rstrip("/") or "/", ()):
            if entry.methods is None or method in entry.methods:
                return Found(entry.target, {})
        for entry in self._dynamic:
            if entry.methods is not None and method not in entry.methods:
                continue
            values = entry.template.match(path)
            if values is not None:
                return Found(entry.target, values)
        return None
