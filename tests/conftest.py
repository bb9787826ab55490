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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # no model logged here may need it
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

REPOSITORY = Path(__file__).resolve().parent.parent
without_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU is at hand")
FAULTS = pytest.StashKey[dict[str, dict[str, str]]]()  # fault -> test -> outcome


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


class FaultTable:
    """Collects the outcome of each fault's tests. Reports reach the controller of `pytest -n` too."""

    def __init__(self, faults: dict[str, dict[str, str]]):
        self.faults = faults

    def pytest_runtest_logreport(self, report):
        for kind, name in report.user_properties:
            if kind == "fault" and (report.when == "call" or report.outcome != "passed"):
                tests = self.faults.setdefault(name, {})
                if tests.get(report.nodeid, "not run") in ("not run", "passed"):
                    tests[report.nodeid] = report.outcome


def pytest_configure(config):
    config.stash[FAULTS] = {}
    config.pluginmanager.register(FaultTable(config.stash[FAULTS]))


def pytest_collection_modifyitems(config, items):
    """Notes which faults the tests cover, each in one to many tests."""
    for item in items:
        for marker in item.iter_markers("fault"):
            for name in marker.args:
                item.user_properties.append(("fault", name))
                config.stash[FAULTS].setdefault(name, {})[item.nodeid] = "not run"


def pytest_deselected(items):
    for item in items:
        for tests in item.config.stash[FAULTS].values():
            tests.pop(item.nodeid, None)


def pytest_terminal_summary(terminalreporter, config):
    """The table of faults: each by name, and how many of them were survived in every test of theirs."""
    table = {name: set(tests.values()) for name, tests in config.stash[FAULTS].items() if tests}
    if table and not config.option.collectonly:
        survived = [name for name, outcomes in table.items() if outcomes == {"passed"}]
        terminalreporter.section(f"faults: {len(survived)} of {len(table)}")
        for name, outcomes in sorted(table.items()):
            state = "passed" if outcomes == {"passed"} else ", ".join(sorted(outcomes - {"passed"}))
            terminalreporter.write_line(f"{state:8} {name}")
        terminalreporter.write_line(f"faults: {len(survived)} of {len(table)}")


@pytest.fixture(autouse=True)
def _no_experiment_is_left_set():
    """mlflow.set_experiment writes into the environment, where every later test and its processes would find it."""
    yield
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ


@pytest.fixture(scope="session")
def checkpoint():
    from slm.models import checkpoints

    return checkpoints.find("smollm2-135m-instruct").fetch()


@pytest.fixture(scope="session")
def fp32_export(checkpoint):
    from slm.models import onnx_export

    return onnx_export.export(checkpoint, "fp32", "cpu")


@pytest.fixture(scope="session")
def int4_export(checkpoint):
    from slm.models import onnx_export

    return onnx_export.export(checkpoint, "int4", "cpu")


@pytest.fixture(scope="session")
def int8_export(checkpoint):
    from slm.models import onnx_export

    return onnx_export.export(checkpoint, "int8", "cpu")


@pytest.fixture
def tracking(tmp_path, monkeypatch):
    """An sqlite tracking store of the test's own; gives mlflow."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # the artifacts go to the working folder
    yield mlflow
    mlflow.set_tracking_uri(None)


@contextmanager
def running(command: list[str], health: str, cwd: Path = REPOSITORY, output=None, end: int = 15, **environment):
    """A server process, in a group of its own, from the moment it answers at `health`; the signal `end` stops it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    full = os.environ | {"PATH": path} | environment
    process = subprocess.Popen(command, cwd=cwd, env=full, stdout=output, stderr=output, start_new_session=True)
    try:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(health, timeout=1).close()
                break
            assert process.poll() is None, f"{command} ended with {process.poll()}"
            time.sleep(0.2)
        else:
            raise AssertionError(f"{health} didn't answer within two minutes")
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, end)
        process.wait(30)


@contextmanager
def serving(folder: Path, *options: str, port: int = 0, end: int = 15, **environment):
    """A `mlflow server` on loopback, with its log and what it stores in `folder`; gives its URI, and stops it."""
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # its workers would take the cores
    uri = f"http://127.0.0.1:{port}"
    with (
        (folder / "log").open("w") as log,
        running([*command, *options], f"{uri}/health", cwd=folder, output=log, end=end, **environment),
    ):
        yield uri


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory):
    """A `mlflow server` over HTTP, which stores artifacts itself; gives its URI."""
    folder = tmp_path_factory.mktemp("server")
    store = f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/store"
    with serving(folder, *store) as uri:
        yield uri


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
