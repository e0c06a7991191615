"""What providers refused for good: calls a key may not make, and symbols a provider does not know. Kept in storage."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents
from shared.errors import NotFoundError, TroopError
from shared.market.conditional import QUOTA, Change, changed
from shared.telemetry import get_logger, redact

log = get_logger(__name__)

UNKNOWN = "unknown"
"""The partition of symbols that providers do not know, one document a symbol."""
READ_AGAIN = timedelta(minutes=5)
"""How long a process goes on with what it read: what another instance learns costs this one a refused call at most."""
UNKNOWN_FOR = timedelta(days=1)
MOST = 200
"""How many refusals of one key are kept; more would be a mistake in naming parameters."""
REMEMBERED = 4096
"""How many symbols a process remembers to have been answered for, or not."""


def fingerprint(key: str, plan: str = "") -> str:
    """
    A short name of a key that does not give it away; with *plan*, of the key on that plan.

    Who buys a larger plan keeps the key, so the setting that says so must let the key try again.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{digest}-{plan}" if plan else digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An endpoint, or one parameter of it, that a provider's plan does not include."""

    endpoint: str
    parameter: str
    reason: str
    recorded_at: datetime


class Entitlements:
    """
    Remembers, for every instance and over restarts, what is not worth a call.

    *fingerprints* name each provider's key: a new key starts afresh. Reads go to storage at most every five
    minutes a provider; storage that is in trouble is no reason not to ask a provider.
    """

    def __init__(self, documents: Documents, wall: Clock, fingerprints: Mapping[str, str]) -> None:
        self._documents = documents
        self._wall = wall
        self._fingerprints = fingerprints
        self._refused: dict[str, dict[tuple[str, str], Refusal]] = {}
        self._read_at: dict[str, datetime] = {}
        self._known: set[tuple[str, str]] = set()
        self._unknown: dict[tuple[str, str], tuple[datetime, Mapping[str, datetime]]] = {}

    async def load(self, provider: str) -> None:
        """Make ``may`` know what is stored, at most five minutes old."""
        read_at, now = self._read_at.get(provider), self._wall.now()
        if read_at is not None and now - read_at < READ_AGAIN:
            return
        try:
            self._remember(provider, await self._read(provider))
        except NotFoundError:
            pass
        except TroopError as e:
            log.warning("entitlements.unread", provider=provider, reason=str(e))
            return
        self._read_at[provider] = now

    def refusal(self, provider: str, endpoint: str, parameter: str = "") -> Refusal | None:
        """Why the key may not use the endpoint with *parameter*; None: it may, as far as we have been told."""
        refused = self._refused.get(provider, {})
        return refused.get((endpoint, "")) or refused.get((endpoint, parameter))

    def refusals(self, provider: str) -> list[Refusal]:
        """All that is known to be refused to the provider's key."""
        return sorted(self._refused.get(provider, {}).values(), key=lambda r: (r.endpoint, r.parameter))

    async def learn(self, provider: str, endpoint: str, parameter: str, reason: str) -> None:
        """Never ask for this with this key again; the operator is told the first time any instance hears of it."""
        refusal = Refusal(
            endpoint=endpoint, parameter=parameter, reason=redact(reason)[:200], recorded_at=self._wall.now()
        )
        self._refused.setdefault(provider, {}).setdefault((endpoint, parameter), refusal)
        line = {
            "endpoint": endpoint,
            "parameter": parameter,
            "reason": refusal.reason,
            "recorded_at": format_instant(refusal.recorded_at),
        }

        def added(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            known = any((r["endpoint"], r["parameter"]) == (endpoint, parameter) for r in body.get("refused", ()))
            return None if known else {"refused": [*body.get("refused", ()), line][-MOST:]}

        if await self._change(provider, self._id(provider), added):
            log.warning(
                "provider.not_entitled",
                provider=provider,
                endpoint=endpoint,
                parameter=parameter or None,
                reason=refusal.reason,
            )

    async def unknown(self, kind: str, symbol: str) -> Mapping[str, datetime]:
        """The providers that said in the last day that they know no such symbol, and until when we believe it."""
        if (kind, symbol) in self._known:
            return {}
        now = self._wall.now()
        read_at, found = self._unknown.get((kind, symbol), (None, {}))
        if read_at is None or now - read_at >= READ_AGAIN:
            try:
                stored = (await self._documents.read(QUOTA, UNKNOWN, symbol)).body
            except NotFoundError:
                stored = {}
            except TroopError as e:
                log.warning("entitlements.unread", symbol=symbol, reason=str(e))
                return found
            found = {name: parse_instant(until) for name, until in stored.get(kind, {}).items()}
            self._note((kind, symbol), found)
        return {name: until for name, until in found.items() if until > now}

    async def learn_unknown(self, provider: str, kind: str, symbol: str) -> None:
        """Do not ask the provider for this symbol for a day."""
        now = self._wall.now()
        until = now + UNKNOWN_FOR
        self._known.discard((kind, symbol))
        _, found = self._unknown.get((kind, symbol), (None, {}))
        self._note((kind, symbol), {**found, provider: until})

        def added(body: Mapping[str, Any]) -> Mapping[str, Any]:
            lasting = {name: at for name, at in body.get(kind, {}).items() if parse_instant(at) > now}
            return {**body, kind: {**lasting, provider: format_instant(until)}}

        await self._change(UNKNOWN, symbol, added, expires_at=until)

    def known(self, kind: str, symbol: str) -> None:
        """Somebody answered for the symbol: if nobody denied it, it needs no looking up while this process lives."""
        if self._unknown.get((kind, symbol), (None, {}))[1]:
            return
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known.add((kind, symbol))

    def _note(self, key: tuple[str, str], found: Mapping[str, datetime]) -> None:
        if len(self._unknown) >= REMEMBERED:
            self._unknown.clear()
        self._unknown[key] = (self._wall.now(), found)

    def _id(self, provider: str) -> str:
        return f"entitlements-{self._fingerprints.get(provider, 'no-key')}"

    async def _read(self, provider: str) -> Document:
        return await self._documents.read(QUOTA, provider, self._id(provider))

    def _remember(self, provider: str, document: Document) -> None:
        refused = self._refused.setdefault(provider, {})
        for r in document.body.get("refused", ()):
            at = parse_instant(r["recorded_at"])
            refused[r["endpoint"], r["parameter"]] = Refusal(
                endpoint=r["endpoint"], parameter=r["parameter"], reason=r["reason"], recorded_at=at
            )

    async def _change(self, partition: str, id: str, change: Change, *, expires_at: datetime | None = None) -> bool:
        """Whether *change* was written; what cannot be written is known to this process all the same."""
        try:
            return await changed(self._documents, self._wall, partition, id, change, expires_at=expires_at) is not None
        except TroopError as e:
            log.warning("entitlements.unwritten", partition=partition, reason=str(e))
            return False
