"""`evaluate` on registered versions of a model whose skill is known: the gate, the alias, reuse, repeats, history."""

import json
import re
import signal

import pytest
from support.commands import REPOSITORY
from support.databases import sqlite_store
from support.python_models import COPIER

from entrypoints import evaluate, rollback

PROMPTS = 300
MOVE = "mlflow.MlflowClient().set_registered_model_alias('copier', 'champion', '3')"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with versions of `copier`: 1 and 2 right on 9 of 10 prompts, 3 on 6, 4 as 1, but it moves the alias."""
    import mlflow
    from support.python_models import signature

    folder = tmp_path_factory.mktemp("evaluation")
    uri = sqlite_store(folder)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("copiers", artifact_location=str(folder / "artifacts"))
    for version, (skill, also) in enumerate([(9, "pass"), (9, "'again'"), (6, "pass"), (9, MOVE)], 1):
        code = folder / f"model{version}.py"
        code.write_text(COPIER.format(skill=skill, also=also), encoding="utf-8")
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
    prompts = folder / "numbers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    yield uri, prompts
    mlflow.set_tracking_uri(None)


@pytest.fixture
def run(store, tmp_path, monkeypatch, capsys):
    """Runs `evaluate` on versions of copier; gives its exit code, what it printed, and its runs by label."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[0])
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    mlflow.set_tracking_uri(store[0])
    mlflow.create_experiment(tmp_path.name, artifact_location=str(tmp_path / "artifacts"))
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("copier", "champion", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def evaluated(versions: str, **options):
        uris = ",".join(f"models:/copier/{version}" for version in versions)
        options = {"model_uris": uris, "prompts": store[1], "traces": "false", "trust_code": "true"} | options
        code = evaluate.main([f"--{name}={value}" for name, value in options.items()])
        out, err = capsys.readouterr()
        found = re.search(r"run: (\w+)", out)
        query = f"tags.`mlflow.parentRunId` = '{found[1] if found else ''}'"
        children = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id], query)
        return code, out + err, {child.info.run_name: child for child in children}

    yield evaluated
    for number, handler in handlers.items():
        signal.signal(number, handler)


def champion() -> str:
    import mlflow

    return str(mlflow.MlflowClient().get_model_version_by_alias("copier", "champion").version)


AGAINST_CHAMPION = {"baseline": "models:/copier@champion", "alias": "champion"}


def gate(folder, text: str):
    (folder / "gate.yaml").write_text(text)
    return folder / "gate.yaml"


def test_a_challenger_that_is_no_worse_becomes_the_champion_and_its_version_says_why(run, tmp_path):
    import mlflow

    code, out, _ = run("2", thresholds=gate(tmp_path, "score/mean: {max_drop: 0.05}"), **AGAINST_CHAMPION)
    assert code == 0, out
    assert "gate: pass" in out and "copier@champion is now version 2, was 1" in out
    assert champion() == "2"
    tags = mlflow.MlflowClient().get_model_version("copier", "2").tags
    assert tags["gate"] == "pass"
    assert tags["score"] == tags["score.exact_match"] == "0.90 [0.86, 0.93]"  # scipy: the exact interval of 270 of 300
    assert len(tags["prompts.sha256"]) == 64


def test_one_that_got_worse_fails_and_the_alias_stays(run, tmp_path):
    code, out, children = run("3", thresholds=gate(tmp_path, "score/mean: {max_drop: 0.05}"), **AGAINST_CHAMPION)
    assert code == 3, out
    assert "gate: regress" in out and "90 worse (q6, q7, q8, q16, q17, q18, …); 0 better" in out
    assert champion() == "1"
    child = children["models:/copier/3"]
    assert child.data.tags["gate"] == "regress"
    assert child.data.metrics["difference/exact_match/mean"] == pytest.approx(-0.3)
    assert child.data.metrics["difference/exact_match/p_value_holm"] < 1e-20  # one scorer: as it was


