"""What a line of the log looks like: text for people, or JSON for programs. Standard library only.

While a request of the server is handled, `request_id` has its id, and every line that is written then carries it.
"""

import contextvars
import json
import logging
import os
from datetime import UTC, datetime
from typing import Literal

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)

REPLICA = "QJAX_REPLICA"  # of the environment: which replica of a server this process is
TEXT = "%(asctime)s %(levelname)s %(message)s"
# What every record has; the rest came in by `extra` and is part of the line as JSON.
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class TextFormatter(logging.Formatter):
    """`2026-11-23 12:22:34,804 INFO the message [the id of the request]`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line, id = super().formatMessage(record), request_id.get()
        return line if id is None or id in line else f"{line} [{id}]"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, request_id, exception, and the fields that
    were given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "replica": os.environ.get(REPLICA),
            "request_id": request_id.get(),
            **{name: value for name, value in vars(record).items() if name not in _KNOWN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line = {name: value for name, value in line.items() if value is not None}
        return json.dumps(line, ensure_ascii=False, default=str)


def set_format(form: Literal["text", "json"]) -> None:
    """Of all lines from now on."""
    replica = os.environ.get(REPLICA)
    text = TEXT if replica is None else TEXT.replace("%(message)s", f"[replica {replica}] %(message)s")
    formatter = JsonFormatter() if form == "json" else TextFormatter(text)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
