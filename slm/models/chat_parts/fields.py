"""The fields of a chat request: one table says what happens to each of them.

The wrapper, the signature that MLflow logs, `serve` and the table of docs/serving.md are made from FIELDS. A field
that the table lacks is refused by its name.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .rows import Refused

MOST_CHOICES = 16
MOST_TOKENS = 2**20
NEVER = "this model has none"


@dataclass(frozen=True)
class Field:
    """What happens to one field of a request.

    A refused field has the reason in `refused`. A field without a reason is honoured. `neutral` has the values that ask
    for nothing: a refused field may have them. None, and an empty cell of a table, always count as not given.
    """

    name: str
    kind: str  # number, whole number, flag, text, texts, list, object or any
    meaning: str
    default: Any = None
    low: float = 0.0
    high: float = 0.0
    refused: str = ""
    neutral: tuple = ()
    parameter: str = ""  # of the signature: MLflow's type, if a call may set the field for all its rows
    effect: bool = True  # a field without effect is accepted with any value of its kind

    def range(self) -> str:
        if self.kind == "whole number":
            return f"{int(self.low)} to {int(self.high)}"
        return f"{self.low:g} to {self.high:g}" if self.kind == "number" else ""


FIELDS = (
    Field(
        "messages", "messages", "The conversation: roles system, developer, user, assistant and tool. Content is text."
    ),
    Field("model", "text", "`serve` compares it with the model's names. A loaded model is one model."),
    Field(
        "max_tokens",
        "whole number",
        "The most tokens of an answer.",
        default=512,  # a page: most answers end by themselves before
        low=1,
        high=MOST_TOKENS,
        parameter="long",
    ),
    Field("max_completion_tokens", "whole number", "`max_tokens` by its new name.", low=1, high=MOST_TOKENS),
    Field("temperature", "number", "0 takes the likeliest token.", default=0.0, high=2, parameter="double"),
    Field(
        "top_p", "number", "Draws from the likeliest tokens of this share.", 1.0, low=1e-6, high=1, parameter="double"
    ),
    Field(
        "top_k",
        "whole number",
        "Draws from this many likeliest tokens. 0 and -1 take all.",
        default=0,
        low=-1,
        high=MOST_TOKENS,
        parameter="long",
    ),
    Field(
        "min_p",
        "number",
        "Draws from tokens that have this share of the likeliest token's probability.",
        default=0.0,
        high=1,
        parameter="double",
    ),
    Field("seed", "whole number", "Fixes the draws.", default=0, high=2**63 - 1, parameter="long"),
    Field("stop", "texts", "Texts that end an answer.", default=[], parameter="string"),
    Field("n", "whole number", "The number of answers.", default=1, low=1, high=MOST_CHOICES),
    Field(
        "frequency_penalty",
        "number",
        "Lowers a token's logit by this value for each time that the answer has the token.",
        default=0.0,
        low=-2,
        high=2,
        parameter="double",
    ),
    Field(
        "presence_penalty",
        "number",
        "Lowers the logits of the answer's tokens once.",
        default=0.0,
        low=-2,
        high=2,
        parameter="double",
    ),
    Field(
        "repetition_penalty",
        "number",
        "Divides positive logits of the prompt's and the answer's tokens, and multiplies negative ones.",
        default=1.0,
        low=0.01,
        high=10,
        parameter="double",
    ),
    Field("logit_bias", "object", "Adds numbers from -100 to 100 to the logits of token ids.", default={}),
    Field("logprobs", "flag", "Gives the log probability of each token, before temperature and grammar.", False),
    Field("top_logprobs", "whole number", "Also gives so many likeliest tokens. Needs `logprobs`.", default=0, high=20),
    Field("response_format", "object", "`text`, `json_object` or `json_schema`. A grammar holds the answer to it."),
    Field("stream", "flag", "Sends the answer in pieces: `serve` and `predict_stream`. `predict` refuses it.", False),
    Field("stream_options", "object", "`include_usage`, for a stream.", default={}),
    Field("tools", "list", "Functions that the model may call. The chat template must have a place for them."),
    Field(
        "tool_choice",
        "any",
        "`none`, `auto`, or `required` or a function: a grammar holds the answer to calls of it. Or `allowed_tools`.",
    ),
    Field("parallel_tool_calls", "flag", "`false`: at most one call in an answer.", default=True),
    Field("functions", "list", "Replaced by `tools`.", refused="use tools", neutral=([],)),
    Field("function_call", "any", "Replaced by `tool_choice`.", refused="use tool_choice", neutral=("none", "auto")),
    Field("modalities", "list", "Answers are text.", refused="answers are text", neutral=(["text"],)),
    Field("audio", "object", "Spoken answers.", refused="answers are text"),
    Field("prediction", "object", "Text that is known before.", refused=NEVER),
    Field("reasoning_effort", "text", "Thinking before an answer.", refused=NEVER, neutral=("none",)),
    Field("verbosity", "text", "The length of an answer. Use `max_tokens`.", refused=NEVER, neutral=("medium",)),
    Field("web_search_options", "object", "A search before an answer.", refused=NEVER),
    Field("moderation", "object", "A check of the answer.", refused=NEVER),
    Field("custom_inputs", "object", "MLflow's field for other data.", refused=NEVER, neutral=({},)),
    Field("user", "text", "The client's user.", effect=False),
    Field("metadata", "object", "The client's own labels.", effect=False),
    Field("store", "flag", "Keeps the answer at OpenAI. Nothing is kept here.", effect=False),
    Field("service_tier", "text", "OpenAI's price class.", effect=False),
    Field("safety_identifier", "text", "The client's user.", effect=False),
    Field("prompt_cache_key", "text", "A hint for OpenAI's cache.", effect=False),
    Field("prompt_cache_options", "object", "A hint for OpenAI's cache.", effect=False),
    Field("prompt_cache_retention", "text", "A hint for OpenAI's cache.", effect=False),
)
HINTS = {  # fields of other interfaces
    "prompt": "; this model takes messages",
    "max_new_tokens": " (did you mean 'max_tokens'?)",
    "do_sample": " (did you mean 'temperature'?)",
    "guided_json": " (did you mean 'response_format'?)",
}
WHOLE = ("schema", "parameters", "arguments")  # entries that hold a JSON schema, or the arguments of a call
BY_NAME = {entry.name: entry for entry in FIELDS}
DEFAULTS = {entry.name: entry.default for entry in FIELDS if entry.default is not None}


@dataclass(frozen=True)
class Request:
    """The values of a checked row: every one of FIELDS that the row or the call gives, in Python's own types."""

    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """The value of a field, or its default."""
        return self.values.get(name, DEFAULTS.get(name))


