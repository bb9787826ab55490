"""Reads the texts whose perplexity is measured: a JSONL file with a `text` in each row, or a plain file as one text.

Other fields of a row are ignored, except `cluster`. This module downloads nothing and counts no tokens.
"""

from dataclasses import dataclass
from pathlib import Path

from slm.base.errors import BadInput
from slm.base.hashing import digest
from slm.base.wording import quoted
from slm.prompts import readers


@dataclass(frozen=True)
class Document:
    """One text. Texts of one `cluster` count as related; None: a cluster of its own."""

    id: str  # its place in the file, such as `line 3`
    text: str
    cluster: str | None = None


@dataclass(frozen=True)
class TextSet:
    """The texts of one file. `sha256` is over the texts and their clusters."""

    name: str
    documents: tuple[Document, ...]
    sha256: str


def read_texts(path: Path) -> TextSet:
    """Reads a .jsonl file with one text in each row, or any other file as one text. Texts are UTF-8.

    Raises:
        BadInput: the file can't be read or has more than readers.FILE_BYTES, or a row has no text.
    """
    whole = readers.text_of(path)
    if path.suffix.lower() == ".jsonl":
        rows = readers.READERS[".jsonl"](whole, path.name)
        documents = [_document(row, place, f"{path.name} {place}") for place, row in rows]
    else:
        documents = [_document({"text": whole}, "text", path.name)] if whole.strip() else []
    if not documents:
        raise BadInput(f"{path.name}: has no text; write a plain text, or JSONL rows with `text`")
    content = [[document.text, document.cluster] for document in documents]
    return TextSet(path.stem, tuple(documents), digest(content))


def _document(row: object, place: str, where: str) -> Document:
    if not isinstance(row, dict):
        raise BadInput(f'{where}: is {quoted(row)}; write rows such as {{"text": "…"}}')
    text, cluster = row.get("text"), row.get("cluster")
    if not isinstance(text, str) or not text.strip():
        found = f"is {quoted(text)}" if "text" in row else "is missing"
        raise BadInput(f"{where}: `text` {found}; write a text that is not empty")
    if "\0" in text:  # onnxruntime-genai drops the text after a NUL without an error
        raise BadInput(f"{where}: `text` has a NUL character in it; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where}: `text` has half a surrogate pair, which is not UTF-8; remove it") from None
    if cluster is not None and not isinstance(cluster, str):
        raise BadInput(f"{where}: `cluster` is {quoted(cluster)}; write a text")
    return Document(place, text, cluster)
