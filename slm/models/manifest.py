"""The manifest of a logged model: every file in its folder with its SHA-256, including the wrapper and MLmodel.

The manifest is written when the model is logged. It lies in the model's folder (manifest.json). One hash over the list
of files is kept in the tag TAG of the LoggedModel and the registered version. A person who may only write into the
folder cannot change this tag. A folder is unchanged if it holds exactly the manifest's files, and the manifest has the
recorded hash. A model that others logged has no manifest. Its hash is taken over the files that are found. A manifest
of format 1 lists only the weights.

Not covered: who logged the model. A person who may write to the tracking server can record any hash. A model without a
recorded hash is compared with its own manifest alone.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.base import cache, strict_json

NAME = "manifest.json"
TAG = "manifest.sha256"
FORMAT = 2
ADDED = ("registered_model_meta",)  # by MLflow, to a copy that it fetches: the registered name and version


@dataclass(frozen=True)
class Manifest:
    """The files of a logged model, with their hashes."""

    place: str  # of the weights in the model's folder; "" for a model that others logged
    files: dict[str, cache.FileRecord]  # by path in the model's folder

    @property
    def sha256(self) -> str:
        return cache.manifest_sha256(self.files)

    @property
    def weights(self) -> dict[str, cache.FileRecord]:
        """The files of the checkpoint or the export, by path in the folder of the weights."""
        start = f"{self.place}/"
        return {name.removeprefix(start): record for name, record in self.files.items() if name.startswith(start)}


def write(folder: Path, place: str, placed: dict[str, cache.FileRecord]) -> Manifest:
    """Writes the manifest of a model that is about to be stored.

    `placed` has the files that are already in the store, or that are links in `folder`. The keys are paths in `folder`.
    """
    here = {name: _recorded(folder / name) for name in _names(folder) if name not in placed}
    manifest = Manifest(place, dict(sorted((here | placed).items())))
    files = {name: vars(record) for name, record in manifest.files.items()}
    content = {"format": FORMAT, "folder": place, "files": files}
    (folder / NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return manifest


def check(folder: Path, recorded: Iterable[str] = ()) -> Manifest:
    """Compares each file of a logged model with its manifest, and gives the manifest.

    `recorded` has the hashes of the manifest that the tracking server and the registry keep. It may be empty.

    Raises:
        ValueError: a file is missing, changed or added, or the manifest does not have the recorded hash.
    """
    names = _names(folder)
    if odd := next((name for name in names if not name.isprintable()), None):  # the hash has a line for each name
        raise ValueError(f"{odd!r:.80} is not the name of a file that this project logs")
    written = _read(folder)
    if written is None:
        found = Manifest("", {name: _recorded(folder / name) for name in names})
    elif written["format"] == FORMAT:
        found = Manifest(written["folder"], written["files"])
        _compare(folder, found.files, names)
    else:  # format 1 lists only the weights
        start = f"{written['folder']}/"
        weights = {f"{start}{name}": record for name, record in written["files"].items()}
        _compare(folder, weights, [name for name in names if name.startswith(start)])
        others = {name: _recorded(folder / name) for name in names if name not in weights}
        found = Manifest(written["folder"], dict(sorted((weights | others).items())))
    for sha256 in recorded:
        if sha256 != found.sha256:
            raise ValueError(
                f"its files (manifest {found.sha256[:12]}) differ from the logged files (manifest {sha256[:12]}); "
                "log the model again"
            )
    return found


def stamp(folder: Path) -> list[tuple]:
    """Facts that change when a file in a folder is written, replaced or moved. Equal stamps mean: nothing changed."""
    return [
        (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for path in (folder, *sorted(folder.rglob("*")))
        if "__pycache__" not in path.relative_to(folder).parts
        for status in [path.lstat()]
    ]


def _names(folder: Path) -> list[str]:
    """The paths of the files that a manifest covers. Bytecode (never run) and MLflow's added files are not covered."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(
        path.as_posix() for path in paths if "__pycache__" not in path.parts and path.as_posix() not in (NAME, *ADDED)
    )


def _recorded(path: Path) -> cache.FileRecord:
    if not path.is_file():
        raise ValueError(f"{path.name} is not a readable file")
    return cache.FileRecord(cache.file_sha256(path), path.stat().st_size)


def _read(folder: Path) -> dict | None:
    """The manifest in the folder; None if the folder has no manifest."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content: Any = strict_json.parse(path.read_text(encoding="utf-8"))
        files = {name: cache.FileRecord(**entry) for name, entry in content["files"].items()}
        return {"format": content.get("format", 1), "folder": str(content["folder"]), "files": files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} can't be read ({type(error).__name__}: {error}); log the model again") from None


def _compare(folder: Path, expected: dict[str, cache.FileRecord], names: list[str]) -> None:
    for name in _unlisted(names, expected):
        raise ValueError(f"{name} was added since the model was logged")
    for name, record in expected.items():
        path = folder / name
        same = name in names and path.is_file() and not path.is_symlink() and path.stat().st_size == record.size
        if not same or cache.file_sha256(path) != record.sha256:
            raise ValueError(f"{name} is missing or was changed since the model was logged")


def _unlisted(names: list[str], expected: dict) -> Iterator[str]:
    return (name for name in names if name not in expected)
