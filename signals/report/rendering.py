"""A result to one self-contained page: no request leaves it, everything in it is escaped. Pure."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).resolve().parent
NOTHING = "n/a"
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
SHOWN_TRADES = 100
SHOWN_VARIANTS = 25
PERCENT, RATIO, MONEY, DAYS, COUNT, POINTS = "percent", "ratio", "money", "days", "count", "points"

METRICS: Sequence[tuple[str, Mapping[str, tuple[str, str]]]] = (
    (
        "Return",
        {
            "total_return": ("Total return", PERCENT),
            "buy_hold_return": ("Buy-and-hold return", PERCENT),
            "cagr": ("CAGR, by calendar time", PERCENT),
            "annual_return": ("Annual return, geometric", PERCENT),
            "equity_final": ("Final equity", MONEY),
            "equity_peak": ("Peak equity", MONEY),
            "duration": ("Duration, days", DAYS),
            "exposure_time_pct": ("Exposure, share of bars", POINTS),
        },
    ),
    (
        "Risk",
        {
            "annual_volatility": ("Annual volatility", PERCENT),
            "max_drawdown": ("Maximum drawdown", PERCENT),
            "avg_drawdown": ("Average drawdown", PERCENT),
            "max_drawdown_duration": ("Longest drawdown, days", DAYS),
            "drawdown_recovery_days": ("Recovery of the deepest, days", DAYS),
            "var_95": ("Value at risk, 95 %, a period", PERCENT),
        },
    ),
    (
        "Risk-adjusted",
        {
            "sharpe": ("Sharpe ratio", RATIO),
            "probabilistic_sharpe": ("Probabilistic Sharpe, above 0", PERCENT),
            "sortino": ("Sortino ratio", RATIO),
            "calmar": ("Calmar ratio", RATIO),
        },
    ),
    (
        "Against buy-and-hold",
        {
            "alpha": ("Alpha, a year", PERCENT),
            "beta": ("Beta", RATIO),
            "treynor": ("Treynor ratio", RATIO),
            "information_ratio": ("Information ratio", RATIO),
            "tracking_error": ("Tracking error, a year", PERCENT),
        },
    ),
    (
        "Trades",
        {
            "trade_count": ("Closed trades", COUNT),
            "open_trades": ("Open trades", COUNT),
            "win_rate": ("Win rate", PERCENT),
            "profit_factor": ("Profit factor", RATIO),
            "payoff_ratio": ("Payoff ratio", RATIO),
            "expectancy": ("Expectancy, mean net return", PERCENT),
            "expectancy_ratio": ("Expectancy ratio", RATIO),
            "avg_trade": ("Average trade, geometric", PERCENT),
            "best_trade": ("Best trade", PERCENT),
            "worst_trade": ("Worst trade", PERCENT),
            "avg_trade_duration": ("Average trade, days", DAYS),
            "sqn": ("SQN", RATIO),
            "kelly": ("Kelly fraction", PERCENT),
            "avg_mae": ("Mean adverse excursion", PERCENT),
            "avg_mfe": ("Mean favourable excursion", PERCENT),
            "worst_mae": ("Worst adverse excursion", PERCENT),
            "best_mfe": ("Best favourable excursion", PERCENT),
            "longest_winning_streak": ("Longest winning streak", COUNT),
            "longest_losing_streak": ("Longest losing streak", COUNT),
        },
    ),
    (
        "Costs",
        {
            "turnover": ("Turnover, a year", RATIO),
            "fees_paid": ("Fees paid", MONEY),
            "slippage_paid": ("Slippage paid", MONEY),
        },
    ),
)
"""What is shown, in which order, under which name and how it is written."""

CHECKS = {
    "ruined": "Equity stays above zero",
    "too_few_trades": "Enough trades",
    "stale_fills": "Every fill had a price",
    "flat_curve": "The curve moves",
    "one_trade_luck": "Not the luck of a few trades",
    "insignificant_mean": "The mean return is significant",
    "too_many_parameters": "Few parameters for the trades",
    "behind_buy_and_hold": "Ahead of buy-and-hold",
    "deflated_sharpe": "Better than the best of as many lucky variants",
    "behind_on_hold_out": "Ahead on the hold-out as well",
}


def render(result: Mapping[str, Any]) -> str:
    """The page of a result."""
    validation = result["validation"]
    return _template().render(
        r=result,
        title=f"{result['entry'] or result['strategy']} on {result['symbol']}",
        params=_params(result["params"]),
        tiles=_tiles(result),
        groups=metric_rows(result),
        checks=[{**one, "label": CHECKS.get(one["name"], one["name"])} for one in result["checks"]],
        passed=sum(one["is_passed"] for one in result["checks"]),
        years=_years(result["months"]),
        month_names=MONTHS,
        folds=[_fold(row) for row in validation["folds"]] if validation else [],
        hold_out=_hold_out(validation["hold_out"]) if validation else None,
        spread=_spread(validation) if validation else [],
        variants=_variants(validation) if validation else [],
        trades=[_trade(row) for row in reversed(result["trades"]["items"][-SHOWN_TRADES:])],
        data=_data(result),
        day=_day,
    )


def metric_rows(result: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Every metric as text, in groups: its label, its value, buy-and-hold's, and what is to be said of it."""
    metrics, held = result["metrics"], result["buy_and_hold"]
    groups = []
    for title, names in METRICS:
        rows = [
            {
                "name": name,
                "label": label,
                "value": _shown(metrics[name]["value"], kind),
                "held": _shown(held[name]["value"], kind) if name in held else "",
                "reason": metrics[name]["reason"] or "",
            }
            for name, (label, kind) in names.items()
            if name in metrics
        ]
        groups.append((title, rows))
    return groups


