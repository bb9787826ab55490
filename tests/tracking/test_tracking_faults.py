"""Faults of the tracking server and of disks: a real `mlflow server`, behind a proxy that fails it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import faulty_proxy
from support.commands import REPOSITORY, call, entry_point, free_port

from entrypoints import evaluate

pytestmark = pytest.mark.slow

MODEL = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Copier(PythonModel):
    def predict(self, context, model_input, params=None):
        return [text if len(text) < 7 else "no" for text in model_input["prompt"]]

set_model(Copier())
"""
METRICS, ARTIFACTS = "runs/log-batch", "/mlflow-artifacts/"


@pytest.fixture(scope="module")
def copier(tracking_server, tmp_path_factory):
    """A model on the tracking server, registered as `faulty`, and a prompt set for it."""
    import mlflow
    from support.python_models import signature

    folder = tmp_path_factory.mktemp("copier")
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    rows = [{"id": f"q{n}", "prompt": "x" * n, "expected": "x" * n, "scorers": ["exact_match"]} for n in range(1, 9)]
    prompts = folder / "copies.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mlflow.set_tracking_uri(tracking_server)
    with mlflow.start_run(experiment_id=mlflow.create_experiment("faults")):  # set_experiment would outlast the file
        mlflow.pyfunc.log_model(
            name="copier",
            python_model=str(folder / "model.py"),
            pip_requirements=[],
            signature=signature(("string", "prompt", True)),
            registered_model_name="faulty",
        )
    yield prompts
    mlflow.set_tracking_uri(None)


@pytest.fixture
def proxy(tracking_server):
    with faulty_proxy.in_front_of(tracking_server) as faults:
        yield faults


@pytest.fixture
def run(copier, proxy, tmp_path, monkeypatch, capsys):
    """Runs `evaluate` through the proxy; gives the exit code and what was printed."""
    import mlflow

    for name, value in environment(proxy.uri, tmp_path).items():
        monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(proxy.uri)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def evaluated(**options):
        options = {
            "model_uris": "models:/faulty/1",
            "prompts": copier,
            "traces": "false",
            "trust_code": "true",
        } | options
        code = evaluate.main([f"--{name}={value}" for name, value in options.items()])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out + err

    yield evaluated
    for number, handler in handlers.items():
        signal.signal(number, handler)


def environment(uri: str, folder: Path) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_EXPERIMENT_NAME": "faults",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "PHI3_MLFLOW_CACHE": str(folder / "cache"),
    }


@pytest.fixture
def server(tracking_server):
    """A client of the tracking server, past the proxy."""
    import mlflow

    return mlflow.MlflowClient(tracking_server)


def newest(client, parents: bool = True):
    """The newest run of the experiment, of those above or of those below."""
    experiment = client.get_experiment_by_name("faults")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    return next(run for run in runs if ("mlflow.parentRunId" in run.data.tags) != parents)


def error_line(out: str) -> str:
    [line] = [line for line in out.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.fault("tracking: server down at start")
def test_a_server_that_is_down_is_one_line_before_anything_is_loaded(run, monkeypatch):
    import mlflow

    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    code, out = run()
    assert code == 4
    assert uri in error_line(out) and "Loading" not in out


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.fault("tracking: 401 and 403")
def test_a_server_that_refuses_is_one_line_before_anything_is_loaded(run, proxy, status):
    proxy.add(status)
    code, out = run()
    assert code == 4
    assert str(status) in error_line(out) and "Loading" not in out


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(500, marks=pytest.mark.fault("tracking: a storm of 500s that passes")),
        pytest.param("cut", marks=pytest.mark.fault("tracking: cut connections")),
    ],
)
def test_what_passes_is_waited_out_and_nothing_is_lost(run, proxy, server, action):
    proxy.add(action, which=range(0, 10**9, 3))  # one request in three fails, and two attempts more are made of each
    code, out = run(resume="false")
    assert code == 0, out
    child = newest(server, parents=False)
    assert (child.info.status, child.data.metrics["exact_match/mean"]) == ("FINISHED", 0.75)
    assert newest(server).info.status == "FINISHED"


