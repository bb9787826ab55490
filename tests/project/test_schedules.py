"""Evaluation on a schedule: the files in schedules/ before their own validators, and what a start with a slot does.

The commands are taken from these files and run as they stand, with local paths and names in them; only the schedulers
themselves are not started.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.commands import REPOSITORY, Finished, call, in_process, python_with
from support.commands import store as store_of
from support.databases import sqlite_store
from support.python_models import COPIER

from entrypoints import evaluate
from slm.base import parameters
from slm.evaluation import schedule

SCHEDULES = REPOSITORY / "schedules"
AIRFLOW = ("apache-airflow==3.3.2", "apache-airflow-providers-standard==1.21.0")
DAGS = """
import sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1], safe_mode=False)
sys.exit(" ".join(bag.import_errors.values()) or int(list(bag.dags) != ["phi3_evaluate"]))
"""
PROMPTS = 300


# The files


@pytest.fixture(scope="session")
def airflow():
    """A Python with Airflow, whose pins go with none of ours."""
    return python_with("-".join(AIRFLOW).replace("==", "-"), *AIRFLOW)


def systemd(folder: Path, name: str, request) -> str:
    done = call("systemd-analyze", "verify", "--man=no", folder / name)
    return done.out + done.err  # of an unknown key it warns, and exits with 0


def kubernetes(folder: Path, name: str, request) -> str:
    return told(call("kubernetes-validate", "--strict", folder / name))


def json_schema(schema: str):
    return lambda folder, name, request: told(call("check-jsonschema", "--builtin-schema", schema, folder / name))


def airflow_dag(folder: Path, name: str, request) -> str:
    home = {"AIRFLOW_HOME": str(folder / "airflow"), "AIRFLOW__CORE__LOAD_EXAMPLES": "false"}
    python = request.getfixturevalue("airflow")
    return told(call(python, "-c", DAGS, folder / name, cwd=folder, PYTHONPATH="", **home))


def shell(folder: Path, name: str, request) -> str:
    return told(call("sh", "-n", folder / name))


def told(done: Finished) -> str:
    return f"exit code {done.code}\n{done.out}{done.err}" if done.code else ""


@dataclass(frozen=True)
class ScheduleFile:
    """What a file of schedules/ is held to."""

    validator: Callable[..., str]  # of a folder, the name and pytest's request: its complaint; "" where it accepts
    right: str
    wrong: str  # in the place of `right` it is refused
    words: tuple[str, ...] = ()  # no overlap, an end in time, the tracking server from outside
    marks: tuple = ()


FILES = {
    "phi3-evaluate.service": ScheduleFile(
        systemd,
        "TimeoutStartSec=2h",
        "TimeoutStratSec=2h",
        ("Type=oneshot", "TimeoutStartSec=2h", "EnvironmentFile=/etc/phi3-mlflow/environment"),
    ),
    "phi3-evaluate.timer": ScheduleFile(systemd, "03:00:00 UTC", "25:00:00 UTC"),
    "cronjob.yaml": ScheduleFile(
        kubernetes,
        "concurrencyPolicy:",
        "concurencyPolicy:",
        ("concurrencyPolicy: Forbid", "activeDeadlineSeconds: 7200", "secretRef:"),
    ),
    "github-workflow.yaml": ScheduleFile(
        json_schema("vendor.github-workflows"),
        "timeout-minutes:",
        "timeout-minuts:",
        (
            "cancel-in-progress: false",
            "timeout-minutes: 120",
            "MLFLOW_TRACKING_URI: ${{ secrets.MLFLOW_TRACKING_URI }}",
        ),
    ),
    "airflow_dag.py": ScheduleFile(
        airflow_dag,
        "max_active_runs=",
        "max_active_run=",
        ("max_active_runs=1", "execution_timeout=timedelta(hours=2)", "append_env=True"),
        (pytest.mark.slow,),
    ),
    "loop.sh": ScheduleFile(
        shell,
        '--timeout=7200 "$@"',
        '--timeout=7200 "$@',
        ('--slot="$slot"', "--timeout=7200", "${MLFLOW_TRACKING_URI:?"),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=file.marks) for name, file in FILES.items()])
def test_each_file_passes_its_own_validator_and_a_typo_fails_it(tmp_path, request, name):
    for other in ("service", "timer"):  # the timer is verified with its service
        copied = (SCHEDULES / f"phi3-evaluate.{other}").read_text("utf-8")
        (tmp_path / f"phi3-evaluate.{other}").write_text(copied)
    file, text = FILES[name], (SCHEDULES / name).read_text("utf-8")
    (tmp_path / name).write_text(text)
    assert file.validator(tmp_path, name, request) == ""
    assert text.count(file.right) == 1
    (tmp_path / name).write_text(text.replace(file.right, file.wrong))
    assert file.validator(tmp_path, name, request) != ""


def test_every_file_in_schedules_is_validated():
    assert {path.name for path in SCHEDULES.iterdir() if path.is_file()} == set(FILES)


def asked_in(name: str) -> dict[str, str]:
    """The parameters that a file gives to `evaluate`."""
    text = re.sub(r"(?m)^\s*(#|//).*$", "", (SCHEDULES / name).read_text("utf-8"))
    return dict(re.findall(r"(?:-P |--)(\w+)=(\S+?)['\"]*(?=\s|$)", text))


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".timer")])
def test_each_file_pits_the_challenger_against_the_champion_with_parameters_that_there_are(name):
    asked = asked_in(name)
    known = {parameter.name for parameter in parameters.PARAMETERS if "evaluate" in parameter.entry_points}
    assert set(asked) <= known
    assert (asked["model_uris"], asked["baseline"]) == ("models:/phi3@challenger", "models:/phi3@champion")
    assert (asked["thresholds"], asked["alias"]) == ("gates/default.yaml", "champion")
    assert (REPOSITORY / asked["prompts"]).is_file()
    assert "slot" in asked


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.words])
def test_each_file_forbids_overlap_ends_in_time_and_takes_the_server_from_outside(name):
    text = (SCHEDULES / name).read_text("utf-8")
    assert [word for word in FILES[name].words if word not in text] == []


@pytest.mark.fault("schedules: a job of systemd's that may read homes and write anywhere")
def test_the_systemd_unit_writes_into_its_cache_and_its_tmp_alone():
    unit = SCHEDULES / "phi3-evaluate.service"
    lines = unit.read_text("utf-8").splitlines()
    for line in ("ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes", "UMask=0077", "CacheDirectoryMode=0700"):
        assert line in lines
    [folder] = [line.partition("=")[2] for line in lines if line.startswith("CacheDirectory=")]
    assert f"Environment=PHI3_MLFLOW_CACHE=/var/cache/{folder} HOME=/var/cache/{folder}" in lines
    # the threshold is 2.0 of 10, in tenths: the network, kernels compiled at run time, and /proc are left
    done = call("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", unit)
    assert done.code == 0, done.out[-300:]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_git_answers_the_systemd_unit_s_user_in_a_clone_of_root(tmp_path):
    lines = (SCHEDULES / "phi3-evaluate.service").read_text("utf-8").splitlines()
    [given] = [line.removeprefix("Environment=") for line in lines if "GIT_CONFIG" in line]
    folder = Path(tempfile.mkdtemp())  # pytest's own can't be entered by others
    try:
        folder.chmod(0o755)
        clone = folder / "phi3-mlflow"
        assert call("git", "clone", "-q", "--depth=1", f"file://{REPOSITORY}", clone).code == 0
        settings = dict(word.split("=", 1) for word in given.replace("/opt/phi3-mlflow", str(clone)).split())
        for extra, code in ((settings, 0), ({}, 128)):  # without them: dubious ownership
            environment = {"PATH": os.environ["PATH"], "HOME": "/"} | extra
            asked = ["git", "-C", str(clone), "rev-parse", "HEAD"]
            assert subprocess.run(asked, user="nobody", env=environment, capture_output=True).returncode == code
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".timer")])
def test_each_file_says_what_to_replace_and_which_alias_comes_first(name):
    head = " ".join(re.sub(r"(?m)^# ?", "", (SCHEDULES / name).read_text("utf-8"))[:1500].split())
    assert "and phi3 in models:/phi3 by the name" in head or "Replace phi3 in models:/phi3 by the name" in head
    assert 'set_registered_model_alias("phi3", "challenger", "1")' in head
    assert ("There must be a champion" if name == "loop.sh" else "There need be no champion") in head


# What a start with a slot does


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with versions of `copier`.

    1, 2: right on 9 of 10 prompts; 3: on 6; 4: as 1, and moves the alias challenger; 5: as 1, and waits while a file is
    there, a minute at most; 6: as 1, and moves the alias champion.
    """
    import mlflow
    from support.python_models import signature

    folder = tmp_path_factory.mktemp("schedules")
    uri = sqlite_store(folder)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("copiers", artifact_location=str(folder / "artifacts"))
    move = "mlflow.MlflowClient().set_registered_model_alias('copier', '{}', '3')"
    wait = (
        f"[__import__('time').sleep(0.1) for _ in range(600) if __import__('os').path.exists({str(folder / 'wait')!r})]"
    )
    also = ["pass", "'again'", "pass", move.format("challenger"), wait, move.format("champion")]
    for version, line in enumerate(also, 1):
        code = folder / f"model{version}.py"
        code.write_text(COPIER.format(skill=6 if version == 3 else 9, also=line), encoding="utf-8")
        with mlflow.start_run(experiment_id=experiment):
            mlflow.pyfunc.log_model(
                name="copier",
                python_model=str(code),
                pip_requirements=[],
                signature=signature(("string", "prompt", True)),
                registered_model_name="copier",
            )
    rows = [
        {"id": f"q{number}", "prompt": str(number), "expected": str(number), "scorers": ["exact_match"]}
        for number in range(PROMPTS)
    ]
    (folder / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "gate.yaml").write_text("score/mean: {max_drop: 0.05}")
    yield uri, folder
    mlflow.set_tracking_uri(None)


