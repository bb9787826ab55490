"""What a runtime is: it takes rows of token ids and gives, step by step, each row's next token."""

import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from .rows import Row

CACHE_BYTES = 2 * 2**30  # for the keys and values of the rows that are generated at once, with padding
LOGITS_BYTES = 2**27  # for the logits of several places at once
CPU_FACTS = Path("/proc/cpuinfo")
EXACT_INTEGERS = ("session.x64quantprecision", "1")  # of onnxruntime; slower, needed where integers saturate


def physical_cores() -> int:
    """The number of cores that this process may use. Two hyperthreads count as one core (proc(5), cpuinfo).

    Without /proc/cpuinfo, each hyperthread counts.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        blocks = CPU_FACTS.read_text(encoding="utf-8").split("\n\n")
    except OSError:
        return len(allowed)
    cores = set()
    for block in blocks:
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        if facts.get("processor", "").isdigit() and int(facts["processor"]) in allowed:
            cores.add((facts.get("physical id"), facts.get("core id", facts["processor"])))
    return len(cores) or len(allowed)


def integers_saturate() -> bool:
    """Whether onnxruntime clips sums of products of unsigned and signed bytes on this machine.

    On x86 without VNNI or AMX, onnxruntime clips these sums. An x86 machine without /proc/cpuinfo counts as such a
    machine.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return re.search(r"\b(avx512_vnni|avx_vnni|amx_int8)\b", CPU_FACTS.read_text("utf-8")) is None
    except OSError:
        return True


def exact_integers(decoder: dict) -> dict[str, str]:
    """The session's entry for exact sums. The entry in genai_config.json decides, if it has one.

    Without this entry, sums are exact on machines where integers saturate. The exports of slm/models/quantization.py
    set the entry to "0", because their sums never clip.
    """
    name, exact = EXACT_INTEGERS
    said = (decoder.get("session_options") or {}).get(name)
    if said in ("0", "1"):
        return {name: said}
    return {name: exact} if integers_saturate() else {}


class Runtime(Protocol):
    """What generates tokens: ContinuousRuntime, OnnxRuntime or TransformersRuntime. One thread at a time may use it."""

    library: str  # its package
    batch_size: int  # rows that it generates best together
    refills: bool  # whether the next row takes the place of a row that has ended
    end_tokens: frozenset[int]
    context_length: int  # tokens of a prompt and its answer together
    bytes_per_token: int  # of keys and values
    vocabulary_size: int  # entries of the logits; a tokenizer may know fewer tokens
    reads: bool  # whether it gives the logits of several places of a text at once, by `read`
    passes_end: bool  # whether tokens may follow an end token

    def steps(
        self, rows: list[Row], places: int = 0, take: Callable[[], int] | None = None
    ) -> Iterator[dict[int, int]]:
        """Yields the next token id of the rows that take part in a step, by their position in `rows`.

        The caller appends the token, and calls `Row.end` for a row that has ended. A row that has ended takes no
        further part. A runtime that refills has at most `places` rows under way (0: all). `take` gives the position of
        the next row, or raises IndexError; only a runtime that refills calls it.
        """

    def join(self, rows: Mapping[int, Row], take: Callable[[], int]) -> Iterator[dict[int, int]]:
        """Like `steps`, but `take` may bring new rows at any time. Ends when no row is left.

        Only for a runtime that refills.
        """

    def read(self, rows: list[Row], take: Callable[[], int] | None = None) -> Iterator[int | None]:
        """Calls `Row.see` for all given tokens of the rows. Yields each row's position when the row is done.

        May also yield None between two pieces of a row: the caller can do other work there.

        Only for a runtime that `reads`. A beginning that rows share is computed once.
        """

    def alone_in_batch(self, prompt: list[int]) -> bool:
        """Whether a prompt can't share a batch."""

    def lanes(self, rows: int) -> list["Runtime"]:
        """The runtimes that generate so many rows best, side by side, one thread each."""
