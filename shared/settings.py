"""The environment, read once, typed. Every field is the setting of the same name in capitals."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeInt, PositiveInt, SecretStr, ValidationError

from shared.clock import MarketTime, parse_instant
from shared.errors import ConfigurationError
from shared.sealing import parse_keys

ROOT = Path(__file__).resolve().parent.parent

type Plan = Literal["free", "premium", "unlimited"]
type _Text = Annotated[str, BeforeValidator(lambda v: v.strip() if isinstance(v, str) else v)]


class Settings(BaseModel):
    """
    What an operator may set. Schedules are NCRONTAB and are read by the host too, as ``%NAME%``.

    A field without a default must be set; an empty value counts as not set.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    # where things are kept: sqlite:FILE, or cosmos:ENDPOINT?database=NAME (the key is for emulators only)
    documents_url: _Text = "sqlite:.troop/app.db"
    cosmos_key: SecretStr = SecretStr("")
    public_url: _Text = "http://127.0.0.1:7071"

    # the two clocks
    market_clock: str = ""
    live_from: str = ""

    # neighbours
    event_grid_topic_endpoint: _Text
    event_grid_topic_key: SecretStr = SecretStr("")
    azure_signalr_connection_string: SecretStr
    discord_webhook_url: SecretStr
    applicationinsights_connection_string: SecretStr = SecretStr("")

    # providers, in order of preference
    market_providers: _Text = "alpha_vantage,finnhub,twelve_data,polygon"
    market_data_delay_seconds: NonNegativeInt = 900
    alpha_vantage_url: _Text = "https://www.alphavantage.co"
    alpha_vantage_key: SecretStr
    alpha_vantage_plan: Plan = "free"
    finnhub_url: _Text = "https://finnhub.io/api/v1"
    finnhub_key: SecretStr
    finnhub_plan: Plan = "free"
    finnhub_webhook_secret: SecretStr = SecretStr("")
    twelve_data_url: _Text = "https://api.twelvedata.com"
    twelve_data_key: SecretStr = SecretStr("")
    twelve_data_plan: Plan = "free"
    polygon_url: _Text = "https://api.massive.com"
    polygon_key: SecretStr = SecretStr("")
    polygon_plan: Plan = "free"

    # whose access tokens sign people in, whom they must be meant for, and where the issuer lists its keys
    oidc_issuer: _Text = ""
    oidc_audience: _Text = ""
    oidc_jwks_url: _Text = ""
    # how many calls one client may make a minute, counted by each instance; 0 is no limit
    api_rate_per_minute: NonNegativeInt = 600

    # e-mail: smtp://user:password@host:587 (STARTTLS) or smtps://…; empty: there is no such channel
    smtp_url: SecretStr = SecretStr("")
    email_from: _Text = "TROOP <troop@localhost>"
    # what signs the links that end a subscription; empty: drawn from the first of ENDPOINT_KEYS
    unsubscribe_key: SecretStr = SecretStr("")

    # what people configure in files
    watchlist_file: _Text = str(ROOT / "shared/market/watchlist.toml")
    entries_file: _Text = str(ROOT / "signals/entries.toml")
    subscriptions_file: _Text = str(ROOT / "alerts/subscriptions.toml")

    # when timers fire
    market_quotes_schedule: _Text = "*/30 * * * * *"
    market_fetches_schedule: _Text = "*/15 * * * * *"
    market_prefetch_schedule: _Text = "*/30 * * * * *"
    signals_ingest_schedule: _Text = "*/15 * * * * *"
    signals_sweep_schedule: _Text = "*/30 * * * * *"
    alerts_sweep_schedule: _Text = "*/15 * * * * *"
    content_digest_schedule: _Text = "*/30 * * * * *"
    content_sweep_schedule: _Text = "*/30 * * * * *"
    system_sweep_schedule: _Text = "0 */10 * * * *"
    canary_schedule: _Text = "0 */5 * * * *"
    system_deadlettered_schedule: _Text = "30 * * * * *"

    # what addresses of subscribers are sealed with at rest: id1:base64,id2:base64; the first seals, all open
    endpoint_keys: SecretStr = SecretStr("")

    # the container that Event Grid's dead letters lie in (https://ACCOUNT.blob.core.windows.net/CONTAINER); empty: none
    dead_letters_url: _Text = ""
    # whom to call whenever the canary arrives; empty: nobody
    canary_url: SecretStr = SecretStr("")

    # how long a claimed delivery belongs to its instance; an attempt may take half of it
    alerts_lease_seconds: PositiveInt = 30

    # how long alerts, their deliveries and posts are kept
    retention_days: PositiveInt = 730

    # whether each entry is tried on the whole of a series when its history comes in or is corrected
    backtest_on_history: bool = True

    # how long the signals of a closed session may take to arrive before its digest is written
    content_digest_settle_seconds: NonNegativeInt = 60

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """
        Read the settings.

        Raises:
            ConfigurationError: names every missing or wrong setting and says what to do; shows no value.

        """
        given = {name: env[name.upper()] for name in cls.model_fields if env.get(name.upper(), "").strip()}
        try:
            settings = cls.model_validate(given)
        except ValidationError as e:
            raise ConfigurationError(_explain(e)) from None
        settings.market_time()
        settings.live_from_instant()
        parse_keys(settings.endpoint_keys.get_secret_value())
        return settings

    def market_time(self) -> MarketTime | None:
        """How market time runs; None when it is the wall's."""
        return MarketTime.parse(self.market_clock) if self.market_clock else None

    def live_from_instant(self) -> datetime | None:
        """The market instant from which configured series are live; None for when they are first seen."""
        try:
            return parse_instant(self.live_from) if self.live_from else None
        except ValueError as e:
            raise ConfigurationError("LIVE_FROM is no instant with a zone: write 2012-03-01T00:00:00Z") from e

    @staticmethod
    def file(path: str) -> Path:
        """Where a file named in a setting lies: relative to the app, unless it says otherwise."""
        return ROOT / path

    def secrets(self) -> list[str]:
        """Every secret value that is set, and the secret part of those that are more: what is never shown."""
        whole = [
            value.get_secret_value()
            for name in type(self).model_fields
            if isinstance(value := getattr(self, name), SecretStr) and value.get_secret_value()
        ]
        parts = [
            part.partition("=")[2]
            for text in whole
            for part in text.split(";")
            if part.lower().startswith(("accesskey=", "instrumentationkey="))
        ]
        passwords = [unquote(urlsplit(url).password or "") for url in whole if url.startswith("smtp")]
        parts += [password for password in passwords if password]
        return [*whole, *parts, *(url.rstrip("/").rpartition("/")[2] for url in whole if "/webhooks/" in url)]


def _explain(e: ValidationError) -> str:
    lines = []
    for error in e.errors(include_input=False, include_url=False, include_context=False):
        name = str(error["loc"][0]).upper()
        trouble = "is not set" if error["type"] == "missing" else f"is wrong: {error['msg']}"
        lines.append(f"{name} {trouble}")
    return (
        "; ".join(lines)
        + ". Set it in the environment or in local.settings.json (local.settings.example.json shows every setting)."
    )
