"""What can be set on the embedded service."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Timings and limits; the two quotas are off unless given."""

    max_connections: int | None = None
    max_messages_a_day: int | None = None
    keep_alive: timedelta = timedelta(seconds=12)
    handshake_timeout: timedelta = timedelta(seconds=15)
    connect_window: timedelta = timedelta(seconds=60)
    poll_hold: timedelta = timedelta(seconds=90)
    poll_grace: timedelta = timedelta(seconds=15)
    close_timeout: timedelta = timedelta(seconds=2)
    sweep_every: timedelta = timedelta(seconds=1)
    buffer_limit: int = 4 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_messages_a_day"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}: give a number from 0, or None for no limit")
        if self.buffer_limit <= 0:
            raise ValueError(f"buffer_limit is {self.buffer_limit}: give a number of bytes above 0")


DEFAULT = Options()
FREE_TIER = Options(max_connections=20, max_messages_a_day=20_000)
