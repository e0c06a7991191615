import json
import logging
import re
from datetime import datetime
from enum import StrEnum

import azure.functions as func
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel, ConfigDict, Field, field_validator

from shared.http import DEEPEST_BODY, LARGEST_BODY, Api, BodyError, body_of
from tests.builders import WALL, a_request

CANARY = "canary-webhook-token"


class Colour(StrEnum):
    """A colour."""

    RED = "red"
    BLUE = "blue"


class Rule(BaseModel):
    """What a caller sends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=10)
    symbols: list[str] = []
    share: float = Field(0, ge=0, le=1)
    colour: Colour = Colour.RED
    until: datetime | None = None
    more: object = None

    @field_validator("symbols")
    @classmethod
    def _is_short(cls, symbols: list[str]) -> list[str]:
        if any(len(symbol) > 5 for symbol in symbols):
            raise ValueError("a symbol has 5 letters at most")
        return symbols


class Kept(BaseModel):
    """What came of it."""

    name: str


def sent(body, kind="application/json"):
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return a_request("POST", headers={"Content-Type": kind} if kind else {}, body=raw)


def refused(body, kind="application/json"):
    with pytest.raises(BodyError) as error:
        body_of(sent(body, kind), Rule)
    return error.value.status, str(error.value)


class TestGoodBodies:
    def test_json_becomes_the_model(self):
        """With JSON's rules: a strict model still reads instants and words from text."""
        rule = body_of(
            sent({"name": "Zoë", "symbols": ["A"], "share": 0.5, "colour": "blue", "until": "2026-11-21T09:00:00Z"}),
            Rule,
        )

        assert rule == Rule(name="Zoë", symbols=["A"], share=0.5, colour=Colour.BLUE, until=WALL)

    @pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.a+json"])
    def test_kinds_of_json_are_json(self, kind):
        """Clients write the type in several ways."""
        assert body_of(sent({"name": "a"}, kind), Rule).name == "a"

    def test_body_may_be_as_large_and_deep_as_allowed(self):
        """The limits themselves are allowed."""
        text = json.dumps({"name": "a", "more": None})
        nested = "[" * (DEEPEST_BODY - 1) + "]" * (DEEPEST_BODY - 1)

        assert body_of(sent(text + " " * (LARGEST_BODY - len(text))), Rule)
        assert body_of(sent(f'{{"name": "a", "more": {nested}}}'), Rule)


class TestBadBodies:
    @pytest.mark.parametrize(
        ("body", "status", "says"),
        [
            ("", 400, "empty"),
            ("  \n", 400, "empty"),
            ("{", 400, "no JSON: .* line 1, column 2"),
            ("{'name': 'a'}", 400, "no JSON"),
            ('{"name": "a"} {}', 400, "no JSON"),
            ('\ufeff{"name": "a"}', 400, "no JSON"),
            ('{"name": "a"}'.encode("utf-16"), 400, "UTF-8"),
            (b'{"name": "\xff"}', 400, "UTF-8"),
            (r'{"name": "\ud800"}', 400, "UTF-8"),
            (r'{"\ud800": 1}', 400, "UTF-8"),
            ('{"name": "a", "name": "b"}', 400, "name twice"),
            ('{"name": "a", "more": {"x": 1, "x": 1}}', 400, "x twice"),
            ('{"name": "a", "share": NaN}', 400, "NaN"),
            ('{"name": "a", "share": Infinity}', 400, "Infinity"),
            ('{"name": "a", "more": [-Infinity]}', 400, "-Infinity"),
            ('{"name": "a", "share": 1e999}', 400, "too large"),
            ('{"name": "a", "more": ' + "9" * 5000 + "}", 400, "too large"),
            ('{"name": "a", "more": ' + "[" * DEEPEST_BODY + "]" * DEEPEST_BODY + "}", 400, "levels deep"),
            ("[" * 60_000, 400, "levels deep"),
            ('{"a":' * 10_000, 400, "levels deep"),
            ('{"name": "a"}' + " " * LARGEST_BODY, 413, "65,536 at most"),
        ],
        ids=lambda v: v if isinstance(v, str) and len(v) < 60 and v.isprintable() else "",
    )
    def test_what_is_no_plain_json_is_refused(self, body, status, says):
        """What two readers could understand differently, or what costs more than it may, is not read at all."""
        found, text = refused(body)

        assert found == status
        assert re.search(says, text), text

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            ({}, "name: Field required"),
            ({"name": 7}, "name: "),
            ({"name": "a" * 11}, "name: "),
            ({"name": "a", "share": 2}, "share: "),
            ({"name": "a", "share": "0.5"}, "share: "),
            ({"name": "a", "colour": "green"}, "colour: Input should be 'red' or 'blue'"),
            ({"name": "a", "symbols": ["A", 7]}, "symbols.1: "),
            ({"name": "a", "symbols": ["TOOLONG"]}, "symbols: Value error, a symbol has 5 letters at most"),
            ({"name": "a", "until": "soon"}, "until: "),
            ({"name": "a", "nmae": 1}, "nmae: Extra inputs are not permitted"),
            ([], "the body: "),
            ("null", "the body: "),
            ('"text"', "the body: "),
        ],
        ids=str,
    )
    def test_what_the_model_does_not_take_names_the_field(self, body, field):
        """422, and where it is wrong."""
        status, text = refused(body)

        assert status == 422
        assert field in text

    def test_every_wrong_field_is_named_at_once(self):
        """Nobody should have to ask once a fault; but a page of faults is enough."""
        _, text = refused({"name": 7, "share": 2, **{f"x{n}": 1 for n in range(30)}})

        assert "name: " in text
        assert "share: " in text
        assert text.endswith("(and 22 more)")

    def test_values_and_long_names_are_not_repeated(self):
        """What was sent may be secret or huge, and the answer may end in a log."""
        _, text = refused({"name": CANARY, "share": CANARY, "x\n" * 500: CANARY})

        assert CANARY not in text
        assert len(text) < 500
        assert text.isprintable()

    @pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    def test_other_content_is_told_to_be_json(self, kind):
        """A form that some page sends in a visitor's name is never read."""
        assert refused({"name": "a"}, kind) == (415, "send JSON, with the header Content-Type: application/json")

    @given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode(errors="surrogatepass")))
    def test_nonsense_is_never_more_than_refused(self, raw):
        """Whatever comes, it is one of four answers."""
        with pytest.raises(BodyError) as error:
            body_of(sent(raw), Rule)

        assert error.value.status in {400, 413, 415, 422}
        assert str(error.value).isprintable()


