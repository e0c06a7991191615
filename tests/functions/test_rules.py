"""Subscriptions, endpoints, preferences, mutes and unsubscribe links, called as the Functions worker calls them."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import azure.functions as func
import pytest

from alerts.adapters.rule_documents import CONTAINER
from alerts.logic.unsubscribing import Leaving
from alerts.rules import MOST_MUTES, MOST_SUBSCRIPTIONS
from alerts.rules_functions import SubscriptionDraft, SubscriptionItem
from shared.errors import RecipientGoneError, UnavailableError
from tests.builders import WALL
from tests.unit.alerts.town import MARKET, PRICE, TOKEN, WEBHOOK, Town, read, refused


@pytest.fixture
def town() -> Town:
    return Town()


class TestSubscriptions:
    async def test_subscription_is_stored_as_asked_and_heard_from_now_on(self, town):
        """201 with its place and tag; the directory has it at once; what was left out has its default."""
        answer = await town.ask("subscriptions_create", PRICE, method="POST")

        made = read(answer)
        assert answer.status_code == 201
        assert answer.headers["Location"] == f"/api/subscriptions/{made['subscription_id']}"
        assert answer.headers["ETag"].startswith('"')
        assert set(made) == set(SubscriptionItem.model_fields)
        assert (made["subscriber"], made["kind"], made["symbols"], made["interval"]) == ("ada", "price", ["AAPL"], "1d")
        assert (made["since"], made["freshness_minutes"], made["resolves"]) == ("2013-01-02T12:00:00Z", 1440, True)
        listener = await town.directory.listener("ada")
        assert listener is not None
        assert [s.price_above for s in listener.subscriptions] == [100.0]
        assert await town.subscriptions() == [made]

    async def test_what_is_read_can_be_put_again(self, town):
        """Every field of an item that a draft has means the same in it."""
        made = await town.create(
            {
                "channels": ["signalr"],
                "symbols": ["aapl", "MSFT"],
                "entries": ["rsi-14"],
                "directions": ["long"],
                "min_strength": 0.5,
                "min_confidence": 0.6,
                "severity": "warning",
                "cooldown_minutes": 90,
                "digest": "hour",
                "cap_per_day": 3,
                "freshness_minutes": 30,
                "resolves": False,
            }
        )
        draft = {name: made[name] for name in SubscriptionDraft.model_fields}

        answer = await town.ask("subscriptions_replace", draft, method="PUT", route={"id": made["subscription_id"]})

        assert answer.status_code == 200
        assert read(answer) == made
        assert made["symbols"] == ["AAPL", "MSFT"]

    async def test_request_that_is_sent_again_adds_nothing(self, town):
        """Its answer was lost: the same is found, with 200."""
        first = await town.create()

        answer = await town.ask("subscriptions_create", PRICE, method="POST")

        assert (answer.status_code, read(answer)) == (200, first)
        assert len(await town.subscriptions()) == 1

    async def test_change_that_knows_the_last_one_is_taken_and_another_is_not(self, town):
        """412 for whoever has not seen what he would write over."""
        made = await town.create()
        route = {"id": made["subscription_id"]}
        tag = (await town.ask("subscriptions_read", route=route)).headers["ETag"]

        first = await town.ask(
            "subscriptions_replace", PRICE | {"price_above": 110}, method="PUT", route=route, headers={"If-Match": tag}
        )
        second = await town.ask(
            "subscriptions_replace", PRICE | {"price_above": 120}, method="PUT", route=route, headers={"If-Match": tag}
        )

        assert (first.status_code, read(first)["price_above"]) == (200, 110)
        assert first.headers["ETag"] not in ("", tag)
        assert "changed since you read it: GET it again" in refused(second, 412)
        gone = await town.ask("subscriptions_delete", method="DELETE", route=route, headers={"If-Match": tag})
        assert gone.status_code == 412
        assert [s["price_above"] for s in await town.subscriptions()] == [110]

    async def test_one_subscription_is_not_changed_by_the_change_of_another(self, town):
        """Tags are of one thing each."""
        made = await town.create()
        route = {"id": made["subscription_id"]}
        tag = (await town.ask("subscriptions_read", route=route)).headers["ETag"]
        await town.create(PRICE | {"price_above": 200})

        answer = await town.ask("subscriptions_delete", method="DELETE", route=route, headers={"If-Match": tag})

        assert answer.status_code == 200

    async def test_reader_that_knows_it_is_told_nothing_new(self, town):
        """304 for the tag of what is stored."""
        made = await town.create()
        route = {"id": made["subscription_id"]}
        tag = (await town.ask("subscriptions_read", route=route)).headers["ETag"]

        again = await town.ask("subscriptions_read", route=route, headers={"If-None-Match": tag})

        assert (again.status_code, again.get_body()) == (304, b"")

    async def test_deleted_subscription_is_gone(self, town):
        """For everybody, and a second time there is nothing to delete."""
        made = await town.create()
        route = {"id": made["subscription_id"]}

        assert (await town.ask("subscriptions_delete", method="DELETE", route=route)).status_code == 200
        assert await town.subscriptions() == []
        assert "you have no subscription" in refused(
            await town.ask("subscriptions_delete", method="DELETE", route=route), 404
        )

    @pytest.mark.parametrize(
        ("changes", "status", "named"),
        [
            ({"channels": []}, 422, "channels"),
            ({"channels": ["fax"]}, 400, "channels: fax does not exist here; choose from discord, email, signalr"),
            ({"channels": ["email"]}, 400, "channels: nobody knows your email address: PUT /api/endpoints/email"),
            ({"kind": "horoscope"}, 422, "kind"),
            ({"symbols": ["not a symbol"]}, 400, "symbols: 'not a symbol' is no symbol"),
            ({"symbols": []}, 422, "symbols"),
            ({"symbols": None}, 400, "symbols: a price is one of certain symbols: name them"),
            ({"price_above": None}, 400, "price_above: give it, or price_below, or both"),
            ({"price_above": -1}, 422, "price_above"),
            ({"price_below": 100}, 400, "price_above: it must be higher than price_below"),
            ({"percent": 5}, 400, "percent: only subscriptions of kind move have it: leave it out"),
            ({"window": 5}, 400, "window: only subscriptions of kind move and volume have it"),
            ({"min_strength": 0.5}, 400, "min_strength: only subscriptions of kind signal have it"),
            ({"directions": ["long"]}, 400, "directions: price_above and price_below say the direction"),
            ({"kind": "signal"}, 400, "price_above: only subscriptions of kind price have it"),
            ({"kind": "move", "price_above": None}, 400, "percent: give the move in percent, such as 5"),
            ({"kind": "volume", "price_above": None}, 400, "times_usual: give how many times the usual volume"),
            ({"cooldown_minutes": 0}, 422, "cooldown_minutes"),
            ({"cooldown_minutes": 43_201}, 422, "cooldown_minutes"),
            ({"interval": "5m"}, 422, "interval"),
            ({"severity": "loud"}, 422, "severity"),
            ({"digest": "week"}, 422, "digest"),
            ({"mood": "bullish"}, 422, "mood"),
            ({"subscriber": "bob"}, 422, "subscriber"),
        ],
    )
    async def test_wrong_field_is_named_with_what_to_write(self, town, changes, status, named):
        """And nothing is stored."""
        answer = await town.ask("subscriptions_create", PRICE | changes, method="POST")

        assert named in refused(answer, status)
        assert await town.subscriptions() == []

    async def test_there_are_at_most_so_many_however_many_ask_at_once(self, town):
        """409 with what to do; two at the last place do not both get it."""
        for n in range(MOST_SUBSCRIPTIONS - 1):
            await town.create(PRICE | {"price_above": 100 + n})

        answers = await asyncio.gather(
            *(town.ask("subscriptions_create", PRICE | {"price_above": 1000 + n}, method="POST") for n in range(4))
        )

        assert sorted(a.status_code for a in answers) == [201, 409, 409, 409]
        assert "100 subscriptions, which is the most: delete one first" in next(
            refused(a, 409) for a in answers if a.status_code == 409
        )
        assert len(await town.subscriptions()) == MOST_SUBSCRIPTIONS


class TestEndpoints:
    async def test_address_is_sealed_and_shown_masked_only(self, town):
        """In no answer and nowhere in storage."""
        answers = [
            await town.reach("email", "Ada.Lovelace@Example.COM"),
            await town.reach("discord", WEBHOOK),
            await town.ask("endpoints_list"),
            await town.ask("endpoints_read", route={"channel": "discord"}),
        ]

        assert [a.status_code for a in answers] == [200] * 4
        assert {e["channel"]: e["shown"] for e in read(answers[2])["items"]} == {
            "email": "A***@example.com",
            "discord": "webhook 123456789012345678/***",
        }
        stored = str(await town.documents.feed(CONTAINER, limit=100))
        for seen in (*(a.get_body().decode() for a in answers), stored):
            assert TOKEN not in seen
            assert "Lovelace" not in seen
        found = await town.directory.address("ada", "discord")
        assert found is not None
        assert found.value.get_secret_value() == WEBHOOK

    @pytest.mark.parametrize(
        ("channel", "address", "status", "named"),
        [
            ("email", "ada@localhost-s3cret", 400, "address: it is no e-mail address"),
            ("email", "ada@example.com\r\nBcc: s3cret@example.com", 400, "address: it is no e-mail address"),
            ("discord", "https://evil.example/api/webhooks/123456789012345678/s3cret" + "x" * 30, 400, "no Discord"),
            ("discord", "http://127.0.0.1:7072/discord/api/webhooks/123456789012345678/s3cret" + "x" * 30, 400, "no D"),
            ("discord", f"{WEBHOOK}?s3cret=1", 400, "is no Discord webhook: it has the form https://discord.com/api"),
            ("discord", "s3", 422, "address"),
            ("email", "s3cret" * 100, 422, "address"),
            ("signalr", "s3cret@example.com", 404, "signalr has no addresses: there are email and discord"),
        ],
    )
    async def test_what_is_no_address_is_refused_and_not_shown(self, town, channel, address, status, named):
        """The answer says what an address looks like and shows nothing of the given."""
        answer = await town.reach(channel, address)

        assert named in refused(answer, status)
        assert "s3cret" not in answer.get_body().decode()
        assert read(await town.ask("endpoints_list"))["items"] == []

    async def test_webhook_of_the_house_own_inbox_is_taken_where_the_house_posts_there(self):
        """The embedded cloud's Discord can be tried out; elsewhere it is refused."""
        town = Town(webhook_base="http://127.0.0.1:7072/discord")
        local = WEBHOOK.replace("https://discord.com", "http://127.0.0.1:7072/discord")

        assert (await town.reach("discord", local)).status_code == 200
        assert (await town.reach("discord", local.replace("7072", "7073"))).status_code == 400
        found = await town.directory.address("ada", "discord")
        assert found is not None
        assert found.value.get_secret_value() == local

    async def test_address_given_again_enables_what_was_disabled(self, town):
        """With a clean sheet."""
        await town.reach()
        await town.directory.failed("ada", "email", "no such mailbox", WALL, is_gone=True)
        off = read(await town.ask("endpoints_read", route={"channel": "email"}))

        on = read(await town.reach())

        assert (off["is_enabled"], off["disabled_reason"], off["failures"]) == (False, "no such mailbox", 1)
        assert (on["is_enabled"], on["disabled_reason"], on["failures"]) == (True, None, 0)

    async def test_forgotten_address_is_gone(self, town):
        """Nothing is left of it in storage."""
        await town.reach()

        assert (await town.ask("endpoints_delete", method="DELETE", route={"channel": "email"})).status_code == 200
        assert "you have no endpoint" in refused(
            await town.ask("endpoints_delete", method="DELETE", route={"channel": "email"}), 404
        )
        assert "email" not in str(await town.documents.page(CONTAINER, "ada"))

    async def test_test_message_goes_to_the_own_address_and_seldom(self, town):
        """Ten a day, counted in storage: the eleventh is asked to wait."""
        await town.reach()

        async def test() -> func.HttpResponse:
            return await town.ask("endpoints_test", method="POST", route={"channel": "email"})

        answers = [await test() for _ in range(11)]

        assert [a.status_code for a in answers] == [200] * 10 + [429]
        assert int(answers[-1].headers["Retry-After"]) > 0
        assert read(answers[0])["done"] == "a test message is on its way to a***@example.com"
        [first, *_] = town.channels["email"].sent
        assert first.to is not None
        assert first.to.value.get_secret_value() == "ada@example.com"
        assert (first.alert.title, first.item["subscriber"]) == ("A test message", "ada")

    @pytest.mark.parametrize(
        ("trouble", "status"), [(UnavailableError("down"), 503), (RecipientGoneError("no such mailbox"), 422)]
    )
    async def test_test_message_that_does_not_arrive_says_so(self, town, trouble, status):
        """That is what it is for."""
        await town.reach()
        town.channels["email"].trouble = trouble

        assert str(trouble) in refused(
            await town.ask("endpoints_test", method="POST", route={"channel": "email"}), status
        )

    async def test_nothing_is_tested_where_nobody_is_reached(self, town):
        """404 without an address, 400 while it is disabled, with what to do."""
        assert "you have no endpoint" in refused(
            await town.ask("endpoints_test", method="POST", route={"channel": "email"}), 404
        )
        await town.reach()
        await town.directory.failed("ada", "email", "gone", WALL, is_gone=True)

        assert "PUT it again to enable it" in refused(
            await town.ask("endpoints_test", method="POST", route={"channel": "email"}), 400
        )


