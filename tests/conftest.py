"""Real parts for the tests: the embedded model's weights, a tracking server over HTTP, a git server, mlflow run.

Weights and exports are made in the project's own cache, once. Everything listens on loopback and is stopped again.
"""

import gc
import os
import shutil
import socket
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
from support import warm_starts
from support.commands import REPOSITORY, free_port, serving
from support.databases import sqlite_store
from support.questions import GENERATION

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # no model logged here may need it
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")  # the waits before them are MLflow's
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
# The longest files, so that none is left for one worker at the end. The first one needs no export and the second one
# needs every export. Else both workers would begin with the exports, and one would wait for the other one's lock
FIRST = (
    "test_spark.py",
    "test_mlflow_serving.py",
    "test_entry_points.py",
    "test_tracking_servers.py",
    "test_reproduction.py",
    "test_environments.py",
    "test_architectures.py",
    "test_evaluation.py",
    "test_journey.py",
)
FAULTS = pytest.StashKey[dict[str, dict[str, str]]]()  # fault -> test -> outcome


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
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and len(CORES) > 1:  # each worker of `pytest -n` keeps to a core, so that none waits for other threads
        os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})
    config.stash[FAULTS] = {}
    config.pluginmanager.register(FaultTable(config.stash[FAULTS]))


def pytest_collection_modifyitems(config, items):
    """Notes which fault a test shows, one at most; puts files with slow tests first."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # so that no worker has a long file left at the end
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    for item in items:
        names = [name for marker in item.iter_markers("fault") for name in marker.args]
        if len(names) > 1:
            raise pytest.UsageError(
                f"{item.nodeid} shows {len(names)} faults; give each fault a test, or a case, of its own"
            )
        for name in names:
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


@contextmanager
def unpinned():
    """This thread, and what it starts, may use all cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def all_cores():
    """For a test of what several cores do."""
    with unpinned():
        yield


@pytest.fixture(scope="module")
def all_cores_for_module():
    """For the tests of a module whose servers have many threads."""
    with unpinned():
        yield


@pytest.fixture(autouse=True)
def _no_experiment_is_left_set():
    """mlflow.set_experiment writes into the environment, where every later test and its processes would find it."""
    yield
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ


@pytest.fixture(scope="module", autouse=True)
def _a_collection_passes_over_what_is_there():
    """An evaluation collects garbage twice, and would go through all that torch, MLflow and the tests have made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _exports_start_warm():
    """An export is a program that imports torch: here, a fork that finds it imported."""
    from slm.models import graph_building, onnx_export

    def python(module: list[str], tell) -> subprocess.CompletedProcess:
        settings = os.environ | onnx_export.SETTINGS
        process = warm_starts.Process(module, REPOSITORY, settings, imported=warm_starts.EXPORTS)
        out, err = process.communicate()
        for line in out.splitlines():
            if line.startswith(graph_building.SHARE):
                tell(float(line.removeprefix(graph_building.SHARE)))
        return subprocess.CompletedProcess(module, process.wait(), out, err)

    with mock.patch.object(onnx_export, "_python", python):
        yield


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

    mlflow.set_tracking_uri(sqlite_store(tmp_path))
    monkeypatch.chdir(tmp_path)  # the artifacts go to the working folder
    yield mlflow
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory):
    """A `mlflow server` over HTTP, which stores artifacts itself; gives its URI."""
    folder = tmp_path_factory.mktemp("server")
    store = f"--backend-store-uri={sqlite_store(folder)}", f"--artifacts-destination={folder}/store"
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


@pytest.fixture(scope="session")
def wrappers(checkpoint, fp32_export, int8_export, int4_export, tmp_path_factory):
    """The wrappers in one sqlite store, logged once: the store's URI, and the models' by name."""
    import mlflow

    from slm.models import model_logging

    folder = tmp_path_factory.mktemp("wrappers")
    uri = sqlite_store(folder)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("wrappers", artifact_location=str(folder / "artifacts"))
    with mlflow.start_run(experiment_id=experiment):
        logged = {
            "pipeline": model_logging.log_pipeline(checkpoint, GENERATION),
            "onnx fp32": model_logging.log_onnx(fp32_export, "chat", GENERATION, "fp32"),
            "onnx int8": model_logging.log_onnx(int8_export, "chat", GENERATION, "int8"),
            "onnx int4": model_logging.log_onnx(int4_export, "chat", GENERATION, "int4"),
            "onnx prompt": model_logging.log_onnx(int4_export, "prompt", GENERATION, "int4"),
        }
    mlflow.set_tracking_uri(None)
    return uri, {name: info.model_uri for name, info in logged.items()}


@pytest.fixture(scope="session")
def loaded_wrappers(wrappers):
    """The wrappers as MLflow loads them. A test that changes one puts it back."""
    import mlflow

    mlflow.set_tracking_uri(wrappers[0])
    loaded = {name: mlflow.pyfunc.load_model(uri) for name, uri in wrappers[1].items()}
    mlflow.set_tracking_uri(None)
    return loaded


@pytest.fixture(scope="module")
def logged(wrappers):
    """The wrappers' URIs, in the store that MLflow uses while the module's tests run."""
    import mlflow

    mlflow.set_tracking_uri(wrappers[0])
    yield wrappers[1]
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def models(logged, loaded_wrappers):
    return loaded_wrappers
