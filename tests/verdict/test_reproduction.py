"""A run can be done again from its record, and `compare` names first what two runs differ in."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.commands import REPOSITORY, ended, in_process, started
from support.databases import sqlite_store

from entrypoints import compare, evaluate
from slm.base import console, environment
from slm.models import model_logging
from slm.verdict import reproduction
from slm.verdict.scored_model import ScoredModel

ROWS = [
    {"id": name, "prompt": f"What is the capital of {name}?", "expected": city, "scorers": ["contains"]}
    for name, city in (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"))
]


# ---------------------------------------------------------------------------------------------------------------------
# One thing changed at a time


def write_prompts(file, **changes):
    """The rows, with the fields of one (by id) changed."""
    rows = [row | changes.get(row["id"], {}) for row in ROWS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def other_template(export, folder):
    """An export whose chat template says more, and is else the same."""
    from slm.base import cache
    from slm.models import chat_model, checkpoints

    folder.mkdir()
    for name in export.manifest:
        (folder / name).symlink_to(export.folder / name)
    text = chat_model.read_chat_template(export.folder)[0]
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(f"Be brief. {text}", encoding="utf-8")
    return checkpoints.rebuilt(replace(export, folder=folder, manifest=cache.manifest_of(folder)))


@pytest.fixture(scope="module")
def store(tmp_path_factory, int4_export, fp32_export):
    """A store with three logged models, and the id of a run of the first on three prompts."""
    import mlflow
    from support.questions import GENERATION

    from slm.models import model_logging

    folder = tmp_path_factory.mktemp("reproduction")
    uri = sqlite_store(folder)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("reproduction", artifact_location=str(folder / "artifacts"))
    with mlflow.start_run(experiment_id=experiment):
        models = {
            "int4": model_logging.log_onnx(int4_export, "chat", GENERATION, "int4"),
            "fp32": model_logging.log_onnx(fp32_export, "chat", GENERATION, "fp32"),
            "template": model_logging.log_onnx(
                other_template(int4_export, folder / "template"), "chat", GENERATION, "int4"
            ),
        }
    write_prompts(folder / "rows.jsonl")
    yield SimpleNamespace(uri=uri, folder=folder, models={name: found.model_uri for name, found in models.items()})
    mlflow.set_tracking_uri(None)


@pytest.fixture
def run(store, tmp_path, monkeypatch, capsys):
    """Runs `evaluate` on the int4 model and the three prompts, or as told otherwise; gives its run's id."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "reproduction")
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    mlflow.set_tracking_uri(store.uri)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def evaluated(**options) -> str:
        code = evaluate.main(arguments(store, **options))
        out, err = capsys.readouterr()
        assert code == 0, out + err
        return re.search(r"run: (\w+)", out)[1]

    yield evaluated
    for number, handler in handlers.items():
        signal.signal(number, handler)


def arguments(store, **options) -> list[str]:
    given = {"model_uris": store.models["int4"], "prompts": store.folder / "rows.jsonl", "max_tokens": 6}
    return [f"--{name}={value}" for name, value in (given | {"traces": "false", "resume": "false"} | options).items()]


@pytest.fixture(scope="module")
def first():
    return {}  # the first run's id, once it is made


