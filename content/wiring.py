"""Who stands in which place in the content domain."""

from dataclasses import dataclass
from datetime import timedelta

from content.adapters.documents import PostDocuments
from content.service import ContentService
from shared.inbound import DeadLetters
from shared.wiring import Core


@dataclass(frozen=True, slots=True, kw_only=True)
class Wired:
    """What the triggers need."""

    service: ContentService
    dead_letters: DeadLetters
    public_url: str


def wire(core: Core) -> Wired:
    """Build the content domain."""
    settings = core.settings
    service = ContentService(
        posts=PostDocuments(core.documents, timedelta(days=settings.retention_days)),
        publisher=core.outbox("content"),
        wall=core.wall,
        market=core.market_clock,
        live_from=settings.live_from_instant(),
        settle=timedelta(seconds=settings.content_digest_settle_seconds),
    )
    return Wired(service=service, dead_letters=core.dead_letters, public_url=settings.public_url.rstrip("/"))
