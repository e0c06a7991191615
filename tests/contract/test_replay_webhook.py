"""Finnhub's earnings webhook as the replay sends it: when, what, how often, and when it gives up."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from infra.local.replay.almanac import Almanac, Report
from infra.local.replay.tapes import Tapes
from infra.local.replay.webhook import MOST_GIVEN_UP, EarningsWebhook
from shared.clock import StoppedClock, format_instant
from tests.contract.replaying import NOON, days, utc

BEFORE = utc("2012-06-30T00:00")
AFTER = utc("2012-09-01T00:00")


@dataclass
class App:
    """Who receives the webhook; it answers as it is told, and 200 when nothing is left to say."""

    answers: list[int] = field(default_factory=list)
    got: list[tuple[str, str, str]] = field(default_factory=list)
    heard: Callable[[], object] = lambda: None

    async def hear(self, request: web.Request) -> web.Response:
        self.heard()
        self.got.append((request.headers["X-Finnhub-Secret"], request.content_type, await request.text()))
        return web.Response(status=self.answers.pop(0) if self.answers else 200)

    @property
    def events(self) -> list[dict]:
        return [json.loads(body) for _, _, body in self.got]


@dataclass
class Sending:
    """A webhook with its market clock in the test's hand, and the app it sends to."""

    webhook: EarningsWebhook
    market: StoppedClock
    app: App
    page: httpx.AsyncClient
    reports: list[Report]


@asynccontextmanager
async def sending(*answers: int, url: str | None = None) -> AsyncIterator[Sending]:
    app, market = App(list(answers)), StoppedClock(AFTER)
    almanac = Almanac(Tapes(days(), market.now))
    reports = almanac.came_out(BEFORE, AFTER)
    market.at = BEFORE
    receiver, provider = web.Application(), web.Application()
    receiver.router.add_post("/api/hooks/finnhub", app.hear)
    async with TestServer(receiver, host="127.0.0.1") as server:
        target = url or str(server.make_url("/api/hooks/finnhub"))
        webhook = EarningsWebhook(
            almanac=almanac, wall=StoppedClock(NOON), url=target, secret="s3cret", waits=(0, 0), through=BEFORE
        )
        provider.add_routes(webhook.routes())
        async with (
            TestServer(provider, host="127.0.0.1") as site,
            httpx.AsyncClient(base_url=str(site.make_url("/")), trust_env=False) as page,
        ):
            try:
                yield Sending(webhook, market, app, page, reports)
            finally:
                await webhook.close()


async def test_a_report_is_posted_when_its_instant_passes():
    """Not a second before; once; with the secret, and in names of snake case."""
    async with sending() as s:
        first = s.reports[0]
        s.market.at = first.out_at - timedelta(seconds=1)
        await s.webhook.look()
        assert s.app.got == []
        s.market.at = first.out_at
        await s.webhook.look()
        await s.webhook.look()

    [(secret, kind, body)] = s.app.got
    assert (secret, kind) == ("s3cret", "application/json")
    assert json.loads(body) == {
        "event": "earnings",
        "data": [
            {
                "date": str(first.day),
                "eps_actual": first.eps_actual,
                "eps_estimate": first.eps_estimate,
                "revenue_actual": first.revenue_actual,
                "revenue_estimate": first.revenue_estimate,
                "symbol": first.symbol,
            }
        ],
    }


async def test_all_reports_of_a_long_step_are_told_in_order():
    """A fast market passes many instants between two looks; each is told, oldest first."""
    async with sending() as s:
        s.market.at = AFTER
        await s.webhook.look()

    told = [(row["symbol"], row["date"]) for event in s.app.events for row in event["data"]]
    assert told == [(report.symbol, str(report.day)) for report in s.reports]
    assert len(told) == 5, "of five symbols, one report each"


async def test_a_kill_in_a_long_step_repeats_at_most_the_delivery_under_way():
    """What was delivered before it is told as done in the state that is saved meanwhile."""
    async with sending() as s:
        saved: list[str | None] = []
        s.app.heard = lambda: saved.append(s.webhook.state()["through"])
        s.market.at = AFTER
        await s.webhook.look()

    instants = [format_instant(at) for at in dict.fromkeys(report.out_at for report in s.reports)]
    assert saved == [format_instant(BEFORE), *instants[:-1]]


async def test_an_answer_that_is_no_2xx_is_tried_again():
    """Twice more, and the third is taken: one delivery of three attempts."""
    async with sending(500, 302) as s:
        s.market.at = s.reports[0].out_at
        await s.webhook.look()
        shown = (await s.page.get("/webhooks/finnhub")).json()

    assert len(s.app.got) == 3
    assert len({body for _, _, body in s.app.got}) == 1
    assert (shown["delivered"], shown["given_up"], shown["attempts"], shown["enabled"]) == (1, 0, 3, True)
    assert shown["items"][0]["attempts"] == 3
    assert shown["items"][0]["symbols"] == [s.reports[0].symbol]


