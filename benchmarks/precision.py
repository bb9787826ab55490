"""What each ONNX export costs and keeps: speed, agreement with fp32, and score, on one prompt set.

    python -m benchmarks.precision [prompt_set.jsonl]        default: the first 150 rows of prompts/general.jsonl

Every export answers the same prompts through the logged wrapper's own code, greedily, 48 tokens at most. Speed is the
ratio to fp32's in the same run: the exports take turns over thirds of the set, and the median of three ratios counts.
Agreement is the share of answers that equal fp32's, and of its text before the first difference.
"""

import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import first_prompts
from slm.models import checkpoints, onnx_export
from slm.models.chat_model import SmallLanguageModel
from slm.prompts import prompt_sets
from slm.scorers import confined

EXPORTS = {  # the builder's options, where its own precision is meant
    "fp32": ("fp32", None),
    "int8": ("int8", None),
    "int8, the builder's, blocks of 32": ("int8", {}),
    "int8, the builder's, blocks of 128": ("int8", {"block_size": "128"}),
    "int4": ("int4", None),
    "int4 RTN": ("int4", {}),
    "int4 k-quant": ("int4", {"algo_config": "k_quant"}),
    "int4 k-quant, mixed": ("int4", onnx_export.K_QUANT),  # a large model's int4
    "int4 k-quant, mixed, blocks of 16": ("int4", onnx_export.K_QUANT | {"block_size": "16"}),
}
ROUNDS = 3


class Context:
    def __init__(self, folder):
        self.artifacts, self.model_config = {"onnx": str(folder)}, {}


def main() -> None:
    if given := sys.argv[1:]:
        path = Path(given[0])
        prompt_set = prompt_sets.read_prompt_set(path, str(path), confined.CHECKS).prompts
    else:
        path, prompt_set = first_prompts.FILE, first_prompts.prompt_set().prompts
    rows = [
        {"messages": list(prompt.messages or [{"role": "user", "content": prompt.prompt}]), "max_tokens": 48}
        for prompt in prompt_set
    ]
    checkpoint = checkpoints.find("smollm2-135m-instruct").fetch()
    models, sizes = {}, {}
    for name, (precision, options) in EXPORTS.items():
        options = options if options is None else onnx_export.OPTIONS | options
        export = onnx_export.export(checkpoint, precision, "cpu", options)
        sizes[name] = export.bytes
        models[name] = SmallLanguageModel()
        models[name].load_context(Context(export.folder))

    # the exports take turns over parts of the set; one pass serves speed, agreement and score
    answers: dict[str, list] = {name: [None] * len(rows) for name in models}
    ratios: dict[str, list[float]] = {name: [] for name in models}
    part = -(-len(rows) // ROUNDS)
    for first in range(0, len(rows), part):
        speeds = {}
        for name, model in models.items():
            start = time.perf_counter()
            for place, [answer] in model.answers(rows[first : first + part]):
                answers[name][first + place] = answer
            tokens = sum(answer.output_tokens for answer in answers[name][first : first + part])
            speeds[name] = tokens / (time.perf_counter() - start)
        for name, speed in speeds.items():
            ratios[name].append(speed / speeds["fp32"])

    table = Table(title=f"{checkpoint.name}, {len(rows)} prompts of {path.name}, CPU")
    for column in ("export", "size", "speed / fp32", "equal answers", "equal text", "score", "score / fp32"):
        table.add_column(column, justify="left" if column == "export" else "right")
    reference = answers["fp32"]
    base = score(prompt_set, reference)
    for name in models:
        prefix = sum(common(answer.text, other.text) for answer, other in zip(answers[name], reference, strict=True))
        value = score(prompt_set, answers[name])
        table.add_row(
            name,
            f"{sizes[name] / 1e6:.0f} MB",
            f"{statistics.median(ratios[name]):.2f}",
            f"{agreement(answers[name], reference):.0%}",
            f"{prefix / sum(len(other.text) for other in reference):.0%}",
            f"{value:.3f}",
            f"{value / base:.2f}",
        )
    Console(width=120).print(table)


def agreement(answers, reference) -> float:
    """The share of answers that are the reference's to the letter."""
    return statistics.fmean(answer.text == other.text for answer, other in zip(answers, reference, strict=True))


def common(text: str, other: str) -> int:
    """Characters before the first difference."""
    return next((at for at, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def score(prompt_set, answers) -> float:
    values = []
    for prompt, answer in zip(prompt_set, answers, strict=True):
        results = [confined.score(call.name, answer.text, prompt.expected, call.options) for call in prompt.scorers]
        scored = [result.value for result in results if result.value is not None]
        values += [sum(scored) / len(scored)] if scored else []
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
