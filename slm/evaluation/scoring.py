"""One model, scored in a child run of its own: metrics, samples and the record that makes the run repeatable."""

from dataclasses import replace
from typing import NamedTuple

from slm.answers.kept_answers import Reuse
from slm.base import console, environment
from slm.base.parameters import Parameters
from slm.engines import engine
from slm.evaluation import requests
from slm.models import checkpoints, manifest
from slm.prompts import prompt_sets
from slm.scorers import scorer_calls
from slm.tracking import lifecycle, mlflow_client, registry, run_records, unsent
from slm.verdict import gate, reproduction
from slm.verdict.scored_model import ScoredModel

MEASURED = ("output_tokens_per_second", "latency_seconds", "peak_memory_bytes")  # metrics of the generating itself


class Result(NamedTuple):
    """A scored model, and its child run."""

    scored: ScoredModel
    run_id: str


def scored_uri(logged, checkpoint: checkpoints.Checkpoint, registered_model_name: str, precision: str = "") -> str:
    """The URI under which a model that was just logged is scored: its registered version, described, where it is one.

    `logged` is the ModelInfo that MLflow gave.
    """
    from slm.report import summary

    if not registered_model_name:
        return logged.model_uri
    version = str(logged.registered_model_version)
    tags = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "precision": precision,
        "model.sha256": checkpoint.sha256,
        "git_commit": environment.describe()["git_commit"],
        manifest.TAG: next(iter(registry.recorded_manifests(logged.model_uri)), ""),
    }
    words = [f"{checkpoint.name}, as {'a transformers pipeline' if not precision else f'ONNX, {precision}'}."]
    words += [f"From {checkpoint.source}" + (f" at {checkpoint.revision}." if checkpoint.revision else ".")]
    tags = {name: value for name, value in tags.items() if value}
    registry.tag_version(registered_model_name, version, tags, summary.escaped(" ".join(words)))
    return f"models:/{registered_model_name}/{version}"


def score_model(
    label: str,
    uri: str,
    prompt_set: prompt_sets.PromptSet,
    args: Parameters,
    thresholds: tuple[gate.Threshold, ...] = (),
) -> Result:
    """Scores the model that `uri` names in a child run called `label`."""
    scorers = scorer_calls.read(args.scorers, args.judge)
    options = requests.generation(args)
    machine = environment.describe()
    asked = reproduction.asked(machine, prompt_set, options, args.repeats, scorers.sha256)
    with lifecycle.child_run(label) as child:
        run_id = child.info.run_id
        request = engine.Request(
            label=label,
            uri=uri,
            run_id=run_id,
            generation=options,
            repeats=args.repeats,
            scorers=scorers,
            record=asked,
            reuse=_reuse(args.resume, thresholds),
            resume=args.resume,
            row_timeout=args.row_timeout,
            trust_code=args.trust_code,
        )
        scored = engine.chosen(args.engine).score(request, prompt_set)
        model, judged = scored.model, bool(scorers.judge)
        record = reproduction.record(machine, asked, scored, judged)
        if scored.reused:
            rows = int(scored.metrics["rows"])
            console.out.print(f"{label}: {scored.reused} of {rows} answers are reused (resume=true)")
        tags = {
            "prompts.sha256": prompt_set.sha256,
            "model.sha256": model.sha256,
            "model.uri": model.uri,
            "model.name": model.name,
            **({"judge": scorers.judge.uri} if scorers.judge else {}),
            "fingerprint": record["fingerprint"],
            "outputs.sha256": record["outputs"]["sha256"],
        }
        with unsent.kept(run_id, scored, tags):
            run_records.log_scored(scored, run_records.log_dataset(prompt_set), tags)
        mlflow_client.quiet_mlflow().log_text(reproduction.as_json(record), "evaluation/environment.json")
    return Result(replace(scored, record=record), run_id)


def _reuse(resume: bool, thresholds: tuple[gate.Threshold, ...]) -> Reuse:
    """Which kept answers may be used; a gate on speed or memory wants them measured now, the baseline's as well."""
    if not resume:
        return "none"
    return "interrupted" if any(rule.metric.startswith(MEASURED) for rule in thresholds) else "all"
