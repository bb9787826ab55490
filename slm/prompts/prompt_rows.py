"""Checks a row of a prompt set. All file formats and both engines use this check."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slm.base.errors import BadInput
from slm.base.wording import did_you_mean, quoted
from slm.prompts import other_shapes

ROW_BYTES = 2**20
FIELDS = ("id", "messages", "prompt", "expected", "scorers", "cluster", "tags", "response_format")
ROLES = ("system", "user", "assistant")
FORMATS = ("json_object", "json_schema")  # of `response_format`

# scorer name -> a check of a row's expected texts and options, which returns the fault, or None without a fault
KnownScorers = Mapping[str, Callable[[tuple[str, ...], dict[str, Any]], str | None]]


@dataclass(frozen=True)
class ScorerCall:
    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One row. It has either `messages` (each {"role", "content"}) or `prompt`. The other field is None."""

    id: str
    messages: tuple[dict[str, str], ...] | None
    prompt: str | None
    expected: tuple[str, ...]
    scorers: tuple[ScorerCall, ...]
    cluster: str | None
    tags: tuple[str, ...]
    response_format: dict[str, Any] | None = None  # as OpenAI's API has it. None: free text


def conversation(prompt: Prompt) -> list[dict[str, str]]:
    """The prompt as messages. A plain prompt becomes one message of the user."""
    if prompt.messages is not None:
        return [dict(message) for message in prompt.messages]
    return [{"role": "user", "content": prompt.prompt or ""}]


def canonical_rows(prompts: Iterable[Prompt]) -> list[dict[str, Any]]:
    """The rows as plain data in one fixed form. If they are written as JSONL, reading gives the same prompts."""
    return [_canonical_row(prompt) for prompt in prompts]


def read_row(row: object, where: str, known_scorers: KnownScorers) -> Prompt:
    """Checks one row and returns it as a prompt. Error messages name the row's place, `where`.

    Raises:
        BadInput: a field is unknown, missing or wrong, or the row is longer than 1 MiB.
    """
    if not isinstance(row, dict):
        raise BadInput(f"{where}: is {quoted(row)}; write a mapping with {', '.join(FIELDS)}")
    if "inputs" in row or "expectations" in row:
        row = _from_mlflow(row, where)
    check_names(row, where)
    if ("messages" in row) == ("prompt" in row):
        has = "both `messages` and `prompt`" if "prompt" in row else "neither `messages` nor `prompt`"
        raise BadInput(f"{where}: has {has}; give one of them")
    expected = _texts(row.get("expected", []), "expected", where)
    prompt = Prompt(
        id=_text(row["id"], "id", where) if "id" in row else "",
        messages=_messages(row["messages"], where) if "messages" in row else None,
        prompt=_text(row["prompt"], "prompt", where) if "prompt" in row else None,
        expected=expected,
        scorers=_scorers(row.get("scorers", ["contains"] if expected else []), expected, where, known_scorers),
        cluster=_text(row["cluster"], "cluster", where) if "cluster" in row else None,
        tags=_texts(row.get("tags", []), "tags", where),
    )
    if "response_format" in row:
        prompt = replace(prompt, response_format=_response_format(row["response_format"], prompt.scorers, where))
    canonical = _canonical_row(prompt)
    if (size := len(_canonical_json(canonical))) > ROW_BYTES:
        raise BadInput(f"{where}: is {size / 2**20:.1f} MiB long; at most 1 MiB is read: shorten it")
    if prompt.id:
        return prompt
    # The id depends only on the prompt and the expected texts, so a new tag or scorer does not change the id.
    content = {key: canonical[key] for key in ("messages", "prompt", "expected") if key in canonical}
    return replace(prompt, id=f"row-{hashlib.sha256(_canonical_json(content)).hexdigest()[:12]}")


def check_names(row: dict[str, Any], where: str, what: str = "field") -> None:
    """Checks that the names of a row are ours. If they are another tool's, the message says how to read such rows.

    Raises:
        BadInput: a name is unknown.
    """
    if all(name in FIELDS for name in row):
        return
    if told := other_shapes.explained(row):
        raise BadInput(f"{where}: {told}")
    try:
        _known_fields(row, FIELDS, where, what)
    except BadInput as error:
        hint = other_shapes.usual_names(row)
        raise BadInput(f"{error}; {hint}" if hint else str(error)) from None


def _from_mlflow(row: dict[str, Any], where: str) -> dict[str, Any]:
    _known_fields(row, ("inputs", "expectations", "id", "scorers", "cluster", "tags", "response_format"), where)
    plain = {field: value for field, value in row.items() if field not in ("inputs", "expectations")}
    pairs = (("inputs", "messages", "messages"), ("expectations", "expected_response", "expected"))
    for outer, inner, field in pairs:
        mapping = row.get(outer, {})
        if not isinstance(mapping, dict):
            raise BadInput(f"{where}: `{outer}` is {quoted(mapping)}; write a mapping with `{inner}`")
        _known_fields(mapping, (inner,), f"{where} `{outer}`")
        if inner in mapping:
            plain[field] = mapping[inner]
    return plain


