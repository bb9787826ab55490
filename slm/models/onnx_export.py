"""Exports a checkpoint as an ONNX GenAI folder, with onnxruntime-genai's own model builder. The cache keeps the export.

For the CPU, slm/models/graph_building.py makes int4 and int8 from the builder's fp32 graph, tensor by tensor. The
recipe of each precision was chosen by measurement: benchmarks/precision.py prints the table.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slm.base import cache
from slm.base import environment as machine
from slm.base.errors import BadInput, Unavailable
from slm.models.checkpoints import REPOSITORY, Checkpoint, failed, rebuilt

# prune_lm_head: an answer needs only the last position's logits, so the head is not computed over whole prompts
OPTIONS = {"prune_lm_head": "true"}
K_QUANT = {"algo_config": "k_quant_mixed"}
# windowed_kv_cache: a cache as short as a layer's window fails if prompts of one batch differ in length
ALWAYS = {"windowed_kv_cache": "false"}
# no fp32 for cuda: the builder (0.18) writes attention without caches, and no runtime loads that graph
PRECISIONS = {"cpu": ("int4", "int8", "fp32"), "cuda": ("int4", "int8", "fp16", "bf16")}
AS_GIVEN = "as given"  # the precision of a ready ONNX folder
QUANTIZED = {"cpu": ("int4", "int8")}  # by slm/models/graph_building.py
# mixtures of experts and quantized checkpoints get the builder's own precision
BUILDERS_OWN = {"num_local_experts", "num_experts", "quantization_config"}
BYTES_PER_WEIGHT = {"int4": 0.85, "int8": 1.1, "fp16": 2.1, "bf16": 2.1, "fp32": 4.1}  # an export's; never less
SPARE_BYTES = 2**26  # for the tokenizer and the graph
SETTINGS = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}  # of an export's processes, in the environment


def check(precision: str, execution_provider: str, runtime: str = "auto") -> None:
    """Raises BadInput if this project exports no such precision for the execution provider, or can't run the export."""
    if execution_provider not in PRECISIONS:
        raise BadInput(f"execution_provider: {execution_provider!r} is none of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[execution_provider]:
        allowed = ", ".join(PRECISIONS[execution_provider])
        raise BadInput(f"precision: {precision!r} can't be exported for {execution_provider}; one of {allowed}")
    if runtime == "onnxruntime" and execution_provider != "cpu":
        raise BadInput(f"runtime: onnxruntime runs on the CPU here, not on {execution_provider}; leave runtime=auto")


def export(
    checkpoint: Checkpoint,
    precision: str,
    execution_provider: str,
    options: dict | None = None,
    tell: Callable[[float], None] = lambda share: None,
) -> Checkpoint:
    """The checkpoint as an export, made only once: genai_config.json, model.onnx and the tokenizer.

    `tell` is called with the share of the weights that are written, where this project quantizes. With `options` for
    the builder, the builder makes the precision itself. For mixtures of experts and quantized checkpoints, the builder
    always makes it.

    Raises:
        BadInput: the precision or execution provider is unknown, or the builder refuses the architecture.
        Unavailable: the disk or memory is used up.
    """
    from slm.models import graph_building, quantization

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
    from slm.models.chat_model import KEEP

    widened = execution_provider == "cpu" and options.get("prune_lm_head") == "true"
    if widened:
        recipe["head"] = f"{KEEP} 1"
    if quantized:
        recipe |= {"quantization": quantization.RECIPE, "onnxruntime": machine.version("onnxruntime")}

    def build(target: Path) -> None:
        _check_room(checkpoint, precision, target)
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            source = Path(scratch) / "checkpoint"  # links to the files, with a config.json that the builder understands
            source.mkdir()
            for path in checkpoint.folder.iterdir():
                (source / path.name).symlink_to(path.resolve())
            (source / "config.json").unlink()
            (source / "config.json").write_text(json.dumps(config | added), encoding="utf-8")
            command = ["slm.models.graph_building", precision if quantized else graph_building.AS_BUILT, str(target)]
            command += ["-i", str(source), "-c", scratch, "-p", "fp32" if quantized else precision]
            command += ["-e", execution_provider, "--extra_options"]
            done = _python(command + [f"{name}={value}" for name, value in options.items()], tell)
        if widened and not done.returncode:
            _widen_head(target)
        if done.returncode:
            raise failed(f"model: {checkpoint.name} can't be exported in {precision}", done)

    folder, manifest = cache.folder(f"{checkpoint.name}-{precision}-{execution_provider}", recipe, build)
    return rebuilt(Checkpoint(checkpoint.name, folder, checkpoint.source, checkpoint.revision, manifest))


def _check_room(checkpoint: Checkpoint, precision: str, target: Path) -> None:
    """Refuses an export that the disk can't hold.

    Raises:
        Unavailable: the disk is too full.
    """
    import safetensors

    weights = 0
    for path in checkpoint.folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            names = file.keys()
            weights += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    needed, free = BYTES_PER_WEIGHT[precision] * weights + SPARE_BYTES, shutil.disk_usage(target).free
    if free < needed:
        found = f"the export needs {needed / 1e9:.1f} GB, and {target.parent} has {free / 1e9:.1f} GB"
        remedy = "set PHI3_MLFLOW_CACHE to a folder on another disk"
        raise Unavailable(f"model: {checkpoint.name} can't be exported in {precision}: {found}; {remedy}")


def _python(module: list[str], tell: Callable[[float], None]) -> subprocess.CompletedProcess:
    """Runs a module of Python with its arguments, in its own process. `tell` gets the shares that it prints."""
    from slm.models.graph_building import SHARE

    command, environment = [sys.executable, "-m", *module], os.environ | SETTINGS
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(SHARE):
                    tell(float(line.removeprefix(SHARE)))
        except BaseException:
            process.kill()
            raise
        process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, "", errors.read())


