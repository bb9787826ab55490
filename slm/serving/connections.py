"""Guards a server's sockets against clients that connect and then send nothing, or read nothing.

uvicorn waits forever for a request's headers. It accepts connections until the process has no descriptor left.
`Guarded` is uvicorn's own protocol over h11 with three bounds, for `uvicorn.Config(http=Guarded)`:
- A request's headers must be complete within HEADER_SECONDS from the connection, or from their first byte. A connection
  that waits for its next request is closed after KEEP_ALIVE_SECONDS, by uvicorn. Clients' pools let go earlier than
  that, so they never send a request into a connection that is being closed.
- A client that reads nothing of its answer for READER_SECONDS loses its connection.
- At most `most_connections()` connections are served. A further connection closes the connection that has waited
  longest for its client. If no connection waits for its client, ROOM further connections are accepted. They get
  /health as usual, and 503 for any other path.

Not covered: bodies that arrive slowly (slm/serving/http_app.py has a limit), and fairness between addresses.
"""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from slm.serving.protocol import ApiError

HEADER_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 75  # as nginx has it; uvicorn's 5 are those of httpx's pool too
READER_SECONDS = 30.0
MOST_CONNECTIONS = 512
ROOM = 16  # connections beyond the limit, so that a probe gets an answer
PROBES = ("/health", "/ready")


def most_connections() -> int:
    """Half of the descriptors that this process may open, MOST_CONNECTIONS at most.

    The other half is for files and for bursts.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return MOST_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, soft // 2))


class Guarded(H11Protocol):
    """One connection. `server_state.connections` has all of them."""

    since = 0.0  # loop time of the connection, or of its last answer
    _headers_due = None  # timers
    _reading_due = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing is called as soon as a client doesn't read
        self._wait_for_headers()
        others = [other for other in self.connections if other is not self and not other.transport.is_closing()]
        if len(others) < most_connections():
            return
        unfinished = [other for other in others if isinstance(other, Guarded) and other.awaits_client()]
        if unfinished:
            min(unfinished, key=lambda other: other.since).transport.abort()
        elif len(others) < most_connections() + ROOM:
            self.app = _probe_only(self.app)
        else:
            transport.abort()

    def connection_lost(self, exc) -> None:
        _cancel(self._headers_due, self._reading_due)
        super().connection_lost(exc)

    def awaits_client(self) -> bool:
        """Whether the server waits for the client: for a request, or for the rest of a request."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        if self._headers_due is None and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_headers()
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._have_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else the next request is already here
            self._have_headers()
            self.since = self.loop.time()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._reading_due)

    def _wait_for_headers(self) -> None:
        _cancel(self._headers_due)
        self.since = self.loop.time()
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self._without_headers)

    def _have_headers(self) -> None:
        _cancel(self._headers_due)
        self._headers_due = None

    def _without_headers(self) -> None:
        if self.transport.get_write_buffer_size():  # the last answer is still being read
            self._wait_for_headers()
            return
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            head = h11.Response(status_code=408, headers=[("connection", "close"), ("content-length", "0")])
            self.transport.write(self.conn.send(head) + self.conn.send(h11.EndOfMessage()))
        self.transport.close()

    def _wait_for_reader(self) -> None:
        _cancel(self._reading_due)
        unread = self.transport.get_write_buffer_size()
        self._reading_due = self.loop.call_later(READER_SECONDS, self._without_reader, unread)

    def _without_reader(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:  # the client is slow, but still reads
            self._wait_for_reader()
        else:
            self.transport.abort()


def _probe_only(app):
    """The application for a connection beyond the limit: it answers PROBES, and 503 for any other path."""

    async def answer(scope, receive, send):
        if scope["path"] in PROBES:
            return await app(scope, receive, send)
        full = ApiError(503, "too many connections are open; try again later", "server_error", code="overloaded")
        response = full.response()
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    return answer


def _cancel(*timers) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
