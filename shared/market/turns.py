"""The turn a provider is given for one request: what every call needs before it, and teaches after it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from shared.clock import Clock
from shared.errors import (
    ConfigurationError,
    NotEntitledError,
    RateLimitedError,
    RefusedError,
    TroopError,
    UnavailableError,
)
from shared.market.entitlements import Entitlements
from shared.market.health import Health, Kind, Pass
from shared.market.models import Priority
from shared.market.ports import Call, Limits
from shared.market.throttle import Throttle
from shared.telemetry import get_logger, span

log = get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class ProviderTurn:
    """
    The port ``Turn`` over one provider's throttle.

    The first call must be let go by ``first_deadline``, later ones by ``deadline`` (None: when the throttle loses its
    patience), because what is half done is worth waiting for. ``has_failed``: a call got no answer.
    """

    provider: str
    kind: Kind
    leave: Pass
    throttle: Throttle
    health: Health
    entitlements: Entitlements
    wall: Clock
    weigh: Callable[[str, str], int]
    priority: Priority
    first_deadline: datetime | None
    deadline: datetime | None
    calls: int = 0
    has_failed: bool = False

    @asynccontextmanager
    async def __call__(self, endpoint: str, *, units: int = 1, parameter: str = "") -> AsyncIterator[Call]:
        """As the port says."""
        if refusal := self.entitlements.refusal(self.provider, endpoint, parameter):
            raise NotEntitledError(
                f"{self.provider} refused {' '.join(filter(None, (endpoint, parameter)))} to this key "
                f"on {refusal.recorded_at:%Y-%m-%d}: {refusal.reason}"
            )
        async with self.throttle.permit(
            weight=self.weigh(self.provider, endpoint) * units,
            priority=self.priority,
            deadline=self.deadline if self.calls else self.first_deadline,
        ) as permit:
            with span("provider.call", provider=self.provider, endpoint=endpoint, priority=self.priority.name.lower()):
                self.calls += 1
                call, left_at = Call(), self.wall.now()
                permit.sent()
                try:
                    yield call
                except Exception as e:
                    permit.answered()
                    await self._learn(endpoint, parameter, self.wall.now() - left_at, call.limits, e)
                    raise
                permit.answered()
                await self._learn(endpoint, parameter, self.wall.now() - left_at, call.limits, None)

    def may(self, endpoint: str, parameter: str = "") -> bool:
        """As the port says."""
        return self.entitlements.refusal(self.provider, endpoint, parameter) is None

    async def end(self) -> None:
        """Give back what was not used."""
        await self.health.given_back(self.leave)

    async def _learn(
        self, endpoint: str, parameter: str, took: timedelta, limits: Limits | None, error: Exception | None
    ) -> None:
        _show(error)
        self.throttle.latency(took.total_seconds())
        if limits:
            try:
                await self.throttle.observe(limits)
            except TroopError as e:  # the answer is there: storage in trouble must not take it away
                log.warning("quota.unobserved", provider=self.provider, reason=str(e))
        if isinstance(error, NotEntitledError):
            await self.entitlements.learn(self.provider, endpoint, parameter, str(error))
        match error:
            case None | RefusedError():  # a no is an answer
                await self.health.answered(self.leave, self.kind, took)
            case RateLimitedError():
                await self.health.held_back(self.leave, self.kind, took, error)
            case ConfigurationError():
                await self.health.key_refused(self.leave, self.kind, took, error)
            case _:
                self.has_failed = isinstance(error, UnavailableError)
                await self.health.failed(self.leave, self.kind, took, error)
        self.leave = Pass(provider=self.provider)


def _show(error: Exception | None) -> None:
    from opentelemetry import trace

    trace.get_current_span().set_attribute("troop.outcome", type(error).__name__ if error else "answered")