@pytest.mark.fault("tracking: slower than MLflow waits for an answer")
def test_an_answer_that_comes_too_late_is_asked_for_again(run, proxy, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    proxy.add(5.0, path=METRICS, which=range(1))
    code, out = run(resume="false")
    assert code == 0, out
    assert sum(METRICS in line for line in proxy.asked) >= 2
    assert newest(server, parents=False).data.metrics["exact_match/mean"] == 0.75


@pytest.mark.fault("tracking: connections cut while the scores are sent")
def test_scores_whose_connection_is_cut_are_sent_again(tmp_path, run, proxy, server):
    """The first two attempts to send the metrics find no answer."""
    proxy.add("cut", path=METRICS, which=range(2))
    code, out = run()
    assert code == 0, out
    assert newest(server, parents=False).data.metrics["rows"] == 8


@pytest.mark.fault("tracking: gone for good, the scores kept and uploaded later")
@pytest.mark.parametrize("action", ["cut", 500])
def test_scores_that_the_server_does_not_take_are_kept_and_uploaded_later(run, proxy, server, tmp_path, action):

    def gone():
        proxy.faults.clear()
        proxy.add(action)
        return action

    proxy.add(gone, "POST", METRICS, range(1, 2))  # the second, after the parameters: the scores'
    code, out = run()
    assert code == 4
    found = re.search(r"uploaded by python -m (\S+) (\S+)", error_line(out))
    asked = len(proxy.asked)
    proxy.faults.clear()
    child = newest(server, parents=False)
    assert "exact_match/mean" not in child.data.metrics
    done = call(sys.executable, "-m", found[1], found[2], **environment(proxy.uri, tmp_path))
    assert done.code == 0, done.err
    child = server.get_run(child.info.run_id)
    assert (child.info.status, child.data.metrics["exact_match/mean"]) == ("FINISHED", 0.75)
    assert "prompts.sha256" in child.data.tags
    samples = [artifact.path for artifact in server.list_artifacts(child.info.run_id, "evaluation")]
    assert samples == ["evaluation/samples.jsonl"]
    assert not Path(found[2]).exists()
    assert call(sys.executable, "-m", found[1], found[2], **environment(proxy.uri, tmp_path)).code == 2
    assert asked < 200


@pytest.mark.fault("tracking: the registry fails when it is asked for the champion")
def test_an_alias_that_can_not_be_read_does_not_count_as_one_that_is_not_set(run, proxy, server, tmp_path):
    """Without a champion, the candidate would become the first one, and no rule would compare it."""
    server.set_registered_model_alias("faulty", "current", "1")
    fault = {"error_code": "BAD_REQUEST", "message": "QueuePool limit of size 5 overflow 10 reached"}  # a busy server's
    proxy.add(fault, "GET", "registered-models/alias", range(1))
    (tmp_path / "gate.yaml").write_text("score/mean: {max_drop: 0.02}\n")
    given = {"baseline": "models:/faulty@current", "alias": "current", "thresholds": tmp_path / "gate.yaml"}
    code, out = run(**given)
    assert code == 4, out
    assert "QueuePool limit" in error_line(out) and "the first current" not in out
    assert newest(server).info.status == "FAILED"
    code, out = run(**given)
    assert code == 0 and "are the same model" in out, out


@pytest.mark.fault("tracking: an artifact that fails, file k of n")
@pytest.mark.parametrize("k", [0, 2])
def test_an_artifact_that_is_not_taken_ends_the_run_failed_with_the_reason(run, proxy, server, k):
    proxy.add(500, "PUT", ARTIFACTS, range(k, 10**9))
    code, out = run()
    assert code == 4
    line = error_line(out)
    assert "500" in line or "artifact" in line
    proxy.faults.clear()
    parent = newest(server)
    assert parent.info.status == "FAILED" and parent.data.tags["error"]
    assert parent.data.tags.get("gate") != "pass"


@pytest.mark.fault("tracking: the run deleted under way")
def test_a_run_that_is_deleted_under_way_is_one_line(run, proxy, server):
    proxy.add(lambda: server.delete_run(newest(server, parents=False).info.run_id), "POST", METRICS, range(1, 2))
    code, out = run()
    assert code == 4
    assert "deleted" in error_line(out)


@pytest.mark.fault("tracking: the experiment deleted")
def test_a_deleted_experiment_is_one_line_before_anything_is_loaded(copier, server, tracking_server, tmp_path):
    server.delete_experiment(server.create_experiment("deleted"))
    names = environment(tracking_server, tmp_path) | {"MLFLOW_EXPERIMENT_NAME": "deleted"}
    done = entry_point("evaluate", "--model_uris=models:/faulty/1", "--trust_code=true", f"--prompts={copier}", **names)
    assert done.code == 4
    assert "deleted" in error_line(done.err) and done.err.count("\n") == 1 and "Loading" not in done.out


# ---------------------------------------------------------------------------------------------------------------------
# kill -9 at the worst moment: the proxy kills when a request comes


def killed(proxy, folder: Path, command: list[str], method: str, path: str, which: range) -> int:
    """Runs a command that is killed when it asks for `path`; gives its process id."""
    process = []

    def kill():
        os.kill(process[0].pid, signal.SIGKILL)
        return "cut"

    proxy.add(kill, method, path, which)
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    full = os.environ | environment(proxy.uri, folder)
    process.append(subprocess.Popen([sys.executable, "-m", *command], cwd=REPOSITORY, env=full, **output))
    assert process[0].wait(120) == -signal.SIGKILL
    proxy.faults.clear()
    return process[0].pid


@pytest.mark.fault("process: kill -9 between the verdict and the alias")
def test_a_run_that_was_killed_before_it_set_the_alias_sets_it_the_second_time(run, copier, proxy, server, tmp_path):
    gate = tmp_path / "gate.yaml"
    gate.write_text("rows_failed: {max: 0}\n")
    options = {"thresholds": gate, "alias": "served", "prompts": copier, "traces": "false"}
    command = ["entrypoints.evaluate", "--model_uris=models:/faulty/1", "--trust_code=true"]
    command += [f"--{name}={value}" for name, value in options.items()]
    pid = killed(proxy, tmp_path, command, "POST", "registered-models/alias", range(1))
    assert "served" not in server.get_registered_model("faulty").aliases
    code, out = run(**options)
    assert code == 0 and "8 of 8 answers are reused" in out, out
    assert server.get_registered_model("faulty").aliases["served"] == "1"
    assert len(server.search_model_versions("name = 'faulty'")) == 1
    running = server.search_runs([server.get_experiment_by_name("faults").experiment_id], "status = 'RUNNING'")
    assert [run for run in running if f'"pid": {pid},' in run.data.tags["process"]] == []


@pytest.mark.fault("process: kill -9 while logging, and after registering: no half model, no second version")
@pytest.mark.parametrize(
    ("method", "path", "which", "versions"),
    [
        ("PUT", ARTIFACTS, range(3, 4), 0),
        ("POST", "model-versions/set-tag", range(1), 1),
    ],
    ids=["while logging", "after registering"],
)
def test_a_model_whose_logging_was_killed_is_registered_once_and_whole(
    proxy, server, int4_export, tmp_path, method, path, which, versions
):
    name = tmp_path.name
    gate = ["--max_tokens=1", f"--prompts={tmp_path / 'one.jsonl'}", f"--registered_model_name={name}"]
    (tmp_path / "one.jsonl").write_text('{"prompt": "1"}\n')
    command = ["entrypoints.onnx", f"--model={int4_export.folder}", *gate]
    killed(proxy, tmp_path, command, method, path, which)
    assert len(server.search_model_versions(f"name = '{name}'")) == versions
    done = call(sys.executable, "-m", *command, **environment(proxy.uri, tmp_path))
    assert done.code == 0, done.err
    [version] = server.search_model_versions(f"name = '{name}'")
    model = server.get_logged_model(version.source.removeprefix("models:/"))
    assert model.status == "READY" and version.description and "model.sha256" in version.tags


# ---------------------------------------------------------------------------------------------------------------------
# Disks


def on_disk(script: str, **more) -> list[str]:
    """A command in a mount namespace of its own, in which `script` may mount what ends with it."""
    return ["unshare", "--mount", "--map-root-user", "bash", "-euc", script + '\nexec "$@"', "bash"]


@pytest.fixture(scope="module")
def mounts():
    probe = call("unshare", "--mount", "--map-root-user", "bash", "-c", "mount -t tmpfs none /mnt")
    if probe.code:
        pytest.skip(f"no mount namespace: {probe.err.strip()}")


DISKS = {
    "storage: disk full in the cache": ("tmpfs size=16k", "cache", "the disk is full"),
    "storage: disk full in the store": ("tmpfs size=512k", "store", "disk is full"),
    "storage: disk full in the temporary folder": ("tmpfs size=4k", "tmp", "the disk is full"),
    "storage: read-only cache": ("tmpfs ro", "cache", "the disk is read-only"),
    "storage: read-only working folder and HOME, the cache in it": ("tmpfs ro", "home", "the disk is read-only"),
    "storage: read-only working folder and HOME, the cache elsewhere": ("tmpfs ro", "home", ""),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in DISKS])
