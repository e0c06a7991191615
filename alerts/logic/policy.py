"""
Whether now is the moment for an alert, with every reason. Pure.

Rules are asked in this order; the first that speaks against it decides:

    mute          silence by its subscriber or an operator            SUPPRESS
    unsubscribed  nothing asks for it (any more), or no address       SUPPRESS
    disabled      its endpoint was switched off                       SUPPRESS
    cooldown      too near to another of the subscription and symbol  SUPPRESS, by that alert
    cap           the day of the subscriber's zone has its share      SUPPRESS, by the alert that took the last place
    digest        gathered with others                                DIGEST, until its bucket closes
    freshness     older than the subscription allows                  EXPIRE
    quiet_hours   the subscriber's night                              HOLD until its end, or EXPIRE if that is too late

A critical alert passes cooldown, cap, digest and quiet hours and takes no place in any window: it never waits and never
keeps a lesser one out. Mutes and freshness hold for it too: who mutes means it, and old news is no news.

Cooldowns and caps compare when alerts occurred, never when they arrived. A place once taken is kept, so in any order of
arrival no two alerts within a cooldown and no more than a cap's number in a day are let through; what comes so late
that the places around it are no longer kept is held back as well. The same alert judged again has its place.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any

from alerts.logic.quiet import Span, quiet_until
from alerts.models import PUBLIC, Decision, Severity
from alerts.subscriptions import ADDRESSED, Digest, Listener, Match, Mute, Place, Subscription, Window, Windows
from shared.events import fact_id

LONGEST_COOLDOWN = timedelta(days=30)
PLACES = 8
"""Places that a cooldown keeps."""
CAP_PLACES = 64
"""Places that a cap keeps at least; four times its number if that is more."""
ALL_PLACES = 2_000
"""Places that are kept of a subscriber in all: they are one document, written with every alert they let through."""
KEPT_FOR = 2 * LONGEST_COOLDOWN
"""A key whose last place lies so far behind the newest of all is no longer kept."""


class Kind(IntEnum):
    """What becomes of an alert now; of several subscriptions that hear it, the one with the highest decides."""

    SUPPRESS = 0
    EXPIRE = 1
    DIGEST = 2
    HOLD = 3
    SEND = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """
    What becomes of an alert now, and why.

    ``until`` is the market instant at which to judge a held or gathered one again, ``by`` the alert because of which
    it is suppressed, ``deadline`` the last market instant at which it may be sent (None: any). ``windows`` are to be
    stored together with the alert; they are the very object given when nothing changed.
    """

    kind: Kind
    rule: str | None = None
    reason: str
    by: str | None = None
    until: datetime | None = None
    bucket_id: str | None = None
    deadline: datetime | None = None
    decisions: tuple[Decision, ...] = ()
    windows: Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """What is judged, and when."""

    listener: Listener
    windows: Windows
    alert_id: str
    closed_at: datetime
    market_now: datetime
    allowance: timedelta
    channel: str | None
    is_accepted: bool
    in_bucket: str | None
    held_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """What one rule, or all of them together, say of one match."""

    kind: Kind
    rule: str | None = None
    reason: str
    by: str | None = None
    until: datetime | None = None
    bucket_id: str | None = None
    deadline: datetime | None = None


def judge(  # noqa: PLR0913 - what one judgement rests on, each named
    matches: Sequence[Match],
    listener: Listener,
    windows: Windows,
    *,
    alert_id: str,
    closed_at: datetime,
    market_now: datetime,
    allowance: timedelta,
    channel: str | None = None,
    is_accepted: bool = False,
    in_bucket: str | None = None,
    held_at: datetime | None = None,
) -> Verdict:
    """
    Judge an alert for one channel (None: for one that has no habits and needs no address).

    *allowance* is how old an alert may be in any case, because it is merely on its way. *is_accepted*: it was let
    through before and waited, so it has its place and its digest (*in_bucket*), if it has closed, is due; so are the
    quiet hours that held it last, at *held_at*, if they have ended within the allowance. Judge the
    channels of one alert one after the other, each with the windows that the one before left: an alert takes one
    place, whatever its channels.
    """
    case = _Case(
        listener=listener,
        windows=windows,
        alert_id=alert_id,
        closed_at=closed_at,
        market_now=market_now,
        allowance=allowance,
        channel=channel,
        is_accepted=is_accepted,
        in_bucket=in_bucket,
        held_at=held_at,
    )
    mine = [m for m in matches if channel is None or channel in m.subscription.channels]
    if not mine:
        finding = _Finding(kind=Kind.SUPPRESS, rule="unsubscribed", reason="no subscription asks for it (any more)")
        return _verdict(finding, [_decision(case, finding)], windows)
    decisions: list[Decision] = []
    findings: list[tuple[Match, _Finding]] = []
    for match in mine:
        finding, told = _judge_one(case, match)
        findings.append((match, finding))
        name = f"subscription {match.subscription.subscription_id}: " if len(mine) > 1 else ""
        decisions += [replace(one, reason=f"{name}{one.reason}") for one in told]
    best = max((finding for _, finding in findings), key=lambda finding: finding.kind)
    if best.kind >= Kind.DIGEST and not is_accepted:
        for match, finding in findings:
            if finding.kind is best.kind:
                windows = _taken(windows, case, match.subscription, match.symbol)
    return _verdict(best, decisions, windows)


def digest_of(asked: Subscription, channel: str | None) -> Digest:
    """How a subscription's alerts are gathered on a channel: as it says, else by day for e-mail and not elsewhere."""
    if asked.digest is not None:
        return asked.digest
    return Digest.DAY if channel == "email" else Digest.NONE


