"""Scores one model in its own child run: metrics, samples, and the record that a repeat needs."""

from dataclasses import replace
from typing import NamedTuple

from slm.answers.kept_answers import Reuse
from slm.base import console, environment
from slm.base.parameters import Parameters
from slm.base.wording import part_of
from slm.engines import engine
from slm.engines.distributions import Reference
from slm.evaluation import requests
from slm.models import checkpoints, manifest
from slm.prompts import prompt_sets
from slm.scorers import scorer_calls
from slm.tracking import lifecycle, mlflow_client, registry, run_records, tags, unsent
from slm.verdict import gate, reproduction
from slm.verdict.scored_model import ScoredModel

MEASURED = ("output_tokens_per_second", "latency_seconds", "peak_memory_bytes")  # metrics that generation gives


class Result(NamedTuple):
    """A scored model, and its child run."""

    scored: ScoredModel
    run_id: str


def scored_uri(logged, checkpoint: checkpoints.Checkpoint, registered_model_name: str, precision: str = "") -> str:
    """The URI of a model that was just logged. The model gets a description.

    `logged` is MLflow's ModelInfo. A registered version gets tags and the same description, and is the URI. Without a
    registered name, the URI is the logged model's.
    """
    from slm.report import summary

    words = [f"{checkpoint.name}, as {'a transformers pipeline' if not precision else f'ONNX, {precision}'}."]
    revision = checkpoint.revision if len(checkpoint.revision) < 40 else checkpoint.revision[:12]  # a hash has 40 or 64
    words += [f"From {checkpoint.source} at {revision}." if revision else f"From {checkpoint.source}."]
    description = summary.escaped(" ".join(words))
    registry.describe_model(logged.model_id, description)
    if not registered_model_name:
        return logged.model_uri
    version = str(logged.registered_model_version)
    found = {
        tags.SOURCE: checkpoint.source,
        tags.REVISION: checkpoint.revision,
        tags.PRECISION: precision,
        tags.MODEL_SHA256: checkpoint.sha256,
        tags.GIT_COMMIT: environment.describe()["git_commit"],
        manifest.TAG: next(iter(registry.recorded_manifests(logged.model_uri)), ""),
    }
    found = {name: value for name, value in found.items() if value}
    registry.tag_version(registered_model_name, version, found, description)
    return f"models:/{registered_model_name}/{version}"


def score_models(
    named: list[tuple[str, str]],
    prompt_set: prompt_sets.PromptSet,
    args: Parameters,
    thresholds: tuple[gate.Threshold, ...] = (),
    baseline: int | None = None,
) -> list[Result]:
    """Scores each model of (label, resolved URI), the baseline first: the others are compared with its answers.

    The results have the order of `named`.
    """
    compares = baseline is not None and len(named) > 1 and args.fidelity != "off"
    reference = Reference(args.fidelity == "auto", Reference() if prompt_set.texts else None) if compares else None
    order = sorted(range(len(named)), key=lambda place: place != baseline)
    found = {
        place: score_model(*named[place], prompt_set, args, thresholds, reference, place == baseline) for place in order
    }
    if reference:
        reference.close()
    return [found[place] for place in range(len(named))]


def score_model(
    label: str,
    uri: str,
    prompt_set: prompt_sets.PromptSet,
    args: Parameters,
    thresholds: tuple[gate.Threshold, ...] = (),
    reference: Reference | None = None,
    is_baseline: bool = False,
) -> Result:
    """Scores the model of `uri` in a child run with the name `label`.

    With `reference`, reads the baseline's distributions into it, or compares the model with these.
    """
    scorers = scorer_calls.read(args.scorers, args.judge)
    options = requests.generation(args)
    machine = environment.describe()
    asked = reproduction.asked(machine, prompt_set, requests.asked(args), args.repeats, scorers.sha256)
    with lifecycle.child_run(label) as child:
        run_id = child.info.run_id
        request = engine.Request(
            label=label,
            uri=uri,
            run_id=run_id,
            generation=options,
            repeats=args.repeats,
            cut=args.cut,
            scorers=scorers,
            record=asked,
            reuse=reuse(args.resume, thresholds),
            resume=args.resume,
            row_timeout=args.row_timeout,
            trust_code=args.trust_code,
            reference=reference,
            is_baseline=is_baseline,
        )
        scored = engine.chosen(args).score(request, prompt_set)
        model, judged = scored.model, bool(scorers.judge)
        record = reproduction.record(machine, asked, scored, judged)
        if scored.reused and args.tasks:  # a document may have several requests
            console.out.print(f"{label}: {scored.unmeasured} (resume=true)")
        elif scored.reused:
            rows = int(scored.metrics["rows"])
            whole = scored.reused == rows and not scored.unmeasured
            measured = "; speed, latency and memory were measured when they were generated" if whole else ""
            console.out.print(f"{label}: {part_of(scored.reused, rows, 'answer')} reused (resume=true){measured}")
        found = {  # MLflow's pages keep this order, so hashes come last
            tags.MODEL_NAME: model.name,
            tags.MODEL_URI: model.uri,
            **run_records.system_prompt(prompt_set),
            **({tags.JUDGE: scorers.judge.uri} if scorers.judge else {}),
            tags.PROMPTS_SHA256: prompt_set.sha256,
            tags.MODEL_SHA256: model.sha256,
            tags.FINGERPRINT: record["fingerprint"],
            tags.OUTPUTS_SHA256: record["outputs"]["sha256"],
        }
        with unsent.kept(run_id, scored, found):
            run_records.log_scored(scored, run_records.log_dataset(prompt_set), found)
        mlflow_client.quiet_mlflow().log_text(reproduction.as_json(record), "evaluation/environment.json")
    return Result(replace(scored, record=record), run_id)


def reuse(resume: bool, thresholds: tuple[gate.Threshold, ...]) -> Reuse:
    """Which kept answers may be used. A gate on speed or memory measures all answers now, the baseline's too."""
    return "none" if not resume or any(rule.metric.startswith(MEASURED) for rule in thresholds) else "all"
