"""The one command line, `troop`: it parses and delegates."""

import asyncio
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from infra import backtest, fetch, subscriptions
from infra.alerts import app as alerts
from infra.db.commands import app as db
from infra.deadletters import app as deadletters
from infra.strategies import app as strategies
from shared.settings import ROOT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="TROOP: market data in, signals, alerts and posts out.",
)
app.add_typer(db, name="db")
app.add_typer(alerts, name="alerts")
app.add_typer(subscriptions.app, name="subscriptions")
app.add_typer(subscriptions.mutes, name="mute")
app.add_typer(deadletters, name="deadletters")
app.add_typer(strategies, name="strategies")
fetch.register(app)
backtest.register(app)

DEFAULT_URL = "http://127.0.0.1:7071"
Url = Annotated[str, typer.Option("--url", help="Where TROOP answers, on this machine or in Azure.")]


class Interval(StrEnum):
    """The length of a replayed bar."""

    DAY = "1d"
    HOUR = "1h"
    MINUTE = "1m"


class Plan(StrEnum):
    """What the replay's providers allow."""

    FREE = "free"
    PREMIUM = "premium"
    UNLIMITED = "unlimited"


@app.command()
def up(  # noqa: PLR0913, PLR0917 - one parameter an option
    host: Annotated[str, typer.Option(help="The address the app listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The app's port; the cloud takes the next.")] = 7071,
    instances: Annotated[int, typer.Option(min=1, max=16, help="How many instances of the app.")] = 1,
    replay: Annotated[Path | None, typer.Option(help="A folder of SYMBOL_INTERVAL.csv files to replay.")] = None,
    speed: Annotated[float, typer.Option(min=0, max=999_999, help="Market seconds a second.")] = 86_400,
    symbols: Annotated[str | None, typer.Option(help="A,B,C or all (524 symbols).")] = None,
    interval: Annotated[Interval, typer.Option(help="The length of a bar.")] = Interval.DAY,
    from_: Annotated[str | None, typer.Option("--from", help="The market instant to begin live at.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="The market instant to end at.")] = None,
    data: Annotated[Path, typer.Option(help="The folder everything is kept in.")] = ROOT / ".troop",
    plan: Annotated[Plan, typer.Option(help="What the replay's providers allow.")] = Plan.PREMIUM,
    live: Annotated[bool, typer.Option("--live", help="The real providers and clock, with your keys.")] = False,  # noqa: FBT002
) -> None:
    """Start the embedded cloud and the app; Ctrl-C stops them, the next start continues."""
    from infra.local.up.replay import Wanted
    from infra.local.up.supervisor import Options, Supervisor

    wanted = Wanted(symbols=symbols, interval=interval.value, folder=replay, first=from_, last=to, speed=speed)
    options = Options(host=host, port=port, instances=instances, data=data, live=live, replay=wanted, plan=plan.value)
    raise typer.Exit(asyncio.run(Supervisor(options).run()))


@app.command()
def watch(
    url: Url = DEFAULT_URL,
    symbols: Annotated[str, typer.Option(help="What to hear: A,B or all.")] = "all",
) -> None:
    """Show alerts in the terminal as they are pushed."""
    from infra.watch import watch as listen

    raise typer.Exit(asyncio.run(listen(url, symbols)))


@app.command()
def doctor(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port `troop up` would take.")] = 7071,
    data: Annotated[Path, typer.Option(help="The folder `troop up` would keep everything in.")] = ROOT / ".troop",
    live: Annotated[bool, typer.Option("--live", help="Check what `troop up --live` needs.")] = False,  # noqa: FBT002
) -> None:
    """Check Python, packages, ports, settings and keys, and say what to do."""
    from infra.doctor import examine

    raise typer.Exit(examine(port=port, data=data, live=live))


@app.command()
def cost(
    price: Annotated[float, typer.Option(min=0, help="US dollars a million request units.")] = 0.25,
    followed: Annotated[int, typer.Option(min=1, help="Symbols a subscriber follows.")] = 10,
    reads: Annotated[int, typer.Option(min=0, help="Lists a subscriber reads a month.")] = 60,
) -> None:
    """Count what a bar, a signal, an alert and a read ask of storage, and price a month of it."""
    from infra.cost.scenario import SESSIONS, run
    from infra.cost.table import Assumptions, report

    with typer.progressbar(length=SESSIONS, label="counting", file=sys.stderr) as bar:
        measured = run(progress=lambda _: bar.update(1))
    print(report(measured, Assumptions(price=price, followed=followed, reads=reads)))


if __name__ == "__main__":
    app()
