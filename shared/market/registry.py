"""
What each provider sells and what it allows, read once from registry.toml: data, not code.

docs/providers.md is generated from the same file (``python -m infra.providers_doc``). What a key may really call is
learned from answers, and limits from rate headers: this is what we believe before the first call.
"""

import tomllib
from collections.abc import Mapping
from datetime import date, timedelta
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shared.errors import ConfigurationError
from shared.settings import Plan

FILE = Path(__file__).with_name("registry.toml")
DAY = timedelta(days=1)
UNITS = {"s": timedelta(seconds=1), "min": timedelta(minutes=1), "h": timedelta(hours=1), "d": DAY}


class Kind(StrEnum):
    """How a window moves: over the last span, from fixed instants of a zone, or nobody documents it."""

    ROLLING = "rolling"
    ALIGNED = "aligned"
    UNKNOWN = "unknown"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _span(value: object) -> object:
    if not isinstance(value, str):
        return value
    number, _, unit = value.partition(" ")
    try:
        return float(number) * UNITS[unit]
    except (KeyError, ValueError) as e:
        raise ValueError(f"{value!r} is no span: write a number and one of {', '.join(UNITS)}, such as '1 min'") from e


class Window(_Strict):
    """
    At most *amount* calls within any *span*; where it ``is_weighted``, a call counts as many as it weighs.

    A window of unknown kind is counted as a rolling one: that keeps it wherever the provider lets it begin.
    """

    amount: int = Field(gt=0)
    span: Annotated[timedelta, BeforeValidator(_span)] = Field(gt=timedelta())
    kind: Kind = Kind.ROLLING
    zone: str = "UTC"
    is_weighted: bool = True

    @model_validator(mode="after")
    def _can_be_aligned(self) -> Self:
        if self.kind is Kind.ALIGNED and (self.span > DAY or DAY % self.span):
            raise ValueError(f"an aligned window must fill a day without a rest: {self.span} does not")
        try:
            ZoneInfo(self.zone)
        except (KeyError, ValueError) as e:
            raise ValueError(f"{self.zone!r} is no time zone: use a name such as America/New_York") from e
        return self


class Endpoint(_Strict):
    """One call a provider sells; *plans* are those whose documents include it, as far as was read."""

    use_cases: tuple[str, ...] = Field(min_length=1)
    plans: tuple[Plan, ...] = Field(min_length=1)
    weight: int = Field(default=1, gt=0)
    notes: str = ""


class Source(_Strict):
    """Where a fact was read, and when."""

    what: str
    read_on: date


class ProviderFacts(_Strict):
    """Everything we believe of one provider before the first call."""

    name: str
    title: str
    home: str
    key_in: Literal["header", "query"]
    key_name: str
    stamps: str
    adjustment: str
    quota_notes: str
    endpoints: Mapping[str, Endpoint]
    windows: Mapping[Plan, tuple[Window, ...]]
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if set(self.windows) != {"free", "premium"}:
            raise ValueError("windows must be given for the plans free and premium; unlimited has none")
        for plan, windows in self.windows.items():
            if len({(w.span, w.kind, w.zone, w.is_weighted) for w in windows}) < len(windows):
                raise ValueError(f"two windows of plan {plan} differ only in their amount: keep the smaller")
            room = min((w.amount for w in windows if w.is_weighted), default=None)
            for name, endpoint in self.endpoints.items():
                if room is not None and plan in endpoint.plans and endpoint.weight > room:
                    raise ValueError(f"a call of {name} weighs {endpoint.weight}, which no window of {plan} can hold")
        return self


class _Registry(_Strict):
    provider: Mapping[str, ProviderFacts]


def read_registry(text: str, *, name: str = FILE.name) -> Mapping[str, ProviderFacts]:
    """
    Read a registry.

    Raises:
        ConfigurationError: it is no TOML, or something in it cannot be so; names each place.

    """
    try:
        found = tomllib.loads(text)
        for key, facts in found.get("provider", {}).items():
            facts["name"] = key
        return _Registry.model_validate(found).provider
    except tomllib.TOMLDecodeError as e:
        raise ConfigurationError(f"{name} is no TOML: {e}") from e
    except ValidationError as e:
        lines = [f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" for wrong in e.errors()]
        raise ConfigurationError(f"{name} cannot be used:\n  " + "\n  ".join(lines)) from e
    except (TypeError, AttributeError) as e:
        raise ConfigurationError(f"{name} cannot be used: write [provider.NAME] tables ({e})") from e


@cache
def providers() -> Mapping[str, ProviderFacts]:
    """Every provider by name, in the order of the file."""
    return read_registry(FILE.read_text(encoding="utf-8"))


def provider(name: str) -> ProviderFacts:
    """
    What is known of a provider.

    Raises:
        ConfigurationError: the registry does not know it.

    """
    try:
        return providers()[name]
    except KeyError as e:
        raise ConfigurationError(f"{name!r} is no provider: use one of {', '.join(providers())}") from e


def windows_of(name: str, plan: Plan) -> tuple[Window, ...]:
    """The windows that hold at once for calls to a provider; none means no limit."""
    return provider(name).windows.get(plan, ())


def weight_of(name: str, endpoint: str) -> int:
    """
    What one call of an endpoint counts in weighted windows.

    Raises:
        ConfigurationError: the registry does not know the endpoint.

    """
    endpoints = provider(name).endpoints
    try:
        return endpoints[endpoint].weight
    except KeyError as e:
        raise ConfigurationError(f"{name} has no endpoint {endpoint!r}: use one of {', '.join(endpoints)}") from e
