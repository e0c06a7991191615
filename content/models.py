"""What the content domain thinks with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum

from shared.documents import Document
from shared.events import fact_id


class Kind(StrEnum):
    """What a post is about: one signal, or one exchange session."""

    SIGNAL = "signal"
    DIGEST = "digest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What is known of one signal: the only source of every number in a post."""

    signal_id: str
    symbol: str
    interval: str
    entry: str
    strategy: str
    direction: str
    strength: float
    reference_price: float
    params: Mapping[str, float]
    features: Mapping[str, float]
    provider: str
    session: date
    occurred_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A rendered post."""

    title: str
    summary: str
    html: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """A post with the facts it was made from."""

    post_id: str
    kind: Kind
    version: int
    session: date
    symbols: Sequence[str]
    signal_ids: Sequence[str]
    text: Text
    occurred_at: datetime
    recorded_at: datetime
    updated_at: datetime
    due_at: datetime | None = None
    document: Document | None = None

    @property
    def sort(self) -> str:
        return self.document.sort if self.document else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A digest to be written once the signals of its session have had time to arrive."""

    session: date
    closed_at: datetime
    due_at: datetime
    document: Document | None = None


def signal_post_id(signal_id: str) -> str:
    """One post a signal (docs/events.md)."""
    return fact_id("post", Kind.SIGNAL, signal_id)


def digest_post_id(exchange: str, session: date) -> str:
    """One digest an exchange session (docs/events.md)."""
    return fact_id("post", Kind.DIGEST, exchange, session.isoformat())