def test_too_few_prompts_are_inconclusive_with_the_number_that_it_takes(run, tmp_path, store):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(store[1].read_text().splitlines(keepends=True)[:20]))
    thresholds = gate(tmp_path, "score/mean: {max_drop: 0.05}")
    code, out, _ = run("2", prompts=few, thresholds=thresholds, **AGAINST_CHAMPION)
    assert code == 5, out
    assert re.search(r"it takes about [\d,]+ prompts", out)
    assert champion() == "1"


@pytest.mark.fault("process: the alias moved while the evaluation ran")
def test_an_alias_that_somebody_moved_meanwhile_is_left_alone(run, tmp_path):
    code, out, _ = run("4", thresholds=gate(tmp_path, "score/mean: {max_drop: 0.05}"), **AGAINST_CHAMPION)
    assert code == 4
    assert "copier@champion was 1 when this run began and is 3 now; version 4 passed and nothing was moved" in out
    assert champion() == "3"


@pytest.mark.fault("process: the alias moved while the models were resolved")
def test_an_alias_that_somebody_moves_after_it_was_resolved_is_left_alone(run, tmp_path, monkeypatch):
    """The candidate is compared with version 1, so it may not replace the version 3 that it was not compared with."""
    meanwhile(monkeypatch, "resolve", "3", lambda uri, *_: uri.endswith("@champion"))
    code, out, _ = run("2", thresholds=gate(tmp_path, "score/mean: {max_drop: 0.05}"), **AGAINST_CHAMPION)
    assert code == 4, out
    assert "copier@champion was 1 when this run began and is 3 now; version 2 passed and nothing was moved" in out
    assert champion() == "3"


def test_an_alias_that_somebody_moves_to_the_version_that_passes_stays_there(run, tmp_path, monkeypatch):
    meanwhile(monkeypatch, "resolve", "2", lambda uri, *_: uri.endswith("@champion"))
    code, out, _ = run("2", thresholds=gate(tmp_path, "score/mean: {max_drop: 0.05}"), **AGAINST_CHAMPION)
    assert code == 0 and "copier@champion stays version 2" in out, out
    assert champion() == "2"


def meanwhile(monkeypatch, name: str, version: str, when=lambda *_: True) -> None:
    """Somebody moves the alias to `version` right after the registry has answered the function `name`."""
    from slm.tracking import registry

    ask = getattr(registry, name)

    def answered(*given):
        found = ask(*given)
        if when(*given):
            registry.set_alias("copier", "champion", version)
        return found

    monkeypatch.setattr(registry, name, answered)


def test_an_unchanged_run_reuses_all_answers_and_a_gate_on_speed_none(run, tmp_path):
    told = (
        "models:/copier/1: 300 of 300 answers are reused (resume=true); "
        "speed, latency and memory were measured when they were generated"
    )
    _, out, first = run("1")
    assert told not in out
    _, out, second = run("1")
    assert told in out
    same = ("score/mean", "latency_seconds/p50", "peak_memory_bytes")
    first, second = ([child.data.metrics[name] for name in same] for [child] in (first.values(), second.values()))
    assert first == second
    _, out, _ = run("1", thresholds=gate(tmp_path, "latency_seconds/p95: {max: 60}"))
    assert told not in out and "gate: pass" in out


def test_memory_and_speed_are_those_of_the_run_that_gave_all_answers(run, tmp_path, store, monkeypatch):
    lines, file = store[1].read_text().splitlines(keepends=True), tmp_path / "some.jsonl"
    for begin, end, own, found in ((0, 9, 900, 900), (9, 18, 200, 200), (9, 18, 100, 200), (3, 27, 50, None)):
        file.write_text("".join(lines[begin:end]))
        monkeypatch.setattr("slm.answers.loading.peak_memory_bytes", lambda own=own: own)
        _, out, children = run("1", prompts=file)
        [child] = children.values()
        assert child.data.metrics.get("peak_memory_bytes") == found
        assert ("latency_seconds/p50" in child.data.metrics) == (found is not None)
    assert "no speed, latency or memory, because 15 of 24 answers are reused; resume=false measures them" in out
    assert "models:/copier/1: 15 of 24 answers are reused (resume=true)" in out.splitlines()


