"""
Backtests as a service: asked for, worked off in steps that are written down, found again by anybody.

What is left of a backtest follows from what is stored, so work that was killed at any moment is simply taken up
again. The last write holds everything at once: the result, the variants that were tried, and that the hold-out was
opened. So nothing that was seen can go uncounted.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from shared.clock import Clock, format_instant
from shared.errors import (
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    PermanentError,
    StaleError,
    TransientError,
    TroopError,
)
from shared.events import EventPublisher
from shared.market.events import BarsIngested
from shared.market.models import Columns, Interval, instant_of, interval_of, minute_of, series_key, symbol_of
from shared.market.stores import Bars, Series, SeriesStore
from shared.telemetry import get_logger, redact, span
from signals.backtest_models import (
    SESSION_BARS,
    Backtest,
    BacktestState,
    Job,
    NoValidation,
    Opened,
    Request,
    Trials,
    Trigger,
    instants,
    variants,
)
from signals.backtest_ports import Backtests
from signals.events import BacktestRequested
from signals.logic.arrays import Tape
from signals.logic.backtesting import (
    Ground,
    Tested,
    chosen,
    folds_of,
    longest_lookback,
    result_of,
    sharpe_of,
    with_params,
)
from signals.logic.evaluation import Watcher
from signals.logic.metrics import periods_per_year
from signals.logic.simulation import Rules, VolatilityTarget
from signals.logic.strategies import STRATEGIES
from signals.models import Entry, variant_of

log = get_logger(__name__)

BUDGET = timedelta(seconds=6)
"""How long one handler works on backtests; the last variant begun and the end come on top."""
GENTLE = timedelta(seconds=1)
"""How much of a sweep goes to backtests that nobody asked for."""
LEASE = timedelta(seconds=30)
"""How long a backtest belongs to the run that works on it; a killed run's is taken up again after that."""
GRACE = timedelta(seconds=10)
"""How long an event has before the sweep takes the backtest up."""
MOST_CLAIMS = 5
"""How often work may begin without getting anywhere."""
FEWEST_BARS, MOST_BARS = 2, 250_000
"""Bars that are traded on."""
LARGEST_STEP = 400_000
"""Bytes of returns that are written down together."""
MOST_TRIALS = 8000
"""Variants that are told apart in one document; more are counted each time they are tried."""
RACES = 8
DUE_LIMIT = 200
TRADES_STORED, POINTS_STORED = 1000, 600