def _shown(value: float | None, kind: str) -> str:
    """A number for people."""
    if value is None:
        return NOTHING
    match kind:
        case "percent":
            return f"{value:,.0%}" if math.fabs(value) >= 10 else f"{value:.2%}"
        case "points":
            return f"{value:.1f} %"
        case "money":
            return f"{value:,.2f}"
        case "days":
            return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
        case "count":
            return f"{value:,.0f}"
        case _:
            return f"{value:.2f}"


def _params(params: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in params.items()) or "no parameters"


def _tiles(result: Mapping[str, Any]) -> list[dict[str, str]]:
    metrics, held = result["metrics"], result["buy_and_hold"]

    def tile(label: str, name: str, kind: str, note: str) -> dict[str, str]:
        return {"label": label, "value": _shown(metrics[name]["value"], kind), "note": metrics[name]["reason"] or note}

    def beside(name: str, kind: str) -> str:
        return f"buy-and-hold {_shown(held[name]['value'], kind)}"

    deflated = result["deflated_sharpe"]
    ever = result["variants"]["ever"]
    return [
        tile("Total return", "total_return", PERCENT, beside("total_return", PERCENT)),
        tile("CAGR", "cagr", PERCENT, beside("cagr", PERCENT)),
        tile("Sharpe ratio", "sharpe", RATIO, beside("sharpe", RATIO)),
        tile("Max drawdown", "max_drawdown", PERCENT, beside("max_drawdown", PERCENT)),
        tile("Closed trades", "trade_count", COUNT, f"win rate {_shown(metrics['win_rate']['value'], PERCENT)}"),
        {
            "label": "Deflated Sharpe",
            "value": _shown(deflated["value"], PERCENT),
            "note": f"after {ever:,} {'variant' if ever == 1 else 'variants'} tried on this series",
        },
    ]