def test_several_models_are_each_compared_with_the_same_baseline(run, tmp_path):
    thresholds = gate(tmp_path, "score/mean: {max_drop: 0.05}\nlatency_seconds/p50: {max_ratio: 1000}")
    code, out, children = run("23", baseline="models:/copier/1", thresholds=thresholds)
    assert code == 3, out
    gates = {name: child.data.tags["gate"] for name, child in children.items()}
    assert gates == {"models:/copier/2": "pass", "models:/copier/3": "regress", "models:/copier/1": "none"}
    gaps = {name: child.data.metrics.get("difference/score/mean") for name, child in children.items()}
    assert gaps == {"models:/copier/2": 0.0, "models:/copier/3": pytest.approx(-0.3), "models:/copier/1": None}


def test_repeats_give_pass_at_k_and_pass_hat_k(run):
    _, out, children = run("1", repeats=3, temperature=0.5)
    metrics = children["models:/copier/1"].data.metrics
    assert metrics["rows"] == 3 * PROMPTS
    for name in ("pass_at_2", "pass_at_3", "pass_hat_2", "pass_hat_3"):
        assert metrics[f"exact_match/{name}/mean"] == pytest.approx(0.9)  # it answers alike each time
    assert "pass@3, over all (300)" in out and "pass^3, over all (300)" in out


def test_the_report_looks_back_on_earlier_runs_of_the_same_prompts_and_name(run, tmp_path):
    import mlflow

    run("1")
    run("3")
    _, _, children = run("2")
    [child] = children.values()
    page = mlflow.artifacts.load_text(f"{child.info.artifact_uri}/evaluation/report.html")
    from slm.tracking import earlier_runs

    with mlflow.start_run():
        points = earlier_runs.history(child.data.tags["prompts.sha256"], "copier", ["score"])["score"]
    assert [(point.version, round(point.mean, 2)) for point in points] == [("1", 0.9), ("3", 0.6), ("2", 0.9)]
    assert 'id="history"' in page


@pytest.mark.parametrize("word", ["latest", "None"])
def test_the_newest_version_is_known_by_its_number(run, store, word):
    """MLflow's `latest` and stages name another version tomorrow. `None` is the stage of versions without a stage."""
    import mlflow

    client = mlflow.MlflowClient()
    newest = max(int(one.version) for one in client.search_model_versions("name = 'copier'"))
    code, out, children = run("", model_uris=f"models:/copier/{word}")
    assert code == 0, out
    [child] = children.values()
    assert child.data.tags["model.uri"] == f"models:/copier/{newest}"
    version = client.get_model_version("copier", str(newest))
    assert "evaluation.run" in version.tags  # of a run with a gate, if there is one


HALVES = """
import numpy
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Halves(PythonModel):
    def predict(self, context, model_input, params=None):
        if model_input["prompt"][0] == "fail":
            raise ValueError("no \\ud83d")
        return [{"text": "7 \\ud83d", "usage": {"completion_tokens": numpy.int64(3)}}]

set_model(Halves())
"""


@pytest.mark.fault("models: an answer that ends inside a character, and a token count of numpy's")
def test_an_answer_that_ends_inside_a_character_and_a_count_of_numpy_s_end_no_evaluation(run, tmp_path):
    import mlflow
    from support.python_models import signature

    (tmp_path / "model.py").write_text(HALVES, encoding="utf-8")
    with mlflow.start_run():
        model = mlflow.pyfunc.log_model(
            name="halves",
            python_model=str(tmp_path / "model.py"),
            pip_requirements=[],
            signature=signature(("string", "prompt", True)),
        )
    rows = [{"id": text, "prompt": text, "expected": "7", "scorers": ["contains"]} for text in ("ask", "fail")]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, children = run("", model_uris=model.model_uri, prompts=tmp_path / "two.jsonl", traces="true")
    assert code == 0 and "evaluation view" not in out, out  # which is said of rows that it lacks
    [child] = children.values()
    lines = mlflow.artifacts.load_text(f"{child.info.artifact_uri}/evaluation/samples.jsonl").splitlines()
    answered, failed = map(json.loads, lines)
    assert (answered["output"], answered["output_tokens"], answered["scores"]) == ("7 \ufffd", 3, {"contains": 1.0})
    assert failed["error"]["message"] == "no \ufffd"


