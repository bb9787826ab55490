"""The steps that the entry points share: what was asked for, checked; one model scored in a run of its own; the end.

A scored model gets a child run with its metrics, samples and reports; the parent, which `mlflow run` made, gets the
comparison and the verdict.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from slm import checkpoints, console, environment, gate, parameters, prompts, scorers, tracking
from slm.errors import BadInput

URI_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")


def read_prompts(args: argparse.Namespace) -> prompts.PromptSet:
    """The prompt set that `prompts` names, with `scorers` in place of each row's own where that is given.

    Raises:
        BadInput: it isn't there, or a row of it is wrong.
    """
    given = args.prompts
    if "://" in given or given.startswith(URI_SCHEMES):
        path = tracking.download(given)
    else:
        path = checkpoints.located(given)
        if path is None:
            raise BadInput(f"prompts: {given!r} does not exist, from the repository's root or from here")
    prompt_set = prompts.read_prompt_set(path, given)
    names = [name.strip() for name in getattr(args, "scorers", "").split(",") if name.strip()]
    for name in names:
        if name not in scorers.BUILT_IN:
            hint = scorers.did_you_mean(name, scorers.BUILT_IN)
            raise BadInput(f"scorers: {name!r} is no built-in scorer{hint}")
    return prompts.with_scorers(prompt_set, names) if names else prompt_set


def read_gate(args: argparse.Namespace) -> tuple[gate.Threshold, ...]:
    """The thresholds that `thresholds` names; none where it is empty.

    Raises:
        BadInput: the file isn't there, or is no gate.
    """
    if not args.thresholds:
        return ()
    path = checkpoints.located(args.thresholds)
    if path is None or not path.is_file():
        raise BadInput(f"thresholds: {args.thresholds!r} does not exist")
    return gate.read_thresholds(path.read_text(encoding="utf-8"), path.name)


def generation(args: argparse.Namespace) -> dict:
    """How answers are generated, and on what: the parameters that the logged model takes as its defaults."""
    names = ("max_tokens", "temperature", "top_p", "seed", "batch_size", "dtype", "device")
    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return chosen | {"stop": parameters.stop_strings(args.stop)}


def score_model(label: str, uri: str, prompt_set: prompts.PromptSet, args: argparse.Namespace):
    """Loads what `uri` names and scores it in a child run named `label`; the scored model, without its memory."""
    from slm import scoring

    options = generation(args)
    repeats = getattr(args, "repeats", 1)
    with tracking.child_run(label) as child:
        with console.step(f"Loading {label}"), _local(uri) as folder:
            model = scoring.load(label, uri, folder, {name: options.get(name) for name in ("dtype", "device")})
        with console.progress(f"Scoring {label}", len(prompt_set.prompts) * repeats) as advance:
            scored = scoring.score(model, prompt_set, options, repeats, getattr(args, "resume", False), advance)
        if scored.reused:
            console.out.print(f"{label}: {scored.reused} answers were left by an interrupted run and are reused")
        tags = {
            "prompts.sha256": prompt_set.sha256,
            "model.sha256": model.sha256,
            "model.uri": uri,
            "fingerprint": fingerprint(prompt_set, model.sha256, options, repeats),
        }
        tracking.log_scored(scored, tracking.log_dataset(prompt_set), tags)
    return scoring.release(scored), child.info.run_id


def fingerprint(prompt_set: prompts.PromptSet, model_sha256: str, options: dict, repeats: int) -> str:
    """One hash over what a result depends on: model, prompts, parameters, and this project's pinned packages."""
    content = [model_sha256, prompt_set.sha256, options, repeats, environment.describe()["constraints.sha256"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def conclude(
    title: str,
    results: Sequence[tuple],
    thresholds: tuple[gate.Threshold, ...],
    prompt_set: prompts.PromptSet,
    baseline: int | None = None,
) -> gate.Verdict:
    """Compares and gates what was scored, logs verdicts and reports into the child runs and the parent, prints all.

    `results` holds (scored model, its run id); `baseline` is the place of the one that the others are compared with.
    """
    from slm import report, scoring

    mlflow = tracking.quiet_mlflow()
    models = [scored for scored, _ in results]
    client, verdicts, remarks = mlflow.MlflowClient(), [], []
    for place, (scored, run_id) in enumerate(results):
        compared = {}
        if baseline is not None and place != baseline:
            compared = scoring.differences(scored, models[baseline], prompt_set)
            told = report.difference_lines(scored.model.label, models[baseline].model.label, compared)
            remarks += told[:1]
            metrics = scoring.difference_metrics(compared)
            with mlflow.start_run(run_id=run_id, nested=True):
                mlflow.log_metrics(metrics, model_id=scored.model.model_id)
        gated = () if place == baseline and len(models) > 1 else thresholds
        verdicts.append(gate.decide(gated, scored.metrics | scored.estimates, compared))
        client.set_tag(run_id, "gate", verdicts[-1].state)
    verdict = worst(verdicts)
    mlflow.set_tags({"gate": verdict.state, "prompts.sha256": prompt_set.sha256})
    artifacts = {
        "report.md": report.markdown(title, models, remarks, verdict),
        "report.html": report.html(title, models, remarks, verdict),
        "junit.xml": report.junit(title, models, verdicts),
        "environment.json": json.dumps(environment.describe(), indent=1) + "\n",
    }
    parent = mlflow.active_run().info.run_id
    mlflow.set_tag("mlflow.note.content", artifacts["report.md"])  # the run page's description
    for run_id in (parent, *(run_id for _, run_id in results)):
        for name, text in artifacts.items():
            client.log_text(run_id, text, f"evaluation/{name}")
    console.out.print()
    console.out.print(report.table(title, models))
    for remark in remarks:
        console.out.print(remark)
    for check in verdict.checks:
        console.out.print(f"  {check.state:12} {check.metric} {check.rule}: {check.reason}")
    console.out.print(f"gate: [bold]{verdict.state}[/bold]   run: {parent}   tracking: {mlflow.get_tracking_uri()}")
    return verdict


def worst(verdicts: Sequence[gate.Verdict]) -> gate.Verdict:
    """One verdict over several models: the worst state, and every check."""
    checks = tuple(check for verdict in verdicts for check in verdict.checks)
    states = {check.state for check in checks}
    return gate.Verdict(next((s for s in ("regress", "inconclusive", "pass") if s in states), "none"), checks)


def registered_version(uri: str) -> tuple[str, str] | None:
    """Name and version of `models:/name/version`; None for any other URI."""
    name, _, version = uri.removeprefix("models:/").rpartition("/")
    return (name, version) if uri.startswith("models:/") and name and version.isdigit() else None


def promote(uri: str, alias: str) -> None:
    """Moves the registry alias to the version that `uri` names."""
    name, version = registered_version(uri)
    tracking.set_alias(name, alias, version)
    console.out.print(f"{name}@{alias} is now version {version}")


@contextmanager
def _local(uri: str):
    """The logged model's folder on this machine; a copy that had to be downloaded is removed again."""
    folder = tracking.download(uri)
    yield folder
    if Path(tempfile.gettempdir()) in folder.resolve().parents:
        shutil.rmtree(folder, ignore_errors=True)