class TestPreferences:
    async def test_preferences_have_defaults_until_they_are_put(self, town):
        """No quiet hours, no cap, UTC; what is put is read."""
        before = await town.ask("preferences_read")
        wanted = {"zone": "Europe/Berlin", "quiet_from": "22:00", "quiet_to": "07:00", "cap_per_day": 20}

        answer = await town.ask(
            "preferences_replace", wanted, method="PUT", headers={"If-Match": before.headers["ETag"]}
        )

        assert read(before) == {
            "subscriber": "ada",
            "zone": "UTC",
            "quiet_from": None,
            "quiet_to": None,
            "cap_per_day": None,
        }
        assert read(answer) == {"subscriber": "ada"} | wanted
        assert read(await town.ask("preferences_read")) == read(answer)
        stale = await town.ask("preferences_replace", {}, method="PUT", headers={"If-Match": before.headers["ETag"]})
        assert stale.status_code == 412

    @pytest.mark.parametrize(
        ("body", "status", "named"),
        [
            ({"zone": "Mars/Olympus"}, 400, "zone: 'Mars/Olympus' is no time zone: write an IANA name"),
            ({"quiet_from": "22:00"}, 400, "quiet_from and quiet_to belong together"),
            ({"quiet_from": "22:00", "quiet_to": "22:00"}, 400, "quiet_to: quiet hours that end when they begin"),
            ({"quiet_from": "24:00", "quiet_to": "07:00"}, 422, "quiet_from"),
            ({"quiet_from": "10 pm", "quiet_to": "07:00"}, 422, "quiet_from"),
            ({"cap_per_day": 0}, 422, "cap_per_day"),
        ],
    )
    async def test_wrong_preference_is_named_with_what_to_write(self, town, body, status, named):
        """And nothing is stored."""
        assert named in refused(await town.ask("preferences_replace", body, method="PUT"), status)
        assert read(await town.ask("preferences_read"))["zone"] == "UTC"


