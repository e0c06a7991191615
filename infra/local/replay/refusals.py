"""
Every documented answer with which a provider says no, or says nothing, word for word.

A provider gives one for its natural cause; a scripted fault gives any of them by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

type Body = Mapping[str, Any] | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One answer; {words} in its texts are filled in by whoever gives it. A body that is a str is plain text."""

    reason: str
    status: int
    body: Body

    def response(self, words: Mapping[str, object]) -> web.Response:
        """The answer with its words filled in."""
        body = self.filled(words)
        if isinstance(body, str):
            return web.Response(text=body, status=self.status)
        return web.json_response(body, status=self.status)

    def filled(self, words: Mapping[str, object]) -> Any:  # noqa: ANN401 - any JSON
        """The body with its words filled in."""
        return _filled(self.body, words)


class RefusalError(Exception):
    """Ends a call with one of its provider's refusals."""

    def __init__(self, reason: str, **words: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.words = words


class _Words(dict[str, object]):
    def __missing__(self, name: str) -> str:
        return ""


def _filled(value: Any, words: Mapping[str, object]) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, str):
        return value.format_map(_Words(words))
    if isinstance(value, Mapping):
        return {name: _filled(one, words) for name, one in value.items()}
    return value


def _table(refusals: Sequence[Refusal]) -> Mapping[str, Refusal]:
    return {one.reason: one for one in refusals}


# --- Alpha Vantage: always HTTP 200, and the prose decides

_THANKS = "Thank you for using Alpha Vantage!"
_PLANS = "any of the premium plans at https://www.alphavantage.co/premium/"
_KEY_PAGE = "(https://www.alphavantage.co/support/#api-key)"
_DOCS = "https://www.alphavantage.co/documentation"
_SPREAD = f"{_THANKS} Please consider spreading out your free API requests more sparingly"
_LIFT = (
    f"You may subscribe to {_PLANS} to lift the free key rate limit (25 requests per day), raise the per-second "
    "burst limit, and instantly unlock all premium endpoints"
)
_FREQUENCY = (
    f"{_THANKS} Our standard API call frequency is 5 calls per minute and 500 calls per day. Please visit "
    "https://www.alphavantage.co/premium/ if you would like to target a higher API call frequency."
)


def _said(reason: str, name: str, text: str) -> Refusal:
    return Refusal(reason=reason, status=200, body={name: text})


ALPHA_VANTAGE = _table(
    [
        _said("per_second", "Information", f"{_SPREAD} ({{calls}} request per second). {_LIFT}"),
        _said("per_second_older", "Information", f"{_SPREAD}. {_LIFT}"),
        _said("per_old_minute", "Note", _FREQUENCY),
        _said("per_old_day", "Note", _FREQUENCY),
        _said(
            "per_day",
            "Information",
            "We have detected your API key as {key} and our standard API rate limit is {calls} requests per day. "
            f"Please subscribe to {_PLANS} to instantly remove all daily rate limits.",
        ),
        _said(
            "per_minute",
            "Information",
            f"{_THANKS} Please contact premium@alphavantage.co if you are targeting a higher API call volume.",
        ),
        _said(
            "premium_endpoint",
            "Information",
            f"{_THANKS} This is a premium endpoint. You may subscribe to {_PLANS} "
            "to instantly unlock all premium endpoints",
        ),
        _said(
            "premium_parameter",
            "Information",
            f"{_THANKS} The {{parameter}} parameter value is a premium feature for the {{function}} endpoint. "
            f"You may subscribe to {_PLANS} to instantly unlock all premium features",
        ),
        _said(
            "invalid_key",
            "Error Message",
            f"the parameter apikey is invalid or missing. Please claim your free API key on {_KEY_PAGE}. "
            "It should take less than 20 seconds.",
        ),
        _said(
            "demo_key",
            "Information",
            f"The **demo** API key is for demo purposes only. Please claim your free API key at {_KEY_PAGE} "
            "to explore our full API offerings. It takes fewer than 20 seconds.",
        ),
        _said(
            "invalid_call",
            "Error Message",
            f"Invalid API call. Please retry or visit the documentation ({_DOCS}/) for {{function}}.",
        ),
        _said("unknown_function", "Error Message", "This API function ({function}) does not exist."),
        _said(
            "no_news",
            "Information",
            f"Invalid inputs. Please refer to the API documentation {_DOCS}#newsapi and try again.",
        ),
        _said("not_acceptable", "detail", "Could not satisfy the request Accept header."),
        Refusal(reason="empty_object", status=200, body={}),
        Refusal(reason="empty_quote", status=200, body={"Global Quote": {}}),
        _said("unknown_sentence", "Information", "The harbour is closed on account of fog; the lamps are lit."),
    ]
)


# --- Finnhub: real status codes, and one answer that looks like a price

_REACHED = "API limit reached. Please try again later. Remaining Limit: 0"


