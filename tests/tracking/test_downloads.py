"""Downloads from servers that are careless or hostile, on loopback."""

import gzip
import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from support.commands import entry_point

from slm.base import parameters
from slm.base.errors import BadInput, Unavailable
from slm.engines import local
from slm.prompts import readers
from slm.tracking import downloads

ROW = b'{"id": "a", "prompt": "2+2?"}\n'
MIB = 2**20
SENT = 700  # MiB that a hostile server sends, where nobody stops it


class Hostile(BaseHTTPRequestHandler):
    """A web server and a tracking server in one; what it does is said by the path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urlsplit(self.path).path
        name = unquote(path).rpartition("/")[2]
        self.server.asked.append(self.path)
        self.server.credentials.append(self.headers.get("Authorization"))
        with suppress(ConnectionError):
            if path.endswith("/mlflow/runs/get"):
                info = {"run_id": "1", "artifact_uri": "mlflow-artifacts:/", "lifecycle_stage": "active"}
                self.answer({}, json.dumps({"run": {"info": info | {"status": "FINISHED", "experiment_id": "0"}}}))
            elif path.endswith("/mlflow-artifacts/artifacts"):
                many = "many" in self.path.partition("?")[2]
                files = [{"path": f"{number}.bin", "is_dir": False, "file_size": 1} for number in range(500 * many)]
                self.answer({}, json.dumps({"files": files}))
            elif name == "endless.jsonl":
                self.stream({"Transfer-Encoding": "chunked"}, b"100000\r\n%b\r\n" % bytes(MIB))
            elif name == "long.jsonl":
                self.stream({"Content-Length": SENT * MIB}, bytes(MIB))
            elif name == "bomb.jsonl":
                self.answer({"Content-Encoding": "gzip"}, gzip.compress(bytes(SENT * MIB), 1))
            elif name.endswith(".bin"):
                self.answer({}, bytes(MIB))
            elif name == "slow.jsonl":
                self.stream({"Content-Length": 200}, b" ", 0.05, 200)
            elif name == "set.jsonl":
                self.answer({}, ROW)
            elif name in ("moved.jsonl", "circle.jsonl", "inside.jsonl"):
                to = {"moved": "/files/set.jsonl", "circle": self.path, "inside": "file:///etc/passwd"}[name[:-6]]
                self.answer({"Location": to}, b"", 302)
            else:
                self.answer({}, b"no", 503 if "down" in name else 404)

    def stream(self, headers, part, pause=0.0, times=SENT):
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        for _ in range(times):
            self.wfile.write(part)
            self.server.sent += len(part)
            time.sleep(pause)
        self.close_connection = True

    def answer(self, headers, body, status=200):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for key, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hostile(monkeypatch, tmp_path):
    """The server's address; it is the tracking server as well, and temporary files go to tmp_path/tmp."""
    import tempfile

    import mlflow

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.daemon_threads, server.sent, server.asked, server.credentials = True, 0, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.uri = f"http://127.0.0.1:{server.server_port}"
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    mlflow.set_tracking_uri(server.uri)
    yield server
    mlflow.set_tracking_uri(None)
    server.shutdown()
    server.server_close()


def read(uri: str):
    return local.read_prompts(parameters.parse("evaluate", "", [f"--prompts={uri}"]))


HOSTILE = {
    "a web server that sends without an end": "{}/endless.jsonl",
    "a web server that announces 700 MiB": "{}/long.jsonl",
    "a web server's gzip bomb": "{}/bomb.jsonl",
    "a tracking server that sends without an end": "mlflow-artifacts:/endless.jsonl",
    "a tracking server that announces 700 MiB": "runs:/0123456789abcdef0123456789abcdef/long.jsonl",
    "a tracking server's gzip bomb": "mlflow-artifacts:/bomb.jsonl",
    "a tracking server's folder of 500 files": "mlflow-artifacts:/many",
}