class TestMutes:
    async def mute(self, town: Town, body: Mapping[str, Any], by: str = "ada") -> func.HttpResponse:
        return await town.ask("mutes_create", body, method="POST", by=by)

    async def test_mute_has_an_author_and_an_end_of_market_time(self, town):
        """For so long, or until an instant."""
        made = read(await self.mute(town, {"for_minutes": 60, "symbols": ["aapl"], "reason": "earnings"}))
        until = await self.mute(town, {"until": "2013-01-05T00:00:00+01:00"})

        assert (made["author"], made["until"]) == ("ada", "2013-01-02T13:00:00Z")
        assert (made["symbols"], made["entries"], made["reason"]) == (["AAPL"], None, "earnings")
        assert until.status_code == 201
        listener = await town.directory.listener("ada")
        assert listener is not None
        assert {m.until for m in listener.mutes} == {MARKET + timedelta(hours=1), datetime(2013, 1, 4, 23, tzinfo=UTC)}

    async def test_ended_mute_is_listed_no_longer_and_makes_room(self, town):
        """At most so many run at once."""
        for n in range(MOST_MUTES):
            assert (await self.mute(town, {"for_minutes": 10 + n})).status_code == 201
        assert "10 mutes are running, which is the most" in refused(await self.mute(town, {"for_minutes": 99}), 409)

        town.market.at += timedelta(minutes=12)

        assert len(read(await town.ask("mutes_list"))["items"]) == MOST_MUTES - 3
        assert (await self.mute(town, {"for_minutes": 99})).status_code == 201
        stored = await town.documents.page(CONTAINER, "ada")
        assert sum(d.body["kind"] == "mute" for d in stored) == MOST_MUTES - 2

    async def test_mute_can_be_ended_before_its_time(self, town):
        """Once."""
        made = read(await self.mute(town, {"for_minutes": 60}))
        route = {"id": made["mute_id"]}

        assert (await town.ask("mutes_delete", method="DELETE", route=route)).status_code == 200
        assert "you have no mute" in refused(await town.ask("mutes_delete", method="DELETE", route=route), 404)

    @pytest.mark.parametrize(
        ("body", "status", "named"),
        [
            ({}, 400, "until: give it (an instant of market time) or for_minutes, one of both"),
            ({"until": "2013-02-01T00:00:00Z", "for_minutes": 5}, 400, "one of both"),
            ({"until": "2013-01-02T12:00:00Z"}, 400, "until: it must lie behind 2013-01-02T12:00:00Z (market time)"),
            ({"until": "2023-01-02T12:00:00Z"}, 400, "366 days at most"),
            ({"until": "2013-02-01T00:00:00"}, 422, "until"),
            ({"for_minutes": 0}, 422, "for_minutes"),
            ({"for_minutes": 5, "symbols": ["no such thing"]}, 400, "symbols"),
            ({"for_minutes": 5, "reason": "x" * 201}, 422, "reason"),
        ],
    )
    async def test_wrong_mute_is_named_with_what_to_write(self, town, body, status, named):
        """And nothing is muted."""
        assert named in refused(await self.mute(town, body), status)
        assert read(await town.ask("mutes_list"))["items"] == []


