"""One client's SMTP with the local mailbox, in which trouble can strike at every stage. Imports aiosmtpd."""

import asyncio
from typing import Any, cast

from aiosmtpd.smtp import SMTP, Session

from infra.local.mailbox import Mailbox, Stage


class _QuietSession(Session):
    """A session that does not warn at every login of a name that aiosmtpd itself still uses."""

    login_data: Any = None


class Conversation(SMTP):
    """aiosmtpd's conversation; ``smtp_…`` are its commands, and ``event_handler`` is the mailbox."""

    event_handler: Mailbox

    def _create_session(self) -> Session:
        return _QuietSession(self.loop)

    async def _handle_client(self) -> None:
        self.event_handler.connections += 1
        if not await self._strikes("connect"):
            await super()._handle_client()
        elif self.transport is not None:
            self.transport.close()

    async def smtp_AUTH(self, arg: str) -> None:  # noqa: N802 - aiosmtpd's name, as the following
        if not await self._strikes("login"):
            await super().smtp_AUTH(arg)

    async def smtp_MAIL(self, arg: str | None) -> None:  # noqa: N802
        if await self._strikes("sender"):
            return
        # aiosmtpd's own switch for this warns of a login without TLS, which stays on this machine here.
        if self.session is None or not self.session.authenticated:
            await self.push("530 5.7.0 Authentication required")
            return
        await super().smtp_MAIL(arg)

    async def smtp_RCPT(self, arg: str | None) -> None:  # noqa: N802
        if not await self._strikes("recipient"):
            await super().smtp_RCPT(arg)

    async def smtp_DATA(self, arg: str) -> None:  # noqa: N802
        if not await self._strikes("data"):
            await super().smtp_DATA(arg)

    async def _strikes(self, stage: Stage) -> bool:
        """Whether trouble answered instead of us."""
        trouble = self.event_handler.strike(stage)
        if trouble is None:
            return False
        await asyncio.sleep(trouble.latency_ms / 1000)
        if trouble.cut:
            await cut(self)
        if trouble.reply:
            await self.push(trouble.reply)
        return trouble.reply is not None


async def cut(server: SMTP) -> None:
    """Drop the connection; its task is cancelled as soon as the loop noticed."""
    if server.transport is not None:
        cast("asyncio.Transport", server.transport).abort()
    await asyncio.Event().wait()
