"""The parameters of a request that need more than a type check: the gate and the generation. No model is opened."""

from dataclasses import replace

from slm.base import model_uri, parameters
from slm.base.errors import BadInput
from slm.base.parameters import Parameters
from slm.base.wording import quoted
from slm.engines import texts
from slm.models import checkpoints
from slm.prompts.prompt_sets import PromptSet
from slm.scorers import scorer_calls
from slm.verdict import gate, perplexity
from slm.verdict.scored_model import OVERALL


def read_gate(args: Parameters) -> tuple[gate.Threshold, ...]:
    """The thresholds in the file that `thresholds` names. None if `thresholds` is empty.

    Raises:
        BadInput: the file does not exist, or is not a gate.
    """
    if not args.thresholds:
        return ()
    path = checkpoints.located(args.thresholds)
    if path is None or not path.is_file():
        raise BadInput(f"thresholds: {args.thresholds!r} does not exist")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(gate.GATE_CHARACTERS + 1)
    except OSError as error:
        raise BadInput(f"thresholds: {args.thresholds!r} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"thresholds: {args.thresholds!r} is not UTF-8; save it as UTF-8") from None
    return gate.read_thresholds(text, path.name)


def with_texts(args: Parameters, prompt_set: PromptSet) -> PromptSet:
    """The prompt set with the texts that `texts` names.

    Raises:
        BadInput: see `slm.engines.texts.read`.
        Unavailable: see `slm.engines.texts.read`.
    """
    return replace(prompt_set, texts=texts.read(args.texts)) if args.texts else prompt_set


def check_gate(args: Parameters, thresholds: tuple[gate.Threshold, ...], prompt_set: PromptSet) -> None:
    """Checks that the evaluation can give what the gate asks for.

    Raises:
        BadInput: see `gate.check_names` and `gate.check_baseline`.
    """
    gate.check_baseline(thresholds, bool(args.baseline or not args.model_uris.strip()))
    if args.fidelity == "off" and (rule := next((one for one in thresholds if "fidelity/" in one.metric), None)):
        raise BadInput(f"thresholds: {rule.metric} needs fidelity=auto")
    names = prompt_set.scorer_names
    for rule in thresholds if names == frozenset() else ():
        if rule.metric.partition("/")[0] in (OVERALL, "flips"):
            remedy = "give fidelity rules, as in gates/traffic.yaml, or name scorers"
            raise BadInput(
                f"thresholds: {rule.metric} needs scores, and no row of {prompt_set.name} has a scorer; {remedy}"
            )
    for rule in () if args.texts else thresholds:
        if perplexity.is_of_texts(rule.metric) and rule.metric.partition("/")[0] not in (names or ()):
            raise BadInput(f"thresholds: {rule.metric} needs texts, a file of texts whose perplexity is measured")
    if names is not None:
        open_names = {*scorer_calls.read(args.scorers, args.judge).user_scorers, *prompt_set.open_names}
        gate.check_names(thresholds, names, open_names, args.repeats, bool(args.texts))


def check_alias(args: Parameters, uris: list[str], thresholds: tuple[gate.Threshold, ...]) -> None:
    """Checks that a version can pass and get the alias.

    Raises:
        BadInput: there is no gate, or not one registered version. The message says which.
    """
    if not args.alias:
        return
    if not thresholds:
        raise BadInput("alias: needs a gate; add thresholds=gates/default.yaml, or a file of your own")
    if len(uris) != 1:
        found = f"model_uris names {len(uris)}" if uris else "model_uris is empty"
        raise BadInput(f"alias: needs one registered version, and {found}; write model_uris=models:/NAME/3")
    if not model_uri.can_be_promoted(uris[0]):
        raise BadInput(
            f"alias: needs a registered version, models:/NAME/3 or models:/NAME@ALIAS, not {quoted(uris[0])}"
        )


def generation(args: Parameters) -> dict:
    """The parameters of generation and hardware. The logged model takes them as its defaults, but for max_tokens."""
    names = ("max_tokens", "temperature", "top_p", "seed", "batch_size", *parameters.HARDWARE)
    chosen = {name: getattr(args, name) for name in names if name in vars(args)}
    return chosen | {"stop": parameters.stop_strings(args.stop)}


def asked(args: Parameters) -> dict:
    """The parameters on which answers and scores depend, for the record. A task has its own generation parameters."""
    if not args.tasks:
        return generation(args) | {"cut": args.cut}
    names = ("seed", "batch_size", *parameters.HARDWARE, "tasks", "limit", "num_fewshot", "apply_chat_template", "cut")
    return {name: getattr(args, name) for name in names}