class TestWhose:
    """Object-level: what is somebody's is theirs."""

    async def test_nobody_sees_or_changes_what_is_anothers(self, town):
        """Another's subscription, mute and endpoint do not exist, whatever is asked."""
        made = await town.create()
        await town.reach()
        mute = read(await town.ask("mutes_create", {"for_minutes": 60}, method="POST"))
        one = {"id": made["subscription_id"]}

        answers = [
            await town.ask("subscriptions_read", by="bob", route=one),
            await town.ask("subscriptions_replace", PRICE, by="bob", method="PUT", route=one),
            await town.ask("subscriptions_delete", by="bob", method="DELETE", route=one),
            await town.ask("mutes_delete", by="bob", method="DELETE", route={"id": mute["mute_id"]}),
            await town.ask("endpoints_read", by="bob", route={"channel": "email"}),
            await town.ask("endpoints_delete", by="bob", method="DELETE", route={"channel": "email"}),
            await town.ask("endpoints_test", by="bob", method="POST", route={"channel": "email"}),
        ]

        assert [a.status_code for a in answers] == [404] * len(answers)
        assert await town.subscriptions("bob") == []
        assert await town.subscriptions("ada") == [made]

    async def test_naming_another_takes_an_operator(self, town):
        """403 for everybody else; oneself may always be named."""
        for name in ("subscriptions_list", "endpoints_list", "mutes_list"):
            assert "only an operator" in refused(await town.ask(name, by="bob", subscriber="ada"), 403)
        answer = await town.ask("mutes_create", {"for_minutes": 5, "subscriber": "ada"}, by="bob", method="POST")
        assert answer.status_code == 403
        assert (await town.ask("subscriptions_list", by="bob", subscriber="bob")).status_code == 200
        assert await town.audit.listed(None, newest_first=False, limit=10) == []

    async def test_operator_reads_and_mutes_for_others_and_is_written_down(self, town):
        """With a reason, which the muted see; but changes nothing else of theirs."""
        made = await town.create()
        assert "reason: say why you mute" in refused(
            await town.ask("mutes_create", {"for_minutes": 5, "subscriber": "ada"}, by="op", method="POST"), 400
        )

        seen = await town.ask("subscriptions_list", by="op", subscriber="ada")
        muted = await town.ask(
            "mutes_create", {"for_minutes": 5, "subscriber": "ada", "reason": "bad data"}, by="op", method="POST"
        )
        ended = await town.ask(
            "mutes_delete",
            by="op",
            method="DELETE",
            route={"id": read(muted)["mute_id"]},
            subscriber="ada",
            reason="data is good again",
        )
        theirs = await town.ask(
            "subscriptions_delete", by="op", method="DELETE", route={"id": made["subscription_id"]}, subscriber="ada"
        )

        assert read(seen)["items"] == [made]
        assert (read(muted)["subscriber"], read(muted)["author"], read(muted)["reason"]) == ("ada", "op", "bad data")
        assert (ended.status_code, theirs.status_code) == (200, 404)
        told = [dict(d.body) for d in await town.audit.listed(None, newest_first=False, limit=10)]
        assert sorted((t["actor"], t["action"], t["subject"], t["reason"]) for t in told) == [
            ("op", "mute.create", "ada", "bad data"),
            ("op", "mute.delete", "ada", "data is good again"),
            ("op", "rules.read", "ada", ""),
        ]

    @pytest.mark.parametrize("name", ["public", "guest-1", "_directory", "a b", "a|b", "x" * 101])
    async def test_built_in_and_impossible_names_have_no_rules(self, town, name):
        """Nor for an operator."""
        assert "subscriber: " in refused(await town.ask("subscriptions_list", by="op", subscriber=name), 400)

    async def test_everything_but_the_links_takes_a_token(self, town):
        """A wrong one, or none, is answered with 401."""
        for endpoint in town.api.endpoints:
            if not endpoint.name.startswith("alerts_unsubscribe"):
                assert endpoint.auth == "subscriber", endpoint.name
                for by in (None, "eve"):
                    answer = await town.ask(endpoint.name.removeprefix("alerts_"), by=by, method=endpoint.method)
                    assert answer.status_code == 401, endpoint.name


