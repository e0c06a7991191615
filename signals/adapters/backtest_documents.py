"""
Backtests over Documents: container backtests, partition strategy.

What is no backtest (results, steps, variants, opened hold-outs) lies beside them in the same partition, so that one
batch writes what belongs together; its place in every list is the beginning of time, so that no list shows it.
"""

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, time, timedelta
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import Document, Documents, Operation, sort_key
from shared.errors import ConflictError, NotFoundError, StaleError
from shared.market.models import Interval
from signals.adapters.outcomes import FIRST_SIGNAL, place_of
from signals.backtest_models import Backtest, BacktestState, Job, Opened, Trials, Trigger, Validation
from signals.logic.backtesting import Tested
from signals.logic.simulation import Rules
from signals.models import Entry, Gate, SessionGate, StateGate

CONTAINER = "backtests"
STEPS_KEPT = timedelta(days=7)
"""What variants gave in between is of no use once the result is there."""


class BacktestDocuments:
    """One small document a backtest, one large one for its result, a few while it is worked on."""

    def __init__(self, documents: Documents, wall: Clock, retention: timedelta = timedelta(days=730)) -> None:
        self._documents = documents
        self._wall = wall
        self._retention = retention

    async def create(self, backtest: Backtest, *, due_at: datetime) -> Backtest:
        job = backtest.job
        pointer = _aside(f"id|{job.backtest_id}", f"id|{job.backtest_id}", {"strategy": job.strategy})
        with suppress(ConflictError):  # first, so that a told id can be looked up: one that leads nowhere does no harm
            await self._documents.create(CONTAINER, replace(pointer, expires_at=self._until()))
        document = Document(
            id=job.backtest_id,
            partition=job.strategy,
            sort=sort_key(backtest.requested_at, job.backtest_id),
            body=_body(backtest),
            due_at=due_at,
            expires_at=self._until(),
        )
        return _backtest(await self._documents.create(CONTAINER, document))

    async def read(self, backtest_id: str) -> Backtest:
        try:
            pointer = await self._documents.read(CONTAINER, f"id|{backtest_id}", f"id|{backtest_id}")
            return _backtest(await self._documents.read(CONTAINER, pointer.body["strategy"], backtest_id))
        except NotFoundError:
            raise NotFoundError(f"no backtest {backtest_id[:60]!r} is stored: POST /api/backtests makes one") from None

    async def save(self, backtest: Backtest, *, due_at: datetime | None) -> Backtest:
        return _backtest(await self._documents.replace(CONTAINER, _document(backtest, due_at)))

    async def step(self, backtest: Backtest, tested: Sequence[Tested], *, due_at: datetime) -> Backtest:
        id_ = f"step|{backtest.backtest_id}|{backtest.parts:06d}"
        body = {"tested": [_tested_body(one) for one in tested]}
        step = replace(_aside(backtest.job.strategy, id_, body), expires_at=self._wall.now() + STEPS_KEPT)
        written = replace(backtest, parts=backtest.parts + 1, done=backtest.done + len(tested))
        done = await self._documents.batch(
            CONTAINER,
            [
                Operation(kind="create", document=step),
                Operation(kind="replace", document=_document(written, due_at)),
            ],
        )
        return _backtest(done[-1])

    async def tested(self, backtest: Backtest) -> list[Tested]:
        found: list[Tested] = []
        for part in range(backtest.parts):
            id_ = f"step|{backtest.backtest_id}|{part:06d}"
            document = await self._documents.read(CONTAINER, backtest.job.strategy, id_)
            found += [_tested(one) for one in document.body["tested"]]
        return found

    async def finish(self, backtest: Backtest, result: Mapping[str, Any], trials: Trials) -> Backtest:
        job = backtest.job
        kept = replace(_aside(job.strategy, _result_id(backtest), result), expires_at=self._until())
        opened = [[one.backtest_id, format_instant(one.first), format_instant(one.last)] for one in trials.opened]
        body = {"sharpes": dict(trials.sharpes), "beyond": trials.beyond, "opened": opened}
        tried = (
            trials.document.with_body(body) if trials.document else _aside(job.strategy, job.variants_of_series, body)
        )
        operations = [
            Operation(kind="replace", document=_document(backtest, None)),
            Operation(kind="create", document=kept),
            Operation(kind="replace" if trials.document else "create", document=tried),
        ]
        try:
            return _backtest((await self._documents.batch(CONTAINER, operations))[0])
        except ConflictError:
            # Another run of this backtest was faster, or another backtest counted the first variants of the series.
            raise StaleError(f"backtest {backtest.backtest_id} was written by somebody else") from None

    async def result(self, backtest: Backtest) -> Mapping[str, Any] | None:
        try:
            found = await self._documents.read(CONTAINER, backtest.job.strategy, _result_id(backtest))
        except NotFoundError:
            return None
        return found.body

    async def trials(self, strategy: str, name: str) -> Trials:
        try:
            found = await self._documents.read(CONTAINER, strategy, name)
        except NotFoundError:
            return Trials()
        opened = [
            Opened(backtest_id=id_, first=parse_instant(first), last=parse_instant(last))
            for id_, first, last in found.body.get("opened", ())
        ]
        return Trials(sharpes=found.body["sharpes"], beyond=found.body["beyond"], opened=opened, document=found)

    async def standard(self, key: str) -> Mapping[str, Any]:
        try:
            return (await self._documents.read(CONTAINER, f"history|{key}", f"history|{key}")).body
        except NotFoundError:
            return {}

    async def set_standard(self, key: str, body: Mapping[str, Any]) -> None:
        id_ = f"history|{key}"
        try:
            await self._documents.create(CONTAINER, _aside(id_, id_, body))
        except ConflictError:
            stored = await self._documents.read(CONTAINER, id_, id_)
            with suppress(StaleError):
                await self._documents.replace(CONTAINER, stored.with_body(body))

    async def due(self, before: datetime, limit: int) -> list[Backtest]:
        return [_backtest(d) for d in await self._documents.due(CONTAINER, before=before, limit=limit)]

    async def listed(
        self, strategy: str | None, after: str | None, *, newest_first: bool, limit: int
    ) -> list[Backtest]:
        if not newest_first:
            after = max(after or "", FIRST_SIGNAL)
        if strategy:
            found = await self._documents.page(CONTAINER, strategy, after=after, newest_first=newest_first, limit=limit)
        else:
            found = await self._documents.feed(CONTAINER, after=after, newest_first=newest_first, limit=limit)
        # What is no backtest lies behind the oldest one, so whoever counts on a full page is not misled.
        return [_backtest(d) for d in found if d.sort > FIRST_SIGNAL]

    def _until(self) -> datetime:
        return self._wall.now() + self._retention