@dataclass(frozen=True, slots=True, kw_only=True)
class BacktestService:
    """Takes requests for backtests, works them off, and says how they stand and what they found."""

    series: SeriesStore
    bars: Bars
    backtests: Backtests
    publisher: EventPublisher
    watchers: Sequence[Watcher]
    wall: Clock
    on_new_history: bool = True
    standard_of: dict[str, tuple[int, frozenset[str]]] = field(default_factory=dict)
    """Series whose standard backtests this process knows to be queued: they need no look into storage."""

    async def request(self, request: Request) -> list[Backtest]:
        """
        Queue what is asked for, one backtest a symbol; what is known already is the one that is there.

        Raises:
            InvalidPayloadError: something cannot be; the text names the field and says what to write.
            NotFoundError: no bars of a symbol are stored.
            ConflictError: bars of the hold-out were opened before, by a backtest of this strategy on this series.

        """
        try:
            named = [symbol_of(text) for text in request.symbols or [request.symbol or ""]]
        except InvalidPayloadError as e:
            raise InvalidPayloadError(f"symbol: {e}") from None
        jobs = [await self._job(request, symbol) for symbol in dict.fromkeys(named)]
        for job in jobs:
            await self._is_unopened(job)
        return [await self._queue(job) for job in jobs]

    async def heard(self, event: BarsIngested) -> int:
        """
        Queue the standard backtest of each entry that watches a series of which new history came; how many.

        That is so when a series is filled for the first time, or its history was written again. A bar that comes
        live costs nothing; in a series that was revised it costs one read a process.
        """
        if not self.on_new_history or (event.count == 1 and event.revision == 0):
            return 0
        watchers = {variant_of(w.entry): w for w in self.watchers if w.entry.watches(event.symbol, event.interval)}
        key = series_key(event.symbol, event.interval)
        if not watchers or self.standard_of.get(key) == (event.revision, frozenset(watchers)):
            return 0
        stored = await self.backtests.standard(key)
        known = set(stored["entries"]) if stored.get("revision") == event.revision else set()
        queued = 0
        for variant, watcher in watchers.items():
            if variant in known:
                continue
            try:
                job = await self._standard_job(watcher, event)
            except (InvalidPayloadError, NotFoundError) as e:
                log.info("backtest.not_possible", entry=watcher.entry.name, series=key, reason=str(e))
                continue
            await self._queue(job)
            known.add(variant)
            queued += 1
        if queued:
            await self.backtests.set_standard(key, {"revision": event.revision, "entries": sorted(known)})
        if known >= set(watchers):
            self.standard_of[key] = (event.revision, frozenset(watchers))
        return queued

    async def run(self, backtest_id: str, budget: timedelta = BUDGET) -> Backtest:
        """
        Work on a backtest for a while; returns how it stands then.

        Raises:
            NotFoundError: there is none with this id.

        """
        return await self._work(await self.backtests.read(backtest_id), self.wall.now() + budget)

    async def sweep(self) -> int:
        """Work on backtests whose event was lost, and on those that nobody asked for; how many."""
        begun = self.wall.now()
        due = await self.backtests.due(begun, DUE_LIMIT)
        done = 0
        for backtest in sorted(due, key=lambda one: one.job.trigger is Trigger.HISTORY):
            share = GENTLE if backtest.job.trigger is Trigger.HISTORY else BUDGET
            if self.wall.now() >= begun + share and done:
                break
            try:
                await self._work(backtest, begun + share)
            except NotFoundError:
                continue
            except TransientError as e:
                log.info("backtest.left_due", backtest_id=backtest.backtest_id, reason=str(e))
                continue
            done += 1
        return done

    async def read(self, backtest_id: str) -> tuple[Backtest, Mapping[str, Any] | None]:
        """
        A backtest and, when it is done, what it found.

        Raises:
            NotFoundError: there is none with this id.

        """
        backtest = await self.backtests.read(backtest_id)
        is_done = backtest.state is BacktestState.DONE
        return backtest, await self.backtests.result(backtest) if is_done else None

    async def listed(
        self, strategy: str | None, after: str | None, *, newest_first: bool, limit: int
    ) -> list[Backtest]:
        """Backtests in the order in which they were asked for."""
        return await self.backtests.listed(strategy, after, newest_first=newest_first, limit=limit)

    # --- from a request to a job

    async def _job(self, request: Request, symbol: str) -> Job:
        name, entry = self._entry(request)
        strategy = STRATEGIES[entry.strategy]
        candidates = variants(entry.params, request.grid, strategy.params)
        begin, end = instants(request.first, request.last)
        window = await self._window(with_params(entry, candidates[0]), symbol, candidates, begin, end)
        job = _job(
            window,
            name=name,
            entry=with_params(entry, candidates[0]),
            rules=_sized(request.rules, entry.interval),
            validation=request.validation,
            candidates=candidates,
        )
        if isinstance(job.validation, NoValidation):
            return job
        hold_out = folds_of(job)[1].rows.start
        return replace(job, opens_from=instant_of(window.columns.closed[window.warmup + hold_out]))

    async def _standard_job(self, watcher: Watcher, event: BarsIngested) -> Job:
        """An entry as it is configured, long and short, on all history there is, with the usual costs."""
        entry = watcher.entry
        window = await self._window(entry, event.symbol, [entry.params], None, event.last_closed_at)
        if window.series.revision != event.revision:
            raise NotFoundError(f"{window.series.key} was written again since: revision {window.series.revision}")
        return _job(
            window,
            name=entry.name,
            entry=entry,
            rules=Rules(),
            validation=NoValidation(),
            candidates=[entry.params],
            trigger=Trigger.HISTORY,
        )

    def _entry(self, request: Request) -> tuple[str | None, Entry]:
        """The row that is asked for; one of the caller's own making has no name."""
        if request.entry is not None:
            return request.entry, self._configured(request)
        name = request.strategy or ""
        if name not in STRATEGIES:
            raise InvalidPayloadError(f"strategy: {name[:60]!r} is unknown; choose from {', '.join(STRATEGIES)}")
        strategy = STRATEGIES[name]
        try:
            interval = interval_of(request.interval or Interval.DAY)
        except InvalidPayloadError as e:
            raise InvalidPayloadError(f"interval: {e}") from None
        if interval not in strategy.intervals:
            raise InvalidPayloadError(
                f"interval: {name} makes no sense at {interval}, only at {_or(strategy.intervals)}"
            )
        unknown = [one for one in request.params if one not in strategy.params.model_fields]
        if unknown:
            known = ", ".join(strategy.params.model_fields)
            raise InvalidPayloadError(f"params.{unknown[0]}: there is no such parameter; choose from {known}")
        return None, Entry(
            name=name,
            strategy=name,
            version=strategy.version,
            params={**_defaults(name), **request.params},
            interval=interval,
            symbols=None,
            lookback=1,
            horizon=strategy.horizon,
        )

    def _configured(self, request: Request) -> Entry:
        found = next((w.entry for w in self.watchers if w.entry.name == request.entry), None)
        if found is None:
            known = ", ".join(w.entry.name for w in self.watchers) or "none is configured"
            raise InvalidPayloadError(f"entry: none is called {str(request.entry)[:60]!r}; there is {known}")
        if request.params:
            raise InvalidPayloadError(
                f"params: the entry {found.name} has its own; try others with a grid, or name the strategy "
                f"{found.strategy} instead"
            )
        if request.interval not in (None, found.interval):
            raise InvalidPayloadError(f"interval: the entry {found.name} watches {found.interval}; leave it out")
        return found

    async def _window(
        self,
        entry: Entry,
        symbol: str,
        candidates: Sequence[Mapping[str, float]],
        begin: datetime | None,
        end: datetime | None,
    ) -> "_Window":
        """The bars of the range behind those that the neediest variant must see."""
        lookback = longest_lookback(entry, candidates)
        try:
            series = await self.series.get(symbol, entry.interval)
        except NotFoundError:
            raise NotFoundError(
                f"symbol: no bars of {symbol} at {entry.interval} are stored: PUT /api/watchlist/{symbol}"
                f"?interval={entry.interval} has them fetched"
            ) from None
        columns = await self.bars.window(series.key, series.revision, since=begin, lookback=lookback - 1, through=end)
        asked = bisect_right(columns.closed, minute_of(begin)) if begin else 0
        if len(columns) - asked < FEWEST_BARS:
            extent = await self.bars.extent(series.key, series.revision)
            held = f"stored are {_day(extent.first)} to {_day(extent.last)}" if extent else "none are stored yet"
            raise InvalidPayloadError(
                f"from, to: {len(columns) - asked} bars of {symbol} at {entry.interval} close in this range; {held}"
            )
        # Before it has seen enough nothing was said, so that time is no part of what is judged.
        warmup = max(asked, lookback - 1)
        if len(columns) - warmup < FEWEST_BARS:
            raise InvalidPayloadError(
                f"params: {entry.strategy} must see {lookback} bars before it says anything; of {symbol} at "
                f"{entry.interval} there are {len(columns)} up to {_day(instant_of(columns.closed[-1]))}"
            )
        if len(columns) - warmup > MOST_BARS:
            raise InvalidPayloadError(
                f"from, to: {len(columns) - warmup} bars; {MOST_BARS} is the most, so name a shorter range"
            )
        await asyncio.to_thread(Tape.of, columns)
        return _Window(series=series, columns=columns, asked=asked, warmup=warmup)

    async def _is_unopened(self, job: Job) -> None:
        if isinstance(job.validation, NoValidation):
            return
        _check_unopened(job, await self.backtests.trials(job.strategy, job.variants_of_series))

    async def _queue(self, job: Job) -> Backtest:
        now = self.wall.now()
        is_asked = job.trigger is Trigger.REQUEST
        due_at = now + GRACE if is_asked else now
        try:
            backtest = await self.backtests.create(Backtest(job=job, requested_at=now), due_at=due_at)
        except ConflictError:
            backtest = await self.backtests.read(job.backtest_id)
            if backtest.state is BacktestState.FAILED and is_asked:
                again = replace(backtest, state=BacktestState.QUEUED, reason=None, claims=0, leased_until=None)
                backtest = await self.backtests.save(again, due_at=due_at)
        if is_asked and not backtest.state.is_over:
            await self._tell(backtest)
        return backtest

    async def _tell(self, backtest: Backtest) -> None:
        """Have it worked on at once; where that cannot be told, the sweep takes it up."""
        job = backtest.job
        event = BacktestRequested(
            occurred_at=job.last,
            recorded_at=self.wall.now(),
            backtest_id=backtest.backtest_id,
            entry=job.name,
            strategy=f"{job.strategy}@{job.entry.version}",
            symbol=job.symbol,
            interval=job.entry.interval,
            variants=backtest.total,
            done=backtest.done,
        )
        try:
            await self.publisher.publish([event])
        except TroopError as e:
            log.warning("backtest.untold", backtest_id=backtest.backtest_id, reason=str(e))

    # --- the work

    async def _work(self, backtest: Backtest, deadline: datetime) -> Backtest:
        now = self.wall.now()
        if backtest.state.is_over or (backtest.leased_until and backtest.leased_until > now):
            return backtest
        try:
            if backtest.claims >= MOST_CLAIMS:
                return await self._fail(backtest, f"given up after {MOST_CLAIMS} runs that did not come back")
            leased_until = now + LEASE
            claimed = await self.backtests.save(
                replace(
                    backtest,
                    state=BacktestState.RUNNING,
                    claims=backtest.claims + 1,
                    leased_until=leased_until,
                    started_at=backtest.started_at or now,
                ),
                due_at=leased_until,
            )
        except StaleError:
            return await self.backtests.read(backtest.backtest_id)  # another run has it
        with span("signals.backtest", strategy=backtest.job.strategy, symbol=backtest.job.symbol):
            return await self._judged(claimed, deadline)

    async def _judged(self, claimed: Backtest, deadline: datetime) -> Backtest:
        """Work, and say what became of it where it cannot succeed."""
        try:
            return await self._proceed(claimed, deadline)
        except StaleError:
            return await self.backtests.read(claimed.backtest_id)  # it was taken up by another run
        except TransientError:
            raise
        except PermanentError as e:
            reason = str(e)
        except Exception as e:
            log.exception("backtest.broke", backtest_id=claimed.backtest_id)
            reason = f"unexpected trouble ({type(e).__name__}): see the log"
        try:
            return await self._fail(await self.backtests.read(claimed.backtest_id), reason)
        except StaleError:
            return await self.backtests.read(claimed.backtest_id)

    async def _fail(self, backtest: Backtest, reason: str) -> Backtest:
        if backtest.state.is_over:
            return backtest
        log.warning("backtest.failed", backtest_id=backtest.backtest_id, reason=reason)
        failed = replace(
            backtest,
            state=BacktestState.FAILED,
            reason=redact(reason),
            leased_until=None,
            ended_at=self.wall.now(),
        )
        return await self.backtests.save(failed, due_at=None)

    async def _proceed(self, backtest: Backtest, deadline: datetime) -> Backtest:
        job = backtest.job
        columns = await self.bars.window(
            series_key(job.symbol, job.entry.interval),
            job.revision,
            since=job.since,
            lookback=job.warmup,
            through=job.last,
        )
        ground = await asyncio.to_thread(Ground.of, job, columns)
        if isinstance(job.validation, NoValidation):
            ratio = await asyncio.to_thread(sharpe_of, ground, job.candidates[0])
            return await self._end(backtest, ground, [], {job.variant(job.candidates[0]): ratio})
        is_new = False
        while backtest.done < backtest.total:
            backtest, is_new = await self._step(backtest, ground, deadline), True
            if backtest.state is BacktestState.QUEUED:
                await self._tell(backtest)
                return backtest
        if is_new and self.wall.now() >= deadline:
            backtest = await self.backtests.save(_released(backtest), due_at=self.wall.now())
            await self._tell(backtest)
            return backtest
        tested = await self.backtests.tested(backtest)
        tried = {job.variant(params): one.sharpe for params, one in zip(job.candidates, tested, strict=True)}
        return await self._end(backtest, ground, tested, tried)

    async def _step(self, backtest: Backtest, ground: Ground, deadline: datetime) -> Backtest:
        """Try the next variants, at least one, and write down what they gave."""
        folds, hold_out = folds_of(backtest.job)
        tested: list[Tested] = []
        size = 0
        for params in backtest.job.candidates[backtest.done :]:
            one = await asyncio.to_thread(ground.test, params, folds, hold_out.rows.start)
            tested.append(one)
            size += sum(returns.nbytes for returns in one.returns)
            if size >= LARGEST_STEP or self.wall.now() >= deadline:
                break
        now = self.wall.now()
        on = replace(backtest, claims=0, leased_until=now + LEASE)
        is_left = backtest.done + len(tested) < backtest.total
        if is_left and now >= deadline:
            return await self.backtests.step(_released(on), tested, due_at=now)
        return await self.backtests.step(on, tested, due_at=now + LEASE)

    async def _end(
        self, backtest: Backtest, ground: Ground, tested: Sequence[Tested], tried: Mapping[str, float | None]
    ) -> Backtest:
        """Look at the hold-out, say everything, and write it down with what was tried."""
        job = backtest.job
        await self._is_unopened(job)
        choice = await asyncio.to_thread(chosen, ground, tested) if tested else None
        for _ in range(RACES):
            stored_trials = await self.backtests.trials(job.strategy, job.variants_of_series)
            _check_unopened(job, stored_trials)
            trials = _with(stored_trials, tried, job)
            result = await asyncio.to_thread(
                result_of,
                ground,
                trials=trials.count,
                trial_sharpes=trials.known,
                choice=choice,
                tested=tested,
                points=POINTS_STORED,
                trades=TRADES_STORED,
            )
            now = self.wall.now()
            done = replace(
                backtest,
                state=BacktestState.DONE,
                done=backtest.total,
                claims=0,
                leased_until=None,
                ended_at=now,
                summary=_summary(result),
            )
            try:
                return await self.backtests.finish(done, result, trials)
            except StaleError:
                stored = await self.backtests.read(backtest.backtest_id)
                if _etag(stored) != _etag(backtest):
                    return stored
                # Another backtest counted its variants at the same moment: count on from there.
        raise StaleError(f"the variants of {job.strategy} on {job.symbol} are written by others all the time")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """A series' bars: the range that was asked for begins at *asked*, the one that is traded on at *warmup*."""

    series: Series
    columns: Columns
    asked: int
    warmup: int


