"""What we say. Pure; every number in the text comes from the signal."""

import math
from collections.abc import Iterable
from datetime import UTC, datetime

from alerts.models import Alert, Severity, alert_id
from signals.events import SignalRaised

_WHY = {
    ("sma_cross", "long"): "the {fast:g}-bar average rose above the {slow:g}-bar average",
    ("sma_cross", "short"): "the {fast:g}-bar average fell below the {slow:g}-bar average",
    ("rsi_reversal", "long"): "the {period:g}-bar RSI came back above {low:g}",
    ("rsi_reversal", "short"): "the {period:g}-bar RSI came back below {high:g}",
    ("bollinger_breakout", "long"): "the close left the upper Bollinger band on high volume",
    ("bollinger_breakout", "short"): "the close left the lower Bollinger band on high volume",
    ("macd_cross", "long"): "the MACD rose above its signal line",
    ("macd_cross", "short"): "the MACD fell below its signal line",
    ("adx_trend", "long"): "an upward trend began: the {period:g}-bar ADX is at least {level:g} and +DI leads",
    ("adx_trend", "short"): "a downward trend began: the {period:g}-bar ADX is at least {level:g} and -DI leads",
    ("momentum", "long"): "the return of the last {period:g} bars turned up",
    ("momentum", "short"): "the return of the last {period:g} bars turned down",
    ("donchian_breakout", "long"): "the close rose above the highest high of the {period:g} bars before",
    ("donchian_breakout", "short"): "the close fell below the lowest low of the {period:g} bars before",
    ("atr_burst", "long"): "the close rose by at least {factor:g} average true ranges at once",
    ("atr_burst", "short"): "the close fell by at least {factor:g} average true ranges at once",
    ("volume_spike", "long"): "the volume was at least {factor:g} times the usual and the close rose",
    ("volume_spike", "short"): "the volume was at least {factor:g} times the usual and the close fell",
    ("vwap_deviation", "long"): "the close fell {distance:.1%} or more below what the session paid on average (VWAP)",
    ("vwap_deviation", "short"): "the close rose {distance:.1%} or more above what the session paid on average (VWAP)",
    ("gap", "long"): "the market opened {size:.1%} or more above the previous close and held it",
    ("gap", "short"): "the market opened {size:.1%} or more below the previous close and did not recover",
}
_BAR = {"1d": "daily", "1h": "hourly", "1m": "one-minute"}


def word(signal: SignalRaised, subscriber: str, severity: Severity, *, now: datetime) -> Alert:
    """Word a signal for a subscriber."""
    close = price(signal.reference_price)
    bar = _BAR.get(signal.interval, signal.interval)
    closed_at = signal.occurred_at.astimezone(UTC)
    when = f"{closed_at:%Y-%m-%d}" if signal.interval == "1d" else f"{closed_at:%Y-%m-%d %H:%M} UTC"
    return Alert(
        alert_id=alert_id(signal.signal_id, subscriber),
        signal_id=signal.signal_id,
        subscriber=subscriber,
        symbol=signal.symbol,
        interval=signal.interval,
        entry=signal.entry,
        strategy=signal.strategy,
        direction=signal.direction,
        strength=signal.strength,
        severity=severity,
        reference_price=signal.reference_price,
        title=f"{signal.symbol}: {signal.direction} at {close}",
        text=f"On the {bar} bar of {when}, {_why(signal)}. Close {close}, strength {signal.strength:.0%}.",
        occurred_at=closed_at,
        recorded_at=now,
    )


def _why(signal: SignalRaised) -> str:
    """What the strategy saw; in general words where we do not know it, or not with these parameters."""
    strategy = signal.strategy.split("@", 1)[0]
    try:
        return _WHY[strategy, signal.direction].format(**signal.params)
    except KeyError:
        return f"{strategy} saw its pattern"


def price(value: float) -> str:
    """A price for people: cents from one up, four digits below."""
    return f"{value:,.2f}" if math.fabs(value) >= 1 else f"{value:.4f}"


def worst(severities: Iterable[Severity]) -> Severity:
    """The most severe of several."""
    return Severity.CRITICAL if Severity.CRITICAL in set(severities) else Severity.INFO
