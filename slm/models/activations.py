"""The largest activations of an fp32 graph over a short conversation, for SmoothQuant.

The graph runs in parts, one after another. A part gets its weights as inputs. So only the weights of one part are in
memory, and onnxruntime makes no copy of them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from slm.models.chat_parts.runtime import physical_cores
from slm.models.chat_parts.templates import read_chat_template, render
from slm.models.onnx_graph import Graph

PART_BYTES = 2**29  # of a part's weights
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


def peaks(graph: Graph) -> dict[str, np.ndarray]:
    """The largest magnitude (K,) of each channel over CONVERSATION, by the name of a product's input."""
    watched = {node.input[0]: graph.before_pruning(node.input[0]) for node in graph.products.values()}
    found: dict[str, np.ndarray] = {}
    held = _inputs(graph)
    parts = list(_parts(graph))
    for place, nodes in enumerate(parts):
        made = {name for node in nodes for name in node.output} - {""}  # an output that is left out
        later = {name for other in parts[place + 1 :] for node in other for name in node.input}
        wanted = sorted(made & (later | set(watched.values())))
        if not wanted:  # the head alone
            continue
        held |= dict(zip(wanted, _run(graph, nodes, held, wanted), strict=True))
        for name in made & set(watched.values()):
            found[name] = np.abs(held[name]).max((0, 1))
        held = {name: array for name, array in held.items() if name in later}
    return {name: found[made] for name, made in watched.items()}


def _parts(graph: Graph) -> Iterator[list[Any]]:
    """The graph's nodes in order, in lists with at most PART_BYTES of weights. A larger tensor has a list of its own.

    A node with tensors that are in an earlier list needs them again.
    """
    nodes: list[Any] = []
    names: set[str] = set()
    for node in graph.model.graph.node:
        more = names | (graph.tensors.keys() & set(node.input))
        if nodes and sum(_size(graph, name) for name in more) > PART_BYTES:
            yield nodes
            nodes, more = [], graph.tensors.keys() & set(node.input)
        nodes, names = [*nodes, node], more
    yield nodes


def _size(graph: Graph, name: str) -> int:
    return 4 * int(np.prod(graph.tensors[name].dims))


def _run(graph: Graph, nodes: list[Any], held: dict[str, np.ndarray], wanted: list[str]) -> list[np.ndarray]:
    """What `nodes` make of the arrays `held`: the arrays of the names `wanted`."""
    import onnx
    import onnxruntime
    from onnx import helper

    made = {name for node in nodes for name in node.output}
    used = {name for node in nodes for name in node.input if name} - made
    weights = [graph.tensors[name] for name in sorted(used & graph.tensors.keys())]
    external = onnx.TensorProto.EXTERNAL
    small = [tensor for tensor in weights if tensor.data_location != external]
    given = {tensor.name: graph.array(tensor.name) for tensor in weights if tensor.data_location == external}
    given |= {name: held[name] for name in used - graph.tensors.keys()}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
    part = helper.make_graph(nodes, "part", inputs, outputs, small)
    model = helper.make_model(part, opset_imports=graph.model.opset_import, ir_version=graph.model.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(wanted, {entry.name: given[entry.name] for entry in session.get_inputs()})


def _inputs(graph: Graph) -> dict[str, np.ndarray]:
    """CONVERSATION as the graph's inputs, by name, with empty keys and values."""
    from tokenizers import Tokenizer

    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(CONVERSATION)]
    template, special_tokens = read_chat_template(graph.folder)
    text = render(template, special_tokens, messages) if template else "\n".join(CONVERSATION)
    tokenizer = Tokenizer.from_file(str(graph.folder / "tokenizer.json"))
    ids = np.array([tokenizer.encode(text, add_special_tokens=not template).ids])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    past = np.zeros((1, graph.facts["num_key_value_heads"], 0, graph.facts["head_size"]), np.float32)
    names = [entry.name for entry in graph.model.graph.input if entry.name not in graph.tensors]
    return {name: given.get(name, past) for name in names}