def bucket_id(subscriber: str, channel: str | None, digest: Digest, start: datetime) -> str:
    """One digest a subscriber, channel and period (docs/events.md)."""
    return fact_id("digest-bucket", subscriber, channel or "", digest, f"{start.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}")


def covers(mute: Mute, match: Match, market_now: datetime) -> bool:
    """Whether a mute silences this now."""
    return (
        market_now < mute.until
        and (mute.symbols is None or match.symbol in mute.symbols)
        and (mute.entries is None or match.entry in mute.entries)
    )


def _judge_one(case: _Case, match: Match) -> tuple[_Finding, list[Decision]]:
    """What the rules together say of one match, with the decision of every rule that had something to say."""
    told = [Decision(at=case.market_now, rule="match", outcome="heard", reason=match.reason)]
    is_critical = match.subscription.severity is Severity.CRITICAL
    if found := _mute(case, match) or _endpoint(case):
        return found, [*told, _decision(case, found)]
    if is_critical:
        passed = "critical alerts pass cooldown, cap, digest and quiet hours"
        told.append(Decision(at=case.market_now, rule="critical", outcome="passed", reason=passed))
    elif found := (None if case.is_accepted else _cooldown(case, match) or _cap(case, match)) or _digest(case, match):
        return found, [*told, _decision(case, found)]
    found = _timing(case, match, is_critical=is_critical)
    return found, [*told, _decision(case, found)]


def _mute(case: _Case, match: Match) -> _Finding | None:
    for mute in case.listener.mutes:
        if covers(mute, match, case.market_now):
            why = f": {mute.reason}" if mute.reason else ""
            return _Finding(
                kind=Kind.SUPPRESS,
                rule="mute",
                by=mute.mute_id,
                reason=f"muted by {mute.author} until {_shown(mute.until)}{why}",
            )
    return None


def _endpoint(case: _Case) -> _Finding | None:
    if case.channel not in ADDRESSED or case.listener.subscriber == PUBLIC:
        return None
    endpoint = case.listener.endpoints.get(case.channel)
    if endpoint is None:
        return _Finding(
            kind=Kind.SUPPRESS, rule="unsubscribed", reason=f"{case.listener.subscriber} has no {case.channel} address"
        )
    if not endpoint.is_enabled:
        why = endpoint.disabled_reason or "it was switched off"
        return _Finding(
            kind=Kind.SUPPRESS,
            rule="disabled",
            by=endpoint.endpoint_id,
            reason=f"the {case.channel} address {endpoint.shown} is disabled: {why}",
        )
    return None


def _cooldown(case: _Case, match: Match) -> _Finding | None:
    asked = match.subscription
    if asked.cooldown is None:
        return None
    window = _window(case.windows, _cooldown_key(asked, match.symbol))
    if _has_place(window, case.alert_id):
        return None
    for place in window.places:
        if abs(place.at - case.closed_at) < asked.cooldown:
            return _Finding(
                kind=Kind.SUPPRESS,
                rule="cooldown",
                by=place.alert_id,
                reason=f"within {_long(asked.cooldown)} of {match.symbol}'s alert of {_shown(place.at)}",
            )
    if window.forgotten is not None and case.closed_at < window.forgotten + asked.cooldown:
        return _late("cooldown", window.forgotten)
    return None


