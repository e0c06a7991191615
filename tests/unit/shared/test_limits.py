import asyncio
import json
from datetime import timedelta
from types import SimpleNamespace

import azure.functions as func
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from shared.clock import StoppedClock
from shared.errors import RateLimitedError, UnavailableError
from shared.http import Api
from shared.identity import NOBODY, Caller, UnauthenticatedError
from shared.limits import DailyQuota, Limits, RateLimit, address_of, client_of
from tests.builders import WALL, a_request, documents

SECOND = timedelta(seconds=1)
ALICE = Caller(subject="alice", roles=frozenset({"subscriber"}))


def behind(*hops):
    """The headers of a request that came this way."""
    return a_request(headers={"X-Forwarded-For": ", ".join(hops)}).headers if hops else a_request().headers


class TestAddress:
    @pytest.mark.parametrize(
        ("hops", "address"),
        [
            (["203.0.113.9"], "203.0.113.9"),
            (["203.0.113.9:51234"], "203.0.113.9"),
            (["1.1.1.1", "203.0.113.9:51234"], "203.0.113.9"),
            (["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
            (["[2001:db8:1:2:3:4:5:6]:443"], "2001:db8:1:2::/64"),
            (["[2001:db8:1:2::1]"], "2001:db8:1:2::/64"),
            (["::ffff:203.0.113.9"], "203.0.113.9"),
            ([], None),
            ([""], None),
            (["unknown"], None),
            (["203.0.113.9", "nonsense"], None),
            (["203.0.113.999"], None),
            (["203.0.113.9", ""], None),
        ],
    )
    def test_last_hop_is_the_platforms_word(self, hops, address):
        """What stands before it the client wrote itself; one client has a whole /64 of IPv6."""
        assert address_of(behind(*hops)) == address

    @given(st.text(max_size=60))
    def test_any_header_is_an_address_or_none(self, text):
        """Whatever was written there, nothing breaks."""
        assert address_of({"x-forwarded-for": text}) is None or address_of({"x-forwarded-for": text})


class TestClient:
    def test_who_is_signed_in_is_counted_by_name(self):
        """From any address, and whatever headers say."""
        assert client_of(ALICE, behind("203.0.113.9")) == client_of(ALICE, behind("203.0.113.10")) == "subject alice"

    def test_stranger_is_counted_by_address(self):
        """A name that looks like an address is still another client."""
        stranger = client_of(NOBODY, behind("203.0.113.9"))

        assert stranger not in (client_of(NOBODY, behind("203.0.113.8")), client_of(ALICE, behind("203.0.113.9")))
        assert stranger != client_of(Caller(subject="203.0.113.9"), behind())

    def test_who_cannot_be_told_apart_is_not_counted(self):
        """On a laptop nobody writes addresses down; counting all as one would stop all for one."""
        assert client_of(NOBODY, behind()) is None

    def test_function_key_is_not_counted(self):
        """Its holder is an operator's program."""
        assert client_of(Caller(is_key=True), behind("203.0.113.9")) is None


class TestRateLimit:
    def test_minutes_calls_may_come_at_once_and_no_more(self):
        """A page that opens asks a lot at once; the next call waits."""
        limit = RateLimit(StoppedClock(WALL), 60)
        for _ in range(60):
            limit.take("a")

        with pytest.raises(RateLimitedError, match="60 times a minute: wait 1 s") as refused:
            limit.take("a")
        assert refused.value.retry_after == SECOND

    def test_who_waits_as_told_is_served(self):
        """Retry-After is never too short, and a refused call costs nothing."""
        clock = StoppedClock(WALL)
        limit = RateLimit(clock, 7)
        for _ in range(7):
            limit.take("a")
        for _ in range(30):
            with pytest.raises(RateLimitedError) as refused:
                limit.take("a")
            clock.at += refused.value.retry_after
            limit.take("a")

    def test_one_client_takes_nothing_from_another(self):
        """That is what it is for."""
        limit = RateLimit(StoppedClock(WALL), 2)
        for _ in range(2):
            limit.take("a")
        with pytest.raises(RateLimitedError):
            limit.take("a")

        limit.take("b")

    @given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 20))
    def test_no_window_holds_more_than_two_minutes_worth(self, gaps, per_minute):
        """However calls come, a full bucket and what flows in are all there is."""
        clock, served = StoppedClock(WALL), []
        limit = RateLimit(clock, per_minute)
        for gap in gaps:
            clock.at += timedelta(seconds=gap)
            try:
                limit.take("a")
            except RateLimitedError:
                continue
            served.append(clock.at)

        for at in served:
            window = [other for other in served if at <= other <= at + timedelta(minutes=1)]
            assert len(window) <= 2 * per_minute

    def test_clock_that_is_put_back_gives_and_takes_nothing(self):
        """An hour back is no hour of calls, and no hour of waiting."""
        clock = StoppedClock(WALL)
        limit = RateLimit(clock, 1)
        limit.take("a")
        clock.at -= timedelta(hours=1)
        with pytest.raises(RateLimitedError):
            limit.take("a")
        clock.at += timedelta(minutes=1)

        limit.take("a")

    def test_memory_is_bounded_and_keeps_who_comes_often(self):
        """A million addresses cannot fill the process, and who is held back does not slip out by them."""
        limit = RateLimit(StoppedClock(WALL), 1, clients=100)
        limit.take("often")
        for n in range(1000):
            limit.take(f"seldom-{n}")
            with pytest.raises(RateLimitedError):
                limit.take("often")

        assert len(limit) == 100
        with pytest.raises(RateLimitedError):
            limit.take("seldom-999")

    def test_silence_saves_nothing_up(self):
        """After an hour away there is one minute's worth, not sixty."""
        clock = StoppedClock(WALL)
        limit = RateLimit(clock, 2)
        limit.take("a")
        clock.at += timedelta(hours=1)
        for _ in range(2):
            limit.take("a")
        with pytest.raises(RateLimitedError):
            limit.take("a")

    def test_zero_is_no_limit(self):
        """A benchmark may ask as often as it can."""
        limit = RateLimit(StoppedClock(WALL), 0)
        for _ in range(1000):
            limit.take("a")

        assert len(limit) == 0


