"""The engine that answers lm-evaluation-harness's tasks, in this process. Its functions are those of Engine.

The library writes the requests and scores the answers (`reading.py`, `scores.py`); the logged model answers
(`harness_model.py`). Every document is one prompt, and one sample with its scores.

Not covered: `engine=spark`, and log probabilities of endpoints and of models of others.
"""

import gc
from contextlib import ExitStack
from typing import Any

from slm.answers import asking, endpoints, kept_answers, loading
from slm.base import console
from slm.base.errors import BadInput
from slm.base.parameters import DEFAULTS, HARDWARE, Parameters
from slm.base.wording import part_of
from slm.engines import answering, local
from slm.engines.engine import Request
from slm.engines.tasks import reading
from slm.engines.tasks.reading import TaskSet
from slm.prompts.prompt_sets import PromptSet
from slm.tracking import registry
from slm.verdict import estimation
from slm.verdict.scored_model import ScoredModel, metrics_of
from slm.verdict.statistics import Difference

# parameters of prompt sets, with what tasks have in their place
OWN = {
    "prompts": "a task has documents of its own",
    "fields": "a task has documents of its own",
    "expected_pattern": "a task reads answers with its own filters",
    "system_prompt": "a task writes its own prompts",
    "max_tokens": "a task has its own max_gen_toks",
    "temperature": "a task has its own generation_kwargs",
    "top_p": "a task has its own generation_kwargs",
    "stop": "a task has its own stop strings",
    "repeats": "a task has its own repeats",
    "scorers": "a task has its own metrics",
    "judge": "a task has its own metrics",
}
NEEDS = "asks for log probabilities, which only a model of this project gives"


def check(args: Parameters) -> None:
    if args.engine != "local":
        raise BadInput(f"tasks: are answered in this process, and not with engine={args.engine}; leave engine local")
    for name, instead in OWN.items():
        if getattr(args, name) != DEFAULTS[name]:
            raise BadInput(f"{name}: {instead}; leave it out beside tasks")
    local.check(args)


def read_prompts(args: Parameters) -> PromptSet:
    with console.step("Reading tasks"):
        found = reading.read(args.tasks, args.limit, args.num_fewshot, args.apply_chat_template)
    if needing := found.needing_token_scores:
        for uri in (uri.strip() for uri in (*args.model_uris.split(","), args.baseline)):
            if uri and (endpoints.is_endpoint(uri) or registry.is_of_others(uri)):
                raise BadInput(f"tasks: {needing[0]} {NEEDS}, and {uri} is none; name tasks that only generate text")
    return found


def score(request: Request, prompt_set: PromptSet) -> ScoredModel:
    assert isinstance(prompt_set, TaskSet)
    from lm_eval.evaluator import evaluate

    from slm.engines.tasks import scores
    from slm.engines.tasks.harness_model import HarnessModel

    label, options = request.label, request.generation
    with ExitStack() as stack:
        model = local.load(request, stack)
        _check_token_scores(model, prompt_set)
        facts = model.facts
        reuse = "interrupted" if not facts.sha256 and request.reuse == "all" else request.reuse
        hardware = {name: options.get(name) for name in (*HARDWARE, "batch_size")}
        kept = stack.enter_context(kept_answers.opened(["tasks", answering.identity(facts, hardware)], reuse))
        reading.fewshot_from_start(prompt_set.tasks)
        with reading.quiet(), console.progress(f"Scoring {label}", _requests(prompt_set)) as advance:
            asks = HarnessModel(model, kept, advance, options["seed"], options["batch_size"])
            found: Any = evaluate(
                lm=asks,
                task_dict=dict(prompt_set.loaded),
                limit=prompt_set.limit,
                bootstrap_iters=0,
                apply_chat_template=prompt_set.templated,
                fewshot_as_multiturn=True,
            )
        peak, total = loading.peak_memory_bytes() or 0, len(asks.keys)
        if asks.reused < total:
            kept.finish(peak)
        samples = scores.samples_of(prompt_set, found, asks.documents, facts, request.cut)
        figures, reasons = scores.figures_of(prompt_set, found, asks.documents)
        estimates = estimation.estimate(samples, prompt_set)
        generates = len(prompt_set.needing_token_scores) < len(prompt_set.tasks)
        metrics = metrics_of(facts, samples, estimates, latencies=generates and not asks.reused) | figures
        if not asks.reused:
            if facts.sha256:
                metrics["peak_memory_bytes"] = float(peak)
            tokens = [answer["output_tokens"] for asked in asks.documents.values() for answer in asked.answers]
            if tokens and None not in tokens and asks.seconds:
                metrics["output_tokens_per_second"] = sum(count or 0 for count in tokens) / asks.seconds
        by_id = {f"{name}/{number}": asked for (name, number), asked in asks.documents.items()}
        scored = ScoredModel(
            facts,
            samples,
            estimates,
            metrics,
            asks.reused,
            sent={prompt.id: by_id[prompt.id].sent for prompt in prompt_set.prompts},
            generated={prompt.id: by_id[prompt.id].generated for prompt in prompt_set.prompts},
            unmeasured=f"{part_of(asks.reused, total, 'request')} reused" if asks.reused else "",
            figures=reasons,
        )
        if request.reference:
            scored = local.beside(request.reference, model, scored, prompt_set, request)
        scored = local.with_texts(model, scored, prompt_set, request)
        del model, asks
    gc.collect()  # the next model needs the memory
    return scored


def differences(candidate: ScoredModel, baseline: ScoredModel, prompt_set: PromptSet) -> dict[str, Difference]:
    return estimation.differences(candidate, baseline, prompt_set)


def release(prompt_set: PromptSet) -> None:
    """Does nothing: this engine holds no memory outside this process."""


def _check_token_scores(model: asking.LoadedModel, task_set: TaskSet) -> None:
    """Refuses a model that can't be read token by token, before it answers the first request."""
    if needing := task_set.needing_token_scores:
        try:
            model.vocabulary()
        except asking.NoTokenScores as missing:
            told = f"{model.facts.label} {missing}"
            raise BadInput(f"tasks: {needing[0]} {NEEDS}, and {told}") from None


def _requests(task_set: TaskSet) -> int:
    """The number of requests, repeats included."""
    return sum(instance.repeats for task in task_set.tasks.values() for instance in task.instances)
