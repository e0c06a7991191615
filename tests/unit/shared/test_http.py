import base64
import json
import logging
from dataclasses import dataclass
from datetime import datetime, timedelta

import azure.functions as func
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel

from shared.documents import sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotEntitledError,
    NotFoundError,
    OutcomeUnknownError,
    RateLimitedError,
    StaleError,
    UnavailableError,
    UnknownSymbolError,
)
from shared.http import (
    AFTER,
    CURSOR,
    LIMIT,
    OVERLAP,
    PAGE_LIMIT,
    Api,
    Page,
    cursor_of,
    limit_of,
    listed,
    problem,
    sort_of,
)
from tests.builders import WALL, a_document, a_request, documents

SECOND = timedelta(seconds=1)


class Thing(BaseModel):
    """One thing."""

    name: str
    seen_at: datetime = WALL


class Things(Page[Thing]):
    """Things."""


def serving(handler, **declared):
    """The function the worker would call for an endpoint with this handler."""
    blueprint, api = func.Blueprint(), Api()
    api.endpoint(blueprint, "things", "things/{name}", summary="A thing.", **{"answer": Thing, **declared})(handler)
    app = func.FunctionApp()
    app.register_functions(blueprint)
    [function] = app.get_functions()
    return function.get_user_function()


def answering(answer):
    async def handler(req):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return serving(handler)


class TestAnswers:
    async def test_model_becomes_json(self):
        """A handler returns a model, the caller gets its JSON."""
        answer = await answering(Thing(name="Zürich"))(a_request())

        assert answer.status_code == 200
        assert answer.mimetype == "application/json"
        assert json.loads(answer.get_body()) == {"name": "Zürich", "seen_at": "2026-11-21T09:00:00Z"}

    async def test_unchanged_answer_is_not_sent_again(self):
        """With the ETag of the last answer the next costs no body, until something changed."""
        first = await answering(Thing(name="a"))(a_request())
        asked_again = a_request(headers={"If-None-Match": first.headers["ETag"]})

        same = await answering(Thing(name="a"))(asked_again)
        changed = await answering(Thing(name="b"))(asked_again)

        assert (same.status_code, same.get_body(), same.headers["ETag"]) == (304, b"", first.headers["ETag"])
        assert changed.status_code == 200
        assert changed.headers["ETag"] != first.headers["ETag"]

    async def test_one_of_several_etags_is_enough(self):
        """Caches in between may know more than one version."""
        first = await answering(Thing(name="a"))(a_request())

        again = await answering(Thing(name="a"))(
            a_request(headers={"if-none-match": f'W/"other", {first.headers["ETag"]}'})
        )

        assert again.status_code == 304

    async def test_only_reads_are_conditional(self):
        """What changes something always says what it did, with the declared status."""

        async def handler(req):
            return Thing(name="a")

        answer = await serving(handler, method="PUT", anonymous=False, status=201)(a_request("PUT"))

        assert answer.status_code == 201
        assert "ETag" not in answer.headers

    async def test_ready_response_goes_out_as_it_is(self):
        """A handler that has its own answer keeps it."""
        ready = func.HttpResponse(b"<rss/>", mimetype="application/rss+xml")

        assert await answering(ready)(a_request()) is ready


class TestProblems:
    @pytest.mark.parametrize(
        ("error", "status", "retry_after"),
        [
            (InvalidPayloadError("limit must be …"), 400, None),
            (NotFoundError("no AAPL"), 404, None),
            (UnknownSymbolError("no such symbol"), 404, None),
            (ConflictError("there already"), 409, None),
            (NotEntitledError("not on this plan"), 422, None),
            (OutcomeUnknownError("perhaps"), 422, None),
            (RateLimitedError("slow"), 429, "5"),
            (RateLimitedError("slow", retry_after=timedelta(minutes=2)), 429, "120"),
            (RateLimitedError("slow", retry_after=timedelta(milliseconds=3)), 429, "1"),
            (UnavailableError("locked"), 503, "2"),
            (StaleError("somebody wrote first"), 503, "2"),
        ],
        ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
    )
    async def test_every_kind_of_trouble_has_its_status(self, error, status, retry_after):
        """The status says whether to correct, to wait or to give up; the detail is the error's own sentence."""
        answer = await answering(error)(a_request())

        body = json.loads(answer.get_body())
        assert answer.mimetype == "application/problem+json"
        assert (answer.status_code, body["status"], body["detail"]) == (status, status, str(error))
        assert body.keys() == {"type", "title", "status", "detail"}
        assert answer.headers.get("Retry-After") == retry_after

    @pytest.mark.parametrize("error", [ConfigurationError("FINNHUB_KEY is wrong"), KeyError("inside"), ValueError("x")])
    async def test_our_own_trouble_is_told_to_the_log_only(self, error, caplog):
        """A caller learns nothing of our inside; the operator learns all."""
        with caplog.at_level(logging.ERROR):
            answer = await answering(error)(a_request())

        assert answer.status_code == 500
        assert str(error).strip("'") not in json.loads(answer.get_body())["detail"]
        assert str(error).strip("'") in caplog.text

    def test_secrets_leave_the_detail(self):
        """Texts carry no secrets, and if one does all the same it stops here."""
        answer = problem(400, "No", "https://x?apikey=CANARY is wrong")

        assert json.loads(answer.get_body())["detail"] == "https://x?apikey=*** is wrong"


