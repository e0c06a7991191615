"""`troop subscriptions` and `troop mute`: what you hear and what is silent, over HTTP with your token."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

import typer

from shared.errors import InvalidPayloadError, RefusedError, TroopError, UnavailableError

app = typer.Typer(no_args_is_help=True, help="What you asked to hear: list, add, remove.")
mutes = typer.Typer(no_args_is_help=True, help="What is silent for a while: add, list, end.")

DEFAULT_URL = "http://127.0.0.1:7071"
Url = Annotated[str, typer.Option("--url", help="Where TROOP answers, on this machine or in Azure.")]
Token = Annotated[
    str,
    typer.Option("--token", envvar="TROOP_TOKEN", help="Your access token; better in TROOP_TOKEN.", show_envvar=True),
]
Other = Annotated[str | None, typer.Option("--subscriber", help="Operators: whose, if not your own.")]

UNITS = {"m": 1, "h": 60, "d": 24 * 60}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Calls the API of *url* as the owner of *token*."""

    url: str
    token: str

    def call(
        self,
        method: str,
        route: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str | None] | None = None,
    ) -> dict[str, Any]:
        """
        The JSON answer of an endpoint.

        Raises:
            RefusedError: the API says no; the text is what it says.
            UnavailableError: nobody answers, or not as TROOP does.

        """
        import httpx

        if not self.token:
            raise RefusedError("sign in first: give your access token by --token or TROOP_TOKEN")
        given = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            answer = httpx.request(
                method,
                f"{self.url.rstrip('/')}/api/{route}",
                json=body,
                params=given,
                headers={"Authorization": f"Bearer {self.token}"},
                timeout=15,
                trust_env=False,
            )
            said: dict[str, Any] = answer.json()
            if answer.status_code < HTTPStatus.BAD_REQUEST:
                return said
            detail = str(said["detail"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as e:
            raise UnavailableError(
                f"{self.url} does not answer as TROOP does ({type(e).__name__}): start it with make run, "
                "or name another with --url"
            ) from None
        raise RefusedError(detail)


@app.command("list")
def list_(url: Url = DEFAULT_URL, token: Token = "", subscriber: Other = None) -> None:
    """Show what you asked to hear."""
    with _said():
        found = Caller(url=url, token=token).call("GET", "subscriptions", params={"subscriber": subscriber})["items"]
        for item in found:
            print(f"{item['subscription_id']}  {described(item)}")
        if not found:
            print("nothing yet: troop subscriptions add --symbols AAPL --channels signalr", file=sys.stderr)


@app.command()
def add(  # noqa: PLR0913, PLR0917 - one parameter an option
    channels: Annotated[str, typer.Option(help="signalr, email, discord, separated by commas.")] = "signalr",
    kind: Annotated[str, typer.Option(help="signal, price, move or volume.")] = "signal",
    symbols: Annotated[str, typer.Option(help="A,B or all.")] = "all",
    entries: Annotated[str, typer.Option(help="Entries of signals, A,B or all.")] = "all",
    directions: Annotated[str, typer.Option(help="long, short or all.")] = "all",
    min_strength: Annotated[float | None, typer.Option(help="Of signals, from 0 to 1.")] = None,
    min_confidence: Annotated[float | None, typer.Option(help="Of signals, from 0 to 1.")] = None,
    severity: Annotated[str | None, typer.Option(help="info, warning or critical.")] = None,
    interval: Annotated[str | None, typer.Option(help="1d, 1h or 1m.")] = None,
    above: Annotated[float | None, typer.Option(help="price: at or above this.")] = None,
    below: Annotated[float | None, typer.Option(help="price: at or below this.")] = None,
    percent: Annotated[float | None, typer.Option(help="move: this far, in percent.")] = None,
    window: Annotated[int | None, typer.Option(help="move, volume: over so many bars.")] = None,
    times: Annotated[float | None, typer.Option(help="volume: so many times the usual.")] = None,
    hysteresis: Annotated[
        float | None, typer.Option(help="How far back before it can fire again, 0.01 is 1 %.")
    ] = None,
    cooldown: Annotated[str | None, typer.Option(help="Not again for this symbol within 30m, 4h, 1d.")] = None,
    digest: Annotated[str | None, typer.Option(help="none, hour or day.")] = None,
    cap: Annotated[int | None, typer.Option(help="At most so many a day.")] = None,
    freshness: Annotated[str | None, typer.Option(help="Not if older than 30m, 4h, 1d.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
) -> None:
    """Ask to hear something."""
    with _said():
        wanted = {
            "channels": names(channels) or [],
            "kind": kind,
            "symbols": names(symbols),
            "entries": names(entries),
            "directions": names(directions),
            "min_strength": min_strength,
            "min_confidence": min_confidence,
            "severity": severity,
            "interval": interval,
            "price_above": above,
            "price_below": below,
            "percent": percent,
            "window": window,
            "times_usual": times,
            "hysteresis": hysteresis,
            "cooldown_minutes": None if cooldown is None else minutes(cooldown, "--cooldown"),
            "digest": digest,
            "cap_per_day": cap,
            "freshness_minutes": None if freshness is None else minutes(freshness, "--freshness"),
        }
        body = {name: value for name, value in wanted.items() if value is not None}
        made = Caller(url=url, token=token).call("POST", "subscriptions", body=body)
        print(f"{made['subscription_id']}  {described(made)}")


@app.command()
def remove(
    id_: Annotated[str, typer.Argument(metavar="ID", help="As `troop subscriptions list` shows it.")],
    url: Url = DEFAULT_URL,
    token: Token = "",
) -> None:
    """Hear it no longer."""
    with _said():
        print(Caller(url=url, token=token).call("DELETE", f"subscriptions/{quote(id_, safe='')}")["done"])


@mutes.command("add")
def mute(
    for_: Annotated[str, typer.Option("--for", help="How long of market time: 30m, 4h, 7d.")],
    symbols: Annotated[str, typer.Option(help="A,B or all.")] = "all",
    entries: Annotated[str, typer.Option(help="A,B or all.")] = "all",
    reason: Annotated[str, typer.Option(help="Why; operators must say it where it is for another.")] = "",
    subscriber: Other = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
) -> None:
    """Silence alerts for a while."""
    with _said():
        body = {
            "for_minutes": minutes(for_, "--for"),
            "symbols": names(symbols),
            "entries": names(entries),
            "reason": reason,
            "subscriber": subscriber,
        }
        made = Caller(url=url, token=token).call("POST", "mutes", body=body)
        print(f"{made['mute_id']}  {_muted(made)}")


@mutes.command("list")
def list_mutes(url: Url = DEFAULT_URL, token: Token = "", subscriber: Other = None) -> None:
    """Show what is silent, until when, and by whom."""
    with _said():
        for item in Caller(url=url, token=token).call("GET", "mutes", params={"subscriber": subscriber})["items"]:
            print(f"{item['mute_id']}  {_muted(item)}")


@mutes.command("end")
def unmute(
    id_: Annotated[str, typer.Argument(metavar="ID", help="As `troop mute list` shows it.")],
    reason: Annotated[str | None, typer.Option(help="Operators: why.")] = None,
    subscriber: Other = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
) -> None:
    """End a mute before its time."""
    with _said():
        params = {"subscriber": subscriber, "reason": reason}
        print(Caller(url=url, token=token).call("DELETE", f"mutes/{quote(id_, safe='')}", params=params)["done"])


def names(text: str) -> list[str] | None:
    """``A,B`` as a list; ``all`` is None."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    return None if "all" in found or not found else found


def minutes(text: str, option: str) -> int:
    """
    ``30m``, ``4h`` or ``7d`` as minutes.

    Raises:
        InvalidPayloadError: it is none of these.

    """
    found = re.fullmatch(r"(\d{1,6})([mhd])", text.strip())
    if found is None:
        raise InvalidPayloadError(f"{option}: write a time such as 30m, 4h or 7d")
    return int(found[1]) * UNITS[found[2]]


def described(item: Mapping[str, Any]) -> str:
    """A subscription in one line."""
    parts = [item["kind"], _all(item["symbols"], "all symbols")]
    if item["entries"]:
        parts.append(_all(item["entries"], ""))
    shown = (
        ("price_above", "at or above {:g}"),
        ("price_below", "at or below {:g}"),
        ("percent", "{:g} %"),
        ("times_usual", "{:g} times the usual"),
        ("window", "over {} bars"),
        ("min_confidence", "confidence {:g}"),
        ("cooldown_minutes", "cooldown {:g} min"),
        ("cap_per_day", "{} a day"),
        ("digest", "digest: {}"),
    )
    parts += [text.format(item[name]) for name, text in shown if item[name] is not None]
    if item["min_strength"]:
        parts.append(f"strength {item['min_strength']:g}")
    if item["severity"] != "info":
        parts.append(item["severity"])
    return f"{', '.join(parts)} → {', '.join(item['channels'])}"


def _muted(item: Mapping[str, Any]) -> str:
    what = ", ".join(_all(item[name], "") for name in ("symbols", "entries") if item[name]) or "everything"
    why = f": {item['reason']}" if item["reason"] else ""
    return f"{what} until {item['until']} (market time) by {item['author']}{why}"


def _all(listed: Sequence[str] | None, otherwise: str) -> str:
    return ",".join(listed) if listed else otherwise


@contextmanager
def _said() -> Iterator[None]:
    """Trouble in one line, and the exit code 1."""
    try:
        yield
    except TroopError as e:
        print(f"troop: {e}", file=sys.stderr)
        raise typer.Exit(1) from None
