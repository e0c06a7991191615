"""Front door: settings, then the shared rooms, then one blueprint a domain. No logic."""

import os

import azure.functions as func

import alerts.canary
import alerts.functions
import alerts.rules_functions
import alerts.wiring
import content.functions
import content.wiring
import shared.functions
import shared.market.functions
import shared.market.hook_functions
import signals.backtest_functions
import signals.functions
import signals.wiring
from alerts.rules_functions import RulesWired
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
api = Api(core.tokens, core.limits)

app = func.FunctionApp(http_auth_level=func.AuthLevel.FUNCTION)
alerting, signalling = alerts.wiring.wire(core), signals.wiring.wire(core)
app.register_functions(
    shared.functions.blueprint(core, api, blobs=core.dead_letter_blobs, canary=alerting.canary.health)
)
app.register_functions(alerts.canary.blueprint(alerting.canary, core.dead_letters))
app.register_functions(shared.market.functions.blueprint(core.market, api))
app.register_functions(shared.market.functions.supply_blueprint(core.supply, core.finnhub_hook, api))
app.register_functions(
    shared.market.hook_functions.blueprint(core.finnhub_hook, core.market.ingest, core.dead_letters, api)
)
app.register_functions(signals.functions.blueprint(signalling, api))
app.register_functions(signals.backtest_functions.blueprint(signalling.backtests, signalling.dead_letters, api))
app.register_functions(alerts.functions.blueprint(alerting, api))
app.register_functions(alerts.rules_functions.blueprint(RulesWired(rules=alerting.rules), api))
app.register_functions(content.functions.blueprint(content.wiring.wire(core), api))
