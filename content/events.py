"""What the content domain tells the house."""

from collections.abc import Sequence
from typing import ClassVar

from shared.events import Event, fact_id


class PostPublished(Event):
    """A post can be read; told again under the next version when it was corrected."""

    type: ClassVar[str] = "content.post_published.v1"
    source: ClassVar[str] = "/troop/content"

    post_id: str
    kind: str
    version: int
    title: str
    symbols: Sequence[str]

    @property
    def event_id(self) -> str:
        return fact_id(self.type, self.post_id, str(self.version))

    @property
    def subject(self) -> str:
        return f"posts/{self.kind}/{self.post_id}"
