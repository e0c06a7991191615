"""A hub: who is connected, who is in which group, and who hears a message."""

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from infra.local.signalr import protocol
from infra.local.signalr.connections import Connection, Outbox
from infra.local.signalr.memberships import Memberships
from infra.local.signalr.protocol import HubProtocol, Record

_PIECE = 2048
_SPENT = "Message count reaches limit."


class Meter:
    """Counts deliveries, and Azure's billed messages of the day (pieces of 2 KB, from 00:00 UTC).

    The day's count starts again with the service.
    """

    def __init__(self, now: Callable[[], datetime], daily_limit: int | None) -> None:
        self.sent = 0
        self._now = now
        self._limit = daily_limit
        self._days: Counter[str] = Counter()

    @property
    def is_spent(self) -> bool:
        """Say whether today's messages are used up."""
        return self._limit is not None and self._days[self._today()] >= self._limit

    def spend(self, record: Record, receivers: int) -> bool:
        """Count one message to so many clients; False when the day has no room for it."""
        if self._limit is not None:
            pieces = -(-len(record.encoded(HubProtocol.JSON)) // _PIECE)
            today = self._today()
            used = self._days[today] + pieces * receivers
            self._days = Counter({today: min(used, self._limit)})
            if used > self._limit:
                return False
        self.sent += receivers
        return True

    def _today(self) -> str:
        return self._now().date().isoformat()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Audience:
    """Who hears a group, until somebody comes or goes or a membership expires."""

    connections: Collection[Connection]
    gathered_at: float
    ends_at: float


class Hub:
    """One hub's clients and groups.

    A connection is in a group by itself (until it ends) or through its user (until that membership
    expires, over reconnects and restarts).
    """

    def __init__(
        self,
        name: str,
        memberships: Memberships,
        meter: Meter,
        outbox: Outbox,
        now: Callable[[], datetime],
        on_spent: Callable[[], None],
    ) -> None:
        self.name = name
        self.connections: dict[str, Connection] = {}
        self._memberships = memberships
        self._meter = meter
        self._outbox = outbox
        self._now = now
        self._on_spent = on_spent
        self._users: dict[str, set[Connection]] = {}
        self._groups: dict[str, set[Connection]] = {}
        self._joined: dict[Connection, set[str]] = {}
        self._user_groups: dict[str, dict[str, float]] = {}
        self._group_users: dict[str, set[str]] = {}
        self._audiences: dict[str, _Audience] = {}

    def connect(self, connection: Connection) -> None:
        """Let the connection hear the hub, with all its user's groups."""
        self.connections[connection.connection_id] = connection
        self._audiences.clear()
        user = connection.user_id
        if user is None:
            return
        if user not in self._users:
            self._users[user] = set()
            self._refresh(user)
        self._users[user].add(connection)

    def disconnect(self, connection: Connection) -> None:
        """Forget the connection and its own groups; its user's memberships stay stored."""
        self.connections.pop(connection.connection_id, None)
        self._audiences.clear()
        self._drop_all(connection)
        user = connection.user_id
        if user is None or user not in self._users:
            return
        self._users[user].discard(connection)
        if not self._users[user]:
            del self._users[user]
            self._forget(user)

    def send_to_all(self, record: Record, excluded: Collection[str] = ()) -> None:
        """Tell every client of the hub."""
        self._deliver(record, self.connections.values(), excluded)

    def send_to_user(self, user: str, record: Record) -> None:
        """Tell every client of one user."""
        self._deliver(record, self.of_user(user))

    def send_to_group(self, group: str, record: Record, excluded: Collection[str] = ()) -> None:
        """Tell every client in the group."""
        self._deliver(record, self.of_group(group), excluded)

    def send_to_connection(self, connection_id: str, record: Record) -> None:
        """Tell one client, if it is there."""
        found = self.connections.get(connection_id)
        self._deliver(record, [found] if found else [])

    def of_user(self, user: str) -> Collection[Connection]:
        """List the user's clients."""
        return self._users.get(user, ())

    def of_group(self, group: str) -> Collection[Connection]:
        """List the clients in the group, by themselves or through their user."""
        now = self._now().timestamp()
        known = self._audiences.get(group)
        if known is None or not known.gathered_at <= now < known.ends_at:
            known = self._audiences[group] = self._gather(group, now)
        return known.connections

    def add_user(self, user: str, group: str, ttl: timedelta | None = None) -> None:
        """Put the user into the group; a ttl of nothing means the clients connected now."""
        if ttl == timedelta(0):
            for connection in self.of_user(user):
                self._join(group, connection)
            return
        self._memberships.add(self.name, user, group, ttl)
        self._refresh(user)

    def remove_user(self, user: str, group: str) -> None:
        """Take the user, and every client of that user, out of the group."""
        self._memberships.remove(self.name, user, group)
        self._refresh(user)
        for connection in self.of_user(user):
            self._drop(group, connection)

    def remove_user_from_all(self, user: str) -> None:
        """Take the user, and every client of that user, out of every group."""
        self._memberships.remove_all(self.name, user)
        self._refresh(user)
        for connection in self.of_user(user):
            self._drop_all(connection)

    def has_user(self, user: str, group: str) -> bool:
        """Say whether the user is in the group, connected or not."""
        if group in self._memberships.of(self.name, user):
            return True
        return any(connection in self._groups.get(group, ()) for connection in self.of_user(user))

    def add_connection(self, connection_id: str, group: str) -> bool:
        """Put one client into the group; False when there is no such client."""
        found = self.connections.get(connection_id)
        if found is None:
            return False
        self._join(group, found)
        return True

    def remove_connection(self, connection_id: str, group: str) -> bool:
        """Take one client out of the group; False when there is no such client."""
        found = self.connections.get(connection_id)
        if found is None:
            return False
        self._drop(group, found)
        return True

    def remove_connection_from_all(self, connection_id: str) -> bool:
        """Take one client out of every group it joined by itself; False when there is no such client."""
        found = self.connections.get(connection_id)
        if found is None:
            return False
        self._drop_all(found)
        return True

    def _deliver(self, record: Record, receivers: Collection[Connection], excluded: Collection[str] = ()) -> None:
        chosen = [one for one in receivers if one.connection_id not in excluded] if excluded else receivers
        if not chosen:
            return
        if not self._meter.spend(record, len(chosen)):
            self._on_spent()
            return
        self._outbox.broadcast(record, chosen)

    def _gather(self, group: str, now: float) -> "_Audience":
        ends = {user: self._user_groups[user][group] for user in self._group_users.get(group, ())}
        members = [user for user, ends_at in ends.items() if ends_at > now]
        return _Audience(
            connections=tuple(set(self._groups.get(group, ())).union(*(self._users[user] for user in members))),
            gathered_at=now,
            ends_at=min((ends[user] for user in members), default=math.inf),
        )

    def _refresh(self, user: str) -> None:
        self._audiences.clear()
        self._forget(user)
        if user not in self._users:
            return
        self._user_groups[user] = self._memberships.of(self.name, user)
        for group in self._user_groups[user]:
            self._group_users.setdefault(group, set()).add(user)

    def _forget(self, user: str) -> None:
        for group in self._user_groups.pop(user, {}):
            _discard(self._group_users, group, user)

    def _join(self, group: str, connection: Connection) -> None:
        self._audiences.clear()
        self._groups.setdefault(group, set()).add(connection)
        self._joined.setdefault(connection, set()).add(group)

    def _drop(self, group: str, connection: Connection) -> None:
        if group not in self._joined.get(connection, ()):
            return
        self._audiences.clear()
        _discard(self._groups, group, connection)
        _discard(self._joined, connection, group)

    def _drop_all(self, connection: Connection) -> None:
        for group in list(self._joined.get(connection, ())):
            self._drop(group, connection)


class Switchboard:
    """All hubs and every open connection of the service."""

    def __init__(self, memberships: Memberships, meter: Meter, outbox: Outbox, now: Callable[[], datetime]) -> None:
        self.meter = meter
        self._outbox = outbox
        self.live: dict[str, Connection] = {}
        self._memberships = memberships
        self._now = now
        self._hubs: dict[str, Hub] = {}

    def hub(self, name: str) -> Hub:
        """Give the hub of this name; hubs exist by being named."""
        if name not in self._hubs:
            self._hubs[name] = Hub(name, self._memberships, self.meter, self._outbox, self._now, self._say_it_is_spent)
        return self._hubs[name]

    def admit(self, connection: Connection) -> None:
        """Count a connection that is open but has not shaken hands."""
        self.live[connection.connection_id] = connection

    def ready(self, connection: Connection) -> None:
        """Let a connection hear its hub."""
        if self.meter.is_spent:
            connection.end(protocol.close(_SPENT))
        else:
            self.hub(connection.hub).connect(connection)

    def gone(self, connection: Connection) -> None:
        """Forget a connection."""
        self.live.pop(connection.connection_id, None)
        self.hub(connection.hub).disconnect(connection)

    def all(self) -> list[Connection]:
        """List every open connection, as it is now."""
        return list(self.live.values())

    def _say_it_is_spent(self) -> None:
        for connection in self.all():
            connection.end(protocol.close(_SPENT))


def _discard[K, V](index: dict[K, set[V]], key: K, value: V) -> None:
    index[key].discard(value)
    if not index[key]:
        del index[key]
