"""Faults of processes: `mlflow run` that dies, rows that hang, memory that ends; and secrets, which none may leave."""

import json
import signal
import sqlite3
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import warm_starts
from support.commands import REPOSITORY, call, entry_point, in_environment, mlflow_command
from support.databases import sqlite_store
from support.planted_secrets import GIT, PLANTED, assert_none_in

pytestmark = pytest.mark.slow

HANGS = """
import time, ctypes
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Hangs(PythonModel):
    def predict(self, context, model_input, params=None):
        text = model_input["prompt"][0]
        if text == "hang":
            try:
                time.sleep(3600)
            except BaseException:
                if {deaf}:
                    time.sleep(3600)
                raise
        if text == "eat":
            self.eaten = [bytearray(2**28) for _ in range(64)]
        return [text]

set_model(Hangs())
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An sqlite store with a model that hangs, one that no signal reaches, and prompts for them."""
    import mlflow
    from support.python_models import signature

    folder = tmp_path_factory.mktemp("hangs")
    uri = sqlite_store(folder)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("hangs", artifact_location=str(folder / "artifacts"))
    models = {}
    with mlflow.start_run(experiment_id=experiment):
        for name, deaf in (("hangs", False), ("deaf", True)):
            (folder / f"{name}.py").write_text(HANGS.format(deaf=deaf), encoding="utf-8")
            text = signature(("string", "prompt", True))
            logged = mlflow.pyfunc.log_model(
                name=name, python_model=str(folder / f"{name}.py"), pip_requirements=[], signature=text
            )
            models[name] = logged.model_uri
    for name, words in (("hang", ("first", "hang")), ("eat", ("first", "eat")), ("stuck", ("first", "hang", "last"))):
        rows = [{"id": word, "prompt": word, "expected": "x"} for word in words]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    yield uri, models, folder
    mlflow.set_tracking_uri(None)


def names(store, folder: Path) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": store[0],
        "MLFLOW_EXPERIMENT_NAME": "hangs",
        "PHI3_MLFLOW_CACHE": str(folder / "cache"),
    }


def states(store) -> list[tuple[str, str]]:
    """State and error of the experiment's newest run and its child."""
    import mlflow

    mlflow.set_tracking_uri(store[0])
    runs = mlflow.search_runs(experiment_names=["hangs"], output_format="list", order_by=["start_time DESC"])
    return [(run.info.status, run.data.tags.get("error", "")) for run in runs[:2]]


def options(store, model: str, prompts: str, **more) -> list[str]:
    given = {"model_uris": store[1][model], "prompts": store[2] / f"{prompts}.jsonl", "traces": "false"}
    given |= {"trust_code": "true"} | more
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.mark.fault("process: a row that hangs, ended by timeout")
def test_a_row_that_hangs_is_ended_by_the_timeout_and_the_answers_before_it_are_kept(store, tmp_path):
    done = entry_point("evaluate", *options(store, "hangs", "hang", timeout=5), **names(store, tmp_path))
    assert done.code == 143, done.err
    assert "stopped by timeout=5" in done.err
    assert states(store) == [("KILLED", "stopped by timeout=5")] * 2
    [kept] = (tmp_path / "cache" / "answers").glob("*.jsonl")
    assert kept.read_text(encoding="utf-8").count('"asked"') == 1


@pytest.mark.fault("process: a row that hangs, given up by row_timeout")
def test_a_row_that_hangs_fails_by_the_row_timeout_and_the_others_are_answered(store, tmp_path):
    options_given = options(store, "deaf", "stuck", row_timeout=2)
    done = entry_point("evaluate", *options_given, **names(store, tmp_path))
    assert done.code == 0, done.err
    found = {line["id"]: (line["output"], line["error"] and line["error"]["message"]) for line in samples(store)}
    late = ("", "no answer within 2 s (row_timeout)")
    assert found == {"first": ("first", None), "hang": late, "last": ("last", None)}


@pytest.mark.fault("process: a row that no signal reaches")
def test_a_row_that_no_signal_reaches_is_ended_all_the_same(store, tmp_path):
    done = entry_point("evaluate", *options(store, "deaf", "hang", timeout=5), **names(store, tmp_path))
    assert done.code == 143, done.err
    assert states(store) == [("KILLED", "stopped by timeout=5")] * 2


@pytest.mark.fault("process: memory exhausted")
def test_memory_that_is_used_up_is_told_and_the_run_is_ended(store, tmp_path):
    limited = ["bash", "-c", 'ulimit -v 4000000; exec "$@"', "bash"]
    command = [sys.executable, "-m", "entrypoints.evaluate", *options(store, "hangs", "eat")]
    done = call(*limited, *command, **names(store, tmp_path))
    assert "Traceback" not in done.err
    [row] = [line for line in samples(store) if line["id"] == "eat"]
    assert done.code == 0 and row["error"]["message"] == "MemoryError"  # this row's, and the others are answered


