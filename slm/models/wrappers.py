"""Chooses the code that runs a logged model of this project, and opens the model with that code.

A logged model's folder holds a copy of the wrapper: chat_model.py, and its parts in chat_parts. In models of 0.1.0, the
wrapper is one file. MLflow's own loaders run that copy. A person who may register a model could put any code into the
copy. So this project runs the wrapper of its own repository if the model was logged by the same version. The logged
copy runs if its bytes are those of a released version. Any other copy runs only with `trust_code`.
slm/answers/loading.py opens models of others, also only with `trust_code`.

The files that are loaded are the files that were checked. Every file is compared with the manifest. The wrapper runs
from the bytes that were hashed. If a file changes before the model is in memory, the model is opened again. After
TRIES attempts, the model is refused.
"""

import hashlib
import importlib
import importlib.abc
import importlib.util
import linecache
import pkgutil
import sys
import tempfile
import time
import types
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from slm.base import cache
from slm.base.errors import BadInput, exhausted
from slm.models import chat_model, chat_parts, checkpoints, genai_config, weights
from slm.models import manifest as manifests

FILE = "chat_model.py"
PARTS = "chat_parts"  # the folder beside it
RELEASED = {  # SHA-256 of the wrapper, by version (`code_sha256`)
    "0.1.0": "86a6a415d33d6e5f49a2826a3899aef74000e7b7c86bc5ab97994ebf0ba5f44a",
}
PLACES = ("artifacts/onnx", "model")  # of the weights in a model's folder
TRIES = 8  # to load a model: another program's link to the same files also counts as a change
REMEDY = "set trust_code=true if you trust the code's author"


class Row(Protocol):
    """One text that a wrapper generates: chat_model.Row, or the Row of the copy that was logged."""

    prompt: list[int]
    output: list[int]
    room: int
    finish_reason: str


