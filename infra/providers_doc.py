"""
Writes docs/providers.md from the registry.

    python -m infra.providers_doc            write the page anew
    python -m infra.providers_doc --check    exit 1 and say so if the page would change
"""

import argparse
import sys
from collections.abc import Iterable
from datetime import timedelta

from shared.market.pacing import DAY_SHARES
from shared.market.registry import UNITS, Endpoint, ProviderFacts, Window, providers
from shared.settings import ROOT

PAGE = ROOT / "docs" / "providers.md"
_KINDS = {
    "rolling": "over the last {span}",
    "aligned": "from fixed instants, {zone}",
    "unknown": "not documented: counted over the last {span}",
}


def page() -> str:
    """The whole page."""
    backfill, prefetch = (f"{100 * share:.0f} %" for share in DAY_SHARES.values())
    head = f"""\
# Providers

Generated from [shared/market/registry.toml](../shared/market/registry.toml) by `python -m infra.providers_doc`: edit
the file, not this page. It is what we believe before the first call. What a key may really call is learned from
refusals and remembered for that key, and rate headers replace the amounts below; `GET /api/providers` says how things
stand.

A window holds at most its amount of calls, each counted as often as it weighs; all windows of a plan hold at once, for
all instances together. The plan `unlimited`, which only the replay sells, has none. Of a window of a day backfill may
spend {backfill} and prefetch {prefetch}: the rest is kept for better calls.
"""
    return "\n".join([head, *(_section(facts) for facts in providers().values())])


def _section(facts: ProviderFacts) -> str:
    windows = [_window(plan, window) for plan, windows in facts.windows.items() for window in windows]
    lines = [
        f"## {facts.title}: `{facts.name}`",
        "",
        f"- documentation: <{facts.home}>",
        f"- the key travels in the {_place(facts)}",
        f"- stamps: {facts.stamps}",
        f"- adjustment: {facts.adjustment}",
        f"- quota: {facts.quota_notes}",
        "",
        *_table(("plan", "at most", "in", "begins", "counts"), windows),
        "",
        *_table(
            ("endpoint", "for", "weight", "plans", "notes"),
            (_endpoint(name, endpoint) for name, endpoint in facts.endpoints.items()),
        ),
        "",
        "Read: " + "; ".join(f"{source.what} ({source.read_on})" for source in facts.sources) + ".",
        "",
    ]
    return "\n".join(lines)


def _place(facts: ProviderFacts) -> str:
    return f"header `{facts.key_name}`" if facts.key_in == "header" else f"query parameter `{facts.key_name}`"


def _window(plan: str, window: Window) -> tuple[str, ...]:
    span = _span(window.span)
    begins = _KINDS[window.kind.value].format(span=span, zone=window.zone)
    return f"`{plan}`", f"{window.amount:,}", span, begins, "weights" if window.is_weighted else "calls"


def _endpoint(name: str, endpoint: Endpoint) -> tuple[str, ...]:
    plans = ", ".join(f"`{plan}`" for plan in endpoint.plans)
    return f"`{name}`", ", ".join(endpoint.use_cases), str(endpoint.weight), plans, endpoint.notes


def _span(span: timedelta) -> str:
    unit = max((u for u in UNITS if span % UNITS[u] == timedelta()), key=lambda u: UNITS[u], default="s")
    return f"{span / UNITS[unit]:g} {unit}"


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(names)
    lines = [heads, ["---"] * len(heads), *(list(row) for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with ``--check`` compare it."""
    parser = argparse.ArgumentParser(description="Write docs/providers.md from the registry.")
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(arguments)
    said = page()
    if not args.check:
        PAGE.write_text(said, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != said:
        print("docs/providers.md is out of date: run python -m infra.providers_doc", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
