"""Facts to text. Pure; templates are sandboxed, escape everything and refuse a name they were not given."""

import math
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from content.models import Fact, Text

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


def render_signal(fact: Fact) -> Text:
    """The post of one signal."""
    shown = _shown(fact)
    title = f"{fact.symbol}: {fact.direction} at {shown['close']}"
    summary = f"{shown['why']} Close {shown['close']}, strength {shown['strength']}."
    return Text(title=title, summary=summary, html=_template("signal.html.j2").render(fact=shown))


def render_digest(session: date, facts: Sequence[Fact]) -> Text:
    """The digest of one session, strongest first; a quiet session is said to be quiet."""
    ordered = sorted(facts, key=lambda f: (-f.strength, f.symbol, f.entry, f.occurred_at))
    count = "1 signal" if len(ordered) == 1 else f"{len(ordered)} signals"
    html = _template("digest.html.j2").render(
        session=session.isoformat(), count=count, facts=[_shown(fact) for fact in ordered]
    )
    if not ordered:
        return Text(title=f"{session}: a quiet session", summary="No entry raised a signal.", html=html)
    named = ", ".join(f"{f.symbol} {f.direction}" for f in ordered[:6])
    more = f" and {len(ordered) - 6} more" if len(ordered) > 6 else ""
    return Text(title=f"{session}: {count}", summary=f"{named}{more}.", html=html)


def _shown(fact: Fact) -> dict[str, Any]:
    """A fact as text: the one place where its numbers are formatted."""
    intraday = fact.interval != "1d"
    return {
        "symbol": fact.symbol,
        "direction": fact.direction,
        "close": _number(fact.reference_price),
        "strength": f"{fact.strength:.0%}",
        "interval": fact.interval,
        "closed": f"{fact.occurred_at:%Y-%m-%d %H:%M} UTC" if intraday else fact.session.isoformat(),
        "features": [(name.replace("_", " "), _number(value)) for name, value in sorted(fact.features.items())],
        "entry": fact.entry,
        "strategy": fact.strategy,
        "provider": fact.provider,
        "why": f"The entry {fact.entry} points {fact.direction} on {fact.symbol}.",
    }


def _number(value: float) -> str:
    """A number for people: two digits from one up, four below."""
    return f"{value:,.2f}" if math.fabs(value) >= 1 else f"{value:.4f}"


@cache
def _template(name: str) -> "Template":
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    loader = FileSystemLoader(TEMPLATES)
    environment = SandboxedEnvironment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(name)
