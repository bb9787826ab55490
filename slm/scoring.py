"""Scores a prompt set against a model as it was logged: loads it through pyfunc, answers, scores, sums up.

A model logged here answers through the wrapper's `answers`, which its `predict` is made of; any other chat or prompt
pyfunc through `predict`. Each answer is appended to a file in the cache as it comes, so that an interrupted run goes on
where it stopped. MLflow is called only to load the model. Not covered: models that are endpoints.
"""

import gc
import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from slm import cache, model_logging, scorers, statistics
from slm.errors import BadInput
from slm.prompts import Prompt, PromptSet

CHUNK = 8  # rows per call of a model that isn't ours
OVERALL = "score"  # the mean of a row's scorers, over rows


@dataclass(frozen=True)
class Sample:
    """One answer, as it stands in samples.jsonl."""

    id: str
    repeat: int
    model: str
    messages: list[dict]
    expected: list[str]
    output: str
    finish_reason: str  # stop | length | error
    prompt_tokens: int | None
    output_tokens: int | None
    latency_seconds: float
    scores: dict[str, float | None]
    reasons: dict[str, str]
    error: dict[str, str] | None


@dataclass(frozen=True)
class LoadedModel:
    """A logged model in memory."""

    label: str
    uri: str
    model_id: str | None
    pyfunc: object
    wrapper: object | None  # ours, when the model was logged here
    is_chat: bool
    sha256: str
    bytes: int
    load_seconds: float


@dataclass(frozen=True)
class ScoredModel:
    """A model's samples and what they sum up to."""

    model: LoadedModel
    samples: tuple[Sample, ...]
    estimates: dict[str, statistics.Estimate]  # by scorer, and OVERALL
    metrics: dict[str, float]
    reused: int  # answers that an interrupted run had left

    def sample_lines(self) -> list[str]:
        return [json.dumps(asdict(sample), ensure_ascii=False) for sample in self.samples]


def load(label: str, uri: str, folder: Path, settings: dict) -> LoadedModel:
    """Loads the model in `folder` (what `uri` names), overriding its settings where these have a value.

    Raises:
        BadInput: it is no pyfunc, its files were changed, or it takes neither messages nor prompts.
    """
    import mlflow

    try:
        description = mlflow.models.Model.load(str(folder))
        if "python_function" not in description.flavors:
            raise BadInput(f"{uri} has no python_function flavor")
        sha256 = model_logging.check_manifest(folder)
    except (mlflow.exceptions.MlflowException, ValueError) as error:
        raise BadInput(f"{uri}: {error}") from None
    columns = (
        description.signature.inputs.input_names() if description.signature and description.signature.inputs else []
    )
    if "messages" not in columns and "prompt" not in columns and len(columns) != 1:
        raise BadInput(f"{uri} takes {columns or 'no declared input'}; a chat (messages) or prompt model is needed")
    reset_peak_memory()
    start = time.perf_counter()
    override = {name: value for name, value in settings.items() if value}
    pyfunc = mlflow.pyfunc.load_model(str(folder), model_config=override if _is_ours(description) else None)
    seconds = time.perf_counter() - start
    return LoadedModel(
        label=label,
        uri=uri,
        model_id=description.model_id,
        pyfunc=pyfunc,
        wrapper=pyfunc.unwrap_python_model() if _is_ours(description) else None,
        is_chat="messages" in columns,
        sha256=sha256,
        bytes=description.model_size_bytes or 0,
        load_seconds=seconds,
    )