class TestLinks:
    def link(self, town: Town, subscription_id: str | None = None, channel: str = "email") -> str:
        return town.keys.sign(
            Leaving(subscriber="ada", channel=channel, subscription_id=subscription_id), now=town.wall.now()
        )

    async def test_looking_at_a_link_changes_nothing(self, town):
        """Mail scanners follow links: the page has a button, and tells nobody where it came from."""
        await town.reach()
        made = await town.create({"channels": ["email"]})

        page = await town.ask("unsubscribe_ask", by=None, token=self.link(town, made["subscription_id"]))

        assert (page.status_code, page.mimetype) == (200, "text/html")
        assert '<form method="post"><button' in page.get_body().decode()
        assert page.headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert await town.subscriptions() == [made]

    async def test_button_ends_the_subscription_on_that_channel_without_signing_in(self, town):
        """Again changes nothing; where other channels are left it stays on them."""
        await town.reach()
        alone = await town.create({"channels": ["email"]})
        both = await town.create({"channels": ["email", "signalr"]})

        for made in (alone, both, both, alone):
            answer = await town.ask(
                "unsubscribe", by=None, method="POST", token=self.link(town, made["subscription_id"])
            )
            assert answer.status_code == 200

        assert [s["channels"] for s in await town.subscriptions()] == [["signalr"]]

    async def test_link_of_a_digest_switches_the_channel_off(self, town):
        """Everything by e-mail ends; the address is kept, so that its owner can switch it on again."""
        await town.reach()
        made = await town.create({"channels": ["email"]})

        await town.ask("unsubscribe", by=None, method="POST", token=self.link(town))

        endpoint = read(await town.ask("endpoints_read", route={"channel": "email"}))
        assert (endpoint["is_enabled"], endpoint["disabled_reason"]) == (
            False,
            "unsubscribed by the link in a message",
        )
        assert await town.subscriptions() == [made]
        assert await town.directory.address("ada", "email") is None

    @pytest.mark.parametrize("name", ["unsubscribe_ask", "unsubscribe"])
    async def test_link_that_was_changed_or_has_ended_does_nothing(self, town, name):
        """400 with what to do."""
        await town.reach()
        made = await town.create({"channels": ["email"]})
        good = self.link(town, made["subscription_id"])
        method = "POST" if name == "unsubscribe" else "GET"

        assert "copy it whole" in refused(await town.ask(name, by=None, method=method, token=good[:-2] + "AA"), 400)
        assert "copy it whole" in refused(await town.ask(name, by=None, method=method), 400)
        town.wall.at += timedelta(days=365)
        assert "this link has ended" in refused(await town.ask(name, by=None, method=method, token=good), 400)
        assert await town.subscriptions() == [made]
