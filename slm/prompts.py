"""Reading a prompt set: JSONL, CSV or YAML into checked, frozen records with stable ids and one hash.

Everything that is wrong with a file is said here, in one line with the place, the value and the remedy, before any
model is loaded: a row that is misread silently becomes a wrong score. MLflow's own dataset rows,
`{inputs: {messages}, expectations: {expected_response}}`, are read as well. Nothing is downloaded, no chat template
is applied and no answer is scored here.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from slm import strict_json
from slm.errors import BadInput
from slm.scorers import BUILT_IN, call_error, did_you_mean, quoted

FILE_BYTES = 64 * 2**20
YAML_BYTES = 4 * 2**20  # PyYAML takes minutes and gigabytes over more
ROW_BYTES = 2**20
LINE_BYTES = 8 * ROW_BYTES  # JSON may spend six characters on one
ROWS = 100_000
FIELDS = ("id", "messages", "prompt", "expected", "scorers", "cluster", "tags")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ScorerCall:
    name: str
    options: dict


@dataclass(frozen=True)
class Prompt:
    """One row. Either `messages` ({"role", "content"} each) or `prompt` is given, the other is None."""

    id: str
    messages: tuple[dict[str, str], ...] | None
    prompt: str | None
    expected: tuple[str, ...]
    scorers: tuple[ScorerCall, ...]
    cluster: str | None
    tags: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """`source` is what the user named it by; `sha256` is taken over the canonical rows, whatever the file format."""

    name: str
    source: str
    prompts: tuple[Prompt, ...]
    sha256: str


def read_prompt_set(path: Path, source: str, known_scorers: Iterable[str] = tuple(BUILT_IN)) -> PromptSet:
    """Read the prompt set in `path` by its suffix: .jsonl, .csv, .yaml or .yml. Raises BadInput.

    A row without `id` gets one made of its content; a row with `expected` and without `scorers` is scored by
    `contains`. `known_scorers` are the names a row may ask for; the options of those not built in are not checked.
    """
    known, prompts, places = tuple(known_scorers), [], {}
    rows = READERS.get(path.suffix.lower())
    if rows is None:
        raise BadInput(f"{path.name}: a prompt set is a {', '.join(READERS)} file; rename or convert it")
    for place, row in rows(_text_of(path), path.name):
        prompt = read_row(row, f"{path.name} {place}", known)
        if prompt.id in places:
            remedy = "ids are unique: change one" if "id" in row else "remove one, or give each an `id`"
            problem = f"`id` {quoted(prompt.id)} is that of {places[prompt.id]} too"
            raise BadInput(f"{path.name} {place}: {problem}; {remedy}")
        places[prompt.id] = place
        prompts.append(prompt)
        if len(prompts) > ROWS:
            raise BadInput(f"{path.name}: has more than {ROWS:,} rows; split it, or draw a sample")
    if not prompts:
        raise BadInput(f"{path.name}: no rows; write at least one prompt")
    return _prompt_set(path.stem, source, prompts)


def with_scorers(prompt_set: PromptSet, calls: Iterable[ScorerCall]) -> PromptSet:
    """The same prompts with these calls added to each one's own; a scorer that a row asks for itself stays its own."""
    changed = []
    for prompt in prompt_set.prompts:
        own = {call.name for call in prompt.scorers}
        added = tuple(call for call in calls if call.name not in own)
        changed.append(replace(prompt, scorers=prompt.scorers + added))
    return _prompt_set(prompt_set.name, prompt_set.source, changed)


def _prompt_set(name: str, source: str, prompts: Iterable[Prompt]) -> PromptSet:
    prompts = tuple(prompts)
    return PromptSet(name, source, prompts, hashlib.sha256(_canonical_json(canonical_rows(prompts))).hexdigest())


