"""One JSON line for each request: when, what, which version, how many tokens, how it ended. No prompt, answer or key.

Every request gets an id, which the answer has in the header `x-request-id`. A client may give the id in this header.

Not covered: connections that slm/serving/connections.py refuses. They never become a request.
"""

import json
import logging
import logging.handlers
import re
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from slm.base import console
from slm.base.errors import BadInput

ID_HEADER = "x-request-id"
CLIENTS_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
PATH_CHARACTERS = 200


@dataclass(eq=False)
class Record:
    """One request. The endpoint fills in what the access log and the traces tell about the request."""

    id: str
    began: float = field(default_factory=time.time)  # seconds since 1970
    started: float = field(default_factory=time.perf_counter)
    body: bytes = b""
    status: int = 500
    version: str = ""  # name/version of the model that answers
    rows: list[Any] = field(default_factory=list)  # the texts that are generated
    finish_reasons: list[str] = field(default_factory=list)
    outcome: str = ""  # as slm_requests_total counts the request

    def prompt_tokens(self) -> int:
        return sum({id(row.prompt): len(row.prompt) for row in self.rows}.values())

    def output_tokens(self) -> int:
        return sum(len(row.output) for row in self.rows)

    def finish_reason(self) -> str | None:
        """How the answers ended: stop, length or tool_calls. Without a whole answer: timeout, cancelled or error."""
        if self.outcome not in ("", "ok"):
            return self.outcome
        reasons = self.finish_reasons or [row.finish_reason for row in self.rows]
        return ",".join(sorted(set(filter(None, reasons)))) or None


class AccessLog:
    """Where the lines go: `stderr`, or a file, which is opened anew after it was moved away."""

    def __init__(self, place: str):
        """
        Raises:
            BadInput: the file can't be opened.
        """
        self._lost, self._said = 0, False
        try:
            self._handler: logging.Handler = (
                logging.StreamHandler(sys.stderr)
                if place == "stderr"
                else logging.handlers.WatchedFileHandler(place, encoding="utf-8")
            )
        except OSError as error:
            raise BadInput(f"access_log: {place} can't be written: {error.strerror or error}") from None
        self._handler.handleError = self._fail  # type: ignore[method-assign]

    def write(self, scope: dict, record: Record, seconds: float) -> None:
        """Writes a line. A full disk costs the line, and not the request."""
        began = datetime.fromtimestamp(record.began, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": began.replace("+00:00", "Z"),
            "request_id": record.id,
            "method": scope["method"],
            "path": scope["path"][:PATH_CHARACTERS],
            "status": record.status,
            "seconds": round(seconds, 4),
            "version": record.version or None,
            "prompt_tokens": record.prompt_tokens() if record.rows else None,
            "output_tokens": record.output_tokens() if record.rows else None,
            "finish_reason": record.finish_reason(),
        }
        lost = self._lost
        try:
            self._handler.handle(logging.makeLogRecord({"msg": json.dumps(line, ensure_ascii=True)}))
        except OSError:
            self._fail()
        self._said = self._said and self._lost > lost  # a later failure is another one

    def _fail(self, record: logging.LogRecord | None = None) -> None:
        self._lost += 1
        if not self._said:
            self._said = True
            console.err.print(f"warning: access_log: {sys.exc_info()[1]}; its lines are lost", markup=False)


class Observed:
    """ASGI middleware: gives each request its Record as `request.state.record`, and writes its line at the end."""

    def __init__(self, app, log: AccessLog | None = None):
        self.app, self.log = app, log

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(ID_HEADER.encode(), b"").decode("latin-1")
        record = Record(given if CLIENTS_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}")
        scope.setdefault("state", {})["record"] = record

        async def observed(message):
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", ()), (ID_HEADER.encode(), record.id.encode())]
                message = message | {"headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            if self.log is not None:
                self.log.write(scope, record, time.perf_counter() - record.started)
