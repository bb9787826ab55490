"""Real parts for the tests: the embedded model's weights, a tracking server over HTTP, a git server, mlflow run.

Weights and exports are made in the project's own cache, once. Everything listens on loopback and is stopped again.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # no model logged here may need it
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(*command, cwd=REPOSITORY, timeout=600, **environment) -> Finished:
    """Runs a command with this environment's programs first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    full = os.environ | {"PATH": path} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=full, capture_output=True, text=True, timeout=timeout)
    return Finished(done.returncode, done.stdout, done.stderr)


def entry_point(name: str, *options: str, **environment) -> Finished:
    return call(sys.executable, "-m", f"entrypoints.{name}", *options, **environment)


@pytest.fixture(scope="session")
def checkpoint():
    from slm import checkpoints

    return checkpoints.find("smollm2-135m-instruct").fetch()


@pytest.fixture(scope="session")
def fp32_export(checkpoint):
    from slm import onnx_export

    return onnx_export.export(checkpoint, "fp32", "cpu")


@pytest.fixture(scope="session")
def int4_export(checkpoint):
    from slm import onnx_export

    return onnx_export.export(checkpoint, "int4", "cpu")


@pytest.fixture
def tracking(tmp_path, monkeypatch):
    """An sqlite tracking store of the test's own; gives mlflow."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # the artifacts go to the working folder
    yield mlflow
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory):
    """A `mlflow server` over HTTP, which stores artifacts itself; gives its URI."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "store"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # its workers would take the cores
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield uri
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@dataclass(frozen=True)
class GitServer:
    url: str
    commit: str


@pytest.fixture(scope="session")
def git_server(tmp_path_factory):
    """This working tree, committed and served by `git daemon`."""
    folder = tmp_path_factory.mktemp("git")
    copy = folder / "phi3-mlflow"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)

    def git(*words):
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        done = subprocess.run(["git", *identity, *words], cwd=copy, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-q", "-m", "the working tree")
    port = free_port()
    command = ["git", "daemon", "--listen=127.0.0.1", f"--port={port}", f"--base-path={folder}", "--export-all"]
    daemon = subprocess.Popen(
        [*command, "--reuseaddr", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield GitServer(f"git://127.0.0.1:{port}/phi3-mlflow", git("rev-parse", "HEAD"))
    finally:
        os.killpg(daemon.pid, 15)
        daemon.wait(30)