def given(value) -> bool:
    """Whether a table's cell holds a value. pandas fills empty cells with None or NaN."""
    return value is not None and not (isinstance(value, float | np.floating) and np.isnan(value))


def plain(value, whole: bool = False):
    """A value of a table in Python's own types. Entries without a value, such as those of Arrow's structs, are left
    out. With `whole`, they stay. A JSON schema and a call's arguments may have them, and so these are whole."""
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(entry, whole) for entry in value]
    if isinstance(value, Mapping):
        kept = {name: entry for name, entry in value.items() if whole or given(entry)}
        return {name: plain(entry, whole or name in WHOLE) for name, entry in kept.items()}
    return value.item() if isinstance(value, np.generic) else value


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name)[:100].lower(), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_names(names: Iterable[object], others: Iterable[str] = ()) -> None:
    """Refuses a field that the table lacks. `others` are further names that may stand beside the fields.

    Raises:
        Refused: there is no such field.
    """
    known = [*BY_NAME, *others]
    for name in names:
        if name not in known:
            hint = HINTS.get(str(name)) or did_you_mean(name, known)
            raise Refused(f"{name!s:.60}: there is no such field{hint}", str(name)[:60])


def checked(row: Mapping, params: Mapping | None = None, others: Iterable[str] = ()) -> Request:
    """The fields of a row, checked. The row's value comes first, then the call's value.

    Raises:
        Refused: a field is unknown, is refused, or has a value of a wrong kind or outside its range.
    """
    values: dict[str, Any] = {}
    for source in (params or {}, row):
        check_names((name for name in source if given(source[name])), others)
        for name, value in source.items():
            if given(value) and name in BY_NAME:
                values[name] = _checked(BY_NAME[name], plain(value))
    asked = {name: value for name, value in row.items() if given(value)}
    if "max_completion_tokens" in asked:  # it also replaces the call's max_tokens
        values["max_tokens"] = values["max_completion_tokens"]
    return Request(values)


def includes_usage(stream_options: Mapping | None) -> bool:
    """Whether a stream ends with the counts of its tokens.

    Raises:
        Refused: stream_options has another field, or a wrong value.
    """
    for name, value in (stream_options or {}).items():
        if name != "include_usage":
            hint = did_you_mean(name, ["include_usage"])
            raise Refused(f"stream_options.{name!s:.40}: there is no such field{hint}", "stream_options")
        if not isinstance(value, bool):
            text = f"stream_options.include_usage must be true or false, got {value!r:.40}"
            raise Refused(text, "stream_options")
    return bool((stream_options or {}).get("include_usage"))


def _checked(entry: Field, value):
    if entry.refused:
        if value in entry.neutral or value == {} or value is False:
            return value
        shown = f"{value!r:.60}"
        raise Refused(f"{entry.name}: {shown} is not supported by this model: {entry.refused}", entry.name)
    return KINDS[entry.kind](entry, value)


def _number(entry: Field, value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{entry.name} must be a number, got {value!r:.60}", entry.name)
    kind: type = int if entry.kind == "whole number" else float
    if not entry.low <= value <= entry.high or (kind is int and value != int(value)):  # NaN fails the comparison
        words = "a whole number" if kind is int else "a number"
        low, high = kind(entry.low), kind(entry.high)
        raise Refused(f"{entry.name} must be {words} from {low} to {high}, got {value!r:.60}", entry.name)
    return kind(value)


def _instance(kind: type, words: str) -> Callable:
    def checked(entry: Field, value):
        if not isinstance(value, kind):
            raise Refused(f"{entry.name} must be {words}, got {value!r:.60}", entry.name)
        return value

    return checked


def _texts(entry: Field, value):
    texts = [value] if not isinstance(value, list) else value
    if any(not isinstance(text, str) or not text for text in texts):
        raise Refused(f"{entry.name} must hold non-empty strings, got {texts!r:.60}", entry.name)
    return texts


KINDS = {
    "number": _number,
    "whole number": _number,
    "flag": _instance(bool, "true or false"),
    "text": _instance(str, "text"),
    "texts": _texts,
    "list": _instance(list, "a list"),
    "messages": lambda entry, value: value,  # templates.messages_of checks them
    "object": _instance(dict, "an object"),
    "any": lambda entry, value: value,
}
