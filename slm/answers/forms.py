"""Reads the input form of a logged model from its signature and flavors, and finds the text in the model's output.

A model takes a conversation (`messages`, or the Responses API's `input`), a text in a named column, or a list of texts.
The model gets only the generation parameters that its signature declares, in its rows or as MLflow params.

A model that takes text gets a conversation through its chat template. The template is the `chat_template` in the
model's metadata (with `special_tokens`), or else the template of a transformers model's tokenizer. Without a template,
the system message, an empty line and the user's message are the text. A longer conversation becomes `User: …`,
`Assistant: …`, and ends with `Assistant:`.

This module loads and calls no model. Not covered: models without a signature, with images or tensors as input, or
with columns that only their author knows. Also not covered: a template that begins with a BOS token, if a pipeline's
tokenizer then adds a second BOS token.
"""

import numbers
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm.base.errors import BadInput
from slm.models import chat_model, wrappers

# generation parameter -> the names that models have for it
NAMES = {
    "max_tokens": ("max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens"),
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "stop": ("stop", "stop_sequences"),
    "seed": ("seed", "random_seed"),
}
TEXT_COLUMNS = ("prompt", "question", "text", "query", "input", "inputs", "content", "message")  # the likeliest first
NEUTRAL = {"n": 1, "stream": False, "stop": [], "stop_sequences": []}  # values for required columns
TEXT_KEYS = ("text", "content", "answer", "output", "response", "result", "generated_text", "prediction")
PICKLES = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
GREEDY = 1e-6  # transformers refuses temperature 0. With its fp32 logits, 1e-6 leaves only the likeliest token


@dataclass(frozen=True)
class Field:
    """The field where a model takes a generation parameter."""

    name: str
    is_param: bool = False  # True: an MLflow param; False: a field of the row
    kind: str = ""  # long, double, string, …; "": any type


@dataclass(frozen=True)
class Form:
    """How a model takes a prompt, and how its output holds the text."""

    column: str  # the column of the conversation or the text; "" for a list of texts without a column
    is_chat: bool
    fields: dict[str, Field] = field(default_factory=dict)  # generation parameter -> field
    fixed: dict = field(default_factory=dict)  # fields that have the same value in every row
    template: str = ""
    special_tokens: dict[str, str] = field(default_factory=dict)
    as_list: bool = False  # rows go in a list, not a table
    do_sample: bool = False  # whether the model has the param do_sample, which turns temperature on
    lowest_temperature: float = 0.0
    echoes: bool = False  # answers begin with the prompt


def text_of(messages: list[dict], form: Form) -> str:
    """A conversation as one text. The module's docstring has the rules.

    Raises:
        Refused: the chat template refuses the conversation.
    """
    if form.template:
        return chat_model.render(form.template, form.special_tokens, messages)
    roles = [message["role"] for message in messages]
    if roles in (["user"], ["system"], ["system", "user"]):
        return "\n\n".join(message["content"] for message in messages)
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


# ---------------------------------------------------------------------------------------------------------------------
# The form, from the logged description


def check(uri: str, description) -> None:
    """Refuses a model that can't take prompts. Only the description (MLflow's ModelInfo) is read, and no file.

    Raises:
        BadInput: the model has no pyfunc or no signature, has unknown columns, or is a pickle that MLflow may not load.
    """
    pyfunc = description.flavors.get("python_function")
    if pyfunc is None:
        raise BadInput(f"{uri} has no python_function flavor, by which MLflow asks models for answers")
    if "python_model" in pyfunc and os.environ.get(PICKLES, "true").lower() not in ("true", "1"):
        raise BadInput(f"{uri} is a pickle, which can run anything; set {PICKLES}=true where you trust who made it")
    form_of(uri, description, None)


