"""`troop fetch`, `troop providers` and `troop coverage`: history asked for and shown, over HTTP."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx

LOOK_EVERY = 0.5
LINE, STRIP = 30, 64
SHOWN = 10
OVER = ("done", "failed", "cancelled")
MARKS = {"held": "█", "missing": "░", "absent": "·", "mixed": "▒"}

type Json = Mapping[str, Any]

Symbol = Annotated[str, typer.Argument(help="Such as AAPL.")]
Interval = Annotated[str, typer.Option(help="The length of a bar: 1d, 1h or 1m.")]
Url = Annotated[str, typer.Option("--url", help="Where TROOP answers, on this machine or in Azure.")]
Key = Annotated[str, typer.Option(envvar="TROOP_FUNCTION_KEY", help="The function key.", show_default=False)]
From = Annotated[str | None, typer.Option("--from", help="The first day or instant.")]
To = Annotated[str | None, typer.Option("--to", help="The last day or instant.")]

HERE = "http://127.0.0.1:7071"
LOCAL_KEY = "local-function-key"


class RefusedByServerError(Exception):
    """TROOP said no; the text is its own."""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (fetch, providers, coverage):
        app.command()(command)


def fetch(
    symbol: Symbol,
    first: Annotated[str, typer.Option("--from", help="The first day or instant.")],
    last: Annotated[str, typer.Option("--to", help="The last day or instant.")],
    interval: Interval = "1d",
    priority: Annotated[str, typer.Option(help="asked, or backfill: when nothing else wants the calls.")] = "asked",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Stay until it is there.")] = True,  # noqa: FBT002
    url: Url = HERE,
    key: Key = LOCAL_KEY,
) -> None:
    """Have the bars of a symbol fetched that are not stored yet."""
    body = {"symbol": symbol, "interval": interval, "from": first, "to": last, "priority": priority}
    _run("fetch", url, lambda client: request(client, body, key=key, wait=wait))


def providers(url: Url = HERE) -> None:
    """Show how the providers do, and what is left of their quotas."""
    _run("providers", url, show_providers)


def coverage(symbol: Symbol, interval: Interval = "1d", first: From = None, last: To = None, url: Url = HERE) -> None:
    """Show which bars of a symbol are held, missing and absent."""
    params = {"interval": interval, "from": first, "to": last}
    _run("coverage", url, lambda client: show_coverage(client, symbol, {k: v for k, v in params.items() if v}))


def _run(name: str, url: str, work: "Callable[[httpx.AsyncClient], Awaitable[int]]") -> None:
    raise typer.Exit(asyncio.run(_answered(name, url.rstrip("/"), work)))


async def _answered(name: str, url: str, work: "Callable[[httpx.AsyncClient], Awaitable[int]]") -> int:
    import httpx

    try:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=15) as client:
            return await work(client)
    except RefusedByServerError as e:
        print(f"troop {name}: {e}", file=sys.stderr)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as e:
        print(
            f"troop {name}: {url} does not answer as TROOP does ({type(e).__name__}): start it with make run, "
            "or name another with --url",
            file=sys.stderr,
        )
    except asyncio.CancelledError:
        print(f"troop {name}: stopped looking; what was queued goes on by itself", file=sys.stderr)
    return 1


async def _ask(client: "httpx.AsyncClient", method: str, path: str, **how: Any) -> Json:  # noqa: ANN401 - httpx's own
    answer = await client.request(method, path, **how)
    if answer.status_code == HTTPStatus.UNAUTHORIZED:
        raise RefusedByServerError("the function key is wrong: give it with --key or as TROOP_FUNCTION_KEY")
    found = answer.json()
    if answer.is_error:
        after = answer.headers.get("Retry-After")
        raise RefusedByServerError(found["detail"] + (f" (again in {_span(float(after))})" if after else ""))
    if not isinstance(found, dict):
        raise TypeError(type(found).__name__)
    return found


# --- troop fetch


async def request(client: "httpx.AsyncClient", body: Json, *, key: str, wait: bool) -> int:
    """Queue a fetch and, if wanted, watch it to its end; 1 when it ended without what was asked for."""
    item = await _ask(client, "POST", "/api/fetches", json=dict(body), headers={"x-functions-key": key})
    if not wait:
        print(f"{item['state']}: {item['fetch_id']}")
        return 0
    screen = Progress(is_terminal=sys.stderr.isatty())
    while True:
        screen.show(item)
        if item["state"] in OVER:
            break
        await asyncio.sleep(LOOK_EVERY)
        item = await _ask(client, "GET", f"/api/fetches/{item['fetch_id']}")
    screen.end()
    if item["state"] != "done":
        print(f"troop fetch: {item['state']}: {item['reason'] or 'somebody stopped it'}", file=sys.stderr)
        return 1
    print(f"{item['symbol']} {item['interval']}: {item['bars']} bars held, {_many(item['calls'], 'call')}")
    return 0


class Progress:
    """One line that changes on a terminal; elsewhere a line for every change."""

    def __init__(self, *, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._shown = ""

    def show(self, item: Json) -> None:
        whole = item["bars"] + item["left_bars"]
        done = item["bars"] / whole if whole else 0.0
        text = f"{item['state']}  {item['bars']}/{whole} bars  {_many(item['calls'], 'call')}"
        if item["state"] == "waiting":
            text += f"  until {_short(item['retry_at'])}: {item['reason']}"
        if text == self._shown:
            return
        if self._is_terminal:
            print(f"\r\x1b[K{_gauge(done)} {text}"[:200], end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        self._shown = text

    def end(self) -> None:
        """Leave the line."""
        if self._is_terminal:
            print(file=sys.stderr, flush=True)


# --- troop providers


async def show_providers(client: "httpx.AsyncClient") -> int:
    """Print a line a provider, one for each window of its quota, and how well prefetching does; times are UTC."""
    found = await _ask(client, "GET", "/api/providers")
    for item in found["items"]:
        print(provider_lines(item))
    print(prefetch_line(found["prefetch"]))
    return 0


def prefetch_line(report: Json) -> str:
    """Prefetching as people read it: while it is off, what it would have fetched is judged all the same."""
    state = ("on" if report["is_on"] else "off") + (
        f" since {_short(report['switched_at'])}" if report["switched_at"] else ""
    )
    return (
        f"{'prefetch':<14} {state}  {_share(report['hit_rate'])} of requests found it  "
        f"{_share(report['waste'])} wasted ({report['used']} used, {report['wasted']} not)"
    )


def provider_lines(item: Json) -> str:
    """A provider as people read it."""
    facts = [
        f"{_share(item['success_rate'])} answered",
        f"{item['latency_seconds']:.2f} s" if item["latency_seconds"] is not None else "no call yet",
        _many(item["calls"], "call"),
        f"{_share(item['hit_rate'])} without one",
    ]
    lines = [f"{item['provider']:<14} {item['plan']:<10} {_state(item):<32} {'  '.join(facts)}"]
    lines += [
        f"  {_gauge(w['left'] / w['amount'])} {w['left']:>6} of {w['amount']} left per {_span(w['span_seconds'])}"
        + (f", next at {_short(w['resets_at'])}" if w["resets_at"] else "")
        for w in item["windows"]
    ]
    if not item["windows"]:
        lines.append("  no limit")
    if item["refusals"] or item["probes"]:
        lines.append(
            f"  refused by surprise: {item['refusals']}, probes: {item['probes']} ({item['failed_probes']} in vain)"
        )
    lines += [
        f"  not on this plan: {' '.join(filter(None, (r['endpoint'], r['parameter'])))} (since {r['recorded_at'][:10]})"
        for r in item["not_entitled"]
    ]
    if item["last_error"]:
        lines.append(f"  last trouble, {_short(item['last_error_at'])}: {item['last_error']}")
    return "\n".join(lines)


def _state(item: Json) -> str:
    if item["breaker"] != "closed":
        return f"left alone until {_short(item['retry_at'])}" if item["retry_at"] else f"breaker {item['breaker']}"
    return f"cools down until {_short(item['cool_down_until'])}" if item["cool_down_until"] else "in use"


# --- troop coverage


async def show_coverage(client: "httpx.AsyncClient", symbol: str, params: Mapping[str, str]) -> int:
    """Print a series as a strip of characters, and what is missing of it."""
    from urllib.parse import quote

    print(coverage_lines(await _ask(client, "GET", f"/api/coverage/{quote(symbol, safe='')}", params=dict(params))))
    return 0


def coverage_lines(item: Json) -> str:
    """A series' coverage as people read it."""
    counts = item["counts"]
    whence = (
        f"{item['provider']}, {item['adjustment']}, revision {item['revision']}" if item["provider"] else "nobody yet"
    )
    lines = [f"{item['symbol']} {item['interval']}  {item['bar_count']} bars from {whence}"]
    if ranges := sorted(({**r, "kind": kind} for kind in counts for r in item[kind]), key=lambda r: str(r["first"])):
        lines.append(f"{_short(ranges[0]['first'])}  {strip(ranges)}  {_short(ranges[-1]['last'])}")
    lines.append(
        "  ".join(f"{MARKS[kind]} {kind} {count}" for kind, count in counts.items())
        + f"  {MARKS['mixed']} some of each"
    )
    lines += [
        f"missing {_short(r['first'])} to {_short(r['last'])}: {_many(r['count'], 'bar')}"
        for r in item["missing"][-SHOWN:]
    ]
    if len(item["missing"]) > SHOWN:
        lines.append(f"... and {len(item['missing']) - SHOWN} ranges before them")
    lines += [f"split {a['split']:g} for 1 from the bar that closed {_short(a['closed_at'])}" for a in item["actions"]]
    if item["is_stale"]:
        lines.append("stale: the newest bar that could be here is not")
    return "\n".join(lines)


