"""What the host's terminal shows of the log: the name of what happened, then its fields."""

import logging
from collections.abc import Mapping

# What every record has anyway; the rest came in as `extra`.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# The app's own fields stand in its messages already.
_IN_TEXT = "troop."
# At INFO these log every request of a telemetry export, whose lines are then exported too.
_CHATTY = ("azure", "azure.functions", "httpx", "httpcore", "aiohttp.access", "opentelemetry")


class FieldsFormatter(logging.Formatter):
    """Appends the fields of `extra` to the line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        line = super().formatMessage(record)
        fields = (f"{k}={v}" for k, v in record.__dict__.items() if k not in _STANDARD and not k.startswith(_IN_TEXT))
        return " ".join([line, *fields])


def configure_logging(env: Mapping[str, str]) -> None:
    """Log to stderr from TROOP_LOG_LEVEL (INFO) up, unless somebody has configured logging."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(FieldsFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        root.addHandler(handler)
    level = logging.getLevelNamesMapping().get(env.get("TROOP_LOG_LEVEL", "INFO").upper())
    root.setLevel(logging.INFO if level is None else level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
