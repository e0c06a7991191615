"""Front door: settings, then the shared rooms, then one blueprint a domain. No logic."""

import os

import azure.functions as func

import alerts.functions
import alerts.wiring
import content.functions
import content.wiring
import shared.functions
import shared.market.functions
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
app.register_functions(shared.market.functions.blueprint(core.market, core.supply, api))
app.register_functions(signals.functions.blueprint(signals.wiring.wire(core), api))
app.register_functions(alerts.functions.blueprint(alerts.wiring.wire(core), api))
app.register_functions(content.functions.blueprint(content.wiring.wire(core), api))