def compared(capsys, *run_ids) -> tuple[int, str]:
    code = compare.main([*run_ids])
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "named", "code"),
    [
        ({}, "the fingerprints are equal", 0),
        ({"max_tokens": 3}, "parameters.max_tokens", 3),
        ({"max_tokens": 9, "stop": "["}, "parameters.max_tokens", 3),
        ({"batch_size": 1}, "parameters.batch_size; the answers and scores are still byte-identical", 0),
        ({"seed": 5}, "parameters.seed; the answers and scores are still byte-identical", 0),
        ({"repeats": 2}, "parameters.repeats", 3),
        ({"model_uris": "fp32"}, "model.precision", None),
        ({"model_uris": "template"}, "template.chat_template.sha256", 3),
        ({"prompts": {"Italy": {"prompt": "Name a colour."}}}, "prompts.sha256 (1 of 3: Italy)", 3),
        ({"prompts": {"Italy": {"expected": "Paris", "scorers": ["exact_match"]}}}, "scorers.sha256", 3),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_compare_names_what_was_changed_first(run, first, store, tmp_path, capsys, changed, named, code):
    if not first:
        first["id"] = run()
    options = dict(changed)
    if "model_uris" in options:
        options["model_uris"] = store.models[options["model_uris"]]
    if "prompts" in options:
        options["prompts"] = write_prompts(tmp_path / "changed.jsonl", **options["prompts"])
    found, out = compared(capsys, first["id"], run(**options))
    assert re.search(rf"3 answers: (first difference: )?{re.escape(named)}", out), out
    assert code is None or found == code


@pytest.mark.slow
def test_sampled_answers_are_the_same_bytes_when_they_are_done_again(run, capsys):
    code, out = compared(capsys, *(run(temperature=1.5, seed=3, repeats=2) for _ in range(2)))
    assert code == 0 and "6 answers: the fingerprints are equal" in out, out


@pytest.mark.slow
def test_compare_shows_both_texts_of_an_answer_that_differs_and_the_scores(run, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 200)
    prompts = write_prompts(tmp_path / "changed.jsonl", Italy={"prompt": "What is the capital of Spain?"})
    code, out = compared(capsys, run(), run(prompts=prompts))
    assert code == 3
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [line[0] for line in lines][:4] == [
        "prompts.sha256 (1 of 3: Italy)",
        "rendered prompts (1 of 3: Italy)",
        "token ids (1 of 3: Italy)",
        "answers (1 of 3: Italy)",
    ]
    assert lines[4][0] == "Italy" and lines[4][1] != lines[4][2]


@pytest.mark.slow
def test_compare_names_changed_constraints_and_code_first(run, store, tmp_path, capsys):
    copy, ids = tmp_path / "copy", []
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in filter(lambda name: (REPOSITORY / name).is_file(), listed.stdout.splitlines()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, copy / name)
    changes = (("constraints.txt", "environment.constraints.sha256"), ("slm/base/console.py", "code.sha256"))
    for file in (None, *(file for file, _ in changes)):  # each run has one change more than the run before it
        if file:
            (copy / file).write_text((copy / file).read_text("utf-8") + "# changed\n", encoding="utf-8")
        done = ended(started("evaluate", *arguments(store), cwd=copy), 600)
        assert done.code == 0, done.err
        ids.append(re.search(r"run: (\w+)", done.out)[1])
    for place, (_, named) in enumerate(changes):
        code, out = compared(capsys, *ids[place : place + 2])
        assert code == 0
        assert f"first difference: {named}; the answers and scores are still byte-identical" in out


@pytest.mark.parametrize(
    ("run_ids", "line"),
    [
        ((), "error: compare: takes two run ids, got none"),
        (("a", "b", "c"), "error: compare: takes two run ids, got a b c"),
        (("a", "--b=c"), "error: compare: takes two run ids, got a --b=c"),
        (("nobody", "none"), "error: compare: runs:/nobody/evaluation/environment.json can't be downloaded"),
    ],
)
def test_compare_tells_a_mistake_in_one_line(tmp_path, run_ids, line):
    done = in_process("compare", *run_ids, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert done.code == 2
    assert done.err.startswith(line) and done.err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is promised, and recorded


def model(sha256="0" * 64, **used):
    record = {"used": {"device": "cpu", "dtype": "fp32"} | used, "template": {"tells_date": False}}
    return SimpleNamespace(
        label="pipeline", uri="models:/m-1", sha256=sha256, identity="", code_sha256="", record=record
    )


def promised(model, judged=False) -> str:
    described = environment.describe()
    asked = {"code": {}, "environment": {}, "prompts": {}, "parameters": {"batch_size": 0}, "scorers": {}}
    return reproduction.record(described, asked, ScoredModel(model, (), {}, {}, 0), judged)["reproducible"]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model(device="cuda:0"), "it ran on cuda:0"),
        (model(dtype="bf16"), "bf16 rounding depends on the other prompts in the batch"),
        (model(dtype="fp16"), "fp16 rounding depends on the other prompts in the batch"),
        (model(sha256=""), "an endpoint answered"),
        (SimpleNamespace(**vars(model()) | {"record": {}}), "the model runs code of its own"),
        (
            SimpleNamespace(**vars(model()) | {"record": model().record | {"template": {"tells_date": True}}}),
            "its chat template tells the date",
        ),
    ],
)
def test_where_the_same_bytes_cannot_be_promised_the_record_says_why(model, reason):
    assert promised(model) == f"statistically comparable: {reason}"


