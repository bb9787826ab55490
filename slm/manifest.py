"""What a logged model's folder must hold: every file by its SHA-256, wrapper and MLmodel included.

The manifest is written when the model is logged, and lies in the model's folder (manifest.json). Its own hash is kept
in the tag TAG of the LoggedModel and of the registered version, which whoever may write into the folder can't change.
So a folder is the one that was logged if its files are those of the manifest, no file more, and the manifest is the
recorded one. Models that were logged by others, or before there was such a manifest, have the hash of all their files.

Not covered: who logged the model. Whoever may write to the tracking server may record what they like.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slm import cache, strict_json

NAME = "manifest.json"
TAG = "manifest.sha256"
FORMAT = 2
ADDED = ("registered_model_meta",)  # by MLflow, to a copy that it fetches: the registered name and version


@dataclass(frozen=True)
class Manifest:
    """A logged model's files, as they were found to be."""

    place: str  # of the weights in the model's folder; "" where it was logged by others
    files: dict[str, cache.FileRecord]  # by path in the model's folder

    @property
    def sha256(self) -> str:
        return cache.manifest_sha256(self.files)

    @property
    def weights(self) -> dict[str, cache.FileRecord]:
        """The files of the checkpoint or the export, by path in its folder."""
        start = f"{self.place}/"
        return {name.removeprefix(start): record for name, record in self.files.items() if name.startswith(start)}


def write(folder: Path, place: str, placed: dict[str, cache.FileRecord]) -> Manifest:
    """Writes the manifest of a model that is about to be stored.

    `placed` are the files that the store has already, or that are links here, by path in the model's folder.
    """
    here = {name: _recorded(folder / name) for name in _names(folder) if name not in placed}
    manifest = Manifest(place, dict(sorted((here | placed).items())))
    files = {name: vars(record) for name, record in manifest.files.items()}
    content = {"format": FORMAT, "folder": place, "files": files}
    (folder / NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return manifest


def check(folder: Path, recorded: Iterable[str] = ()) -> Manifest:
    """The files of a logged model's folder, after each was compared with the manifest logged with it.

    `recorded` are the manifest's own hashes, as the tracking server and the registry keep them.

    Raises:
        ValueError: a file is missing, was changed or was added, or the manifest isn't the recorded one.
    """
    names = _names(folder)
    written = _read(folder)
    if written is None:
        found = Manifest("", {name: _recorded(folder / name) for name in names})
    elif written["format"] == FORMAT:
        found = Manifest(written["folder"], written["files"])
        _compare(folder, found.files, names)
    else:  # its weights alone were written down
        start = f"{written['folder']}/"
        weights = {f"{start}{name}": record for name, record in written["files"].items()}
        _compare(folder, weights, [name for name in names if name.startswith(start)])
        others = {name: _recorded(folder / name) for name in names if name not in weights}
        found = Manifest(written["folder"], dict(sorted((weights | others).items())))
    for sha256 in recorded:
        if sha256 != found.sha256:
            raise ValueError(
                f"its files (manifest {found.sha256[:12]}) are not those that were logged (manifest {sha256[:12]}); "
                "log it again"
            )
    return found


def stamp(folder: Path) -> list[tuple]:
    """What changes when anything in a folder is written, replaced or moved: for a check that nothing was meanwhile."""
    return [
        (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for path in (folder, *sorted(folder.rglob("*")))
        if "__pycache__" not in path.parts
        for status in [path.lstat()]
    ]


def _names(folder: Path) -> list[str]:
    """The files that count, by path in the folder: no bytecode, which is never run, and not what MLflow adds."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(
        path.as_posix() for path in paths if "__pycache__" not in path.parts and path.as_posix() not in (NAME, *ADDED)
    )


def _recorded(path: Path) -> cache.FileRecord:
    if not path.is_file():
        raise ValueError(f"{path.name} is no file that can be read")
    return cache.FileRecord(cache.file_sha256(path), path.stat().st_size)


def _read(folder: Path) -> dict | None:
    """The manifest as it was written; None where there is none."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = strict_json.parse(path.read_text(encoding="utf-8"))
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
