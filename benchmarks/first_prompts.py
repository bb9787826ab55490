"""The prompts of the printed figures: the first 150 rows of prompts/general.jsonl. The set has grown since."""

from dataclasses import replace
from pathlib import Path

from slm.prompts.prompt_sets import PromptSet, read_prompt_set
from slm.scorers.confined import CHECKS

FILE = Path("prompts/general.jsonl")
ROWS = 150


def prompt_set() -> PromptSet:
    whole = read_prompt_set(FILE, "general", CHECKS)
    return replace(whole, prompts=whole.prompts[:ROWS])


def written(folder: Path) -> Path:
    """A file of these rows."""
    file = folder / "general.jsonl"
    file.write_text("".join(FILE.read_text("utf-8").splitlines(keepends=True)[:ROWS]), encoding="utf-8")
    return file