@pytest.fixture
async def store():
    one = documents()
    yield one
    await one.close()


class TestDailyQuota:
    async def test_instances_count_together_until_midnight(self, store):
        """What one may do a day is a promise, whichever instance is asked; it says how long the day still lasts."""
        clock = StoppedClock(WALL)
        one, other = DailyQuota(store, clock), DailyQuota(store, clock)
        for quota in (one, other, one):
            await quota.take("a", "replay", 3)

        with pytest.raises(RateLimitedError, match="3 times a day") as refused:
            await other.take("a", "replay", 3)
        assert refused.value.retry_after == timedelta(hours=15)
        clock.at += refused.value.retry_after
        await other.take("a", "replay", 3)

    async def test_clients_and_endpoints_are_counted_apart(self, store):
        """One client's day is not another's, and each endpoint has its own."""
        quota = DailyQuota(store, StoppedClock(WALL))
        await quota.take("a", "replay", 1)

        await quota.take("b", "replay", 1)
        await quota.take("a", "test-message", 1)
        with pytest.raises(RateLimitedError):
            await quota.take("a", "replay", 1)

    async def test_calls_at_once_are_each_counted(self, store):
        """Nobody gets more by asking all at once."""
        quota = DailyQuota(store, StoppedClock(WALL))

        ended = await asyncio.gather(*(quota.take("a", "replay", 4) for _ in range(12)), return_exceptions=True)

        assert ended.count(None) == 4
        assert all(e is None or isinstance(e, RateLimitedError) for e in ended)

    async def test_storage_forgets_the_day_and_never_knew_who(self, store):
        """What is stored has an end, and no name or address in it."""
        await DailyQuota(store, StoppedClock(WALL)).take("address 203.0.113.9", "replay", 1)

        [document] = await store.feed("quota")
        assert WALL < document.expires_at <= WALL + timedelta(days=2)
        assert "203.0.113.9" not in repr(document)


class Thing(BaseModel):
    """Something."""

    name: str = "a"


class Signing:
    """Takes everybody's word: the token is the subject; `bad` is a bad one."""

    async def caller(self, token):
        if token == "bad":
            raise UnauthenticatedError("the token is bad: sign in again")
        return Caller(subject=token, roles=frozenset({"subscriber"}))

    def claims_to_be_ours(self, token):
        return True


