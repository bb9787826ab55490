"""An ONNX GenAI folder in fp32, as onnxruntime-genai's builder writes it, quantized for the CPU: int4 or int8.

    python -m slm.models.quantization FP32_FOLDER EMPTY_FOLDER int4|int8

Weights are read from their file, quantized and written one product at a time, on all cores: the memory is that of the
largest product, where the builder (0.18) holds the whole model in fp32.

int8: both sides of a product keep one scale from end to end (W8A8), weights by output channel, activations by row,

    row = max |x|,   q = QuantizeLinear(x / row),   y = MatMulIntegerToFloat(q, W) * row

so that a row's sum is integer arithmetic throughout. The scale is the row's own: its numbers don't depend on the batch.
What outliers among the activations cost is spread by SmoothQuant (arXiv:2211.10438): by channel, part of the largest
values that a short conversation causes is divided out of the norm, or the projection, before a product, and multiplied
into its weights.

The weights are signed: on x86 with VNNI, unsigned weights take up to 1.9 times as long. On x86 without VNNI,
onnxruntime adds the products of two neighbours (weights 2i and 2i + 1 of a channel) in 16 bits, and clips the sum. So a
channel's scale is as large as it takes to keep 255 times the sum of two neighbours within 16 bits (PAIR). No session
clips then, whoever opens it: the integers are the same with and without VNNI. genai_config.json says so, and
chat_model.py opens folders that do not say so in a slower mode there. The coarser scale costs int8 nothing that shows,
and int4 about as much as another choice of steps and offsets does.

int4: 4 bits a weight in blocks of 32, but for the head and the layers that llama.cpp holds for the most sensitive: they
have 8 (what the builder calls k_quant_mixed). What is done with them depends on the model's size. In a small one, the
products are int8's: a block's step and offset are integers in units of its output channel's scale, so that

    W[block] = step * integers + offset

is int8 without a rounding, and constant: onnxruntime computes it as it loads the graph, and 4 bits are what the file
holds. A large model is limited by reading its weights, so these keep their 4 bits in memory too: MatMulNBits, each
block with a scale and a zero point by onnxruntime's k-quant.

Embeddings have 8 bits, and are the head's where the checkpoint ties them. Products that are no MatMul with constant
weights (mixtures of experts) stay in fp32.
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

RECIPE = "3"  # another one whenever what is written changes
BLOCK = 32
ALPHA = 0.5  # how much of the activations' range goes to the weights
SMALLEST = 1e-5  # of a channel's largest value
PAIR = 128  # of two neighbouring weights of one sign, the sum: 255 * 128 < 2**15
SLICE = 2**19  # weights that are quantized at once: they stay in a core's cache
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
    """Factors by channel, from SmoothQuant; the names are those of a product's input or output, or a norm's weights."""

    inputs: dict[str, np.ndarray]  # (K,): a product's weights are multiplied by these
    outputs: dict[str, np.ndarray]  # (N,): and divided by these, where another product follows
    norms: dict[str, np.ndarray]  # (K,): a norm's weights are divided by these


class Graph:
    """An ONNX GenAI folder's graph: its nodes by what they make and take, its tensors mapped from their file."""

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
        """The norm's output of which the head takes the last place, where `name` is the head's input; else `name`."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Gather", "Unsqueeze") and len(self.consumers[name]) == 1:
            name = node.input[0]
            node = self.producers.get(name)
        return name

    def embedding(self, node) -> tuple[str, np.ndarray] | None:
        """The name and the rows (vocabulary, channels) of what a Gather reads by token id; None for other nodes."""
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
    """The nodes and tensors of a quantized graph on its way; large tensors go to their file at once."""

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
        """A tensor of integers from -8 to 7, two in a byte."""
        from onnx import TensorProto

        self.tensor(name, _pairs(array.reshape(-1).view(np.uint8) & 15))
        self.tensors[name].data_type, self.tensors[name].dims[:] = TensorProto.INT4, array.shape
        return name

    def node(self, operator: str, inputs: list[str], output: str, **words) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **words))
        return output

    def gather(self, inputs: list[str], output: str, block_size: int) -> None:
        """Rows of a table of 8 bits. Inputs: table (N, K), places, scales (N, blocks), and zero points, if any."""
        words = {"bits": 8, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1, "domain": "com.microsoft"}
        self.node("GatherBlockQuantized", inputs, output, **words)

    def blocks(self, name: str, rows: np.ndarray, bits: int) -> list[str]:
        """The names of a product's weights in blocks, their scales and zero points; written once, whoever asks."""
        names = [f"{name}_{part}" for part in (f"Q{bits}", "scales", "zeros")]
        if names[0] not in self.tensors:
            for part, array in zip(names, blocks(rows, bits), strict=True):
                self.tensor(part, array)
        return names


