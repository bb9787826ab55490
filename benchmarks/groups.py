"""The groups of rows that `python -m benchmarks` runs, each in a process of its own."""

import os
import tempfile
from pathlib import Path

from benchmarks.ratios import Row

GROUPS = ("generation", "pipeline", "evaluation", "logging", "start", "structured")


def rows_of(group: str, provider: str) -> list[Row]:
    """A group's rows with everything on `provider`, cpu or cuda."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks import evaluation, full_size, generation, logging_cost, start, structured
    from slm.base import cache

    cache.root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        measure = {
            "generation": lambda: generation.over_onnx(provider),
            "pipeline": lambda: generation.over_transformers(Path(scratch), provider),
            "evaluation": lambda: evaluation.measure(Path(scratch), provider),
            "logging": logging_cost.measure,
            "start": lambda: start.measure(provider),
            "structured": lambda: structured.measure(Path(scratch), provider),
            "full size": lambda: full_size.measure(Path(scratch), provider),
        }
        return measure[group]()
