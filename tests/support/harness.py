"""lm-evaluation-harness's own models, of transformers and of OpenAI's completions, on the same tasks as ours."""

from dataclasses import replace
from pathlib import Path

from slm.answers.asking import ModelFacts
from slm.engines.tasks import reading


def evaluated(folder: Path, tasks: str, limit: int, templated: bool = False) -> dict:
    """What the library finds with its `hf` model on a checkpoint: results, and samples by task and document."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return _evaluated(theirs, tasks, limit, templated)


def by_api(url: str, model: str, folder: Path, tasks: str, limit: int, tokenized: bool) -> dict:
    """What the library finds with its model `local-completions`, which asks a server. `folder` has the tokenizer."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    theirs = LocalCompletionsAPI(
        base_url=url, model=model, tokenizer=str(folder), tokenized_requests=tokenized, max_retries=1
    )
    return _evaluated(theirs, tasks, limit, False)


def _evaluated(model, tasks: str, limit: int, templated: bool) -> dict:
    from lm_eval.evaluator import evaluate

    task_set = reading.read(tasks, limit, templated=templated)
    reading.fewshot_from_start(task_set.tasks)
    return evaluate(
        lm=model,
        task_dict=dict(task_set.loaded),
        limit=limit or None,
        bootstrap_iters=0,
        apply_chat_template=templated,
        fewshot_as_multiturn=True,
    )


def ours(loaded, tasks: str, limit: int, templated: bool = False) -> dict:
    """What the library finds with a wrapper that MLflow loaded, through our model of its kind."""
    from types import SimpleNamespace

    from slm.answers import forms, loading
    from slm.engines.tasks.harness_model import HarnessModel

    wrapper = loaded.unwrap_python_model()
    form = forms.Form("messages", True, {name: forms.Field(name) for name in forms.NAMES}, {}, wrapper.template)
    facts = ModelFacts("m", "m", "m", replace(form, special_tokens=wrapper.special_tokens), 0.0, "m", code_sha256="c")
    model = loading.OwnModel(facts, wrapper, 0.0, lambda: None)
    kept = SimpleNamespace(kept={}, add=lambda *_: None)
    return _evaluated(HarnessModel(model, kept, lambda tokens: None), tasks, limit, templated)
