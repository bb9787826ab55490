"""Reading a prompt set: JSONL, CSV or YAML into checked, frozen records with stable ids and one hash.

Everything that is wrong with a file is said here, in one line with the place, the value and the remedy, before any
model is loaded: a row that is misread silently becomes a wrong score. MLflow's own dataset rows,
`{inputs: {messages}, expectations: {expected_response}}`, are read as well. Nothing is downloaded, no chat template
is applied and no answer is scored here.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from slm.base.errors import BadInput
from slm.base.wording import quoted
from slm.prompts.prompt_rows import KnownScorers, Prompt, ScorerCall, _canonical_json, canonical_rows, read_row
from slm.prompts.readers import READERS, _text_of

ROWS = 100_000


@dataclass(frozen=True)
class PromptSet:
    """`source` is what the user named it by; `sha256` is taken over the canonical rows, whatever the file format."""

    name: str
    source: str
    prompts: tuple[Prompt, ...]
    sha256: str


def read_prompt_set(path: Path, source: str, known_scorers: KnownScorers) -> PromptSet:
    """Read the prompt set in `path` by its suffix: .jsonl, .csv, .yaml or .yml. Raises BadInput.

    A row without `id` gets one made of its content; a row with `expected` and without `scorers` is scored by
    `contains`. `known_scorers` has the scorers that a row may ask for, and how each checks its options.
    """
    prompts, places = [], {}
    rows = READERS.get(path.suffix.lower())
    if rows is None:
        raise BadInput(f"{path.name}: a prompt set is a {', '.join(READERS)} file; rename or convert it")
    for place, row in rows(_text_of(path), path.name):
        prompt = read_row(row, f"{path.name} {place}", known_scorers)
        if prompt.id in places:
            remedy = "ids are unique: change one" if "id" in row else "remove one, or give each an `id`"
            problem = f"`id` {quoted(prompt.id)} is that of {places[prompt.id]} too"
            raise BadInput(f"{path.name} {place}: {problem}; {remedy}")
        places[prompt.id] = place
        prompts.append(prompt)
        if len(prompts) > ROWS:
            raise BadInput(f"{path.name}: has more than {ROWS:,} rows; split it, or draw a sample")
    if not prompts:
        raise BadInput(f"{path.name}: no rows; write at least one prompt")
    return _prompt_set(path.stem, source, prompts)


def with_scorers(prompt_set: PromptSet, calls: Iterable[ScorerCall]) -> PromptSet:
    """The same prompts with these calls added to each one's own; a scorer that a row asks for itself stays its own."""
    changed = []
    for prompt in prompt_set.prompts:
        own = {call.name for call in prompt.scorers}
        added = tuple(call for call in calls if call.name not in own)
        changed.append(replace(prompt, scorers=prompt.scorers + added))
    return _prompt_set(prompt_set.name, prompt_set.source, changed)


def _prompt_set(name: str, source: str, prompts: Iterable[Prompt]) -> PromptSet:
    prompts = tuple(prompts)
    return PromptSet(name, source, prompts, hashlib.sha256(_canonical_json(canonical_rows(prompts))).hexdigest())
