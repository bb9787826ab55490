"""The groups of rows that `python -m benchmarks` runs, each in a process of its own."""

import os
import tempfile
from pathlib import Path

from benchmarks.ratios import Row

GROUPS = ("generation", "pipeline", "evaluation", "logging", "start")


def rows_of(group: str) -> list[Row]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks import evaluation, full_size, generation, logging_cost, start
    from slm import cache

    cache.root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        measure = {
            "generation": generation.over_onnx,
            "pipeline": lambda: generation.over_transformers(Path(scratch)),
            "evaluation": lambda: evaluation.measure(Path(scratch)),
            "logging": logging_cost.measure,
            "start": start.measure,
            "full size": lambda: full_size.measure(Path(scratch)),
        }
        return measure[group]()
