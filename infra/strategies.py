"""`troop strategies`: list what there is, and check strategies, ours or your own, for looking ahead."""

import importlib.util
import sys
import traceback
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import ConfigurationError, PermanentError
from shared.market.models import Columns, Interval, instant_of, interval_of, minute_of, symbol_of
from shared.market.sessions import calendar

if TYPE_CHECKING:
    from signals.logic.arrays import Arrays, Minutes
    from signals.logic.lookahead import Verdict
    from signals.logic.strategies import Strategy

app = typer.Typer(no_args_is_help=True, help="List strategies, and check them for looking ahead.")

MOST_BARS = 1500
"""How many of the newest recorded bars are checked: more than every shipped lookback, and done in a second."""
INVENTED_BARS = 1500
SEED = 20130102
MODULE = "troop_checked_strategies"
"""The name under which a user's file is loaded."""


@app.command("list")
def list_() -> None:
    """Show every strategy with its parameters, the bars it needs and where it makes sense."""
    from signals.logic.strategies import STRATEGIES

    rows = [("strategy", "speaks when", "parameters", "bars", "intervals", "horizon")]
    for one in STRATEGIES.values():
        params = one.params()
        shown = " ".join(f"{name}={value:g}" for name, value in params.model_dump().items())
        needs, intervals = str(one.lookback(params)), " ".join(one.intervals)
        rows.append((f"{one.name}@{one.version}", one.title, shown, needs, intervals, str(one.horizon)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="A Python file with strategies; without it all of ours.")] = None,
    symbol: Annotated[str, typer.Option(help="Whose recorded bars to check on.")] = "AAPL",
    interval: Annotated[str | None, typer.Option(help="1d, 1h or 1m; without it where a strategy makes sense.")] = None,
) -> None:
    """Cut the future off and run again: a strategy that then says something else looked ahead."""
    from signals.logic.strategies import STRATEGIES

    try:
        recorded = symbol_of(symbol)
        intervals = tuple(Interval) if interval is None else (interval_of(interval),)
        strategies = list(STRATEGIES.values()) if file is None else read_strategies(file)
        verdicts = examine(strategies, recorded, intervals)
    except (ConfigurationError, PermanentError) as e:
        print(f"troop strategies check: {e}", file=sys.stderr)
        raise typer.Exit(2) from e
    if not verdicts:
        wanted = ", ".join(f"{one.name} ({' or '.join(one.intervals)})" for one in strategies)
        print(f"troop strategies check: nothing makes sense at {interval}: {wanted}", file=sys.stderr)
        raise typer.Exit(2)
    failed = sum(not verdict.is_passed for verdict in verdicts)
    print(f"{len(verdicts)} checks, {failed} failed" if failed else f"{len(verdicts)} checks, all passed")
    raise typer.Exit(1 if failed else 0)


def read_strategies(file: Path) -> list["Strategy"]:
    """
    Load the strategies that a Python file defines at its top level, alone or in a list or tuple. It is run.

    Raises:
        ConfigurationError: the file cannot be read or run, or defines none; the text says where and why.

    """
    from signals.logic.strategies import Strategy

    module = _loaded(file)
    held: list[object] = []
    for value in vars(module).values():
        held += value if isinstance(value, list | tuple) else [value]
    found = list({id(one): one for one in held if isinstance(one, Strategy)}.values())
    if not found:
        raise ConfigurationError(
            f"{file} defines no strategy: write one at its top level, such as "
            "MINE = Strategy(name=…, version=1, title=…, params=…, lookback=…, mark=…)"
        )
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"{file}: name {', '.join(twice)} is there twice; give every strategy one of its own")
    return found


def _loaded(file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigurationError(f"{file} is no file: name a Python file that defines strategies")
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{file} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # where its models look for their annotations
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        raise ConfigurationError(f"{file}, line {e.lineno}: {e.msg}") from e
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if Path(frame.filename) == file]
        place = f"{file}, line {lines[-1]}" if lines else str(file)
        raise ConfigurationError(f"{place}: {type(e).__name__}: {e}") from e
    return module


