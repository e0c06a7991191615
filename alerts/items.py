"""Alerts in the form that the API lists and channels carry."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from alerts.models import Alert, Attempt, Decision, Delivery, Record
from shared.clock import format_instant
from shared.http import cursor_of


def item_of(record: Record) -> dict[str, Any]:
    """An alert as the API lists it and the hub pushes it, with the deliveries of its first version."""
    a: Alert = record.alert
    return {
        "alert_id": a.alert_id,
        "kind": a.kind,
        "version": a.version,
        "signal_id": a.signal_id,
        "subscriber": a.subscriber,
        "symbol": a.symbol,
        "interval": a.interval,
        "entry": a.entry,
        "strategy": a.strategy,
        "direction": a.direction,
        "strength": a.strength,
        "confidence": a.confidence,
        "severity": a.severity.value,
        "reference_price": a.reference_price,
        "title": a.title,
        "text": a.text,
        "occurred_at": format_instant(a.occurred_at),
        "recorded_at": format_instant(a.recorded_at),
        "resolved_at": _shown(a.resolved_at),
        "acknowledged_at": _shown(a.acknowledged_at),
        "cursor": cursor_of(record.sort),
        "deliveries": [
            {
                "channel": d.channel,
                "state": d.state.value,
                "reason": d.reason,
                "attempts": d.attempts,
                "sent_at": _shown(d.sent_at),
            }
            for d in record.deliveries
            if d.version == 1
        ],
    }


def log_of(record: Record) -> list[dict[str, Any]]:
    """Every delivery of an alert with its attempts."""
    return [
        {
            "delivery_id": d.delivery_id,
            "channel": d.channel,
            "version": d.version,
            "state": d.state.value,
            "rule": d.rule,
            "by": d.by,
            "reason": d.reason,
            "attempts": d.attempts,
            "doubts": d.doubts,
            "is_possible_repeat": bool(d.doubts) and d.attempts > 1,
            "due_at": _shown(d.due_at),
            "sent_at": _shown(d.sent_at),
            "log": [_attempt(attempt) for attempt in d.attempts_log],
        }
        for d in record.deliveries
    ]


def explanation_of(record: Record) -> dict[str, Any]:
    """Every decision about an alert, with its reason: on the whole, then of each delivery."""
    a = record.alert
    return {
        "alert_id": a.alert_id,
        "subscriber": a.subscriber,
        "title": a.title,
        "kind": a.kind,
        "version": a.version,
        "severity": a.severity.value,
        "occurred_at": format_instant(a.occurred_at),
        "recorded_at": format_instant(a.recorded_at),
        "subscription_ids": list(a.subscription_ids),
        "decisions": _decisions(a.trail),
        "deliveries": [
            {
                "channel": d.channel,
                "version": d.version,
                "state": d.state.value,
                "because": because(d),
                "rule": d.rule,
                "by": d.by,
                "reason": d.reason,
                "decisions": _decisions(d.trail),
            }
            for d in record.deliveries
        ],
    }


def because(d: Delivery) -> str:
    """Where a delivery stands and why, in one sentence."""
    said = {
        "PENDING": "it waits for its time",
        "CLAIMED": "an instance is about to send it",
        "SENDING": "it is being sent",
        "SENT": f"{d.channel} took it",
        "RETRY_AT": "it is tried again",
        "UNKNOWN": "nobody knows whether it arrived" + ("" if d.is_over else "; it is sent again"),
        "EXPIRED": "it was no news any more",
        "SUPPRESSED": f"the rule {d.rule} held it back",
        "DEAD": f"{d.channel} will not take it",
        "DISABLED": "nobody is to be reached there",
    }[d.state]
    when = f" at {format_instant(d.due_at)}" if d.due_at and d.state in ("PENDING", "RETRY_AT") else ""
    why = d.reason or (d.trail[-1].reason if d.trail and d.state == "PENDING" else None)
    return f"{said}{when}: {why}" if why else f"{said}{when}"


def _decisions(trail: Sequence[Decision]) -> list[dict[str, Any]]:
    return [{"at": format_instant(d.at), "rule": d.rule, "outcome": d.outcome, "reason": d.reason} for d in trail]


def _attempt(a: Attempt) -> dict[str, Any]:
    return {
        "number": a.number,
        "started_at": format_instant(a.started_at),
        "ended_at": _shown(a.ended_at),
        "outcome": a.outcome,
        "reason": a.reason,
        "provider_id": a.provider_id,
    }


def _shown(instant: datetime | None) -> str | None:
    return format_instant(instant) if instant else None
