"""What a strategy is: its parameters, its version, what it must see, and its rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from shared.market.models import Interval
from signals.logic.arrays import Arrays
from signals.logic.strategies.marks import Marks


class Params(BaseModel):
    """Parameters of a strategy, each with its bounds; a name it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """
    A rule that may see a signal in bars.

    ``title`` says in a few words when it speaks, ``lookback`` how many bars it must see to decide about the last of
    them, ``intervals`` on which bars it makes sense, ``horizon`` for how many bars its opinion is meant unless the
    entry says otherwise. One with ``has_state`` marks every bar as up, down or neither, so that it can gate others.
    ``mark`` is the rule: written with Arrays' ``now`` and ``ago``, it decides about all bars or about the last alone.
    """

    name: str
    version: int
    title: str
    params: type[Params]
    lookback: Callable[[Any], int]
    mark: Callable[[Arrays, Any], Marks]
    intervals: tuple[Interval, ...] = tuple(Interval)
    horizon: int = 5
    has_state: bool = False