@pytest.fixture
def experiment(store, tmp_path, monkeypatch):
    """An experiment of the test's own, version 1 being the champion and 2 the challenger; gives MLflow's client."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[0])
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    mlflow.set_tracking_uri(store[0])
    mlflow.create_experiment(tmp_path.name, artifact_location=str(tmp_path / "artifacts"))
    client = mlflow.MlflowClient()
    point(client, champion=1, challenger=2)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield client
    for number, handler in handlers.items():
        signal.signal(number, handler)


def point(client, **versions) -> None:
    for alias, version in versions.items():
        client.set_registered_model_alias("copier", alias, str(version))


def version_of(client, alias: str) -> int:
    return int(client.get_model_version_by_alias("copier", alias).version)


def runs(client, name: str, query: str = "") -> list:
    """The runs that starts made, the oldest first, without those below them."""
    found = client.search_runs(
        [client.get_experiment_by_name(name).experiment_id], query, order_by=["attributes.start_time ASC"]
    )
    return [run for run in found if "mlflow.parentRunId" not in run.data.tags]


def options(folder, **given) -> list[str]:
    chosen = {
        "model_uris": "models:/copier@challenger",
        "baseline": "models:/copier@champion",
        "alias": "champion",
        "prompts": folder / "numbers.jsonl",
        "thresholds": folder / "gate.yaml",
        "traces": "false",
        "trust_code": "true",
    }
    return [f"--{name}={value}" for name, value in (chosen | given).items()]


@pytest.fixture
def start(experiment, store, capsys):
    """Starts `evaluate` as a scheduler does; gives the exit code and what was printed."""

    def started(slot: str, **given):
        code = evaluate.main(options(store[1], **given, **({"slot": slot} if slot else {})))
        out, err = capsys.readouterr()
        return code, out + err

    return started


def test_a_slot_that_is_done_is_not_evaluated_and_promotes_nothing(start, experiment, tmp_path):
    code, out = start("night-1")
    assert code == 0 and "copier@champion is now version 2, was 1" in out, out
    point(experiment, champion=1)  # rolled back by hand
    code, out = start("night-1")
    first, second = runs(experiment, tmp_path.name)
    assert code == 0
    assert f"skipped: slot night-1 is done by run {first.info.run_id}, gate: pass; force=true evaluates again" in out
    assert version_of(experiment, "champion") == 1
    assert second.data.tags["unchanged.run"] == first.info.run_id
    code, out = start("night-1", force="true")
    assert code == 0 and "gate: pass" in out and version_of(experiment, "champion") == 2


def test_unchanged_inputs_are_not_evaluated_again_and_keep_their_verdict(start, experiment, tmp_path, store):
    point(experiment, challenger=3)
    models = len(experiment.search_logged_models(["0", experiment.get_experiment_by_name("copiers").experiment_id]))
    assert start("night-1")[0] == 3
    code, out = start("night-2")
    first, second = runs(experiment, tmp_path.name)
    assert code == 3
    told = (
        f"unchanged: slot night-2 has the inputs of run {first.info.run_id}, gate: regress; force=true evaluates again"
    )
    assert out.strip() == told
    assert second.info.status == "FINISHED"
    wanted = {"gate": "regress", "slot": "night-2", "unchanged.run": first.info.run_id}
    assert second.data.tags.items() >= wanted.items()
    below = experiment.search_runs([second.info.experiment_id], f"tags.`mlflow.parentRunId` = '{second.info.run_id}'")
    assert below == []
    code, out = start("night-3")
    assert f"run {first.info.run_id}" in out  # the one that has the figures
    code, out = start("night-4", force="true")
    assert code == 3 and "unchanged: slot" not in out and "gate: regress" in out
    others = experiment.get_experiment_by_name(tmp_path.name).experiment_id
    assert experiment.search_logged_models([others]) == []  # no weights are logged again
    assert (
        len(experiment.search_logged_models(["0", experiment.get_experiment_by_name("copiers").experiment_id]))
        == models
    )


@pytest.mark.parametrize("change", ["challenger", "baseline", "prompts", "thresholds", "max_tokens"])
def test_a_change_in_the_inputs_is_evaluated(start, experiment, tmp_path, store, change):
    point(experiment, challenger=3)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((store[1] / "numbers.jsonl").read_text().splitlines(keepends=True)[:200]))
    assert start("night-1", prompts=few)[0] == 3
    given = {"prompts": few}
    if change in ("challenger", "baseline"):
        point(experiment, **{change.replace("baseline", "champion"): 2})
    elif change == "prompts":
        few.write_text("".join(few.read_text().splitlines(keepends=True)[:150]))
    elif change == "thresholds":
        given["thresholds"] = tmp_path / "gate.yaml"
        given["thresholds"].write_text("score/mean: {max_drop: 0.06}")
    else:
        given["max_tokens"] = 65
    _, out = start("night-2", **given)
    assert "unchanged" not in out and "gate: " in out


def test_a_start_by_hand_always_evaluates(start, experiment, tmp_path):
    point(experiment, challenger=3)
    for _ in range(2):
        code, out = start("")
        assert code == 3 and "gate: regress" in out
    tags = [run.data.tags for run in runs(experiment, tmp_path.name)]
    assert len(tags) == 2 and not any(key.startswith("slot") for found in tags for key in found)


def test_the_version_that_is_promoted_is_the_one_that_the_alias_named_at_the_start(start, experiment, tmp_path):
    point(experiment, challenger=4)
    code, out = start("night-1")
    assert code == 0, out
    assert (version_of(experiment, "challenger"), version_of(experiment, "champion")) == (3, 4)


def test_a_slot_that_broke_off_is_evaluated_by_the_next_start(start, experiment, tmp_path):
    point(experiment, challenger=6)
    code, out = start("night-1")
    assert code == 4 and "nothing was moved" in out
    point(experiment, champion=1)
    code, out = start("night-1")
    assert code == 0 and version_of(experiment, "champion") == 6, out
    broken, done = runs(experiment, tmp_path.name)
    assert (broken.info.status, done.info.status) == ("FAILED", "FINISHED")


def test_a_slot_without_a_named_model_and_one_that_is_none_are_refused(start, capsys):
    assert start("night-1", model_uris="", baseline="", alias="")[0] == 2
    code, out = start("night one")
    assert code == 2 and "slot: 'night one' can't be one; write letters" in out


@pytest.mark.slow
def test_a_second_start_while_one_runs_is_skipped_on_this_host_and_elsewhere(
    start, experiment, tmp_path, store, monkeypatch
):
    point(experiment, challenger=5)
    gate = store[1] / "wait"
    gate.touch()
    command = [sys.executable, "-m", "entrypoints.evaluate", *options(store[1], slot="night-1")]
    first = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while (
            len(children := experiment.search_runs([experiment.get_experiment_by_name(tmp_path.name).experiment_id]))
            < 2
        ):
            assert first.poll() is None and time.monotonic() < deadline, children
            time.sleep(0.2)
        code, out = start("night-2")
        told = "skipped: models:/copier@challenger is being evaluated on this host; slot night-2 is left alone"
        assert (code, out.strip()) == (0, told)
        [running] = runs(experiment, tmp_path.name)  # no run of its own, and the other's is as it was
        assert running.info.status == "RUNNING" and running.data.tags["slot"] == "night-1"

        made = experiment.create_run(running.info.experiment_id)  # as `mlflow run` makes one
        with monkeypatch.context() as environment:
            environment.setenv("MLFLOW_RUN_ID", made.info.run_id)
            assert start("night-2")[0] == 0
        tags = experiment.get_run(made.info.run_id).data.tags
        assert (tags["skipped"], tags["gate"], tags["mlflow.runName"]) == (told, "none", told)
        experiment.delete_run(made.info.run_id)

        monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "elsewhere"))  # another host has no lock of this one
        code, out = start("night-2")
        assert code == 0
        assert f"is being evaluated in run {running.info.run_id}; slot night-2 is left alone" in out
        assert version_of(experiment, "champion") == 1
    finally:
        gate.unlink()
        out, _ = first.communicate(timeout=120)
    assert first.returncode == 0, out
    assert version_of(experiment, "champion") == 5
    _, other = runs(experiment, tmp_path.name)
    assert other.info.status == "FINISHED" and other.data.tags["gate"] == "none"


def test_the_inputs_are_everything_that_a_verdict_depends_on():
    args = parameters.parse("evaluate", "", ["--model_uris=models:/copier/2", "--slot=night-1"])
    machine = {"packages": {"mlflow": "3.17.2"}, "code.sha256": "c", "git_commit": "a"}
    given = {"args": args, "models": ["m"], "prompts": "p", "thresholds": (), "scorers": "s", "machine": machine}

    def with_(**changed):
        return schedule.inputs_sha256(**(given | changed))

    def other(**changed):
        return parameters.Parameters(**(vars(args) | changed))

    same = with_()
    mapped = {"fields": "question:prompt", "expected_pattern": r"\d"}  # the hash of the prompts has what they give
    for name, value in {"slot": "night-2", "force": True, "resume": False, "traces": False, **mapped}.items():
        assert with_(args=other(**{name: value})) == same, name
    assert with_(machine=machine | {"git_commit": "b"}) == same  # the code is known by its content
    changed = {
        "models": ["n"],
        "prompts": "q",
        "thresholds": (1,),
        "scorers": "t",
        "args": other(seed=1),
        "machine": machine | {"packages": {"mlflow": "3.18.0"}},
    }
    assert (
        len({same, with_(machine=machine | {"code.sha256": "d"}), *(with_(**{k: v}) for k, v in changed.items())}) == 8
    )


def test_a_model_folder_is_known_by_its_content_and_an_endpoint_never(tmp_path):
    (tmp_path / "MLmodel").write_text("a")
    before = schedule.identity(str(tmp_path))
    (tmp_path / "MLmodel").write_text("b")
    assert schedule.identity(str(tmp_path)) != before
    assert schedule.identity("http://127.0.0.1:1/v1#phi3") == ""


def test_the_command_of_the_page_evaluates_as_the_files_do():
    page = (REPOSITORY / "docs" / "schedules.md").read_text("utf-8")
    [command] = re.findall(r"^mlflow run .* -P slot=.*$", page, re.MULTILINE)
    option = re.compile(r"""(?:-P |--)((?:model_uris|baseline|prompts|thresholds|alias)=[^\s"']+)""")
    for name in ("phi3-evaluate.service", "cronjob.yaml", "github-workflow.yaml", "airflow_dag.py"):
        assert sorted(option.findall((SCHEDULES / name).read_text("utf-8"))) == sorted(option.findall(command)), name


def test_the_page_s_lines_tell_a_typo_from_a_regress(tmp_path, capsys):
    """The typo ends the run that `mlflow run` made, before this project opens the run."""
    import mlflow

    page = (REPOSITORY / "docs" / "schedules.md").read_text("utf-8")
    [lines] = re.findall(r"(?s)```python\n(.*?)```", page)
    [slot] = re.findall(r"slot = '(\S+)'", lines)
    uri = sqlite_store(tmp_path)
    client = mlflow.MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("nights")).info.run_id
    client.log_param(run_id, "slot", shlex.quote(slot))
    done = in_process("evaluate", "--promts=x", f"--slot={slot}", MLFLOW_RUN_ID=run_id, MLFLOW_TRACKING_URI=uri)
    assert done.code == 2
    with store_of({"MLFLOW_TRACKING_URI": uri}):
        exec(lines, {})
    line = "promts: there is no such parameter; did you mean prompts?"
    assert capsys.readouterr().out == f"error: {line} None {line}\n"
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == f"**error**\n\n    {line}\n"  # on its page


