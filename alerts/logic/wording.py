"""What we say. Pure; every number in the text comes from the signal."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from alerts.models import Alert, Severity, alert_id, endpoint_alert_id, rule_alert_id
from alerts.subscriptions import Crossing, Endpoint, Kind, Subscription
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


def word(
    signal: SignalRaised,
    subscriber: str,
    severity: Severity,
    *,
    now: datetime,
    subscription_ids: Sequence[str] = (),
) -> Alert:
    """Word a signal for a subscriber."""
    close = price(signal.reference_price)
    closed_at = signal.occurred_at.astimezone(UTC)
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
        text=f"{_on(signal.interval, closed_at)}, {_why(signal)}. Close {close}, strength {signal.strength:.0%}.",
        occurred_at=closed_at,
        recorded_at=now,
        confidence=getattr(signal, "confidence", None),
        subscription_ids=tuple(subscription_ids),
    )


def word_rule(
    asked: Subscription,
    symbol: str,
    interval: str,
    crossing: Crossing,
    close: float,
    *,
    now: datetime,
) -> Alert:
    """Word what a rule about bars saw, for its owner."""
    shown = price(close)
    titles = {
        Kind.PRICE: f"{symbol}: price {'above' if crossing.direction == 'long' else 'below'}, at {shown}",
        Kind.MOVE: f"{symbol}: moved {crossing.value:+.2f} %, at {shown}",
        Kind.VOLUME: f"{symbol}: {crossing.value:.1f} times the usual volume, at {shown}",
    }
    fired_at = crossing.fired_at.astimezone(UTC)
    return Alert(
        alert_id=rule_id(asked, symbol, interval, crossing),
        signal_id="",
        subscriber=asked.subscriber,
        symbol=symbol,
        interval=interval,
        entry="",
        strategy=f"{asked.kind}@1",
        direction=crossing.direction,
        strength=1.0,
        severity=asked.severity,
        reference_price=close,
        title=titles[asked.kind],
        text=f"{_on(interval, fired_at)}, {crossing.reason}.",
        occurred_at=fired_at,
        recorded_at=now,
        kind=str(asked.kind),
        subscription_ids=(asked.subscription_id,),
    )


def rule_id(asked: Subscription, symbol: str, interval: str, crossing: Crossing) -> str:
    """The alert that a rule raised when it fired; its resolve leads to the same."""
    side = crossing.direction if asked.kind in (Kind.PRICE, Kind.MOVE) else ""
    return rule_alert_id(str(asked.kind), asked.subscription_id, symbol, interval, side, crossing.fired_at)


def word_disabled(endpoint: Endpoint, *, now: datetime, market_now: datetime) -> Alert:
    """Tell the owner of an endpoint that nothing is sent there any more."""
    reason = endpoint.disabled_reason or "it failed too often"
    return Alert(
        alert_id=endpoint_alert_id(endpoint.endpoint_id, endpoint.first_failed_at),
        signal_id="",
        subscriber=endpoint.subscriber,
        symbol="",
        interval="",
        entry="",
        strategy="",
        direction="",
        strength=0.0,
        severity=Severity.WARNING,
        reference_price=0.0,
        title=f"Your {endpoint.channel} address was switched off",
        text=f"Nothing is sent to {endpoint.shown} any more: {reason}. Set the address again to switch it on.",
        occurred_at=market_now,
        recorded_at=now,
        kind="system",
    )


def word_digest(alerts: Sequence[Alert], digest_id: str, *, now: datetime) -> Alert:
    """One message for several alerts of a subscriber, the oldest first."""
    last = alerts[-1]
    symbols = list(dict.fromkeys(alert.symbol for alert in alerts))
    named = ", ".join(symbols[:5]) + (f" and {len(symbols) - 5} more" if len(symbols) > 5 else "")
    count = "1 alert" if len(alerts) == 1 else f"{len(alerts)} alerts"
    return replace(
        last,
        alert_id=digest_id,
        signal_id="",
        severity=worst(alert.severity for alert in alerts),
        title=f"{count}: {named}",
        text="\n".join(f"{alert.title}. {alert.text}" for alert in alerts),
        occurred_at=last.occurred_at,
        recorded_at=now,
        kind="digest",
        version=1,
        subscription_ids=tuple(dict.fromkeys(id_ for alert in alerts for id_ in alert.subscription_ids)),
        trail=(),
        resolved_at=None,
        acknowledged_by=None,
        acknowledged_at=None,
    )


def resolved(alert: Alert, note: str, *, now: datetime) -> Alert:
    """What an alert says once what it told is over."""
    return replace(
        alert,
        version=alert.version + 1,
        title=f"{alert.title} (over)",
        text=f"{alert.text} Over: {note.rstrip('.')}.",
        resolved_at=now,
    )


def _on(interval: str, closed_at: datetime) -> str:
    bar = _BAR.get(interval, interval)
    when = f"{closed_at:%Y-%m-%d}" if interval == "1d" else f"{closed_at:%Y-%m-%d %H:%M} UTC"
    return f"On the {bar} bar of {when}"


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


_RANK = {Severity.INFO: 0, Severity.WARNING: 1, Severity.CRITICAL: 2}


def worst(severities: Iterable[Severity]) -> Severity:
    """The most severe of several."""
    return max(severities, key=_RANK.__getitem__, default=Severity.INFO)
