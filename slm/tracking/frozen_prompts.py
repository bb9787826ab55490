"""Holds the rows of a prompt set that goes on changing (slm/tracking/live_prompts.py) as they were when a run began.

A run logs them as `evaluation/prompts.jsonl`, and the command that repeats the run reads that artifact. A start that
didn't end leaves the rows in the cache, beside its answers, and the next start with the same parameters takes them.
Each process reads a link of its own: another start with the same parameters may end, and remove the rows.
"""

import datetime
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from slm.base import cache, console
from slm.base.hashing import digest
from slm.base.parameters import Parameters
from slm.tracking import downloads, live_prompts, mlflow_client

ARTIFACT = "evaluation/prompts.jsonl"
FRESH = 20 * 3600  # seconds for which the rows of a start that didn't end are taken; a daily start reads new ones


def file(args: Parameters, limit: int = downloads.FILE_BYTES) -> Path | None:
    """The file with the rows of a live prompt set. None for any other set.

    Raises:
        BadInput: see `live_prompts.written`.
        Unavailable: the tracking server fails.
    """
    if not live_prompts.is_live(args.prompts):
        return None
    _remove_old()
    path = _shared(args)
    if args.resume and not args.check and path.exists():
        began = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
        told = f"{began:%Y-%m-%d %H:%M} UTC, which did not end; resume=false reads new ones"
        with suppress(FileNotFoundError):  # that start has ended meanwhile
            linked = _linked(path, args)
            console.out.print(f"{path.stem}: the rows of the start at {told}", markup=False)
            return linked
    with downloads.file(args.prompts, limit) as found:
        made = path.with_suffix(f".{os.getpid()}")
        with found.open("rb") as rows, open(made, "wb", opener=cache.opener) as copy:
            shutil.copyfileobj(rows, copy)
        linked = _linked(made, args)
        made.replace(path)
    return linked


def log(args: Parameters) -> None:
    """Logs the rows into the active run."""
    if live_prompts.is_live(args.prompts):
        mlflow_client.quiet_mlflow().log_text(_own(args).read_text(encoding="utf-8"), ARTIFACT)


def forget(args: Parameters) -> None:
    """Removes the rows from the cache, after the end of the run."""
    if live_prompts.is_live(args.prompts):
        shared, own = _shared(args), _own(args)
        with suppress(OSError):
            if shared.samefile(own):
                shared.unlink()
        shutil.rmtree(own.parent, ignore_errors=True)
        with suppress(OSError):  # another process still has a link there
            shared.parent.rmdir()


def address(args: Parameters, run_id: str) -> str:
    """The address of the rows as the run used them. For a set that doesn't change, the address that was given."""
    return f"runs:/{run_id}/{ARTIFACT}" if live_prompts.is_live(args.prompts) else args.prompts


def _linked(rows: Path, args: Parameters) -> Path:
    own = _own(args)
    own.parent.mkdir(mode=0o700, exist_ok=True)
    own.unlink(missing_ok=True)
    own.hardlink_to(rows)
    return own


def _own(args: Parameters) -> Path:
    """The link of this process. It has the name of the file, which is that of the prompt set."""
    shared = _shared(args)
    return shared.parent / f"of {os.getpid()}" / shared.name


def _shared(args: Parameters) -> Path:
    key = digest([mlflow_client.address()[0], vars(args)])[:16]
    return cache.private("prompts", key) / f"{live_prompts.name_of(args.prompts)}.jsonl"


def _remove_old() -> None:
    for folder in cache.private("prompts").iterdir():
        with suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > FRESH:
                shutil.rmtree(folder, ignore_errors=True)
