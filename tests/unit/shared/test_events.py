from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import azure.functions as func
import pytest

from shared.errors import InvalidPayloadError
from shared.events import fact_id
from shared.market.events import BarsIngested
from shared.market.models import Interval
from tests.builders import CLOSE, WALL


def an_event(**changes) -> BarsIngested:
    facts = {
        "occurred_at": CLOSE,
        "recorded_at": WALL,
        "symbol": "AAPL",
        "interval": Interval.DAY,
        "revision": 0,
        "first_closed_at": CLOSE - timedelta(days=1),
        "last_closed_at": CLOSE,
        "count": 2,
    }
    return BarsIngested(**facts | changes)


def test_same_facts_are_the_same_id_on_every_machine():
    """The value is written down here: a changed formula would orphan everything that is stored."""
    assert fact_id("a", "b") == "49658dd6-6530-50c0-b5e5-8f64fe28b50e"
    assert UUID(fact_id("a", "b")).version == 5
    assert fact_id("a", "b") != fact_id("b", "a")


def test_repeated_event_has_the_same_id():
    """Telling again, later, is the same event; other bars, another revision or interval are others."""
    told = an_event()

    assert an_event(recorded_at=WALL + timedelta(seconds=20), count=2).event_id == told.event_id
    for other in (
        {"symbol": "IBM"},
        {"interval": Interval.HOUR},
        {"revision": 1},
        {"first_closed_at": CLOSE},
        {"last_closed_at": CLOSE + timedelta(days=1)},
    ):
        assert an_event(**other).event_id != told.event_id


def test_id_does_not_depend_on_how_a_zone_is_written():
    """An instant is the same fact in New York and in UTC."""
    new_york = timezone(timedelta(hours=-5))

    assert an_event(last_closed_at=CLOSE.astimezone(new_york)).event_id == an_event().event_id


def test_wire_form_is_a_cloud_event():
    """CloudEvents 1.0: what it is, whom it is about, when we learnt of it, and the facts as JSON."""
    event = an_event()

    assert event.to_wire() == {
        "specversion": "1.0",
        "id": event.event_id,
        "source": "/troop/market",
        "type": "market.bars_ingested.v1",
        "subject": "symbols/AAPL",
        "time": "2026-11-21T09:00:00Z",
        "datacontenttype": "application/json",
        "data": {
            "occurred_at": "2013-01-02T21:00:00Z",
            "recorded_at": "2026-11-21T09:00:00Z",
            "symbol": "AAPL",
            "interval": "1d",
            "revision": 0,
            "first_closed_at": "2013-01-01T21:00:00Z",
            "last_closed_at": "2013-01-02T21:00:00Z",
            "count": 2,
        },
    }


def test_what_was_told_is_what_is_heard():
    """A round trip over the wire changes nothing; a field of a later publisher is ignored."""
    event = an_event()
    wire = event.to_wire()

    assert BarsIngested.from_wire(wire["type"], wire["data"] | {"added_later": 1}) == event


@pytest.mark.parametrize("type_", ["market.bars_ingested.v2", "", "x" * 500])
def test_other_type_is_refused(type_):
    """Another version is another event."""
    with pytest.raises(InvalidPayloadError, match=r"expected an event of type market\.bars_ingested\.v1") as caught:
        BarsIngested.from_wire(type_, an_event().to_wire()["data"])

    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"symbol": None}, "symbol"),
        ({"occurred_at": "2013-01-02T21:00:00"}, "occurred_at"),
        ({"interval": "5m"}, "interval"),
        ({"count": "many"}, "count"),
        ({"count": float("nan")}, "count"),
    ],
)
def test_fact_that_cannot_be_true_is_refused_by_name(change, field):
    """The reason names the field and never repeats the value, which may be anything."""
    data = an_event().to_wire()["data"] | change

    with pytest.raises(InvalidPayloadError, match=f"market.bars_ingested.v1: {field}: "):
        BarsIngested.from_wire(BarsIngested.type, data)


@pytest.mark.parametrize("data", [None, "text", 7, [], "{not json"])
def test_payload_that_is_no_object_is_refused(data):
    """Whatever is posted to the topic is judged, never trusted."""
    with pytest.raises(InvalidPayloadError, match=r"market\.bars_ingested\.v1: data: "):
        BarsIngested.from_wire(BarsIngested.type, data)


def test_missing_facts_are_all_named():
    """At most five, so that a letter stays readable."""
    with pytest.raises(InvalidPayloadError) as caught:
        BarsIngested.from_wire(BarsIngested.type, {"symbol": "AAPL"})

    assert str(caught.value).count("Field required") == 5


def test_event_is_a_frozen_fact():
    """Nobody changes what has been told."""
    with pytest.raises(ValueError, match="frozen"):
        an_event().symbol = "IBM"


def test_worker_hands_over_what_the_wire_carries():
    """The library's CloudEvent gives back the facts, the extensions beside them."""
    wire = an_event().to_wire()
    event = func.CloudEvent(**wire | {"time": datetime(2026, 11, 21, 9, tzinfo=UTC), "traceparent": "00-1-2-01"})

    assert BarsIngested.from_wire(event.type, event.get_json()) == an_event()
    assert event.extension_attrs == {"traceparent": "00-1-2-01"}


def test_text_that_is_no_unicode_is_refused():
    """Half a surrogate pair can be read from JSON but never stored or told on: it is buried, not redelivered."""
    data = an_event().to_wire()["data"] | {"symbol": "\ud800"}

    with pytest.raises(InvalidPayloadError, match="not valid Unicode"):
        BarsIngested.from_wire(BarsIngested.type, data)
