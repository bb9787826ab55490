"""A checkpoint as an ONNX GenAI folder, by onnxruntime-genai's own model builder, kept in the cache.

For the CPU, the builder writes the graph in fp32, tensor by tensor. slm/models/quantization.py makes int4 and int8 from
that graph. Each precision's recipe was chosen by measurement: benchmarks/precision.py prints the table.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slm.base import cache
from slm.base import environment as machine
from slm.base.errors import BadInput
from slm.models.checkpoints import REPOSITORY, Checkpoint, failed, rebuilt

# prune_lm_head: only the last place's logits are needed, so no head is computed over whole prompts
OPTIONS = {"prune_lm_head": "true"}
K_QUANT = {"algo_config": "k_quant_mixed"}
# windowed_kv_cache: caches as short as a layer's window fail for prompts of different lengths in one batch
ALWAYS = {"windowed_kv_cache": "false"}
# no fp32 for cuda: the builder (0.18) writes a graph whose attention gives no caches, which nothing can load
PRECISIONS = {"cpu": ("int4", "int8", "fp32"), "cuda": ("int4", "int8", "fp16", "bf16")}
QUANTIZED = {"cpu": ("int4", "int8")}  # by slm/models/quantization.py
# mixtures of experts, and checkpoints that are quantized already: theirs is the builder's own precision
BUILDERS_OWN = {"num_local_experts", "num_experts", "quantization_config"}


def check(precision: str, execution_provider: str) -> None:
    """Raises BadInput where the builder can't make this precision for this execution provider."""
    if execution_provider not in PRECISIONS:
        raise BadInput(f"execution_provider: {execution_provider!r} is none of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[execution_provider]:
        allowed = ", ".join(PRECISIONS[execution_provider])
        raise BadInput(f"precision: {precision!r} can't be exported for {execution_provider}; one of {allowed}")


def export(checkpoint: Checkpoint, precision: str, execution_provider: str, options: dict | None = None) -> Checkpoint:
    """The checkpoint exported once: a folder with genai_config.json, model.onnx and the tokenizer.

    Where the builder's `options` are given, the precision is its own.

    Raises:
        BadInput: the builder doesn't know this architecture, or not in this precision.
    """
    check(precision, execution_provider)
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    quantized = (
        options is None and precision in QUANTIZED.get(execution_provider, ()) and not BUILDERS_OWN & config.keys()
    )
    if options is None:
        options = OPTIONS | (K_QUANT if precision == "int4" and not quantized else {})
    options = ALWAYS | options
    added = _for_builder(config)
    recipe = {
        "checkpoint": checkpoint.sha256,
        "precision": precision,
        "execution_provider": execution_provider,
        "options": " ".join(f"{name}={value}" for name, value in sorted(options.items())),
        "onnxruntime-genai": machine.version("onnxruntime-genai"),
        "config": json.dumps(added, sort_keys=True),
    }
    if quantized:
        from slm.models import quantization

        recipe |= {"quantization": quantization.RECIPE, "onnxruntime": machine.version("onnxruntime")}

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            source = Path(scratch) / "checkpoint"  # the files, linked, under a config.json that the builder understands
            source.mkdir()
            for path in checkpoint.folder.iterdir():
                (source / path.name).symlink_to(path.resolve())
            (source / "config.json").unlink()
            (source / "config.json").write_text(json.dumps(config | added), encoding="utf-8")
            built = Path(scratch) / "fp32" if quantized else target
            command = ["onnxruntime_genai.models.builder", "-i", str(source), "-o", str(built), "-c", scratch]
            command += ["-p", "fp32" if quantized else precision, "-e", execution_provider]
            command += ["--extra_options", *(f"{name}={value}" for name, value in options.items())]
            done = _python(command)
            if quantized and not done.returncode:
                done = _python(["slm.models.quantization", str(built), str(target), precision])
        if done.returncode:
            raise failed(f"model: {checkpoint.name} can't be exported in {precision}", done)

    folder, manifest = cache.folder(f"{checkpoint.name}-{precision}-{execution_provider}", recipe, build)
    return rebuilt(Checkpoint(checkpoint.name, folder, checkpoint.source, checkpoint.revision, manifest))


def _python(module: list[str]) -> subprocess.CompletedProcess:
    """A module's command, with its words, in a process of its own."""
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *module]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def _for_builder(config: dict) -> dict:
    """What transformers 5 leaves out of config.json, or says in another place, and the builder needs.

    Phi-3 and Mistral slide their window over every layer: without `layer_types` the builder makes full attention of
    it, and other texts beyond the window. Long Phi-3's rotation has its older name, and Gemma 3's two rotations lie
    one level deeper than the builder reads.
    """
    kind = config.get("model_type")
    added: dict[str, Any] = {}
    rotation = config.get("rope_parameters") or {}
    if kind in ("phi3", "mistral") and config.get("sliding_window"):
        added["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    if kind == "phi3" and rotation.get("rope_type") == "longrope":
        added["rope_parameters"] = {"type": "longrope"} | rotation
    if kind == "gemma3_text":
        whole = {"rope_type": "default", "rope_theta": config.get("rope_theta", 1e6)}
        whole |= (config.get("rope_scaling") or {}) | rotation.get("full_attention", {})
        local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", 1e4)}
        local |= rotation.get("sliding_attention", {})
        layers = {"full_attention": whole, "sliding_attention": local}
        added["rope_parameters"] = layers | whole | {"rope_local_base_freq": local["rope_theta"]}
        added["rope_scaling"] = None
    return added
