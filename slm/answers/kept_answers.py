"""Keeps answers on disk as they come. A repeated or resumed run reads them, and does not generate them again.

The cache has one file for each identity, such as a model with its parameters, libraries and machine. The file has one
JSON line per answer, and one line at the end of each complete run. The key of an answer is a hash over the messages or
the text, the parameters and the repeat. Failed answers are not kept. Opening a file removes the answers that
`reuse` excludes from it. No other answers are removed. To remove all answers, delete the folder `answers` in the cache.
This module scores nothing.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from slm.base import cache
from slm.base.hashing import digest

Reuse = Literal["all", "interrupted", "none"]


class Answers:
    """An open file of answers. `kept` has the lines of the reusable answers, by their key. Other lines are removed.

    Each line has the peak_memory_bytes of the first run that ended after the answer. It is 0 if no run ended.
    """

    def __init__(self, path: Path, reuse: Reuse):
        lines = [] if reuse == "none" else _read(path)
        ends = [place for place, line in enumerate(lines) if "peak_memory_bytes" in line]
        if reuse == "interrupted" and ends:
            lines = lines[ends[-1] + 1 :]
        self.kept: dict[str, dict[str, Any]] = {}
        peak = 0
        for line in reversed(lines):  # the peak comes after its answers, and the last of several answers counts
            peak = line.get("peak_memory_bytes", peak)
            if "asked" in line:
                self.kept.setdefault(line["asked"], line | {"peak_memory_bytes": peak})
        mended = path.with_name(f"{path.name}.{os.getpid()}")
        with open(mended, "w", encoding="utf-8", opener=cache.opener) as file:
            file.writelines(map(_line, lines))
        mended.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, asked: str, answer: Mapping[str, Any], elapsed: float) -> None:
        """Appends an answer. `asked` is its key, and `elapsed` the time since the previous answer in seconds."""
        self._write({"asked": asked, "answer": answer, "elapsed": elapsed})

    def finish(self, peak_memory_bytes: int) -> None:
        """Appends the line that ends a complete run, with the run's peak memory in bytes."""
        self._write({"peak_memory_bytes": peak_memory_bytes})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict) -> None:
        self._file.write(_line(line))
        self._file.flush()  # data in the kernel stays if this process ends


@contextmanager
def opened(identity: object, reuse: Reuse) -> Iterator[Answers]:
    """Opens the file of answers for `identity`. If another process uses this file, the process gets its own file.

    `reuse` says which kept answers are reused: "all", the answers of an "interrupted" run (no run ended after them), or
    "none".

    Raises:
        BadInput: the cache belongs to another user, or others may write into it.
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
            path.unlink()  # no later run looks for a file with this name
    finally:
        lock.release()


def _read(path: Path) -> list[dict]:
    """The lines of a file, up to the first line that is incomplete or has another format."""
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