# The files' commands, run


def local(command: str, folder) -> str:
    """A schedule's command with this machine's paths and the names of the test's models."""
    names = {
        "models:/phi3@": "models:/copier@",
        "prompts/general.jsonl": str(folder / "numbers.jsonl"),
        "gates/default.yaml": str(folder / "gate.yaml"),
        ".venv/bin/python": sys.executable,
    }
    for there, here in names.items():
        assert there in command or there.startswith(".venv"), there
        command = command.replace(there, here)
    command = command.replace(
        "entrypoints.evaluate", "entrypoints.evaluate --trust_code=true"
    )  # the models are others'
    return command.replace("-P slot=", "-P trust_code=true -P slot=")


@pytest.mark.slow
def test_the_timer_s_command_over_two_nights_promotes_one_model_and_fails_the_one_that_got_worse(
    experiment, store, tmp_path
):
    service = (SCHEDULES / "phi3-evaluate.service").read_text("utf-8").replace("\\\n", " ")
    [line] = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    shell, flag, command = shlex.split(local(line, store[1]).replace("%%", "%"))  # as systemd reads it

    def night(day: str):
        clock = tmp_path / day / "date"
        clock.parent.mkdir()
        clock.write_text(f'#!/bin/sh\nexec /bin/date -d "{day} 03:00 UTC" "$@"\n')
        clock.chmod(0o755)
        return call(shell, flag, command, PATH=f"{clock.parent}{os.pathsep}{os.environ['PATH']}")

    first = night("2026-11-22")
    assert first.code == 0, first.out + first.err
    assert version_of(experiment, "champion") == 2
    point(experiment, challenger=3)
    second = night("2026-11-23")
    assert second.code == 3, second.out + second.err
    assert version_of(experiment, "champion") == 2
    [failed] = runs(experiment, tmp_path.name, "tags.gate = 'regress' and tags.slot = '2026-11-23'")
    assert failed.data.tags["slot.verdict"] == "regress"
    [passed] = runs(experiment, tmp_path.name, "tags.gate = 'pass' and tags.slot LIKE '2026-11-%'")
    assert passed.info.status == failed.info.status == "FINISHED"


@pytest.mark.slow
def test_the_workflow_s_command_ends_with_1_and_the_verdict_is_found_by_its_tag(experiment, store, tmp_path):
    workflow = yaml.safe_load((SCHEDULES / "github-workflow.yaml").read_text("utf-8"))
    [step] = [step for step in workflow["jobs"]["evaluate"]["steps"] if step.get("name") == "Evaluate"]
    command = local(step["run"], store[1]).replace("verdict.txt", str(tmp_path / "verdict.txt"))
    point(experiment, challenger=3)
    bash = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")  # as GitHub starts it
    done = call(*bash, command, SLOT="github-1", FORCE="false")
    assert done.code == 1, done.out + done.err
    assert "gate: regress" in (tmp_path / "verdict.txt").read_text()
    assert version_of(experiment, "champion") == 1
    [failed] = runs(experiment, tmp_path.name, "tags.gate = 'regress' and tags.slot = 'github-1'")
    assert failed.info.status == "FAILED"
    done = call(*bash, command, SLOT="github-1", FORCE="false")  # "Re-run jobs"
    assert done.code == 1
    assert f"skipped: slot github-1 is done by run {failed.info.run_id}, gate: regress" in done.out
