"""
`troop backtest`: an entry or a strategy on stored or on recorded bars, with a table, a page and JSON.

It is the service that the API uses, on a storage of one's own choice: variants that were tried and hold-outs that
were opened are remembered there, as over HTTP.
"""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.errors import ConfigurationError, ConflictError, NotFoundError, PermanentError, TransientError
from shared.settings import ROOT

if TYPE_CHECKING:
    from infra.db.place import Place
    from shared.documents import Documents
    from shared.events import Event
    from signals.backtest_models import Request
    from signals.backtests import BacktestService

SLICE = timedelta(seconds=0.4)
"""How long the work goes on before progress is shown."""
WAIT = 1.0
"""Seconds between two looks at a backtest that another process works on."""
KEPT = ROOT / ".troop" / "backtests.db"
WIDTH = 32

DONE, NOT_DONE, WRONG, UNCONVINCING = 0, 1, 2, 3
"""Exit codes: done; it could not be done; something was asked that cannot be; done, and a check failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says besides the request."""

    db: str | None = None
    data: Path | None = None
    samples: bool = False
    store: Path = KEPT
    entries: Path | None = None
    report: Path | None = None
    json: Path | None = None
    strict: bool = False


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(backtest)


def backtest(  # noqa: PLR0913, PLR0917 - one parameter an option
    name: Annotated[str, typer.Argument(metavar="ENTRY|STRATEGY", help="A row of the entries file, or a strategy.")],
    symbol: Annotated[str, typer.Argument(help="Such as AAPL.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[K=V]...", help="More of --params or --grid.")] = None,
    interval: Annotated[str | None, typer.Option(help="1d, 1h or 1m; an entry has its own.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="The first day or instant.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="The last day or instant.")] = None,
    params: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A strategy's parameters.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="K=V,V", help="Values to try: 5,10,20 or 5:50:5 (both ends included).")
    ] = None,
    cash: Annotated[float, typer.Option(help="Cash at the start.")] = 100_000,
    fees: Annotated[float, typer.Option(help="Of the value of a fill: 0.001 is 0.1 %.")] = 0.001,
    slippage: Annotated[float, typer.Option(help="Of the price of a fill.")] = 0.0005,
    side: Annotated[str, typer.Option(help="both, long or short.")] = "both",
    fill: Annotated[str, typer.Option(help="next_open, or close to compare with other backtesters.")] = "next_open",
    hold: Annotated[int | None, typer.Option(help="Hold for so many bars, not until the opposite mark.")] = None,
    size: Annotated[float, typer.Option(help="Share of equity in a trade; with --target-vol the most.")] = 1.0,
    target_vol: Annotated[float | None, typer.Option(help="Size for this yearly volatility: 0.15.")] = None,
    walk_forward: Annotated[int | None, typer.Option(metavar="N", help="Choose walking forward, N tests.")] = None,
    purged_cv: Annotated[int | None, typer.Option(metavar="N", help="Choose by N purged, embargoed folds.")] = None,
    anchored: Annotated[bool, typer.Option("--anchored", help="Learn from all of the past.")] = False,  # noqa: FBT002
    embargo: Annotated[int | None, typer.Option(help="Bars behind a test that are not learned from.")] = None,
    hold_out: Annotated[float, typer.Option(help="The last share of the bars, opened once at the end.")] = 0.2,
    db: Annotated[str | None, typer.Option(help="Stored bars: sqlite:FILE, as DOCUMENTS_URL names it.")] = None,
    data: Annotated[Path | None, typer.Option(help="Stored bars: the folder of `troop up`.")] = None,
    samples: Annotated[bool, typer.Option("--samples", help="Recorded bars of the data packages.")] = False,  # noqa: FBT002
    store: Annotated[Path, typer.Option(help="Where backtests of --samples are kept.")] = KEPT,
    entries: Annotated[Path | None, typer.Option(help="The entries file; without it ENTRIES_FILE.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the same numbers as JSON.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when a check fails.")] = False,  # noqa: FBT002
) -> None:
    """Try an entry or a strategy on the past: trades, metrics beside buy-and-hold, and what speaks against it."""
    try:
        options = Options(
            db=db, data=data, samples=samples, store=store, entries=entries, report=report, json=json_, strict=strict
        )
        _writable(report=report, json=json_)
        named, tried = numbers(params or [], grid or [], more or [])
        body = {
            "symbol": symbol,
            "interval": interval,
            "from": first,
            "to": last,
            "params": named,
            "grid": tried,
            "rules": _rules(cash, fees, slippage, side, fill, hold, size, target_vol),
            "validation": _validation(walk_forward, purged_cv, anchored=anchored, embargo=embargo, hold_out=hold_out),
        }
        code = asyncio.run(_run(name, body, options))
    except KeyboardInterrupt:
        print("\ntroop backtest: stopped; the same command goes on where it was", file=sys.stderr)
        code = NOT_DONE
    except (ConflictError, TransientError) as e:
        code = _said(e, NOT_DONE)
    except (ConfigurationError, PermanentError, OSError) as e:
        code = _said(e, WRONG)
    raise typer.Exit(code)


