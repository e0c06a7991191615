"""Which user belongs to which group: the one thing the service must not forget."""

import sqlite3
from collections.abc import Callable
from datetime import datetime, timedelta

_SCHEMA = """
CREATE TABLE IF NOT EXISTS signalr_user_groups (
    rank INTEGER PRIMARY KEY AUTOINCREMENT,
    hub TEXT NOT NULL,
    user_id TEXT NOT NULL,
    group_name TEXT NOT NULL,
    expires_at REAL NOT NULL,
    has_ttl INTEGER NOT NULL,
    UNIQUE (hub, user_id, group_name)
)
"""
_BY_EXPIRY = """
CREATE INDEX IF NOT EXISTS signalr_user_groups_by_expiry ON signalr_user_groups (expires_at)
"""
_KEEP_LATEST = """
DELETE FROM signalr_user_groups WHERE rank IN (
    SELECT rank FROM signalr_user_groups WHERE hub = ? AND user_id = ? AND has_ttl = 0
    ORDER BY rank DESC LIMIT -1 OFFSET ?
)
"""
_LIFETIME = timedelta(days=365)
_LATEST = 100


class Memberships:
    """Users in groups, in SQLite: kept over restarts and kill -9, until they expire.

    Without a time to live a membership lasts a year, and a user keeps the latest hundred, as in Azure.
    """

    def __init__(self, state: sqlite3.Connection, now: Callable[[], datetime]) -> None:
        self._state = state
        self._now = now
        with self._state:
            self._state.execute(_SCHEMA)
            self._state.execute(_BY_EXPIRY)

    def add(self, hub: str, user: str, group: str, ttl: timedelta | None = None) -> None:
        """Put the user into the group, or renew the membership."""
        expires_at = (self._now() + (_LIFETIME if ttl is None else ttl)).timestamp()
        with self._state:
            # REPLACE gives the row a new rank: renewed is latest.
            self._state.execute(
                "INSERT OR REPLACE INTO signalr_user_groups"
                " (hub, user_id, group_name, expires_at, has_ttl) VALUES (?, ?, ?, ?, ?)",
                (hub, user, group, expires_at, ttl is not None),
            )
            if ttl is None:
                self._state.execute(_KEEP_LATEST, (hub, user, _LATEST))

    def remove(self, hub: str, user: str, group: str) -> None:
        """Take the user out of the group."""
        with self._state:
            self._state.execute(
                "DELETE FROM signalr_user_groups WHERE hub = ? AND user_id = ? AND group_name = ?",
                (hub, user, group),
            )

    def remove_all(self, hub: str, user: str) -> None:
        """Take the user out of every group of the hub."""
        with self._state:
            self._state.execute("DELETE FROM signalr_user_groups WHERE hub = ? AND user_id = ?", (hub, user))

    def of(self, hub: str, user: str) -> dict[str, float]:
        """List the user's groups with the instant each ends, in seconds since 1970."""
        rows = self._state.execute(
            "SELECT group_name, expires_at FROM signalr_user_groups"
            " WHERE hub = ? AND user_id = ? AND expires_at > ? ORDER BY rank",
            (hub, user, self._now().timestamp()),
        )
        return dict(rows.fetchall())

    def forget_expired(self) -> None:
        """Delete what has ended; reads never show it anyway."""
        with self._state:
            self._state.execute("DELETE FROM signalr_user_groups WHERE expires_at <= ?", (self._now().timestamp(),))
