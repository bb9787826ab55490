"""Checks a model's folder from outside before any library opens it, for damage and for paths that leave the folder.

Refused are:
- weight files that are cut off or incomplete;
- links and paths that leave the folder;
- files whose content does not fit their names, native code above all;
- JSON that two readers could understand in different ways;
- settings that ask to run code from the folder (auto_map).

Not covered: pickles and source files beside the weights, which are never loaded. A flipped bit in a weight is found
only if the hub's cache has the file's SHA-256. After logging, the manifest finds such a bit (slm/models/manifest.py).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm.base import cache, strict_json
from slm.base.errors import BadInput
from slm.models import genai_config

NATIVE = {  # the first bytes of machine code files
    b"\x7fELF": "an ELF library or program",
    b"MZ": "a Windows library or program",
    b"!<arch>\n": "an archive of machine code",
    b"\xfe\xed\xfa\xce": "a macOS library or program",
    b"\xfe\xed\xfa\xcf": "a macOS library or program",
    b"\xce\xfa\xed\xfe": "a macOS library or program",
    b"\xcf\xfa\xed\xfe": "a macOS library or program",
    b"\xca\xfe\xba\xbe": "a macOS library or program",
    b"\xca\xfe\xba\xbf": "a macOS library or program",
}
TEXTS = (".md", ".txt", ".jinja", ".py", ".yaml", ".yml")
TEXT_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README")
TEXT_BYTES = 16 * 2**20
PLACE = re.compile(r"\d{1,18}", re.ASCII)  # of a tensor in a file, in bytes
JSON_BYTES = 256 * 2**20  # a tokenizer with 250,000 tokens has 30 MB


def check_links(folder: Path) -> None:
    """Refuses links that leave the folder. Links from a hub snapshot to the blobs of the hub's cache are allowed.

    Raises:
        BadInput: a link leaves the folder.
    """
    allowed = [folder.resolve(), *_blobs(folder)]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise BadInput(
                f"model: {path} is a link to {path.resolve()}, outside the folder; put the file itself there"
            )


def check_files(folder: Path, manifest: dict[str, cache.FileRecord]) -> None:
    """Refuses files that do not fit their names, are cut off or incomplete, or differ from the hub's SHA-256.

    Raises:
        BadInput: a file is refused. The message names the file and the remedy.
    """
    for name, record in manifest.items():
        path = folder / name
        blob = path.resolve().name
        if path.is_symlink() and cache.SHA256.fullmatch(blob) and blob != record.sha256:
            raise BadInput(f"model: {path} is damaged (SHA-256 {record.sha256[:12]}…): delete {path.resolve()}")
        _check_kind(path)
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.name.endswith(".safetensors.index.json"):
            _check_index(path)
        elif path.suffix == ".onnx":
            _check_onnx(path)


def _blobs(folder: Path) -> list[Path]:
    """The folders in which the hub's cache keeps the files of a snapshot."""
    places = [parent.parent / "blobs" for parent in folder.absolute().parents if parent.name == "snapshots"]
    # the hub's cache has a folder here; a link could lead anywhere
    return [place.resolve() for place in places[:1] if not place.is_symlink()]


def _check_kind(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    kind = next((kind for magic, kind in NATIVE.items() if start.startswith(magic)), "")
    if kind:
        raise BadInput(f"model: {path} is {kind}, which is refused; remove it from the model's folder")
    if path.suffix == ".json":
        read_json(path)
    elif path.suffix in TEXTS or path.name.startswith(TEXT_NAMES):
        text = _text(path, TEXT_BYTES)
        if "\0" in text:
            raise BadInput(f"model: {path} should be text, but is not; remove it from the model's folder")


def read_json(path: Path) -> Any:
    """The content of a JSON file in a model's folder.

    Raises:
        BadInput: the file is not strict JSON, or it asks to run code from the folder (auto_map).
    """
    try:
        content = strict_json.parse(_text(path, JSON_BYTES))
    except ValueError as error:
        raise BadInput(f"model: {path} can't be read as JSON: {error}") from None
    for key, value in _entries(content):
        if key == "auto_map" and value and not isinstance(value, int):  # a vocabulary may have such a token
            raise BadInput(f"model: {path} asks to run code from the model's folder (auto_map), which is refused")
    return content


def _text(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise BadInput(f"model: {path} is larger than {limit // 2**20} MiB, the limit here; fetch it again")
        return data.decode()
    except OSError as error:
        raise BadInput(f"model: {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"model: {path} should be text, but is not; remove it from the model's folder") from None


def _entries(value: object) -> Iterator[tuple[object, object]]:
    """Every key of nested mappings, with its value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting.extend(entry for entry in one.values() if isinstance(entry, dict | list))
        elif isinstance(one, list):
            waiting.extend(entry for entry in one if isinstance(entry, dict | list))


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):  # reads the header and compares it with the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise BadInput(f"model: {path} is damaged ({error}); fetch it again") from None


def _check_index(path: Path) -> None:
    try:
        names = set(read_json(path)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"model: {path} is not an index of weights ({type(error).__name__}: {error}); save it again"
        ) from None
    for name in names:
        if isinstance(name, str) and not name.endswith(".safetensors"):
            raise BadInput(f"model: {path} names {name!r:.80}, which is not a .safetensors file; save the model again")
        if not genai_config.is_inside(name) or not (path.parent / name).is_file():
            raise BadInput(f"model: {path} names {name!r:.80}, which is not in its folder; fetch the model again")


def _check_onnx(path: Path) -> None:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        raise BadInput(f"model: {path} is damaged (no ONNX graph can be read from it); fetch it again") from None
    for tensor in _tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        numbers = [entries.get(key) or "0" for key in ("offset", "length")]
        if len(entries) < len(tensor.external_data) or not all(map(PLACE.fullmatch, numbers)):
            raise BadInput(
                f"model: {path} is damaged (the place of {tensor.name!r:.80} cannot be read); fetch it again"
            )
        name = entries.get("location", "")
        if not genai_config.is_inside(name):
            raise BadInput(f"model: {path} takes weights from {name!r:.80}, which is not in its folder and is refused")
        data = path.parent / name
        end = sum(map(int, numbers))
        if not data.is_file() or data.stat().st_size < end:
            raise BadInput(f"model: {data} is missing or cut off ({end:,} bytes are needed); fetch it again")


def _tensors(model) -> Iterator:
    """The tensors whose data is in another file. They belong to the main graph, to functions, or to graphs in nodes."""
    import onnx

    waiting = [model.graph, *model.functions]
    while waiting:
        one = waiting.pop()
        found = list(getattr(one, "initializer", ()))
        for sparse in getattr(one, "sparse_initializer", ()):
            found += [sparse.values, sparse.indices]
        attributes = [*getattr(one, "attribute_proto", ()), *(entry for node in one.node for entry in node.attribute)]
        for attribute in attributes:
            found += [attribute.t, *attribute.tensors]
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                found += [sparse.values, sparse.indices]
            waiting += [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]
        yield from (tensor for tensor in found if tensor.data_location == onnx.TensorProto.EXTERNAL)
