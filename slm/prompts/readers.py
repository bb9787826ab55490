"""Reads the file formats of prompt sets. Each reader yields rows as plain data, with their places in the file.

To add a format, write a function that takes the text and the file's name. Then put the function into READERS.
Readers take UTF-8 text. A binary format, such as Parquet, also needs a change of `text_of`. With engine=spark,
slm/engines/spark/prompt_frame.py reads Parquet.
"""

import csv
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from slm.base import strict_json
from slm.base.errors import BadInput
from slm.base.strict_yaml import parse_yaml
from slm.base.wording import quoted
from slm.prompts import other_shapes
from slm.prompts.prompt_rows import ROW_BYTES, check_names

FILE_BYTES = 64 * 2**20
YAML_BYTES = 4 * 2**20  # for larger files, PyYAML needs minutes and gigabytes of memory
Reader = Callable[[str, str], Iterator[tuple[str, object]]]
LINE_BYTES = 8 * ROW_BYTES  # JSON may write one character as six, such as \u0041


def text_of(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        BadInput: the file can't be read, is too large or compressed, or is not UTF-8.
    """
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
    limit = YAML_BYTES if READERS.get(path.suffix.lower()) is _yaml_rows else FILE_BYTES
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
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028, which JSON allows
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
        told = other_shapes.explained_text(text)
        raise BadInput(f"{name}: {told}" if told else f"{name}: not YAML: {error}") from None
    if isinstance(rows, dict) and (told := other_shapes.explained(rows)):
        raise BadInput(f"{name}: {told}")
    if rows is not None and not isinstance(rows, list):
        raise BadInput(f"{name}: is {quoted(rows)}; write a list of rows, each starting with '- '")
    yield from ((f"row {number}", row) for number, row in enumerate(rows or [], 1))


def _csv_rows(text: str, name: str, mapped: frozenset[str] = frozenset()) -> Iterator[tuple[str, object]]:
    """With columns that `fields` maps, other columns may have any name. A mapped cell is one text, also with a |."""
    csv.field_size_limit(max(csv.field_size_limit(), ROW_BYTES))
    reader, place = csv.reader(io.StringIO(text, newline=""), strict=True), "line 1"
    header: list[str] = []
    try:
        while (cells := next(reader, None)) is not None:
            if cells and not header:
                header = [cell.strip() for cell in cells]
                if not mapped:
                    check_names(dict.fromkeys(header), f"{name} line 1", "column")
                if (twice := next((c for c in header if header.count(c) > 1), None)) is not None:
                    raise BadInput(f"{name} line 1: the column {quoted(twice)} is there twice; rename one")
            elif cells:
                if len(cells) != len(header):
                    problem = f"has {len(cells)} cells under {len(header)} columns"
                    raise BadInput(f"{name} {place}: {problem}; put a text with a comma in it in double quotes")
                row = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
                yield (
                    place,
                    {
                        column: cell if column in mapped else _csv_cell(column, cell, f"{name} {place}")
                        for column, cell in row.items()
                    },
                )
            place = f"line {reader.line_num + 1}"  # a quoted cell may have several lines
    except csv.Error as error:
        raise BadInput(f"{name} {place}: not CSV: {error}") from None


def _csv_cell(column: str, cell: str, where: str) -> object:
    if column in ("expected", "scorers", "tags"):
        return [part.strip() for part in cell.split("|")]
    if column == "messages" or (column == "response_format" and cell.startswith("{")):
        try:
            return strict_json.parse(cell)
        except ValueError as error:
            raise BadInput(f"{where}: `{column}` is not JSON: {error}") from None
    return cell


def reader(suffix: str, mapped: frozenset[str]) -> Reader | None:
    """The reader of a suffix, for files of which `fields` maps these columns. None for an unknown suffix."""
    if suffix == ".csv" and mapped:
        return functools.partial(_csv_rows, mapped=mapped)
    return READERS.get(suffix)


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".yaml": _yaml_rows,
    ".yml": _yaml_rows,
}
