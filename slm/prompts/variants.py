"""Finds rows that look like variants of one question and declare no cluster.

Such rows are right or wrong together. If they count as independent, differences look surer than they are. The search
takes time in proportion to the rows: it compares keys in tables, and never row with row.

Two rows look like variants in two cases. Their ids have one stem and a number or letter (`refund-1`, `refund-2`). Or
their texts are equal but for numbers and one or two words. Numbering of a whole set (`q1` to `q60`) is no sign.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from slm.base.wording import counted, quoted
from slm.prompts.prompt_rows import Prompt

MOST_OF_A_STEM = 10  # rows. More rows with one stem are a numbered subject, such as math-1 to math-50
TEXT_SHARE = 0.05  # of the rows without cluster: fewer rows may share a sentence by chance
TEXT_ROWS = 3
SHARED_WORDS = 4  # at least in two texts that differ in one word; one more if they differ in two
RAREST = 3  # words of a text that may be the ones that differ
BOILERPLATE = 0.1  # of the rows: a sentence in so many rows, as "Answer with one word.", belongs to no question
COMPARED = 20_000  # rows whose texts are compared: a second of processor time. Ids are compared in all rows
LONGEST = 2000  # characters of a text that are compared

_OWN_ID = re.compile(r"row-[0-9a-f]{12}")  # made from the content
_SUFFIX = re.compile(r"(.*?)(?:[-_.:/ #]?(\d{1,6})|(?:[-_.:/ #]|(?<=\d))([A-Za-z]))", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)*")


def hint(prompts: Sequence[Prompt]) -> str:
    """One line on rows that look like variants, without the name of the prompt set. "" if there are none."""
    undeclared = [prompt for prompt in prompts if prompt.cluster is None]
    by_id = _by_id(undeclared)
    groups = by_id or _by_text(undeclared[:COMPARED])
    if not groups:
        return ""
    examples = [quoted(prompt.id if by_id else _question(prompt)) for prompt in groups[0][:2]]
    compared = "" if by_id or len(undeclared) <= COMPARED else f" of the first {COMPARED:,}"
    found = f"{sum(map(len, groups)):,} rows{compared} look like variants of {counted(len(groups), 'question')}"
    return f"{found} ({', '.join(examples)}); give variants of one question the same `cluster`"


def _by_id(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    stems: dict[str, list[tuple[int, Prompt]]] = defaultdict(list)
    named = [prompt for prompt in prompts if not _OWN_ID.fullmatch(prompt.id)]
    for prompt in named:
        match = _SUFFIX.fullmatch(prompt.id)
        if match and any(mark.isalpha() for mark in match[1]):
            number = int(match[2]) if match[2] else ord(match[3].lower()) - ord("a") + 1
            stems[match[1].casefold()].append((number, prompt))
    found = []
    for members in stems.values():
        # variants are counted from the first; numbers far above the count come from another order, such as of pages
        counts_up = max(number for number, _ in members) <= 2 * len(members)
        if 2 <= len(members) <= MOST_OF_A_STEM and counts_up and len(members) < len(named):
            found.append([prompt for _, prompt in members])
    return found


def _by_text(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    sentences = [_sentences(_question(prompt)) for prompt in prompts]
    in_rows = Counter(sentence for own in sentences for sentence in set(own))
    most = max(2, BOILERPLATE * len(prompts))
    texts = [[word for sentence in own if in_rows[sentence] <= most for word in _words(sentence)] for own in sentences]
    rows_with = Counter(word for words in texts for word in set(words))
    first: dict[int, int] = {}  # key of a text with masked words -> first row with that key
    group = list(range(len(prompts)))  # row -> another row of its group, and at last the group's first row

    def root(row: int) -> int:
        while group[row] != row:
            group[row] = row = group[group[row]]
        return row

    for row, words in enumerate(texts):
        for key in _keys(words, rows_with):
            one, other = sorted((root(first.setdefault(key, row)), root(row)))
            group[other] = one
    groups: dict[int, list[Prompt]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[root(row)].append(prompt)
    found = [members for members in groups.values() if len(members) > 1]
    rows = sum(map(len, found))
    return found if rows >= max(TEXT_ROWS, TEXT_SHARE * len(prompts)) and len(groups) > 1 else []


def _keys(words: list[str], rows_with: Counter[str]) -> Iterable[int]:
    """One key for the text, and one for the text without each one or two of its rarest words."""
    if len(words) < SHARED_WORDS:
        return
    parts = [hash(pair) for pair in enumerate(words)]
    whole = sum(parts)
    yield whole
    counts = [rows_with[word] for word in words]
    rare = sorted(sorted(range(len(words)), key=counts.__getitem__)[:RAREST])
    if len(words) > SHARED_WORDS:
        yield from (whole - parts[place] for place in rare)
    if len(words) > SHARED_WORDS + 2:
        yield from (whole - parts[one] - parts[other] for one, other in itertools.combinations(rare, 2))


def _question(prompt: Prompt) -> str:
    """What the user says, without system messages and answers."""
    if prompt.messages is None:
        return (prompt.prompt or "")[:LONGEST]
    return "\n".join(message["content"] for message in prompt.messages if message["role"] == "user")[:LONGEST]


def _sentences(text: str) -> list[str]:
    return [sentence for part in _SENTENCE.split(text) if (sentence := part.strip().casefold())]


def _words(sentence: str) -> list[str]:
    return ["0" if word[0].isdigit() else word for word in _WORD.findall(sentence)]