def _error(reason: str, status: int, text: str) -> Refusal:
    return Refusal(reason=reason, status=status, body={"error": text})


FINNHUB = _table(
    [
        _error("per_second", 429, _REACHED),
        _error("per_minute", 429, _REACHED),
        Refusal(
            reason="sign_up",
            status=429,
            body="API limit reached. Please sign up for a free account to get an API key at https://finnhub.io",
        ),
        Refusal(reason="limit_as_text", status=429, body=_REACHED),
        _error("missing_key", 401, "Please use an API key."),
        _error("invalid_key", 401, "Invalid API key."),
        _error("premium_endpoint", 403, "You don't have access to this resource."),
        _error("premium_endpoint_older", 401, "You don't have access to this resource."),
        _error("invalid_call", 422, "{text}"),
        Refusal(reason="no_data", status=200, body={"s": "no_data"}),
        Refusal(
            reason="zero_quote",
            status=200,
            body={"c": 0, "d": None, "dp": None, "h": 0, "l": 0, "o": 0, "pc": 0, "t": 0},
        ),
        _error("unknown_sentence", 200, "The harbour is closed on account of fog; the lamps are lit."),
    ]
)


# --- Twelve Data: the code is in the body; being over the limit comes with HTTP 200


def _coded(reason: str, code: int, text: str, *, status: int | None = None) -> Refusal:
    return Refusal(reason=reason, status=status or code, body={"code": code, "message": text, "status": "error"})


_MINUTE_SPENT = (
    "You have run out of API credits for the current minute. {used} API credits were used, "
    "with the current limit being {calls}."
)

TWELVE_DATA = _table(
    [
        _coded("per_minute", 429, _MINUTE_SPENT, status=200),
        _coded("per_day", 429, _MINUTE_SPENT.replace("current minute", "day"), status=200),
        _coded("per_minute_with_status", 429, _MINUTE_SPENT),
        _coded(
            "invalid_key",
            401,
            "**apikey** parameter is incorrect or not specified. You can get your free API key instantly following "
            "this link: https://twelvedata.com/pricing.",
        ),
        _coded(
            "premium_endpoint",
            403,
            "{path} is available exclusively with grow or pro or ultra or enterprise plans. Consider upgrading your "
            "API Key now at https://twelvedata.com/pricing",
        ),
        _coded(
            "unknown_symbol",
            400,
            "**symbol** not found: {symbol}. Please specify it correctly according to API Documentation.",
        ),
        _coded(
            "missing_symbol",
            404,
            "**symbol** or **figi** parameter is missing or invalid. Please provide a valid symbol according to API "
            "documentation: https://twelvedata.com/docs#reference-data",
        ),
        _coded("invalid_call", 400, "{text}"),
        _coded(
            "no_data",
            400,
            "No data is available on the specified dates. Try setting different start/end dates.",
        ),
        _coded(
            "unknown_sentence",
            520,
            "The harbour is closed on account of fog; the lamps are lit.",
            status=200,
        ),
    ]
)


# --- Polygon, now Massive


def _status(reason: str, status: int, name: str, word: str, text: str) -> Refusal:
    body = {"status": word, "request_id": "{request_id}", name: text}
    return Refusal(reason=reason, status=status, body=body)


_EXCEEDED = (
    "You've exceeded the maximum requests per minute, please wait or upgrade your subscription to continue. "
    "https://massive.com/pricing"
)

POLYGON = _table(
    [
        _status("per_second", 429, "error", "ERROR", _EXCEEDED),
        _status("per_minute", 429, "error", "ERROR", _EXCEEDED),
        _status("missing_key", 401, "error", "ERROR", "API Key was not provided"),
        _status("invalid_key", 401, "error", "ERROR", "Unknown API Key"),
        _status(
            "not_authorized",
            403,
            "message",
            "NOT_AUTHORIZED",
            "Your plan doesn't include this data timeframe. Please upgrade your plan at https://massive.com/pricing",
        ),
        _status(
            "not_entitled",
            403,
            "message",
            "NOT_AUTHORIZED",
            "You are not entitled to this data. Please upgrade your plan at https://massive.com/pricing",
        ),
        _status("invalid_call", 400, "error", "ERROR", "{text}"),
        Refusal(
            reason="no_results",
            status=200,
            body={"status": "OK", "request_id": "{request_id}", "queryCount": 0, "resultsCount": 0, "adjusted": True},
        ),
        _status(
            "unknown_sentence", 200, "error", "ERROR", "The harbour is closed on account of fog; the lamps are lit."
        ),
    ]
)

REFUSALS: Mapping[str, Mapping[str, Refusal]] = {
    "alpha_vantage": ALPHA_VANTAGE,
    "finnhub": FINNHUB,
    "twelve_data": TWELVE_DATA,
    "polygon": POLYGON,
}