def test_a_prompt_set_may_be_an_artifact_of_a_run(run, store):
    import mlflow

    with mlflow.start_run() as active:
        mlflow.log_artifact(store[1])
    code, out, _ = run("1", prompts=f"runs:/{active.info.run_id}/numbers.jsonl")
    assert code == 0, out


@pytest.mark.fault("models: PENDING")
def test_a_model_that_was_never_finished_is_refused(run, store):
    import mlflow

    version = mlflow.MlflowClient().get_model_version("copier", "1")
    ready = mlflow.get_logged_model(version.source.removeprefix("models:/"))
    pending = mlflow.initialize_logged_model(name="copier")  # as kill -9 in the middle of log_model leaves it
    mlflow.MlflowClient().log_model_artifacts(pending.model_id, ready.artifact_location.removeprefix("file://"))
    code = evaluate.main([f"--model_uris=models:/{pending.model_id}", f"--prompts={store[1]}"])
    assert code == 2


def test_the_gate_that_comes_with_the_project_is_one():
    from slm.verdict.gate import read_thresholds

    assert read_thresholds((REPOSITORY / "gates" / "default.yaml").read_text("utf-8"), "default.yaml")


# The first champion, the same one again, and back ---------------------------------------------------------------------


@pytest.fixture
def without_champion(run):
    import mlflow

    mlflow.MlflowClient().delete_registered_model_alias("copier", "champion")


def test_the_command_that_replaces_a_champion_makes_the_first_one(run, without_champion, tmp_path):
    rules = gate(tmp_path, "score/mean: {min: 0.5, max_drop: 0.05}\nrows_failed: {max: 0}")
    code, out, _ = run("1", thresholds=rules, **AGAINST_CHAMPION)
    assert code == 0, out
    assert "copier@champion isn't set: the first champion; rules against a baseline don't apply" in out
    assert "none         score/mean max_drop 0.05: there is no champion yet" in out
    assert "copier@champion is now version 1, the first" in out and champion() == "1"


def test_a_first_champion_keeps_the_rules_that_need_no_baseline(run, without_champion, tmp_path):
    import mlflow

    rules = gate(tmp_path, "score/mean: {min: 0.95, max_drop: 0.05}")
    code, out, _ = run("1", thresholds=rules, **AGAINST_CHAMPION)
    assert code == 3 and "gate: regress" in out
    with pytest.raises(mlflow.exceptions.MlflowException):
        champion()


def test_a_gate_of_rules_against_a_baseline_alone_makes_a_first_champion(run, without_champion, tmp_path):
    code, out, _ = run("1", thresholds=gate(tmp_path, "score/mean: {max_drop: 0.05}"), **AGAINST_CHAMPION)
    assert code == 0 and "gate: none" in out and "copier@champion is now version 1, the first" in out, out


def test_a_first_champion_takes_the_alias_from_nobody(run, without_champion, tmp_path, monkeypatch):
    """Somebody sets the alias after it was found to be free: no rule compared the candidate with that version."""
    meanwhile(monkeypatch, "has_model", "2")
    code, out, _ = run("3", thresholds=gate(tmp_path, "score/mean: {max_drop: 0.05}"), **AGAINST_CHAMPION)
    assert code == 4, out
    assert "copier@champion was not set when this run began and is 2 now" in out and champion() == "2"


def test_a_first_champion_needs_the_alias_that_is_set(run, without_champion, tmp_path):
    rules = gate(tmp_path, "score/mean: {min: 0.5}")
    code, out, _ = run("1", thresholds=rules, baseline="models:/copier@chmpion", alias="champion")
    assert code == 2 and "there is no such model" in out


@pytest.mark.parametrize("versions", ["1", "5"])
def test_the_champion_again_is_not_evaluated(run, tmp_path, versions):
    """Version 5 is the logged model of version 1, registered once more."""
    import mlflow

    client = mlflow.MlflowClient()
    if versions == "5" and len(client.search_model_versions("name = 'copier'")) == 4:
        mlflow.register_model(client.get_model_version("copier", "1").source, "copier")
    thresholds = gate(tmp_path, "score/mean: {max_drop: 0.05}")
    code, out, children = run(versions, thresholds=thresholds, **AGAINST_CHAMPION)
    told = f"skipped: models:/copier/{versions} and models:/copier@champion (models:/copier/1) are the same model"
    assert code == 0 and told in out and children == {} and champion() == "1"
    [skipped] = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    assert skipped.info.run_name.startswith(told) and skipped.data.tags["skipped"].startswith(told)
    code, out, children = run(versions, thresholds=thresholds, force="true", **AGAINST_CHAMPION)
    assert "are the same model" not in out and children


