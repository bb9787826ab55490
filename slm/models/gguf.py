"""Converts a .gguf file into a checkpoint folder.

    python -m slm.models.gguf FILE FOLDER

slm/models/checkpoints.py runs this module as a process, and keeps the folder in the cache.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

END_OF_TURN = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")  # the same list as in llama.cpp
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # names of Llama 3's tokenizer in tokenizer.ggml.pre


def convert(file: Path, target: Path) -> None:
    """Writes a GGUF file as a plain fp32 safetensors checkpoint, with tokenizer and chat template.

    transformers refuses to save a model that it read from GGUF. So the weights move into a model without the
    quantization's configuration. transformers does not read two values from GGUF: the window of Phi-3's attention and
    the token that ends a turn. They are added as in llama.cpp.

    Raises:
        ValueError: the file has a long rotation, which transformers would leave out without an error.
    """
    with _read_once(file) as content:
        _convert(file, target, content)


def _convert(file: Path, target: Path, content: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    if any(tensor.name.startswith("rope_factors_long") for tensor in content.tensors):
        raise ValueError("long rotation (rope_factors_long) can't be read from GGUF; give the safetensors checkpoint")
    tokenizer = save_tokenizer(file, target)
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    window = content.get_field("phi3.attention.sliding_window")
    if window:
        settings["sliding_window"] = window.contents()
    with torch.device("meta"):
        plain = type(quantized)(type(quantized.config)(**settings))
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantized.generation_config
    template, vocabulary = tokenizer.chat_template or "", tokenizer.get_vocab()
    ends = {vocabulary[text] for text in END_OF_TURN if text in template and text in vocabulary}
    known = {tokenizer.eos_token_id} - {None}
    if ends - known:
        plain.generation_config.eos_token_id = sorted(ends | known)
    plain.save_pretrained(target)


def save_tokenizer(file: Path, target: Path):
    """Writes a GGUF file's tokenizer and chat template as files of a checkpoint. Returns the tokenizer.

    GGUF names a tokenizer and leaves a part of its rules to the program that reads it. transformers does not know all
    of them. So this function sets them as llama.cpp (src/llama-vocab.cpp) and the models' own tokenizer.json do:

    - SmolLM: each digit is a token, and is split off before spaces are.
    - Llama 3: a word that is in the vocabulary is one token, whatever the merges give.
    - Phi-3: the special tokens absorb the white space after them.
    """
    from transformers import AutoTokenizer

    with _read_once(file) as content:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        fields = content.fields
    tokenizer.save_pretrained(target)
    architecture, kind, rules = (
        fields[name].contents() if name in fields else ""
        for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    path = target / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if rules == "smollm":
        words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        digits = {"type": "Digits", "individual_digits": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, words]}
    elif rules in WHOLE_WORDS:
        content["model"]["ignore_merges"] = True
    elif (architecture, kind) == ("phi3", "llama"):
        for token in content["added_tokens"]:
            token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    else:
        return tokenizer
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return AutoTokenizer.from_pretrained(target)


@contextmanager
def _read_once(file: Path) -> Iterator[Any]:
    """The file's GGUFReader, which transformers takes too while the block lasts.

    transformers reads the file again for the configuration, the tokenizer and the weights. Each reading of a vocabulary
    of 128,000 tokens takes seconds.
    """
    library: Any = importlib.import_module("gguf")
    usual, content = library.GGUFReader, library.GGUFReader(file)
    library.GGUFReader = lambda path: content
    try:
        yield content
    finally:
        library.GGUFReader = usual


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
