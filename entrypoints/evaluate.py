"""Scores a prompt set against logged models, compares them, and gates.

    mlflow run . --env-manager local
    mlflow run . --env-manager local -P prompts=prompts/general.jsonl -P model_uris=models:/phi3/7 \
        -P baseline=models:/phi3@champion -P thresholds=gates/default.yaml -P alias=champion

With no `model_uris`, both wrappers of `model` are logged, and the ONNX one is compared with the pipeline. Each scored
model gets a child run; the run itself gets the comparison and the verdict.
"""

import sys

from slm.answers import endpoints
from slm.base import parameters
from slm.base.errors import BadInput
from slm.evaluation import schedule
from slm.models import checkpoints, onnx_export
from slm.tracking import lifecycle, registry


def parse_args(argv: list[str] | None) -> parameters.Parameters:
    return parameters.parse("evaluate", __doc__, argv)


def main(argv: list[str] | None = None) -> int:
    return lifecycle.exit_code(lambda: evaluate(parse_args(argv)))


def evaluate(args: parameters.Parameters) -> str:
    """The story of the run; returns the gate's state."""
    from slm.engines import engine as engines
    from slm.evaluation import conclusion, forecast, promotion, requests, scoring

    # What was asked for, checked before anything is opened or fetched
    engine = engines.chosen(args)
    engine.check(args)
    prompt_set = requests.with_texts(args, engine.read_prompts(args))
    thresholds = requests.read_gate(args)
    requests.generation(args)
    uris = [uri.strip() for uri in args.model_uris.split(",") if uri.strip()]
    if args.baseline and not uris:
        raise BadInput("baseline: needs model_uris to compare with it; with none, the pipeline is the baseline")
    requests.check_alias(args, uris, thresholds)
    requests.check_gate(args, thresholds, prompt_set)
    schedule.check(args)
    for uri in filter(endpoints.is_endpoint, [*uris, args.baseline]):
        endpoints.check(uri)
    source = None
    if not uris:
        onnx_export.check(args.precision, args.execution_provider, args.runtime)
        source = checkpoints.find(args.model, args.revision, args.subfolder)

    if args.check:
        same = before = ""
        if source is None:
            named, baseline, _, before = resolved(args, uris)
            same = promotion.unchanged(args, named, baseline)
        else:
            named, baseline = [(f"onnx {args.precision}", ""), ("pipeline", "")], 1
        forecast.show(args, prompt_set, thresholds, named, baseline, source.name if source else "", same, before)
        return "none"

    with schedule.run("evaluate", args) as settled:
        if settled:  # another start is at it, or its slot is done
            return settled

        # The models: those named, or both wrappers of `model`, the pipeline being the baseline
        is_first, before = False, ""
        if source is None:
            named, baseline, is_first, before = resolved(args, uris)
            subject = prompt_set.name
            if same := promotion.unchanged(args, named, baseline):
                promotion.skip(same)
                schedule.mark_done(args, "none")
                return "none"
        else:
            named, baseline = log_both(source, args), 1
            subject = f"{source.name} on {prompt_set.name}"

        settled = schedule.unchanged(args, [uri for _, uri in named], prompt_set, thresholds)
        if settled:
            return settled

        # Each scored as logged, compared, gated
        forecast.tell(args, prompt_set, thresholds, named, baseline is not None)
        results = scoring.score_models(named, prompt_set, args, thresholds, baseline)
        verdict = conclusion.finish(subject, results, args, prompt_set, thresholds, baseline, is_first)
        # of a first champion, a gate may have no rule that applies
        if args.alias and (verdict.state == "pass" or (is_first and verdict.state == "none")):
            promotion.promote(named[0][1], args.alias, before, results[0][0].model.manifest_sha256)
        schedule.mark_done(args, verdict.state)
        if args.traces:
            conclusion.show_answers(results, prompt_set)
        return verdict.state


def resolved(args: parameters.Parameters, uris: list[str]) -> tuple[list[tuple[str, str]], int | None, bool, str]:
    """The models that are named, as (label, resolved URI); the place of the baseline; whether this is the first version
    with the alias, which has no baseline; the version that has the alias."""
    from slm.evaluation import promotion

    # read before the baseline is resolved: if the alias moves in between, nothing is promoted
    before = promotion.alias_version(uris[0], args.alias)
    named = [(uri, registry.resolve(uri, args.trust_code)) for uri in uris]
    is_first = promotion.is_first(args, uris[0], before)
    if not args.baseline or is_first:
        return named, None, is_first, before
    return [*named, (args.baseline, registry.resolve(args.baseline, args.trust_code))], len(uris), False, before


def log_both(source: checkpoints.Source, args: parameters.Parameters) -> list[tuple[str, str]]:
    """Logs both wrappers of one checkpoint, with the same chat schema; their labels and URIs, ONNX first."""
    from slm.base import console
    from slm.evaluation import requests, scoring
    from slm.models import model_logging

    options = requests.generation(args)
    with console.step(f"Fetching {source.name}"):
        checkpoint = source.fetch()
        checkpoint.require_chat()
    if checkpoint.is_onnx:
        raise BadInput(f"model: {args.model} is an ONNX GenAI folder; run -e onnx, or give evaluate its model_uris")
    with console.step(f"Exporting to ONNX, {args.precision}") as tell:
        export = onnx_export.export(checkpoint, args.precision, args.execution_provider, tell=tell)
    # MLflow's page of evaluations leaves out a run that has logged models, and the runs below it
    with console.step("Logging both wrappers"), lifecycle.child_run("wrappers"):
        name = args.registered_model_name
        pipeline = model_logging.log_pipeline(checkpoint, options, registered_model_name=name)
        onnx = model_logging.log_onnx(export, "chat", options, args.precision, registered_model_name=name)
    return [
        (f"onnx {args.precision}", scoring.scored_uri(onnx, export, name, args.precision)),
        ("pipeline", scoring.scored_uri(pipeline, checkpoint, name)),
    ]


if __name__ == "__main__":
    sys.exit(main())
