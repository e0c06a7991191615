"""
What a domain wants told, past what the topic refuses for good.

An event that is refused would be refused again at every sweep, and would hold up those that are told together with
it. So it is kept as a dead letter, where people see it and can have it published after all, and counts as told.
"""

from collections.abc import Sequence

from shared.errors import PermanentError
from shared.events import Event, EventPublisher
from shared.inbound import DeadLetters


class Outbox:
    """
    An EventPublisher that buries what the topic refuses for good as letters of the domain *source*, and goes on.

    Trouble that passes, and wrong settings, are raised as ever: nothing is buried because of them.
    """

    def __init__(self, publisher: EventPublisher, letters: DeadLetters, source: str) -> None:
        self._publisher = publisher
        self._letters = letters
        self._source = source

    async def publish(self, events: Sequence[Event]) -> None:
        """
        Have every one of *events* taken by the topic or kept as a dead letter, in their order.

        What refuses many at once is halved until the one that is to blame stands alone; those beside it may be told
        twice, under the same ids.
        """
        if not events:
            return
        try:
            await self._publisher.publish(events)
        except PermanentError as e:
            if len(events) == 1:
                await self._letters.bury_unpublished(self._source, events[0], f"{type(e).__name__}: {e}")
                return
            middle = len(events) // 2
            await self.publish(events[:middle])
            await self.publish(events[middle:])

    async def close(self) -> None:
        await self._publisher.close()
