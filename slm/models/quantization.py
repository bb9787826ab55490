"""Quantizes an fp32 ONNX graph of onnxruntime-genai's builder for the CPU: int4 or int8.

One product at a time is read, quantized on all cores, and written. So the memory is the size of the largest product.

int8: weights and activations of a product have 8 bits (W8A8). Weights have one scale for each output channel.
Activations have one scale for each row:

    row = max |x|,   q = QuantizeLinear(x / row),   y = MatMulIntegerToFloat(q, W) * row

A scale holds from end to end of a sum, so the whole sum of a row is integer arithmetic. The scale belongs to the row,
so the row's numbers don't depend on the batch. SmoothQuant (arXiv:2211.10438) spreads the loss from outliers among the
activations. It divides the norm or the projection before a product by a factor for each channel. It multiplies the
product's weights by the same factor. The factors come from the largest values over short conversations, and from the
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
Its products are MatMulNBits, where each block has a scale and a zero point (`rounding.blocks`). In both, columns take
each other's rounding errors, so that a product's results change less (slm/models/error_feedback.py).

Embeddings have 8 bits. If the checkpoint ties the head to them, they are the head's weights too. Products that are no
MatMul with constant weights (mixtures of experts) stay in fp32.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.models import rounding
from slm.models.activations import Activations, activations
from slm.models.chat_parts.continuous_runtime import LANE_BYTES
from slm.models.chat_parts.runtime import EXACT_INTEGERS
from slm.models.onnx_graph import Graph, Writer

RECIPE = "5"  # change this whenever the written files change
ALPHA = 0.5  # the share of the activations' range that goes to the weights
INT8 = 3  # of onnx.TensorProto
NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


@dataclass(frozen=True)
class Balance:
    """SmoothQuant's factors by channel. A name is a product's input or output, or a norm's weights."""

    inputs: dict[str, np.ndarray]  # (K,): a product's weights are multiplied by these
    outputs: dict[str, np.ndarray]  # (N,): a product's weights are divided by these, if another product follows
    norms: dict[str, np.ndarray]  # (K,): a norm's weights are divided by these


def quantize(graph: Graph, target: Path, precision: str, tell: Callable[[float], None] = lambda share: None) -> None:
    """Writes an fp32 graph, quantized to int4 or int8, and the other files of its folder into the folder `target`.

    `tell` is called after each product with the share of all weights that are written.
    """
    import onnx

    for path in graph.folder.iterdir():
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
        written, weights = 0, _weights(graph)
        for node in graph.model.graph.node:
            if node.output[0] in embeddings:
                embed(node, *embeddings[node.output[0]])
            elif node.output[0] in graph.products:
                product(node)
                written += math.prod(graph.tensors[node.input[1]].dims)
                tell(written / weights)
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
    content["model"]["decoder"].setdefault("session_options", {})[EXACT_INTEGERS[0]] = "0"
    file.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _large(graph: Graph) -> bool:
    """Whether a model is too large for a batch on each core. Then the time to read its weights is the limit."""
    return _weights(graph) > LANE_BYTES


def _of_head(graph: Graph, name: str, balance: Balance) -> np.ndarray | None:
    """The factor of the head's input, if the embeddings `name` are the head's weights too."""
    heads = (head for head in graph.products.values() if head.input[1] == name)
    return next((balance.inputs.get(head.input[0]) for head in heads), None)


def _weights(graph: Graph) -> int:
    """The number of weights in all products."""
    return sum(math.prod(graph.tensors[node.input[1]].dims) for node in graph.products.values())


# ---------------------------------------------------------------------------------------------------------------------
# In blocks: a large model's int4


