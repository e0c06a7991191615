"""`troop deadletters`: what could not be handled, and doing it after all, over HTTP with an operator's token."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import quote

import typer

from infra.subscriptions import DEFAULT_URL, Caller, Token, Url
from shared.errors import InvalidPayloadError, TroopError

app = typer.Typer(no_args_is_help=True, help="Events that could not be handled: list, show, replay, discard.")

Source = Annotated[str | None, typer.Option(help="Only of this function, or of this domain's outbox.")]
Type = Annotated[str | None, typer.Option("--type", help="Only events of this type.")]
Since = Annotated[str | None, typer.Option(help="Buried since this instant, such as 2026-11-21T09:00:00Z.")]
Until = Annotated[str | None, typer.Option(help="Buried before this instant.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept with your name.")]

PAGE = 100
SHOWN = 60


@app.command("list")
def list_(
    url: Url = DEFAULT_URL,
    token: Token = "",
    source: Source = None,
    type_: Type = None,
    since: Since = None,
    state: Annotated[str, typer.Option(help="open, replayed, discarded or all.")] = "open",
    most: Annotated[int, typer.Option("--most", min=1, help="How many at most.")] = 50,
) -> None:
    """Show dead letters, newest first."""
    with _said():
        caller = Caller(url=url, token=token)
        params: dict[str, str | None] = {
            "source": source,
            "type": type_,
            "since": since,
            "state": None if state == "all" else state,
        }
        shown, cursor = 0, None
        while shown < most:
            limit = str(min(PAGE, most - shown))
            page = caller.call("GET", "deadletters", params={**params, "limit": limit, "cursor": cursor})
            for item in page["items"]:
                print(described(item))
            shown, cursor = shown + len(page["items"]), page["next"]
            if cursor is None:
                break
        if not shown:
            print("none", file=sys.stderr)
        elif cursor is not None:
            print(f"there are more: --most {most * 2}", file=sys.stderr)


@app.command()
def show(
    id_: Annotated[str, typer.Argument(metavar="ID", help="The letter's id.")],
    url: Url = DEFAULT_URL,
    token: Token = "",
    source: Source = None,
) -> None:
    """Show one letter: the event, why it lies here, and what was done about it."""
    import json

    with _said():
        route = f"deadletters/{quote(id_, safe='')}"
        print(json.dumps(Caller(url=url, token=token).call("GET", route, params={"source": source}), indent=2))


@app.command()
def replay(
    id_: Annotated[str | None, typer.Argument(metavar="[ID]", help="One letter; without it, those of a range.")] = None,
    reason: Reason = "",
    url: Url = DEFAULT_URL,
    token: Token = "",
    source: Source = None,
    type_: Type = None,
    since: Since = None,
    until: Until = None,
    most: Annotated[int, typer.Option("--most", min=1, help="How many at most.")] = 1000,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it a range is only looked at.")] = False,  # noqa: FBT002
) -> None:
    """Run the function that gave an event up once more, with the same event: one letter, or a range of open ones."""
    with _said():
        if not reason.strip():
            raise InvalidPayloadError('say why: --reason "the fix is out"')
        caller = Caller(url=url, token=token)
        if id_ is not None:
            route = f"deadletters/{quote(id_, safe='')}/replay"
            done = caller.call("POST", route, body={"reason": reason}, params={"source": source})
            print(outcome(done))
            raise typer.Exit(0 if done["outcome"] in ("replayed", "already replayed") else 1)
        chosen = {"source": source, "type": type_, "since": since, "until": until}
        order = {name: value for name, value in chosen.items() if value is not None} | {"reason": reason}
        counts = _range(caller, {**order, "dry_run": not yes}, most)
        print(", ".join(f"{count} {name}" for name, count in counts.items()) or "none", file=sys.stderr)
        if counts and not yes:
            print("nothing was done: add --yes to do it", file=sys.stderr)
        raise typer.Exit(0 if counts.keys() <= {"replayed", "already replayed", "would replay"} else 1)


@app.command()
def discard(
    id_: Annotated[str, typer.Argument(metavar="ID", help="The letter's id.")],
    reason: Reason = "",
    url: Url = DEFAULT_URL,
    token: Token = "",
    source: Source = None,
) -> None:
    """Decide that an event is not wanted any more."""
    with _said():
        if not reason.strip():
            raise InvalidPayloadError('say why: --reason "a test event"')
        route = f"deadletters/{quote(id_, safe='')}/discard"
        print(
            described(
                Caller(url=url, token=token).call("POST", route, body={"reason": reason}, params={"source": source})
            )
        )


def _range(caller: Caller, order: Mapping[str, Any], most: int) -> Counter[str]:
    """Work through a range, a call at a time, and show how each letter fared."""
    counts: Counter[str] = Counter()
    cursor: str | None = None
    while counts.total() < most:
        limit = min(PAGE, most - counts.total())
        answer = caller.call("POST", "deadletters/replay", body={**order, "limit": limit, "cursor": cursor})
        for item in answer["items"]:
            print(outcome(item))
        counts.update(answer["counts"])
        cursor = answer["next"]
        if cursor is None:
            break
    return counts


def described(item: Mapping[str, Any]) -> str:
    """A letter in one line."""
    times = f" ({item['times']} times)" if item["times"] > 1 else ""
    state = "" if item["state"] == "open" else f"  {item['state']}"
    reason = _short(str(item["reason"]))
    return f"{item['recorded_at'][:19]}  {item['dead_letter_id']}  {item['source']}  {reason}{times}{state}"


def outcome(item: Mapping[str, Any]) -> str:
    """What became of a letter, in one line."""
    why = f": {_short(str(item['reason']))}" if item["reason"] else ""
    return f"{item['dead_letter_id']}  {item['source']}  {item['outcome']}{why}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


@contextmanager
def _said() -> Iterator[None]:
    """Trouble in one line, and the exit code 1."""
    try:
        yield
    except TroopError as e:
        print(f"troop deadletters: {e}", file=sys.stderr)
        raise typer.Exit(1) from None
