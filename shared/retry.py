"""The one retry policy. It stands at the outermost adapter and tries again only what passes by itself."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from shared.errors import StaleError, TransientError

if TYPE_CHECKING:
    from tenacity import RetryCallState

PATIENCE = timedelta(seconds=3)
"""A longer wait is left to redelivery or to the next sweep, not paid for in sleeping seconds."""
ATTEMPTS = 4


async def retry[T](call: Callable[[], Awaitable[T]], *, attempts: int = ATTEMPTS, patience: timedelta = PATIENCE) -> T:
    """
    Await *call* until it succeeds, at most *attempts* times, waiting with jitter in between.

    A ``retry_after`` is obeyed when it is within *patience*; otherwise the error comes out at once. StaleError
    comes out at once too: the caller must read again before it may write again.
    """
    import tenacity

    def worth(e: BaseException) -> bool:
        if not isinstance(e, TransientError) or isinstance(e, StaleError):
            return False
        return e.retry_after is None or e.retry_after <= patience

    def wait(state: "RetryCallState") -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, TransientError) and error.retry_after is not None:
            return error.retry_after.total_seconds() + float(jitter(state)) * 0.1
        return float(jitter(state))

    jitter = tenacity.wait_random_exponential(multiplier=0.1, max=patience.total_seconds())
    async for attempt in tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=wait,
        retry=tenacity.retry_if_exception(worth),
        reraise=True,
    ):
        with attempt:
            return await call()
    raise AssertionError("tenacity ends by returning or raising")