class TestLimit:
    @pytest.mark.parametrize(("text", "limit"), [(None, 50), ("1", 1), ("007", 7), (str(PAGE_LIMIT), PAGE_LIMIT)])
    def test_number_in_range_is_taken(self, text, limit):
        """50 unless told."""
        assert limit_of(a_request(params={} if text is None else {"limit": text})) == limit

    @pytest.mark.parametrize("text", ["", "0", "-1", "501", "1.5", "ten", "1e2", "٣", "²", "9" * 4000])
    def test_other_text_is_refused_with_the_range(self, text):
        """The error says what would be right."""
        with pytest.raises(InvalidPayloadError, match="whole number from 1 to 500"):
            limit_of(a_request(params={"limit": text}))


class TestCursor:
    @given(st.datetimes(), st.text())
    def test_position_survives_the_trip(self, at, id_):
        """A cursor goes out and comes back as the same position, through any URL."""
        sort = sort_key(at.replace(tzinfo=WALL.tzinfo), id_.encode(errors="replace").decode())
        cursor = cursor_of(sort)

        assert sort_of(cursor) == sort
        assert cursor.isascii()
        assert not set(cursor) & set("+/=&?# ")

    @pytest.mark.parametrize(
        "cursor",
        [
            "",
            "x",
            "%%%",
            "2012-01-01T00:00:00Z",
            "é",
            *(
                base64.urlsafe_b64encode(text.encode("latin-1")).decode()
                for text in (
                    "hello",
                    "2012-01-01T00:00:00|d1",
                    "2012-01-01T00:00:00Z|d1",
                    "2012-01-01T00:00:00.000000Z",
                    "2012-01-01|d1",
                    "9999-99-99T00:00:00.000000Z|d1",
                    "0001-01-01T00:00:00.000000+23:00|d1",
                    "\xff\xfe",
                )
            ),
        ],
    )
    def test_foreign_cursor_is_refused(self, cursor):
        """Only what we gave out is a position; the error says where to take one from."""
        with pytest.raises(InvalidPayloadError, match="take it from `next`"):
            sort_of(cursor)


@dataclass
class Feed:
    """A stored list, as the handlers see it."""

    store: object
    reads: int = 0

    async def add(self, id, seconds):
        await self.store.create("things", a_document(id, at=WALL + seconds * SECOND))

    async def read(self, after, newest_first, limit):
        self.reads += 1
        return await self.store.feed("things", after=after, newest_first=newest_first, limit=limit)

    async def get(self, **params):
        items, cursor = await listed(a_request(params={k: str(v) for k, v in params.items()}), self.read)
        return [item.id for item in items], cursor


@pytest.fixture
async def feed():
    store = documents()
    yield Feed(store)
    await store.close()