def test_a_champion_keeps_the_tags_of_the_evaluation_that_judged_it(run, tmp_path):
    import mlflow

    client = mlflow.MlflowClient()
    client.set_model_version_tag("copier", "2", "score.brief", "1.00 [0.90, 1.00]")
    rules = gate(tmp_path, "score/mean: {max_drop: 0.05}")
    run("2", thresholds=rules, **AGAINST_CHAMPION)
    judged = client.get_model_version("copier", "2").tags
    assert judged["gate"] == "pass" and "score.brief" not in judged  # of an earlier evaluation
    run("3", thresholds=rules, **AGAINST_CHAMPION)  # against version 2
    run("2")  # without a gate
    assert client.get_model_version("copier", "2").tags == judged
    run("1")
    client.set_model_version_tag("copier", "1", "gate", "none")  # whatever judged it before
    evaluated = client.get_model_version("copier", "1").tags
    run("3", baseline="models:/copier/1")
    assert client.get_model_version("copier", "1").tags == evaluated


def test_rollback_sets_the_alias_back_and_says_what_it_did(run, tmp_path, capsys):
    import mlflow

    rules = gate(tmp_path, "score/mean: {max_drop: 0.05}")
    run("2", thresholds=rules, **AGAINST_CHAMPION)
    assert rollback.main(["--model_uri=models:/copier@champion"]) == 0
    assert "copier@champion is version 1 again, was 2" in capsys.readouterr().out and champion() == "1"
    assert rollback.main(["--model_uri=models:/copier@champion", "--version=3"]) == 0
    assert "copier@champion is version 3 again, was 1" in capsys.readouterr().out and champion() == "3"
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    named = {run.info.run_name for run in runs if run.info.run_name.startswith("copier@")}
    assert named == {"copier@champion is version 1 again, was 2", "copier@champion is version 3 again, was 1"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model_uri=models:/copier/1"], "model_uri: 'models:/copier/1' names no alias"),
        (["--model_uri=models:/copier@nobody"], "model_uri: models:/copier@nobody isn't set"),
        (["--model_uri=models:/copier@champion"], "isn't known which version had copier@champion before version 1"),
        (["--model_uri=models:/copier@champion", "--version=77"], "version: copier has no version 77"),
        (["--model_uri=models:/copier@champion", "--version=1"], "version: copier@champion is version 1 already"),
        (["--model_uri=models:/copier@champion", "--version=x"], "version: 'x' can't be one"),
    ],
)
def test_a_rollback_that_can_not_be_is_one_line(run, capsys, options, told):
    assert rollback.main(options) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and champion() == "1"


# Before anything is generated -----------------------------------------------------------------------------------------


def test_check_says_what_would_run_find_and_take_and_generates_nothing(run, tmp_path):
    rules = gate(tmp_path, "score/mean: {max_drop: 0.05}\nrows_failed: {max: 0}")
    code, out, children = run("2", check="true", thresholds=rules, **AGAINST_CHAMPION)
    assert code == 0 and children == {}, out
    assert out.splitlines() == [
        "prompts   numbers: 300 rows, exact_match 300",
        "model     models:/copier/2",
        "baseline  models:/copier@champion, which is models:/copier/1",
        "gate      score/mean max_drop 0.05; rows_failed max 0",
        "alias     champion is version 1",
        "can find  a difference of 0.07 (7 points) or more in the score at 80 % power, if one answer in five differs",
        "takes     unknown: no earlier run of this experiment has measured a speed",
        "check: nothing was generated",
    ]
    run("3", baseline="models:/copier/1")
    _, out, _ = run("2", check="true", thresholds=rules, **AGAINST_CHAMPION)
    found = r"can find  a difference of (0\.\d\d) \(\d+ points\) or more in the score at 80 % power, as in the last run"
    assert re.search(found, out), out