@pytest.fixture
def served(store):
    """Endpoints whose clients may call twice a minute, one of them once a day."""
    clock = StoppedClock(WALL)
    limits = Limits(rate=RateLimit(clock, 2), quota=DailyQuota(store, clock))
    api, blueprint = Api(Signing(), limits), func.Blueprint()

    async def handler(req):
        return Thing()

    for name, auth, per_day in (
        ("anybody", "anonymous", None),
        ("mine", "subscriber", None),
        ("ops", "operator", None),
        ("key", "key", None),
        ("once", "subscriber", 1),
        ("key-once", "key", 1),
    ):
        api.endpoint(blueprint, name, name, summary=name, answer=Thing, auth=auth, per_day=per_day)(handler)
    app = func.FunctionApp()
    app.register_functions(blueprint)
    functions = {f.get_function_name(): f.get_user_function() for f in app.get_functions()}

    async def ask(name, token=None, address=None):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= {"X-Forwarded-For": address} if address else {}
        answer = await functions[name](a_request(headers=headers))
        return SimpleNamespace(
            status=answer.status_code, wait=answer.headers.get("Retry-After"), body=json.loads(answer.get_body())
        )

    return SimpleNamespace(ask=ask, clock=clock, store=store)


class TestEndpoints:
    async def test_third_call_of_a_minute_is_told_when_to_come_back(self, served):
        """429 with Retry-After and a sentence; the others are served on."""
        for _ in range(2):
            assert (await served.ask("anybody", address="203.0.113.9")).status == 200

        refused = await served.ask("anybody", address="203.0.113.9")
        assert (refused.status, refused.wait, refused.body["status"]) == (429, "30", 429)
        assert "2 times a minute" in refused.body["detail"]
        assert (await served.ask("anybody", address="203.0.113.10")).status == 200
        served.clock.at += 30 * SECOND
        assert (await served.ask("anybody", address="203.0.113.9")).status == 200

    async def test_hops_that_a_client_invents_give_it_no_more(self, served):
        """Only what the platform appended counts."""
        answers = [await served.ask("anybody", address=f"10.0.0.{n}, 203.0.113.9") for n in range(3)]

        assert [answer.status for answer in answers] == [200, 200, 429]

    async def test_subject_is_one_client_over_all_endpoints_and_addresses(self, served):
        """Neither another endpoint nor another network gives more."""
        answers = [
            await served.ask("anybody", "alice", "203.0.113.1"),
            await served.ask("mine", "alice", "203.0.113.2"),
            await served.ask("mine", "alice", "203.0.113.3"),
        ]

        assert [answer.status for answer in answers] == [200, 200, 429]
        assert (await served.ask("mine", "bob", "203.0.113.3")).status == 200

    async def test_who_tries_tokens_is_slowed_down(self, served):
        """Refused sign-ins count against the address they come from."""
        answers = [await served.ask("mine", "bad", "203.0.113.9") for _ in range(3)]

        assert [answer.status for answer in answers] == [401, 401, 429]

    async def test_refused_for_the_role_counts_too(self, served):
        """403 is no way around the limit."""
        answers = [await served.ask("ops", "alice") for _ in range(3)]

        assert [answer.status for answer in answers] == [403, 403, 429]

    async def test_who_is_not_told_apart_and_who_has_the_key_is_served(self, served):
        """A laptop's page and an operator's program."""
        assert {(await served.ask("anybody")).status for _ in range(9)} == {200}
        assert {(await served.ask("key", address="203.0.113.9")).status for _ in range(9)} == {200}

    async def test_day_is_counted_where_an_endpoint_says_so(self, served):
        """Once a day, and the answer says how long the day lasts."""
        assert (await served.ask("once", "alice")).status == 200
        refused = await served.ask("once", "alice")

        assert (refused.status, refused.wait) == (429, str(15 * 3600))
        assert (await served.ask("once", "bob")).status == 200

    async def test_day_of_the_function_key_is_counted_too(self, served):
        """A promise a day holds for programs as well."""
        assert [(await served.ask("key-once")).status for _ in range(2)] == [200, 429]

    async def test_day_that_cannot_be_counted_is_not_given_away(self, served, monkeypatch):
        """Without storage the caller is told to come back."""

        async def down(*args):
            raise UnavailableError("locked")

        monkeypatch.setattr(served.store, "read", down)

        assert (await served.ask("once", "alice")).status == 503
