"""
``signals_on_bars_ingested`` without the house: the same libraries, statements and calls, as plainly as they can
be written. It shares no line with the app, only the tables.
"""

import json
import os
import sqlite3
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import azure.functions as func
import numpy as np
import talib
import tenacity
from azure.core.credentials import AzureKeyCredential
from azure.core.messaging import CloudEvent
from azure.eventgrid.aio import EventGridPublisherClient
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import AwareDatetime, BaseModel

LOOKBACK = int(os.environ["BENCH_LOOKBACK"])

app = func.FunctionApp()
tracer = trace.get_tracer("bare")
propagator = TraceContextTextMapPropagator()


class BarsIngested(BaseModel):
    """The event that wakes the function."""

    symbol: str
    interval: str
    first_closed_at: AwareDatetime
    last_closed_at: AwareDatetime


class SignalRaised(BaseModel):
    """The event it publishes."""

    occurred_at: AwareDatetime
    recorded_at: AwareDatetime
    signal_id: str
    entry: str
    symbol: str
    direction: str
    strength: float
    reference_price: float
    features: dict[str, float]


@app.function_name("signals_on_bars_ingested")
@app.event_grid_trigger(arg_name="event")
async def signals_on_bars_ingested(event: func.CloudEvent) -> None:
    """Read the series and its pages, look at the last bar, keep the signal, publish it, write both down."""
    parent = propagator.extract(dict(event.extension_attrs))
    with tracer.start_as_current_span("signals_on_bars_ingested", context=parent):
        told = BarsIngested.model_validate(event.get_json())
        key = f"{told.symbol}|{told.interval}"
        db = sqlite3.connect(os.environ["DOCUMENTS_URL"].removeprefix("sqlite:"), isolation_level=None)
        db.execute("PRAGMA user_version").fetchone()
        db.execute("PRAGMA synchronous=NORMAL")
        [series] = _rows(db, "partition=? AND id=?", "series", key, key)
        columns = _columns(db, key)
        with tracer.start_as_current_span("evaluate"):
            found = _look(columns)
        for entry, direction, strength, features in found:
            await _tell(db, told, columns["close"][-1], entry, direction, strength, features)
        body = json.loads(series[7]) | {"evaluated_through": told.last_closed_at.isoformat()}
        db.execute(
            "UPDATE documents SET etag=?, body=?, due_at=? "
            "WHERE container='series' AND partition=? AND id=? AND etag=?",
            (uuid.uuid4().hex, json.dumps(body), _text(told.last_closed_at + timedelta(days=1)), key, key, series[6]),
        )


def _rows(db: sqlite3.Connection, where: str, *values: object) -> list[Any]:
    columns = "id, partition, sort, due_at, expires_at, schema, etag, body"
    return db.execute(f"SELECT {columns} FROM documents WHERE container=? AND {where}", values).fetchall()


def _columns(db: sqlite3.Connection, key: str) -> dict[str, np.ndarray]:
    pages: list[dict[str, Any]] = []
    after, limit = "~", 2
    while sum(len(page["close"]) for page in pages) < LOOKBACK:
        rows = _rows(db, "partition=? AND sort<? ORDER BY sort DESC LIMIT ?", "bars", key, after, limit)
        for row in rows:
            pages.append(json.loads(row[7]))
            if sum(len(page["close"]) for page in pages) >= LOOKBACK:
                break
        if len(rows) < limit:
            break
        after, limit = rows[-1][2], 50
    names = ("open", "high", "low", "close", "volume")
    return {name: np.array([x for page in reversed(pages) for x in page[name]])[-LOOKBACK:] for name in names}


def _look(columns: dict[str, np.ndarray]) -> list[tuple[str, str, float, dict[str, float]]]:
    found = []
    close, volume = columns["close"], columns["volume"]
    fast, slow = talib.SMA(close[-31:], 10), talib.SMA(close[-31:], 30)
    if (fast[-1] > slow[-1]) != (fast[-2] > slow[-2]):
        way = "long" if fast[-1] > slow[-1] else "short"
        strength = min(abs(fast[-1] - slow[-1]) / slow[-1] / 0.02, 1.0)
        found.append(("sma-10-30", way, strength, {"fast": fast[-1], "slow": slow[-1]}))
    rsi = talib.RSI(close, 14)
    if rsi[-2] < 30 <= rsi[-1] or rsi[-2] > 70 >= rsi[-1]:
        way = "long" if rsi[-2] < 30 else "short"
        found.append(("rsi-14", way, 0.5, {"rsi": rsi[-1], "rsi_before": rsi[-2]}))
    simple: Any = 0
    upper, _, lower = talib.BBANDS(close[-21:], 20, 2.0, 2.0, simple)
    times = volume[-1] / talib.SMA(volume[-21:], 20)[-2]
    for way, now, before in (
        ("long", close[-1] > upper[-1], close[-2] > upper[-2]),
        ("short", close[-1] < lower[-1], close[-2] < lower[-2]),
    ):
        if now and not before and times >= 1.5:
            found.append(("bollinger-20", way, 0.5, {"upper": upper[-1], "lower": lower[-1]}))
    return found


async def _tell(
    db: sqlite3.Connection,
    told: BarsIngested,
    price: float,
    entry: str,
    direction: str,
    strength: float,
    features: dict[str, float],
) -> None:
    now = datetime.now(UTC)
    name = f"{entry}|{told.symbol}|{told.interval}|{told.last_closed_at.isoformat()}"
    signal = SignalRaised(
        occurred_at=told.last_closed_at,
        recorded_at=now,
        signal_id=str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        entry=entry,
        symbol=told.symbol,
        direction=direction,
        strength=strength,
        reference_price=price,
        features=features,
    )
    id_, etag = signal.signal_id, uuid.uuid4().hex
    sort, due = f"{_text(now)}|{id_}", _text(now + timedelta(seconds=10))
    db.execute(
        "INSERT INTO documents (container, id, partition, sort, due_at, expires_at, schema, etag, body) "
        "VALUES ('signals', ?, ?, ?, ?, NULL, 1, ?, ?)",
        (id_, told.symbol, sort, due, etag, signal.model_dump_json()),
    )
    await _publish(signal)
    db.execute(
        "UPDATE documents SET due_at=NULL, etag=? WHERE container='signals' AND partition=? AND id=? AND etag=?",
        (uuid.uuid4().hex, told.symbol, id_, etag),
    )


async def _publish(signal: SignalRaised) -> None:
    headers: dict[str, str] = {}
    propagator.inject(headers)
    event = CloudEvent(
        source="/bare",
        type="signals.signal_raised.v1",
        id=signal.signal_id,
        subject=f"symbols/{signal.symbol}",
        time=signal.recorded_at,
        datacontenttype="application/json",
        data=signal.model_dump(mode="json"),
        extensions=headers or None,
    )
    client = EventGridPublisherClient(
        os.environ["EVENT_GRID_TOPIC_ENDPOINT"],
        AzureKeyCredential(os.environ["EVENT_GRID_TOPIC_KEY"]),
        retry_total=0,
        use_env_settings=False,
    )
    async for attempt in tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(4), reraise=True):
        with attempt:
            await client.send([event])


def _text(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