def test_check_says_that_a_model_beside_itself_is_not_evaluated(run):
    code, out, children = run("1", check="true", baseline="models:/copier@champion")
    told = "models:/copier/1 and models:/copier@champion (models:/copier/1) are the same model"
    assert code == 0 and children == {}, out
    assert f"skipped   {told}; there is nothing to evaluate" in out.splitlines() and "takes" not in out
    _, out, _ = run("1", check="true", force="true", baseline="models:/copier@champion")
    assert "skipped" not in out and "takes" in out


def test_check_names_the_run_that_mlflow_run_made(run, tmp_path, monkeypatch):
    import mlflow

    client = mlflow.MlflowClient()
    run_id = client.create_run(client.get_experiment_by_name(tmp_path.name).experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    run("2", check="true")
    assert client.get_run(run_id).info.run_name == "checked: models:/copier/2 on numbers"


def test_check_names_texts_and_repeats(run, tmp_path):
    (tmp_path / "manual.txt").write_text("Turn it on.")
    _, out, _ = run("2", check="true", repeats=3, texts=tmp_path / "manual.txt")
    assert out.splitlines()[:2] == [
        "prompts   numbers: 300 rows, 3 answers to each, exact_match 300",
        "texts     manual: 1 text",
    ]


def test_a_run_says_what_it_can_find_and_take_before_it_generates(run):
    unknown = "The time to generate is unknown: no earlier run of this experiment has measured a speed"
    _, out, _ = run("3")
    assert "300 prompts can find the score to ±0.06 or better; a difference needs a baseline" in out.splitlines()
    _, out, _ = run("3", baseline="models:/copier/1")
    found = "300 prompts can find a difference of 0.07 (7 points) or more in the score at 80 % power, "
    assert f"{found}if one answer in five differs" in out.splitlines() and unknown in out.splitlines(), out
    assert out.index(unknown) < out.index("Loading models:/copier/1")
    _, out, _ = run("2", baseline="models:/copier/1")
    assert re.search(r"^300 prompts can find .* as in the last run on these prompts$", out, re.MULTILINE), out


def test_the_time_to_generate_is_the_likely_one(run, tmp_path, store):
    """An answer takes as long as before: of the same version, of the same registered model, of another one."""
    import mlflow

    client, experiment = mlflow.MlflowClient(), mlflow.get_experiment_by_name(tmp_path.name).experiment_id

    def told(versions, **options):
        _, out, _ = run(versions, resume="false", **options)
        return next(line for line in out.splitlines() if line.startswith("The time to generate"))

    def measured(label, tokens, speed):
        [child] = client.search_runs([experiment], f"attributes.run_name = '{label}'", max_results=1)
        client.log_metric(child.info.run_id, "output_tokens/mean", tokens)
        client.log_metric(child.info.run_id, "output_tokens_per_second", speed)

    told("2")
    measured("models:/copier/2", 60, 10)  # 300 answers of 6 s
    assert told("3") == "The time to generate is about 30 min, as in earlier runs"  # of the same name
    measured("models:/copier/3", 5, 10)
    assert told("2", baseline="models:/copier/3") == "The time to generate is about 32 min, as in earlier runs"
    _, out, _ = run("3", repeats=2, check="true")  # models of others: it isn't known whether answers are reused
    assert "takes     at most about 5 min, as in earlier runs" in out.splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("".join(store[1].read_text().splitlines(keepends=True)[:20]))
    assert told("3", prompts=few) == "The time to generate is about 10 s, as in earlier runs"  # on other prompts
    assert told("3", max_tokens=2) == "The time to generate is about 60 s, as in earlier runs"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"thresholds": "score/mean: {min: 60}"}, "score/mean goes from 0 to 1, and `min` is 60; write 0.6 for 60 %"),
        ({"thresholds": "contains/mean: {min: 0.6}"}, "'contains/mean' is no metric of these prompts and scorers"),
        ({"thresholds": "score/mean: {max_drop: 0.1}"}, "`max_drop` compares with a baseline; add baseline="),
        ({"alias": "champion"}, "alias: needs a gate; add thresholds=gates/default.yaml"),
        ({"thresholds": "score/mean: {min: 0.1}", "alias": "x", "model_uris": ""}, "alias: needs one registered"),
        ({"thresholds": "score/mean: {min: 0.1}", "alias": "x", "model_uris": "models:/a/1,models:/a/2"}, "names 2"),
        ({"thresholds": "score/mean: {min: 0.1}", "alias": "x", "model_uris": "runs:/a/b"}, "needs a registered"),
        ({"model_uris": "copier"}, "copier: there is no such model (did you mean models:/copier/"),
        ({"model_uris": "models:/copier"}, "there is no such model (did you mean models:/copier/"),
    ],
)  # fmt: skip
def test_what_could_only_fail_later_is_refused_before_a_model_is_loaded(run, tmp_path, options, told):
    if "thresholds" in options:
        options = options | {"thresholds": gate(tmp_path, options["thresholds"])}
    code, out, children = run("1", **options)
    assert code == 2 and told in out and out.count("\n") == 1 and children == {}, out