def _aside(partition: str, id_: str, body: Mapping[str, Any]) -> Document:
    return Document(id=id_, partition=partition, sort=place_of(id_), body=body)


def _result_id(backtest: Backtest) -> str:
    return f"result|{backtest.backtest_id}"


def _document(backtest: Backtest, due_at: datetime | None) -> Document:
    assert backtest.document is not None, "a backtest is read before it is saved"  # noqa: S101
    return backtest.document.with_body(_body(backtest), due_at=due_at)


# --- what variants gave


def _tested_body(one: Tested) -> dict[str, Any]:
    return {
        "train": list(one.train),
        "test": list(one.test),
        "benchmark": list(one.benchmark),
        "sharpe": one.sharpe,
        "returns": [base64.b64encode(returns.astype("<f4").tobytes()).decode() for returns in one.returns],
    }


def _tested(body: Mapping[str, Any]) -> Tested:
    import numpy as np

    return Tested(
        train=tuple(body["train"]),
        test=tuple(body["test"]),
        benchmark=tuple(body["benchmark"]),
        sharpe=body["sharpe"],
        returns=tuple(np.frombuffer(base64.b64decode(text), dtype="<f4") for text in body["returns"]),
    )


# --- backtests


def _body(b: Backtest) -> dict[str, Any]:
    return {
        "job": _job_body(b.job),
        "state": b.state,
        "requested_at": format_instant(b.requested_at),
        "done": b.done,
        "parts": b.parts,
        "claims": b.claims,
        "leased_until": _text(b.leased_until),
        "reason": b.reason,
        "started_at": _text(b.started_at),
        "ended_at": _text(b.ended_at),
        "summary": b.summary,
    }


