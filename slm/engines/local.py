"""The engine that answers prompts in this process. Its functions are those of slm/engines/engine.py's Engine."""

import gc
from contextlib import ExitStack, nullcontext
from dataclasses import replace

from slm.answers import asking, endpoints, loading
from slm.base import console, environment
from slm.base.errors import BadInput
from slm.base.parameters import HARDWARE, Parameters
from slm.engines import answering, distributions, texts
from slm.engines.engine import Request
from slm.prompts import prompt_sets, row_mapping, system_prompts, variants
from slm.prompts.prompt_sets import PromptSet, read_prompt_set
from slm.scorers import scorer_calls
from slm.tracking import downloads, frozen_prompts, registry, system_text
from slm.verdict import estimation
from slm.verdict.scored_model import ScoredModel
from slm.verdict.statistics import Difference


def check(args: Parameters) -> None:
    if args.spark_master:
        raise BadInput(f"spark_master: {args.spark_master!r} needs engine=spark")
    check_devices(args)


def check_devices(args: Parameters) -> None:
    """Checks that this machine has the GPU that `device` and `execution_provider` ask for.

    Raises:
        BadInput: it has no such GPU, or the installed packages can't use it.
    """
    device = args.device
    if device.startswith("cuda"):
        import torch

        if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            seen = f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here"
            raise BadInput(f"device: {device!r} isn't there: {seen}; leave auto, or install torch's CUDA build")
    if not args.model_uris and args.execution_provider == "cuda":
        environment.check_cuda()


def read_prompts(args: Parameters) -> PromptSet:
    given, system = args.prompts, system_text.read(args.system_prompt)
    mapping = row_mapping.read(args.fields, args.expected_pattern, system)
    frozen = frozen_prompts.file(args)
    with nullcontext(frozen) if frozen else downloads.named_file("prompts", given) as path:
        asked = scorer_calls.read(args.scorers, args.judge)
        found = scorer_calls.add(asked, read_prompt_set(path, given, scorer_calls.IN_ROWS, mapping))
    asking.check_response_formats(found.prompts)
    if told := prompt_sets.unnamed_note(found.unnamed):
        console.out.print(f"{found.name}: {told}", markup=False)
    if found.left_out:
        console.out.print(f"{found.name}: {row_mapping.left_out_note(found.left_out)}", markup=False)
    if system and (kept := system_prompts.note(found.prompts, system)):
        console.out.print(f"{found.name}: {kept}", markup=False)
    if hint := variants.hint(found.prompts):
        console.out.print(f"{found.name}: {hint}", markup=False)
    return found


def score(request: Request, prompt_set: PromptSet) -> ScoredModel:
    label, options = request.label, request.generation
    with ExitStack() as stack:
        model = load(request, stack)
        asked = asking.questions(model, prompt_set.prompts, options, request.repeats)
        with console.progress(f"Scoring {label}", len(asked)) as advance:
            score_answer = stack.enter_context(scorer_calls.opened(request.scorers, request.resume))
            scored = answering.score(
                model, prompt_set, asked, options, request.reuse, advance, score_answer, request.cut
            )
        if request.reference:
            scored = beside(request.reference, model, scored, prompt_set, request)
        scored = with_texts(model, scored, prompt_set, request)
        del model
    gc.collect()  # the next model needs the memory
    return scored


def load(request: Request, stack: ExitStack) -> asking.LoadedModel:
    """Loads the model of a request. Its files stay until `stack` ends: a model of others may read files late."""
    with console.step(f"Loading {request.label}"):
        folder = None
        if not endpoints.is_endpoint(request.uri):
            folder = stack.enter_context(registry.local_copy(request.uri))
        options = request.generation
        settings = {name: options.get(name) for name in HARDWARE} | {"row_timeout": request.row_timeout}
        recorded = registry.recorded_manifests(request.uri)
        return loading.load(request.label, request.uri, folder, settings, recorded, request.trust_code)


def beside(
    reference: distributions.Reference,
    model: asking.LoadedModel,
    scored: ScoredModel,
    prompt_set: PromptSet,
    request: Request,
) -> ScoredModel:
    """Reads the baseline's distributions, or compares the model with them."""
    if not request.is_baseline:
        with console.step(f"Comparing {request.label} token by token"):
            return replace(scored, fidelity=reference.compared(model))
    generated = scored.generated
    with console.step(f"Reading {request.label} token by token"):
        if request.generation["temperature"]:
            generated = distributions.greedy(model, prompt_set.prompts, request.generation)
        answers = [
            distributions.Text(id, ids, list(generated.get(id, ()))) for id, (_, ids) in scored.sent.items() if ids
        ]
        reference.hold(model, answers)
    return scored


def with_texts(model: asking.LoadedModel, scored: ScoredModel, prompt_set: PromptSet, request: Request) -> ScoredModel:
    """Adds the perplexity of the texts, if there are any."""
    if prompt_set.texts is None:
        return scored
    reference = request.reference.on_texts if request.reference else None
    with console.step(f"Reading texts with {request.label}"):
        found = texts.measured(
            model, prompt_set.texts, request.generation, request.reuse, reference, request.is_baseline
        )
    return texts.added(scored, found)


def differences(candidate: ScoredModel, baseline: ScoredModel, prompt_set: PromptSet) -> dict[str, Difference]:
    return estimation.differences(candidate, baseline, prompt_set)


def release(prompt_set: PromptSet) -> None:
    """Does nothing: this engine holds no memory outside this process."""
