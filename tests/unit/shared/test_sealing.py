import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigurationError, InvalidPayloadError
from shared.sealing import Sealer
from shared.settings import Settings

ONE = "one:" + base64.b64encode(bytes(range(32))).decode()
TWO = "two:" + base64.b64encode(bytes(range(32, 64))).decode()
OWNER = ("ada", "email")
NEIGHBOURS = {
    "EVENT_GRID_TOPIC_ENDPOINT": "http://127.0.0.1/topic",
    "AZURE_SIGNALR_CONNECTION_STRING": "Endpoint=http://127.0.0.1;AccessKey=k;Version=1.0;",
    "DISCORD_WEBHOOK_URL": "http://127.0.0.1/api/webhooks/100000000000000001/token",
    "ALPHA_VANTAGE_KEY": "k",
    "FINNHUB_KEY": "k",
}


@given(text=st.text(), owner=st.lists(st.text(), max_size=3))
def test_what_was_sealed_opens_for_its_owner(text, owner):
    """Any text comes back as it was."""
    sealer = Sealer(ONE)

    assert sealer.open(sealer.seal(text, *owner), *owner) == text


def test_sealed_text_shows_nothing_and_never_repeats():
    """Who reads storage learns neither an address nor that two are the same."""
    sealer = Sealer(ONE)

    first, second = sealer.seal("ada@example.com", *OWNER), sealer.seal("ada@example.com", *OWNER)

    assert first != second
    assert "ada" not in first
    assert "example" not in base64.b64decode(first.split(".")[2] + "==", altchars=b"-_").decode("latin-1")


@pytest.mark.parametrize("other", [("bob", "email"), ("ada", "discord"), ("ada",), ("adaemail",), ("ada", "email", "")])
def test_sealed_text_moved_to_another_owner_does_not_open(other):
    """An address sealed for one subscriber and channel is of no use in another's document."""
    sealer = Sealer(ONE)

    with pytest.raises(InvalidPayloadError, match="somebody else"):
        sealer.open(sealer.seal("ada@example.com", *OWNER), *other)


def test_changed_text_does_not_open():
    """No character of the nonce, the ciphertext or the tag can be exchanged."""
    sealer = Sealer(ONE)
    sealed = sealer.seal("ada", *OWNER)
    start = sealed.rindex(".") + 1

    for at in range(start, len(sealed) - 1):
        changed = sealed[:at] + ("A" if sealed[at] != "A" else "B") + sealed[at + 1 :]
        with pytest.raises(InvalidPayloadError):
            sealer.open(changed, *OWNER)


@pytest.mark.parametrize(
    "text", ["", "ada@example.com", "v1", "v1.one", "v1.one.", "v1.one.!", "v2.one.AAAA", "v1.o e.AA"]
)
def test_text_that_was_never_sealed_does_not_open(text):
    """Neither a plain address nor half a sealed one passes for a sealed one."""
    with pytest.raises(InvalidPayloadError):
        Sealer(ONE).open(text, *OWNER)


def test_new_key_in_front_seals_and_the_old_one_still_opens():
    """Rotation: nothing has to be sealed again on the day the key changes."""
    old = Sealer(ONE).seal("ada", *OWNER)
    rotated = Sealer(f"{TWO}, {ONE}")

    new = rotated.seal("ada", *OWNER)

    assert rotated.open(old, *OWNER) == rotated.open(new, *OWNER) == "ada"
    assert Sealer(TWO).open(new, *OWNER) == "ada"


def test_missing_key_is_named():
    """Who drops a key too early reads which one to put back."""
    sealed = Sealer(ONE).seal("ada", *OWNER)

    with pytest.raises(ConfigurationError, match=r"key one.*ENDPOINT_KEYS"):
        Sealer(TWO).open(sealed, *OWNER)


def test_key_under_another_ones_name_does_not_open():
    """A key is known by its bytes, not by its name."""
    sealed = Sealer(ONE).seal("ada", *OWNER)

    with pytest.raises(InvalidPayloadError):
        Sealer(TWO.replace("two", "one")).open(sealed, *OWNER)


def test_sealing_without_a_key_says_how_to_make_one():
    """An address is never stored readable: without a key it is not stored at all."""
    with pytest.raises(ConfigurationError, match=r"ENDPOINT_KEYS is not set.*openssl rand -base64 32"):
        Sealer("").seal("ada", *OWNER)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("c2VjcmV0", "key 1"),
        ("one:c2VjcmV0", "key 1"),
        (f"{ONE},two:secret!", "key 2"),
        (f"{ONE},", "key 2"),
        (f"{ONE},{ONE}", "one twice"),
        (f"a.b:{ONE.partition(':')[2]}", "key 1"),
        (f":{ONE.partition(':')[2]}", "key 1"),
    ],
)
def test_wrong_setting_stops_the_start_and_shows_no_key(setting, says):
    """A key that cannot be used is found when the app starts, not when the first subscriber comes."""
    with pytest.raises(ConfigurationError, match=says) as caught:
        Settings.from_env({**NEIGHBOURS, "ENDPOINT_KEYS": setting})

    assert "ENDPOINT_KEYS" in str(caught.value)
    assert all(part not in str(caught.value) for part in ("c2VjcmV0", "secret", ONE.partition(":")[2]))


def test_keys_are_secrets_of_the_settings():
    """What opens every address is kept out of logs like any other secret."""
    assert ONE in Settings.from_env({**NEIGHBOURS, "ENDPOINT_KEYS": ONE}).secrets()