def samples(store) -> list[dict]:
    import mlflow

    mlflow.set_tracking_uri(store[0])
    [run] = mlflow.search_runs(
        experiment_names=["hangs"], output_format="list", order_by=["start_time DESC"], max_results=1
    )
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/evaluation/samples.jsonl")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.usefixtures("all_cores")  # each thread takes memory
@pytest.mark.fault("process: memory exhausted while a model is loaded")
@pytest.mark.parametrize("kilobytes", [1_200_000, 1_300_000, 1_500_000])  # of a library, the weights, a later library
def test_memory_that_is_too_small_for_the_model_is_one_line_and_exit_4(store, int4_export, tmp_path, kilobytes):
    limited = ["bash", "-c", f'ulimit -v {kilobytes}; exec "$@"', "bash"]
    command = [sys.executable, "-m", "entrypoints.onnx", f"--model={int4_export.folder}", "--max_tokens=1"]
    done = call(*limited, *command, **names(store, tmp_path))
    assert done.code == 4, (done.out, done.err[-2000:])
    assert "the memory is used up" in done.err.splitlines()[-1]


@pytest.mark.fault("process: SIGTERM and SIGKILL to mlflow run: no orphan, the run ended")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_project_whose_mlflow_run_died_ends_itself(store, tmp_path, number):
    words = [word for option in options(store, "hangs", "hang") for word in ("-P", option.removeprefix("--"))]
    command = ["mlflow", "run", str(REPOSITORY), "-e", "evaluate", "--env-manager", "local", *words]
    command += ["--experiment-name", "hangs"]
    process = warm_starts.Process(command, tmp_path, in_environment(names(store, tmp_path)))
    until(lambda: any((tmp_path / "cache" / "answers").glob("*.jsonl")))
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    process.send_signal(number)
    process.wait(30)
    until(lambda: not Path(f"/proc/{child}").exists())
    assert states(store) == [("KILLED", "stopped by the end of mlflow run")] * 2


def until(happened) -> None:
    for _ in range(600):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("not within a minute")


# ---------------------------------------------------------------------------------------------------------------------
# Secrets: one of each kind is planted, and everything that the run left is searched


def left_in(*folders: Path) -> bytes:
    return b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Left:
    """All that a run leaves: lines, the tracking store as SQL, the artifacts, and the cache."""

    lines: str
    store: str
    artifacts: dict[Path, bytes]
    cache: bytes

    def places(self) -> tuple[str | bytes, ...]:
        return self.lines, self.store, b"".join(self.artifacts.values()), self.cache


@pytest.fixture(scope="module")
def left(store, git_server, tmp_path_factory):
    """What `mlflow run` of a git URL with a token leaves, with one secret of each kind in the environment."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "set.csv").write_text("id,prompt,expected\n\"=1+cmd|' /C x'!A0\",hello,hello\n", encoding="utf-8")
    work, own = folder / "work", folder / "own"
    work.mkdir()
    address = git_server.url.replace("git://", "")
    remote = f"https://x-access-token:{GIT}@git.example/project"  # which git is told to find at the test's server
    rewrite = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.git://{address}.insteadOf",
        "GIT_CONFIG_VALUE_0": remote,
    }
    environment = PLANTED | rewrite | {"PHI3_MLFLOW_CACHE": str(own), "MLFLOW_TRACKING_URI": f"sqlite:///{work}/m.db"}
    command = ["run", remote, "-v", git_server.commit, "-e", "evaluate", "--env-manager", "local"]
    given = {"model_uris": saved(store, work), "prompts": folder / "set.csv", "trust_code": "true"}
    words = [word for name, value in given.items() for word in ("-P", f"{name}={value}")]
    done = mlflow_command(*command, *words, cwd=work, **environment)
    assert done.code == 0, done.err[-3000:]
    # MLflow's own lines tell the URL that it was given, before ours is started
    ours = "\n".join(line for line in (done.out + done.err).splitlines() if "mlflow.projects" not in line)
    connection = sqlite3.connect(work / "m.db")
    dumped = "\n".join(connection.iterdump())
    connection.close()
    files = [path for path in work.rglob("*") if path.is_file() and path.name != "m.db"]
    assert files
    return Left(ours, dumped, {path: path.read_bytes() for path in files}, left_in(own))


@pytest.mark.fault("security: tokens in the environment")
def test_no_secret_of_the_environment_reaches_what_a_run_leaves(left):
    for place in left.places():
        assert_none_in(place, *PLANTED.values())


@pytest.mark.fault("security: a token in the git URL that mlflow run was given")
def test_no_token_of_the_git_url_reaches_what_a_run_leaves(left):
    assert "git.example/project" in left.store  # the URL is there, without its token
    for place in left.places():
        assert_none_in(place, GIT)


@pytest.mark.fault("reports: CSV formula cells, in no table")
def test_no_report_is_a_table_for_a_spreadsheet(left):
    assert any(b"=1+cmd|" in content for content in left.artifacts.values())  # the prompt's id is in samples.jsonl
    assert [path for path in left.artifacts if path.suffix in (".csv", ".tsv", ".xlsx")] == []


def saved(store, folder: Path) -> str:
    """The hanging model as a plain folder: what it answers to "hello" is that."""
    import mlflow
    from support.python_models import signature

    code, text = str(store[2] / "hangs.py"), signature(("string", "prompt", True))
    mlflow.pyfunc.save_model(str(folder / "model"), python_model=code, pip_requirements=[], signature=text)
    return str(folder / "model")