def form_of(uri: str, description, folder: Path | None) -> Form:
    """The form of a model. `description` is MLflow's Model. Without `folder`, the chat template may be missing.

    Raises:
        BadInput: the model has no signature, takes tensors, or has unknown columns.
    """
    columns, as_list = _columns(uri, description)
    params = {spec.name: spec for spec in (description.signature.params or ())}
    if wrappers.is_ours(description):
        column = "messages" if "messages" in columns else "prompt"
        fields = {name: Field(name) for name in NAMES}
        return Form(column, column == "messages", fields, **_template(description, folder))
    fields = {}
    for name, theirs in NAMES.items():
        taken = [Field(other, False, _kind(columns[other].type)) for other in theirs if other in columns]
        taken += [
            Field(other, True, "" if params[other].shape else _kind(params[other].dtype))
            for other in theirs
            if other in params
        ]
        if taken:
            fields[name] = taken[0]
    column, is_chat = _content_column(uri, columns, {taken.name for taken in fields.values() if not taken.is_param})
    more: dict[str, Any] = {}
    flavor = description.flavors.get("transformers")
    if flavor:
        if flavor.get("inference_task"):
            fields.pop("stop", None)  # with stop strings, MLflow looks for the tokenizer at the path from the training
        more = {"lowest_temperature": GREEDY, "do_sample": "do_sample" in params}
        more["echoes"] = not flavor.get("inference_task") and flavor.get("task") == "text-generation"
    fixed = {name: NEUTRAL[name] for name, spec in columns.items() if spec.required and name in NEUTRAL}
    template: dict[str, Any] = {} if is_chat else _template(description, folder)
    return Form(column, is_chat, fields, fixed, as_list=as_list, **template, **more)


@dataclass(frozen=True)
class _Column:
    type: object  # MLflow's type
    required: bool


def _columns(uri: str, description) -> tuple[dict[str, _Column], bool]:
    """The input's columns by name ("" for an unnamed column), and whether rows go in a list.

    For the type hint list[SomeModel], MLflow makes a list of records. The record's properties are then the columns.
    """
    from mlflow.types.schema import Object

    inputs = description.signature.inputs if description.signature else None
    if inputs is None:
        raise BadInput(f"{uri} has no signature; log it with one: a `messages` column, or one text column")
    if inputs.is_tensor_spec():
        raise BadInput(f"{uri} takes tensors; a `messages` column, or one text column, is needed")
    specs = list(inputs)
    if len(specs) == 1 and specs[0].name is None and isinstance(specs[0].type, Object):
        return {entry.name: _Column(entry.dtype, entry.required) for entry in specs[0].type.properties}, True
    unnamed = len(specs) == 1 and specs[0].name is None
    return {spec.name or "": _Column(spec.type, spec.required) for spec in specs}, unnamed


def _content_column(uri: str, columns: dict[str, _Column], parameters: set[str]) -> tuple[str, bool]:
    """The column that holds the prompt, and whether the column takes a conversation."""
    lists = [name for name in ("messages", "input", "") if name in columns and _is_conversation(columns[name].type)]
    texts = [name for name, spec in columns.items() if _kind(spec.type) == "string" and name not in parameters]
    needed = [name for name in texts if columns[name].required]
    likely = [name for name in TEXT_COLUMNS if name in (needed or texts)]
    chosen = lists or (needed if len(needed) == 1 else texts if len(texts) == 1 else likely)
    missing = [
        name
        for name, spec in columns.items()
        if spec.required and name not in parameters and name not in NEUTRAL and name != (chosen or [None])[0]
    ]
    if not chosen or missing:
        told = ", ".join(f"{name or 'unnamed'} ({_kind(spec.type)})" for name, spec in columns.items())
        raise BadInput(f"{uri} takes the columns {told:.300}; a `messages` column, or one text column, is needed")
    return chosen[0], bool(lists)


def _is_conversation(type) -> bool:
    """Whether a column takes a list of records that need only a role and a content."""
    from mlflow.types.schema import AnyType, Array, Object

    inner = type.dtype if isinstance(type, Array) else None
    if isinstance(inner, Object):
        needed = {entry.name for entry in inner.properties if entry.required}
        return needed <= {"role", "content"} <= {entry.name for entry in inner.properties}
    return isinstance(inner, AnyType)  # the Responses API has this type


