"""Quantizes an fp32 ONNX GenAI folder of onnxruntime-genai's builder for the CPU: int4 or int8.

    python -m slm.models.quantization FP32_FOLDER EMPTY_FOLDER int4|int8

One product at a time is read, quantized on all cores, and written. So the memory is the size of the largest product.
The builder (0.18) holds the whole model in fp32.

int8: weights and activations of a product have 8 bits (W8A8). Weights have one scale for each output channel.
Activations have one scale for each row:

    row = max |x|,   q = QuantizeLinear(x / row),   y = MatMulIntegerToFloat(q, W) * row

A scale holds from end to end of a sum, so the whole sum of a row is integer arithmetic. The scale belongs to the row,
so the row's numbers don't depend on the batch. SmoothQuant (arXiv:2211.10438) spreads the loss from outliers among the
activations. It divides the norm or the projection before a product by a factor for each channel. It multiplies the
product's weights by the same factor. The factors come from the largest values over a short conversation, and from the
largest weights.

The weights are signed. On x86 with VNNI, unsigned weights take up to 1.9 times as long. On x86 without VNNI,
onnxruntime adds the products of two neighbours in 16 bits, and clips the sum. Neighbours are the weights 2i and 2i + 1
of a channel. So a channel's scale keeps 255 times the sum of two neighbours within 16 bits (PAIR). No session clips
then, on any machine: the integers are the same with and without VNNI. genai_config.json says so. Without this entry,
chat_model.py opens a folder in a slower mode on machines without VNNI. The coarser scale has no visible cost in int8.
In int4, it costs about as much as another choice of steps and offsets.

int4: weights have 4 bits, in blocks of 32. The head and the layers that are the most sensitive in llama.cpp have 8 bits
(k_quant_mixed in the builder). The products depend on the model's size. A small model has the products of int8. A
block's step and offset are integers in units of its output channel's scale, so that

    W[block] = step * integers + offset

is int8 without rounding. This value is constant: onnxruntime computes it when it loads the graph. The file holds 4 bits
for each weight. In a large model, the time to read the weights is the limit. So its weights have 4 bits in memory too.
Its products are MatMulNBits, where onnxruntime's k-quant gives each block a scale and a zero point.

Embeddings have 8 bits. If the checkpoint ties the head to them, they are the head's weights too. Products that are no
MatMul with constant weights (mixtures of experts) stay in fp32.
"""

import json
import math
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm.models import chat_model

RECIPE = "3"  # change this whenever the written files change
BLOCK = 32
ALPHA = 0.5  # the share of the activations' range that goes to the weights
SMALLEST = 1e-5  # of a channel's largest value
PAIR = 128  # the largest sum of two neighbours of one sign: 255 * 128 < 2**15
SLICE = 2**19  # weights that are quantized at once: they fit in a core's cache
ALIGNED = 64  # bytes
INT8 = 3  # of onnx.TensorProto
NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
CONVERSATION = (
    "What is the capital of Italy?",
    "The capital of Italy is Rome.",
    "Add 17 and 26, then double it.",
    "17 + 26 = 43, and twice 43 is 86. The answer is **86**.",
    "Write a function that reverses a list.",
    "```python\ndef reverse(items):\n    return items[::-1]\n```",
    "Summarize: The river rose for three days. On the fourth the old bridge gave way; nobody was on it.",
    "After three days of rising water the old bridge collapsed. No one was hurt.",
    'Give me JSON with a name and an age: "Ada, 36".',
    '{"name": "Ada", "age": 36}',
    "Übersetze ins Englische: Der Zug kommt um acht Uhr an.",
    "The train arrives at eight o'clock.",
    "¿Por qué el cielo es azul?",
    "Porque el aire dispersa más la luz azul que la roja.",
    "List three uses of copper.",
    "1. Electrical wiring\n2. Water pipes\n3. Cooking pots",
)


@dataclass(frozen=True)
class Balance:
    """SmoothQuant's factors by channel. A name is a product's input or output, or a norm's weights."""

    inputs: dict[str, np.ndarray]  # (K,): a product's weights are multiplied by these
    outputs: dict[str, np.ndarray]  # (N,): a product's weights are divided by these, if another product follows
    norms: dict[str, np.ndarray]  # (K,): a norm's weights are divided by these


