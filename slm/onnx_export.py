"""A checkpoint as an ONNX GenAI folder, by onnxruntime-genai's own model builder, kept in the cache.

The options behind each precision were chosen by measurement: benchmarks/precision.py prints the table.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from slm import cache
from slm.checkpoints import Checkpoint, failed
from slm.errors import BadInput

# prune_lm_head: only the last place's logits are needed, so no head is computed over whole prompts
OPTIONS = {
    "int4": {"prune_lm_head": "true", "algo_config": "k_quant_mixed"},
    "int8": {"prune_lm_head": "true"},
    "fp32": {"prune_lm_head": "true"},
    "fp16": {"prune_lm_head": "true"},
    "bf16": {"prune_lm_head": "true"},
}
# windowed_kv_cache: caches as short as a layer's window fail for prompts of different lengths in one batch
ALWAYS = {"windowed_kv_cache": "false"}
PRECISIONS = {"cpu": ("int4", "int8", "fp32"), "cuda": ("int4", "int8", "fp16", "bf16", "fp32")}


def check(precision: str, execution_provider: str) -> None:
    """Raises BadInput where the builder can't make this precision for this execution provider."""
    if execution_provider not in PRECISIONS:
        raise BadInput(f"execution_provider: {execution_provider!r} is none of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[execution_provider]:
        allowed = ", ".join(PRECISIONS[execution_provider])
        raise BadInput(f"precision: {precision!r} can't be exported for {execution_provider}; one of {allowed}")


def export(checkpoint: Checkpoint, precision: str, execution_provider: str, options: dict | None = None) -> Checkpoint:
    """The checkpoint exported once: a folder with genai_config.json, model.onnx and the tokenizer.

    Raises:
        BadInput: the builder doesn't know this architecture, or not in this precision.
    """
    check(precision, execution_provider)
    options = ALWAYS | (OPTIONS[precision] if options is None else options)
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    added = _for_builder(config)
    recipe = {
        "checkpoint": checkpoint.sha256,
        "precision": precision,
        "execution_provider": execution_provider,
        "options": " ".join(f"{name}={value}" for name, value in sorted(options.items())),
        "onnxruntime-genai": importlib.metadata.version("onnxruntime-genai"),
        "config": json.dumps(added, sort_keys=True),
    }

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            source = Path(scratch) / "checkpoint"  # the files, linked, under a config.json that the builder understands
            source.mkdir()
            for path in checkpoint.folder.iterdir():
                (source / path.name).symlink_to(path.resolve())
            (source / "config.json").unlink()
            (source / "config.json").write_text(json.dumps(config | added), encoding="utf-8")
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
            command += ["-o", str(target), "-p", precision, "-e", execution_provider, "-c", scratch]
            command += ["--extra_options", *(f"{name}={value}" for name, value in options.items())]
            environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise failed(f"model: {checkpoint.name} can't be exported in {precision}", done)

    folder, manifest = cache.folder(f"{checkpoint.name}-{precision}-{execution_provider}", recipe, build)
    return Checkpoint(checkpoint.name, folder, checkpoint.source, checkpoint.revision, manifest)


def _for_builder(config: dict) -> dict:
    """What transformers 5 leaves out of config.json, or says in another place, and the builder needs.

    Phi-3 and Mistral slide their window over every layer: without `layer_types` the builder makes full attention of
    it, and other texts beyond the window. Long Phi-3's rotation has its older name, and Gemma 3's two rotations lie
    one level deeper than the builder reads.
    """
    kind, added = config.get("model_type"), {}
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
