"""Fidelity's figures beside those of llama.cpp's `llama-perplexity --kl-divergence`, on the same weights and text.

    python -m benchmarks.llama_perplexity PATH/llama-perplexity [text]        default text: LICENSE

The baseline is the embedded GGUF with its values in F32. The candidate has the Q4_1 tensors rounded to Q4_0: once with
the rounded values in F32, where both programs compute the same thing, and once in Q4_0, whose products llama.cpp rounds
too. llama-perplexity scores the second half of each window of 512 tokens. It keeps the baseline's log probabilities in
16 bits.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from rich.console import Console
from rich.table import Table

from slm.answers import loading
from slm.engines.distributions import Reference, Text
from slm.models import checkpoints
from slm.models.chat_model import SmallLanguageModel
from slm.verdict import fidelity

WINDOW = 512
F32, Q4_0, Q4_1 = (GGMLQuantizationType[name] for name in ("F32", "Q4_0", "Q4_1"))
PRINTED = {"kl": "Mean +KLD", "top1": "Same top p", "nll_difference": r"Mean ln\(PPL\(Q\)/PPL\(base\)\)"}


def rounded(values: np.ndarray) -> np.ndarray:
    return quants.dequantize(quants.quantize(values, Q4_0), Q4_0).astype(np.float32)


def round_to_q4_0(file: Path) -> None:
    """Rounds the matrices of a checkpoint, the embedding aside, which the GGUF has in Q8_0."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(file)
    for name, values in weights.items():
        if values.ndim == 2 and "embed" not in name:
            weights[name] = rounded(values)
    save_file(weights, file, {"format": "pt"})


def rewrite(
    source: Path, target: Path, change: Callable[[np.ndarray], tuple[np.ndarray, GGMLQuantizationType]]
) -> None:
    """Writes a GGUF file in F32. `change` gives the data and the type of its Q4_1 tensors."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        values = quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        data, kind = change(values) if tensor.tensor_type == Q4_1 else (values, F32)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def windows(model, file: Path) -> list[Text]:
    """The text's whole windows. The first half of each is the context."""
    ids = model.token_ids(file.read_text(encoding="utf-8"))
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)
    half = WINDOW // 2 + 1
    return [Text(str(at), ids[at : at + half], ids[at + half : at + WINDOW]) for at in starts]


def ours(folder: Path, file: Path, scratch: Path) -> dict[str, float]:
    shutil.copytree(folder, scratch / "q4_0")
    round_to_q4_0(scratch / "q4_0" / "model.safetensors")
    baseline, candidate = opened(folder), opened(scratch / "q4_0")
    reference = Reference()
    reference.hold(baseline, windows(baseline.wrapper, file))
    found = reference.compared(candidate)
    return {name: np.concatenate([getattr(text, name) for text in found.prompts]).mean() for name in fidelity.MEASURES}


def opened(folder: Path) -> loading.OwnModel:
    wrapper = SmallLanguageModel()
    wrapper.load_context(SimpleNamespace(artifacts={"checkpoint": str(folder)}, model_config={}))
    return loading.OwnModel(SimpleNamespace(label=folder.name, is_chat=True), wrapper, 0.0, lambda: None)


def theirs(program: str, baseline: Path, candidate: Path, file: Path, scratch: Path) -> dict[str, float]:
    kept = scratch / "base.kld"
    if not kept.exists():
        run(program, "-m", baseline, "-f", file, "-c", WINDOW, "--kl-divergence-base", kept)
    printed = run(program, "-m", candidate, "-c", WINDOW, "--kl-divergence-base", kept, "--kl-divergence")
    figures = {name: float(re.search(rf"{words} *: *(-?[0-9.]+)", printed)[1]) for name, words in PRINTED.items()}
    return figures | {"top1": figures["top1"] / 100}


def run(*command) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    program, file = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "LICENSE")
    checkpoint = checkpoints.find("smollm2-135m-instruct").fetch()
    source = checkpoints._packaged_file(checkpoints.EMBEDDED["smollm2-135m-instruct"])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rewrite(source, scratch / "base.gguf", lambda values: (values, F32))
        rewrite(source, scratch / "values.gguf", lambda values: (rounded(values), F32))
        rewrite(source, scratch / "q4_0.gguf", lambda values: (quants.quantize(values, Q4_0), Q4_0))
        sides = {"here": ours(checkpoint.folder, file, scratch)}
        for label, candidate in (("llama.cpp, F32", "values.gguf"), ("llama.cpp, Q4_0", "q4_0.gguf")):
            sides[label] = theirs(program, scratch / "base.gguf", scratch / candidate, file, scratch)
    table = Table("figure", *sides, title=f"SmolLM2-135M, Q4_1 against Q4_0, {file.name}")
    for name in fidelity.MEASURES:
        table.add_row(name, *(f"{side[name]:.4f}" for side in sides.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
