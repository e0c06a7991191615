"""Test messages: does a subscriber's own address work? Sent at once, stored nowhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import uuid4

from alerts.items import item_of
from alerts.models import Alert, Record, Severity, delivery_id
from alerts.ports import Channel, Directory, Message
from shared.clock import Clock
from shared.documents import Document, sort_key
from shared.errors import InvalidPayloadError, NotFoundError, RecipientGoneError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialMessages:
    """Sends test messages by the channels that there are."""

    directory: Directory
    channels: Mapping[str, Channel]
    wall: Clock
    market: Clock

    async def send_test(self, subscriber: str, channel: str) -> None:
        """
        Send a test message; its outcome is the answer, nothing is tried again; an address that is gone is disabled.

        Raises:
            NotFoundError: there is no address, or a disabled one.
            InvalidPayloadError: this house sends nothing by this channel.
            TroopError: what the channel says.

        """
        if channel not in self.channels:
            raise InvalidPayloadError(f"{channel} is not set up here, so nothing can be sent by it: ask the operator")
        address = await self.directory.address(subscriber, channel)
        if address is None:
            raise NotFoundError(f"there is no {channel} address that is enabled: PUT one first")
        alert = self._alert(subscriber)
        record = Record(
            alert=alert,
            deliveries=(),
            document=Document(
                id=alert.alert_id, partition=subscriber, sort=sort_key(alert.recorded_at, alert.alert_id)
            ),
        )
        message = Message(
            alert=alert, item=item_of(record), delivery_id=delivery_id(alert.alert_id, channel), to=address
        )
        try:
            await self.channels[channel].send(message)
        except RecipientGoneError as e:
            # As from an alert: where nobody is any more is not asked again.
            now = self.wall.now()
            await self.directory.failed(subscriber, channel, str(e), now, is_gone=True, seal=address.seal)
            raise

    def _alert(self, subscriber: str) -> Alert:
        return Alert(
            alert_id=str(uuid4()),
            signal_id="",
            subscriber=subscriber,
            symbol="",
            interval="",
            entry="",
            strategy="",
            direction="",
            strength=0.0,
            severity=Severity.INFO,
            reference_price=0.0,
            title="A test message",
            text="You asked for it. Alerts will reach you here.",
            occurred_at=self.market.now(),
            recorded_at=self.wall.now(),
            kind="system",
        )