def _in_blocks(graph: Graph, writer: Writer, tied: set[str]) -> tuple[Callable, Callable, dict]:
    found = activations(graph, moments=True)
    balance = balanced(graph, found)
    layers = graph.facts["num_hidden_layers"]

    def product(node) -> None:
        given, name = node.input
        depth, width = graph.tensors[name].dims
        bits = 8 if name in tied or sensitive(node.name, layers) else 4
        facts = {"N": width, "K": depth, "bits": bits, "block_size": rounding.BLOCK, "accuracy_level": 4}
        factors = balance.inputs.get(given), balance.outputs.get(node.output[0])
        moments = found[given].moments if bits == 4 else None
        inputs = [given, *writer.blocks(name, lambda: graph.array(name).T, bits, *factors, moments)]
        writer.node("MatMulNBits", inputs, node.output[0], domain="com.microsoft", **facts)

    def embed(node, name: str, transposed: bool) -> None:
        factor = _of_head(graph, name, balance)
        weights, scales, zeros = writer.blocks(name, lambda: graph.table(name, transposed), 8, factor)
        shape = graph.tensors[name].dims
        shape = writer.tensor(f"{name}_shape", np.array(shape[::-1] if transposed else shape))
        table = writer.node("Reshape", [weights, shape], f"{node.output[0]}/table")
        writer.gather([table, node.input[1], scales, zeros], node.output[0], rounding.BLOCK, factor)

    return product, embed, balance.norms


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


# ---------------------------------------------------------------------------------------------------------------------
# In integers: int8, and a small model's int4


def _in_integers(graph: Graph, writer: Writer, narrow: bool) -> tuple[Callable, Callable, dict]:
    found = activations(graph, moments=narrow)
    balance = balanced(graph, found)
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
        if narrow and not sensitive(node.name, layers) and rows.shape[1] % rounding.BLOCK == 0:
            fours, steps, offsets, scales = rounding.nibbles(rows, *factors, found[node.input[0]].moments)
            wide = writer.node("Cast", [writer.fours(f"{name}_W4", fours)], f"{name}/wide", to=INT8)
            spread = writer.node("Mul", [wide, writer.tensor(f"{name}_steps", steps)], f"{name}/spread")
            moved = writer.node("Add", [spread, writer.tensor(f"{name}_offsets", offsets)], f"{name}/moved")
            shape = writer.tensor(f"{name}_shape", np.array(rows.T.shape))
            weights = writer.node("Reshape", [moved, shape], f"{name}/W8")
        else:
            eights, scales = rounding.channels(rows, *factors)
            weights = writer.tensor(f"{name}_W8", eights.T)
        return weights, writer.tensor(f"{name}_scales_W8", scales)

    def embed(node, name: str, transposed: bool) -> None:
        rows = graph.table(name, transposed)
        factor = _of_head(graph, name, balance)
        eights, scales = rounding.channels(rows, factor, None)
        table = writer.tensor(f"{name}_table", eights.view(np.uint8) ^ 128)
        own = writer.tensor(f"{name}_scales_W8", scales)
        column = writer.node("Unsqueeze", [own, last], f"{name}/column")
        whole = max(1 << (rows.shape[1] - 1).bit_length(), 16)  # a block is a power of two
        writer.gather([table, node.input[1], column], node.output[0], whole, factor)
        if any(head.input[1] == name for head in graph.products.values()):
            flipped = writer.node("BitwiseXor", [table, writer.tensor("int8.sign", np.uint8(128))], f"{name}/flipped")
            signed = writer.node("Cast", [flipped], f"{name}/signed", to=INT8)
            tables[name] = writer.node("Transpose", [signed], f"{name}/W8"), own

    return product, embed, balance.norms


def balanced(graph: Graph, found: dict[str, Activations]) -> Balance:
    """The factors for every product that directly follows a norm, or a Mul of another product and a gate.

    `found` holds the activations by the name of a product's input.
    """
    balance = Balance({}, {}, {})
    for name, (peak, _) in found.items():
        takers = [node for node in graph.products.values() if node.input[0] == name]
        largest = np.max([np.abs(graph.array(node.input[1])).max(1) for node in takers], 0)
        factor = np.maximum(peak, rounding.SMALLEST) ** ALPHA / np.maximum(largest, rounding.SMALLEST) ** (1 - ALPHA)
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