class TestEndpoints:
    @pytest.fixture
    def api(self):
        api, blueprint = Api(), func.Blueprint()

        @api.endpoint(
            blueprint, "rules_post", "rules", method="POST", summary="Keep.", answer=Kept, body=Rule, status=201
        )
        async def rules_post(req):
            return Kept(name=body_of(req, Rule).name)

        @api.endpoint(blueprint, "rules_get", "rules/{id}", summary="Show.", answer=Rule)
        async def rules_get(req):
            return Rule(name="a")

        api.blueprint = blueprint
        return api

    @pytest.fixture
    def post(self, api):
        app = func.FunctionApp()
        app.register_functions(api.blueprint)
        [function] = [f for f in app.get_functions() if f.get_function_name() == "rules_post"]
        return function.get_user_function()

    @pytest.mark.parametrize(
        ("body", "kind", "status"),
        [
            ({"name": "a"}, "application/json", 201),
            ({"name": 7}, "application/json", 422),
            ("{", "application/json", 400),
            ({"name": "a", "more": "x" * LARGEST_BODY}, "application/json", 413),
            ({"name": "a"}, "text/plain", 415),
        ],
    )
    async def test_trouble_with_a_body_is_a_problem(self, post, body, kind, status):
        """RFC 9457, with the sentence that says what to correct."""
        answer = await post(sent(body, kind))

        assert answer.status_code == status
        if status != 201:
            assert answer.mimetype == "application/problem+json"
            assert json.loads(answer.get_body())["status"] == status

    async def test_value_of_a_refused_body_reaches_no_log(self, post, caplog):
        """A webhook's address is a secret even when it is wrong."""
        with caplog.at_level(logging.DEBUG):
            answer = await post(sent({"name": f"https://x/{CANARY}"}))

        assert answer.status_code == 422
        assert CANARY not in caplog.text
        assert CANARY.encode() not in answer.get_body()

    def test_description_shows_the_body(self, api):
        """openapi.json holds the schema of what may be sent, beside that of what is answered."""
        described = json.loads(json.dumps(api.openapi(server="http://here")))
        operation = described["paths"]["/rules"]["post"]

        OpenAPIV31SpecValidator(described).validate()
        assert operation["requestBody"]["required"] is True
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        check = Draft202012Validator({**schema, "components": described["components"]})
        assert check.is_valid({"name": "a", "share": 0.5})
        assert not check.is_valid({"name": "a", "share": 2})
        assert not check.is_valid({"share": 0.5})
        assert "requestBody" not in described["paths"]["/rules/{id}"]["get"]
