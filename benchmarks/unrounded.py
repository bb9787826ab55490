"""The divergence of `int4`, `int8` and llama.cpp's Q4_K_M from weights that were not rounded before.

    python -m benchmarks.unrounded PATH/llama-quantize

The embedded checkpoint was rounded to Q4_1. So each weight gets a random part of its step here, and the checkpoint with
these weights is the reference. `llama-quantize` makes Q4_K_M of it; its values are computed in fp32. The figures are
those of benchmarks/precision.py, over fp32's answers to every second prompt of its set. Two cores need about four
minutes, and the cache keeps two fp32 exports of 0.5 GB.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import first_prompts
from benchmarks.llama_perplexity import F32, rewrite
from benchmarks.precision import divergences, opened
from slm.base import cache
from slm.models import checkpoints, onnx_export, quantization
from slm.models.onnx_graph import Graph
from slm.models.rounding import BLOCK


def main() -> None:
    source = checkpoints._packaged_file(checkpoints.EMBEDDED["smollm2-135m-instruct"])
    generator = np.random.default_rng(0)

    def unrounded(values: np.ndarray):
        blocks = values.reshape(-1, BLOCK)
        steps = np.ptp(blocks, axis=1, keepdims=True) / 15
        moved = blocks + (generator.random(blocks.shape, dtype=np.float32) - 0.5) * steps
        return moved.reshape(values.shape), F32

    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        whole, quantized = Path(scratch, "unrounded.gguf"), Path(scratch, "q4_k_m.gguf")
        rewrite(source, whole, unrounded)
        subprocess.run([sys.argv[1], whole, quantized, "Q4_K_M"], check=True, capture_output=True)
        fp32 = exported(whole)
        models, sizes = {"fp32": opened(fp32), "Q4_K_M": opened(exported(quantized))}, {}
        sizes["Q4_K_M"] = quantized.stat().st_size
        for name, precision, large in (
            ("a small model's int4", "int4", False),
            ("a large model's int4", "int4", True),
            ("int8", "int8", False),
        ):
            folder = Path(scratch, name)
            folder.mkdir()
            quantization._large = lambda graph, large=large: large
            quantization.quantize(Graph(fp32), folder, precision)
            sizes[name] = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
            models[name] = opened(folder)
        print_table(models, sizes)


def exported(file: Path) -> Path:
    return onnx_export.export(checkpoints.find(str(file)).fetch(), "fp32", "cpu").folder


def print_table(models, sizes: dict[str, int]) -> None:
    prompts = first_prompts.prompt_set().prompts[::2]
    rows = [{"messages": list(prompt.messages), "max_tokens": 48} for prompt in prompts]
    answers = [answer for _, [answer] in sorted(models["fp32"].answers(rows), key=lambda found: found[0])]
    found = divergences(models, rows, answers, {prompt.id: prompt.cluster for prompt in prompts})
    table = Table("from unrounded weights", "size", "KL, nats", "kept tokens", title="SmolLM2-135M, CPU")
    for name, size in sizes.items():
        kl, kept = found[name]["fidelity/kl"], found[name]["fidelity/top1"]
        table.add_row(name, f"{size / 1e6:.0f} MB", f"{kl.mean:.3f} ± {kl.stderr:.3f}", f"{kept.mean:.1%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
