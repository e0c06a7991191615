"""Unsubscribe links: what they allow, for how long, and that nobody can make or change one."""

import base64
import json
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts.logic.unsubscribing import LIFE, Leaving, UnsubscribeKeys
from shared.errors import ConfigurationError, InvalidPayloadError
from tests.builders import WALL

KEY, OTHER = b"k" * 32, b"o" * 32
MINE = Leaving(subscriber="alice", channel="email", subscription_id="s-1")
leavings = st.builds(Leaving, subscriber=st.text(max_size=50), channel=st.text(max_size=9), subscription_id=st.none())


@given(leavings | st.just(MINE), st.timedeltas(min_value=timedelta(), max_value=LIFE - timedelta(seconds=1)))
def test_a_link_allows_what_it_was_made_for(leaving, later):
    """Exactly the subscriber, the channel and the subscription, until it ends."""
    keys = UnsubscribeKeys([KEY])

    assert keys.verify(keys.sign(leaving, now=WALL), now=WALL + later) == leaving


def test_a_link_ends():
    """After its life it allows nothing, and says what to do instead."""
    keys = UnsubscribeKeys([KEY])

    with pytest.raises(InvalidPayloadError, match="newer message"):
        keys.verify(keys.sign(MINE, now=WALL), now=WALL + LIFE)


@given(st.data())
def test_a_changed_link_is_refused(data):
    """Not one character can be changed, taken away or added."""
    keys = UnsubscribeKeys([KEY])
    token = keys.sign(MINE, now=WALL)
    at = data.draw(st.integers(0, len(token) - 1))
    new = data.draw(st.characters(codec="utf-8"))
    changed = data.draw(
        st.sampled_from(
            [token[:at] + new + token[at + 1 :], token[:at] + token[at + 1 :], token[:at] + new + token[at:]]
        )
    )
    if changed != token:
        with pytest.raises(InvalidPayloadError):
            keys.verify(changed, now=WALL)


def test_claims_for_somebody_else_need_another_mac():
    """Who rewrites the claims cannot sign them; neither can who has another key, or a MAC of another purpose."""
    keys = UnsubscribeKeys([KEY])
    form, key_id, _, mac = keys.sign(MINE, now=WALL).split(".")
    claims = base64.urlsafe_b64encode(json.dumps(["bob", "email", None, 2**33]).encode()).decode().rstrip("=")

    for token in (f"{form}.{key_id}.{claims}.{mac}", UnsubscribeKeys([OTHER]).sign(MINE, now=WALL)):
        with pytest.raises(InvalidPayloadError, match="no valid unsubscribe link"):
            keys.verify(token, now=WALL)


@pytest.mark.parametrize("token", ["", ".", "v1", "v1...", "v2.a.b.c", "é.é.é.é", "v1.a.b.c.d", "v1." + "x" * 5000])
def test_nonsense_is_a_clear_error(token):
    """Whatever is in a link, it is refused in the same words."""
    with pytest.raises(InvalidPayloadError, match="copy it whole"):
        UnsubscribeKeys([KEY]).verify(token, now=WALL)


def test_old_links_work_while_their_key_is_kept():
    """To rotate, put a new key in front; links of the old one work until it is dropped."""
    old = UnsubscribeKeys([KEY]).sign(MINE, now=WALL)
    both = UnsubscribeKeys([OTHER, KEY])

    assert both.verify(old, now=WALL) == MINE
    assert UnsubscribeKeys([OTHER]).verify(both.sign(MINE, now=WALL), now=WALL) == MINE
    with pytest.raises(InvalidPayloadError):
        UnsubscribeKeys([OTHER]).verify(old, now=WALL)


def test_keys_come_from_their_setting_or_from_the_endpoint_keys():
    """Without a key of its own the links are signed with derived ones, which are not the endpoint keys themselves."""
    derived = UnsubscribeKeys.of_settings("", {"k1": KEY, "k0": OTHER})
    given = UnsubscribeKeys.of_settings(f" {'s' * 40} , {'t' * 40}", {"k1": KEY})

    token = derived.sign(MINE, now=WALL)
    assert UnsubscribeKeys.of_settings("", {"k2": b"n" * 32, "k1": KEY}).verify(token, now=WALL) == MINE
    for others in (UnsubscribeKeys([KEY, OTHER]), given):
        with pytest.raises(InvalidPayloadError):
            others.verify(token, now=WALL)
    assert (
        UnsubscribeKeys.of_settings("t" * 40 + "," + "s" * 40, {}).verify(given.sign(MINE, now=WALL), now=WALL) == MINE
    )


def test_a_key_that_is_too_short_is_named_by_its_place():
    """The error says which, and shows nothing of it."""
    with pytest.raises(ConfigurationError, match="key 2 of UNSUBSCRIBE_KEY") as caught:
        UnsubscribeKeys.of_settings(f"{'s' * 40},canary", {})

    assert "canary" not in str(caught.value)


def test_without_any_key_no_link_is_made():
    """It is known beforehand, and asking all the same says what to set."""
    keys = UnsubscribeKeys.of_settings("", {})

    assert not keys
    with pytest.raises(ConfigurationError, match="UNSUBSCRIBE_KEY"):
        keys.sign(MINE, now=WALL)


def test_a_link_fits_into_an_address():
    """Only characters that need no escaping in a query, also for strange names."""
    token = UnsubscribeKeys([KEY]).sign(Leaving(subscriber="auth0|Ä/ 😀", channel="email"), now=WALL)

    assert token.replace(".", "").replace("-", "").replace("_", "").isalnum()
    assert token.isascii()