def _kind(type) -> str:
    return getattr(type, "name", None) or str(type)


def _template(description, folder: Path | None) -> dict:
    metadata = description.metadata or {}
    template, special = metadata.get("chat_template") or "", metadata.get("special_tokens") or {}
    if not template and folder and "transformers" in description.flavors:
        template, special = chat_model.read_chat_template(folder / "components" / "tokenizer")
    return {"template": template, "special_tokens": special}


def fitted(value, kind: str):
    """A parameter's value in the signature's type. If the conversion loses data, the value stays unchanged."""
    if kind in ("long", "integer") and value == int(value):
        return int(value)
    if kind in ("double", "float"):
        return float(value)
    if kind == "string" and isinstance(value, list) and len(value) == 1:
        return value[0]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The output


def rows_of(output) -> list:
    """A prediction as a list with one value per row."""
    if hasattr(output, "iloc"):  # a table, or a column
        return output.to_dict(orient="records") if hasattr(output, "columns") else output.tolist()
    if hasattr(output, "tolist"):  # an array
        output = output.tolist()
    return list(output) if isinstance(output, list | tuple) else [output]


def answer_of(output) -> dict:
    """One row's prediction as an answer.

    The prediction is a text, a number, or an object. The object has one of OpenAI's or MLflow's schemas, a single
    field, or a field in TEXT_KEYS.

    Raises:
        ValueError: the prediction has no text, or reports an error.
    """
    output = output.model_dump() if hasattr(output, "model_dump") else output
    if not isinstance(output, dict):
        return _answer(output)
    usage = output.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = (
        usage.get("prompt_tokens", usage.get("input_tokens")),
        usage.get("completion_tokens", usage.get("output_tokens")),
    )
    if output.get("error"):
        raise ValueError(f"the model answered with an error: {output['error']!r:.200}")
    if output.get("choices"):  # chat and text completions
        [choice, *_] = output["choices"]
        text = choice["message"].get("content") if choice.get("message") else choice.get("text")
        return _answer(text, choice.get("finish_reason"), *counts)
    if isinstance(output.get("messages"), list):  # ChatAgent
        texts = [message.get("content") for message in output["messages"] if message.get("role") == "assistant"]
        return _answer(texts[-1] if texts else None, output.get("finish_reason"), *counts)
    if isinstance(output.get("output"), list):  # ResponsesAgent
        items = [item for item in output["output"] if item.get("type") == "message"]
        parts = [part for item in items for part in item.get("content") or [] if part.get("type") == "output_text"]
        text = "".join(part["text"] for part in parts) if parts else None
        return _answer(text, "length" if output.get("status") == "incomplete" else "stop", *counts)
    keys = [key for key in TEXT_KEYS if isinstance(output.get(key), str)] or list(output)
    if len(output) == 1 or (keys and keys[0] in TEXT_KEYS):
        return _answer(output[keys[0]], output.get("finish_reason"), *counts)
    raise ValueError(f"no text is found in the answer's fields {', '.join(map(str, output))}")


def _answer(text, finish_reason=None, prompt_tokens=None, output_tokens=None) -> dict:
    if isinstance(text, int | float) and text == text:  # a number, and not NaN
        text = str(text)
    if not isinstance(text, str):
        raise ValueError(f"the answer holds no text, but {text!r:.80} (finish reason {finish_reason})")
    return {
        "text": whole(text),
        "finish_reason": "length" if finish_reason in ("length", "max_tokens") else "stop",
        "prompt_tokens": _count(prompt_tokens),
        "output_tokens": _count(output_tokens),
        "seconds": 0.0,
        "error": "",
    }


def whole(text: str) -> str:
    """A text that a file can hold: half of a character becomes U+FFFD. A server may cut an answer inside an emoji."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _count(tokens: object) -> int | None:
    """A number of tokens, of numpy too, as an int. None for anything else: the model does not count."""
    if not isinstance(tokens, numbers.Real) or isinstance(tokens, bool):
        return None
    number = float(tokens)
    return int(number) if number >= 0 and number.is_integer() else None
