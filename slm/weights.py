"""A model's folder from outside, checked before anything opens it: damage that shows without loading, and ways out.

What is refused: weight files that are cut off or whose parts are missing, links and paths that leave the folder, and
native code that a configuration names. A flipped bit in a weight doesn't show here, unless the hub's cache says what
the file's SHA-256 must be; once a model is logged, its manifest does (slm/model_logging.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path

from slm import cache
from slm.errors import BadInput


def check_links(folder: Path) -> None:
    """Refuses links that leave the folder; those of the hub's cache, into its own blobs, are none of these.

    Raises:
        BadInput
    """
    allowed = [folder.resolve(), *_blobs(folder)]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise BadInput(
                f"model: {path} is a link to {path.resolve()}, outside the folder; put the file itself there"
            )


def check_names(folder: Path, config: object) -> None:
    """Refuses a genai_config.json that names files outside its folder, or a library to be loaded as code.

    Raises:
        BadInput
    """
    for key, value in _entries(config):
        if key == "custom_ops_library":
            raise BadInput(
                f"model: {folder}/genai_config.json asks to load the library {value!r:.80}, which is refused"
            )
        if key == "filename" and not _inside(folder, value):
            raise BadInput(
                f"model: {folder}/genai_config.json names {value!r:.80}, which is no file's name in its folder"
            )


def check_files(folder: Path, manifest: dict[str, cache.FileRecord]) -> None:
    """Refuses weight files that are cut off, lack their parts, or aren't what the hub's cache says they are.

    Raises:
        BadInput
    """
    for name, record in manifest.items():
        path = folder / name
        blob = path.resolve().name
        if path.is_symlink() and cache.SHA256.fullmatch(blob) and blob != record.sha256:
            raise BadInput(f"model: {path} is damaged (SHA-256 {record.sha256[:12]}…): delete {path.resolve()}")
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.name.endswith(".safetensors.index.json"):
            _check_index(path)
        elif path.suffix == ".onnx":
            _check_onnx(path)


def _blobs(folder: Path) -> list[Path]:
    """Where the hub's cache keeps the files of a snapshot's folder."""
    places = [parent for parent in folder.absolute().parents if parent.name == "snapshots"]
    return [(place.parent / "blobs").resolve() for place in places[:1]]


def _inside(folder: Path, name: object) -> bool:
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name


def _entries(value: object) -> Iterator[tuple[object, object]]:
    """Every key of nested mappings, with its value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):  # reads the header, and holds it against the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise BadInput(f"model: {path} is damaged ({error}); fetch it again") from None


def _check_index(path: Path) -> None:
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"model: {path} is no index of weights ({type(error).__name__}: {error}); save it again"
        ) from None
    for name in names:
        if not _inside(path.parent, name) or not (path.parent / name).is_file():
            raise BadInput(f"model: {path} names {name!r:.80}, which is not in its folder; fetch the model again")


def _check_onnx(path: Path) -> None:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError:
        raise BadInput(f"model: {path} is damaged (no ONNX graph can be read from it); fetch it again") from None
    for tensor in _tensors(graph):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        if not _inside(path.parent, name):
            raise BadInput(f"model: {path} takes weights from {name!r:.80}, outside its folder, which is refused")
        data = path.parent / name
        end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
        if not data.is_file() or data.stat().st_size < end:
            raise BadInput(f"model: {data} is missing or cut off ({end:,} bytes are needed); fetch it again")


def _tensors(graph) -> Iterator:
    """The tensors of a graph, and of those in its nodes, whose data is in another file."""
    import onnx

    waiting = [graph]
    while waiting:
        one = waiting.pop()
        found = list(one.initializer)
        for node in one.node:
            for attribute in node.attribute:
                found += [attribute.t, *attribute.tensors]
                waiting += [inner for inner in (attribute.g, *attribute.graphs) if inner.node]
        yield from (tensor for tensor in found if tensor.data_location == onnx.TensorProto.EXTERNAL)