def _backtest(document: Document) -> Backtest:
    b = document.body
    return Backtest(
        job=_job(b["job"]),
        state=BacktestState(b["state"]),
        requested_at=parse_instant(b["requested_at"]),
        done=b["done"],
        parts=b["parts"],
        claims=b["claims"],
        leased_until=_instant(b["leased_until"]),
        reason=b["reason"],
        started_at=_instant(b["started_at"]),
        ended_at=_instant(b["ended_at"]),
        summary=b["summary"],
        document=document,
    )


def _text(instant: datetime | None) -> str | None:
    return format_instant(instant) if instant else None


def _instant(text: str | None) -> datetime | None:
    return parse_instant(text) if text else None


def _job_body(j: Job) -> dict[str, Any]:
    names = sorted(j.candidates[0])
    return {
        "name": j.name,
        "entry": _entry_body(j.entry),
        "symbol": j.symbol,
        "begin": format_instant(j.begin),
        "first": format_instant(j.first),
        "last": format_instant(j.last),
        "bars": j.bars,
        "warmup": j.warmup,
        "provider": j.provider,
        "adjustment": j.adjustment,
        "revision": j.revision,
        "rules": j.rules.model_dump(mode="json"),
        "validation": j.validation.model_dump(mode="json"),
        "variants": {"names": names, "values": [[one[name] for name in names] for one in j.candidates]},
        "trigger": j.trigger,
        "opens_from": _text(j.opens_from),
    }


def _job(b: Mapping[str, Any]) -> Job:
    names = b["variants"]["names"]
    return Job(
        name=b["name"],
        entry=_entry(b["entry"]),
        symbol=b["symbol"],
        begin=parse_instant(b["begin"]),
        first=parse_instant(b["first"]),
        last=parse_instant(b["last"]),
        bars=b["bars"],
        warmup=b["warmup"],
        provider=b["provider"],
        adjustment=b["adjustment"],
        revision=b["revision"],
        rules=Rules.model_validate(b["rules"]),
        validation=_validations().validate_python(b["validation"]),
        candidates=[dict(zip(names, values, strict=True)) for values in b["variants"]["values"]],
        trigger=Trigger(b["trigger"]),
        opens_from=_instant(b.get("opens_from")),
    )


@cache
def _validations() -> TypeAdapter[Any]:
    return TypeAdapter(Validation)


def _entry_body(e: Entry) -> dict[str, Any]:
    body = {**asdict(e), "symbols": None, "gates": [_gate_body(gate) for gate in e.gates]}
    return {**body, "params": dict(e.params), "interval": str(e.interval)}


def _entry(b: Mapping[str, Any]) -> Entry:
    return Entry(**{**b, "interval": Interval(b["interval"]), "gates": tuple(_gate(gate) for gate in b["gates"])})


def _gate_body(gate: Gate) -> dict[str, Any]:
    if isinstance(gate, SessionGate):
        return {"first": gate.first.isoformat(), "last": gate.last.isoformat()}
    return asdict(gate)


def _gate(b: Mapping[str, Any]) -> Gate:
    if "strategy" in b:
        return StateGate(**b)
    return SessionGate(first=time.fromisoformat(b["first"]), last=time.fromisoformat(b["last"]))