def canonical_rows(prompts: Iterable[Prompt]) -> list[dict]:
    """The rows as plain data in one fixed form. Written as JSONL they read back as the same prompts."""
    return [_canonical_row(prompt) for prompt in prompts]


def parse_yaml(text: str) -> object:
    """Safe YAML, refusing duplicate keys and aliases (a few lines of them unfold to gigabytes). Raises ValueError."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise ValueError(f"line {mark.line + 1}: {problem}" if mark else problem) from None
    except (AttributeError, LookupError, TypeError) as error:  # yaml's constructors on a value with a wrong !!tag
        raise ValueError(f"a tagged value cannot be read: {error!r}") from None


class _StrictLoader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"the alias *{event.anchor} is not accepted: write the value out"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # the others are refused by yaml itself
                if key in seen:
                    problem = f"the key {quoted(key)} is given twice"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def _text_of(path: Path) -> str:
    try:
        if path.is_dir():
            raise BadInput(f"{path}: is a folder; name a prompt set in it")
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: is not a file; name a prompt set")
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such prompt set; check the path") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    limit = YAML_BYTES if READERS[path.suffix.lower()] is _yaml_rows else FILE_BYTES
    if len(data) > limit:
        remedy = "write it as JSONL" if limit == YAML_BYTES else "split it"
        raise BadInput(f"{path.name}: is larger than {limit // 2**20} MiB; {remedy}")
    if data.startswith(b"\x1f\x8b"):
        raise BadInput(f"{path.name}: is compressed with gzip; unpack it first")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path.name} line {line}: byte {data[error.start]:#04x} is not UTF-8; save as UTF-8") from None


def _jsonl_rows(text: str, name: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028, legal inside JSON
        if len(line) > LINE_BYTES:
            raise BadInput(
                f"{name} line {number}: is {len(line) / 2**20:.1f} MiB long; at most 1 MiB is read: shorten it"
            )
        if line.strip():
            try:
                yield f"line {number}", strict_json.parse(line)
            except ValueError as error:
                raise BadInput(f"{name} line {number}: not JSON: {error}; write one object per line") from None


def _yaml_rows(text: str, name: str) -> Iterator[tuple[str, object]]:
    try:
        rows = parse_yaml(text)
    except ValueError as error:
        raise BadInput(f"{name}: not YAML: {error}") from None
    if rows is not None and not isinstance(rows, list):
        raise BadInput(f"{name}: is {quoted(rows)}; write a list of rows, each starting with '- '")
    yield from ((f"row {number}", row) for number, row in enumerate(rows or [], 1))


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(max(csv.field_size_limit(), ROW_BYTES))
    reader, place, header = csv.reader(io.StringIO(text, newline=""), strict=True), "line 1", None
    try:
        while (cells := next(reader, None)) is not None:
            if cells and header is None:
                header = [cell.strip() for cell in cells]
                _known_fields(dict.fromkeys(header), FIELDS, f"{name} line 1", "column")
                if (twice := next((c for c in header if header.count(c) > 1), None)) is not None:
                    raise BadInput(f"{name} line 1: the column {quoted(twice)} is there twice; rename one")
            elif cells:
                if len(cells) != len(header):
                    problem = f"has {len(cells)} cells under {len(header)} columns"
                    raise BadInput(f"{name} {place}: {problem}; put a text with a comma in it in double quotes")
                row = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
                yield place, {column: _csv_cell(column, cell, f"{name} {place}") for column, cell in row.items()}
            place = f"line {reader.line_num + 1}"  # where the next row starts: a quoted cell may span lines
    except csv.Error as error:
        raise BadInput(f"{name} {place}: not CSV: {error}") from None


def _csv_cell(column: str, cell: str, where: str) -> object:
    if column in ("expected", "scorers", "tags"):
        return [part.strip() for part in cell.split("|")]
    if column == "messages":
        try:
            return strict_json.parse(cell)
        except ValueError as error:
            raise BadInput(f"{where}: `messages` is not JSON: {error}") from None
    return cell


READERS: dict[str, Callable[[str, str], Iterator[tuple[str, object]]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".yaml": _yaml_rows,
    ".yml": _yaml_rows,
}


def read_row(row: object, where: str, known_scorers: tuple[str, ...]) -> Prompt:
    """One row, which stands at `where`, as a checked prompt. Raises BadInput."""
    if not isinstance(row, dict):
        raise BadInput(f"{where}: is {quoted(row)}; write a mapping with {', '.join(FIELDS)}")
    if "inputs" in row or "expectations" in row:
        row = _from_mlflow(row, where)
    _known_fields(row, FIELDS, where)
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
    canonical = _canonical_row(prompt)
    if (size := len(_canonical_json(canonical))) > ROW_BYTES:
        raise BadInput(f"{where}: is {size / 2**20:.1f} MiB long; at most 1 MiB is read: shorten it")
    if prompt.id:
        return prompt
    # Only what is asked and expected: a new tag or scorer leaves the id as it was.
    content = {key: canonical[key] for key in ("messages", "prompt", "expected") if key in canonical}
    return replace(prompt, id=f"row-{hashlib.sha256(_canonical_json(content)).hexdigest()[:12]}")


def _from_mlflow(row: dict, where: str) -> dict:
    _known_fields(row, ("inputs", "expectations", "id", "scorers", "cluster", "tags"), where)
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


def _known_fields(given: dict, known: tuple[str, ...], where: str, what: str = "field") -> None:
    for field in given:
        if field not in known:
            guess = did_you_mean(field, known)
            raise BadInput(f"{where}: unknown {what} {quoted(field)}{guess}; there are {', '.join(known)}")


def _text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where}: `{field}` is {quoted(value)}, not text; write text, in quotes, or leave it out")
    if not value.strip():
        raise BadInput(f"{where}: `{field}` is {quoted(value)}, an empty text; write something or leave it out")
    if "\0" in value:  # onnxruntime-genai encodes what is before it, without a word
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


def _scorers(value: object, expected: tuple[str, ...], where: str, known: tuple[str, ...]) -> tuple[ScorerCall, ...]:
    calls: dict[str, dict] = {}
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | dict):
            raise BadInput(f"{where}: `scorers` holds {quoted(item)}; write names, or {{name: options}}")
        for name, options in ({item: {}} if isinstance(item, str) else item).items():
            if name not in known:
                guess = did_you_mean(name, known)
                raise BadInput(f"{where}: unknown scorer {quoted(name)}{guess}; there are {', '.join(known)}")
            if name in calls:
                raise BadInput(f"{where}: `scorers` asks for {name} twice; remove one")
            calls[name] = _options(name, {} if options is None else options, expected, where)
    return tuple(ScorerCall(name, options) for name, options in calls.items())


def _options(name: str, options: object, expected: tuple[str, ...], where: str) -> dict:
    if not isinstance(options, dict):
        raise BadInput(f"{where}: the options of scorer {name} are {quoted(options)}; write {{option: value}}")
    try:
        _canonical_json(options)
    except (TypeError, ValueError, RecursionError):
        problem = f"the options of scorer {name} are {quoted(options)}"
        raise BadInput(f"{where}: {problem}; write plain text, numbers, lists and mappings") from None
    if name in BUILT_IN and (error := call_error(name, expected, options)):
        raise BadInput(f"{where}: {error}")
    return options


def _canonical_row(prompt: Prompt) -> dict:
    row = {
        "id": prompt.id,
        "messages": None if prompt.messages is None else [dict(message) for message in prompt.messages],
        "prompt": prompt.prompt,
        "expected": list(prompt.expected),
        "scorers": [{call.name: call.options} for call in prompt.scorers],
        "cluster": prompt.cluster,
        "tags": list(prompt.tags),
    }
    return {field: value for field, value in row.items() if value is not None}


def _canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
