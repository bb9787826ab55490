"""Several users at once, and what a crash leaves: first starts, runs side by side, runs left RUNNING."""

import datetime
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.commands import REPOSITORY, call, free_port, serving, started
from support.databases import database, sqlite_store

from slm.base import parameters
from slm.base.errors import Unavailable
from slm.base.parameters import Parameters
from slm.base.stopping import Stopped
from slm.scorers.confined import CHECKS
from slm.tracking import lifecycle, run_records, runs

MODEL = """
import os, time
from pathlib import Path
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Copier(PythonModel):
    '''Repeats a number, if its last digit is below {skill}; waits for a file first, where one is named.'''
    def predict(self, context, model_input, params=None):
        wanted = os.environ.get("WAIT_FOR")
        if wanted:
            Path(wanted + ".waiting").touch()
            while not Path(wanted).exists():
                time.sleep(0.1)
        return [text if int(text) % 10 < {skill} else "no" for text in model_input["prompt"]]

set_model(Copier())
"""


@pytest.fixture(scope="module")
def copiers(tmp_path_factory):
    """Folders of models that are right on 1 to 6 of ten prompts, and those prompts."""
    import mlflow
    from support.python_models import signature

    folder = tmp_path_factory.mktemp("copiers")
    for skill in range(1, 7):
        code = folder / f"model{skill}.py"
        code.write_text(MODEL.format(skill=skill), encoding="utf-8")
        path, columns = folder / f"copier-{skill}", signature(("string", "prompt", True))
        mlflow.pyfunc.save_model(path, python_model=str(code), pip_requirements=[], signature=columns)
    rows = [
        {"id": f"q{number}", "prompt": str(number), "expected": str(number), "scorers": ["exact_match"]}
        for number in range(10)
    ]
    (folder / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def start(copiers: Path, skill: int, uri: str, experiment: str, folder: Path, resume: str = "false", **environment):
    """An `evaluate` of one copier, going on."""
    options = [f"--model_uris={copiers}/copier-{skill}", "--trust_code=true", "--traces=false"]
    options += [f"--prompts={copiers}/numbers.jsonl", f"--resume={resume}"]
    own = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": experiment, "PHI3_MLFLOW_CACHE": str(folder)}
    return started("evaluate", *options, merged=True, **own | environment)


def ended(process) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def waiting(process, file: Path) -> None:
    for _ in range(1200):
        if Path(f"{file}.waiting").exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("its model was not asked in two minutes")


def family(client, out: str):
    """The run that a finished `evaluate` printed, and its one child."""
    parent = client.get_run(out.split("run: ")[1].split()[0])
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    [child] = client.search_runs([parent.info.experiment_id], query)
    return parent, child


# ---------------------------------------------------------------------------------------------------------------------
# At once


@pytest.mark.slow
@pytest.mark.fault("tracking: six first starts at once")
def test_six_first_starts_on_a_fresh_sqlite_file_all_succeed_each_with_its_own_figures(copiers, tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    processes = {skill: start(copiers, skill, uri, "all at once", tmp_path) for skill in range(1, 7)}
    printed = {skill: ended(process) for skill, process in processes.items()}
    client = mlflow.MlflowClient(uri)
    for skill, out in printed.items():
        parent, child = family(client, out)
        assert {parent.info.status, child.info.status} == {"FINISHED"}
        assert child.data.metrics["exact_match/mean"] == skill / 10
    [experiment] = client.search_experiments(filter_string="name = 'all at once'")
    assert len(client.search_runs([experiment.experiment_id])) == 12


@pytest.mark.slow
def test_mlflow_runs_at_once_succeed_on_a_file_that_was_set_up_as_the_readme_says(tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert call("mlflow", "db", "upgrade", uri).code == 0
    command = [
        Path(sys.executable).parent / "mlflow",
        "run",
        REPOSITORY,
        "--env-manager",
        "local",
        "-P",
        "prompts=none",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "PATH": path}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path, "env": environment}
    processes = [subprocess.Popen([str(word) for word in command], **quiet) for _ in range(3)]
    assert [process.wait(300) for process in processes] == [1] * 3  # the prompt set isn't there: the cheapest ending
    found = mlflow.MlflowClient(uri).search_runs(["0"])
    assert [run.data.tags["error"].partition(" does")[0] for run in found] == ["prompts: 'none'"] * 3


@pytest.mark.slow
def test_two_runs_at_once_on_one_server_keep_to_themselves(copiers, tracking_server, tmp_path):
    import mlflow

    processes = [start(copiers, skill, tracking_server, "side by side", tmp_path) for skill in (3, 6)]
    client = mlflow.MlflowClient(tracking_server)
    for skill, process in zip((3, 6), processes, strict=True):
        parent, child = family(client, ended(process))
        assert {parent.info.status, child.info.status} == {"FINISHED"}
        assert child.data.metrics["exact_match/mean"] == skill / 10
        assert child.data.tags["model.uri"] == f"{copiers}/copier-{skill}"
        folder = client.download_artifacts(child.info.run_id, "evaluation", str(tmp_path))
        samples = Path(folder, "samples.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["scores"]["exact_match"] for line in samples) == skill


@pytest.mark.fault("tracking: two runs make one experiment at once")
def test_an_experiment_that_another_run_makes_first_is_taken(tracking_server, monkeypatch):
    """MLflow looks for the experiment and then makes it: the other run comes in between."""
    import mlflow

    look = mlflow.MlflowClient.get_experiment_by_name

    def and_another_is_first(client, name):
        found = look(client, name)
        if found is None:
            client.create_experiment(name)
        return found

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "made twice")
    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", and_another_is_first)
    with lifecycle.run("evaluate", Parameters()) as run:
        pass
    client = mlflow.MlflowClient(tracking_server)
    assert run.info.experiment_id == look(client, "made twice").experiment_id
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_dataset_that_another_run_logs_first_is_taken(tmp_path):
    """MLflow looks for the dataset and then makes it, here as well."""
    import mlflow
    from mlflow.store.tracking.dbmodels.models import SqlDataset
    from sqlalchemy import event

    from slm.prompts.prompt_sets import read_prompt_set

    file, asked = tmp_path / "mlflow.db", []

    def and_another_is_first(mapper, connection, dataset):
        if not asked:
            values = {column.key: getattr(dataset, column.key) for column in mapper.columns} | {
                "dataset_uuid": "0" * 32
            }
            marks = ", ".join("?" * len(values))
            with sqlite3.connect(file) as other:
                other.execute(f"INSERT INTO datasets ({', '.join(values)}) VALUES ({marks})", [*values.values()])
        asked.append(dataset.dataset_uuid)

    mlflow.set_tracking_uri(f"sqlite:///{file}")
    try:
        with mlflow.start_run() as run:
            event.listen(SqlDataset, "before_insert", and_another_is_first)
            run_records.log_dataset(read_prompt_set(REPOSITORY / "prompts" / "smoke.jsonl", "smoke", CHECKS))
        assert len(asked) == 1  # and refused
        [logged] = mlflow.get_run(run.info.run_id).inputs.dataset_inputs
        assert logged.dataset.name == "smoke"
    finally:
        event.remove(SqlDataset, "before_insert", and_another_is_first)
        mlflow.set_tracking_uri(None)


@pytest.mark.slow
@pytest.mark.fault("process: two runs at once on one cache")
def test_two_runs_of_one_model_at_once_on_one_cache_are_both_whole_and_leave_it_whole(
    copiers, tracking_server, tmp_path
):
    import mlflow

    client, names = mlflow.MlflowClient(tracking_server), (tracking_server, "one cache", tmp_path)
    hold = tmp_path / "go"
    first = start(copiers, 4, *names, resume="true", WAIT_FOR=str(hold))
    waiting(first, hold)  # it has the answers' file open
    second = ended(start(copiers, 4, *names, resume="true"))
    hold.touch()
    for out in (second, ended(first)):
        assert family(client, out)[1].data.metrics["exact_match/mean"] == 0.4
    assert "10 of 10 answers are reused" in ended(start(copiers, 4, *names, resume="true"))


# ---------------------------------------------------------------------------------------------------------------------
# Restarts under way


@pytest.mark.slow
@pytest.mark.fault("tracking: the server killed and started again under way")
def test_a_server_that_is_killed_and_started_again_under_way_costs_nothing(copiers, tmp_path):
    import mlflow

    port, hold = free_port(), tmp_path / "go"
    store = f"--backend-store-uri=sqlite:///{tmp_path}/mlflow.db", f"--artifacts-destination={tmp_path}/store"
    with serving(tmp_path, *store, port=port, end=signal.SIGKILL) as uri:
        process = start(copiers, 5, uri, "restarted", tmp_path, WAIT_FOR=str(hold))
        waiting(process, hold)
    with serving(tmp_path, *store, port=port) as uri:
        hold.touch()
        parent, child = family(mlflow.MlflowClient(uri), ended(process))
        assert {parent.info.status, child.info.status} == {"FINISHED"}
        assert child.data.metrics["exact_match/mean"] == 0.5


@pytest.mark.slow
@pytest.mark.fault("tracking: PostgreSQL restarted under way")
def test_a_database_that_is_restarted_under_way_costs_nothing(copiers, tmp_path):
    import mlflow

    hold = tmp_path / "go"
    with database() as (address, running), ExitStack() as before:
        before.enter_context(running())
        store = f"--backend-store-uri={address}", f"--artifacts-destination={tmp_path}/store"
        with serving(tmp_path, *store) as uri:
            process = start(copiers, 5, uri, "restarted", tmp_path, WAIT_FOR=str(hold))
            waiting(process, hold)
            before.close()
            with running():
                hold.touch()
                parent, child = family(mlflow.MlflowClient(uri), ended(process))
                assert {parent.info.status, child.info.status} == {"FINISHED"}
                assert child.data.metrics["exact_match/mean"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# After a crash


@pytest.mark.slow
def test_the_next_start_ends_what_kill_9_left_with_its_children_and_nothing_that_lives(copiers, tmp_path):
    import mlflow

    uri, experiment = sqlite_store(tmp_path), "crashes"
    client, go, third = mlflow.MlflowClient(uri), tmp_path / "go", None
    killed = start(copiers, 1, uri, experiment, tmp_path, WAIT_FOR=f"{tmp_path}/never")
    waiting(killed, tmp_path / "never")
    alive = start(copiers, 2, uri, experiment, tmp_path, WAIT_FOR=str(go))
    waiting(alive, go)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    [place] = client.search_experiments(filter_string=f"name = '{experiment}'")

    processes = {}  # by run: its PID. A run that has ended by itself has no such tag any more

    def states():
        """Status and reason of each run, by the PID of its process."""
        found = {}
        for run in client.search_runs([place.experiment_id]):
            if "process" in run.data.tags:
                processes[run.info.run_id] = json.loads(run.data.tags["process"])["pid"]
            pid = processes.get(run.info.run_id, third.pid if third else None)
            found.setdefault(pid, []).append((run.info.status, run.data.tags.get("error", "").partition(" (")[0]))
        return found

    assert states() == {killed.pid: [("RUNNING", "")] * 2, alive.pid: [("RUNNING", "")] * 2}
    third = start(copiers, 3, uri, experiment, tmp_path)
    assert "runs that earlier processes left behind are set FAILED" in ended(third)
    left = [("FAILED", "its process ended without a word")] * 2
    finished = [("FINISHED", "")] * 2
    assert states() == {killed.pid: left, alive.pid: [("RUNNING", "")] * 2, third.pid: finished}
    go.touch()
    assert "left behind" not in ended(alive)
    assert states() == {killed.pid: left, alive.pid: finished, third.pid: finished}


HERE = runs.this_process()


def test_this_process_lives_and_one_with_its_pid_that_started_earlier_does_not():
    assert runs.gone(HERE, HERE, 10**6) == ""
    assert runs.gone(runs.Process(HERE.host, HERE.boot, HERE.pid, HERE.start - 1), HERE, 0) != ""


def test_a_process_that_ended_is_gone_whether_or_not_it_was_waited_for():
    process = subprocess.Popen(["sleep", "60"])
    _, started = runs._stat(process.pid)
    other = runs.Process(HERE.host, HERE.boot, process.pid, started)
    assert runs.gone(other, HERE, 0) == ""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert f"its process ended without a word (kill -9, out of memory, power): {process.pid}" in (
        runs.gone(other, HERE, 0)
    )
    process.wait()
    assert runs.gone(other, HERE, 0) != ""


@pytest.mark.parametrize(
    ("host", "boot"),
    [("elsewhere", HERE.boot), (HERE.host, "before the power failed"), (HERE.host, ""), ("elsewhere", "")],
)
def test_where_a_process_cant_be_looked_for_an_hour_of_silence_tells(host, boot):
    other = runs.Process(host, boot, 1, 1)
    assert runs.gone(other, HERE, runs.SILENT - 1) == ""
    assert "no sign of life for 1.0 h" in runs.gone(other, HERE, runs.SILENT + 1)


def made(client, seconds_ago: float, tags: dict[str, str]) -> str:
    """A RUNNING run, made and last seen so long ago; its id."""
    moment = time.time() - seconds_ago
    seen = datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat()
    tags = {runs.tags.SEEN: seen} | tags if runs.tags.PROCESS in tags else tags
    return client.create_run("0", start_time=int(moment * 1000), tags=tags).info.run_id


def elsewhere(pid: int) -> dict[str, str]:
    return {runs.tags.PROCESS: json.dumps({"host": "elsewhere", "boot": "b", "pid": pid, "start": 1})}


PROJECT = {"mlflow.source.name": "https://example.org/phi3-mlflow", "mlflow.project.entryPoint": "main"}


def test_what_is_ended_is_ours_and_silent_and_nothing_else(tracking):
    client = tracking.MlflowClient()
    silent = made(client, 7200, elsewhere(1))
    lately = made(client, 600, elsewhere(2))
    child_of_lately = made(client, 7200, elsewhere(2))  # its parent gives the signs of life
    foreign = made(client, 10**6, {})
    named_alike = made(client, 10**6, {runs.tags.PROCESS: "etching"})
    never_came = made(client, 25 * 3600, PROJECT)
    installing = made(client, 23 * 3600, PROJECT)
    another_project = made(client, 10**6, PROJECT | {"mlflow.source.name": "https://example.org/other"})
    own = client.get_run(made(client, 0, PROJECT | runs.process_tags()))
    assert set(runs.end_abandoned(client, own)) == {silent, never_came}
    assert runs.end_abandoned(client, own) == []
    states = {run.info.run_id: run for run in client.search_runs(["0"])}
    failed = {run_id for run_id, run in states.items() if run.info.status == "FAILED"}
    assert failed == {silent, never_came}
    assert {run.info.status for run_id, run in states.items() if run_id not in failed} == {"RUNNING"}
    assert set(states) - failed == {
        lately,
        child_of_lately,
        foreign,
        named_alike,
        installing,
        another_project,
        own.info.run_id,
    }
    assert "no sign of life for 2.0 h" in states[silent].data.tags["error"]
    assert "its entry point never started" in states[never_came].data.tags["error"]
    assert states[silent].info.end_time - states[silent].info.start_time < 2000  # ended when it was last seen


def test_a_run_that_ends_while_it_is_looked_at_keeps_how_it_ended(tracking):
    client = tracking.MlflowClient()
    run_id = made(client, 7200, elsewhere(1))
    before = client.search_runs(["0"])
    client.set_terminated(run_id, "FINISHED")

    class Late(tracking.MlflowClient):
        def search_runs(self, *args, **options):
            return before

    assert runs.end_abandoned(Late(), client.get_run(made(client, 0, runs.process_tags()))) == []
    run = client.get_run(run_id)
    assert (run.info.status, "error" in run.data.tags) == ("FINISHED", False)


def test_a_run_gives_signs_of_life_while_it_goes_on_and_a_store_that_fails_once_stops_none(tracking, monkeypatch):
    monkeypatch.setattr(runs, "BEAT", 0.01)
    client = tracking.MlflowClient()
    run_id = made(client, 7200, elsewhere(1))
    first = client.get_run(run_id).data.tags[runs.tags.SEEN]
    calls = []

    class Unsteady(tracking.MlflowClient):
        def set_tag(self, *args, **options):
            calls.append(args)
            if len(calls) == 1:
                raise ConnectionError("no answer")
            super().set_tag(*args, **options)

    with runs.signs_of_life(Unsteady(), run_id):
        for _ in range(600):
            if client.get_run(run_id).data.tags[runs.tags.SEEN] > first:
                break
            time.sleep(0.1)
    assert client.get_run(run_id).data.tags[runs.tags.SEEN] > first


def test_one_search_is_what_a_start_pays_where_nothing_was_left(tracking):
    client = tracking.MlflowClient()
    own = client.get_run(made(client, 0, runs.process_tags()))
    asked = []

    class Counting(tracking.MlflowClient):
        def __getattribute__(self, name):
            if not name.startswith("_"):
                asked.append(name)
            return super().__getattribute__(name)

    assert runs.end_abandoned(Counting(), own) == []
    assert asked == ["search_runs"]


def test_the_trend_has_finished_runs_only(tracking):
    from slm.tracking import earlier_runs

    client = tracking.MlflowClient()
    experiment = tracking.create_experiment("trend")
    for status, mean in (("FINISHED", 0.5), ("FAILED", 0.1), ("KILLED", 0.2)):
        run = client.create_run(experiment, tags={"prompts.sha256": "abc", "model.name": "m"}).info.run_id
        for field in ("mean", "ci95_low", "ci95_high"):
            client.log_metric(run, f"score/{field}", mean)
        client.set_terminated(run, status)
    with tracking.start_run(experiment_id=experiment):
        found = earlier_runs.history("abc", "m", ["score"])
    assert [point.mean for point in found["score"]] == [0.5]


def test_a_server_that_is_stopped_tells_of_no_answers(capsys):
    def story():
        raise Stopped(signal.SIGTERM, "")

    assert lifecycle.exit_code(story, stopped_by="the server has stopped, after {}") == 143
    assert capsys.readouterr().err == "the server has stopped, after SIGTERM\n"


def waiting_run(tracking, monkeypatch, name: str, **params: str) -> str:
    """The run that `mlflow run` makes for a process, with its parameters as the shell gets them."""
    client = tracking.MlflowClient()
    run = client.create_run(tracking.create_experiment(name), run_name="selective-ram-123").info.run_id
    for key, value in params.items():
        client.log_param(run, key, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", run)
    return run


def test_a_parameter_is_logged_twice_only_where_mlflow_logged_it_in_quotes(tracking, monkeypatch):
    run = waiting_run(tracking, monkeypatch, "parameters", resume="true", check="false", stop="'a b'", seed="0")
    with lifecycle.run("evaluate", parameters.parse("evaluate", "", ["--stop=a b"])):
        pass
    logged = tracking.MlflowClient().get_run(run).data.params
    assert {name: value for name, value in logged.items() if name.startswith("cfg.")} == {"cfg.stop": "a b"}
    assert (logged["resume"], logged["force"]) == ("true", "false")  # by MLflow, and by this project


@pytest.mark.parametrize("ending", ["stopped by SIGINT", "error: out of memory"])
def test_a_run_that_was_named_under_way_tells_what_it_did_and_how_it_ended(tracking, monkeypatch, ending):
    run = waiting_run(tracking, monkeypatch, f"named {ending}")
    read = tracking.MlflowClient().get_run
    error = Stopped(signal.SIGINT, "") if "SIGINT" in ending else Unavailable("out of memory")
    with pytest.raises(type(error)), lifecycle.run("serve", parameters.parse("serve", "", [])):
        run_records.name_run_under_way(run, "serve bot@champion")
        assert read(run).info.run_name == "serve bot@champion"
        raise error
    assert read(run).info.run_name == f"serve bot@champion, {ending}"


def test_the_name_that_a_person_gave_a_run_is_kept_under_way_and_at_the_end(tracking, monkeypatch):
    run = waiting_run(tracking, monkeypatch, "a person's")
    client = tracking.MlflowClient()
    client.update_run(run, name="monday")
    run_records.name_run_under_way(run, "serve bot@champion")
    run_records.name_run(run, "stopped by SIGINT")
    assert client.get_run(run).info.run_name == "monday"
