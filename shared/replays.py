"""
What operators do with dead letters: look, replay one or a range, discard.

A replay runs the very function that gave the event up, in this process, with the same id, source, time and data; it
does not publish the event again. Published again it would wake every hearer of its type, those too that have done it,
it would come back minutes later with an outcome nobody could tell from an ordinary delivery, and the topic would have
to carry a marker. Run here, the operator hears at once how it went. Only what never got onto the topic (origin
``outbox``) is published, for nobody has heard it yet. Replaying twice does no harm: effects are idempotent, and a
letter that was replayed is not run again.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import azure.functions as func

from shared.audit import Audit
from shared.clock import Clock, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    NotFoundError,
    PermanentError,
    StaleError,
    TransientError,
    TroopError,
)
from shared.events import Event, EventPublisher
from shared.inbound import CONTAINER, DeadLetters, RedeliverError, noted, replaying
from shared.telemetry import get_logger

log = get_logger(__name__)

KEEP = timedelta(days=90)
"""How long a letter is kept that is done with; an open one stays until somebody decides."""
SCANNED = 2000
"""Letters looked at for one answer; where more must be, the answer says where to go on."""
PAGE = 200
MOST = 100
"""Letters of one range."""
BUDGET = timedelta(seconds=8)
"""How long a range is worked on before it answers how far it got."""
OUTBOXES = ("market", "signals", "alerts", "content")
"""The domains whose events can lie here unpublished."""

CUT = frozenset({"shortened", "redacted", "unreadable"})
"""What stands in a letter where a payload could not be kept as it was."""

type Outcome = Literal["replayed", "already replayed", "refused again", "postponed", "impossible", "would replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which letters are meant; *since* and *until* are when they were buried."""

    source: str | None = None
    type: str | None = None
    state: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def fits(self, letter: Document) -> bool:
        """Whether it is one of them, whatever its time."""
        body = letter.body
        return (
            (self.source is None or body["source"] == self.source)
            and (self.type is None or body["event"].get("type") == self.type)
            and (self.state is None or body.get("state", "open") == self.state)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What became of one letter; ``reason`` says why, where it was not replayed."""

    outcome: Outcome
    letter: Document
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a range got; ``next`` is where to go on, None at its end."""

    results: list[Replayed]
    next: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """Where dead letters are dealt with."""

    documents: Documents
    letters: DeadLetters
    publisher: EventPublisher
    audit: Audit
    wall: Clock

    async def listed(self, wanted: Wanted, after: str | None, limit: int) -> tuple[list[Document], str | None]:
        """Letters newest first, and the position behind which there may be more."""
        return await self._scan(wanted, after, limit, newest_first=True)

    async def find(self, id_: str, source: str | None = None) -> Document:
        """
        One letter by its id; with *source* it is found at once.

        Raises:
            NotFoundError: there is none.

        """
        for partition in [source] if source else [*self.letters.handlers, *OUTBOXES]:
            try:
                return await self.documents.read(CONTAINER, partition, id_)
            except NotFoundError:
                continue
        if source is None:
            after: str | None = None
            for _ in range(0, SCANNED, PAGE):  # of a function that is no more
                page = await self.letters.newest(after=after, limit=PAGE)
                for letter in page:
                    if letter.id == id_:
                        return letter
                if len(page) < PAGE:
                    break
                after = page[-1].sort
        raise NotFoundError(f"there is no dead letter {id_[:80]}")

    async def replay(self, id_: str, actor: str, reason: str, source: str | None = None) -> Replayed:
        """
        Run one letter's function once more.

        Raises:
            NotFoundError: there is no such letter.
            TransientError: it could not be written down who does it.

        """
        letter = await self.find(id_, source)
        if (obstacle := self._obstacle(letter)) is not None:
            return obstacle
        details = {"source": letter.partition, "event_id": letter.body["event_id"]}
        await self.audit.record(actor, "deadletters.replay", id_, reason, details)
        return await self._replay(letter, actor, reason)

    async def replay_range(
        self, wanted: Wanted, actor: str, reason: str, *, limit: int = MOST, after: str | None = None, is_dry: bool
    ) -> Progress:
        """
        Replay up to *limit* open letters, the oldest first; a dry run only says which.

        What fails stays open and holds up no other. ``next`` goes on behind the last letter that was looked at.
        """
        open_ones = replace(wanted, state="open")
        found, position = await self._scan(open_ones, after, min(limit, MOST), newest_first=False)
        if is_dry:
            return Progress(results=[self._forecast(letter) for letter in found], next=position)
        details = {
            "source": wanted.source,
            "type": wanted.type,
            "since": wanted.since,
            "until": wanted.until,
            "letters": len(found),
        }
        await self.audit.record(actor, "deadletters.replay_range", wanted.source or "all", reason, details)
        deadline = self.wall.now() + BUDGET
        results: list[Replayed] = []
        for letter in found:
            if self.wall.now() >= deadline:
                return Progress(results=results, next=results[-1].letter.sort if results else after)
            results.append(self._obstacle(letter) or await self._replay(letter, actor, reason))
        return Progress(results=results, next=position)

    async def discard(self, id_: str, actor: str, reason: str, source: str | None = None) -> Document:
        """
        Decide that an event is not wanted; discarding again changes nothing.

        Raises:
            NotFoundError: there is no such letter.
            ConflictError: it was replayed.

        """
        letter = await self.find(id_, source)
        match letter.body.get("state", "open"):
            case "discarded":
                return letter
            case "replayed":
                raise ConflictError("this letter was replayed: there is nothing left to discard")
        details = {"source": letter.partition, "event_id": letter.body["event_id"]}
        await self.audit.record(actor, "deadletters.discard", id_, reason, details)
        return await self._write(letter, "discarded", actor, reason, "discarded")

    # --- replaying

    async def _replay(self, letter: Document, actor: str, reason: str) -> Replayed:
        trouble = await self._run(letter)
        if trouble is None:
            stored = await self._write(letter, "replayed", actor, reason, "done")
            log.info("letter.replayed", dead_letter_id=letter.id, source=letter.partition)
            return Replayed(outcome="replayed", letter=stored)
        is_over = isinstance(trouble, PermanentError)
        # What failed without a name of this house may say anything: the log has it.
        said = f"{type(trouble).__name__}: {trouble}" if isinstance(trouble, TroopError) else "unexpected trouble"
        stored = await self._write(letter, "open", actor, reason, said)
        return Replayed(
            outcome="refused again" if is_over else "postponed",
            letter=stored,
            reason=stored.body["history"][-1]["outcome"],
        )

    async def _run(self, letter: Document) -> Exception | None:
        """Do it; what it raised, or would have buried."""
        event = letter.body["event"]
        try:
            if letter.body.get("origin") == "outbox":
                await self.publisher.publish([_class_of(event["type"]).from_wire(event["type"], event["data"])])
                return None
            with replaying() as replay, suppress(RedeliverError):
                await self.letters.handlers[letter.partition](_revived(letter))
        except (TransientError, PermanentError, ConfigurationError) as e:
            return e
        except Exception as e:
            log.exception("letter.broke", dead_letter_id=letter.id, source=letter.partition)
            return e
        else:
            return replay.trouble

    def _forecast(self, letter: Document) -> Replayed:
        return self._obstacle(letter) or Replayed(outcome="would replay", letter=letter)

    def _obstacle(self, letter: Document) -> Replayed | None:
        """Why a letter is not run; None: nothing against it."""
        body = letter.body
        if body.get("state", "open") == "replayed":
            return Replayed(outcome="already replayed", letter=letter)
        why = None
        if body.get("state", "open") == "discarded":
            why = "it was discarded"
        elif not _is_whole(body["event"]):
            why = "its payload was shortened, or a secret was taken out of it: publish the event again"
        elif body.get("origin") != "outbox" and letter.partition not in self.letters.handlers:
            why = f"there is no function {letter.partition} in this version"
        elif body.get("origin") == "outbox" and _find_class(body["event"]["type"]) is None:
            why = f"there is no event {body['event']['type']} in this version"
        return Replayed(outcome="impossible", letter=letter, reason=why) if why else None

    async def _write(self, letter: Document, state: str, actor: str, reason: str, outcome: str) -> Document:
        """Note what was done; a twin that wrote first keeps its note, and ours goes behind it."""
        action = "discard" if state == "discarded" else "replay"
        for _ in range(5):
            now = self.wall.now()
            history = noted(letter.body, at=now, by=actor, action=action, outcome=outcome, reason=reason)
            # A letter that a twin has dealt with meanwhile stays dealt with.
            known = letter.body.get("state", "open")
            after = known if state == "open" else state
            body = {**letter.body, "state": after, "history": history}
            expires_at = None if after == "open" else now + KEEP
            try:
                return await self.documents.replace(CONTAINER, replace(letter, body=body, expires_at=expires_at))
            except StaleError:
                letter = await self.documents.read(CONTAINER, letter.partition, letter.id)
        raise StaleError("too many are at this letter at once: look at it again")

    # --- looking

    async def _scan(
        self, wanted: Wanted, after: str | None, limit: int, *, newest_first: bool
    ) -> tuple[list[Document], str | None]:
        first, last = _bounds(wanted, newest_first=newest_first)
        if first is not None and (after is None or (after < first) != newest_first):
            after = first
        found: list[Document] = []
        for _ in range(0, SCANNED, PAGE):
            page = await self._page(wanted.source, after, newest_first=newest_first)
            for letter in page:
                if last is not None and (letter.sort < last if newest_first else letter.sort >= last):
                    return found, None
                after = letter.sort
                if wanted.fits(letter):
                    found.append(letter)
                    if len(found) == limit:
                        return found, after
            if len(page) < PAGE:
                return found, None
        return found, after

    async def _page(self, source: str | None, after: str | None, *, newest_first: bool) -> list[Document]:
        if source is not None:
            return await self.documents.page(CONTAINER, source, after=after, newest_first=newest_first, limit=PAGE)
        return await self.documents.feed(CONTAINER, after=after, newest_first=newest_first, limit=PAGE)


def _is_whole(event: Mapping[str, Any]) -> bool:
    """Whether the letter holds the event as it was; those of earlier versions only show it by their data."""
    data = event.get("data")
    was_cut = isinstance(data, dict) and len(data) == 1 and not data.keys().isdisjoint(CUT)
    return bool(event.get("is_whole", not was_cut))


def _bounds(wanted: Wanted, *, newest_first: bool) -> tuple[str | None, str | None]:
    """The position to begin behind, and the one to end at."""
    since = sort_key(wanted.since) if wanted.since else None
    until = sort_key(wanted.until) if wanted.until else None
    return (until, since) if newest_first else (since, until)


def _revived(letter: Document) -> func.CloudEvent:
    """The event as the Functions worker handed it to the function."""
    event = letter.body["event"]
    return func.CloudEvent(
        id=letter.body["event_id"],
        source=event.get("source") or "",
        type=event["type"],
        specversion="1.0",
        data=event["data"],
        time=parse_instant(event["time"]) if event.get("time") else None,
        subject=event["subject"],
    )


def _class_of(type_: str) -> type[Event]:
    found = _find_class(type_)
    if found is None:
        raise NotFoundError(f"there is no event {type_[:80]} in this version")
    return found


def _find_class(type_: str) -> type[Event] | None:
    return next((cls for cls in _below(Event) if getattr(cls, "type", None) == type_), None)


def _below(cls: type[Event]) -> Iterator[type[Event]]:
    for below in cls.__subclasses__():
        yield below
        yield from _below(below)
