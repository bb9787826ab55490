"""What each ONNX export costs and keeps: speed, divergence from fp32, agreement and score, on one prompt set.

    python -m benchmarks.precision [prompt_set.jsonl]        default: the first 150 rows of prompts/general.jsonl

Every export answers the same prompts through the logged wrapper's own code, greedily, 48 tokens at most. Speed is the
ratio to fp32's in the same run: the exports take turns over thirds of the set, and the median of three ratios counts.
Agreement is the share of answers that equal fp32's, and of its text before the first difference. KL, kept tokens and
the change of ln PPL are `evaluate`'s fidelity over fp32's answers, with its intervals (slm/verdict/fidelity.py).

Beside the project's exports and the model builder's, the table has onnxruntime's own quantizers, on the fp32 export:
rounding to nearest, HQQ and GPTQ (arXiv:2210.17323), in blocks of 32. Olive's are its passes of the same kind. They
rename the output of a quantized head, so the head stays in fp32.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import first_prompts
from slm.base import cache
from slm.models import checkpoints, onnx_export
from slm.models.chat_model import SmallLanguageModel
from slm.prompts import prompt_sets
from slm.scorers import confined
from slm.verdict import fidelity

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
BLOCK = 32
CALIBRATION = 32  # prompts of the set, for GPTQ


def rounded(folder: Path, target: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

    quantize(folder, target, DefaultWeightOnlyQuantConfig(block_size=BLOCK, accuracy_level=4))


def hqq(folder: Path, target: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig

    quantize(folder, target, HQQWeightOnlyQuantConfig(block_size=BLOCK))


def gptq(folder: Path, target: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import GPTQWeightOnlyQuantConfig

    quantize(folder, target, GPTQWeightOnlyQuantConfig(Prompts(folder), block_size=BLOCK))


def olive_rounded(folder: Path, target: Path) -> None:
    from olive.passes.onnx.rtn_quantization import OnnxBlockWiseRtnQuantization

    with_olive(folder, target, OnnxBlockWiseRtnQuantization)


def olive_k_quant(folder: Path, target: Path) -> None:
    from olive.passes.onnx.kquant_quantization import OnnxKQuantQuantization

    with_olive(folder, target, OnnxKQuantQuantization)


QUANTIZERS: dict[str, Callable[[Path, Path], None]] = {  # onnxruntime's own, and Olive's
    "int4, onnxruntime's RTN": rounded,
    "int4, onnxruntime's HQQ": hqq,
    "int4, onnxruntime's GPTQ": gptq,
    "int4, Olive's RTN": olive_rounded,
    "int4, Olive's k-quant": olive_k_quant,
}


def quantize(folder: Path, target: Path, algorithm) -> None:
    """Quantizes the products of the fp32 export in `folder`; `target` has copies of its files."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    shutil.copytree(folder, target)  # onnx reads no weights from a file with several hard links
    quantizer = MatMulNBitsQuantizer(
        onnx.load(target / "model.onnx"), block_size=BLOCK, accuracy_level=4, algo_config=algorithm
    )
    quantizer.process()
    for file in target.glob("model.onnx*"):
        file.unlink()
    quantizer.model.save_model_to_file(str(target / "model.onnx"), use_external_data_format=True)


def with_olive(folder: Path, target: Path, algorithm) -> None:
    """Quantizes the products of the fp32 export in `folder`, all but the head, with one of Olive's passes."""
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    shutil.copytree(folder, target)
    settings = {"block_size": BLOCK, "accuracy_level": 4, "nodes_to_exclude": ["/lm_head/MatMul"]}
    made = target / "quantized"
    create_pass_from_dict(algorithm, settings, disable_search=True).run(
        ONNXModelHandler(str(target / "model.onnx")), str(made)
    )
    for file in target.glob("model.onnx*"):
        file.unlink()
    for file in made.iterdir():
        file.rename(target / file.name)
    made.rmdir()


