"""
What the domains tell each other: CloudEvents 1.0 with versioned types, ids made from facts.

A type is ``domain.what_happened.vN``. Fields may be added to a version (readers ignore what they do not know);
any other change is a new version beside the old one.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Protocol, Self
from uuid import UUID, uuid5

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError

from shared.errors import InvalidPayloadError

NAMESPACE = UUID("5c0f3f0e-0d2a-5d0b-9a53-6b6f2b6f7a10")
"""The namespace of every id in this house; docs/events.md lists the formulas."""


def fact_id(*facts: str) -> str:
    """
    The id of a thing that is known by its facts: the same facts, the same id, on every machine.

    uuid5 over the facts joined by ``|``, as RFC 9562 section 5.5 defines it.
    """
    return str(uuid5(NAMESPACE, "|".join(facts)))


class Event(BaseModel):
    """
    A frozen fact in the past tense.

    ``occurred_at`` is market time, ``recorded_at`` is the wall's when we learnt of it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, defer_build=True)

    type: ClassVar[str]
    source: ClassVar[str]

    occurred_at: AwareDatetime
    recorded_at: AwareDatetime

    @property
    def event_id(self) -> str:
        """The id that makes every repetition recognisable."""
        raise NotImplementedError

    @property
    def subject(self) -> str:
        """What it is about, as a path: ``symbols/AAPL``."""
        raise NotImplementedError

    def to_wire(self) -> dict[str, Any]:
        """The CloudEvent as a JSON object."""
        return {
            "specversion": "1.0",
            "id": self.event_id,
            "source": self.source,
            "type": self.type,
            "subject": self.subject,
            "time": self.recorded_at.isoformat().replace("+00:00", "Z"),
            "datacontenttype": "application/json",
            "data": self.model_dump(mode="json"),
        }

    @classmethod
    def from_wire(cls, type_: str, data: object) -> Self:
        """
        Read what a CloudEvent of this type carries.

        Raises:
            InvalidPayloadError: another type, or a field that is missing or cannot be true.

        """
        if type_ != cls.type:
            raise InvalidPayloadError(f"expected an event of type {cls.type}, got {str(type_)[:80]!r}")
        try:
            event = cls.model_validate(data)
            event.model_dump_json()  # half a surrogate pair can be read but never stored or told on
        except ValidationError as e:
            faults = "; ".join(
                f"{'.'.join(map(str, error['loc'])) or 'data'}: {error['msg']}"
                for error in e.errors(include_input=False, include_url=False)[:5]
            )
            raise InvalidPayloadError(f"{cls.type}: {faults}") from None
        except PydanticSerializationError:
            raise InvalidPayloadError(f"{cls.type}: a text in it is not valid Unicode") from None
        return event


class EventPublisher(Protocol):
    """
    Tells the house.

    Raises UnavailableError or RateLimitedError (try again with the same ids), ConfigurationError, RefusedError.
    """

    async def publish(self, events: Sequence[Event]) -> None:
        """Publish all of *events*; returns when the topic has taken them."""
        ...

    async def close(self) -> None: ...


class CloudEvent(Protocol):
    """The part of ``azure.functions.CloudEvent`` that this house reads."""

    @property
    def id(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def subject(self) -> str | None: ...
    @property
    def time(self) -> datetime | None: ...
    @property
    def extension_attrs(self) -> Mapping[str, Any]: ...
    def get_json(self) -> Any: ...  # noqa: ANN401 - whatever the publisher sent