def _cap(case: _Case, match: Match) -> _Finding | None:
    """The cap of the subscription, then the one over all subscriptions."""
    zone = case.listener.preferences.zone
    caps = (
        (match.subscription.cap_per_day, _cap_key(match.subscription), "this subscription"),
        (case.listener.preferences.cap_per_day, _cap_key(None), "all subscriptions together"),
    )
    for cap, key, whose in caps:
        if cap is None:
            continue
        window = _window(case.windows, key)
        if _has_place(window, case.alert_id):
            continue
        day = Span.day(case.closed_at, zone)
        taken = [place for place in window.places if place.at in day]
        if len(taken) >= cap:
            return _Finding(
                kind=Kind.SUPPRESS,
                rule="cap",
                by=taken[cap - 1].alert_id if cap else None,
                reason=f"{whose} may send {cap} a day, and that many occurred on this day ({zone}) before it came",
            )
        if window.forgotten is not None and day.start <= window.forgotten:
            return _late("cap", window.forgotten)
    return None


def _digest(case: _Case, match: Match) -> _Finding | None:
    wanted = digest_of(match.subscription, case.channel)
    if wanted is Digest.NONE:
        return None
    span = _bucket(case, wanted, case.closed_at)
    if span.end <= case.market_now:
        # Its own digest has gone out: it goes, or went, into the one that is open.
        span = _bucket(case, wanted, case.market_now)
        if case.is_accepted and case.in_bucket != _bucket_id(case, wanted, span):
            return None
    return _Finding(
        kind=Kind.DIGEST,
        rule="digest",
        until=span.end,
        bucket_id=_bucket_id(case, wanted, span),
        reason=f"gathered into the digest of the {wanted} that closes at {_shown(span.end)}",
    )


def _timing(case: _Case, match: Match, *, is_critical: bool) -> _Finding:
    """Freshness and quiet hours; a digest is about what was, so its alerts do not get old."""
    asked = match.subscription
    deadline: datetime | None = None
    if asked.freshness is not None and (is_critical or digest_of(asked, case.channel) is Digest.NONE):
        deadline = case.closed_at + max(asked.freshness, case.allowance)
        if case.market_now > deadline:
            return _Finding(
                kind=Kind.EXPIRE,
                rule="freshness",
                deadline=deadline,
                reason=f"it occurred at {_shown(case.closed_at)} and was news until {_shown(deadline)}",
            )
    end = None if is_critical or _has_sat_out(case) else quiet_until(case.listener.preferences, case.market_now)
    if end is None:
        return _Finding(kind=Kind.SEND, deadline=deadline, reason="nothing speaks against it")
    hours = f"quiet hours of {case.listener.subscriber} until {_shown(end)}"
    if deadline is not None and end > deadline:
        return _Finding(
            kind=Kind.EXPIRE,
            rule="quiet_hours",
            deadline=deadline,
            reason=f"{hours}; it is news until {_shown(deadline)} only",
        )
    return _Finding(kind=Kind.HOLD, rule="quiet_hours", until=end, deadline=deadline, reason=hours)


def _has_sat_out(case: _Case) -> bool:
    """
    Whether the quiet hours that held it have ended, and it is merely on its way since.

    In a fast replay the next look may fall into the next night, and the one behind it too: it would wait for ever.
    """
    ended = quiet_until(case.listener.preferences, case.held_at) if case.held_at else None
    return ended is not None and ended <= case.market_now <= ended + case.allowance


def _bucket_id(case: _Case, digest: Digest, span: Span) -> str:
    return bucket_id(case.listener.subscriber, case.channel, digest, span.start)


def _bucket(case: _Case, digest: Digest, instant: datetime) -> Span:
    return Span.hour(instant) if digest is Digest.HOUR else Span.day(instant, case.listener.preferences.zone)


# --- windows


def windows_body(windows: Windows) -> dict[str, Any]:
    """Windows as they are stored."""
    return {
        "by_key": {
            key: {
                "places": [[_written(place.at), place.alert_id] for place in window.places],
                "forgotten": _written(window.forgotten),
            }
            for key, window in windows.by_key.items()
        },
        "forgotten": _written(windows.forgotten),
    }


def windows_of(body: Mapping[str, Any]) -> Windows:
    """Windows as they were stored; an empty body is none."""
    return Windows(
        by_key={
            key: Window(
                places=tuple(Place(at=datetime.fromisoformat(at), alert_id=id_) for at, id_ in window["places"]),
                forgotten=_read(window["forgotten"]),
            )
            for key, window in body.get("by_key", {}).items()
        },
        forgotten=_read(body.get("forgotten")),
    )


def _written(instant: datetime | None) -> str | None:
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z") if instant else None


