"""Checks genai_config.json of an ONNX GenAI folder, and rebuilds it from the settings that may reach the runtime.

onnxruntime-genai obeys every setting in this file. A setting can load a library, write a profile or open another
folder. The runtime also uses some names as C format strings. So SCHEMA lists every allowed setting with its allowed
values. Any other setting is refused, and the error names it. Only the text that `rebuilt` makes is logged. The file of
a logged model is checked by `read` before it is loaded.

SCHEMA has the keys of onnxruntime-genai 0.18 (src/config.cpp) for a text decoder on the CPU or CUDA. Models for images
or speech, and models of several graphs, are refused. Execution providers that name libraries or files are refused too.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from slm.base import strict_json
from slm.base.errors import BadInput

NAME = "genai_config.json"
PROVIDERS = ("cpu", "cuda")


def _whole(low: int, high: int) -> dict:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> dict:
    return {"type": "number", "minimum": low, "maximum": high}


def _mapping(properties: dict, required: tuple[str, ...] = ()) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


YES_NO = {"type": "boolean"}
SWITCH = {"enum": ["0", "1"]}
TOKEN = _whole(-1, 2**24)
LAYERS = {"type": "array", "items": _whole(0, 4095), "maxItems": 4096}
# A graph's own names. The runtime uses them as C formats: %d becomes a layer's number. No other format is allowed.
NAMES = {
    "type": "object",
    "propertyNames": {"pattern": r"^[a-z][a-z_]{0,63}\Z"},
    "additionalProperties": {"type": "string", "pattern": r"^[\w./:-]{0,100}(%d[\w./:-]{0,100})?\Z"},
    "maxProperties": 64,
}
FIGURES = {  # settings of the runtime's own batches and drafts, which this project doesn't use
    "type": "object",
    "propertyNames": {"pattern": r"^[a-z][a-z_]{0,63}\Z"},
    "additionalProperties": {"anyOf": [YES_NO, _number(0, 2**40)]},
    "maxProperties": 16,
}
SESSION_OPTIONS = _mapping(
    {
        "log_id": {"type": "string", "pattern": r"^[\w. -]{0,64}\Z"},
        "log_severity_level": _whole(0, 4),
        "log_verbosity_level": _whole(0, 100),
        "intra_op_num_threads": _whole(0, 1024),
        "inter_op_num_threads": _whole(0, 1024),
        "enable_cpu_mem_arena": YES_NO,
        "enable_mem_pattern": YES_NO,
        "graph_optimization_level": {
            "enum": ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]
        },
        "session.x64quantprecision": SWITCH,
        "session.use_device_allocator_for_initializers": SWITCH,
        "ep.cuda.fpa_intb_gemm": SWITCH,
        "optimization.disable_specified_optimizers": {"enum": ["MatMulNBitsFusion"]},
        "provider_options": {
            "type": "array",
            "maxItems": 1,
            "items": _mapping(
                {
                    "cpu": _mapping({}),
                    "cuda": _mapping(
                        {
                            "device_id": {"type": "string", "pattern": r"^\d{1,3}\Z"},
                            "gpu_mem_limit": {"type": "string", "pattern": r"^\d{1,15}\Z"},
                            "arena_extend_strategy": {"enum": ["kNextPowerOfTwo", "kSameAsRequested"]},
                        }
                        | dict.fromkeys(
                            (
                                "enable_cuda_graph",
                                "enable_skip_layer_norm_strict_mode",
                                "do_copy_in_default_stream",
                                "prefer_nhwc",
                                "use_tf32",
                            ),
                            SWITCH,
                        )
                    ),
                }
            ),
        },
    }
)
DECODER = _mapping(
    {
        "filename": {"type": "string"},
        "session_options": SESSION_OPTIONS,
        "run_options": _mapping(
            {"memory.enable_memory_arena_shrinkage": {"type": "string", "pattern": r"^[\w:;]{0,64}\Z"}}
        ),
        "inputs": NAMES,
        "outputs": NAMES,
        "head_size": _whole(1, 65536),
        "hidden_size": _whole(1, 2**20),
        "num_attention_heads": _whole(1, 65536),
        "num_key_value_heads": _whole(1, 65536),
        "num_hidden_layers": _whole(1, 4096),
        "layer_types": {
            "type": "array",
            "items": {"enum": ["conv", "full_attention", "linear_attention", "sliding_attention"]},
            "maxItems": 4096,
        },
        "conv_cache_size": _whole(0, 4096),
        "state_update_capacity": _whole(0, 2**24),
        "state_groups": {
            "type": "array",
            "maxItems": 16,
            "items": _mapping({"kind": {"enum": ["paged_kv", "fixed_conv", "fixed_recurrent"]}, "layer_ids": LAYERS}),
        },
        "sliding_window": _mapping(
            {
                "window_size": _whole(1, 2**24),
                "pad_value": _whole(-1, 2**24),
                "alignment": {"enum": ["left", "right"]},
                "slide_key_value_cache": YES_NO,
                "slide_inputs": YES_NO,
                "layers": LAYERS,
                "cache_slack": _whole(0, 2**24),
            }
        ),
    },
    required=("filename",),
)
SCHEMA = _mapping(
    {
        "model": _mapping(
            {
                "type": {"type": "string", "pattern": r"^[a-z0-9_]{1,64}\Z"},
                "decoder": DECODER,
                "vocab_size": _whole(1, 2**24),
                "context_length": _whole(1, 2**24),
                "eos_token_id": {"anyOf": [TOKEN, {"type": "array", "items": TOKEN, "minItems": 1, "maxItems": 64}]},
            }
            | {
                f"{name}_token_id": TOKEN
                for name in ("bos", "pad", "sep", "decoder_start", "image", "bot", "eot", "bor", "eor")
            },
            required=("decoder",),
        ),
        "search": _mapping(
            {
                "do_sample": YES_NO,
                "early_stopping": YES_NO,
                "past_present_share_buffer": YES_NO,
                "min_length": _whole(0, 2**24),
                "max_length": _whole(0, 2**24),
                "batch_size": _whole(1, 4096),
                "num_beams": _whole(1, 1024),
                "num_return_sequences": _whole(1, 1024),
                "no_repeat_ngram_size": _whole(0, 4096),
                "top_k": _whole(0, 2**24),
                "top_p": _number(0, 1),
                "temperature": _number(0, 100),
                "repetition_penalty": _number(0, 100),
                "length_penalty": _number(-100, 100),
                "diversity_penalty": _number(-100, 100),
                "random_seed": _whole(-1, 2**31 - 1),
                "chunk_size": _whole(1, 2**24),
            }
        ),
        "engine": _mapping({"dynamic_batching": FIGURES, "static_batching": FIGURES}),
        "speculative": FIGURES,
    },
    required=("model",),
)


def read(folder: Path) -> dict:
    """The settings in a folder's genai_config.json.

    Raises:
        BadInput: the file is not JSON, gives a key twice, or holds a setting or a value that is not allowed.
    """
    path = folder / NAME
    try:
        content: Any = strict_json.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"model: {path} can't be read as JSON: {error}") from None
    problem = _problem(content)
    if problem:
        raise BadInput(f"model: {path} {problem}")
    return content


def rebuilt(content: dict) -> bytes:
    """The settings as JSON text. Equal settings give equal bytes: keys are sorted."""
    return (json.dumps(content, indent=4, sort_keys=True, allow_nan=False) + "\n").encode()


def providers(content: dict) -> tuple[str, ...]:
    """The execution providers that the settings list. An empty tuple means the CPU."""
    options = content["model"]["decoder"].get("session_options", {}).get("provider_options", [])
    return tuple(name for entry in options for name in entry)


def _problem(content: object) -> str:
    """The fault in the settings, as the end of an error line; "" if there is no fault."""
    import jsonschema

    decoder = content.get("model", {}) if isinstance(content, dict) else None
    decoder = decoder.get("decoder") if isinstance(decoder, dict) else None
    if not isinstance(decoder, dict) or "filename" not in decoder:
        return "names no decoder; export the model again"
    if not is_inside(decoder["filename"]):
        return f"names {decoder['filename']!r:.80}, which is not a file in the model's folder"
    if not decoder["filename"].endswith(".onnx"):
        return f"names the graph {decoder['filename']!r:.80}, which is not an .onnx file"
    errors = sorted(jsonschema.Draft202012Validator(SCHEMA).iter_errors(content), key=lambda error: error.json_path)
    if not errors:
        return ""
    error, place = errors[0], errors[0].json_path.removeprefix("$.")
    unknown = sorted(set(error.instance) - set(error.schema["properties"])) if _names_unknown(error) else []
    if unknown and place.endswith("provider_options[0]"):
        return f"asks for the execution provider {unknown[0]!r:.80}; write one of {', '.join(PROVIDERS)}"
    if unknown:
        shown = f"{place}.{unknown[0]}".removeprefix("$.")
        return f"sets {shown!r:.120} to {_value(error.instance[unknown[0]])}, which is not allowed; remove it"
    reason = " ".join(error.message.split())
    return f"has {_value(error.instance)} as {place:.120}, which is not allowed: {reason:.120}"


def _names_unknown(error) -> bool:
    return error.validator == "additionalProperties" and isinstance(error.schema.get("properties"), dict)


def _value(value: object) -> str:
    return f"{value!r:.80}"


def is_inside(name: object) -> bool:
    """Whether a name is a relative file path that stays inside its folder."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""
