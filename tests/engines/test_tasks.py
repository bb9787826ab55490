"""Tasks of lm-evaluation-harness: read, answered by logged models, scored; against the library's own `hf` model."""

import contextlib
import io
import json
import signal
import time

import numpy as np
import pytest
from support import harness
from support.commands import REPOSITORY, entry_point, started

from entrypoints import evaluate
from slm.base.errors import BadInput
from slm.engines.tasks import reading

SCIENCE, WORDS = "prompts/tasks/science.yaml", "prompts/tasks/word-problems.yaml"
CHOICES = 8  # documents of SCIENCE that are compared with the library's own model
TEXTS = 2  # documents of WORDS

DOCUMENTS = [{"q": f"Is {number} even?", "a": ["no", "yes"][number % 2 == 0]} for number in range(4)]


def task_file(folder, name="small", documents=DOCUMENTS, **changes):
    """A YAML file of a task over documents of its own."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data.name}},  # beside the YAML file
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{['yes', 'no'].index(a)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return str(path)


def run(store, experiment, folder, **options):
    """(exit code, what was printed, the child runs' samples by label, their metrics by label, the parent run)"""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        patch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
        patch.setenv("PHI3_MLFLOW_CACHE", str(folder / "cache"))
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(store)
        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(experiment)
        found = found.experiment_id if found else mlflow.create_experiment(experiment, f"{folder}/artifacts")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = evaluate.main([f"--{name}={value}" for name, value in ({"traces": "false"} | options).items()])
        runs = client.search_runs([found], order_by=["attributes.start_time DESC"])
        parent = next(one for one in runs if "mlflow.parentRunId" not in one.data.tags)
        children = [one for one in runs if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        samples, metrics = {}, {}
        for child in children:
            if child.data.metrics:
                text = mlflow.artifacts.load_text(f"{child.info.artifact_uri}/evaluation/samples.jsonl")
                label = child.info.run_name
                samples[label] = [json.loads(line) for line in text.splitlines()]
                metrics[label] = child.data.metrics
        mlflow.set_tracking_uri(before)
    return code, printed.getvalue(), samples, metrics, parent


@pytest.fixture(scope="module")
def theirs(checkpoint):
    """The library's results with its own model of transformers."""
    science = harness.evaluated(checkpoint.folder, SCIENCE, CHOICES)
    words = harness.evaluated(checkpoint.folder, WORDS, TEXTS)
    return {name: found[name] | words[name] for found in [science] for name in ("results", "samples")}


@pytest.fixture(scope="module")
def ours(wrappers, tmp_path_factory):
    """Both tasks with the pipeline and the ONNX fp32 model, as `evaluate` leaves them."""
    folder = tmp_path_factory.mktemp("tasks")
    uri, uris = wrappers
    options = {"model_uris": uris["onnx fp32"], "baseline": uris["pipeline"]}
    science = run(uri, "science", folder, tasks=SCIENCE, limit=CHOICES, **options)
    words = run(uri, "words", folder, tasks=WORDS, limit=TEXTS, fidelity="off", **options)
    return {"science": science, "word-problems": words}


@pytest.mark.parametrize("form", ["pipeline", "onnx fp32"])
def test_every_choice_is_the_one_of_the_librarys_own_model(wrappers, ours, theirs, form):
    samples = ours["science"][2][wrappers[1][form]]
    assert [sample["id"] for sample in samples] == [f"science/{number}" for number in range(CHOICES)]
    for sample, example in zip(samples, theirs["samples"]["science"], strict=True):
        values = [response[0][0] for response in example["resps"]]
        assert sample["output"] == example["arguments"][int(np.argmax(values))][1].strip()
        assert sample["scores"] == {f"science/{name}": example[name] for name in ("acc", "acc_norm")}
        told = sample["reasons"]["science/acc"].removeprefix("log probabilities: ")
        assert [float(one) for one in told.split(", ")] == pytest.approx(values, abs=6e-4)  # told to three places


@pytest.mark.parametrize("form", ["pipeline", "onnx fp32"])
def test_the_metrics_are_those_of_the_librarys_own_model(wrappers, ours, theirs, form):
    science, words = (ours[name][3][wrappers[1][form]] for name in ("science", "word-problems"))
    found = theirs["results"]
    assert science["science/acc/mean"] == pytest.approx(found["science"]["acc,none"])
    assert science["science/acc_norm/mean"] == pytest.approx(found["science"]["acc_norm,none"])
    assert science["science/acc/ci95_low"] < science["science/acc/mean"] < science["science/acc/ci95_high"]
    for name in ("strict-match", "flexible-extract"):
        figure = words[f"word-problems/exact_match/{name}/mean"]
        assert figure == pytest.approx(found["word-problems"][f"exact_match,{name}"])


@pytest.mark.parametrize("form", ["pipeline", "onnx fp32"])
def test_every_generated_text_is_the_one_of_the_librarys_own_model(wrappers, ours, theirs, form):
    samples = ours["word-problems"][2][wrappers[1][form]]
    listed = [one for one in theirs["samples"]["word-problems"] if one["filter"] == "strict-match"]
    assert [sample["output"] for sample in samples] == [one["resps"][0][0] for one in listed]
    assert all(sample["output_tokens"] and sample["finish_reason"] == "stop" for sample in samples)


@pytest.mark.parametrize("templated", [False, True])
def test_log_probabilities_are_those_of_the_librarys_own_model(wrappers, checkpoint, loaded_wrappers, templated):
    limit = 2
    found = harness.evaluated(checkpoint.folder, SCIENCE, limit, templated)
    expected = [[response[0] for response in one["resps"]] for one in found["samples"]["science"]]
    for form in ("pipeline", "onnx fp32"):
        mine = harness.ours(loaded_wrappers[form], SCIENCE, limit, templated)
        for one, values in zip(mine["samples"]["science"], expected, strict=True):
            seen = [response[0] for response in one["resps"]]
            assert [value for value, _ in seen] == pytest.approx([value for value, _ in values], abs=1e-4)
            assert [greedy for _, greedy in seen] == [greedy for _, greedy in values]


def test_a_comparison_has_pairs_fidelity_and_a_page(wrappers, ours):
    code, printed, _, metrics, parent = ours["science"]
    found = metrics[wrappers[1]["onnx fp32"]]
    assert code == 0
    assert found["difference/science/acc/mean"] == 0 == found["flips/worse/mean"]
    assert 0 <= found["fidelity/kl/mean"] < 1e-4 and found["fidelity/top1/mean"] == 1
    assert "science/acc (8)" in printed and parent.data.params["tasks"] == SCIENCE
    assert parent.data.tags["mlflow.runName"].endswith("on science")


def test_a_killed_run_goes_on_where_it_stopped(wrappers, tmp_path):
    import mlflow

    uri, uris = wrappers
    options = [f"--tasks={SCIENCE},{WORDS}", "--limit=3", f"--model_uris={uris['onnx int4']}", "--traces=false"]
    names = {"MLFLOW_TRACKING_URI": uri, "PHI3_MLFLOW_CACHE": str(tmp_path), "MLFLOW_EXPERIMENT_NAME": "killed tasks"}
    process = started("evaluate", *options, **names)
    while not any(len(file.read_text("utf-8").splitlines()) >= 13 for file in tmp_path.glob("answers/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [line for file in tmp_path.glob("answers/*.jsonl") for line in file.read_text("utf-8").splitlines()]
    done = entry_point("evaluate", *options, **names)
    files = tmp_path.glob("answers/*.jsonl")
    whole = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    assert done.code == 0, done.err
    assert f": {len(kept)} of 15 requests are reused" in done.out
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("killed tasks").experiment_id
    [scored] = [run for run in client.search_runs([experiment]) if "rows_cut" in run.data.metrics]
    measured = ("latency_seconds", "output_tokens_per_second", "peak_memory_bytes")
    assert not [name for name in scored.data.metrics if name.startswith(measured)]
    assert sum("asked" in line for line in whole) == 15  # 12 choices and 3 texts, and none asked twice


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--engine=spark", "tasks: are answered in this process, and not with engine=spark; leave engine local"),
        ("--max_tokens=9", "max_tokens: a task has its own max_gen_toks; leave it out beside tasks"),
        ("--prompts=x.jsonl", "prompts: a task has documents of its own; leave it out beside tasks"),
        ("--scorers=contains", "scorers: a task has its own metrics; leave it out beside tasks"),
        ("--tasks=no.yaml", "tasks: 'no.yaml' does not exist, from the repository's root or from here"),
    ],
)
def test_what_does_not_go_with_tasks_is_one_line(option, line):
    from slm.base import parameters
    from slm.engines import engine as engines

    args = parameters.parse("evaluate", "", [f"--tasks={SCIENCE}", option])
    with pytest.raises(BadInput) as raised:
        engine = engines.chosen(args)
        engine.check(args)
        engine.read_prompts(args)
    assert str(raised.value) == line


def test_a_task_that_asks_for_log_probabilities_refuses_an_endpoint_before_it_is_asked():
    from slm.base import parameters
    from slm.engines import engine as engines

    args = parameters.parse("evaluate", "", [f"--tasks={SCIENCE}", "--model_uris=http://127.0.0.1:9/v1#m"])
    with pytest.raises(BadInput, match="science asks for log probabilities, which only a model of this project gives"):
        engines.chosen(args).read_prompts(args)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unsafe_code": True}, "small runs code that the model writes"),
        (
            {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}},
            "data file 'gone.jsonl', which does not exist",
        ),
        ({"output_type": "guess"}, "can't be read: ValueError"),
        ({"task": None}, "names no `task`"),
    ],
)
def test_a_wrong_task_file_is_one_line(tmp_path, changes, said):
    with pytest.raises(BadInput) as raised:
        reading.read(task_file(tmp_path, **changes))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_document_is_a_prompt_and_the_limit_and_the_content_make_the_hash(tmp_path):
    path = task_file(tmp_path)
    whole, part = reading.read(path), reading.read(path, limit=2)
    assert [prompt.id for prompt in whole.prompts] == [f"small/{number}" for number in range(4)]
    assert whole.prompts[1].expected == ("no",) and whole.scorer_names == {"small/acc"}
    assert part.count == 2 and part.sha256 != whole.sha256 == reading.read(path).sha256


def test_the_ready_made_questions_have_one_right_answer_each():
    lines = (REPOSITORY / "prompts/tasks/science.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 100 == len({row["question"] for row in rows})
    assert all(len(set(row["choices"])) == 4 and row["choices"].count(row["answer"]) == 1 for row in rows)
    places = [row["choices"].index(row["answer"]) for row in rows]
    assert [places.count(place) for place in range(4)] == [25] * 4
