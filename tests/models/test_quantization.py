"""int4 and int8 exports of the embedded model: what they keep of fp32. Other architectures: test_architectures.py.

The sessions here are plain ones, as those of other programs. On x86 without VNNI onnxruntime clips a sum of two
products there; the exports are made so that no sum is that large. So each number here holds on both kinds of processor.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import REPOSITORY
from support.effort import LONG
from support.token_ids import greedy, next_tokens

from slm.models import chat_model, quantization, rounding
from slm.models.chat_model import ContinuousRuntime, OnnxRuntime
from slm.models.chat_parts import runtime
from slm.models.error_feedback import second_moments
from slm.models.onnx_graph import Graph
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS


@pytest.fixture(scope="module")
def beginnings(fp32_export):
    """The token ids of 25 conversations and of parts of them; of 50 in a long run."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fp32_export.folder / "tokenizer.json"))
    template, special_tokens = chat_model.read_chat_template(fp32_export.folder)
    found = []
    for row in read_prompt_set(REPOSITORY / "prompts" / "general.jsonl", "", CHECKS).prompts[: 150 : 3 if LONG else 6]:
        text = chat_model.render(template, special_tokens, list(row.messages))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found += [ids, ids[: len(ids) * 2 // 3]]
    return found


@pytest.fixture(scope="module")
def reference(fp32_export, beginnings):
    return next_tokens(fp32_export.folder, beginnings)


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence from the reference, in nats."""
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def int4(beginnings, int4_export):
    return next_tokens(int4_export.folder, beginnings)


def test_int8_stays_several_times_closer_to_fp32_than_int4(reference, int4, beginnings, int8_export):
    int8 = next_tokens(int8_export.folder, beginnings)
    assert divergence(reference, int8) < 0.03
    assert divergence(reference, int4) < 0.15
    assert divergence(reference, int8) < 0.3 * divergence(reference, int4)
    assert (reference.argmax(-1) == int8.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize(("precision", "large"), [("int8", False), ("int4", True)])
def test_balancing_is_what_brings_int8_and_a_large_models_int4_close(
    reference, beginnings, fp32_export, tmp_path, monkeypatch, precision, large
):
    if large:
        monkeypatch.setattr(quantization, "LANE_BYTES", 0)
    found = []
    for balanced in (quantization.balanced, lambda *_: quantization.Balance({}, {}, {})):
        monkeypatch.setattr(quantization, "balanced", balanced)
        target = tmp_path / str(len(found))
        target.mkdir()
        quantization.quantize(Graph(fp32_export.folder), target, precision)
        found.append(divergence(reference, next_tokens(target, beginnings)))
    assert found[0] < (0.15 if large else 0.03)
    assert found[1] > 1.4 * found[0]


@pytest.fixture(scope="module", params=["int8", "int4"])
def integers(request):
    return request.getfixturevalue(f"{request.param}_export")


def as_loaded(folder: Path, file: Path, entries: dict[str, str] | None = None):
    """The graph as onnxruntime has it when it is loaded, and its tensors by name."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file)
    for entry in (entries or {}).items():
        options.add_session_config_entry(*entry)
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(file, load_external_data=False).graph
    return graph, {tensor.name: tensor for tensor in graph.initializer}


def largest_sum(weights: np.ndarray) -> int:
    """The largest magnitude that two neighbours among the integer weights (K, N), both of one sign, add up to."""
    pairs = np.pad(weights.astype(int), ((0, len(weights) % 2), (0, 0))).reshape(-1, 2, weights.shape[1])
    return int(max(np.maximum(sign * pairs, 0).sum(1).max() for sign in (1, -1)))


@pytest.mark.fault("models: integer sums that a processor without VNNI clips")
def test_no_two_products_add_up_to_more_than_sixteen_bits_hold(integers, tmp_path):
    from onnx import TensorProto, numpy_helper

    stored = Graph(integers.folder)
    graph, tensors = as_loaded(integers.folder, tmp_path / "loaded.onnx")
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 30 * 5 + 1
    for node in products:
        assert numpy_helper.to_array(tensors[node.input[4]]).dtype == np.uint8  # an activation is 255 at most
        weights = tensors[node.input[1]]
        kept = weights.data_location == TensorProto.EXTERNAL  # in the export's own file
        array = stored.array(weights.name) if kept else numpy_helper.to_array(weights)
        assert 255 * largest_sum(array) < 2**15, node.name


def test_the_exact_mode_for_processors_without_vnni_reaches_every_product_and_changes_no_number(
    beginnings, integers, tmp_path
):
    from onnx import TensorProto

    exact = dict([chat_model.EXACT_INTEGERS])
    for entries, kind in (({}, TensorProto.INT8), (exact, TensorProto.UINT8)):  # the second can't saturate
        graph, tensors = as_loaded(integers.folder, tmp_path / "loaded.onnx", entries)
        products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
        assert len(products) == 30 * 5 + 1
        assert {tensors[node.input[1]].data_type for node in products} == {kind}
    expected = next_tokens(integers.folder, beginnings[:20])
    assert np.array_equal(next_tokens(integers.folder, beginnings[:20], exact), expected)


def test_four_bits_are_eight_once_they_are_loaded_and_no_step_is_left_to_do(int4_export, int8_export, tmp_path):
    from onnx import TensorProto, numpy_helper

    stored = Graph(int4_export.folder)
    fours = [name for name in stored.tensors if name.endswith("_W4")]
    # of five products in each of 30 layers: values and down projections have 8 bits in 14 layers
    assert len(fours) == 30 * 5 - 2 * 14
    graph, loaded = as_loaded(int4_export.folder, tmp_path / "int4.onnx")
    wide, _ = as_loaded(int8_export.folder, tmp_path / "int8.onnx")
    assert sorted(node.op_type for node in graph.node) == sorted(node.op_type for node in wide.node)
    used = {node.input[3]: node.input[1] for node in graph.node if node.op_type == "MatMulIntegerToFloat"}
    file = (int4_export.folder / "model.onnx.data").read_bytes()
    for name in fours:
        assert stored.tensors[name].data_type == TensorProto.INT4
        place = {entry.key: entry.value for entry in stored.tensors[name].external_data}
        pairs = np.frombuffer(file, np.uint8, int(place["length"]), int(place["offset"]))
        integers = np.stack([pairs & 15, pairs >> 4], 1).astype(int).reshape(tuple(stored.tensors[name].dims))
        integers -= 16 * (integers > 7)
        base = name.removesuffix("_W4")
        steps, offsets = (stored.array(base + part).astype(int) for part in ("_steps", "_offsets"))
        weights = numpy_helper.to_array(loaded[used[f"{base}_scales_W8"]])
        assert np.array_equal(weights, (steps * integers + offsets).reshape(weights.shape)), name


RANDOM = np.random.default_rng(0)
ROWS = {
    "normal": RANDOM.normal(size=(40, 96)),
    "with outliers": RANDOM.normal(size=(40, 96)) * np.where(RANDOM.random((40, 96)) < 0.01, 20, 1),
    "laplace": RANDOM.laplace(size=(40, 96)),
    "of one sign": -np.abs(RANDOM.normal(size=(40, 96))),
    "huge": RANDOM.normal(size=(40, 96)) * 1e15,
}
STRANGE = {
    "tiny": RANDOM.normal(size=(40, 96)) * 1e-15,
    "equal": np.full((2, 96), 0.3),
    "zero": np.zeros((2, 96)),
    "one alone": np.eye(2, 96),
    "two alone": 2 * (np.eye(2, 96, 3) - np.eye(2, 96, 5)),
}


def of_four_bits(rows: np.ndarray, most: int = 128) -> tuple[np.ndarray, float]:
    """What `nibbles` makes of the rows, and the largest scale; all that is int8 on the way is within its range.

    No two neighbours of one sign add up to more than `most`.
    """
    integers, steps, offsets, scales = rounding.nibbles(rows, None, None)
    assert (integers.shape, steps.shape, offsets.shape) == ((3, 32, len(rows)), *[(3, 1, len(rows))] * 2)
    assert -8 <= integers.min() <= integers.max() <= 7 and 1 <= steps.min() <= steps.max() <= 15
    spread = steps.astype(int) * integers
    assert max(np.abs(spread).max(), np.abs(spread + offsets).max()) <= 127
    assert largest_sum((spread + offsets).reshape(-1, len(rows))) <= most
    found = (spread + offsets).transpose(2, 0, 1).reshape(rows.shape) * scales[:, None].astype(np.float64)
    return found, float(scales.max())


def from_blocks(
    rows: np.ndarray, inputs: np.ndarray | None = None, moments: np.ndarray | None = None, bits: int = 4
) -> np.ndarray:
    """The weights that `blocks` stands for."""
    integers, scales, zeros = rounding.blocks(rows.astype(np.float32), bits, inputs, None, moments)
    if bits == 4:
        integers, zeros = (np.stack([array & 15, array >> 4], -1).reshape(len(rows), -1) for array in (integers, zeros))
    integers = integers.reshape(*scales.shape, 32).astype(np.float64)
    return ((integers - zeros[:, : scales.shape[1], None]) * scales[..., None]).reshape(len(rows), -1)


def weighted_error(rows: np.ndarray, found: np.ndarray) -> float:
    """k-quant's: squares count more where a weight is large in its block. In units of the largest weight."""
    unit = np.abs(rows).max()
    rows, found = ((array / unit).reshape(-1, 32) for array in (rows.astype(np.float64), found))
    importance = np.abs(rows) + np.sqrt(np.square(rows).mean(1, keepdims=True))
    return float((importance * np.square(found - rows)).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_blocks_are_nearer_than_onnxruntimes_k_quant(rows, bits):
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    theirs, step, zero = quant_tensor_k_quant_cpu(rows.astype(np.float32), bits, 32)
    theirs = ((theirs.reshape(-1, 32) - zero.astype(np.float64)) * step).reshape(rows.shape)
    assert 0 < weighted_error(rows, from_blocks(rows, bits=bits)) < weighted_error(rows, theirs)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_blocks_of_four_bits_are_nearly_the_best_of_all_scales_and_zero_points(rows):
    own = rows.reshape(-1, 32)[:24] / np.abs(rows).max()
    width = np.maximum(own.max(1), 0) - np.minimum(own.min(1), 0)
    importance = np.abs(own) + np.sqrt(np.square(own).mean(1, keepdims=True))
    best = np.full(len(own), np.inf)
    for share in np.linspace(0.6, 1.3, 300):
        scale = (share * width / 15)[:, None]
        for zero in range(16):
            found = (np.clip(np.rint(own / scale) + zero, 0, 15) - zero) * scale
            best = np.minimum(best, (importance * np.square(found - own)).sum(1))
    found = from_blocks(own).reshape(own.shape)
    assert (importance * np.square(found - own)).sum() < 1.02 * best.sum()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", (ROWS | STRANGE).values(), ids=ROWS | STRANGE)
def test_no_weight_of_a_block_is_far_off(rows, bits):
    found = from_blocks(rows, bits=bits)
    blocks, own = rows.reshape(-1, 32), found.reshape(-1, 32)
    width = np.maximum(blocks.max(1), 0) - np.minimum(blocks.min(1), 0)
    assert (np.abs(own - blocks).max(1) <= 1.6 * width / (2**bits - 1)).all()  # a clipped weight: 1.25 and a half
    assert found[rows == 0].any() == 0  # zero stays zero


def test_rows_that_fill_no_whole_block_are_rounded_as_if_zeros_followed():
    rows = RANDOM.normal(size=(5, 72)).astype(np.float32)
    padded = np.pad(rows, ((0, 0), (0, 24)))
    for found, other in zip(rounding.blocks(rows, 4), rounding.blocks(padded, 4), strict=True):
        assert np.array_equal(found, other)
    assert rounding.blocks(rows, 4)[2].shape == (5, 2)  # three zero points in two bytes


def test_the_threads_of_torch_are_as_before_after_weights_were_rounded():
    import torch

    before = torch.get_num_threads()
    rounding.blocks(RANDOM.normal(size=(4, 64)), 4)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_weights_of_four_bits_are_nearer_than_onnxruntimes_k_quant(rows):
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    rows = rows.astype(np.float32)
    theirs, step, zero = quant_tensor_k_quant_cpu(rows.copy(), 4, 32)
    theirs = ((theirs.reshape(-1, 32) - zero.astype(np.float64)) * step).reshape(rows.shape)
    error, their_error = (np.square(each - rows, dtype=np.float64).mean() for each in (of_four_bits(rows)[0], theirs))
    assert 0 < error < their_error


@pytest.mark.parametrize("rows", (ROWS | STRANGE).values(), ids=ROWS | STRANGE)
def test_no_weight_of_four_bits_is_further_off_than_half_of_the_largest_step(rows, monkeypatch):
    rows = rows.astype(np.float32)
    found, scale = of_four_bits(rows)
    monkeypatch.setattr(rounding, "_ease", lambda *_: None)
    nearest, _ = of_four_bits(rows, most=2 * 127)
    assert np.abs(nearest - rows).max() <= 8 * scale
    gave_way = found != nearest  # to keep the sum of two neighbours: half a step becomes a whole one
    assert np.abs(found - rows).max() <= 15 * scale and gave_way.mean() < 0.01


@pytest.mark.fault("models: integer sums that a processor without VNNI clips")
@pytest.mark.parametrize("rows", (ROWS | STRANGE).values(), ids=ROWS | STRANGE)
def test_weights_of_eight_bits_keep_the_sum_of_neighbours_in_sixteen_bits(rows):
    rows = rows[:, :95].astype(np.float32)  # an odd one has no neighbour
    integers, scales = rounding.channels(rows, None, None)
    assert 255 * largest_sum(integers.T) < 2**15
    assert np.abs(integers * scales[:, None] - rows).max() <= 0.501 * scales.max()


def test_factors_are_taken_into_the_weights_of_four_bits():
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 96)).astype(np.float32)
    inputs, outputs = (random.uniform(0.5, 2, size).astype(np.float32) for size in (96, 40))
    expected = rounding.nibbles(rows * inputs / outputs[:, None], None, None)
    for found, other in zip(rounding.nibbles(rows, inputs, outputs), expected, strict=True):
        assert np.array_equal(found, other)


def correlated(tokens: int, columns: int, seed: int) -> np.ndarray:
    """Inputs of a product: channels of very different sizes that go together."""
    mixing = np.random.default_rng(1).normal(size=(columns // 4, columns)) * np.geomspace(0.1, 3, columns)
    random = np.random.default_rng(seed)
    return (random.normal(size=(tokens, columns // 4)) @ mixing + random.normal(size=(tokens, columns))).astype(
        np.float32
    )


def from_nibbles(rows: np.ndarray, inputs: np.ndarray | None, moments: np.ndarray | None) -> np.ndarray:
    integers, steps, offsets, scales = rounding.nibbles(rows, inputs, None, moments)
    weights = steps.astype(int) * integers + offsets
    assert np.abs(weights).max() <= 127 and largest_sum(weights.reshape(-1, len(rows))) <= 128
    return weights.transpose(2, 0, 1).reshape(rows.shape) * scales[:, None]


@pytest.mark.parametrize("rounded", [from_blocks, from_nibbles])
@pytest.mark.parametrize("columns", [96, 320])  # one group, and three with empty columns in the last one
def test_the_errors_of_weights_make_up_for_each_other_in_texts_that_calibration_did_not_see(rounded, columns):
    rows = np.random.default_rng(0).normal(size=(24, columns)).astype(np.float32)
    other = correlated(1000, columns, 3)
    factors = np.geomspace(2, 0.5, columns).astype(np.float32)
    moments = second_moments(correlated(1000, columns, 2))

    def error(inputs: np.ndarray | None, moments: np.ndarray | None) -> float:
        found = rounded(rows, inputs, moments) / (1 if inputs is None else inputs)
        return float(np.square(other @ (found - rows).T).mean())

    for inputs in (None, factors):
        assert error(inputs, moments) < 0.9 * error(inputs, None)


@pytest.mark.parametrize("rounded", [from_blocks, from_nibbles])
@pytest.mark.parametrize("value", [0, np.inf, np.nan, 1e30])
def test_inputs_that_say_nothing_leave_weights_as_near_as_without_them(rounded, value):
    rows = RANDOM.normal(size=(24, 96)).astype(np.float32)
    found = rounded(rows, None, second_moments(np.full((50, 96), value, np.float32)))
    plain = rounded(rows, None, None)
    assert np.square(found - rows).mean() < 1.2 * np.square(plain - rows).mean()


def test_four_bits_are_nearer_to_fp32_with_feedback(reference, int4, beginnings, fp32_export, tmp_path, monkeypatch):
    monkeypatch.setattr(
        quantization, "activations", lambda graph, moments, find=quantization.activations: find(graph, False)
    )
    quantization.quantize(Graph(fp32_export.folder), tmp_path, "int4")
    without = divergence(reference, next_tokens(tmp_path, beginnings))
    assert divergence(reference, int4) < 0.95 * without


@pytest.mark.parametrize(
    ("machine", "flags", "said", "asked"),
    [
        ("x86_64", "avx2 avx512f avx512_vnni", None, None),
        ("x86_64", "avx2 avx_vnni", None, None),
        ("AMD64", "avx2 avx512f", None, "1"),
        ("AMD64", "avx2 avx512f", "0", "0"),  # as our own exports
        ("AMD64", "avx2 avx512f", "perhaps", "1"),
        ("x86_64", "avx2 avx512f avx512_vnni", "1", "1"),
        ("x86_64", None, None, "1"),
        ("aarch64", "asimd", None, None),
    ],
)
def test_a_session_asks_for_exact_sums_on_x86_without_vnni_unless_the_folder_says_otherwise(
    int8_export, monkeypatch, tmp_path, machine, flags, said, asked
):
    import onnxruntime

    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="utf-8")
    monkeypatch.setattr(runtime.platform, "machine", lambda: machine)
    monkeypatch.setattr(runtime, "CPU_FACTS", file)
    entries = {}
    monkeypatch.setattr(
        onnxruntime.SessionOptions, "add_session_config_entry", lambda self, name, value: entries.update({name: value})
    )
    name = "session.x64quantprecision"
    folder = silent(int8_export.folder, tmp_path / "folder")
    content = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert name not in content["model"]["decoder"]["session_options"]
    content["model"]["decoder"]["session_options"] |= {name: said} if said else {}
    (folder / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")
    ContinuousRuntime(folder, {})
    assert entries == ({name: asked} if asked else {})


def silent(folder: Path, copy: Path) -> Path:
    """The folder, but its genai_config.json doesn't say whether sums clip, as in folders of other programs."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    content = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    del content["model"]["decoder"]["session_options"][chat_model.EXACT_INTEGERS[0]]
    (copy / "genai_config.json").unlink()
    (copy / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")
    return copy


def test_onnxruntime_genai_takes_the_exact_mode_too(integers, beginnings, monkeypatch, tmp_path):
    folder = silent(integers.folder, tmp_path / "silent")
    found = [greedy(OnnxRuntime(integers.folder, {}), beginnings[:2], [6, 6])]
    for clipped in (True, False):
        monkeypatch.setattr(runtime, "integers_saturate", lambda clipped=clipped: clipped)
        found.append(greedy(OnnxRuntime(folder, {}), beginnings[:2], [6, 6]))
    assert found[0] == found[1] == found[2]


def test_a_tensor_that_is_read_twice_is_written_once(integers):
    import onnx

    graph = onnx.load(integers.folder / "model.onnx", load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer]
    assert len(names) == len(set(names))
    used = [node.op_type for node in graph.node if "lm_head.MatMul.weight_table" in node.input]
    assert sorted(used) == ["BitwiseXor", "GatherBlockQuantized"]  # the head, and the embedding that it is tied to


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