def _job(
    window: _Window,
    *,
    name: str | None,
    entry: Entry,
    rules: Rules,
    validation: Any,  # noqa: ANN401 - one of three models
    candidates: Sequence[Mapping[str, float]],
    trigger: Trigger = Trigger.REQUEST,
) -> Job:
    series, columns, warmup = window.series, window.columns, window.warmup
    return Job(
        name=name,
        entry=replace(entry, symbols=None),
        symbol=series.symbol,
        begin=instant_of(columns.closed[window.asked]),
        first=instant_of(columns.closed[warmup]),
        last=instant_of(columns.closed[-1]),
        bars=len(columns) - warmup,
        warmup=warmup,
        provider=series.provider or "",
        adjustment=series.adjustment,
        revision=series.revision,
        rules=rules,
        validation=validation,
        candidates=candidates,
        trigger=trigger,
    )


def _released(backtest: Backtest) -> Backtest:
    return replace(backtest, state=BacktestState.QUEUED, leased_until=None)


def _sized(rules: Rules, interval: Interval) -> Rules:
    """A volatility target counts the bars of a year by the interval, unless the caller does."""
    size = rules.size
    if not isinstance(size, VolatilityTarget) or "bars_per_year" in size.model_fields_set:
        return rules
    yearly = periods_per_year(interval) * SESSION_BARS[interval]
    return rules.model_copy(update={"size": size.model_copy(update={"bars_per_year": yearly})})


