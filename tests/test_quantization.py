"""int4 and int8 exports of the embedded model: what they keep of fp32. Other architectures: test_architectures.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from slm import chat_model, quantization
from slm.chat_model import OnnxRuntime, SlotRuntime
from slm.prompts import read_prompt_set


@pytest.fixture(scope="module")
def beginnings(fp32_export):
    """The token ids of 100 conversations and of parts of them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fp32_export.folder / "tokenizer.json"))
    template, special_tokens = chat_model.read_chat_template(fp32_export.folder)
    found = []
    for row in read_prompt_set(REPOSITORY / "prompts" / "general.jsonl", "").prompts[::3]:
        text = chat_model.render(template, special_tokens, list(row.messages))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found += [ids, ids[: len(ids) * 2 // 3]]
    return found


def next_tokens(folder: Path, prompts: list[list[int]], entries: dict[str, str] | None = None) -> np.ndarray:
    """Log probabilities of the token that follows each prompt, (prompts, vocabulary), by onnxruntime alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for entry in (entries or {}).items():
        options.add_session_config_entry(*entry)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    half = session.get_outputs()[1].type == "tensor(float16)"
    past = np.zeros((1, facts["num_key_value_heads"], 0, facts["head_size"]), np.float16 if half else np.float32)
    found = []
    for prompt in prompts:
        ids = np.array([prompt])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(prompt))[None]}
        given = {entry.name: given.get(entry.name, past) for entry in session.get_inputs()}
        found.append(session.run(["logits"], given)[0][0, -1])
    logits = np.array(found, dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def reference(fp32_export, beginnings):
    return next_tokens(fp32_export.folder, beginnings)


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence from the reference, in nats."""
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())


def test_int8_stays_ten_times_closer_to_fp32_than_int4(reference, beginnings, int8_export, int4_export):
    int8, int4 = (next_tokens(export.folder, beginnings) for export in (int8_export, int4_export))
    assert divergence(reference, int8) < 0.03
    assert divergence(reference, int4) < 0.3
    assert divergence(reference, int8) < 0.1 * divergence(reference, int4)
    assert (reference.argmax(-1) == int8.argmax(-1)).mean() > 0.9


def test_balancing_is_what_brings_int8_close(reference, beginnings, fp32_export, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "balanced", lambda *_: quantization.Balance({}, {}, {}))
    quantization.quantize(fp32_export.folder, tmp_path, "int8")
    assert divergence(reference, next_tokens(tmp_path, beginnings)) > 0.04


def test_the_exact_mode_for_processors_without_vnni_reaches_every_product_and_changes_no_number(
    beginnings, int8_export, tmp_path
):
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "exact.onnx")
    options.add_session_config_entry(*chat_model.EXACT_INTEGERS)
    model = str(int8_export.folder / "model.onnx")
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "exact.onnx", load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 30 * 5 + 1
    assert {kinds[node.input[1]] for node in products} == {onnx.TensorProto.UINT8}  # those that can't saturate
    exact = next_tokens(int8_export.folder, beginnings[:20], dict([chat_model.EXACT_INTEGERS]))
    assert np.array_equal(exact, next_tokens(int8_export.folder, beginnings[:20]))


@pytest.mark.parametrize(
    ("machine", "flags", "clipped"),
    [
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("AMD64", "avx2 avx512f", True),
        ("x86_64", None, True),
        ("aarch64", "asimd", False),
    ],
)
def test_a_session_asks_for_exact_sums_on_x86_without_vnni_only(
    int8_export, monkeypatch, tmp_path, machine, flags, clipped
):
    import onnxruntime

    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="utf-8")
    monkeypatch.setattr(chat_model.platform, "machine", lambda: machine)
    monkeypatch.setattr(chat_model, "CPU_FACTS", file)
    asked = {}
    monkeypatch.setattr(
        onnxruntime.SessionOptions, "add_session_config_entry", lambda self, name, value: asked.update({name: value})
    )
    facts = json.loads((int8_export.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    SlotRuntime(int8_export.folder, {}, facts)
    assert asked == ({"session.x64quantprecision": "1"} if clipped else {})


def test_onnxruntime_genai_takes_the_exact_mode_too(int8_export, beginnings, monkeypatch):
    from test_architectures import greedy

    found = []
    for clipped in (True, False):
        monkeypatch.setattr(chat_model, "integers_saturate", lambda clipped=clipped: clipped)
        found.append(greedy(OnnxRuntime(int8_export.folder, {}), beginnings[:2], [6, 6]))
    assert found[0] == found[1]


def test_a_tensor_that_is_read_twice_is_written_once(int4_export):
    import onnx

    graph = onnx.load(int4_export.folder / "model.onnx", load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer]
    assert len(names) == len(set(names))
    used = [node.op_type for node in graph.node if "lm_head.MatMul.weight_Q8" in node.input]
    assert sorted(used) == ["MatMulNBits", "Reshape"]  # the head, and the embedding that it is tied to


@pytest.mark.parametrize(
    ("layers", "more"),
    [
        (30, {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29}),
        (32, {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}),
    ],
)
def test_the_layers_that_llama_cpp_gives_more_bits_get_them(layers, more):
    for name, expected in (
        ("mlp/down_proj", more),
        ("attn/v_proj", more),
        ("attn/qkv_proj", more),
        ("mlp/up_proj", set()),
    ):
        names = {layer: f"/model/layers.{layer}/{name}/MatMul" for layer in range(layers)}
        assert {layer for layer in names if quantization.sensitive(names[layer], layers)} == expected
    assert quantization.sensitive("/lm_head/MatMul", layers)
