"""When backtests wake up: their triggers, their HTTP, and the list of strategies that can be tried."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import azure.functions as func

from shared.http import AFTER, CURSOR, LIMIT, Api, Body, Page, Query, cursor_of, json_of, listed
from shared.inbound import DeadLetters, on_time, settle
from signals.events import BacktestRequested
from signals.logic.strategies import STRATEGIES, Strategy

if TYPE_CHECKING:
    from signals.backtest_models import Backtest, Request
    from signals.backtests import BacktestService


class ParamItem(Body):
    """One parameter: `minimum` and `maximum` are allowed themselves, `above` and `below` are not."""

    name: str
    type: str
    default: float
    minimum: float | None
    above: float | None
    maximum: float | None
    below: float | None


class StrategyItem(Body):
    """
    A rule that may see a signal in bars.

    `lookback` is how many bars it must see with the default parameters, `has_state` whether it can gate others,
    `source` where its formula comes from, `entries` the rows of the entries file that use it.
    """

    name: str
    version: int
    title: str
    source: str
    params: Sequence[ParamItem]
    lookback: int
    intervals: Sequence[str]
    horizon: int
    has_state: bool
    entries: Sequence[str]


class StrategyPage(Page[StrategyItem]):
    """Every strategy."""


class MetricItem(Body):
    """A number, or null with the reason; a number may carry a remark."""

    value: float | None
    reason: str | None


class CheckItem(Body):
    """One reason not to believe the result, and whether it holds off."""

    name: str
    is_passed: bool
    detail: str


class ProgressItem(Body):
    """How many of the variants have been tried."""

    done: int
    total: int


class SummaryItem(Body):
    """A result in short."""

    params: Mapping[str, float]
    total_return: float | None
    buy_hold_return: float | None
    sharpe: float | None
    max_drawdown: float | None
    trade_count: float | None
    deflated_sharpe: float | None
    failed_checks: Sequence[str]


class BacktestItem(Body):
    """
    A backtest and how far it has come: queued, running, done or failed, the last with the reason.

    `trigger` is `request`, or `history` for the standard backtest of an entry whose series got new history.
    """

    backtest_id: str
    state: str
    progress: ProgressItem
    reason: str | None
    trigger: str
    entry: str | None
    strategy: str
    symbol: str
    interval: str
    first_closed_at: datetime
    last_closed_at: datetime
    bars: int
    validation: str
    requested_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    summary: SummaryItem | None
    cursor: str


class RangeItem(Body):
    """The bars that were traded on; `warmup` bars before them were only looked at."""

    start: datetime
    end: datetime
    first_closed_at: datetime
    last_closed_at: datetime
    bars: int
    warmup: int
    periods: int
    periods_per_year: float
    risk_free: float
    minimum_return: float


class ProvenanceItem(Body):
    """Where the bars come from: who sold them, how they are adjusted, which writing of the history."""

    provider: str
    adjustment: str | None
    revision: int


class VariantsItem(Body):
    """Variants that were tried in this backtest, and on this series ever."""

    here: int
    ever: int


class MarksItem(Body):
    """How often the strategy spoke."""

    long: int
    short: int


class FillsItem(Body):
    """Entries and exits; `unfilled` marks found no price, `unsized` ones came before there was a volatility."""

    count: int
    stale: int
    unfilled: int
    unsized: int
    ruined_at: datetime | None


class TradeItem(Body):
    """One trade; prices as paid, in shares of the last bar, money after costs, returns of the value at entry."""

    direction: str
    marked_at: datetime
    entered_at: datetime
    exited_at: datetime
    is_open: bool
    bars_held: int
    entry_price: float
    exit_price: float
    size: float
    gross: float
    fees: float
    slippage: float
    net: float
    net_return: float
    mae: float
    mfe: float


class TradesItem(Body):
    """The newest trades, and how many older ones are left out."""

    count: int
    left_out: int
    items: Sequence[TradeItem]


class CurveItem(Body):
    """Columns of equal length: prices and mark-to-market values; of many bars those with the extremes."""

    at: Sequence[datetime]
    price: Sequence[float]
    equity: Sequence[float]
    buy_and_hold: Sequence[float]


class MonthItem(Body):
    """What a calendar month brought."""

    year: int
    month: int
    total_return: float
    buy_hold_return: float


class FoldItem(Body):
    """The variant that was best in training, and how it did in the test; spans are first and last closes."""

    train: Sequence[Sequence[datetime]]
    test: Sequence[Sequence[datetime]]
    train_bars: int
    test_bars: int
    params: Mapping[str, float]
    train_score: float | None
    test_score: float | None
    benchmark: float | None
    is_beating: bool


class HoldOutItem(Body):
    """What the chosen parameters did on the last bars, which nothing was chosen by."""

    share: float
    first_closed_at: datetime
    last_closed_at: datetime
    bars: int
    score: float | None
    benchmark: float | None
    total_return: float
    buy_hold_return: float
    max_drawdown: float
    trade_count: int


class TriedItem(Body):
    """A variant: its mean test score, and its Sharpe ratio per period before the hold-out."""

    params: Mapping[str, float]
    mean: float | None
    sharpe: float | None


class ValidationItem(Body):
    """How parameters were chosen; scores are Sharpe ratios, `overfitting` is the probability of overfitting (PBO)."""

    kind: str
    objective: str
    purge: int
    embargo: int
    folds: Sequence[FoldItem]
    mean: MetricItem
    std: MetricItem
    worst: MetricItem
    share_beating: float
    overfitting: MetricItem
    hold_out: HoldOutItem
    variants: Sequence[TriedItem]


class ResultItem(Body):
    """Everything that a backtest found, beside buy-and-hold on the same bars with the same costs."""

    entry: str | None
    strategy: str
    title: str
    params: Mapping[str, float]
    gates: Sequence[str]
    symbol: str
    interval: str
    range: RangeItem
    provenance: ProvenanceItem
    rules: Mapping[str, Any]
    assumptions: Sequence[str]
    metrics: Mapping[str, MetricItem]
    buy_and_hold: Mapping[str, MetricItem]
    deflated_sharpe: MetricItem
    variants: VariantsItem
    checks: Sequence[CheckItem]
    validation: ValidationItem | None
    marks: MarksItem
    fills: FillsItem
    trades: TradesItem
    curve: CurveItem
    months: Sequence[MonthItem]


class BacktestDetail(BacktestItem):
    """A backtest with the rules it trades by and, when it is done, all that it found."""

    provenance: ProvenanceItem
    rules: Mapping[str, Any]
    result: ResultItem | None


class BacktestPage(Page[BacktestItem]):
    """Backtests, newest first, or oldest first behind ``?after=``."""


STRATEGY = Query(name="strategy", description="Only backtests of this strategy.")


def blueprint(service: "Callable[[], BacktestService]", dead_letters: DeadLetters, api: Api) -> func.Blueprint:
    """The service is built when it is first needed: a cold start for a live bar has no use for it."""
    bp = func.Blueprint()

    async def signals_on_backtest_requested(event: func.CloudEvent) -> None:
        async with settle(event, "signals_on_backtest_requested", dead_letters):
            await service().run(BacktestRequested.from_wire(event.type, event.get_json()).backtest_id)

    async def signals_backtest_sweep(timer: func.TimerRequest) -> None:
        del timer  # the binding's name is all that is needed
        async with on_time("signals_backtest_sweep"):
            await service().sweep()

    on_event = bp.event_grid_trigger(arg_name="event")
    bp.function_name("signals_on_backtest_requested")(on_event(signals_on_backtest_requested))
    on_timer = bp.timer_trigger(arg_name="timer", schedule="%SIGNALS_SWEEP_SCHEDULE%")
    bp.function_name("signals_backtest_sweep")(on_timer(signals_backtest_sweep))

    @api.endpoint(
        bp,
        "signals_strategies",
        "strategies",
        summary="Every strategy with its parameters, and the entries that use it.",
        answer=StrategyPage,
    )
    async def signals_strategies(_: func.HttpRequest) -> StrategyPage:
        return StrategyPage(items=[_strategy(one, service()) for one in STRATEGIES.values()])

    @api.endpoint(
        bp,
        "signals_backtest_request",
        "backtests",
        method="POST",
        summary="Have a strategy tried on stored bars: {entry, or strategy and params; symbol or symbols; interval, "
        "from, to; rules; validation and grid}. The same request on the same bars is one backtest.",
        answer=BacktestPage,
        body=_request,
        anonymous=False,
        status=202,
    )
    async def signals_backtest_request(req: func.HttpRequest) -> func.HttpResponse:
        queued = await service().request(_request().read(json_of(req)))
        page = BacktestPage(items=[_item(one) for one in queued])
        place = f"/api/backtests/{queued[0].backtest_id}" if len(queued) == 1 else "/api/backtests"
        return func.HttpResponse(
            page.model_dump_json(), status_code=202, mimetype="application/json", headers={"Location": place}
        )

    @api.endpoint(
        bp,
        "signals_backtests",
        "backtests",
        summary="Backtests, newest first.",
        answer=BacktestPage,
        query=(STRATEGY, LIMIT, CURSOR, AFTER),
    )
    async def signals_backtests(req: func.HttpRequest) -> BacktestPage:
        strategy = req.params.get("strategy") or None
        found, cursor = await listed(
            req, lambda after, newest, limit: service().listed(strategy, after, newest_first=newest, limit=limit)
        )
        return BacktestPage(items=[_item(one) for one in found], next=cursor)

    @api.endpoint(
        bp,
        "signals_backtest",
        "backtests/{id}",
        summary="How a backtest stands and, when it is done, all that it found.",
        answer=BacktestDetail,
    )
    async def signals_backtest(req: func.HttpRequest) -> BacktestDetail:
        backtest, result = await service().read(req.route_params["id"])
        job = backtest.job
        return BacktestDetail(
            **_item(backtest).model_dump(),
            provenance=ProvenanceItem(provider=job.provider, adjustment=job.adjustment, revision=job.revision),
            rules=job.rules.model_dump(mode="json"),
            result=ResultItem.model_validate(result) if result else None,
        )

    return bp


def _request() -> "type[Request]":
    from signals.backtest_models import Request

    return Request


def _item(b: "Backtest") -> BacktestItem:
    job = b.job
    return BacktestItem(
        backtest_id=b.backtest_id,
        state=b.state,
        progress=ProgressItem(done=b.done, total=b.total),
        reason=b.reason,
        trigger=job.trigger,
        entry=job.name,
        strategy=f"{job.strategy}@{job.entry.version}",
        symbol=job.symbol,
        interval=job.entry.interval,
        first_closed_at=job.first,
        last_closed_at=job.last,
        bars=job.bars,
        validation=job.validation.kind,
        requested_at=b.requested_at,
        started_at=b.started_at,
        ended_at=b.ended_at,
        summary=SummaryItem.model_validate(b.summary) if b.summary else None,
        cursor=cursor_of(b.sort),
    )


def _strategy(one: Strategy, service: "BacktestService") -> StrategyItem:
    params = one.params()
    fields = one.params.model_json_schema()["properties"]
    return StrategyItem(
        name=one.name,
        version=one.version,
        title=one.title,
        source=" ".join((one.mark.__doc__ or "").split()),
        params=[
            ParamItem(
                name=name,
                type=field["type"],
                default=getattr(params, name),
                minimum=field.get("minimum"),
                above=field.get("exclusiveMinimum"),
                maximum=field.get("maximum"),
                below=field.get("exclusiveMaximum"),
            )
            for name, field in fields.items()
        ],
        lookback=one.lookback(params),
        intervals=list(one.intervals),
        horizon=one.horizon,
        has_state=one.has_state,
        entries=[w.entry.name for w in service.watchers if w.entry.strategy == one.name],
    )