def _defaults(name: str) -> dict[str, float]:
    return STRATEGIES[name].params().model_dump()


def _or(intervals: Sequence[Interval]) -> str:
    return " or ".join(intervals)


def _day(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d}"


def _check_unopened(job: Job, trials: Trials) -> None:
    opener = trials.opener(job)
    if opener is None:
        return
    raise ConflictError(
        f"validation: bars from {format_instant(opener.first)} to {format_instant(opener.last)} of the hold-out of "
        f"{job.strategy} on {job.symbol} at {job.entry.interval} were opened by backtest {opener.backtest_id}; what "
        f"they say is no news any more, so choose a to before {_day(opener.first)}, or wait until there are enough "
        "newer bars"
    )


def _with(trials: Trials, tried: Mapping[str, float | None], job: Job) -> Trials:
    """The variants of a series with these among them, each once as long as there is room, and what *job* opens."""
    sharpes, beyond = dict(trials.sharpes), trials.beyond
    for variant, ratio in tried.items():
        if variant in sharpes or len(sharpes) < MOST_TRIALS:
            sharpes[variant] = ratio
        else:
            beyond += 1
    opened = list(trials.opened)
    if job.opens_from is not None and all(one.backtest_id != job.backtest_id for one in opened):
        opened.append(Opened(backtest_id=job.backtest_id, first=job.opens_from, last=job.last))
    return replace(trials, sharpes=sharpes, beyond=beyond, opened=opened)


def _summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What lists show."""
    metrics = result["metrics"]
    names = ("total_return", "buy_hold_return", "sharpe", "max_drawdown", "trade_count")
    return {
        "params": result["params"],
        **{name: metrics[name]["value"] for name in names},
        "deflated_sharpe": result["deflated_sharpe"]["value"],
        "failed_checks": [check["name"] for check in result["checks"] if not check["is_passed"]],
    }


def _etag(backtest: Backtest) -> str | None:
    return backtest.document.etag if backtest.document else None