def test_on_a_cpu_in_whole_or_quantized_precision_the_same_bytes_are_promised_unless_a_judge_scores():
    assert promised(model()) == promised(model(dtype="int4")) == "byte-identical on the same kind of CPU"
    assert promised(model(), judged=True) == "statistically comparable: a judge scored the answers"


def test_the_command_names_what_an_alias_stood_for_and_promotes_nothing():
    records = [{"known_as": {"uri": f"models:/phi3/{version}"}} for version in (7, 6)]
    given = {
        "model_uris": "models:/phi3@new",
        "baseline": "models:/phi3@champion",
        "alias": "champion",
        "stop": "a b",
        "fields": "question:prompt,answer:expected",
        "expected_pattern": "#### (.+)",
        "max_tokens": "64",
        "resume": "True",
    }
    tags = {"mlflow.source.git.repoURL": "git://host/p", "mlflow.source.git.commit": "c0ffee"}
    command = reproduction.again(tags, given, {"max_tokens": "64", "stop": ""}, records, 1)
    assert shlex.split(command) == [
        *("mlflow", "run", "git://host/p", "-v", "c0ffee", "--env-manager", "local", "-e", "main"),
        *("-P", "model_uris=models:/phi3/7", "-P", "baseline=models:/phi3/6"),
        *("-P", "stop=a b", "-P", "fields=question:prompt,answer:expected", "-P", "expected_pattern=#### (.+)"),
        *("-P", "resume=false"),
    ]


def test_the_record_of_this_machine_names_its_cpu_and_every_package_that_the_project_needs():
    described = environment.describe()
    assert described["cpu"] and described["cores"] >= 1
    assert {"mlflow", "torch", "onnxruntime-genai", "mlflow-skinny"} <= described["needed"].keys()
    assert "pytest" in described["packages"] and "pytest" not in described["needed"]
    assert re.fullmatch("[0-9a-f]{64}", described["code.sha256"])


@pytest.fixture
def cuda_builds(tmp_path, monkeypatch):
    """An environment with onnxruntime's CUDA builds in the place of the usual ones, as far as its metadata tells."""
    builds = {"onnxruntime": ("onnxruntime-gpu", "1.31.1"), "onnxruntime-genai": ("onnxruntime-genai-cuda", "0.18.0")}
    for name, version in builds.values():
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: numpy\n"
        (folder / "METADATA").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    told = environment._told
    told.cache_clear()
    monkeypatch.setattr(environment, "_told", lambda name: None if name in builds else told(name))
    yield
    told.cache_clear()


def test_the_cuda_builds_of_onnxruntime_are_found_under_their_own_names(cuda_builds, tmp_path):
    assert environment.installed_as("onnxruntime-genai") == "onnxruntime-genai-cuda"
    assert environment.installed_as("numpy") == "numpy"
    assert environment.version("onnxruntime") == "1.31.1"
    logged = model_logging.requirements("onnx", tmp_path)
    assert logged[1:3] == ["onnxruntime-genai-cuda==0.18.0", "onnxruntime-gpu[cuda,cudnn]==1.31.1"]
    found = environment.closure(map(environment.installed_as, environment.CUDA_BUILDS))
    assert {"onnxruntime-gpu", "onnxruntime-genai-cuda", "numpy"} <= found.keys()
    assert environment.differing(["onnxruntime==1.31.1", "onnxruntime-gpu[cuda,cudnn]==1.31.1"]) == []


def test_where_both_builds_are_installed_the_usual_names_hold():
    assert environment.installed_as("onnxruntime-genai") == "onnxruntime-genai"
    assert environment.version("onnxruntime-genai") == model_logging.importlib.metadata.version("onnxruntime-genai")


def test_gpus_are_read_from_what_nvidia_smi_prints():
    listed = "NVIDIA H200, 570.86.15, 143771 MiB\nNVIDIA H200, 570.86.15, 143771 MiB\n"
    told = "Driver Version                  : 570.86.15\nCUDA Version                    : 12.8\n"
    one = {"name": "NVIDIA H200", "driver": "570.86.15", "memory": "143771 MiB", "cuda": "12.8"}
    assert environment.gpus_of(listed, told) == [one, one]
    assert environment.gpus_of("No devices were found", "") == []