def quantize(source: Path, target: Path, precision: str) -> None:
    """Writes the fp32 folder `source` into the empty folder `target`, in int4 or int8."""
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
    """Says in genai_config.json, in onnxruntime's own words, that a session needs no exact mode."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["decoder"].setdefault("session_options", {})[chat_model.EXACT_INTEGERS[0]] = "0"
    file.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _large(graph: Graph) -> bool:
    """Whether a model's products hold too many weights for a batch on each core: then they are limited by reading."""
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
    """Whether llama.cpp's Q4_K_M holds more bits for a product of this name (src/llama-quant.cpp, use_more_bits).

    These are the head, and values and down projections in the first and the last eighth of the layers and in every
    third between them.
    """
    found = re.fullmatch(r"/model/layers\.(\d+)/(attn/(qkv|v)_proj|mlp/down_proj)/MatMul", name)
    if not found:
        return name == "/lm_head/MatMul"
    layer = int(found[1])
    return layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2


def blocks(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (N, K) by k-quant in blocks along K, as MatMulNBits takes them, on all cores.

    Gives uint8 (N, blocks, BLOCK * bits / 8), the lower half of a byte first; scales (N, blocks), float32; and zero
    points (N, blocks), or (N, blocks / 2 rounded up) where two share a byte.
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
    """The arrays that `work` gives for parts of the rows, from their first to past their last, on all cores; joined."""
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
    quantized: dict[str, tuple[str, str]] = {}  # a product's input: its integers, and its rows' scales
    tables: dict[str, tuple[str, str]] = {}  # the head's weights, where they are the embeddings: integers, and scales

    def product(node) -> None:
        (given, name), output = node.input, node.output[0]
        if given not in quantized:
            row = writer.node("ReduceMax", [writer.node("Abs", [given], f"{given}/size"), last], f"{given}/row")
            even = writer.node("Div", [given, row], f"{given}/even")  # a row of zeros: NaN, and times 0 in the end
            quantized[given] = writer.node("QuantizeLinear", [even, unit, zero], f"{given}/integers"), row
        integers, row = quantized[given]
        weights, scales = tables.get(name) or constant(node)
        # each its own zero: where onnxruntime makes the weights unsigned, it makes another one of it by name
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
    """Weights (N, K), times `inputs` (K,) and over `outputs` (N,), as int8, and their scales (N,)."""

    def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        values = _scaled(rows, begin, end, inputs, outputs)
        scales = _channel_scales(values).astype(np.float32)
        return np.rint(values / scales[:, None]).astype(np.int8), scales

    return _in_parts(part, rows)


def nibbles(
    rows: np.ndarray, inputs: np.ndarray | None, outputs: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights (N, K), times `inputs` (K,) and over `outputs` (N,), in blocks along K: step * integers + offset.

    Gives the integers, -8 to 7, (blocks, BLOCK, N); steps, 1 to 15, and offsets, both (blocks, 1, N); and the scales
    (N,). All are int8 but the scales, and so is what comes of them. Of 25 steps and offsets around those that cover a
    block, the ones with the least squared error are taken, where large weights count more, as in llama.cpp's Q4_1.
    """

    def part(begin: int, end: int) -> tuple[np.ndarray, ...]:
        values = _scaled(rows, begin, end, inputs, outputs).reshape(end - begin, -1, BLOCK)
        low, high = values.min(2, keepdims=True), values.max(2, keepdims=True)
        scales = _channel_scales(values.reshape(end - begin, -1))
        scales = np.maximum(scales, (high - low).max((1, 2)) / (15 * 15))[:, None, None]  # 15 steps of 15 at most
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

    In these units, rounded, no two neighbours of one sign add up to more than PAIR.
    """
    pairs = np.pad(values, ((0, 0), (0, values.shape[1] % 2))).reshape(len(values), -1, 2)
    largest = [np.maximum(sign * pairs, 0).sum(2).max(1) for sign in (1, -1)]
    return np.maximum(np.maximum(*largest), SMALLEST) / (PAIR - 1)  # rounding adds a half to each


def _ease(values: np.ndarray, integers: np.ndarray, steps: np.ndarray, offsets: np.ndarray) -> None:
    """Takes steps back, in place, where step * integers + offset carries two neighbours' sum past PAIR.

    The neighbour that lies further beyond its value gives way, unless it is at the last of the 16 integers.
    Shapes: values and integers (N, blocks, BLOCK), steps and offsets (N, blocks, 1).
    """
    values, fours = (array.reshape(*steps.shape[:2], -1, 2) for array in (values, integers))  # in place: a view
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
    """The factors for every product that comes straight after a norm, or after another product times a gate.

    `peaks` holds the largest magnitude of each channel of a product's input, by its name.
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
    """The largest magnitude that each channel of the products' inputs, by name, takes over the conversation, (K,)."""
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
    options.add_session_config_entry("session.disable_prepacking", "1")  # the weights stay mapped, none is copied
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