def _writable(**files: Path | None) -> None:
    """Look before the work begins: a hold-out is opened once, and what it says must not be lost on the way."""
    for option, file in files.items():
        if file is not None and file.is_dir():
            raise ConfigurationError(f"--{option}: {file} is a folder; name a file in it")
        if file is not None and not file.parent.is_dir():
            raise ConfigurationError(f"--{option}: there is no folder {file.parent}; make it first")


def _said(e: Exception, code: int) -> int:
    print(f"troop backtest: {e}", file=sys.stderr)
    return code


def numbers(
    params: Sequence[str], grid: Sequence[str], more: Sequence[str]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """
    Read ``k=v`` and ``k=v1,v2`` or ``k=first:last:step``; what stands alone is a grid where it has several values.

    Raises:
        ConfigurationError: says what cannot be read.

    """
    found: dict[str, float] = {}
    tried: dict[str, list[float]] = {}
    loose = [("", text) for text in more]
    for option, text in [*(("--params", text) for text in params), *(("--grid", text) for text in grid), *loose]:
        for part in text.split():
            key, equals, value = part.partition("=")
            values = _values(value)
            if not (key and equals and values):
                raise ConfigurationError(
                    f"{option or 'K=V'}: {part!r} cannot be read; write such as fast=10, or fast=5,10,20 to try several"
                )
            if option == "--grid" or (not option and len(values) > 1):
                tried[key] = values
            elif len(values) > 1:
                raise ConfigurationError(f"--params: {part!r} has several values; give them to --grid")
            else:
                found[key] = values[0]
    return found, tried


def _values(text: str) -> list[float]:
    found: list[float] = []
    try:
        for piece in text.split(","):
            if ":" not in piece:
                found.append(float(piece))
                continue
            low, high, step = map(float, piece.split(":"))
            if not (step > 0 and high >= low and (high - low) / step <= 10_000):
                return []
            found += [round(low + step * i, 12) for i in range(int((high - low) / step + 1e-9) + 1)]
    except (ValueError, OverflowError):
        return []
    return found


def _rules(
    cash: float,
    fees: float,
    slippage: float,
    side: str,
    fill: str,
    hold: int | None,
    size: float,
    target_vol: float | None,
) -> dict[str, Any]:
    sized = {"kind": "fixed", "fraction": size}
    if target_vol is not None:
        sized = {"kind": "volatility", "target": target_vol, "cap": size}
    held = {"exit": "horizon", "horizon": hold} if hold is not None else {}
    return {"cash": cash, "fee": fees, "slippage": slippage, "side": side, "fill": fill, "size": sized, **held}


def _validation(
    walk_forward: int | None, purged_cv: int | None, *, anchored: bool, embargo: int | None, hold_out: float
) -> dict[str, Any]:
    if walk_forward is not None and purged_cv is not None:
        raise ConfigurationError("--walk-forward and --purged-cv are two ways; choose one of them")
    common = {"embargo": embargo, "hold_out": hold_out}
    if walk_forward is not None:
        return {"kind": "walk_forward", "n_splits": walk_forward, "is_anchored": anchored, **common}
    if purged_cv is not None:
        return {"kind": "purged_cv", "n_splits": purged_cv, **common}
    return {"kind": "none"}


# --- the work


class Nobody:
    """Tells nobody: the command does the work itself."""

    async def publish(self, events: "Sequence[Event]") -> None:
        return

    async def close(self) -> None:
        return


async def _run(name: str, body: Mapping[str, Any], options: Options) -> int:
    from signals.backtest_models import Request

    for quiet in ("signals", "shared"):  # what fails is said below
        logging.getLogger(quiet).addHandler(logging.NullHandler())
    async with _opened(options, str(body["symbol"]), body["interval"], name) as (service, known):
        kind = "entry" if name in known else "strategy"
        request = Request.read(json.dumps({kind: name, **body}))
        return await _worked(service, request, options)


async def _worked(service: "BacktestService", request: "Request", options: Options) -> int:
    from infra.db.place import Progress

    [backtest] = await service.request(request)
    progress = Progress()
    while not backtest.state.is_over:
        progress(f"{backtest.done} of {backtest.total} variants tried")
        backtest = await service.run(backtest.backtest_id, SLICE)
        if backtest.leased_until is not None:
            await asyncio.sleep(WAIT)  # another process works on it, or was killed in it
    progress.done()
    backtest, result = await service.read(backtest.backtest_id)
    if result is None:
        raise ConflictError(f"failed: {backtest.reason}")
    await asyncio.to_thread(_write, {"backtest_id": backtest.backtest_id, **result}, options)
    print(table(result))
    is_convincing = all(check["is_passed"] for check in result["checks"])
    return UNCONVINCING if options.strict and not is_convincing else DONE


def _write(result: Mapping[str, Any], options: Options) -> None:
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if options.report:
        from signals.report.rendering import render

        options.report.write_text(render(result), encoding="utf-8")


@asynccontextmanager
async def _opened(
    options: Options, symbol: str, interval: str | None, name: str
) -> "AsyncIterator[tuple[BacktestService, set[str]]]":
    from shared.adapters.sqlite import SQLiteDocuments
    from shared.clock import SystemClock
    from shared.market.stores import Bars, SeriesStore
    from shared.migrations import Migrated
    from shared.wiring import VERSION
    from signals.adapters.backtest_documents import BacktestDocuments
    from signals.adapters.entries_file import read_entries
    from signals.backtests import BacktestService
    from signals.logic.evaluation import Watcher

    wall = SystemClock()
    configured = read_entries(_entries_file(options))
    place = None if options.samples else _place(options)
    if place is None:
        options.store.parent.mkdir(parents=True, exist_ok=True)
        opened: Documents = SQLiteDocuments(options.store, wall)
    else:
        opened = place.open(wall)
    documents = Migrated(opened, wall, app=VERSION)
    try:
        if options.samples:
            entry = next((entry for entry in configured if entry.name == name), None)
            await _bring(documents, symbol, interval or (entry.interval if entry else "1d"))
        yield (
            BacktestService(
                series=SeriesStore(documents, wall),
                bars=Bars(documents, wall),
                backtests=BacktestDocuments(documents, wall),
                publisher=Nobody(),
                watchers=[Watcher.of(entry) for entry in configured],
                wall=wall,
            ),
            {entry.name for entry in configured},
        )
    finally:
        await documents.close()


def _entries_file(options: Options) -> Path:
    from infra.db.place import setting

    if options.entries:
        return options.entries
    return ROOT / (setting("ENTRIES_FILE") or "signals/entries.toml")


def _place(options: Options) -> "Place":
    """The storage with the bars, which must be there."""
    from infra.db.place import Place

    place = Place.of(url=options.db, data=options.data)
    try:
        place.existing_file()
    except ConfigurationError:
        raise ConfigurationError(
            f"{place.name} does not exist: name what `troop up` keeps with --data, a storage with --db, "
            "or take recorded bars with --samples"
        ) from None
    return place


async def _bring(documents: "Documents", symbol: str, interval: str) -> None:
    """Put a symbol's recorded bars into storage, unless the same are there."""
    from infra.local.replay.samples import load_packaged
    from shared.clock import SystemClock
    from shared.market.models import Adjustment, Columns, interval_of, symbol_of
    from shared.market.stores import Bars, Series, SeriesStore

    wall = SystemClock()
    key = symbol_of(symbol), interval_of(interval)
    recorded = (await asyncio.to_thread(load_packaged, [key[0]], key[1]))[key]
    store, bars = SeriesStore(documents, wall), Bars(documents, wall)
    try:
        series = await store.get(*key)
    except NotFoundError:
        series = await store.create(
            Series(
                symbol=key[0],
                interval=key[1],
                live_from=recorded.bars[-1].closed_at,
                is_active=False,
                watched_by="samples",
                adjustment=Adjustment.RAW,
            )
        )
    if series.provider == recorded.source:
        return
    # Another version of the package, or a run that was stopped in here: a history of its own.
    series = await store.claim(series)
    await bars.rewrite(series.key, series.interval, series.claimed, Columns.of(recorded.bars))
    await store.save(replace(series, revision=series.claimed, provider=recorded.source))


# --- what is said


def table(result: Mapping[str, Any]) -> str:
    """A result as people read it in a terminal."""
    from signals.report.rendering import metric_rows

    span, provenance = result["range"], result["provenance"]
    params = " ".join(f"{key}={value:g}" for key, value in result["params"].items())
    adjustment = f", {provenance['adjustment']}" if provenance["adjustment"] else ""
    whence = f"{provenance['provider'] or 'an unknown provider'}{adjustment}, revision {provenance['revision']}"
    lines = [
        f"{result['entry'] or result['strategy']} on {result['symbol']} at {result['interval']}  {params}",
        f"{span['start'][:10]} to {span['end'][:10]}, {span['bars']:,} bars from {whence}",
        "",
    ]
    for title, rows in metric_rows(result):
        lines.append(f"{title:<{WIDTH}}{'strategy':>14}{'buy-and-hold':>16}")
        lines += [
            f"  {row['label']:<{WIDTH - 2}}{row['value']:>14}{row['held']:>16}"
            + (f"   {row['reason']}" if row["reason"] else "")
            for row in rows
        ]
        lines.append("")
    lines += _fold_lines(result["validation"])
    ever = result["variants"]["ever"]
    lines.append(f"Checks, after {ever:,} {'variant' if ever == 1 else 'variants'} tried on this series")
    lines += [f"  {'✓' if c['is_passed'] else '✗'} {c['name']:<22} {c['detail']}" for c in result["checks"]]
    return "\n".join([*lines, "", *result["assumptions"]])


def _fold_lines(validation: Mapping[str, Any] | None) -> list[str]:
    if validation is None:
        return []
    lines = [
        f"{'Folds: tested on':<{WIDTH}}{'Sharpe':>14}{'buy-and-hold':>16}   best in training ({validation['kind']})"
    ]
    for fold in validation["folds"]:
        tested = ", ".join(f"{first[:10]} to {last[:10]}" for first, last in fold["test"])
        params = " ".join(f"{key}={value:g}" for key, value in fold["params"].items())
        lines.append(f"  {tested:<{WIDTH - 2}}{_score(fold['test_score'])}{_score(fold['benchmark'], 16)}   {params}")
    for label, name in (("mean", "mean"), ("deviation", "std"), ("worst", "worst"), ("overfitting", "overfitting")):
        one = validation[name]
        lines.append(f"  {label:<{WIDTH - 2}}{_score(one['value'])}" + (f"   {one['reason']}" if one["reason"] else ""))
    last = validation["hold_out"]
    tested = f"{last['first_closed_at'][:10]} to {last['last_closed_at'][:10]}"
    lines.append(
        f"  {tested:<{WIDTH - 2}}{_score(last['score'])}{_score(last['benchmark'], 16)}   hold-out, opened once"
    )
    return [*lines, ""]


def _score(value: float | None, width: int = 14) -> str:
    return f"{'n/a' if value is None else f'{value:.2f}':>{width}}"
