"""Logs a model as a pyfunc over onnxruntime-genai, and scores it as logged.

    mlflow run . --env-manager local -e onnx -P model=microsoft/Phi-3-mini-4k-instruct
    mlflow run . --env-manager local -e onnx -P model=microsoft/Phi-3-mini-4k-instruct-onnx \
        -P subfolder=cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4

A ready ONNX GenAI folder is logged as it is; any other checkpoint is exported first. The run gets the logged model,
named `CHECKPOINT-onnx-PRECISION`, and a child run with its scores on the prompt set.
"""

import sys

from slm.base import parameters
from slm.models import checkpoints, onnx_export
from slm.tracking import lifecycle


def parse_args(argv: list[str] | None) -> parameters.Parameters:
    return parameters.parse("onnx", __doc__, argv)


def main(argv: list[str] | None = None) -> int:
    return lifecycle.exit_code(lambda: log_and_score(parse_args(argv)))


def log_and_score(args: parameters.Parameters) -> str:
    """The story of the run; returns the gate's state, which is "none" here."""
    from slm.base import console
    from slm.engines import engine as engines
    from slm.evaluation import conclusion, requests, scoring

    # What was asked for, checked before anything is opened or fetched
    engine = engines.chosen(args)
    prompt_set = engine.read_prompts(args)
    options = requests.generation(args)
    source = checkpoints.find(args.model, args.revision, args.subfolder)
    if not source.is_onnx:
        engine.check(args)
        onnx_export.check(args.precision, args.execution_provider, args.runtime)

    with lifecycle.run("onnx", args):
        # The ONNX GenAI folder, and the model logged from it
        with console.step(f"Fetching {source.name}"):
            checkpoint = source.fetch(onnx=True)
        precision = onnx_export.AS_GIVEN
        if not checkpoint.is_onnx:
            precision = args.precision
            with console.step(f"Exporting to ONNX, {precision}") as tell:
                checkpoint = onnx_export.export(checkpoint, precision, args.execution_provider, tell=tell)
        if args.schema == "chat":
            checkpoint.require_chat()
        from slm.models import model_logging

        with console.step("Logging the ONNX wrapper"):
            logged = model_logging.log_onnx(
                checkpoint, args.schema, options, precision, registered_model_name=args.registered_model_name
            )

        # The model as logged, scored
        uri = scoring.scored_uri(logged, checkpoint, args.registered_model_name, precision)
        label = "onnx" if source.is_onnx else f"onnx {precision}"
        scored = scoring.score_model(label, uri, prompt_set, args)
        return conclusion.finish(f"{source.name} on {prompt_set.name}", [scored], args, prompt_set).state


if __name__ == "__main__":
    sys.exit(main())
