"""Front door: settings, then the shared rooms, then one blueprint a domain. No logic."""

import os

import azure.functions as func

import alerts.functions
import alerts.wiring
import content.functions
import content.wiring
import shared.functions
import shared.market.functions
import shared.market.hook_functions
import signals.backtest_functions
import signals.functions
import signals.wiring
from shared import telemetry
from shared.http import Api
from shared.settings import Settings
from shared.wiring import wire_core

settings = Settings.from_env(os.environ)
telemetry.configure(
    connection_string=settings.applicationinsights_connection_string.get_secret_value(),
    level=settings.log_level,
    secrets=settings.secrets(),
)
core = wire_core(settings)
api = Api()

app = func.FunctionApp(http_auth_level=func.AuthLevel.FUNCTION)
app.register_functions(shared.functions.blueprint(core, api))
app.register_functions(shared.market.functions.blueprint(core.market, api))
app.register_functions(shared.market.functions.supply_blueprint(core.supply, core.finnhub_hook, api))
app.register_functions(
    shared.market.hook_functions.blueprint(core.finnhub_hook, core.market.ingest, core.dead_letters, api)
)
wired = signals.wiring.wire(core)
app.register_functions(signals.functions.blueprint(wired, api))
app.register_functions(signals.backtest_functions.blueprint(wired.backtests, wired.dead_letters, api))
app.register_functions(alerts.functions.blueprint(alerts.wiring.wire(core), api))
app.register_functions(content.functions.blueprint(content.wiring.wire(core), api))
