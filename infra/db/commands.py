"""`troop db`: parses and delegates."""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.clock import SystemClock

app = typer.Typer(no_args_is_help=True, help="Look after the storage: check, restore, migrate, export, import.")

NAMED = "The storage, named as DOCUMENTS_URL names it; without it and --data that setting counts."
Data = Annotated[Path | None, typer.Option("--data", help="The folder of `troop up`: its app.db.")]
Url = Annotated[str | None, typer.Option("--url", help=NAMED)]


@app.command()
def check(
    data: Data = None,
    url: Url = None,
    salvage: Annotated[Path | None, typer.Option(help="Save what can be read into this new file.")] = None,
) -> None:
    """Say whether the storage is whole; if it is not, what is lost and how to get back."""
    from infra.db.check import check as examine
    from infra.db.place import Place

    _run(examine(Place.of(url=url, data=data), SystemClock(), salvage_to=salvage))


@app.command()
def restore(
    backup: Annotated[Path, typer.Argument(help="A file of the folder backups, or what --salvage saved.")],
    data: Data = None,
    url: Url = None,
) -> None:
    """Put a copy of a backup in an SQLite file's place; what was there is moved aside, never deleted."""
    from infra.db.backup import restore_place
    from infra.db.place import Place

    _run(restore_place(backup, Place.of(url=url, data=data), SystemClock()))


@app.command()
def migrate(
    data: Data = None,
    url: Url = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,  # noqa: FBT002
) -> None:
    """Make the containers, bring layout and documents up to date; a run that was stopped goes on."""
    from infra.db.migrate import migrate as upgrade
    from infra.db.place import Place

    _run(upgrade(Place.of(url=url, data=data), SystemClock(), dry_run=dry_run))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="The new file: one JSON document a line.")],
    data: Data = None,
    from_url: Annotated[str | None, typer.Option(help=NAMED)] = None,
) -> None:
    """Write every document into a file; a run that was stopped goes on."""
    from infra.db.place import Place
    from infra.db.transfer import export as write

    _run(write(Place.of(url=from_url, data=data), file, SystemClock()))


@app.command("import")
def import_(
    file: Annotated[Path | None, typer.Argument(help="What `troop db export` wrote.")] = None,
    subscribers: Annotated[Path | None, typer.Option(help="Instead: a CSV file of subscribers.")] = None,
    data: Data = None,
    to_url: Annotated[str | None, typer.Option(help=NAMED)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is stored otherwise.")] = False,  # noqa: FBT002
) -> None:
    """Store the documents of a file, or subscribers and their rules; what is there already stays."""
    from infra.db.place import Place
    from infra.db.subscribers import import_subscribers
    from infra.db.transfer import import_ as read

    place = Place.of(url=to_url, data=data)
    if file and not subscribers:
        _run(read(file, place, SystemClock(), overwrite=overwrite))
    elif subscribers and not file:
        _run(import_subscribers(subscribers, place, SystemClock(), overwrite=overwrite))
    else:
        raise typer.BadParameter("name one file: an export, or --subscribers FILE.csv")


def _run(work: Coroutine[Any, Any, bool]) -> None:
    """Do the work; the exit code is 0 when everything is well."""
    from shared.errors import TransientError, TroopError

    try:
        is_well = asyncio.run(work)
    except TroopError as e:
        hint = " (it may pass: the same command goes on from here)" if isinstance(e, TransientError) else ""
        print(f"troop db: {e}{hint}", file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(0 if is_well else 1)
