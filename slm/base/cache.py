"""Keeps folders that are expensive to make (converted weights, exports) outside the repository. Each is made once.

A folder is built under a temporary name and then renamed. If its process is killed, the next build of any folder
removes what is left. A manifest beside the folder lists its files with their SHA-256. If a file is missing or was
changed, the folder is built again with new files. No file is written in place, so a store's hard links keep their
content. Two processes that want the same folder build it once. This module never removes an intact folder:
docs/reproducing-a-run.md says how to empty the cache.

A person who may write into the cache could change a file and its manifest together. Answers may be confidential. So
the cache belongs to one user: its root has mode 0700, and its own files have 0600. Model folders have 0755 and their
files 0644, because a store's hard links have the same mode. The cache is refused if its root belongs to another user,
or if others may write into it. Not covered: the user root.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from slm.base.errors import BadInput

WEIGHTS = (".safetensors", ".data")
FICLONE = 0x40049409  # linux/fs.h: the ioctl that makes a file share another one's blocks
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    size: int  # bytes


def root() -> Path:
    """$PHI3_MLFLOW_CACHE, else phi3-mlflow in the user's cache folder."""
    given = os.environ.get("PHI3_MLFLOW_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given).expanduser() if given else base / "phi3-mlflow").absolute()


def check() -> None:
    """Refuses a cache that another user may have filled. Closes this user's cache to others, if the cache exists.

    Raises:
        BadInput: the cache belongs to another user, or others may write into it.
    """
    with suppress(FileNotFoundError):
        _shut(root().resolve())


def private(*names: str) -> Path:
    """The cache's root, or the folder below it with these names. A missing folder is made. Only this user may open it.

    Raises:
        BadInput: a folder belongs to another user, or others may write into it.
    """
    folder = root().resolve()
    for name in ("", *names):
        folder = folder / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _shut(folder)
    return folder


def _shut(folder: Path) -> None:
    told, user = folder.stat(), os.geteuid()
    if told.st_uid != user:
        remedy = "set PHI3_MLFLOW_CACHE to a folder of your own"
        raise BadInput(f"cache: {folder} belongs to user {told.st_uid}, and this is user {user}; {remedy}")
    if told.st_mode & 0o022:
        remedy = "delete it, or, if nobody else wrote into it, run chmod 700 on it"
        raise BadInput(f"cache: others may write into {folder} (mode {stat.S_IMODE(told.st_mode):04o}); {remedy}")
    if told.st_mode & 0o077:
        with suppress(OSError):  # a read-only disk
            folder.chmod(0o700)


def opener(path: str, flags: int) -> int:
    """For `open`: makes a file that only this user may read. An existing file gets the same mode."""
    file = os.open(path, flags, 0o600)
    os.fchmod(file, 0o600)
    return file


def lock(path: Path, timeout: float = -1) -> FileLock:
    """A lock file in the cache, not taken yet. After `timeout` seconds, taking it raises filelock.Timeout."""
    return FileLock(path, timeout, mode=0o600)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(folder: Path) -> dict[str, FileRecord]:
    """SHA-256 and size of every file in a folder, by path in the folder, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileRecord(file_sha256(path), path.stat().st_size) for path in files}


def manifest_sha256(manifest: dict[str, FileRecord]) -> str:
    """One hash for a whole folder, over the paths and the SHA-256 of its files."""
    lines = "".join(f"{record.sha256}  {path}\n" for path, record in sorted(manifest.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def folder(name: str, recipe: dict[str, str], build: Callable[[Path], None]) -> tuple[Path, dict[str, FileRecord]]:
    """The folder that `build` fills, and its manifest. A missing or damaged folder is built again.

    `recipe` names everything that the content depends on. `build` gets an empty folder.
    """
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    target = private() / f"{name}-{key}"
    record = _record(target)
    with lock(target.with_name(f"{target.name}.lock")):
        manifest = _intact(target, record)
        if manifest is None:
            building = target.with_name(f"{target.name}.building")
            for leftover in (building, target):
                shutil.rmtree(leftover, ignore_errors=True)
            _remove_leftovers(building.parent)
            building.mkdir()
            build(building)
            for path in building.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600, which a store would keep
            manifest = manifest_of(building)
            content = {"recipe": recipe, "files": {path: vars(entry) for path, entry in manifest.items()}}
            with open(record, "w", encoding="utf-8", opener=opener) as file:
                json.dump(content, file, indent=1)
            building.rename(target)
    return target, manifest


def _remove_leftovers(root: Path) -> None:
    """Removes the folders of builds whose process was killed. A build that goes on holds its lock."""
    for leftover in root.glob("*.building"):
        with suppress(Timeout), lock(leftover.with_suffix(".lock"), 0):
            shutil.rmtree(leftover, ignore_errors=True)


def place(source: Path, target: Path) -> None:
    """Puts a file at the new path `target`, as a clone, as a hard link or as a copy.

    A clone (btrfs, XFS) shares the file's blocks until a program writes into one of the two files. On other file
    systems, weights of this cache become hard links. Weights of the hub's cache become hard links too, because that
    cache names them by their SHA-256. Any other file is copied. Weights are also copied between two file systems, and
    on a file system without hard links.
    """
    source = source.resolve()
    if _cloned(source, target):
        return
    if _is_ours(source) or (source.parent.name == "blobs" and SHA256.fullmatch(source.name)):
        with suppress(OSError):
            os.link(source, target)
            return
    with source.open("rb") as given, target.open("xb") as written:
        left = os.fstat(given.fileno()).st_size
        with suppress(OSError, AttributeError):  # Linux; as cp does
            while count := os.copy_file_range(given.fileno(), written.fileno(), left):
                left -= count
        shutil.copyfileobj(given, written)


def _cloned(source: Path, target: Path) -> bool:
    """Makes `target` a clone of `source`. False: the file system can't clone, and there is no `target`.

    Raises:
        FileExistsError: `target` existed before.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with source.open("rb") as given, target.open("xb") as written:
            fcntl.ioctl(written.fileno(), FICLONE, given.fileno())
    except FileExistsError:
        raise
    except OSError:  # two file systems, or a file system without clones
        target.unlink(missing_ok=True)
        return False
    return True


def _is_ours(source: Path) -> bool:
    """Whether a file has weights and lies in a folder that `folder` made. Other files there are a user's."""
    if source.suffix not in WEIGHTS or not source.is_relative_to(root().resolve()):
        return False
    top = root().resolve() / source.relative_to(root().resolve()).parts[0]
    return top != source and _record(top).exists()


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")  # a model's name may have a dot


def _intact(target: Path, record: Path) -> dict[str, FileRecord] | None:
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
        expected = {path: FileRecord(**entry) for path, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return expected if target.is_dir() and manifest_of(target) == expected else None