def examine(
    strategies: Sequence["Strategy"], symbol: str, intervals: Sequence[Interval] = tuple(Interval)
) -> list["Verdict"]:
    """
    Check each strategy at each of these intervals where it makes sense, on recorded and on invented bars, and say so.

    Raises:
        ConfigurationError: there are no recorded bars of the symbol at any of them.

    """
    from signals.logic.lookahead import check as look

    bars = _bars(symbol, intervals)
    verdicts = []
    for strategy in strategies:
        for interval, what, some in bars:
            if interval in strategy.intervals:
                verdict = look(strategy, some)
                verdicts.append(verdict)
                for line in _lines(f"{strategy.name}@{strategy.version} at {interval} on {what}", verdict, some):
                    print(line)
    return verdicts


def _lines(what: str, verdict: "Verdict", bars: "Arrays") -> list[str]:
    how = f"{verdict.bars} bars, {verdict.opinions} opinions, {verdict.cuts} cuts, {verdict.decided} decided live"
    if verdict.is_passed:
        silent = " It said nothing, which proves little: check it on other bars." if not verdict.opinions else ""
        return [f"ok      {what}: {how}.{silent}"]
    lines = [f"FAILED  {what}: {how}."]
    for trouble in verdict.troubles:
        place = ""
        if trouble.index is not None:
            place = f" at bar {trouble.index}, {instant_of(int(bars.closed[trouble.index])):%Y-%m-%d %H:%M} UTC"
        lines.append(f"        {trouble.rule}{place}: {trouble.detail}")
    return lines


def _bars(symbol: str, intervals: Sequence[Interval]) -> list[tuple[Interval, str, "Arrays"]]:
    found: list[tuple[Interval, str, Arrays]] = []
    missing: list[str] = []
    for interval in intervals:
        try:
            found.append((interval, f"{symbol}'s bars", recorded_bars(symbol, interval)))
        except ConfigurationError as e:
            missing.append(str(e))
    if not found:
        raise ConfigurationError(missing[0])
    return found + [(interval, "invented bars", invented_bars(interval)) for interval in intervals]


def recorded_bars(symbol: str, interval: Interval) -> "Arrays":
    """
    The newest recorded bars of a symbol, split-adjusted.

    Raises:
        ConfigurationError: no data package has any.

    """
    from infra.local.replay.samples import load_packaged
    from signals.logic.arrays import Tape

    tape = Tape.of(Columns.of(load_packaged([symbol], interval)[symbol, interval].bars))
    return tape.window(max(len(tape) - MOST_BARS, 0), len(tape))


def invented_bars(interval: Interval, count: int = INVENTED_BARS, seed: int = SEED) -> "Arrays":
    """
    A random market on real sessions, the same for the same seed: calm and wild times, gaps, still bars, idle volumes.

    What recorded bars never show, such as hours without a trade, happens here.
    """
    import numpy as np

    from signals.logic.arrays import Arrays

    rng = np.random.default_rng([seed, list(Interval).index(interval)])
    spans = _spans(interval, count)
    wildness = np.repeat(rng.choice([0.002, 0.01, 0.04], count // 50 + 1), 50)[:count]
    moves = wildness * rng.standard_normal(count) * (rng.random(count) > 0.1)
    gaps = wildness * rng.standard_normal(count) * (rng.random(count) > 0.8)
    close = 50 * np.exp(np.cumsum(moves + gaps - np.mean(moves + gaps)))
    opening = np.concatenate([[50.0], close[:-1]]) * np.exp(gaps)
    high = np.maximum(opening, close) * (1 + np.abs(moves) * rng.random(count))
    low = np.minimum(opening, close) * (1 - np.abs(moves).clip(max=0.5) * rng.random(count))
    volume = np.round(1e5 * rng.lognormal(0.0, 0.7, count)) * (rng.random(count) > 0.03)
    return Arrays(open=opening, high=high, low=low, close=close, volume=volume, opened=spans[0], closed=spans[1])


def _spans(interval: Interval, count: int) -> "tuple[Minutes, Minutes]":
    import numpy as np

    opened: list[int] = []
    closed: list[int] = []
    for session in calendar().sessions(date(2006, 1, 3), date(2013, 12, 31)):
        first, last = minute_of(session.opens_at), minute_of(session.closes_at)
        step = last - first if interval is Interval.DAY else interval.span.seconds // 60
        opened += range(first, last, step)
        closed += [min(at + step, last) for at in range(first, last, step)]
        if len(opened) >= count:
            break
    return np.array(opened[:count], dtype=np.int64), np.array(closed[:count], dtype=np.int64)
