"""Whatever happens to deliveries, in any order: the ledger never lies, nothing is lost and no rule is broken."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from alerts.models import alert_id
from alerts.subscriptions import Mute
from shared.errors import NotFoundError
from signals.events import SignalRaised
from tests.conftest import LONG
from tests.faults.delivery_house import DeliveryHouse, Inspector, Process, TruthChannel, Wire, finish
from tests.standins import a_signal

NAMES = ("ada", "bob", "cyd")
TROUBLE = st.none() | st.tuples(st.integers(1, 16), st.sampled_from(Wire.MODES), st.integers(1, 4))
"""What goes wrong in a step, at which await of the process, and how often in a row."""
WHICH = st.integers(0, 1)
WAITS = [timedelta(seconds=s) for s in (1, 11, 31, 120, 1338, 3600, 5 * 3600)]
CHANGES = [
    "comes back",
    "is deleted",
    "unsubscribes",
    "takes an endpoint away",
    "mends an endpoint",
    "mutes everything",
    "mutes AAPL",
    "wants no quiet hours",
]

type Plan = tuple[int, str, int] | None


class DeliveriesMachine(RuleBasedStateMachine):
    """Two instances of the app over one ledger; those that freeze or die are replaced, and may come back."""

    signals: Bundle[SignalRaised] = Bundle("signals")
    frozen: Bundle[Process] = Bundle("frozen")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.house = DeliveryHouse()
        self.inspector = Inspector(self.house)
        self.instances = [self.house.process(), self.house.process()]
        self.count = 0
        self.asked: dict[str, SignalRaised] = {}
        self.acknowledged: set[str] = set()
        self.accepted: dict[str, Sequence[str]] = {}
        self.everybody = dict(self.house.directory.by_name)

    @initialize()
    def begin(self) -> None:
        """The loop of this run."""
        self.runner.get_loop()

    # --- events

    @rule(
        target=signals,
        which=WHICH,
        symbol=st.sampled_from(["AAPL", "MSFT"]),
        age=st.sampled_from([0, 5, 61, 400]),
        trouble=TROUBLE,
    )
    def a_new_signal(self, which: int, symbol: str, age: int, trouble: Plan) -> SignalRaised:
        """A bar closed some time ago and its event arrives."""
        self.count += 1
        closed = self.house.market.now().replace(second=0, microsecond=0) - timedelta(minutes=age)
        signal = a_signal(f"signal {self.count}", symbol=symbol, occurred_at=closed)
        self.asked[signal.signal_id] = signal
        self._announce(which, signal, trouble)
        return signal

    @rule(signal=signals, which=WHICH, trouble=TROUBLE)
    def an_old_event_again(self, signal: SignalRaised, which: int, trouble: Plan) -> None:
        """The topic repeats itself, at once or after days."""
        self._announce(which, signal, trouble)

    @rule(signal=signals, trouble=TROUBLE)
    def twins(self, signal: SignalRaised, trouble: Plan) -> None:
        """The same event reaches both instances at the same moment."""
        self._both([p.service.announce(signal) for p in self.instances], trouble)

    # --- time and sweeps

    @rule(which=WHICH, trouble=TROUBLE)
    def a_sweep(self, which: int, trouble: Plan) -> None:
        """The timer fires in one instance."""
        self._do(which, self.instances[which].service.sweep(), trouble)

    @rule(trouble=TROUBLE)
    def two_sweeps(self, trouble: Plan) -> None:
        """The timer fires in both instances."""
        self._both([p.service.sweep() for p in self.instances], trouble)

    @rule(wait=st.sampled_from(WAITS), which=WHICH, trouble=TROUBLE)
    def time_passes(self, wait: timedelta, which: int, trouble: Plan) -> None:
        """Leases run out, waits end, quiet hours come and go; then the timer fires."""
        self.house.wall.at += wait
        self.a_sweep(which, trouble)

    @rule()
    def the_full_hour(self) -> None:
        """The market stands exactly where a digest closes, or where quiet hours begin or end."""
        now = self.house.market.now()
        hour = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
        self.house.wall.at += hour - now

    @rule(minutes=st.sampled_from([-5, 5]))
    def the_clock_jumps(self, minutes: int) -> None:
        """Somebody sets the wall clock."""
        self.house.jump(timedelta(minutes=minutes))

    # --- neighbours and processes

    @rule(
        name=st.sampled_from(["signalr", "discord", "email"]),
        weather=st.lists(st.sampled_from(TruthChannel.WEATHER), min_size=1, max_size=6),
    )
    def bad_weather(self, name: str, weather: list[str]) -> None:
        """The next answers of a channel's service."""
        self.house.truth[name].weather[:] = weather

    @rule(process=consumes(frozen))
    def a_frozen_process_goes_on(self, process: Process) -> None:
        """A zombie resumes what it was doing, long after others took over."""
        self._run(process.thaw())

    @precondition(lambda self: any(p.wire.is_frozen.is_set() for p in self.instances))
    @rule(target=frozen)
    def a_frozen_process_is_replaced(self) -> Process:
        """The platform starts another instance; the frozen one may still come back."""
        which = next(i for i, p in enumerate(self.instances) if p.wire.is_frozen.is_set())
        process, self.instances[which] = self.instances[which], self.house.process()
        return process

    # --- people

    @rule(name=st.sampled_from(NAMES), change=st.sampled_from(CHANGES), channel=st.sampled_from(["email", "discord"]))
    def somebody_changes_their_mind(self, name: str, change: str, channel: str) -> None:
        """Whatever is under way: what people want now counts."""
        directory, mine = self.house.directory, self.house.directory.by_name.get(name)
        if change == "comes back" or mine is None:
            directory.by_name[name] = self.everybody[name]
        elif change == "is deleted":
            del directory.by_name[name]
        elif change == "unsubscribes":
            directory.change(name, subscriptions=())
        elif change == "takes an endpoint away":
            directory.change(name, endpoints={c: e for c, e in mine.endpoints.items() if c != channel})
        elif change == "mends an endpoint" and channel in mine.endpoints:
            mended = {"is_enabled": True, "disabled_reason": None, "failures": 0, "first_failed_at": None}
            directory.change_endpoint(name, channel, **mended)
        elif change.startswith("mutes"):
            symbols = frozenset({"AAPL"}) if change.endswith("AAPL") else None
            until = self.house.market.now() + timedelta(hours=1 if symbols else 30)
            mute = Mute(mute_id="m", subscriber=name, author=name, symbols=symbols, until=until)
            directory.change(name, mutes=[mute])
        elif change == "wants no quiet hours":
            directory.change(name, preferences=replace(mine.preferences, quiet_from=None, quiet_to=None))
        self.house.note_rules()

    @rule(signal=signals, name=st.sampled_from(("public", *NAMES)), which=WHICH, trouble=TROUBLE)
    def an_alert_is_resolved(self, signal: SignalRaised, name: str, which: int, trouble: Plan) -> None:
        """What it told is over."""
        id_ = alert_id(signal.signal_id, name)
        self._do(which, self.instances[which].service.resolve(name, id_, "it is over"), trouble)

    @rule(signal=signals, name=st.sampled_from(NAMES), which=WHICH, trouble=TROUBLE)
    def an_alert_is_acknowledged(self, signal: SignalRaised, name: str, which: int, trouble: Plan) -> None:
        """Somebody has seen it."""
        id_ = alert_id(signal.signal_id, name)
        self._do(which, self.instances[which].service.acknowledge(name, id_, name), trouble)

    # --- what holds

    @invariant()
    def nothing_is_broken(self) -> None:
        """I1 to I8, I15 and the windows of I23, after every step."""
        self._run(self.inspector.check())

    def teardown(self) -> None:
        """The liveness ones, and that the whole history told again changes nothing (I16 to I21)."""
        try:
            self._run(self._end())
        finally:
            self.runner.close()

    async def _end(self) -> None:
        house = self.house
        await finish(house)
        healthy = house.service()
        for id_, signal in self.asked.items():
            if id_ not in self.acknowledged:
                self._expect(signal)
                await healthy.announce(signal)
        await finish(house)
        await self.inspector.check_end(self.accepted)

        before, _ = await self.inspector.ledger()
        shown = list(house.shown)
        for signal in [*self.asked.values()] * 2:
            if signal.signal_id in self.acknowledged:
                with suppress(NotFoundError):
                    await house.service().announce(signal)
        await house.service().sweep()
        after, _ = await self.inspector.ledger()
        known = {d.id for d in before if "windows" not in d.body}  # who came back hears what they missed
        assert [d for d in after if d.id in known] == [d for d in before if d.id in known]
        assert [one for one in house.shown if set(one.alert_ids) & known] == shown

    # --- small things

    def _run(self, work: Any) -> Any:
        return self.runner.run(work)

    def _expect(self, signal: SignalRaised) -> None:
        """Who hears it by the rules of now, and where."""
        for name, listener in self.house.directory.by_name.items():
            channels = {c for s in listener.subscriptions for c in s.channels}
            if channels:
                self.accepted.setdefault(alert_id(signal.signal_id, name), sorted(channels))

    def _announce(self, which: int, signal: SignalRaised, trouble: Plan) -> None:
        if self._do(which, self.instances[which].service.announce(signal), trouble):
            self.acknowledged.add(signal.signal_id)
            self._expect(signal)

    def _do(self, which: int, work: Any, trouble: Plan) -> bool:
        """Let an instance do something; whether that was acknowledged."""
        process = self.instances[which]
        if process.wire.is_frozen.is_set():
            work.close()
            return False
        process.wire.plan(*(trouble or (0, "")))
        done = self._run(process.run(work))
        process.wire.plan(0, "")
        if process.wire.is_dead:
            self.instances[which] = self.house.process()
        return bool(done)

    def _both(self, work: list[Any], trouble: Plan) -> None:
        """Let both instances work at the same moment; trouble strikes the first."""
        if any(p.wire.is_frozen.is_set() for p in self.instances):
            for one in work:
                one.close()
            return
        self.instances[0].wire.plan(*(trouble or (0, "")))

        async def at_once() -> None:
            await asyncio.gather(*(p.run(w) for p, w in zip(self.instances, work, strict=True)))

        self._run(at_once())
        self.instances[0].wire.plan(0, "")
        if self.instances[0].wire.is_dead:
            self.instances[0] = self.house.process()


def test_no_history_of_events_faults_and_people_breaks_an_invariant():
    """Events, faults, time and people in any order: after every step, and at the end, the invariants hold."""
    run_state_machine_as_test(
        DeliveriesMachine,
        settings=settings(
            max_examples=400 if LONG else 40,
            stateful_step_count=60 if LONG else 40,
            derandomize=not LONG,
            print_blob=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