def test_a_full_or_read_only_disk_is_one_line(mounts, copier, tracking_server, tmp_path, name):
    kind, place, line = DISKS[name]
    size = kind.split()[1]
    folders = {folder: tmp_path / folder for folder in ("cache", "store", "tmp", "home")}
    for folder in folders.values():
        folder.mkdir()
    prepare = f"mount -t tmpfs -o {size},mode=700 none {folders[place]}"
    if place == "cache" and size != "ro":
        prepare += f"\nhead -c 20k /dev/zero > {folders[place]}/filler || true"
    names = environment(tracking_server, tmp_path) | {"HOME": str(folders["home"]), "TMPDIR": str(folders["tmp"])}
    options = [f"--prompts={copier}", "--traces=false", "--model_uris=models:/faulty/1", "--trust_code=true"]
    if place == "store":
        names["MLFLOW_TRACKING_URI"] = f"sqlite:///{folders['store']}/mlflow.db"
        options[2] = f"--model_uris={tracking_server}/v1"
    if place == "home":
        names |= {"PHI3_MLFLOW_CACHE": "", "XDG_CACHE_HOME": ""} if line else {}
        names["PYTHONPATH"] = str(REPOSITORY)
    command = [*on_disk(prepare), sys.executable, "-m", "entrypoints.evaluate", *options]
    done = call(*command, cwd=folders["home"] if place == "home" else REPOSITORY, **names)
    assert "Traceback" not in done.err, done.err
    assert done.code == (4 if line else 0), (done.out, done.err)
    assert line in done.err.splitlines()[-1] and "hub" not in done.err