async def test_repeated_failure_switches_it_off_until_somebody_switches_it_on():
    """It says why; what came out meanwhile is not told later."""
    async with sending(*[503] * 3 * MOST_GIVEN_UP) as s:
        s.market.at = s.reports[MOST_GIVEN_UP].out_at
        await s.webhook.look()
        off = (await s.page.get("/webhooks/finnhub")).json()
        s.market.at = s.reports[-1].out_at - timedelta(seconds=1)
        on = (await s.page.put("/webhooks/finnhub", json={"enabled": True})).json()
        refused = await s.page.put("/webhooks/finnhub", json={"enabled": "yes"})
        heard = len(s.app.got)
        s.webhook.through = s.market.at
        s.market.at = s.reports[-1].out_at
        await s.webhook.look()

    assert heard == 3 * MOST_GIVEN_UP
    assert (off["enabled"], off["given_up"], off["delivered"]) == (False, MOST_GIVEN_UP, 0)
    assert off["disabled_because"] == "3 deliveries in a row were given up; the last one: answered 503"
    assert (on["enabled"], on["disabled_because"], refused.status_code) == (True, "", 400)
    assert [row["symbol"] for event in s.app.events[heard:] for row in event["data"]] == [s.reports[-1].symbol]


async def test_while_it_is_off_nothing_is_told_now_or_later():
    """Reports that pass meanwhile are lost, as at the provider."""
    async with sending() as s:
        await s.page.put("/webhooks/finnhub", json={"enabled": False})
        s.market.at = AFTER
        await s.webhook.look()
        await s.page.put("/webhooks/finnhub", json={"enabled": True})
        await s.webhook.look()

    assert s.app.got == []


async def test_a_success_forgives_the_failures_before_it():
    """Only failures in a row switch it off."""
    async with sending(*[503] * 6, 200, *[503] * 6, 200) as s:
        s.market.at = AFTER
        await s.webhook.look()

    assert (s.webhook.enabled, s.webhook.stats()["delivered"], s.webhook.stats()["given_up"]) == (True, 1, 4)


async def test_an_app_that_is_away_is_a_failure_like_any_other():
    """No answer is told in words, and nothing is raised."""
    async with sending(url="http://127.0.0.1:9/api/hooks/finnhub") as s:
        s.market.at = s.reports[0].out_at
        await s.webhook.look()
        shown = (await s.page.get("/webhooks/finnhub")).json()

    assert (shown["given_up"], shown["items"][0]["delivered"]) == (1, False)
    assert shown["items"][0]["outcome"].startswith("no answer (")


async def test_what_was_told_is_not_told_again_after_a_restart():
    """The instant, the switch and the counts outlive the process."""
    async with sending(503, 503, 503) as s:
        s.market.at = s.reports[1].out_at
        await s.webhook.look()
        state = json.loads(json.dumps(s.webhook.state()))
    async with sending() as again:
        again.webhook.restore(state)
        again.market.at = again.reports[2].out_at
        await again.webhook.look()

    assert [row["symbol"] for event in again.app.events for row in event["data"]] == [again.reports[2].symbol]
    assert (again.webhook.stats()["delivered"], again.webhook.stats()["given_up"]) == (2, 1)


async def test_a_first_start_tells_of_nothing_that_was_before():
    """A new market does not flood the app with its history."""
    async with sending() as s:
        s.webhook.through = None
        s.market.at = AFTER
        await s.webhook.start()
        await s.webhook.look()

    assert s.app.got == []


async def test_the_test_button_sends_what_is_no_json():
    """As the dashboard's does; the answer's status is told."""
    async with sending(202) as s:
        told = (await s.page.post("/webhooks/finnhub/test")).json()

    [(secret, kind, body)] = s.app.got
    assert (told["status"], secret, kind) == (202, "s3cret", "text/plain")
    with pytest.raises(json.JSONDecodeError):
        json.loads(body)


async def test_one_call_sends_the_newest_report_of_a_symbol():
    """At once and once, on the market clock; without a report, or without a symbol, it says what to do."""
    async with sending() as s:
        s.market.at = AFTER
        sent = (await s.page.post("/webhooks/finnhub/send", json={"symbol": "ibm"})).json()
        unknown = await s.page.post("/webhooks/finnhub/send", json={"symbol": "TSLA"})
        wrong = await s.page.post("/webhooks/finnhub/send", content="IBM")

    [event] = s.app.events
    [row] = event["data"]
    [newest] = [report for report in s.reports if report.symbol == "IBM"]
    assert (sent["status"], row["symbol"], date.fromisoformat(row["date"])) == (200, "IBM", newest.day)
    assert (unknown.status_code, wrong.status_code) == (404, 400)
    assert "no report of TSLA has come out by 2012-09-01" in unknown.json()["detail"]
