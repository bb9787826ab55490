"""Reads a prompt set from JSONL, CSV or YAML. The result has checked, frozen records, stable ids and one hash.

A row that is misread without an error becomes a wrong score. So every fault in a file is an error before any model is
loaded. The error has one line with the place, the value and the remedy. Rows of MLflow's datasets,
`{inputs: {messages}, expectations: {expected_response}}`, are read too. This module downloads nothing, applies no chat
template and scores no answer.
"""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from slm.base.errors import BadInput
from slm.base.wording import counted, quoted
from slm.prompts import row_mapping
from slm.prompts.prompt_rows import KnownScorers, Prompt, ScorerCall, _canonical_json, canonical_rows, read_row
from slm.prompts.readers import READERS, Reader, reader, text_of
from slm.prompts.row_mapping import RowMapping
from slm.prompts.system_prompts import SystemPrompt, added
from slm.prompts.texts import TextSet

ROWS = 100_000


@dataclass(frozen=True)
class PromptSet:
    """A checked prompt set.

    `source` is the name that the user gave. `sha256` is over the canonical rows, so it is the same in all formats.
    """

    name: str
    source: str
    prompts: tuple[Prompt, ...]
    sha256: str
    left_out: tuple[str, ...] = field(default=(), kw_only=True)  # columns of the file that `fields` does not map
    unnamed: int = field(default=0, kw_only=True)  # rows that expect a text and name no scorer: they got `contains`
    system: SystemPrompt | None = field(default=None, kw_only=True)  # the message of the rows that had none
    texts: TextSet | None = field(default=None, kw_only=True)  # whose perplexity is measured beside the prompts
    # scorers that may give further scores and figures, as `<scorer>/<name>`, and that are named by no row
    open_names: frozenset[str] = field(default=frozenset(), kw_only=True)

    @property
    def count(self) -> int:
        """The number of its rows, also if not all are at hand."""
        return len(self.prompts)

    @property
    def scorer_names(self) -> frozenset[str] | None:
        """The scorers of its rows. None if not all rows are at hand."""
        return frozenset(call.name for prompt in self.prompts for call in prompt.scorers)

    @property
    def without_scorers(self) -> int:
        """The number of its rows at hand that ask for no score. Fidelity compares models on these too."""
        return sum(not prompt.scorers for prompt in self.prompts)


def read_prompt_set(
    path: Path, source: str, known_scorers: KnownScorers, mapping: RowMapping = row_mapping.NONE
) -> PromptSet:
    """Reads the prompt set in `path`. The suffix gives the format: .jsonl, .csv, .yaml or .yml.

    A row without `id` gets an id from its content. A row with `expected` and without `scorers` gets the scorer
    `contains`. `known_scorers` has the scorers that a row may name, and each scorer's check of its options. `mapping`
    turns the rows into rows of ours.

    Raises:
        BadInput: the file can't be read, is too large or empty, or a row is wrong.
    """
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    unnamed = 0
    rows = reader(path.suffix.lower(), mapping.theirs)
    if rows is None:
        raise BadInput(f"{path.name}: a prompt set is a {', '.join(READERS)} file; rename or convert it")
    text, mapper = text_of(path), row_mapping.RowMapper(mapping)
    left_out = _left_out(rows, text, path.name, mapping)
    for place, row in rows(text, path.name):
        row = mapper(row, f"{path.name} {place}")
        prompt = added(read_row(row, f"{path.name} {place}", known_scorers), mapping.system)
        if prompt.id in places:
            remedy = (
                "ids are unique: change one"
                if isinstance(row, dict) and "id" in row
                else "remove one, or give each an `id`"
            )
            problem = f"`id` {quoted(prompt.id)} is already used in {places[prompt.id]}"
            raise BadInput(f"{path.name} {place}: {problem}; {remedy}")
        places[prompt.id] = place
        unnamed += gets_contains(row, prompt)
        prompts.append(prompt)
        if len(prompts) > ROWS:
            raise BadInput(f"{path.name}: has more than {ROWS:,} rows; split it, or draw a sample")
    if not prompts:
        raise BadInput(f"{path.name}: no rows; write at least one prompt")
    row_mapping.check_expected(mapping, any(prompt.expected for prompt in prompts), path.name)
    return replace(_prompt_set(path.stem, source, prompts), unnamed=unnamed, left_out=left_out, system=mapping.system)


def gets_contains(row: object, prompt: Prompt) -> bool:
    """Whether a row expects a text and names no scorer. `prompt` was read from the row."""
    return bool(prompt.expected) and isinstance(row, dict) and "scorers" not in row


def unnamed_note(rows: int) -> str:
    """What a run says of the rows that get `contains`. "" if there are none."""
    if not rows:
        return ""
    return (
        f"{counted(rows, 'row')} {'names no scorer, and gets' if rows == 1 else 'name no scorer, and get'} `contains`"
    )


def with_scorers(prompt_set: PromptSet, calls: Iterable[ScorerCall]) -> PromptSet:
    """The same prompts with `calls` added to each row. If a row already names a scorer, the row's own call stays."""
    changed = []
    for prompt in prompt_set.prompts:
        own = {call.name for call in prompt.scorers}
        added = tuple(call for call in calls if call.name not in own)
        changed.append(replace(prompt, scorers=prompt.scorers + added))
    found = _prompt_set(prompt_set.name, prompt_set.source, changed)
    return replace(found, unnamed=prompt_set.unnamed, left_out=prompt_set.left_out, system=prompt_set.system)


def _left_out(rows: Reader, text: str, name: str, mapping: RowMapping) -> tuple[str, ...]:
    """The columns that are left out. It reads the text once more, because a column may be in the last row only."""
    if not mapping.columns:
        return ()
    noted: set[tuple[str, str]] = set()
    for _, row in itertools.islice(rows(text, name), ROWS):
        noted |= row_mapping.seen(row, mapping)
    return row_mapping.left_out(noted, mapping) if noted else ()


def _prompt_set(name: str, source: str, prompts: Iterable[Prompt]) -> PromptSet:
    prompts = tuple(prompts)
    return PromptSet(name, source, prompts, hashlib.sha256(_canonical_json(canonical_rows(prompts))).hexdigest())