def strip(ranges: Sequence[Json], width: int = STRIP) -> str:
    """As many characters as fit, each for as many bars: what is known of them."""
    whole = sum(r["count"] for r in ranges)
    width = min(width, whole)
    cells: list[set[str]] = [set() for _ in range(width)]
    at = 0
    for r in ranges:
        for cell in range(at * width // whole, (at + r["count"] - 1) * width // whole + 1):
            cells[cell].add(r["kind"])
        at += r["count"]
    return "".join(MARKS[next(iter(kinds))] if len(kinds) == 1 else MARKS["mixed"] for kinds in cells)


# --- words


def _gauge(share: float) -> str:
    full = round(max(0.0, min(share, 1.0)) * LINE)
    return "[" + "#" * full + "-" * (LINE - full) + "]"


def _short(instant: str | None) -> str:
    return f"{instant[:10]} {instant[11:16]}" if instant else "?"


def _share(share: float | None) -> str:
    return f"{share:.0%}" if share is not None else "-"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _span(seconds: float) -> str:
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            many = seconds / size
            return (
                unit
                if many == 1
                else f"{many:g} {unit}s"
                if many == int(many)
                else str(timedelta(seconds=round(seconds)))
            )
    return "second" if seconds == 1 else f"{seconds:g} seconds"
