"""Answers kept on disk as they come, so that neither an interrupted run nor an unchanged one generates them again.

One file per model and way of generating, in the cache: a JSON line per answer, under a hash of what was asked (the
messages or the rendered text, the parameters, the repeat), and a line where a run came to its end. Answers that failed
are not kept. Nothing is scored here, and nothing is evicted: deleting the cache's folder `answers` empties it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import Timeout

from slm.base import cache
from slm.base.hashing import digest

Reuse = Literal["all", "interrupted", "none"]


class Answers:
    """An open file of answers. `kept` holds those that may be used again, by what was asked.

    Each has the peak_memory_bytes that the run which answered has noted, 0 where it didn't end.
    """

    def __init__(self, path: Path, reuse: Reuse):
        lines = [] if reuse == "none" else _read(path)
        ends = [place for place, line in enumerate(lines) if "peak_memory_bytes" in line]
        if reuse == "interrupted" and ends:
            lines = lines[ends[-1] + 1 :]
        self.kept, peak = {}, 0
        for line in reversed(lines):  # a run's peak stands below its answers, and the last answer counts
            peak = line.get("peak_memory_bytes", peak)
            if "asked" in line:
                self.kept.setdefault(line["asked"], line | {"peak_memory_bytes": peak})
        mended = path.with_name(f"{path.name}.{os.getpid()}")
        with open(mended, "w", encoding="utf-8", opener=cache.opener) as file:
            file.writelines(map(_line, lines))
        mended.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, asked: str, answer: dict, elapsed: float) -> None:
        """Appends an answer, and the seconds that passed since the one before it."""
        self._write({"asked": asked, "answer": answer, "elapsed": elapsed})

    def finish(self, peak_memory_bytes: int) -> None:
        """Marks that everything a run wanted has been answered, with that many bytes at most."""
        self._write({"peak_memory_bytes": peak_memory_bytes})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict) -> None:
        self._file.write(_line(line))
        self._file.flush()  # what the kernel has outlives this process


@contextmanager
def opened(identity: object, reuse: Reuse) -> Iterator[Answers]:
    """The answers of what `identity` tells apart; a file of this process alone while another one holds the shared one.

    `reuse`: all that are there; those that were left by a run which did not come to its end; or none.
    """
    folder = cache.private("answers")
    path = folder / f"{digest(identity)}.jsonl"
    lock = cache.lock(path.with_suffix(".lock"))
    shared = True
    try:
        lock.acquire(timeout=0)
    except Timeout:
        shared, path = False, folder / f"{path.stem}-{os.getpid()}.jsonl"
    try:
        answers = Answers(path, reuse)
        try:
            yield answers
        finally:
            answers.close()
        if not shared:
            path.unlink()  # its run is done, and nobody will look for it under this name
    finally:
        lock.release()


def _read(path: Path) -> list[dict]:
    """The lines of a file, up to one that was cut off or is none of ours."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
                if "peak_memory_bytes" not in line:
                    line["asked"], line["answer"]["text"], line["elapsed"]
            except (ValueError, TypeError, KeyError):
                break
            lines.append(line)
    return lines


def _line(content: dict) -> str:
    return json.dumps(content) + "\n"