def test_the_parent_shows_how_it_ended_without_a_click(run, tmp_path, store):
    import mlflow

    rules = gate(tmp_path, "score/mean: {max_drop: 0.05}")
    _, out, _ = run("3", thresholds=rules, **AGAINST_CHAMPION)
    run("1", thresholds=gate(tmp_path, "score/mean: {min: 60}"))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(tmp_path.name).experiment_id
    [parent] = [run for run in client.search_runs([experiment]) if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_name == "regress, score 0.60: copier/3 vs copier@champion on numbers"
    assert not {"process", "process.seen"} & set(parent.data.tags)  # these are for runs that still run
    assert parent.data.tags["mlflow.note.content"].startswith(
        "**Regress: score/mean fell by 0.30, and 0.05 is allowed.**"
    )
    children = {
        run.info.run_name: run.data.tags["mlflow.note.content"]
        for run in client.search_runs([experiment])
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert [told.split(", 95 %")[0] for _, told in sorted(children.items())] == [
        "**Regress. models:/copier/3 scores 0.60",
        "**Baseline. models:/copier@champion scores 0.90",
    ]
    metrics = parent.data.metrics
    assert (metrics["score/mean"], metrics["difference/score/mean"]) == (pytest.approx(0.6), pytest.approx(-0.3))
    assert metrics["rows"] == 300 and "exact_match/mean" not in metrics  # the headline alone
    [dataset] = parent.inputs.dataset_inputs
    assert dataset.dataset.name == "numbers"
    assert not [name for name in parent.data.params if name.startswith("cfg.")]
    assert f"report: {tmp_path}/artifacts/" in out


@pytest.mark.slow
def test_a_model_that_was_logged_twice_is_one_and_another_precision_is_another(int4_export, int8_export, tracking):
    from support.questions import GENERATION

    from slm.models import model_logging
    from slm.tracking import registry

    with tracking.start_run():
        first, again = (model_logging.log_onnx(int4_export, "chat", GENERATION, "int4") for _ in range(2))
        other = model_logging.log_onnx(int8_export, "chat", GENERATION, "int8")
        prompt = model_logging.log_onnx(int4_export, "prompt", GENERATION, "int4")
    defaults = {param.name: param.default for param in first.signature.params}
    assert GENERATION["max_tokens"] == 64 and defaults["max_tokens"] == 512  # an evaluation's limit is its own
    assert registry.have_same_files(first.model_uri, again.model_uri)
    assert not registry.have_same_files(first.model_uri, other.model_uri)
    assert not registry.have_same_files(first.model_uri, prompt.model_uri)  # the same weights, asked in another form
    found = tracking.search_logged_models(filter_string="params.precision = 'int8'", output_format="list")
    assert [model.model_id for model in found] == [other.model_id]
    assert (found[0].name, prompt.name) == ("smollm2-135m-instruct-onnx-int8", "smollm2-135m-instruct-onnx-int4")
    assert found[0].params.items() >= {"model": "smollm2-135m-instruct", "schema": "chat"}.items()
