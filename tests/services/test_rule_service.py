"""Addresses, and what a change of rules does when others change them too."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alerts.logic.addresses import address_of, email_of, masked, webhook_base, webhook_of
from alerts.logic.unsubscribing import Leaving
from alerts.rules import TRIES, Actor, RuleService
from alerts.subscriptions import Mute, Preferences, Rules, Subscription
from shared.errors import InvalidPayloadError, RateLimitedError, StaleError, TransientError
from tests.unit.alerts.town import MARKET, WEBHOOK, Town

LOCAL = "http://127.0.0.1:7072/discord"
HOOK = WEBHOOK.removeprefix("https://discord.com")


class TestAddresses:
    @pytest.mark.parametrize(
        "text",
        [
            f"https://ptb.discord.com{HOOK}",
            f"https://DISCORD.com:443{HOOK}",
            f"https://discordapp.com{HOOK.replace('/api', '/api/v10')}",
        ],
    )
    def test_webhook_is_made_anew_from_its_id_and_token(self, text):
        """Every one of Discord's own ends the same."""
        assert webhook_of(text) == WEBHOOK

    @given(at=st.integers(0, len(WEBHOOK)), some=st.text(max_size=8), base=st.sampled_from([None, LOCAL]))
    @settings(max_examples=200, deadline=None)
    def test_whatever_is_put_in_leads_to_discord_or_to_our_own_inbox(self, at, some, base):
        """Or it is refused, with a reason that shows nothing of it."""
        for whole in (WEBHOOK, f"{LOCAL}{HOOK}"):
            text = whole[:at] + some + whole[at:]
            made, said = "", ""
            try:
                made = webhook_of(text, base=base)
            except InvalidPayloadError as e:
                said = str(e)
            assert bool(made) is not bool(said)
            assert "sEcret" not in said
            if made:
                place, _, rest = made.partition("/api/webhooks/")
                assert place in ("https://discord.com", base)
                assert rest.count("/") == 1

    def test_house_that_posts_to_discord_takes_discords_only(self):
        """The one more place is where the house's own webhook lies, if that is not Discord."""
        assert webhook_base(WEBHOOK) is None
        assert webhook_base("nonsense") is None
        assert webhook_base(f"file://127.0.0.1/discord{HOOK}") is None
        assert webhook_base(f"{LOCAL}{HOOK}") == LOCAL
        with pytest.raises(InvalidPayloadError):
            webhook_of(f"{LOCAL}{HOOK}")
        assert webhook_of(f"{LOCAL}{HOOK}", base=LOCAL) == f"{LOCAL}{HOOK}"

    def test_address_is_shown_so_that_nobody_can_use_it(self):
        """Its owner knows it again."""
        assert masked("email", email_of("Ada@Example.COM")) == "A***@example.com"
        assert masked("discord", WEBHOOK) == "webhook 123456789012345678/***"
        assert masked("discord", f"{LOCAL}{HOOK}") == "webhook 123456789012345678/***"

    def test_channel_without_addresses_takes_none(self):
        """SignalR finds people by their name."""
        with pytest.raises(InvalidPayloadError, match="signalr needs no address: there are email and discord"):
            address_of("signalr", "ada")


class Interrupted:
    """A rule book that somebody else always writes first, *times* times."""

    def __init__(self, town: Town, times: int) -> None:
        self.book = town.service.book
        self.left = times

    async def read(self, subscriber: str) -> Rules:
        return await self.book.read(subscriber)

    async def save(self, before: Rules, **changes) -> Rules:
        if self.left:
            self.left -= 1
            raise StaleError("somebody else was first")
        return await self.book.save(before, **changes)


def a_subscription(**changes) -> Subscription:
    return Subscription(**({"subscriber": "ada", "channels": ("signalr",)} | changes))


ADA = Actor(name="ada", subscriber="ada")
ACTS = {
    "subscribe": lambda s: s.subscribe(a_subscription()),
    "mute": lambda s: s.mute(
        ADA, Mute(mute_id="", subscriber="ada", author="ada", until=MARKET.replace(hour=20), reason="")
    ),
    "prefer": lambda s: s.prefer(Preferences(subscriber="ada", cap_per_day=3), lambda *_: True),
    "set_endpoint": lambda s: s.set_endpoint("ada", "email", "ada@example.com"),
}


@pytest.mark.parametrize("name", ACTS)
async def test_act_is_decided_again_when_somebody_else_was_first(name):
    """It happens once, on what is stored then."""
    town = Town()
    service: RuleService = replace(town.service, book=Interrupted(town, 3))

    await ACTS[name](service)

    rules = await town.service.book.read("ada")
    assert (
        len(rules.subscriptions) + len(rules.mutes) + len(rules.endpoints) + (rules.preferences.cap_per_day is not None)
        == 1
    )


@pytest.mark.parametrize("name", ACTS)
async def test_act_that_is_never_first_asks_to_be_tried_again(name):
    """A busy moment is trouble that passes, not a lost change."""
    town = Town()
    service: RuleService = replace(town.service, book=Interrupted(town, TRIES))

    with pytest.raises(TransientError) as caught:
        await ACTS[name](service)

    assert not isinstance(caught.value, RateLimitedError)
    assert caught.value.retry_after is not None


async def test_everything_at_once_loses_nothing():
    """Twenty changes of one subscriber in one moment, by twenty requests."""
    town = Town()

    await asyncio.gather(
        *(
            town.service.subscribe(a_subscription(min_strength=n / 20))
            if n % 2
            else town.service.mute(
                ADA, Mute(mute_id="", subscriber="ada", author="ada", until=MARKET.replace(day=10 + n), reason="")
            )
            for n in range(10)
        )
    )

    rules = await town.service.book.read("ada")
    assert (len(rules.subscriptions), len(rules.mutes)) == (5, 5)


async def test_link_about_something_that_is_gone_changes_nothing():
    """An old mail's button finds nothing to do, and says done."""
    town = Town()
    token = town.keys.sign(Leaving(subscriber="ada", channel="email", subscription_id="gone"), now=town.wall.now())

    assert (await town.service.leave(token)).channel == "email"

    assert (await town.service.book.read("ada")).documents == {}
