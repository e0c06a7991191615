"""The subscriptions file: what it may say, and how wrong lines are named."""

from pathlib import Path

import pytest

from alerts.adapters.subscriptions_file import read_subscriptions
from alerts.models import Severity
from shared.errors import ConfigurationError

CHANNELS = {"signalr": None, "discord": None}
SHIPPED = Path(__file__).parents[3] / "alerts" / "subscriptions.toml"
GOOD = {"subscriber": '"public"', "channels": '["signalr"]'}


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "subscriptions.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def table(**fields: str) -> str:
    return "\n".join(["[[subscription]]", *(f"{name} = {value}" for name, value in (GOOD | fields).items()), ""])


def test_the_shipped_file_lets_the_public_hear_everything():
    """A newcomer sees every signal on both channels."""
    [public] = read_subscriptions(SHIPPED, CHANNELS)

    assert (public.subscriber, public.channels) == ("public", ("signalr", "discord"))
    assert (public.symbols, public.entries, public.min_strength) == (None, None, 0.0)
    assert (public.cooldown, public.cap_per_day, public.freshness, public.since) == (None, None, None, None)
    assert public.severity is Severity.INFO


def test_every_field_is_read(write):
    """Symbols are normalised; all is all."""
    path = write(
        table(symbols='["aapl", "BRK.B"]', entries='["rsi-14"]', min_strength="0.5", severity='"critical"')
        + table(
            subscriber='"desk"',
            symbols='"all"',
            entries='"all"',
            min_strength="1",
            directions='["short"]',
            min_confidence="0.6",
        )
    )

    one, two = read_subscriptions(path, CHANNELS)

    assert (one.symbols, one.entries) == (frozenset({"AAPL", "BRK.B"}), frozenset({"rsi-14"}))
    assert (one.min_strength, one.severity) == (0.5, Severity.CRITICAL)
    assert (two.subscriber, two.symbols, two.entries, two.min_strength) == ("desk", None, None, 1.0)
    assert (two.directions, two.min_confidence) == (frozenset({"short"}), 0.6)
    assert (one.subscription_id, two.subscription_id) == ("file-1", "file-2")


def test_an_empty_file_is_nobody(write):
    """Nobody has to hear anything."""
    assert read_subscriptions(write("# nobody yet\n"), CHANNELS) == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"chanels": '["signalr"]'}, ["chanels", "is no field", "channels"]),
        ({"subscriber": "7"}, ["subscriber must be a name"]),
        ({"subscriber": '""'}, ["subscriber must be a name"]),
        ({"channels": "[]"}, ["channels must be a list", "discord, signalr"]),
        ({"channels": '"signalr"'}, ["channels must be a list", "discord, signalr"]),
        ({"channels": '["signalr", "fax"]'}, ["fax", "discord, signalr"]),
        ({"channels": "[1, [2]]"}, ["1, [2]", "discord, signalr"]),
        ({"symbols": '"AAPL"'}, ["symbols", '"all" or a list']),
        ({"symbols": "[]"}, ["symbols", '"all" or a list']),
        ({"symbols": "[1]"}, ["symbols", '"all" or a list']),
        ({"symbols": '["AAPL", "a b"]'}, ["symbols", "'a b'"]),
        ({"entries": '"rsi-14"'}, ["entries", '"all" or a list']),
        ({"entries": "7"}, ["entries", '"all" or a list']),
        ({"min_strength": "1.5"}, ["min_strength", "from 0 to 1", "1.5"]),
        ({"min_strength": "-0.1"}, ["min_strength", "from 0 to 1"]),
        ({"min_strength": "nan"}, ["min_strength", "from 0 to 1"]),
        ({"min_strength": "true"}, ["min_strength", "from 0 to 1"]),
        ({"min_strength": '"0.5"'}, ["min_strength", "from 0 to 1"]),
        ({"min_confidence": "2"}, ["min_confidence", "from 0 to 1"]),
        ({"directions": '["up"]'}, ["directions", "long, short"]),
        ({"severity": '"loud"'}, ["severity", "info, warning, critical", "loud"]),
        ({"severity": "1"}, ["severity", "info, warning, critical"]),
    ],
)
def test_a_wrong_line_is_named_with_its_place_and_what_to_write(write, fields, named):
    """The error leads to the file, the subscription and the field, and shows the choices."""
    path = write(table() + table(**fields))

    with pytest.raises(ConfigurationError) as caught:
        read_subscriptions(path, CHANNELS)

    told = str(caught.value)
    assert f"{path}: subscription 2: " in told
    for part in named:
        assert part in told


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[subscription]\nsubscriber = 'public'\n", "[[subscription]]"),
        ("subscription = 7\n", "[[subscription]]"),
        ("subscription = [7]\n", "[[subscription]]"),
        ("[[subscriptions]]\nsubscriber = 'public'\n", "subscriptions is nothing we know"),
        ("[[subscription]\n", "line 1"),
        (b"subscriber = '\xff'\n", "utf-8"),
    ],
)
def test_a_file_of_another_form_is_refused(write, text, named):
    """A slip in the headings is an error, not silence: nobody would hear anything."""
    path = write(text)

    with pytest.raises(ConfigurationError) as caught:
        read_subscriptions(path, CHANNELS)

    assert str(path) in str(caught.value)
    assert named in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    """The error names the setting and the path."""
    with pytest.raises(ConfigurationError, match=r"SUBSCRIPTIONS_FILE: .*gone\.toml cannot be read"):
        read_subscriptions(tmp_path / "gone.toml", CHANNELS)
