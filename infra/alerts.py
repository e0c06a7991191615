"""`troop alerts`: what came, why it came or did not, and what was tried, over HTTP."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

import typer

from shared.errors import RefusedError, TroopError, UnavailableError

app = typer.Typer(no_args_is_help=True, help="Alerts: list them, explain one, see its attempts, acknowledge it.")

DEFAULT_URL = "http://127.0.0.1:7071"
Url = Annotated[str, typer.Option("--url", help="Where TROOP answers, on this machine or in Azure.")]
Token = Annotated[
    str,
    typer.Option(
        "--token",
        envvar="TROOP_TOKEN",
        help="Your access token; better in TROOP_TOKEN. Without one: the public alerts.",
        show_envvar=True,
    ),
]
Other = Annotated[str | None, typer.Option("--subscriber", help="Operators: whose, if not your own.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="As `troop alerts list` shows it.")]


@app.command("list")
def list_(
    url: Url = DEFAULT_URL,
    token: Token = "",
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many.")] = 20,
) -> None:
    """Show your alerts, newest first; the public ones without a token."""
    with _said():
        found = call(url, token, "GET", "alerts", limit=str(limit))["items"]
        for item in found:
            print(line_of(item))
        if not found:
            print("no alerts yet", file=sys.stderr)


@app.command()
def explain(id_: Id, url: Url = DEFAULT_URL, token: Token = "", subscriber: Other = None) -> None:
    """Show why an alert came, or did not: every decision with its reason."""
    with _said():
        print(
            "\n".join(tree_of(call(url, token, "GET", f"alerts/{quote(id_, safe='')}/explain", subscriber=subscriber)))
        )


@app.command()
def deliveries(id_: Id, url: Url = DEFAULT_URL, token: Token = "", subscriber: Other = None) -> None:
    """Show every attempt of an alert's deliveries."""
    with _said():
        found = call(url, token, "GET", f"alerts/{quote(id_, safe='')}/deliveries", subscriber=subscriber)
        print("\n".join(log_of(found["items"])))


@app.command()
def ack(id_: Id, url: Url = DEFAULT_URL, token: Token = "", subscriber: Other = None) -> None:
    """Say that you have seen an alert."""
    with _said():
        if not token:
            raise RefusedError("sign in first: give your access token by --token or TROOP_TOKEN")
        item = call(url, token, "POST", f"alerts/{quote(id_, safe='')}/acknowledge", subscriber=subscriber)
        print(f"{item['title']}: acknowledged at {_minute(item['acknowledged_at'])}")


def call(url: str, token: str, method: str, route: str, **params: str | None) -> dict[str, Any]:
    """
    The JSON answer of an endpoint.

    Raises:
        RefusedError: the API says no; the text is what it says.
        UnavailableError: nobody answers, or not as TROOP does.

    """
    import httpx

    try:
        answer = httpx.request(
            method,
            f"{url.rstrip('/')}/api/{route}",
            params={name: value for name, value in params.items() if value is not None},
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=15,
            trust_env=False,
        )
        said: dict[str, Any] = answer.json()
        if answer.status_code < HTTPStatus.BAD_REQUEST:
            return said
        detail = str(said["detail"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as e:
        raise UnavailableError(
            f"{url} does not answer as TROOP does ({type(e).__name__}): start it with make run, "
            "or name another with --url"
        ) from None
    raise RefusedError(detail)


# --- how it is shown


def line_of(item: Mapping[str, Any]) -> str:
    """An alert in one line."""
    states = ", ".join(f"{d['channel']} {d['state']}" for d in item["deliveries"])
    return f"{item['alert_id']}  {_minute(item['occurred_at'])}  {item['title']:<32} {states}"


def tree_of(told: Mapping[str, Any]) -> list[str]:
    """An explanation as a small tree: the alert, its deliveries, the decisions about each."""
    head = f"{told['title']}  ({told['subscriber']}, {told['severity']}, {_minute(told['occurred_at'])})"
    branches = [_decision(d) for d in told["decisions"]]
    leaves: list[list[str]] = [[] for _ in branches]
    for delivery in told["deliveries"]:
        version = f" v{delivery['version']}" if delivery["version"] > 1 else ""
        branches.append(f"{delivery['channel']}{version}: {delivery['state']}, {delivery['because']}")
        leaves.append([_decision(d) for d in delivery["decisions"]])
    lines = [head]
    for n, (branch, below) in enumerate(zip(branches, leaves, strict=True), 1):
        is_last = n == len(branches)
        lines.append(("└─ " if is_last else "├─ ") + branch)
        stem = "   " if is_last else "│  "
        lines += [stem + ("└─ " if m == len(below) else "├─ ") + leaf for m, leaf in enumerate(below, 1)]
    return lines


def log_of(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Deliveries with their attempts."""
    lines = []
    for d in found:
        version = f" v{d['version']}" if d["version"] > 1 else ""
        reason = f": {d['reason']}" if d["reason"] else ""
        lines.append(f"{d['channel']}{version}  {d['state']}{reason}")
        for attempt in d["log"]:
            why = f": {attempt['reason']}" if attempt["reason"] else ""
            ended = f" to {attempt['ended_at'][11:19]}" if attempt["ended_at"] else ""
            lines.append(f"   {attempt['number']}.  {attempt['started_at'][:19]}{ended}  {attempt['outcome']}{why}")
        if d["due_at"]:
            lines.append(f"   next not before {d['due_at'][:19]}")
    return lines


def _decision(d: Mapping[str, Any]) -> str:
    return f"{_minute(d['at'])}  {d['rule']}: {d['outcome']}, {d['reason']}"


def _minute(instant: str) -> str:
    return instant[:16].replace("T", " ")


@contextmanager
def _said() -> Iterator[None]:
    """Trouble is told in one line, and the exit code is 1."""
    try:
        yield
    except TroopError as e:
        print(f"troop alerts: {e}", file=sys.stderr)
        raise typer.Exit(1) from None
