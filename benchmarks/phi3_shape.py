"""Phi-3-mini-4k's true shape with random bf16 weights, as a checkpoint, and as a GGUF of the same weights in f16.

The figures are those of the model's public config.json: 3.8 B weights, a window of 2047 tokens, 32,064 tokens. The
tokenizer is the embedded model's, without the tokens that would be beyond the vocabulary. The GGUF needs a file with
Phi-3's vocabulary (ggml-vocab-phi-3.gguf in llama.cpp's models/), which its programs read and don't use.
"""

import json
import shutil
from pathlib import Path

CONFIG = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def checkpoint(folder: Path, tokenizer: Path) -> None:
    """Writes the checkpoint into `folder`. `tokenizer` is a folder with the embedded model's tokenizer."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    Phi3ForCausalLM(Phi3Config(**CONFIG, **ids)).save_pretrained(folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < CONFIG["vocab_size"]}
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def gguf(folder: Path, target: Path, vocabulary: Path) -> None:
    """Writes the checkpoint's weights as a GGUF file in f16."""
    import torch
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from safetensors import safe_open

    writer = GGUFWriter(target, "phi3")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(CONFIG["original_max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_dimension_count(CONFIG["hidden_size"] // CONFIG["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(CONFIG["sliding_window"])
    writer.add_file_type(1)
    for field in GGUFReader(vocabulary).fields.values():
        if field.name.startswith("tokenizer."):
            of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    files = sorted(folder.glob("*.safetensors"))
    arrays = []
    for path in files:
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name in names:
                shape = file.get_slice(name).get_shape()
                narrow = len(shape) == 2
                dtype = torch.float16 if narrow else torch.float32
                arrays.append((path, name, dtype))
                size = 2 if narrow else 4
                for part in shape:
                    size *= part
                writer.add_tensor_info(_gguf_name(name), shape, torch.empty(0, dtype=dtype).numpy().dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for path, name, dtype in arrays:
        with safe_open(path, "pt") as file:
            writer.write_tensor_data(file.get_tensor(name).to(dtype).numpy())
    writer.close()


def _gguf_name(name: str) -> str:
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    layer, inner = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[inner]}"
