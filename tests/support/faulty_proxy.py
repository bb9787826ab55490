"""A proxy in front of a real tracking server that does to requests what networks, servers and operators do.

A fault is (method, part of the path, which of the requests that match) and an action: a status to answer with, a dict
(status 400 with this JSON, as MLflow tells its own errors), "cut" (the connection is closed unanswered), a float (so
many seconds pass first), or a function, which is called before the request is passed on, or has what it returns done to
it.
"""

import http.client
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ALWAYS = range(10**9)


@dataclass
class Fault:
    method: str
    path: str
    which: range
    action: int | dict | float | str | Callable[[], int | str | None]
    seen: int = 0


@dataclass
class Faults:
    uri: str = ""
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, action, method: str = "", path: str = "/", which: range = ALWAYS) -> None:
        self.faults.append(Fault(method, path, which, action))

    def of(self, method: str, path: str):
        """The action for a request, None where it is to be passed on."""
        with self.lock:
            self.asked.append(f"{method} {path}")
            for fault in self.faults:
                if method.startswith(fault.method) and fault.path in path:
                    fault.seen += 1
                    if fault.seen - 1 in fault.which:
                        return fault.action
        return None


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def pass_on(self):
        body = self.read_body()
        action = self.server.faults.of(self.command, self.path)
        if callable(action):
            action = action()
        if isinstance(action, float):
            time.sleep(action)
        elif action == "cut":
            self.close_connection = True
            return
        elif isinstance(action, int):
            self.answer(action, [("Content-Type", "text/plain")], b"the proxy says so")
            return
        elif isinstance(action, dict):
            self.answer(400, [("Content-Type", "application/json")], json.dumps(action).encode())
            return
        upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding",)}
        upstream.request(self.command, self.path, body or None, kept | ({"Content-Length": len(body)} if body else {}))
        answer = upstream.getresponse()
        content = answer.read()
        self.answer(answer.status, answer.getheaders(), content)
        upstream.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = pass_on

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes):
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def in_front_of(uri: str):
    """A proxy on loopback; gives its Faults, which are the tests' to add to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    server.target, server.faults = urlsplit(uri).netloc, Faults(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.faults
    finally:
        server.shutdown()
        server.server_close()
