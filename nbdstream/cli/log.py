# SPDX-License-Identifier: Apache-2.0
"""The log for machines: a JSON object a line on stderr, or systemd's journal with native fields.

Beside messages it has one entry for each event that matters (`log_event`), with the names and
data that QMP's events have on the control socket. Among the messages for people they are shown
with ``-v``.
"""

import json
import logging
import re
import socket
import struct
import time
from collections.abc import Mapping

from nbdstream.errors import UsageError
from nbdstream.text import redacted_text

JOURNAL = "/run/systemd/journal/socket"
# A datagram has an end; what is longer is cut.
MESSAGE_MOST = 32 << 10
# syslog(3)
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}
_DEBUG = 7

_events = logging.getLogger("nbdstream.events")


def log_event(name: str, data: Mapping[str, object]) -> None:
    """Log an event, with data that JSON has a form for."""
    facts = ", ".join(f"{key} {value}" for key, value in data.items())
    _events.info("%s: %s", name, facts, extra={"event": name, "data": data})


def machine_handler(log_format: str) -> logging.Handler:
    """A handler for "json" or "journal", which gets all events. Raises UsageError if there is no
    journal."""
    _events.setLevel(logging.INFO)
    if log_format == "journal":
        return JournalHandler()
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    return handler


class JsonFormatter(logging.Formatter):
    """A record as a line of JSON: ``time``, ``level``, ``logger``, ``message``, and of an event
    ``event`` and ``data``; ``traceback`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redacted_text(record.getMessage()),
        }
        if event := getattr(record, "event", None):
            entry |= {"event": event, "data": record.__dict__["data"]}
        if record.exc_info:
            entry["traceback"] = redacted_text(self.formatException(record.exc_info))
        return redacted_text(json.dumps(entry))


class JournalHandler(logging.Handler):
    """Sends records to systemd-journald by its native protocol (systemd's JOURNAL_NATIVE_PROTOCOL).

    Fields: ``MESSAGE``, ``PRIORITY``, ``SYSLOG_IDENTIFIER``, ``NBDSTREAM_LOGGER``; of an event
    ``NBDSTREAM_EVENT`` and one for each of its data, such as ``NBDSTREAM_STATUS``; a traceback is a
    part of the message.
    """

    def __init__(self) -> None:
        """Raises UsageError if there is no journal."""
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(JOURNAL)
        except OSError as error:
            self._socket.close()
            raise UsageError(
                f"--log-format journal: no journal at {JOURNAL} ({error.strerror})"
            ) from error
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._socket.send(journal_entry(record))
        except OSError:
            pass  # a full or dead journal does not hold up guests; there is no other place

    def close(self) -> None:
        self._socket.close()
        super().close()


def journal_entry(record: logging.LogRecord) -> bytes:
    """A record as a datagram."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + logging.Formatter().formatException(record.exc_info)
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(_PRIORITIES.get(record.levelno, _DEBUG)),
        "SYSLOG_IDENTIFIER": "nbdstream",
        "NBDSTREAM_LOGGER": record.name,
    }
    if event := getattr(record, "event", None):
        fields["NBDSTREAM_EVENT"] = event
        for key, value in record.__dict__["data"].items():
            text = value if isinstance(value, str) else json.dumps(value)
            fields["NBDSTREAM_" + re.sub("[^A-Z0-9]", "_", key.upper())] = text
    return b"".join(_field(name, redacted_text(text)) for name, text in fields.items())


def _field(name: str, text: str) -> bytes:
    """With its length before it, so that line breaks in it end nothing."""
    value = text.encode(errors="backslashreplace")[:MESSAGE_MOST]
    return name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