class Graph:
    """The graph of an ONNX GenAI folder: its nodes by output and by input, and its tensors, mapped from their file."""

    def __init__(self, folder: Path):
        import onnx

        self.folder = folder
        self.facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        self.file = folder / self.facts["filename"]
        self.model = onnx.load(self.file, load_external_data=False)
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.producers: dict[str, Any] = {}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.model.graph.node:
            self.producers |= dict.fromkeys(filter(None, node.output), node)
            for name in node.input:
                self.consumers[name].append(node)
        # by output: y (…, N) = x (…, K) times constant weights (K, N)
        self.products = {
            node.output[0]: node
            for node in self.model.graph.node
            if node.op_type == "MatMul" and len(getattr(self.tensors.get(node.input[1]), "dims", ())) == 2
        }

    def array(self, name: str) -> np.ndarray:
        import onnx

        tensor = self.tensors[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype, shape = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        return np.memmap(self.folder / place["location"], dtype, "r", int(place.get("offset", 0)), shape)

    def before_pruning(self, name: str) -> str:
        """The norm's output from which the head takes the last position, if `name` is the head's input; else `name`."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Gather", "Unsqueeze") and len(self.consumers[name]) == 1:
            name = node.input[0]
            node = self.producers.get(name)
        return name

    def embedding(self, node) -> tuple[str, np.ndarray] | None:
        """The name and the rows (vocabulary, channels) of the table that a Gather reads by token id.

        Gives None for other nodes, and for tables whose number of channels is not a multiple of BLOCK.
        """
        if node.op_type != "Gather" or node.input[1] != "input_ids":
            return None
        made = self.producers.get(node.input[0])
        tied = made is not None and made.op_type == "Transpose"  # of the head's weights
        name = made.input[0] if made is not None and tied else node.input[0]
        if name not in self.tensors:
            return None
        rows = self.array(name).T if tied else self.array(name)
        return (name, rows) if rows.ndim == 2 and rows.shape[1] % BLOCK == 0 else None


class Writer:
    """Collects the nodes and tensors of a quantized graph. Large tensors are written to their file at once."""

    def __init__(self, data, location: str):
        self._data, self._location = data, location
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}

    def tensor(self, name: str, array: np.ndarray | np.generic) -> str:
        from onnx import TensorProto, helper, numpy_helper

        if array.size < 256:
            self.tensors[name] = numpy_helper.from_array(np.asarray(array), name)
            return name
        self._data.write(bytes(-self._data.tell() % ALIGNED))
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._data.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(np.ascontiguousarray(array))
        self.tensors[name] = tensor
        return name

    def fours(self, name: str, array: np.ndarray) -> str:
        """Writes a tensor of integers from -8 to 7, two in a byte."""
        from onnx import TensorProto

        self.tensor(name, _pairs(array.reshape(-1).view(np.uint8) & 15))
        self.tensors[name].data_type, self.tensors[name].dims[:] = TensorProto.INT4, array.shape
        return name

    def node(self, operator: str, inputs: list[str], output: str, **words) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **words))
        return output

    def gather(self, inputs: list[str], output: str, block_size: int) -> None:
        """Adds a node that reads rows of an 8-bit table.

        Inputs: table (N, K), token ids, scales (N, blocks) and, if any, zero points.
        """
        words = {"bits": 8, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1, "domain": "com.microsoft"}
        self.node("GatherBlockQuantized", inputs, output, **words)

    def blocks(self, name: str, rows: np.ndarray, bits: int) -> list[str]:
        """The names of a product's weights in blocks, their scales and their zero points. Each is written only once."""
        names = [f"{name}_{part}" for part in (f"Q{bits}", "scales", "zeros")]
        if names[0] not in self.tensors:
            for part, array in zip(names, blocks(rows, bits), strict=True):
                self.tensor(part, array)
        return names


def quantize(source: Path, target: Path, precision: str) -> None:
    """Writes the fp32 folder `source`, quantized to int4 or int8, into the empty folder `target`."""
    import onnx

    graph = Graph(source)
    for path in source.iterdir():
        if not path.name.startswith(graph.file.name):
            shutil.copy(path, target / path.name)
    _say_that_no_sum_clips(target / "genai_config.json")
    embeddings = {node.output[0]: found for node in graph.model.graph.node if (found := graph.embedding(node))}
    location = f"{graph.file.name}.data"
    with (target / location).open("wb") as data:
        writer = Writer(data, location)
        tied = {name for name, _ in embeddings.values()}
        if precision == "int4" and _large(graph):
            product, embed, norms = _in_blocks(graph, writer, tied)
        else:
            product, embed, norms = _in_integers(graph, writer, precision == "int4")
        for node in graph.model.graph.node:
            if node.output[0] in embeddings:
                embed(node, *embeddings[node.output[0]])
            elif node.output[0] in graph.products:
                product(node)
            elif any(taker.output[0] not in embeddings for taker in graph.consumers[node.output[0]] or [node]):
                writer.nodes.append(node)
        for name in sorted({name for node in writer.nodes for name in node.input} & graph.tensors.keys()):
            array = graph.array(name)
            writer.tensor(name, array / norms[name] if name in norms else array)
    content, opsets = graph.model.graph, graph.model.opset_import
    del content.node[:], content.initializer[:]
    content.node.extend(writer.nodes)
    content.initializer.extend(writer.tensors.values())
    if all(entry.domain != "com.microsoft" for entry in opsets):
        opsets.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(graph.model, target / graph.file.name)


def _say_that_no_sum_clips(file: Path) -> None:
    """Writes into genai_config.json, with onnxruntime's own entry, that a session needs no exact mode."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["decoder"].setdefault("session_options", {})[chat_model.EXACT_INTEGERS[0]] = "0"
    file.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _large(graph: Graph) -> bool:
    """Whether a model is too large for a batch on each core. Then the time to read its weights is the limit."""
    return sum(math.prod(graph.tensors[node.input[1]].dims) for node in graph.products.values()) > chat_model.LANE_BYTES


# ---------------------------------------------------------------------------------------------------------------------
# In blocks: a large model's int4


def _in_blocks(graph: Graph, writer: Writer, tied: set[str]) -> tuple[Callable, Callable, dict]:
    layers = graph.facts["num_hidden_layers"]

    def product(node) -> None:
        given, name = node.input
        rows = graph.array(name).T
        bits = 8 if name in tied or sensitive(node.name, layers) else 4
        facts = {"N": rows.shape[0], "K": rows.shape[1], "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        inputs = [given, *writer.blocks(name, rows, bits)]
        writer.node("MatMulNBits", inputs, node.output[0], domain="com.microsoft", **facts)

    def embed(node, name: str, rows: np.ndarray) -> None:
        weights, scales, zeros = writer.blocks(name, rows, 8)
        shape = writer.tensor(f"{name}_shape", np.array(rows.shape))
        table = writer.node("Reshape", [weights, shape], f"{node.output[0]}/table")
        writer.gather([table, node.input[1], scales, zeros], node.output[0], BLOCK)

    return product, embed, {}


def sensitive(name: str, layers: int) -> bool:
    """Whether llama.cpp's Q4_K_M uses more bits for a product of this name (src/llama-quant.cpp, use_more_bits).

    These products are the head, and the value and down projections of some layers. The layers are the first eighth, the
    last eighth, and every third layer between them.
    """
    found = re.fullmatch(r"/model/layers\.(\d+)/(attn/(qkv|v)_proj|mlp/down_proj)/MatMul", name)
    if not found:
        return name == "/lm_head/MatMul"
    layer = int(found[1])
    return layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2


def blocks(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes weights (N, K) by k-quant, in blocks along K, on all cores. The result has the form of MatMulNBits.

    Gives uint8 (N, blocks, BLOCK * bits / 8), with the lower half of a byte first; float32 scales (N, blocks); and zero
    points (N, blocks). With 4 bits, two zero points share a byte: (N, blocks / 2 rounded up).
    """
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    count = -(-rows.shape[1] // BLOCK)

    def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values = np.zeros((end - begin, count * BLOCK), np.float32)
        values[:, : rows.shape[1]] = rows[begin:end]
        with np.errstate(divide="ignore", invalid="ignore"):  # a block of equal weights
            integers, scales, zeros = quant_tensor_k_quant_cpu(values, bits, BLOCK)
        integers = integers.astype(np.uint8).reshape(end - begin, count, BLOCK)
        zeros = zeros.reshape(end - begin, count)
        if bits == 4:
            integers, zeros = (_pairs(array) for array in (integers, np.pad(zeros, ((0, 0), (0, count % 2)))))
        return integers, scales.reshape(end - begin, count).astype(np.float32), zeros

    return _in_parts(part, rows)


def _pairs(array: np.ndarray) -> np.ndarray:
    return array[..., ::2] | array[..., 1::2] << 4


def _in_parts(work: Callable, rows: np.ndarray) -> Any:
    """Calls `work` for parts of the rows, on all cores, and joins the arrays that it gives.

    `work` takes the first row of a part, and the row after its last row.
    """
    step = max(SLICE // rows.shape[1], 1)
    begins = range(0, len(rows), step)
    with ThreadPoolExecutor(chat_model.physical_cores()) as pool:
        parts = pool.map(work, begins, [min(begin + step, len(rows)) for begin in begins])
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# In integers: int8, and a small model's int4


def _in_integers(graph: Graph, writer: Writer, narrow: bool) -> tuple[Callable, Callable, dict]:
    balance = balanced(graph, peaks(graph))
    unit = writer.tensor("int8.unit", np.float32(1 / 127))
    zero, last = writer.tensor("int8.zero", np.uint8(128)), writer.tensor("int8.last", np.array([-1]))
    layers = graph.facts["num_hidden_layers"]
    quantized: dict[str, tuple[str, str]] = {}  # by a product's input: its integers, and its rows' scales
    tables: dict[str, tuple[str, str]] = {}  # the weights that head and embeddings share: integers, and scales

    def product(node) -> None:
        (given, name), output = node.input, node.output[0]
        if given not in quantized:
            row = writer.node("ReduceMax", [writer.node("Abs", [given], f"{given}/size"), last], f"{given}/row")
            even = writer.node("Div", [given, row], f"{given}/even")  # a row of zeros: NaN here, 0 after the last Mul
            quantized[given] = writer.node("QuantizeLinear", [even, unit, zero], f"{given}/integers"), row
        integers, row = quantized[given]
        weights, scales = tables.get(name) or constant(node)
        # each product has a zero of its own: for unsigned weights, onnxruntime replaces a zero by its name
        sides = [integers, weights, unit, scales, zero, writer.tensor(f"{name}_zero_W8", np.int8(0))]
        even = writer.node("MatMulIntegerToFloat", sides, f"{output}/even", domain="com.microsoft")
        writer.node("Mul", [even, row], output)

    def constant(node) -> tuple[str, str]:
        name = node.input[1]
        rows = graph.array(name).T
        factors = balance.inputs.get(node.input[0]), balance.outputs.get(node.output[0])
        if narrow and not sensitive(node.name, layers) and rows.shape[1] % BLOCK == 0:
            fours, steps, offsets, scales = nibbles(rows, *factors)
            wide = writer.node("Cast", [writer.fours(f"{name}_W4", fours)], f"{name}/wide", to=INT8)
            spread = writer.node("Mul", [wide, writer.tensor(f"{name}_steps", steps)], f"{name}/spread")
            moved = writer.node("Add", [spread, writer.tensor(f"{name}_offsets", offsets)], f"{name}/moved")
            shape = writer.tensor(f"{name}_shape", np.array(rows.T.shape))
            weights = writer.node("Reshape", [moved, shape], f"{name}/W8")
        else:
            eights, scales = channels(rows, *factors)
            weights = writer.tensor(f"{name}_W8", eights.T)
        return weights, writer.tensor(f"{name}_scales_W8", scales)

    def embed(node, name: str, rows: np.ndarray) -> None:
        heads = [head for head in graph.products.values() if head.input[1] == name]
        factor = balance.inputs.get(heads[0].input[0]) if heads else None
        eights, scales = channels(rows, factor, None)
        table = writer.tensor(f"{name}_table", eights.view(np.uint8) ^ 128)
        own = writer.tensor(f"{name}_scales_W8", scales)
        column = writer.node("Unsqueeze", [own, last], f"{name}/column")
        whole = max(1 << (rows.shape[1] - 1).bit_length(), 16)  # a block is a power of two
        found = node.output[0] if factor is None else f"{node.output[0]}/balanced"
        writer.gather([table, node.input[1], column], found, whole)
        if factor is not None:
            writer.node("Div", [found, writer.tensor(f"{name}_factor", factor)], node.output[0])
        if heads:
            flipped = writer.node("BitwiseXor", [table, writer.tensor("int8.sign", np.uint8(128))], f"{name}/flipped")
            signed = writer.node("Cast", [flipped], f"{name}/signed", to=INT8)
            tables[name] = writer.node("Transpose", [signed], f"{name}/W8"), own

    return product, embed, balance.norms


def channels(rows: np.ndarray, inputs: np.ndarray | None, outputs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, K), multiplied by `inputs` (K,) and divided by `outputs` (N,), as int8; and their scales (N,)."""

    def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        values = _scaled(rows, begin, end, inputs, outputs)
        scales = _channel_scales(values).astype(np.float32)
        return np.rint(values / scales[:, None]).astype(np.int8), scales

    return _in_parts(part, rows)


def nibbles(
    rows: np.ndarray, inputs: np.ndarray | None, outputs: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights (N, K), multiplied by `inputs` (K,) and divided by `outputs` (N,), as blocks along K.

    A weight is step * integer + offset, in units of its channel's scale. Gives the integers, -8 to 7, (blocks, BLOCK,
    N); the steps, 1 to 15, and the offsets, both (blocks, 1, N); and the scales (N,). The integers, steps, offsets and
    weights are int8.

    For each block, 25 pairs of a step and an offset are tried, near the pair that covers the block. The pair with the
    least squared error is taken. Large weights count more, as in llama.cpp's Q4_1.
    """

    def part(begin: int, end: int) -> tuple[np.ndarray, ...]:
        values = _scaled(rows, begin, end, inputs, outputs).reshape(end - begin, -1, BLOCK)
        low, high = values.min(2, keepdims=True), values.max(2, keepdims=True)
        scales = _channel_scales(values.reshape(end - begin, -1))
        scales = np.maximum(scales, (high - low).max((1, 2)) / (15 * 15))[:, None, None]  # at most 15 steps of 15
        values, low, high = values / scales, low / scales, high / scales
        importance = np.abs(values) + np.sqrt(np.square(values).mean(2, keepdims=True))
        least = np.full(low.shape, np.inf)
        taken = [np.zeros(array.shape, np.int8) for array in (values, low, low)]
        for more in (-3, -2, -1, 0, 1):
            step = np.clip(np.ceil((high - low) / 15) + more, 1, 15)
            for shift in (-0.5, -0.25, 0, 0.25, 0.5):
                offset = np.clip(np.rint((low + high + step) / 2 + shift * step), -127, 127)
                first, last = np.ceil((-127 - offset) / step), np.floor((127 - offset) / step)
                integers = np.rint((values - offset) / step).clip(first, last).clip(-8, 7)
                error = (importance * np.square(step * integers + offset - values)).sum(2, keepdims=True)
                for array, found in zip(taken, (integers, step, offset), strict=True):
                    np.copyto(array, found.astype(np.int8), where=error < least)
                least = np.minimum(least, error)
        _ease(values, *taken)
        return *taken, scales.reshape(-1).astype(np.float32)

    integers, steps, offsets, scales = _in_parts(part, rows)
    integers, steps, offsets = (array.transpose(1, 2, 0) for array in (integers, steps, offsets))
    return integers, steps, offsets, scales


def _channel_scales(values: np.ndarray) -> np.ndarray:
    """The scales (N,) of weights (N, K).

    In these units, two rounded neighbours of one sign add up to at most PAIR.
    """
    pairs = np.pad(values, ((0, 0), (0, values.shape[1] % 2))).reshape(len(values), -1, 2)
    largest = [np.maximum(sign * pairs, 0).sum(2).max(1) for sign in (1, -1)]
    return np.maximum(np.maximum(*largest), SMALLEST) / (PAIR - 1)  # rounding adds at most 0.5 to each weight


def _ease(values: np.ndarray, integers: np.ndarray, steps: np.ndarray, offsets: np.ndarray) -> None:
    """Moves integers step by step, in place, until no two neighbours of one sign add up to more than PAIR.

    A weight is step * integer + offset. In a pair above PAIR, the weight that exceeds its value by more moves. A weight
    whose integer is already the last of the 16 stays. Shapes: values and integers (N, blocks, BLOCK), steps and offsets
    (N, blocks, 1).
    """
    values, fours = (array.reshape(*steps.shape[:2], -1, 2) for array in (values, integers))  # a view: in place
    for sign, last in ((1, -8), (-1, 7)):
        while True:
            pairs = steps[..., None].astype(np.float32) * fours + offsets[..., None]
            beyond = np.where(fours == last, -np.inf, sign * (pairs - values))
            further = (beyond == beyond.max(3, keepdims=True)) & (fours != last)
            giving = further & (np.maximum(sign * pairs, 0).sum(3, keepdims=True) > PAIR)
            if not giving.any():
                break
            fours -= (sign * giving).astype(np.int8)


def _scaled(
    rows: np.ndarray, begin: int, end: int, inputs: np.ndarray | None, outputs: np.ndarray | None
) -> np.ndarray:
    values = rows[begin:end].astype(np.float32)
    if inputs is not None:
        values *= inputs
    if outputs is not None:
        values /= outputs[begin:end, None]
    return values


def balanced(graph: Graph, peaks: dict[str, np.ndarray]) -> Balance:
    """The factors for every product that directly follows a norm, or a Mul of another product and a gate.

    `peaks` holds, by the name of a product's input, the largest magnitude of each channel.
    """
    balance = Balance({}, {}, {})
    for name, peak in peaks.items():
        takers = [node for node in graph.products.values() if node.input[0] == name]
        largest = np.max([np.abs(graph.array(node.input[1])).max(1) for node in takers], 0)
        factor = np.maximum(peak, SMALLEST) ** ALPHA / np.maximum(largest, SMALLEST) ** (1 - ALPHA)
        factor = factor.astype(np.float32)
        made = graph.before_pruning(name)
        count = len(takers) if made == name else 1
        before = graph.producers.get(made)
        if before is None or len(graph.consumers[made]) != count:
            continue
        if before.op_type in NORMS and made == before.output[0]:
            weights = before.input[-1]
            if weights in graph.tensors and len(graph.consumers[weights]) == 1:
                balance.inputs[name] = balance.norms[weights] = factor
        elif before.op_type == "Mul":
            linear = [one for one in before.input if one in graph.products and len(graph.consumers[one]) == 1]
            if len(linear) == 1 and graph.tensors[graph.products[linear[0]].input[1]].dims[1] == len(factor):
                balance.inputs[name] = balance.outputs[linear[0]] = factor
    return balance


def peaks(graph: Graph) -> dict[str, np.ndarray]:
    """The largest magnitude (K,) of each channel over CONVERSATION, by the name of a product's input."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from tokenizers import Tokenizer

    watched = onnx.ModelProto()
    watched.CopyFrom(graph.model)
    watched.graph.initializer.append(numpy_helper.from_array(np.array([0, 1]), "places"))
    found = {node.input[0]: graph.before_pruning(node.input[0]) for node in graph.products.values()}
    for name in found.values():
        watched.graph.node.append(helper.make_node("Abs", [name], [f"{name}/size"]))
        reduce = helper.make_node("ReduceMax", [f"{name}/size", "places"], [f"{name}/peak"], keepdims=0)
        watched.graph.node.append(reduce)
        watched.graph.output.append(helper.make_tensor_value_info(f"{name}/peak", TensorProto.FLOAT, None))
    file = graph.folder / "watched.onnx"
    onnx.save(watched, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = chat_model.physical_cores()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # the weights stay mapped, without copies
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    file.unlink()

    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(CONVERSATION)]
    template, special_tokens = chat_model.read_chat_template(graph.folder)
    text = chat_model.render(template, special_tokens, messages) if template else "\n".join(CONVERSATION)
    tokenizer = Tokenizer.from_file(str(graph.folder / "tokenizer.json"))
    ids = np.array([tokenizer.encode(text, add_special_tokens=not template).ids])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    past = np.zeros((1, graph.facts["num_key_value_heads"], 0, graph.facts["head_size"]), np.float32)
    given = {entry.name: given.get(entry.name, past) for entry in session.get_inputs()}
    return dict(zip(found, session.run([f"{name}/peak" for name in found.values()], given), strict=True))


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