def _known_fields(given: dict[str, Any], known: tuple[str, ...], where: str, what: str = "field") -> None:
    for field in given:
        if field not in known:
            guess = did_you_mean(field, known)
            raise BadInput(f"{where}: unknown {what} {quoted(field)}{guess}; there are {', '.join(known)}")


def _text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where}: `{field}` is {quoted(value)}, not text; write text, in quotes, or leave it out")
    if not value.strip():
        raise BadInput(f"{where}: `{field}` is {quoted(value)}, an empty text; write something or leave it out")
    if "\0" in value:  # onnxruntime-genai drops the text after a NUL without an error
        raise BadInput(f"{where}: `{field}` is {quoted(value)} with a NUL character in it; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadInput(f"{where}: `{field}` holds {half}, half a character; write both halves or none") from None
    return value


def _texts(value: object, field: str, where: str) -> tuple[str, ...]:
    return tuple(_text(item, field, where) for item in (value if isinstance(value, list) else [value]))


def _messages(value: object, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise BadInput(f"{where}: `messages` is {quoted(value)}; write a list of {{role, content}}, at least one")
    messages = []
    for number, message in enumerate(value):
        field = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadInput(f"{where}: `{field}` is {quoted(message)}; write {{role, content}}")
        _known_fields(message, ("role", "content"), f"{where} `{field}`")
        if missing := {"role", "content"} - message.keys():
            raise BadInput(f"{where}: `{field}` has no `{min(missing)}`; write {{role, content}}")
        if message["role"] not in ROLES:
            guess = did_you_mean(message["role"], ROLES)
            problem = f"`{field}.role` is {quoted(message['role'])}{guess}"
            raise BadInput(f"{where}: {problem}; there are {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _text(message["content"], f"{field}.content", where)})
    return tuple(messages)


def _scorers(value: object, expected: tuple[str, ...], where: str, known: KnownScorers) -> tuple[ScorerCall, ...]:
    calls: dict[str, dict[str, Any]] = {}
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | dict):
            raise BadInput(f"{where}: `scorers` holds {quoted(item)}; write names, or {{name: options}}")
        for name, options in ({item: {}} if isinstance(item, str) else item).items():
            if name not in known:
                guess = did_you_mean(name, known)
                raise BadInput(f"{where}: unknown scorer {quoted(name)}{guess}; there are {', '.join(known)}")
            if name in calls:
                raise BadInput(f"{where}: `scorers` asks for {name} twice; remove one")
            calls[name] = _options(name, {} if options is None else options, where)
            if error := known[name](expected, calls[name]):
                raise BadInput(f"{where}: {error}")
    return tuple(ScorerCall(name, options) for name, options in calls.items())


def _response_format(value: object, scorers: tuple[ScorerCall, ...], where: str) -> dict[str, Any]:
    """What holds an answer to JSON. The text `json_schema` takes the schema of the row's scorer json_schema."""
    told = f"{where}: `response_format` is {quoted(value)}"
    if value == "json_object":
        return {"type": value}
    if value == "json_schema":
        schema = next((call.options.get("schema") for call in scorers if call.name == "json_schema"), None)
        if not isinstance(schema, dict):
            raise BadInput(f"{told}, but the row has no scorer json_schema with a schema; write the schema here")
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if not isinstance(value, dict) or value.get("type") not in FORMATS:
        guess = did_you_mean(value.get("type") if isinstance(value, dict) else value, FORMATS)
        raise BadInput(f"{told}{guess}; write json_object, json_schema, or OpenAI's {{type, json_schema}}")
    try:
        _canonical_json(value)
    except (TypeError, ValueError, RecursionError):
        raise BadInput(f"{told}; write plain text, numbers, lists and mappings") from None
    return value


def _options(name: str, options: object, where: str) -> dict[str, Any]:
    if not isinstance(options, dict):
        raise BadInput(f"{where}: the options of scorer {name} are {quoted(options)}; write {{option: value}}")
    try:
        _canonical_json(options)
    except (TypeError, ValueError, RecursionError):
        problem = f"the options of scorer {name} are {quoted(options)}"
        raise BadInput(f"{where}: {problem}; write plain text, numbers, lists and mappings") from None
    return options


def _canonical_row(prompt: Prompt) -> dict[str, Any]:
    row = {
        "id": prompt.id,
        "messages": None if prompt.messages is None else [dict(message) for message in prompt.messages],
        "prompt": prompt.prompt,
        "expected": list(prompt.expected),
        "scorers": [{call.name: call.options} for call in prompt.scorers],
        "cluster": prompt.cluster,
        "tags": list(prompt.tags),
        "response_format": prompt.response_format,
    }
    return {field: value for field, value in row.items() if value is not None}


def _canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
