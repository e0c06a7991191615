import asyncio
from datetime import timedelta

import pytest

from shared.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    RateLimitedError,
    StaleError,
    UnavailableError,
)
from shared.retry import ATTEMPTS, PATIENCE, retry


class Neighbour:
    """Fails as told, one trouble a call, and then answers."""

    def __init__(self, *troubles: Exception) -> None:
        self.troubles = list(troubles)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.troubles:
            raise self.troubles.pop(0)
        return "answer"


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """The waits that were asked for; none of them is really waited."""
    asked: list[float] = []
    yield_once = asyncio.sleep

    async def note(seconds: float) -> None:
        asked.append(seconds)
        await yield_once(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return asked


async def test_first_success_is_returned_without_waiting(waits):
    """A call that works is made once."""
    neighbour = Neighbour()

    assert await retry(neighbour) == "answer"
    assert (neighbour.calls, waits) == (1, [])


async def test_trouble_that_passes_is_tried_again(waits):
    """The answer after some trouble is the answer, and there was a wait before each further try."""
    neighbour = Neighbour(UnavailableError("down"), UnavailableError("down"))

    assert await retry(neighbour) == "answer"
    assert neighbour.calls == 3
    assert len(waits) == 2
    assert all(0 <= wait <= PATIENCE.total_seconds() for wait in waits)


async def test_last_trouble_comes_out_itself(waits):
    """After the last try the caller sees what the neighbour said, not what retried it."""
    troubles = [UnavailableError(str(n)) for n in range(ATTEMPTS)]
    neighbour = Neighbour(*troubles)

    with pytest.raises(UnavailableError) as caught:
        await retry(neighbour)

    assert caught.value is troubles[-1]
    assert (neighbour.calls, len(waits)) == (ATTEMPTS, ATTEMPTS - 1)


async def test_retry_after_is_obeyed(waits):
    """Nobody comes back sooner than he was asked to: the jitter comes on top."""
    await retry(Neighbour(RateLimitedError("slow", retry_after=timedelta(seconds=2))))

    assert 2 <= waits[0] <= 2 + PATIENCE.total_seconds()


async def test_longer_wait_than_patience_is_not_slept(waits):
    """A long wait is left to redelivery: sleeping seconds are paid for."""
    neighbour = Neighbour(RateLimitedError("slow", retry_after=PATIENCE + timedelta(milliseconds=1)))

    with pytest.raises(RateLimitedError):
        await retry(neighbour)

    assert (neighbour.calls, waits) == (1, [])


@pytest.mark.parametrize(
    "trouble",
    [StaleError("read again"), OutcomeUnknownError("perhaps"), ConfigurationError("key"), ValueError("bug")],
    ids=lambda e: type(e).__name__,
)
async def test_what_does_not_pass_by_itself_comes_out_at_once(trouble, waits):
    """The same call again would fail the same, or do it twice."""
    neighbour = Neighbour(trouble)

    with pytest.raises(type(trouble)) as caught:
        await retry(neighbour)

    assert caught.value is trouble
    assert (neighbour.calls, waits) == (1, [])


async def test_caller_may_be_shorter():
    """Attempts and patience are the caller's to lower."""
    neighbour = Neighbour(UnavailableError("1"), UnavailableError("2"))

    with pytest.raises(UnavailableError, match="2"):
        await retry(neighbour, attempts=2)
    with pytest.raises(RateLimitedError):
        await retry(Neighbour(RateLimitedError(retry_after=timedelta(seconds=1))), patience=timedelta(0))
