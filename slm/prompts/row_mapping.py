"""Turns rows in other people's shapes into ours, before the check of rows.

The parameter `fields` names their columns for our fields. `expected_pattern` is a regular expression for the part of
each expected text to keep. Both engines use this module, on rows as plain data. The hash of a prompt set is over the
result, so the same rows in our own shape give the same hash.

Not covered: putting several columns into one text. docs/prompt-sets.md has conversions for that.
"""

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from slm.base import strict_json
from slm.base.errors import BadInput
from slm.base.wording import did_you_mean, quoted
from slm.prompts.prompt_rows import FIELDS, _from_mlflow
from slm.prompts.system_prompts import SystemPrompt

PATTERN_SECONDS = 1.0  # of processor time, for the pattern in one expected text
ALL_SECONDS = 60.0  # the same in all texts that one process reads
MOST_NAMES = 1000  # columns that are remembered for a message
LONGEST_NAME = 4000  # characters of a column's name, as in parameters
TOLD_NAMES = 8  # columns that a message lists
_ABSENT = object()

Seen = frozenset[tuple[str, str]]  # (kind, name of a column): kind is "found", "left out" or "near"


@dataclass(frozen=True)
class RowMapping:
    """`columns` has pairs (their column, our field). Without columns, rows have our fields already.

    `system` is added after the check of rows: slm/prompts/system_prompts.py.
    """

    columns: tuple[tuple[str, str], ...] = ()
    expected_pattern: str = ""
    system: SystemPrompt | None = None

    @property
    def theirs(self) -> frozenset[str]:
        return frozenset(theirs for theirs, _ in self.columns)


NONE = RowMapping()


def read(fields: str, expected_pattern: str, system: SystemPrompt | None = None) -> RowMapping:
    """Reads the parameters `fields` and `expected_pattern`.

    Raises:
        BadInput: a part of `fields` is not theirs:ours, or `expected_pattern` is not a regular expression.
    """
    columns: dict[str, str] = {}  # our field -> their column
    for item in filter(None, (item.strip() for item in fields.split(","))):
        theirs, _, ours = (part.strip() for part in item.rpartition(":"))
        if not theirs or not ours:
            raise BadInput(f"fields: {quoted(item)} is not theirs:ours; write question:prompt,answer:expected")
        if ours not in FIELDS:
            problem = f"{quoted(item)} names no field of a row{did_you_mean(ours, FIELDS)}"
            raise BadInput(f"fields: {problem}; after the colon, there are {', '.join(FIELDS)}")
        if ours in columns:
            raise BadInput(f"fields: {quoted(columns[ours])} and {quoted(theirs)} are both for {ours}; remove one")
        columns[ours] = theirs
    if fields.strip() and not columns:
        raise BadInput(f"fields: {quoted(fields)} is not theirs:ours; write question:prompt,answer:expected")
    if {"prompt", "messages"} <= columns.keys():
        raise BadInput("fields: a row has either prompt or messages; remove one")
    if expected_pattern:
        _compiled(expected_pattern)
    return RowMapping(tuple((theirs, ours) for ours, theirs in columns.items()), expected_pattern, system)


class RowMapper:
    """Maps the rows of one reading, and bounds the time that the pattern takes in all of them."""

    def __init__(self, mapping: RowMapping) -> None:
        self.mapping = mapping
        self.seconds = 0.0

    def __call__(self, row: object, where: str) -> object:
        """The row with our fields only, or the row unchanged without a mapping. Anything but a mapping is unchanged.

        Raises:
            BadInput: an expected text has no match for the pattern, or the search takes too long.
        """
        if not isinstance(row, dict):
            return row
        if self.mapping.columns:
            row = _with_our_names(row, self.mapping.columns, where)
        if self.mapping.expected_pattern:
            start = time.process_time()
            row = _with_kept_part(row, self.mapping.expected_pattern, where)
            self.seconds += time.process_time() - start
            if self.seconds > ALL_SECONDS:
                raise BadInput(f"{where}: {_slow(self.mapping.expected_pattern, ALL_SECONDS)} up to this row")
        return row


# ---------------------------------------------------------------------------------------------------------------------
# Columns


def seen(row: object, mapping: RowMapping) -> Seen:
    """The mapped columns that a row has, the columns that are left out, and names that were perhaps meant."""
    if not isinstance(row, dict) or not mapping.columns:
        return frozenset()
    heads, replaced = {_head(row, theirs) for theirs, _ in mapping.columns}, _replaced(mapping.columns)
    noted = {("left out", name) for name in row if name not in heads and (name not in FIELDS or name in replaced)}
    for theirs, _ in mapping.columns:
        if _value(row, theirs) is not _ABSENT:
            noted.add(("found", theirs))
        else:
            noted |= {("near", name) for name in _near(row, theirs)}
    return frozenset((kind, str(name)[:LONGEST_NAME]) for kind, name in noted)


def left_out(noted: Iterable[tuple[str, str]], mapping: RowMapping) -> tuple[str, ...]:
    """The names of all columns that are left out, from what was seen in all rows.

    Raises:
        BadInput: no row has one of the mapped columns.
    """
    noted = set(noted)
    for theirs, ours in mapping.columns:
        if ("found", theirs) not in noted:
            names = sorted({name for _, name in noted})
            there = f"; there are {_listed(names)}" if names else "; remove it"
            raise BadInput(f"fields: no row has {quoted(theirs)}{did_you_mean(theirs, names)} for {ours}{there}")
    return tuple(sorted(name for kind, name in noted if kind == "left out"))


