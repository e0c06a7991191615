import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from shared.errors import ConfigurationError
from shared.settings import Settings
from shared.wiring import wire_core

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = json.loads((ROOT / "local.settings.example.json").read_text())
HOSTS_OWN = {"FUNCTIONS_WORKER_RUNTIME", "AzureWebJobsStorage"}
NEEDED = {
    "EVENT_GRID_TOPIC_ENDPOINT": "http://127.0.0.1:1/topic",
    "AZURE_SIGNALR_CONNECTION_STRING": "Endpoint=http://127.0.0.1;AccessKey=CANARY-signalr;",
    "DISCORD_WEBHOOK_URL": "http://127.0.0.1:1/api/webhooks/1/CANARY-discord",
    "ALPHA_VANTAGE_KEY": "CANARY-alpha",
    "FINNHUB_KEY": "CANARY-finnhub",
}


def settings(**given: str) -> Settings:
    return Settings.from_env({**NEEDED, **given})


def test_example_shows_every_setting_and_no_other():
    """A setting the app reads is one a newcomer can see, and one he can see is one the app reads."""
    fields = {name.upper() for name in Settings.model_fields}

    assert set(EXAMPLE["Values"]) - HOSTS_OWN == fields


def test_example_works_as_it_is():
    """Copying the example is a start."""
    read = Settings.from_env(EXAMPLE["Values"])

    assert read.market_data_delay_seconds == 900
    assert read.live_from_instant() is None


def test_example_shows_the_defaults():
    """What the example says of a setting that has a default is that default, so leaving it out changes nothing."""
    read = Settings.from_env(EXAMPLE["Values"])
    different = [
        name
        for name, field in Settings.model_fields.items()
        if not field.is_required()
        and not isinstance(field.default, SecretStr)
        and not name.endswith("_file")
        and getattr(read, name) != field.default
    ]

    assert different == []
    for name in ("watchlist_file", "entries_file", "subscriptions_file"):
        assert (ROOT / getattr(read, name)).resolve() == Path(Settings.model_fields[name].default)


def test_nothing_but_the_needed_is_needed():
    """Every other setting has a default; an empty or blank value counts as not set."""
    assert settings() == settings(LOG_LEVEL="", MARKET_CLOCK="  ", MARKET_DATA_DELAY_SECONDS=" ", SOMETHING="else")


def test_all_that_is_missing_is_named_at_once():
    """A newcomer corrects one list, not one error after the other."""
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_env({"FINNHUB_KEY": "  "})

    for name in NEEDED:
        assert f"{name} is not set" in str(caught.value)
    assert "local.settings.example.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MARKET_DATA_DELAY_SECONDS", "CANARY"),
        ("MARKET_DATA_DELAY_SECONDS", "-1234567"),
        ("ALERTS_LEASE_SECONDS", "0.1234567"),
        ("CONTENT_DIGEST_SETTLE_SECONDS", "-1234567"),
        ("ALPHA_VANTAGE_PLAN", "CANARY"),
        ("FINNHUB_PLAN", "CANARY"),
        ("LOG_LEVEL", "CANARY"),
        ("MARKET_CLOCK", "CANARY"),
        ("MARKET_CLOCK", "CANARY@CANARY*1"),
        ("LIVE_FROM", "CANARY"),
        ("LIVE_FROM", "1234567"),
    ],
)
def test_wrong_value_is_named_and_never_shown(name, value):
    """Settings are pasted by people, who sometimes paste a key into the wrong place."""
    with pytest.raises(ConfigurationError) as caught:
        settings(**{name: value})

    assert name in str(caught.value)
    assert value not in str(caught.value)
    assert caught.value.__cause__ is None or caught.value.__cause__.__class__ is ValueError


@pytest.mark.parametrize(
    ("name", "value"), [("DOCUMENTS_URL", "cosmos:AccountKey=CANARY"), ("DOCUMENTS_URL", "sqlite:")]
)
def test_storage_that_is_none_is_named_and_never_shown(name, value):
    """An address of storage may hold its key."""
    with pytest.raises(ConfigurationError, match=f"{name} names no storage: write sqlite:FILE") as caught:
        wire_core(settings(**{name: value}))

    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("value", ["yahoo", "alpha_vantage,yahoo", ","])
def test_unknown_provider_is_answered_with_the_known(value):
    """Who misspells a provider sees which there are."""
    with pytest.raises(ConfigurationError, match=r"MARKET_PROVIDERS.*alpha_vantage, finnhub"):
        wire_core(settings(MARKET_PROVIDERS=value))


def test_secrets_are_shown_nowhere():
    """Neither repr nor a dump of the settings shows what must not be seen, and the guard is told all of it."""
    read = settings(EVENT_GRID_TOPIC_KEY="CANARY-topic", APPLICATIONINSIGHTS_CONNECTION_STRING="CANARY-insights")

    assert "CANARY" not in f"{read!r} {read} {read.model_dump()} {read.model_dump_json()}"
    shown = {name: getattr(read, name) for name in Settings.model_fields}
    hidden = {value.get_secret_value() for value in shown.values() if isinstance(value, SecretStr)} - {""}
    assert sum("CANARY" in secret for secret in hidden) == 6
    assert hidden <= set(read.secrets())
    assert "" not in settings().secrets()


def test_secret_inside_a_setting_is_one_of_its_own():
    """The key of a connection string and the token of a webhook must not be seen alone either."""
    read = settings(
        APPLICATIONINSIGHTS_CONNECTION_STRING="InstrumentationKey=CANARY-insights;IngestionEndpoint=https://i"
    )

    assert {"CANARY-signalr", "CANARY-discord", "CANARY-insights"} <= set(read.secrets())


def test_blanks_around_a_value_do_no_harm():
    """A value copied with a blank or a newline is the value."""
    assert settings(PUBLIC_URL=" http://here\n", MARKET_DATA_DELAY_SECONDS=" 5 ").public_url == "http://here"


def test_wiring_touches_nothing(tmp_path, monkeypatch):
    """The app is built before the host has a network: only first use opens a file."""
    monkeypatch.chdir(tmp_path)

    core = wire_core(settings(DOCUMENTS_URL=f"sqlite:{tmp_path}/new/app.db"))

    assert not (tmp_path / "new").exists()
    assert core.market_clock.now().tzinfo is not None
