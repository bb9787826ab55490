"""Keeps answers on disk as they come. A repeated or resumed run reads them, and does not generate them again.

The cache has one file for each identity, such as a model with its parameters, libraries and machine. The file has one
JSON line per answer, and one line at the end of each complete run. Each line names its run. The key of an answer is a
hash over the messages or the text, the parameters and the repeat. Failed answers are not kept. Opening a file removes
the answers that `reuse` excludes from it. No other answers are removed. To remove all answers, delete the folder
`answers` in the cache.
This module scores nothing.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from slm.base import cache
from slm.base.hashing import digest

Reuse = Literal["all", "interrupted", "none"]


@dataclass(frozen=True)
class Measured:
    """What a complete run took for all of its answers."""

    seconds: float  # from its first question to its last answer
    peak_memory_bytes: int


class Answers:
    """An open file of answers. `kept` has the lines of the reusable answers, by their key. Other lines are removed."""

    def __init__(self, path: Path, reuse: Reuse):
        lines = [] if reuse == "none" else _read(path)
        ends = [place for place, line in enumerate(lines) if "peak_memory_bytes" in line]
        if reuse == "interrupted" and ends:
            lines = lines[ends[-1] + 1 :]
        # of several answers to a question, the last one counts
        self.kept: dict[str, dict[str, Any]] = {line["asked"]: line for line in lines if "asked" in line}
        self._lines, self._run = lines, uuid.uuid4().hex[:12]
        mended = path.with_name(f"{path.name}.{os.getpid()}")
        with open(mended, "w", encoding="utf-8", opener=cache.opener) as file:
            file.writelines(map(_line, lines))
        mended.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def measured(self, asked: Iterable[str]) -> Measured | None:
        """What the kept answers to all these questions took together. None unless they are all answers of one run.

        Answers of a batch share its time, so the time of some of them means nothing. The run must have ended.
        """
        wanted = set(asked)
        runs = {self.kept[key]["run"] for key in wanted}
        mine = [line for line in self._lines if line["run"] in runs]
        ends = [line["peak_memory_bytes"] for line in mine if "peak_memory_bytes" in line]
        answers = [line for line in mine if "asked" in line]
        if len(runs) != 1 or not ends or {line["asked"] for line in answers} != wanted:
            return None
        return Measured(sum(line["elapsed"] for line in answers), ends[-1])

    def add(self, asked: str, answer: Mapping[str, Any], elapsed: float) -> None:
        """Appends an answer. `asked` is its key, and `elapsed` the time since the previous answer in seconds."""
        self._write({"asked": asked, "answer": answer, "elapsed": elapsed})

    def finish(self, peak_memory_bytes: int) -> None:
        """Appends the line that ends a complete run, with the run's peak memory in bytes."""
        self._write({"peak_memory_bytes": peak_memory_bytes})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict) -> None:
        self._file.write(_line({"run": self._run} | line))
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


def count(identity: object, asked: Iterable[str]) -> int:
    """How many of the questions with these keys have a kept answer. Changes nothing."""
    kept = {line.get("asked") for line in _read(cache.private("answers") / f"{digest(identity)}.jsonl")}
    return len(kept.intersection(asked))


def _read(path: Path) -> list[dict]:
    """The lines of a file, up to the first line that is incomplete or has another format."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
                line["run"]
                if "peak_memory_bytes" not in line:
                    line["asked"], line["answer"]["text"], line["elapsed"]
            except (ValueError, TypeError, KeyError):
                break
            lines.append(line)
    return lines


def _line(content: dict) -> str:
    return json.dumps(content) + "\n"