@pytest.mark.fault("downloads: another server's address in the form of the tracking server's artifacts")
def test_the_tracking_servers_credentials_go_to_no_other_server(hostile, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sesame")
    artifact = "/api/2.0/mlflow-artifacts/artifacts/set.jsonl"
    other = hostile.uri.replace("127.0.0.1", "localhost")
    assert len(read(f"{other}{artifact}").prompts) == 1
    assert hostile.asked == [artifact] and hostile.credentials == [None]  # nothing was listed either


def test_a_web_address_may_have_a_scheme_in_capitals(hostile):
    assert len(read(f"HTTP{hostile.uri.removeprefix('http')}/set.jsonl").prompts) == 1


@pytest.mark.parametrize(
    "uri", [pytest.param(uri, id=what, marks=pytest.mark.fault(f"downloads: {what}")) for what, uri in HOSTILE.items()]
)
def test_a_download_stops_at_the_limit_and_nothing_is_left(hostile, tmp_path, uri):
    uri, most, done = uri.format(hostile.uri), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.02):
            most = max(most, downloads._size(tmp_path / "tmp"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(BadInput) as caught:
            read(uri)
    finally:
        done.set()
        watcher.join()
    assert str(caught.value) == f"{uri}: is larger than 64 MiB; split it"
    assert most < 3 * readers.FILE_BYTES
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.fault("downloads: a plain web address, and one that has moved")
@pytest.mark.parametrize("path", ["set.jsonl", "files/set.jsonl?version=2#x", "moved.jsonl", "a%2Fset.jsonl"])
def test_a_web_address_is_read_by_its_suffix_and_the_copy_is_removed(hostile, tmp_path, path):
    found = read(f"{hostile.uri}/{path}")
    assert [prompt.prompt for prompt in found.prompts] == ["2+2?"]
    assert (found.source, found.name) == (f"{hostile.uri}/{path}", "moved" if "moved" in path else "set")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.fault("downloads: the copy of a prompt set stays behind")
@pytest.mark.parametrize("uri", ["mlflow-artifacts:/set.jsonl", "runs:/0123456789abcdef0123456789abcdef/set.jsonl"])
def test_the_copy_of_a_prompt_set_is_removed_once_it_is_read(hostile, tmp_path, uri):
    assert [prompt.prompt for prompt in read(uri).prompts] == ["2+2?"]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.fault("downloads: redirects in a circle and to a file, errors of a web server")
@pytest.mark.parametrize(
    ("path", "kind", "line"),
    [
        ("circle.jsonl", BadInput, "it redirects more than 5 times"),
        ("inside.jsonl", BadInput, "it redirects to something other than a web address"),
        ("none.jsonl", BadInput, "the server answers 404 Not Found"),
        ("down.jsonl", Unavailable, "the server answers 503 Service Unavailable"),
    ],
)
def test_a_web_address_that_leads_nowhere_is_one_line(hostile, tmp_path, path, kind, line):
    with pytest.raises(kind) as caught:
        read(f"{hostile.uri}/{path}")
    said = str(caught.value)
    assert said.startswith(f"{hostile.uri}/{path} can't be downloaded: {line}") and "\n" not in said
    assert len(hostile.asked) <= 7
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.fault("downloads: a server that sends a byte now and then")
def test_a_download_that_takes_too_long_is_ended(hostile, tmp_path):
    with (
        pytest.raises(Unavailable, match="it takes too long"),
        downloads.file(f"{hostile.uri}/slow.jsonl", seconds=1),
    ):
        raise AssertionError("it was read")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.fault("downloads: a refused set on the command line, exit 2 and one line")
def test_on_the_command_line_a_set_without_an_end_is_one_line_and_exit_2(hostile, tmp_path):
    uri = f"{hostile.uri}/endless.jsonl"
    done = entry_point("evaluate", f"--prompts={uri}", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {uri}: is larger than 64 MiB; split it\n"
    assert list((tmp_path / "tmp").iterdir()) == []
