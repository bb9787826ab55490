"""The activations of an fp32 graph over short conversations: the largest for SmoothQuant, their products for GPTQ.

The graph runs in parts, one after another. A part gets its weights as inputs. So only the weights of one part are in
memory, and onnxruntime makes no copy of them.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from slm.models.chat_parts.runtime import physical_cores
from slm.models.chat_parts.templates import read_chat_template, render
from slm.models.error_feedback import second_moments
from slm.models.onnx_graph import Graph

PART_BYTES = 2**29  # of a part's weights
CONVERSATIONS = (
    (
        "List three uses of copper.",
        "1. Electrical wiring\n2. Water pipes\n3. Cooking pots",
        "¿Por qué el cielo es azul?",
        "Porque el aire dispersa más la luz azul que la roja.",
        "Add 17 and 26, then double it.",
        "17 + 26 = 43, and twice 43 is 86. The answer is **86**.",
        "Who wrote Pride and Prejudice, and which planet is the largest? Answer as a list.",
        "- Jane Austen wrote *Pride and Prejudice* (1813).\n- Jupiter is the largest planet of the solar system.",
        "Fix the bug: for (int i = 0; i <= n; i++) { sum += values[i]; }",
        "The loop reads one element beyond the end. Use `i < n`:\n```c\nfor (int i = 0; i < n; i++) {\n    sum += "
        "values[i];\n}\n```",
        "Write a short story about a lighthouse keeper who finds a letter.",
        "Every evening, old Marta climbed the ninety-one steps and lit the lamp. One morning, the tide left a green "
        'bottle at the foot of the rocks. Inside was a letter, its ink almost gone. "If you read this," it said, '
        '"tell my sister that I was not afraid." There was a name, and a village that Marta knew well; it was her '
        "own. She put on her coat, locked the door behind her, and for the first time in thirty years she let "
        "someone else watch the sea.",
    ),
    (
        "What is the capital of Italy?",
        "The capital of Italy is Rome.",
        "Write a function that reverses a list.",
        "```python\ndef reverse(items):\n    return items[::-1]\n```",
        "What are the side effects of too much caffeine?",
        "Restlessness, a racing heart, headaches and poor sleep. Healthy adults should stay below 400 mg a day, "
        "about four cups of coffee.",
        "Quelle est la différence entre une comète et un astéroïde ?",
        "Une comète est faite surtout de glace et de poussière, et développe une queue près du Soleil. Un astéroïde "
        "est rocheux ou métallique.",
        "Resume en una frase: Los bosques tropicales cubren menos del diez por ciento de la tierra, pero albergan "
        "más de la mitad de las especies conocidas.",
        "Aunque ocupan poca superficie, los bosques tropicales reúnen más de la mitad de las especies.",
        "Solve for x: 3x - 7 = 2(x + 4). Show each step.",
        "First, expand the right side: 3x - 7 = 2x + 8.\nThen subtract 2x from both sides: x - 7 = 8.\nFinally, add "
        "7: x = 15.\nCheck: 3 * 15 - 7 = 38, and 2 * (15 + 4) = 38.",
    ),
    (
        "Übersetze ins Englische: Der Zug kommt um acht Uhr an.",
        "The train arrives at eight o'clock.",
        'Is this review positive or negative? "The hotel was clean, but the staff ignored us for two days."',
        "Negative. The guest praises the room but complains about the service, which matters more here.",
        "Describe photosynthesis to a ten-year-old.",
        "Plants make their own food. Their leaves catch sunlight, drink water from the roots, and breathe in carbon "
        "dioxide from the air. With the sun's energy they mix these into sugar, which feeds the plant. As a gift to "
        "us, they let out the oxygen that we breathe.",
        "Explain this query:\nSELECT city, COUNT(*) AS orders FROM sales WHERE year = 2021 GROUP BY city HAVING "
        "COUNT(*) > 100 ORDER BY orders DESC;",
        "The query counts the sales of 2021 in each city, keeps the cities with more than 100 of them, and lists the "
        "busiest city first.",
        "Tell me about the history of the printing press in a few sentences.",
        "Around 1440, Johannes Gutenberg, a goldsmith from Mainz, combined movable metal type, an oil-based ink and "
        "a wooden screw press. Before that, a scribe needed months to copy one book. By 1500, presses in more than "
        "200 European cities had printed some twenty million volumes. Books became cheap enough for merchants and "
        "students, and ideas such as the Reformation spread faster than any authority could stop them.",
    ),
    (
        'Give me JSON with a name and an age: "Ada, 36".',
        '{"name": "Ada", "age": 36}',
        "Summarize: The river rose for three days. On the fourth the old bridge gave way; nobody was on it.",
        "After three days of rising water the old bridge collapsed. No one was hurt.",
        "Draft a polite e-mail that moves a meeting from Tuesday to Thursday.",
        "Subject: Our meeting on Tuesday\n\nDear Ms. Okafor,\n\nAn urgent customer visit has come up on Tuesday. "
        "Could we meet on Thursday at the same time instead? If that does not suit you, please suggest another "
        "day.\n\nKind regards,\nDaniel",
        "What should I do if my computer doesn't start?",
        "Try these steps in order:\n\n- Check that the power cable is plugged in and the outlet works.\n- Hold the "
        "power button for ten seconds, wait, and press it again.\n- Disconnect every USB device.\n- If a fan spins "
        "but the screen stays black, test another monitor.\n\nIf none of this helps, the power supply may be broken.",
        "A train leaves at 9:40 and arrives at 13:05. How long is the journey, and what is its average speed over "
        "287 km?",
        "From 9:40 to 13:05 are 3 hours and 25 minutes, or about 3.42 hours. The average speed is 287 / 3.42, which "
        "is roughly 84 km/h.",
    ),
)


class Activations(NamedTuple):
    """What a product's inputs (…, K) were over CONVERSATIONS."""

    peaks: np.ndarray  # (K,): the largest magnitude of each channel
    moments: np.ndarray | None  # those of `second_moments`, where they are wanted


def activations(graph: Graph, moments: bool) -> dict[str, Activations]:
    """The activations by the name of a product's input."""
    watched = {node.input[0]: graph.before_pruning(node.input[0]) for node in graph.products.values()}
    found: dict[str, Activations] = {}
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
            rows = held[name].reshape(-1, held[name].shape[-1])
            found[name] = Activations(np.abs(rows).max(0), second_moments(rows) if moments else None)
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
    """The graph's inputs by name: a row for each of CONVERSATIONS, as long as the shortest, and no keys and values yet.

    Some tokenizers give ids beyond the model's vocabulary. Such ids are left out.
    """
    from tokenizers import Tokenizer

    model = json.loads((graph.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    template, special_tokens = read_chat_template(graph.folder)
    tokenizer = Tokenizer.from_file(str(graph.folder / "tokenizer.json"))
    rows = []
    for texts in CONVERSATIONS:
        messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
        text = render(template, special_tokens, messages) if template else "\n".join(texts)
        ids = tokenizer.encode(text, add_special_tokens=not template).ids
        rows.append([id for id in ids if id < model["vocab_size"]] or [0])
    length = min(model["context_length"], *map(len, rows))
    cut = np.array([row[:length] for row in rows])
    positions = np.broadcast_to(np.arange(length), cut.shape)
    given = {"input_ids": cut, "attention_mask": np.ones_like(cut), "position_ids": positions}
    past = np.zeros((len(cut), graph.facts["num_key_value_heads"], 0, graph.facts["head_size"]), np.float32)
    names = [entry.name for entry in graph.model.graph.input if entry.name not in graph.tensors]
    return {name: given.get(name, past) for name in names}