def _years(months: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The months of each year in their places, with what the year made."""
    found: dict[int, dict[str, Any]] = {}
    for one in months:
        year = found.setdefault(one["year"], {"year": one["year"], "cells": [None] * 12, "total": 1.0, "held": 1.0})
        year["cells"][one["month"] - 1] = _cell(one["total_return"])
        year["total"] *= 1 + one["total_return"]
        year["held"] *= 1 + one["buy_hold_return"]
    for year in found.values():
        year["total"], year["held"] = _cell(year["total"] - 1, whole=0.6), _shown(year["held"] - 1, PERCENT)
    return [found[year] for year in sorted(found, reverse=True)]


def _cell(value: float, whole: float = 0.15) -> dict[str, str]:
    """A return with how strongly its field is coloured."""
    depth = min(abs(value) / whole, 1.0)
    kind = "gain" if value > 0 else "loss" if value < 0 else "flat"
    return {"text": f"{value:.1%}", "kind": kind, "depth": f"{0.12 + 0.6 * depth:.2f}" if value else "0"}


def _fold(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "train": ", ".join(f"{_day(first)} to {_day(last)}" for first, last in row["train"]),
        "test": ", ".join(f"{_day(first)} to {_day(last)}" for first, last in row["test"]),
        "bars": f"{row['train_bars']:,} / {row['test_bars']:,}",
        "params": _params(row["params"]),
        "train_score": _shown(row["train_score"], RATIO),
        "test_score": _shown(row["test_score"], RATIO),
        "benchmark": _shown(row["benchmark"], RATIO),
        "is_beating": row["is_beating"],
    }


def _hold_out(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "span": f"{_day(one['first_closed_at'])} to {_day(one['last_closed_at'])}",
        "bars": one["bars"],
        "score": _shown(one["score"], RATIO),
        "benchmark": _shown(one["benchmark"], RATIO),
        "total_return": _shown(one["total_return"], PERCENT),
        "buy_hold_return": _shown(one["buy_hold_return"], PERCENT),
        "max_drawdown": _shown(one["max_drawdown"], PERCENT),
        "trade_count": one["trade_count"],
    }


def _spread(validation: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = [
        ("Mean test score", validation["mean"], RATIO),
        ("Deviation", validation["std"], RATIO),
        ("Worst fold", validation["worst"], RATIO),
        ("Probability of overfitting", validation["overfitting"], PERCENT),
    ]
    found = [
        {"label": label, "value": _shown(one["value"], kind), "reason": one["reason"] or ""}
        for label, one, kind in rows
    ]
    share = {"label": "Folds ahead of buy-and-hold", "value": f"{validation['share_beating']:.0%}", "reason": ""}
    return [*found, share]


def _variants(validation: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"params": _params(one["params"]), "mean": _shown(one["mean"], RATIO)}
        for one in validation["variants"][:SHOWN_VARIANTS]
    ]


def _trade(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "direction": row["direction"],
        "entered": _minute(row["entered_at"]),
        "exited": "open" if row["is_open"] else _minute(row["exited_at"]),
        "entry_price": f"{row['entry_price']:,.2f}",
        "exit_price": f"{row['exit_price']:,.2f}",
        "bars": row["bars_held"],
        "net": f"{row['net']:,.2f}",
        "net_return": _shown(row["net_return"], PERCENT),
        "mae": _shown(row["mae"], PERCENT),
        "mfe": _shown(row["mfe"], PERCENT),
        "has_won": row["net"] > 0,
    }


def _data(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the drawings are made of."""
    curve, validation = result["curve"], result["validation"]
    return {
        "at": curve["at"],
        "price": _rounded(curve["price"]),
        "equity": _rounded(curve["equity"]),
        "held": _rounded(curve["buy_and_hold"]),
        "trades": [
            {
                "d": 1 if row["direction"] == "long" else -1,
                "from": row["entered_at"],
                "to": row["exited_at"],
                "a": row["entry_price"],
                "b": row["exit_price"],
                "r": row["net_return"],
                "open": row["is_open"],
            }
            for row in result["trades"]["items"]
        ],
        "isIntraday": result["interval"] != "1d",
        "holdOut": validation["hold_out"]["first_closed_at"] if validation else None,
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.8g}") for value in values]


def _day(instant: str) -> str:
    return instant[:10]


def _minute(instant: str) -> str:
    return f"{instant[:10]} {instant[11:16]}"


@cache
def _template() -> "Template":
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