class Wrapper(Protocol):
    """chat_model.SmallLanguageModel, or that of the copy that was logged.

    Copies of 0.1.0 lack `cache_share`, `token_scores`, `joins`, `joined`, `token_ids`, `in_vocabulary`, `reading` and
    `context_length`.
    """

    name: str
    schema: str
    batch_size: int
    context_length: int
    joins: bool
    template: str
    special_tokens: dict[str, str]
    _runtime: Any

    def render(self, messages: list[dict[str, str]]) -> str: ...

    def prepare(
        self,
        row: dict[str, Any],
        params: dict[str, Any] | None = None,
        index: int = 0,
        prompt_ids: Sequence[int] | None = None,
    ) -> list[Any]: ...

    def token_ids(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def in_vocabulary(self, ids: Sequence[int]) -> list[int]: ...

    def reading(self, ids: Sequence[int], see: chat_model.SeeDistributions) -> Iterator[None]: ...

    def answers(self, rows: list[dict[str, Any]], params: dict[str, Any], batch_size: int) -> Iterator[Any]: ...

    def stream(self, batch: list[Any]) -> Generator[list[tuple[Any, str]]]: ...

    def joined(self, arriving: Any) -> Generator[list[tuple[Any, str]]]: ...

    def fits(self, batch: list[Any], row: Any, batch_size: int = 0) -> bool: ...

    def cache_share(self, batch: list[Any]) -> float: ...

    def token_scores(
        self, rows: Iterable[tuple[Sequence[int], Sequence[int]]], see: chat_model.SeeDistributions | None
    ) -> Iterator[tuple[int, chat_model.TokenScores]]: ...

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]: ...

    def vocabulary(self) -> dict[str, int]: ...

    def text_of(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Opened:
    """A model of this project in memory."""

    wrapper: Wrapper
    description: Any  # MLflow's Model
    manifest: manifests.Manifest
    code_sha256: str  # of the wrapper that runs
    settings: dict  # with which the model was opened
    providers: tuple[str, ...] | None  # of an export; None for a checkpoint of transformers
    load_seconds: float  # without the checks before the load
    unchanged: Callable[[], None]  # raises BadInput if a file has changed since the checks


def end(row: Row, reason: str) -> None:
    """Ends a row between two steps. The Row of 0.1.0 has no method for that."""
    if hasattr(row, "end"):
        row.end(reason)
    else:
        row.finish_reason = row.finish_reason or reason


def is_ours(description) -> bool:
    """Whether a model says that this project logged it. `description` is MLflow's Model or ModelInfo."""
    return isinstance(description.metadata, dict) and bool(description.metadata.get("model.sha256"))


def check(uri: str, description, trust_code: bool, code_of) -> None:
    """Refuses a model that would run code of others. Only the description is read; no model is loaded.

    `code_of` returns the files of the logged wrapper. It is called only if the wrapper's version is not ours.

    Raises:
        BadInput: the model would run code of others.
    """
    if trust_code:
        return
    if not is_ours(description):
        raise BadInput(f"{uri} runs code that was logged with the model; {REMEDY}")
    if _version(description) != chat_model.VERSION:
        _check_code(uri, code_of())


def opened(
    uri: str,
    folder: Path,
    recorded: Iterable[str],
    trust_code: bool,
    override: dict,
    before_loading: Callable[[], None] = lambda: None,
) -> Opened:
    """A model of this project from its folder, checked and loaded.

    `recorded` has the hashes of the manifest that the tracking server keeps. `override` replaces settings that the
    model has; an empty value and auto replace nothing. `before_loading` is called between the checks and the load.

    Raises:
        BadInput: a file was changed, a setting is out of range, or the code is not allowed to run.
        Unavailable: the hub that holds the weights can't be reached.
    """
    for _ in range(TRIES):
        before = manifests.stamp(folder)
        found = _opened(uri, folder, tuple(recorded), trust_code, override, before_loading)
        if manifests.stamp(folder) == before:
            return replace(found, unchanged=_watch(uri, folder, before, found.manifest.sha256))
    raise BadInput(f"{uri}: its files changed while it was loaded; stop what writes there, and try again")


def _opened(
    uri: str, folder: Path, recorded: tuple, trust_code: bool, override: dict, before_loading: Callable[[], None]
) -> Opened:
    from mlflow.models import Model
    from mlflow.pyfunc.model import PythonModelContext

    description = Model.load(str(folder))
    if not is_ours(description):
        raise BadInput(f"{uri} was not logged by this project")
    try:
        found = manifests.check(folder, recorded)
    except ValueError as error:
        raise BadInput(f"{uri}: {error}") from None
    metadata, known = description.metadata or {}, (description.flavors.get("python_function") or {}).get("config")
    if not isinstance(known, dict) or metadata.get("schema") not in ("chat", "prompt") or not description.signature:
        raise BadInput(f"{uri}: its MLmodel lacks entries that this project writes; log the model again")
    chosen = {name: value for name, value in override.items() if value and value != "auto"}
    if found.place == PLACES[0] and "runtime" in chosen.keys() - known.keys():
        raise BadInput(f"{uri} was logged before a runtime could be chosen; log it again, or leave runtime=auto")
    settings = known | {name: value for name, value in chosen.items() if name in known}
    _check_settings(uri, settings)
    place, records = _weights(uri, folder, found, settings)
    if cache.manifest_sha256(records) != metadata["model.sha256"]:
        raise BadInput(f"{uri}: its weights differ from model.sha256 in its MLmodel; log the model again")
    weights.check_files(place, records)
    onnx = found.place == PLACES[0]
    content = genai_config.read(place) if onnx else {}
    providers = genai_config.providers(content) if onnx else None
    module, code_sha256 = _module(uri, folder, description, trust_code)
    with ExitStack() as stack:
        read = stack.enter_context(_private(place, content)) if onnx else str(place)
        before_loading()
        start = time.perf_counter()
        wrapper = module.SmallLanguageModel()
        try:
            wrapper.load_context(PythonModelContext({"onnx" if onnx else "checkpoint": read}, settings))
        except (ValueError, KeyError, TypeError, OSError) as error:  # files that don't fit each other
            if exhausted(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadInput(f"{uri} can't be loaded: {type(error).__name__}: {reason:.300}") from error
        except BaseException as error:
            if type(error).__module__ != "pyo3_runtime":  # a panic in tokenizers' Rust code
                raise
            raise BadInput(f"{uri} can't be loaded: its tokenizer.json is damaged ({str(error)!r:.200})") from error
        seconds = time.perf_counter() - start
        weakref.finalize(wrapper, stack.pop_all().close)
    told = (metadata.get("chat_template") or "", metadata.get("special_tokens") or {})
    if (wrapper.template, wrapper.special_tokens) != told:
        raise BadInput(f"{uri}: its chat template or tokens differ from those in its MLmodel; log the model again")
    return Opened(wrapper, description, found, code_sha256, settings, providers, seconds, lambda: None)


def _watch(uri: str, folder: Path, before: list[tuple], sha256: str) -> Callable[[], None]:
    """A check that the files are unchanged. It is cheap, so each answer can call it.

    Weights are read from the disk while they are used. So a file that is written now can change an answer.
    """
    seen = before

    def unchanged() -> None:
        nonlocal seen
        try:
            now = manifests.stamp(folder)
            if now != seen:  # another link to the same file counts as a change
                manifests.check(folder, [sha256])
                seen = now
        except (ValueError, OSError) as error:
            raise BadInput(f"{uri}: its files were changed while it answered ({error})") from None

    return unchanged


def _weights(uri: str, folder: Path, found: manifests.Manifest, settings: dict) -> tuple[Path, dict]:
    """The folder of the weights, and its files. If a model was logged without weights, the hub has them."""
    if found.place not in PLACES:
        raise BadInput(f"{uri} has no weights in {' or '.join(PLACES)}; log the model again")
    if found.weights:
        place = folder / found.place
        if (place / genai_config.NAME).exists() != (found.place == PLACES[0]):
            raise BadInput(f"{uri}: the files in {found.place} don't fit the model's kind; log the model again")
        return place, found.weights
    source = checkpoints.find(str(settings.get("hub_id")), str(settings.get("revision")))
    if source.kind != "hub":
        raise BadInput(f"{uri} refers to {settings.get('hub_id')!r:.80}, which is not a hub id; log the model again")
    checkpoint = source.fetch()
    return checkpoint.folder, checkpoint.manifest


def _private(place: Path, content: dict) -> tempfile.TemporaryDirectory:
    """A temporary folder with links to an export's files, and with the rebuilt settings.

    onnxruntime-genai reads its settings from a file, and runs what they name. Nobody else may write into this folder.
    """
    private = tempfile.TemporaryDirectory(prefix="phi3-mlflow-")
    (Path(private.name) / genai_config.NAME).write_bytes(genai_config.rebuilt(content))
    for path in place.iterdir():
        if path.name != genai_config.NAME:
            (Path(private.name) / path.name).symlink_to(path.resolve())
    return private


def _check_settings(uri: str, settings: dict) -> None:
    """Refuses settings that this project never logs, and values out of range."""
    allowed = {
        "batch_size": lambda value: isinstance(value, int) and 0 <= value <= 4096,
        "threads": lambda value: isinstance(value, int) and 0 <= value <= 1024,
        "execution_provider": lambda value: value in ("", *genai_config.PROVIDERS),
        "runtime": lambda value: value in ("auto", *chat_model.ONNX_RUNTIMES),
        "dtype": lambda value: value in ("auto", *chat_model.DTYPES),
        "device": lambda value: isinstance(value, str) and value.partition(":")[0] in ("auto", "cpu", "cuda"),
        "schema": lambda value: value in ("chat", "prompt"),
        "model_name": lambda value: isinstance(value, str) and len(value) <= 500,
        "hub_id": lambda value: isinstance(value, str) and checkpoints.HUB_ID.fullmatch(value),
        "revision": lambda value: isinstance(value, str) and checkpoints.COMMIT.fullmatch(value),
    }
    for name, value in settings.items():
        if name not in allowed or not allowed[name](value):
            problem = f"the setting {name!r:.60} is unknown, or its value {value!r:.60} is not allowed"
            raise BadInput(f"{uri}: {problem}; log the model again")


# ---------------------------------------------------------------------------------------------------------------------
# The code


def _version(description) -> str:
    wrapper = description.metadata.get("wrapper")
    return str(wrapper.get("version")) if isinstance(wrapper, dict) else ""


def _module(uri: str, folder: Path, description, trust_code: bool) -> tuple[types.ModuleType, str]:
    """The module that holds the wrapper, and the SHA-256 of its bytes."""
    if _version(description) == chat_model.VERSION:
        return chat_model, own_sha256()
    code = logged_code(uri, folder)
    if not trust_code:
        _check_code(uri, code)
    sha256 = code_sha256(code)
    checked = _CheckedCode(f"chat_model_{sha256[:16]}", folder, code)
    sys.meta_path.insert(0, checked)
    try:
        module = checked.run()
    finally:
        sys.meta_path.remove(checked)
    for name in checked.names:  # the main file, and the part that defines or imports it
        if hasattr(sys.modules.get(name), "render"):
            sys.modules[name].__dict__["render"] = _bounded_render(module)
    return module, sha256


class _CheckedCode(importlib.abc.InspectLoader, importlib.abc.MetaPathFinder):
    """Imports a logged wrapper and its parts from the checked bytes, under names of their own.

    The files may change at any time. So they are not read again.
    """

    def __init__(self, package: str, folder: Path, code: dict[str, bytes]):
        self.package, self.names = package, {}
        for file, content in code.items():
            parts = Path(file).with_suffix("").parts
            inner = [part for part in parts if part != "__init__"][file == FILE :]
            self.names[".".join([package, *inner])] = (str(folder / file), content)
        self._packages = {package, *(name.rpartition(".")[0] for name in self.names if "." in name)}

    def run(self) -> types.ModuleType:
        for name in self.names:
            sys.modules.pop(name, None)  # another model with the same wrapper
        return importlib.import_module(self.package)

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.names:
            return None
        file, content = self.names[fullname]
        # the wrapper reads its own source from here: the checked bytes, even if the file has changed
        linecache.cache[file] = (len(content), None, content.decode().splitlines(True), file)
        spec = importlib.util.spec_from_loader(fullname, self, origin=file, is_package=fullname in self._packages)
        assert spec is not None
        spec.has_location = True
        return spec

    def get_source(self, fullname: str) -> str:
        return self.names[fullname][1].decode()

    def get_code(self, fullname: str):
        file, content = self.names[fullname]
        return compile(content, file, "exec")


def _bounded_render(module: types.ModuleType) -> Callable[..., str]:
    """A `render` with bounds, for a wrapper whose own `render` may lack bounds."""

    def render(template: str, special_tokens: dict[str, str], messages: list[dict]) -> str:
        try:
            return chat_model.render(template, special_tokens, messages)
        except chat_model.Refused as refusal:
            raise module.Refused(str(refusal)) from None

    return render


def _check_code(uri: str, code: dict[str, bytes]) -> None:
    if code_sha256(code) not in RELEASED.values():
        raise BadInput(
            f"{uri} has a wrapper that is not from a released version of this project; log it again, or {REMEDY}"
        )


def logged_code(uri: str, folder: Path) -> dict[str, bytes]:
    """The files of the wrapper in a model's folder, by path.

    Raises:
        BadInput: a file can't be read.
    """
    names = [FILE, *sorted(f"{PARTS}/{path.name}" for path in (folder / PARTS).glob("*.py"))]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise BadInput(f"{uri}: {Path(error.filename).name} can't be read: {error.strerror}") from None


def code_sha256(code: dict[str, bytes]) -> str:
    """One hash over the files of a wrapper. A wrapper of one file has the hash of this file."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in code.items()}
    if list(hashes) == [FILE]:
        return hashes[FILE]
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def own_sha256() -> str:
    """The SHA-256 of this repository's wrapper."""
    return code_sha256(own_code())


def own_code() -> dict[str, bytes]:
    """The files of this repository's wrapper, by their paths in a logged model. The package may be a zip file."""
    loader: Any = chat_model.__loader__
    own = Path(str(chat_model.__file__))
    names = [FILE, f"{PARTS}/__init__.py"]
    names += sorted(f"{PARTS}/{part.name}.py" for part in pkgutil.iter_modules(chat_parts.__path__))
    return {name: loader.get_data(str(own.with_name(FILE).parent / name)) for name in names}
