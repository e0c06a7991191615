"""When providers wake the market room: their webhooks, and what follows from them."""

import azure.functions as func

from shared.http import Api, Body, problem
from shared.inbound import DeadLetters, on_time, settle
from shared.market.events import EarningsReported
from shared.market.hooks import HEADER, FinnhubHook, WrongSecretError
from shared.market.ingest import Ingest


class HookItem(Body):
    """What became of a call: taken, repeated (its content was here before) or dropped, with the reason."""

    outcome: str
    reports: int
    reason: str | None


def blueprint(hook: FinnhubHook, ingest: Ingest, dead_letters: DeadLetters, api: Api) -> func.Blueprint:
    bp = func.Blueprint()

    @api.endpoint(
        bp,
        "market_finnhub_hook",
        "hooks/finnhub",
        method="POST",
        summary="Finnhub's earnings webhook, which shows its secret in X-Finnhub-Secret.",
        answer=HookItem,
    )
    async def market_finnhub_hook(req: func.HttpRequest) -> HookItem | func.HttpResponse:
        try:
            received = await hook.receive(req.headers.get(HEADER), req.get_body())
        except WrongSecretError as e:
            return problem(401, "Not allowed", str(e))
        return HookItem(outcome=received.outcome, reports=received.reports, reason=received.reason)

    @bp.function_name("market_on_earnings_reported")
    @bp.event_grid_trigger(arg_name="event")
    async def market_on_earnings_reported(event: func.CloudEvent) -> None:
        async with settle(event, "market_on_earnings_reported", dead_letters):
            await ingest.reported(EarningsReported.from_wire(event.type, event.get_json()))

    @bp.function_name("market_sweep_hooks")
    @bp.timer_trigger(arg_name="timer", schedule="%MARKET_FETCHES_SCHEDULE%")
    async def market_sweep_hooks(timer: func.TimerRequest) -> None:  # noqa: ARG001 - the trigger names it
        async with on_time("market_sweep_hooks"):
            await hook.sweep()

    return bp