def _read(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _cooldown_key(asked: Subscription, symbol: str) -> str:
    return f"cooldown|{asked.subscription_id}|{symbol}"


def _cap_key(asked: Subscription | None) -> str:
    return f"cap|{asked.subscription_id if asked else ''}"


def _window(windows: Windows, key: str) -> Window:
    return windows.by_key.get(key) or Window(forgotten=windows.forgotten)


def _has_place(window: Window, alert_id: str) -> bool:
    return any(place.alert_id == alert_id for place in window.places)


def _taken(windows: Windows, case: _Case, asked: Subscription, symbol: str) -> Windows:
    """The windows in which an alert that was let through by a subscription has its places."""
    if asked.severity is Severity.CRITICAL:
        return windows
    overall = case.listener.preferences.cap_per_day
    wanted = {
        key: most
        for key, limit, most in (
            (_cooldown_key(asked, symbol), asked.cooldown, PLACES),
            (_cap_key(asked), asked.cap_per_day, max(CAP_PLACES, 4 * (asked.cap_per_day or 0))),
            (_cap_key(None), overall, max(CAP_PLACES, 4 * (overall or 0))),
        )
        if limit is not None and not _has_place(_window(windows, key), case.alert_id)
    }
    if not wanted:
        return windows
    mine = Place(at=case.closed_at, alert_id=case.alert_id)
    by_key = {**windows.by_key, **{key: _with(_window(windows, key), mine, most) for key, most in wanted.items()}}
    return _pruned(replace(windows, by_key=by_key), wanted)


def _with(window: Window, mine: Place, most: int) -> Window:
    """One place more; beyond *most* the earliest of the others are forgotten."""
    places, forgotten = window.places, window.forgotten
    while len(places) >= most:
        earliest = min(places, key=lambda place: place.at)
        places = tuple(place for place in places if place is not earliest)
        forgotten = max(earliest.at, forgotten or earliest.at)
    return Window(places=(*places, mine), forgotten=forgotten)


def _pruned(windows: Windows, fresh: Collection[str]) -> Windows:
    """Without the keys that lie far behind, or furthest behind where there are too many places; never the *fresh*."""
    last = {key: max(place.at for place in window.places) for key, window in windows.by_key.items()}
    horizon = max(last.values()) - KEPT_FOR
    count = sum(len(window.places) for window in windows.by_key.values())
    kept, forgotten = dict(windows.by_key), windows.forgotten
    for key in sorted(last.keys() - set(fresh), key=last.__getitem__):
        if last[key] >= horizon and count <= ALL_PLACES:
            break
        count -= len(kept.pop(key).places)
        forgotten = max(last[key], forgotten or last[key])
    return Windows(by_key=kept, forgotten=forgotten)


# --- words


def _late(rule: str, forgotten: datetime) -> _Finding:
    return _Finding(
        kind=Kind.SUPPRESS,
        rule=rule,
        reason=f"it came so late that alerts of about its time, up to {_shown(forgotten)}, are no longer counted",
    )


def _decision(case: _Case, finding: _Finding) -> Decision:
    outcome = finding.kind.name.lower()
    return Decision(at=case.market_now, rule=finding.rule or "send", outcome=outcome, reason=finding.reason)


def _verdict(finding: _Finding, decisions: Sequence[Decision], windows: Windows) -> Verdict:
    return Verdict(
        kind=finding.kind,
        rule=finding.rule,
        reason=finding.reason,
        by=finding.by,
        until=finding.until,
        bucket_id=finding.bucket_id,
        deadline=finding.deadline,
        decisions=tuple(decisions),
        windows=windows,
    )


def _shown(instant: datetime) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _long(span: timedelta) -> str:
    minutes = span // timedelta(minutes=1)
    for size, name in ((1440, "day"), (60, "hour"), (1, "minute")):
        if minutes >= size and minutes % size == 0:
            count = minutes // size
            return f"{count} {name}" + ("s" if count > 1 else "")
    return f"{span.total_seconds():g} seconds"


type Verdicts = Mapping[str, Verdict]


def judge_channels(
    matches: Sequence[Match],
    listener: Listener,
    windows: Windows,
    *,
    alert_id: str,
    closed_at: datetime,
    market_now: datetime,
    allowance: timedelta,
) -> tuple[Verdicts, Windows]:
    """Judge a new alert for every channel that its subscriptions name, in their order; and the windows after it."""
    verdicts: dict[str, Verdict] = {}
    for channel in dict.fromkeys(c for match in matches for c in match.subscription.channels):
        verdicts[channel] = verdict = judge(
            matches,
            listener,
            windows,
            alert_id=alert_id,
            closed_at=closed_at,
            market_now=market_now,
            allowance=allowance,
            channel=channel,
        )
        windows = verdict.windows
    return verdicts, windows