class Prompts:
    """Inputs of the graph for a quantizer that calibrates: the first prompts of the set, each with an empty cache."""

    def __init__(self, folder: Path):
        self.folder = folder
        model = opened(folder)
        rows = [{"messages": list(row.messages)} for row in first_prompts.prompt_set().prompts[:CALIBRATION]]
        self._ids = iter([model.prepare(row)[0].prompt for row in rows])
        facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        self._names = facts["inputs"]
        self._layers, self._shape = facts["num_hidden_layers"], (1, facts["num_key_value_heads"], 0, facts["head_size"])

    def __deepcopy__(self, memo) -> "Prompts":  # the quantizer reads the inputs once more for each layer
        return Prompts(self.folder)

    def __iter__(self):
        return iter(self.get_next, None)

    def get_next(self) -> dict[str, np.ndarray] | None:
        ids = next(self._ids, None)
        if ids is None:
            return None
        inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
        for layer in range(self._layers):
            for part in ("past_key_names", "past_value_names"):
                inputs[self._names[part] % layer] = np.zeros(self._shape, dtype=np.float32)
        return inputs


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
        sizes[name], models[name] = export.bytes, opened(export.folder)
    fp32 = onnx_export.export(checkpoint, "fp32", "cpu").folder
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        for number, (name, quantizer) in enumerate(QUANTIZERS.items()):
            folder = Path(scratch) / str(number)
            quantizer(fp32, folder)
            sizes[name] = sum(file.stat().st_size for file in folder.iterdir())
            models[name] = opened(folder)
        print_table(models, sizes, rows, prompt_set, f"{checkpoint.name}, {len(rows)} prompts of {path.name}, CPU")


def opened(folder: Path) -> SmallLanguageModel:
    model = SmallLanguageModel()
    model.load_context(Context(folder))
    return model


def print_table(models: dict[str, SmallLanguageModel], sizes: dict[str, int], rows, prompt_set, title: str) -> None:

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

    changes = divergences(models, rows, answers["fp32"], {prompt.id: prompt.cluster for prompt in prompt_set})
    table = Table(title=title)
    columns = ("size", "speed / fp32", "KL, nats", "kept tokens, %", "Δ ln PPL", "equal answers", "equal text", "score")
    for column in ("export", *columns, "score / fp32"):
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
            interval(changes[name]["fidelity/kl"], 1, 4),
            interval(changes[name]["fidelity/top1"], 100, 1),
            interval(changes[name]["fidelity/nll_difference"], 1, 4),
            f"{agreement(answers[name], reference):.0%}",
            f"{prefix / sum(len(other.text) for other in reference):.0%}",
            f"{value:.3f}",
            f"{value / base:.2f}",
        )
    Console(width=200).print(table)


def divergences(models, rows, answers, clusters) -> dict[str, dict]:
    """By model, the estimates of slm/verdict/fidelity.py against fp32, over fp32's answers."""
    texts = [
        (models["fp32"].prepare(row)[0].prompt, list(answer.token_ids))
        for row, answer in zip(rows, answers, strict=True)
    ]
    reference: dict[tuple[int, int], np.ndarray] = {}
    for _ in models["fp32"].token_scores(texts, lambda row, first, p: reference.update({(row, first): p.copy()})):
        pass
    held = {
        row: np.concatenate([reference[key] for key in sorted(key for key in reference if key[0] == row)])
        for row in {row for row, _ in reference}
    }
    return {name: compared(model, texts, held, list(clusters), clusters) for name, model in models.items()}


def compared(model, texts, held, ids, clusters) -> dict:
    found: dict[int, list] = {row: [] for row in held}

    def see(row: int, first: int, log_q: np.ndarray) -> None:
        places = slice(first, first + len(log_q))
        found[row].append((first, fidelity.compare(held[row][places], log_q, texts[row][1][places])))

    for _ in model.token_scores(texts, see):
        pass
    prompts = []
    for row, pieces in sorted(found.items()):
        parts = [part for _, part in sorted(pieces, key=lambda piece: piece[0])]
        prompts.append(fidelity.TokenFidelity(ids[row], *(np.concatenate(kind) for kind in zip(*parts, strict=True))))
    return fidelity.estimates(fidelity.Fidelity(tuple(prompts)), clusters)


def interval(found, times: float, digits: int) -> str:
    low, mean, high = (times * value for value in (found.ci95_low, found.mean, found.ci95_high))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


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
