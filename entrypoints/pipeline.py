"""Logs a Hugging Face model as an MLflow transformers chat model (llm/v1/chat), and scores it as logged.

    mlflow run . --env-manager local -e pipeline -P model=microsoft/Phi-3-mini-4k-instruct

The run gets the logged model, named `CHECKPOINT-pipeline`, and a child run with its scores on the prompt set.
"""

import sys

from slm.base import parameters
from slm.base.errors import BadInput
from slm.models import checkpoints
from slm.tracking import lifecycle


def parse_args(argv: list[str] | None) -> parameters.Parameters:
    return parameters.parse("pipeline", __doc__, argv)


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
    engine.check(args)
    source = checkpoints.find(args.model, args.revision, args.subfolder)
    if not args.save_weights and source.kind != "hub":
        raise BadInput(f"save_weights: false needs a hub id to refer to, and {args.model} is none")

    with lifecycle.run("pipeline", args):
        # The checkpoint, and the model logged from it
        with console.step(f"Fetching {source.name}"):
            checkpoint = source.fetch()
            checkpoint.require_chat()
        from slm.models import model_logging

        with console.step("Logging the pipeline"):
            logged = model_logging.log_pipeline(
                checkpoint, options, args.save_weights, registered_model_name=args.registered_model_name
            )

        # The model as logged, scored
        uri = scoring.scored_uri(logged, checkpoint, args.registered_model_name)
        scored = scoring.score_model("pipeline", uri, prompt_set, args)
        return conclusion.finish(f"{source.name} on {prompt_set.name}", [scored], args, prompt_set).state


if __name__ == "__main__":
    sys.exit(main())