def left_out_note(names: Iterable[str]) -> str:
    """`left out: solution, source`, for the start of a run."""
    return f"left out: {_listed(list(names))}"


def _with_our_names(row: dict[str, Any], columns: tuple[tuple[str, str], ...], where: str) -> dict[str, Any]:
    """A mapped column takes the place of a column with the field's own name."""
    taken = _replaced(columns) | {_head(row, theirs) for theirs, _ in columns}
    ours_already = {name: value for name, value in row.items() if name in FIELDS and name not in taken}
    found = {ours: _value(row, theirs) for theirs, ours in columns}
    return ours_already | {ours: _as_field(ours, value, where) for ours, value in found.items() if value is not _ABSENT}


def _replaced(columns: tuple[tuple[str, str], ...]) -> set[str]:
    """The fields whose own columns give way. A mapped prompt takes the place of `messages` as well."""
    fields = {ours for _, ours in columns}
    return fields | ({"prompt", "messages"} if fields & {"prompt", "messages"} else set())


def _as_field(ours: str, value: object, where: str) -> object:
    """A whole number becomes text, as in other people's ids and answers. JSON in a text is read for `messages`."""
    if ours in ("messages", "scorers", "response_format") and isinstance(value, str) and value.startswith(("[", "{")):
        try:
            return strict_json.parse(value)
        except ValueError as error:
            raise BadInput(f"{where}: `{ours}` is not JSON: {error}") from None
    if ours in ("id", "expected", "cluster", "tags"):
        return [_as_text(item) for item in value] if isinstance(value, list) else _as_text(value)
    return value


def _as_text(value: object) -> object:
    try:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    except ValueError:  # CPython refuses to print integers of more than 4,300 digits; the check of rows refuses them
        return value


def _head(row: dict[str, Any], theirs: str) -> str:
    """The name of the column of the row that `theirs` is, or is in."""
    return theirs if theirs in row else theirs.partition(".")[0]


def _value(row: dict[str, Any], theirs: str) -> Any:
    """The value at `a.b`: the column with that name, or `b` in the mapping `a`. In a list, `b` counts from 0."""
    if theirs in row:
        return row[theirs]
    value: Any = row
    for part in theirs.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def _near(row: dict[str, Any], theirs: str) -> list[str]:
    """The names beside which `theirs` would stand."""
    before, value = "", row
    for part in theirs.split(".")[:-1]:
        if not isinstance(value.get(part), dict):
            break
        before, value = f"{before}{part}.", value[part]
    return [f"{before}{name}" for name in list(value)[:MOST_NAMES]]


def _listed(names: list[str]) -> str:
    shown = [name if name.isprintable() and len(name) <= 40 else quoted(name) for name in names[:TOLD_NAMES]]
    return ", ".join(shown) + (f" and {len(names) - TOLD_NAMES} more" if len(names) > TOLD_NAMES else "")


# ---------------------------------------------------------------------------------------------------------------------
# The part of `expected` to keep


def check_expected(mapping: RowMapping, any_expected: bool, name: str) -> None:
    """Checks that the pattern has a text to search.

    Raises:
        BadInput: there is a pattern, and no row has `expected`.
    """
    if mapping.expected_pattern and not any_expected:
        raise BadInput(
            f"expected_pattern: no row of {name} has `expected`; map a column to it with fields, or leave out"
        )


def _with_kept_part(row: dict[str, Any], pattern: str, where: str) -> dict[str, Any]:
    if "inputs" in row or "expectations" in row:
        row = _from_mlflow(row, where)
    if "expected" not in row:
        return row
    texts = row["expected"]
    kept = [_kept(text, pattern, where) for text in (texts if isinstance(texts, list) else [texts])]
    return row | {"expected": kept if isinstance(texts, list) else kept[0]}


def _kept(text: object, pattern: str, where: str) -> object:
    """Group 1 of the last match, or the whole match, without white space around it. Empty parts do not count."""
    if not isinstance(text, str):
        return text  # the check of rows refuses it
    kept, compiled = "", _compiled(pattern)
    try:
        for match in compiled.finditer(text, timeout=PATTERN_SECONDS):  # the limit is for all matches together
            kept = (match[1 if compiled.groups else 0] or "").strip() or kept
    except TimeoutError:
        raise BadInput(f"{where}: {_slow(pattern, PATTERN_SECONDS)} in `expected`") from None
    if not kept:
        problem = f"expected_pattern {quoted(pattern)} finds nothing in `expected`, {quoted(text)}"
        raise BadInput(f"{where}: {problem}; change the pattern or the row")
    return kept


def _slow(pattern: str, seconds: float) -> str:
    return f"expected_pattern {quoted(pattern)} is too slow; write one that ends within {seconds:g} s"


@functools.lru_cache(maxsize=8)
def _compiled(pattern: str) -> Any:
    import regex  # reads the patterns of `re`, and has a time limit

    try:
        return regex.compile(pattern)
    except MemoryError:
        raise
    except Exception as error:
        problem = f"{quoted(pattern)} is not a regular expression: {quoted(str(error) or type(error).__name__)}"
        raise BadInput(f"expected_pattern: {problem}; correct it") from None