def score(
    model: LoadedModel,
    prompt_set: PromptSet,
    generation: dict,
    repeats: int = 1,
    resume: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> ScoredModel:
    """Answers every prompt `repeats` times and scores the answers; `advance` is called once for each."""
    wanted = [(prompt, repeat) for prompt in prompt_set.prompts for repeat in range(repeats)]
    with _journal(_fingerprint(model, prompt_set, generation, repeats), resume) as journal:
        answered = {key: replace(sample, model=model.uri) for key, sample in _read_journal(journal).items()}
        missing = [(prompt, repeat) for prompt, repeat in wanted if (prompt.id, repeat) not in answered]
        reused = len(answered)
        for _ in range(reused):
            advance()
        start = time.perf_counter()
        with journal.open("a", encoding="utf-8") as file:
            for (prompt, repeat), answer in _answers(model, missing, generation):
                answered[prompt.id, repeat] = _sample(model, prompt, repeat, answer)
                file.write(json.dumps(asdict(answered[prompt.id, repeat])) + "\n")
                file.flush()
                advance()
        seconds = time.perf_counter() - start
        journal.unlink()  # all is answered; the samples are the caller's to log
    by_id = {prompt.id: prompt for prompt in prompt_set.prompts}
    samples = tuple(
        replace(sample, scores=scores, reasons=reasons)
        for sample in (answered[prompt.id, repeat] for prompt, repeat in wanted)
        for scores, reasons in [_scores(by_id[sample.id], sample)]
    )
    estimates = estimate(samples, prompt_set)
    metrics = _metrics(model, samples, estimates)
    fresh = [answered[prompt.id, repeat] for prompt, repeat in missing]
    tokens = [sample.output_tokens for sample in fresh if sample.error is None]
    if tokens and None not in tokens:  # a stranger's model may not count them
        metrics["output_tokens_per_second"] = sum(tokens) / seconds
    return ScoredModel(model, samples, estimates, metrics, reused)


def estimate(samples: tuple[Sample, ...], prompt_set: PromptSet) -> dict[str, statistics.Estimate]:
    """Each scorer's mean over prompts (a prompt's repeats averaged first), and that of a prompt's scorers."""
    clusters = {prompt.id: prompt.cluster for prompt in prompt_set.prompts}
    return {
        name: statistics.mean_estimate(list(values.values()), [clusters[key] for key in values])
        for name, values in sorted(values_by_scorer(samples).items())
    }


def values_by_scorer(samples: tuple[Sample, ...]) -> dict[str, dict[str, float]]:
    """Scorer -> prompt id -> score, averaged over repeats; what wasn't scored is not there. OVERALL is one of them."""
    collected: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        scored = {name: value for name, value in sample.scores.items() if value is not None}
        for name, value in scored.items():
            collected[name][sample.id].append(value)
        if scored:
            collected[OVERALL][sample.id].append(sum(scored.values()) / len(scored))
    return {name: {key: sum(values) / len(values) for key, values in rows.items()} for name, rows in collected.items()}


def differences(
    candidate: ScoredModel, baseline: ScoredModel, prompt_set: PromptSet
) -> dict[str, statistics.Difference]:
    """Per scorer, candidate minus baseline on the prompts that both answered."""
    clusters = {prompt.id: prompt.cluster for prompt in prompt_set.prompts}
    ours, theirs = values_by_scorer(candidate.samples), values_by_scorer(baseline.samples)
    compared = {}
    for name in sorted(ours.keys() & theirs.keys()):
        both = [key for key in ours[name] if key in theirs[name]]
        if both:
            compared[name] = statistics.paired_difference(
                [ours[name][key] for key in both],
                [theirs[name][key] for key in both],
                [clusters[key] for key in both],
            )
    return compared


def difference_metrics(compared: dict[str, statistics.Difference]) -> dict[str, float]:
    fields = ("mean", "ci95_low", "ci95_high", "p_value", "detectable")
    named = {f"difference/{name}/{field}": getattr(gap, field) for name, gap in compared.items() for field in fields}
    return {name: value for name, value in named.items() if math.isfinite(value)}


# ---------------------------------------------------------------------------------------------------------------------


def _is_ours(description) -> bool:
    return bool((description.metadata or {}).get("model.sha256"))


def _answers(model: LoadedModel, wanted: list[tuple[Prompt, int]], generation: dict) -> Iterator[tuple]:
    """Yields ((prompt, repeat), {text, finish_reason, tokens, seconds, error}) in the order they are finished."""
    rows = [_row(model, prompt, repeat, generation) for prompt, repeat in wanted]
    if model.wrapper is not None:
        for index, [answer] in model.wrapper.answers(rows, {}, generation.get("batch_size") or 0):
            yield wanted[index], vars(answer)
        return
    for first in range(0, len(rows), CHUNK):
        start = time.perf_counter()
        try:
            outputs = list(model.pyfunc.predict(rows[first : first + CHUNK]))
            answers = [_answer_of(output) for output in outputs]
        except Exception as error:  # what a stranger's model raises is its rows' failure, not this program's
            answers = [{"text": "", "finish_reason": "error", "error": str(error)}] * len(rows[first : first + CHUNK])
        seconds = time.perf_counter() - start
        for offset, answer in enumerate(answers):
            yield wanted[first + offset], {"seconds": seconds} | answer


def _row(model: LoadedModel, prompt: Prompt, repeat: int, generation: dict) -> dict:
    """A prompt in the form the model takes: messages, or text rendered with the model's own chat template."""
    messages = list(prompt.messages) if prompt.messages else [{"role": "user", "content": prompt.prompt}]
    parameters = {name: generation[name] for name in ("max_tokens", "temperature", "top_p", "stop")}
    parameters["seed"] = generation["seed"] + repeat
    if model.is_chat:
        return {"messages": messages} | parameters
    if model.wrapper is not None and model.wrapper.template:
        return {"prompt": model.wrapper.render(messages)} | parameters
    text = prompt.prompt if prompt.prompt else "\n".join(message["content"] for message in messages)
    return {"prompt": text}


def _answer_of(output) -> dict:
    """A stranger's prediction as an answer."""
    if isinstance(output, dict) and output.get("choices"):
        choice, usage = output["choices"][0], output.get("usage") or {}
        return {
            "text": choice["message"]["content"] or "",
            "finish_reason": choice.get("finish_reason") or "stop",
            "prompt_tokens": usage.get("prompt_tokens"),
            "output_tokens": usage.get("completion_tokens"),
        }
    return {"text": str(output), "finish_reason": "stop"}


def _sample(model: LoadedModel, prompt: Prompt, repeat: int, answer: dict) -> Sample:
    failed = answer.get("error") or ""
    return Sample(
        id=prompt.id,
        repeat=repeat,
        model=model.uri,
        messages=list(prompt.messages) if prompt.messages else [{"role": "user", "content": prompt.prompt}],
        expected=list(prompt.expected),
        output=answer["text"],
        finish_reason=answer["finish_reason"],
        prompt_tokens=None if failed else answer.get("prompt_tokens"),
        output_tokens=None if failed else answer.get("output_tokens"),
        latency_seconds=answer.get("seconds", 0.0),
        scores={},
        reasons={},
        error={"type": "refused", "message": failed} if failed else None,
    )


def _scores(prompt: Prompt, sample: Sample) -> tuple[dict, dict]:
    if sample.error:
        return {call.name: None for call in prompt.scorers}, {
            call.name: f"not answered: {sample.error['message']}" for call in prompt.scorers
        }
    results = {
        call.name: scorers.score(call.name, sample.output, prompt.expected, call.options) for call in prompt.scorers
    }
    return {name: result.value for name, result in results.items()}, {
        name: result.reason for name, result in results.items()
    }


def _metrics(model: LoadedModel, samples: tuple[Sample, ...], estimates: dict) -> dict[str, float]:
    answered = [sample for sample in samples if sample.error is None]
    latencies = [sample.latency_seconds for sample in answered]
    metrics = {
        "rows": len(samples),
        "rows_failed": len(samples) - len(answered),
        "rows_unscored": sum(not any(value is not None for value in sample.scores.values()) for sample in answered),
        "model_load_seconds": model.load_seconds,
        "model_bytes": model.bytes,
    }
    for name, entry in estimates.items():
        for field in ("mean", "stderr", "ci95_low", "ci95_high"):
            metrics[f"{name}/{field}"] = getattr(entry, field)
    if latencies:
        metrics |= {f"latency_seconds/p{q}": statistics.percentile(latencies, q) for q in (50, 95)}
    peak = peak_memory_bytes()
    if peak:
        metrics["peak_memory_bytes"] = peak
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _fingerprint(model: LoadedModel, prompt_set: PromptSet, generation: dict, repeats: int) -> str:
    """What an answer depends on, as one hash: model files, wrapper, prompts, parameters, library versions."""
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime-genai", "torch", "transformers")}
    wrapper = cache.file_sha256(Path(model_logging.chat_model.__file__)) if model.wrapper is not None else ""
    content = [model.sha256, wrapper, model.is_chat, prompt_set.sha256, generation, repeats, versions]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def _journal(fingerprint: str, resume: bool) -> Iterator[Path]:
    """The file that answers are appended to; one of this process alone while another process holds the shared one."""
    folder = cache.root() / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{fingerprint}.jsonl"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        path = folder / f"{fingerprint}-{os.getpid()}.jsonl"
    if not resume:
        path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        lock.release()


def _read_journal(path: Path) -> dict[tuple[str, int], Sample]:
    """The answers an interrupted run left; a last line that was cut off is dropped, and the file mended."""
    if not path.exists():
        return {}
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            sample = Sample(**json.loads(line))
        except (ValueError, TypeError):
            break
        kept[sample.id, sample.repeat] = sample
    path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in kept.values()), encoding="utf-8")
    return kept


def release(scored: ScoredModel) -> ScoredModel:
    """The same results without the model, whose memory goes back."""
    freed = replace(scored, model=replace(scored.model, pyfunc=None, wrapper=None))
    gc.collect()
    return freed


def reset_peak_memory() -> None:
    """Starts the process's peak memory anew, where the kernel allows it (Linux, proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int | None:
    """The process's peak resident memory since the last reset; None where the system doesn't say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