def _widen_head(folder: Path) -> None:
    """Lets a caller ask a graph with a pruned head for the logits of more places than the last one.

    The graph gets the optional input KEEP, as Optimum's exports have it: the number of last places that get logits,
    and 0 for all. The default is 1, so nothing changes for a runtime that doesn't know the input. The output's declared
    length stays 1, because onnxruntime-genai takes it at its word. Graphs whose head isn't pruned as the builder
    prunes it stay as they are.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from slm.models.chat_model import KEEP

    facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    file = folder / facts["filename"]
    model = onnx.load(file, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    gather, unsqueeze = (nodes.get(f"/lm_head/prune/{kind}") for kind in ("Gather", "Unsqueeze"))
    if gather is None or unsqueeze is None or KEEP in {entry.name for entry in model.graph.input}:
        return
    kept, last = "/lm_head/kept", np.iinfo(np.int64).max
    for name, value in ((KEEP, 1), (f"{kept}/ends", [last]), (f"{kept}/axes", [1]), (f"{kept}/zero", [0])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), name))
    model.graph.input.append(helper.make_tensor_value_info(KEEP, TensorProto.INT64, []))
    added = [
        helper.make_node("Neg", [KEEP], [f"{kept}/begin"], f"{kept}/Neg"),
        helper.make_node("Unsqueeze", [f"{kept}/begin", f"{kept}/zero"], [f"{kept}/starts"], f"{kept}/Unsqueeze"),
        helper.make_node(
            "Slice",
            [gather.input[0], f"{kept}/starts", f"{kept}/ends", f"{kept}/axes"],
            [unsqueeze.output[0]],
            f"{kept}/Slice",
        ),
    ]
    place = list(model.graph.node).index(gather)
    rest = [node for node in model.graph.node if node.name not in (gather.name, unsqueeze.name)]
    del model.graph.node[:]
    model.graph.node.extend([*rest[:place], *added, *rest[place:]])
    stale = [entry for entry in model.graph.value_info if entry.name.startswith("/lm_head/prune/")]
    for entry in stale:
        model.graph.value_info.remove(entry)
    onnx.save(model, file)


def _for_builder(config: dict) -> dict:
    """Entries for config.json that the builder needs, and that transformers 5 leaves out or writes in another place.

    Phi-3 and Mistral have a sliding window in every layer. Without `layer_types`, the builder makes full attention,
    which gives other texts beyond the window. For long Phi-3, the type of the rotation is added under its older name.
    Gemma 3's two rotations are one level deeper than the builder reads, so they move up.
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
