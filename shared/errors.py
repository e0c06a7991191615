"""
Every trouble this house knows, in three kinds that say what to do.

    TroopError
    + TransientError          try again, no sooner than ``retry_after``
      - RateLimitedError        the other side asked us to slow down
        . DailyQuotaError         ... until its next day: the whole quota is spent
        . QuotaSpentError         ... or we ourselves did, before asking it
      - UnavailableError        the other side is down, slow or unreachable
      - StaleError              somebody else wrote first: read again, then decide again
    + PermanentError          never try the same again: record it, bury it, move on
      - InvalidPayloadError     what we were given cannot be true
      - ConflictError           a document with this id exists already
      - NotFoundError           there is no such thing
      - RefusedError            the other side will not do this, now or later
        . NotEntitledError        ... because our plan does not include it
        . UnknownSymbolError      ... because it knows no such symbol
        . RecipientGoneError      ... because nobody is there any more
      - OutcomeUnknownError     it may have happened; repeating it blindly could do it twice
    + ConfigurationError      stop: a person must change something

Every class is caught somewhere by name. Texts never carry a secret: they end in logs, in dead letters and
in the body of a 500.
"""

from datetime import timedelta


class TroopError(Exception):
    """The root; never raised itself."""


class TransientError(TroopError):
    """Trouble that passes: try again, no sooner than ``retry_after``."""

    def __init__(self, message: str = "", *, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimitedError(TransientError):
    """The other side asked us to slow down."""


class DailyQuotaError(RateLimitedError):
    """The day's quota is spent at the other side; asking again before its next day only earns another no."""


class QuotaSpentError(RateLimitedError):
    """We ourselves hold the call back: the other side was not asked and refused nothing."""


class UnavailableError(TransientError):
    """The other side is down, slow or unreachable, or gave an answer we cannot judge."""


class StaleError(TransientError):
    """Somebody else wrote first: read again, then decide again."""


class PermanentError(TroopError):
    """Trouble that stays: the same call will never succeed."""


class InvalidPayloadError(PermanentError):
    """What we were given cannot be true."""


class ConflictError(PermanentError):
    """A document with this id exists already."""


class NotFoundError(PermanentError):
    """There is no such thing."""


class RefusedError(PermanentError):
    """The other side will not do this, now or later."""


class NotEntitledError(RefusedError):
    """Our plan at the provider does not include this call or parameter."""


class UnknownSymbolError(RefusedError):
    """The provider knows no such symbol."""


class RecipientGoneError(RefusedError):
    """Nobody is there any more: a deleted webhook, a closed mailbox."""


class OutcomeUnknownError(PermanentError):
    """It may have happened and it may not; repeating it blindly could do it twice."""


class ConfigurationError(TroopError):
    """A person must change something; the text says what."""
