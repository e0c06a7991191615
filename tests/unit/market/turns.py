"""A turn that never waits: what adapters are tested with."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.errors import NotEntitledError
from shared.market.ports import Call, Limits


@dataclass(slots=True)
class Entered:
    """One entry into the turn, and how it ended."""

    endpoint: str
    units: int
    parameter: str
    limits: Limits | None = None
    error: BaseException | None = None


class Turns:
    """
    Remembers every call and, as the fetcher's turn does, every refused (endpoint, parameter).

    A refused endpoint with no parameter is refused with all of them.
    """

    def __init__(self, *refused: tuple[str, str]) -> None:
        self.refused = set(refused)
        self.entered: list[Entered] = []
        self.inside = 0

    @asynccontextmanager
    async def __call__(self, endpoint: str, *, units: int = 1, parameter: str = "") -> AsyncIterator[Call]:
        if not self.may(endpoint, parameter):
            raise NotEntitledError(f"this key was refused {endpoint} {parameter}")
        entered, call = Entered(endpoint, units, parameter), Call()
        self.entered.append(entered)
        self.inside += 1
        try:
            yield call
        except BaseException as e:
            entered.error = e
            if isinstance(e, NotEntitledError):
                self.refused.add((endpoint, parameter))
            raise
        finally:
            self.inside -= 1
            entered.limits = call.limits

    def may(self, endpoint: str, parameter: str = "") -> bool:
        return (endpoint, "") not in self.refused and (endpoint, parameter) not in self.refused

    @property
    def asked(self) -> list[tuple[str, int, str]]:
        """Endpoint, units and parameter of every call, in order."""
        return [(e.endpoint, e.units, e.parameter) for e in self.entered]


class TakingTurns:
    """An adapter whose calls all take the same turn, so that a test says only what it is about."""

    def __init__(self, adapter: Any, turns: Turns) -> None:
        self.adapter = adapter
        self.turns = turns

    def __getattr__(self, name: str) -> Any:
        there = getattr(self.adapter, name)
        taking = ("bars", "quote", "news", "earnings", "actions", "grouped")
        return partial(there, turn=self.turns) if name in taking else there


def everything_told(error: BaseException) -> str:
    """Every text an exception could put into a log, those it hides behind it included."""
    told, seen = [], []
    todo = [error]
    while todo:
        one = todo.pop()
        seen.append(one)
        told += [str(one), repr(one), repr(one.args), repr(vars(one))]
        told += [str(getattr(one, "_request", ""))]
        todo += [e for e in (one.__cause__, one.__context__) if e is not None and e not in seen]
    return "\n".join(told)
