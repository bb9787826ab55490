"""Compares a model with the baseline token by token on one Spark worker, with the code of engine=local.

One task loads the baseline, holds its distributions in the worker's scratch space, frees the baseline and loads the
model. So the task needs the memory of one model, as answering does, and the driver loads no model. The prompts are
those whose answers the driver has: all, or the sample that the report shows. `texts` are read in the same way.

Not covered: several tasks for one comparison.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slm.answers import asking
from slm.answers.kept_answers import Reuse
from slm.engines import texts
from slm.engines.distributions import Reference, Text, greedy
from slm.engines.spark import worker
from slm.engines.spark.job import Job
from slm.engines.spark.prompt_frame import SparkPromptSet
from slm.engines.spark.spark_session import _spark_errors
from slm.engines.spark.sums import SparkScoredModel
from slm.prompts.prompt_rows import Prompt
from slm.prompts.texts import TextSet
from slm.verdict.fidelity import Fidelity
from slm.verdict.perplexity import TextScores


@dataclass(frozen=True)
class Baseline:
    """The baseline's job, and its answers as it gave them: (prompt, token ids of the prompt, of the answer)."""

    job: Job
    answers: tuple[tuple[Prompt, list[int], tuple[int, ...]], ...]
    is_sample: bool  # whether a sample of the answers is enough


def baseline(job: Job, scored: SparkScoredModel, prompt_set: SparkPromptSet, is_sample: bool) -> Baseline:
    """Keeps what a comparison needs of the baseline. Failed answers are left out."""
    failed = {sample.id for sample in scored.samples if sample.error and sample.repeat == 0}
    answers = (
        (prompt, ids, scored.generated.get(prompt.id, ()))
        for prompt in prompt_set.prompts
        for _, ids in [scored.sent[prompt.id]]
        if ids and prompt.id not in failed
    )
    return Baseline(job, tuple(answers), is_sample)


def compared(against: Baseline, job: Job, prompt_set: SparkPromptSet) -> Fidelity:
    """The model of `job` beside the baseline.

    Raises:
        Unavailable: Spark gave up on the task.
    """
    return _on_a_worker(prompt_set, lambda: _compared(against, job))


def with_texts(against: Baseline | None, job: Job, prompt_set: SparkPromptSet, reuse: Reuse) -> TextScores:
    """What the model of `job` thinks of the texts of the prompt set, beside the baseline if there is one.

    Raises:
        Unavailable: Spark gave up on the task.
    """
    read = prompt_set.texts
    assert read
    return _on_a_worker(prompt_set, lambda: _with_texts(against, job, read, reuse))


def _on_a_worker(prompt_set: SparkPromptSet, work: Callable[[], Any]) -> Any:
    with _spark_errors():
        task = prompt_set.frame.sparkSession.sparkContext.parallelize([0], 1)
        [found] = task.map(lambda _: work()).collect()
    return found


def _compared(against: Baseline, job: Job) -> Fidelity:
    """On a worker."""
    worker.forget_model()  # two models would be in memory while one loads
    model = worker._model(against.job)[0]
    reference = Reference(against.is_sample)
    try:
        reference.hold(model, _texts(model, against))
        del model
        worker.forget_model()
        return reference.compared(worker._model(job)[0])
    finally:
        reference.close()


def _with_texts(against: Baseline | None, job: Job, read: TextSet, reuse: Reuse) -> TextScores:
    """On a worker."""
    reference = Reference() if against else None
    try:
        if against:
            worker.forget_model()
            texts.measured(worker._model(against.job)[0], read, against.job.generation, reuse, reference, True)
            worker.forget_model()
        return texts.measured(worker._model(job)[0], read, job.generation, reuse, reference, False)
    finally:
        if reference:
            reference.close()


def _texts(model: asking.LoadedModel, against: Baseline) -> list[Text]:
    """The baseline's greedy answers. Drawn answers, and answers that an earlier run kept as text, are made again."""
    is_drawn = bool(against.job.generation["temperature"])
    missing = [prompt for prompt, _, generated in against.answers if is_drawn or not generated]
    again = greedy(model, missing, against.job.generation) if missing and model.facts.is_ours else {}
    return [Text(prompt.id, ids, list(again.get(prompt.id, generated))) for prompt, ids, generated in against.answers]