class TestListed:
    async def test_newest_first_to_the_end(self, feed):
        """Following `next` shows everything once, newest first, and then null."""
        for n in range(5):
            await feed.add(str(n), n)

        seen, cursor = await feed.get(limit=2)
        while cursor:
            more, cursor = await feed.get(limit=2, cursor=cursor)
            seen += more

        assert seen == ["4", "3", "2", "1", "0"]

    async def test_empty_list_has_no_next(self, feed):
        """Nothing is an answer."""
        assert await feed.get() == ([], None)

    async def test_what_came_while_reading_backwards_shifts_nothing(self, feed):
        """A position is a place in time, not a count."""
        for n in range(4):
            await feed.add(str(n), n)
        first, cursor = await feed.get(limit=2)

        await feed.add("new", 9)
        second, _ = await feed.get(limit=2, cursor=cursor)

        assert first + second == ["3", "2", "1", "0"]

    async def test_after_shows_what_is_newer_oldest_first(self, feed):
        """Who was away catches up in order; the last 60 s before the cursor are repeated."""
        for seconds in (0, 100, 101, 200, 300):
            await feed.add(str(seconds), seconds)
        cursor = cursor_of(sort_key(WALL + 110 * SECOND, "any"))

        assert (await feed.get(after=cursor))[0] == ["100", "101", "200", "300"]

    async def test_caught_up_reader_keeps_a_cursor(self, feed):
        """`next` never goes back and is never null: it is where to ask from the next time."""
        await feed.add("0", 0)
        start = cursor_of(sort_key(WALL + 500 * SECOND))

        assert await feed.get(after=start) == ([], start)
        _, after = await feed.get(after=cursor_of(sort_key(WALL - SECOND)))
        assert sort_of(after) == sort_key(WALL, "0")

    async def test_late_commit_is_seen(self, feed):
        """A writer that took its time up to a minute stands before the cursor, and is shown all the same."""
        await feed.add("0", 0)
        await feed.add("100", 100)
        _, cursor = await feed.get(after=cursor_of(sort_key(WALL)))

        await feed.add("late", 41)

        assert "late" in (await feed.get(after=cursor))[0]

    async def test_busy_minute_does_not_stop_the_reader(self, feed):
        """More items in the overlap than a page holds: each answer still brings newer ones."""
        for n in range(40):
            await feed.add(f"{n:02}", n)
        known = [f"{n:02}" for n in range(30)]
        cursor = cursor_of(sort_key(WALL + 29 * SECOND, "29"))

        first, cursor = await feed.get(after=cursor, limit=4)
        second, cursor = await feed.get(after=cursor, limit=4)
        third, cursor = await feed.get(after=cursor, limit=4)

        assert [item for item in first if item not in known][:4] == ["30", "31", "32", "33"]
        assert {f"{n:02}" for n in range(40)} == {*known, *first, *second, *third}
        assert sort_of(cursor) == sort_key(WALL + 39 * SECOND, "39")

    @given(
        commits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60), st.booleans()), max_size=30),
        limit=st.integers(1, 5),
    )
    async def test_nobody_misses_anything(self, commits, limit):
        """Whatever is committed at most a minute late, a reader who polls from its cursor sees all of it."""
        store = documents()
        feed, seen, cursor = Feed(store), set(), cursor_of(sort_key(WALL - OVERLAP))
        for n, (seconds, late, polls) in enumerate(sorted(commits, key=lambda c: c[0])):
            await feed.add(f"{n:02}", seconds - late)
            if polls:
                items, cursor = await feed.get(after=cursor, limit=limit)
                seen |= set(items)
        for _ in commits:
            items, cursor = await feed.get(after=cursor, limit=limit)
            seen |= set(items)

        assert seen == {f"{n:02}" for n in range(len(commits))}
        await store.close()

    async def test_first_instant_of_all_is_a_cursor_too(self, feed):
        """A position from which there is no minute back begins at the beginning."""
        await feed.add("0", 0)

        items, _ = await feed.get(after=cursor_of(sort_key(datetime.min.replace(tzinfo=WALL.tzinfo))))

        assert items == ["0"]

    @pytest.mark.parametrize("params", [{"after": "x"}, {"cursor": "x"}, {"limit": "0"}, {"after": ""}])
    async def test_wrong_parameter_is_refused_before_reading(self, feed, params):
        """What was asked wrong costs no read."""
        with pytest.raises(InvalidPayloadError):
            await feed.get(**params)

        assert feed.reads == 0


class TestApi:
    @pytest.fixture
    def api(self):
        api, blueprint = Api(), func.Blueprint()

        async def handler(req):
            return Thing(name="a")

        api.endpoint(
            blueprint, "things_list", "things", summary="Things.", answer=Things, query=(LIMIT, CURSOR, AFTER)
        )(handler)
        api.endpoint(
            blueprint, "things_put", "things/{name}", summary="Put.", answer=Thing, method="PUT", anonymous=False
        )(handler)
        api.endpoint(blueprint, "feed", "feed.xml", summary="Feed.", answer="application/rss+xml")(handler)
        api.blueprint = blueprint
        return api

    def test_description_is_valid_openapi(self, api):
        """openapi.json is made from the routes themselves, and tools can read it."""
        described = json.loads(json.dumps(api.openapi(server="http://here")))

        OpenAPIV31SpecValidator(described).validate()
        assert {path: set(item) for path, item in described["paths"].items()} == {
            "/things": {"get"},
            "/things/{name}": {"put"},
            "/feed.xml": {"get"},
        }
        assert described["servers"] == [{"url": "http://here/api"}]

    def test_description_says_who_needs_a_key(self, api):
        """Only what is not anonymous asks for one."""
        paths = api.openapi(server="")["paths"]

        assert paths["/things/{name}"]["put"]["security"] == [{"functionKey": []}]
        assert "security" not in paths["/things"]["get"]

    def test_host_is_told_the_same(self, api):
        """Routes, methods and levels of the functions are those that were declared."""
        app = func.FunctionApp(http_auth_level=func.AuthLevel.ADMIN)
        app.register_functions(api.blueprint)

        told = {}
        for function in app.get_functions():
            trigger = json.loads(function.get_function_json())["bindings"][0]
            told[function.get_function_name()] = (trigger["route"], trigger["methods"], trigger["authLevel"])

        assert told == {
            "things_list": ("things", ["GET"], "ANONYMOUS"),
            "things_put": ("things/{name}", ["PUT"], "FUNCTION"),
            "feed": ("feed.xml", ["GET"], "ANONYMOUS"),
        }
