"""Structured logs: one JSON object a line. What a program may look for has a key of its own."""

import json
import logging
import time
from typing import Final

FIELDS: Final = ("job", "attempt", "state", "reason", "duration", "wait", "holder")
"""Keys of their own, given as `extra`: the FineTuneJob as namespace/name, its attempt, its state and the reason of it;
durations and waits in seconds; who holds the Lease."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, severity, logger and message, its own fields, and the traceback where there is one."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
